"""
Behaviour of TRL, transformers, PEFT and accelerate that we rely on and that test_signatures.py cannot read from their
source: the order of calls, shared objects, and names that must stay free.
"""

import ast
import inspect
import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from datasets import Dataset
from own_modules import own_modules
from served_teacher import make_trainer
from tiny_models import encode, make_image, make_qwen3_vl, user
from transformers import TrainerState
from transformers.integrations.fsdp import is_fsdp_managed_module
from transformers.utils import PushToHubMixin
from trl import DistillationConfig, DistillationTrainer
from trl.generation.vllm_generation import VLLMGeneration
from trl.kernels import chunked_logprob
from trl.trainer.utils import RepeatSampler

from trl_vicur import ViCuRConfig
from trl_vicur.trainer import resuming, vicur_config
from trl_vicur.trainer.checkpoints import FILE_LIST_NAME


INSTALLED = ", ".join(f"{library} {version(library)}" for library in ("trl", "transformers", "peft", "accelerate"))


# --- Returned values ---


def with_prompts_for_vllm(monkeypatch, number: int = 1) -> None:
    """DistillationTrainer with TRL#6718's change of GRPOTrainer: the prompts are also returned for vLLM."""
    tokenize_prompts = DistillationTrainer._tokenize_prompts
    generate_single_turn = DistillationTrainer._generate_single_turn

    def _tokenize_prompts(self, prompts):
        prompt_ids, images, multimodal_fields = tokenize_prompts(self, prompts)
        return prompt_ids, images, multimodal_fields, *[prompt_ids] * number

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, vllm_prompt_ids, has_tool_images=False):
        assert vllm_prompt_ids == prompt_ids
        return generate_single_turn(self, prompt_ids, images, multimodal_fields, has_tool_images)

    def _generate(self, prompts):
        prompt_ids, images, multimodal_fields, *vllm_prompt_ids = self._tokenize_prompts(prompts)
        completion_ids = self._generate_single_turn(prompt_ids, images, multimodal_fields, *vllm_prompt_ids)
        return prompt_ids, completion_ids, None, images, []

    monkeypatch.setattr(DistillationTrainer, "_tokenize_prompts", _tokenize_prompts)
    monkeypatch.setattr(DistillationTrainer, "_generate_single_turn", _generate_single_turn)
    monkeypatch.setattr(DistillationTrainer, "_generate", _generate)


def test_prompts_may_also_be_returned_for_vllm(tmp_path, processor, monkeypatch):
    """TRL#6718 is open. It must not change training."""
    losses = []
    for is_merged in (False, True):
        if is_merged:
            with_prompts_for_vllm(monkeypatch)
        trainer = make_trainer(tmp_path, processor, max_steps=2)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_unknown_values_of_tokenize_prompts_are_refused_by_version(tmp_path, processor, monkeypatch):
    with_prompts_for_vllm(monkeypatch, number=2)
    trainer = make_trainer(tmp_path, processor)
    with pytest.raises(RuntimeError, match=rf"_tokenize_prompts` returns 5 values in TRL {version('trl')}; .*Install"):
        trainer.train()


# --- Names that must stay free ---


def test_distillation_config_has_none_of_our_fields():
    taken = sorted(ViCuRConfig.__annotations__.keys() & DistillationConfig.__dataclass_fields__.keys())
    assert not taken, (
        f"DistillationConfig of trl {version('trl')} now has the fields {taken}, which ViCuRConfig also defines: "
        "ours overrides their default and help, but TRL's trainer acts on the value, too (with `num_iterations` it "
        "would repeat batches twice). Read what TRL does with them, then drop or rename ours in vicur_config.py."
    )


def test_field_that_trl_also_defines_is_refused_by_name(tmp_path, monkeypatch):
    @dataclass
    class LaterDistillationConfig(DistillationConfig):
        num_iterations: int = field(default=2)

    monkeypatch.setattr(vicur_config, "DistillationConfig", LaterDistillationConfig)
    with pytest.raises(ImportError, match=rf"TRL {version('trl')} .*`num_iterations`.*Install `trl==1.16"):
        ViCuRConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)


