"""Published models: files and card, on disk and on the Hub, and how others load them."""

import copy
import gc
import io
import json
import os
import pickle
import re
import subprocess
import sys
import weakref
from pathlib import Path

import hub_server
import pytest
import torch
import yaml
from datasets import Dataset
from hub_server import HubServer
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import make_image, make_processor, make_qwen3_vl, make_rows
from tiny_trainers import ADAPTER, make_config, make_trainer, weights
from transformers import AutoModelForImageTextToText

from trl_vicur import CueRecoveryConfig, ViCuRTrainer
from trl_vicur.cli import main
from trl_vicur.hub.names import hub_dataset_name


PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}


def load_card(directory: Path) -> ModelCard:
    return ModelCard.load(directory / "README.md")


def code_of(card: ModelCard) -> str:
    """The card's example."""
    return re.search(r"```python\n(.*?)```", card.text, flags=re.DOTALL)[1]


def text_of_commands(card: ModelCard) -> str:
    return "".join(re.findall(r"```bash\n(.*?)```", card.text, flags=re.DOTALL))


def with_base(model, name: str):
    """A model that came from the Hub."""
    model.config._name_or_path = model.name_or_path = name
    return model


# --- The card ---


def test_card_of_an_adapter(tmp_path, processor):
    trainer = make_trainer(
        tmp_path / "Tiny-ViCuR",
        processor,
        model=with_base(make_qwen3_vl(), "Qwen/Qwen3-VL-2B-Instruct"),
        peft_config=CueRecoveryConfig(**ADAPTER, r=4, sink_token="<|im_end|>"),
    )
    trainer.hub_model_id = "me/Tiny-ViCuR"
    trainer.create_model_card(model_name="Tiny-ViCuR", dataset_name="me/geometry-with-cues", tags="geometry")
    card = load_card(tmp_path / "Tiny-ViCuR")
    data = card.data.to_dict()
    assert data["base_model"] == "Qwen/Qwen3-VL-2B-Instruct"
    assert data["datasets"] == "me/geometry-with-cues"
    assert data["library_name"] == "peft"
    assert data["pipeline_tag"] == "image-text-to-text"
    assert data["tags"] == ["generated_from_trainer", "geometry", "peft", "trl", "vicur"]
    text = card.text
    assert "adapter for [Qwen/Qwen3-VL-2B-Instruct](https://huggingface.co/Qwen/Qwen3-VL-2B-Instruct)" in text
    assert "[me/geometry-with-cues](https://huggingface.co/datasets/me/geometry-with-cues)" in text
    assert "pip install trl-vicur" in text
    assert "KeyError: 'CUE_RECOVERY'" in text
    assert "import trl_vicur" in code_of(card)
    assert 'PeftModel.from_pretrained(base_model, "me/Tiny-ViCuR")' in code_of(card)
    assert (
        "vllm serve Qwen/Qwen3-VL-2B-Instruct --max-model-len 2048 \\\n"
        """    --hf-overrides '{"cue_recovery": "me/Tiny-ViCuR"}'\n"""
    ) in text_of_commands(card)
    for row in (
        "| privilege of the teacher | cue |",
        "| teacher | the initial student |",
        "| `distillation_mode` | sampled_token |",
        "| `layer_interval` | 1 |",
        r"| `sink_token` | <\|im_end\|> |",
        "| `r` | 4 |",
        "| learning rate | 0.01 |",
        "| prompts per step | 4 |",
        "| training | 2 steps |",
    ):
        assert row in text
    assert text.count("tian2026vicur") == text.count("vonwerra2020trl") == 1
    assert "https://huggingface.co/papers/2606.05718" in text
    assert "text-generation" not in text and "time machine" not in text  # TRL's example
    headings = re.findall(r"^#+ .*", text, flags=re.MULTILINE)
    assert headings == [
        "# Model Card for Tiny-ViCuR",
        "## Quick start",
        "## Training procedure",
        "### Settings",
        "### Framework versions",
        "## Citations",
    ]


