"""What a request would compile, run and keep, found by running it in outline (see `recording`); no weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vlmqual_contract.errors import UsageError
from vlmqual_contract.footprint import Graph
from vlmqual_contract.target import Model, Options, Prompt
from vlmqual_impl.target import checked
from vlmqual_impl.target_session import EagerSession

if TYPE_CHECKING:
    import torch

    from vlmqual_impl.recording import Recorder
    from vlmqual_impl.runtime.graphs import Shapes

UNCOUNTED = "activations and what a compiler adds are not counted"


@dataclass(frozen=True)
class Outline:
    """A request in outline.

    Attributes:
        recorder: what was called.
        whole_bytes: of all weights on one of the tensor-parallel ranks.
        tokens: of the prompts with their padding, all rows together.
    """

    recorder: Recorder
    whole_bytes: int
    tokens: int

    def graphs(self) -> tuple[Graph, ...]:
        """The functions in the order of their first call."""
        return tuple(
            Graph(
                entry.name,
                tuple(str(spec) for spec in (*entry.inputs, *entry.states)),
                recorded.calls,
                entry.weights_bytes,
            )
            for recorded in self.recorder.programs.values()
            for entry in (recorded.entry,)
        )


def outline(
    model: Model,
    options: Options,
    prompts: Sequence[Prompt],
    new_tokens: int,
    *,
    dtype: torch.dtype,
    attention: str,
    shapes: Shapes,
    paged: bool = False,
) -> Outline:
    """Run a request in outline: preprocess, vision, prefill, decode.

    Args:
        model: a checkpoint; its configuration and processor files are enough.
        options: tp divides what `whole_bytes` counts.
        prompts: the rows.
        new_tokens: the first comes from the prefill, the others from decode steps.
        dtype: of weights and activations.
        attention: kind, as for loading.
        shapes: the fixed ones.
        paged: the form of text functions; see `vlmqual_impl.paged`.

    Raises:
        UsageError: the checkpoint or a prompt is not valid, or the request does not fit `options.max_length`.
    """
    from vlmqual_impl import tp
    from vlmqual_impl.graphs import GRAPHS
    from vlmqual_impl.recording import Recorder, hollow
    from vlmqual_impl.runtime.graphs import GraphRuntime
    from vlmqual_impl.weights import unfilled

    directory, values, config, family = checked(model, options)
    try:
        if any(directory.glob("*.safetensors")):
            config = family.prepared(config, values, directory)
        with unfilled():
            part, network = family.network(config), family.network(config)
        if options.tp > 1:
            tp.shard(part, family.plan, 0, options.tp)
        whole = sum(weight.numel() for weight in part.parameters()) * dtype.itemsize
        recorder = Recorder()
        runtime = GraphRuntime(GRAPHS[family.name](hollow(network, dtype).eval(), attention, paged), recorder, shapes)
        session = EagerSession(runtime, family, family.features(config), directory, options)
        inputs = session.preprocess(prompts)
        step = session.prefill(inputs)
        for _ in range(new_tokens - 1):
            step = session.decode(step, np.zeros(len(prompts), np.int64))
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    return Outline(recorder, whole, int(np.asarray(inputs["input_ids"]).size))
