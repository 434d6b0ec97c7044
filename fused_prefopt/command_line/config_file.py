"""A configuration: a YAML file and `key=value` words that go before it."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from fused_prefopt.checks import closest
from fused_prefopt.command_line.errors import UserError, blaming, require_packages
from fused_prefopt.command_line.settings import Settings
from fused_prefopt.command_line.training_checks import check_training
from fused_prefopt.losses import published_settings

EPILOG = """\
KEY is any key of the file, as KEY=VALUE, --KEY=VALUE or --KEY VALUE; a dot reaches inside a
mapping: loss_kwargs.beta=2.5. VALUE is read as YAML. Keys are those of transformers'
TrainingArguments (max_steps, learning_rate, output_dir, bf16, …) and the following:

"""
# YAML 1.1 would read `no` as false and 1e-6 as a string.
_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_MERGE = "tag:yaml.org,2002:merge"
_BOOLS = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_FLOATS = re.compile(
    r"^[-+]?(?:(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)$"
    r"|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
)
# How argparse begins what it says of a key.
_ARGUMENT = re.compile(r"^argument --(\w+)(?:/--[\w-]+)*:")
_LOGGING_STEPS = 10


@dataclass(frozen=True)
class Config:
    """A configuration that has been read.

    Attributes:
        settings: the keys of this package.
        training: the `transformers.TrainingArguments`.
        given: every key of the file and the words, as they were given.
    """

    settings: Settings
    training: Any
    given: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        return Path(self.training.output_dir)

    @property
    def cache_dir(self) -> Path:
        """Where reference log-probs are kept."""
        return Path(self.settings.cache_dir or self.folder / "cache")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The file and the words after it, with their keys in the help."""
    parser.usage = f"{parser.prog} [-h] CONFIG [KEY=VALUE …]"
    parser.add_argument("config", metavar="CONFIG", help="a YAML file")
    parser.set_defaults(overrides=[])
    keys = [f"  {each.name:<21} {each.metadata['help']}" for each in fields(Settings)]
    parser.epilog = EPILOG + "\n".join(keys)


def read_config(path: str, overrides: Sequence[str]) -> Config:
    """The settings and training arguments of a file and the words that go before it.

    Keys that are given nowhere have the defaults of `Settings` and `TrainingArguments`, except:
    `output_dir` is runs/ and the file's name, `report_to` none, `logging_steps` 10,
    `dataloader_pin_memory` false without a GPU, and `learning_rate` the published one where `loss`
    is a published setting.

    Raises:
        UserError: the file or a word cannot be read, a key is unknown (the message has the closest
            names), a value does not fit, or transformers is missing.
    """
    require_packages("training", "transformers", "accelerate", "yaml")
    given = _load(Path(path))
    for key, value in parsed_overrides(overrides):
        _put(given, key, value)
    values = {
        "output_dir": f"runs/{Path(path).stem}",
        "report_to": "none",
        "logging_steps": _LOGGING_STEPS,
        "dataloader_pin_memory": torch.cuda.is_available(),
        **given,
    }
    published = published_settings().get(str(given.get("loss")).lower().replace("_", "-"))
    if published is not None:
        values = {"learning_rate": published.learning_rate} | values
    settings, training = _parsed(path, values)
    return Config(settings, training, given)


def parsed_overrides(words: Sequence[str]) -> list[tuple[str, Any]]:
    """(key, value) of `key=value`, `--key=value` and `--key value`, in order.

    A `--key` that no value follows is true; `-` in a key stands for `_`.

    Raises:
        UserError: a word is neither, or its value is no YAML.
    """
    found, left = [], list(words)
    while left:
        word = left.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        if not equals:
            if not word.startswith("--"):
                raise UserError(f"{word}: got a word alone, needs key=value")
            text = left.pop(0) if left and not _is_key(left[0]) else "true"
        key = name.replace("-", "_")
        with blaming(key):
            found.append((key, _yaml(text)))
    return found


def _is_key(word: str) -> bool:
    return word.startswith("--") or re.match(r"[A-Za-z_][\w.]*=", word) is not None


def _load(path: Path) -> dict[str, Any]:
    with blaming(str(path)):
        content = _yaml(path.read_text(encoding="utf-8"))
        if content is None:
            return {}
        if not isinstance(content, dict):
            raise ValueError(f"got {type(content).__name__}, needs keys with values")
        return content


def _yaml(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Booleans and numbers of YAML 1.2, and each key once."""

        yaml_implicit_resolvers = {
            first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOL, _FLOAT)]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def compose_mapping_node(self, anchor: Any) -> Any:
            node, lines = super().compose_mapping_node(anchor), dict[str, int]()
            for key, _ in node.value:
                if key.tag == _MERGE or not isinstance(key.value, str):
                    continue
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise ValueError(
                        f"got the key {key.value!r} twice, in lines {lines[key.value]} and {line},"
                        " needs it once"
                    )
                lines[key.value] = line
            return node

    Loader.add_implicit_resolver(_BOOL, _BOOLS, list("tTfF"))
    Loader.add_implicit_resolver(_FLOAT, _FLOATS, list("-+.0123456789"))
    try:
        return yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        mark, said = error.problem_mark, error.problem or "something else"
        place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        remedy = "; indent with spaces" if "\\t" in said else ""
        raise ValueError(f"got no YAML{place}: {said}{remedy}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"got no YAML: {error}") from error


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *outer, last = key.split(".")
    for name in outer:
        inner = values.get(name)
        values[name] = dict(inner) if isinstance(inner, dict) else {}
        values = values[name]
    values[last] = value


def _parsed(path: str, values: dict[str, Any]) -> tuple[Settings, Any]:
    from transformers import HfArgumentParser, TrainingArguments

    class Parser(HfArgumentParser):
        def error(self, message: str) -> Any:
            plain = _ARGUMENT.sub(r"\1:", message)
            raise UserError(f"{path}: {plain}")

    parser = Parser((Settings, TrainingArguments))
    known = {action.dest for action in parser._actions} - {"help"}
    for name in values:
        if name not in known:
            raise UserError(f"{path}: unknown key {name!r}{closest(str(name), known)}")
    own = {"remove_unused_columns": False, "label_names": ["completion_mask"]}
    for name in own.keys() & values.keys():
        raise UserError(f"{name}: got {values[name]!r}, needs to be left out: training sets it")
    if values.get("resume_from_checkpoint") is not None:
        raise UserError("resume_from_checkpoint: got one, needs --resume after the file instead")
    # Strings are what the parser converts and checks.
    numbers = {k: str(v) for k, v in values.items() if type(v) in (int, float)}
    parser.set_defaults(**values, **own)
    parser.set_defaults(**numbers)
    try:
        settings, training = parser.parse_args_into_dataclasses([], look_for_args_file=False)
        check_training(training)
    except (ValueError, TypeError, OSError, ImportError) as error:
        own_keys = {each.name for each in fields(Settings)}
        of_training = {name: value for name, value in values.items() if name not in own_keys}
        raise UserError(f"{path}: {_with_key(str(error), of_training)}") from error
    return settings, training


def _with_key(said: str, given: dict[str, Any]) -> str:
    """What transformers says of a value, begun with its key, where that can be told."""
    if re.match(r"\w+: ", said):
        return said
    places = {name: re.search(rf"\b{re.escape(str(name))}\b", said) for name in given}
    named = {name: found.start() for name, found in places.items() if found}
    quoted = [name for name, value in given.items() if said.startswith(f"{value} is not")]
    name = min(named, key=lambda each: named[each]) if named else next(iter(quoted), None)
    return said if name is None else f"{name}: got {given[name]!r}: {said}"
