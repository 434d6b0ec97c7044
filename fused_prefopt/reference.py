"""Log-probs of a reference model over a data set: computed once, cached on disk by content."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fused_prefopt.data import labels_of, prompt_labels_of
from fused_prefopt.integrations.causal_lm import last_hidden, lm_head_of
from fused_prefopt.ops import sequence_logps

Feature = Mapping[str, Any]
_TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids", "completion_ids")


def add_reference_logps(
    model: nn.Module,
    features: Sequence[Feature],
    collator: Callable[[Sequence[Feature]], Mapping[str, Any]],
    *,
    batch_size: int = 16,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    description: str = "reference log-probs",
) -> list[dict[str, Any]]:
    """Copies of the features with the reference model's log-probs as columns, in nats.

    Pairs get `ref_chosen_logps` and `ref_rejected_logps`; points get `reference` and
    `prompt_reference` (all prompt tokens but the first). The cost is that of a forward pass
    without logits.

    Args:
        model: the reference, on the device to run on; it is put in eval mode and back.
        features: token ids, as `tokenise_pairs` or `tokenise_points` return them.
        collator: `PairCollator` or `PointCollator`, padded layout.
        batch_size: features a forward pass takes.
        cache_dir: folder of the cache, one file for each content of model and features; None does
            not cache.
        progress: show a progress bar.
        description: of the progress bar.
    """
    path = None
    if cache_dir is not None:
        path = Path(cache_dir) / f"reference-{_fingerprint(model, features)}.pt"
    if path is not None and path.is_file():
        columns = torch.load(path, weights_only=True)
    else:
        columns = dataset_logps(
            model,
            features,
            collator,
            batch_size=batch_size,
            progress=progress,
            description=description,
        )
        if path is not None:
            _save(columns, path)
    values = {name: column.tolist() for name, column in columns.items()}
    return [
        {**feature, **{name: column[i] for name, column in values.items()}}
        for i, feature in enumerate(features)
    ]


@torch.no_grad()
def dataset_logps(
    model: nn.Module,
    features: Sequence[Feature],
    collator: Callable[[Sequence[Feature]], Mapping[str, Any]],
    *,
    batch_size: int = 16,
    progress: bool = True,
    description: str = "log-probs",
) -> dict[str, Tensor]:
    """Summed log-probs of a data set's completions, in the order of the features.

    Returns:
        (n,) fp32 columns: `ref_chosen_logps` and `ref_rejected_logps` for pairs, `reference` and
        `prompt_reference` for points. Arguments are those of `add_reference_logps`.
    """
    training = model.training
    model.eval()
    columns: dict[str, Tensor] = {}
    try:
        # Sequences of like length together: less padding.
        order = sorted(range(len(features)), key=lambda index: _tokens(features[index]))
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        for indices in _bar(batches, progress, description):
            batch = collator([features[index] for index in indices])
            pairs = "chosen_ids" in features[0]
            for name, values in _logps(model, batch, pairs).items():
                column = columns.setdefault(name, torch.zeros(len(features)))
                column[indices] = values.float().cpu()
    finally:
        model.train(training)
    return columns


def _logps(model: nn.Module, batch: Mapping[str, Any], pairs: bool) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    layout = ("input_ids", "attention_mask", "completion_mask")
    batch = {name: batch[name].to(device) for name in layout}
    hidden, head = last_hidden(model, batch), lm_head_of(model)
    sums = sequence_logps(hidden, head, labels_of(batch)).sums
    if pairs:
        chosen, rejected = sums.chunk(2)
        return {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    prompt = sequence_logps(hidden, head, prompt_labels_of(batch)).sums
    return {"reference": sums, "prompt_reference": prompt}


def _fingerprint(model: nn.Module, features: Sequence[Feature]) -> str:
    """Hash of what the log-probs depend on: the weights, the config and the token ids."""
    config = getattr(model, "config", None)
    settings = config.to_dict() if config is not None else {}
    # Where a model was loaded from, and by which version, is not what it is.
    for name in ("_name_or_path", "transformers_version"):
        settings.pop(name, None)
    digest = hashlib.sha256(repr(sorted(settings.items())).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    for feature in features:
        for name in _TOKEN_COLUMNS:
            digest.update(f"{name}:{list(feature.get(name, ()))}".encode())
    return digest.hexdigest()[:32]


def _save(columns: dict[str, Tensor], path: Path) -> None:
    """Write beside, then rename: a killed run leaves no half-written cache."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    torch.save(columns, partial)
    partial.replace(path)


def _tokens(feature: Feature) -> int:
    return sum(len(feature.get(name, ())) for name in _TOKEN_COLUMNS)


def _bar(batches: list[list[int]], progress: bool, description: str) -> Iterator[list[int]]:
    if not progress:
        return iter(batches)
    from tqdm.auto import tqdm

    return iter(tqdm(batches, desc=description, unit="batch"))
