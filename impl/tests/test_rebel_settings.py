"""The switch of the emulator, its settings and its devices."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vlmqual_rebel
from vlmqual_rebel import EmulatorError, Settings
from vlmqual_rebel.__main__ import main

IMPL = Path(vlmqual_rebel.__file__).parent.parent


@pytest.fixture(autouse=True)
def _off() -> Iterator[None]:
    yield
    vlmqual_rebel.uninstall()


def run(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key != vlmqual_rebel.ENVIRONMENT}
    env |= {"PYTHONPATH": str(IMPL)} | (environment or {})
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, timeout=120)


def test_importing_the_emulator_does_not_switch_it_on() -> None:
    assert vlmqual_rebel.installed() is None
    assert "rebel" not in sys.modules
    with pytest.raises(ModuleNotFoundError):
        import rebel  # noqa: F401


def test_switching_on_gives_the_modules_that_programs_import_and_marks_them() -> None:
    vlmqual_rebel.install(npu="RBLN-CA22", devices=3)
    import rebel
    from rebel.compile_context import CompileContext
    from rebel.core.exception import RBLNRuntimeError

    assert rebel.EMULATED is True
    assert "emulated" in rebel.__version__
    assert rebel.CompileContext is CompileContext
    assert issubclass(RBLNRuntimeError, RuntimeError)
    assert [rebel.get_npu_name(), rebel.get_npu_name(2), rebel.get_npu_name(3)] == ["RBLN-CA22", "RBLN-CA22", None]
    assert [rebel.npu_is_available(0), rebel.npu_is_available(3), rebel.device_count()] == [True, False, 3]


def test_optimum_finds_a_compiler_of_its_own_base_version() -> None:
    from packaging.version import Version

    vlmqual_rebel.install(sdk_version="0.12.0")
    version = Version(importlib.metadata.version("rebel-compiler"))
    assert version.base_version == "0.12.0"
    assert version.local == "emulated"
    vlmqual_rebel.uninstall()
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("rebel-compiler")


def test_optimum_chooses_num_devices_from_the_signature_of_compile() -> None:
    import inspect

    rebel = vlmqual_rebel.install()
    assert "num_devices" in inspect.signature(rebel.compile).parameters


def test_a_host_without_an_npu_has_no_name_for_it() -> None:
    rebel = vlmqual_rebel.install(devices=0)
    assert rebel.get_npu_name() is None
    assert not rebel.npu_is_available(0)


def test_switching_on_twice_is_one_switch_and_other_settings_are_refused() -> None:
    first = vlmqual_rebel.install(devices=2)
    assert vlmqual_rebel.install(devices=2) is first
    with pytest.raises(EmulatorError, match=r"already on with .*devices=2"):
        vlmqual_rebel.install(devices=4)


def test_a_real_sdk_is_never_shadowed(tmp_path: Path) -> None:
    (tmp_path / "rebel.py").write_text("REAL = True\n")
    program = "import sys; sys.path.insert(0, sys.argv[1]); import vlmqual_rebel; vlmqual_rebel.install()"
    found = run("-c", program, str(tmp_path))
    assert found.returncode != 0
    (line,) = [line for line in found.stderr.splitlines() if "errors.EmulatorError:" in line]
    assert "A real rebel is installed" in line
    assert str(tmp_path / "rebel.py") in line
    imported = run("-c", program.replace("; vlmqual", "; import rebel; vlmqual"), str(tmp_path))
    assert "A real rebel is installed" in imported.stderr


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"npu": "RBLN-CA99"}, "npu: 'RBLN-CA99' .* RBLN-CA25"),
        ({"devices": -1}, "devices: -1"),
        ({"devices": True}, "devices: True"),
        ({"numeric": "int8"}, "numeric: 'int8' .* bfloat16"),
        ({"memory_bytes": 0}, "memory_bytes: 0"),
        ({"sdk_version": "new"}, "sdk_version: 'new'"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value(setting: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**setting)  # type: ignore[arg-type]


def test_settings_travel_in_one_environment_variable() -> None:
    settings = Settings("RBLN-CR13", 4, "bfloat16", 2**30, "0.11.0")
    assert Settings.from_environment(settings.as_environment()) == settings
    assert Settings.from_environment({}) is None
    with pytest.raises(ValueError, match=r"VLMQUAL_REBEL: .*'nmu'"):
        Settings.from_environment({"VLMQUAL_REBEL": "{'nmu': 1}"})
    with pytest.raises(ValueError, match="with some of the keys npu, devices"):
        Settings.from_environment({"VLMQUAL_REBEL": '{"nmu": 1}'})


def test_memory_of_a_device_is_that_which_optimum_plans_with() -> None:
    assert Settings("RBLN-CA25").capacity_bytes == 16 * 2**30 - 288 * 2**20
    assert Settings("RBLN-CR13").capacity_bytes == 144 * 2**30 - 4 * 2**30


PROGRAM = """
import os, sys, rebel
print(rebel.EMULATED, rebel.get_npu_name(), rebel.device_count(), sys.argv[1:], __name__)
sys.exit(3)
"""


def test_a_script_runs_over_the_emulator_and_it_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    monkeypatch.setenv(vlmqual_rebel.ENVIRONMENT, "")  # so that it is as before afterwards
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as left:
        main(["--npu", "RBLN-CA22", "--devices", "2", str(script), "--devices", "9", "-m"])
    found = capsys.readouterr()
    assert found.out == "True RBLN-CA22 2 ['--devices', '9', '-m'] __main__\n"
    assert found.err.count("EMULATED") == 1
    assert left.value.code == 3


def test_a_module_runs_over_the_emulator_and_hands_the_settings_to_its_processes(tmp_path: Path) -> None:
    (tmp_path / "outer.py").write_text(
        "import os, subprocess, sys, rebel\n"
        "program = 'import os, vlmqual_rebel as v; print(v.Settings.from_environment(os.environ).devices)'\n"
        "subprocess.run([sys.executable, '-c', program], check=True)\n"
    )
    environment = {"PYTHONPATH": f"{IMPL}{os.pathsep}{tmp_path}"} | Settings(
        devices=5, npu="RBLN-CA22"
    ).as_environment()
    found = run("-m", "vlmqual_rebel", "-m", "outer", "x", environment=environment)
    assert found.stdout.strip() == "5", found.stderr
    assert "5 x RBLN-CA22" in found.stderr


def test_a_wrong_start_is_refused_in_one_line() -> None:
    found = run("-m", "vlmqual_rebel", "no-such-file.py")
    assert found.returncode == 2
    assert found.stderr.strip() == "python -m vlmqual_rebel: no-such-file.py is not a file"
