"""`losses --for DATA`: which losses the rows of a data set allow, and what each costs."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from fused_prefopt.cli.console import UserError, text_table, wrapped
from fused_prefopt.cli.judged_rows import KINDS, DataSet, JudgedRows, read_judged_rows
from fused_prefopt.cli.needs import (
    OF_POLICY,
    OF_REFERENCE,
    columns_of,
    cost_of,
    first_lack,
    refused_weights,
    weigh_nothing,
)
from fused_prefopt.data.columns import (
    COLLISION,
    DESIRABLE,
    KL,
    LABELS,
    PROMPT,
    PROMPT_LENGTHS,
    RATINGS,
    REWARD,
    WEIGHT,
    has_values,
)
from fused_prefopt.losses import available_losses, find, named_loss
from fused_prefopt.losses.protocol import OF_BOTH_HEADS, WHAT_IT_IS, Loss
from fused_prefopt.types import COST_IN_P

_WIDTH = 100
# What a column of an adapter may be called in a data set.
_NAMES = {REWARD: RATINGS, DESIRABLE: LABELS}


def choices(data: DataSet, name: str | None = None) -> str:
    """The losses that a data set allows, with needs and costs, and those that it does not.

    Args:
        data: to train on.
        name: of the one loss, published setting or sum to look at; None is every registered loss.

    Raises:
        UserError: the data cannot be read, or do not allow the loss that is named.
        ValueError: there is no such loss; the message lists the closest names.
    """
    if name is None:
        losses = {each: find(each).build() for each in available_losses()}
    else:
        named = named_loss(name, {})
        losses = {named.name: named.loss}
    rows = read_judged_rows(data)
    refused = {each: _refusal(loss, rows) for each, loss in losses.items()}
    allowed = {each: loss for each, loss in losses.items() if refused[each] is None}
    if name is not None and not allowed:
        ((name, reason),) = refused.items()
        raise UserError(
            f"--for: got {', '.join(rows.said.splitlines())}, but {name} needs {reason};"
            f" `fused-prefopt losses --for {data.name}` lists the losses that it allows"
        )
    parts = ["\n".join([rows.said, *(_filled(f"caution: {each}", 2) for each in rows.cautions)])]
    for kind in KINDS:
        of_kind = {each: loss for each, loss in allowed.items() if rows.kind_of(loss) == kind}
        if of_kind:
            count = len(rows.judged[kind])
            parts += [f"{kind}: {count}, {rows.made_of[kind]}", _allowed_table(rows, of_kind)]
    if allowed:
        parts.append(_legend(allowed))
    missing: dict[str, list[str]] = {}
    for each, reason in refused.items():
        if reason is not None:
            missing.setdefault(reason, []).append(each)
    if missing:
        cells = [(", ".join(names), reason) for reason, names in missing.items()]
        parts.append(text_table(("not allowed", "needs"), wrapped(cells, (46, 52))))
    return "\n\n".join(parts)


def _refusal(loss: Loss, rows: JudgedRows) -> str | None:
    """The one thing that the rows lack for a loss, or None."""
    judged = rows.judged[rows.kind_of(loss)]
    if isinstance(judged, str):
        return judged
    refused = refused_weights(loss, judged)
    if refused is not None:
        return f"pairs without weights, as it sorts them, not {refused}"
    if weigh_nothing(judged):
        return f"a {WEIGHT!r} above 0 in some row"
    lack = first_lack(loss, judged)
    if lack is None:
        return None
    if lack.columns is None:
        return f"`{lack.field}`, {WHAT_IT_IS[lack.field]}, which `train` does not compute"
    names = [" or ".join(_NAMES.get(name, (name,))) for name in lack.columns]
    some = "" if lack.rows == len(judged) else f"; {lack.rows} of {len(judged)} rows are without"
    return f"column{'s' if len(names) > 1 else ''} {' and '.join(names)}{some}"


def _allowed_table(rows: JudgedRows, allowed: Mapping[str, Loss]) -> str:
    """Losses of one kind, the cheapest first; those of the same needs and costs share a row."""
    alike: dict[tuple[str, ...], list[str]] = {}
    by_cost = sorted(allowed.items(), key=lambda each: cost_of(each[1]).most)
    for name, loss in by_cost:
        alike.setdefault((_needs(loss, rows), *_costs(loss), _keeps(loss)), []).append(name)
    heading = ("loss", "needs, from", "P", "P, frozen", "reference", "keeps")
    cells = [(", ".join(names), *rest) for rest, names in alike.items()]
    return text_table(heading, wrapped(cells, (32, 22, 9, 9, 9, 9)))


def _needs(loss: Loss, rows: JudgedRows) -> str:
    """Fields and what gives them; of those that a loss can do without, the ones that are there."""
    found: dict[str, list[str]] = {}
    judged = rows.judged[rows.kind_of(loss)]
    assert not isinstance(judged, str)
    for field in sorted(loss.needs | loss.wants):
        columns = columns_of(loss, judged, field)
        if field in OF_REFERENCE:
            origin = "both models" if field in OF_BOTH_HEADS else "model"
        elif field in OF_POLICY:
            origin = "computed"
        elif columns is not None and all(has_values(row, columns) for row in judged):
            origins = dict.fromkeys(rows.origins.get(name, name) for name in columns)
            origin = ", ".join(origins) or "the list"
        else:
            continue
        found.setdefault(origin, []).append(field)
    return "; ".join(f"{', '.join(fields)}: {origin}" for origin, fields in found.items()) or "-"


def _costs(loss: Loss) -> tuple[str, str, str]:
    """P of a step where the head trains, where it does not, and of the reference."""
    cost = cost_of(loss)
    reference = _span((cost.reference,) * 2, (cost.reference_prompts,) * 2) or "-"
    if cost.both_models:
        reference = "included"
    frozen = _span((cost.frozen,) * 2, (cost.frozen_prompts,) * 2)
    return _span(cost.trained, cost.prompts), frozen, reference


def _span(span: tuple[float, float], prompts: tuple[float, float]) -> str:
    """Such as "3 to 4, prompts 1"; "" of nothing."""
    parts = []
    for name, (least, most) in (("", span), ("prompts ", prompts)):
        if most:
            parts.append(f"{name}{least:g}" + (f" to {most:g}" if most > least else ""))
    return ", ".join(parts)


def _keeps(loss: Loss) -> str:
    kept = "statistic" if loss.statistics() is not None else ""
    return ", ".join(filter(None, (kept, "exchange" if loss.coupled else ""))) or "-"


def _legend(allowed: Mapping[str, Loss]) -> str:
    """What the words of the table mean, of those that are in it."""
    fields = {field for loss in allowed.values() for field in loss.needs | loss.wants}
    once = COST_IN_P["evaluate"]
    said = [
        "Costs are those of a step in P, a matmul of the completions' tokens with the head, beside"
        f" the backbone's pass. A head that trains costs {COST_IN_P['local']:g} P where the"
        f" workspace holds all probabilities, up to {COST_IN_P['recompute']:g} P else; a frozen"
        f" one (LoRA) {COST_IN_P['stash']:g} P."
    ]
    if fields & OF_REFERENCE - OF_BOTH_HEADS:
        said.append(
            "reference: a forward pass of it and its P in each step with `reference: model` or"
            " `adapter`; 0 with `precomputed`, which has both done once, before training, and"
            " cached."
        )
    if fields & OF_BOTH_HEADS:
        said.append(
            "both models: one pass of the two heads in each step, in the P shown; needs `reference:"
            " model` or `adapter`, not `precomputed`."
        )
    if PROMPT in fields:
        trains = ", with a gradient" if PROMPT_LENGTHS in fields else ""
        said.append(f"prompts: P of the prompts' tokens, of which there may be more{trains}.")
    if COLLISION in fields:
        said.append(f"collision: {once:g} P, an evaluation of the policy more.")
    if KL in fields:
        said.append(
            "kl: the batch's mean stands for it at no cost; TRL's KTO trainers estimate it from"
            f" mismatched completions, a pass and {once:g} P more of each model."
        )
    if any(loss.statistics() is not None for loss in allowed.values()):
        said.append("statistic: of earlier batches and all ranks; it belongs in checkpoints.")
    if any(loss.coupled for loss in allowed.values()):
        said.append("exchange: the ranks exchange their pairs' log-probs in each step.")
    return "\n".join(_filled(each, 2) for each in said)


def _filled(text: str, indent: int) -> str:
    return textwrap.fill(text, _WIDTH, subsequent_indent=" " * indent)
