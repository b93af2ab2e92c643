"""Which mutants there are, which are drawn, and what is said of those that survive."""

from __future__ import annotations

import importlib.util
import io
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from rich.console import Console

from vlmqual_contract.discovery import make_target
from vlmqual_contract.errors import UsageError
from vlmqual_faults.brood import Order
from vlmqual_faults.mutants import Journal, Row, count, judges, sample, show
from vlmqual_faults.mutated import Tracer
from vlmqual_faults.mutation import find, mutants
from vlmqual_faults.surgery import SurgeryError
from vlmqual_faults.survivors import Argument, argument, arguments
from vlmqual_impl import layers

Small = Callable[[str], ModuleType]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Small:
    """Makes `vlmqual_impl.small` of a text, a module of the implementation for as long as the test runs."""

    def make(text: str) -> ModuleType:
        path = tmp_path / f"small{len(list(tmp_path.iterdir()))}.py"
        path.write_text(text, "utf-8")
        spec = importlib.util.spec_from_file_location("vlmqual_impl.small", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "vlmqual_impl.small", module)
        spec.loader.exec_module(module)
        return module

    return make


def changes(small: Small, body: str) -> set[str]:
    small(f"def f(a, b, n, x, torch=None):\n    {body}\n")
    return {each.new for each in mutants("small", "f")}


# which mutants there are ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("return a + b", {"a - b"}),
        ("return a / b", {"a * b"}),
        ("return a // b", {"a * b"}),
        ("return a ** b", {"a * b"}),
        ("return a < b", {"a <= b", "a >= b"}),
        ("return a == b", {"a != b"}),
        ("return a is b", {"a is not b"}),
        ("return a in b", {"a not in b"}),
        ("return a and b", {"a or b"}),
        ("return not a", {"return a"}),
        ("return -a", {"return a"}),
        ("return a(7)", {"a(8)", "a(6)"}),
        ("return a(0)", {"a(1)"}),
        ("return a(x=True)", {"a(x=False)"}),
        ("return a(1.5)", {"a(3.0)"}),
        ("return a(1e-05)", {"a(0.0001)"}),
        ("return x.sort(dim=-1)", {"x.sort(dim=0)", "x.sort(dim=-2)"}),
        ("return x[:n]", {"x[:n - 1]"}),
        ("return x[n:]", {"x[n + 1:]"}),
        ("return x[1:]", {"x[0:]", "x[2:]"}),
        ("return torch.float32", {"return torch.bfloat16"}),
        ("return torch.int64", set()),
        ("return torch.sin(a)", {"torch.cos(a)"}),
        ("return x.mean()", {"x.sum()"}),
        ("return max(a)", {"min(a)"}),
        ("return torch.where(a, b)", {"torch.where(b, a)"}),
        ("return torch.minimum(a, b)", {"torch.maximum(a, b)"}),
        ("x = n(x)", {"pass"}),
        ("x += a", {"pass"}),
        ("a.b(x)", {"pass"}),
        ("x = n(a)", set()),
    ],
)
def test_an_operator_makes_what_it_says(small: Small, body: str, expected: set[str]) -> None:
    assert changes(small, body) == expected


@pytest.mark.parametrize(
    "body",
    [
        "raise ValueError(a + b)",
        "if a < 0 or not b: raise ValueError(1)",
        "assert a < b, 1",
        "return f'{a + b} of {n:3}'",
        "return isinstance(a, b)",
        "a: b[1 + 2] = x",
        "return lambda x=1: a",
        "return 'text' + a",
        "'a docstring of 3 words'",
        "self_check = a; check_all(a)",
    ],
)
def test_what_says_nothing_of_the_model_is_left_alone(small: Small, body: str) -> None:
    assert changes(small, body) == set()


def test_defaults_decorators_and_functions_that_only_refuse_are_left_alone(small: Small) -> None:
    small(
        "from functools import lru_cache\n"
        "@lru_cache(maxsize=3)\n"
        "def f(a, b: 'int' = 3) -> 'list[1]':\n    return a\n"
        "def check_it(a):\n    for each in a[1:]:\n        if each > 3: raise ValueError\n"
    )
    assert mutants("small", "f") == []
    assert mutants("small", "check_it") == []


def test_a_mutant_is_there_until_it_is_taken_back(small: Small) -> None:
    module = small("class A:\n    def f(self, a, b):\n        # reason\n        return (a *\n            2) - b\n")
    found = {each.new: each for each in mutants("small", "A.f")}
    assert set(found) == {"a * 2 + b", "a + 2", "a * 3", "a * 1"}
    a = module.A()
    back = found["a * 2 + b"].make()
    assert a.f(5, 1) == 11
    back()
    assert a.f(5, 1) == 9
    found["a + 2"].make()
    assert a.f(5, 1) == 6


