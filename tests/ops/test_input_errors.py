"""Bad calls: the message names the argument, what it was and what was wanted."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from fused_prefopt import (
    LMHead,
    PreferenceLoss,
    sequence_kl,
    sequence_logps,
    token_logps,
    token_policy,
    token_statistics,
)

S, T, D, V = 2, 5, 4, 11


def arguments(**changes: Any) -> dict[str, Any]:
    """Valid arguments of the padded layout, with changes."""
    generator = torch.Generator().manual_seed(0)
    valid = {
        "hidden": torch.randn(S, T, D, generator=generator),
        "head": torch.randn(V, D, generator=generator),
        "labels": torch.randint(0, V, (S, T), generator=generator),
    }
    return valid | changes


def packed(**changes: Any) -> dict[str, Any]:
    """Valid arguments of the packed layout, with changes."""
    valid = arguments()
    return {
        "hidden": valid["hidden"].flatten(0, 1),
        "head": valid["head"],
        "labels": valid["labels"].flatten(),
        "sequence_ids": torch.arange(S).repeat_interleave(T),
    } | changes


def labels_with(value: int) -> torch.Tensor:
    labels = torch.zeros(S, T, dtype=torch.long)
    labels[1, 3] = value
    return labels


def trained(*size: int) -> torch.Tensor:
    return torch.ones(*size, requires_grad=True)


ERRORS = {
    "label beyond the vocabulary": (
        arguments(labels=labels_with(V)),
        ["labels", f"outside [0, {V})"],
    ),
    "negative label": (arguments(labels=labels_with(-1)), ["labels", f"outside [0, {V})"]),
    "other ignore_index": (
        arguments(labels=labels_with(-100), ignore_index=-1),
        ["labels", f"outside [0, {V})"],
    ),
    "label in the padded vocabulary": (
        arguments(head=LMHead(torch.ones(V, D), valid_vocab=V - 3), labels=labels_with(V - 3)),
        ["labels", f"outside [0, {V - 3})"],
    ),
    "packed label beyond the vocabulary": (
        packed(labels=labels_with(V).flatten()),
        ["labels", f"outside [0, {V})"],
    ),
    "hidden of one dimension": (
        arguments(hidden=torch.ones(D)),
        ["hidden", f"({D},)", f"(N, {D})"],
    ),
    "hidden of four dimensions": (
        arguments(hidden=torch.ones(1, S, T, D)),
        ["hidden", f"(1, {S}, {T}, {D})", f"(N, {D})"],
    ),
    "hidden too wide": (
        arguments(hidden=torch.ones(S, T, D + 1)),
        ["hidden", f"({S}, {T}, {D + 1})", f"(S, T, {D})"],
    ),
    "packed hidden too wide": (
        packed(hidden=torch.ones(S * T, D + 1)),
        ["hidden", f"({S * T}, {D + 1})", f"(N, {D})"],
    ),
    "integer hidden": (
        arguments(hidden=torch.ones(S, T, D, dtype=torch.long)),
        ["hidden", "torch.int64", "floating"],
    ),
    "labels too long": (
        arguments(labels=torch.zeros(S, T + 1, dtype=torch.long)),
        ["labels", f"({S}, {T + 1})", f"({S}, {T})"],
    ),
    "labels of one dimension": (
        arguments(labels=torch.zeros(S * T, dtype=torch.long)),
        ["labels", f"({S * T},)", f"({S}, {T})"],
    ),
    "packed labels too short": (
        packed(labels=torch.zeros(S * T - 1, dtype=torch.long)),
        ["labels", f"({S * T - 1},)", f"({S * T})"],
    ),
    "floating labels": (arguments(labels=torch.zeros(S, T)), ["labels", "torch.float32"]),
    "boolean labels": (
        arguments(labels=torch.zeros(S, T, dtype=torch.bool)),
        ["labels", "torch.bool", "integer"],
    ),
    "labels on another device": (
        arguments(labels=torch.zeros(S, T, dtype=torch.long, device="meta")),
        ["labels", "meta", "cpu"],
    ),
    "weight on another device": (
        arguments(head=torch.ones(V, D, device="meta")),
        ["weight", "meta", "cpu"],
    ),
    "weight of one dimension": (arguments(head=torch.ones(V)), ["weight", f"({V},)", "(V, D)"]),
    "integer weight": (
        arguments(head=torch.ones(V, D, dtype=torch.int8)),
        ["weight", "torch.int8", "floating"],
    ),
    "unknown path": (arguments(path="fast"), ["path", "'fast'", "'recompute'"]),
    "unknown engine": (arguments(engine="cuda"), ["engine", "'cuda'", "'torch'"]),
    "no workspace": (arguments(workspace_mb=0), ["workspace_mb", "0", "> 0"]),
    "negative workspace": (arguments(workspace_mb=-1), ["workspace_mb", "-1", "> 0"]),
    "workspace that is no number": (
        arguments(workspace_mb=float("nan")),
        ["workspace_mb", "nan", "> 0"],
    ),
    "stash with a training weight": (
        arguments(head=trained(V, D), path="stash"),
        ["path", "'stash'", "weight or bias"],
    ),
    "stash with a training bias": (
        arguments(head=LMHead(torch.ones(V, D), trained(V)), path="stash"),
        ["path", "'stash'", "weight or bias"],
    ),
    "local that does not fit": (
        arguments(head=trained(V, D), path="local", workspace_mb=1e-6),
        ["path", "'local'", "workspace_mb", f"8 rows x {V} entries"],
    ),
    "packed without sequence_ids": (packed(sequence_ids=None), ["sequence_ids", "None", "(N,)"]),
    "padded with sequence_ids": (
        arguments(sequence_ids=torch.zeros(S, T, dtype=torch.long)),
        ["sequence_ids", "packed"],
    ),
    "sequence_ids too short": (
        packed(sequence_ids=torch.zeros(3, dtype=torch.long)),
        ["sequence_ids", "(3,)", f"({S * T})"],
    ),
    "floating sequence_ids": (
        packed(sequence_ids=torch.zeros(S * T)),
        ["sequence_ids", "torch.float32", "integer"],
    ),
    "negative sequence id": (
        packed(sequence_ids=torch.full((S * T,), -1)),
        ["sequence_ids", "outside [0, "],
    ),
    "sequence id beyond num_sequences": (
        packed(num_sequences=1),
        ["sequence_ids", "outside [0, 1)"],
    ),
    "negative num_sequences": (packed(num_sequences=-1), ["num_sequences", "-1"]),
    "hidden without values": (
        arguments(
            hidden=torch.ones(S, T, D, device="meta"),
            labels=torch.zeros(S, T, dtype=torch.long, device="meta"),
            head=torch.ones(V, D, device="meta"),
        ),
        ["hidden", "meta", "values"],
    ),
    "no hidden size": (
        arguments(hidden=torch.ones(S, T, 0), head=torch.ones(V, 0)),
        ["weight", f"({V}, 0)", "D > 0"],
    ),
    "no vocabulary": (arguments(head=torch.ones(0, D)), ["weight", f"(0, {D})", "V > 0"]),
    "too many labels announced": (arguments(num_labels=S * T), ["num_labels", f"{S * T}"]),
    "too few labels announced": (arguments(num_labels=0), ["num_labels", "0"]),
    "negative number of labels announced": (arguments(num_labels=-1), ["num_labels", "-1"]),
}


@pytest.mark.parametrize("call", [sequence_logps, token_logps])
@pytest.mark.parametrize("case", ERRORS)
def test_bad_arguments(case, call):
    given, wanted = ERRORS[case]
    with pytest.raises(ValueError) as error:
        call(**given)
    for part in wanted:
        assert re.search(re.escape(part), str(error.value)), str(error.value)


@pytest.mark.parametrize("call", [sequence_logps, token_logps, token_policy, token_statistics])
@pytest.mark.parametrize(
    "head",
    [[[1.0] * D] * V, np.ones((V, D), dtype=np.float32), "lm_head", None, torch.nn.ReLU()],
    ids=lambda head: type(head).__name__,
)
def test_a_head_that_is_none_is_named(head, call):
    with pytest.raises(TypeError, match=f"head: got a {type(head).__name__}, wanted an LMHead"):
        call(**arguments(head=head))


def test_a_reference_head_that_is_none_is_named():
    given = arguments()
    with pytest.raises(TypeError, match="ref_head: got a list, wanted an LMHead"):
        sequence_kl(given["hidden"], given["head"], given["hidden"], [1.0], given["labels"])


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_a_head(bias):
    layer, given = torch.nn.Linear(D, V, bias=bias), arguments()
    found = sequence_logps(given["hidden"], layer, given["labels"]).sums
    wanted = sequence_logps(given["hidden"], LMHead(layer.weight, layer.bias), given["labels"]).sums
    assert torch.equal(found, wanted)
    read = LMHead.of(layer)
    assert read.weight is layer.weight and read.bias is layer.bias
    loss_fn = PreferenceLoss("simpo")
    assert torch.equal(
        loss_fn(given["hidden"], layer, given["labels"]).loss,
        loss_fn(given["hidden"], read, given["labels"]).loss,
    )


def test_a_linear_layer_with_a_forward_of_its_own_is_no_head():
    class Normalised(torch.nn.Linear):
        def forward(self, hidden):
            return torch.nn.functional.linear(hidden, self.weight / self.weight.norm())

    with pytest.raises(TypeError, match="head: got a Normalised, wanted an LMHead"):
        sequence_logps(**arguments(head=Normalised(D, V)))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"path": "foo"}, "path: got 'foo', wanted one of 'auto', 'evaluate'"),
        ({"engine": "foo"}, "engine: got 'foo', wanted one of 'auto', 'torch'"),
        ({"workspace_mb": -1}, "workspace_mb: got -1, wanted a finite number > 0"),
        ({"workspace_mb": float("inf")}, "workspace_mb: got inf"),
        ({"workspace_mb": "big"}, "workspace_mb: got 'big'"),
        ({"drop_mass": 2}, "drop_mass: got 2, wanted a finite number >= 0 and < 1"),
    ],
    ids=str,
)
def test_a_loss_refuses_options_of_the_op_when_it_is_made(option, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PreferenceLoss("dpo", **option)


HEADS = {
    "bias too long": ({"bias": torch.ones(V + 1)}, ["bias", f"({V + 1},)", f"({V})"]),
    "bias of two dimensions": ({"bias": torch.ones(V, 1)}, ["bias", f"({V}, 1)", f"({V})"]),
    "integer bias": ({"bias": torch.ones(V, dtype=torch.long)}, ["bias", "torch.int64"]),
    "bias on another device": ({"bias": torch.ones(V, device="meta")}, ["bias", "meta", "cpu"]),
    "softcap 0": ({"softcap": 0.0}, ["softcap", "0.0", "> 0"]),
    "negative softcap": ({"softcap": -3.0}, ["softcap", "-3.0", "> 0"]),
    "temperature 0": ({"temperature": 0.0}, ["temperature", "0.0", "> 0"]),
    "temperature nan": ({"temperature": float("nan")}, ["temperature", "nan", "> 0"]),
    "no vocabulary": ({"valid_vocab": 0}, ["valid_vocab", "0", f"1..{V}"]),
    "too much vocabulary": ({"valid_vocab": V + 1}, ["valid_vocab", f"{V + 1}", f"1..{V}"]),
}


@pytest.mark.parametrize("case", HEADS)
def test_bad_heads(case):
    given, wanted = HEADS[case]
    with pytest.raises(ValueError) as error:
        LMHead(torch.ones(V, D), **given)
    for part in wanted:
        assert part in str(error.value)


def test_without_gradients_every_forced_path_may_evaluate():
    given = arguments(head=trained(V, D))
    with torch.no_grad():
        plans = {p: sequence_logps(**given, path=p).plan.path for p in ("stash", "local", "auto")}
    assert set(plans.values()) == {"evaluate"}


@pytest.mark.parametrize("packing", [arguments, packed])
def test_the_valid_arguments_of_these_tests_are_valid(packing):
    assert sequence_logps(**packing()).sums.shape == (S,)
