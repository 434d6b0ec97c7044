"""Options of ms-swift, and of the entry that is ours among them, as options of a loss here."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from fused_prefopt.checks import closest, require_choice
from fused_prefopt.integrations.options import FusedOptions
from fused_prefopt.losses import available_losses

# Name of the entry, a mapping with the fields of `FusedOptions`.
ENTRY = "fused_prefopt"
_EXAMPLE = f'--model_kwargs \'{{"{ENTRY}": {{"loss": "alpha-dpo"}}}}\''
# ms-swift's loss → ours, and the hyperparameters that it takes of ms-swift's options.
_PAIRS: dict[str, tuple[str, dict[str, str]]] = {
    "sigmoid": ("dpo", {"beta": "beta", "label_smoothing": "label_smoothing"}),
    "robust": ("robust-dpo", {"beta": "beta", "epsilon": "label_smoothing"}),
    "exo_pair": ("exo-pair", {"beta": "beta", "label_smoothing": "label_smoothing"}),
    "hinge": ("hinge", {"beta": "beta"}),
    "ipo": ("ipo", {"tau": "beta"}),
    "sppo_hard": ("sppo-hard", {"beta": "beta"}),
    "nca_pair": ("nca-pair", {"beta": "beta"}),
    "aot": ("aot", {"beta": "beta", "label_smoothing": "label_smoothing"}),
    "aot_unpaired": ("aot-unpaired", {"beta": "beta", "label_smoothing": "label_smoothing"}),
    "apo_zero": ("apo-zero", {"beta": "beta"}),
    "apo_down": ("apo-down", {"beta": "beta"}),
    "discopop": ("discopop", {"beta": "beta", "temperature": "discopop_tau"}),
    "sft": ("sft", {}),
}
# What ms-swift does and its options do not say.
_IMPLIED: dict[str, dict[str, Any]] = {
    "robust": {"unbiased": True},
    "ipo": {"length_normalized": True},
}
_POINTS = ("kto", "apo_zero_unpaired")
_WITHOUT_REFERENCE = ("sigmoid", "simpo")
# Losses of ms-swift that are none here.
_OTHERS = {
    "bco_pair": "subtracts a running mean of the rewards, which no loss of this package does; its"
    " 'bco-pair' is without",
    "hinge": "compares log-probs without a reference, which no loss of this package does so",
    "ipo": "compares log-probs without a reference, which no loss of this package does so",
}
# Kind of trainer → options that shape ms-swift's own losses alone → their defaults there.
_OWN: dict[str, dict[str, Any]] = {
    "dpo": {
        "loss_type": "sigmoid",
        "loss_weights": None,
        "label_smoothing": 0.0,
        "rpo_alpha": None,
        "discopop_tau": 0.05,
    },
    "kto": {"loss_type": "kto"},
    "cpo": {
        "loss_type": _WITHOUT_REFERENCE,
        "label_smoothing": 0.0,
        "cpo_alpha": 1.0,
        "simpo_gamma": 1.0,
    },
    "orpo": {},
}


@dataclass
class PairOptions(FusedOptions):
    """Options of a loss on pairs.

    Args:
        ld_alpha: of `PreferenceLoss`.
    """

    ld_alpha: float | None = None


@dataclass
class PointOptions(FusedOptions):
    """Options of a loss on single completions.

    Args:
        desirable_weight, undesirable_weight: hyperparameters of the loss.
    """

    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    pairwise: ClassVar[bool] = False
    _shared: ClassVar[tuple[str, ...]] = ("beta", "desirable_weight", "undesirable_weight")


def read_entry(text: str | None) -> dict[str, Any]:
    """The entry as ms-swift hands it on.

    Args:
        text: a mapping as JSON, or as Python prints it; None: there is none.

    Raises:
        ValueError: it is no mapping, or a key is none of `FusedOptions`.
    """
    if not text:
        return {}
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        try:
            found = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found = text
    if not isinstance(found, Mapping):
        raise ValueError(f"{ENTRY}: got {text!r}, needs a mapping, such as {_EXAMPLE}")
    known = [item.name for item in fields(FusedOptions)]
    for name in found:
        require_choice(ENTRY, name, known)
    return dict(found)


def options_of(kind: str, args: Any, entry: Mapping[str, Any]) -> FusedOptions:
    """The loss of a training: the entry's, or else the one that ms-swift's options describe.

    Args:
        kind: of the trainer: "dpo", "kto", "cpo" (SimPO too) or "orpo".
        args: of the trainer.
        entry: of `read_entry`.

    Raises:
        ValueError: an option of ms-swift's own losses is given with a loss of the entry, or says
            what no loss of this package does; or a hyperparameter is given without a loss.
    """
    values = dict(entry)
    make = PointOptions if kind == "kto" else PairOptions
    if kind == "dpo":
        values["ld_alpha"] = args.ld_alpha
    if "loss" not in entry:
        for name in ("beta", "loss_kwargs"):
            if entry.get(name) is not None:
                raise ValueError(
                    f"{ENTRY}: got {name}={entry[name]!r} without a loss, needs one, or ms-swift's"
                    " own options"
                )
        return make(**values | {"loss": _terms(kind, args)})
    _require_defaults(kind, args, entry["loss"])
    default = 2.0 if words_of(args) == ["simpo"] else 0.1
    if args.beta != default:
        if values.setdefault("beta", args.beta) != args.beta:
            raise ValueError(f"beta: got {args.beta} and {values['beta']} in {ENTRY}, needs one")
    if kind == "kto":
        values |= {name: getattr(args, name) for name in ("desirable_weight", "undesirable_weight")}
    return make(**values)


def _require_defaults(kind: str, args: Any, loss: Any) -> None:
    for name, default in _OWN[kind].items():
        value = words_of(args) if name == "loss_type" else getattr(args, name)
        allowed = default if isinstance(default, tuple) else (default,)
        if value not in (allowed if name != "loss_type" else [[word] for word in allowed]):
            raise ValueError(
                f"{name}: got {getattr(args, name)!r}, an option of ms-swift's own losses, with"
                f" loss {loss!r}; leave it out and give the loss's hyperparameters in `loss_kwargs`"
            )


def words_of(args: Any) -> list[str]:
    """`loss_type`, of which ms-swift takes one or several."""
    given = getattr(args, "loss_type", None)
    return list(given) if isinstance(given, list | tuple) else [given]


def _terms(kind: str, args: Any) -> list[dict[str, Any]]:
    """The terms, as `PreferenceLoss` takes them, of ms-swift's own loss."""
    if kind == "orpo":
        return [_term("orpo", {"weight": args.beta, "nll": "token_mean"})]
    words = words_of(args)
    known = {"dpo": tuple(_PAIRS), "kto": _POINTS, "cpo": _WITHOUT_REFERENCE}[kind]
    for word in words:
        if word in known:
            continue
        if word in _OTHERS:
            raise ValueError(
                f"loss_type: got {word!r}, which {_OTHERS[word]}; needs one of"
                f" {', '.join(map(repr, known))}, or a loss in {_EXAMPLE}"
            )
        raise ValueError(
            f"loss_type: got {word!r}{closest(str(word), known)}, wanted one of"
            f" {', '.join(map(repr, known))}; losses of this package"
            f"{closest(str(word), available_losses())} are named in {_EXAMPLE}"
        )
    if kind == "kto":
        names = ("beta", "desirable_weight", "undesirable_weight")
        return [_term(words[0].replace("_", "-"), {name: getattr(args, name) for name in names})]
    if kind == "cpo":
        return _without_reference(words[0], args)
    weights = args.loss_weights or [1.0] * len(words)
    terms = [
        _term(*_of_pairs(word, args), weight) for word, weight in zip(words, weights, strict=True)
    ]
    if args.rpo_alpha is not None:
        terms.append(_term("sft", {}, args.rpo_alpha))
    return terms


