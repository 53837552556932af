"""A tiny model and a real processor of each vision-language family: random weights, no downloads."""

from collections.abc import Callable, Iterable

import pytest
import torch
from tiny_models import (
    CHAT_TEMPLATE,
    make_processor,
    make_qwen2_5_processor,
    make_qwen2_5_vl,
    make_qwen3_vl,
    make_tokenizer,
)
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Gemma4AudioFeatureExtractor,
    Gemma4ImageProcessor,
    Gemma4Processor,
    Gemma4VideoProcessor,
    Glm4vImageProcessor,
    Glm4vProcessor,
    Glm4vVideoProcessor,
    GotOcr2ImageProcessor,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLProcessor,
    InternVLVideoProcessor,
    Lfm2VlImageProcessor,
    Lfm2VlProcessor,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)


HIDDEN = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
MROPE = {"rope_type": "default", "rope_theta": 10000.0}


def family_tokenizer(**special_tokens: str) -> PreTrainedTokenizerFast:
    """The byte-level tokenizer with a family's special tokens, also set as attributes where the tokenizer has them."""
    return PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer().backend_tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        padding_side="left",
        extra_special_tokens=special_tokens,
    )


def chat_template(image: str, video: str = "<video>") -> str:
    """The ChatML template with a family's placeholders for images and videos."""
    template = CHAT_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", image)
    return template.replace("<|vision_start|><|video_pad|><|vision_end|>", video)


def build(model_type: str, tokenizer: PreTrainedTokenizerFast, seed: int = 0, **config) -> PreTrainedModel:
    """A model of the config in float32 and evaluation mode, with the tokenizer's end token."""
    config["text_config"] = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        **HIDDEN,
        **config["text_config"],
    }
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(model_type, **config)).eval()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def qwen_token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    names = {"image_token_id": "image_pad", "video_token_id": "video_pad"}
    names |= {"vision_start_token_id": "vision_start", "vision_end_token_id": "vision_end"}
    return {key: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for key, name in names.items()}