@pytest.mark.parametrize(
    "peft_config, teacher, arguments, expected",
    [
        (CueRecoveryConfig(**ADAPTER), "Qwen/Qwen3-VL-8B-Instruct", {}, "| teacher | Qwen/Qwen3-VL-8B-Instruct |"),
        (CueRecoveryConfig(**ADAPTER), "/home/me/teacher", {}, "| teacher | another model |"),
        (None, None, {"distillation_mode": "full_logits"}, "| `beta` | "),
        (None, None, {}, "| trained | all weights |"),
        (LoraConfig(target_modules=["q_proj"]), None, {"teacher_model_kind": "ema"}, "| trained | LORA |"),
    ],
)
def test_card_describes_the_trained_parameters(tmp_path, processor, peft_config, teacher, arguments, expected):
    teacher = None if teacher is None else with_base(make_qwen3_vl(seed=5), teacher)
    trainer = make_trainer(tmp_path, processor, teacher_model=teacher, peft_config=peft_config, **arguments)
    trainer.create_model_card(model_name="x")
    card = load_card(tmp_path)
    assert expected in card.text
    assert card.data.library_name == ("transformers" if peft_config is None else "peft")
    assert ("import trl_vicur" in card.text) == isinstance(peft_config, CueRecoveryConfig)
    assert ("PeftModel" in card.text) == (peft_config is not None)
    assert ("vllm serve x --max-model-len 2048\n" in text_of_commands(card)) == (peft_config is None)
    compile(code_of(card), "card", "exec")


@pytest.mark.parametrize(
    "arguments, expected",
    [({"max_steps": 1}, "1 step"), ({"max_steps": 2}, "2 steps"), ({"max_steps": -1}, "3 epochs")],
)
def test_card_states_the_training_length(tmp_path, processor, arguments, expected):
    trainer = make_trainer(tmp_path, processor, peft_config=CueRecoveryConfig(**ADAPTER), **arguments)
    trainer.create_model_card(model_name="x")
    assert f"| training | {expected} |" in load_card(tmp_path).text


def test_card_reports_metrics(tmp_path, processor):
    trainer = ViCuRTrainer(
        model=make_qwen3_vl(),
        args=make_config(tmp_path, eval_strategy="steps", eval_steps=1),
        train_dataset=Dataset.from_list(make_rows(8)),
        eval_dataset={"hard": Dataset.from_list(make_rows(2))},
        processing_class=processor,
        peft_config=CueRecoveryConfig(**ADAPTER),
    )
    trainer.create_model_card(model_name="x")
    assert "Measured" not in load_card(tmp_path).text
    trainer.train()
    trainer.create_model_card(model_name="x")
    text = load_card(tmp_path).text
    for name in ("loss", "logprob_gap/mean", "eval_hard_loss"):
        first, last = (log[name] for log in trainer.state.log_history if name in log)
        assert f"| `{name}` | {first:.4g} (step 1) | {last:.4g} (step 2) |" in text
    assert "runtime" not in text


def test_dataset_name_is_read_from_its_download_urls():
    dataset = Dataset.from_list(make_rows(2))
    assert hub_dataset_name(dataset) is None
    assert hub_dataset_name(None) is None
    dataset.info.download_checksums = {"hf://datasets/me/cues@0123abc/data/train.parquet": {"num_bytes": 1}}
    assert hub_dataset_name(dataset) == "me/cues"
    assert hub_dataset_name(dataset, "you/cues") == "you/cues"
    dataset.info.download_checksums = {"/home/me/cues.parquet": {"num_bytes": 1}}
    assert hub_dataset_name(dataset) is None
    assert hub_dataset_name(dataset, __file__) is None


# --- Saved files ---


