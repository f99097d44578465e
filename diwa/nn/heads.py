"""Heads on features: success classifier, critic, reward from the latent decoder."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from diwa.ops import mish


class RewardClassifier(nn.Module):
    """Success classifier g then c on features (method section 4.1).

    Equivalent to:

    >>> import torch, diwa.nn
    >>> from torch.nn import Linear, ReLU, Sequential
    >>> fused = diwa.nn.RewardClassifier(feature_dim=12, width=16, embed_dim=8)
    >>> plain = Sequential(
    ...     Linear(12, 16), ReLU(), Linear(16, 8), Linear(8, 16), ReLU(), Linear(16, 2)
    ... )
    >>> plain.load_state_dict(dict(zip(plain.state_dict(), fused.state_dict().values())))
    <All keys matched successfully>
    >>> feature = torch.randn(4, 12)
    >>> torch.allclose(fused(feature), plain(feature), atol=1e-6)
    True
    >>> probability = plain(feature).softmax(-1)[:, 1]
    >>> torch.allclose(fused.success_probability(feature), probability, atol=1e-6)
    True

    Args:
        feature_dim: F.
        width: hidden width (1024 in the paper).
        embed_dim: size of the contrastive embedding.
    """

    def __init__(self, feature_dim: int, width: int = 1024, embed_dim: int = 256) -> None:
        super().__init__()
        self.embed = nn.Sequential(
            nn.Linear(feature_dim, width), nn.ReLU(), nn.Linear(width, embed_dim)
        )
        self.classify = nn.Sequential(nn.Linear(embed_dim, width), nn.ReLU(), nn.Linear(width, 2))

    def forward(self, feature: Tensor) -> Tensor:
        """Logits `[..., 2]` of features `[..., F]`."""
        return self.classify(self.embed(feature))

    def success_probability(self, feature: Tensor) -> Tensor:
        """Probability of success `[...]` in [0, 1]."""
        return self(feature).softmax(-1)[..., 1]

    def loss(
        self, feature: Tensor, label: Tensor, *, contrastive_weight: float, temperature: float
    ) -> Tensor:
        """Cross-entropy plus supervised NT-Xent (section 4.2); `label [B]` int64 in {0, 1}."""
        embedding = self.embed(feature)
        loss = F.cross_entropy(self.classify(embedding), label)
        if contrastive_weight:
            loss = loss + contrastive_weight * supervised_nt_xent(embedding, label, temperature)
        return loss


def supervised_nt_xent(embedding: Tensor, label: Tensor, temperature: float) -> Tensor:
    """Supervised contrastive loss without the diagonal (section 4.2, quirk 2 fixed).

    Args:
        embedding: `[B, D]`, normalised here.
        label: `[B]`.
        temperature: of the similarities.
    """
    u = F.normalize(embedding, dim=-1)
    similarity = u @ u.T / temperature
    off = ~torch.eye(len(u), dtype=torch.bool, device=u.device)
    log_denominator = torch.logsumexp(similarity.masked_fill(~off, float("-inf")), dim=1)
    positive = (label[:, None] == label[None]) & off
    pair = (similarity - log_denominator[:, None]).masked_fill(~positive, 0.0)
    return -(pair.sum(1) / positive.sum(1).clamp(min=1)).mean()


class Critic(nn.Module):
    """State value of a feature: residual MLP with one pre-activation block (section 5.2)."""

    def __init__(self, feature_dim: int, width: int = 256) -> None:
        super().__init__()
        self.first = nn.Linear(feature_dim, width)
        self.hidden1 = nn.Linear(width, width)
        self.hidden2 = nn.Linear(width, width)
        self.out = nn.Linear(width, 1)

    def forward(self, feature: Tensor) -> Tensor:
        """`[..., F]` -> value `[...]`."""
        y = self.first(feature)
        y = y + self.hidden2(mish(self.hidden1(mish(y))))
        return self.out(y)[..., 0]
