"""RSSM: method section 1.3 stated as plain loops, sampling frequencies, gradients, KL."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diwa.nn.rssm import RSSM, RSSMState
from diwa.ops import balanced_kl, onehot_st

A, E, H, S, C, WIDTH = 7, 5, 12, 3, 4, 10
Z = S * C


@pytest.fixture
def rssm() -> RSSM:
    torch.manual_seed(0)
    model = RSSM(A, E, H, S, C, WIDTH)
    with torch.no_grad():  # biases and norms that are not trivial
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def norm_elu(x, norm: nn.LayerNorm):
    """ELU(LN(x)), written out; eps 1e-3 and the biased variance."""
    centred = x - x.mean()
    y = centred / (centred.square().mean() + 1e-3).sqrt() * norm.weight + norm.bias
    return torch.where(y > 0, y, y.exp() - 1)


def draw(logits, uniform):
    """One-hot of the first class whose cumulative probability exceeds the uniform."""
    out = torch.zeros(S, C)
    for s in range(S):
        total = 0.0
        for k, p in enumerate(logits.view(S, C)[s].softmax(-1).tolist()):
            total += p
            if uniform[s].item() < total or k == C - 1:
                out[s, k] = 1.0
                break
    return out.flatten()


def plain_step(m: RSSM, h, z, action, reset, embed, uniform):
    """Section 1.3 for one stream; `embed` None is a prior step. Returns h, z, logits."""
    h, z = (1 - reset) * h, (1 - reset) * z
    x = m.cell_z.weight @ z + m.cell_z.bias + m.cell_a.weight @ action
    cell = nn.GRUCell(WIDTH, H)
    cell.load_state_dict(m.gru.state_dict())
    h = cell(norm_elu(x, m.cell_norm)[None], h[None])[0]
    if embed is None:
        y = norm_elu(m.prior_h.weight @ h + m.prior_h.bias, m.prior_norm)
        logits = m.prior_out.weight @ y + m.prior_out.bias
    else:
        y = m.post_h.weight @ h + m.post_h.bias + m.post_e.weight @ embed
        logits = m.post_out.weight @ norm_elu(y, m.post_norm) + m.post_out.bias
    return h, draw(logits, uniform), logits


def random_state(n: int) -> RSSMState:
    index = torch.randint(C, (n, S))
    return RSSMState(torch.randn(n, H), F.one_hot(index, C).float().flatten(1))


@torch.no_grad()
def test_observe_is_the_plain_loop(rssm):
    torch.manual_seed(1)
    time, streams = 6, 4
    embed, action = torch.randn(time, streams, E), torch.randn(time, streams, A)
    reset = (torch.rand(time, streams) < 0.3).float()
    assert 0 < reset.sum() < reset.numel()
    uniform, state = torch.rand(time, streams, S), random_state(streams)
    post = rssm.observe(embed, action, reset, state, uniform)
    for b in range(streams):
        h, z = state.h[b], state.z[b]
        for t in range(time):
            h, z, logits = plain_step(
                rssm, h, z, action[t, b], reset[t, b], embed[t, b], uniform[t, b]
            )
            # float32 sums of tens of terms in another order
            torch.testing.assert_close(post.h[t, b], h, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(post.logits[t, b].flatten(), logits, atol=5e-5, rtol=1e-4)
            assert torch.equal(post.z[t, b], z)


@torch.no_grad()
def test_imagine_is_the_plain_prior_step(rssm):
    torch.manual_seed(2)
    state, action, uniform = random_state(5), torch.randn(5, A), torch.rand(5, S)
    following = rssm.imagine(state, action, uniform)
    for n in range(5):
        h, z, logits = plain_step(
            rssm, state.h[n], state.z[n], action[n], torch.zeros(()), None, uniform[n]
        )
        torch.testing.assert_close(following.h[n], h, atol=2e-5, rtol=1e-4)
        assert torch.equal(following.z[n], z)
        torch.testing.assert_close(
            rssm.prior_logits(following.h)[n].flatten(), logits, atol=5e-5, rtol=1e-4
        )
    assert torch.equal(following.feature, torch.cat([following.h, following.z], -1))


@torch.no_grad()
def test_reset_forgets_the_state_but_not_the_action(rssm):
    torch.manual_seed(3)
    embed, uniform = torch.randn(1, 2, E), torch.rand(1, 1, S).expand(1, 2, S)
    embed[:, 1] = embed[:, 0]
    action = torch.randn(1, 1, A).expand(1, 2, A)
    one = torch.ones(1, 2)
    post = rssm.observe(embed, action, one, random_state(2), uniform)
    # rows of a batch may take another vector path, so they agree to rounding only
    torch.testing.assert_close(post.h[0, 0], post.h[0, 1], atol=1e-6, rtol=0)
    zero = rssm.observe(embed, action, 0 * one, rssm.initial(2), uniform)
    assert torch.equal(post.h, zero.h) and torch.equal(post.z, zero.z)
    other = rssm.observe(embed, -action, one, rssm.initial(2), uniform)
    assert not torch.allclose(post.h, other.h)
    kept = rssm.observe(embed, action, 0 * one, random_state(2), uniform)
    assert not torch.allclose(post.h, kept.h)


def test_sampled_frequencies_are_the_probabilities():
    torch.manual_seed(4)
    logits = torch.tensor([[2.0, 0.0, -1.0, 0.5], [0.0, -30.0, 0.0, 1.0]])
    n = 40_000
    z = onehot_st(logits.expand(n, 2, 4), torch.rand(n, 2)).unflatten(-1, (2, 4))
    assert torch.equal(z.sum(-1), torch.ones(n, 2)) and set(z.unique().tolist()) == {0.0, 1.0}
    probs = logits.softmax(-1)
    # five deviations of a binomial frequency
    bound = 5 * (probs * (1 - probs) / n).sqrt() + 1e-9
    assert ((z.mean(0) - probs).abs() <= bound).all()
    assert z[:, 1, 1].sum() == 0  # probability 1e-13
    mixed = onehot_st(logits.expand(n, 2, 4), torch.rand(n, 2), unimix=0.4)
    expected = 0.6 * probs + 0.1
    deviation = (mixed.unflatten(-1, (2, 4)).mean(0) - expected).abs()
    assert (deviation <= 5 * (expected * (1 - expected) / n).sqrt()).all()


def test_inverse_cdf_at_its_edges():
    logits = torch.tensor([0.7, 0.2, 0.1]).log().expand(5, 1, 3)
    uniform = torch.tensor([0.0, 0.69, 0.71, 0.91, 1 - 2**-24])[:, None]
    assert onehot_st(logits, uniform).argmax(-1).tolist() == [0, 0, 1, 2, 2]
    impossible = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    assert onehot_st(impossible, torch.zeros(1)).tolist() == [0.0, 1.0, 0.0]
    assert onehot_st(impossible, torch.tensor([1 - 2**-24])).argmax() == 1


def test_straight_through_gradient_is_the_softmax_gradient():
    torch.manual_seed(5)
    logits = torch.randn(6, S, C, requires_grad=True)
    weight = torch.randn(6, Z)
    (onehot_st(logits, torch.rand(6, S)) * weight).sum().backward()
    same = logits.detach().clone().requires_grad_(True)
    (same.softmax(-1).flatten(-2) * weight).sum().backward()
    torch.testing.assert_close(logits.grad, same.grad)
    assert logits.grad.abs().max() > 0.01


def test_kl_of_the_test_vector_and_its_balance():
    q = torch.tensor([[0.7, 0.2, 0.1]]).log().requires_grad_(True)
    p = torch.tensor([[0.5, 0.3, 0.2]]).log().requires_grad_(True)
    loss, value = balanced_kl(q, p, 0.8)
    assert value.item() == pytest.approx(0.0851228259, rel=1e-5)
    assert loss.item() == pytest.approx(0.0851228259, rel=1e-5)
    loss.backward()
    reference = torch.distributions.kl_divergence
    categorical = torch.distributions.Categorical
    q2, p2 = (v.detach().clone().requires_grad_(True) for v in (q, p))
    reference(categorical(logits=q2), categorical(logits=p2)).sum().backward()
    torch.testing.assert_close(p.grad, 0.8 * p2.grad)
    torch.testing.assert_close(q.grad, 0.2 * q2.grad)


def test_kl_is_summed_over_groups():
    torch.manual_seed(6)
    q, p = torch.randn(5, 2, S, C), torch.randn(5, 2, S, C)
    categorical = torch.distributions.Categorical
    each = torch.distributions.kl_divergence(categorical(logits=q), categorical(logits=p))
    torch.testing.assert_close(balanced_kl(q, p, 0.5)[1], each.sum(-1))


def test_size_and_initialisation_at_paper_size():
    """12,915,920 = 43,048,342 of section 11.8 less CNNs, fuse layer, decoders and initial state."""
    cnns, fuse, decoders, initial = 2 * 1_551_312, 4_723_200, 2 * 11_152_275, 2 * 1024
    model = RSSM(7, 1554)
    count = sum(p.numel() for p in model.parameters())
    assert count == 43_048_342 - cnns - fuse - decoders - initial
    assert model.feature_dim == 2048
    gates = model.gru.weight_hh.detach()
    torch.testing.assert_close(gates.T @ gates, torch.eye(1024), atol=1e-4, rtol=0)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or ".bias_" in name:
            assert not parameter.any(), name


def test_deter_and_stoch_sizes_may_differ():
    model = RSSM(A, E, 9, 2, 5, WIDTH)
    state = model.imagine(model.initial(3), torch.zeros(3, A), torch.rand(3, 2))
    assert state.feature.shape == (3, 19) and model.feature_dim == 19
