"""A preference loss inside a model's own forward, and the reference that it compares with.

One file of more than 450 lines: the reference may be the policy itself, within the same call.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fused_prefopt.data.columns import (
    COMPLETION_MASK,
    DESIRABLE,
    GOLD,
    GROUPS,
    INPUT_IDS,
    MADE_UP_REWARDS,
    POSITION_IDS,
    PROMPT,
    PROMPT_REFERENCE,
    REFERENCE,
    SPENT,
    TOKEN_WEIGHTS,
    WEIGHTS,
)
from fused_prefopt.integrations.metrics import (
    Lists,
    StepMetrics,
    Weighed,
    metric_weights,
    token_metrics,
)
from fused_prefopt.losses.metrics import SCORES_MEAN, SCORES_STD
from fused_prefopt.losses.protocol import OF_BOTH_HEADS, WHAT_IT_IS
from fused_prefopt.models.batch import (
    HIDDEN,
    CollatedRows,
    answer,
    batch_behind,
    collated_rows,
    given_fields,
    gold_fields,
    gold_part,
    logps_through,
    without_sequences,
)
from fused_prefopt.models.causal_lm import head_running, require_plain, wants_router_loss
from fused_prefopt.models.model_call import (
    PROMPTED,
    SIDE_CHANNEL,
    SideChannel,
    evaluating,
    past_wrappers,
    prompt_learners,
    put_in_front,
    take_away,
    unwrapped,
    without_side_channel,
)
from fused_prefopt.preference import PreferenceLoss
from fused_prefopt.reference import Collator, Feature, add_reference_logps
from fused_prefopt.types import LMHead, LossOutput

# Fields that a reference gives.
_REFERENCE_FIELDS = (REFERENCE, PROMPT_REFERENCE, *sorted(OF_BOTH_HEADS))
OF_REFERENCE = frozenset(_REFERENCE_FIELDS)


def preference_outputs(
    model: nn.Module,
    loss_fn: PreferenceLoss,
    batch: Mapping[str, Any],
    *,
    sequence_group: dist.ProcessGroup | None = None,
) -> LossOutput:
    """Backbone, then loss, of a batch from `PairCollator` or `PointCollator`.

    Args:
        model: causal language model with a backbone and an output embedding, in its wrappers.
        loss_fn: which loss.
        batch: `input_ids`, `completion_mask`, `attention_mask` or `position_ids`, and the extras
            that the collators document; padded (S, L) or packed (1, N); or a shard of one.
        sequence_group: of a shard, the ranks that have the other tokens.

    Raises:
        ValueError: the loss needs a field that the batch does not have, or what `collated_rows`
            raises.
    """
    options: dict[str, Any] = {"of_tokens": False, "sequence_group": sequence_group}
    return _outputs(model, loss_fn, batch, given_fields(batch), **options)[0]


def lacks_reference(loss_fn: PreferenceLoss, missing: Collection[str]) -> str:
    """Message about rows, where no reference is at hand, that lack what one gives.

    Args:
        loss_fn: the loss.
        missing: at least one of `OF_REFERENCE`.
    """
    name = min(missing)
    ways = ["reference=<model>", "reference='adapter' (the model without its PEFT adapter)"]
    if not OF_BOTH_HEADS & set(missing):
        ways += [
            "reference_cache=<folder> with one of them",
            "rows with the columns of `add_reference_logps`",
        ]
    return f"{loss_fn.name} needs `{name}`: {WHAT_IT_IS[name]}; give {' or '.join(ways)}"


class Attachment:
    """A loss attached to a model; made by `integrations.transformers.attach`.

    A deep copy of the model computes the loss of its own weights, with the same `loss_fn` and
    reference, and adds to the same metrics.

    Args:
        model: causal language model.
        loss_fn: the loss.
        reference: where the reference log-probs of a batch without them come from, or None.
        log_tokens: also log `token_metrics`.
        router_coefficient: of a mixture of experts' load-balancing loss, 0 for none; None leaves
            both to the model's config.

    Attributes:
        loss_fn: the loss; it follows the model's train and eval mode.
        reference: as given.
        sequence_group: ranks that have the other tokens of batches that are shards (those with
            `shift_labels`), for the loss and the reference; None until it is set.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: PreferenceLoss,
        reference: Reference | None = None,
        log_tokens: bool = False,
        router_coefficient: float | None = None,
    ) -> None:
        self.loss_fn = loss_fn
        self.reference = reference
        self.sequence_group: dist.ProcessGroup | None = None
        self._log_tokens = log_tokens
        self._router_coefficient = router_coefficient
        self._metrics = {"train": StepMetrics(), "eval": StepMetrics()}
        self._model = unwrapped(model)
        self._place = put_in_front(self._model, self._forward)
        # Their forward keeps the token ids to itself.
        self._hooks = [
            each.register_forward_pre_hook(_open_side_channel, with_kwargs=True)
            for each in prompt_learners(model)
        ]

    def detach(self) -> None:
        """Give the model back the forward that it had."""
        take_away(self._model, self._place)
        for hook in self._hooks:
            hook.remove()

    def pop_metrics(self, mode: str) -> dict[str, float]:
        """Means of the metrics over the steps since the last call and all ranks; forgets them.

        Of each step the mean over all ranks' pairs (completions, tokens), of `nonfinite` the number
        among them, then the mean over the steps, as TRL logs them. Every rank must make the call.

        Args:
            mode: "train" or "eval".
        """
        group = self.sequence_group
        return self._metrics[mode].pop(1 if group is None else dist.get_world_size(group))

    def add_metrics(
        self, mode: str, metrics: Mapping[str, Tensor], weights: Mapping[str, Tensor]
    ) -> None:
        """Keep metrics of a step that are not the loss's, to be logged with its own.

        Args:
            mode: "train" or "eval".
            metrics, weights: as in `StepMetrics.add`.
        """
        self._metrics[mode].add(metrics, weights)

    def forget_metrics(self, mode: str) -> None:
        """Drop this rank's metrics since the last `pop_metrics`.

        Args:
            mode: "train" or "eval".
        """
        self._metrics[mode].forget()

    def _forward(
        self,
        model: nn.Module,
        own: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        channel: SideChannel | None = kwargs.get(SIDE_CHANNEL)
        if channel is not None and channel.request is not None:
            channel.found = answer(model, channel.request, batch_behind(kwargs))
            return channel.found
        if kwargs.get(COMPLETION_MASK) is None:
            return own(*args, **without_side_channel(kwargs))
        batch = batch_behind(kwargs)
        self.loss_fn.train(model.training)
        if model.training and not torch.compiler.is_compiling():
            _refuse_join(self.loss_fn)
        extras, compared = self._with_reference(batch)
        output, weighed = _outputs(
            model,
            self.loss_fn,
            batch,
            extras,
            compared=compared,
            of_tokens=self._log_tokens,
            router_coefficient=self._router_coefficient,
            sequence_group=self.sequence_group,
        )
        self._metrics["train" if model.training else "eval"].add(*weighed)
        if channel is not None:
            channel.found = {"loss": output.loss}
        return {"loss": output.loss}

    def _with_reference(
        self, batch: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor | None], Compared | None]:
        extras, needs = given_fields(batch), self.loss_fn.loss.needs
        if extras[GROUPS] is not None:
            # Before a reference has taken its sequences for pairs.
            self.loss_fn.require_lists()
        for name in _REFERENCE_FIELDS:
            _require_exact(name, extras[name])
        missing = {name for name in _REFERENCE_FIELDS if name in needs and extras[name] is None}
        if not missing:
            return extras, None
        if self.reference is None:
            raise ValueError(lacks_reference(self.loss_fn, missing))
        group = self.sequence_group
        if OF_BOTH_HEADS & missing:
            return extras, (self.reference, self.reference.hidden(batch, group))
        wanted = PROMPT_REFERENCE in missing
        return extras | self.reference.logps(batch, prompt=wanted, sequence_group=group), None


