"""What a framework's own command reads: a tiny random model on the disk, its tokenizer, and rows.

It imports no framework, and needs transformers 4.56 or later.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = PAD, BOS, EOS = ("<pad>", "<s>", "</s>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
_WORDS = "the cat sat on a mat and saw two small red birds that sang all day".split()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 259 tokens, one for each byte: no text is unknown to it."""
    names = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(BPE({name: index for index, name in enumerate(names)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, bos_token=BOS, eos_token=EOS
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def write_model(
    folder: Path, seed: int = 0, *, vocab: int = 264, hidden: int = 32, **options: Any
) -> str:
    """Save a random Llama of two layers, in fp32, and `byte_tokenizer`.

    Args:
        folder: is made.
        seed: of the weights.
        vocab: rows of the embedding and the head, at least 259.
        hidden: width of the hidden states.
        **options: of `LlamaConfig`.

    Returns:
        The folder as text.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=4096,
        pad_token_id=SPECIAL.index(PAD),
        bos_token_id=SPECIAL.index(BOS),
        eos_token_id=SPECIAL.index(EOS),
        **options,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def pairs(count: int = 16, seed: int = 0, words: int = 5) -> list[dict[str, str]]:
    """Rows of `prompt`, `chosen` and `rejected`, texts.

    Args:
        count: of rows.
        seed: of their words.
        words: at most so many in a text, and at least one.
    """
    draw = random.Random(seed)
    return [
        {name: _text(draw, words) for name in ("prompt", "chosen", "rejected")}
        for _ in range(count)
    ]


def points(count: int = 16, seed: int = 0, words: int = 5) -> list[dict[str, Any]]:
    """Rows of `prompt`, `completion` and `label`, every other one desirable.

    Args:
        count, seed, words: as in `pairs`.
    """
    draw = random.Random(seed)
    return [
        {name: _text(draw, words) for name in ("prompt", "completion")} | {"label": index % 2 == 0}
        for index in range(count)
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    """Save rows as JSON lines.

    Returns:
        The path as text.
    """
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


def _text(draw: random.Random, words: int) -> str:
    return " ".join(draw.choice(_WORDS) for _ in range(draw.randint(1, words)))
