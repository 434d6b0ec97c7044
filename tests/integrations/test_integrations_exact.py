"""Log-probs and scores past wrappers that round what they see, as FSDP and DeepSpeed do."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_integrations_transformers import arguments
from tiny_models import pair_features, point_features, tiny_llama
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.utils import _apply_to_tensors
from transformers import Trainer

import fused_prefopt as fp
from fused_prefopt.data import PairCollator, PointCollator
from fused_prefopt.integrations.past_wrappers import exact_loss, past_wrappers
from fused_prefopt.integrations.transformers import PreferenceTrainer, attach
from fused_prefopt.reference import add_reference_logps

HALF = torch.bfloat16


def rounded(values):
    def to_half(value):
        return value.to(HALF) if value.is_floating_point() else value

    return _apply_to_tensors(to_half, values)


class Rounding(nn.Module):
    """Casts the arguments and results of a call, as FSDP2's root unit does."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **arguments):
        return rounded(self.module(**rounded(arguments)))


def far_pairs(count):
    """Pairs whose log-probs under the reference are far from what bf16 holds."""
    return [
        {**row, "ref_chosen_logps": -350.3 - i / 7, "ref_rejected_logps": -351.9 + i / 9}
        for i, row in enumerate(pair_features(count))
    ]


def far_points(count):
    return [
        {**row, "reference": -350.3 - i / 7, "prompt_reference": -10.1 - i / 7}
        for i, row in enumerate(point_features(count))
    ]


@pytest.mark.parametrize("kind", ["pairs", "points"])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_trainers_loss_is_that_of_the_bare_model(tmp_path, kind, autocast):
    features, collator, name = {
        "pairs": (far_pairs(4), PairCollator(0), "dpo"),
        "points": (far_points(4), PointCollator(0), "dro"),
    }[kind]
    trainer = PreferenceTrainer(
        tiny_llama(),
        arguments(tmp_path, bf16=autocast),
        train_dataset=features,
        data_collator=collator,
        loss_fn=fp.PreferenceLoss(name),
    )
    inputs = collator(features)
    wrapped = Rounding(trainer.model)
    with trainer.accelerator.autocast():
        wanted = trainer.model(**inputs)["loss"]
        found = trainer.compute_loss(wrapped, inputs)
        again, outputs = trainer.compute_loss(wrapped, inputs, return_outputs=True)
    assert found.dtype == torch.float32 and outputs["loss"].dtype == HALF
    assert torch.equal(found, wanted) and torch.equal(again, wanted)
    # Otherwise the test could not fail.
    assert wanted.to(HALF) != wanted
    found.backward()
    gradients = [value.grad.clone() for value in trainer.model.parameters()]
    trainer.model.zero_grad()
    wanted.backward()
    for value, gradient in zip(trainer.model.parameters(), gradients, strict=True):
        torch.testing.assert_close(gradient, value.grad)


def test_other_batches_of_the_trainer_are_left_alone(tmp_path):
    trainer = PreferenceTrainer(
        tiny_llama(), arguments(tmp_path), loss_fn=fp.PreferenceLoss("simpo")
    )
    ids = torch.arange(1, 9)[None]
    found = trainer.compute_loss(trainer.model, {"input_ids": ids, "labels": ids})
    assert torch.equal(found, tiny_llama()(input_ids=ids, labels=ids).loss)


def test_deepspeeds_cast_of_a_batch_leaves_its_fields(tmp_path, monkeypatch):
    trainer = PreferenceTrainer(tiny_llama(), arguments(tmp_path), loss_fn=fp.PreferenceLoss("dpo"))
    inputs = PairCollator(0)(far_pairs(4)) | {"pixel_values": torch.rand(2)}
    monkeypatch.setattr(Trainer, "_prepare_input", lambda self, data: rounded(data))
    prepared = trainer._prepare_inputs(inputs)
    for name in ("ref_chosen_logps", "ref_rejected_logps", "rewards", "input_ids"):
        assert torch.equal(prepared[name], inputs[name]), name
        assert prepared[name].dtype == inputs[name].dtype, name
    assert prepared["pixel_values"].dtype == HALF


def test_rounded_log_probs_are_refused():
    model = tiny_llama()
    attach(model, fp.PreferenceLoss("dpo"))
    batch = PairCollator(0)(far_pairs(4))
    with pytest.raises(ValueError, match=r"reference: got torch.bfloat16, needs float32; if the m"):
        Rounding(model)(**batch)
    assert Rounding(model)(**past_wrappers(batch))["loss"].isfinite()


def test_a_reference_with_a_wrapper_of_its_own_is_exact():
    model, features = tiny_llama(), pair_features(4)
    losses = []
    for reference in (tiny_llama(7), Rounding(tiny_llama(7))):
        attachment = attach(model, fp.PreferenceLoss("dpo"), reference=reference)
        losses.append(model(**PairCollator(0)(features))["loss"])
        attachment.detach()
    assert torch.equal(*losses)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pairs", "points"])
