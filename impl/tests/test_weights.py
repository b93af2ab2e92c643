"""Checkpoints of transformers load here, ours load there, and what is damaged is named."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from graph_objects import network
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

from vlmqual_impl.api.idefics3 import Idefics3ForConditionalGeneration, Idefics3Model
from vlmqual_impl.checkpoints import CheckpointError, locate
from vlmqual_impl.configs import Idefics3Config
from vlmqual_impl.models import idefics3
from vlmqual_impl.tp import shard
from vlmqual_impl.weights import load, save, shard_bytes, ties_head

PARTS: dict[str, Any] = {
    "image_token_id": 60,
    "text_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 56,
        "patch_size": 14,
    },
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def example() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 59, (1, 12), generator=generator)
    ids[0, 2:6] = 60
    return {"input_ids": ids, "pixel_values": torch.randn((1, 1, 3, 56, 56), generator=generator)}


def theirs(tie: bool, dtype: torch.dtype) -> transformers.Idefics3ForConditionalGeneration:
    torch.manual_seed(11)
    config = transformers.Idefics3Config(tie_word_embeddings=tie, **PARTS)
    model = transformers.Idefics3ForConditionalGeneration._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    return model.to(dtype).eval()


def reloaded(directory: Path) -> Any:
    """transformers' model in float32, its rotary frequencies untouched by an earlier change of dtype."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.Idefics3ForConditionalGeneration.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        )


def mine(tie: bool = False) -> Idefics3ForConditionalGeneration:
    torch.manual_seed(12)
    model = Idefics3ForConditionalGeneration(Idefics3Config(tie_word_embeddings=tie, **PARTS))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    return model.eval()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    mine().save_pretrained(tmp_path)
    return tmp_path


def logits(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", ["5GB", "30KB"], ids=["one-file", "shards"])
def test_a_checkpoint_saved_by_transformers_gives_equal_logits(
    tmp_path: Path, tie: bool, dtype: str, size: str
) -> None:
    reference = theirs(tie, DTYPES[dtype])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference.save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (size == "30KB")
    model = Idefics3ForConditionalGeneration.from_pretrained(tmp_path, torch_dtype="auto", attn_implementation="eager")
    assert model.dtype == DTYPES[dtype]
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tie
    for name, value in reference.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), f"{name} was not loaded as it was saved"
    wanted, found = logits(reloaded(tmp_path), **example()), logits(model.float(), **example())
    assert torch.allclose(found, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max())), "logits differ"


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", ["5GB", "30KB"], ids=["one-file", "shards"])
def test_a_checkpoint_saved_by_us_gives_equal_logits_in_transformers(
    tmp_path: Path, tie: bool, dtype: str, size: str
) -> None:
    model = mine(tie).to(DTYPES[dtype])
    model.save_pretrained(tmp_path, max_shard_size=size)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (size == "30KB")
    names: list[str] = []
    for file in files:
        with safe_open(file, "pt") as handle:
            assert handle.metadata() == {"format": "pt"}
            names += list(handle.keys())
    assert len(names) == len(set(names)), "a tensor was written twice"
    assert ("lm_head.weight" in names) != tie, "a tied head is written once, as the embedding"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = transformers.Idefics3ForConditionalGeneration.from_pretrained(
            tmp_path, dtype="auto", attn_implementation="eager"
        )
    assert reference.dtype == DTYPES[dtype]
    assert reference.generation_config.eos_token_id == 2
    wanted, found = logits(reloaded(tmp_path), **example()), logits(model.float(), **example())
    assert torch.allclose(found, wanted, rtol=0, atol=2e-5 * float(wanted.abs().max())), "logits differ"


def test_a_round_trip_reproduces_outputs_and_the_file_of_an_earlier_save_goes_away(saved: Path) -> None:
    model = Idefics3ForConditionalGeneration.from_pretrained(saved)
    wanted = logits(model, **example())
    model.save_pretrained(saved, max_shard_size=20_000)
    assert not (saved / "model.safetensors").exists(), "the old single file would shadow the shards"
    again = Idefics3ForConditionalGeneration.from_pretrained(saved)
    assert torch.equal(logits(again, **example()), wanted)
    again.save_pretrained(saved)
    assert [path.name for path in saved.glob("*.safetensors*")] == ["model.safetensors"]


def test_a_missing_tie_key_and_a_missing_head_mean_a_tied_head(tmp_path: Path) -> None:
    mine(tie=True).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["tie_word_embeddings"]  # what 4.46 does when it is true
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert ties_head(values, tmp_path)
    model = Idefics3ForConditionalGeneration.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.config.tie_word_embeddings is True


def test_the_model_without_head_loads_from_a_checkpoint_with_one(saved: Path) -> None:
    whole = Idefics3ForConditionalGeneration.from_pretrained(saved)
    part = Idefics3Model.from_pretrained(saved)
    for name, value in part.state_dict().items():
        assert torch.equal(value, whole.state_dict()[f"model.{name}"]), name


