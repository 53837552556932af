"""Models by their name: an id on the Hub, or a folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@contextmanager
def naming_model(name: str) -> Iterator[None]:
    """
    While active, what cannot be loaded is named: Hugging Face's messages do not always say which model they are about.

    Args:
        name (`str`):
            Id or folder of the model.

    Raises:
        `OSError`: In place of an `OSError` or `ValueError`.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        raise OSError(f"The model {name!r} cannot be loaded: {error}") from error


def end_token_ids(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """
    Ids of the tokens that end a generated text, from the model's generation config or else from the tokenizer.

    Raises:
        `ValueError`: If neither has one.
    """
    end_ids = model.generation_config.eos_token_id
    if end_ids is None:
        end_ids = tokenizer.eos_token_id
    if end_ids is None:
        raise ValueError(
            "Neither the model's generation config nor its tokenizer has an end token, so generation would not stop. "
            "Set `generation_config.eos_token_id` to the token that ends a turn of the assistant."
        )
    return end_ids if isinstance(end_ids, list) else [end_ids]


def hub_model_name(name: str | None) -> str | None:
    """A model's id, unless it is a folder on this machine."""
    return None if not name or Path(name).is_dir() or Path(name).is_absolute() else name
