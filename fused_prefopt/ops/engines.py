"""Which engines there are, and what each needs; an engine is imported when it is first chosen."""

from __future__ import annotations

import importlib
import os
from functools import cache
from types import ModuleType

import torch

from fused_prefopt.checks import require_choice

ENGINES = ("torch", "triton")


@cache
def load_engine(name: str) -> ModuleType:
    """The module of an engine; see `torch_engine` for what it supplies.

    Raises:
        ValueError: its packages are missing.
    """
    try:
        return importlib.import_module(f"fused_prefopt.ops.{name}_engine")
    except ImportError as error:
        raise ValueError(f"engine: {name!r} cannot be imported: {error}") from error


def choose_engine(name: str, device: torch.device) -> str:
    """The engine that `auto` stands for, or `name` if it can run on the device.

    Raises:
        ValueError: there is no such engine, or it cannot run here.
    """
    require_choice("engine", name, ("auto", *ENGINES))
    if name == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("engine: 'triton' takes CPU tensors under TRITON_INTERPRET=1 only")
    return "torch" if name == "auto" else name
