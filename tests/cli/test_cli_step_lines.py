"""What a training prints: a short line a step on a terminal, everything elsewhere."""

from __future__ import annotations

import ast
import os
import re
import struct
import subprocess
import sys

import pytest
from bare_cli import ROOT
from command_line_jobs import log_of

from fused_prefopt.command_line.step_lines import step_line

pytest.importorskip("datasets")
pytest_plugins = ["command_line_fixtures"]
STEP = {"loss": 0.693147, "rewards/accuracies": 0.5, "rewards/margins": -0.01234, "grad_norm": 3.0}
STEP |= {"learning_rate": 5e-5, "epoch": 0.1, "nonfinite": 0.0}


@pytest.mark.parametrize(
    ("logs", "line"),
    [
        (STEP, "step   40  loss  0.6931  accuracy 0.500  margin  -0.0123  lr 5.00e-05"),
        (
            {"loss": 12.5, "learning_rate": 0.01, "kl": 3.0, "nonfinite": 2.0},
            "step   40  loss 12.5000  lr 1.00e-02  nonfinite 2",
        ),
        (
            {f"eval_{name}": value for name, value in STEP.items()},
            "held out   loss  0.6931  accuracy 0.500  margin  -0.0123",
        ),
        ({"train_runtime": 12.34, "train_loss": 0.5}, "trained to step 40 in 12.3 s"),
        ({"other": 1}, "{'other': 1}"),
    ],
)
def test_a_log_is_a_short_line(logs, line):
    assert step_line(logs, 40) == line


def test_lines_of_steps_and_evaluations_are_aligned():
    lines = [step_line(STEP, 7), step_line(STEP | {"loss": 10.0, "rewards/margins": 99.5}, 1234)]
    lines.append(step_line({f"eval_{name}": value for name, value in STEP.items()}, 7))
    for word in ("loss", "accuracy", "margin"):
        assert len({line.index(word) for line in lines}) == 1, word


def test_elsewhere_the_whole_log_is_printed(job, tmp_path, capsys):
    assert job("train") == 0
    printed = [
        ast.literal_eval(line)
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("{'loss'")
    ]
    assert [float(row["rewards/chosen"]) for row in printed] == pytest.approx(
        [row["rewards/chosen"] for row in log_of(tmp_path / "run")], rel=1e-3, abs=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize("bar", [True, False])
def test_a_terminal_gets_a_line_a_step_and_the_bar(job, tmp_path, monkeypatch, bar):
    fcntl, pty, termios = map(pytest.importorskip, ("fcntl", "pty", "termios"))
    with monkeypatch.context() as patch:
        patch.setattr("command_line_fixtures.main", lambda _: 0)
        job("train", disable_tqdm=not bar, max_steps=3)  # writes the file
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env |= {"HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    child = subprocess.Popen(
        [sys.executable, "-m", "fused_prefopt", "train", str(tmp_path / "job.yaml")],
        env=env,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    parts = []
    try:
        while part := os.read(ours, 65536):
            parts.append(part)
    except OSError:  # Linux's end of file
        pass
    os.close(ours)
    assert child.wait(timeout=60) == 0
    shown = b"".join(parts).decode()
    rows = log_of(tmp_path / "run")
    assert len(rows) == 3
    wanted = [step_line(row, number) for number, row in enumerate(rows, start=1)]
    found = re.findall(r"step +\d+  loss [^\r\n\x1b]*", shown)
    assert [line.rstrip() for line in found] == wanted
    assert max(map(len, found)) <= 80
    assert ("3/3" in shown) == bar and "rewards/chosen" not in shown
    assert {"rewards/chosen", "logps/rejected", "grad_norm"} <= rows[0].keys()
