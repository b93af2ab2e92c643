"""Mllama objects of the library under test, made once for each worker, and plain-data shortcuts around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from vlmqual_conformance.suite.library_objects import arguments, array
from vlmqual_contract import fixtures
from vlmqual_contract.subject import Handle, RemoteLibrary, Tensor
from vlmqual_contract.target import Array

#: Sizes of the tiny checkpoint.
SIDE, TILES, POSITIONS, RATIOS = 56, 4, 17, 8
LAYERS, CROSSING, HEADS, KEY_VALUE_HEADS, HEAD_DIM, WIDTH, VOCABULARY = 6, (1, 4), 8, 4, 8, 64, 600
VISION_WIDTH, VISION_OUTPUT, LOCAL, GLOBAL, VISION_HEADS, PADDED = 48, 192, 5, 2, 4, 24
IMAGE_ID = VOCABULARY
BOS, EOS, PAD = 576, 577, 580
GENERATING = "MllamaForConditionalGeneration"

#: A configuration for models with random weights.
SMALL_TEXT: Mapping[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "cross_attention_layers": [1, 3],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rope_scaling": {"rope_type": "default"},
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL_VISION: Mapping[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_global_layers": 1,
    "attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
    "intermediate_layers_indices": [0, 2],
    "vision_output_dim": 48,
}


class MllamaObjects:
    """What the tests share. Nothing in here may be changed by a test; `new_*` make objects that may.

    Attributes:
        library: the library under test.
        checkpoint: folder of the tiny checkpoint.
    """

    def __init__(self, library: RemoteLibrary) -> None:
        self.library = library
        self.checkpoint = fixtures.checkpoint("mllama-tiny")

    def new_config(self, **changes: Any) -> Handle:
        """A small configuration; `text_config` and `vision_config` are merged into the small ones."""
        text = {**SMALL_TEXT, **changes.pop("text_config", {})}
        vision = {**SMALL_VISION, **changes.pop("vision_config", {})}
        settings = {"image_token_index": 320, **changes}
        return self.call("MllamaConfig", text_config=text, vision_config=vision, **settings)

    def new_model(self, name: str = GENERATING, **changes: Any) -> Handle:
        """A small model with random weights, in evaluation mode."""
        model = self.call(name, self.new_config(**changes))
        model.call("eval")
        return model

    def new_image_processor(self, tile: int = 28, tiles: int = 4, **options: Any) -> Handle:
        """An image processor with small tiles that leaves values in 0..255."""
        plain = {"do_rescale": False, "do_normalize": False}
        size = {"height": tile, "width": tile}
        return self.call("MllamaImageProcessor", **{**plain, "size": size, "max_image_tiles": tiles, **options})

    def new_processor(self, tile: int = 28, tiles: int = 4, **options: Any) -> Handle:
        """A processor with the fixture's tokenizer and small tiles; `options` for the images."""
        return self.call("MllamaProcessor", self.new_image_processor(tile, tiles, **options), self.tokenizer)

    def loaded(self, name: str, **options: Any) -> Handle:
        """The tiny checkpoint in float32."""
        settings = {"torch_dtype": "float32", "attn_implementation": "eager", **options}
        return self.call(f"{name}.from_pretrained", str(self.checkpoint), **settings)

    @cached_property
    def tokenizer(self) -> Handle:
        """The fixture's tokenizer."""
        found = self.processor.get("tokenizer")
        assert isinstance(found, Handle), "the processor has no tokenizer"
        return found

    @cached_property
    def processor(self) -> Handle:
        """The processor of the tiny checkpoint."""
        return self.call("MllamaProcessor.from_pretrained", str(self.checkpoint))

    @cached_property
    def images(self) -> Handle:
        """An image processor with tiles of 28 pixels that leaves values in 0..255."""
        return self.new_image_processor()

    @cached_property
    def default_images(self) -> Handle:
        """An image processor with all defaults."""
        return self.call("MllamaImageProcessor")

    @cached_property
    def model(self) -> Handle:
        """The tiny checkpoint with eager attention, which every version can report."""
        return self.loaded(GENERATING)

    @cached_property
    def fused(self) -> Handle:
        """The tiny checkpoint with sdpa attention."""
        return self.loaded(GENERATING, attn_implementation="sdpa")

    @cached_property
    def language(self) -> Handle:
        """The tiny checkpoint as `MllamaForCausalLM`."""
        return self.loaded("MllamaForCausalLM")

    @cached_property
    def text(self) -> Handle:
        """The tiny checkpoint as `MllamaTextModel`."""
        return self.loaded("MllamaTextModel")

    @cached_property
    def vision(self) -> Handle:
        """The tiny checkpoint as `MllamaVisionModel`."""
        return self.loaded("MllamaVisionModel")

    def part(self, name: str) -> str:
        """Path of `vision_model` or `multi_modal_projector` in the generating model; 5.x has a trunk between."""
        return name if self.model.has(name) else f"model.{name}"

    def refill(self, model: Handle, pattern: str, value: float) -> None:
        """Set every number of the parameters whose names match; only of a model that no other test uses."""
        names = list(self.library.call("builtins:list", model.call("state_dict")))
        found = {name: Tensor(np.full_like(model.get(name), value)) for name in names if fnmatchcase(name, pattern)}
        assert found, f"no parameter is called {pattern}"
        model.call("load_state_dict", found, strict=False)

    def states(self, **pixels: Array) -> Array:
        """Projected features of pixels, (images * tiles, positions, width)."""
        seen = array(self.model.call(self.part("vision_model"), **arguments(**pixels)), "last_hidden_state")
        weight = self.model.get(self.part("multi_modal_projector") + ".weight")
        bias = self.model.get(self.part("multi_modal_projector") + ".bias")
        projected: Array = (seen @ weight.T + bias).reshape(-1, POSITIONS, WIDTH).astype(np.float32)
        return projected

    def call(self, name: str, *args: Any, **kwargs: Any) -> Handle:
        """Call something of the library that answers with an object."""
        made = self.library.call(name, *args, **kwargs)
        assert isinstance(made, Handle), f"{name} gave {made!r}, not an object"
        return made

    def tokenize(self, text: str) -> list[int]:
        """Token ids from the library's own tokenizer."""
        return [int(token) for token in self.tokenizer.call("", text).get("input_ids")]


