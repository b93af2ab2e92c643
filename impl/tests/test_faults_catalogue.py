"""The tables of faults say what they have to, about places and requirements that there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vlmqual_conformance.catalogue import requirements
from vlmqual_faults import catalogue
from vlmqual_faults.catalogue import CatalogueError, Variant, variant, variants
from vlmqual_faults.findings import without_fault
from vlmqual_faults.surgery import changed
from vlmqual_faults.trials import CORE, wanted

FAMILIES = ("idefics", "idefics3", "mllama")
ENTRY: dict[str, Any] = {
    "name": "wrong",
    "family": "mllama",
    "level": "vision",
    "requirements": ["MLLAMA-TOWER-001"],
    "says": "it is wrong",
    "change": [{"where": "layers:rotate", "old": "a", "new": "b"}],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_change_finds_its_place(family: str) -> None:
    for each in variants(family):
        with changed(*each.changes):
            pass


@pytest.mark.parametrize("family", FAMILIES)
def test_every_named_requirement_is_one_about_targets_of_the_family(family: str) -> None:
    known = requirements()
    for each in variants(family):
        for name in wanted(each):
            assert (known[name].family, known[name].subject) == (family, "target"), f"{each.name}: {name}"


@pytest.mark.parametrize("family", FAMILIES)
def test_there_are_at_least_sixty_faults_and_twenty_honest_variants_over_all_levels(family: str) -> None:
    faults, honest = variants(family, "fault"), variants(family, "honest")
    assert len(faults) >= 60
    assert len(honest) >= 20
    levels = {each.level for each in faults}
    everywhere = {"images", "prompts", "vision", "prefill", "decode", "masks", "generation", "parallel"}
    assert everywhere <= levels
    assert {"float32", "bfloat16", "float16", "float64"} <= {each.dtype for each in honest}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_must_about_targets_has_a_fault(family: str) -> None:
    assert without_fault([family], variants(family, "fault")) == []


def test_a_must_without_a_fault_is_found() -> None:
    faults = [each for each in variants("mllama", "fault") if "MLLAMA-DEC-005" not in each.requirements]
    assert without_fault(["mllama"], faults) == ["MLLAMA-DEC-005"]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_two_variants_change_the_same_thing_alike(family: str) -> None:
    faults = variants(family, "fault")
    assert len({each.changes for each in faults}) == len(faults)


def test_a_fault_is_judged_by_its_own_requirements_and_the_core() -> None:
    assert set(wanted(variant("mllama", "ratio-mask-full"))) == {"MLLAMA-FILE-005", *CORE["mllama"][0]}
    assert set(wanted(variant("mllama", "cross-kv-computed-again"))) == {"MLLAMA-DEC-005", *CORE["mllama"][1]}
    assert {name for part in CORE["mllama"] for name in part} <= set(wanted(variant("mllama", "honest-bfloat16")))


def read(changes: dict[str, Any]) -> list[Variant]:
    return catalogue._read("table.toml", {**ENTRY, **changes})


def test_an_entry_of_several_families_is_a_variant_of_each() -> None:
    made = read(
        {
            "family": ["idefics", "mllama"],
            "requirements": {"idefics": ["IDEFICS-TOWER-001"], "mllama": ["MLLAMA-TOWER-001"]},
            "component": {"mllama": "vision.embeddings"},
        }
    )
    assert [(each.family, each.requirements, each.component) for each in made] == [
        ("idefics", ("IDEFICS-TOWER-001",), ""),
        ("mllama", ("MLLAMA-TOWER-001",), "vision.embeddings"),
    ]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"requirement": []}, "table.toml: wrong: requirement is unknown"),
        ({"requirements": []}, "a fault of mllama names no requirement"),
        ({"kind": "error"}, "kind is 'error'"),
        ({"level": "nowhere"}, "level 'nowhere'"),
        ({"change": [{"old": "a", "new": "b"}]}, "'where' is missing"),
    ],
    ids=["unknown key", "no requirement", "kind", "level", "place"],
)
def test_an_entry_that_is_not_valid_is_refused_by_name(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(CatalogueError) as refused:
        read(changes)
    assert says in str(refused.value)


def test_a_name_that_stands_twice_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = catalogue.TABLES.joinpath("mllama.toml").read_text("utf-8")
    for name in ("one.toml", "two.toml"):
        (tmp_path / name).write_text(text, "utf-8")
    monkeypatch.setattr(catalogue, "TABLES", tmp_path)
    with pytest.raises(CatalogueError, match=r"two\.toml: mllama has two variants"):
        catalogue._all.__wrapped__()


#: Functions that compute one component and nothing else, and the first tap behind each; read from the models.
ONE_COMPONENT = {
    "idefics": {
        "models.idefics_vision:VisionEmbeddings.": "vision.embeddings",
        "models.idefics_vision:VisionAttention.": "vision.layers.0",
        "models.idefics_vision:VisionLayer.": "vision.layers.0",
        "models.idefics_vision:ResamplerAttention.": "resampler.blocks.0",
        "models.idefics_vision:ResamplerMLP.": "resampler.blocks.0",
        "models.idefics:CrossLayer.": "text.cross_layers.0",
        "models.idefics:CrossAttention.": "text.cross_layers.0",
        "models.idefics:IdeficsDecoderLayer.": "text.layers.0",
        "layers:LlamaAttention.": "text.layers.0",
    },
    "idefics3": {
        "models.idefics3:VisionEmbeddings.": "vision.embeddings",
        "models.idefics3:VisionAttention.": "vision.layers.0",
        "models.idefics3:VisionLayer.": "vision.layers.0",
        "models.idefics3:Idefics3Connector.": "connector",
        "layers:LlamaAttention.": "text.layers.0",
        "layers:LlamaDecoderLayer.": "text.layers.0",
    },
    "mllama": {
        "models.mllama_vision:MllamaVision.embeddings": "vision.embeddings",
        "models.mllama_vision:MllamaVision.patches": "vision.embeddings",
        "models.mllama_vision:PositionEmbedding.": "vision.embeddings",
        "models.mllama_vision:TileEmbedding.": "vision.embeddings",
        "models.mllama:CrossAttention.": "text.layers.1",
        "models.mllama:CrossLayer.": "text.layers.1",
        "layers:LlamaAttention.": "text.layers.0",
        "layers:LlamaDecoderLayer.": "text.layers.0",
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fault_in_the_code_of_one_component_expects_that_component(family: str) -> None:
    seen = 0
    for fault in variants(family, "fault"):
        places = {
            component
            for change in fault.changes
            for start, component in ONE_COMPONENT[family].items()
            if change.where.startswith(start)
        }
        if len(places) != 1 or len(fault.changes) != 1:
            continue
        seen += 1
        # "" is for faults that no tap of a prompt shows, for example those of rows that are beyond every image.
        assert fault.component in ("", *places), f"{fault.name} changes {places} and expects {fault.component}"
    assert seen > 15
