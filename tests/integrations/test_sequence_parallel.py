"""Four processes that share sequences, and batches too, against one with everything."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gathered_attention import gathered_attention
from model_families import family
from processes import forked
from tiny_models import VOCAB, list_features, pair_features, tiny_llama
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AttentionInterface
from waits import watched

import fused_prefopt as fp
from fused_prefopt.data import ListCollator, PairCollator, PointCollator, shard_of
from fused_prefopt.integrations.transformers import attach, preference_outputs

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.slow

WORLD, PAIRS = 4, 4


@dataclass(frozen=True)
class Case:
    """A loss on batches of one layout, shared in one way by this many ranks a sequence."""

    loss: str
    ranks: int = 2
    order: str = "contiguous"
    packed: bool = False
    rows: str = "pairs"
    model: str = "llama"
    weighted: bool = False
    tokens: bool = False
    spent: bool = False
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        kind = f"{'packed' if self.packed else 'padded'}, {self.order}"
        extra = "".join(f", {name}={value}" for name, value in self.options.items())
        extra += "" if self.model == "llama" else f", {self.model}"
        extra += ", one batch spent" if self.spent else ""
        return f"{self.loss}{extra}, {self.rows}, {WORLD // self.ranks}x{self.ranks}, {kind}"


BALANCED = {"order": "balanced"}
# The pool takes all of the past: a sample would depend on the order of the ranks in the queue.
QUEUE = {"queue_size": 16, "sample_size": 16}
CASES = [
    Case("simpo", tokens=True),
    Case("simpo", 4, packed=True, tokens=True, weighted=True),
    Case("simpo", 4, **BALANCED),
    Case("dpo", **BALANCED, packed=True, tokens=True),
    Case("dpo", 4, weighted=True),
    Case("dpo", options={"ld_alpha": 0.3}, **BALANCED),
    Case("dpo", 4, options={"ld_alpha": 0.3}, packed=True),
    Case("tdpo1", weighted=True, **BALANCED),
    Case("tdpo1", 4, packed=True),
    Case("epsilon-dpo"),
    Case("beta-simpo"),
    Case("beta-dpo", 4, **BALANCED),
    Case("gamma-simpo", options=QUEUE),
    Case("gamma-simpo", 4, options=QUEUE, packed=True),
    Case("wpo", weighted=True),
    Case("wpo", 4, packed=True),
    Case("orpo", options={"nll": "whole_token_mean"}, **BALANCED),
    Case("orpo", 4, options={"nll": "whole_token_mean"}, packed=True),
    Case("tpo", packed=True),
    Case("dr-dpo + 0.5 simpo + sft", **BALANCED),
    Case("dro", rows="points"),
    Case("dro", 4, rows="points", packed=True, **BALANCED),
    Case("kto", rows="points"),
    Case("dpo", rows="lists", weighted=True),
    Case("beta-simpo", 4, rows="lists", packed=True),
    Case("dpo", model="adapter", weighted=True),
    Case("tdpo1", 4, model="adapter", packed=True),
    Case("dpo", spent=True, tokens=True),
    Case("dpo", spent=True, options={"ld_alpha": 0.3}, packed=True),
    Case("tdpo1", spent=True, packed=True),
    Case("gamma-simpo", spent=True, options=QUEUE, **BALANCED),
    Case("orpo", spent=True, options={"nll": "whole_token_mean"}),
    Case("wpo", spent=True, packed=True),
    # A product of means over tokens, which are those of one batch.
    Case("simpo", 4, model="qwen3-moe"),
    Case("simpo", 4, model="mixtral", **BALANCED),
]


def features(case: Case) -> list[dict[str, Any]]:
    """Rows whose prompts are longer than a shard: the first of four ranks has no label."""
    torch.manual_seed(7)

    def ids(low: int, high: int) -> list[int]:
        return torch.randint(1, VOCAB, (int(torch.randint(low, high + 1, ())),)).tolist()

    if case.rows == "lists":
        lists = list_features(PAIRS)
        return [row | {"weight": 0.5 + i} if case.weighted else row for i, row in enumerate(lists)]
    points, rows = case.rows == "points", []
    for index in range(PAIRS * (1 + points)):
        row: dict[str, Any] = {"prompt_ids": ids(8, 13)}
        if points:
            row |= {"reward": index / 7, "group": index // 2, "desirable": index % 3 > 0}
        for name in ("completion",) if points else ("chosen", "rejected", "gold"):
            row[f"{name}_ids"] = ids(1, 11)
            if case.weighted:
                size = len(row[f"{name}_ids"])
                row[f"{name}_token_weights"] = torch.rand(size).mul(2).tolist()
        rows.append(row | {"weight": 0.5 + index} if case.weighted and not points else row)
    return rows


@dataclass(frozen=True)
class Place:
    """Where this process is: which batch, which part of its sequences, and with whom."""

    batch: int
    batches: int
    shard: int
    shards: int
    data: dist.ProcessGroup
    sequence: dist.ProcessGroup


def places(rank: int) -> dict[int, Place]:
    """Ranks a sequence → this rank's place."""
    found = {}
    for shards in (2, 4):
        batches = WORLD // shards
        grid = torch.arange(WORLD).view(batches, shards)
        sequence = [dist.new_group(row.tolist()) for row in grid]
        data = [dist.new_group(column.tolist()) for column in grid.T]
        own, shard = divmod(rank, shards)
        found[shards] = Place(own, batches, shard, shards, data[shard], sequence[own])
    return found


