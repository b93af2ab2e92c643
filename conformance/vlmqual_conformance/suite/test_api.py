"""Documented classes, signatures, defaults and configuration of Idefics3."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vlmqual_conformance.marks import requirement
from vlmqual_conformance.suite.library_objects import (
    SMALL_TEXT,
    SMALL_VISION,
    Idefics3Objects,
    arguments,
    array,
    as_frames,
    error_of,
    idefics3_objects,
    prompt,
)
from vlmqual_contract.errors import Unsupported
from vlmqual_contract.subject import Handle, RemoteLibrary


@pytest.fixture
def idefics3(library: RemoteLibrary) -> Idefics3Objects:
    """Objects of the library under test."""
    return idefics3_objects(library)


@pytest.fixture
def default(idefics3: Idefics3Objects) -> Handle:
    """A configuration with all defaults."""
    return idefics3.call("Idefics3Config")


# classes ----------------------------------------------------------------------------------------------------------


@requirement("IDEFICS3-CFG-022")
@pytest.mark.parametrize(
    "name",
    [
        "Idefics3Config",
        "Idefics3Model",
        "Idefics3ForConditionalGeneration",
        "Idefics3ImageProcessor",
        "Idefics3Processor",
    ],
)
def test_the_class_is_in_the_package_root(library: RemoteLibrary, name: str) -> None:
    assert library.exists(name), f"{library.name} {library.version} has no {name}"


@requirement("IDEFICS3-MODEL-002")
@pytest.mark.parametrize("name", ["Idefics3Model", "Idefics3ForConditionalGeneration"])
def test_models_are_pretrained_models_and_modules(library: RemoteLibrary, name: str) -> None:
    assert {"PreTrainedModel", "Module"} <= set(library.type_of(name))


@requirement("IDEFICS3-CFG-015")
def test_the_configuration_is_a_pretrained_configuration_that_keeps_unknown_values(
    idefics3: Idefics3Objects,
) -> None:
    assert {"PretrainedConfig", "PreTrainedConfig"} & set(idefics3.library.type_of("Idefics3Config"))
    assert idefics3.call("Idefics3Config", colour="blue").get("colour") == "blue"


@requirement("IDEFICS3-CARD-001")
def test_auto_processor_gives_the_processor_of_the_family(idefics3: Idefics3Objects) -> None:
    if not idefics3.library.exists("AutoProcessor"):
        raise Unsupported("the library has no AutoProcessor; its processor class is called by name")
    loaded = idefics3.call("AutoProcessor.from_pretrained", str(idefics3.checkpoint))
    assert "Idefics3Processor" in loaded.bases
    assert loaded.get("image_seq_len") == 16


@requirement("IDEFICS3-LM-016", "IDEFICS3-CARD-002")
def test_auto_model_for_vision2seq_gives_the_model_of_the_family(idefics3: Idefics3Objects) -> None:
    name = "AutoModelForVision2Seq"
    if not idefics3.library.exists("AutoProcessor") and not idefics3.library.exists(name):
        raise Unsupported("the library has no Auto classes; its model classes are called by name")
    assert idefics3.library.exists(name), f"the library has Auto classes, but no {name}"
    bfloat16 = idefics3.library.get("torch:bfloat16")
    loaded = idefics3.call(f"{name}.from_pretrained", str(idefics3.checkpoint), torch_dtype=bfloat16)
    assert "Idefics3ForConditionalGeneration" in loaded.bases
    assert idefics3.library.call("builtins:str", loaded.get("lm_head.weight.dtype")) == "torch.bfloat16"


@requirement("IDEFICS3-IMG-049")
def test_frameworks_of_return_tensors_have_their_documented_short_names(library: RemoteLibrary) -> None:
    if not library.exists("TensorType"):
        raise Unsupported("the library has no TensorType; return_tensors is a plain string")
    names = set(library.get("TensorType._value2member_map_"))
    assert names >= {"pt", "np", "tf", "jax"}, f"TensorType has {sorted(names)}"


# configuration ----------------------------------------------------------------------------------------------------


@requirement(
    "IDEFICS3-CFG-001",
    "IDEFICS3-CFG-002",
    "IDEFICS3-CFG-003",
    "IDEFICS3-CFG-004",
)
@pytest.mark.parametrize(
    ("name", "value"),
    [("use_cache", True), ("image_token_id", 128257), ("tie_word_embeddings", False), ("scale_factor", 2)],
)
def test_defaults_of_the_configuration(default: Handle, name: str, value: Any) -> None:
    assert default.get(name) == value


@requirement("IDEFICS3-CFG-005")
def test_the_padding_id_is_128002_by_default(default: Handle) -> None:
    assert default.get("pad_token_id") == 128002


@requirement("IDEFICS3-CFG-006")
def test_the_padding_id_reaches_the_default_text_configuration(default: Handle) -> None:
    assert default.get("text_config.pad_token_id") == 128002


@requirement("IDEFICS3-CFG-007")
def test_a_given_padding_id_is_kept(idefics3: Idefics3Objects) -> None:
    assert idefics3.call("Idefics3Config", pad_token_id=7).get("pad_token_id") == 7


@requirement("IDEFICS3-CFG-008", "IDEFICS3-CFG-009")
def test_the_default_vision_configuration_is_the_familys_own(default: Handle) -> None:
    assert default.type_of("vision_config")[0] == "Idefics3VisionConfig"


@requirement("IDEFICS3-CFG-010", "IDEFICS3-CFG-023")
def test_the_default_text_configuration_is_llamas(default: Handle) -> None:
    assert "LlamaConfig" in default.type_of("text_config")


@requirement("IDEFICS3-CFG-018")
def test_default_vision_geometry_is_224_pixels_in_patches_of_32(default: Handle) -> None:
    geometry = {name: default.get(f"vision_config.{name}") for name in ("image_size", "patch_size")}
    assert geometry == {"image_size": 224, "patch_size": 32}


@requirement("IDEFICS3-CFG-019", "IDEFICS3-LM-004")
def test_the_default_vocabulary_is_llamas(default: Handle) -> None:
    assert default.get("text_config.vocab_size") == 32000


@requirement("IDEFICS3-CFG-011")
def test_the_configurations_parameters_can_be_given_by_position(idefics3: Idefics3Objects) -> None:
    made = idefics3.call("Idefics3Config", False, 5, True)
    assert [made.get(name) for name in ("use_cache", "image_token_id", "tie_word_embeddings")] == [False, 5, True]


@requirement("IDEFICS3-CFG-012", "IDEFICS3-CFG-013")
def test_parts_of_the_configuration_may_be_mappings(idefics3: Idefics3Objects) -> None:
    made = idefics3.call(
        "Idefics3Config",
        vision_config={"image_size": 364, "patch_size": 14},
        text_config={"hidden_size": 64, "num_attention_heads": 4},
    )
    assert made.type_of("vision_config")[0] == "Idefics3VisionConfig"
    assert (made.get("vision_config.image_size"), made.get("vision_config.patch_size")) == (364, 14)
    assert "LlamaConfig" in made.type_of("text_config"), "a mapping without model_type is Llama's"
    assert (made.get("text_config.hidden_size"), made.get("text_config.num_attention_heads")) == (64, 4)


@requirement("IDEFICS3-CFG-014")
def test_parts_of_the_configuration_may_be_objects(idefics3: Idefics3Objects) -> None:
    donor = idefics3.call("Idefics3Config", vision_config=dict(SMALL_VISION), text_config=dict(SMALL_TEXT))
    made = idefics3.call(
        "Idefics3Config", vision_config=donor.get("vision_config"), text_config=donor.get("text_config")
    )
    assert made.get("vision_config.image_size") == 56
    assert made.get("text_config.vocab_size") == 320
    assert made.type_of("vision_config") == donor.type_of("vision_config")


@requirement("IDEFICS3-CFG-017")
@pytest.mark.parametrize("name", ["Idefics3Model", "Idefics3ForConditionalGeneration"])
def test_a_model_can_be_made_from_a_configuration(idefics3: Idefics3Objects, name: str) -> None:
    model = idefics3.new_model(name, vision_config={"hidden_size": 16})
    assert model.get("config.vision_config.hidden_size") == 16
    assert model.get("config.text_config.hidden_size") == 32
    made = model.call("", **arguments(input_ids=np.array([[1, 5, 9]], np.int64)))
    result = array(made, "last_hidden_state" if name == "Idefics3Model" else "logits")
    assert np.isfinite(result).all()
    assert result.std() > 0


@requirement("IDEFICS3-MODEL-003")
@pytest.mark.parametrize("name", ["Idefics3Model", "Idefics3ForConditionalGeneration"])
def test_a_vision_configuration_is_no_configuration_of_a_model(idefics3: Idefics3Objects, name: str) -> None:
    vision = idefics3.new_config().get("vision_config")
    error = error_of(lambda: idefics3.library.call(name, vision))
    assert error is not None, f"{name} takes a vision configuration"


@requirement("IDEFICS3-CFG-020")
@pytest.mark.parametrize("tied", [True, False])
def test_tie_word_embeddings_decides_whether_head_and_embedding_share_a_matrix(
    idefics3: Idefics3Objects, tied: bool
) -> None:
    model = idefics3.new_model(tie_word_embeddings=tied)
    embedding = model.call("get_input_embeddings").call("weight.data_ptr")
    head = model.call("get_output_embeddings").call("weight.data_ptr")
    assert (embedding == head) is tied


@requirement("IDEFICS3-CFG-021", "IDEFICS3-MODEL-029")
@pytest.mark.parametrize(
    ("image_size", "patch_size", "scale", "tokens"), [(56, 14, 2, 4), (56, 14, 4, 1), (56, 7, 2, 16), (112, 14, 4, 4)]
)
def test_a_frame_has_as_many_tokens_as_the_formula_says(
    idefics3: Idefics3Objects, image_size: int, patch_size: int, scale: int, tokens: int
) -> None:
    assert tokens == int((image_size // patch_size) ** 2 / scale**2)
    check_tokens(idefics3, image_size, patch_size, scale, tokens)


@requirement("IDEFICS3-CARD-005", "IDEFICS3-MODEL-029")
def test_a_frame_of_the_released_geometry_has_169_tokens(idefics3: Idefics3Objects) -> None:
    check_tokens(idefics3, 364, 14, 2, 169)


def check_tokens(idefics3: Idefics3Objects, image_size: int, patch_size: int, scale: int, tokens: int) -> None:
    """A model of a geometry makes so many features of a frame."""
    model = idefics3.new_model(
        "Idefics3Model", scale_factor=scale, vision_config={"image_size": image_size, "patch_size": patch_size}
    )
    ids = np.array([[1, *[300] * tokens, 5]], np.int64)
    pixels = np.random.Generator(np.random.PCG64(1)).uniform(-1, 1, (1, 1, 3, image_size, image_size))
    made = model.call("", **arguments(input_ids=ids, pixel_values=pixels.astype(np.float32)))
    assert as_frames(array(made, "image_hidden_states"), tokens).shape == (1, tokens, 32)


@requirement("IDEFICS3-CFG-023")
def test_the_text_model_is_a_llama_model(idefics3: Idefics3Objects) -> None:
    assert "LlamaConfig" in idefics3.trunk.type_of("config.text_config")
    names = set(idefics3.trunk.call("text_model.state_dict").mapping())
    for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj", "input_layernorm"):
        assert f"layers.0.{part}.weight" in names, f"a Llama layer has {part}"
    assert not [name for name in names if name.endswith(".bias")]


@requirement("IDEFICS3-CFG-024")
def test_there_is_no_perceiver(idefics3: Idefics3Objects) -> None:
    names = list(idefics3.model.call("state_dict").mapping())
    assert len(names) > 50
    assert not [name for name in names if "perceiver" in name or "resampler" in name]


@requirement("IDEFICS3-CFG-025")
def test_the_vision_tower_has_one_position_for_each_patch_and_no_class_token(idefics3: Idefics3Objects) -> None:
    states = idefics3.trunk.call("vision_model.state_dict").mapping()
    positions = [value for name, value in states.items() if name.endswith("position_embedding.weight")]
    assert [item.shape for item in positions] == [(64, 48)]
    assert not [name for name in states if "class" in name or "cls" in name]


@requirement("IDEFICS3-CARD-013")
@pytest.mark.parametrize("name", ["_attn_implementation", "attn_implementation"])
def test_the_attention_implementation_can_be_chosen_at_loading(idefics3: Idefics3Objects, name: str) -> None:
    loaded = idefics3.call(
        "Idefics3ForConditionalGeneration.from_pretrained",
        str(idefics3.checkpoint),
        torch_dtype="float32",
        **{name: "eager"},
    )
    ids = arguments(input_ids=prompt(0))
    made = loaded.call("", output_attentions=True, **ids)
    assert isinstance(made.get("attentions")[0], np.ndarray), "eager attention can report its weights"
    np.testing.assert_allclose(
        array(made, "logits"), array(idefics3.model.call("", **ids), "logits"), rtol=1e-5, atol=1e-6
    )