def _outputs(
    model: nn.Module,
    loss_fn: PreferenceLoss,
    batch: Mapping[str, Any],
    extras: Mapping[str, Tensor | None],
    *,
    compared: Compared | None = None,
    of_tokens: bool,
    router_coefficient: float | None = None,
    sequence_group: dist.ProcessGroup | None = None,
) -> tuple[LossOutput, Weighed]:
    """The loss of a batch, and its metrics with what each is a mean over."""
    router = wants_router_loss(model) if router_coefficient is None else router_coefficient != 0
    needs: Collection[str] = loss_fn.loss.needs
    shared: dict[str, Any] = {"sequence_group": sequence_group}
    rows = collated_rows(model, batch, prompt=PROMPT in needs, router=router, **shared)
    part = gold_part(batch) if GOLD in needs else None
    gold = None if part is None else collated_rows(model, part, prompt=False, **shared)
    if batch.get(SPENT):
        rows, gold, of_tokens = without_sequences(rows), gold and without_sequences(gold), False
        extras = {name: _none(value) for name, value in extras.items()}
        compared = None if compared is None else (compared[0], compared[1][:0])
    device = rows.hidden.device
    _move(loss_fn, device)
    extras = {name: None if value is None else value.to(device) for name, value in extras.items()}
    forward = _LossInHead(model, loss_fn, rows, gold, extras, compared, of_tokens)
    with head_running(model, forward) as head:
        loss: Tensor = head(rows.hidden)
    output, tokens = forward.found
    # FSDP2 casts what a unit's forward returns, after its hooks are on it.
    if loss.dtype == output.loss.dtype:
        output = replace(output, loss=loss)
    if rows.router is not None:
        coefficient, aux_loss = rows.router
        if router_coefficient is not None and not batch.get(SPENT):
            coefficient = router_coefficient
        metrics = output.metrics | {"aux_loss": aux_loss.detach()}
        output = replace(output, loss=output.loss + coefficient * aux_loss, metrics=metrics)
    lists = Lists.of(loss_fn, extras)
    desirable = None if loss_fn.loss.pairwise else extras[DESIRABLE]
    weights = metric_weights(output, desirable, extras[WEIGHTS], lists) | tokens[1]
    if batch.get(MADE_UP_REWARDS):
        scores = [name for name in weights if name in (SCORES_MEAN, SCORES_STD)]
        weights |= dict.fromkeys(scores, output.losses.new_zeros(()))
    return output, (output.metrics | tokens[0], weights)


