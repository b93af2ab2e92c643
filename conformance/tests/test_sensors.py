from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from vlmqual_contract import sensors


def tool(folder: Path, name: str, text: str, code: int = 0) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {code}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin{os.pathsep}/usr/bin")
    return tmp_path


def test_rbln_smi_is_read_with_its_units(folder: Path) -> None:
    device = {
        "npu": 0,
        "name": "RBLN-CA22",
        "temperature": "38C",
        "card_power": "18810987uW",
        "memory": {"used": "1048576", "total": "16877879296"},
        "KMD_version": "2.0.1",
    }
    tool(folder, "rbln-smi", json.dumps({"KMD_version": "2.0.1", "devices": [device, {**device, "npu": 1}]}))
    first, second = sensors.readings()
    assert first == {
        "device": "RBLN-CA22 0",
        "temperature_c": 38.0,
        "power_w": pytest.approx(18.810987),
        "memory_used_bytes": 1048576,
        "memory_bytes": 16877879296,
        "driver": "2.0.1",
    }
    assert second["device"] == "RBLN-CA22 1"


def test_nvidia_smi_is_read_with_its_units(folder: Path) -> None:
    tool(
        folder, "nvidia-smi", "0, NVIDIA H200, 31, 78.52, 4, 143771, 570.1\n1, NVIDIA H200, 32, [N/A], 4, 143771, 570.1"
    )
    first, second = sensors.readings()
    assert (first["device"], first["temperature_c"], first["power_w"]) == ("NVIDIA H200 0", 31.0, 78.52)
    assert (first["memory_used_bytes"], first["memory_bytes"]) == (4 * 2**20, 143771 * 2**20)
    assert second["power_w"] is None


@pytest.mark.parametrize(("text", "code"), [("no json", 0), ("{}", 0), ('[{"npu": 0}]', 1), ("[1, [2]]", 0)])
def test_what_a_tool_does_not_tell_is_left_out(folder: Path, text: str, code: int) -> None:
    tool(folder, "rbln-smi", text, code)
    assert sensors.readings() == []


def test_without_tools_there_are_no_readings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sensors.readings() == []
