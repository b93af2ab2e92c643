"""Small Idefics models of the library under test: settings, weights that depend on names only, inputs, shortcuts."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from vlmqual_conformance.suite.library_objects import arguments, array
from vlmqual_contract import fixtures
from vlmqual_contract.subject import Handle, RemoteLibrary, Tensor
from vlmqual_contract.target import Array

BASE, GENERATING = "IdeficsModel", "IdeficsForVisionText2Text"
Settings = dict[str, Any]

#: Every documented field. Gates open, sizes all different, so that each is told from every other.
SETTINGS: Mapping[str, Any] = {
    "vocab_size": 90,
    "additional_vocab_size": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "alpha_initializer": "ones",
    "alphas_initializer_range": 0.0,
    "alpha_type": "float",
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "cross_layer_interval": 2,
    "qk_layer_norms": False,
    "freeze_text_layers": True,
    "freeze_text_module_exceptions": [],
    "freeze_lm_head": False,
    "freeze_vision_layers": True,
    "freeze_vision_module_exceptions": [],
    "use_resampler": True,
}
VISION: Mapping[str, Any] = {
    "embed_dim": 24,
    "image_size": 28,
    "intermediate_size": 40,
    "patch_size": 14,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_channels": 3,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "initializer_factor": 1.0,
}
PERCEIVER: Mapping[str, Any] = {
    "use_resampler": False,
    "resampler_n_latents": 3,
    "resampler_depth": 2,
    "resampler_n_heads": 4,
    "resampler_head_dim": 6,
    "qk_layer_norms_perceiver": False,
}
ROWS, TOKENS, SLOTS, LAYERS, HEADS, HEAD_DIM, WIDTH = 2, 7, 2, 4, 4, 8, 32
VISION_WIDTH, POSITIONS, LATENTS, SIDE, VOCABULARY = 24, 5, 3, 28, 90


def settings(**changes: Any) -> Settings:
    """The settings with changes; keys with a dot belong to `vision_config` or `perceiver_config`."""
    made: Settings = {**SETTINGS, "vision_config": dict(VISION), "perceiver_config": dict(PERCEIVER)}
    for key, value in changes.items():
        owner, _, name = key.rpartition(".")
        (made[owner] if owner else made)[name] = value
    return made


class IdeficsModels:
    """What the tests share. Nothing in here may be changed by a test; `new_*` make objects that may.

    Attributes:
        library: the library under test.
        checkpoint: folder of the tiny checkpoint.
    """

    def __init__(self, library: RemoteLibrary) -> None:
        self.library = library
        self.checkpoint = fixtures.checkpoint("idefics-tiny")

    def new_config(self, **changes: Any) -> Handle:
        """A configuration with `settings` and whatever else is given."""
        return self.call("IdeficsConfig", **settings(**changes))

    def new_model(self, name: str = GENERATING, /, **changes: Any) -> Handle:
        """A model with the random weights of a new one, in evaluation mode."""
        model = self.call(name, self.new_config(**changes))
        model.call("eval")
        return model

    def filled(self, name: str = GENERATING, /, **changes: Any) -> Handle:
        """A model whose weights depend on nothing but their names and shapes, in evaluation mode."""
        model = self.new_model(name, **changes)
        self.fill(model)
        return model

    def fill(self, model: Handle, /, **others: Array) -> dict[str, Array]:
        """Replace all weights by `drawn` ones, or by `others` where those name them; returns them."""
        made = {name: drawn(name, shape) for name, shape in shapes(model).items()}
        assert not set(others) - set(made), f"there are no parameters {sorted(set(others) - set(made))}"
        made |= others
        model.call("load_state_dict", {name: Tensor(value) for name, value in made.items()})
        return made

    def eager(self, name: str, /, **changes: Any) -> Handle:
        """As `filled`, with attention that every version can report."""
        model = self.call(f"{name}._from_config", self.new_config(**changes), attn_implementation="eager")
        model.call("eval")
        self.fill(model)
        return model

    @cached_property
    def model(self) -> Handle:
        """The generating model with `SETTINGS` and weights from names."""
        return self.filled()

    @cached_property
    def base(self) -> Handle:
        """The `IdeficsModel` inside `model`."""
        inner = self.model.get("model")
        assert isinstance(inner, Handle)
        assert BASE in inner.bases, f"model.model is a {inner.type_name}, not an {BASE}"
        return inner

    @cached_property
    def plain(self) -> Handle:
        """A generating model without additional vocabulary and without resampler."""
        return self.filled(additional_vocab_size=0, use_resampler=False)

    @cached_property
    def checkpoint_model(self) -> Handle:
        """The tiny checkpoint in float32."""
        return self.call(f"{GENERATING}.from_pretrained", str(self.checkpoint), torch_dtype="float32")

    @cached_property
    def processor(self) -> Handle:
        """The processor of the tiny checkpoint."""
        return self.call("IdeficsProcessor.from_pretrained", str(self.checkpoint))

    def call(self, name: str, /, *args: Any, **kwargs: Any) -> Handle:
        """Call something of the library that answers with an object."""
        made = self.library.call(name, *args, **kwargs)
        assert isinstance(made, Handle), f"{name} gave {made!r}, not an object"
        return made


@lru_cache(maxsize=1)
def idefics_models(library: RemoteLibrary) -> IdeficsModels:
    """The objects of a worker."""
    return IdeficsModels(library)


# weights ----------------------------------------------------------------------------------------------------------


def drawn(name: str, shape: tuple[int, ...]) -> Array:
    """A parameter's values: norms around 1, gates far from 0, matrices that keep the size of what they multiply."""
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    if "alpha_" in name or (("norm" in name or name.endswith(".ln.weight")) and name.endswith("weight")):
        return generator.uniform(0.5, 1.5, shape).astype(np.float32)
    if len(shape) == 1 or "embed" in name.rpartition(".")[0] or name.endswith("latents"):
        return generator.normal(0.0, 0.5, shape).astype(np.float32)
    return generator.normal(0.0, 1.5 / np.sqrt(np.prod(shape[1:])), shape).astype(np.float32)