def test_a_mutant_is_found_again_by_its_id_when_code_moves(small: Small) -> None:
    small("def f(a, b):\n    return a + b + a\n")
    first, second = mutants("small", "f")
    assert (first.id, second.id) == ("small:f:add-to-sub:1", "small:f:add-to-sub:2")
    assert find(second.id) == second
    with pytest.raises(SurgeryError, match="there is no mutant 'small:f:add-to-sub:3'"):
        find("small:f:add-to-sub:3")
    with pytest.raises(UsageError, match="there is no mutant 'layers:rotate:none:1'"):
        make_target("mutant:id=layers:rotate:none:1")


# what was evaluated ---------------------------------------------------------------------------------------------------


def traced(work: Callable[[], object], folder: Path) -> dict[str, frozenset[tuple[int, int, int, int]]]:
    tracer, before = Tracer(folder), sys.gettrace()
    sys.settrace(tracer.called)
    try:
        work()
    finally:
        sys.settrace(before)
    return {name: frozenset(spans) for name, spans in tracer.reached().items()}


def test_what_was_never_evaluated_has_no_mutants(small: Small, tmp_path: Path) -> None:
    module = small(
        "def f(a, b):\n"
        "    c = a + 1 if b else a - 2\n"
        "    if c > 10:\n"
        "        c = c * 3\n"
        "    d = lambda: c / 4\n"
        "    return [e + 5 for e in range(b)], (c, (6, 7)), d\n"
    )
    reached = traced(lambda: module.f(1, 0), tmp_path)["small"]
    seen = {each.new for each in mutants("small", "f", reached)}
    assert seen == {"a + 2", "a - 3", "a - 1", "c >= 10", "c <= 10", "c > 11", "c > 9", "(7, 7)", "(5, 7)"} | {
        "(6, 8)",
        "(6, 6)",
    }
    assert "e - 5" in {each.new for each in mutants("small", "f", traced(lambda: module.f(1, 1), tmp_path)["small"])}


def reached_layers(folder: Path) -> dict[str, frozenset[tuple[int, int, int, int]]]:
    def work() -> None:
        x = torch.ones(1, 2, 3, 4)
        layers.attend(x, x, x, None, implementation="eager")
        layers.rotate(x, x, x)
        layers.RMSNorm(4, 1e-5)(x)

    return traced(work, folder)


def test_a_sample_is_the_same_everywhere_and_another_for_another_seed(tmp_path: Path) -> None:
    reached = reached_layers(tmp_path)
    drawn = sample(reached, 10, 1)
    assert drawn == sample(dict(reversed(reached.items())), 10, 1)
    assert len({each.id for each in drawn}) == 10
    assert {each.id for each in drawn} != {each.id for each in sample(reached, 10, 2)}
    assert set(sample(reached, 5, 1)) < set(drawn)


def test_a_sample_draws_from_every_function_and_not_from_other_subjects(tmp_path: Path) -> None:
    reached = reached_layers(tmp_path)
    drawn = sample({**reached, "api.auto": frozenset({(1, 999, 0, 99)}), "tp": frozenset({(1, 999, 0, 99)})}, 30, 1)
    assert {each.where for each in drawn} >= {"layers:attend", "layers:rotate", "layers:RMSNorm.forward"}
    assert {each.where.partition(":")[0] for each in drawn} == {"layers"}


# judging --------------------------------------------------------------------------------------------------------------


def test_a_deadly_mutant_is_caught_and_an_equivalent_one_survives() -> None:
    deadly, equivalent = "layers:rotate:usub-dropped:1", "layers:attend:gt-to-gte:2"  # one query takes either way
    broken = "weights:load:is-to-isnot:1"  # no tensor is loaded
    with judges("idefics3") as judge:
        for name in (deadly, equivalent, broken):
            judge.ask(Order(name, f"mutant:id={name}", judge.room("x"), ("IDEFICS3-TEXT-007",), whole=False))
        answers = {answer.name: answer for answer in (judge.answer() for _ in range(3))}
    assert (answers[deadly].fate, answers[deadly].core) == ("failed", True)
    assert "IDEFICS3-TEXT-007" in answers[deadly].requirements
    assert answers[equivalent].fate == "passed", answers[equivalent].reason
    assert answers[equivalent].cases > 0
    assert (answers[broken].fate, answers[broken].cases) == ("broken", 0)