@dataclass(eq=False)
class _LossInHead:
    """The loss of a batch as a head's forward: last hidden states → 0-d loss.

    Args:
        model: causal language model.
        loss_fn: which loss.
        rows: the batch.
        gold: the gold completions of its pairs, or None.
        extras: its fields of `LogpBatch`.
        compared: a reference with its rows of the batch, or None.
        of_tokens: also `token_metrics`.

    Attributes:
        found: after a call the loss's output, and the metrics of single tokens.
    """

    model: nn.Module
    loss_fn: PreferenceLoss
    rows: CollatedRows
    gold: CollatedRows | None
    extras: Mapping[str, Tensor | None]
    compared: Compared | None
    of_tokens: bool
    found: tuple[LossOutput, Weighed] = field(init=False)

    def __call__(self, hidden: Tensor) -> Tensor:
        require_plain(hidden)
        head, rows = LMHead.of(self.model), self.rows
        tokens: Weighed = {}, {}
        if self.of_tokens:
            tokens = token_metrics(self.loss_fn, rows, hidden, head, self.extras)
        given: dict[str, Any] = {**rows.layout, **self.extras, TOKEN_WEIGHTS: rows.token_weights}
        given |= {POSITION_IDS: rows.position_ids, "sequence_group": rows.sequence_group}
        if self.compared is not None:
            source, given["ref_hidden"] = self.compared
            given["ref_head"] = source.head()
        if rows.prompt_labels is not None:
            given["prompt_labels"] = rows.prompt_labels
            given["num_prompt_labels"] = rows.num_prompt_labels
        if self.gold is not None:
            given |= gold_fields(self.gold, head, **self.loss_fn.op_options)
        output = self.loss_fn(hidden, head, rows.labels, **given)
        self.found = output, tokens
        return output.loss


def _none(value: Tensor | None) -> Tensor | None:
    """A field of no sequence; what belongs to the batch stays."""
    return value[:0] if isinstance(value, Tensor) and value.dim() else value


def _refuse_join(loss_fn: PreferenceLoss) -> None:
    """Raise ValueError where ranks may leave early, by DDP's `join`, that others exchange with.

    A rank that has left answers DDP's own collectives, with which the loss's would be mixed up.
    """
    find = getattr(DistributedDataParallel, "_get_active_ddp_module", lambda: None)
    wrapper = find()
    joins = wrapper is not None and wrapper._join_config.enable
    exchanges = loss_fn.statistics is not None or loss_fn.loss.coupled or loss_fn.uneven_ranks
    if joins and exchanges:
        raise ValueError(
            f"join: got DDP's `join` (accelerate's `join_uneven_inputs`) with {loss_fn.name}, for"
            " which every rank takes part in every batch; needs a loop without it, in which a rank"
            f" that has no more batches repeats one as {{**batch, {SPENT!r}: True}}"
        )


def _move(loss_fn: PreferenceLoss, device: torch.device) -> None:
    """Put a loss's statistics where the hidden states are, if they are elsewhere."""
    if device.type == "mps":
        raise ValueError("model: got one on mps, needs a device that has float64 (CUDA or the CPU)")
    if any(buffer.device != device for buffer in loss_fn.buffers()):
        loss_fn.to(device)


