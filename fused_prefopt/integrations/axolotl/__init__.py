"""Axolotl: a plugin that trains `rl: dpo|ipo|simpo|orpo|kto` with any loss of this package.

In a configuration of Axolotl's::

    plugins: [fused_prefopt.integrations.axolotl.FusedPlugin]
    fused_prefopt: {loss: alpha-dpo, loss_kwargs: {alpha: 0.1}}

Nothing here imports `axolotl.core`: its training arguments get their fields when they are first
imported, which must be after the plugins.
"""

from __future__ import annotations

import logging
from typing import Any

from fused_prefopt.checks import require_packages, require_version

try:
    require_version("axolotl")
    from axolotl.integrations.base import BasePlugin
except ImportError:
    require_packages(__name__, "axolotl")
    raise

from fused_prefopt.integrations.axolotl.options import (
    TRAINERS,
    require_supported,
    training_arguments,
)

__all__ = ["FusedPlugin"]
logger = logging.getLogger(__name__)
_HERE = "fused_prefopt.integrations.axolotl"


class FusedPlugin(BasePlugin):
    """Axolotl's plugin: its options, its trainer, and no option of Axolotl's without an effect.

    Without a `loss` under `fused_prefopt:` the loss is Axolotl's own one of `rl:` and its options.
    """

    def register(self, cfg: dict[str, Any]) -> None:
        """Name the trainer of `rl:` in `trainer_cls`.

        Args:
            cfg: the configuration as it was written; changed.

        Raises:
            ValueError: `rl` is of another kind, or `trainer_cls` names another trainer.
        """
        if not _is_of(cfg):
            return
        require_supported(cfg)
        trainer = f"{_HERE}.trainers.{TRAINERS[cfg['rl']]}"
        named = cfg.get("trainer_cls")
        if named not in (None, trainer):
            raise ValueError(f"trainer_cls: got {named!r}, needs none, or {trainer!r}")
        cfg["trainer_cls"] = trainer

    def get_input_args(self) -> str:
        """Dotted name of the options in a configuration."""
        return f"{_HERE}.options.FusedArgs"

    def get_training_args_mixin(self) -> str:
        """Dotted name of what all training arguments get."""
        return f"{_HERE}.options.FusedTrainingArgs"

    def pre_model_load(self, cfg: Any) -> None:
        """Refuse what has no effect before the model is there; see `options.training_arguments`."""
        # `register` has refused a training without `rl`.
        if _is_of(cfg) and cfg.rl is not None:
            training_arguments(cfg)

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        """Training arguments of a checked configuration; see `options.training_arguments`."""
        if not _is_of(cfg):
            return {}
        if cfg.dpo_use_liger_kernel:
            logger.warning("dpo_use_liger_kernel: switched off, the loss is fused_prefopt's")
        return training_arguments(cfg)

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Notice a trainer that another plugin has put in this one's place.

        Raises:
            ValueError: `trainer` is not the one of `register`.
        """
        name = type(trainer).__name__
        if _is_of(cfg) and name != TRAINERS[cfg.rl]:
            raise ValueError(
                f"plugins: got one whose get_trainer_cls gives {name}, which goes before"
                f" trainer_cls and has another loss; needs {_HERE}.FusedPlugin without it"
            )


def _is_of(cfg: Any) -> bool:
    """Whether the plugin is one of this configuration, and that of a training.

    Axolotl keeps the plugins of earlier configurations, and takes `rl` away to generate.
    """
    named = f"{_HERE}.{FusedPlugin.__name__}" in (cfg.get("plugins") or ())
    return named and not (cfg.get("inference") and cfg.get("rl") is None)
