"""What bounding the memory of weights costs a reference, and that the bound holds.

Makes a checkpoint of Idefics3 with random weights in a temporary folder (wide decoder layers and a small vision tower
and tokenizer, those of the tiny fixture), then runs `vlmqual reference` on it in a process of its own, once with all
weights in memory and once with the least that --memory accepts. Printed are for each the bound, seconds, bytes read and
the largest resident memory of the process; a second line takes off what the same process has before it reads weights.

`python impl/benchmarks/reference_memory.py --layers 8 --width 2048`
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from full_size import materialize

from vlmqual_contract import fixtures
from vlmqual_impl.configs import config_for
from vlmqual_impl.models.idefics3 import Idefics3
from vlmqual_impl.weights import save

GIB = 2**30


def checkpoint(folder: Path, layers: int, width: int) -> int:
    """Write the checkpoint in bfloat16; the bytes of its weights in float32."""
    source = Path(fixtures.checkpoint("idefics3-tiny"))
    folder.mkdir()
    for path in source.glob("*.json"):
        shutil.copy(path, folder)
    values: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8"))
    heads = width // 64
    values["text_config"] |= {
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 4,
        "head_dim": 64,
    }
    (folder / "config.json").write_text(json.dumps(values), "utf-8")
    with torch.device("meta"):
        model = Idefics3(config_for(values))
    stored = materialize(model, torch.bfloat16, seed=1)
    save(model, folder, "500MB")
    return 2 * stored


def made(folder: Path, output: Path, memory_gib: float, tokens: int) -> dict[str, Any] | str:
    """What the record of a reference says, or why none was made."""
    prompts = output.parent / "prompts.jsonl"
    photo = str(fixtures.image("coffee.png"))
    rows = ({"name": "photo", "text": "<image>What is it?", "images": [photo]}, {"name": "text", "text": "Two rivers."})
    prompts.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    command = [sys.executable, "-m", "vlmqual_contract.cli", "reference", f"--checkpoint={folder}"]
    options = [f"--prompts={prompts}", f"--output={output}", f"--tokens={tokens}", "--arms=2", "--dtypes=float32"]
    ended = subprocess.run([*command, *options, f"--memory={memory_gib}"], capture_output=True, text=True, check=False)
    if ended.returncode:
        return ended.stderr.strip()
    record: dict[str, Any] = json.loads((output / "reference.json").read_text("utf-8"))
    return record


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=4)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vlmqual-reference-") as place:
        folder = Path(place, "checkpoint")
        whole = checkpoint(folder, chosen.layers, chosen.width)
        refused = made(folder, Path(place, "none"), 1e-6, chosen.tokens)
        assert isinstance(refused, str), "a millionth of a gibibyte has to be refused"
        least = float(refused.rpartition("take ")[2].split()[0]) * 1.01
        tiny = made(Path(fixtures.checkpoint("idefics3-tiny")).resolve(), Path(place, "tiny"), 1.0, 1)
        base = tiny["peak_bytes"] if isinstance(tiny, dict) else 0
        print(f"weights {whole / GIB:.2f} GiB in float32; the process without them {base / GIB:.2f} GiB")
        for name, memory in (("all in memory", whole / GIB * 1.1), ("block by block", least)):
            record = made(folder, Path(place, name.replace(" ", "-")), memory, chosen.tokens)
            if isinstance(record, str):
                print(f"{name}: {record}", file=sys.stderr)
                return 1
            print(
                f"{name:<16} bound {memory:6.2f} GiB   {record['seconds']:7.1f} s   "
                f"read {record['read_bytes'] / GIB:7.2f} GiB   peak {record['peak_bytes'] / GIB:5.2f} GiB   "
                f"over the process {(record['peak_bytes'] - base) / GIB:5.2f} GiB"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
