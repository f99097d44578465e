"""Every hyper-parameter of diwa as frozen dataclasses; `diwa.presets` has sets of their values.

Letters are those of `diwa.__doc__`. Defaults are the `small` preset (state observations, two CPU
cores); the numbers of the paper are in `diwa.presets.PRESETS["paper"]`.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from diwa.skills import TaskName


@dataclass(frozen=True)
class CollectConfig:
    """Play and demonstrations, collected by scripted experts in the simulator."""

    play_transitions: int = 40_000
    """Transitions of task-agnostic play (contains misses and half-finished attempts)."""
    demos: int = 0
    """Successful expert episodes that the policy is pre-trained on; 0 takes the skill's own number
    (`diwa.skills`), chosen so that imitation alone succeeds in 30 to 75 % of episodes."""
    focus: bool = True
    """Play with the fixture of the skill only, which makes its world model cheaper; off, play
    covers all fixtures and the world model serves every skill (`--from-run`)."""
    train_starts: int = 200
    """Start observations that dreams begin from; encoded once, never stepped."""
    workers: int = 2
    """Simulator processes."""
    seed_offset: int = 0
    """Added to the run's seed, to draw other play with the same training seeds."""


@dataclass(frozen=True)
class WorldModelConfig:
    """RSSM world model (method section 1)."""

    observation: Literal["state", "vision", "hybrid"] = "state"
    """What the robot sees; `--observation` for short. `state`: robot and scene state. `vision`: the
    pictures of two cameras and the robot's own state. `hybrid`: sees what `vision` sees and learns
    to predict the scene state as well, from which the reward follows (`reward.kind` `decoder`)."""
    image_size: Literal[64, 224] = 64
    """Edge of the pictures in pixels."""
    cnn_depth: int = 8
    """Channels of the first convolution (48 in the paper; 12 there for 224 pixels)."""
    image_weight: float = 0.1
    """Weight of the squared error of the pictures, summed over pixels (1 in the paper)."""
    image_stride: int = 8
    """Pictures of every so many frames are reconstructed in training; all are encoded."""
    deter_dim: int = 256
    """H, size of the deterministic state h."""
    stoch_groups: int = 16
    """S, groups of the categorical state z."""
    stoch_classes: int = 16
    """C, classes of each group."""
    hidden_dim: int = 256
    """Width of the layers inside the RSSM."""
    embed_dim: int = 256
    """E, size of the embedding of a state observation; that of pictures follows from the CNN."""
    mlp_dim: int = 256
    """Width of the state encoder and decoder, and of the hybrid's state decoder."""
    observe_blocks: bool = False
    """Observe and predict the poses of the three blocks as well."""
    init_from: str | None = None
    """Folder of another run whose world model, of the same architecture, training starts from."""
    steps: int = 3000
    """Gradient steps."""
    frozen_encoder_steps: int = 0
    """How many of the last steps leave the CNN as it is: all frames are embedded once, in memory,
    which makes such a step several times cheaper."""
    batch_size: int = 16
    """Parallel streams B."""
    seq_len: int = 40
    """Frames per stream and gradient step, T."""
    lr: float = 1e-3
    """AdamW learning rate, after warm-up and before the final decay."""
    lr_final_fraction: float = 0.05
    """Learning rate at the end of the cosine decay, as a fraction of `lr` (1 = constant)."""
    warmup_steps: int = 100
    """Linear warm-up of the learning rate."""
    weight_decay: float = 0.01
    """AdamW weight decay."""
    eps: float = 1e-5
    """AdamW epsilon."""
    grad_clip: float = 100.0
    """Largest norm of the (unscaled) gradient."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What matrix products multiply in training; sums, norms, samples, losses and the weights that
    the optimizer keeps are float32. On a GPU float32 products are TF32."""
    kl_weight: float = 0.3
    """Weight of the balanced KL."""
    kl_balance: float = 0.8
    """Share of the KL that trains the prior."""
    state_weight: float = 50.0
    """Weight of the squared error of the standardised state."""
    detail_weight: float = 4.0
    """Further weight of tool position and fixtures, which decide success; 1 treats all alike."""
    unimix: float = 0.0
    """Share of the uniform distribution in every sampled categorical (0 in the paper)."""
    reset_prob: float = 0.01
    """Probability that a frame starts from the zero state, as every episode and dream does."""
    holdout: float = 0.05
    """Share of the play episodes kept for the open-loop report."""
    open_loop_steps: int = 40
    """Horizon of the open-loop prediction error."""
    open_loop_pictures: int = 80
    """Horizon of the dreamed pictures that are compared with real ones."""

    @property
    def picture_size(self) -> int:
        """Edge of the observed pictures in pixels; 0 for state observations."""
        return 0 if self.observation == "state" else self.image_size


