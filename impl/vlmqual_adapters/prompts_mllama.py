"""Prompt goldens of Mllama: ids, masks over text and over tiles; texts after the chat template.

Keys of `prompts.json` are `tokens|NAME` and `chat|NAME`, as for Idefics3.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vlmqual_adapters.cases_mllama import chat
from vlmqual_adapters.ledger import Ledger
from vlmqual_adapters.prompts import CHATS, Rows
from vlmqual_adapters.recipes_mllama import TINY
from vlmqual_adapters.vocabulary_mllama import BOS, IMAGE

_MIXED = "{} refuses rows without images beside rows with images"
BATCHES: dict[str, Rows] = {
    "photo": ((chat(f"{IMAGE}What can we see in this image?"), ("chelsea.png",)),),
    "marker-first": ((f"{IMAGE}If I had to write a line for this one", ("coffee.png",)),),
    "two-markers-first": ((f"{IMAGE}{IMAGE}Which one?", ("camera.png", "text.png")),),
    "marker-later": ((f"Here is an image: {IMAGE} and that was it.", ("coffee.png",)),),
    "begin-in-the-middle": ((f"{IMAGE}one{BOS}two", ("coffee.png",)),),
    "begin-first": ((f"{BOS}{IMAGE}one", ("coffee.png",)),),
    "one-tile": ((chat(f"{IMAGE}Which colour?"), ("edge-3x50.png",)),),
    "row-of-tiles": ((chat(f"{IMAGE}Describe."), ("edge-5000x40.png",)),),
    "column-of-tiles": ((chat(f"{IMAGE}Describe."), ("edge-40x5000.png",)),),
    "interleaved": ((chat(f"Compare{IMAGE}with{IMAGE}."), ("edge-5000x40.png", "edge-3x50.png")),),
    "consecutive": ((chat(f"{IMAGE}{IMAGE}Which?"), ("camera.png", "text.png")),),
    "consecutive-then-one": ((chat(f"{IMAGE}{IMAGE}a{IMAGE}b"), ("camera.png", "text.png", "edge-3x50.png")),),
    "one-then-consecutive": ((chat(f"{IMAGE}a{IMAGE}{IMAGE}"), ("text.png", "camera.png", "rocket.png")),),
    "marker-at-the-end": ((f"What is{IMAGE}", ("text.png",)),),
    "lines-and-spaces": ((f"  two  spaces\n\n{IMAGE}\n\nlines \n", ("camera.png",)),),
    "unicode": ((chat(f"{IMAGE}Größe? 東京 — ½ 🙂"), ("text.png",)),),
    "batch": (
        (chat(f"{IMAGE}and{IMAGE}?"), ("astronaut.png", "text.png")),
        (chat(f"{IMAGE}Describe it in a few words."), ("rocket.png",)),
    ),
    "text-only": ((chat("Name three things that float."), ()),),
    "text-only-plain": (("hello", ()),),
    "text-only-batch": (("one", ()), (chat("Name three things that float."), ())),
    "text-beside-image": ((chat("No image here, only text."), ()), (chat(f"{IMAGE}Read the sign."), ("china.png",))),
}  # fmt: skip


def make(fixtures: Path, library: Any, ledger: Ledger) -> None:
    """Record the entries of every batch and chat with the installed library."""
    load_image = __import__("transformers.image_utils", fromlist=["load_image"]).load_image
    processor = library.AutoProcessor.from_pretrained(str(fixtures / "checkpoints" / TINY), local_files_only=True)
    for name, rows in BATCHES.items():
        bare = [not names for _, names in rows]
        mixed = any(bare) and not all(bare)
        if mixed and ledger.version == ledger.documented:
            continue
        images = [[load_image(str(fixtures / "images" / image)) for image in names] for _, names in rows]
        made = processor(
            text=[text for text, _ in rows], images=images if any(images) else None, padding=True, return_tensors="np"
        )
        tensors = ("input_ids", "attention_mask", "cross_attention_mask")
        entry = {
            "checkpoint": TINY,
            "rows": [{"text": text, "images": list(names)} for text, names in rows],
            **{tensor: np.asarray(made[tensor]).tolist() for tensor in tensors if tensor in made},
        }
        ledger.put(f"tokens|{name}", entry, _MIXED.format(ledger.documented) if mixed else "")
    for name, (messages, ask) in CHATS.items():
        text = processor.apply_chat_template(messages, add_generation_prompt=ask)
        ledger.put(f"chat|{name}", {"messages": messages, "add_generation_prompt": ask, "text": text})
