"""Mllama's fixtures are what their recipe, the documents and independent readers say."""

from __future__ import annotations

import json
import struct
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jinja2 import Environment
from PIL import Image
from tokenizers import Tokenizer

from vlmqual_adapters import vocabulary_mllama as vocabulary
from vlmqual_adapters.cases_mllama import CASES
from vlmqual_adapters.recipes_mllama import RELEASED_GEOMETRY
from vlmqual_adapters.recipes_mllama import TINY as TINY_NAME
from vlmqual_contract import fixtures

ROOT = fixtures.root()
TINY = ROOT / "checkpoints" / TINY_NAME
RELEASED = ROOT / "checkpoints" / RELEASED_GEOMETRY
GOLDENS = sorted((ROOT / "goldens" / "mllama").glob("*.npz"))
IDS = vocabulary.token_ids()
MARKER, BEGIN = IDS[vocabulary.IMAGE], IDS[vocabulary.BOS]


def _json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def _ledger(name: str) -> dict[str, Any]:
    entries: dict[str, Any] = _json(ROOT / "goldens" / "mllama" / name)["entries"]
    return entries


@cache
def _golden(name: str) -> dict[str, Any]:
    with np.load(ROOT / "goldens" / "mllama" / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


@cache
def _weights() -> dict[str, Any]:
    data = (TINY / "model.safetensors").read_bytes()
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


def test_the_checkpoint_has_the_tensors_of_the_documented_layout() -> None:
    weights = _weights()
    # A vision layer has 12 tensors (two of them more with gates), a text layer 9, a cross-attention layer 13.
    assert len(weights) == 5 * 12 + 2 * 14 + 4 * 9 + 2 * 13 + 18, "a tensor is missing or too many"
    assert weights["vision_model.gated_positional_embedding.embedding"].shape == (17, 48)
    assert weights["vision_model.gated_positional_embedding.tile_embedding.weight"].shape == (9, 4 * 17 * 48)
    assert weights["vision_model.pre_tile_positional_embedding.embedding.weight"].shape == (9, 4 * 48)
    assert weights["multi_modal_projector.weight"].shape == (64, 192)
    crossing = {int(name.split(".")[3]) for name in weights if ".cross_attn." in name}
    assert crossing == {1, 4}


def test_the_image_token_has_a_row_of_the_embedding_and_no_logit() -> None:
    # MLLAMA-CFG-012
    config = _json(TINY / "config.json")
    size = config["text_config"]["vocab_size"]
    assert config["image_token_index"] == size == MARKER
    assert _weights()["language_model.model.embed_tokens.weight"].shape == (size + 8, 64)
    assert _weights()["language_model.lm_head.weight"].shape == (size, 64)


def test_every_weight_is_finite_and_varied() -> None:
    for name, values in _weights().items():
        assert np.isfinite(values).all(), f"{name} is not finite"
        assert values.size == 1 or values.std() > 0, f"{name} is not varied"
        if name.endswith("bias"):
            assert (values != 0).all(), f"{name}: a zero bias would hide a forgotten one"


def test_every_gate_is_open_and_not_like_another() -> None:
    gates = {name: float(np.tanh(values[0])) for name, values in _weights().items() if values.shape == (1,)}
    assert len(gates) == 3 + 2 * 2 + 2 * 2, f"gates are {', '.join(gates)}"
    for name, value in gates.items():
        assert 0.3 < value < 0.9, f"tanh of {name} is {value}; too near to 0 or to 1 to show a forgotten gate"
    # This gate divides two terms between g and 1 - g; near one half an exchange of them would not be seen in bfloat16.
    assert abs(gates["vision_model.gated_positional_embedding.gate"] - 0.5) > 0.1
    assert len(set(gates.values())) == len(gates), "two gates are equal, so an exchange of them would not be seen"


def test_sizes_fit_each_other_and_every_tensor_parallel_size() -> None:
    config = _json(TINY / "config.json")
    vision, text = config["vision_config"], config["text_config"]
    kept = vision["intermediate_layers_indices"]
    assert vision["vision_output_dim"] == vision["hidden_size"] * (1 + len(kept))  # MLLAMA-VIS-005
    assert max(kept) < vision["num_hidden_layers"], "both readings of an index need a layer"
    for heads in (vision["attention_heads"], text["num_attention_heads"], text["num_key_value_heads"]):
        assert heads % 4 == 0
    assert text["num_key_value_heads"] < text["num_attention_heads"]
    assert 0 not in text["cross_attention_layers"]
    assert (vision["image_size"] // vision["patch_size"]) ** 2 % 8 == 0, "one class position more needs padding to 8"


@pytest.mark.parametrize("checkpoint", [TINY, RELEASED], ids=lambda path: path.name)
def test_supported_arrangements_are_all_with_at_most_four_tiles_in_order(checkpoint: Path) -> None:
    # MLLAMA-CFG-014
    every = [[high, wide] for high in range(1, 5) for wide in range(1, 5) if high * wide <= 4]
    assert _json(checkpoint / "config.json")["vision_config"]["supported_aspect_ratios"] == every


def test_each_branch_of_the_rotary_scaling_holds_for_some_frequency() -> None:
    text = _json(TINY / "config.json")["text_config"]
    rope, head = text["rope_scaling"], text["hidden_size"] // text["num_attention_heads"]
    lengths = 2 * np.pi * text["rope_theta"] ** (np.arange(0, head, 2) / head)
    context = rope["original_max_position_embeddings"]
    short, long = context / rope["high_freq_factor"], context / rope["low_freq_factor"]
    assert (lengths < short).any(), "no frequency is left as it is"
    assert (lengths > long).any(), "no frequency is slowed by the whole factor"
    assert ((lengths > short) & (lengths < long)).any(), "the smooth branch is never taken"
    assert _golden("text-long")["inputs/input_ids"].shape[1] > context


def test_the_released_geometry_is_that_of_the_11b_model() -> None:
    config, pixels = (_json(RELEASED / name) for name in ("config.json", "preprocessor_config.json"))
    vision, text = config["vision_config"], config["text_config"]
    assert (vision["image_size"] // vision["patch_size"]) ** 2 + 1 == 1601
    assert vision["vision_output_dim"] == 1280 * 6  # MLLAMA-CFG-013
    assert (text["num_hidden_layers"], len(text["cross_attention_layers"])) == (40, 8)
    assert pixels["size"] == {"height": 560, "width": 560}
    assert pixels["image_mean"] == [0.48145466, 0.4578275, 0.40821073]
    assert pixels["resample"] == Image.Resampling.BILINEAR
    assert not list(RELEASED.glob("*.safetensors"))


# tokenizer -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return Tokenizer.from_file(str(TINY / "tokenizer.json"))


@pytest.mark.parametrize("text", ["Hello, world!", "  two  spaces\n\nand lines\n", "Größe 東京 ½ 🙂"])
def test_text_comes_back_from_its_tokens_and_nothing_is_put_before_it(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert max(ids) < 256 + 320, f"{text!r} has a special token: {ids}"


def test_markers_are_one_token_and_the_image_is_the_last(tokenizer: Any) -> None:
    for marker, index in IDS.items():
        assert tokenizer.encode(f"a{marker}b").ids[1] == index, f"{marker} is not kept whole"
    assert tokenizer.get_vocab_size() == MARKER + 1


def test_rows_are_padded_on_the_left_with_a_token_of_its_own() -> None:
    settings = _json(TINY / "tokenizer_config.json")
    assert settings["padding_side"] == "left"
    assert settings["pad_token"] not in (settings["bos_token"], settings["eos_token"])
    assert _json(TINY / "generation_config.json")["eos_token_id"] == [IDS["<|end_of_text|>"], IDS["<|eot_id|>"]]


def test_the_chat_template_writes_headers_items_and_ends_of_turns() -> None:
    environment = Environment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_json(TINY / "chat_template.json")["chat_template"])
    image, words = {"type": "image"}, {"type": "text", "text": "What is it?"}
    turns = [{"role": "user", "content": [image, words]}, {"role": "assistant", "content": "A cup."}]
    assert template.render(messages=turns, add_generation_prompt=False) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<|image|>What is it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA cup.<|eot_id|>"
    )
    asked = template.render(messages=turns[:1], add_generation_prompt=True)
    assert asked.endswith("<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n")


# goldens -------------------------------------------------------------------------------------------------------------


def _mask_by_rule(ids: Any, tiles: list[list[int]]) -> Any:
    """The mask of the rule, for padded ids (B, S) and the real tiles of each row's images."""
    most = max(len(row) for row in tiles)
    dense = np.zeros((*ids.shape, most, 4), np.int64)
    for row, counts in enumerate(tiles):
        places = np.flatnonzero(ids[row] == MARKER).tolist()
        assert len(places) == len(counts), f"row {row} has {len(places)} markers and {len(counts)} images"
        for slot, (place, count) in enumerate(zip(places, counts, strict=True)):
            # An image ends where the next begins that does not stand in the same run of markers.
            after = [p for p in places if p > place and p - 1 not in places]
            dense[row, place : after[0] if after else None, slot, :count] = 1
    return dense


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_golden_tensors_fit_each_other(path: Path) -> None:
    gold = _golden(path.stem)
    ids, mask = gold["inputs/input_ids"], gold["inputs/attention_mask"]
    batch = ids.shape[0]
    assert mask.shape == ids.shape
    assert gold["prefill/logits"].shape == (batch, 600)
    steps = 40 if path.stem == "across-blocks" else 16
    assert gold["decode/logits"].shape == (steps, batch, 600)
    assert np.array_equal(gold["decode/tokens"][0], gold["prefill/logits"].argmax(-1)), "forced tokens are greedy"
    assert np.array_equal(gold["decode/tokens"][1:], gold["decode/logits"][:-1].argmax(-1)), "forced tokens are greedy"
    assert all(len(set(row.tolist())) >= 4 for row in gold["decode/tokens"].T), "greedy tokens are all alike"
    if "prefill/all_logits" in gold:
        last = (np.arange(ids.shape[1]) * mask).argmax(-1)
        assert np.array_equal(gold["prefill/all_logits"][np.arange(batch), last], gold["prefill/logits"])
        assert not gold["prefill/all_logits"][mask == 0].any(), "positions of padding are stored as 0"
    for name, value in gold.items():
        assert value.dtype.kind != "f" or np.isfinite(value).all(), f"{name} is not finite"
    if "inputs/pixel_values" not in gold:
        assert not [name for name in gold if "cross_attention" in name or "aspect_ratio" in name]
        return
    slots = gold["inputs/aspect_ratio_ids"].shape[1]
    assert gold["inputs/pixel_values"].shape == (batch, slots, 4, 3, 56, 56)
    assert gold["inputs/aspect_ratio_mask"].shape == (batch, slots, 4)
    assert gold["inputs/cross_attention_mask"].shape == (*ids.shape, slots, 4)
    assert gold["features/cross_attention_states"].shape == (batch, slots * 4 * 17, 64)


@pytest.mark.parametrize("case", [c for c in CASES if c.change is None and c.rows[0][1]], ids=lambda case: case.name)
def test_the_masks_over_tiles_are_those_of_the_rule(case: Any) -> None:
    # MLLAMA-PROC-017 and -018: worked out again from markers and numbers of tiles.
    gold = _golden(case.name)
    real = gold["inputs/aspect_ratio_ids"] != 0
    counts = gold["inputs/aspect_ratio_mask"].sum(-1)
    tiles = [counts[row][real[row]].tolist() for row in range(len(case.rows))]
    assert np.array_equal(gold["inputs/cross_attention_mask"], _mask_by_rule(gold["inputs/input_ids"], tiles))


@pytest.mark.parametrize(
    ("name", "ids", "tiles"),
    [
        ("photo-one-tile", [[1]], [[1]]),
        ("two-tiles-wide", [[2]], [[2]]),
        ("three-tiles", [[3]], [[3]]),
        ("column-of-tiles", [[8]], [[4]]),
        ("photo-four-tiles", [[6]], [[4]]),
        ("four-images", [[1, 2, 3, 6]], [[1, 2, 3, 4]]),
        ("batch-left", [[6, 3], [6, 0]], [[4, 3], [4, 1]]),
        ("text-beside-image", [[0], [6]], [[1], [4]]),
    ],
)
def test_cases_have_the_arrangements_that_they_are_named_after(
    name: str, ids: list[list[int]], tiles: list[list[int]]
) -> None:
    gold = _golden(name)
    assert gold["inputs/aspect_ratio_ids"].tolist() == ids
    assert gold["inputs/aspect_ratio_mask"].sum(-1).tolist() == tiles  # a missing image counts one (MLLAMA-IMG-023)


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_noise_is_the_worst_arm_and_grows_as_precision_falls(path: Path) -> None:
    gold = _golden(path.stem)
    for column, name in enumerate(gold["arms/tensors"].tolist()):
        dtypes = ("float64", "float32", "float16", "bfloat16")
        if f"noise/float64/{name}" not in gold:
            continue
        noise = [float(gold[f"noise/{dtype}/{name}"]) for dtype in dtypes]
        for dtype, value in zip(dtypes, noise, strict=True):
            assert gold[f"arms/{dtype}/errors"][:, column].max() <= value, f"{name}: an arm is above the noise"
        assert noise == sorted(noise), f"{name}: noise in {', '.join(dtypes)} is {noise}"
        assert noise[1] < 5e-6, f"{name}: float32 noise is {noise[1]}"
        assert noise[3] < 0.1, f"{name}: bfloat16 noise is {noise[3]}"


def test_goldens_cover_the_cases_of_the_specification() -> None:
    assert {path.stem for path in GOLDENS} == {case.name for case in CASES}
    for path in GOLDENS:
        meta = json.loads(str(_golden(path.stem)["meta"]))
        assert (meta["case"], meta["family"], meta["checkpoint"]) == (path.stem, "mllama", TINY_NAME)


def test_padding_on_either_side_gives_the_same_gold() -> None:
    left, right = (_golden(f"batch-{side}") for side in ("left", "right"))
    assert left["inputs/attention_mask"][1, 0] == 0
    assert right["inputs/attention_mask"][1, -1] == 0
    for name in ("prefill/logits", "decode/logits", "features/cross_attention_states"):
        assert np.abs(left[name] - right[name]).max() < 1e-8, f"{name} depends on the side of the padding"


def test_masks_by_hand_are_of_every_kind() -> None:
    gold = _golden("hand-masks")
    mask = gold["inputs/cross_attention_mask"][0]
    start = int(np.argmax(mask.any(axis=(1, 2))))
    sums = {tuple(row.sum(-1).tolist()) for row in mask[start:]}
    assert {(1, 0), (1, 1), (4, 4), (0, 0)} <= sums, f"tiles seen of both images: {sorted(sums)}"


def test_padding_tiles_hold_noise_and_stay_masked() -> None:
    gold = _golden("padding-tiles")
    masked = gold["inputs/aspect_ratio_mask"] == 0
    assert masked.sum() == 3 + 1
    assert gold["inputs/pixel_values"][masked].std(axis=(1, 2, 3)).min() > 0.4
    plain = _golden("photo-one-tile")["inputs/pixel_values"]
    assert not plain[_golden("photo-one-tile")["inputs/aspect_ratio_mask"] == 0].any(), "padding tiles are 0 elsewhere"


def test_kept_states_are_interleaved_and_enter_the_layers_of_their_indices() -> None:
    # MLLAMA-TOWER-011
    gold = _golden("three-tiles")
    kept = gold["taps/vision/vision.intermediate_states"]
    assert kept.shape == (1, 4, 17, 3 * 48)
    # The normative rule: index i is the state that enters layer i, so that layer i - 1 leaves it.
    for place, index in enumerate((1, 2, 4)):
        entering = gold[f"taps/vision/vision.layers.{index - 1}"]
        assert np.array_equal(kept[..., place::3], entering), f"kept state {place} is not what enters layer {index}"
        leaving = gold[f"taps/vision/vision.layers.{index}"]
        assert np.abs(kept[..., place::3] - leaving).max() > 0.1, "both readings of an index would agree"


def test_skipped_layers_have_no_tap_in_a_text_without_images() -> None:
    layers = {name.rpartition(".")[2] for name in _golden("text-only") if name.startswith("taps/prefill/text.layers")}
    assert layers == {"0", "2", "3", "5"}


def test_gold_depends_on_the_image_far_beyond_any_noise() -> None:
    features = [_golden(name)["features/cross_attention_states"][0] for name in ("photo-four-tiles", "three-tiles")]
    away = np.linalg.norm(features[0] - features[1]) / np.linalg.norm(features[0])
    assert away > 10 * float(_golden("three-tiles")["noise/bfloat16/features/cross_attention_states"])


def test_a_row_without_images_has_a_padding_image_that_no_token_may_see() -> None:
    gold = _golden("text-beside-image")
    assert gold["inputs/aspect_ratio_mask"][0].tolist() == [[1, 0, 0, 0]]
    assert not gold["inputs/pixel_values"][0].any()
    assert not gold["inputs/cross_attention_mask"][0].any()
    assert gold["inputs/cross_attention_mask"][1].any(axis=(1, 2))[-1]


# pixels and prompts --------------------------------------------------------------------------------------------------


# By the rule of the tile canvas, worked out by hand: aspect ratio id and number of tiles for tiles of 56 pixels.
@pytest.mark.parametrize(
    ("image", "checkpoint", "ratio", "tiles"),
    [
        ("edge-3x3.png", TINY_NAME, 1, 1),
        ("edge-50x3.png", TINY_NAME, 1, 1),  # every scale is above 1, the smallest is that of one tile
        ("edge-224x112.png", TINY_NAME, 2, 2),  # all scales are below 1; 1/2 is the largest, for 1 x 2 and larger
        ("edge-5000x40.png", TINY_NAME, 4, 4),
        ("edge-40x5000.png", TINY_NAME, 8, 4),
        ("edge-112x112.png", TINY_NAME, 6, 4),  # 2 x 2 fits exactly
        ("edge-448x448.png", RELEASED_GEOMETRY, 1, 1),
        ("edge-728x364.png", RELEASED_GEOMETRY, 2, 2),
        ("edge-exif-6.png", TINY_NAME, 6, 4),  # 120 x 80 turned: 2 x 2 gives 112/120
    ],
)
def test_pixel_goldens_have_the_canvas_of_the_rule(image: str, checkpoint: str, ratio: int, tiles: int) -> None:
    entry = _ledger("pixels.json")[f"{image}|{checkpoint}|path"]
    side = _json(ROOT / "checkpoints" / checkpoint / "config.json")["vision_config"]["image_size"]
    assert entry["aspect_ratio_ids"]["sample"]["value"][0] == ratio
    assert entry["num_tiles"] == tiles
    assert entry["pixel_values"]["shape"] == [1, 1, 4, 3, side, side]
    assert entry["aspect_ratio_mask"]["shape"] == [1, 1, 4]


def test_every_image_has_pixel_goldens_and_the_stand_in_says_why() -> None:
    entries = _ledger("pixels.json")
    for path in (ROOT / "images").iterdir():
        for checkpoint in (TINY_NAME, RELEASED_GEOMETRY):
            assert path.suffix == ".md" or f"{path.name}|{checkpoint}|path" in entries, f"{path.name} is missing"
    for key, entry in entries.items():
        assert entry["made_by"] == "transformers 4.45.2" or entry.get("why"), f"{key}: no reason for {entry['made_by']}"
    assert all(f"edge-{name}|{TINY_NAME}|pil" in entries for name in ("rgba.png", "cmyk.tif", "palette.png"))


def test_the_beginning_of_text_follows_the_leading_markers() -> None:
    # MLLAMA-PROC-009 and -023
    entries = _ledger("prompts.json")

    def first(name: str, count: int = 3) -> list[int]:
        ids: list[int] = entries[f"tokens|{name}"]["input_ids"][0]
        return ids[:count]

    assert first("marker-first", 2) == [MARKER, BEGIN]
    assert first("two-markers-first") == [MARKER, MARKER, BEGIN]
    assert first("marker-later", 1) == [BEGIN]
    assert first("begin-first", 2) == [BEGIN, MARKER]
    assert first("text-only-plain", 1) == [BEGIN]
    for name, entry in entries.items():
        rows = entry.get("input_ids", [])
        assert all(row.count(BEGIN) == 1 for row in rows), f"{name} has not one beginning of text in each row"
    assert MARKER in first("begin-in-the-middle", 1), "a text that has the token anywhere is left as it is"


@pytest.mark.parametrize("name", [key for key in _ledger("prompts.json") if key.startswith("tokens|")])
def test_prompt_goldens_have_the_mask_of_the_rule(name: str) -> None:
    entries, pixels = _ledger("prompts.json"), _ledger("pixels.json")
    entry = entries[name]
    images = [row["images"] for row in entry["rows"]]
    if not any(images):
        assert "cross_attention_mask" not in entry
        return
    tiles = [[pixels[f"{image}|{TINY_NAME}|path"]["num_tiles"] for image in row] for row in images]
    made = np.array(entry["cross_attention_mask"])
    assert np.array_equal(made, _mask_by_rule(np.array(entry["input_ids"]), tiles))
    if any(not row for row in images):
        assert entry["made_by"] == "transformers 5.23.0"
        assert "refuses" in entry["why"]
