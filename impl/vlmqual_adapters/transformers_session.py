"""Sessions over a loaded transformers model: the phases of the contract, each by the library's own code.

What depends on the family is in `transformers_idefics`, `transformers_idefics3` and `transformers_mllama`. Where
versions of the library differ, its own signatures decide which way is taken.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from vlmqual_contract.errors import UsageError
from vlmqual_contract.target import Array, Features, FloatArray, Inputs, IntArray, Options, Prompt, Step


@dataclass(frozen=True)
class TransformersFeatures:
    """Features that live on the device.

    Attributes:
        name: documented name of the tensor.
        hidden: the tensor.
        hidden_taps: hidden states by component.
    """

    name: str
    hidden: Any
    hidden_taps: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> str:
        """Name of the dtype on the device."""
        return dtype_name(self.hidden)

    def arrays(self) -> Mapping[str, FloatArray]:
        """Copy out the tensor under its documented name."""
        return {self.name: as_numpy(self.hidden)}

    def taps(self) -> Mapping[str, FloatArray]:
        """Copy out hidden states by component; empty unless the session was opened with taps."""
        return {name: as_numpy(value) for name, value in self.hidden_taps.items()}


class TransformersStep:
    """Sequences after a prefill or a decode step.

    Attributes:
        cache: the library's cache.
        mask: attention mask (B, S) of everything in the cache.
        positions: position of the last real token of every row, (B,).
        later: what the family's next call needs of the prompt's inputs.
        spent: True once it was decoded; the cache then belongs to the next step.
    """

    def __init__(
        self, output: Any, every: Any, last: Any, cache: Any, mask: Any, positions: Any, taps: Any, later: Any
    ) -> None:
        self._owner = output
        self._every = every
        self._last = last
        self._taps = dict(taps)
        self.cache = cache
        self.mask = mask
        self.positions = positions
        self.later: Mapping[str, Any] = later
        self.spent = False

    @property
    def dtype(self) -> str:
        """Name of the dtype of the logits on the device."""
        return dtype_name(self._last)

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
            return as_numpy(self._last)
        if self._every is None:
            raise UsageError("logits of all positions exist after a prefill only, not after a decode step")
        return as_numpy(self._every)

    def taps(self) -> Mapping[str, FloatArray]:
        """Hidden states (B, S, D) by component; empty unless the session was opened with taps."""
        return {name: as_numpy(value) for name, value in self._taps.items()}


class Processing:
    """The library's processor of a checkpoint, read when it is first asked for.

    Args:
        library: the module transformers.
        path: the checkpoint directory.
    """

    def __init__(self, library: Any, path: Path) -> None:
        self._library = library
        self._path = path
        self._processor: Any = None

    def preprocess(self, prompts: Sequence[Prompt]) -> Inputs:
        """Read the image files with the library and run its processor; rows are padded as its tokenizer says."""
        if self._processor is None:
            self._processor = self._library.AutoProcessor.from_pretrained(str(self._path), local_files_only=True)
        load_image = import_module("transformers.image_utils").load_image
        images = [[load_image(str(name)) for name in prompt.images] for prompt in prompts]
        made = self.call_processor(self._processor, prompts, images)
        return {str(name): np.asarray(value.numpy()) for name, value in made.items() if hasattr(value, "numpy")}

    def call_processor(self, processor: Any, prompts: Sequence[Prompt], images: list[list[Any]]) -> Mapping[str, Any]:
        """The library's processor called with texts and the images that were read for them."""
        made: Mapping[str, Any] = processor(
            text=[prompt.text for prompt in prompts],
            images=images if any(images) else None,
            padding=True,
            return_tensors="pt",
        )
        return made


