"""ViCuRTrainer end to end, on tiny real models: invariants 9, 11 and 12, and every option."""

import copy
import math
import warnings
from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset, Features, Image, IterableDataset, List
from peft import (
    IA3Config,
    LNTuningConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.lora.config import KasaConfig
from safetensors.torch import load_file
from tiny_families import FAMILIES
from tiny_models import (
    encode,
    make_image,
    make_qwen2_5_processor,
    make_qwen2_5_vl,
    make_qwen3_vl,
    randomize,
    user,
)
from tiny_trainers import (
    ADAPTER,
    changed,
    logprobs_alone,
    make_config,
    make_rows,
    make_trainer,
    row_of,
    train_logs,
    weights,
)
from torch.distributed.utils import _apply_to_tensors
from transformers import Qwen3VLForConditionalGeneration, TrainerCallback
from transformers.utils import ModelOutput
from trl import DistillationConfig, DistillationTrainer

from trl_vicur import CueRecoveryConfig, ViCuRTrainer
from trl_vicur.trainer import vicur_trainer
from trl_vicur.trainer.lm_head import LMHead
from trl_vicur.trainer.losses import token_logprobs
from trl_vicur.trainer.mixed_precision import ForwardRedirection
from trl_vicur.trainer.teachers import scores
from trl_vicur.trainer.vision.features import get_backbone


# --- 11. TRL parity ---


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_invariant_11_trl_parity(tmp_path, processor, beta):
    """With everything of ours switched off, losses, gradients and weights equal those of TRL's trainer."""
    rows = make_rows(mixed=False)  # TRL itself cannot mix rows with and without images
    arguments = dict(beta=beta, max_steps=3, gradient_checkpointing=True)
    ours = make_trainer(
        tmp_path,
        processor,
        rows=rows,
        teacher_model=make_qwen3_vl(seed=5),
        privilege="none",
        distillation_mode="full_logits",
        **arguments,
    )
    ours.train()  # before the other one is built, which resets the seed
    shared = vars(make_config(tmp_path, **arguments))
    fields = DistillationConfig.__dataclass_fields__
    config = {name: value for name, value in shared.items() if name in fields and fields[name].init}
    theirs = DistillationTrainer(
        model=make_qwen3_vl(),
        teacher_model=make_qwen3_vl(seed=5),
        args=DistillationConfig(**config),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
    )
    theirs.train()
    assert len(train_logs(ours)) == len(train_logs(theirs)) == 3
    for our_log, their_log in zip(train_logs(ours), train_logs(theirs), strict=True):
        for name in ("loss", "grad_norm", "entropy", "completions/mean_length", "num_tokens"):
            assert our_log[name] == pytest.approx(their_log[name], rel=1e-5), name
    torch.testing.assert_close(weights(ours.model), weights(theirs.model), rtol=1e-5, atol=1e-7)


# --- 9. Same tokens scored ---


@pytest.mark.parametrize("privilege", ["cue", "answer", "none"])
def test_invariant_9_teacher_and_student_score_the_same_tokens(tmp_path, processor, privilege):
    """For each row, the trainer's hidden states give the same scores as the row alone, without padding or batch."""
    teacher_model = make_qwen3_vl(seed=5)
    trainer = make_trainer(tmp_path, processor, teacher_model=teacher_model, privilege=privilege)
    rows = [trainer.train_dataset[i] for i in range(8)]
    trainer.model.train()
    trainer._prepare_inputs(rows[:4])
    scored = 0
    for inputs in trainer._buffered_inputs:  # shuffled and split as in training
        mask = inputs["completion_mask"].bool()
        with torch.no_grad():
            student_states = trainer._student_hidden_states(trainer.model, inputs)
            teacher = trainer.teacher.score(trainer.model, inputs)
        for index in range(len(mask)):
            completion = inputs["completion_ids"][index][mask[index]]
            row = row_of(inputs["prompt_ids"][index], rows, processor)
            for model, states, head, hint in (
                (trainer.model, student_states, LMHead.from_model(trainer.model), None),
                (teacher_model, teacher.states, teacher.head, None if privilege == "none" else row[privilege]),
            ):
                logprobs, _ = token_logprobs(states[index][mask[index]], head, completion)
                torch.testing.assert_close(
                    logprobs, logprobs_alone(model, processor, row, hint, completion), rtol=1e-4, atol=1e-5
                )
                scored += len(completion)
    assert scored > 0


# --- 12. Precision is what was asked for ---


class watch_dtypes:
    """Records, while active, the dtypes of decoder layers in rollouts and in the student's and teacher's passes."""

    def __init__(self, trainer):
        self.trainer, self.seen, self.pass_ = trainer, {}, "rollout"
        self.handles = []

    def __enter__(self):
        for model in (self.trainer.model, self.trainer.teacher_model):
            for name, module in model.named_modules() if model is not None else ():
                # Recovery modules keep the dtype of their weights: they compute for one token only
                is_in_layer = "language_model.layers" in name and "sink_attention" not in name
                if isinstance(module, torch.nn.Linear) and is_in_layer:
                    self.handles.append(module.register_forward_hook(self.note))
        for owner, name in self.passes():
            setattr(owner, name, self.within(name, getattr(owner, name)))
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()
        for owner, name in self.passes():
            delattr(owner, name)

    def passes(self):
        return (self.trainer, "_student_hidden_states"), (self.trainer.teacher, "score")

    def within(self, name, method):
        def call(*args):
            who = "teacher" if name == "score" else "student"
            self.pass_ = f"{who}{', evaluation' * (not self.trainer.model.training)}"
            if name == "_student_hidden_states" and self.trainer.model.training and not torch.is_grad_enabled():
                self.pass_ = "old log-probabilities"
            try:
                return method(*args)
            finally:
                self.pass_ = "rollout"

        return call

    def note(self, module, args, output):
        self.seen.setdefault(self.pass_, set()).add(output.dtype)


def watch_objective(monkeypatch) -> dict[str, set[torch.dtype]]:
    """Dtypes of the hidden states that the objectives receive and of what they return."""
    seen = {"states": set(), "values": set()}
    functions = [(vicur_trainer, name) for name in ("full_divergence", "topk_divergence", "liger_divergence_sum")]
    functions += [(vicur_trainer, "token_logprobs"), (scores, "token_logprobs"), (scores, "topk_logprobs")]
    for module, name in functions:
        function = getattr(module, name)

        def watched(states, *args, function=function):
            assert not torch.is_autocast_enabled("cpu")
            results = function(states, *args)
            seen["states"].add(states.dtype)
            results = [results] if isinstance(results, torch.Tensor) else results
            seen["values"] |= {result.dtype for result in results if result.is_floating_point()}
            return results[0] if len(results) == 1 else results

        monkeypatch.setattr(module, name, watched)
    return seen


STUDENTS = {
    "adapter": lambda: CueRecoveryConfig(**ADAPTER, r=2),
    "train_base": lambda: CueRecoveryConfig(**ADAPTER, train_base=True),
    "full": lambda: None,
}


@pytest.mark.parametrize("teacher", ["base", "live", "ema", "external"])
@pytest.mark.parametrize("student", STUDENTS)
def test_invariant_12_layers_compute_in_bfloat16_and_losses_in_float32(
    tmp_path, processor, monkeypatch, student, teacher
):
    """Each student and teacher, in rollouts, old log-probabilities, losses and evaluation."""
    trainer = make_trainer(
        tmp_path,
        processor,
        peft_config=STUDENTS[student](),
        teacher_model=make_qwen3_vl(seed=5) if teacher == "external" else None,
        teacher_model_kind="base" if teacher == "external" else teacher,
        bf16=True,
        num_iterations=2,
    )
    objective = watch_objective(monkeypatch)
    losses = []
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: (losses.append(compute_loss(*args, **kwargs)), losses[-1])[1]
    with watch_dtypes(trainer) as layers:
        trainer.train()
        trainer.evaluate(trainer.train_dataset)
    passes = ["rollout", "old log-probabilities", "student", "teacher", "student, evaluation", "teacher, evaluation"]
    assert layers.seen == {name: {torch.bfloat16} for name in passes}
    assert objective == {"states": {torch.bfloat16}, "values": {torch.float32}}
    assert {loss.dtype for loss in losses} == {torch.float32}
    assert {batch["old_logprobs"].dtype for batch in trainer._buffered_inputs} == {torch.float32}
    # Weights and gradients stay in float32
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert all(math.isfinite(log["loss"]) and log["grad_norm"] > 0 for log in train_logs(trainer))


@pytest.mark.parametrize("mode", ["sampled_token", "full_logits", "topk_logits", "liger"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_bf16_objectives_see_bfloat16_states(tmp_path, processor, monkeypatch, mode, checkpointing):
    trainer = make_trainer(
        tmp_path,
        processor,
        bf16=True,
        distillation_mode="full_logits" if mode == "liger" else mode,
        use_liger_kernel=mode == "liger",
        gradient_checkpointing=checkpointing,
        peft_config=CueRecoveryConfig(**ADAPTER, r=2),
    )
    objective = watch_objective(monkeypatch)
    with watch_dtypes(trainer) as layers:
        trainer.train()
    assert set().union(*layers.seen.values()) == {torch.bfloat16}
    assert objective == {"states": {torch.bfloat16}, "values": {torch.float32}}
    assert all(math.isfinite(log["loss"]) and log["grad_norm"] > 0 for log in train_logs(trainer))


def test_fp16_layers_compute_in_float16(tmp_path, processor, monkeypatch):
    trainer = make_trainer(tmp_path, processor, peft_config=CueRecoveryConfig(**ADAPTER, r=2))
    # Accelerate supports float16 on GPUs only
    monkeypatch.setattr(type(trainer.accelerator), "mixed_precision", "fp16")
    objective = watch_objective(monkeypatch)
    with watch_dtypes(trainer) as layers:
        trainer.train()
    assert layers.seen == {name: {torch.float16} for name in ("rollout", "student", "teacher")}
    assert objective == {"states": {torch.float16}, "values": {torch.float32}}


@pytest.mark.parametrize("teacher", ["base", "external"])
def test_bf16_scores_the_distribution_that_the_model_samples_from(tmp_path, processor, teacher):
    """The heads of student and teacher receive the same states as in `model(...)` under autocast."""
    trainer = make_trainer(
        tmp_path,
        processor,
        peft_config=CueRecoveryConfig(**ADAPTER, r=2),
        teacher_model=make_qwen3_vl(seed=5) if teacher == "external" else None,
        privilege="none",
        bf16=True,
    )
    randomize(trainer.model)
    trainer.model.train()
    inputs = trainer._prepare_inputs([trainer.train_dataset[i] for i in range(4)])
    length = inputs["completion_ids"].shape[1]
    kwargs = {key: inputs[key] for key in ("pixel_values", "image_grid_thw") if key in inputs}
    names = (("input_ids", "ids"), ("attention_mask", "mask"))
    kwargs |= {key: torch.cat([inputs[f"prompt_{n}"], inputs[f"completion_{n}"]], dim=1) for key, n in names}
    kwargs["mm_token_type_ids"] = inputs["mm_token_type_ids"]

    def states_of_head(model):
        states = []
        hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: states.append(args[0]))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model.eval()(**kwargs)
        hook.remove()
        return states[0][:, -length - 1 : -1].bfloat16()

    with torch.no_grad():
        student = trainer._student_hidden_states(trainer.model, inputs)
        of_teacher = trainer.teacher.score(trainer.model, inputs)
    assert student.equal(states_of_head(trainer.model))
    with trainer.model.disable_adapter() if teacher == "base" else nullcontext():
        assert of_teacher.states.equal(states_of_head(trainer.teacher_model or trainer.model))


def test_wrapped_forward_rounds_nothing():
    """FSDP2 casts the arguments of a forward and passes copies of dicts."""
    model = torch.nn.Linear(1, 1)
    model.register_forward_pre_hook(
        lambda _, args, kwargs: _apply_to_tensors(lambda tensor: tensor.bfloat16(), (args, kwargs)), with_kwargs=True
    )
    inputs = {"old_logprobs": torch.tensor([-1.2345678])}
    redirection = ForwardRedirection("cpu")

    def method(model, inputs, num_items):
        assert not torch.is_autocast_enabled("cpu")
        inputs["features"] = "noted"
        return inputs["old_logprobs"] / num_items

    with torch.autocast("cpu", torch.bfloat16):
        result = redirection(model, model, method, model, inputs, torch.tensor(2049.0))
    assert result.equal(torch.tensor([-1.2345678]) / 2049.0)
    assert inputs["features"] == "noted"


# --- Teachers ---


def test_peft_student_is_its_own_frozen_teacher(tmp_path, processor):
    trainer = make_trainer(tmp_path, processor, peft_config=CueRecoveryConfig(**ADAPTER, r=2))
    assert trainer.teacher_model is None  # no second copy
    base = weights(make_qwen3_vl())
    before = weights(trainer.model)
    trainer.train()
    moved = changed(before, weights(trainer.model))
    assert moved and all("sink_attention" in name or "lora" in name for name in moved)
    with trainer.model.disable_adapter():
        assert trainer.model.base_model.model.lm_head.weight.equal(base["lm_head.weight"])
    assert all(p.requires_grad == ("sink_attention" in n or "lora_" in n) for n, p in trainer.model.named_parameters())


LORA = dict(r=2, target_modules=["q_proj", "v_proj"])
ON_DECODER = dict(target_modules=r".*language_model.*(q_proj|v_proj)")
MOVED_BASE = {
    "bias-all": CueRecoveryConfig(**ADAPTER, r=2, bias="all"),
    "bias-lora_only": LoraConfig(**LORA, bias="lora_only"),
}
KEPT_BASE = {
    "module": CueRecoveryConfig(**ADAPTER, r=2),
    "dora": LoraConfig(**LORA, use_dora=True),
    "lora-bias": LoraConfig(**LORA, lora_bias=True),
    "orthogonal": LoraConfig(**LORA, init_lora_weights="orthogonal"),
    "random": LoraConfig(**LORA, init_lora_weights=False),
    "modules_to_save": CueRecoveryConfig(**ADAPTER, r=2, modules_to_save=["merger"]),
    "ln-tuning": LNTuningConfig(target_modules=["input_layernorm"]),
    "ia3": IA3Config(target_modules=["v_proj"], feedforward_modules=[]),
    "vera": VeraConfig(r=2, **ON_DECODER),
    "oft": OFTConfig(oft_block_size=4, **ON_DECODER),
    "lokr": LoKrConfig(r=2, **ON_DECODER),
    "vblora": VBLoRAConfig(r=2, num_vectors=8, vector_length=4, topk=2, **ON_DECODER),
}


@pytest.mark.parametrize("peft_config", [*MOVED_BASE.values(), *KEPT_BASE.values()], ids=[*MOVED_BASE, *KEPT_BASE])
def test_invariant_2_base_teaches_whatever_an_adapter_trains(tmp_path, recwarn, peft_config):
    """Every trainable weight is changed, as training might. If the base trains, too, a frozen copy is kept."""
    processor = make_qwen2_5_processor()
    trainer = make_trainer(tmp_path, processor, make_qwen2_5_vl(), peft_config=peft_config)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    inputs = encode(processor, [[{"role": "user", "content": [{"type": "image", "image": make_image(0)}]}]])
    is_moved = peft_config in MOVED_BASE.values()
    assert (trainer.teacher_model is not None) == is_moved
    assert any("the teacher is a frozen copy of the base" in str(each.message) for each in recwarn) == is_moved
    with torch.no_grad():
        if is_moved:
            teacher = trainer.teacher_model.eval()(**inputs).logits
        else:
            with trainer.teacher.acting(trainer.model):
                teacher = trainer.model(**inputs).logits
        assert (trainer.model.eval()(**inputs).logits - teacher).abs().max() > 1e-3
        torch.testing.assert_close(teacher, make_qwen2_5_vl().eval()(**inputs).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    "peft_config, option",
    [
        (CueRecoveryConfig(**ADAPTER, r=2, init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (LoraConfig(**LORA, init_lora_weights="pissa_niter_4"), "init_lora_weights='pissa_niter_4'"),
        (LoraConfig(**LORA, init_lora_weights="olora"), "init_lora_weights='olora'"),
        (LoraConfig(**LORA, kasa_config=KasaConfig()), "kasa_config="),
    ],
    ids=["pissa", "pissa_niter", "olora", "kasa"],
)
def test_invariant_2_adapters_that_rewrite_the_base_are_refused(tmp_path, processor, peft_config, option):
    message = rf"rewrote \d+ weight\(s\) of the base model.*`{option}.*leaves the base"
    for arguments in (dict(), dict(teacher_model_kind="live")):  # a saved adapter would not fit any other model either
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, processor, peft_config=copy.deepcopy(peft_config), **arguments)
    # If it was attached before, the base cannot be compared
    with pytest.raises(ValueError, match=f"The adapter 'default' of the model changes weights of the base .`{option}"):
        make_trainer(tmp_path, processor, get_peft_model(make_qwen3_vl(), peft_config))


def test_invariant_2_model_with_trained_biases_is_refused(tmp_path):
    model = get_peft_model(make_qwen2_5_vl(), LoraConfig(**LORA, bias="all"))
    with pytest.raises(ValueError, match=r"The adapter 'default' .* \(`bias='all'`\).* or pass the base as"):
        make_trainer(tmp_path, make_qwen2_5_processor(), model)
    make_trainer(tmp_path, make_qwen2_5_processor(), model, teacher_model=make_qwen2_5_vl())


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
def test_trainable_token_indices(tmp_path, processor, is_tied):
    """Loss, gradient and rollout use the trained rows of the embedding, and of a tied head, like the model does."""
    base = make_qwen3_vl()
    if not is_tied:
        base.config.tie_word_embeddings = base.config.text_config.tie_word_embeddings = False
        base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach().clone())
    config = CueRecoveryConfig(**ADAPTER, r=2, trainable_token_indices=[*range(32, 127)])
    trainer = make_trainer(tmp_path, processor, copy.deepcopy(base), peft_config=config)
    before = weights(trainer.model)
    trainer.train()
    moved = changed(before, weights(trainer.model))
    assert any("trainable_tokens_delta" in name for name in moved) and not any("base_layer" in name for name in moved)

    model = trainer.model.eval()
    inputs = encode(processor, [user("What?", make_image(0))])
    [delta] = [p for name, p in model.named_parameters() if "embed_tokens" in name and p.requires_grad]
    of_model = model(**inputs).logits.log_softmax(-1)[0, :-1].gather(-1, inputs["input_ids"][0, 1:, None]).squeeze(-1)
    states = get_backbone(model)(**inputs).last_hidden_state[0, :-1]
    of_head, _ = token_logprobs(states, LMHead.from_model(model), inputs["input_ids"][0, 1:])
    torch.testing.assert_close(of_head, of_model)
    gradients = [torch.autograd.grad(logprobs.sum(), delta)[0] for logprobs in (of_head, of_model)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)

    trainer.save_model()
    reloaded = PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(reloaded(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    "peft_config", [None, CueRecoveryConfig(**ADAPTER, train_base=True)], ids=["full", "train_base"]
)
def test_full_fine_tuning_keeps_a_frozen_copy(tmp_path, processor, peft_config):
    trainer = make_trainer(tmp_path, processor, peft_config=peft_config)
    teacher_before = weights(trainer.teacher_model)
    torch.testing.assert_close(teacher_before, weights(make_qwen3_vl()), rtol=0, atol=0)
    before = weights(trainer.model)
    trainer.train()
    assert any("embed_tokens" in name for name in changed(before, weights(trainer.model)))
    assert not changed(teacher_before, weights(trainer.teacher_model))
    assert not any(p.requires_grad for p in trainer.teacher_model.parameters())


@pytest.mark.parametrize("peft_config", [None, CueRecoveryConfig(**ADAPTER)], ids=["full", "peft"])
def test_live_teacher_with_the_same_prompt_has_no_gap(tmp_path, processor, peft_config):
    """The student teaches itself with its own prompt: with any weights, there is nothing to learn."""
    trainer = make_trainer(
        tmp_path,
        processor,
        peft_config=peft_config,
        teacher_model_kind="live",
        privilege="none",
        distillation_mode="full_logits",
    )
    assert trainer.teacher_model is None
    trainer.train()
    assert all(abs(log["loss"]) < 1e-6 and abs(log["logprob_gap/mean"]) < 1e-6 for log in train_logs(trainer))


@pytest.mark.parametrize("peft_config", [None, CueRecoveryConfig(**ADAPTER, r=2)], ids=["full", "peft"])
def test_ema_teacher_follows_the_student(tmp_path, processor, peft_config):
    trainer = make_trainer(
        tmp_path,
        processor,
        peft_config=peft_config,
        teacher_model_kind="ema",
        teacher_update_rate=0.25,
        teacher_sync_steps=2,
        max_steps=4,
    )
    students = []

    class Record(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            students.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})

    trainer.add_callback(Record())
    expected = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    for student in (students[1], students[3]):
        expected = {name: 0.75 * tensor + 0.25 * student[name] for name, tensor in expected.items()}
    torch.testing.assert_close(trainer.teacher.average, expected)
    # Weights are swapped in and back
    before = weights(trainer.model)
    with trainer.teacher.weights(trainer.model):
        lent = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    torch.testing.assert_close(lent, expected)
    assert not changed(before, weights(trainer.model))


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_ema_teacher_scores_with_its_own_weights(tmp_path, processor, bf16):
    """Autocast caches bfloat16 casts of the student's weights, which must not be used for the EMA weights."""
    logs = []
    for kind in ("ema", "external"):
        teacher = make_qwen3_vl(seed=5)
        trainer = make_trainer(
            tmp_path,
            processor,
            teacher_model=teacher if kind == "external" else None,
            teacher_model_kind="ema" if kind == "ema" else "base",
            bf16=bf16,
            max_steps=1,
        )
        if kind == "ema":
            trainer.teacher.average = {name: p.detach().clone() for name, p in teacher.named_parameters()}
        trainer.train()
        logs.append(train_logs(trainer)[0])
    for name in ("loss", "grad_norm", "logprob_gap/mean"):
        assert logs[0][name] == logs[1][name] != 0


def test_ema_teacher_has_its_own_head_bias(tmp_path, processor):
    model = make_qwen3_vl()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.lm_head.out_features))
    trainer = make_trainer(tmp_path, processor, model=model, teacher_model_kind="ema")
    trainer.model.train()
    trainer._prepare_inputs([trainer.train_dataset[i] for i in range(4)])
    trainer.teacher.average["lm_head.bias"].fill_(-1)
    head = trainer.teacher.score(trainer.model, trainer._buffered_inputs[0]).head
    assert (head.bias == -1).all() and (trainer.model.lm_head.bias == 0).all()


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_model_whose_logits_the_losses_cannot_compute_is_refused(tmp_path, processor, role):
    """Before the first rollout."""

    class ClipsLogits(Qwen3VLForConditionalGeneration):
        def forward(self, **inputs):
            output = super().forward(**inputs)
            return ModelOutput(logits=output.logits.clamp(max=20))

    model = ClipsLogits(make_qwen3_vl().config)
    models = {"model": model} if role == "student" else {"teacher_model": model}
    with pytest.raises(ValueError, match="cannot compute the logits of ClipsLogits"):
        make_trainer(tmp_path, processor, **models)


