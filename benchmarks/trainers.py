"""Trainers that take a step, and their setups: a model of Qwen2.5-0.5B's shape and random pairs.

TRL computes DPO's log-probs in tiles by itself and offers no other way (on a CPU over all rows, on
a GPU over the labelled ones); `use_liger_kernel` no longer changes its head. So Liger's is its
fused DPO loss in transformers' trainer, which is how it is offered; it takes no log-probs of a
reference that are known, and is measured on setups whose reference is zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.shapes import DTYPES, IGNORE_INDEX

# DPO's β, and a step so small that no round changes what the next one computes.
BETA, RATE = 0.1, 1e-7
_LORA_SPREAD = 0.02


@dataclass(frozen=True)
class Setup:
    """One model and batch, and what is measured on them.

    Attributes:
        trains: "all" parameters, or an "adapter" (LoRA) beside a frozen head.
        layers: of the model.
        pairs: of the batch; it has two sequences of each.
        length: T, tokens of a sequence; its second half is the answer.
        dtype: of the parameters, a name of `DTYPES`.
        rounds: of the timings, 0 where the step is not timed.
        memory: whether the peak memory is measured.
        hidden_size: D.
        vocab: V.
        checkpointed: whether a layer keeps its input alone and runs again in the backward.
        reference: known log-probs of each chosen and each rejected answer, a little apart, so that
            the loss tells a wrong sign or scale from a right one.
    """

    trains: str
    layers: int
    pairs: int
    length: int
    dtype: str
    rounds: int = 0
    memory: bool = False
    hidden_size: int = 896
    vocab: int = 151_936
    checkpointed: bool = False
    reference: tuple[float, float] = (-3.0, 2.0)

    @property
    def name(self) -> str:
        return f"{self.trains}, {self.layers} layers"

    @property
    def rows(self) -> int:
        """All hidden rows, 2 * pairs * T."""
        return 2 * self.pairs * self.length

    @property
    def labelled_rows(self) -> int:
        """Rows that predict a token of an answer."""
        return 2 * self.pairs * (self.length - self.length // 2)


def _both(*sizes: Any, **options: Any) -> tuple[Setup, ...]:
    return tuple(Setup(trains, *sizes, **options) for trains in ("all", "adapter"))


# On a CPU: the memory of the whole model with one pair, whose bf16 step takes half a minute (more
# where every logit is rounded), and the time of two of its layers, whose step takes seconds. On a
# GPU both, of the whole model.
MEMORY = _both(24, 1, 512, "bf16", memory=True)
TIME = _both(2, 1, 512, "fp32", rounds=5)
ON_GPU = _both(24, 4, 2048, "bf16", rounds=7, memory=True)
# The most telling first.
ON_CPU = (TIME[0], MEMORY[0], TIME[1], MEMORY[1])
# The memory of a small model's step over its context, layers checkpointed as those of long contexts
# are: SmolLM2-135M's width and vocabulary.
OVER_CONTEXT = tuple(
    Setup(
        *("all", 4, 1, 2**power, "bf16"),
        memory=True,
        hidden_size=576,
        vocab=49_152,
        checkpointed=True,
        reference=(0.0, 0.0),
    )
    for power in range(9, 14)
)


def make_model(setup: Setup, device: str = "cpu") -> Any:
    """A random Qwen2 with tied embeddings, never a download."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    heads = max(1, setup.hidden_size // 64)
    config = Qwen2Config(
        vocab_size=setup.vocab,
        hidden_size=setup.hidden_size,
        intermediate_size=4864 * setup.hidden_size // 896,
        num_hidden_layers=setup.layers,
        num_attention_heads=heads,
        num_key_value_heads=2 if heads % 2 == 0 else 1,
        max_position_embeddings=max(setup.length, 64),
        tie_word_embeddings=True,
    )
    with torch.device(device):
        return Qwen2ForCausalLM(config).to(DTYPES[setup.dtype])


