"""Checkpoints: safetensors, in one file or in shards, to a model on the meta device and back.

Loading is strict. A model never exists twice: tensors are read one at a time into their place, in the wanted dtype and
cut for this rank, and a file's mapping is dropped every gibibyte.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vlmqual_impl.checkpoints import CheckpointError
from vlmqual_impl.configs import ConfigError, read_json
from vlmqual_impl.tp import Cut

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MAPPED_BYTES = 1 << 30
_FLOATS = ("F64", "F32", "F16", "BF16")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class _Unfilled(TorchFunctionMode):
    """Leaves out what fills new weights with numbers."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run `func`, unless it is an initialisation; that returns its tensor."""
        named = dict(kwargs or {})
        if getattr(func, "__module__", "") == "torch.nn.init" or func == Tensor.normal_:
            return named["tensor"] if "tensor" in named else args[0]
        return func(*args, **named)


@contextmanager
def unfilled() -> Iterator[None]:
    """Where a model is made to be loaded: on the meta device, without numbers.

    Initialising what has no storage does nothing, slowly: torch would load its compiler for random numbers there.
    """
    with torch.device("meta"), _Unfilled():
        yield


def stored(directory: Path) -> dict[str, Path]:
    """Names of all stored tensors to the file that holds them.

    Raises:
        CheckpointError: there are no safetensors files, one that the index names is missing, or one cannot be read.
    """
    index = directory / INDEX
    if index.is_file():
        try:
            table = read_json(index).get("weight_map")
        except ConfigError as error:
            raise CheckpointError(str(error)) from error
        if not isinstance(table, dict) or not table:
            raise CheckpointError(f"{index}: there is no weight_map in it")
        files = {str(name): directory / str(file) for name, file in table.items()}
        for file in sorted(set(files.values())):
            held = set(_names(file))
            lost = sorted(name for name, where in files.items() if where == file and name not in held)
            if lost:
                raise CheckpointError(f"{file}: {_list(lost)} not in it, although the index says so")
        return files
    single = directory / SINGLE
    if not single.is_file():
        others = sorted(path.name for path in directory.glob("*.bin"))
        hint = f"; {others[0]} is there, but only safetensors files are read" if others else ""
        raise CheckpointError(f"{directory}: there is neither {SINGLE} nor {INDEX}{hint}")
    return dict.fromkeys(_names(single), single)


def _names(file: Path) -> list[str]:
    if not file.is_file():
        raise CheckpointError(f"{file}: the index names this file, but it is missing")
    with _opened(file) as handle:
        return list(handle.keys())


