"""The fixtures of Idefics are what their recipe, the documents and independent readers say."""

from __future__ import annotations

import json
import struct
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from vlmqual_adapters import vocabulary_idefics as vocabulary
from vlmqual_adapters.cases_idefics import CASES, chat
from vlmqual_adapters.recipes_idefics import RELEASED_GEOMETRY, RESAMPLER_TINY
from vlmqual_adapters.recipes_idefics import TINY as TINY_NAME
from vlmqual_adapters.vocabulary import END_OF_UTTERANCE, FAKE, IMAGE
from vlmqual_contract import fixtures

ROOT = fixtures.root()
TINY, RESAMPLER, RELEASED = (ROOT / "checkpoints" / name for name in (TINY_NAME, RESAMPLER_TINY, RELEASED_GEOMETRY))
GOLDENS = sorted((ROOT / "goldens" / "idefics").glob("*.npz"))
IDS = vocabulary.token_ids()


def _json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def _ledger(name: str) -> dict[str, Any]:
    entries: dict[str, Any] = _json(ROOT / "goldens" / "idefics" / name)["entries"]
    return entries


@cache
def _golden(name: str) -> dict[str, Any]:
    with np.load(ROOT / "goldens" / "idefics" / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


@cache
def _weights(checkpoint: Path) -> dict[str, Any]:
    data = (checkpoint / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    found = {}
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name == "__metadata__":
            continue
        assert entry["dtype"] == "BF16", f"{name} is {entry['dtype']}"
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        bits = np.frombuffer(data[begin:end], "<u2").astype(np.uint32) << 16
        found[name] = bits.view(np.float32).reshape(entry["shape"])
    return found


# checkpoints ---------------------------------------------------------------------------------------------------------


def test_the_checkpoints_have_the_tensors_of_the_documented_layout() -> None:
    # A vision layer has 16 tensors, a text layer 9, a cross-attention block 11 (13 with norms of queries and keys), a
    # block of the resampler 13 (17 with norms); 7 of the tower and 5 of the text side stand outside of layers.
    assert len(_weights(TINY)) == 3 * 16 + 6 * 9 + 3 * 11 + 7 + 5
    assert len(_weights(RESAMPLER)) == 3 * 16 + 4 * 9 + 4 * 13 + (2 * 17 + 3) + 7 + 5 - 2
    assert _weights(TINY)["model.vision_model.embeddings.position_embedding.weight"].shape == (17, 32)
    assert _weights(RESAMPLER)["model.perceiver_resampler.latents"].shape == (6, 32)
    for checkpoint in (TINY, RESAMPLER):
        assert _weights(checkpoint)["model.embed_tokens.weight"].shape == (600, 48)
        assert _weights(checkpoint)["model.embed_tokens.additional_embedding.weight"].shape == (2, 48)
        assert _weights(checkpoint)["lm_head.additional_fc.weight"].shape == (2, 48)


def test_every_weight_is_finite_and_varied() -> None:
    for name, values in {**_weights(TINY), **_weights(RESAMPLER)}.items():
        assert np.isfinite(values).all(), f"{name} is not finite"
        assert values.size == 1 or values.std() > 0, f"{name} is not varied"
        if name.endswith("bias"):
            assert (values != 0).all(), f"{name}: a zero bias would hide a forgotten one"


@pytest.mark.parametrize(("checkpoint", "shape"), [(TINY, (1,)), (RESAMPLER, (1, 1, 48))], ids=["float", "vector"])
def test_every_gate_is_open_and_not_like_another(checkpoint: Path, shape: tuple[int, ...]) -> None:
    gates = {name: np.tanh(values) for name, values in _weights(checkpoint).items() if ".alpha_" in name}
    assert {values.shape for values in gates.values()} == {shape}
    for name, values in gates.items():
        assert values.min() > 0.3, f"tanh of {name} goes down to {values.min()}; a forgotten gate has to be seen"
        assert values.max() < 0.9, f"tanh of {name} goes up to {values.max()}; a forgotten gate has to be seen"
    means = [float(values.mean()) for values in gates.values()]
    assert len(set(means)) == len(means), "two gates are equal, so an exchange of them would not be seen"


@pytest.mark.parametrize("checkpoint", [TINY, RESAMPLER], ids=lambda path: path.name)
def test_sizes_fit_each_other_and_every_tensor_parallel_size(checkpoint: Path) -> None:
    config = _json(checkpoint / "config.json")
    vision, perceiver = config["vision_config"], config["perceiver_config"]
    heads = (vision["num_attention_heads"], config["num_attention_heads"], perceiver["resampler_n_heads"])
    assert all(count % 4 == 0 for count in heads)
    assert config["num_hidden_layers"] % config["cross_layer_interval"] == 0
    assert vision["embed_dim"] != config["hidden_size"], "keys of images come from another width than queries"
    assert perceiver["resampler_n_heads"] * perceiver["resampler_head_dim"] != vision["embed_dim"]
    assert config["vocab_size"] == 600
    assert config["vocab_size"] % 4 == 0


def test_the_two_checkpoints_differ_in_every_switch() -> None:
    plain, resampled = (_json(path / "config.json") for path in (TINY, RESAMPLER))
    for key in ("alpha_type", "cross_layer_interval", "qk_layer_norms", "use_resampler"):
        assert plain[key] != resampled[key]
    keys = [config["perceiver_config"]["qk_layer_norms_perceiver"] for config in (plain, resampled)]
    assert keys == [False, True]


def test_the_released_geometry_is_that_of_the_9b_model() -> None:
    config, pixels = (_json(RELEASED / name) for name in ("config.json", "preprocessor_config.json"))
    assert (config["vision_config"]["image_size"] // config["vision_config"]["patch_size"]) ** 2 == 256
    assert (config["num_hidden_layers"], config["cross_layer_interval"], config["additional_vocab_size"]) == (32, 4, 2)
    assert pixels["image_size"] == 224
    assert pixels["image_mean"] == [0.48145466, 0.4578275, 0.40821073]
    assert pixels["image_std"] == [0.26862954, 0.26130258, 0.27577711]
    assert not list(RELEASED.glob("*.safetensors"))


# tokenizer -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return Tokenizer.from_file(str(TINY / "tokenizer.json"))


@pytest.mark.parametrize("text", ["Hello, world!", "  two  spaces\n\nand lines\n", "Größe 東京 ½ 🙂"])
def test_text_comes_back_from_its_tokens(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text
    assert min(ids) > 2
    assert max(ids) < 599, f"{text!r} has a special token: {ids}"


def test_special_tokens_have_their_places(tokenizer: Any) -> None:
    assert IDS == {"<unk>": 0, "<s>": 1, "</s>": 2, END_OF_UTTERANCE: 599, FAKE: 600, IMAGE: 601}
    for marker, index in IDS.items():
        assert tokenizer.token_to_id(marker) == index
        assert index in tokenizer.encode(f"a{marker}b").ids, f"{marker} is not kept whole"
    assert tokenizer.get_vocab_size() == 602
    assert tokenizer.encode("a").ids[0] == IDS["<s>"], "without the processor a text begins with its first token"


def test_only_the_tiny_tokenizers_were_trained_on_conversations() -> None:
    listed = [
        _json(path / "tokenizer_config.json")["additional_special_tokens"] for path in (TINY, RESAMPLER, RELEASED)
    ]
    assert [END_OF_UTTERANCE in tokens for tokens in listed] == [True, True, False]


# goldens -------------------------------------------------------------------------------------------------------------


def _mask_by_rule(ids: Any, slots: int) -> Any:
    """The mask of the rule (IDEFICS-PROC-021): a token sees the last image up to it, unless an end came between."""
    dense = np.zeros((*ids.shape, slots), np.int64)
    for row, column in np.ndindex(ids.shape):
        images = np.flatnonzero(ids[row, : column + 1] == IDS[IMAGE])
        if len(images) and not (ids[row, images[-1] : column] == IDS["</s>"]).any():
            dense[row, column, len(images) - 1] = 1
    return dense


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_golden_tensors_fit_each_other(path: Path) -> None:
    gold = _golden(path.stem)
    ids, mask = gold["inputs/input_ids"], gold["inputs/attention_mask"]
    batch = ids.shape[0]
    assert mask.shape == ids.shape
    assert gold["prefill/logits"].shape == (batch, 602)
    steps = 40 if path.stem == "across-blocks" else 16
    assert gold["decode/logits"].shape == (steps, batch, 602)
    assert np.array_equal(gold["decode/tokens"][0], gold["prefill/logits"].argmax(-1)), "forced tokens are greedy"
    assert np.array_equal(gold["decode/tokens"][1:], gold["decode/logits"][:-1].argmax(-1)), "forced tokens are greedy"
    assert all(len(set(row.tolist())) >= 4 for row in gold["decode/tokens"].T), "greedy tokens are all alike"
    if "prefill/all_logits" in gold:
        last = (np.arange(ids.shape[1]) * mask).argmax(-1)
        assert np.array_equal(gold["prefill/all_logits"][np.arange(batch), last], gold["prefill/logits"])
        assert not gold["prefill/all_logits"][mask == 0].any(), "positions of padding are stored as 0"
    for name, value in gold.items():
        assert value.dtype.kind != "f" or np.isfinite(value).all(), f"{name} is not finite"
    slots = gold["inputs/pixel_values"].shape[1]
    assert gold["inputs/image_attention_mask"].shape == (*ids.shape, slots)
    resampled = path.stem.startswith("resampler-")
    high = 1 + int(np.prod([side // 14 for side in gold["inputs/pixel_values"].shape[-2:]]))
    name = "perceiver_embeddings" if resampled else "image_encoder_embeddings"
    assert gold[f"features/{name}"].shape == (batch, slots, 6 if resampled else high, 32)


@pytest.mark.parametrize(
    "name", [c.name for c in CASES if "mask" not in c.name and c.name != "no-image-seen"], ids=lambda name: name
)
def test_the_masks_over_images_are_those_of_the_rule(name: str) -> None:
    gold = _golden(name)
    mask = gold["inputs/image_attention_mask"]
    assert np.array_equal(mask, _mask_by_rule(gold["inputs/input_ids"], mask.shape[-1]))


@pytest.mark.parametrize("key", [key for key in _ledger("prompts.json") if key.startswith("tokens|")])
def test_prompt_goldens_follow_the_rules_of_masks_and_markers(key: str) -> None:
    entry = _ledger("prompts.json")[key]
    ids, mask = np.array(entry["input_ids"]), np.array(entry["image_attention_mask"])
    assert entry["made_by"] == "transformers 4.46.3"
    assert np.array_equal(mask, _mask_by_rule(ids, mask.shape[-1]))
    for row, asked in zip(ids, entry["rows"], strict=True):
        images = np.flatnonzero(row == IDS[IMAGE])
        assert len(images) == len(asked["images"])
        # Every image stands between two of the other token, which neighbours share.
        assert all(row[place - 1] == row[place + 1] == IDS[FAKE] for place in images)
        shared = sum(b - a == 2 for a, b in pairwise(images))
        assert (row == IDS[FAKE]).sum() == 2 * len(images) - shared


def test_the_number_of_images_goes_from_none_to_three() -> None:
    counts = {len(names) for case in CASES for _, names in case.rows}
    assert counts == {0, 1, 2, 3}


def test_goldens_cover_the_cases_and_name_their_checkpoints() -> None:
    assert {path.stem for path in GOLDENS} == {case.name for case in CASES}
    for path in GOLDENS:
        meta = json.loads(str(_golden(path.stem)["meta"]))
        checkpoint = RESAMPLER_TINY if path.stem.startswith("resampler-") else TINY_NAME
        assert (meta["case"], meta["family"], meta["checkpoint"]) == (path.stem, "idefics", checkpoint)


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_noise_is_the_worst_arm_and_grows_as_precision_falls(path: Path) -> None:
    gold = _golden(path.stem)
    for column, name in enumerate(gold["arms/tensors"].tolist()):
        dtypes = ("float64", "float32", "float16", "bfloat16")
        if name not in gold and name != "chain/logits":  # judged by nothing, see `unwanted` in the maker
            continue
        noise = [float(gold[f"noise/{dtype}/{name}"]) for dtype in dtypes]
        for dtype, value in zip(dtypes, noise, strict=True):
            assert gold[f"arms/{dtype}/errors"][:, column].max() <= value, f"{name}: an arm is above the noise"
        # The library's rotary tables are float32 in float64 too; after hundreds of positions they are all of the noise.
        noise[0] /= 1.05 if path.stem == "text-long" else 1.0
        assert noise == sorted(noise), f"{name}: noise in {', '.join(dtypes)} is {noise}"
        # Rotary angles in float32 grow less exact with the position: one unit in the last place of 300 is 3e-5.
        assert noise[1] < (1.5e-5 if path.stem == "text-long" else 5e-6), f"{name}: float32 noise is {noise[1]}"
        assert noise[3] < 0.1, f"{name}: bfloat16 noise is {noise[3]}"
    column = gold["arms/tensors"].tolist().index("prefill/logits")
    assert len(set(gold["arms/bfloat16/errors"][:, column].tolist())) >= 4, "arms have to differ from each other"


def test_padding_on_either_side_gives_the_same_gold() -> None:
    left, right = (_golden(f"batch-{side}") for side in ("left", "right"))
    assert left["inputs/attention_mask"][1, 0] == 0
    assert right["inputs/attention_mask"][1, -1] == 0
    for name in ("prefill/logits", "decode/logits", "features/image_encoder_embeddings"):
        assert np.abs(left[name] - right[name]).max() < 1e-8, f"{name} depends on the side of the padding"


def test_masks_by_hand_are_of_every_kind() -> None:
    mask = _golden("hand-masks")["inputs/image_attention_mask"][0]
    assert {(0, 0), (1, 0), (0, 1), (1, 1)} == {tuple(row) for row in mask.tolist()}
    assert not _golden("no-image-seen")["inputs/image_attention_mask"].any()


def test_high_resolutions_are_interpolated_and_one_is_not_square() -> None:
    for name, size in (("high-resolution", (84, 84)), ("resampler-high-resolution", (70, 98))):
        gold = _golden(name)
        assert gold["inputs/pixel_values"].shape[-2:] == size
        assert gold["inputs/interpolate_pos_encoding"].tolist() == [1]


def test_gold_depends_on_the_image_far_beyond_any_noise() -> None:
    name = "features/image_encoder_embeddings"
    one, other = (_golden("two-images")[name][0, index] for index in range(2))
    away = np.linalg.norm(one - other) / np.linalg.norm(one)
    assert away > 20 * _golden("two-images")[f"noise/bfloat16/{name}"], f"two photographs differ by {away}"


def test_every_image_has_pixel_goldens_and_the_stand_in_says_why() -> None:
    entries = _ledger("pixels.json")
    for path in (ROOT / "images").glob("*.*"):
        for checkpoint, side in ((TINY_NAME, 56), (RELEASED_GEOMETRY, 224)):
            if path.suffix != ".md":
                entry = entries[f"{path.name}|{checkpoint}|path"]
                assert entry["pixel_values"]["shape"] == [1, 3, side, side]
    for key, entry in entries.items():
        assert entry["made_by"] == "transformers 4.46.3" or entry.get("why"), f"{key}: no reason for {entry['made_by']}"
    assert all(f"edge-{name}|{TINY_NAME}|pil" in entries for name in ("rgba.png", "cmyk.tif", "palette.png"))


def test_a_conversation_is_written_as_the_instruct_model_knows_it() -> None:
    end = END_OF_UTTERANCE
    assert chat("<image>a", "b", " c") == f"User:<image>a{end}\nAssistant:b{end}\nUser: c{end}\nAssistant:"
