"""What a target offers: the protocols that an adapter implements, and the plain data they speak.

Everything that crosses the boundary is a string, a number or a numpy array with a documented name. Types that numpy
cannot name (bfloat16, float8) are widened without loss to float32; `Step.dtype` names the original.

Legend of shapes: B rows of a batch, S token positions, N image slots of a row, T tiles of an image, F real frames of
the batch, L image tokens of a frame or tile, D width of the text model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.floating[Any]]

#: Documented tensor names to arrays: input_ids (B, S) int64, attention_mask (B, S) int64,
#: pixel_values (B, N, 3, H, W) float32, pixel_attention_mask (B, N, H, W) int64, position_ids (B, S) int64.
#: Mllama: pixel_values (B, N, T, 3, H, W) float32, aspect_ratio_ids (B, N), aspect_ratio_mask (B, N, T) and
#: cross_attention_mask (B, S, N, T), all int64; the last belongs to the text and is an input of prefill.
#: Idefics: image_attention_mask (B, S, N) int64 or bool, of the text and an input of prefill; a row without images has
#: one slot of zeros that no token sees. interpolate_pos_encoding (1,) int64, 1 where pictures of another size than the
#: configuration's are to be seen; an input of vision.
Inputs = Mapping[str, Array]

FAMILIES = ("idefics", "idefics3", "mllama")
#: What stands in a prompt where an image is to be inserted.
MARKERS: Mapping[str, str] = {"idefics": "<image>", "idefics3": "<image>", "mllama": "<|image|>"}


class Capability(StrEnum):
    """Everything that a target may or may not offer. The list is closed; a missing one gives "not applicable"."""

    PREPROCESS = "preprocess"  # Session.preprocess turns prompts and image files into tensors
    VISION = "vision"  # Session.vision returns features; prefill accepts features, its own or injected
    PIXEL_MASK = "pixel-mask"  # vision honours a pixel_attention_mask that masks part of a frame
    BATCH = "batch"  # more than one row in a call
    PADDING = "padding"  # rows of unequal length, padded left or right, told apart by attention_mask
    ALL_LOGITS = "all-logits"  # Step.logits(all_positions=True) after a prefill
    TAPS = "taps"  # Step.taps and Features.taps: hidden states by component
    FORCED_TOKENS = "forced-tokens"  # decode(step, tokens): teacher forcing
    TENSOR_PARALLEL = "tensor-parallel"  # Options.tp above 1


@dataclass(frozen=True)
class Info:
    """What a target says of itself. Printed with every verdict; a dtype that is declared loosely is visible.

    Attributes:
        name: kind of the target, as in the target string.
        version: of the code that runs the model.
        device: for example "cpu", "cuda:0", "RBLN-CA25".
        runtime: what executes it, for example "torch eager 2.13.0".
        dtype: declared compute dtype: "float64", "float32", "bfloat16" or "float16".
        capabilities: what is offered.
        families: `model_type`s that can be opened.
        processes: "one" when the device splits the work itself, "per-rank" when one process per rank does.
        library: name of the library subject whose classes this target uses, with options where it takes any
            (`name:key=value,...`); "" for none.
        software: package names to versions, for the record.
        driver: driver version, "" where there is none.
        compiler: compiler version, "" where there is none.
        emulated: True when no figure of this target says anything about a device.
        fixed_shapes: True when the model runs in compiled functions of fixed shapes; sessions then have `costs`.
    """

    name: str
    version: str
    device: str
    runtime: str
    dtype: str
    capabilities: frozenset[Capability]
    families: tuple[str, ...]
    processes: Literal["one", "per-rank"] = "one"
    library: str = ""
    software: Mapping[str, str] = field(default_factory=dict)
    driver: str = ""
    compiler: str = ""
    emulated: bool = False
    fixed_shapes: bool = False


@dataclass(frozen=True)
class Model:
    """A checkpoint directory in Hugging Face layout and its `model_type`."""

    path: str
    family: str


@dataclass(frozen=True)
class Options:
    """How a model is to be opened, whatever the target.

    Attributes:
        tp: tensor-parallel size.
        max_length: cache positions of a sequence, prompt and new tokens together.
        batch: largest number of rows.
        taps: keep hidden states by component.
    """

    tp: int = 1
    max_length: int = 2048
    batch: int = 1
    taps: bool = False


@dataclass(frozen=True)
class Prompt:
    """Text after the chat template, with the family's marker (see `MARKERS`) for each image file."""

    text: str
    images: tuple[str, ...] = ()


@runtime_checkable
class Features(Protocol):
    """Image features that live in the target; reading copies, not reading costs nothing."""

    @property
    def dtype(self) -> str:
        """Name of the dtype the features have on the device."""
        ...

    def arrays(self) -> Mapping[str, FloatArray]:
        """Copy out. Idefics3: image_hidden_states (F, L, D). Mllama: cross_attention_states (B, N * T * L, D).

        Idefics, E the width of the vision tower: image_encoder_embeddings (B, N, L, E), of models with a resampler
        perceiver_embeddings (B, N, L, E).
        """
        ...

    def taps(self) -> Mapping[str, FloatArray]:
        """Hidden states by component name (Capability.TAPS): vision.embeddings, vision.layers.0, ..., connector.

        Mllama, (B * N, T, L, width) each: vision.embeddings, vision.layers.I, vision.layernorm_post,
        vision.global_layers.I, vision.intermediate_states (interleaved), and connector (B, N * T * L, D). Idefics,
        (B * N, L, E) each: vision.embeddings, vision.layers.I, and resampler.blocks.I where there is a resampler.
        """
        ...


