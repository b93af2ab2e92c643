"""Documented signatures of Idefics3's classes, and defaults and requirements of its processors."""

from __future__ import annotations

from typing import Any

import pytest

from vlmqual_conformance.marks import requirement
from vlmqual_conformance.suite.library_objects import Idefics3Objects, idefics3_objects
from vlmqual_contract.errors import TargetRaised
from vlmqual_contract.subject import Parameter, RemoteLibrary

FORWARD = [
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "inputs_embeds",
    "pixel_values",
    "pixel_attention_mask",
    "image_hidden_states",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
]


@pytest.fixture
def idefics3(library: RemoteLibrary) -> Idefics3Objects:
    """Objects of the library under test."""
    return idefics3_objects(library)


def named(parameters: list[Parameter]) -> list[str]:
    """Names of the parameters but `*args` and `**kwargs`."""
    return [item.name for item in parameters if not item.kind.startswith("VAR_")]


def takes_keywords(parameters: list[Parameter]) -> bool:
    """There is a `**kwargs`."""
    return any(item.kind == "VAR_KEYWORD" for item in parameters)


@requirement("IDEFICS3-CFG-011")
def test_the_configurations_parameters_have_the_documented_order(idefics3: Idefics3Objects) -> None:
    parameters = idefics3.library.signature("Idefics3Config")
    assert [(item.name, item.default) for item in parameters if not item.kind.startswith("VAR_")] == [
        ("use_cache", True),
        ("image_token_id", 128257),
        ("tie_word_embeddings", False),
        ("vision_config", None),
        ("text_config", None),
        ("scale_factor", 2),
        ("pad_token_id", 128002),
    ]
    assert takes_keywords(parameters)


@requirement("IDEFICS3-MODEL-001")
def test_parameters_of_the_models_forward(library: RemoteLibrary) -> None:
    parameters = library.signature("Idefics3Model.forward")
    assert named(parameters) == FORWARD
    assert {item.default for item in parameters} == {None}


@requirement("IDEFICS3-LM-001")
def test_parameters_of_the_generating_models_forward(library: RemoteLibrary) -> None:
    place = FORWARD.index("use_cache")
    parameters = library.signature("Idefics3ForConditionalGeneration.forward")
    assert named(parameters) == [*FORWARD[:place], "labels", *FORWARD[place:]]
    assert {item.default for item in parameters} == {None}


@requirement("IDEFICS3-IMG-001")
def test_parameters_of_the_image_processor(library: RemoteLibrary) -> None:
    parameters = library.signature("Idefics3ImageProcessor")
    assert named(parameters) == [
        "do_convert_rgb",
        "do_resize",
        "size",
        "resample",
        "do_image_splitting",
        "max_image_size",
        "do_rescale",
        "rescale_factor",
        "do_normalize",
        "image_mean",
        "image_std",
        "do_pad",
    ]
    defaults = {item.name: item.default for item in parameters}
    assert defaults["rescale_factor"] == 1 / 255
    assert all(defaults[name] is True for name in defaults if name.startswith("do_"))
    assert all(defaults[name] is None for name in ("size", "max_image_size", "image_mean", "image_std"))
    assert takes_keywords(parameters)


@requirement("IDEFICS3-IMG-014")
def test_parameters_of_preprocess(library: RemoteLibrary) -> None:
    assert named(library.signature("Idefics3ImageProcessor.preprocess")) == [
        "images",
        "do_convert_rgb",
        "do_resize",
        "size",
        "resample",
        "do_image_splitting",
        "do_rescale",
        "max_image_size",
        "rescale_factor",
        "do_normalize",
        "image_mean",
        "image_std",
        "do_pad",
        "return_tensors",
        "return_row_col_info",
        "data_format",
        "input_data_format",
    ]


@requirement("IDEFICS3-PROC-001", "IDEFICS3-PROC-004")
def test_parameters_of_the_processor(library: RemoteLibrary) -> None:
    parameters = library.signature("Idefics3Processor")
    fields = [(item.name, item.required, item.default) for item in parameters if not item.kind.startswith("VAR_")]
    assert fields == [
        ("image_processor", True, None),
        ("tokenizer", False, None),
        ("image_seq_len", False, 169),
        ("chat_template", False, None),
    ]
    assert takes_keywords(parameters)


@requirement("IDEFICS3-PROC-005")
def test_parameters_of_the_processors_call(library: RemoteLibrary) -> None:
    parameters = library.signature("Idefics3Processor.__call__")
    assert named(parameters) == ["images", "text", "audio", "videos", "image_seq_len"]
    assert takes_keywords(parameters)


@requirement("IDEFICS3-PROC-002")
def test_a_processor_needs_an_image_processor(idefics3: Idefics3Objects) -> None:
    with pytest.raises(TargetRaised) as caught:
        idefics3.call("Idefics3Processor", None, idefics3.processor.get("tokenizer"))
    assert "ValueError" in caught.value.bases, f"refused with {caught.value}"


@requirement("IDEFICS3-PROC-003")
def test_a_processor_needs_a_tokenizer(idefics3: Idefics3Objects) -> None:
    with pytest.raises(TargetRaised) as caught:
        idefics3.call("Idefics3Processor", idefics3.default_images)
    assert "ValueError" in caught.value.bases, f"refused with {caught.value}"


# defaults ----------------------------------------------------------------------------------------------------------


@requirement(
    "IDEFICS3-IMG-002",
    "IDEFICS3-IMG-003",
    "IDEFICS3-IMG-004",
    "IDEFICS3-IMG-005",
    "IDEFICS3-IMG-006",
    "IDEFICS3-IMG-007",
    "IDEFICS3-IMG-008",
    "IDEFICS3-IMG-009",
    "IDEFICS3-IMG-010",
    "IDEFICS3-IMG-012",
    "IDEFICS3-IMG-013",
    "IDEFICS3-CARD-007",
)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("do_convert_rgb", True),
        ("do_resize", True),
        ("do_image_splitting", True),
        ("do_rescale", True),
        ("rescale_factor", 1 / 255),
        ("do_normalize", True),
        ("do_pad", True),
        ("size.longest_edge", 1456),
        ("max_image_size.longest_edge", 364),
        ("image_mean", [0.5, 0.5, 0.5]),
        ("image_std", [0.5, 0.5, 0.5]),
    ],
)
def test_defaults_of_the_image_processor(idefics3: Idefics3Objects, name: str, value: Any) -> None:
    found = idefics3.default_images.get(name)
    assert found == value or list(found) == value


@requirement("IDEFICS3-IMG-011")
def test_the_default_filter_is_lanczos(idefics3: Idefics3Objects) -> None:
    assert int(idefics3.library.call("builtins:int", idefics3.default_images.get("resample"))) == 1
