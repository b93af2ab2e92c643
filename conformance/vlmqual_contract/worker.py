"""The worker: one process that holds one target or one library and does what the pipe says.

`vlmqual worker --target T` (or `--library L`) reads requests from its standard input and answers on what was its
standard output. Whatever the target prints goes to standard error. It ends when its input ends.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

from vlmqual_contract import timing
from vlmqual_contract.discovery import make_library, make_target
from vlmqual_contract.errors import EXIT_OK, Unsupported, UsageError
from vlmqual_contract.footprint import Footprint
from vlmqual_contract.subject import LibraryServer
from vlmqual_contract.target import Features, Model, Options, Prompt, Session, Step, Target
from vlmqual_contract.wire import Channel, Closed

_WATCH_S = 2.0


class Server:
    """Answers requests. Everything that stays in the target is known to the client by a number."""

    def __init__(self, target: Target | None, library: LibraryServer | None, about: Mapping[str, Any]) -> None:
        self._target = target
        self._library = library
        self._about = about
        self._open: AbstractContextManager[Session] | None = None
        self._session: Session | None = None
        self._kept: dict[int, Any] = {}
        self._next = 0

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        """One request to one answer; exceptions of the target pass through."""
        for number in body.get("forget", ()):
            self._kept.pop(number, None)
        op = body["op"]
        if op == "library":
            return dict(self._about)
        if op == "ask":
            if self._library is None:
                raise UsageError("this worker holds a target, not a library")
            return self._library.ask(body)
        method = getattr(self, f"_do_{op}", None)
        if method is None:
            raise UsageError(f"unknown request {op!r}")
        result: dict[str, Any] = method(body)
        return result

    def close(self) -> None:
        """Close the session, if one is open."""
        self._kept.clear()
        if self._open is not None:
            self._session = None
            manager, self._open = self._open, None
            manager.__exit__(None, None, None)

    # requests ------------------------------------------------------------------------------------------------------

    def _do_describe(self, body: dict[str, Any]) -> dict[str, Any]:
        info = asdict(self.target.info)
        return {"info": {**info, "capabilities": sorted(str(item) for item in self.target.info.capabilities)}}

    def _do_open(self, body: dict[str, Any]) -> dict[str, Any]:
        self.close()
        start = time.perf_counter()
        self._open = self.target.open(Model(**body["model"]), Options(**body["options"]))
        try:
            self._session = self._open.__enter__()
        except BaseException:
            self._open = None
            raise
        self._session.synchronize()
        return {"seconds": time.perf_counter() - start}

    def _do_check(self, body: dict[str, Any]) -> dict[str, Any]:
        check = getattr(self.target, "check", None)  # optional: see target.Target.open
        if check is not None:
            check(Model(**body["model"]), Options(**body["options"]))
        return {}

    def _do_footprint(self, body: dict[str, Any]) -> dict[str, Any]:
        footprint = getattr(self.target, "footprint", None)  # optional: see target.Target.open
        if footprint is None:
            return {"footprint": None}
        model, options = Model(**body["model"]), Options(**body["options"])
        found: Footprint = footprint(model, options, _prompts(body["prompts"]), body["new_tokens"])
        return {"footprint": found.plain()}

    def _do_close(self, body: dict[str, Any]) -> dict[str, Any]:
        self.close()
        return {}

    def _do_preprocess(self, body: dict[str, Any]) -> dict[str, Any]:
        inputs = self.session.preprocess(_prompts(body["prompts"]))
        return {"inputs": dict(inputs) if isinstance(inputs, Mapping) else inputs}

    def _do_vision(self, body: dict[str, Any]) -> dict[str, Any]:
        features = self.session.vision(body["inputs"])
        return {"features": self._keep(features), "dtype": features.dtype}

    def _do_prefill(self, body: dict[str, Any]) -> dict[str, Any]:
        return self._step(self.session.prefill(body["inputs"], self._features(body["features"])))

    def _do_decode(self, body: dict[str, Any]) -> dict[str, Any]:
        return self._step(self.session.decode(self._kept[body["step"]], body["tokens"]))

    def _do_read(self, body: dict[str, Any]) -> dict[str, Any]:
        kept: Step | Features = self._kept[body["number"]]
        if body["what"] == "logits":
            value: Any = kept.logits(body["all_positions"])  # type: ignore[union-attr]  # a step, by the protocol
        else:
            value = getattr(kept, body["what"])()
        if body.get("quiet"):
            return {}
        return {"value": dict(value) if isinstance(value, Mapping) else value}

    def _do_synchronize(self, body: dict[str, Any]) -> dict[str, Any]:
        self.session.synchronize()
        return {}

    def _do_costs(self, body: dict[str, Any]) -> dict[str, Any]:
        costs = getattr(self.session, "costs", None)  # optional: see target.Session
        if costs is None:
            raise Unsupported("the target's sessions have no costs of fixed shapes to tell")
        return asdict(costs())

    def _do_prepare(self, body: dict[str, Any]) -> dict[str, Any]:
        work = timing.Work(
            phase=body["phase"],
            prompts=_prompts(body["prompts"]),
            inputs=body["inputs"],
            features=self._features(body["features"]),
            steps=body["steps"],
            tokens=body["tokens"],
            keep_logits=body["keep_logits"],
            collectives=body["collectives"],
        )
        return {"work": self._keep(timing.prepare(self.session, work))}

    def _do_repeat(self, body: dict[str, Any]) -> dict[str, Any]:
        repetitions = [timing.repeat(self.session, self._kept[body["work"]]) for _ in range(body["count"])]
        quiet = bool(body.get("quiet"))
        return {
            "seconds": [item.seconds for item in repetitions],
            "began_s": [item.began_s for item in repetitions],
            "device_s": [item.device_s for item in repetitions],
            "collective_s": [item.collective_s for item in repetitions],
            "buckets": [list(item.buckets) for item in repetitions],
            "digests": [item.digest() for item in repetitions],
            "tokens": None if quiet else repetitions[-1].tokens,
            "logits": None if quiet else repetitions[-1].logits,
        }

    def _do_probe(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"seconds": self.target.probe(body["name"], tuple(body["shape"]), body["dtype"])}

    # what the requests share -----------------------------------------------------------------------------------------

    @property
    def target(self) -> Target:
        """The target of this worker."""
        if self._target is None:
            raise UsageError("this worker holds a library, not a target")
        return self._target

    @property
    def session(self) -> Session:
        """The open session."""
        if self._session is None:
            raise UsageError("no model is open in this worker")
        return self._session

    def _keep(self, value: Any) -> int:
        self._next += 1
        self._kept[self._next] = value
        return self._next

    def _step(self, step: Step) -> dict[str, Any]:
        return {"step": self._keep(step), "dtype": step.dtype}

    def _features(self, value: Any) -> Any:
        return self._kept[value] if isinstance(value, int) else value


def _prompts(items: list[dict[str, Any]]) -> list[Prompt]:
    return [Prompt(item["text"], tuple(item["images"])) for item in items]


def serve(channel: Channel, server: Server) -> None:
    """Answer requests until the other end goes away or asks to stop."""
    while True:
        try:
            body = channel.receive()
        except Closed:
            break
        if body["op"] == "stop":
            break
        try:
            reply = server.answer(body)
        except (UsageError, Unsupported) as error:
            kind = "usage" if isinstance(error, UsageError) else "unsupported"
            reply = {"error": {"kind": kind, "message": str(error)}}
        except Exception as error:  # whatever the target raises is an observation
            reply = {"error": _described(error)}
        try:
            channel.send(reply)
        except TypeError as error:  # the target answered something that is no plain data
            channel.send({"error": _described(error)})
        except Closed:
            break
    server.close()


def _described(error: Exception) -> dict[str, Any]:
    return {
        "kind": "raised",
        "type": type(error).__name__,
        "bases": [base.__name__ for base in type(error).__mro__],
        "message": str(error),
        "trace": "".join(traceback.format_exception(error)),
    }


def _watch_parent(parent: int) -> None:
    """End this process when its parent is gone, even while the target computes."""
    while os.getppid() == parent:
        time.sleep(_WATCH_S)
    os._exit(1)


class _Command:
    """`vlmqual worker`: not for people, but it can be watched by hand."""

    help = "hold one target or library and obey a pipe (started by the other commands)"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        what = parser.add_mutually_exclusive_group(required=True)
        what.add_argument("--target", help="target string")
        what.add_argument("--library", help="name of a library subject")
        parser.add_argument("--origin", default="", help="NAME=module:object for a name that is not installed here")

    def run(self, args: argparse.Namespace) -> int:
        """Serve until the input ends."""
        if sys.stdin.isatty():
            raise UsageError("worker obeys a pipe; it is started by conformance, perf and check-target")
        channel = Channel(os.dup(0), os.dup(1))
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)
        threading.Thread(target=_watch_parent, args=(os.getppid(),), daemon=True).start()
        name, _, value = args.origin.partition("=")
        origins = {name: value} if value else {}
        try:
            if args.target:
                server = Server(make_target(args.target, origins), None, {})
            else:
                library = make_library(args.library, origins)
                about = {
                    "name": library.name,
                    "version": library.version,
                    "families": list(library.families),
                    "emulated": getattr(library, "emulated", False),
                }
                server = Server(None, LibraryServer(library), about)
        except (UsageError, Unsupported, ImportError) as error:
            channel.receive()
            channel.send({"error": {"kind": "usage", "message": f"{args.target or args.library}: {error}"}})
            return EXIT_OK
        except Exception as error:  # whatever the target raises is an observation
            channel.receive()
            channel.send({"error": _described(error)})
            return EXIT_OK
        serve(channel, server)
        return EXIT_OK


command = _Command()


def main() -> int:
    """Entry of `python -m vlmqual_contract.worker`, for environments without the console script."""
    parser = argparse.ArgumentParser(prog="vlmqual worker", description=command.help)
    command.configure(parser)
    return command.run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
