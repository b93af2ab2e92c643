"""The adapter of Mllama over transformers against the library itself and against the goldens."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vlmqual_adapters import reference
from vlmqual_adapters.cases_mllama import CASES, PIXELS, chat
from vlmqual_adapters.recipes_mllama import TINY
from vlmqual_adapters.transformers_mllama import MllamaSession
from vlmqual_adapters.transformers_target import TransformersTarget
from vlmqual_contract import distance, fixtures
from vlmqual_contract.errors import UsageError
from vlmqual_contract.target import Model, Options, Prompt

CHECKPOINT = fixtures.checkpoint(TINY)
MODEL = Model(str(CHECKPOINT), "mllama")
STATES, MASK = "cross_attention_states", "cross_attention_mask"
COUNTER = "counters.cross_attention_kv"


def _prompt(text: str, *images: str) -> Prompt:
    return Prompt(chat(text), tuple(str(fixtures.image(image)) for image in images))


def _gold(name: str) -> dict[str, Any]:
    with np.load(fixtures.file(f"goldens/mllama/{name}.npz")) as file:
        return {key: file[key] for key in file.files}


def _inputs(gold: dict[str, Any]) -> dict[str, Any]:
    return {key.removeprefix("inputs/"): value for key, value in gold.items() if key.startswith("inputs/")}


@pytest.fixture(scope="module")
def target() -> TransformersTarget:
    return TransformersTarget()


@pytest.fixture(scope="module")
def session(target: TransformersTarget) -> Iterator[MllamaSession]:
    with target.open(MODEL, Options(taps=True)) as opened:
        assert isinstance(opened, MllamaSession)
        yield opened


@pytest.fixture(scope="module")
def inputs(session: MllamaSession) -> Any:
    """Two images in one row and one in the other, which is padded on the left."""
    return session.preprocess(
        [_prompt("<|image|>Compare it with<|image|>.", "text.png", "edge-3x50.png"), _prompt("<|image|>?", "china.png")]
    )


# opening -------------------------------------------------------------------------------------------------------------


def test_mllama_is_offered(target: TransformersTarget) -> None:
    assert "mllama" in target.info.families


def test_a_checkpoint_of_another_family_is_refused(target: TransformersTarget) -> None:
    with pytest.raises(UsageError, match="model_type 'idefics3'; 'mllama' was asked for"):
        target.open(Model(str(fixtures.checkpoint("idefics3-tiny")), "mllama"), Options())
    with pytest.raises(UsageError, match="has no weights"):
        target.open(Model(str(fixtures.checkpoint("mllama-11b-processor")), "mllama"), Options())


def test_a_missing_tensor_is_named(target: TransformersTarget, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copy(CHECKPOINT / "config.json", tmp_path)
    tensors = load_file(CHECKPOINT / "model.safetensors")
    del tensors["multi_modal_projector.bias"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"1 missing keys, the first is (model\.)?multi_modal_projector\.bias"):
        target.open(Model(str(tmp_path), "mllama"), Options())


def test_every_stored_tensor_is_in_the_loaded_model_and_nothing_else(session: MllamaSession) -> None:
    from safetensors.torch import load_file

    stored = load_file(CHECKPOINT / "model.safetensors")
    loaded = session.model.state_dict()
    assert len(loaded) == len(stored)
    for name, value in stored.items():
        # 5.x has the parts in a trunk called model, and the head beside it.
        plain = name.replace("language_model.model.", "language_model.")
        renamed = "lm_head.weight" if name.endswith("lm_head.weight") else f"model.{plain}"
        found = loaded[name] if name in loaded else loaded[renamed]
        assert torch.equal(found, value.float()), f"{name} was loaded with other values"


def test_both_spellings_of_the_number_of_heads_are_read(session: MllamaSession) -> None:
    tower = session.model.model.vision_model if hasattr(session.model, "model") else session.model.vision_model
    for encoder in (tower.transformer, tower.global_transformer):
        assert {layer.self_attn.num_heads for layer in encoder.layers} == {4}


# phases --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.change is None and c.side == "left"], ids=lambda case: case.name
)
def test_preprocessing_gives_the_tensors_of_the_goldens(session: MllamaSession, case: Any) -> None:
    # Of text-beside-image too, whose tensors were put together without the processor (MLLAMA-PROC-020).
    made = session.preprocess([Prompt(t, tuple(str(fixtures.image(name)) for name in names)) for t, names in case.rows])
    wanted = _inputs(_gold(case.name))
    assert set(made) == set(wanted)
    for name, value in wanted.items():
        assert np.array_equal(made[name], value), f"{name} differs from the golden's"


def test_phases_give_what_the_library_gives_in_one_call(session: MllamaSession, inputs: Any) -> None:
    assert inputs["pixel_values"].shape == (2, 2, 4, 3, 56, 56)
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    tensors["position_ids"] = (tensors["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode():
        whole = session.model(**tensors).logits
    step = session.prefill(inputs, session.vision(inputs))
    mask = inputs["attention_mask"] != 0
    away = np.abs(step.logits(all_positions=True) - whole.numpy())[mask]
    assert away.max() < 1e-4, f"phases and one call differ by {away.max()}"
    assert np.abs(step.logits() - whole[:, -1].numpy()).max() < 1e-4


def test_injected_features_are_used_and_nothing_else(session: MllamaSession, inputs: Any) -> None:
    features = session.vision(inputs)
    assert features.arrays()[STATES].shape == (2, 2 * 4 * 17, 64)
    own = session.prefill(inputs, features).logits()
    text = {name: value for name, value in inputs.items() if name not in PIXELS}
    assert np.array_equal(session.prefill(text, features.arrays()).logits(), own)
    assert np.array_equal(session.prefill(inputs).logits(), own)
    other = {STATES: -features.arrays()[STATES]}
    assert np.linalg.norm(session.prefill(text, other).logits() - own) > 0.1 * np.linalg.norm(own), (
        "the model is blind to its features"
    )


def test_another_image_gives_other_logits(session: MllamaSession) -> None:
    first, second = (
        session.prefill(session.preprocess([_prompt("<|image|>What is it?", image)])).logits()
        for image in ("edge-112x112.png", "china.png")
    )
    assert np.linalg.norm(first - second) > 0.2 * np.linalg.norm(first), "the model is blind to its image"


def test_greedy_decoding_follows_the_librarys_own_generation(session: MllamaSession, inputs: Any) -> None:
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    length = inputs["input_ids"].shape[1]
    made = session.model.generate(**tensors, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    step = session.prefill(inputs)
    tokens = [step.tokens()]
    for _ in range(5):
        step = session.decode(step)
        tokens.append(step.tokens())
    assert np.stack(tokens, axis=1).tolist() == made[:, length:].tolist()


def test_a_forced_token_sees_what_the_last_token_of_the_prompt_sees(session: MllamaSession, inputs: Any) -> None:
    token = np.array([70, 71])
    step = session.decode(session.prefill(inputs), token)
    longer = {
        "input_ids": np.concatenate([inputs["input_ids"], token[:, None]], axis=1),
        "attention_mask": np.append(inputs["attention_mask"], [[1], [1]], axis=1),
        MASK: np.concatenate([inputs[MASK], inputs[MASK][:, -1:]], axis=1),
    }
    whole = session.prefill({**inputs, **longer}).logits()
    assert np.abs(step.logits() - whole).max() < 1e-4, "a forced token differs from the same token in a prompt"
    hidden = {**inputs, MASK: inputs[MASK].copy()}
    hidden[MASK][:, -1] = 0
    other = session.decode(session.prefill(hidden), token).logits()
    assert np.abs(other - whole).max() > 0.1, "the mask's last row does not matter for later tokens"


def test_padding_on_the_right_gives_the_last_real_position(session: MllamaSession) -> None:
    alone = session.preprocess([_prompt("<|image|>?", "china.png")])
    pad = 3
    right = {
        "input_ids": np.pad(alone["input_ids"], ((0, 0), (0, pad))),
        "attention_mask": np.pad(alone["attention_mask"], ((0, 0), (0, pad))),
        MASK: np.pad(alone[MASK], ((0, 0), (0, pad), (0, 0), (0, 0)), mode="edge"),
    }
    first, second = session.prefill(alone), session.prefill({**alone, **right})
    assert np.abs(first.logits() - second.logits()).max() < 1e-4
    first, second = session.decode(first), session.decode(second, first.tokens())
    assert np.abs(first.logits() - second.logits()).max() < 1e-4


def test_phases_name_what_is_missing(session: MllamaSession) -> None:
    with pytest.raises(UsageError, match="vision needs pixel_values"):
        session.vision({"aspect_ratio_ids": np.ones((1, 1), np.int64)})
    with pytest.raises(UsageError, match="prefill needs input_ids"):
        session.prefill({})
    with pytest.raises(UsageError, match="features need cross_attention_states"):
        session.prefill({"input_ids": np.array([[576]])}, {"states": np.zeros((1, 68, 64))})
    step = session.prefill({"input_ids": np.array([[576, 72]])})
    session.decode(step)
    with pytest.raises(UsageError, match="was decoded before"):
        session.decode(step)


# taps ----------------------------------------------------------------------------------------------------------------


def test_taps_of_the_tower_are_by_image_and_tile_without_padding(session: MllamaSession, inputs: Any) -> None:
    features = session.vision(inputs)
    taps = features.taps()
    assert list(taps) == [
        "vision.embeddings",
        *(f"vision.layers.{index}" for index in range(5)),
        "vision.layernorm_post",
        *(f"vision.global_layers.{index}" for index in range(2)),
        "vision.intermediate_states",
        "connector",
    ]
    for name, value in taps.items():
        width = {"vision.intermediate_states": 144, "connector": 64}.get(name, 48)
        assert value.shape == ((2, 136, 64) if name == "connector" else (4, 4, 17, width)), name
    assert np.array_equal(taps["connector"], features.arrays()[STATES])


def test_intermediate_states_are_whole_states_of_layers(session: MllamaSession, inputs: Any) -> None:
    # Which one an index means differs between versions (MLLAMA-TOWER-011); the interleaving does not.
    taps = session.vision(inputs).taps()
    states = [taps[f"vision.layers.{index}"] for index in range(5)]
    found = []
    for place in range(3):
        part = taps["vision.intermediate_states"][..., place::3]
        found.append([index for index, state in enumerate(states) if np.array_equal(state, part)])
    assert found in ([[0], [1], [3]], [[1], [2], [4]]), f"kept states are those that leave layers {found}"


def test_taps_of_the_text_lie_between_embeddings_and_logits(session: MllamaSession, inputs: Any) -> None:
    step = session.prefill(inputs)
    taps = step.taps()
    names = [name for name in taps if name != COUNTER]
    assert names == ["text.embeddings", *(f"text.layers.{i}" for i in range(6)), "text.norm"]
    head = session.model.lm_head.weight if hasattr(session.model, "lm_head") else session.model.language_model.lm_head
    weight = getattr(head, "weight", head).detach().numpy()
    assert np.abs(taps["text.norm"] @ weight.T - step.logits(all_positions=True)).max() < 1e-4


def test_keys_and_values_of_images_are_counted_from_the_prefill_on(session: MllamaSession, inputs: Any) -> None:
    step = session.prefill(inputs)
    for _ in range(3):
        assert step.taps()[COUNTER].tolist() == [1, 1]
        step = session.decode(step)
    assert session.prefill(inputs).taps()[COUNTER].tolist() == [1, 1]


def test_without_images_the_crossing_layers_are_skipped(session: MllamaSession) -> None:
    step = session.prefill({"input_ids": np.array([[576, 72, 73]])})
    layers = [f"text.layers.{index}" for index in (0, 2, 3, 5)]
    assert list(step.taps()) == ["text.embeddings", *layers, "text.norm"]
    assert list(session.decode(step).taps()) == ["text.embeddings", *layers, "text.norm"]


def test_without_taps_nothing_is_kept(target: TransformersTarget, inputs: Any) -> None:
    with target.open(MODEL, Options()) as plain:
        features = plain.vision(inputs)
        assert features.taps() == {}
        assert plain.prefill(inputs, features).taps() == {}


# budgets -------------------------------------------------------------------------------------------------------------


def _errors(run: Any, name: str, dtype: str) -> Iterator[tuple[str, float, float]]:
    """Name, error and budget of everything that a golden file judges, in the order of computation."""
    gold = _gold(name)
    inputs = _inputs(gold)
    found: dict[str, Any] = {}
    features = None
    if "pixel_values" in inputs:
        seen = run.vision(inputs)
        found |= {f"taps/vision/{key}": value for key, value in seen.taps().items()}
        found[f"features/{STATES}"] = seen.arrays()[STATES]
        features = {STATES: gold[f"features/{STATES}"]}
    step = run.prefill(inputs, features)
    found |= {f"taps/prefill/{key}": value for key, value in step.taps().items()}
    found |= {"prefill/all_logits": step.logits(all_positions=True), "prefill/logits": step.logits()}
    decoded = []
    for tokens in gold["decode/tokens"]:
        step = run.decode(step, tokens)
        decoded.append(step.logits())
    found["decode/logits"] = np.stack(decoded)
    for key, value in found.items():
        if key in gold:
            by_position = key.startswith("taps/prefill") or key == "prefill/all_logits"
            away = distance.error(value, gold[key], inputs["attention_mask"] if by_position else None)
            yield key, away, 2 * float(gold[f"noise/{dtype}/{key}"])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_installed_version_leaves_the_goldens_at_the_kept_states_alone(dtype: str, attention: str) -> None:
    import transformers

    documented = transformers.__version__ == "4.45.2"
    with TransformersTarget(dtype=dtype, attn=attention).open(MODEL, Options(taps=True)) as run:
        for name in ("photo-four-tiles", "text-before-image", "batch-right", "text-only"):
            beyond = [key for key, away, budget in _errors(run, name, dtype) if away > budget]
            stored = set(_gold(name))
            away = ["taps/vision/vision.intermediate_states", f"features/{STATES}"]
            wanted = [] if documented else [key for key in away if key in stored]
            assert beyond == wanted, f"{name} in {dtype}, {attention}: beyond their budgets are {beyond}"


# the reference -------------------------------------------------------------------------------------------------------


def test_the_guard_of_gold_tolerates_nothing_in_mllama() -> None:
    # Gold itself needs the documented version; as shipped, every version has islands of float32.
    plain = reference.Reference(CHECKPOINT, "mllama").session("float64", "eager")
    with reference.Guard() as guard, pytest.raises(TypeError, match="float32"):
        plain.prefill({"input_ids": np.array([[576, 72, 73]])})
    assert guard.lesser == 0
