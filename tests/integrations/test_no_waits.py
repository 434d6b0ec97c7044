"""A training step asks for no value on the way, so that a GPU is never waited for."""

from __future__ import annotations

import pytest
import torch
from loss_cases import VARIANTS
from test_integrations_transformers import arguments
from tiny_models import pair_features, point_features, tiny_llama
from waits import watched, watched_steps

import fused_prefopt as fp
from fused_prefopt.data import PairCollator, PointCollator
from fused_prefopt.integrations.transformers import PreferenceTrainer
from fused_prefopt.losses import find
from fused_prefopt.ops import sequence_kl, token_policy, token_statistics
from fused_prefopt.ops.plan import PATHS
from fused_prefopt.reference import add_reference_logps

LAYOUTS = {
    "padded": PairCollator(0),
    "packed": PairCollator(0, padding_free=True),
    "shared prompts": PairCollator(0, shared_prompt=True),
}


@pytest.fixture
def waits(monkeypatch):
    return watched(monkeypatch)


def train(folder, waits, loss_fn, data, model=None, **options):
    given = arguments(folder, max_steps=2, per_device_train_batch_size=4, learning_rate=1e-3)
    trainer = PreferenceTrainer(
        model or tiny_llama(), given, train_dataset=data, loss_fn=loss_fn, **options
    )
    watched_steps(trainer, waits)
    trainer.train()
    return waits.found


