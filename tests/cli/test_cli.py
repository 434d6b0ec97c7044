"""The command line: its commands, what `losses` says, exit statuses, messages."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import fields
from importlib.metadata import EntryPoint

import pytest
from bare_cli import ROOT, bare

from fused_prefopt.cli import main
from fused_prefopt.command_line.settings import Settings
from fused_prefopt.losses import available_losses, find, published_settings

COMMANDS = ("train", "reference", "report", "losses", "doctor", "tune")


def said(capsys, *words: str, status: int = 0) -> tuple[str, str]:
    assert main(list(words)) == status
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_help_names_every_command_and_the_exit_statuses(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert f"\n    {command}" in text
    said = " ".join(text.split())
    for status in ("0 done;", "1 a finding of doctor", "2 something to put right", "130 interrupt"):
        assert status in said.partition("Exit status: ")[2], status


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(capsys, command):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: fused-prefopt {command} ")


@pytest.mark.parametrize("command", ["train", "reference"])
def test_help_lists_every_key_of_a_configuration(capsys, command):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
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


def test_losses_is_a_table_of_every_loss_that_fits_100_columns(capsys):
    text, _ = said(capsys, "losses")
    heading, _, *lines = text.partition("\n\n")[0].splitlines()
    assert max(map(len, text.splitlines())) <= 100
    assert heading.split() == ["loss", "judges", "needs", "hyperparameters"]
    starts = [heading.index(word) for word in heading.split()]
    rows: list[list[str]] = []
    for line in lines:
        cells = [line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]
        if cells[0]:
            rows.append(cells)
        else:  # goes on from the line above
            rows[-1] = [" ".join(filter(None, both)) for both in zip(rows[-1], cells, strict=True)]
    assert [row[0] for row in rows] == list(available_losses())
    for row, (name, info) in zip(rows, available_losses().items(), strict=True):
        assert row[1] == ("pairs" if info.pairwise else "completions"), name
        assert row[2] == (", ".join(info.needs) or "-"), name
        options = ", ".join(f"{k}={v!r}" for k, v in info.defaults.items()) or "-"
        begun = row[3].removesuffix(" …")
        assert options.startswith(begun) and (begun == options or len(begun) > 50), name


@pytest.mark.parametrize("name", [*available_losses(), *published_settings()])
def test_one_loss_fits_100_columns(capsys, name):
    text, _ = said(capsys, "losses", name)
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("name", available_losses())
def test_one_loss_has_its_formula_needs_and_every_hyperparameter(capsys, name):
    text, _ = said(capsys, "losses", name)
    info = available_losses()[name]
    assert text.splitlines()[1] == info.paper
    documented = find(name).factory.__doc__
    assert documented is not None
    first = documented.strip().split("``")[1].split("``")[0].split("\n")[0]
    assert first in text
    for field in info.needs:
        assert f"\nneeds   {field}: " in text
    for option, default in info.defaults.items():
        assert any(
            line.split()[:1] == [option] and repr(default) in line for line in text.splitlines()
        )


def test_a_published_setting_shows_its_values(capsys):
    text, _ = said(capsys, "losses", "Gamma_SimPO/qwen2.5-7b-instruct")
    setting = published_settings()["gamma-simpo/qwen2.5-7b-instruct"]
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.split()}
    for option, value in setting.hyperparameters.items():
        assert rows[option][0] == repr(value)
    assert "published" in rows["hyperparameter"]
    assert f"{setting.learning_rate:g}" in rows["gamma-simpo/qwen2.5-7b-instruct"]


def test_a_wrong_loss_gets_the_closest_names(capsys):
    text, problem = said(capsys, "losses", "gama-simpo", status=2)
    assert text == "" and problem.startswith("fused-prefopt: losses: unknown loss 'gama-simpo'")
    assert "did you mean 'gamma-simpo'" in problem and "'dpo'" not in problem
    count = len(available_losses())
    assert problem.endswith(f"; `fused-prefopt losses` lists all {count}\n")
    _, problem = said(capsys, "losses", "xyz", status=2)
    wanted = f"unknown loss 'xyz'; `fused-prefopt losses` lists all {count}"
    assert problem == f"fused-prefopt: losses: {wanted}\n"
    _, problem = said(capsys, "losses", "alpha-dpo/gemma", status=2)
    assert "unknown setting 'alpha-dpo/gemma' (did you mean 'alpha-dpo/gemma-2-9b-it'" in problem
    assert "`fused-prefopt losses gamma-simpo` list all" in problem


def test_the_doctor_lists_packages_and_refuses_a_device_that_is_not_there(capsys):
    import transformers

    text, _ = said(capsys, "doctor", "--device", "cpu")
    assert f"transformers {transformers.__version__}" in text
    text, problem = said(capsys, "doctor", "--device", "tpu:9", status=2)
    assert text == "" and "--device: got 'tpu:9'" in problem


@pytest.mark.parametrize("words", ["losses dpo", "losses", "losses --help"])
def test_a_reader_that_reads_nothing_ends_it_quietly(words):
    done = subprocess.run(
        f"set -o pipefail; {sys.executable} -m fused_prefopt {words} | true",
        shell=True,
        executable="/bin/bash",
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode in (0, 141) and done.stdout == done.stderr == ""


def test_a_broken_pipe_that_is_not_the_outputs_is_an_error(monkeypatch, capsys):
    from fused_prefopt.command_line import losses

    def broken() -> str:
        raise BrokenPipeError("of a worker")

    monkeypatch.setattr(losses, "losses_table", broken)
    with pytest.raises(BrokenPipeError, match="of a worker"):
        main(["losses"])


def test_losses_and_the_doctor_need_torch_alone():
    done = bare('main(["losses", "kto"]); print(main(["losses"]), main(["doctor"]))')
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("kto\n") and done.stdout.endswith("\n0 0\n")


def test_python_m_runs_the_same_program():
    done = subprocess.run(
        [sys.executable, "-m", "fused_prefopt", "losses", "nothing"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("fused-prefopt: losses: unknown loss 'nothing'")


def test_the_installed_script_is_the_same_program():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (target,) = re.findall(r'(?m)^\[project.scripts\]\nfused-prefopt = "(.*)"$', project)
    assert EntryPoint("fused-prefopt", target, "console_scripts").load() is main
