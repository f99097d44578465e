"""Phase 3: success classifier on real and imagined latents (method section 4)."""

from __future__ import annotations

import contextlib
import dataclasses
from functools import partial

import numpy as np
import torch
from torch import Tensor

from diwa.agent import load_world_model, save_classifier, source_folder, world_model_folder
from diwa.config import Config, RewardConfig, to_dict
from diwa.data.sampler import split_episodes
from diwa.data.store import EpisodeStore
from diwa.data.windows import Windows, draw_windows, halves
from diwa.envs.dream import ClassifierSuccess, DecoderSuccess, SuccessFunction
from diwa.envs.tasks import RULES
from diwa.errors import StoreError
from diwa.nn.heads import RewardClassifier
from diwa.nn.rssm import RSSMState
from diwa.nn.world_model import WorldModel
from diwa.phases.collect import load_starts
from diwa.run import RunFolder

LOG_EVERY = 50


def window_features(
    model: WorldModel, windows: Windows, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Features `[T, n, F]` of windows: posterior, and the prior rolled out from the first frame.

    Both begin at the zero state, as episodes and dreams do. The imagined ones inherit the labels
    of the real frames.
    """
    device = model.codec.mean.device
    robot, scene, action = (v.to(device) for v in windows[:3])
    length, n = robot.shape[:2]
    reset = torch.zeros(length, n, device=device)
    reset[0] = 1.0
    real = model.encode_episode(
        model.observation(robot, scene, **windows.frames),
        action,
        reset,
        model.uniform(length, n, generator=generator),
    )
    deter = model.rssm.deter_dim
    first = RSSMState(real[0, :, :deter], real[0, :, deter:])
    dreamed = model.open_loop(first, action[1:], model.uniform(length - 1, n, generator=generator))
    return real, torch.cat([real[:1], dreamed])


def precision_recall(predicted: Tensor, label: Tensor) -> dict[str, float]:
    """Frame-wise precision and recall, and episode-wise rates.

    Both arguments are bool `[T, n]`. `episode_false_positive` is the share of failed windows with
    any predicted success; `episode_recall` the share of solved windows that are noticed.
    """
    hit = (predicted & label).sum().item()
    episode_label, episode_predicted = label.any(0), predicted.any(0)
    failures, solved = (~episode_label).sum().item(), episode_label.sum().item()
    return {
        "precision": hit / max(1, predicted.sum().item()),
        "recall": hit / max(1, label.sum().item()),
        "episode_recall": (episode_predicted & episode_label).sum().item() / max(1, solved),
        "episode_false_positive": (episode_predicted & ~episode_label).sum().item()
        / max(1, failures),
        "solved_windows": solved,
        "failed_windows": failures,
    }


@torch.no_grad()
def calibrated_threshold(
    classifier: RewardClassifier, config: RewardConfig, real: Tensor, label: Tensor
) -> float:
    """The threshold, raised until few failed windows count as success.

    Posterior latents, because a dream of a failed window may well end in success.

    Args:
        classifier: judges latents.
        config: its `threshold` is the lowest, `false_positives` the share that is let through.
        real: posterior features `[T, n, F]` of windows that the classifier was not trained on.
        label: `[T, n]` bool, solved.

    Returns:
        A probability in [threshold, 1].
    """
    peaks = classifier.success_probability(real[:, ~label.any(0)]).amax(0).sort().values
    kept_out = len(peaks) - int(config.false_positives * len(peaks))
    return max(config.threshold, peaks[kept_out - 1].item()) if kept_out > 0 else config.threshold


def success_function(config: Config, run: RunFolder, model: WorldModel) -> SuccessFunction:
    """The trained classifier of the run or, for `reward.kind = decoder`, the task's own rule."""
    if config.reward.kind == "decoder":
        return DecoderSuccess(model, config.task)
    from diwa.agent import load_classifier

    classifier, reward = load_classifier(run.dir("reward"), config.device)
    return ClassifierSuccess(classifier, reward.threshold)


def _train(
    config: Config, classifier: RewardClassifier, features: Tensor, labels: Tensor, phase
) -> None:
    c = config.reward
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=c.lr, weight_decay=c.weight_decay)
    generator = torch.Generator(features.device).manual_seed(config.seed)
    groups = [labels.nonzero()[:, 0], (~labels).nonzero()[:, 0]]
    share = (c.batch_size // 3, c.batch_size - c.batch_size // 3)
    for step in range(c.steps):
        picks = [
            g[torch.randint(len(g), (k,), generator=generator, device=g.device)]
            for g, k in zip(groups, share, strict=True)
        ]
        index = torch.cat(picks)
        loss = classifier.loss(
            features[index],
            labels[index].long(),
            contrastive_weight=c.contrastive_weight,
            temperature=c.temperature,
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % LOG_EVERY == 0 or step == c.steps - 1:
            phase.log(step, {"reward/loss": loss.item()})


def train_reward(config: Config, run: RunFolder) -> dict:
    """Train the classifier on labelled windows of play; report both rewards on held-out windows.

    The phase is short and starts over when it was interrupted.
    """
    with run.phase("reward", config.reward.steps, "reward/loss") as phase:
        if phase.result is not None:
            return phase.result
        torch.set_num_threads(config.threads)
        c, device = config.reward, config.device
        model = load_world_model(world_model_folder(config, run.path), device)
        store = EpisodeStore(source_folder(config, run.path) / "collect" / "play")
        episodes = list(store)
        train, held = split_episodes(episodes, config.world_model.holdout)
        starts = load_starts(run.dir("collect") / "starts.npz")["scene_obs"]
        value = starts[:, RULES[config.task].index]
        bounds = (float(value.min()), float(value.max()))
        generator = torch.Generator(device).manual_seed(config.seed)
        draw = partial(
            draw_windows,
            task=config.task,
            start_value=bounds,
            length=config.finetune.max_episode_steps,
            count=c.windows,
            rng=np.random.default_rng(config.seed),
            cameras=model.cameras,
        )
        windows = draw([episodes[i] for i in train])
        real, dreamed = window_features(model, windows, generator)
        features = torch.cat([real, dreamed]).flatten(0, 1)
        labels = windows.label.to(device).repeat(2, 1).flatten()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            classifier = RewardClassifier(model.feature_dim, c.width).to(device)
        _train(config, classifier, features, labels, phase)
        classifier.requires_grad_(False)
        threshold, report = c.threshold, {}
        with contextlib.suppress(StoreError):  # little play may leave nothing to report on
            tuning, test = halves(draw([episodes[i] for i in held], need_both=False))
            known = window_features(model, tuning, generator)[0]
            threshold = calibrated_threshold(classifier, c, known, tuning.label.to(device))
            report = reward_report(config, model, ClassifierSuccess(classifier, threshold), test)
        used = dataclasses.replace(c, threshold=threshold)
        meta = {"config": to_dict(used), "task": config.task, "feature_dim": model.feature_dim}
        save_classifier(phase.dir, classifier, meta)
        result = {"windows": windows.label.shape[1], "threshold": threshold}
        return phase.finish({**result, **report})


@torch.no_grad()
def reward_report(
    config: Config, model: WorldModel, classifier: SuccessFunction, windows: Windows
) -> dict:
    """Precision and recall of classifier and decoder rewards on real and imagined latents."""
    device = config.device
    generator = torch.Generator(device).manual_seed(config.seed + 1)
    real, dreamed = window_features(model, windows, generator)
    scene_start = windows.scene[0].to(device)
    judges = {"classifier": classifier}
    if model.predicts_state:
        judges["decoder"] = DecoderSuccess(model, config.task)
    return {
        name: {
            kind: precision_recall(judge(features, scene_start).cpu(), windows.label)
            for kind, features in (("real", real), ("imagined", dreamed))
        }
        for name, judge in judges.items()
    }
