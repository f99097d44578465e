"""Checkpoints: safetensors for numbers, JSON for structure, atomic replacement, no pickle.

Two kinds. A *model* is a folder with `model.safetensors` and `config.json` (what is needed to build
the module again). A *training state* is everything that makes a resumed phase continue exactly:
modules, optimizers, generators and the step. Its tensors lie in a file of their own that
`state.json` names, so that replacing `state.json` switches from one state to the next at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .errors import CheckpointError

TEMP_SUFFIX = ".tmp"


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data` atomically and durably; its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.{os.getpid()}{TEMP_SUFFIX}")
    try:
        with open(temp, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, atomically; NumPy scalars and arrays become numbers and lists."""
    write_bytes(path, (json.dumps(value, indent=2, default=_plain) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        CheckpointError: the file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); delete it and make it again") from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors (any shape, dtype and device) as safetensors, atomically."""
    # The copy unties shared memory, which safetensors refuses.
    plain = {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()
    }
    write_bytes(path, safetensors.torch.save(plain))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file into CPU tensors.

    Raises:
        CheckpointError: the file is missing, truncated or not safetensors.
    """
    try:
        return safetensors.torch.load_file(path)
    except (FileNotFoundError, IsADirectoryError):
        raise CheckpointError(f"{path} does not exist") from None
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file ({error}); make it again"
        ) from None


def save_model(folder: str | Path, module: nn.Module, meta: Mapping[str, Any]) -> None:
    """Write `folder/model.safetensors` and `folder/config.json` (`meta`: how to rebuild it)."""
    folder = Path(folder)
    write_tensors(folder / "model.safetensors", module.state_dict())
    write_json(folder / "config.json", dict(meta))


def read_meta(folder: str | Path) -> dict[str, Any]:
    """The `meta` that `save_model` was given.

    Raises:
        CheckpointError: `config.json` is missing or damaged.
    """
    return read_json(Path(folder) / "config.json")


def load_state(folder: str | Path, module: nn.Module, *, strict: bool = True) -> None:
    """Load `folder/model.safetensors` into `module`, in place; dtype and device are the module's.

    Args:
        strict: whether missing and extra tensors are errors; tensors of another shape always are.

    Raises:
        CheckpointError: the file is missing or damaged, or belongs to another architecture; then
            the message names the tensors and both shapes.
    """
    path = Path(folder) / "model.safetensors"
    tensors = read_tensors(path)
    own = module.state_dict()
    problems = [
        f"{name}: file {tuple(tensors[name].shape)}, model {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if strict:
        problems += [f"{name}: missing in the file" for name in own if name not in tensors]
        problems += [f"{name}: unknown to the model" for name in tensors if name not in own]
    if problems:
        raise CheckpointError(
            f"{path} does not fit this {type(module).__name__}, it is of another architecture:\n"
            f"{shorten(problems)}\nUse the settings in {path.with_name('config.json')}."
        )
    module.load_state_dict(tensors, strict=strict)


def save_training_state(
    folder: Path,
    *,
    modules: Mapping[str, Any],
    generators: Mapping[str, torch.Generator | np.random.Generator],
    values: Mapping[str, Any],
) -> None:
    """Write the state of a phase; until the last rename a reader still sees the state before.

    Args:
        modules: anything with `state_dict()`: modules, optimizers, learning-rate schedules.
        generators: random generators of torch or NumPy.
        values: nested dicts and lists of tensors, arrays and JSON values.
    """
    tensors: dict[str, Tensor] = {}
    state = {
        "modules": _split({key: item.state_dict() for key, item in modules.items()}, "m", tensors),
        "generators": _split({k: _generator_state(g) for k, g in generators.items()}, "g", tensors),
        "values": _split(dict(values), "v", tensors),
    }
    old = _tensor_file(folder)
    name = "tensors-b.safetensors" if old == "tensors-a.safetensors" else "tensors-a.safetensors"
    write_tensors(folder / name, tensors)
    write_json(folder / "state.json", {"tensors": name, **state})
    if old is not None:
        (folder / old).unlink(missing_ok=True)


def load_training_state(
    folder: Path,
    *,
    modules: Mapping[str, Any],
    generators: Mapping[str, torch.Generator | np.random.Generator],
) -> dict[str, Any] | None:
    """Load a state written by `save_training_state` in place and return its `values`.

    Returns:
        None where there is no state.

    Raises:
        CheckpointError: the state is damaged or made by other modules or settings.
    """
    if not (folder / "state.json").exists():
        return None
    state = read_json(folder / "state.json")
    try:
        tensors = read_tensors(folder / state["tensors"])
        saved_modules = _join(state["modules"], tensors)
        saved_generators = _join(state["generators"], tensors)
        _same_names(saved_modules, modules)
        _same_names(saved_generators, generators)
        for name, item in modules.items():
            item.load_state_dict(saved_modules[name])
        for name, generator in generators.items():
            if isinstance(generator, torch.Generator):
                generator.set_state(saved_generators[name])
            else:
                generator.bit_generator.state = saved_generators[name]
        return _join(state["values"], tensors)
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        raise CheckpointError(
            f"{folder} cannot be resumed: {error}\nDelete that folder to start the phase again."
        ) from None


def _tensor_file(folder: Path) -> str | None:
    try:
        return json.loads((folder / "state.json").read_text())["tensors"]
    except (OSError, ValueError, KeyError):
        return None


def _same_names(saved: Iterable[str], wanted: Iterable[str]) -> None:
    if set(saved) != set(wanted):
        raise ValueError(f"it holds {sorted(saved)}, wanted are {sorted(wanted)}")


def _generator_state(generator: torch.Generator | np.random.Generator) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    return generator.bit_generator.state


def _split(value: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """JSON form of a nested value; tensors and arrays move to `tensors` and leave their name."""
    if isinstance(value, Tensor):
        tensors[prefix] = value
        return {"$tensor": prefix}
    if isinstance(value, np.ndarray):
        tensors[prefix] = torch.from_numpy(np.ascontiguousarray(value))
        return {"$array": prefix}
    if isinstance(value, Mapping):
        # As a list, because an optimizer's keys are integers and JSON's are not.
        return {"$dict": [[k, _split(v, f"{prefix}.{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_split(item, f"{prefix}.{i}", tensors) for i, item in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    return _plain(value)


def _join(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Inverse of `_split`."""
    if isinstance(value, list):
        return [_join(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "$tensor":
        return tensors[content]
    if kind == "$array":
        return tensors[content].numpy()
    if kind == "$tuple":
        return tuple(_join(item, tensors) for item in content)
    return {key: _join(item, tensors) for key, item in content}


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{type(value).__name__} cannot be stored")


def shorten(lines: list[str], most: int = 6) -> str:
    """The first lines, indented, and how many more there are."""
    rest = len(lines) - most
    return "\n".join(f"  {line}" for line in lines[:most]) + (
        f"\n  ... and {rest} more" if rest > 0 else ""
    )
