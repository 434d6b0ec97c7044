"""Shards of sequences, and checks that a model computes on them what it would on the whole."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fused_prefopt.checks import require
from fused_prefopt.data.columns import (
    INPUT_IDS,
    NUM_SEQUENCES,
    POSITION_IDS,
    SEGMENTS,
    SEQUENCE_IDS,
    SHARD_LABELS,
    SHIFT_PROMPT_LABELS,
)
from fused_prefopt.distributed import rank, sum_over_ranks, world_size
from fused_prefopt.models.causal_lm import backbone_of, input_vocab, last_hidden, text_config
from fused_prefopt.models.layout_check import tolerance, uncached
from fused_prefopt.models.model_call import IMAGES, prompt_learners

# Layers in which tokens of a sequence meet, and which an attention over all ranks serves.
_LAYERS = {"attention", "full_attention", "sliding_attention", "chunked_attention"}
# Backbone whose tokens have seen those of other ranks → its attention, ranks and mode then.
_PASSED: WeakKeyDictionary[nn.Module, set[Any]] = WeakKeyDictionary()


def require_whole(batch: Mapping[str, Any], group: dist.ProcessGroup | None) -> None:
    """Raise ValueError where ranks share sequences, and a batch has a part of some, but no labels.

    Args:
        batch: without `shift_labels`.
        group: ranks that share the sequences of shards, or None.

    Raises:
        ValueError: a row does not begin at place 0 (a device-side assert on CUDA).
    """
    places = batch.get(POSITION_IDS)
    if group is not None and places is not None:
        require(
            (places[..., :1] == 0).all(),
            lambda: (
                "shift_labels: got none with position_ids that begin behind 0 and a sequence_group,"
                " needs them in each shard: the label of its last token lies on another rank;"
                " `data.shard_of` cuts whole batches"
            ),
        )


def require_shard(
    model: nn.Module, batch: Mapping[str, Any], group: dist.ProcessGroup | None, *, prompt: bool
) -> dist.ProcessGroup:
    """The group that a shard of sequences meets.

    Args:
        model: causal language model.
        batch: with `shift_labels`.
        group: ranks that have the other tokens, or None.
        prompt: whether the prompts' log-probs are wanted.

    Raises:
        ValueError: there is no group, a column is missing, or the batch or the model is none that
            can be sharded.
    """
    if group is None:
        raise ValueError(
            "sequence_group: got None for a batch with shift_labels, which is a shard of its"
            " sequences; wanted the ranks that have the other tokens (in a trainer the attachment's"
            " `sequence_group`)"
        )
    needed = [POSITION_IDS, *([SHIFT_PROMPT_LABELS] if prompt else [])]
    missing = [name for name in needed if batch.get(name) is None]
    if missing:
        raise ValueError(
            f"{missing[0]}: got none with shift_labels, needs it in each shard; `data.shard_of`"
            " makes it of a whole batch"
        )
    images = [each for each in IMAGES if batch.get(each) is not None]
    name = type(model).__name__
    layers = set(getattr(text_config(model), "layer_types", None) or ()) - _LAYERS
    convolution = _convolution(model)
    refused = {
        "shared prompts": SEGMENTS in batch,
        f"images ({', '.join(images)})": bool(images),
        "an adapter that learns a prompt": bool(prompt_learners(model)),
        f"{', '.join(sorted(layers))} layers": bool(layers),
        f"convolutions over tokens ({convolution})": convolution is not None,
        f"a {name}, whose backbone takes no position_ids": not _takes_positions(model),
    }
    for what, there in refused.items():
        if there:
            raise ValueError(
                f"shift_labels: got a shard with {what}; needs texts, attention alone and positions"
                " that are given, or whole sequences on each rank"
            )
    return group


def _convolution(model: nn.Module) -> str | None:
    """Name of a layer in which tokens meet outside attention, or None.

    Recurrent layers of every kind that takes positions have one; older configs do not name them.
    """
    if torch.compiler.is_compiling():
        return None
    backbone = backbone_of(model)
    # Beside it are encoders of images and sounds.
    text: nn.Module = getattr(backbone, "language_model", backbone)
    names = (name for name, each in text.named_modules() if isinstance(each, nn.Conv1d))
    return next(names, None)


def _takes_positions(model: nn.Module) -> bool:
    """Whether a backbone's forward names `position_ids`, or is one that hides its arguments."""
    if torch.compiler.is_compiling():
        return True
    parameters = inspect.signature(backbone_of(model).forward).parameters
    hides = any(each.kind is each.VAR_POSITIONAL for each in parameters.values())
    return hides or POSITION_IDS in parameters


