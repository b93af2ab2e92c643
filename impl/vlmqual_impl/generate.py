"""From prompts to tokens: settings, choice of the next token, the loop, stopping. No timing, no printing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from vlmqual_impl.runtime.base import Runtime

DEFAULT_NEW_TOKENS = 20

# Settings of generation_config.json that would change the tokens and are not offered, with the value that means "off".
_OFF: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "num_return_sequences": (None, 1),
    "repetition_penalty": (None, 1, 1.0),
    "encoder_repetition_penalty": (None, 1, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "length_penalty": (None, 1, 1.0),
    "diversity_penalty": (None, 0, 0.0),
    "typical_p": (None, 1, 1.0),
    "min_p": (None, 0, 0.0),
    "epsilon_cutoff": (None, 0, 0.0),
    "eta_cutoff": (None, 0, 0.0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "begin_suppress_tokens": (None, []),
    "sequence_bias": (None, {}),
    "penalty_alpha": (None, 0, 0.0),
    "guidance_scale": (None, 1, 1.0),
    "constraints": (None, []),
    "force_words_ids": (None, []),
    "stop_strings": (None, []),
    "prompt_lookup_num_tokens": (None, 0),
    "max_time": (None,),
}


class Streamer(Protocol):
    """Receives ids as they come: the prompt (B, S) first, then (B,) for every step."""

    def put(self, value: Tensor) -> None:
        """Take ids, on the host."""
        ...

    def end(self) -> None:
        """No more ids will come."""
        ...


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True)
class GenerationConfig:
    """How tokens are chosen and when to stop.

    Attributes:
        max_new_tokens: tokens after the prompt; wins over `max_length`. Where neither is given, 20.
        max_length: tokens with the prompt.
        do_sample: draw from the distribution; otherwise the likeliest token is taken.
        temperature: logits are divided by it.
        top_k: only the k likeliest tokens can be drawn; 0 or None for all.
        top_p: only the smallest set of likeliest tokens with this probability can be drawn.
        eos_token_id: ids that end a row.
        pad_token_id: what an ended row is filled with; the first end id where there is none.
        bos_token_id: kept for the file.
        suppress_tokens: ids that are never chosen (`bad_words_ids` of one token each are the same).
        use_cache: keep keys and values between steps.
        others: settings of the file that do not change tokens.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = 50
    top_p: float = 1.0
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    suppress_tokens: tuple[int, ...] = ()
    use_cache: bool = True
    others: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "max_length"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}; it has to be a positive number of tokens")
        if not _is_number(self.temperature) or not 1e-6 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature!r}; it has to be a number of at least 1e-6")
        if not _is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p!r}; it has to be above 0 and at most 1")
        if self.top_k is not None and (not isinstance(self.top_k, int) or self.top_k < 0):
            raise ValueError(f"top_k is {self.top_k!r}; it has to be a whole number of at least 0")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GenerationConfig:
        """Read what generation_config.json holds.

        Raises:
            ValueError: a setting that would change the tokens is on and is not offered, or a value is out of range.
        """
        for key, off in _OFF.items():
            if key in values and values[key] not in off:
                raise ValueError(f"generation setting {key} is {values[key]!r}; it is not offered, only {off[-1]!r} is")
        known = {item.name for item in fields(cls)} - {"others", "eos_token_id", "suppress_tokens"}
        taken = {key: value for key, value in values.items() if key in known}
        for key in ("temperature", "top_p", "do_sample", "use_cache"):
            if taken.get(key, 0) is None:
                del taken[key]
        single: list[int] = []
        for words in values.get("bad_words_ids") or []:
            if not isinstance(words, list) or len(words) != 1:
                raise ValueError(f"generation setting bad_words_ids holds {words!r}; only single tokens are offered")
            single.append(int(words[0]))
        return cls(
            **taken,
            eos_token_id=_ids(values.get("eos_token_id")),
            suppress_tokens=(*_ids(values.get("suppress_tokens")), *single),
            others={k: v for k, v in values.items() if k not in known | {"eos_token_id", "suppress_tokens"}},
        )

    def to_dict(self) -> dict[str, Any]:
        """What generation_config.json holds: the settings that differ from their defaults."""
        values = dict(self.others)
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name not in ("others", "suppress_tokens") and value != item.default:
                values[item.name] = value
        if "eos_token_id" in values:
            values["eos_token_id"] = self.eos_token_id[0] if len(self.eos_token_id) == 1 else list(self.eos_token_id)
        banned = {int(words[0]) for words in values.get("bad_words_ids") or []}
        plain = [token for token in self.suppress_tokens if token not in banned]
        return values | ({"suppress_tokens": plain} if plain else {})

    def changed(self, changes: Mapping[str, Any]) -> GenerationConfig:
        """With the arguments of a call in place of the settings of the same name.

        Raises:
            ValueError: an unknown name, a setting that is not offered, or a value out of range.
        """
        known = {item.name for item in fields(self)} - {"others"} | {"bad_words_ids"}
        for key in changes:
            if key not in known and key not in _OFF:
                raise ValueError(f"generate does not know {key!r}; settings are {', '.join(sorted(known))}")
        merged = self.to_dict() | {key: value for key, value in changes.items() if value is not None}
        if changes.get("max_length") is not None and changes.get("max_new_tokens") is None:
            merged.pop("max_new_tokens", None)
        if changes.get("max_new_tokens") is not None:
            merged.pop("max_length", None)
        return GenerationConfig.from_dict(merged)

    def new_tokens(self, prompt: int) -> int:
        """How many tokens may follow a prompt of this length.

        Raises:
            ValueError: the prompt fills `max_length` already.
        """
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.max_length is None:
            return DEFAULT_NEW_TOKENS
        if prompt >= self.max_length:
            raise ValueError(f"the prompt has {prompt} tokens, max_length is {self.max_length}; nothing can follow")
        return self.max_length - prompt


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(int(item) for item in value) if isinstance(value, (list, tuple)) else (int(value),)


