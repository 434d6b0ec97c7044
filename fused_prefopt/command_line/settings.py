"""The keys of a training's configuration, beside those of `transformers.TrainingArguments`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fused_prefopt.checks import ON_NONFINITE, require_choice, require_count, require_number
from fused_prefopt.ops.engines import ENGINES

EMBEDDED = "embedded"
REFERENCES = ("precomputed", "model", "adapter")
LAYOUTS = ("padded", "packed", "shared_prompt")
DTYPES = ("auto", "float32", "bfloat16", "float16")
_TEXTS = ("dataset", "split", "loss")
_OPTIONAL_TEXTS = (
    *("model", "tokenizer", "attn_implementation", "adapter", "held_out", "reference_model"),
    "cache_dir",
)


def _key(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass
class Settings:
    """What to train, on what, with which loss.

    Raises:
        ValueError: a value is none of its choices, a name is empty, or a number is out of range.
    """

    model: str | None = _key(None, "hub name or folder of the causal LM to start from")
    model_config: dict[str, Any] | None = _key(
        None, "config of an untrained model instead, such as {model_type: llama, hidden_size: 64}"
    )
    tokenizer: str | None = _key(
        None, "hub name or folder; the model's, or trained on the data for an untrained model"
    )
    dtype: str = _key("float32", f"of the weights: {', '.join(DTYPES)}")
    attn_implementation: str | None = _key(None, "such as sdpa or flash_attention_2")
    peft: dict[str, Any] | None = _key(
        None, "LoRA: keys of peft.LoraConfig such as {r: 16, lora_alpha: 32, target_modules: …}"
    )

    dataset: str = _key(
        EMBEDDED, "hub name, folder, JSON, CSV or Parquet file; or embedded, text of the package"
    )
    adapter: str | None = _key(
        None, "how to read its rows, such as preference; told by the name or the columns"
    )
    split: str = _key("train", "split to train on")
    held_out: str | None = _key(None, "split or file to judge on; of embedded any name will do")
    limit: int | None = _key(None, "rows to train on at most")
    held_out_limit: int | None = _key(None, "rows to judge on at most")
    flip_rate: float = _key(0.0, "share of wrong labels in the embedded data")
    max_length: int = _key(1024, "tokens of prompt and completion")
    max_prompt_length: int | None = _key(None, "tokens of the prompt; half of max_length")
    layout: str = _key("padded", f"of a batch: {', '.join(LAYOUTS)}")

    loss: str = _key("dpo", "a loss, or a published setting, which brings its learning rate")
    loss_kwargs: dict[str, Any] | None = _key(None, "its hyperparameters")
    workspace_mb: float = _key(256.0, "workspace of the fused op in MiB")
    engine: str = _key("auto", "of the fused op: auto, torch, cublas or triton")

    reference: str = _key(
        "precomputed",
        "precomputed (before training), model (kept beside the policy) or adapter (LoRA off)",
    )
    reference_model: str | None = _key(
        None, "hub name or folder; the model that training starts from"
    )
    cache_dir: str | None = _key(None, "of precomputed log-probs; OUTPUT_DIR/cache")
    reference_batch_size: int = _key(16, "rows of a forward pass that trains nothing")
    on_nonfinite: str = _key(
        "stop", "at a step whose loss or gradient is not finite: stop, skip it, or ignore"
    )
    log_tokens: bool = _key(False, "also log entropy, mean logits and accuracy of tokens")
    pictures: bool = _key(True, "draw the report's pictures at the end")

    def __post_init__(self) -> None:
        for name in (*_TEXTS, *_OPTIONAL_TEXTS):
            text = getattr(self, name)
            missing = text is None and name in _OPTIONAL_TEXTS
            if not missing and (not isinstance(text, str) or not text.strip()):
                raise ValueError(f"{name}: got {text!r}, needs a name")
        require_choice("dtype", self.dtype, DTYPES)
        require_choice("layout", self.layout, LAYOUTS)
        require_choice("reference", self.reference, REFERENCES)
        require_choice("engine", self.engine, ("auto", *ENGINES))
        require_choice("on_nonfinite", self.on_nonfinite, ON_NONFINITE)
        if not self.workspace_mb > 0:
            raise ValueError(f"workspace_mb: got {self.workspace_mb}, wanted a number of MiB > 0")
        require_number("flip_rate", self.flip_rate, low=0, high=1)
        for name in ("model_config", "peft", "loss_kwargs"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, dict):
                raise ValueError(f"{name}: got {value!r}, needs keys with values")
            for key in value or {}:
                if not isinstance(key, str):
                    raise ValueError(f"{name}: got the key {key!r}, needs names as keys")
        require_count("max_length", self.max_length, low=2)
        require_count("reference_batch_size", self.reference_batch_size, low=1)
        for name in ("limit", "held_out_limit", "max_prompt_length"):
            value = getattr(self, name)
            if value is not None:
                require_count(name, value, low=1)
        if (self.model is None) == (self.model_config is None):
            got = "neither" if self.model is None else "both"
            raise ValueError(f"model: got {got} model and model_config, needs one of them")
        if self.reference == "adapter" and self.peft is None:
            raise ValueError("reference: got adapter without peft, needs precomputed or model")
        if self.reference == "adapter" and self.reference_model is not None:
            raise ValueError("reference_model: got one with reference: adapter, needs none")

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt at most."""
        return self.max_prompt_length or self.max_length // 2
