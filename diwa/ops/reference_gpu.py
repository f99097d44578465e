"""The specification of the steps between GEMMs on a GPU: plain torch, any floating dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference_rssm import class_index, mixed_probabilities, norm_elu


def onehot_ln_elu(
    x: Tensor | None,
    idx: Tensor | None,
    table: Tensor | None,
    action: Tensor | None,
    w_a: Tensor | None,
    bias: Tensor,
    gain: Tensor,
    shift: Tensor,
    eps: float,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`ELU(LN(x + Σ_s table[s C + idx_s] + action w_a + bias))`, `[N, U]`.

    The sum over s is the product of the one-hot of `idx` with `table`. NaN where an index is
    outside [0, C). Each of the three addends may be None. Computed in the dtype of the bias and
    rounded to `out_dtype`, if one is given.

    Shapes: x `[N, U]`, idx int64 `[N, S]`, table `[S C, U]`, action `[N, A]`, w_a `[A, U]`; bias,
    gain, shift `[U]`.
    """
    total = bias
    if x is not None:
        total = total + x.to(bias.dtype)
    if idx is not None and table is not None:
        classes = len(table) // max(idx.shape[1], 1)
        known = (idx >= 0) & (idx < classes)
        onehot = F.one_hot(idx.where(known, 0), classes).to(bias.dtype)
        onehot = onehot.masked_fill(~known[..., None], torch.nan).flatten(1)
        total = total + onehot @ table.to(bias.dtype)
    if action is not None and w_a is not None:
        total = total + action.to(bias.dtype) @ w_a.to(bias.dtype)
    return norm_elu(total, gain, shift, eps).to(out_dtype or bias.dtype)


def sample_categorical(
    logits: Tensor, uniform: Tensor, temperature: float = 1.0, unimix: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Samples of categoricals by inverse CDF.

    `p = (1 - unimix) softmax(logits / temperature) + unimix / C`; the class is the number of
    cumulative probabilities that are <= the uniform, at most C - 1, and -1 where p is NaN.

    Shapes: logits `[..., C]`, uniform `[...]` in [0, 1) -> class int64 `[...]` and its one-hot
    `[..., C]` (NaN for the class -1) in the dtype of the logits.
    """
    probs = mixed_probabilities(logits / temperature, unimix)
    bad = probs.isnan().any(-1)
    index = class_index(probs, uniform)
    onehot = torch.zeros_like(logits).scatter_(-1, index[..., None], 1.0)
    return index.masked_fill(bad, -1), onehot.masked_fill(bad[..., None], torch.nan)


def denoise_step(
    x: Tensor, eps: Tensor, noise: Tensor, table: Tensor, clip_noise: float
) -> tuple[Tensor, Tensor]:
    """One step of the chain, given the predicted noise (method sections 3.2 and 3.3).

        x0 = clamp(p x - q eps, -1, 1)      n = clamp(noise, -clip_noise, clip_noise)
        x' = c1 x0 + c2 x + std n           log p = -(ratio n)² / 2 - constant

    Shapes: x, eps, noise `[N, P]`; table `[7]` = p, q, c1, c2, std, ratio = std / s and constant =
    log s + log(2 pi) / 2, with s the deviation in log-probabilities.
    """
    p, q, c1, c2, std, ratio, constant = table.unbind()
    n = noise.clamp(-clip_noise, clip_noise)
    x0 = (p * x - q * eps.to(x.dtype)).clamp(-1, 1)
    return c1 * x0 + c2 * x + std * n, -0.5 * (ratio * n) ** 2 - constant
