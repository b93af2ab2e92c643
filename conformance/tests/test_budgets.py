from __future__ import annotations

import hashlib
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pytest

from vlmqual_conformance import budgets, policy
from vlmqual_conformance.waivers import Waiver
from vlmqual_contract import fixtures
from vlmqual_contract.errors import UsageError

TODAY = date(2027, 1, 15)
NOISE = {"noise/float32/prefill/logits": 3e-7, "noise/bfloat16/prefill/logits": 2e-3}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the fixtures: two goldens of mllama, none of the others."""
    monkeypatch.setattr(fixtures, "manifest", lambda: {"files": digests(tmp_path)})
    monkeypatch.setattr(fixtures, "file", tmp_path.joinpath)
    (tmp_path / "goldens" / "mllama").mkdir(parents=True)
    golden(tmp_path, "one")
    golden(tmp_path, "two")
    return tmp_path


def digests(place: Path) -> dict[str, str]:
    files = sorted((place / "goldens").rglob("*.npz"))
    return {file.relative_to(place).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def golden(place: Path, name: str, logits: float = 1.0, **noise: float) -> None:
    arrays = {**NOISE, **{key.replace("__", "/"): value for key, value in noise.items()}}
    np.savez(place / "goldens" / "mllama" / f"{name}.npz", **{"prefill/logits": np.array(logits), **arrays})


def lock(place: Path) -> Path:
    return place / "budgets.lock"


def run(place: Path, argument: str, waivers: str = "") -> int:
    (place / "waivers.toml").write_text(waivers)
    return budgets.main([argument], lock=lock(place), waived=place / "waivers.toml")


def check(place: Path, *waivers: Waiver, families: tuple[str, ...] = ("mllama",)) -> None:
    budgets.check(families, today=TODAY, lock=lock(place), given=waivers)


def waiver(place: Path, pattern: str, expires: date) -> Waiver:
    """One with the digests that the command prints."""
    locked = budgets.read(lock(place))
    now = budgets.present(locked, ["mllama"])
    sides = ({name: entry.budgets for name, entry in side.items()} for side in (locked, now))
    chosen = ({name: value for name, value in side.items() if pattern in ("mllama/*", name)} for side in sides)
    old, new = map(budgets.together, chosen)
    return Waiver("made with torch 2.14", expires, "waivers.toml", golden=pattern, old=old, new=new)


def test_the_lock_names_every_golden_and_its_budgets_are_as_they_are_now():
    assert budgets.main(["--check"]) == 0, (
        "goldens were made again: see `python -m vlmqual_conformance.budgets --check`"
    )


def test_what_was_locked_is_in_order(place):
    assert run(place, "--write") == 0
    check(place)
    assert run(place, "--check") == 0


def test_a_golden_that_is_made_again_with_the_same_budgets_is_in_order(place):
    run(place, "--write")
    golden(place, "one", logits=2.0)
    check(place)


@pytest.mark.parametrize(
    "noise",
    [
        {"noise__float32__prefill/logits": 4e-7},
        {"noise__float32__prefill/logits": 2e-7},
        {"noise__float16__prefill/logits": 1e-3},
    ],
    ids=["looser", "tighter", "added"],
)
def test_a_golden_with_other_budgets_is_named(place, noise):
    run(place, "--write")
    golden(place, "two", **noise)
    with pytest.raises(UsageError, match=r"^golden mllama/two has other budgets than budgets\.lock says; that takes a"):
        check(place)
    check(place, families=("idefics",))


def test_the_largest_possible_change_is_told_in_one_sentence(place):
    run(place, "--write")
    golden(place, "one", **{"noise__float32__prefill/logits": 1.0})
    (place / "goldens" / "mllama" / "two.npz").unlink()
    with pytest.raises(UsageError, match=r"golden mllama/one has other budgets .* \(and 1 more\)"):
        check(place)


def test_a_golden_that_is_gone_is_named(place):
    run(place, "--write")
    (place / "goldens" / "mllama" / "two.npz").unlink()
    with pytest.raises(UsageError, match="golden mllama/two is gone"):
        check(place)


def test_a_new_golden_has_to_be_locked_and_takes_no_waiver(place):
    run(place, "--write")
    golden(place, "three")
    with pytest.raises(UsageError, match=r"golden mllama/three are not locked; `python -m .* --write` adds them"):
        check(place)
    assert run(place, "--write") == 0
    check(place)


@pytest.mark.parametrize("pattern", ["mllama/one", "mllama/*"])
def test_a_waiver_covers_the_change_that_it_names_until_its_last_day(place, pattern):
    run(place, "--write")
    golden(place, "one", **{"noise__float32__prefill/logits": 4e-7})
    check(place, waiver(place, pattern, TODAY))
    with pytest.raises(UsageError, match=r"mllama/one has other .*; a waiver of it expired on 2027-01-14; that takes"):
        check(place, waiver(place, pattern, TODAY - timedelta(1)))
    covering = waiver(place, pattern, TODAY)
    golden(place, "one", **{"noise__float32__prefill/logits": 5e-7})
    with pytest.raises(UsageError, match="mllama/one has other budgets"):
        check(place, covering)


def test_the_lock_is_written_over_a_change_only_with_the_waiver_that_the_command_prints(place, capsys):
    run(place, "--write")
    before = lock(place).read_text()
    golden(place, "two", **{"noise__float32__prefill/logits": 4e-7})
    assert run(place, "--write") == 2
    assert lock(place).read_text() == before
    table = capsys.readouterr().err.partition("[[waiver]]")[2]
    assert 'golden = "mllama/two"' in table
    filled = "[[waiver]]" + table.replace('reason = ""', 'reason = "torch 2.14"').rstrip() + " 2099-12-31\n"
    assert run(place, "--check", filled) == 0
    assert run(place, "--write", filled) == 0
    assert lock(place).read_text() != before
    check(place)


def test_another_factor_is_another_budget(place, monkeypatch):
    run(place, "--write")
    monkeypatch.setattr(policy, "FACTOR", 3.0)
    with pytest.raises(UsageError, match="a budget is locked as 2 times the noise, the suite has 3"):
        check(place)


@pytest.mark.parametrize("text", ["goldens =", "factor = 2.0", 'factor = 2.0\ngoldens = "all"', "[goldens]"])
def test_a_damaged_lock_is_named(place, text):
    lock(place).write_text(text)
    with pytest.raises(UsageError, match="cannot be read as a lock of budgets"):
        check(place)


def test_files_that_the_lock_knows_are_not_opened(place, monkeypatch):
    run(place, "--write")
    monkeypatch.setattr(budgets, "digest", lambda path: pytest.fail(f"{path} was opened"))
    check(place)
