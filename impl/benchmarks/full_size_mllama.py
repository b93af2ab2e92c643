"""The full-size Llama-3.2-11B-Vision configuration, random weights, open gates: does it fit and run, is a cut right?

Without options: every tensor of the 10.7 billion parameters is made in bfloat16, one layer after the other and each in
its own storage; then a short text, the vision model over one image of four tiles, a prefill that reads it and two
decode steps run, and peak memory and seconds are printed.

With `--cut`: a model of full width with four text layers, the last of them cross-attention, and a few vision layers is
made, saved, and loaded here and by the installed transformers, which has to be 4.45.2. Gold is transformers in float64
with its float32 islands (norms, rotary tables, logits) lifted. The error of a model is the largest difference from gold
over the largest value of gold, for the logits of all positions; the budget is twice the error of transformers in the
same dtype, the worse of its two kinds of attention, and `worst` is error / budget, so that 1.0 is on the limit.
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

from vlmqual_impl.api.mllama import MllamaForConditionalGeneration
from vlmqual_impl.configs import MllamaConfig
from vlmqual_impl.models.mllama import Mllama
from vlmqual_impl.runtime.eager_mllama import MllamaRuntime

DOCUMENTED = "4.45.2"
DTYPES = ("float32", "bfloat16")
ATTENTION = ("eager", "sdpa")
TEXT_TOKENS = 16
BEFORE_IMAGE = 4


def configuration(
    text_layers: int = 40, crossing: Sequence[int] = (3, 8, 13, 18, 23, 28, 33, 38), vision_layers: int = 32,
    global_layers: int = 8, kept: Sequence[int] = (3, 7, 15, 23, 30), vocabulary: int = 128256,
) -> MllamaConfig:  # fmt: skip
    """Sizes of the released 11B model, fewer layers and words where asked for."""
    text = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": text_layers,
        "cross_attention_layers": list(crossing),
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": vocabulary,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 4,
    }
    vision = {
        "image_size": 560,
        "num_hidden_layers": vision_layers,
        "num_global_layers": global_layers,
        "intermediate_layers_indices": list(kept),
    }
    return MllamaConfig(vision, text, image_token_index=vocabulary)


def example(config: MllamaConfig, seed: int) -> dict[str, Tensor]:
    """One image of noise in 2 x 2 tiles, some text before its marker and some after it."""
    generator = torch.Generator().manual_seed(seed)
    vision, words = config.vision_config, config.text_config.vocab_size
    ids = torch.randint(0, words, (1, TEXT_TOKENS), generator=generator)
    ids[0, BEFORE_IMAGE] = config.image_token_index
    seen = torch.zeros((1, TEXT_TOKENS, 1, vision.max_num_tiles), dtype=torch.int64)
    seen[:, BEFORE_IMAGE:] = 1
    shape = (1, 1, vision.max_num_tiles, vision.num_channels, vision.image_size, vision.image_size)
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(shape, generator=generator),
        "aspect_ratio_ids": torch.tensor([[vision.supported_aspect_ratios.index([2, 2]) + 1]]),
        "aspect_ratio_mask": torch.ones((1, 1, vision.max_num_tiles), dtype=torch.int64),
        "cross_attention_mask": seen,
    }


def run_full(seed: int) -> int:
    """Build the whole model and run it; the exit code."""
    config = configuration()
    with torch.device("meta"):
        model = Mllama(config)
    nbytes = timed("build", lambda: materialize(model, torch.bfloat16, seed))
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    count, tensors = sum(p.numel() for p in model.parameters()), sum(1 for _ in model.parameters())
    print(f"parameters {count:,} in {tensors} tensors, {len(storages)} storages, {nbytes / 2**30:.2f} GiB", flush=True)
    runtime, inputs = MllamaRuntime(model.eval()), example(config, seed)
    text = {"input_ids": inputs["input_ids"][:, :BEFORE_IMAGE]}
    step = timed(f"text of {BEFORE_IMAGE} tokens", lambda: runtime.prefill(text, max_length=BEFORE_IMAGE + 1))
    step = timed("its decode step", lambda: runtime.decode(step, step.logits.argmax(-1)))
    finite = bool(torch.isfinite(step.logits).all())
    features = timed("vision, 4 tiles", lambda: runtime.encode(inputs))
    length = inputs["input_ids"].shape[1]
    step = timed(f"prefill {length} tokens", lambda: runtime.prefill(inputs, features, max_length=length + 2))
    for index in (1, 2):
        tokens = step.logits.argmax(-1)
        step = timed(f"decode step {index}", partial(runtime.decode, step, tokens))
    finite &= bool(torch.isfinite(step.logits).all())
    print(f"logits {tuple(step.logits.shape)} {step.logits.dtype}, {'finite' if finite else 'NOT FINITE'}")
    return 0 if finite and len(storages) == tensors else 1


@contextmanager
def lifted() -> Iterator[None]:
    """Transformers' norms, rotary tables and logits stay in float64."""
    from transformers.models.mllama import modeling_mllama

    as_float, forward = torch.Tensor.float, modeling_mllama.MllamaTextRMSNorm.forward

    def norm(self: Any, x: Tensor) -> Tensor:
        scaled: Tensor = self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))
        return scaled

    setattr(torch.Tensor, "float", torch.Tensor.double)  # noqa: B010  # mypy takes no assignment to it
    setattr(modeling_mllama.MllamaTextRMSNorm, "forward", norm)  # noqa: B010  # mypy takes no assignment to it
    try:
        yield
    finally:
        setattr(torch.Tensor, "float", as_float)  # noqa: B010  # mypy takes no assignment to it
        setattr(modeling_mllama.MllamaTextRMSNorm, "forward", forward)  # noqa: B010  # mypy takes no assignment to it


