"""Triton variants of `onehot_st`, `balanced_kl` and `gae`, as torch operators with gradients.

    onehot_st:    d_logits = (1 - unimix) p ⊙ (g - Σ_c g p)
    balanced_kl:  d_prior  = balance g (p - q)
                  d_post   = (1 - balance) g q ⊙ (log q - log p - KL_s)

with q, p the probabilities of posterior and prior and KL_s the divergence of a group. The backward
passes compute the probabilities again from the logits, so nothing else is kept.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import registry

_GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_CLASSES = 1024  # kernels/sample_categorical.py
MAX_TILE = 16384  # kernels/balanced_kl.py: S and C rounded up to powers of two

registry.declare("onehot_st", registry.triton("onehot_st", _GPU_DTYPES), registry.reference())
registry.declare("balanced_kl", registry.triton("balanced_kl", _GPU_DTYPES), registry.reference())
registry.declare("gae", registry.triton("gae", (torch.float32,)), registry.reference())

_lib = torch.library.Library("diwa", "FRAGMENT")
_lib.define("onehot_st_fwd_triton(Tensor logits, Tensor uniform, float unimix) -> Tensor")
_lib.define("onehot_st_bwd_triton(Tensor grad, Tensor logits, float unimix) -> Tensor")
_lib.define("balanced_kl_fwd_triton(Tensor post, Tensor prior) -> Tensor")
_lib.define(
    "balanced_kl_bwd_triton(Tensor grad, Tensor post, Tensor prior, float balance) "
    "-> (Tensor, Tensor)"
)
_lib.define(
    "gae_triton(Tensor reward, Tensor value, Tensor next_value, Tensor terminated, Tensor done, "
    "float gamma, float gae_lambda) -> (Tensor, Tensor)"
)
_KEY = "CompositeExplicitAutograd"


@torch.library.impl(_lib, "onehot_st_fwd_triton", _KEY)
def _onehot_fwd(logits: Tensor, uniform: Tensor, unimix: float) -> Tensor:
    from diwa.kernels.onehot_st import onehot_st_fwd

    return onehot_st_fwd(logits, uniform, unimix)


@torch.library.impl(_lib, "onehot_st_bwd_triton", _KEY)
def _onehot_bwd(grad: Tensor, logits: Tensor, unimix: float) -> Tensor:
    from diwa.kernels.onehot_st import onehot_st_bwd

    return onehot_st_bwd(grad, logits, unimix)


@torch.library.impl(_lib, "balanced_kl_fwd_triton", _KEY)
def _kl_fwd(post: Tensor, prior: Tensor) -> Tensor:
    from diwa.kernels.balanced_kl import balanced_kl_fwd

    return balanced_kl_fwd(post, prior)


@torch.library.impl(_lib, "balanced_kl_bwd_triton", _KEY)
def _kl_bwd(grad: Tensor, post: Tensor, prior: Tensor, balance: float) -> tuple[Tensor, Tensor]:
    from diwa.kernels.balanced_kl import balanced_kl_bwd

    return balanced_kl_bwd(grad, post, prior, balance)


@torch.library.impl(_lib, "gae_triton", _KEY)
def _gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    done: Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    from diwa.kernels.gae import gae

    return gae(reward, value, next_value, terminated, done, gamma, gae_lambda)


@torch.library.register_fake("diwa::onehot_st_fwd_triton")
def _fake_onehot_fwd(logits: Tensor, uniform: Tensor, unimix: float) -> Tensor:
    return logits.new_empty(logits.shape, dtype=torch.float32)


@torch.library.register_fake("diwa::onehot_st_bwd_triton")
def _fake_onehot_bwd(grad: Tensor, logits: Tensor, unimix: float) -> Tensor:
    return logits.new_empty(logits.shape)


@torch.library.register_fake("diwa::balanced_kl_fwd_triton")
def _fake_kl_fwd(post: Tensor, prior: Tensor) -> Tensor:
    return post.new_empty(post.shape[:-2], dtype=torch.float32)


@torch.library.register_fake("diwa::balanced_kl_bwd_triton")
def _fake_kl_bwd(
    grad: Tensor, post: Tensor, prior: Tensor, balance: float
) -> tuple[Tensor, Tensor]:
    return post.new_empty(post.shape), prior.new_empty(prior.shape)


@torch.library.register_fake("diwa::gae_triton")
def _fake_gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    done: Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    return reward.new_empty(reward.shape), reward.new_empty(reward.shape)


class _OneHot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, uniform: Tensor, unimix: float) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.unimix = unimix
        return torch.ops.diwa.onehot_st_fwd_triton.default(logits, uniform, unimix)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (logits,) = ctx.saved_tensors
        return torch.ops.diwa.onehot_st_bwd_triton.default(grad, logits, ctx.unimix), None, None


class _BalancedKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, post: Tensor, prior: Tensor, balance: float) -> Tensor:
        ctx.save_for_backward(post, prior)
        ctx.balance = balance
        return torch.ops.diwa.balanced_kl_fwd_triton.default(post, prior)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        saved = ctx.saved_tensors
        return *torch.ops.diwa.balanced_kl_bwd_triton.default(grad, *saved, ctx.balance), None


def kl_problem(post: Tensor, prior: Tensor) -> str:
    """Why the KL kernel cannot take these logits; empty if it can."""
    if prior.dtype != post.dtype:
        return f"post is {post.dtype}, prior {prior.dtype}"
    groups, classes = (1 << max(n - 1, 0).bit_length() for n in post.shape[-2:])
    if groups * classes > MAX_TILE:
        return f"{groups} x {classes} logits exceed {MAX_TILE}"
    return "" if post.shape[-2:].numel() else "there are no logits"


def onehot_st(logits: Tensor, uniform: Tensor, unimix: float) -> Tensor:
    """`reference_rssm.onehot_st`: logits `[..., S, C]`, uniform `[..., S]` -> float32
    `[..., S * C]`."""
    if torch.is_grad_enabled() and logits.requires_grad:
        return _OneHot.apply(logits, uniform, unimix).flatten(-2)
    return torch.ops.diwa.onehot_st_fwd_triton.default(logits, uniform, unimix).flatten(-2)


def balanced_kl(post: Tensor, prior: Tensor, balance: float) -> tuple[Tensor, Tensor]:
    """`reference_rssm.balanced_kl`: logits `[..., S, C]` of one dtype -> loss and KL `[...]`."""
    if torch.is_grad_enabled() and (post.requires_grad or prior.requires_grad):
        loss = _BalancedKL.apply(post, prior, balance)
    else:
        loss = torch.ops.diwa.balanced_kl_fwd_triton.default(post, prior)
    loss = loss.to(post.dtype)
    return loss, loss.detach()


def gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    done: Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """`reference_rssm.gae` of five float32 `[T, N]`, without gradient."""
    args = (reward, value, next_value, terminated, done)
    return torch.ops.diwa.gae_triton.default(*args, gamma, gae_lambda)
