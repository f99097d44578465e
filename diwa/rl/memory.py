"""Memory of a fine-tuning iteration, and what to do when a GPU has not enough."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from diwa import parallel
from diwa.agent import Policy
from diwa.config import FinetuneConfig
from diwa.errors import DeviceMemoryError
from diwa.nn.world_model import WorldModel

SHARE = 0.9
"""Of the memory of a GPU, what fragments and libraries leave to be used."""


def bytes_per_dream(config: FinetuneConfig, policy: Policy, model: WorldModel) -> int:
    """Estimate of what one dream more takes in an iteration on a GPU.

    Counted are float32 numbers: the random numbers of a rollout and their copies in its graph; the
    rollout, also its chunks before they are laid together; and the minibatch with the largest part,
    the activations of the network for all Kf transitions of a state, forward and backward.
    """
    chunks, kf, numbers = config.n_chunks, config.ft_denoising_steps, policy.chunk_dim
    feature, groups = model.feature_dim, model.rssm.stoch_groups
    width, layers = policy.config.width, policy.config.hidden_layers
    draws = 1 + groups + (policy.steps + 1) * numbers + policy.config.chunk * groups
    state = 2 * feature + (kf + 1) * numbers + kf + 5
    transition = (2 * layers + 7) * width + 12 * numbers
    batch = (2 * feature + kf * transition + 2 * (kf + 1) * numbers) / config.minibatches
    return int(4 * chunks * (2 * draws + 3 * state + batch))


@contextmanager
def memory_advice(config: FinetuneConfig, policy: Policy, model: WorldModel) -> Iterator[None]:
    """Explains an out-of-memory error of a GPU inside the `with` block.

    Raises:
        DeviceMemoryError: says how many dreams would fit, and the settings that lower them.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info()
        usable = free + torch.cuda.memory_reserved()
        each, processes = bytes_per_dream(config, policy, model), parallel.world_size()
        here = config.n_dreams // processes
        fit = int(SHARE * usable / each)
        if fit >= here:  # the estimate was too low
            fit = here // 2
        raise DeviceMemoryError(
            f"the GPU has no memory left for {here:,} dreams: of {total / 2**30:.1f} GiB "
            f"{usable / 2**30:.1f} GiB can be had, and a dream takes about {each / 2**20:.1f} MiB. "
            f"About {max(fit, 1):,} would fit: `--finetune.n-dreams {max(fit, 1) * processes}`. "
            f"More `--finetune.minibatches` (now {config.minibatches}) make room as well. "
            "Other settings need `--overwrite` or another --run-dir."
        ) from error
