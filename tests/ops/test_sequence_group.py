"""Sequences spread over four processes, and over two pairs of them, against one with all tokens."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import forked
from torch import Tensor
from waits import watched

import fused_prefopt as fp
from fused_prefopt import sequence_kl, sequence_logps
from fused_prefopt.distributed import sum_with_gradient
from fused_prefopt.ops.logps import shared_and_tail_logps

WORLD, SEQUENCES, LENGTH, SIZE, VOCAB = 4, 6, 12, 8, 31
SPLITS = ("contiguous", "scattered")
LAYOUTS = ("padded", "packed")


class Rows:
    """Rows of all sequences: padded ones, of which `length[s]` are tokens and some have labels."""

    def __init__(self, sequences: int = SEQUENCES, dtype: torch.dtype = torch.float64) -> None:
        draw = torch.Generator().manual_seed(3)
        shape = (sequences, LENGTH)
        self.hidden, self.ref_hidden = torch.randn(2, *shape, SIZE, generator=draw).to(dtype)
        self.weight, self.ref_weight = torch.randn(2, VOCAB, SIZE, generator=draw).to(dtype)
        self.labels = torch.randint(VOCAB, shape, generator=draw)
        start = torch.randint(2, 6, (sequences, 1), generator=draw)
        end = torch.randint(6, LENGTH + 1, (sequences, 1), generator=draw)
        places = torch.arange(LENGTH)
        holes = torch.rand(shape, generator=draw) < 0.2
        self.labels[(places < start) | (places >= end) | holes] = -100
        self.labels[2] = -100
        self.token_weights = torch.rand(shape, generator=draw).to(dtype)
        self.position_ids = places.expand(shape)
        self.sequence_ids = torch.arange(sequences)[:, None].expand(shape)


def own_places(layout: str, split: str, rank: int, ranks: int, tokens: int) -> Tensor:
    """Columns of padded rows, or packed rows, that are a rank's; the last has none, if scattered.

    The first of contiguous ones has no label.
    """
    places = torch.arange(tokens)
    if split == "contiguous":
        first = 2
        return places[:first] if rank == 0 else places[first:].tensor_split(ranks - 1)[rank - 1]
    owners = torch.randint(ranks - 1, (tokens,), generator=torch.Generator().manual_seed(5))
    return places[owners == rank]


def arguments(rows: Rows, layout: str, own: Tensor | None) -> tuple[dict, dict]:
    """Tensors with a token axis, of which a part is this rank's; and what goes with them."""
    names = ("hidden", "ref_hidden", "labels", "token_weights", "position_ids", "sequence_ids")
    tokens = {name: getattr(rows, name) for name in names}
    more: dict[str, Any] = {}
    if layout == "packed":
        tokens = {name: values.flatten(0, 1) for name, values in tokens.items()}
        more["num_sequences"] = len(rows.labels)
    if own is not None:
        at = own if layout == "packed" else (slice(None), own)
        tokens = {name: values[at] for name, values in tokens.items()}
    if layout == "packed":
        more["sequence_ids"] = tokens.pop("sequence_ids")
    return tokens, more


def logps(head: Tensor, rows: Rows, tokens: dict, **more: Any) -> dict[str, Tensor]:
    out = sequence_logps(tokens["hidden"], head, tokens["labels"], shift=False, **more)
    return {"sums": out.sums, "lengths": out.lengths}


def weighted(head: Tensor, rows: Rows, tokens: dict, **more: Any) -> dict[str, Tensor]:
    return logps(head, rows, tokens, **more, token_weights=tokens["token_weights"])


def tails(head: Tensor, rows: Rows, tokens: dict, **more: Any) -> dict[str, Tensor]:
    if "sequence_group" in more:
        more["position_ids"] = tokens["position_ids"]
    given = (tokens["hidden"], head, tokens["labels"])
    both = shared_and_tail_logps(*given, shift=False, **more)
    names = ("shared", "tail")
    found = {name: out.sums for name, out in zip(names, both, strict=True)}
    return found | {f"{name}s": out.lengths for name, out in zip(names, both, strict=True)}


