"""The recipe of Mllama's fixture tokenizer: the same byte-level BPE with the special tokens of Llama 3.2 Vision.

As in the released tokenizer the image token is the last one, its id is the size of the text model's vocabulary, and
nothing is put before a text: the processor adds the beginning-of-text token (MLLAMA-PROC-009, MLLAMA-CFG-012).
Unlike the released one, rows are padded on the left, so that every batch can be continued.
"""

from __future__ import annotations

from typing import Any

from vlmqual_adapters.vocabulary import MERGES, byte_level, flags

BOS = "<|begin_of_text|>"
EOS = "<|end_of_text|>"
PAD = "<|finetune_right_pad_id|>"
START_HEADER = "<|start_header_id|>"
END_HEADER = "<|end_header_id|>"
END_OF_TURN = "<|eot_id|>"
PYTHON = "<|python_tag|>"
IMAGE = "<|image|>"
_RESERVED = tuple(f"<|reserved_special_token_{index}|>" for index in range(16))
#: In the order of the released tokenizer; the reserved ones make the vocabulary a multiple of 8.
SPECIAL = (BOS, EOS, *_RESERVED[:2], PAD, _RESERVED[2], START_HEADER, END_HEADER, "<|eom_id|>", END_OF_TURN, PYTHON,
           *_RESERVED[3:], IMAGE)  # fmt: skip
#: Ids that the text model can answer with; the image token is the next one.
VOCABULARY = 256 + MERGES + len(SPECIAL) - 1


def token_ids() -> dict[str, int]:
    """Special tokens to their ids."""
    return {token: 256 + MERGES + index for index, token in enumerate(SPECIAL)}


def tokenizer_json() -> dict[str, Any]:
    """Content of `tokenizer.json`."""
    return byte_level(token_ids(), None)


def tokenizer_config() -> dict[str, Any]:
    """Content of `tokenizer_config.json`."""
    return {
        "added_tokens_decoder": {str(index): {"content": token, **flags()} for token, index in token_ids().items()},
        "bos_token": BOS,
        "chat_template": chat_template(),
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 4096,
        "pad_token": PAD,
        "padding_side": "left",
        "processor_class": "MllamaProcessor",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def special_tokens_map() -> dict[str, Any]:
    """Content of `special_tokens_map.json`."""

    def token(content: str) -> dict[str, Any]:
        return {"content": content, **{key: value for key, value in flags().items() if key != "special"}}

    return {"bos_token": token(BOS), "eos_token": token(EOS), "pad_token": token(PAD)}


def chat_template() -> str:
    """The chat template as Jinja: for every message a header with its role, its items, and the end-of-turn token.

    Items follow each other without anything between; the generation prompt is the assistant's header.
    """
    return (
        "{{ bos_token if bos_token is defined else '<|begin_of_text|>' }}"
        "{%- for turn in messages %}"
        "{{- '<|start_header_id|>' ~ turn['role'] ~ '<|end_header_id|>\\n\\n' }}"
        "{%- set items = turn['content'] %}"
        "{%- if items is string %}{{- items }}"
        "{%- else %}"
        "{%- for item in items %}"
        "{%- if item['type'] == 'image' %}{{- '<|image|>' }}"
        "{%- elif item['type'] == 'text' %}{{- item['text'] }}{%- endif %}"
        "{%- endfor %}"
        "{%- endif %}"
        "{{- '<|eot_id|>' }}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
    )
