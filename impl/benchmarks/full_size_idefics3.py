"""The full-size Idefics3-8B configuration with random weights: does it fit, does it run, and is a cut of it right?

Without options: every tensor of the 8.5 billion parameters is made in bfloat16, one layer after the other and each in
its own storage; then one short prefill with one image frame and two decode steps run, and peak memory and seconds are
printed.

With `--cut N`: a model of full width with N text and N vision layers is made, saved, and loaded here and by the
installed transformers. Gold is transformers in float64 with its float32 islands (norms, softmax) lifted. The error of a
model is the largest difference from gold over the largest value of gold, for the logits of all positions; the budget is
twice the error of transformers in the same dtype, and `worst` is error / budget, so that 1.0 is on the limit.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from full_size import materialize, peak_gib, timed
from torch import Tensor, nn

from vlmqual_impl.api.idefics3 import Idefics3ForConditionalGeneration
from vlmqual_impl.configs import Idefics3Config
from vlmqual_impl.models.idefics3 import Idefics3
from vlmqual_impl.runtime.eager_idefics3 import Idefics3Runtime

IMAGE_TOKEN = 128257
TEXT_TOKENS = 24


def configuration(text_layers: int = 32, vision_layers: int = 27) -> Idefics3Config:
    """Sizes of the released 8B model."""
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    text = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": text_layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128259,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": scaling,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "pad_token_id": 128002,
    }
    vision = {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": vision_layers,
        "num_attention_heads": 16,
        "image_size": 364,
        "patch_size": 14,
    }
    return Idefics3Config(image_token_id=IMAGE_TOKEN, text_config=text, vision_config=vision, scale_factor=2)


def example(config: Idefics3Config, seed: int) -> dict[str, Tensor]:
    """One frame of noise among random text tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 128000, (1, TEXT_TOKENS + config.tokens_per_frame), generator=generator)
    ids[0, 4 : 4 + config.tokens_per_frame] = IMAGE_TOKEN
    side = config.vision_config.image_size
    return {"input_ids": ids, "pixel_values": torch.randn((1, 1, 3, side, side), generator=generator)}


def run_full(seed: int) -> int:
    """Build the whole model and run it; the exit code."""
    config = configuration()
    with torch.device("meta"):
        model = Idefics3(config)
    nbytes = timed("build", lambda: materialize(model, torch.bfloat16, seed))
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    count = sum(parameter.numel() for parameter in model.parameters())
    tensors = sum(1 for _ in model.parameters())
    print(f"parameters {count:,} in {tensors} tensors, {len(storages)} storages, {nbytes / 2**30:.2f} GiB", flush=True)
    runtime, inputs = Idefics3Runtime(model.eval()), example(config, seed)
    features = timed("vision", lambda: runtime.encode(inputs))
    length = inputs["input_ids"].shape[1]
    step = timed(f"prefill {length} tokens", lambda: runtime.prefill(inputs, features, max_length=length + 2))
    for index in (1, 2):
        tokens = step.logits.argmax(-1)
        step = timed(f"decode step {index}", partial(runtime.decode, step, tokens))
    finite = bool(torch.isfinite(step.logits).all())
    print(f"logits {tuple(step.logits.shape)} {step.logits.dtype}, {'finite' if finite else 'NOT FINITE'}")
    return 0 if finite and len(storages) == tensors else 1


def reference_logits(directory: Path, dtype: torch.dtype, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of the installed transformers; in float64 its norms and softmax are computed in float64 too."""
    import transformers
    from transformers.models.llama import modeling_llama

    softmax, forward = nn.functional.softmax, modeling_llama.LlamaRMSNorm.forward

    def norm(self: Any, x: Tensor) -> Tensor:
        scaled: Tensor = self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))
        return scaled

    if dtype == torch.float64:
        setattr(nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim=dim))  # noqa: B010  # mypy takes no assignment to it
        setattr(modeling_llama.LlamaRMSNorm, "forward", norm)  # noqa: B010  # mypy takes no assignment to it
    try:
        model: Any = transformers.Idefics3ForConditionalGeneration.from_pretrained(
            directory, torch_dtype=dtype, attn_implementation="eager", low_cpu_mem_usage=True
        )
        with torch.no_grad():
            logits: Tensor = model.eval()(**inputs).logits
        return logits.double()
    finally:
        setattr(nn.functional, "softmax", softmax)  # noqa: B010  # mypy takes no assignment to it
        setattr(modeling_llama.LlamaRMSNorm, "forward", forward)  # noqa: B010  # mypy takes no assignment to it


def our_logits(directory: Path, dtype: torch.dtype, inputs: dict[str, Tensor], attention: str) -> Tensor:
    """Logits of the bundled model."""
    model = Idefics3ForConditionalGeneration.from_pretrained(directory, dtype=dtype, attn_implementation=attention)
    with torch.no_grad():
        found: Tensor = model(**inputs).logits.double()
    return found


def save_random(config: Idefics3Config, seed: int, directory: Path) -> None:
    """Write a checkpoint of random weights in bfloat16."""
    with torch.device("meta"):
        model = Idefics3ForConditionalGeneration(config)
    materialize(model, torch.bfloat16, seed)
    model.save_pretrained(directory, max_shard_size="2GB")


def run_cut(layers: int, seed: int, directory: Path) -> int:
    """Compare a cut of full width with transformers; the exit code."""
    import transformers

    config = configuration(layers, layers)
    timed("build and save", lambda: save_random(config, seed, directory))
    gc.collect()
    inputs = example(config, seed)
    gold = timed("transformers float64", lambda: reference_logits(directory, torch.float64, inputs))
    largest = gold.abs().max()
    failed = 0
    print(f"transformers {transformers.__version__}, logits {tuple(gold.shape)}, largest {float(largest):.3f}")
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        gc.collect()
        theirs = timed(f"transformers {name}", partial(reference_logits, directory, dtype, inputs))
        noise = float((theirs - gold).abs().max() / largest)
        for attention in ("eager", "sdpa"):
            gc.collect()
            mine = timed(
                f"bundled {name} {attention}",
                partial(our_logits, directory, dtype, inputs, attention),
            )
            error = float((mine - gold).abs().max() / largest)
            worst = error / (2 * noise)
            failed += worst > 1
            print(f"    error {error:.3e}, transformers' {noise:.3e}, worst {worst:.2f}", flush=True)
    print(f"peak {peak_gib():.2f} GiB")
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse arguments and run; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cut", type=int, default=0, metavar="N", help="compare a cut of N text and N vision layers")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs")
    parser.add_argument("--directory", type=Path, help="keep the cut's checkpoint here (default: a temporary folder)")
    args = parser.parse_args(argv)
    if args.cut < 0:
        parser.error(f"--cut {args.cut} is negative")
    if not args.cut:
        return run_full(args.seed)
    if args.directory is not None:
        return run_cut(args.cut, args.seed, args.directory)
    with tempfile.TemporaryDirectory() as folder:
        return run_cut(args.cut, args.seed, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