def choose(logits: Tensor, config: GenerationConfig, generator: torch.Generator | None = None) -> Tensor:
    """Next token of every row.

    Args:
        logits: (B, V).
        config: greedy or sampled, and what may be chosen.
        generator: source of randomness, None for torch's own.

    Returns:
        (B,) int64.

    Raises:
        ValueError: a logit is NaN or infinite.
    """
    if not bool(torch.isfinite(logits).all()):
        raise ValueError(f"{int((~torch.isfinite(logits)).sum())} of {logits.numel()} logits are not finite")
    if config.suppress_tokens:
        logits = logits.index_fill(1, torch.tensor(config.suppress_tokens, device=logits.device), float("-inf"))
    if not config.do_sample:
        return logits.argmax(-1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / config.temperature
    if config.top_k and config.top_k < logits.shape[-1]:
        least = logits.topk(config.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if config.top_p < 1:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # probability of everything likelier
        ordered = ordered.masked_fill(before >= config.top_p, float("-inf"))
        logits = torch.full_like(logits, float("-inf")).scatter(1, order, ordered)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


class _Calls:
    """A plain function as streamer: it gets the new ids only."""

    def __init__(self, function: Callable[[Tensor], object]) -> None:
        self._function = function
        self._prompt = True

    def put(self, value: Tensor) -> None:
        if not self._prompt:
            self._function(value)
        self._prompt = False

    def end(self) -> None:
        return None


def generate(
    runtime: Runtime,
    inputs: Mapping[str, Tensor],
    config: GenerationConfig,
    *,
    features: Tensor | None = None,
    generator: torch.Generator | None = None,
    streamer: Streamer | Callable[[Tensor], object] | None = None,
) -> Tensor:
    """Continue prompts.

    Args:
        runtime: the model.
        inputs: `input_ids` (B, S) or `inputs_embeds` (B, S, D), `attention_mask`, `pixel_values`, ...; rows may be
            padded on either side.
        config: choice of tokens and stopping.
        features: image features, in place of `pixel_values`.
        generator: source of randomness for sampling.
        streamer: an object with `put` and `end`, or a function that gets the (B,) ids of every step.

    Returns:
        (B, S + new) int64: the prompt and what follows it; only what follows where there are no `input_ids`. Rows that
        ended are filled with the padding id.
    """
    if features is None and "pixel_values" in inputs:
        features = runtime.encode(inputs)
    ids = inputs.get("input_ids")
    start = ids if ids is not None else inputs["inputs_embeds"]
    rows, prompt = start.shape[:2]
    limit = config.new_tokens(prompt)
    end = torch.tensor(config.eos_token_id, dtype=torch.int64, device=runtime.device)
    pad = config.pad_token_id if config.pad_token_id is not None else (config.eos_token_id or (0,))[0]
    stream: Streamer | None = None
    if streamer is not None:
        stream = _Calls(streamer) if callable(streamer) and not hasattr(streamer, "put") else cast(Streamer, streamer)
        stream.put(ids.cpu() if ids is not None else torch.empty((rows, 0), dtype=torch.int64))
    source = _cached(runtime, inputs, features, limit) if config.use_cache else _uncached(runtime, inputs, features)
    running = torch.ones(rows, dtype=torch.bool, device=runtime.device)
    made: list[Tensor] = []
    logits = next(source)
    while True:
        tokens = choose(logits, config, generator)
        tokens = torch.where(running, tokens, pad)
        made.append(tokens)
        if stream is not None:
            stream.put(tokens.cpu())
        running &= ~torch.isin(tokens, end)
        if len(made) == limit or not bool(running.any()):
            break
        logits = source.send(tokens)
    if stream is not None:
        stream.end()
    new = torch.stack(made, dim=1)
    return new if ids is None else torch.cat((ids.to(runtime.device), new), dim=1)


def _cached(runtime: Runtime, inputs: Mapping[str, Tensor], features: Tensor | None, limit: int) -> Any:
    """Yields logits (B, V), takes tokens (B,): one prefill, then one decode for each token."""
    start = inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"]
    sequences = runtime.prefill(inputs, features, max_length=start.shape[1] + limit)
    while True:
        tokens = yield sequences.logits
        sequences = runtime.decode(sequences, tokens)


def _uncached(runtime: Runtime, inputs: Mapping[str, Tensor], features: Tensor | None) -> Any:
    """Yields logits (B, V), takes tokens (B,): everything from the start for each token."""
    embeddings = runtime.embed(inputs, features)
    rows, prompt = embeddings.shape[:2]
    mask = inputs.get("attention_mask")
    mask = torch.ones((rows, prompt), dtype=torch.int64) if mask is None else mask
    mask = mask.to(embeddings.device)
    positions = inputs.get("position_ids")
    over_images = {name: inputs[name] for name in ("cross_attention_mask", "image_attention_mask") if name in inputs}
    beside = None if runtime.merges else features
    while True:
        now: dict[str, Tensor] = {"inputs_embeds": embeddings, "attention_mask": mask}
        if positions is not None:
            now["position_ids"] = positions.to(embeddings.device)
        for name, seen in over_images.items():  # a new token sees what the one before it sees
            more = seen[:, -1:].repeat_interleave(embeddings.shape[1] - prompt, dim=1)
            now[name] = torch.cat((seen, more), dim=1)
        sequences = runtime.prefill(now, beside, max_length=embeddings.shape[1])
        tokens = yield sequences.logits
        embeddings = torch.cat((embeddings, runtime.embed({"input_ids": tokens[:, None]}, None)), dim=1)
        mask = torch.cat((mask, mask.new_ones((rows, 1))), dim=1)
        if positions is not None:
            positions = torch.cat((positions.to(embeddings.device), sequences.positions[:, None]), dim=1)


def with_defaults(config: GenerationConfig, **ids: Any) -> GenerationConfig:
    """Fill in end, padding and start ids that the settings do not have."""
    values = {key: value for key, value in ids.items() if value is not None and not getattr(config, key)}
    if "eos_token_id" in values:
        values["eos_token_id"] = _ids(values["eos_token_id"])
    if config.pad_token_id is not None:
        values.pop("pad_token_id", None)
    return replace(config, **values)
