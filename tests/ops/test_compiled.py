"""torch.compile over batches of many shapes: eager's values, and no compilation a step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from truth import TRANSFORMS, leaves_of, make_case, needs_of, relative

import fused_prefopt as fp
from fused_prefopt import LMHead, sequence_logps

VOCAB, HIDDEN = 37, 12
SHAPES = ((4, 9), (6, 7), (12, 14), (8, 5))
# Without a label.
EMPTY = (10, 5)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def batch_of(sequences: int, length: int) -> dict[str, Tensor]:
    """Hidden states, labels and everything else that a loss may want, in float64."""
    generator = torch.Generator().manual_seed(sequences)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    labels = torch.randint(VOCAB, (sequences, length), generator=generator)
    is_prompt = torch.arange(length) < 2
    ids = torch.arange(sequences).repeat_interleave(length)
    prompt_labels = labels.where(is_prompt, -100)
    labels = labels.masked_fill(is_prompt, -100)
    labels[0, 4:] = -100
    if (sequences, length) == EMPTY:
        labels[:] = -100
    return {
        "hidden": draw(sequences, length, HIDDEN),
        "labels": labels,
        "sequence_ids": ids,
        "prompt_labels": prompt_labels,
        "reference": -9 - draw(sequences).abs(),
        "prompt_reference": -3 - draw(sequences).abs(),
        "rewards": draw(sequences),
        "desirable": torch.arange(sequences) % 2 == 0,
        "ref_hidden": draw(sequences, length, HIDDEN),
    }


def head_of(weight: Tensor) -> LMHead:
    return LMHead(weight, torch.linspace(-1, 1, VOCAB, dtype=weight.dtype), softcap=9.0)


def packed(hidden: Tensor, weight: Tensor, batch: dict) -> Tensor:
    sequences, rows = batch["reference"].shape[0], batch["labels"].flatten()
    ids = {"sequence_ids": batch["sequence_ids"], "num_sequences": sequences}
    out = fp.sequence_logps(hidden.flatten(0, 1), weight, rows, **ids)
    return out.means + out.sums * out.lengths


def weighted(hidden: Tensor, weight: Tensor, batch: dict) -> Tensor:
    rows, given = batch["labels"].flatten(), {"token_weights": batch["labels"].flatten() % 3 / 2}
    ids = {"sequence_ids": batch["sequence_ids"], "num_sequences": batch["reference"].shape[0]}
    out = fp.sequence_logps(hidden.flatten(0, 1), weight, rows, **ids, **given)
    return out.means + out.sums * out.lengths


def policies(hidden: Tensor, weight: Tensor, batch: dict) -> Tensor:
    tokens = fp.token_policy(hidden, head_of(weight), batch["labels"])
    return tokens.logps + tokens.entropies


def divergences(hidden: Tensor, weight: Tensor, batch: dict) -> Tensor:
    labels, reference = batch["labels"], (batch["ref_hidden"], weight.detach() / 2)
    out = fp.sequence_kl(hidden, head_of(weight), *reference, labels)
    return out.kl + out.policy


def sums_on(path: str):
    def sums(hidden: Tensor, weight: Tensor, batch: dict) -> Tensor:
        options = {"path": path, "num_labels": batch.get("count")}
        return sequence_logps(hidden, head_of(weight), batch["labels"], **options).sums

    return sums


def frozen(hidden: Tensor, weight: Tensor, batch: dict) -> Tensor:
    return sums_on("stash")(hidden, weight.detach(), batch)


FUNCTIONS = {
    "local": sums_on("local"),
    "recompute": sums_on("recompute"),
    "frozen": frozen,
    "packed": packed,
    "weighted": weighted,
    "tokens": lambda hidden, weight, batch: fp.token_logps(hidden, weight, batch["labels"]),
    "policies": policies,
    "divergences": divergences,
}
# Where the number of labels is known.
COUNTED = ("local", "recompute")
LOSSES = {
    "alpha-dpo": ("reference",),
    "gamma-simpo": (),
    "dro": ("reference", "rewards", "prompt_reference", "prompt_labels"),
    "kto": ("reference", "desirable"),
    "beta-dpo": ("reference",),
    "beta-simpo": (),
    "tdpo2": ("ref_hidden", "ref_head"),
}


def assert_compiled_is_eager(
    backend, eager, compiled_from, *, counted=False, empty=False, **options
):
    """Forward and backward over all shapes; from the third on nothing is compiled.

    Args:
        counted: the number of labels is given; a compiler takes a 0 for a constant.
        empty: one batch has no label.
    """
    compiled = torch.compile(compiled_from, backend=backend, **options)
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64)
    weight.requires_grad_()
    for number, shape in enumerate((*SHAPES, EMPTY) if empty else SHAPES):
        batch = batch_of(*shape)
        if counted:
            batch["count"] = int((batch["labels"][:, 1:] != -100).sum())
        hidden = batch.pop("hidden").requires_grad_()
        found = []
        for function in (eager, compiled):
            with torch._dynamo.config.patch(error_on_recompile=number > 1):
                value = function(hidden, weight, batch)
            grads = torch.autograd.grad(
                value.square().sum(), (hidden, weight), allow_unused=True, materialize_grads=True
            )
            found.append((value.detach(), *grads))
        for ours, wanted in zip(*found, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "counted"),
    [*((name, False) for name in FUNCTIONS), *((name, True) for name in COUNTED)],
)
def test_the_op_for_shape_after_shape_without_a_graph_break(name, counted):
    function = FUNCTIONS[name]
    options = {"counted": counted, "empty": not counted, "fullgraph": True}
    assert_compiled_is_eager("aot_eager", function, function, **options)


def loss_of(name):
    # Both of its baselines, and so every statistic that there is.
    options = {"statistics": "reference"} if name == "beta-simpo" else {}
    loss_fn = fp.PreferenceLoss(name, **options)

    def loss(hidden: Tensor, weight: Tensor, batch: dict) -> Tensor:
        given = {"ref_head": weight.detach() / 2} | batch
        extras = {field: given[field] for field in LOSSES[name]}
        return loss_fn(hidden, weight, batch["labels"], **extras).loss

    return loss


# Inductor takes seconds a graph and meets the same graphs as "aot_eager".
@pytest.mark.parametrize(
    ("name", "backend"),
    [(name, "aot_eager") for name in LOSSES]
    + [("alpha-dpo", "eager"), pytest.param("alpha-dpo", "inductor", marks=pytest.mark.slow)],
)
def test_losses_for_shape_after_shape(name, backend):
    if name == "gamma-simpo" and torch.__version__ < "2.9":
        pytest.skip("this torch compiles what follows the queue anew at each step")
    # Two of them: each has statistics of its own, which must go the same way.
    assert_compiled_is_eager(backend, loss_of(name), loss_of(name))


def test_a_compiled_call_still_refuses_a_label_outside_the_vocabulary():
    compiled = torch.compile(FUNCTIONS["tokens"], backend="eager")
    batch = batch_of(4, 6)
    batch["labels"][1, 3] = VOCAB
    with pytest.raises(RuntimeError, match="a label outside the vocabulary"):
        compiled(batch["hidden"], torch.ones(VOCAB, HIDDEN, dtype=torch.float64), batch)


def gradients_of(case, function, needs):
    """d Σ wₛ·sums[s] of `function(hidden, weight, bias, labels)` with respect to what trains."""
    case = leaves_of(case, needs)
    sums = function(case.hidden, case.weight, case.bias, case.labels)
    if sums.requires_grad:
        (sums * torch.linspace(-1, 2, len(sums))).sum().backward()
    grads = [None if t is None else t.grad for t in (case.hidden, case.weight, case.bias)]
    return [sums.detach(), *grads]


def sums_with(case, **options):
    def sums(hidden, weight, bias, labels):
        head = LMHead(weight, bias, **case.options)
        return sequence_logps(hidden, head, labels, **options).sums

    return sums


def assert_same(got, wanted):
    for one, other in zip(got, wanted, strict=True):
        assert one is other is None or torch.equal(one, other)


def test_compiled_with_some_probabilities_kept():
    case = leaves_of(make_case(4, 80, 9, 97, **TRANSFORMS["all"]), (True,) * 3)
    options = {"workspace_mb": 0.1}
    plan = sequence_logps(case.hidden, case.head, case.labels, **options).plan
    assert plan.path == "recompute" and 0 < plan.kept_rows < plan.rows
    function = sums_with(case, **options)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert_same(
        gradients_of(case, compiled, (True,) * 3), gradients_of(case, function, (True,) * 3)
    )


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=False)
def test_compiled_around_the_op():
    case = make_case(3, 6, **TRANSFORMS["all"])
    function = sums_with(case, path="recompute")
    compiled = torch.compile(function, backend="aot_eager")
    wanted = gradients_of(case, function, (True, True, False))
    assert_same(gradients_of(case, compiled, (True, True, False)), wanted)


@pytest.mark.slow
@pytest.mark.parametrize(("path", "view"), [("stash", "contiguous"), ("recompute", "transposed")])
def test_compiled_by_inductor(path, view):
    case = make_case(3, 6, bias=True)
    if view == "transposed":
        case = replace(case, weight=case.weight.t().contiguous().t())

    def loss(hidden, weight, bias, labels):
        out = sequence_logps(hidden * 2, LMHead(weight, bias), labels, path=path)
        return torch.nn.functional.logsigmoid(out.means)

    compiled = torch.compile(loss, fullgraph=True)
    # The compiler's disk cache does not see a change of the op's fake implementation.
    with torch._inductor.config.patch(force_disable_caches=True):
        got = gradients_of(case, compiled, needs_of(path))
    wanted = gradients_of(case, loss, needs_of(path))
    for one, other in zip(got, wanted, strict=True):
        assert one is other is None or relative(one, other) <= 1e-6


def test_forward_mode_is_an_error_where_it_is_compiled():
    batch = batch_of(4, 6)

    def slope(hidden):
        def sums(hidden):
            return sequence_logps(hidden, torch.ones(VOCAB, HIDDEN).double(), batch["labels"]).sums

        return torch.func.jvp(sums, (hidden,), (torch.ones_like(hidden),))

    with pytest.raises(RuntimeError, match="no forward-mode derivative"):
        torch.compile(slope, backend="eager")(batch["hidden"])


def losses_of_training(backend: str | None, folder) -> list[float]:
    """The losses that a trainer logs over batches of many lengths."""
    from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

    from fused_prefopt.data import PairCollator
    from fused_prefopt.integrations.transformers import PreferenceTrainer

    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(3, VOCAB, (count,), generator=generator).tolist()

    rows = [
        {
            "prompt_ids": ids(3 + i % 4),
            "chosen_ids": ids(2 + i % 5),
            "rejected_ids": ids(3 + i % 7),
            "ref_chosen_logps": -9.0,
            "ref_rejected_logps": -10.0,
        }
        for i in range(16)
    ]
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": VOCAB}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        max_steps=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        torch_compile=backend is not None,
        torch_compile_backend=backend,
    )
    trainer = PreferenceTrainer(
        model,
        args,
        loss_fn=fp.PreferenceLoss("alpha-dpo"),
        train_dataset=rows,
        data_collator=PairCollator(0),
    )
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_a_trainer_with_torch_compile(tmp_path):
    pytest.importorskip("accelerate")
    eager, compiled = (losses_of_training(each, tmp_path) for each in (None, "aot_eager"))
    assert len(set(eager)) == 4
    assert compiled == pytest.approx(eager, rel=1e-4)


@pytest.mark.parametrize("kind", ["DPO", "KTO"])
def test_trls_trainers_with_torch_compile_and_a_reference(kind, tmp_path):
    trl = pytest.importorskip("fused_prefopt.integrations.trl")
    from data_tokenizer import tiny_tokenizer
    from datasets import Dataset
    from tiny_models import tiny_llama

    texts = {"prompt": ["the cat", "the mat sat on", "cat"] * 4}
    sides = {"chosen": [" sat on mat", " 1 2", " the mat on"], "rejected": [" on", " sat", " 1 1"]}
    labels = {"completion": sides["chosen"] * 4, "label": [True, False] * 6}
    columns = {name: values * 4 for name, values in sides.items()} if kind == "DPO" else labels
    config, make = getattr(trl, f"Fused{kind}Config"), getattr(trl, f"Fused{kind}Trainer")
    losses = []
    for backend in (None, "aot_eager"):
        torch.compiler.reset()
        args = config(
            output_dir=str(tmp_path),
            bf16=False,
            max_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            torch_compile=backend is not None,
            torch_compile_backend=backend,
            gradient_checkpointing=False,
        )
        trainer = make(
            tiny_llama(),
            tiny_llama(seed=1),
            args=args,
            train_dataset=Dataset.from_dict(texts | columns),
            processing_class=tiny_tokenizer(),
        )
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
