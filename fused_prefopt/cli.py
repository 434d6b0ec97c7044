"""`python -m fused_prefopt`: what the package can say and do from the command line."""

from __future__ import annotations

import argparse

import torch


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fused_prefopt", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser("doctor", help="this machine, its engines, a numerical check")
    doctor.add_argument("--device", help="such as cuda:1; the GPU if there is one, by default")
    tune = commands.add_parser("tune", help="search the fastest tile shapes of a head")
    tune.add_argument("--hidden-size", type=int, required=True)
    tune.add_argument("--vocab", type=int, required=True)
    tune.add_argument("--rows", type=int, default=4096, help="labelled rows of a typical batch")
    tune.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    tune.add_argument("--softcap", type=float)
    options = parser.parse_args(arguments)
    return _doctor(options.device) if options.command == "doctor" else _tune(options)


def _doctor(device: str | None) -> int:
    from fused_prefopt.doctor import examine

    healthy = True
    for what, finding, well in examine(device):
        print(f"{'ok ' if well else 'BAD'}  {what:<22} {finding}", flush=True)
        healthy = healthy and well
    return 0 if healthy else 1


def _tune(options: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        print("there is no GPU to tune for")
        return 1
    from fused_prefopt.ops.autotune import autotune
    from fused_prefopt.ops.tuning import cache_file

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
