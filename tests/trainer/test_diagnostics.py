"""Metrics, histograms and alerts that a run logs by default, as each tracker stores them."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_trainers import ADAPTER, make_trainer, train_logs
from transformers import TrainerCallback

from trl_vicur import CueRecoveryConfig
from trl_vicur.trainer.collapse import CollapseCallback


TITLES = ["Length collapse", "Entropy collapse"]
HISTOGRAM = "train/advantage/histogram"
SCALARS = {
    "hint_leakage",
    "hint_leakage/occurrences",
    "entropy",
    "completions/mean_length",
    "advantage/mean",
    "logprob_gap/segment_4",
    "cue_recovery/layers.1/update_ratio",
}


class Collapse(TrainerCallback):
    """From the third step on, completions have two tokens instead of eight, and zero entropy."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.trainer.generation_config.max_new_tokens = 2
            self.trainer.temperature = 1e-4


def test_diagnostics_are_in_every_tracker(tmp_path, processor, monkeypatch):
    pytest.importorskip("trackio")
    wandb = pytest.importorskip("wandb")
    from trackio.sqlite_storage import SQLiteStorage

    for module in ("trackio.utils", "trackio.sqlite_storage"):
        monkeypatch.setattr(f"{module}.TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    trainer = make_trainer(
        tmp_path,
        processor,
        peft_config=CueRecoveryConfig(**ADAPTER),
        max_steps=5,
        report_to=["tensorboard", "trackio", "wandb"],
        project="vicur",
        run_name="run",
    )
    assert trainer.pop_callback(CollapseCallback) is not None
    trainer.add_callback(CollapseCallback(trainer, window=2))
    trainer.add_callback(Collapse(trainer))
    with pytest.warns(UserWarning, match="collapse at step 4") as warned:
        trainer.train()
    wandb.finish()
    logs = train_logs(trainer)
    warned = [str(warning.message) for warning in warned if "collapse at step" in str(warning.message)]
    assert [warning.partition(" at step ")[0] for warning in warned] == TITLES, "each once"
    assert "have 2.0 tokens, 25 % of the initial 8.0" in warned[0] and "Try `privilege='cue'`" in warned[0]

    (events,) = tmp_path.rglob("events.out.tfevents*")
    events = EventAccumulator(str(events), size_guidance={"histograms": 0}).Reload()
    assert {f"train/{name}" for name in SCALARS} <= set(events.Tags()["scalars"])
    histograms = [event.histogram_value for event in events.Histograms(HISTOGRAM)]
    assert [event.step for event in events.Histograms(HISTOGRAM)] == [1, 2, 3, 4, 5]
    for histogram, log in zip(histograms, logs, strict=True):
        # Two micro-batches with equally many tokens: the mean over all tokens is the mean of the two
        assert histogram.num == 4 * log["completions/mean_length"]
        assert histogram.sum / histogram.num == pytest.approx(log["logprob_gap/mean"], rel=1e-3, abs=1e-6)
    for title in TITLES:
        (text,) = events.Tensors(f"{title}/text_summary")
        assert text.step == 4 and b"Try " in text.tensor_proto.string_val[0]

    kept = [log for log in SQLiteStorage.get_logs("vicur", "run") if "profiling" not in next(iter(log))]
    assert SCALARS <= {name.removeprefix("train/") for log in kept for name in log}
    kept = [log for log in kept if HISTOGRAM in log]
    assert [log["train/global_step"] for log in kept] == [1, 2, 3, 4, 5]
    assert [sum(log[HISTOGRAM]["values"]) for log in kept] == [histogram.num for histogram in histograms]
    assert {alert["title"] for alert in SQLiteStorage.get_alerts("vicur", "run")} == set(TITLES)

    (record,) = tmp_path.rglob("run-*.wandb")  # protocol buffers, which wandb itself cannot read
    record = record.read_bytes()
    assert all(f"train/{name}".encode() in record for name in SCALARS)
    assert record.count(HISTOGRAM.encode()) >= 5 and b'"histogram"' in record
    # An alert's title, followed by the tag of its text; the console's output is stored as well
    assert all(record.count(title.encode() + b"\x12") == 1 for title in TITLES)


def test_resumed_run_remembers_where_it_started(tmp_path, processor, recwarn):
    trainer = make_trainer(tmp_path, processor)
    callback = trainer.pop_callback(CollapseCallback)

    def log(entropy):
        trainer.state.log_history.append({"entropy": entropy, "step": len(trainer.state.log_history)})
        callback.on_log(trainer.args, trainer.state, trainer.control, logs=trainer.state.log_history[-1])
        return [str(w.message) for w in recwarn if "collapse" in str(w.message)]

    trainer.state.log_history = [{"entropy": 1.0, "step": step} for step in range(5)]
    assert not any(log(entropy) for entropy in (0.9, None, 0.1, 0.1, 0.0, 0.0))
    (warning,) = log(0.0)
    assert "0.04 nats per token, 4 % of the initial 1" in warning
    assert len(log(0.0)) == 1
