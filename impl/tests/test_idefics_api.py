"""The documented Idefics classes: calls, caches, files in both directions, generation, errors."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from test_idefics_model import IMAGE, KINDS, VOCABULARY, assert_close, batch, exact, opened, settings
from torch import Tensor
from torch.nn import functional as F

import vlmqual_impl
from vlmqual_contract import fixtures
from vlmqual_impl.api.auto import AutoConfig, AutoModelForVision2Seq, AutoProcessor
from vlmqual_impl.api.idefics import IdeficsForVisionText2Text
from vlmqual_impl.api.idefics_model import IdeficsModel
from vlmqual_impl.api.outputs import LabelError
from vlmqual_impl.checkpoints import CheckpointError
from vlmqual_impl.configs import Idefics3Config, IdeficsConfig

NEWER = int(transformers.__version__.split(".")[0]) >= 5
__all__ = ["exact"]  # a fixture that is used by name

DOCUMENTED = """
    input_ids attention_mask position_ids past_key_values inputs_embeds pixel_values image_encoder_embeddings
    perceiver_embeddings image_attention_mask use_cache output_attentions output_hidden_states
    interpolate_pos_encoding return_dict cache_position
    """.split()  # noqa: SIM905  # a list of fifteen lines says no more


def made(kind: str = "scalar gates", **changes: Any) -> IdeficsForVisionText2Text:
    model = IdeficsForVisionText2Text(IdeficsConfig(**settings(**{**KINDS[kind], **changes})))
    opened(model)
    return model.double().eval()


@pytest.fixture(scope="module")
def model() -> IdeficsForVisionText2Text:
    return made().requires_grad_(False)


@pytest.fixture(scope="module")
def resampling() -> IdeficsForVisionText2Text:
    return made("resampler and norms of heads").requires_grad_(False)


def theirs(directory: Path) -> Any:
    """transformers' model of a checkpoint."""
    kind = {"dtype" if NEWER else "torch_dtype": torch.float64}
    return transformers.IdeficsForVisionText2Text.from_pretrained(directory, **kind).eval()


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)


# ------------------------------------------------------------------------------------------------------------- calls


def test_forward_has_the_documented_arguments_in_their_order() -> None:
    parameters = inspect.signature(IdeficsModel.forward).parameters
    assert list(parameters)[1:] == DOCUMENTED
    assert {name: p.default for name, p in parameters.items() if p.default is not None and name != "self"} == {
        "interpolate_pos_encoding": False
    }
    place = DOCUMENTED.index("use_cache")
    head = [*DOCUMENTED[:place], "labels", *DOCUMENTED[place:]]
    assert list(inspect.signature(IdeficsForVisionText2Text.forward).parameters)[1:] == head


def test_the_classes_and_their_outputs_are_in_the_root(model: IdeficsForVisionText2Text) -> None:
    for name in (
        "IdeficsModel",
        "IdeficsForVisionText2Text",
        "IdeficsBaseModelOutputWithPast",
        "IdeficsCausalLMOutputWithPast",
    ):
        assert getattr(vlmqual_impl, name).__name__ == name
        assert name in vlmqual_impl.__all__
    assert type(model(**batch())).__name__ == "IdeficsCausalLMOutputWithPast"
    assert type(model.model(**batch())).__name__ == "IdeficsBaseModelOutputWithPast"


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("kind", KINDS)
def test_a_call_gives_what_transformers_gives(kind: str, tmp_path: Path) -> None:
    mine = made(kind)
    mine.save_pretrained(tmp_path)
    other = theirs(tmp_path)
    inputs = batch(extra=mine.config.additional_vocab_size)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        wanted = other(**inputs, output_hidden_states=True, use_cache=True)
        found = mine(**inputs, output_hidden_states=True, use_cache=True)
    assert_close(found.logits[real], wanted.logits[real], "logits")
    assert_close(found.image_hidden_states, wanted.image_hidden_states, "image features")
    assert found.logits.shape[-1] == mine.config.vocab_size + mine.config.additional_vocab_size
    layers = range(4)
    past = [(layer.keys, layer.values) for layer in wanted.past_key_values.layers] if NEWER else wanted.past_key_values
    for index in layers:
        for one, two in zip(found.past_key_values[index], past[index], strict=True):
            assert_close(one.transpose(1, 2)[real], two.transpose(1, 2)[real], f"cache of layer {index}")
    if not NEWER:  # 5.x gives what enters the decoder layers, behind the cross-attention blocks
        for index, (one, two) in enumerate(zip(found.hidden_states, wanted.hidden_states, strict=True)):
            assert_close(one[real], two[real], f"state {index}")


