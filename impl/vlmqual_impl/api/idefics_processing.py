"""`IdeficsImageProcessor` and `IdeficsProcessor` with the documented signatures.

The rules are in `images_idefics` and `processors_idefics`, addresses in `image_urls`, the files in `processor_files`.

Legend of shapes: B samples, N images of a sample, s `image_size`, S token positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from vlmqual_impl import images as pictures
from vlmqual_impl import images_idefics as rules
from vlmqual_impl import processor_files as files
from vlmqual_impl import processors_idefics as prompts
from vlmqual_impl.api import processing as shared
from vlmqual_impl.image_urls import ImageFetch, fetch_image, opened, permission
from vlmqual_impl.images import Array
from vlmqual_impl.processors import FRAMEWORKS, Batch, check_framework

_OPTIONS = ("image_size", "image_mean", "image_std", "image_num_channels")
_IMAGE_CALL = (*_OPTIONS, "transform")
_TEXT_CALL = (
    *("add_special_tokens", "padding", "padding_side", "truncation", "max_length", "pad_to_multiple_of", "verbose"),
    *("add_eos_token", "add_end_of_utterance_token"),
)
#: What 5.x also writes and 4.46 knows no choice of.
_ALWAYS: Mapping[str, Any] = {
    **dict.fromkeys(("do_convert_rgb", "do_resize", "do_rescale", "do_normalize"), True),
    "resample": 3,
    "rescale_factor": 1 / 255,
}


class IdeficsImageProcessor(shared.SavedOptions):
    """Turns images into squares of numbers. Parameters and defaults as documented for 4.46.3.

    Args:
        image_size: side of the square in pixels.
        image_mean: subtracted after division by 255; by default the documented constant (IDEFICS-IMG-003).
        image_std: divided by; by default the documented constant (IDEFICS-IMG-004).
        image_num_channels: has to be 3.
        **kwargs: `fetch`, the limits of `fetch_images`, and permission for images that are addresses (see
            `image_urls.permission`). Others are kept and written back by `save_pretrained`.

    Raises:
        ValueError: a value is not valid; the sentence names it.
        TypeError: `fetch` is no permission.
    """

    OPTIONS = _OPTIONS
    PROCESSOR = "IdeficsProcessor"
    model_input_names = ("pixel_values",)

    def __init__(  # IDEFICS-IMG-001
        self,
        image_size: int = 224,  # IDEFICS-IMG-002
        image_mean: float | list[float] | None = None,
        image_std: float | list[float] | None = None,
        image_num_channels: int | None = 3,  # IDEFICS-IMG-005
        **kwargs: Any,
    ) -> None:
        self.fetch = permission(kwargs.pop("fetch", None))
        self.image_size = image_size
        self.image_mean = image_mean if image_mean is not None else list(rules.MEAN)
        self.image_std = image_std if image_std is not None else list(rules.STD)
        self.image_num_channels = image_num_channels if image_num_channels is not None else rules.CHANNELS
        for key, value in kwargs.items():
            if key in _ALWAYS and value != _ALWAYS[key]:
                raise ValueError(f"{key} is {value!r}; Idefics has no other than {_ALWAYS[key]!r}")
            setattr(self, key, value)
        self._more = kwargs
        _check_options({name: getattr(self, name) for name in _OPTIONS})

    def __call__(self, images: Any, **kwargs: Any) -> Any:
        """See `preprocess`."""
        return self.preprocess(images, **kwargs)

    def preprocess(  # IDEFICS-IMG-006
        self,
        images: Any,
        image_num_channels: int | None = 3,
        image_size: int | None = None,
        image_mean: float | list[float] | None = None,
        image_std: float | list[float] | None = None,
        transform: Callable[[Any], Any] | None = None,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> Any:
        """Preprocess images; every option overrides the processor's for this call (IDEFICS-IMG-009, IDEFICS-IMG-010).

        Args:
            images: one image or a list of them. An image is a PIL image, a numpy array, a torch tensor, the path of a
                file, or with `fetch` an address. Files lose their transparency, as in `image_files.read_image`; that of
                PIL images becomes white.
            image_num_channels: see the constructor, as for the options that follow.
            image_size: see the constructor.
            image_mean: see the constructor.
            image_std: see the constructor.
            transform: for training: called with each image as it was passed, instead of all other rules; its results
                are stacked (IDEFICS-IMG-012).
            return_tensors: "pt", "np", or None for a list of numpy arrays.
            **kwargs: none is known.

        Returns:
            (number of images, 3, s, s) float32, or what `transform` made; [] for an empty list (IDEFICS-IMG-008).

        Raises:
            ValueError: an option or an image is not valid; the sentence names it.
            TypeError: something in `images` is no image, or an unknown keyword.
        """
        if kwargs:
            raise TypeError(f"preprocess does not know {', '.join(kwargs)}; it knows {', '.join(_IMAGE_CALL)}")
        given = locals()
        chosen = {name: getattr(self, name) if given[name] is None else given[name] for name in _OPTIONS}
        _check_options(chosen)
        check_framework(return_tensors)
        read = [opened(image, self.fetch) for image in _listed(images)]
        if not read:
            return []
        if transform is not None:
            return _stacked([transform(image) for image in read], return_tensors)
        side, mean, std = int(chosen["image_size"]), chosen["image_mean"], chosen["image_std"]
        return _stacked([rules.square(image, side, mean, std) for image in read], return_tensors)

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Fetch the image of an address, or of each in a list, within the limits of `fetch` (IDEFICS-IMG-015).

        Raises:
            ImageError: an image cannot be had.
            TypeError: it is neither an address nor a list.
        """
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(each) for each in image_url_or_urls]
        if not isinstance(image_url_or_urls, str):
            raise TypeError(f"{type(image_url_or_urls).__name__} is no address; valid are a string or a list of them")
        return fetch_image(image_url_or_urls, self.fetch or ImageFetch())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **kwargs: Any) -> Self:
        """From options; keyword arguments override them. What 5.x calls `size` is `image_size` here."""
        named = {"image_size": _side(values["size"])} if values.get("size") is not None else {}
        return super().from_dict({**named, **{key: one for key, one in values.items() if key != "size"}}, **kwargs)

    @classmethod
    def from_saved(cls, values: Mapping[str, Any], overrides: Mapping[str, Any]) -> Self:
        """From what a file holds, some of it overridden; `fetch` is never taken from a file.

        Raises:
            TypeError: an override is neither an option nor something that the file holds.
        """
        known = {key: value for key, value in overrides.items() if key != "fetch"}
        made = super().from_saved({key: value for key, value in values.items() if key != "fetch"}, known)
        made.fetch = permission(overrides.get("fetch"))
        return made


