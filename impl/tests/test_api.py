"""The documented classes: signatures, outputs, loss, caches, embeddings, errors."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import vlmqual_impl
from vlmqual_impl.api.auto import AutoConfig, AutoModelForVision2Seq
from vlmqual_impl.api.idefics3 import (
    Idefics3BaseModelOutputWithPast,
    Idefics3CausalLMOutputWithPast,
    Idefics3ForConditionalGeneration,
    Idefics3Model,
)
from vlmqual_impl.api.outputs import LabelError
from vlmqual_impl.api.pretrained import PreTrainedModel
from vlmqual_impl.cache import KeyValueCache
from vlmqual_impl.configs import ConfigError, Idefics3Config, Idefics3VisionConfig

IMAGE = 60
PARTS: dict[str, Any] = {
    "image_token_id": IMAGE,
    "text_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "pad_token_id": 0,
    },
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 56,
        "patch_size": 14,
    },
}
DOCUMENTED = [
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


@pytest.fixture(scope="module")
def model() -> Idefics3ForConditionalGeneration:
    torch.manual_seed(3)
    made = Idefics3ForConditionalGeneration(Idefics3Config(**PARTS))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    return made.double().eval().requires_grad_(False)


def text(rows: int = 2, tokens: int = 9) -> Tensor:
    return torch.randint(3, 59, (rows, tokens), generator=torch.Generator().manual_seed(5))


def with_images(frames: int = 1) -> dict[str, Tensor]:
    ids = text(1, 6 + 4 * frames)
    ids[0, 2 : 2 + 4 * frames] = IMAGE
    pixels = torch.randn((1, frames, 3, 56, 56), generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    return {"input_ids": ids, "pixel_values": pixels}


def close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(torch.allclose(one, other, rtol=1e-10, atol=1e-12))


def test_documented_names_are_in_the_package_root() -> None:
    for name in ("Idefics3Config", "Idefics3VisionConfig", "Idefics3Model", "Idefics3ForConditionalGeneration"):
        assert getattr(vlmqual_impl, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Idefics4Model'"):
        vlmqual_impl.__getattr__("Idefics4Model")


def test_forward_takes_the_documented_parameters_in_order() -> None:
    for function, names in (
        (Idefics3Model.forward, DOCUMENTED),
        (Idefics3ForConditionalGeneration.forward, [*DOCUMENTED[:8], "labels", *DOCUMENTED[8:]]),
    ):
        parameters = list(inspect.signature(function).parameters.values())[1:]
        assert [item.name for item in parameters] == names
        assert all(item.default is None for item in parameters)


def test_constructors_take_the_composite_configuration_only() -> None:
    assert issubclass(Idefics3Model, PreTrainedModel)
    assert issubclass(Idefics3Model, torch.nn.Module)
    config = Idefics3Config(**PARTS)
    assert Idefics3Model(config).config is config
    for kind in (Idefics3Model, Idefics3ForConditionalGeneration):
        with pytest.raises(TypeError, match="not a Idefics3VisionConfig"):
            kind(Idefics3VisionConfig())  # type: ignore[arg-type]  # what must be refused


def test_the_architecture_is_siglip_and_llama_without_perceiver(model: Idefics3ForConditionalGeneration) -> None:
    assert type(model.model.text_model).__name__ == "LlamaModel"
    assert not [name for name, _ in model.named_parameters() if "perceiver" in name or "resampler" in name]
    assert model.model.vision_model.embeddings.position_embedding.weight.shape[0] == (56 // 14) ** 2
    assert model.model.vision_model(torch.zeros((2, 3, 56, 56), dtype=torch.float64)).shape == (2, 16, 16)
    assert model.image_token_id == IMAGE


@pytest.mark.parametrize(("size", "patch", "factor", "tokens"), [(56, 14, 2, 4), (56, 14, 4, 1), (364, 14, 2, 169)])
def test_tokens_of_one_frame_follow_the_formula(size: int, patch: int, factor: int, tokens: int) -> None:
    vision = {**PARTS["vision_config"], "image_size": size, "patch_size": patch}
    small = Idefics3Model(Idefics3Config(**{**PARTS, "vision_config": vision}, scale_factor=factor))
    assert small.config.tokens_per_frame == tokens
    ids = torch.full((1, tokens), IMAGE)
    out = small(input_ids=ids, pixel_values=torch.ones((1, 1, 3, size, size)))
    assert out.image_hidden_states.shape == (1, tokens, 32)


def test_outputs_have_names_positions_and_a_plain_tuple(model: Idefics3ForConditionalGeneration) -> None:
    ids = text()
    out = model(ids, labels=ids, output_hidden_states=True, output_attentions=True)
    assert isinstance(out, Idefics3CausalLMOutputWithPast)
    assert list(out.keys()) == ["loss", "logits", "past_key_values", "hidden_states", "attentions"]
    assert out[1] is out.logits is out["logits"]
    assert out.logits.shape == (2, 9, 64)
    assert "image_hidden_states" not in out
    assert [state.shape for state in out.hidden_states] == [(2, 9, 32)] * 4
    assert [weight.shape for weight in out.attentions] == [(2, 4, 9, 9)] * 3
    plain = model(ids, labels=ids, return_dict=False)
    assert type(plain) is tuple
    assert close(plain[0], out.loss)
    assert close(plain[1], out.logits)
    assert len(plain) == 3
    inner = model.model(ids)
    assert isinstance(inner, Idefics3BaseModelOutputWithPast)
    assert inner.last_hidden_state.shape == (2, 9, 32)
    assert isinstance(inner.to_tuple(), tuple)
    assert type(model.model(ids, return_dict=False)) is tuple


def test_the_last_hidden_state_is_the_normed_one(model: Idefics3ForConditionalGeneration) -> None:
    out = model.model(text(), output_hidden_states=True)
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    assert close(out.hidden_states[0], model.get_input_embeddings()(text()))


def test_the_mask_defaults_to_ones_and_positions_to_a_count(model: Idefics3ForConditionalGeneration) -> None:
    ids = text()
    plain = model(ids).logits
    assert torch.equal(model(ids, attention_mask=torch.ones_like(ids)).logits, plain)
    count = torch.arange(9)[None]
    assert torch.equal(model(ids, position_ids=count).logits, plain)
    assert not close(model(ids, position_ids=count * 2).logits, plain)


def test_padding_does_not_reach_real_positions(model: Idefics3ForConditionalGeneration) -> None:
    ids = text(1)
    padded = torch.cat((torch.zeros((1, 3), dtype=torch.int64), ids), dim=1)
    mask = torch.cat((torch.zeros((1, 3), dtype=torch.int64), torch.ones_like(ids)), dim=1)
    out = model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    assert close(out.logits[:, 3:], model(ids).logits)


def test_the_cache_is_returned_and_can_be_continued(model: Idefics3ForConditionalGeneration) -> None:
    ids = text()
    full = model(ids).logits
    assert model(ids, use_cache=False).past_key_values is None
    out = model(ids[:, :-3], use_cache=True)
    cache = out.past_key_values
    assert isinstance(cache, KeyValueCache)
    assert cache.get_seq_length() == 6
    assert len(cache) == 3
    assert len(cache[0]) == 2, "two tensors for each layer"
    assert cache[0][0].shape == (2, 2, 6, 8), "as many heads as num_key_value_heads"
    two = model(ids[:, -3:-1], past_key_values=cache)
    assert close(two.logits, full[:, -3:-1])
    one = model(ids[:, -1:], past_key_values=two.past_key_values, attention_mask=torch.ones_like(ids))
    assert close(one.logits[:, -1], full[:, -1])


def test_a_cache_grows_past_its_first_size(model: Idefics3ForConditionalGeneration) -> None:
    ids = text(1, 150)
    full = model(ids).logits
    cache = model(ids[:, :2]).past_key_values
    for start in range(2, 150, 37):
        piece = ids[:, start : start + 37]
        assert close(model(piece, past_key_values=cache).logits, full[:, start : start + 37]), f"from {start}"


def test_a_later_call_carries_image_features_along_without_merging(model: Idefics3ForConditionalGeneration) -> None:
    inputs = with_images()
    full = model(**inputs)
    start = model(inputs["input_ids"][:, :-1], pixel_values=inputs["pixel_values"])
    last = model(
        inputs["input_ids"][:, -1:],
        past_key_values=start.past_key_values,
        image_hidden_states=start.image_hidden_states,
    )
    assert close(last.logits[:, -1], full.logits[:, -1])


def test_loss_is_shifted_cross_entropy_that_ignores_minus_100_and_padding(
    model: Idefics3ForConditionalGeneration,
) -> None:
    ids = text()
    labels = ids.clone()
    labels[0, :4] = -100
    logits = model(ids).logits
    terms = []
    for row in range(2):
        for t in range(8):
            if labels[row, t + 1] != -100:
                terms.append(-F.log_softmax(logits[row, t], -1)[labels[row, t + 1]])
    out = model(ids, labels=labels)
    assert out.loss.shape == ()
    assert close(out.loss, torch.stack(terms).mean())
    assert model(ids).loss is None
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    kept = labels.clone()
    kept[1, 6:] = -100
    masked = model(ids, attention_mask=mask, labels=labels).loss
    assert close(masked, model(ids, attention_mask=mask, labels=kept).loss), "labels on padding have to be dropped"


def test_image_tokens_are_ordinary_targets_and_labels_end_below_the_vocabulary(
    model: Idefics3ForConditionalGeneration,
) -> None:
    inputs = with_images()
    labels = inputs["input_ids"].clone()
    ignored = labels.masked_fill(labels == IMAGE, -100)
    assert not close(model(**inputs, labels=labels).loss, model(**inputs, labels=ignored).loss)
    labels[0, 1] = 64
    with pytest.raises(LabelError, match="labels holds 64; valid are 0 to 63"):
        model(**inputs, labels=labels)
    with pytest.raises(ValueError, match=r"labels is \(1, 3\)"):
        model(**inputs, labels=labels[:, :3])


def test_features_can_be_fed_back_in_place_of_pixels(model: Idefics3ForConditionalGeneration) -> None:
    inputs = with_images(2)
    out = model(**inputs)
    assert out.image_hidden_states.shape == (2, 4, 32)
    assert torch.equal(model(inputs["input_ids"], image_hidden_states=out.image_hidden_states).logits, out.logits)
    with pytest.raises(ValueError, match="both given"):
        model(**inputs, image_hidden_states=out.image_hidden_states)


def test_padding_frames_change_nothing(model: Idefics3ForConditionalGeneration) -> None:
    inputs = with_images()
    padded = torch.cat((inputs["pixel_values"], torch.zeros((1, 2, 3, 56, 56), dtype=torch.float64)), dim=1)
    out = model(inputs["input_ids"], pixel_values=padded)
    assert out.image_hidden_states.shape[0] == 1
    assert torch.equal(out.logits, model(**inputs).logits)


def test_embeddings_can_stand_in_for_ids(model: Idefics3ForConditionalGeneration) -> None:
    ids = text()
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embedded).logits, model(ids).logits)
    inputs = with_images()
    embedded = model.get_input_embeddings()(inputs["input_ids"])
    wanted = model(**inputs).logits
    assert torch.equal(model(inputs_embeds=embedded, pixel_values=inputs["pixel_values"]).logits, wanted)
    both = model(inputs["input_ids"], inputs_embeds=embedded, pixel_values=inputs["pixel_values"])
    assert torch.equal(both.logits, wanted)


def test_wrong_inputs_are_named(model: Idefics3ForConditionalGeneration) -> None:
    inputs = with_images()
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    short = ids.clone()
    short[0, 2] = 5
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "neither input_ids nor inputs_embeds"),
        ({"input_ids": ids, "pixel_values": pixels[0]}, "pixel_values has"),
        ({**inputs, "pixel_attention_mask": torch.ones((1, 56, 56))}, "pixel_attention_mask is"),
        ({"input_ids": short, "pixel_values": pixels}, "3 image tokens, but there are 4"),
        ({"input_ids": ids, "past_key_values": ((1, 2),)}, "past_key_values is a tuple"),
        ({"input_ids": ids, "attention_mask": torch.ones((1, 4))}, "attention_mask is"),
        ({"input_ids": ids, "position_ids": torch.ones((1, 4))}, "position_ids is"),
        ({"inputs_embeds": torch.ones((1, 4, 5))}, "inputs_embeds is"),
        ({"input_ids": torch.tensor([[64]])}, "holds 64"),
        ({"input_ids": ids, "pixel_values": torch.cat((pixels, pixels))}, "pixel_values has 2 rows"),
    ]
    for arguments, words in wrong:
        with pytest.raises(ValueError, match=words):
            model(**arguments)


def test_resizing_the_vocabulary_keeps_rows_and_changes_the_configuration() -> None:
    for tie in (False, True):
        model = Idefics3ForConditionalGeneration(Idefics3Config(tie_word_embeddings=tie, **PARTS))
        before = model.get_input_embeddings().weight.detach().clone()
        table = model.resize_token_embeddings(70)
        assert table.weight.shape == (70, 32)
        assert torch.equal(table.weight[:64], before)
        assert model.lm_head.weight.shape == (70, 32)
        assert (model.lm_head.weight is table.weight) == tie
        assert model.config.text_config.vocab_size == model.model.config.text_config.vocab_size == 70
        assert model(torch.tensor([[69]])).logits.shape == (1, 1, 70)
        model.resize_token_embeddings(61)
        assert torch.equal(model.get_input_embeddings().weight, before[:61])


def test_parameters_are_counted_once() -> None:
    tied = Idefics3ForConditionalGeneration(Idefics3Config(tie_word_embeddings=True, **PARTS))
    untied = Idefics3ForConditionalGeneration(Idefics3Config(**PARTS))
    assert untied.num_parameters() - tied.num_parameters() == 64 * 32
    tables = 64 * 32 + 16 * 16  # token and position tables
    assert untied.num_parameters() - untied.num_parameters(exclude_embeddings=True) == tables
    untied.model.vision_model.requires_grad_(False)
    vision = sum(parameter.numel() for parameter in untied.model.vision_model.parameters())
    assert untied.num_parameters() - untied.num_parameters(only_trainable=True) == vision


def test_embeddings_and_head_can_be_replaced() -> None:
    model = Idefics3ForConditionalGeneration(Idefics3Config(tie_word_embeddings=True, **PARTS))
    table = torch.nn.Embedding(64, 32)
    model.set_input_embeddings(table)
    assert model.get_input_embeddings() is model.model.text_model.embed_tokens is table
    assert model.lm_head.weight is table.weight, "a tied head follows the embedding"
    assert model.get_output_embeddings() is model.lm_head


def test_gradients_reach_every_parameter() -> None:
    model = Idefics3ForConditionalGeneration(Idefics3Config(**PARTS)).train()
    inputs = {key: value.float() if value.is_floating_point() else value for key, value in with_images().items()}
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing, f"no gradient for {missing}"


def test_files_come_with_attention_device_and_dtype_keywords(tmp_path: Path) -> None:
    model = Idefics3ForConditionalGeneration(Idefics3Config(**PARTS)).eval()
    model.save_pretrained(tmp_path)
    ids = text()
    for keywords in ({"_attn_implementation": "eager"}, {"attn_implementation": "sdpa"}, {"device_map": "cpu"}):
        loaded = AutoModelForVision2Seq.from_pretrained(tmp_path, **keywords)
        assert type(loaded) is Idefics3ForConditionalGeneration
        assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-5)
    assert AutoConfig.from_pretrained(tmp_path).model_type == "idefics3"
    with pytest.raises(ValueError, match="'flash_attention_2' is not offered; valid are eager, sdpa"):
        Idefics3Model.from_pretrained(tmp_path, attn_implementation="flash_attention_2")
    with pytest.raises(TypeError, match="does not know the keyword 'quantize'"):
        Idefics3Model.from_pretrained(tmp_path, quantize=True)
    with pytest.raises(ValueError, match="dtype 'int8' is not known"):
        Idefics3Model.from_pretrained(tmp_path, torch_dtype="int8")
    values = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "idefics2"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="'idefics2'"):
        AutoModelForVision2Seq.from_pretrained(tmp_path)


def test_a_model_from_a_configuration_takes_dtype_and_attention() -> None:
    model = Idefics3Model.from_config(Idefics3Config(**PARTS), torch_dtype=torch.bfloat16, attn_implementation="eager")
    assert model.dtype == torch.bfloat16
    assert model.device == torch.device("cpu")
    with pytest.raises(ValueError, match="has no language model head"):
        model.generate(text())