def calls(case):
    """The op's count of labelled rows, and the op without a count."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 6, 8, generator=generator)
    weight = torch.randn(23, 8, generator=generator)
    labels = torch.randint(0, 23, (4, 6), generator=generator)
    labels[:, :2] = -100
    return hidden.requires_grad_(), weight, labels, {"num_labels": 16} if case else {}


def test_waits_are_noticed(waits):
    hidden, weight, labels, _ = calls(False)
    with waits:
        fp.sequence_logps(hidden, weight, labels)
    assert waits.found == ["aten._local_scalar_dense.default in call:read_call"]
    waits.found.clear()
    options = {"sequence_ids": torch.arange(24) // 6, "num_labels": 20}
    with waits:
        fp.token_logps(hidden.flatten(0, 1), weight, labels.flatten().abs() % 23, **options)
    assert waits.found == ["aten._local_scalar_dense.default in layout:packed_layout"]


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
    documented = ["tolist in dropped_mass:choose_parts"] * (weight.requires_grad and drop_mass > 0)
    assert waits.found == documented


def test_the_other_ops(waits):
    hidden, weight, labels, counted = calls(True)
    with waits:
        found = token_policy(hidden, weight, labels, **counted)
        (found.logps + found.entropies).sum().backward()
        token_statistics(hidden, weight, labels, **counted)
        out = sequence_kl(hidden, weight, hidden.detach() + 1, weight, labels, **counted)
        (out.kl + out.policy).sum().backward()
    assert waits.found == []


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
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
        "groups": torch.tensor([0, 0, 1, 1]),
        "sequence_kl": torch.ones(4),
        "kl": torch.ones(()),
    }
    needs = find(name).build(**options).needs
    extras = {key: value for key, value in extras.items() if key in needs}
    with waits:
        loss_fn(hidden, weight, labels, **counted, **extras).loss.backward()
    assert waits.found == []


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reference", ["precomputed", "model"])
def test_a_preference_trainers_step(tmp_path, waits, layout, reference):
    data, options = pair_features(8), {}
    if reference == "precomputed":
        data = add_reference_logps(tiny_llama(7), data, PairCollator(0), progress=False)
    else:
        options = {"reference": tiny_llama(7)}
    for name in ("dpo", "alpha-dpo", "gamma-dpo"):
        loss_fn = fp.PreferenceLoss(name)
        found = train(tmp_path, waits, loss_fn, data, data_collator=LAYOUTS[layout], **options)
        assert found == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_beside_an_adapters_own_reference(tmp_path, waits, layout):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_llama(), lora)
    collator, loss_fn = LAYOUTS[layout], fp.PreferenceLoss("dpo")
    data = pair_features(8)
    options = {"data_collator": collator, "reference": "adapter", "log_tokens": True}
    assert train(tmp_path, waits, loss_fn, data, model, **options) == []


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize(
    ("name", "options"), [("tdpo2", {}), ("wpo", {}), ("dpo", {"ld_alpha": 0.3})], ids=str
)
def test_steps_that_ask_the_head_for_more(tmp_path, waits, name, options, layout):
    loss_fn = fp.PreferenceLoss(name, **options)
    given = {"data_collator": LAYOUTS[layout], "reference": tiny_llama(7)}
    assert train(tmp_path, waits, loss_fn, pair_features(8), **given) == []


@pytest.mark.parametrize("padding_free", [False, True])
def test_a_step_on_points_with_their_prompts(tmp_path, waits, padding_free):
    loss_fn = fp.PreferenceLoss("dro", beta=0.5)
    collator = PointCollator(0, padding_free=padding_free)
    options = {"data_collator": collator, "reference": tiny_llama(7)}
    assert train(tmp_path, waits, loss_fn, point_features(8), **options) == []


@pytest.mark.parametrize(("on_nonfinite", "waited"), [("stop", 1), ("skip", 1), ("ignore", 0)])
def test_the_one_wait_of_a_step_is_for_what_is_not_finite(
    tmp_path, monkeypatch, waits, on_nonfinite, waited
):
    from fused_prefopt.integrations import nonfinite

    judge = nonfinite._BeforeTheOptimizer.on_pre_optimizer_step

    def judged(*args, **kwargs):
        with waits:
            return judge(*args, **kwargs)

    monkeypatch.setattr(nonfinite._BeforeTheOptimizer, "on_pre_optimizer_step", judged)
    loss_fn = fp.PreferenceLoss("simpo")
    found = train(tmp_path, waits, loss_fn, pair_features(8), on_nonfinite=on_nonfinite)
    assert found == ["tolist in nonfinite:on_pre_optimizer_step"] * waited


def test_a_collator_of_another_makes_is_counted_too(tmp_path, waits):
    def collator(features):
        batch = PairCollator(0)(features)
        return {name: batch[name] for name in ("input_ids", "attention_mask", "completion_mask")}

    loss_fn = fp.PreferenceLoss("simpo")
    assert train(tmp_path, waits, loss_fn, pair_features(8), data_collator=collator) == []


@pytest.mark.parametrize("precomputed", [False, True])
@pytest.mark.parametrize("loss", ["dpo", "alpha-dpo", "tdpo2", "simpo"])
def test_a_step_under_trls_dpo(tmp_path, waits, loss, precomputed):
    trl = pytest.importorskip("fused_prefopt.integrations.trl")
    from test_integrations_trl import dataset, options, trainer

    if loss == "tdpo2" and precomputed:
        pytest.skip("log-probs are not all that it needs")
    changes = {"max_steps": 2, "precompute_ref_log_probs": precomputed, "log_tokens": True}
    config = trl.FusedDPOConfig(**options(tmp_path, **changes), loss=loss)
    reference = None if precomputed else tiny_llama(5)
    run = trainer(trl.FusedDPOTrainer, config, dataset(), ref_model=reference)
    watched_steps(run, waits)
    run.train()
    assert waits.found == []


@pytest.mark.parametrize("precomputed", [False, True])
@pytest.mark.parametrize("loss", ["kto", "dro"])
def test_a_step_under_trls_kto(tmp_path, waits, loss, precomputed):
    trl = pytest.importorskip("fused_prefopt.integrations.trl")
    from test_integrations_points import options, trainer

    changes = {"max_steps": 2, "precompute_ref_log_probs": precomputed}
    config = trl.FusedKTOConfig(**options(tmp_path, **changes), loss=loss)
    reference = None if precomputed else tiny_llama(5)
    run = trainer(trl.FusedKTOTrainer, config, ref_model=reference)
    watched_steps(run, waits)
    run.train()
    assert waits.found == []
