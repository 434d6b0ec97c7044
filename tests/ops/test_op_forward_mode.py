"""Forward-mode differentiation: refused, as it would see zeros."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

import fused_prefopt as fp

HIDDEN = torch.linspace(-1, 1, 40, dtype=torch.float64).reshape(2, 5, 4)
WEIGHT = torch.linspace(-2, 2, 36, dtype=torch.float64).reshape(9, 4)
LABELS = torch.arange(10).reshape(2, 5) % 9
TERM = {"a": torch.ones(2, 4, dtype=torch.float64), "b": torch.ones(9, 2, dtype=torch.float64)}

# What is differentiated → (function, where).
CALLS = {
    "sequence_logps of hidden": (lambda x: fp.sequence_logps(x, WEIGHT, LABELS).sums, HIDDEN),
    "sequence_logps of the weight": (lambda w: fp.sequence_logps(HIDDEN, w, LABELS).sums, WEIGHT),
    "sequence_logps of the bias": (
        lambda b: fp.sequence_logps(HIDDEN, fp.LMHead(WEIGHT, b), LABELS).sums,
        torch.zeros(9, dtype=torch.float64),
    ),
    "sequence_logps of a low-rank term": (
        lambda a: (
            fp.sequence_logps(
                HIDDEN, fp.LMHead(WEIGHT, low_rank=(fp.LowRank(a, TERM["b"]),)), LABELS
            ).sums
        ),
        TERM["a"],
    ),
    "token_logps": (lambda x: fp.token_logps(x, WEIGHT, LABELS), HIDDEN),
    "token_policy": (lambda x: fp.token_policy(x, WEIGHT, LABELS).entropies, HIDDEN),
    "token_statistics": (lambda x: fp.token_statistics(x, WEIGHT, LABELS).entropies, HIDDEN),
    "sequence_kl": (lambda x: fp.sequence_kl(x, WEIGHT, HIDDEN, WEIGHT, LABELS).kl, HIDDEN),
    "sequence_kl of the reference": (
        lambda x: fp.sequence_kl(HIDDEN, WEIGHT, x, WEIGHT, LABELS).kl,
        HIDDEN,
    ),
    "PreferenceLoss": (lambda x: fp.PreferenceLoss("simpo")(x, WEIGHT, LABELS).loss, HIDDEN),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("mode", ["jvp", "jacfwd", "dual numbers"])
def test_is_an_error(name, mode):
    function, point = CALLS[name]
    with pytest.raises(RuntimeError, match="no forward-mode derivative.*torch.autograd.grad"):
        if mode == "jvp":
            torch.func.jvp(function, (point,), (torch.ones_like(point),))
        elif mode == "jacfwd":
            torch.func.jacfwd(function)(point)
        else:
            with forward_ad.dual_level():
                function(forward_ad.make_dual(point, torch.ones_like(point)))


def test_is_an_error_where_it_is_compiled():
    def slope(hidden):
        function = CALLS["sequence_logps of hidden"][0]
        return torch.func.jvp(function, (hidden,), (torch.ones_like(hidden),))

    torch.compiler.reset()
    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.compile(slope, backend="eager")(HIDDEN)
    torch.compiler.reset()


def test_losses_of_known_log_probs_have_one():
    loss_fn = fp.PreferenceLoss("simpo")
    lengths = torch.tensor([3, 4])

    def loss(policy):
        return loss_fn.from_logps(fp.LogpBatch(policy, lengths)).loss

    policy = torch.tensor([-4.0, -6.0], dtype=torch.float64)
    direction = torch.tensor([0.3, -0.7], dtype=torch.float64)
    _, slope = torch.func.jvp(loss, (policy,), (direction,))
    leaf = policy.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(slope, (wanted * direction).sum())


def test_a_dual_level_around_a_call_without_duals_changes_nothing():
    wanted = fp.sequence_logps(HIDDEN, WEIGHT, LABELS).sums
    with forward_ad.dual_level():
        assert torch.equal(fp.sequence_logps(HIDDEN, WEIGHT, LABELS).sums, wanted)
