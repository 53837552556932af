"""The trainer works without any extra; everything else names the extra that it needs."""

import re
import subprocess
import sys
from pathlib import Path

import tiny_models


OPTIONAL = ("latex2sympy2_extended", "math_verify", "matplotlib", "openai", "pint", "text_to_num")

# Acts as if the packages were not installed
HIDE = f"""
import sys
from importlib.machinery import PathFinder

class Hide(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {OPTIONAL} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Hide
sys.path.insert(0, {str(Path(tiny_models.__file__).parent)!r})
"""

TRAIN = """
from datasets import Dataset
from tiny_models import make_processor, make_qwen3_vl, make_rows
from trl_vicur import CueRecoveryConfig, ViCuRConfig, ViCuRTrainer
from trl_vicur.cli import main

trainer = ViCuRTrainer(
    model=make_qwen3_vl(),
    args=ViCuRConfig(
        output_dir="student", bf16=False, use_cpu=True, max_steps=1, per_device_train_batch_size=2,
        gradient_accumulation_steps=1, max_completion_length=4, report_to="none",
    ),
    train_dataset=Dataset.from_list(make_rows(2)),
    processing_class=make_processor(),
    peft_config=CueRecoveryConfig(r=4, layer_interval=2),
)
trainer.train()
trainer.save_model()
trainer.create_model_card()
assert main(["doctor"]) == 0
"""

ASK_FOR_EXTRAS = """
from datasets import Dataset
from tiny_models import make_rows, make_tokenizer
from trl_vicur.cli import main
from trl_vicur.comparison import compare_models
from trl_vicur.cues import OpenAIGenerator, audit_cue, audit_cues, measure_usefulness, regenerate_cues
from trl_vicur.trainer.teachers.teacher_server import TeacherServer

dataset = Dataset.from_list(make_rows(2))
dataset.save_to_disk("rows")
url = "http://localhost:9/v1"
calls = [
    lambda: audit_cue("A red cube.", "What is it?", "a cube"),
    lambda: audit_cues(dataset),
    lambda: measure_usefulness(dataset, None),
    lambda: compare_models(dataset, {}),
    lambda: OpenAIGenerator("model", url),
    lambda: TeacherServer(url, make_tokenizer()),
]
for call in calls:
    try:
        call()
    except ImportError as error:
        print(error)
commands = [
    "cues audit rows --output audit",
    f"cues generate --dataset rows --output cues --model model --base_url {url}",
    "heatmap --model model --adapter adapter --image picture.png --question What? --output heatmap.png",
]
for command in commands:
    assert main(command.split()) == 1
"""


def run_without_extras(code: str, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", "-c", HIDE + code]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


def test_trainer_and_doctor_need_no_extra(tmp_path):
    result = run_without_extras(TRAIN, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "trl-vicur" in (tmp_path / "student" / "README.md").read_text()


def test_errors_name_the_package_and_the_extra(tmp_path):
    result = run_without_extras(ASK_FOR_EXTRAS, tmp_path)
    assert result.returncode == 0, result.stderr
    functions = re.findall(r"needs (\w+), which .*'trl-vicur\[(\w+)\]'", result.stdout)
    cues = [("text_to_num", "cues")] * 2 + [("math_verify", "cues")] * 2 + [("openai", "cues")]
    assert functions == [*cues, ("openai", "openai")]
    commands = re.findall(r"^trl-vicur: .* needs (\w+), which .*'trl-vicur\[(\w+)\]'", result.stderr, re.MULTILINE)
    assert commands == [("text_to_num", "cues"), ("openai", "cues"), ("matplotlib", "heatmap")]
