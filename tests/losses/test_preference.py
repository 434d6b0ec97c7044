"""`PreferenceLoss`: the fused call equals the same loss on eager log-probs, for every loss."""

from __future__ import annotations

import pytest
import torch

import fused_prefopt as fp

S, T, D, V = 8, 11, 6, 37


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    labels = torch.randint(0, V, (S, T), generator=generator)
    prompt_labels = labels.clone()
    labels[:, :4], prompt_labels[:, 4:] = -100, -100
    labels[1, 7:] = -100
    return {
        "hidden": draw(S, T, D),
        "weight": draw(V, D),
        "labels": labels,
        "prompt_labels": prompt_labels,
        "extras": {
            "reference": -draw(S).abs() * 20,
            "rewards": draw(S),
            "desirable": draw(S) > 0,
            "kl": draw(1).abs()[0],
            "prompt_reference": -draw(S).abs() * 9,
            "groups": torch.arange(S) // 3,
            "sequence_kl": draw(S).abs(),
            "collision": -draw(S).abs() * 9,
        },
    }


def eager(hidden, weight, labels):
    logps = (hidden[:, :-1] @ weight.T).log_softmax(-1)
    targets = labels[:, 1:]
    picked = logps.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return (picked * (targets >= 0)).sum(1), (targets >= 0).sum(1)


@pytest.mark.parametrize("path", ["auto", "local", "recompute"])
@pytest.mark.parametrize("name", fp.available_losses())
def test_fused_call_equals_the_loss_on_eager_log_probs(name, path, batch):
    results, gradients = [], []
    for fused in (True, False):
        loss_fn = fp.PreferenceLoss(name, path=path)
        hidden = batch["hidden"].clone().requires_grad_()
        weight = batch["weight"].clone().requires_grad_()
        if fused:
            result = loss_fn(
                hidden,
                weight,
                batch["labels"],
                prompt_labels=batch["prompt_labels"],
                **batch["extras"],
            )
        else:
            policy, lengths = eager(hidden, weight, batch["labels"])
            prompt, _ = eager(hidden.detach(), weight.detach(), batch["prompt_labels"])
            logps = fp.LogpBatch(policy, lengths, prompt=prompt, **batch["extras"])
            result = loss_fn.from_logps(logps)
        result.loss.backward()
        results.append(result)
        gradients.append((hidden.grad, weight.grad))
    ours, truth = results
    torch.testing.assert_close(ours.losses, truth.losses, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours.loss, truth.loss, rtol=1e-10, atol=1e-12)
    assert ours.metrics.keys() == truth.metrics.keys()
    for metric, value in ours.metrics.items():
        torch.testing.assert_close(value, truth.metrics[metric], rtol=1e-9, atol=1e-12)
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", fp.available_losses())
def test_a_frozen_head_takes_the_stash_path_to_the_same_gradient(name, batch):
    gradients = []
    for trains in (True, False):
        hidden = batch["hidden"].clone().requires_grad_()
        weight = batch["weight"].clone().requires_grad_(trains)
        loss_fn = fp.PreferenceLoss(name)
        result = loss_fn(
            hidden, weight, batch["labels"], prompt_labels=batch["prompt_labels"], **batch["extras"]
        )
        result.loss.backward()
        gradients.append(hidden.grad)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-13)


def test_prompt_sums_may_be_given_instead_of_prompt_labels(batch):
    loss_fn = fp.PreferenceLoss("dro")
    prompt, _ = eager(batch["hidden"], batch["weight"], batch["prompt_labels"])
    inputs = (batch["hidden"], batch["weight"], batch["labels"])
    given = loss_fn(*inputs, prompt=prompt, **batch["extras"])
    fused = loss_fn(*inputs, prompt_labels=batch["prompt_labels"], **batch["extras"])
    torch.testing.assert_close(given.loss, fused.loss, rtol=1e-12, atol=0)


