"""Tiny random models of the families that people train, in float64, and their own loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import fused_prefopt as fp
from fused_prefopt.data import PairCollator
from fused_prefopt.integrations.transformers import attach

VOCAB = 101
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
GPT |= {"bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"output_router_logits": True, "router_aux_loss_coef": 0.3}
CAPPED = {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8, "sliding_window": 16}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
QWEN_VISION = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4}
ROTARY = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
IMAGE, VIDEO, START, END = 96, 97, 98, 99
# Name → config class and its options; of multimodal models those of its parts.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SIZES),
    "mistral": ("MistralConfig", SIZES),
    "qwen2": ("Qwen2Config", SIZES | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", SIZES),
    "gemma2": ("Gemma2Config", SIZES | CAPPED),
    "gemma3": ("Gemma3TextConfig", SIZES | CAPPED),
    "cohere": ("CohereConfig", SIZES | {"logit_scale": 0.25}),
    "cohere2": ("Cohere2Config", SIZES | {"logit_scale": 0.25, "sliding_window": 16}),
    "granite": ("GraniteConfig", SIZES | {"logits_scaling": 4.0}),
    "phi": ("PhiConfig", SIZES),
    "olmo": ("OlmoConfig", SIZES),
    "olmo2": ("Olmo2Config", SIZES),
    "gpt2": ("GPT2Config", GPT | {"tie_word_embeddings": True}),
    "gptj": ("GPTJConfig", GPT | {"rotary_dim": 8}),
    "ctrl": ("CTRLConfig", GPT | {"dff": 48, "tie_word_embeddings": True}),
    "gpt-neox": ("GPTNeoXConfig", SIZES),
    "gpt-neox, tied": ("GPTNeoXConfig", SIZES | {"tie_word_embeddings": True}),
    "mixtral": ("MixtralConfig", SIZES | ROUTED | {"num_local_experts": 4}),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        SIZES | ROUTED | EXPERTS | {"shared_expert_intermediate_size": 16},
    ),
    "qwen3-moe": ("Qwen3MoeConfig", SIZES | ROUTED | EXPERTS),
    "qwen3-moe, balance unweighed": ("Qwen3MoeConfig", SIZES | EXPERTS),
    "granite-moe": (
        "GraniteMoeConfig",
        SIZES | ROUTED | {"num_local_experts": 4, "logits_scaling": 4.0},
    ),
    "llama4, text half": (
        "Llama4TextConfig",
        SIZES | {"intermediate_size_mlp": 48, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "llava": (
        "LlavaConfig",
        {
            "text_config": SIZES | {"model_type": "llama"},
            "vision_config": VISION | {"model_type": "clip_vision_model"},
            "image_token_index": IMAGE,
        },
    ),
    "qwen2-vl": (
        "Qwen2VLConfig",
        {
            "text_config": SIZES | {"rope_scaling": ROTARY},
            "vision_config": QWEN_VISION,
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "vision_start_token_id": START,
            "vision_end_token_id": END,
        },
    ),
    "qwen3-vl-moe": (
        "Qwen3VLMoeConfig",
        {
            "text_config": SIZES | ROUTED | EXPERTS | {"rope_scaling": ROTARY},
            "vision_config": QWEN_VISION | {"out_hidden_size": 32, "intermediate_size": 24},
        },
    ),
    "gemma3, with images": (
        "Gemma3Config",
        {
            "text_config": SIZES | CAPPED,
            "vision_config": VISION,
            "image_token_index": IMAGE,
            "mm_tokens_per_image": 4,
        },
    ),
}


def family(name: str) -> nn.Module:
    """A random float64 model in eval mode, with logits of some size."""
    config_class, options = FAMILIES[name]
    if not hasattr(transformers, config_class):
        pytest.skip(f"this transformers has no {config_class}")
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**options)
    parts = "text_config" in options
    auto = transformers.AutoModelForImageTextToText if parts else transformers.AutoModelForCausalLM
    experts = {}
    # The other implementations of experts, where transformers has some, have no float64.
    if hasattr(transformers.PreTrainedModel, "set_experts_implementation"):
        sizes = options.get("text_config", options)
        experts = {"experts_implementation": "eager"} if any("experts" in k for k in sizes) else {}
    model = auto.from_config(config, **experts).double().eval()
    head = model.get_output_embeddings()
    nn.init.normal_(head.weight)
    if getattr(head, "bias", None) is not None:
        nn.init.normal_(head.bias)
    return model


def pairs(count: int = 3) -> dict[str, Any]:
    """A collated batch of ragged pairs."""
    generator = torch.Generator().manual_seed(1)

    def ids(low: int, high: int) -> list[int]:
        size = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(3, 90, (size,), generator=generator).tolist()

    features = [
        {"prompt_ids": ids(2, 5), "chosen_ids": ids(1, 7), "rejected_ids": ids(1, 7)}
        for _ in range(count)
    ]
    return PairCollator(0)(features)


def own_loss(model: nn.Module, batch: dict[str, Any], name: str = "simpo") -> Tensor:
    """A loss without a reference through the model's own logits, with its own router loss."""
    inputs = {key: value for key, value in batch.items() if key != "completion_mask"}
    outputs = model(**inputs, use_cache=False)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)[:, 1:]
    logps = outputs.logits[:, :-1].log_softmax(-1)
    picked = logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0].where(labels != -100, 0.0)
    sums = fp.LogpBatch(picked.sum(1), (labels != -100).sum(1))
    loss = fp.PreferenceLoss(name).from_logps(sums).loss
    balance = getattr(outputs, "aux_loss", None)
    return (
        loss
        if balance is None
        else loss + model.config.get_text_config().router_aux_loss_coef * balance
    )


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradients of the loss by parameter; the model's are cleared."""
    model.zero_grad()
    loss.backward()
    found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    return found


def fused(
    model: nn.Module, batch: dict[str, Any], name: str = "simpo", **options: Any
) -> tuple[Tensor, dict[str, Tensor], dict[str, float]]:
    """Loss, gradients and metrics by an attached loss; the model's forward is given back."""
    attachment = attach(model, fp.PreferenceLoss(name, **options))
    loss = model(**batch)["loss"]
    found = gradients(model, loss)
    attachment.detach()
    return loss, found, attachment.pop_metrics("eval")


def assert_same(
    model: nn.Module, batch: dict[str, Any], tolerance: float = 1e-9, **options: Any
) -> None:
    """Ours against the model's own logits; the gradients are those of all trained parameters."""
    truth = own_loss(model, batch)
    wanted = gradients(model, truth)
    loss, got, _ = fused(model, batch, **options)
    torch.testing.assert_close(loss, truth, rtol=tolerance, atol=0)
    assert_gradients(got, wanted, tolerance)


def assert_gradients(
    got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-9
) -> None:
    """The same parameters have gradients, and each is within the relative tolerance."""
    largest = float(max(value.norm() for value in wanted.values()))
    assert got.keys() == wanted.keys() and largest > 0
    for name, value in wanted.items():
        distance = float((got[name] - value).norm())
        assert distance <= tolerance * float(value.norm()) + 1e-12 * largest, name
