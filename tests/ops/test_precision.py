"""The op leaves torch's matmul settings as it has found them, in every torch's own form."""

from __future__ import annotations

import pytest
import torch

from fused_prefopt.ops import precision

FP16, BF16 = precision._REDUCTIONS


class Older:
    """`torch.backends.cuda.matmul` before torch 2.10: a bool each."""

    def __init__(self, fp16, bf16):
        object.__setattr__(self, "values", {FP16: fp16, BF16: bf16})

    def __getattr__(self, name):
        if name not in self.values:
            raise AttributeError("Unknown attribute " + name)
        return self.values[name]

    def __setattr__(self, name, value):
        assert type(value) is bool
        self.values[name] = value


class Newer(Older):
    """From torch 2.10 on: also whether a sum may be split over programs, in a tuple."""

    def __getattr__(self, name):
        allowed, split_k = self.values.get(name.removesuffix("_split_k"), (None, None))
        if allowed is None:
            raise AttributeError("Unknown attribute " + name)
        return split_k if name.endswith("_split_k") else allowed

    def __setattr__(self, name, value):
        allowed, split_k = (value, True) if isinstance(value, bool) else value
        if allowed and not split_k:
            raise RuntimeError("allow_splitk=False is not supported with reduced precision")
        self.values[name] = (allowed, split_k)


def inside_and_after(matmul, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    with pytest.raises(KeyError), precision._full_sums():
        inside = dict(matmul.values)
        raise KeyError
    return inside, matmul.values


@pytest.mark.parametrize("given", [(True, True), (False, True), (True, False), (False, False)])
def test_older_torch(monkeypatch, given):
    inside, after = inside_and_after(Older(*given), monkeypatch)
    assert inside == {FP16: False, BF16: False}
    assert after == dict(zip((FP16, BF16), given, strict=True))


@pytest.mark.parametrize("fp16", [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("bf16", [(True, True), (False, True), (False, False)])
def test_newer_torch_keeps_split_sums_off(monkeypatch, fp16, bf16):
    inside, after = inside_and_after(Newer(fp16, bf16), monkeypatch)
    assert inside == {FP16: (False, fp16[1]), BF16: (False, bf16[1])}
    assert after == {FP16: fp16, BF16: bf16}


@pytest.mark.parametrize("split_k", [True, False])
@pytest.mark.parametrize("name", [FP16, BF16])
def test_this_torch(name, split_k):
    matmul = torch.backends.cuda.matmul
    before = precision._reduction(name)
    if len(before) == 1 and not split_k:
        pytest.skip("this torch cannot be told not to split")
    given = (False, False) if not split_k else (True, True)[: len(before)]
    try:
        precision._set_reduction(name, given)
        with precision._full_sums():
            assert precision._reduction(name) == (False, *given[1:])
        assert precision._reduction(name) == given
        assert getattr(matmul, name) is given[0]
    finally:
        precision._set_reduction(name, before)
