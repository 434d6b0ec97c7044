"""Scores of preference pairs against eager arithmetic."""

from __future__ import annotations

import pytest
import torch
from tiny_models import pair_features, tiny_llama

from fused_prefopt.data import PairCollator
from fused_prefopt.data.columns import PAIR_IDS
from fused_prefopt.data.truncation import cut_side
from fused_prefopt.evaluation import score_pairs
from fused_prefopt.losses import LogRatio
from fused_prefopt.reference import add_reference_logps


def test_scores_equal_eager_arithmetic():
    model, anchor, collator = tiny_llama(0), tiny_llama(1), PairCollator(0)
    features = add_reference_logps(anchor, pair_features(9), collator, progress=False)
    scores = score_pairs(model, anchor, features, collator, batch_size=4)
    margins, kls = [], {"chosen_ids": [], "rejected_ids": []}
    for feature in features:
        means = []
        for side in ("chosen_ids", "rejected_ids"):
            ids = torch.tensor([feature["prompt_ids"] + feature[side]])
            rows = slice(len(feature["prompt_ids"]) - 1, -1)
            with torch.no_grad():
                policy, other = (
                    each(input_ids=ids).logits[0, rows].double().log_softmax(-1)
                    for each in (model, anchor)
                )
            targets = torch.tensor(feature[side])
            means.append(policy.gather(1, targets[:, None]).mean())
            kls[side].append((policy.exp() * (policy - other)).sum(1))
        margins.append(means[0] - means[1])
    torch.testing.assert_close(scores.margins.double(), torch.stack(margins), rtol=1e-4, atol=1e-5)
    wanted = [torch.cat(each).mean().item() for each in kls.values()]
    assert [scores.kl, scores.kl_rejected] == pytest.approx(wanted, rel=1e-4)
    accuracy = sum(margin > 0 for margin in margins) / 9
    assert scores.summary()["accuracy"] == pytest.approx(float(accuracy))
    assert "reward_accuracy" not in scores.summary()
    gains = (scores.batch.policy - scores.batch.reference).chunk(2)
    share = (gains[0] > gains[1]).double().mean().item()
    assert scores.summary(LogRatio(beta=0.1))["reward_accuracy"] == pytest.approx(share)


@pytest.mark.parametrize("layout", [{}, {"padding_free": True}, {"shared_prompt": True}], ids=str)
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_what_a_cut_leaves_is_judged_in_every_layout(layout, mode):
    rows, cut = pair_features(5), []
    for row in rows:
        row["prompt_ids"] = row["prompt_ids"][:2]
        sides = [cut_side(row["prompt_ids"], row[name], 4, mode) for name in PAIR_IDS]
        short = {name: ids for name, (_, ids) in zip(PAIR_IDS, sides, strict=True)}
        cut.append([row | {"prompt_ids": prompt} | short for prompt, _ in sides])
    model, anchor = tiny_llama(0), tiny_llama(1)
    collator = PairCollator(0, max_length=4, truncation_mode=mode, **layout)
    model.model.layers[0].self_attn.attention_dropout = 0.5
    model.train()
    found = scored(model, anchor, rows, collator)
    assert model.training
    sides = [scored(model, anchor, each, PairCollator(0)) for each in zip(*cut, strict=True)]
    for half, whole in enumerate(sides):
        for name in ("policy", "lengths", "reference"):
            got, wanted = (getattr(each.batch, name).chunk(2)[half] for each in (found, whole))
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    kls = [sides[0].kl, sides[1].kl_rejected]
    assert [found.kl, found.kl_rejected] == pytest.approx(kls, rel=1e-4)


def scored(model, anchor, rows, collator):
    rows = add_reference_logps(anchor, rows, collator, progress=False)
    return score_pairs(model, anchor, rows, collator, batch_size=3, progress=False)


def test_a_model_has_no_distance_to_itself():
    model, collator = tiny_llama(), PairCollator(0)
    features = add_reference_logps(model, pair_features(4), collator, progress=False)
    scores = score_pairs(model, model, features, collator)
    assert [scores.kl, scores.kl_rejected] == pytest.approx([0, 0], abs=1e-7)
