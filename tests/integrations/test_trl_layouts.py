"""Layouts of the trainers on top of TRL's: packed rows and shared prompts train as padded ones."""

from __future__ import annotations

import random

import pytest
import torch
import transformers
from learned_prompts import adapter, vivid_llama
from model_families import family
from tiny_models import VOCAB, pair_features, tiny_llama
from trainers import (
    LABELS,
    TIMES,
    build,
    config,
    dataset,
    first_batch,
    held_out,
    history,
    in_order,
    pairs,
    points,
    trl_classes,
)
from weighted_rows import weighted

from fused_prefopt.data import PairCollator
from fused_prefopt.data.columns import SEGMENTS, SEQUENCE_IDS

peft = pytest.importorskip("peft")
pytest.importorskip("trl")

pytestmark = pytest.mark.slow
LAYOUTS = {"padding_free": SEQUENCE_IDS, "shared_prompt": SEGMENTS}
# Plain SGD: what the weights have moved by are the gradients.
STEPS = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.1}
SCORES = {"score_chosen": [3.0, 1.0] * 8, "score_rejected": [0.5, 2.0] * 8}
# Of 16 pairs this cuts more than half, prompts among them where the end is kept.
SHORT = {"max_length": 7, "train_dataset": lambda: cut_pairs()}


def cut_pairs():
    """Pairs of long and short sides, and prompts longer than others' sides."""
    texts = ["the", "the cat sat", "on mat 1 2", "1 2 the cat on"]
    sides = [" sat", " cat on", " 1 2 the mat sat", " on the mat 1 2 cat"]
    rows = [
        {"prompt": prompt, "chosen": sides[(i + j) % 4], "rejected": sides[(i + j + 1 + i % 2) % 4]}
        for i, prompt in enumerate(texts)
        for j in range(4)
    ]
    return dataset(rows)


def fresh_pairs(count):
    """A data set of which nothing has been kept in a cache."""
    return pairs(count, number=[random.random() for _ in range(count)])


def lora_on(*modules):
    """An adapter that TRL puts around the model."""
    return {"peft_config": peft.LoraConfig(r=2, target_modules=list(modules), lora_alpha=64)}


CASES = {
    "a reference model": {},
    "an adapter on the head": {"given": lora_on("q_proj", "lm_head")},
    "a copy of an adapter": {"model": "lora"},
    "precomputed, adapter": {
        "precompute_ref_log_probs": True,
        "precompute_ref_batch_size": 5,
        "given": lora_on("q_proj", "lm_head"),
    },
    "cut at the end": SHORT,
    "cut at the start": SHORT | {"truncation_mode": "keep_end"},
    "cut at the start, precomputed": SHORT
    | {"truncation_mode": "keep_end", "precompute_ref_log_probs": True},
    "scores": {"loss": "odpo", "data": SCORES, "loss_kwargs": {"alpha": 2.0}},
    "divergence": {"loss": "tdpo1"},
    "divergence, adapter": {"loss": "tdpo2", "given": lora_on("q_proj", "v_proj")},
    "collision": {"loss": "wpo"},
    "length desensitised, precomputed": {"ld_alpha": 0.4, "precompute_ref_log_probs": True},
    "statistics": {"loss": "gamma-simpo", "loss_kwargs": {"queue_size": 8}},
    "a sum, weights, accumulated": {
        "loss": ["0.8 dpo", "0.2 bco-pair", "0.3 sft"],
        "train_dataset": lambda: dataset(weighted(pair_features(16))),
        "max_length": 9,
        "precompute_ref_log_probs": True,
        "gradient_accumulation_steps": 2,
    },
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3},
    "checkpointed": {"gradient_checkpointing": True},
    "an evaluation's stream": {"stream": True},
    "incomplete batches dropped": {
        "dataloader_drop_last": True,
        "per_device_train_batch_size": 6,
        "max_steps": 4,
    },
}


