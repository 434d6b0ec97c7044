"""Our losses of hidden states against TRL's own `_compute_loss` on the same model's logits."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl")
from test_trl_losses import PAIRS, Sequences, trl_pairs  # noqa: E402

import fused_prefopt as fp  # noqa: E402

D, V = 5, 31
# TRL's loss type and settings, our loss, its hyperparameters and `ld_alpha`.
CASES = [
    *((loss_type, settings, name, options, None) for loss_type, settings, name, options in PAIRS),
    *(
        (loss_type, {"ld_alpha": alpha}, name, options, alpha)
        for loss_type, name, options in (
            ("sigmoid", "dpo", {}),
            ("ipo", "ipo", {"length_normalized": True}),
            ("aot", "aot", {}),
            ("apo_down", "apo-down", {}),
        )
        for alpha in (0.0, 0.4)
    ),
    ("sigmoid", {"use_weighting": True, "ld_alpha": 0.4}, "wpo", {}, 0.4),
]


class HiddenSequences(Sequences):
    """The sequences of the other test, with log-probs that come from hidden states and a head."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        size = self.mask.shape
        self.hidden = torch.randn(*size, D, generator=generator, dtype=torch.float64)
        self.weight = torch.randn(V, D, generator=generator, dtype=torch.float64)
        self.hidden.requires_grad_()
        self.weight.requires_grad_()
        ids = torch.randint(0, V, size, generator=generator)
        self.labels = ids.masked_fill(self.mask == 0, -100)
        logps = (self.hidden @ self.weight.T).log_softmax(-1)[:, :-1]
        tokens = logps.gather(-1, ids[:, 1:, None])[..., 0] * self.mask[:, 1:]
        self.shared |= {"log_probs": tokens, "log_sum_sq_probs": (2 * logps).logsumexp(-1)}
        self.reference = tokens.detach().sum(1) + torch.linspace(-3, 3, size[0])
        self.batch = fp.LogpBatch(tokens.sum(1), self.mask.sum(1), reference=self.reference)


@pytest.mark.parametrize(("loss_type", "settings", "name", "options", "alpha"), CASES, ids=str)
def test_losses_of_hidden_states_equal_trl(loss_type, settings, name, options, alpha):
    data = HiddenSequences()
    # TRL multiplies log-sums of the prompt's rows by its mask; ours never sees them.
    theirs, _ = trl_pairs(data, loss_type, **settings)
    loss_fn = fp.PreferenceLoss(name, ld_alpha=alpha, **options)
    ours = loss_fn(data.hidden, data.weight, data.labels, reference=data.reference).loss
    # TRL's ε of this loss is float32 whatever the log-probs are.
    rtol = 1e-6 if loss_type == "exo_pair" else 1e-9
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-10)
    leaves = (data.hidden, data.weight)
    gradients = [torch.autograd.grad(loss, leaves) for loss in (ours, theirs)]
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=rtol, atol=1e-10)
