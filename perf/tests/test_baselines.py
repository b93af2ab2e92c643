from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest

from vlmqual_contract import cli
from vlmqual_contract.errors import EXIT_OK, EXIT_USAGE, UsageError
from vlmqual_perf import baselines
from vlmqual_perf.baselines import Baseline
from vlmqual_perf.gate_launches import Launch, Reading

LAUNCH = Launch("A", 1, 0, 0, "2026-01-01T00:00:00+00:00", 1.5, {"a/decode/tp1": Reading("valid", "", ((0.1, 0.2),))})
GIVEN = Baseline("eager", {"dtype": "float32"}, {"host": "here"}, "1", "f" * 64, {"cells": ["a"]}, (LAUNCH,))


@pytest.fixture
def key(tmp_path):
    baselines.generate(tmp_path / "key")
    return tmp_path / "key"


def public(key):
    return key.with_name(f"{key.name}.pub")


def test_a_baseline_is_read_as_it_was_saved(tmp_path):
    made = baselines.save(tmp_path / "b.json", GIVEN)
    found = baselines.read(tmp_path / "b.json")
    assert found == made
    assert replace(found, digest="", made="") == replace(GIVEN, digest="", made="")
    assert (found.version, found.previous, found.signer) == (1, "", "")


def test_a_new_version_names_the_digest_of_the_one_before_which_is_kept(tmp_path):
    path = tmp_path / "b.json"
    first = baselines.save(path, GIVEN)
    second = baselines.save(path, replace(GIVEN, subject="eager:dtype=bfloat16"))
    third = baselines.save(path, GIVEN)
    assert [one.version for one in (first, second, third)] == [1, 2, 3]
    assert (second.previous, third.previous) == (first.digest, second.digest)
    assert baselines.read(tmp_path / "b.v1.json") == first
    assert baselines.read(tmp_path / "b.v2.json") == second


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["launches"][0]["cells"]["a/decode/tp1"].update(values_s=[[0.1, 0.3]]),
        lambda d: d.update(version=7),
        lambda d: d["machine"].update(host="there"),
        lambda d: d.update(more="a key"),
        lambda d: d.pop("previous"),
        lambda d: d.pop("digest"),
    ],
)
def test_whatever_is_altered_is_noticed_without_any_key(tmp_path, change):
    path = tmp_path / "b.json"
    baselines.save(path, GIVEN)
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(UsageError, match="was altered"):
        baselines.read(path)
    with pytest.raises(UsageError, match="was altered"):
        baselines.save(path, GIVEN)


def test_the_digest_is_that_of_the_sorted_content_without_blanks(tmp_path):
    path = tmp_path / "b.json"
    digest = baselines.save(path, GIVEN).digest
    document = json.loads(path.read_text())
    del document["digest"]
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    assert digest == hashlib.sha256(text.encode()).hexdigest()


def test_a_signed_baseline_is_trusted_by_its_signers_key_only(tmp_path, key):
    path = tmp_path / "b.json"
    made = baselines.save(path, GIVEN, key)
    assert baselines.read(path, public(key)).signer == made.signer != ""
    baselines.generate(tmp_path / "other")
    with pytest.raises(UsageError, match="is not signed by --trust"):
        baselines.read(path, tmp_path / "other.pub")


def test_an_unsigned_baseline_is_refused_where_a_signature_is_asked_for(tmp_path, key):
    baselines.save(tmp_path / "b.json", GIVEN)
    with pytest.raises(UsageError, match="is not signed, and --trust"):
        baselines.read(tmp_path / "b.json", public(key))


def test_a_forged_content_with_a_right_digest_does_not_have_the_signature(tmp_path, key):
    path = tmp_path / "b.json"
    baselines.save(path, GIVEN, key)
    document = json.loads(path.read_text())
    signature = document.pop("signature")
    document.pop("digest")
    document["subject"] = "eager:dtype=bfloat16"
    path.write_text(json.dumps({**document, "digest": baselines._digest(document), "signature": signature}))
    assert baselines.read(path).subject == "eager:dtype=bfloat16", "without --trust only the digest speaks"
    with pytest.raises(UsageError, match="is not signed by --trust"):
        baselines.read(path, public(key))


@pytest.mark.parametrize(
    "signature", [{}, "text", {"algorithm": "ed25519", "public_key": "00", "value": "no base64!"}, {"algorithm": "rsa"}]
)
def test_a_damaged_signature_is_one_sentence(tmp_path, signature):
    path = tmp_path / "b.json"
    baselines.save(path, GIVEN)
    path.write_text(json.dumps({**json.loads(path.read_text()), "signature": signature}))
    with pytest.raises(UsageError, match="its signature is damaged"):
        baselines.read(path)


def test_keys_are_for_their_owner_and_are_never_overwritten(key):
    assert key.stat().st_mode & 0o077 == 0
    before = key.read_bytes()
    with pytest.raises(UsageError, match="never overwritten"):
        baselines.generate(key)
    assert key.read_bytes() == before


@pytest.mark.parametrize(("text", "sentence"), [("{}", "no baseline"), ("[", "not JSON"), ("[]", "no baseline")])
def test_what_is_no_baseline_is_said_to_be_none(tmp_path, text, sentence):
    (tmp_path / "b.json").write_text(text)
    with pytest.raises(UsageError, match=sentence):
        baselines.read(tmp_path / "b.json")


def test_what_is_no_key_is_said_to_be_none(tmp_path, key):
    path = tmp_path / "b.json"
    for wrong in (public(key), tmp_path / "nowhere", path):
        with pytest.raises(UsageError, match="key"):
            baselines.save(path, GIVEN, wrong)
    assert not path.exists(), "a file that should have been signed is not written unsigned"
    baselines.save(path, GIVEN, key)
    for wrong in (key, tmp_path / "nowhere", path):
        with pytest.raises(UsageError, match="--trust"):
            baselines.read(path, wrong)


def test_the_command_makes_keys_shows_and_verifies(tmp_path, capsys):
    key, path = tmp_path / "release", tmp_path / "b.json"
    assert cli.main(["baseline", "keygen", str(key)]) == EXIT_OK
    made = baselines.save(path, GIVEN, key)
    capsys.readouterr()
    assert cli.main(["baseline", "show", str(path)]) == EXIT_OK
    text = capsys.readouterr().out
    assert made.digest in text
    assert "1 launches of eager" in text
    assert "not checked" in text
    assert cli.main(["baseline", "verify", str(path), "--trust", str(public(key))]) == EXIT_OK
    assert "signed by" in capsys.readouterr().out
    baselines.save(path, GIVEN)
    assert cli.main(["baseline", "verify", str(path), "--trust", str(public(key))]) == EXIT_USAGE
