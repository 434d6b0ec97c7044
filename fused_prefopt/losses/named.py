"""Losses as they are named: one, a published setting, or a sum of them with weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fused_prefopt.checks import closest, require_number
from fused_prefopt.losses.added_margin import MarginName, takes_margin, with_margin
from fused_prefopt.losses.protocol import Loss, Weighting
from fused_prefopt.losses.registry import LossSpec, PublishedSetting, find, published_setting
from fused_prefopt.losses.weighted_sum import Term, WeightedSum

# A text such as "dpo + 0.2 bco-pair", or a list of such texts and of mappings with these keys.
LossName = str | Sequence[str | Mapping[str, Any]]
TERM_KEYS = ("name", "weight", "hyperparameters")
# Not the sign of an exponent: 1e+3.
_PLUS = re.compile(r"(?<!\d[eE])\+")
_TERM = re.compile(r"(?:(\d*\.?\d+(?:[eE][+-]?\d+)?|\d+\.)(?:\s*\*\s*|\s+))?([^\s*]+)")
_WANTED = (
    "a name, names joined by +, each behind its weight, such as 'dpo + 0.2 bco-pair + sft', or a"
    " list of names and of mappings with name, weight and hyperparameters"
)


@dataclass(frozen=True)
class NamedTerm:
    """A registered loss with a weight.

    Attributes:
        name: of the loss.
        weight: in the sum.
        hyperparameters: all of them, by name.
        loss: what they compose, with the margin that was added, if one was.
    """

    name: str
    weight: float
    hyperparameters: dict[str, Any]
    loss: Loss


@dataclass(frozen=True)
class NamedLoss:
    """One registered loss, or a sum of them.

    Attributes:
        terms: one, or those of the sum.
        weighting: how much a pair counts in each of them; None for what each says itself.
    """

    terms: tuple[NamedTerm, ...]
    weighting: Weighting | None = None

    @property
    def is_sum(self) -> bool:
        """Whether it is more than one loss of weight 1."""
        return len(self.terms) > 1 or self.terms[0].weight != 1

    @property
    def name(self) -> str:
        """Such as "dpo" or "dpo + 0.2 bco-pair": it names the same losses again."""
        return _sum_of((term.weight, term.name) for term in self.terms)

    @property
    def labels(self) -> list[str]:
        """The terms' names, with a number from the second of a name on: "dpo", "dpo-2"."""
        names = [term.name for term in self.terms]
        counts = [names[: i + 1].count(name) for i, name in enumerate(names)]
        pairs = zip(names, counts, strict=True)
        return [name if count == 1 else f"{name}-{count}" for name, count in pairs]

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """All by name; of a sum the terms' by their labels."""
        if not self.is_sum:
            return self.terms[0].hyperparameters
        of_terms = (term.hyperparameters for term in self.terms)
        return dict(zip(self.labels, of_terms, strict=True))

    @property
    def loss(self) -> Loss:
        """The pure function of log-probs."""
        if not self.is_sum and self.weighting is None:
            return self.terms[0].loss
        labelled = zip(self.labels, self.terms, strict=True)
        terms = tuple(Term(label, each.loss, each.weight) for label, each in labelled)
        return WeightedSum(terms, self.weighting)

    def described(self) -> str:
        """The names with the hyperparameters."""
        if not self.is_sum:
            return ", ".join([self.name, *_values(self.hyperparameters)])
        return _sum_of(
            (term.weight, f"{term.name}({', '.join(_values(term.hyperparameters))})")
            for term in self.terms
        )


def named_loss(
    name: LossName,
    shared: Mapping[str, Any],
    weighting: Weighting | None = None,
    margin: MarginName | None = None,
) -> NamedLoss:
    """The loss of a name, or the sum of several.

    Args:
        name: of a registered loss, an alias or a published setting; "+" joins the terms of a sum,
            each with its weight before it, and so does a list, whose entries are such texts or
            mappings with `name`, `weight` (1) and `hyperparameters` of the term.
        shared: hyperparameters of every term that has them. They go before a published setting's;
            a term's own go before them.
        weighting: of the `NamedLoss`.
        margin: added to that of the loss, of a sum to those of all terms to which it makes a
            difference; see `added_margin.with_margin`.

    Raises:
        ValueError: a name is unknown (the message has the closest ones), the text or list cannot
            be read, a weight or hyperparameter is out of range, all weights are 0, a shared
            hyperparameter is every term's own already, or the margin cannot be added.
        TypeError: no term has such a hyperparameter.
    """
    given = _given_terms(name)
    specs = [find(each.loss) for each in given]
    if not any(each.weight for each in given):
        raise ValueError(f"loss: got {name!r}, in which every weight is 0, wanted one above")
    if len(given) > 1 or given[0].own:
        _require_shared(given, specs, shared)
    terms = []
    for each, spec in zip(given, specs, strict=True):
        common = {
            key: value for key, value in shared.items() if len(given) == 1 or key in spec.defaults
        }
        chosen = {**each.published, **common, **each.own}
        hyperparameters = {**spec.defaults, **chosen}
        terms.append(NamedTerm(spec.name, each.weight, hyperparameters, spec.build(**chosen)))
    if margin is not None:
        terms = _with_margin(terms, margin)
    return NamedLoss(tuple(terms), weighting)


