"""The adapter over the TensorFlow classes against the library itself.

TensorFlow wants an environment of its own: `nox -s conformance_tf` runs this file.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlmqual_adapters.transformers_tf import TransformersTfTarget
from vlmqual_adapters.transformers_tf_library import TransformersTfLibrary
from vlmqual_adapters.transformers_tf_session import TransformersTfSession
from vlmqual_contract import fixtures
from vlmqual_contract.errors import Unsupported, UsageError
from vlmqual_contract.target import Features, Model, Options, Prompt, Step

if importlib.util.find_spec("tensorflow") is None:
    # One skip for the whole file; asked for alone, as in the session, it then ends as a run without tests, an error.
    pytest.skip("TensorFlow is not installed here; see nox -s conformance_tf", allow_module_level=True)

MASK = "image_attention_mask"
COUNTER = "counters.cross_attention_kv"
#: Checkpoints to goldens of two rows, padded on the left.
GOLD = {"idefics-tiny": "batch-left", "idefics-resampler-tiny": "resampler-batch"}
#: Checkpoints to goldens with taps.
TAPPED = {"idefics-tiny": "photo", "idefics-resampler-tiny": "resampler-photo"}


@pytest.fixture(scope="module")
def target() -> TransformersTfTarget:
    return TransformersTfTarget()


@pytest.fixture(scope="module", params=GOLD)
def checkpoint(request: pytest.FixtureRequest) -> Path:
    return fixtures.checkpoint(request.param)


@contextmanager
def _open(target: TransformersTfTarget, path: Path, taps: bool = True) -> Iterator[TransformersTfSession]:
    with target.open(Model(str(path), "idefics"), Options(taps=taps)) as session:
        assert isinstance(session, TransformersTfSession)
        yield session


@pytest.fixture(scope="module")
def session(target: TransformersTfTarget, checkpoint: Path) -> Iterator[TransformersTfSession]:
    with _open(target, checkpoint) as opened:
        yield opened


@pytest.fixture(scope="module")
def gold(checkpoint: Path) -> dict[str, Any]:
    with np.load(fixtures.file(f"goldens/idefics/{GOLD[checkpoint.name]}.npz")) as file:
        return {name: file[name] for name in file.files}


@pytest.fixture
def inputs(gold: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("inputs/"): value for name, value in gold.items() if name.startswith("inputs/")}


def _text(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name != "pixel_values"}


# loading -------------------------------------------------------------------------------------------------------------


def test_the_target_says_what_it_is(target: TransformersTfTarget) -> None:
    info = target.info
    assert (info.dtype, info.device, info.families, info.library) == ("float32", "cpu", ("idefics",), "transformers-tf")
    assert info.version == info.software["transformers"]
    assert info.runtime == f"tensorflow eager {info.software['tensorflow']}"


def test_every_stored_tensor_is_in_the_loaded_model_and_nothing_else(
    session: TransformersTfSession, checkpoint: Path
) -> None:
    import tensorflow as tf
    from safetensors.tensorflow import load_file

    def sums(tensors: Any) -> list[tuple[int, float]]:
        wide = [tf.cast(tensor, tf.float64).numpy() for tensor in tensors]
        return sorted((tensor.size, float(np.sort(tensor, axis=None) @ np.arange(tensor.size))) for tensor in wide)

    # Names and layouts differ between the frameworks, what is in a tensor does not.
    assert sums(session.model.weights) == sums(load_file(checkpoint / "model.safetensors").values())


def test_a_missing_tensor_is_named(target: TransformersTfTarget, tmp_path: Path) -> None:
    from safetensors.tensorflow import load_file, save_file

    shutil.copytree(fixtures.checkpoint("idefics-tiny"), tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.gated_cross_attn_layers.1.alpha_dense"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UsageError, match=r"1 missing keys, the first is model\.gated_cross_attn_layers\.1\.alpha_dense"
    ):
        target.open(Model(str(tmp_path), "idefics"), Options())


def test_other_families_and_several_ranks_are_refused(target: TransformersTfTarget, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="family 'mllama' cannot be opened by this target; valid are idefics"):
        target.open(Model(str(tmp_path), "mllama"), Options())
    with pytest.raises(UsageError, match="is no directory"):
        target.open(Model(str(tmp_path / "absent"), "idefics"), Options())
    with pytest.raises(Unsupported, match="tp 2"):
        target.open(Model(str(tmp_path), "idefics"), Options(tp=2))


# phases --------------------------------------------------------------------------------------------------------------


def test_answers_have_the_protocols_of_the_contract(session: TransformersTfSession, inputs: dict[str, Any]) -> None:
    features, step = session.vision(inputs), session.prefill(inputs)
    assert isinstance(features, Features)
    assert isinstance(step, Step)
    assert (features.dtype, step.dtype) == ("float32", "float32")
    assert step.tokens().dtype == np.int64


def test_preprocessing_gives_the_ids_and_pixels_of_the_goldens(
    session: TransformersTfSession, gold: dict[str, Any], inputs: dict[str, Any]
) -> None:
    rows = json.loads(str(gold["meta"]))["rows"]
    images = [tuple(str(fixtures.image(name)) for name in row["images"]) for row in rows]
    made = session.preprocess([Prompt(row["text"], names) for row, names in zip(rows, images, strict=True)])
    assert {name: (value.dtype, value.shape) for name, value in made.items()} == {
        name: (value.dtype, value.shape) for name, value in inputs.items()
    }
    # The mask over images is another one: IDEFICS-FILE-007.
    for name in ("input_ids", "attention_mask", "pixel_values"):
        np.testing.assert_array_equal(made[name], inputs[name], err_msg=name)


def test_the_models_own_call_gives_the_same(session: TransformersTfSession, inputs: dict[str, Any]) -> None:
    import tensorflow as tf

    # Padding on the right, after which the last real position is not the last one.
    flipped = {name: value if name == "pixel_values" else value[:, ::-1] for name, value in inputs.items()}
    for given in (inputs, flipped):
        tensors = {name: tf.constant(value) for name, value in given.items()}
        tensors[MASK] = tf.cast(tensors[MASK], tf.float32)
        whole = session.model(**tensors).logits.numpy()
        step = session.prefill(_text(given), session.vision(given))
        np.testing.assert_allclose(step.logits(all_positions=True), whole, rtol=1e-4, atol=1e-4)
        last = [int(np.flatnonzero(row)[-1]) for row in given["attention_mask"]]
        np.testing.assert_allclose(step.logits(), whole[range(len(last)), last], rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(step.tokens(), step.logits().argmax(-1))


def test_features_have_the_documented_name_and_are_taken_back(
    session: TransformersTfSession, gold: dict[str, Any], inputs: dict[str, Any]
) -> None:
    features = session.vision(inputs)
    ((name, hidden),) = features.arrays().items()
    assert hidden.shape == gold[f"features/{name}"].shape
    whole = session.prefill(inputs).logits()
    np.testing.assert_array_equal(session.prefill(_text(inputs), features).logits(), whole)
    np.testing.assert_array_equal(session.prefill(_text(inputs), features.arrays()).logits(), whole)
    with pytest.raises(UsageError, match="features need image_encoder_embeddings or perceiver_embeddings; there are x"):
        session.prefill(_text(inputs), {"x": hidden})


def test_taps_have_the_names_of_the_goldens_and_lead_to_the_answers(
    session: TransformersTfSession, checkpoint: Path, inputs: dict[str, Any]
) -> None:
    features = session.vision(inputs)
    step = session.prefill(_text(inputs), features)
    with np.load(fixtures.file(f"goldens/idefics/{TAPPED[checkpoint.name]}.npz")) as file:
        names = [name.split("/") for name in file.files]
    for phase, seen in (("vision", features.taps()), ("prefill", step.taps())):
        assert set(seen) - {COUNTER} == {name[2] for name in names if name[:2] == ["taps", phase]}
    np.testing.assert_allclose(session.model.lm_head(step.taps()["text.norm"]), step.logits(True), rtol=1e-5, atol=1e-5)
    hidden = features.arrays()[features.name]
    trunk = session.model.model
    if trunk.config.use_resampler:
        last = trunk.perceiver_resampler.layer_norm(features.taps()["resampler.blocks.1"])
    else:
        last = features.taps()["vision.layers.2"]
    np.testing.assert_allclose(last, hidden.reshape(last.shape), rtol=1e-5, atol=1e-5)
    assert step.taps()[COUNTER].tolist() == [1] * len(trunk.gated_cross_attn_layers)


def test_decoding_gives_what_a_longer_prompt_gives(session: TransformersTfSession, inputs: dict[str, Any]) -> None:
    forced = np.array([[11, 12], [21, 22]])
    step = session.prefill(inputs)
    for token in forced.T:
        step = session.decode(step, token)
    longer = {
        **inputs,
        "input_ids": np.concatenate([inputs["input_ids"], forced], axis=1),
        "attention_mask": np.pad(inputs["attention_mask"], ((0, 0), (0, 2)), constant_values=1),
        MASK: np.pad(inputs[MASK], ((0, 0), (0, 2), (0, 0)), mode="edge"),
    }
    np.testing.assert_allclose(step.logits(), session.prefill(longer).logits(), rtol=1e-3, atol=1e-4)
    assert set(step.taps()[COUNTER].tolist()) == {3}
    with pytest.raises(UsageError, match="after a prefill only"):
        step.logits(all_positions=True)


def test_own_tokens_are_fed_back(session: TransformersTfSession, inputs: dict[str, Any]) -> None:
    first = session.prefill(inputs)
    forced = session.decode(session.prefill(inputs), first.tokens()).logits()
    np.testing.assert_array_equal(session.decode(first).logits(), forced)


def test_a_step_is_decoded_once_and_in_its_own_session(
    session: TransformersTfSession, target: TransformersTfTarget, checkpoint: Path, inputs: dict[str, Any]
) -> None:
    step = session.prefill(inputs)
    with _open(target, checkpoint, taps=False) as other:
        with pytest.raises(UsageError, match="of the same session"):
            other.decode(step)
        assert other.vision(inputs).taps() == {}, "taps were not asked for"
        assert other.prefill(inputs).taps() == {}, "taps were not asked for"
    session.decode(step)
    with pytest.raises(UsageError, match="was decoded before"):
        session.decode(step)


def test_another_resolution_is_asked_for_by_an_input(session: TransformersTfSession) -> None:
    larger = np.zeros((1, 1, 3, 84, 70), np.float32)
    for refused in ({}, {"interpolate_pos_encoding": np.array([0])}):
        with pytest.raises(ValueError, match="interpolate_pos_encoding"):
            session.vision({"pixel_values": larger, **refused})
    asked = session.vision({"pixel_values": larger, "interpolate_pos_encoding": np.array([1])})
    assert asked.taps()["vision.embeddings"].shape[:2] == (1, 1 + 6 * 5)


def test_missing_inputs_are_named(session: TransformersTfSession) -> None:
    ids = np.ones((1, 2), np.int64)
    with pytest.raises(UsageError, match="vision needs pixel_values; the inputs are empty"):
        session.vision({})
    with pytest.raises(UsageError, match="prefill needs input_ids; the inputs are attention_mask"):
        session.prefill({"attention_mask": ids})
    with pytest.raises(UsageError, match="prefill needs image_attention_mask; the inputs are input_ids"):
        session.prefill({"input_ids": ids})


# probes and library --------------------------------------------------------------------------------------------------


def test_probes_take_time_and_name_what_they_do_not_know(target: TransformersTfTarget) -> None:
    assert target.probe("stream", (1 << 16,), "float32") > 0
    assert target.probe("gemm", (64, 64, 64), "bfloat16") > 0
    with pytest.raises(Unsupported, match="probe 'all-reduce'"):
        target.probe("all-reduce", (8,), "float32")
    with pytest.raises(UsageError, match="dtype 'int3' is unknown"):
        target.probe("stream", (8,), "int3")


def test_tensors_of_the_library_are_tensorflows() -> None:
    import tensorflow as tf

    library = TransformersTfLibrary()
    made = library.from_array(np.array([1.5, 2.0], np.float32), "bfloat16")
    assert made.dtype == tf.bfloat16
    back = library.to_array(made)
    assert back is not None
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back, [1.5, 2.0])
    assert library.to_array([1, 2]) is None
    np.testing.assert_array_equal(library.to_array(tf.Variable([3])), [3])
    with pytest.raises(UsageError, match="dtype 'float3' is unknown"):
        library.from_array(np.zeros(1), "float3")


def test_the_library_has_tensorflow_classes_and_configurations_only() -> None:
    library = TransformersTfLibrary()
    assert library.resolve("TFIdeficsModel").__name__ == "TFIdeficsModel"
    assert library.resolve("IdeficsConfig").__name__ == "IdeficsConfig"
    for other in ("IdeficsModel", "IdeficsImageProcessor", "IdeficsProcessor"):
        with pytest.raises(Unsupported, match=f"{other} is no TensorFlow class"):
            library.resolve(other)
    with pytest.raises(AttributeError):
        library.resolve("IdeficsNothing")
