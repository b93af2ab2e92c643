"""What a checkpoint is asked when its user names no prompts: a few questions about the bundled photographs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vlmqual_contract import fixtures
from vlmqual_contract.target import MARKERS, Prompt

_TURNS: Mapping[str, str] = {
    "idefics": "User:{}<end_of_utterance>\nAssistant:",
    "idefics3": "<|begin_of_text|>User:{}<end_of_utterance>\nAssistant:",
    "mllama": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
}


@dataclass(frozen=True)
class Question:
    """A prompt with a name.

    Attributes:
        name: unique among those of a run.
        prompt: text after the chat template, with markers, and image files.
    """

    name: str
    prompt: Prompt


def turn(family: str, words: str, images: int = 0) -> str:
    """One user's turn as the family's released chat template writes it, images first."""
    return _TURNS[family].format(MARKERS[family] * images + words)


def question(family: str, name: str, words: str, *images: str) -> Question:
    """A question about bundled photographs."""
    files = tuple(str(fixtures.image(file)) for file in images)
    return Question(name, Prompt(turn(family, words, len(files)), files))


def questions(family: str) -> tuple[Question, ...]:
    """The default prompts of a family."""
    return (
        question(family, "photo", "What can we see in this image?", "chelsea.png"),
        question(family, "page", "What is the total of this invoice?", "page-invoice.png"),
        question(family, "two-photos", "What do these two images have in common?", "coffee.png", "rocket.png"),
        question(family, "text", "Name three rivers and the countries that they run through."),
    )