def model_of(name):
    if name == "lora":
        options = {"r": 2, "target_modules": ["q_proj", "lm_head"], "init_lora_weights": False}
        torch.manual_seed(3)
        return peft.get_peft_model(tiny_llama(), peft.LoraConfig(**options)).double()
    return tiny_llama().double()


def trained(folder, case, **layout):
    """A float64 trainer after its steps and an evaluation."""
    options = STEPS | case | layout
    train = options.pop("train_dataset", lambda: pairs(**options.pop("data", {})))()
    options.pop("data", None)
    given = {"eval_dataset": pairs(10, **{k: v[:10] for k, v in case.get("data", {}).items()})}
    # Streams that train TRL itself has each process collate.
    if options.pop("stream", False):
        given["eval_dataset"] = held_out("dpo").to_iterable_dataset()
    given |= options.pop("given", {})
    name = options.pop("model", None)
    reference = None if name or case.get("precompute_ref_log_probs") else tiny_llama(5).double()
    if "peft_config" in given or "simpo" in options.get("loss", ""):
        reference = None
    torch.manual_seed(0)
    run = build(
        "dpo",
        folder,
        train,
        model=model_of(name),
        reference=reference,
        given=given,
        log_tokens=True,
        **options,
    )
    run.train()
    run.evaluate()
    return run


def assert_same_runs(ours, plain, *, tokens=True):
    """All that is logged, and all weights."""
    assert len(ours.state.log_history) == len(plain.state.log_history)
    unequal = TIMES if tokens else TIMES | {"num_tokens", "eval_num_tokens"}
    for one, other in zip(ours.state.log_history, plain.state.log_history, strict=True):
        assert one.keys() == other.keys()
        for name in other.keys() - unequal:
            # The models' norms, rotations and softmax are fp32 in any dtype.
            assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6), name
    start = dict(model_of(None).named_parameters())
    values = zip(ours.model.named_parameters(), plain.model.parameters(), strict=True)
    for (name, value), wanted in values:
        moved = wanted - start[name] if name in start else wanted
        assert (value - wanted).norm() <= 1e-5 * moved.norm(), name


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_padded_rows(tmp_path, case):
    plain = trained(tmp_path, CASES[case])
    for layout, key in LAYOUTS.items():
        ours = trained(tmp_path, CASES[case], **{layout: True})
        assert getattr(ours.args, layout) and key in first_batch(ours)
        assert_same_runs(ours, plain, tokens=layout == "padding_free")


def test_rows_are_cut_as_trls_collator_cuts_them(tmp_path):
    """Also where the two sides of a pair are left with different prompts."""
    for mode in ("keep_start", "keep_end"):
        runs = {
            layout: build("dpo", tmp_path, cut_pairs(), truncation_mode=mode, max_length=7, **given)
            for layout, given in (("", {}), *((name, {name: True}) for name in LAYOUTS))
        }
        rows = list(runs[""].train_dataset)
        padded = runs[""].data_collator(rows)
        real = padded["attention_mask"].bool()
        packed = runs["padding_free"].data_collator(rows)
        for name in ("input_ids", "completion_mask"):
            assert packed[name][0].tolist() == padded[name][real].tolist()
        shared = runs["shared_prompt"].data_collator(rows)
        apart = 0
        for i, row in enumerate(shared["segments"]):
            for side, segment in enumerate((1, 2)):
                seen = (row == 0) | (row == segment)
                whole = padded["input_ids"][side * len(rows) + i]
                whole = whole[real[side * len(rows) + i]]
                assert shared["input_ids"][i][seen].tolist() == whole.tolist()
                assert shared["position_ids"][i][seen].tolist() == list(range(len(whole)))
                labelled = shared["completion_mask"][i][seen].sum()
                assert labelled == padded["completion_mask"][side * len(rows) + i].sum()
            apart += int(not (row == 0).any())
        assert (apart > 3) == (mode == "keep_end")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_references_computed_ahead_are_of_the_same_layout(tmp_path, layout, monkeypatch):
    """In the constructor, and of rows that come later."""
    kind, seen = trl_classes("dpo")[0], []
    own = kind.compute_ref_log_probs

    def told(self, model, inputs):
        seen.append(set(inputs))
        return own(self, model, inputs)

    monkeypatch.setattr(kind, "compute_ref_log_probs", told)
    options = {"precompute_ref_log_probs": True, "reference": tiny_llama(5), layout: True}
    data = fresh_pairs(8)
    run = build("dpo", tmp_path, data, **options)
    assert len(seen) == 2 and all(LAYOUTS[layout] in names for names in seen)
    values = [run.train_dataset[name][:] for name in ("ref_chosen_logps", "ref_rejected_logps")]
    plain = build("dpo", tmp_path, data, loss="dpo", reference=tiny_llama(5))
    wanted = plain.compute_ref_log_probs(
        plain.ref_model, plain.data_collator(list(run.train_dataset))
    )
    for found, value in zip(values, wanted, strict=True):
        assert found == pytest.approx(value.tolist(), rel=1e-5)
    later = fresh_pairs(3)
    assert run.evaluate(later)["eval_loss"] > 0
    assert LAYOUTS[layout] in seen[-1] and len(seen) == 4


