"""What a compiler sees: shapes, bytes, states that are written where a tensor says."""

from __future__ import annotations

import pytest
import torch
from graph_objects import CHECKPOINTS, both, held

from vlmqual_impl.entries import Entry, SlotCache, Spec
from vlmqual_impl.graphs import Graphs

FAMILIES = tuple(CHECKPOINTS)


def text(family: str, tokens: int, images: int = 0) -> tuple[Graphs, Entry]:
    graphs, _ = both(CHECKPOINTS[family], torch.float32)
    return graphs, graphs.text(2, tokens, 32, images)


def test_a_spec_says_its_name_dtype_and_shape_and_counts_its_bytes() -> None:
    spec = Spec("cos", (1, 3, 5), torch.float16)
    assert str(spec) == "cos float16[1, 3, 5]"
    assert spec.size_bytes == 1 * 3 * 5 * 2
    assert spec.zeros().shape == (1, 3, 5)
    assert spec.zeros().dtype is torch.float16


def test_states_are_keys_then_values_of_every_layer_and_their_bytes_are_counted() -> None:
    _, entry = text("idefics3", 8)
    assert [state.name for state in entry.states] == [f"{what}.{n}" for what in ("keys", "values") for n in range(4)]
    # 4 layers, keys and values, 2 rows, 4 key heads, 32 slots, head width 8, 4 bytes.
    assert entry.states_bytes == 4 * 2 * 2 * 4 * 32 * 8 * 4


def test_weights_that_a_function_reads_are_counted_in_bytes() -> None:
    graphs, _ = both(CHECKPOINTS["idefics3"], torch.float32)
    assert graphs.head(1, 1).weights_bytes == 600 * 64 * 4


def test_mllama_keeps_a_cache_for_layers_of_self_attention_only() -> None:
    _, entry = text("mllama", 8, 34)  # layers 1 and 4 of 6 look at images
    assert [state.name for state in entry.states][:4] == ["keys.0", "keys.2", "keys.3", "keys.5"]
    assert [spec.name for spec in entry.inputs][-4:] == [
        "cross_keys.1",
        "cross_keys.4",
        "cross_values.1",
        "cross_values.4",
    ]


def test_idefics_numbers_its_cross_attention_blocks_on_their_own() -> None:
    _, entry = text("idefics", 8, 17)  # one block before every second of 6 layers
    assert [spec.name for spec in entry.inputs if spec.name.startswith("cross_keys")] == [
        f"cross_keys.{n}" for n in range(3)
    ]
    assert len(entry.states) == 2 * 6


def test_the_text_function_of_mllama_without_images_has_no_image_inputs() -> None:
    _, entry = text("mllama", 8)
    assert [spec.name for spec in entry.inputs] == ["embeddings", "cos", "sin", "bias", "slots", "last"]


@pytest.mark.parametrize(("family", "images"), [("idefics", 17), ("idefics3", 0), ("mllama", 68), ("mllama", 0)])
def test_a_function_gives_what_it_declares(family: str, images: int) -> None:
    _, entry = text(family, 8, images)
    with torch.no_grad():
        made = entry.module(*(spec.zeros() for spec in (*entry.inputs, *entry.states)))
    held((*entry.outputs, *entry.states), made)


def test_a_cache_is_written_at_the_slots_of_the_call_and_nowhere_else() -> None:
    before = torch.full((2, 3, 6, 4), 7.0)
    cache = SlotCache({0: before}, {0: before}, torch.tensor([4, 1]), None)
    keys, values = torch.zeros(2, 3, 2, 4), torch.ones(2, 3, 2, 4)
    keys[:, :, 1] = 2.0
    new_keys, new_values = cache.write(0, keys, values)
    assert new_keys[0, 0, :, 0].tolist() == [7, 2, 7, 7, 0, 7]
    assert new_values[1, 2, :, 3].tolist() == [7, 1, 7, 7, 1, 7]
    assert bool((before == 7.0).all()), "the buffer that was given is not the one that comes back"
    assert cache.states()[0] is new_keys
    assert cache.states()[1] is new_values


def test_logits_are_those_of_the_token_that_each_row_asks_for() -> None:
    graphs, entry = text("idefics3", 8)
    torch.manual_seed(0)
    given = [torch.randn(spec.shape) if spec.dtype.is_floating_point else spec.zeros() for spec in entry.inputs]
    given[3] = torch.zeros(entry.inputs[3].shape)
    given[4], given[5] = torch.arange(8), torch.tensor([2, 7])
    with torch.no_grad():
        logits, hidden, *_ = entry.module(*given, *(spec.zeros() for spec in entry.states))
        expected = torch.stack([graphs.decoder.head(hidden[0, 2]), graphs.decoder.head(hidden[1, 7])])
    torch.testing.assert_close(logits, expected)
