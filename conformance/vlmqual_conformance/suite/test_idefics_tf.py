"""The TensorFlow classes of Idefics: signatures, results, loss, generation, agreement with the PyTorch classes.

Legend of shapes: B rows, S token positions, N image slots, V vocabulary with the additional one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vlmqual_conformance.goldens import golden
from vlmqual_conformance.marks import requirement
from vlmqual_conformance.outcomes import NotApplicable
from vlmqual_conformance.suite.library_objects import arguments, array
from vlmqual_conformance.suite.test_model_loss import cross_entropy
from vlmqual_contract import fixtures
from vlmqual_contract.subject import Handle, RemoteLibrary, Tensor, Tuple
from vlmqual_contract.target import Array

BASE, GENERATING = "TFIdeficsModel", "TFIdeficsForVisionText2Text"
CALL = [
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "inputs_embeds",
    "pixel_values",
    "image_encoder_embeddings",
    "perceiver_embeddings",
    "image_attention_mask",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "interpolate_pos_encoding",
    "return_dict",
    "training",
]
VOCABULARY, ADDITIONAL, LAYERS, LATENTS, VISION_WIDTH, POSITIONS, SIDE = 96, 2, 2, 3, 16, 5, 28
VISION = {
    "embed_dim": VISION_WIDTH,
    "image_size": SIDE,
    "patch_size": 14,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
RESAMPLER = {
    "resampler_depth": 1,
    "resampler_n_heads": 4,
    "resampler_head_dim": 4,
    "resampler_n_latents": LATENTS,
}
SETTINGS = {
    "vocab_size": VOCABULARY,
    "additional_vocab_size": ADDITIONAL,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "cross_layer_interval": 1,
    "dropout": 0.0,
    "alpha_initializer": "ones",
    "tie_word_embeddings": False,
}
ROWS, SLOTS, TOKENS = 2, 3, 6


class Tf:
    """The TensorFlow classes of the library under test."""

    def __init__(self, library: RemoteLibrary) -> None:
        self.library = library

    def model(self, name: str = GENERATING, **changes: Any) -> Handle:
        """A small model with random weights and open gates."""
        config = self.call("IdeficsConfig", vision_config=VISION, perceiver_config=RESAMPLER, **{**SETTINGS, **changes})
        return self.call(name, config)

    def call(self, name: str, *args: Any, **kwargs: Any) -> Handle:
        """Call something of the library that answers with an object."""
        made = self.library.call(name, *args, **kwargs)
        assert isinstance(made, Handle), f"{name} gave {made!r}, not an object"
        return made


@pytest.fixture
def tf(library: RemoteLibrary) -> Tf:
    """The classes, of a library whose tensors are TensorFlow's."""
    kind = library.call("builtins:type", Tensor(np.zeros(1, np.float32)))
    if "EagerTensor" not in kind.bases:
        raise NotApplicable(f"the tensors of {library.name} {library.version} are not TensorFlow's")
    return Tf(library)