def test_weights_take_the_dtype_that_is_asked_for(saved: Path) -> None:
    assert Idefics3ForConditionalGeneration.from_pretrained(saved, torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    assert Idefics3ForConditionalGeneration.from_pretrained(saved, dtype="float16").dtype == torch.float16
    mine().to(torch.bfloat16).save_pretrained(saved)
    assert Idefics3ForConditionalGeneration.from_pretrained(saved).dtype == torch.float32
    assert Idefics3ForConditionalGeneration.from_pretrained(saved, dtype="auto").dtype == torch.bfloat16


class Listener(TorchFunctionMode):
    """Names of the functions that torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.heard.add(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["idefics-tiny", "idefics-resampler-tiny", "idefics3-tiny", "mllama-tiny"])
def test_a_model_that_is_made_to_be_loaded_draws_no_numbers(name: str) -> None:
    """Where nothing is stored torch would load its compiler for them, in every worker."""
    with Listener() as listener:
        network(name)
    assert "empty" in listener.heard
    assert not {called for called in listener.heard if "rand" in called or called.endswith(("normal_", "uniform_"))}


def test_a_rank_holds_its_columns_and_rows_only(saved: Path) -> None:
    whole = load_file(saved / "model.safetensors")
    config = Idefics3Config.from_pretrained(saved)
    with torch.device("meta"):
        model = idefics3.Idefics3(config)
    cuts = shard(model, idefics3.PLAN, rank=1, ranks=2)
    load(model, saved, cuts=cuts)
    state = model.state_dict()
    layer = "model.text_model.layers.0"
    assert torch.equal(state[f"{layer}.self_attn.q_proj.weight"], whole[f"{layer}.self_attn.q_proj.weight"][16:])
    assert torch.equal(state[f"{layer}.self_attn.k_proj.weight"], whole[f"{layer}.self_attn.k_proj.weight"][8:])
    assert torch.equal(state[f"{layer}.mlp.down_proj.weight"], whole[f"{layer}.mlp.down_proj.weight"][:, 24:])
    vision = "model.vision_model.encoder.layers.0"
    assert torch.equal(state[f"{vision}.mlp.fc1.bias"], whole[f"{vision}.mlp.fc1.bias"][12:])
    assert torch.equal(state[f"{vision}.mlp.fc2.bias"], whole[f"{vision}.mlp.fc2.bias"]), "a row's bias is whole"
    assert torch.equal(state["lm_head.weight"], whole["lm_head.weight"])


def change(directory: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(directory / "model.safetensors")
    for name, value in changes.items():
        key = name.replace("__", ".")
        tensors.pop(key, None)
        if value is not None:
            tensors[key] = value
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def refused(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Idefics3ForConditionalGeneration.from_pretrained(directory)
    message = str(caught.value)
    assert str(directory) in message, f"the checkpoint is not named: {message}"
    assert "\n" not in message, f"more than one sentence: {message}"
    return message


def test_missing_extra_and_misshaped_tensors_are_named(saved: Path) -> None:
    change(saved, model__text_model__norm__weight=None)
    assert "model.text_model.norm.weight is missing" in refused(saved)
    change(saved, model__text_model__norm__weight=torch.ones(32), model__text_model__odd__weight=torch.ones(3))
    assert "model.text_model.odd.weight is left over" in refused(saved)
    change(saved, model__text_model__odd__weight=None, model__text_model__norm__weight=torch.ones(33))
    message = refused(saved)
    assert "model.text_model.norm.weight has shape (33,)" in message
    assert "(32,)" in message
    change(saved, model__text_model__norm__weight=torch.ones(32, dtype=torch.int8))
    assert "stored as I8" in refused(saved)


def test_rotary_frequencies_of_old_exports_are_skipped(saved: Path) -> None:
    name = "model.text_model.layers.0.self_attn.rotary_emb.inv_freq"
    change(saved, **{name.replace(".", "__"): torch.ones(4)})
    Idefics3ForConditionalGeneration.from_pretrained(saved)


def test_a_tied_checkpoint_that_holds_another_head_is_refused(tmp_path: Path) -> None:
    mine(tie=True).save_pretrained(tmp_path)
    change(tmp_path, lm_head__weight=torch.ones(64, 32))
    assert "lm_head.weight differs from model.text_model.embed_tokens.weight" in refused(tmp_path)


def test_a_tied_tensor_may_be_stored_under_its_other_name(tmp_path: Path) -> None:
    model = mine(tie=True)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors.pop("model.text_model.embed_tokens.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    again = Idefics3ForConditionalGeneration.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("keep", [0, 4, 200, -10])
def test_a_truncated_file_is_named(saved: Path, keep: int) -> None:
    file = saved / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    assert "truncated or no safetensors file" in refused(saved)


def test_missing_files_are_named(saved: Path) -> None:
    mine().save_pretrained(saved, max_shard_size="30KB")
    shards = sorted(saved.glob("model-*.safetensors"))
    shards[1].unlink()
    assert shards[1].name in refused(saved)
    for path in saved.glob("model*"):
        path.unlink()
    (saved / "pytorch_model.bin").write_bytes(b"x")
    message = refused(saved)
    assert "model.safetensors.index.json" in message
    assert "pytorch_model.bin" in message


def test_a_place_that_is_neither_directory_nor_hub_id_gives_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint directory"):
        locate(tmp_path / "nowhere")
    import huggingface_hub

    def offline(*_: Any, **__: Any) -> str:
        raise OSError("the hub cannot be reached\nand more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"some/model: neither a directory .* \(the hub cannot be reached\)$"):
        locate("some/model")


def test_shard_sizes_are_bytes_or_text(tmp_path: Path) -> None:
    assert shard_bytes(10) == 10
    assert shard_bytes("5GB") == 5 * 10**9
    assert shard_bytes("2 MiB") == 2 * 2**20
    with pytest.raises(ValueError, match="max_shard_size is 'many'"):
        save(mine(), tmp_path, "many")
