"""Which scenarios a command is about: of the bundled file or the user's, of a suite, of the families asked for."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from vlmqual_contract import fixtures
from vlmqual_contract.errors import UsageError
from vlmqual_contract.scenario import Scenario, Suite, load_catalogue
from vlmqual_contract.target import FAMILIES, Model
from vlmqual_perf.plan import config_of


@dataclass(frozen=True)
class Selection:
    """What is to be measured.

    Attributes:
        suite: that was named.
        scenarios: of it, in the file's order.
        digest: of the user's scenarios file and its images; "" for the bundled one.
    """

    suite: Suite
    scenarios: tuple[Scenario, ...]
    digest: str = ""

    def limits_s(self, timeout_s: float | None) -> dict[str, float]:
        """Seconds that scenarios may take at one size, by id: as the user says, else the scenario, else the suite."""
        found = {one.id: timeout_s or one.time_limit_s or self.suite.time_limit_s for one in self.scenarios}
        return {name: limit for name, limit in found.items() if limit is not None}


def select(
    suite: str, *, file: Path | None = None, family: str | None = None, checkpoint: Path | None = None
) -> Selection:
    """The scenarios of a suite, or the single one of this id.

    Args:
        suite: its name.
        file: the user's scenarios; None for the bundled ones.
        family: only this one's.
        checkpoint: the user's own; only scenarios of its family are run on it.

    Raises:
        UsageError: a file is damaged, or nothing of this name is there.
    """
    catalogue = load_catalogue(file or fixtures.file("scenarios.toml"), own=file is not None)
    families = [family] if family else list(FAMILIES)
    if checkpoint is not None:
        if not (checkpoint / "config.json").is_file():
            raise UsageError(f"--checkpoint {checkpoint} has no config.json")
        kind = config_of(Model(str(checkpoint), "")).get("model_type")
        if kind in FAMILIES:
            if family and family != kind:
                raise UsageError(f"--family {family} is asked for, but --checkpoint {checkpoint} is {kind}")
            families = [str(kind)]
    scenarios = tuple(catalogue.select(suite, families))
    return Selection(catalogue.suite(suite), scenarios, "" if file is None else _digest(file, scenarios))


def _digest(file: Path, scenarios: tuple[Scenario, ...]) -> str:
    found = hashlib.sha256(file.read_bytes())
    for image in sorted({path for one in scenarios for prompt in one.prompts() for path in prompt.images}):
        found.update(Path(image).read_bytes())
    return found.hexdigest()[:16]
