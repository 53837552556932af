"""The folded attention is the plain one (Eq. 3-4), forward and backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_vicur.cue_recovery import SinkCrossAttention


def make_attention(num_heads: int, head_dim: int, dtype: torch.dtype = torch.float32) -> SinkCrossAttention:
    attention = SinkCrossAttention(num_heads * head_dim, num_heads, eps=1e-6)
    with torch.no_grad():
        attention.o_proj.weight.normal_(std=0.2)
        attention.q_norm.weight.uniform_(0.5, 1.5)
        attention.kv_norm.weight.uniform_(0.5, 1.5)
    return attention.to(dtype)


def make_inputs(batch: int, seq: int, hidden: int, dtype: torch.dtype = torch.float32):
    sink = torch.randn(batch, hidden, dtype=dtype, requires_grad=True)
    hidden_states = torch.randn(batch, seq, hidden, dtype=dtype, requires_grad=True)
    visual_mask = torch.rand(batch, seq) < 0.5
    visual_mask[:, 0] = True
    return sink, hidden_states, visual_mask


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 4),
    seq=st.integers(1, 40),
    num_heads=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([4, 8, 24]),
    seed=st.integers(0, 2**16),
)
def test_folded_equals_plain_forward_and_backward(batch, seq, num_heads, head_dim, seed):
    torch.manual_seed(seed)
    attention = make_attention(num_heads, head_dim)
    sink, hidden_states, visual_mask = make_inputs(batch, seq, num_heads * head_dim)
    wanted = [sink, hidden_states, *attention.parameters()]
    direction = torch.randn(batch, num_heads * head_dim)

    folded = attention(sink, hidden_states, visual_mask)
    plain = attention.forward_plain(sink, hidden_states, visual_mask)
    torch.testing.assert_close(folded, plain, rtol=1e-4, atol=1e-5)
    folded_grads = torch.autograd.grad((folded * direction).sum(), wanted)
    plain_grads = torch.autograd.grad((plain * direction).sum(), wanted)
    torch.testing.assert_close(folded_grads, plain_grads, rtol=1e-3, atol=2e-5)


def test_folded_equals_plain_at_the_real_width():
    torch.manual_seed(0)
    attention = make_attention(num_heads=16, head_dim=128)
    sink, hidden_states, visual_mask = make_inputs(1, 300, 2048)
    folded = attention(sink, hidden_states, visual_mask)
    plain = attention.forward_plain(sink, hidden_states, visual_mask)
    assert (folded - plain).abs().max() < 1e-5 * plain.abs().max().clamp(min=1)


@pytest.mark.parametrize("form", ["forward", "forward_plain"])
def test_gradcheck_in_float64(form):
    torch.manual_seed(0)
    attention = make_attention(num_heads=2, head_dim=3, dtype=torch.float64)
    sink, hidden_states, visual_mask = make_inputs(2, 5, 6, dtype=torch.float64)
    names, parameters = zip(*attention.named_parameters(), strict=True)

    def call(sink, hidden_states, *parameters):
        values = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(
            _Form(attention, form),
            {f"attention.{n}": v for n, v in values.items()},
            (sink, hidden_states, visual_mask),
        )

    assert torch.autograd.gradcheck(call, (sink, hidden_states, *parameters), atol=1e-8)


class _Form(torch.nn.Module):
    def __init__(self, attention, form):
        super().__init__()
        self.attention, self.form = attention, form

    def forward(self, *args):
        return getattr(self.attention, self.form)(*args)


def test_bfloat16_stays_near_float32():
    torch.manual_seed(0)
    attention = make_attention(num_heads=4, head_dim=16)
    sink, hidden_states, visual_mask = make_inputs(2, 50, 64)
    expected = attention(sink, hidden_states, visual_mask)
    # A float32 adapter on a bfloat16 backbone, as PEFT makes it, and one all in bfloat16
    mixed = attention(sink.bfloat16(), hidden_states.bfloat16(), visual_mask)
    low = attention.to(torch.bfloat16)(sink.bfloat16(), hidden_states.bfloat16(), visual_mask)
    for update in (mixed, low):
        assert torch.nn.functional.cosine_similarity(update.float(), expected, dim=-1).min() > 0.999


def test_weights_are_a_distribution_over_the_visual_tokens():
    torch.manual_seed(0)
    attention = make_attention(num_heads=2, head_dim=8)
    sink, hidden_states, visual_mask = make_inputs(3, 20, 16)
    weights = attention.attention_weights(sink, hidden_states, visual_mask)
    assert weights.shape == (3, 2, 20)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(3, 2))
    assert (weights.masked_select(~visual_mask.unsqueeze(1)) == 0).all()


def test_no_visual_token_gives_finite_values_and_gradients():
    attention = make_attention(num_heads=2, head_dim=4)
    sink, hidden_states, visual_mask = make_inputs(2, 6, 8)
    update = attention(sink, hidden_states, torch.zeros_like(visual_mask))
    update.sum().backward()
    assert update.isfinite().all() and hidden_states.grad.isfinite().all()


def test_keys_and_values_do_not_materialize():
    """Beyond its inputs, the folded form keeps (batch, heads, seq) for backward, never (batch, seq, hidden)."""
    attention = make_attention(num_heads=4, head_dim=64)
    sink, hidden_states, visual_mask = make_inputs(1, 500, 256)
    saved = []

    def note(tensor):
        if tensor.data_ptr() != hidden_states.data_ptr():
            saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        attention(sink, hidden_states, visual_mask)
    assert max(saved) < hidden_states.numel()
