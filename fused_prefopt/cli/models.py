"""Tokenizers and language models that a configuration names, and what their passes compute in."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fused_prefopt.checks import closest, require_count
from fused_prefopt.cli.config import Settings
from fused_prefopt.cli.console import UserError, blaming, require_packages
from fused_prefopt.data import train_tokenizer
from fused_prefopt.data.columns import COMPLETION, CONTENT, GOLD, PAIR, PROMPT

_VOCABULARY = 2048
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}


def load_tokenizer(settings: Settings, records: Iterable[Mapping[str, Any]]) -> Any:
    """The tokenizer that the settings name, with a padding token.

    Args:
        settings: `tokenizer`, else `model`; an untrained model without either gets one trained on
            the records, with the `vocab_size` of its config or 2048 entries.
        records: to train on.

    Raises:
        UserError: there is no such tokenizer.
    """
    from transformers import AutoTokenizer

    name = settings.tokenizer or settings.model
    if name is None:
        size = int((settings.model_config or {}).get("vocab_size", _VOCABULARY))
        return train_tokenizer(texts_of(records), size)
    if settings.tokenizer is None:
        _check_folder(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        key, remedy = "tokenizer", "needs a hub name or a folder that has one"
        if settings.tokenizer is None:
            key, remedy = "model", "name one with the key tokenizer"
        reason = str(error).strip().splitlines()[0].rstrip(":")
        raise UserError(
            f"{key}: got {name!r}, whose tokenizer cannot be loaded ({reason}); {remedy}"
        ) from error
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
        UserError: what is there has no weights for the head, or cannot be read; the config is
            none of a causal language model.
    """
    if settings.model is not None:
        return _pretrained(settings, "model", settings.model)
    from transformers import AutoModelForCausalLM, set_seed

    own = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "max_position_embeddings": settings.max_length,
    }
    given = own | (settings.model_config or {})
    set_seed(seed)
    with blaming("model_config"), _readable(settings):
        config = _config(given)
        model = AutoModelForCausalLM.from_config(config, **_attention(settings))
    return model if settings.dtype == "auto" else model.to(getattr(torch, settings.dtype))


def load_reference(settings: Settings, tokenizer: Any, seed: int) -> nn.Module:
    """A model of its own to compare with: `reference_model`, else the start of training.

    Raises:
        OSError: there is no such model.
        UserError: as in `load_start`; or the model has a tokenizer that numbers tokens otherwise.
    """
    if settings.reference_model is not None:
        _check_tokenizer(settings.reference_model, tokenizer)
        return _pretrained(settings, "reference_model", settings.reference_model).eval()
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
    if "r" in options:
        require_count("r", options["r"], low=1)
    set_seed(seed)
    return get_peft_model(model, LoraConfig(**{"task_type": "CAUSAL_LM", **options}))


def training_autocast(training: Any) -> AbstractContextManager[Any]:
    """Autocast as the trainer's forward passes run under it, for passes before and after them.

    A policy in bf16 beside reference log-probs in fp32 would start with a reward that is rounding.

    Args:
        training: `transformers.TrainingArguments`; without `bf16` and `fp16` the launcher decides,
            as it does for the trainer.
    """
    given = "bf16" if training.bf16 else "fp16" if training.fp16 else None
    dtype = _DTYPES.get(given or os.environ.get("ACCELERATE_MIXED_PRECISION", "no"))
    return nullcontext() if dtype is None else torch.autocast(training.device.type, dtype)


def texts_of(records: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Every text and every message of records, to train a tokenizer on."""
    for record in records:
        for name in (PROMPT, *PAIR, GOLD, COMPLETION):
            text = record.get(name, [])
            yield from [text] if isinstance(text, str) else (each[CONTENT] for each in text)


def _pretrained(settings: Settings, key: str, name: str) -> nn.Module:
    """The model that a key names, with all its weights from there."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    _check_folder(name, key)
    try:
        with _readable(settings):
            model, found = AutoModelForCausalLM.from_pretrained(
                name, dtype=settings.dtype, output_loading_info=True, **_attention(settings)
            )
    except SafetensorError as error:
        raise UserError(f"{key}: got {name!r}, whose weights are damaged: {error}") from error
    except OSError as error:
        reason = str(error).strip().splitlines()[0].rstrip(". ")
        raise UserError(
            f"{key}: got {name!r}, which cannot be loaded ({reason}); needs a hub name or a folder"
            " with config and weights"
        ) from error
    if found["missing_keys"]:
        raise UserError(f"{key}: {_missing(name, model, found['missing_keys'])}")
    return model


def _missing(name: str, model: Any, keys: Iterable[str]) -> str:
    """What a checkpoint lacks, its head first."""
    head = model.get_output_embeddings()
    heads = {f"{path}.weight" for path, module in model.named_modules() if module is head}
    missing = sorted(keys, key=lambda each: (each not in heads, each))
    kinds = " or ".join(model.config.architectures or ["something else"])
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    random = "its head" if missing[0] in heads else "weights"
    return (
        f"{name} has no {missing[0]}{more} (it was saved as {kinds}), so {random} would be random;"
        " name a causal language model"
    )


def _check_folder(name: str, key: str = "model") -> None:
    """Raise where a local folder is no saved model."""
    folder = Path(name)
    configs = ("config.json", "adapter_config.json")
    if folder.is_dir() and not any((folder / each).is_file() for each in configs):
        raise UserError(
            f"{key}: got {name!r}, a folder without config.json, needs one that save_pretrained"
            " wrote"
        )


def _check_tokenizer(name: str, tokenizer: Any) -> None:
    """Raise where the reference numbers tokens otherwise; without a tokenizer it is believed."""
    from transformers import AutoTokenizer

    try:
        own = AutoTokenizer.from_pretrained(name).get_vocab()
    except (OSError, ValueError, ImportError):
        return
    for token, number in tokenizer.get_vocab().items():
        if own.get(token, number) != number:
            raise UserError(
                f"reference_model: got {name!r}, whose tokenizer has {token!r} as {own[token]},"
                f" needs {number} as the policy's has; name a model of the same tokenizer"
            )


def _config(given: dict[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    kind = given.get("model_type")
    if kind is None:
        raise ValueError("got no model_type, needs one such as llama")
    if kind not in CONFIG_MAPPING:
        raise ValueError(
            f"model_type: got {kind!r}{closest(str(kind), CONFIG_MAPPING)}, needs one that"
            " transformers has"
        )
    config = AutoConfig.for_model(**given)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"model_type: got {kind!r}, needs that of a causal language model")
    return config


@contextmanager
def _readable(settings: Settings) -> Iterator[None]:
    """Say which key is to blame where a model cannot be made as it is configured."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except StrictDataclassError as error:  # it is no ValueError
        raise ValueError(" ".join(str(error).split())) from error
    except (ValueError, ImportError) as error:
        wanted, said = settings.attn_implementation, str(error)
        if wanted is None or "attention" not in said.lower() and "attn" not in said.lower():
            raise
        raise UserError(f"attn_implementation: got {wanted!r}: {said}") from error


def _attention(settings: Settings) -> dict[str, str]:
    chosen = settings.attn_implementation
    return {} if chosen is None else {"attn_implementation": chosen}
