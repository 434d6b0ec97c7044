"""Whether a model's head is what was read from it, and whether anything has trained it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fused_prefopt.models.causal_lm import head_running, last_hidden, readable_head, text_config
from fused_prefopt.models.model_call import evaluating, prompt_learners, unwrapped
from fused_prefopt.types import LMHead

# Roundings of the largest logit that two orders of the same operations may be apart.
_ROUNDINGS = 16
_TOKENS = 8
# Classes of models, by a part of their names, whose checkpoints have no language model's head.
_OTHER_HEADS = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "RewardModel",
)


@torch.no_grad()
def check_head(model: nn.Module, input_ids: Tensor | None = None) -> LMHead:
    """Compare the logits of `LMHead.of` with the model's own, on a few tokens.

    For a model that this package has not met. It costs one forward pass with logits, in eval mode.

    Args:
        model: Hugging Face causal language model, PEFT-wrapped ones too, on one process.
        input_ids: (S, L) to compare on; None takes eight tokens that the config does not name.

    Returns:
        The head.

    Raises:
        ValueError: the logits differ by more than rounding, or the head cannot be read.
    """
    wrapped, model = model, unwrapped(model)
    if input_ids is None:
        input_ids = _plain_tokens(text_config(model), model).to(next(model.parameters()).device)
    with evaluating(model):
        asked = next(iter(prompt_learners(wrapped)), model)
        own: Tensor = asked(input_ids=input_ids, use_cache=False).logits
        own = own[:, own.shape[1] - input_ids.shape[1] :]
        heads: list[LMHead] = []

        def logits(hidden: Tensor) -> Tensor:
            heads.append(LMHead.of(model))
            return heads[0].logits(hidden)

        hidden = last_hidden(wrapped, {"input_ids": input_ids})
        with head_running(model, logits) as layer:
            got = layer(hidden)
    head = heads[0]
    own = own[..., : head.vocab]
    if got.shape != own.shape:
        raise ValueError(
            f"model: its own logits are {tuple(own.shape)}, those of the head that was read"
            f" {tuple(got.shape)}"
        )
    largest = float(own.abs().max())
    error = float((got.double() - own.double()).abs().max())
    if not error <= _ROUNDINGS * torch.finfo(got.dtype).eps * largest:
        raise ValueError(
            f"model: its own logits (the largest {largest:.3g}) are {error:.3g} away from those of"
            f" the head that was read (softcap {head.softcap}, logit_scale {head.logit_scale:g},"
            f" bias {head.bias is not None}, {len(head.low_rank)} low-rank terms): a"
            f" {type(model).__name__} does more than `LMHead` describes"
        )
    return head


def require_trained_head(model: nn.Module, name: str = "model") -> None:
    """Raise ValueError if a model's checkpoint had no head, which then is random.

    It goes by the class that the checkpoint was saved as, in the model's config.

    Args:
        model: Hugging Face causal language model, PEFT-wrapped ones too.
        name: of the model, for the message.
    """
    inner: Any = unwrapped(model)
    config = getattr(inner, "config", None)
    saved_as = getattr(config, "architectures", None) or []
    folder = getattr(config, "_name_or_path", "")
    if not folder or not saved_as or type(inner).__name__ in saved_as:
        return
    if all(map(_has_no_head, saved_as)) and not _is_tied(inner):
        raise ValueError(
            f"{name}: got a checkpoint ({folder}) of a {saved_as[0]}, which has no head of a"
            f" {type(inner).__name__}, so this one's is random; needs a causal language model's"
            f" checkpoint, or, where the head is trained after all, config.architectures="
            f"[{type(inner).__name__!r}]"
        )


def require_causal_checkpoint(name: str, **options: Any) -> None:
    """Raise ValueError if a checkpoint, to be loaded as the class it was saved as, has no head.

    Args:
        name: folder, or name on the hub.
        **options: of `AutoConfig.from_pretrained`.
    """
    from transformers import AutoConfig

    saved_as = AutoConfig.from_pretrained(name, **options).architectures or []
    if saved_as and all(map(_has_no_head, saved_as)):
        raise ValueError(
            f"model: got a checkpoint ({name}) of a {saved_as[0]}, which has no language model's"
            " head; needs a causal language model's checkpoint, or, where the head is tied to the"
            " input embedding, the model that `AutoModelForCausalLM` loads from it"
        )


def _has_no_head(architecture: str) -> bool:
    bare = architecture.endswith("Model") and not architecture.endswith("LMHeadModel")
    return bare or any(part in architecture for part in _OTHER_HEADS)


def _is_tied(model: Any) -> bool:
    if model.config.tie_word_embeddings or text_config(model).tie_word_embeddings:
        return True
    head = readable_head(model).layer.weight
    return any(value is head for value in model.get_input_embeddings().parameters())


def _plain_tokens(config: Any, model: nn.Module) -> Tensor:
    """(1, 8) tokens that stand for no image, padding or boundary."""
    named: set[Any] = set()
    for source in (config, model.config):
        for name in dir(source):
            if name.endswith(("_token_id", "_token_index")):
                value = getattr(source, name)
                named.update(value if isinstance(value, list) else [value])
    plain = [token for token in range(config.vocab_size) if token not in named]
    step = max(1, len(plain) // _TOKENS)
    return torch.tensor([plain[::step][:_TOKENS]])
