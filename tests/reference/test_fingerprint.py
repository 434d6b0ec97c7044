"""What a fingerprint of a model, of token ids and of a tokenizer depends on."""

from __future__ import annotations

import numpy
import pytest
import torch
from data_tokenizer import tiny_tokenizer
from partitioned import Partitioned
from tiny_models import pair_features, tiny_llama

from fused_prefopt.data import PairCollator
from fused_prefopt.reference import add_reference_logps
from fused_prefopt.reference_cache import (
    data_fingerprint,
    model_fingerprint,
    precision_of,
    tokenizer_fingerprint,
)


def nudged(name):
    model = tiny_llama()
    with torch.no_grad():
        value = model.get_parameter(name).view(-1)
        value[-1] = torch.nextafter(value[-1], torch.tensor(9.0))
    return model


@pytest.mark.parametrize(
    "change",
    [
        lambda: nudged("lm_head.weight"),
        lambda: nudged("model.layers.1.mlp.up_proj.weight"),
        lambda: nudged("model.norm.weight"),
        lambda: tiny_llama(1),
        lambda: tiny_llama().bfloat16(),
        lambda: tiny_llama(rms_norm_eps=1e-5),
        lambda: tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    ],
)
def test_the_smallest_change_of_a_model_counts(change):
    assert model_fingerprint(change()) != model_fingerprint(tiny_llama())


def test_folder_and_wrappers_do_not_count(tmp_path):
    model = tiny_llama()
    wanted = model_fingerprint(model)
    for name in ("first", "second"):
        model.save_pretrained(tmp_path / name)
        assert model_fingerprint(type(model).from_pretrained(tmp_path / name)) == wanted
    wrapped = torch.nn.Module()
    wrapped.module = tiny_llama()
    assert model_fingerprint(wrapped) == wanted


def test_adapters_count_while_they_are_active():
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_llama(), config)
    adapted = model_fingerprint(model)
    assert model_fingerprint(model) == adapted
    with model.disable_adapter():
        assert model_fingerprint(model) != adapted
    with torch.no_grad():
        model.get_parameter(
            "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"
        )[0, 0] += 1e-3
    assert model_fingerprint(model) != adapted


def test_weights_that_are_not_here_are_refused(tmp_path):
    model, offloaded = tiny_llama(), tiny_llama()
    parts = Partitioned(model)
    first = r"model: got model.embed_tokens.weight of shape \(0,\), needs its values"
    with pytest.raises(ValueError, match=first):
        model_fingerprint(model)
    with pytest.raises(ValueError, match=first):
        add_reference_logps(model, pair_features(2), PairCollator(0), cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())
    for module in model.modules():
        parts.gather(module)
    assert model_fingerprint(model) == model_fingerprint(tiny_llama())
    offloaded.model.layers[1].to("meta")
    with pytest.raises(ValueError, match=r"got model.layers.1.*\) on the meta device, needs its"):
        model_fingerprint(offloaded)


def test_precision_is_autocasts_where_it_is_on():
    model = tiny_llama()
    assert precision_of(model) == precision_of(model.bfloat16()) == "weights"
    with torch.autocast("cpu", torch.bfloat16):
        assert precision_of(model) == "bfloat16"
        with torch.autocast("cpu", enabled=False):
            assert precision_of(model) == "weights"


def test_data_counts_by_token_column_and_order():
    features = pair_features(3)
    first = features[0]
    moved = {
        **first,
        "prompt_ids": first["prompt_ids"][:-1],
        "chosen_ids": first["prompt_ids"][-1:] + first["chosen_ids"],
    }
    swapped = {**first, "chosen_ids": first["rejected_ids"], "rejected_ids": first["chosen_ids"]}
    others = [
        features[:2],
        features[::-1],
        [moved, *features[1:]],
        [swapped, *features[1:]],
        [{**first, "chosen_ids": [*first["chosen_ids"], 0]}, *features[1:]],
    ]
    prints = {data_fingerprint(each) for each in [features, *others]}
    assert len(prints) == 6


def test_what_a_cut_leaves_counts_as_the_data():
    features = pair_features(3)
    cuts = [(), (6,), (7,), (6, "keep_end")]
    assert len({data_fingerprint(features, *cut) for cut in cuts}) == 4
    longest = max(
        len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
        for row in features
    )
    assert data_fingerprint(features, longest, "keep_end") == data_fingerprint(features)
    assert data_fingerprint(features, longest - 1) != data_fingerprint(features)


@pytest.mark.parametrize("kind", [tuple, numpy.array, torch.tensor])
def test_containers_and_other_columns_do_not_count(kind):
    features = pair_features(3)
    others = [
        {name: kind(ids) for name, ids in each.items() if name.endswith("_ids")}
        for each in features
    ]
    assert data_fingerprint(others) == data_fingerprint(features)


def test_a_tokenizer_counts_by_vocabulary_special_tokens_and_template(tmp_path):
    wanted = tokenizer_fingerprint(tiny_tokenizer())
    more, special = tiny_tokenizer(), tiny_tokenizer()
    more.add_tokens(["zebra"])
    special.eos_token = "<end>"
    others = [more, special, tiny_tokenizer(adds_bos=True), tiny_tokenizer(template="{{ 1 }}")]
    assert len({wanted, *map(tokenizer_fingerprint, others)}) == 5
    tiny_tokenizer().save_pretrained(tmp_path)
    assert tokenizer_fingerprint(type(more).from_pretrained(tmp_path)) == wanted
    used = tiny_tokenizer()
    used.pad_token = used.eos_token
    padded = tokenizer_fingerprint(used)
    used(["the cat", "the"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(used) == padded
