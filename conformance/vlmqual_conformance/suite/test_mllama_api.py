"""Documented classes, signatures, defaults and configuration of Mllama."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vlmqual_conformance.marks import requirement
from vlmqual_conformance.suite.library_objects import arguments, array, error_of
from vlmqual_conformance.suite.mllama_objects import (
    CROSSING,
    GENERATING,
    SMALL_TEXT,
    SMALL_VISION,
    MllamaObjects,
    mllama_objects,
)
from vlmqual_contract.errors import Unsupported
from vlmqual_contract.subject import Handle, Parameter, RemoteLibrary

CLASSES = (
    "MllamaConfig",
    "MllamaProcessor",
    "MllamaImageProcessor",
    GENERATING,
    "MllamaForCausalLM",
    "MllamaTextModel",
    "MllamaVisionModel",
)
GENERATE = [
    "input_ids",
    "pixel_values",
    "aspect_ratio_mask",
    "aspect_ratio_ids",
    "attention_mask",
    "cross_attention_mask",
    "cross_attention_states",
    "position_ids",
    "past_key_values",
    "inputs_embeds",
    "labels",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "cache_position",
    "num_logits_to_keep",
]
TEXT = [
    "input_ids",
    "attention_mask",
    "position_ids",
    "cross_attention_states",
    "cross_attention_mask",
    "full_text_row_masked_out_mask",
    "past_key_values",
    "inputs_embeds",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "cache_position",
]
IMAGES = {
    "do_convert_rgb": True,
    "do_resize": True,
    "size": None,
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": None,
    "image_std": None,
    "do_pad": True,
    "max_image_tiles": 4,
}


@pytest.fixture
def mllama(library: RemoteLibrary) -> MllamaObjects:
    """Objects of the library under test."""
    return mllama_objects(library)


def named(parameters: list[Parameter]) -> list[str]:
    """Names of the parameters but `*args` and `**kwargs`."""
    return [item.name for item in parameters if not item.kind.startswith("VAR_")]


def defaults(parameters: list[Parameter]) -> dict[str, Any]:
    """Names to defaults."""
    return {item.name: item.default for item in parameters if not item.kind.startswith("VAR_")}


def takes_keywords(parameters: list[Parameter]) -> bool:
    """There is a `**kwargs`."""
    return any(item.kind == "VAR_KEYWORD" for item in parameters)


# classes ----------------------------------------------------------------------------------------------------------


@requirement("MLLAMA-CFG-015")
@pytest.mark.parametrize("name", CLASSES)
def test_the_class_is_in_the_package_root(library: RemoteLibrary, name: str) -> None:
    assert library.exists(name), f"{library.name} {library.version} has no {name}"


@requirement("MLLAMA-CFG-004")
@pytest.mark.parametrize("name", ["MllamaVisionConfig", "MllamaTextConfig"])
def test_the_sub_configuration_is_in_the_package_root(library: RemoteLibrary, name: str) -> None:
    assert library.exists(name), f"{library.name} {library.version} has no {name}"


@requirement("MLLAMA-CGEN-002")
@pytest.mark.parametrize("name", CLASSES[3:])
def test_models_are_pretrained_models_and_modules(library: RemoteLibrary, name: str) -> None:
    assert {"PreTrainedModel", "Module"} <= set(library.type_of(name))


@requirement("MLLAMA-PROC-022")
def test_auto_processor_gives_the_processor_of_the_family(mllama: MllamaObjects) -> None:
    if not mllama.library.exists("AutoProcessor"):
        raise Unsupported("the library has no AutoProcessor; its processor class is called by name")
    loaded = mllama.call("AutoProcessor.from_pretrained", str(mllama.checkpoint))
    assert "MllamaProcessor" in loaded.bases
    assert loaded.get("image_processor.size.height") == 56


# signatures -------------------------------------------------------------------------------------------------------


@requirement("MLLAMA-CFG-001")
def test_parameters_of_the_configuration(library: RemoteLibrary) -> None:
    parameters = library.signature("MllamaConfig")
    assert defaults(parameters) == {"vision_config": None, "text_config": None, "image_token_index": 128256}
    assert named(parameters) == ["vision_config", "text_config", "image_token_index"]
    assert takes_keywords(parameters)


@requirement("MLLAMA-PROC-001")
def test_the_processor_takes_an_image_processor_and_a_tokenizer(library: RemoteLibrary) -> None:
    parameters = library.signature("MllamaProcessor")
    assert [item.name for item in parameters] == ["image_processor", "tokenizer"]
    assert all(item.required for item in parameters), "both are required"


@requirement("MLLAMA-IMG-001", "MLLAMA-IMG-035")
def test_parameters_of_the_image_processor(library: RemoteLibrary) -> None:
    parameters = library.signature("MllamaImageProcessor")
    assert named(parameters) == list(IMAGES)
    found = defaults(parameters)
    found["resample"] = library.call("builtins:int", found["resample"])
    assert found == IMAGES
    assert takes_keywords(parameters)


@requirement("MLLAMA-IMG-015")
def test_parameters_of_preprocess(library: RemoteLibrary) -> None:
    parameters = library.signature("MllamaImageProcessor.preprocess")
    assert named(parameters) == ["images", *IMAGES, "input_data_format", "return_tensors"]
    assert {item.default for item in parameters[1:]} == {None}


@requirement("MLLAMA-IMG-026")
def test_parameters_of_pad(library: RemoteLibrary) -> None:
    parameters = library.signature("MllamaImageProcessor.pad")
    assert named(parameters) == ["image", "size", "aspect_ratio", "data_format", "input_data_format"]
    assert {item.default for item in parameters[3:]} == {None}


@requirement("MLLAMA-IMG-029", "MLLAMA-IMG-030")
def test_the_filter_of_resize_is_bilinear(library: RemoteLibrary) -> None:
    found = defaults(library.signature("MllamaImageProcessor.resize"))["resample"]
    assert found is not None, "the signature names no filter"
    assert library.call("builtins:int", found) == 2, "the default filter is not BILINEAR"


@requirement("MLLAMA-CGEN-001")
def test_parameters_of_the_generating_models_forward(library: RemoteLibrary) -> None:
    parameters = library.signature(f"{GENERATING}.forward")
    assert named(parameters) == GENERATE
    assert defaults(parameters) == dict.fromkeys(GENERATE[:-1]) | {"num_logits_to_keep": 0}


@requirement("MLLAMA-CLM-001", "MLLAMA-CLM-008")
def test_parameters_of_the_language_models_forward(library: RemoteLibrary) -> None:
    place = TEXT.index("use_cache")
    wanted = [*TEXT[:place], "labels", *TEXT[place:], "num_logits_to_keep"]
    parameters = library.signature("MllamaForCausalLM.forward")
    assert named(parameters) == wanted
    assert defaults(parameters) == dict.fromkeys(wanted[:-1]) | {"num_logits_to_keep": 0}


@requirement("MLLAMA-CLM-009")
def test_the_language_model_takes_no_pixels(library: RemoteLibrary) -> None:
    spare = {"pixel_values", "aspect_ratio_mask", "aspect_ratio_ids"}
    found = spare & set(named(library.signature("MllamaForCausalLM.forward")))
    assert not found, f"the text model takes {sorted(found)}"


@requirement("MLLAMA-TEXT-001")
def test_parameters_of_the_text_models_forward(library: RemoteLibrary) -> None:
    parameters = library.signature("MllamaTextModel.forward")
    assert named(parameters) == TEXT
    assert set(defaults(parameters).values()) == {None}


@requirement("MLLAMA-VIS-001", "MLLAMA-VIS-011")
def test_parameters_of_the_vision_models_forward(library: RemoteLibrary) -> None:
    parameters = library.signature("MllamaVisionModel.forward")
    required = ["pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"]
    assert named(parameters) == [*required, "output_attentions", "output_hidden_states", "return_dict"]
    assert [item.name for item in parameters if item.required] == required


# configuration ----------------------------------------------------------------------------------------------------


@requirement("MLLAMA-CFG-002", "MLLAMA-CFG-003")
def test_a_default_configuration_has_default_parts(mllama: MllamaObjects) -> None:
    config = mllama.call("MllamaConfig")
    assert config.get("image_token_index") == 128256
    assert config.type_of("vision_config")[0] == "MllamaVisionConfig"
    assert config.type_of("text_config")[0] == "MllamaTextConfig"


@requirement("MLLAMA-CFG-005")
def test_both_parts_are_taken_by_position_and_kept(mllama: MllamaObjects) -> None:
    default = mllama.call("MllamaConfig")
    vision, text = default.get("vision_config"), default.get("text_config")
    same = mllama.library.get("operator:is_")
    config = mllama.call("MllamaConfig", vision, text)
    for name, part in (("vision_config", vision), ("text_config", text)):
        assert same.call("", config.get(name), part) is True, f"{name} is another object"


@requirement("MLLAMA-CFG-006")
def test_a_model_can_be_built_without_rotary_scaling(mllama: MllamaObjects) -> None:
    text = {name: value for name, value in SMALL_TEXT.items() if name != "rope_scaling"}
    config = mllama.call(
        "MllamaConfig",
        text_config=text,
        vision_config=dict(SMALL_VISION),
        image_token_index=320,
    )
    model = mllama.call(GENERATING, config)
    model.call("eval")
    ids = np.array([[5, 6, 7, 8, 9, 10]], np.int64)
    assert np.isfinite(array(model.call("", **arguments(input_ids=ids)), "logits")).all()


@requirement("MLLAMA-CFG-007")
def test_the_configuration_is_a_pretrained_configuration_that_keeps_unknown_values(mllama: MllamaObjects) -> None:
    assert {"PretrainedConfig", "PreTrainedConfig"} & set(mllama.library.type_of("MllamaConfig"))
    assert mllama.call("MllamaConfig", colour="blue").get("colour") == "blue"


@requirement("MLLAMA-CFG-008")
def test_parts_may_be_mappings(mllama: MllamaObjects) -> None:
    config = mllama.call("MllamaConfig", vision_config={"image_size": 560}, text_config={"hidden_size": 1024})
    assert (config.get("vision_config.image_size"), config.get("text_config.hidden_size")) == (560, 1024)
    assert config.get("vision_config.patch_size") == 14, "what is not given keeps its default"


@requirement("MLLAMA-CFG-010", "MLLAMA-CFG-011", "MLLAMA-CFG-013")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vision_config.image_size", 448),
        ("vision_config.patch_size", 14),
        ("vision_config.max_num_tiles", 4),
        ("vision_config.vision_output_dim", 7680),
        ("vision_config.hidden_size", 1280),
        ("vision_config.num_hidden_layers", 32),
        ("vision_config.num_global_layers", 8),
        ("vision_config.intermediate_layers_indices", [3, 7, 15, 23, 30]),
        ("text_config.hidden_size", 4096),
        ("text_config.num_hidden_layers", 40),
        ("text_config.cross_attention_layers", [3, 8, 13, 18, 23, 28, 33, 38]),
    ],
)
def test_defaults_describe_the_released_model(mllama: MllamaObjects, name: str, value: Any) -> None:
    assert mllama.call("MllamaConfig").get(name) == value


@requirement("MLLAMA-CFG-012")
def test_the_image_token_lies_just_above_the_vocabulary(mllama: MllamaObjects) -> None:
    default = mllama.call("MllamaConfig")
    assert default.get("text_config.vocab_size") == default.get("image_token_index")
    table = mllama.model.call("get_input_embeddings").get("weight")
    head = mllama.model.call("get_output_embeddings").get("weight")
    assert (table.shape, head.shape) == ((608, 64), (600, 64)), "8 embeddings more than the 600 words of the head"


@requirement("MLLAMA-CFG-014")
def test_the_supported_aspect_ratios_of_four_tiles(mllama: MllamaObjects) -> None:
    found = [list(pair) for pair in mllama.call("MllamaConfig").get("vision_config.supported_aspect_ratios")]
    assert found == [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]


# models -----------------------------------------------------------------------------------------------------------


@requirement("MLLAMA-CLM-002", "MLLAMA-CLM-003", "MLLAMA-CLM-004")
@pytest.mark.parametrize("part", ["", "text_config"])
def test_the_language_model_is_made_of_either_configuration_and_has_no_vision(mllama: MllamaObjects, part: str) -> None:
    config = mllama.new_config()
    model = mllama.call("MllamaForCausalLM", config.get(part) if part else config)
    names = set(model.call("state_dict").mapping())
    assert names, "the model has no parameters"
    assert not [name for name in names if "vision" in name or "projector" in name]
    assert model.call("get_output_embeddings").get("weight").shape[0] == 320


@requirement("MLLAMA-TEXT-005")
def test_cross_attention_layers_stand_where_the_configuration_says(mllama: MllamaObjects) -> None:
    kinds = [mllama.text.type_of(f"layers.{index}")[0] for index in range(6)]
    crossing = [index for index in range(6) if mllama.text.has(f"layers.{index}.cross_attn")]
    assert tuple(crossing) == CROSSING, f"the layers are {kinds}"
    own = [index for index in range(6) if mllama.text.has(f"layers.{index}.self_attn")]
    assert own == [0, 2, 3, 5]


@requirement("MLLAMA-VIS-002")
def test_the_vision_model_has_a_local_and_a_global_transformer(mllama: MllamaObjects) -> None:
    counts = [
        mllama.library.call("builtins:len", mllama.vision.get(f"{name}.layers"))
        for name in ("transformer", "global_transformer")
    ]
    assert counts == [5, 2]


# processors -------------------------------------------------------------------------------------------------------


@requirement("MLLAMA-PROC-002")
@pytest.mark.parametrize("missing", ["image_processor", "tokenizer"])
def test_both_parts_of_the_processor_are_required(mllama: MllamaObjects, missing: str) -> None:
    parts: dict[str, Handle | None] = {"image_processor": mllama.images, "tokenizer": mllama.tokenizer}
    parts[missing] = None
    assert error_of(lambda: mllama.library.call("MllamaProcessor", **parts)), f"{missing}=None is accepted"


@requirement("MLLAMA-IMG-002", "MLLAMA-IMG-003", "MLLAMA-IMG-004", "MLLAMA-IMG-006", "MLLAMA-IMG-007", "MLLAMA-IMG-008")
@pytest.mark.parametrize("name", ["do_convert_rgb", "do_resize", "do_rescale", "do_normalize", "do_pad"])
def test_switches_of_the_image_processor_are_on(mllama: MllamaObjects, name: str) -> None:
    assert mllama.default_images.get(name) is True
    assert mllama.default_images.get("max_image_tiles") == 4


@requirement("MLLAMA-IMG-005", "MLLAMA-IMG-009")
def test_the_rescale_factor_is_one_in_255(mllama: MllamaObjects) -> None:
    assert mllama.default_images.get("rescale_factor") == 1 / 255


@requirement("MLLAMA-IMG-010")
def test_the_filter_is_bilinear(mllama: MllamaObjects) -> None:
    assert int(mllama.library.call("builtins:int", mllama.default_images.get("resample"))) == 2


@requirement("MLLAMA-IMG-011", "MLLAMA-IMG-012")
def test_the_default_tile_is_square_and_224_pixels(mllama: MllamaObjects) -> None:
    size = [mllama.default_images.get(f"size.{side}") for side in ("height", "width")]
    assert size == [224, 224]


@requirement("MLLAMA-IMG-035")
@pytest.mark.parametrize("name", ["image_mean", "image_std"])
def test_mean_and_deviation_have_a_number_for_each_channel(mllama: MllamaObjects, name: str) -> None:
    assert list(mllama.default_images.get(name)) == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"size": {"height": 28, "width": 14}}, marks=requirement("MLLAMA-IMG-013")),
        pytest.param({"size": {"longest_edge": 28}}, marks=requirement("MLLAMA-IMG-014")),
        pytest.param({"size": {"height": 28}}, marks=requirement("MLLAMA-IMG-014")),
        pytest.param({"do_pad": False}, marks=requirement("MLLAMA-IMG-031")),
        pytest.param({"do_resize": False}, marks=requirement("MLLAMA-IMG-032")),
        pytest.param({"max_image_tiles": 0}, marks=requirement("MLLAMA-IMG-043")),
        pytest.param({"max_image_tiles": -1}, marks=requirement("MLLAMA-IMG-043")),
    ],
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()),
)
def test_what_cannot_be_done_is_a_value_error(mllama: MllamaObjects, options: dict[str, Any]) -> None:
    picture = np.full((20, 30, 3), 7, np.uint8)
    error = error_of(
        lambda: mllama.library.call("MllamaImageProcessor", **options).call("preprocess", picture, return_tensors="np")
    )
    assert error, f"{options} is accepted"
    assert "ValueError" in error.bases, f"refused with {error}"
