"""`sample_categorical`: softmax, uniform mix and inverse-CDF sample in one pass, without gradient.

p = (1 - unimix) softmax(logits / temperature) + unimix / C; the class is the number of cumulative
probabilities <= u. No exponential noise, no host read: u is an argument.
"""

import torch
from torch import Tensor

from . import reference_gpu as reference
from . import registry

_GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_CLASSES = 1024

registry.declare(
    "sample_categorical",
    registry.triton("sample_categorical", _GPU_DTYPES),  # kernels/sample_categorical.py
    registry.reference(),  # diwa/ops/reference_gpu.py
)

_lib = torch.library.Library("diwa", "FRAGMENT")
_lib.define(
    "sample_categorical_triton(Tensor logits, Tensor uniform, float temperature, float unimix, "
    "bool want_index, bool want_onehot) -> (Tensor, Tensor)"
)


@torch.library.impl(_lib, "sample_categorical_triton", "CompositeExplicitAutograd")
def _triton(
    logits: Tensor,
    uniform: Tensor,
    temperature: float,
    unimix: float,
    want_index: bool,
    want_onehot: bool,
) -> tuple[Tensor, Tensor]:
    from diwa.kernels.sample_categorical import sample_categorical as kernel

    dtype = logits.dtype if want_onehot else None
    return kernel(logits, uniform, temperature, unimix, want_index, dtype)


@torch.library.register_fake("diwa::sample_categorical_triton")
def _fake(
    logits: Tensor,
    uniform: Tensor,
    temperature: float,
    unimix: float,
    want_index: bool,
    want_onehot: bool,
) -> tuple[Tensor, Tensor]:
    index = logits.new_empty(uniform.shape if want_index else (0,), dtype=torch.int64)
    return index, logits.new_empty(logits.shape if want_onehot else (0,))


def check(op: str, logits: Tensor, uniform: Tensor) -> dict[str, str]:
    """Raises for arguments that no backend takes; returns why Triton cannot take these."""
    if not logits.dtype.is_floating_point:
        raise TypeError(f"{op}: logits must be floating point, got {logits.dtype}")
    if logits.dim() < 1 or uniform.shape != logits.shape[:-1]:
        raise ValueError(
            f"{op}: uniform must be {list(logits.shape[:-1])} for logits {list(logits.shape)}, "
            f"got {list(uniform.shape)}"
        )
    if uniform.device != logits.device:
        raise ValueError(f"{op}: uniform is on {uniform.device}, logits on {logits.device}")
    if not uniform.dtype.is_floating_point:
        raise TypeError(f"{op}: uniform must be floating point, got {uniform.dtype}")
    if logits.shape[-1] < 1:
        raise ValueError(f"{op}: logits need at least one class")
    if logits.shape[-1] > MAX_CLASSES:
        return {"triton": f"{logits.shape[-1]} classes exceed {MAX_CLASSES}"}
    return {}


@torch.no_grad()
def sample_categorical(
    logits: Tensor,
    uniform: Tensor,
    *,
    temperature: float = 1.0,
    unimix: float = 0.0,
    onehot: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Sample categoricals by inverse CDF; no gradient (`onehot_st` has one).

    Args:
        logits: `[..., C]`, any floating dtype; the arithmetic is at least float32.
        uniform: `[...]` in [0, 1).
        temperature: divides the logits, > 0.
        unimix: share of the uniform distribution in [0, 1].
        onehot: return the one-hot `[..., C]` in the dtype of the logits instead of the class.
        backend: `"auto"`, `"reference"` or `"triton"` (C up to 1024).
    Returns:
        Class int64 `[...]`, -1 where a logit is NaN; or the one-hot, NaN there.
    Raises:
        ValueError, TypeError: an argument has the wrong shape, device, dtype or range.
        BackendError: the backend was forced and cannot run.
    """
    unfit = check("sample_categorical", logits, uniform)
    if not temperature > 0:
        raise ValueError(f"sample_categorical: temperature must be > 0, got {temperature}")
    if not 0 <= unimix <= 1:
        raise ValueError(f"sample_categorical: unimix must be in [0, 1], got {unimix}")
    if registry.choose("sample_categorical", logits, backend, unfit) == "triton":
        both = torch.ops.diwa.sample_categorical_triton.default(
            logits, uniform, temperature, unimix, not onehot, onehot
        )
    else:
        both = reference.sample_categorical(logits, uniform, temperature, unimix)
    return both[1] if onehot else both[0]
