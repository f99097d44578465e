"""Diffusion policies of DPPO and DiWA, their frozen base and their critic: method section 3.1."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .. import checkpoint
from ..agent import load_policy
from ..config import PolicyConfig, from_dict, to_dict
from ..errors import CheckpointError
from ..nn.diffusion import DiffusionPolicy
from ..nn.heads import Critic
from ..nn.world_model import ACTION_DIM
from .common import EXTRA, Converted, Tensors, fill, leftover, size, write

_RESIDUAL = {"0.": "first.", "1.l1.": "hidden1.", "1.l2.": "hidden2.", "2.": "out."}
_TIME = {"time_embedding.1.": "net.time.0.", "time_embedding.3.": "net.time.2."}


def convert_policy(
    path: Path,
    folder: Path,
    tensors: Tensors,
    origin: dict,
    config: PolicyConfig,
    ft_steps: int,
    skip_unknown: bool,
) -> Converted:
    """A pre-trained policy, or a fine-tuned one with its base and critic."""
    parts: dict[str, Tensors] = {}
    rest: Tensors = {}
    for name, tensor in tensors.items():
        head, _, tail = name.partition(".")
        if head in ("network", "actor", "actor_ft", "critic") and tail:
            parts.setdefault(head, {})[tail] = tensor
        else:
            rest[name] = tensor
    tuned = "actor_ft" in parts
    base = next((p for p in ("network", "actor") if p in parts), None)
    main = "actor_ft" if tuned else base
    if main is None:
        raise CheckpointError(
            f"{path} has no tensors named network., actor. or actor_ft.; it has "
            f"{', '.join(list(tensors)[:4])}, ... (see --rename)"
        )
    if base == "network" and "actor" in parts:  # one network under two names
        _same(path, parts["network"], parts.pop("actor"))
        origin = origin | {"actor_too": True}
    extra = leftover(path, rest, (), skip_unknown)
    policy = _policy(path, main, parts[main], config)
    critic = _critic(path, parts["critic"]) if "critic" in parts else None
    base_policy = _policy(path, base, parts[base], config) if tuned and base else None
    made = Converted(folder, "policy", 0, {})
    shape = {"config": to_dict(policy.config), "cond_dim": policy.cond_dim, "origin": origin}
    if critic is not None:
        meta = {"kind": "critic", "feature_dim": policy.cond_dim, "width": critic.out.in_features}
        write(folder / "critic", critic, meta, {})
        made.also.append(f"{folder / 'critic'}")
    if base_policy is not None:
        meta = {"kind": "policy", "ft_steps": 0, **shape, "part": base}
        write(folder / "base", base_policy, meta, {})
        made.also.append(f"{folder / 'base'}, the frozen policy of the first steps")
    steps = ft_steps if tuned else 0
    meta = {"kind": "policy", "ft_steps": steps, **shape, "part": main}
    made.parameters = write(folder, policy, meta, extra)
    c = policy.config
    made.sizes = {
        "features": policy.cond_dim,
        "chunk": f"{c.chunk} x {ACTION_DIM}",
        "width": c.width,
        "denoising steps": c.denoising_steps,
        "fine-tuned steps": steps,
    }
    made.skipped = sorted(extra)
    return made


def _same(path: Path, one: Tensors, other: Tensors) -> None:
    if one.keys() != other.keys() or any(not torch.equal(one[k], other[k]) for k in one):
        raise CheckpointError(f"{path}: network. and actor. should be one network but differ")


def _policy(path: Path, part: str, tensors: Tensors, config: PolicyConfig) -> DiffusionPolicy:
    """`DiffusionMLP` with one residual block; the first layer's columns are taken apart."""
    layer = "mlp_mean.layers."
    inputs = size(path, tensors, f"{layer}0.weight", 1)
    chunk_dim = size(path, tensors, f"{layer}2.weight", 0)
    time_dim = size(path, tensors, "time_embedding.3.weight", 0)
    cond_dim = inputs - chunk_dim - time_dim
    if chunk_dim % ACTION_DIM or cond_dim <= 0:
        raise CheckpointError(
            f"{path}: {part}.{layer}2.weight gives chunks of {chunk_dim} numbers and "
            f"{part}.{layer}0.weight takes {inputs}; that does not fit actions of {ACTION_DIM}"
        )
    values: dict[str, Any] = to_dict(config)
    values |= {
        "chunk": chunk_dim // ACTION_DIM,
        "width": size(path, tensors, f"{layer}0.weight", 0),
        "time_dim": time_dim,
    }
    policy = DiffusionPolicy(cond_dim, from_dict(PolicyConfig, values))
    ours, unknown = {}, []
    for name, tensor in tensors.items():
        table = _TIME if name.startswith("time_embedding.") else _with(layer, _RESIDUAL)
        prefix = next((p for p in table if name.startswith(p)), None)
        if prefix is None:
            unknown.append(f"{part}.{name}")
        else:
            own = table[prefix] + name.removeprefix(prefix)
            ours[own if own.startswith("net.") else f"net.{own}"] = tensor
    if unknown:
        raise CheckpointError(
            f"{path} is of another network than one residual block of Mish without layer norm:\n"
            f"{checkpoint.shorten(unknown)}"
        )
    if "net.first.weight" in ours:
        split = ours.pop("net.first.weight").split([chunk_dim, time_dim, cond_dim], dim=1)
        names = ("net.chunk_in.weight", "net.time_in.weight", "net.cond_in.weight")
        ours |= dict(zip(names, split, strict=True))
    if "net.first.bias" in ours:
        ours["net.cond_in.bias"] = ours.pop("net.first.bias")
    fill(path, policy, ours, lambda own: f"{part}.{_dppo_name(own)}")
    return policy


