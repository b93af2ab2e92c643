"""RBLN's Idefics3 classes of the library under test: compiled models, and what they generate."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from vlmqual_conformance.goldens import Golden
from vlmqual_conformance.outcomes import NotApplicable
from vlmqual_conformance.suite.library_objects import arguments
from vlmqual_contract import fixtures
from vlmqual_contract.errors import Unsupported
from vlmqual_contract.subject import Handle, RemoteLibrary
from vlmqual_contract.target import Array, IntArray

MODEL = "RBLNIdefics3ForConditionalGeneration"
CONFIG = "RBLNIdefics3ForConditionalGenerationConfig"
HOST = "Idefics3ForConditionalGeneration"
#: Cache positions: two chunks of a prompt, of which the smallest is 64 tokens.
POSITIONS = 256
EOS = 577


class RblnObjects:
    """What the tests share. Nothing in here may be changed by a test; `compiled` makes models that may.

    Attributes:
        library: the library under test.
        checkpoint: folder of the tiny checkpoint.
    """

    def __init__(self, library: RemoteLibrary) -> None:
        self.library = library
        self.checkpoint = str(fixtures.checkpoint("idefics3-tiny"))

    def text(self, **changes: Any) -> dict[str, Any]:
        """Settings of the text model that the library cannot know; the last is False by default, and not usable."""
        return {"max_seq_len": POSITIONS, "use_inputs_embeds": True, **changes}

    def config(self, **changes: Any) -> Handle:
        """A configuration object."""
        made = self.library.call(CONFIG, **changes)
        assert isinstance(made, Handle), f"{CONFIG} gave {made!r}, not an object"
        return made

    def exported(self, rbln_config: Any = None, **options: Any) -> Handle:
        """The tiny checkpoint in float32, compiled by `from_pretrained`; what is given None is left out."""
        given = {} if rbln_config is None else {"rbln_config": rbln_config}
        return self.loaded(self.checkpoint, export=True, **{"torch_dtype": "float32", **given, **options})

    def compiled(self, batch_size: int = 1, **text: Any) -> Handle:
        """The tiny checkpoint compiled with changed settings of the text model."""
        settings = {"batch_size": batch_size, "text_model": self.text(batch_size=batch_size, **text)}
        return self.exported(settings)

    def loaded(self, folder: Any, **options: Any) -> Handle:
        """What `from_pretrained` makes of a folder."""
        made = self.library.call(f"{MODEL}.from_pretrained", folder, **options)
        assert isinstance(made, Handle), f"{MODEL}.from_pretrained gave {made!r}, not a model"
        return made

    @cached_property
    def model(self) -> Handle:
        """The tiny checkpoint, compiled for one row."""
        return self.compiled()

    @cached_property
    def host(self) -> Handle:
        """The tiny checkpoint in float32 as the library's host model, or transformers' where it has none."""
        try:
            name = HOST if self.library.exists(HOST) else f"transformers:{HOST}"
        except Unsupported:
            name = f"transformers:{HOST}"
        made = self.library.call(f"{name}.from_pretrained", self.checkpoint, torch_dtype="float32")
        assert isinstance(made, Handle)
        return made

    def generate(self, model: Handle, golden: Golden, steps: int = 8, **options: Any) -> IntArray:
        """Greedy tokens (B, steps or fewer) of a golden case."""
        return self.new_tokens(model, {**golden.text, **(golden.pixels if golden.has_images else {})}, steps, **options)

    def new_tokens(self, model: Handle, inputs: Mapping[str, Array], steps: int, **options: Any) -> IntArray:
        """Greedy tokens (B, steps or fewer) after these inputs."""
        found = model.call("generate", **arguments(**inputs), max_new_tokens=steps, do_sample=False, **options)
        assert isinstance(found, np.ndarray), f"generate gave {found!r}, not token ids"
        return found[:, inputs["input_ids"].shape[1] :]


def golds(found: IntArray, golden: Golden) -> None:
    """Assert that tokens (B, steps or fewer) are gold's, each row up to its end."""
    gold = golden.tokens.T[:, : found.shape[1]]
    for row, (mine, wanted) in enumerate(zip(found, gold, strict=True)):
        end = 1 + int(np.argmax(wanted == EOS)) if EOS in wanted else len(wanted)
        assert mine[:end].tolist() == wanted[:end].tolist(), f"row {row} of {golden.name}"


def files(folder: Path, pattern: str = "*") -> list[str]:
    """Files anywhere in a folder that fit a pattern, by their paths in it."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(pattern) if path.is_file())


@lru_cache(maxsize=1)
def rbln_objects(library: RemoteLibrary) -> RblnObjects:
    """The objects of a worker.

    Raises:
        NotApplicable: the library has no classes for RBLN's NPUs.
    """
    if not library.exists(MODEL):
        raise NotApplicable(f"{library.name} {library.version} has no {MODEL}")
    return RblnObjects(library)
