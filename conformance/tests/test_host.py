"""Readings of the host from made-up files, and the arithmetic of energy."""

from __future__ import annotations

import pytest

from vlmqual_contract import host, sensors
from vlmqual_contract.host import Counter


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")


def test_load_frequency_and_temperature_are_read_in_their_units(tmp_path):
    write(
        tmp_path,
        {
            "proc/loadavg": "1.25 0.50 0.10 3/412 99\n",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "2000000\n",
            "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "3000000\n",
            "sys/class/thermal/thermal_zone0/temp": "41000\n",
            "sys/class/thermal/thermal_zone1/temp": "58500\n",
        },
    )
    assert host.readings(tmp_path) == {"load": 1.25, "running": 3, "frequency_hz": 2.5e9, "temperature_c": 58.5}


def test_what_the_system_does_not_say_is_left_out(tmp_path):
    assert host.readings(tmp_path) == {}


def test_a_counter_that_began_again_counts_over_its_range():
    before = {"a": Counter(900.0e6, 1000.0e6), "b": Counter(5.0e6, 0.0), "gone": Counter(1.0)}
    after = {"a": Counter(100.0e6, 1000.0e6), "b": Counter(7.0e6, 0.0)}
    assert host.used(before, after) == {"rapl": 200.0 + 2.0}
    assert host.used({}, after) == {}


def test_a_meter_reads_packages_and_not_their_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(sensors, "readings", list)
    folder = "sys/class/powercap/intel-rapl:0"
    write(tmp_path, {f"{folder}/energy_uj": "1000000", "sys/class/powercap/intel-rapl:0:0/energy_uj": "5"})
    with host.Meter(tmp_path) as meter:
        write(tmp_path, {f"{folder}/energy_uj": "4500000", "sys/class/powercap/intel-rapl:0:0/energy_uj": "9999999"})
    assert meter.energy.joules == {"rapl": 3.5}
    assert meter.energy.samples == 0


def test_sampled_power_is_integrated_by_the_trapezoidal_rule():
    power = [(0.0, {"x": 10.0, "y": 1.0}), (2.0, {"x": 30.0, "y": 1.0}), (3.0, {"x": 30.0})]
    assert host.integrated(power) == {"x": 2.0 * 20.0 + 30.0, "y": 2.0}


def test_a_meter_samples_accelerators_that_tell_their_power(tmp_path, monkeypatch):
    told = [{"device": "NPU 0", "power_w": 25.0}, {"device": "NPU 1", "power_w": None}]
    monkeypatch.setattr(sensors, "readings", lambda: told)
    with host.Meter(tmp_path) as meter:
        pass
    assert set(meter.energy.joules) == {"NPU 0"}
    assert meter.energy.samples >= 2
    assert meter.energy.joules["NPU 0"] == pytest.approx(25.0 * meter.energy.seconds, rel=0.5, abs=0.05)
