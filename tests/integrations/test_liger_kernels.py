"""Beside Liger's kernels: its fused loss is left out, a gradient may be overwritten in place.

The kernels themselves need a GPU; here they are off, and Liger's forward is in its place.
"""

from __future__ import annotations

import pytest
import torch
from model_families import assert_gradients, family, fused, gradients, own_loss, pairs
from tiny_models import tiny_llama
from trainers import build

import fused_prefopt as fp


@pytest.mark.parametrize(
    ("name", "kernels"),
    [("llama", {"swiglu": False}), ("qwen3", {"swiglu": False}), ("gemma2", {"geglu": False})],
)
def test_beside_ligers_forward_its_own_loss_is_not_called(name, kernels, monkeypatch):
    patches = pytest.importorskip("liger_kernel.transformers")
    model, batch = family(name), pairs()
    truth = own_loss(model, batch)
    wanted = gradients(model, truth)
    # Without a GPU none of its kernels can run.
    options = {"rope": False, "rms_norm": False, "fused_linear_cross_entropy": True} | kernels
    getattr(patches, f"apply_liger_kernel_to_{name}")(model=model, **options)
    patched = model.forward.__func__
    monkeypatch.setitem(patched.__globals__, "LigerForCausalLMLoss", None)
    loss, got, _ = fused(model, batch)
    torch.testing.assert_close(loss, truth, rtol=1e-9, atol=0)
    assert_gradients(got, wanted)
    assert model.forward.__func__ is patched


@pytest.mark.parametrize("kind", ["transformers", "dpo"])
def test_a_trainer_with_ligers_kernels_leaves_out_its_loss(kind, tmp_path, monkeypatch):
    pytest.importorskip("liger_kernel")
    from liger_kernel.transformers.model import llama

    monkeypatch.setattr(llama, "LigerForCausalLMLoss", None)
    config = {"rope": False, "rms_norm": False, "swiglu": False}
    states = []
    for options in ({}, {"use_liger_kernel": True, "liger_kernel_config": config}):
        run = build(kind, tmp_path, loss="simpo", max_steps=2, **options)
        run.train()
        states.append(run.model.state_dict())
    start = tiny_llama().state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in states[0].items())
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value), name


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
    assert_gradients(fused(model, batch, fp.PreferenceLoss("simpo", path=path))[1], wanted)