def test_hidden_states_are_what_enters_every_layer_and_the_output(model: IdeficsForVisionText2Text) -> None:
    entering: list[Tensor] = []
    trunk = model.model
    handles = [trunk.gated_cross_attn_layers[0], trunk.layers[1], trunk.gated_cross_attn_layers[1], trunk.layers[3]]
    hooks = [module.register_forward_pre_hook(lambda _, given: entering.append(given[0])) for module in handles]
    found = trunk(**batch(), output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    assert len(found.hidden_states) == 5
    for state, wanted in zip(found.hidden_states, [*entering, found.last_hidden_state], strict=True):
        assert torch.equal(state, wanted)
    assert torch.equal(found.hidden_states[0], trunk.embed_tokens(batch()["input_ids"]))


def test_attentions_are_real_and_read_no_padding_and_nothing_later(model: IdeficsForVisionText2Text) -> None:
    found = model(**batch(), output_attentions=True)
    assert [tuple(weights.shape) for weights in found.attentions] == [(3, 4, 14, 14)] * 4
    real = batch()["attention_mask"].bool()
    for weights in found.attentions:
        rows = weights.transpose(1, 2)[real]
        assert float((rows.sum(-1) - 1).abs().max()) < 1e-12
        assert float(weights[2].triu(1).abs().max()) == 0
        assert float(weights[0, :, 3:, :3].abs().max()) == 0
    assert_close(found.logits, model(**batch()).logits, "logits")


@pytest.mark.parametrize("kind", KINDS)
def test_features_that_are_given_back_replace_the_pixels(kind: str) -> None:
    model = made(kind).requires_grad_(False)
    inputs = batch(extra=model.config.additional_vocab_size)
    wanted = model(**inputs)
    pixels = inputs.pop("pixel_values")
    tower = model.model.vision_model.encode(pixels.flatten(0, 1), interpolate=False, implementation="sdpa")
    encoded = tower.view(3, 2, 17, 24)
    found = model(**inputs, image_encoder_embeddings=encoded)
    assert torch.equal(found.logits, wanted.logits)
    assert torch.equal(found.image_hidden_states, wanted.image_hidden_states)
    if model.config.use_resampler:
        assert tuple(wanted.image_hidden_states.shape) == (3, 2, 3, 24)
        found = model(**inputs, perceiver_embeddings=wanted.image_hidden_states)
        assert torch.equal(found.logits, wanted.logits)
    else:
        assert torch.equal(wanted.image_hidden_states, encoded)


def test_pictures_of_another_size_need_the_switch(model: IdeficsForVisionText2Text) -> None:
    inputs = batch(side=42)
    with pytest.raises(ValueError, match="other sizes need interpolate_pos_encoding=True"):
        model(**inputs)
    assert tuple(model(**inputs, interpolate_pos_encoding=True).image_hidden_states.shape) == (3, 2, 37, 24)


def test_embeddings_replace_ids_and_defaults_are_what_they_stand_for(model: IdeficsForVisionText2Text) -> None:
    inputs = batch()
    wanted = model(**inputs).logits
    ids = inputs.pop("input_ids")
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model(**inputs, inputs_embeds=embedded).logits, wanted)
    places = positions(inputs["attention_mask"])
    assert torch.equal(model(**inputs, input_ids=ids, position_ids=places).logits, wanted)
    assert torch.equal(model(**inputs, input_ids=ids, cache_position=torch.arange(14)).logits, wanted)
    moved = model(**inputs, input_ids=ids, position_ids=places.flip(1)).logits
    assert not torch.allclose(moved, wanted), "positions that are given count"
    ones = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    without = {name: value for name, value in ones.items() if name != "attention_mask"}
    assert torch.equal(model(**without).logits, model(**ones).logits)
    assert torch.equal(model(**without, position_ids=torch.arange(14)[None]).logits, model(**ones).logits)


