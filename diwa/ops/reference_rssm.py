"""The specification of the world-model operators: plain torch, any device, any floating dtype."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class RSSMWeights(NamedTuple):
    """Parameters of one kind of step of a recurrent state-space model; U is the layers' width.

    Weights as in torch.nn.Linear; gain and shift belong to the layer norm. The head is the prior's
    or the posterior's, which also has a weight for the embedding.
    """

    cell_z: Tensor  # [U, Z]
    cell_bias: Tensor  # [U]
    cell_a: Tensor  # [U, A]
    cell_gain: Tensor  # [U]
    cell_shift: Tensor  # [U]
    w_ih: Tensor  # [3H, U]
    w_hh: Tensor  # [3H, H]
    b_ih: Tensor  # [3H]
    b_hh: Tensor  # [3H]
    head_h: Tensor  # [U, H]
    head_bias: Tensor  # [U]
    head_gain: Tensor  # [U]
    head_shift: Tensor  # [U]
    out: Tensor  # [Z, U]
    out_bias: Tensor  # [Z]
    head_e: Tensor | None = None  # [U, E]


def mixed_probabilities(logits: Tensor, unimix: float = 0.0) -> Tensor:
    """`(1 - unimix) softmax(logits) + unimix / C` over the last dimension; at least float32."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    probs = wide.softmax(-1)
    return (1 - unimix) * probs + unimix / probs.shape[-1] if unimix else probs


def class_index(probs: Tensor, uniform: Tensor) -> Tensor:
    """Inverse CDF: the number of cumulative probabilities `[..., C]` that are <= uniform `[...]`,
    at most C - 1 (int64)."""
    below = (probs.cumsum(-1) <= uniform[..., None]).sum(-1)
    return below.clamp(max=probs.shape[-1] - 1)


def onehot_st(logits: Tensor, uniform: Tensor, *, unimix: float = 0.0) -> Tensor:
    """Straight-through sample of categoricals (arXiv 2010.02193, algorithm 1), by inverse CDF.

    `p = mixed_probabilities(logits)`, `z = onehot(class_index(p, uniform)) + p - sg(p)`.

    Shapes: logits `[..., S, C]`, uniform `[..., S]` in [0, 1) -> `[..., S * C]`.
    """
    probs = mixed_probabilities(logits, unimix)
    index = class_index(probs, uniform)
    onehot = torch.zeros_like(probs).scatter_(-1, index[..., None], 1.0)
    return (onehot + (probs - probs.detach())).flatten(-2)


def balanced_kl(post: Tensor, prior: Tensor, balance: float) -> tuple[Tensor, Tensor]:
    """`balance KL(sg(post) | prior) + (1 - balance) KL(post | sg(prior))` of logits `[..., S, C]`,
    summed over S and C, and the plain KL, detached; both `[...]` (arXiv 2010.02193, eq. 2)."""

    def kl(q_logits: Tensor, p_logits: Tensor) -> Tensor:
        q, p = q_logits.log_softmax(-1), p_logits.log_softmax(-1)
        return (q.exp() * (q - p)).sum((-2, -1))

    to_prior, to_post = kl(post.detach(), prior), kl(post, prior.detach())
    return balance * to_prior + (1 - balance) * to_post, to_prior.detach()


def gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    done: Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, all `[T, N]` (arXiv 1506.02438, eq. 16).

    delta_t = r_t + gamma V+_t (1 - terminated_t) - V_t;
    A_t = delta_t + gamma lambda (1 - done_t) A_{t+1};  R_t = A_t + V_t.
    """
    delta = reward + gamma * next_value * (1 - terminated) - value
    decay = gamma * gae_lambda * (1 - done)
    advantage = torch.zeros_like(reward)
    carry = torch.zeros_like(reward[:1]).sum(0)  # zeros [N], also when T = 0
    for t in reversed(range(len(reward))):
        carry = delta[t] + decay[t] * carry
        advantage[t] = carry
    return advantage, advantage + value


def norm_elu(x: Tensor, gain: Tensor, shift: Tensor, eps: float) -> Tensor:
    """`ELU(LayerNorm(x))` over the last dimension."""
    return F.elu(F.layer_norm(x, x.shape[-1:], gain, shift, eps))


def rssm_recur(w: RSSMWeights, h: Tensor, x: Tensor, eps: float) -> Tensor:
    """`h' = GRU(ELU(LN(x)), h)`, `[N, H]`, from the summed projections x `[N, U]` of z and a."""
    x = norm_elu(x, w.cell_gain, w.cell_shift, eps)
    return torch.gru_cell(x, h, w.w_ih, w.w_hh, w.b_ih, w.b_hh)


def rssm_head(w: RSSMWeights, x: Tensor, groups: int, eps: float) -> Tensor:
    """`out ELU(LN(x))`, logits `[..., S, C]`, from the head's first layer x `[..., U]`."""
    logits = F.linear(norm_elu(x, w.head_gain, w.head_shift, eps), w.out, w.out_bias)
    return logits.unflatten(-1, (groups, -1))