def test_ema_teacher_between_forward_and_backward(tmp_path, processor):
    """Swapping weights in and out does not disturb the student's gradients."""
    logs = []
    for kind in ("ema", "base"):  # before the first update, both have the initial weights
        trainer = make_trainer(tmp_path, processor, teacher_model_kind=kind, max_steps=1)
        trainer.train()
        logs.append(train_logs(trainer)[0])
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=1e-4)
    assert logs[0]["grad_norm"] == pytest.approx(logs[1]["grad_norm"], rel=1e-4)


def test_stronger_teacher(tmp_path, processor):
    """A wider external teacher of the same vocabulary, as an object or a path."""
    path = tmp_path / "teacher"
    make_qwen3_vl(num_layers=6, hidden_size=64, seed=3).save_pretrained(path)
    logs = []
    for teacher in (make_qwen3_vl(num_layers=6, hidden_size=64, seed=3), str(path)):
        trainer = make_trainer(tmp_path, processor, teacher_model=teacher, peft_config=CueRecoveryConfig(**ADAPTER))
        trainer.train()
        logs.append([log["loss"] for log in train_logs(trainer)])
    assert logs[0] == pytest.approx(logs[1]) and logs[0][0] != 0


# --- Objectives ---


@pytest.mark.parametrize(
    "mode, loss_aggregation",
    [
        ("sampled_token", "token"),
        ("sampled_token", "sequence"),
        ("full_logits", "token"),
        ("full_logits", "sequence"),
        ("topk_logits", "token"),
        ("topk_logits", "sequence"),
        ("liger", "token"),  # "sequence" is refused, see test_bad_input
    ],
)
def test_loss_equals_its_definition(tmp_path, processor, mode, loss_aggregation):
    """The loss of one micro-batch against its definition, from full logits."""
    arguments = dict(distillation_mode="full_logits" if mode == "liger" else mode, distillation_topk=7, beta=0.3)
    trainer = make_trainer(
        tmp_path,
        processor,
        teacher_model=make_qwen3_vl(seed=5),
        temperature=0.8,
        use_liger_kernel=mode == "liger",
        loss_aggregation=loss_aggregation,
        **arguments,
    )
    trainer.model.train()
    trainer._prepare_inputs([trainer.train_dataset[i] for i in range(4)])
    inputs = trainer._buffered_inputs[0]
    # Shorten one completion, so that the aggregations differ
    inputs["completion_mask"][0, 3:] = 0
    loss = trainer.compute_loss(trainer.model, inputs)

    mask = inputs["completion_mask"].bool()
    with torch.no_grad():
        student = trainer._student_hidden_states(trainer.model, inputs)
        teacher = trainer.teacher.score(trainer.model, inputs)
        s = LMHead.from_model(trainer.model).logits(student, 0.8).double().log_softmax(-1)
        t = teacher.head.logits(teacher.states, 0.8).double().log_softmax(-1)
    ids = inputs["completion_ids"].unsqueeze(-1)
    if mode == "sampled_token":
        per_token = -(t - s).gather(-1, ids).squeeze(-1)
    else:
        if mode == "topk_logits":
            top = t.topk(7).indices
            s, t = (
                torch.cat([x.gather(-1, top), torch.log1p(-x.gather(-1, top).exp().sum(-1, True))], -1) for x in (s, t)
            )
        m = torch.log(0.3 * t.exp() + 0.7 * s.exp())
        per_token = (0.3 * t.exp() * (t - m) + 0.7 * s.exp() * (s - m)).sum(-1)
    if loss_aggregation == "token":
        expected = (per_token * mask).sum() / inputs["num_items_in_batch"]
    else:
        expected = ((per_token * mask).sum(1) / mask.sum(1)).sum() / 4  # two micro-batches of two
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("num_iterations", [1, 3])
def test_num_iterations_reuses_rollouts(tmp_path, processor, num_iterations):
    trainer = make_trainer(tmp_path, processor, num_iterations=num_iterations, max_steps=6, epsilon=0.01)
    generated = []
    generate = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: (generated.append(len(inputs)), generate(inputs))[1]
    trainer.train()
    assert generated == [4] * (6 // num_iterations)
    clip_fractions = [log["clip_fraction"] for log in train_logs(trainer)]
    # On policy nothing is clipped; the ratio matters from the second step with the same rollouts
    assert all(clip_fractions[i] == 0 for i in range(0, 6, num_iterations))
    assert any(clip_fractions) == (num_iterations > 1)


def test_old_logprobs_are_those_of_the_rollout(tmp_path, processor):
    trainer = make_trainer(tmp_path, processor, num_iterations=2)
    trainer.model.train()
    inputs = trainer._prepare_inputs([trainer.train_dataset[i] for i in range(4)])
    with torch.no_grad():
        expected = trainer._student_logprobs(trainer.model, inputs)
    torch.testing.assert_close(inputs["old_logprobs"], expected)
    assert (inputs["old_logprobs"][inputs["completion_mask"] == 0] == 0).all()


def test_liger_on_a_cpu_warns_that_kernels_need_a_gpu(tmp_path, processor):
    with pytest.warns(UserWarning, match="Triton kernels need a GPU and are left out"):
        trainer = make_trainer(tmp_path, processor, use_liger_kernel=True, distillation_mode="full_logits", beta=0.0)
    trainer.train()
    plain = make_trainer(tmp_path, processor, distillation_mode="full_logits", beta=0.0)
    plain.train()
    for log, expected in zip(train_logs(trainer), train_logs(plain), strict=True):
        assert log["loss"] == pytest.approx(expected["loss"], rel=1e-3, abs=1e-6)
        assert log["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full_logits", "topk_logits"])
