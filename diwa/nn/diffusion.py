"""Diffusion policy over action chunks: network, chain sampling, log-probabilities.

Method sections 3 and 5.6. The algebra: the condition is projected once per state, the time
embedding is a table of K rows, one network runs per denoising step, and the log-probabilities of a
sampled chain are read off its own noise.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from diwa.config import PolicyConfig
from diwa.nn.frozen import FrozenPolicy
from diwa.nn.schedule import NoiseSchedule
from diwa.ops import chain_log_prob as chain_log_prob_op
from diwa.ops import mish
from diwa.ops.reference_chain import Chain, Network, predict_noise


class DenoisingMLP(nn.Module):
    """Noise prediction network of width W (section 3.1).

    The first layer is kept in three parts (chunk, time, condition), so that the condition part
    runs once per state.

    Equivalent to:

    >>> import torch, diwa.nn
    >>> import torch.nn.functional as F
    >>> net = diwa.nn.DenoisingMLP(chunk_dim=6, cond_dim=10, width=16, denoising_steps=5)
    >>> x, t, cond = torch.randn(4, 6), torch.tensor([0, 1, 3, 4]), torch.randn(4, 10)
    >>> first = torch.cat([net.chunk_in.weight, net.time_in.weight, net.cond_in.weight], 1)
    >>> rows = torch.cat([x, net.time(net.sinusoid[t]), cond], 1)
    >>> y = F.linear(rows, first, net.cond_in.bias)
    >>> y = net.out(y + net.hidden2(F.mish(net.hidden1(F.mish(y)))))
    >>> torch.allclose(net(x, net.time_table()[t], net.cond_in(cond)), y, atol=1e-5)
    True

    Args:
        chunk_dim: L * A numbers of an action chunk.
        cond_dim: F.
        width: W.
        denoising_steps: K, rows of the time table.
        time_dim: size of the sinusoidal embedding.
        hidden_layers: layers `hidden1`, `hidden2`, ... of size W x W after the first.
        residual: pairs of them are pre-activation residual blocks; otherwise a plain MLP.

    Raises:
        ValueError: a residual network with an odd number of hidden layers.
    """

    sinusoid: Tensor

    def __init__(
        self,
        chunk_dim: int,
        cond_dim: int,
        width: int = 512,
        denoising_steps: int = 20,
        time_dim: int = 16,
        hidden_layers: int = 2,
        residual: bool = True,
    ) -> None:
        super().__init__()
        if residual and hidden_layers % 2:
            raise ValueError(f"a residual network needs pairs of layers, got {hidden_layers}")
        half = time_dim // 2
        omega = torch.exp(-torch.arange(half) * math.log(1e4) / (half - 1))
        angle = torch.arange(denoising_steps)[:, None] * omega
        self.register_buffer(
            "sinusoid", torch.cat([angle.sin(), angle.cos()], -1), persistent=False
        )
        self.time = nn.Sequential(
            nn.Linear(time_dim, 2 * time_dim), nn.Mish(), nn.Linear(2 * time_dim, time_dim)
        )
        self.chunk_in = nn.Linear(chunk_dim, width, bias=False)
        self.time_in = nn.Linear(time_dim, width, bias=False)
        self.cond_in = nn.Linear(cond_dim, width)
        self.residual = residual
        self.hidden_names = [f"hidden{i + 1}" for i in range(hidden_layers)]
        for name in self.hidden_names:
            self.add_module(name, nn.Linear(width, width))
        self.out = nn.Linear(width, chunk_dim)

    def time_table(self) -> Tensor:
        """First-layer contribution of every denoising step, `[K, W]`."""
        return self.time_in(self.time(self.sinusoid))

    def network(self, step: Tensor | None = None) -> Network:
        """The weights as the operators take them; `step` int64 picks rows of the time table."""
        time = self.time_table()
        return self._weights(time if step is None else time.index_select(0, step))

    def _weights(self, time: Tensor) -> Network:
        hidden = [self.get_submodule(name) for name in self.hidden_names]
        return Network(
            self.chunk_in.weight,
            self.cond_in.weight,
            self.cond_in.bias,
            time,
            tuple((layer.weight, layer.bias) for layer in hidden),  # type: ignore[misc]
            self.out.weight,
            self.out.bias,
            self.residual,
        )

    def forward(self, x: Tensor, time: Tensor, cond: Tensor) -> Tensor:
        """Predicted noise.

        Args:
            x: `[..., L * A]` noisy chunk.
            time: `[..., W]` rows of `time_table`.
            cond: `[..., W]` condition projected by `cond_in`.
        """
        return predict_noise(self._weights(time), x, time, cond, activation=mish)


class DiffusionPolicy(nn.Module):
    """Denoising diffusion policy pi(chunk | feature).

    Equivalent to (evaluation, one network for all steps):

    >>> import torch, diwa.nn
    >>> from diwa.config import PolicyConfig
    >>> policy = diwa.nn.DiffusionPolicy(16, PolicyConfig(width=32))
    >>> net, s = policy.net, policy.schedule
    >>> feature, noise = torch.randn(2, 16), torch.randn(21, 2, 4, 7)
    >>> x, std = noise[0].flatten(1), s.evaluation_std()
    >>> for t in reversed(range(20)):
    ...     eps = net(x, net.time_table()[t], net.cond_in(feature))
    ...     mean = s.c1[t] * (s.p[t] * x - s.q[t] * eps).clamp(-1, 1) + s.c2[t] * x
    ...     x = mean + std[t] * noise[20 - t].flatten(1).clamp(-3, 3)
    >>> chunk = policy.sample(feature, noise).chunk
    >>> torch.allclose(chunk.flatten(1), x, atol=1e-4)
    True

    Args:
        cond_dim: F.
        config: sizes and deviations.
        action_dim: A.
    """

    def __init__(self, cond_dim: int, config: PolicyConfig, action_dim: int = 7) -> None:
        super().__init__()
        self.config, self.action_dim, self.cond_dim = config, action_dim, cond_dim
        self.chunk_dim = config.chunk * action_dim
        self.schedule = NoiseSchedule(
            config.denoising_steps, ddim_steps=config.ddim_steps, ddim_eta=config.ddim_eta
        )
        self.net = DenoisingMLP(
            self.chunk_dim,
            cond_dim,
            config.width,
            config.denoising_steps,
            config.time_dim,
            config.hidden_layers,
            config.network == "residual",
        )
        self._sampler: FrozenPolicy | None = None

    @property
    def steps(self) -> int:
        """Sampling steps: K, or the number visited with DDIM."""
        return self.schedule.steps

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sampler": None}  # packed weights are not copied

    def freeze(
        self, dtype: torch.dtype = torch.float32, frozen_dtype: torch.dtype | None = None
    ) -> FrozenPolicy:
        """This policy packed for sampling; it follows later changes of the parameters.

        bfloat16 reads half the bytes. Keep the fine-tuned steps in float32: the log-probabilities
        of a chain sampled with bfloat16 weights differ under the float32 network of the update by
        as much as PPO's clip range. The frozen steps carry none and may be bfloat16.

        Args:
            dtype: float32 or bfloat16, of the last Kf steps.
            frozen_dtype: of the first K - Kf steps, also when this is the `base` of another policy;
                `dtype` if None.

        Raises:
            TypeError: another dtype.
        """
        return FrozenPolicy(self, dtype, frozen_dtype)

    def network(self) -> Network:
        """The weights, with the time table at the steps that the sampler visits."""
        return self.net.network(self.schedule.time)

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        """Standard normal noise `[K + 1, N, L, A]` of one chain: the start and K steps (the number
        of steps visited with DDIM)."""
        shape = (self.schedule.steps + 1, n, self.config.chunk, self.action_dim)
        noise = torch.randn(shape, generator=generator, device=generator.device)
        return noise.to(self.schedule.sigma.device)

    def bc_loss(self, feature: Tensor, chunk: Tensor, step: Tensor, noise: Tensor) -> Tensor:
        """Mean squared error of the predicted noise (section 3.4).

        Args:
            feature: `[B, F]`.
            chunk: `[B, L, A]` demonstrated actions in [-1, 1].
            step: `[B]` int64 denoising steps.
            noise: `[B, L, A]`.
        """
        x0, eps = chunk.flatten(1), noise.flatten(1)
        bar = self.schedule.alpha_bar[step][:, None]
        x = bar.sqrt() * x0 + (1 - bar).sqrt() * eps
        predicted = self.net(x, self.net.time_table()[step], self.net.cond_in(feature))
        return F.mse_loss(predicted, eps)

    def sample(
        self,
        feature: Tensor | tuple[Tensor, Tensor],
        noise: Tensor,
        *,
        base: DiffusionPolicy | None = None,
        ft_steps: int = 0,
        explore: bool = False,
        backend: str = "auto",
    ) -> Chain:
        """Sample the whole chain (section 3.3) by `diwa.ops.denoise_chain`.

        Args:
            feature: `[N, F]`, or `(h, z_idx)`: `[N, H]` and int64 class indices `[N, S]`.
            noise: `[K + 1, N, L, A]`, see `noise`; step noise is clipped to +-clip_noise.
            base: frozen policy of the first K - Kf steps; None uses this policy throughout.
            ft_steps: Kf, transitions to return in the chain.
            explore: deviations max(sigma, min_sampling_std) at every step instead of the
                evaluation's.
            backend: `"auto"`, `"reference"` or `"cpu"`.

        Returns:
            chunk `[N, L, A]`, chain `[N, Kf + 1, L, A]`, log_prob `[N, Kf, L, A]`; no gradient.
        """
        return self._frozen().sample(
            feature,
            noise,
            base=None if base is None else base._frozen(),
            ft_steps=ft_steps,
            explore=explore,
            backend=backend,
        )

    def _frozen(self) -> FrozenPolicy:
        if self._sampler is None or self._sampler.policy is not self:
            self._sampler = self.freeze()
        return self._sampler

    def chain_log_prob(self, feature: Tensor, chain: Tensor, *, backend: str = "auto") -> Tensor:
        """Log-density of the Kf transitions of each chain under this policy (section 5.6).

        Args:
            feature: `[M, F]`.
            chain: `[M, Kf + 1, L, A]`.
            backend: of `diwa.ops.chain_log_prob`.

        Returns:
            `[M, Kf, L, A]`, differentiable in the policy's parameters.
        """
        kf = chain.shape[1] - 1
        step = torch.arange(kf - 1, -1, -1, device=chain.device)
        return self.transition_log_prob(feature, chain[:, :-1], chain[:, 1:], step, backend=backend)

    def transition_log_prob(
        self, feature: Tensor, x: Tensor, x_next: Tensor, step: Tensor, *, backend: str = "auto"
    ) -> Tensor:
        """Log-density of single transitions, as shuffled over states and denoising steps.

        Args:
            feature: `[M, F]`.
            x: `[M, G, L, A]` chunks before; G transitions of each state.
            x_next: `[M, G, L, A]` chunks after.
            step: int64 `[M, G]` or `[G]`, the t of each transition.
            backend: of `diwa.ops.chain_log_prob`.

        Returns:
            `[M, G, L, A]`, differentiable in the policy's parameters.
        """
        steps = self.schedule.tables(self.config, explore=True)
        log_prob = chain_log_prob_op(
            self.network(), feature, x.flatten(2), x_next.flatten(2), step, steps, backend=backend
        )
        return log_prob.unflatten(2, (self.config.chunk, self.action_dim))
