"""What PEFT does to a head: values, all gradients, and the reference behind the adapters."""

from __future__ import annotations

import copy

import pytest
import torch

import fused_prefopt as fp

peft = pytest.importorskip("peft")

from model_families import assert_gradients, assert_same, family, fused, pairs  # noqa: E402
from truth import largest_error  # noqa: E402

from fused_prefopt.integrations.collated import completion_logps  # noqa: E402
from fused_prefopt.integrations.head_check import check_head  # noqa: E402
from fused_prefopt.integrations.reference_pass import Reference  # noqa: E402
from fused_prefopt.integrations.transformers import attach  # noqa: E402

BODY = ["q_proj", "v_proj"]
# Name → family, options of LoRA, whether the head itself trains (else its weight stays frozen).
CASES = {
    "body": ("llama", {"target_modules": BODY}, False),
    "body of a tied model": ("qwen2", {"target_modules": BODY}, False),
    "head": ("llama", {"target_modules": [*BODY, "lm_head"]}, False),
    "head of a tied model": ("gemma2", {"target_modules": [*BODY, "lm_head"]}, False),
    "head with a bias": ("phi", {"target_modules": [*BODY, "lm_head"]}, False),
    "copy of the head": ("llama", {"target_modules": BODY, "modules_to_save": ["lm_head"]}, True),
    "copy of a head with a bias": (
        "phi",
        {"target_modules": BODY, "modules_to_save": ["lm_head"]},
        True,
    ),
    "copy of a tied head, untied": (
        "gemma2",
        {"target_modules": BODY, "modules_to_save": ["lm_head"]},
        True,
    ),
    "copy of a tied embedding, tied": (
        "qwen2",
        {"target_modules": BODY, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        True,
    ),
    "copy of a tied embedding, untied": (
        "qwen2",
        {"target_modules": BODY, "modules_to_save": ["embed_tokens"]},
        False,
    ),
    "tied embedding": ("qwen2", {"target_modules": [*BODY, "embed_tokens"]}, False),
    "tied embedding and head": (
        "qwen2",
        {"target_modules": [*BODY, "embed_tokens"], "ensure_weight_tying": True},
        False,
    ),
    "embedding of gpt2": ("gpt2", {"target_modules": ["c_attn", "wte"]}, False),
    "tokens of a tied model": (
        "qwen2",
        {"target_modules": BODY, "trainable_token_indices": [3, 17, 88]},
        False,
    ),
    "tokens of a tied model with a softcap": (
        "gemma2",
        {"target_modules": BODY, "trainable_token_indices": {"embed_tokens": [4, 17]}},
        False,
    ),
    "tokens of the embedding alone": (
        "llama",
        {"target_modules": BODY, "trainable_token_indices": {"embed_tokens": [3, 17]}},
        False,
    ),
    "tokens of embedding and head": (
        "llama",
        {
            "target_modules": BODY,
            "trainable_token_indices": {"embed_tokens": [3, 17], "lm_head": [5, 60, 61]},
        },
        False,
    ),
}
PATHS = ("auto", "local", "recompute")


def adapted(name):
    """A float64 model with its adapters off their start, and the model before it."""
    kind, options, _ = CASES[name]
    base = family(kind)
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, **options)).double()
    moved(model)
    return model.eval(), base


