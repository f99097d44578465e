"""`rssm_imagine`: L prior steps of N dreams in one call, without gradient.

The dreams are independent of each other, so a tile of them runs through all L steps in one thread
(csrc/cpu/rssm_imagine.cpp). States are class indices: a one-hot z times its weight is a sum of S
rows. Weights are packed once. Equations: reference_rssm.py.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference_rssm, registry, rssm_imagine_gpu
from .packing import pack_weight
from .reference_rssm import RSSMWeights
from .weights import check_rssm

registry.declare(
    "rssm_imagine",
    registry.native("cpu", "rssm_imagine"),  # csrc/cpu/rssm_imagine.cpp
    registry.triton("onehot_ln_elu", (torch.float32,)),  # diwa/ops/rssm_imagine_gpu.py
    registry.reference(),  # diwa/ops/reference_rssm.py
)


def _fake(
    h: Tensor,
    z_idx: Tensor,
    actions: Tensor,
    uniforms: Tensor,
    table: Tensor,
    cell_a: Tensor,
    packed: list[Tensor],
    vectors: list[Tensor],
    temperature: float,
    unimix: float,
    eps: float,
    return_features: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    (dreams, deter), steps = h.shape, len(actions)
    return (
        h.new_empty(steps, dreams, deter),
        z_idx.new_empty(steps, *z_idx.shape),
        h.new_empty(steps if return_features else 0, dreams, deter + len(table)),
    )


if hasattr(torch.ops.diwa, "rssm_imagine"):  # the schema is in libdiwa_cpu.so
    torch.library.register_fake("diwa::rssm_imagine", _fake)


class PackedRSSM(NamedTuple):
    """Weights of a prior step, and their copies as the native operator reads them (if it can)."""

    weights: RSSMWeights
    dtype: torch.dtype
    table: Tensor | None = None  # [Z, U]
    cell_a: Tensor | None = None  # [A, U]
    packed: tuple[Tensor, ...] = ()  # w_ih, w_hh, head_h, out
    gpu: tuple[Tensor, ...] = ()  # rssm_imagine_gpu.pack


def pack_rssm(w: RSSMWeights, dtype: torch.dtype = torch.float32) -> PackedRSSM:
    """Packs the weights of a prior step.

    Args:
        w: weights; the head is the prior's. In another dtype than float32 they are kept as they
            are, for the reference.
        dtype: float32 or bfloat16, of the four large matrices and what they multiply; sums are
            float32, and so are the rows that a one-hot z selects.
    Returns:
        A copy: it does not follow later changes of the weights (`diwa.nn.FrozenRSSM` does).
    Raises:
        TypeError: another dtype.
        ValueError: weights that do not fit each other.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"pack_rssm: dtype must be float32 or bfloat16, got {dtype}")
    check_rssm("pack_rssm", w)
    w = RSSMWeights(*(None if t is None else t.detach() for t in w))  # type: ignore[arg-type]
    if any(t is not None and t.dtype != torch.float32 for t in w):
        return PackedRSSM(w, dtype)
    if w.cell_z.device.type != "cpu":
        return PackedRSSM(w, dtype, gpu=rssm_imagine_gpu.pack(w, dtype))
    return PackedRSSM(
        w,
        dtype,
        w.cell_z.t().contiguous(),
        w.cell_a.t().contiguous(),
        tuple(pack_weight(m, dtype) for m in (w.w_ih, w.w_hh, w.head_h, w.out)),
    )


