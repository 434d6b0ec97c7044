"""Options of a fused loss as the configuration of a trainer holds them."""

from __future__ import annotations

import ast
import json
from collections.abc import Collection, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, ClassVar

from fused_prefopt.checks import require_choice
from fused_prefopt.integrations.loss_types import terms_here
from fused_prefopt.preference import PreferenceLoss

# Name of these options in the configuration of a framework, where they are one mapping.
KEY = "fused_prefopt"
# KTO's hyperparameters that frameworks have as options of their own.
WEIGHTS = ("desirable_weight", "undesirable_weight")


@dataclass
class FusedOptions:
    """The options that a fused trainer adds to TRL's.

    Args:
        loss: name of a loss, or a sum of several, such as "dpo + 0.2 bco-pair + sft" or a list of
            names and of mappings with `name`, `weight` and `hyperparameters`; see
            `PreferenceLoss` and `fused_prefopt.available_losses()`.
        loss_kwargs: its hyperparameters, and options of `PreferenceLoss` that have no field here,
            such as ``{"margin": {"name": "dynamic", "gamma": 0.5}}``.
        beta: the same as `beta` in `loss_kwargs`; None leaves it to them, or to the loss.
        workspace_mb: budget of the op in MiB; None: the device's default (`sequence_logps`).
        engine: of the op; `auto`, `torch`, `cublas` or `triton`.
        log_tokens: also log what TRL logs of single tokens (`entropy`, `logits/chosen`,
            `logits/rejected`, of pairs `mean_token_accuracy`): one more evaluation of the head.
        on_nonfinite: "stop" (with a `FloatingPointError`), "skip" or "ignore" a step whose loss or
            gradient is NaN or infinite; see `integrations.transformers.attach`.
    """

    # With None in it, a command line takes a text; a file gives the list too.
    loss: list[Any] | str | None = field(
        default="dpo", metadata={"help": "Name of a loss, or a sum such as `dpo + 0.2 sft`."}
    )
    # A string of JSON on the command line, as transformers reads its own dictionaries.
    loss_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Hyperparameters of the loss."}
    )
    beta: float | None = field(default=None, metadata={"help": "β, if not in `loss_kwargs`."})
    workspace_mb: float | None = field(
        default=None, metadata={"help": "Workspace of the op in MiB; by default the device's."}
    )
    engine: str = field(default="auto", metadata={"help": "Engine of the op."})
    log_tokens: bool = field(
        default=False, metadata={"help": "Log entropy, mean logits and token accuracy."}
    )
    on_nonfinite: str = field(
        default="stop", metadata={"help": "What to do at NaN: `stop`, `skip` or `ignore`."}
    )

    pairwise: ClassVar[bool] = True
    # Whether single completions may be put together to lists, for a loss on pairs.
    makes_lists: ClassVar[bool] = False
    # TRL's options that choose or shape its own loss, and those that are hyperparameters here too.
    _trls_own: ClassVar[tuple[str, ...]] = ()
    _shared: ClassVar[tuple[str, ...]] = ("beta",)

    def build_loss(self) -> PreferenceLoss:
        """The loss that the configuration names, in `loss` or by TRL's options.

        Raises:
            ValueError: there is no such loss, it is not of the trainer's kind, it is named in both
                ways, an option would be ignored, or a hyperparameter is given twice.
            TypeError: the loss has no such hyperparameter.
        """
        name, hyperparameters = self._named_loss()
        loss_fn = PreferenceLoss(
            name,
            workspace_mb=self.workspace_mb,
            engine=self.engine,
            ld_alpha=getattr(self, "ld_alpha", None),
            use_weighting=getattr(self, "use_weighting", False),
            **hyperparameters,
        )
        if loss_fn.loss.pairwise != self.pairwise and not self.makes_lists:
            kind, wanted = ("point-wise", "pairs") if self.pairwise else ("pairwise", "points")
            raise ValueError(f"loss: {loss_fn.name!r} is {kind}, wanted one on {wanted}")
        return loss_fn

    def _named_loss(self) -> tuple[Any, dict[str, Any]]:
        """Name and hyperparameters of `PreferenceLoss`."""
        options: dict[str, Any] = dict(self.loss_kwargs or {})  # type: ignore[arg-type]
        trls, shared = self._changed(self._trls_own), self._changed(self._shared)
        if trls and not self._changed(("loss",)):
            if options:
                raise ValueError(
                    f"loss_kwargs: got {options!r} with {', '.join(trls)} of TRL's, wanted a `loss`"
                    " with them, or TRL's options alone"
                )
            return self._terms_of_trl(trls | shared), {}
        refuse_beside_a_loss(trls, "TRL", self.loss)
        for name, value in shared.items():
            enter(options, name, value, name)
        return self.loss, options

    def _terms_of_trl(self, given: dict[str, Any]) -> list[dict[str, Any]]:
        """The loss that TRL's options name, of which these are not at their defaults."""
        kind, weights = self.loss_type, given.pop("loss_weights", None)  # type: ignore[attr-defined]
        given.pop("loss_type", None)
        terms = terms_here(kind, weights, given)
        tail_weight = getattr(self, "ld_alpha", None)
        if tail_weight not in (None, 1) and any(term["name"] == "sft" for term in terms):
            raise ValueError(
                f"ld_alpha: got {tail_weight} with loss_type {kind}, whose 'sft' TRL takes of whole"
                " completions, wanted None"
            )
        return terms

    def _changed(self, names: Collection[str]) -> dict[str, Any]:
        """The fields of these names that are not at their defaults."""
        values = {each.name: (getattr(self, each.name), _default(each)) for each in fields(self)}
        return {
            name: values[name][0]
            for name in names
            if name in values and values[name][0] != values[name][1]
        }


