"""The benchmarks' own tools: counts are right, and sides take turns."""

import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from tiny_models import encode, make_image, make_qwen3_vl, user

from trl_vicur import CueRecoveryConfig
from trl_vicur.cue_recovery import CueRecoveryLayer


sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import cost_model  # noqa: E402
import measure  # noqa: E402


def test_cost_model_agrees_with_counters():
    """FLOPs of decoder and tower with torch's counter, bytes of the KV cache with transformers' cache."""
    assert cost_model.check_counts() == pytest.approx({"decoder_flops": 1, "tower_flops": 1, "cache_bytes": 1})


@pytest.mark.parametrize("size, billions, module_millions", [("2B", 2.13, 100.7), ("8B", 8.77, 469.8)])
def test_cost_model_has_the_real_sizes(size, billions, module_millions):
    costs = cost_model.Costs(cost_model.CONFIGS[size])
    assert costs.parameters / 1e9 == pytest.approx(billions, abs=0.01)
    assert costs.module_parameters / 1e6 == pytest.approx(module_millions, abs=0.1)


def test_cost_model_counts_launches_if_they_bound_a_prefill():
    costs, gpu = cost_model.Costs(cost_model.CONFIGS["2B"]), cost_model.GPU()
    assert cost_model.prefill_overhead(costs, 128, gpu) == pytest.approx((6 * 12 + 8) / (28 * 26))
    assert cost_model.prefill_overhead(costs, 1846, gpu) == 0


def test_sides_take_turns():
    calls = []
    times = measure.alternate({name: lambda name=name: calls.append(name) for name in "ab"}, repeats=2)
    assert "".join(calls) == "baabba"  # the first turn is a warm-up
    assert [len(values) for values in times.values()] == [2, 2]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_that_of_the_call():
    peak = measure.peak_memory(lambda: bytearray(200_000_000))
    assert peak == pytest.approx(200_000_000, rel=0.05)


@pytest.mark.parametrize(
    "dtype, autocast_adapter_dtype, most", [("float32", False, 12), ("bfloat16", False, 12), ("bfloat16", True, 17)]
)
def test_each_module_launches_12_kernels_and_each_call_8(processor, dtype, autocast_adapter_dtype, most):
    """A float32 adapter on a bfloat16 backbone, PEFT's default, also casts its inputs and outputs."""
    model = make_qwen3_vl().to(getattr(torch, dtype))
    model = get_peft_model(model, CueRecoveryConfig(layer_interval=1), autocast_adapter_dtype=autocast_adapter_dtype)
    inputs = encode(processor, [user("What?", make_image(0)), user("Which one?", make_image(1))])
    hidden_states = torch.randn(*inputs["input_ids"].shape, 32, dtype=model.dtype)
    layer = next(module for module in model.modules() if isinstance(module, CueRecoveryLayer))
    with torch.no_grad(), measure.CountKernels() as of_call:
        _, kwargs = model.base_model._add_context(model.get_base_model().model, (), inputs)
        context = kwargs["cue_recovery_context"]
        context.layer_inputs(hidden_states)
    with torch.no_grad(), measure.CountKernels() as of_module:
        layer(hidden_states, context)
    assert len(of_call.kernels) <= 8 and len(of_module.kernels) <= most
