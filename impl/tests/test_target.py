"""The bundled implementation behind the contract."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vlmqual_contract.discovery import make_library, make_target
from vlmqual_contract.errors import UsageError
from vlmqual_contract.target import Capability, Features, Model, Options, Step
from vlmqual_impl.api.idefics3 import Idefics3ForConditionalGeneration
from vlmqual_impl.configs import Idefics3Config
from vlmqual_impl.target import EagerTarget
from vlmqual_impl.target_library import BundledLibrary

CONFIG: dict[str, Any] = {
    "image_token_id": 60,
    "text_config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
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


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(2)
    Idefics3ForConditionalGeneration(Idefics3Config(**CONFIG)).save_pretrained(path)
    return path


def inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 59, (2, 10))
    ids[0, 3:7] = 60
    mask = np.ones((2, 10), np.int64)
    mask[1, :4] = 0
    pixels = rng.standard_normal((2, 1, 3, 56, 56)).astype(np.float32)
    pixels[1] = 0
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def test_importing_the_package_or_the_target_does_not_import_torch() -> None:
    code = "import sys, vlmqual_impl, vlmqual_impl.target, vlmqual_impl.command; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0, "torch was imported"


def test_the_target_is_found_by_name_and_says_what_it_is() -> None:
    info = make_target("eager:device=cpu,dtype=bfloat16").info
    assert (info.name, info.dtype, info.device, info.processes) == ("eager", "bfloat16", "cpu", "per-rank")
    assert info.library == "vlmqual_impl"
    assert info.capabilities == frozenset(Capability)
    assert info.families == ("idefics", "idefics3", "mllama")
    assert info.software["torch"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("eager:dtype=int8", ["dtype 'int8'", "float64, float32, bfloat16, float16"]),
        ("eager:device=npu", ["device 'npu'", "cpu, cuda"]),
        ("eager:device=cuda:99", ["cuda:99"]),
        ("eager:threads=0", ["threads '0'"]),
        ("eager:attention=flash", ["attention 'flash'", "sdpa, eager"]),
        ("eager:dtpye=float32", ["dtpye", "device, dtype, threads, attention"]),
    ],
)
def test_unknown_keys_and_values_name_the_valid_ones(text: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        make_target(text)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_every_phase_answers_in_plain_arrays(checkpoint: Path, dtype: str) -> None:
    target = EagerTarget(dtype=dtype)
    with target.open(Model(str(checkpoint), "idefics3"), Options(max_length=16, batch=2, taps=True)) as session:
        features = session.vision(inputs())
        assert isinstance(features, Features)
        arrays = features.arrays()
        assert arrays["image_hidden_states"].shape == (1, 4, 32)
        step = session.prefill(inputs(), features)
        assert isinstance(step, Step)
        assert step.dtype == features.dtype == dtype
        assert step.logits().shape == (2, 64)
        assert step.logits().dtype == np.dtype("float32" if dtype == "bfloat16" else dtype)
        everything = step.logits(all_positions=True)
        assert everything.shape == (2, 10, 64)
        assert np.abs(everything[:, -1] - step.logits()).max() <= 1e-2 * np.abs(step.logits()).max()
        assert step.tokens().tolist() == step.logits().argmax(-1).tolist()
        assert step.tokens().dtype == np.int64
        assert list(step.taps()) == ["text.embeddings", "text.layers.0", "text.layers.1", "text.norm"]
        assert "connector" in features.taps()
        again = session.prefill(inputs(), dict(arrays))  # features that came from outside
        assert np.array_equal(again.logits(), step.logits())
        assert np.array_equal(session.prefill(inputs()).logits(), step.logits())
        greedy = session.decode(step)
        forced = session.decode(again, step.tokens())
        assert np.array_equal(greedy.logits(), forced.logits())
        assert greedy.taps()["text.norm"].shape == (2, 1, 32)
        session.synchronize()


def test_a_right_padded_row_gives_the_logits_of_its_last_real_position(checkpoint: Path) -> None:
    ids = np.arange(3, 13)[None]
    mask = np.ones((1, 10), np.int64)
    mask[0, 6:] = 0
    with EagerTarget(dtype="float64").open(Model(str(checkpoint), "idefics3"), Options(max_length=16)) as session:
        padded = session.prefill({"input_ids": ids, "attention_mask": mask})
        alone = session.prefill({"input_ids": ids[:, :6]})
        assert np.allclose(padded.logits(), alone.logits(), rtol=0, atol=1e-12)
        assert np.allclose(session.decode(padded).logits(), session.decode(alone).logits(), rtol=0, atol=1e-12)


def test_ranks_that_do_not_divide_the_heads_stop_before_weights_are_read(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())  # no weights at all
    with pytest.raises(UsageError) as caught, EagerTarget().open(Model(str(tmp_path), "idefics3"), Options(tp=3)):
        pass
    wanted = "text_config: 4 attention heads do not divide by 3 ranks (model.text_model.layers.0.self_attn.q_proj)"
    assert str(caught.value) == wanted


def test_what_cannot_be_opened_is_a_usage_error(checkpoint: Path, tmp_path: Path) -> None:
    wrong = [
        (Model(str(checkpoint), "idefics2"), Options(), "family 'idefics2'"),
        (Model(str(checkpoint), "mllama"), Options(), "is a checkpoint of 'idefics3', not 'mllama'"),
        (Model(str(tmp_path / "none"), "idefics3"), Options(), "no such checkpoint directory"),
        (Model(str(tmp_path), "idefics3"), Options(), "no config.json"),
        (Model(str(checkpoint), "idefics3"), Options(max_length=0), "max_length is 0"),
        (Model(str(checkpoint), "idefics3"), Options(tp=2), "needs a launcher"),
    ]
    for model, options, words in wrong:
        with pytest.raises(UsageError, match=words), EagerTarget().open(model, options):
            pass
    data = (checkpoint / "model.safetensors").read_bytes()
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UsageError, match="truncated"), EagerTarget().open(Model(str(tmp_path), "idefics3"), Options()):
        pass


def test_wrong_calls_of_a_session_are_named(checkpoint: Path) -> None:
    with EagerTarget().open(Model(str(checkpoint), "idefics3"), Options(max_length=16)) as session:
        with pytest.raises(UsageError, match="vision needs pixel_values"):
            session.vision({"input_ids": np.ones((1, 2), np.int64)})
        with pytest.raises(UsageError, match="image_hidden_states is needed"):
            session.prefill(inputs(), {"features": np.ones(3)})
        step = session.prefill(inputs())
        with pytest.raises(UsageError, match=r"forced tokens \[64, 1\] leave the vocabulary 0 to 63"):
            session.decode(step, np.array([64, 1]))
        with pytest.raises(ValueError, match="16 positions, 0 are taken and 17 more"):
            session.prefill({"input_ids": np.full((1, 17), 5)})


def test_probes_take_time_and_name_what_they_do_not_know() -> None:
    target = EagerTarget()
    assert target.probe("stream", (1 << 16,), "float32") > 0
    assert target.probe("gemm", (64, 64, 64), "bfloat16") > 0
    assert target.probe("all-reduce", (16,), "float32") >= 0
    for arguments, words in [
        (("fft", (1,), "float32"), "probe 'fft' is not known; valid are stream, gemm, all-reduce"),
        (("gemm", (4,), "float32"), r"takes \(m, n, k\)"),
        (("stream", (0,), "float32"), r"takes \(n,\)"),
        (("stream", (4,), "int8"), "dtype 'int8'"),
    ]:
        with pytest.raises(UsageError, match=words):
            target.probe(*arguments)  # type: ignore[arg-type]


def test_the_library_resolves_names_and_converts_arrays() -> None:
    library = make_library("vlmqual_impl")
    assert isinstance(library, BundledLibrary)
    assert library.resolve("Idefics3Config")().image_token_id == 128257
    with pytest.raises(AttributeError):
        library.resolve("NoSuchClass")
    tensor = library.from_array(np.array([1.5, -2.0]), "bfloat16")
    assert tensor.dtype == torch.bfloat16
    assert library.to_array(tensor).tolist() == [1.5, -2.0]  # type: ignore[union-attr]
    assert library.to_array("text") is None
    with pytest.raises(UsageError, match="dtype 'nonsense'"):
        library.from_array(np.ones(1), "nonsense")
