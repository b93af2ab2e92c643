"""What numeric tests do with a golden of either family, on goldens made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from vlmqual_conformance.goldens import Golden
from vlmqual_conformance.policy import BadAnswer, Judge
from vlmqual_conformance.suite import checks, mllama_images, runs
from vlmqual_contract.target import Capability, Info

#: Two rows, the second padded on the left. Row 0 begins with two images; row 1 has one, in two of its three tiles.
IMAGE = 300
IDS = np.array([[IMAGE, IMAGE, 5, 6, 7], [0, 0, IMAGE, 8, 9]])
REAL = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
N, T, L, D = 2, 3, 2, 4
INFO = Info("a target", "1", "cpu", "numpy", "float32", frozenset({Capability.TAPS}), ("mllama",))


def made(family: str, arrays: dict[str, np.ndarray]) -> Golden:
    return Golden(family, "by hand", frozenset(arrays), dict(arrays))


def dense() -> np.ndarray:
    mask = np.zeros((2, 5, N, T), np.int64)
    mask[0, 0:, 0, :1] = 1
    mask[0, 1:, 1, :3] = 1
    mask[1, 2:, 0, :2] = 1
    return mask


def mllama(mask: np.ndarray | None = None, tokens: np.ndarray | None = None) -> Golden:
    arrays = {
        "inputs/input_ids": IDS,
        "inputs/attention_mask": REAL,
        "inputs/cross_attention_mask": dense() if mask is None else mask,
        "inputs/pixel_values": np.zeros((2, N, T, 3, 2, 2), np.float32),
        "inputs/aspect_ratio_ids": np.array([[1, 3], [2, 0]]),
        "inputs/aspect_ratio_mask": np.array([[[1, 0, 0], [1, 1, 1]], [[1, 1, 0], [1, 0, 0]]]),
        "features/cross_attention_states": np.arange(2.0 * N * T * L * D).reshape(2, N * T * L, D),
    }
    if tokens is not None:
        arrays["decode/tokens"] = tokens
    return made("mllama", arrays)


def idefics3() -> Golden:
    pixels = np.zeros((2, 2, 3, 4, 4), np.float32)
    pixels[0], pixels[1, 1] = 1, 2
    return made(
        "idefics3",
        {
            "inputs/input_ids": IDS,
            "inputs/attention_mask": REAL,
            "inputs/pixel_values": pixels,
            "inputs/pixel_attention_mask": np.ones((2, 2, 4, 4), np.int64),
            "features/image_hidden_states": np.arange(3.0 * L * D).reshape(3, L, D),
        },
    )


def test_each_family_has_its_own_tensors():
    first, second = idefics3(), mllama()
    assert (list(first.text), list(first.pixels)) == (
        ["input_ids", "attention_mask"],
        ["pixel_values", "pixel_attention_mask"],
    )
    assert (list(second.text), list(second.pixels)) == (
        ["input_ids", "attention_mask", "cross_attention_mask"],
        ["pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"],
    )
    assert list(first.features or {}) == ["image_hidden_states"]
    assert list(second.features or {}) == ["cross_attention_states"]
    assert second.needs() == {Capability.BATCH, Capability.PADDING, Capability.VISION}
    assert second.pixel_needs() == frozenset(), "Mllama has no mask over pixels"


def test_a_case_of_text_alone_has_no_mask_over_images():
    text = made("mllama", {"inputs/input_ids": IDS, "inputs/attention_mask": REAL})
    assert list(text.text) == ["input_ids", "attention_mask"]
    assert not text.pixels
    assert text.features is None
    assert runs.features_of(text, 0) is None
    assert runs.alone(text, 1)["input_ids"].tolist() == [[IMAGE, 8, 9]]


def test_a_row_of_mllama_alone_keeps_the_image_slots_that_it_sees():
    case = mllama()
    assert runs.seen_slots(case, 0).tolist() == [0, 1]
    assert runs.seen_slots(case, 1).tolist() == [0], "no real token of row 1 sees its padding image"
    text, features = runs.alone(case, 1), runs.features_of(case, 1)
    assert text["input_ids"].tolist() == [[IMAGE, 8, 9]]
    assert np.array_equal(text["cross_attention_mask"], dense()[1:, 2:, :1])
    assert features is not None
    whole = case.array("features/cross_attention_states")
    assert np.array_equal(features["cross_attention_states"], whole[1:, : T * L]), "an image is a block of T * L"


def test_a_token_whose_mask_is_zero_keeps_every_image_slot():
    mask = dense()
    mask[1, 2] = 0
    case = mllama(mask)
    assert runs.seen_slots(case, 1).tolist() == [0, 1], "MLLAMA-DECODER-009: such a token sees padding images as well"
    features = runs.features_of(case, 1)
    assert features is not None
    assert features["cross_attention_states"].shape == (1, N * T * L, D)


def test_a_row_of_idefics3_alone_keeps_its_real_frames():
    case = idefics3()
    features = runs.features_of(case, 1)
    assert features is not None
    assert np.array_equal(features["image_hidden_states"], case.array("features/image_hidden_states")[2:])


@pytest.mark.parametrize(("side", "rows"), [("left", slice(2, None)), ("right", slice(None, -2))])
def test_more_padding_leaves_what_was_there(side, rows):
    case = mllama()
    text = runs.padded_text(case, side, 2)
    for name, array in case.text.items():
        assert np.array_equal(text[name][:, rows], array), name
    ends = text["cross_attention_mask"][:, :2] if side == "left" else text["cross_attention_mask"][:, -2:]
    wanted = np.zeros_like(ends) if side == "left" else np.repeat(dense()[:, -1:], 2, axis=1)
    assert np.array_equal(ends, wanted), "steps read the mask's last row, so padding on the right repeats it"
    assert text["attention_mask"].sum() == REAL.sum()


def test_a_longer_prompt_repeats_the_last_row_of_the_mask():
    text = runs.longer_text(mllama(tokens=np.array([[1, 2], [3, 4], [5, 6]])), 2)
    assert text["input_ids"][:, 5:].tolist() == [[1, 3], [2, 4]]
    assert np.array_equal(text["cross_attention_mask"][:, 4:], np.repeat(dense()[:, -1:], 3, axis=1))


def test_features_of_mllama_can_be_told_by_image_and_tile():
    case = mllama()
    states = mllama_images.states(case)
    assert states.shape == (2, N, T, L, D)
    assert np.array_equal(states[1, 1, 2], case.array("features/cross_attention_states")[1, 5 * L : 6 * L])
    back = mllama_images.as_features(states)["cross_attention_states"]
    assert np.array_equal(back, case.array("features/cross_attention_states"))


def test_a_mask_by_hand_shows_one_tile_to_every_position():
    text = mllama_images.seeing_only(mllama(), slot=1, tile=2)
    assert text["cross_attention_mask"].sum() == 2 * 5
    assert text["cross_attention_mask"][:, :, 1, 2].all()


def test_real_positions_without_any_image_are_found():
    mask = dense()
    mask[1, 3] = 0
    found = mllama_images.unmasked(mllama(mask))
    assert np.argwhere(found).tolist() == [[1, 3]], "positions of padding do not count"


def test_two_answers_that_agree_are_not_told_apart():
    judge, gold = Judge("float32"), np.ones((1, 4))
    checks.told_apart(judge, "logits", gold * 1.5, gold, 0.1, "it is blind")
    assert not judge.findings, "a wanted difference is no headroom"
    with pytest.raises(AssertionError, match=r"by 0\.25 of the budget only: it is blind"):
        checks.told_apart(judge, "logits", gold * 1.1, gold, 0.1, "it is blind")


def test_taps_under_other_names_are_a_bad_answer():
    names = {"taps/vision/connector": np.ones((1, 4)), "noise/float32/taps/vision/connector": np.array(0.1)}
    case, judge = made("mllama", names), Judge("float32")
    checks.compare_taps(judge, INFO, case, "taps/vision", lambda: {"connector": np.ones((1, 4))})
    assert [finding.component for finding in judge.findings] == ["connector"]
    with pytest.raises(BadAnswer, match="none is called connector"):
        checks.compare_taps(judge, INFO, case, "taps/vision", lambda: {"joiner": np.ones((1, 4))})


def test_integer_tensors_of_any_rank_are_compared_place_by_place():
    entry = {"rows": [{"text": "", "images": []}], "cross_attention_mask": dense().tolist()}
    checks.same_ids({"cross_attention_mask": dense()}, entry, ["cross_attention_mask"])
    wrong = dense()
    wrong[1, 4, 0, 2] = 1
    with pytest.raises(AssertionError, match="differs in 1 places, first in row 1 at 4, 0, 2: 1, not 0"):
        checks.same_ids({"cross_attention_mask": wrong}, entry, ["cross_attention_mask"])
