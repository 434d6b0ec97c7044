"""Lists in `PreferenceTrainer` and `attach`: loss and gradient, metrics, ranks, whole batches."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from list_truth import dpo_of_lists, dro_of_lists, pair_margins, points_in
from model_families import own_token_metrics
from tiny_models import eager_sums, list_features, pair_features, tiny_llama
from torch.utils.data import DataLoader
from trainers import arguments, build, history, in_order
from weighted_rows import weighted

import fused_prefopt as fp
from fused_prefopt.data import (
    GroupBatchSampler,
    ListCollator,
    PairCollator,
    lists_of_points,
    points_of_lists,
)
from fused_prefopt.integrations.layouts import keep_batches_whole
from fused_prefopt.integrations.trainer_checks import require_whole_lists
from fused_prefopt.integrations.transformers import PreferenceTrainer, attach
from fused_prefopt.reference import add_reference_logps

pytest.importorskip("datasets")


def weighted_lists(count: int) -> list[dict]:
    return [
        row | {"weight": (0.5, 2.0, 0.0, 1.0)[index % 4]}
        for index, row in enumerate(list_features(count))
    ]


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("loss", ["dpo", "dro"])
def test_every_layout_has_the_loss_and_gradient_of_the_logits(loss, padding_free):
    lists = weighted_lists(5) if loss == "dpo" else list_features(5)
    model, eager, other = tiny_llama().double(), tiny_llama().double(), tiny_llama(5).double()
    attach(model, fp.PreferenceLoss(loss), reference=other)
    found = model(**ListCollator(0, padding_free=padding_free)(lists))["loss"]
    found.backward()
    truth = (dpo_of_lists if loss == "dpo" else dro_of_lists)(eager, other, lists)
    torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10)
    truth.backward()
    for ours, right in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, right.grad, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("loss", ["dpo", "simpo", "alpha-dpo", "odpo", "dpo + 0.2 sft", "tdpo1"])
def test_pairs_as_lists_of_two_are_pairs(loss):
    """With the weights of rows and tokens, and every metric."""
    pairs = add_reference_logps(
        tiny_llama(5).double(), weighted(pair_features(6)), PairCollator(0), progress=False
    )
    found = []
    for kind in (PairCollator, ListCollator):
        model = tiny_llama().double()
        loss_fn = fp.PreferenceLoss(loss, use_weighting=loss == "simpo")
        other = tiny_llama(5).double()
        attachment = attach(model, loss_fn, reference=other, log_tokens=True)
        value = model(**kind(0)(pairs))["loss"]
        value.backward()
        found.append((value, model.lm_head.weight.grad, attachment.pop_metrics("train")))
    (one, right, metrics), (other, gradient, of_lists) = found
    torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, right, rtol=1e-9, atol=1e-12)
    assert of_lists.pop("lists/pairs") == 1
    assert of_lists == pytest.approx(metrics, rel=1e-9, abs=1e-12)


def test_metrics_are_means_over_lists_and_their_tokens(tmp_path):
    lists, other = weighted_lists(5), tiny_llama(5)
    given = {"eval_dataset": lists, "reference_cache": tmp_path / "cache"}
    options = {"per_device_eval_batch_size": 5, "log_tokens": True}
    run = build("transformers", tmp_path, lists, reference=other, given=given, **options)
    assert type(run.data_collator) is ListCollator
    found = run.evaluate()
    points = points_in(lists)
    sums = [
        eager_sums(each, points, "completion_ids", "completion") for each in (tiny_llama(), other)
    ]
    margins = pair_margins(0.1 * (sums[0] - sums[1]), lists)
    weights = torch.tensor([row["weight"] for row in lists]).double()

    def mean(values: list[torch.Tensor]) -> float:
        return ((weights * torch.stack(values)).sum() / weights.sum()).item()

    accuracy = mean([(each > 0).double().mean() for each in margins])
    assert found["eval_rewards/accuracies"] == pytest.approx(accuracy)
    assert found["eval_rewards/margins"] == pytest.approx(
        mean([each.mean() for each in margins]), rel=1e-3
    )
    assert found["eval_lists/pairs"] == pytest.approx(sum(map(len, margins)) / 5)
    assert found["eval_weights/mean"] == pytest.approx(weights.mean().item())
    # Of tokens, with one weight each.
    model = tiny_llama()
    attachment = attach(model, fp.PreferenceLoss("simpo"), log_tokens=True)
    lists = list_features(5)
    batch = ListCollator(0)(lists)
    model(**batch)
    best = torch.tensor([r == max(row["rewards"]) for row in lists for r in row["rewards"]])
    truth, logged = own_token_metrics(tiny_llama(), batch, best), attachment.pop_metrics("train")
    for name, value in truth.items():
        assert logged[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_points_are_lists_where_their_batches_are_whole(tmp_path):
    lists = list_features(4)
    points = points_of_lists(lists)
    with pytest.raises(ValueError, match="train_dataset: got rows of single completions for simpo"):
        build("transformers", tmp_path, points, loss="simpo")
    bare = [{name: row[name] for name in row if name != "group"} for row in points]
    with pytest.raises(ValueError, match="got single completions without 'group' for simpo"):
        build("transformers", tmp_path, bare, loss="simpo")

    class Grouped(PreferenceTrainer):
        def get_train_dataloader(self):
            sampler = GroupBatchSampler([row["group"] for row in points], 7, shuffle=False)
            loader = DataLoader(
                self.train_dataset, batch_sampler=sampler, collate_fn=self.data_collator
            )
            return self.accelerator.prepare(loader)

    given = {"loss_fn": fp.PreferenceLoss("simpo"), "train_dataset": points}
    grouped = Grouped(tiny_llama(), arguments(tmp_path), **given)
    whole = build("transformers", tmp_path, lists, loss="simpo", per_device_train_batch_size=2)
    losses = []
    for run in (grouped, in_order(whole)):
        run.train()
        losses += history(run, "loss")
    # 3 + 2 completions, then 4: the second list would not fit.
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for remedy in (lists_of_points(points), lists):
        batch = ListCollator(0)(remedy)
        assert batch["groups"].tolist() == [row["group"] for row in points]
    grouped.accelerator = SimpleNamespace(split_batches=True, num_processes=2)
    with pytest.raises(ValueError, match="accelerator_config: got split_batches=True"):
        require_whole_lists(grouped, given["loss_fn"])


def test_no_process_may_be_dealt_rows_of_lists(tmp_path):
    run = build("transformers", tmp_path, list_features(4), loss="simpo")
    run.accelerator = SimpleNamespace(num_processes=2, dispatch_batches=True)
    for pairwise in (True, False):
        with pytest.raises(ValueError, match="deals out rows, with lists, whose rows may go to"):
            keep_batches_whole(run, pairwise=pairwise)
