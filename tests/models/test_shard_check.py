"""Models and batches that cannot be sharded.

An attention that is not spread over the ranks is in `tests/integrations/test_sequence_parallel.py`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import pair_features, tiny_llama
from torch import nn

from fused_prefopt.data import PairCollator, shard_of
from fused_prefopt.models.shard_check import require_shard, require_whole

# Not looked into.
GROUP: Any = object()


def shard(rank: int = 0, **more: Any) -> dict[str, Any]:
    return shard_of(PairCollator(0)(pair_features(2)), rank, 2) | more


def recurrent() -> nn.Module:
    model = tiny_llama()
    model.config.layer_types = ["linear_attention", "full_attention"]
    return model


def convolved() -> nn.Module:
    """As older configs' recurrent layers are: none of them has a name."""
    model = tiny_llama()
    model.model.layers[1].mixer = nn.Conv1d(1, 1, 2)
    return model


def without_positions() -> nn.Module:
    model = tiny_llama()
    model.model.forward = lambda input_ids, use_cache: None
    return model


def with_prompt() -> nn.Module:
    peft = pytest.importorskip("peft")
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    return peft.get_peft_model(tiny_llama(), settings)


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        (recurrent, {}, "a shard with linear_attention layers"),
        (convolved, {}, r"a shard with convolutions over tokens \(layers.1.mixer\)"),
        (
            without_positions,
            {},
            "a shard with a LlamaForCausalLM, whose backbone takes no position_ids",
        ),
        (with_prompt, {}, "a shard with an adapter that learns a prompt"),
        (tiny_llama, {"segments": torch.zeros(4, 8)}, "a shard with shared prompts"),
        (tiny_llama, {"pixel_values": torch.zeros(4)}, r"a shard with images \(pixel_values\)"),
    ],
)
def test_what_no_shard_can_have_is_an_error(model, batch, message):
    with pytest.raises(ValueError, match=f"shift_labels: got {message}; needs texts"):
        require_shard(model(), shard(**batch), GROUP, prompt=True)
    if model is tiny_llama:
        assert require_shard(tiny_llama(), shard(), GROUP, prompt=True) is GROUP


def test_a_part_that_comes_without_shifted_labels_is_no_whole_batch():
    second = {name: value for name, value in shard(1).items() if "shift" not in name}
    with pytest.raises(ValueError, match="shift_labels: got none with position_ids that begin"):
        require_whole(second, GROUP)
    require_whole(second, None)
    require_whole(PairCollator(0, padding_free=True)(pair_features(2)), GROUP)
