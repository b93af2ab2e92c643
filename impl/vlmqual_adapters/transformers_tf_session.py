"""Sessions over a loaded TFIdeficsForVisionText2Text: the phases of the contract, each by the library's own layers.

Legend of shapes: B rows, S token positions, N image slots, L positions of an image, E width of the vision tower,
D width of the text model, V vocabulary with the additional one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from vlmqual_adapters.transformers_idefics import items
from vlmqual_contract.errors import UsageError
from vlmqual_contract.target import Array, Features, FloatArray, Inputs, IntArray, Options, Prompt, Step

_NAMES = (ENCODED, RESAMPLED) = "image_encoder_embeddings", "perceiver_embeddings"
_MASK = "image_attention_mask"


@dataclass(frozen=True)
class TransformersTfFeatures:
    """Features that live in TensorFlow.

    Attributes:
        name: documented name of the tensor.
        hidden: the tensor (B, N, L, E).
        hidden_taps: hidden states by component.
    """

    name: str
    hidden: Any
    hidden_taps: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> str:
        """Name of the dtype on the device."""
        return str(self.hidden.dtype.name)

    def arrays(self) -> Mapping[str, FloatArray]:
        """Copy out the tensor under its documented name."""
        return {self.name: np.array(self.hidden)}

    def taps(self) -> Mapping[str, FloatArray]:
        """Copy out hidden states by component; empty unless the session was opened with taps."""
        return {name: np.array(value) for name, value in self.hidden_taps.items()}


class TransformersTfStep:
    """Sequences after a prefill or a decode step.

    Attributes:
        cache: keys and values, a tuple for each layer.
        mask: attention mask (B, S) of everything in the cache.
        later: what the next call needs of the prompt's images.
        spent: True once it was decoded; the cache then belongs to the next step.
    """

    def __init__(self, owner: TransformersTfSession, every: Any, last: Any, cache: Any, mask: Any, later: Any) -> None:
        self._owner = owner
        self._every = every
        self._last = last
        self._taps = owner.taken()
        self.cache = cache
        self.mask = mask
        self.later: Mapping[str, Any] = later
        self.spent = False

    @property
    def dtype(self) -> str:
        """Name of the dtype of the logits on the device."""
        return str(self._last.dtype.name)

    def tokens(self) -> IntArray:
        """Greedy next tokens (B,)."""
        return np.asarray(np.argmax(self._last.numpy(), axis=-1), dtype=np.int64)

    def logits(self, all_positions: bool = False) -> FloatArray:
        """Logits at the last real position (B, V), or of every position (B, S, V).

        Raises:
            UsageError: every position is asked of a decode step.
        """
        if not all_positions:
            return np.array(self._last)
        if self._every is None:
            raise UsageError("logits of all positions exist after a prefill only, not after a decode step")
        return np.array(self._every)

    def taps(self) -> Mapping[str, FloatArray]:
        """Hidden states (B, S, D) by component; empty unless the session was opened with taps."""
        return {name: np.array(value) for name, value in self._taps.items()}


class TransformersTfSession:
    """The contract's Session over one loaded model.

    Attributes:
        model: the library's model.
    """

    def __init__(self, tensorflow: Any, model: Any, path: Path, options: Options) -> None:
        self.model = model
        self._tf = tensorflow
        self._path = path
        self._processor: Any = None
        self._seen: dict[str, Any] = {}
        self._computed = [0] * len(model.model.gated_cross_attn_layers)
        self._resampled = bool(model.config.use_resampler)
        if options.taps:
            self._watch()

    # phases ----------------------------------------------------------------------------------------------------------

    def preprocess(self, prompts: Sequence[Prompt]) -> Inputs:
        """Read the image files with the library and run its processor for TensorFlow; masks and ids become int64."""
        if self._processor is None:
            # Without PyTorch the package root has a placeholder only, but the module of the class works.
            kind = import_module("transformers.models.idefics.processing_idefics").IdeficsProcessor
            self._processor = kind.from_pretrained(str(self._path), local_files_only=True)
        load_image = import_module("transformers.image_utils").load_image
        made = self._processor(
            text=[items(prompt, [load_image(str(name)) for name in prompt.images]) for prompt in prompts],
            padding="longest",
            return_tensors="tf",
        )
        arrays = {str(name): np.array(value) for name, value in made.items()}
        return {name: value if name == "pixel_values" else value.astype(np.int64) for name, value in arrays.items()}

    def vision(self, inputs: Inputs) -> TransformersTfFeatures:
        """Run vision tower and, where there is one, resampler, to (B, N, L, E).

        Raises:
            UsageError: the inputs have no pixel values.
        """
        if "pixel_values" not in inputs:
            raise UsageError(f"vision needs pixel_values; the inputs are {', '.join(inputs) or 'empty'}")
        pixels = self._tf.constant(inputs["pixel_values"])
        rows, slots, *picture = pixels.shape
        interpolate = bool(np.any(inputs.get("interpolate_pos_encoding", 0)))
        self._seen.clear()
        trunk = self.model.model
        hidden = trunk.vision_model(
            pixel_values=self._tf.reshape(pixels, (rows * slots, *picture)), interpolate_pos_encoding=interpolate
        ).last_hidden_state
        if self._resampled:
            hidden = trunk.perceiver_resampler(hidden)
        hidden = self._tf.reshape(hidden, (rows, slots, *hidden.shape[1:]))
        return TransformersTfFeatures(RESAMPLED if self._resampled else ENCODED, hidden, self.taken())

    def prefill(self, inputs: Inputs, features: Features | Mapping[str, Array] | None = None) -> Step:
        """Run the prompt through the text model with an empty cache.

        Positions are left to the model, which counts the real tokens of a row.

        Raises:
            UsageError: the inputs have no input_ids or no mask over images, or the features another name.
        """
        for name in ("input_ids", _MASK):
            if name not in inputs:
                raise UsageError(f"prefill needs {name}; the inputs are {', '.join(inputs) or 'empty'}")
        if features is None and "pixel_values" in inputs:
            features = self.vision(inputs)
        tf = self._tf
        ids = tf.constant(inputs["input_ids"])
        mask = tf.constant(inputs["attention_mask"]) if "attention_mask" in inputs else tf.ones_like(ids)
        # As the library's processor makes it for TensorFlow: the classes take masks of integers without effect.
        images = tf.cast(inputs[_MASK], tf.float32)
        self._seen.clear()
        self._computed = [0] * len(self._computed)
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            use_cache=True,
            image_attention_mask=images,
            **self._hidden(features),
        )
        # The last real position of a row, whichever side is padded.
        last = tf.argmax(tf.range(mask.shape[1], dtype=tf.int64) * tf.cast(mask != 0, tf.int64), axis=-1)
        final = tf.gather(output.logits, last, axis=1, batch_dims=1)
        # As the library's generation does: features are fed back, and new tokens see what the last position sees.
        later = {RESAMPLED if self._resampled else ENCODED: output.image_hidden_states, _MASK: images[:, -1:]}
        return TransformersTfStep(self, output.logits, final, output.past_key_values, mask, later)

    def decode(self, step: Step, tokens: IntArray | None = None) -> Step:
        """Feed one token for every row through the cache of `step`.

        Raises:
            UsageError: the step is of another session, or was decoded before.
        """
        if not isinstance(step, TransformersTfStep) or step._owner is not self:
            raise UsageError("decode needs a step of the same session")
        if step.spent:
            raise UsageError("this step was decoded before; its cache has gone on to the next step")
        step.spent = True
        tf = self._tf
        ids = step.tokens() if tokens is None else np.asarray(tokens, dtype=np.int64)
        mask = tf.concat([step.mask, tf.ones_like(step.mask[:, :1])], axis=-1)
        self._seen.clear()
        output = self.model(
            input_ids=tf.constant(ids[:, None]),
            attention_mask=mask,
            position_ids=tf.reduce_sum(mask, axis=-1, keepdims=True) - 1,
            past_key_values=step.cache,
            use_cache=True,
            **step.later,
        )
        cache, step.cache = output.past_key_values, None
        return TransformersTfStep(self, None, output.logits[:, -1], cache, mask, step.later)

    def synchronize(self) -> None:
        """Nothing: on a CPU every call returns when it is done."""

    # what the phases share -------------------------------------------------------------------------------------------

    def taken(self) -> dict[str, Any]:
        """What the watched layers gave in the call that was just made, and counters after a call of the text model."""
        counters = {}
        if "text.norm" in self._seen and any(self._computed):
            counters["counters.cross_attention_kv"] = np.array(self._computed, dtype=np.int64)
        return {**self._seen, **counters}

    def _hidden(self, features: Features | Mapping[str, Array] | None) -> dict[str, Any]:
        """Features under their documented name."""
        if features is None:
            return {}
        if isinstance(features, TransformersTfFeatures):
            return {features.name: features.hidden}
        arrays = features if isinstance(features, Mapping) else features.arrays()
        if found := {name: self._tf.constant(arrays[name], self._tf.float32) for name in _NAMES if name in arrays}:
            return found
        raise UsageError(f"features need {ENCODED} or {RESAMPLED}; there are {', '.join(arrays) or 'none'}")

    def _watch(self) -> None:
        trunk = self.model.model
        tower = trunk.vision_model
        points = {
            "vision.embeddings": tower.pre_layrnorm,
            **{f"vision.layers.{index}": layer for index, layer in enumerate(tower.encoder.layers)},
            "text.embeddings": trunk.embed_tokens,
            **{
                f"text.cross_layers.{index * trunk.config.cross_layer_interval}": layer
                for index, layer in enumerate(trunk.gated_cross_attn_layers)
            },
            **{f"text.layers.{index}": layer for index, layer in enumerate(trunk.decoder_layers)},
            "text.norm": trunk.norm,
        }
        for name, layer in points.items():
            self._keep(name, layer)
        if self._resampled:
            # What leaves a block is its second layer's output added to that layer's input.
            for index, (_, feed_forward) in enumerate(trunk.perceiver_resampler.blocks):
                self._keep(f"resampler.blocks.{index}", feed_forward, residual=True)
        for index, layer in enumerate(trunk.gated_cross_attn_layers):
            self._count(index, layer.cross_attn.k_proj)

    def _keep(self, name: str, layer: Any, residual: bool = False) -> None:
        """Keep what a layer gives, of a tuple its first item. Keras has no hooks; it looks `call` up at each call."""
        inner = layer.call

        def call(*args: Any, **kwargs: Any) -> Any:
            output = inner(*args, **kwargs)
            first = output[0] if isinstance(output, tuple) else output
            self._seen[name] = first + args[0] if residual else first
            return output

        layer.call = call

    def _count(self, index: int, layer: Any) -> None:
        inner = layer.call

        def call(*args: Any, **kwargs: Any) -> Any:
            self._computed[index] += 1
            return inner(*args, **kwargs)

        layer.call = call