def test_a_plain_tuple_holds_what_is_there_in_order(model: IdeficsForVisionText2Text) -> None:
    inputs = batch()
    whole = model(**inputs, labels=inputs["input_ids"], return_dict=False, use_cache=False)
    assert type(whole) is tuple
    assert [tuple(item.shape) for item in whole] == [(), (3, 14, 62), (3, 2, 17, 24)]
    bare = model(**inputs, return_dict=False, output_hidden_states=True, output_attentions=True)
    assert tuple(bare[0].shape) == (3, 14, 62)
    assert [len(item) for item in bare[1:4]] == [4, 5, 4]
    trunk = model.model(**inputs, return_dict=False)
    assert [type(item) for item in trunk] == [Tensor, tuple, Tensor]


# ------------------------------------------------------------------------------------------------------------- cache


def test_the_cache_is_a_tuple_of_pairs_and_is_continued(model: IdeficsForVisionText2Text) -> None:
    inputs = batch()
    mask, seen, ids = (inputs.pop(name) for name in ("attention_mask", "image_attention_mask", "input_ids"))
    mask[1, 11:] = 1
    whole = model(input_ids=ids, attention_mask=mask, image_attention_mask=seen, **inputs).logits
    first = model(input_ids=ids[:, :9], attention_mask=mask[:, :9], image_attention_mask=seen[:, :9], **inputs)
    parts, past = [first.logits], first.past_key_values
    assert type(past) is tuple
    assert all(type(pair) is tuple for pair in past)
    assert [[tuple(tensor.shape) for tensor in pair] for pair in past] == [[(3, 4, 9, 8)] * 2] * 4
    for start, stop in ((9, 10), (10, 13), (13, 14)):
        step = model(
            input_ids=ids[:, start:stop],
            attention_mask=mask[:, :stop],
            image_attention_mask=seen[:, start:stop],
            past_key_values=past,
            **inputs,
        )
        parts.append(step.logits)
        past = step.past_key_values
    real = mask.bool()
    assert_close(torch.cat(parts, dim=1)[real], whole[real], "logits")
    assert first.past_key_values[0][0].shape[2] == 9, "what was returned stays as it is"
    copied = tuple((keys.clone(), values.clone()) for keys, values in first.past_key_values)
    again = model(
        input_ids=ids[:, 9:],
        attention_mask=mask,
        image_attention_mask=seen[:, 9:],
        past_key_values=copied,
        **inputs,
    )
    assert_close(again.logits, whole[:, 9:], "logits")


def test_images_of_a_later_call_replace_those_of_the_earlier(model: IdeficsForVisionText2Text) -> None:
    inputs = {name: value[2:] for name, value in batch().items() if name != "attention_mask"}
    inputs["image_attention_mask"] = torch.ones_like(inputs["image_attention_mask"])
    ids, seen = inputs.pop("input_ids"), inputs.pop("image_attention_mask")
    other = {"pixel_values": torch.flip(batch()["pixel_values"][:1], (3,))}
    # Rows before the first image see none, so what they leave in the cache does not depend on it.
    seen[:, :9] = 0
    first = model(input_ids=ids[:, :9], image_attention_mask=seen[:, :9], **inputs)
    past = first.past_key_values
    found = model(input_ids=ids[:, 9:], image_attention_mask=seen[:, 9:], past_key_values=past, **other)
    wanted = model(input_ids=ids, image_attention_mask=seen, **other)
    assert_close(found.logits, wanted.logits[:, 9:], "logits")


def test_use_cache_decides_whether_there_is_one(model: IdeficsForVisionText2Text) -> None:
    assert model(**batch(), use_cache=False).past_key_values is None
    assert model(**batch()).past_key_values is not None
    without = IdeficsForVisionText2Text(IdeficsConfig(**settings(use_cache=False)))
    assert without(**batch()).past_key_values is None


# -------------------------------------------------------------------------------------------------------------- loss


def test_the_loss_is_the_mean_cross_entropy_of_the_next_real_label(model: IdeficsForVisionText2Text) -> None:
    inputs = batch()
    labels = inputs["input_ids"].clone()
    labels[2, 5:8] = -100
    labels[0, 7] = VOCABULARY + 1  # an additional id is a target as well
    found = model(**inputs, labels=labels)
    assert found.loss.shape == ()
    losses = []
    for row in range(3):
        for place in range(13):
            wanted = int(labels[row, place + 1])
            if wanted != -100 and inputs["attention_mask"][row, place + 1]:
                losses.append(-F.log_softmax(found.logits[row, place], dim=-1)[wanted])
    assert_close(found.loss, torch.stack(losses).mean(), "loss")
    assert model(**inputs).loss is None
    del inputs["attention_mask"]
    assert not torch.isclose(model(**inputs, labels=labels).loss, found.loss), "without a mask padding counts"


