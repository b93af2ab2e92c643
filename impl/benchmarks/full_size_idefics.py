"""The full-size Idefics-9B configuration, random weights, open gates: does it fit and run, is a cut right?

Without options: every tensor of its parameters is made in bfloat16, one layer after the other and each in its own
storage; then vision tower and resampler over one image of 224 pixels, a prefill that reads it and two decode steps run,
and peak memory and seconds are printed.

With `--cut`: a model of full width with two decoder layers, a gated cross-attention block before each, two vision
layers and two resampler blocks is made, saved, and loaded here and by the installed transformers, which has to be
4.46.3. Gold is transformers in float64 with its float32 islands (norms, rotary tables) lifted. The error of a model is
the largest difference from gold over the largest value of gold, for the logits of all positions; the budget is twice
the error of transformers in the same dtype (it has one kind of attention), and `worst` is error / budget, so 1.0 is on
the limit.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from full_size import materialize, peak_gib, timed
from torch import Tensor

from vlmqual_impl.configs import IdeficsConfig
from vlmqual_impl.models.idefics import RENAME, Idefics
from vlmqual_impl.runtime.eager_idefics import MASK, IdeficsRuntime
from vlmqual_impl.weights import load, save

DOCUMENTED = "4.46.3"
DTYPES = ("float32", "bfloat16")
ATTENTION = ("eager", "sdpa")
TOKENS = 16
BEFORE_IMAGE = 4


def configuration(
    layers: int = 32, interval: int = 4, vision_layers: int = 32, depth: int = 6, vocabulary: int = 32000
) -> IdeficsConfig:
    """Sizes of the released 9B model, fewer layers and words where asked for."""
    return IdeficsConfig(
        vocab_size=vocabulary,
        additional_vocab_size=2,
        num_hidden_layers=layers,
        cross_layer_interval=interval,
        qk_layer_norms=True,
        alpha_type="vector",
        use_resampler=True,
        vision_config={"embed_dim": 1280, "num_hidden_layers": vision_layers},
        perceiver_config={"resampler_depth": depth, "qk_layer_norms_perceiver": True},
    )


def example(config: IdeficsConfig, seed: int) -> dict[str, Tensor]:
    """One image of noise, some text before it and some after it."""
    generator = torch.Generator().manual_seed(seed)
    side = config.vision_config.image_size
    ids = torch.randint(3, config.vocab_size, (1, TOKENS), generator=generator)
    ids[0, BEFORE_IMAGE : BEFORE_IMAGE + 3] = torch.tensor([0, 1, 0]) + config.vocab_size
    seen = torch.zeros((1, TOKENS, 1), dtype=torch.int64)
    seen[:, BEFORE_IMAGE + 1 :] = 1
    pixels = torch.randn((1, 1, 3, side, side), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, MASK: seen}


def run_full(seed: int) -> int:
    """Build the whole model and run it; the exit code."""
    config = configuration()
    with torch.device("meta"):
        model = Idefics(config)
    nbytes = timed("build", lambda: materialize(model, torch.bfloat16, seed))
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    count, tensors = sum(p.numel() for p in model.parameters()), sum(1 for _ in model.parameters())
    print(f"parameters {count:,} in {tensors} tensors, {len(storages)} storages, {nbytes / 2**30:.2f} GiB", flush=True)
    runtime, inputs = IdeficsRuntime(model.eval()), example(config, seed)
    features = timed("vision, 1 image", lambda: runtime.encode(inputs))
    step = timed(f"prefill {TOKENS} tokens", lambda: runtime.prefill(inputs, features, max_length=TOKENS + 2))
    for index in (1, 2):
        step = timed(f"decode step {index}", partial(runtime.decode, step, step.logits.argmax(-1)))
    finite = bool(torch.isfinite(step.logits).all())
    print(f"logits {tuple(step.logits.shape)} {step.logits.dtype}, {'finite' if finite else 'NOT FINITE'}")
    return 0 if finite and len(storages) == tensors else 1


@contextmanager
def lifted() -> Iterator[None]:
    """Transformers' norms and rotary tables are made in float64."""
    from transformers.models.idefics import modeling_idefics

    forward, tables = modeling_idefics.IdeficsRMSNorm.forward, modeling_idefics.IdeficsEmbedding.forward

    def norm(self: Any, x: Tensor) -> Tensor:
        scaled: Tensor = self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))
        return scaled

    def rotary(self: Any, x: Tensor, seq_len: int) -> tuple[Tensor, Tensor]:
        exponents = torch.arange(0, self.dim, 2, dtype=torch.float64) / self.dim
        angles = torch.outer(torch.arange(seq_len, dtype=torch.float64), self.base**-exponents)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()

    setattr(modeling_idefics.IdeficsRMSNorm, "forward", norm)  # noqa: B010  # mypy takes no assignment to it
    setattr(modeling_idefics.IdeficsEmbedding, "forward", rotary)  # noqa: B010  # as above
    try:
        yield
    finally:
        setattr(modeling_idefics.IdeficsRMSNorm, "forward", forward)  # noqa: B010  # as above
        setattr(modeling_idefics.IdeficsEmbedding, "forward", tables)  # noqa: B010  # as above


