"""Prompts of Idefics3: what an `<image>` marker becomes, which markers belong to which images; and batches of both.

Source of the rules: Idefics3 documentation 4.46.3 and, where its formula is garbled, the behaviour of transformers
4.46.3 (IDEFICS3-PROC-007, IDEFICS3-PROC-008).
"""

from __future__ import annotations

import re
from collections import UserDict
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt

IMAGE = "<image>"
FAKE = "<fake_token_around_image>"
GLOBAL = "<global-img>"
END_OF_UTTERANCE = "<end_of_utterance>"
FRAMEWORKS = ("pt", "np")

_EXPANSION_TAGS = re.compile(r"(\n?<global-img>\n?|<row_\d+_col_\d+>\n?)+")


def image_text(rows: int, columns: int, length: int) -> str:
    """What one image is in a prompt.

    Args:
        rows: of its grid, 0 for a single frame.
        columns: of its grid, 0 for a single frame.
        length: image tokens of one frame.

    Returns:
        For a single frame: fake token, global tag, image tokens, fake token. Otherwise each tile as fake token, row and
        column tag (from 1) and image tokens, a newline after every row, and after one more newline the whole image like
        a single frame.
    """
    tokens = IMAGE * length
    whole = f"{FAKE}{GLOBAL}{tokens}{FAKE}"
    if rows == 0 and columns == 0:
        return whole
    lines = (
        "".join(f"{FAKE}<row_{row}_col_{column}>{tokens}" for column in range(1, columns + 1)) + "\n"
        for row in range(1, rows + 1)
    )
    return "".join(lines) + "\n" + whole


def expand(text: str, grids: Sequence[tuple[int, int]], length: int) -> str:
    """Replace every `<image>` marker of a prompt, in order, each by its own image's text (IDEFICS3-PROC-029).

    Args:
        text: prompt with as many markers as there are grids.
        grids: (rows, columns) of each image.
        length: image tokens of one frame.
    """
    parts = text.split(IMAGE)
    pieces = [parts[0]]
    for (rows, columns), after in zip(grids, parts[1:], strict=True):
        pieces += [image_text(rows, columns, length), after]
    return "".join(pieces)


def check_counts(texts: Sequence[str], images: Sequence[int]) -> None:
    """Every prompt needs as many markers as its sample has images.

    Args:
        texts: prompts.
        images: number of images of each sample; empty when there are none at all.

    Raises:
        ValueError: they differ (IDEFICS3-PROC-016, IDEFICS3-PROC-018).
    """
    markers = [text.count(IMAGE) for text in texts]
    given = list(images) if images else [0] * len(texts)
    if markers != given:
        raise ValueError(
            f"the prompts have {markers} {IMAGE} markers and the samples have {given} images; they have to be equal"
        )


def collapse(text: str) -> str:
    """Undo the tags of an expansion in decoded text: each maximal run of them becomes one marker (4.46.3)."""
    return _EXPANSION_TAGS.sub(IMAGE, text)


# batches ------------------------------------------------------------------------------------------------------------


def check_framework(framework: str | None) -> None:
    """Refuse a `return_tensors` that is not offered.

    Raises:
        ValueError: it is none of `FRAMEWORKS` and not None.
    """
    if framework is not None and framework not in FRAMEWORKS:  # IDEFICS3-IMG-049
        raise ValueError(f"return_tensors {framework!r} is not available; valid are {', '.join(FRAMEWORKS)} and None")


def nested(images: Any) -> list[list[Any]]:
    """One image, a list of images (one sample) or a list of lists (a batch) as a list of lists.

    Raises:
        ValueError: it is empty, or mixes images with lists.
    """
    if not isinstance(images, (list, tuple)):
        return [[images]]
    lists = [isinstance(item, (list, tuple)) for item in images]
    if not images or (any(lists) and not all(lists)):
        raise ValueError("images must be an image, a list of images (one sample), or a list of lists (a batch)")
    return [list(item) for item in images] if all(lists) else [list(images)]


def stacked(name: str, value: Sequence[Sequence[npt.NDArray[Any]]], framework: str) -> Any:
    """Equally many arrays of one shape for each sample, as one array or torch tensor (B, N, ...).

    Raises:
        ValueError: numbers or shapes differ.
    """
    shapes = {frame.shape for sample in value for frame in sample}
    counts = {len(sample) for sample in value}
    if len(shapes) > 1 or len(counts) > 1:
        raise ValueError(
            f"{name} cannot be one tensor: the samples have {sorted(counts)} frames of shapes {sorted(shapes)}; "
            "use do_pad=True, or return_tensors=None"
        )
    array = np.array(value)
    if framework == "np":
        return array
    import torch

    return torch.from_numpy(array)


class Batch(UserDict[str, Any]):
    """Named tensors: a mapping whose items are attributes too, and which moves to a device or dtype as a whole."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["data"][name]
        except KeyError:
            raise AttributeError(
                f"the batch has no {name!r}; it has {', '.join(self.__dict__.get('data', {}))}"
            ) from None

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move tensors with torch's `Tensor.to`; a floating dtype leaves whole-number tensors as they are."""
        import torch

        for key, value in self.data.items():
            if isinstance(value, torch.Tensor):
                moved = value.to(*args, **kwargs)
                self.data[key] = moved if value.is_floating_point() else moved.to(value.dtype)
        return self