def test_distillation_moves_the_student_to_the_teacher(tmp_path, processor, mode):
    """A few steps remove most of the distance to a teacher with other weights."""
    teacher = make_qwen3_vl(seed=5)
    teacher.model.language_model.norm.weight.data.mul_(5)  # clearer preferences
    trainer = make_trainer(
        tmp_path,
        processor,
        teacher_model=teacher,
        distillation_mode=mode,
        beta=0.0,
        max_steps=60,
        learning_rate=3e-3,
        rows=make_rows(4),
    )
    trainer.train()
    losses = [log["loss"] for log in train_logs(trainer)]
    assert sum(losses[-5:]) < 0.4 * sum(losses[:5])


# --- Data ---


def test_image_column(tmp_path, processor):
    rows = [{**row, "image": row["images"][0] if row["images"] else None} for row in make_rows()]
    for row in rows:
        del row["images"]
    trainer = make_trainer(tmp_path, processor, rows=rows)
    trainer.train()
    assert len(train_logs(trainer)) == 2


def test_rows_with_blocks_and_text_only_batches(tmp_path, processor):
    """Prompts with content blocks, and micro-batches or even generation batches without any image."""
    rows = make_rows()
    for row in rows:
        blocks = [{"type": "image"} for _ in row["images"]]
        row["prompt"] = [
            {"role": "user", "content": [*blocks, {"type": "text", "text": row["prompt"][-1]["content"]}]}
        ]
    rows += [
        {**row, "images": []} | {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}
        for row in rows
    ]
    trainer = make_trainer(tmp_path, processor, rows=rows, max_steps=4, peft_config=CueRecoveryConfig(**ADAPTER))
    trainer.train()
    assert all(math.isfinite(log["loss"]) for log in train_logs(trainer))


