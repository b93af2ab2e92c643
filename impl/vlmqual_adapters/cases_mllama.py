"""What Mllama's goldens are made of: prompts, images, and inputs that no processor makes.

Sizes of the tiny checkpoint: tiles of 56 pixels, at most 4 for an image.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlmqual_adapters.cases import MANY_STEPS, Case, ImageReader, Tensors, rain
from vlmqual_adapters.vocabulary_mllama import BOS, END_HEADER, END_OF_TURN, IMAGE, START_HEADER

PIXELS = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
NAMES = ("input_ids", "attention_mask", *PIXELS, "cross_attention_mask")


def chat(*turns: str) -> str:
    """A conversation after the chat template, users and assistant in turn, the assistant to speak next."""
    roles = ("user", "assistant")
    heads = [f"{START_HEADER}{roles[index % 2]}{END_HEADER}\n\n" for index in range(len(turns) + 1)]
    return BOS + "".join(f"{head}{turn}{END_OF_TURN}" for head, turn in zip(heads, turns, strict=False)) + heads[-1]


def _masks_by_hand(tensors: Tensors) -> Tensors:
    """Other masks than the processor's, for two images of four tiles each.

    Every third position sees tile 0 of the first image only, every third one tile of each image, the rest what the
    processor says; the last position but two sees nothing, the last but one both images.
    """
    mask = tensors["cross_attention_mask"].copy()
    start = int(np.argmax(mask[0].any(axis=(1, 2))))
    mask[:, start::3], mask[:, start + 1 :: 3] = 0, 0
    mask[:, start::3, 0, 0] = 1
    mask[:, start + 1 :: 3, 0, 2] = 1
    mask[:, start + 1 :: 3, 1, 1] = 1
    mask[:, -3] = 0
    mask[:, -2] = 1
    return {**tensors, "cross_attention_mask": mask}


def _noise_in_padding(tensors: Tensors) -> Tensors:
    """Masked tiles hold noise, in steps that pack well; the text's mask hides them too, but the tower reads them."""
    pixels = tensors["pixel_values"].copy()
    noise = np.random.default_rng(5).integers(-64, 65, pixels.shape).astype(np.float32) / 64
    masked = tensors["aspect_ratio_mask"] == 0
    pixels[masked] = noise[masked]
    return {**tensors, "pixel_values": pixels}


_BATCH = (
    (chat(f"{IMAGE}Compare this photograph with{IMAGE}and say what differs."), ("astronaut.png", "text.png")),
    (chat(f"{IMAGE}Describe it."), ("rocket.png",)),
)
_BEFORE = "Read this line about harbours and lamps, then look at a picture."

