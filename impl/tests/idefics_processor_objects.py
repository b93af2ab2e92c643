"""Tokenizers and processors of Idefics for the tests, and the same from transformers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaTokenizerFast

from vlmqual_impl.api.idefics_processing import IdeficsImageProcessor, IdeficsProcessor

BOS, EOS, PAD = "<s>", "</s>", "<unk>"
FAKE, IMAGE, END = "<fake_token_around_image>", "<image>", "<end_of_utterance>"
BLOCK = f"{FAKE}{IMAGE}{FAKE}"
SIDE = 28
MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]
NEW = int(transformers.__version__.split(".")[0]) >= 5


def _llama(core: Tokenizer, further: Sequence[str]) -> Any:
    core.add_special_tokens([PAD, BOS, EOS])
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in further])
    roles = {"unk_token": PAD, "bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "padding_side": "left"}
    return LlamaTokenizerFast(tokenizer_object=core, additional_special_tokens=[*further], **roles)


def tokenizer(*, with_end: bool = True) -> Any:
    """Byte-level, without merges, so that decoding gives back every text as it was; one id for each byte."""
    signs = [PAD, BOS, EOS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({sign: index for index, sign in enumerate(signs)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return _llama(core, (FAKE, IMAGE, END) if with_end else (FAKE, IMAGE))


def sentence_tokenizer() -> Any:
    """Built like the released one: a blank before every stretch of text, bytes for signs that are not known."""
    signs = [PAD, BOS, EOS, *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *map(chr, range(33, 127))]
    pairs = [("\u2581", "U"), ("s", "e"), ("\u2581U", "se"), ("\u2581Use", "r")]
    vocabulary = {sign: index for index, sign in enumerate([*signs, *(a + b for a, b in pairs)])}
    core = Tokenizer(models.BPE(vocabulary, pairs, unk_token=PAD, fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _llama(core, (FAKE, IMAGE, END))


def small_processor(*, with_end: bool = True, **options: Any) -> IdeficsProcessor:
    return IdeficsProcessor(IdeficsImageProcessor(**{"image_size": SIDE, **options}), tokenizer(with_end=with_end))


def reference_image_processor(**options: Any) -> Any:
    """The library's Pillow image processor; before 5.0 it has to be told the documented mean and deviation."""
    given = {"image_mean": MEAN, "image_std": STD, **options}
    if not NEW:
        return transformers.IdeficsImageProcessor(**given)
    from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil

    return IdeficsImageProcessorPil(**given)


def reference_processor(*, with_end: bool = True, **options: Any) -> Any:
    images = reference_image_processor(**{"image_size": SIDE, **options})
    return transformers.IdeficsProcessor(images, tokenizer(with_end=with_end))


def exact_square(image: Image.Image, side: int) -> npt.NDArray[np.float64]:
    """The rule of the resize once more: Keys' cubic kernel (a = -1/2), widened where an image shrinks, in float64.

    Pillow rounds to bytes after each of its two passes, so its results lie within 1.13 levels of this where no value
    was cut off at 0 or 255 on the way.
    """
    array = np.asarray(image, np.float64)
    across = np.einsum("hwc,sw->hsc", array, _weights(image.width, side))
    across = np.clip(across, 0, 255)
    return np.clip(np.einsum("hsc,th->tsc", across, _weights(image.height, side)), 0, 255)


@functools.cache
def _weights(length: int, side: int) -> npt.NDArray[np.float64]:
    scale = length / side
    widened = max(scale, 1.0)
    weights = np.zeros((side, length))
    for place in range(side):
        centre = (place + 0.5) * scale
        for index in range(max(math.floor(centre - 2 * widened), 0), min(math.ceil(centre + 2 * widened), length)):
            weights[place, index] = _cubic(abs(index + 0.5 - centre) / widened)
    normed: npt.NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
    return normed


def _cubic(x: float) -> float:
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def random_prompts(rng: np.random.Generator, image: Callable[[], Any]) -> Iterator[list[Any]]:
    """Prompts of texts and images in any order, none of them of images alone or empty."""
    words = ("User:", " what is this ", "two\nlines ", "  ", "x", "Assistant: " + EOS)
    while True:
        length = int(rng.integers(1, 7))
        prompt = [image() if rng.random() < 0.5 else str(rng.choice(words)) for _ in range(length)]
        yield ["begin", *prompt]
