"""RBLN's Idefics3 class: what compiled models generate."""

from __future__ import annotations

import numpy as np
import pytest

from vlmqual_conformance.goldens import golden
from vlmqual_conformance.marks import requirement
from vlmqual_conformance.suite.library_objects import error_of
from vlmqual_conformance.suite.rbln_objects import RblnObjects, golds, rbln_objects
from vlmqual_contract.subject import RemoteLibrary

FAMILY = "idefics3"
NEVER = 598  # the image token, which no greedy step gives


@pytest.fixture
def rbln(library: RemoteLibrary) -> RblnObjects:
    """RBLN's classes in the library under test."""
    return rbln_objects(library)


@requirement("RBLN-API-018", "RBLN-API-019")
@pytest.mark.parametrize(
    "name", ["photo-whole", "two-images", "consecutive-images", "multi-turn", "text-only", "document"]
)
def test_images_and_text_in_any_order_give_the_tokens_of_the_reference(rbln: RblnObjects, name: str) -> None:
    case = golden(FAMILY, name)
    golds(rbln.generate(rbln.model, case), case)


@requirement("RBLN-API-024")
@pytest.mark.parametrize("name", ["batch-left", "text-beside-image"])
def test_rows_of_unequal_length_give_the_tokens_of_the_reference(rbln: RblnObjects, name: str) -> None:
    case = golden(FAMILY, name)
    golds(rbln.generate(rbln.compiled(batch_size=2), case), case)


@requirement("RBLN-CFG-017")
def test_a_text_model_of_defaults_generates(rbln: RblnObjects) -> None:
    case = golden(FAMILY, "photo-whole")
    made = rbln.exported({"text_model": {"max_seq_len": 128}})
    golds(rbln.generate(made, case, steps=2), case)


@requirement("RBLN-CFG-018")
def test_a_text_model_with_position_ids_generates_or_is_refused(rbln: RblnObjects) -> None:
    made = []
    error = error_of(lambda: made.append(rbln.compiled(use_position_ids=True, use_attention_mask=True)))
    if error is None:
        case = golden(FAMILY, "photo-whole")
        golds(rbln.generate(made[0], case, steps=2), case)


@requirement("RBLN-GEN-001")
def test_a_smaller_batch_takes_the_decoder_of_its_size(rbln: RblnObjects) -> None:
    case = golden(FAMILY, "photo-whole")
    model = rbln.compiled(batch_size=2, decoder_batch_sizes=[2, 1])
    golds(rbln.generate(model, case, steps=2), case)


@requirement("RBLN-GEN-002")
def test_generation_past_the_cache_is_refused_with_a_value_error(rbln: RblnObjects) -> None:
    case = golden(FAMILY, "text-only")
    model = rbln.compiled(max_seq_len=128)
    ids = np.ascontiguousarray(np.resize(case.text["input_ids"], (1, 126)))
    text = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    error = error_of(lambda: rbln.new_tokens(model, text, 4, eos_token_id=NEVER))
    assert error is not None, "4 tokens after 126 were generated in a cache of 128"
    assert "ValueError" in error.bases, f"raised {error}"
