"""What the goldens are made of: prompts, images, and inputs that no processor makes.

A case is a batch of prompts that the pinned processor turns into tensors, or a change to such tensors by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlmqual_adapters.vocabulary import BOS, END_OF_UTTERANCE
from vlmqual_contract.target import Array

STEPS = 16
Tensors = dict[str, Array]
ImageReader = Callable[[str], Any]


@dataclass(frozen=True)
class Case:
    """One golden file.

    Attributes:
        name: of the file, without ending.
        title: what it shows, for the record.
        rows: for each row of the batch the text after the chat template and the names of its images.
        longest_edge: of the enlarged image, Idefics's both edges; None for the checkpoint's own.
        split: whether images are split in tiles.
        side: side on which rows are padded.
        change: a change by hand to the processor's tensors.
        vision_taps: store hidden states of the vision tower.
        text_taps: store hidden states of the text model after the prefill.
        all_logits: store logits of every position.
        checkpoint: whose model and processor; "" for the family's tiny one.
        steps: decode steps after the prompt.
        tapped: of which steps, counted from 1, hidden states are stored.
    """

    name: str
    title: str
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    longest_edge: int | None = None
    split: bool = True
    side: str = "left"
    change: Callable[[Tensors], Tensors] | None = None
    vision_taps: bool = True
    text_taps: bool = True
    all_logits: bool = False
    checkpoint: str = ""
    steps: int = STEPS
    tapped: tuple[int, ...] = ()

    def processor_options(self) -> dict[str, Any]:
        """Keyword arguments for the image processor."""
        options: dict[str, Any] = {} if self.split else {"do_image_splitting": False}
        if self.longest_edge is not None:
            options["size"] = {"longest_edge": self.longest_edge}
        return options


def chat(*turns: str) -> str:
    """A conversation after the chat template, users and assistant in turn, the assistant to speak next."""
    roles = ("User:", "Assistant:")
    lines = []
    for index, turn in enumerate(turns):
        space = "" if turn.startswith("<image>") else " "
        lines.append(f"{roles[index % 2]}{space}{turn}{END_OF_UTTERANCE}\n")
    return BOS + "".join(lines) + roles[1]


def _mask_part_of_frames(tensors: Tensors) -> Tensors:
    """Frame 0: only 8 x 5 patches valid. Frame 1: 3 x 8 patches and a few pixels of the next row of patches."""
    pixels, mask = tensors["pixel_values"].copy(), tensors["pixel_attention_mask"].copy()
    mask[0, 0, :, 70:] = 0
    mask[0, 1, 45:, :] = 0
    pixels[np.broadcast_to(mask[:, :, None] == 0, pixels.shape)] = 0
    return {**tensors, "pixel_values": pixels, "pixel_attention_mask": mask}


def _frames_between(tensors: Tensors) -> Tensors:
    """Frames of zeros before, between and after the real ones; their masks are zero."""
    pixels, mask = tensors["pixel_values"], tensors["pixel_attention_mask"]
    wide_pixels = np.zeros((1, 5, *pixels.shape[2:]), pixels.dtype)
    wide_mask = np.zeros((1, 5, *mask.shape[2:]), mask.dtype)
    wide_pixels[:, (1, 3)], wide_mask[:, (1, 3)] = pixels, mask
    return {**tensors, "pixel_values": wide_pixels, "pixel_attention_mask": wide_mask}


_WETTEST = " Which of these years was the wettest?"
_BATCH = (
    (chat("<image>Compare this photograph with<image>and say what differs."), ("astronaut.png", "china.png")),
    (chat("<image>Describe it."), ("rocket.png",)),
)
#: Steps of the case whose prompt ends just below 1024 positions: they cross the end of a block of the cache, whatever
#: power of two up to 1024 the block has. Hidden states are kept of its first and last steps and of those at the border.
MANY_STEPS = 40


def rain(years: int) -> str:
    """A text of many tokens."""
    return " ".join(
        f"In year {1900 + index} the station by the lake measured {index * 37 % 211} mm of rain."
        for index in range(years)
    )


CASES = (
    Case(
        "photo-tiles",
        "a photograph in 13 frames at the checkpoint's own size, one question",
        ((chat("<image>What can we see in this image?"), ("chelsea.png",)),),
        vision_taps=False,
        text_taps=False,
    ),
    Case(
        "photo-small",
        "a photograph in 5 frames: 2 x 2 tiles and the whole",
        ((chat("<image>Is there a cup on the table?"), ("coffee.png",)),),
        longest_edge=224,
    ),
    Case(
        "photo-whole",
        "a photograph as one frame, not split",
        ((chat("<image>Who is this?"), ("astronaut.png",)),),
        split=False,
        all_logits=True,
    ),
    Case(
        "strip",
        "an image of 5000 x 40 pixels in one row of 2 tiles and the whole",
        ((chat("Describe the pattern of <image> in words."), ("edge-5000x40.png",)),),
        longest_edge=224,
        vision_taps=False,
        text_taps=False,
    ),
    Case(
        "two-images",
        "two images, text before, between and after them",
        ((chat("First<image>then<image>: name the difference."), ("camera.png", "hubble.png")),),
        split=False,
        all_logits=True,
    ),
    Case(
        "consecutive-images",
        "two images without text between them",
        ((chat("<image><image>Which one is older?"), ("text.png", "page-report.png")),),
        split=False,
        vision_taps=False,
        text_taps=False,
        all_logits=True,
    ),
    Case(
        "batch-left",
        "two rows with two images and one image, padded on the left",
        _BATCH,
        split=False,
        vision_taps=False,
        all_logits=True,
    ),
    Case(
        "batch-right",
        "the same two rows, padded on the right",
        _BATCH,
        split=False,
        side="right",
        vision_taps=False,
        text_taps=False,
        all_logits=True,
    ),
    Case("text-only", "no image", ((chat("Name three things that float."), ()),), all_logits=True),
    Case(
        "text-beside-image",
        "a row without images beside a row with one",
        ((chat("Which colour has the roof of a house?"), ()), (chat("<image>Read the sign."), ("china.png",))),
        split=False,
        vision_taps=False,
    ),
    Case(
        "text-long",
        "more positions than the original context of the rotary scaling",
        ((chat(rain(33) + " Which year was the wettest?"), ()),),
        text_taps=False,
    ),
    Case(
        "across-blocks",
        "an image and a long text that ends below 1024 positions; 40 steps cross them",
        ((chat("<image>" + rain(24) + _WETTEST), ("edge-3x50.png",)),),
        split=False,
        vision_taps=False,
        text_taps=False,
        steps=MANY_STEPS,
        tapped=(1, 2, 8, 16, 24, 32, 40),
    ),
    Case(
        "masked-pixels",
        "two frames with part of their pixels masked: positions by fractions, and masked keys",
        ((chat("<image>and<image>: what is missing?"), ("coffee.png", "chelsea.png")),),
        split=False,
        change=_mask_part_of_frames,
    ),
    Case(
        "padding-frames",
        "frames of zeros before, between and after the real ones",
        ((chat("<image>or<image>?"), ("rocket.png", "hubble.png")),),
        split=False,
        change=_frames_between,
        vision_taps=False,
        text_taps=False,
    ),
    Case(
        "document",
        "a document page in 5 frames",
        ((chat("<image>Which station had the most rain in April?"), ("page-report.png",)),),
        longest_edge=224,
        vision_taps=False,
        text_taps=False,
    ),
    Case(
        "multi-turn",
        "a conversation of three turns with an image in the first and one in the last",
        (
            (
                chat(
                    "<image>What is this?",
                    "A cup of coffee on a saucer.",
                    "And what is the total of <image>?",
                ),
                ("coffee.png", "page-invoice.png"),
            ),
        ),
        split=False,
        vision_taps=False,
    ),
)


@dataclass(frozen=True)
class Maker:
    """Turns cases into tensors with the pinned library's own parts.

    Attributes:
        processor: the library's processor of the checkpoint.
        load_image: the library's reader of image files.
        images: folder of the fixture images.
    """

    processor: Any
    load_image: ImageReader
    images: Path
    memory: dict[str, Tensors] = field(default_factory=dict)

    def tensors(self, case: Case) -> Tensors:
        """The inputs of a case: input_ids, attention_mask, and with images pixel_values and pixel_attention_mask."""
        if case.name not in self.memory:
            made = self._rows(case)
            self.memory[case.name] = case.change(made) if case.change else made
        return self.memory[case.name]

    def _rows(self, case: Case) -> Tensors:
        self.processor.tokenizer.padding_side = case.side
        with_images = [row for row in case.rows if row[1]]
        if len(with_images) == len(case.rows):
            return self._processed(case, case.rows)
        # The pinned processor refuses rows without images; those go through its tokenizer alone.
        pixels: Tensors = {}
        rows: list[list[int]] = []
        for row in case.rows:
            if row[1]:
                made = self._processed(case, (row,))
                pixels = {name: made[name] for name in ("pixel_values", "pixel_attention_mask")}
                rows.append([int(value) for value in made["input_ids"][0]])
            else:
                rows.append(self.processor.tokenizer(row[0])["input_ids"])
        text = _arrays(self.processor.tokenizer.pad({"input_ids": rows}, return_tensors="np"))
        if not pixels:
            return text
        frames = pixels["pixel_values"].shape[1]
        index = next(i for i, row in enumerate(case.rows) if row[1])
        placed = {name: np.zeros((len(rows), frames, *v.shape[2:]), v.dtype) for name, v in pixels.items()}
        for name, value in pixels.items():
            placed[name][index] = value[0]
        return {**text, **placed}

    def _processed(self, case: Case, rows: tuple[tuple[str, tuple[str, ...]], ...]) -> Tensors:
        images = [[self.load_image(str(self.images / name)) for name in names] for _, names in rows]
        made: Mapping[str, Any] = self.processor(
            text=[text for text, _ in rows],
            images=images,
            padding=True,
            return_tensors="np",
            images_kwargs={"return_row_col_info": True, **case.processor_options()},
        )
        return _arrays(made)


def _arrays(made: Mapping[str, Any]) -> Tensors:
    names = ("input_ids", "attention_mask", "pixel_values", "pixel_attention_mask")
    arrays = {name: np.asarray(made[name]) for name in names if name in made}
    return {name: a.astype(np.float32 if name == "pixel_values" else np.int64) for name, a in arrays.items()}