class IdeficsProcessor:
    """Tokenizer and image processor together: prompts are lists of texts and images.

    `image_size` and `add_end_of_utterance_token` have no effect, as in 4.46.3: the image processor has the size, the
    tokenizer (or a call) decides about the token (IDEFICS-PROC-026).

    Args:
        image_processor: an `IdeficsImageProcessor`.
        tokenizer: a transformers `LlamaTokenizerFast` that has the tokens of an image.
        image_size: see above.
        add_end_of_utterance_token: see above.
        **kwargs: `fetch`: permission for images that are addresses, see `image_urls.permission`; by default that of the
            image processor.

    Raises:
        ValueError: image processor or tokenizer are missing or of another class (IDEFICS-PROC-002, IDEFICS-PROC-003,
            IDEFICS-PROC-004).
        TypeError: an unknown keyword, or `fetch` is no permission.
    """

    attributes = ("image_processor", "tokenizer")

    def __init__(  # IDEFICS-PROC-001
        self,
        image_processor: Any,
        tokenizer: Any = None,
        image_size: int = 224,
        add_end_of_utterance_token: bool | None = None,
        **kwargs: Any,
    ) -> None:
        if image_processor is None:
            raise ValueError("image_processor is None; an IdeficsImageProcessor is required")
        if tokenizer is None:
            raise ValueError("tokenizer is None; a LlamaTokenizerFast is required")
        if not isinstance(image_processor, IdeficsImageProcessor):
            kind = type(image_processor).__name__
            raise ValueError(f"image_processor is a {kind}; an IdeficsImageProcessor is required")
        fetch = kwargs.pop("fetch", image_processor.fetch)
        if kwargs:
            raise TypeError(f"IdeficsProcessor does not know {', '.join(kwargs)}; of further keywords it knows fetch")
        from transformers import LlamaTokenizerFast

        if not isinstance(tokenizer, LlamaTokenizerFast):
            raise ValueError(f"tokenizer is a {type(tokenizer).__name__}; a LlamaTokenizerFast is required")
        self.image_processor = image_processor
        self.tokenizer: Any = tokenizer
        self.image_token_id: Any = tokenizer.convert_tokens_to_ids(prompts.IMAGE)
        self.fetch = permission(fetch)
        self._more: dict[str, Any] = {}

    @property
    def model_input_names(self) -> list[str]:
        """Names of what a call returns."""
        return ["input_ids", "attention_mask", *self.image_processor.model_input_names, "image_attention_mask"]

    def __call__(  # IDEFICS-PROC-005
        self, images: Any = None, text: Any = None, audio: Any = None, videos: Any = None, **kwargs: Any
    ) -> Batch:
        """Turn prompts into token ids, their images into pixels, and say which tokens see which image.

        Args:
            images: an image or a list of images to go before the texts of `text`, one for each; or a list of lists,
                to go behind them. Without `text` it is taken for the prompts, so these may be the only argument.
            text: a prompt, which is a list of texts and images, or a list of prompts. An image is what the image
                processor takes. Of strings, one with scheme and host and without blanks is the address of an image,
                one that names an existing file with the suffix of an image is its path, all others are texts, and
                always those of the class `processors_idefics.Text`.
            audio: not used; must be None.
            videos: not used; must be None.
            **kwargs: `return_tensors` ("pt" by default, or "np"); `padding` ("longest" by default), `truncation`,
                `max_length` and others of the tokenizer; `add_eos_token` (the prompts end with it);
                `add_end_of_utterance_token` (between texts that follow each other; None: if the tokenizer lists it);
                `transform` and other options of the image processor; `debug` (print what becomes of the prompts,
                IDEFICS-PROC-018); `fetch` for this call. Or mappings `images_kwargs`, `text_kwargs`, `common_kwargs`.

        Returns:
            input_ids and attention_mask (B, S) int64, pixel_values (B, N, 3, s, s) float32, image_attention_mask
            (B, S, N) int64; without any image N is 1, the pixels are zeros, the mask is False (IDEFICS-PROC-006,
            IDEFICS-PROC-007, IDEFICS-PROC-022).

        Raises:
            ValueError: texts and images do not go together, an address may not be fetched, the rows differ in length.
            TypeError: an unknown keyword, or something is neither text nor image.
        """
        for name, value in (("audio", audio), ("videos", videos)):
            if value is not None:
                raise ValueError(f"{name} were passed; Idefics takes text and images only")
        limits = permission(kwargs.pop("fetch", self.fetch))
        debug = bool(kwargs.pop("debug", False))
        image_options, text_options, framework = _sorted(kwargs)
        samples = prompts.samples(images, text)
        eos = self.tokenizer.eos_token if text_options.pop("add_eos_token") else ""
        between = self._between(text_options.pop("add_end_of_utterance_token"))
        texts = [prompts.prompt(sample, self._bos(), eos, between) for sample in samples]
        pictured = [[_address(item) for item in sample if prompts.is_image(item)] for sample in samples]
        if any(pictured):
            self._check_tokens()
        read = [[opened(item, limits) for item in sample] for sample in pictured]
        encoded = self.tokenizer(texts, **text_options)
        rows = encoded["input_ids"]
        if debug:
            for place, (whole, sample, row) in enumerate(zip(texts, read, rows, strict=True)):
                print(f"prompt {place}: {len(sample)} images, {len(row)} tokens with padding: {whole!r}")
        ids, seen = _rows("input_ids", rows), _rows("attention_mask", encoded["attention_mask"])
        slots = max(1, *map(len, read))  # also where a truncation has taken images away, as in 4.46.3
        side = image_options.get("image_size") or self.image_processor.image_size
        pixels = [self._pixels(sample, row, image_options) for sample, row in zip(read, rows, strict=True)]
        packed = rules.pack(pixels, slots, (rules.CHANNELS, side, side))
        if any(read):
            mask: Array = prompts.image_mask(rows, self.image_token_id, self.tokenizer.eos_token_id, slots)
        else:
            mask = np.zeros((*ids.shape, 1), np.bool_)  # IDEFICS-PROC-022
        arrays = (ids, seen, packed, mask)
        return Batch(
            {name: _tensor(array, framework) for name, array in zip(self.model_input_names, arrays, strict=True)}
        )

    def _pixels(self, sample: list[Any], row: list[int], options: dict[str, Any]) -> list[Array]:
        """Images of a prompt, (3, s, s) each, as many as its row has tokens for."""
        made = self.image_processor.preprocess(sample, return_tensors=None, **options)
        left = row.count(self.image_token_id) if sample else 0
        # 4.46.3 keeps the first ones also where the first tokens were cut off.
        kept = made[len(made) - left :] if self.tokenizer.truncation_side == "left" else made[:left]
        return [pictures.pixels(one) for one in kept]

    def _check_tokens(self) -> None:
        for token in (prompts.IMAGE, prompts.FAKE):
            if self.tokenizer.convert_ids_to_tokens(self.tokenizer.convert_tokens_to_ids(token)) != token:
                raise ValueError(f"the tokenizer has no {token} token; a prompt with images needs it")

    def _bos(self) -> str:
        if not self.tokenizer.bos_token:
            raise ValueError("the tokenizer has no bos_token; every prompt begins with it")
        return str(self.tokenizer.bos_token)

    def _between(self, wanted: bool | None) -> str:
        listed = prompts.END_OF_UTTERANCE in _further_tokens(self.tokenizer)  # IDEFICS-PROC-025
        return prompts.END_OF_UTTERANCE if (listed if wanted is None else wanted) else ""

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """Token ids to text, by the tokenizer (IDEFICS-PROC-019)."""
        return str(self.tokenizer.decode(*args, **kwargs))

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """Several sequences of token ids to texts, by the tokenizer (IDEFICS-PROC-019)."""
        return list(self.tokenizer.batch_decode(*args, **kwargs))

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> list[str]:
        """Write tokenizer and image processor, in the layout of 4.46 (IDEFICS-PROC-020)."""
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        written = files.save_tokenizer(self.tokenizer, directory)
        written += self.image_processor.save_pretrained(directory)
        if self._more:
            about = {**self._more, "processor_class": type(self).__name__}
            written.append(files.write_json(directory / files.PROCESSOR_FILE, about))
        return written

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Read a processor that 4.46 or 5.x has written (IDEFICS-PROC-020).

        Args:
            pretrained_model_name_or_path: directory or hub id.
            **kwargs: `fetch`, or options of the image processor that override the files'.

        Raises:
            ValueError: files are missing or damaged.
            TypeError: a keyword that is no option, or `fetch` is no permission.
        """
        directory, options = files.located(pretrained_model_name_or_path, kwargs)
        image_processor = IdeficsImageProcessor.from_saved(files.image_options(directory), options)
        processor = cls(image_processor, files.llama_tokenizer(directory))
        path = directory / files.PROCESSOR_FILE
        saved = files.read_json(path) if path.is_file() else {}
        processor._more = {
            key: value for key, value in saved.items() if key not in ("image_processor", "processor_class", "fetch")
        }
        return processor


def _sorted(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Options of the image processor, of the tokenizer, and the framework; with the defaults of 4.46.3."""
    defaults = {
        "add_special_tokens": False,
        "padding": "longest",  # IDEFICS-PROC-023
        "add_eos_token": False,
        "add_end_of_utterance_token": None,
    }
    common = {"return_tensors": "pt", **kwargs.get("common_kwargs", {})}
    text = {**defaults, **kwargs.get("text_kwargs", {})}
    image_options, text_options, framework = shared.sorted_options(
        "IdeficsProcessor", _IMAGE_CALL, {**kwargs, "text_kwargs": text, "common_kwargs": common}, _TEXT_CALL
    )
    if framework not in FRAMEWORKS:
        raise ValueError(f"return_tensors {framework!r} is not available; valid are {', '.join(FRAMEWORKS)}")
    return image_options, text_options, framework