def _opened(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        size = file.stat().st_size
        raise CheckpointError(f"{file}: truncated or no safetensors file, {size} bytes long ({error})") from error


def ties_head(config_dict: Mapping[str, Any], directory: Path) -> bool:
    """True when a checkpoint's head is its embedding.

    The 4.46 layout leaves `tie_word_embeddings` out of a composite config.json where it is true, and a tied head is
    stored once; so a missing key and a missing head mean a tied one. A key that is there decides.
    """
    said = config_dict.get("tie_word_embeddings")
    return "lm_head.weight" not in stored(directory) if said is None else bool(said)


def wanted_name(name: str, expected: Mapping[str, Any], rename: Sequence[tuple[str, str | None]]) -> str | None:
    """A stored tensor's name in the model; None when it is no weight of this model.

    A checkpoint of the model without its head lacks the prefix "model.", and loading one with a head into the model
    without drops the head.
    """
    for pattern, replacement in rename:
        if re.search(pattern, name):
            if replacement is None:
                return None
            name = re.sub(pattern, replacement, name)
    if name in expected or f"model.{name}" in expected:
        return name if name in expected else f"model.{name}"
    if name.removeprefix("model.") in expected:
        return name.removeprefix("model.")
    headless = not any(key.startswith("lm_head.") for key in expected)
    return None if headless and name.startswith("lm_head.") else name


def load(
    model: nn.Module,
    directory: Path,
    *,
    rename: Sequence[tuple[str, str | None]] = (),
    cuts: Mapping[str, Cut] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> None:
    """Fill a model on the meta device.

    Args:
        model: its parameters are replaced; parameters that are one object stay one, and frozen ones stay frozen.
        directory: holds model.safetensors, or shards with their index.
        rename: pattern and replacement of names that differ, None to skip a tensor.
        cuts: parts of tensors that this rank keeps.
        dtype: of the parameters, whatever the stored one.
        device: where they go.

    Raises:
        CheckpointError: a tensor is missing, left over, of another shape or no floating-point number, tied tensors
            differ, or a file is damaged.
    """
    owners = _owners(model)
    expected = dict(owners)
    tied = _aliases(model)
    sources: dict[str, tuple[str, Path]] = {}
    extra: list[str] = []
    for name, file in stored(directory).items():
        target = wanted_name(name, expected | tied, rename)
        if target is None:
            continue
        if target not in expected and target not in tied:
            extra.append(name)
        elif target in sources:
            raise CheckpointError(f"{directory}: both {sources[target][0]} and {name} are {target}")
        else:
            sources[target] = (name, file)
    for alias, original in tied.items():  # a file may hold either name of a shared tensor, or both
        if alias in sources and original not in sources:
            sources[original] = sources.pop(alias)
    missing = sorted(set(expected) - set(sources))
    if missing:
        raise CheckpointError(f"{directory}: {_list(missing)} missing, which {type(model).__name__} needs")
    if extra:
        raise CheckpointError(
            f"{directory}: {_list(sorted(extra))} left over, which {type(model).__name__} does not have"
        )
    by_file: dict[Path, dict[str, str]] = {}
    for target, (name, file) in sources.items():
        by_file.setdefault(file, {})[name] = target
    held: dict[str, Tensor] = {}
    for file, names in by_file.items():
        for name, piece in _pieces(file, names, expected, tied, cuts or {}):
            target = names[name]
            value = torch.empty(piece.shape, dtype=dtype, device=device)
            value.copy_(piece)
            if target in tied:
                held[target] = value
                continue
            module, attribute = owners[target][0]
            parameter = nn.Parameter(value, requires_grad=getattr(module, attribute).requires_grad)
            for module, attribute in owners[target]:
                setattr(module, attribute, parameter)
    for alias, value in held.items():
        if not torch.equal(value, model.get_parameter(tied[alias]).detach()):
            raise CheckpointError(f"{directory}: {alias} differs from {tied[alias]}, although config.json ties them")


def _owners(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Every parameter's first name to the modules and attributes that hold it."""
    first: dict[int, str] = {}
    owners: dict[str, list[tuple[nn.Module, str]]] = {}
    for prefix, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            name = first.setdefault(id(parameter), f"{prefix}.{attribute}" if prefix else attribute)
            owners.setdefault(name, []).append((module, attribute))
    return owners


def _aliases(model: nn.Module) -> dict[str, str]:
    """Further names of parameters that have several, to the first one."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        original = first.setdefault(id(parameter), name)
        if original != name:
            aliases[name] = original
    return aliases


def _pieces(
    file: Path,
    names: Mapping[str, str],
    expected: Mapping[str, list[tuple[nn.Module, str]]],
    tied: Mapping[str, str],
    cuts: Mapping[str, Cut],
) -> Iterator[tuple[str, Tensor]]:
    """This rank's part of every named tensor of a file."""
    waiting = list(names)
    while waiting:
        mapped = 0
        with _opened(file) as handle:
            while waiting and mapped < _MAPPED_BYTES:
                name = waiting.pop(0)
                target = tied.get(names[name], names[name])
                module, attribute = expected[target][0]
                shape = tuple(getattr(module, attribute).shape)
                view = handle.get_slice(name)
                piece = _cut(file, name, view, shape, cuts.get(target))
                mapped += piece.nbytes
                yield name, piece


def _cut(file: Path, name: str, view: Any, shape: tuple[int, ...], cut: Cut | None) -> Tensor:
    whole = tuple(view.get_shape())
    if view.get_dtype() not in _FLOATS:
        raise CheckpointError(f"{file}: {name} is stored as {view.get_dtype()}; {', '.join(_FLOATS)} can be read")
    if cut is not None:
        wanted = list(shape)
        if cut.dim < len(whole):
            wanted[cut.dim] = whole[cut.dim]
        if whole != tuple(wanted) or cut.stop > whole[cut.dim]:
            raise CheckpointError(f"{file}: {name} has shape {whole}; rank part {cut} of it has to be {shape}")
        index = (slice(None),) * cut.dim + (slice(cut.start, cut.stop),)
        part: Tensor = view[index]
        return part
    if whole != shape:
        raise CheckpointError(f"{file}: {name} has shape {whole}; the configuration wants {shape}")
    everything: Tensor = view[(slice(None),) * len(whole)] if whole else view[...]
    return everything


def stored_dtype(directory: Path) -> torch.dtype:
    """Dtype of the first stored floating-point tensor."""
    kinds = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    for name, file in stored(directory).items():
        with _opened(file) as handle:
            kind = handle.get_slice(name).get_dtype()
        if kind in kinds:
            return kinds[kind]
    raise CheckpointError(f"{directory}: no floating-point tensor is stored")


def shard_bytes(size: int | str) -> int:
    """A shard size such as 5000000 or "5GB" in bytes.

    Raises:
        ValueError: it is neither.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(size))
    if not match or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise ValueError(f"max_shard_size is {size!r}; it has to be a number of bytes or a text such as '5GB'")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def save(model: nn.Module, directory: Path, max_shard_size: int | str = "5GB") -> None:
    """Write a model's parameters in the layout that transformers reads; shared tensors are written once.

    Files of an earlier save in the same directory are replaced, and shards that are no longer named are removed.

    Raises:
        ValueError: `max_shard_size` is no size.
    """
    limit = shard_bytes(max_shard_size)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}  # the first name of each
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    count = len(shards)
    files = [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for file, names in zip(files, shards, strict=True):
        part = {name: tensors[name].to("cpu").contiguous() for name in names}
        save_file(part, directory / f".{file}.part", metadata={"format": "pt"})
    for file in files:  # only now, so that a save that fails leaves the old files readable
        (directory / f".{file}.part").replace(directory / file)
    for old in [*directory.glob("model-*-of-*.safetensors"), directory / SINGLE, directory / INDEX]:
        if old.name not in files and old.exists():
            old.unlink()
    if count > 1:
        table = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = sum(tensor.nbytes for tensor in tensors.values())
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": table}, indent=2, sort_keys=True)
        (directory / INDEX).write_text(text + "\n", encoding="utf-8")


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    verb = "is" if len(names) == 1 else "are"
    return f"{shown}{f' and {len(names) - 3} more' if len(names) > 3 else ''} {verb}"
