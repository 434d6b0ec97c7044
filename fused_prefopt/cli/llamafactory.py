"""LLaMA-Factory's own command, with this package's losses in its trainers of preferences.

`fused-prefopt llamafactory train FILE.yaml` is `llamafactory-cli train FILE.yaml`, in whose file
`pref_loss:` takes any name of `fused-prefopt losses`, and a key `fused_prefopt:` the other options
(loss_kwargs, workspace_mb, engine, log_tokens, on_nonfinite). Every other command is its own.
"""

from __future__ import annotations

import argparse
import os

from fused_prefopt.cli.console import UserError, require_packages

# Variables of the environment under which LLaMA-Factory trains with other code than its trainers.
_OTHER_TRAINERS = ("USE_V1", "USE_MCA", "USE_RAY")
HELP = "LLaMA-Factory's own command, with these losses in its trainers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes.

    Args:
        parser: of the command.
    """
    parser.add_argument(
        "words",
        nargs=argparse.REMAINDER,
        metavar="WORD",
        help="of llamafactory-cli: train FILE.yaml [KEY=VALUE ...], version, ...",
    )


def run(options: argparse.Namespace) -> int:
    """Run the command.

    Args:
        options: as parsed.

    Returns:
        0.

    Raises:
        UserError: LLaMA-Factory is not installed, or the words would train without this package.
    """
    require_packages("llamafactory", "llamafactory")
    command = options.words[0] if options.words else "help"
    if command == "webui":
        raise UserError(
            "llamafactory: got webui, which starts `llamafactory-cli train` and so its own losses;"
            " save its configuration and use `fused-prefopt llamafactory train`"
        )
    for name in _OTHER_TRAINERS if command == "train" else ():
        value = os.environ.get(name, "0")
        if value.lower() in ("1", "true", "y"):
            raise UserError(f"{name}: got {value}, under which other code trains; needs it unset")
    from fused_prefopt.integrations.llamafactory.launch import run as run_its_command

    run_its_command(options.words)
    return 0
