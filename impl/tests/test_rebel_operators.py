"""The operators of RBLN and the rounding mode, against plain attention over the whole row."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vlmqual_rebel.errors import RBLNRuntimeError
from vlmqual_rebel.numeric import MODES
from vlmqual_rebel.operators import KERNELS

HEADS, GROUPS, SIZE, BLOCK, BLOCKS = 2, 3, 8, 4, 6
SCALE = torch.tensor(1 / math.sqrt(SIZE))
OPERATORS = torch.ops.rbln_custom_ops


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def caches() -> tuple[Tensor, Tensor]:
    """Filled with what must never be read: every position read is one written before, or a mistake shows."""
    return (torch.full((BLOCKS, HEADS, 1, BLOCK, SIZE), 1e4), torch.full((BLOCKS, HEADS, 1, BLOCK, SIZE), -1e4))


def plain(q: Tensor, k: Tensor, v: Tensor, attends: Tensor) -> Tensor:
    """One row in float64: q [H, G, L, D], k and v [H, N, D], attends [L, N]."""
    scores = torch.einsum("hgld,hnd->hgln", q.double(), k.double()) * SCALE.double()
    scores = scores.masked_fill(~attends, -math.inf)
    return torch.einsum("hgln,hnd->hgld", scores.softmax(-1), v.double())


def row(length: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    q = draw(1, HEADS, GROUPS, length, SIZE, seed=seed)
    return q, draw(1, HEADS, 1, length, SIZE, seed=seed + 1), draw(1, HEADS, 1, length, SIZE, seed=seed + 2)


def named(
    q: Tensor, k: Tensor, v: Tensor, cache: tuple[Tensor, Tensor], start: int, table: list[int]
) -> dict[str, object]:
    return {
        "q": q,
        "k": k,
        "v": v,
        "kcache": cache[0],
        "vcache": cache[1],
        "seq": torch.tensor([[start]], dtype=torch.int32),
        "scale": SCALE,
        "block_table": torch.tensor(table, dtype=torch.int16),
        "block_size": BLOCK,
    }


@pytest.mark.parametrize("flash", [{}, {"partition": BLOCK}], ids=["eager", "flash"])
def test_chunks_of_a_prefill_and_decode_steps_attend_to_all_before_them_through_the_block_table(
    flash: dict[str, int],
) -> None:
    name = "paged_flash_causal_attn" if flash else "paged_causal_attn"
    cache, table = caches(), [5, 0, 3]
    q, k, v = row(10, seed=1)
    results = []
    for start, stop in ((0, 6), (6, 9)):
        part = (q[..., start:stop, :], k[..., start:stop, :], v[..., start:stop, :])
        call = named(*part, cache, start, table)
        results.append(getattr(OPERATORS, f"{name}_prefill")(**call, **flash, is_bidirectional=False))
    call = named(q[..., 9:, :], k[..., 9:, :], v[..., 9:, :], cache, 9, table)
    results.append(getattr(OPERATORS, f"{name}_decode")(**call, **flash))
    wanted = plain(q[0], k[0, :, 0], v[0, :, 0], torch.ones(10, 10, dtype=torch.bool).tril())
    torch.testing.assert_close(torch.cat(results, dim=3)[0].double(), wanted, atol=1e-5, rtol=1e-5)
    stored = cache[0][torch.tensor(table)][:, :, 0].transpose(0, 1).reshape(HEADS, 12, SIZE)
    torch.testing.assert_close(stored[:, :10], k[0, :, 0])
    assert (cache[0][[1, 2, 4]] == 1e4).all(), "blocks of other rows must not change"


def test_a_batch_of_decode_steps_takes_each_row_at_its_own_position() -> None:
    cache, tables, starts = caches(), [[1, 4], [2, 0]], (5, 2)
    rows = [row(start + 1, seed=10 * start) for start in starts]
    for (q, k, v), start, table in zip(rows, starts, tables, strict=True):
        before = (q[..., :start, :], k[..., :start, :], v[..., :start, :])
        OPERATORS.paged_causal_attn_prefill(**named(*before, cache, 0, table), is_bidirectional=False)
    last = [torch.cat([one[i][..., -1:, :] for one in rows]) for i in range(3)]
    call = named(last[0], last[1], last[2], cache, 0, tables[0])
    call |= {"seq": torch.tensor([[n] for n in starts]), "block_table": torch.tensor(tables, dtype=torch.int16)}
    found = OPERATORS.paged_causal_attn_decode(**call)
    for i, ((q, k, v), start) in enumerate(zip(rows, starts, strict=True)):
        wanted = plain(q[0][..., -1:, :], k[0, :, 0], v[0, :, 0], torch.ones(1, start + 1, dtype=torch.bool))
        torch.testing.assert_close(found[i].double(), wanted, atol=1e-5, rtol=1e-5, msg=f"row {i} at {start}")


def test_a_bidirectional_prefill_attends_to_the_whole_chunk_and_a_mask_takes_positions_away() -> None:
    q, k, v = row(6, seed=3)
    call = named(q, k, v, caches(), 0, [0, 1])
    everything = torch.ones(6, 6, dtype=torch.bool)
    found = OPERATORS.paged_causal_attn_prefill(**call, is_bidirectional=True)
    torch.testing.assert_close(found[0].double(), plain(q[0], k[0, :, 0], v[0, :, 0], everything), atol=1e-5, rtol=1e-5)
    mask = torch.tensor([[1.0, 0, 1, 1, 1, 1, 0, 0]])
    found = OPERATORS.paged_causal_attn_prefill(**call, is_bidirectional=True, mask=mask)
    everything[:, 1] = False
    torch.testing.assert_close(found[0].double(), plain(q[0], k[0, :, 0], v[0, :, 0], everything), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["paged_attn", "paged_flash_attn"])
def test_masked_operators_attend_to_what_the_mask_says_and_a_padded_query_still_gives_a_number(name: str) -> None:
    q, k, v = row(3, seed=4)
    attends = torch.tensor([[1, 0, 1], [0, 1, 1], [0, 0, 0]], dtype=torch.bool)
    mask = torch.zeros(1, 1, 1, 3, 8)
    mask[0, 0, 0, :, :3] = attends
    flash = {"partition": BLOCK} if "flash" in name else {}
    found = getattr(OPERATORS, f"{name}_prefill")(**named(q, k, v, caches(), 0, [0, 1]), mask=mask, **flash)
    wanted = plain(q[0], k[0, :, 0], v[0, :, 0], attends)
    torch.testing.assert_close(found[0, :, :, :2].double(), wanted[:, :, :2], atol=1e-5, rtol=1e-5)
    assert found.isfinite().all()


def test_attention_sinks_take_their_share_and_give_nothing() -> None:
    q, k, v = row(1, seed=5)
    sinks = draw(HEADS * GROUPS, 1, seed=6)
    found = OPERATORS.paged_causal_attn_decode(**named(q, k, v, caches(), 0, [0, 1]), s_aux=sinks)
    score = (q[0, :, :, 0] * k[0, :, 0, 0, None]).sum(-1) * SCALE  # [H, G]
    share = score.exp() / (score.exp() + sinks.reshape(HEADS, GROUPS).exp())
    torch.testing.assert_close(found[0, :, :, 0], share[..., None] * v[0, :, 0, 0, None])


def test_positions_and_blocks_that_do_not_exist_are_named() -> None:
    q, k, v = row(3, seed=7)
    with pytest.raises(RBLNRuntimeError, match="positions 6 to 8 do not fit a row of 2 blocks of 4"):
        OPERATORS.paged_causal_attn_decode(**named(q, k, v, caches(), 6, [0, 1]))
    with pytest.raises(RBLNRuntimeError, match="there is no block -1; the cache has 6 blocks"):
        OPERATORS.paged_causal_attn_decode(**named(q, k, v, caches(), 3, [0, -1]))
    with pytest.raises(RBLNRuntimeError, match="block_size: 5"):
        OPERATORS.paged_causal_attn_decode(**named(q, k, v, caches(), 3, [0, 1]) | {"block_size": 5})


def test_the_operators_of_the_documented_list_are_there() -> None:
    pairs = ("paged_causal_attn", "paged_flash_causal_attn", "paged_attn", "paged_flash_attn")
    wanted = {"linear", "rbln_cache_update"} | {f"{name}_{phase}" for name in pairs for phase in ("prefill", "decode")}
    assert set(KERNELS) == wanted
    assert all(hasattr(OPERATORS, name) for name in wanted)


def test_linear_is_linear() -> None:
    x, weight, bias = draw(2, 5), draw(3, 5, seed=1), draw(3, seed=2)
    torch.testing.assert_close(OPERATORS.linear(x, weight, bias), x @ weight.T + bias)
    torch.testing.assert_close(OPERATORS.linear(x, weight), x @ weight.T)


def rounded(x: Tensor) -> Tensor:
    """Nearest bfloat16, ties to even, by its bits."""
    bits = x.float().contiguous().view(torch.int32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & ~0xFFFF).view(torch.float32)


def test_rounding_by_bits_is_an_independent_reference() -> None:
    assert rounded(torch.tensor([1.0, 1 + 2**-8, 1 + 3 * 2**-8])).tolist() == [1.0, 1.0, 1 + 2**-6]


def test_bfloat16_mode_rounds_inputs_and_results_of_products_and_nothing_else() -> None:
    x, weight, bias = draw(4, 16), draw(8, 16, seed=1), draw(8, seed=2)
    wanted = rounded(rounded(x) @ rounded(weight).T + rounded(bias))
    image, kernel = draw(1, 2, 5, 5, seed=3), draw(3, 2, 2, 2, seed=4)
    with torch.no_grad(), MODES["bfloat16"]():
        assert torch.equal(torch.nn.functional.linear(x, weight, bias), wanted)
        assert torch.equal(OPERATORS.linear(x, weight, bias), wanted)
        assert torch.equal(x @ weight.T, rounded(rounded(x) @ rounded(weight).T))
        assert torch.equal(x[None] @ weight.T[None], rounded(rounded(x) @ rounded(weight).T)[None])
        folded = torch.nn.functional.conv2d(image, kernel)
        softmax, total = x.softmax(-1), x + 1e-4
    patches = torch.nn.functional.unfold(rounded(image), 2)  # [1, 8, 16]
    by_hand = rounded((rounded(kernel).reshape(3, 8) @ patches[0]).reshape(1, 3, 4, 4))
    assert (folded - by_hand).abs().max() <= 2**-7 * by_hand.abs().max(), "one step of bfloat16 at most"
    assert torch.equal(folded, rounded(folded))
    assert torch.equal(softmax, x.softmax(-1))
    assert torch.equal(total, x + 1e-4)
    assert torch.equal(torch.nn.functional.linear(x, weight, bias), torch.addmm(bias, x, weight.T))


def test_bfloat16_mode_rounds_both_products_of_an_attention() -> None:
    q, k, v = row(1, seed=8)
    q[:], k[:] = 1.0, 1.0
    v = v + 2**-12
    table = [0, 1]
    with torch.no_grad(), MODES["bfloat16"]():
        found = OPERATORS.paged_causal_attn_decode(**named(q, k, v, caches(), 0, table))
        dense = torch.nn.functional.scaled_dot_product_attention(k[0], k[0], v[0])
    # One position takes the whole share, so the result is v, rounded.
    assert torch.equal(found[0], rounded(v[0]).expand(-1, GROUPS, -1, -1))
    assert torch.equal(dense, rounded(v[0]))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_cache_is_updated_in_place_from_a_position_along_an_axis(axis: int) -> None:
    cache, before = draw(5, 6, 7), draw(5, 6, 7)
    shape = [5, 6, 7]
    shape[axis] = 2
    state = draw(*shape, seed=3)
    found = OPERATORS.rbln_cache_update(cache, state, torch.tensor([3], dtype=torch.int16), torch.tensor(axis))
    wanted = before.numpy().copy()
    wanted[(slice(None),) * axis + (slice(3, 5),)] = state.numpy()
    assert (cache.numpy() == wanted).all()
    assert (found.numpy() == wanted).all()


@pytest.mark.parametrize(
    ("position", "axis", "shape", "message"),
    [
        (4, 0, (2, 6, 7), "position: 4 to 5 do not fit axis 0"),
        (-1, 0, (2, 6, 7), "position: -1 to 0 do not fit axis 0"),
        (0, 3, (2, 6, 7), "axis: 3 of a cache"),
        (0, 0, (6, 7), "axis: 0 of a cache"),
        (0, 0, (2, 6, 1), "state: .*axis 0 of the cache takes"),
    ],
)
def test_a_state_that_does_not_fit_its_cache_is_refused(
    position: int, axis: int, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(RBLNRuntimeError, match=message):
        OPERATORS.rbln_cache_update(draw(5, 6, 7), draw(*shape), torch.tensor(position), torch.tensor(axis))