def kl(head: Tensor, rows: Rows, tokens: dict, **more: Any) -> dict[str, Tensor]:
    reference = tokens["ref_hidden"], rows.ref_weight
    options = {"shift": False, "perturbation": 0.2} | more
    out = sequence_kl(tokens["hidden"], head, *reference, tokens["labels"], **options)
    return {k: getattr(out, k) for k in out.__dataclass_fields__}


def weighted_kl(head: Tensor, rows: Rows, tokens: dict, **more: Any) -> dict[str, Tensor]:
    return kl(head, rows, tokens, **more, token_weights=tokens["token_weights"])


CALLS = {each.__name__: each for each in (logps, weighted, tails, kl, weighted_kl)}
# More than one collective holds at once.
MANY = 300
CASES = [
    (name, layout, split, SEQUENCES) for name in CALLS for layout in LAYOUTS for split in SPLITS
]
CASES += [("logps", "packed", "scattered", MANY), ("kl", "padded", "contiguous", MANY)]


def step(
    name: str, layout: str, split: str, sequences: int, group: dist.ProcessGroup | None
) -> dict[str, Tensor]:
    """What a call returns, and gradients of a loss that bends every differentiable field."""
    rows = Rows(sequences)
    rows.hidden, head = rows.hidden.requires_grad_(), rows.weight.requires_grad_()
    own, more = None, {}
    if group is not None:
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        size = rows.labels.numel() if layout == "packed" else LENGTH
        own = own_places(layout, split, rank, ranks, size)
        more["sequence_group"] = group
    tokens, given = arguments(rows, layout, own)
    found = CALLS[name](head, rows, tokens, **given, **more)
    slopes = torch.linspace(-1, 2, sequences, dtype=torch.float64)
    trained = [each for each in found.values() if each.requires_grad]
    loss = sum((each.square() / 50 * slopes).sum() for each in trained)
    gradients = torch.autograd.grad(loss, (rows.hidden, head))
    results = {key: value.detach() for key, value in found.items()}
    return results | {
        "trained": torch.tensor(len(trained)),
        "by_hidden": gradients[0],
        "by_head": gradients[1],
    }


def refusals(rank: int, group: dist.ProcessGroup) -> dict[str, str]:
    """Messages of calls in which the ranks disagree, or that cannot be right on any."""
    rows = Rows()
    (padded, _), (packed, ids) = (arguments(rows, layout, None) for layout in LAYOUTS)
    more = {"sequence_group": group}
    first = rank == 0
    fewer = {name: each[: SEQUENCES - 2 * first] for name, each in padded.items()}
    wrong: dict[str, Callable[[], Any]] = {
        "number": lambda: logps(rows.weight, rows, fewer, **more),
        "weights": lambda: (logps if first else weighted)(rows.weight, rows, padded, **more),
        "call": lambda: (kl if first else logps)(rows.weight, rows, padded, **more),
        "tails": lambda: (tails if first else logps)(rows.weight, rows, padded, **more),
        "shift": lambda: sequence_logps(rows.hidden, rows.weight, rows.labels, **more),
        "uncounted": lambda: logps(
            rows.weight, rows, packed, **more, sequence_ids=ids["sequence_ids"]
        ),
        "places": lambda: tails(rows.weight, rows, packed, **ids, **more),
        "no places": lambda: shared_and_tail_logps(
            rows.hidden, rows.weight, rows.labels, shift=False, **more
        ),
        "several times": lambda: fp.PreferenceLoss("gamma-simpo")(
            rows.hidden, rows.weight, rows.labels, shift=False, **more
        ),
    }
    messages = {}
    for name, call in wrong.items():
        with pytest.raises(ValueError) as error:
            call()
        messages[name] = str(error.value)
    with pytest.raises(TypeError) as error:
        sequence_logps(rows.hidden, rows.weight, rows.labels, shift=False, sequence_group="cp")
    return messages | {"type": str(error.value)}


