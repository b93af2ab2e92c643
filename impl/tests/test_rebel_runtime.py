"""Calling compiled models in the emulator: caches, devices, inputs and outputs."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from rebel_objects import STEPS, WIDTH, Counter, programs
from torch import Tensor, nn

import vlmqual_rebel
from vlmqual_rebel.errors import RBLNRuntimeError

MIB = 2**20


@pytest.fixture
def rebel() -> Iterator[ModuleType]:
    yield vlmqual_rebel.install(npu="RBLN-CA25", devices=4)
    vlmqual_rebel.uninstall()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefill and decode of one counter, saved; and a model of two inputs and nested outputs."""
    rebel = vlmqual_rebel.install(npu="RBLN-CA25", devices=4)
    place = tmp_path_factory.mktemp("compiled")
    for name, one in zip(("prefill", "decode"), programs(rebel, Counter()), strict=True):
        one.save(place / f"{name}.rbln")
    info = [("x", (2, 3), "float32"), ("y", (3,), "int32")]
    rebel.compile_from_torch(Nested(), info, num_devices=2, npu="RBLN-CA22").save(place / "nested.rbln")
    vlmqual_rebel.uninstall()
    return place


class Nested(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, tuple[Tensor, dict[str, Tensor]]]:
        x.mul_(2)  # of the device's copy
        return x, (y + 1, {"sum": x.sum()})


def rows(seed: int) -> Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(seed))


def start(n: int) -> Tensor:
    return torch.tensor(n)


class Copy:
    """One loaded copy of the counter."""

    def __init__(self, rebel: ModuleType, prefill: Any, decode: Any, seed: int) -> None:
        self.prefill = rebel.Runtime(prefill, tensor_type="pt")
        self.decode = rebel.Runtime(decode, tensor_type="pt")
        self.x, self.done = rows(seed), 0

    def step(self) -> None:
        size = 1 if self.done else 2
        part = self.x[self.done : self.done + size]
        found = (self.decode if self.done else self.prefill)(part, start(self.done))
        self.done += size
        torch.testing.assert_close(found, Counter().expected(list(self.x[: self.done])))


def test_prefill_and_decode_share_their_cache_as_compiled_and_from_separate_files(
    rebel: ModuleType, folder: Path
) -> None:
    compiled = programs(rebel, Counter())
    for prefill, decode in (compiled, (folder / "prefill.rbln", folder / "decode.rbln")):
        copy = Copy(rebel, prefill, decode, seed=1)
        for _ in range(3):
            copy.step()


def test_two_copies_of_a_model_do_not_share_their_caches(rebel: ModuleType, folder: Path) -> None:
    copies = [Copy(rebel, folder / "prefill.rbln", folder / "decode.rbln", seed) for seed in (2, 3)]
    for _ in range(3):
        for copy in copies:
            copy.step()


def test_a_model_on_other_devices_has_a_cache_of_its_own(rebel: ModuleType, folder: Path) -> None:
    prefill = rebel.Runtime(folder / "prefill.rbln", tensor_type="pt", device=0)
    decode = rebel.Runtime(folder / "decode.rbln", tensor_type="pt", device=1)
    x = rows(4)
    prefill(x[:2], start(0))
    torch.testing.assert_close(decode(x[2:3], start(2)), Counter().expected([x[2]]))


def test_a_cache_made_larger_after_compilation_is_as_large(rebel: ModuleType, folder: Path) -> None:
    models = [rebel.RBLNCompiledModel(folder / f"{name}.rbln") for name in ("prefill", "decode")]
    models[0].exp_multiply_buffer_size({"cache": 3})
    prefill = rebel.Runtime(models[0], tensor_type="pt")
    with pytest.raises(RBLNRuntimeError, match=r"cache float32.*: another program of the same context"):
        rebel.Runtime(models[1], tensor_type="pt")
    models[1].exp_multiply_buffer_size({"cache": 3})
    decode = rebel.Runtime(models[1], tensor_type="pt")
    x = rows(5)
    prefill(x[:2], start(0))
    found = decode(x[2:3], start(3 * STEPS - 1))
    torch.testing.assert_close(found, Counter().expected(list(x[:3])))
    models[1].save(folder / "larger.rbln")
    try:
        assert rebel.RBLNCompiledModel.inspect(folder / "larger.rbln")["static"][0]["shape"] == [3 * STEPS, WIDTH]
    finally:
        (folder / "larger.rbln").unlink()


