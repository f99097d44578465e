"""Dreamed pictures of held-out play beside the real ones: PSNR and SSIM over the horizon."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from diwa.data.sampler import previous_actions
from diwa.data.store import Episode
from diwa.nn.encoders import to_tensor
from diwa.nn.world_model import WorldModel
from diwa.phases.open_loop import draw_places, dream_on
from diwa.picture_metrics import psnr, squared_error, ssim

CONTEXT, WINDOWS, FILMS = 2, 32, 4


def picture_report(
    model: WorldModel, episodes: list[Episode], horizon: int, seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Dream `horizon` frames from two frames of context and the actions (paper, section 7.5).

    Returns:
        report: camera -> `psnr` (dB, of the mean squared error over windows) and `ssim` (mean),
            each a list over steps for the `model` and for `copy`, the last frame that was seen.
            Empty for a model without cameras.
        films: uint8 arrays `real_CAMERA`, `dream_CAMERA` `[n, T, h, w, 3]` of the windows in which
            most moves; empty likewise.
    """
    places = draw_places(episodes, CONTEXT + horizon, WINDOWS, seed)
    if not model.cameras or not places:
        return {}, {}
    device = model.codec.mean.device
    cuts = [(episodes[i], slice(t, t + CONTEXT + horizon)) for i, t in places]
    robot = torch.stack([to_tensor(e.robot_obs[s], device) for e, s in cuts], dim=1)
    led = [to_tensor(previous_actions(e.action)[s], device) for e, s in cuts]
    real = {
        camera: torch.from_numpy(np.stack([e.frames[camera][s] for e, s in cuts], axis=1))
        for camera in model.cameras
    }
    context = {camera: frames[:CONTEXT].to(device) for camera, frames in real.items()}
    seen = model.observation(robot[:CONTEXT], **context)
    generator = torch.Generator(device).manual_seed(seed)
    feature = dream_on(model, seen, torch.stack(led, dim=1), generator)
    dreamed = {camera: frames.cpu() for camera, frames in model.decode_frames(feature).items()}
    report: dict[str, Any] = {"context": CONTEXT, "windows": len(places), "cameras": {}}
    moved = torch.zeros(len(places))
    for camera, frames in real.items():
        guesses = {
            "model": dreamed[camera],
            "copy": frames[CONTEXT - 1].expand_as(frames[CONTEXT:]),
        }
        report["cameras"][camera] = _scores(frames[CONTEXT:], guesses)
        moved += squared_error(guesses["copy"], frames[CONTEXT:]).mean(0)
    chosen = moved.argsort(descending=True)[:FILMS]
    films = {}
    for camera, frames in real.items():
        films[f"real_{camera}"] = frames[CONTEXT:, chosen].transpose(0, 1).numpy()
        films[f"dream_{camera}"] = dreamed[camera][:, chosen].transpose(0, 1).numpy()
    return report, films


def _scores(real: Tensor, guesses: dict[str, Tensor]) -> dict[str, dict[str, list[float]]]:
    """PSNR and SSIM per step of guesses `[T, n, h, w, 3]` at reality."""
    # The error is averaged before the logarithm: where nothing moves, a copy is perfect.
    return {
        "psnr": {k: psnr(squared_error(g, real).mean(1)).tolist() for k, g in guesses.items()},
        "ssim": {k: ssim(g, real).mean(1).tolist() for k, g in guesses.items()},
    }
