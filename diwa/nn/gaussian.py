"""Gaussian policy over action chunks: the paper's ablation of the diffusion policy (section 7.2).

It answers to the same calls as `diwa.nn.DiffusionPolicy`, as a chain of one "denoising" step, so
that every phase runs with either (`--policy.kind gaussian`).
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from diwa.config import PolicyConfig
from diwa.ops import mish
from diwa.ops.reference_chain import HALF_LOG_2PI, Chain, one_hot_feature


class GaussianPolicy(nn.Module):
    """Policy pi(chunk | feature) = N(mu(feature), s²), mu in [-1, 1], with the diffusion policy's
    layers and exploration noise.

    The deviation is not learned: `min_sampling_std` in exploratory sampling, as in the diffusion
    policy's last step, and `min_logprob_std` in densities. With a constant deviation the negative
    log-likelihood of demonstrations is their squared error, scaled and shifted (`bc_loss`).

    Equivalent to:

    >>> import torch, diwa.nn
    >>> import torch.nn.functional as F
    >>> from diwa.config import PolicyConfig
    >>> policy = diwa.nn.GaussianPolicy(16, PolicyConfig(kind="gaussian", width=32))
    >>> feature, noise = torch.randn(2, 16), torch.randn(2, 2, 4, 7)
    >>> y = policy.cond_in(feature)
    >>> y = policy.out(y + policy.hidden2(F.mish(policy.hidden1(F.mish(y))))).tanh()
    >>> chunk = policy.sample(feature, noise).chunk
    >>> torch.allclose(chunk.flatten(1), y, atol=1e-6)
    True
    >>> explored = policy.sample(feature, noise, ft_steps=1, explore=True)
    >>> x = y + 0.1 * noise[1].flatten(1).clamp(-3, 3)
    >>> torch.allclose(explored.chunk.flatten(1), x, atol=1e-6)
    True
    >>> density = torch.distributions.Normal(y, 0.1).log_prob(x).view(2, 1, 4, 7)
    >>> torch.allclose(explored.log_prob, density, atol=1e-4)
    True

    Args:
        cond_dim: F.
        config: sizes and deviations; what concerns denoising is not used.
        action_dim: A.

    Raises:
        ValueError: a residual network with an odd number of hidden layers.
    """

    steps = 1
    """Sampling steps, all of them fine-tuned."""

    def __init__(self, cond_dim: int, config: PolicyConfig, action_dim: int = 7) -> None:
        super().__init__()
        self.residual, depth = config.network == "residual", config.hidden_layers
        if self.residual and depth % 2:
            raise ValueError(f"a residual network needs pairs of layers, got {depth}")
        self.config, self.action_dim, self.cond_dim = config, action_dim, cond_dim
        self.chunk_dim = config.chunk * action_dim
        self.cond_in = nn.Linear(cond_dim, config.width)
        self.hidden_names = [f"hidden{i + 1}" for i in range(depth)]
        for name in self.hidden_names:
            self.add_module(name, nn.Linear(config.width, config.width))
        self.out = nn.Linear(config.width, self.chunk_dim)

    def forward(self, feature: Tensor) -> Tensor:
        """Mean `[..., L * A]` of features `[..., F]`."""
        y = self.cond_in(feature)
        hidden = [self.get_submodule(name) for name in self.hidden_names]
        if self.residual:
            for first, second in zip(hidden[::2], hidden[1::2], strict=True):
                y = y + second(mish(first(mish(y))))
        else:
            y = mish(y)
            for layer in hidden:
                y = mish(layer(y))
        return self.out(y).tanh()

    def freeze(
        self, dtype: torch.dtype = torch.float32, frozen_dtype: torch.dtype | None = None
    ) -> GaussianPolicy:
        """A sampler of this policy: itself, for one pass through a network needs no packing.

        Args:
            dtype, frozen_dtype: as for `DiffusionPolicy.freeze`; the weights stay float32.
        """
        return self

    @property
    def policy(self) -> GaussianPolicy:
        """The policy that this sampler samples."""
        return self

    def refresh(self) -> None:
        """Nothing is packed; see `FrozenPolicy.refresh`."""

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        """Standard normal noise `[2, N, L, A]`: an unused start and that of the one step."""
        shape = (self.steps + 1, n, self.config.chunk, self.action_dim)
        noise = torch.randn(shape, generator=generator, device=generator.device)
        return noise.to(self.out.weight.device)

    def bc_loss(self, feature: Tensor, chunk: Tensor, step: Tensor, noise: Tensor) -> Tensor:
        """Mean squared error of the mean; the likelihood's optimum for a constant deviation.

        Args:
            feature: `[B, F]`.
            chunk: `[B, L, A]` demonstrated actions in [-1, 1].
            step, noise: of a diffusion policy; not used.
        """
        return F.mse_loss(self(feature), chunk.flatten(1))

    @torch.no_grad()
    def sample(
        self,
        feature: Tensor | tuple[Tensor, Tensor],
        noise: Tensor,
        *,
        base: GaussianPolicy | None = None,
        ft_steps: int = 0,
        explore: bool = False,
        backend: str = "auto",
    ) -> Chain:
        """Sample chunks: the mean, or N(mean, s²) with `explore`.

        Args:
            feature: `[N, F]`, or `(h, z_idx)`: `[N, H]` and int64 class indices `[N, S]`.
            noise: `[2, N, L, A]`, see `noise`; clipped to +-clip_noise.
            base: frozen policy, which acts where no step is fine-tuned.
            ft_steps: Kf, 0 or 1.
            explore: add the noise.
            backend: of the diffusion policy's operator; not used.

        Returns:
            chunk `[N, L, A]`, chain `[N, Kf + 1, L, A]` (`noise[0]`, chunk), log_prob
            `[N, Kf, L, A]`; no gradient.

        Raises:
            ValueError: noise of another number of steps, or `ft_steps` above 1.
        """
        if len(noise) != self.steps + 1 or not 0 <= ft_steps <= self.steps:
            raise ValueError(
                f"a Gaussian policy has one step: noise [2, N, L, A] and ft_steps 0 or 1, got "
                f"{list(noise.shape)} and {ft_steps}"
            )
        if isinstance(feature, tuple):
            feature = one_hot_feature(*feature, self.cond_dim - feature[0].shape[1])
        acting = self if ft_steps or base is None else base
        shape = (self.config.chunk, self.action_dim)
        std = self.config.min_sampling_std if explore else 0.0
        mean = acting(feature).unflatten(-1, shape)
        chunk = mean + std * noise[1].clamp(-self.config.clip_noise, self.config.clip_noise)
        if not ft_steps:
            empty = chunk.new_zeros(len(chunk), 0, *shape)
            return Chain(chunk, empty, empty)
        log_prob = self._log_density(chunk - mean)
        return Chain(chunk, torch.stack([noise[0], chunk], 1), log_prob[:, None])

    def _log_density(self, difference: Tensor) -> Tensor:
        std = self.config.min_logprob_std
        return -0.5 * (difference / std) ** 2 - math.log(std) - HALF_LOG_2PI

    def chain_log_prob(self, feature: Tensor, chain: Tensor, *, backend: str = "auto") -> Tensor:
        """Log-density `[M, 1, L, A]` of chains `[M, 2, L, A]` under this policy, differentiable.

        Args:
            feature: `[M, F]`.
            chain: as from `sample`.
            backend: not used.
        """
        step = torch.zeros(1, dtype=torch.int64, device=chain.device)
        return self.transition_log_prob(feature, chain[:, :-1], chain[:, 1:], step)

    def transition_log_prob(
        self, feature: Tensor, x: Tensor, x_next: Tensor, step: Tensor, *, backend: str = "auto"
    ) -> Tensor:
        """Log-density `[M, G, L, A]` of chunks `x_next [M, G, L, A]`; G chunks of each state.

        Args:
            feature: `[M, F]`.
            x, step, backend: of a diffusion policy; not used.
            x_next: the chunks.
        """
        mean = self(feature).unflatten(-1, (self.config.chunk, self.action_dim))
        return self._log_density(x_next - mean[:, None])
