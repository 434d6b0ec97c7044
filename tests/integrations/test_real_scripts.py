"""Scripts of TRL's and of transformers' users, before and after two changed lines."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from data_tokenizer import tiny_tokenizer
from tiny_models import tiny_llama
from trainers import TEXT, child_environment, pairs_with_reference

pytest.importorskip("trl")
pytestmark = pytest.mark.slow

STEPS = 6
OURS = "from fused_prefopt.integrations.trl import"
# The script's name, then what each of the two changed lines begins with before and after.
CHANGES = {
    "dpo": (
        ("from trl import DPOTrainer,", f"{OURS} FusedDPOTrainer as DPOTrainer; from trl import"),
        (
            "from trl import DatasetMixtureConfig, DPOConfig,",
            f"{OURS} FusedDPOConfig as DPOConfig; from trl import DatasetMixtureConfig,",
        ),
    ),
    "kto": (
        ("from trl import KTOTrainer,", f"{OURS} FusedKTOTrainer as KTOTrainer; from trl import"),
        (
            "from trl import DatasetMixtureConfig, KTOConfig,",
            f"{OURS} FusedKTOConfig as KTOConfig; from trl import DatasetMixtureConfig,",
        ),
    ),
}
# DPO written by hand on transformers' Trainer: full logits, reference columns in the data.
BY_HAND = """
import sys
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from fused_prefopt.data import PairCollator

class ByHand(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids, mask = inputs["input_ids"], inputs["completion_mask"][:, 1:]
        logits = model(input_ids=ids, attention_mask=inputs["attention_mask"]).logits[:, :-1]
        logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        reference = torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]])
        chosen, rejected = ((logps * mask).sum(1) - reference).chunk(2)
        return -logsigmoid(0.1 * (chosen - rejected)).mean()

trainer = ByHand(
    model=AutoModelForCausalLM.from_pretrained(sys.argv[1]),
    args=TrainingArguments(
        output_dir=sys.argv[3], max_steps=6, logging_steps=1, save_steps=6, use_cpu=True,
        learning_rate=1e-3, report_to="none", remove_unused_columns=False,
        per_device_train_batch_size=4, label_names=["completion_mask"], disable_tqdm=True,
    ),
    data_collator=PairCollator(0),
    train_dataset=torch.load(sys.argv[2]),
)
trainer.train()
"""
ATTACH = (
    ("trainer = ByHand(", "trainer = Trainer("),
    (
        "trainer.train()",
        "import fused_prefopt as fp; from fused_prefopt.integrations.transformers import attach\n"
        "attach(trainer, fp.PreferenceLoss('dpo')); trainer.train()",
    ),
)
SUBCLASS = (
    (
        "from fused_prefopt.data import PairCollator",
        "import fused_prefopt as fp; from fused_prefopt.data import PairCollator; "
        "from fused_prefopt.integrations.transformers import PreferenceTrainer",
    ),
    ("trainer = ByHand(", "trainer = PreferenceTrainer(loss_fn=fp.PreferenceLoss('dpo'),"),
)
# One interpreter for all scripts: each is run as `__main__`, with its own arguments.
DRIVER = """
import gc, json, runpy, sys
for arguments in json.loads(sys.argv[1]):
    sys.argv = arguments
    gc.freeze()  # every training collects
    runpy.run_path(arguments[0], run_name="__main__")
"""


def changed(text: str, changes: tuple[tuple[str, str], ...]) -> str:
    """The script with its two lines changed, each of which it has once."""
    for before, after in changes:
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    return text


def trl_script(name: str) -> str:
    """Source text of one of TRL's own scripts, as installed."""
    spec = importlib.util.find_spec(f"trl.scripts.{name}")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


def curves(folder: Path) -> dict[str, list[float]]:
    """What a run's last checkpoint says was logged at each step."""
    state = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    rows = [row for row in state["log_history"] if "loss" in row]
    assert len(rows) == STEPS
    return {name: [row[name] for row in rows] for name in rows[0] if name in rows[-1]}


def require_same(theirs: dict[str, list[float]], ours: dict[str, list[float]]) -> None:
    """Every metric that the first script logs, the changed one logs with the same values."""
    assert theirs.keys() <= ours.keys()
    assert len(set(theirs["loss"])) == STEPS
    for name, values in theirs.items():
        assert ours[name] == pytest.approx(values, rel=1e-4, abs=1e-4), name


def trl_commands(folder: Path) -> list[list[str]]:
    """TRL's two scripts and ours of them, written into the folder, with their arguments."""
    pairs = [
        {"prompt": f"the {TEXT[i % 7]}"}
        | {"chosen": f" sat {TEXT[i % 5]}", "rejected": f" {TEXT[i % 3]} 2"}
        for i in range(16)
    ]
    points = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in pairs
        for side in ("chosen", "rejected")
    ]
    given = {
        "model_name_or_path": folder / "model",
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_steps": STEPS,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "dtype": "float32",
    }
    commands = []
    for name, data in (("dpo", pairs), ("kto", points)):
        (folder / name).mkdir()
        lines = "\n".join(json.dumps(row) for row in data)
        (folder / name / "train.jsonl").write_text(lines)
        text = trl_script(name)
        for who, script in (("theirs", text), ("ours", changed(text, CHANGES[name]))):
            path = folder / f"{name}_{who}.py"
            path.write_text(script, encoding="utf-8")
            options = given | {"dataset_name": folder / name, "output_dir": path.with_suffix("")}
            flags = [str(each) for key, value in options.items() for each in (f"--{key}", value)]
            own = ["--log_tokens", "True"] if who == "ours" else []
            commands.append([str(path), *flags, *own])
    return commands


def transformers_commands(folder: Path) -> list[list[str]]:
    """The trainer by hand and ours of it."""
    torch.save(pairs_with_reference(16), folder / "features.pt")
    scripts = {
        "by_hand": BY_HAND,
        "attached": changed(BY_HAND, ATTACH),
        "subclass": changed(BY_HAND, SUBCLASS),
    }
    for name, text in scripts.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    return [
        [str(folder / each) for each in (f"{name}.py", "model", "features.pt", name)]
        for name in scripts
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder in which one interpreter has run all scripts."""
    folder = tmp_path_factory.mktemp("scripts")
    for each in (tiny_llama(), tiny_tokenizer()):
        each.save_pretrained(folder / "model")
    commands = trl_commands(folder) + transformers_commands(folder)
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    env = child_environment(**offline)
    command = [sys.executable, "-c", DRIVER, json.dumps(commands)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("name", CHANGES)
def test_trls_own_scripts_with_two_changed_lines(trained, name):
    require_same(curves(trained / f"{name}_theirs"), curves(trained / f"{name}_ours"))


@pytest.mark.parametrize("name", ["attached", "subclass"])
def test_a_script_of_transformers_trainer_with_two_changed_lines(trained, name):
    ours = curves(trained / name)
    require_same(curves(trained / "by_hand"), ours)
    assert "rewards/margins" in ours
