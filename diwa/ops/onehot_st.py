"""`onehot_st`: straight-through samples of categoricals by inverse CDF.

Plain torch on every device, without torch.distributions, whose checks read the data on the host.
"""

from torch import Tensor

from . import reference_rssm


def onehot_st(logits: Tensor, uniform: Tensor, *, unimix: float = 0.0) -> Tensor:
    """Straight-through sample of categoricals by inverse CDF.

    Args:
        logits: `[..., S, C]`, floating.
        uniform: `[..., S]` in [0, 1): class = number of cumulative probabilities <= uniform.
        unimix: share of the uniform distribution mixed in, in [0, 1].
    Returns:
        `[..., S * C]`, float32 or float64: one-hot forward, gradient of the probabilities.
    Raises:
        ValueError: wrong shape.
        TypeError: `logits` is not floating point.
    """
    if logits.dim() < 2 or not logits.shape[-1]:
        raise ValueError(f"onehot_st: logits must be [..., S, C], got {list(logits.shape)}")
    if uniform.shape != logits.shape[:-1]:
        raise ValueError(
            f"onehot_st: uniform must be {list(logits.shape[:-1])}, got {list(uniform.shape)}"
        )
    if not logits.dtype.is_floating_point:
        raise TypeError(f"onehot_st: logits must be floating point, got {logits.dtype}")
    return reference_rssm.onehot_st(logits, uniform, unimix=unimix)
