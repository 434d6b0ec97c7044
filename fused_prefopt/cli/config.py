"""A configuration: a YAML file and `key=value` words that go before it.

Its keys are those of `Settings` and of `transformers.TrainingArguments`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence, Set
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import torch

from fused_prefopt.checks import (
    ON_NONFINITE,
    closest,
    require_choice,
    require_count,
    require_number,
)
from fused_prefopt.cli.console import UserError, blaming, require_packages
from fused_prefopt.data.columns import COMPLETION_MASK
from fused_prefopt.losses import PublishedSetting, published_in
from fused_prefopt.ops.engines import ENGINES

EMBEDDED = "embedded"
REFERENCES = ("precomputed", "model", "adapter")
LAYOUTS = ("padded", "packed", "shared_prompt")
DTYPES = ("auto", "float32", "bfloat16", "float16")
_TEXTS = ("dataset", "split")
_OPTIONAL_TEXTS = (
    *("model", "tokenizer", "attn_implementation", "adapter", "held_out", "reference_model"),
    "cache_dir",
)
_COUNTS = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
)
_NOT_NEGATIVE = ("learning_rate", "weight_decay", "max_grad_norm", "adam_epsilon")
_INTERVALS = ("logging", "eval", "save")
EPILOG = """\
KEY is any key of the file, as KEY=VALUE, --KEY=VALUE or --KEY VALUE; a dot reaches inside a
mapping or a list: loss_kwargs.beta=2.5, peft.target_modules.0=q_proj. VALUE is read as YAML;
${KEY} stands for another key's value. Keys are those of transformers' TrainingArguments
(max_steps, learning_rate, output_dir, bf16, …) and the following:

