"""A user's checkpoint in the place of the fixtures: what a run is over, and what is said when it cannot be."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlmqual_conformance import catalogue, references
from vlmqual_conformance.checkpoint_suite.asking import Asked, length, noise
from vlmqual_conformance.checkpoint_suite.margins import close, margins
from vlmqual_conformance.goldens import Golden, goldens
from vlmqual_conformance.references import over
from vlmqual_contract import checkpoint, cli, fixtures
from vlmqual_contract.errors import EXIT_OK, EXIT_USAGE, UsageError
from vlmqual_contract.records import Outcome, Verdict
from vlmqual_contract.target import Info

TINY = Path(fixtures.checkpoint("idefics3-tiny"))


def reference(folder: Path, digest: str, **changes: Any) -> Path:
    """A reference of one prompt: a golden of the fixtures under another name."""
    folder.mkdir()
    shutil.copy(fixtures.file("goldens/idefics3/photo-whole.npz"), folder / "photo.npz")
    record = {
        "format": 1,
        "family": "idefics3",
        "checkpoint": {"path": str(TINY), "digest": digest},
        "maker": {"name": "somebody", "version": "1"},
        "arms": {"float32": ["a"], "bfloat16": ["a"]},
        "prompts": [{"name": "photo", "text": "<image>", "images": [{"file": "a.png", "sha256": ""}]}],
        "paths": {"photo": ["a.png"]},
        "files": {"photo": hashlib.sha256((folder / "photo.npz").read_bytes()).hexdigest()},
    }
    (folder / "reference.json").write_text(json.dumps(record | changes), "utf-8")
    return folder


def test_a_copied_checkpoint_keeps_its_digest_and_a_changed_one_does_not(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(TINY, copy)
    assert checkpoint.digest(copy) == checkpoint.digest(TINY)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(bytes(weights))
    assert checkpoint.digest(copy) != checkpoint.digest(TINY)


def test_a_reference_leads_to_its_checkpoint_and_a_moved_one_has_to_be_the_same(tmp_path: Path) -> None:
    folder = reference(tmp_path / "reference", checkpoint.digest(TINY))
    found = over(None, folder)
    assert found is not None
    assert found.reference is not None
    assert (found.model.family, Path(found.model.path)) == ("idefics3", TINY.resolve())
    assert found.reference.dtypes == ("float32", "bfloat16", "float64")
    golden = found.reference.golden("photo")
    assert np.array_equal(golden.logits[0], golden.array("prefill/logits"))
    assert found.reference.longest == golden.mask.shape[1] + len(golden.tokens)
    with pytest.raises(UsageError, match=r"is not the checkpoint that .* is the reference of"):
        over(Path(fixtures.checkpoint("mllama-tiny")), folder)
    assert over(None, None) is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": 9}, "no reference of format 1"),
        ({"files": None}, "it lacks files"),
        ({"checkpoint": {"path": "gone", "digest": ""}}, "the checkpoint gone of reference .* is gone; --checkpoint"),
    ],
)
def test_a_reference_that_cannot_be_used_is_told(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        over(None, reference(tmp_path / "reference", "", **changes))


def test_an_unfinished_reference_says_how_it_goes_on(tmp_path: Path) -> None:
    folder = reference(tmp_path / "reference", "")
    (folder / "reference.json").unlink()
    with pytest.raises(UsageError, match="no finished reference in it; one is begun"):
        over(None, folder)


def test_a_file_that_was_changed_is_not_judged_by(tmp_path: Path) -> None:
    folder = reference(tmp_path / "reference", checkpoint.digest(TINY))
    (folder / "photo.npz").write_bytes(b"other")
    with pytest.raises(UsageError, match=r"photo.npz was changed since the reference was made"):
        references.read(folder).golden("photo")


def test_every_requirement_over_a_checkpoint_has_a_test_in_every_family() -> None:
    tests = "".join(path.read_text("utf-8") for path in catalogue.CHECKPOINT.suite.glob("test_*.py"))
    numbers = set(re.findall(r'mark\.own\("(\d{3})"\)', tests))
    wanted = {f"{family}-CKPT-{number}" for family in ("IDEFICS", "IDEFICS3", "MLLAMA") for number in numbers}
    assert set(catalogue.requirements(catalogue.CHECKPOINT)) == wanted


def test_the_run_over_the_fixtures_knows_nothing_of_these_requirements() -> None:
    assert not [name for name in catalogue.requirements() if "-CKPT-" in name]


def test_a_dry_run_counts_the_requirements_of_the_checkpoints_family(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["conformance", "--checkpoint", str(TINY), "--dry-run"]) == EXIT_OK
    said = capsys.readouterr().out
    assert "eager: 14 requirements" in said
    assert "libraries" not in said


def test_another_family_than_the_checkpoints_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["conformance", "--checkpoint", str(TINY), "--family", "mllama"]) == EXIT_USAGE
    assert "is a checkpoint of idefics3" in capsys.readouterr().err


def test_without_a_reference_noise_is_the_goldens_and_grows_with_the_root_of_depth(tmp_path: Path) -> None:
    deeper = tmp_path / "deeper"
    shutil.copytree(TINY, deeper)
    values = json.loads((deeper / "config.json").read_text())
    values["text_config"]["num_hidden_layers"] *= 4
    values["text_config"]["max_position_embeddings"] = 512
    (deeper / "config.json").write_text(json.dumps(values))
    one, other = over(TINY, None), over(deeper, None)
    assert one is not None
    assert other is not None
    names = ("prefill/logits", "decode/logits", "chain/logits")
    stored = [
        golden.noise(name, "bfloat16")
        for golden in goldens("idefics3")
        for name in names
        if golden.has(f"noise/bfloat16/{name}")
    ]
    assert noise(one, "bfloat16") == max(stored)
    assert noise(other, "bfloat16") == pytest.approx(2 * max(stored))
    assert (length(one), length(other)) == (4096, 512)


def test_a_row_of_a_batch_keeps_its_padding_and_a_part_ends_where_it_is_told() -> None:
    ids = np.arange(8).reshape(2, 4)
    both = Asked("idefics3", {"input_ids": ids, "attention_mask": ids > 5, "pixel_values": np.ones((2, 1, 3, 2, 2))})
    assert both.row(1).text["input_ids"].tolist() == [[4, 5, 6, 7]]
    assert both.row(1).pixels["pixel_values"].shape == (1, 1, 3, 2, 2)
    assert both.part(3)["input_ids"].tolist() == [[0, 1, 2], [4, 5, 6]]


def test_margins_lie_between_the_two_largest_logits_and_noise_counts_for_both() -> None:
    logits = np.array([[[1.0, 4.0, 2.5]], [[7.0, 7.0, 0.0]], [[0.0, 1.0, 0.25]]])
    assert margins(logits).tolist() == [[1.5], [0.0], [0.75]]
    arrays = {"prefill/logits": logits[0], "decode/logits": logits[1:]}
    arrays |= {f"noise/float32/{name}/largest": np.array(value) for name, value in (("prefill", 0.1), ("decode", 0.2))}
    info = Info("t", "1", "cpu", "none", "float32", frozenset(), ("mllama",))
    limits = close(Golden("mllama", "c", frozenset(arrays), arrays), info)
    assert limits.tolist() == [[0.4], [0.8], [0.8]], "twice the noise, for each of the two logits"


def test_a_run_says_for_each_prompt_where_it_is_close_and_where_it_parts() -> None:
    sides = {"reference": [[0.5], [0.1]], "target": [[0.6], [0.2]], "limits": [[0.1], [0.2]]}
    place = {"step": 1, "token": 3, "reference": 4, "margin": 0.1, "limit": 0.2}
    rows = [
        Verdict(f"test_reference.py::{name}", (), "mllama", "decode", Outcome.PASS, details=details)
        for name, details in (
            ("a[photo]", {"margins": sides}),
            ("b[photo]", {"divergence": place}),
            ("b[text]", {"divergence": None}),
        )
    ]
    assert references.told(rows) == [
        "  photo: smallest margin 0.1 at token 1, the target's 0.2; "
        "parts at token 1, where the margin is 0.1 and 0.2 is noise",
        "  text: the same greedy tokens",
    ]
