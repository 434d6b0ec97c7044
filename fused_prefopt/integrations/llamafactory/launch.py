"""LLaMA-Factory's own command, with the trainers of this package in the place of its own."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from llamafactory import cli, launcher
from llamafactory.hparams import FinetuningArguments, parser
from llamafactory.train.dpo import trainer as dpo
from llamafactory.train.kto import workflow as kto
from llamafactory.train.tuner import run_exp

from fused_prefopt.integrations.llamafactory.arguments import FusedFinetuningArguments
from fused_prefopt.integrations.llamafactory.trainers import FusedDPOTrainer, FusedKTOTrainer

_MODULE = "fused_prefopt.integrations.llamafactory.launch"


def run(words: Sequence[str]) -> None:
    """Run ``llamafactory-cli WORDS``; a training's preference loss is one of this package's.

    With several GPUs its command starts itself anew with `torchrun`; what that starts is this
    module, with the same trainers in place.

    Args:
        words: as of its own command: "train" and a file, …

    Raises:
        SystemExit: processes that it started have ended.
    """
    before, sys.argv = sys.argv, ["llamafactory-cli", *words]
    try:
        with in_place():
            cli.main()
    finally:
        sys.argv = before


@contextmanager
def in_place() -> Iterator[None]:
    """LLaMA-Factory trains on preferences with this package inside.

    By other values of names in its modules, as it has no door: no option names a trainer class or
    a loss of others, its parser has a list of the known losses and refuses unknown keys, and its
    launcher starts the file that it is itself. `tests/frameworks/test_llamafactory.py` notices
    when one of these names is not there.
    """
    lists = [
        parser._TRAIN_ARGS,
        parser._INFER_ARGS,
        parser._EVAL_ARGS,
    ]
    places = [(each, each.index(FinetuningArguments)) for each in lists]
    own = dpo.CustomDPOTrainer, kto.CustomKTOTrainer, launcher.__file__
    try:
        for each, index in places:
            each[index] = FusedFinetuningArguments
        dpo.CustomDPOTrainer, kto.CustomKTOTrainer = FusedDPOTrainer, FusedKTOTrainer
        # It stands where torchrun takes the file to start, or `-m` and a module.
        launcher.__file__ = f"-m {_MODULE}"
        yield
    finally:
        for each, index in places:
            each[index] = FinetuningArguments
        dpo.CustomDPOTrainer, kto.CustomKTOTrainer, launcher.__file__ = own


if __name__ == "__main__":
    with in_place():
        run_exp()
