"""Constants of compiled programs, known by their content, so that programs that share them hold them once."""

from __future__ import annotations

import hashlib
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

_HELD: weakref.WeakValueDictionary[str, Tensor] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class Weight:
    """A constant: the digest of its dtype, shape and bytes, and the tensor, which nobody writes to."""

    digest: str
    tensor: Tensor

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole tensor, on all devices together."""
        return self.tensor.nbytes


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor in row-major order."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def dtype_name(dtype: torch.dtype) -> str:
    """torch.int16 -> int16."""
    return str(dtype).removeprefix("torch.")


def digest_of(dtype: str, shape: tuple[int, ...], data: bytes | memoryview) -> str:
    """SHA-256 of what a constant is."""
    digest = hashlib.sha256(f"{dtype} {list(shape)}\n".encode())
    digest.update(data)
    return digest.hexdigest()


def intern(tensor: Tensor) -> Weight:
    """The one constant with this content: a copy that does not follow later changes of `tensor`."""
    source = tensor.detach().contiguous()
    digest = digest_of(dtype_name(source.dtype), tuple(source.shape), raw(source))
    held = _HELD.get(digest)
    return Weight(digest, _HELD.setdefault(digest, source.clone()) if held is None else held)


def hold(digest: str, tensor: Tensor) -> Weight:
    """The one constant with this digest; `tensor`, which nobody else writes to, if it is the first."""
    return Weight(digest, _HELD.setdefault(digest, tensor))


def hollow(tensor: Tensor) -> Tensor:
    """A tensor of the same dtype and shape that owns a single element, to stand in a file for one kept elsewhere."""
    return torch.zeros(1, dtype=tensor.dtype).reshape((1,) * tensor.dim()).expand(tensor.shape)
