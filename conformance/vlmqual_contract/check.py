"""`vlmqual check-target`: tells "the adapter is wrong" from "the device is wrong".

It asks for nothing that depends on the numbers: does the target start, say what it is, open the tiny checkpoint, answer
every phase that it declares with the documented shapes and dtypes, and close. A target that does not preprocess is fed
the inputs of a golden.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmqual_contract import fixtures
from vlmqual_contract.errors import EXIT_FAILED, EXIT_OK, TargetFailure, Unsupported, UsageError
from vlmqual_contract.launch import Limits
from vlmqual_contract.remote import RemoteSession, RemoteTarget
from vlmqual_contract.scenario import Scenario, load_scenarios
from vlmqual_contract.target import Array, Capability, Costs, Model, Options, Prompt


@dataclass
class _Report:
    """Prints one line for each check and remembers whether one failed."""

    failed: int = 0

    def run(self, name: str, action: Callable[[], Any]) -> Any:
        try:
            value = action()
        except (UsageError, Unsupported, TargetFailure, AssertionError) as error:
            self.failed += 1
            print(f"FAIL  {name}: {error}")
            return None
        print(f"ok    {name}")
        return value


class _Command:
    help = "smoke-test an adapter: shapes, dtypes, phases and errors, but no numbers"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument("target", help="target string, for example eager or path/to/adapter.py:MyTarget")
        parser.add_argument("--python", help="interpreter of the environment that the target lives in")
        parser.add_argument("--timeout", type=float, default=120.0, metavar="S", help="seconds for one answer")

    def run(self, args: argparse.Namespace) -> int:
        """Run the checks in the order of the data's path."""
        if not args.timeout > 0:
            raise UsageError(f"--timeout {args.timeout:g} is not positive")
        report = _Report()
        limits = Limits(call_s=args.timeout)
        scenarios = load_scenarios(fixtures.file("scenarios.toml"))
        with RemoteTarget(args.target, python=args.python, limits=limits) as target:
            info = target.info
            print(f"      {info.name} {info.version} on {info.device}, {info.runtime}, {info.dtype}")
            print(f"      capabilities: {', '.join(sorted(info.capabilities)) or 'none'}")
            checked = 0
            for family in info.families:
                scenario = next((s for s in scenarios.values() if s.family == family and s.images), None)
                if scenario is not None:
                    checked += 1
                    _check(report, target, scenario)
            if not checked:
                print(f"FAIL  no fixture exists for {', '.join(info.families) or 'a target without families'}")
                report.failed += 1
        print("the adapter meets the contract" if not report.failed else f"{report.failed} checks failed")
        return EXIT_FAILED if report.failed else EXIT_OK


def _check(report: _Report, target: RemoteTarget, scenario: Scenario) -> None:
    has = target.info.capabilities.__contains__
    model = Model(str(fixtures.checkpoint(scenario.checkpoint)), scenario.family)
    options = Options(max_length=1024, taps=has(Capability.TAPS))
    session: RemoteSession | None = report.run(f"{scenario.family}: open", lambda: target.open(model, options))
    if session is None:
        return
    prompt = Prompt(scenario.prompt, tuple(str(fixtures.image(name)) for name in scenario.images))
    if has(Capability.PREPROCESS):
        inputs = report.run(f"{scenario.family}: preprocess", lambda: _inputs(session.preprocess([prompt])))
        if inputs is None:
            return
    else:
        print("      preprocess is not declared: the inputs of a golden are used")
        inputs = _golden_inputs(scenario.family)
    features = None
    if has(Capability.VISION):
        features = report.run(f"{scenario.family}: vision", lambda: session.vision(inputs))
        if features is not None:
            report.run(f"{scenario.family}: features", lambda: _finite(features.arrays()))
    step = report.run(f"{scenario.family}: prefill", lambda: session.prefill(inputs, features))
    if step is None:
        return
    rows, length = inputs["input_ids"].shape
    report.run(f"{scenario.family}: logits", lambda: _shape(step.logits(), (rows, None), "logits"))
    report.run(f"{scenario.family}: tokens", lambda: _tokens(step.tokens(), rows))
    if has(Capability.ALL_LOGITS):
        report.run(f"{scenario.family}: all logits", lambda: _shape(step.logits(True), (rows, length, None), "logits"))
    if has(Capability.TAPS):
        report.run(f"{scenario.family}: taps", lambda: _finite(step.taps()))
    nxt = report.run(f"{scenario.family}: decode", lambda: session.decode(step))
    if nxt is not None:
        report.run(f"{scenario.family}: decode logits", lambda: _shape(nxt.logits(), (rows, None), "logits"))
        if has(Capability.FORCED_TOKENS):
            forced = np.ones(rows, dtype=np.int64)
            report.run(f"{scenario.family}: forced tokens", lambda: session.decode(nxt, forced).tokens())
    if target.info.fixed_shapes:
        report.run(f"{scenario.family}: costs", lambda: _costs(session.costs(), nxt is not None))
    report.run(f"{scenario.family}: close", session.close)


def _golden_inputs(family: str) -> dict[str, Array]:
    """The inputs of the first golden case with one row and an image."""
    for name in fixtures.names(f"goldens/{family}/"):
        if not name.endswith(".npz"):
            continue
        with np.load(fixtures.file(name), allow_pickle=False) as golden:
            if "inputs/pixel_values" in golden.files and len(golden["inputs/input_ids"]) == 1:
                return {key.removeprefix("inputs/"): golden[key] for key in golden.files if key.startswith("inputs/")}
    raise UsageError(f"no golden of {family} has one row and an image")


def _inputs(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
    for name in ("input_ids", "attention_mask"):
        assert name in inputs, f"preprocess gave no {name}; it gave {', '.join(inputs)}"
        assert inputs[name].dtype == np.int64, f"{name} is {inputs[name].dtype}, not int64"
        assert inputs[name].ndim == 2, f"{name} has shape {inputs[name].shape}, not (B, S)"
    return inputs


def _finite(arrays: Mapping[str, Array]) -> None:
    assert arrays, "nothing came back"
    for name, array in arrays.items():
        assert np.isfinite(array).all(), f"{name} has values that are not finite"


def _shape(array: Array, shape: tuple[int | None, ...], name: str) -> None:
    fits = array.ndim == len(shape) and all(want in (None, have) for want, have in zip(shape, array.shape, strict=True))
    wanted = tuple("V" if want is None else want for want in shape)
    assert fits, f"{name} have shape {array.shape}, not {wanted}"
    assert np.issubdtype(array.dtype, np.floating), f"{name} are {array.dtype}, not floating"
    _finite({name: array})


def _costs(costs: Costs, decoded: bool) -> None:
    kinds = {"prefill", "decode"} if decoded else {"prefill"}
    assert kinds <= set(costs.calls), (
        f"costs tell of {', '.join(costs.calls) or 'no call'}, not of {', '.join(sorted(kinds))}"
    )
    assert all(call.programs for call in costs.calls.values()), "a call names no function that it ran"


def _tokens(tokens: Array, rows: int) -> None:
    assert tokens.shape == (rows,), f"tokens have shape {tokens.shape}, not ({rows},)"
    assert tokens.dtype == np.int64, f"tokens are {tokens.dtype}, not int64"


command = _Command()
