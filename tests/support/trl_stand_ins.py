"""Stand-ins for the models and data sets that TRL's own tests take from a hub, made in a folder.

Whoever works in that folder has them by their names, because `from_pretrained` and `load_dataset`
look for a folder of that name first. Models are random, with a handful of units; texts are made of
a few words.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from datasets import Dataset, Features, Image, Sequence, Value

HUB = "trl-internal-testing"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<boi>", "<eoi>", "<video>")
VOCAB = 400
# Every message between two marks, as most families write them; images have a mark of their own.
CHAT = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.content is string -%}{{ message.content }}"
    "{%- elif message.content -%}{%- for part in message.content -%}"
    "{{ 'IMAGE_MARK' if part.type == 'image' else part.text }}"
    "{%- endfor -%}{%- endif -%}"
    "{%- for call in message.tool_calls or [] -%}{{ call.function | tojson }}{%- endfor -%}"
    "{{ '<|im_end|>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
# A name's end → the class of its configuration, and what that is made with.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Cohere2ForCausalLM": ("Cohere2Config", {"logit_scale": 1.0}),
    "Glm4MoeForCausalLM": ("Glm4MoeConfig", EXPERTS | {"n_routed_experts": 4, "head_dim": 4}),
    "GptOssForCausalLM": (
        "GptOssConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 4},
    ),
    "Qwen2ForCausalLM-2.5": ("Qwen2Config", {}),
    "Qwen3MoeForCausalLM": ("Qwen3MoeConfig", EXPERTS | {"num_experts": 4, "head_dim": 4}),
    "NemotronHForCausalLM-nano": (
        "NemotronHConfig",
        EXPERTS
        | {
            "layers_block_type": ["mamba", "attention", "moe"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 4,
            "mamba_n_groups": 1,
            "ssm_state_size": 16,
            "n_routed_experts": 4,
            "moe_shared_expert_intermediate_size": 32,
            "use_mamba_kernels": False,
        },
    ),
    "Olmo3ForCausalLM": ("Olmo3Config", {}),
    "Lfm2ForCausalLM": ("Lfm2Config", {"full_attn_idxs": [1], "block_multiple_of": 8}),
    "Lfm2ForCausalLM-2.5": ("Lfm2Config", {"full_attn_idxs": [1], "block_multiple_of": 8}),
}
CUSTOM = """
from transformers import LlamaConfig, LlamaForCausalLM


class RemoteConfig(LlamaConfig):
    model_type = "remote"


class RemoteForCausalLM(LlamaForCausalLM):
    config_class = RemoteConfig
"""
WORDS = "cat dog mat hat sat ran lay sun moon sky blue red old new big small".split()
ROLES = ("user", "assistant")
# Rows to train on and to test on.
TRAIN, TEST = 17, 2


def make(folder: Path) -> None:
    """All of them below the folder."""
    tokenizer = tokenizer_of()
    for name, (kind, options) in MODELS.items():
        if hasattr(transformers, kind):
            _save(folder / HUB / f"tiny-{name}", model_of(kind, TEXT | options), tokenizer)
    _make_custom(folder / HUB / "tiny-RemoteForCausalLM", tokenizer)
    for name, configs in _data().items():
        _save_data(folder / HUB / name, configs)


def tokenizer_of(image_mark: str = "<image>") -> Any:
    """Pairs of bytes, with a template for chats."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=list(SPECIAL),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [f"The {word} is {other}." for word in WORDS for other in WORDS]
    backend.train_from_iterator([*texts, *(f"{role}\n" for role in ROLES)], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHAT.replace("IMAGE_MARK", image_mark)
    return tokenizer


def model_of(kind: str, options: dict[str, Any]) -> Any:
    """A random model whose parameters all get a gradient."""
    torch.manual_seed(0)
    config = getattr(transformers, kind)(
        **options, bos_token_id=None, eos_token_id=2, pad_token_id=0
    )
    return spread(transformers.AutoModelForCausalLM.from_config(config))


def spread(model: Any) -> Any:
    """Weights large enough for a gradient in every one of them."""
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim > 1:
                value.normal_(std=0.1)
    return model


def _save(folder: Path, model: Any, tokenizer: Any) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _make_custom(folder: Path, tokenizer: Any) -> None:
    """A model whose code lies beside its weights."""
    _save(folder, model_of("LlamaConfig", TEXT), tokenizer)
    (folder / "modeling_remote.py").write_text(CUSTOM, encoding="utf-8")
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {
        "model_type": "remote",
        "architectures": ["RemoteForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_remote.RemoteConfig",
            "AutoModelForCausalLM": "modeling_remote.RemoteForCausalLM",
        },
    }
    path.write_text(json.dumps(config), encoding="utf-8")


def _save_data(folder: Path, configs: dict[str, Dataset]) -> None:
    """Each configuration in two files, and the card that names them."""
    lines = ["---", "configs:"]
    for config, rows in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, first, last in (("train", 0, TRAIN), ("test", TRAIN, TRAIN + TEST)):
            path = folder / config / f"{split}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows.select(range(first, last)).to_parquet(path)
            lines += [f"  - split: {split}", f"    path: {config}/{split}.parquet"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]), encoding="utf-8")


