"""`chain_log_prob`: log-densities of denoising transitions, differentiable in the policy's weights.

    log p = log N(x_next; mean(x, eps(x, t, f)), s_t²)     [M, G, P]

Grouped: G = Kf transitions of a state, which share its projected condition. Shuffled: G = 1 and
every row has a state of its own. The backward pass is written out: no gradient of the feature, of
the chunks or of the first layer's input is ever formed, the gradient of the condition's projection
is summed over the group before its GEMM, and Mish and its slope are one pass each.

Everything is float32, also when the chain was sampled with bfloat16 weights: log-probabilities of a
bfloat16 network are as noisy as PPO's clip range is wide.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import reference_chain as reference
from . import registry
from .reference_chain import HALF_LOG_2PI, ChainSteps, Network

registry.declare(
    "chain_log_prob",
    registry.native("cpu", "mish_fwd"),  # torch's GEMMs around csrc/cpu/mish.cpp
    registry.reference(),  # diwa/ops/reference_chain.py
)


def _activate(x: Tensor) -> Tensor:
    return torch.ops.diwa.mish_fwd.default(x)


def _slope(grad: Tensor, x: Tensor) -> Tensor:
    return torch.ops.diwa.mish_bwd.default(grad, x)


class _ChainLogProb(torch.autograd.Function):
    """R = M * G transitions; T rows of the step tables and of the time table, T = G or R."""

    @staticmethod
    def forward(
        ctx: Any,
        feature: Tensor,  # [M, F]
        x: Tensor,  # [R, P]
        x_next: Tensor,  # [R, P]
        table: Tensor,  # [5, T, 1], p q c1 c2 log_prob_std
        residual: bool,
        time: Tensor,  # [T, W]
        chunk_in: Tensor,
        cond_in: Tensor,
        cond_bias: Tensor,
        out: Tensor,
        out_bias: Tensor,
        *hidden: Tensor,
    ) -> Tensor:
        first = torch.mm(x, chunk_in.t())
        cond = torch.addmm(cond_bias, feature, cond_in.t())
        first.view(len(feature), -1, first.shape[1]).add_(cond[:, None])
        first.view(-1, *time.shape).add_(time)
        y, layers = first, len(hidden) // 2
        pre = [first]  # what each activation is taken of
        act = [_activate(first) if layers or not residual else first]  # input of each later layer
        for i in range(layers):
            u = torch.addmm(hidden[2 * i + 1], act[i], hidden[2 * i].t())
            if residual and i % 2:
                y = u.add_(y)
            pre.append(u)
            act.append(u if residual and i + 1 == layers else _activate(u))
        eps = torch.addmm(out_bias, act[-1], out.t())
        p, q, c1, c2, std = table
        chunk, eps = x.view(-1, len(p), x.shape[1]), eps.view(-1, len(p), x.shape[1])
        x0 = p * chunk - q * eps
        scaled = (x_next.view_as(chunk) - c1 * x0.clamp(-1, 1) - c2 * chunk) / std
        ctx.residual = residual
        slope = torch.where(x0.abs() <= 1, -c1 * q / std * scaled, 0.0)  # of log p in eps
        ctx.save_for_backward(feature, x, slope, time, out, *hidden[::2], *pre, *act)
        return (-0.5 * scaled**2 - (std.log() + HALF_LOG_2PI)).view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        feature, x, slope, time, out, *rest = ctx.saved_tensors
        layers = (len(rest) - 2) // 3
        weights, pre, act = rest[:layers], rest[layers : 2 * layers + 1], rest[2 * layers + 1 :]
        d_eps = (grad.view_as(slope) * slope).view_as(x)
        d_out, d_out_bias = d_eps.t().mm(act[-1]), d_eps.sum(0)
        d = d_eps.mm(out)  # of the input of the layer above
        stream = d  # of the residual stream
        d_hidden: list[Tensor] = []
        for i in reversed(range(layers)):
            if ctx.residual and i % 2:
                stream = d = stream if i + 1 == layers else _slope(d, pre[i + 1]).add_(stream)
            else:
                d = _slope(d, pre[i + 1])
            d_hidden = [d.t().mm(act[i]), d.sum(0), *d_hidden]
            d = d.mm(weights[i])
        if layers or not ctx.residual:
            d = _slope(d, pre[0])
        if ctx.residual and layers:
            d = d.add_(stream)
        d_cond = d.view(len(feature), -1, d.shape[1]).sum(1)
        return (
            *(None,) * 5,
            d.view(-1, *time.shape).sum(0),
            d.t().mm(x),
            d_cond.t().mm(feature),
            d_cond.sum(0),
            d_out,
            d_out_bias,
            *d_hidden,
        )


def _check(
    net: Network, feature: Tensor, x: Tensor, x_next: Tensor, step: Tensor, steps: ChainSteps
) -> None:
    p, f, k = len(net.out_bias), net.cond_in.shape[1], len(steps.p)
    if feature.dim() != 2 or feature.shape[1] != f:
        raise ValueError(f"chain_log_prob: feature must be [M, {f}], got {list(feature.shape)}")
    if x.dim() != 3 or len(x) != len(feature) or x.shape[2] != p:
        raise ValueError(
            f"chain_log_prob: x must be [M, G, P] = [{len(feature)}, G, {p}], got {list(x.shape)}"
        )
    if x_next.shape != x.shape:
        raise ValueError(
            f"chain_log_prob: x_next must be {list(x.shape)} as x, got {list(x_next.shape)}"
        )
    if step.dtype != torch.int64 or step.shape not in (x.shape[:2], x.shape[1:2]):
        raise ValueError(
            f"chain_log_prob: step must be int64 {list(x.shape[:2])} or {[x.shape[1]]}, got "
            f"{step.dtype} {list(step.shape)}"
        )
    if len(net.time) != k:
        raise ValueError(f"chain_log_prob: {len(net.time)} rows of time for {k} steps")
    for name, tensor in (("x", x), ("x_next", x_next), ("network", net.cond_in)):
        if tensor.device != feature.device or tensor.dtype != feature.dtype:
            raise ValueError(
                f"chain_log_prob: {name} is {tensor.dtype} on {tensor.device}, feature "
                f"{feature.dtype} on {feature.device}"
            )


def chain_log_prob(
    net: Network,
    feature: Tensor,
    x: Tensor,
    x_next: Tensor,
    step: Tensor,
    steps: ChainSteps,
    *,
    backend: str = "auto",
) -> Tensor:
    """Log-density of denoising transitions under a policy (method section 5.6).

    Args:
        net: the network.
        feature: `[M, F]`.
        x: `[M, G, P]` chunks before; G transitions of each state: all Kf of a chain (grouped), or
            one (shuffled pairs).
        x_next: `[M, G, P]` chunks after.
        step: int64 t in [0, K) of each transition, `[M, G]`; or `[G]`, the same for all states.
        steps: tables `[K]`.
        backend: `"auto"`, `"reference"` or `"cpu"`. The native variant takes float32 and gives
            gradients of the network only; a feature or chunk that requires grad, and autocast, run
            on the reference.
    Returns:
        `[M, G, P]`, differentiable in the weights of `net` (once, unless on the reference).
    Raises:
        ValueError: shapes, devices or dtypes do not fit; the argument is named.
        BackendError: the backend was forced and cannot run.
    """
    _check(net, feature, x, x_next, step, steps)
    unfit = {}
    if torch.is_grad_enabled() and any(t.requires_grad for t in (feature, x, x_next)):
        unfit["cpu"] = "gives no gradient of the feature or the chunks"
    elif torch.is_autocast_enabled(feature.device.type):
        unfit["cpu"] = "float32 throughout, not under autocast"
    if registry.choose("chain_log_prob", feature, backend, unfit) == "reference" or not x.numel():
        return reference.chain_log_prob(net, feature, x, x_next, step, steps)
    index = step.reshape(-1)
    table = torch.stack([t[index] for t in (*steps[:4], steps.log_prob_std)])[..., None]
    hidden = [t for layer in net.hidden for t in layer]
    weights = (net.chunk_in, net.cond_in, net.cond_bias, net.out, net.out_bias, *hidden)
    x_rows, next_rows = x.reshape(-1, x.shape[2]), x_next.reshape(-1, x.shape[2])
    log_prob = _ChainLogProb.apply(
        feature, x_rows, next_rows, table, net.residual, net.time.index_select(0, index), *weights
    )
    return log_prob.view_as(x)
