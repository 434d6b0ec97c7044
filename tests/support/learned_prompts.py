"""Models with an adapter that learns a prompt, and what PEFT's own forward gives of them."""

from __future__ import annotations

from typing import Any

import peft
import torch
import transformers
from model_families import SIZES, VOCAB, family
from torch import Tensor, nn

import fused_prefopt as fp

VIRTUAL = 3
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "prompt": (peft.PromptTuningConfig, {}),
    "encoder": (peft.PromptEncoderConfig, {"encoder_hidden_size": 16}),
    "prefix": (peft.PrefixTuningConfig, {}),
    "projected prefix": (
        peft.PrefixTuningConfig,
        {"prefix_projection": True, "encoder_hidden_size": 16},
    ),
}


def adapter(kind: str, **options: Any) -> Any:
    """A configuration of PEFT's."""
    config, own = KINDS[kind]
    return config(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, **own, **options)


def opt() -> nn.Module:
    """An OPT, whose positions are counted from the attention mask and start at two."""
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        do_layer_norm_before=True,
    )
    return transformers.OPTForCausalLM(config).double().eval()


def base_model(name: str) -> nn.Module:
    """A float64 model with weights that make a prompt matter."""
    if name == "opt":
        model = opt()
    elif name == "gpt-neox":
        sizes = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
        torch.manual_seed(0)
        model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes)).double()
    else:
        model = family(name)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() == 2:
                value.add_(torch.randn(value.shape, generator=generator).to(value) * 0.15)
    return model.eval()


def prompted(name: str = "llama", kind: str = "prompt", **options: Any) -> Any:
    """A float64 model in eval mode behind an adapter of random values."""
    torch.manual_seed(3)
    return peft.get_peft_model(base_model(name), adapter(kind, **options)).double().eval()


def own_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """(S, L, V) logits of the batch's own tokens, by the model's own forward."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return model(**inputs).logits[:, -batch["input_ids"].shape[1] :]


def sums_of(logits: Tensor, batch: dict[str, Tensor], part: str = "completion") -> Tensor:
    """(S,) log-prob sums of the completions, or of the prompts but for their first tokens."""
    logps = logits[:, :-1].log_softmax(-1)
    targets, chosen = batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:] != 0
    if part == "prompt":
        chosen = ~chosen & (batch["attention_mask"][:, 1:] != 0)
    return logps.gather(-1, targets[..., None])[..., 0].where(chosen, 0.0).sum(1)


def own_sums(model: nn.Module, batch: dict[str, Tensor], part: str = "completion") -> Tensor:
    """The same of a model's own forward."""
    return sums_of(own_logits(model, batch), batch, part)


def loss_of(
    logits: Tensor, batch: dict[str, Tensor], loss_fn: fp.PreferenceLoss, **fields: Tensor
) -> Tensor:
    """The loss of the completions' sums."""
    lengths = batch["completion_mask"][:, 1:].sum(1)
    return loss_fn.from_logps(fp.LogpBatch(sums_of(logits, batch), lengths, **fields)).loss


def own_loss(
    model: nn.Module, batch: dict[str, Tensor], loss_fn: fp.PreferenceLoss, **fields: Tensor
) -> Tensor:
    """The same of a model's own forward."""
    return loss_of(own_logits(model, batch), batch, loss_fn, **fields)
