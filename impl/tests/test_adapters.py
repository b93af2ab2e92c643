"""The adapters over transformers against the library itself, and the tools that make goldens against numpy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from vlmqual_adapters import goldens, reference
from vlmqual_adapters.recipes_idefics3 import TINY
from vlmqual_adapters.transformers_idefics3 import Idefics3Session
from vlmqual_adapters.transformers_library import TransformersLibrary
from vlmqual_adapters.transformers_target import TransformersTarget
from vlmqual_contract import distance, fixtures
from vlmqual_contract.errors import Unsupported, UsageError
from vlmqual_contract.target import Capability, Model, Options, Prompt, Session

CHECKPOINT = fixtures.checkpoint(TINY)
MODEL = Model(str(CHECKPOINT), "idefics3")
SHORT = "<|begin_of_text|>User:<image>What is it?<end_of_utterance>\nAssistant:"


def _prompt(image: str) -> Prompt:
    return Prompt(SHORT, (str(fixtures.image(image)),))


def _gold(name: str) -> dict[str, Any]:
    with np.load(fixtures.file(f"goldens/idefics3/{name}.npz")) as file:
        return {key: file[key] for key in file.files}


def _inputs(gold: dict[str, Any]) -> dict[str, Any]:
    return {key.removeprefix("inputs/"): value for key, value in gold.items() if key.startswith("inputs/")}


@pytest.fixture(scope="module")
def target() -> TransformersTarget:
    return TransformersTarget()


@pytest.fixture(scope="module")
def session(target: TransformersTarget) -> Iterator[Idefics3Session]:
    with target.open(MODEL, Options(taps=True)) as opened:
        assert isinstance(opened, Idefics3Session)
        yield opened


# target --------------------------------------------------------------------------------------------------------------


def test_the_target_says_what_it_is(target: TransformersTarget) -> None:
    info = target.info
    assert info.version == transformers.__version__
    assert (info.library, info.processes, info.dtype) == ("transformers", "one", "float32")
    assert set(Capability) - info.capabilities == {Capability.TENSOR_PARALLEL}
    assert info.software["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype 'int8' is unknown; valid are float64"),
        ({"attn": "flash"}, "attn 'flash' is unknown; valid are eager, sdpa"),
        ({"device": "toaster"}, "device 'toaster' cannot be used"),
    ],
)
def test_wrong_options_are_named(options: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TransformersTarget(**options)


def test_more_than_one_rank_is_not_offered(target: TransformersTarget) -> None:
    with pytest.raises(Unsupported, match="tp 2"):
        target.open(MODEL, Options(tp=2))


def test_what_is_no_checkpoint_of_the_family_is_refused(target: TransformersTarget, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no directory"):
        target.open(Model(str(tmp_path / "nowhere"), "idefics3"), Options())
    with pytest.raises(UsageError, match=r"config\.json cannot be read"):
        target.open(Model(str(tmp_path), "idefics3"), Options())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UsageError, match="model_type 'llama'; 'idefics3' was asked for"):
        target.open(Model(str(tmp_path), "idefics3"), Options())
    with pytest.raises(UsageError, match="family 'idefics2'"):
        target.open(Model(str(CHECKPOINT), "idefics2"), Options())
    with pytest.raises(UsageError, match="model_type 'idefics3'; 'mllama' was asked for"):
        target.open(Model(str(CHECKPOINT), "mllama"), Options())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "idefics3"}))
    with pytest.raises(UsageError, match="has no weights"):
        target.open(Model(str(tmp_path), "idefics3"), Options())


def test_a_missing_tensor_is_named(target: TransformersTarget, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copy(CHECKPOINT / "config.json", tmp_path)
    tensors = load_file(CHECKPOINT / "model.safetensors")
    del tensors["model.connector.modality_projection.proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"1 missing keys, the first is model\.connector\.modality_projection"):
        target.open(Model(str(tmp_path), "idefics3"), Options())


def test_a_damaged_weights_file_is_refused(target: TransformersTarget, tmp_path: Path) -> None:
    shutil.copy(CHECKPOINT / "config.json", tmp_path)
    (tmp_path / "model.safetensors").write_bytes((CHECKPOINT / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(UsageError, match="transformers cannot load it"):
        target.open(Model(str(tmp_path), "idefics3"), Options())


def test_phases_give_what_the_library_gives_in_one_call(session: Idefics3Session) -> None:
    inputs = session.preprocess([_prompt("edge-5000x40.png"), _prompt("chelsea.png")])
    assert inputs["pixel_values"].shape == (2, 13, 3, 112, 112)
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    tensors["position_ids"] = (tensors["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode():
        whole = session.model(**tensors).logits
    step = session.prefill(inputs, session.vision(inputs))
    mask = inputs["attention_mask"] != 0
    away = np.abs(step.logits(all_positions=True) - whole.numpy())[mask]
    assert away.max() < 1e-4, f"phases and one call differ by {away.max()}"
    assert np.abs(step.logits() - whole[:, -1].numpy()).max() < 1e-4


def test_injected_features_are_used_and_nothing_else(session: Idefics3Session) -> None:
    inputs = session.preprocess([_prompt("edge-112x112.png")])
    features = session.vision(inputs)
    own = session.prefill(inputs, features).logits()
    assert np.array_equal(session.prefill(inputs, features.arrays()).logits(), own)
    assert np.array_equal(session.prefill(inputs).logits(), own)
    other = {"image_hidden_states": features.arrays()["image_hidden_states"][::-1]}
    assert np.abs(session.prefill(inputs, other).logits() - own).max() > 0.1, "injected features changed nothing"


def test_another_image_gives_other_logits(session: Idefics3Session) -> None:
    first, second = (
        session.prefill(session.preprocess([_prompt(n)])).logits() for n in ("edge-112x112.png", "china.png")
    )
    assert np.linalg.norm(first - second) > 0.2 * np.linalg.norm(first), "the model is blind to its image"


def test_greedy_decoding_follows_the_librarys_own_generation(session: Idefics3Session) -> None:
    inputs = session.preprocess([_prompt("edge-5000x40.png"), _prompt("edge-40x5000.png")])
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    length = inputs["input_ids"].shape[1]
    made = session.model.generate(**tensors, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    step = session.prefill(inputs)
    tokens = [step.tokens()]
    for _ in range(5):
        step = session.decode(step)
        tokens.append(step.tokens())
    assert np.stack(tokens, axis=1).tolist() == made[:, length:].tolist()


def test_forced_tokens_are_fed_instead_of_greedy_ones(session: Idefics3Session) -> None:
    inputs = session.preprocess([_prompt("edge-5000x40.png")])
    greedy = session.prefill(inputs)
    forced = session.prefill(inputs)
    own = greedy.tokens()
    assert np.array_equal(session.decode(greedy).logits(), session.decode(forced, own).logits())
    again = session.decode(session.prefill(inputs), np.array([own[0] + 1]))
    longer = {
        "input_ids": np.append(inputs["input_ids"], [[own[0] + 1]], axis=1),
        "attention_mask": np.append(inputs["attention_mask"], [[1]], axis=1),
    }
    whole = session.prefill({**inputs, **longer})
    assert np.abs(again.logits() - whole.logits()).max() < 1e-4, (
        "a forced token differs from the same token in a prompt"
    )


def test_a_step_is_decoded_once(session: Idefics3Session) -> None:
    step = session.prefill({"input_ids": np.array([[576, 72, 73]])})
    session.decode(step)
    with pytest.raises(UsageError, match="was decoded before"):
        session.decode(step)


def test_phases_name_what_is_missing(session: Idefics3Session) -> None:
    with pytest.raises(UsageError, match="vision needs pixel_values"):
        session.vision({})
    with pytest.raises(UsageError, match="prefill needs input_ids"):
        session.prefill({})
    with pytest.raises(UsageError, match="features need image_hidden_states"):
        session.prefill({"input_ids": np.array([[576]])}, {"states": np.zeros((1, 16, 64))})
    step = session.decode(session.prefill({"input_ids": np.array([[576, 72]])}))
    with pytest.raises(UsageError, match="after a prefill only"):
        step.logits(all_positions=True)


def test_taps_lie_between_embeddings_and_logits(session: Idefics3Session) -> None:
    inputs = session.preprocess([_prompt("edge-5000x40.png")])
    features = session.vision(inputs)
    assert list(features.taps()) == [
        *("vision.embeddings", "vision.layers.0", "vision.layers.1", "vision.layers.2"),
        *("vision.post_layernorm", "connector"),
    ]
    assert np.array_equal(features.taps()["connector"], features.arrays()["image_hidden_states"])
    step = session.prefill(inputs, features)
    taps = step.taps()
    assert list(taps) == ["text.embeddings", *(f"text.layers.{i}" for i in range(4)), "text.norm"]
    at_images = taps["text.embeddings"][inputs["input_ids"] == session.model.config.image_token_id]
    assert np.array_equal(at_images, features.arrays()["image_hidden_states"].reshape(-1, 64))
    head = session.model.lm_head.weight.detach().numpy()
    assert np.abs(taps["text.norm"] @ head.T - step.logits(all_positions=True)).max() < 1e-4


def test_without_taps_nothing_is_kept(target: TransformersTarget) -> None:
    with target.open(MODEL, Options()) as plain:
        step = plain.prefill({"input_ids": np.array([[576, 72, 73]])})
        assert step.taps() == {}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_installed_version_keeps_the_budgets_of_the_goldens(dtype: str, attention: str) -> None:
    def opened() -> Any:
        return TransformersTarget(dtype=dtype, attn=attention).open(MODEL, Options(taps=True))

    with opened() as run:
        _keeps_budgets(run, dtype)


def _keeps_budgets(run: Session, dtype: str) -> None:
    for name in ("batch-left", "batch-right", "masked-pixels", "padding-frames", "text-beside-image", "text-only"):
        gold = _gold(name)
        inputs = _inputs(gold)
        found: dict[str, Any] = {}
        features = None
        if "pixel_values" in inputs:
            seen = run.vision(inputs)
            found["features/image_hidden_states"] = seen.arrays()["image_hidden_states"]
            found |= {f"taps/vision/{key}": value for key, value in seen.taps().items()}
            features = {"image_hidden_states": gold["features/image_hidden_states"]}
        step = run.prefill(inputs, features)
        found["prefill/logits"] = step.logits()
        found["prefill/all_logits"] = step.logits(all_positions=True)
        found |= {f"taps/prefill/{key}": value for key, value in step.taps().items()}
        decoded = []
        for tokens in gold["decode/tokens"]:
            step = run.decode(step, tokens)
            decoded.append(step.logits())
        found["decode/logits"] = np.stack(decoded)
        mask = inputs["attention_mask"]
        for key, value in found.items():
            if key not in gold:
                continue
            by_position = key.startswith("taps/prefill") or key == "prefill/all_logits"
            away = distance.error(value, gold[key], mask if by_position else None)
            budget = 2 * float(gold[f"noise/{dtype}/{key}"])
            assert away <= budget, f"{name}: {key} is {away:.3g} from gold, its budget in {dtype} is {budget:.3g}"


def test_probes_take_time_and_unknown_ones_are_not_offered(target: TransformersTarget) -> None:
    assert target.probe("stream", (1000,), "bfloat16") > 0
    assert target.probe("gemm", (16, 8, 4), "float32") > 0
    with pytest.raises(Unsupported, match="probe 'all-reduce'"):
        target.probe("all-reduce", (8,), "float32")
    with pytest.raises(UsageError, match="dtype 'int3'"):
        target.probe("stream", (8,), "int3")


# library -------------------------------------------------------------------------------------------------------------


def test_the_library_resolves_names_and_turns_tensors_into_arrays() -> None:
    library = TransformersLibrary()
    assert library.version == transformers.__version__
    assert library.families == ("idefics", "idefics3", "mllama")
    assert library.resolve("Idefics3Config") is transformers.Idefics3Config
    with pytest.raises(AttributeError):
        library.resolve("NoSuchClass")
    values = np.array([[1.5, -2.25]], dtype=np.float32)
    tensor = library.from_array(values, "bfloat16")
    assert tensor.dtype == torch.bfloat16
    back = library.to_array(tensor)
    assert back is not None
    assert back.dtype == np.float32
    assert np.array_equal(back, values)
    assert library.from_array(np.array([1, 2])).dtype == torch.int64
    assert library.to_array([1.0]) is None
    with pytest.raises(UsageError, match="dtype 'bfloat17'"):
        library.from_array(values, "bfloat17")


# the maker of goldens ------------------------------------------------------------------------------------------------


def test_the_error_is_the_worst_vector_over_the_typical_length() -> None:
    gold = np.array([[[3.0, 4.0], [0.0, 5.0], [100.0, 0.0]]])
    value = gold + np.array([[[0.3, 0.4], [0.0, 0.0], [50.0, 0.0]]])
    assert distance.error(value, gold, np.array([[1, 1, 0]])) == pytest.approx(0.5 / 5.0)
    with pytest.raises(ValueError, match="cannot be compared"):
        distance.error(value[..., :1], gold)


@pytest.mark.parametrize("order", ["forward", "reversed", "pairwise"])
@pytest.mark.parametrize("count", [2, 3, 8])
def test_sums_in_parts_are_the_same_sums(count: int, order: str) -> None:
    generator = torch.Generator().manual_seed(3)
    x, w, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((5, 30), (7, 30), (7,)))
    image, kernel = torch.randn(2, 3, 4, 4, generator=generator), torch.randn(6, 3, 2, 2, generator=generator)
    with reference.Chunks(count, order, wide=False):
        linear = torch.nn.functional.linear(x, w, b)
        product = torch.matmul(x, w.T)
        convolved = torch.nn.functional.conv2d(image, kernel, torch.ones(6), 2)
    assert np.allclose(linear.numpy(), x.numpy() @ w.numpy().T + b.numpy(), atol=1e-12)
    assert np.allclose(product.numpy(), x.numpy() @ w.numpy().T, atol=1e-12)
    plain = torch.nn.functional.conv2d(image, kernel, torch.ones(6), 2)
    assert torch.allclose(convolved, plain, atol=1e-5)


def test_parts_are_rounded_one_by_one_unless_the_sum_is_wide() -> None:
    x = torch.tensor([[1.0, 2.0**-9]], dtype=torch.bfloat16)
    w = torch.tensor([[1.0, 1.0], [1.0, 3.0]], dtype=torch.bfloat16)
    with reference.Chunks(2, "forward", wide=True):
        wide = torch.nn.functional.linear(x, w)
    assert wide.tolist() == [[1.0, 1.0078125]], "1 + 2^-9 and 1 + 3 * 2^-9, each rounded once to 8 bits"
    seen: list[torch.dtype] = []
    product = reference.Chunks(2, "forward", wide=False)
    product._sum(x, w, -1, -1, lambda a, b: seen.append(a.dtype) or torch.nn.functional.linear(a, b))
    assert seen == [torch.bfloat16, torch.bfloat16]


def test_the_lift_makes_float64_of_every_request_for_float32() -> None:
    x = torch.ones(3, dtype=torch.float64)
    with reference.Lift():
        assert x.to(torch.float32).dtype == torch.float64
        assert torch.arange(3).float().dtype == torch.float64
        assert torch.nn.functional.softmax(x, dim=-1, dtype=torch.float32).dtype == torch.float64
    with reference.Lift(softmax_only=True):
        assert torch.nn.functional.softmax(x, dim=-1, dtype=torch.float32).dtype == torch.float64
        assert x.to(torch.float32).dtype == torch.float32


def test_the_guard_stops_at_the_first_float32_result() -> None:
    x = torch.ones(3, dtype=torch.float64)
    with reference.Guard() as guard:
        assert (x * 2).dtype == torch.float64
        with pytest.raises(TypeError, match=r"float32 in a run that has to be float64"):
            x.to(torch.float32)
        guard.bucketing = True
        torch.arange(0, 1, 0.25)
        with pytest.raises(TypeError, match="float32"):
            x.to(torch.float32)
    assert guard.lesser == 1


def test_the_guard_catches_a_reference_whose_islands_are_not_lifted() -> None:
    plain = reference.Reference(CHECKPOINT, "idefics3").session("float64", "eager")
    with reference.Guard(), pytest.raises(TypeError, match="float32"):
        plain.prefill({"input_ids": np.array([[576, 72, 73]])})


def test_golden_files_depend_on_their_arrays_alone(tmp_path: Path) -> None:
    arrays = {"b/x": np.arange(3.0), "a": np.array("text")}
    packed = goldens.pack(arrays)
    assert packed == goldens.pack(dict(reversed(arrays.items())))
    path = tmp_path / "a.npz"
    path.write_bytes(packed)
    assert list(goldens.differences(arrays, path)) == []
    changed = {**arrays, "b/x": np.arange(3.0) + 1e-6}
    assert [line.split(":")[0] for line in goldens.differences(changed, path)] == ["b/x"]


def test_gold_is_kept_to_thirty_two_bits() -> None:
    values = np.random.Generator(np.random.PCG64(1)).normal(size=1000)
    kept = goldens._trimmed(values)
    assert np.abs(kept / values - 1).max() <= 2.0**-32
    assert (kept.view(np.int64) & 0xFFFFF == 0).all()
