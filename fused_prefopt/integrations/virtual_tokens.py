"""A prompt that an adapter of PEFT learns: virtual tokens in front of every row of a batch.

PEFT's wrapper calls its base model with what it makes of the token ids: embeddings, the learned
ones in front, or a cache of learned keys and values, and a longer attention mask. A batch carries
that beside itself, by the name `PROMPTED`; labels and masks of its own stay as they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fused_prefopt.integrations.fronted_forward import in_front
from fused_prefopt.integrations.wrappers import prompt_learners

PROMPTED = "prompted"
# What PEFT's wrapper puts in place of token ids, or beside them.
MADE = ("inputs_embeds", "past_key_values")
# What it lengthens, shifts or leaves out.
REPLACED = ("input_ids", "attention_mask", "position_ids", "token_type_ids")
_OF_TOKENS = ("position_ids", "token_type_ids", "mm_token_type_ids")
# Key of a layout that has no row for each sequence → the option that makes it, what it holds.
_LAYOUTS = {
    "sequence_ids": ("padding_free", "packed sequences"),
    "segments": ("shared_prompt", "pairs in one row"),
}


def is_prompted(arguments: Mapping[str, Any]) -> bool:
    """Whether a model is called with more than token ids.

    Args:
        arguments: of the call.
    """
    return any(arguments.get(name) is not None for name in MADE)


def with_prompt(model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """A batch with what the model's adapter makes of it, where that learns a prompt.

    Args:
        model: causal language model, in its wrappers.
        batch: of a collator; one that has been here stays as it is.

    Raises:
        ValueError: `prompted` does.
    """
    learners = prompt_learners(model)
    if not learners or PROMPTED in batch:
        return batch
    arguments: dict[str, Any] = {}
    with in_front(model, lambda inner, own, args, kwargs: arguments.update(kwargs)):
        learners[0](**batch)
    return prompted(batch, arguments)


def prompted(batch: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A batch with what an adapter made of it.

    Args:
        batch: as it went to the model's wrappers.
        arguments: what the model inside is called with.

    Returns:
        The batch, on the device of the arguments, with those under `PROMPTED`.

    Raises:
        ValueError: the batch has no row for each sequence, or says something of each token that
            the adapter does not say of its virtual ones.
    """
    for key, (option, kind) in _LAYOUTS.items():
        if key in batch:
            raise ValueError(
                f"{option}: got {kind} with an adapter that learns a prompt, which stands in front"
                " of a row; needs padded batches with a row for each sequence"
            )
    given = {name: arguments[name] for name in arguments if arguments[name] is not None}
    rows: Tensor = given["inputs_embeds"] if "inputs_embeds" in given else given["input_ids"]
    for name in _OF_TOKENS:
        if batch.get(name) is None:
            continue
        if name not in given or given[name].shape[-1] != rows.shape[1]:
            raise ValueError(
                f"{name}: got some with an adapter that learns a prompt, which leaves them out;"
                " needs a batch without"
            )
    whole = {name: value for name, value in batch.items() if name not in MADE}
    for name in REPLACED:
        if isinstance(whole.get(name), Tensor):
            whole[name] = whole[name].to(rows.device)
    return whole | {PROMPTED: given}


def require_kept_prefix(backbone: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Raise ValueError if a backbone would leave out the keys and values of a learned prefix.

    Args:
        backbone: of a causal language model.
        inputs: its arguments.
    """
    if "past_key_values" in inputs and any(
        module.training and getattr(module, "gradient_checkpointing", False)
        for module in backbone.modules()
    ):
        raise ValueError(
            "gradient_checkpointing: got True with an adapter that learns a prefix, which the"
            " layers then leave out; needs gradient_checkpointing=False"
        )


def require_saved_whole(option: str, model: nn.Module) -> None:
    """Raise ValueError if checkpoints hold a prompt without the layers that it trains through.

    Loaded into the model that trains, the prompt would go through those layers once more.

    Args:
        option: of a trainer, for the message.
        model: in its wrappers.
    """
    for learner in prompt_learners(model):
        encoder = learner.prompt_encoder[learner.active_adapter]
        layers = [name for name, _ in encoder.named_children() if name != "embedding"]
        if layers:
            raise ValueError(
                f"{option}: got an adapter whose prompt trains through {', '.join(layers)}, which"
                " PEFT does not save; needs PromptTuningConfig or a PrefixTuningConfig without"
                " projection"
            )
