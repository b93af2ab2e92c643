"""`vlmqual generate`: images and a question in, text and timings out."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TextIO

from vlmqual_contract.errors import EXIT_OK, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from vlmqual_impl.runtime.base import Runtime, Sequences

DTYPES = ("float64", "float32", "bfloat16", "float16")


class _Command:
    help = "answer a prompt about images with the bundled implementation, and print how long each phase took"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        add = parser.add_argument
        add("--checkpoint", required=True, metavar="DIR", help="checkpoint directory in Hugging Face layout, or hub id")
        add("--image", action="append", default=[], metavar="FILE", help="image file; may be given several times")
        add("--prompt", required=True, metavar="TEXT", help="what to ask")
        add("--raw-prompt", action="store_true", help="take the prompt as it is, with its own image markers")
        add("--max-new-tokens", type=int, default=64, metavar="N", help="tokens to generate at most (default 64)")
        add("--dtype", default="float32", choices=DTYPES, help="compute dtype (default float32)")
        add("--device", default="cpu", help="cpu, cuda or cuda:N (default cpu)")
        add("--sample", action="store_true", help="draw tokens instead of taking the likeliest")
        add("--temperature", type=float, metavar="T", help="with --sample: logits are divided by it")
        add("--top-p", type=float, metavar="P", help="with --sample: smallest set of tokens with this probability")
        add("--top-k", type=int, metavar="K", help="with --sample: only the K likeliest tokens")
        add("--seed", type=int, metavar="N", help="with --sample: makes the run repeatable")

    def run(self, args: argparse.Namespace) -> int:
        """Generate; the exit code.

        Raises:
            UsageError: an argument, the checkpoint or an image is wrong.
        """
        sampling = {name: getattr(args, name) for name in ("temperature", "top_p", "top_k", "seed")}
        given = [name for name, value in sampling.items() if value is not None]
        if given and not args.sample:
            raise UsageError(f"--{given[0].replace('_', '-')} changes nothing without --sample")
        try:
            return _generate(args)
        except (ValueError, OSError) as error:
            raise UsageError(str(error)) from error
        except (TypeError, AttributeError, KeyError, RuntimeError) as error:
            # A file of the checkpoint holds something that no rule of ours looked for.
            raise UsageError(f"{args.checkpoint} cannot be used: {type(error).__name__}: {error}") from error


def _generate(args: argparse.Namespace) -> int:
    import torch

    from vlmqual_impl.api.auto import AutoModelForVision2Seq, AutoProcessor
    from vlmqual_impl.families import family
    from vlmqual_impl.generate import generate
    from vlmqual_impl.target import checked_device

    clock = time.perf_counter
    device = checked_device(args.device)
    images = _read(args.image)
    start = clock()
    processor = AutoProcessor.from_pretrained(args.checkpoint)
    model = AutoModelForVision2Seq.from_pretrained(args.checkpoint, dtype=args.dtype, device=device)
    seconds = {"load": clock() - start}
    settings: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "do_sample": args.sample}
    settings |= {name: getattr(args, name) for name in ("temperature", "top_p", "top_k")}
    config = model.generation_config.changed(settings)
    generator = None if args.seed is None else torch.Generator(device=device).manual_seed(args.seed)
    start = clock()
    text = args.prompt if args.raw_prompt else _chat(processor, len(images), args.prompt)
    batch = processor(**family(model.config.model_type).prompted([text], [images]), return_tensors="pt")
    inputs = {key: value.to(device) for key, value in batch.items()}
    seconds["preprocess"] = clock() - start
    timed = _Timed(model.runtime())
    printer = _Printer(processor.tokenizer, sys.stdout)
    generate(timed, inputs, config, generator=generator, streamer=printer.put)
    printer.end()
    _report(seconds | timed.seconds, timed.steps, inputs["input_ids"].shape[1], sys.stderr)
    return EXIT_OK


def _read(files: list[str]) -> list[Any]:
    from vlmqual_impl.image_files import read_image

    return [read_image(file) for file in files]


def _chat(processor: Any, images: int, question: str) -> str:
    if not hasattr(processor, "apply_chat_template"):  # Idefics has none; its images come before the text
        return "<image>" * images + question
    content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
    message = {"role": "user", "content": content}
    return str(processor.apply_chat_template([message], add_generation_prompt=True))


class _Printer:
    """Prints text as it grows. Bytes of a character that is not complete yet wait for the next token."""

    def __init__(self, tokenizer: Any, out: TextIO) -> None:
        self._tokenizer = tokenizer
        self._out = out
        self._ids: list[int] = []
        self._printed = ""

    def put(self, tokens: Tensor) -> None:
        """Take one more token."""
        self._ids.append(int(tokens[0]))
        self._flush(self._text().rstrip("\N{REPLACEMENT CHARACTER}"))

    def end(self) -> None:
        """Print what waits, and end the line."""
        self._flush(self._text())
        self._out.write("\n")
        self._out.flush()

    def _text(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True))

    def _flush(self, text: str) -> None:
        if text.startswith(self._printed):
            self._out.write(text[len(self._printed) :])
            self._out.flush()
            self._printed = text


class _Timed:
    """A runtime whose phases are timed between two synchronisations, each one itself."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.dtype, self.device, self.merges = runtime.dtype, runtime.device, runtime.merges
        self.vocabulary = runtime.vocabulary
        self.seconds: dict[str, float] = {}
        self.steps: list[float] = []

    def _time(self, work: Callable[[], Any]) -> tuple[Any, float]:
        self._runtime.synchronize()
        start = time.perf_counter()
        result = work()
        self._runtime.synchronize()
        return result, time.perf_counter() - start

    def encode(self, inputs: Mapping[str, Tensor], taps: dict[str, Tensor] | None = None) -> Tensor:
        """Timed as "vision"."""
        features: Tensor
        features, self.seconds["vision"] = self._time(lambda: self._runtime.encode(inputs, taps))
        return features

    def prefill(
        self, inputs: Mapping[str, Tensor], features: Tensor | None = None, *, max_length: int, taps: bool = False
    ) -> Sequences:
        """Timed as "prefill"."""
        step: Sequences
        step, self.seconds["prefill"] = self._time(
            lambda: self._runtime.prefill(inputs, features, max_length=max_length, taps=taps)
        )
        return step

    def decode(self, sequences: Sequences, tokens: Tensor, *, taps: bool = False) -> Sequences:
        """Timed as one decode step."""
        step: Sequences
        step, seconds = self._time(lambda: self._runtime.decode(sequences, tokens, taps=taps))
        self.steps.append(seconds)
        return step

    def embed(self, inputs: Mapping[str, Tensor], features: Tensor | None) -> Tensor:
        """Not timed by itself."""
        return self._runtime.embed(inputs, features)

    def head(self, hidden: Tensor) -> Tensor:
        """Not timed by itself."""
        return self._runtime.head(hidden)

    def synchronize(self) -> None:
        """Return when the device has done everything."""
        self._runtime.synchronize()


def _report(seconds: Mapping[str, float], steps: list[float], prompt: int, out: TextIO) -> None:
    rows = [(name, f"{value:.3f} s") for name, value in seconds.items()]
    if steps:
        mean = sum(steps) / len(steps)
        rows.append(("decode", f"{mean:.4f} s per token"))
        rows.append(("rate", f"{1 / mean:.1f} tokens/s"))
    rows.append(("tokens", f"{prompt} in the prompt, {len(steps) + 1} generated"))
    for name, value in rows:
        print(f"{name:<10} {value}", file=out)


command = _Command()
