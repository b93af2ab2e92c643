"""`MllamaImageProcessor` and `MllamaProcessor` with the documented signatures.

The rules are in `images_mllama` and `processors_mllama`, the files in `processor_files`.

Legend of shapes: B samples, N images of a sample, T = `max_image_tiles`, t side of a tile, S token positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from vlmqual_impl import images as pictures
from vlmqual_impl import images_mllama as rules
from vlmqual_impl import processor_files as files
from vlmqual_impl import processors_mllama as prompts
from vlmqual_impl.api import processing as shared
from vlmqual_impl.image_urls import ImageFetch, opened, permission
from vlmqual_impl.images import Array
from vlmqual_impl.processors import Batch, check_framework, nested

_FLAGS = (
    "do_convert_rgb",
    "do_resize",
    "size",
    "resample",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "do_pad",
    "max_image_tiles",
)
_IMAGE_CALL = (*_FLAGS, "input_data_format")


class MllamaImageProcessor(shared.SavedOptions):  # MLLAMA-IMG-044
    """Turns images into tiles. Parameters and defaults as documented for 4.45.2; unknown ones are kept.

    Args:
        do_convert_rgb: convert PIL images and files to three channels first; transparency becomes white. Arrays and
            tensors stay as they are.
        do_resize: has to be True.
        size: {"height": n, "width": n} of a tile, by default 224.
        resample: PIL filter number, by default BILINEAR (2).
        do_rescale: multiply by `rescale_factor`.
        rescale_factor: by default 1 / 255.
        do_normalize: subtract `image_mean`, divide by `image_std`.
        image_mean: by default 0.5 for each channel.
        image_std: by default 0.5 for each channel.
        do_pad: has to be True.
        max_image_tiles: tiles of an image at most.
        **kwargs: kept and written back by `save_pretrained`.

    Raises:
        ValueError: a value is not valid; the sentence names it.
    """

    OPTIONS = _FLAGS
    PROCESSOR = "MllamaProcessor"
    model_input_names = ("pixel_values", "num_tiles", "aspect_ratio_ids", "aspect_ratio_mask")

    def __init__(
        self,
        do_convert_rgb: bool = True,
        do_resize: bool = True,
        size: dict[str, int] | None = None,
        resample: int = Image.Resampling.BILINEAR,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        image_mean: float | list[float] | None = None,
        image_std: float | list[float] | None = None,
        do_pad: bool = True,
        max_image_tiles: int = 4,
        **kwargs: Any,
    ) -> None:
        self.do_convert_rgb = do_convert_rgb
        self.do_resize = do_resize
        self.size = size if size is not None else {"height": 224, "width": 224}  # MLLAMA-IMG-012
        self.resample = resample
        self.do_rescale = do_rescale
        self.rescale_factor = rescale_factor
        self.do_normalize = do_normalize
        self.image_mean = image_mean if image_mean is not None else [0.5, 0.5, 0.5]  # MLLAMA-IMG-035
        self.image_std = image_std if image_std is not None else [0.5, 0.5, 0.5]
        self.do_pad = do_pad
        self.max_image_tiles = max_image_tiles
        self._more = kwargs
        for key, value in kwargs.items():
            setattr(self, key, value)
        _check_options({name: getattr(self, name) for name in _FLAGS})

    def __call__(self, images: Any, **kwargs: Any) -> Batch:
        """See `preprocess`."""
        return self.preprocess(images, **kwargs)

    def preprocess(
        self,
        images: Any,
        do_convert_rgb: bool | None = None,
        do_resize: bool | None = None,
        size: dict[str, int] | None = None,
        resample: int | None = None,
        do_rescale: bool | None = None,
        rescale_factor: float | None = None,
        do_normalize: bool | None = None,
        image_mean: float | list[float] | None = None,
        image_std: float | list[float] | None = None,
        do_pad: bool | None = None,
        max_image_tiles: int | None = None,
        input_data_format: str | None = None,
        return_tensors: str | None = None,
    ) -> Batch:
        """Preprocess images; every option overrides the processor's for this call (MLLAMA-IMG-041).

        Args:
            images: one image, a list of images (one sample), or a list of lists (a batch) (MLLAMA-IMG-042). An image is
                a PIL image, a numpy array, a torch tensor or the path of a file. Arrays of fractions in 0..1 stay
                fractions: they want do_rescale=False. A sample of a batch may be empty.
            do_convert_rgb: see the constructor, as for the options that follow (MLLAMA-IMG-037).
            do_resize: see the constructor.
            size: see the constructor.
            resample: see the constructor.
            do_rescale: see the constructor.
            rescale_factor: see the constructor.
            do_normalize: see the constructor.
            image_mean: see the constructor.
            image_std: see the constructor.
            do_pad: see the constructor.
            max_image_tiles: see the constructor.
            input_data_format: "channels_first" or "channels_last" of array inputs, None infers it.
            return_tensors: "pt", "np", or None for numpy arrays (MLLAMA-IMG-039, MLLAMA-IMG-040).

        Returns:
            pixel_values (B, N, T, C, t, t) float32, aspect_ratio_ids (B, N) int64, aspect_ratio_mask (B, N, T) int64,
            and num_tiles, nested lists of the tiles that each image has (MLLAMA-IMG-016, MLLAMA-IMG-017).

        Raises:
            ValueError: an option or an image is not valid; the sentence names it.
            TypeError: something in `images` is no image.
        """
        given = locals()
        chosen = {name: getattr(self, name) if given[name] is None else given[name] for name in _FLAGS}
        _check_options(chosen)
        check_framework(return_tensors)
        samples = nested(images)
        if not any(samples):
            raise ValueError("images has no image in any sample; at least one is needed")
        cut = [[self._tiles(image, chosen, input_data_format) for image in sample] for sample in samples]
        ratios = [[ratio for _, ratio in sample] for sample in cut]
        tiles = int(chosen["max_image_tiles"])
        arrays = {
            "pixel_values": rules.pack([[array for array, _ in sample] for sample in cut], tiles),
            "aspect_ratio_ids": rules.ratio_ids(ratios, tiles),
            "aspect_ratio_mask": rules.ratio_mask(ratios, tiles),
        }
        data: dict[str, Any] = {name: _tensor(array, return_tensors) for name, array in arrays.items()}
        return Batch({**data, "num_tiles": [[high * wide for high, wide in sample] for sample in ratios]})

    def _tiles(self, value: Any, chosen: Mapping[str, Any], format_: str | None) -> tuple[Array, rules.Arrangement]:
        """The tiles (n, C, t, t) of one image, and their arrangement."""
        array, arrangement = _resized(
            opened(value),
            format_,
            bool(chosen["do_convert_rgb"]),
            int(chosen["size"]["height"]),
            int(chosen["max_image_tiles"]),
            int(chosen["resample"]),
        )
        array = rules.pad(array, arrangement, int(chosen["size"]["height"]))
        if chosen["do_rescale"]:
            array = rules.rescale(array, chosen["rescale_factor"])
        if chosen["do_normalize"]:
            array = pictures.normalize(array, chosen["image_mean"], chosen["image_std"])  # MLLAMA-IMG-034
        return rules.tiles_of(array, arrangement), arrangement

    def pad(
        self,
        image: Array,
        size: dict[str, int],
        aspect_ratio: tuple[int, int],
        data_format: str | None = None,
        input_data_format: str | None = None,
    ) -> Array:
        """Zeros at the bottom and right up to `size` times `aspect_ratio` (MLLAMA-IMG-025).

        Args:
            image: (C, H, W) or (H, W, C).
            size: of a tile.
            aspect_ratio: (tiles high, tiles wide).
            data_format: "channels_first" or "channels_last" of the result, None for that of the image.
            input_data_format: that of the image, None infers it.

        Raises:
            ValueError: a value is not valid, or the image is larger.
        """
        _check_size(size)
        found, wanted = _formats(image, data_format, input_data_format)
        array = pictures.pixels(image)
        high, wide = aspect_ratio
        last = array.transpose(1, 2, 0) if found == "channels_first" else array
        return _formatted(rules.pad(last, (high, wide), size["height"]), wanted)

    def resize(
        self,
        image: Array,
        size: dict[str, int],
        max_image_tiles: int,
        resample: int = Image.Resampling.BILINEAR,
        data_format: str | None = None,
        input_data_format: str | None = None,
    ) -> tuple[Array, tuple[int, int]]:
        """Resize to fit the canvas that suits the image best, without distortion (MLLAMA-IMG-027, MLLAMA-IMG-028).

        Args:
            image: (C, H, W) or (H, W, C), uint8 or numbers that `preprocess` takes.
            size: of a tile.
            max_image_tiles: tiles at most.
            resample: PIL filter number, by default BILINEAR (MLLAMA-IMG-029, MLLAMA-IMG-030).
            data_format: "channels_first" or "channels_last" of the result, None for that of the image.
            input_data_format: that of the image, None infers it.

        Returns:
            The resized image, uint8, or float32 for fractions; and (tiles high, tiles wide).

        Raises:
            ValueError: a value is not valid.
        """
        _check_size(size)
        found, wanted = _formats(image, data_format, input_data_format)
        resized, arrangement = _resized(image, found, False, size["height"], max_image_tiles, int(resample))
        return _formatted(resized, wanted), arrangement


class MllamaProcessor:
    """Tokenizer and image processor together; tells which tokens see which tiles.

    Images named by addresses are fetched only where `fetch` permits it (see `image_urls.permission`), as an attribute,
    in `from_pretrained` or in a call.

    Args:
        image_processor: a `MllamaImageProcessor`.
        tokenizer: a transformers tokenizer that has the image token and adds no beginning-of-text token itself.

    Raises:
        ValueError: image processor or tokenizer are missing (MLLAMA-PROC-002).
    """

    attributes = ("image_processor", "tokenizer")

    def __init__(self, image_processor: Any, tokenizer: Any) -> None:  # MLLAMA-PROC-001
        if image_processor is None:
            raise ValueError("image_processor is None; a MllamaImageProcessor is required")
        if tokenizer is None:
            raise ValueError("tokenizer is None; a tokenizer is required")
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.image_token = prompts.IMAGE
        self.image_token_id = tokenizer.convert_tokens_to_ids(prompts.IMAGE)
        self.python_token = prompts.PYTHON
        self.python_token_id = tokenizer.convert_tokens_to_ids(prompts.PYTHON)
        self.bos_token = tokenizer.bos_token
        self.chat_template: str | None = getattr(tokenizer, "chat_template", None)
        self.fetch: ImageFetch | None = None
        self._more: dict[str, Any] = {}

    @property
    def model_input_names(self) -> list[str]:
        """Names of what a call returns."""
        pixels = [name for name in self.image_processor.model_input_names if name != "num_tiles"]
        return [*self.tokenizer.model_input_names, *pixels, "cross_attention_mask"]

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Batch:
        """Tokenize prompts, preprocess their images, and say which tokens see which tiles.

        Args:
            images: one image, a list of images for a single prompt, or a list of lists for a batch, in which a sample
                may be empty; images as for the image processor, or addresses with `fetch`.
            text: a prompt or a list of prompts with one `<|image|>` marker for each image.
            **kwargs: options of the image processor and the tokenizer, and `return_tensors`; or mappings
                `images_kwargs`, `text_kwargs` and `common_kwargs` (MLLAMA-PROC-010); `fetch` for this call.

        Returns:
            With text input_ids and attention_mask (B, S); with images pixel_values (B, N, T, 3, t, t), aspect_ratio_ids
            (B, N) and aspect_ratio_mask (B, N, T); with both cross_attention_mask (B, S, N, T) (MLLAMA-PROC-013,
            MLLAMA-PROC-014).

        Raises:
            ValueError: markers and images do not match, nothing was passed, or a prompt is not a string.
            TypeError: an unknown keyword.
        """
        if text is None and images is None:
            raise ValueError("neither text nor images were passed; at least one of them is required")
        limits = permission(kwargs.pop("fetch", self.fetch))
        image_options, text_options, framework = shared.sorted_options("MllamaProcessor", _IMAGE_CALL, kwargs)
        check_framework(framework)
        texts = None if text is None else shared.texts_of(text)
        samples = [] if images is None else nested(images)
        if images is not None and not any(samples):
            raise ValueError("images has no image in any sample; pass images=None for text alone")
        if texts is not None:
            prompts.check_counts(texts, [len(sample) for sample in samples])
        data: dict[str, Any] = {}
        num_tiles: list[list[int]] = []
        if images is not None:
            read = [[opened(image, limits) for image in sample] for sample in samples]
            data = dict(self.image_processor.preprocess(read, return_tensors=framework, **image_options))
            num_tiles = data.pop("num_tiles")
        if texts is None:
            return Batch(data)
        if not self.bos_token:
            raise ValueError("the tokenizer has no bos_token; every prompt needs a beginning-of-text token")
        begun = [prompts.begun(one, self.bos_token) for one in texts]
        encoded = self.tokenizer(text=begun, **text_options)
        if images is not None:
            rows = encoded["input_ids"]
            mask = prompts.dense_mask(rows, num_tiles, self.image_token_id, data["aspect_ratio_mask"].shape[-1])
            data["cross_attention_mask"] = _tensor(mask, framework)
        tokens = {
            name: value if framework is None else _stacked(name, value, framework) for name, value in encoded.items()
        }
        return Batch({**tokens, **data})

    def apply_chat_template(
        self, conversation: Any, chat_template: str | None = None, tokenize: bool = False, **kwargs: Any
    ) -> Any:
        """Render a conversation, or a list of them, to a prompt (MLLAMA-PROC-006, MLLAMA-PROC-008).

        Args:
            conversation: turns {"role": ..., "content": [{"type": "image"} or {"type": "text", "text": ...}]}.
            chat_template: for this call; by default the processor's.
            tokenize: return token ids instead of text.
            **kwargs: for the tokenizer, such as add_generation_prompt=True.

        Raises:
            ValueError: there is no template, or it cannot be rendered.
        """
        return shared.rendered(self, conversation, chat_template, tokenize, kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """Token ids to text, by the tokenizer (MLLAMA-PROC-012)."""
        return str(self.tokenizer.decode(*args, **kwargs))

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """Several sequences of token ids to texts, by the tokenizer."""
        return list(self.tokenizer.batch_decode(*args, **kwargs))

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> list[str]:
        """Write tokenizer, image processor and chat template, in the layout of 4.45 (MLLAMA-PROC-007)."""
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        written = files.save_tokenizer(self.tokenizer, directory)
        written += self.image_processor.save_pretrained(directory)
        if self._more:
            about = {**self._more, "processor_class": type(self).__name__}
            written.append(files.write_json(directory / files.PROCESSOR_FILE, about))
        if self.chat_template is not None:
            written += files.save_chat_template(self.chat_template, directory)
        return written

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Read a processor that 4.45 or 5.x has written (MLLAMA-PROC-021).

        Args:
            pretrained_model_name_or_path: directory or hub id.
            **kwargs: `chat_template`, `fetch`, or options of the image processor, that override the files'.

        Raises:
            ValueError: files are missing or damaged.
            TypeError: a keyword that is no option.
        """
        directory, options = files.located(pretrained_model_name_or_path, kwargs)
        own = {key: options.pop(key) for key in ("chat_template", "fetch") if key in options}
        image_processor = MllamaImageProcessor.from_saved(files.image_options(directory), options)
        path = directory / files.PROCESSOR_FILE
        saved = files.read_json(path) if path.is_file() else {}
        processor = cls(image_processor, files.tokenizer(directory))
        stored = files.chat_template(directory) or saved.get("chat_template") or processor.chat_template
        processor.chat_template = own.get("chat_template") or stored
        processor.fetch = permission(own.get("fetch"))
        left_out = ("image_processor", "processor_class", "chat_template")
        processor._more = {key: value for key, value in saved.items() if key not in left_out}
        return processor


