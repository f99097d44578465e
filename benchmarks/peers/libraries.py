"""Recurrent state-space models of other libraries, where they are installed (extra `bench`).

Their cells differ in detail (no layer norm, another head), so they get the same sizes but their own
weights, and no correctness gate: they show what a user of that library waits for.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..inputs import Size


def add_imagination(
    calls: dict[str, Callable[[], Any]], size: Size, h: Tensor, z: Tensor, actions: Tensor
) -> dict[str, str]:
    """Add a call per installed library; returns the reasons of those left out."""
    skipped = {}
    for name, make in (("torchrl", _torchrl), ("sheeprl", _sheeprl)):
        try:
            calls[f"{name} RSSM"] = make(size, h, z, actions)
        except Exception as error:  # another version of a library may fail in any way
            skipped[f"{name} RSSM"] = f"{type(error).__name__}: {error}"[:200]
    return skipped


def _torchrl(size: Size, h: Tensor, z: Tensor, actions: Tensor) -> Callable[[], Any]:
    prior = importlib.import_module("torchrl.modules").RSSMPriorV3(
        hidden_dim=size.hidden,
        rnn_hidden_dim=size.deter,
        num_categoricals=size.groups,
        num_classes=size.classes,
        action_dim=size.actions,
        recurrent_model="gru",
    )
    prior.requires_grad_(False)

    def call() -> Tensor:
        state, belief = z, h
        for action in actions:
            _, state, belief = prior(state, belief, action)
        return belief

    call()
    return call


def _sheeprl(size: Size, h: Tensor, z: Tensor, actions: Tensor) -> Callable[[], Any]:
    os.environ.setdefault("SHEEPRL_SEARCH_PATH", "")
    agent = importlib.import_module("sheeprl.algos.dreamer_v2.agent")
    mlp = importlib.import_module("sheeprl.models.models").MLP
    recurrent = agent.RecurrentModel(
        input_size=size.stoch + size.actions,
        recurrent_state_size=size.deter,
        dense_units=size.hidden,
        layer_norm=True,
    )
    transition = mlp(
        input_dims=size.deter,
        hidden_sizes=[size.hidden],
        output_dim=size.stoch,
        activation=torch.nn.ELU,
    )
    representation = mlp(input_dims=size.deter, hidden_sizes=[size.hidden], output_dim=size.stoch)
    model = agent.RSSM(recurrent, representation, transition, {}, discrete=size.classes)
    model.requires_grad_(False)

    def call() -> Tensor:
        state, belief = z[None], h[None]
        for action in actions:
            state, belief = model.imagination(state, belief, action[None])
            state = state.view(1, len(h), -1)
        return belief

    call()
    return call