def _of_pairs(word: str, args: Any) -> tuple[str, dict[str, Any]]:
    name, options = _PAIRS[word]
    if args.label_smoothing and "label_smoothing" not in options.values():
        _refuse_smoothing(word, args)
    values = {ours: getattr(args, theirs) for ours, theirs in options.items()}
    if word == "exo_pair" and not args.label_smoothing:
        del values["label_smoothing"]  # ms-swift takes 0.001 then, and so does the loss.
    return name, values | _IMPLIED.get(word, {})


def _without_reference(word: str, args: Any) -> list[dict[str, Any]]:
    if word == "sigmoid":
        if args.label_smoothing:
            _refuse_smoothing("cpo", args)
        return [_term("cpo", {"beta": args.beta, "nll_weight": args.cpo_alpha})]
    smoothing = args.label_smoothing
    values = {"beta": args.beta, "gamma": args.simpo_gamma, "label_smoothing": smoothing}
    terms = [_term("simpo", values)]
    return terms + [_term("sft", {}, args.cpo_alpha)] if args.cpo_alpha else terms


def _refuse_smoothing(word: str, args: Any) -> None:
    raise ValueError(f"label_smoothing: got {args.label_smoothing} with {word}, needs 0")


def _term(name: str, hyperparameters: dict[str, Any], weight: float = 1.0) -> dict[str, Any]:
    return {"name": name, "weight": weight, "hyperparameters": hyperparameters}
