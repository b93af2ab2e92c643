"""What Idefics's goldens are made of: prompts, images, and inputs that no processor makes.

Sizes of the tiny checkpoints: images of 56 pixels in 4 x 4 patches.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlmqual_adapters.cases import MANY_STEPS, Case, ImageReader, Tensors, rain
from vlmqual_adapters.recipes_idefics import RESAMPLER_TINY
from vlmqual_adapters.transformers_idefics import items
from vlmqual_adapters.vocabulary import END_OF_UTTERANCE
from vlmqual_contract.target import Prompt

NAMES = ("input_ids", "attention_mask", "pixel_values", "image_attention_mask")


def chat(*turns: str) -> str:
    """A conversation as the released instruct model was trained on, the assistant to speak next."""
    roles = ("User:", "Assistant:")
    lines = [f"{roles[index % 2]}{turn}{END_OF_UTTERANCE}\n" for index, turn in enumerate(turns)]
    return "".join(lines) + roles[len(turns) % 2]


def _masks_by_hand(tensors: Tensors) -> Tensors:
    """Other masks than the processor's, for two images.

    From the first image on every third position sees the first image only, every third one the second only, the rest
    what the processor says; the last position but two sees nothing, the last two see both.
    """
    mask = tensors["image_attention_mask"].copy()
    start = int(np.argmax(mask[0].any(axis=-1)))
    mask[:, start::3], mask[:, start + 1 :: 3] = (1, 0), (0, 1)
    mask[:, -3] = 0
    mask[:, -2:] = 1
    return {**tensors, "image_attention_mask": mask}


def _nothing_seen(tensors: Tensors) -> Tensors:
    """Images that no token may see."""
    return {**tensors, "image_attention_mask": np.zeros_like(tensors["image_attention_mask"])}


def _interpolated(tensors: Tensors) -> Tensors:
    """Positions are interpolated to the size of the images."""
    return {**tensors, "interpolate_pos_encoding": np.ones(1, np.int64)}


def _lower_part_cut_off(tensors: Tensors) -> Tensors:
    """Images of 70 x 98 pixels, with interpolated positions."""
    return _interpolated({**tensors, "pixel_values": tensors["pixel_values"][..., :70, :].copy()})


_BATCH = (
    (chat("<image>Compare this photograph with<image>and say what differs."), ("astronaut.png", "text.png")),
    (chat("<image>Describe it."), ("rocket.png",)),
)

CASES = (
    Case("photo", "a photograph, one question", ((chat("<image>Who is this?"), ("astronaut.png",)),), all_logits=True),
    Case(
        "two-images",
        "two images, text before, between and after them",
        ((chat("What do<image>and<image>share?"), ("rocket.png", "china.png")),),
        vision_taps=False,
        text_taps=False,
        all_logits=True,
    ),
    Case(
        "three-images",
        "three images, two of them without text between them, in a conversation",
        (
            (
                chat("<image><image>Which one is older?", "The second.", "And the total of<image>?"),
                ("text.png", "page-report.png", "page-invoice.png"),
            ),
        ),
        vision_taps=False,
        text_taps=False,
    ),
    Case(
        "batch-left",
        "two rows with two images and one image, padded on the left",
        _BATCH,
        vision_taps=False,
        all_logits=True,
    ),
    Case(
        "batch-right",
        "the same two rows, padded on the right",
        _BATCH,
        side="right",
        vision_taps=False,
        text_taps=False,
    ),
    Case(
        "text-only",
        "no image: a slot of zeros that no token sees",
        ((chat("Name three things that float."), ()),),
        vision_taps=False,
        all_logits=True,
    ),
    Case(
        "text-beside-image",
        "a row without images beside a row with one",
        ((chat("Which colour has the roof of a house?"), ()), (chat("<image>Read the sign."), ("china.png",))),
        vision_taps=False,
        text_taps=False,
    ),
    Case(
        "text-before-image",
        "text before the only image: positions that see no image",
        ((chat("Read this line about lamps, then look at a picture.<image>What is it?"), ("china.png",)),),
        vision_taps=False,
        all_logits=True,
    ),
    Case(
        "hand-masks",
        "tokens that see one image, the other, both, and nothing after the images",
        ((chat("<image>and<image>: what is missing in the second of these?"), ("coffee.png", "rocket.png")),),
        change=_masks_by_hand,
        vision_taps=False,
        all_logits=True,
    ),
    Case(
        "no-image-seen",
        "an image that no token may see",
        ((chat("<image>Is there a cup?"), ("coffee.png",)),),
        change=_nothing_seen,
        vision_taps=False,
        text_taps=False,
    ),
    Case(
        "high-resolution",
        "an image of 84 x 84 pixels, positions interpolated",
        ((chat("<image>Describe it."), ("chelsea.png",)),),
        longest_edge=84,
        change=_interpolated,
        text_taps=False,
    ),
    Case(
        "text-long",
        "hundreds of positions",
        ((chat(rain(7) + " Which year was the wettest?"), ()),),
        vision_taps=False,
        text_taps=False,
    ),
    Case(
        "across-blocks",
        "an image and a long text that ends below 1024 positions; 40 steps cross them",
        ((chat("<image>" + rain(24) + " Which of these years was the wettest?"), ("edge-224x112.png",)),),
        vision_taps=False,
        text_taps=False,
        steps=MANY_STEPS,
        tapped=(1, 2, 8, 16, 24, 32, 40),
    ),
    Case(
        "resampler-photo",
        "a photograph, one question",
        ((chat("<image>Who is this?"), ("astronaut.png",)),),
        checkpoint=RESAMPLER_TINY,
        all_logits=True,
    ),
    Case(
        "resampler-two-images",
        "two images without text between them",
        ((chat("<image><image>Which one is older?"), ("text.png", "page-report.png")),),
        checkpoint=RESAMPLER_TINY,
        vision_taps=False,
        text_taps=False,
        all_logits=True,
    ),
    Case(
        "resampler-batch",
        "two rows with two images and one image, padded on the left",
        _BATCH,
        checkpoint=RESAMPLER_TINY,
        vision_taps=False,
        text_taps=False,
    ),
    Case(
        "resampler-text-only",
        "no image: a slot of zeros that no token sees",
        ((chat("Name three things that float."), ()),),
        checkpoint=RESAMPLER_TINY,
        vision_taps=False,
        text_taps=False,
    ),
    Case(
        "resampler-high-resolution",
        "an image of 70 x 98 pixels, positions interpolated",
        ((chat("<image>Describe it."), ("chelsea.png",)),),
        checkpoint=RESAMPLER_TINY,
        longest_edge=98,
        change=_lower_part_cut_off,
        text_taps=False,
    ),
)


class Maker:
    """Turns cases into tensors with the pinned library's own parts.

    Attributes:
        processor: the library's processor of the checkpoint.
        load_image: the library's reader of image files.
        images: folder of the fixture images.
    """

    def __init__(self, processor: Any, load_image: ImageReader, images: Path) -> None:
        self.processor = processor
        self.load_image = load_image
        self.images = images

    def tensors(self, case: Case) -> Tensors:
        """The inputs of a case: those of `NAMES`, and what its change adds."""
        self.processor.tokenizer.padding_side = case.side
        prompts = [
            items(Prompt(text, names), [self.load_image(str(self.images / name)) for name in names])
            for text, names in case.rows
        ]
        size = {} if case.longest_edge is None else {"image_size": case.longest_edge}
        made: Mapping[str, Any] = self.processor(text=prompts, padding="longest", return_tensors="pt", **size)
        arrays = {name: np.asarray(made[name]) for name in NAMES}
        tensors = {name: a.astype(np.float32 if name == "pixel_values" else np.int64) for name, a in arrays.items()}
        return case.change(tensors) if case.change else tensors
