"""The suite against targets that are broken: each gets a verdict that says what happened, in time, and no other case
suffers.

The animals of `targets/animals.py` live together: each answers for one golden case of a run, so that every run also
shows that the cases beside them keep their verdicts. One case of each run has no animal and has to pass.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from vlmqual_conformance import sessions
from vlmqual_conformance.sessions import Ended, Session
from vlmqual_conformance.subjects import TargetKeeper
from vlmqual_contract.errors import EXIT_FAILED, EXIT_OK, TargetFailure, TargetHung
from vlmqual_contract.launch import Limits
from vlmqual_contract.records import Outcome, Run, Verdict, read
from vlmqual_contract.target import Model, Options

pytestmark = pytest.mark.usefixtures("copied")
ANIMALS = Path(__file__).with_name("targets") / "animals.py"
LIMIT_S = 2.0
FAIL, ERROR = Outcome.FAIL, Outcome.ERROR

VISION = "test_vision.py::test_image_features_are_within_budget"
PROMPT = "test_prefill.py::test_logits_at_the_end_of_a_prompt"
STEPS = "test_decode.py::test_logits_of_every_forced_step"
LARGEST = "test_decode.py::test_the_greedy_token_has_the_largest_logit"
BESIDE = "test_decode.py::test_sequences_that_live_side_by_side_keep_to_themselves"
ORDER = "test_prefill.py::test_features_in_another_order_stand_at_other_places"


@dataclass(frozen=True)
class Animal:
    """One animal.

    Attributes:
        herd: animals of one herd live in one run.
        name: as `targets/animals.py` calls it.
        test: whose case it spoils.
        case: golden case that it answers for.
        outcome: that it has to get.
        says: what the verdict's sentence has to hold.
    """

    herd: str
    name: str
    test: str
    case: str
    outcome: Outcome
    says: str


HERDS = (
    # what comes back of a prompt
    Animal("numbers", "nan", PROMPT, "consecutive-images", ERROR, "prefill/logits holds NaN in 1 of 600 places"),
    Animal("numbers", "nan-in-one-row", PROMPT, "batch-left", ERROR, "prefill/logits holds NaN in 1 of 1200 places"),
    Animal("numbers", "infinity", PROMPT, "document", ERROR, "prefill/logits holds infinity in 1 of 600 places"),
    Animal("numbers", "few-rows", PROMPT, "batch-right", ERROR, "prefill/logits has shape (1, 600), not (2, 600)"),
    Animal("numbers", "many-rows", PROMPT, "strip", ERROR, "prefill/logits has shape (2, 600), not (1, 600)"),
    Animal("numbers", "transposed", PROMPT, "multi-turn", ERROR, "prefill/logits has shape (600, 1), not (1, 600)"),
    Animal("numbers", "one-axis-more", PROMPT, "photo-tiles", ERROR, "has shape (1, 1, 600), not (1, 600)"),
    Animal("numbers", "integers", PROMPT, "photo-small", ERROR, "prefill/logits is int64, not floating point"),
    Animal("numbers", "complex", PROMPT, "photo-whole", ERROR, "prefill/logits is complex128, not floating point"),
    Animal("numbers", "words", PROMPT, "padding-frames", ERROR, "prefill/logits is <U32, not floating point"),
    Animal("numbers", "half", PROMPT, "masked-pixels", FAIL, "prefill/logits is"),
    Animal("numbers", "rows-exchanged", PROMPT, "text-beside-image", FAIL, "prefill/logits is"),
    Animal("numbers", "all-equal", PROMPT, "two-images", FAIL, "times its budget"),
    # what happens to a prompt
    Animal("deeds", "crash", PROMPT, "batch-left", ERROR, "the target's process ended (signal SIGSEGV)"),
    Animal("deeds", "exit", PROMPT, "batch-right", ERROR, "the target's process ended (exit status 7)"),
    Animal("deeds", "quit", PROMPT, "consecutive-images", ERROR, "process ended (exit status 1): tired of it"),
    Animal("deeds", "hang", PROMPT, "document", ERROR, "no answer to prefill within 2 s"),
    Animal("deeds", "chatter", PROMPT, "masked-pixels", ERROR, "no answer to prefill within 2 s"),
    Animal("deeds", "raise", PROMPT, "multi-turn", FAIL, "raised RuntimeError: out of bananas"),
    Animal("deeds", "memory", PROMPT, "padding-frames", FAIL, "raised MemoryError"),
    Animal(
        "deeds", "garbage", PROMPT, "photo-small", ERROR, "the answer to prefill cannot be read: a message header of"
    ),
    Animal("deeds", "huge", PROMPT, "photo-tiles", ERROR, "arrays of 274877906944 bytes were announced; at most"),
    Animal("deeds", "list", PROMPT, "photo-whole", ERROR, "logits: the target answered list, not a numpy array"),
    Animal("deeds", "nothing", PROMPT, "strip", ERROR, "logits: the target answered NoneType, not a numpy array"),
    Animal("deeds", "wrong-taps", PROMPT, "text-beside-image", ERROR, "text.embeddings has shape (2, 37, 63), not"),
    Animal("deeds", "blind", PROMPT, "two-images", FAIL, "text.embeddings is"),
    # steps after a prompt, and their tokens
    Animal("steps", "later-nan", STEPS, "consecutive-images", ERROR, "decode/logits.02 holds NaN in 1 of 600 places"),
    Animal("steps", "later-few-rows", STEPS, "batch-right", ERROR, "decode/logits.02 has shape (1, 600), not (2, 600)"),
    Animal("steps", "later-crash", STEPS, "masked-pixels", ERROR, "the target's process ended (signal SIGSEGV)"),
    Animal("steps", "later-hang", STEPS, "photo-tiles", ERROR, "no answer to decode within 2 s"),
    Animal("steps", "later-raise", STEPS, "multi-turn", FAIL, "raised RuntimeError: out of bananas"),
    Animal("steps", "twice", STEPS, "strip", FAIL, "decode/logits.01 is"),
    Animal("steps", "float-tokens", STEPS, "padding-frames", ERROR, "tokens are float64 of shape (1,), not int64"),
    Animal("steps", "narrow-tokens", STEPS, "photo-small", ERROR, "tokens are int32 of shape (1,), not int64"),
    Animal("steps", "column-of-tokens", STEPS, "two-images", ERROR, "int64 of shape (1, 1), not int64 of shape (1,)"),
    Animal("steps", "few-tokens", LARGEST, "batch-left", ERROR, "int64 of shape (1,), not int64 of shape (2,)"),
    Animal("steps", "foreign-tokens", LARGEST, "photo-whole", ERROR, "is none of the 600 ids"),
    Animal("steps", "second-best", LARGEST, "text-only", FAIL, "the largest is"),
    # what only two runs tell
    Animal("memory", "headstrong", BESIDE, "text-only", FAIL, "(sequence 1 beside another, at once) is"),
    Animal("memory", "one-cache", BESIDE, "photo-whole", FAIL, "beside another, at once) is"),
    Animal("memory", "stale", ORDER, "two-images", FAIL, "two images are not told apart"),
    # image features
    Animal("features", "half-features", VISION, "photo-small", FAIL, "features/image_hidden_states is"),
    Animal("features", "whole-features", VISION, "photo-tiles", ERROR, "image_hidden_states is int64, not floating"),
    Animal("features", "few-frames", VISION, "two-images", ERROR, "has shape (1, 16, 64), not (2, 16, 64)"),
    Animal("features", "flat-features", VISION, "strip", ERROR, "has shape (48, 64), not (3, 16, 64)"),
    Animal("features", "infinite-features", VISION, "multi-turn", ERROR, "image_hidden_states holds infinity in"),
    Animal("features", "renamed-features", VISION, "photo-whole", ERROR, "last_hidden_state, not image_hidden_states"),
    Animal("features", "crash", VISION, "document", ERROR, "the target's process ended (signal SIGSEGV)"),
    Animal("features", "memory", VISION, "batch-left", FAIL, "raised MemoryError"),
)
#: What is said of tensors that cannot be compared; tokens are none of them.
NO_NUMBERS = (" holds NaN ", " holds infinity ", " has shape ", ", not floating point")
#: The case of each herd's run that no animal answers for: it comes after them and passes.
INNOCENT = {
    "numbers": f"{PROMPT}[text-only]",
    "deeds": f"{PROMPT}[text-only]",
    "steps": f"{STEPS}[text-beside-image]",
    "memory": f"{ORDER}[consecutive-images]",
    "features": f"{VISION}[text-beside-image]",
}
#: Two cases of a run in which one animal answers for all.
BOTH = (f"{PROMPT}[photo-small]", f"{PROMPT}[text-only]")


@dataclass(frozen=True)
class Outing:
    """A run of a few cases.

    Attributes:
        ended: how the session ended.
        run: what is in its results file, None where none was begun.
        seconds: how long it took.
    """

    ended: Ended
    run: Run | None
    seconds: float

    def verdict(self, case: str) -> Verdict:
        """Of a case."""
        assert self.run is not None, f"no results file: {self.ended.said}"
        return next(row for row in self.run.verdicts if row.case == case)


@cache
def outing(target: str, cases: tuple[str, ...]) -> Outing:
    """Judge a class of `targets/animals.py` by these cases."""
    begun = time.monotonic()
    with TemporaryDirectory() as folder:
        session = Session("target", f"{ANIMALS}:{target}", Path(folder), LIMIT_S, families=("idefics3",), cases=cases)
        ended = sessions.run(session, quiet=True)
        return Outing(ended, read(Path(ended.path)) if ended.path else None, time.monotonic() - begun)


def visit(herd: str) -> Outing:
    """The run of a herd."""
    animals = [animal for animal in HERDS if animal.herd == herd]
    names = "+".join(f"{animal.case}~{animal.name}" for animal in animals)
    cases = (*(f"{animal.test}[{animal.case}]" for animal in animals), INNOCENT[herd])
    return outing(f"Zoo:animals={names}", cases)


def everywhere(animal: str) -> Outing:
    """The run of an animal that answers for every case."""
    return outing(f"Zoo:animals=*~{animal}", BOTH)


@pytest.mark.parametrize("animal", HERDS, ids=lambda animal: f"{animal.herd}-{animal.name}")
def test_a_broken_target_gets_a_verdict_that_says_what_it_did(animal: Animal):
    row = visit(animal.herd).verdict(f"{animal.test}[{animal.case}]")
    assert row.outcome is animal.outcome, row.reason
    assert animal.says in row.reason, row.reason
    assert "the test itself failed" not in row.reason, "the suite has to see this coming"
    if "times its budget" in row.reason:
        assert row.details["ratios"][row.component] > 1, "a component is named that kept its budget"
    elif not row.reason.startswith("tokens") and any(words in row.reason for words in NO_NUMBERS):
        assert row.component, "what holds no numbers is named"
        assert row.reason.startswith(f"{row.component} ")
    else:
        assert not row.component, "nothing was compared that left its budget"
    assert row.seconds < LIMIT_S + 3, f"it took {row.seconds} s, the limit for one answer is {LIMIT_S} s"


@pytest.mark.parametrize("herd", INNOCENT)
def test_cases_beside_broken_ones_have_their_verdicts(herd: str):
    found = visit(herd)
    assert found.run is not None
    assert found.run.complete, "the results file has a footer that counts every row"
    assert len(found.run.verdicts) == 1 + sum(animal.herd == herd for animal in HERDS)
    innocent = found.verdict(INNOCENT[herd])
    assert innocent.outcome is Outcome.PASS, innocent.reason
    assert found.ended.exit == EXIT_FAILED
    assert "Traceback" not in found.ended.said


def test_a_target_that_is_slow_or_talks_but_answers_rightly_passes():
    found = outing("Zoo:animals=photo-small~slow+text-only~print", BOTH)
    assert found.run is not None
    assert [row.reason for row in found.run.verdicts] == ["", ""]
    assert found.run.verdicts[0].seconds > 0.5, "the first one was slow"
    assert found.ended.exit == EXIT_OK


@pytest.mark.parametrize(
    ("animal", "outcome", "sentence"),
    [
        ("open-crash", ERROR, "the target's process ended (signal SIGSEGV)"),
        ("open-raise", FAIL, "raised RuntimeError: out of bananas"),
    ],
)
def test_a_target_that_cannot_open_the_model_fails_every_case(animal: str, outcome: Outcome, sentence: str):
    found = everywhere(animal)
    assert found.run is not None
    assert found.run.complete
    assert [(row.outcome, row.reason) for row in found.run.verdicts] == [(outcome, sentence)] * 2
    assert found.ended.exit == EXIT_FAILED


def test_a_target_that_ends_after_its_answer_is_found_out_by_the_next_case():
    found = everywhere("last-breath")
    assert found.run is not None
    assert [row.outcome for row in found.run.verdicts] == [Outcome.PASS, ERROR], "the first answer had arrived"
    assert found.run.verdicts[1].reason == "the target's process ended (exit status 3)"


def test_a_target_that_refuses_what_it_declares_is_not_let_off():
    case = "test_preprocessing.py::test_pixels_of_an_image_file_are_the_references[edge-gray.png]"
    row = outing("Zoo:animals=strip~nan,more=preprocess", (case,)).verdict(case)
    assert row.outcome is ERROR
    assert row.reason == "preprocess is declared, but the target answered: numpy reads no images"


@pytest.mark.parametrize(
    ("target", "sentence"),
    [("Shy", "ValueError: guess"), ("Liar", "TypeError: asdict"), ("Zoo:animals=strip", "ValueError: dictionary")],
)
def test_a_target_that_does_not_say_what_it_is_does_not_come_up(target: str, sentence: str):
    with pytest.raises(TargetFailure, match=f"^{sentence}"):
        TargetKeeper(f"{ANIMALS}:{target}")


def test_a_target_that_hangs_while_it_opens_the_model_is_ended_and_not_tried_a_third_time():
    keeper = TargetKeeper(f"{ANIMALS}:Zoo:animals=*~open-hang", limits=Limits(open_s=0.5))
    raised = []
    try:
        for _ in range(3):
            with pytest.raises(TargetHung, match=r"no answer to open within 0\.5 s") as caught:
                keeper.session(Model("nowhere", "idefics3"), Options())
            raised.append(caught.value)
    finally:
        keeper.stop()
    assert raised[0] is not raised[1], "it may have been an accident"
    assert raised[1] is raised[2], "the third time the remembered failure is raised"
