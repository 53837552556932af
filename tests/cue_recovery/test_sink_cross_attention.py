"""Folded attention equals the plain form (Eq. 3-4), forward and backward, and the layer saves few tensors."""

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.utils import _apply_to_tensors

from trl_vicur.cue_recovery import CueRecoveryConfig, CueRecoveryContext, CueRecoveryLayer, SinkCrossAttention
from trl_vicur.cue_recovery.attention import _average, _low_rank_gradients, _recomputed_gradients, additive_mask


def make_attention(
    num_heads: int, head_dim: int, dtype: torch.dtype = torch.float32, hidden_size: int | None = None
) -> SinkCrossAttention:
    width = num_heads * head_dim
    attention = SinkCrossAttention(hidden_size or width, num_heads, eps=1e-6, bottleneck_size=width)
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
    hidden_size=st.sampled_from([8, 24, 96]),
    seed=st.integers(0, 2**16),
)
def test_folded_equals_plain_forward_and_backward(batch, seq, num_heads, head_dim, hidden_size, seed):
    torch.manual_seed(seed)
    attention = make_attention(num_heads, head_dim, hidden_size=hidden_size)
    sink, hidden_states, visual_mask = make_inputs(batch, seq, hidden_size)
    wanted = [sink, hidden_states, *attention.parameters()]
    direction = torch.randn(batch, hidden_size)

    folded = attention(sink, hidden_states, visual_mask)
    plain = attention.forward_plain(sink, hidden_states, visual_mask)
    torch.testing.assert_close(folded, plain, rtol=1e-4, atol=1e-5)
    folded_grads = torch.autograd.grad((folded * direction).sum(), wanted)
    plain_grads = torch.autograd.grad((plain * direction).sum(), wanted)
    torch.testing.assert_close(folded_grads, plain_grads, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("has_weight", [True, False])
@pytest.mark.parametrize("gradients", [_recomputed_gradients, _low_rank_gradients])
def test_both_backward_passes_equal_autograd(gradients, has_weight):
    """On a CPU, float32 gradients come from a different backward pass than on a GPU or in low precision."""
    torch.manual_seed(0)
    query, grad = torch.randn(2, 2, 4, 24, dtype=torch.float64)
    _, hidden_states, visual_mask = make_inputs(2, 30, 24, dtype=torch.float64)
    visual_mask[1] = False
    weight = torch.rand(24, dtype=torch.float64, requires_grad=True) if has_weight else None
    mask = additive_mask(visual_mask, hidden_states)
    inputs = [query.requires_grad_(), hidden_states, *[weight] * has_weight]

    expected = torch.autograd.grad(_average(query, hidden_states, weight, mask, 0.3, 1e-2), inputs, grad)
    arguments = (grad, query.detach(), hidden_states.detach(), weight, mask, 0.3, 1e-2)
    found = gradients(*arguments, (True, True, has_weight))
    torch.testing.assert_close(found[: len(inputs)], expected)
    assert has_weight or found[2] is None
    assert gradients(*arguments, (True, False, has_weight))[1] is None


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
    # A float32 adapter on a bfloat16 backbone, PEFT's default, and both in bfloat16
    mixed = attention(sink.bfloat16(), hidden_states.bfloat16(), visual_mask)
    low = attention.to(torch.bfloat16)(sink.bfloat16(), hidden_states.bfloat16(), visual_mask)
    for update in (mixed, low):
        assert torch.nn.functional.cosine_similarity(update.float(), expected, dim=-1).min() > 0.999


def test_float32_module_trains_on_frozen_bfloat16_states():
    """Nothing below the first module requires a gradient, unless gradient checkpointing asks for it."""
    attention = make_attention(num_heads=2, head_dim=8)
    sink, hidden_states, visual_mask = make_inputs(2, 5, 16)
    attention(sink.detach().bfloat16(), hidden_states.detach().bfloat16(), visual_mask).sum().backward()
    assert all(parameter.grad.any() for parameter in attention.parameters())


@settings(max_examples=25, deadline=None)
@given(
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    is_mixed=st.booleans(),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    outlier=st.sampled_from([1.0, 1e3, 6e4]),
    seed=st.integers(0, 2**16),
)
def test_outlier_tokens_do_not_overflow_low_precision(dtype, is_mixed, scale, outlier, seed):
    """Against Eq. 3-4 in float32, forward and backward, with an outlier in the hidden state of one visual token."""
    torch.manual_seed(seed)
    attention = make_attention(num_heads=4, head_dim=16).to(dtype).float()
    sink, hidden_states, visual_mask = make_inputs(2, 30, 64)
    with torch.no_grad():
        hidden_states.mul_(scale)
        hidden_states[0, 0, 3] = outlier
        sink.copy_(sink.to(dtype))
        hidden_states.copy_(hidden_states.to(dtype))
    direction = torch.randn(2, 64).to(dtype)
    wanted = [sink, hidden_states, *attention.parameters()]
    expected = attention.forward_plain(sink, hidden_states, visual_mask)
    expected_grads = torch.autograd.grad((expected * direction).sum(), wanted)

    if not is_mixed:  # mixed is PEFT's default: float32 weights on a float16 or bfloat16 backbone
        attention = attention.to(dtype)
    sink, hidden_states = (tensor.detach().to(dtype).requires_grad_() for tensor in (sink, hidden_states))
    update = attention(sink, hidden_states, visual_mask)
    grads = torch.autograd.grad((update * direction).sum(), [sink, hidden_states, *attention.parameters()])
    for actual, reference in zip((update, *grads), (expected, *expected_grads), strict=True):
        assert actual.isfinite().all()
        error = (actual.float() - reference).norm() / reference.norm()
        assert error < (0.05 if dtype == torch.bfloat16 else 0.02)


def test_trains_in_float16_with_a_gradient_scaler():
    torch.manual_seed(0)
    attention = make_attention(num_heads=2, head_dim=16)
    sink, hidden_states, visual_mask = make_inputs(2, 20, 32)
    hidden_states.data[0, 0, 0] = 6e4
    optimizer, scaler = torch.optim.SGD(attention.parameters(), lr=0.3), torch.amp.GradScaler("cpu", init_scale=2**10)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = (attention(sink.half(), hidden_states.half(), visual_mask) - 1.0).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0] and scaler.get_scale() == 2**10


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
    """Besides its inputs, the folded form saves (batch, heads, seq) for backward, never (batch, seq, hidden)."""
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