"""
_BOOL, _MERGE = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:merge"
_BOOLS = ("true", "false")
# How argparse begins what it says of a key.
_ARGUMENT = re.compile(r"^argument --(\w+)(?:/--[\w-]+)*:")
_LOGGING_STEPS = 10


def _key(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass
class Settings:
    """What to train, on what, with which loss.

    Raises:
        ValueError: a value is none of its choices, a name is empty, or a number is out of range.
    """

    model: str | None = _key(None, "hub name or folder of the causal LM to start from")
    model_config: dict[str, Any] | None = _key(
        None, "config of an untrained model instead, such as {model_type: llama, hidden_size: 64}"
    )
    tokenizer: str | None = _key(
        None, "hub name or folder; the model's, or trained on the data for an untrained model"
    )
    dtype: str = _key("float32", f"of the weights: {', '.join(DTYPES)}")
    attn_implementation: str | None = _key(None, "such as sdpa or flash_attention_2")
    peft: dict[str, Any] | None = _key(
        None, "LoRA: keys of peft.LoraConfig such as {r: 16, lora_alpha: 32, target_modules: …}"
    )

    dataset: str = _key(
        EMBEDDED, "hub name, folder, JSON, CSV or Parquet file; or embedded, text of the package"
    )
    adapter: str | None = _key(
        None, "how to read its rows, such as preference; told by the name or the columns"
    )
    split: str = _key("train", "split to train on")
    held_out: str | None = _key(None, "split or file to judge on; of embedded any name will do")
    limit: int | None = _key(None, "rows to train on at most")
    held_out_limit: int | None = _key(None, "rows to judge on at most")
    flip_rate: float = _key(0.0, "share of wrong labels in the embedded data")
    max_length: int = _key(1024, "tokens of prompt and completion")
    max_prompt_length: int | None = _key(None, "tokens of the prompt; half of max_length")
    layout: str = _key("padded", f"of a batch: {', '.join(LAYOUTS)}")

    # With None in it, the parser takes a text; the file gives the list too.
    loss: list[Any] | str | None = _key(
        "dpo", "a loss, a published setting, which brings its learning rate, or a sum of them"
    )
    loss_kwargs: dict[str, Any] | None = _key(None, "its hyperparameters")
    workspace_mb: float | None = _key(None, "workspace of the fused op in MiB; the device's")
    engine: str = _key("auto", "of the fused op: auto, torch, cublas or triton")

    reference: str = _key(
        "precomputed",
        "precomputed (before training), model (kept beside the policy) or adapter (LoRA off)",
    )
    reference_model: str | None = _key(
        None, "hub name or folder; the model that training starts from"
    )
    cache_dir: str | None = _key(None, "of precomputed log-probs; OUTPUT_DIR/cache")
    reference_batch_size: int = _key(16, "rows of a forward pass that trains nothing")
    on_nonfinite: str = _key(
        "stop", "at a step whose loss or gradient is not finite: stop, skip it, or ignore"
    )
    log_tokens: bool = _key(False, "also log entropy, mean logits and accuracy of tokens")
    pictures: bool = _key(True, "draw the report's pictures at the end")

    def __post_init__(self) -> None:
        for name in (*_TEXTS, *_OPTIONAL_TEXTS):
            text = getattr(self, name)
            missing = text is None and name in _OPTIONAL_TEXTS
            if not missing and (not isinstance(text, str) or not text.strip()):
                raise ValueError(f"{name}: got {text!r}, needs a name")
        is_text = isinstance(self.loss, str) and bool(self.loss.strip())
        if not is_text and not (isinstance(self.loss, list) and self.loss):
            raise ValueError(f"loss: got {self.loss!r}, needs a name or a list of terms")
        require_choice("dtype", self.dtype, DTYPES)
        require_choice("layout", self.layout, LAYOUTS)
        require_choice("reference", self.reference, REFERENCES)
        require_choice("engine", self.engine, ("auto", *ENGINES))
        require_choice("on_nonfinite", self.on_nonfinite, ON_NONFINITE)
        if self.workspace_mb is not None and not self.workspace_mb > 0:
            raise ValueError(f"workspace_mb: got {self.workspace_mb}, wanted a number of MiB > 0")
        require_number("flip_rate", self.flip_rate, low=0, high=1)
        for name in ("model_config", "peft", "loss_kwargs"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, dict):
                raise ValueError(f"{name}: got {value!r}, needs keys with values")
            for key in value or {}:
                if not isinstance(key, str):
                    raise ValueError(f"{name}: got the key {key!r}, needs names as keys")
        require_count("max_length", self.max_length, low=2)
        require_count("reference_batch_size", self.reference_batch_size, low=1)
        for name in ("limit", "held_out_limit", "max_prompt_length"):
            value = getattr(self, name)
            if value is not None:
                require_count(name, value, low=1)
        if (self.model is None) == (self.model_config is None):
            got = "neither" if self.model is None else "both"
            raise ValueError(f"model: got {got} model and model_config, needs one of them")
        if self.reference == "adapter" and self.peft is None:
            raise ValueError("reference: got adapter without peft, needs precomputed or model")
        if self.reference == "adapter" and self.reference_model is not None:
            raise ValueError("reference_model: got one with reference: adapter, needs none")

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt at most."""
        return self.max_prompt_length or self.max_length // 2


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


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
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
    is a published setting, or a sum with one.

    Raises:
        UserError: the file or a word cannot be read, a key is unknown (the message has the closest
            names), a value does not fit, or transformers is missing.
    """
    require_packages("training", "transformers", "accelerate", "omegaconf", "safetensors")
    in_file = _load(Path(path))
    words = parsed_overrides(overrides)
    given = _merged(in_file, words)
    values = {
        "output_dir": f"runs/{Path(path).stem}",
        "report_to": "none",
        "logging_steps": _LOGGING_STEPS,
        "dataloader_pin_memory": torch.cuda.is_available(),
        **given,
    }
    published = _published_setting(given.get("loss"))
    if published is not None:
        values = {"learning_rate": published.learning_rate} | values
    settings, training = _parsed(path, values, {key.partition(".")[0] for key, _ in words})
    return Config(settings, training, given)


def _published_setting(loss: Any) -> PublishedSetting | None:
    try:
        return None if loss is None else published_in(loss)
    except ValueError:  # which is told when the loss is made
        return None


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
            found.append((key, _value(text)))
    return found


def _is_key(word: str) -> bool:
    return word.startswith("--") or re.match(r"[A-Za-z_][\w.]*=", word) is not None


def _load(path: Path) -> dict[str, Any]:
    with blaming(str(path)):
        content = _value(path.read_text(encoding="utf-8"))
        if content is None:
            return {}
        if not isinstance(content, dict):
            raise ValueError(f"got {type(content).__name__}, needs keys with values")
        return content


def _merged(given: dict[str, Any], words: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The keys of a file with those of words, whose dots reach inside mappings, put over them."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    config = OmegaConf.create(given)
    for key, value in words:
        try:
            OmegaConf.update(config, key, value, merge=False)
        except OmegaConfBaseException as error:
            raise UserError(f"{key}: got {value!r}: {_first_line(error)}") from error
    try:
        whole = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "configuration"
        raise UserError(f"{key}: {_first_line(error)}") from error
    return cast(dict[str, Any], whole)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _value(text: str) -> Any:
    """What OmegaConf reads a text as."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={_yaml_1_2(text)}"]))["value"]
    except yaml.MarkedYAMLError as error:
        mark, said = error.problem_mark, error.problem or "something else"
        place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        remedy = "; indent with spaces" if "\\t" in said else ""
        raise ValueError(f"got no YAML{place}: {said}{remedy}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"got no YAML: {error}") from error
    except OmegaConfBaseException as error:
        raise ValueError(f"got what OmegaConf does not read: {_first_line(error)}") from error


def _yaml_1_2(text: str) -> str:
    """The text with YAML 1.1's other booleans in quotes.

    OmegaConf reads `no` as false, which YAML 1.2 and `save_strategy: no` do not mean.

    Raises:
        ValueError: a key is there twice; OmegaConf names the line of the second alone.
    """
    import yaml

    words: list[tuple[int, str]] = []
    left, seen = [yaml.compose(text, yaml.SafeLoader)], set[int]()
    while left:
        node = left.pop()
        if id(node) in seen:  # by an alias
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            _require_keys_once(node)
            left += [each for pair in node.value for each in pair]
        elif isinstance(node, yaml.SequenceNode):
            left += node.value
        elif node is not None and node.tag == _BOOL and node.value.lower() not in _BOOLS:
            words.append((node.end_mark.index, node.value))
    for end, word in sorted(words, reverse=True):
        text = f"{text[: end - len(word)]}'{word}'{text[end:]}"
    return text


def _require_keys_once(mapping: Any) -> None:
    lines: dict[str, int] = {}
    for key, _ in mapping.value:
        if key.tag == _MERGE or not isinstance(key.value, str):
            continue
        line = key.start_mark.line + 1
        if key.value in lines:
            raise ValueError(
                f"got the key {key.value!r} twice, in lines {lines[key.value]} and {line}, needs"
                " it once"
            )
        lines[key.value] = line


def _parsed(path: str, values: dict[str, Any], words: Set[str]) -> tuple[Settings, Any]:
    """The dataclasses of all values; keys in `words` are not blamed on the file."""
    from transformers import HfArgumentParser, TrainingArguments

    def blamed(said: str) -> UserError:
        place = "command line" if said.partition(":")[0] in words else path
        return UserError(f"{place}: {said}")

    class Parser(HfArgumentParser):
        def error(self, message: str) -> Any:
            raise blamed(_ARGUMENT.sub(r"\1:", message))

    parser = Parser((Settings, TrainingArguments))
    known = {action.dest for action in parser._actions} - {"help"}
    for name in values:
        if name not in known:
            place = "command line" if name in words else path
            raise UserError(f"{place}: unknown key {name!r}{closest(str(name), known)}")
    own = {"remove_unused_columns": False, "label_names": [COMPLETION_MASK]}
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
        raise blamed(_with_key(str(error), of_training)) from error
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


def check_training(training: Any) -> None:
    """Raise where a value would end the training later, or be taken for another.

    Args:
        training: `transformers.TrainingArguments`.

    Raises:
        ValueError: a value does not fit; the message begins with its key.
    """
    for name in _COUNTS:
        require_count(name, getattr(training, name), low=1)
    for name in ("dataloader_num_workers", "seed"):
        require_count(name, getattr(training, name), low=0)
    for name in _NOT_NEGATIVE:
        require_number(name, getattr(training, name), low=0)
    for name in ("adam_beta1", "adam_beta2"):
        require_number(name, getattr(training, name), low=0, high=1, below=True)
    for name in _INTERVALS:
        if getattr(training, f"{name}_strategy") == "steps":
            require_number(f"{name}_steps", getattr(training, f"{name}_steps"), low=0, above=True)
    # The trainer takes any that is not positive for "as many as the epochs have".
    if training.max_steps != -1 and training.max_steps < 1:
        raise ValueError(
            f"max_steps: got {training.max_steps}, wanted an integer >= 1; leave it out to train"
            " num_train_epochs"
        )
    if training.max_steps == -1:
        require_number("num_train_epochs", training.num_train_epochs, low=0, above=True)
    _check_report_to(training)


def _check_report_to(training: Any) -> None:
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in training.report_to:
        require_choice("report_to", name, (*INTEGRATION_TO_CALLBACK, "none", "all"))
        if name not in ("none", "all", *get_available_reporting_integrations()):
            raise ValueError(
                f"report_to: got {name!r}, which is not installed: pip install {name}, or leave it"
                " out"
            )
