"""LLaMA-Factory's options of a preference loss, read as a loss of this package."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from llamafactory.hparams import FinetuningArguments

from fused_prefopt.checks import require_number
from fused_prefopt.integrations.attach import OF_REFERENCE
from fused_prefopt.integrations.options import (
    FusedOptions,
    PairOptions,
    PointOptions,
    enter,
    read_mapping,
)
from fused_prefopt.preference import PreferenceLoss

# Stages that train on preferences with a trainer of this package.
STAGES = ("dpo", "kto")
# LLaMA-Factory's losses → this package's, its options as hyperparameters, and what it fixes.
_OWN: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {
    "sigmoid": ("dpo", {"pref_beta": "beta", "dpo_label_smoothing": "label_smoothing"}, {}),
    "hinge": ("hinge", {"pref_beta": "beta"}, {}),
    "ipo": ("ipo", {"pref_beta": "tau"}, {"length_normalized": True}),
    "orpo": ("orpo", {"pref_beta": "weight"}, {}),
    "simpo": ("simpo", {"pref_beta": "beta", "simpo_gamma": "gamma"}, {}),
    "kto": (
        "kto",
        {
            "pref_beta": "beta",
            "kto_chosen_weight": "desirable_weight",
            "kto_rejected_weight": "undesirable_weight",
        },
        {},
    ),
}
# The term of `pref_ftx`: of each chosen completion the mean over its tokens.
_LIKELIHOOD = {"nll": "sequence_mean"}
# The losses that LLaMA-Factory mixes with BCO's: those of a reference.
_MIXED = ("sigmoid", "hinge", "ipo")
# Options of any other loss.
_OF_OTHERS = {"pref_beta": "beta"}
_NOT_HEEDED = "it does not heed the option; its own go into loss_kwargs of fused_prefopt"
# Stage and option → why LLaMA-Factory's trainer heeds it and this package's does not.
_REFUSED = {
    ("dpo", "pref_bco_weight"): (
        "it goes with 'sigmoid', 'hinge' and 'ipo'; with others write a sum, such as pref_loss:"
        " 'alpha-dpo + 0.5 bco-pair', with reward_shift: batch_mean in loss_kwargs of fused_prefopt"
    ),
    ("kto", "pref_ftx"): "a likelihood of desirable completions alone is not offered",
}
# Options that choose or shape a loss, and the values that LLaMA-Factory gives them.
_DEFAULTS = {
    item.name: item.default
    for item in fields(FinetuningArguments)
    if item.name
    in (
        "pref_beta",
        "pref_ftx",
        "pref_bco_weight",
        "dpo_label_smoothing",
        "kto_chosen_weight",
        "kto_rejected_weight",
        "simpo_gamma",
    )
}


def _mixed_with_bco(loss: Any, weight: float, kwargs: dict[str, Any]) -> list[dict[str, Any]]:
    """The terms of ``(loss + w BCO) / (1 + w)``.

    Args:
        loss: name of a loss.
        weight: w.
        kwargs: hyperparameters of all terms. Of IPO's BCO has the mean log-ratios, and τ as its β.

    Raises:
        ValueError: `weight` is negative or not finite.
    """
    require_number("pref_bco_weight", weight, low=0)
    own = {"reward_shift": "batch_mean"} | ({"beta": kwargs["tau"]} if "tau" in kwargs else {})
    share = weight / (1 + weight)
    bco = {"name": "bco-pair", "weight": share, "hyperparameters": own}
    return [{"name": loss, "weight": 1 - share}, bco]


def _unless_given(what: str) -> Any:
    return field(default=None, metadata={"help": f"{what} By default the loss's own."})


@dataclass
class FusedFinetuningArguments(FinetuningArguments):
    """LLaMA-Factory's own, whose `pref_loss` is any loss of this package, or a sum of them.

    Of the losses that LLaMA-Factory has by name, every option means and defaults to what it does
    there; of the others `pref_beta` is their `beta`, by default their own. An option that the
    loss would not heed is refused.

    Args:
        pref_loss: name of a loss, or a sum such as "dpo + 0.2 bco-pair"; by default "sigmoid", in
            stage "kto" that of KTO.
        fused_prefopt: the options of `FusedOptions`, as a mapping or its JSON text.

    Attributes:
        loss_options: those, complete.

    Raises:
        ValueError: there is no such loss, or it is not of the stage's kind; an option has no place
            in it, or is given twice; or what LLaMA-Factory's own raises.
        TypeError: the loss has no such hyperparameter.
    """

    pref_loss: str | None = field(default=None, metadata={"help": "Name of a preference loss."})
    fused_prefopt: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further options of the loss: a mapping, or its JSON text."}
    )
    # They are None where the configuration does not give them.
    pref_beta: float | None = _unless_given("β of the preference loss.")
    pref_ftx: float | None = _unless_given("Weight of the chosen completions' NLL.")
    pref_bco_weight: float | None = _unless_given("Weight of BCO's loss.")
    dpo_label_smoothing: float | None = _unless_given("Label smoothing of `sigmoid`.")
    kto_chosen_weight: float | None = _unless_given("Weight of desirable completions.")
    kto_rejected_weight: float | None = _unless_given("Weight of other completions.")
    simpo_gamma: float | None = _unless_given("Target margin of `simpo`.")

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in _DEFAULTS}
        given = {name: value for name, value in given.items() if value is not None}
        for name in _DEFAULTS.keys() - given.keys():
            setattr(self, name, _DEFAULTS[name])
        if self.stage not in STAGES:
            self._require_no_loss()
            self.pref_loss = self.pref_loss or "sigmoid"
            super().__post_init__()
            return
        name = self._name()
        self.loss_options = self._read_options(name, given)
        needs_reference = bool(self.build_loss().loss.needs & OF_REFERENCE)
        # Theirs tells two kinds of losses apart: those with a reference, and those without.
        self.pref_loss = "sigmoid" if needs_reference else "simpo"
        super().__post_init__()
        self.pref_loss = name
        self.use_ref_model = self.stage == "dpo" and needs_reference

    def build_loss(self) -> PreferenceLoss:
        """The loss that the configuration names."""
        return self.loss_options.build_loss()

    def _require_no_loss(self) -> None:
        """Raise ValueError if a stage without a preference loss is given one of this package."""
        for name, own in (("fused_prefopt", ()), ("pref_loss", _OWN)):
            value = getattr(self, name)
            if value is not None and value not in own:
                raise ValueError(
                    f"{name}: got {value!r} in stage {self.stage!r}, needs stage"
                    f" {' or '.join(map(repr, STAGES))}"
                )

    def _read_options(self, name: Any, given: dict[str, Any]) -> FusedOptions:
        """The options of the loss.

        Args:
            name: of the loss.
            given: those of LLaMA-Factory's that the configuration has.
        """
        options = (PairOptions if self.stage == "dpo" else PointOptions)(
            **read_mapping(self.fused_prefopt)
        )
        kwargs: dict[str, Any] = dict(options.loss_kwargs or {})  # type: ignore[arg-type]
        own = _OWN.get(name) if isinstance(name, str) else None
        options.loss, hyperparameters, fixed = own or (name, _OF_OTHERS, {})
        likelihood = given.pop("pref_ftx", 0.0) if self.stage == "dpo" else 0.0
        classifier = given.pop("pref_bco_weight", 0.0) if name in _MIXED else 0.0
        for option, value in given.items():
            target = hyperparameters.get(option)
            if target is None and value != _DEFAULTS[option]:
                raise ValueError(
                    f"{option}: got {value!r} with the loss {name!r}, needs {_DEFAULTS[option]!r}:"
                    f" {_REFUSED.get((self.stage, option), _NOT_HEEDED)}"
                )
            if target is not None:
                enter(kwargs, target, value, option)
        if own is not None:
            defaults = {target: _DEFAULTS[option] for option, target in hyperparameters.items()}
            if options.beta is not None:
                defaults.pop("beta", None)
            kwargs = {**defaults, **fixed, **kwargs}
        if self.ld_alpha is not None:
            if not isinstance(options, PairOptions):
                raise ValueError(f"ld_alpha: got {self.ld_alpha} in stage 'kto', needs pairs")
            options.ld_alpha = self.ld_alpha
        options.loss_kwargs = kwargs
        if classifier:
            options.loss = _mixed_with_bco(options.loss, classifier, kwargs)
        if likelihood:
            chosen = {"name": "sft", "weight": likelihood, "hyperparameters": _LIKELIHOOD}
            loss = options.loss
            options.loss = [*(loss if isinstance(loss, list) else [loss]), chosen]
        return options

    def _name(self) -> Any:
        """The loss's name, or those of a sum, from `pref_loss` or `fused_prefopt`."""
        inside = read_mapping(self.fused_prefopt).get("loss")
        if None not in (inside, self.pref_loss) and inside != self.pref_loss:
            raise ValueError(
                f"pref_loss: got {self.pref_loss!r} and {inside!r} in fused_prefopt, needs one of"
                " them"
            )
        return inside or self.pref_loss or ("sigmoid" if self.stage == "dpo" else "kto")
