"""Heads in torch's own log-softmax, with the names and the signature of the kernel hub's layers."""

from __future__ import annotations

import hub_calls
import torch
from torch import nn


class EagerHead(nn.Linear):
    """The three layers' values by torch's own log-softmax: what a kernel would stand in for."""

    def forward(self, hidden, labels):
        logits = nn.functional.linear(hidden, self.weight, self.bias)[:, :-1]
        targets = labels[:, 1:]
        logps = logits.log_softmax(-1)
        found = logps.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        entropies = -(logps.exp() * logps).sum(-1)
        shown = [
            nn.functional.pad(value * (targets != -100), (1, 0)) for value in (found, entropies)
        ]
        return self.pick(*shown)

    def pick(self, logps, entropies):
        raise NotImplementedError


class TokenLogpsHead(EagerHead):
    def pick(self, logps, entropies):
        return logps


class SequenceLogpsHead(EagerHead):
    def pick(self, logps, entropies):
        return logps.sum(1)


class TokenPolicyHead(EagerHead):
    def pick(self, logps, entropies):
        return logps, entropies


HEADS = [TokenLogpsHead, SequenceLogpsHead, TokenPolicyHead]


def eager_head(kind: type[EagerHead], bias: bool) -> EagerHead:
    given, head = hub_calls.inputs(), kind(hub_calls.D, hub_calls.V, bias=bias)
    with torch.no_grad():
        head.weight.copy_(given["weight"])
        if bias:
            head.bias.copy_(given["bias"])
    return head


def assert_like_eager(found, wanted):
    assert type(found) is type(wanted)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
