"""The TensorFlow classes of the installed transformers as a target: nothing of ours between them and the contract.

Only Idefics has such classes, before 5.0. They compute in float32 alone: their causal mask is made of float32
constants, and every other dtype policy of Keras ends in an error there. So the target has no options.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from vlmqual_adapters.transformers_target import checkpoint, software
from vlmqual_adapters.transformers_tf_session import TransformersTfSession
from vlmqual_contract.errors import Unsupported, UsageError
from vlmqual_contract.target import Capability, Info, Model, Options, Session

CLASS = "TFIdeficsForVisionText2Text"
FAMILY = "idefics"
DTYPE = "float32"
_PACKAGES = ("transformers", "tensorflow", "tensorflow-cpu", "tf-keras", "tokenizers", "safetensors", "pillow", "numpy")
PROBED = ("float64", "float32", "bfloat16", "float16")
_CAPABILITIES = frozenset(Capability) - {Capability.TENSOR_PARALLEL, Capability.PIXEL_MASK}


class TransformersTfTarget:
    """The contract's Target over TFIdeficsForVisionText2Text.

    Attributes:
        info: see `vlmqual_contract.target.Info`; `library` is "transformers-tf".
    """

    def __init__(self) -> None:
        """Import TensorFlow and the library; no model is loaded.

        Raises:
            UsageError: a library is missing, or transformers has no TensorFlow classes.
        """
        self._tensorflow, self._library = import_tensorflow()
        if not hasattr(self._library, CLASS):
            raise UsageError(f"transformers {self._library.__version__} has no {CLASS}; 5.0 removed it")
        self._tensorflow.config.set_visible_devices([], "GPU")
        self.info = Info(
            name="transformers-tf",
            version=self._library.__version__,
            device="cpu",
            runtime=f"tensorflow eager {self._tensorflow.__version__}",
            dtype=DTYPE,
            capabilities=_CAPABILITIES,
            families=(FAMILY,),
            library="transformers-tf",
            software=software(*_PACKAGES),
        )

    def open(self, model: Model, options: Options) -> AbstractContextManager[Session]:
        """Load a checkpoint directory in PyTorch's layout; nothing is looked up on a hub.

        Raises:
            UsageError: not a checkpoint that can be opened, or one of which a tensor is missing.
            Unsupported: more than one tensor-parallel rank is asked for.
        """
        if options.tp != 1:
            raise Unsupported(f"tp {options.tp}: this target runs the model in one process on one device; 1 is valid")
        path = checkpoint(model, self.info.families)
        loaded = self._load(path)
        return _opened(TransformersTfSession(self._tensorflow, loaded, path, options))

    def _load(self, path: Path) -> Any:
        """The model with the checkpoint's weights, in the way of `from_pretrained(..., from_pt=True)` without PyTorch.

        That way puts all files together and calls the model once before it assigns weights. `from_pretrained` of
        safetensors files does not call it, and leaves what the first call builds with random weights
        (IDEFICS-TF-008 is tested with it).
        """
        loader = import_module("transformers.modeling_tf_pytorch_utils").load_pytorch_state_dict_in_tf2_model
        read = import_module("safetensors.tensorflow").load_file
        try:
            config = self._library.IdeficsConfig.from_pretrained(str(path), local_files_only=True)
            model = getattr(self._library, CLASS)(config)
            weights = {name: value for file in path.glob("*.safetensors") for name, value in read(str(file)).items()}
            loaded, report = loader(model, weights, allow_missing_keys=True, output_loading_info=True)
        except Exception as error:  # the library has no common base class for what can be wrong with a checkpoint
            raise UsageError(f"checkpoint {path}: transformers cannot load it: {error}") from error
        if names := sorted(str(name) for name in report["missing_keys"]):
            raise UsageError(f"checkpoint {path}: {len(names)} missing keys, the first is {names[0]}")
        return loaded

    def probe(self, name: str, shape: tuple[int, ...], dtype: str) -> float:
        """Seconds of one pass: "stream" reads n values and writes n, "gemm" multiplies (m, k) by (k, n).

        One pass runs before the one that is timed.

        Raises:
            Unsupported: there is no such probe.
            UsageError: the dtype is unknown.
        """
        tf = self._tensorflow
        if dtype not in PROBED:
            raise UsageError(f"dtype {dtype!r} is unknown; valid are {', '.join(PROBED)}")
        kind = tf.dtypes.as_dtype(dtype)
        run: Callable[[], Any]
        if name == "stream" and len(shape) == 1:
            source = tf.ones(shape, kind)
            run = partial(tf.negative, source)
        elif name == "gemm" and len(shape) == 3:
            m, n, k = shape
            left, right = tf.ones((m, k), kind), tf.ones((k, n), kind)
            run = partial(tf.matmul, left, right)
        else:
            raise Unsupported(f"probe {name!r} of shape {shape}: there are stream (n,) and gemm (m, n, k)")
        run()
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


def import_tensorflow() -> tuple[Any, Any]:
    """TensorFlow and transformers, the latter first: it chooses the version of Keras that its classes need.

    Raises:
        UsageError: one of them cannot be imported.
    """
    try:
        library = import_module("transformers")
        if hasattr(library, CLASS):
            import_module("transformers.modeling_tf_utils")
        return import_module("tensorflow"), library
    except (ImportError, RuntimeError) as error:  # transformers wraps what its lazy modules raise
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"TensorFlow cannot be imported ({reason}); install vlmqual[tensorflow]") from error


@contextmanager
def _opened(session: TransformersTfSession) -> Iterator[Session]:
    yield session