def lora_config() -> Any:
    """Of an adapter on the attention; the head stays frozen."""
    from peft import LoraConfig

    return LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def trained(model: Any) -> list[torch.nn.Parameter]:
    """The parameters that get a gradient."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@torch.no_grad()
def set_adapter(model: Any) -> None:
    """The same numbers in every adapter, whoever has made it, and none of them zero."""
    generator = torch.Generator().manual_seed(1)
    for parameter in trained(model):
        values = torch.randn(parameter.shape, generator=generator) * _LORA_SPREAD
        parameter.copy_(values.to(parameter))


def make_features(setup: Setup, length: int | None = None) -> list[dict[str, Any]]:
    """Tokenised pairs with reference log-probs, in the columns of TRL and of our collators."""
    length = setup.length if length is None else length
    generator = torch.Generator().manual_seed(2)
    prompt = length // 2

    def ids(count: int) -> list[int]:
        drawn: list[int] = torch.randint(2, setup.vocab, (count,), generator=generator).tolist()
        return drawn

    return [
        {
            "prompt_ids": ids(prompt),
            "chosen_ids": ids(length - prompt),
            "rejected_ids": ids(length - prompt),
            "ref_chosen_logps": setup.reference[0],
            "ref_rejected_logps": setup.reference[1],
        }
        for _ in range(setup.pairs)
    ]


def make_tokenizer() -> Any:
    """Two words: trainers ask for a tokenizer, though every token is drawn already."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", unk_token="<pad>"
    )


def arguments(folder: Path, setup: Setup, device: str) -> dict[str, Any]:
    """Arguments of every trainer; SGD keeps no state."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": setup.pairs,
        "learning_rate": RATE,
        "optim": "sgd",
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": device == "cpu",
        "disable_tqdm": True,
    }


Builder = Callable[[Setup, Path, str], Any]
LossOf = Callable[[Any, dict[str, Tensor]], Tensor]
_PART = 2**22


@dataclass(frozen=True)
class Taken:
    """One step: its loss, and the norm of all gradients where it was asked for."""

    loss: float
    gradient_norm: float | None


class Stepper:
    """A trainer, its optimizer and its batch.

    Args:
        name: of `TRAINERS`.
        setup: model and batch.
        folder: for the trainer's output, which stays empty.
        device: "cpu" or "cuda".
    """

    def __init__(self, name: str, setup: Setup, folder: Path, device: str = "cpu") -> None:
        self.trainer = TRAINERS[name](setup, folder, device)
        if setup.trains == "adapter":
            set_adapter(self.trainer.model)
        self.optimizer = self.trainer.create_optimizer()
        self.trainer.current_gradient_accumulation_steps = 1
        self.batch = self.trainer.data_collator(make_features(setup))
        self._short = self.trainer.data_collator(make_features(setup, length=8))

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients of a step."""
        return sum(parameter.nbytes for parameter in trained(self.trainer.model))

    def warm_up(self) -> None:
        """A step on a few tokens, so that libraries are loaded; nothing of it stays."""
        self.trainer.training_step(self.trainer.model, dict(self._short))
        self.optimizer.zero_grad()

    def step(self, *, check: bool = False) -> Taken:
        """Forward, backward and update of a whole step, as the trainer takes it."""
        loss = self.trainer.training_step(self.trainer.model, dict(self.batch))
        norm = _gradient_norm(self.trainer.model) if check else None
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Taken(float(loss), norm)


def _gradient_norm(model: Any) -> float:
    """In fp32, a part at a time: the norm must not be what the step's memory peaks at."""
    gradients = [value.grad.flatten() for value in trained(model) if value.grad is not None]
    parts = (part.float() for gradient in gradients for part in gradient.split(_PART))
    return math.sqrt(sum(float(part.norm()) ** 2 for part in parts))


def _model(setup: Setup, device: str) -> Any:
    model = make_model(setup, device)
    if setup.checkpointed:
        model.gradient_checkpointing_enable()
    if setup.trains == "all":
        return model
    from peft import get_peft_model

    return get_peft_model(model, lora_config(), autocast_adapter_dtype=False)


