"""`balanced_kl`: the two KL terms that train an RSSM's prior and posterior."""

from torch import Tensor

from . import reference_rssm, registry, rssm_triton


def balanced_kl(
    post: Tensor, prior: Tensor, balance: float, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """KL of posterior and prior, summed over groups (method section 1.6).

    Args:
        post: logits `[..., S, C]` of the posterior, floating.
        prior: logits `[..., S, C]` of the prior.
        balance: in [0, 1], the share that trains the prior; the rest trains the posterior.
        backend: `"auto"`, `"reference"` or `"triton"` (logits of one dtype, S * C up to 16384).
    Returns:
        The balanced loss `[...]` and the plain KL `[...]`, detached.
    Raises:
        ValueError: wrong shape.
        TypeError: not floating point.
        BackendError: the backend was forced and cannot run.
    """
    if post.dim() < 2:
        raise ValueError(f"balanced_kl: post must be [..., S, C], got {list(post.shape)}")
    if prior.shape != post.shape:
        raise ValueError(
            f"balanced_kl: prior must be {list(post.shape)} as post, got {list(prior.shape)}"
        )
    if not (post.dtype.is_floating_point and prior.dtype.is_floating_point):
        raise TypeError(
            f"balanced_kl: logits must be floating point, got {post.dtype} and {prior.dtype}"
        )
    unfit = {"triton": rssm_triton.kl_problem(post, prior)}
    if registry.choose("balanced_kl", post, backend, unfit) == "triton":
        return rssm_triton.balanced_kl(post, prior, balance)
    return reference_rssm.balanced_kl(post, prior, balance)
