"""Real, tiny models and processors, built from their configs: random weights, a byte-level tokenizer, no downloads."""

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)


SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]

CHAT_TEMPLATE = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string %}{{ message.content }}{% else %}"
    "{%- for block in message.content %}"
    "{%- if block.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{%- elif block.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{%- else %}{{ block.text }}{% endif %}"
    "{%- endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer (one token per byte of any text) with Qwen's special tokens."""
    vocab = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>", padding_side="left"
    )
    fast.add_special_tokens({"additional_special_tokens": SPECIAL_TOKENS})
    return fast


def make_processor() -> Qwen3VLProcessor:
    """A Qwen3-VL processor; a 32×32 image becomes one visual token."""
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(
            patch_size=16, merge_size=2, size={"shortest_edge": 32 * 32, "longest_edge": 128 * 128}
        ),
        tokenizer=make_tokenizer(),
        video_processor=Qwen3VLVideoProcessor(
            patch_size=16, merge_size=2, size={"shortest_edge": 32 * 32, "longest_edge": 16 * 64 * 64}
        ),
        chat_template=CHAT_TEMPLATE,
    )


def make_qwen2_5_processor() -> Qwen2_5_VLProcessor:
    """A Qwen2.5-VL processor, with patches of 14×14 pixels."""
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 112 * 112}),
        tokenizer=make_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 4 * 56 * 56}),
        chat_template=CHAT_TEMPLATE,
    )


def _token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return {
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    }


def make_qwen3_vl(
    num_layers: int = 4, hidden_size: int = 32, seed: int = 0, vision_config: dict | None = None, **text_config
) -> torch.nn.Module:
    """A Qwen3-VL with DeepStack, in float32 and evaluation mode."""
    tokenizer = make_tokenizer()
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden_size,
            "intermediate_size": 2 * hidden_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
            **text_config,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "out_hidden_size": hidden_size,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
            **(vision_config or {}),
        },
        tie_word_embeddings=True,
        **_token_ids(tokenizer),
    )
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config).eval()
    _set_end_tokens(model, tokenizer)
    return model


def make_qwen2_5_vl(hidden_size: int = 32, seed: int = 0, **text_config) -> torch.nn.Module:
    """A Qwen2.5-VL, in float32 and evaluation mode."""
    tokenizer = make_tokenizer()
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden_size,
            "intermediate_size": 2 * hidden_size,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
            "max_position_embeddings": 2048,
            **text_config,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": hidden_size,
            "fullatt_block_indexes": [1],
        },
        **_token_ids(tokenizer),
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    _set_end_tokens(model, tokenizer)
    return model


def _set_end_tokens(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast) -> None:
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id


def make_image(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """An image of noise that depends on the seed."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), dtype=torch.uint8, generator=generator)
    return Image.fromarray(pixels.numpy())


def user(text: str, *images: Image.Image) -> list[dict]:
    """A conversation of one user turn with images."""
    blocks = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*blocks, {"type": "text", "text": text}]}]


def encode(processor, conversations: list[list[dict]], **kwargs) -> dict[str, torch.Tensor]:
    """Model inputs of a left-padded batch of conversations."""
    return dict(
        processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
            **kwargs,
        )
    )


def with_completion(inputs, completion_ids):
    """The inputs of a forward pass over prompt and completion."""
    extended = {**inputs}
    extended["input_ids"] = torch.cat([inputs["input_ids"], completion_ids], dim=1)
    extended["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(completion_ids)], dim=1)
    if "mm_token_type_ids" in inputs:
        zeros = torch.zeros_like(completion_ids).to(inputs["mm_token_type_ids"].dtype)
        extended["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], zeros], dim=1)
    return extended


def make_rows(count: int) -> list[dict]:
    """Dataset rows with one question about one image, a cue and an answer."""
    return [
        {
            "prompt": [{"role": "user", "content": f"What is in picture {i}?"}],
            "images": [make_image(i)],
            "cue": f"noise number {i}",
            "answer": "yes",
        }
        for i in range(count)
    ]


def randomize(model: torch.nn.Module, seed: int = 1, std: float = 0.3) -> torch.nn.Module:
    """Randomize the adapter's zero-initialized weights, so that it changes the outputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or ("sink_attention" in name and "o_proj" in name):
                parameter.normal_(std=std, generator=generator)
    return model
