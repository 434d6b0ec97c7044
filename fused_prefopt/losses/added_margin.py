"""A margin added to that of another loss: γ-PO's or α-DPO's, by name, on any reward of pairs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeGuard

from fused_prefopt.checks import closest, require_choice, require_switches
from fused_prefopt.losses.adaptive_margin import AdaptiveMargin, adaptive_margin
from fused_prefopt.losses.dynamic_margin import DynamicMargin
from fused_prefopt.losses.links import Indifferent, Linear
from fused_prefopt.losses.margins import (
    ConstantMargin,
    DropMargin,
    LengthMargin,
    OffsetMargin,
    ScoreMargin,
    SequenceKlMargin,
    SumMargin,
)
from fused_prefopt.losses.pairwise import PairwiseLoss
from fused_prefopt.losses.protocol import Loss, Margin, Reward

# A part, or the name of one with its options.
MarginName = Margin | Mapping[str, Any]
_PARTS: dict[str, Callable[..., Margin]] = {
    "dynamic": DynamicMargin,
    "constant": ConstantMargin,
    "length": LengthMargin,
    "score": ScoreMargin,
    "offset": OffsetMargin,
    "drop": DropMargin,
    "sequence-kl": SequenceKlMargin,
}
_OF_A_REWARD: dict[str, Callable[..., Margin]] = {"adaptive": adaptive_margin}
MARGIN_NAMES = (*_OF_A_REWARD, *_PARTS)


def takes_margin(loss: Loss) -> TypeGuard[PairwiseLoss]:
    """Whether a target margin makes a difference to what a loss trains."""
    # A linear link's slope is the same wherever the margin lies.
    if not isinstance(loss, PairwiseLoss) or isinstance(loss.link, Indifferent | Linear):
        return False
    return loss.ranking is None or loss.ranking.takes_margins


def with_margin(name: str, loss: PairwiseLoss, given: MarginName) -> PairwiseLoss:
    """A loss that subtracts one more target margin from its reward margins.

    The loss keeps its own. The added one sees the reward margins without it.

    Args:
        name: of the loss, for messages.
        loss: one that `takes_margin`.
        given: a part, or a mapping with its `name`, of `MARGIN_NAMES`, and its options: the fields
            of the part, of "adaptive" the options of `adaptive_margin`.

    Returns:
        The same parts but for the margin.

    Raises:
        ValueError: both margins keep a statistic, there is no such margin, or an option is unknown,
            missing or out of range.

    Source: γ-PO, section 3.2: its margin goes with every loss of reward margins.
    """
    try:
        return replace(loss, margin=_joined(loss.margin, margin_of(given, loss.reward)))
    except ValueError as error:
        said = str(error).removeprefix("margin: ")
        raise ValueError(f"margin of {name}: {said}") from error


def margin_of(given: MarginName, reward: Reward) -> Margin:
    """The part of a name, for a reward.

    Args:
        given: as in `with_margin`.
        reward: that the margin belongs to.

    Raises:
        ValueError: as in `with_margin`.
    """
    if isinstance(given, Margin) and not isinstance(given, type):
        return given
    if not isinstance(given, Mapping) or not isinstance(given.get("name"), str):
        raise ValueError(
            f"margin: got {given!r}, wanted a mapping such as {{'name': 'dynamic', 'gamma': 0.5}},"
            " or a part such as losses.DynamicMargin(gamma=0.5)"
        )
    name = given["name"].lower().replace("_", "-")
    require_choice("name", name, MARGIN_NAMES)
    part = _PARTS[name] if name in _PARTS else partial(_OF_A_REWARD[name], reward)
    options = {key: value for key, value in given.items() if key != "name"}
    known = {key: each.default for key, each in inspect.signature(part).parameters.items()}
    accepted = ", ".join(known) or "no options"
    for key in options.keys() - known.keys():
        raise ValueError(f"{name}: got {key!r}{closest(str(key), known)}, wanted {accepted}")
    for key, default in known.items():
        if default is inspect.Parameter.empty and key not in options:
            raise ValueError(f"{key}: got none for {name}, needs a value")
    require_switches(options, known)
    return part(**options)


def _joined(own: Margin, added: Margin) -> Margin:
    """Both margins as one, of a kind that has a kernel where there is one."""
    for constant, other in ((own, added), (added, own)):
        if type(constant) is ConstantMargin:
            if constant.gamma == 0:
                return other
            if type(other) is ConstantMargin or type(other) is AdaptiveMargin:
                return replace(other, gamma=constant.gamma + other.gamma)
    return SumMargin(own=own, added=added)
