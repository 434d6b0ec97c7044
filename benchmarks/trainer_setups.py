"""What a whole trainer step is measured on: a model of Qwen2.5-0.5B's shape and random pairs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.shapes import DTYPES

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
            # A little apart, so that the loss tells a wrong sign or scale from a right one.
            "ref_chosen_logps": -3.0,
            "ref_rejected_logps": 2.0,
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
    """What every trainer is configured with; SGD keeps no state."""
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
