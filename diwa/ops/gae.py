"""`gae`: generalised advantage estimation with terminated and truncated kept apart."""

from torch import Tensor

from . import reference_rssm, registry, rssm_triton


def gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    done: Tensor,
    gamma: float,
    gae_lambda: float,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Advantages and returns (method section 5.5, fixed form).

    delta_t = r_t + gamma V+_t (1 - terminated_t) - V_t;
    A_t = delta_t + gamma lambda (1 - done_t) A_{t+1}.

    Args:
        reward: `[T, N]`, floating.
        value: `[T, N]` of the state acted in.
        next_value: `[T, N]` of the successor **before** any reset.
        terminated: `[T, N]` in {0, 1}: no value beyond this step.
        done: `[T, N]` in {0, 1}: terminated or truncated, the trace is cut.
        gamma: discount per step, in [0, 1].
        gae_lambda: lambda, in [0, 1].
        backend: `"auto"`, `"reference"` or `"triton"` (one scan; float32, without gradient).
    Returns:
        Advantages and returns, `[T, N]`.
    Raises:
        ValueError: wrong shape.
        TypeError: not floating point.
        BackendError: the backend was forced and cannot run.
    """
    if reward.dim() < 1:
        raise ValueError("gae: reward must be [T, N]")
    given = {"value": value, "next_value": next_value, "terminated": terminated, "done": done}
    for name, tensor in {"reward": reward, **given}.items():
        if tensor.shape != reward.shape:
            raise ValueError(
                f"gae: {name} must be {list(reward.shape)} as reward, got {list(tensor.shape)}"
            )
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"gae: {name} must be floating point, got {tensor.dtype}")
    tensors = (reward, *given.values())
    unfit = {}
    if reward.dim() != 2 or any(t.requires_grad or t.dtype != reward.dtype for t in tensors):
        unfit["triton"] = "takes [T, N] of one dtype, without gradient"
    if registry.choose("gae", reward, backend, unfit) == "triton":
        return rssm_triton.gae(reward, value, next_value, terminated, done, gamma, gae_lambda)
    return reference_rssm.gae(reward, value, next_value, terminated, done, gamma, gae_lambda)
