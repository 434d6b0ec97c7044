"""TRL's KTO trainer with DRO: scores, groups and prompts of single completions."""

from __future__ import annotations

import pytest
import torch
from tiny_models import eager_sums, tiny_llama
from trainers import LABELS, TEXT, build, dataset, first_batch, history, points

import fused_prefopt as fp

pytest.importorskip("trl")

pytestmark = pytest.mark.slow


def dro_run(folder, data, **changes):
    kwargs = {"beta": 0.5, "log_z0": 1.0}
    return build("kto", folder, data, loss="dro", loss_kwargs=kwargs, **changes)


def truth_of(run, rewards, groups=None):
    """DRO's loss of the first four rows, from the models' own logits."""
    rows = [run.train_dataset[i] for i in range(4)]
    part = {
        name: eager_sums(model.double(), rows, "completion_ids", side).detach()
        for name, model, side in (
            ("policy", tiny_llama(), "completion"),
            ("reference", tiny_llama(5), "completion"),
            ("prompt", tiny_llama(), "prompt"),
            ("prompt_reference", tiny_llama(5), "prompt"),
        )
    }
    batch = fp.LogpBatch(
        **part,
        lengths=torch.tensor([len(row["completion_ids"]) for row in rows]),
        rewards=torch.tensor(rewards),
        groups=None if groups is None else torch.tensor(groups),
    )
    return fp.PreferenceLoss("dro", beta=0.5, log_z0=1.0).from_logps(batch).loss.item()


@pytest.mark.parametrize(("column", "precompute"), [("reward", False), ("score", True)])
def test_scores_and_groups_reach_dro(tmp_path, precompute, column):
    scores, groups = [0.25 * i for i in range(16)], [0, 0, 0] + [1] * 13
    data = points(**{column: scores, "group": groups})
    options = {"precompute_ref_log_probs": precompute}
    run = dro_run(tmp_path, data, reference=tiny_llama(5), **options)
    assert not run.calculate_KL
    assert ("ref_prompt_logps" in run.train_dataset.column_names) == precompute
    loss = run.train().training_loss
    grouped = truth_of(run, scores[:4], groups[:4])
    assert grouped != pytest.approx(truth_of(run, scores[:4]), rel=1e-3)
    assert loss == pytest.approx(grouped, rel=1e-5)
    assert history(run, "reward_model/mean") == pytest.approx([sum(scores[:4]) / 4])


def test_without_scores_dro_takes_the_labels(tmp_path):
    run = dro_run(tmp_path, points(label=[True, False, False, True] * 4))
    loss = run.train().training_loss
    assert loss == pytest.approx(truth_of(run, [1.0, -1.0, -1.0, 1.0]), rel=1e-5)


def test_pairs_with_scores_become_scored_completions_of_one_group(tmp_path):
    sides = [
        {"prompt": "the cat", "chosen": f" sat {word}", "rejected": f" on {word}"}
        | {"score_chosen": 0.5 + i, "score_rejected": float(-i)}
        for i, word in enumerate(TEXT[:4])
    ]
    run = dro_run(tmp_path, dataset(sides))
    batch = first_batch(run)
    assert batch["rewards"].tolist() == [0.5, 0.0, 1.5, -1.0]
    assert batch["groups"].tolist() == [0, 0, 1, 1]
    assert batch["label"].tolist() == [True, False] * 2
    loss = run.train().training_loss
    truth = truth_of(run, batch["rewards"].tolist(), [0, 0, 1, 1])
    assert loss == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize("loss", ["kto", "dro"])
def test_scores_in_some_rows_only_are_no_scores(tmp_path, loss):
    columns = {"label": [True, False] * 2, "reward": [1.0, None, 0.5, 2.0]}
    run = build("kto", tmp_path, points(4, **columns), loss=loss)
    assert "rewards" not in run.data_collator(list(run.train_dataset))
    if loss == "dro":
        with pytest.raises(ValueError, match="dro needs `rewards`"):
            run.train()
    else:
        assert torch.tensor(run.train().training_loss).isfinite()


def test_labels_of_one_and_zero_and_gaps_in_scores_are_taken(tmp_path):
    data = points(label=[int(label) for label in LABELS], reward=[None, *[0.5] * 15])
    run = build("kto", tmp_path, data)
    batch = run.data_collator([run.train_dataset[i] for i in range(3, 6)])
    assert batch["label"].tolist() == [0, 1, 1] and batch["rewards"].tolist() == [0.5] * 3


@pytest.mark.parametrize("loss", ["kto", "dro"])
def test_scores_are_logged_where_rows_bring_them(tmp_path, loss):
    scored = points(label=LABELS, reward=[float(i) for i in range(16)])
    run = build("kto", tmp_path, loss=loss, max_steps=2, given={"eval_dataset": scored})
    run.train()
    run.evaluate()
    names = {name for row in run.state.log_history for name in row if "reward_model" in name}
    assert names == {"eval_reward_model/mean", "eval_reward_model/std"}
    assert run.state.log_history[-1]["eval_reward_model/mean"] == 7.5
    assert len(history(run, "rewards/mean")) == 2


def test_dro_compares_prompts_without_a_learned_one(tmp_path):
    pytest.importorskip("peft")
    from learned_prompts import adapter, vivid_llama
    from model_families import own_sums

    for name, precompute in (("prompt", False), ("prefix", False), ("prefix", True)):
        torch.manual_seed(0)
        given, options = {"peft_config": adapter(name)}, {"precompute_ref_log_probs": precompute}
        run = dro_run(tmp_path, None, model=vivid_llama(), given=given, **options)
        batch = first_batch(run)
        found = run._reference_fields(run.model, batch)
        for field, part in (("reference", "completion"), ("prompt_reference", "prompt")):
            wanted = own_sums(vivid_llama().double(), batch, part).detach()
            torch.testing.assert_close(found[field].double(), wanted, rtol=1e-5, atol=1e-5)
