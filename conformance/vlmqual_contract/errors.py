"""The errors that cross module and process borders, and the exit codes they lead to."""

from __future__ import annotations

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INCOMPLETE = 3


class VlmqualError(Exception):
    """Base class of everything that this project raises on purpose."""


class UsageError(VlmqualError):
    """A user's mistake: one sentence that names the thing, its value and what would be valid. Exit code 2."""


class Unsupported(VlmqualError):
    """The target does not offer a capability. Leads to "not applicable", never to a failure."""


class TargetFailure(VlmqualError):
    """The target did something that no verdict but `error` can describe."""


class TargetRaised(TargetFailure):
    """The target raised an exception.

    Attributes:
        type_name: name of the exception's class.
        bases: names of its class and all base classes, outermost last.
        trace: the target's traceback, for the log.
    """

    def __init__(self, type_name: str, message: str, bases: tuple[str, ...] = (), trace: str = "") -> None:
        super().__init__(f"{type_name}: {message}" if message else type_name)
        self.type_name = type_name
        self.message = message
        self.bases = bases or (type_name,)
        self.trace = trace


class TargetCrashed(TargetFailure):
    """The target's process ended although nobody asked it to."""


class TargetMisspoke(TargetFailure):
    """The target answered something that is no answer: of another type than documented, or too large."""


class OutOfTime(TargetFailure):
    """The time that several requests may take together is over; the target was not asked any more, and still lives."""


class TargetHung(TargetFailure):
    """The target did not answer within its time limit; its process was killed."""
