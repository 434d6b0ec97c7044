"""Stand-ins for the models of images in TRL's own tests, and their processors.

Those of Qwen and of Gemma 4 come without videos, for which they would want torchvision:
`AutoProcessor` is given them ready made.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from trl_stand_ins import HUB, SPECIAL, TEXT, spread, tokenizer_of

IMAGE, START, END, VIDEO = (
    SPECIAL.index(each) for each in ("<image>", "<boi>", "<eoi>", "<video>")
)
WORDS: dict[str, Any] = TEXT | {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TURNED = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
BLOCKS: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 16,
}
MARKS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
MARKS |= {"vision_start_token_id": START, "vision_end_token_id": END}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "rope_parameters": TURNED | {"mrope_interleaved": True, "partial_rotary_factor": 1.0},
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
EXPERTS |= {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
PLACES = {"num_position_embeddings": 64}
PINPOINTS = [[8, 16], [16, 8]]
# A name's end → the class of its configuration, and what that is made with.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Gemma3": (
        "Gemma3Config",
        {
            "text_config": WORDS | {"query_pre_attn_scalar": 8, "sliding_window": 64},
            "vision_config": CLIP | {"model_type": "siglip_vision_model", "vision_use_head": False},
            "image_token_index": IMAGE,
            "mm_tokens_per_image": 4,
        },
    ),
    "Gemma4": (
        "Gemma4Config",
        {
            "text_config": WORDS
            | {
                "layer_types": ["sliding_attention", "full_attention"],
                "vocab_size_per_layer_input": TEXT["vocab_size"],
                "hidden_size_per_layer_input": 16,
            },
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "patch_size": 4,
                "position_embedding_size": 64,
            },
            "audio_config": None,
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "boi_token_id": START,
            "eoi_token_id": END,
        },
    ),
    "Llava": (
        "LlavaConfig",
        {
            "text_config": WORDS | {"model_type": "llama"},
            "vision_config": CLIP,
            "image_token_index": IMAGE,
        },
    ),
    "LlavaNext": (
        "LlavaNextConfig",
        {
            "text_config": WORDS | {"model_type": "llama"},
            "vision_config": CLIP,
            "image_token_index": IMAGE,
            "image_grid_pinpoints": PINPOINTS,
        },
    ),
    "Qwen2VL": (
        "Qwen2VLConfig",
        MARKS
        | {
            "text_config": WORDS | {"rope_parameters": TURNED},
            "vision_config": {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2}
            | {"patch_size": 4, "mlp_ratio": 2},
        },
    ),
    "Qwen2_5_VL": (
        "Qwen2_5_VLConfig",
        MARKS
        | {
            "text_config": WORDS | {"rope_parameters": TURNED},
            "vision_config": BLOCKS | {"window_size": 16, "fullatt_block_indexes": [1]},
        },
    ),
    "Qwen3VL": (
        "Qwen3VLConfig",
        MARKS
        | {
            "text_config": WORDS | {"rope_parameters": TURNED | {"mrope_interleaved": True}},
            "vision_config": BLOCKS | PLACES | {"deepstack_visual_indexes": [1]},
        },
    ),
    "Qwen3_5": (
        "Qwen3_5Config",
        MARKS | {"text_config": WORDS | LINEAR, "vision_config": BLOCKS | PLACES},
    ),
    "Qwen3_5Moe": (
        "Qwen3_5MoeConfig",
        MARKS | {"text_config": WORDS | LINEAR | EXPERTS, "vision_config": BLOCKS | PLACES},
    ),
}
# What TRL's names have behind that.
ENDS = {"Qwen3_5": "-NoThink", "Qwen3_5Moe": "-3.6"}
NAMES = {f"{HUB}/tiny-{name}ForConditionalGeneration{ENDS.get(name, '')}": name for name in MODELS}


def make(folder: Path) -> None:
    """The models that this transformers knows, below the folder."""
    for path, name in NAMES.items():
        kind, options = MODELS[name]
        if hasattr(transformers, kind):
            torch.manual_seed(0)
            config = getattr(transformers, kind)(**options)
            model = transformers.AutoModelForImageTextToText.from_config(config)
            spread(model).save_pretrained(folder / path)


def processor_of(name: str) -> Any:
    """The processor of a model of `MODELS`."""
    gemma, plain = name == "Gemma3", name.startswith("Llava") or name == "Gemma4"
    tokenizer = tokenizer_of("<boi>" if gemma else "<image>" if plain else "<boi><image><eoi>")
    marks = {"image": "<image>", "boi": "<boi>", "eoi": "<eoi>", "video": "<video>"}
    marks |= {"vision_start": "<boi>", "vision_end": "<eoi>"}
    marks |= {"audio": "<video>", "boa": "<boi>", "eoa": "<eoi>"}
    for mark, token in marks.items():
        setattr(tokenizer, f"{mark}_token", token)
        setattr(tokenizer, f"{mark}_token_id", tokenizer.convert_tokens_to_ids(token))
    chat = {"chat_template": tokenizer.chat_template}
    square = {"height": 8, "width": 8}
    if gemma:
        images = _images("Gemma3")(size=square)
        return transformers.Gemma3Processor(images, tokenizer, image_seq_length=4, **chat)
    if name == "Gemma4":
        images = _images(name)(patch_size=4, max_soft_tokens=70)
        return _without_videos("Gemma4Processor")(None, images, tokenizer, None, **chat)
    if plain:
        more = {"image_grid_pinpoints": PINPOINTS} if name == "LlavaNext" else {}
        kind = "LlavaNext" if name == "LlavaNext" else "CLIP"
        images = _images(kind)(size={"shortest_edge": 8}, crop_size=square, **more)
        return getattr(transformers, f"{name}Processor")(
            images,
            tokenizer,
            patch_size=4,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            **chat,
        )
    images = _images("Qwen2VL")(patch_size=4, min_pixels=64, max_pixels=2048)
    kind = f"{'Qwen3VL' if name.startswith('Qwen3') else name}Processor"
    return _without_videos(kind)(images, tokenizer, None, **chat)


def _without_videos(kind: str) -> Any:
    return type(kind, (_WithoutVideos, getattr(transformers, kind)), {})


class _WithoutVideos:
    """Mixin for a processor whose part for videos is None."""

    tokenizer: Any

    def check_argument_for_proper_class(self, *_: Any) -> None:
        """It would not be."""

    def save_pretrained(self, folder: str, **options: Any) -> None:
        """The words alone, which nobody reads again."""
        self.tokenizer.save_pretrained(folder)


def _images(name: str) -> Any:
    """An image processor that needs no torchvision."""
    named = f"{name}ImageProcessorPil"
    return getattr(transformers, named, None) or getattr(transformers, f"{name}ImageProcessor")
