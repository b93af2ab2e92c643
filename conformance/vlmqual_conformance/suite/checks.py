"""What the numeric tests of all families check alike: each function is one test of one golden case."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vlmqual_conformance.goldens import Golden
from vlmqual_conformance.policy import EXACT, BadAnswer, Judge, checked
from vlmqual_conformance.subjects import TargetKeeper, demand
from vlmqual_conformance.suite import runs
from vlmqual_contract import fixtures
from vlmqual_contract.distance import length
from vlmqual_contract.remote import RemoteFeatures, RemoteSession
from vlmqual_contract.target import Array, Capability, FloatArray, Info, Inputs, Model, Prompt

Taps = Callable[[], Mapping[str, Array]]


def with_settings(model: Model, folder: Path, name: str, settings: Mapping[str, Any]) -> Model:
    """A checkpoint with other values in one JSON file of its folder; every other file is a link.

    Args:
        model: the checkpoint.
        folder: where the other one is made, unless it is there already.
        name: of the file.
        settings: replaces the values of these keys; a mapping replaces those of its own keys.
    """
    if not folder.is_dir():
        folder.mkdir()
        for file in Path(model.path).iterdir():
            if file.name != name:
                (folder / file.name).symlink_to(file)
        values = json.loads((Path(model.path) / name).read_text("utf-8"))
        (folder / name).write_text(json.dumps(_merged(values, settings)), "utf-8")
    return replace(model, path=str(folder))


def _merged(values: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    inner = {name: _merged(values[name], each) for name, each in settings.items() if isinstance(each, Mapping)}
    return {**values, **settings, **inner}


# preprocessing --------------------------------------------------------------------------------------------------------


def tensor_of(made: Inputs, name: str) -> Array:
    """One tensor of what preprocessing made.

    Raises:
        BadAnswer: there is none of this name.
    """
    if name not in made:
        raise BadAnswer(f"preprocess gave no {name}; it gave {', '.join(made) or 'nothing'}")
    return made[name]


def same_pixels(made: Inputs, name: str, entry: Mapping[str, Any], tensors: Mapping[str, type[Any]]) -> None:
    """Assert that tensors made of an image file are the reference's, byte by byte.

    Args:
        made: what preprocessing made.
        name: of the image.
        entry: of `pixels.json`, with shape, digest and samples of every tensor.
        tensors: names to the types that they have to have.
    """
    for tensor, dtype in tensors.items():
        array, gold = tensor_of(made, tensor), entry[tensor]
        assert list(array.shape) == gold["shape"], (
            f"{tensor} of {name} has shape {list(array.shape)}, not {gold['shape']}"
        )
        assert array.dtype == dtype, f"{tensor} of {name} is {array.dtype}, not {np.dtype(dtype)}"
        if hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest() == gold["sha256"]:
            continue
        values = array.reshape(-1)[gold["sample"]["index"]].astype(np.float64)
        away = np.abs(values - np.array(gold["sample"]["value"], dtype=np.float64))
        raise AssertionError(
            f"{tensor} of {name} is not the reference's: {int((away > 0).sum())} of {away.size} sampled values differ, "
            f"by up to {away.max():.3g}"
        )


def prompts_of(entry: Mapping[str, Any]) -> list[Prompt]:
    """The rows of an entry of `prompts.json`."""
    return [Prompt(row["text"], tuple(str(fixtures.image(name)) for name in row["images"])) for row in entry["rows"]]


def batch_needs(entry: Mapping[str, Any]) -> set[Capability]:
    """Capabilities that a target needs to be given the rows of an entry of `prompts.json` at once."""
    return {Capability.BATCH, Capability.PADDING} if len(entry["rows"]) > 1 else set()


def same_ids(made: Inputs, entry: Mapping[str, Any], tensors: Sequence[str]) -> None:
    """Assert that integer tensors made of prompts are the reference's, of which `prompts.json` has every value."""
    for tensor in tensors:
        array, gold = tensor_of(made, tensor), np.array(entry[tensor], dtype=np.int64)
        assert array.shape == gold.shape, f"{tensor} has shape {array.shape}, not {gold.shape}"
        assert array.dtype == np.int64, f"{tensor} is {array.dtype}, not int64"
        if not np.array_equal(array, gold):
            row, column, *rest = (int(axis[0]) for axis in np.nonzero(array != gold))
            place = (row, column, *rest)
            raise AssertionError(
                f"{tensor} differs in {int((array != gold).sum())} places, first in row {row} at "
                f"{', '.join(map(str, place[1:]))}: {array[place]}, not {gold[place]}"
            )