# Private names of the libraries' objects, each with a check that it is still where we expect it
FOREIGN = {
    "_attn_implementation": lambda: hasattr(transformers.PreTrainedConfig(), "_attn_implementation"),
    "_backward_kernel": lambda: "_backward_kernel" in vars(chunked_logprob),
    "_compiled_call_impl": lambda: hasattr(torch.nn.Module(), "_compiled_call_impl"),
    "_fingerprint": lambda: hasattr(Dataset.from_list([{}]), "_fingerprint"),
    "_forward_kernel": lambda: "_forward_kernel" in vars(chunked_logprob),
    "_get_num_multimodal_tokens": lambda: hasattr(transformers.Qwen3VLProcessor, "_get_num_multimodal_tokens"),
    "_is_fsdp_managed_module": lambda: is_fsdp_managed_module(SimpleNamespace(_is_fsdp_managed_module=True)),
    "_name_or_path": lambda: "_name_or_path" in inspect.getsource(transformers.PreTrainedConfig),
    "_upload_modified_files": lambda: hasattr(PushToHubMixin, "_upload_modified_files"),
}
# Of named tuples, argparse and torch
STANDARD = {"_replace", "_actions", "_optionals", "_group_actions", "_StoreFalseAction", "_version"}


def private_names() -> dict[str, set[str]]:
    """Private attributes of foreign objects that our modules read or write, with the names of these modules."""
    own, others = set(), {}
    for module in own_modules():
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.FunctionDef):
                own.add(node.name)
            elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("_"):
                if ast.unparse(node.value) in ("self", "cls", "super()"):
                    own.add(node.attr)
                else:
                    others.setdefault(node.attr, set()).add(module.__name__)
    return {name: where for name, where in others.items() if name not in (own - FOREIGN.keys()) | STANDARD}


def test_private_names_of_other_objects_exist():
    used = private_names()
    unknown = {name: sorted(where) for name, where in used.items() if name not in FOREIGN}
    assert not unknown, (
        f"New private names of other libraries' objects: {unknown}. Add each to FOREIGN, with a check that it exists."
    )
    assert FOREIGN.keys() == used.keys(), f"No longer used: {sorted(FOREIGN.keys() - used.keys())}. Delete them here."
    lost = {name: sorted(used[name]) for name, is_found in FOREIGN.items() if not is_found()}
    assert not lost, (
        f"{INSTALLED} no longer have these private names where we expect them (name: its modules): {lost}."
    )


@pytest.mark.parametrize(
    "name, parameters",
    [
        (
            "_forward_kernel",
            "mm_ptr mm_stride targets_ptr max_ptr sum_exp_ptr x_sum_exp_ptr sq_sum_exp_ptr z_sum_ptr "
            "max_before_target_ptr target_logit_ptr vocab_start n_cols logit_scale softcap inv_t HAS_SOFTCAP "
            "HAS_ENTROPY HAS_LOG_SUM_SQ_PROBS HAS_MEAN_LOGITS HAS_IS_TOP1 BLOCK_SIZE",
        ),
        (
            "_backward_kernel",
            "mm_ptr mm_stride targets_ptr log_z_ptr entropy_ptr grad_logprobs_ptr grad_entropy_ptr vocab_start "
            "n_cols logit_scale softcap inv_t HAS_SOFTCAP HAS_LOGPROB_GRAD HAS_ENTROPY_GRAD BLOCK_SIZE",
        ),
    ],
)
def test_triton_kernels_have_the_parameters_that_we_pass(name, parameters):
    """They run on GPUs only, and with Triton they are not functions that test_signatures.py could read."""
    kernels = {
        node.name: [argument.arg for argument in node.args.args]
        for node in ast.parse(inspect.getsource(chunked_logprob)).body
        if isinstance(node, ast.FunctionDef)
    }
    assert kernels.get(name) == parameters.split(), (
        f"trl {version('trl')} has another `{name}` in trl.kernels.chunked_logprob, with {kernels.get(name)}. "
        "token_chunks.py launches it with these positional arguments: read what it does now and adapt the call."
    )


def test_trl_creates_vllm_engine_by_the_name_that_we_replace():
    assert "LLM(" in inspect.getsource(VLLMGeneration._init_vllm), (
        f"trl {version('trl')} no longer creates its engine with `LLM(...)` in `VLLMGeneration._init_vllm`: "
        "`engine_with_module` (vllm_rollouts.py) replaces this name to give the engine the recovery module."
    )


# --- State and order ---


def test_sampler_has_the_attributes_that_resuming_and_reuse_change():
    sampler = RepeatSampler([0, 1, 2, 3], mini_repeat_count=1, batch_size=2, repeat_count=2, shuffle=True, seed=0)
    names = {"repeat_count", "num_samples", "generator", "shuffle"}
    missing = names - vars(sampler).keys()
    assert not missing, (
        f"RepeatSampler of trl {version('trl')} has no {sorted(missing)}: ViCuRTrainer repeats a batch "
        "`num_iterations` times by `repeat_count` and replays the orders of past epochs on resuming by the others."
    )
    expected = list(sampler)
    again = RepeatSampler([0, 1, 2, 3], mini_repeat_count=1, batch_size=2, repeat_count=2, shuffle=True, seed=0)
    order = torch.randperm(again.num_samples, generator=torch.Generator().manual_seed(0)).tolist()
    assert expected == [*order[:2], *order[:2], *order[2:], *order[2:]], (
        f"RepeatSampler of trl {version('trl')} no longer draws one `torch.randperm` for each epoch, which "
        "`ResumingMixin._init_training_state` repeats for the epochs of a resumed run."
    )


