"""The recovery module trains on rewards with TRL's own GRPOTrainer, and reloads."""

import torch
from datasets import Dataset
from peft import PeftModel
from tiny_models import encode, make_qwen3_vl, make_rows, user
from trl import GRPOConfig, GRPOTrainer

from trl_vicur import CueRecoveryConfig


def test_module_trains_by_reward_and_reloads(tmp_path, processor):
    def reward_func(completions, **kwargs):
        # Different for any two completions of a prompt, otherwise the advantages are zero
        return [float(len(completion[0]["content"]) + i % 2) for i, completion in enumerate(completions)]

    dataset = Dataset.from_list(make_rows(4)).select_columns(["prompt", "images"])
    trainer = GRPOTrainer(
        model=make_qwen3_vl(),
        reward_funcs=reward_func,
        args=GRPOConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=6,
            learning_rate=1e-2,
            use_cpu=True,
            bf16=False,
            report_to="none",
        ),
        train_dataset=dataset,
        processing_class=processor,
        peft_config=CueRecoveryConfig(layer_interval=2),
    )
    names = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert names and all("sink_attention" in name for name in names)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == set(names)  # in two steps, since W_O starts at zero

    trainer.save_model(str(tmp_path / "adapter"))
    reloaded = PeftModel.from_pretrained(make_qwen3_vl(), tmp_path / "adapter")
    inputs = encode(processor, [user("What is it?", *row["images"]) for row in dataset])
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.model(**inputs).logits
        assert torch.equal(reloaded(**inputs).logits, expected)
        with reloaded.disable_adapter():
            assert not torch.equal(reloaded(**inputs).logits, expected)
