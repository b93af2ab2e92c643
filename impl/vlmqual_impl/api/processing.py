"""What the processors of all families share: files of image options, sorting of options, texts, chat templates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from PIL import Image

from vlmqual_impl import processor_files as files

TEXT_CALL = (
    "add_special_tokens",
    "padding",
    "padding_side",
    "truncation",
    "max_length",
    "stride",
    "pad_to_multiple_of",
    "return_token_type_ids",
    "return_attention_mask",
    "return_overflowing_tokens",
    "return_special_tokens_mask",
    "return_offsets_mapping",
    "return_length",
    "verbose",
    "is_split_into_words",
)


class SavedOptions:
    """An image processor's options to files and back, in the layouts of 4.x and 5.x.

    Attributes:
        OPTIONS: names of its options, each an attribute.
        PROCESSOR: class of the processor that it is a part of.
    """

    OPTIONS: ClassVar[Sequence[str]]
    PROCESSOR: ClassVar[str]
    _more: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Options as they are written to a file."""
        options = {name: getattr(self, name) for name in (*self.OPTIONS, *self._more)}
        if "resample" in options:
            options["resample"] = int(options["resample"])
        return {**options, "image_processor_type": type(self).__name__}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **kwargs: Any) -> Self:
        """From options; keyword arguments override them."""
        left_out = ("image_processor_type", "processor_class", "feature_extractor_type")
        return cls(**{**{key: value for key, value in values.items() if key not in left_out}, **kwargs})

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> list[str]:
        """Write `preprocessor_config.json`, in the layout of 4.x; the paths written."""
        values = {**self.to_dict(), "processor_class": self.PROCESSOR}
        return [files.write_json(Path(save_directory) / files.IMAGE_FILE, values)]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Read `preprocessor_config.json`, or the image part of a newer `processor_config.json`.

        Args:
            pretrained_model_name_or_path: directory or hub id.
            **kwargs: override what the file says.

        Raises:
            ValueError: there is no such file, or it is damaged.
            TypeError: an override is neither an option nor something that the file holds.
        """
        directory, options = files.located(pretrained_model_name_or_path, kwargs)
        return cls.from_saved(files.image_options(directory), options)

    @classmethod
    def from_saved(cls, values: Mapping[str, Any], overrides: Mapping[str, Any]) -> Self:
        """From what a file holds, some of it overridden.

        Raises:
            TypeError: an override is neither an option nor something that the file holds.
        """
        unknown = [key for key in overrides if key not in cls.OPTIONS and key not in values]
        if unknown:
            raise TypeError(f"{cls.__name__} does not know {', '.join(unknown)}; it knows {', '.join(cls.OPTIONS)}")
        return cls.from_dict(values, **overrides)


def check_numbers(chosen: Mapping[str, Any]) -> None:
    """Refuse options of resizing and rescaling that are no such thing.

    Raises:
        ValueError: `rescale_factor` is no number or `resample` is no filter.
    """
    if chosen["do_rescale"] and not isinstance(chosen["rescale_factor"], (int, float)):
        raise ValueError(f"rescale_factor {chosen['rescale_factor']!r} is no number")
    if chosen["resample"] not in list(Image.Resampling):
        raise ValueError(f"resample {chosen['resample']!r} is no PIL filter; valid are {[*map(int, Image.Resampling)]}")


def sorted_options(
    name: str, image_call: Sequence[str], kwargs: dict[str, Any], text_call: Sequence[str] = TEXT_CALL
) -> tuple[dict[str, Any], dict[str, Any], str | None]:
    """Options of the image processor, of the tokenizer, and the framework.

    Args:
        name: of the processor, for messages.
        image_call: options of a call of its image processor.
        kwargs: of the processor's call: options by name, and mappings `images_kwargs`, `text_kwargs`, `common_kwargs`.
        text_call: options of a call of its tokenizer.

    Raises:
        TypeError: an unknown option.
        ValueError: an option that is not offered.
    """
    image_options = dict(kwargs.pop("images_kwargs", {}))
    text_options = {"add_special_tokens": True, "padding": False, **kwargs.pop("text_kwargs", {})}
    common = dict(kwargs.pop("common_kwargs", {}))
    framework = kwargs.pop("return_tensors", common.pop("return_tensors", None))
    framework = image_options.pop("return_tensors", text_options.pop("return_tensors", framework))
    flat = {**common, **kwargs}
    image_options |= {key: value for key, value in flat.items() if key in image_call}
    text_options |= {key: value for key, value in flat.items() if key in text_call}
    both = (*image_call, *text_call)
    for place, keys, known in (
        ("", flat, (*both, "return_tensors")),
        (" in images_kwargs", image_options, image_call),
        (" in text_kwargs", text_options, text_call),
    ):
        for key in keys:
            if key not in known:
                raise TypeError(f"{name} does not know {key!r}{place}; it knows {', '.join(known)}")
    if text_options.pop("is_split_into_words", False):  # IDEFICS3-PROC-020
        raise ValueError("is_split_into_words=True is not supported; a prompt is one string")
    return image_options, text_options, framework


def texts_of(text: Any) -> list[str]:
    """A prompt or several as a list.

    Raises:
        ValueError: it is neither.
    """
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(item, str) for item in texts):
        raise ValueError(
            "text must be a string or a list of strings; prompts that are split into words are not supported"
        )
    return list(texts)


def rendered(processor: Any, conversation: Any, template: str | None, tokenize: bool, options: dict[str, Any]) -> Any:
    """A conversation, or a list of them, through a chat template.

    Args:
        processor: has `tokenizer` and `chat_template`.
        conversation: turns {"role": ..., "content": [{"type": "image"} or {"type": "text", "text": ...}]}.
        template: for this call; None for the processor's.
        tokenize: give token ids instead of text.
        options: for the tokenizer, such as add_generation_prompt=True.

    Raises:
        ValueError: there is no template, or it cannot be rendered.
    """
    from jinja2 import TemplateError

    template = template if template is not None else processor.chat_template
    if template is None:
        raise ValueError("there is no chat template: neither the call, the processor nor the tokenizer has one")
    if tokenize:
        options.setdefault("return_dict", False)
    try:
        return processor.tokenizer.apply_chat_template(
            conversation, chat_template=template, tokenize=tokenize, **options
        )
    except TemplateError as error:
        raise ValueError(f"the chat template cannot be rendered: {error}") from error
