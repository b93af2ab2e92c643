"""A model that `target` has opened: what it is asked, what it hands out, in and out as numpy arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlmqual_contract.errors import UsageError
from vlmqual_contract.target import Array, Features, FloatArray, Inputs, IntArray, Options, Prompt, Step

if TYPE_CHECKING:
    from torch import Tensor

    from vlmqual_impl.families import Family
    from vlmqual_impl.runtime.base import Runtime, Sequences
    from vlmqual_impl.tp import Sum


class EagerSession:
    """An opened model."""

    def __init__(
        self,
        runtime: Runtime,
        family: Family,
        features: str,
        directory: Path,
        options: Options,
        add: Sum | None = None,
    ) -> None:
        self._runtime = runtime
        self._add = add
        self._family = family
        self._features = features
        self._directory = directory
        self._options = options
        self._processor: Any = None

    def preprocess(self, prompts: Sequence[Prompt]) -> Inputs:
        """Padded tensors of prompts and image files; the shorter rows are padded on the left.

        Raises:
            UsageError: the checkpoint has no processor, or an image cannot be read.
        """
        try:
            return self._preprocess(prompts)
        except (ValueError, OSError) as error:
            raise UsageError(str(error)) from error

    def _preprocess(self, prompts: Sequence[Prompt]) -> Inputs:
        from vlmqual_impl.image_files import read_image

        if self._processor is None:
            from vlmqual_impl.api.auto import AutoProcessor

            self._processor = AutoProcessor.from_pretrained(str(self._directory))
            self._processor.tokenizer.padding_side = "left"
        images = [[read_image(path) for path in prompt.images] for prompt in prompts]
        prompted = self._family.prompted([prompt.text for prompt in prompts], images)
        batch = self._processor(**prompted, padding=True, return_tensors="np")
        return {key: np.asarray(value) for key, value in batch.items()}

    def vision(self, inputs: Inputs) -> Features:
        """Run the vision tower to the connector's output."""
        if "pixel_values" not in inputs:
            raise UsageError("vision needs pixel_values; the inputs are " + ", ".join(inputs))
        taps: dict[str, Tensor] | None = {} if self._options.taps else None
        features = self._runtime.encode(_tensors(inputs), taps)
        return EagerFeatures(self._features, features, taps or {})

    def prefill(self, inputs: Inputs, features: Features | Mapping[str, Array] | None = None) -> Step:
        """Start new sequences; rows may be of unequal length."""
        import torch

        given: Tensor | None = None
        if isinstance(features, EagerFeatures):
            given = features.tensor
        elif features is not None:
            arrays = features if isinstance(features, Mapping) else features.arrays()
            if self._features not in arrays:
                raise UsageError(f"features have {', '.join(arrays) or 'nothing'}; {self._features} is needed")
            given = torch.as_tensor(np.ascontiguousarray(arrays[self._features]))
        sequences = self._runtime.prefill(
            _tensors(inputs), given, max_length=self._options.max_length, taps=self._options.taps
        )
        return EagerStep(self._runtime, sequences, whole=True)

    def decode(self, step: Step, tokens: IntArray | None = None) -> Step:
        """One token further: `tokens` (B,) where given, the step's own greedy tokens otherwise."""
        import torch

        if not isinstance(step, EagerStep):
            raise UsageError(f"decode continues a step of this session, not a {type(step).__name__}")
        if tokens is None:
            chosen = step.greedy()
        else:
            vocabulary = self._runtime.vocabulary
            ids = np.asarray(tokens)
            if ids.size and not (ids.min() >= 0 and ids.max() < vocabulary):
                raise UsageError(f"forced tokens {ids.tolist()} leave the vocabulary 0 to {vocabulary - 1}")
            chosen = torch.as_tensor(ids.astype(np.int64))
        return EagerStep(self._runtime, self._runtime.decode(step.sequences, chosen, taps=self._options.taps))

    def synchronize(self) -> None:
        """Return when the device has done everything."""
        self._runtime.synchronize()

    def collectives(self, watched: bool) -> float:
        """See `vlmqual_contract.target.Session`."""
        return 0.0 if self._add is None else self._add.watch(watched)


class EagerFeatures:
    """Image features on the device."""

    def __init__(self, name: str, tensor: Tensor, taps: Mapping[str, Tensor]) -> None:
        self._name = name
        self.tensor = tensor
        self._taps = taps

    @property
    def dtype(self) -> str:
        """Name of the dtype on the device."""
        return str(self.tensor.dtype).removeprefix("torch.")

    def arrays(self) -> Mapping[str, FloatArray]:
        """The features under their documented name; see `vlmqual_contract.target.Features`."""
        return {self._name: widened(self.tensor)}

    def taps(self) -> Mapping[str, FloatArray]:
        """Hidden states by component name."""
        return {name: widened(value) for name, value in self._taps.items()}


class EagerStep:
    """Sequences on the device."""

    def __init__(self, runtime: Runtime, sequences: Sequences, whole: bool = False) -> None:
        self.sequences = sequences
        self._runtime = runtime
        self._whole = whole
        self._greedy: Tensor | None = None

    @property
    def dtype(self) -> str:
        """Name of the logits' dtype on the device."""
        return str(self.sequences.logits.dtype).removeprefix("torch.")

    def greedy(self) -> Tensor:
        """Greedy next tokens (B,), still on the device."""
        if self._greedy is None:
            self._greedy = self.sequences.logits.argmax(-1)
        return self._greedy

    def tokens(self) -> IntArray:
        """Greedy next token of every row, (B,)."""
        found: IntArray = self.greedy().cpu().numpy()
        return found

    def logits(self, all_positions: bool = False) -> FloatArray:
        """Logits of the last real position (B, V), of every position (B, S, V) where asked for after a prefill."""
        if not all_positions:
            return widened(self.sequences.logits)
        return widened(self._runtime.head(self.sequences.hidden))

    def taps(self) -> Mapping[str, FloatArray]:
        """Hidden states by component name, (B, S, D)."""
        return {name: widened(value) for name, value in self.sequences.taps.items()}


def widened(tensor: Tensor) -> Array:
    """A copy in numpy, types that numpy cannot name as float32."""
    import torch

    value = tensor.detach().cpu()
    if value.dtype.is_floating_point and value.dtype not in (torch.float16, torch.float32, torch.float64):
        value = value.to(torch.float32)
    array: Array = value.numpy().copy()
    return array


def _tensors(inputs: Inputs) -> dict[str, Tensor]:
    import torch

    return {key: torch.as_tensor(np.ascontiguousarray(value)) for key, value in inputs.items()}
