"""The adapter of Idefics over transformers against the library itself and against the goldens."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vlmqual_adapters import reference
from vlmqual_adapters.cases_idefics import CASES, chat
from vlmqual_adapters.recipes_idefics import RESAMPLER_TINY, TINY
from vlmqual_adapters.transformers_idefics import IdeficsSession, items
from vlmqual_adapters.transformers_target import TransformersTarget
from vlmqual_contract import distance, fixtures
from vlmqual_contract.errors import UsageError
from vlmqual_contract.target import Model, Options, Prompt

MASK = "image_attention_mask"
COUNTER = "counters.cross_attention_kv"
PIXELS = ("pixel_values", "interpolate_pos_encoding")


def _model(checkpoint: str) -> Model:
    return Model(str(fixtures.checkpoint(checkpoint)), "idefics")


def _prompt(text: str, *images: str) -> Prompt:
    return Prompt(chat(text), tuple(str(fixtures.image(image)) for image in images))


def _gold(name: str) -> dict[str, Any]:
    with np.load(fixtures.file(f"goldens/idefics/{name}.npz")) as file:
        return {key: file[key] for key in file.files}


def _inputs(gold: dict[str, Any]) -> dict[str, Any]:
    return {key.removeprefix("inputs/"): value for key, value in gold.items() if key.startswith("inputs/")}


@pytest.fixture(scope="module")
def target() -> TransformersTarget:
    return TransformersTarget()


@pytest.fixture(scope="module", params=[TINY, RESAMPLER_TINY])
def session(target: TransformersTarget, request: pytest.FixtureRequest) -> Iterator[IdeficsSession]:
    with target.open(_model(request.param), Options(taps=True)) as opened:
        assert isinstance(opened, IdeficsSession)
        yield opened


@pytest.fixture(scope="module")
def inputs() -> Any:
    """Two images in one row and one in the other, which is padded on the left."""
    return _inputs(_gold("batch-left"))


# prompts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "images", "listed"),
    [
        ("a<image>b", ("1",), ["a", "1", "b"]),
        ("<image><image>b", ("1", "2"), ["1", "2", "b"]),
        (" <image> ", ("1",), [" ", "1", " "]),
        ("a", (), ["a"]),
    ],
)
def test_a_text_with_markers_is_a_list_of_texts_and_images(text: str, images: tuple[str, ...], listed: Any) -> None:
    assert items(Prompt(text, images), images) == listed


def test_markers_and_images_have_to_be_equally_many() -> None:
    with pytest.raises(UsageError, match="the prompt has 2 markers <image> and 1 images"):
        items(Prompt("<image><image>", ("1",)), ("1",))


# opening -------------------------------------------------------------------------------------------------------------


def test_idefics_is_offered(target: TransformersTarget) -> None:
    assert "idefics" in target.info.families


def test_a_checkpoint_of_another_family_is_refused(target: TransformersTarget) -> None:
    with pytest.raises(UsageError, match="model_type 'idefics3'; 'idefics' was asked for"):
        target.open(_model("idefics3-tiny"), Options())
    with pytest.raises(UsageError, match="has no weights"):
        target.open(_model("idefics-9b-processor"), Options())


def test_a_missing_tensor_is_named(target: TransformersTarget, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copy(fixtures.checkpoint(TINY) / "config.json", tmp_path)
    tensors = load_file(fixtures.checkpoint(TINY) / "model.safetensors")
    del tensors["model.gated_cross_attn_layers.1.alpha_dense"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UsageError, match=r"1 missing keys, the first is model\.gated_cross_attn_layers\.1\.alpha_dense"
    ):
        target.open(Model(str(tmp_path), "idefics"), Options())


def test_every_stored_tensor_is_in_the_loaded_model_and_nothing_else(session: IdeficsSession) -> None:
    from safetensors.torch import load_file

    stored = load_file(Path(session.model.config._name_or_path) / "model.safetensors")
    loaded = session.model.state_dict()
    assert set(loaded) == set(stored)
    for name, value in stored.items():
        assert torch.equal(loaded[name], value.float()), f"{name} was loaded with other values"


# phases --------------------------------------------------------------------------------------------------------------


def test_preprocessing_gives_the_pixels_of_the_goldens(session: IdeficsSession) -> None:
    # Ids depend on the version: 5.x makes its Llama tokenizer anew, without the blank before every piece of text.
    import transformers

    for case in (c for c in CASES if c.change is None and c.side == "left"):
        prompts = [Prompt(t, tuple(str(fixtures.image(name)) for name in names)) for t, names in case.rows]
        made, wanted = session.preprocess(prompts), _inputs(_gold(case.name))
        assert set(made) == set(wanted)
        same = wanted if transformers.__version__ == "4.46.3" else ("pixel_values",)
        for name in same:
            assert np.array_equal(made[name], wanted[name]), f"{name} of {case.name} differs from the golden's"


def test_phases_give_what_the_library_gives_in_one_call(session: IdeficsSession, inputs: Any) -> None:
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    with torch.inference_mode():
        whole = session.model(**tensors).logits
    step = session.prefill(inputs, session.vision(inputs))
    mask = inputs["attention_mask"] != 0
    away = np.abs(step.logits(all_positions=True) - whole.numpy())[mask]
    assert away.max() < 1e-4, f"phases and one call differ by {away.max()}"


def test_injected_features_are_used_and_nothing_else(session: IdeficsSession, inputs: Any) -> None:
    features = session.vision(inputs)
    own = session.prefill(inputs, features).logits()
    text = {name: value for name, value in inputs.items() if name not in PIXELS}
    assert np.array_equal(session.prefill(text, features.arrays()).logits(), own)
    other = {name: value[:, ::-1].copy() for name, value in features.arrays().items()}
    assert np.abs(session.prefill(text, other).logits() - own).max() > 0.1


def test_steps_give_what_the_library_gives_without_a_cache(session: IdeficsSession, inputs: Any) -> None:
    step = session.prefill(inputs)
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    for _ in range(3):
        tokens = step.tokens()
        step = session.decode(step)
        new = torch.from_numpy(tokens)[:, None]
        tensors["input_ids"] = torch.cat([tensors["input_ids"], new], dim=1)
        tensors["attention_mask"] = torch.cat([tensors["attention_mask"], torch.ones_like(new)], dim=1)
        tensors[MASK] = torch.cat([tensors[MASK], tensors[MASK][:, -1:]], dim=1)
        with torch.inference_mode():
            whole = session.model(**tensors, use_cache=False).logits[:, -1]
        assert np.abs(step.logits() - whole.numpy()).max() < 1e-4


def test_bad_inputs_are_refused_by_name(session: IdeficsSession, inputs: Any) -> None:
    with pytest.raises(UsageError, match="vision needs pixel_values"):
        session.vision({"input_ids": inputs["input_ids"]})
    with pytest.raises(UsageError, match=f"prefill needs {MASK}"):
        session.prefill({name: value for name, value in inputs.items() if name != MASK})
    with pytest.raises(UsageError, match=f"features need {session.features_name}"):
        session.prefill(inputs, {"states": np.zeros((2, 2, 17, 32))})


# taps ----------------------------------------------------------------------------------------------------------------


def test_taps_of_the_image_side_are_by_image(session: IdeficsSession, inputs: Any) -> None:
    features = session.vision(inputs)
    taps = features.taps()
    names = ["vision.embeddings", *(f"vision.layers.{index}" for index in range(3))]
    resampled = session.model.config.use_resampler
    blocks = [f"resampler.blocks.{index}" for index in range(2)] if resampled else []
    assert sorted(taps) == sorted(names + blocks)
    for name, value in taps.items():
        assert value.shape == (4, 6 if name in blocks else 17, 32), name
    last = torch.from_numpy(taps["resampler.blocks.1" if resampled else "vision.layers.2"])
    with torch.inference_mode():
        end = session.model.model.perceiver_resampler.layer_norm(last) if resampled else last
    assert np.abs(end.numpy() - features.arrays()[session.features_name].reshape(end.shape)).max() < 1e-5


def test_taps_of_the_text_lie_between_embeddings_and_logits(session: IdeficsSession, inputs: Any) -> None:
    step = session.prefill(inputs)
    taps = step.taps()
    config = session.model.config
    layers = {f"text.layers.{index}" for index in range(config.num_hidden_layers)}
    blocks = {f"text.cross_layers.{i}" for i in range(0, config.num_hidden_layers, config.cross_layer_interval)}
    assert set(taps) == {"text.embeddings", "text.norm", COUNTER} | layers | blocks
    head = session.model.lm_head
    weight = torch.cat([head.weight, head.additional_fc.weight]).detach().numpy()
    assert np.abs(taps["text.norm"] @ weight.T - step.logits(all_positions=True)).max() < 1e-4


def test_the_library_computes_keys_of_images_at_every_step(session: IdeficsSession, inputs: Any) -> None:
    step = session.prefill(inputs)
    for count in (1, 2, 3):
        assert set(step.taps()[COUNTER].tolist()) == {count}
        step = session.decode(step)
    assert set(session.prefill(inputs).taps()[COUNTER].tolist()) == {1}


def test_without_taps_nothing_is_kept(target: TransformersTarget, inputs: Any) -> None:
    with target.open(_model(RESAMPLER_TINY), Options()) as plain:
        features = plain.vision(inputs)
        assert features.taps() == {}
        assert plain.prefill(inputs, features).taps() == {}


# budgets -------------------------------------------------------------------------------------------------------------


def _errors(run: Any, name: str, dtype: str) -> Iterator[tuple[str, float, float]]:
    """Name, error and budget of everything that a golden file judges."""
    gold = _gold(name)
    inputs = _inputs(gold)
    seen = run.vision(inputs)
    found = {f"taps/vision/{key}": value for key, value in seen.taps().items()}
    found |= {f"features/{key}": value for key, value in seen.arrays().items()}
    step = run.prefill(inputs, {key: gold[f"features/{key}"] for key in seen.arrays()})
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
def test_the_installed_version_meets_the_goldens(dtype: str, attention: str) -> None:
    target = TransformersTarget(dtype=dtype, attn=attention)
    for checkpoint, names in (
        (TINY, ("hand-masks", "high-resolution")),
        (RESAMPLER_TINY, ("resampler-photo",)),
    ):
        with target.open(_model(checkpoint), Options(taps=True)) as run:
            for name in names:
                judged = list(_errors(run, name, dtype))
                assert len(judged) >= 3
                beyond = [key for key, away, budget in judged if away > budget]
                assert not beyond, f"{name} in {dtype}, {attention}: beyond their budgets are {beyond}"


# the reference -------------------------------------------------------------------------------------------------------


def test_the_guard_of_gold_tolerates_nothing() -> None:
    # Gold itself needs the documented version; as shipped, every version has islands of float32.
    plain = reference.Reference(fixtures.checkpoint(TINY), "idefics").session("float64", "sdpa")
    with reference.Guard() as guard, pytest.raises(TypeError, match="float32"):
        plain.prefill(_inputs(_gold("photo")))
    assert guard.lesser == 0


@pytest.mark.parametrize("causal", [False, True])
def test_attention_in_steps_is_fused_attention(causal: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    query, key, value = (torch.randn(2, 3, 7, 4, dtype=torch.float64, generator=generator) for _ in range(3))
    mask = None if causal else torch.randn(2, 1, 7, 7, dtype=torch.float64, generator=generator)
    attend = torch.nn.functional.scaled_dot_product_attention
    fused = attend(query, key, value, attn_mask=mask, is_causal=causal)
    with reference.Unfused():
        steps = attend(query, key, value, attn_mask=mask, is_causal=causal)
    assert not torch.equal(steps, fused), "the mode has to compute it in another way"
    assert (steps - fused).abs().max() < 1e-14
