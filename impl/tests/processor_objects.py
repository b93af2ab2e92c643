"""A small tokenizer, processors and images for the tests of the processors, and the same from transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from vlmqual_impl.api.idefics3_processing import Idefics3ImageProcessor, Idefics3Processor

BOS, PAD, END = "<|begin_of_text|>", "<|reserved_special_token_0|>", "<end_of_utterance>"
FAKE, IMAGE, GLOBAL = "<fake_token_around_image>", "<image>", "<global-img>"
TEMPLATE = (
    "<|begin_of_text|>{% for m in messages %}{{ m['role'] | capitalize }}:"
    "{% for c in m['content'] %}{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
TINY: dict[str, Any] = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 16}}
GRIDS = [(0, 0), *((rows, columns) for rows in range(1, 5) for columns in range(1, 5) if rows * columns > 1)]


def small_tokenizer() -> Any:
    """Byte-level, without merges, so that text is never lost and every special token is one id."""
    core = Tokenizer(
        models.BPE({sign: index for index, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in (BOS, PAD, END, FAKE, IMAGE)])
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=BOS, pad_token=PAD, padding_side="left", clean_up_tokenization_spaces=False
    )


def small_processor(image_seq_len: int = 3, **options: Any) -> Idefics3Processor:
    return Idefics3Processor(
        Idefics3ImageProcessor(**{**TINY, **options}),
        small_tokenizer(),
        image_seq_len=image_seq_len,
        chat_template=TEMPLATE,
    )


def noise_image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def reference_image_processor(**options: Any) -> Any:
    """The library's Pillow image processor: a class of its own since 5.0."""
    if int(transformers.__version__.split(".")[0]) < 5:
        return transformers.Idefics3ImageProcessor(**options)
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    return Idefics3ImageProcessorPil(**options)


def reference_processor(**options: Any) -> Any:
    return transformers.Idefics3Processor(
        reference_image_processor(**{**TINY, **options}), small_tokenizer(), image_seq_len=3, chat_template=TEMPLATE
    )


def assert_same(made: Any, wanted: Any, about: str) -> None:
    assert set(made) == set(wanted), about
    for name in made:
        if name in ("input_ids", "attention_mask") and isinstance(made[name], list):  # rows of unequal length
            assert made[name] == wanted[name], f"{about}: {name} differs from transformers {transformers.__version__}"
            continue
        one, other = np.asarray(made[name]), np.asarray(wanted[name])
        assert one.shape == other.shape, f"{about}: {name} has shape {one.shape}, transformers has {other.shape}"
        assert np.array_equal(one, other), f"{about}: {name} differs from transformers {transformers.__version__}"