CASES = (
    Case(
        "photo-four-tiles",
        "a photograph in 2 x 2 tiles, one question",
        ((chat(f"{IMAGE}Who is this?"), ("astronaut.png",)),),
        all_logits=True,
    ),
    Case(
        "photo-one-tile",
        "an image of 3 x 50 pixels in one tile",
        ((chat(f"{IMAGE}Is it red or green?"), ("edge-3x50.png",)),),
        vision_taps=False,
        text_taps=False,
    ),
    Case(
        "two-tiles-wide",
        "an image in 1 x 2 tiles",
        ((chat(f"{IMAGE}Describe the pattern."), ("edge-224x112.png",)),),
        vision_taps=False,
        text_taps=False,
    ),
    Case(
        "three-tiles",
        "an image in 1 x 3 tiles",
        ((chat(f"{IMAGE}Read the text."), ("text.png",)),),
        text_taps=False,
    ),
    Case(
        "column-of-tiles",
        "an image of 40 x 5000 pixels in 4 x 1 tiles",
        ((chat(f"{IMAGE}Describe the pattern in words."), ("edge-40x5000.png",)),),
        vision_taps=False,
        text_taps=False,
    ),
    Case(
        "two-images",
        "two images, text before, between and after them",
        ((chat(f"What do{IMAGE}and{IMAGE}share?"), ("rocket.png", "china.png")),),
        vision_taps=False,
        text_taps=False,
        all_logits=True,
    ),
    Case(
        "consecutive-images",
        "two images without text between them",
        ((chat(f"{IMAGE}{IMAGE}Which one is older?"), ("text.png", "page-report.png")),),
        vision_taps=False,
        text_taps=False,
    ),
    Case(
        "four-images",
        "four images of one to four tiles, two of them without text between them",
        (
            (
                chat(f"{IMAGE}a{IMAGE}{IMAGE}b{IMAGE}Which is the smallest?"),
                ("edge-3x50.png", "edge-224x112.png", "text.png", "coffee.png"),
            ),
        ),
        vision_taps=False,
        text_taps=False,
    ),
    Case(
        "text-before-image",
        "a long text before the only image: rows that may see no image",
        ((chat(f"{_BEFORE}{IMAGE}What is it?"), ("china.png",)),),
        vision_taps=False,
        all_logits=True,
    ),
    Case(
        "batch-left",
        "two rows with two images and one image, padded on the left",
        _BATCH,
        vision_taps=False,
        text_taps=False,
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
    Case("text-only", "no image: cross-attention is skipped", ((chat("Name three things that float."), ()),),
         all_logits=True),
    Case(
        "text-beside-image",
        "a row without images beside a row with one",
        ((chat("Which colour has the roof of a house?"), ()), (chat(f"{IMAGE}Read the sign."), ("china.png",))),
        vision_taps=False,
        text_taps=False,
    ),
    Case(
        "text-long",
        "more positions than the original context of the rotary scaling",
        ((chat(rain(16) + " Which year was the wettest?"), ()),),
        text_taps=False,
    ),
    Case(
        "across-blocks",
        "an image and a long text that ends below 1024 positions; 40 steps cross them",
        ((chat(IMAGE + rain(24) + " Name the driest one, please."), ("edge-224x112.png",)),),
        vision_taps=False,
        text_taps=False,
        steps=MANY_STEPS,
        tapped=(1, 2, 8, 16, 24, 32, 40),
    ),
    Case(
        "hand-masks",
        "tokens that see single tiles, tiles of both images, both images, and nothing after the images",
        ((chat(f"{IMAGE}and{IMAGE}: what is missing in the second of these?"), ("coffee.png", "rocket.png")),),
        change=_masks_by_hand,
        vision_taps=False,
        text_taps=False,
        all_logits=True,
    ),
    Case(
        "padding-tiles",
        "masked tiles that hold noise: real tiles attend to them",
        ((chat(f"{IMAGE}and{IMAGE}?"), ("edge-3x50.png", "text.png")),),
        change=_noise_in_padding,
        vision_taps=False,
        text_taps=False,
    ),
    Case(
        "multi-turn",
        "a conversation of three turns with an image in the first and one in the last",
        (
            (
                chat(
                    f"{IMAGE}What is this?",
                    "A cup of coffee on a saucer.",
                    f"And what is the total of {IMAGE}?",
                ),
                ("coffee.png", "page-invoice.png"),
            ),
        ),
        vision_taps=False,
        text_taps=False,
    ),
)  # fmt: skip


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
        """The inputs of a case: input_ids and attention_mask, and with images those of `NAMES`."""
        self.processor.tokenizer.padding_side = case.side
        bare = [not names for _, names in case.rows]
        made = self._beside(case) if any(bare) and not all(bare) else self._processed(case.rows)
        return case.change(made) if case.change else made

    def _processed(self, rows: tuple[tuple[str, tuple[str, ...]], ...]) -> Tensors:
        images = [[self.load_image(str(self.images / name)) for name in names] for _, names in rows]
        made: Mapping[str, Any] = self.processor(
            text=[text for text, _ in rows],
            images=images if any(images) else None,
            padding=True,
            return_tensors="np",
        )
        arrays = {name: np.asarray(made[name]) for name in NAMES if name in made}
        return {name: a.astype(np.float32 if name == "pixel_values" else np.int64) for name, a in arrays.items()}

    def _beside(self, case: Case) -> Tensors:
        """Rows without images beside one with images, which the pinned processor refuses.

        The rule is that of transformers 5.23.0 (MLLAMA-PROC-020): a row without images has a padding image (pixels 0,
        aspect ratio id 0, first tile marked) that none of its tokens may see.
        """
        index = next(row for row, (_, names) in enumerate(case.rows) if names)
        alone = self._processed((case.rows[index],))
        rows = [self._processed(((text, ()),))["input_ids"][0] for text, _ in case.rows if IMAGE not in text]
        rows.insert(index, alone["input_ids"][0])
        padded = self.processor.tokenizer.pad({"input_ids": [row.tolist() for row in rows]}, return_tensors="np")
        made = {name: np.asarray(padded[name]).astype(np.int64) for name in ("input_ids", "attention_mask")}
        for name in PIXELS:
            made[name] = np.zeros((len(rows), *alone[name].shape[1:]), alone[name].dtype)
            made[name][index] = alone[name][0]
        made["aspect_ratio_mask"][:, :, 0] = 1
        seen = np.zeros((*made["input_ids"].shape, *alone["cross_attention_mask"].shape[2:]), np.int64)
        width = alone["input_ids"].shape[1]
        place = slice(-width, None) if case.side == "left" else slice(0, width)
        seen[index, place] = alone["cross_attention_mask"][0]
        return {**made, "cross_attention_mask": seen}
