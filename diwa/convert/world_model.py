"""World models of LUMOS and DiWA (vision variant, 64 pixels): method sections 1.2 to 1.4."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import checkpoint
from ..config import from_dict, to_dict
from ..errors import CheckpointError
from ..nn.vision import VisionConfig, VisionWorldModel
from .common import EXTRA, Converted, Tensors, fill, leftover, size, write

WORLD_MODEL_NAMES = {
    "encoder.rgb_static.": "encoder.encoder_static.",
    "encoder.rgb_gripper.": "encoder.encoder_gripper.",
    "encoder.fuse.": "encoder.fuse.",
    "decoder.rgb_static.": "decoder.decoder_static.",
    "decoder.rgb_gripper.": "decoder.decoder_gripper.",
    "rssm.cell_z.": "rssm_core.cell.z_mlp.",
    "rssm.cell_a.": "rssm_core.cell.a_mlp.",
    "rssm.cell_norm.": "rssm_core.cell.in_norm.",
    "rssm.gru.": "rssm_core.cell.gru.layers.0.",
    "rssm.prior_h.": "rssm_core.cell.prior_mlp_h.",
    "rssm.prior_norm.": "rssm_core.cell.prior_norm.",
    "rssm.prior_out.": "rssm_core.cell.prior_mlp.",
    "rssm.post_h.": "rssm_core.cell.post_mlp_h.",
    "rssm.post_e.": "rssm_core.cell.post_mlp_e.",
    "rssm.post_norm.": "rssm_core.cell.post_norm.",
    "rssm.post_out.": "rssm_core.cell.post_mlp.",
}
"""Prefixes of our names -> of LUMOS's."""
INITIAL_STATE = ("rssm_core.cell.init_h", "rssm_core.cell.init_z")
"""Learned start of an epoch; a reset multiplies it by zero (section 1.3), so it has no use here."""


def convert_world_model(
    path: Path,
    folder: Path,
    tensors: Tensors,
    origin: dict[str, Any],
    classes: int,
    skip_unknown: bool,
) -> Converted:
    """Sizes follow from the weights, except the number of `classes` of each latent."""
    cell = "rssm_core.cell."
    stoch = size(path, tensors, f"{cell}prior_mlp.weight", 0)
    if stoch % classes:
        raise CheckpointError(
            f"{path}: {stoch} latent numbers are no groups of {classes} (--stoch-classes)"
        )
    static = "encoder.encoder_static.0.weight"
    depth = size(path, tensors, static, 0)
    config = VisionConfig(
        depth=depth,
        cameras=1 + any(n.startswith("encoder.encoder_gripper.") for n in tensors),
        proprio_dim=size(path, tensors, f"{cell}post_mlp_e.weight", 1) - 32 * depth,
        action_dim=size(path, tensors, f"{cell}a_mlp.weight", 1),
        deter_dim=size(path, tensors, f"{cell}gru.layers.0.weight_hh", 1),
        stoch_groups=stoch // classes,
        stoch_classes=classes,
        hidden_dim=size(path, tensors, f"{cell}z_mlp.weight", 0),
    )
    if config.proprio_dim < 0:
        raise CheckpointError(
            f"{path}: {cell}post_mlp_e.weight takes {config.embed_dim} numbers, fewer than the "
            f"{config.image_dim} of pictures; only the 64-pixel encoder is known"
        )
    ours: Tensors = {}
    rest: Tensors = {}
    for name, tensor in tensors.items():
        own = _own_name(name)
        (rest if own is None else ours)[own or name] = tensor
    model = VisionWorldModel(config)
    own_names = set(model.state_dict())
    rest |= {_lumos_name(n): ours.pop(n) for n in set(ours) - own_names}
    extra = leftover(path, rest, INITIAL_STATE, skip_unknown)
    fill(path, model, ours, _lumos_name)
    meta = {"kind": "vision_world_model", "config": to_dict(config), "origin": origin}
    return Converted(
        folder, "world model", write(folder, model, meta, extra), to_dict(config), sorted(extra)
    )


def _own_name(name: str) -> str | None:
    for own, theirs in WORLD_MODEL_NAMES.items():
        if name.startswith(theirs):
            return own + name.removeprefix(theirs)
    return None


def _lumos_name(own: str) -> str:
    for prefix, theirs in WORLD_MODEL_NAMES.items():
        if own.startswith(prefix):
            return theirs + own.removeprefix(prefix)
    raise KeyError(own)


def load_vision_world_model(folder: str | Path) -> VisionWorldModel:
    """Frozen model of a folder written by `convert_checkpoint`.

    Raises:
        CheckpointError: the folder is missing or holds another kind of model.
    """
    meta = checkpoint.read_meta(folder)
    if meta.get("kind") != "vision_world_model":
        raise CheckpointError(f"{folder} holds a {meta.get('kind')} model, no vision world model")
    model = VisionWorldModel(from_dict(VisionConfig, meta["config"]))
    checkpoint.load_state(folder, model)
    return model.requires_grad_(False).eval()


def export_world_model(folder: Path) -> Tensors:
    """Tensors under LUMOS's names, with those that were kept aside."""
    model = load_vision_world_model(folder)
    tensors = {_lumos_name(own): value for own, value in model.state_dict().items()}
    if (folder / EXTRA).exists():
        tensors |= checkpoint.read_tensors(folder / EXTRA)
    return tensors
