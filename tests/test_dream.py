"""Dream: success ends an episode, the limit truncates, resets only where masked, determinism."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diwa.config import WorldModelConfig
from diwa.envs.dream import ClassifierSuccess, DecoderSuccess, Dream
from diwa.nn.heads import RewardClassifier
from diwa.nn.rssm import RSSMState
from diwa.nn.world_model import WorldModel
from diwa.ops import onehot_st, use_backend

N, P, L, S, C = 5, 4, 4, 3, 4
CONFIG = WorldModelConfig(
    deter_dim=16, stoch_groups=S, stoch_classes=C, hidden_dim=16, embed_dim=16, mlp_dim=16
)


@pytest.fixture
def model() -> WorldModel:
    torch.manual_seed(0)
    return WorldModel(CONFIG).requires_grad_(False)


def never(feature, scene_start):
    return torch.zeros(feature.shape[:-1], dtype=torch.bool)


def starts():
    torch.manual_seed(1)
    return torch.rand(P, 15), torch.rand(P, 24)


def make(model, success=never, limit=12, **kwargs) -> Dream:
    return Dream(model, success, *starts(), N, limit, **kwargs)


def everyone():
    return torch.ones(N, dtype=torch.bool)


def begin(dream, seed=0):
    g = torch.Generator().manual_seed(seed)
    dream.reset(everyone(), torch.rand(N, generator=g), torch.rand(N, S, generator=g))
    return g


def chunk(g):
    return torch.randn(N, L, 7, generator=g), torch.rand(L, N, S, generator=g)


def test_a_start_is_the_zero_history_posterior(model):
    dream = make(model)
    draw = torch.tensor([0.0, 0.26, 0.51, 0.76, 1 - 2**-24])
    index = torch.tensor([0, 1, 2, 3, 3])
    uniform = torch.rand(N, S)
    dream.reset(everyone(), draw, uniform)
    robot, scene = (x[index] for x in starts())
    neutral = torch.tensor([0, 0, 0, 0, 0, 0, 1.0]).expand(N, 7)
    dirty = RSSMState(torch.randn(N, 16), torch.zeros(N, S * C))
    expected = model.filter(dirty, model.observation(robot, scene), neutral, torch.ones(N), uniform)
    # float32 sums of up to a few hundred terms in another order
    torch.testing.assert_close(dream.state.h, expected.h, atol=1e-6, rtol=1e-5)
    assert torch.equal(dream.state.z, expected.z)
    assert torch.equal(dream.scene_start, scene)


def test_a_chunk_is_its_prior_steps(model):
    dream = make(model)
    g = begin(dream)
    state, (action, uniform) = dream.state, chunk(g)
    feature, terminated, truncated = dream.step(action, uniform)
    for i in range(L):
        state = model.rssm.imagine(state, action[:, i], uniform[i])
    # float32 sums of tens of terms in another order; no uniform is at an edge of a distribution
    torch.testing.assert_close(dream.state.h, state.h, rtol=0, atol=1e-5)
    assert torch.equal(dream.state.z, state.z) and torch.equal(feature, dream.state.feature)
    assert not terminated.any() and not truncated.any()


def test_dreams_on_the_packed_operator_are_those_of_the_eager_path(model):
    """Three chunks from the same start: same classes, unless a uniform is within 1e-5 of an edge
    of its distribution; after such a step a dream may go another way and is left out."""
    native, eager = make(model), make(model)
    g, same = begin(native), torch.ones(N, dtype=torch.bool)
    begin(eager)
    seen = []
    native.success = lambda feature, scene: seen.append(feature) or never(feature, scene)
    for _ in range(3):
        action, uniform = chunk(g)
        state = eager.state
        packed = native.step(action, uniform)
        with use_backend("reference"):
            plain = eager.step(action, uniform)
        for i in range(L):
            state = model.rssm.imagine(state, action[:, i], uniform[i])
            edges = model.rssm.prior_logits(state.h).softmax(-1).cumsum(-1)
            near = ((edges - uniform[i][..., None]).abs() < 1e-5).any(-1).any(-1)
            feature = seen.pop(0)
            equal = (feature[:, 16:] == state.z).all(-1)
            assert (equal | near | ~same).all()
            same &= equal
            # float32 sums of up to a few hundred terms in another order
            torch.testing.assert_close(feature[same, :16], state.h[same], rtol=0, atol=1e-5)
        torch.testing.assert_close(packed[0][same], plain[0][same], rtol=0, atol=1e-5)
    assert same.sum() >= N - 1 and not seen


def test_backend_of_the_environment_chooses_the_path(model, monkeypatch):
    dream = make(model)
    g = begin(dream)
    calls = []
    imagine = dream.frozen.imagine
    monkeypatch.setattr(
        dream.frozen, "imagine", lambda *a, **k: calls.append(1) or imagine(*a, **k)
    )
    with use_backend("reference"):
        dream.step(*chunk(g))
    assert not calls
    dream.step(*chunk(g))
    assert calls


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_classes_are_those_of_the_state(model, backend):
    """Also before the first reset, after one of some dreams, and where logits are not finite."""

    def check(dream):
        z = dream.state.z.unflatten(-1, (S, C))
        finite = z.isfinite().all(-1)
        assert torch.equal(dream.z_idx, z.argmax(-1).where(finite, -1))
        assert z[finite].sum(-1).eq(1).all()
        return finite

    with use_backend(backend):
        dream = make(model)
        assert check(dream).all() and len(dream.state.z.unique(dim=0)) == 1
        g = torch.Generator().manual_seed(0)
        dream.step(*chunk(g))
        assert check(dream).all()
        mask = torch.arange(N) < 2
        dream.reset(mask, torch.rand(N, generator=g), torch.rand(N, S, generator=g))
        dream.step(*chunk(g))
        assert check(dream).all()
        dream.pool_logits[:, 1] = torch.nan
        dream.reset(mask, torch.rand(N, generator=g), torch.rand(N, S, generator=g))
        assert check(dream).sum(-1).tolist() == [S - 1] * 2 + [S] * (N - 2)
        feature = dream.step(*chunk(g))[0]
        assert feature.isnan().any(-1).tolist() == [True] * 2 + [False] * (N - 2)
        dream.clear()
        assert dream.elapsed.eq(0).all() and torch.equal(dream.state.h[3], dream.pool_h[0])


def test_nothing_is_read_on_the_host_between_reset_and_step(model):
    seen = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._local_scalar_dense.default:
                seen.append(func)
            return func(*args, **(kwargs or {}))

    success = ClassifierSuccess(RewardClassifier(model.feature_dim, 8, 8), 0.5)
    for backend in ("auto", "reference"):
        dream = make(model, success)
        with use_backend(backend), Reads():
            dream.clear()
            dream.step(*chunk(begin(dream)))
    assert not seen


def test_truncation_at_the_limit_and_never_with_success(model):
    first_dreams = torch.arange(N) < 2

    def some(feature, scene_start):
        return first_dreams & (dream.elapsed >= 8)

    dream = make(model, some)
    g = begin(dream)
    flags = [dream.step(*chunk(g))[1:] for _ in range(3)]
    assert not any(f.any() for pair in flags[:2] for f in pair)
    terminated, truncated = flags[2]
    assert terminated.tolist() == [True, True, False, False, False]
    assert truncated.tolist() == [False, False, True, True, True]


def test_a_limit_that_is_no_multiple_of_the_chunk(model):
    dream = make(model, limit=10)
    g = begin(dream)
    assert [bool(dream.step(*chunk(g))[2].all()) for _ in range(3)] == [False, False, True]


def test_reset_touches_only_the_masked_dreams(model):
    dream = make(model)
    g = begin(dream)
    dream.step(*chunk(g))
    before, scene = dream.state, dream.scene_start.clone()
    mask = torch.tensor([True, False, True, False, False])
    dream.reset(mask, torch.rand(N, generator=g), torch.rand(N, S, generator=g))
    assert torch.equal(dream.state.h[~mask], before.h[~mask])
    assert torch.equal(dream.state.z[~mask], before.z[~mask])
    assert torch.equal(dream.scene_start[~mask], scene[~mask])
    assert not torch.equal(dream.state.h[mask], before.h[mask])
    assert dream.elapsed.tolist() == [0, 4, 0, 4, 4]
    assert torch.equal(dream.state.h[mask], dream.pool_h[_index(dream, mask)])


def _index(dream, mask):
    rows = [(dream.pool_scene == s).all(-1).nonzero()[0, 0] for s in dream.scene_start[mask]]
    return torch.stack(rows)


def test_truncated_dreams_count_anew_after_their_reset(model):
    dream = make(model, limit=8)
    g = begin(dream)
    dream.step(*chunk(g))
    mask = torch.tensor([True, False, False, False, False])
    dream.reset(mask, torch.rand(N, generator=g), torch.rand(N, S, generator=g))
    assert dream.step(*chunk(g))[2].tolist() == [False, True, True, True, True]


def test_per_step_reward_sees_every_latent(model):
    """A success that only the second latent of the chunk shows."""

    def once():
        calls = []

        def success(feature, scene_start):
            calls.append(1)
            return torch.full((N,), len(calls) == 2)

        return success, calls

    for per_step in (True, False):
        success, calls = once()
        dream = make(model, success, per_step_reward=per_step)
        terminated = dream.step(*chunk(begin(dream)))[1]
        assert terminated.all() == per_step and len(calls) == (L if per_step else 1)


def test_only_the_last_latent_is_judged_without_per_step_reward(model):
    seen = []

    def success(feature, scene_start):
        seen.append(feature)
        return everyone()

    dream = make(model, success, per_step_reward=False)
    feature, terminated, _ = dream.step(*chunk(begin(dream)))
    assert terminated.all() and torch.equal(seen[0], feature)


def test_same_generator_same_dream(model):
    def run(seed):
        dream = make(model)
        g = begin(dream, seed)
        return torch.stack([dream.step(*chunk(g))[0] for _ in range(3)])

    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))


def test_starts_are_drawn_evenly(model):
    dream = make(model)
    n = 400
    g = torch.Generator().manual_seed(0)
    seen = []
    for _ in range(n // N):
        dream.reset(everyone(), torch.rand(N, generator=g), torch.rand(N, S, generator=g))
        seen.append(_index(dream, everyone()))
    counts = torch.bincount(torch.cat(seen), minlength=P)
    assert (counts - n / P).abs().max() < 5 * (n * 0.25 * 0.75) ** 0.5


def test_posterior_of_a_start_is_sampled(model):
    dream = make(model)
    draw, uniform = torch.zeros(N), torch.rand(N, S)
    dream.reset(everyone(), draw, uniform)
    expected = onehot_st(dream.pool_logits[0].expand(N, S, C), uniform)
    assert torch.equal(dream.state.z, expected) and len(expected.unique(dim=0)) > 1


def test_classifier_success_is_its_thresholded_probability():
    torch.manual_seed(0)
    classifier = RewardClassifier(6, 16, 8)
    feature = torch.randn(50, 6)
    probability = classifier(feature).softmax(-1)[:, 1]
    middle = probability.median().item()
    judged = ClassifierSuccess(classifier, middle)(feature, torch.zeros(50, 24))
    assert torch.equal(judged, probability > middle) and 0 < judged.sum() < 50
    argmax = ClassifierSuccess(classifier, 0.5)(feature, torch.zeros(50, 24))
    assert torch.equal(argmax, classifier(feature).argmax(-1).bool())


@pytest.mark.parametrize(
    ("task", "index", "change"),
    [("open_drawer", 1, 0.13), ("move_slider_right", 0, -0.16), ("turn_off_led", 5, -0.7)],
)
def test_decoder_success_is_the_task_rule_on_the_decoded_scene(model, task, index, change):
    judge = DecoderSuccess(model, task)
    feature = torch.randn(N, model.feature_dim)
    scene = model.decode(feature)[1]
    for factor, expected in ((1.0, True), (0.5, False), (-1.0, False)):
        start = scene.clone()
        start[:, index] -= factor * change
        assert judge(feature, start).tolist() == [expected] * N


def test_unknown_task_is_refused(model):
    with pytest.raises(ValueError, match="open_drawer"):
        DecoderSuccess(model, "juggle")


def test_unimix_is_used_in_dreams():
    """With unimix 1 every class of a start is equally likely, whatever the posterior says."""
    torch.manual_seed(0)
    model = WorldModel(dataclasses.replace(CONFIG, unimix=1.0)).requires_grad_(False)
    dream = Dream(model, never, *starts(), 3000, 12)
    dream.reset(torch.ones(3000, dtype=torch.bool), torch.zeros(3000), torch.rand(3000, S))
    frequency = dream.state.z.mean(0).numpy()
    np.testing.assert_allclose(frequency, 1 / C, atol=5 * (0.1875 / 3000) ** 0.5)
