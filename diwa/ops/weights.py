"""Checks of the weights that operators take in one tuple: native code reads them by address."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .reference_chain import Network
from .reference_rssm import RSSMWeights


def check_network(op: str, net: Network) -> None:
    """Shapes and devices of a denoising network.

    Raises:
        ValueError: a tensor has another shape, or is on another device than `chunk_in`; named.
        TypeError: it is no tensor of floating dtype.
    """
    if not isinstance(net.chunk_in, Tensor) or net.chunk_in.dim() != 2:
        raise ValueError(f"{op}: chunk_in must be a tensor [W, P]")
    w, p = net.chunk_in.shape
    hidden = {
        f"hidden[{i}].{name}": (tensor, shape)
        for i, layer in enumerate(net.hidden)
        for name, tensor, shape in zip(("weight", "bias"), layer, ((w, w), (w,)), strict=True)
    }
    expected = {
        "chunk_in": (net.chunk_in, (w, p)),
        "cond_in": (net.cond_in, (w, None)),
        "cond_bias": (net.cond_bias, (w,)),
        "time": (net.time, (None, w)),
        **hidden,
        "out": (net.out, (p, w)),
        "out_bias": (net.out_bias, (p,)),
    }
    _check(op, expected, net.chunk_in.device)


def check_rssm(op: str, w: RSSMWeights) -> None:
    """Shapes and devices of the weights of an RSSM step.

    Raises:
        ValueError: a tensor has another shape, or is on another device than `cell_z`; named.
        TypeError: it is no tensor of floating dtype.
    """
    if not isinstance(w.cell_z, Tensor) or w.cell_z.dim() != 2:
        raise ValueError(f"{op}: cell_z must be a tensor [U, Z]")
    if not isinstance(w.w_hh, Tensor) or w.w_hh.dim() != 2:
        raise ValueError(f"{op}: w_hh must be a tensor [3H, H]")
    (u, z), h = w.cell_z.shape, w.w_hh.shape[1]
    vector, gates = (u,), (3 * h,)
    expected: dict[str, tuple[Tensor, tuple[int | None, ...]]] = {
        "cell_z": (w.cell_z, (u, z)),
        "cell_bias": (w.cell_bias, vector),
        "cell_a": (w.cell_a, (u, None)),
        "cell_gain": (w.cell_gain, vector),
        "cell_shift": (w.cell_shift, vector),
        "w_ih": (w.w_ih, (3 * h, u)),
        "w_hh": (w.w_hh, (3 * h, h)),
        "b_ih": (w.b_ih, gates),
        "b_hh": (w.b_hh, gates),
        "head_h": (w.head_h, (u, h)),
        "head_bias": (w.head_bias, vector),
        "head_gain": (w.head_gain, vector),
        "head_shift": (w.head_shift, vector),
        "out": (w.out, (z, u)),
        "out_bias": (w.out_bias, (z,)),
    }
    if w.head_e is not None:
        expected["head_e"] = (w.head_e, (u, None))
    _check(op, expected, w.cell_z.device)


def _check(
    op: str, expected: Mapping[str, tuple[Tensor, tuple[int | None, ...]]], device: torch.device
) -> None:
    """None in a shape stands for any size."""
    for name, (tensor, shape) in expected.items():
        if not isinstance(tensor, Tensor) or not tensor.dtype.is_floating_point:
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{op}: {name} must be a tensor of floating dtype, got {kind}")
        sizes = tuple(tensor.shape)
        fits = len(sizes) == len(shape)
        if not fits or any(want not in (None, n) for n, want in zip(sizes, shape, strict=True)):
            wanted = ", ".join("any" if n is None else str(n) for n in shape)
            raise ValueError(f"{op}: {name} must be [{wanted}], got {list(sizes)}")
        if tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, other weights on {device}")