def _check_options(chosen: Mapping[str, Any]) -> None:
    side = chosen["image_size"]
    if isinstance(side, bool) or not isinstance(side, int) or side < 1:
        raise ValueError(f"image_size is {side!r}; it has to be a whole number of at least 1 pixel")
    if chosen["image_num_channels"] != rules.CHANNELS:
        raise ValueError(f"image_num_channels is {chosen['image_num_channels']!r}; images become RGB, so it is 3")


def _side(size: Any) -> Any:
    """The side that 5.x's `size` means: a number, or a mapping of equal height and width."""
    if not isinstance(size, Mapping):
        return size
    if set(size) != {"height", "width"} or size["height"] != size["width"]:
        raise ValueError(f"size {dict(size)!r} is not valid; it has to be height and width, which have to be equal")
    return size["height"]


def _listed(images: Any) -> list[Any]:
    """One image, a list of them, or an array of four axes, as a list."""
    if getattr(images, "ndim", 0) == 4:
        return list(images)
    listed = list(images) if isinstance(images, (list, tuple)) else [images]
    if any(isinstance(image, (list, tuple)) for image in listed):
        raise ValueError("images must be an image or a list of images, not a list of lists")
    return listed


def _address(item: Any) -> Any:
    return item.strip(" ") if isinstance(item, str) else item


def _further_tokens(tokenizer: Any) -> list[str]:
    """Special tokens without a role of their own, which transformers 5 lists under another name than 4."""
    named = tokenizer.special_tokens_map.get("additional_special_tokens", [])
    return [str(token) for token in [*named, *(getattr(tokenizer, "extra_special_tokens", None) or [])]]


def _rows(name: str, rows: Any) -> Array:
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise ValueError(f"{name} cannot be one tensor: the rows are {lengths} tokens long; use padding=True")
    return np.array(rows, np.int64)


def _tensor(array: Array, framework: str) -> Any:
    if framework == "np":
        return array
    import torch

    return torch.from_numpy(array)


def _stacked(made: list[Any], framework: str | None) -> Any:
    """Arrays or tensors of one shape as one; as they are where no framework is asked for."""
    if framework is None:
        return made
    shapes = sorted({tuple(one.shape) for one in made})
    if len(shapes) > 1:
        raise ValueError(f"the images have the shapes {shapes}; they have to be equal")
    if framework == "np":
        return np.stack([pictures.pixels(one) for one in made])
    import torch

    return torch.stack([torch.as_tensor(one) for one in made])
