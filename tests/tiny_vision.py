"""Tiny vision-language models of several families, their processors and pictures, all made here: no hub is needed.

The image processors are the ones on Pillow, so that torchvision is not needed either.
"""

from typing import Any

import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Pictures
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    LlavaProcessor,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
)

from tests.tiny import VOCABULARY, make_tokenizer

SPECIAL = {
    "image_token": "<image>",
    "video_token": "<video>",
    "vision_start_token": "<vision>",
    "vision_end_token": "</vision>",
    "boi_token": "<image-soft>",
    "eoi_token": "</image>",
}
IDS = {name: len(VOCABULARY) + i for i, name in enumerate(SPECIAL)}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ 'A:' if message['role'] == 'assistant' else 'U:' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}PLACEHOLDER{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}<eos>{% else %}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)

_TEXT = {
    "vocab_size": len(VOCABULARY) + len(SPECIAL),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
_QWEN_IDS = {
    "image_token_id": IDS["image_token"],
    "video_token_id": IDS["video_token"],
    "vision_start_token_id": IDS["vision_start_token"],
    "vision_end_token_id": IDS["vision_end_token"],
}
_QWEN_VISION = {"depth": 2, "num_heads": 2, "hidden_size": 16, "intermediate_size": 24, "patch_size": 4}
_VIT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}

VISION_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {
        **_QWEN_IDS,
        "text_config": {**_TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
        "vision_config": {**_QWEN_VISION, "out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1]},
    },
    "qwen3_vl": {
        **_QWEN_IDS,
        "text_config": {
            **_TEXT,
            "head_dim": 8,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True},
        },
        "vision_config": {
            **_QWEN_VISION,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],  # its features are added behind the first decoder layer
        },
    },
    "gemma3": {
        "text_config": {**_TEXT, "head_dim": 8, "sliding_window": 16, "model_type": "gemma3_text"},
        "vision_config": {**_VIT, "model_type": "siglip_vision_model", "vision_use_head": False},
        "mm_tokens_per_image": 4,
        "image_token_index": IDS["image_token"],
        "boi_token_index": IDS["boi_token"],
        "eoi_token_index": IDS["eoi_token"],
    },
    "llava": {
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": {**_VIT, "model_type": "clip_vision_model", "projection_dim": 16},
        "image_token_index": IDS["image_token"],
        "vision_feature_layer": -1,
    },
}


def make_vision_model(family: str, seed: int = 0, **text_overrides: object) -> PreTrainedModel:
    """A randomly initialised vision-language model in fp32: 4 decoder layers and 2 of the vision tower."""
    torch.manual_seed(seed)
    settings = dict(VISION_FAMILIES[family])
    settings["text_config"] = {**settings["text_config"], **text_overrides}
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(family, **special, **settings))
    for parameter in model.parameters():  # as in `tests.tiny.make_model`
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


class QwenPicturesProcessor(Qwen2_5_VLProcessor):
    """The Qwen-VL processor without its part for videos, which needs torchvision; pictures are treated the same."""

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str | None = None, **kwargs: Any) -> None:
        self.image_token, self.image_token_id = tokenizer.image_token, tokenizer.image_token_id
        self.video_token, self.video_token_id = tokenizer.video_token, tokenizer.video_token_id
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def make_processor(family: str) -> ProcessorMixin:
    """The family's processor of texts and pictures, over the tokenizer of the text models."""
    tokenizer = make_tokenizer(extra_special_tokens=SPECIAL)
    assert tokenizer.convert_tokens_to_ids(SPECIAL["image_token"]) == IDS["image_token"]
    size = {"height": 16, "width": 16}
    if family in ("qwen2_5_vl", "qwen3_vl"):
        images = Qwen2VLImageProcessorPil(
            patch_size=4, merge_size=2, size={"shortest_edge": 16 * 16, "longest_edge": 16 * 16}
        )
        template = CHAT_TEMPLATE.replace("PLACEHOLDER", "<vision><image></vision>")
        return QwenPicturesProcessor(images, tokenizer, template)
    if family == "gemma3":
        template = CHAT_TEMPLATE.replace("PLACEHOLDER", "<image-soft>")
        return Gemma3Processor(
            Gemma3ImageProcessorPil(size=size), tokenizer, chat_template=template, image_seq_length=4
        )
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=size),
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE.replace("PLACEHOLDER", "<image>"),
        num_additional_image_tokens=1,
    )


def make_picture(number: int) -> Pictures.Image:
    """A picture of two colours that follow from a number."""
    picture = Pictures.new("RGB", (16, 16), (37 * number % 256, 91 * number % 256, 13 * number % 256))
    picture.paste((151 * number % 256, 17, 200), (0, 0, 4 + number % 9, 8))
    return picture


def make_vision_dataset(pictures_per_row: list[int], kind: str = "sft") -> Dataset:
    """Conversations about pictures.

    Args:
        pictures_per_row: For each row how many pictures it has; 0 makes a row of text only.
        kind: "sft" for prompt and completion, "dpo" for a chosen and a rejected answer.
    """
    rows: dict[str, list[Any]] = {"images": [], "prompt": []}
    answers = ("completion",) if kind == "sft" else ("chosen", "rejected")
    for i, count in enumerate(pictures_per_row):
        rows["images"].append([make_picture(10 * i + j) for j in range(count)])
        rows["prompt"].append([{"role": "user", "content": f"How bright is number {i}{' ?' * (i % 4)}"}])
        for answer in answers:
            text = f"{i} of {7 * i % 101}" if answer != "rejected" else f"{i + 1}"
            rows.setdefault(answer, []).append([{"role": "assistant", "content": text}])
    turns = List({"role": Value("string"), "content": Value("string")})
    features = Features({"images": List(Image()), "prompt": turns, **dict.fromkeys(answers, turns)})
    return Dataset.from_dict(rows, features)
