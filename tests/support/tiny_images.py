"""Tiny vision-language models, their processors and data of images, built in memory."""

from __future__ import annotations

import inspect
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from data_tokenizer import WORDS, tiny_tokenizer
from torch import nn
from trainers import config, dataset, trl_classes

pictures = pytest.importorskip("PIL.Image")

SPECIAL = {
    "image_token": "<image>",
    "boi_token": "<boi>",
    "eoi_token": "<eoi>",
    "video_token": "<video>",
}
VOCAB = 32
IMAGE, START, END, VIDEO = range(len(WORDS), len(WORDS) + 4)
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
QWEN = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "text_config": TEXT
    | {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}},
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llava": (
        "LlavaConfig",
        {
            "text_config": TEXT | {"model_type": "llama"},
            "vision_config": VISION | {"model_type": "clip_vision_model"},
            "image_token_index": IMAGE,
        },
    ),
    "qwen2-vl": (
        "Qwen2VLConfig",
        QWEN
        | {
            "vision_config": {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2}
            | {"patch_size": 4, "mlp_ratio": 2}
        },
    ),
    "qwen2.5-vl": (
        "Qwen2_5_VLConfig",
        QWEN
        | {
            "vision_config": {"depth": 2, "hidden_size": 16, "num_heads": 2, "patch_size": 4}
            | {"intermediate_size": 24, "out_hidden_size": 16}
            | {"window_size": 16, "fullatt_block_indexes": [1]}
        },
    ),
    "gemma3": (
        "Gemma3Config",
        {
            "text_config": TEXT | {"query_pre_attn_scalar": 8, "sliding_window": 64},
            "vision_config": VISION,
            "image_token_index": IMAGE,
            "mm_tokens_per_image": 4,
        },
    ),
}
FAMILIES = tuple(CONFIGS)
# A placeholder for one image in a text, before a processor makes as many as it has tokens.
PLACES = {
    "llava": "<image>",
    "qwen2-vl": "<boi><image><eoi>",
    "qwen2.5-vl": "<boi><image><eoi>",
    "gemma3": "<boi>",
}


def vision_model(name: str, seed: int = 0, **text_options: Any) -> Any:
    """A random model in training mode, with logits of some size."""
    kind, options = CONFIGS[name]
    options = options | {"text_config": options["text_config"] | text_options}
    torch.manual_seed(seed)
    config = getattr(transformers, kind)(**options)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    nn.init.normal_(model.get_output_embeddings().weight, std=0.3)
    if name == "gemma3":  # zero, and so no gradient behind it
        nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.3)
    return model.train()


def processor(name: str) -> Any:
    """Its processor, over the words of `data_tokenizer`."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL.values())})
    tokenizer.pad_token = "<unk>"
    for attribute, token in SPECIAL.items():
        setattr(tokenizer, attribute, token)
        setattr(tokenizer, f"{attribute}_id", tokenizer.convert_tokens_to_ids(token))
    if name == "llava":
        images = _images("CLIP")(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
        return transformers.LlavaProcessor(
            images,
            tokenizer,
            patch_size=4,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
    if name == "gemma3":
        images = _images("Gemma3")(size={"height": 8, "width": 8})
        return transformers.Gemma3Processor(images, tokenizer, image_seq_length=4)
    images = _images("Qwen2VL")(patch_size=4, min_pixels=64, max_pixels=256)
    kind = "Qwen2VLProcessor" if name == "qwen2-vl" else "Qwen2_5_VLProcessor"
    without_videos = type(
        kind, (getattr(transformers, kind),), {"check_argument_for_proper_class": lambda *_: None}
    )
    return without_videos(images, tokenizer, None)


def _images(name: str) -> Any:
    """An image processor that needs no torchvision."""
    named = f"{name}ImageProcessorPil"
    return getattr(transformers, named, None) or getattr(transformers, f"{name}ImageProcessor")


def image(seed: int, width: int = 8, height: int = 8) -> Any:
    """A picture of noise."""
    draw = random.Random(seed)
    values = bytes(draw.randrange(256) for _ in range(3 * width * height))
    return pictures.frombytes("RGB", (width, height), values)


def image_pairs(name: str, count: int = 8, **columns: list[Any]) -> Any:
    """Pairs about one image each, of several shapes."""
    return _about_images(name, count, columns, "chosen", "rejected")


def image_points(name: str, count: int = 8, **columns: list[Any]) -> Any:
    """Completions about one image each, by default with labels."""
    labels = {"label": [index % 2 == 0 for index in range(count)]}
    return _about_images(name, count, columns or labels, "completion")


def _about_images(name: str, count: int, columns: dict[str, list[Any]], *sides: str) -> Any:
    draw = random.Random(3)

    def text(low: int, high: int) -> str:
        return " ".join(draw.choice(WORDS[6:]) for _ in range(draw.randint(low, high)))

    rows = [
        {
            "images": [image(index, width=8 * (1 + index % 2))],
            "prompt": f"{text(0, 2)} {PLACES[name]} {text(1, 4)}",
        }
        | {side: f" {text(1, 5)}" for side in sides}
        for index in range(count)
    ]
    for index, row in enumerate(rows):
        row |= {column: values[index] for column, values in columns.items()}
    return dataset(rows)


def image_trainer(kind: str, folder: Path, name: str, data: Any = None, **given: Any) -> Any:
    """A trainer of a tiny model on images: "dpo" and "kto" are ours, "trl-dpo" TRL's own.

    `given` are arguments of the trainer where they are one of its, and options else.
    """
    trainer, _ = trl_classes(kind)
    if data is None:
        data = image_points(name) if kind.endswith("kto") else image_pairs(name)
    arguments = {"model": vision_model(name), "processing_class": processor(name)}
    names = inspect.signature(trl_classes(f"trl-{kind.removeprefix('trl-')}")[0]).parameters
    arguments |= {each: given.pop(each) for each in names if each in given}
    return trainer(train_dataset=data, args=config(kind, folder, **given), **arguments)
