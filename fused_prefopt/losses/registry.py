"""Published methods by name: what they need, their hyperparameters and where they come from."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from fused_prefopt.checks import closest, require_switches
from fused_prefopt.losses.protocol import Loss

Factory = TypeVar("Factory", bound=Callable[..., Loss])


@dataclass(frozen=True)
class LossInfo:
    """Needs, options and source of a registered loss.

    Attributes:
        needs: `LogpBatch` fields used beyond `policy` and `lengths`, with the defaults.
        wants: fields used where they are given.
        pairwise: the batch is pairs, chosen half first.
        coupled: it is more than a mean over pairs or completions: several ranks exchange theirs.
        stateful: it keeps a statistic, which belongs in checkpoints.
        aliases: other names of it.
        defaults: every hyperparameter with its default.
        paper: where it comes from.
    """

    needs: tuple[str, ...]
    wants: tuple[str, ...]
    pairwise: bool
    coupled: bool
    stateful: bool
    aliases: tuple[str, ...]
    defaults: dict[str, Any]
    paper: str


@dataclass(frozen=True)
class LossSpec:
    """A registered loss: its name and the function that composes it.

    Attributes:
        name: of the method.
        factory: keyword-only hyperparameters → loss.
        aliases: other names.
        paper: authors, year, equations.
    """

    name: str
    factory: Callable[..., Loss]
    aliases: tuple[str, ...]
    paper: str

    @property
    def defaults(self) -> dict[str, Any]:
        """Every hyperparameter with its default."""
        return {
            name: parameter.default
            for name, parameter in inspect.signature(self.factory).parameters.items()
        }

    def build(self, **hyperparameters: Any) -> Loss:
        """The loss with these hyperparameters.

        Args:
            **hyperparameters: those that differ from the defaults.

        Raises:
            TypeError: a hyperparameter is unknown.
            ValueError: a hyperparameter is out of its range.
        """
        defaults = self.defaults
        for unknown in hyperparameters.keys() - defaults.keys():
            accepted = ", ".join(f"{name}={value!r}" for name, value in defaults.items())
            raise TypeError(
                f"{self.name} has no hyperparameter {unknown!r}"
                f"{closest(unknown, defaults)}; it accepts {accepted or 'none'}"
            )
        require_switches(hyperparameters, defaults)
        return self.factory(**hyperparameters)

    def info(self) -> LossInfo:
        """Needs, options and source, with the default hyperparameters."""
        loss = self.build()
        return LossInfo(
            needs=tuple(sorted(loss.needs)),
            wants=tuple(sorted(loss.wants)),
            pairwise=loss.pairwise,
            coupled=loss.coupled,
            stateful=loss.statistics() is not None,
            aliases=self.aliases,
            defaults=self.defaults,
            paper=self.paper,
        )


_SPECS: dict[str, LossSpec] = {}
_NAMES: dict[str, str] = {}


def register(
    name: str, *, paper: str, aliases: tuple[str, ...] = ()
) -> Callable[[Factory], Factory]:
    """Decorator that makes a factory known by name; every test then covers it.

    Args:
        name: lower case, words joined by "-".
        paper: authors, year, equations.
        aliases: other names.

    Raises:
        ValueError: a name is taken, or a hyperparameter is not keyword-only with a default.
    """

    def add(factory: Factory) -> Factory:
        for parameter in inspect.signature(factory).parameters.values():
            has_default = parameter.default is not inspect.Parameter.empty
            if parameter.kind is not inspect.Parameter.KEYWORD_ONLY or not has_default:
                raise ValueError(f"{name}: {parameter.name} must be keyword-only with a default")
        for key in (name, *aliases):
            if key in _NAMES:
                raise ValueError(f"{key!r} is already a name of {_NAMES[key]!r}")
        _SPECS[name] = LossSpec(name, factory, aliases, paper)
        _NAMES.update(dict.fromkeys((name, *aliases), name))
        return factory

    return add


def find(name: str) -> LossSpec:
    """The registered loss of a name or alias; case and "_" for "-" do not matter.

    Raises:
        ValueError: there is none; the message has the closest names.
    """
    key = name.lower().replace("_", "-")
    if key not in _NAMES:
        raise ValueError(
            f"unknown loss {name!r}{closest(key, _NAMES)}; `fused-prefopt losses` lists all"
            f" {len(_SPECS)}"
        )
    return _SPECS[_NAMES[key]]


def available_losses() -> dict[str, LossInfo]:
    """Name → what the loss needs and accepts, of every registered loss, by name."""
    return {name: _SPECS[name].info() for name in sorted(_SPECS)}
