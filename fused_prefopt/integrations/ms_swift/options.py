"""Options of ms-swift, and of the entry that is ours among them, as options of a loss here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fused_prefopt.checks import closest
from fused_prefopt.integrations.loss_types import LossOptions, named_here
from fused_prefopt.integrations.options import (
    KEY,
    WEIGHTS,
    FusedOptions,
    PairOptions,
    PointOptions,
    refuse_beside_a_loss,
    refuse_without_a_loss,
)
from fused_prefopt.losses import available_losses

_EXAMPLE = f'--model_kwargs \'{{"{KEY}": {{"loss": "alpha-dpo"}}}}\''
# ms-swift's losses, by the kind of their trainer, that are losses here.
_KNOWN = {
    "dpo": (
        "sigmoid",
        "robust",
        "exo_pair",
        "hinge",
        "ipo",
        "bco_pair",
        "sppo_hard",
        "nca_pair",
        "aot",
        "aot_unpaired",
        "apo_zero",
        "apo_down",
        "discopop",
        "sft",
    ),
    "kto": ("kto", "apo_zero_unpaired"),
    "cpo": ("sigmoid", "simpo", "hinge"),
}
_SMOOTHED = ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired", "simpo")
# Losses of ms-swift that are none here.
_OTHERS = {
    "ipo": "squares what log-probs differ by without a reference, as no loss of this package does",
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
        "loss_type": ("sigmoid", "simpo"),
        "label_smoothing": 0.0,
        "cpo_alpha": 1.0,
        "simpo_gamma": 1.0,
    },
    "orpo": {},
}


def options_of(kind: str, args: Any, entry: Mapping[str, Any]) -> FusedOptions:
    """The loss of a training: the entry's, or else the one that ms-swift's options describe.

    Args:
        kind: of the trainer: "dpo", "kto", "cpo" (SimPO too) or "orpo".
        args: of the trainer.
        entry: ours, of `read_mapping`.

    Raises:
        ValueError: an option of ms-swift's own losses is given with a loss of the entry, or says
            what no loss of this package does; or a hyperparameter is given without a loss.
    """
    values = dict(entry)
    make = PointOptions if kind == "kto" else PairOptions
    if kind == "dpo":
        values["ld_alpha"] = args.ld_alpha
    if "loss" not in entry:
        refuse_without_a_loss(entry, "ms-swift")
        return make(**values | {"loss": _terms(kind, args)})
    refuse_beside_a_loss(_changed(kind, args), "ms-swift", entry["loss"])
    default = 2.0 if words_of(args) == ["simpo"] else 0.1
    if args.beta != default:
        if values.setdefault("beta", args.beta) != args.beta:
            raise ValueError(f"beta: got {args.beta} and {values['beta']} in {KEY}, needs one")
    if kind == "kto":
        values |= {name: getattr(args, name) for name in WEIGHTS}
    return make(**values)


def _changed(kind: str, args: Any) -> dict[str, Any]:
    """The options of ms-swift's own losses that are not at their defaults."""
    found = {}
    for name, default in _OWN[kind].items():
        value = words_of(args) if name == "loss_type" else getattr(args, name)
        allowed = default if isinstance(default, tuple) else (default,)
        if value not in (allowed if name != "loss_type" else [[word] for word in allowed]):
            found[name] = getattr(args, name)
    return found


def words_of(args: Any) -> list[str]:
    """`loss_type`, of which ms-swift takes one or several; ORPO's options have none."""
    given = getattr(args, "loss_type", None) or ()
    return [given] if isinstance(given, str) else list(given)


def _terms(kind: str, args: Any) -> list[dict[str, Any]]:
    """The terms, as `PreferenceLoss` takes them, of ms-swift's own loss."""
    if kind == "orpo":
        return [_term("orpo", {"weight": args.beta, "nll": "token_mean"})]
    words = words_of(args)
    for word in words:
        _require_word(word, _KNOWN[kind])
    if kind == "kto":
        weights = {name: getattr(args, name) for name in WEIGHTS}
        name, values = named_here(words[0], LossOptions(beta=args.beta, **weights))
        return [_term(name, values)]
    smoothing = args.label_smoothing
    if smoothing and not set(words) & set(_SMOOTHED):
        raise ValueError(f"label_smoothing: got {smoothing} with {', '.join(words)}, needs 0")
    if kind == "cpo":
        return _without_reference(words[0], args)
    shares = args.loss_weights or [1.0] * len(words)
    terms = [
        _term(*_of_pairs(word, args), share) for word, share in zip(words, shares, strict=True)
    ]
    if args.rpo_alpha is not None:
        terms.append(_term("sft", {}, args.rpo_alpha))
    if args.ld_alpha is not None and any(term["name"] == "sft" for term in terms):
        raise ValueError(
            f"ld_alpha: got {args.ld_alpha} with 'sft' or rpo_alpha, which ms-swift takes of whole"
            " completions, needs None"
        )
    return terms


def _require_word(word: str, known: tuple[str, ...]) -> None:
    if word in known:
        return
    listed = ", ".join(map(repr, known))
    if word in _OTHERS:
        raise ValueError(
            f"loss_type: got {word!r}, which {_OTHERS[word]}; needs one of {listed}, or a loss in"
            f" {_EXAMPLE}"
        )
    raise ValueError(
        f"loss_type: got {word!r}{closest(str(word), known)}, wanted one of {listed}; losses of"
        f" this package{closest(str(word), available_losses())} are named in {_EXAMPLE}"
    )


def _of_pairs(word: str, args: Any) -> tuple[str, dict[str, Any]]:
    name, values = named_here(
        word,
        LossOptions(
            beta=args.beta, label_smoothing=args.label_smoothing, discopop_tau=args.discopop_tau
        ),
    )
    if word == "sigmoid":  # Which today's TRL does not smooth.
        values["label_smoothing"] = args.label_smoothing
    if word == "bco_pair":  # Which today's TRL does not shift.
        values["reward_shift"] = "batch_mean"
    if word == "exo_pair" and not args.label_smoothing:
        del values["label_smoothing"]  # ms-swift takes 0.001 then, and so does the loss.
    return name, values


def _without_reference(word: str, args: Any) -> list[dict[str, Any]]:
    smoothing = args.label_smoothing
    if word == "sigmoid":
        values = {"beta": args.beta, "label_smoothing": smoothing, "nll_weight": args.cpo_alpha}
        return [_term("cpo", values)]
    if word == "hinge":
        # max(0, 1 − βm) = β max(0, 1/β − m)
        terms = [_term("slic-hf", {"delta": 1 / args.beta, "nll_weight": 0.0}, args.beta)]
    else:
        values = {"beta": args.beta, "gamma": args.simpo_gamma, "label_smoothing": smoothing}
        terms = [_term("simpo", values)]
    return terms + [_term("sft", {}, args.cpo_alpha)] if args.cpo_alpha else terms


def _term(name: str, hyperparameters: dict[str, Any], weight: float = 1.0) -> dict[str, Any]:
    return {"name": name, "weight": weight, "hyperparameters": hyperparameters}
