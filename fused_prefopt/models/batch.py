"""A collated batch on its way from backbone to head: padded, packed or with shared prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fused_prefopt.data.columns import (
    ATTENTION_MASK,
    COMPLETION_MASK,
    GOLD,
    GOLD_LENGTHS,
    INPUT_IDS,
    LAYOUT,
    NUM_SEQUENCES,
    OF_GOLD,
    PAIR_REFERENCES,
    POSITION_IDS,
    PREDICTORS,
    REF_CHOSEN_LOGPS,
    REFERENCE,
    SEGMENTS,
    SEQUENCE_IDS,
    SHIFT_LABELS,
    SHIFT_PROMPT_LABELS,
    TARGET_SEQUENCES,
    TARGETS,
    TOKEN_WEIGHTS,
)
from fused_prefopt.data.labels import counts_of, labels_of, prompt_labels_of
from fused_prefopt.distributed import gather_with_gradient
from fused_prefopt.models.causal_lm import (
    backbone_outputs,
    head_running,
    require_plain,
    router_loss,
)
from fused_prefopt.models.layout_check import (
    require_mask_attention,
    require_separate_sequences,
    require_separate_sides,
    shared_rows,
)
from fused_prefopt.models.model_call import (
    IMAGES,
    PROMPTED,
    SIDE_CHANNEL,
    SideChannel,
    has_front,
    let_wrappers_follow,
    past_wrappers,
    put_in_front,
    unwrapped,
    without_side_channel,
)
from fused_prefopt.models.peft_head import is_prompted, prompted, with_prompt
from fused_prefopt.models.shard_check import (
    require_shard,
    require_shared_attention,
    require_whole,
)
from fused_prefopt.ops import sequence_logps
from fused_prefopt.ops.logps import shared_and_tail_logps
from fused_prefopt.types import LMHead, LogpBatch

# The op computes these; a data set's `prompt` is a text.
_COMPUTED = ("policy", "lengths", "prompt", "prompt_lengths", GOLD, GOLD_LENGTHS)
FIELDS = tuple(item.name for item in fields(LogpBatch) if item.name not in _COMPUTED)
# As what a model is asked for: the rows that its head would meet.
HIDDEN = {"hidden": True}


@dataclass(frozen=True)
class CollatedRows:
    """Last hidden states of a batch and what the op needs beside them.

    Attributes:
        hidden: (S, L, D), or (N, D) where sequences are packed.
        labels: (S, L) or (N,) int64, -100 everywhere but on completion tokens.
        prompt_labels: the same on prompt tokens, or None.
        layout: `shift`, `sequence_ids`, `num_sequences` and `num_labels` of the op.
        router: coefficient and value of the router loss of a mixture of experts, or None.
        num_prompt_labels: `num_labels` of the prompt tokens.
        token_weights: of the labels, in their shape, or None.
        position_ids: of a shard, places of its tokens in their sequences, as the labels; or None.
        sequence_group: of a shard, the ranks that have the other tokens; None where rows are whole.
    """

    hidden: Tensor
    labels: Tensor
    prompt_labels: Tensor | None
    layout: dict[str, Any]
    router: tuple[float, Tensor] | None = None
    num_prompt_labels: int | None = None
    token_weights: Tensor | None = None
    position_ids: Tensor | None = None
    sequence_group: dist.ProcessGroup | None = None


def collated_rows(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    prompt: bool,
    router: bool = False,
    sequence_group: dist.ProcessGroup | None = None,
) -> CollatedRows:
    """Run the backbone on a batch from `PairCollator`, `PointCollator` or TRL's collators.

    A batch with `shift_labels` is a shard (`data.sequence_shards.shard_of`): the backbone gets its
    `position_ids` and no `attention_mask`, as its attention must be one over all ranks of the
    group, in which no token sees the padding behind it.

    Args:
        model: causal language model with a backbone and an output embedding, in its wrappers.
        batch: `input_ids`, `completion_mask`, `attention_mask` or `position_ids`, and what the
            collators add for their layouts; or one of `batch_behind`.
        prompt: whether the prompts' log-probs are wanted too.
        router: whether the router loss is wanted too.
        sequence_group: ranks that have the other tokens of a shard; whole batches heed none. Twice
            a forward pass more, on the first shard in each mode (`require_shared_attention`).

    Raises:
        ValueError: prompts or a router loss are wanted of pairs that share a prompt in one row, or
            the model or its images do not fit the layout; or a shard comes without a group or
            positions, or is not one of those that `shard_of` makes.
    """
    if SHIFT_LABELS in batch:
        return _shard_rows(model, batch, prompt, router, sequence_group)
    require_whole(batch, sequence_group)
    batch = with_prompt(model, batch)
    _require_rows_of_images(batch)
    if SEGMENTS in batch:
        if prompt:
            raise ValueError("shared_prompt: got a loss that needs the prompt of each sequence")
        if router:
            raise ValueError("shared_prompt: got a model that adds a router loss")
        layout = {
            "shift": False,
            "sequence_ids": batch[TARGET_SEQUENCES],
            "num_sequences": 2 * batch[INPUT_IDS].shape[0],
            "num_labels": batch[TARGETS].shape[0],
        }
        given = shared_hidden(model, batch), batch[TARGETS], None, layout
        return CollatedRows(*given, token_weights=batch.get(TOKEN_WEIGHTS))
    if SEQUENCE_IDS in batch:
        require_separate_sequences(model, batch[INPUT_IDS])
    options = {"output_router_logits": True} if router else {}
    outputs = backbone_outputs(model, batch, **options)
    routed = None
    if router:
        routed = router_loss(model, outputs.router_logits, _routed(batch).get(ATTENTION_MASK))
    hidden, labels = outputs.last_hidden_state, labels_of(batch)
    prompt_labels = prompt_labels_of(batch) if prompt else None
    count, prompt_count = counts_of(batch)
    layout = {"shift": True, "num_labels": count}
    weights = batch.get(TOKEN_WEIGHTS)
    if SEQUENCE_IDS not in batch:
        return CollatedRows(hidden, labels, prompt_labels, layout, routed, prompt_count, weights)
    layout["sequence_ids"] = batch[SEQUENCE_IDS][0]
    layout["num_sequences"] = batch[NUM_SEQUENCES]
    prompt_labels = None if prompt_labels is None else prompt_labels[0]
    weights = None if weights is None else weights[0]
    packed = (hidden[0], labels[0], prompt_labels, layout, routed, prompt_count, weights)
    return CollatedRows(*packed)


def without_sequences(rows: CollatedRows) -> CollatedRows:
    """No sequence, of hidden states that still have a gradient: 0, in every weight behind them.

    Args:
        rows: of a batch that stands for none.
    """
    layout = rows.layout | {"num_labels": 0}
    if layout.get(SEQUENCE_IDS) is not None:
        layout |= {SEQUENCE_IDS: layout[SEQUENCE_IDS][:0], NUM_SEQUENCES: 0}

    def none(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[:0]

    return replace(
        rows,
        hidden=rows.hidden[:0],
        labels=rows.labels[:0],
        prompt_labels=none(rows.prompt_labels),
        layout=layout,
        router=None if rows.router is None else (0.0, rows.router[1]),
        num_prompt_labels=None if rows.num_prompt_labels is None else 0,
        token_weights=none(rows.token_weights),
        position_ids=none(rows.position_ids),
    )


def _shard_rows(
    model: nn.Module,
    batch: Mapping[str, Any],
    prompt: bool,
    router: bool,
    group: dist.ProcessGroup | None,
) -> CollatedRows:
    """`collated_rows` of a shard."""
    group = require_shard(model, batch, group, prompt=prompt)
    packed = SEQUENCE_IDS in batch
    if packed:
        require_separate_sequences(model, batch[INPUT_IDS])
    seen = {name: value for name, value in batch.items() if name != ATTENTION_MASK}
    require_shared_attention(model, seen, group)
    outputs = backbone_outputs(model, seen, **({"output_router_logits": True} if router else {}))
    routed = None
    if router:
        routed = router_loss(model, *_of_all_ranks(outputs.router_logits, batch, group))
    labels, prompt_labels = batch[SHIFT_LABELS], batch[SHIFT_PROMPT_LABELS] if prompt else None
    each = [outputs.last_hidden_state, labels, prompt_labels, batch.get(TOKEN_WEIGHTS)]
    each.append(batch[POSITION_IDS].expand_as(labels))
    count, prompt_count = counts_of(batch)
    layout: dict[str, Any] = {"shift": False, "num_labels": count}
    if packed:
        layout |= {"sequence_ids": batch[SEQUENCE_IDS][0], "num_sequences": batch[NUM_SEQUENCES]}
        each = [None if value is None else value[0] for value in each]
    hidden, labels, prompt_labels, weights, places = each
    found = hidden, labels, prompt_labels, layout, routed, prompt_count, weights, places, group
    return CollatedRows(*found)


def _of_all_ranks(
    router_logits: Sequence[Tensor], batch: Mapping[str, Any], group: dist.ProcessGroup
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Router logits of every rank's tokens, differentiable, and the attention mask of those.

    The router loss is a product of means over all tokens: no sum of those of shards. It takes
    what one process takes for it, and an all-reduce of that size for each layer.
    """
    mask = batch.get(ATTENTION_MASK)
    if mask is None:
        raise ValueError(
            "attention_mask: got none in a shard of a model that adds a router loss, needs it to"
            " tell tokens from what fills the shards; give padded batches, or a router_coefficient"
            " of 0"
        )
    # One rank's rows behind those of another: their order is nothing to means.
    every = tuple(gather_with_gradient(logits, group) for logits in router_logits)
    return every, gather_with_gradient(mask, group)