def _data() -> dict[str, dict[str, Dataset]]:
    """Data set → configuration → rows."""
    rows = list(_rows())
    images = [_image(index) for index in range(len(rows))]
    message = {"role": Value("string"), "content": Value("string")}
    spoken = {name: [message] for name in ("prompt", "chosen", "rejected", "completion")}
    spoken |= {"label": Value("bool"), "image": Image(), "images": Sequence(Image())}

    def chats(pairs: bool, **columns: list[Any]) -> Dataset:
        found = [_chat(row, pairs) for row in rows]
        for name, values in columns.items():
            found = [row | {name: value} for row, value in zip(found, values, strict=True)]
        return Dataset.from_list(found, Features({name: spoken[name] for name in found[0]}))

    def texts(pairs: bool) -> Dataset:
        return Dataset.from_list([_text(row, pairs) for row in rows])

    several = [images[: 1 + index % 2] for index in range(len(rows))]
    return {
        "zen": {
            "standard_preference": texts(True),
            "standard_implicit_prompt_preference": _joined(texts(True)),
            "standard_unpaired_preference": texts(False),
            "conversational_preference": chats(True),
            "conversational_implicit_prompt_preference": _joined(chats(True)),
            "conversational_unpaired_preference": chats(False),
        },
        "harmony": {"preference": _with_thoughts(rows)},
        "toolcall": {"preference": _with_tools(rows)},
        "zen-image": {
            "conversational_preference": chats(True, image=images),
            "conversational_unpaired_preference": chats(False, image=images),
        },
        "zen-multi-image": {
            "conversational_preference": chats(True, images=several),
            "conversational_unpaired_preference": chats(False, images=several),
        },
    }


def _rows() -> Iterator[dict[str, Any]]:
    """A prompt, a good and a bad completion, and which of the two a single one is."""
    for index in range(TRAIN + TEST):
        word, good, bad = (WORDS[(index * step + step) % len(WORDS)] for step in (1, 3, 5))
        yield {
            "prompt": f"The {word} is",
            "chosen": f" {good}.",
            "rejected": f" {bad} {bad}.",
            "label": index % 2 == 0,
        }


def _sides(row: dict[str, Any], pairs: bool) -> dict[str, str]:
    if pairs:
        return {name: row[name] for name in ("chosen", "rejected")}
    return {"completion": row["chosen" if row["label"] else "rejected"]}


def _text(row: dict[str, Any], pairs: bool) -> dict[str, Any]:
    label = {} if pairs else {"label": row["label"]}
    return {"prompt": row["prompt"]} | _sides(row, pairs) | label


def _chat(row: dict[str, Any], pairs: bool) -> dict[str, Any]:
    found = _text(row, pairs)
    for name, text in found.items():
        if isinstance(text, str):
            role = "user" if name == "prompt" else "assistant"
            found[name] = [{"role": role, "content": text.strip()}]
    return found


def _joined(rows: Dataset) -> Dataset:
    """The prompt in front of both sides instead of beside them."""
    return rows.map(
        lambda row: {name: row["prompt"] + row[name] for name in ("chosen", "rejected")},
        remove_columns="prompt",
    )


def _with_thoughts(rows: list[dict[str, Any]]) -> Dataset:
    chats = [_chat(row, True) for row in rows]
    for row in chats:
        for side in ("chosen", "rejected"):
            row[side][0]["thinking"] = "The sun is old."
    return Dataset.from_list(chats)


def _with_tools(rows: list[dict[str, Any]]) -> Dataset:
    """Completions that call a function, and the functions."""
    chats = [_chat(row, True) for row in rows]
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
    for row in chats:
        for side in ("chosen", "rejected"):
            call = {"name": "look", "arguments": {"at": row[side][0]["content"]}}
            row[side][0] |= {
                "content": None,
                "tool_calls": [{"type": "function", "function": call}],
            }
        row["tools"] = json.dumps([tool])
    return Dataset.from_list(chats)


def _image(index: int) -> Any:
    """21 tokens of Qwen's: behind a prompt of 34 a side of 4 does not fit into 37."""
    from PIL.Image import frombytes

    width, height = 56, 24
    values = bytes((37 * index + 11 * place) % 256 for place in range(3 * width * height))
    return frombytes("RGB", (width, height), values)
