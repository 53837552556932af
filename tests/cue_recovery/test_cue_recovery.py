"""The recovery module inside real models: the design's invariants 1 to 8."""

import copy
import threading
from contextlib import contextmanager

import pytest
import torch
from peft import get_peft_model
from tiny_families import FAMILIES
from tiny_models import encode, make_image, make_qwen3_vl, randomize, user, with_completion
from tiny_recovery_models import SINKS, attach, batch, logits, recovery_layers
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForImageTextToText, DynamicCache, StaticCache

from trl_vicur import CueRecoveryConfig
from trl_vicur.cue_recovery import record_update_ratios, sink_attention
from trl_vicur.cue_recovery.positions import find_token, first_real_token, packed_rows


# --- 1. Identity at birth ---


@pytest.mark.parametrize("sink_token", SINKS)
@pytest.mark.parametrize("r", [0, 4])
def test_invariant_1_identity_at_birth(family, sink_token, r):
    model, processor = family
    inputs = batch(processor)
    expected = logits(model, inputs)
    torch.testing.assert_close(logits(attach(model, processor, sink_token, r=r), inputs), expected, rtol=0, atol=0)


# --- 2. Off means off ---


@pytest.mark.parametrize("r", [0, 4])
def test_invariant_2_off_means_off(family, r):
    model, processor = family
    inputs = batch(processor)
    expected = logits(model, inputs)
    model = randomize(attach(model, processor, r=r))
    assert not torch.equal(logits(model, inputs), expected)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, inputs), expected, rtol=0, atol=0)
    assert not torch.equal(logits(model, inputs), expected)


# --- 3. Prefill only ---


@pytest.mark.parametrize("sink_token", SINKS)
def test_invariant_3_cache_no_cache_and_full_forward_agree(family, sink_token):
    model, processor = family
    inputs = batch(processor)
    model = randomize(attach(model, processor, sink_token))
    arguments = dict(max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
    cached = model.generate(**inputs, **arguments, use_cache=True)
    uncached = model.generate(**inputs, **arguments, use_cache=False)
    assert torch.equal(cached.sequences, uncached.sequences)
    cached_logits = torch.stack(cached.logits, dim=1)
    torch.testing.assert_close(cached_logits, torch.stack(uncached.logits, dim=1), rtol=1e-4, atol=1e-5)

    completion_ids = cached.sequences[:, inputs["input_ids"].shape[1] :]
    full = logits(model, with_completion(inputs, completion_ids))[:, inputs["input_ids"].shape[1] - 1 : -1]
    steps = cached_logits.shape[1]
    torch.testing.assert_close(full[:, :steps], cached_logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sink_token", SINKS)
def test_invariant_3_sampled_sink_token_does_not_move_the_sink(processor, sink_token):
    """A completion may contain the sink's tokens; the sink is still the prompt's."""
    model = randomize(attach(make_qwen3_vl(), processor, sink_token))
    inputs = encode(processor, [user("What is this?", make_image(0))])
    sampled = processor.tokenizer.encode("yes<|im_end|>\n<|im_start|>assistant\nno", add_special_tokens=False)
    extended = logits(model, with_completion(inputs, torch.tensor([sampled])))
    prompt_length = inputs["input_ids"].shape[1]
    torch.testing.assert_close(extended[:, :prompt_length], logits(model, inputs), rtol=1e-4, atol=1e-5)


def test_invariant_3_decode_steps_do_nothing(processor):
    model = randomize(attach(make_qwen3_vl(), processor))
    calls = []
    handles = [layer.register_forward_hook(lambda *_: calls.append(1)) for layer in recovery_layers(model)]
    model.generate(**batch(processor), max_new_tokens=8, min_new_tokens=8, do_sample=False)
    for handle in handles:
        handle.remove()
    assert len(calls) == len(recovery_layers(model))  # the prefill only


def test_invariant_3_decode_steps_add_no_operations(processor):
    """Counted by the profiler: a decode step runs the same operations with and without the module."""
    model = randomize(attach(make_qwen3_vl(), processor))
    inputs = batch(processor)

    def operations_of_a_decode_step():
        with torch.no_grad():
            cache = model(**inputs, use_cache=True).past_key_values
            step = dict(
                input_ids=torch.tensor([[5], [6], [7]]),
                attention_mask=torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], dim=1),
                position_ids=torch.full((3, 3, 1), inputs["input_ids"].shape[1]),
                past_key_values=cache,
            )
            with profile(activities=[ProfilerActivity.CPU]) as events:
                model(**step)
        return {event.key: event.count for event in events.key_averages() if event.key.startswith("aten::")}

    with_module = operations_of_a_decode_step()
    with model.disable_adapter():
        assert operations_of_a_decode_step() == with_module


