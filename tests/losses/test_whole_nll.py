"""ORPO's log-likelihood of whole sequences: the fused loss against eager PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, logsigmoid

from fused_prefopt import PreferenceLoss

S, T, D, V, PROMPT = 6, 9, 5, 23, 3


def eager(hidden, weight, ids, ends, weight_of_odds):
    """TRL's ORPO: cross-entropy of the chosen rows' tokens, of prompts and completions alike."""
    logits = (hidden @ weight.T)[:, :-1]
    places = torch.arange(1, T)
    whole = places < ends[:, None]
    completion = whole & (places >= PROMPT)
    logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    labels = ids[:, 1:].masked_fill(~whole, -100)[: S // 2]
    nll = cross_entropy(logits[: S // 2].flatten(0, 1), labels.flatten())
    means = (logps * completion).sum(1) / completion.sum(1)
    chosen, rejected = (means - torch.log1p(-means.exp())).chunk(2)
    return nll - weight_of_odds * logsigmoid(chosen - rejected).mean()


@pytest.mark.parametrize("path", ["local", "recompute"])
def test_the_tokens_of_the_prompts_count_and_are_trained(path):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((S, T, D), (V, D))
    )
    ids = torch.randint(V, (S, T), generator=generator)
    ends = torch.tensor([9, 5, 7, 6, 9, 4])
    places = torch.arange(T)
    there = places < ends[:, None]
    labels = ids.masked_fill(~there | (places < PROMPT), -100)
    prompt_labels = ids.masked_fill(~there | (places >= PROMPT), -100)
    loss_fn = PreferenceLoss("orpo", weight=0.3, nll="whole_token_mean", path=path)
    with pytest.raises(ValueError, match="prompt"):
        loss_fn(hidden, weight, labels)
    ours = loss_fn(hidden, weight, labels, prompt_labels=prompt_labels).loss
    truth = eager(hidden, weight, ids, ends, 0.3)
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=0, check_dtype=False)
    found, wanted = (torch.autograd.grad(loss, (hidden, weight)) for loss in (ours, truth))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        assert loss_fn(hidden, weight, labels, prompt_labels=prompt_labels).loss == ours
