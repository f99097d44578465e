"""The presets tiny, small, pixels, medium and paper: complete sets of hyper-parameters."""

from __future__ import annotations

import types

from diwa.config import (
    CollectConfig,
    Config,
    EvaluateConfig,
    FinetuneConfig,
    PolicyConfig,
    PretrainConfig,
    RewardConfig,
    WorldModelConfig,
)

_TINY = Config(
    preset="tiny",
    task="move_slider_right",
    collect=CollectConfig(play_transitions=4000, demos=4, train_starts=32),
    world_model=WorldModelConfig(
        deter_dim=64,
        stoch_groups=8,
        stoch_classes=8,
        hidden_dim=64,
        embed_dim=64,
        mlp_dim=64,
        cnn_depth=4,
        steps=150,
        batch_size=16,
        seq_len=20,
    ),
    policy=PolicyConfig(width=64),
    pretrain=PretrainConfig(steps=200, feature_samples=1),
    reward=RewardConfig(windows=40, steps=150, width=64),
    finetune=FinetuneConfig(
        iterations=3, n_dreams=8, n_chunks=18, update_epochs=2, critic_warmup=1, eval_every=0
    ),
    evaluate=EvaluateConfig(episodes=6, videos=1),
)

_PIXELS = Config(
    preset="pixels",
    task="move_slider_right",
    world_model=WorldModelConfig(
        observation="hybrid",
        # The scene decides success; with the other presets' weights pictures are 85 % of the loss.
        image_weight=0.01,
        state_weight=100.0,
        image_stride=16,
        seq_len=20,
        steps=10_000,
        frozen_encoder_steps=8_000,
    ),
    finetune=FinetuneConfig(eval_every=0),  # an evaluation renders pictures
)

_MEDIUM = Config(
    preset="medium",
    collect=CollectConfig(play_transitions=180_000, focus=False),
    world_model=WorldModelConfig(
        deter_dim=512,
        stoch_groups=32,
        stoch_classes=16,
        hidden_dim=512,
        embed_dim=512,
        mlp_dim=512,
        steps=16_000,
        batch_size=64,
        seq_len=48,
        state_weight=100.0,
        detail_weight=1.0,
    ),
    finetune=FinetuneConfig(
        iterations=50, clip_coef=0.08, clip_coef_base=0.008, update_epochs=3, eval_every=25
    ),
)

_PAPER = Config(
    preset="paper",
    device="cuda",
    collect=CollectConfig(play_transitions=200_000, demos=50, focus=False),
    world_model=WorldModelConfig(
        deter_dim=1024,
        stoch_groups=32,
        stoch_classes=32,
        hidden_dim=1000,
        embed_dim=512,
        mlp_dim=400,
        cnn_depth=48,
        image_weight=1.0,
        image_stride=1,
        steps=200_000,
        batch_size=50,
        seq_len=50,
        lr=3e-4,
        lr_final_fraction=1.0,
        weight_decay=0.05,
        detail_weight=1.0,
    ),
    policy=PolicyConfig(width=512),
    pretrain=PretrainConfig(steps=50_000, lr=1e-4),
    reward=RewardConfig(
        kind="classifier", width=1024, windows=1000, steps=20_000, false_positives=1.0
    ),
    finetune=FinetuneConfig(
        iterations=768,
        n_dreams=50,
        n_chunks=36,
        update_epochs=10,
        minibatches=1,
        actor_lr=1e-5,
        clip_coef=0.01,
        clip_coef_base=0.001,
        bc_coef=0.05,
        per_step_reward=False,
        eval_every=25,
    ),
    evaluate=EvaluateConfig(episodes=100),
)

PRESETS = types.MappingProxyType(
    {
        "tiny": _TINY,
        "small": Config(),
        "pixels": _PIXELS,
        "medium": _MEDIUM,
        "paper": _PAPER,
    }
)
