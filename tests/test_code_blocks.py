"""Code blocks of all pages that are not Python are read by what they are for.

Commands by their parsers, YAML by who loads it, changes to other frameworks' files by the options
of this package. `test_readme.py` runs the Python; blocks of `text` are counted.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
from test_readme import PAGES

from benchmarks.__main__ import make_parser
from fused_prefopt.cli import config
from fused_prefopt.cli.main import _parser, main
from fused_prefopt.integrations import options

yaml = pytest.importorskip("yaml")
pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parent.parent
LANGUAGES = {"python", "bash", "yaml", "diff", "text", "pytb"}
# Trees of files and of calls have no language.
DRAWN = {"CONTRIBUTING.md": 2}
# Those that need several GPUs, DeepSpeed or Megatron.
MOST_TEXTS = 4
# Data that is the reader's, and text that takes seconds to load.
NOT_READ = {"data.jsonl", "embedded"}


def blocks(language: str) -> list:
    """(code) of every block of a language, on all pages."""
    return [
        pytest.param(code, id=f"{page.stem}-{number}")
        for page in PAGES
        for number, code in enumerate(
            re.findall(rf"(?ms)^ *```{language}\n(.*?)^ *```", page.read_text(encoding="utf-8"))
        )
    ]


def commands(code: str) -> list[list[str]]:
    """Words of each command of a block, without comments."""
    lines = code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


class Existing:
    """What the commands of the pages may name."""

    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")

    def make(self, words: list[str]) -> None:
        assert re.search(rf"(?m)^{words[0]}:", self.makefile), words

    def pip(self, words: list[str]) -> None:
        assert words[0] == "install"
        for extra in re.findall(r"\[([\w,]+)\]", " ".join(words)):
            assert all(re.search(rf"(?m)^{name} = \[", self.project) for name in extra.split(","))

    def fused_prefopt(self, words: list[str]) -> None:
        given, others = _parser().parse_known_args(words)
        if given.command in ("train", "reference"):
            file = ROOT / given.config
            assert file.is_file(), words
            config.read_config(str(file), others)
        elif given.command == "losses":
            assert given.data in NOT_READ if given.data else main(words) == 0
        else:
            assert not others or given.command == "llamafactory"

    def python(self, words: list[str]) -> None:
        if words[0] != "-m":
            assert (ROOT / words[0]).is_file(), words
            return
        name, rest = words[1], words[2:]
        if name == "benchmarks":
            make_parser().parse_args(rest)
        elif name == "fused_prefopt":
            self.fused_prefopt(rest)
        else:
            assert name == "pytest"
            paths = [word for word in rest if "/" in word or word == "tests"]
            assert all((ROOT / path).exists() for path in paths), words
            marked = " ".join(rest[i + 1] for i, word in enumerate(rest) if word == "-m")
            markers = set(re.findall(r"\w+", marked)) - {"and", "not"}
            assert all(f'"{marker}: ' in self.project for marker in markers)


@pytest.mark.parametrize("code", blocks("bash"))
def test_commands_are_taken(code, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    # A configuration for GPUs is read here, too.
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    existing = Existing()
    for words in commands(code):
        while "=" in words[0]:
            words = words[1:]
        program = words[0].rpartition("/")[2].replace("-", "_")
        getattr(existing, program)(words[1:])


def read_by(code: str) -> str:
    """The comment on a block's first line, which says who reads it."""
    first = code.splitlines()[0]
    assert first.startswith("# "), first
    return first


@pytest.mark.parametrize("code", blocks("yaml"))
def test_yaml_is_read_by_what_it_is_for(code, tmp_path):
    file = tmp_path / "file.yaml"
    file.write_text(code, encoding="utf-8")
    reader = read_by(code)
    if reader.startswith("# fused-prefopt"):
        found = config.read_config(str(file), [])
        assert set(found.given) == set(yaml.safe_load(code))
        return
    assert reader.startswith("# accelerate launch")
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import ParallelismConfig

    words = launch_command_parser().parse_args(["--config_file", str(file), "train.py"])
    launched, _, _ = _validate_launch_command(words)
    given, prefix = yaml.safe_load(code), "parallelism_config_"
    for key, value in {**given["fsdp_config"], **given["parallelism_config"]}.items():
        assert getattr(launched, key) == value, key
    assert launched.use_fsdp and launched.use_parallelism_config
    sizes = {key.removeprefix(prefix): size for key, size in given["parallelism_config"].items()}
    assert ParallelismConfig(**sizes).total_size == launched.num_processes


@pytest.mark.parametrize("code", blocks("diff"))
def test_changes_to_other_frameworks_name_what_is_there(code):
    lines = [line[1:] for line in code.splitlines() if line[:1] in " +"]
    added = [line[1:] for line in code.splitlines() if line.startswith("+")]
    assert added
    if lines[0].startswith("swift rlhf"):
        words = shlex.split(" ".join(lines).replace("\\", ""))
        plugin = words[words.index("--external_plugins") + 1]
        given = json.loads(words[words.index("--model_kwargs") + 1])
    else:
        whole = yaml.safe_load("\n".join(line for line in lines if line.strip() != "..."))
        plugin = (whole.get("external_plugins") or whole.get("plugins") or [None])[0]
        given = whole.get("model_kwargs", whole)
        if "pref_loss" in whole:
            given[options.KEY]["loss"] = whole["pref_loss"]
    fields = options.read_mapping(given[options.KEY])
    assert options.PairOptions(**fields).build_loss().name == fields["loss"]
    if plugin is None:
        assert any("pref_loss" in line for line in added)
    elif plugin.endswith(".py"):
        tree = ast.parse((ROOT / plugin).read_text(encoding="utf-8"))
        (imported,) = (node for node in tree.body if isinstance(node, ast.Import))
        assert module_file(imported.names[0].name)
    else:
        module, _, name = plugin.rpartition(".")
        assert f"class {name}(" in module_file(module).read_text(encoding="utf-8")


def module_file(name: str) -> Path:
    """A module of the package, which is not imported: its framework is not here."""
    folder = ROOT.joinpath(*name.split("."))
    found = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    assert found.is_file()
    return found


@pytest.mark.parametrize("code", blocks("text"))
def test_what_does_not_run_here_is_python_that_names_what_is_there(code):
    imports = [node for node in ast.parse(code).body if isinstance(node, ast.ImportFrom)]
    for node in imports:
        module = importlib.import_module(node.module)
        assert all(hasattr(module, each.name) for each in node.names)


def test_every_block_has_a_language_that_is_read():
    for page in PAGES:
        fences = re.findall(r"(?m)^ *```(.*)$", page.read_text(encoding="utf-8"))
        bare = fences[::2].count("")
        assert set(fences[::2]) - {""} <= LANGUAGES and bare <= DRAWN.get(page.name, 0), page
    assert len(blocks("text")) <= MOST_TEXTS


def test_the_parsers_refuse_what_is_not_there(capsys):
    existing = Existing()
    with pytest.raises(AssertionError):
        existing.make(["trian"])
    with pytest.raises(SystemExit):
        existing.python(["-m", "benchmarks", "gpus"])
    with pytest.raises((SystemExit, argparse.ArgumentError)):
        existing.fused_prefopt(["doctr"])
