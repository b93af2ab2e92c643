"""The session over optimum-rbln's Idefics3: the phases of the contract, each through the library's own calls.

Prefill is the class's documented forward. Its decode step takes the one batch size that the model was compiled for, so
steps go to the decoder of the number of rows, as the library's own language models do.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlmqual_adapters.transformers_session import Processing, TransformersFeatures, as_numpy, dtype_name
from vlmqual_contract.errors import Unsupported, UsageError
from vlmqual_contract.target import Array, Features, FloatArray, Inputs, IntArray, Step

FEATURES = "image_hidden_states"


class OptimumRblnStep:
    """Sequences in the model's cache, after a prefill or a decode step.

    Attributes:
        owner: the session.
        last: logits at the last position, (B, V), in the order of the request.
        lengths: positions in the cache of every row, (B,).
        order: row of the request that stands at each row of the cache, (B,).
        turn: which prefill of the session began the sequences.
        spent: True once it was decoded.
    """

    def __init__(self, owner: object, last: Any, lengths: IntArray, order: IntArray, turn: int) -> None:
        self.owner = owner
        self.last = last
        self.lengths = lengths
        self.order = order
        self.turn = turn
        self.spent = False

    @property
    def dtype(self) -> str:
        """Name of the dtype of the logits."""
        return dtype_name(self.last)

    def tokens(self) -> IntArray:
        """Greedy next tokens (B,)."""
        return np.asarray(self.last.argmax(dim=-1).numpy(), dtype=np.int64)

    def logits(self, all_positions: bool = False) -> FloatArray:
        """Logits at the last position (B, V).

        Raises:
            Unsupported: every position is asked for; the programs are compiled for the last one.
        """
        if all_positions:
            raise Unsupported("logits of all positions: the library compiles its programs for the last position")
        return as_numpy(self.last)

    def taps(self) -> Mapping[str, FloatArray]:
        """Nothing: what is inside of a compiled program cannot be seen."""
        return {}


class OptimumRblnSession(Processing):
    """The contract's Session over one compiled model. Its cache holds one batch: a prefill ends the batch before it."""

    def __init__(self, torch: Any, library: Any, model: Any, path: Path) -> None:
        super().__init__(library, path)
        self._torch = torch
        self._model = model
        self._turn = 0
        text = model.rbln_config.text_model
        self._rows = int(text.batch_size)
        self._positions = int(text.max_seq_len)
        self._sorted = bool(text.requires_batch_sort)

    def vision(self, inputs: Inputs) -> TransformersFeatures:
        """Run the library's image path, one frame after the other, up to the connector's output.

        Raises:
            UsageError: the inputs have no pixel values.
        """
        if "pixel_values" not in inputs:
            raise UsageError(f"vision needs pixel_values; the inputs are {', '.join(inputs) or 'empty'}")
        names = ("pixel_values", "pixel_attention_mask")
        with self._torch.inference_mode():
            hidden = self._model.get_image_features(
                **{name: self._tensor(inputs[name]) for name in names if name in inputs}
            )
        return TransformersFeatures(FEATURES, hidden)

    def prefill(self, inputs: Inputs, features: Features | Mapping[str, Array] | None = None) -> Step:
        """Run each row of the prompt through the chunks of the prefill program.

        Raises:
            UsageError: the inputs have no input_ids, or more rows than the model was compiled for.
            Unsupported: positions are given; the programs count them themselves.
        """
        if "input_ids" not in inputs:
            raise UsageError(f"prefill needs input_ids; the inputs are {', '.join(inputs) or 'empty'}")
        if "position_ids" in inputs:
            raise Unsupported("position_ids: the library's programs count positions themselves")
        if features is None and "pixel_values" in inputs:
            features = self.vision(inputs)
        ids = np.asarray(inputs["input_ids"])
        mask = np.asarray(inputs.get("attention_mask", np.ones_like(ids))) != 0
        if len(ids) > self._rows:
            raise UsageError(f"{len(ids)} rows: the model was compiled for {self._rows}")
        lengths = mask.sum(axis=1)
        order = np.argsort(-lengths, kind="stable") if self._sorted else np.arange(len(ids))
        ids, mask = padded_left(ids[order], mask[order])
        hidden = self._hidden(features)
        self._turn += 1
        with self._torch.inference_mode():
            output = self._model(
                input_ids=self._tensor(ids),
                attention_mask=self._tensor(mask.astype(np.int64)),
                image_hidden_states=None
                if hidden is None
                else self._by_row(hidden, np.asarray(inputs["input_ids"]), order),
                generate_idx=self._tensor(lengths[order][:, None].astype(np.int32)),
                return_dict=True,
                inputs_sorted=True,
            )
        return self._step(output.logits, lengths, order)

    def decode(self, step: Step, tokens: IntArray | None = None) -> Step:
        """Feed one token for every row through the decode program for as many rows.

        Raises:
            UsageError: the step is of another session, or was decoded before.
            Unsupported: a later prefill has taken its cache; the library has one for each model.
        """
        if not isinstance(step, OptimumRblnStep) or step.owner is not self:
            raise UsageError("decode needs a step of the same session")
        if step.spent:
            raise UsageError("this step was decoded before; its cache has gone on to the next step")
        if step.turn != self._turn:
            raise Unsupported("a later prefill has taken the cache of this step; the library has one for each model")
        step.spent = True
        torch = self._torch
        given = step.tokens() if tokens is None else np.asarray(tokens, dtype=np.int64)
        rows, positions = len(given), step.lengths[step.order]
        bucket = min(size for size in self._model.text_model.decoders if size >= rows)
        spare = [(0, bucket - rows)]  # rows that nobody asked for write at the start of blocks of their own
        with torch.inference_mode():
            output = self._model.text_model.decoders[bucket](
                input_ids=self._tensor(np.pad(given[step.order], spare)[:, None]),
                cache_position=self._tensor(np.pad(positions, spare)[:, None].astype(np.int32)),
            )
        return self._step(output.logits[:rows], step.lengths + 1, step.order)

    def synchronize(self) -> None:
        """Nothing: the library's calls return when their results are there."""

    def _step(self, logits: Any, lengths: IntArray, order: IntArray) -> OptimumRblnStep:
        """The step with logits (B, 1, V) put into the order of the request; copied, since buffers are used again."""
        last = self._torch.empty_like(logits[:, -1])
        last[self._tensor(order)] = logits[:, -1]
        return OptimumRblnStep(self, last, lengths, order, self._turn)

    def _hidden(self, features: Features | Mapping[str, Array] | None) -> Any:
        if features is None:
            return None
        if isinstance(features, TransformersFeatures):
            return features.hidden
        arrays = features if isinstance(features, Mapping) else features.arrays()
        if FEATURES not in arrays:
            raise UsageError(f"features need {FEATURES}; there are {', '.join(arrays) or 'none'}")
        return self._tensor(arrays[FEATURES]).to(self._model.dtype)

    def _by_row(self, hidden: Any, ids: IntArray, order: IntArray) -> Any:
        """Frames (F, L, D) of the rows in this order."""
        if not self._sorted:
            return hidden
        counts = (ids == self._model.config.image_token_id).sum(axis=1) // hidden.shape[1]
        parts = self._torch.split(hidden, counts.tolist())
        return self._torch.cat([parts[row] for row in order])

    def _tensor(self, array: Array) -> Any:
        return self._torch.from_numpy(np.array(array))


def padded_left(ids: IntArray, mask: Array) -> tuple[IntArray, Array]:
    """Ids and mask (B, S) with the padding on the left of each row, the only side that the library takes."""
    made, kept = np.zeros_like(ids), np.zeros_like(mask)
    for row, real in enumerate(mask):
        start = ids.shape[1] - int(real.sum())
        made[row, start:], kept[row, start:] = ids[row, real], True
    return made, kept
