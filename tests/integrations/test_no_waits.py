"""A training step asks for no value on the way, so that a GPU is never waited for."""

from __future__ import annotations

import re

import pytest
import torch
from loss_cases import VARIANTS
from tiny_models import pair_features, point_features, tiny_llama
from trainers import OF_TRL, build, pairs_with_reference
from waits import watched, watched_steps

import fused_prefopt as fp
from fused_prefopt.data import PairCollator, PointCollator
from fused_prefopt.integrations import nonfinite
from fused_prefopt.ops import sequence_kl, token_policy, token_statistics
from fused_prefopt.ops.plan import PATHS

LAYOUTS = {
    "padded": {},
    "packed": {"padding_free": True},
    "shared prompts": {"shared_prompt": True},
}


@pytest.fixture
def waits(monkeypatch):
    return watched(monkeypatch)


@pytest.fixture
def found(tmp_path, waits):
    """What a trainer of some kind waits for in its second step."""

    def train(kind="transformers", data=None, *, collator=None, **options):
        given = {} if collator is None else {"given": {"data_collator": collator}}
        run = build(kind, tmp_path, data, max_steps=2, **given, **options)
        watched_steps(run, waits)
        run.train()
        return waits.found

    return train


def calls(counted):
    """The op's arguments, with its count of labelled rows or without."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 6, 8, generator=generator)
    weight = torch.randn(23, 8, generator=generator)
    labels = torch.randint(0, 23, (4, 6), generator=generator)
    labels[:, :2] = -100
    return hidden.requires_grad_(), weight, labels, {"num_labels": 16} if counted else {}


def without_file(found):
    """Operation and function of each wait."""
    return [re.sub(r" in \w+:", " in ", each) for each in found]


def test_waits_are_noticed(waits):
    hidden, weight, labels, _ = calls(False)
    with waits:
        fp.sequence_logps(hidden, weight, labels)
    assert without_file(waits.found) == ["aten._local_scalar_dense.default in read_call"]
    waits.found.clear()
    options = {"sequence_ids": torch.arange(24) // 6, "num_labels": 20}
    with waits:
        fp.token_logps(hidden.flatten(0, 1), weight, labels.flatten().abs() % 23, **options)
    assert without_file(waits.found) == ["aten._local_scalar_dense.default in packed_layout"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("drop_mass", [0.0, 0.01])
def test_the_op(waits, path, drop_mass):
    hidden, weight, labels, counted = calls(True)
    weight.requires_grad_(path not in ("evaluate", "stash"))
    hidden.requires_grad_(path != "evaluate")
    with waits:
        out = fp.sequence_logps(hidden, weight, labels, path=path, drop_mass=drop_mass, **counted)
        if path != "evaluate":
            out.sums.sum().backward()
    # One more is documented: what is left out decides how long the matmuls are.
    documented = ["tolist in choose_parts"] * (weight.requires_grad and drop_mass > 0)
    assert without_file(waits.found) == documented


def test_the_other_ops(waits):
    hidden, weight, labels, counted = calls(True)
    with waits:
        found = token_policy(hidden, weight, labels, **counted)
        (found.logps + found.entropies).sum().backward()
        token_statistics(hidden, weight, labels, **counted)
        others = hidden.detach() + 1, weight, labels
        out = sequence_kl(hidden, weight, *others, perturbation=0.1, **counted)
        (out.kl + out.policy).sum().backward()
    assert waits.found == []


SUMS: list[tuple[str, dict]] = [
    ("0.8 dpo + 0.2 bco-pair + sft", {"use_weighting": True}),
    ("gamma-simpo + 0.5 alpha-dpo + sft", {}),
]


@pytest.mark.parametrize(("name", "options"), [*VARIANTS, *SUMS], ids=str)
def test_every_loss(waits, name, options):
    loss_fn = fp.PreferenceLoss(name, **options)
    hidden, weight, labels, counted = calls(True)
    weight.requires_grad_()
    extras = {
        "reference": torch.linspace(-3, -1, 4),
        "rewards": torch.linspace(-2, 1, 4),
        "desirable": torch.tensor([True, False, True, False]),
        "prompt": torch.full((4,), -2.0),
        "prompt_reference": torch.full((4,), -2.5),
        "prompt_lengths": torch.tensor([1, 2, 1, 2]),
        "groups": torch.tensor([0, 0, 1, 1]),
        "sequence_kl": torch.ones(4),
        "extrapolated": torch.linspace(-3, -2, 4),
        "interpolated": torch.linspace(-2, -3, 4),
        "kl": torch.ones(()),
        "gold": torch.full((4,), -3.0),
        "gold_lengths": torch.tensor([2, 3, 2, 3]),
    }
    extras = {key: value for key, value in extras.items() if key in loss_fn.loss.needs}
    if "prompt_lengths" in loss_fn.loss.needs:
        # Counted of these.
        extras["prompt_labels"] = labels.flip(0)
        extras["num_prompt_labels"] = counted["num_labels"]
        del extras["prompt"]
    with waits:
        loss_fn(hidden, weight, labels, **counted, **extras).loss.backward()
    assert waits.found == []


@pytest.mark.parametrize("name", ["dpo + 0.5 alpha-dpo + sft", "gamma-dpo", "dr-dpo", "kto"])
def test_weights_of_pairs_and_tokens(waits, name):
    loss_fn = fp.PreferenceLoss(name)
    hidden, weight, labels, counted = calls(True)
    extras = {"reference": torch.linspace(-3, -1, 4), "weights": torch.tensor([2.0, 0.0] * 2)}
    if not loss_fn.loss.pairwise:
        extras["desirable"] = torch.tensor([True, False, True, False])
    with waits:
        output = loss_fn(
            hidden, weight, labels, token_weights=torch.rand(4, 6), **counted, **extras
        )
        output.loss.backward()
    assert waits.found == []


# The loss, its own options, and where its reference is.
STEPS = [
    ("alpha-dpo", {}, "precomputed"),
    ("gamma-dpo", {}, "precomputed"),
    ("dpo", {}, "model"),
    ("dpo", {}, "adapter"),
    ("tdpo2", {}, "model"),
    ("epsilon-dpo", {}, "model"),
    ("wpo", {}, "model"),
    ("dpo", {"ld_alpha": 0.3}, "model"),
]


@pytest.mark.parametrize(
    ("loss", "options", "source", "layout"),
    [
        (*step, layout)
        for step in STEPS
        for layout in LAYOUTS
        # The last ones ask the head for more, which a shared prompt does not give.
        if layout != "shared prompts" or step in STEPS[:4]
    ],
    ids=str,
)
def test_a_step_on_pairs(found, layout, loss, options, source):
    model, reference = tiny_llama(), {"model": tiny_llama(7)}.get(source, source)
    if source == "adapter":
        peft = pytest.importorskip("peft")
        lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, lora)
    data = pairs_with_reference() if source == "precomputed" else pair_features(8)
    given = {"collator": PairCollator(0, **LAYOUTS[layout]), "log_tokens": source == "adapter"}
    loss_fn = fp.PreferenceLoss(loss, **options)
    assert found(data=data, model=model, reference=reference, loss=loss_fn, **given) == []


@pytest.mark.parametrize("padding_free", [False, True])
def test_a_step_on_points_with_their_prompts(found, padding_free):
    given = {"collator": PointCollator(0, padding_free=padding_free), "reference": tiny_llama(7)}
    assert found(data=point_features(8), loss="dro", **given) == []


@pytest.mark.parametrize(("on_nonfinite", "waited"), [("stop", 1), ("skip", 1), ("ignore", 0)])
def test_the_one_wait_of_a_step_is_for_what_is_not_finite(
    found, monkeypatch, waits, on_nonfinite, waited
):
    judge = nonfinite._BeforeTheOptimizer.on_pre_optimizer_step

    def judged(*args, **kwargs):
        with waits:
            return judge(*args, **kwargs)

    monkeypatch.setattr(nonfinite._BeforeTheOptimizer, "on_pre_optimizer_step", judged)
    noticed = found(data=pair_features(8), loss="simpo", on_nonfinite=on_nonfinite)
    assert without_file(noticed) == ["tolist in on_pre_optimizer_step"] * waited


def test_a_collator_of_another_makes_is_counted_too(found):
    def collator(features):
        batch = PairCollator(0)(features)
        return {name: batch[name] for name in ("input_ids", "attention_mask", "completion_mask")}

    assert found(data=pair_features(8), loss="simpo", collator=collator) == []


LOSSES = {"dpo": ("dpo", "alpha-dpo", "tdpo2", "simpo"), "kto": ("kto", "dro")}
CASES = [
    (kind, loss, precomputed)
    for kind in OF_TRL
    for loss in LOSSES[kind]
    for precomputed in (False, True)
    # Log-probs are not all that TDPO needs.
    if not (loss == "tdpo2" and precomputed)
]


@pytest.mark.parametrize(("kind", "loss", "precomputed"), CASES)
def test_a_step_under_trl(found, kind, loss, precomputed):
    given = {"reference": tiny_llama(5)} if loss == "tdpo2" else {}
    options = {"precompute_ref_log_probs": precomputed, "log_tokens": True}
    assert found(kind, loss=loss, **options, **given) == []