def _with(prefix: str, table: Mapping[str, str]) -> dict[str, str]:
    return {prefix + key: value for key, value in table.items()}


def _dppo_name(own: str) -> str:
    own = own.removeprefix("net.")
    for name in ("chunk_in.", "time_in.", "cond_in."):
        own = own.replace(name, "first.")
    for theirs, ours in (_with("mlp_mean.layers.", _RESIDUAL) | _TIME).items():
        ours = ours.removeprefix("net.")
        if own.startswith(ours):
            return theirs + own.removeprefix(ours)
    raise KeyError(own)


def _critic(path: Path, tensors: Tensors) -> Critic:
    table = _with("Q1.layers.", _RESIDUAL)
    ours = {}
    for name, tensor in tensors.items():
        prefix = next((p for p in table if name.startswith(p)), None)
        if prefix is None:
            raise CheckpointError(f"{path}: critic.{name} is of another critic than ours")
        ours[table[prefix] + name.removeprefix(prefix)] = tensor
    width, feature_dim = (size(path, ours, "first.weight", d) for d in (0, 1))
    critic = Critic(feature_dim, width)
    fill(path, critic, ours, lambda own: f"critic.Q1.layers ({own})")
    return critic


def export_policy(folder: Path) -> Tensors:
    """Tensors under DPPO's names; a fine-tuned policy comes with its base and critic.

    Raises:
        CheckpointError: a Gaussian policy, or a fine-tuned one without `base` beside its weights.
    """
    meta = checkpoint.read_meta(folder)
    if meta["config"].get("kind", "diffusion") != "diffusion":
        raise CheckpointError(
            f"{folder} holds a Gaussian policy; only diffusion policies have a form"
        )
    part = meta.get("part", "actor_ft" if meta["ft_steps"] else "network")
    tensors = _export_network(folder, part)
    if meta["ft_steps"]:
        if not (folder / "base" / "config.json").exists():
            raise CheckpointError(
                f"{folder} is fine-tuned but has no folder `base` with the policy it came from; "
                f"copy that policy's folder to {folder / 'base'}"
            )
        base = checkpoint.read_meta(folder / "base").get("part", "network")
        tensors |= _export_network(folder / "base", base)
        part = base
    if meta.get("origin", {}).get("actor_too"):
        tensors |= {
            f"actor.{name.removeprefix('network.')}": value.clone()
            for name, value in tensors.items()
            if name.startswith("network.")
        }
    if (folder / "critic" / "config.json").exists():
        shape = checkpoint.read_meta(folder / "critic")
        critic = Critic(shape["feature_dim"], shape["width"])
        checkpoint.load_state(folder / "critic", critic)
        table = {own: theirs for theirs, own in _with("Q1.layers.", _RESIDUAL).items()}
        for own, value in critic.state_dict().items():
            layer, _, name = own.rpartition(".")
            tensors[f"critic.{table[layer + '.']}{name}"] = value
    if (folder / EXTRA).exists():
        tensors |= checkpoint.read_tensors(folder / EXTRA)
    return tensors


def _export_network(folder: Path, part: str) -> Tensors:
    own = load_policy(folder)[0].state_dict()
    first = [own.pop(f"net.{name}.weight") for name in ("chunk_in", "time_in", "cond_in")]
    tensors = {f"{part}.mlp_mean.layers.0.weight": torch.cat(first, dim=1)}
    return tensors | {f"{part}.{_dppo_name(name)}": value for name, value in own.items()}
