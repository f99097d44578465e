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


def _windows(episodes: list[Episode], length: int, seed: int) -> list[tuple[int, int]]:
    """(episode, first frame) of up to WINDOWS windows of `length` frames, spread at random."""
    places = [
        (i, t) for i, e in enumerate(episodes) for t in range(0, len(e) + 2 - length, length // 2)
    ]
    order = np.random.default_rng(seed).permutation(len(places))[:WINDOWS]
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
    places = _windows(episodes, CONTEXT + horizon, seed)
    if not places:
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
    predicted = _predict(model, state, action, seed)
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
def _predict(model: WorldModel, state: Tensor, action: Tensor, seed: int) -> Tensor:
    """Standardised predictions `[T, n, O]` after CONTEXT observed frames."""
    device, n = state.device, state.shape[1]
    generator = torch.Generator(device).manual_seed(seed)
    reset = torch.zeros(CONTEXT, n, device=device)
    reset[0] = 1.0
    post = model.rssm.observe(
        model.encoder({"state": state[:CONTEXT]}),
        action[:CONTEXT],
        reset,
        model.rssm.initial(n),
        model.uniform(CONTEXT, n, generator=generator),
    )
    horizon = len(state) - CONTEXT
    features = model.open_loop(
        RSSMState(post.h[-1], post.z[-1]),
        action[CONTEXT:],
        model.uniform(horizon, n, generator=generator),
    )
    return model.decoder(features)["state"]
