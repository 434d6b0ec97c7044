"""Options of Axolotl's configuration as those of a fused loss, and the ones it cannot have.

Axolotl's own losses are those of TRL's trainers, with the defaults of their configurations. What
an option of Axolotl's says about them is honoured, by the loss that has such a hyperparameter, or
refused by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, field_validator

from fused_prefopt.integrations.attach import OF_REFERENCE
from fused_prefopt.integrations.loss_types import terms_here
from fused_prefopt.integrations.options import (
    enter,
    read_mapping,
    refuse_beside_a_loss,
    refuse_without_a_loss,
)
from fused_prefopt.preference import PreferenceLoss

_PAIRS, _POINTS = "AxolotlFusedDPOTrainer", "AxolotlFusedKTOTrainer"
# `rl:` → name of the trainer in `trainers`.
TRAINERS = {"dpo": _PAIRS, "ipo": _PAIRS, "simpo": _PAIRS, "orpo": _PAIRS, "kto": _POINTS}
# TRL's trainers of these, in Axolotl, have no reference.
_ALONE = ("simpo", "orpo")
# Option of Axolotl's → the hyperparameter that it is.
_BETA = {"rl_beta": "beta", "trl.beta": "beta"}
_HYPERPARAMETERS = {
    "dpo": _BETA | {"dpo_label_smoothing": "label_smoothing"},
    "ipo": _BETA,
    "simpo": _BETA | {"simpo_gamma": "gamma"},
    "orpo": {"rl_beta": "weight", "trl.beta": "weight", "orpo_alpha": "weight"},
    "kto": _BETA
    | {
        "kto_desirable_weight": "desirable_weight",
        "kto_undesirable_weight": "undesirable_weight",
    },
}
# Options that say which loss of TRL's it is: with a loss of its own name they have no meaning.
_KINDS = {"dpo": ("dpo_loss_type", "dpo_loss_weights"), "simpo": ("cpo_alpha",)}
# Options that Axolotl hands to TRL, where this package's configuration has them.
_OF_PAIRS = ("dpo_use_weighting", "dpo_padding_free")
_HANDED = {"dpo": _OF_PAIRS, "ipo": _OF_PAIRS}
# Options that Axolotl hands to TRL for `rl: grpo` alone.
_OF_GRPO = ("trl.sync_ref_model", "trl.loss_type")
# Options that False or 0 switches off, as if they were not given.
_SWITCHES = (*_OF_PAIRS, "trl.sync_ref_model", "dpo_label_smoothing")
# Axolotl's code and its manual have this one; its schema, which goes before the code, has not.
_DROPPED = "rl_adapter_ref_model"
# Axolotl reads 0 as not given.
_KTO_WEIGHTS = ("kto_desirable_weight", "kto_undesirable_weight")
# TRL's defaults where those of the losses here are others.
_TRLS_BETA, _TRLS_CPO_ALPHA = 0.1, 1.0


class FusedArgs(BaseModel):
    """What the plugin adds to Axolotl's configuration.

    Args:
        fused_prefopt: fields of `FusedOptions` by name; a text is read as JSON.

    Raises:
        ValueError: there is no such field.
    """

    fused_prefopt: dict[str, Any] | None = None

    @field_validator("fused_prefopt", mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        return None if value is None else read_mapping(value)


@dataclass
class FusedTrainingArgs:
    """What the plugin adds to training arguments.

    Args:
        fused_prefopt: fields of `FusedOptions` by name, made by `training_arguments`.
    """

    fused_prefopt: dict[str, Any] | None = field(
        default=None, metadata={"help": "Options of the fused loss, by name."}
    )


def require_supported(cfg: Mapping[str, Any]) -> None:
    """Raise ValueError unless `rl` is one of those that have a fused trainer.

    Args:
        cfg: a configuration, as it was written or checked; of the first, what Axolotl's schema
            drops is refused too.
    """
    kind = _kind(cfg)
    if kind not in TRAINERS:
        raise ValueError(
            f"rl: got {kind!r} with the plugin of fused_prefopt, wanted one of"
            f" {', '.join(TRAINERS)}"
        )
    if cfg.get(_DROPPED):
        raise ValueError(
            f"{_DROPPED}: got {cfg[_DROPPED]!r}, which Axolotl drops before it could read it, needs"
            " to be left out: the reference is the model without its adapter"
        )


def training_arguments(cfg: Any) -> dict[str, Any]:
    """Training arguments that the plugin sets, from a checked configuration.

    Args:
        cfg: of Axolotl; an option that was not given is None.

    Raises:
        ValueError: an option has no meaning for the loss, or two contradict each other.
    """
    require_supported(cfg)
    kind = _kind(cfg)
    options: dict[str, Any] = dict(cfg.fused_prefopt or {})
    _refuse(cfg, kind, named="loss" in options)
    own = _hyperparameters(cfg, kind)
    given = _with_own(options, own) if "loss" in options else _own_loss(cfg, kind, options, own)
    arguments: dict[str, Any] = {"fused_prefopt": given, "use_liger_kernel": False}
    if kind == "kto":
        # Of these Axolotl tells TRL for pairs only.
        if cfg.precompute_ref_log_probs is not None:
            arguments["precompute_ref_log_probs"] = cfg.precompute_ref_log_probs
        arguments["pad_to_multiple_of"] = cfg.pad_to_multiple_of
    _check_reference(cfg, kind, given)
    return arguments


def _kind(cfg: Mapping[str, Any]) -> Any:
    rl = cfg.get("rl")
    return getattr(rl, "value", rl)


def options_read(kind: str) -> set[str]:
    """The options of Axolotl's that say what the loss of an `rl` is, each by its name.

    Args:
        kind: of `rl`.
    """
    return {*_HYPERPARAMETERS[kind], *_KINDS.get(kind, ()), *_HANDED.get(kind, ())}


def _value(cfg: Any, name: str) -> Any:
    """A value, None where it is not given; "trl.beta" is `beta` below `trl`."""
    for part in name.split("."):
        cfg = None if cfg is None else cfg.get(part)
    return None if name in _SWITCHES and not cfg else cfg


def _refuse(cfg: Any, kind: str, *, named: bool) -> None:
    """Raise ValueError for an option that would have no effect."""
    read = options_read(kind)
    for name in sorted({*_OF_GRPO}.union(*map(options_read, TRAINERS))):
        value = _value(cfg, name)
        if value is not None and name not in read:
            raise ValueError(f"{name}: got {value!r} with rl: {kind}, which does not read it")
    for name in _KTO_WEIGHTS:
        if _value(cfg, name) == 0:
            raise ValueError(
                f"{name}: got 0, which Axolotl reads as 1; needs more than 0, or to be a"
                " hyperparameter of the `loss` under fused_prefopt"
            )
    if named:
        kinds = {name: _value(cfg, name) for name in _KINDS.get(kind, ())}
        given = {name: value for name, value in kinds.items() if value is not None}
        refuse_beside_a_loss(given, "Axolotl", cfg.fused_prefopt["loss"])
    if kind in _ALONE and cfg.precompute_ref_log_probs:
        raise ValueError(
            f"precompute_ref_log_probs: got True with rl: {kind}, which has no reference"
        )
    if (cfg.context_parallel_size or 1) > 1:
        raise ValueError(
            f"context_parallel_size: got {cfg.context_parallel_size}, needs 1: Axolotl splits"
            " batches of labels by hooks of its own, which know nothing of completions; cp_size of"
            " accelerate works with FusedDPOTrainer and PreferenceTrainer"
        )


def _hyperparameters(cfg: Any, kind: str) -> dict[str, tuple[str, Any]]:
    """Hyperparameter → the option of Axolotl's that gives it, and its value."""
    found: dict[str, tuple[str, Any]] = {}
    for option, name in _HYPERPARAMETERS[kind].items():
        value = _value(cfg, option)
        if value is None:
            continue
        other, before = found.setdefault(name, (option, value))
        if before != value:
            raise ValueError(f"{option}: got {value!r} and {other} {before!r}, needs one of them")
    return found


