"""Building, saving and loading the models of a run; the agent that acts in a simulator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diwa import checkpoint
from diwa.config import Config, PolicyConfig, RewardConfig, WorldModelConfig, from_dict, to_dict
from diwa.errors import CheckpointError, RunError
from diwa.nn.diffusion import DiffusionPolicy
from diwa.nn.gaussian import GaussianPolicy
from diwa.nn.heads import RewardClassifier
from diwa.nn.rssm import RSSMState
from diwa.nn.world_model import WorldModel

Policy = DiffusionPolicy | GaussianPolicy


def _read_meta(folder: Path, kind: str) -> dict[str, Any]:
    """What a model folder says of itself.

    Raises:
        CheckpointError: it is missing, or holds another kind of model.
    """
    if not (folder / "config.json").exists():
        command = f"diwa {folder.name.replace('_', '-')} --run-dir {folder.parent}"
        raise CheckpointError(f"there is no {kind} in {folder}; run `{command}` first")
    meta = checkpoint.read_meta(folder)
    if meta.get("kind") != kind:
        raise CheckpointError(f"{folder} holds a {meta.get('kind', 'foreign')} model, not a {kind}")
    return meta


def source_folder(config: Config, run_path: Path) -> Path:
    """Folder whose play and world model this run uses: `from_run` or the run itself."""
    return Path(config.from_run) if config.from_run else run_path


def world_model_folder(config: Config, run_path: Path) -> Path:
    """Folder of the world model that this run uses."""
    return source_folder(config, run_path) / "world_model"


def check_source(config: Config) -> None:
    """A lent world model must see what this run's demonstrations and starts are recorded with.

    Raises:
        RunError: it sees something else; the message names the settings that fit it.
    """
    folder = Path(config.from_run or "") / "world_model"
    if not config.from_run or not (folder / "config.json").exists():
        return
    lent = from_dict(WorldModelConfig, _read_meta(folder, "world_model")["config"])
    own = config.world_model
    if (lent.observation, lent.picture_size) != (own.observation, own.picture_size):
        size = f" --world-model.image-size {lent.image_size}" if lent.picture_size else ""
        raise RunError(
            f"the world model of {config.from_run} was trained with other observations; "
            f"add --observation {lent.observation}{size}"
        )


def save_world_model(folder: Path, model: WorldModel) -> None:
    """Write weights and architecture."""
    checkpoint.save_model(folder, model, {"kind": "world_model", "config": to_dict(model.config)})


def load_world_model(folder: Path, device: str = "cpu") -> WorldModel:
    """Frozen world model of a folder written by `save_world_model`."""
    meta = _read_meta(folder, "world_model")
    model = WorldModel(from_dict(WorldModelConfig, meta["config"]))
    checkpoint.load_state(folder, model)
    return model.to(device).requires_grad_(False).eval()


def make_policy(cond_dim: int, config: PolicyConfig) -> Policy:
    """A new policy of the configured kind for features of size `cond_dim`."""
    if config.kind == "gaussian":
        return GaussianPolicy(cond_dim, config)
    return DiffusionPolicy(cond_dim, config)


def save_policy(folder: Path, policy: Policy, ft_steps: int = 0) -> None:
    """Write a policy; `ft_steps` > 0 marks one whose last steps were fine-tuned."""
    meta = {
        "kind": "policy",
        "config": to_dict(policy.config),
        "cond_dim": policy.cond_dim,
        "ft_steps": ft_steps,
    }
    checkpoint.save_model(folder, policy, meta)


def load_policy(folder: Path, device: str = "cpu") -> tuple[Policy, int]:
    """Frozen policy of a folder and its number of fine-tuned steps."""
    meta = _read_meta(folder, "policy")
    policy = make_policy(meta["cond_dim"], from_dict(PolicyConfig, meta["config"]))
    checkpoint.load_state(folder, policy)
    return policy.to(device).requires_grad_(False).eval(), meta["ft_steps"]


def save_classifier(folder: Path, model: RewardClassifier, meta: dict[str, Any]) -> None:
    """Write a success classifier with its `RewardConfig` and task in `meta`."""
    checkpoint.save_model(folder, model, {"kind": "reward", **meta})


def load_classifier(folder: Path, device: str = "cpu") -> tuple[RewardClassifier, RewardConfig]:
    """Frozen success classifier of a folder and its configuration."""
    meta = _read_meta(folder, "reward")
    config = from_dict(RewardConfig, meta["config"])
    model = RewardClassifier(meta["feature_dim"], config.width)
    checkpoint.load_state(folder, model)
    return model.to(device).requires_grad_(False).eval(), config


def env_action(chunk: Tensor) -> Tensor:
    """Actions as the simulator takes them: motion clipped to [-1, 1], gripper exactly -1 or +1."""
    gripper = torch.where(chunk[..., 6:] >= 0, 1.0, -1.0)
    return torch.cat([chunk[..., :6].clamp(-1, 1), gripper], dim=-1)


class Agent:
    """World-model filter plus policy, as evaluated in a simulator.

    The policy is sampled in evaluation mode: the first K - Kf denoising steps by the frozen base
    policy, the rest by the fine-tuned one (all by `policy` when there is no base).

    Args:
        world_model: frozen world model.
        policy: the policy.
        base: frozen base of a fine-tuned policy.
        ft_steps: Kf.
    """

    def __init__(
        self,
        world_model: WorldModel,
        policy: Policy,
        base: Policy | None = None,
        ft_steps: int = 0,
    ) -> None:
        self.world_model, self.policy, self.base, self.ft_steps = (
            world_model,
            policy,
            base,
            ft_steps,
        )

    @torch.no_grad()
    def act(self, state: RSSMState, noise: Tensor) -> Tensor:
        """Action chunks `[N, L, 7]` ready for the simulator, noise `[K + 1, N, L, A]`."""
        base: Any = self.base  # of the policy's kind
        chain = self.policy.sample(state.feature, noise, base=base, ft_steps=self.ft_steps)
        return env_action(chain.chunk)
