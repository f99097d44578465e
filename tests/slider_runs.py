"""A made-up slider task that tiny models learn: settings and play."""

import dataclasses

import numpy as np

from diwa.data.store import Episode
from diwa.presets import PRESETS

TASK, LIMIT = "move_slider_left", 16
TINY = PRESETS["tiny"]
CONFIG = dataclasses.replace(
    TINY,
    task=TASK,
    threads=1,
    world_model=dataclasses.replace(
        TINY.world_model,
        deter_dim=24,
        stoch_groups=4,
        stoch_classes=4,
        hidden_dim=24,
        embed_dim=16,
        mlp_dim=24,
        steps=45,
        batch_size=4,
        seq_len=10,
        open_loop_steps=8,
    ),
    policy=dataclasses.replace(TINY.policy, width=24),
    pretrain=dataclasses.replace(TINY.pretrain, steps=45, batch_size=32, feature_samples=2),
    reward=dataclasses.replace(TINY.reward, steps=100, width=24, batch_size=24, lr=1e-3),
    finetune=dataclasses.replace(
        TINY.finetune, n_dreams=6, n_chunks=5, max_episode_steps=LIMIT, bc_states=8, imagined_eval=6
    ),
)


def slider_episode(length: int, rng: np.random.Generator, drift: float, task: str = "") -> Episode:
    """The slider follows the x push; it can travel from 0 to 0.28 m."""
    action = np.zeros((length, 7), np.float32)
    action[:, 0] = np.clip(drift + 0.5 * rng.standard_normal(length), -1, 1)
    action[:, 1] = np.arange(length) / 100  # tells the steps of an episode apart
    action[:, 6] = 1
    robot, scene = np.zeros((length + 1, 15), np.float32), np.zeros((length + 1, 24), np.float32)
    x = 0.0
    for t in range(length + 1):
        robot[t, 0], scene[t, 0] = x, x
        if t < length:
            x = float(np.clip(x + 0.04 * action[t, 0], 0, 0.28))
    return Episode(robot, scene, action, scene[:, 0] > 0.15, task)


def play(count: int = 12, seed: int = 0) -> list[Episode]:
    rng = np.random.default_rng(seed)
    return [slider_episode(40, rng, (-0.4, 0.4)[i % 2]) for i in range(count)]
