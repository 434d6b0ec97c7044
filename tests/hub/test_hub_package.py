"""The kernel hub's package: its files, and the op loaded from it beside and without ours."""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib
import inspect
import json
import subprocess
import sys

import hub_calls
import pytest
import torch
from eager_heads import HEADS, assert_like_eager, eager_head
from hub_calls import assert_same, metadata_of
from torch import nn
from torch._library.custom_ops import OPDEFS

import fused_prefopt
from fused_prefopt import hub
from fused_prefopt.cli.hub import BACKENDS, NAME, repository
from fused_prefopt.cli.main import main

ENGINES = [
    "torch",
    *(pytest.param(name, marks=pytest.mark.interpreted) for name in ("cublas", "triton")),
]


@pytest.fixture(scope="module")
def kernel(tree):
    return hub_calls.load(tree / "build" / "torch-cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_variant_is_whole_and_imports_nothing_else(tree, backend):
    variant = tree / "build" / f"torch-{backend}"
    metadata = metadata_of(variant)
    assert metadata["backend"] == {"type": backend}
    assert metadata["id"].isidentifier() and backend in metadata["id"]
    assert (metadata["name"], metadata["version"], metadata["python-depends"]) == (NAME, 0, [])
    files = [path for path in sorted(variant.rglob("*")) if path.is_file()]
    assert metadata["digest"]["files"] == {
        path.relative_to(variant).as_posix(): base64.b64encode(
            hashlib.sha256(path.read_bytes()).digest()
        ).decode()
        for path in files
        if path.name != "metadata.json"
    }
    ops = []
    for path in files:
        if path.suffix != ".py":
            continue
        assert (path.parent / "__init__.py").is_file()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            elif isinstance(node, ast.Call) and ast.unparse(node.func).startswith("torch.library."):
                ops += [one.value for one in node.args if isinstance(one, ast.Constant)]
            for name in names:
                assert name.partition(".")[0] in sys.stdlib_module_names | {"torch", "triton"}, path
    assert len(ops) == 4
    assert all(op.startswith(f"{metadata['id']}::") for op in ops)


def test_equal_sources_give_equal_bytes_and_namespaces_of_their_own(tree):
    again = repository()
    written = {
        path.relative_to(tree).as_posix(): path.read_bytes()
        for path in tree.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name: text.encode() for name, text in again.items()} == written
    ids = {metadata_of(variant)["id"] for variant in (tree / "build").glob("torch-*")}
    assert len(ids) == len(BACKENDS)


def test_another_source_is_another_namespace(tree, monkeypatch):
    monkeypatch.setattr("fused_prefopt.cli.hub.__version__", "0.9.9")
    before = metadata_of(tree / "build" / "torch-cpu")["id"]
    assert json.loads(repository()["build/torch-cpu/metadata.json"])["id"] != before


def test_the_card_names_all_that_is_exported(tree):
    card = (tree / "README.md").read_text(encoding="utf-8")
    assert card == (tree / "build" / "CARD.md").read_text(encoding="utf-8")
    heads = [kind.__name__ for kind in HEADS]
    wanted = [*set(hub.__all__) - {"layers"}, *heads]
    assert not [name for name in wanted if f"`{name}`" not in card]


def test_the_loaded_package_exports_what_ours_does(kernel):
    assert kernel.__all__ == hub.__all__
    functions = {name for name in kernel.__all__ if name.startswith(("sequence_", "token_"))}
    assert functions == {name.partition(",")[0] for name in hub_calls.CALLS}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("call", hub_calls.CALLS)
def test_beside_ours_it_gives_the_same_bits(kernel, call, engine):
    found = hub_calls.results(kernel, call, engine)
    assert_same(found, hub_calls.results(fused_prefopt, call, engine))


def test_neither_registers_its_ops_in_the_others_place(kernel):
    for part, op in (("autograd", "head_logps"), ("kl", "head_kl")):
        for front in (kernel.__name__, fused_prefopt.__name__):
            module = sys.modules[f"{front}.ops.{part}"]
            for name in (op, f"{op}_backward"):
                assert OPDEFS[f"{front}::{name}"] is getattr(module, name)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_without_ours_it_gives_the_same_bits(tree, tmp_path, engine):
    variant, saved = tree / "build" / "torch-cpu", tmp_path / "results.pt"
    command = [sys.executable, hub_calls.__file__, variant, engine, saved]
    command += [str(torch.get_num_threads())]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for call, found in torch.load(saved).items():
        assert_same(found, hub_calls.results(fused_prefopt, call, engine))


def test_older_loaders_find_the_same_package(kernel, tree):
    front = tree / "build" / "torch-cpu" / NAME.replace("-", "_") / "__init__.py"
    spec = importlib.util.spec_from_file_location("older", front)
    older = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(older)
    assert {name: getattr(older, name) for name in older.__all__} == {
        name: getattr(kernel, name) for name in kernel.__all__
    }


def test_it_compiles_without_a_break(kernel):
    given = hub_calls.inputs()

    def loss(hidden, weight):
        return kernel.sequence_logps(hidden, kernel.LMHead(weight), given["labels"]).sums.sum()

    results = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [given[name].detach().requires_grad_() for name in ("hidden", "weight")]
        value = run(*leaves)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_it_reads_a_models_head(kernel):
    transformers = pytest.importorskip("transformers")
    config = transformers.Gemma2Config(
        vocab_size=67,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=9.0,
    )
    model = transformers.Gemma2ForCausalLM(config)
    head = kernel.LMHead.of(model)
    assert isinstance(head, kernel.LMHead)
    assert head.softcap == 9.0
    assert head.weight is model.lm_head.weight


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("kind", HEADS)
def test_a_layer_lends_its_forward_to_a_head(kernel, kind, bias):
    layer, given = getattr(kernel.layers, kind.__name__), hub_calls.inputs()
    head = eager_head(kind, bias)
    found = layer.forward(head, given["hidden"], given["labels"])
    assert_like_eager(found, head(given["hidden"], given["labels"]))
    # What the hub's library demands of a layer: nothing of its own but forward and two flags.
    assert layer.__init__ is nn.Module.__init__
    own = {name for name in dir(layer) if name not in dir(nn.Module)}
    assert own <= {"can_torch_compile", "has_backward"}


def test_the_layers_are_those_that_are_tried(kernel):
    kinds = [value for value in vars(kernel.layers).values() if inspect.isclass(value)]
    own = {kind.__name__ for kind in kinds if kind.__module__ == kernel.layers.__name__}
    assert own == {kind.__name__ for kind in HEADS}


@pytest.mark.parametrize("there", ("build", "README.md"))
def test_a_folder_that_has_a_repository_is_left_alone(tmp_path, capsys, there):
    (tmp_path / there).mkdir()
    assert main(["hub", str(tmp_path)]) == 2
    assert f"got a folder with {tmp_path / there}, wanted one without" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [there]
