"""What the documented model classes answer with, and the loss.

Legend of shapes: B rows, S token positions, D width, H heads, K key positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from vlmqual_impl.cache import KeyValueCache


class LabelError(IndexError, ValueError):
    """A label that is neither -100 nor a token id."""


@dataclass
class ModelOutput:
    """Named results, also reached by position; results that are None have no position and no name in `keys()`."""

    def _present(self) -> dict[str, Any]:
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def to_tuple(self) -> tuple[Any, ...]:
        """The results that are there, in order."""
        return tuple(self._present().values())

    def keys(self) -> tuple[str, ...]:
        """Names of the results that are there."""
        return tuple(self._present())

    def values(self) -> tuple[Any, ...]:
        """The same as `to_tuple`."""
        return self.to_tuple()

    def items(self) -> ItemsView[str, Any]:
        """Names and results."""
        return self._present().items()

    def get(self, name: str, default: Any = None) -> Any:
        """A result by name."""
        return self._present().get(name, default)

    def __getitem__(self, key: int | slice | str) -> Any:
        return self._present()[key] if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._present())

    def __contains__(self, name: object) -> bool:
        return name in self._present()

    def __len__(self) -> int:
        return len(self._present())


@dataclass
class BaseModelOutput(ModelOutput):
    """Result of a vision model.

    Attributes:
        last_hidden_state: Mllama (B, N, T, L, width).
        hidden_states: states of both encoders, the local one first.
        attentions: weights of every layer of both encoders.
    """

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class BaseModelOutputWithPast(ModelOutput):
    """Result of a text model without head.

    Attributes:
        last_hidden_state: (B, S, D).
        past_key_values: the cache.
        hidden_states: one (B, S, D) for the embeddings and one for each layer, the last after the final norm.
        attentions: one (B, H, S, K) for each layer that ran.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: KeyValueCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class CausalLMOutputWithPast(ModelOutput):
    """Result of a model with head.

    Attributes:
        loss: scalar, only with labels.
        logits: (B, S, V).
        past_key_values: the cache.
        hidden_states: as without head.
        attentions: as without head.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: KeyValueCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def next_token_loss(logits: Tensor, labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Mean cross entropy of every position's logits against the next position's label.

    Args:
        logits: (B, S, V).
        labels: (B, S) int64; -100 is ignored (IDEFICS3-LM-006).
        attention_mask: (B, S or more); targets on padding are dropped, as the documented version does
            (IDEFICS3-LM-009).

    Raises:
        ValueError: the shapes differ.
        LabelError: a label is outside the vocabulary.
    """
    if labels.shape != logits.shape[:2]:
        raise ValueError(f"labels is {tuple(labels.shape)}; it has to be {tuple(logits.shape[:2])} like the tokens")
    targets = labels.to(logits.device)[:, 1:]
    wrong = targets[(targets != -100) & ((targets < 0) | (targets >= logits.shape[-1]))]
    if wrong.numel():
        raise LabelError(f"labels holds {int(wrong[0])}; valid are 0 to {logits.shape[-1] - 1}, and -100 to ignore")
    if attention_mask is not None and targets.shape[1]:
        kept = attention_mask[:, -targets.shape[1] :].to(logits.device) != 0
        targets = targets.masked_fill(~kept, -100)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100)