def make_qwen2_vl() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = make_tokenizer()
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 112 * 112}),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 4 * 56 * 56}),
        chat_template=CHAT_TEMPLATE,
    )
    model = build(
        "qwen2_vl",
        tokenizer,
        text_config={"rope_parameters": {**MROPE, "mrope_section": [2, 1, 1]}},
        vision_config={"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 2},
        **qwen_token_ids(tokenizer),
    )
    return model, processor


def qwen3_vision() -> dict:
    return {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 32,
        "num_position_embeddings": 64,
    }


def make_qwen3_vl_moe() -> tuple[PreTrainedModel, ProcessorMixin]:
    processor = make_processor()
    model = build(
        "qwen3_vl_moe",
        processor.tokenizer,
        text_config={
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "rope_parameters": {**MROPE, "mrope_section": [4, 2, 2], "mrope_interleaved": True},
        },
        vision_config={**qwen3_vision(), "deepstack_visual_indexes": [0, 1]},
        **qwen_token_ids(processor.tokenizer),
    )
    return model, processor


def make_qwen3_5(model_type: str = "qwen3_5", **text_config) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Three layers of linear attention (Gated DeltaNet) for each layer of full attention."""
    processor = make_processor()
    model = build(
        model_type,
        processor.tokenizer,
        text_config={
            "head_dim": 16,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "rope_parameters": {
                **MROPE,
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
                "partial_rotary_factor": 0.5,
            },
            **text_config,
        },
        vision_config=qwen3_vision(),
        **qwen_token_ids(processor.tokenizer),
    )
    return model, processor


def make_qwen3_5_moe() -> tuple[PreTrainedModel, ProcessorMixin]:
    return make_qwen3_5(
        "qwen3_5_moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )


def make_glm4v() -> tuple[PreTrainedModel, ProcessorMixin]:
    names = {"image_token": "<|image|>", "video_token": "<|video|>"}
    names |= {f"{kind}_{end}_token": f"<|{end}_of_{kind}|>" for kind in ("image", "video") for end in ("begin", "end")}
    tokenizer = family_tokenizer(**names)
    size = {"shortest_edge": 2 * 28 * 28, "longest_edge": 2 * 112 * 112}
    processor = Glm4vProcessor(
        image_processor=Glm4vImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=Glm4vVideoProcessor(size=size, do_sample_frames=False),
        chat_template=chat_template(
            "<|begin_of_image|><|image|><|end_of_image|>", "<|begin_of_video|><|video|><|end_of_video|>"
        ),
    )
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    model = build(
        "glm4v",
        tokenizer,
        text_config={
            "rope_parameters": {**MROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0},
        },
        vision_config={"depth": 2, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 32, "intermediate_size": 64},
        image_token_id=ids["image_token"],
        video_token_id=ids["video_token"],
        image_start_token_id=ids["image_begin_token"],
        image_end_token_id=ids["image_end_token"],
        video_start_token_id=ids["video_begin_token"],
        video_end_token_id=ids["video_end_token"],
    )
    return model, processor


def make_llava() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = family_tokenizer(image_token="<image>")
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template("<image>"),
    )
    model = build(
        "llava",
        tokenizer,
        text_config={"model_type": "llama"},
        vision_config={"model_type": "clip_vision_model", **VISION, "image_size": 32, "patch_size": 8},
        image_token_index=tokenizer.image_token_id,
    )
    return model, processor


def make_llava_next() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = family_tokenizer(image_token="<image>")
    pinpoints = [[32, 64], [64, 32], [64, 64]]
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=pinpoints
        ),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template("<image>"),
    )
    model = build(
        "llava_next",
        tokenizer,
        text_config={"model_type": "mistral"},
        vision_config={"model_type": "clip_vision_model", **VISION, "image_size": 32, "patch_size": 8},
        image_token_index=tokenizer.image_token_id,
        image_grid_pinpoints=pinpoints,
    )
    return model, processor


def make_llava_onevision() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = family_tokenizer(image_token="<image>", video_token="<video>")
    pinpoints = [[32, 32], [32, 64], [64, 32], [64, 64]]
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size={"height": 32, "width": 32}, image_grid_pinpoints=pinpoints),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(size={"height": 32, "width": 32}),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=chat_template("<image>"),
    )
    model = build(
        "llava_onevision",
        tokenizer,
        text_config={"model_type": "qwen2"},
        vision_config={
            "model_type": "siglip_vision_model",
            **VISION,
            "image_size": 32,
            "patch_size": 8,
            "vision_use_head": False,
        },
        image_token_index=tokenizer.image_token_id,
        video_token_index=tokenizer.video_token_id,
        image_grid_pinpoints=pinpoints,
    )
    return model, processor


def make_gemma3() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Sliding attention in three of four layers, and bidirectional attention among the tokens of an image."""
    tokenizer = family_tokenizer(
        image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>"
    )
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessor(size={"height": 32, "width": 32}),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template=chat_template("<start_of_image>"),
    )
    model = build(
        "gemma3",
        tokenizer,
        text_config={
            "model_type": "gemma3_text",
            "head_dim": 16,
            "sliding_window": 16,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        },
        vision_config={
            "model_type": "siglip_vision_model",
            **VISION,
            "image_size": 32,
            "patch_size": 8,
            "vision_use_head": False,
        },
        mm_tokens_per_image=4,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    return model, processor


def make_gemma4() -> tuple[PreTrainedModel, ProcessorMixin]:
    """The last two of six layers reuse keys and values of earlier layers."""
    tokenizer = family_tokenizer(
        image_token="<|image|>",
        boi_token="<|image>",
        eoi_token="<image|>",
        audio_token="<|audio|>",
        boa_token="<|audio>",
        eoa_token="<audio|>",
    )
    processor = Gemma4Processor(
        feature_extractor=Gemma4AudioFeatureExtractor(),
        image_processor=Gemma4ImageProcessor(patch_size=8, max_soft_tokens=70, pooling_kernel_size=2),
        tokenizer=tokenizer,
        video_processor=Gemma4VideoProcessor(patch_size=8, max_soft_tokens=70, pooling_kernel_size=2),
        chat_template=chat_template("<|image|>"),
    )
    model = build(
        "gemma4",
        tokenizer,
        text_config={
            "num_hidden_layers": 6,
            "head_dim": 16,
            "global_head_dim": 16,
            "sliding_window": 64,
            "vocab_size_per_layer_input": len(tokenizer),
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
        },
        vision_config={
            **VISION,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": 8,
            "pooling_kernel_size": 2,
            "position_embedding_size": 256,
        },
        audio_config=None,
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.convert_tokens_to_ids("<|video|>"),
        boi_token_id=tokenizer.boi_token_id,
        eoi_token_id=tokenizer.eoi_token_id,
        audio_token_id=tokenizer.audio_token_id,
    )
    return model, processor


def idefics_tokenizer() -> PreTrainedTokenizerFast:
    return family_tokenizer(
        image_token="<image>",
        fake_image_token="<fake_token_around_image>",
        end_of_utterance_token="<end_of_utterance>",
        global_image_token="<global-img>",
        video_token="<video>",
    )


def idefics_model(model_type: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return build(
        model_type,
        tokenizer,
        text_config={"model_type": "llama"},
        vision_config={**VISION, "image_size": 32, "patch_size": 8},
        image_token_id=tokenizer.image_token_id,
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=2,
    )


def make_idefics3() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = idefics_tokenizer()
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}),
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=chat_template("<image>"),
    )
    return idefics_model("idefics3", tokenizer), processor


