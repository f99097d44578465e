"""Open-loop prediction error of a world model on held-out play, per observed quantity."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from diwa.config import WorldModelConfig
from diwa.data.sampler import previous_actions
from diwa.data.store import Episode
from diwa.nn.encoders import to_tensor
from diwa.nn.rssm import RSSMState
from diwa.nn.world_model import WorldModel

CONTEXT, WINDOWS = 10, 64


def draw_places(
    episodes: list[Episode], length: int, count: int, seed: int
) -> list[tuple[int, int]]:
    """(episode, first frame) of up to `count` windows of `length` frames, spread at random."""
    places = [
        (i, t) for i, e in enumerate(episodes) for t in range(0, len(e) + 2 - length, length // 2)
    ]
    order = np.random.default_rng(seed).permutation(len(places))[:count]
    return [places[k] for k in sorted(order)]


def open_loop_report(
    model: WorldModel, episodes: list[Episode], config: WorldModelConfig, seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Predict `open_loop_steps` frames from ten frames of context, without looking.

    Returns:
        report: quantity -> {unit, model, constant}, mean absolute error (Euclidean norm over the
            components of positions) per step for the model and for "nothing changes".
        dream: arrays `real`, `dream` `[n, T, O]` in physical units (codec layout) and `names`.
    """
    horizon = config.open_loop_steps
    places = draw_places(episodes, CONTEXT + horizon, WINDOWS, seed)
    if not places or not model.predicts_state:
        return {}, {"real": np.zeros((0, 0, 0)), "dream": np.zeros((0, 0, 0)), "names": []}
    device = model.codec.mean.device
    columns: dict[str, list[Tensor]] = {"robot": [], "scene": [], "action": []}
    for i, t in places:
        frames = slice(t, t + CONTEXT + horizon)
        columns["robot"].append(to_tensor(episodes[i].robot_obs[frames], device))
        columns["scene"].append(to_tensor(episodes[i].scene_obs[frames], device))
        columns["action"].append(to_tensor(previous_actions(episodes[i].action)[frames], device))
    robot, scene, action = (torch.stack(columns[k], dim=1) for k in ("robot", "scene", "action"))
    state = model.codec(robot, scene)
    seen = {"state": state[:CONTEXT]}
    for camera in model.cameras:
        pictures = [episodes[i].frames[camera][t : t + CONTEXT] for i, t in places]
        seen[camera] = torch.from_numpy(np.stack(pictures, axis=1)).to(device)
    predicted = _predict(model, seen, action, seed)
    std, mean = model.codec.std, model.codec.mean
    real, dream = (v * std + mean for v in (state[CONTEXT:], predicted))
    constant = (state[CONTEXT - 1] * std + mean).expand_as(real)
    report = {}
    for name, (cols, unit) in model.codec.quantities().items():
        errors = [(guess - real)[..., cols].norm(dim=-1).mean(1) for guess in (dream, constant)]
        report[name] = {"unit": unit, "model": errors[0].tolist(), "constant": errors[1].tolist()}
    arrays = {
        "real": real.transpose(0, 1).cpu().numpy(),
        "dream": dream.transpose(0, 1).cpu().numpy(),
        "names": model.codec.column_names(),
    }
    return report, arrays


@torch.no_grad()
def _predict(model: WorldModel, seen: dict[str, Tensor], action: Tensor, seed: int) -> Tensor:
    """Standardised predictions `[T, n, O]` after the observed frames."""
    generator = torch.Generator(action.device).manual_seed(seed)
    return model.decoder.state(dream_on(model, seen, action, generator))


@torch.no_grad()
def dream_on(
    model: WorldModel, seen: dict[str, Tensor], action: Tensor, generator: torch.Generator
) -> Tensor:
    """Features `[T - context, n, F]` of what follows some frames of context.

    Args:
        model: the world model.
        seen: observations `[context, n, ...]` of the context, as the encoder takes them.
        action: `[T, n, A]` that led to the frames of the context and to those after it.
        generator: of the samples.
    """
    context, n = seen["state"].shape[:2]
    reset = torch.zeros(context, n, device=action.device)
    reset[0] = 1.0
    post = model.rssm.observe(
        model.encoder(seen),
        action[:context],
        reset,
        model.rssm.initial(n),
        model.uniform(context, n, generator=generator),
    )
    return model.open_loop(
        RSSMState(post.h[-1], post.z[-1]),
        action[context:],
        model.uniform(len(action) - context, n, generator=generator),
    )