@dataclass(frozen=True)
class PolicyConfig:
    """Policy over action chunks (method section 3)."""

    kind: Literal["diffusion", "gaussian"] = "diffusion"
    """Diffusion policy, or the paper's ablation: a Gaussian with the same layers, whose one step is
    all that is fine-tuned."""
    chunk: int = 4
    """L, actions per chunk."""
    denoising_steps: int = 20
    """K."""
    width: int = 256
    """Width of the denoising network."""
    network: Literal["residual", "plain"] = "residual"
    """Pre-activation residual blocks of two hidden layers, or a plain MLP (DPPO's)."""
    hidden_layers: int = 2
    """Hidden layers after the first; even in a residual network."""
    ddim_steps: int = 0
    """Sample with DDIM in so many of the K steps, evenly spaced; 0: DDPM, all K steps."""
    ddim_eta: float = 1.0
    """Noise of exploratory DDIM sampling, in shares of DDPM's; its evaluation adds none."""
    time_dim: int = 16
    """Size of the sinusoidal embedding of the denoising step."""
    clip_noise: float = 3.0
    """Noise of the sampler is clipped to plus or minus this many deviations."""
    min_sampling_std: float = 0.1
    """Smallest deviation of exploratory sampling."""
    min_logprob_std: float = 0.1
    """Smallest deviation in log-probabilities."""


@dataclass(frozen=True)
class PretrainConfig:
    """Behaviour cloning of the diffusion policy on latent features (method section 3.4)."""

    steps: int = 2000
    """Gradient steps."""
    batch_size: int = 256
    lr: float = 1e-3
    """AdamW learning rate after warm-up."""
    lr_min: float = 1e-5
    warmup_steps: int = 100
    weight_decay: float = 1e-6
    ema_decay: float = 0.995
    """Decay of the moving average of the weights; the average is what is used."""
    feature_samples: int = 4
    """Posterior samples of each demonstration that make up the training set."""


@dataclass(frozen=True)
class RewardConfig:
    """Success classifier on latents (method section 4), or the hybrid variant's latent decoder."""

    kind: Literal["classifier", "decoder"] = "decoder"
    """`decoder`: the task's own rule on the decoded scene state, the paper's best variant and the
    more honest one here; `classifier`: the classifier on latents."""
    windows: int = 160
    """Windows of play, half of them solved, that the classifier is trained on."""
    steps: int = 600
    """Gradient steps."""
    batch_size: int = 192
    lr: float = 3e-4
    weight_decay: float = 1e-3
    contrastive_weight: float = 0.2
    """Weight of the supervised NT-Xent term beside the cross-entropy."""
    temperature: float = 0.5
    """Temperature of the contrastive term."""
    width: int = 256
    """Width of the hidden layers."""
    threshold: float = 0.5
    """Probability above which a latent counts as success (0.5 = the paper's argmax)."""
    false_positives: float = 0.02
    """The classifier's threshold is raised until no larger share of failed windows of held-out
    play counts as success anywhere (1 = the threshold stays, as in the paper)."""


