"""Layouts of a call: shapes, strides and dtypes that it takes, packed and padded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from machines import OP, OP_OF_FEW, dtypes
from truth import (
    KERNEL_ENGINES,
    PATHS,
    SMALLEST,
    TRAINING_PATHS,
    TRANSFORMS,
    Case,
    assert_right,
    computed,
    largest_error,
    make_case,
    needs_of,
    picked,
    relative,
    tight,
    true_logits,
    true_result,
    upstream_of,
)

from fused_prefopt import (
    sequence_logps,
    token_logps,
)
from fused_prefopt.ops import torch_engine
from fused_prefopt.ops.cutting import TileShape

# (sequences, length, hidden_size, vocab)
SHAPES = {
    "prime": (3, 13, 17, 101),
    "one sequence": (1, 11, 6, 37),
    "one position": (5, 1, 6, 37),
    "one of each": (1, 1, 1, 2),
    "one vocabulary entry": (2, 5, 3, 1),
    "wide": (2, 5, 100, 67),
    "beyond a tile": (2, 80, 5, 257),
    "exact tiles": (2, 65, 8, 128),
}


def flat(case: Case, keep: torch.Tensor | None = None):
    """hidden (N, D), labels (N,) and ids (N,) of a case, rows without `keep` (S, T) left out."""
    sequences, length = case.labels.shape
    ids = torch.arange(sequences).repeat_interleave(length)
    kept = slice(None) if keep is None else keep.flatten()
    return case.hidden.flatten(0, 1)[kept], case.labels.flatten()[kept], ids[kept]


@pytest.mark.parametrize("workspace_mb", [SMALLEST, 256], ids=["small tiles", "large tiles"])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("path", PATHS)
def test_shapes(path, shape, shift, workspace_mb):
    case = make_case(*SHAPES[shape], largest=10.0)
    assert_right(case, 1e-5, 2e-6, path=path, shift=shift, **tight(path, workspace_mb))


@pytest.mark.interpreted
@pytest.mark.executed
@pytest.mark.parametrize("dtype", dtypes(torch.float32))
@pytest.mark.parametrize("engine", KERNEL_ENGINES)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 2, 3, 2), (3, 5, 11, 37), (1, 9, 33, 64)])
@pytest.mark.usefixtures("tiny_tiles")
def test_ragged_shapes_in_many_tiles_of_triton_engines(engine, path, shape, dtype):
    case = make_case(*shape, dtype=dtype)
    assert_right(case, *OP_OF_FEW[dtype], path=path, engine=engine, **tight(path))


@pytest.mark.parametrize("workspace_mb", [SMALLEST, 0.001, 0.01])
@pytest.mark.parametrize("path", ["evaluate", "stash", "recompute"])
@pytest.mark.usefixtures("tiny_tiles")
def test_many_slabs_and_many_row_slices(path, workspace_mb):
    case = make_case(4, 11, 7, 53, **TRANSFORMS["all"])
    assert_right(case, 1e-5, 2e-6, path=path, workspace_mb=workspace_mb)


def test_local_with_many_slabs_and_many_row_slices(monkeypatch):
    monkeypatch.setitem(torch_engine._PREFERRED, "cpu", TileShape(5, 6))
    case = make_case(4, 11, 7, 53, **TRANSFORMS["all"])
    assert_right(case, 1e-5, 2e-6, path="local")


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize("path", PATHS)
def test_no_rows_at_all(path, shape):
    case = make_case(1, 1)
    sequences, length = shape
    case = replace(
        case,
        hidden=torch.zeros(*shape, case.hidden.shape[-1]),
        labels=torch.zeros(shape, dtype=torch.long),
    )
    got = computed(case, needs=needs_of(path), path=path)
    assert torch.equal(got.sums, torch.zeros(sequences))
    assert got.tokens.shape == shape
    for grad in got.grads:
        assert grad is None or not grad.any()


@pytest.mark.parametrize("path", TRAINING_PATHS)
@pytest.mark.parametrize("view", ["every other row", "transposed", "offset", "expanded"])
def test_hidden_views(path, view):
    case = make_case(4, 6, 8, 23)
    hidden = {
        "every other row": case.hidden.repeat_interleave(2, dim=1)[:, ::2],
        "transposed": case.hidden.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        "offset": torch.cat([case.hidden, case.hidden], dim=2)[:, :, 8:],
        "expanded": case.hidden[:1].expand(4, 6, 8),
    }[view]
    truth = true_result(replace(case, hidden=hidden.contiguous()), needs=needs_of(path))
    leaf = hidden.detach().requires_grad_(view != "expanded")
    if view == "expanded":
        source = case.hidden[:1].clone().requires_grad_()
        leaf = source.expand(4, 6, 8)
    weight = case.weight.clone().requires_grad_(path != "stash")
    tokens = token_logps(leaf, weight, case.labels, path=path)
    assert largest_error(tokens, truth.tokens) <= 1e-5
    of_sums, of_tokens = upstream_of(case)
    (tokens.double() * (of_tokens + of_sums.unsqueeze(1))).sum().backward()
    if view == "expanded":
        assert relative(source.grad, truth.grads[0].sum(0, keepdim=True)) <= 2e-6
    else:
        assert relative(leaf.grad, truth.grads[0]) <= 2e-6


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("view", ["transposed", "every other row", "every other column", "offset"])
def test_weight_views(path, view, dtype):
    case = make_case(4, 6, 8, 23, dtype=dtype)
    weight = {
        "transposed": case.weight.t().contiguous().t(),
        "every other row": case.weight.repeat_interleave(2, dim=0)[::2],
        "every other column": case.weight.repeat_interleave(2, dim=1)[:, ::2],
        "offset": torch.cat([case.weight, case.weight])[23:],
    }[view]
    tolerance = 2e-6 if dtype == torch.float32 else 4e-3
    assert_right(replace(case, weight=weight), 1e-4, tolerance, path=path)


@pytest.mark.interpreted
@pytest.mark.executed
@pytest.mark.parametrize("dtype", dtypes(torch.float32))
@pytest.mark.parametrize("engine", KERNEL_ENGINES)
def test_triton_engines_take_operands_that_are_not_contiguous(engine, dtype):
    case = make_case(2, 6, 16, 40, dtype=dtype)
    hidden = case.hidden.transpose(0, 1).contiguous().transpose(0, 1)
    case = replace(case, hidden=hidden, weight=case.weight.t().contiguous().t())
    assert_right(case, *OP[dtype], path="recompute", engine=engine)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_labels_of_any_integer_dtype(layout, shift, dtype):
    case = make_case(3, 5)
    labels = case.labels.clamp(min=0)
    hidden, options = case.hidden, {}
    if layout == "packed":
        options["sequence_ids"] = torch.arange(3).repeat_interleave(5)
        hidden, labels = hidden.flatten(0, 1), labels.flatten()
    narrow = token_logps(hidden, case.head, labels.to(dtype), shift=shift, **options)
    assert torch.equal(narrow, token_logps(hidden, case.head, labels, shift=shift, **options))


@pytest.mark.parametrize("ignore_index", [-1, 3, 10**6])
def test_any_ignore_index(ignore_index):
    case = make_case(3, 8)
    labels = case.labels.clone()
    labels[labels == 3] = 4
    renamed = labels.masked_fill(labels == -100, ignore_index)
    wanted = sequence_logps(case.hidden, case.head, labels)
    got = sequence_logps(case.hidden, case.head, renamed, ignore_index=ignore_index)
    assert torch.equal(got.sums, wanted.sums) and torch.equal(got.lengths, wanted.lengths)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("path", PATHS)
def test_packed_equals_padded(path, shift):
    case = make_case(4, 7, **TRANSFORMS["all"])
    # Ragged: sequence s keeps its first lengths[s] tokens; padded positions carry no label.
    keep = torch.arange(7) < torch.tensor([7, 1, 4, 6]).unsqueeze(1)
    case = replace(case, labels=case.labels.masked_fill(~keep, -100))

    def run(layout):
        hidden = case.hidden.clone().requires_grad_(path != "evaluate")
        weight = case.weight.clone().requires_grad_(needs_of(path)[1])
        here = replace(case, hidden=hidden, weight=weight)
        rows, labels, options = hidden, case.labels, {"path": path, "shift": shift}
        if layout == "packed":
            rows, labels, options["sequence_ids"] = flat(here, keep=keep)
        out = sequence_logps(rows, here.head, labels, **options)
        if path != "evaluate":
            (out.sums * torch.tensor([1.0, -2.0, 0.5, 3.0])).sum().backward()
        return out, hidden.grad, weight.grad

    (padded_out, *padded_grads), (packed_out, *packed_grads) = run("padded"), run("packed")
    assert torch.equal(packed_out.sums, padded_out.sums)
    assert torch.equal(packed_out.lengths, padded_out.lengths)
    for ours, wanted in zip(packed_grads, padded_grads, strict=True):
        assert (ours is None) == (wanted is None)
        assert ours is None or torch.equal(ours, wanted)


@pytest.mark.parametrize("path", PATHS)
def test_interleaved_sequence_ids(path):
    case = make_case(4, 7, labelled=0.8)
    hidden, labels, ids = flat(case)
    order = torch.randperm(28, generator=torch.Generator().manual_seed(3))
    needs = path != "evaluate"

    def sums(rows):
        leaf = hidden.clone().requires_grad_(needs)
        out = sequence_logps(
            leaf[rows],
            case.head,
            labels[rows],
            sequence_ids=ids[rows],
            num_sequences=4,
            shift=False,
            path=path,
        )
        if needs:
            (out.sums * torch.tensor([1.0, -2.0, 0.5, 3.0])).sum().backward()
        return out.sums.detach(), out.lengths, leaf.grad

    straight, lengths, grad = sums(torch.arange(28))
    mixed, mixed_lengths, mixed_grad = sums(order)
    torch.testing.assert_close(mixed, straight, rtol=1e-6, atol=0)
    assert torch.equal(mixed_lengths, lengths)
    if needs:
        torch.testing.assert_close(mixed_grad, grad, rtol=1e-5, atol=1e-6)


def test_the_shift_never_crosses_a_boundary():
    case = make_case(3, 4, labelled=1.0)
    hidden, labels, _ = flat(case)
    ids = torch.tensor([0, 0, 0, 2, 2, 1, 1, 1, 1, 1, 0, 3])  # id 0 returns: a new run
    tokens = token_logps(hidden, case.head, labels, sequence_ids=ids)
    logits = true_logits(case.double()).flatten(0, 1)
    follows = torch.cat([ids[1:] == ids[:-1], torch.tensor([False])])
    targets = torch.cat([labels[1:], labels[:1]]).masked_fill(~follows, -100)
    truth = picked(logits.log_softmax(-1), targets).roll(1)
    assert largest_error(tokens, truth) <= 1e-5
    assert (tokens == 0).tolist() == [True, *(~follows[:-1]).tolist()]
    out = sequence_logps(hidden, case.head, labels, sequence_ids=ids)
    assert out.lengths.tolist() == [2, 4, 1, 0]
    assert out.sums[3] == 0


@pytest.mark.parametrize("path", PATHS)
def test_trailing_sequences_without_rows(path):
    case = make_case(3, 5)
    hidden, labels, ids = flat(case)
    hidden.requires_grad_(path != "evaluate")
    few = sequence_logps(hidden, case.head, labels, sequence_ids=ids, path=path)
    many = sequence_logps(hidden, case.head, labels, sequence_ids=ids, num_sequences=6, path=path)
    assert torch.equal(many.sums, torch.cat([few.sums, torch.zeros(3)]))
    assert many.lengths.tolist() == few.lengths.tolist() + [0, 0, 0]
    assert torch.equal(many.means[3:], torch.zeros(3))


def test_packed_without_rows():
    case = make_case()
    nothing = torch.zeros(0, dtype=torch.long)
    out = sequence_logps(case.hidden[0, :0], case.head, nothing, sequence_ids=nothing)
    assert out.sums.shape == out.lengths.shape == (0,)
    out = sequence_logps(
        case.hidden[0, :0], case.head, nothing, sequence_ids=nothing, num_sequences=2
    )
    assert out.sums.tolist() == [0, 0] and out.lengths.tolist() == [0, 0]


@pytest.mark.parametrize("path", PATHS)
def test_a_given_number_of_labels_changes_nothing(path):
    case = make_case(3, 9)
    count = int((case.labels[:, 1:] != -100).sum())
    wanted = computed(case, needs=needs_of(path), path=path)
    got = computed(case, needs=needs_of(path), path=path, num_labels=count)
    assert torch.equal(got.sums, wanted.sums) and torch.equal(got.tokens, wanted.tokens)
    for ours, theirs in zip(got.grads, wanted.grads, strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)


S, T, D, V = 2, 5, 4, 11
