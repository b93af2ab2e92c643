"""Sessions over a loaded transformers model: the phases of the contract, each by the library's own code.

Where versions of the library differ, its own signatures decide which way is taken.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from vlmqual_contract.errors import UsageError
from vlmqual_contract.target import Array, Features, FloatArray, Inputs, IntArray, Options, Prompt, Step

_PIXELS = ("pixel_values", "pixel_attention_mask")


@dataclass(frozen=True)
class TransformersFeatures:
    """Features that live on the device: `hidden` is a tensor (F, L, D)."""

    hidden: Any
    hidden_taps: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> str:
        """Name of the dtype on the device."""
        return _dtype_name(self.hidden)

    def arrays(self) -> Mapping[str, FloatArray]:
        """Copy out image_hidden_states (F, L, D)."""
        return {"image_hidden_states": _numpy(self.hidden)}

    def taps(self) -> Mapping[str, FloatArray]:
        """Copy out hidden states by component; empty unless the session was opened with taps."""
        return {name: _numpy(value) for name, value in self.hidden_taps.items()}


class TransformersStep:
    """Sequences after a prefill or a decode step.

    Attributes:
        cache: the library's cache.
        mask: attention mask (B, S) of everything in the cache.
        positions: position of the last real token of every row, (B,).
        spent: True once it was decoded; the cache then belongs to the next step.
    """

    def __init__(self, output: Any, every: Any, last: Any, cache: Any, mask: Any, positions: Any, taps: Any) -> None:
        self._owner = output
        self._every = every
        self._last = last
        self._taps = dict(taps)
        self.cache = cache
        self.mask = mask
        self.positions = positions
        self.spent = False

    @property
    def dtype(self) -> str:
        """Name of the dtype of the logits on the device."""
        return _dtype_name(self._last)

    def tokens(self) -> IntArray:
        """Greedy next tokens (B,)."""
        return np.asarray(self.greedy().cpu().numpy(), dtype=np.int64)

    def greedy(self) -> Any:
        """Greedy next tokens (B,) on the device."""
        return self._last.argmax(dim=-1)

    def logits(self, all_positions: bool = False) -> FloatArray:
        """Logits at the last real position (B, V), or of every position (B, S, V).

        Raises:
            UsageError: every position is asked of a decode step.
        """
        if not all_positions:
            return _numpy(self._last)
        if self._every is None:
            raise UsageError("logits of all positions exist after a prefill only, not after a decode step")
        return _numpy(self._every)

    def taps(self) -> Mapping[str, FloatArray]:
        """Hidden states (B, S, D) by component; empty unless the session was opened with taps."""
        return {name: _numpy(value) for name, value in self._taps.items()}


class TransformersSession:
    """The contract's Session over one loaded model.

    Attributes:
        model: the library's model.
    """

    def __init__(self, torch: Any, library: Any, model: Any, path: Path, options: Options) -> None:
        self._torch = torch
        self._library = library
        self.model = model
        self._path = path
        self._options = options
        self._processor: Any = None
        self._forward = inspect.signature(model.forward).parameters
        self._cache_class = library.DynamicCache

    # phases ----------------------------------------------------------------------------------------------------------

    def preprocess(self, prompts: Sequence[Prompt]) -> Inputs:
        """Read the image files with the library and run its processor; rows are padded as its tokenizer says."""
        if self._processor is None:
            self._processor = self._library.AutoProcessor.from_pretrained(str(self._path), local_files_only=True)
        load_image = import_module("transformers.image_utils").load_image
        images = [[load_image(str(name)) for name in prompt.images] for prompt in prompts]
        made = self._processor(
            text=[prompt.text for prompt in prompts],
            images=images if any(images) else None,
            padding=True,
            return_tensors="pt",
        )
        return {str(name): np.asarray(value.numpy()) for name, value in made.items() if hasattr(value, "numpy")}

    def vision(self, inputs: Inputs) -> TransformersFeatures:
        """Run the library's image path up to the connector's output.

        Raises:
            UsageError: the inputs have no pixel values.
        """
        if "pixel_values" not in inputs:
            raise UsageError(f"vision needs pixel_values; the inputs are {', '.join(inputs) or 'empty'}")
        pixels = {name: self._tensor(inputs[name]) for name in _PIXELS if name in inputs}
        base = self.model.model
        points = _vision_points(base) if self._options.taps else {}
        with self._torch.inference_mode(), _watched(points) as taps:
            if hasattr(base, "get_image_features"):
                with _watched({"connector": base.connector}) as out:
                    base.get_image_features(**pixels)
                hidden = out["connector"]
            else:
                hidden = self._until_connector(pixels)
        return TransformersFeatures(hidden, taps)

    def _until_connector(self, pixels: Mapping[str, Any]) -> Any:
        """Let the model's own forward begin, and leave it when the connector has answered.

        Versions without `get_image_features` have the whole image path inside `forward`.
        """

        def leave(module: Any, args: Any, output: Any) -> None:
            raise _Reached(output)

        base = self.model.model
        handle = base.connector.register_forward_hook(leave)
        try:
            base(input_ids=self._tensor(np.zeros((1, 1), np.int64)), **pixels)
        except _Reached as reached:
            return reached.output
        finally:
            handle.remove()
        raise RuntimeError("the model's forward ended without calling its connector")

    def prefill(self, inputs: Inputs, features: Features | Mapping[str, Array] | None = None) -> Step:
        """Run the prompt through the text model with an empty cache; image features are merged by the library.

        Positions count the real tokens of a row unless `position_ids` are given, as the library's generation does.

        Raises:
            UsageError: the inputs have no input_ids.
        """
        if "input_ids" not in inputs:
            raise UsageError(f"prefill needs input_ids; the inputs are {', '.join(inputs) or 'empty'}")
        if features is None and "pixel_values" in inputs:
            features = self.vision(inputs)
        torch = self._torch
        ids = self._tensor(inputs["input_ids"])
        mask = self._tensor(inputs["attention_mask"]) if "attention_mask" in inputs else torch.ones_like(ids)
        if "position_ids" in inputs:
            positions = self._tensor(inputs["position_ids"])
        else:
            positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
        cache = self._cache_class()
        call = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache, "use_cache": True}
        with torch.inference_mode(), self._text_taps() as taps:
            output = self.model(**self._with_features(ids, self._hidden(features)), **call)
            # The last real position of a row, whichever side is padded.
            index = torch.arange(mask.shape[1], device=mask.device)
            last = (index * (mask != 0)).argmax(dim=-1)
            rows = torch.arange(mask.shape[0], device=mask.device)
            every, final, reached = output.logits, output.logits[rows, last], positions[rows, last]
        return TransformersStep(self, every, final, output.past_key_values, mask, reached, taps)

    def decode(self, step: Step, tokens: IntArray | None = None) -> Step:
        """Feed one token for every row through the cache of `step`.

        Raises:
            UsageError: the step is of another session, or was decoded before.
        """
        if not isinstance(step, TransformersStep) or step._owner is not self:
            raise UsageError("decode needs a step of the same session")
        if step.spent:
            raise UsageError("this step was decoded before; its cache has gone on to the next step")
        step.spent = True
        torch = self._torch
        with torch.inference_mode(), self._text_taps() as taps:
            ids = step.greedy() if tokens is None else self._tensor(np.asarray(tokens, dtype=np.int64))
            mask = torch.cat([step.mask, torch.ones_like(step.mask[:, :1])], dim=-1)
            positions = step.positions + 1
            output = self.model(
                input_ids=ids[:, None],
                attention_mask=mask,
                position_ids=positions[:, None],
                past_key_values=step.cache,
                use_cache=True,
            )
        cache, step.cache = output.past_key_values, None
        return TransformersStep(self, None, output.logits[:, -1], cache, mask, positions, taps)

    def synchronize(self) -> None:
        """Wait for the device."""
        synchronize(self._torch, self.model.device)

    # what the phases share -------------------------------------------------------------------------------------------

    def _with_features(self, ids: Any, hidden: Any) -> dict[str, Any]:
        """The arguments that let the installed version merge `hidden` (F, L, D) into the embeddings of `ids`."""
        if hidden is None:
            return {"input_ids": ids}
        if "image_hidden_states" in self._forward:
            return {"input_ids": ids, "image_hidden_states": hidden}
        if "mm_encoder_outputs" in self._forward:
            output = import_module("transformers.modeling_outputs").BaseModelOutputWithPooling
            return {"input_ids": ids, "mm_encoder_outputs": {"image": output(pooler_output=hidden.flatten(0, 1))}}
        base = self.model.model
        embedded = base.get_input_embeddings()(ids)
        return {"inputs_embeds": base.inputs_merger(input_ids=ids, inputs_embeds=embedded, image_hidden_states=hidden)}

    def _hidden(self, features: Features | Mapping[str, Array] | None) -> Any:
        if features is None:
            return None
        if isinstance(features, TransformersFeatures):
            return features.hidden
        arrays = features if isinstance(features, Mapping) else features.arrays()
        if "image_hidden_states" not in arrays:
            raise UsageError(f"features need image_hidden_states; there are {', '.join(arrays) or 'none'}")
        return self._tensor(arrays["image_hidden_states"]).to(self.model.dtype)

    def _tensor(self, array: Array) -> Any:
        return self._torch.from_numpy(np.array(array)).to(self.model.device)

    @contextmanager
    def _text_taps(self) -> Iterator[dict[str, Any]]:
        if not self._options.taps:
            yield {}
            return
        text = self.model.model.text_model
        points = {f"text.layers.{index}": layer for index, layer in enumerate(text.layers)} | {"text.norm": text.norm}
        taps: dict[str, Any] = {}

        def entering(module: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
            embedded = kwargs.get("inputs_embeds")
            taps["text.embeddings"] = (
                module.get_input_embeddings()(kwargs["input_ids"]) if embedded is None else embedded
            )

        handle = text.register_forward_pre_hook(entering, with_kwargs=True)
        try:
            with _watched(points) as outputs:
                yield taps
                taps.update(outputs)
        finally:
            handle.remove()


class _Reached(Exception):  # not an error: the way out of a forward that has done enough
    def __init__(self, output: Any) -> None:
        super().__init__("the connector has answered")
        self.output = output


@contextmanager
def _watched(points: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Collect the output of each module, by name, while the context is open; of a tuple its first item."""
    outputs: dict[str, Any] = {}

    def keep(name: str) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            outputs[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in points.items()]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _vision_points(base: Any) -> dict[str, Any]:
    tower = base.vision_model
    return {
        "vision.embeddings": tower.embeddings,
        **{f"vision.layers.{index}": layer for index, layer in enumerate(tower.encoder.layers)},
        "vision.post_layernorm": tower.post_layernorm,
        "connector": base.connector,
    }


def synchronize(torch: Any, device: Any) -> None:
    """Return when everything that was asked of `device` is done."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


def _dtype_name(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _numpy(tensor: Any) -> FloatArray:
    """Copy out; what numpy cannot name is widened to float32."""
    tensor = tensor.detach().cpu()
    if _dtype_name(tensor) not in ("float64", "float32", "float16"):
        tensor = tensor.float()
    return np.array(tensor.numpy())