def published_in(name: LossName) -> PublishedSetting | None:
    """The published setting that a name or a term of a sum is; None without one, or of several.

    Args:
        name: as in `named_loss`.

    Raises:
        ValueError: there is no such setting, or the text or list cannot be read.
    """
    settings = [each.setting for each in _given_terms(name) if each.setting is not None]
    return settings[0] if len(settings) == 1 else None


@dataclass(frozen=True)
class _Given:
    """A term as it was given: a registered loss, and where its hyperparameters come from."""

    loss: str
    weight: float
    own: dict[str, Any]
    setting: PublishedSetting | None = None

    @property
    def published(self) -> dict[str, Any]:
        """Hyperparameters of the published setting."""
        return {} if self.setting is None else self.setting.hyperparameters


def _given_terms(name: Any) -> list[_Given]:
    if isinstance(name, str):
        return [_of_text(text, name) for text in _PLUS.split(name)]
    if not isinstance(name, Sequence) or not name:
        raise ValueError(f"loss: got {name!r}, wanted {_WANTED}")
    found: list[_Given] = []
    for each in name:
        if isinstance(each, Mapping):
            found.append(_of_mapping(each))
        elif isinstance(each, str):
            found += _given_terms(each)
        else:
            raise ValueError(f"loss: got {each!r} in a list, wanted {_WANTED}")
    return found


def _of_text(text: str, whole: str) -> _Given:
    term = _TERM.fullmatch(text.strip())
    if term is None:
        raise ValueError(f"loss: got {whole!r}, wanted {_WANTED}")
    weight, name = term.groups()
    if name[0] in "0123456789.":
        raise ValueError(
            f"loss: got {name!r} in {whole!r}, wanted a space or * between a weight and a name"
        )
    return _named(name, 1.0 if weight is None else float(weight), {})


def _of_mapping(given: Mapping[str, Any]) -> _Given:
    for key in given.keys() - set(TERM_KEYS):
        keys = ", ".join(TERM_KEYS)
        raise ValueError(
            f"loss: got the key {key!r}{closest(str(key), TERM_KEYS)} in {dict(given)!r}, wanted"
            f" {keys}"
        )
    name, own = given.get("name"), given.get("hyperparameters")
    if not isinstance(name, str):
        raise ValueError(f"loss: got {dict(given)!r}, wanted the name of a loss in `name`")
    own = {} if own is None else own
    if not isinstance(own, Mapping):
        raise ValueError(f"hyperparameters of {name}: got {own!r}, wanted names with values")
    return _named(name, given.get("weight", 1.0), dict(own))


def _named(name: str, weight: float, own: dict[str, Any]) -> _Given:
    require_number(f"weight of {name}", weight, low=0)
    if "/" not in name:
        return _Given(name, float(weight), own)
    setting = published_setting(name)
    return _Given(setting.loss, float(weight), own, setting)


def _require_shared(
    given: Sequence[_Given], specs: Sequence[LossSpec], shared: Mapping[str, Any]
) -> None:
    """Raise unless each of the shared hyperparameters reaches a term."""
    title = _sum_of((each.weight, spec.name) for each, spec in zip(given, specs, strict=True))
    known = list(dict.fromkeys(key for spec in specs for key in spec.defaults))
    for key in shared:
        if key not in known:
            raise TypeError(
                f"{title} has no hyperparameter {key!r}{closest(key, known)}; its terms accept"
                f" {', '.join(known)}"
            )
        takers = [each for each, spec in zip(given, specs, strict=True) if key in spec.defaults]
        if all(key in each.own for each in takers):
            raise ValueError(
                f"{key}: got {shared[key]!r} for all terms of {title}, and each that has it has"
                " its own, wanted one of them"
            )


def _with_margin(terms: Sequence[NamedTerm], margin: MarginName) -> list[NamedTerm]:
    found = [
        replace(each, loss=with_margin(each.name, each.loss, margin))
        if each.weight > 0 and takes_margin(each.loss)
        else each
        for each in terms
    ]
    if all(new is old for new, old in zip(found, terms, strict=True)):
        raise ValueError(
            f"margin: got {margin!r} for {_sum_of((each.weight, each.name) for each in terms)}, to"
            " which a target margin makes no difference, wanted a loss that compares the rewards"
            " of pairs, such as dpo"
        )
    return found


def _sum_of(terms: Any) -> str:
    """Text of (weight, name) pairs."""
    return " + ".join(name if weight == 1 else f"{weight!r} {name}" for weight, name in terms)


def _values(values: Mapping[str, Any]) -> list[str]:
    return [f"{key}={value!r}" for key, value in values.items()]
