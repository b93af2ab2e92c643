"""The bundled implementation as a target. It and the other `target_*` modules alone know the contract."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmqual_contract.errors import UsageError
from vlmqual_contract.footprint import Footprint
from vlmqual_contract.target import Capability, Info, Model, Options, Prompt
from vlmqual_impl.target_cuda import CudaSession
from vlmqual_impl.target_session import EagerSession

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store  # type: ignore[attr-defined]  # documented, and not in its __all__

    from vlmqual_impl.configs import PretrainedConfig
    from vlmqual_impl.families import Family

FAMILIES = ("idefics", "idefics3", "mllama")
DTYPES = ("float64", "float32", "bfloat16", "float16")
ATTENTION = ("sdpa", "eager")


class EagerTarget:
    """`eager:device=cpu,dtype=float32,threads=2,attention=sdpa`: the bundled model, operation by operation."""

    info: Info

    def __init__(
        self, device: str = "cpu", dtype: str = "float32", threads: str | int = "", attention: str = "sdpa"
    ) -> None:
        """Say how models will be run; nothing is loaded yet.

        Args:
            device: "cpu", "cuda" or "cuda:N".
            dtype: compute dtype, one of `DTYPES`.
            threads: CPU threads of a process, "" for torch's default.
            attention: "sdpa" leaves attention to torch, "eager" spells its products out.

        Raises:
            UsageError: a value is not known, or the device is not there.
        """
        import torch

        self._store: tuple[Store, int, int] | None = None
        self._meetings = 0
        one_of("dtype", dtype, DTYPES)
        one_of("attention", attention, ATTENTION)
        self._device = checked_device(device)
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._attention = attention
        self._threads = thread_count(threads)
        name = f" {torch.cuda.get_device_name(self._device)}" if self._device.type == "cuda" else ""
        self.info = Info(
            name="eager",
            version=package_version("vlmqual"),
            device=f"{self._device}{name}",
            runtime=f"torch eager {torch.__version__}",
            dtype=dtype,
            capabilities=frozenset(Capability),
            families=FAMILIES,
            processes="per-rank",
            library="vlmqual_impl",
            software={key: package_version(key) for key in ("torch", "safetensors", "transformers", "pillow", "numpy")}
            | ({"cuda": str(torch.version.cuda)} if name else {}),
        )

    @contextmanager
    def open(self, model: Model, options: Options) -> Iterator[EagerSession]:
        """Load a checkpoint, this rank's part of it where `options.tp` is above 1.

        Raises:
            UsageError: unknown family, a checkpoint that does not fit, heads that do not divide by the ranks (said
                before weights are read), or no launcher around several ranks.
        """
        import torch

        from vlmqual_impl import tp
        from vlmqual_impl.weights import load, unfilled

        directory, values, config, family = checked(model, options)
        if self._threads:
            torch.set_num_threads(self._threads)
        joined = False
        try:
            try:
                rank = tp.environment(os.environ, options.tp) if options.tp > 1 else 0
                config = family.prepared(config, values, directory)
                with unfilled():
                    network = family.network(config)
                device, cuts, add = self._device, {}, tp.Sum()
                if options.tp > 1:
                    device = self._join(rank)
                    joined = True
                    cuts = tp.shard(network, family.plan, rank, options.tp, add)
                load(network, directory, rename=family.rename, cuts=cuts, dtype=self._dtype, device=device)
            except (ValueError, OSError) as error:
                raise UsageError(str(error)) from error
            runtime = family.runtime(network.eval(), self._attention)
            session = CudaSession if self._device.type == "cuda" else EagerSession
            yield session(runtime, family, family.features(config), directory, options, add)
        finally:
            _leave(joined)

    def check(self, model: Model, options: Options) -> None:
        """Whether `open` would be refused, told from config.json alone.

        Raises:
            UsageError: unknown family, another family's checkpoint, or heads that do not divide by the ranks.
        """
        checked(model, options)

    def footprint(self, model: Model, options: Options, prompts: Sequence[Prompt], new_tokens: int) -> Footprint:
        """See `vlmqual_contract.target.Target`."""
        import torch

        from vlmqual_contract import machine
        from vlmqual_impl.runtime.graphs import Shapes
        from vlmqual_impl.target_footprint import UNCOUNTED, outline

        shapes = Shapes(options.max_length, options.max_length, (len(prompts),), images=())
        found = outline(
            model, options, prompts, new_tokens, dtype=self._dtype, attention=self._attention, shapes=shapes
        )
        memory = machine.memory_bytes() or None
        notes = [f"nothing is compiled: operations run one by one; {UNCOUNTED}"]
        if self._device.type == "cuda":
            memory = torch.cuda.get_device_properties(self._device).total_memory
        elif options.tp > 1:
            notes.append("the ranks share one machine's memory")
            memory = memory and memory // options.tp
        return Footprint(
            (), options.tp, found.whole_bytes, found.recorder.cache_bytes // options.tp, memory, found.tokens, (*notes,)
        )

    def _join(self, rank: int) -> torch.device:
        """Meet the other ranks; the device of this one."""
        import torch
        import torch.distributed as dist

        if self._device.type != "cuda":
            dist.init_process_group("gloo", **self._meeting())
            return self._device
        index = int(os.environ.get("LOCAL_RANK", rank))
        if index >= torch.cuda.device_count():
            raise UsageError(f"rank {rank} wants cuda:{index}; there are {torch.cuda.device_count()} CUDA devices")
        torch.cuda.set_device(index)
        dist.init_process_group("nccl", **self._meeting())
        return torch.device("cuda", index)

    def _meeting(self) -> dict[str, Any]:
        """Where and as whom to meet: one store for as long as the process lives, and in it a place for each meeting.

        Ranks do not leave at the same moment; with a common place one that comes back early would read there where the
        others were the time before, and find nobody.
        """
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # likewise
        from torch.distributed.rendezvous import rendezvous

        if self._store is None:
            self._store = next(rendezvous("env://"))
        store, rank, ranks = self._store
        self._meetings += 1
        return {"store": PrefixStore(f"meeting-{self._meetings}", store), "rank": rank, "world_size": ranks}

    def probe(self, name: str, shape: tuple[int, ...], dtype: str) -> float:
        """Seconds of one pass of a ceiling probe, the best of several.

        Several ranks start every pass together, so that each has what the others leave it. They meet for the probe
        where no session is open.

        Args:
            name: "stream" copies n elements (2 n elements of traffic), "gemm" multiplies (m, k) by (k, n),
                "all-reduce" sums n elements over the ranks (with one rank: a pass that moves nothing).
            shape: (n,), (m, n, k), (n,).
            dtype: one of `DTYPES`.

        Raises:
            UsageError: the probe, its shape or the dtype is not known, or the ranks cannot meet.
        """
        import torch

        one_of("dtype", dtype, DTYPES)
        one_of("probe", name, ("stream", "gemm", "all-reduce"))
        if len(shape) != (3 if name == "gemm" else 1) or min(shape) < 1:
            raise UsageError(f"probe {name!r} takes {'(m, n, k)' if name == 'gemm' else '(n,)'}, got {shape}")
        if self._threads:
            torch.set_num_threads(self._threads)
        with self._together():
            return self._best(self._pass(name, shape, getattr(torch, dtype)))

    @contextmanager
    def _together(self) -> Iterator[None]:
        """A group of all ranks of this launch: that of the open session, or one for the time being."""
        import torch.distributed as dist

        from vlmqual_impl import tp

        ranks = int(os.environ.get("WORLD_SIZE") or 1)
        joined = ranks > 1 and not dist.is_initialized()
        try:
            if joined:
                self._join(tp.environment(os.environ, ranks))
            yield
        except ValueError as error:
            raise UsageError(str(error)) from error
        finally:
            _leave(joined)

    def _pass(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[], object]:
        """What one pass of a probe does, over buffers of its own."""
        import torch
        import torch.distributed as dist

        if name == "gemm":
            m, n, k = shape
            left = torch.ones((m, k), dtype=dtype, device=self._device)
            right = torch.ones((k, n), dtype=dtype, device=self._device)
            out = torch.empty((m, n), dtype=dtype, device=self._device)
            return lambda: torch.mm(left, right, out=out)
        source = torch.ones(shape, dtype=dtype, device=self._device)
        if name == "stream":
            target = torch.empty_like(source)
            return lambda: target.copy_(source)
        several = dist.is_initialized() and dist.get_world_size() > 1
        return lambda: dist.all_reduce(source, op=dist.ReduceOp.MAX) if several else None

    def _best(self, work: Callable[[], object], repetitions: int = 5) -> float:
        import torch
        import torch.distributed as dist

        best = float("inf")
        for _ in range(repetitions + 1):  # the first touches memory and is not better than the others
            if dist.is_initialized() and dist.get_world_size() > 1:
                dist.barrier()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            start = time.perf_counter()
            work()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            best = min(best, time.perf_counter() - start)
        return best


def checked(model: Model, options: Options) -> tuple[Path, dict[str, Any], PretrainedConfig, Family]:
    """The directory, the content of its config.json, the configuration and the family of a checkpoint.

    Raises:
        UsageError: unknown family, another family's checkpoint, an option without sense, or heads that do not divide by
            the ranks.
    """
    from vlmqual_impl import families, tp
    from vlmqual_impl.checkpoints import locate
    from vlmqual_impl.configs import config_for, read_config

    if model.family not in FAMILIES:
        raise UsageError(f"family {model.family!r} cannot be opened; known are {', '.join(FAMILIES)}")
    for name in ("tp", "max_length", "batch"):
        if getattr(options, name) < 1:
            raise UsageError(f"option {name} is {getattr(options, name)}; it has to be positive")
    try:
        family = families.family(model.family)
        directory = locate(model.path)
        values = read_config(directory)
        config = config_for(values)
        if config.model_type != family.name:
            raise UsageError(f"{model.path} is a checkpoint of {config.model_type!r}, not {model.family!r}")
        tp.check(family.divisible(config), options.tp)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    return directory, values, config, family


def _leave(joined: bool) -> None:
    import torch.distributed as dist

    if joined and dist.is_initialized():
        dist.destroy_process_group()


def one_of(what: str, value: str, valid: Sequence[str]) -> None:
    """Refuse a value that is not known.

    Raises:
        UsageError: names the valid ones.
    """
    if value not in valid:
        raise UsageError(f"{what} {value!r} is not known; valid are {', '.join(valid)}")


def thread_count(value: str | int) -> int:
    """Number of threads, 0 for "".

    Raises:
        UsageError: no positive number.
    """
    if value == "":
        return 0
    try:
        count = int(value)
    except ValueError:
        count = 0
    if count < 1:
        raise UsageError(f"threads {value!r} is no positive number")
    return count


def checked_device(text: str) -> torch.device:
    """The device of this name.

    Raises:
        UsageError: the name is not known, or there is no such device here.
    """
    import torch

    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"device {text!r} is not known; valid are cpu, cuda, cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device {text!r} is not here; there are {torch.cuda.device_count()} CUDA devices")
    if device.type == "cpu" and device.index:
        raise UsageError(f"device {text!r} is not known; valid are cpu, cuda, cuda:N")
    return device


def package_version(package: str) -> str:
    """Of an installed package, "" where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
