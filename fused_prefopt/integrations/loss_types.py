"""The losses of TRL by its names, with its options: as losses of this package.

They are those of TRL 1.10 to 1.16; 1.9 leaves constants out of the divergences, which makes a
difference to "ipo" and "sigmoid_norm" under one. "bco_pair" subtracts no running mean of rewards
(TRL 0.24 still did: `reward_shift` of "bco-pair"). Nothing here imports TRL: its names are also
those of frameworks that are built on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fused_prefopt.checks import closest, require_choice

_PAIRS = {
    "sigmoid": "dpo",
    "hinge": "hinge",
    "ipo": "ipo",
    "exo_pair": "exo-pair",
    "nca_pair": "nca-pair",
    "robust": "robust-dpo",
    "bco_pair": "bco-pair",
    "sppo_hard": "sppo-hard",
    "aot": "aot",
    "aot_unpaired": "aot-unpaired",
    "apo_zero": "apo-zero",
    "apo_down": "apo-down",
    "discopop": "discopop",
    "sft": "sft",
    "sigmoid_norm": "sigmoid-norm",
}
_POINTS = {"kto": "kto", "apo_zero_unpaired": "apo-zero-unpaired"}
# TRL's loss → link of f-dpo, of those that have any divergence.
_LINKS = {
    "sigmoid": "logistic",
    "sigmoid_norm": "logistic",
    "hinge": "hinge",
    "ipo": "squared",
    "exo_pair": "exact",
    "robust": "robust",
    "discopop": "blended",
}
_PER_TOKEN = ("ipo", "sigmoid_norm")
_SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")
_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
_ALPHA = "alpha_divergence"


@dataclass(frozen=True)
class LossOptions:
    """What shapes TRL's losses, by TRL's names and with its defaults.

    Args:
        beta: β > 0; of "ipo" its τ.
        label_smoothing: ε of "exo_pair", "robust", "aot" and "aot_unpaired".
        f_divergence_type: "reverse_kl", "forward_kl", "js_divergence" or "alpha_divergence".
        f_alpha_divergence_coef: α of the last.
        discopop_tau: T of "discopop".
        desirable_weight, undesirable_weight: λ of "kto" and "apo_zero_unpaired".

    Raises:
        ValueError: there is no such divergence.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = 0.05
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        require_choice("f_divergence_type", self.f_divergence_type, _DIVERGENCES)


def named_here(
    loss_type: str, options: LossOptions | None = None
) -> tuple[str, dict[str, float | str | bool]]:
    """Name and hyperparameters, for `PreferenceLoss`, of a loss of TRL's.

    Args:
        loss_type: of TRL's DPO or KTO trainer; "-" for "_" and case do not matter.
        options: TRL's, those that the loss reads; None takes the defaults.

    Raises:
        ValueError: TRL has no such loss (the message has the closest names), or none of this
            divergence.
    """
    options = LossOptions() if options is None else options
    key = str(loss_type).lower().replace("-", "_")
    names = _PAIRS | _POINTS
    if key not in names:
        listed = ", ".join(map(repr, names))
        raise ValueError(f"loss_type: got {loss_type!r}{closest(key, names)}, wanted {listed}")
    found: dict[str, float | str | bool] = {} if key == "sft" else {"beta": options.beta}
    if key in _POINTS:
        found["desirable_weight"] = options.desirable_weight
        found["undesirable_weight"] = options.undesirable_weight
    if key != "sft" and options.f_divergence_type != "reverse_kl":
        return "f-dpo", found | _of_divergence(key, options)
    if key == "ipo":
        found = {"tau": options.beta, "length_normalized": True}
    elif key == "robust":
        found |= {"epsilon": options.label_smoothing, "unbiased": True}
    elif key in _SMOOTHED:
        found["label_smoothing"] = options.label_smoothing
    elif key == "discopop":
        found["temperature"] = options.discopop_tau
    return names[key], found


def _of_divergence(key: str, options: LossOptions) -> dict[str, float | str | bool]:
    """Hyperparameters of f-dpo beside β."""
    if key not in _LINKS:
        raise ValueError(
            f"f_divergence_type: got {options.f_divergence_type!r} with {key!r}, wanted"
            f" 'reverse_kl', or a loss on the difference of two rewards: {', '.join(_LINKS)}"
        )
    found: dict[str, float | str | bool] = {
        "divergence": options.f_divergence_type,
        "link": _LINKS[key],
        "length_normalized": key in _PER_TOKEN,
    }
    if options.f_divergence_type == _ALPHA:
        found["alpha"] = options.f_alpha_divergence_coef
    if key in _SMOOTHED:
        found["label_smoothing"] = options.label_smoothing
    if key == "discopop":
        found["temperature"] = options.discopop_tau
    return found


def terms_here(
    loss_type: str | Sequence[str],
    loss_weights: Sequence[float] | None = None,
    given: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """The list, for `PreferenceLoss`, of TRL's `loss_type` and `loss_weights`.

    Args:
        loss_type: one of TRL's losses, or those of a sum.
        loss_weights: as many as losses; None: 1 each.
        given: the fields of `LossOptions` that are not at TRL's default.

    Raises:
        ValueError: there is no such loss, the weights are not as many, or an option is given that
            none of the losses reads.
    """
    kinds = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    weights = [1.0] * len(kinds) if loss_weights is None else list(loss_weights)
    if len(weights) != len(kinds):
        raise ValueError(
            f"loss_weights: got {len(weights)} for the {len(kinds)} of loss_type {kinds}, wanted as"
            " many"
        )
    given = dict(given or {})
    options = LossOptions(**given)
    named = [named_here(kind, options) for kind in kinds]
    _require_read(kinds, given)
    return [
        {"name": name, "weight": weight, "hyperparameters": hyperparameters}
        for (name, hyperparameters), weight in zip(named, weights, strict=True)
    ]


def _require_read(kinds: Sequence[str], given: Mapping[str, Any]) -> None:
    """Raise if TRL would take an option and leave it unread."""
    keys = {kind.lower().replace("-", "_") for kind in kinds}
    readers: dict[str, set[str]] = {
        "label_smoothing": keys & set(_SMOOTHED),
        "discopop_tau": keys & {"discopop"},
        "f_divergence_type": keys & set(_LINKS),
        "f_alpha_divergence_coef": (
            keys & set(_LINKS) if given.get("f_divergence_type") == _ALPHA else set()
        ),
    }
    for name, found in readers.items():
        if name in given and not found:
            raise ValueError(
                f"{name}: got {given[name]!r}, which none of loss_type {list(kinds)} reads; leave"
                " it out, or name a loss in `loss` and give its hyperparameters in `loss_kwargs`"
            )