def _check_options(chosen: Mapping[str, Any]) -> None:
    for name in ("do_pad", "do_resize"):  # MLLAMA-IMG-031, MLLAMA-IMG-032
        if not chosen[name]:
            raise ValueError(
                f"{name} is {chosen[name]!r}; tiles need every image resized and padded, so it has to be True"
            )
    rules.arrangements(chosen["max_image_tiles"])
    _check_size(chosen["size"])
    shared.check_numbers(chosen)


def _check_size(size: Any) -> None:
    if not isinstance(size, Mapping) or not {"height", "width"} <= set(size):  # MLLAMA-IMG-014
        raise ValueError(f'size {size!r} is not valid; it needs {{"height": n, "width": n}}')
    if size["height"] != size["width"]:  # MLLAMA-IMG-013
        raise ValueError(f"size {size!r} is not valid; height and width of a tile have to be equal")
    if isinstance(size["height"], bool) or not isinstance(size["height"], int) or size["height"] < 1:
        raise ValueError(f"size {size!r} is not valid; a tile needs a whole number of at least 1 pixel")


def _tensor(array: Array, framework: str | None) -> Any:
    if framework != "pt":
        return array
    import torch

    return torch.from_numpy(array)


def _stacked(name: str, rows: Any, framework: str) -> Any:
    """Numbers, or rows of numbers, as one array or tensor.

    Raises:
        ValueError: the rows differ in length.
    """
    lengths = sorted({len(row) for row in rows if not isinstance(row, int)})
    if len(lengths) > 1:
        raise ValueError(f"{name} cannot be one tensor: the rows are {lengths} tokens long; use padding=True")
    return _tensor(np.array(rows, np.int64), framework)


