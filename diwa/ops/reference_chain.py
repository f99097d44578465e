"""The specification of the denoising chain and of its log-probabilities: plain torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class Network(NamedTuple):
    """Weights of a denoising network of width W; the first layer is kept in three parts.

    Attributes:
        chunk_in: `[W, P]`, P = L * A numbers of an action chunk.
        cond_in: `[W, F]`.
        cond_bias: `[W]`, bias of the first layer.
        time: `[K, W]`, contribution of each sampling step to the first layer.
        hidden: weights `[W, W]` and biases `[W]` of the hidden layers.
        out: `[P, W]`.
        out_bias: `[P]`.
        residual: pre-activation residual blocks of two hidden layers each; else a plain MLP.
    """

    chunk_in: Tensor
    cond_in: Tensor
    cond_bias: Tensor
    time: Tensor
    hidden: tuple[tuple[Tensor, Tensor], ...]
    out: Tensor
    out_bias: Tensor
    residual: bool


class ChainSteps(NamedTuple):
    """Tables `[K]` of the sampling steps; t = K - 1 comes first, t = 0 last.

    Attributes:
        p, q: x0 = clamp(p x_t - q eps, -1, 1).
        c1, c2: mean = c1 x0 + c2 x_t.
        std: deviation of the noise added; log_prob_std: deviation in log-probabilities.
    """

    p: Tensor
    q: Tensor
    c1: Tensor
    c2: Tensor
    std: Tensor
    log_prob_std: Tensor


class Chain(NamedTuple):
    """A sampled denoising chain of N states; `...` is P here, L, A in `diwa.nn`.

    Attributes:
        chunk: `[N, ...]`, the final action chunk (not clipped).
        chain: `[N, Kf + 1, ...]`, input of the first fine-tuned step to final chunk; `[N, 0, ...]`
            if Kf = 0.
        log_prob: `[N, Kf, ...]`, log-density of each transition from its own noise.
    """

    chunk: Tensor
    chain: Tensor
    log_prob: Tensor


def step_table(steps: ChainSteps) -> Tensor:
    """The tables as the native operator takes them: `[K, 7]`, p q c1 c2 std, std / s and
    log s + log(2 pi) / 2 with s the deviation in log-probabilities."""
    s = steps.log_prob_std
    columns = (*steps[:5], steps.std / s, s.log() + HALF_LOG_2PI)
    return torch.stack(columns, -1).contiguous()


def empty_chain(noise: Tensor, ft_steps: int) -> Chain:
    """Uninitialised results for noise `[K + 1, N, P]`, as the compiled variants return them."""
    n, p = noise.shape[1:]
    chain = noise.new_empty(n, ft_steps + 1 if ft_steps else 0, p)
    return Chain(noise.new_empty(n, p), chain, noise.new_empty(n, ft_steps, p))


def predict_noise(
    net: Network,
    x: Tensor,
    time: Tensor,
    cond: Tensor,
    activation: Callable[[Tensor], Tensor] = F.mish,
) -> Tensor:
    """Predicted noise `[..., P]` (method section 3.1).

        y = W_x x + time + cond
        residual:  y = y + W2 mish(W1 mish(y) + b1) + b2  per pair of hidden layers,  W_o y + b_o
        plain:     y = mish(y), then y = mish(W y + b)    per hidden layer,           W_o y + b_o

    Args:
        net: the network.
        x: `[..., P]` noisy chunk.
        time: `[..., W]` rows of `net.time`.
        cond: `[..., W]` projected condition, `cond_in f + cond_bias`.
        activation: Mish.
    """
    y = F.linear(x, net.chunk_in) + time + cond
    if net.residual:
        for (w1, b1), (w2, b2) in zip(net.hidden[::2], net.hidden[1::2], strict=True):
            y = y + F.linear(activation(F.linear(activation(y), w1, b1)), w2, b2)
    else:
        y = activation(y)
        for w, b in net.hidden:
            y = activation(F.linear(y, w, b))
    return F.linear(y, net.out, net.out_bias)


def posterior_mean(steps: ChainSteps, x: Tensor, eps: Tensor, t: int | Tensor) -> Tensor:
    """`c1 clamp(p x - q eps, -1, 1) + c2 x` with the tables at t (section 3.2).

    Args:
        steps: the tables.
        x, eps: `[..., P]` noisy chunk and predicted noise.
        t: a step, or int64 `[...]` steps.
    """
    p, q, c1, c2 = (table[t] for table in steps[:4])
    if isinstance(t, Tensor):
        p, q, c1, c2 = (v[..., None] for v in (p, q, c1, c2))
    return c1 * (p * x - q * eps).clamp(-1, 1) + c2 * x


def one_hot_feature(h: Tensor, z_idx: Tensor, z_dim: int) -> Tensor:
    """Feature `[N, H + Z]` of states `[N, H]` and class indices `[N, S]`, Z = S * C."""
    classes = z_dim // z_idx.shape[1]
    return torch.cat([h, F.one_hot(z_idx, classes).flatten(1).to(h.dtype)], -1)


def denoise_chain(
    tuned: Network,
    base: Network,
    feature: Tensor,
    noise: Tensor,
    steps: ChainSteps,
    ft_steps: int,
    clip_noise: float,
) -> Chain:
    """Sample the chain (section 3.3); step t < Kf runs the tuned network, the others the base.

        n_t = clamp(noise[K - t], -clip, clip)
        x_{t-1} = mean(x_t, eps(x_t, t, f)) + std_t n_t,  x_{K-1} = noise[0]
        log p(x_{t-1} | x_t) = -(std_t n_t / s_t)² / 2 - log s_t - log(2 pi) / 2,  s = log_prob_std

    Args:
        tuned, base: the networks.
        feature: `[N, F]`.
        noise: `[K + 1, N, P]` standard normal.
        steps: tables.
        ft_steps: Kf.
        clip_noise: bound of the noise of a step.
    """
    last = len(steps.p) - 1
    x, chain, log_prob = noise[0], [], []
    projected: dict[bool, Tensor] = {}
    for t in range(last, -1, -1):
        net = tuned if t < ft_steps else base
        if (t < ft_steps) not in projected:
            projected[t < ft_steps] = F.linear(feature, net.cond_in, net.cond_bias)
        if t == ft_steps - 1:
            chain.append(x)
        n = noise[last + 1 - t].clamp(-clip_noise, clip_noise)
        eps = predict_noise(net, x, net.time[t], projected[t < ft_steps])
        x = posterior_mean(steps, x, eps, t) + steps.std[t] * n
        if t < ft_steps:
            chain.append(x)
            scaled = steps.std[t] / steps.log_prob_std[t] * n
            log_prob.append(-0.5 * scaled**2 - steps.log_prob_std[t].log() - HALF_LOG_2PI)
    empty = x.new_zeros(len(x), 0, x.shape[1])
    if not ft_steps:
        return Chain(x, empty, empty)
    return Chain(x, torch.stack(chain, 1), torch.stack(log_prob, 1))


def chain_log_prob(
    net: Network, feature: Tensor, x: Tensor, x_next: Tensor, step: Tensor, steps: ChainSteps
) -> Tensor:
    """Log-density `[M, G, P]` of transitions x -> x_next (section 5.6).

        log N(x_next; mean(x, eps(x, t, f)), s_t²),  s = log_prob_std

    Args:
        net: the network.
        feature: `[M, F]`.
        x, x_next: `[M, G, P]`, G transitions of each state.
        step: int64 `[M, G]`, or `[G]` if it is the same for every state; the t of each transition.
        steps: tables.
    """
    cond = F.linear(feature, net.cond_in, net.cond_bias)[:, None]
    mean = posterior_mean(steps, x, predict_noise(net, x, net.time[step], cond), step)
    std = steps.log_prob_std[step][..., None]
    return -0.5 * ((x_next - mean) / std) ** 2 - std.log() - HALF_LOG_2PI