@dataclass
class PairOptions(FusedOptions):
    """Options of a loss on pairs, where a framework keeps its own configuration.

    Args:
        ld_alpha: of `PreferenceLoss`.
    """

    ld_alpha: float | None = None


@dataclass
class PointOptions(FusedOptions):
    """Options of a loss on single completions, of such a framework.

    Args:
        desirable_weight, undesirable_weight: hyperparameters of the loss.
    """

    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    pairwise: ClassVar[bool] = False
    _shared: ClassVar[tuple[str, ...]] = ("beta", *WEIGHTS)


def read_mapping(given: Any) -> dict[str, Any]:
    """Fields of `FusedOptions` by name, from what a framework's configuration has under `KEY`.

    Args:
        given: a mapping, or one as text: JSON, or as Python prints it. None and "" have no fields.

    Raises:
        ValueError: it is no mapping, or has a key that is none of the fields (the message has the
            closest ones), or a value of another kind than its field's.
    """
    found = dict(_mapping(KEY, given, {"loss": "dpo"}))
    for name in found:
        require_choice(KEY, name, (item.name for item in fields(FusedOptions)))
    if found.get("loss_kwargs") is not None:
        kwargs = _mapping(f"{KEY}.loss_kwargs", found["loss_kwargs"], {"beta": 0.1})
        found["loss_kwargs"] = dict(kwargs)
    tokens = found.get("log_tokens", False)
    if not isinstance(tokens, bool):
        raise ValueError(f"{KEY}.log_tokens: got {tokens!r}, wanted true or false")
    return found


def _mapping(name: str, given: Any, example: Mapping[str, Any]) -> Mapping[str, Any]:
    found = {} if given is None or given == "" else given
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except json.JSONDecodeError:
            try:
                found = ast.literal_eval(found)
            except (ValueError, SyntaxError):
                pass
    if not isinstance(found, Mapping):
        raise ValueError(f"{name}: got {given!r}, wanted a mapping such as {json.dumps(example)}")
    return found


def enter(hyperparameters: dict[str, Any], name: str, value: Any, option: str) -> None:
    """Give a loss a hyperparameter that `loss_kwargs` may have, too.

    Args:
        hyperparameters: of `loss_kwargs`; changed.
        name, value: of the hyperparameter.
        option: that gives it.

    Raises:
        ValueError: `loss_kwargs` has another value.
    """
    if hyperparameters.setdefault(name, value) != value:
        raise ValueError(
            f"{option}: got {value!r} and {name}={hyperparameters[name]!r} in loss_kwargs, needs"
            " one of them"
        )


def refuse_beside_a_loss(given: Mapping[str, Any], framework: str, loss: Any) -> None:
    """Raise ValueError if options of a framework's own losses are given with one of this package.

    Args:
        given: values of such options by name, those that are given.
        framework: its name.
        loss: what `loss` says.
    """
    for name, value in given.items():
        raise ValueError(
            f"{name}: got {value!r}, an option of {framework}'s own losses, with loss {loss!r};"
            " give one of them, and the hyperparameters of `loss` in `loss_kwargs`"
        )


def refuse_without_a_loss(found: Mapping[str, Any], framework: str) -> None:
    """Raise ValueError if a mapping without a `loss` has hyperparameters of one.

    Args:
        found: of `read_mapping`.
        framework: whose own options describe the loss then.
    """
    for name in ("loss_kwargs", "beta"):
        if found.get(name) is not None:
            raise ValueError(
                f"{KEY}: got {name}={found[name]!r} without a loss, needs one, or the options of"
                f" {framework}'s own losses"
            )


def _default(item: Field[Any]) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()
