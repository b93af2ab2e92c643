"""Idefics3 objects of the library under test, made once for each worker, and plain-data shortcuts around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from vlmqual_contract import fixtures
from vlmqual_contract.errors import TargetRaised
from vlmqual_contract.subject import Handle, Image, RemoteLibrary, Tensor
from vlmqual_contract.target import Array

FRAME_TOKENS = 16  # image tokens of a frame of the tiny checkpoint: (112 // 14)^2 / 2^2
SIDE = 112
IMAGE_ID = 598
NEVER = 598  # an id that greedy steps of the tiny checkpoints do not choose
LAYERS, HEADS, KEY_VALUE_HEADS, HEAD_DIM, WIDTH, VOCABULARY = 4, 8, 4, 8, 64, 600

#: A configuration for models with random weights: 16 patches, 4 image tokens a frame.
SMALL_TEXT: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL_VISION: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}


def ended(endless: Array, end: int, padding: int) -> Array:
    """Rows (B, new) as generation gives them when each ends behind its first `end`; short where all have ended."""
    made, steps = np.full_like(endless, padding), []
    for row, wanted in zip(endless, made, strict=True):
        kept = row.tolist().index(end) + 1 if end in row else len(row)
        wanted[:kept] = row[:kept]
        steps.append(kept)
    return made[:, : max(steps)]


class Idefics3Objects:
    """What the tests share. Nothing in here may be changed by a test; `new_*` make objects that may.

    Attributes:
        library: the library under test.
        checkpoint: folder of the tiny checkpoint.
    """

    def __init__(self, library: RemoteLibrary) -> None:
        self.library = library
        self.checkpoint = fixtures.checkpoint("idefics3-tiny")

    def new_config(self, **changes: Any) -> Handle:
        """A small configuration; `text_config` and `vision_config` are merged into the small ones."""
        text = {**SMALL_TEXT, **changes.pop("text_config", {})}
        vision = {**SMALL_VISION, **changes.pop("vision_config", {})}
        settings = {"image_token_id": 300, "pad_token_id": 0, **changes}
        return self.call("Idefics3Config", text_config=text, vision_config=vision, **settings)

    def new_model(self, name: str = "Idefics3ForConditionalGeneration", **changes: Any) -> Handle:
        """A small model with random weights, in evaluation mode."""
        model = self.call(name, self.new_config(**changes))
        model.call("eval")
        return model

    def new_processor(self, tile: int = 28, tiles: int = 4, image_seq_len: int = 2, **options: Any) -> Handle:
        """A processor with the fixture's tokenizer, small tiles and few image tokens; `options` for the images."""
        image_processor = self.new_image_processor(tile, tiles, **options)
        tokenizer = self.processor.get("tokenizer")
        template = self.processor.get("chat_template")
        return self.call(
            "Idefics3Processor", image_processor, tokenizer, image_seq_len=image_seq_len, chat_template=template
        )

    def new_image_processor(self, tile: int = 28, tiles: int = 4, **options: Any) -> Handle:
        """An image processor whose longest edge is `tiles` tiles."""
        sizes = {"size": {"longest_edge": tiles * tile}, "max_image_size": {"longest_edge": tile}}
        return self.call("Idefics3ImageProcessor", **{**sizes, **options})

    @cached_property
    def processor(self) -> Handle:
        """The processor of the tiny checkpoint."""
        return self.call("Idefics3Processor.from_pretrained", str(self.checkpoint))

    @cached_property
    def images(self) -> Handle:
        """An image processor with tiles of 28 pixels, up to 4 by 4, that leaves values in 0..255."""
        return self.new_image_processor(do_rescale=False, do_normalize=False)

    @cached_property
    def default_images(self) -> Handle:
        """An image processor with all defaults."""
        return self.call("Idefics3ImageProcessor")

    @cached_property
    def model(self) -> Handle:
        """The tiny checkpoint in float32 with eager attention, which every version can report."""
        return self.call(
            "Idefics3ForConditionalGeneration.from_pretrained",
            str(self.checkpoint),
            torch_dtype="float32",
            attn_implementation="eager",
        )

    @cached_property
    def trunk(self) -> Handle:
        """The `Idefics3Model` inside `model`."""
        inner = self.model.get("model")
        assert "Idefics3Model" in inner.bases, f"model.model is a {inner.type_name}, not an Idefics3Model"
        assert isinstance(inner, Handle)
        return inner

    def call(self, name: str, *args: Any, **kwargs: Any) -> Handle:
        """Call something of the library that answers with an object."""
        made = self.library.call(name, *args, **kwargs)
        assert isinstance(made, Handle), f"{name} gave {made!r}, not an object"
        return made

    def tokenize(self, texts: str | Sequence[str], **options: Any) -> Any:
        """Token ids from the library's own tokenizer, BOS included."""
        return self.processor.call("tokenizer", texts, **options).get("input_ids")

    def decoded(self, ids: Any) -> str:
        """Text of token ids, special tokens and spaces as they are."""
        text = self.processor.call("tokenizer.decode", plain(ids), clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def bos(self) -> str:
        """Text of the BOS token."""
        return str(self.processor.get("tokenizer.bos_token"))


@lru_cache(maxsize=1)
def idefics3_objects(library: RemoteLibrary) -> Idefics3Objects:
    """The objects of a worker."""
    return Idefics3Objects(library)


def plain(value: Any) -> Any:
    """Arrays as lists."""
    return value.tolist() if isinstance(value, np.ndarray) else value


def keys(mapping: Handle) -> set[str]:
    """Names of what a call returned."""
    return set(mapping.mapping())


def picture(height: int, width: int, seed: int = 0) -> Array:
    """Smooth colours with some noise, (height, width, 3) uint8."""
    generator = np.random.Generator(np.random.PCG64(seed))
    y, x = np.mgrid[0:height, 0:width]
    ramps = np.stack([x * 255 / max(width - 1, 1), y * 255 / max(height - 1, 1), (x + y) % 256], axis=-1)
    noise = generator.integers(-40, 41, ramps.shape)
    return np.clip(ramps + noise, 0, 255).astype(np.uint8)


def image(height: int, width: int, seed: int = 0) -> Image:
    """`picture` as an argument."""
    return Image(picture(height, width, seed))


def frames(count: int, slots: int | None = None, side: int = SIDE, seed: int = 0) -> Array:
    """Pixel values of a row, (1, slots, 3, side, side) float32: `count` real frames, then frames of zeros."""
    generator = np.random.Generator(np.random.PCG64(seed))
    values = np.zeros((1, slots or count, 3, side, side), np.float32)
    values[:, :count] = generator.uniform(-1, 1, (1, count, 3, side, side)).astype(np.float32)
    return values


def prompt(images: int, text: Sequence[int] = (11, 12, 13, 14, 15), tokens: int = FRAME_TOKENS) -> Array:
    """Token ids of a row, (1, S): BOS, then for each frame its image tokens and a text token, then text."""
    ids = [576]
    for index in range(images):
        ids += [IMAGE_ID] * tokens + [20 + index]
    return np.array([[*ids, *text]], np.int64)


def arguments(**arrays: Array | None) -> dict[str, Tensor]:
    """Arrays as tensor arguments; None is left out."""
    return {name: Tensor(value) for name, value in arrays.items() if value is not None}


def array(result: Handle, name: str) -> Array:
    """A tensor of a result."""
    value = result.get(name)
    assert isinstance(value, np.ndarray), f"{name} is {value!r}, not a tensor"
    return value


def as_frames(value: Array, tokens: int = FRAME_TOKENS) -> Array:
    """Image features as (frames, tokens, width), whether or not a library has flattened the frames."""
    return value.reshape(-1, tokens, value.shape[-1])


def written(folder: Path) -> list[str]:
    """Names of the files in a folder."""
    return sorted(path.name for path in folder.iterdir())


def error_of(call: Any) -> TargetRaised | None:
    """What the library raised in `call`, or None."""
    try:
        call()
    except TargetRaised as error:
        return error
    return None
