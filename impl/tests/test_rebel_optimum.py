"""optimum-rbln's own Idefics3, unmodified, over the emulator: its tokens must be those of transformers.

Runs where optimum-rbln is installed, which pins torch and transformers and so has an environment of its own;
the development environment has none.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import vlmqual_rebel

try:
    VERSION = importlib.metadata.version("optimum-rbln")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("optimum-rbln is not installed here; it wants an environment of its own", allow_module_level=True)

SCRIPT = Path(__file__).parent / "rebel_optimum_script.py"
IMPL = Path(vlmqual_rebel.__file__).parent.parent


def run(folder: Path, case: str) -> dict[str, Any]:
    env = os.environ | {"PYTHONPATH": str(IMPL), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "vlmqual_rebel", "--devices", "8", str(SCRIPT), str(folder), case]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr.count("EMULATED") == 1
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return found


@pytest.mark.parametrize(
    ("case", "count"), [("eager", 9), ("tensor parallel", 3), ("batch", 2), ("flash", 3), ("masked", 1)]
)
def test_tokens_and_logits_of_optimum_over_the_emulator_are_those_of_transformers(
    tmp_path: Path, case: str, count: int
) -> None:
    found = run(tmp_path, case)
    compared = {name: one for name, one in found.items() if "tokens" in one}
    assert len(compared) == count
    for name, one in compared.items():
        assert one["tokens"] == one["reference"], name
        # Float32 over two layers in another order of summation; a wrong scale by 1 % shows 1e-2.
        assert name == "copies apart" or one["difference"] <= 1e-5 * one["largest"], name
    if case == "eager":
        prompts = [compared[name]["tokens"] for name in ("one image", "two images", "text only")]
        assert prompts[0] != prompts[1] != prompts[2] != prompts[0], (
            "a model that is blind to its images proves nothing"
        )
        assert set(found["files"]) == {
            "compiled_model.rbln",
            "vision_model/compiled_model.rbln",
            "text_model/prefill.rbln",
            "text_model/decoder_batch_1.rbln",
        }
    if case == "tensor parallel":
        assert found["inspect"]["num_devices"] == 4
        assert "not emulated" in found["inspect"]["tensor_parallelism"]
