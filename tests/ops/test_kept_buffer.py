"""`local` keeps its probabilities in one buffer, and recomputes where it has lost them."""

from __future__ import annotations

import pytest
import torch
from truth import assert_gradients, computed, leaves_of, make_case, needs_of, true_result

from fused_prefopt import release_workspace, sequence_logps
from fused_prefopt.ops import kept_buffer as workspace

NEEDS = needs_of("local")


@pytest.fixture(autouse=True)
def fresh():
    release_workspace()
    yield
    release_workspace()


def gradients(case):
    return [case.hidden.grad, case.weight.grad]


def held_bytes() -> int:
    return sum(buffer.nbytes for _, buffer in workspace._buffers.values())


def test_steps_share_one_buffer():
    case = make_case(4, 9, 8, 40)
    for _ in range(3):
        leaves = leaves_of(case, NEEDS)
        out = sequence_logps(leaves.hidden, leaves.head, leaves.labels, path="local")
        out.sums.sum().backward()
    assert len(workspace._buffers) == 1
    assert held_bytes() == 4 * 40 * int(out.lengths.sum())
    release_workspace()
    assert held_bytes() == 0


@pytest.mark.parametrize("options", [{}, {"softcap": 9.0}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_graphs_at_once_both_get_their_gradients(options, dtype):
    cases = [make_case(4, 9, 8, 40, dtype=dtype, seed=seed, **options) for seed in (0, 1)]
    leaves = [leaves_of(case, NEEDS) for case in cases]
    sums = [
        sequence_logps(leaf.hidden, leaf.head, leaf.labels, path="local").sums for leaf in leaves
    ]
    assert len(workspace._buffers) == 1
    for total in sums:
        total.sum().backward()
    for case, leaf in zip(cases, leaves, strict=True):
        alone = leaves_of(case, NEEDS)
        sequence_logps(alone.hidden, alone.head, alone.labels, path="local").sums.sum().backward()
        for got, wanted in zip(gradients(leaf), gradients(alone), strict=True):
            tolerance = 1e-12 if dtype == torch.float64 else 1e-6
            assert (got - wanted).norm() <= tolerance * wanted.norm()


def test_a_released_workspace_is_recomputed():
    case = leaves_of(make_case(4, 9, 8, 40), NEEDS)
    total = sequence_logps(case.hidden, case.head, case.labels, path="local").sums.sum()
    wanted = torch.autograd.grad(total, (case.hidden, case.weight), retain_graph=True)
    release_workspace()
    got = torch.autograd.grad(total, (case.hidden, case.weight))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_smaller_batch_fits_the_buffer_of_a_larger_one():
    for length in (19, 7, 23):
        case = make_case(3, length, 8, 31)
        truth = true_result(case, needs=NEEDS)
        assert_gradients(computed(case, needs=NEEDS, path="local"), truth, 2e-6)
    assert len(workspace._buffers) == 1


def test_off_the_cpu_the_backward_gives_the_buffer_back():
    elsewhere = torch.device("meta")
    tensor, ticket = workspace.lease((2, 3), torch.float32, elsewhere)
    assert tensor.shape == (2, 3)
    assert workspace.find(ticket, (2, 3), torch.float32) is not None
    workspace.give_back(ticket)
    assert workspace.find(ticket, (2, 3), torch.float32) is None