@pytest.mark.parametrize("extra", [0, 2])
def test_the_loss_is_that_of_transformers_without_the_padding(extra: int, tmp_path: Path) -> None:
    mine = made(additional_vocab_size=extra).requires_grad_(False)
    mine.save_pretrained(tmp_path)
    inputs = batch(extra=extra)
    given = inputs["input_ids"].clone()
    given[0, 3] = -100  # the first of a row is predicted by padding, where versions differ
    labels = given.masked_fill(inputs["attention_mask"] == 0, -100)
    with torch.no_grad():
        if NEWER and extra:  # it counts the classes of the main vocabulary only (IDEFICS-LM-019)
            logits = theirs(tmp_path)(**inputs).logits
            wanted = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        else:
            wanted = theirs(tmp_path)(**inputs, labels=labels).loss
    assert_close(mine(**inputs, labels=given).loss, wanted.double(), "loss", 1e-6)


# ------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("size", ["5GB", "40KB"])
@pytest.mark.parametrize("kind", KINDS)
def test_files_go_to_transformers_and_come_back(kind: str, size: str, tmp_path: Path) -> None:
    model = made(kind)
    inputs = batch(extra=model.config.additional_vocab_size)
    model.save_pretrained(tmp_path / "ours", max_shard_size=size)
    assert (len(list((tmp_path / "ours").glob("*.safetensors"))) == 1) is (size == "5GB")
    other, report = transformers.IdeficsForVisionText2Text.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"], "everything that transformers wants is there"
    assert not report["unexpected_keys"], "nothing is there that transformers does not want"
    # 4.46.3 cannot save a tied additional matrix as safetensors; then our own files come back.
    source = tmp_path / ("theirs" if NEWER or not model.config.tie_word_embeddings else "ours")
    if source.name == "theirs":
        theirs(tmp_path / "ours").save_pretrained(source, max_shard_size=size)
    loaded = AutoModelForVision2Seq.from_pretrained(source, dtype=torch.float64)
    assert isinstance(loaded, IdeficsForVisionText2Text)
    assert loaded.config.tie_word_embeddings is model.config.tie_word_embeddings
    config = AutoConfig.from_pretrained(source)
    assert isinstance(config, IdeficsConfig)
    assert not config.unknown()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits), "the same weights give the same numbers"
    shared = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert shared is model.config.tie_word_embeddings
    assert other.num_parameters() == loaded.num_parameters() == model.num_parameters()


def test_a_model_without_head_loads_from_a_whole_checkpoint_and_from_its_own(
    resampling: IdeficsForVisionText2Text, tmp_path: Path
) -> None:
    resampling.save_pretrained(tmp_path / "whole")
    trunk = IdeficsModel.from_pretrained(tmp_path / "whole", dtype=torch.float64)
    wanted = resampling.model(**batch()).last_hidden_state
    assert torch.equal(trunk(**batch()).last_hidden_state, wanted)
    trunk.save_pretrained(tmp_path / "trunk")
    again = IdeficsModel.from_pretrained(tmp_path / "trunk", dtype=torch.float64)
    assert torch.equal(again(**batch()).last_hidden_state, wanted)
    other, report = transformers.IdeficsModel.from_pretrained(tmp_path / "trunk", output_loading_info=True)
    assert not report["missing_keys"]
    other.save_pretrained(tmp_path / "theirs")
    found = IdeficsModel.from_pretrained(tmp_path / "theirs", dtype=torch.float64)
    assert_close(found(**batch()).last_hidden_state, wanted, "states", 1e-6)
    with pytest.raises(CheckpointError, match=r"lm_head\.additional_fc\.weight, lm_head\.weight are missing"):
        IdeficsForVisionText2Text.from_pretrained(tmp_path / "trunk", config=resampling.config)


