"""`faulty:fault=NAME`: the bundled implementation, wrong in one named way; what it offers of itself can be narrowed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from vlmqual_contract.errors import UsageError
from vlmqual_contract.target import Capability, Info, Model, Options
from vlmqual_faults.catalogue import Variant, names, variant
from vlmqual_faults.surgery import SurgeryError, changed
from vlmqual_impl.target import EagerTarget, one_of
from vlmqual_impl.target_session import EagerSession

#: What a device lets an observer see: everything; logits of every position; those of the last position alone.
PROFILES = {
    "taps": frozenset(Capability),
    "all-logits": frozenset(Capability) - {Capability.TAPS},
    "last-logits": frozenset(Capability) - {Capability.TAPS, Capability.ALL_LOGITS},
}


class FaultyTarget:
    """See the module.

    Attributes:
        info: that of the bundled implementation under the name "faulty", with the fault as its runtime.
    """

    info: Info

    def __init__(self, fault: str, offers: str = "taps", dtype: str = "", threads: str | int = "") -> None:
        """Say what is to be wrong.

        Args:
            fault: name of a fault or an honest variant.
            offers: one of `PROFILES`.
            dtype: declared compute dtype, "" for the variant's own.
            threads: CPU threads.

        Raises:
            UsageError: there is no such fault, profile or dtype, or the code under the fault has moved.
        """
        one_of("fault", fault, names())
        one_of("offers", offers, tuple(PROFILES))
        self._fault = fault
        self._dtype, self._threads = dtype, threads
        info = EagerTarget(dtype=dtype or "float32", threads=threads).info
        families = tuple(family for family in info.families if self._variant(family) is not None)
        for each in filter(None, map(self._variant, families)):
            with _changed(each):  # now, so that a fault that cannot be put in is no case that failed
                pass
        if not dtype:
            declared = {found.dtype for family in families if (found := self._variant(family)) is not None}
            if len(declared) > 1:
                raise UsageError(f"fault {fault!r} declares {', '.join(sorted(declared))}; say which with dtype=")
            info = replace(info, dtype=declared.pop())
        self.info = replace(
            info,
            name="faulty",
            runtime=f"{info.runtime}, changed: {fault}",
            capabilities=info.capabilities & PROFILES[offers],
            families=families,
            library="",
        )

    def _variant(self, family: str) -> Variant | None:
        try:
            return variant(family, self._fault)
        except KeyError:
            return None

    @contextmanager
    def open(self, model: Model, options: Options) -> Iterator[EagerSession]:
        """Load a checkpoint and run it while the fault is in place.

        Raises:
            UsageError: the fault is none of this family, or see `EagerTarget.open`.
        """
        found = self._variant(model.family)
        if found is None:
            raise UsageError(f"fault {self._fault!r} is none of {model.family}; it is one of {self.info.families}")
        plain = EagerTarget(dtype=self.info.dtype, threads=self._threads)
        with _changed(found), plain.open(model, options) as session:
            yield session

    def check(self, model: Model, options: Options) -> None:
        """See `EagerTarget.check`."""
        EagerTarget(dtype=self.info.dtype).check(model, options)

    def probe(self, name: str, shape: tuple[int, ...], dtype: str) -> float:
        """See `EagerTarget.probe`."""
        return EagerTarget(dtype=self.info.dtype, threads=self._threads).probe(name, shape, dtype)


@contextmanager
def _changed(variant: Variant) -> Iterator[None]:
    """The variant in place.

    Raises:
        UsageError: the code that it changes is not what its table says.
    """
    try:
        with changed(*variant.changes):
            yield
    except SurgeryError as error:
        raise UsageError(f"{variant.family} {variant.name}: {error}") from error
