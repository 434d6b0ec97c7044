"""A tiny model and data on disk, and commands that run on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def material(tmp_path_factory) -> Path:
    """A folder with `model`, `other` (another model) and files of pairs."""
    datasets = pytest.importorskip("datasets")
    from command_line_jobs import write_material

    datasets.config.HF_DATASETS_CACHE = str(tmp_path_factory.mktemp("datasets"))
    datasets.disable_progress_bars()
    return write_material(tmp_path_factory.mktemp("material"))


@pytest.fixture
def job(material, tmp_path) -> Callable[..., int]:
    """Runs a command on a configuration: ``job("train", "key=value", …, key=value, …)``."""
    from command_line_jobs import write_job

    from fused_prefopt.cli.main import main

    return lambda command, *words, **keys: main(
        [command, write_job(material, tmp_path, **keys), *words]
    )


@pytest.fixture
def logged(job, tmp_path) -> Callable[..., list[dict[str, float]]]:
    """Trains into a folder of `tmp_path`, `run` by default; returns the rows of the steps."""
    from command_line_jobs import log_of

    def run(name: str = "run", **keys) -> list[dict[str, float]]:
        assert job("train", f"output_dir={tmp_path / name}", **keys) == 0
        return log_of(tmp_path / name)

    return run


@pytest.fixture
def loaded(material, tmp_path) -> Callable:
    """Loads the task of a configuration: ``loaded(key=value, …)``."""
    from command_line_jobs import write_job

    from fused_prefopt.cli.config import read_config
    from fused_prefopt.cli.task import load_task

    return lambda **keys: load_task(read_config(write_job(material, tmp_path, **keys), []))


@pytest.fixture
def refused(job, tmp_path, capsys) -> Callable[..., str]:
    """Runs a training that must end with 2 before it writes a model; returns its last line."""

    def run(*words, **keys) -> str:
        capsys.readouterr()
        assert job("train", *words, **keys) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert not list((tmp_path / "run").glob("*.safetensors"))
        return said.splitlines()[-1].removeprefix("fused-prefopt: ")

    return run