def weights(model: Handle) -> dict[str, Array]:
    """All parameters by name."""
    return {name: value for name, value in model.call("state_dict").mapping().items() if isinstance(value, np.ndarray)}


def shapes(model: Handle) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters by name."""
    return {name: value.shape for name, value in weights(model).items()}


def trainable(model: Handle) -> set[str]:
    """Names of the parameters that need gradients."""
    return {name for name in shapes(model) if model.get(f"{name}.requires_grad") is True}


# inputs -----------------------------------------------------------------------------------------------------------


def text() -> dict[str, Array]:
    """Two rows of token ids, additional ones among them; the first row begins with two tokens of padding."""
    ids = np.array([[0, 0, 1, 90, 91, 17, 40], [1, 33, 91, 8, 90, 91, 56]], np.int64)
    mask = np.ones_like(ids)
    mask[0, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def images(channels: int = 3, side: int = SIDE, seed: int = 0) -> dict[str, Array]:
    """Two pictures for each row, and which tokens see which: none, one, or (the last token) both."""
    generator = np.random.Generator(np.random.PCG64(seed))
    seen = np.zeros((ROWS, TOKENS, SLOTS), np.int64)
    seen[0, 4:, 0] = 1
    seen[1, 2:5, 0] = 1
    seen[1, 5:, 1] = 1
    seen[:, -1] = 1
    pixels = generator.uniform(-2, 2, (ROWS, SLOTS, channels, side, side)).astype(np.float32)
    return {"pixel_values": pixels, "image_attention_mask": seen}


def inputs(**changes: Array | None) -> dict[str, Array]:
    """`text` and `images` with changes; None leaves an input out."""
    return {name: value for name, value in {**text(), **images(), **changes}.items() if value is not None}


#: The positions of `text` that are no padding.
REAL = text()["attention_mask"] != 0


def run(model: Handle, options: Mapping[str, Any] | None = None, /, **changes: Array | None) -> Handle:
    """Call a model with options and `inputs`."""
    made = model.call("", **(options or {}), **arguments(**inputs(**changes)))
    assert isinstance(made, Handle), f"the model gave {made!r}, not an object"
    return made


def result(model: Handle, options: Mapping[str, Any] | None = None, /, **changes: Array | None) -> Array:
    """Logits of a call, or hidden states of a model without head."""
    made = run(model, options, **changes)
    return array(made, "logits" if made.has("logits") else "last_hidden_state")


# comparison -------------------------------------------------------------------------------------------------------


def close(found: Array, wanted: Array, message: str = "") -> None:
    """Equal up to what another order of float32 sums may change."""
    assert found.shape == wanted.shape, f"{message}: shape {found.shape}, not {wanted.shape}"
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4, err_msg=message)


def apart(found: Array, other: Array) -> bool:
    """Different by far more than rounding."""
    return bool(np.abs(found - other).max() > 1e-2 * np.abs(other).max())
