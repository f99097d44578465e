"""`onehot_st`: straight-through samples of categoricals by inverse CDF.

Without torch.distributions, whose checks read the data on the host. Plain torch on the CPU, one
Triton kernel forward and one backward on a GPU (`rssm_triton`).
"""

from torch import Tensor

from . import reference_rssm, registry, rssm_triton


def onehot_st(
    logits: Tensor, uniform: Tensor, *, unimix: float = 0.0, backend: str = "auto"
) -> Tensor:
    """Straight-through sample of categoricals by inverse CDF.

    Args:
        logits: `[..., S, C]`, floating.
        uniform: `[..., S]` in [0, 1): class = number of cumulative probabilities <= uniform.
        unimix: share of the uniform distribution mixed in, in [0, 1].
        backend: `"auto"`, `"reference"` or `"triton"` (C up to 1024).
    Returns:
        `[..., S * C]`, float32 or float64: one-hot forward, gradient of the probabilities.
    Raises:
        ValueError: wrong shape.
        TypeError: `logits` is not floating point.
        BackendError: the backend was forced and cannot run.
    """
    if logits.dim() < 2 or not logits.shape[-1]:
        raise ValueError(f"onehot_st: logits must be [..., S, C], got {list(logits.shape)}")
    if uniform.shape != logits.shape[:-1]:
        raise ValueError(
            f"onehot_st: uniform must be {list(logits.shape[:-1])}, got {list(uniform.shape)}"
        )
    if not logits.dtype.is_floating_point:
        raise TypeError(f"onehot_st: logits must be floating point, got {logits.dtype}")
    unfit = {}
    if logits.shape[-1] > rssm_triton.MAX_CLASSES:
        unfit["triton"] = f"{logits.shape[-1]} classes exceed {rssm_triton.MAX_CLASSES}"
    if registry.choose("onehot_st", logits, backend, unfit) == "triton":
        return rssm_triton.onehot_st(logits, uniform, unimix)
    return reference_rssm.onehot_st(logits, uniform, unimix=unimix)
