"""Jobs of the command line: a tiny model and data on disk, a configuration, what a run leaves."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from data_tokenizer import tiny_tokenizer
from tiny_models import tiny_llama

ROOT = Path(__file__).resolve().parents[2]
_WORDS = "the cat sat on mat 1 2".split()
# Three completions of one prompt, rated.
RATED = [
    {"prompt": "the cat", "completion": text, "reward": reward, "group": 3}
    for text, reward in (("sat on", 0.5), ("mat 1", 0.25), ("cat cat", 1.0))
]
_BARE = """
import sys
for name in ("transformers", "accelerate", "datasets", "tokenizers", "safetensors", "peft", "trl",
             "omegaconf", "yaml", "rich", "tabulate", "tqdm", "scipy", "matplotlib"):
    sys.modules[name] = None
from fused_prefopt.cli.main import main
"""


def sentences(count: int, seed: int = 0) -> list[str]:
    """Random texts over the tiny tokenizer's words."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(_WORDS, k=draw.randint(2, 6))) for _ in range(count)]


def pairs(count: int, seed: int = 0, **more: Any) -> list[dict[str, Any]]:
    """Pairs whose chosen text ends in "cat" and whose rejected one in "mat"."""
    texts = sentences(2 * count, seed)
    return [
        {"prompt": prompt, "chosen": f"{text} cat", "rejected": f"{text} mat", **more}
        for prompt, text in zip(texts[::2], texts[1::2], strict=True)
    ]


def write_lines(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return str(path)


def write_material(folder: Path) -> Path:
    """`model`, `other` (another model) and files of pairs in a folder."""
    for name, seed in (("model", 0), ("other", 7)):
        tiny_llama(seed).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    write_lines(folder / "pairs.jsonl", pairs(16))
    write_lines(folder / "held_out.jsonl", pairs(6, seed=1))
    return folder


def write_job(material: Path, folder: Path, **keys: Any) -> str:
    """A configuration of two steps, whose output is `run` in a folder; returns its path."""
    given = {
        "model": str(material / "model"),
        "dataset": str(material / "pairs.jsonl"),
        "output_dir": str(folder / "run"),
        "max_length": 32,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "lr_scheduler_type": "constant",
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "pictures": False,
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(given | keys))
    return str(path)


def log_of(folder: Path) -> list[dict[str, float]]:
    """The rows of training steps that a run logged."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [row for row in history if "loss" in row]


def environment(**more: str) -> dict[str, str]:
    """Of a process that imports this tree."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"} | more


def python(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that has ended."""
    return subprocess.run(
        [sys.executable, *words],
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=300,
    )


def bare(code: str) -> subprocess.CompletedProcess[str]:
    """Lines that may call `main`, run where torch alone is installed."""
    return python("-c", _BARE + code)
