"""The denoising chain step by step on a GPU: GEMMs by cuBLAS, and one kernel after the network.

What a GPU runs where the cluster kernel does not apply, and for the fine-tuned steps in float32. A
step is the network's GEMMs and activations, and `denoise_step` for the clamps, the posterior mean,
the noise and its log-density: one launch instead of about 14.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .denoise_step import denoise_step
from .reference_chain import Chain, ChainSteps, Network, predict_noise, step_table


@torch.no_grad()
def denoise_chain_steps(
    tuned: Network,
    base: Network,
    feature: Tensor,
    noise: Tensor,
    steps: ChainSteps,
    ft_steps: int,
    clip_noise: float,
    *,
    table: Tensor | None = None,
    backend: str = "auto",
) -> Chain:
    """Sample the chain of `reference_chain.denoise_chain`, which has the equations and shapes.

    Args:
        table: `step_table(steps)`, if it is at hand.
        backend: of `denoise_step`.
    """
    table = step_table(steps) if table is None else table
    last, projected = len(table) - 1, {}
    x, chain, log_prob = noise[0], [], []
    for t in range(last, -1, -1):
        net, fine = (tuned, True) if t < ft_steps else (base, False)
        if fine not in projected:
            projected[fine] = F.linear(feature, net.cond_in, net.cond_bias)
        if t == ft_steps - 1:
            chain.append(x)
        eps = predict_noise(net, x, net.time[t], projected[fine])
        n = noise[last + 1 - t]
        x, density = denoise_step(x, eps, n, table[t], clip_noise=clip_noise, backend=backend)
        if fine:
            chain.append(x)
            log_prob.append(density)
    if not ft_steps:
        empty = x.new_zeros(len(x), 0, x.shape[1])
        return Chain(x, empty, empty)
    return Chain(x, torch.stack(chain, 1), torch.stack(log_prob, 1))
