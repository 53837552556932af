"""Tokens that end a sentence."""

import re

import torch
from transformers import PreTrainedTokenizerBase


# A mark that ends a sentence, with closing quotes and brackets after it, or a line break
SENTENCE_END = re.compile(r"[.!?;。！？；]['\")\]”’」』]*\s*$|\n")


def sentence_end_tokens(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> torch.Tensor:
    """
    Find the tokens after which a new sentence begins.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
        vocab_size (`int`):
            Size of the model's vocabulary, which may be larger than the tokenizer's.

    Returns:
        `torch.Tensor` of shape `(vocab_size,)`: `True` at the ids of tokens whose text ends in `.`, `!`, `?`, `;` or
        their full-width forms, or contains a line break.
    """
    num_tokens = min(len(tokenizer), vocab_size)
    texts = tokenizer.batch_decode([[token_id] for token_id in range(num_tokens)])
    ends = torch.zeros(vocab_size, dtype=torch.bool)
    ends[:num_tokens] = torch.tensor([SENTENCE_END.search(text) is not None for text in texts])
    return ends
