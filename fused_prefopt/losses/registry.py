"""Published methods by name, and the settings that papers trained with."""

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


@dataclass(frozen=True)
class PublishedSetting:
    """Hyperparameters and learning rate that a paper trained a model with.

    Attributes:
        loss: name of the registered loss.
        hyperparameters: of the loss, those that differ from its defaults or are the paper's.
        learning_rate: of Adam, batch size 128, one epoch, cosine schedule with 10 % warm-up.
        paper: where the setting is printed.
    """

    loss: str
    hyperparameters: dict[str, Any]
    learning_rate: float
    paper: str


# Margins are printed as ratios γ/β; losses take γ in units of reward.
_ALPHA_DPO = {
    "llama-3-8b-instruct": (2.5, 0.6, 0.2, 1e-6),
    "llama-3-8b-instruct-v0.2": (10.0, 0.4, 0.2, 1e-6),
    "mistral-7b-instruct": (2.5, 0.15, 0.05, 6e-7),
    "gemma-2-9b-it": (10.0, 0.4, 0.05, 8e-7),
}
_GAMMA_PO = {
    "llama-3-8b-instruct": (10.0, 0.4, 10.0, 1e-6),
    "mistral-7b-instruct": (2.5, 0.15, 10.0, 6e-7),
    "gemma-2-9b-it": (10.0, 0.5, 20.0, 8e-7),
    "qwen2.5-7b-instruct": (10.0, 0.3, 3.0, 1e-6),
}
_EPSILON_DPO = {"mistral-7b-instruct": 3e-7, "llama-3-8b-instruct": 7e-7}
# β, τ_ref, learning rate. Those whose configurations make batches of 128 on their eight GPUs.
_OMNI_DPO = {
    "gemma-2-9b-it": (10.0, 0.8, 8e-7),
    "qwen2.5-3b": (3.5, 0.8, 2e-6),
    "qwen2.5-7b": (3.5, 0.8, 2e-6),
    "qwen2.5-14b": (3.5, 0.8, 2e-6),
}
# Their authors' training configurations; batches, epoch and schedule as above.
_REPO = {
    "llama-3-8b-instruct": (0.6, 1e-6),
    "llama-3-8b-instruct-v0.2": (0.6, 1e-6),
    "mistral-7b-instruct": (0.4, 6e-7),
    "gemma-2-9b-it": (0.4, 8e-7),
}
_SIMPER = {
    "llama-3-8b-base": 6e-7,
    "llama-3-8b-instruct": 1e-6,
    "mistral-7b-base": 3e-7,
    "mistral-7b-instruct": 5e-7,
}


def published_settings() -> dict[str, PublishedSetting]:
    """Name ("loss/model") → setting, of all that are known, by name."""
    settings = {}
    for model, (beta, ratio, alpha, rate) in _ALPHA_DPO.items():
        options = {"beta": beta, "gamma": ratio * beta, "alpha": alpha}
        paper = "α-DPO (arXiv:2410.10148), Table 4"
        settings[f"alpha-dpo/{model}"] = PublishedSetting("alpha-dpo", options, rate, paper)
    for model, (beta, ratio, tau, rate) in _GAMMA_PO.items():
        options = {"beta": beta, "gamma": ratio * beta, "tau": tau}
        paper = "γ-PO (arXiv:2506.03690), Table 7"
        settings[f"gamma-simpo/{model}"] = PublishedSetting("gamma-simpo", options, rate, paper)
    for model, rate in _EPSILON_DPO.items():
        options = {"beta": 0.01, "epsilon": 0.01}
        paper = "ε-DPO (arXiv:2502.13177), the authors' code"
        settings[f"epsilon-dpo/{model}"] = PublishedSetting("epsilon-dpo", options, rate, paper)
    for model, (beta, tau_ref, rate) in _OMNI_DPO.items():
        options = {"beta": beta, "tau_ref": tau_ref}
        paper = "Omni-DPO (arXiv:2506.10054), Table C.1 and the authors' configurations"
        settings[f"omni-dpo/{model}"] = PublishedSetting("omni-dpo", options, rate, paper)
    for model, (gamma, rate) in _REPO.items():
        paper = "RePO (arXiv:2503.07426), its authors' training configurations"
        settings[f"repo/{model}"] = PublishedSetting("repo", {"gamma": gamma}, rate, paper)
    for model, rate in _SIMPER.items():
        paper = "SimPER (arXiv:2502.00883), its authors' training configurations"
        settings[f"simper/{model}"] = PublishedSetting("simper", {}, rate, paper)
    return dict(sorted(settings.items()))


def published_setting(name: str) -> PublishedSetting:
    """The published setting of a name.

    Args:
        name: "loss/model", such as "gamma-simpo/llama-3-8b-instruct"; case and "_" for "-" do not
            matter.

    Raises:
        ValueError: there is none; the message has the closest names.
    """
    settings, key = published_settings(), name.lower().replace("_", "-")
    if key not in settings:
        losses = ", ".join(dict.fromkeys(each.loss for each in settings.values()))
        raise ValueError(
            f"unknown setting {name!r}{closest(key, settings)}; `fused-prefopt losses NAME` lists"
            f" those of {losses}"
        )
    return settings[key]


def preset(name: str) -> tuple[str, dict[str, Any]]:
    """Loss and hyperparameters of a published setting.

    Args:
        name: as in `published_setting`.

    Returns:
        Name of the loss, and hyperparameters for it.

    Raises:
        ValueError: there is none; the message has the closest names.
    """
    setting = published_setting(name)
    return setting.loss, setting.hyperparameters
