"""What the processors of all families share: sorting of options, texts, chat templates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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


def sorted_options(
    name: str, image_call: Sequence[str], kwargs: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], str | None]:
    """Options of the image processor, of the tokenizer, and the framework.

    Args:
        name: of the processor, for messages.
        image_call: options of a call of its image processor.
        kwargs: of the processor's call: options by name, and mappings `images_kwargs`, `text_kwargs`, `common_kwargs`.

    Raises:
        TypeError: an unknown option.
        ValueError: an option that is not offered.
    """
    image_options = dict(kwargs.pop("images_kwargs", {}))
    text_options = {"add_special_tokens": True, "padding": False, **kwargs.pop("text_kwargs", {})}
    common = dict(kwargs.pop("common_kwargs", {}))
    framework = kwargs.pop("return_tensors", common.pop("return_tensors", None))
    framework = image_options.pop("return_tensors", text_options.pop("return_tensors", framework))
    for key, value in {**common, **kwargs}.items():
        if key in image_call:
            image_options[key] = value
        elif key in TEXT_CALL:
            text_options[key] = value
        else:
            known = ", ".join((*image_call, *TEXT_CALL, "return_tensors"))
            raise TypeError(f"{name} does not know {key!r}; it knows {known}")
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