@pytest.mark.parametrize(
    "peft_config", [CueRecoveryConfig(**ADAPTER), CueRecoveryConfig(**ADAPTER, train_base=True), None]
)
def test_saved_folders_contain_no_local_paths(tmp_path, processor, peft_config):
    """The base model, its processor, the dataset and the output are local; checkpoint and `save_model`."""
    base = tmp_path / "base"
    make_qwen3_vl().save_pretrained(base)
    processor.save_pretrained(base)
    Dataset.from_list(make_rows(8)).save_to_disk(tmp_path / "data")
    trainer = ViCuRTrainer(
        model=str(base),
        args=make_config(tmp_path / "out", save_strategy="steps", save_steps=1, max_steps=1),
        train_dataset=Dataset.load_from_disk(tmp_path / "data"),
        peft_config=peft_config,
    )
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    file = "model" if peft_config is None else "adapter_model"
    for directory in (tmp_path / "saved", tmp_path / "out" / "checkpoint-1"):
        names = {path.name for path in directory.iterdir()}
        configs = {"config.json"} if peft_config is None else {"adapter_config.json"}
        assert names >= {f"{file}.safetensors", "README.md", "tokenizer.json", "chat_template.jinja", *configs}
        assert load_card(directory).text == load_card(tmp_path / "out").text
        assert "More Information Needed" not in load_card(directory).text  # PEFT's form
        for path in directory.rglob("*"):
            if path.is_file() and path.suffix not in {".safetensors", *PICKLES}:
                text = path.read_text(encoding="utf-8")
                for secret in (str(tmp_path), str(Path.home()), os.getcwd()):
                    assert secret not in text, path.name
    assert {path.name for path in (tmp_path / "saved").iterdir() if path.suffix in PICKLES} <= {"training_args.bin"}
    for directory in (tmp_path / "saved", tmp_path / "out", tmp_path / "out" / "checkpoint-1"):
        if (directory / "training_args.bin").exists():
            # So the Hub leaves it out of a folder that is uploaded by hand
            assert "training_args.bin" in (directory / ".gitignore").read_text().splitlines()
    if peft_config is None:
        reloaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    else:
        reloaded = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), tmp_path / "saved")
    torch.testing.assert_close(weights(reloaded), weights(trainer.model), rtol=0, atol=0)


# --- Loading ---


def test_peft_names_the_method_without_our_import(tmp_path):
    """As the card says. PEFT looks the method up in a table before it reads anything else of ours."""
    get_peft_model(make_qwen3_vl(), CueRecoveryConfig(**ADAPTER)).save_pretrained(tmp_path)
    code = f"import peft; peft.PeftConfig.from_pretrained({str(tmp_path)!r})"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 1 and process.stderr.rstrip().endswith("KeyError: 'CUE_RECOVERY'")


def test_loading_without_peft_is_refused(tmp_path):
    """transformers would silently leave the module at its random initial weights."""
    make_qwen3_vl().save_pretrained(tmp_path / "base")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    get_peft_model(model, CueRecoveryConfig(**ADAPTER)).save_pretrained(tmp_path / "adapter")
    for load in (make_qwen3_vl().load_adapter, AutoModelForImageTextToText.from_pretrained):
        with pytest.raises(ValueError, match=r"loaded with `PeftModel.from_pretrained\(base_model, ...\)`"):
            load(str(tmp_path / "adapter"))


