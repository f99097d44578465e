"""`denoise_chain_cluster`: the denoising chain in one launch of thread-block clusters (bfloat16).

The hidden weights lie in the shared memory of a cluster of W / 64 blocks for all K steps, and the
rows are cut into tiles, one per cluster. What the chain needs of the condition is one GEMM per
network, made here by torch. Compute capability 9.0 and newer; width 256 or 512; one residual block.

A chain of bfloat16 weights has log-probabilities that differ under the float32 network of the
update by as much as PPO's clip range. So the fine-tuned steps run in float32 after the kernel,
unless they are packed as bfloat16 too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference_chain as reference
from . import registry
from .denoise_chain_steps import denoise_chain_steps
from .reference_chain import Chain, ChainSteps, Network, step_table

WIDTHS = (256, 512)
Forms = dict[int, list[Tensor]]  # first step -> packed tensors

registry.declare(
    "denoise_chain_cluster",
    registry.native("cuda", "denoise_chain_cluster"),  # csrc/cuda/denoise_chain.cu
    registry.reference(),  # diwa/ops/reference_chain.py
)


def _fake(
    noise: Tensor,
    cond_base: Tensor,
    cond_tuned: Tensor,
    base: list[Tensor],
    tuned: list[Tensor],
    steps: Tensor,
    base_steps: int,
    ft_steps: int,
    clip_noise: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.empty_chain(noise, ft_steps)


if hasattr(torch.ops.diwa, "denoise_chain_cluster"):  # the schema is in libdiwa_cuda.so
    torch.library.register_fake("diwa::denoise_chain_cluster", _fake)


def problem(net: Network, device: torch.device) -> str:
    """Why the kernel cannot run this network there; empty if it can."""
    width, numbers = net.chunk_in.shape
    if width not in WIDTHS:
        return f"the width must be 256 or 512, not {width}"
    if numbers > 32 or numbers % 4:
        return f"L * A must be 4, 8, ... 32, not {numbers}"
    if not net.residual or len(net.hidden) != 2:
        return "only networks of one residual block"
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 9:
        return "thread-block clusters need compute capability 9.0"
    return ""


def pack(net: Network, first: int = 0) -> list[Tensor]:
    """A network as the kernel takes it, with its time table from denoising step `first` on."""
    (w1, b1), (w2, b2) = net.hidden
    half, full = torch.bfloat16, torch.float32
    parts = [
        *((net.chunk_in, half), (net.time[first:], full), (w1, half), (b1, full)),
        *((w2, half), (b2, full), (net.out, half), (net.out_bias, full)),
    ]
    return [t.detach().to(dtype).contiguous() for t, dtype in parts]


def _packed(net: Network, first: int, forms: Forms) -> list[Tensor]:
    if first not in forms:
        forms[first] = pack(net, first)
    return forms[first]


@torch.no_grad()
def denoise_chain_cluster(
    tuned: Network,
    base: Network,
    feature: Tensor,
    noise: Tensor,
    steps: ChainSteps,
    *,
    ft_steps: int = 0,
    clip_noise: float = 3.0,
    ft_dtype: torch.dtype = torch.float32,
    forms: tuple[Forms, Forms] | None = None,
    backend: str = "auto",
) -> Chain:
    """Sample the chain of `reference_chain.denoise_chain` with bfloat16 weights and activations.

    Args:
        tuned: network of the last Kf steps. base: network of the others.
        feature: `[N, F]`, float32. noise: `[K + 1, N, P]`, float32.
        steps: tables `[K]`.
        ft_steps: Kf, transitions to return.
        clip_noise: bound of the noise of a step, in deviations.
        ft_dtype: of the last Kf steps: float32, which runs them after the kernel, each by cuBLAS
            and `denoise_step`, or bfloat16, which runs the whole chain in it.
        forms: packed forms of tuned and base, kept from call to call while the weights stay.
        backend: `"auto"`, `"reference"` or `"cuda"`.
    Returns:
        chunk `[N, P]`, chain `[N, Kf + 1, P]`, log_prob `[N, Kf, P]`. No gradient. On the reference
        every step is float32.
    Raises:
        TypeError: another `ft_dtype`.
        BackendError: the backend was forced and cannot run.
    """
    if ft_dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"denoise_chain_cluster: float32 or bfloat16, got {ft_dtype}")
    why = problem(base, noise.device) or problem(tuned, noise.device)
    unfit = {"cuda": why} if why else {}
    if registry.choose("denoise_chain_cluster", noise, backend, unfit) == "reference":
        return reference.denoise_chain(tuned, base, feature, noise, steps, ft_steps, clip_noise)
    total, kept = len(steps.p), forms or ({}, {})
    conds = [F.linear(feature, net.cond_in, net.cond_bias) for net in (base, tuned)]
    if ft_dtype == torch.bfloat16:
        nets = (_packed(base, 0, kept[1]), _packed(tuned, 0, kept[0]))
        args = (step_table(steps), total - ft_steps, ft_steps, clip_noise)
        return Chain(*torch.ops.diwa.denoise_chain_cluster.default(noise, *conds, *nets, *args))
    first = total - ft_steps
    x = noise[0]
    if first:
        net = _packed(base, ft_steps, kept[1])
        table = step_table(ChainSteps(*(t[ft_steps:] for t in steps)))
        x, _, _ = torch.ops.diwa.denoise_chain_cluster.default(
            noise[: first + 1], conds[0], conds[0], net, net, table, first, 0, clip_noise
        )
    if not ft_steps:
        empty = x.new_zeros(len(x), 0, x.shape[1])
        return Chain(x, empty, empty)
    rest = torch.cat([x[None], noise[first + 1 :]])
    last = ChainSteps(*(t[:ft_steps] for t in steps))
    return denoise_chain_steps(tuned, tuned, feature, rest, last, ft_steps, clip_noise)
