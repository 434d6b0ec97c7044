"""What losses need of rows and of a step: refused rows, and costs against counted matmuls."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from command_line_jobs import pairs
from data_tokenizer import tiny_tokenizer
from torch.profiler import ProfilerActivity, profile

import fused_prefopt as fp
from fused_prefopt.cli.config import Settings
from fused_prefopt.cli.console import UserError
from fused_prefopt.cli.needs import OF_POLICY, OF_REFERENCE, check_fields, cost_of, first_lack
from fused_prefopt.cli.task import judged_records, kind_of, load_loss
from fused_prefopt.data import tokenise_pairs
from fused_prefopt.data.columns import PAIR_FIELDS, POINT_FIELDS
from fused_prefopt.losses import available_losses, find
from fused_prefopt.losses.protocol import WHAT_IT_IS

SEQUENCES, TOKENS, HIDDEN, VOCAB = 4, 6, 8, 64
EXTRAS = {
    "rewards": torch.tensor([3.0, 2.0, 1.0, 0.5]),
    "desirable": torch.tensor([True, False] * 2),
    "prompt_reference": torch.zeros(SEQUENCES),
}


def matmuls(loss_fn: fp.PreferenceLoss, *, head_trains: bool) -> float:
    """P of a step: products with the heads, in those of one bare matmul of the labelled rows."""
    torch.manual_seed(0)
    hidden = torch.randn(SEQUENCES, 2 * TOKENS, HIDDEN, requires_grad=True)
    head = torch.randn(VOCAB, HIDDEN, requires_grad=head_trains)
    needs, given = loss_fn.loss.needs, {}
    of_prompt, of_completion = torch.randint(0, VOCAB, (2, SEQUENCES, 2 * TOKENS))
    # As many labels in the prompts as in the completions.
    of_prompt[:, TOKENS:] = of_completion[:, :TOKENS] = -100
    of_prompt[:, 0] = of_completion[:, TOKENS] = -100
    if needs & OF_REFERENCE:
        given |= {"ref_hidden": torch.randn_like(hidden), "ref_head": torch.randn_like(head)}
    if "prompt" in needs:
        given |= {"prompt_labels": of_prompt}
    given |= {name: value for name, value in EXTRAS.items() if name in needs}
    with profile(activities=[ProfilerActivity.CPU], with_flops=True, record_shapes=True) as seen:
        loss_fn(hidden, head, of_completion, **given).loss.backward()
    flops = sum(each.flops for each in seen.key_averages() if each.key.endswith("mm"))
    return flops / (2 * SEQUENCES * (TOKENS - 1) * HIDDEN * VOCAB)


# ORPO of whole sequences: prompts with a gradient.
WHOLE = [{"name": "orpo", "hyperparameters": {"nll": "whole_token_mean"}}]


@pytest.mark.parametrize(
    "name",
    ["simpo", "dpo", "dro", "tdpo2", "wpo", "kto", "epsilon-dpo", "dpo + wpo + tdpo1", WHOLE],
)
def test_a_step_takes_the_matmuls_that_are_said(name):
    loss = fp.PreferenceLoss(name).loss
    cost = cost_of(loss)
    # The prompts' reference is a column here.
    beside = cost.reference
    paths = ("auto", "auto") if cost.both_models else ("local", "recompute")
    for path, own, prompts in zip(paths, cost.trained, cost.prompts, strict=True):
        found = matmuls(fp.PreferenceLoss(name, path=path), head_trains=True)
        assert found == own + prompts + beside
    frozen = matmuls(fp.PreferenceLoss(name), head_trains=False)
    assert frozen == cost.frozen + cost.frozen_prompts + beside


@pytest.mark.parametrize("name", available_losses())
def test_scored_pairs_lack_only_what_no_column_gives(name):
    loss = find(name).build()
    assert OF_POLICY | OF_REFERENCE | loss.needs <= WHAT_IT_IS.keys()
    rows = judged_records(pairs(2, score_chosen=1.0, score_rejected=0.0), kind_of(loss))
    lack = first_lack(loss, rows)
    if lack is not None:
        assert lack.columns is None and lack.field in loss.needs
        assert lack.field not in PAIR_FIELDS | POINT_FIELDS


def test_a_feature_that_is_missing_is_named_with_its_column():
    loss_fn = load_loss(Settings(model="unused", loss="odpo"))
    features = tokenise_pairs(pairs(1), tiny_tokenizer(), 32, 16)
    with pytest.raises(
        UserError, match="got no score_chosen and score_rejected, needs it for odpo"
    ):
        check_fields(loss_fn, features)
    with pytest.raises(ValueError, match="no usable row"):
        check_fields(loss_fn, [])


def test_lists_are_refused_where_they_would_end_the_first_step():
    rows = [{"prompt": "a", "completions": ["b", "c"], "rewards": [1.0, 0.0]}]
    loss_fn = load_loss(Settings(model="unused", loss="dpo + aot"))
    with pytest.raises(UserError, match="loss: got dpo \\+ aot, which sorts the pairs, with lists"):
        check_fields(loss_fn, rows)
    check_fields(load_loss(Settings(model="unused", loss="lipo")), rows)
    with pytest.raises(UserError, match="got no rewards, needs it for lipo-lambda; 1 of 2 rows"):
        check_fields(load_loss(Settings(model="unused", loss="lipo")), [*rows, {"prompt": "a"}])


def test_a_field_that_no_column_gives_is_the_losss_affair():
    mine = SimpleNamespace(pairwise=True, needs=frozenset({"reference", "kl"}))
    with pytest.raises(UserError, match="loss: mine needs `kl`, a scalar estimate of KL"):
        check_fields(SimpleNamespace(name="mine", loss=mine), [{"chosen_ids": [1]}])
