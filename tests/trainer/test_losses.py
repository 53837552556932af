"""Values and gradients of each objective agree with a plain float64 implementation of its definition."""

import math
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    CLIPVisionConfig,
    Cohere2Config,
    Cohere2VisionConfig,
    Cohere2VisionForConditionalGeneration,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    SiglipVisionConfig,
)
from transformers.modeling_outputs import CausalLMOutput

from trl_vicur.trainer import lm_head, token_chunks
from trl_vicur.trainer.lm_head import LMHead
from trl_vicur.trainer.losses import (
    full_divergence,
    importance_sampling_ratio,
    liger_divergence_sum,
    sampled_token_loss,
    token_logprobs,
    topk_divergence,
    topk_logprobs,
)


BETAS = [0.0, 0.3, 0.5, 1.0]


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    """Splits the few tokens and columns of these tests into chunks, too; the last chunk is smaller."""
    monkeypatch.setattr(token_chunks, "CPU_CHUNK_LOGITS", 16 * 70)
    monkeypatch.setattr(lm_head, "CPU_WEIGHT_BLOCK", 16 * 20)
    monkeypatch.setattr(token_chunks, "TILE_TOKENS", 16)
    monkeypatch.setattr(token_chunks, "TILE_COLUMNS", 32)


def reference_divergence(student_logits, teacher_logits, beta):
    """Generalized JSD as in On-Policy Distillation (arXiv 2306.13649, Eq. 1)."""
    s, t = student_logits.softmax(-1), teacher_logits.softmax(-1)
    if beta == 0.0:
        return (t * (t.log() - s.log())).sum(-1)
    if beta == 1.0:
        return (s * (s.log() - t.log())).sum(-1)
    m = beta * t + (1 - beta) * s
    return (beta * t * (t.log() - m.log()) + (1 - beta) * s * (s.log() - m.log())).sum(-1)


def make_pair(tokens=40, vocab=70, student_width=16, teacher_width=24, seed=0):
    """Hidden states and heads of a student and of a wider teacher."""
    torch.manual_seed(seed)
    student = torch.randn(tokens, student_width, requires_grad=True)
    teacher = torch.randn(tokens, teacher_width)
    student_head = LMHead(torch.randn(vocab, student_width).mul_(0.5).requires_grad_(), torch.randn(vocab))
    teacher_head = LMHead(torch.randn(vocab, teacher_width).mul_(0.5))
    return student, student_head, teacher, teacher_head


def reference_logits(states, head, temperature):
    logits = states.double() @ head.weight.double().T
    if head.bias is not None:
        logits = logits + head.bias.double()
    logits = logits * head.logit_scale
    if head.softcapping is not None:
        logits = head.softcapping * torch.tanh(logits / head.softcapping)
    return logits / temperature


def gradients(loss, student, student_head):
    return [g.float() for g in torch.autograd.grad(loss, [student, student_head.weight])]


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_full_divergence(beta, temperature):
    student, student_head, teacher, teacher_head = make_pair()
    divergence, entropy = full_divergence(student, student_head, teacher, teacher_head, beta, temperature)
    student_logits = reference_logits(student, student_head, temperature)
    teacher_logits = reference_logits(teacher, teacher_head, temperature)
    expected = reference_divergence(student_logits, teacher_logits, beta)
    torch.testing.assert_close(divergence.double(), expected, rtol=1e-4, atol=1e-5)
    probs = student_logits.softmax(-1)
    torch.testing.assert_close(entropy.double(), -(probs * probs.log()).sum(-1), rtol=1e-4, atol=1e-5)
    weights = torch.rand(len(student))
    torch.testing.assert_close(
        gradients((divergence * weights).sum(), student, student_head),
        gradients((expected * weights).sum(), student, student_head),
        rtol=1e-3,
        atol=1e-5,
    )


@pytest.mark.parametrize("beta", BETAS)
def test_liger_divergence_has_the_same_sum(beta):
    student, student_head, teacher, teacher_head = make_pair()
    arguments = (student, student_head, teacher, teacher_head, beta, 0.7)
    total, expected = liger_divergence_sum(*arguments), full_divergence(*arguments)[0].sum()
    torch.testing.assert_close(total, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        gradients(total * 0.5, student, student_head),
        gradients(expected * 0.5, student, student_head),
        rtol=1e-3,
        atol=1e-5,
    )


