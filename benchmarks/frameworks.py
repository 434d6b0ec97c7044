"""Peak memory of whole trainings by other frameworks' own commands: their DPO beside this one.

Each runs in the environment that `make frameworks` has made for it below `.compat`, on a random
Llama whose logits dominate. The peak is the resident memory of its process. The same training with
completions of a few tokens shows what of it is imports, weights and the optimizer's state.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.results import RESULTS, ROOT, Results, Row

ENVIRONMENTS = ROOT.parent / ".compat"
# Vocabulary and width of the model, pairs of a batch, and tokens of a sequence at most.
VOCAB, HIDDEN, PAIRS, LENGTH = 32768, 64, 2, 512
# Times that seven letters, a token each, stand in a completion: nearly `LENGTH` with what templates
# add, and few.
_WORDS, _FEW = 62, 2
OWN, HERE, HERE_8 = "its own loss", "here", "here, workspace_mb=8"
# The options of this package, None where its loss is not asked for.
OPTIONS: dict[str, dict[str, Any] | None] = {OWN: None, HERE: {}, HERE_8: {"workspace_mb": 8}}
STEPS = 2
# Runs a command, and prints the peak of its resident memory in KiB as its last line.
_PEAK = (
    "import resource, subprocess, sys;"
    "status = subprocess.run(sys.argv[1:]).returncode;"
    "print('peak', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss);"
    "sys.exit(status)"
)
_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "AXOLOTL_DO_NOT_TRACK": "1",
    "TRACKIO_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Framework:
    """A framework, and how its command is told what to train.

    Attributes:
        name: of its environment.
        title: how it calls itself.
        package: whose version counts.
        command: folder of the inputs, options of this package or None → the words behind Python's.
        on_path: folders beside this repository on Python's path.
    """

    name: str
    title: str
    package: str
    command: Callable[[Path, Mapping[str, Any] | None], list[str]]
    on_path: tuple[Path, ...] = ()

    @property
    def python(self) -> Path:
        """Of its environment."""
        return ENVIRONMENTS / self.name / "bin" / "python"


def _axolotl(folder: Path, options: Mapping[str, Any] | None) -> list[str]:
    config = {
        "base_model": str(folder / "model"),
        "rl": "dpo",
        "rl_beta": 0.1,
        "datasets": [{"path": str(folder / "pairs.jsonl"), "ds_type": "json", "split": "train"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "dataset_num_proc": 1,
        "sequence_len": LENGTH,
        "output_dir": str(folder / "out"),
        "micro_batch_size": PAIRS,
        "gradient_accumulation_steps": 1,
        "max_steps": STEPS,
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": 5e-5,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "bf16": False,
    }
    if options is not None:
        config["plugins"] = ["fused_prefopt.integrations.axolotl.FusedPlugin"]
        config["fused_prefopt"] = dict(options)
    return ["-m", "axolotl.cli.train", _written(folder / "dpo.yaml", config)]


def _llamafactory(folder: Path, options: Mapping[str, Any] | None) -> list[str]:
    columns = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
    data = {"pairs": {"file_name": "pairs.jsonl", "ranking": True, "columns": columns}}
    _written(folder / "dataset_info.json", data)
    config: dict[str, Any] = {
        "model_name_or_path": str(folder / "model"),
        "ref_model": str(folder / "model"),
        "stage": "dpo",
        "do_train": True,
        "finetuning_type": "full",
        "pref_loss": "sigmoid",
        "dataset": "pairs",
        "dataset_dir": str(folder),
        "template": "default",
        "cutoff_len": LENGTH,
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": PAIRS,
        "max_steps": STEPS,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
    }
    if options is None:
        return ["-m", "llamafactory.cli", "train", _written(folder / "dpo.yaml", config)]
    config["fused_prefopt"] = dict(options)
    written = _written(folder / "dpo.yaml", config)
    return ["-m", "fused_prefopt", "llamafactory", "train", written]


def _ms_swift(folder: Path, options: Mapping[str, Any] | None) -> list[str]:
    config: dict[str, Any] = {
        "rlhf_type": "dpo",
        "tuner_type": "full",
        "model": str(folder / "model"),
        "model_type": "llama",
        "template": "default",
        "check_model": False,
        "use_hf": True,
        "torch_dtype": "float32",
        "dataset": [str(folder / "messages.jsonl")],
        "load_from_cache_file": False,
        "split_dataset_ratio": 0,
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
        "max_length": LENGTH,
        "output_dir": str(folder / "out"),
        "add_version": False,
        "per_device_train_batch_size": PAIRS,
        "gradient_accumulation_steps": 1,
        "max_steps": STEPS,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }
    if options is not None:
        plugin = ROOT.parent / "examples" / "frameworks" / "ms_swift_plugin.py"
        config["external_plugins"] = [str(plugin)]
        config["model_kwargs"] = {"fused_prefopt": dict(options)}
    return ["-m", "swift.cli.main", "rlhf", _written(folder / "dpo.yaml", config)]


_STAND_INS = ROOT.parent / "tests" / "frameworks" / "stand_ins"
FRAMEWORKS = (
    Framework("axolotl", "Axolotl", "axolotl", _axolotl),
    Framework("llamafactory", "LLaMA-Factory", "llamafactory", _llamafactory, (_STAND_INS,)),
    Framework("ms-swift", "ms-swift", "ms-swift", _ms_swift),
)


def run_frameworks(folder: Path = RESULTS / "cpu", say: Callable[[str], None] = print) -> None:
    """Measure every framework whose environment is there, with each of `OPTIONS`."""
    results = Results(folder / "frameworks.json", "framework")
    for framework in FRAMEWORKS:
        for candidate, options in OPTIONS.items():
            row = measured(framework, candidate, options)
            results.put(row)
            say(f"{framework.title}: {candidate}: {row['status']}, {row['peak_bytes']} bytes")


def measured(framework: Framework, candidate: str, options: Mapping[str, Any] | None) -> Row:
    """A row of one training, and of the same one with short completions."""
    row: Row = {
        "candidate": candidate,
        "framework": framework.title,
        "version": "",
        # With the candidate the key of a row.
        "shape": framework.name,
        "pairs": PAIRS,
        "length": LENGTH,
        "hidden_size": HIDDEN,
        "vocab": VOCAB,
        "dtype": "fp32",
        "losses": [],
        **dict.fromkeys(("peak_bytes", "short_peak_bytes")),
    }
    if not framework.python.exists():
        return row | {"status": "unavailable: `make frameworks` has not been run"}
    row["version"] = _version(framework)
    try:
        row["peak_bytes"], row["losses"] = _trained(framework, _WORDS, options)
        row["short_peak_bytes"], _ = _trained(framework, _FEW, options)
    except ChildProcessError as error:
        return row | {"status": f"failed: {error}"}
    return row | {"status": "ok"}


def _trained(
    framework: Framework, words: int, options: Mapping[str, Any] | None
) -> tuple[int, list[float]]:
    """Peak in bytes, and the losses that it has logged, of completions of so many words."""
    # Only here: the other commands do without transformers.
    from benchmarks.framework_inputs import write_model, write_rows

    with TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model", vocab=VOCAB, hidden=HIDDEN)
        row = {"prompt": "a", "chosen": "mat on " * words, "rejected": "red or " * words}
        rows = [row] * (2 * PAIRS)
        write_rows(folder / "pairs.jsonl", rows)
        write_rows(folder / "messages.jsonl", [_messages(row) for row in rows])
        path = os.pathsep.join(map(str, (ROOT.parent, *framework.on_path)))
        done = subprocess.run(
            [sys.executable, "-c", _PEAK, str(framework.python)]
            + framework.command(folder, options),
            env=os.environ | _QUIET | {"PYTHONPATH": path},
            cwd=folder,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise ChildProcessError(f"exit {done.returncode}: {_last_line(done.stderr)}")
    peak = re.findall(r"^peak (\d+)$", done.stdout, re.MULTILINE)[-1]
    losses = re.findall(r"'loss': '?([\d.e+-]+)", done.stdout + done.stderr)
    return int(peak) * 1024, [float(loss) for loss in losses[:STEPS]]


def _messages(row: Mapping[str, str]) -> Row:
    question = {"role": "user", "content": row["prompt"]}
    answer = {"role": "assistant", "content": row["chosen"]}
    return {"messages": [question, answer], "rejected_response": row["rejected"]}


def _last_line(text: str) -> str:
    """Without words that may be paths."""
    line = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    return " ".join(word for word in line.split() if "/" not in word)[:120]


def _version(framework: Framework) -> str:
    code = "import importlib.metadata as it, sys; print(it.version(sys.argv[1]))"
    command = [str(framework.python), "-c", code, framework.package]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _written(path: Path, content: Mapping[str, Any]) -> str:
    # JSON is YAML.
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)
