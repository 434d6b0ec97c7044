"""`PreferenceLoss`: the fused call equals the same loss on eager log-probs, for every loss."""

from __future__ import annotations

import itertools

import pytest
import torch
from divergences import eager_tokens
from loss_cases import (
    VARIANTS,
    VOCABULARY,
    eager_logps,
    extras_of,
    hidden_batch,
    random_batch,
    single,
)
from reference_losses import LOSSES, loss_and_gradients, loss_of, pairs, true_loss
from truth import leaves_of, relative

import fused_prefopt as fp

# Path and how many of hidden states and head train; `evaluate` has no gradient.
PATHS = {"local": 2, "recompute": 2, "stash": 1, "evaluate": 0}


@pytest.fixture
def batch() -> dict:
    return hidden_batch()


def results(loss_fn: fp.PreferenceLoss, given: dict, learns: int, *, fused: bool) -> list:
    """Two training steps, so that statistics of the first reach the second, with gradients."""
    extras = dict(given)
    leaves = [extras.pop("hidden").clone(), extras.pop("weight").clone()]
    labels, prompt_labels = extras.pop("labels"), extras.pop("prompt_labels")
    for leaf in leaves[:learns]:
        leaf.requires_grad_()
    found = []
    for _ in range(2):
        if fused:
            result = loss_fn(*leaves, labels, prompt_labels=prompt_labels, **extras)
        else:
            policy, lengths = eager_logps(*leaves, labels)
            prompt, prompt_lengths = eager_logps(*leaves, prompt_labels)
            prompts = {"prompt": prompt, "prompt_lengths": prompt_lengths}
            result = loss_fn.from_logps(fp.LogpBatch(policy, lengths, **prompts, **extras))
        gradients = torch.autograd.grad(result.loss, leaves[:learns]) if learns else ()
        found.append((result, gradients))
    return found


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_the_fused_call_equals_the_loss_on_eager_log_probs(name, options, path, batch):
    ours = results(fp.PreferenceLoss(name, path=path, **options), batch, PATHS[path], fused=True)
    true = results(fp.PreferenceLoss(name, **options), batch, PATHS[path], fused=False)
    for (got, gradients), (wanted, slopes) in zip(ours, true, strict=True):
        torch.testing.assert_close(got.losses, wanted.losses, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(got.loss, wanted.loss, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(got.metrics, wanted.metrics, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(gradients, slopes, rtol=1e-8, atol=1e-10)


# Every loss and option on both engines; the paths take turns, and each engine meets each of them.
TURNS = itertools.cycle(["local", "recompute", "stash", "evaluate", "recompute"])


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("name", "options", "engine", "path"),
    [(*case, engine, next(TURNS)) for case in VARIANTS for engine in ("cublas", "triton")],
    ids=str,
)
def test_interpreted_engines_equal_float64(name, options, engine, path, batch):
    given = single(batch)
    true = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
    loss_fn = fp.PreferenceLoss(name, path=path, engine=engine, **options)
    ours = results(loss_fn, given, PATHS[path], fused=True)
    wanted = results(fp.PreferenceLoss(name, **options), true, PATHS[path], fused=False)
    for (got, gradients), (truth, slopes) in zip(ours, wanted, strict=True):
        for found, exact in zip(
            (got.losses, got.loss, *gradients), (truth.losses, truth.loss, *slopes), strict=True
        ):
            assert found.dtype == torch.float32
            assert (found - exact).abs().max() <= 2e-5 * max(1.0, exact.abs().max().item())


# One registered loss with each kind of statistic, or none.
KINDS = {type(fp.PreferenceLoss(name).statistics): name for name in fp.available_losses()}


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS.values())
def test_a_compiled_loss_is_compiled_once(name):
    torch.compiler.reset()
    graphs = []

    def count(module, inputs):
        graphs.append(module)
        return module.forward

    loss_fn, plain = fp.PreferenceLoss(name), fp.PreferenceLoss(name)
    compiled, seen = torch.compile(loss_fn.from_logps, backend=count), []
    for step in range(4):
        got, wanted = (each(random_batch(8, step)) for each in (compiled, plain.from_logps))
        torch.testing.assert_close(got.losses, wanted.losses)
        seen.append(len(graphs))
    assert 0 < seen[0] == seen[-1]


def test_prompt_sums_may_be_given_instead_of_prompt_labels(batch):
    loss_fn = fp.PreferenceLoss("dro")
    prompt, _ = eager_logps(batch["hidden"], batch["weight"], batch["prompt_labels"])
    inputs = (batch["hidden"], batch["weight"], batch["labels"])
    given = loss_fn(*inputs, prompt=prompt, **extras_of(batch))
    fused = loss_fn(*inputs, prompt_labels=batch["prompt_labels"], **extras_of(batch))
    torch.testing.assert_close(given.loss, fused.loss, rtol=1e-12, atol=0)


def test_a_missing_field_is_named_before_anything_is_computed_or_updated(batch):
    loss_fn = fp.PreferenceLoss("alpha-dpo")
    before = {name: value.clone() for name, value in loss_fn.state_dict().items()}
    bad_labels = torch.full_like(batch["labels"], VOCABULARY + 1)
    with pytest.raises(ValueError, match="alpha-dpo needs `reference`"):
        loss_fn(batch["hidden"], batch["weight"], bad_labels)
    with pytest.raises(ValueError, match="labels: got a label outside"):
        loss_fn(batch["hidden"], batch["weight"], bad_labels, reference=batch["reference"])
    for name, value in loss_fn.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_wrong_extra_leaves_the_statistics_untouched(batch):
    loss_fn = fp.PreferenceLoss("gamma-dpo")
    before = loss_fn.statistics.margins.clone()
    with pytest.raises(ValueError, match=r"reference: got shape \(3,\), wanted \(6\)"):
        loss_fn(batch["hidden"], batch["weight"], batch["labels"], reference=torch.zeros(3))
    with pytest.raises(TypeError, match="refrence: unknown argument"):
        loss_fn(batch["hidden"], batch["weight"], batch["labels"], refrence=torch.zeros(6))
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
        "length_normalized": False,
    }
    assert "beta=0.3" in repr(fp.PreferenceLoss("dpo", beta=0.3))
    assert "ld_alpha=0.5" in repr(fp.PreferenceLoss("simpo", ld_alpha=0.5))
    assert "ld_alpha" not in repr(fp.PreferenceLoss("simpo"))


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
            " 'gamma-simpo/llama-3-8b-instruct'.*losses NAME` lists those of alpha-dpo, .*gamma-",
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


