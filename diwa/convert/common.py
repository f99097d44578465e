"""What the conversions of checkpoints share: names, sizes, filling a module, leftovers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import checkpoint
from ..errors import CheckpointError

Tensors = dict[str, Tensor]
EXTRA = "extra.safetensors"
"""File of a model folder with the tensors that have no place here."""


@dataclass
class Converted:
    """What a conversion made.

    Attributes:
        folder: where.
        kind: of the model.
        parameters: their number.
        sizes: name -> size, found in the weights or given.
        skipped: original names of tensors without a place here, kept in `extra.safetensors`.
        also: further model folders, such as the base of a fine-tuned policy.
    """

    folder: Path
    kind: str
    parameters: int
    sizes: dict[str, Any]
    skipped: list[str] = field(default_factory=list)
    also: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """A few lines for a person."""
        sizes = ", ".join(f"{k} {v}" for k, v in self.sizes.items())
        lines = [f"{self.folder}: {self.kind}, {self.parameters:,} parameters ({sizes})"]
        lines += [f"  also {name}" for name in self.also]
        if self.skipped:
            lines.append(f"  not used here, kept in {EXTRA}: {', '.join(self.skipped)}")
        return "\n".join(lines)


def canonical(
    found: Tensors, anchors: Sequence[str], rename: Sequence[str]
) -> tuple[Tensors, dict[str, str]]:
    """Tensors under the names of LUMOS or DPPO, and those names -> the file's where they differ."""
    prefix = ""
    for anchor in anchors:
        ends = [name for name in found if name.endswith("." + anchor)]
        if ends and anchor not in found:
            prefix = ends[0].removesuffix(anchor)
            break
    tensors: Tensors = {}
    names: dict[str, str] = {}
    for name, tensor in found.items():
        new = name.removeprefix(prefix).replace("_orig_mod.", "")
        for rule in rename:
            old, equals, replacement = rule.partition("=")
            if not equals:
                raise CheckpointError(f"--rename takes OLD=NEW, not {rule!r}")
            if new.startswith(old):
                new = replacement + new.removeprefix(old)
        if new in tensors:
            raise CheckpointError(f"{names.get(new, new)} and {name} are both named {new}")
        tensors[new] = tensor
        if new != name:
            names[new] = name
    return tensors, names


def size(path: Path, tensors: Mapping[str, Tensor], name: str, dim: int) -> int:
    """Length of a tensor's dimension; CheckpointError if there is no such tensor."""
    if name not in tensors:
        shown = ", ".join(list(tensors)[:4])
        raise CheckpointError(f"{path} has no {name}; it has {shown}, ... (see --rename)")
    if tensors[name].dim() <= dim:
        raise CheckpointError(f"{path}: {name} has shape {tuple(tensors[name].shape)}")
    return tensors[name].shape[dim]


def fill(
    path: Path, module: nn.Module, tensors: Mapping[str, Tensor], names: Callable[[str], str]
) -> None:
    """Load every tensor of a module, and no other; `names(own)` is the file's name for messages.

    Raises:
        CheckpointError: one is missing, of another shape or not of floating point.
    """
    problems = []
    for own, value in module.state_dict().items():
        if own not in tensors:
            problems.append(f"{names(own)}: missing in the file")
        elif tensors[own].shape != value.shape:
            shapes = f"file {tuple(tensors[own].shape)}, expected {tuple(value.shape)}"
            problems.append(f"{names(own)}: {shapes}")
        elif not tensors[own].is_floating_point():
            problems.append(f"{names(own)}: is {tensors[own].dtype}")
        elif not torch.isfinite(tensors[own]).all():
            problems.append(f"{names(own)}: holds NaN or infinity")
    problems += [f"{names(own)}: unknown" for own in tensors if own not in module.state_dict()]
    if problems:
        raise CheckpointError(
            f"{path} does not fit a {type(module).__name__} of the size that its other tensors "
            f"tell:\n{checkpoint.shorten(problems)}"
        )
    module.load_state_dict({own: tensors[own] for own in module.state_dict()})


def leftover(path: Path, rest: Tensors, known: Sequence[str], skip_unknown: bool) -> Tensors:
    """Tensors that are not used: those `known` to be superfluous, and others if allowed."""
    unknown = sorted(name for name in rest if name not in known)
    if unknown and not skip_unknown:
        raise CheckpointError(
            f"{path} has tensors that have no place here:\n{checkpoint.shorten(unknown)}\n"
            "Add --skip-unknown to convert the rest."
        )
    return rest


def write(folder: Path, module: nn.Module, meta: dict[str, Any], extra: Tensors) -> int:
    """Write a model folder, config.json last; returns the number of parameters."""
    if extra:
        checkpoint.write_tensors(folder / EXTRA, extra)
    checkpoint.save_model(folder, module, meta)
    return sum(p.numel() for p in module.parameters())
