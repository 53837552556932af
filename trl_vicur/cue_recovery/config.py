from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig, PeftType
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin


# Options that define what the recovery module computes
MODULE_OPTIONS = ("layer_interval", "sink_token", "num_heads", "bottleneck_size", "sink_token_ids")


@dataclass
class CueRecoveryConfig(LoraConfig):
    r"""
    Configuration of cue recovery: sink-token cross-attention over the visual tokens (ViCuR, arXiv 2606.05718, Sec.
    3.2) as a PEFT method, optionally with LoRA on the backbone in the same adapter.

    All options of [`~peft.LoraConfig`] keep their meaning; they apply to the LoRA part and are ignored with `r=0`.

    Parameters:
        > Parameters that control the recovery module

        layer_interval (`int`, *optional*, defaults to `5`):
            Update the output of decoder layers 0, `layer_interval`, 2 · `layer_interval`, … but never of the last one,
            because no other token reads that output.
        sink_token (`str`, *optional*, defaults to `"first"`):
            The token that gathers the evidence: `"first"`, the sample's first token that is not padding (the paper's
            choice), or a token string, which selects that token's first occurrence. `"<|im_end|>"` ends the first turn
            of Qwen's prompts, so without a system turn it attends to the question. A token string must be looked up
            with [`CueRecoveryConfig.resolve_sink_token`], which [`ViCuRTrainer`] does. A prompt that has an image but
            not this token raises an error.
        num_heads (`int`, *optional*):
            Number of attention heads; must divide the width of queries, keys and values. Defaults to the text
            model's. Use fewer with a small `bottleneck_size`, so that heads do not become too narrow.
        bottleneck_size (`int`, *optional*):
            Width of queries, keys and values, over all heads: a module has `4 * bottleneck_size * hidden_size`
            parameters. Defaults to the hidden size (the paper's setting).

        > Parameters that control what else is trained

        r (`int`, *optional*, defaults to `0`):
            Rank of LoRA on the backbone. `0` trains the recovery module alone.
        train_base (`bool`, *optional*, defaults to `False`):
            Whether the backbone's own weights train as well (the paper's setting) and are saved with the adapter,
            which must then be the model's only one.

        > Parameters that are filled in automatically, and stored so that an adapter loads without a tokenizer

        sink_token_ids (`list[int]`, *optional*):
            The sink token's id, as a list of one. Filled in by [`CueRecoveryConfig.resolve_sink_token`].
        hidden_size (`int`, *optional*), num_hidden_layers (`int`, *optional*):
            Hidden size and number of decoder layers of the text model that the adapter was trained on.

    Raises:
        `ValueError`: If an option has an invalid value.
    """

    r: int = field(default=0, metadata={"help": "LoRA rank on the backbone. 0 trains the recovery module alone."})
    layer_interval: int = field(
        default=5,
        metadata={"help": "Update the sink token at the output of every `layer_interval`-th decoder layer."},
    )
    sink_token: str = field(
        default="first",
        metadata={"help": "Token that gathers the evidence: 'first' or a token string (its first occurrence)."},
    )
    num_heads: int | None = field(
        default=None, metadata={"help": "Number of attention heads. Defaults to the text model's."}
    )
    bottleneck_size: int | None = field(
        default=None,
        metadata={"help": "Width of queries, keys and values, for a smaller module. Defaults to the hidden size."},
    )
    train_base: bool = field(
        default=False, metadata={"help": "Whether the backbone's own weights train and are saved as well."}
    )
    sink_token_ids: list[int] | None = field(
        default=None, metadata={"help": "Id of the sink token; filled in from the tokenizer."}
    )
    hidden_size: int | None = field(
        default=None, metadata={"help": "Hidden size of the text model; filled in when the adapter is attached."}
    )
    num_hidden_layers: int | None = field(
        default=None, metadata={"help": "Decoder layers of the text model; filled in when the adapter is attached."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType("CUE_RECOVERY")
        if type(self.layer_interval) is not int or self.layer_interval < 1:
            raise ValueError(f"`layer_interval` must be an integer of at least 1, got {self.layer_interval!r}.")
        for name in ("num_heads", "bottleneck_size"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")
        if type(self.r) is not int or self.r < 0:
            raise ValueError(f"`r` must be 0 (no LoRA) or a positive LoRA rank, got {self.r!r}.")
        if not isinstance(self.sink_token, str) or not self.sink_token:
            raise ValueError(f"`sink_token` must be 'first' or a token string, got {self.sink_token!r}.")
        if self.sink_token == "assistant":
            raise ValueError(
                "`sink_token='assistant'`, the header of the turn to be generated, is no longer an option: its token "
                "ids depend on the text before it and on the thinking mode, so the module was sometimes silently "
                "skipped, and every turn of a tool rollout moved the sink. Use 'first' and train the adapter again. "
                "To place the sink after the question, name a token there, such as '<|im_end|>' in prompts without a "
                "system turn."
            )
        if not isinstance(self.train_base, bool):
            raise ValueError(f"`train_base` must be True or False, got {self.train_base!r}.")
        if self.sink_token_ids is not None and len(self.sink_token_ids) != 1:
            raise ValueError(
                f"`sink_token_ids` must hold one token id, got {self.sink_token_ids!r}. Leave it out; "
                "`resolve_sink_token` fills it in."
            )

    @property
    def sink_token_id(self) -> int | None:
        """Id of the sink token; `None` if the sink is the first token of the sample."""
        if self.sink_token == "first":
            return None
        assert self.sink_token_ids is not None, "see `resolve_sink_token`"
        return self.sink_token_ids[0]

    def module_options(self) -> dict[str, Any]:
        """The options that define what the recovery module computes, apart from its weights."""
        return {name: getattr(self, name) for name in MODULE_OPTIONS}

    def check_size(self, text_config: PreTrainedConfig, model_name: str) -> None:
        """Raise a `ValueError` that names the model if the adapter was made for a text model of a different size."""
        for size in ("hidden_size", "num_hidden_layers"):
            expected, actual = getattr(self, size), getattr(text_config, size)
            if expected not in (None, actual):
                raise ValueError(
                    f"This cue recovery adapter was made for a model with `{size}` {expected}, but {model_name} has "
                    f"`{size}` {actual}. Load the base model that it was trained on, or make a new "
                    "`CueRecoveryConfig`."
                )

    def resolve_sink_token(self, processing_class: ProcessorMixin | PreTrainedTokenizerBase) -> "CueRecoveryConfig":
        """
        Look up the token id of `sink_token`, so that the model can find the sink without a tokenizer.

        Args:
            processing_class ([`~transformers.ProcessorMixin`] or [`~transformers.PreTrainedTokenizerBase`]):
                The model's processor or tokenizer.

        Returns:
            [`CueRecoveryConfig`]: `self`.

        Raises:
            `ValueError`: If the tokenizer does not know `sink_token`.
        """
        if self.sink_token == "first":
            return self
        tokenizer = processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class
        token_id = tokenizer.convert_tokens_to_ids(self.sink_token)
        if not isinstance(token_id, int) or token_id == tokenizer.unk_token_id:
            raise ValueError(
                f"`sink_token` must be 'first' or a token of the tokenizer, got {self.sink_token!r}, which the "
                f"tokenizer does not know. Its special tokens are {tokenizer.all_special_tokens}."
            )
        self.sink_token_ids = [token_id]
        return self