def _with_own(options: dict[str, Any], own: Mapping[str, tuple[str, Any]]) -> dict[str, Any]:
    """The options with Axolotl's hyperparameters, all of which the named loss must have."""
    given = dict(options.get("loss_kwargs") or {})
    if options.get("beta") is not None:
        given.setdefault("beta", options["beta"])
    for name, (option, value) in own.items():
        try:
            PreferenceLoss(options["loss"], **{name: value})
        except TypeError as error:
            raise ValueError(f"{option}: got {value!r}, but {error}") from error
        enter(given, name, value, option)
    return {**options, "beta": None, "loss_kwargs": given}


def _own_loss(
    cfg: Any, kind: str, options: dict[str, Any], own: Mapping[str, tuple[str, Any]]
) -> dict[str, Any]:
    """The options with the name of Axolotl's own loss of `rl`, and its hyperparameters."""
    refuse_without_a_loss(options, "Axolotl")
    given = {name: value for name, (_, value) in own.items()}
    loss: Any = kind
    if kind in ("dpo", "ipo"):
        kinds = cfg.dpo_loss_type or ("ipo" if kind == "ipo" else "sigmoid")
        loss, given = terms_here(kinds, cfg.dpo_loss_weights, given), {}
    elif kind == "orpo":
        given |= {"nll": "whole_token_mean"}
    elif kind == "simpo":
        if "gamma" not in given:
            raise ValueError("simpo_gamma: got None, needs a number, as Axolotl's own loss does")
        alpha = _TRLS_CPO_ALPHA if cfg.cpo_alpha is None else cfg.cpo_alpha
        loss, given = f"simpo + {alpha!r} sft" if alpha else "simpo", {"beta": _TRLS_BETA, **given}
    return {**options, "loss": loss, "loss_kwargs": given}


def _check_reference(cfg: Any, kind: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError if a reference is missing, or its log-probs are wanted for nothing."""
    loss_fn = PreferenceLoss(options["loss"], **(options.get("loss_kwargs") or {}))
    needs_reference = bool(loss_fn.loss.needs & OF_REFERENCE)
    if needs_reference and kind in _ALONE:
        raise ValueError(
            f"rl: got {kind}, which has no reference, and {loss_fn.name} needs rl: dpo"
        )
    if cfg.precompute_ref_log_probs and not needs_reference:
        raise ValueError(
            f"precompute_ref_log_probs: got True with {loss_fn.name}, which has no reference"
        )
