"""On a GPU: no wait from a collator's hidden states to the gradients, and heads on a second GPU."""

from __future__ import annotations

import pytest
import torch
from tiny_models import VOCAB, pair_features, point_features, tiny_llama
from truth import make_case

from fused_prefopt import PreferenceLoss, sequence_logps
from fused_prefopt.data import PairCollator, PointCollator
from fused_prefopt.integrations.collated import collated_rows
from fused_prefopt.ops.engines import ENGINES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
PAIRS = {
    "padded": PairCollator(0),
    "packed": PairCollator(0, padding_free=True),
    "shared prompts": PairCollator(0, shared_prompt=True),
}


def step(loss_fn, collator, features):
    """Hidden states of a batch, and a function that goes from them to their gradient."""
    model = tiny_llama().cuda()
    batch = collator(features)
    batch = {
        name: value.cuda() if torch.is_tensor(value) else value for name, value in batch.items()
    }
    rows = collated_rows(model, batch, prompt=not loss_fn.loss.pairwise)
    hidden = rows.hidden.detach().requires_grad_()
    weight = model.lm_head.weight
    sequences = rows.layout.get("num_sequences", len(features) * (1 + loss_fn.loss.pairwise))
    known = {
        "reference": torch.linspace(-9, -3, sequences, device="cuda"),
        "prompt_reference": torch.linspace(-9, -3, sequences, device="cuda"),
        "rewards": torch.linspace(-1, 1, sequences, device="cuda"),
    }
    given = {name: value for name, value in known.items() if name in loss_fn.loss.needs}
    if rows.prompt_labels is not None:
        given |= {
            "prompt_labels": rows.prompt_labels,
            "num_prompt_labels": rows.num_prompt_labels,
        }

    def run():
        loss_fn(hidden, weight, rows.labels, **rows.layout, **given).loss.backward()

    return run


def assert_no_wait(run):
    run()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("layout", PAIRS)
@pytest.mark.parametrize("name", ["dpo", "alpha-dpo", "gamma-dpo", "simpo"])
def test_no_waits_on_pairs(name, layout, engine):
    loss_fn = PreferenceLoss(name, engine=engine).cuda()
    assert_no_wait(step(loss_fn, PAIRS[layout], pair_features(6)))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("padding_free", [False, True])
def test_no_waits_on_points(engine, padding_free):
    loss_fn = PreferenceLoss("dro", engine=engine).cuda()
    collator = PointCollator(0, padding_free=padding_free)
    assert_no_wait(step(loss_fn, collator, point_features(6)))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("path", ["evaluate", "stash", "local", "recompute"])
def test_a_head_on_the_second_gpu(path, engine):
    case = make_case(4, 11, 16, VOCAB)
    found = []
    for device in ("cuda:0", "cuda:1"):
        hidden, weight = case.hidden.to(device), case.weight.to(device)
        hidden.requires_grad_(path != "evaluate")
        weight.requires_grad_(path in ("local", "recompute"))
        labels = case.labels.to(device)
        assert torch.cuda.current_device() == 0
        out = sequence_logps(hidden, weight, labels, path=path, engine=engine)
        if path != "evaluate":
            out.sums.sum().backward()
        assert torch.cuda.current_device() == 0
        grads = [each.grad for each in (hidden, weight) if each.grad is not None]
        found.append([each.detach().cpu() for each in (out.sums, *grads)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
