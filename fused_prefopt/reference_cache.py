"""Cache of a reference model's log-probs: hashes of what they belong to, and the file they are in.

The file, and the parts that an unfinished run leaves, are safetensors. The header has the
fingerprints of what the log-probs belong to, torch's version for whoever looks, and a hash of all
that and of the columns.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import uuid
from array import array
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused_prefopt.checks import require_packages
from fused_prefopt.data.columns import PROMPT_IDS, TOKEN_WEIGHT_COLUMNS, TOKENS
from fused_prefopt.models.model_call import prompt_learners, unwrapped

SUFFIX = ".logps"
_KIND = "fused_prefopt reference log-probs 3"
# What files of kinds 1 and 2 began with, which torch had saved.
_EARLIER = b"fused_prefopt reference log-probs"
_INDICES = "indices"
_THREADS = 8
# Attempts to read a file that others replace.
_READS = 5
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
        model: dense, sharded by FSDP2 or partitioned by ZeRO-3, in which cases every rank must make
            the call; PEFT's, DDP's and DeepSpeed's wrappers do not count, but a prompt that PEFT's
            adapter learned does.
        progress: show a progress bar.

    Raises:
        ValueError: a weight has no values here, as one that is offloaded.
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
    """Precision of the model's matmuls in here: "weights", or autocast's dtype as "bfloat16"."""
    device = next(model.parameters()).device.type
    if not torch.is_autocast_enabled(device):
        return "weights"
    return str(torch.get_autocast_dtype(device)).removeprefix("torch.")


def data_fingerprint(
    features: Sequence[Mapping[str, Any]],
    max_length: int | None = None,
    truncation_mode: str = "keep_start",
) -> str:
    """Hash of the token ids of features, in their order, and of the weights of their tokens.

    Args:
        features: token ids, as `tokenise_pairs` or `tokenise_points` return them.
        max_length, truncation_mode: of the collator that cuts them; where all of them are short
            enough the hash is that of no cut.
    """
    digest = hashlib.sha256()
    if max_length is not None and any(_longest(feature) > max_length for feature in features):
        digest.update(f"cut:{max_length}:{truncation_mode}:".encode())
    for feature in features:
        for name in TOKENS:
            ids = array("q", feature.get(name, ()))
            digest.update(f"{name}:{len(ids)}:".encode())
            digest.update(ids.tobytes())
        for name in TOKEN_WEIGHT_COLUMNS:
            # Nothing of what is not there: a cache without weights is the one that it was.
            if name in feature:
                digest.update(f"{name}:".encode())
                digest.update(array("f", feature[name]).tobytes())
    return digest.hexdigest()


def _longest(feature: Mapping[str, Any]) -> int:
    """Tokens of a feature's prompt with the longer of its completions."""
    ends = (len(feature.get(name, ())) for name in TOKENS if name != PROMPT_IDS)
    return len(feature.get(PROMPT_IDS, ())) + max(ends)


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
        # DeepSpeed's mark of what it can gather.
        if hasattr(weight, "ds_id"):
            continue
        if not weight.numel() or weight.is_meta:
            kind = " on the meta device" if weight.is_meta else ""
            raise ValueError(
                f"model: got {name} of shape {tuple(weight.shape)}{kind}, needs its values to"
                " recognise a cache by: compute log-probs before FSDP1 shards the model or"
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
    # As parameters: ZeRO-3's know where their values are.
    state = sorted(model.state_dict(keep_vars=True).items())
    names = iter(_bar(state, progress))
    threads = min(_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        while several := list(islice(names, threads)):
            # A sharded tensor is gathered here: ranks must gather in one order.
            whole = [_whole(value) for _, value in several]
            yield from zip([name for name, _ in several], pool.map(_hash, whole), strict=True)


def _whole(value: Any) -> Any:
    if hasattr(value, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([value]):
            return value.detach().clone()
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


@dataclass(frozen=True)
class Fingerprints:
    """Hashes of everything that log-probs depend on.

    Attributes:
        data: token ids.
        model: config and weights.
        precision: what matmuls compute in, the weights' own dtype or autocast's.
        tokenizer: None where it is not known.
    """

    data: str
    model: str
    precision: str
    tokenizer: str | None = None

    @property
    def name(self) -> str:
        """Short name of them together, for a file."""
        tokenizer = (self.tokenizer or "any")[:8]
        return f"{self.model[:16]}-{self.data[:16]}-{tokenizer}-{self.precision}"

    def differences(self, stored: Mapping[str, str]) -> list[str]:
        """Which of them differ from stored ones; an unknown tokenizer does not."""
        pairs = {name: (stored.get(name), own) for name, own in vars(self).items()}
        return [name for name, (old, own) in pairs.items() if old and own and old != own]


class PartialColumns:
    """Columns of a data set, with which of its features are filled.

    Args:
        size: features of the data set.

    Attributes:
        done: (size,) bool.
        columns: name → (size,) fp32.
    """

    def __init__(self, size: int) -> None:
        self.done = torch.zeros(size, dtype=torch.bool)
        self.columns: dict[str, Tensor] = {}

    def add(self, indices: Tensor, columns: Mapping[str, Tensor]) -> None:
        """Fill the features of these indices, (k,) int64, with (k,) columns."""
        self.done[indices] = True
        for name, values in columns.items():
            self.columns.setdefault(name, torch.zeros(len(self.done)))[indices] = values

    def merge(self, other: PartialColumns) -> None:
        """Fill what the other has."""
        indices = other.done.nonzero()[:, 0]
        self.add(indices, {name: values[indices] for name, values in other.columns.items()})

    def is_done(self, indices: list[int]) -> bool:
        """Whether all of these features are filled."""
        return bool(self.done[indices].all())


class ReferenceCache:
    """One finished file, or parts beside it until it is finished.

    Every file is written elsewhere and renamed, so that none is ever half-written, and any number
    of processes may write the same cache: they write the same values. There are no locks: who does
    not see another's file yet computes what is in it. Every file has a hash of what is in it, and
    is read whole, so that one of which a disk shows a part is an error.

    Args:
        path: of the finished file.
        fingerprints: what it must belong to.

    Raises:
        ImportError: safetensors, whose format the files have, is not installed.
    """

    def __init__(self, path: Path, fingerprints: Fingerprints) -> None:
        require_packages("a reference cache", "safetensors")
        self.path = path
        self.fingerprints = fingerprints

    def load(self, size: int) -> PartialColumns:
        """Log-probs on disk, of the finished file or of parts.

        Args:
            size: features of the data set.

        Raises:
            ValueError: a file is damaged, or belongs to another model, precision, tokenizer or
                data.
        """
        found = PartialColumns(size)
        for path in (self.path, *self._parts()):
            try:
                metadata, columns = _read(path)
            except FileNotFoundError:
                # Not there yet, or another process has just finished and cleared its parts.
                continue
            self._check(path, metadata)
            found.add(columns.pop(_INDICES), columns)
        return found

    def save_part(self, name: str, indices: Tensor, columns: Mapping[str, Tensor]) -> None:
        """Keep the log-probs of some features, for a later run if this one is killed."""
        self._write(self.path.with_name(f"{self._prefix}{name}{SUFFIX}"), indices, columns)

    def finish(self, found: PartialColumns) -> None:
        """Write the finished file and clear the parts."""
        self._write(self.path, torch.arange(len(found.done)), found.columns)
        self.clear_parts()

    def clear_parts(self) -> None:
        """Remove the parts that are visible here."""
        for path in self._parts():
            path.unlink(missing_ok=True)

    @property
    def _prefix(self) -> str:
        return f"{self.path.name}.part-"

    def _parts(self) -> list[Path]:
        if not self.path.parent.is_dir():
            return []
        names = sorted(path.name for path in self.path.parent.iterdir())
        parts = (name for name in names if name.startswith(self._prefix) and name.endswith(SUFFIX))
        return [self.path.with_name(name) for name in parts]

    def _check(self, path: Path, metadata: Mapping[str, str]) -> None:
        differences = self.fingerprints.differences(metadata)
        if differences:
            raise ValueError(
                f"{path}: got log-probs of another {' and another '.join(differences)}, needs those"
                " of the given model, precision, data and tokenizer; name another file or delete"
                " this one"
            )

    def _write(self, path: Path, indices: Tensor, columns: Mapping[str, Tensor]) -> None:
        from safetensors.torch import save

        prints = {name: value for name, value in vars(self.fingerprints).items() if value}
        metadata = {"kind": _KIND, "torch": torch.__version__, **prints}
        tensors = {**columns, _INDICES: indices}
        content = save(tensors, {**metadata, "sha256": _sha256(metadata, tensors)})
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        try:
            beside.replace(path)
        except FileNotFoundError:
            # On NFS, where the server has done it and its answer was lost: the second attempt.
            if not path.is_file():
                raise


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata of a file, and its columns, with the indices of their features among them.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is of another kind or version, or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    content = _content(path)
    again = "delete it, and its log-probs are computed again"
    if content.startswith(_EARLIER):
        raise ValueError(
            f"{path}: got a reference cache of an earlier version, needs one of this version;"
            f" {again}"
        )
    metadata = _metadata(content)
    ours = _KIND.encode() in content if metadata is None else metadata.get("kind") == _KIND
    if not ours:
        raise ValueError(
            f"{path}: got another kind of file, needs a reference cache; name another file"
        )
    columns = None
    if metadata is not None:
        # A dtype that safetensors does not know, of a damaged header, is a KeyError.
        with suppress(SafetensorError, KeyError):
            columns = load(content)
    # safetensors tells whether all bytes are there, not whether they are what was written.
    if (
        metadata is None
        or columns is None
        or metadata.pop("sha256", None) != _sha256(metadata, columns)
    ):
        raise ValueError(f"{path}: got a damaged or truncated file, needs a whole one; {again}")
    return metadata, columns


def _content(path: Path) -> bytes:
    """A file's bytes, as they are or were; FileNotFoundError where there is none (any more)."""
    for _ in range(_READS):
        try:
            # Not mapped into memory: another process may replace or delete the file meanwhile.
            return path.read_bytes()
        except OSError as error:
            # On NFS, of a file that another machine has replaced or deleted while it was open.
            if error.errno != errno.ESTALE:
                raise
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


def _metadata(content: bytes) -> dict[str, str] | None:
    """The texts in a file's header, which safetensors gives of files but not of bytes.

    Those of a file without any are {}; None: there is no whole header.
    """
    end = 8 + int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8:end]) if end <= len(content) else None
    except ValueError:
        return None
    return None if not isinstance(header, dict) else header.get("__metadata__") or {}


def _sha256(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, values in sorted(tensors.items()):
        digest.update(f"{name}:{values.dtype}:{tuple(values.shape)}:".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()
