"""The reference cache: continued after a kill, and refused where it belongs to something else."""

from __future__ import annotations

import sys

import pytest
import torch
from data_tokenizer import tiny_tokenizer
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import pair_features, point_features, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from fused_prefopt.data import PairCollator, PointCollator
from fused_prefopt.reference import add_reference_logps
from fused_prefopt.reference_cache import ReferenceCache

COUNT, BATCH = 21, 3  # seven batches


class Killed(Exception):
    """Stands for whatever ends a run."""


def run(model=None, features=None, collator=None, *, stop_at=None, **options):
    """The rows, and how many batches the model saw; the batch `stop_at`, from 1, ends the run."""
    model = model or tiny_llama()
    batches = []

    def count(*_):
        if len(batches) + 1 == stop_at:
            raise Killed
        batches.append(1)

    hook = model.model.register_forward_pre_hook(count)
    try:
        rows = add_reference_logps(
            model,
            pair_features(COUNT) if features is None else features,
            collator or PairCollator(0),
            **{"batch_size": BATCH, "progress": False, **options},
        )
    finally:
        hook.remove()
    return rows, len(batches)


def killed(**options):
    """Begin a run that something ends."""
    with pytest.raises(Killed):
        run(**options)


def edited():
    """A model with one weight of another value."""
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[3, 2] += 1e-3
    return model


@pytest.mark.parametrize(
    "features, collator",
    [(pair_features(COUNT), PairCollator(0)), (point_features(COUNT), PointCollator(0))],
    ids=["pairs", "points"],
)
def test_a_failed_run_is_continued_where_it_ended(tmp_path, features, collator):
    given = {"features": features, "collator": collator}
    whole, batches = run(**given)
    assert batches == 7
    given |= {"cache_file": tmp_path / "cache", "save_every": 2}
    killed(stop_at=2, **given)
    assert not list(tmp_path.iterdir())
    killed(stop_at=6, **given)
    # The fifth batch was not on disk yet.
    assert run(**given) == (whole, 3)
    assert run(**given) == (whole, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_a_run_killed_before_its_last_step_needs_no_model(tmp_path, monkeypatch):
    def end(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(ReferenceCache, "finish", end)
        killed(cache_file=tmp_path / "cache", save_every=4)
    assert len(list(tmp_path.iterdir())) == 2
    # What a process leaves that is killed while it writes.
    (tmp_path / "cache.part-3-000000-000003.logps.0.tmp").write_bytes(b"half")
    assert run(cache_file=tmp_path / "cache") == (run()[0], 0)
    assert (tmp_path / "cache").is_file()


def test_parts_fit_any_batch_size(tmp_path):
    killed(cache_file=tmp_path / "cache", save_every=1, stop_at=5)
    rows, _ = run(batch_size=4, cache_file=tmp_path / "cache")
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        got, wanted = (torch.tensor([row[name] for row in each]) for each in (rows, run()[0]))
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)


def other_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["zebra"])
    return tokenizer


OTHERS = {
    "model": {"model": edited},
    "data": {"features": lambda: pair_features(COUNT, seed=1)},
    "tokenizer": {"tokenizer": other_tokenizer},
}


@pytest.mark.parametrize("unfinished", [False, True])
@pytest.mark.parametrize("what", [*OTHERS, "data and another model"])
def test_what_belongs_to_something_else_is_refused_by_name(tmp_path, what, unfinished):
    cache = {"cache_file": tmp_path / "cache", "save_every": 1}
    begin = killed if unfinished else run
    begin(tokenizer=tiny_tokenizer(), **({"stop_at": 4} if unfinished else {}), **cache)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    changes = [changed for name, changed in OTHERS.items() if name in what]
    given = {name: make() for each in changes for name, make in each.items()}
    with pytest.raises(ValueError, match=f"cache.*: got log-probs of another {what}, needs"):
        run(**{"tokenizer": tiny_tokenizer(), **given}, **cache)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_has_a_cache_for_each_content(tmp_path):
    contents = [{}, *OTHERS.values()]
    for files, content in enumerate(contents, start=1):
        made = [{name: make() for name, make in content.items()} for _ in range(2)]
        rows, batches = run(cache_dir=tmp_path, **made[0])
        assert batches == 7 and rows == run(**made[0])[0]
        assert run(cache_dir=tmp_path, **made[1]) == (rows, 0)
        assert len(list(tmp_path.iterdir())) == files
    for _ in range(2):
        assert run(features=[], cache_dir=tmp_path) == ([], 0)


