"""A forward in front of a model's own: order, signature, copies, removal."""

from __future__ import annotations

import copy
import inspect

import torch
from tiny_models import pair_features, tiny_llama

from fused_prefopt.data import PairCollator
from fused_prefopt.models.model_call import has_front, put_in_front, take_away

BATCH = PairCollator(0)(pair_features(4))
INPUTS = {name: BATCH[name] for name in ("input_ids", "attention_mask")}


def test_forwards_in_front_of_each_other():
    model, calls = tiny_llama(), []

    def named(name):
        def run(model, own, args, kwargs):
            calls.append(name)
            return own(*args, **kwargs)

        return run

    signature = inspect.signature(model.forward)
    assert not has_front(model)
    places = [put_in_front(model, named(name)) for name in "ab"]
    assert has_front(model) and inspect.signature(model.forward) == signature
    twin = copy.deepcopy(model)
    assert twin.forward.__self__ is twin and has_front(twin)
    wanted = tiny_llama()(**INPUTS).logits
    assert torch.equal(model(**INPUTS).logits, wanted) and calls == ["b", "a"]
    take_away(model, places[1])
    assert torch.equal(model(**INPUTS).logits, wanted) and calls == ["b", "a", "a"]
    take_away(model, places[0])
    assert torch.equal(model(**INPUTS).logits, wanted) and len(calls) == 3
    assert not has_front(model) and "forward" not in vars(model)
    assert torch.equal(twin(**INPUTS).logits, wanted) and len(calls) == 5
