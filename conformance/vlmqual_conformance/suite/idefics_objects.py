"""Processors of Idefics in the library under test, made once for each worker, and plain-data shortcuts around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import PIL.Image

from vlmqual_contract import fixtures
from vlmqual_contract.subject import Handle, Image, RemoteLibrary, Tensor
from vlmqual_contract.target import Array, FloatArray

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
SIDE = 28
MARKER = "<image>"
FAKE = "<fake_token_around_image>"
END = "<end_of_utterance>"
#: What an image becomes, after a text and after another image.
BLOCK, NEXT = f"{FAKE}{MARKER}{FAKE}", f"{MARKER}{FAKE}"
#: Values are bytes divided by 255.
PLAIN: Mapping[str, Any] = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
#: For a library that fetches only for those who allow it; further keywords are documented.
ALLOWED: Mapping[str, Any] = {"fetch": {"private": True}}


class IdeficsObjects:
    """What the tests share. Nothing in here may be changed by a test; `new_*` make objects that may.

    Attributes:
        library: the library under test.
        checkpoint: folder of the tiny checkpoint.
    """

    def __init__(self, library: RemoteLibrary) -> None:
        self.library = library
        self.checkpoint = fixtures.checkpoint("idefics-tiny")

    def new_image_processor(self, side: int = SIDE, **options: Any) -> Handle:
        """An image processor with small pictures that leaves values in 0..1."""
        return self.call("IdeficsImageProcessor", **{**PLAIN, "image_size": side, **options})

    def new_processor(self, tokenizer: Handle | None = None, side: int = SIDE, **options: Any) -> Handle:
        """A processor with a tokenizer, that of the tiny checkpoint where none is given; `options` for the images."""
        return self.call("IdeficsProcessor", self.new_image_processor(side, **options), tokenizer or self.tokenizer)

    def new_tokenizer(self, checkpoint: str = "idefics-tiny") -> Handle:
        """The tokenizer of a fixture checkpoint."""
        found = self.call("IdeficsProcessor.from_pretrained", str(fixtures.checkpoint(checkpoint))).get("tokenizer")
        assert isinstance(found, Handle), "the processor has no tokenizer"
        return found

    @cached_property
    def tokenizer(self) -> Handle:
        """The tokenizer of the tiny checkpoint, which lists <end_of_utterance>."""
        return self.new_tokenizer()

    @cached_property
    def released_tokenizer(self) -> Handle:
        """A tokenizer with the tokens of the released ones, which do not list <end_of_utterance>."""
        return self.new_tokenizer("idefics-9b-processor")

    @cached_property
    def images(self) -> Handle:
        """An image processor with pictures of 28 pixels that leaves values in 0..1."""
        return self.new_image_processor()

    @cached_property
    def default_images(self) -> Handle:
        """An image processor with all defaults."""
        return self.call("IdeficsImageProcessor")

    @cached_property
    def processor(self) -> Handle:
        """A processor with pictures of 28 pixels and values in 0..1."""
        return self.new_processor()

    @cached_property
    def released(self) -> Handle:
        """The same with `released_tokenizer`."""
        return self.new_processor(self.released_tokenizer)

    @cached_property
    def _takes_text(self) -> bool:
        return any(item.name == "text" for item in self.library.signature("IdeficsProcessor.__call__"))

    def made(self, processor: Handle, prompts: Sequence[Any], **options: Any) -> Handle:
        """What a processor makes of prompts, given as `text`, or first where a version has not that argument."""
        given = {"text": list(prompts)} if self._takes_text else {}
        found = processor.call("", *(() if given else (list(prompts),)), **given, **options)
        assert isinstance(found, Handle), f"the processor gave {found!r}, not an object"
        return found

    def tokenize(self, text: str, tokenizer: Handle | None = None) -> list[int]:
        """Token ids of a whole text from the library's own tokenizer."""
        found = (tokenizer or self.tokenizer).call("", text, add_special_tokens=False).get("input_ids")
        return [int(token) for token in found]

    def id_of(self, token: str) -> int:
        """Id of a token."""
        return int(self.tokenizer.call("convert_tokens_to_ids", token))

    def transform(self, *results: Array) -> Handle:
        """A callable that answers with one tensor after the other, and knows what it was called with."""
        made = self.call("unittest.mock:Mock", side_effect=[Tensor(each) for each in results])
        made.set("__deepcopy__", self.call("unittest.mock:Mock", return_value=made))  # a library may copy its options
        return made

    def call(self, name: str, *args: Any, **kwargs: Any) -> Handle:
        """Call something of the library that answers with an object."""
        made = self.library.call(name, *args, **kwargs)
        assert isinstance(made, Handle), f"{name} gave {made!r}, not an object"
        return made


@lru_cache(maxsize=1)
def idefics_objects(library: RemoteLibrary) -> IdeficsObjects:
    """The objects of a worker."""
    return IdeficsObjects(library)


def processed(processor: Handle, images: Any, **options: Any) -> Array:
    """What preprocess returns, one array whether the library returns a tensor or a list."""
    made = np.stack(processor.call("preprocess", images, **options))
    assert made.dtype == np.float32, f"values are {made.dtype}"
    return made


def squared(
    pixels: Array, side: int = SIDE, mean: Sequence[float] = (0, 0, 0), std: Sequence[float] = (1, 1, 1)
) -> FloatArray:
    """The documented values of an RGB picture, (3, side, side) float64, resized by Pillow.

    Args:
        pixels: (height, width, 3) uint8.
        side: in pixels.
        mean: for each channel.
        std: for each channel.
    """
    resized = PIL.Image.fromarray(pixels).resize((side, side), PIL.Image.Resampling.BICUBIC)
    values: FloatArray = (np.asarray(resized, np.float64) / 255 - np.asarray(mean)) / np.asarray(std)
    return values.transpose(2, 0, 1)


def same(found: Array, wanted: Array, message: str = "") -> None:
    """Equal up to rounding to float32."""
    assert found.shape == wanted.shape, f"{message}: shape {found.shape}, not {wanted.shape}"
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=2e-6, err_msg=message)


def plain(height: int, width: int, *colours: int) -> Image:
    """A picture of one colour, a gray where one number is given."""
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[:] = colours
    return Image(pixels)
