"""Run by test_rebel_optimum.py under `python -m vlmqual_rebel`: optimum-rbln's Idefics3 against transformers' own.

Prints one JSON object: for each case the tokens of both and the largest difference of their logits.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import rebel
import torch
from optimum.rbln import RBLNIdefics3ForConditionalGeneration
from transformers import Idefics3Config, Idefics3ForConditionalGeneration

IMAGE, IMAGE_TOKEN, NEW = 56, 100, 12
assert rebel.EMULATED, "run this under python -m vlmqual_rebel"


def tiny() -> Idefics3ForConditionalGeneration:
    config = Idefics3Config(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": IMAGE,
            "patch_size": 14,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 128,
            "max_position_embeddings": 4096,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 127,
        },
        scale_factor=2,
        image_token_id=IMAGE_TOKEN,
        pad_token_id=0,
    )
    model = Idefics3ForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():  # norms stay near one, or the model would be blind to its image
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(weight + 0.1 * noise if weight.dim() == 1 else 0.15 * noise)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def request(length: int, images: int = 1, rows: int = 1, seed: int = 7) -> dict[str, torch.Tensor]:
    """A prompt of `length` tokens in each row, with four image tokens for each image."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 99, (rows, length), generator=generator)
    for image in range(images):
        ids[:, 2 + 5 * image : 6 + 5 * image] = IMAGE_TOKEN
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if images:
        inputs["pixel_values"] = torch.randn(rows, images, 3, IMAGE, IMAGE, generator=generator)
        inputs["pixel_attention_mask"] = torch.ones(rows, images, IMAGE, IMAGE, dtype=torch.long)
    return inputs


def generate(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[list[list[int]], torch.Tensor]:
    with torch.no_grad():
        result = model.generate(
            **inputs,
            max_new_tokens=NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            eos_token_id=None,
            pad_token_id=0,
        )
    return result.sequences[:, -NEW:].tolist(), torch.stack([step.float() for step in result.logits])


def compiled(model: Any, **text: Any) -> RBLNIdefics3ForConditionalGeneration:
    options = {"use_inputs_embeds": True, "max_seq_len": 256, "batch_size": 1} | text
    outer = {"batch_size": options["batch_size"], "text_model": options}
    return RBLNIdefics3ForConditionalGeneration.from_model(model, rbln_config=outer)


def main(folder: Path, case: str) -> dict[str, Any]:
    reference = tiny()
    found: dict[str, Any] = {}

    def compare(name: str, model: Any, inputs: dict[str, torch.Tensor]) -> None:
        mine, logits = generate(model, inputs)
        theirs, wanted = generate(reference, inputs)
        found[name] = {
            "tokens": mine,
            "reference": theirs,
            "difference": float((logits - wanted).abs().max()),
            "largest": float(wanted.abs().max()),
        }

    if case == "eager":
        model = compiled(tiny())
        compare("one image", model, request(20))
        compare("the same runtime again", model, request(24, seed=8))
        compare("two images", model, request(20, images=2))
        compare("text only", model, request(20, images=0))
        compare("a prompt of two chunks", model, request(150))
        compare("a prompt of exactly one chunk", model, request(128))
        model.save_pretrained(folder / "saved")
        moved = (folder / "saved").rename(folder / "moved")
        found["files"] = {str(one.relative_to(moved)): one.stat().st_size for one in moved.rglob("*.rbln")}
        first = RBLNIdefics3ForConditionalGeneration.from_pretrained(moved)
        second = RBLNIdefics3ForConditionalGeneration.from_pretrained(moved)
        compare("loaded from the moved folder", first, request(20))
        compare("a second copy", second, request(24, seed=8))
        # Both copies take turns over one token each: a shared cache would mix their sequences.
        found["copies apart"] = interleaved(first, second, reference)
    elif case == "tensor parallel":
        for spelling in ("num_devices", "tensor_parallel_size"):
            model = compiled(tiny(), **{spelling: 4}, device=[0, 1, 2, 3])
            compare(spelling, model, request(20))
        model.save_pretrained(folder / "four")
        file = next((folder / "four").rglob("prefill.rbln"))
        found["inspect"] = rebel.RBLNCompiledModel.inspect(file)
        del model
        model = RBLNIdefics3ForConditionalGeneration.from_pretrained(folder / "four")
        compare("loaded with device unset", model, request(20))
    elif case == "batch":
        model = compiled(tiny(), batch_size=2)
        compare("two rows", model, request(20, rows=2))
        inputs = request(20, rows=2)
        inputs["attention_mask"][1, :2] = 0
        compare("two rows, one padded on the left", model, inputs)
    elif case == "flash":
        model = compiled(tiny(), max_seq_len=2048, attn_impl="flash_attn", kvcache_partition_len=1024)
        compare("flash", model, request(20))
        compare("a prompt across the partition", model, request(1030))
        model.save_pretrained(folder / "flash")
        del model
        model = RBLNIdefics3ForConditionalGeneration.from_pretrained(folder / "flash")
        compare("flash, loaded", model, request(1030))
    elif case == "masked":
        compare("attention mask as an input", compiled(tiny(), use_attention_mask=True), request(150))
    return found


def interleaved(first: Any, second: Any, reference: Any) -> dict[str, Any]:
    """Prefill both, then decode each: tokens of the first copy, whose cache the second must not have touched."""
    runs = []
    for model, inputs in ((first, request(20)), (second, request(24, seed=8))):
        embeds = model._preprocess_prefill(**inputs)
        length = inputs["input_ids"].shape[1]
        step = model.text_model.prefill_decoder(
            inputs_embeds=embeds, cache_position=torch.arange(length, dtype=torch.int32)[None], batch_idx=0
        )
        runs.append((model, length, [int(step.logits[0, -1].argmax())]))
    for offset in range(NEW - 1):
        for model, length, tokens in runs:
            embeds = model.get_input_embeddings()(torch.tensor([[tokens[-1]]]))
            position = torch.full((1, 1), length + offset, dtype=torch.int32)
            step = model.text_model.decoder(inputs_embeds=embeds, cache_position=position)
            tokens.append(int(step.logits[0, -1].argmax()))
    wanted = [generate(reference, inputs)[0][0] for inputs in (request(20), request(24, seed=8))]
    return {"tokens": [tokens for _, _, tokens in runs], "reference": wanted}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("RESULT " + json.dumps(main(Path(sys.argv[1]), sys.argv[2])))
