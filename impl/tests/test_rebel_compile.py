"""Compiling, files and the accounting of memory in the emulator."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rebel_objects import STEPS, WIDTH, Counter, programs
from torch import Tensor, nn

import vlmqual_rebel
from vlmqual_rebel.errors import RBLNCompileError, RBLNRuntimeError

MIB = 2**20
INFO = [("x", (2, 3), "float32")]


@pytest.fixture
def rebel() -> Iterator[ModuleType]:
    yield vlmqual_rebel.install(npu="RBLN-CA25", devices=4)
    vlmqual_rebel.uninstall()


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Any, Any]]:
    """Prefill and decode of one model, compiled once for the tests that do not change them."""
    compiled = programs(vlmqual_rebel.install(npu="RBLN-CA25", devices=4), Counter(), num_devices=2)
    vlmqual_rebel.uninstall()
    return compiled  # type: ignore[return-value]


class Scale(nn.Module):
    def __init__(self, size: int = 3, factor: float = 2.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), factor))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def test_a_program_is_what_the_model_was_when_it_was_compiled(
    rebel: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Phases(nn.Linear):
        phase = "prefill"

        def forward(self, x: Tensor) -> Tensor:
            y = nn.functional.linear(x, self.weight, self.bias)
            return y if self.phase == "prefill" else -y

    model, x = Phases(3, 3), torch.ones(2, 3)
    with monkeypatch.context() as patch:  # as optimum-rbln does while it compiles
        patch.setattr(nn.functional, "linear", torch.ops.rbln_custom_ops.linear)
        prefill = rebel.compile_from_torch(model, input_info=INFO)
        model.phase = "decode"
        decode = rebel.compile_from_torch(model, input_info=INFO)
    wanted = -model(x).detach()
    model.phase = "other"
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    torch.testing.assert_close(rebel.Runtime(prefill, tensor_type="pt")(x), wanted)
    torch.testing.assert_close(rebel.Runtime(decode, tensor_type="pt")(x), -wanted)


def test_parameters_made_in_inference_mode_can_be_compiled(rebel: ModuleType) -> None:
    with torch.inference_mode():
        compiled = rebel.compile_from_torch(Scale(), input_info=INFO)
    assert torch.equal(rebel.Runtime(compiled, tensor_type="pt")(torch.ones(2, 3)), torch.full((2, 3), 2.0))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_devices": 3}, ValueError, "num_devices: 3; valid: 1, 2, 4, 8, 16, 32"),
        ({"tensor_parallel_size": 64}, ValueError, "tensor_parallel_size: 64"),
        ({"num_devices": 2, "tensor_parallel_size": 4}, ValueError, "num_devices: 2, but tensor_parallel_size"),
        ({"num_devices": 2, "npu": "RBLN-CR13"}, ValueError, "RBLN-CR13 does not divide"),
        ({"npu": "RBLN-XX"}, ValueError, "npu: 'RBLN-XX' .* RBLN-CA25"),
        ({"input_info": []}, TypeError, "input_info: must be a list"),
        ({"input_info": [("x", (2, 3))]}, TypeError, r"input_info: \('x', \(2, 3\)\) is not"),
        ({"input_info": [("x", (2, 0), "float32")]}, ValueError, "x has the shape"),
        ({"input_info": [("x", (2, 3), "float33")]}, ValueError, "x: 'float33' is not the name of a dtype"),
        ({"input_info": INFO + INFO}, ValueError, "x is there twice"),
        ({"example_inputs": ()}, ValueError, "0 tensors for the 1 inputs"),
        (
            {"example_inputs": (torch.zeros(2, 4),)},
            ValueError,
            r"float32\[2, 4\], but input_info says x float32\[2, 3\]",
        ),
        ({"example_inputs": ([1],)}, TypeError, "x is a list"),
        ({"compile_context": 1}, TypeError, "compile_context: a int"),
        ({"model_trace_method": "guess"}, ValueError, "model_trace_method: 'guess'"),
        ({"mod": print}, TypeError, "mod: a builtin"),
    ],
)
def test_a_wrong_argument_is_named(
    rebel: ModuleType, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        rebel.compile_from_torch(**{"mod": Scale(), "input_info": INFO} | options)


def test_a_model_that_does_not_run_names_the_stage(rebel: ModuleType) -> None:
    with pytest.raises(RBLNCompileError, match=r"^Model Conversion: RuntimeError: .*\[5\]"):
        rebel.compile_from_torch(Scale(size=5), input_info=INFO)


def test_a_model_that_changes_its_own_buffer_is_refused(rebel: ModuleType) -> None:
    class Remembers(nn.Module):
        seen: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            self.seen[1:3].copy_(x)
            return self.seen + 1

    with pytest.raises(RBLNCompileError, match="the model changes its own seen; make it an input"):
        rebel.compile_from_torch(Remembers(), input_info=INFO)


def test_a_host_without_an_npu_compiles_for_one_that_is_named_but_does_not_run(tmp_path: Path) -> None:
    rebel = vlmqual_rebel.install(devices=0)
    try:
        with pytest.raises(ValueError, match="npu: the host has no NPU"):
            rebel.compile_from_torch(Scale(), input_info=INFO)
        compiled = rebel.compile_from_torch(Scale(), input_info=INFO, npu="RBLN-CA25", num_devices=8)
        with pytest.raises(RBLNRuntimeError, match="there is no NPU 0; valid: none"):
            rebel.Runtime(compiled)
        compiled.save(tmp_path / "for-later.rbln")
        assert rebel.RBLNCompiledModel.inspect(tmp_path / "for-later.rbln")["num_devices"] == 8
    finally:
        vlmqual_rebel.uninstall()


def test_two_tensors_of_a_context_cannot_have_one_name(rebel: ModuleType) -> None:
    context = rebel.CompileContext()
    tensor = torch.zeros(1)
    context.mark_static_address(tensor, "cache")
    context.mark_static_address(tensor, "cache")
    with pytest.raises(ValueError, match="cache is already the name"):
        context.mark_static_address(torch.zeros(1), "cache")
    with pytest.raises(TypeError, match="cache is a int"):
        context.mark_static_address(1, "cache")


def test_inspect_tells_what_a_file_holds_and_that_it_is_emulated(
    rebel: ModuleType, pair: tuple[Any, Any], tmp_path: Path
) -> None:
    file = tmp_path / "prefill.rbln"
    pair[0].save(file)
    found = rebel.RBLNCompiledModel.inspect(file)
    assert found["npu"] == "RBLN-CA25"
    assert found["inputs"] == [
        {"name": "x", "shape": [2, WIDTH], "dtype": "float32"},
        {"name": "start", "shape": [], "dtype": "int64"},
    ]
    assert found["static"] == [{"name": "cache", "shape": [STEPS, WIDTH], "dtype": "float32"}]
    assert [(one["shape"], one["dtype"]) for one in found["outputs"]] == [([WIDTH], "float32")]
    assert (found["num_devices"], found["tensor_parallel_size"], len(found["alloc_per_node"])) == (2, 2, 2)
    assert found["emulated"] is True
    assert "not emulated" in found["tensor_parallelism"]
    assert "emulated" in found["compiler_version"]


def test_a_path_must_be_a_path(rebel: ModuleType, pair: tuple[Any, Any], tmp_path: Path) -> None:
    for wrong in (1, None, b"x.rbln"):
        with pytest.raises(TypeError, match="is not a path"):
            rebel.RBLNCompiledModel(wrong)
        with pytest.raises(TypeError, match="is not a path"):
            rebel.RBLNCompiledModel.inspect(wrong)
        with pytest.raises(TypeError, match="is not a path"):
            pair[0].save(wrong)
    with pytest.raises(FileNotFoundError):
        rebel.RBLNCompiledModel(tmp_path / "none.rbln")


def test_a_file_cut_anywhere_is_refused_in_one_sentence(
    rebel: ModuleType, pair: tuple[Any, Any], tmp_path: Path
) -> None:
    file = tmp_path / "prefill.rbln"
    pair[0].save(file)
    whole = file.read_bytes()
    for kept in (len(whole) - 1, len(whole) // 2, 10):
        file.write_bytes(whole[:kept])
        with pytest.raises(RBLNRuntimeError, match="is cut short or damaged") as caught:
            rebel.RBLNCompiledModel(file)
        assert "\n" not in str(caught.value)
    file.write_bytes(b"")
    with pytest.raises(RBLNRuntimeError, match="is not a compiled model of the vlmqual_rebel emulator"):
        rebel.RBLNCompiledModel(file)


def test_a_changed_byte_of_a_weight_or_an_operation_is_found(
    rebel: ModuleType, pair: tuple[Any, Any], tmp_path: Path
) -> None:
    file = tmp_path / "prefill.rbln"
    pair[0].save(file)
    for member in [name for name in zipfile.ZipFile(file).namelist() if name != "meta.json"]:
        changed = tmp_path / "changed.rbln"
        _rewrite(file, changed, member, lambda data: data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(RBLNRuntimeError, match=r"changed.rbln is damaged"):
            rebel.RBLNCompiledModel(changed)
        changed.unlink()


def test_foreign_and_other_versions_are_refused(rebel: ModuleType, pair: tuple[Any, Any], tmp_path: Path) -> None:
    file, other = tmp_path / "prefill.rbln", tmp_path / "other.rbln"
    pair[0].save(file)
    other.write_bytes(b"\x7fELF and more")
    with pytest.raises(RBLNRuntimeError, match=r"no other .rbln file can be read here"):
        rebel.RBLNCompiledModel(other)
    with zipfile.ZipFile(other, "w") as foreign:
        foreign.writestr("model.json", "{}")
    with pytest.raises(RBLNRuntimeError, match=r"no other .rbln file can be read here"):
        rebel.RBLNCompiledModel(other)
    for key, value, message in (
        ("format_version", 99, "compiled with format_version 99, and this is"),
        ("torch", "1.0.0", "compiled with torch 1.0.0, and this is"),
        ("digest", "0", "does not have the digest"),
        ("model", {}, "does not have the digest"),
    ):

        def change(data: bytes, key: str = key, value: object = value) -> bytes:
            return json.dumps(json.loads(data) | {key: value}).encode()

        _rewrite(file, other, "meta.json", change)
        with pytest.raises(RBLNRuntimeError, match=message):
            rebel.RBLNCompiledModel(other)
    vlmqual_rebel.uninstall()
    newer = vlmqual_rebel.install(devices=4, sdk_version="0.13.0")
    with pytest.raises(RBLNRuntimeError, match=r"compiled with 0.12.0\+emulated, and this is 0.13.0\+emulated"):
        newer.RBLNCompiledModel(file)


def test_a_file_is_written_whole_or_not_at_all(
    rebel: ModuleType, pair: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prefill.rbln"
    file.write_bytes(b"before")

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(zipfile.ZipFile, "open", fail)
    with pytest.raises(OSError, match="disk full"):
        pair[0].save(file)
    assert file.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [file]


def test_programs_that_share_weights_store_them_once_in_a_folder_that_may_move(
    rebel: ModuleType, tmp_path: Path
) -> None:
    model = nn.Linear(256, 256)
    context = rebel.CompileContext(use_weight_sharing=True)
    both = [
        rebel.compile_from_torch(model, input_info=[("x", (n, 256), "float32")], compile_context=context)
        for n in (2, 1)
    ]
    here = tmp_path / "here"
    for name, one in zip(("prefill", "decode"), both, strict=True):
        one.save(here / f"{name}.rbln")
    weights = 4 * (256 * 256 + 256)
    sizes = [(here / f"{name}.rbln").stat().st_size for name in ("prefill", "decode")]
    assert sizes[0] > weights > sizes[1]
    moved = here.rename(tmp_path / "there")
    x = torch.ones(1, 256)
    loaded = rebel.Runtime(moved / "decode.rbln", tensor_type="pt")
    torch.testing.assert_close(loaded(x), model(x).detach())
    # Saved again in place in the other order, as when a tool resizes the caches of a folder.
    again = {name: rebel.RBLNCompiledModel(moved / f"{name}.rbln") for name in ("decode", "prefill")}
    for name, one in again.items():
        one.save(moved / f"{name}.rbln")
    assert rebel.RBLNCompiledModel.inspect(moved / "decode.rbln")["weights_elsewhere"] == 2
    (moved / "prefill.rbln").rename(tmp_path / "prefill.rbln")
    with pytest.raises(RBLNRuntimeError, match=r"shares 2 of its 2 weights with another .rbln file"):
        rebel.RBLNCompiledModel(moved / "decode.rbln")
    alone = rebel.compile_from_torch(model, input_info=[("x", (1, 256), "float32")])
    alone.save(moved / "decode.rbln")
    rebel.RBLNCompiledModel(moved / "decode.rbln")


def test_memory_is_divided_over_the_devices_and_shared_weights_count_once(rebel: ModuleType) -> None:
    size = 1024
    model = nn.Linear(size, size, bias=False)  # 4 MiB
    for sharing, decode in ((True, 0), (False, 2 * MIB)):
        context = rebel.CompileContext(use_weight_sharing=sharing)
        cache = torch.zeros(3, MIB, device="meta")  # 12 MiB
        context.mark_static_address(cache, "cache")

        class Cached(nn.Module):
            def forward(self, x: Tensor, cache: Tensor) -> Tensor:
                return model(x) + cache[0, 0]

        wrapped = Cached()
        wrapped.inner = model
        found = []
        for rows in (2, 1):
            info = [("x", (rows, size), "float32"), ("cache", (3, MIB), "float32")]
            example = (torch.zeros(rows, size), cache)
            compiled = rebel.compile_from_torch(
                wrapped, input_info=info, example_inputs=example, compile_context=context, num_devices=2
            )
            found.append(compiled.get_alloc_per_node_by_key())
        assert found[0] == {"Weight": [2 * MIB] * 2, "DramTensor": [6 * MIB] * 2}
        assert found[1] == {"Weight": [decode] * 2, "DramTensor": [6 * MIB] * 2}
        assert compiled.exp_get_dram_tensor_sizes() == {"cache": [[6 * MIB], [6 * MIB]]}
        compiled.exp_multiply_buffer_size({"cache": 2})
        assert compiled.exp_get_dram_tensor_sizes() == {"cache": [[12 * MIB], [12 * MIB]]}
        compiled.exp_rescale_buffer_size({"cache": (2, 6)})
        assert compiled.get_alloc_per_chiplet_by_key()["DramTensor"] == [[4 * MIB], [4 * MIB]]


def test_memory_of_a_device_of_chiplets_is_told_for_each(rebel: ModuleType) -> None:
    compiled = rebel.compile_from_torch(
        nn.Linear(2048, 2048, bias=False), [("x", (1, 2048), "float32")], npu="RBLN-CR13"
    )
    assert compiled.get_alloc_per_chiplet_by_key()["Weight"] == [[4 * MIB] * 4]


def test_a_buffer_that_is_not_there_or_a_broken_size_is_named(rebel: ModuleType, pair: tuple[Any, Any]) -> None:
    model = pair[0]
    with pytest.raises(ValueError, match="caches is not a static buffer; there are: cache"):
        model.exp_multiply_buffer_size({"caches": 2})
    with pytest.raises(ValueError, match="cache: 0 / 1"):
        model.exp_multiply_buffer_size({"cache": 0})
    with pytest.raises(ValueError, match="cache: 8 blocks times 2 / 3 is not a whole number"):
        model.exp_rescale_buffer_size({"cache": (2, 3)})


def _rewrite(source: Path, target: Path, member: str, change: Any) -> None:
    """A copy of a zip, whole in itself, with one member changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, change(data) if name == member else data)
