"""The bundled implementation as functions of fixed shapes in other executors, as targets: OpenVINO and ONNX Runtime."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from vlmqual_contract import machine
from vlmqual_contract.errors import Unsupported, UsageError
from vlmqual_contract.footprint import Footprint
from vlmqual_contract.target import Call, Capability, Costs, Info, Model, Options, Program, Prompt
from vlmqual_impl.target import ATTENTION, FAMILIES, checked, one_of, package_version, thread_count
from vlmqual_impl.target_session import EagerSession

if TYPE_CHECKING:
    from vlmqual_impl.artifacts import Shelf
    from vlmqual_impl.families import Family
    from vlmqual_impl.probes import Draft
    from vlmqual_impl.runtime.engines import Engine
    from vlmqual_impl.runtime.graphs import GraphRuntime

REUSE = ("yes", "no", "only")
_CAPABILITIES = frozenset(Capability) - {Capability.TAPS, Capability.TENSOR_PARALLEL}


class GraphTarget(ABC):
    """What targets over compilers share.

    Functions are compiled when a request needs them, and kept on disk: see `vlmqual_impl.artifacts`.
    """

    kind: ClassVar[str]
    extra: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]
    dtypes: ClassVar[tuple[str, ...]]
    paged: ClassVar[bool] = False  # the form of text functions; see `vlmqual_impl.paged`
    info: Info

    def __init__(
        self,
        device: str,
        dtype: str = "float32",
        threads: str | int = "",
        attention: str = "sdpa",
        chunk: str | int = 128,
        cache: str = "",
        reuse: str = "yes",
    ) -> None:
        """Say how models will be run; nothing is loaded yet.

        Args:
            device: where the executor runs.
            dtype: compute dtype.
            threads: CPU threads, "" for torch's choice.
            attention: "sdpa" leaves attention whole for the compiler, "eager" spells its products out.
            chunk: tokens of a prompt's chunk.
            cache: directory of compiled functions; "" for the user's own cache directory.
            reuse: "yes" takes compiled functions that are there, "no" compiles anew, "only" compiles nothing.

        Raises:
            UsageError: a value is not known, the executor is not installed, or the device is not there.
        """
        one_of("dtype", dtype, self.dtypes)
        one_of("attention", attention, ATTENTION)
        one_of("reuse", reuse, REUSE)
        try:
            self._chunk = int(chunk)
        except ValueError:
            self._chunk = 0
        if self._chunk < 1:
            raise UsageError(f"chunk {chunk!r} is no positive number of tokens")
        self._device, self._dtype, self._attention, self._reuse = device, dtype, attention, reuse
        self._threads = thread_count(threads)
        self._cache = Path(cache).expanduser() if cache else Path.home() / ".cache" / "vlmqual" / "compiled"
        if self._cache.exists() and not self._cache.is_dir():
            raise UsageError(f"cache {cache} is no directory")
        missing = [name for name in self.packages if not package_version(name)]
        if missing:
            raise UsageError(f"{' and '.join(missing)} cannot be found; install vlmqual[{self.extra}]")
        try:
            self.check_device()
        except ValueError as error:
            raise UsageError(str(error)) from error
        self.info = Info(
            name=self.kind,
            version=package_version("vlmqual"),
            device=device,
            runtime=" ".join(f"{name} {package_version(name)}" for name in self.packages[:1]),
            dtype=dtype,
            capabilities=_CAPABILITIES,
            families=FAMILIES,
            library="vlmqual_impl",
            software={name: package_version(name) for name in (*self.packages, "torch", "numpy", "pillow")},
            compiler=f"{self.packages[0]} {package_version(self.packages[0])}",
            fixed_shapes=True,
        )

    @abstractmethod
    def check_device(self) -> None:
        """Look whether the device is there.

        Raises:
            ValueError: it is not; names those that are.
        """

    @abstractmethod
    def engine(self, shelf: Shelf | Draft, options: Options) -> Engine:
        """The executor.

        Raises:
            ValueError: the device is not there.
        """

    @contextmanager
    def open(self, model: Model, options: Options) -> Iterator[GraphSession]:
        """Load a checkpoint on the host; functions are compiled when they are first needed.

        Raises:
            UsageError: unknown family, or a checkpoint that does not fit.
            Unsupported: more than one tensor-parallel rank is asked for.
        """
        import torch

        from vlmqual_impl.artifacts import Shelf
        from vlmqual_impl.graphs import GRAPHS
        from vlmqual_impl.runtime.graphs import GraphRuntime, Shapes
        from vlmqual_impl.weights import load, unfilled

        self.allow(options)
        if self._threads:
            torch.set_num_threads(self._threads)
        directory, values, config, family = checked(model, options)
        try:
            config = family.prepared(config, values, directory)
            with unfilled():
                network = family.network(config)
            load(network, directory, rename=family.rename, dtype=getattr(torch, self._dtype))
            settings = (("attention", self._attention), ("device", self._device))
            shelf = Shelf(self._cache, directory, settings, self._reuse)
            engine = self.engine(shelf, options)
        except (ValueError, OSError) as error:
            raise UsageError(str(error)) from error
        graphs = GRAPHS[family.name](network.eval(), self._attention, self.paged)
        shapes = Shapes(self._chunk, options.max_length, row_buckets(options.batch))
        yield GraphSession(GraphRuntime(graphs, engine, shapes), family, family.features(config), directory, options)

    def check(self, model: Model, options: Options) -> None:
        """Whether `open` would be refused, told from config.json alone.

        Raises:
            UsageError: unknown family, or another family's checkpoint.
            Unsupported: more than one tensor-parallel rank is asked for.
        """
        self.allow(options)
        checked(model, options)

    def footprint(self, model: Model, options: Options, prompts: Sequence[Prompt], new_tokens: int) -> Footprint:
        """See `vlmqual_contract.target.Target`."""
        import torch

        from vlmqual_impl.runtime.graphs import Shapes
        from vlmqual_impl.target_footprint import UNCOUNTED, outline

        self.allow(options)
        found = outline(
            model,
            options,
            prompts,
            new_tokens,
            dtype=getattr(torch, self._dtype),
            attention=self._attention,
            shapes=Shapes(self._chunk, options.max_length, row_buckets(options.batch)),
        )
        note = f"every function holds its own copy of its weights, and the embedding stays on the host; {UNCOUNTED}"
        recorder = found.recorder
        weights, cache = recorder.weights_bytes(shared=False), recorder.cache_bytes
        return Footprint(found.graphs(), 1, weights, cache, self.memory_bytes(), found.tokens, (note,))

    def memory_bytes(self) -> int | None:
        """Bytes of the device's memory, None where they are not known."""
        return machine.memory_bytes() or None if self._device == "CPU" else None

    def allow(self, options: Options) -> None:
        """Look whether a model can be opened so.

        Raises:
            Unsupported: more than one tensor-parallel rank is asked for.
        """
        if options.tp != 1:
            raise Unsupported(f"tp {options.tp}: {self.kind} runs the model on one device; 1 is valid")

    def probe(self, name: str, shape: tuple[int, ...], dtype: str) -> float:
        """Seconds of one pass of a ceiling probe, compiled for the device, the best of several.

        Args:
            name: see `probes.entry`.
            shape: (n,), (m, n, k).
            dtype: one of the target's.

        Raises:
            Unsupported: there is no such probe here; one device sums nothing.
            UsageError: the shape or the dtype is not known, or it cannot be compiled.
        """
        import torch

        from vlmqual_impl import probes

        if name not in ("stream", "gemm"):
            raise Unsupported(f"probe {name!r}: {self.kind} has stream and gemm")
        one_of("dtype", dtype, self.dtypes)
        if len(shape) != (3 if name == "gemm" else 1) or min(shape) < 1:
            raise UsageError(f"probe {name!r} takes {'(m, n, k)' if name == 'gemm' else '(n,)'}, got {shape}")
        if self._threads:
            torch.set_num_threads(self._threads)
        try:
            with probes.draft() as shelf:
                return probes.best_s(self.engine(shelf, Options()), probes.entry(name, shape, getattr(torch, dtype)))
        except (ValueError, OSError) as error:
            raise UsageError(str(error)) from error


