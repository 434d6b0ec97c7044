"""TRL's DPO trainer with losses that ask for more than DPO: scores, divergences, statistics."""

from __future__ import annotations

import pytest
import torch
from model_families import own_kl, own_logits, own_sums
from tiny_models import tiny_llama
from torch.nn.functional import logsigmoid
from trainers import build, first_batch, history, in_order, pairs

from fused_prefopt import LogpBatch, PreferenceLoss

pytest.importorskip("trl")

pytestmark = pytest.mark.slow
GAP = {"score_chosen": [3.0, 2.0, None, 4.0], "score_rejected": [1.0, None, None, 2.0]}


def test_a_loss_without_a_reference_keeps_no_reference_model_and_evaluates(tmp_path):
    kwargs = {"beta": 2.0, "gamma": 1.0, "queue_size": 8}
    given = {"eval_dataset": pairs(8)}
    run = build("dpo", tmp_path, loss="gamma-simpo", loss_kwargs=kwargs, given=given, max_steps=3)
    assert run.ref_model is None
    run.train()
    assert len(history(run, "margin/mean")) == 3
    queue = run.attachment.loss_fn.statistics.margins
    assert queue.isfinite().all()
    before = queue.clone()
    assert run.evaluate()["eval_loss"] > 0
    assert "eval_rewards/margins" in run.state.log_history[-1]
    assert torch.equal(run.attachment.loss_fn.statistics.margins, before)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("odpo", lambda margin, score: -logsigmoid(margin - score.clamp(min=1e-6).log())),
        ("reward-distillation", lambda margin, score: (score - margin).square()),
    ],
)
def test_scores_reach_the_loss(tmp_path, loss, expected):
    scores = {"score_chosen": [float(i) for i in range(16)], "score_rejected": [0.5] * 16}
    run = in_order(build("dpo", tmp_path, pairs(**scores), loss=loss))
    batch = first_batch(run)
    assert batch["rewards"].tolist() == [0.0, 1.0, 2.0, 3.0] + [0.5] * 4
    reference = torch.cat(run.compute_ref_log_probs(run.ref_model, batch))
    margins, score = (
        values[:4].double() - values[4:]
        for values in (0.1 * (own_sums(tiny_llama(), batch) - reference), batch["rewards"])
    )
    truth = expected(margins, score).mean().item()
    assert run.train().training_loss == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize("loss", ["dpo", "odpo"])
def test_scores_in_some_rows_only_are_no_scores(tmp_path, loss):
    run = build("dpo", tmp_path, pairs(4, **GAP), loss=loss)
    assert "rewards" not in run.data_collator(list(run.train_dataset))
    if loss == "odpo":
        with pytest.raises(ValueError, match="odpo needs `rewards`"):
            run.train()
    else:
        assert torch.tensor(run.train().training_loss).isfinite()


def test_the_divergence_of_the_tokens_reaches_tdpo(tmp_path):
    run = in_order(build("dpo", tmp_path, loss="tdpo1", reference=tiny_llama(5)))
    batch, (policy, reference) = first_batch(run), (tiny_llama().double(), tiny_llama(5).double())
    kl = own_kl(own_logits(policy, batch), own_logits(reference, batch), batch).detach()
    sums = [own_sums(each, batch).detach() for each in (policy, reference)]
    lengths = batch["completion_mask"][:, 1:].sum(1)
    given = LogpBatch(sums[0], lengths, reference=sums[1], sequence_kl=kl)
    truth = PreferenceLoss("tdpo1").from_logps(given).loss.item()
    assert run.train().training_loss == pytest.approx(truth, rel=1e-5)
    with pytest.raises(ValueError, match="needs reference, sequence_kl, which neither precomp"):
        build("dpo", tmp_path, pairs(4), loss="tdpo1", precompute_ref_log_probs=True)