def gold_part(batch: Mapping[str, Any]) -> dict[str, Any] | None:
    """The gold completions of a batch of pairs as a batch of their own; None without any.

    Args:
        batch: as in `collated_rows`.

    Raises:
        ValueError: the pairs have images or a learned prompt, and the gold completions have none.
    """
    if OF_GOLD + COMPLETION_MASK not in batch:
        return None
    for name in (*IMAGES, PROMPTED):
        if batch.get(name) is not None:
            kind = "an adapter that learns a prompt" if name == PROMPTED else f"images ({name})"
            raise ValueError(
                f"gold_ids: got them with {kind}, which they would be without; needs texts and"
                " another adapter"
            )
    return {name: batch[OF_GOLD + name] for name in LAYOUT if OF_GOLD + name in batch}


def gold_fields(rows: CollatedRows, head: LMHead, **options: Any) -> dict[str, Tensor]:
    """`gold` and `gold_lengths` of `LogpBatch`, the same in both halves, differentiable.

    Args:
        rows: of `gold_part`.
        head: of the model.
        **options: of `sequence_logps`.
    """
    options |= {**rows.layout, "token_weights": rows.token_weights}
    options["sequence_group"] = rows.sequence_group
    out = sequence_logps(rows.hidden, head, rows.labels, **options)
    return {GOLD: out.sums.repeat(2), GOLD_LENGTHS: out.lengths.repeat(2)}


