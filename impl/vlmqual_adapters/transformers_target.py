"""The installed transformers as a target: its processors and models behind the contract, and nothing of ours between.

Works with every version that has one of the families (Idefics and Mllama: 4.45 and later, Idefics3: 4.46
and later, 5.x).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vlmqual_adapters.transformers_idefics import IdeficsSession
from vlmqual_adapters.transformers_idefics3 import Idefics3Session
from vlmqual_adapters.transformers_mllama import MllamaSession
from vlmqual_adapters.transformers_session import TransformersSession, synchronize
from vlmqual_contract.errors import Unsupported, UsageError
from vlmqual_contract.target import Capability, Info, Model, Options, Session

#: Families to the library's class and our session over it.
FAMILIES: Mapping[str, tuple[str, type[TransformersSession]]] = {
    "idefics": ("IdeficsForVisionText2Text", IdeficsSession),
    "idefics3": ("Idefics3ForConditionalGeneration", Idefics3Session),
    "mllama": ("MllamaForConditionalGeneration", MllamaSession),
}
DTYPES = ("float64", "float32", "bfloat16", "float16")
ATTENTION = ("eager", "sdpa")
_CAPABILITIES = frozenset(Capability) - {Capability.TENSOR_PARALLEL}


class TransformersTarget:
    """The contract's Target over the transformers library of this environment.

    Attributes:
        info: see `vlmqual_contract.target.Info`; `library` is "transformers".
    """

    def __init__(self, device: str = "cpu", dtype: str = "float32", attn: str = "eager") -> None:
        """Import the library and check the options; no model is loaded.

        Args:
            device: a torch device, for example "cpu" or "cuda:0".
            dtype: compute dtype of the weights and activations; islands of float32 stay as the library has them.
            attn: "eager" or "sdpa". In float64 the library's eager softmax gives NaN for padding on the left; sdpa
                does not.

        Raises:
            UsageError: an option has no valid value, or the library is missing or too old.
        """
        if dtype not in DTYPES:
            raise UsageError(f"dtype {dtype!r} is unknown; valid are {', '.join(DTYPES)}")
        if attn not in ATTENTION:
            raise UsageError(f"attn {attn!r} is unknown; valid are {', '.join(ATTENTION)}")
        try:
            self._torch: Any = import_module("torch")
            self._library: Any = import_module("transformers")
        except ImportError as error:
            raise UsageError(f"transformers cannot be imported ({error}); install vlmqual[impl]") from error
        families = tuple(name for name, (kind, _) in FAMILIES.items() if hasattr(self._library, kind))
        if not families:
            raise UsageError(
                f"transformers {self._library.__version__} has none of {', '.join(FAMILIES)}; 4.45 or later is needed"
            )
        self._device = _device(self._torch, device)
        self._attention = attn
        self.info = Info(
            name="transformers",
            version=self._library.__version__,
            device=str(self._device),
            runtime=f"torch {attn} {self._torch.__version__}",
            dtype=dtype,
            capabilities=_CAPABILITIES,
            families=families,
            library="transformers",
            software=software("transformers", "torch", "tokenizers", "safetensors", "pillow", "numpy"),
        )

    def open(self, model: Model, options: Options) -> AbstractContextManager[Session]:
        """Load a checkpoint directory with the library's own `from_pretrained`; nothing is looked up on a hub.

        Raises:
            UsageError: not a checkpoint of a family that can be opened, or one with missing or unreadable weights.
            Unsupported: more than one tensor-parallel rank is asked for.
        """
        if options.tp != 1:
            raise Unsupported(f"tp {options.tp}: this target runs the model in one process on one device; 1 is valid")
        path = checkpoint(model, self.info.families)
        kind, session = FAMILIES[model.family]
        loaded = self._load(path, kind)
        return _opened(session(self._torch, self._library, loaded, path, options))

    def _load(self, path: Path, class_name: str) -> Any:
        first = int(self._library.__version__.split(".")[0])
        kind: dict[str, Any] = {"dtype" if first >= 5 else "torch_dtype": getattr(self._torch, self.info.dtype)}
        if first >= 5 or self._attention == "eager" or class_name.startswith("Mllama"):
            kind["attn_implementation"] = self._attention
        # Before 5, "sdpa" by name is refused for Idefics3 because its vision tower has eager attention only; unasked,
        # the library takes sdpa for the text model and eager for the tower.
        try:
            loaded, report = getattr(self._library, class_name).from_pretrained(
                str(path),
                local_files_only=True,
                output_loading_info=True,
                **kind,
            )
        except Exception as error:  # the library has no common base class for what can be wrong with a checkpoint
            raise UsageError(f"checkpoint {path}: transformers cannot load it: {error}") from error
        for key in ("missing_keys", "mismatched_keys"):
            if names := sorted(str(name) for name in report[key]):
                raise UsageError(f"checkpoint {path}: {len(names)} {key.replace('_', ' ')}, the first is {names[0]}")
        return loaded.to(self._device).eval()

    def probe(self, name: str, shape: tuple[int, ...], dtype: str) -> float:
        """Seconds of one pass: "stream" copies n values to another place, "gemm" multiplies (m, k) by (k, n).

        One pass runs before the one that is timed.

        Raises:
            Unsupported: there is no such probe.
            UsageError: the dtype is unknown.
        """
        torch = self._torch
        if dtype not in DTYPES:
            raise UsageError(f"dtype {dtype!r} is unknown; valid are {', '.join(DTYPES)}")
        kind = {"dtype": getattr(torch, dtype), "device": self._device}
        run: Callable[[], object]
        if name == "stream" and len(shape) == 1:
            source, copy = torch.ones(shape, **kind), torch.empty(shape, **kind)
            run = partial(copy.copy_, source)
        elif name == "gemm" and len(shape) == 3:
            m, n, k = shape
            left, right, out = torch.ones((m, k), **kind), torch.ones((k, n), **kind), torch.empty((m, n), **kind)
            run = partial(torch.mm, left, right, out=out)
        else:
            raise Unsupported(f"probe {name!r} of shape {shape}: there are stream (n,) and gemm (m, n, k)")
        with torch.inference_mode():
            run()
            synchronize(torch, self._device)
            start = time.perf_counter()
            run()
            synchronize(torch, self._device)
            return time.perf_counter() - start


@contextmanager
def _opened(session: TransformersSession) -> Iterator[Session]:
    yield session


def checkpoint(model: Model, families: tuple[str, ...]) -> Path:
    """The checkpoint directory, looked at before anything is loaded.

    Raises:
        UsageError: the family is none of `families`, or the directory holds no checkpoint of it with weights.
    """
    if model.family not in families:
        raise UsageError(f"family {model.family!r} cannot be opened by this target; valid are {', '.join(families)}")
    path = Path(model.path)
    if not path.is_dir():
        raise UsageError(f"checkpoint {model.path} is no directory")
    try:
        found = json.loads((path / "config.json").read_text("utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"checkpoint {model.path}: config.json cannot be read: {error}") from error
    if found != model.family:
        raise UsageError(f"checkpoint {model.path} has model_type {found!r}; {model.family!r} was asked for")
    if not any(path.glob("*.safetensors")):
        raise UsageError(f"checkpoint {model.path} has no weights; a file *.safetensors is needed")
    return path


def _device(torch: Any, name: str) -> Any:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} cannot be used by torch: {str(error).splitlines()[0]}") from error
    return device


def software(*packages: str) -> dict[str, str]:
    """Names of those packages that are installed, to their versions."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
