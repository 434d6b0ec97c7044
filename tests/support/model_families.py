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
from fused_prefopt.models.model_call import INPUTS

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
EQUAL_HEADS = {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "head_dim")}
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
    "gemma2, uncapped": ("Gemma2Config", SIZES | CAPPED | {"final_logit_softcapping": None}),
    "gemma3": ("Gemma3TextConfig", SIZES | CAPPED),
    "cohere": ("CohereConfig", SIZES | {"logit_scale": 0.25}),
    "cohere2": ("Cohere2Config", SIZES | {"logit_scale": 0.25, "sliding_window": 16}),
    "granite": ("GraniteConfig", SIZES | {"logits_scaling": 4.0}),
    "hyperclovax": ("HyperCLOVAXConfig", SIZES | {"logits_scaling": 0.25}),
    "falcon h1": (
        "FalconH1Config",
        SIZES | {"lm_head_multiplier": 0.5, "mamba_d_ssm": 32, "mamba_n_heads": 4},
    ),
    "recurrent gemma": (
        "RecurrentGemmaConfig",
        SIZES
        | {"num_hidden_layers": 3, "logits_soft_cap": 2.0}
        | {"lru_width": 32, "attention_window_size": 16},
    ),
    "phi": ("PhiConfig", SIZES),
    "olmo": ("OlmoConfig", SIZES),
    "olmo2": ("Olmo2Config", SIZES),
    "gpt2": ("GPT2Config", GPT | {"tie_word_embeddings": True}),
    "gptj": ("GPTJConfig", GPT | {"rotary_dim": 8}),
    "ctrl": ("CTRLConfig", GPT | {"dff": 48, "tie_word_embeddings": True}),
    "opt": (
        # Its positions are counted from the attention mask and start at two.
        "OPTConfig",
        EQUAL_HEADS | {"word_embed_proj_dim": 32, "ffn_dim": 48},
    ),
    "gpt-neox": ("GPTNeoXConfig", EQUAL_HEADS),
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


def own_logits(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """(S, L, V) logits of the batch's own tokens, by the model's own forward."""
    return _own_outputs(model, batch).logits[:, -batch["input_ids"].shape[1] :]


def _own_outputs(model: nn.Module, batch: dict[str, Any]) -> Any:
    given = {name: batch[name] for name in INPUTS if name in batch and name != "position_ids"}
    # PEFT hands a learned prefix over as a cache.
    prompt = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
    return model(**given) if prompt else model(**given, use_cache=False)


def sums_of(logits: Tensor, batch: dict[str, Any], part: str = "completion") -> Tensor:
    """(S,) log-prob sums of the completions, or of the prompts but for their first tokens."""
    logps = logits[:, :-1].log_softmax(-1)
    targets, chosen = batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:] != 0
    if part == "prompt":
        chosen = ~chosen & (batch["attention_mask"][:, 1:] != 0)
    return logps.gather(-1, targets[..., None])[..., 0].where(chosen, 0.0).sum(1)


def own_sums(model: nn.Module, batch: dict[str, Any], part: str = "completion") -> Tensor:
    """The same of a model's own forward."""
    return sums_of(own_logits(model, batch), batch, part)


def own_kl(policy: Tensor, reference: Tensor, batch: dict[str, Any]) -> Tensor:
    """(S,) divergences KL(reference ‖ policy) over the completions' tokens, of two logits."""
    logps, other = (each[:, :-1].log_softmax(-1) for each in (policy, reference))
    counted = batch["completion_mask"][:, 1:] != 0
    return (other.exp() * (other - logps)).sum(-1).where(counted, 0.0).sum(1)


def own_token_metrics(
    model: nn.Module, batch: dict[str, Any], desirable: Tensor | None = None
) -> dict[str, float]:
    """Means over the completions' tokens, by the model's own logits.

    `desirable` (S,) says which sequences are so; default: the first half.
    """
    logits = own_logits(model, batch)[:, :-1].detach().double()
    targets, members = batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:] != 0
    if desirable is None:
        desirable = torch.arange(len(members)) < len(members) // 2
    chosen, rejected = members & desirable[:, None], members & ~desirable[:, None]
    values = {
        "entropy": torch.distributions.Categorical(logits=logits).entropy()[members],
        "logits/chosen": logits.mean(-1)[chosen],
        "logits/rejected": logits.mean(-1)[rejected],
        "mean_token_accuracy": (logits.argmax(-1) == targets)[chosen].double(),
    }
    return {name: each.mean().item() for name, each in values.items()}


def own_loss(
    model: nn.Module, batch: dict[str, Any], loss_fn: fp.PreferenceLoss | None = None, **fields: Any
) -> Tensor:
    """A loss (default: SimPO) through the model's own logits, with its own router loss.

    `fields` are those of `LogpBatch` that the policy's log-probs are not.
    """
    outputs = _own_outputs(model, batch)
    sums = sums_of(outputs.logits[:, -batch["input_ids"].shape[1] :], batch)
    lengths = (batch["completion_mask"][:, 1:] != 0).sum(1)
    loss_fn = loss_fn or fp.PreferenceLoss("simpo")
    loss = loss_fn.from_logps(fp.LogpBatch(sums, lengths, **fields)).loss
    balance = getattr(outputs, "aux_loss", None)
    if balance is None:
        return loss
    return loss + model.config.get_text_config().router_aux_loss_coef * balance


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradients of the loss by parameter; the model's are cleared."""
    model.zero_grad()
    loss.backward()
    found = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()
    return found


def fused(
    model: nn.Module,
    batch: dict[str, Any],
    loss_fn: fp.PreferenceLoss | None = None,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor], dict[str, float]]:
    """Loss, gradients and metrics by an attached loss; the model's forward is given back.

    `options` are those of `attach`.
    """
    attachment = attach(model, loss_fn or fp.PreferenceLoss("simpo"), **options)
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
    loss, got, _ = fused(model, batch, fp.PreferenceLoss("simpo", **options))
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
