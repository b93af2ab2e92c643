"""Prompts of Idefics: lists of texts and images, the text that they become, and which tokens see which image.

Source of the rules: Idefics documentation 4.46.3 and the behaviour of transformers 4.46.3; for prompts of images alone
and nested `images` the documented intention and 5.23.0 (IDEFICS-PROC-027), which 4.46.3 fails on.

Legend of shapes: B rows, S token positions, N images of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from vlmqual_impl.image_urls import is_url

IMAGE = "<image>"
FAKE = "<fake_token_around_image>"
END_OF_UTTERANCE = "<end_of_utterance>"


class Text(str):
    """A text that is a text whatever it says: never the address of an image.

    For texts that somebody else has written, who could otherwise choose what is fetched.
    """

    __slots__ = ()


def items(text: str, images: Sequence[Any]) -> list[Any]:
    """A text with `<image>` markers as the documented list of texts and images; nothing stands between two markers.

    The texts are `Text`, since every image has its marker.

    Raises:
        ValueError: there are more or fewer markers than images.
    """
    parts = text.split(IMAGE)
    if len(parts) - 1 != len(images):
        raise ValueError(f"the text has {len(parts) - 1} {IMAGE} markers for {len(images)} images: {text!r}")
    listed: list[Any] = [Text(parts[0])]
    for image, after in zip(images, parts[1:], strict=True):
        listed += [image, Text(after)]
    return [item for item in listed if not (isinstance(item, Text) and not item)]


def is_image(item: Any) -> bool:
    """True for an item of `samples` that is an image: everything but text, and text that is an address."""
    return not isinstance(item, str) or (not isinstance(item, Text) and is_url(item.strip(" ")))


# what was passed -----------------------------------------------------------------------------------------------------


def samples(images: Any, text: Any) -> list[list[Any]]:
    """The prompts of a call as one list of items for each.

    In a prompt the path of an image is a `pathlib.Path`; a string that is no address is a text, whatever files there
    are. In `images`, beside texts, it is a path.

    Args:
        images: images to go with texts; or prompts, where it is the only argument.
        text: prompts; or texts, where there are images to go with them. The two may be swapped, as in 4.46.3.

    Raises:
        ValueError: there is nothing, or texts and images do not go together.
    """
    if images is None and text is None:  # IDEFICS-PROC-016
        raise ValueError("neither text nor images were passed; at least one of them is required")
    if images is None or text is None:  # images alone are a prompt too (IDEFICS-PROC-027)
        return _prompts(text if images is None else images)
    if not any(map(is_image, _flat(images))) and all(map(is_image, _flat(text))):
        return _pairs(text, images)
    return _pairs(images, text)


def _prompts(value: Any) -> list[list[Any]]:
    """One prompt or several as a list of lists: a flat list is one (IDEFICS-PROC-011)."""
    if not isinstance(value, (list, tuple)):
        return [[value]]  # 4.46.3 takes a single text for a list of letters, and loses its blanks
    lists = [isinstance(item, (list, tuple)) for item in value]
    if not value or (any(lists) and not all(lists)):
        raise ValueError("prompts must be a list of texts and images (one prompt), or a list of such lists (a batch)")
    return [list(item) for item in value] if all(lists) else [list(value)]


def _pairs(images: Any, text: Any) -> list[list[Any]]:
    """Text i with image i, or with the list of images i."""
    pictures = list(images) if isinstance(images, (list, tuple)) else [images]  # IDEFICS-PROC-013
    texts = list(text) if isinstance(text, (list, tuple)) else [text]
    if not texts or not all(isinstance(each, str) for each in texts):
        raise ValueError("with images, text must be a text or a list of texts, one for each image or list of images")
    if len(texts) != len(pictures):
        raise ValueError(
            f"there are {len(texts)} texts and {len(pictures)} images; pass one image for each text, "
            "or for several images a list of lists, [[image, image], [image]]"
        )
    lists = [isinstance(each, (list, tuple)) for each in pictures]
    if any(lists) and not all(lists):
        raise ValueError("images must be images, or lists of images, not both")
    if any(lists):
        # 5.23.0 puts the text first here and last below; 4.46.3 takes a list for one image and fails.
        return [[each, *map(_named, several)] for each, several in zip(texts, pictures, strict=True)]
    return [[_named(one), each] for one, each in zip(pictures, texts, strict=True)]  # IDEFICS-PROC-012


def _named(image: Any) -> Any:
    """An item of `images`: what is no address there is a path, never a text (IDEFICS-PROC-015)."""
    return Path(image) if isinstance(image, str) and not is_image(image) else image


def _flat(value: Any) -> Iterator[Any]:
    for item in value if isinstance(value, (list, tuple)) else [value]:
        yield from _flat(item) if isinstance(item, (list, tuple)) else [item]


# what it becomes -----------------------------------------------------------------------------------------------------


def prompt(sample: Sequence[Any], bos: str, eos: str, between: str) -> str:
    """The text of a prompt, images as tokens (IDEFICS-PROC-008, IDEFICS-PROC-009).

    Blanks, no other white space, are taken off both ends of every text.

    Args:
        sample: texts and images.
        bos: stands first.
        eos: stands last, may be empty.
        between: stands between two texts that follow each other, may be empty (IDEFICS-PROC-024).

    Raises:
        ValueError: a text has the token of an image, which would shift all images after it.
    """
    pieces = [bos]
    last: str | None = None
    for item in sample:
        if is_image(item):
            pieces.append(f"{IMAGE}{FAKE}" if last == "image" else f"{FAKE}{IMAGE}{FAKE}")  # IDEFICS-PROC-027
            last = "image"
            continue
        pieces += [between if last == "text" else "", item.strip(" ")]
        last = "text"
    whole = "".join([*pieces, eos])
    if whole.count(IMAGE) != sum(map(is_image, sample)):
        raise ValueError(f"a text has an {IMAGE} marker of its own, an image is an item of its own: {whole!r}")
    return whole


def image_mask(rows: Sequence[Sequence[int]], marker: int, eos: int | None, images: int) -> npt.NDArray[np.int64]:
    """1 where a token sees an image: from the image's token to the next one's, or to the end of the sequence.

    Args:
        rows: padded token ids, equally many in every row.
        marker: id of the image token.
        eos: id of the token that ends a sequence; it sees the image still, what follows it does not.
        images: N.

    Returns:
        (B, S, N) int64, at most one 1 at a position, none before the first image (IDEFICS-PROC-021).
    """
    mask = np.zeros((len(rows), len(rows[0]), images), np.int64)
    for row, ids in enumerate(rows):
        seen, ended = -1, False
        for place, token in enumerate(ids):
            if token == marker:
                seen, ended = seen + 1, False
            if 0 <= seen < images and not ended:
                mask[row, place, seen] = 1
            ended = ended or token == eos
    return mask