def models(case: Case, place: Place | None) -> tuple[nn.Module, nn.Module | str]:
    """A policy and its reference, in float64, whose attention is one over the place's ranks."""
    attention = {}
    if place is not None:
        name = f"gathered_{case.order}_{case.ranks}"
        attention["attn_implementation"] = gathered_attention(name, place.sequence, case.order)
    if case.model == "adapter":
        settings = {"r": 2, "target_modules": ["q_proj", "lm_head"], "init_lora_weights": False}
        model = peft.get_peft_model(tiny_llama(**attention), peft.LoraConfig(**settings))
        return model.double(), "adapter"
    if case.model != "llama":
        model = family(case.model)
        if attention:
            model.set_attn_implementation(attention["attn_implementation"])
        return model.train(), "precomputed"
    return tiny_llama(**attention).double(), tiny_llama(5, **attention).double()


COLLATORS = {"pairs": PairCollator, "points": PointCollator, "lists": ListCollator}


def step(case: Case, place: Place | None) -> dict[str, Any]:
    """Loss, metrics, statistics and all gradients of two steps without an update."""
    model, reference = models(case, place)
    rows, collator = features(case), COLLATORS[case.rows]
    if place is not None:
        size = len(rows) // place.batches
        rows = rows[place.batch * size :][:size]
    elif case.spent:
        rows = rows[: len(rows) * case.ranks // WORLD]
    batch: dict[str, Any] = collator(0, padding_free=case.packed)(rows)
    loss_fn = fp.PreferenceLoss(case.loss, uneven_ranks=case.spent, **case.options)
    attachment = attach(model, loss_fn, reference=reference, log_tokens=case.tokens)
    wrapped: nn.Module = model
    if place is not None:
        batch = shard_of(batch, place.shard, place.shards, order=case.order)
        batch["spent"] = case.spent and place.batch > 0
        attachment.sequence_group, loss_fn.process_group = place.sequence, place.data
        wrapped = DistributedDataParallel(model)
    for _ in range(2):
        wrapped.zero_grad()
        loss = wrapped(**batch)["loss"]
        loss.backward()
    trained = model.named_parameters()
    gradients = {name: value.grad for name, value in trained if value.grad is not None}
    remembered = loss_fn.state_dict().items()
    return {
        "loss": loss.detach(),
        "labels": int((batch["shift_labels"] >= 0).sum()) if place is not None else None,
        "metrics": attachment.pop_metrics("train"),
        # A queue's values come in another order.
        "state": {name: each.flatten().sort().values for name, each in remembered},
        "gradients": gradients,
    }


def refusals(place: Place) -> dict[str, str]:
    """Messages about shards that would be trained on as if they were whole, or cannot be."""
    case = Case("simpo", 4)
    sharing, _ = models(case, place)
    batch = PairCollator(0)(pair_features(2))
    shard = shard_of(batch, place.shard, place.shards)
    group = {"sequence_group": place.sequence}

    def without(*names: str) -> dict[str, Any]:
        return {name: value for name, value in shard.items() if name not in names}

    calls: dict[str, tuple[str, nn.Module, dict[str, Any], dict[str, Any]]] = {
        "attention": ("simpo", tiny_llama(), shard, group),
        "group": ("simpo", sharing, shard, {}),
        "positions": ("simpo", sharing, without("position_ids"), group),
        "prompts": ("dro", sharing, without("shift_prompt_labels"), group),
        "images": ("simpo", sharing, shard | {"pixel_values": torch.zeros(1)}, group),
        "experts": ("simpo", family("mixtral"), without("attention_mask"), group),
    }
    calls["experts"][1].set_attn_implementation("gathered_contiguous_4")
    messages = {}
    for name, (loss, model, given, options) in calls.items():
        loss_fn = fp.PreferenceLoss(loss)
        fields = dict.fromkeys(("reference", "prompt_reference", "rewards"), torch.zeros(4))
        with pytest.raises(ValueError) as error:
            preference_outputs(model, loss_fn, fields | given, **options)
        messages[name] = str(error.value)
    return messages


class Counting(nn.Embedding):
    """An embedding with dropout, and a buffer that counts its calls in train mode."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__(*weight.shape, _weight=weight)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        return nn.functional.dropout(super().forward(ids), 0.1, self.training)


def in_training_alone(name: str, shared: str) -> str:
    """Register an attention that eval mode leaves to each rank, as DeepSpeed's can be."""
    kinds = AttentionInterface()
    spread, own = kinds[shared], kinds["sdpa"]

    def attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (spread if module.training else own)(module, *args, **kwargs)

    AttentionInterface.register(name, attention)
    return name


def trial(place: Place) -> dict[str, Any]:
    """What the trial of a model leaves behind, and when it is made."""
    attention = in_training_alone("in_training_alone", "gathered_contiguous_4")
    model = tiny_llama(attn_implementation=attention).train()
    model.model.embed_tokens = Counting(model.model.embed_tokens.weight.detach())
    passes: list[int] = []
    model.model.register_forward_hook(lambda *_: passes.append(1))
    short = [{"prompt_ids": [3], "chosen_ids": [4], "rejected_ids": [5]}]
    collated = {"short": PairCollator(0)(short), "long": PairCollator(0)(pair_features(2))}
    shards = {k: shard_of(each, place.shard, place.shards) for k, each in collated.items()}
    counts, states, losses = [], [], []
    for name in ("short", "long", "long"):
        torch.manual_seed(3)
        given = fp.PreferenceLoss("simpo"), shards[name]
        losses.append(preference_outputs(model, *given, sequence_group=place.sequence).loss)
        counts.append((len(passes), int(model.model.embed_tokens.calls)))
        states.append(torch.random.get_rng_state())
    with pytest.raises(ValueError) as error:
        preference_outputs(model.eval(), *given, sequence_group=place.sequence)
    return {
        "counts": counts,
        "alike": torch.equal(*states[1:]) and bool(losses[1] == losses[2]),
        "eval": str(error.value),
    }


def exchanged(place: Place) -> tuple[list[tuple[int, torch.dtype]], list[str]]:
    """Sizes of our sums in a step of DPO with a reference beside it and WPO's weights; waits."""
    sizes: list[tuple[int, torch.dtype]] = []
    reduce = dist.all_reduce

    def noted(values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # Of the attention there is more to sum.
        if values.dim() < 2:
            sizes.append((values.numel(), values.dtype))
        return reduce(values, *args, **kwargs)

    model, reference = models(Case("dpo", 4), place)
    batch = shard_of(PairCollator(0)(pair_features(2)), place.shard, place.shards)
    loss_fn = fp.PreferenceLoss("dpo", use_weighting=True)
    attachment = attach(model, loss_fn, reference=reference)
    attachment.sequence_group = place.sequence
    model(**batch)["loss"].backward()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", noted)
        with watched(patch) as waits:
            model(**batch)["loss"].backward()
    return sizes, waits.found


def _work(rank: int) -> dict[str, Any]:
    own = places(rank)
    steps = [step(case, own[case.ranks]) for case in CASES]
    return {
        "steps": steps,
        "refused": refusals(own[4]),
        "trial": trial(own[4]),
        "exchanged": exchanged(own[4]),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    return forked(_work, WORLD, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shards_of_sequences_equal_one_process(ranks, case):
    wanted = step(case, None)
    found = [rank["steps"][CASES.index(case)] for rank in ranks]
    mean = sum(each["loss"] for each in found) / WORLD
    torch.testing.assert_close(mean, wanted["loss"], rtol=1e-9, atol=1e-12)
    for rank, each in enumerate(found):
        assert each["loss"] == found[rank - rank % case.ranks]["loss"]
        assert each["metrics"] == pytest.approx(wanted["metrics"], rel=1e-9, abs=1e-9)
        assert each["state"].keys() == wanted["state"].keys()
        for name, value in wanted["state"].items():
            options = {"rtol": 1e-9, "atol": 1e-12, "equal_nan": True}
            torch.testing.assert_close(each["state"][name], value, **options)
        assert each["gradients"].keys() == wanted["gradients"].keys()
        for name, value in wanted["gradients"].items():
            assert (each["gradients"][name] - value).norm() <= 1e-9 * value.norm(), name


def test_a_shard_that_would_be_taken_for_a_whole_is_refused(ranks):
    for messages in (rank["refused"] for rank in ranks):
        assert "in which no token sees those of other ranks" in messages["attention"]
        assert messages["group"].startswith(
            "sequence_group: got None for a batch with shift_labels"
        )
        assert messages["positions"].startswith("position_ids: got none with shift_labels")
        assert messages["prompts"].startswith("shift_prompt_labels: got none with shift_labels")
        assert "a shard with images (pixel_values)" in messages["images"]
        assert messages["experts"].startswith("attention_mask: got none in a shard of a model")


def test_the_trial_is_made_once_a_mode_and_leaves_no_trace(ranks):
    for found in (rank["trial"] for rank in ranks):
        # Nothing to tell of a sequence within one rank; then two passes more, of which none counts.
        assert found["counts"] == [(1, 1), (4, 2), (5, 3)]
        assert found["alike"]
        assert "in_training_alone attention in eval mode, in which no token sees" in found["eval"]


def test_a_pass_over_a_head_sums_4_kb_and_waits_for_no_device(ranks):
    # Of the reference, the policy and its collisions; and of the policy's backward.
    assert all(rank["exchanged"] == ([(512, torch.float64)] * 4, []) for rank in ranks)


def test_a_rank_has_no_label(ranks):
    labels = [rank["steps"][CASES.index(Case("dpo", 4, weighted=True))]["labels"] for rank in ranks]
    assert labels[0] == 0 and all(labels[1:])
