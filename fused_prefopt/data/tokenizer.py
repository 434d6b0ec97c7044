"""A byte-level BPE tokenizer trained on the texts at hand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_END = "<|endoftext|>"
_PAD = "<|pad|>"
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}"
    + _END
    + "\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """Train a byte-level BPE tokenizer; it has no unknown token, any text has an encoding.

    Args:
        texts: to train on.
        vocab_size: entries, the 256 bytes and two special tokens included.

    Returns:
        A `transformers.PreTrainedTokenizerFast` with end-of-text and padding tokens and a plain
        chat template; it adds no special tokens by itself.

    Raises:
        ValueError: `vocab_size` leaves no room for the bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < 258:
        raise ValueError(f"vocab_size: got {vocab_size}, wanted at least 258")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_END, _PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=_END,
        pad_token=_PAD,
        chat_template=_CHAT_TEMPLATE,
    )
