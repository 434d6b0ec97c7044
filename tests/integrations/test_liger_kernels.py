"""Beside Liger's kernels: its fused loss is left out, a gradient may be overwritten in place.

The kernels themselves need a GPU; here they are off, and Liger's forward is in its place.
"""

from __future__ import annotations

import pytest
import torch
from tiny_models import pair_features, tiny_llama

import fused_prefopt as fp
from fused_prefopt.data import PairCollator

pytest.importorskip("transformers")

from model_families import assert_gradients, family, fused, gradients, own_loss, pairs
from test_integrations_transformers import arguments

from fused_prefopt.integrations.transformers import PreferenceTrainer


def liger(name, model, **kernels):
    """Liger's patches on a model: without a GPU none of its kernels can run."""
    patches = pytest.importorskip("liger_kernel.transformers")
    options = {"rope": False, "rms_norm": False, "fused_linear_cross_entropy": True} | kernels
    getattr(patches, f"apply_liger_kernel_to_{name}")(model=model, **options)


@pytest.mark.parametrize(
    ("name", "kernels"),
    [("llama", {"swiglu": False}), ("qwen3", {"swiglu": False}), ("gemma2", {"geglu": False})],
)
def test_beside_ligers_forward_its_own_loss_is_not_called(name, kernels, monkeypatch):
    model, batch = family(name), pairs()
    truth = own_loss(model, batch)
    wanted = gradients(model, truth)
    liger(name, model, **kernels)
    patched = model.forward.__func__
    monkeypatch.setitem(patched.__globals__, "LigerForCausalLMLoss", None)
    loss, got, _ = fused(model, batch)
    torch.testing.assert_close(loss, truth, rtol=1e-9, atol=0)
    assert_gradients(got, wanted)
    assert model.forward.__func__ is patched


@pytest.mark.parametrize("kind", ["transformers", "trl"])
def test_a_trainer_with_ligers_kernels_leaves_out_its_loss(kind, tmp_path, monkeypatch):
    pytest.importorskip("liger_kernel")
    if kind == "trl":
        pytest.importorskip("trl")
    from liger_kernel.transformers.model import llama

    monkeypatch.setattr(llama, "LigerForCausalLMLoss", None)
    steps = {"transformers": trained_by_transformers, "trl": trained_by_trl}[kind]
    plain = steps(tmp_path / "plain")
    config = {"rope": False, "rms_norm": False, "swiglu": False}
    ours = steps(tmp_path / "liger", use_liger_kernel=True, liger_kernel_config=config)
    start = tiny_llama().state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in plain.items())
    for name, value in plain.items():
        assert torch.equal(ours[name], value), name


def trained_by_transformers(folder, **options):
    model = tiny_llama()
    PreferenceTrainer(
        model,
        arguments(folder, **options),
        train_dataset=pair_features(8),
        data_collator=PairCollator(0),
        loss_fn=fp.PreferenceLoss("simpo"),
    ).train()
    return model.state_dict()


def trained_by_trl(folder, **changes):
    from test_integrations_trl import dataset, options, trainer

    from fused_prefopt.integrations.trl import FusedDPOConfig, FusedDPOTrainer

    config = FusedDPOConfig(**options(folder, loss="simpo", max_steps=2, **changes))
    built = trainer(FusedDPOTrainer, config, dataset())
    built.train()
    return built.model.state_dict()


class InPlaceNorm(torch.autograd.Function):
    """A norm whose backward writes into the gradient it is given, as Liger's RMSNorm does."""

    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.save_for_backward(hidden, weight)
        return hidden * weight

    @staticmethod
    def backward(ctx, grad):
        hidden, weight = ctx.saved_tensors
        to_weight = (grad * hidden).sum((0, 1))
        return grad.mul_(weight), to_weight


@pytest.mark.parametrize("path", ["auto", "local", "recompute", "stash"])
def test_a_backbone_may_overwrite_the_gradient_it_gets(path):
    model, batch = family("llama"), pairs()
    model.lm_head.weight.requires_grad_(path != "stash")
    norm = model.model.norm
    norm.forward = lambda hidden: hidden * norm.weight
    wanted = gradients(model, own_loss(model, batch))
    norm.forward = lambda hidden: InPlaceNorm.apply(hidden, norm.weight)
    assert_gradients(fused(model, batch, path=path)[1], wanted)