# the journal and what is said -----------------------------------------------------------------------------------------

ROW = Row("mllama", "layers:rotate:add-to-sub:1", 1, "a + b", "a - b", "core", "test_x.py::test_y", ("X-1",), "so", 1.0)


def rows(**fates: int) -> list[Row]:
    return [replace(ROW, fate=fate) for fate, times in fates.items() for _ in range(times)]


def shown(found: list[Row]) -> tuple[bool, str]:
    console = Console(file=io.StringIO(), width=300)
    fine = show(found, console)
    assert isinstance(console.file, io.StringIO)
    return fine, console.file.getvalue()


def test_a_row_is_found_again_by_a_later_run_unless_that_is_fresh(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "mllama", fresh=False)
    journal.put(ROW)
    with journal.path.open("a", encoding="utf-8") as file:
        file.write('{"family": "mllama", "id": "lay')  # the run was killed here
    assert Journal(tmp_path, "mllama", fresh=False).rows == {ROW.id: ROW}
    assert not list(tmp_path.glob("*.jsonl")), "a report would take the journal for a file of results"
    assert Journal(tmp_path, "idefics", fresh=False).rows == {}
    assert Journal(tmp_path, "mllama", fresh=True).rows == {}


def test_the_rate_leaves_out_what_is_argued_to_be_equivalent() -> None:
    equivalent = replace(ROW, fate="survived", verdict="equivalent", argument="it is")
    found = [*rows(core=6, suite=2, broken=1, hung=1), equivalent]
    assert count(found).rate == 1.0
    assert count([*found, *rows(survived=2)]).rate == 10 / 12


def test_what_only_a_unit_test_sees_is_not_caught_by_the_suite() -> None:
    found = [*rows(core=9), replace(ROW, fate="survived", verdict="unit-tested", argument="x")]
    assert count(found).rate == 9 / 10
    assert not shown(found)[0], "below the rate that is required"


@pytest.mark.parametrize(
    ("found", "fine"),
    [
        (rows(core=1), True),
        (rows(core=999, survived=1), False),
        ([*rows(core=1), replace(ROW, fate="survived", verdict="equivalent", argument="x")], True),
        ([*rows(core=99), replace(ROW, fate="survived", verdict="answered", argument="x")], False),
        ([*rows(core=99), replace(ROW, fate="survived", verdict="unit-tested", argument="x")], True),
    ],
    ids=["caught", "nothing-said", "equivalent", "answered-but-survives", "unit-tested"],
)
def test_a_survivor_of_which_nothing_holds_fails_the_run(found: list[Row], fine: bool) -> None:
    assert shown(found)[0] == fine
    assert ("SURVIVED  mllama layers:rotate:add-to-sub:1" in shown(found)[1]) == (not fine)


def test_an_argument_is_about_a_place_that_still_says_the_same(
    small: Small, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    table = tmp_path / "survivors.toml"
    entry = 'where = "small:f"\nold = "a + b"\nnew = "a - b"\nfamilies = ["mllama"]\nverdict = "equivalent"\n'
    table.write_text(f'[[survivor]]\n{entry}reason = "b is 0"\n', "utf-8")
    monkeypatch.setattr("vlmqual_faults.survivors.arguments", lambda: arguments(table))
    small("def f(a, b):\n    return a + b\n")
    (mutant,) = mutants("small", "f")
    said = Argument("small:f", "a + b", "a - b", ("mllama",), "equivalent", "b is 0")
    assert argument(mutant, "mllama") == said
    assert argument(mutant, "idefics") is None
    small("def f(a, b):\n    return a + b + b\n")
    assert [argument(each, "mllama") for each in mutants("small", "f")] == [said, None]


def test_an_argument_without_a_verdict_is_refused(tmp_path: Path) -> None:
    table = tmp_path / "survivors.toml"
    table.write_text('[[survivor]]\nwhere = "a"\nold = ""\nnew = ""\nfamilies = []\nverdict = "so"\nreason = "x"\n')
    with pytest.raises(UsageError, match="survivor 1: verdict 'so'"):
        arguments(table)


def test_every_argument_of_the_table_is_about_a_mutant_that_exists() -> None:
    for each in arguments():
        module, _, path = each.where.partition(":")
        found = {(mutant.old, mutant.new) for mutant in mutants(module, path)}
        assert (each.old, each.new) in found, f"{each.where} has no mutant {each.old} -> {each.new}"
        if each.test:
            file, _, name = each.test.partition("::")
            assert f"\ndef {name}(" in Path(__file__).with_name(file).read_text("utf-8"), f"{each.test} is not there"