@runtime_checkable
class Step(Protocol):
    """Sequences that live in the target, after a prefill or a decode step. A step can be decoded once."""

    @property
    def dtype(self) -> str:
        """Name of the dtype the logits have on the device."""
        ...

    def tokens(self) -> IntArray:
        """Greedy next token of every row, (B,) int64."""
        ...

    def logits(self, all_positions: bool = False) -> FloatArray:
        """Logits of the last real position, (B, V); with `all_positions` after a prefill (B, S, V)."""
        ...

    def taps(self) -> Mapping[str, FloatArray]:
        """Hidden states by component name, (B, S, D): text.embeddings, text.layers.0, ..., text.norm.

        A layer that is skipped has none. Idefics adds text.cross_layers.I, what leaves the gated cross-attention block
        before layer I.
        Idefics and Mllama may add counters.cross_attention_kv: for each layer or block with cross-attention how often
        it computed keys and values of images since the prefill began.
        """
        ...


@dataclass(frozen=True)
class Call:
    """What a call made of fixed shapes.

    Attributes:
        bucket: the sizes, in the target's own words.
        asked: tokens that were asked for, of all rows; of vision pictures.
        computed: tokens, or pictures, that were computed.
        programs: names of the functions that were run.
    """

    bucket: str
    asked: int
    computed: int
    programs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Program:
    """What it took until a compiled function could run, in seconds: making it, 0 where it was found; loading it."""

    compile_s: float
    load_s: float


@dataclass(frozen=True)
class Costs:
    """What fixed shapes cost a session.

    Attributes:
        calls: the latest call of each of "vision", "prefill" and "decode".
        programs: functions by their names, since the model was opened.
    """

    calls: Mapping[str, Call] = field(default_factory=dict)
    programs: Mapping[str, Program] = field(default_factory=dict)


class Session(Protocol):
    """An opened model. Any phase accepts tensors that the target did not make itself.

    A session of a target with `Info.fixed_shapes` also has `costs() -> Costs`. One whose device has a clock may have
    `device_s() -> float`: seconds that the device itself took for the latest call of vision, prefill or decode; it is
    asked after `synchronize()`. One of several processes may have `collectives(watched: bool) -> float`: seconds of
    this rank in collective operations since it was last asked, where they were watched; from then on they are watched,
    which waits for the device around each, or not.
    """

    def preprocess(self, prompts: Sequence[Prompt]) -> Inputs:
        """Turn prompts into padded tensors, as the target's own processor does."""
        ...

    def vision(self, inputs: Inputs) -> Features:
        """Run the vision tower to the connector's output."""
        ...

    def prefill(self, inputs: Inputs, features: Features | Mapping[str, Array] | None = None) -> Step:
        """Start new sequences. Without `features`, pixel values in `inputs` run through vision first."""
        ...

    def decode(self, step: Step, tokens: IntArray | None = None) -> Step:
        """One token further for every row: `tokens` (B,) where given, the step's own greedy tokens otherwise."""
        ...

    def synchronize(self) -> None:
        """Return when everything that was asked for has been done by the device."""
        ...


class Target(Protocol):
    """A way to run models. Made from a target string: `kind:key=value,...` calls `factory(key="value", ...)`."""

    info: Info

    def open(self, model: Model, options: Options) -> AbstractContextManager[Session]:
        """Load a checkpoint.

        A target that also has `check(model, options) -> None` is asked before anything is started: it raises the same
        UsageError as `open` would, from the configuration alone. One that has
        `footprint(model, options, prompts, new_tokens) -> vlmqual_contract.footprint.Footprint` tells what a request
        would compile, run and keep, without loading weights.

        Raises:
            UsageError: the model cannot be opened in this way; says what is wrong before loading weights.
        """
        ...

    def probe(self, name: str, shape: tuple[int, ...], dtype: str) -> float:
        """Seconds that one pass of a ceiling probe took: "stream" (n,), "gemm" (m, n, k), "all-reduce" (n,).

        Raises:
            Unsupported: this target has no such probe.
        """
        ...


class Library(Protocol):
    """A Python library as a subject: its documented classes, reached by plain-data calls in a worker.

    Attributes:
        name: name of the library.
        version: its version.
        families: `model_type`s whose documented classes this version has; requirements of others do not apply to it.

    A library that runs over an emulator also has `emulated`, which is True.
    """

    name: str
    version: str
    families: tuple[str, ...]

    def resolve(self, name: str) -> Any:
        """The object called `name` in the package root.

        Raises:
            AttributeError: there is no such object.
        """
        ...

    def to_array(self, value: Any) -> Array | None:
        """A tensor of this library as numpy array (bfloat16 widened to float32), None for anything else."""
        ...

    def from_array(self, array: Array, dtype: str | None = None) -> Any:
        """A numpy array as this library's tensor, in `dtype` where given."""
        ...
