"""The documented Mllama classes: files in both directions, parts of a checkpoint, caches, generation, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_mllama_model import IMAGE, TEXT, VISION, batch, positions
from torch import Tensor

from vlmqual_impl.api.auto import AutoConfig, AutoModelForVision2Seq
from vlmqual_impl.api.mllama import MllamaForConditionalGeneration
from vlmqual_impl.api.mllama_text import MllamaForCausalLM, MllamaTextModel
from vlmqual_impl.api.mllama_vision import MllamaVisionModel
from vlmqual_impl.api.outputs import LabelError
from vlmqual_impl.checkpoints import CheckpointError
from vlmqual_impl.configs import Idefics3Config, MllamaConfig, MllamaTextConfig, MllamaVisionConfig

NEWER = int(transformers.__version__.split(".")[0]) >= 5


@pytest.fixture(scope="module")
def model() -> MllamaForConditionalGeneration:
    torch.manual_seed(3)
    made = MllamaForConditionalGeneration(MllamaConfig(VISION, TEXT, image_token_index=IMAGE))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
            if "gate" in name.rpartition(".")[2]:
                parameter.fill_(0.7)
    return made.double().eval().requires_grad_(False)


def inputs() -> dict[str, Tensor]:
    """Rows without padding, so that positions are counted from nought."""
    return {name: value[:2] for name, value in batch().items() if name != "attention_mask"}


def theirs(directory: Path) -> Any:
    """transformers' model of a checkpoint; from 5.0 on its intermediate indices are lowered by one."""
    config = transformers.MllamaConfig.from_pretrained(directory)
    indices = config.vision_config.intermediate_layers_indices
    config.vision_config.intermediate_layers_indices = [index - NEWER for index in indices]
    kind = {"dtype" if NEWER else "torch_dtype": torch.float64}
    return transformers.MllamaForConditionalGeneration.from_pretrained(
        directory, config=config, attn_implementation="sdpa", **kind
    ).eval()


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("size", ["5GB", "40KB"])
def test_what_is_saved_here_loads_in_transformers(
    model: MllamaForConditionalGeneration, tmp_path: Path, size: str
) -> None:
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert (len(list(tmp_path.glob("*.safetensors"))) == 1) is (size == "5GB")
    with torch.no_grad():
        found = theirs(tmp_path)(**inputs()).logits.double()
    # their norms and rotary tables stay in float32
    assert relative(found, model(**inputs()).logits) < 3e-6


@pytest.mark.parametrize("size", ["5GB", "40KB"])
def test_what_transformers_saves_loads_here(model: MllamaForConditionalGeneration, tmp_path: Path, size: str) -> None:
    model.save_pretrained(tmp_path / "ours")
    other = theirs(tmp_path / "ours")
    other.config.vision_config.intermediate_layers_indices = VISION["intermediate_layers_indices"]
    other.save_pretrained(tmp_path / "theirs", max_shard_size=size)
    loaded = AutoModelForVision2Seq.from_pretrained(tmp_path / "theirs", dtype=torch.float64)
    assert isinstance(loaded, MllamaForConditionalGeneration)
    assert AutoConfig.from_pretrained(tmp_path / "theirs").model_type == "mllama"
    assert torch.equal(loaded(**inputs()).logits, model(**inputs()).logits), "the same weights give the same numbers"


def test_parts_load_from_a_whole_checkpoint_and_from_their_own(
    model: MllamaForConditionalGeneration, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "whole")
    ids = inputs()["input_ids"].clamp(max=63)
    pixels = [inputs()[name] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")]
    language = MllamaForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float64)
    assert torch.equal(language(ids).logits, model(ids).logits)
    text = MllamaTextModel.from_pretrained(tmp_path / "whole", dtype=torch.float64)
    state = text(ids).last_hidden_state
    assert torch.equal(language.lm_head(state), model(ids).logits)
    vision = MllamaVisionModel.from_pretrained(tmp_path / "whole", dtype=torch.float64)
    features = vision(*pixels).last_hidden_state
    assert torch.equal(features, model.vision_model(*pixels).last_hidden_state)
    for part, call in (
        (language, lambda m: m(ids).logits),
        (text, lambda m: m(ids)[0]),
        (vision, lambda m: m(*pixels)[0]),
    ):
        part.save_pretrained(tmp_path / type(part).__name__)
        again = type(part).from_pretrained(tmp_path / type(part).__name__, dtype=torch.float64)
        assert torch.equal(call(again), call(part)), f"{type(part).__name__} does not come back"
    only = MllamaTextModel.from_pretrained(tmp_path / "MllamaForCausalLM", dtype=torch.float64)
    assert torch.equal(only(ids)[0], state), "a text model out of a language model's checkpoint"
    with pytest.raises(CheckpointError, match="missing"):
        MllamaForConditionalGeneration.from_pretrained(
            tmp_path / "MllamaForCausalLM", config=model.config, dtype=torch.float64
        )


def test_a_cache_is_continued_and_grows(model: MllamaForConditionalGeneration) -> None:
    given = inputs()
    ids, seen = given.pop("input_ids"), given.pop("cross_attention_mask")
    whole = model(input_ids=ids, cross_attention_mask=seen, **given).logits
    first = model(input_ids=ids[:, :11], cross_attention_mask=seen[:, :11], **given)
    cache = first.past_key_values
    parts = [first.logits]
    for index in range(11, 14):  # the mask of everything so far, or only of the new token
        mask = seen[:, : index + 1] if index % 2 else seen[:, index : index + 1]
        step = model(input_ids=ids[:, index : index + 1], cross_attention_mask=mask, past_key_values=cache)
        assert step.past_key_values is cache
        parts.append(step.logits)
    assert relative(torch.cat(parts, dim=1), whole) < 1e-12
    assert cache.cross.computed == {1: 1, 3: 1}, "keys and values of the images were computed again"
    long = torch.randint(3, 60, (2, 200), generator=torch.Generator().manual_seed(2))
    model(input_ids=long, cross_attention_mask=seen[:, -1:].expand(-1, 200, -1, -1), past_key_values=cache)
    assert cache.length == 214, "the cache did not grow"