class GraphSession(EagerSession):
    """An opened model that runs in functions of fixed shapes."""

    def __init__(self, runtime: GraphRuntime, family: Family, features: str, directory: Path, options: Options) -> None:
        super().__init__(runtime, family, features, directory, options)
        self._graphs = runtime

    def costs(self) -> Costs:
        """See `vlmqual_contract.target.Costs`."""
        runtime, made_s = self._graphs, self._graphs.engine.made_s
        calls = {
            kind: Call(waste.bucket, waste.tokens, waste.computed, waste.programs)
            for kind, waste in runtime.waste.items()
        }
        programs = {
            name: Program(made_s.get(name, 0.0), ready_s - made_s.get(name, 0.0))
            for name, ready_s in runtime.ready_s.items()
        }
        return Costs(calls, programs)


class OpenVinoTarget(GraphTarget):
    """`openvino:device=CPU,dtype=float32`: functions of fixed shapes in OpenVINO, on CPU, GPU or NPU."""

    kind = extra = "openvino"
    packages = ("openvino",)
    dtypes = ("float32", "float16")

    def __init__(
        self,
        device: str = "CPU",
        dtype: str = "float32",
        threads: str | int = "",
        attention: str = "sdpa",
        chunk: str | int = 128,
        cache: str = "",
        reuse: str = "yes",
    ) -> None:
        """See `GraphTarget`; `device` is OpenVINO's name of it."""
        super().__init__(device, dtype, threads, attention, chunk, cache, reuse)

    def check_device(self) -> None:
        """See `GraphTarget.check_device`."""
        from vlmqual_impl.runtime.openvino_engine import core

        core(self._device)

    def engine(self, shelf: Shelf | Draft, options: Options) -> Engine:
        """See `GraphTarget.engine`."""
        from vlmqual_impl.runtime.openvino_engine import OpenVinoEngine

        return OpenVinoEngine(shelf, self._device, self._threads)


