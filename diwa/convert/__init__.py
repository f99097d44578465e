"""Checkpoints of LUMOS, DiWA and DPPO <-> model folders of safetensors.

Names of tensors are those of the public, MIT-licensed LUMOS and DPPO, from which DiWA descends;
DiWA's own files were not consulted. Sizes are those of method sections 1, 3 and 4. Files are opened
weights-only (`foreign`). What has no place here is named: either refused, or kept in
`extra.safetensors` for the way back.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .. import checkpoint
from ..config import PolicyConfig
from ..errors import CheckpointError
from .common import Converted, Tensors, canonical
from .foreign import load_foreign, state_dict
from .policy import convert_policy, export_policy
from .reward import convert_reward, export_reward
from .world_model import convert_world_model, export_world_model, load_vision_world_model

__all__ = ["Converted", "convert_checkpoint", "export_checkpoint", "load_vision_world_model"]


def convert_checkpoint(
    file: str | Path,
    folder: str | Path,
    kind: str,
    *,
    weights: str = "auto",
    denoising_steps: int = 20,
    ft_steps: int = 10,
    stoch_classes: int = 32,
    rename: Sequence[str] = (),
    skip_unknown: bool = False,
) -> Converted:
    """Convert a checkpoint file into a model folder.

    Args:
        file: checkpoint of torch or Lightning.
        folder: model folder to make.
        kind: `"world-model"`, `"policy"` or `"reward"`.
        weights: dict of a policy to take: `"ema"`, `"model"` or `"auto"` (the former if there).
        denoising_steps, ft_steps: K and Kf of a policy.
        stoch_classes: C of a world model.
        rename: `OLD=NEW` prefixes of names to replace first.
        skip_unknown: keep tensors that have no place here instead of refusing them.

    Raises:
        CheckpointError: the file is damaged or refused, or names or shapes do not fit; the message
            names them.
    """
    path, folder = Path(file), Path(folder)
    if (folder / "config.json").exists():
        raise CheckpointError(f"{folder} holds a model already; give another folder")
    containers = {
        "world-model": ("state_dict", "model", "model_state_dict"),
        "policy": ("ema", "model", "state_dict") if weights == "auto" else (weights,),
        "reward": ("state_dict", "model", "model_state_dict"),
    }
    if kind not in containers:
        raise CheckpointError(f"kind is {kind!r}; choose from {', '.join(containers)}")
    container, found = state_dict(load_foreign(path), path, containers[kind])
    tensors, names = canonical(found, _anchors(kind), rename)
    origin = {"file": path.name, "container": container, "names": names}
    if kind == "world-model":
        return convert_world_model(path, folder, tensors, origin, stoch_classes, skip_unknown)
    if kind == "policy":
        config = PolicyConfig(denoising_steps=denoising_steps)
        return convert_policy(path, folder, tensors, origin, config, ft_steps, skip_unknown)
    return convert_reward(path, folder, tensors, origin, skip_unknown)


def _anchors(kind: str) -> tuple[str, ...]:
    """Names that tell which prefix, such as `module.`, stands before all of them."""
    if kind == "world-model":
        return ("rssm_core.cell.z_mlp.weight",)
    if kind == "policy":
        last = "mlp_mean.layers.0.weight"
        return (f"actor_ft.{last}", f"network.{last}", f"actor.{last}")
    return ()


def export_checkpoint(folder: str | Path, file: str | Path) -> None:
    """Write a model folder as a checkpoint file with the original's names and containers.

    World models are written as Lightning does (`state_dict`), pre-trained policies under `model`
    and `ema`, fine-tuned ones under `model` with their base and critic, classifiers as found.

    Raises:
        CheckpointError: the folder is missing or damaged, or of a kind that has no such form.
    """
    folder, path = Path(folder), Path(file)
    meta = checkpoint.read_meta(folder)
    exports = {
        "vision_world_model": export_world_model,
        "policy": export_policy,
        "reward": export_reward,
    }
    kind = meta.get("kind")
    if kind not in exports:
        raise CheckpointError(
            f"{folder} holds a {kind} model; these have a form in the original: "
            f"{', '.join(exports)}"
        )
    origin = meta.get("origin", {})
    tensors: Tensors = exports[kind](folder)
    names = origin.get("names", {})
    tensors = {names.get(name, name): value.contiguous() for name, value in tensors.items()}
    content: dict[str, Any]
    if kind == "vision_world_model":
        content = {"epoch": 0, "global_step": 0, "pytorch-lightning_version": "2.0.0"}
        content["state_dict"] = tensors
    elif kind == "policy" and meta["ft_steps"]:
        content = {"itr": 0, "model": tensors}
    elif kind == "policy":
        content = {"epoch": 0, "model": tensors, "ema": tensors}
    else:
        container = origin.get("container", "")
        content = {container: tensors} if container else dict(tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.tmp")
    try:
        torch.save(content, temp)
        temp.replace(path)
    finally:
        temp.unlink(missing_ok=True)
