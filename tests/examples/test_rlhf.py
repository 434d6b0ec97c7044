"""RLHF on the op: the clipped objective, the reward model, sampling, and the whole example."""

from __future__ import annotations

import json
import math

import pytest
import rlhf
import torch
from reinforcement.policy import (
    Clipping,
    clipped_loss,
    group_advantages,
    sample,
    token_policy_of,
)
from reinforcement.reward_model import RewardModel, pair_accuracy, train_reward_model
from tiny_models import tiny_llama
from training_loop import update

from fused_prefopt import TokenPolicy
from fused_prefopt.data import PointCollator, labels_of

NO_EXTRAS = Clipping(clip=0.2, kl_weight=0.0, entropy_weight=0.0)
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12]]


def tokens(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_without_a_step_the_gradient_is_that_of_the_advantage_times_the_log_probs():
    logps = tokens([-1.0, -2.0, 0.0], [-0.5, -1.5, -3.0]).requires_grad_()
    labelled = torch.tensor([[True, True, False], [True, True, True]])
    policy = TokenPolicy(logps, torch.zeros_like(logps))
    old, advantages = logps.detach(), tokens([2.0, -1.0])[0]
    clipped_loss(policy, old, old, advantages, labelled, NO_EXTRAS).backward()
    wanted = tokens([-2 / 2, -2 / 2, 0.0], [1 / 3, 1 / 3, 1 / 3]) / 2
    torch.testing.assert_close(logps.grad, wanted)


@pytest.mark.parametrize(
    ("advantage", "ratio", "moves"),
    [(1.0, 1.3, False), (1.0, 0.7, True), (-1.0, 0.7, False), (-1.0, 1.3, True), (1.0, 1.1, True)],
)
def test_a_ratio_beyond_the_clip_leaves_no_gradient_where_it_gains(advantage, ratio, moves):
    old = tokens([-1.0])
    logps = (old + torch.tensor(ratio).double().log()).requires_grad_()
    policy = TokenPolicy(logps, torch.zeros_like(logps))
    everywhere = torch.ones(1, 1, dtype=torch.bool)
    loss = clipped_loss(policy, old, old, tokens([advantage])[0], everywhere, NO_EXTRAS)
    bounded = min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
    assert loss.item() == pytest.approx(-bounded)
    loss.backward()
    assert bool(logps.grad.any()) is moves


def test_the_penalty_is_the_unbiased_estimate_and_the_bonus_the_entropy():
    logps, reference = tokens([-1.0, -2.0]), tokens([-1.5, -1.0])
    policy = TokenPolicy(logps, tokens([0.3, 0.5]))
    everywhere = torch.ones(1, 2, dtype=torch.bool)
    settings = Clipping(kl_weight=0.1, entropy_weight=0.01)
    loss = clipped_loss(policy, logps, reference, tokens([0.0])[0], everywhere, settings)
    drift = reference - logps
    wanted = 0.1 * (drift.exp() - drift - 1).mean() - 0.01 * 0.4
    assert loss.item() == pytest.approx(wanted.item())


def test_advantages_are_standardised_within_their_group():
    rewards = torch.tensor([1.0, 2.0, 3.0, 10.0, 10.0, 10.0])
    found = group_advantages(rewards, 3)
    torch.testing.assert_close(found, torch.tensor([-1.0, 0.0, 1.0, 0.0, 0.0, 0.0]))


def test_scores_do_not_depend_on_padding():
    model = RewardModel(tiny_llama()).eval()
    points = [
        {"prompt_ids": prompt, "completion_ids": list(range(13, 13 + n))}
        for n, prompt in enumerate(PROMPTS, start=1)
    ]
    together = model.scores(points, 0)
    alone = torch.cat([model.scores([point], 0) for point in points])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    model.standardise(points, 0)
    scores = model.scores(points, 0)
    assert abs(scores.mean().item()) < 1e-5 and scores.std().item() == pytest.approx(1, abs=1e-4)
    assert torch.equal(scores.argsort(), together.argsort())


def test_a_reward_model_learns_which_token_is_preferred():
    pairs = [
        {"prompt_ids": [5 + n], "chosen_ids": [20, 9 + n], "rejected_ids": [21, 9 + n]}
        for n in range(8)
    ]
    start = tiny_llama()
    model = train_reward_model(start, pairs, 0, steps=25, batch_size=4, seed=0, name="test")
    assert pair_accuracy(model, pairs, 0) == 1.0
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_of_the_examples_stops_before_a_weight_moves(value):
    layer = torch.nn.Linear(2, 1)
    before = [each.detach().clone() for each in layer.parameters()]
    optimiser = torch.optim.AdamW(layer.parameters(), lr=1.0)
    with pytest.raises(FloatingPointError, match=f"a loss of {value}"):
        update(layer, optimiser, layer(torch.tensor([1.0, value])).square().sum())
    assert all(torch.equal(*each) for each in zip(before, layer.parameters(), strict=True))
    optimiser.zero_grad()
    update(layer, optimiser, layer(torch.ones(2)).square().sum())
    assert not any(torch.equal(*each) for each in zip(before, layer.parameters(), strict=True))


def test_samples_follow_the_model_whatever_their_padding():
    model = tiny_llama()
    # So sure of itself that a sample is the most likely continuation.
    model.lm_head.weight.data *= 1e4
    got = sample(model, PROMPTS, 0, new_tokens=4)
    assert [each["prompt_ids"] for each in got] == PROMPTS
    for each in got:
        alone = sample(model, [each["prompt_ids"]], 0, new_tokens=4)
        assert alone == [each] and 1 <= len(each["completion_ids"]) <= 4


def test_a_sample_ends_with_its_first_end_of_text(monkeypatch):
    model = tiny_llama(eos_token_id=2)
    drawn = torch.tensor([[1, 5, 7, 2, 2], [1, 5, 8, 9, 9]])
    monkeypatch.setattr(model, "generate", lambda **_: drawn)
    got = sample(model, [[1, 5], [1, 5]], 0, new_tokens=3)
    assert [each["completion_ids"] for each in got] == [[7, 2], [8, 9, 9]]


def test_sampling_leaves_a_module_frozen_in_eval_mode_in_it():
    model = tiny_llama().train()
    model.model.norm.eval()
    sample(model, PROMPTS, 0, new_tokens=1)
    assert model.training and model.model.layers[0].training and not model.model.norm.training


def test_the_policy_of_a_batch_is_that_of_the_models_logits():
    model = tiny_llama()
    points = [
        {"prompt_ids": [5, 6], "completion_ids": [7, 8, 9]},
        *sample(model, PROMPTS, 0, new_tokens=3),
    ]
    batch = PointCollator(0)(points)
    got = token_policy_of(model, batch)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logps, labels = logits.log_softmax(-1)[:, :-1], labels_of(batch)[:, 1:]
    there = labels != -100
    wanted = logps.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(got.logps[:, 1:][there], wanted[there], rtol=1e-5, atol=1e-5)
    entropies = -(logps.exp() * logps).sum(-1)
    torch.testing.assert_close(got.entropies[:, 1:][there], entropies[there], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_whole_example_on_a_few_steps(tmp_path, capsys):
    few = (
        "--pretraining-steps 2 --reward-steps 2 --steps 2 --rounds 1 --limit 24 --held-out-limit 8"
        " --batch-size 4 --new-tokens 8"
    )
    rlhf.main(["--output", str(tmp_path), *few.split()])
    said = capsys.readouterr().out
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert list(metrics["held_out"]) == ["SFT", "DPO", "RPO", "DRO", "GRPO"]
    assert metrics["held_out"]["SFT"]["kl"] == pytest.approx(0, abs=1e-4)
    assert all(metrics["held_out"][name]["kl"] > 0 for name in ("DPO", "RPO", "DRO", "GRPO"))
    assert len(metrics["grpo"]) == 1
    assert (tmp_path / "rewards.png").stat().st_size > 5000
    assert rlhf.table(metrics["held_out"]) in said and rlhf.judged_text(metrics) in said


def test_the_published_page_is_that_of_the_published_metrics():
    metrics = json.loads(rlhf.RESULTS.read_text(encoding="utf-8"))
    assert rlhf.PAGE.read_text(encoding="utf-8") == rlhf.page_text(metrics)
    assert rlhf.PAGE.with_suffix(".png").is_file()
