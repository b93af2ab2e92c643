from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from vlmqual_contract import cli, fixtures
from vlmqual_contract.errors import EXIT_OK, EXIT_USAGE, UsageError
from vlmqual_contract.footprint import Footprint, Graph
from vlmqual_contract.target import Info, Model, Options
from vlmqual_perf.outline import estimate, fit

TRUTH = f"{Path(__file__).with_name('truth_target.py')}:Truth"
INFO = Info("t", "1", "cpu", "r", "bfloat16", frozenset(), ("idefics3",))


def dry(*arguments: str, target: str = TRUTH) -> int:
    return cli.main(["perf", "--dry-run", "--suite", "idefics3-photo", "--target", target, *arguments])


def checkpoint(folder: Path, shape: list[int], **text: int) -> Path:
    header = json.dumps({"__metadata__": {"format": "pt"}, "a": {"dtype": "F32", "shape": shape}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    (folder / "config.json").write_text(json.dumps({"model_type": "idefics3", "text_config": text}))
    return folder


def test_a_target_that_does_not_tell_is_estimated_from_the_files(tmp_path: Path) -> None:
    text = {"num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 80}
    model = Model(str(checkpoint(tmp_path, [7, 11], **text)), "idefics3")
    found = estimate(model, Options(tp=1, max_length=100, batch=4), INFO)
    assert found.weights_bytes == 7 * 11 * 2, "bfloat16, whatever the file holds"
    assert found.cache_bytes == 2 * 3 * 4 * 2 * 10 * 100 * 2, "keys and values, 3 layers, 4 rows, 2 heads of 10"
    halved = estimate(model, Options(tp=2, max_length=100, batch=4), INFO)
    assert (halved.weights_bytes, halved.cache_bytes) == (77, found.cache_bytes // 2)
    assert "estimated" in found.notes[0]


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    model = Model(str(checkpoint(tmp_path, [1])), "idefics3")
    (tmp_path / "model.safetensors").write_bytes(b"\x05\0\0")
    with pytest.raises(UsageError, match=r"model\.safetensors: the header"):
        estimate(model, Options(), INFO)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="no safetensors files"):
        estimate(model, Options(), INFO)


def test_what_is_needed_is_held_against_the_memory() -> None:
    found = Footprint((), 1, 3 * 2**30, 2**30, 4 * 2**30)
    assert fit(found, None) == "fits the device's 4,096.0 MiB"
    assert fit(found, 4 * 2**30 - 1).startswith("DOES NOT FIT")
    assert "not known" in fit(Footprint((), 1, 1, 1), None)


def test_plain_data_is_the_same_footprint() -> None:
    found = Footprint((Graph("g", ("a float32[1]",), 2, 3),), 4, 5, 6, 7, 8, ("n",))
    assert Footprint.from_plain(json.loads(json.dumps(found.plain()))) == found


def test_every_scenario_and_size_is_shown_in_eighty_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert dry("--tp", "1,2", "--device-memory", "0.001") == EXIT_OK
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("DOES NOT FIT the device's 1.0 MiB") == 2
    assert "on each of 2 devices" in text


def test_functions_of_a_target_are_shown_with_their_shapes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "told.py").write_text(
        "from vlmqual_contract.errors import Unsupported\n"
        "from vlmqual_contract.footprint import Footprint, Graph\n"
        "from vlmqual_contract.target import Info\n"
        "class Told:\n"
        "    info = Info('told', '1', 'npu', 'r', 'float32', frozenset(), ('idefics3',))\n"
        "    def footprint(self, model, options, prompts, new_tokens):\n"
        "        if options.tp > 1:\n"
        "            raise Unsupported('one device only')\n"
        "        shapes = ('bias float32[1]', 'keys.0 float32[2]', 'keys.1 float32[2]', 'last int64[1]')\n"
        "        return Footprint((Graph('text', shapes, new_tokens - 1, 2**20),), 1, 2**21, 2**20, None, 5)\n"
    )
    monkeypatch.setenv("COLUMNS", "80")
    assert dry("--tp", "1,2", target=f"{tmp_path / 'told.py'}:Told") == EXIT_OK
    text = capsys.readouterr().out
    assert "graph text, run 15 times, weights 1.0 MiB" in text
    assert "    keys.0 to keys.1 float32[2]\n" in text
    assert "weights 2.0 MiB + KV cache 1.0 MiB = 3.0 MiB" in text
    assert "not possible: one device only" in text
    assert "memory is not known" in text


def test_a_wrong_memory_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("0", "-1", "inf", "nan"):
        assert dry(f"--device-memory={wrong}") == EXIT_USAGE
        assert "--device-memory" in capsys.readouterr().err
    assert dry(target="no-such-target") == EXIT_USAGE


def test_the_fixture_checkpoint_is_counted_as_its_file_says() -> None:
    directory = fixtures.checkpoint("idefics3-tiny")
    (path,) = directory.glob("*.safetensors")
    start = struct.unpack("<Q", path.read_bytes()[:8])[0] + 8
    header = json.loads(path.read_bytes()[8:start])
    sizes = {"F32": 4, "BF16": 2, "F16": 2}
    dtypes = {tensor["dtype"] for name, tensor in header.items() if name != "__metadata__"}
    (size,) = (sizes[dtype] for dtype in dtypes)
    found = estimate(Model(str(directory), "idefics3"), Options(), INFO)
    assert found.weights_bytes == (path.stat().st_size - start) // size * 2