def inputs(**changes: Array | None) -> dict[str, Tensor]:
    """Two rows with three images each; the first tokens see none, each later pair sees one."""
    generator = np.random.Generator(np.random.PCG64(0))
    mask = np.zeros((ROWS, TOKENS, SLOTS), np.float32)
    for position in range(2, TOKENS):
        mask[:, position, min(position // 2, SLOTS) - 1] = 1
    made: dict[str, Array | None] = {
        "input_ids": generator.integers(3, VOCABULARY + ADDITIONAL, (ROWS, TOKENS)),
        "attention_mask": np.ones((ROWS, TOKENS), np.int64),
        "pixel_values": generator.uniform(-1, 1, (ROWS, SLOTS, 3, SIDE, SIDE)).astype(np.float32),
        "image_attention_mask": mask,
    }
    return arguments(**{**made, **changes})


def run(model: Handle, options: dict[str, Any] | None = None, /, **changes: Array | None) -> Handle:
    """Call a model with `inputs`."""
    made = model.call("", **inputs(**changes), **(options or {}))
    assert isinstance(made, Handle), f"the model gave {made!r}, not an object"
    return made


def close(found: Array, wanted: Array, message: str = "") -> None:
    """Equal up to what another order of float32 sums may change."""
    assert found.shape == wanted.shape, f"{message}: shape {found.shape}, not {wanted.shape}"
    np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-5, err_msg=message)


# classes and signatures ----------------------------------------------------------------------------------------------


@requirement("IDEFICS-TF-001")
@pytest.mark.parametrize("name", [BASE, GENERATING])
def test_the_class_is_in_the_package_root(tf: Tf, name: str) -> None:
    assert tf.library.exists(name), f"{tf.library.name} {tf.library.version} has no {name}"
    assert "Layer" in tf.library.type_of(name), f"{name} is no layer of Keras"


@requirement("IDEFICS-TF-002")
def test_parameters_of_the_base_models_call(tf: Tf) -> None:
    parameters = tf.library.signature(f"{BASE}.call")
    assert [item.name for item in parameters] == CALL
    defaults = {item.name: item.default for item in parameters}
    assert defaults == {**dict.fromkeys(CALL), "interpolate_pos_encoding": False}


@requirement("IDEFICS-TF-003")
def test_parameters_of_the_generating_models_call(tf: Tf) -> None:
    place = CALL.index("use_cache")
    parameters = tf.library.signature(f"{GENERATING}.call")
    assert [item.name for item in parameters] == [*CALL[:place], "labels", *CALL[place:]]
    defaults = {item.name: item.default for item in parameters}
    assert defaults == {**dict.fromkeys(defaults), "interpolate_pos_encoding": False, "training": False}


# results -------------------------------------------------------------------------------------------------------------


@requirement("IDEFICS-TF-004")
@pytest.mark.parametrize("additional", [ADDITIONAL, 0])
def test_logits_are_over_the_vocabulary_and_the_additional_one(tf: Tf, additional: int) -> None:
    ids = np.full((ROWS, TOKENS), VOCABULARY + additional - 1)
    made = run(tf.model(additional_vocab_size=additional), input_ids=ids)
    assert made.type_name == "TFIdeficsCausalLMOutputWithPast"
    assert array(made, "logits").shape == (ROWS, TOKENS, VOCABULARY + additional)


@requirement("IDEFICS-TF-004")
def test_a_tuple_begins_with_the_logits(tf: Tf) -> None:
    model = tf.model()
    plain = model.call("", return_dict=False, **inputs())
    assert isinstance(plain, tuple), f"return_dict=False gives {plain!r}, not a tuple"
    close(np.asarray(plain[0]), array(run(model), "logits"))


@requirement("IDEFICS-TF-009")
def test_image_states_have_an_axis_for_the_images(tf: Tf) -> None:
    made = array(run(tf.model()), "image_hidden_states")
    assert made.shape == (ROWS, SLOTS, POSITIONS, VISION_WIDTH)


@requirement("IDEFICS-TF-009")
@pytest.mark.parametrize("name", [BASE, GENERATING])
def test_image_states_of_a_resampler_are_its_latents(tf: Tf, name: str) -> None:
    made = array(run(tf.model(name, use_resampler=True)), "image_hidden_states")
    assert made.shape == (ROWS, SLOTS, LATENTS, VISION_WIDTH)


# loss ----------------------------------------------------------------------------------------------------------------


def labels(*ignored: int) -> Array:
    """Labels for `inputs`, -100 at some positions of every row."""
    made = np.random.Generator(np.random.PCG64(1)).integers(0, VOCABULARY, (ROWS, TOKENS))
    made[:, list(ignored)] = -100
    return made


@requirement("IDEFICS-TF-005")
@pytest.mark.parametrize("ignored", [(), (3,), (1, 2, 5)])
def test_ignored_labels_do_not_count_in_the_loss(tf: Tf, ignored: tuple[int, ...]) -> None:
    target = labels(*ignored)
    made = run(tf.model(), labels=target)
    expected = cross_entropy(array(made, "logits"), target)
    assert float(array(made, "loss").reshape(-1)[0]) == pytest.approx(expected, rel=1e-5)


@requirement("IDEFICS-TF-006")
def test_the_loss_has_one_axis_of_one(tf: Tf) -> None:
    assert array(run(tf.model(), labels=labels()), "loss").shape == (1,)


# prompts without images ----------------------------------------------------------------------------------------------


@requirement("IDEFICS-TF-007")
def test_text_alone_can_be_continued(tf: Tf) -> None:
    ids = np.array([[1, 5, 6]], np.int32)
    made = np.asarray(tf.model().call("generate", Tensor(ids), max_length=30))
    assert made.shape[0] == 1
    assert 3 < made.shape[1] <= 30
    np.testing.assert_array_equal(made[:, :3], ids)


@requirement("IDEFICS-TF-007")
def test_what_the_processor_makes_of_text_alone_is_taken(tf: Tf) -> None:
    place = str(fixtures.checkpoint("idefics-tiny"))
    # By its module: without PyTorch the package root has a placeholder only.
    processor = tf.call("transformers.models.idefics.processing_idefics:IdeficsProcessor.from_pretrained", place)
    made = processor.call("", text=["In this picture."], return_tensors="tf")
    model = tf.call(GENERATING, tf.call("IdeficsConfig.from_pretrained", place))
    arrays = {str(name): Tensor(np.asarray(value)) for name, value in made.mapping().items()}
    assert np.isfinite(array(model.call("", **arrays), "logits")).all()


# agreement with PyTorch ----------------------------------------------------------------------------------------------


@requirement("IDEFICS-TF-008")
@pytest.mark.parametrize("name", ["photo", "resampler-photo"])
def test_a_checkpoint_gives_the_logits_that_it_gives_in_pytorch(tf: Tf, name: str) -> None:
    case = golden("idefics", name)
    model = tf.call(f"{GENERATING}.from_pretrained", str(fixtures.checkpoint(case.checkpoint)))
    mask = case.text["image_attention_mask"].astype(np.float32)
    made = array(run(model, **case.text | case.pixels | {"image_attention_mask": mask}), "logits")
    wanted = case.array("prefill/logits")
    assert float(np.abs(made[:, -1] - wanted).max()) < 1e-4 * np.abs(wanted).max(), f"other logits than those of {name}"


@requirement("IDEFICS-TF-008")
def test_a_cache_goes_on_without_position_ids(tf: Tf) -> None:
    model, whole = tf.model(), inputs()
    expected = array(model.call("", **whole), "logits")
    start = {**whole, "input_ids": Tensor(whole["input_ids"].array[:, :-1])}
    start["attention_mask"] = Tensor(whole["attention_mask"].array[:, :-1])
    start["image_attention_mask"] = Tensor(whole["image_attention_mask"].array[:, :-1])
    made = model.call("", use_cache=True, **start)
    close(array(made, "logits"), expected[:, :-1], "the prompt")
    cache = Tuple(tuple(Tuple(tuple(Tensor(part) for part in layer)) for layer in made.get("past_key_values")))
    last = {**whole, "input_ids": Tensor(whole["input_ids"].array[:, -1:])}
    last["image_attention_mask"] = Tensor(whole["image_attention_mask"].array[:, -1:])
    close(array(model.call("", past_key_values=cache, **last), "logits"), expected[:, -1:], "the token after it")


@requirement("IDEFICS-TF-008")
def test_dropout_is_off_unless_training(tf: Tf) -> None:
    model = tf.model(dropout=0.5)
    close(array(run(model), "logits"), array(run(model), "logits"), "two equal calls differ")


@requirement("IDEFICS-TF-008")
@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.bool_])
def test_images_that_a_token_does_not_see_change_nothing(tf: Tf, dtype: type[Any]) -> None:
    model = tf.model()
    mask = np.zeros((ROWS, TOKENS, SLOTS), dtype)
    mask[..., 0] = 1
    pixels = inputs()["pixel_values"].array
    there = array(run(model, image_attention_mask=mask), "logits")
    unseen = np.concatenate([pixels[:, :1], -pixels[:, 1:]], axis=1)
    here = array(run(model, image_attention_mask=mask, pixel_values=unseen), "logits")
    close(here, there, "other images than the seen one")
    seen = np.concatenate([-pixels[:, :1], pixels[:, 1:]], axis=1)
    here = array(run(model, image_attention_mask=mask, pixel_values=seen), "logits")
    assert np.abs(here - there).max() > 1e-3 * np.abs(there).max(), "the image that is seen changes nothing either"
