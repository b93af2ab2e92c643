"""Choice of tokens, stopping, streaming; greedy tokens against transformers."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from vlmqual_impl.api.idefics3 import Idefics3ForConditionalGeneration
from vlmqual_impl.configs import Idefics3Config
from vlmqual_impl.generate import GenerationConfig, choose

PARTS: dict[str, Any] = {
    "image_token_id": 60,
    "text_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
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


@pytest.fixture(scope="module")
def model() -> Idefics3ForConditionalGeneration:
    torch.manual_seed(3)
    made = Idefics3ForConditionalGeneration(Idefics3Config(**PARTS))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    return made.double().eval()


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 59, (3, 10), generator=generator)
    ids[0, 3:7] = 60
    ids[1, 5:9] = 60
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    mask[2, :6] = 0
    pixels = torch.randn((3, 1, 3, 56, 56), generator=generator, dtype=torch.float64)
    pixels[2] = 0
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def test_greedy_tokens_equal_transformers(model: Idefics3ForConditionalGeneration) -> None:
    config = transformers.Idefics3Config(**PARTS)
    reference = transformers.Idefics3ForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    reference.load_state_dict(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = reference.double().eval().generate(**batch(), max_new_tokens=16, do_sample=False)
    found = model.generate(**batch(), max_new_tokens=16)
    assert found.tolist() == wanted.tolist()


def test_cached_equals_uncached(model: Idefics3ForConditionalGeneration) -> None:
    cached = model.generate(**batch(), max_new_tokens=10, use_cache=True)
    assert torch.equal(cached, model.generate(**batch(), max_new_tokens=10, use_cache=False))
    assert cached.shape[1] <= 20


def test_every_row_is_continued_as_if_alone(model: Idefics3ForConditionalGeneration) -> None:
    inputs = batch()
    together = model.generate(**inputs, max_new_tokens=8)[:, 10:]
    for row in range(3):
        kept = inputs["attention_mask"][row].bool()
        alone = {"input_ids": inputs["input_ids"][row : row + 1, kept]}
        if row < 2:
            alone["pixel_values"] = inputs["pixel_values"][row : row + 1]
        single = model.generate(**alone, max_new_tokens=8)[0, int(kept.sum()) :]
        assert together[row, : len(single)].tolist() == single.tolist(), f"row {row}"


def test_a_row_that_ended_is_padded_and_the_loop_stops_when_all_have(model: Idefics3ForConditionalGeneration) -> None:
    free = model.generate(**batch(), max_new_tokens=8)[:, 10:]
    end = int(free[0, 2])
    assert end not in free[0, :2].tolist(), "the example needs a token that is new at its third place"
    stopped = model.generate(**batch(), max_new_tokens=8, eos_token_id=end, pad_token_id=63)[:, 10:]
    assert stopped[0, :3].tolist() == free[0, :3].tolist()
    assert set(stopped[0, 3:].tolist()) <= {63}
    ends = sorted({int(row[1]) for row in free})
    assert model.generate(**batch(), max_new_tokens=8, eos_token_id=ends).shape[1] <= 12


def test_limits_count_new_tokens_or_all_of_them(model: Idefics3ForConditionalGeneration) -> None:
    ids = torch.tensor([[5, 6, 7]])
    assert model.generate(ids, max_length=5, eos_token_id=[]).shape == (1, 5)
    assert model.generate(ids, max_new_tokens=1).shape == (1, 4)
    assert model.generate(ids, max_new_tokens=4, max_length=3, eos_token_id=[]).shape == (1, 7)
    assert model.generate(ids, eos_token_id=[]).shape == (1, 23), "20 new tokens where nothing is said"
    with pytest.raises(ValueError, match="prompt has 3 tokens, max_length is 3"):
        model.generate(ids, max_length=3)


def test_embeddings_alone_give_only_what_follows(model: Idefics3ForConditionalGeneration) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    embedded = model.get_input_embeddings()(ids)
    whole = model.generate(ids, max_new_tokens=5)
    assert torch.equal(model.generate(inputs_embeds=embedded, max_new_tokens=5), whole[:, 4:])


def test_features_in_place_of_pixels_give_the_same_tokens(model: Idefics3ForConditionalGeneration) -> None:
    inputs = batch()
    with torch.no_grad():
        features = model(**inputs).image_hidden_states
    wanted = model.generate(**inputs, max_new_tokens=6)
    del inputs["pixel_values"]
    assert torch.equal(model.generate(**inputs, image_hidden_states=features, max_new_tokens=6), wanted)


def test_a_streamer_gets_the_prompt_and_every_step_and_a_function_the_steps(
    model: Idefics3ForConditionalGeneration,
) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.put_in: list[list[int]] = []
            self.ended = 0

        def put(self, value: torch.Tensor) -> None:
            self.put_in.append(value.flatten().tolist())

        def end(self) -> None:
            self.ended += 1

    ids = torch.tensor([[5, 6, 7]])
    recorder, steps = Recorder(), []
    out = model.generate(ids, max_new_tokens=4, eos_token_id=[], streamer=recorder)
    model.generate(ids, max_new_tokens=4, eos_token_id=[], streamer=lambda tokens: steps.append(tokens.tolist()))
    assert recorder.put_in == [[5, 6, 7]] + [[token] for token in out[0, 3:].tolist()]
    assert recorder.ended == 1
    assert steps == recorder.put_in[1:]


def test_only_the_likeliest_tokens_can_be_drawn() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, 1)
    generator = torch.Generator().manual_seed(0)

    def drawn(**settings: Any) -> set[int]:
        return set(choose(logits, GenerationConfig(do_sample=True, **settings), generator).tolist())

    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=2) == {0, 1}
    assert drawn(top_p=0.79) == {0, 1}, "0.5 alone is below 0.79, 0.5 + 0.3 reaches it"
    assert drawn(top_p=0.5) == {0}
    assert drawn(top_p=0.81) == {0, 1, 2}
    assert drawn(suppress_tokens=(0, 1)) == {2, 3}
    assert drawn(temperature=0.01) == {0}


def test_frequencies_follow_the_temperature() -> None:
    logits = torch.log(torch.tensor([[0.8, 0.2]])).repeat(20000, 1)
    generator = torch.Generator().manual_seed(0)
    tokens = choose(logits, GenerationConfig(do_sample=True, temperature=2.0), generator)
    wanted = 0.2**0.5 / (0.2**0.5 + 0.8**0.5)
    assert float(tokens.double().mean()) == pytest.approx(wanted, abs=0.02)


def test_the_same_seed_draws_the_same_tokens(model: Idefics3ForConditionalGeneration) -> None:
    ids = torch.tensor([[5, 6, 7]])
    settings: dict[str, Any] = {"do_sample": True, "temperature": 5.0, "max_new_tokens": 12, "eos_token_id": []}
    first = model.generate(ids, seed=1, **settings)
    assert torch.equal(first, model.generate(ids, generator=torch.Generator().manual_seed(1), **settings))
    assert not torch.equal(first, model.generate(ids, seed=2, **settings))


def test_generation_config_json_is_honoured(model: Idefics3ForConditionalGeneration, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    free = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, eos_token_id=[])[0, 3:].tolist()
    settings = {"eos_token_id": [61, 62], "max_new_tokens": 4, "bad_words_ids": [[free[0]]], "do_sample": False}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    loaded = Idefics3ForConditionalGeneration.from_pretrained(tmp_path, dtype="float64")
    assert loaded.generation_config.eos_token_id == (61, 62)
    out = loaded.generate(torch.tensor([[5, 6, 7]]))
    assert out.shape[1] <= 7
    assert free[0] not in out[0, 3:].tolist(), "a forbidden token was chosen"
    loaded.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert {key: again[key] for key in ("eos_token_id", "max_new_tokens", "bad_words_ids")} == {
        key: settings[key] for key in ("eos_token_id", "max_new_tokens", "bad_words_ids")
    }
    assert GenerationConfig.from_dict(again).suppress_tokens == (free[0],)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_beams": 4}, "num_beams is 4"),
        ({"repetition_penalty": 1.2}, "repetition_penalty is 1.2"),
        ({"bad_words_ids": [[1, 2]]}, "bad_words_ids"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -1}, "top_k is -1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokns": 3}, "does not know 'max_new_tokns'"),
    ],
)
def test_settings_that_are_not_offered_or_out_of_range_are_refused(
    model: Idefics3ForConditionalGeneration, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        model.generate(torch.tensor([[5]]), **settings)


def test_logits_that_are_not_finite_are_refused_and_not_chosen_from() -> None:
    logits = torch.zeros(1, 4)
    logits[0, 2] = float("nan")
    with pytest.raises(ValueError, match="1 of 4 logits are not finite"):
        choose(logits, GenerationConfig())