def make_layer(hidden_size: int, adapters: tuple[str, ...] = ("default",)) -> CueRecoveryLayer:
    layer = CueRecoveryLayer(torch.nn.Linear(hidden_size, hidden_size))
    for name in adapters:
        layer.update_layer(name, CueRecoveryConfig(), hidden_size=hidden_size, num_heads=2, eps=1e-6)
        layer.sink_attention[name].o_proj.weight.data.normal_(std=0.2)
    layer.set_adapter(list(adapters))
    return layer


def plain_layer(layer: CueRecoveryLayer, hidden_states: torch.Tensor, context: CueRecoveryContext) -> torch.Tensor:
    updated = hidden_states.clone()
    for name, positions in context.sink_positions.items():
        for sample, position in enumerate(positions.tolist()):
            if position >= 0:
                sink, mask = hidden_states[sample, position], context.visual_mask[sample]
                update = layer.sink_attention[name].forward_plain(sink[None], hidden_states[[sample]], mask[None])
                updated[sample, position] = updated[sample, position] + update[0]
    return updated


@settings(max_examples=30, deadline=None)
@given(batch=st.integers(1, 3), seq=st.integers(3, 20), num_adapters=st.integers(1, 2), seed=st.integers(0, 2**16))
def test_layer_equals_plain_forward_and_backward(batch, seq, num_adapters, seed):
    """Also where backward reads the layer's output instead of its input, which is not saved."""
    torch.manual_seed(seed)
    adapters = ("default", "other")[:num_adapters]
    layer = make_layer(8, adapters)
    leaf = torch.randn(batch, seq, 8, requires_grad=True)
    sink_positions = {name: torch.randint(-1, seq, (batch,)) for name in adapters}
    visual_mask = torch.rand(batch, seq) < 0.5
    for positions in sink_positions.values():
        visual_mask &= torch.arange(seq) != positions.unsqueeze(1)
    for name in adapters:
        sink_positions[name] = torch.where(visual_mask.any(dim=1), sink_positions[name], -1)
    context = CueRecoveryContext(visual_mask, sink_positions)
    direction = torch.randn(batch, seq, 8)
    wanted = [leaf, *(p for p in layer.sink_attention.parameters())]

    results = []
    for run in (layer, lambda *args: plain_layer(layer, *args)):
        output = run(leaf.sin(), context)
        loss = (output.tanh() * direction).sum()
        results.append([output, *torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=2e-5)


def test_layer_keeps_no_hidden_states_of_its_own():
    """The input is freed after the forward. Backward uses the output, which the decoder layer saves anyway."""
    layer = make_layer(8)
    leaf = torch.randn(2, 6, 8, requires_grad=True)
    visual_mask = torch.tensor([[False, True, True, False, False, False]] * 2)
    hidden_states = leaf * 2.0
    is_alive = weakref.ref(hidden_states)
    output = layer(hidden_states, CueRecoveryContext(visual_mask, {"default": torch.tensor([0, 0])}))
    del hidden_states
    assert is_alive() is None
    output.sum().backward()


def test_layer_refuses_backward_after_an_in_place_change():
    layer = make_layer(8)
    visual_mask = torch.tensor([[False, True, True]])
    hidden_states = torch.randn(1, 3, 8, requires_grad=True) * 1.0
    output = layer(hidden_states, CueRecoveryContext(visual_mask, {"default": torch.tensor([0])}))
    output.mul_(2.0)
    with pytest.raises(RuntimeError, match="changed in place"):
        output.sum().backward()


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_autocast_copies_neither_hidden_states_nor_weights(weight_dtype):
    torch.manual_seed(0)
    attention = make_attention(num_heads=2, head_dim=16, dtype=weight_dtype)
    sink, hidden_states, visual_mask = make_inputs(2, 40, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        update = attention(sink, hidden_states, visual_mask)
    assert torch.equal(update, attention(sink, hidden_states, visual_mask))


def test_context_is_not_copied_by_mixed_precision_of_fsdp2():
    """FSDP2 casts every float tensor among a forward's arguments and copies dataclasses to do so."""
    context = CueRecoveryContext(torch.ones(1, 2, dtype=torch.bool), {"default": torch.tensor([0])})
    arguments = _apply_to_tensors(lambda tensor: tensor.bfloat16(), {"cue_recovery_context": context})
    assert arguments["cue_recovery_context"] is context
