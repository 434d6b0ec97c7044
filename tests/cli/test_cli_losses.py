"""`losses`: the table, one loss in full, a published setting, wrong names."""

from __future__ import annotations

import pytest

from fused_prefopt.cli.losses import losses_table, one_loss
from fused_prefopt.cli.main import main
from fused_prefopt.losses import available_losses, find, published_settings


def test_the_table_has_every_loss_and_fits_100_columns(capsys):
    assert main(["losses"]) == 0
    text = capsys.readouterr().out
    assert text == f"{losses_table()}\n"
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


@pytest.mark.parametrize("name", available_losses())
def test_one_loss_has_its_formula_needs_and_every_hyperparameter(name):
    text, info = one_loss(name), available_losses()[name]
    assert max(map(len, text.splitlines())) <= 100
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


@pytest.mark.parametrize("name", published_settings())
def test_a_published_setting_shows_its_values(name, capsys):
    setting = published_settings()[name]
    assert main(["losses", name.upper().replace("-", "_", 1)]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.split()}
    for option, value in setting.hyperparameters.items():
        assert rows[option][0] == repr(value)
    if setting.hyperparameters:
        assert "published" in rows["hyperparameter"]
    assert f"{setting.learning_rate:g}" in rows[name]


def test_a_wrong_loss_gets_the_closest_names(capsys):
    def problem(name: str) -> str:
        assert main(["losses", name]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        return said.err

    count = len(available_losses())
    said = problem("gama-simpo")
    assert said.startswith("fused-prefopt: losses: unknown loss 'gama-simpo'")
    assert "did you mean 'gamma-simpo'" in said and "'dpo'" not in said
    assert said.endswith(f"; `fused-prefopt losses` lists all {count}\n")
    wanted = f"unknown loss 'xyz'; `fused-prefopt losses` lists all {count}"
    assert problem("xyz") == f"fused-prefopt: losses: {wanted}\n"
    said = problem("alpha-dpo/gemma")
    assert "unknown setting 'alpha-dpo/gemma' (did you mean 'alpha-dpo/gemma-2-9b-it'" in said
    names = ", ".join(sorted({each.loss for each in published_settings().values()}))
    assert f"; `fused-prefopt losses NAME` lists those of {names}\n" in said


def test_a_sum_shows_its_terms(capsys):
    assert main(["losses", f"0.5 DPO + {next(iter(published_settings()))} + sft"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    loss = next(iter(published_settings().values()))
    assert text.startswith(f"0.5 dpo + {loss.loss} + sft\n")
    rows = [line.split() for line in text.splitlines()]
    assert ["dpo", "0.5"] in [row[:2] for row in rows] and ["sft", "1", "NLL"] in rows
    for option, value in loss.hyperparameters.items():
        assert [loss.loss, option, repr(value)] in rows
    assert "needs   reference: " in text and "spans   the batch" in text


def test_a_sum_without_quotes_is_told_so(capsys):
    assert main(["losses", "dpo", "+", "sft"]) == 2
    assert capsys.readouterr().err.endswith("got + sft, needs nothing more; put a sum in quotes\n")
