"""The bundled implementation on RBLN's NPUs: compiled with `rebel`, or, when asked for, over its emulator."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from vlmqual_contract.errors import Unsupported, UsageError
from vlmqual_contract.footprint import Footprint
from vlmqual_contract.target import Capability, Model, Options, Prompt
from vlmqual_impl.target import one_of, package_version
from vlmqual_impl.target_graphs import GraphTarget

if TYPE_CHECKING:
    from vlmqual_impl.artifacts import Shelf
    from vlmqual_impl.probes import Draft
    from vlmqual_impl.runtime.engines import Engine

COMPILER = "rebel-compiler"
NUMERICS = ("float32", "bfloat16")
#: Devices that a program may be divided over, and memory that programs may use on one device.
GROUPS = (1, 2, 4, 8, 16, 32)
_CA_BYTES = 16 * 2**30 - 288 * 2**20
_CR_BYTES = 144 * 2**30 - 4 * 2**30


class RblnTarget(GraphTarget):
    """`rbln:npu=RBLN-CA25`, without an NPU `rbln:emulate=1`: functions of fixed shapes compiled with `rebel`.

    Never run on an NPU. Over the emulator (`vlmqual_rebel`) a result tells whether the path is right, and nothing of a
    device; tensor parallelism is then accounted for in `footprint` and not offered.
    """

    kind, extra = "rbln", "rbln"
    packages = (COMPILER,)
    dtypes = ("float32", "float16", "bfloat16")
    paged = True

    def __init__(
        self,
        npu: str = "",
        device: str = "",
        dtype: str = "float32",
        threads: str | int = "",
        attention: str = "eager",
        chunk: str | int = "",
        cache: str = "",
        reuse: str = "yes",
        emulate: str | int = "0",
        numeric: str = "",
    ) -> None:
        """Say how models will be run; see `GraphTarget`.

        Args:
            npu: what is compiled for; "" for the NPU that is here, of the emulator RBLN-CA25.
            device: number of the device, or a range as in "0-3"; "" for the first ones.
            dtype: dtype of weights and activations that the compiler is given. It is reported to compute float32
                models in bfloat16: declare what the device computes in.
            threads: CPU threads of what stays on the host.
            attention: "eager" spells attention out, "sdpa" leaves it whole for the compiler.
            chunk: tokens of a prompt's chunk; "" for 128, on RBLN-CR 512.
            cache: directory of compiled functions; "" for the user's own cache directory.
            reuse: "yes", "no" or "only".
            emulate: "1" puts a CPU emulator where `rebel` would be, which must not be installed.
            numeric: the emulator's rounding: "float32", or "bfloat16" as the NPU is reported to.

        Raises:
            UsageError: a value is not known, or there is no SDK, or no NPU.
        """
        one_of("emulate", str(emulate), ("0", "1"))
        self._emulated = str(emulate) == "1"
        self._devices = _devices(device)
        if numeric and not self._emulated:
            raise UsageError(f"numeric {numeric!r} is a setting of the emulator; it needs emulate=1")
        one_of("numeric", numeric or "float32", NUMERICS)
        if self._emulated:
            _emulate(npu or "RBLN-CA25", numeric or "float32", max((8, *(one + 1 for one in self._devices))))
        elif not package_version(COMPILER):
            raise UsageError(
                f"{COMPILER} cannot be found; it comes from RBLN's index (https://pypi.rbln.ai/simple). "
                "Without an NPU, emulate=1 runs the same path on this CPU"
            )
        self._rebel: Any = import_module("rebel")
        self._npu = npu or str(self._rebel.get_npu_name(*self._devices[:1]) or "")
        if not self._npu:
            raise UsageError("npu is not given, and there is no NPU here whose name could be taken")
        self._numeric = numeric
        chunk = chunk or (512 if "RBLN-CR" in self._npu else 128)
        super().__init__(self._npu, dtype, threads, attention, chunk, cache, reuse)
        version, emulated = package_version(COMPILER), " (emulated)" if self._emulated else ""
        several = frozenset() if self._emulated else frozenset({Capability.TENSOR_PARALLEL})
        self.info = replace(
            self.info,
            device=f"{self._npu}{emulated}",
            runtime=f"rebel {version}{f', products rounded to {numeric}' if numeric else ''}",
            dtype=numeric if numeric == "bfloat16" else dtype,
            capabilities=self.info.capabilities | several,
            emulated=self._emulated,
            library=f"{self.info.library}:emulate=1" if self._emulated else self.info.library,
        )

    def check_device(self) -> None:
        """See `GraphTarget.check_device`.

        Raises:
            ValueError: a device is not there.
        """
        for device in self._devices:
            if not self._rebel.npu_is_available(device):
                raise ValueError(f"device {device} is not here; there are {self._rebel.device_count()} NPUs, from 0")

    def allow(self, options: Options) -> None:
        """See `GraphTarget.allow`.

        Raises:
            Unsupported: several devices over the emulator.
            UsageError: a number of devices that a program cannot be divided over, or that `device` does not name.
        """
        if options.tp > 1 and self._emulated:
            raise Unsupported(
                f"tp {options.tp}: the emulator accounts for tensor parallelism, it does not run it; 1 is valid"
            )
        _check_group(options.tp)
        if self._devices and options.tp not in (1, len(self._devices)):
            raise UsageError(f"tp {options.tp}: device names {len(self._devices)} devices")

    def engine(self, shelf: Shelf | Draft, options: Options) -> Engine:
        """See `GraphTarget.engine`."""
        from vlmqual_impl.runtime.rebel_engine import RebelEngine

        return RebelEngine(shelf, self._npu, options.tp, self._devices[: options.tp])

    def footprint(self, model: Model, options: Options, prompts: Sequence[Prompt], new_tokens: int) -> Footprint:
        """See `vlmqual_contract.target.Target`: text functions share their weights, and are divided over devices."""
        import torch

        from vlmqual_impl.runtime.graphs import Shapes
        from vlmqual_impl.target_footprint import UNCOUNTED, outline
        from vlmqual_impl.target_graphs import row_buckets

        _check_group(options.tp)
        shapes = Shapes(self._chunk, options.max_length, row_buckets(options.batch))
        kind = getattr(torch, self._dtype)
        single = replace(options, tp=1)
        found = outline(
            model, single, prompts, new_tokens, dtype=kind, attention=self._attention, shapes=shapes, paged=True
        )
        text = found.recorder.weights_bytes(shared=True, states=True)
        rest = found.recorder.weights_bytes(shared=False, states=False)
        notes = [
            "functions of the text model share their weights and are divided over the devices; all others lie whole on "
            f"the first; the embedding stays on the host; {UNCOUNTED}"
        ]
        if self._emulated and options.tp > 1:
            notes.append("an even division is accounted for; the emulator runs no tensor parallelism")
        cache = -(-found.recorder.cache_bytes // options.tp)
        weights = -(-text // options.tp) + rest
        return Footprint(found.graphs(), options.tp, weights, cache, self.memory_bytes(), found.tokens, tuple(notes))

    def memory_bytes(self) -> int | None:
        """Bytes that programs may use on one device, as optimum-rbln 0.12.0 counts them."""
        if "RBLN-CR" in self._npu:
            return _CR_BYTES
        return _CA_BYTES if "RBLN-CA" in self._npu else None


def _check_group(tp: int) -> None:
    if tp not in GROUPS:
        raise UsageError(f"tp {tp}: a program is divided over {', '.join(map(str, GROUPS))} devices")


def _devices(text: str) -> tuple[int, ...]:
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", str(text))
    if not text:
        return ()
    if found is None or int(found[2] or found[1]) < int(found[1]):
        raise UsageError(f"device {text!r} is no device number and no range of them; valid are for example 0 and 0-3")
    return tuple(range(int(found[1]), int(found[2] or found[1]) + 1))


def _emulate(npu: str, numeric: str, devices: int) -> None:
    from vlmqual_rebel import EmulatorError, install

    try:
        install(npu=npu, numeric=numeric, devices=devices)
    except (EmulatorError, ValueError) as error:
        raise UsageError(f"emulate=1: {error}") from error