def reference_logits(directory: Path, dtype: torch.dtype, attention: str, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of the installed transformers."""
    import transformers

    model: Any = transformers.MllamaForConditionalGeneration.from_pretrained(
        directory, torch_dtype=dtype, attn_implementation=attention
    )
    with torch.no_grad():
        logits: Tensor = model.eval()(**inputs).logits
    return logits.double()


def our_logits(directory: Path, dtype: torch.dtype, attention: str, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of the bundled model."""
    model = MllamaForConditionalGeneration.from_pretrained(directory, dtype=dtype, attn_implementation=attention)
    with torch.no_grad():
        found: Tensor = model(**inputs).logits.double()
    return found


def save_random(config: MllamaConfig, seed: int, directory: Path) -> None:
    """Write a checkpoint of random weights in bfloat16."""
    with torch.device("meta"):
        model = MllamaForConditionalGeneration(config)
    materialize(model, torch.bfloat16, seed)
    model.save_pretrained(directory, max_shard_size="2GB")


def run_cut(seed: int, directory: Path, dtypes: Sequence[str], attentions: Sequence[str]) -> int:
    """Compare a cut of full width with transformers; the exit code."""
    import transformers

    if transformers.__version__ != DOCUMENTED:
        print(
            f"transformers {transformers.__version__} is installed; the cut is compared with {DOCUMENTED}",
            file=sys.stderr,
        )
        return 2
    config = configuration(4, (3,), 4, 1, (0, 1, 2, 3, 4), vocabulary=16384)
    timed("build and save", lambda: save_random(config, seed, directory))
    gc.collect()
    inputs = example(config, seed)
    with lifted():
        wide = {**inputs, "cross_attention_mask": inputs["cross_attention_mask"].double()}
        gold = timed("transformers float64", lambda: reference_logits(directory, torch.float64, "sdpa", wide))
    largest, failed = gold.abs().max(), 0
    print(f"transformers {DOCUMENTED}, logits {tuple(gold.shape)}, largest {float(largest):.3f}", flush=True)
    blind = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1)}
    for name in dtypes:
        dtype, errors = getattr(torch, name), {}
        for who, logits in (("transformers", reference_logits), ("bundled", our_logits)):
            for attention in attentions:
                gc.collect()
                found = timed(f"{who} {name} {attention}", partial(logits, directory, dtype, attention, inputs))
                errors[who, attention] = float((found - gold).abs().max() / largest)
        noise = max(errors["transformers", attention] for attention in attentions)
        for attention in attentions:
            worst = errors["bundled", attention] / (2 * noise)
            failed += worst > 1
            error = errors["bundled", attention]
            print(f"    {name} {attention}: error {error:.3e}, noise {noise:.3e}, worst {worst:.2f}", flush=True)
    other = our_logits(directory, torch.float32, "sdpa", blind)
    away = float((other - gold).abs().max() / largest)
    print(f"another image moves the logits by {away:.3e}; peak {peak_gib():.2f} GiB")
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse arguments and run; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cut", action="store_true", help="compare a cut of full width with transformers 4.45.2")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="with --cut: only this (default: both)")
    parser.add_argument(
        "--attention",
        action="append",
        choices=ATTENTION,
        help="with --cut: only this kind (default: both)",
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