# vision ---------------------------------------------------------------------------------------------------------------


def compare_taps(judge: Judge, info: Info, case: Golden, prefix: str, read: Taps, mask: Array | None = None) -> None:
    """Compare every hidden state that both the golden, below `prefix`, and the target have."""
    stored = case.components(prefix)
    if Capability.TAPS not in info.capabilities or not stored:
        return
    taps = read()
    if not (shared := [name for name in stored if name in taps]):
        raise BadAnswer(f"taps are declared, but none is called {', '.join(stored)}")
    for name in shared:
        tensor = f"{prefix}/{name}"
        judge.compare(name, taps[name], case.array(tensor), case.noise(tensor, info.dtype), mask)


def hidden(case: Golden, seen: RemoteFeatures) -> FloatArray:
    """The image features under the name that the case's family gives them.

    Raises:
        BadAnswer: there are none of this name.
    """
    name, arrays = case.hidden.removeprefix("features/"), seen.arrays()
    if name not in arrays:
        raise BadAnswer(f"features have {', '.join(arrays) or 'nothing'}, not {name}")
    return arrays[name]


def hidden_like_gold(case: Golden, seen: RemoteFeatures) -> FloatArray:
    """The image features in gold's shape, so that parts of them can be compared.

    Raises:
        BadAnswer: another shape.
    """
    found, gold = hidden(case, seen), case.array(case.hidden)
    if found.shape != gold.shape:
        raise BadAnswer(f"{case.hidden} has shape {found.shape}, not {gold.shape}", case.hidden)
    return found


def features_within_budget(session: RemoteSession, info: Info, judge: Judge, case: Golden) -> None:
    """Image features and the hidden states on the way to them, from golden pixels."""
    demand(info, case.pixel_needs() | ({Capability.BATCH} if case.rows > 1 else set()))
    seen = session.vision(case.pixels)
    compare_taps(judge, info, case, "taps/vision", seen.taps)
    judge.compare(case.hidden, hidden(case, seen), case.array(case.hidden), case.noise(case.hidden, info.dtype))
    judge.verdict()


# prefill --------------------------------------------------------------------------------------------------------------


def logits_at_the_end(session: RemoteSession, info: Info, judge: Judge, case: Golden) -> None:
    """Logits of the prompt's end and the hidden states on the way to them, with gold features."""
    demand(info, case.needs())
    step = session.prefill(case.text, case.features)
    compare_taps(judge, info, case, "taps/prefill", step.taps, case.mask)
    judge.compare(
        "prefill/logits", step.logits(), case.array("prefill/logits"), case.noise("prefill/logits", info.dtype)
    )
    judge.verdict()


def logits_at_every_position(session: RemoteSession, info: Info, judge: Judge, case: Golden) -> None:
    """Logits of every real position, with gold features."""
    demand(info, case.needs())
    step = session.prefill(case.text, case.features)
    tensor = "prefill/all_logits"
    judge.compare(tensor, step.logits(True), case.array(tensor), case.noise(tensor, info.dtype), case.mask)
    judge.verdict()


def logits_from_pixels(session: RemoteSession, info: Info, judge: Judge, case: Golden) -> None:
    """Logits of the prompt's end, with the target's own features of golden pixels."""
    demand(info, case.needs(injected=False))
    step = session.prefill({**case.text, **case.pixels})
    judge.compare("prefill/logits", step.logits(), case.array("prefill/logits"), case.noise("chain/logits", info.dtype))
    judge.verdict()


def told_apart(judge: Judge, label: str, one: Array, other: Array, noise: float, otherwise: str) -> None:
    """Assert that two answers differ by more than their budgets.

    Args:
        judge: measures the difference; it is what is wanted, so it is not kept as headroom.
        label: says which two.
        one: logits or features of one run.
        other: those of the other.
        noise: of each of them.
        otherwise: what is true of a target whose answers are the same.
    """
    judge.same(label, one, other, (noise, noise))
    ratio = judge.findings.pop().ratio
    assert ratio > 1, f"{label}: they differ by {ratio:.2g} of the budget only: {otherwise}"