def test_images_of_a_later_call_stand_behind_the_earlier_ones(model: MllamaForConditionalGeneration) -> None:
    given = inputs()
    ids, seen = given["input_ids"][:1], given["cross_attention_mask"][:1]
    both = {name: given[name][:1] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
    one, two = ({name: value[:, slot : slot + 1] for name, value in both.items()} for slot in (0, 1))
    seen[:, :5] = 0
    seen[:, :9, 0, :2] = 1
    whole = model(input_ids=ids, cross_attention_mask=seen, **both).logits
    first = model(input_ids=ids[:, :9], cross_attention_mask=seen[:, :9, :1], **one)
    later = model(input_ids=ids[:, 9:], cross_attention_mask=seen[:, 9:], past_key_values=first.past_key_values, **two)
    assert relative(first.logits, whole[:, :9]) < 1e-12
    assert relative(later.logits, whole[:, 9:]) < 1e-12


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_is_what_repeated_forward_calls_give(model: MllamaForConditionalGeneration, use_cache: bool) -> None:
    given = batch()
    ids, mask, seen = (given.pop(name) for name in ("input_ids", "attention_mask", "cross_attention_mask"))
    ids[1, 11:], mask[1, 11:] = 7, 1  # generation goes on at the end of a row
    for _ in range(4):
        logits = model(
            input_ids=ids, attention_mask=mask, cross_attention_mask=seen, position_ids=positions(mask), **given
        ).logits
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), dim=1)
        mask = torch.cat((mask, mask.new_ones((3, 1))), dim=1)
        seen = torch.cat((seen, seen[:, -1:]), dim=1)
    found = model.generate(
        ids[:, :14],
        attention_mask=mask[:, :14],
        cross_attention_mask=seen[:, :14],
        **given,
        max_new_tokens=4,
        eos_token_id=[],
        use_cache=use_cache,
    )
    assert found.tolist() == ids.tolist()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cross_attention_mask": torch.ones((2, 13, 2, 4))}, r"it has to be \(batch, 14 or 14, images, tiles\)"),
        ({"cache_position": torch.arange(1, 15)}, "cache_position is .*; the cache makes it 0 to 13"),
        ({"position_ids": torch.zeros((2, 3), dtype=torch.int64)}, r"position_ids is \(2, 3\); it has to be \(2, 14\)"),
        ({"attention_mask": torch.ones((2, 13))}, r"with 0 cached and 14 new tokens it has to be \(2, 14\)"),
        ({"past_key_values": ((1, 2),)}, "past_key_values is a tuple; only the cache that a model returned is taken"),
        ({"num_logits_to_keep": -1}, "num_logits_to_keep is -1; it has to be a number of positions"),
        (
            {"cross_attention_states": torch.zeros((2, 40, 32))},
            "pixel_values and cross_attention_states are both given",
        ),
        ({"aspect_ratio_ids": None}, "aspect_ratio_ids is missing; pixel_values need"),
        ({"inputs_embeds": torch.zeros((2, 14, 32))}, "input_ids and inputs_embeds are both given"),
        ({"input_ids": None}, "neither input_ids nor inputs_embeds is given"),
    ],
)
def test_wrong_arguments_are_named(model: MllamaForConditionalGeneration, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        model(**{**inputs(), **changes})


def test_other_mistakes_are_named(model: MllamaForConditionalGeneration) -> None:
    with pytest.raises(LabelError, match="labels holds 64; valid are 0 to 63"):
        model(**inputs(), labels=inputs()["input_ids"])
    with pytest.raises(ValueError, match="the text model takes it expanded"):
        model.language_model(inputs()["input_ids"], cross_attention_mask=inputs()["cross_attention_mask"])
    with pytest.raises(ValueError, match="new_num_tokens is 99; the 72 rows cannot be changed"):
        model.resize_token_embeddings(99)
    assert model.resize_token_embeddings(72).num_embeddings == 72
    with pytest.raises(ValueError, match="generate does not know 'pixel_values'"):
        MllamaForCausalLM(model.config).generate(
            inputs()["input_ids"].clamp(max=63), pixel_values=inputs()["pixel_values"]
        )
    with pytest.raises(ValueError, match="names every layer"):
        every = MllamaTextConfig(**{**TEXT, "cross_attention_layers": [0, 1, 2, 3, 4]})
        MllamaTextModel(every)(inputs()["input_ids"])
    for kind, wrong in (
        (MllamaForConditionalGeneration, MllamaTextConfig(**TEXT)),
        (MllamaForCausalLM, Idefics3Config()),
        (MllamaVisionModel, MllamaConfig(VISION, TEXT)),
    ):
        with pytest.raises(TypeError, match=f"{kind.__name__} takes a"):
            kind(wrong)  # type: ignore[arg-type]  # what must be refused
    with pytest.raises(ValueError, match="attn_implementation 'flash' is not offered"):
        MllamaVisionModel(MllamaVisionConfig(**VISION)).set_attention("flash")
