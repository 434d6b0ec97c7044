"""docs/troubleshooting.md quotes what the package prints: each message is provoked and compared."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from data_tokenizer import tiny_tokenizer
from tiny_models import VOCAB, pair_features, tiny_llama

import fused_prefopt as fp
from fused_prefopt import checks, data
from fused_prefopt.cli.main import main
from fused_prefopt.ops import engines
from fused_prefopt.reference import add_reference_logps

datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")
pytest.importorskip("trl")

PAGE = Path(__file__).resolve().parent.parent / "docs" / "troubleshooting.md"
# A message may be broken into lines there.
QUOTED = [
    " ".join(block.split())
    for block in re.findall(r"(?s)```pytb\n(.*?)```", PAGE.read_text(encoding="utf-8"))
]
HIDDEN, WEIGHT = torch.ones(4, 5, 8), torch.ones(64, 8)
LABELS = torch.ones(4, 5, dtype=torch.int64)


def raised(call: Callable[[], object]) -> str:
    """What Python prints last of an uncaught error."""
    with pytest.raises(Exception) as found:
        call()
    return f"{type(found.value).__name__}: {found.value}"


def warned(call: Callable[[], object]) -> str:
    """The last warning of a call."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    return f"{found[-1].category.__name__}: {found[-1].message}"


def trainer_of(loss: str, features: list, model=None, **options):
    """A `PreferenceTrainer` that has not trained."""
    from fused_prefopt.integrations.transformers import PreferenceTrainer

    keys = ("reference", "reference_cache", "compute_metrics", "on_nonfinite")
    ours = {key: options.pop(key) for key in keys if key in options}
    args = transformers.TrainingArguments(
        "out", report_to="none", use_cpu=True, max_steps=2, disable_tqdm=True, **options
    )
    collator = data.PairCollator(0)
    return PreferenceTrainer(
        tiny_llama() if model is None else model,
        args,
        collator,
        train_dataset=features,
        loss_fn=fp.PreferenceLoss(loss),
        **ours,
    )


def no_room():
    head = torch.ones(8192, 8, requires_grad=True)
    return raised(lambda: fp.sequence_logps(HIDDEN, head, LABELS, path="local", workspace_mb=0.5))


def stash_of_a_head_that_trains():
    head = torch.ones(64, 8, requires_grad=True)
    return raised(lambda: fp.sequence_logps(HIDDEN, head, LABELS, path="stash"))


def loss_is_nan():
    rows = pair_features(4)
    for row in rows:
        row |= {"ref_chosen_logps": -1.0, "ref_rejected_logps": -1.0}
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[3, 0] = torch.nan
    return raised(trainer_of("dpo", rows, model).train)


def no_labels():
    loss_fn = fp.PreferenceLoss("simpo")
    return warned(lambda: loss_fn(HIDDEN, WEIGHT, torch.full((4, 5), -100)))


def label_outside():
    labels = torch.full((4, 5), 64)
    return raised(lambda: fp.sequence_logps(HIDDEN, WEIGHT, labels))


def token_outside():
    rows = [{"prompt_ids": [1], "chosen_ids": [61], "rejected_ids": [2]}]
    return raised(lambda: data.PairCollator(0, vocab_size=VOCAB)(rows))


def reference_not_finite():
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[3, 0] = torch.nan
    rows = pair_features(2)
    return raised(lambda: add_reference_logps(model, rows, data.PairCollator(0), progress=False))


def head_with_more():
    model = tiny_llama()
    model.lm_head.scales = torch.nn.Parameter(torch.ones(VOCAB))
    return raised(lambda: fp.LMHead.of(model))


def head_of_integers():
    model = tiny_llama()
    weight = torch.zeros(VOCAB, 16, dtype=torch.int8)
    model.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)
    return raised(lambda: fp.LMHead.of(model))


def layer_before_the_head():
    model = tiny_llama()
    model.norm_before_head = torch.nn.LayerNorm(16)
    return raised(lambda: fp.LMHead.of(model))


def offloaded():
    with torch.device("meta"):
        model = tiny_llama()
    return raised(lambda: fp.LMHead.of(model))


def adapter_without_peft():
    return raised(lambda: trainer_of("dpo", pair_features(4), reference="adapter"))


def no_reference():
    return raised(lambda: trainer_of("dpo", pair_features(4)))


def unknown_loss():
    # Their number is left open: a page must not change with each new loss.
    return re.sub(r"\d+$", "…", raised(lambda: fp.PreferenceLoss("gama-dpo")))


def unknown_option():
    return raised(lambda: fp.PreferenceLoss("dpo", temperatur=1.0))


def needs_scores():
    loss_fn = fp.PreferenceLoss("odpo")
    reference = torch.zeros(4)
    return raised(lambda: loss_fn(HIDDEN, WEIGHT, LABELS, reference=reference))


def of_points_in_a_trainer_of_pairs():
    from fused_prefopt.integrations.trl import FusedDPOConfig

    config = FusedDPOConfig("out", loss="dro", use_cpu=True, bf16=False)
    return raised(config.build_loss)


def loss_beside_trls():
    from fused_prefopt.integrations.trl import FusedDPOConfig

    config = FusedDPOConfig("out", loss="alpha-dpo", loss_type="ipo", use_cpu=True, bf16=False)
    return raised(config.build_loss)


def function_of_logits():
    return raised(lambda: trainer_of("simpo", pair_features(4), compute_metrics=print))


