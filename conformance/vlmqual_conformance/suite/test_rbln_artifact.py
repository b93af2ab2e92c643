"""RBLN's Idefics3 class: compiling, saving and loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlmqual_conformance.goldens import golden
from vlmqual_conformance.marks import requirement
from vlmqual_conformance.suite.library_objects import error_of
from vlmqual_conformance.suite.rbln_objects import MODEL, POSITIONS, RblnObjects, files, golds, rbln_objects
from vlmqual_contract.subject import RemoteLibrary

FAMILY = "idefics3"
PARTS = ("", "vision_model", "text_model")
NO_DEVICE = 99


@pytest.fixture
def rbln(library: RemoteLibrary) -> RblnObjects:
    """RBLN's classes in the library under test."""
    return rbln_objects(library)


def plan(rbln: RblnObjects, **changes: Any) -> dict[str, Any]:
    """A configuration of which nothing is run."""
    return {"create_runtimes": False, "text_model": rbln.text(), **changes}


@requirement("RBLN-API-004")
def test_a_checkpoint_is_compiled_when_it_is_exported(rbln: RblnObjects) -> None:
    made = rbln.exported(plan(rbln))
    assert made.type_name == MODEL


@requirement("RBLN-API-005")
def test_a_checkpoint_that_is_not_compiled_is_refused_without_export(rbln: RblnObjects) -> None:
    error = error_of(lambda: rbln.loaded(rbln.checkpoint, rbln_config=plan(rbln)))
    assert error is not None, "a checkpoint was compiled although export was not given"


@requirement("RBLN-API-006")
def test_a_saved_model_gives_the_same_tokens_wherever_it_is_loaded_from(rbln: RblnObjects, tmp_path: Path) -> None:
    case = golden(FAMILY, "photo-whole")
    before = rbln.generate(rbln.model, case)
    rbln.model.call("save_pretrained", str(tmp_path / "saved"))
    moved = (tmp_path / "saved").rename(tmp_path / "moved")
    after = rbln.generate(rbln.loaded(str(moved)), case)
    assert after.tolist() == before.tolist()
    golds(after, case)


@requirement("RBLN-API-007")
def test_a_folder_is_given_as_text_or_as_a_path(rbln: RblnObjects) -> None:
    path = rbln.library.call("pathlib:Path", rbln.checkpoint)
    made = rbln.loaded(path, export=True, torch_dtype="float32", rbln_config=plan(rbln))
    assert made.type_name == MODEL


@requirement("RBLN-API-008")
def test_the_configuration_is_given_as_an_object_as_well(rbln: RblnObjects) -> None:
    made = rbln.exported(rbln.config(**plan(rbln, batch_size=2, text_model=rbln.text(max_seq_len=128))))
    assert made.get("rbln_config.batch_size") == 2
    assert made.get("rbln_config.text_model.max_seq_len") == 128


@requirement("RBLN-API-009")
def test_keywords_with_the_prefix_reach_the_configuration(rbln: RblnObjects) -> None:
    made = rbln.exported(
        rbln_batch_size=2, rbln_create_runtimes=False, rbln_text_model=rbln.text(max_seq_len=128, batch_size=2)
    )
    assert made.get("rbln_config.batch_size") == 2
    assert made.get("rbln_config.text_model.max_seq_len") == 128


@requirement("RBLN-API-010")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_keywords_without_the_prefix_reach_the_host_library(rbln: RblnObjects, dtype: str) -> None:
    made = rbln.exported(plan(rbln), torch_dtype=dtype, local_files_only=True)
    assert rbln.library.call("builtins:str", made.get("dtype")) == f"torch.{dtype}"


@requirement("RBLN-API-012")
def test_an_instantiated_model_is_compiled(rbln: RblnObjects) -> None:
    made = rbln.library.call(f"{MODEL}.from_model", rbln.host, rbln_config={"text_model": rbln.text()})
    assert made.type_name == MODEL
    case = golden(FAMILY, "photo-whole")
    golds(rbln.generate(made, case), case)


@requirement("RBLN-API-013")
def test_runtimes_are_made_only_when_they_are_asked_for(rbln: RblnObjects) -> None:
    away = {"text_model": rbln.text(device=NO_DEVICE), "device": NO_DEVICE}
    assert rbln.exported({"create_runtimes": False, **away}).type_name == MODEL
    assert error_of(lambda: rbln.exported({"create_runtimes": True, **away})) is not None, (
        f"runtimes were made on device {NO_DEVICE}"
    )


@requirement("RBLN-API-014", "RBLN-API-021")
def test_each_part_of_the_model_has_compiled_files(rbln: RblnObjects, tmp_path: Path) -> None:
    rbln.model.call("save_pretrained", str(tmp_path / "saved"))
    there = files(tmp_path / "saved")
    for part in PARTS:
        own = [name for name in there if name.endswith(".rbln") and str(Path(name).parent) == (part or ".")]
        assert own, f"{part or 'connector'}: no compiled file among {', '.join(there)}"
    assert {"rbln_config.json", "config.json"} <= set(there)


@requirement("RBLN-API-015")
def test_the_folder_of_a_saved_model_is_made_with_its_parents(rbln: RblnObjects, tmp_path: Path) -> None:
    rbln.model.call("save_pretrained", str(tmp_path / "not" / "there" / "yet"))
    assert files(tmp_path / "not" / "there" / "yet", "*.rbln")


@requirement("RBLN-API-017")
def test_as_many_devices_are_taken_as_the_text_model_is_divided_over(rbln: RblnObjects) -> None:
    model = rbln.compiled(num_devices=2, device=[0, 1])
    if not rbln.library.emulated:  # an emulator divides nothing, so its tokens would say nothing
        case = golden(FAMILY, "photo-whole")
        golds(rbln.generate(model, case), case)
    for devices in ([0], [0, 1, 2]):
        error = error_of(lambda devices=devices: rbln.compiled(num_devices=2, device=devices))
        assert error is not None, f"a text model that is divided over 2 devices was put on {devices}"


@requirement("RBLN-API-022")
def test_a_model_without_runtimes_refuses_to_be_called(rbln: RblnObjects) -> None:
    made = rbln.exported(plan(rbln))
    error = error_of(lambda: rbln.generate(made, golden(FAMILY, "text-only"), steps=2))
    assert error is not None, "a model without runtimes generated tokens"


@requirement("RBLN-CFG-014")
def test_the_configuration_comes_back_from_its_file(rbln: RblnObjects, tmp_path: Path) -> None:
    made = rbln.exported(plan(rbln, batch_size=2, text_model=rbln.text(batch_size=2)))
    made.call("save_pretrained", str(tmp_path))
    written = json.loads((tmp_path / "rbln_config.json").read_text("utf-8"))
    assert written["batch_size"] == 2
    assert written["text_model"]["max_seq_len"] == POSITIONS
    loaded = rbln.loaded(str(tmp_path), rbln_config={"create_runtimes": False})
    names = ("batch_size", "vision_model.batch_size", "text_model.batch_size", "text_model.max_seq_len")
    assert [loaded.get(f"rbln_config.{name}") for name in names] == [2, 1, 2, POSITIONS]
