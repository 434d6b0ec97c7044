"""A mixture of experts' load-balancing loss beside the preference loss."""

from __future__ import annotations

import pytest
import torch
from model_families import assert_gradients, family, fused, gradients, own_loss, pairs


def test_it_is_part_of_the_loss_and_logged():
    model, batch = family("qwen3-moe"), pairs()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    balance = model(**inputs).aux_loss
    loss, _, metrics = fused(model, batch)
    assert metrics["aux_loss"] == pytest.approx(balance.item(), rel=1e-9) and balance > 1
    model.config.output_router_logits = False
    alone, _, metrics = fused(model, batch)
    assert "aux_loss" not in metrics
    torch.testing.assert_close(loss - alone, 0.3 * balance.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["prompt", "encoder"])
def test_it_counts_the_virtual_tokens_of_a_learned_prompt(kind):
    pytest.importorskip("peft")
    from learned_prompts import prompted

    model, batch = prompted("mixtral", kind), pairs()
    truth = own_loss(model, batch)
    wanted = gradients(model, truth)
    loss, got, metrics = fused(model, batch)
    torch.testing.assert_close(loss, truth, rtol=1e-9, atol=0)
    assert_gradients(got, wanted)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert metrics["aux_loss"] == pytest.approx(model(**inputs).aux_loss.item(), rel=1e-6)


def test_one_of_other_arguments_is_an_error(monkeypatch):
    def unusual(gate_logits, num_experts, num_keys, top_k=2, attention_mask=None):
        raise AssertionError("called")

    model = family("mixtral")
    monkeypatch.setattr(f"{type(model).__module__}.load_balancing_loss_func", unusual)
    with pytest.raises(ValueError, match="router loss of MixtralForCausalLM takes .*num_keys"):
        fused(model, pairs())