# -------------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_generated_ids_equal_those_of_transformers(kind: str, use_cache: bool, tmp_path: Path) -> None:
    mine = made(kind)
    mine.save_pretrained(tmp_path)
    inputs = batch(extra=mine.config.additional_vocab_size)
    inputs["attention_mask"][1, 11:] = 1  # generation goes on at the end of a row
    options = {"max_new_tokens": 6, "do_sample": False, "use_cache": use_cache, "eos_token_id": 63}
    wanted = theirs(tmp_path).generate(**inputs, **options, pad_token_id=0)
    found = mine.generate(**inputs, **{**options, "eos_token_id": []})
    assert found.tolist() == wanted.tolist()


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_is_what_repeated_forward_calls_give(model: IdeficsForVisionText2Text, use_cache: bool) -> None:
    given = batch(side=42)
    ids, mask, seen = (given.pop(name) for name in ("input_ids", "attention_mask", "image_attention_mask"))
    mask[1, 11:] = 1
    for _ in range(4):
        logits = model(
            input_ids=ids, attention_mask=mask, image_attention_mask=seen, interpolate_pos_encoding=True, **given
        ).logits
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), dim=1)
        mask = torch.cat((mask, mask.new_ones((3, 1))), dim=1)
        seen = torch.cat((seen, seen[:, -1:]), dim=1)
    found = model.generate(
        ids[:, :14],
        attention_mask=mask[:, :14],
        image_attention_mask=seen[:, :14],
        interpolate_pos_encoding=True,
        **given,
        max_new_tokens=4,
        eos_token_id=[],
        use_cache=use_cache,
    )
    assert found.tolist() == ids.tolist()


@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_takes_features_in_place_of_pixels(resampling: IdeficsForVisionText2Text, use_cache: bool) -> None:
    options = {"max_new_tokens": 4, "eos_token_id": [], "use_cache": use_cache}
    inputs = batch()
    wanted = resampling.generate(**inputs, **options).tolist()
    features = resampling(**inputs).image_hidden_states
    pixels = inputs.pop("pixel_values")
    tower = resampling.model.vision_model.encode(pixels.flatten(0, 1), interpolate=False, implementation="sdpa")
    for name, value in (
        ("image_hidden_states", features),
        ("perceiver_embeddings", features),
        ("image_encoder_embeddings", tower.view(3, 2, 17, 24)),
    ):
        assert resampling.generate(**inputs, **{name: value}, **options).tolist() == wanted, name
    embedded = resampling.get_input_embeddings()(inputs.pop("input_ids"))
    alone = resampling.generate(**inputs, inputs_embeds=embedded, image_hidden_states=features, **options)
    assert alone.tolist() == [row[14:] for row in wanted], "only what follows"


@pytest.mark.parametrize("checkpoint", ["idefics-tiny", "idefics-resampler-tiny"])
def test_what_the_processor_makes_is_generated_from(checkpoint: str) -> None:
    directory = fixtures.root() / "checkpoints" / checkpoint
    processor = AutoProcessor.from_pretrained(directory)
    model = AutoModelForVision2Seq.from_pretrained(directory, dtype=torch.float64)
    cat, coffee = (Image.open(fixtures.root() / "images" / f"{name}.png") for name in ("chelsea", "coffee"))
    prompts = [["User:", cat, "What is this?", coffee, "And this?"], ["User: Hello."], [coffee, "A cup of"]]
    inputs = processor(text=prompts, return_tensors="pt")
    options = {"max_new_tokens": 6, "eos_token_id": []}
    found = model.generate(**inputs, **options)  # IDEFICS-LM-015
    length = inputs["input_ids"].shape[1]
    assert found[:, :length].tolist() == inputs["input_ids"].tolist()
    assert tuple(found.shape) == (3, length + 6)
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(4)}
    with torch.no_grad():
        moved = (model(**other).logits - model(**inputs).logits)[:, -1].abs().amax(-1)
    assert float(moved[0]) > 1e-3, "what is generated depends on the images"
    assert float(moved[1]) == 0, "a row without an image has none"
    for row, prompt in enumerate(prompts):  # the text alone has a bool mask and one slot of zeros (IDEFICS-PROC-022)
        alone = processor(text=[prompt], return_tensors="pt")
        start = alone["input_ids"].shape[1]
        assert model.generate(**alone, **options)[0, start:].tolist() == found[row, length:].tolist(), prompt


