"""`fused-prefopt llamafactory` before LLaMA-Factory is there, or where other code would train."""

from __future__ import annotations

import pytest

from fused_prefopt import checks
from fused_prefopt.cli import llamafactory
from fused_prefopt.cli.main import main


def test_without_the_package_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    assert main(["llamafactory", "train", "x.yaml", "--pref_loss", "alpha-dpo"]) == 2
    wanted = "fused-prefopt: llamafactory needs llamafactory: pip install llamafactory==0.9.5\n"
    assert capsys.readouterr().err == wanted


@pytest.mark.parametrize(
    ("words", "name", "message"),
    [
        (["webui"], "", "llamafactory: got webui, which starts `llamafactory-cli train`"),
        (["train", "x.yaml"], "USE_V1", "USE_V1: got true, under which other code trains; needs"),
        (["train", "x.yaml"], "USE_MCA", "USE_MCA: got true, under which other code trains; needs"),
        (["train", "x.yaml"], "USE_RAY", "USE_RAY: got true, under which other code trains; needs"),
    ],
)
def test_what_would_train_without_this_package_is_refused(
    words, name, message, monkeypatch, capsys
):
    monkeypatch.setattr(llamafactory, "require_packages", lambda *_: None)
    if name:
        monkeypatch.setenv(name, "true")
    assert main(["llamafactory", *words]) == 2
    assert capsys.readouterr().err.startswith(f"fused-prefopt: {message}")
