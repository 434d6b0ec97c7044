"""`losses`: what is registered, and one loss in full."""

from __future__ import annotations

import argparse
import textwrap
from typing import Any

from fused_prefopt.command_line.errors import blaming
from fused_prefopt.command_line.table import text_table, wrapped
from fused_prefopt.loss_page import formula, hyperparameters
from fused_prefopt.losses import available_losses, find, preset, published_settings
from fused_prefopt.losses.needs import WHAT_IT_IS

_WIDTH = 100
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
        text = one_loss(options.name)
    print(text)
    return 0


def losses_table() -> str:
    """Every registered loss by name: what it judges and needs, and its first options."""
    heading = ("loss", "judges", "needs", "hyperparameters")
    rows = [
        (
            name,
            "pairs" if info.pairwise else "completions",
            ", ".join(info.needs) or "-",
            textwrap.shorten(_values(info.defaults) or "-", 80, placeholder=" …"),
        )
        for name, info in available_losses().items()
    ]
    more = "`fused-prefopt losses NAME`: its formula, what the options mean, and its paper."
    return f"{text_table(heading, wrapped(rows, (None, None, 22, 42)))}\n\n{more}"


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
    wide = [textwrap.fill(fact, _WIDTH, subsequent_indent=" " * 8) for fact in facts]
    parts.append("\n".join(wide))
    options = [
        (option, f"{value!r}", meanings.get(option, ""))
        for option, value in (info.defaults | chosen).items()
    ]
    if options:
        column = "published" if chosen else "default"
        meaning = _WIDTH - 4 - max(len(name) for name in ("hyperparameter", *info.defaults))
        meaning -= max(len(value) for _, value, _ in [("", column, ""), *options])
        rows = wrapped(options, (None, None, meaning))
        parts.append(text_table(("hyperparameter", column, "meaning"), rows))
    published = {k: each for k, each in published_settings().items() if each.loss == spec.name}
    if published:
        settings = [
            (key, _values(each.hyperparameters), f"{each.learning_rate:g}")
            for key, each in published.items()
        ]
        heading = ("published setting", "hyperparameters", "learning rate")
        papers = " and ".join(dict.fromkeys(each.paper for each in published.values()))
        parts.append(f"{text_table(heading, settings)}\n\nThey are those of {papers}.")
    return "\n\n".join(parts)


def _values(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())