def trls_configuration():
    import trl

    from fused_prefopt.integrations.trl import FusedDPOTrainer

    config = trl.DPOConfig("out", use_cpu=True, bf16=False)
    rows = datasets.Dataset.from_list([{"prompt": "the", "chosen": " cat", "rejected": " mat"}])
    given = {"train_dataset": rows, "processing_class": tiny_tokenizer()}
    return raised(lambda: FusedDPOTrainer(tiny_llama(), args=config, **given))


def old_trl(monkeypatch):
    monkeypatch.setattr(checks, "version", {"trl": "0.24.0"}.__getitem__)
    return raised(lambda: checks.require_version("trl"))


def missing_trl(monkeypatch):
    monkeypatch.setattr(checks, "find_spec", lambda name: None if name == "trl" else name)
    who = "fused_prefopt.integrations.trl"
    return raised(lambda: checks.require_packages(who, "trl", "transformers"))


def stale_cache():
    rows, collator = pair_features(2), data.PairCollator(0)
    kept = {"cache_file": "reference.safetensors", "progress": False}
    add_reference_logps(tiny_llama(0), rows, collator, **kept)
    return raised(lambda: add_reference_logps(tiny_llama(1), rows, collator, **kept))


def damaged_cache():
    rows, collator = pair_features(2), data.PairCollator(0)
    kept = {"cache_file": "reference.safetensors", "progress": False}
    add_reference_logps(tiny_llama(0), rows, collator, **kept)
    path = Path("reference.safetensors")
    path.write_bytes(path.read_bytes()[:-9])
    return raised(lambda: add_reference_logps(tiny_llama(0), rows, collator, **kept))


def no_statistics():
    trainer = trainer_of("gamma-simpo", pair_features(4), save_strategy="steps", save_steps=1)
    trainer.train()
    Path("out/checkpoint-1/preference_loss.pt").unlink()
    again = trainer_of("gamma-simpo", pair_features(4))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        again.train(resume_from_checkpoint="out/checkpoint-1")
    (message,) = (each for each in found if "preference_loss" in str(each.message))
    return f"{message.category.__name__}: {message.message}"


def rows_are_cut(caplog):
    tokenizer = tiny_tokenizer()
    rows = [{"prompt": "the cat", "chosen": "sat on mat", "rejected": "mat"}] * 3
    with caplog.at_level(logging.INFO):
        data.tokenise_pairs(rows, tokenizer, 5, 2)
    (record,) = (each for each in caplog.records if "truncated" in each.getMessage())
    return f"{record.levelname}: {record.getMessage()}"


def triton_is_missing(monkeypatch):
    monkeypatch.setattr(engines.importlib.metadata, "version", missing_version)
    monkeypatch.setattr(engines, "MISSING_TRITON", engines.missing_triton())
    engines._warn_once.cache_clear()
    return warned(lambda: fp.sequence_logps(HIDDEN, WEIGHT, LABELS, engine="triton"))


def missing_version(name):
    raise engines.importlib.metadata.PackageNotFoundError(name)


def triton_on_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if engines.MISSING_TRITON is not None:
        pytest.skip("needs Triton")
    return raised(lambda: fp.sequence_logps(HIDDEN, WEIGHT, LABELS, engine="triton"))


def twice():
    hidden = HIDDEN.clone().requires_grad_()
    sums = fp.sequence_logps(hidden, WEIGHT, LABELS).sums
    (gradient,) = torch.autograd.grad(sums.sum(), hidden, create_graph=True)
    return raised(lambda: gradient.square().sum().backward())


def forward_mode():
    def sums(hidden):
        return fp.sequence_logps(hidden, WEIGHT, LABELS).sums

    return raised(lambda: torch.func.jvp(sums, (HIDDEN,), (HIDDEN,)))


def packed_without_positions():
    from fused_prefopt.models.layout_check import require_separate_sequences

    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        word_embed_proj_dim=16,
    )
    model = transformers.OPTForCausalLM(config)
    ids = torch.zeros(1, 1, dtype=torch.int64)
    return raised(lambda: require_separate_sequences(model, ids))


def unknown_key(capsys):
    Path("run.yaml").write_text("model: folder\noutput_dir: out\nlearning_rat: 1e-3\n")
    assert main(["train", "run.yaml"]) == 2
    return capsys.readouterr().err.strip()


MESSAGES = (
    no_room,
    stash_of_a_head_that_trains,
    loss_is_nan,
    no_labels,
    label_outside,
    token_outside,
    reference_not_finite,
    rows_are_cut,
    head_with_more,
    head_of_integers,
    layer_before_the_head,
    offloaded,
    adapter_without_peft,
    no_reference,
    needs_scores,
    unknown_loss,
    unknown_option,
    of_points_in_a_trainer_of_pairs,
    loss_beside_trls,
    unknown_key,
    function_of_logits,
    trls_configuration,
    packed_without_positions,
    no_statistics,
    stale_cache,
    damaged_cache,
    old_trl,
    missing_trl,
    triton_is_missing,
    triton_on_a_cpu,
    twice,
    forward_mode,
)


@pytest.mark.parametrize("provoke", MESSAGES, ids=lambda provoke: provoke.__name__)
def test_a_quoted_message_is_what_is_printed(provoke, request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wanted = provoke.__code__.co_varnames[: provoke.__code__.co_argcount]
    printed = provoke(*(request.getfixturevalue(name) for name in wanted))
    assert " ".join(printed.split()) in QUOTED


def test_every_quoted_message_is_provoked():
    assert len(QUOTED) == len(set(QUOTED)) == len(MESSAGES)
