"""Python blocks of the README and of all pages run as printed; files that pages name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from data_tokenizer import tiny_tokenizer
from tiny_models import VOCAB, pair_features, tiny_llama

import fused_prefopt as fp

datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parent.parent
# The recipe of a loss is followed by `test_recipe.py`, in a copy of the tree.
RECIPE = "@register("
BLOCKS = [
    pytest.param(code, id=f"{page.stem}-{number}")
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for number, code in enumerate(
        re.findall(r"(?ms)^```python\n(.*?)^```", page.read_text(encoding="utf-8"))
    )
    if not code.startswith(RECIPE)
]


def around(folder: Path) -> dict:
    """What a reader has before a block: a model, its batch, rows, a tokenizer."""
    model, ref_model, tokenizer = tiny_llama(), tiny_llama(seed=1), tiny_tokenizer()
    ids = torch.arange(4 * 9).reshape(4, 9) % VOCAB
    labels = ids.masked_fill(torch.arange(9) < 3, -100)
    texts = {
        "prompt": ["the cat", "the mat"] * 4,
        "chosen": [" sat on mat", " 1 2"] * 4,
        "rejected": [" on on the", " sat"] * 4,
    }
    judged = {
        "prompt": texts["prompt"],
        "completion": texts["chosen"],
        "label": [True, False] * 4,
    }
    hidden, head = model.model(ids).last_hidden_state, fp.LMHead.of(model)
    return {
        "fp": fp,
        "model": model,
        "ref_model": ref_model,
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "reference": torch.tensor([-9.0, -8.0, -9.5, -8.5]),
        "hidden": hidden,
        "ref_hidden": ref_model.model(ids).last_hidden_state,
        "head": head,
        "out": fp.sequence_logps(hidden, head, labels),
        "ref_head": fp.LMHead.of(ref_model),
        "groups": torch.tensor([0, 0, 1, 1]),
        "scores": torch.tensor([1.0, 0.5, 0.0, 2.0]),
        "rows": pair_features(6),
        "args": transformers.TrainingArguments(str(folder / "args"), report_to="none"),
        "dataset": datasets.Dataset.from_dict(texts),
        "judged": datasets.Dataset.from_dict(judged),
        "tokenizer": tokenizer,
    }


@pytest.mark.parametrize("code", BLOCKS)
def test_a_block_runs(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("trl")
    # TRL trains in bf16 unless told otherwise, and transformers then asks for a GPU.
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    names = around(tmp_path)
    exec(compile(code, "README", "exec"), names)
    if "backward()" in code:
        assert names["model"].lm_head.weight.grad.abs().sum() > 0
    if "trainer = " in code:
        trainer = names["trainer"]
        trainer.args.max_steps, trainer.args.save_strategy = 2, "no"
        before = names["model"].lm_head.weight.detach().clone()
        trainer.train()
        assert not torch.equal(before, names["model"].lm_head.weight)


PAGES = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
# Where a short form such as `losses/margins.py` or `trl/dpo.py` begins.
BEGINNINGS = (ROOT, ROOT / "fused_prefopt", ROOT / "fused_prefopt" / "integrations")
NAMED = re.compile(r"(?<![\w./-])(?:\.\./)?[\w.-]+(?:/[\w.-]+)+\.(?:py|md|yaml|txt)(?![\w/])")
# Made by what the pages describe, or only an example.
OUTPUTS = ("runs/", "out/", "path/")


def files_named(page: Path) -> list[str]:
    """Paths with a folder in a page's code blocks, backticks and links."""
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"```.*?```|`[^`]+`|\]\([^)]+\)", text, re.DOTALL)
    paths = [path for each in named for path in NAMED.findall(each)]
    return [path for path in paths if not path.startswith(OUTPUTS)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    beginnings = (page.parent, *BEGINNINGS)
    missing = {
        path for path in files_named(page) if not any((each / path).exists() for each in beginnings)
    }
    assert not missing


def test_files_are_named():
    assert sum(len(files_named(page)) for page in PAGES) >= 40


def test_all_blocks_are_met():
    assert len(BLOCKS) >= 20
