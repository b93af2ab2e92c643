"""The recipe of the fixture tokenizer: byte-level BPE with the special tokens of the released Idefics3 processor.

Everything is computed with integers and strings from the text below, so every machine makes the same `tokenizer.json`.
Layout of ids: 256 bytes, then merges in the order in which they were learnt, then special tokens.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

MERGES = 320
BOS = "<|begin_of_text|>"
EOS = "<|end_of_text|>"
PAD = "<|reserved_special_token_0|>"
FAKE = "<fake_token_around_image>"
IMAGE = "<image>"
END_OF_UTTERANCE = "<end_of_utterance>"
#: In the order of the released tokenizer: the base model's tokens, then the three that the processor adds.
SPECIAL = (BOS, EOS, PAD, *(f"<|reserved_special_token_{i}|>" for i in range(1, 18)), "<|eot_id|>", FAKE, IMAGE,
           END_OF_UTTERANCE)  # fmt: skip
VOCABULARY = 256 + MERGES + len(SPECIAL)

_TEXT = """
User: What can we see in this image? Assistant: The image shows a city by the water, with a bridge and many lights.
User: Describe the picture. Assistant: A person in an orange suit stands before a flag and smiles at the camera.
User: What is the total of this invoice? Assistant: The total amount is 1280.50 and it is due on the last day of May.
User: Read the table and tell me which row has the largest value. Assistant: The third row, with a value of 48 percent.
User: How many animals are there? Assistant: There is one cat; it looks to the left, and its eyes are green.
User: Is there a cup on the table? Assistant: Yes, a white cup of coffee stands on a saucer beside a spoon.
User: Compare the first image with the second image. Assistant: The first is a photograph, the second is a document page.
In this image we find a rocket that leaves the ground at night, and behind it the sky and some clouds of smoke.
The page has a title, two columns of text, a small table and a line at the bottom with the date and the page number.
Image and text are put together: every tile of the image gives a fixed number of tokens, and the text follows them.
The report says that revenue grew in the second quarter, that costs fell, and that nothing else has changed since then.
Where was this photograph taken? What time of the day is it? What does the sign say? Which colour has the roof?
Please answer with one word. Please write a short caption. Please list all names and numbers that you can read here.
<row_1_col_1> <row_1_col_2> <row_1_col_3> <row_1_col_4> <row_2_col_1> <row_2_col_2> <row_2_col_3> <row_2_col_4>
<row_3_col_1> <row_3_col_2> <row_3_col_3> <row_3_col_4> <row_4_col_1> <row_4_col_2> <row_4_col_3> <row_4_col_4>
<global-img> <global-img> <global-img> <global-img>
"""  # noqa: E501  # a corpus: its lines are data
# What the library's byte-level pre-tokenizer keeps together: a word, a number or other signs, with a space before.
_PIECE = re.compile(r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")


def byte_signs() -> list[str]:
    """The printable sign that stands for each byte value in a byte-level vocabulary.

    Bytes that print keep their own sign; the others take the code points from 256 on, in order.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def learn(text: str = _TEXT, count: int = MERGES) -> list[tuple[str, str]]:
    """Learn `count` merges: the most frequent neighbours first, ties by their signs.

    Raises:
        ValueError: the text has too few different pieces for so many merges.
    """
    signs = byte_signs()
    pieces = Counter(_PIECE.findall(text))
    words = {tuple(signs[byte] for byte in piece.encode()): number for piece, number in pieces.items()}
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, number in words.items():
            for pair in pairwise(word):
                pairs[pair] += number
        if not pairs:
            raise ValueError(f"the text gives only {len(merges)} merges, {count} are wanted")
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        merged: dict[tuple[str, ...], int] = {}
        for word, number in words.items():
            joined = _join(word, best)
            merged[joined] = merged.get(joined, 0) + number
        words = merged
    return merges


