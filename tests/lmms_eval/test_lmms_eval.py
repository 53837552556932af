"""The model `trl_vicur` of lmms-eval, run by lmms-eval on a tiny task (`.ci/lmms_eval` installs it)."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from peft import get_peft_model
from tiny_models import make_image, make_processor, make_qwen3_vl

from trl_vicur import CueRecoveryConfig
from trl_vicur.cues.answers import is_correct


pytest.importorskip("lmms_eval")

EXAMPLES = Path(__file__).parents[2] / "examples"
TASK = """
task: tiny
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.doc_to_visual
doc_to_text: "question"
doc_to_target: "answer"
generation_kwargs: {{max_new_tokens: 99, until: ["a"]}}
process_results: !function utils.process_results
metric_list:
  - {{metric: right, aggregation: mean, higher_is_better: true}}
"""
UTILS = """
def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]

def process_results(doc, results):
    return {"right": float(results[0] == doc["answer"])}
"""


def run_lmms_eval(tmp_path, *options):
    """Results and samples of lmms-eval's command."""
    command = [sys.executable, "-m", "lmms_eval", "--model", "trl_vicur", "--tasks", "tiny", "--include_path"]
    command += [str(tmp_path / "task"), "--output_path", str(tmp_path / "out"), "--log_samples", *options]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("*_results.json")
    (samples,) = (tmp_path / "out").rglob("*_samples_tiny.jsonl")
    return json.loads(results.read_text()), [json.loads(line) for line in samples.read_text().splitlines()]


def test_lmms_eval_scores_base_and_adapter(tmp_path):
    processor = make_processor()
    model = make_qwen3_vl(initializer_range=0.3)  # so that each image gets a different answer
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    model = get_peft_model(model, CueRecoveryConfig(layer_interval=1, r=2)).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "adapter")

    # In every second row, the reference answer is that of plain transformers and PEFT
    images = [make_image(number, (64 + 32 * number, 64)) for number in range(4)]
    completions, greedy = [], {"max_new_tokens": 6, "do_sample": False}
    for number, image in enumerate(images):
        conversation = [
            {"role": "system", "content": [{"type": "text", "text": "You are a helpful assistant."}]},
            {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": f"{number}?"}]},
        ]
        inputs = processor.apply_chat_template(
            [conversation], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        with_adapter = model.generate(**inputs, **greedy)
        with model.disable_adapter():
            without = model.generate(**inputs, **greedy)
        assert not torch.equal(with_adapter, without)
        completion_ids = with_adapter[:, inputs["input_ids"].size(1) :]
        completions.append(processor.batch_decode(completion_ids, skip_special_tokens=True)[0])
    assert len(set(completions)) == 4
    rows = {
        "image": images,
        "question": [f"{number}?" for number in range(4)],
        "answer": [text if number % 2 else "none" for number, text in enumerate(completions)],
    }
    features = Features({"image": ImageFeature(), "question": Value("string"), "answer": Value("string")})
    Dataset.from_dict(rows, features).to_parquet(tmp_path / "data.parquet")
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "tiny.yaml").write_text(TASK.format(data=tmp_path / "data.parquet"))
    (tmp_path / "task" / "utils.py").write_text(UTILS)

    arguments = f"pretrained={tmp_path}/model,adapter={tmp_path}/adapter,temperature=0,presence_penalty=0"
    arguments += ",max_new_tokens=6,min_pixels=1024,max_pixels=16384"
    results, samples = run_lmms_eval(tmp_path, "--model_args", arguments, "--batch_size", "3")
    assert [sample["filtered_resps"] for sample in samples] == completions
    assert results["results"]["tiny"]["right,none"] == 0.5


def test_example_runs_benchmarks_and_keeps_their_results(tmp_path):
    rows = {"image": [make_image(number) for number in range(4)], "problem": ["is there a circle?"] * 4}
    rows["answer"] = ["yes", "no", "yes", "no"]
    features = Features({"image": ImageFeature(), "problem": Value("string"), "answer": Value("string")})
    Dataset.from_dict(rows, features).to_parquet(tmp_path / "vision_r1_test.parquet")
    command = [sys.executable, str(EXAMPLES / "benchmarks" / "run.py"), "--only", "Vision-R1-Test", "--model"]
    command += [str(EXAMPLES / "quickstart_base"), "--batch_size", "4"]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "120"}
    first = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr[-3000:]
    (samples,) = (tmp_path / "benchmark_results").rglob("*_samples_vision_r1_test.jsonl")
    samples = [json.loads(line) for line in samples.read_text().splitlines()]
    assert all("answer" in sample["filtered_resps"] for sample in samples)
    score = sum(is_correct(sample["filtered_resps"], sample["target"]) for sample in samples) / 4
    assert re.search(rf"Vision-R1-Test +│ +{100 * score:.2f} │", first.stdout)
    assert "OPSD + ViCuR           │ 46.07 │ 59.39" in first.stdout
    again = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert again.stdout.count("Vision-R1-Test") == 1 and "Completing" not in again.stderr


def test_defaults_are_the_papers_settings(tmp_path):
    from trl_vicur.lmms_eval.model import ViCuRModel

    make_qwen3_vl().save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    model = ViCuRModel(str(tmp_path))
    assert model.generation_kwargs == dict(max_new_tokens=4096, do_sample=True, temperature=0.7, top_p=0.8, top_k=20)
    assert model.presence_penalty == 1.5 and model.system_prompt == "You are a helpful assistant."
    assert model.processor_kwargs["images_kwargs"] == {"min_pixels": 3584, "max_pixels": 401408}
    assert model.processor_kwargs["videos_kwargs"] == {"min_frames": 4, "max_frames": 512}
    with pytest.raises(ValueError, match="must be a number for the model trl_vicur, got 'auto'"):
        ViCuRModel(str(tmp_path), batch_size="auto")


def test_presence_penalty_counts_each_token_of_the_completion_once():
    from trl_vicur.lmms_eval.model import PresencePenalty

    input_ids = torch.tensor([[0, 1, 3, 3], [0, 1, 2, 0]])  # two of the prompt, two of the completion
    scores = PresencePenalty(1.5, prompt_length=2)(input_ids, torch.zeros(2, 5))
    assert scores.tolist() == [[0, 0, 0, -1.5, 0], [-1.5, 0, -1.5, 0, 0]]
    assert not PresencePenalty(1.5, 2)(input_ids[:, :2], torch.zeros(2, 5)).any()