def test_step_counts_micro_batches_of_the_buffer(tmp_path, processor, monkeypatch):
    trainer = make_trainer(tmp_path, processor, max_steps=2)
    seen = []
    compute_loss = trainer.compute_loss

    def spy(model, inputs, *args, **kwargs):
        seen.append((trainer._step, [inputs is batch for batch in trainer._buffered_inputs]))
        return compute_loss(model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", spy)
    trainer.train()
    assert seen == [(0, [True, False]), (1, [False, True]), (2, [True, False]), (3, [False, True])], (
        f"trl {version('trl')} no longer counts micro-batches in `_step`, or no longer keeps those of a generation "
        "batch in order in `_buffered_inputs`: num_iterations > 1 and resuming (ViCuRTrainer._prepare_inputs, "
        f"_is_within_rollouts, _init_training_state) set and read both. Seen: {seen}"
    )


def test_only_trainer_state_is_written_after_list_of_checkpoint_files(tmp_path, processor, monkeypatch):
    events = []

    def files(directory) -> set[str]:
        return {path.relative_to(directory).as_posix() for path in Path(directory).rglob("*") if path.is_file()}

    write_file_list, save_state = resuming.write_file_list, TrainerState.save_to_json
    rotate = transformers.trainer.rotate_checkpoints

    def spy_list(directory):
        events.append(("list", files(directory)))
        write_file_list(directory)

    def spy_state(self, path):
        if Path(path).parent.name.startswith("checkpoint-"):
            events.append(("state", files(Path(path).parent)))
        save_state(self, path)

    def spy_rotate(*args, **kwargs):
        events.append(("rotate", files(checkpoint)))
        rotate(*args, **kwargs)

    monkeypatch.setattr(resuming, "write_file_list", spy_list)
    monkeypatch.setattr(TrainerState, "save_to_json", spy_state)
    monkeypatch.setattr(transformers.trainer, "rotate_checkpoints", spy_rotate)
    checkpoint = tmp_path / "checkpoint-1"
    make_trainer(tmp_path, processor, max_steps=1, save_strategy="steps", save_steps=1).train()

    order = [name for name, _ in events]
    why = (
        "ResumingMixin._save_rng_state lists a checkpoint's files after Trainer wrote all but trainer_state.json, "
        "which seals it; older checkpoints may only be deleted after that (checkpoints.py)."
    )
    assert order == ["list", "state", "rotate"], f"transformers {version('transformers')} has the order {order}. {why}"
    written_later = files(checkpoint) - events[0][1] - {FILE_LIST_NAME, "trainer_state.json"}
    assert not written_later, f"transformers {version('transformers')} writes {written_later} too late. {why}"
    listed = json.loads((checkpoint / FILE_LIST_NAME).read_text())
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors"} <= listed.keys()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed_decoder_layer_reads_the_hooks_returned_value(processor, use_reentrant):
    """Hooks run inside a layer's gradient checkpoint in transformers 5.16, and outside of it in 5.24."""
    model = make_qwen3_vl()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.train()
    runs, inputs = Counter(), defaultdict(list)

    def update(layer, args, kwargs):
        assert kwargs["cue_recovery_context"] == "context", (
            "decoder layers do not receive the backbone's keyword arguments"
        )
        runs[layer.self_attn.layer_idx] += 1
        return (args[0] * 2, *args[1:]), kwargs

    for number, layer in enumerate(model.model.language_model.layers):
        layer.register_forward_pre_hook(update, with_kwargs=True)
        layer.input_layernorm.register_forward_pre_hook(
            lambda norm, args, number=number: inputs[number].append(args[0].detach().clone())
        )
    output = model(**encode(processor, [user("What?", make_image(0))]), cue_recovery_context="context")
    output.logits.mean().backward()
    why = (
        f"transformers {version('transformers')} runs pre-forward hooks {dict(runs)} times in a forward pass and its "
        "backward with gradient checkpointing. The recovery module is such a hook on a decoder layer "
        "(CueRecoveryLayer), so the recomputed layer must read its return value, whether recomputed (2) or not (1)."
    )
    assert set(runs.values()) in ({1}, {2}), why
    for first, recomputed in inputs.values():
        assert torch.equal(first, recomputed), why
