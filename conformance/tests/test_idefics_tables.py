from __future__ import annotations

import importlib

import numpy as np
import pytest

from vlmqual_conformance.marks import NAME
from vlmqual_conformance.suite.idefics_models import REAL, drawn, inputs, settings
from vlmqual_conformance.suite.idefics_reference import Reference, parameter_shapes

PARTS = ("vision_config", "perceiver_config")


@pytest.fixture(scope="module")
def tables(pytestconfig):
    pytestconfig.addinivalue_line("markers", f"{NAME}: what the suite's tests carry")
    return importlib.import_module("vlmqual_conformance.suite.test_idefics_fields")


def logits(made, **changes):
    shapes = parameter_shapes(made)
    reference = Reference(made, {name: drawn(name, shape) for name, shape in shapes.items()})
    return reference.run(**inputs(**changes))[1]


def test_every_field_has_a_row(tables):
    made = settings()
    fields = set(made) - set(PARTS) | {f"{part}.{name}" for part in PARTS for name in made[part]}
    rows = [row.values[0] for row in (*tables.SHAPES, *tables.VALUES, *tables.INERT)]
    changed = {name for row in rows for name in row}
    assert fields - changed == {"tie_word_embeddings"}, "this one has a test of its own"
    assert changed <= fields
    for row in rows:
        for name, value in row.items():
            owner, _, key = name.rpartition(".")
            assert (made[owner] if owner else made)[key] != value, f"{name} is {value} already"


def test_the_reference_shows_every_field_that_changes_values(tables):
    plain = logits(settings())
    for row in tables.VALUES:
        assert np.abs(logits(settings(**row.values[0])) - plain)[REAL].max() > 0.1, row.id


def test_the_reference_hides_images_and_later_tokens_by_the_masks():
    plain, given = logits(settings()), inputs()
    pixels, ids = given["pixel_values"].copy(), given["input_ids"].copy()
    pixels[1, 1] += 1
    ids[:, -1] = 3
    other = logits(settings(), pixel_values=pixels)
    np.testing.assert_array_equal(other[0][REAL[0]], plain[0][REAL[0]])
    np.testing.assert_array_equal(other[1, :5], plain[1, :5])
    assert (np.abs(other[1, 5:] - plain[1, 5:]).max(-1) > 0.1).all(), "tokens that see the image do not change"
    later = logits(settings(), input_ids=ids)
    np.testing.assert_array_equal(later[:, :-1][REAL[:, :-1]], plain[:, :-1][REAL[:, :-1]])