class TransformersSession(Processing, ABC):
    """The contract's Session over one loaded model.

    Attributes:
        features_name: documented name of image features.
        model: the library's model.
    """

    features_name: str

    def __init__(self, torch: Any, library: Any, model: Any, path: Path, options: Options) -> None:
        super().__init__(library, path)
        self.torch = torch
        self.model = model
        self.options = options
        self.forward_parameters = inspect.signature(model.forward).parameters

    # of the family ---------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def text_model(self) -> Any:
        """The module whose `layers` and `norm` are the decoder's."""

    @abstractmethod
    def vision(self, inputs: Inputs) -> TransformersFeatures:
        """Run the library's image path up to the connector's output.

        Raises:
            UsageError: the inputs have no pixel values.
        """

    @abstractmethod
    def first_call(self, ids: Any, hidden: Any, inputs: Inputs) -> tuple[dict[str, Any], Mapping[str, Any]]:
        """The family's arguments of a prompt's forward, and what later calls need."""

    @abstractmethod
    def next_call(self, later: Mapping[str, Any]) -> dict[str, Any]:
        """The family's arguments of a decode step's forward."""

    def new_cache(self) -> Any:
        """An empty cache of the library."""
        return self._library.DynamicCache()

    def text_points(self) -> dict[str, Any]:
        """Modules whose outputs are taps of the text side, by component."""
        text = self.text_model
        return {f"text.layers.{index}": layer for index, layer in enumerate(text.layers)} | {"text.norm": text.norm}

    def count_taps(self) -> dict[str, Any]:
        """Counters that belong to the taps of the step that was just made."""
        return {}

    # phases ----------------------------------------------------------------------------------------------------------

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
        torch = self.torch
        ids = self.tensor(inputs["input_ids"])
        mask = self.tensor(inputs["attention_mask"]) if "attention_mask" in inputs else torch.ones_like(ids)
        if "position_ids" in inputs:
            positions = self.tensor(inputs["position_ids"])
        else:
            positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
        cache = self.new_cache()
        call = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache, "use_cache": True}
        with torch.inference_mode(), self._text_taps() as taps:
            own, later = self.first_call(ids, self._hidden(features), inputs)
            output = self.model(**own, **call)
            # The last real position of a row, whichever side is padded.
            index = torch.arange(mask.shape[1], device=mask.device)
            last = (index * (mask != 0)).argmax(dim=-1)
            rows = torch.arange(mask.shape[0], device=mask.device)
            every, final, reached = output.logits, output.logits[rows, last], positions[rows, last]
            taps |= self.count_taps() if self.options.taps else {}
        return TransformersStep(self, every, final, output.past_key_values, mask, reached, taps, later)

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
        torch = self.torch
        with torch.inference_mode(), self._text_taps() as taps:
            ids = step.greedy() if tokens is None else self.tensor(np.asarray(tokens, dtype=np.int64))
            mask = torch.cat([step.mask, torch.ones_like(step.mask[:, :1])], dim=-1)
            positions = step.positions + 1
            output = self.model(
                input_ids=ids[:, None],
                attention_mask=mask,
                position_ids=positions[:, None],
                past_key_values=step.cache,
                use_cache=True,
                **self.next_call(step.later),
            )
            taps |= self.count_taps() if self.options.taps else {}
        cache, step.cache = output.past_key_values, None
        return TransformersStep(self, None, output.logits[:, -1], cache, mask, positions, taps, step.later)

    def synchronize(self) -> None:
        """Wait for the device."""
        synchronize(self.torch, self.model.device)

    # what the phases share -------------------------------------------------------------------------------------------

    def _hidden(self, features: Features | Mapping[str, Array] | None) -> Any:
        if features is None:
            return None
        if isinstance(features, TransformersFeatures):
            return features.hidden
        arrays = features if isinstance(features, Mapping) else features.arrays()
        if self.features_name not in arrays:
            raise UsageError(f"features need {self.features_name}; there are {', '.join(arrays) or 'none'}")
        return self.tensor(arrays[self.features_name]).to(self.model.dtype)

    def pixels(self, inputs: Inputs, names: Sequence[str]) -> dict[str, Any]:
        """Those of the named tensors that the inputs have, on the device.

        Raises:
            UsageError: there are no pixel values.
        """
        if "pixel_values" not in inputs:
            raise UsageError(f"vision needs pixel_values; the inputs are {', '.join(inputs) or 'empty'}")
        return {name: self.tensor(inputs[name]) for name in names if name in inputs}

    def tensor(self, array: Array) -> Any:
        """An array on the device."""
        return self.torch.from_numpy(np.array(array)).to(self.model.device)

    @contextmanager
    def _text_taps(self) -> Iterator[dict[str, Any]]:
        if not self.options.taps:
            yield {}
            return
        text = self.text_model
        taps: dict[str, Any] = {}

        def entering(module: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
            embedded = kwargs.get("inputs_embeds")
            taps["text.embeddings"] = (
                module.get_input_embeddings()(kwargs["input_ids"]) if embedded is None else embedded
            )

        handle = text.register_forward_pre_hook(entering, with_kwargs=True)
        try:
            with watched(self.text_points()) as outputs:
                yield taps
                taps.update(outputs)
        finally:
            handle.remove()


@contextmanager
def watched(points: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
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


def synchronize(torch: Any, device: Any) -> None:
    """Return when everything that was asked of `device` is done."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


def dtype_name(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def as_numpy(tensor: Any) -> FloatArray:
    """Copy out; what numpy cannot name is widened to float32."""
    tensor = tensor.detach().cpu()
    if dtype_name(tensor) not in ("float64", "float32", "float16"):
        tensor = tensor.float()
    return np.array(tensor.numpy())
