"""The client's end of a target in workers: looks like a target, and cannot be taken down by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np

from vlmqual_contract.discovery import LIBRARIES, TARGETS, origin, parse
from vlmqual_contract.errors import TargetFailure, TargetMisspoke, Unsupported, UsageError
from vlmqual_contract.footprint import Footprint
from vlmqual_contract.launch import Group, Limits
from vlmqual_contract.nodes import Nodes
from vlmqual_contract.subject import RemoteLibrary
from vlmqual_contract.target import (
    Array,
    Call,
    Capability,
    Costs,
    FloatArray,
    Info,
    Inputs,
    IntArray,
    Model,
    Options,
    Program,
    Prompt,
)

#: What a target that declares it cannot refuse as unsupported.
_CAPABILITIES = {"preprocess": Capability.PREPROCESS, "vision": Capability.VISION, "taps": Capability.TAPS}


@dataclass(frozen=True)
class Repeated:
    """What some repetitions gave.

    Attributes:
        seconds: for each repetition a value for each step; of several ranks the slowest one's.
        began_s: monotonic clock of rank 0's host when each repetition began.
        device_s: as `seconds`, by the devices' own clocks; empty lists where sessions have none.
        collective_s: for each repetition and step what the ranks spent in collective operations, where it was watched.
        buckets: for each repetition the different fixed shapes of its calls (rank 0); empty where there are none.
        digests: digest of the generated token ids for each repetition (rank 0).
        tokens: (B, 1 + steps) of the last repetition, or None.
        logits: (1 + steps, B, V) of the last repetition, or None.
    """

    seconds: list[list[float]]
    began_s: list[float]
    device_s: list[list[float]]
    collective_s: list[list[list[float]]]
    buckets: list[list[str]]
    digests: list[str]
    tokens: IntArray | None
    logits: FloatArray | None

    def followed_by(self, later: Repeated) -> Repeated:
        """These repetitions and later ones; tokens and logits are those of the last."""
        return Repeated(
            [*self.seconds, *later.seconds],
            [*self.began_s, *later.began_s],
            [*self.device_s, *later.device_s],
            [*self.collective_s, *later.collective_s],
            [*self.buckets, *later.buckets],
            [*self.digests, *later.digests],
            later.tokens,
            later.logits,
        )


class _Kept:
    """Something that lives in the target; the target forgets it after we did."""

    def __init__(self, session: RemoteSession, number: int, dtype: str) -> None:
        self._session = session
        self.number = number
        self.dtype = dtype

    def _read(self, what: str, **more: Any) -> Any:
        return self._session.request({"op": "read", "number": self.number, "what": what, **more})["value"]

    def __del__(self) -> None:
        self._session.forgotten.append(self.number)


class RemoteFeatures(_Kept):
    """Image features in the target. See `target.Features`."""

    def arrays(self) -> Mapping[str, FloatArray]:
        """Copy out."""
        return _arrays("features", self._read("arrays"))

    def taps(self) -> Mapping[str, FloatArray]:
        """Hidden states by component name."""
        return _arrays("taps of vision", self._read("taps"))


class RemoteStep(_Kept):
    """Sequences in the target. See `target.Step`."""

    def tokens(self) -> IntArray:
        """Greedy next token of every row, (B,) int64."""
        tokens: IntArray = _array("tokens", self._read("tokens"))
        return tokens

    def logits(self, all_positions: bool = False) -> FloatArray:
        """Logits of the last real position, (B, V), or of all positions, (B, S, V)."""
        logits: FloatArray = _array("logits", self._read("logits", all_positions=all_positions))
        return logits

    def taps(self) -> Mapping[str, FloatArray]:
        """Hidden states by component name."""
        return _arrays("taps", self._read("taps"))


class RemoteSession:
    """An opened model in workers. See `target.Session`.

    Attributes:
        load_s: seconds that the target took to open the model, of the slowest rank.
    """

    def __init__(self, group: Group, model: Model, options: Options, declared: Set[Capability]) -> None:
        self._group = group
        self._declared = declared
        self.forgotten: list[int] = []
        replies = group.request_all({"op": "open", "model": asdict(model), "options": asdict(options)})
        self.load_s = max(float(reply["seconds"]) for reply in replies)

    def preprocess(self, prompts: Sequence[Prompt]) -> Inputs:
        """Turn prompts into padded tensors."""
        reply = self.request({"op": "preprocess", "prompts": [asdict(prompt) for prompt in prompts]})
        inputs = _arrays("preprocess", reply["inputs"])
        for name in ("input_ids", "attention_mask"):
            if name not in inputs or inputs[name].ndim != 2:
                has = f"has shape {inputs[name].shape}" if name in inputs else "is missing"
                raise TargetMisspoke(f"preprocess: {name} (B, S) {has}; there are {', '.join(inputs)}")
        return inputs

    def vision(self, inputs: Inputs) -> RemoteFeatures:
        """Run the vision tower to the connector's output."""
        reply = self.request({"op": "vision", "inputs": inputs})
        return RemoteFeatures(self, reply["features"], reply["dtype"])

    def prefill(self, inputs: Inputs, features: RemoteFeatures | Mapping[str, Array] | None = None) -> RemoteStep:
        """Start new sequences."""
        reply = self.request({"op": "prefill", "inputs": inputs, "features": _features(features)})
        return RemoteStep(self, reply["step"], reply["dtype"])

    def decode(self, step: RemoteStep, tokens: IntArray | None = None) -> RemoteStep:
        """One token further for every row."""
        reply = self.request({"op": "decode", "step": step.number, "tokens": tokens})
        return RemoteStep(self, reply["step"], reply["dtype"])

    def synchronize(self) -> None:
        """Return when the device is done."""
        self.request({"op": "synchronize"})

    def costs(self) -> Costs:
        """What fixed shapes cost so far, of rank 0.

        Raises:
            Unsupported: the target's sessions do not tell.
        """
        reply = self.request({"op": "costs"})
        try:
            programs = {name: Program(**program) for name, program in reply["programs"].items()}
            calls = {
                kind: Call(**{**call, "programs": tuple(call["programs"])}) for kind, call in reply["calls"].items()
            }
            sound = all(
                0 < call.asked <= call.computed and set(call.programs) <= set(programs) for call in calls.values()
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise TargetMisspoke(f"costs: the target answered {reply!r}, not calls and programs") from error
        if not sound:
            raise TargetMisspoke(
                f"costs: a call computes less than is asked for, or runs an unknown program: {reply!r}"
            )
        return Costs(calls, programs)

    def prepare(
        self,
        phase: str,
        *,
        prompts: Sequence[Prompt] = (),
        inputs: Inputs | None = None,
        features: RemoteFeatures | Mapping[str, Array] | None = None,
        steps: int = 0,
        tokens: IntArray | None = None,
        keep_logits: bool = False,
        collectives: bool = False,
    ) -> int:
        """Hand over what a measured repetition does (see `timing.Work`); the number that `repeat` takes."""
        body = {
            "op": "prepare",
            "phase": phase,
            "prompts": [asdict(prompt) for prompt in prompts],
            "inputs": dict(inputs or {}),
            "features": _features(features),
            "steps": steps,
            "tokens": tokens,
            "keep_logits": keep_logits,
            "collectives": collectives,
        }
        return int(self.request(body)["work"])

    def repeat(self, work: int, count: int = 1) -> Repeated:
        """Run repetitions in the worker's timing loop; of several ranks the slowest one's value of every step."""
        replies = self.request_all({"op": "repeat", "work": work, "count": count})
        first = replies[0]
        return Repeated(
            _slowest([reply["seconds"] for reply in replies]),
            first["began_s"],
            _slowest([reply["device_s"] for reply in replies]),
            _by_step([reply["collective_s"] for reply in replies]),
            first["buckets"],
            first["digests"],
            first["tokens"],
            first["logits"],
        )

    def close(self) -> None:
        """Close the model; the workers stay."""
        if self._group.alive:
            self.request({"op": "close"})

    def request(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Ask every rank; the answer of rank 0.

        Raises:
            TargetMisspoke: the target refuses as unsupported what it declares.
        """
        try:
            return self.request_all(body)[0]
        except Unsupported as error:
            if (needed := _needed(body)) in self._declared:
                raise TargetMisspoke(f"{needed} is declared, but the target answered: {error}") from error
            raise

    def request_all(self, body: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Ask every rank; all answers."""
        forgotten, self.forgotten = self.forgotten, []
        return self._group.request_all({**body, "forget": forgotten})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except TargetFailure:
            if error is None:
                raise


def _slowest(by_rank: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """Of each step of each repetition the largest value of all ranks."""
    return [[max(values) for values in steps] for steps in _by_step(by_rank)]


def _by_step(by_rank: Sequence[Sequence[Sequence[float]]]) -> list[list[list[float]]]:
    """Of each step of each repetition the values of all ranks."""
    return [[list(values) for values in zip(*steps, strict=True)] for steps in zip(*by_rank, strict=True)]


def _needed(body: Mapping[str, Any]) -> Capability | None:
    """The capability that a request is about, where it is about one."""
    if body["op"] == "read" and body.get("all_positions"):
        return Capability.ALL_LOGITS
    named = body["what"] if body["op"] == "read" else body["op"]
    return _CAPABILITIES.get(named)


def _features(features: RemoteFeatures | Mapping[str, Array] | None) -> Any:
    return features.number if isinstance(features, RemoteFeatures) else features


class RemoteTarget:
    """A target in its own process or processes, as a context manager.

    Args:
        text: target string.
        tp: tensor-parallel size that sessions will be opened with.
        python: interpreter of another environment.
        threads: compute threads of each rank.
        limits: time limits.
        nodes: further machines for the ranks, where there are any.

    Raises:
        UsageError: the target string is wrong, or the target cannot do this tensor-parallel size at all.
        TargetFailure: the target did not come up.

    Attributes:
        info: what the target says of itself.
    """

    def __init__(
        self,
        text: str,
        *,
        tp: int = 1,
        python: str | None = None,
        threads: int | None = None,
        limits: Limits | None = None,
        nodes: Nodes | None = None,
    ) -> None:
        self.text = text
        spec = parse(text)
        self._arguments = ("--target", text, "--origin", origin(TARGETS, spec.kind))
        self._group = Group(self._arguments, python=python, threads=threads, limits=limits)
        try:
            self.info = _info(self._group.request({"op": "describe"})["info"])
            if tp > 1 and Capability.TENSOR_PARALLEL not in self.info.capabilities:
                raise UsageError(f"target {text!r} does not split a model over devices: it lacks tensor-parallel")
            if tp > 1 and self.info.processes == "per-rank":
                self._group.stop()
                self._group = Group(
                    self._arguments, size=tp, python=python, threads=threads, limits=limits, nodes=nodes
                )
                self._group.request({"op": "describe"})
        except BaseException:
            self._group.kill()
            raise

    @property
    def alive(self) -> bool:
        """False once the target crashed, hung or was stopped."""
        return self._group.alive

    @property
    def processes(self) -> int:
        """Number of worker processes."""
        return self._group.size

    def open(self, model: Model, options: Options | None = None) -> RemoteSession:
        """Load a checkpoint."""
        return RemoteSession(self._group, model, options or Options(), self.info.capabilities)

    def check(self, model: Model, options: Options) -> None:
        """Ask whether `open` would be refused, without loading; any size can be asked of a single process.

        Raises:
            UsageError: it would, and the target can tell in advance.
        """
        self._group.request({"op": "check", "model": asdict(model), "options": asdict(options)})

    def footprint(self, model: Model, options: Options, prompts: Sequence[Prompt], new_tokens: int) -> Footprint | None:
        """What a request would compile, run and keep; None where the target does not tell.

        Raises:
            UsageError: the model or a prompt is not valid.
            Unsupported: the target does not open models with these options.
        """
        reply = self._group.request(
            {
                "op": "footprint",
                "model": asdict(model),
                "options": asdict(options),
                "prompts": [asdict(prompt) for prompt in prompts],
                "new_tokens": new_tokens,
            }
        )
        try:
            return None if reply["footprint"] is None else Footprint.from_plain(reply["footprint"])
        except (KeyError, TypeError) as error:
            raise TargetMisspoke(f"footprint: the target answered {reply!r}") from error

    def probe(self, name: str, shape: tuple[int, ...], dtype: str) -> float:
        """Seconds of one pass of a ceiling probe, of the slowest rank."""
        replies = self._group.request_all({"op": "probe", "name": name, "shape": list(shape), "dtype": dtype})
        return max(float(reply["seconds"]) for reply in replies)

    def stop(self) -> None:
        """End the target's processes."""
        self._group.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _info(data: dict[str, Any]) -> Info:
    families = data["families"]
    if not isinstance(families, list):
        raise UsageError(f"the target's families are {families!r}; they have to be a tuple of names")
    if unknown := sorted(set(data["capabilities"]) - set(Capability)):
        raise UsageError(
            f"the target declares the capabilities {', '.join(unknown)}; known are {', '.join(Capability)}"
        )
    capabilities = frozenset(Capability(item) for item in data["capabilities"])
    return Info(**{**data, "capabilities": capabilities, "families": tuple(families)})


def _array(what: str, value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        raise TargetMisspoke(f"{what}: the target answered {type(value).__name__}, not a numpy array")
    return value


def _arrays(what: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TargetMisspoke(f"{what}: the target answered {type(value).__name__}, not a mapping of names to arrays")
    return {name: _array(f"{what}: {name}", item) for name, item in value.items()}


class LibraryProcess:
    """A library subject in its own process, as a context manager that gives a `RemoteLibrary`.

    Args:
        name: name of the library.
        python: interpreter of another environment.
        threads: compute threads; None leaves the choice to the library.
        limits: time limits.
    """

    def __init__(
        self, name: str, *, python: str | None = None, threads: int | None = None, limits: Limits | None = None
    ) -> None:
        self._group = Group(
            ("--library", name, "--origin", origin(LIBRARIES, parse(name).kind)),
            python=python,
            threads=threads,
            limits=limits,
        )
        try:
            self.library = RemoteLibrary(self._group.request)
        except BaseException:
            self._group.kill()
            raise

    @property
    def alive(self) -> bool:
        """False once the process crashed, hung or was stopped."""
        return self._group.alive

    def stop(self) -> None:
        """End the process."""
        self._group.stop()

    def __enter__(self) -> RemoteLibrary:
        return self.library

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