def _open_side_channel(
    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook: `past_wrappers` of a preference batch that comes without it."""
    if kwargs.get(COMPLETION_MASK) is None or SIDE_CHANNEL in kwargs:
        return None
    return args, past_wrappers(kwargs)


def _require_exact(name: str, value: Tensor | None) -> None:
    """Raise ValueError if log-probs have been rounded to half precision.

    Args:
        name: of the field, for the message.
        value: its values, or None.
    """
    if value is not None and value.dtype in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"{name}: got {value.dtype}, needs float32; if the model's wrapper rounds it (FSDP),"
            " call `model(**past_wrappers(batch))` of `integrations.transformers`"
        )


class Reference:
    """The model that a policy is compared with.

    Args:
        policy: the model that trains.
        source: another model, or "adapter": the policy itself without its PEFT adapters.
        **options: of `completion_logps`, such as `workspace_mb`.

    Raises:
        ValueError: `source` is "adapter" and the policy has none, or another string.
    """

    def __init__(
        self,
        policy: nn.Module,
        source: nn.Module | str,
        **options: Any,
    ) -> None:
        self._options = options
        self._peft: Any = None
        if isinstance(source, str):
            if source != "adapter":
                raise ValueError(
                    f"reference: got {source!r}, needs 'adapter', 'precomputed' or a model"
                )
            self._peft = _peft_of(policy)
        self.model: nn.Module = source if isinstance(source, nn.Module) else self._peft
        self._is_placed = self._peft is not None

    def logps(
        self,
        batch: Mapping[str, Any],
        *,
        prompt: bool,
        sequence_group: dist.ProcessGroup | None = None,
    ) -> dict[str, Tensor]:
        """`reference`, and `prompt_reference` where prompts are wanted, (S,) fp32 in nats.

        Args:
            batch: of a collator, or a shard of one.
            prompt: whether prompts are wanted.
            sequence_group: of a shard, the ranks that have the other tokens.
        """
        sums = self._asked(batch, prompt=prompt, sequence_group=sequence_group, **self._options)
        names = {"completion": REFERENCE, "prompt": PROMPT_REFERENCE}
        return {names[part]: values for part, values in sums.items()}

    def hidden(
        self, batch: Mapping[str, Any], sequence_group: dist.ProcessGroup | None = None
    ) -> Tensor:
        """The rows that the head would meet, (S, L, D) or packed (N, D); arguments of `logps`."""
        return self._asked(batch, **HIDDEN, sequence_group=sequence_group)["hidden"]

    @torch.no_grad()
    def _asked(self, batch: Mapping[str, Any], **wanted: Any) -> dict[str, Tensor]:
        """`logps_through` the reference."""
        self.place(batch[INPUT_IDS].device)
        with self.active():
            if self._peft is None:
                return logps_through(self.model, batch, **wanted)
            # The policy is inside its own forward, where its wrappers are at work already. What
            # its adapter made of the batch goes with the adapter.
            own = {name: value for name, value in batch.items() if name != PROMPTED}
            return answer(unwrapped(self._peft), wanted, own)

    def head(self) -> LMHead:
        """Its head, which must be whole here (of the policy's own: inside the policy's head)."""
        with self.active():
            return LMHead.of(self.model)

    def add_logps(
        self, features: Sequence[Feature], collator: Collator, **options: Any
    ) -> list[dict[str, Any]]:
        """`add_reference_logps` with this reference."""
        with self.active():
            return add_reference_logps(self.model, features, collator, **options)

    def place(self, device: torch.device) -> None:
        """Move a model of its own to where its batches are, as `place` does, the first time."""
        if not self._is_placed:
            place(self.model, device)
            self._is_placed = True

    @contextmanager
    def active(self) -> Iterator[None]:
        """The reference in eval mode, its adapters off where it is the policy."""
        off: AbstractContextManager[Any]
        off = nullcontext() if self._peft is None else self._peft.disable_adapter()
        with evaluating(self.model), off:
            yield


# A reference, and its rows of the batch.
Compared = tuple[Reference, Tensor]


def _peft_of(model: nn.Module) -> nn.Module:
    inner: Any = model
    while isinstance(inner, nn.Module):
        if callable(getattr(inner, "disable_adapter", None)):
            return inner
        inner = getattr(inner, "module", None)
    raise ValueError(f"reference: got 'adapter' with a {type(model).__name__}, needs a PeftModel")


def place(model: nn.Module, device: torch.device) -> None:
    """Move a model to an accelerator, unless another has placed it.

    A model stays where it is if it is sharded, partitioned, dispatched, quantised, without values
    or in several places, and none goes to the CPU.

    Args:
        model: a reference.
        device: of its batches.
    """
    values = list(model.parameters())
    plain = all(type(value) is nn.Parameter and not hasattr(value, "ds_id") for value in values)
    devices = {value.device for value in values}
    if device.type == "cpu" or not plain or hasattr(model, "hf_device_map"):
        return
    if len(devices) == 1 and not devices & {device, torch.device("meta")}:
        model.to(device)