def make_smolvlm() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = idefics_tokenizer()
    size = dict(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(**size),
        tokenizer=tokenizer,
        video_processor=SmolVLMVideoProcessor(**size),
        image_seq_len=4,
        chat_template=chat_template("<image>"),
    )
    return idefics_model("smolvlm", tokenizer), processor


def make_internvl() -> tuple[PreTrainedModel, ProcessorMixin]:
    tokenizer = family_tokenizer(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    size = {"height": 32, "width": 32}
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=chat_template("<IMG_CONTEXT>"),
    )
    model = build(
        "internvl",
        tokenizer,
        text_config={"model_type": "qwen2"},
        vision_config={**VISION, "image_size": [32, 32], "patch_size": [8, 8]},
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=4,
    )
    return model, processor


def make_lfm2_vl() -> tuple[PreTrainedModel, ProcessorMixin]:
    """Short convolutions instead of attention in three of four layers."""
    tokenizer = family_tokenizer(
        image_token="<image>",
        image_start_token="<|image_start|>",
        image_end_token="<|image_end|>",
        image_thumbnail_token="<|img_thumbnail|>",
    )
    processor = Lfm2VlProcessor(
        image_processor=Lfm2VlImageProcessor(
            tile_size=32, encoder_patch_size=8, min_image_tokens=4, max_image_tokens=16, min_tiles=2, max_tiles=4
        ),
        tokenizer=tokenizer,
        chat_template=chat_template("<image>"),
    )
    model = build(
        "lfm2_vl",
        tokenizer,
        text_config={"model_type": "lfm2", "layer_types": ["conv", "conv", "full_attention", "conv"]},
        vision_config={
            "model_type": "siglip2_vision_model",
            **VISION,
            "patch_size": 8,
            "num_patches": 64,
            "vision_use_head": False,
        },
        image_token_id=tokenizer.image_token_id,
        projector_hidden_size=32,
    )
    return model, processor


FAMILIES: dict[str, Callable[[], tuple[PreTrainedModel, ProcessorMixin]]] = {
    "qwen2_vl": make_qwen2_vl,
    "qwen2_5_vl": lambda: (make_qwen2_5_vl(), make_qwen2_5_processor()),
    "qwen3_vl": lambda: (make_qwen3_vl(), make_processor()),
    "qwen3_vl_moe": make_qwen3_vl_moe,
    "qwen3_5": make_qwen3_5,
    "qwen3_5_moe": make_qwen3_5_moe,
    "glm4v": make_glm4v,
    "llava": make_llava,
    "llava_next": make_llava_next,
    "llava_onevision": make_llava_onevision,
    "gemma3": make_gemma3,
    "gemma4": make_gemma4,
    "idefics3": make_idefics3,
    "smolvlm": make_smolvlm,
    "internvl": make_internvl,
    "lfm2_vl": make_lfm2_vl,
}

# Not marked as slow: the family that most other tests use, and the one that differs most from it
QUICK = ("qwen3_vl", "gemma4")


def each_of(families: Iterable[str]) -> pytest.MarkDecorator:
    """Parametrizes a test over `family`."""
    slow = pytest.mark.slow
    return pytest.mark.parametrize("family", [pytest.param(f, marks=() if f in QUICK else slow) for f in families])