def test_a_shared_prompts_tokens_are_counted_once(tmp_path):
    rows = pairs()
    for layout, once in (("padding_free", False), ("shared_prompt", True)):
        run = in_order(build("dpo", tmp_path, rows, loss="simpo", **{layout: True}))
        run.train()
        sizes = [
            {name: len(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
            for row in list(run.train_dataset)[:4]
        ]
        total = sum(
            (1 if once else 2) * each["prompt_ids"] + each["chosen_ids"] + each["rejected_ids"]
            for each in sizes
        )
        assert history(run, "num_tokens") == [total]


def test_rows_may_be_padded_to_a_multiple_beside_a_shared_prompt(tmp_path):
    plain, ours = (
        build("dpo", tmp_path, shared_prompt=True, pad_to_multiple_of=multiple, **STEPS)
        for multiple in (None, 8)
    )
    assert first_batch(ours)["input_ids"].shape[1] % 8 == 0
    for run in (plain, ours):
        run.train()
    assert history(ours, "loss") == pytest.approx(history(plain, "loss"), rel=1e-5)


def test_a_collator_of_this_package_brings_its_layout(tmp_path):
    logs = []
    for given, options in (
        ({"data_collator": PairCollator(0, shared_prompt=True)}, {}),
        ({}, {"shared_prompt": True}),
    ):
        run = build("dpo", tmp_path, given=given, **STEPS, **options)
        run.train()
        logs.append(history(run, "loss"))
    assert logs[0] == pytest.approx(logs[1], rel=1e-6)


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        ("kto", {}),
        ("kto", {"precompute_ref_log_probs": True}),
        ("kto", {"max_length": 6}),
        ("kto", {"model": "lora"}),
        ("dro", {"precompute_ref_log_probs": True}),
        ("dro", {}),
    ],
    ids=str,
)
def test_packed_completions_train_as_padded_ones(tmp_path, loss, options):
    runs = []
    for packed in (False, True):
        given = {"eval_dataset": held_out("kto")}
        own = STEPS | {"padding_free": packed, "log_tokens": True} | options
        name = own.pop("model", None)
        reference = None if name or "precompute_ref_log_probs" in options else tiny_llama(5)
        if reference is not None:
            reference = reference.double()
        rows = points(label=LABELS, group=[i // 2 for i in range(16)]) if loss == "dro" else None
        if loss == "dro":
            given = {"eval_dataset": points(6, label=LABELS[4:10], group=[0, 0, 1, 1, 2, 2])}
        torch.manual_seed(0)
        own |= {"model": model_of(name), "reference": reference, "given": given, "loss": loss}
        runs.append(build("kto", tmp_path, rows, **own))
        assert (SEQUENCE_IDS in first_batch(runs[-1])) == packed
        runs[-1].train()
        runs[-1].evaluate()
    assert_same_runs(*reversed(runs))


# What does not go with a layout


SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def leaking():
    """Positions do not tell its sequences apart."""
    torch.manual_seed(0)
    model = transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=2, n_head=2)
    )
    for value in model.parameters():
        torch.nn.init.normal_(value, mean=float(value.dim() == 1), std=0.3)
    return model


