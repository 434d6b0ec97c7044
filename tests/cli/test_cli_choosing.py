"""`losses --for`: what a data set of each form allows, what it costs, what it lacks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from command_line_jobs import pairs, write_lines

from fused_prefopt.cli import choosing, task
from fused_prefopt.cli.main import main
from fused_prefopt.losses import available_losses, find, registry, rewards
from fused_prefopt.losses.pairwise import PairwiseLoss
from fused_prefopt.losses.registry import register

pytest.importorskip("datasets")
GOLDEN = Path(__file__).parents[1] / "golden" / "losses_for"
# A few of each kind, so that new losses leave the texts in GOLDEN as they are.
FEW = (
    *("aot", "cpo", "dpo", "dro", "epsilon-dpo", "gamma-simpo", "kto", "lipo-lambda", "odpo"),
    *("simpo", "tdpo2", "wpo"),
)
SCORES = [
    {"score_chosen": 3.0, "score_rejected": 1.0},
    {"score_chosen": 2.0, "score_rejected": 2.0},
    {"score_chosen": 1.0, "score_rejected": 2.0},
]
SCORED = [row | scores for row, scores in zip(pairs(3), SCORES, strict=True)]
# Two prompts, the completions of one of which are all as good.
RATED = [
    {"prompt": "the cat", "completion": f"sat on {place}", "score": score, "group": group}
    for group, scores in ((7, (0.5, 0.25, 1.0)), (8, (1.0, 1.0)))
    for place, score in enumerate(scores)
]
LABELLED = [{"prompt": "the cat", "completion": text, "label": True} for text in "ab"]
# Lists of 2 + 0 + 6 pairs.
LISTS = [
    {
        "prompt": "the cat",
        "completions": [f"sat on {i}" for i in range(len(scores))],
        "scores": scores,
    }
    for scores in ([0.5, 0.5, 1.0], [1.0, 1.0], [1.0, 2.0, 3.0, 4.0])
]
FORMS = {
    "pairs": [row | {"id": 1} for row in pairs(3)],
    "scored_pairs": SCORED,
    "weighted_pairs": [row | {"weight": 0.5} for row in pairs(2)],
    "rated_completions": RATED,
    "labelled_completions": LABELLED,
    "lists": LISTS,
}


@pytest.fixture
def said(material, tmp_path, capsys) -> Callable[..., str]:
    """What ``losses … --for`` a file of rows says; the file is FILE in it."""

    def run(rows: list[dict], *words: str, status: int = 0) -> str:
        file = write_lines(tmp_path / "rows.jsonl", rows)
        capsys.readouterr()
        assert main(["losses", "--for", file, *words]) == status
        out, err = capsys.readouterr()
        assert bool(out) is not bool(status)
        text = (err if status else out).replace(file, "FILE")
        assert status or max(map(len, text.splitlines())) <= 100
        return text

    return run


@pytest.mark.parametrize("form", FORMS)
def test_each_form_allows_what_is_written_down(said, monkeypatch, form):
    monkeypatch.setattr(choosing, "available_losses", lambda: dict.fromkeys(FEW))
    assert said(FORMS[form]) == (GOLDEN / f"{form}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("form", FORMS)
def test_every_loss_is_allowed_or_not(said, form):
    # Of labelled completions one is given as an example, too.
    words = said(FORMS[form]).replace("such as kto", "").replace(",", " ").split()
    assert [name for name in available_losses() if words.count(name) != 1] == []


def test_a_loss_that_is_registered_shows_up(said, monkeypatch):
    for names in ("_SPECS", "_NAMES"):
        monkeypatch.setattr(registry, names, dict(getattr(registry, names)))

    @register("toy-loss", paper="Me 2027")
    def toy_loss(*, beta: float = 0.5) -> PairwiseLoss:
        """``−log σ(m)``."""
        return PairwiseLoss(rewards.LogRatio(beta=beta))

    monkeypatch.setattr(choosing, "available_losses", lambda: {"toy-loss": find("toy-loss").info()})
    (row,) = [line for line in said(pairs(2)).splitlines() if line.startswith("toy-loss")]
    assert row.split("  ")[0] == "toy-loss" and "reference: model" in row and "3 to 4" in row


def test_one_loss_or_sum_fits_or_is_refused(said):
    assert "\nodpo  reference: model;" in said(SCORED, "odpo")
    assert "\ndpo + 0.2 sft  reference: model" in said(pairs(2), "DPO + 0.2 sft")
    assert "\nalpha-dpo  reference: model" in said(pairs(2), "alpha-dpo/gemma-2-9b-it")
    assert said(pairs(2), "odpo", status=2) == (
        "fused-prefopt: --for: got FILE: read as preference pairs (adapter preference), 2 rows, but"
        " odpo needs columns score_chosen and score_rejected; `fused-prefopt losses --for FILE`"
        " lists the losses that it allows\n"
    )
    assert "unknown loss 'simpoo' (did you mean 'simpo'" in said(pairs(2), "simpoo", status=2)


@pytest.mark.parametrize(
    ("rows", "caution"),
    [
        (
            [SCORED[0], pairs(2)[1]],
            "caution: preference: dropped all scores, 1 of 2 pairs lack them\n"
            "caution: score_chosen: 1 of 2 rows are without\n"
            "caution: score_rejected: 1 of 2 rows are without\n",
        ),
        (
            [*pairs(2), {"prompt": "the", "chosen": "cat", "rejected": "cat"}],
            "3 rows\ncaution: preference: dropped 1 unusable pairs\n",
        ),
        (
            [RATED[0], RATED[1], RATED[2] | {"score": None}],
            "caution: score: 1 of 3 rows are without\n",
        ),
    ],
)
def test_rows_that_would_hurt_are_told(said, rows, caution):
    assert caution in said(rows)


def test_half_a_column_is_told_with_its_rows(said):
    text = said([*LABELLED, LABELLED[0] | {"label": None}])
    assert "got some rows without, needs one in each" in " ".join(text.split())
    text = said([row | {"group": None} for row in RATED[:2]] + RATED[2:3])
    assert "not all with group" in text
    text = said([RATED[0], {**RATED[1], "score": None}], "dro", status=2)
    assert "but dro needs column reward or score or rating; 1 of 2 rows are without" in text
    text = said([row | {"weight": 0} for row in pairs(2)], "dpo", status=2)
    assert "but dpo needs a 'weight' above 0 in some row" in text


def test_embedded_text_is_pairs_and_rated_completions(monkeypatch, capsys):
    made = {"load_documents": (), "split_documents": ((), ())}
    rated = [row | {"reward": row["score"]} for row in RATED]
    made |= {"make_pairs": SCORED[:1], "make_points": rated}
    for name, value in made.items():
        monkeypatch.setattr(task, name, lambda *_, value=value, **__: value)
    assert main(["losses", "--for", "embedded"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("embedded: text of the package, as pairs or as rated completions\n")
    assert "\npairs: 1, the rows\n" in text
    assert "\nrated completions: 5, texts and spoilt ones, rated by how much they are\n" in text


def test_the_adapter_split_and_limit_are_those_of_the_words(material, capsys, tmp_path):
    file = write_lines(tmp_path / "both.jsonl", [row | {"completion": "x"} for row in pairs(4)])
    words = ["losses", "dpo", "--for", file, "--adapter", "preference", "--limit", "2"]
    assert main([*words, "--split", "train[1:]"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{file}: read by adapter preference; columns not read: 'completion'\n")
    assert "\n2 rows\n\npairs: 2, the rows\n" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--for", "FOLDER/none.jsonl"], "--for: got FOLDER/none.jsonl: Unable to find"),
        (["--for", "FOLDER/none"], "--for: got FOLDER/none: Couldn't find any data file"),
        (["--for", "FOLDER/bad.jsonl"], "--for: cannot read FOLDER/bad.jsonl: JSON parse error"),
        (["--for", "FOLDER/odd.jsonl"], "--for: columns: got 'text', which no adapter reads"),
        (["--for", "FOLDER/empty.jsonl"], "--for: got no usable row in FOLDER/empty.jsonl"),
        (["--for", "FOLDER/odd.jsonl", "--limit", "0"], "--limit: got 0, wanted an integer >= 1"),
        (["--for", "FOLDER/odd.jsonl", "--adapter", "x"], "--for: adapter: got 'x', wanted one of"),
        (["dpo", "--split", "test"], "--split: got 'test' alone, needs --for DATA"),
    ],
)
def test_what_cannot_be_read_is_told(tmp_path, capsys, words, message):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"\nx')
    (tmp_path / "empty.jsonl").write_text("")
    write_lines(tmp_path / "odd.jsonl", [{"text": "a"}])
    assert main(["losses", *(word.replace("FOLDER", str(tmp_path)) for word in words)]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert f"fused-prefopt: {message.replace('FOLDER', str(tmp_path))}" in err