def test_outputs_come_in_the_order_of_the_nest_and_inputs_stay_as_they_are(rebel: ModuleType, folder: Path) -> None:
    x, y = torch.ones(2, 3), torch.arange(3, dtype=torch.int32)
    torch_runtime = rebel.Runtime(folder / "nested.rbln", tensor_type="pt")
    for call in (torch_runtime, torch_runtime.run):
        doubled, plus, total = call(x, y=y)
        assert torch.equal(doubled, torch.full((2, 3), 2.0))
        assert (plus.tolist(), plus.dtype, total.item()) == ([1, 2, 3], torch.int32, 12.0)
    assert torch.equal(x, torch.ones(2, 3)), "the program must not reach the caller's tensor"
    found = rebel.Runtime(folder / "nested.rbln")(x.numpy(), y.numpy())
    assert [type(one) for one in found] == [np.ndarray] * 3
    assert found[1].tolist() == [1, 2, 3]


def test_out_is_written_in_place_also_into_a_view_and_in_inference_mode(rebel: ModuleType, folder: Path) -> None:
    runtime = rebel.Runtime(folder / "nested.rbln", tensor_type="pt")
    x, y = torch.ones(2, 3), torch.arange(3, dtype=torch.int32)
    whole = torch.zeros(4, 2, 3)
    out = [whole[1], torch.zeros(3, dtype=torch.int32), torch.zeros(())]
    assert runtime(x, y, out=out) is out
    assert whole.sum(dim=(1, 2)).tolist() == [0, 12, 0, 0]
    with torch.inference_mode():
        made = [torch.zeros(2, 3), torch.zeros(3, dtype=torch.int32), torch.zeros(())]
        runtime(x, y, out=made)
        assert made[2].item() == 12
    arrays = [np.zeros((2, 3), np.float32), np.zeros(3, np.int32), np.zeros((), np.float32)]
    rebel.Runtime(folder / "nested.rbln")(x.numpy(), y.numpy(), out=arrays)
    assert (arrays[0].sum(), arrays[2]) == (12, 12)
    with pytest.raises(RBLNRuntimeError, match="out: 1 arrays for 3 outputs"):
        runtime(x, y, out=whole[0])
    with pytest.raises(RBLNRuntimeError, match=r"out output_1 is int64\[3\]; .* int32\[3\]"):
        runtime(x, y, out=[whole[0], torch.zeros(3, dtype=torch.int64), torch.zeros(())])


class Slots(nn.Module):
    """Writes a state into a slot of a cache by RBLN's operator, with the axis as a constant of the program."""

    def forward(self, state: Tensor, slot: Tensor, cache: Tensor) -> Tensor:
        axis = torch.tensor(0, dtype=torch.int16)
        updated: Tensor = torch.ops.rbln_custom_ops.rbln_cache_update(cache, state, slot[0], axis)
        return updated


class Seen(nn.Module):
    """Reads the whole cache."""

    def forward(self, factor: Tensor, cache: Tensor) -> Tensor:
        return cache * factor


def test_what_one_program_puts_into_a_slot_of_a_shared_cache_another_reads(rebel: ModuleType) -> None:
    context = rebel.CompileContext()
    cache = torch.zeros(3, WIDTH)
    context.mark_static_address(cache, "image_keys")
    shape = ("cache", (3, WIDTH), "float32")
    write = rebel.compile_from_torch(
        Slots(),
        input_info=[("state", (1, WIDTH), "float32"), ("slot", (1,), "int16"), shape],
        example_inputs=(torch.zeros(1, WIDTH), torch.zeros(1, dtype=torch.int16), cache),
        compile_context=context,
    )
    read = rebel.compile_from_torch(
        Seen(),
        input_info=[("factor", (), "float32"), shape],
        example_inputs=(torch.tensor(1.0), cache),
        compile_context=context,
    )
    writing, reading = rebel.Runtime(write, tensor_type="pt"), rebel.Runtime(read, tensor_type="pt")
    x = rows(6)
    for slot in (2, 0):
        writing(x[slot : slot + 1], torch.tensor([slot], dtype=torch.int16))
    found = reading(torch.tensor(2.0))
    torch.testing.assert_close(found, 2 * torch.stack([x[0], torch.zeros(WIDTH), x[2]]))