@dataclass(frozen=True)
class FinetuneConfig:
    """Offline PPO in imagination (method section 5)."""

    iterations: int = 40
    """Rollout + update rounds."""
    n_dreams: int = 64
    """N, parallel dreams."""
    n_chunks: int = 36
    """Action chunks per dream and iteration."""
    max_episode_steps: int = 72
    """Low-level steps after which a dream is cut (truncated)."""
    ft_denoising_steps: int = 10
    """Kf, the last denoising steps, which are trained."""
    frozen_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Packed weights of the frozen denoising steps of rollouts; the trained steps, whose log-probs
    enter the PPO ratio, are float32. auto: bfloat16 where it is faster (AVX512_BF16, a GPU)."""
    gamma: float = 0.999
    """Discount per chunk."""
    gae_lambda: float = 0.95
    gamma_denoising: float = 0.99
    """Discount over denoising steps."""
    update_epochs: int = 5
    minibatches: int = 4
    """Minibatches per epoch (1 = the paper's full batch)."""
    actor_lr: float = 4e-4
    critic_lr: float = 1e-3
    critic_warmup: int = 2
    """First iterations in which only the critic learns."""
    clip_coef: float = 0.04
    """PPO clip of the last denoising step."""
    clip_coef_base: float = 0.004
    """PPO clip of the noisiest fine-tuned step."""
    clip_coef_rate: float = 3.0
    """Growth of the clip range over the denoising steps."""
    vf_coef: float = 0.5
    target_kl: float = 1.0
    """The epochs of an iteration stop when the approximate KL exceeds this."""
    bc_coef: float = 0.03
    """Weight of the likelihood of the frozen policy's own chains (the paper's answer to model
    exploitation)."""
    bc_states: int = 128
    """States per minibatch on which the behaviour-cloning term is evaluated."""
    reward_gamma: float = 0.99
    """Discount inside the running reward scale."""
    reward_clip: float = 10.0
    per_step_reward: bool = True
    """Classify every latent, as the simulator checks every step, not only the chunk's last."""
    imagined_eval: int = 256
    """Dreamed episodes behind the imagined success before and after."""
    eval_every: int = 20
    """Iterations between evaluations in the simulator (0: only when the phase has ended)."""
    eval_episodes: int = 30
    """Episodes of those evaluations, from starts that are neither training nor test starts."""


@dataclass(frozen=True)
class OnlineConfig:
    """The same PPO in the simulator: the online DPPO baseline of the paper."""

    envs: int = 16
    """Episodes side by side, one process each."""
    n_chunks: int = 36
    """Action chunks per episode slot and iteration."""
    max_env_steps: int = 200_000
    """Simulator steps after which the baseline gives up."""
    target_success: float = 1.0
    """Success on the validation starts at which it stops."""
    eval_every: int = 4
    """Iterations between evaluations, whose steps are not counted (0: only at the end)."""
    eval_episodes: int = 60
    """Episodes of an evaluation, from starts that are neither training nor test starts."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Success in the simulator from fixed held-out starts."""

    episodes: int = 100
    workers: int = 2
    """Simulator processes."""
    max_episode_steps: int = 72
    videos: int = 2
    """Episodes filmed for the report."""


@dataclass(frozen=True)
class Config:
    """One run of the four phases and the evaluation."""

    preset: str = "small"
    """Preset the other values started from: tiny, small, pixels, medium or paper."""
    task: TaskName = "turn_on_led"
    """Skill to improve."""
    env: Literal["playtable", "calvin"] = "playtable"
    """Simulator: the embedded one, or CALVIN from the clone that CALVIN_ENV_ROOT names."""
    seed: int = 0
    """Everything random follows from it."""
    device: str = "cpu"
    """torch device of training and dreams."""
    threads: int = 1
    """torch threads; at these sizes a second one gains nothing on two cores."""
    from_run: str | None = None
    """Another run folder whose play and world model are used instead of making new ones."""
    collect: CollectConfig = field(default_factory=CollectConfig)
    world_model: WorldModelConfig = field(default_factory=WorldModelConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    online: OnlineConfig = field(default_factory=OnlineConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dict of a configuration, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(cls: type, values: dict[str, Any]) -> Any:
    """Rebuild a configuration from `to_dict`'s output.

    Raises:
        ValueError: a key that the dataclass does not have, named with its path.
    """
    hints = typing.get_type_hints(cls)
    unknown = set(values) - set(hints)
    if unknown:
        raise ValueError(f"{cls.__name__} has no field {sorted(unknown)}; known: {sorted(hints)}")
    kwargs = {
        key: from_dict(hints[key], value) if dataclasses.is_dataclass(hints[key]) else value
        for key, value in values.items()
    }
    return cls(**kwargs)
