"""Success classifiers of DiWA: method section 4.1.

Their names are not published; four linear layers that follow each other (features -> width ->
embedding -> width -> 2) are recognised by their shapes, whatever they are called.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from .. import checkpoint
from ..agent import load_classifier, save_classifier
from ..config import RewardConfig, to_dict
from ..errors import CheckpointError
from ..nn.heads import RewardClassifier
from .common import EXTRA, Converted, Tensors, fill, leftover

LAYERS = ("embed.0", "embed.2", "classify.0", "classify.2")
"""Our linear layers in order."""


def convert_reward(
    path: Path, folder: Path, tensors: Tensors, origin: dict[str, Any], skip_unknown: bool
) -> Converted:
    """The classifier; its layers' names go into the folder's config.json.

    Raises:
        CheckpointError: the layers do not form the chain, or form it in more than one way.
    """
    layers = _chain(path, tensors)
    weights = [tensors[f"{layer}.weight"] for layer in layers]
    feature_dim, width, embed = weights[0].shape[1], weights[0].shape[0], weights[1].shape[0]
    if weights[2].shape[0] != width:
        raise CheckpointError(
            f"{path}: hidden widths {width} and {weights[2].shape[0]} differ; ours is one"
        )
    model = RewardClassifier(feature_dim, width, embed)
    used = dict(zip(LAYERS, layers, strict=True))
    ours = {
        f"{own}.{part}": tensors[f"{theirs}.{part}"]
        for own, theirs in used.items()
        for part in ("weight", "bias")
        if f"{theirs}.{part}" in tensors
    }
    taken = {f"{layer}.{part}" for layer in layers for part in ("weight", "bias")}
    extra = leftover(path, {n: t for n, t in tensors.items() if n not in taken}, (), skip_unknown)

    def original(own: str) -> str:
        layer, _, part = own.rpartition(".")
        return f"{used[layer]}.{part}"

    fill(path, model, ours, original)
    if embed != 256:
        raise CheckpointError(f"{path}: an embedding of {embed} numbers; ours has 256")
    if extra:
        checkpoint.write_tensors(folder / EXTRA, extra)
    config = RewardConfig(kind="classifier", width=width)
    meta = {"config": to_dict(config), "feature_dim": feature_dim}
    save_classifier(folder, model, meta | {"origin": origin | {"layers": list(layers)}})
    count = sum(p.numel() for p in model.parameters())
    sizes = {"features": feature_dim, "width": width, "embedding": embed}
    return Converted(folder, "success classifier", count, sizes, sorted(extra))


def _chain(path: Path, tensors: Tensors) -> tuple[str, ...]:
    """Names of the four layers, found from the last one (two classes) backwards."""
    linear = {n.removesuffix(".weight"): t for n, t in tensors.items() if n.endswith(".weight")}
    linear = {n: t for n, t in linear.items() if t.dim() == 2}
    chains: list[tuple[str, ...]] = [(n,) for n, t in linear.items() if t.shape[0] == 2]
    for _ in range(len(LAYERS) - 1):
        chains = [
            (name, *chain)
            for chain in chains
            for name, tensor in linear.items()
            if name not in chain and tensor.shape[0] == linear[chain[0]].shape[1]
        ]
    if len(chains) != 1:
        shapes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in linear.items())
        raise CheckpointError(
            f"{path}: {len(chains)} ways to read its layers as features -> width -> embedding -> "
            f"width -> 2 classes ({shapes or 'no linear layers'})"
        )
    return chains[0]


def export_reward(folder: Path) -> Tensors:
    """Tensors under the names they had, or ours if the classifier was trained here."""
    model: nn.Module = load_classifier(folder)[0]
    layers = checkpoint.read_meta(folder).get("origin", {}).get("layers", LAYERS)
    names = dict(zip(LAYERS, layers, strict=True))
    tensors = {}
    for own, value in model.state_dict().items():
        layer, _, part = own.rpartition(".")
        tensors[f"{names[layer]}.{part}"] = value
    if (folder / EXTRA).exists():
        tensors |= checkpoint.read_tensors(folder / EXTRA)
    return tensors