@lru_cache(maxsize=1)
def mllama_objects(library: RemoteLibrary) -> MllamaObjects:
    """The objects of a worker."""
    return MllamaObjects(library)


def pixels(*ratios: int, seed: int = 0, side: int = SIDE) -> dict[str, Array]:
    """The pixel inputs of a row whose images have these aspect ratio ids; 0 is an image that is not there."""
    high_wide = [(0, 0), (1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)]
    values = np.random.Generator(np.random.PCG64(seed)).uniform(-1, 1, (1, len(ratios), TILES, 3, side, side))
    mask = np.zeros((1, len(ratios), TILES), np.int64)
    for slot, ratio in enumerate(ratios):
        mask[0, slot, : max(high_wide[ratio][0] * high_wide[ratio][1], 1)] = 1
        values[0, slot, high_wide[ratio][0] * high_wide[ratio][1] :] = 0
    return {
        "pixel_values": values.astype(np.float32),
        "aspect_ratio_ids": np.array([ratios], np.int64),
        "aspect_ratio_mask": mask,
    }


def seen(tokens: int, *spans: tuple[int, int, int], slots: int = 1) -> Array:
    """A cross-attention mask (1, tokens, slots, tiles): spans are (image, first token, tiles), to the end."""
    mask = np.zeros((1, tokens, slots, TILES), np.int64)
    for image, start, count in spans:
        mask[0, start:, image, :count] = 1
    return mask


def prompt(*tokens: int) -> Array:
    """Token ids of a row, (1, S)."""
    return np.array([tokens], np.int64)


def run(model: Handle, options: Mapping[str, Any] | None = None, /, **inputs: Array | None) -> Handle:
    """Call a model with options and arrays."""
    made = model.call("", **(options or {}), **arguments(**inputs))
    assert isinstance(made, Handle), f"the model gave {made!r}, not an object"
    return made


def logits(model: Handle, options: Mapping[str, Any] | None = None, /, **inputs: Array | None) -> Array:
    """Logits of a call."""
    return array(run(model, options, **inputs), "logits")


def close(found: Array, wanted: Array, message: str = "") -> None:
    """Equal up to what another order of float32 sums may change."""
    assert found.shape == wanted.shape, f"{message}: shape {found.shape}, not {wanted.shape}"
    np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=3e-5, err_msg=message)


def apart(found: Array, other: Array) -> bool:
    """Different by far more than rounding."""
    return bool(np.abs(found - other).max() > 1e-2 * np.abs(other).max())


def shapes(items: Sequence[Any]) -> list[tuple[int, ...] | None]:
    """Shapes of tensors, None for what is none."""
    return [item.shape if isinstance(item, np.ndarray) else None for item in items]