def test_invariant_3_static_cache_agrees(processor):
    model = randomize(attach(make_qwen3_vl(), processor))
    inputs = batch(processor)
    arguments = dict(max_new_tokens=6, do_sample=False, disable_compile=True)
    dynamic = model.generate(**inputs, **arguments)
    static = model.generate(**inputs, **arguments, cache_implementation="static")
    assert torch.equal(static, dynamic)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=128)
    with torch.no_grad():
        prefill = model(**inputs, past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(prefill, logits(model, inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llava", "gemma4"])
def test_invariant_3_flex_attention_with_a_static_cache_agrees(family):
    """The prefill's mask is then a `BlockMask`, or one for each type of attention."""
    model, processor = FAMILIES[family]()
    model = randomize(attach(model, processor))
    inputs = encode(processor, [user("Hi?", make_image(0)), user("And what is this?", make_image(1))])
    arguments = dict(max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True)
    expected = torch.stack(model.generate(**inputs, **arguments).logits)
    model.get_decoder().set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"):  # compiled, flex attention takes minutes on a CPU
        static = model.generate(**inputs, **arguments, cache_implementation="static", disable_compile=True)
    torch.testing.assert_close(torch.stack(static.logits), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sink_token", SINKS)
def test_invariant_3_split_prefill_is_refused(processor, sink_token):
    model = randomize(attach(make_qwen3_vl(), processor, sink_token))
    inputs = encode(processor, [user("What is this?", make_image(0))])
    first, rest = inputs["input_ids"][:, :2], inputs["input_ids"][:, 2:]
    cache = DynamicCache(config=model.config.get_text_config())
    model(first, past_key_values=cache)
    with pytest.raises(ValueError, match="prefill the whole prompt at once"):
        model(rest, attention_mask=inputs["attention_mask"], past_key_values=cache)


def test_invariant_3_cache_that_contains_the_sink_may_be_continued(processor):
    """A new turn of text after the cached prefix equals the full forward."""
    prompt = user("What is this?", make_image(0))
    turns = [
        *prompt,
        {"role": "assistant", "content": [{"type": "text", "text": "Noise."}]},
        *user("Are you sure?"),
    ]
    inputs, whole = encode(processor, [prompt]), encode(processor, [turns])
    length = inputs["input_ids"].shape[1]
    assert torch.equal(whole["input_ids"][:, :length], inputs["input_ids"])
    new_turn = whole["input_ids"][:, length:]
    for sink_token in SINKS:
        model = randomize(attach(make_qwen3_vl(), processor, sink_token))
        cache = DynamicCache(config=model.config.get_text_config())
        with torch.no_grad():
            model(**inputs, past_key_values=cache)
            positions, _ = model.base_model.model.model.get_rope_index(
                whole["input_ids"],
                mm_token_type_ids=whole["mm_token_type_ids"],
                image_grid_thw=whole["image_grid_thw"],
                attention_mask=whole["attention_mask"],
            )
            arguments = dict(
                attention_mask=whole["attention_mask"], past_key_values=cache, position_ids=positions[..., length:]
            )
            continued = model(new_turn, **arguments).logits
            torch.testing.assert_close(continued, logits(model, whole)[:, length:], rtol=1e-4, atol=1e-5)


# --- 4. Each sample alone ---


@pytest.mark.parametrize("sink_token", SINKS)
def test_invariant_4_each_sample_alone(family, sink_token):
    model, processor = family
    model = randomize(attach(model, processor, sink_token))
    conversations = [
        user("What is this?", make_image(0)),
        user("Which of the two is larger, and why?", make_image(1), make_image(2, (32, 64))),
        user("Hello."),
        [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, *user("And this?", make_image(3))],
    ]
    together = logits(model, encode(processor, conversations))
    for conversation, padded in zip(conversations, together, strict=True):
        alone = logits(model, encode(processor, [conversation]))[0]
        torch.testing.assert_close(padded[-len(alone) :], alone, rtol=1e-4, atol=1e-5)


def test_invariant_4_samples_without_image_are_untouched(processor):
    model = make_qwen3_vl()
    inputs = encode(processor, [user("Hello."), user("How are you today?")])
    expected = logits(model, inputs)
    torch.testing.assert_close(logits(randomize(attach(model, processor)), inputs), expected, rtol=0, atol=0)


def test_invariant_4_each_sample_alone_with_videos(processor):
    """Rows with a video, an image and only text; the module sees the video's tokens."""
    model = make_qwen3_vl()
    frames = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    video = {"type": "video", "video": frames}
    with_video = [{"role": "user", "content": [video, {"type": "text", "text": "What happens?"}]}]
    arguments = dict(
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
        processor_kwargs={"videos_kwargs": {"do_sample_frames": False}},
    )
    alone = dict(processor.apply_chat_template([with_video], **arguments))
    together = dict(
        processor.apply_chat_template([with_video, user("And this?", make_image(0)), user("Hi")], **arguments)
    )
    base = logits(model, alone)
    model = randomize(attach(model, processor))
    changed = logits(model, alone)
    assert not torch.allclose(changed, base)
    torch.testing.assert_close(logits(model, together)[0, -changed.shape[1] :], changed[0], rtol=1e-4, atol=1e-5)


def packed(processor, num_samples=2):
    """Samples packed into one row, which transformers separates by positions that restart, without a mask."""
    model = make_qwen3_vl().model
    samples = [encode(processor, [user("What is this?" + "?" * i, make_image(i))]) for i in range(num_samples)]
    positions = []
    for sample in samples:
        of_axes, _ = model.get_rope_index(**{name: sample[name] for name in sample if name != "pixel_values"})
        of_text = torch.arange(sample["input_ids"].shape[1]).expand(1, 1, -1)
        positions.append(torch.cat([of_text, of_axes]))
    inputs = {
        name: torch.cat(
            [sample[name] for sample in samples], dim=0 if name in ("pixel_values", "image_grid_thw") else 1
        )
        for name in samples[0]
        if name != "attention_mask"
    }
    return inputs, torch.cat(positions, dim=-1)


PACKING_MARKS = {
    "positions-of-text-and-axes": lambda positions: {"position_ids": positions},
    "positions-of-axes": lambda positions: {"position_ids": positions[1:]},
    "positions-of-text": lambda positions: {"position_ids": positions[0]},
    "cu_seq_lens": lambda positions: {"cu_seq_lens_q": torch.tensor([0, 9, 20]), "cu_seq_lens_k": None},
    "seq_idx": lambda positions: {"seq_idx": positions[0]},
    "mask-of-pairs": lambda positions: {"position_ids": positions, "attention_mask": mask_of_pairs(positions[0])},
    "additive-mask-of-pairs": lambda positions: {
        "position_ids": positions,
        "attention_mask": torch.where(mask_of_pairs(positions[0]), 0.0, torch.finfo(torch.float32).min),
    },
}


def mask_of_pairs(text_positions):
    """Causal mask within each sample, of shape `(1, 1, seq, seq)`."""
    sample = (text_positions[0] == 0).cumsum(dim=0)
    return ((sample.unsqueeze(0) == sample.unsqueeze(1)).tril())[None, None]


@pytest.mark.parametrize("mark", PACKING_MARKS)
def test_invariant_4_packed_rows_are_refused(processor, mark):
    model = randomize(attach(make_qwen3_vl(), processor))
    inputs, positions = packed(processor)
    marks = PACKING_MARKS[mark](positions)
    with pytest.raises(ValueError, match=r"Row\(s\) \[0\] of the batch hold images and several samples.*Pad the"):
        model(**inputs, **marks)
    with model.disable_adapter():
        model(**inputs, **marks)


def test_invariant_4_packed_rows_without_image_are_untouched(processor):
    model = make_qwen3_vl()
    samples = [encode(processor, [user(text)])["input_ids"] for text in ("Hello.", "How are you?")]
    positions = torch.cat([torch.arange(sample.shape[1]) for sample in samples]).unsqueeze(0)
    inputs = {"input_ids": torch.cat(samples, dim=1), "position_ids": positions}
    expected = logits(model, inputs)
    torch.testing.assert_close(logits(randomize(attach(model, processor)), inputs), expected, rtol=0, atol=0)


@pytest.mark.parametrize("num_samples", [1, 3])
def test_packed_rows_are_distinguished_from_one_sample(processor, num_samples):
    """Qwen-VL's positions within one sample may repeat and jump; with left padding they restart."""
    inputs, positions = packed(processor, num_samples)
    input_ids = inputs["input_ids"]
    is_packed = num_samples > 1
    for given in (positions, positions[1:], positions[0]):
        assert packed_rows(input_ids, None, given).tolist() == [is_packed]
    padded_ids = torch.nn.functional.pad(input_ids, (5, 0))
    mask = torch.ones_like(padded_ids)
    mask[:, :5] = 0
    for padding_position in (0, 1):
        padded = torch.nn.functional.pad(positions, (5, 0), value=padding_position)
        for given in (padded, padded[1:], padded[0]):
            assert packed_rows(padded_ids, mask, given, uses_flash_attention=True).tolist() == [is_packed]
            assert packed_rows(padded_ids, mask, given) is None  # the base model also reads them as one sample


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["bool", "additive", "dict", "block"])
def test_first_real_token_with_every_kind_of_mask(kind, side, window):
    lengths, length, num_keys = torch.tensor([12, 7, 9]), 12, 16  # as many keys as a static cache has room for
    index = torch.arange(length)
    is_real = index >= length - lengths.unsqueeze(1) if side == "left" else index < lengths.unsqueeze(1)
    padded = torch.nn.functional.pad(is_real, (0, num_keys - length))

    def sees(sample, head, query, key):
        return padded[sample, key] & (key <= query) & (True if window is None else query - key < window)

    mask = create_mask(sees, 3, 1, length, num_keys, device="cpu")
    mask = {
        "bool": mask,
        "additive": torch.where(mask, 0.0, torch.finfo(torch.float32).min),
        "dict": {"sliding_attention": None, "full_attention": mask},
        "block": create_block_mask(sees, 3, None, length, num_keys, device="cpu"),
    }[kind]
    input_ids = torch.zeros(3, length, dtype=torch.long)
    expected = is_real.int().argmax(dim=1).tolist()
    assert first_real_token(input_ids, mask).tolist() == expected
    assert not packed_rows(input_ids, mask, None).any()
    for padding_mask in (is_real, is_real.long(), 3.0 * is_real):
        assert first_real_token(input_ids, padding_mask).tolist() == expected


def test_positional_attention_mask_is_read(processor):
    model = randomize(attach(make_qwen3_vl(), processor))
    inputs = batch(processor)
    with record_contexts(model) as contexts, torch.no_grad():
        backbone = model.base_model.model.base_model
        expected = backbone(**inputs).last_hidden_state
        ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
        actual = backbone(ids, mask, **inputs).last_hidden_state
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert contexts[0].sink_positions["default"].tolist() == contexts[-1].sink_positions["default"].tolist()


# --- 5. Only the sink moves ---


@pytest.mark.parametrize("sink_token", SINKS)
def test_invariant_5_only_the_sink_moves(family, sink_token):
    model, processor = family
    model = randomize(attach(model, processor, sink_token))
    inputs = batch(processor)
    moved = []

    def compare(layer, args, output):
        moved.append((args[0] != output).any(dim=-1))

    handles = [layer.register_forward_hook(compare) for layer in recovery_layers(model)]
    logits(model, inputs)
    for handle in handles:
        handle.remove()
    token = processor.tokenizer.convert_tokens_to_ids("<|im_start|>" if sink_token == "first" else sink_token)
    sinks = [row.nonzero()[0].item() for row in inputs["input_ids"] == token]
    expected = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    for row in (0, 1):  # the third sample has no image
        expected[row, sinks[row]] = True
    assert len(moved) == 3
    assert all(torch.equal(mask, expected) for mask in moved)


def test_update_is_applied_after_deepstack(processor):
    """The update belongs to the output of layer 0 after DeepStack, that is, the input of layer 1."""
    model = attach(make_qwen3_vl(), processor)
    seen = {}
    text_model = model.base_model.model.model.language_model
    handles = [
        text_model.layers[0].register_forward_hook(lambda _, args, output: seen.update(before_deepstack=output)),
        text_model.layers[1].cue_recovery.register_forward_hook(
            lambda _, args, output: seen.update(at_module=args[0])
        ),
    ]
    inputs = encode(processor, [user("What is this?", make_image(0))])
    logits(model, inputs)
    for handle in handles:
        handle.remove()
    visual = inputs["input_ids"] == model.config.image_token_id
    differs = (seen["before_deepstack"] != seen["at_module"]).any(dim=-1)
    assert torch.equal(differs, visual)


# --- 6. No dead weight ---


@pytest.mark.parametrize("sink_token", SINKS)
def test_invariant_6_every_trainable_parameter_gets_a_gradient(family, sink_token):
    model, processor = family
    model = randomize(attach(model, processor, sink_token, r=2))
    model(**batch(processor)).logits.square().mean().backward()
    without = [
        name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert without == []


@pytest.mark.parametrize("sink_token", ["<|endoftext|>", "<|vision_end|>"])
def test_invariant_6_row_with_an_image_and_no_sink_is_an_error(processor, sink_token):
    """Padding and text-only rows do not matter, and a disabled module needs no sink."""
    model = randomize(attach(make_qwen3_vl(), processor, sink_token))
    inputs = encode(processor, [user("Hello there, how are you?"), user("What is this?", make_image(0))])
    if sink_token == "<|vision_end|>":
        logits(model, inputs)
        inputs["input_ids"][inputs["input_ids"] == processor.tokenizer.convert_tokens_to_ids(sink_token)] = 5
    message = r"Row\(s\) \[1\] of the batch have an image, but not the sink token '<\|.*\|>' of the adapter 'default'"
    with pytest.raises(ValueError, match=message):
        logits(model, inputs)
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, max_new_tokens=2)
    with model.disable_adapter():
        logits(model, inputs)
    logits(model, encode(processor, [user("Hello.")]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_a_sink(side):
    """Even if the sink token is also the padding token."""
    ids, padding = torch.tensor([[5, 6, 7], [5, 9, 7]]), torch.full((2, 2), 9)
    real, ignored = torch.ones_like(ids), torch.zeros_like(padding)
    pairs = [(padding, ids), (ignored, real)] if side == "left" else [(ids, padding), (real, ignored)]
    input_ids, mask = (torch.cat(pair, dim=1) for pair in pairs)
    expected = [-1, 3 if side == "left" else 1]
    for attention_mask in (mask, mask.bool(), mask.float()):
        assert find_token(input_ids, 9, attention_mask).tolist() == expected


@pytest.mark.parametrize(
    "num_layers, interval, expected", [(4, 1, [1, 2, 3]), (4, 3, [1]), (5, 2, [1, 3]), (6, 5, [1])]
)
def test_invariant_6_last_layer_has_no_module(processor, num_layers, interval, expected):
    model = attach(make_qwen3_vl(num_layers), processor, layer_interval=interval)
    layers = model.base_model.model.model.language_model.layers
    assert [i for i, layer in enumerate(layers) if "cue_recovery" in dict(layer.named_children())] == expected


@pytest.mark.parametrize(
    "size, text_config, millions",
    [
        ("2B", {"hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16}, 100.7),
        # The paper's 536.9M include 67.1M in the last layer, which never get a useful gradient
        ("8B", {"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32}, 536.9 - 67.1),
    ],
)
def test_parameter_counts_of_the_real_models(size, text_config, millions):
    sizes = {"2B": (6144, 8, 1024), "8B": (12288, 8, 1152)}[size]
    config = AutoConfig.for_model(
        "qwen3_vl",
        text_config={
            **text_config,
            "vocab_size": 151936,
            "head_dim": 128,
            "intermediate_size": sizes[0],
            "num_key_value_heads": sizes[1],
        },
        vision_config={"hidden_size": sizes[2], "out_hidden_size": text_config["hidden_size"]},
    )
    with torch.device("meta"):
        model = get_peft_model(AutoModelForImageTextToText.from_config(config), CueRecoveryConfig())
    trainable, _ = model.get_nb_trainable_parameters()
    assert round(trainable / 1e6, 1) == round(millions, 1)


# --- 7. The call owns its context ---


def gradients(model, inputs, between=lambda model: None):
    model.zero_grad()
    loss = model(**inputs).logits.square().mean()
    between(model)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def other_passes(model, other_inputs):
    """A teacher pass and a pass on other prompts, as happen between a student's forward and backward."""
    with model.disable_adapter(), torch.no_grad():
        model(**other_inputs)
    with torch.no_grad():
        model(**other_inputs)


@pytest.mark.parametrize("gradient_checkpointing", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
def test_invariant_7_passes_between_forward_and_backward(processor, gradient_checkpointing):
    model = randomize(attach(make_qwen3_vl(), processor, r=2))
    inputs = batch(processor)
    other_inputs = encode(processor, [user("Quite another prompt, with another image.", make_image(7, (32, 32)))])
    expected = gradients(model, inputs)
    if gradient_checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": gradient_checkpointing})
        model.train()
    actual = gradients(model, inputs, between=lambda model: other_passes(model, other_inputs))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-7)


def test_invariant_7_checkpoint_around_the_whole_model(processor):
    model = randomize(attach(make_qwen3_vl(), processor))
    inputs = batch(processor)
    expected = gradients(model, inputs)
    model.zero_grad()
    loss = checkpoint(lambda: model(**inputs).logits.square().mean(), use_reentrant=False)
    other_passes(model, encode(processor, [user("Another.", make_image(7))]))
    loss.backward()
    actual = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-7)


def test_invariant_7_two_threads(processor):
    model = randomize(attach(make_qwen3_vl(), processor))
    prompts = [user(f"What is this, number {i}?" + "?" * i, make_image(i)) for i in range(8)]
    batches = [encode(processor, [prompt]) for prompt in prompts]
    expected = [logits(model, inputs) for inputs in batches]
    results = {}

    def work(indices):
        for _ in range(5):
            for i in indices:
                results[i] = logits(model, batches[i])

    threads = [threading.Thread(target=work, args=(range(start, 8, 2),)) for start in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(8):
        torch.testing.assert_close(results[i], expected[i], rtol=1e-5, atol=1e-6)


def test_invariant_7_nested_calls(processor):
    model = randomize(attach(make_qwen3_vl(), processor))
    outer, inner = (
        encode(processor, [user(text, make_image(i))]) for i, text in enumerate(["Outer?", "Inner, longer?"])
    )
    expected = logits(model, outer), logits(model, inner)
    results = []

    def call_inside(*_):
        handle.remove()
        results.append(logits(model, inner))

    handle = recovery_layers(model)[0].register_forward_pre_hook(call_inside)
    results.append(logits(model, outer))
    torch.testing.assert_close(results[1], expected[0])
    torch.testing.assert_close(results[0], expected[1])


def test_invariant_7_nothing_remains_on_modules(processor):
    model = randomize(attach(make_qwen3_vl(), processor))
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    logits(model, batch(processor))
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    for module in recovery_layers(model):
        assert not any(isinstance(value, torch.Tensor) for value in vars(module).values())


# --- Details ---


def test_backbone_without_head_runs_the_module(processor):
    """Trainers with fused losses call the backbone, not the head model."""
    model = randomize(attach(make_qwen3_vl(), processor))
    inputs = batch(processor)
    head_model = model.base_model.model
    with torch.no_grad():
        states = head_model.base_model(**inputs).last_hidden_state
    torch.testing.assert_close(head_model.lm_head(states), logits(model, inputs))


def test_sinks_in_a_conversation_of_several_turns(processor):
    """The sink is the first occurrence of the token; further turns, as in tool rollouts, do not move it."""
    model = randomize(attach(make_qwen3_vl(), processor, "<|im_end|>"))
    history = [
        *user("What is this?", make_image(0)),
        {"role": "assistant", "content": [{"type": "text", "text": "Noise."}]},
        *user("Are you sure?"),
    ]
    inputs = encode(processor, [history])
    with record_positions(model) as positions:
        logits(model, inputs)
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert positions == [(inputs["input_ids"][0] == end).nonzero().flatten()[0].item()] * 3


@contextmanager
def record_contexts(model):
    contexts = []
    handles = [
        layer.register_forward_pre_hook(lambda _, args: contexts.append(args[1])) for layer in recovery_layers(model)
    ]
    yield contexts
    for handle in handles:
        handle.remove()


@contextmanager
def record_positions(model):
    positions = []
    with record_contexts(model) as contexts:
        yield positions
    positions += [context.sink_positions["default"][0].item() for context in contexts]


def test_inputs_embeds_without_input_ids_are_refused(processor):
    model = attach(make_qwen3_vl(), processor)
    with pytest.raises(ValueError, match="in `input_ids`"):
        model(inputs_embeds=torch.zeros(1, 5, 32))


def test_sink_attention_and_update_ratios(processor):
    model = randomize(attach(make_qwen3_vl(), processor))
    inputs = batch(processor)
    weights = sink_attention(model, **inputs)
    visual = inputs["input_ids"] == model.config.image_token_id
    assert list(weights) == ["layers.1", "layers.2", "layers.3"]
    for attention in weights.values():
        assert attention.shape == (3, 4, inputs["input_ids"].shape[1])
        torch.testing.assert_close(attention[:2].sum(dim=-1), torch.ones(2, 4))
        assert (attention.masked_select(~visual.unsqueeze(1)) == 0).all()
    with record_update_ratios(model) as ratios:
        logits(model, inputs)
    assert list(ratios) == list(weights)
    assert all(ratio.shape == (2,) and (ratio > 0).all() for ratio in ratios.values())


def test_deepcopy_is_independent(processor):
    model = randomize(attach(make_qwen3_vl(), processor))
    inputs = batch(processor)
    expected = logits(model, inputs)
    duplicate = copy.deepcopy(model)
    torch.testing.assert_close(logits(duplicate, inputs), expected)
    duplicate.unload()
    torch.testing.assert_close(logits(model, inputs), expected)


@pytest.mark.parametrize("trains", [False, True])
def test_decoder_layer_compiles_without_graph_break(processor, trains):
    model = randomize(attach(make_qwen3_vl(), processor))
    decoder_layer = recovery_layers(model)[0].get_base_layer()
    calls = []
    # Before the hook that removes the context from the arguments
    handle = decoder_layer.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True, prepend=True
    )
    inputs = encode(processor, [user("What is this?", make_image(0))])
    logits(model, {**inputs, "use_cache": False})  # a cache would keep the first call's graph alive
    handle.remove()
    (hidden_states, *args), kwargs = calls[0]
    hidden_states = hidden_states.clone().requires_grad_(trains)
    results = []
    for call in (decoder_layer, torch.compile(decoder_layer, fullgraph=True, backend="aot_eager")):
        with torch.set_grad_enabled(trains):
            output = call(hidden_states, *args, **kwargs)
        wanted = [hidden_states, *(p for p in decoder_layer.parameters() if p.requires_grad)]
        results.append([output, *(torch.autograd.grad(output.tanh().sum(), wanted) if trains else [])])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_sink_that_is_a_visual_token_does_not_attend_to_itself(processor):
    model = randomize(attach(make_qwen3_vl(), processor, "<|image_pad|>"))
    inputs = encode(processor, [user("What is this?", make_image(0, (128, 64)))])
    first = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[0].item()
    for attention in sink_attention(model, **inputs).values():
        assert (attention[0, :, first] == 0).all()
        torch.testing.assert_close(attention.sum(dim=-1), torch.ones(1, 4))
    alone = encode(processor, [user("What is this?", make_image(0, (32, 32)))])
    with record_positions(model) as positions:
        logits(model, alone)
    assert positions == [-1] * 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("sink_token", SINKS)
def test_module_never_synchronizes_with_the_gpu(processor, sink_token):
    model = randomize(attach(make_qwen3_vl(), processor, sink_token)).cuda()
    inputs = {name: value.cuda() for name, value in batch(processor).items()}
    recovery_model = model.base_model
    layer = recovery_layers(model)[0]
    hidden_states = torch.randn(*inputs["input_ids"].shape, 32, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        _, kwargs = recovery_model._add_context(model.base_model.model, (), inputs)
        layer(hidden_states, kwargs["cue_recovery_context"])
    finally:
        torch.cuda.set_sync_debug_mode("default")