def _resized(
    value: Any, format_: str | None, to_rgb: bool, tile: int, tiles: int, resample: int
) -> tuple[Array, rules.Arrangement]:
    """An image (H, W, C) at the size that fits its canvas, and the canvas; fractions are resized as bytes."""
    fractions = False
    if isinstance(value, Image.Image):
        image = pictures.picture(value, format_)
        image = rules.to_rgb(image) if to_rgb else rules.unconverted(image)
    else:
        array = pictures.pixels(value)
        image = pictures.picture(array, rules.channel_format(array, format_) if array.ndim == 3 else format_)
        fractions = pictures.fractional(array)
    arrangement = rules.canvas((image.height, image.width), tile, tiles)
    wanted = rules.fitted_size((image.height, image.width), arrangement, tile)
    resized = pictures.frame_array(pictures.resize(image, wanted, resample))
    return (rules.rescale(resized, 1 / 255) if fractions else resized), arrangement


def _formats(image: Any, wanted: str | None, given: str | None) -> tuple[str, str]:
    """Where the channels of an array stand, and where those of the result shall stand.

    Raises:
        ValueError: a format is unknown or cannot be inferred, or the array has not three axes.
    """
    array = pictures.pixels(image)
    if array.ndim != 3:
        raise ValueError(f"an image array has 3 axes here, not {array.ndim} (shape {array.shape})")
    for name, value in (("data_format", wanted), ("input_data_format", given)):
        if value is not None and value not in pictures.FORMATS:
            raise ValueError(f"{name} {value!r} is unknown; valid are {', '.join(pictures.FORMATS)} and None")
    found = rules.channel_format(array, given)
    return found, wanted or found


def _formatted(array: Array, format_: str) -> Array:
    return array.transpose(2, 0, 1) if format_ == "channels_first" else array