def _check(
    w: RSSMWeights, h: Tensor, z_idx: Tensor, actions: Tensor, uniforms: Tensor, temperature: float
) -> None:
    if h.dim() != 2:
        raise ValueError(f"rssm_imagine: h must be [N, H], got {list(h.shape)}")
    if actions.dim() != 3:
        raise ValueError(f"rssm_imagine: actions must be [L, N, A], got {list(actions.shape)}")
    if uniforms.dim() != 3 or not uniforms.shape[2] or len(w.out) % uniforms.shape[2]:
        raise ValueError(
            f"rssm_imagine: uniforms must be [L, N, S] with S a divisor of {len(w.out)}, "
            f"got {list(uniforms.shape)}"
        )
    steps, dreams, groups = len(actions), len(h), uniforms.shape[2]
    expected = {
        "h": (h, (dreams, w.w_hh.shape[1])),
        "z_idx": (z_idx, (dreams, groups)),
        "actions": (actions, (steps, dreams, w.cell_a.shape[1])),
        "uniforms": (uniforms, (steps, dreams, groups)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"rssm_imagine: {name} must be {list(shape)}, got {list(tensor.shape)}"
            )
        if tensor.device != w.cell_z.device:
            raise ValueError(
                f"rssm_imagine: {name} is on {tensor.device}, the weights on {w.cell_z.device}"
            )
        if name == "z_idx":
            if tensor.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"rssm_imagine: z_idx must be int64 or int32, got {tensor.dtype}")
        elif not tensor.dtype.is_floating_point:
            raise TypeError(f"rssm_imagine: {name} must be floating point, got {tensor.dtype}")
    if not temperature > 0:
        raise ValueError(f"rssm_imagine: temperature must be positive, got {temperature}")


@torch.no_grad()
def rssm_imagine(
    p: PackedRSSM,
    h: Tensor,
    z_idx: Tensor,
    actions: Tensor,
    uniforms: Tensor,
    *,
    temperature: float = 1.0,
    unimix: float = 0.0,
    eps: float = 1e-3,
    return_features: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor | None]:
    """L prior steps of N dreams (`reference.rssm_imagine`), without gradient.

    Args:
        p: weights from `pack_rssm`.
        h: `[N, H]` state before.
        z_idx: `[N, S]` classes of the state before, in [0, C), int64 or int32; -1 stands for NaN.
        actions: `[L, N, A]`.
        uniforms: `[L, N, S]` in [0, 1), the randomness of the samples.
        temperature: positive; logits are divided by it.
        unimix: share of the uniform distribution in every sampled categorical.
        eps: of the layer norms.
        return_features: also return `[h, onehot(z)]`.
        backend: `"auto"`, `"reference"` (which computes in the dtype of the weights), `"cpu"` or
            `"triton"` (both: float32 states, weights float32 before packing).
    Returns:
        h `[L, N, H]`, z_idx `[L, N, S]` (int64) and features `[L, N, F]` or None. A group whose
        probabilities are NaN has the index -1, and NaN in the features.
    Raises:
        ValueError, TypeError: an argument has the wrong shape, device, dtype or range; it is named.
        BackendError: the backend was forced and cannot run.
    """
    w = p.weights
    _check(w, h, z_idx, actions, uniforms, temperature)
    z_idx = z_idx.long()
    unfit = ""
    if not p.packed:
        unfit = "needs float32 weights on the CPU"
    elif any(t.dtype != torch.float32 for t in (h, actions, uniforms)):
        unfit = "takes float32 arguments only"
    reasons = {"cpu": unfit, "triton": "" if p.gpu else "needs float32 weights on a GPU"}
    chosen = registry.choose("rssm_imagine", h, backend, reasons)
    if chosen != "cpu":
        state = (h, z_idx, actions, uniforms)
        options: dict[str, Any] = {"temperature": temperature, "unimix": unimix, "eps": eps}
        if chosen == "triton":
            hs, indices = rssm_imagine_gpu.imagine(w, p.gpu, *state, **options)
        else:
            hs, indices = reference_rssm.rssm_imagine(w, *state, **options)
        classes = len(w.out) // uniforms.shape[2]
        wanted = reference_rssm.rssm_features(hs, indices, classes) if return_features else None
        return hs, indices, wanted
    assert p.table is not None and p.cell_a is not None
    hs, indices, features = torch.ops.diwa.rssm_imagine.default(
        h,
        z_idx,
        actions,
        uniforms,
        p.table,
        p.cell_a,
        list(p.packed),
        [
            *(w.cell_bias, w.cell_gain, w.cell_shift, w.b_ih, w.b_hh),
            *(w.head_bias, w.head_gain, w.head_shift, w.out_bias),
        ],
        temperature,
        unimix,
        eps,
        return_features,
    )
    return hs, indices, features if return_features else None