def test_text_only_rows_are_not_changed_by_their_neighbours(tmp_path, processor):
    trainer = make_trainer(tmp_path, processor)
    trainer.model.train()
    text_only = [trainer.train_dataset[2], trainer.train_dataset[6]]
    trainer._prepare_inputs([*text_only, trainer.train_dataset[0], trainer.train_dataset[1]])
    assert any("pixel_values" in batch for batch in trainer._buffered_inputs)
    for inputs in trainer._buffered_inputs:
        states = trainer._student_hidden_states(trainer.model, inputs)
        assert states.isfinite().all()


def test_missing_privilege_none_shows_the_plain_prompt(tmp_path, processor):
    rows = make_rows(4)
    rows[1]["cue"] = None
    trainer = make_trainer(tmp_path, processor, rows=rows, missing_privilege="none")
    examples = [trainer._read_row(trainer.train_dataset[number]) for number in range(2)]
    prompts = trainer._teacher_prompts(examples, {})
    texts = processor.batch_decode(prompts["teacher_prompt_ids"])
    assert "[Hint]: noise number 0" in texts[0] and "Hint" not in texts[1]


def test_streamed_dataset(tmp_path, processor):
    rows = make_rows()
    trainer = ViCuRTrainer(
        model=make_qwen3_vl(),
        args=make_config(tmp_path),
        train_dataset=IterableDataset.from_generator(lambda: iter(rows)),
        processing_class=processor,
    )
    trainer.train()
    assert len(train_logs(trainer)) == 2


