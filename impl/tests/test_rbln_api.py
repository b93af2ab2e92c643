"""The RBLN classes over the emulator of RBLN's SDK: tokens, files, and what they refuse."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_objects import CHECKPOINTS, request, slim
from torch import Tensor

import vlmqual_impl
import vlmqual_rebel
from vlmqual_contract.errors import Unsupported
from vlmqual_impl.target_library import BundledLibrary

HOSTS = {
    "idefics": "IdeficsForVisionText2Text",
    "idefics3": "Idefics3ForConditionalGeneration",
    "mllama": "MllamaForConditionalGeneration",
}
TEXT: dict[str, Any] = {"max_seq_len": 128, "prefill_chunk_size": 64}
SLOTS = {"idefics": {"image_slots": [2]}, "idefics3": {}, "mllama": {"image_slots": [2]}}
GREEDY = {"max_new_tokens": 3, "do_sample": False}
Make = Callable[[str], Any]


@pytest.fixture(scope="module", autouse=True)
def _emulator() -> Iterator[None]:
    vlmqual_rebel.install()
    yield
    vlmqual_rebel.uninstall()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {family: slim(source, folder / family) for family, source in CHECKPOINTS.items()}


@pytest.fixture(scope="module")
def compiled(checkpoints: dict[str, Path]) -> Make:
    """A family's class, compiled for two rows."""

    @cache
    def made(family: str) -> Any:
        settings = {"batch_size": 2, "text_model": TEXT | SLOTS[family]}
        return rbln(family).from_pretrained(checkpoints[family], export=True, rbln_config=settings)

    return made


@pytest.fixture
def saved(compiled: Make, tmp_path: Path) -> Path:
    compiled("idefics3").save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def rbln(family: str) -> Any:
    return getattr(vlmqual_impl, f"RBLN{HOSTS[family]}")


def wanted(family: str, checkpoint: Path, inputs: dict[str, Tensor]) -> list[list[int]]:
    """Greedy tokens of the same class on the host."""
    host = getattr(vlmqual_impl, HOSTS[family]).from_pretrained(checkpoint)
    tokens: list[list[int]] = host.generate(**inputs, **GREEDY).tolist()
    return tokens


def refused(said: str, call: Callable[[], Any], kind: type[Exception] = ValueError) -> None:
    with pytest.raises(kind, match=said) as error:
        call()
    assert "\n" not in str(error.value)


# tokens --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", list(HOSTS))
def test_a_batch_of_unequal_rows_gets_the_tokens_of_the_class_on_the_host(
    family: str, checkpoints: dict[str, Path], compiled: Make
) -> None:
    inputs = request(family, "batch-left")
    assert compiled(family).generate(**inputs, **GREEDY).tolist() == wanted(family, checkpoints[family], inputs)


@pytest.mark.parametrize("family", list(HOSTS))
def test_a_saved_model_that_was_moved_compiles_nothing_and_gives_the_same_tokens(
    family: str, checkpoints: dict[str, Path], compiled: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import rebel

    compiled(family).save_pretrained(tmp_path / "not" / "there")
    moved = (tmp_path / "not" / "there").rename(tmp_path / "moved")
    monkeypatch.setattr(rebel, "compile_from_torch", None)
    loaded = rbln(family).from_pretrained(str(moved))
    inputs = request(family, "batch-left")
    assert loaded.generate(**inputs, **GREEDY).tolist() == wanted(family, checkpoints[family], inputs)
    assert loaded.rbln_config.to_dict() == compiled(family).rbln_config.to_dict()
    assert loaded.config.to_dict() == compiled(family).config.to_dict()


@pytest.mark.parametrize("family", ["idefics3", "mllama"])
def test_a_smaller_batch_is_padded_and_masks_and_ids_are_taken_in_any_dtype(
    family: str, checkpoints: dict[str, Path], compiled: Make
) -> None:
    inputs = {name: tensor[1:] for name, tensor in request(family, "batch-left").items()}
    kinds = {name: torch.bool if name.endswith("mask") else torch.int32 for name in inputs}
    others = {name: t if t.is_floating_point() else t.to(kinds[name]) for name, t in inputs.items()}
    found = compiled(family).generate(**others, **GREEDY)
    assert found.tolist() == wanted(family, checkpoints[family], inputs)


def test_a_model_in_memory_is_compiled_in_its_dtype(checkpoints: dict[str, Path]) -> None:
    host = vlmqual_impl.Idefics3ForConditionalGeneration.from_pretrained(
        checkpoints["idefics3"], torch_dtype="bfloat16"
    )
    made = rbln("idefics3").from_model(host.train(), rbln_text_model=TEXT, rbln_create_runtimes=False)
    assert (made.dtype, made.rbln_config.text_model.max_seq_len) == (torch.bfloat16, 128)
    assert host.training, "the model that was given is as it was"


def test_a_model_of_transformers_is_compiled(checkpoints: dict[str, Path]) -> None:
    transformers = pytest.importorskip("transformers")
    host = transformers.Idefics3ForConditionalGeneration.from_pretrained(checkpoints["idefics3"], dtype=torch.float32)
    inputs = {name: tensor[1:] for name, tensor in request("idefics3", "batch-left").items()}
    made = rbln("idefics3").from_model(host, rbln_config={"text_model": TEXT})
    assert made.generate(**inputs, **GREEDY).tolist() == wanted("idefics3", checkpoints["idefics3"], inputs)


# files ---------------------------------------------------------------------------------------------------------------


def test_each_part_is_compiled_into_a_folder_of_its_own(saved: Path) -> None:
    found = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()}
    assert found == {
        "config.json",
        "connector-p64.rbln",
        "generation_config.json",
        "rbln_config.json",
        "text_model/embedding.safetensors",
        "text_model/text-b1-s64-k128-of2.rbln",
        "text_model/text-b2-s1-k128-of2.rbln",
        "vision_model/vision-112x112.rbln",
    }