def one_raises(rank: int, group: dist.ProcessGroup) -> dict[str, str]:
    """Messages of calls that are wrong on one rank alone, and of the others about it."""
    rows, messages = Rows(), {}
    tokens, _ = arguments(rows, "padded", None)
    wrong = {name: tokens | {"labels": tokens["labels"] + VOCAB * (rank == 1)} for name in CALLS}
    wrong["tails"] = tokens | {"position_ids": tokens["position_ids"][:, rank == 1 :]}
    for name, given in wrong.items():
        with pytest.raises(ValueError) as error:
            CALLS[name](rows.weight, rows, given, sequence_group=group)
        messages[name] = str(error.value)
    # What another rank's error has ended is over: the next call is exchanged as ever.
    logps(rows.weight, rows, tokens, sequence_group=group)
    return messages


def not_finite(rank: int, group: dist.ProcessGroup) -> dict[str, Tensor]:
    """Sums of sequences of which one rank has a NaN in the first, and their gradient."""
    rows = Rows()
    rows.hidden[0] *= torch.nan if rank == 1 else 1
    rows.hidden.requires_grad_()
    found = logps(rows.weight, rows, arguments(rows, "padded", None)[0], sequence_group=group)
    found["sums"].sum().backward()
    return {"sums": found["sums"].detach(), "by_hidden": rows.hidden.grad}


def waits(group: dist.ProcessGroup) -> dict[str, list[str]]:
    """What Python must know of a device's values in each call, forward and backward."""
    rows, found = Rows(), {}
    rows.hidden.requires_grad_()
    tokens, _ = arguments(rows, "padded", None)
    tokens["position_ids"] = tokens["position_ids"] * WORLD + dist.get_rank(group)
    more = {"sequence_group": group, "num_labels": int((rows.labels != -100).sum())}
    for name, call in CALLS.items():
        with pytest.MonkeyPatch.context() as patch, watched(patch) as seen:
            fields = call(rows.weight, rows, tokens, **more)
            sum(each.sum() for each in fields.values() if each.requires_grad).backward()
        found[name] = seen.found
    return found


