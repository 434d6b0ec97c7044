"""Task of `quickstart.py`: a tokenizer, a reference model and three sets of features.

Made here from the standard library's documentation, or loaded from the Hugging Face hub; and how a
method trains on them.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

import fused_prefopt as fp
from fused_prefopt.data import (
    PairCollator,
    PointCollator,
    load_dataset_records,
    load_documents,
    make_pairs,
    make_points,
    pairs_of_points,
    paragraphs,
    points_of_pairs,
    split_documents,
    tokenise_pairs,
    tokenise_points,
    train_tokenizer,
)
from fused_prefopt.data.columns import COMPLETION, COMPLETION_MASK
from fused_prefopt.integrations.transformers import PreferenceTrainer

Features = list[dict[str, Any]]
COLLATORS = {"pairs": PairCollator, "points": PointCollator}


@dataclass(frozen=True)
class Task:
    """A tokenizer, a reference model and the three sets of features."""

    tokenizer: Any
    reference: torch.nn.Module
    pairs: Features
    points: Features
    held_out: Features


@dataclass(frozen=True)
class Method:
    """A loss, its hyperparameters, and how fast to train with it.

    Small models want larger steps than the papers' 7–9B ones, and margins of a nat or so.
    """

    loss: str
    hyperparameters: dict[str, Any]
    learning_rate: float


def embedded_task(options: argparse.Namespace) -> Task:
    """Text, tokenizer and reference model made from the standard library's documentation."""
    train_documents, held_out_documents = split_documents(load_documents(), seed=options.seed)
    texts = [text for document in train_documents for text in paragraphs(document)]
    tokenizer = train_tokenizer(texts, vocab_size=2048)
    model = pretrain(options, tokenizer, texts)
    tokenizer.save_pretrained(options.output / "reference")
    model.save_pretrained(options.output / "reference")

    seed, limit = options.seed, options.limit
    pairs = make_pairs(train_documents, seed=seed, flip_rate=options.flip_rate, limit=limit)
    points = make_points(train_documents, seed=seed, limit=limit // 2)
    held_out = make_pairs(held_out_documents, seed=seed, limit=options.held_out_limit)
    return tokenised(options, tokenizer, model, pairs, points, held_out)


def hub_task(options: argparse.Namespace) -> Task:
    """A hub model on a hub dataset of pairs or of rated completions."""
    if not (options.model and options.dataset):
        raise SystemExit("--model and --dataset go together")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(options.model)
    records = load_dataset_records(options.dataset, options.split, options.limit)
    judged = load_dataset_records(options.dataset, options.held_out_split, options.held_out_limit)
    if not records or not judged:
        raise SystemExit(f"{options.dataset}: no usable rows in {options.split} or its held-out")
    if COMPLETION in records[0]:
        pairs, points, held_out = pairs_of_points(records), records, pairs_of_points(judged)
    else:
        pairs, points, held_out = records, points_of_pairs(records), judged
    return tokenised(options, tokenizer, model, pairs, points, held_out)


def tokenised(
    options: argparse.Namespace,
    tokenizer: Any,
    model: torch.nn.Module,
    pairs: Features,
    points: Features,
    held_out: Features,
) -> Task:
    """The task of text records; half of a sequence at most is prompt."""
    lengths = (tokenizer, options.max_length, options.max_length // 2)
    return Task(
        tokenizer,
        model,
        tokenise_pairs(pairs, *lengths),
        tokenise_points(points, *lengths),
        tokenise_pairs(held_out, *lengths),
    )


def pretrain(
    options: argparse.Namespace, tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> LlamaForCausalLM:
    """A small Llama, trained on the texts to predict the next token."""
    print(f"pretraining a small Llama on {len(texts)} paragraphs", flush=True)
    model = small_llama(tokenizer, options.max_length)
    blocks = token_blocks(tokenizer, texts, options.max_length)
    trainer = Trainer(
        model,
        training_arguments(options, "pretraining", options.pretraining_steps, 3e-3),
        train_dataset=[{"input_ids": block, "labels": block} for block in blocks],
        data_collator=default_data_collator,
    )
    trainer.train()
    return model.eval()


def small_llama(
    tokenizer: PreTrainedTokenizerFast, max_length: int, hidden_size: int = 192, layers: int = 4
) -> LlamaForCausalLM:
    """An untrained Llama of a few million weights at most."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=hidden_size * 8 // 3,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=max_length,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def token_blocks(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], size: int
) -> list[list[int]]:
    """All texts one after another, each closed by the end-of-text token, cut into equal blocks."""
    ids = [token for text in texts for token in [*tokenizer.encode(text), tokenizer.eos_token_id]]
    return [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]


def train(
    options: argparse.Namespace,
    method: Method,
    start: torch.nn.Module,
    features: Mapping[str, Features],
    pad_token_id: int,
) -> PreferenceTrainer:
    """The trainer of a copy of a model, after some steps with a preference loss.

    Args:
        options: `steps`, `seed` and what `training_arguments` reads.
        method: the loss.
        start: is copied.
        features: "pairs" and "points", of which the loss takes one.
        pad_token_id: of the tokenizer.
    """
    print(f"\n{method.loss}: {method.hyperparameters}", flush=True)
    loss_fn = fp.PreferenceLoss(method.loss, **method.hyperparameters)
    set_seed(options.seed)
    kind, sequences = ("pairs", 1) if loss_fn.loss.pairwise else ("points", 2)
    trainer = PreferenceTrainer(
        copy.deepcopy(start),
        training_arguments(options, method.loss, options.steps, method.learning_rate, sequences),
        train_dataset=features[kind],
        data_collator=COLLATORS[kind](pad_token_id),
        loss_fn=loss_fn,
    )
    trainer.train()
    trainer.attachment.detach()
    return trainer


def training_arguments(
    options: argparse.Namespace, name: str, steps: int, learning_rate: float, sequences: int = 1
) -> TrainingArguments:
    """What all trainings here share; `sequences` is how many features stand for one pair."""
    return TrainingArguments(
        output_dir=str(options.output / name),
        max_steps=steps,
        per_device_train_batch_size=options.batch_size * sequences // options.accumulation,
        gradient_accumulation_steps=options.accumulation,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 10),
        logging_steps=max(1, steps // 15),
        save_strategy="no",
        report_to="none",
        seed=options.seed,
        remove_unused_columns=False,
        label_names=[COMPLETION_MASK],
    )