def test_repository_runs_no_code_and_unpickles_nothing(tmp_path, processor):
    """Neither the Python files that its configs name nor pickled weights are executed."""
    base, adapter, proof = tmp_path / "base", tmp_path / "adapter", tmp_path / "proof"
    make_qwen3_vl().save_pretrained(base)
    processor.save_pretrained(base)
    get_peft_model(make_qwen3_vl(), CueRecoveryConfig(**ADAPTER)).save_pretrained(adapter)
    for folder in (base, adapter):
        for name in ("modeling_evil", "__init__", "configuration_evil", "processing_evil", "torch", "trl_vicur"):
            (folder / f"{name}.py").write_text(f"import pathlib; pathlib.Path({str(proof)!r}).touch()\n")
        for path in folder.glob("*config.json"):
            auto_map = {
                "AutoConfig": "configuration_evil.Config",
                "AutoModelForImageTextToText": "modeling_evil.Model",
                "AutoProcessor": "processing_evil.Processor",
            }
            path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": auto_map}))

    trainer = ViCuRTrainer(
        model=str(base),
        args=make_config(tmp_path / "out"),
        train_dataset=Dataset.from_list(make_rows(8)),
        peft_config=CueRecoveryConfig(**ADAPTER),
    )
    trainer.save_model(tmp_path / "saved")
    PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), adapter)
    assert main(["doctor", "--model", str(base), "--layer_interval", "2"]) == 0
    assert not proof.exists() and not list((tmp_path / "saved").glob("*.py"))

    class Evil:
        def __reduce__(self):
            return Path.touch, (proof,)

    torch.save({"weights": Evil()}, adapter / "adapter_model.bin")
    PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), adapter)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), adapter)
    assert not proof.exists()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_trained_model_can_be_copied(tmp_path, processor, copied):
    """The upload method holds no reference to the trainer, which would be copied or kept in memory."""
    trainer = make_trainer(tmp_path, processor, peft_config=CueRecoveryConfig(**ADAPTER))
    model, reference = trainer.model, weakref.ref(trainer)
    torch.testing.assert_close(weights(copied(model)), weights(model), rtol=0, atol=0)
    del trainer
    gc.collect()
    assert reference() is None


# --- The Hub ---

TRAIN = """
import os
import sys
sys.path.insert(0, {support!r})
from datasets import Dataset
from tiny_trainers import make_config
from tiny_models import make_rows
from trl_vicur import CueRecoveryConfig, ViCuRTrainer

trainer = ViCuRTrainer(
    model="me/base",
    args=make_config(
        os.path.abspath("out"),
        hub_model_id="me/adapter",
        push_to_hub=True,
        hub_strategy="checkpoint",
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        report_to="tensorboard",
    ),
    train_dataset=Dataset.from_list(make_rows(8)),
    eval_dataset=Dataset.from_list(make_rows(2)),
    peft_config=CueRecoveryConfig(layer_interval=1),
)
trainer.train()
trainer.push_to_hub(dataset_name="me/cues")
"""


ADAPTER_FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
PROCESSOR_FILES = {"tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"}


@pytest.fixture
def hub(tmp_path):
    """A Hub with a base model and an image."""
    make_qwen3_vl().save_pretrained(tmp_path / "base")
    make_processor().save_pretrained(tmp_path / "base")
    image = io.BytesIO()
    make_image(0).save(image, format="PNG")
    repos = {
        "me/base": {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()},
        "me/images": {"image.png": image.getvalue()},
    }
    with HubServer(repos) as server:
        yield server