def twice(rank: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """First and second derivative of Σ_ranks (Σ_r r x_r)³ by this rank's x, where all x are 2."""
    x = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    (once,) = torch.autograd.grad(sum_with_gradient(x * rank, group) ** 3, x, create_graph=True)
    (again,) = torch.autograd.grad(once, x)
    return once.detach(), again


def compiled(rank: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """(2 Σ_r r x_r)² and its gradient by this rank's x, where all x are 2."""
    x = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    run = torch.compile(lambda x: sum_with_gradient(2 * x * rank, group).square(), backend="eager")
    value = run(x)
    return value.detach(), torch.autograd.grad(value, x)[0]


def warned(rank: int, group: dist.ProcessGroup) -> list[bool]:
    """Whether a loss warns of a batch of which another rank has labels, and of one without any."""
    rows, found = Rows(), []
    for labels in (rows.labels, torch.full_like(rows.labels, -100)):
        own = own_places("padded", "contiguous", rank, WORLD, LENGTH)
        with warnings.catch_warnings(record=True) as messages:
            warnings.simplefilter("always")
            given = rows.hidden[:, own], rows.weight, labels[:, own]
            fp.PreferenceLoss("simpo")(*given, shift=False, sequence_group=group)
        found.append(any("labels: got none" in str(each.message) for each in messages))
    return found


def _work(rank: int) -> dict[str, Any]:
    pairs, every = [dist.new_group([first, first + 1]) for first in (0, 2)], dist.group.WORLD
    groups = {2: pairs[rank // 2], 4: every}
    rows = Rows(dtype=torch.float32)
    single = arguments(rows, "padded", None)[0]
    return {
        "steps": {(ranks, *case): step(*case, groups[ranks]) for ranks in groups for case in CASES},
        "refused": refusals(rank, every),
        "one raises": one_raises(rank, every),
        "not finite": not_finite(rank, every),
        "waits": waits(every),
        "twice": twice(rank, every),
        "compiled": compiled(rank, every),
        "warned": warned(rank, every),
        "single": logps(rows.weight, rows, single, sequence_group=every),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, Any]]:
    return forked(_work, WORLD, tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_shards_equal_whole_sequences(found, ranks, case):
    wanted = step(*case, None)
    shards = [rank["steps"][(ranks, *case)] for rank in found[:ranks]]
    if case[2] == "contiguous":
        assert not shards[0]["by_head"].any(), "the first was to have no label"
    # The mean over the ranks, as DDP takes it.
    for name in ("by_hidden", "by_head"):
        mean = sum(each.pop(name) for each in shards) / ranks
        gradient = wanted.pop(name)
        assert (mean - gradient).norm() <= 1e-12 * gradient.norm()
    for name, value in wanted.items():
        assert all(torch.equal(each[name], shards[0][name]) for each in shards)
        torch.testing.assert_close(shards[0][name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_what_would_be_wrong_is_refused_on_every_rank(found):
    for messages in (rank["refused"] for rank in found):
        for name in ("number", "weights", "call", "tails"):
            assert messages[name].startswith("sequence_group: got "), name
            assert "needs the same call on the same sequences" in messages[name]
        assert "labels are shifted before the split" in messages["shift"]
        assert messages["uncounted"].startswith("num_sequences: got None with a sequence_group")
        assert messages["places"].startswith("position_ids: got two labelled tokens of a sequence")
        assert messages["no places"].startswith("position_ids: got None with a sequence_group")
        assert "would see each pair 4 times" in messages["several times"]
        assert messages["type"].startswith("sequence_group: got a str, wanted a torch.distributed.")


@pytest.mark.slow
def test_tails_alone_wait_for_a_device(found):
    for each in (each["waits"] for each in found):
        # Once for the number of this rank's labels, once for those of all ranks.
        places = [wait.rpartition(":")[2] for wait in each.pop("tails")]
        assert places == ["numbers_in_sequences", "gather_over_ranks"]
        assert not any(each.values()), each


@pytest.mark.slow
def test_where_one_rank_raises_all_do(found):
    for rank, messages in enumerate(each["one raises"] for each in found):
        for name, message in messages.items():
            own = ("position_ids: got shape", "labels: got a label outside")[name != "tails"]
            others = "sequence_group: got an error on another of its ranks"
            assert message.startswith(own if rank == 1 else others), name


@pytest.mark.slow
def test_what_is_not_finite_stays_in_its_sequence(found):
    rows = Rows()
    hidden = rows.hidden.requires_grad_()
    whole = logps(rows.weight, rows, arguments(rows, "padded", None)[0])["sums"] * WORLD
    whole.sum().backward()
    for each in (each["not finite"] for each in found):
        assert each["sums"][0].isnan()
        torch.testing.assert_close(each["sums"][1:], whole[1:].detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(each["by_hidden"][1:], hidden.grad[1:], rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_only_sequences_without_a_label_anywhere_are_warned_of(found):
    assert [each["warned"] for each in found] == [[False, True]] * WORLD


@pytest.mark.slow
def test_the_sum_is_differentiable_twice_and_keeps_dtypes(found):
    rows = Rows()
    whole = logps(rows.weight, rows, arguments(rows, "padded", None)[0])
    wanted = (WORLD * whole["sums"]).float()
    # x Σr = 12: Σ_ranks 3 · 12² r, and of all ranks' together Σ_q q · 4 · 6 · 12 r.
    for rank, each in enumerate(found):
        once, again = each["twice"]
        assert once == 4 * 3 * 12**2 * rank
        assert again == 4 * 6 * 12 * rank * sum(range(WORLD))
        value, gradient = each["compiled"]
        assert value == 24**2 and gradient == 4 * 2 * 24 * 2 * rank
        torch.testing.assert_close(each["single"]["sums"], wanted, rtol=1e-6, atol=1e-6)
        assert each["single"]["lengths"].dtype == torch.int64
