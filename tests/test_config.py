"""Configuration: JSON round trip, unknown keys, presets, and the numbers of the paper."""

import dataclasses
import json

import pytest

from diwa.config import Config, from_dict, to_dict
from diwa.presets import PRESETS


@pytest.mark.parametrize("name", list(PRESETS))
def test_json_round_trip(name):
    config = PRESETS[name]
    assert from_dict(Config, json.loads(json.dumps(to_dict(config)))) == config
    assert config.preset == name


def test_missing_keys_take_their_defaults():
    assert from_dict(Config, {}) == Config()
    assert from_dict(Config, {"finetune": {"gamma": 0.9}}).finetune.gamma == 0.9


@pytest.mark.parametrize(
    ("values", "named"), [({"tusk": "x"}, "tusk"), ({"finetune": {"gama": 1}}, "gama")]
)
def test_unknown_keys_are_named_with_the_known_ones(values, named):
    with pytest.raises(ValueError, match=rf"{named}.*(task|gamma)"):
        from_dict(Config, values)


def test_presets_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["tiny"].seed = 1
    with pytest.raises(TypeError):
        PRESETS["mine"] = Config()


def test_paper_preset_holds_the_numbers_of_the_paper():
    """Method sections 1.3, 1.6, 1.7, 3.1 to 3.3, 4.1 and 5.2."""
    paper = PRESETS["paper"]
    expected = {
        paper.world_model: dict(
            deter_dim=1024,
            stoch_groups=32,
            stoch_classes=32,
            hidden_dim=1000,
            batch_size=50,
            seq_len=50,
            lr=3e-4,
            lr_final_fraction=1.0,
            weight_decay=0.05,
            eps=1e-5,
            grad_clip=100.0,
            kl_weight=0.3,
            kl_balance=0.8,
            reset_prob=0.01,
            unimix=0.0,
        ),
        paper.policy: dict(
            chunk=4,
            denoising_steps=20,
            width=512,
            time_dim=16,
            clip_noise=3.0,
            min_sampling_std=0.1,
            min_logprob_std=0.1,
        ),
        paper.pretrain: dict(batch_size=256, lr=1e-4, lr_min=1e-5, weight_decay=1e-6),
        paper.reward: dict(width=1024, temperature=0.5, threshold=0.5),
        paper.finetune: dict(
            n_dreams=50,
            n_chunks=36,
            max_episode_steps=72,
            ft_denoising_steps=10,
            gamma=0.999,
            gae_lambda=0.95,
            gamma_denoising=0.99,
            update_epochs=10,
            minibatches=1,
            actor_lr=1e-5,
            critic_lr=1e-3,
            clip_coef=0.01,
            clip_coef_base=0.001,
            clip_coef_rate=3.0,
            vf_coef=0.5,
            target_kl=1.0,
            reward_gamma=0.99,
            per_step_reward=False,
        ),
    }
    for section, values in expected.items():
        for key, value in values.items():
            assert getattr(section, key) == value, key
    assert paper.collect.demos == 50
    f = paper.finetune
    assert f.iterations * f.n_dreams * f.n_chunks * paper.policy.chunk == 5_529_600


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_make_sense(name):
    config = PRESETS[name]
    assert 0 < config.finetune.ft_denoising_steps <= config.policy.denoising_steps
    assert config.finetune.max_episode_steps % config.policy.chunk == 0
    assert config.finetune.n_chunks * config.policy.chunk >= config.finetune.max_episode_steps
    assert config.evaluate.max_episode_steps == config.finetune.max_episode_steps
