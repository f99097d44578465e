"""Heads: NT-Xent vector and brute force, parameter counts, training on a separable set."""

import math

import pytest
import torch
import torch.nn.functional as F

from diwa.nn.heads import Critic, RewardClassifier, supervised_nt_xent

VECTORS = torch.tensor([[1.0, 0], [0, 1], [1, 1], [1, -1]])


def brute_force(embedding, label, temperature):
    u = [v / v.norm() for v in embedding]
    rows = []
    for i in range(len(u)):
        s = [float(u[i] @ v) / temperature for v in u]
        denominator = sum(math.exp(s[k]) for k in range(len(u)) if k != i)
        same = [j for j in range(len(u)) if j != i and label[j] == label[i]]
        pairs = [s[j] - math.log(denominator) for j in same]
        rows.append(sum(pairs) / len(pairs) if pairs else 0.0)
    return -sum(rows) / len(rows)


def test_nt_xent_of_the_test_vector():
    loss = supervised_nt_xent(VECTORS, torch.tensor([0, 0, 1, 1]), 0.5)
    assert loss.item() == pytest.approx(1.950183, abs=1e-6)


@pytest.mark.parametrize("labels", [[0, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1]])
def test_nt_xent_is_the_brute_force_sum(labels):
    torch.manual_seed(0)
    embedding, label = torch.randn(6, 3), torch.tensor(labels)
    loss = supervised_nt_xent(embedding, label, 0.7)
    assert loss.item() == pytest.approx(brute_force(embedding, label, 0.7), abs=1e-5)


def test_nt_xent_has_finite_gradients_and_ignores_lengths():
    torch.manual_seed(0)
    embedding = torch.randn(5, 3, requires_grad=True)
    label = torch.tensor([0, 0, 1, 1, 1])
    loss = supervised_nt_xent(embedding, label, 0.5)
    loss.backward()
    assert torch.isfinite(embedding.grad).all() and embedding.grad.any()
    scaled = embedding.detach() * torch.tensor([[1.0], [2], [3], [4], [5]])
    torch.testing.assert_close(supervised_nt_xent(scaled, label, 0.5), loss.detach())


def test_parameter_counts_at_paper_size():
    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert count(RewardClassifier(2048)) == 2_625_794
    assert count(Critic(2048)) == 656_385


def test_critic_is_one_residual_block():
    torch.manual_seed(0)
    critic, feature = Critic(5, 8), torch.randn(4, 3, 5)
    y = critic.first(feature)
    y = y + critic.hidden2(F.mish(critic.hidden1(F.mish(y))))
    assert critic(feature).shape == (4, 3)
    torch.testing.assert_close(critic(feature), critic.out(y).squeeze(-1))


def test_classifier_loss_is_cross_entropy_plus_weighted_contrast():
    torch.manual_seed(0)
    model, feature, label = RewardClassifier(5, 8, 4), torch.randn(6, 5), torch.arange(6) % 2
    cross = F.cross_entropy(model(feature), label)
    contrast = supervised_nt_xent(model.embed(feature), label, 0.5)
    torch.testing.assert_close(
        model.loss(feature, label, contrastive_weight=0.2, temperature=0.5),
        cross + 0.2 * contrast,
    )
    alone = model.loss(feature, label, contrastive_weight=0.0, temperature=0.5)
    torch.testing.assert_close(alone, cross)


def test_classifier_learns_a_separable_set():
    torch.manual_seed(0)
    model, feature = RewardClassifier(6, 32, 8), torch.randn(200, 6)
    label = (feature[:, 0] + feature[:, 1] > 0).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = model.loss(feature, label, contrastive_weight=0.2, temperature=0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    probability = model.success_probability(feature)
    assert ((probability > 0.5) == label.bool()).float().mean() > 0.98
    torch.testing.assert_close(probability, model(feature).softmax(-1)[:, 1])
