"""Tokens after one that the teacher rejects get no loss, until the end of the completion or of the sentence."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import make_qwen3_vl
from tiny_trainers import ADAPTER, make_config, make_trainer, train_logs

from trl_vicur import CueRecoveryConfig
from trl_vicur.trainer.lm_head import LMHead
from trl_vicur.trainer.losses import before_rejection
from trl_vicur.trainer.sentences import sentence_end_tokens


def test_tokens_up_to_the_first_rejected_one_are_kept():
    gap = torch.tensor([[0.0, -4.0, 1.0, -5.0], [-2.9, 0.0, 2.0, 0.0], [0.0, 0.0, -3.1, 9.0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    kept = before_rejection(gap[mask], mask, 3.0)
    assert kept.tolist() == torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]).bool().tolist()


def test_tokens_are_kept_again_from_the_next_sentence():
    gap = torch.tensor([[-4.0, 0.0, 0.0, 0.0, -4.0, 0.0, 0.0]])
    mask = torch.ones(1, 7, dtype=torch.bool)
    ends = torch.tensor([[0, 0, 1, 0, 0, 0, 1]]).bool()
    assert before_rejection(gap[mask], mask, 3.0, ends).tolist() == [[True, False, False, True, True, False, False]]


@given(st.data())
def test_agrees_with_a_loop(data):
    """For random gaps, masks with holes (tool calls) and sentence ends."""
    size = data.draw(st.integers(1, 12))
    flags = st.lists(st.booleans(), min_size=size, max_size=size)
    masked, rejected, ends = (data.draw(flags) for _ in range(3))
    has_ends = data.draw(st.booleans())
    expected, is_rejected = [], False
    for is_masked, is_bad, is_end in zip(masked, rejected, ends, strict=True):
        expected.append(is_masked and not is_rejected)
        is_rejected |= is_masked and is_bad
        if has_ends and is_end:
            is_rejected = False
    mask = torch.tensor([masked])
    gap = torch.tensor([[-5.0 if bad else 0.0 for bad in rejected]])
    kept = before_rejection(gap[mask], mask, 3.0, torch.tensor([ends]) if has_ends else None)
    assert kept.tolist() == [expected]


def test_sentence_ends_are_read_from_the_tokenizer(processor):
    tokenizer = processor.tokenizer
    ends = sentence_end_tokens(tokenizer, len(tokenizer) + 3)
    assert ends.shape == (len(tokenizer) + 3,)
    marks = {tokenizer.decode([token_id]) for token_id in ends.nonzero().flatten().tolist()}
    assert {".", "!", "?", ";", "\n"} <= marks
    assert not {",", "a", " ", "5"} & marks


OBJECTIVES = {
    "sampled_token": {"distillation_mode": "sampled_token"},
    "full_logits": {"distillation_mode": "full_logits"},
    "liger": {"distillation_mode": "full_logits", "use_liger_kernel": True},
    "topk_logits": {"distillation_mode": "topk_logits"},
}


def losses(tmp_path, processor, **options):
    trainer = make_trainer(
        tmp_path, processor, teacher_model=make_qwen3_vl(seed=5), peft_config=CueRecoveryConfig(**ADAPTER), **options
    )
    trainer.train()
    return train_logs(trainer)


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["completion", "sentence"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_is_unchanged_if_nothing_is_rejected(tmp_path, processor, objective, scope):
    options = OBJECTIVES[objective]
    plain = losses(tmp_path, processor, **options)
    cut = losses(tmp_path, processor, prefix_rejection=scope, prefix_rejection_threshold=1e9, **options)
    for before, after in zip(plain, cut, strict=True):
        assert after["loss"] == before["loss"] != 0
        assert after["grad_norm"] == before["grad_norm"]
        assert after["prefix_rejection/kept"] == 1.0
        assert after["prefix_rejection/completions"] == 0.0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_covers_kept_tokens_only(tmp_path, processor, objective):
    """Dropped tokens are masked like the output of tools; the mean is still over all tokens."""
    results = []
    for scope in ("completion", "none"):
        trainer = make_trainer(
            tmp_path,
            processor,
            teacher_model=make_qwen3_vl(seed=5),
            prefix_rejection=scope,
            prefix_rejection_threshold=0.2,
            **OBJECTIVES[objective],
        )
        trainer.model.train()
        inputs = trainer._prepare_inputs([trainer.train_dataset[i] for i in range(4)])
        if scope == "completion":
            states = trainer._student_hidden_states(trainer.model, inputs)
            scores = trainer.teacher.score(trainer.model, inputs)
            mask = inputs["completion_mask"].bool()
            head = LMHead.from_model(trainer.model)
            _, kept = trainer._before_rejection(states, head, scores, inputs["completion_ids"], mask)
            assert mask.size(0) < kept.sum() < mask.sum()
        else:
            inputs["tool_mask"] = kept.long()
        loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=inputs["num_items_in_batch"])
        loss.backward()
        results.append((loss.detach(), [p.grad for p in trainer.model.parameters() if p.grad is not None]))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    assert results[0][0] != 0


@pytest.mark.parametrize("loss_aggregation", ["token", "sequence"])
def test_rejections_are_logged(tmp_path, processor, loss_aggregation):
    logs = losses(
        tmp_path,
        processor,
        prefix_rejection="completion",
        prefix_rejection_threshold=0.2,
        loss_aggregation=loss_aggregation,
        max_steps=1,
    )
    assert logs[0]["loss"] != 0
    for name in ("kept", "completions", "position"):
        assert 0 < logs[0][f"prefix_rejection/{name}"] < 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prefix_rejection": "clause"}, r"`prefix_rejection` must be one of \['none', 'completion', 'sentence'\]"),
        ({"prefix_rejection_threshold": 0.0}, "`prefix_rejection_threshold` must be positive, got 0.0"),
        ({"prefix_rejection_threshold": float("nan")}, "`prefix_rejection_threshold` must be positive, got nan"),
    ],
)
def test_bad_options_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **options)
