"""The benchmarks' own arithmetic: what they count is what there is, and sides take turns."""

import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import cost_model  # noqa: E402
import measure  # noqa: E402


def test_cost_model_counts_what_torch_counts():
    """FLOPs of decoder and tower by torch's counter, bytes of the KV cache by transformers' cache."""
    assert cost_model.check_counts() == pytest.approx({"decoder_flops": 1, "tower_flops": 1, "cache_bytes": 1})


@pytest.mark.parametrize("size, billions, module_millions", [("2B", 2.13, 100.7), ("8B", 8.77, 469.8)])
def test_cost_model_has_the_real_sizes(size, billions, module_millions):
    costs = cost_model.Costs(cost_model.CONFIGS[size])
    assert costs.parameters / 1e9 == pytest.approx(billions, abs=0.01)
    assert costs.module_parameters / 1e6 == pytest.approx(module_millions, abs=0.1)


def test_sides_take_turns():
    calls = []
    times = measure.alternate({name: lambda name=name: calls.append(name) for name in "ab"}, repeats=2)
    assert "".join(calls) == "baabba"  # the first turn warms up
    assert [len(values) for values in times.values()] == [2, 2]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_that_of_the_call():
    peak = measure.peak_memory(lambda: bytearray(200_000_000))
    assert peak == pytest.approx(200_000_000, rel=0.05)
