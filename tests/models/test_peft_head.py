"""What PEFT does to a head: values, all gradients, and the reference behind the adapters."""

from __future__ import annotations

import copy

import pytest
import torch
from model_families import (
    assert_gradients,
    assert_same,
    family,
    fused,
    own_loss,
    pairs,
)
from tiny_models import pair_features, tiny_llama
from truth import largest_error

import fused_prefopt as fp
from fused_prefopt.data import PairCollator
from fused_prefopt.integrations.attach import Reference
from fused_prefopt.integrations.transformers import attach, preference_outputs
from fused_prefopt.models.batch import completion_logps
from fused_prefopt.models.head_check import check_head

peft = pytest.importorskip("peft")

BODY = ["q_proj", "v_proj"]
# Name → family, options of LoRA, whether the head itself trains (else its weight stays frozen).
CASES = {
    "body": ("llama", {"target_modules": BODY}, False),
    "body of a tied model": ("qwen2", {"target_modules": BODY}, False),
    "head": ("llama", {"target_modules": [*BODY, "lm_head"]}, False),
    "head of a tied model": ("gemma2", {"target_modules": [*BODY, "lm_head"]}, False),
    "head, rank-stabilised": (
        "llama",
        {"target_modules": ["lm_head"], "use_rslora": True, "lora_alpha": 5},
        False,
    ),
    "head of rank 1": ("llama", {"target_modules": ["lm_head"], "r": 1, "lora_alpha": 1}, False),
    "copy of a scaled head": (
        "cohere",
        {"target_modules": BODY, "modules_to_save": ["lm_head"]},
        True,
    ),
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
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**{"r": 2} | options)).double()
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
        found.append(fused(model, given, fp.PreferenceLoss("dpo")))
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


# Plain LoRA on the head of a tiny Llama


def lora_on_the_head(**options):
    """A tiny Llama in float64 with LoRA on its head; B is not 0."""
    settings = {"r": 3, "lora_alpha": 5, "init_lora_weights": False, "target_modules": ["lm_head"]}
    return peft.get_peft_model(tiny_llama(), peft.LoraConfig(**settings | options)).double()


BATCH = PairCollator(0)(pair_features(4))


def assert_same_loss(model):
    loss = preference_outputs(model, fp.PreferenceLoss("simpo"), BATCH).loss
    torch.testing.assert_close(loss, own_loss(model, BATCH), rtol=1e-6, atol=0)
    return loss


def test_the_weight_stays_frozen_and_uncopied():
    model = lora_on_the_head()
    head, layer = fp.LMHead.of(model), model.get_output_embeddings()
    assert head.weight is layer.base_layer.weight and not head.weight.requires_grad
    (term,) = head.low_rank
    assert term.b is layer.lora_B["default"].weight and term.scaling == pytest.approx(5 / 3)


def test_several_active_adapters_switching_and_merging():
    model = lora_on_the_head()
    before = assert_same_loss(model)
    config = {"r": 2, "init_lora_weights": False, "target_modules": ["lm_head"]}
    model.add_adapter("second", peft.LoraConfig(**config))
    model.double()
    for active, count in (("second", 1), (["default", "second"], 2), ("default", 1)):
        model.base_model.set_adapter(active)
        assert len(fp.LMHead.of(model).low_rank) == count
        assert_same_loss(model)
    model.merge_adapter()
    assert fp.LMHead.of(model).low_rank == ()
    torch.testing.assert_close(assert_same_loss(model), before, rtol=1e-6, atol=0)
    with model.disable_adapter(), pytest.raises(ValueError, match="merged into its head"):
        fp.LMHead.of(model)
    merged = lora_on_the_head(target_modules=["q_proj", "lm_head"]).merge_and_unload()
    assert_same_loss(merged)


def test_a_copy_of_the_head_beside_another_active_adapter():
    base = family("llama")
    original = base.get_output_embeddings().weight
    config = {"r": 2, "target_modules": BODY}
    model = peft.get_peft_model(base, peft.LoraConfig(**config, modules_to_save=["lm_head"]))
    moved(model.double().eval())
    model.add_adapter("second", peft.LoraConfig(**config))
    model.double()
    assert fp.LMHead.of(model).weight is not original
    for active in ("second", "default"):
        model.set_adapter(active)
        assert_same(model, pairs())
    with model.disable_adapter():
        assert fp.LMHead.of(model).weight is original


def test_dropout_follows_the_mode():
    model = lora_on_the_head(lora_dropout=0.3)
    assert fp.LMHead.of(model.train()).low_rank[0].dropout == 0.3
    assert fp.LMHead.of(model.eval()).low_rank[0].dropout == 0.0