def run_in_new_process(hub: HubServer, code: str, home: Path) -> None:
    """Run Python in an empty folder, like a user who can access nothing but that Hub."""
    home.mkdir()
    environment = {
        **os.environ,
        "HF_HOME": str(home / "cache"),
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_secret",
    }
    process = subprocess.run([sys.executable, "-c", code], cwd=home, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def example_of(card: ModelCard, hub: HubServer) -> str:
    """The card's example, with an image from that Hub and a short completion."""
    code = code_of(card).replace("max_new_tokens=512", "max_new_tokens=4")
    return re.sub(r'image = ".*"', f'image = "{hub.url}/me/images/resolve/main/image.png"', code)


# Fails if anything is unpickled or a repository's code runs
GUARD = "import pickle, torch\ndef refuse(*_, **__): raise AssertionError\npickle.load = torch.load = refuse\n"


@pytest.mark.slow
def test_pushed_adapter_works_for_others(tmp_path, hub):
    """Training on a base model of the Hub pushes an adapter; its card's example loads and runs it elsewhere."""
    run_in_new_process(hub, TRAIN.format(support=str(Path(hub_server.__file__).parent)), tmp_path / "author")
    files = hub.repos["me/adapter"]
    assert files.keys() >= ADAPTER_FILES | PROCESSOR_FILES
    at_the_top = [name for name in files if "/" not in name]
    assert not {name for name in at_the_top if Path(name).suffix in PICKLES}
    # `hub_strategy="checkpoint"` pushes it, without training arguments and event files
    assert "last-checkpoint/optimizer.pt" in files
    assert json.loads(files["last-checkpoint/trainer_state.json"])["best_global_step"]
    assert not [name for name in files if "training_args" in name or "tfevents" in name]
    for name, content in files.items():
        assert str(tmp_path).encode() not in content and b"hf_secret" not in content, name

    card = files["README.md"].decode()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["base_model"] == "me/base" and metadata["datasets"] == "me/cues"
    assert {"vicur", "trl", "peft"} <= set(metadata["tags"])
    in_one_line = """
from peft import AutoPeftModel
assert type(model) is PeftModel
model = AutoPeftModel.from_pretrained("me/adapter")
assert model.generate(**inputs, max_new_tokens=4).equal(output)
"""
    run_in_new_process(hub, GUARD + example_of(ModelCard(card), hub) + in_one_line, tmp_path / "stranger")


PUSH_MODELS = """
import os
import sys
sys.path.insert(0, {support!r})
from datasets import Dataset
from tiny_trainers import make_config
from tiny_models import make_rows
from trl_vicur import CueRecoveryConfig, ViCuRTrainer

def make_trainer(model, peft_config):
    return ViCuRTrainer(
        model=model,
        args=make_config(os.path.abspath("out")),
        train_dataset=Dataset.from_list(make_rows(8)),
        peft_config=peft_config,
    )

trainer = make_trainer("me/base", CueRecoveryConfig(layer_interval=1, r=2))
trainer.train()
trainer.model.push_to_hub("me/adapter", tags=["geometry"])
merged = trainer.model.merge_and_unload()
merged.push_to_hub("me/merged")
trainer.processing_class.push_to_hub("me/merged")
full = make_trainer({local!r}, None)
full.model.push_to_hub("me/full")
local = make_trainer({local!r}, CueRecoveryConfig(layer_interval=1))
local.model.push_to_hub("me/local")
"""


@pytest.mark.slow
def test_models_push_the_same_as_their_trainer(tmp_path, hub):
    """`model.push_to_hub` of an adapter, a full model and a merged one."""
    code = PUSH_MODELS.format(support=str(Path(hub_server.__file__).parent), local=str(tmp_path / "base"))
    run_in_new_process(hub, code, tmp_path / "author")
    repos = {name.removeprefix("me/"): files for name, files in hub.repos.items()}
    model_files = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert repos["adapter"].keys() == repos["local"].keys() == ADAPTER_FILES | PROCESSOR_FILES
    assert repos["full"].keys() == model_files | PROCESSOR_FILES
    module_files = {"cue_recovery/adapter_config.json", "cue_recovery/adapter_model.safetensors"}
    assert repos["merged"].keys() == model_files | PROCESSOR_FILES | module_files
    for repo in ("adapter", "local", "full", "merged"):
        for name, content in repos[repo].items():
            assert str(tmp_path).encode() not in content, (repo, name)

    cards = {name: ModelCard(files["README.md"].decode()) for name, files in repos.items() if "README.md" in files}
    assert not [name for name, card in cards.items() if "More Information Needed" in card.text]
    assert cards["adapter"].data.tags == ["generated_from_trainer", "geometry", "peft", "trl", "vicur"]
    assert cards["adapter"].data.base_model == cards["merged"].data.base_model == "me/base"
    assert cards["local"].data.base_model is None and "vicur" in cards["merged"].data.tags
    for name in ("adapter", "full"):
        assert cards[name].text.startswith(f"\n# Model Card for {name}\n") and "| learning rate |" in cards[name].text
        assert f'"me/{name}"' in code_of(cards[name])
    adapter = GUARD + example_of(cards["adapter"], hub).replace("model.generate(", "model.generate(do_sample=False, ")
    merged = (
        code_of(cards["merged"])
        + """
assert (model(**inputs.to(model.device)).logits - expected).abs().max() < 1e-4
"""
    )
    run_in_new_process(hub, adapter + "expected = model(**inputs).logits\n" + merged, tmp_path / "stranger")
