"""A teacher's scores of completion tokens: the log-probabilities that the objectives read."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self

import torch

from ..lm_head import LMHead
from ..losses import token_logprobs, topk_logprobs


class TeacherScores(ABC):
    """A teacher's scores of all completion tokens of a batch, or, after `at`, of the tokens in the loss."""

    @abstractmethod
    def at(self, mask: torch.Tensor) -> Self:
        """
        Select the tokens in the loss.

        Args:
            mask (`torch.Tensor` of shape `(batch, completion)`):
                Whether each token is in the loss. The scores move to the mask's device.
        """

    @abstractmethod
    def token_logprobs(self, token_ids: torch.Tensor) -> torch.Tensor:
        """
        Log-probabilities (in nats) of the sampled tokens, after `at`.

        Args:
            token_ids (`torch.Tensor` of shape `(tokens,)`):
                The sampled tokens.

        Returns:
            `torch.Tensor` of shape `(tokens,)`: Without gradient.
        """

    @abstractmethod
    def top_logprobs(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Log-probabilities and ids of the most likely tokens at each position, after `at`.

        Args:
            k (`int`):
                Number of tokens.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: Both of shape `(tokens, k)`, without gradient.
        """


@dataclass(frozen=True)
class StateScores(TeacherScores):
    """
    Scores by a model in this process, computed from its hidden states and its head.

    Args:
        states (`torch.Tensor` of shape `(batch, completion, hidden)`, after `at` `(tokens, hidden)`):
            Hidden states that predict the completion tokens.
        head ([`~trl_vicur.trainer.lm_head.LMHead`]):
            The model's head.
        temperature (`float`):
            Temperature of the distributions.
    """

    states: torch.Tensor
    head: LMHead
    temperature: float

    def at(self, mask: torch.Tensor) -> "StateScores":
        return StateScores(self.states.to(mask.device)[mask], self.head, self.temperature)

    @torch.no_grad()
    def token_logprobs(self, token_ids: torch.Tensor) -> torch.Tensor:
        return token_logprobs(self.states, self.head, token_ids, self.temperature)[0]

    def top_logprobs(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        return topk_logprobs(self.states, self.head, k, self.temperature)


@dataclass(frozen=True)
class ServedScores(TeacherScores):
    """
    Scores by a server, which were requested when the rollouts were generated.

    Args:
        logprobs (`torch.Tensor` of shape `(batch, completion)`):
            Log-probabilities of the sampled tokens.
        top (`tuple[torch.Tensor, torch.Tensor]`, *optional*):
            Log-probabilities and ids of the most likely tokens, both of shape `(batch, completion, k)`.
    """

    logprobs: torch.Tensor
    top: tuple[torch.Tensor, torch.Tensor] | None = None

    def at(self, mask: torch.Tensor) -> "ServedScores":
        top = None if self.top is None else (self.top[0].to(mask.device)[mask], self.top[1].to(mask.device)[mask])
        return ServedScores(self.logprobs.to(mask.device)[mask], top)

    def token_logprobs(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.logprobs

    def top_logprobs(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.top is not None  # requested from the server in "topk_logits"
        return self.top