def _plain(loss_of: LossOf, setup: Setup, folder: Path, device: str) -> Any:
    """transformers' trainer with a loss of the model and the batch."""
    from transformers import Trainer, TrainingArguments

    from fused_prefopt.data import PairCollator

    class PlainTrainer(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            return loss_of(model, inputs)

    options = {**arguments(folder, setup, device), "remove_unused_columns": False}
    return PlainTrainer(
        _model(setup, device),
        args=TrainingArguments(**options),
        data_collator=PairCollator(pad_token_id=0),
    )


def _eager_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """What a tutorial writes: through the model's logits."""
    ids = batch["input_ids"]
    labels = ids.masked_fill(batch["completion_mask"] == 0, IGNORE_INDEX)[:, 1:]
    logits = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits[:, :-1]
    logps = logits.float().log_softmax(-1)
    picked = logps.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    sums = (picked * (labels != IGNORE_INDEX)).sum(-1)
    chosen, rejected = (sums - _reference(batch)).chunk(2)
    return -functional.logsigmoid(BETA * (chosen - rejected)).mean()


def _liger_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Liger's fused loss on the backbone's hidden states, of a model without an adapter."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    if _reference(batch).any():
        raise ValueError("reference: got known log-probs, which Liger's DPO cannot take; wanted 0")
    ids = batch["input_ids"]
    labels = ids.masked_fill(batch["completion_mask"] == 0, IGNORE_INDEX)[:, 1:]
    hidden = model.model(input_ids=ids, attention_mask=batch["attention_mask"]).last_hidden_state
    loss_of = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False)
    loss: Tensor = loss_of(model.lm_head.weight, hidden[:, :-1], labels)[0]
    return loss


def _reference(batch: dict[str, Tensor]) -> Tensor:
    """(2 B,) reference sums, under the name that the collator gives them."""
    if "reference" in batch:
        return batch["reference"]
    return torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])


def _preference(setup: Setup, folder: Path, device: str) -> Any:
    from transformers import TrainingArguments

    from fused_prefopt import PreferenceLoss
    from fused_prefopt.data import PairCollator
    from fused_prefopt.integrations.transformers import PreferenceTrainer

    options = arguments(folder, setup, device)
    options |= {"remove_unused_columns": False, "label_names": ["completion_mask"]}
    return PreferenceTrainer(
        _model(setup, device),
        args=TrainingArguments(**options),
        data_collator=PairCollator(pad_token_id=0),
        loss_fn=PreferenceLoss("dpo", beta=BETA),
    )


def _trl(ours: bool, setup: Setup, folder: Path, device: str) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    base: Any = DPOTrainer
    config: Any = DPOConfig
    if ours:
        from fused_prefopt.integrations.trl import FusedDPOConfig, FusedDPOTrainer

        base, config = FusedDPOTrainer, FusedDPOConfig

    class GivenTokens(base):
        """On tokens and reference log-probs that the data set has already."""

        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, *args: Any) -> Any:
            return dataset

    options = arguments(folder, setup, device) | {"beta": BETA, "precompute_ref_log_probs": True}
    return GivenTokens(
        _model(setup, device),
        args=config(**options, max_length=None),
        train_dataset=Dataset.from_list(make_features(setup)),
        processing_class=make_tokenizer(),
    )


EAGER, LIGER = "Trainer, eager DPO", "Trainer, Liger's DPO"
OURS, TRL = "ours: FusedDPOTrainer", "TRL DPOTrainer"
# The eager one first: the others are compared with its step.
TRAINERS: dict[str, Builder] = {
    EAGER: partial(_plain, _eager_loss),
    "ours: PreferenceTrainer": _preference,
    OURS: partial(_trl, True),
    TRL: partial(_trl, False),
    LIGER: partial(_plain, _liger_loss),
}
# Liger's are measured over the context alone, where a reference is zero.
EVERYWHERE = tuple(name for name in TRAINERS if name != LIGER)
IN_CONTEXT = (EAGER, OURS, TRL, LIGER)
# Their first step of a shape compiles code.
COMPILED = (LIGER,)
