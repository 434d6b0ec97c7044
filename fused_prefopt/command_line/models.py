"""Tokenizers and language models that a configuration names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from fused_prefopt.checks import closest
from fused_prefopt.command_line.errors import UserError, require_packages
from fused_prefopt.command_line.records import texts_of
from fused_prefopt.command_line.settings import Settings
from fused_prefopt.data import train_tokenizer

_VOCABULARY = 2048


def load_tokenizer(settings: Settings, records: Iterable[Mapping[str, Any]]) -> Any:
    """The tokenizer that the settings name, with a padding token.

    Args:
        settings: `tokenizer`, else `model`; an untrained model without either gets one trained on
            the records, with the `vocab_size` of its config or 2048 entries.
        records: to train on.

    Raises:
        OSError: there is no such tokenizer.
    """
    from transformers import AutoTokenizer

    name = settings.tokenizer or settings.model
    if name is None:
        size = int((settings.model_config or {}).get("vocab_size", _VOCABULARY))
        return train_tokenizer(texts_of(records), size)
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_start(settings: Settings, tokenizer: Any, seed: int) -> nn.Module:
    """The model that training starts from.

    Args:
        settings: `model`, or `model_config` for an untrained one.
        tokenizer: gives an untrained model its vocabulary size and special tokens.
        seed: of untrained weights.

    Raises:
        OSError: there is no such model.
        ValueError: the config names no known architecture.
    """
    if settings.model is not None:
        return _pretrained(settings, settings.model)
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    own = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "max_position_embeddings": settings.max_length,
    }
    given = own | (settings.model_config or {})
    if "model_type" not in given:
        raise UserError("model_config: got no model_type, needs one such as llama")
    set_seed(seed)
    config = AutoConfig.for_model(**given)
    model = AutoModelForCausalLM.from_config(config, **_attention(settings))
    return model if settings.dtype == "auto" else model.to(getattr(torch, settings.dtype))


def load_reference(settings: Settings, tokenizer: Any, seed: int) -> nn.Module:
    """A model of its own to compare with: `reference_model`, else the start of training.

    Raises:
        OSError: there is no such model.
    """
    if settings.reference_model is not None:
        return _pretrained(settings, settings.reference_model).eval()
    return load_start(settings, tokenizer, seed).eval()


def with_adapters(model: nn.Module, options: Mapping[str, Any], seed: int) -> nn.Module:
    """The model with LoRA adapters that train while it does not.

    Args:
        model: causal language model.
        options: of `peft.LoraConfig`.
        seed: of the adapters' weights.

    Raises:
        UserError: peft is missing, or an option is unknown; the message has the closest ones.
        ValueError: an option does not fit the model.
    """
    require_packages("peft", "peft")
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    known = [each.name for each in fields(LoraConfig)]
    for name in options:
        if name not in known:
            raise UserError(f"peft: unknown key {name!r}{closest(str(name), known)}")
    set_seed(seed)
    return get_peft_model(model, LoraConfig(**{"task_type": "CAUSAL_LM", **options}))


def _pretrained(settings: Settings, name: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(name, dtype=settings.dtype, **_attention(settings))


def _attention(settings: Settings) -> dict[str, str]:
    chosen = settings.attn_implementation
    return {} if chosen is None else {"attn_implementation": chosen}
