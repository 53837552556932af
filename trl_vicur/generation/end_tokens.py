"""Find the tokens that end a generated text."""

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def end_token_ids(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """
    Ids of the tokens that end a generated text, from the model's generation config or, by default, the tokenizer.

    Raises:
        `ValueError`: If neither has an end token.
    """
    config = model.generation_config
    end_ids: int | list[int] | None = None if config is None else config.eos_token_id
    if end_ids is None:
        # transformers annotates this as ids or texts
        end_ids = tokenizer.eos_token_id  # pyright: ignore[reportAssignmentType]
    if end_ids is None:
        raise ValueError(
            "Neither the model's generation config nor its tokenizer has an end token, so generation would not stop. "
            "Set `generation_config.eos_token_id` to the token that ends a turn of the assistant."
        )
    return end_ids if isinstance(end_ids, list) else [end_ids]
