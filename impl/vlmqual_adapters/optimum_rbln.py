"""optimum-rbln, the vendor's own library, as a target: its Idefics3 class, unmodified.

It compiles for an NPU with the vendor's `rebel-compiler`. Where that is not, `emulate=1` runs the same Python code
over `vlmqual_rebel`, a CPU emulator: the result tells whether the library's code is right, and nothing of an NPU.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vlmqual_adapters.optimum_rbln_session import OptimumRblnSession
from vlmqual_adapters.transformers_target import checkpoint, software
from vlmqual_contract.errors import Unsupported, UsageError
from vlmqual_contract.target import Capability, Info, Model, Options

FAMILY = "idefics3"
LIBRARY = "optimum-rbln"
COMPILER = "rebel-compiler"
CLASS = "RBLNIdefics3ForConditionalGeneration"
DTYPES = ("float32", "bfloat16", "float16")
ATTENTION = {"eager": "eager", "flash": "flash_attn"}
SWITCH = {"0": False, "1": True}
#: The class takes a mask of pixels, so it is judged with one.
_CAPABILITIES = frozenset(Capability) - {Capability.ALL_LOGITS, Capability.TAPS, Capability.TENSOR_PARALLEL}


class OptimumRblnTarget:
    """`optimum-rbln:npu=RBLN-CA25`, without an NPU `optimum-rbln:emulate=1,npu=RBLN-CA25`.

    Attributes:
        info: see `vlmqual_contract.target.Info`; `emulated` is True over the emulator, and device and runtime say so.
    """

    def __init__(
        self,
        emulate: str | int = "0",
        npu: str = "",
        device: str = "",
        dtype: str = "float32",
        numeric: str = "",
        chunk: str | int = "",
        attention: str = "eager",
        partition: str | int = "",
        cache: str = "",
    ) -> None:
        """Import the library, over the emulator if that is asked for; nothing is compiled yet.

        Args:
            emulate: "1" stands an emulator in for the vendor's SDK, which must then not be installed.
            npu: name of the NPU to compile for; "" is that of device 0, of the emulator RBLN-CA25.
            device: id of the device, or a range of ids as in "0-3" for the text model; "" for the first ones.
            dtype: dtype that the checkpoint is loaded in, which is that of the compiled programs.
            numeric: of the emulator only: "bfloat16" rounds every product as an NPU is reported to; "" is "float32".
            chunk: tokens of a prompt's chunk; "" for the library's own choice.
            attention: "eager" holds a sequence's cache in one block, "flash" in blocks of `partition`.
            partition: cache positions of a block, with "flash" only; "" for the library's own choice.
            cache: directory in which compiled models are kept and found again; "" keeps none.

        Raises:
            UsageError: an option has no valid value, or optimum-rbln or rebel-compiler is missing.
        """
        self._emulate = one_of("emulate", str(emulate), tuple(SWITCH)) == "1"
        one_of("dtype", dtype, DTYPES)
        one_of("attention", attention, tuple(ATTENTION))
        if partition and attention != "flash":
            raise UsageError(f"partition {partition!r} belongs to attention=flash; attention is {attention!r}")
        if numeric and not self._emulate:
            raise UsageError(f"numeric {numeric!r} is a setting of the emulator; it needs emulate=1")
        self._chunk = _positive("chunk", chunk)
        self._partition = _positive("partition", partition)
        self._devices = device_ids(device)
        self._cache = Path(cache) if cache else None
        self._dtype, self._attention = dtype, attention
        self._modules = import_optimum(_settings(npu, numeric, self._devices) if self._emulate else None)
        self._npu = npu or self._modules.rebel.get_npu_name() or ""
        if not self._npu:
            raise UsageError("npu is not given, and this host has no NPU whose name could be taken")
        self.info = self._describe(numeric)

    def _describe(self, numeric: str) -> Info:
        found = software(LIBRARY, "transformers", "torch", "tokenizers", "safetensors", "pillow", "numpy")
        compiler = version(COMPILER)
        emulated = " (emulated on this CPU)" if self._emulate else ""
        capabilities = _CAPABILITIES if self._emulate else _CAPABILITIES | {Capability.TENSOR_PARALLEL}
        if not self._modules.transformers.utils.is_torchvision_available():
            # The image processors of the version that is pinned cannot be loaded without torchvision.
            capabilities -= {Capability.PREPROCESS}
        return Info(
            name=LIBRARY,
            version=found[LIBRARY],
            device=f"{self._npu}{emulated}",
            runtime=f"rebel {compiler} {self._attention}{emulated}",
            dtype=_declared(self._dtype, numeric or "float32") if self._emulate else _declared(self._dtype, "bfloat16"),
            capabilities=capabilities,
            families=(FAMILY,),
            library=f"{LIBRARY}:emulate=1" if self._emulate else LIBRARY,
            software={**found, COMPILER: compiler},
            compiler=f"{COMPILER} {compiler}",
            emulated=self._emulate,
        )

    def check(self, model: Model, options: Options) -> None:
        """Refuse from the configuration alone what `open` would refuse.

        Raises:
            UsageError: not a checkpoint of the family with weights.
            Unsupported: several devices over the emulator.
        """
        checkpoint(model, self.info.families)
        if options.tp != 1 and self._emulate:
            raise Unsupported(
                f"tp {options.tp}: the emulator accounts for the memory of several devices, and computes on none of "
                "them; 1 is valid"
            )
        if len(self._devices) not in (0, options.tp):
            raise UsageError(f"device names {len(self._devices)} devices, but tp is {options.tp}")

    @contextmanager
    def open(self, model: Model, options: Options) -> Iterator[OptimumRblnSession]:
        """Compile a checkpoint directory with the library's own `from_pretrained`, or load it from the cache.

        Raises:
            UsageError: not a checkpoint of the family, or the library cannot compile it; says why.
            Unsupported: several devices over the emulator.
        """
        self.check(model, options)
        path = Path(model.path)
        loaded = self._load(path, self._config(options))
        yield OptimumRblnSession(self._modules.torch, self._modules.transformers, loaded, path)

    def _config(self, options: Options) -> dict[str, Any]:
        """The library's documented configuration for these options."""
        text: dict[str, Any] = {
            "batch_size": options.batch,
            "decoder_batch_sizes": row_buckets(options.batch),
            "max_seq_len": self._positions(options.max_length),
            "use_inputs_embeds": True,  # without it the class compiles, and cannot be called
            "attn_impl": ATTENTION[self._attention],
        }
        if self._chunk:
            text["prefill_chunk_size"] = self._chunk
        if self._partition:
            text["kvcache_partition_len"] = self._partition
        if options.tp != 1:
            text["num_devices"] = options.tp
        config: dict[str, Any] = {"batch_size": options.batch, "npu": self._npu, "text_model": text}
        if self._devices:
            text["device"] = list(self._devices) if options.tp != 1 else self._devices[0]
            config |= {"device": self._devices[0], "vision_model": {"device": self._devices[0]}}
        return config

    def _positions(self, length: int) -> int:
        """Cache positions: whole chunks and, with flash attention, at least two whole blocks."""
        newer = "RBLN-CR" in self._npu
        step = self._chunk or (512 if newer else 128)  # the library's own choice, where none is made
        if self._attention == "flash":
            step = self._partition or (8192 if newer else 16384)
            length = max(length, 2 * step)
        return -(-length // step) * step

    def _load(self, path: Path, config: dict[str, Any]) -> Any:
        kind = getattr(self._modules.optimum, CLASS)
        folder = self._cache and self._cache / self._digest(path, config)
        # Compiling a dtype is asked of transformers, which reads the checkpoint.
        export = {"export": True, "dtype": getattr(self._modules.torch, self._dtype)}
        try:
            if folder is None:
                return kind.from_pretrained(str(path), rbln_config=config, **export)
            if not folder.is_dir():
                made = kind.from_pretrained(str(path), rbln_config={**config, "create_runtimes": False}, **export)
                made.save_pretrained(str(folder))
            return kind.from_pretrained(str(folder), export=False, rbln_config=_runtime_options(config))
        except Exception as error:  # neither library has a common base class for what can be wrong with a checkpoint
            raise UsageError(f"checkpoint {path}: optimum-rbln cannot open it: {_sentence(error)}") from error

    def _digest(self, path: Path, config: Mapping[str, Any]) -> str:
        """Name of the compiled form: of the checkpoint's bytes, the settings, and the versions."""
        whole = hashlib.sha256()
        for file in sorted(item for item in path.iterdir() if item.suffix in (".json", ".safetensors")):
            whole.update(file.name.encode() + b"\0" + file.read_bytes())
        settings = {"config": config, "dtype": self._dtype, "software": dict(self.info.software)}
        whole.update(json.dumps(settings, sort_keys=True).encode())
        return whole.hexdigest()[:24]

    def probe(self, name: str, shape: tuple[int, ...], dtype: str) -> float:
        """Not offered.

        Raises:
            Unsupported: always.
        """
        raise Unsupported(f"probe {name!r}: optimum-rbln runs whole models; it has no probes of its own")


class Modules:
    """What was imported: rebel, torch, transformers, and optimum.rbln."""

    def __init__(self) -> None:
        self.rebel: Any = import_module("rebel")
        self.torch: Any = import_module("torch")
        self.transformers: Any = import_module("transformers")
        self.optimum: Any = import_module("optimum.rbln")


def import_optimum(emulator: Mapping[str, Any] | None) -> Modules:
    """Import optimum-rbln over the vendor's SDK, or over the emulator with these settings.

    Raises:
        UsageError: optimum-rbln or the SDK is missing, or the emulator refuses; says what to install.
    """
    try:
        version(LIBRARY)
    except PackageNotFoundError as error:
        raise UsageError(
            "optimum-rbln is not installed here; it pins torch and transformers and wants an environment of its own: "
            "pip install vlmqual[rbln]"
        ) from error
    if emulator is not None:
        rebel = import_module("vlmqual_rebel")
        try:
            rebel.install(**emulator)
        except (ValueError, rebel.EmulatorError) as error:
            raise UsageError(f"emulate=1: {error}") from error
    try:
        modules = Modules()
    except ModuleNotFoundError as error:
        if error.name == "rebel":
            raise UsageError(
                "rebel-compiler is not installed here, without which optimum-rbln does nothing; it comes from the "
                "vendor's index, https://pypi.rbln.ai/simple. emulate=1 runs over an emulator of it"
            ) from error
        raise UsageError(f"optimum-rbln cannot be imported: {error}") from error
    except ImportError as error:
        raise UsageError(f"optimum-rbln cannot be imported: {error}") from error
    logging.getLogger("optimum").setLevel(logging.ERROR)
    return modules


def _settings(npu: str, numeric: str, devices: tuple[int, ...]) -> dict[str, Any]:
    given = {"npu": npu, "numeric": numeric, "devices": max(devices, default=0) + 1 if devices else 0}
    return {name: value for name, value in given.items() if value}


def _declared(dtype: str, product: str) -> str:
    """The looser of the programs' dtype and that of products, which is what the device computes in.

    Reports of users (rebel-compiler 0.10, RBLN-CA25) say that float32 programs compute products in bfloat16.
    """
    return "bfloat16" if "bfloat16" in (dtype, product) else dtype


def device_ids(text: str) -> tuple[int, ...]:
    """Device ids of "", "3" or "0-3".

    Raises:
        UsageError: it has another form.
    """
    first, dash, last = text.partition("-")
    if not text:
        return ()
    if not first.isdecimal() or (dash and (not last.isdecimal() or int(last) < int(first))):
        raise UsageError(f"device {text!r} is neither an id such as 0 nor a range of ids such as 0-3")
    return tuple(range(int(first), int(last or first) + 1))


def row_buckets(most: int) -> list[int]:
    """Numbers of rows that decode is compiled for, the largest first: powers of two, and the largest itself."""
    return sorted({most, *(1 << power for power in range(most.bit_length()) if 1 << power < most)}, reverse=True)


def _runtime_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a configuration is not saved with a compiled model: where it runs."""
    parts = {
        name: {"device": config[name]["device"]}
        for name in ("vision_model", "text_model")
        if "device" in config.get(name, {})
    }
    return {**({"device": config["device"]} if "device" in config else {}), **parts}


def one_of(name: str, value: str, valid: tuple[str, ...]) -> str:
    """The value, if it is one of these.

    Raises:
        UsageError: it is none of them.
    """
    if value not in valid:
        raise UsageError(f"{name} {value!r} is unknown; valid are {', '.join(valid)}")
    return value


def _positive(name: str, value: str | int) -> int:
    if value == "":
        return 0
    if not str(value).isdecimal() or int(value) < 1:
        raise UsageError(f"{name} {value!r} is no positive number of tokens")
    return int(value)


def _sentence(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
