"""`fused-prefopt`, or `python -m fused_prefopt`: train, compare runs, and look things up."""

from __future__ import annotations

import argparse
import os
import sys
from types import ModuleType

import torch

from fused_prefopt import __version__
from fused_prefopt.cli import hub, llamafactory, losses, reference, report, train
from fused_prefopt.cli.console import UserError

_COMMANDS: dict[str, ModuleType] = {
    "train": train,
    "reference": reference,
    "report": report,
    "losses": losses,
    "llamafactory": llamafactory,
    "hub": hub,
}
_EXIT_CODES = (
    "Exit status: 0 done; 1 a finding of doctor or tune, or a loss that was not finite and stopped"
    " a training; 2 something to put right; 130 interrupted; 141 the reader of the output left."
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: words after the program's name; those of the process by default.

    Returns:
        0, or 1 where `doctor` finds a fault, `tune` no GPU or a training a loss or gradient that
        is not finite, or 2 where the user has to put something right, which is then said on the
        standard error stream. As of a program that a signal ends: 130 where the user interrupts
        it, 141 where whoever reads its output leaves.

    Raises:
        SystemExit: the words are no command (2), or ask for help (0).
    """
    try:
        try:
            return _run(arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_left():
            raise
        return 141


def _run(arguments: list[str] | None) -> int:
    options, others = _parser().parse_known_args(arguments)
    try:
        if others and not hasattr(options, "overrides"):
            hint = "; put a sum in quotes" if "+" in others else ""
            raise UserError(f"{options.command}: got {' '.join(others)}, needs nothing more{hint}")
        if others:
            options.overrides = others
        return int(options.run(options))
    except UserError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        print(f"fused-prefopt: {' '.join(filter(None, lines))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fused-prefopt: interrupted", file=sys.stderr)
        return 130


def _reader_left() -> bool:
    """Whether the standard output is closed (`| head`); then nothing is left to flush at exit."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fused-prefopt", description=__doc__, epilog=_EXIT_CODES, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in _COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    doctor = commands.add_parser("doctor", help="this machine, its engines, a numerical check")
    doctor.add_argument("--device", help="such as cuda:1; the GPU if there is one, by default")
    doctor.set_defaults(run=_doctor)
    tune = commands.add_parser("tune", help="search the fastest tile shapes of a head")
    tune.add_argument("--hidden-size", type=int, required=True)
    tune.add_argument("--vocab", type=int, required=True)
    tune.add_argument("--rows", type=int, default=4096, help="labelled rows of a typical batch")
    tune.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    tune.add_argument("--softcap", type=float)
    tune.set_defaults(run=_tune)
    return parser


def _doctor(options: argparse.Namespace) -> int:
    from fused_prefopt.cli.doctor import examine

    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device: got {options.device!r}: {error}".splitlines()[0]) from error
    healthy = True
    for what, finding, well in examine(options.device):
        print(f"{'ok ' if well else 'BAD'}  {what:<22} {finding}", flush=True)
        healthy = healthy and well
    return 0 if healthy else 1


def _tune(options: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        print("there is no GPU to tune for")
        return 1
    from fused_prefopt.ops.tuning import autotune, cache_file

    choices = autotune(
        options.hidden_size,
        options.vocab,
        rows=options.rows,
        dtype=getattr(torch, options.dtype),
        softcap=options.softcap,
    )
    for choice in choices:
        print(
            f"{choice.key}: {choice.before:.3f} ms -> {choice.milliseconds:.3f} ms {choice.block}"
        )
    print(f"stored in {cache_file()}")
    return 0
