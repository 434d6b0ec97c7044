"""Trainers with ε-DPO, whose log-probs are of the policy's logits beside the reference's."""

from __future__ import annotations

import pytest
import torch
from model_families import own_logits, sums_of
from test_resume import outcome
from tiny_models import pair_features, tiny_llama
from torch.nn.functional import logsigmoid
from trainers import assert_bit_equal, build, first_batch, in_order, lora, pairs

pytestmark = pytest.mark.slow
EPSILON = 0.3
LOSS = {"loss": "epsilon-dpo", "loss_kwargs": {"epsilon": EPSILON}}


def run_of(kind, folder, **options):
    if kind == "dpo":
        pytest.importorskip("trl")
    data = pairs(16) if kind == "dpo" else pair_features(16)
    given = {"model": tiny_llama(), "reference": tiny_llama(5)} | LOSS | options
    return in_order(build(kind, folder, data, **given))


@torch.no_grad()
def eager(policy, reference, batch) -> torch.Tensor:
    """(P,) losses of a batch, by both models' logits in float64, before β has moved."""
    z, r = (own_logits(each.double(), batch).double() for each in (policy, reference))
    shares = {"+": 1 + EPSILON, "=": 1.0, "-": 1 - EPSILON, "ref": 0.0}
    sums = {name: sums_of(own * z + (1 - own) * r, batch) for name, own in shares.items()}
    gaps = {name: values.chunk(2)[0] - values.chunk(2)[1] for name, values in sums.items()}
    steps = ((gaps["+"] - gaps["="]).sign() + (gaps["="] - gaps["-"]).sign()).div(2).trunc()
    assert steps.any()
    return -logsigmoid(0.1 / (1 + EPSILON * steps) * (gaps["="] - gaps["ref"]))


@pytest.mark.parametrize("kind", ["transformers", "adapter", "dpo"])
def test_the_first_loss_equals_eager_logits(tmp_path, kind):
    models, given = (tiny_llama(), tiny_llama(5)), {}
    if kind == "adapter":
        models = lora(), tiny_llama()
        given = {"model": lora(lora_dropout=0.0), "reference": "adapter"}
    run = run_of(kind.replace("adapter", "transformers"), tmp_path, **given)
    truth = eager(*(each.eval() for each in models), first_batch(run)).mean()
    assert run.train().training_loss == pytest.approx(truth.item(), rel=1e-5)
    if kind == "dpo":
        with pytest.raises(ValueError, match="needs extrapolated, interpolated, reference, which"):
            run_of(kind, tmp_path, precompute_ref_log_probs=True, reference=None)


@pytest.mark.parametrize("kind", ["transformers", "dpo"])
def test_a_run_that_ended_resumes_bit_equal(tmp_path, kind):
    settings = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2, "max_steps": 5}
    settings["lr_scheduler_type"] = "constant"
    whole = run_of(kind, tmp_path, **settings)
    whole.train()
    factor = whole.attachment.loss_fn.statistics.scale.factor
    assert factor != 1
    second = run_of(kind, tmp_path, **settings)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_bit_equal(outcome(whole), outcome(second))
