"""The recipe of Idefics's fixture tokenizer: BPE over letters as in Llama, with the special tokens of the released one.

Layout of ids: three special tokens, 256 bytes for letters that are not known, letters, merges, `<end_of_utterance>`;
then the additional vocabulary of two tokens, which the model's second table and second head are for.
"""

from __future__ import annotations

from typing import Any

from vlmqual_adapters.vocabulary import END_OF_UTTERANCE, FAKE, IMAGE, beginning, byte_signs, flags, learn

UNKNOWN, BOS, EOS = "<unk>", "<s>", "</s>"
#: So many that the first vocabulary is a multiple of 8.
MERGES = 245
#: What stands for a blank.
BLANK = "\u2581"
ADDITIONAL = (FAKE, IMAGE)
_LETTERS = (BLANK, *map(chr, range(33, 127)))
#: Ids of the first table.
VOCABULARY = 3 + 256 + len(_LETTERS) + MERGES + 1


def token_ids() -> dict[str, int]:
    """Special tokens to their ids."""
    first = {UNKNOWN: 0, BOS: 1, EOS: 2, END_OF_UTTERANCE: VOCABULARY - 1}
    return first | {token: VOCABULARY + index for index, token in enumerate(ADDITIONAL)}


def tokenizer_json() -> dict[str, Any]:
    """Content of `tokenizer.json`: a blank before every piece of text, unknown letters as bytes."""
    merges = [(_sign(left), _sign(right)) for left, right in learn(count=MERGES)]
    tokens = [UNKNOWN, BOS, EOS, *(f"<0x{byte:02X}>" for byte in range(256)), *_LETTERS]
    tokens += [left + right for left, right in merges]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != VOCABULARY - 1:
        raise ValueError("two merges make the same token; the ids would have gaps")
    blanks = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": token, **flags()} for token, index in token_ids().items()],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": BLANK}, blanks]},
        "pre_tokenizer": None,
        "post_processor": beginning(BOS, token_ids()[BOS]),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": BLANK}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": UNKNOWN,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [f"{left} {right}" for left, right in merges],
        },
    }


def _sign(piece: str) -> str:
    blank, newline = byte_signs()[ord(" ")], byte_signs()[ord("\n")]
    if newline in piece:
        raise ValueError("a merge has a newline, which is a byte here")
    return piece.replace(blank, BLANK)


def additional_special_tokens(utterances: bool) -> list[str]:
    """Tokens that the tokenizer lists as its own; one that lists `<end_of_utterance>` was trained on conversations."""
    return [FAKE, IMAGE, *([END_OF_UTTERANCE] if utterances else [])]


def tokenizer_config(utterances: bool) -> dict[str, Any]:
    """Content of `tokenizer_config.json`: rows are padded on the left with the unknown token, as released."""
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(index): {"content": token, **flags()} for token, index in token_ids().items()},
        "additional_special_tokens": additional_special_tokens(utterances),
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_max_length": 2048,
        "pad_token": UNKNOWN,
        "padding_side": "left",
        "processor_class": "IdeficsProcessor",
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": UNKNOWN,
    }


def special_tokens_map(utterances: bool) -> dict[str, Any]:
    """Content of `special_tokens_map.json`."""

    def token(content: str) -> dict[str, Any]:
        return {"content": content, **{key: value for key, value in flags().items() if key != "special"}}

    return {
        "additional_special_tokens": [token(content) for content in additional_special_tokens(utterances)],
        "bos_token": token(BOS),
        "eos_token": token(EOS),
        "pad_token": token(UNKNOWN),
        "unk_token": token(UNKNOWN),
    }
