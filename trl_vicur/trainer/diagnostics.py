"""Diagnostics of a run: means over tokens, the gap between teacher and student, leaked hints, collapse."""

from typing import Any

import torch

from ..data.teacher_prompt import hint_marker
from .collapse import CollapseCallback
from .trackers import log_histogram
from .trl_trainer import TRLTrainer


NUM_SEGMENTS = 4


class DiagnosticsMixin(TRLTrainer):
    """Collects values in the loss and logs their means over the tokens of all ranks."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # Sums and counts of the current `compute_loss` call
        self._diagnostics: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        # Advantages before they are clipped, `(tokens,)` each, of the micro-batches in the next histogram
        self._advantages: dict[str, list[torch.Tensor]] = {"train": [], "eval": []}
        self._hint_marker = hint_marker(self.args.teacher_prompt_template)
        self.add_callback(CollapseCallback(self))

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    @property
    def _is_logged_step(self) -> bool:
        """Whether this step is logged. Diagnostics that need another projection run in these steps only."""
        next_step = self.state.global_step + 1
        return not self.model.training or next_step % max(1, int(self.state.logging_steps)) == 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self._diagnostics = {}
        output = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # After the forward, so that the collective does not run inside of it; every rank has the same keys
        if self._diagnostics:
            totals = torch.stack([torch.stack([s.float(), n.float()]) for s, n in self._diagnostics.values()])
            totals = self.accelerator.reduce(totals, reduction="sum")
            assert isinstance(totals, torch.Tensor)  # accelerate returns the type that it gets
            for name, (total, count) in zip(self._diagnostics, totals.tolist(), strict=True):
                if count:  # short completions have no token in some of their segments
                    self._metrics[self._mode][name].append(total / count)
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if self._advantages[self._mode]:
            advantages = torch.cat(self._advantages[self._mode])
            self._advantages[self._mode].clear()
            nan: Any = float("nan")  # accelerate's annotation allows integers only
            advantages = self.accelerator.gather(self.accelerator.pad_across_processes(advantages, pad_index=nan))
            assert isinstance(advantages, torch.Tensor)  # accelerate returns the type that it gets
            advantages = advantages[~advantages.isnan()]
            if self.is_world_process_zero() and len(advantages):
                name = f"{self._mode}/advantage/histogram"
                log_histogram(self.callback_handler.callbacks, name, advantages, self.state.global_step)

    def _diagnose(self, name: str, values: torch.Tensor) -> None:
        """Collect values whose mean over all ranks `compute_loss` logs."""
        self._diagnostics[name] = (values.detach().sum(), torch.tensor(values.numel(), device=values.device))

    def _diagnose_gap(self, gap: torch.Tensor, mask: torch.Tensor) -> None:
        """Teacher's minus student's log-probability, over whole completions and over their four equal segments."""
        self._diagnose("logprob_gap/mean", gap)
        position = (mask.cumsum(dim=1) - 1)[mask]
        length = mask.sum(dim=1, keepdim=True).expand_as(mask)[mask]
        segment = position * NUM_SEGMENTS // length
        for index in range(NUM_SEGMENTS):
            self._diagnose(f"logprob_gap/segment_{index + 1}", gap[segment == index])

    def _log_hint_leakage(self, completion_ids: torch.Tensor) -> None:
        """
        Log the share of completions that mention the hint, which the student never saw, and the mentions per
        completion (ViCuR, Table 8: samples and occurrences).
        """
        if not self._hint_marker:
            return
        texts = self.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
        counts = torch.tensor([float(text.count(self._hint_marker)) for text in texts], device=completion_ids.device)
        counts = self.accelerator.gather(counts)
        assert isinstance(counts, torch.Tensor)  # accelerate returns the type that it gets
        self._metrics[self._mode]["hint_leakage"].append((counts > 0).float().mean().item())
        self._metrics[self._mode]["hint_leakage/occurrences"].append(counts.mean().item())
