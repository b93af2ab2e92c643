"""The recipes of the fixture checkpoints: the same bytes on every machine, from a seed.

`python -m vlmqual_adapters.recipes --output fixtures` writes them, `--check` compares with what is stored.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vlmqual_adapters import inventory, recipes_idefics, recipes_idefics3, recipes_mllama
from vlmqual_adapters.drawing import SEED, safetensors
from vlmqual_contract.errors import EXIT_FAILED, EXIT_OK


def checkpoints() -> dict[str, bytes]:
    """Every file of the fixture checkpoints: path below `fixtures` to content."""
    files: dict[str, bytes] = {}
    for recipe in (recipes_idefics3, recipes_mllama):
        for name, config in ((recipe.TINY, recipe.tiny_config()), (recipe.RELEASED_GEOMETRY, recipe.released_config())):
            for file, content in recipe.processor_files(config).items():
                files[f"checkpoints/{name}/{file}"] = content
        weights = safetensors(recipe.tiny_weights(recipe.tiny_config()), {"format": "pt"})
        files[f"checkpoints/{recipe.TINY}/model.safetensors"] = weights
    for name, idefics in recipes_idefics.CONFIGS.items():
        for file, content in recipes_idefics.processor_files(idefics).items():
            files[f"checkpoints/{name}/{file}"] = content
        if name != recipes_idefics.RELEASED_GEOMETRY:
            weights = safetensors(recipes_idefics.tiny_weights(idefics), {"format": "pt"})
            files[f"checkpoints/{name}/model.safetensors"] = weights
    return files


def main(arguments: list[str] | None = None) -> int:
    """Write or check the fixture checkpoints; 0 when all is written or equal, 1 when a stored file differs."""
    parser = argparse.ArgumentParser(prog="python -m vlmqual_adapters.recipes", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("fixtures"), help="the fixtures directory")
    parser.add_argument("--check", action="store_true", help="write nothing; compare with what is stored")
    chosen = parser.parse_args(arguments)
    different = 0
    for name, content in checkpoints().items():
        path: Path = chosen.output / name
        if chosen.check:
            same = path.is_file() and path.read_bytes() == content
            different += not same
            print(f"{'same' if same else 'DIFFERENT'}  {name}")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            print(f"{len(content):>9} bytes  {name}")
    if not chosen.check:
        command = "python -m vlmqual_adapters.recipes --output fixtures"
        inventory.write(chosen.output, "checkpoints", {"command": command, "seed": SEED, "generator": "numpy PCG64"})
    return EXIT_FAILED if different else EXIT_OK


if __name__ == "__main__":
    sys.exit(main())