@pytest.mark.parametrize("objective", ["full, beta 0", "full, beta 0.3", "full, beta 1", "topk", "sampled"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("scale, softcapping", [(1.0, None), (0.5, 4.0)])
def test_frozen_head_changes_neither_values_nor_gradients(objective, temperature, scale, softcapping):
    """
    On a CPU, the gradients of a frozen head are computed with the values, in torch. A trainable head uses TRL's
    kernels (in their torch form), as both do on a GPU.
    """
    results = []
    for trains in (True, False):
        student, student_head, teacher, teacher_head = make_pair()
        student_head.weight.requires_grad_(trains)
        student_head = student_head._replace(logit_scale=scale, softcapping=softcapping)
        both = (student, student_head, teacher, teacher_head)
        if objective == "topk":
            top = topk_logprobs(teacher, teacher_head, 5, temperature)
            values, entropy = topk_divergence(student, student_head, *top, 0.5, temperature)
        elif objective == "sampled":
            values, entropy = token_logprobs(student, student_head, torch.arange(len(student)), temperature)
        else:
            values, entropy = full_divergence(*both, float(objective.split()[-1]), temperature)
        (gradient,) = torch.autograd.grad((values * torch.arange(len(student))).sum(), student)
        results.append([values, entropy, gradient])
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("trains_head", [True, False])
def test_divergence_of_no_tokens_is_empty(trains_head):
    student, student_head, teacher, teacher_head = make_pair(tokens=0)
    student_head.weight.requires_grad_(trains_head)
    values, entropy = full_divergence(student, student_head, teacher, teacher_head, 0.5)
    assert values.shape == entropy.shape == (0,)
    values.sum().backward()


def test_liger_divergence_of_no_tokens_is_zero():
    student, student_head, teacher, teacher_head = make_pair(tokens=0)
    assert liger_divergence_sum(student, student_head, teacher, teacher_head, 0.0) == 0


def test_liger_refuses_unsupported_logits():
    student, student_head, teacher, teacher_head = make_pair()
    with pytest.raises(ValueError, match="neither logit scale nor soft-capping"):
        liger_divergence_sum(student, student_head._replace(softcapping=30.0), teacher, teacher_head, 0.0)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("scale, softcapping", [(1.0, None), (0.5, 4.0)])
def test_topk_divergence(beta, scale, softcapping):
    student, student_head, teacher, teacher_head = make_pair()
    student_head = student_head._replace(logit_scale=scale, softcapping=softcapping)
    divergence, entropy = topk_divergence(
        student, student_head, *topk_logprobs(teacher, teacher_head, 5, 0.7), beta, 0.7
    )

    student_probs = reference_logits(student, student_head, 0.7).softmax(-1)
    teacher_probs = reference_logits(teacher, teacher_head, 0.7).softmax(-1)
    top = teacher_probs.topk(5).indices

    def with_rest(probs):
        kept = probs.gather(-1, top)
        return torch.cat([kept, 1 - kept.sum(-1, keepdim=True)], dim=-1).log()

    expected = reference_divergence(with_rest(student_probs), with_rest(teacher_probs), beta)
    torch.testing.assert_close(divergence.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        gradients(divergence.sum(), student, student_head),
        gradients(expected.sum(), student, student_head),
        rtol=1e-3,
        atol=1e-5,
    )
    torch.testing.assert_close(entropy.double(), -(student_probs * student_probs.log()).sum(-1), rtol=1e-4, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(beta=st.floats(0, 1), k=st.integers(1, 80), temperature=st.floats(0.3, 3.0), seed=st.integers(0, 1000))
def test_topk_divergence_is_between_zero_and_the_full_one(beta, k, temperature, seed):
    pair = make_pair(tokens=8, seed=seed)
    topk, _ = topk_divergence(*pair[:2], *topk_logprobs(*pair[2:], k, temperature), beta, temperature)
    full, _ = full_divergence(*pair, beta, temperature)
    assert (topk >= -1e-5).all() and (topk <= full + 1e-4).all()
    if k >= 70:
        torch.testing.assert_close(topk, full, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scale, softcapping", [(1.0, None), (0.5, 4.0)])
def test_token_logprobs(scale, softcapping):
    student, student_head, _, _ = make_pair()
    student_head = student_head._replace(logit_scale=scale, softcapping=softcapping)
    token_ids = torch.randint(0, 70, (len(student),))
    logprobs, entropy = token_logprobs(student, student_head, token_ids, temperature=0.7)
    expected = reference_logits(student, student_head, 0.7).log_softmax(-1)
    torch.testing.assert_close(entropy.double(), -(expected.exp() * expected).sum(-1), rtol=1e-4, atol=1e-5)
    expected = expected.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-4, atol=1e-5)
    weights = torch.randn(len(student))  # a different weight per token, like advantages
    torch.testing.assert_close(
        gradients((logprobs * weights).sum(), student, student_head),
        gradients((expected * weights).sum(), student, student_head),
        rtol=1e-3,
        atol=1e-5,
    )
    assert not entropy.requires_grad


def test_sampled_token_loss_on_policy_is_eq_7():
    """With a ratio of one, the gradient is −A ∇ log p: Eq. 6-7."""
    logprobs = torch.tensor([-1.0, -2.0, -30.0], requires_grad=True)
    teacher = torch.tensor([-0.5, -4.0, -1.0])
    loss, advantages, is_clipped = sampled_token_loss(logprobs, logprobs.detach(), teacher, 0.2, 0.2, 10.0)
    assert advantages.tolist() == [0.5, -2.0, 10.0]  # the last one is clamped
    torch.testing.assert_close(loss, -advantages)
    loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, -advantages)
    assert not is_clipped.any()


def test_sampled_token_gradient_equals_that_of_the_reverse_kl():
    """Averaged over all tokens that the student may sample, the k1 advantage gives ∇ KL(student ‖ teacher) exactly."""
    torch.manual_seed(0)
    logits = torch.randn(50, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(50, dtype=torch.float64).log_softmax(-1)
    logprobs = logits.log_softmax(-1)
    loss, _, _ = sampled_token_loss(logprobs, logprobs.detach(), teacher, 0.2, 0.2, 100.0)
    (expected_gradient,) = torch.autograd.grad((logprobs.exp().detach() * loss).sum(), logits, retain_graph=True)
    (kl_gradient,) = torch.autograd.grad((logprobs.exp() * (logprobs - teacher)).sum(), logits)
    torch.testing.assert_close(expected_gradient, kl_gradient)


@pytest.mark.parametrize(
    "log_ratio, advantage, expected_ratio, clipped",
    [
        (math.log(1.1), 1.0, 1.1, False),
        (math.log(1.5), 1.0, 1.3, True),  # clipped above, at 1 + epsilon_high
        (math.log(1.5), -1.0, 1.5, False),  # the pessimistic side is not clipped
        (math.log(0.5), -1.0, 0.8, True),
        (math.log(0.5), 1.0, 0.5, False),
    ],
)
def test_sampled_token_loss_clips_like_ppo(log_ratio, advantage, expected_ratio, clipped):
    old = torch.tensor([-2.0])
    logprobs = (old + log_ratio).requires_grad_()
    loss, _, is_clipped = sampled_token_loss(logprobs, old, old + advantage, 0.2, 0.3, 10.0)
    torch.testing.assert_close(loss, torch.tensor([-expected_ratio * advantage]))
    assert is_clipped.item() is clipped
    loss.sum().backward()
    assert (logprobs.grad == 0).item() is clipped


def test_difference_of_log_probabilities_is_clamped():
    """The authors clamp each log-probability at −10, which removes the advantage of tokens that both find unlikely."""
    student, teacher = torch.tensor([-12.0, -25.0, -1.0]), torch.tensor([-15.0, -2.0, -30.0])
    _, advantages, _ = sampled_token_loss(student, student, teacher, 0.2, 0.2, advantage_clip=10.0)
    assert advantages.tolist() == [-3.0, 10.0, -10.0]


@pytest.mark.parametrize(
    "mode, expected",
    [
        ("token_truncate", [2.0, 0.5, 1.0, 3.0, 1.0]),
        ("token_mask", [2.0, 0.0, 1.0, 0.0, 1.0]),
        ("sequence_truncate", [0.5, 0.5, 0.5, 3.0, 3.0]),
        ("sequence_mask", [0.0, 0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_importance_sampling_ratio(mode, expected):
    """Two completions of three and two tokens. Tokens without vLLM's log-probability are not corrected."""
    mask = torch.tensor([[True, True, True], [True, True, False]])
    ratios = torch.tensor([2.0, 0.1, math.nan, 4.0, 1.0])
    ratio = importance_sampling_ratio(torch.zeros(5), -ratios.log(), mask, mode, clip_min=0.5, clip_max=3.0)
    torch.testing.assert_close(ratio, torch.tensor(expected))
    unbounded = importance_sampling_ratio(torch.zeros(5), -ratios.log(), mask, mode, clip_min=None, clip_max=None)
    product = torch.tensor([0.2, 0.2, 0.2, 4.0, 4.0])
    torch.testing.assert_close(unbounded, product if mode.startswith("sequence") else ratios.nan_to_num(nan=1.0))


@pytest.mark.parametrize("mode", ["full", "topk", "sampled"])
@pytest.mark.parametrize("trains_head", [True, False])
def test_logits_are_never_materialized(mode, trains_head):
    """No tensor of tokens × vocabulary is saved for backward."""
    tokens, vocab = 1024, 4000
    student, student_head, teacher, teacher_head = make_pair(tokens, vocab)
    student_head.weight.requires_grad_(trains_head)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
        if mode == "full":
            full_divergence(student, student_head, teacher, teacher_head, 0.5)
        elif mode == "topk":
            topk_divergence(student, student_head, *topk_logprobs(teacher, teacher_head, 10), 0.5)
        else:
            token_logprobs(student, student_head, torch.zeros(tokens, dtype=torch.long))
    assert max(saved) < tokens * vocab / 4


# --- Half precision: products of states and heads are float32, and no head is copied to float32 ---


def make_half_pair(dtype, trains_head=True, state_dtype=None):
    """Likely tokens have logits of about 30, where bfloat16 has steps of 0.125."""
    student, student_head, teacher, teacher_head = make_pair()
    state_dtype = state_dtype or dtype
    student = (student.detach() * 2).to(state_dtype).requires_grad_()
    weight = (student_head.weight.detach() * 2).to(dtype).requires_grad_(trains_head)
    student_head = LMHead(weight, student_head.bias.to(dtype))
    return student, student_head, (teacher * 2).to(state_dtype), LMHead(teacher_head.weight.detach().to(dtype))


def values_and_gradients(objective, pair, values=None):
    student, student_head, teacher, teacher_head = pair
    token_ids = torch.arange(len(student))
    if values is None:
        if objective == "sampled":
            values, _ = token_logprobs(student, student_head, token_ids, 0.7)
        elif objective == "topk":
            values, _ = topk_divergence(student, student_head, *topk_logprobs(teacher, teacher_head, 5, 0.7), 0.3, 0.7)
        else:
            values, _ = full_divergence(*pair, 0.3, 0.7)
    inputs = [each for each in (student, student_head.weight) if each.requires_grad]
    return values, torch.autograd.grad((values * (1 + token_ids)).sum(), inputs)


def reference_values(objective, pair):
    student, student_head, teacher, teacher_head = pair
    student_logprobs = reference_logits(student, student_head, 0.7).log_softmax(-1)
    teacher_logprobs = reference_logits(teacher, teacher_head, 0.7).log_softmax(-1)
    if objective == "sampled":
        return student_logprobs.gather(-1, torch.arange(len(student))[:, None]).squeeze(-1)
    if objective == "topk":
        top = teacher_logprobs.topk(5).indices
        student_logprobs, teacher_logprobs = (
            torch.cat([kept, torch.log1p(-kept.exp().sum(-1, keepdim=True))], -1)
            for kept in (student_logprobs.gather(-1, top), teacher_logprobs.gather(-1, top))
        )
    return reference_divergence(student_logprobs, teacher_logprobs, 0.3)


@pytest.mark.parametrize("objective", ["sampled", "full", "topk"])
@pytest.mark.parametrize("trains_head", [True, False])
@pytest.mark.parametrize(
    "dtype, state_dtype",
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),  # like autocast, which also rounds the head
    ],
)
def test_half_precision_values_equal_float64_products(objective, trains_head, dtype, state_dtype):
    """Values equal float64 products of the same operands; gradients agree up to the rounding of their dtype."""
    pair = make_half_pair(dtype, trains_head, state_dtype)
    values, gradients = values_and_gradients(objective, pair)
    assert values.dtype == torch.float32
    rounded = (pair[0], pair[1]._replace(weight=pair[1].weight.to(state_dtype)), *pair[2:])
    rounded = (*rounded[:3], pair[3]._replace(weight=pair[3].weight.to(state_dtype)))
    expected = reference_values(objective, rounded)
    torch.testing.assert_close(values.double(), expected, rtol=1e-4, atol=2e-5)
    _, expected = values_and_gradients(objective, pair, expected)
    for gradient, reference in zip(gradients, expected, strict=True):
        assert gradient.dtype == reference.dtype
        scale = reference.float().abs().max().item()
        torch.testing.assert_close(gradient.float(), reference.float(), rtol=1e-2, atol=4e-3 * scale)


@pytest.mark.parametrize("trains_head", [True, False])
def test_advantages_of_bfloat16_have_the_right_sign(trains_head):
    """The teacher differs by a few hundredths of a nat from a student whose likely logits are about 28."""
    torch.manual_seed(0)
    tokens, hidden, vocab = 128, 512, 2000
    weight = (torch.randn(vocab, hidden) * 0.02).bfloat16().requires_grad_(trains_head)
    likely = torch.stack([torch.randperm(vocab)[:8] for _ in range(tokens)])
    directions = weight.detach()[likely].float()  # (tokens, 8, hidden)

    def states_of(logits):
        return (directions.mT @ torch.linalg.solve(directions @ directions.mT, logits.unsqueeze(-1))).squeeze(-1)

    student = states_of(28 + torch.randn(tokens, 8))
    teacher = (student + states_of(0.05 * torch.randn(tokens, 8))).bfloat16()
    student, token_ids, head = student.bfloat16(), likely[:, 0], LMHead(weight)

    def exact(states):
        return reference_logits(states, head, 1.0).log_softmax(-1).gather(-1, token_ids[:, None]).squeeze(-1)

    advantages = token_logprobs(teacher, head, token_ids)[0] - token_logprobs(student, head, token_ids)[0]
    torch.testing.assert_close(advantages.double(), exact(teacher) - exact(student), rtol=0, atol=1e-4)


class LargestFloat32(TorchDispatchMode):
    """Records the size of the largest float32 tensor."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for each in output if isinstance(output, tuple | list) else [output]:
            if isinstance(each, torch.Tensor) and each.dtype == torch.float32:
                self.numel = max(self.numel, each.numel())
        return output


@pytest.mark.parametrize("objective", ["sampled", "full", "topk"])
def test_no_head_is_copied_to_float32(objective, monkeypatch):
    monkeypatch.setattr(token_chunks, "CPU_CHUNK_LOGITS", 8 * 70)
    pair = make_half_pair(torch.bfloat16, trains_head=False)
    with LargestFloat32() as largest:
        values_and_gradients(objective, pair)
    assert 0 < largest.numel <= 40 * 16  # gradients of the states; the smaller head has 70 x 16


@pytest.mark.slow
def test_gpu_kernels_agree_with_their_torch_form():
    """TRL's Triton kernels on float32 tiles, in Triton's interpreter, enabled before they are defined."""
    pytest.importorskip("triton")
    program = """
        import torch
        from trl_vicur.trainer import losses, token_chunks

        token_chunks.TILE_TOKENS, token_chunks.TILE_COLUMNS = 3, 40
        for dtype in (torch.float32, torch.bfloat16):
            for softcapping in (None, 4.0):
                results = []
                for uses_triton in (True, False):
                    token_chunks._use_triton = lambda device: uses_triton
                    torch.manual_seed(0)
                    states, weight, bias = (
                        torch.randn(shape).to(dtype).requires_grad_() for shape in ((5, 16), (70, 16), (70,))
                    )
                    head = losses.LMHead(weight, bias, 0.5, softcapping)
                    logprobs, entropy = losses.token_logprobs(states, head, torch.arange(5) * 9, 0.7)
                    gradients = torch.autograd.grad((logprobs * torch.arange(5)).sum(), [states, weight, bias])
                    results.append([logprobs, entropy, *gradients])
                torch.testing.assert_close(*results)
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], env=environment, check=True)


# --- The head is read correctly or refused ---


TEXT = dict(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4)
VISION = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28)


def in_vlm(model_class, config_class, text_config, vision_class, **image_token):
    """A vision-language model around the text model of a config with scaled logits."""
    vision_config = vision_class(**VISION, patch_size=14)
    return model_class(config_class(text_config=text_config, vision_config=vision_config, **image_token))


MODELS = {
    "Cohere": lambda: CohereForCausalLM(CohereConfig(**TEXT, logit_scale=0.25)),
    "Granite": lambda: GraniteForCausalLM(GraniteConfig(**TEXT, logits_scaling=6.0)),
    "Gemma 2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**TEXT, head_dim=8, num_key_value_heads=2, final_logit_softcapping=0.1)
    ),
    "LLaVA-NeXT with Granite": lambda: in_vlm(
        LlavaNextForConditionalGeneration,
        LlavaNextConfig,
        GraniteConfig(**TEXT, logits_scaling=8.0),
        CLIPVisionConfig,
        image_token_index=49,
    ),
    "Aya Vision": lambda: in_vlm(
        AyaVisionForConditionalGeneration,
        AyaVisionConfig,
        Cohere2Config(**TEXT, pad_token_id=0, logit_scale=0.25),
        SiglipVisionConfig,
        image_token_index=49,
    ),
    "Command A Vision": lambda: in_vlm(
        Cohere2VisionForConditionalGeneration,
        Cohere2VisionConfig,
        Cohere2Config(**TEXT, pad_token_id=0, logit_scale=0.25),
        SiglipVisionConfig,
        image_token_id=49,
    ),
}


def states_and_logits(model):
    input_ids = torch.randint(0, 49, (1, 7))
    with torch.no_grad():
        states = model.base_model(input_ids=input_ids).last_hidden_state
        return states, model.eval()(input_ids=input_ids).logits


@pytest.mark.parametrize("name", MODELS)
def test_head_applies_the_models_logit_transforms(name):
    model = MODELS[name]().eval()
    states, logits = states_and_logits(model)
    head = LMHead.from_model(model)
    assert (head.softcapping is not None) == (name == "Gemma 2")
    torch.testing.assert_close(head.logits(states, temperature=1.0), logits)


def test_reading_a_head_needs_no_weights_and_has_no_side_effect():
    """So the result is the same for sharded weights and on each rank."""
    with torch.device("meta"):
        model = MODELS["Granite"]()
    model.lm_head = torch.nn.Linear(32, 50, bias=False)
    random_state = torch.get_rng_state()
    assert LMHead.from_model(model).logit_scale == pytest.approx(1 / 6)
    assert all(module._compiled_call_impl is None for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize(
    "options",
    [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": {"lm_head": [3, 5], "embed_tokens": [3]}}],
)
def test_head_that_an_adapter_trains_is_read(options):
    model = get_peft_model(MODELS["Granite"](), LoraConfig(target_modules=["q_proj"], **options))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lm_head" in name:
            torch.nn.init.normal_(parameter)
    base = model.get_base_model()
    states, logits = states_and_logits(base)
    head = LMHead.from_model(model)
    assert head.trains
    torch.testing.assert_close(head.logits(states, 1.0), logits)
    with model.disable_adapter():
        states, without = states_and_logits(base)
        head = LMHead.from_model(model)
        torch.testing.assert_close(head.logits(states, 1.0), without)
    assert not torch.allclose(without, logits)


def test_lora_on_the_head_is_refused():
    model = get_peft_model(MODELS["Granite"](), LoraConfig(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match=r"head of GraniteForCausalLM is a peft.*Linear.* out of .*`target_modules`"):
        LMHead.from_model(model)


def test_offloaded_head_is_refused():
    with torch.device("meta"), pytest.raises(ValueError, match="is offloaded: its weight is on the device 'meta'"):
        LMHead.from_model(MODELS["Granite"]())


class ScalesStates(GraniteForCausalLM):
    def forward(self, input_ids, attention_mask=None):
        states = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        return CausalLMOutput(logits=self.lm_head(states / 2))


class ShiftsLogits(GraniteForCausalLM):
    def forward(self, input_ids, attention_mask=None):
        states = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        return CausalLMOutput(logits=self.lm_head(states) + torch.arange(4))


class NeedsMore(GraniteForCausalLM):
    def forward(self, input_ids, pixel_values, attention_mask=None): ...


@pytest.mark.parametrize(
    "model_class, message",
    [
        (ScalesStates, "its head is not called once with the output of `model`"),
        (ShiftsLogits, "it does more to their product than scale or soft-cap it"),
        (NeedsMore, r"its forward fails with TypeError: .*pixel_values"),
    ],
)
def test_model_with_unsupported_logits_is_refused(model_class, message):
    with pytest.raises(ValueError, match=f"cannot compute the logits of {model_class.__name__}.* {message}"):
        LMHead.from_model(model_class(GraniteConfig(**TEXT)))


def test_head_is_checked_without_weights():
    with torch.device("meta"):
        supported, unsupported = MODELS["Granite"](), NeedsMore(GraniteConfig(**TEXT))
    lm_head.check_head(supported)
    with pytest.raises(ValueError, match="cannot compute the logits of NeedsMore"):
        lm_head.check_head(unsupported)
