"""A tiny model and data on disk, and commands that run on them; for ``pytest_plugins``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line_jobs import pairs, write_lines, write_model

from fused_prefopt.cli import main


@pytest.fixture(scope="session")
def material(tmp_path_factory) -> Path:
    """A folder with `model`, `other` (another model) and files of pairs."""
    folder = tmp_path_factory.mktemp("material")
    write_model(folder / "model")
    write_model(folder / "other", seed=7)
    write_lines(folder / "pairs.jsonl", pairs(16))
    write_lines(folder / "held_out.jsonl", pairs(6, seed=1))
    return folder


@pytest.fixture
def job(material, tmp_path, monkeypatch) -> Callable[..., int]:
    """Runs a command on a configuration: ``job("train", "key=value", …, key=value, …)``."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    datasets.disable_progress_bars()

    def run(command: str, *words: str, **keys: Any) -> int:
        given = {
            "model": str(material / "model"),
            "dataset": str(material / "pairs.jsonl"),
            "output_dir": str(tmp_path / "run"),
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
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump(given | keys))
        return main([command, str(path), *words])

    return run
