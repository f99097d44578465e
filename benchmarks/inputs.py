"""Sizes, models and inputs of the cases; everything follows from a fixed seed."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diwa.config import PolicyConfig
from diwa.nn.diffusion import DiffusionPolicy
from diwa.nn.rssm import RSSM


@dataclass(frozen=True)
class Size:
    """Sizes of a world model and policy; letters as in `diwa.__doc__`."""

    name: str
    deter: int
    hidden: int
    groups: int
    classes: int
    embed: int
    width: int
    actions: int = 7
    chunk: int = 4
    steps: int = 20
    ft_steps: int = 10

    @property
    def stoch(self) -> int:
        """Z."""
        return self.groups * self.classes

    @property
    def feature(self) -> int:
        """F."""
        return self.deter + self.stoch

    @property
    def numbers(self) -> int:
        """L * A, numbers of an action chunk."""
        return self.chunk * self.actions

    def case(self, text: str) -> str:
        """Case name; the paper's size goes without saying."""
        return text if self.name == "paper" else f"{self.name},{text}"

    def policy_flops(self, evaluations: int) -> float:
        """Of `evaluations` passes through a network whose condition is projected already."""
        return evaluations * 2.0 * (2 * self.numbers * self.width + 2 * self.width**2)

    def cond_flops(self) -> float:
        """Of one condition: the dense half; the one-hot half is S additions per output."""
        return 2.0 * self.deter * self.width

    def step_flops(self) -> float:
        """Of one prior step; the one-hot product is S additions per output."""
        gru = 3 * self.deter * (self.hidden + self.deter)
        return 2.0 * (gru + self.hidden * (self.actions + self.deter + self.stoch))

    def observe_flops(self) -> float:
        """Of one frame of the posterior scan with prior logits, forward and backward."""
        posterior = 2.0 * self.hidden * (self.deter + self.embed + self.stoch)
        return 3 * (self.step_flops() + posterior) + 2.0 * self.hidden * self.stoch


PAPER = Size("paper", 1024, 1000, 32, 32, 1551, 512)
COMPACT = Size("compact", 512, 512, 32, 32, 1551, 512)
TINY = Size("tiny", 24, 20, 4, 5, 18, 16, steps=6, ft_steps=3)
"""Of the tests: odd sizes, nothing to be timed."""


def generator(seed: int = 0) -> torch.Generator:
    """A fresh generator."""
    return torch.Generator().manual_seed(seed)


def policies(size: Size) -> tuple[DiffusionPolicy, DiffusionPolicy]:
    """A frozen base and a tuned policy that differs from it."""
    config = PolicyConfig(chunk=size.chunk, denoising_steps=size.steps, width=size.width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = DiffusionPolicy(size.feature, config, size.actions).requires_grad_(False)
        tuned = DiffusionPolicy(size.feature, config, size.actions)
    return base, tuned


def rssm(size: Size) -> RSSM:
    """A world model's recurrent part, initialised as for training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return RSSM(size.actions, size.embed, size.deter, size.groups, size.classes, size.hidden)


def latents(size: Size, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """h `[N, H]` in (-1, 1), classes `[N, S]` int64, and the feature `[N, F]` they make."""
    g = generator(1)
    h = torch.randn(n, size.deter, generator=g).tanh()
    index = torch.randint(size.classes, (n, size.groups), generator=g)
    onehot = torch.nn.functional.one_hot(index, size.classes).flatten(1).float()
    return h, index, torch.cat([h, onehot], 1)


def chain_noise(size: Size, n: int) -> Tensor:
    """`[K + 1, N, L, A]`."""
    return torch.randn(size.steps + 1, n, size.chunk, size.actions, generator=generator(2))


def fwd_bwd(parameters: list[Tensor], loss: Callable[[], Tensor]) -> Callable[[], list[Tensor]]:
    """A call that leaves fresh gradients in the parameters, and returns them."""

    def call() -> list[Tensor]:
        for p in parameters:
            p.grad = None
        loss().backward()
        return [p.grad for p in parameters if p.grad is not None]

    return call


def compiled(function: Callable) -> Callable:
    """torch.compile with inductor's freezing, which packs weights ahead of time in inference.

    The configuration is set as TORCHINDUCTOR_FREEZING=1 does: the option of the same name in
    torch.compile's `options` was found to pack nothing.
    """
    import torch._inductor.config as inductor

    os.environ["TORCHINDUCTOR_FREEZING"] = "1"
    inductor.freezing = True
    return torch.compile(function, dynamic=False)