def test_generation_needs_exactly_one_kind_of_images(model: IdeficsForVisionText2Text) -> None:
    inputs = batch()
    features = model(**inputs).image_hidden_states
    with pytest.raises(ValueError, match="exactly one of pixel_values, image_encoder_embeddings, perceiver_emb"):
        model.generate(**inputs, image_hidden_states=features)
    with pytest.raises(ValueError, match="exactly one of pixel_values"):
        model.generate(inputs["input_ids"])
    with pytest.raises(ValueError, match="image_attention_mask is missing"):
        model.generate(inputs["input_ids"], pixel_values=inputs["pixel_values"])
    with pytest.raises(ValueError, match="has no resampler"):
        model.generate(inputs["input_ids"], perceiver_embeddings=features)
    with pytest.raises(ValueError, match="IdeficsModel has no language model head"):
        model.model.generate(inputs["input_ids"])


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pixel_values": None}, "exactly one of pixel_values, image_encoder_embeddings and perceiver_embeddings"),
        ({"image_encoder_embeddings": torch.zeros((3, 2, 17, 24))}, "exactly one of pixel_values"),
        ({"pixel_values": None, "perceiver_embeddings": torch.zeros((3, 2, 3, 24))}, "the model has no resampler"),
        (
            {"pixel_values": None, "image_encoder_embeddings": torch.zeros((3, 17, 24))},
            r"image_encoder_embeddings is \(3, 17, 24\); it has to be \(batch, images, positions, 24\)",
        ),
        ({"image_attention_mask": None}, "image_attention_mask is missing; it says which tokens see which images"),
        ({"image_attention_mask": torch.ones((3, 13, 2))}, r"image_attention_mask is \(3, 13, 2\)"),
        ({"inputs_embeds": torch.zeros((3, 14, 32))}, "input_ids and inputs_embeds are both given"),
        ({"input_ids": None}, "neither input_ids nor inputs_embeds is given"),
        ({"input_ids": None, "inputs_embeds": torch.zeros((3, 14, 31))}, r"it has to be \(batch, tokens, 32\)"),
        ({"input_ids": torch.full((3, 14), 62)}, "input_ids holds 62; the vocabulary is 0 to 61"),
        ({"attention_mask": torch.ones((3, 13))}, r"with 0 cached and 14 new tokens it has to be \(3, 14\)"),
        ({"position_ids": torch.zeros((3, 3), dtype=torch.int64)}, r"position_ids is \(3, 3\); it has to be \(3, 14\)"),
        ({"cache_position": torch.arange(1, 15)}, "cache_position is .*; the cache makes it 0 to 13"),
        ({"past_key_values": 7}, r"past_key_values is a int; it has to be 4 pairs of keys and values \(3, 4, posi"),
        ({"past_key_values": ((torch.zeros((3, 4, 2, 8)),) * 2,)}, "past_key_values is a tuple of 1; it has to be 4"),
        (
            {"past_key_values": ((torch.zeros((2, 4, 2, 8)),) * 2,) * 4},
            r"past_key_values has \[\(2, 4, 2, 8\), \(2, 4, 2, 8\)\] for layer 0",
        ),
        ({"past_key_values": (None,) * 4}, r"past_key_values has \[\] for layer 0; it has to be 4 pairs of keys"),
        ({"past_key_values": ((1, 2),) * 4}, r"past_key_values has \[\] for layer 0"),
        ({"past_key_values": ((torch.zeros(3),) * 2,) * 4}, r"past_key_values has \[\(3,\), \(3,\)\] for layer 0"),
        (
            {"past_key_values": ((torch.zeros((3, 4, 2, 8)),) * 2,) * 4, "use_cache": False},
            "past_key_values is given, but use_cache is False",
        ),
    ],
)
def test_wrong_arguments_are_named(model: IdeficsForVisionText2Text, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        model(**{**batch(), **changes})


def test_other_mistakes_are_named(model: IdeficsForVisionText2Text) -> None:
    with pytest.raises(LabelError, match="labels holds 62; valid are 0 to 61"):
        model(**batch(), labels=torch.full((3, 14), IMAGE + 1))
    for kind in (IdeficsModel, IdeficsForVisionText2Text):
        with pytest.raises(TypeError, match=f"{kind.__name__} takes an IdeficsConfig, not a Idefics3Config"):
            kind(Idefics3Config())
    with pytest.raises(ValueError, match="attn_implementation 'flash' is not offered"):
        model.set_attention("flash")
