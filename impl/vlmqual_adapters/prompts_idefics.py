"""Prompt goldens of Idefics: ids, masks over text and over images.

Keys of `prompts.json` are `tokens|NAME`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from vlmqual_adapters.cases_idefics import chat
from vlmqual_adapters.ledger import Ledger
from vlmqual_adapters.prompts import Rows
from vlmqual_adapters.recipes_idefics import RELEASED_GEOMETRY, TINY
from vlmqual_adapters.transformers_idefics import items
from vlmqual_adapters.vocabulary import END_OF_UTTERANCE
from vlmqual_adapters.vocabulary_idefics import EOS
from vlmqual_contract.target import Prompt

_BATCHES: dict[str, Rows] = {
    "photo": ((chat("<image>What can we see in this image?"), ("chelsea.png",)),),
    "image-first": (("<image>If I had to write a line for this one", ("coffee.png",)),),
    "image-alone-after-text": (("What is<image>", ("text.png",)),),
    "image-later": (("Here is an image: <image> and that was it.", ("coffee.png",)),),
    "interleaved": ((chat("Compare<image>with<image>."), ("edge-5000x40.png", "edge-3x50.png")),),
    "consecutive": ((chat("<image><image>Which?"), ("camera.png", "text.png")),),
    "consecutive-then-one": ((chat("<image><image>a<image>b"), ("camera.png", "text.png", "edge-3x50.png")),),
    "one-then-consecutive": ((chat("<image>a<image><image>"), ("text.png", "camera.png", "rocket.png")),),
    "three-consecutive": (("<image><image><image>Which?", ("text.png", "camera.png", "rocket.png")),),
    "end-between-images": ((f"<image>one{EOS} two <image>three", ("text.png", "camera.png")),),
    "end-before-images": ((f"one{EOS} two <image>three", ("text.png",)),),
    "end-after-images": ((f"<image>one{EOS} two{END_OF_UTTERANCE}three", ("text.png",)),),
    "lines-and-spaces": (("  two  spaces\n\n <image> \n\nlines \n", ("camera.png",)),),
    "unicode": ((chat("<image>Größe? 東京 — ½ 🙂"), ("text.png",)),),
    "batch": (
        (chat("<image>and<image>?"), ("astronaut.png", "text.png")),
        (chat("<image>Describe it in a few words."), ("rocket.png",)),
    ),
    "text-only": ((chat("Name three things that float."), ()),),
    "text-only-plain": (("hello", ()),),
    "text-only-batch": (("one", ()), (chat("Name three things that float."), ())),
    "text-beside-image": ((chat("No image here, only text."), ()), (chat("<image>Read the sign."), ("china.png",))),
}


def make(fixtures: Path, library: Any, ledger: Ledger) -> None:
    """Record the entries of every batch with the installed library.

    Not with 5.x: it makes its Llama tokenizer anew from the vocabulary, without the blank that the file puts before
    every piece of text, and so has other ids for every prompt.
    """
    if ledger.version != ledger.documented:
        return
    load_image = __import__("transformers.image_utils", fromlist=["load_image"]).load_image
    for checkpoint, names in ((TINY, tuple(_BATCHES)), (RELEASED_GEOMETRY, ("photo", "batch"))):
        processor = library.AutoProcessor.from_pretrained(
            str(fixtures / "checkpoints" / checkpoint), local_files_only=True
        )
        for name in names:
            rows = _BATCHES[name]
            prompts = [
                items(Prompt(text, images), [load_image(str(fixtures / "images" / image)) for image in images])
                for text, images in rows
            ]
            # 4.46.3 refuses a prompt that begins with an image; a text of nothing before it changes nothing.
            prompts = [prompt if isinstance(prompt[0], str) else ["", *prompt] for prompt in prompts]
            made = processor(text=prompts, padding="longest", return_tensors="pt")
            tensors = ("input_ids", "attention_mask", "image_attention_mask")
            entry = {
                "checkpoint": checkpoint,
                "rows": [{"text": text, "images": list(images)} for text, images in rows],
                **{tensor: np.asarray(made[tensor]).astype(np.int64).tolist() for tensor in tensors},
            }
            ledger.put(f"tokens|{name}" if checkpoint == TINY else f"tokens|{name}-released", entry)