def test_log_probs_of_another_precision_are_others(tmp_path):
    whole, _ = run(cache_dir=tmp_path / "folder")
    run(cache_file=tmp_path / "file")
    with torch.autocast("cpu", torch.bfloat16):
        rows, batches = run(cache_dir=tmp_path / "folder")
        assert batches == 7 and rows != whole
        assert run(cache_dir=tmp_path / "folder") == (rows, 0)
        with pytest.raises(ValueError, match="got log-probs of another precision, needs"):
            run(cache_file=tmp_path / "file")
    assert run(cache_dir=tmp_path / "folder") == (whole, 0)


def test_a_file_tells_by_its_header_what_it_belongs_to(tmp_path):
    rows, _ = run(cache_file=tmp_path / "cache", tokenizer=tiny_tokenizer())
    with safe_open(tmp_path / "cache", "pt") as file:
        assert {"kind", "data", "model", "precision", "tokenizer", "torch"} < set(file.metadata())
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            assert file.get_tensor(name).tolist() == [row[name] for row in rows]


def test_damaged_files_are_refused_without_a_readers_stack(tmp_path):
    path = tmp_path / "cache"
    rows, _ = run(cache_file=path)
    whole = path.read_bytes()
    damaged = [whole[:size] for size in range(0, len(whole), 97)]
    for place in range(0, len(whole), 7):
        damaged.append(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    damaged += [whole + b"\0", b"", b"some text\n" * 9]
    cache = ReferenceCache(path, None)
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match="cache: got (a damaged|another kind of) .*file"
        ) as info:
            cache.load(COUNT)
        assert info.value.__context__ is None
    for save in (torch.save, save_file):
        save({"weight": torch.zeros(3)}, path)
        with pytest.raises(ValueError, match="another kind of file"):
            run(cache_file=path)
    path.write_bytes(b"fused_prefopt reference log-probs 2\n" + bytes(99))
    with pytest.raises(ValueError, match="got a reference cache of an earlier .*; delete it, and"):
        run(cache_file=path)
    path.unlink()
    assert run(cache_file=path)[0] == rows


def test_a_damaged_part_is_refused_by_name(tmp_path):
    killed(cache_file=tmp_path / "cache", save_every=1, stop_at=3)
    part = max(tmp_path.iterdir())
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{part.name}: got a damaged or truncated file"):
        run(cache_file=tmp_path / "cache")
    part.unlink()
    assert run(cache_file=tmp_path / "cache") == (run()[0], 6)


def test_the_same_content_of_two_folders_has_one_cache(tmp_path):
    loaded = []
    for name in ("first", "second"):
        tiny_llama().save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
        kinds = (AutoModelForCausalLM, AutoTokenizer)
        loaded.append([kind.from_pretrained(tmp_path / name) for kind in kinds])
    loaded.append([tiny_llama(), tiny_tokenizer()])
    found = [run(model, tokenizer=each, cache_dir=tmp_path / "cache") for model, each in loaded]
    assert found == [(run()[0], batches) for batches in (7, 0, 0)]


def test_log_probs_that_are_not_finite_are_not_cached(tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="model: got ref_chosen_logps=nan for feature"):
        run(model, cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_caches_of_no_use_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="cache_file: got a file and a cache_dir"):
        run(cache_dir=tmp_path, cache_file=tmp_path / "cache")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    run()
    with pytest.raises(ImportError, match="a reference cache needs safetensors: pip install"):
        run(cache_dir=tmp_path)
