"""The fixtures are what their recipes, the documents and independent readers say."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jinja2 import Environment
from PIL import Image
from tokenizers import Tokenizer

from vlmqual_adapters import inventory, pictures, recipes, vocabulary
from vlmqual_adapters.drawing import Draws
from vlmqual_adapters.recipes_idefics3 import RELEASED_GEOMETRY
from vlmqual_adapters.recipes_idefics3 import TINY as TINY_NAME
from vlmqual_contract import fixtures
from vlmqual_contract.scenario import load_scenarios

ROOT = fixtures.root()
TINY = ROOT / "checkpoints" / TINY_NAME
RELEASED = ROOT / "checkpoints" / RELEASED_GEOMETRY
GOLDENS = sorted((ROOT / "goldens" / "idefics3").glob("*.npz"))
IMAGES = sorted(path for path in (ROOT / "images").iterdir() if path.suffix in (".png", ".tif"))


def _json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def _ledger(name: str) -> dict[str, Any]:
    entries: dict[str, Any] = _json(ROOT / "goldens" / "idefics3" / name)["entries"]
    return entries


# manifest ------------------------------------------------------------------------------------------------------------


def test_the_manifest_names_every_file_with_its_digest() -> None:
    assert inventory.digests(ROOT) == inventory.stored(ROOT)["files"], "run python -m vlmqual_adapters.inventory"


def test_a_changed_file_shows_in_the_manifest_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("one")
    inventory.write(tmp_path, "someone", {"seed": 7, "software": ["x 1"]})
    assert inventory.main(["--output", str(tmp_path), "--check"]) == 0
    assert inventory.stored(tmp_path)["made"]["someone"] == {"seed": 7, "software": ["x 1"]}
    (tmp_path / "a.txt").write_text("two")
    assert inventory.main(["--output", str(tmp_path), "--check"]) == 1
    assert "DIFFERENT  a.txt" in capsys.readouterr().out


def test_all_fixtures_together_stay_under_twenty_megabytes() -> None:
    total = sum(path.stat().st_size for path in ROOT.rglob("*") if path.is_file())
    assert total < 20_000_000, f"fixtures have {total} bytes and ship inside the wheel"


# checkpoints ---------------------------------------------------------------------------------------------------------


def test_the_recipe_makes_the_stored_checkpoint_files_byte_for_byte() -> None:
    for name, content in recipes.checkpoints().items():
        assert (ROOT / name).read_bytes() == content, f"{name} is not what its recipe makes"


def _header(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def test_every_weight_is_finite_varied_bfloat16() -> None:
    header, data = _header(TINY / "model.safetensors")
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    assert len(tensors) == 93, "3 vision layers of 16 tensors, 4 text layers of 9, and 9 others"
    for name, entry in tensors.items():
        assert entry["dtype"] == "BF16", f"{name} is {entry['dtype']}"
        begin, end = entry["data_offsets"]
        values = (np.frombuffer(data[begin:end], "<u2").astype(np.uint32) << 16).view(np.float32)
        assert values.size == np.prod(entry["shape"]), f"{name}: size and shape differ"
        assert np.isfinite(values).all(), f"{name} is not finite"
        assert values.std() > 0, f"{name} is not varied"
        if name.endswith("norm.weight") or "norm1.weight" in name or "norm2.weight" in name:
            assert 0.8 < values.mean() < 1.2, f"{name} is not around 1"
        if name.endswith("bias"):
            assert (values != 0).all(), f"{name}: a zero bias would hide a forgotten one"


def test_normal_draws_have_the_wanted_mean_and_deviation() -> None:
    bits = Draws(5).normal((200, 100), 0.5, 2.0)
    values = (bits.astype(np.uint32) << 16).view(np.float32)
    assert abs(values.mean() - 2.0) < 0.02
    assert abs(values.std() - 0.5) < 0.02
    assert np.array_equal(bits, Draws(5).normal((200, 100), 0.5, 2.0))
    assert not np.array_equal(bits, Draws(6).normal((200, 100), 0.5, 2.0))


def test_heads_divide_by_four_and_share_keys() -> None:
    text = _json(TINY / "config.json")["text_config"]
    assert text["num_attention_heads"] % 4 == 0
    assert text["num_key_value_heads"] % 4 == 0
    assert text["num_key_value_heads"] < text["num_attention_heads"]
    assert text["vocab_size"] % 4 == 0
    assert text["num_key_value_heads"] % 3, "a tensor-parallel size of 3 has to be refusable"


def test_each_branch_of_the_rotary_scaling_holds_for_some_frequency() -> None:
    text = _json(TINY / "config.json")["text_config"]
    rope = text["rope_scaling"]
    lengths = 2 * np.pi * text["rope_theta"] ** (np.arange(0, text["head_dim"], 2) / text["head_dim"])
    context = rope["original_max_position_embeddings"]
    short, long = context / rope["high_freq_factor"], context / rope["low_freq_factor"]
    assert (lengths < short).any(), "no frequency is left as it is"
    assert (lengths > long).any(), "no frequency is slowed by the whole factor"
    assert ((lengths > short) & (lengths < long)).any(), "the smooth branch is never taken"


def test_image_tokens_of_a_frame_follow_from_the_configuration() -> None:
    # IDEFICS3-MODEL-029: (364 // 14)^2 / 2^2 = 169 for the released model.
    assert _json(RELEASED / "processor_config.json")["image_seq_len"] == 169
    assert _json(TINY / "processor_config.json")["image_seq_len"] == 16


def test_the_released_geometry_enlarges_to_four_frames() -> None:
    pixels = _json(RELEASED / "preprocessor_config.json")
    assert pixels["size"] == {"longest_edge": 1456}
    assert pixels["max_image_size"] == {"longest_edge": 364}
    assert pixels["resample"] == Image.Resampling.LANCZOS
    assert not list(RELEASED.glob("*.safetensors"))


# tokenizer -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return Tokenizer.from_file(str(TINY / "tokenizer.json"))


@pytest.mark.parametrize("text", ["Hello, world!", "  two  spaces\n\nand lines\n", "Größe 東京 ½ 🙂", "<row_1_col_2>"])
def test_text_comes_back_from_its_tokens(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert ids[0] == vocabulary.token_ids()[vocabulary.BOS], "the beginning-of-text token comes first"


def test_markers_are_one_token_and_tags_are_ordinary_text(tokenizer: Any) -> None:
    ids = vocabulary.token_ids()
    for marker in (vocabulary.IMAGE, vocabulary.FAKE, vocabulary.END_OF_UTTERANCE, vocabulary.PAD):
        assert tokenizer.encode(f"a{marker}b").ids[2] == ids[marker], f"{marker} is not kept whole"
    for tag in ("<global-img>", "<row_1_col_1>"):  # spread over several ids, as in the released tokenizer
        assert len(tokenizer.encode(tag).ids) > 2, f"{tag} became one token"
    assert tokenizer.get_vocab_size() == _json(TINY / "config.json")["text_config"]["vocab_size"]
    assert _json(TINY / "config.json")["image_token_id"] == ids[vocabulary.IMAGE]


def test_words_of_the_text_became_merges(tokenizer: Any) -> None:
    assert len(tokenizer.encode(" image").ids) == 2, "a frequent word is one token after the first"


def test_too_many_merges_for_a_text_are_refused() -> None:
    with pytest.raises(ValueError, match="only 1 merges, 5 are wanted"):
        vocabulary.learn("ab", 5)


def _rendered(messages: list[dict[str, Any]], ask: bool) -> str:
    environment = Environment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_json(TINY / "chat_template.json")["chat_template"])
    text: str = template.render(messages=messages, add_generation_prompt=ask)
    return text


def test_chat_template_writes_role_items_and_end_of_utterance() -> None:
    # The layout of the released template (IDEFICS3-CARD-003).
    image, words = {"type": "image"}, {"type": "text", "text": "What is it?"}
    assert _rendered([{"role": "user", "content": [image, words]}], True) == (
        "<|begin_of_text|>User:<image>What is it?<end_of_utterance>\nAssistant:"
    )
    assert _rendered([{"role": "user", "content": [words, image]}], False) == (
        "<|begin_of_text|>User: What is it?<image><end_of_utterance>\n"
    )
    turns = [{"role": "user", "content": [words]}, {"role": "assistant", "content": [words]}]
    assert _rendered(turns, False).endswith("\nAssistant: What is it?<end_of_utterance>\n")


# images --------------------------------------------------------------------------------------------------------------


def test_edge_cases_are_what_their_recipe_makes(capsys: pytest.CaptureFixture[str]) -> None:
    assert pictures.main(["--output", str(ROOT), "--check"]) == 0, capsys.readouterr().out


def test_edge_images_have_the_size_in_their_name() -> None:
    sized = [path for path in IMAGES if re.fullmatch(r"edge-\d+x\d+", path.stem)]
    assert len(sized) >= 12
    for path in sized:
        with Image.open(path) as image:
            assert f"edge-{image.width}x{image.height}" == path.stem


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("edge-rgba.png", "RGBA"),
        ("edge-la.png", "LA"),
        ("edge-gray.png", "L"),
        ("edge-palette.png", "P"),
        ("edge-gray16.png", "I;16"),
        ("edge-cmyk.tif", "CMYK"),
    ],
)
def test_images_of_other_modes_keep_their_mode(name: str, mode: str) -> None:
    with Image.open(ROOT / "images" / name) as image:
        assert image.mode == mode


def test_alpha_and_orientation_are_really_in_the_files() -> None:
    with Image.open(ROOT / "images" / "edge-rgba.png") as image:
        alpha = np.asarray(image)[..., 3]
    assert {0, 255} < set(alpha.ravel().tolist()), "alpha has to have both ends and values between"
    with Image.open(ROOT / "images" / "edge-palette-transparent.png") as image:
        assert "transparency" in image.info
    for orientation in (3, 6):
        with Image.open(ROOT / "images" / f"edge-exif-{orientation}.png") as image:
            assert image.getexif()[0x0112] == orientation


def test_every_photograph_has_a_line_in_the_licences() -> None:
    text = (ROOT / "images" / "LICENSES.md").read_text("utf-8")
    own = {path.name for path in IMAGES if path.name.startswith(("edge-", "page-"))}
    for path in IMAGES:
        assert path.name in own or re.search(rf"`{path.name}`.*(CC0|CC-BY 2.0|public domain)", text), path.name
    assert len(IMAGES) - len(own) >= 6


# scenarios -----------------------------------------------------------------------------------------------------------


def test_scenarios_use_fixtures_that_exist() -> None:
    scenarios = load_scenarios(ROOT / "scenarios.toml")
    assert {"smoke", "default"} <= {suite for s in scenarios.values() for suite in s.suites}
    for scenario in scenarios.values():
        fixtures.checkpoint(scenario.checkpoint)
        for name in scenario.images:
            fixtures.image(name)


# goldens -------------------------------------------------------------------------------------------------------------


def _golden(path: Path) -> dict[str, Any]:
    with np.load(path) as file:
        return {name: file[name] for name in file.files}


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_golden_tensors_fit_each_other(path: Path) -> None:
    gold = _golden(path)
    config = _json(TINY / "config.json")
    ids, mask = gold["inputs/input_ids"], gold["inputs/attention_mask"]
    batch, vocabulary_size = ids.shape[0], config["text_config"]["vocab_size"]
    assert mask.shape == ids.shape
    assert gold["prefill/logits"].shape == (batch, vocabulary_size)
    steps = 40 if path.stem == "across-blocks" else 16
    assert gold["decode/logits"].shape == (steps, batch, vocabulary_size)
    assert gold["decode/tokens"].shape == (steps, batch)
    assert np.array_equal(gold["decode/tokens"][0], gold["prefill/logits"].argmax(-1)), "forced tokens are greedy"
    assert np.array_equal(gold["decode/tokens"][1:], gold["decode/logits"][:-1].argmax(-1)), "forced tokens are greedy"
    if "inputs/pixel_values" in gold:
        real = (gold["inputs/pixel_values"] != 0).any(axis=(-1, -2, -3)).sum()
        assert gold["features/image_hidden_states"].shape == (real, 16, 64)
        assert (ids == config["image_token_id"]).sum() == 16 * real
    if "prefill/all_logits" in gold:
        last = (np.arange(ids.shape[1]) * mask).argmax(-1)
        assert np.array_equal(gold["prefill/all_logits"][np.arange(batch), last], gold["prefill/logits"])
        assert not gold["prefill/all_logits"][mask == 0].any(), "positions of padding are stored as 0"
    for name, value in gold.items():
        if value.dtype.kind == "f":
            assert np.isfinite(value).all(), f"{name} is not finite"


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_noise_is_the_worst_arm_and_grows_as_precision_falls(path: Path) -> None:
    gold = _golden(path)
    names = gold["arms/tensors"].tolist()
    for column, name in enumerate(names):
        worst = [float(gold[f"arms/{dtype}/errors"][:, column].max()) for dtype in ("float64", "float32", "float16")]
        if f"noise/float64/{name}" not in gold:
            continue
        noise = [float(gold[f"noise/{dtype}/{name}"]) for dtype in ("float64", "float32", "float16", "bfloat16")]
        assert all(a <= b for a, b in zip(worst, noise[:3], strict=True)), f"{name}: an arm is above the noise"
        assert noise == sorted(noise), f"{name}: noise in float64, float32, float16, bfloat16 is {noise}"
    for dtype in ("float64", "float32", "bfloat16", "float16"):
        assert len(set(gold[f"arms/{dtype}"].tolist())) >= 4
    prefill = names.index("prefill/logits")
    assert len(set(gold["arms/bfloat16/errors"][:, prefill].tolist())) >= 4, "arms have to differ from each other"


def test_goldens_cover_the_cases_of_the_specification() -> None:
    have = {path.stem for path in GOLDENS}
    wanted = {"photo-tiles", "photo-whole", "two-images", "batch-left", "batch-right", "text-only", "masked-pixels"}
    assert wanted | {"padding-frames", "document", "multi-turn", "text-beside-image"} <= have


def test_padding_on_either_side_gives_the_same_gold() -> None:
    left, right = (_golden(ROOT / "goldens" / "idefics3" / f"batch-{side}.npz") for side in ("left", "right"))
    assert left["inputs/attention_mask"][1, 0] == 0
    assert right["inputs/attention_mask"][1, -1] == 0
    for name in ("prefill/logits", "decode/logits"):
        assert np.abs(left[name] - right[name]).max() < 1e-8, f"{name} depends on the side of the padding"


def test_gold_depends_on_the_image_and_on_the_mask() -> None:
    whole, tiles = (_golden(ROOT / "goldens" / "idefics3" / f"{name}.npz") for name in ("photo-whole", "two-images"))
    a, b = whole["features/image_hidden_states"][0], tiles["features/image_hidden_states"][0]
    assert np.linalg.norm(a - b) > 0.2 * np.linalg.norm(a), "two photographs give nearly the same features"
    masked = _golden(ROOT / "goldens" / "idefics3" / "masked-pixels.npz")
    assert (masked["inputs/pixel_attention_mask"] == 0).any(axis=(-1, -2)).all(), "every frame has masked pixels"


def test_greedy_tokens_of_gold_are_varied() -> None:
    for path in GOLDENS:
        tokens = _golden(path)["decode/tokens"]
        assert all(len(set(row.tolist())) >= 4 for row in tokens.T), f"{path.stem}: {tokens.T.tolist()}"


# Grids by the rule of IDEFICS3-IMG-020, worked out by hand: (rows, columns), or (0, 0) for one frame.
@pytest.mark.parametrize(
    ("image", "checkpoint", "grid"),
    [
        ("edge-5000x40.png", RELEASED_GEOMETRY, (1, 4)),
        ("edge-40x5000.png", TINY_NAME, (4, 1)),
        ("edge-112x112.png", TINY_NAME, (4, 4)),
        ("edge-224x112.png", TINY_NAME, (2, 4)),
        ("edge-728x364.png", RELEASED_GEOMETRY, (2, 4)),
        ("chelsea.png", TINY_NAME, (3, 4)),  # 360x240 -> 448x298 -> 448x336
        ("edge-50x3.png", TINY_NAME, (1, 4)),  # 448x26 -> 448x112
        ("edge-exif-6.png", TINY_NAME, (4, 3)),  # 120x80 turned is 80x120 -> 298x448 -> 336x448
    ],
)
def test_pixel_goldens_have_the_grid_of_the_rule(image: str, checkpoint: str, grid: tuple[int, int]) -> None:
    entry = _ledger("pixels.json")[f"{image}|{checkpoint}|path"]
    assert (entry["rows"], entry["cols"]) == grid
    frames = grid[0] * grid[1] + 1
    assert entry["pixel_values"]["shape"][1] == frames
    assert (
        entry["image_tokens"]
        == frames * _json(ROOT / "checkpoints" / checkpoint / "processor_config.json")["image_seq_len"]
    )


def test_every_image_has_pixel_goldens_and_the_stand_in_says_why() -> None:
    entries = _ledger("pixels.json")
    for path in IMAGES:
        for checkpoint in (TINY_NAME, RELEASED_GEOMETRY):
            assert f"{path.name}|{checkpoint}|path" in entries
    for key, entry in entries.items():
        assert entry["made_by"] == "transformers 4.46.3" or entry.get("why"), f"{key}: no reason for {entry['made_by']}"
    assert all(f"edge-{name}|{TINY_NAME}|pil" in entries for name in ("rgba.png", "cmyk.tif", "palette.png"))


def test_orientation_matters_for_files_and_not_in_memory() -> None:
    entries = _ledger("pixels.json")
    by_path, in_memory = (entries[f"edge-exif-6.png|{TINY_NAME}|{way}"] for way in ("path", "pil"))
    assert (by_path["rows"], by_path["cols"]) == (in_memory["cols"], in_memory["rows"])


def test_prompt_goldens_have_one_block_of_image_tokens_for_each_frame() -> None:
    image, fake = (vocabulary.token_ids()[name] for name in (vocabulary.IMAGE, vocabulary.FAKE))
    entries = _ledger("prompts.json")
    row = entries["tokens|photo"]["input_ids"][0]  # 3 x 4 tiles and the whole: 13 frames of 16
    assert row.count(image) == 13 * 16
    assert row.count(fake) == 13 + 1
    assert entries["tokens|photo-whole"]["input_ids"][0].count(fake) == 2
    padded = entries["tokens|batch"]["attention_mask"][1]
    assert (padded[0], padded[-1]) == (0, 1), "rows are padded on the left"
    assert entries["tokens|text-only"]["made_by"] == "transformers 5.23.0"
    assert entries["chat|image-first"]["text"].startswith("<|begin_of_text|>User:<image>What")
