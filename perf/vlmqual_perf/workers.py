"""The workers of one TP size: started when first needed, and again after a crash or a hang."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Self

from vlmqual_contract.discovery import parse
from vlmqual_contract.launch import Limits
from vlmqual_contract.remote import RemoteSession, RemoteTarget
from vlmqual_contract.target import Info, Model, Options


@dataclass(frozen=True)
class Launch:
    """How targets are started.

    Attributes:
        text: target string.
        python: interpreter of another environment.
        threads: compute threads of each rank, the same at every TP size.
        limits: time limits.
    """

    text: str
    python: str | None
    threads: int
    limits: Limits

    def start(self, tp: int) -> RemoteTarget:
        """Start the workers of a TP size.

        Raises:
            UsageError: the target string is wrong, or the target does not split a model.
            TargetFailure: the target did not come up.
        """
        return RemoteTarget(self.text, tp=tp, python=self.python, threads=self.threads, limits=self.limits)

    def in_dtype(self, dtype: str) -> Launch:
        """The same target computing in another dtype."""
        spec = parse(self.text)
        options = {**spec.options, "dtype": dtype}
        head = f"{spec.file}:{spec.name}" if spec.file else spec.kind
        text = f"{head}:{','.join(f'{key}={value}' for key, value in options.items())}"
        return Launch(text, self.python, self.threads, self.limits)


class Workers:
    """The workers of one TP size, as a context manager.

    Attributes:
        tp: tensor-parallel size.
    """

    def __init__(self, launch: Launch, tp: int) -> None:
        self.tp = tp
        self._launch = launch
        self._target: RemoteTarget | None = None
        self._session: RemoteSession | None = None
        self._opened: tuple[Model, Options] | None = None

    @property
    def info(self) -> Info:
        """What the target says of itself."""
        return self._running().info

    @property
    def processes(self) -> int:
        """Number of ranks that are processes of their own."""
        return self._running().processes

    def session(self, model: Model, options: Options) -> RemoteSession:
        """The model, opened; opened again where another one is open or the workers are gone."""
        if self._session is None or self._opened != (model, options) or not self._running().alive:
            return self.reopen(model, options)
        return self._session

    def reopen(self, model: Model, options: Options) -> RemoteSession:
        """Open the model, closing the one that is open."""
        self._session = self._opened = None
        self._session = self._running().open(model, options)
        self._opened = (model, options)
        return self._session

    def stop(self) -> None:
        """End the processes."""
        self._session = self._opened = None
        if self._target is not None:
            self._target.stop()
            self._target = None

    def _running(self) -> RemoteTarget:
        if self._target is not None and not self._target.alive:
            self.stop()
        if self._target is None:
            self._target = self._launch.start(self.tp)
        return self._target

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
