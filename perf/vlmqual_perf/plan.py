"""What is measured: every phase of every scenario at every tensor-parallel size."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from vlmqual_contract.errors import UsageError
from vlmqual_contract.scenario import Scenario
from vlmqual_contract.target import Inputs, Model, Prompt

PHASES = ("load", "first-call", "compile", "preprocess", "vision", "prefill", "decode", "ttft")
ONCE = ("load", "first-call", "compile")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Cell:
    """One measurement to be made."""

    scenario: Scenario
    phase: str
    tp: int

    @property
    def case(self) -> str:
        """Name of the cell in the results."""
        return f"{self.scenario.id}/{self.phase}/tp{self.tp}"


def cells(
    scenarios: Sequence[Scenario],
    phases: Sequence[str],
    sizes: Sequence[int],
    *,
    checkpoint: Path | None = None,
    fixed_shapes: bool = False,
    seed: int | None = None,
) -> list[Cell]:
    """All cells in the order in which they are run.

    Sizes come as they are listed. Within a size scenarios of the same checkpoint stay together, so that each is loaded
    once; what happens once (load, first-call, compile) stays in front. A seed shuffles the rest: checkpoints within a
    size, scenarios within a checkpoint, phases within a scenario. Which cells there are does not depend on it: loading
    and the first call belong to the checkpoint's first scenario as listed.

    Args:
        scenarios: requests.
        phases: of `PHASES`.
        sizes: tensor-parallel sizes.
        checkpoint: the user's own instead of the scenarios'.
        fixed_shapes: the target compiles; others have no such phase. A scenario without images has no vision phase.
        seed: of the order; None keeps the order of the lists, phases as in `PHASES`.

    Raises:
        UsageError: a phase is unknown or a size is not positive.
    """
    if not phases:
        raise UsageError(f"no phase is named; phases are {', '.join(PHASES)}")
    if unknown := [phase for phase in phases if phase not in PHASES]:
        raise UsageError(f"phase {unknown[0]!r} is unknown; phases are {', '.join(PHASES)}")
    if wrong := [size for size in sizes if size < 1]:
        raise UsageError(f"tensor-parallel size {wrong[0]} is not positive")
    blocks: dict[str, list[Scenario]] = {}
    for scenario in scenarios:
        name = scenario.family if checkpoint else f"{scenario.folder or ''}/{scenario.checkpoint}"
        blocks.setdefault(name, []).append(scenario)
    found: list[Cell] = []
    for size in sizes:
        for block in _shuffled(list(blocks.values()), seed, size):
            found += [Cell(block[0], phase, size) for phase in ("load", "first-call") if phase in phases]
            for scenario in _shuffled(block, seed, size, block[0].id):
                if "compile" in phases and fixed_shapes:
                    found.append(Cell(scenario, "compile", size))
                repeated = [phase for phase in PHASES if phase in phases and phase not in ONCE]
                if not scenario.images:
                    repeated = [phase for phase in repeated if phase != "vision"]
                found += [Cell(scenario, phase, size) for phase in _shuffled(repeated, seed, size, scenario.id)]
    return found


def _shuffled(items: Sequence[Item], seed: int | None, *where: int | str) -> list[Item]:
    """The items in an order that the seed and the place decide, on every machine the same."""
    mixed = list(items)
    if seed is not None:
        random.Random(f"{seed} {where}").shuffle(mixed)
    return mixed


def seed_of(*facts: object) -> int:
    """A seed that the same run always has, so that a run that is continued keeps its order."""
    return int(hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8], 16)


def sizes_of(text: str) -> tuple[int, ...]:
    """Tensor-parallel sizes of an argument such as 1,2,4, each once.

    Raises:
        UsageError: it is no such list.
    """
    try:
        numbers = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise UsageError(f"--tp {text!r} is no list of numbers such as 1,2,4") from None
    if min(numbers) < 1:
        raise UsageError(f"--tp {text!r}: tensor-parallel sizes are positive")
    return numbers


def model_of(scenario: Scenario, checkpoint: Path | None) -> Model:
    """The scenario's model: its own checkpoint, or the user's."""
    return Model(str(checkpoint), scenario.family) if checkpoint else scenario.model()


def prompts_of(scenario: Scenario) -> list[Prompt]:
    """The scenario's rows."""
    return scenario.prompts()


def shape_of(scenario: Scenario, inputs: Inputs, config: Mapping[str, object]) -> dict[str, int]:
    """What makes a request large or small, counted on its tensors.

    Args:
        scenario: the request.
        inputs: its tensors.
        config: the model's config.json.

    Returns:
        images and tiles of a row, padded_tiles (tiles that are computed besides), image_tokens that the text model
        reads and prompt_tokens of the longest row, padded_tokens over all rows, new_tokens.
    """
    mask = inputs["attention_mask"]
    tiles, slots, image_tokens = _image_sizes(inputs, config)
    return {
        "images": len(scenario.images),
        "tiles": tiles,
        "padded_tiles": slots - tiles,
        "image_tokens": image_tokens,
        "prompt_tokens": int(mask.sum(axis=1).max()),
        "padded_tokens": int((mask == 0).sum()),
        "new_tokens": scenario.new_tokens,
    }


def _image_sizes(inputs: Inputs, config: Mapping[str, object]) -> tuple[int, int, int]:
    """Real tiles or frames, places for them, and image tokens that the text model reads; each of the largest row."""
    pixels = inputs.get("pixel_values")
    if pixels is None:
        return 0, 0, 0
    if "aspect_ratio_ids" in inputs:  # Mllama: every place of every image is computed and read by cross-attention
        real = inputs["aspect_ratio_mask"] * (inputs["aspect_ratio_ids"] > 0)[..., None]
        slots = pixels.shape[1] * pixels.shape[2]
        vision = _part(config, "vision_config")
        positions = (int(vision["image_size"]) // int(vision["patch_size"])) ** 2 + 1
        return int(real.sum(axis=(1, 2)).max()), slots, slots * positions
    if "image_attention_mask" in inputs:  # Idefics: every slot is computed and read by cross-attention
        slots, size = pixels.shape[1], int(_part(config, "vision_config").get("patch_size", 14))
        features = (pixels.shape[3] // size) * (pixels.shape[4] // size) + 1
        if config.get("use_resampler"):
            features = int(_part(config, "perceiver_config").get("resampler_n_latents", 64))
        shown = inputs["image_attention_mask"].any(axis=1).sum(axis=1)  # a slot that no token sees is padding
        return int(shown.max()), slots, slots * features
    tiles = int(np.any(pixels != 0, axis=(2, 3, 4)).sum(axis=1).max())
    tokens = inputs["input_ids"] == config.get("image_token_id")
    return tiles, tiles, int(tokens.sum(axis=1).max())  # Idefics3: frames of padding are dropped


def _part(config: Mapping[str, object], name: str) -> Mapping[str, Any]:
    part = config.get(name, {})
    if not isinstance(part, Mapping):
        raise UsageError(f"config.json: {name} is no JSON object")
    return part


def config_of(model: Model) -> dict[str, object]:
    """The config.json of a checkpoint.

    Raises:
        UsageError: it is missing or damaged.
    """
    path = Path(model.path) / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UsageError(f"{path}: holds no JSON object")
    return config