def _require_rows_of_images(batch: Mapping[str, Any]) -> None:
    """Raise ValueError if a batch has images, and no row for each sequence."""
    images = [name for name in IMAGES if batch.get(name) is not None]
    layouts = {SEGMENTS: "shared_prompt", SEQUENCE_IDS: "padding_free"}
    for key, option in layouts.items():
        if images and key in batch:
            raise ValueError(
                f"{option}: got images ({', '.join(images)}), whose positions and attention are"
                " those of a row; needs padded batches with a row for each sequence"
            )


def _routed(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """The inputs whose tokens go through the experts: virtual ones, but no keys and values."""
    made: Mapping[str, Any] = batch.get(PROMPTED, {})
    return made if "inputs_embeds" in made else batch


def given_fields(batch: Mapping[str, Any]) -> dict[str, Tensor | None]:
    """The fields of `LogpBatch` that a batch carries, TRL's two halves of `reference` joined."""
    given = {name: batch.get(name) for name in FIELDS}
    if REF_CHOSEN_LOGPS in batch:
        given[REFERENCE] = torch.cat([batch[name] for name in PAIR_REFERENCES])
    return given


@torch.no_grad()
def completion_logps(
    model: nn.Module,
    batch: Mapping[str, Any],
    *,
    prompt: bool = False,
    ld_alpha: float | None = None,
    sequence_group: dist.ProcessGroup | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    """A model's log-probs of a batch, at the cost of a forward pass without logits.

    Args:
        model: causal language model.
        batch: as in `collated_rows`.
        prompt: also those of the prompts (all tokens but the first).
        ld_alpha: of pairs, weight of the tokens by which a completion is longer than its partner.
        sequence_group: as in `collated_rows`; the sums are those of whole sequences.
        **options: of `sequence_logps`, such as `workspace_mb`.

    Returns:
        (S,) sums in nats, fp32: `completion`, weighted where the batch has `token_weights`, and
        `prompt` where it is wanted.

    Raises:
        ValueError: tokens have weights with `ld_alpha`.
    """
    rows = collated_rows(model, batch, prompt=prompt, sequence_group=sequence_group)
    sums: dict[str, Tensor] = {}

    def forward(hidden: Tensor) -> Tensor:
        require_plain(hidden)
        head, given = LMHead.of(model), {**rows.layout, **options}
        given["sequence_group"] = rows.sequence_group
        weighted = {**given, "token_weights": rows.token_weights}
        if ld_alpha is not None:
            weighted["position_ids"] = rows.position_ids
            shared, tail = shared_and_tail_logps(hidden, head, rows.labels, **weighted)
            sums["completion"] = shared.sums + ld_alpha * tail.sums
        else:
            sums["completion"] = sequence_logps(hidden, head, rows.labels, **weighted).sums
        if rows.prompt_labels is not None:
            given["num_labels"] = rows.num_prompt_labels
            sums["prompt"] = sequence_logps(hidden, head, rows.prompt_labels, **given).sums
        return sums["completion"]

    # Not what it returns, which FSDP2 casts to the dtype of its units' outputs.
    with head_running(model, forward) as head:
        head(rows.hidden)
    return sums


@torch.no_grad()
def logps_through(model: nn.Module, batch: Mapping[str, Any], **wanted: Any) -> dict[str, Tensor]:
    """``completion_logps(model, batch, **wanted)`` through the model's wrappers.

    Their hooks (DDP's, FSDP's, DeepSpeed's, PEFT's) gather sharded weights; what they would round
    goes past them.

    Args:
        model: causal language model, wrapped or not.
        batch: as in `collated_rows`.
        **wanted: options of `completion_logps`, or `HIDDEN`, which may have a `sequence_group`.
    """
    inner = unwrapped(model)
    if not has_front(inner):
        put_in_front(inner, _answer_or_go_on)
    let_wrappers_follow(model)
    arguments = past_wrappers(batch, wanted)
    model(**arguments)
    channel: SideChannel = arguments[SIDE_CHANNEL]
    return channel.found


def answer(
    model: nn.Module, request: Mapping[str, Any], batch: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The answer to a call of `logps_through`, from inside the model's wrappers.

    Args:
        model: causal language model without wrappers.
        request: as the options of `logps_through`.
        batch: of `batch_behind`.

    Returns:
        Name → tensor.
    """
    if HIDDEN.items() <= request.items():
        group = request.get("sequence_group")
        rows = collated_rows(model, batch, prompt=False, sequence_group=group)
        return {"hidden": rows.hidden}
    return completion_logps(model, batch, **request)


def _answer_or_go_on(
    model: nn.Module, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    channel: SideChannel | None = kwargs.get(SIDE_CHANNEL)
    if channel is None or channel.request is None:
        return own(*args, **without_side_channel(kwargs))
    channel.found = answer(model, channel.request, batch_behind(kwargs))
    return channel.found


def batch_behind(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The batch of a call of `past_wrappers`, with what an adapter made of it that learns a prompt.

    Args:
        arguments: as they come out of the wrappers.

    Raises:
        ValueError: `prompted` does.
    """
    batch, channel = without_side_channel(arguments), arguments.get(SIDE_CHANNEL)
    if channel is None or not is_prompted(batch):
        return batch
    return prompted(batch | channel.inputs, batch)


def shared_hidden(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Last hidden states of a batch from ``PairCollator(shared_prompt=True)``.

    Args:
        model: causal language model whose attention is `eager` or `sdpa`.
        batch: of B pairs.

    Returns:
        (N, D), one row for each predicted token, in the order of `targets`.

    Raises:
        ValueError: the model's attention takes no such mask, or its layers see less than a row.
    """
    require_mask_attention(model, batch[POSITION_IDS].shape[1])
    require_separate_sides(model, batch[INPUT_IDS])
    return shared_rows(model, batch).flatten(0, 1)[batch[PREDICTORS]]
