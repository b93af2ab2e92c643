from __future__ import annotations

from pathlib import Path

import pytest

from vlmqual_contract import cli
from vlmqual_contract.discovery import code_digest, make_library, make_target, parse
from vlmqual_contract.errors import EXIT_OK, EXIT_USAGE, UsageError

TOY = Path(__file__).with_name("toy_target.py")


def test_a_target_string_is_taken_apart():
    assert parse("eager:device=cuda,dtype=bfloat16").options == {"device": "cuda", "dtype": "bfloat16"}
    assert parse("rbln:npu=RBLN-CA25").kind == "rbln"
    spec = parse("some/dir/my.py:Mine:a=1")
    assert (spec.file, spec.name, dict(spec.options)) == ("some/dir/my.py", "Mine", {"a": "1"})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("nothing-like-it", "installed are .*eager"),
        ("", "no kind"),
        ("eager:device", "no key=value"),
        ("eager:device=cpu,device=cpu", "given twice"),
        (f"{TOY}:Toy:wrong=1", "it knows bad, ranks"),
        (f"{TOY}:Missing", "its classes are .*Toy"),
        ("missing/file.py:Toy", "does not exist"),
    ],
)
def test_a_wrong_target_string_is_answered_with_what_would_be_valid(text, sentence):
    with pytest.raises(UsageError, match=sentence):
        make_target(text)


def test_a_broken_adapter_file_is_named_with_its_error(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("import no_such_module\n")
    with pytest.raises(UsageError, match=r"broken\.py: ModuleNotFoundError"):
        make_target(f"{path}:Any")


def test_an_unknown_library_lists_the_installed_ones():
    with pytest.raises(UsageError, match="transformers"):
        make_library("no-such-library")


def test_options_of_a_library_reach_it_and_an_unknown_one_lists_those_that_it_knows(tmp_path, monkeypatch):
    (tmp_path / "optional_library.py").write_text(
        "class Optional:\n    def __init__(self, emulate='0'):\n        self.name = 'emulate is ' + emulate\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    origins = {"optional": "optional_library:Optional"}
    assert make_library("optional", origins).name == "emulate is 0"
    assert make_library("optional:emulate=1", origins).name == "emulate is 1"
    with pytest.raises(UsageError, match=r"library 'optional:npu=1': .*'npu'; it knows emulate"):
        make_library("optional:npu=1", origins)
    with pytest.raises(UsageError, match="library 'no-such:emulate=1' is not installed"):
        make_library("no-such:emulate=1", origins)


def test_every_subcommand_is_listed_and_explains_itself(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == EXIT_OK
    text = capsys.readouterr().out
    for name in ("conformance", "perf", "report", "generate", "targets", "check-target"):
        assert name in text, f"the help of vlmqual does not list {name}"
        with pytest.raises(SystemExit) as stop:
            cli.main([name, "--help"])
        assert stop.value.code == EXIT_OK
        assert "usage: vlmqual" in capsys.readouterr().out


def test_an_unknown_subcommand_and_a_missing_one_are_bad_usage(capsys):
    for arguments in (["no-such-command"], []):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == EXIT_USAGE
        assert "usage: vlmqual" in capsys.readouterr().err


def test_a_users_mistake_is_one_sentence_and_no_traceback(capsys):
    assert cli.main(["check-target", "no-such-target"]) == EXIT_USAGE
    error = capsys.readouterr().err
    assert "no-such-target" in error
    assert "Traceback" not in error


def test_targets_lists_kinds_with_their_options(capsys):
    assert cli.main(["targets"]) == EXIT_OK
    text = capsys.readouterr().out
    assert "eager" in text
    assert "dtype" in text
    assert "forced-tokens" in text


def test_another_text_of_an_adapter_is_another_code(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("A = 1\n")
    before = code_digest(f"{path}:A")
    path.write_text("A = 2\n")
    assert code_digest(f"{path}:A:x=1") != before
    assert code_digest("eager") == code_digest("eager:dtype=bfloat16") != code_digest("transformers") != ""
    assert code_digest("not-installed") == ""