def earlier_positions_keep(session: RemoteSession, info: Info, judge: Judge, case: Golden, last: int = 5) -> None:
    """Logits before the `last` tokens of the only row, after those tokens were changed."""
    demand(info, case.needs())
    ids = case.text["input_ids"].copy()
    ids[:, -last:] = (ids[:, -last:] + 7) % runs.PLAIN
    before = ids.shape[1] - last
    tensor = "prefill/all_logits"
    seen = session.prefill({**case.text, "input_ids": ids}, case.features).logits(True)
    gold = case.array(tensor)
    if seen.shape != gold.shape:
        raise BadAnswer(f"{tensor} has shape {seen.shape}, not {gold.shape}", tensor)
    judge.compare(tensor, seen[:, :before], gold[:, :before], case.noise(tensor, info.dtype))
    judge.verdict()


# decode ---------------------------------------------------------------------------------------------------------------


def every_forced_step(keeper: TargetKeeper, session: RemoteSession, info: Info, judge: Judge, case: Golden) -> None:
    """Logits of the prompt's end and of every step under gold's tokens."""
    demand(info, case.needs())
    runs.compare_steps(judge, runs.forced_run(keeper, session, case), case, info)
    judge.verdict()


def hidden_states_of_forced_steps(session: RemoteSession, info: Info, judge: Judge, case: Golden) -> None:
    """Hidden states of those steps under gold's tokens of which the golden has them, step by step in data order."""
    demand(info, case.needs() | {Capability.FORCED_TOKENS})
    tapped = case.array("decode/tapped").tolist()
    step = session.prefill(case.text, case.features)
    for index, tokens in enumerate(case.tokens, 1):
        step = session.decode(step, np.ascontiguousarray(tokens))
        if index not in tapped:
            continue
        taps = step.taps()
        for name in case.components("taps/decode"):
            tensor = f"taps/decode/{name}"
            gold, scale = case.array(tensor), length(case.array(tensor))
            if name in taps:
                own, right = taps[name], gold[tapped.index(index), :, None]
                judge.compare(f"decode.{index:02}/{name}", own, right, case.noise(tensor, info.dtype), scale=scale)
    if not judge.findings:
        raise BadAnswer(f"taps are declared, but steps have none of {', '.join(case.components('taps/decode'))}")
    judge.verdict()


def tokens_of_forced_steps(keeper: TargetKeeper, session: RemoteSession, info: Info, case: Golden) -> None:
    """The target's own greedy tokens of the prompt's end and of every forced step."""
    demand(info, case.needs())
    runs.exact_only(info)
    run = runs.forced_run(keeper, session, case)
    checked("decode/logits", run.logits, case.logits.shape)
    runs.same_tokens(run.tokens[:-1], case, info)


def greedy_is_largest(session: RemoteSession, info: Info, case: Golden) -> None:
    """Greedy tokens against the logits that they are taken from, for the prompt's end and three steps."""
    demand(info, case.needs())
    step = session.prefill(case.text, case.features)
    for index in range(4):
        logits = checked("logits", step.logits(), case.logits.shape[1:])
        for row, token in enumerate(runs.tokens_of(step, case.rows)):
            if not 0 <= token < logits.shape[1]:
                raise BadAnswer(f"step {index}, row {row}: token {token} is none of the {logits.shape[1]} ids")
            best = logits[row].max()
            assert logits[row, token] == best, (
                f"step {index}, row {row}: token {token} has logit {logits[row, token]:.6g}, the largest is {best:.6g}"
            )
        step = session.decode(step)


def side_by_side(
    session: RemoteSession, info: Info, judge: Judge, case: Golden, pictures: Sequence[Mapping[str, Array] | None]
) -> None:
    """Sequences that are decoded in turn, each against a prefill of its own longer prompt; one row, no padding.

    Args:
        session: of the tiny checkpoint.
        info: what the target says of itself.
        judge: collects the comparisons.
        case: whose text all sequences begin with; gold's tokens are forced on the first.
        pictures: image features of every sequence.
    """
    demand(info, case.needs() | {Capability.FORCED_TOKENS})
    count = min(4, len(case.tokens))
    forced = [
        (case.tokens[:count] + 3 * index) % runs.PLAIN if index else case.tokens[:count]
        for index in range(len(pictures))
    ]
    steps = [session.prefill(case.text, features) for features in pictures]
    for given in zip(*forced, strict=True):
        steps = [session.decode(step, np.ascontiguousarray(own)) for step, own in zip(steps, given, strict=True)]
    made = [step.logits() for step in steps]
    noises = (case.noise("decode/logits", info.dtype), case.noise("prefill/logits", info.dtype))
    for index, features in enumerate(pictures):
        at_once = session.prefill(runs.continued_text(case, forced[index]), features).logits()
        label = f"decode/logits.{count:02} (sequence {index} beside another, at once)"
        judge.same(label, made[index], at_once, noises)
    judge.verdict()


