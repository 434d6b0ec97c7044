"""Rows that a trained language model really gives: hidden states, targets and its head.

A small Llama is trained on the embedded text with a large vocabulary; its rows come from text that
it has not seen, and from text that it has seen often, whose distributions are sharper.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_prefopt import LMHead, sequence_logps
from fused_prefopt.data import load_documents, paragraphs, split_documents, train_tokenizer

_LENGTH, _SEQUENCES, _RATE = 128, 16, 1.5e-3


@dataclass(frozen=True)
class TrainedRows:
    """Rows before a trained head.

    Attributes:
        hidden: text → (n, D) fp32.
        targets: text → (n,) int64.
        weight: (V, D) fp32, in the tokenizer's order.
        counts: (V,) how often each token stands in the training text.
    """

    hidden: dict[str, Tensor]
    targets: dict[str, Tensor]
    weight: Tensor
    counts: Tensor

    def by_frequency(self) -> TrainedRows:
        """The same with the vocabulary in the order of falling counts."""
        order = self.counts.argsort(descending=True, stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        targets = {text: place[value] for text, value in self.targets.items()}
        return TrainedRows(self.hidden, targets, self.weight[order], self.counts[order])


@dataclass(frozen=True)
class Corpus:
    """Token ids of the embedded text, in one row each: to train on, and held out."""

    training: Tensor
    held_out: Tensor
    vocab: int

    def batch(self, generator: torch.Generator) -> Tensor:
        """(S, T) random windows of the training text."""
        starts = torch.randint(len(self.training) - _LENGTH, (_SEQUENCES,), generator=generator)
        return torch.stack([self.training[start : start + _LENGTH] for start in starts.tolist()])


def corpus(vocab: int) -> Corpus:
    """The embedded text under a byte-level BPE tokenizer of about `vocab` entries."""
    training, held_out = split_documents(load_documents(), seed=0)
    texts = [
        [t for document in part for t in paragraphs(document)] for part in (training, held_out)
    ]
    tokenizer = train_tokenizer(texts[0], vocab_size=vocab)
    end = tokenizer.eos_token_id
    ids = [[i for text in part for i in (*tokenizer(text)["input_ids"], end)] for part in texts]
    return Corpus(torch.tensor(ids[0]), torch.tensor(ids[1]), len(tokenizer))


def new_model(vocab: int, hidden_size: int = 256) -> Any:
    """A small Llama with its own head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=_LENGTH,
    )
    return LlamaForCausalLM(config)


def train(
    model: Any,
    text: Corpus,
    *,
    steps: int,
    seconds: float = float("inf"),
    drop_mass: float = 0.0,
    path: str = "auto",
    say: Callable[[str], None] = print,
) -> list[float]:
    """Next-token training; returns the loss of every step, in nats a token.

    Args:
        model: a causal language model.
        text: what it is trained on.
        steps: at most.
        seconds: nothing is begun after them.
        drop_mass, path: of the op.
        say: gets a line of progress now and then.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 50))
    generator, losses, end = torch.Generator().manual_seed(1), [], time.monotonic() + seconds
    for step in range(steps):
        if time.monotonic() > end:
            break
        ids = text.batch(generator)
        hidden = model.model(ids).last_hidden_state
        out = sequence_logps(hidden, LMHead.of(model), ids, drop_mass=drop_mass, path=path)
        loss = -out.sums.sum() / out.lengths.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if step % 50 == 0:
            say(f"language model: step {step}: {losses[-1]:.3f} nats a token")
    return losses


@torch.no_grad()
def rows_of(model: Any, text: Corpus, count: int) -> TrainedRows:
    """`count` rows of held-out text and of training text, or as many as there are."""
    hidden, targets = {}, {}
    for name, ids in (("held-out", text.held_out), ("seen", text.training)):
        windows = -(-count // (_LENGTH - 1))
        ids = ids[: _LENGTH * min(windows, len(ids) // _LENGTH)].view(-1, _LENGTH)
        states = model.model(ids).last_hidden_state[:, :-1]
        hidden[name] = states.reshape(-1, states.shape[-1])[:count].clone()
        targets[name] = ids[:, 1:].reshape(-1)[:count].clone()
    counts = torch.bincount(text.training, minlength=text.vocab)
    return TrainedRows(hidden, targets, LMHead.of(model).weight.detach().clone(), counts)