def test_trls_trainers_are_exact(tmp_path, kind):
    pytest.importorskip("trl")
    import test_integrations_points as points
    import test_integrations_trl as pairs

    from fused_prefopt.integrations.trl import (
        FusedDPOConfig,
        FusedDPOTrainer,
        FusedKTOConfig,
        FusedKTOTrainer,
    )

    reference = tiny_llama(5)
    if kind == "pairs":
        config = FusedDPOConfig(**pairs.options(tmp_path))
        run = pairs.trainer(FusedDPOTrainer, config, pairs.dataset(), ref_model=reference)
    else:
        config = FusedKTOConfig(**pairs.options(tmp_path))
        run = points.trainer(FusedKTOTrainer, config, ref_model=reference)
    batch = next(iter(run.get_train_dataloader()))
    wanted = run.compute_loss(run.model, dict(batch))
    run.ref_model = Rounding(run.ref_model)
    found = run.compute_loss(Rounding(run.model), dict(batch))
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)
    assert wanted.to(HALF) != wanted


POLICY = MixedPrecisionPolicy(param_dtype=HALF, reduce_dtype=torch.float32, output_dtype=HALF)
PAIRS = 8
# Submodules that are a unit each, or together, beside the root.
LAYOUTS = {
    "head in the root": ["model.layers.0"],
    "head of its own": ["model.layers.0", "lm_head"],
    "norm and head": ["model.layers.0", ("model.norm", "lm_head")],
    "tied": ["model.layers.0", ("model.norm", "model.embed_tokens", "lm_head")],
}


def build(layout):
    return tiny_llama(tie_word_embeddings=layout == "tied")


def sharded(layout):
    """A model in accelerate's mixed precision."""
    model, mesh = build(layout), init_device_mesh("cpu", (2,))
    for unit in LAYOUTS[layout]:
        several = not isinstance(unit, str)
        names = unit if several else (unit,)
        modules = [model.get_submodule(name) for name in names]
        fully_shard(modules if several else modules[0], mesh=mesh, mp_policy=POLICY)
    return fully_shard(model, mesh=mesh, mp_policy=POLICY)


def step(model, features):
    """Loss, metrics and gradients; the model may be sharded."""
    attachment = attach(model, fp.PreferenceLoss("dpo"))
    inputs = past_wrappers(PairCollator(0)(features))
    returned = model(**inputs)["loss"]
    loss = exact_loss(returned, inputs)
    loss.backward()
    gradients = {
        name: getattr(value.grad, "full_tensor", lambda value=value: value.grad)()
        for name, value in model.named_parameters()
    }
    return {
        "dtypes": (loss.dtype, returned.dtype),
        "loss": loss.detach(),
        "metrics": attachment.pop_metrics("train"),
        "gradients": gradients,
    }


def _work(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    found = {}
    for layout in LAYOUTS:
        rows = add_reference_logps(
            sharded(layout), pair_features(PAIRS), PairCollator(0), batch_size=4, progress=False
        )
        points = add_reference_logps(
            sharded(layout), point_features(PAIRS), PointCollator(0), batch_size=4, progress=False
        )
        found[layout] = (rows, points, step(sharded(layout), far_pairs(PAIRS)[rank::2]))
    torch.save(found, f"{folder}/{rank}.pt")
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_work, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def in_half(layout):
    """The model as FSDP2 computes it: parameters in bf16, buffers as they are."""
    model = build(layout)
    for value in model.parameters():
        value.data = value.data.to(HALF)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_reference_log_probs_under_fsdps_mixed_precision(ranks, layout):
    dense = in_half(layout)
    cases = (
        (0, pair_features(PAIRS), PairCollator(0), ("ref_chosen_logps", "ref_rejected_logps")),
        (1, point_features(PAIRS), PointCollator(0), ("reference", "prompt_reference")),
    )
    for which, features, collator, columns in cases:
        wanted = add_reference_logps(dense, features, collator, batch_size=4, progress=False)
        for name in columns:
            values = [row[name] for row in wanted]
            for found in ranks:
                got = [row[name] for row in found[layout][which]]
                assert got == pytest.approx(values, rel=1e-6)
            assert values != rounded(torch.tensor(values)).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_under_fsdps_mixed_precision(ranks, layout):
    features = far_pairs(PAIRS)
    halves = [step(in_half(layout), features[rank::2]) for rank in range(2)]
    first, second = (found[layout][2] for found in ranks)
    assert first["dtypes"] == (torch.float32, HALF)
    metrics = first["metrics"]
    assert metrics == second["metrics"]
    for side in ("chosen", "rejected"):
        reference = sum(row[f"ref_{side}_logps"] for row in features) / PAIRS
        found = metrics[f"logps/{side}"] - metrics[f"kl/{side}"]
        assert found == pytest.approx(reference, rel=1e-6)
    for found, alone in zip((first, second), halves, strict=True):
        torch.testing.assert_close(found["loss"], alone["loss"], rtol=1e-6, atol=0)
    gradients = [alone["gradients"] for alone in halves]
    assert first["gradients"].keys() == gradients[0].keys()
    for name, found in first["gradients"].items():
        wanted = sum(each[name].float() for each in gradients) / 2
        # The dense model keeps its gradients in bf16.
        assert (found - wanted).norm() <= 0.01 * wanted.norm(), name
