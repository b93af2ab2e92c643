"""Prompts of Mllama: where the text begins, and which tokens see which image.

Source of the rules: Mllama documentation 4.45.2 and the behaviour of transformers 4.45.2; for rows without images
beside rows with images that of 5.23.0 (MLLAMA-PROC-020).

Legend of shapes: B rows, S token positions, N images, T tiles of an image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

IMAGE = "<|image|>"
PYTHON = "<|python_tag|>"

Span = tuple[int, int]


def begun(prompt: str, bos: str) -> str:
    """A prompt with its beginning-of-text token: behind the markers that it starts with, unless it has one anywhere.

    Args:
        prompt: text with markers.
        bos: text of the token (MLLAMA-PROC-009, MLLAMA-PROC-016, MLLAMA-PROC-023).
    """
    if bos in prompt:
        return prompt
    rest = prompt
    while rest.startswith(IMAGE):
        rest = rest.removeprefix(IMAGE)
    return f"{prompt[: len(prompt) - len(rest)]}{bos}{rest}"


def check_counts(texts: Sequence[str], images: Sequence[int]) -> None:
    """Every prompt needs as many markers as its sample has images, none included (MLLAMA-PROC-003, MLLAMA-PROC-020).

    Args:
        texts: prompts.
        images: number of images of each sample; empty when there are none at all.

    Raises:
        ValueError: they differ.
    """
    markers = [text.count(IMAGE) for text in texts]
    given = list(images) if images else [0] * len(texts)
    if markers != given:
        raise ValueError(
            f"the prompts have {markers} {IMAGE} markers and the samples have {given} images; they have to be equal"
        )


def spans(ids: Sequence[int], marker: int) -> list[Span]:
    """For each image of a row the positions that see it, first and one after the last (MLLAMA-PROC-018).

    An image is seen from its marker to the next one, the last image to the end. Markers that follow each other directly
    are a group: all of its images are seen until the group's last one ends.

    Args:
        ids: token ids of the row, padding included.
        marker: id of the image token.
    """
    starts = [index for index, token in enumerate(ids) if token == marker]
    found: list[Span] = []
    for index in range(len(starts) - 1, -1, -1):
        end = starts[index + 1] if index + 1 < len(starts) else len(ids)
        if found and end == starts[index] + 1:
            end = found[0][1]
        found.insert(0, (starts[index], end))
    return found


def dense_mask(
    rows: Sequence[Sequence[int]], num_tiles: Sequence[Sequence[int]], marker: int, tiles: int
) -> npt.NDArray[np.int64]:
    """The mask over tiles: 1 where a token sees a tile (MLLAMA-PROC-017).

    Args:
        rows: padded token ids of every row.
        num_tiles: for every row the tiles of each of its images.
        marker: id of the image token.
        tiles: T, the tile axis of the pixel values (MLLAMA-PROC-024).

    Returns:
        (B, S, N, T) int64.

    Raises:
        ValueError: the rows have not one image token for every image, as where a prompt was truncated.
    """
    seen = [spans(row, marker) for row in rows]
    found, wanted = [len(each) for each in seen], [len(each) for each in num_tiles]
    if found != wanted:
        raise ValueError(
            f"the token rows have {found} image tokens (id {marker}) and the samples have {wanted} images; "
            "prompts with images may be neither truncated nor spread over several rows"
        )
    length = max(map(len, rows))
    mask = np.zeros((len(rows), length, max(found), tiles), np.int64)
    for row, counts in enumerate(num_tiles):
        for image, ((start, end), count) in enumerate(zip(seen[row], counts, strict=True)):
            # Rows that are not padded differ in length; a single image is seen to the end of the longest one.
            mask[row, start : length if len(counts) == 1 else end, image, :count] = 1
    return mask
