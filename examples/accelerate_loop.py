"""The bare loop under accelerate: accumulation, mixed precision, clipping, checkpoints, resuming.

    python examples/accelerate_loop.py             # one process, on CPU or GPU
    python examples/accelerate_loop.py --resume    # goes on from the last checkpoint, bit-equal
    accelerate launch examples/accelerate_loop.py  # several processes, as `accelerate config` says

The loss is computed inside the model's forward, so the loop is the same under DDP and FSDP, which
rounds a batch's log-probs unless they go past it.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    get_cosine_schedule_with_warmup,
)

import fused_prefopt as fp
from fused_prefopt import data
from fused_prefopt.integrations.transformers import attach, past_wrappers
from fused_prefopt.reference import add_reference_logps

MODEL, STEP = "model", "step.txt"


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    set_seed(options.seed)
    train(options, *small_task(options))


def train(
    options: argparse.Namespace, model: PreTrainedModel, pairs: Any, collator: data.PairCollator
) -> None:
    """Train on pairs of token ids; leaves a log, checkpoints and the model in the output folder."""
    accelerator = Accelerator(
        mixed_precision=options.precision, gradient_accumulation_steps=options.accumulation
    )
    done, checkpoint = last_checkpoint(options.output)
    if checkpoint and not options.resume:
        raise SystemExit(f"{checkpoint} is there: --resume from it, or name another --output")
    if checkpoint and finished_step(options.output) == done >= options.steps:
        accelerator.print(f"already finished at step {done}")
        return
    options.output.mkdir(parents=True, exist_ok=True)

    model.to(accelerator.device)
    loss_fn = fp.PreferenceLoss(options.loss)
    if "reference" in loss_fn.loss.needs:
        pairs = add_reference_logps(model, pairs, collator, cache_dir=options.output / "cache")
    attachment = attach(model, loss_fn)

    of_a_step = options.batch_size * options.accumulation * accelerator.num_processes
    order = shuffled(len(pairs), options.steps * of_a_step, options.seed)
    # A generator of its own: to begin loading must not draw from the one that dropout draws from.
    generator = torch.Generator()
    loader: Any = DataLoader(
        pairs,
        options.batch_size,
        sampler=order[done * of_a_step :],
        collate_fn=collator,
        generator=generator,
    )
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    turns = options.steps * accelerator.num_processes  # of the scheduler, as accelerate counts
    scheduler = get_cosine_schedule_with_warmup(optimizer, turns // 10, turns)
    wrapped, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    accelerator.register_for_checkpointing(loss_fn)  # its running statistics
    if checkpoint:
        accelerator.load_state(str(checkpoint))

    wrapped.train()
    total = torch.zeros((), device=accelerator.device)
    bar = tqdm(total=options.steps, initial=done, disable=not accelerator.is_main_process)
    for batch in loader:
        with accelerator.accumulate(wrapped):
            loss = wrapped(**past_wrappers(batch))["loss"]
            accelerator.backward(loss)
            total += loss.detach() / options.accumulation
            if not accelerator.sync_gradients:
                continue
            norm = accelerator.clip_grad_norm_(wrapped.parameters(), options.max_norm)
            mean = accelerator.reduce(total, "mean")
            # NaN must not reach the weights; fp16's scaler sees to that itself, and learns from it.
            scaled = accelerator.scaler is not None
            skipped = not (mean.isfinite() and (scaled or norm.isfinite()))
            if skipped:
                found = f"step {done + 1}: the loss is {mean:.4g}, the gradient's norm {norm:.4g}"
                if options.on_nonfinite == "stop":
                    raise SystemExit(f"{found}: stopped; --on-nonfinite=skip leaves such steps out")
                accelerator.print(f"{found}: skipped")
            if scaled or not skipped:
                optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        done += 1
        row = {"step": done, "loss": mean.item(), "norm": norm.item(), "skipped": int(skipped)}
        row |= attachment.pop_metrics("train")
        total.zero_()
        bar.update()
        bar.set_postfix(loss=row["loss"], accuracy=row["rewards/accuracies"])
        if accelerator.is_main_process:
            with (options.output / "log.jsonl").open("a") as log:
                log.write(json.dumps(row) + "\n")
        if done % options.save_every == 0 or done == options.steps:
            save_checkpoint(accelerator, options.output / f"checkpoint-{done}")
    bar.close()
    attachment.detach()
    state = accelerator.get_state_dict(wrapped)
    if accelerator.is_main_process:
        save_model(model, state, options.output / MODEL, done)


def save_checkpoint(accelerator: Accelerator, folder: Path) -> None:
    """Write elsewhere, then rename: a run that is killed here leaves no half checkpoint."""
    unfinished = folder.with_name(f"unfinished-{folder.name}")
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        unfinished.rename(folder)


def save_model(model: PreTrainedModel, state: dict[str, Any], folder: Path, step: int) -> None:
    """The model and the step it is of, also elsewhere first."""
    unfinished = folder.with_name(f"unfinished-{folder.name}")
    model.save_pretrained(unfinished, state_dict=state)
    (unfinished / STEP).write_text(str(step))
    shutil.rmtree(folder, ignore_errors=True)  # of fewer steps
    unfinished.rename(folder)


def finished_step(output: Path) -> int | None:
    """Steps of the model that a run has left at its end, if it has come that far."""
    path = output / MODEL / STEP
    return int(path.read_text()) if path.is_file() else None


def last_checkpoint(output: Path) -> tuple[int, Path | None]:
    """Steps done, and where they are kept."""
    found = {int(path.name.split("-")[1]): path for path in output.glob("checkpoint-*")}
    done = max(found, default=0)
    return done, found.get(done)


def shuffled(size: int, count: int, seed: int) -> list[int]:
    """The first `count` indices of as many epochs as it takes, each in an order of its own."""
    draw, order = random.Random(seed), list[int]()
    while len(order) < count:
        order += draw.sample(range(size), size)
    return order[:count]


def small_task(options: argparse.Namespace) -> tuple[PreTrainedModel, Any, data.PairCollator]:
    """An untrained Llama, and pairs of the standard library's documentation."""
    documents = data.load_documents()
    texts = [text for document in documents for text in data.paragraphs(document)]
    tokenizer = data.train_tokenizer(texts, vocab_size=2048)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=options.max_length,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    records = data.make_pairs(documents, seed=options.seed, limit=options.limit)
    pairs = data.tokenise_pairs(records, tokenizer, options.max_length, options.max_length // 2)
    return LlamaForCausalLM(config), pairs, data.PairCollator(tokenizer.pad_token_id)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of the example."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", type=Path, default=Path("runs/accelerate_loop"), help="folder of all results")
    add("--resume", action="store_true", help="from the last checkpoint in --output, if any")
    add("--loss", default="alpha-dpo", help="any loss on pairs")
    add("--steps", type=int, default=40, help="optimizer steps")
    add("--batch-size", type=int, default=8, help="pairs in a forward pass of a process")
    add("--accumulation", type=int, default=2, help="forward passes that share a step")
    add("--precision", default="bf16", choices=["no", "bf16", "fp16"], help="of autocast")
    add("--learning-rate", type=float, default=1e-3, help="after warming up")
    add("--max-norm", type=float, default=1.0, help="gradients are clipped to this norm")
    add(
        "--on-nonfinite",
        default="stop",
        choices=["stop", "skip"],
        help="loss or gradient: what then",
    )
    add("--save-every", type=int, default=10, help="steps between checkpoints")
    add("--limit", type=int, default=400, help="pairs to train on at most")
    add("--max-length", type=int, default=64, help="tokens of prompt and completion")
    add("--seed", type=int, default=0, help="of data, initialisation and order")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