def test_a_returned_cache_is_a_copy_of_it(rebel: ModuleType) -> None:
    class Returns(nn.Module):
        def forward(self, x: Tensor, cache: Tensor) -> Tensor:
            cache.add_(x)
            return cache

    context, cache = rebel.CompileContext(), torch.zeros(2)
    context.mark_static_address(cache, "cache")
    info = [("x", (2,), "float32"), ("cache", (2,), "float32")]
    compiled = rebel.compile_from_torch(
        Returns(), info, example_inputs=(torch.zeros(2), cache), compile_context=context
    )
    runtime = rebel.Runtime(compiled, tensor_type="pt")
    first, second = runtime(torch.ones(2)), runtime(torch.ones(2))
    assert (first.tolist(), second.tolist(), cache.tolist()) == ([1, 1], [2, 2], [0, 0])


@pytest.mark.parametrize(
    ("inputs", "named", "message"),
    [
        ((torch.ones(2, 3),), {}, "missing input y; the model takes: x, y"),
        ((torch.ones(2, 3),) * 3, {}, "3 inputs for a model of 2: x, y"),
        ((torch.ones(2, 3),), {"z": torch.ones(1)}, "z is not an input of the model; valid: x, y"),
        ((torch.ones(2, 3),), {"x": torch.ones(2, 3)}, "x is given by position and by name"),
        ((torch.ones(2, 4), torch.ones(3, dtype=torch.int32)), {}, r"input x is float32\[2, 4\]; .* float32\[2, 3\]"),
        ((torch.ones(2, 3), torch.ones(3)), {}, r"input y is float32\[3\]; .* int32\[3\]"),
        ((np.ones((2, 3)), torch.ones(3)), {}, "input x is a numpy.ndarray"),
        ((torch.ones(2, 3, device="meta"), torch.ones(3)), {}, "input x is on the device meta"),
    ],
)
def test_a_wrong_input_is_named(
    rebel: ModuleType, folder: Path, inputs: tuple[Any, ...], named: dict[str, Any], message: str
) -> None:
    runtime = rebel.Runtime(folder / "nested.rbln", tensor_type="pt")
    with pytest.raises(RBLNRuntimeError, match=message):
        runtime(*inputs, **named)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": 0}, RBLNRuntimeError, "device: 0 names 1 device.s., but num_devices is 2"),
        ({"device": [0, 1, 2]}, RBLNRuntimeError, "names 3 device"),
        ({"device": [1, 1]}, RBLNRuntimeError, "names a device twice"),
        ({"device": [3, 4]}, RBLNRuntimeError, "there is no NPU 4; valid: 0 to 3"),
        ({"device": [-1, 0]}, RBLNRuntimeError, "there is no NPU -1"),
        ({"device": "0"}, TypeError, "device: '0' is neither"),
        ({"tensor_type": "tf"}, ValueError, "tensor_type: 'tf'; valid: np, pt"),
        ({"timeout": 1.5}, TypeError, "timeout: 1.5 is a float"),
        ({"activate_profiler": True}, RBLNRuntimeError, "activate_profiler"),
    ],
)
def test_a_runtime_that_cannot_be_made_says_why(
    rebel: ModuleType, folder: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        rebel.Runtime(folder / "nested.rbln", **options)


def test_devices_of_the_same_generation_fit_and_others_do_not(folder: Path) -> None:
    for npu, fits in (("RBLN-CA25", True), ("RBLN-CA22", True), ("RBLN-CA12", False), ("RBLN-CR13", False)):
        rebel = vlmqual_rebel.install(npu=npu, devices=2)
        try:
            if fits:
                rebel.Runtime(folder / "nested.rbln", device=[1, 0], timeout=3, activate_profiler=False)
            else:
                with pytest.raises(RBLNRuntimeError, match=f"compiled for RBLN-CA22, but device 0 is a {npu}"):
                    rebel.Runtime(folder / "nested.rbln")
        finally:
            vlmqual_rebel.uninstall()


def test_more_devices_than_the_host_has_are_refused(rebel: ModuleType) -> None:
    compiled = rebel.compile_from_torch(nn.Identity(), [("x", (1,), "float32")], num_devices=8)
    with pytest.raises(RBLNRuntimeError, match="there is no NPU 4"):
        rebel.Runtime(compiled)


def test_a_device_that_is_full_says_so_in_the_words_that_optimum_looks_for() -> None:
    rebel = vlmqual_rebel.install(devices=4, memory_bytes=12 * MIB)
    try:
        model = nn.Linear(1024, 1024, bias=False)  # 4 MiB
        context = rebel.CompileContext(use_weight_sharing=True)
        cache = torch.zeros(MIB, device="meta")  # 4 MiB
        context.mark_static_address(cache, "cache")

        class Cached(nn.Linear):
            def forward(self, x: Tensor, cache: Tensor) -> Tensor:
                return super().forward(x) + cache[0]

        model = Cached(1024, 1024, bias=False)
        both = [
            rebel.compile_from_torch(
                model,
                [("x", (n, 1024), "float32"), ("cache", (MIB,), "float32")],
                example_inputs=(torch.zeros(n, 1024), cache),
                compile_context=context,
            )
            for n in (2, 1)
        ]
        copy = [rebel.Runtime(one, device=0) for one in both]  # 8 MiB: weights and cache count once
        with pytest.raises(RBLNRuntimeError, match=r"^Lack of device memory: .* needs 8388608 bytes more on device 0"):
            rebel.Runtime(both[0], device=0)
        rebel.Runtime(both[0], device=1)
        del copy
        gc.collect()
        rebel.Runtime(both[0], device=0)
        two = rebel.compile_from_torch(nn.Linear(2048, 2048, bias=False), [("x", (1, 2048), "float32")], num_devices=2)
        kept = rebel.Runtime(two, device=[2, 3])  # 8 MiB on each
        assert kept.devices == (2, 3)
        with pytest.raises(RBLNRuntimeError, match="on device 3"):
            rebel.Runtime(two, device=[1, 3])
    finally:
        vlmqual_rebel.uninstall()


def test_a_call_takes_the_compiled_shapes_that_fit(rebel: ModuleType) -> None:
    shapes = [[("x", (n, 3), "float32")] for n in (1, 4)]
    runtime = rebel.Runtime(rebel.compile_from_torch(nn.Flatten(0), shapes), tensor_type="pt")
    assert [runtime(torch.ones(n, 3)).shape[0] for n in (1, 4)] == [3, 12]
    with pytest.raises(RBLNRuntimeError, match="fit none of 2 sets of shapes"):
        runtime(torch.ones(2, 3))


def test_numpy_has_no_bfloat16(rebel: ModuleType) -> None:
    compiled = rebel.compile_from_torch(nn.Identity(), [("x", (1,), torch.bfloat16)])
    with pytest.raises(RBLNRuntimeError, match="x is bfloat16, which numpy does not have; use tensor_type='pt'"):
        rebel.Runtime(compiled)
    one = torch.ones(1, dtype=torch.bfloat16)
    assert torch.equal(rebel.Runtime(compiled, tensor_type="pt")(one), one)


def test_an_instance_makes_runtimes_of_one_kind(rebel: ModuleType, folder: Path) -> None:
    model = rebel.RBLNCompiledModel(folder / "prefill.rbln")
    assert model.create_runtime(device=1, tensor_type="pt").devices == (1,)
    with pytest.raises(RBLNRuntimeError, match="has been used with create_runtime"):
        model.create_async_runtime()
    other = rebel.RBLNCompiledModel(folder / "prefill.rbln")
    other.create_async_runtime(parallel=2)
    with pytest.raises(RBLNRuntimeError, match="has been used with create_async_runtime"):
        other.create_runtime()
    with pytest.raises(ValueError, match="parallel: 3; valid: 1, 2 or None"):
        rebel.AsyncRuntime(folder / "prefill.rbln", parallel=3)


def test_awaited_calls_give_what_calls_give(rebel: ModuleType, folder: Path) -> None:
    runtime = rebel.AsyncRuntime(folder / "nested.rbln", tensor_type="pt", parallel=2)

    async def both() -> list[Any]:
        y = torch.zeros(3, dtype=torch.int32)
        return await asyncio.gather(*(runtime.async_run(torch.full((2, 3), n), y) for n in (1.0, 2.0)))

    assert [found[2].item() for found in asyncio.run(both())] == [12, 24]


def test_the_numeric_mode_is_that_of_the_machine_the_program_runs_on(tmp_path: Path) -> None:
    model, x = nn.Linear(64, 64), torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    exact = model(x).detach()
    found = {}
    for numeric in ("float32", "bfloat16"):
        rebel = vlmqual_rebel.install(numeric=numeric)
        try:
            if numeric == "float32":
                rebel.compile_from_torch(model, [("x", (1, 64), "float32")]).save(tmp_path / "x.rbln")
            found[numeric] = rebel.Runtime(tmp_path / "x.rbln", tensor_type="pt")(x)
        finally:
            vlmqual_rebel.uninstall()
    assert torch.equal(found["float32"], exact)
    assert torch.equal(found["bfloat16"], found["bfloat16"].bfloat16().float())
    assert 0 < (found["bfloat16"] - exact).abs().max() < 0.05
