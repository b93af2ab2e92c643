"""What is measured: every phase of every scenario at every tensor-parallel size."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlmqual_contract import fixtures
from vlmqual_contract.errors import UsageError
from vlmqual_contract.scenario import Scenario
from vlmqual_contract.target import Inputs, Model, Prompt

PHASES = ("load", "compile", "preprocess", "vision", "prefill", "decode", "ttft")


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
    scenarios: Iterable[Scenario], phases: Sequence[str], sizes: Sequence[int], *, fixed_shapes: bool = False
) -> list[Cell]:
    """All cells in the order in which they are run: by size, then scenario, then phase in the data's order.

    Loading is measured once for each checkpoint and size; a scenario without images has no vision phase, and only a
    target with fixed shapes compiles.

    Raises:
        UsageError: a phase is unknown or a size is not positive.
    """
    if not phases:
        raise UsageError(f"no phase is named; phases are {', '.join(PHASES)}")
    if unknown := [phase for phase in phases if phase not in PHASES]:
        raise UsageError(f"phase {unknown[0]!r} is unknown; phases are {', '.join(PHASES)}")
    if wrong := [size for size in sizes if size < 1]:
        raise UsageError(f"tensor-parallel size {wrong[0]} is not positive")
    found: list[Cell] = []
    for size in sizes:
        loaded: set[str] = set()
        for scenario in scenarios:
            for phase in (phase for phase in PHASES if phase in phases):
                if (phase == "vision" and not scenario.images) or (phase == "compile" and not fixed_shapes):
                    continue
                if phase == "load":
                    if scenario.checkpoint in loaded:
                        continue
                    loaded.add(scenario.checkpoint)
                found.append(Cell(scenario, phase, size))
    return found


def model_of(scenario: Scenario, checkpoint: Path | None) -> Model:
    """The scenario's model: its fixture checkpoint, or the user's own."""
    return Model(str(checkpoint or fixtures.checkpoint(scenario.checkpoint)), scenario.family)


def prompts_of(scenario: Scenario) -> list[Prompt]:
    """The scenario's rows."""
    images = tuple(str(fixtures.image(name)) for name in scenario.images)
    return [Prompt(scenario.prompt, images)] * scenario.batch


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
