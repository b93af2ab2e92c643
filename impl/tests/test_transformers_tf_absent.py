"""The target and the library of the TensorFlow classes where there are none."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from vlmqual_adapters import transformers_tf
from vlmqual_adapters.transformers_tf import TransformersTfTarget
from vlmqual_adapters.transformers_tf_library import TransformersTfLibrary
from vlmqual_contract.discovery import make_target
from vlmqual_contract.errors import UsageError


@pytest.mark.parametrize("kind", [TransformersTfTarget, TransformersTfLibrary])
def test_without_tensorflow_the_extra_is_named(kind: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(UsageError, match=r"TensorFlow cannot be imported .* install vlmqual\[tensorflow\]"):
        kind()


def test_a_version_without_the_classes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    package = SimpleNamespace(__version__="5.23.0")
    monkeypatch.setattr(transformers_tf, "import_tensorflow", lambda: (SimpleNamespace(), package))
    with pytest.raises(UsageError, match=r"transformers 5\.23\.0 has no TFIdeficsForVisionText2Text"):
        TransformersTfTarget()


@pytest.mark.parametrize("option", ["dtype=bfloat16", "device=cuda"])
def test_the_target_has_no_options(option: str) -> None:
    origins = {"transformers-tf": "vlmqual_adapters.transformers_tf:TransformersTfTarget"}
    with pytest.raises(UsageError, match="it knows no options"):
        make_target(f"transformers-tf:{option}", origins)