def stream_of(rows: list[dict], features=None) -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(rows), features=features)


def rows_with_bad_one(number: int, count: int = 8) -> list[dict]:
    rows = make_rows(count)
    rows[number]["cue"] = "<|im_end|>"
    return rows


def train_on_stream(tmp_path, processor, rows, eval_dataset=None, resume=None, **arguments) -> ViCuRTrainer:
    trainer = ViCuRTrainer(
        model=make_qwen3_vl(),
        args=make_config(tmp_path, per_device_eval_batch_size=1, **arguments),
        train_dataset=stream_of(rows),
        eval_dataset=eval_dataset,
        processing_class=processor,
        peft_config=CueRecoveryConfig(**ADAPTER),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("arguments", [{}, {"shuffle_dataset": False}, {"gradient_accumulation_steps": 1}])
def test_bad_row_of_a_stream_is_named_by_its_number_in_the_stream(tmp_path, processor, arguments):
    """Although TRL shuffles the stream, repeats batches and evaluates in between; in later epochs, too."""
    rows, good = rows_with_bad_one(5), stream_of(make_rows(2))
    arguments = dict(eval_strategy="steps", eval_steps=1, max_steps=4, **arguments)
    with pytest.raises(ValueError, match=r"Streamed row 5 of train_dataset: .*control token '<\|im_end\|>'"):
        train_on_stream(tmp_path, processor, rows, good, **arguments)


def test_bad_row_of_a_stream_is_named_after_a_resume(tmp_path, processor):
    arguments = dict(shuffle_dataset=False, gradient_accumulation_steps=1, save_strategy="steps", save_steps=1)
    train_on_stream(tmp_path, processor, make_rows(8), max_steps=4, **arguments)
    checkpoint = str(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="Streamed row 5 of train_dataset: "):
        train_on_stream(tmp_path, processor, rows_with_bad_one(5), resume=checkpoint, max_steps=4, **arguments)


def test_rows_of_every_evaluation_are_checked(tmp_path, processor):
    """Single datasets and dicts, streamed or not, passed to the trainer, to `evaluate` and to `predict`."""
    bad, good = rows_with_bad_one(1, count=2), Dataset.from_list(make_rows(2))
    stream, dataset = stream_of(bad), Dataset.from_list(bad)
    arguments = dict(args=make_config(tmp_path, dataloader_num_workers=1), processing_class=processor)
    arguments |= dict(model=make_qwen3_vl(), train_dataset=Dataset.from_list(make_rows()))
    with pytest.raises(ValueError, match=r"Streamed row 1 of eval_dataset: "):
        ViCuRTrainer(eval_dataset=stream, **arguments).evaluate()
    trainer = ViCuRTrainer(eval_dataset={"easy": good, "hard": stream}, **arguments)
    for evaluate, name in (
        (trainer.evaluate, r"Streamed row 1 of eval_dataset\['hard'\]: "),
        (lambda: trainer.evaluate("hard"), r"Streamed row 1 of eval_dataset\['hard'\]: "),
        (lambda: trainer.evaluate(stream), "Streamed row 1 of eval_dataset: "),
        (lambda: trainer.evaluate({"a": stream}), r"Streamed row 1 of eval_dataset\['a'\]: "),
        (lambda: trainer.evaluate(dataset), "Row 1 of eval_dataset: "),
        (lambda: trainer.evaluate({"a": good, "b": dataset}), r"Row 1 of eval_dataset\['b'\]: "),
        (lambda: trainer.predict(dataset), "Row 1 of test_dataset: "),
        (lambda: trainer.predict(stream), "Streamed row 1 of test_dataset: "),
    ):
        with pytest.raises(ValueError, match=f"^{name}"):
            evaluate()
    assert {"eval_a_loss", "eval_b_loss"} <= trainer.evaluate({"a": good, "b": stream_of(make_rows(2))}).keys()


@pytest.mark.parametrize("is_list", [True, False])
def test_unreadable_image_of_a_stream_is_named(tmp_path, processor, is_list):
    """`datasets` would decode it first and raise an error without a row number."""
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    make_image(0).save(tmp_path / "whole.png")
    rows = []
    for number, row in enumerate(make_rows(3, mixed=False)):
        image = str(tmp_path / ("cut.png" if number == 2 else "whole.png"))
        images = {"images": [image]} if is_list else {"image": image}
        rows.append({"prompt": row["prompt"][-1:], "cue": row["cue"], **images})
    image_features = {"images": List(Image())} if is_list else {"image": Image()}
    stream = stream_of(rows, Features({**Dataset.from_list(rows).features, **image_features}))
    trainer = make_trainer(tmp_path, processor, per_device_eval_batch_size=1)
    assert "eval_loss" in trainer.evaluate(stream.take(2))
    with pytest.raises(ValueError, match=r"Streamed row 2 of eval_dataset: An image \('.*cut.png'\) cannot be read"):
        trainer.evaluate(stream)


def test_remove_unused_columns_keeps_what_is_used(tmp_path, processor):
    rows = [{**row, "unused": 1} for row in make_rows()]
    trainer = make_trainer(tmp_path, processor, rows=rows, remove_unused_columns=True)
    trainer.train()
    assert len(train_logs(trainer)) == 2


@pytest.mark.parametrize("has_module", [False, True])
def test_tool_images_are_refused_with_a_module(tmp_path, processor, monkeypatch, has_module):
    """The turn that calls the tool was sampled before the module could read the tool's image."""
    peft_config = CueRecoveryConfig(**ADAPTER) if has_module else None
    trainer = make_trainer(tmp_path, processor, peft_config=peft_config)
    prompts = [user("What is this?", make_image(i)) for i in range(2)]
    output = ([[1]] * 2, [[2]] * 2, [[1]] * 2, [[make_image(0)]] * 2, [[], [make_image(1)]])
    monkeypatch.setattr(DistillationTrainer, "_generate", lambda self, prompts: output)
    if has_module:
        with pytest.raises(ValueError, match=r"A tool returned an image \(in 1 of 2 prompts\), but a recovery module"):
            trainer._generate(prompts)
    else:
        assert trainer._generate(prompts)[-1] == output[-1]


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma4"])
def test_pad_token_at_the_start_of_a_prompt_is_kept(tmp_path, family):
    """A template's bos token may also be the pad token: student and teacher read the processor's ids."""
    model, processor = FAMILIES[family]()
    processor.tokenizer.bos_token = processor.tokenizer.pad_token
    processor.chat_template = "{{ bos_token }}" + processor.chat_template
    rows = make_rows(5)[::4]  # of two lengths
    trainer = make_trainer(tmp_path, processor, model)
    batch = trainer._generate_and_score_completions(rows)
    for index, row in enumerate(rows):
        alone = {
            "prompt": user(row["prompt"][0]["content"], *row["images"]),
            "teacher_prompt": user(f"{row['prompt'][0]['content']}\n\n[Hint]: {row['cue']}", *row["images"]),
        }
        for name, conversation in alone.items():
            expected = encode(processor, [conversation])["input_ids"][0].tolist()
            assert expected[0] == processor.tokenizer.pad_token_id
            assert batch[f"{name}_ids"][index][batch[f"{name}_mask"][index].bool()].tolist() == expected
    trainer.train()
    assert all(math.isfinite(log["loss"]) for log in train_logs(trainer))


# --- Features of TRL ---


def test_qwen2_5_vl(tmp_path):
    trainer = make_trainer(
        tmp_path, make_qwen2_5_processor(), model=make_qwen2_5_vl(), peft_config=CueRecoveryConfig(**ADAPTER, r=2)
    )
    before = weights(trainer.model)
    trainer.train()
    assert any("sink_attention" in name for name in changed(before, weights(trainer.model)))


def test_model_from_a_path_with_all_defaults(tmp_path, processor):
    make_qwen3_vl().save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    trainer = ViCuRTrainer(
        model=str(tmp_path / "base"),
        args=make_config(tmp_path / "out"),
        train_dataset=Dataset.from_list(make_rows()),
        peft_config=CueRecoveryConfig(**ADAPTER, sink_token="<|im_end|>"),
    )
    assert trainer.model.peft_config["default"].sink_token_ids
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(make_qwen3_vl(), tmp_path / "adapter")
    torch.testing.assert_close(weights(reloaded), weights(trainer.model), rtol=0, atol=0)


@pytest.mark.parametrize("r", [0, 2])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_run(tmp_path, processor, r, use_reentrant):
    runs = []
    for checkpointing in (False, True):
        trainer = make_trainer(
            tmp_path,
            processor,
            peft_config=CueRecoveryConfig(**ADAPTER, r=r),
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
        )
        trainer.train()
        runs.append(train_logs(trainer))
    for plain, checkpointed in zip(*runs, strict=True):
        assert checkpointed["loss"] == pytest.approx(plain["loss"], rel=1e-4, abs=1e-8)
        assert checkpointed["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-3)


def test_logged_metrics(tmp_path, processor):
    trainer = make_trainer(tmp_path, processor, peft_config=CueRecoveryConfig(**ADAPTER), logging_steps=2, max_steps=4)
    trainer.train()
    logs = train_logs(trainer)
    expected = {"advantage/mean", "advantage/abs_mean", "clip_fraction", "hint_leakage", "completions/mean_length"}
    expected |= {"hint_leakage/occurrences"}
    expected |= {"logprob_gap/mean", *(f"logprob_gap/segment_{i}" for i in range(1, 5))}
    expected |= {f"cue_recovery/layers.{i}/update_ratio" for i in (1, 2, 3)}
    assert len(logs) == 2 and all(expected <= log.keys() for log in logs)
    assert logs[0]["advantage/abs_mean"] > abs(logs[0]["advantage/mean"])
    # Completions of eight tokens: the mean of their four segments of two is the mean of all
    segments = [logs[1][f"logprob_gap/segment_{i}"] for i in range(1, 5)]
    assert sum(segments) / 4 == pytest.approx(logs[1]["logprob_gap/mean"], rel=1e-3, abs=1e-6)


def test_full_logits_gap_is_computed_only_in_logged_steps(tmp_path, processor):
    trainer = make_trainer(tmp_path, processor, distillation_mode="full_logits", logging_steps=2, max_steps=4)
    taken = []
    diagnose = trainer._diagnose_gap
    trainer._diagnose_gap = lambda *args: (taken.append(trainer.state.global_step), diagnose(*args))[1]
    trainer.train()
    assert taken == [1, 1, 3, 3]
    assert all("logprob_gap/segment_4" in log for log in train_logs(trainer))


def test_hint_leakage_counts_completions_that_mention_the_hint(tmp_path, processor):
    trainer = make_trainer(tmp_path, processor)
    trainer.model.train()
    texts = ["The Hint says so, so does the Hint", "no", "nohint", "a [Hint]: b"]
    ids = processor.tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
    trainer._log_hint_leakage(ids)
    assert trainer._metrics["train"]["hint_leakage"] == [0.5]
    assert trainer._metrics["train"]["hint_leakage/occurrences"] == [0.75]


def test_template_without_a_hint_word_warns(tmp_path, processor):
    template = "{privilege}\n\n{prompt}"
    with pytest.warns(UserWarning, match="`teacher_prompt_template=.* so `hint_leakage` is not logged"):
        make_trainer(tmp_path, processor, teacher_prompt_template=template)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="`teacher_prompt_template")
        make_trainer(tmp_path, processor, teacher_prompt_template="[Hint]: " + template)
        make_trainer(tmp_path, processor, teacher_prompt_template=template, privilege="none")


def test_evaluation_completions_and_tensorboard(tmp_path, processor):
    trainer = ViCuRTrainer(
        model=make_qwen3_vl(),
        args=make_config(
            tmp_path,
            eval_strategy="steps",
            eval_steps=1,
            log_completions=True,
            report_to="tensorboard",
            num_completions_to_print=1,
        ),
        train_dataset=Dataset.from_list(make_rows()),
        eval_dataset={"a": Dataset.from_list(make_rows(4)), "b": Dataset.from_list(make_rows(2))},
        processing_class=processor,
        peft_config=CueRecoveryConfig(**ADAPTER),
    )
    trainer.train()
    evaluations = [log for log in trainer.state.log_history if "eval_a_loss" in log]
    assert len(evaluations) == 2
    assert {"eval_logprob_gap/mean", "eval_hint_leakage", "eval_advantage/mean"} <= evaluations[0].keys()
    assert list((tmp_path / "completions").glob("*.parquet"))
    assert list(tmp_path.rglob("events.out.tfevents*"))


def test_checkpoint_is_an_adapter_with_a_card(tmp_path, processor):
    trainer = make_trainer(
        tmp_path, processor, peft_config=CueRecoveryConfig(**ADAPTER), save_strategy="steps", save_steps=2
    )
    trainer.train()
    checkpoint = tmp_path / "checkpoint-2"
    names = load_file(checkpoint / "adapter_model.safetensors").keys()
    assert names and all("sink_attention" in name for name in names)
    card = (tmp_path / "README.md").read_text()
    assert "2606.05718" in card and "vicur" in card and "ViCuRTrainer" not in card


def test_other_peft_methods_work(tmp_path, processor):
    trainer = make_trainer(tmp_path, processor, peft_config=LoraConfig(target_modules=["q_proj"]))
    trainer.train()
    assert trainer.teacher_model is None


def test_zero3_is_refused(tmp_path, processor, monkeypatch):
    monkeypatch.setattr("trl_vicur.trainer.checks.sharding.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="ZeRO-3 is not supported: .* Use FSDP2"):
        make_trainer(tmp_path, processor)


@pytest.mark.parametrize(
    "version, arguments, error",
    [
        ("1", {}, "FSDP1 is not supported: ViCuRTrainer needs FSDP2. Set `fsdp_version: 2`"),
        ("2", {"teacher_model_kind": "ema"}, "`teacher_model_kind='ema'` swaps the student's weights"),
    ],
)
def test_shards_that_cannot_train_are_refused_before_models_are_loaded(
    tmp_path, processor, monkeypatch, version, arguments, error
):
    """With the environment that `accelerate launch` sets."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", version)
    monkeypatch.setattr("trl.DistillationTrainer.__init__", lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(ValueError, match=error):
        make_trainer(tmp_path, processor, **arguments)