def rssm_observe(
    w: RSSMWeights,
    embed: Tensor,
    action: Tensor,
    reset: Tensor,
    h: Tensor,
    z: Tensor,
    uniform: Tensor,
    *,
    unimix: float = 0.0,
    eps: float = 1e-3,
) -> tuple[Tensor, Tensor, Tensor]:
    """Posterior scan: for every frame t, with m = 1 - reset_t,

        x  = W_z (m z) + b + W_a a_t        h = GRU(ELU(LN(x)), m h)
        y  = W_h h + b_h + W_e e_t     logits = W_o ELU(LN(y)) + b_o
        z  = onehot_st(logits, uniform_t)

    Shapes: embed `[T, B, E]`, action `[T, B, A]`, reset `[T, B]`, h `[B, H]`, z `[B, Z]`, uniform
    `[T, B, S]`; the head of `w` is the posterior's.
    Returns:
        h `[T, B, H]`, z `[T, B, Z]`, logits `[T, B, S, C]`.
    """
    assert w.head_e is not None
    embed_projection, action_projection = F.linear(embed, w.head_e), F.linear(action, w.cell_a)
    keep = (1 - reset)[..., None]
    groups = uniform.shape[-1]
    hs, zs, logits = [], [], []
    for t in range(len(embed)):
        x = F.linear(z * keep[t], w.cell_z, w.cell_bias) + action_projection[t]
        h = rssm_recur(w, h * keep[t], x, eps)
        post = rssm_head(w, F.linear(h, w.head_h, w.head_bias) + embed_projection[t], groups, eps)
        z = onehot_st(post, uniform[t], unimix=unimix).to(h.dtype)
        hs.append(h)
        zs.append(z)
        logits.append(post)
    if not hs:
        shapes = h.shape, z.shape, (len(h), groups, z.shape[-1] // groups)
        return h.new_empty(0, *shapes[0]), h.new_empty(0, *shapes[1]), h.new_empty(0, *shapes[2])
    return torch.stack(hs), torch.stack(zs), torch.stack(logits)


def rssm_imagine(
    w: RSSMWeights,
    h: Tensor,
    z_idx: Tensor,
    actions: Tensor,
    uniforms: Tensor,
    *,
    temperature: float = 1.0,
    unimix: float = 0.0,
    eps: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    """L prior steps of N dreams: for every step l

        x = sum_s W_z[:, s C + z_s] + b + W_a a_l       h = GRU(ELU(LN(x)), h)
        logits = W_o ELU(LN(W_h h + b_h)) + b_o         z = class_index(logits / temperature, u_l)

    Shapes: h `[N, H]`, z_idx `[N, S]` in [0, C), actions `[L, N, A]`, uniforms `[L, N, S]`;
    the head of `w` is the prior's. A group whose probabilities are NaN gets the index -1, and its
    projection is NaN.
    Returns:
        h `[L, N, H]`, z_idx `[L, N, S]` (int64).
    """
    groups = uniforms.shape[-1]
    classes = len(w.out) // groups
    hs, indices = [], []
    for action, uniform in zip(actions, uniforms, strict=True):
        z = F.one_hot(z_idx.clamp(min=0), classes).to(h.dtype).flatten(-2)
        z = z.masked_fill((z_idx < 0).any(-1, keepdim=True), torch.nan)
        x = F.linear(z, w.cell_z, w.cell_bias) + F.linear(action, w.cell_a)
        h = rssm_recur(w, h, x, eps)
        logits = rssm_head(w, F.linear(h, w.head_h, w.head_bias), groups, eps)
        probs = mixed_probabilities(logits / temperature, unimix)
        z_idx = class_index(probs, uniform).masked_fill(probs.isnan().any(-1), -1)
        hs.append(h)
        indices.append(z_idx)
    if not hs:
        return h.new_empty(0, *h.shape), z_idx.new_empty(0, *z_idx.shape)
    return torch.stack(hs), torch.stack(indices)


def rssm_features(h: Tensor, z_idx: Tensor, classes: int) -> Tensor:
    """`[..., F]`: h `[..., H]` beside the one-hot of z_idx `[..., S]`, NaN for the index -1."""
    # scattered, because F.one_hot looks at the indices on the host
    z = h.new_zeros(*z_idx.shape, classes).scatter_(-1, z_idx.clamp(min=0)[..., None], 1.0)
    return torch.cat([h, z.masked_fill(z_idx[..., None] < 0, torch.nan).flatten(-2)], -1)
