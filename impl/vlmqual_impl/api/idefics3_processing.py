"""`Idefics3ImageProcessor` and `Idefics3Processor` with the documented signatures.

The rules are in `images` and `processors`, the files in `processor_files`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

from PIL import Image

from vlmqual_impl import images as rules
from vlmqual_impl import processor_files as files
from vlmqual_impl import processors as prompts
from vlmqual_impl.api import processing as shared
from vlmqual_impl.image_urls import opened, permission
from vlmqual_impl.processors import Batch, check_framework, nested, stacked

_FLAGS = (
    "do_convert_rgb",
    "do_resize",
    "size",
    "resample",
    "do_image_splitting",
    "max_image_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
    "do_pad",
)
_IMAGE_CALL = (*_FLAGS, "return_row_col_info", "data_format", "input_data_format")


class Idefics3ImageProcessor(shared.SavedOptions):
    """Turns images into frames and masks. Parameters and defaults as documented for 4.46.3; unknown ones are kept.

    Args:
        do_convert_rgb: convert to three channels first; transparency becomes white.
        do_resize: bring the longest edge to `size["longest_edge"]`.
        size: {"longest_edge": n}, by default 4 * 364; or {"height": h, "width": w}.
        resample: PIL filter number, by default LANCZOS (1).
        do_image_splitting: cut into tiles of `max_image_size` followed by the whole image.
        max_image_size: {"longest_edge": n}, by default 364: side of a frame.
        do_rescale: multiply by `rescale_factor`.
        rescale_factor: by default 1 / 255.
        do_normalize: subtract `image_mean`, divide by `image_std`.
        image_mean: by default 0.5 for each channel.
        image_std: by default 0.5 for each channel.
        do_pad: pad frames and samples to the largest of the batch and return masks.
        **kwargs: kept and written back by `save_pretrained`.
    """

    OPTIONS = _FLAGS
    PROCESSOR = "Idefics3Processor"
    model_input_names = ("pixel_values", "pixel_attention_mask")

    def __init__(
        self,
        do_convert_rgb: bool = True,
        do_resize: bool = True,
        size: dict[str, int] | None = None,
        resample: int = Image.Resampling.LANCZOS,
        do_image_splitting: bool = True,
        max_image_size: dict[str, int] | None = None,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        image_mean: float | list[float] | None = None,
        image_std: float | list[float] | None = None,
        do_pad: bool = True,
        **kwargs: Any,
    ) -> None:
        self.do_convert_rgb = do_convert_rgb
        self.do_resize = do_resize
        self.size = size if size is not None else {"longest_edge": 4 * 364}  # IDEFICS3-IMG-009, IDEFICS3-CARD-007
        self.resample = resample
        self.do_image_splitting = do_image_splitting
        self.max_image_size = max_image_size if max_image_size is not None else {"longest_edge": 364}
        self.do_rescale = do_rescale
        self.rescale_factor = rescale_factor
        self.do_normalize = do_normalize
        self.image_mean = image_mean if image_mean is not None else [0.5, 0.5, 0.5]  # IDEFICS3-IMG-012
        self.image_std = image_std if image_std is not None else [0.5, 0.5, 0.5]  # IDEFICS3-IMG-013
        self.do_pad = do_pad
        self._more = kwargs
        for key, value in kwargs.items():
            setattr(self, key, value)

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
        do_image_splitting: bool | None = None,
        do_rescale: bool | None = None,
        max_image_size: dict[str, int] | None = None,
        rescale_factor: float | None = None,
        do_normalize: bool | None = None,
        image_mean: float | list[float] | None = None,
        image_std: float | list[float] | None = None,
        do_pad: bool | None = None,
        return_tensors: str | None = None,
        return_row_col_info: bool = False,
        data_format: str | None = "channels_first",
        input_data_format: str | None = None,
    ) -> Batch:
        """Preprocess images; every option overrides the processor's for this call (IDEFICS3-IMG-044).

        Args:
            images: one image, a list of images (one sample), or a list of lists (a batch) (IDEFICS3-IMG-043). An image
                is a PIL image, a numpy array, a torch tensor or the path of a file.
            do_convert_rgb: see the constructor, as for the options that follow.
            do_resize: see the constructor.
            size: see the constructor.
            resample: see the constructor.
            do_image_splitting: see the constructor.
            do_rescale: see the constructor.
            max_image_size: see the constructor.
            rescale_factor: see the constructor.
            do_normalize: see the constructor.
            image_mean: see the constructor.
            image_std: see the constructor.
            do_pad: see the constructor.
            return_tensors: "pt", "np", or None for nested lists of numpy arrays (IDEFICS3-IMG-038, IDEFICS3-IMG-039).
            return_row_col_info: add "rows" and "cols", nested lists of the grids (IDEFICS3-IMG-040).
            data_format: "channels_first", "channels_last", or None for that of the input (IDEFICS3-IMG-041).
            input_data_format: that of array inputs, None infers it.

        Returns:
            pixel_values (B, N, 3, H, W) float32 and, with `do_pad`, pixel_attention_mask (B, N, H, W) int64.

        Raises:
            ValueError: an option or an image is not valid; the sentence names it.
            TypeError: something in `images` is no image.
        """
        given = locals()
        chosen = {name: getattr(self, name) if given[name] is None else given[name] for name in _FLAGS}
        _check_options(chosen, return_tensors, data_format)
        samples = nested(images)
        frames: list[list[rules.Array]] = []
        rows: list[list[int]] = []
        columns: list[list[int]] = []
        for sample in samples:
            cut = [self._frames(image, chosen, input_data_format) for image in sample]
            frames.append([frame for frames_of_image, _, _ in cut for frame in frames_of_image])
            rows.append([row for _, row, _ in cut])
            columns.append([column for _, _, column in cut])
        format_ = data_format or _input_format(samples, input_data_format)
        if format_ == "channels_first":
            frames = [[frame.transpose(2, 0, 1) for frame in sample] for sample in frames]
        data: dict[str, Any] = {"pixel_values": frames}
        if chosen["do_pad"]:
            padded, masks = rules.pad(frames, cast(rules.ChannelFormat, format_))
            data = {"pixel_values": padded, "pixel_attention_mask": masks}
        if return_tensors is not None:
            data = {name: stacked(name, value, return_tensors) for name, value in data.items()}
        if return_row_col_info:
            data |= {"rows": rows, "cols": columns}
        return Batch(data)

    def _frames(self, value: Any, chosen: Mapping[str, Any], format_: str | None) -> tuple[list[rules.Array], int, int]:
        """The frames of one image as arrays (H, W, C), and its grid."""
        image = rules.picture(opened(value), format_)
        if chosen["do_convert_rgb"]:
            image = rules.to_rgb(image)
        resample, tile = int(chosen["resample"]), int(chosen["max_image_size"]["longest_edge"])
        if chosen["do_resize"]:
            size = chosen["size"]
            if "longest_edge" in size:
                wanted = rules.longest_edge_size((image.height, image.width), int(size["longest_edge"]))
            else:
                wanted = (int(size["height"]), int(size["width"]))
            image = rules.resize(image, wanted, resample)
        if chosen["do_image_splitting"]:
            multiple = rules.tile_multiple_size((image.height, image.width), tile)
            pictures, rows, columns = rules.split(rules.resize(image, multiple, resample), tile, resample)
        else:
            pictures, rows, columns = [rules.resize(image, (tile, tile), resample)], 0, 0
        arrays = [rules.frame_array(picture) for picture in pictures]
        if chosen["do_rescale"]:
            arrays = [rules.rescale(array, chosen["rescale_factor"]) for array in arrays]
        if chosen["do_normalize"]:
            arrays = [rules.normalize(array, chosen["image_mean"], chosen["image_std"]) for array in arrays]
        return arrays, rows, columns


class Idefics3Processor:
    """Tokenizer and image processor together; the prompt's markers become what the images need.

    Args:
        image_processor: an `Idefics3ImageProcessor`.
        tokenizer: a transformers tokenizer; the image tokens are added to it as special tokens.
        image_seq_len: image tokens of one frame: int((image_size // patch_size) ** 2 / scale_factor ** 2).
        chat_template: Jinja template for `apply_chat_template`; by default the tokenizer's.
        **kwargs: `fetch`, permission for images that are addresses, see `image_urls.permission`.

    Raises:
        ValueError: image processor or tokenizer are missing (IDEFICS3-PROC-002, IDEFICS3-PROC-003).
        TypeError: another keyword.
    """

    attributes = ("image_processor", "tokenizer")
    optional_attributes = ("chat_template",)

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any = None,
        image_seq_len: int = 169,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        if image_processor is None:
            raise ValueError("image_processor is None; an Idefics3ImageProcessor is required")
        if tokenizer is None:
            raise ValueError("tokenizer is None; a tokenizer is required")
        self.fetch = permission(kwargs.pop("fetch", None))
        if kwargs:
            known = "image_processor, tokenizer, image_seq_len, chat_template and fetch"
            raise TypeError(f"Idefics3Processor does not know {', '.join(kwargs)}; it knows {known}")
        _check_length(image_seq_len)
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.image_seq_len = image_seq_len
        self._more: dict[str, Any] = {}
        self.chat_template = chat_template if chat_template is not None else getattr(tokenizer, "chat_template", None)
        # IDEFICS3-PROC-028. Adding what is there already leaves a tokenizer as it is.
        tokenizer.add_tokens([prompts.FAKE, prompts.IMAGE, prompts.END_OF_UTTERANCE], special_tokens=True)

    @property
    def model_input_names(self) -> list[str]:
        """Names of what a call returns."""
        return [*self.tokenizer.model_input_names, *self.image_processor.model_input_names]

    def __call__(
        self,
        images: Any = None,
        text: Any = None,
        audio: Any = None,
        videos: Any = None,
        image_seq_len: int | None = None,
        **kwargs: Any,
    ) -> Batch:
        """Expand prompts, tokenize them, and preprocess their images.

        Args:
            images: one image or a list of images for a single prompt, or a list of lists for a batch; images as for the
                image processor, or addresses with `fetch` (IDEFICS3-PROC-030).
            text: a prompt or a list of prompts with one `<image>` marker for each image.
            audio: not used; must be None.
            videos: not used; must be None.
            image_seq_len: for this call (IDEFICS3-PROC-006).
            **kwargs: options of the image processor and the tokenizer, and `return_tensors`; or two mappings
                `images_kwargs` and `text_kwargs`; `fetch` for this call.

        Returns:
            input_ids and attention_mask (B, S), pixel_values (B, N, 3, H, W), pixel_attention_mask (B, N, H, W).

        Raises:
            ValueError: markers and images do not match, nothing was passed, or a prompt is not a string.
            TypeError: an unknown keyword.
        """
        if text is None and images is None:
            raise ValueError("neither text nor images were passed; at least one of them is required")
        for name, value in (("audio", audio), ("videos", videos)):
            if value is not None:
                raise ValueError(f"{name} were passed; Idefics3 takes text and images only")
        limits = permission(kwargs.pop("fetch", self.fetch))
        image_options, text_options, framework = shared.sorted_options("Idefics3Processor", _IMAGE_CALL, kwargs)
        check_framework(framework)
        length = self.image_seq_len if image_seq_len is None else image_seq_len
        _check_length(length)
        texts = None if text is None else shared.texts_of(text)
        batch: dict[str, Any] = {}
        counts: list[int] = []
        grids: list[list[tuple[int, int]]] = []
        if images is not None:
            samples = nested(images)
            counts = [len(sample) for sample in samples]
            if texts is not None:
                prompts.check_counts(texts, counts)
            samples = [[opened(image, limits) for image in sample] for sample in samples]
            if not any(counts):
                raise ValueError("images has no image in any sample; pass images=None for text alone")
            image_options["return_row_col_info"] = True
            batch = dict(self.image_processor.preprocess(samples, return_tensors=framework, **image_options))
            grids = [list(zip(*pair, strict=True)) for pair in zip(batch.pop("rows"), batch.pop("cols"), strict=True)]
        if texts is not None:
            prompts.check_counts(texts, counts)
            grids = grids or [[] for _ in texts]
            expanded = [prompts.expand(one, grid, length) for one, grid in zip(texts, grids, strict=True)]
            batch |= dict(self.tokenizer(text=expanded, return_tensors=framework, **text_options))
        return Batch(batch)

    def apply_chat_template(
        self, conversation: Any, chat_template: str | None = None, tokenize: bool = False, **kwargs: Any
    ) -> Any:
        """Render a conversation, or a list of them, to a prompt (IDEFICS3-CARD-003).

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
        """Token ids to text; what an image was expanded to becomes `<image>` again, as in 4.46.3."""
        return prompts.collapse(str(self.tokenizer.decode(*args, **kwargs)))

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """Several sequences of token ids to texts; see `decode`."""
        return [prompts.collapse(text) for text in self.tokenizer.batch_decode(*args, **kwargs)]

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> list[str]:
        """Write tokenizer, image processor, `processor_config.json` and chat template, in the layout of 4.46."""
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        written = files.save_tokenizer(self.tokenizer, directory)
        written += self.image_processor.save_pretrained(directory)
        about = {**self._more, "image_seq_len": self.image_seq_len, "processor_class": type(self).__name__}
        written.append(files.write_json(directory / files.PROCESSOR_FILE, about))
        if self.chat_template is not None:
            written += files.save_chat_template(self.chat_template, directory)
        return written

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Read a processor that 4.46 or 5.x has written.

        Args:
            pretrained_model_name_or_path: directory or hub id.
            **kwargs: options of the processor, or of the image processor, that override the files'.

        Raises:
            ValueError: files are missing or damaged.
            TypeError: a keyword that is no option.
        """
        directory, options = files.located(pretrained_model_name_or_path, kwargs)
        mine = ("image_seq_len", "chat_template", "fetch")
        own = {key: options.pop(key) for key in mine if key in options}
        image_processor = Idefics3ImageProcessor.from_saved(files.image_options(directory), options)
        path = directory / files.PROCESSOR_FILE
        saved = files.read_json(path) if path.is_file() else {}
        own.setdefault("image_seq_len", saved.get("image_seq_len", 169))
        own.setdefault("chat_template", files.chat_template(directory) or saved.get("chat_template"))
        processor = cls(image_processor, files.tokenizer(directory), **own)
        left_out = ("image_processor", "image_seq_len", "processor_class", "chat_template")
        processor._more = {key: value for key, value in saved.items() if key not in left_out}
        return processor


def _check_options(chosen: Mapping[str, Any], framework: str | None, format_: str | None) -> None:
    check_framework(framework)
    if format_ is not None and format_ not in rules.FORMATS:
        raise ValueError(f"data_format {format_!r} is unknown; valid are {', '.join(rules.FORMATS)} and None")
    size, tile = chosen["size"], chosen["max_image_size"]
    keys = set(size) if isinstance(size, Mapping) else set()
    if chosen["do_resize"] and not ({"longest_edge"} <= keys or {"height", "width"} <= keys):
        raise ValueError(f'size {size!r} is not valid; it needs {{"longest_edge": n}} or {{"height": h, "width": w}}')
    if not isinstance(tile, Mapping) or "longest_edge" not in tile:  # IDEFICS3-IMG-027
        raise ValueError(f'max_image_size {tile!r} is not valid; it needs {{"longest_edge": n}}')
    sides = [*(size.values() if chosen["do_resize"] else ()), tile["longest_edge"]]
    if not all(isinstance(side, int) and side >= 1 for side in sides):
        raise ValueError(f"size {size!r} and max_image_size {tile!r} need whole numbers of at least 1 pixel")
    shared.check_numbers(chosen)


def _input_format(samples: Sequence[Sequence[Any]], given: str | None) -> str:
    first = next((image for sample in samples for image in sample), None)
    if first is None or isinstance(first, (Image.Image, str, Path)):
        return "channels_last"
    array = rules.pixels(first)
    return rules.channel_format(array, given) if array.ndim == 3 else given or "channels_last"


def _check_length(length: Any) -> None:
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(f"image_seq_len is {length!r}; it has to be a whole number of at least 1")
