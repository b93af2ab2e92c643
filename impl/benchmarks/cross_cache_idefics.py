"""What caching the keys and values of images is worth in Idefics' decode: cached and computed anew, side by side.

A cut of the 9B model in full width (32 heads of 128, vision features 1,280 wide, a gated cross-attention block before
every fourth decoder layer; as many decoder layers as asked for), random weights, open gates, one row. After a prefill
with features of some images, decode steps run alternately in two ways: with the keys and values that the prefill left
in the cache, and with the features given anew, so that every block projects them again, as transformers does at every
step. Both have to choose the same tokens. Printed are the median seconds of a step in both ways and the median over the
pairs of (computed anew / cached), with the smallest and largest pair.

With `--reference` the installed transformers runs the same weights and tokens in the same process and is paired too.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from full_size import materialize
from torch import Tensor

from vlmqual_impl.configs import IdeficsConfig
from vlmqual_impl.models import idefics
from vlmqual_impl.models.idefics import Idefics
from vlmqual_impl.runtime.eager_idefics import IdeficsRuntime
from vlmqual_impl.weights import save

PROMPT = 32
LATENTS = 64


def configuration(layers: int, resampler: bool) -> IdeficsConfig:
    """The 9B model's widths, with fewer layers; the vision side as small as it can be, since only its width counts."""
    return IdeficsConfig(
        vocab_size=4096,
        additional_vocab_size=2,
        num_hidden_layers=layers,
        cross_layer_interval=4,
        qk_layer_norms=True,
        alpha_type="vector",
        alpha_initializer="ones",
        use_resampler=resampler,
        vision_config={"embed_dim": 1280, "num_hidden_layers": 1},
        perceiver_config={"resampler_depth": 1, "resampler_n_latents": LATENTS, "qk_layer_norms_perceiver": True},
    )


class Pair:
    """One model and prompt, to be decoded in two ways from the same state."""

    def __init__(self, model: Idefics, images: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        config = model.config
        tokens = LATENTS if config.use_resampler else config.vision_config.num_patches + 1
        shape = (1, images, tokens, config.vision_config.embed_dim)
        self.runtime = IdeficsRuntime(model)
        self.features = torch.randn(shape, generator=generator).to(self.runtime.dtype)
        self.ids = torch.randint(3, config.vocab_size, (1, PROMPT), generator=generator)
        self.mask = torch.zeros((1, PROMPT, images), dtype=torch.int64)
        self.mask[:, 4:] = 1

    def prompt(self) -> dict[str, Tensor]:
        """Inputs of the prefill."""
        return {"input_ids": self.ids, "image_attention_mask": self.mask}

    def cached(self, steps: int) -> tuple[list[float], list[int]]:
        """Seconds and tokens of decode steps that read the cache."""
        state = self.runtime.prefill(self.prompt(), self.features, max_length=PROMPT + steps + 1)
        seconds, tokens = [], []
        for _ in range(steps):
            token = state.logits.argmax(-1)
            start = time.perf_counter()
            state = self.runtime.decode(state, token)
            seconds.append(time.perf_counter() - start)
            tokens.append(int(token))
        return seconds, tokens

    @torch.no_grad()
    def anew(self, steps: int) -> tuple[list[float], list[int]]:
        """Seconds and tokens of decode steps that project the features again."""
        state = self.runtime.prefill(self.prompt(), self.features, max_length=PROMPT + steps + 1)
        trunk, cache = self.runtime.trunk, state.cache
        logits, seconds, tokens = state.logits, [], []
        for index in range(steps):
            token = logits.argmax(-1)
            start = time.perf_counter()
            x = trunk.embed_tokens(token[:, None])
            images = idefics.images_for(trunk, self.features, self.mask[:, -1:], x)
            positions = torch.tensor([[PROMPT + index]])
            logits = self.runtime.head(idefics.run(trunk, x, positions, None, cache, images)[:, -1])
            seconds.append(time.perf_counter() - start)
            tokens.append(int(token))
        return seconds, tokens

    @torch.no_grad()
    def reference(self, model: Any, steps: int) -> tuple[list[float], list[int]]:
        """The same with transformers' own forward."""
        name = idefics.features_name(self.runtime.model.config)
        given = {name: self.features, "use_cache": True}
        output = model(input_ids=self.ids, image_attention_mask=self.mask, **given)
        seconds, tokens = [], []
        for index in range(steps):
            token = output.logits[:, -1].argmax(-1)
            start = time.perf_counter()
            output = model(
                input_ids=token[:, None],
                position_ids=torch.tensor([[PROMPT + index]]),
                past_key_values=output.past_key_values,
                image_attention_mask=self.mask[:, -1:],
                **given,
            )
            seconds.append(time.perf_counter() - start)
            tokens.append(int(token))
        return seconds, tokens


Way = Callable[[int], tuple[list[float], list[int]]]


def compare(name: str, cached: Way, other: Way, steps: int, rounds: int) -> bool:
    """Run both ways in turn, print the ratio; whether both chose the same tokens."""
    cached(2), other(2)  # touch everything once
    ratios: list[float] = []
    both: tuple[list[float], list[float]] = ([], [])
    same = True
    for index in range(rounds):
        order = (cached, other) if index % 2 == 0 else (other, cached)
        runs = {way: way(steps) for way in order}
        same &= runs[cached][1] == runs[other][1]
        pair = statistics.median(runs[cached][0]), statistics.median(runs[other][0])
        both[0].append(pair[0])
        both[1].append(pair[1])
        ratios.append(pair[1] / pair[0])
    a, b = (1000 * statistics.median(side) for side in both)
    ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    print(f"{name:<46} {a:9.2f} {b:9.2f}  {ratio}{'' if same else '  TOKENS DIFFER'}", flush=True)
    return same


def main(argv: Sequence[str] | None = None) -> int:
    """Parse arguments and run; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, action="append", help="of the row; may be repeated (default: 1, 4)")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers, a multiple of 4 (default: 4)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=8, help="decode steps of a run (default: 8)")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of runs (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs")
    parser.add_argument("--reference", action="store_true", help="pair the installed transformers too")
    args = parser.parse_args(argv)
    if args.layers < 4 or args.layers % 4:
        parser.error(f"--layers {args.layers}: it has to be a positive multiple of 4")
    same = True
    print(f"{args.dtype}, {args.layers} decoder layers, {args.layers // 4} gated, {torch.get_num_threads()} threads")
    print(f"{'':<46} {'cached':>9} {'other':>9}  other / cached, median (range); milliseconds of a step")
    for resampler in (False, True):
        with torch.device("meta"):
            model = Idefics(configuration(args.layers, resampler))
        materialize(model, getattr(torch, args.dtype), args.seed)
        model.eval()
        for images in args.images or (1, 4):
            pair = Pair(model, images, args.seed)
            kind = "resampler" if resampler else "no resampler"
            label = f"{kind}, {images} image(s), {pair.features.shape[2]} features"
            same &= compare(f"{label}: anew", pair.cached, pair.anew, args.steps, args.rounds)
            if args.reference:
                theirs = loaded(model, args.dtype)
                way = partial(pair.reference, theirs)
                same &= compare("    transformers", pair.cached, way, args.steps, args.rounds)
    return 0 if same else 1


def loaded(model: Idefics, dtype: str) -> Any:
    """The installed transformers' model with the same weights."""
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder))
        model.config.replace(torch_dtype=dtype).save_pretrained(folder)
        found: Any = transformers.IdeficsForVisionText2Text.from_pretrained(folder, torch_dtype=getattr(torch, dtype))
    return found.eval()


if __name__ == "__main__":
    sys.exit(main())
