"""Configurations of Axolotl's, made of the example's, and trainings by Axolotl's own code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "frameworks" / "axolotl.yaml"
# The lines that a user adds.
OURS = ("plugins", "fused_prefopt")
# What makes the example a training of three steps on a CPU, whose weights show its gradients.
_SMALL = {
    "bf16": False,
    "chat_template": None,
    "sequence_len": 128,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": None,
    "max_steps": 3,
    "save_steps": 3,
    "optimizer": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler": "constant",
    "warmup_steps": 0,
    "dataset_num_proc": 1,
}
_SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "AXOLOTL_DO_NOT_TRACK": "1",
    "TRACKIO_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
}
# Axolotl's `python -m axolotl.cli.train`, for several configurations in a row; adapters are drawn.
_SEVERAL = """
import sys
from axolotl.cli.train import do_cli
from transformers import set_seed
for path in sys.argv[1:]:
    set_seed(0)
    do_cli(path)
"""


def write_config(folder: Path, name: str, *, ours: bool, rows: str = "", **changes: Any) -> Path:
    """Save the example's configuration for the model and the rows in a folder.

    Args:
        folder: has `model`, and `pairs.jsonl` and `points.jsonl`, or the file of `rows`.
        name: of the file, and of the folder of what is trained.
        ours: with the lines that a user adds.
        rows: name of the file of rows; by default "points" of `rl: kto`, "pairs" of others.
        **changes: other values; None takes an option away.

    Returns:
        The file.
    """
    config = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
    changes = _SMALL | changes
    rows = rows or ("points" if changes.get("rl") == "kto" else "pairs")
    config |= {
        "base_model": str(folder / "model"),
        "datasets": [{"path": str(folder / f"{rows}.jsonl"), "ds_type": "json", "type": None}],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / name),
    } | changes
    if not ours:
        config = {key: value for key, value in config.items() if key not in OURS}
    path = folder / f"{name}.yaml"
    kept = {key: value for key, value in config.items() if value is not None}
    path.write_text(yaml.safe_dump(kept), encoding="utf-8")
    return path


def run(*command: Any) -> subprocess.CompletedProcess[str]:
    """A command of Axolotl's, where neither a hub nor its makers hear of it."""
    return subprocess.run(
        [str(part) for part in command],
        env=os.environ | _SETTINGS,
        cwd=Path(str(command[-1])).parent,
        capture_output=True,
        text=True,
        timeout=1800,
    )


def train(*configs: Path) -> None:
    """Train by configurations, one after the other, in one process."""
    done = run(sys.executable, "-c", _SEVERAL, *configs)
    assert done.returncode == 0, done.stderr[-3000:]


def weights(config: Path) -> dict[str, torch.Tensor]:
    """What a training has left."""
    folder = config.with_suffix("")
    adapter = folder / "adapter_model.safetensors"
    return load_file(adapter if adapter.is_file() else folder / "model.safetensors")


def history(config: Path, step: int = 3) -> list[dict[str, float]]:
    """What was logged at each step up to a checkpoint's."""
    state = config.with_suffix("") / f"checkpoint-{step}" / "trainer_state.json"
    return json.loads(state.read_text(encoding="utf-8"))["log_history"]
