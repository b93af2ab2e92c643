"""Functions of fixed shapes and what their caller does around them, held to the eager model in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graph_objects import CHECKPOINTS, ModuleEngine, both, held, repeated, request
from torch import Tensor

from vlmqual_impl.runtime.base import Sequences
from vlmqual_impl.runtime.graphs import GraphRuntime, Shapes, Waste, bucket

FAMILIES = tuple(CHECKPOINTS)
CLOSE = {"rtol": 0.0, "atol": 1e-11}  # float64; another order of sums, and logits of order 1


def runtimes(family: str, **shapes: Any) -> tuple[GraphRuntime, Any]:
    graphs, eager = both(CHECKPOINTS[family])
    return GraphRuntime(graphs, ModuleEngine(), Shapes(**shapes)), eager


def generated(runtime: Any, inputs: dict[str, Tensor], steps: int, max_length: int) -> tuple[Tensor, Sequences]:
    """Logits (1 + steps, B, V) under the greedy tokens of the runtime itself, and the sequences after the prompt."""
    start = sequences = runtime.prefill(inputs, max_length=max_length)
    logits = [start.logits]
    for _ in range(steps):
        sequences = runtime.decode(sequences, logits[-1].argmax(-1))
        logits.append(sequences.logits)
    return torch.stack(logits), start


@pytest.mark.parametrize("case", ["photo-whole", "masked-pixels"])
def test_pictures_are_in_the_dtype_that_is_compiled(case: str) -> None:
    graphs, _ = both("idefics3-tiny", torch.bfloat16)
    for picture in graphs.pictures(request("idefics3", case)):
        held(graphs.vision(picture).inputs, picture)
        assert [tensor.dtype for tensor in picture] == [torch.bfloat16, torch.int64, torch.bfloat16]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_get_the_logits_of_the_eager_model_in_prefill_and_decode(family: str, side: str) -> None:
    graphs, eager = runtimes(family, chunk=128, max_length=128, rows=(2,))
    inputs = request(family, f"batch-{side}")
    found, _ = generated(graphs, inputs, 4, 128)
    expected, _ = generated(eager, inputs, 4, 128)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [1, 7, 8, 31, 32, 33])
def test_a_prompt_gives_the_same_logits_in_chunks_of_any_size(family: str, chunk: int) -> None:
    graphs, eager = runtimes(family, chunk=chunk, max_length=96, rows=(2,))
    inputs = request(family, "batch-left")
    found, start = generated(graphs, inputs, 3, 96)
    expected, whole = generated(eager, inputs, 3, 96)
    torch.testing.assert_close(found, expected, **CLOSE)
    real = inputs["attention_mask"] != 0
    torch.testing.assert_close(graphs.head(start.hidden)[real], eager.head(whole.hidden)[real], **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_three_rows_in_a_bucket_of_four_get_what_they_get_alone(family: str) -> None:
    graphs, eager = runtimes(family, chunk=16, max_length=96, rows=(1, 2, 4))
    inputs = request(family, "batch-left")
    rows = repeated(inputs, [1, 0, 1])
    found, _ = generated(graphs, rows, 2, 96)
    expected, _ = generated(eager, rows, 2, 96)
    assert found.shape[1] == 3, "rows of padding came out"
    torch.testing.assert_close(found, expected, **CLOSE)
    assert (graphs.waste["decode"].tokens, graphs.waste["decode"].computed) == (3, 4)


@pytest.mark.parametrize(("family", "golden"), [("mllama", "four-images"), ("idefics", "three-images")])
def test_image_slots_that_are_added_to_fill_a_bucket_are_never_seen(family: str, golden: str) -> None:
    graphs, eager = runtimes(family, chunk=32, max_length=128, rows=(1,), images=(8,))
    inputs = request(family, golden)
    images = inputs["pixel_values"].shape[1]
    assert images < 8
    found, _ = generated(graphs, inputs, 2, 128)
    expected, _ = generated(eager, inputs, 2, 128)
    torch.testing.assert_close(found, expected, **CLOSE)
    features = graphs.encode(inputs)
    each = features.shape[1] // images if family == "mllama" else features.shape[2]
    assert graphs.waste["prefill"].bucket.endswith(f"i{8 * each}")


def test_waste_is_what_one_counts_by_hand() -> None:
    graphs, _ = runtimes("idefics3", chunk=32, max_length=96, rows=(1, 2, 4))
    inputs = request("idefics3", "batch-left")  # 70 and 35 real tokens
    sequences = graphs.prefill(inputs, max_length=96)
    frames = int(inputs["pixel_values"].ne(0).flatten(2).any(2).sum())
    assert graphs.waste["vision"].tokens == graphs.waste["vision"].computed == frames
    # 70 positions are three chunks of 32 for each of two rows: 192 tokens for 105 real ones.
    prefill = graphs.waste["prefill"]
    assert (prefill.bucket, prefill.tokens, prefill.computed) == ("b2 c32 x 3", 70 + 35, 2 * 3 * 32)
    assert prefill.share == pytest.approx(87 / 192)
    assert prefill.programs == ("text-b2-s32-k96",)
    graphs.decode(sequences, torch.tensor([3, 4]))
    assert graphs.waste["decode"] == Waste("b2", 2, 2, ("text-b2-s1-k96",))


def test_a_function_is_compiled_once_and_only_for_shapes_that_came() -> None:
    graphs, _ = runtimes("idefics3", chunk=32, max_length=96, rows=(1, 2, 4))
    engine: Any = graphs.engine
    inputs = request("idefics3", "batch-left")
    for _ in range(2):
        generated(graphs, inputs, 3, 96)
    assert engine.compiled == ["vision-112x112", "connector-p64", "text-b2-s32-k96", "text-b2-s1-k96"]
    assert list(graphs.ready_s) == engine.compiled


def test_the_smallest_bucket_that_is_enough_is_taken() -> None:
    assert [bucket(count, (1, 2, 4)) for count in (1, 2, 3, 4, 5)] == [1, 2, 4, 4, 5]


def test_cache_slots_are_whole_chunks() -> None:
    assert [Shapes(chunk=64, max_length=length).slots for length in (1, 64, 65, 128)] == [64, 64, 128, 128]


def test_the_cache_ends_where_the_caller_said_and_not_where_the_last_chunk_does() -> None:
    graphs, _ = runtimes("idefics3", chunk=64, max_length=80, rows=(1,))
    inputs = {"input_ids": torch.arange(3, 82)[None]}
    sequences = graphs.prefill(inputs, max_length=80)  # 79 tokens
    sequences = graphs.decode(sequences, torch.tensor([5]))
    with pytest.raises(ValueError, match="80 positions, 80 are taken and 1 more"):
        graphs.decode(sequences, torch.tensor([5]))
    with pytest.raises(ValueError, match="80 positions, 0 are taken and 81 more"):
        graphs.prefill({"input_ids": torch.arange(3, 84)[None]}, max_length=80)
    with pytest.raises(ValueError, match="max_length 81 is more than the 80 fixed positions"):
        graphs.prefill(inputs, max_length=81)


def test_a_step_is_decoded_once_with_a_token_for_each_row() -> None:
    graphs, eager = runtimes("idefics3", chunk=32, max_length=64, rows=(2,))
    inputs = {"input_ids": torch.arange(3, 23).view(2, 10)}
    sequences = graphs.prefill(inputs, max_length=64)
    with pytest.raises(ValueError, match="one for each of the 2 rows"):
        graphs.decode(sequences, torch.tensor([5]))
    graphs.decode(sequences, torch.tensor([5, 6]))
    with pytest.raises(ValueError, match="continued"):
        graphs.decode(sequences, torch.tensor([5, 6]))
    with pytest.raises(TypeError, match="another runtime"):
        graphs.decode(eager.prefill(inputs, max_length=64), torch.tensor([5, 6]))


@pytest.mark.parametrize("name", ["attention_mask", "position_ids"])
def test_a_tensor_of_another_length_is_refused(name: str) -> None:
    graphs, _ = runtimes("idefics3", chunk=32, max_length=64)
    with pytest.raises(ValueError, match=rf"{name} is \(1, 9\); it has to be \(batch, tokens\), here \(1, 10\)"):
        graphs.prefill({"input_ids": torch.ones(1, 10).long(), name: torch.ones(1, 9).long()}, max_length=64)


def test_pictures_of_another_size_and_masked_patches_reach_the_vision_function() -> None:
    graphs, eager = runtimes("idefics", chunk=32, max_length=64)
    inputs = request("idefics", "high-resolution")
    torch.testing.assert_close(graphs.encode(inputs), eager.encode(inputs), **CLOSE)
    graphs, eager = runtimes("idefics3", chunk=32, max_length=64)
    inputs = request("idefics3", "masked-pixels")
    assert bool((inputs["pixel_attention_mask"] == 0).any())
    torch.testing.assert_close(graphs.encode(inputs), eager.encode(inputs), **CLOSE)
