"""Processors of Mllama over the fixture checkpoint for the tests, and the same from transformers."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import AutoTokenizer

from vlmqual_contract import fixtures
from vlmqual_impl.api.mllama_processing import MllamaImageProcessor, MllamaProcessor

CHECKPOINT = fixtures.root() / "checkpoints" / "mllama-tiny"
IMAGE, BOS, PAD = "<|image|>", "<|begin_of_text|>", "<|finetune_right_pad_id|>"
TILE = 28
TINY: dict[str, Any] = {"size": {"height": TILE, "width": TILE}}
NAMES = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
NEW = int(transformers.__version__.split(".")[0]) >= 5


def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(CHECKPOINT)


def small_processor(**options: Any) -> MllamaProcessor:
    return MllamaProcessor(MllamaImageProcessor(**{**TINY, **options}), tokenizer())


def reference_image_processor(**options: Any) -> Any:
    """The library's Pillow image processor: a class of its own since 5.0."""
    if not NEW:
        return transformers.MllamaImageProcessor(**options)
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    return MllamaImageProcessorPil(**options)


def reference_processor(**options: Any) -> Any:
    return transformers.MllamaProcessor(reference_image_processor(**{**TINY, **options}), tokenizer())