def _join(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    parts: list[str] = []
    for sign in word:
        # A sign that was itself just made by this merge can not be the left half: pair[0] is always shorter.
        if parts and (parts[-1], sign) == pair:
            parts[-1] += sign
        else:
            parts.append(sign)
    return tuple(parts)


def token_ids() -> dict[str, int]:
    """Special tokens to their ids."""
    return {token: 256 + MERGES + index for index, token in enumerate(SPECIAL)}


def tokenizer_json() -> dict[str, Any]:
    """Content of `tokenizer.json`: byte-level BPE, and a post-processor that puts the beginning-of-text token first."""
    return byte_level(token_ids(), BOS)


def byte_level(special: Mapping[str, int], first: str | None) -> dict[str, Any]:
    """Content of a `tokenizer.json` over the learnt merges.

    Args:
        special: special tokens to their ids, which follow the merges.
        first: special token that a post-processor puts before every text, None for no such post-processor.
    """
    signs = byte_signs()
    merges = learn()
    vocabulary = {sign: index for index, sign in enumerate(signs)}
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    if len(vocabulary) != 256 + MERGES:
        raise ValueError("two merges make the same token; the ids would have gaps")
    pieces = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": token, **flags()} for token, index in special.items()],
        "normalizer": None,
        "pre_tokenizer": pieces,
        "post_processor": pieces if first is None else beginning(first, special[first]),
        "decoder": pieces,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [f"{left} {right}" for left, right in merges],
        },
    }


def beginning(token: str, index: int) -> dict[str, Any]:
    """A post-processor of a `tokenizer.json` that puts a token before every text."""
    sequence_a = {"Sequence": {"id": "A", "type_id": 0}}
    sequence_b = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": token, "type_id": 0}}, sequence_a],
        "pair": [
            {"SpecialToken": {"id": token, "type_id": 0}},
            sequence_a,
            {"SpecialToken": {"id": token, "type_id": 1}},
            sequence_b,
        ],
        "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]}},
    }


def tokenizer_config() -> dict[str, Any]:
    """Content of `tokenizer_config.json`: rows are padded on the left with a reserved token, as in the released one."""
    return {
        "added_tokens_decoder": {str(index): {"content": token, **flags()} for token, index in token_ids().items()},
        "additional_special_tokens": [FAKE, IMAGE, END_OF_UTTERANCE],
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 4096,
        "pad_token": PAD,
        "padding_side": "left",
        "processor_class": "Idefics3Processor",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "truncation_side": "left",
    }


def special_tokens_map() -> dict[str, Any]:
    """Content of `special_tokens_map.json`."""

    def token(content: str) -> dict[str, Any]:
        return {"content": content, **{key: value for key, value in flags().items() if key != "special"}}

    return {
        "additional_special_tokens": [token(FAKE), token(IMAGE), token(END_OF_UTTERANCE)],
        "bos_token": token(BOS),
        "eos_token": token(EOS),
        "pad_token": token(PAD),
    }


def chat_template() -> str:
    """The chat template as Jinja: role, colon, items, end-of-utterance and a newline for every message.

    A space follows the colon unless the first item is an image; the generation prompt is `Assistant:`.
    """
    return (
        "{{ bos_token if bos_token is defined else '<|begin_of_text|>' }}"
        "{%- for turn in messages %}"
        "{%- set items = turn['content'] %}"
        "{{- turn['role'] | capitalize ~ ':' }}"
        "{%- if items is string %}{{- ' ' ~ items }}"
        "{%- else %}"
        "{%- if not items or items[0]['type'] != 'image' %}{{- ' ' }}{%- endif %}"
        "{%- for item in items %}"
        "{%- if item['type'] == 'image' %}{{- '<image>' }}"
        "{%- elif item['type'] == 'text' %}{{- item['text'] }}{%- endif %}"
        "{%- endfor %}"
        "{%- endif %}"
        "{{- '<end_of_utterance>\\n' }}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}{{- 'Assistant:' }}{%- endif %}"
    )


def flags() -> dict[str, bool]:
    """How a special token is matched: as it stands, wherever it stands."""
    return {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
