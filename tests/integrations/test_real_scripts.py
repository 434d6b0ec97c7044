"""Scripts of TRL's and of transformers' users, before and after two changed lines."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from data_tokenizer import WORDS, tiny_tokenizer
from tiny_models import pair_features, tiny_llama

from fused_prefopt.data import PairCollator
from fused_prefopt.reference import add_reference_logps

pytest.importorskip("trl")

ROOT = Path(__file__).resolve().parents[2]
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
import json, runpy, sys
for arguments in json.loads(sys.argv[1]):
    sys.argv = arguments
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


def run_scripts(folder: Path, commands: list[list[str]]) -> None:
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    env = {**os.environ, **offline, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DRIVER, json.dumps(commands)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]


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


@pytest.mark.slow
def test_trls_own_scripts_with_two_changed_lines(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    words = WORDS[6:]
    rows = [
        {
            "prompt": f"the {words[i % 7]}",
            "chosen": f" sat {words[i % 5]}",
            "rejected": f" {words[i % 3]} 2",
        }
        for i in range(16)
    ]
    points = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in rows
        for side in ("chosen", "rejected")
    ]
    given = {
        "model_name_or_path": tmp_path / "model",
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
    for name, data in (("dpo", rows), ("kto", points)):
        (tmp_path / name).mkdir()
        lines = "\n".join(json.dumps(row) for row in data)
        (tmp_path / name / "train.jsonl").write_text(lines)
        text = trl_script(name)
        for who, script in (("theirs", text), ("ours", changed(text, CHANGES[name]))):
            path = tmp_path / f"{name}_{who}.py"
            path.write_text(script, encoding="utf-8")
            options = given | {"dataset_name": tmp_path / name, "output_dir": path.with_suffix("")}
            flags = [str(each) for key, value in options.items() for each in (f"--{key}", value)]
            own = ["--log_tokens", "True"] if who == "ours" else []
            commands.append([str(path), *flags, *own])
    run_scripts(tmp_path, commands)
    for name in CHANGES:
        require_same(curves(tmp_path / f"{name}_theirs"), curves(tmp_path / f"{name}_ours"))


@pytest.mark.slow
def test_a_script_of_transformers_trainer_with_two_changed_lines(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    features = add_reference_logps(
        tiny_llama(7), pair_features(16), PairCollator(0), progress=False
    )
    torch.save(features, tmp_path / "features.pt")
    scripts = {
        "by_hand": BY_HAND,
        "attached": changed(BY_HAND, ATTACH),
        "subclass": changed(BY_HAND, SUBCLASS),
    }
    commands = []
    for name, text in scripts.items():
        path = tmp_path / f"{name}.py"
        path.write_text(text, encoding="utf-8")
        places = (path, tmp_path / "model", tmp_path / "features.pt", tmp_path / name)
        commands.append([str(place) for place in places])
    run_scripts(tmp_path, commands)
    theirs = curves(tmp_path / "by_hand")
    for name in ("attached", "subclass"):
        ours = curves(tmp_path / name)
        require_same(theirs, ours)
        assert "rewards/margins" in ours