def reference_logits(directory: Path, dtype: torch.dtype, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of the installed transformers."""
    import transformers

    model: Any = transformers.IdeficsForVisionText2Text.from_pretrained(directory, torch_dtype=dtype)
    with torch.no_grad():
        logits: Tensor = model.eval()(**inputs).logits
    return logits.double()


@torch.no_grad()
def our_logits(directory: Path, dtype: torch.dtype, attention: str, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of the bundled model."""
    with torch.device("meta"):
        model = Idefics(IdeficsConfig.from_pretrained(directory))
    load(model, directory, rename=RENAME, dtype=dtype)
    model.model.implementation = attention
    runtime = IdeficsRuntime(model.eval())
    return runtime.head(runtime.prefill(inputs, max_length=TOKENS).hidden).double()


def save_random(config: IdeficsConfig, seed: int, directory: Path) -> None:
    """Write a checkpoint of random weights in bfloat16."""
    with torch.device("meta"):
        model = Idefics(config)
    materialize(model, torch.bfloat16, seed)
    save(model, directory, "2GB")
    config.replace(torch_dtype="bfloat16").save_pretrained(directory)


def run_cut(seed: int, directory: Path, dtypes: Sequence[str], attentions: Sequence[str]) -> int:
    """Compare a cut of full width with transformers; the exit code."""
    import transformers

    if transformers.__version__ != DOCUMENTED:
        print(
            f"transformers {transformers.__version__} is installed; the cut is compared with {DOCUMENTED}",
            file=sys.stderr,
        )
        return 2
    config = configuration(2, 1, 2, 2, vocabulary=8192)
    timed("build and save", lambda: save_random(config, seed, directory))
    gc.collect()
    inputs = example(config, seed)
    with lifted():
        gold = timed("transformers float64", lambda: reference_logits(directory, torch.float64, inputs))
    largest, failed = gold.abs().max(), 0
    print(f"transformers {DOCUMENTED}, logits {tuple(gold.shape)}, largest {float(largest):.3f}", flush=True)
    for name in dtypes:
        dtype = getattr(torch, name)
        gc.collect()
        theirs = timed(f"transformers {name}", partial(reference_logits, directory, dtype, inputs))
        noise = float((theirs - gold).abs().max() / largest)
        for attention in attentions:
            gc.collect()
            ours = timed(f"bundled {name} {attention}", partial(our_logits, directory, dtype, attention, inputs))
            error = float((ours - gold).abs().max() / largest)
            worst = error / (2 * noise)
            failed += worst > 1
            print(f"    {name} {attention}: error {error:.3e}, noise {noise:.3e}, worst {worst:.2f}", flush=True)
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}
    away = float((our_logits(directory, torch.float32, "sdpa", other) - gold).abs().max() / largest)
    print(f"another image moves the logits by {away:.3e}; peak {peak_gib():.2f} GiB")
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse arguments and run; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cut", action="store_true", help="compare a cut of full width with transformers 4.46.3")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="with --cut: only this (default: both)")
    parser.add_argument(
        "--attention", action="append", choices=ATTENTION, help="with --cut: only this kind of ours (default: both)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs")
    parser.add_argument("--directory", type=Path, help="keep the cut's checkpoint here (default: a temporary folder)")
    args = parser.parse_args(argv)
    if not args.cut:
        return run_full(args.seed)
    if args.directory is not None:
        return run_cut(args.seed, args.directory, args.dtype or DTYPES, args.attention or ATTENTION)
    with tempfile.TemporaryDirectory() as folder:
        return run_cut(args.seed, Path(folder), args.dtype or DTYPES, args.attention or ATTENTION)


if __name__ == "__main__":
    sys.exit(main())