def test_a_missing_field_is_named_before_anything_is_computed_or_updated(batch):
    loss_fn = fp.PreferenceLoss("alpha-dpo")
    before = {name: value.clone() for name, value in loss_fn.state_dict().items()}
    bad_labels = torch.full_like(batch["labels"], V + 1)
    with pytest.raises(ValueError, match="alpha-dpo needs `reference`"):
        loss_fn(batch["hidden"], batch["weight"], bad_labels)
    with pytest.raises(ValueError, match="labels: got a label outside"):
        loss_fn(
            batch["hidden"], batch["weight"], bad_labels, reference=batch["extras"]["reference"]
        )
    for name, value in loss_fn.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_wrong_extra_leaves_the_statistics_untouched(batch):
    loss_fn = fp.PreferenceLoss("gamma-dpo")
    before = loss_fn.statistics.margins.clone()
    with pytest.raises(ValueError, match=r"reference: got shape \(3,\), wanted \(8\)"):
        loss_fn(batch["hidden"], batch["weight"], batch["labels"], reference=torch.zeros(3))
    with pytest.raises(TypeError, match="refrence: unknown argument"):
        loss_fn(batch["hidden"], batch["weight"], batch["labels"], refrence=torch.zeros(S))
    assert torch.equal(loss_fn.statistics.margins.isnan(), before.isnan())


def test_an_odd_number_of_sequences_is_refused_and_changes_nothing():
    loss_fn = fp.PreferenceLoss("gamma-simpo")
    with pytest.raises(ValueError, match="wanted an even number"):
        loss_fn.from_logps(fp.LogpBatch(torch.randn(3), torch.ones(3, dtype=torch.int64)))
    assert loss_fn.statistics.margins.isnan().all()


def test_state_dict_carries_the_statistics(batch):
    first, second = (fp.PreferenceLoss("gamma-simpo", sample_size=8) for _ in range(2))
    inputs = (batch["hidden"], batch["weight"], batch["labels"])
    for _ in range(3):
        first(*inputs)
    second.load_state_dict(first.state_dict())
    for _ in range(3):
        torch.testing.assert_close(first(*inputs).loss, second(*inputs).loss, rtol=0, atol=0)


def test_hyperparameters_are_the_defaults_with_the_given_ones():
    assert fp.PreferenceLoss("dpo", beta=0.3).hyperparameters == {
        "beta": 0.3,
        "label_smoothing": 0.0,
    }
    assert "beta=0.3" in repr(fp.PreferenceLoss("dpo", beta=0.3))


def test_a_published_setting_by_name_of_which_arguments_override_single_values():
    loss_fn = fp.PreferenceLoss("gamma-simpo/llama-3-8b-instruct")
    assert loss_fn.name == "gamma-simpo"
    values = [loss_fn.hyperparameters[name] for name in ("beta", "gamma", "tau")]
    assert values == [10.0, 4.0, 10.0]
    assert loss_fn.loss == fp.PreferenceLoss("gamma-simpo", beta=10.0, gamma=4.0, tau=10.0).loss
    changed = fp.PreferenceLoss("Gamma_SimPO/qwen2.5-7b-instruct", tau=1.0, path="recompute")
    values = [changed.hyperparameters[name] for name in ("beta", "gamma", "tau")]
    assert values == [10.0, 3.0, 1.0] and changed.loss.margin.tau == 1.0
    assert changed.op_options["path"] == "recompute"


@pytest.mark.parametrize("name", fp.published_settings())
def test_every_published_setting_builds_its_loss(name):
    setting = fp.published_settings()[name]
    loss_fn = fp.PreferenceLoss(name)
    assert loss_fn.name == setting.loss
    assert setting.hyperparameters.items() <= loss_fn.hyperparameters.items()
    assert fp.preset(name) == (setting.loss, setting.hyperparameters)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        (
            "gamma-simpo/llama3-8b-instruct",
            "unknown setting 'gamma-simpo/llama3-8b-instruct' .did you mean"
            " 'gamma-simpo/llama-3-8b-instruct'.*losses alpha-dpo` and .*list all 8",
        ),
        ("simp", "unknown loss 'simp' .did you mean 'simpo'.*`fused-prefopt losses` lists all"),
    ],
)
def test_an_unknown_name_is_answered_with_the_closest_ones(name, wanted):
    with pytest.raises(ValueError, match=wanted):
        fp.PreferenceLoss(name)


def test_the_process_group_is_the_statistics_too():
    loss_fn, group = fp.PreferenceLoss("gamma-simpo"), object()
    assert loss_fn.process_group is None
    loss_fn.process_group = group
    assert loss_fn.process_group is loss_fn.statistics.process_group is group
