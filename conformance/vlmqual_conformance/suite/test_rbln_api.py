"""RBLN's Idefics3 classes: names, signatures, configurations."""

from __future__ import annotations

from typing import Any

import pytest

from vlmqual_conformance.marks import requirement
from vlmqual_conformance.suite.library_objects import error_of
from vlmqual_conformance.suite.rbln_objects import CONFIG, MODEL, RblnObjects, rbln_objects
from vlmqual_contract.subject import Handle, Parameter, RemoteLibrary


@pytest.fixture
def rbln(library: RemoteLibrary) -> RblnObjects:
    """RBLN's classes in the library under test."""
    return rbln_objects(library)


def shown(parameters: list[Parameter]) -> list[tuple[str, bool, Any]]:
    """Name, whether it is required, and default of the parameters but `*args` and `**kwargs`."""
    return [(item.name, item.required, item.default) for item in parameters if not item.kind.startswith("VAR_")]


# classes and signatures -------------------------------------------------------------------------------------------


@requirement("RBLN-API-001")
def test_model_and_configuration_are_in_the_package_root(rbln: RblnObjects) -> None:
    missing = [name for name in (MODEL, CONFIG) if not rbln.library.exists(name)]
    assert not missing, f"{rbln.library.name} {rbln.library.version} has no {', '.join(missing)}"


@requirement("RBLN-API-002")
def test_the_model_is_an_rbln_model(rbln: RblnObjects) -> None:
    assert "RBLNModel" in rbln.library.type_of(MODEL)


@requirement("RBLN-API-003")
def test_parameters_of_from_pretrained(rbln: RblnObjects) -> None:
    parameters = rbln.library.signature(f"{MODEL}.from_pretrained")
    assert shown(parameters) == [("model_id", True, None), ("export", False, False), ("rbln_config", False, None)]
    assert parameters[-1].kind == "VAR_KEYWORD"


@requirement("RBLN-API-011")
def test_parameters_of_from_model(rbln: RblnObjects) -> None:
    parameters = rbln.library.signature(f"{MODEL}.from_model")
    assert shown(parameters) == [("model", True, None), ("rbln_config", False, None)]
    assert [item.kind for item in parameters] == ["POSITIONAL_OR_KEYWORD", "KEYWORD_ONLY", "VAR_KEYWORD"]


@requirement("RBLN-API-016")
def test_save_pretrained_requires_a_directory_only(rbln: RblnObjects) -> None:
    required = [
        item.name
        for item in rbln.library.signature(f"{MODEL}.save_pretrained")
        if item.required and not item.kind.startswith("VAR_")
    ]
    assert required == ["save_directory"] or required == ["self", "save_directory"]


@requirement("RBLN-API-023")
def test_repr_of_a_model_gives_text(rbln: RblnObjects) -> None:
    assert isinstance(rbln.library.call("builtins:repr", rbln.model), str)


# configuration ----------------------------------------------------------------------------------------------------


@requirement("RBLN-CFG-001")
def test_the_configuration_is_an_rbln_configuration(rbln: RblnObjects) -> None:
    assert "RBLNModelConfig" in rbln.library.type_of(CONFIG)


@requirement("RBLN-CFG-002")
def test_parameters_of_the_configuration(rbln: RblnObjects) -> None:
    parameters = rbln.library.signature(CONFIG)
    assert shown(parameters) == [(name, False, None) for name in ("batch_size", "vision_model", "text_model")]
    assert parameters[-1].kind == "VAR_KEYWORD"


@requirement("RBLN-CFG-003")
def test_the_batch_size_is_one_when_it_is_not_specified(rbln: RblnObjects) -> None:
    assert rbln.config().get("batch_size") == 1
    assert rbln.config(batch_size=None).get("batch_size") == 1


@requirement("RBLN-CFG-004")
@pytest.mark.parametrize("size", [1, 4])
def test_a_positive_batch_size_is_kept(rbln: RblnObjects, size: int) -> None:
    assert rbln.config(batch_size=size).get("batch_size") == size


@requirement("RBLN-CFG-005")
def test_the_submodules_are_vision_and_text_model(rbln: RblnObjects) -> None:
    assert rbln.library.get(f"{CONFIG}.submodules") == ["vision_model", "text_model"]
    assert rbln.config().get("submodules") == ["vision_model", "text_model"]


@requirement("RBLN-CFG-006")
def test_settings_of_submodules_are_taken_as_dictionaries(rbln: RblnObjects) -> None:
    made = rbln.config(vision_model={"device": 1}, text_model={"max_seq_len": 64})
    assert made.get("vision_model.device") == 1
    assert made.get("text_model.max_seq_len") == 64


@requirement("RBLN-CFG-007")
def test_settings_of_submodules_are_taken_as_configurations(rbln: RblnObjects) -> None:
    given = {name: rbln.model.get(f"rbln_config.{name}") for name in ("vision_model", "text_model")}
    for name, part in given.items():
        assert isinstance(part, Handle), f"{name} of a compiled model's configuration is {part!r}"
        assert "RBLNModelConfig" in part.bases, f"{name} is a {part.type_name}"
    made = rbln.config(**given)
    for name, part in given.items():
        assert made.type_of(name)[0] == part.type_name
    assert made.get("text_model.max_seq_len") == given["text_model"].get("max_seq_len")


@requirement("RBLN-CFG-008")
def test_a_submodule_configuration_that_is_left_out_is_a_default_one(rbln: RblnObjects) -> None:
    assert "RBLNModelConfig" in rbln.model.type_of("rbln_config.vision_model")
    assert rbln.model.get("rbln_config.vision_model.batch_size") == 1


@requirement("RBLN-CFG-009")
def test_further_keywords_are_those_of_the_parent_class(rbln: RblnObjects) -> None:
    given = {"device": 2, "npu": "RBLN-CA25", "create_runtimes": False}
    made = rbln.config(**given)
    assert {name: made.get(name) for name in given} == given


@requirement("RBLN-CFG-010")
def test_an_unknown_keyword_is_refused(rbln: RblnObjects) -> None:
    refused(rbln, no_such=1)


@requirement("RBLN-CFG-011")
def test_a_negative_batch_size_is_refused(rbln: RblnObjects) -> None:
    refused(rbln, batch_size=-1)


@requirement("RBLN-CFG-012")
@pytest.mark.parametrize("size", [1.5, "2"])
def test_a_batch_size_that_is_no_integer_is_refused(rbln: RblnObjects, size: object) -> None:
    refused(rbln, batch_size=size)


@requirement("RBLN-CFG-013")
def test_a_batch_size_of_zero_is_refused(rbln: RblnObjects) -> None:
    refused(rbln, batch_size=0)


@requirement("RBLN-CFG-015")
def test_the_vision_model_runs_one_frame_at_a_time(rbln: RblnObjects) -> None:
    assert rbln.config(batch_size=4).get("vision_model.batch_size") == 1


@requirement("RBLN-CFG-016")
def test_the_batch_size_reaches_the_text_model(rbln: RblnObjects) -> None:
    assert rbln.config(batch_size=4).get("text_model.batch_size") == 4


def refused(rbln: RblnObjects, **given: Any) -> None:
    """Assert that the configuration raises ValueError."""
    error = error_of(lambda: rbln.config(**given))
    assert error is not None, f"{CONFIG} takes {given}"
    assert "ValueError" in error.bases, f"{given} raised {error}"