@pytest.mark.parametrize("workspace_mb", [256, 1e-9])
@pytest.mark.parametrize("name", LOSSES)
def test_the_reference_is_measured_where_it_is_needed(name, workspace_mb):
    two = pairs()
    loss_fn = loss_of(name)
    loss_fn.op_options["workspace_mb"] = workspace_mb
    got = loss_and_gradients(loss_fn, two)
    for ours, wanted in zip(got, true_loss(name, two), strict=True):
        assert relative(ours, wanted) <= 2e-5


def test_what_is_given_goes_before_what_is_measured():
    two = pairs()
    case, other = two.policy, two.reference
    given = fp.sequence_logps(other.hidden, other.head, other.labels).sums - 3
    result = fp.PreferenceLoss("dpo")(
        case.hidden,
        case.head,
        case.labels,
        reference=given,
        ref_hidden=other.hidden,
        ref_head=other.head,
    )
    wanted = fp.PreferenceLoss("dpo")(case.hidden, case.head, case.labels, reference=given)
    assert torch.equal(result.losses, wanted.losses)
    known = torch.linspace(0, 2, 6)
    result = fp.PreferenceLoss("tdpo1")(
        case.hidden,
        case.head,
        case.labels,
        sequence_kl=known,
        ref_hidden=other.hidden,
        ref_head=other.head,
    )
    measured = fp.sequence_logps(other.hidden, other.head, other.labels).sums
    fields = {"reference": measured, "sequence_kl": known}
    wanted = fp.PreferenceLoss("tdpo1")(case.hidden, case.head, case.labels, **fields)
    assert torch.equal(result.losses, wanted.losses)


def test_one_half_of_a_reference_is_refused():
    two = pairs()
    case, other = two.policy, two.reference
    given = (case.hidden, case.head, case.labels)
    with pytest.raises(ValueError, match="ref_head: got None with `ref_hidden`"):
        fp.PreferenceLoss("tdpo1")(*given, ref_hidden=other.hidden)
    with pytest.raises(ValueError, match="ref_hidden: got None with `ref_head`"):
        fp.PreferenceLoss("tdpo1")(*given, ref_head=other.head)
    with pytest.raises(ValueError, match="tdpo1 needs `reference`"):
        fp.PreferenceLoss("tdpo1")(*given)
    with pytest.raises(ValueError, match="ref_hidden: got one with `ld_alpha`"):
        fp.PreferenceLoss("dpo", ld_alpha=0.5)(*given, ref_hidden=other.hidden, ref_head=other.head)


def test_the_exact_divergence_is_among_the_metrics():
    two = pairs()
    case, other = two.policy, two.reference
    given = (case.hidden, case.head, case.labels)
    result = fp.PreferenceLoss("tdpo1")(*given, ref_hidden=other.hidden, ref_head=other.head)
    chosen, rejected = eager_tokens(two.double())[0].sum(1).chunk(2)
    assert result.metrics["sequence_kl/chosen"].item() == pytest.approx(
        chosen.mean().item(), rel=1e-5
    )
    assert result.metrics["sequence_kl/rejected"].item() == pytest.approx(
        rejected.mean().item(), rel=1e-5
    )
    plain = fp.PreferenceLoss("dpo")(*given, ref_hidden=other.hidden, ref_head=other.head)
    assert not [name for name in plain.metrics if name.startswith("sequence_kl")]


@pytest.mark.parametrize("options", [{"path": "local"}, {"drop_mass": 0.1}])
def test_options_that_the_divergence_cannot_follow_are_refused(options):
    two = pairs()
    case, other = leaves_of(two.policy, (True, True, True)), two.reference
    given = (case.hidden, case.head, case.labels)
    with pytest.raises(ValueError, match="path: got .* needs 'recompute' and all mass"):
        fp.PreferenceLoss("tdpo1", **options)(*given, ref_hidden=other.hidden, ref_head=other.head)
