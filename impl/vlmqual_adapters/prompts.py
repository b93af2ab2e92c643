"""Prompt goldens: what the reference's processor and chat template make of texts and images.

Keys of `prompts.json` are `tokens|NAME` (ids and mask of a batch) and `chat|NAME` (text after the chat template).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlmqual_adapters.cases import chat
from vlmqual_adapters.ledger import Ledger
from vlmqual_adapters.recipes_idefics3 import RELEASED_GEOMETRY, TINY

_TEXT_ONLY = "{} cannot process rows without images"
Rows = tuple[tuple[str, tuple[str, ...]], ...]
Message = dict[str, Any]


@dataclass(frozen=True)
class Batch:
    """Texts and images for the processor.

    Attributes:
        rows: for each row its text and the names of its images.
        checkpoint: whose processor.
        images_kwargs: options for the image processor.
    """

    rows: Rows
    checkpoint: str = TINY
    images_kwargs: dict[str, Any] = field(default_factory=dict)


_WHOLE = {"do_image_splitting": False}
BATCHES: dict[str, Batch] = {
    "photo": Batch(((chat("<image>What can we see in this image?"), ("chelsea.png",)),)),
    "photo-released-geometry": Batch(((chat("<image>What is it?"), ("chelsea.png",)),), RELEASED_GEOMETRY),
    "photo-whole": Batch(((chat("<image>What is it?"), ("chelsea.png",)),), TINY, _WHOLE),
    "photo-whole-released-geometry": Batch(((chat("<image>Hm"), ("coffee.png",)),), RELEASED_GEOMETRY, _WHOLE),
    "no-chat": Batch((("Here is an image: <image>", ("coffee.png",)),), TINY, _WHOLE),
    "image-first": Batch((("<image>In this image we see", ("coffee.png",)),), TINY, _WHOLE),
    "one-row-of-tiles": Batch(((chat("<image>Describe."), ("edge-5000x40.png",)),)),
    "one-column-of-tiles": Batch(((chat("<image>Describe."), ("edge-40x5000.png",)),)),
    "interleaved": Batch(((chat("Compare<image>with<image>."), ("edge-5000x40.png", "edge-40x5000.png")),)),
    "consecutive": Batch(((chat("<image><image>Which?"), ("camera.png", "hubble.png")),), TINY, _WHOLE),
    "lines-and-spaces": Batch((("  two  spaces\n\n<image>\n\nlines \n", ("camera.png",)),), TINY, _WHOLE),
    "unicode": Batch(((chat("<image>Größe? 東京 — ½ 🙂"), ("text.png",)),), TINY, _WHOLE),
    "literal-tags": Batch((("<row_1_col_1> and <global-img> as text <image>", ("text.png",)),), TINY, _WHOLE),
    "batch": Batch(
        (
            (chat("<image>and<image>?"), ("astronaut.png", "china.png")),
            (chat("<image>Describe it."), ("rocket.png",)),
        ),
        TINY,
        _WHOLE,
    ),
    "batch-tiles": Batch(
        (
            (chat("<image>Short."), ("edge-5000x40.png",)),
            (chat("<image>Rather longer than that."), ("page-report.png",)),
        )
    ),
    "text-only": Batch(((chat("Name three things that float."), ()),)),
    "text-only-batch": Batch((("one", ()), (chat("Name three things that float."), ()))),
    "text-beside-image": Batch(
        ((chat("No image here, only text."), ()), (chat("<image>Read the sign."), ("china.png",))), TINY, _WHOLE
    ),
}


def image_item() -> Message:
    """An item of a message that is an image."""
    return {"type": "image"}


def text_item(text: str) -> Message:
    """An item of a message that is text."""
    return {"type": "text", "text": text}


def says(role: str, *items: Message) -> Message:
    """A message."""
    return {"role": role, "content": list(items)}


CHATS: dict[str, tuple[list[Message], bool]] = {
    "image-first": ([says("user", image_item(), text_item("What can we see in this image?"))], True),
    "text-first": ([says("user", text_item("What is shown by "), image_item(), text_item("?"))], True),
    "text-only": ([says("user", text_item("Hello."))], True),
    "no-generation-prompt": ([says("user", image_item(), text_item("Hello."))], False),
    "two-images": (
        [says("user", image_item(), text_item("In this image we see a city."), image_item(), text_item("And here?"))],
        True,
    ),
    "turns": (
        [
            says("user", image_item(), text_item("What is this?")),
            says("assistant", text_item("A cup of coffee.")),
            says("user", text_item("And this? "), image_item()),
        ],
        True,
    ),
}


def make(fixtures: Path, library: Any, ledger: Ledger) -> None:
    """Record the entries of every batch and chat with the installed library."""
    load_image = __import__("transformers.image_utils", fromlist=["load_image"]).load_image
    processors = {
        name: library.AutoProcessor.from_pretrained(str(fixtures / "checkpoints" / name), local_files_only=True)
        for name in (TINY, RELEASED_GEOMETRY)
    }
    for name, batch in BATCHES.items():
        bare = not all(images for _, images in batch.rows)
        if bare and ledger.version == ledger.documented:
            continue
        images = [[load_image(str(fixtures / "images" / image)) for image in names] for _, names in batch.rows]
        made = processors[batch.checkpoint](
            text=[text for text, _ in batch.rows],
            images=images if any(images) else None,
            padding=True,
            return_tensors="np",
            images_kwargs={"return_row_col_info": True, **batch.images_kwargs},
        )
        entry = {
            "checkpoint": batch.checkpoint,
            "rows": [{"text": text, "images": list(names)} for text, names in batch.rows],
            "images_kwargs": batch.images_kwargs,
            "input_ids": np.asarray(made["input_ids"]).tolist(),
            "attention_mask": np.asarray(made["attention_mask"]).tolist(),
        }
        ledger.put(f"tokens|{name}", entry, _TEXT_ONLY.format(ledger.documented) if bare else "")
    for name, (messages, ask) in CHATS.items():
        text = processors[TINY].apply_chat_template(messages, add_generation_prompt=ask)
        ledger.put(f"chat|{name}", {"messages": messages, "add_generation_prompt": ask, "text": text})
