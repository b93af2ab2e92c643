"""Level images: files whose transparency is no channel but a colour that stands for it (tRNS in a PNG file)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmqual_conformance.marks import requirement
from vlmqual_conformance.suite import checks
from vlmqual_contract.remote import RemoteSession
from vlmqual_contract.target import FAMILIES, MARKERS, Model, Prompt

KEYS: dict[str, int | tuple[int, int, int]] = {"RGB": (10, 200, 30), "L": 7}


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=requirement(f"{name.upper()}-FILE-002")) for name in FAMILIES]
)
@pytest.mark.parametrize("mode", KEYS)
def test_a_colour_that_stands_for_transparency_is_a_colour(
    session: RemoteSession, model: Model, tmp_path: Path, family: str, mode: str
) -> None:
    assert model.family == family
    picture = Image.new(mode, (60, 50), "gray")
    picture.paste(KEYS[mode], (5, 5, 40, 30))
    plain, keyed = tmp_path / "plain.png", tmp_path / "keyed.png"
    picture.save(plain)
    picture.save(keyed, transparency=KEYS[mode])
    with Image.open(keyed) as stored:
        assert "transparency" in stored.info, "the file was written without its tRNS chunk"
    wanted, found = (
        checks.tensor_of(session.preprocess([Prompt(f"{MARKERS[family]}What is it?", (str(path),))]), "pixel_values")
        for path in (plain, keyed)
    )
    assert found.shape == wanted.shape, f"pixel_values has shape {found.shape}, not {wanted.shape}"
    assert np.array_equal(found, wanted), (
        f"a {mode} file in which {KEYS[mode]} stands for transparency gives other pixels than the same file without: "
        f"they differ by up to {np.abs(found - wanted).max():g}"
    )