def test_saving_keeps_other_files_and_takes_away_those_of_the_model_before(compiled: Make, saved: Path) -> None:
    (saved / "preprocessor_config.json").write_text("{}")
    (saved / "text_model" / "text-b9-s1-k128.rbln").write_text("older")
    compiled("idefics3").save_pretrained(saved)
    assert (saved / "preprocessor_config.json").is_file()
    assert not (saved / "text_model" / "text-b9-s1-k128.rbln").exists()
    assert rbln("idefics3").from_pretrained(saved, rbln_create_runtimes=False)


def test_a_loaded_model_can_be_saved_where_it_lies_and_elsewhere(saved: Path, tmp_path: Path) -> None:
    loaded = rbln("idefics3").from_pretrained(saved, rbln_create_runtimes=False)
    loaded.save_pretrained(saved)
    loaded.save_pretrained(tmp_path / "other")
    for folder in (saved, tmp_path / "other"):
        assert rbln("idefics3").from_pretrained(folder, rbln_create_runtimes=False).dtype == torch.float32


def test_a_model_is_saved_whole_or_not_at_all(compiled: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="no space left"):
        compiled("idefics3").save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").iterdir())


def damaged(saved: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    (saved / name).write_bytes(change((saved / name).read_bytes()))


@pytest.mark.parametrize(
    "name",
    ["connector-p64.rbln", "text_model/text-b2-s1-k128-of2.rbln", "text_model/embedding.safetensors", "config.json"],
)
def test_a_truncated_file_is_refused_by_its_name(saved: Path, name: str) -> None:
    damaged(saved, name, lambda content: content[:-7])
    refused(f"{name} is truncated or was changed", lambda: rbln("idefics3").from_pretrained(saved))


def test_a_missing_file_is_refused_by_its_name(saved: Path) -> None:
    (saved / "connector-p64.rbln").unlink()
    refused("connector-p64.rbln is missing", lambda: rbln("idefics3").from_pretrained(saved))


@pytest.mark.parametrize(("key", "value"), [("torch", "1.0"), ("format", 0), ("code", "other")])
def test_files_of_other_versions_are_refused_with_what_differs(saved: Path, key: str, value: object) -> None:
    record = json.loads((saved / "rbln_config.json").read_text())
    record["compiled"][key] = value
    (saved / "rbln_config.json").write_text(json.dumps(record))
    refused(f"{key} is {value!r}, here ", lambda: rbln("idefics3").from_pretrained(saved))


def test_files_of_another_sdk_are_refused_with_both_versions(saved: Path) -> None:
    record = (saved / "rbln_config.json").read_text()
    here = json.loads(record)["compiled"]["entries"]["connector-p64"]["engine"]
    (saved / "rbln_config.json").write_text(record.replace(here, "rebel 0.1 for RBLN-CA25 x 1"))
    refused(
        f"engine of .* is 'rebel 0.1 for RBLN-CA25 x 1.*', here '{re.escape(here)}",
        lambda: rbln("idefics3").from_pretrained(saved),
    )


def test_a_directory_of_another_class_or_of_no_model_is_refused(
    saved: Path, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    kind = rbln("idefics3")
    refused(
        "is of a RBLNIdefics3For.*not of a RBLNMllamaFor", lambda: rbln("mllama").from_pretrained(saved), ValueError
    )
    refused("holds no compiled model.*export=True", lambda: kind.from_pretrained(checkpoints["idefics3"]))
    refused("holds a compiled model; export=True takes a checkpoint", lambda: kind.from_pretrained(saved, export=True))
    (tmp_path / "vendor").mkdir()
    (tmp_path / "vendor" / "rbln_config.json").write_text('{"cls_name": "RBLNIdefics3ForConditionalGenerationConfig"}')
    refused("was not written by vlmqual", lambda: kind.from_pretrained(tmp_path / "vendor"))
    (tmp_path / "file").write_text("")
    loaded = kind.from_pretrained(saved, rbln_create_runtimes=False)
    refused("is a file; a model is saved into a directory", lambda: loaded.save_pretrained(tmp_path / "file"))


# settings ------------------------------------------------------------------------------------------------------------


def test_a_compiled_model_takes_options_and_refuses_other_settings(saved: Path) -> None:
    kind = rbln("idefics3")
    loaded = kind.from_pretrained(
        saved, rbln_config={"batch_size": 2, "device": 3, "text_model": {"device": 1}, "create_runtimes": False}
    )
    assert (loaded.rbln_config.device, loaded.rbln_config.text_model.device) == (3, 1)
    refused(
        "batch_size is 2 in this compiled model; 4 needs export=True",
        lambda: kind.from_pretrained(saved, rbln_batch_size=4),
    )
    refused(
        "text_model.max_seq_len is 128 in this compiled model; 64 ",
        lambda: kind.from_pretrained(saved, rbln_config={"text_model": {"max_seq_len": 64}}),
    )
    refused("was compiled in torch.float32", lambda: kind.from_pretrained(saved, dtype="bfloat16"))


def test_devices_are_looked_for_only_when_runtimes_are_made(saved: Path, compiled: Make) -> None:
    kind = rbln("idefics3")
    made = kind.from_pretrained(saved, rbln_device=99, rbln_create_runtimes=False)
    assert "not loaded" in repr(made)
    assert "emulated" in repr(made)
    refused("create_runtimes=False; it cannot run", lambda: made.generate(**request("idefics3", "batch-left")))
    refused("there is no NPU 99", lambda: kind.from_pretrained(saved, rbln_device=99))
    refused("generate runs it", lambda: compiled("idefics3")(), NotImplementedError)


def test_parts_stand_on_their_devices(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import rebel

    placed: dict[str, object] = {}
    read, run = rebel.RBLNCompiledModel, rebel.Runtime
    names: dict[int, str] = {}

    def named(path: str) -> Any:
        model = read(path)
        names[id(model)] = Path(path).name.partition("-")[0]
        return model

    def noted(model: Any, **options: Any) -> Any:
        placed[names[id(model)]] = (options["device"], options.get("timeout"))
        return run(model, **options)

    monkeypatch.setattr(rebel, "RBLNCompiledModel", named)
    monkeypatch.setattr(rebel, "Runtime", noted)
    settings = {"device": 3, "vision_model": {"device": 2}, "text_model": {"device": 1}, "timeout": 60}
    rbln("idefics3").from_pretrained(saved, rbln_config=settings)
    assert placed == {"vision": (2, 60), "connector": (3, 60), "text": (1, 60)}


def test_what_was_not_compiled_is_refused_before_it_runs(compiled: Make) -> None:
    model = compiled("idefics3")
    inputs = request("idefics3", "batch-left")
    three = {name: torch.cat((tensor, tensor[:1])) for name, tensor in inputs.items()}
    refused("the batch has 3 rows; .* batch_size 2", lambda: model.generate(**three, **GREEDY))
    tokens = inputs["input_ids"].shape[1]
    refused(
        f"the prompt has {tokens} tokens, and {129 - tokens} may follow; .* max_seq_len 128",
        lambda: model.generate(**inputs, max_new_tokens=129 - tokens),
    )
    small = {**inputs, "pixel_values": inputs["pixel_values"][..., :56, :56]}
    small.pop("pixel_attention_mask", None)
    refused("vision-56x56 was not compiled.*vision-112x112", lambda: model.generate(**small, **GREEDY))
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    refused("text-b1-s64-k128-of2 was not compiled", lambda: compiled("mllama").generate(**text, **GREEDY))
    refused("does not know 'no_such'", lambda: model.generate(**text, no_such=1))


def test_keywords_that_are_not_known_are_refused_by_name(checkpoints: dict[str, Path], compiled: Make) -> None:
    kind = rbln("idefics3")
    refused(
        "does not know the keyword 'device_map'",
        lambda: kind.from_pretrained(checkpoints["idefics3"], export=True, device_map="auto"),
        TypeError,
    )
    refused("does not know 'no_such'", lambda: kind.from_pretrained(checkpoints["idefics3"], rbln_no_such=1))
    refused("rbln_config is a int", lambda: kind.from_pretrained(checkpoints["idefics3"], rbln_config=1), TypeError)
    refused(
        "rbln_config is a RBLNMllamaFor",
        lambda: kind.from_pretrained(checkpoints["idefics3"], rbln_config=compiled("mllama").rbln_config),
        TypeError,
    )
    refused("model is a str", lambda: kind.from_model("idefics3"), TypeError)


def test_without_the_sdk_it_is_said_where_it_comes_from(checkpoints: dict[str, Path]) -> None:
    vlmqual_rebel.uninstall()
    try:
        refused(
            "rebel-compiler, comes from https://pypi.rbln.ai/simple; .*vlmqual_rebel.install",
            lambda: rbln("idefics3").from_pretrained(checkpoints["idefics3"], export=True),
            ImportError,
        )
        with pytest.raises(Unsupported, match=r"needs rebel-compiler.*vlmqual_impl:emulate=1"):
            BundledLibrary().resolve("RBLNIdefics3ForConditionalGeneration")
        assert BundledLibrary(emulate="1").emulated
        assert BundledLibrary(emulate="1").resolve("RBLNModel") is vlmqual_impl.RBLNModel
    finally:
        vlmqual_rebel.install()