class OnnxRuntimeTarget(GraphTarget):
    """`onnxruntime:device=CPU,dtype=float32`: functions of fixed shapes in ONNX Runtime, any execution provider."""

    kind, extra = "onnxruntime", "onnx"
    packages = ("onnxruntime", "onnx", "onnxscript")
    dtypes = ("float32", "float16")

    def __init__(
        self,
        device: str = "CPU",
        dtype: str = "float32",
        threads: str | int = "",
        attention: str = "sdpa",
        chunk: str | int = 128,
        cache: str = "",
        reuse: str = "yes",
    ) -> None:
        """See `GraphTarget`; `device` is an execution provider's name without its ending, for example CPU or QNN."""
        super().__init__(device, dtype, threads, attention, chunk, cache, reuse)

    def check_device(self) -> None:
        """See `GraphTarget.check_device`."""
        from vlmqual_impl.runtime.onnx_engine import provider

        provider(self._device)

    def engine(self, shelf: Shelf | Draft, options: Options) -> Engine:
        """See `GraphTarget.engine`."""
        from vlmqual_impl.runtime.onnx_engine import OnnxEngine

        return OnnxEngine(shelf, self._device, self._threads)


def row_buckets(most: int) -> tuple[int, ...]:
    """Powers of two up to the largest number of rows, and that number."""
    powers = [1 << power for power in range(most.bit_length()) if 1 << power < most]
    return (*powers, most)
