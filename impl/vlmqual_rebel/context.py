"""`rebel.compile_context`: what the programs of one model have in common."""

from __future__ import annotations

import uuid
from collections.abc import Iterable

from torch import Tensor

from .weights import Weight


class CompileContext:
    """Programs compiled in one context share the buffers that are marked static, and on demand their weights.

    Source: the calls of optimum-rbln 0.12.0, which makes one for each text model and marks every `past_key_values_*`.

    Args:
        use_weight_sharing: a weight that several programs of the context hold is counted once in device memory, and
            saved once in a folder.
    """

    def __init__(self, use_weight_sharing: bool = False) -> None:
        self.uuid = uuid.uuid4().hex
        self.use_weight_sharing = use_weight_sharing
        self._static: dict[int, tuple[Tensor, str]] = {}
        self._weights: set[str] = set()

    def mark_static_address(self, tensor: Tensor, name: str) -> None:
        """Make an example input a buffer that stays on the device and that no call passes.

        Args:
            tensor: the very object that is passed in `example_inputs`; it may be on the meta device.
            name: of the buffer.

        Raises:
            TypeError: `tensor` is no tensor.
            ValueError: another tensor of this context has that name.
        """
        if not isinstance(tensor, Tensor):
            raise TypeError(f"mark_static_address: {name} is a {type(tensor).__name__}, not a torch.Tensor.")
        for other, taken in self._static.values():
            if taken == name and other is not tensor:
                raise ValueError(f"mark_static_address: {name} is already the name of another tensor.")
        self._static[id(tensor)] = (tensor, name)

    def static_name(self, tensor: Tensor) -> str | None:
        """The name under which this very tensor was marked, or None."""
        marked = self._static.get(id(tensor))
        return marked[1] if marked else None

    def claim(self, weights: Iterable[Weight]) -> frozenset[str]:
        """The digests of those weights that no earlier program of this context holds; all without weight sharing."""
        digests = {weight.digest for weight in weights}
        if not self.use_weight_sharing:
            return frozenset(digests)
        new = digests - self._weights
        self._weights |= new
        return frozenset(new)