# masks ----------------------------------------------------------------------------------------------------------------


def same_as_alone(session: RemoteSession, info: Info, judge: Judge, case: Golden, row: int, label: str) -> None:
    """A row of a batch against the row on its own."""
    demand(info, case.needs())
    tokens = case.tokens[: runs.steps_of(info)]
    batch = runs.forced(session, case.text, case.features, tokens).logits[:, row : row + 1]
    single = runs.forced(session, runs.alone(case, row), runs.features_of(case, row), tokens[:, row : row + 1]).logits
    noise = runs.steps_noise(case, info)
    runs.same_steps(judge, f"{label}, alone", batch, single, (noise, noise))
    judge.verdict()


def padded_row(case: Golden) -> int:
    """The row with most padding."""
    return int(np.argmin((case.mask != 0).sum(axis=1)))


def both_sides_agree(session: RemoteSession, info: Info, judge: Judge, left: Golden, right: Golden) -> None:
    """The same rows padded on the left and on the right."""
    demand(info, left.needs())
    made = [
        runs.forced(session, case.text, case.features, case.tokens[: runs.steps_of(info)]).logits
        for case in (left, right)
    ]
    noises = [runs.steps_noise(case, info) for case in (left, right)]
    runs.same_steps(judge, "padded left, right", made[0], made[1], noises)
    judge.verdict()


def more_padding(session: RemoteSession, info: Info, judge: Judge, case: Golden, side: str) -> None:
    """Seven positions of padding more than the case has."""
    demand(info, case.needs() | {Capability.PADDING})
    run = runs.forced(session, runs.padded_text(case, side, 7), case.features, case.tokens[: runs.steps_of(info)])
    runs.compare_steps(judge, run, case, info)
    judge.verdict()


def other_ids_under_padding(session: RemoteSession, info: Info, judge: Judge, case: Golden) -> None:
    """Random ids where attention_mask is 0."""
    demand(info, case.needs())
    other = np.random.default_rng(11).integers(1, runs.PLAIN, case.mask.shape)
    ids = np.where(case.mask != 0, case.text["input_ids"], other)
    tokens = case.tokens[: runs.steps_of(info)]
    run = runs.forced(session, {**case.text, "input_ids": ids}, case.features, tokens)
    runs.compare_steps(judge, run, case, info)
    judge.verdict()


def other_rows_do_not_matter(
    session: RemoteSession, info: Info, judge: Judge, case: Golden, row: int, features: Mapping[str, Array] | None
) -> None:
    """Gold of the other rows, after text, images and forced tokens of one row were changed.

    Args:
        session: of the tiny checkpoint.
        info: what the target says of itself.
        judge: collects the comparisons.
        case: with at least two rows.
        row: whose text and forced tokens are changed here.
        features: the case's features with other images in that row.
    """
    demand(info, case.needs())
    ids = case.text["input_ids"].copy()
    plain = (case.mask[row] != 0) & (ids[row] < runs.PLAIN)
    ids[row, plain] = (ids[row, plain] + 5) % runs.PLAIN
    tokens = case.tokens[: runs.steps_of(info)].copy()
    tokens[:, row] = (tokens[:, row] + 3) % runs.PLAIN
    run = runs.forced(session, {**case.text, "input_ids": ids}, features, tokens)
    kept = [index for index in range(case.rows) if index != row]
    gold = case.logits[: len(run.logits)]
    noise = runs.steps_noise(case, info)
    runs.same_steps(judge, "other rows changed", run.logits[:, kept], gold[:, kept], (noise, 0.0))
    judge.verdict()


# generation -----------------------------------------------------------------------------------------------------------


def greedy_tokens(session: RemoteSession, info: Info, case: Golden) -> None:
    """Greedy tokens fed back."""
    demand(info, case.needs())
    runs.exact_only(info)
    own = runs.free(session, case.text, case.features, len(case.tokens))
    runs.same_tokens(own, case, info)


