"""Fingerprints of a model, of token ids and of a tokenizer: hashes of content, never of a path."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from fused_prefopt.integrations.causal_lm import unwrapped
from fused_prefopt.integrations.wrappers import prompt_learners

TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids", "completion_ids")
_THREADS = 8
# Config entries that say where a model comes from or how it was saved, not what it computes; the
# weights' own dtypes are hashed with them.
_INCIDENTAL = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
# The same of the config of an adapter that learns a prompt.
_OF_ADAPTER = ("base_model_name_or_path", "revision", "peft_version", "auto_mapping")
_ADAPTER_STATE = ("disable_adapters", "active_adapters", "merged", "scaling")


def model_fingerprint(model: nn.Module, *, progress: bool = False) -> str:
    """Hash of everything a model's log-probs depend on: config, every weight, active adapters.

    Every byte counts, since a sample of the weights would miss a small edit such as a merged
    adapter on one layer. Each tensor is hashed on its own, several at a time in threads, as
    hashing releases Python's lock; no more than those few tensors are copied from the device.

    Args:
        model: dense or sharded by FSDP2, in which case every rank must make the call; PEFT's and
            DDP's wrappers do not count, but a prompt that PEFT's adapter learned does.
        progress: show a progress bar.

    Raises:
        ValueError: a weight has no values here, partitioned by ZeRO-3 or offloaded.
    """
    learners, model = prompt_learners(model), unwrapped(model)
    _require_weights(model)
    digest = hashlib.sha256(repr(_settings(model)).encode())
    for name, hashed in _hashed(model, progress):
        digest.update(f"{name}:{hashed}\n".encode())
    for learner in learners:
        digest.update(_of_prompt(learner).encode())
    return digest.hexdigest()


def precision_of(model: nn.Module) -> str:
    """What the model's matmuls compute in here: "weights", or autocast's dtype as "bfloat16"."""
    device = next(model.parameters()).device.type
    if not torch.is_autocast_enabled(device):
        return "weights"
    return str(torch.get_autocast_dtype(device)).removeprefix("torch.")


def data_fingerprint(features: Sequence[Mapping[str, Any]]) -> str:
    """Hash of the token ids of features, in their order.

    Args:
        features: token ids, as `tokenise_pairs` or `tokenise_points` return them.
    """
    digest = hashlib.sha256()
    for feature in features:
        for name in TOKEN_COLUMNS:
            ids = array("q", feature.get(name, ()))
            digest.update(f"{name}:{len(ids)}:".encode())
            digest.update(ids.tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of a tokenizer's vocabulary, rules, special tokens and chat template.

    Args:
        tokenizer: of Hugging Face, fast or slow.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules = sorted(tokenizer.get_vocab().items())
    else:
        rules = json.loads(backend.to_str())
        # The last call's settings, not the tokenizer's.
        rules.pop("padding", None)
        rules.pop("truncation", None)
    special = sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items())
    content = [rules, special, getattr(tokenizer, "chat_template", None)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _require_weights(model: nn.Module) -> None:
    """Raise ValueError where a weight is a placeholder, the same whatever its values are."""
    for name, weight in model.named_parameters():
        if not weight.numel() or weight.is_meta:
            kind = " on the meta device" if weight.is_meta else ""
            raise ValueError(
                f"model: got {name} of shape {tuple(weight.shape)}{kind}, needs its values to"
                " recognise a cache by: compute log-probs before ZeRO-3 partitions the model or"
                " accelerate offloads it, or without a cache"
            )


def _settings(model: nn.Module) -> list[Any]:
    config = getattr(model, "config", None)
    settings = _lasting(config.to_dict()) if config is not None else []
    adapters = [
        (name, *(repr(getattr(module, state, None)) for state in _ADAPTER_STATE))
        for name, module in model.named_modules()
        # A layer's own state; transformers' models have a method of that name.
        if isinstance(getattr(module, "disable_adapters", None), bool)
    ]
    return [settings, adapters]


def _of_prompt(learner: Any) -> str:
    """Config and weights of a learned prompt, which are no part of the model inside."""
    encoder = learner.prompt_encoder[learner.active_adapter]
    _require_weights(encoder)
    config = learner.active_peft_config.to_dict()
    lasting = {name: value for name, value in config.items() if name not in _OF_ADAPTER}
    return repr([_lasting(lasting), list(_hashed(encoder, progress=False))])


def _lasting(settings: Any) -> Any:
    """A config's entries in order of name, also of the configs inside it."""
    if not isinstance(settings, dict):
        return settings
    return [
        (name, _lasting(value))
        for name, value in sorted(settings.items(), key=lambda item: str(item[0]))
        if name not in _INCIDENTAL
    ]


def _hashed(model: nn.Module, progress: bool) -> Iterator[tuple[str, str]]:
    """Name and hash of every tensor, by name."""
    state = sorted(model.state_dict().items())
    names = iter(_bar(state, progress))
    threads = min(_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        while several := list(islice(names, threads)):
            # A sharded tensor is gathered here: ranks must gather in one order.
            whole = [_whole(value) for _, value in several]
            yield from zip([name for name, _ in several], pool.map(_hash, whole), strict=True)


def _whole(value: Any) -> Any:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _hash(value: Any) -> str:
    if not isinstance(value, Tensor):
        return hashlib.sha256(repr(value).encode()).hexdigest()
    digest = hashlib.sha256(f"{value.dtype}:{tuple(value.shape)}".encode())
    digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _bar(state: list[tuple[str, Any]], progress: bool) -> Iterator[tuple[str, Any]]:
    if not progress:
        return iter(state)
    from tqdm.auto import tqdm

    return iter(tqdm(state, desc="fingerprint of the weights", unit="tensor", leave=False))
