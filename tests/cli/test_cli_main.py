"""The command line: its commands, exit statuses and messages, what needs torch alone."""

from __future__ import annotations

import json
import os
import re
from dataclasses import fields
from importlib.metadata import EntryPoint

import pytest
from command_line_jobs import ROOT, bare, python

from fused_prefopt.cli import losses
from fused_prefopt.cli.config import Settings
from fused_prefopt.cli.main import main

COMMANDS = ("train", "reference", "report", "losses", "llamafactory", "hub", "doctor", "tune")


def help_of(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_help_names_every_command_and_the_exit_statuses(capsys):
    text = help_of(capsys)
    for command in COMMANDS:
        assert f"\n    {command}" in text
        assert help_of(capsys, command).startswith(f"usage: fused-prefopt {command} ")
    said = " ".join(text.split())
    for status in ("0 done;", "1 a finding of doctor", "2 something to put right", "130 interrupt"):
        assert status in said.partition("Exit status: ")[2], status


@pytest.mark.parametrize("command", ["train", "reference"])
def test_help_lists_every_key_of_a_configuration(capsys, command):
    text = help_of(capsys, command)
    for key in fields(Settings):
        assert re.search(rf"(?m)^  {key.name} +\S", text), key.name
    assert ("--resume" in text) == (command == "train")


def test_words_that_are_no_command_end_with_2(capsys):
    for words in ([], ["los"], ["tune"], ["losses", "--all"]):
        try:
            status = main(words)
        except SystemExit as stopped:
            status = stopped.code
        assert status == 2, words
        assert "Traceback" not in capsys.readouterr().err


def test_the_doctor_lists_packages_and_refuses_a_device_that_is_not_there(capsys):
    transformers = pytest.importorskip("transformers")
    assert main(["doctor", "--device", "cpu"]) == 0
    assert f"transformers {transformers.__version__}" in capsys.readouterr().out
    assert main(["doctor", "--device", "tpu:9"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "--device: got 'tpu:9'" in said.err


_UNREAD = """
import os
import sys

from fused_prefopt.cli.main import main

for words in (["losses", "dpo"], ["losses"], ["losses", "--help"]):
    unread, written = os.pipe()
    os.close(unread)
    child = os.fork()
    if not child:
        os.dup2(written, 1)
        sys.exit(main(words))
    os.close(written)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="wants processes that share a pipe")
def test_a_reader_that_leaves_ends_it_quietly():
    done = python("-c", _UNREAD)
    # argparse itself is silent where its help cannot be written.
    assert done.stderr == "" and done.stdout.split()[:2] == ["141"] * 2, done.stdout
    assert done.stdout.split()[2] in ("0", "141")


def test_a_broken_pipe_that_is_not_the_outputs_is_an_error(monkeypatch):
    def broken() -> str:
        raise BrokenPipeError("of a worker")

    monkeypatch.setattr(losses, "losses_table", broken)
    with pytest.raises(BrokenPipeError, match="of a worker"):
        main(["losses"])


def test_torch_alone_is_enough_but_for_training_and_pictures(tmp_path):
    state = {"global_step": 1, "log_history": [{"step": 1, "loss": 0.75}]}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    example = ROOT / "examples" / "train.yaml"
    done = bare(f"""
print(main(["losses", "kto"]), main(["losses"]), main(["doctor"]))
print(main(["report", {str(tmp_path)!r}]), main(["train", {str(example)!r}]))
""")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("kto\n") and "\n0 0 0\n" in done.stdout
    assert "0.75" in done.stdout and done.stdout.endswith("\n2 2\n")
    assert (tmp_path / "report" / "table.json").is_file()
    pictures, training = done.stderr.splitlines()
    assert 'drawing needs matplotlib: pip install "fused-prefopt[plots]"' in pictures
    missing = "training needs transformers, accelerate, omegaconf, safetensors: pip install"
    assert f'{missing} "fused-prefopt[trainers]"' in training


def test_python_m_and_the_installed_script_are_the_same_program():
    done = python("-m", "fused_prefopt", "losses", "nothing")
    assert done.returncode == 2
    assert done.stderr.startswith("fused-prefopt: losses: unknown loss 'nothing'")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (target,) = re.findall(r'(?m)^\[project.scripts\]\nfused-prefopt = "(.*)"$', project)
    assert EntryPoint("fused-prefopt", target, "console_scripts").load() is main
