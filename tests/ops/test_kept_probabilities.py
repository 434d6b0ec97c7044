"""Probabilities of k of the n rows are kept, the others' are built again: gradients, and the plan.

They are kept in one buffer, and built again where that has been lost.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from machines import OP, dtypes, per_machine
from torch import Tensor
from truth import (
    KERNEL_ENGINES,
    SMALLEST,
    TRANSFORMS,
    Case,
    Result,
    assert_gradients,
    assert_right,
    covering,
    largest_error,
    leaves_of,
    make_case,
    relative,
    true_logps,
    true_result,
    upstream_of,
)

from fused_prefopt import LMHead, LowRank, release_workspace, sequence_logps, token_logps
from fused_prefopt.ops import autograd, head_rows, kept_buffer, plan
from fused_prefopt.ops.cutting import Tiles
from fused_prefopt.ops.engines import load_engine
from fused_prefopt.ops.head_rows import HeadRows
from fused_prefopt.ops.torch_engine import TorchEngine

MIB = 2**20
EVERYTHING = (True, True, True)
# Ours against float64, relative, Frobenius.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float64: 1e-12}
# Rows, entries of a slab, those multiplied at a time, whether rows are gathered once.
TILINGS = {
    "whole": None,
    "rows": (5, 10**6, 10**6, True),
    "slabs": (10**6, 16, 8, False),
    "both": (7, 32, 16, False),
    "odd": (4, 24, 24, True),
}


# Of a program, and a vocabulary that takes several.
PART, VOCAB = per_machine((32, 101), (128, 301))
# Those that end where a program's part of the vocabulary does.
SLABS = {
    "planned": None,
    "slabs": (10**6, 64, 32, False),
    "both": (per_machine(7, 11), 64, 32, True),
    "narrow": (per_machine(3, 9), 32, 32, False),
}
# What a role gets where the choice is the architecture's.
MIXES = {
    "cublas": {},
    "triton": {},
    "cublas keeps": {"keep": "cublas", "kept": "cublas", "fold": "triton", "rebuild": "triton"},
    "triton keeps": {"keep": "triton", "kept": "triton", "fold": "cublas", "rebuild": "cublas"},
}


def choose(monkeypatch, mix: str) -> str:
    """Give the roles their engines; the name to ask for."""
    if not MIXES[mix]:
        return mix
    monkeypatch.setattr(head_rows, "role_engine", lambda name, role, *_: MIXES[mix][role])
    return "triton"


def in_slabs_of(engine: str) -> int:
    """Slabs start where the parts of a program do."""
    return 1 if engine == "cublas" else PART


@dataclass
class Seen:
    """What a backward has read: rows of each call that found kept ones, and of those that rebuilt.

    Attributes:
        kept: rows of what was kept, one entry a tile.
        built: rows that were built again.
    """

    kept: list[int]
    built: list[int]


@pytest.fixture(autouse=True)
def fresh_buffer():
    release_workspace()
    yield
    release_workspace()


def keep(monkeypatch, rows: int) -> None:
    """Let the planner keep so many rows, whatever the workspace."""
    monkeypatch.setattr(plan.Room, "kept", lambda room, count, workspace: min(rows, count))


def cut(monkeypatch, tiling: tuple[int, int, int, bool] | None, step: int = 1) -> None:
    """Cut every pass as it says, in multiples of `step`; None leaves it to the planner."""
    if tiling is None:
        return
    rows, vocab, products, gathered = tiling

    def tiles(head: HeadRows) -> Tiles:
        def width(size: int) -> int:
            return min(head.vocab, -(-size // step) * step)

        high = max(1, min(rows, head.rows))
        rest = head.rows - head.kept if head.backward else head.rows
        # Only a GPU's slab of a gradient is multiplied part by part.
        parts = head.engine != "torch" and (head.backward or head.path == "stash")
        narrow = width(products if parts else vocab)
        return Tiles(high, width(vocab), narrow, min(high, rest), gathered)

    monkeypatch.setattr(head_rows, "tiles_of", tiles)


def watch(monkeypatch, engine: str) -> Seen:
    """What the backwards of the engine (of both of Triton's, if it is one) read from now on."""
    seen = Seen([], [])
    engines = [load_engine(name) for name in (("torch",) if engine == "torch" else KERNEL_ENGINES)]

    def spy(engine: type[TorchEngine], name: str, note) -> None:
        real = getattr(engine, name)

        def call(self, *arguments, **options):
            note(*arguments)
            return real(self, *arguments, **options)

        monkeypatch.setattr(engine, name, call)

    for engine in engines:
        spy(engine, "kept_gradient", lambda kept, *_: seen.kept.append(kept.values.shape[0]))
        spy(engine, "finish_kept", lambda kept, *_: seen.kept.append(kept.values.shape[0]))
        spy(engine, "gradient", lambda tile, *_: seen.built.append(tile.shape[0]))
    return seen


def one_pass(case: Case, needs=EVERYTHING, *, lost: bool = False, **options) -> Result:
    """Of one forward and one backward; `lost`: what is kept is gone before the backward."""
    case = leaves_of(case, needs)
    tokens = token_logps(case.hidden, case.head, case.labels, **options)
    if lost:
        release_workspace()
    of_sums, of_tokens = upstream_of(case)
    (tokens.double() * (of_tokens + of_sums[:, None])).sum().backward()
    grads = tuple(t if t is None else t.grad for t in (case.hidden, case.weight, case.bias))
    return Result(tokens.detach().sum(1), tokens.detach(), grads)


def labelled(case: Case) -> int:
    return int((case.labels[:, 1:] != -100).sum())


@pytest.mark.parametrize(
    ("cuts", "transform", "dtype"),
    # What is kept is cut with the rows: both as one factor.
    covering(product([1, 6, 13, -1], TILINGS), TRANSFORMS, TOLERANCE),
)
def test_gradients_of_some_kept_rows_match_float64(cuts, transform, dtype, monkeypatch):
    kept, tiling = cuts
    case = make_case(4, 11, 7, 53, dtype=dtype, **TRANSFORMS[transform])
    rows = labelled(case)
    kept %= rows
    assert 13 < rows - 1
    cut(monkeypatch, TILINGS[tiling])
    seen = check_kept(case, kept, "torch", TOLERANCE[dtype], monkeypatch)
    # Every slab has read all kept rows, and built the others.
    slabs = sum(seen.kept) // kept
    assert sum(seen.built) % (rows - kept) == 0 and sum(seen.built) >= slabs * (rows - kept)


@pytest.mark.interpreted
@pytest.mark.executed
@pytest.mark.parametrize(
    ("mix", "kept", "transform", "tiling", "dtype"),
    covering(MIXES, [1, 13, 0], ["plain", "all"], SLABS, dtypes(torch.float32)),
)
def test_gradients_of_some_rows_kept_by_kernels(mix, kept, transform, tiling, dtype, monkeypatch):
    case = make_case(4, 7, 7, VOCAB, dtype=dtype, **TRANSFORMS[transform])
    rows = labelled(case)
    assert rows > 13
    engine = choose(monkeypatch, mix)
    cut(monkeypatch, SLABS[tiling], in_slabs_of(mix))
    # 0 stands for all: `local`.
    kept = kept % rows or rows
    seen = check_kept(case, kept, engine, OP[dtype][1], monkeypatch)
    assert (kept == rows) == (not seen.built)


def check_kept(case: Case, kept: int, engine: str, tolerance: float, monkeypatch) -> Seen:
    """Gradients of a pass that keeps so many rows, and of one whose buffer is gone."""
    keep(monkeypatch, kept)
    seen = watch(monkeypatch, engine)
    truth = true_result(case, needs=EVERYTHING)
    got = one_pass(case, engine=engine)
    assert largest_error(got.tokens, truth.tokens) <= 1e-5
    assert_gradients(got, truth, tolerance)
    slabs = sum(seen.kept) // kept
    assert slabs > 0 and sum(seen.kept) == slabs * kept
    # With its buffer gone the backward builds every row, to the same gradient.
    lost = watch(monkeypatch, engine)
    again = one_pass(case, lost=True, engine=engine)
    assert not lost.kept and lost.built
    assert_gradients(again, truth, tolerance)
    assert torch.equal(again.tokens, got.tokens)
    seen.built[-len(lost.built) :], seen.kept[len(seen.kept) :] = [], []
    return seen


@pytest.mark.parametrize("only", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("tiling", ["whole", "both"])
def test_only_the_gradient_that_is_needed(only, tiling, monkeypatch):
    needs = tuple(name == only for name in ("hidden", "weight", "bias"))
    case = make_case(4, 11, 7, 53, **TRANSFORMS["all"])
    keep(monkeypatch, 9)
    cut(monkeypatch, TILINGS[tiling])
    assert plan_of(case, needs).path == ("stash" if only == "hidden" else "recompute")
    assert_gradients(one_pass(case, needs), true_result(case, needs=needs), 3e-6)


def plan_of(case: Case, needs=EVERYTHING, **options):
    case = leaves_of(case, needs)
    return sequence_logps(case.hidden, case.head, case.labels, **options).plan


@pytest.mark.parametrize("tiling", ["whole", "slabs", "both"])
@pytest.mark.parametrize("transform", ["plain", "all"])
def test_gradients_of_low_rank_terms(transform, tiling, monkeypatch):
    keep(monkeypatch, 11)
    cut(monkeypatch, TILINGS[tiling])
    check_low_rank(transform, "torch", 3e-6)


def check_low_rank(transform: str, engine: str, tolerance: float) -> None:
    """Gradients of all five tensors of a head with a low-rank term, on any path."""
    case = make_case(4, 11, 7, 53, largest=15.0, **TRANSFORMS[transform])
    generator = torch.Generator().manual_seed(2)
    names = ["hidden", "weight", "a", "b"] + ["bias"] * (case.bias is not None)
    given = {
        "hidden": case.hidden,
        "weight": case.weight,
        "bias": case.bias,
        "a": torch.randn(3, 7, generator=generator),
        "b": torch.randn(53, 3, generator=generator),
    }
    ours = {name: given[name].clone().requires_grad_() for name in names}
    exact = {name: given[name].double().requires_grad_() for name in names}
    term = LowRank(ours["a"], ours["b"], 0.3)
    head = LMHead(ours["weight"], ours.get("bias"), **case.options, low_rank=(term,))
    tokens = token_logps(ours["hidden"], head, case.labels, engine=engine)
    merged = exact["weight"] + 0.3 * exact["b"] @ exact["a"]
    truth = true_logps(replace(case, hidden=exact["hidden"], weight=merged, bias=exact.get("bias")))
    assert largest_error(tokens, truth) <= 2e-5
    _, upstream = upstream_of(case)
    found = torch.autograd.grad((tokens.double() * upstream).sum(), [ours[n] for n in names])
    wanted = torch.autograd.grad((truth * upstream).sum(), [exact[n] for n in names])
    for name, got, right in zip(names, found, wanted, strict=True):
        assert relative(got, right) <= tolerance, name


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("mix", "kept", "transform"), covering(MIXES, [11, 10**6], ["plain", "all"])
)
def test_gradients_of_low_rank_terms_by_kernels(mix, transform, kept, monkeypatch):
    keep(monkeypatch, kept)
    cut(monkeypatch, (9, 32, 32, False))
    check_low_rank(transform, choose(monkeypatch, mix), 3e-6)


@pytest.mark.interpreted
@pytest.mark.parametrize("mix", MIXES)
def test_the_plan_names_what_is_kept(mix, monkeypatch):
    case = make_case(4, 9, 7, 101)
    keep(monkeypatch, 13)
    found = plan_of(case, engine=choose(monkeypatch, mix))
    assert found.path == "recompute" and found.kept_rows == 13
    assert found.cost == 4 - 13 / labelled(case)


@pytest.mark.interpreted
@pytest.mark.parametrize("engine", KERNEL_ENGINES)
@pytest.mark.usefixtures("tiny_tiles")
def test_the_planner_keeps_what_the_workspace_holds_for_kernels(engine, monkeypatch):
    case = make_case(6, 40, 9, 101, **TRANSFORMS["all"])
    rows, workspace = labelled(case), {"workspace_mb": 0.14}
    found = plan_of(case, engine=engine, **workspace)
    assert found.path == "recompute" and 0 < found.kept_rows < rows
    seen = watch(monkeypatch, engine)
    got = one_pass(case, engine=engine, **workspace)
    assert_gradients(got, true_result(case, needs=EVERYTHING), 3e-6)
    assert seen.built and sum(seen.kept) % found.kept_rows == 0


@pytest.mark.parametrize("workspace_mb", [0.1, 0.16])
@pytest.mark.parametrize("transform", ["plain", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("tiny_tiles")
def test_the_planner_keeps_what_the_workspace_holds(dtype, transform, workspace_mb, monkeypatch):
    case = make_case(6, 80, 9, 97, dtype=dtype, **TRANSFORMS[transform])
    rows = labelled(case)
    found = plan_of(case, workspace_mb=workspace_mb)
    assert found.path == "recompute" and found.rows == rows
    assert 0 < found.kept_rows < rows and found.kept_rows % 128 == 0
    assert found.cost == 4 - found.kept_rows / rows
    assert f"{found.kept_rows} rows fit" in found.reason
    assert found.kept_rows * case.vocab * dtype.itemsize <= workspace_mb * MIB
    seen = watch(monkeypatch, "torch")
    got = one_pass(case, workspace_mb=workspace_mb)
    assert_gradients(got, true_result(case, needs=EVERYTHING), TOLERANCE[dtype])
    slabs = sum(seen.kept) // found.kept_rows
    assert slabs > 0 and sum(seen.kept) == slabs * found.kept_rows
    assert sum(seen.built) == slabs * (rows - found.kept_rows)


def test_a_forced_path_keeps_all_or_nothing():
    case = make_case(6, 80, 9, 97)
    forced = plan_of(case, path="recompute", workspace_mb=0.1)
    assert forced.kept_rows == 0 and forced.cost == 4
    whole = plan_of(case, path="local")
    assert whole.kept_rows == whole.rows == labelled(case) and whole.cost == 3
    assert plan_of(case, workspace_mb=SMALLEST).kept_rows == 0


@pytest.mark.parametrize("kept", [0, 9, 10**6])
def test_two_graphs_at_once_both_get_their_gradients(kept, monkeypatch):
    keep(monkeypatch, kept)
    cases = [make_case(4, 11, 7, 53, seed=seed, **TRANSFORMS["all"]) for seed in (0, 1)]
    leaves = [leaves_of(case, EVERYTHING) for case in cases]
    # The second forward takes the first's buffer over.
    tokens = [token_logps(leaf.hidden, leaf.head, leaf.labels) for leaf in leaves]
    for case, leaf, found in zip(cases, leaves, tokens, strict=True):
        of_sums, of_tokens = upstream_of(case)
        (found.double() * (of_tokens + of_sums[:, None])).sum().backward()
        grads = (leaf.hidden.grad, leaf.weight.grad, leaf.bias.grad)
        got = Result(found.sum(1), found, grads)
        assert_gradients(got, true_result(case, needs=EVERYTHING), 3e-6)


def test_a_second_backward_gives_the_same_bits(monkeypatch):
    keep(monkeypatch, 9)
    case = leaves_of(make_case(4, 11, 7, 53, **TRANSFORMS["all"]), EVERYTHING)
    loss = token_logps(case.hidden, case.head, case.labels).square().sum()
    tensors = (case.hidden, case.weight, case.bias)
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(loss, tensors), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("tiling", ["whole", "both"])
def test_a_lost_row_stays_alone(tiling, monkeypatch):
    # NaN among the kept rows and among the others: only their own sequences' hidden are lost.
    keep(monkeypatch, 9)
    cut(monkeypatch, TILINGS[tiling])
    case = make_case(4, 11, 7, 53, labelled=1.0)
    lost = case.hidden.clone()
    lost[0, 2], lost[3, 2] = torch.nan, torch.nan
    got, clean = one_pass(replace(case, hidden=lost)), one_pass(case)
    nan = got.grads[0].isnan().any(-1)
    assert nan[0, 2] and nan[3, 2] and int(nan.sum()) == 2
    torch.testing.assert_close(got.grads[0][~nan], clean.grads[0][~nan], rtol=1e-5, atol=1e-6)


def test_every_row_of_the_backward_is_counted_once(monkeypatch):
    # The op is handed k; where fewer rows are labelled it keeps those.
    keep(monkeypatch, 10**6)
    handed = []
    whole = autograd.backward

    def backward(head, *arguments):
        handed.append((head.rows, head.kept, head.path))
        return whole(head, *arguments)

    monkeypatch.setattr(autograd, "backward", backward)
    case = make_case(4, 11, 7, 53)
    assert_gradients(one_pass(case), true_result(case, needs=EVERYTHING), 3e-6)
    assert handed == [(labelled(case), labelled(case), "local")]


def test_gradcheck_of_some_kept_rows(monkeypatch):
    keep(monkeypatch, 2)
    cut(monkeypatch, (2, 4, 4, False))
    case = make_case(2, 4, 3, 8, dtype=torch.float64, largest=3.0, **TRANSFORMS["all"])
    case = leaves_of(case, EVERYTHING)
    assert labelled(case) > 2

    def outputs(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return token_logps(hidden, LMHead(weight, bias, **case.options), case.labels)

    assert torch.autograd.gradcheck(outputs, (case.hidden, case.weight, case.bias))


def held_bytes() -> int:
    return sum(buffer.nbytes for _, buffer in kept_buffer._buffers.values())


def test_steps_share_one_buffer_that_is_as_large_as_the_largest_needs():
    for length in (19, 7, 19):
        case = make_case(3, length, 8, 31)
        assert_right(case, 1e-5, 2e-6, path="local")
        assert len(kept_buffer._buffers) == 1
    assert held_bytes() == 4 * 31 * labelled(case)
    release_workspace()
    assert held_bytes() == 0


def test_off_the_cpu_the_backward_gives_the_buffer_back():
    elsewhere = torch.device("meta")
    tensor, ticket = kept_buffer.lease((2, 3), torch.float32, elsewhere)
    assert tensor.shape == (2, 3)
    assert kept_buffer.find(ticket, (2, 3), torch.float32) is not None
    kept_buffer.give_back(ticket)
    assert kept_buffer.find(ticket, (2, 3), torch.float32) is None
