"""`losses`: what is registered, and one loss in full."""

from __future__ import annotations

import argparse
from typing import Any

from fused_prefopt.command_line.errors import blaming
from fused_prefopt.command_line.table import text_table
from fused_prefopt.loss_page import formula, hyperparameters
from fused_prefopt.losses import available_losses, find, preset, published_settings
from fused_prefopt.losses.needs import WHAT_IT_IS

HELP = "the registered losses, or one of them with its formula"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "name", nargs="?", help="a loss, an alias or a published setting such as alpha-dpo/…"
    )


def run(options: argparse.Namespace) -> int:
    """Print the table, or one loss.

    Raises:
        UserError: there is no such loss or setting; the message lists the closest names.
    """
    if options.name is None:
        print(losses_table())
        return 0
    with blaming("losses"):
        print(one_loss(options.name))
    return 0


def losses_table() -> str:
    """Every registered loss by name: what it judges and needs, its options and its paper."""
    rows = [
        (
            name,
            "pairs" if info.pairwise else "completions",
            ", ".join(info.needs) or "-",
            _values(info.defaults) or "-",
            info.paper,
        )
        for name, info in available_losses().items()
    ]
    return text_table(("loss", "judges", "needs", "hyperparameters", "paper"), rows)


def one_loss(name: str) -> str:
    """Formula, needs, hyperparameters and published settings of one loss.

    Args:
        name: of the loss, an alias, or a published setting, whose values then stand for the
            defaults.

    Raises:
        ValueError: there is none; the message lists the closest names.
    """
    loss, chosen = preset(name) if "/" in name else (name, {})
    spec = find(loss)
    info, meanings = spec.info(), hyperparameters(spec.factory)
    called = f" (also {', '.join(info.aliases)})" if info.aliases else ""
    parts = [f"{spec.name}{called}\n{info.paper}", formula(spec.factory).replace("``", "")]
    judged = "pairs, chosen and rejected" if info.pairwise else "single completions"
    facts = [f"judges  {judged}"]
    facts += [f"needs   {field}: {WHAT_IT_IS[field]}" for field in info.needs]
    facts += [f"uses    {field}, where given: {WHAT_IT_IS[field]}" for field in info.wants]
    if info.stateful:
        facts.append("keeps   a statistic, which belongs in checkpoints")
    if info.coupled:
        facts.append("spans   the batch of all ranks")
    parts.append("\n".join(facts))
    options = [
        (option, f"{value!r}", meanings.get(option, ""))
        for option, value in (info.defaults | chosen).items()
    ]
    if options:
        column = "published" if chosen else "default"
        parts.append(text_table(("hyperparameter", column, "meaning"), options))
    settings = [
        (key, _values(setting.hyperparameters), f"{setting.learning_rate:g}", setting.paper)
        for key, setting in published_settings().items()
        if setting.loss == spec.name
    ]
    if settings:
        heading = ("published setting", "hyperparameters", "learning rate", "paper")
        parts.append(text_table(heading, settings))
    return "\n\n".join(parts)


def _values(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())