def flash():
    model = tiny_llama()
    model.config._attn_implementation = "flash_attention_2"
    return model


def windowed():
    return transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=8))


SEE_ONE_ANOTHER = "padding_free: got a BloomForCausalLM with .* whose packed sequences see one"


@pytest.mark.parametrize(
    ("layout", "model", "message"),
    [
        ("padding_free", leaking, SEE_ONE_ANOTHER),
        ("shared_prompt", flash, "shared_prompt: got a model with attn_implementation='flash_att"),
        (
            "shared_prompt",
            windowed,
            "shared_prompt: got rows of .* the model's sliding window of 8",
        ),
        (
            "shared_prompt",
            lambda: family("mixtral").float(),
            "shared_prompt: got True with a model that adds a router loss.* router_aux_loss_coef=0",
        ),
    ],
)
def test_attention_that_mixes_sequences_is_refused_before_training(
    tmp_path, layout, model, message
):
    with pytest.raises(ValueError, match=message):
        build("dpo", tmp_path, model=model(), loss="simpo", **{layout: True})


def test_so_is_a_references(tmp_path):
    given = {"padding_free": True, "reference": leaking()}
    for ahead in (False, True):
        with pytest.raises(ValueError, match=SEE_ONE_ANOTHER):
            build("dpo", tmp_path, precompute_ref_log_probs=ahead, **given)
    with pytest.raises(ValueError, match=SEE_ONE_ANOTHER):
        build("kto", tmp_path, **given)


def test_experts_may_be_packed(tmp_path):
    """The router loss of a packed row is that of the padded rows' tokens."""
    runs = []
    for packed in (False, True):
        model = family("mixtral").train()
        runs.append(build("dpo", tmp_path, model=model, loss="simpo", padding_free=packed, **STEPS))
        runs[-1].train()
    for name in ("aux_loss", "loss", "grad_norm"):
        first, second = (history(run, name) for run in runs)
        assert len(first) == 3 and second == pytest.approx(first, rel=1e-5), name
    build("dpo", tmp_path, model=model, loss="simpo", shared_prompt=True, router_aux_loss_coef=0.0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_adapter_that_learns_a_prompt_is_refused(tmp_path, layout):
    given = {"peft_config": adapter("prompt")}
    with pytest.raises(ValueError, match=f"^{layout}: got pa.* with an adapter that learns a pro"):
        build("dpo", tmp_path, model=vivid_llama(), given=given, **{layout: True})


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            "dpo",
            {"padding_free": True, "shared_prompt": True},
            "^shared_prompt: got True with padding_free=True, wanted one",
        ),
        (
            "dpo",
            {"padding_free": True, "pad_to_multiple_of": 8},
            "^pad_to_multiple_of: got 8 with padding_free=True",
        ),
        (
            "kto",
            {"padding_free": True, "pad_to_multiple_of": 8},
            "^pad_to_multiple_of: got 8 with padding_free=True",
        ),
        (
            "dpo",
            {"shared_prompt": True, "given": {"data_collator": PairCollator(0)}},
            "^data_collator: got one with shared_prompt=True",
        ),
        (
            "dpo",
            {"shared_prompt": True, "accelerator_config": {"dispatch_batches": True}},
            "^accelerator_config: got dispatch_batches=True, which deals out rows",
        ),
    ],
)
def test_options_that_contradict_a_layout_are_refused(tmp_path, kind, options, message):
    with pytest.raises(ValueError, match=message):
        build(kind, tmp_path, **options)


def test_the_options_are_read_like_any_other(tmp_path):
    words = ["--output_dir", str(tmp_path), "--shared_prompt", "--bf16", "False", "--use_cpu"]
    kind = type(config("dpo", tmp_path))
    (args,) = transformers.HfArgumentParser(kind).parse_args_into_dataclasses(words)
    assert args.shared_prompt and not args.padding_free