def by_step_and_at_once(keeper: TargetKeeper, session: RemoteSession, info: Info, judge: Judge, case: Golden) -> None:
    """Decode steps against a prefill of the longer prompt, after one step and after all; one row, no padding."""
    demand(info, case.needs())
    by_step = runs.forced_run(keeper, session, case).logits
    noises = (case.noise("decode/logits", info.dtype), case.noise("prefill/logits", info.dtype))
    for count in (1, len(case.tokens)):
        at_once = session.prefill(runs.longer_text(case, count), case.features).logits()
        judge.same(f"decode/logits.{count:02} (by step, at once)", by_step[count], at_once, noises)
    judge.verdict()


def batch_and_rows(keeper: TargetKeeper, session: RemoteSession, info: Info, judge: Judge, case: Golden) -> None:
    """Every row of a batch against the row on its own, over all steps."""
    demand(info, case.needs() | {Capability.FORCED_TOKENS})
    batch = runs.forced_run(keeper, session, case)
    noise = runs.steps_noise(case, info)
    for row in range(case.rows):
        own = case.tokens[:, row : row + 1]
        single = runs.forced(session, runs.alone(case, row), runs.features_of(case, row), own)
        runs.same_steps(
            judge, f"row {row} in the batch, alone", batch.logits[:, row : row + 1], single.logits, (noise, noise)
        )
    judge.verdict()


def another_image(
    session: RemoteSession, info: Info, judge: Judge, case: Golden, pictures: Sequence[Mapping[str, Array]]
) -> None:
    """The case's prompt with the pixels of one picture and of another."""
    demand(info, case.needs(injected=False))
    one, other = (session.prefill({**case.text, **pixels}).logits() for pixels in pictures)
    noise = case.noise("chain/logits", info.dtype)
    told_apart(judge, "prefill/logits (another image)", one, other, noise, "the target is blind to its image")


def repeats(session: RemoteSession, info: Info, judge: Judge, case: Golden, between: Golden) -> None:
    """A run, another run, and the first again."""
    demand(info, case.needs())
    is_forced = Capability.FORCED_TOKENS in info.capabilities
    tokens = case.tokens[:4] if is_forced else [None] * 4
    first = runs.forced(session, case.text, case.features, tokens).logits
    runs.forced(session, between.text, between.features, [None] * 8)
    again = runs.forced(session, case.text, case.features, tokens).logits
    noise = runs.steps_noise(case, info)
    runs.same_steps(judge, "first, again", again, first, (noise, noise))
    judge.verdict()


# parallel -------------------------------------------------------------------------------------------------------------


def features_over_ranks(session: RemoteSession, ranks: RemoteSession, info: Info, judge: Judge, case: Golden) -> None:
    """Image features of two ranks and of one."""
    demand(info, case.needs() | case.pixel_needs())
    one, two = (hidden(case, each.vision(case.pixels)) for each in (session, ranks))
    noise = case.noise(case.hidden, info.dtype)
    judge.same(f"{case.hidden} (two ranks, one)", two, one, (noise, noise))
    judge.verdict()


def prompt_over_ranks(session: RemoteSession, ranks: RemoteSession, info: Info, judge: Judge, case: Golden) -> None:
    """Logits of the prompt's end on two ranks and on one."""
    demand(info, case.needs())
    one, two = (each.prefill(case.text, case.features).logits() for each in (session, ranks))
    noise = case.noise("prefill/logits", info.dtype)
    judge.same("prefill/logits (two ranks, one)", two, one, (noise, noise))
    judge.verdict()


def steps_over_ranks(
    keeper: TargetKeeper, session: RemoteSession, ranks: RemoteSession, info: Info, judge: Judge, case: Golden
) -> None:
    """Logits and, where they can be demanded, tokens of every forced step on two ranks and on one."""
    demand(info, case.needs() | {Capability.FORCED_TOKENS})
    one = runs.forced_run(keeper, session, case)
    two = runs.forced(ranks, case.text, case.features, case.tokens)
    noise = runs.steps_noise(case, info)
    runs.same_steps(judge, "two ranks, one", two.logits, one.logits, (noise, noise))
    judge.verdict()
    if info.dtype in EXACT:
        runs.same_tokens(two.tokens[:-1], case, info)