def require_shared_attention(
    model: nn.Module, batch: Mapping[str, Any], group: dist.ProcessGroup
) -> None:
    """Raise ValueError unless a shard's tokens see those of the other ranks.

    An attention that nobody has spread over the ranks sees its own shard alone, and trains all the
    same. No config tells, so the model is tried, at twice a forward pass: other tokens on the first
    rank must change hidden states elsewhere. Once in each mode (DeepSpeed's can be off in eval), on
    the first batch with a sequence that begins on the first rank and goes on; other batches cost
    two small sums until then. Buffers and random numbers are left alone. Under torch.compile it is
    not tried.

    Args:
        model: causal language model; every rank makes the call.
        batch: a shard, as the backbone gets it.
        group: ranks that have the other tokens.

    Raises:
        ValueError: on every rank, where no token sees another rank's.
    """
    if torch.compiler.is_compiling() or world_size(group) == 1:
        return
    backbone = backbone_of(model)
    attention = getattr(text_config(model), "_attn_implementation", None)
    state, passed = (attention, group.group_name, backbone.training), _PASSED.get(backbone, set())
    if state in passed:
        return
    behind = _behind_first_rank(batch, group)
    if not sum_over_ranks(behind.sum(), group):
        return
    ids = batch[INPUT_IDS]
    others = (ids + 1) % input_vocab(model) if rank(group) == 0 else ids
    before, after = _trial(model, [{**batch, INPUT_IDS: each} for each in (ids, others)])
    change = (after - before).norm(dim=-1) > tolerance(before) * before.norm(dim=-1)
    # What is not finite tells nothing, and is the loss's to tell.
    behind &= (after - before).isfinite().all(-1)
    found = torch.stack((behind.any(), change.logical_and(behind).any())).long()
    expected, seen = sum_over_ranks(found, group).tolist()
    if expected and not seen:
        mode = "train" if backbone.training else "eval"
        raise ValueError(
            f"sequence_group: got a {type(model).__name__} with {attention} attention in {mode}"
            " mode, in which no token sees those of other ranks; needs an attention over the group"
            " (Ulysses, ring attention, torch's context_parallel) around each call of the model"
        )
    if seen:
        _PASSED[backbone] = passed | {state}


def _behind_first_rank(batch: Mapping[str, Any], group: dist.ProcessGroup) -> Tensor:
    """(S, T) bool, which tokens have a token of their sequence before them on the first rank."""
    places, first = batch[POSITION_IDS].expand_as(batch[INPUT_IDS]), rank(group) == 0
    ids = torch.arange(len(places), device=places.device)[:, None].expand_as(places)
    sequences = len(places)
    if SEQUENCE_IDS in batch:
        ids, sequences = batch[SEQUENCE_IDS], batch[NUM_SEQUENCES]
    # Those that predict something: none that only fills up.
    real = torch.stack([batch[name] >= 0 for name in SHARD_LABELS if name in batch]).any(0)
    nowhere = torch.iinfo(torch.int64).max
    starts = torch.full((sequences,), nowhere if first else 0, device=places.device)
    if first:
        starts = starts.scatter_reduce(0, ids[real], places[real].long(), "amin")
    starts = sum_over_ranks(starts, group)
    return real & (places > starts[ids]) & (not first)


@torch.no_grad()
def _trial(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> list[Tensor]:
    """Hidden states of batches in the mode that the model is in, with the same dropout in each.

    What the passes draw, or add to buffers (counts of routers), is as before afterwards.
    """
    backbone = backbone_of(model)
    kept = [(buffer, buffer.clone()) for buffer in backbone.buffers()]
    found = []
    for batch in batches:
        ids = batch[INPUT_IDS]
        places = {ids.device, *(each.device for each in backbone.parameters())}
        devices = [device for device in places if device.type not in ("cpu", "meta")]
        kind = devices[0].type if devices else "cuda"
        with torch.random.fork_rng(devices, device_type=kind), uncached(ids.device.type):
            with warnings.catch_warnings():
                # Checkpointed layers without a gradient: there is none to lose here.
                warnings.filterwarnings("ignore", "None of the inputs have requires_grad")
                found.append(last_hidden(model, batch))
        for buffer, value in kept:
            buffer.copy_(value)
    return found
