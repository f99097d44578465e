"""`denoise_chain`: the whole denoising chain of a diffusion policy in one call, without gradient.

    cond = cond_in f + cond_bias                       [N, W]  once per state and network
    eps  = network(x_t, time_t, cond)                  [N, P]  one network per step
    x'   = c1 clamp(p x - q eps) + c2 x + std n        [N, P]  log p from n itself

The rows are cut into tiles that stay in cache for all K steps, in one parallel region. Weights are
packed once, as float32 or bfloat16; the sums are always float32. In bfloat16 the inputs of every
GEMM are rounded too: an error of about 1e-3 in the actions, and of the size of PPO's clip range in
the log-probabilities of the chain under a float32 network. Steps whose log-probabilities are used
belong in float32. The processors with AVX512_BF16 multiply bfloat16 directly; the others only read
half the bytes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import denoise_chain_cluster as cluster
from . import reference_chain as reference
from . import registry
from .denoise_chain_steps import denoise_chain_steps
from .packing import ROUND, pack_weight
from .reference_chain import Chain, ChainSteps, Network, step_table
from .weights import check_network

registry.declare(
    "denoise_chain",
    registry.native("cpu", "denoise_chain"),  # csrc/cpu/denoise_chain.cpp
    registry.native("cuda", "denoise_chain_cluster"),  # csrc/cuda/denoise_chain.cu
    registry.triton("denoise_step", (torch.float32,)),  # diwa/ops/denoise_chain_steps.py
    registry.reference(),  # diwa/ops/reference_chain.py
)


def _fake(
    noise: Tensor,
    cond: Tensor,
    z_idx: Tensor | None,
    base: list[Tensor],
    tuned: list[Tensor],
    steps: Tensor,
    base_steps: int,
    ft_steps: int,
    clip_noise: float,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.empty_chain(noise, ft_steps)


if hasattr(torch.ops.diwa, "denoise_chain"):  # the schema is in libdiwa_cpu.so
    torch.library.register_fake("diwa::denoise_chain", _fake)


class PackedNetwork:
    """A network packed for the native chain; a copy, which does not follow its parameters.

    Args:
        network: weights, float32.
        dtype: float32 or bfloat16, of the packed weights.
    """

    def __init__(self, network: Network, dtype: torch.dtype = torch.float32) -> None:
        check_network("denoise_chain", network)
        hidden = tuple((w.detach(), b.detach()) for w, b in network.hidden)
        values = network._asdict().items()
        tensors: dict[str, Any] = {k: v.detach() for k, v in values if isinstance(v, Tensor)}
        self.network = network._replace(hidden=hidden, **tensors)
        self.dtype = dtype
        self._forms: dict[int, list[Tensor]] = {}
        self.cluster_forms: dict[int, list[Tensor]] = {}  # of the CUDA variant, by first step

    @torch.no_grad()
    def tensors(self, dense: int) -> list[Tensor]:
        """What the native operator takes when the first `dense` inputs of the condition come as
        numbers, and the others as class indices. Packed at the first call."""
        if dense not in self._forms:
            net, dtype = self.network, self.dtype
            rows = net.cond_in[:, dense:].t().to(dtype)
            flat = [
                pack_weight(net.chunk_in, dtype),
                pack_weight(net.cond_in[:, :dense], dtype),
                F.pad(rows, (0, -rows.shape[1] % ROUND)).contiguous(),
                (net.time + net.cond_bias).contiguous(),
            ]
            for weight, bias in net.hidden:
                flat += [pack_weight(weight, dtype), bias.detach().clone()]
            flat += [pack_weight(net.out, dtype), net.out_bias.clone()]
            self._forms[dense] = flat
        return self._forms[dense]


def _check(
    tuned: Network, base: Network, cond: Tensor, z_idx: Tensor | None, noise: Tensor, ft_steps: int
) -> None:
    p, steps, f = len(tuned.out_bias), len(tuned.time), tuned.cond_in.shape[1]
    n = len(cond) if cond.dim() == 2 else -1
    if cond.dim() != 2 or (z_idx is None and cond.shape[1] != f):
        raise ValueError(
            f"denoise_chain: feature must be [N, {f}], got {list(cond.shape)}; or give h and z_idx"
        )
    if z_idx is not None:
        if z_idx.device != cond.device:
            raise ValueError(f"denoise_chain: z_idx is on {z_idx.device}, h on {cond.device}")
        if z_idx.dim() != 2 or len(z_idx) != n or z_idx.dtype != torch.int64:
            raise ValueError(
                f"denoise_chain: z_idx must be int64 [{n}, S], got {list(z_idx.shape)} "
                f"{z_idx.dtype}"
            )
        if cond.shape[1] >= f or (f - cond.shape[1]) % max(z_idx.shape[1], 1):
            raise ValueError(
                f"denoise_chain: h {list(cond.shape)} and z_idx {list(z_idx.shape)} do not make a "
                f"feature of {f}"
            )
    if noise.shape != (steps + 1, n, p):
        raise ValueError(
            f"denoise_chain: noise must be [K + 1, N, P] = {[steps + 1, n, p]}, "
            f"got {list(noise.shape)}"
        )
    if not 0 <= ft_steps <= steps:
        raise ValueError(f"denoise_chain: ft_steps must lie in [0, {steps}], got {ft_steps}")
    for field in ("chunk_in", "cond_in", "time", "out"):
        ours, theirs = getattr(tuned, field).shape, getattr(base, field).shape
        if ours != theirs:
            raise ValueError(
                f"denoise_chain: base.{field} is {list(theirs)}, tuned.{field} {list(ours)}"
            )
    if len(base.hidden) != len(tuned.hidden) or base.residual != tuned.residual:
        raise ValueError("denoise_chain: base and tuned must be networks of one kind and depth")
    for name, tensor in (("cond", cond), ("tuned", tuned.cond_in), ("base", base.cond_in)):
        if tensor.device != noise.device or tensor.dtype != noise.dtype:
            raise ValueError(
                f"denoise_chain: {name} is {tensor.dtype} on {tensor.device}, noise {noise.dtype} "
                f"on {noise.device}"
            )


def _cluster_problem(tuned: Network, base: PackedNetwork, device: torch.device) -> str:
    """Why the CUDA variant cannot run; empty if it can."""
    if base.dtype != torch.bfloat16:
        return "multiplies in bfloat16; freeze the base as bfloat16 to allow it"
    return cluster.problem(tuned, device) or cluster.problem(base.network, device)


@torch.no_grad()
def denoise_chain(
    tuned: Network | PackedNetwork,
    noise: Tensor,
    steps: ChainSteps,
    *,
    feature: Tensor | None = None,
    h: Tensor | None = None,
    z_idx: Tensor | None = None,
    base: Network | PackedNetwork | None = None,
    ft_steps: int = 0,
    clip_noise: float = 3.0,
    table: Tensor | None = None,
    backend: str = "auto",
) -> Chain:
    """Sample the K-step denoising chain of N states (method section 3.3).

    Args:
        tuned: network of the last Kf steps; of all steps without `base`. A `Network` is packed as
            float32 at every call.
        noise: `[K + 1, N, P]` standard normal: the start and K steps, clipped to +-`clip_noise`.
        steps: tables `[K]`; a deviation of zero makes a step deterministic.
        feature: `[N, F]`; or
        h, z_idx: `[N, H]` and int64 `[N, S]` class indices in [0, C), for features [h, one-hot z]
            with F = H + S * C. The one-hot half is then a sum of S rows instead of a GEMM.
        base: network of the first K - Kf steps.
        ft_steps: Kf, the transitions to return.
        clip_noise: bound of a step's noise, in deviations.
        table: `step_table(steps)`, if it is at hand.
        backend: `"auto"`, `"reference"`, `"cpu"`, `"cuda"` or `"triton"`. All but the reference
            take float32 arguments. The CUDA one needs a base packed as bfloat16
            (`denoise_chain_cluster`); Triton's runs step by step with the weights as they are in
            float32 (`denoise_chain_steps`).
    Returns:
        chunk `[N, P]`, chain `[N, Kf + 1, P]`, log_prob `[N, Kf, P]`. No gradient.
    Raises:
        ValueError: shapes, devices or dtypes do not fit; both or neither form of the condition.
        RuntimeError: a class index out of range.
        BackendError: the backend was forced and cannot run.
    """
    if (feature is None) == (h is None) or (h is None) != (z_idx is None):
        raise ValueError("denoise_chain: give either feature, or h and z_idx")
    cond = feature if feature is not None else h
    assert cond is not None
    base = tuned if base is None else base
    net, base_net = (n.network if isinstance(n, PackedNetwork) else n for n in (tuned, base))
    _check(net, base_net, cond, z_idx, noise, ft_steps)
    packed = PackedNetwork(tuned) if isinstance(tuned, Network) else tuned
    frozen = PackedNetwork(base) if isinstance(base, Network) else base
    if base is tuned:
        frozen = packed
    unfit = {"cuda": _cluster_problem(net, frozen, noise.device)}
    chosen = registry.choose("denoise_chain", noise, backend, unfit)
    if chosen != "cpu" and z_idx is not None:
        cond = reference.one_hot_feature(cond, z_idx, net.cond_in.shape[1] - cond.shape[1])
    if chosen == "reference":
        return reference.denoise_chain(net, base_net, cond, noise, steps, ft_steps, clip_noise)
    if chosen == "triton":
        return denoise_chain_steps(
            net, base_net, cond, noise, steps, ft_steps, clip_noise, table=table, backend="triton"
        )
    if chosen == "cuda":
        return cluster.denoise_chain_cluster(
            net,
            base_net,
            cond,
            noise,
            steps,
            ft_steps=ft_steps,
            clip_noise=clip_noise,
            ft_dtype=packed.dtype,
            forms=(packed.cluster_forms, frozen.cluster_forms),
            backend="cuda",
        )
    dense = cond.shape[1]
    out = torch.ops.diwa.denoise_chain.default(
        noise,
        cond,
        z_idx,
        frozen.tensors(dense),
        packed.tensors(dense),
        step_table(steps) if table is None else table,
        0 if frozen is packed else len(steps.p) - ft_steps,
        ft_steps,
        clip_noise,
        net.residual,
    )
    return Chain(*out)
