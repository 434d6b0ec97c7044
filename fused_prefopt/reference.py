"""Log-probs of a reference model over a data set: computed once, cached on disk by content."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fused_prefopt.checks import require_tokens
from fused_prefopt.data import ListCollator
from fused_prefopt.data.columns import (
    CHOSEN_IDS,
    COMPLETION,
    COMPLETIONS_IDS,
    INPUT_IDS,
    PAIR_REFERENCES,
    POINT_REFERENCES,
    PROMPT,
    TOKENS,
    feature_at,
)
from fused_prefopt.data.list_rows import members_of, with_columns
from fused_prefopt.distributed import gather_objects, gather_outcomes, rank, world_size
from fused_prefopt.models.batch import batch_behind, completion_logps
from fused_prefopt.models.causal_lm import input_vocab
from fused_prefopt.models.model_call import evaluating, in_front, past_wrappers
from fused_prefopt.reference_cache import (
    SUFFIX,
    Fingerprints,
    PartialColumns,
    ReferenceCache,
    data_fingerprint,
    model_fingerprint,
    precision_of,
    tokenizer_fingerprint,
)


class SharesForwards(Protocol):
    """Ranks that are given batches together, as those of `integrations.sequence_parallel`."""

    @property
    def data(self) -> dist.ProcessGroup | None:
        """The ranks with other batches, this one among them; None for all ranks."""

    @property
    def sequences(self) -> dist.ProcessGroup | None:
        """The ranks with the other tokens of this rank's sequences; None where these are whole."""

    @property
    def is_first(self) -> bool:
        """Whether this rank is the first of those with its batch."""

    def shard(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What this rank's model is given of a whole batch."""

    def running(self) -> AbstractContextManager[None]:
        """What its forward pass is in."""


Feature = Mapping[str, Any]
Collator = Callable[[Sequence[Feature]], Mapping[str, Any]]
_Batches = list[list[int]]


def add_reference_logps(
    model: nn.Module,
    features: Sequence[Feature],
    collator: Collator,
    *,
    tokenizer: Any = None,
    batch_size: int = 16,
    cache_dir: str | os.PathLike[str] | None = None,
    cache_file: str | os.PathLike[str] | None = None,
    save_every: int = 16,
    progress: bool = True,
    description: str = "reference log-probs",
    shared: SharesForwards | None = None,
) -> list[dict[str, Any]]:
    """Copies of the features with the reference model's log-probs as columns, in nats.

    Pairs get `ref_chosen_logps` and `ref_rejected_logps`; completions `reference` and
    `prompt_reference` (all prompt tokens but the first); lists the same of each of their
    completions, `references` and `prompt_references`. The cost is that of a forward pass
    without logits. With a cache a killed run is continued by the next, which computes what is
    missing; the same `batch_size` then gives the same bits. Under torch.distributed every rank
    must make the call with all features; each computes its share and gets all values. Under
    autocast they are those of autocast: make the call under the one that the training runs under.

    Args:
        model: the reference, on the device to run on, dense, sharded by FSDP or in DeepSpeed's
            engine; it is put in eval mode and back.
        features: token ids, as `tokenise_pairs`, `tokenise_points` or `tokenise_lists` return them.
        collator: that of the features, any layout; lists go completion by completion.
        tokenizer: what made the token ids, to be part of what the cache belongs to; None leaves
            it out.
        batch_size: pairs or completions a forward pass takes.
        cache_dir: folder of the cache, one file for each content of model, features (as the
            collator cuts them) and tokenizer, and each dtype of autocast; None does not cache.
        cache_file: the cache itself, instead of `cache_dir`.
        save_every: batches after which what a rank has computed is written to the cache.
        progress: show a progress bar.
        description: of the progress bar.
        shared: the ranks that are given each batch together, and what each of them makes of it;
            None: each rank has batches of its own.

    Raises:
        ValueError: `cache_file` belongs to another model, precision, tokenizer or data (the
            message says which), a cache's file is damaged, both caches are given, ranks hold
            different features, a cache is to belong to a model whose weights are not here
            (FSDP1, offloading), or the model gives a log-prob that is not finite. What one rank
            meets, all raise.
        RuntimeError: another rank has failed in another way, such as by a full disk.
    """
    if cache_dir is not None and cache_file is not None:
        raise ValueError("cache_file: got a file and a cache_dir, needs one of them")
    lists = None
    if _are_lists(features, collator):
        lists = [members_of(each, feature_at(index)) for index, each in enumerate(features)]
    rows = features if lists is None else list(chain.from_iterable(lists))
    _check_ranks(rows)
    run = _Pass(model, rows, collator, batch_size, progress, description, shared)
    known, cache = PartialColumns(len(rows)), None
    if cache_dir is not None or cache_file is not None:
        prints = Fingerprints(
            data_fingerprint(rows, *_cut_of(collator)),
            model_fingerprint(model, progress=progress and rank() == 0),
            precision_of(model),
            None if tokenizer is None else tokenizer_fingerprint(tokenizer),
        )
        path = Path(cache_file or Path(cache_dir or "") / f"reference-{prints.name}{SUFFIX}")
        cache = ReferenceCache(path, prints)
        known = _load(cache, len(rows))
    missing = [number for number, each in enumerate(run.batches) if not known.is_done(each)]
    if missing:
        # Of the ranks with one batch one writes.
        writes = shared is None or shared.is_first
        share = _share(missing, shared)
        folder = cache if writes else None
        of_tokens = shared is not None and shared.sequences is not None
        fill = partial(_fill, known, run, share, folder, save_every)
        if of_tokens or _is_sharded(model):
            # In joint passes the others wait for a rank that fails there, not for what it has to
            # tell: its end is what ends them.
            known = _union(gather_objects(fill()))
        else:
            known = _union(gather_outcomes(fill))
    if cache is not None:
        _finish(cache, known, computed=bool(missing))
    values = {name: column.tolist() for name, column in known.columns.items()}
    if lists is None:
        return [
            {**feature, **{name: column[i] for name, column in values.items()}}
            for i, feature in enumerate(features)
        ]
    each = {name: iter(column) for name, column in values.items()}
    return [
        with_columns(
            feature, {name: list(islice(column, len(members))) for name, column in each.items()}
        )
        for feature, members in zip(features, lists, strict=True)
    ]


def dataset_logps(
    model: nn.Module,
    features: Sequence[Feature],
    collator: Collator,
    *,
    batch_size: int = 16,
    progress: bool = True,
    description: str = "log-probs",
) -> dict[str, Tensor]:
    """Summed log-probs of a data set's completions, in the order of the features.

    Returns:
        (n,) fp32 columns: `ref_chosen_logps` and `ref_rejected_logps` for pairs, `reference` and
        `prompt_reference` for completions. Arguments are those of `add_reference_logps`.

    Raises:
        ValueError: the features are lists.
    """
    if _are_lists(features, collator):
        raise ValueError(
            "features: got lists, wanted pairs or single completions: `data.points_of_lists` makes"
            " these of them"
        )
    known = PartialColumns(len(features))
    run = _Pass(model, features, collator, batch_size, progress, description)
    for indices, columns in run.over(run.batches):
        known.add(torch.tensor(indices), columns)
    return known.columns


@dataclass(frozen=True)
class _Pass:
    """A model's forward pass over a data set: its options, in the words of `add_reference_logps`.

    Attributes:
        batches: indices of features; sequences of like length stand together, for less padding.
    """

    model: nn.Module
    features: Sequence[Feature]
    collator: Collator
    batch_size: int
    progress: bool
    description: str
    shared: SharesForwards | None = None

    @cached_property
    def batches(self) -> _Batches:
        order = sorted(range(len(self.features)), key=lambda index: _tokens(self.features[index]))
        starts = range(0, len(order), self.batch_size)
        return [order[start : start + self.batch_size] for start in starts]

    def over(self, batches: _Batches) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """The indices of one batch after another, with its columns."""
        vocab = input_vocab(self.model)
        with evaluating(self.model):
            for indices in self._shown(batches):
                batch = self.collator([self.features[index] for index in indices])
                require_tokens("features", batch[INPUT_IDS], vocab)
                pairs = CHOSEN_IDS in self.features[0]
                columns = _logps(self.model, batch, pairs, self.shared)
                yield indices, {name: values.float().cpu() for name, values in columns.items()}

    def _shown(self, batches: _Batches) -> Iterator[list[int]]:
        if not self.progress or rank() > 0:
            return iter(batches)
        from tqdm.auto import tqdm

        return iter(tqdm(batches, desc=self.description, unit="batch"))


def _fill(
    known: PartialColumns,
    run: _Pass,
    mine: list[int],
    cache: ReferenceCache | None,
    save_every: int,
) -> PartialColumns:
    """`known` with this rank's batches, by number, computed; kept in parts of the cache too."""
    unsaved: list[int] = []
    results = run.over([run.batches[number] for number in mine])
    for count, (number, (indices, columns)) in enumerate(zip(mine, results, strict=True), start=1):
        _check_finite(run.features, indices, columns)
        known.add(torch.tensor(indices), columns)
        unsaved.append(number)
        if cache is not None and (count % save_every == 0 or count == len(mine)):
            # Of other ranks, jobs and worlds no two write other rows by one name.
            rows = zlib.crc32(repr(unsaved).encode())
            name = f"{run.batch_size}-{unsaved[0]:06d}-{unsaved[-1]:06d}-{rows:08x}"
            part = torch.tensor([index for each in unsaved for index in run.batches[each]])
            cache.save_part(name, part, {k: v[part] for k, v in known.columns.items()})
            unsaved = []
    return known


@torch.no_grad()
def _logps(
    model: nn.Module, batch: Mapping[str, Any], pairs: bool, shared: SharesForwards | None
) -> dict[str, Tensor]:
    """Log-prob sums of a batch, from inside the model's own forward.

    There the hooks of engines that shard the model have gathered its weights; what they would
    round, arguments and results, does not go through them.
    """
    device = next(model.parameters()).device
    batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    found: dict[str, Tensor] = {}
    options: dict[str, Any] = {"prompt": not pairs}
    if shared is not None:
        batch, options["sequence_group"] = shared.shard(batch), shared.sequences

    def forward(inner: nn.Module, own: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        found.update(completion_logps(inner, batch_behind(kwargs), **options))
        return found[COMPLETION]

    with nullcontext() if shared is None else shared.running(), in_front(model, forward):
        model(**past_wrappers(batch))
    if pairs:
        return dict(zip(PAIR_REFERENCES, found[COMPLETION].chunk(2), strict=True))
    return dict(zip(POINT_REFERENCES, (found[COMPLETION], found[PROMPT]), strict=True))


def _check_finite(
    rows: Sequence[Feature], indices: list[int], columns: Mapping[str, Tensor]
) -> None:
    for name, values in columns.items():
        for index, value in zip(indices, values.tolist(), strict=True):
            if not math.isfinite(value):
                where = feature_at(index, rows[index])
                raise ValueError(
                    f"model: got {name}={value} for {where}, needs finite log-probs; is its dtype"
                    " too narrow, or are its weights not finite?"
                )


def _finish(cache: ReferenceCache, known: PartialColumns, *, computed: bool) -> None:
    """Rank 0 writes the whole; no rank returns before the file is there.

    Another job may have finished it meanwhile, or put that of another model in its place.
    """

    def write() -> None:
        if rank() > 0:
            return
        if not cache.path.is_file():
            cache.finish(known)
        elif computed:
            cache.load(len(known.done))

    gather_outcomes(write)
    # A rank on a disk of its own has parts that rank 0 does not see.
    cache.clear_parts()


def _share(missing: list[int], shared: SharesForwards | None) -> list[int]:
    """This rank's batches, as many as any other's: forward passes of a sharded model are joint."""
    group = None if shared is None else shared.data
    padded = missing + missing[:1] * (-len(missing) % world_size(group))
    return padded[rank(group) :: world_size(group)]


def _load(cache: ReferenceCache, size: int) -> PartialColumns:
    """Log-probs that any rank has on disk; where one refuses its file, all do."""
    return _union(gather_outcomes(lambda: cache.load(size)))


def _is_sharded(model: nn.Module) -> bool:
    """Whether ranks hold parts of a model, which FSDP or ZeRO-3 gathers in its passes."""
    values, modules = model.parameters(), model.modules()
    parts = any(hasattr(each, "placements") or hasattr(each, "ds_id") for each in values)
    return parts or any(type(each).__name__ == "FullyShardedDataParallel" for each in modules)


def _union(every: list[PartialColumns]) -> PartialColumns:
    union = every[0]
    for each in every[1:]:
        union.merge(each)
    return union


def _are_lists(features: Sequence[Feature], collator: Collator) -> bool:
    """Whether the collator makes a sequence of each completion, one feature after another."""
    of_lists = len(features) > 0 and COMPLETIONS_IDS in features[0]
    return of_lists or isinstance(collator, ListCollator)


def _cut_of(collator: Collator) -> tuple[int | None, str]:
    """`max_length` and `truncation_mode` of a collator that cuts, TRL's among them."""
    mode = getattr(collator, "truncation_mode", "keep_start")
    return getattr(collator, "max_length", None), mode


def _check_ranks(features: Sequence[Feature]) -> None:
    if world_size() > 1 and len(set(gather_outcomes(lambda: data_fingerprint(features)))) > 1:
        raise ValueError("features: got different ones on the ranks, needs all of them on each")


def _tokens(feature: Feature) -> int:
    return sum(len(feature.get(name, ())) for name in TOKENS)