def moved(model, seed=2):
    """Draw what trains a little away from where it is."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in {id(p): p for p in model.parameters() if p.requires_grad}.values():
            value.add_(torch.randn(value.shape, generator=generator).to(value) * 0.3)


@pytest.mark.parametrize("name", CASES)
def test_loss_and_all_gradients_are_those_of_the_models_own_logits(name):
    model, _ = adapted(name)
    assert_same(model, pairs())
    check_head(model)


@pytest.mark.parametrize("name", CASES)
def test_a_frozen_weight_takes_the_stash(name):
    model, _ = adapted(name)
    head = fp.LMHead.of(model)
    hidden = torch.ones(2, 3, 32, dtype=torch.float64, requires_grad=True)
    plan = fp.sequence_logps(hidden, head, torch.ones(2, 3, dtype=torch.int64)).plan
    low_rank_trains = any(term.b.requires_grad for term in head.low_rank)
    assert head.weight.requires_grad == CASES[name][2]
    assert (plan.path == "stash") == (not head.weight.requires_grad and not low_rank_trains)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["head", "copy of the head", "tokens of embedding and head"])
def test_every_path(name, path):
    assert_same(adapted(name)[0], pairs(), path=path)


@pytest.mark.parametrize("name", CASES)
def test_the_reference_behind_the_adapters_is_the_model_before_them(name):
    model, base = adapted(name)
    batch = pairs()
    wanted = completion_logps(base, batch)["completion"]
    got = Reference(model, "adapter").logps(batch, prompt=False)["reference"]
    assert largest_error(got, wanted) <= 1e-10
    trained = completion_logps(model, batch)["completion"]
    assert largest_error(trained, wanted) > 1e-3
    with model.disable_adapter():
        assert fp.LMHead.of(model).low_rank == ()
        check_head(model)
    assert torch.equal(completion_logps(model, batch)["completion"], trained)


def test_gradients_with_an_adapter_as_reference_are_those_with_a_copy():
    model, base = adapted("tokens of a tied model")
    batch = pairs()
    found = []
    for reference in (Reference(model, "adapter"), Reference(base, base)):
        logps = reference.logps(batch, prompt=False)["reference"]
        chosen, rejected = logps.chunk(2)
        given = batch | {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
        found.append(fused(model, given, name="dpo"))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-12, atol=0)
    assert_gradients(found[0][1], found[1][1], 1e-9)


def test_trained_tokens_are_no_copy_of_the_weight():
    model, base = adapted("tokens of embedding and head")
    head = fp.LMHead.of(model)
    assert head.weight is model.get_output_embeddings().token_adapter.base_layer.weight
    (term,) = head.low_rank
    assert term.a.shape == (3, 32) and term.b.shape == (101, 3)
    rows = term.b @ term.a + head.weight
    changed = (rows - base.lm_head.weight).abs().sum(1).nonzero()[:, 0]
    assert changed.tolist() == [5, 60, 61]


def test_tokens_as_an_adapter_of_their_own():
    config = peft.TrainableTokensConfig(token_indices=[3, 17], target_modules=["embed_tokens"])
    model = peft.get_peft_model(family("qwen2"), config).double().eval()
    moved(model)
    assert_same(model, pairs())
    assert len(fp.LMHead.of(model).low_rank) == 1


def test_tokens_merged_into_the_weight():
    model, _ = adapted("tokens of a tied model")
    before = completion_logps(model, pairs())["completion"]
    merged = model.merge_and_unload()
    assert fp.LMHead.of(merged).low_rank == ()
    assert largest_error(completion_logps(merged, pairs())["completion"], before) <= 1e-10


def test_tokens_of_a_head_with_a_bias_are_an_error():
    config = peft.LoraConfig(target_modules=BODY, trainable_token_indices={"lm_head": [3]})
    model = peft.get_peft_model(family("phi"), config)
    with pytest.raises(ValueError, match="needs a linear layer without bias"):
        fp.LMHead.of(model)


OTHERS = {
    "AdaLoraConfig": {"total_step": 10},
    "BOFTConfig": {},
    "FourierFTConfig": {"n_frequency": 8},
    "HRAConfig": {"r": 2},
    "IA3Config": {"feedforward_modules": []},
    "LNTuningConfig": {},
    "LoHaConfig": {},
    "LoKrConfig": {},
    "OFTConfig": {},
    "RandLoraConfig": {},
    "VeraConfig": {},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_adapters_on_the_head_are_an_error(kind):
    config = getattr(peft, kind)(target_modules=["lm_head"], **OTHERS[kind])
    model = peft.get_peft_model(family("llama"), config)
    for read in (fp.LMHead.of, check_head):
        with pytest.raises(ValueError, match="which weight and bias alone do not describe"):
            read(model)
    with pytest.raises(ValueError, match="which weight and bias alone do not describe"):
        attach(model, fp.PreferenceLoss("simpo"))


VARIANTS = {
    "DoRA": {"use_dora": True},
    "a bias": {"lora_bias": True},
    "an activated one": {"alora_invocation_tokens": [3]},
}


@pytest.mark.parametrize("kind", VARIANTS)
def test_variants_of_low_rank_terms_on_the_head_are_an_error(kind):
    if not set(VARIANTS[kind]) <= set(peft.LoraConfig.__dataclass_fields__):
        pytest.skip(f"this PEFT has no {', '.join(VARIANTS[kind])}")
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], **VARIANTS[kind])
    model = peft.get_peft_model(family("llama"), config)
    with pytest.raises(ValueError, match="its head is not plain LoRA without bias"):
        fp.LMHead.of(model)
