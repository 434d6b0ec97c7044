"""The kernel hub's own library, `kernels`, on the repository that `fused-prefopt hub` writes."""

from __future__ import annotations

import importlib
import re
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import hub_calls
import pytest
import torch
from eager_heads import HEADS, assert_like_eager, eager_head
from hub_calls import assert_same, metadata_of

import fused_prefopt

# `kernels/` at the root of this repository is a folder without a front: no origin.
_FOUND = find_spec("kernels")
if _FOUND is None or _FOUND.origin is None:
    pytest.skip("the package `kernels` is not installed", allow_module_level=True)

ENGINES = [
    "torch",
    *(pytest.param(name, marks=pytest.mark.interpreted) for name in ("cublas", "triton")),
]


@pytest.fixture
def kernels(monkeypatch):
    """The library, where nothing can be connected to."""

    def refused(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refused)
    return importlib.import_module("kernels")


@pytest.mark.slow
def test_the_hubs_library_is_not_shadowed_at_the_root_of_the_repository():
    code = "import sys; sys.path.insert(0, ''); import kernels; print(kernels.get_local_kernel)"
    root = Path(__file__).resolve().parents[2]
    assert (root / "kernels").is_dir()
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=300)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_hubs_library_loads_the_same_bits(kernels, tree, engine):
    loaded = kernels.get_local_kernel(tree, backend="cpu")
    assert loaded.__name__ == metadata_of(tree / "build" / "torch-cpu")["id"]
    for call in hub_calls.CALLS:
        found = hub_calls.results(loaded, call, engine)
        assert_same(found, hub_calls.results(fused_prefopt, call, engine))


def test_the_hubs_library_finds_the_files_as_the_digest_says(kernels, tree):
    rust = importlib.import_module("kernels._rust")
    for variant in (tree / "build").glob("torch-*"):
        metadata = rust.Metadata.read_from_file(variant / "metadata.json")
        found = rust.Digest.hash_variant(metadata.digest.algorithm, variant)
        metadata.digest.validate(found)


@pytest.mark.parametrize("kind", HEADS)
def test_the_hubs_library_lends_a_layer_to_a_model(kernels, tree, kind):
    named = kernels.use_kernel_forward_from_hub(kind.__name__)(type(kind.__name__, (kind,), {}))
    head, given = eager_head(named, True), hub_calls.inputs()
    wanted = head(given["hidden"], given["labels"])
    repo = kernels.LocalLayerRepository(repo_path=tree, layer_name=kind.__name__)
    mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
    with kernels.use_kernel_mapping({kind.__name__: {"cpu": repo}}, inherit_mapping=False):
        kernels.kernelize(head, mode=mode, device="cpu", use_fallback=False)
    assert head.forward.__func__.__module__.startswith("_fused_prefopt_head_cpu_")
    assert_like_eager(head(given["hidden"], given["labels"]), wanted)


def test_the_cards_example_runs(kernels, tree, monkeypatch):
    def get_kernel(repository, *, version, trust_remote_code):
        assert repository.endswith(f"/{tree.name}") and trust_remote_code
        assert version == metadata_of(tree / "build" / "torch-cpu")["version"]
        return kernels.get_local_kernel(tree, backend="cpu")

    monkeypatch.setattr(kernels, "get_kernel", get_kernel)
    card = (tree / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names = hub_calls.inputs()
    given = names["hidden"], names["weight"], names["labels"]
    exec(example, names)
    assert torch.equal(names["out"].sums, fused_prefopt.sequence_logps(*given).sums)
