"""The epochs of PPO over one rollout: losses, optimizers and the KL stop (method 5.5 to 5.7)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from diwa import parallel
from diwa.agent import Policy
from diwa.config import FinetuneConfig
from diwa.graph import GraphedStep, Step
from diwa.nn.frozen import FrozenPolicy
from diwa.nn.gaussian import GaussianPolicy
from diwa.nn.heads import Critic
from diwa.rl.ppo import chunk_log_prob, clip_schedule, denoising_discount, ppo_loss

METRICS = ("policy_loss", "value_loss", "approx_kl", "clipfrac", "bc_loss")


class PPOUpdate:
    """Trains actor and critic on the rows of a rollout.

    A step on a minibatch is one CUDA graph on a GPU. Then no number is read by the host before all
    epochs are done: the optimizers are told on the device to leave weights, moments and step counts
    as they are once the KL has passed its limit, as they are told of gradients that overflow. On a
    CPU the epochs end there.

    Args:
        config: hyper-parameters.
        actor: policy that learns. critic: its value function.
        base: frozen policy, whose own chains the behaviour-cloning term is on.
        generator: of the order of the rows and of the noise of those chains.
        gated: stop on the device; None means on every device but a CPU.

    Attributes:
        graphs: the steps on a minibatch, of the critic's warm-up first.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        actor: Policy,
        critic: Critic,
        base: FrozenPolicy | GaussianPolicy,
        generator: torch.Generator,
        gated: bool | None = None,
    ) -> None:
        self.config, self.actor, self.critic, self.base = config, actor, critic, base
        self.generator, self.device = generator, generator.device
        self.gated = self.device.type != "cpu" if gated is None else gated
        weights = [list(m.parameters()) for m in (actor, critic)]
        self.actor_optimizer, self.critic_optimizer = (
            torch.optim.AdamW(
                parameters,
                lr=rate,
                weight_decay=0.0,
                fused=self.gated or None,
                capturable=self.device.type == "cuda",
            )
            for parameters, rate in zip(weights, (config.actor_lr, config.critic_lr), strict=True)
        )
        kf = config.ft_denoising_steps
        self.discount = denoising_discount(kf, config.gamma_denoising, self.device)
        self.clip = clip_schedule(
            kf, config.clip_coef, config.clip_coef_base, config.clip_coef_rate, self.device
        )
        zero = torch.zeros((), device=self.device)
        self.stopped, self.steps, self.kl = zero, zero.clone(), zero.clone()
        self.totals = torch.zeros(len(METRICS), device=self.device)
        if self.gated:  # read by the fused kernel: 1 skips a step, as under a gradient scaler
            self.actor_optimizer.found_inf = self.stopped  # type: ignore[attr-defined]
            self.critic_optimizer.found_inf = self.stopped  # type: ignore[attr-defined]
        self.graphs: list[GraphedStep] = []
        self._steps = {train_actor: self._graphed(train_actor) for train_actor in (False, True)}

    def _graphed(self, train_actor: bool) -> Step:
        """The step on a minibatch: one graph, or two with the sums over the processes between."""
        backward = partial(self._backward, train_actor=train_actor)
        descend = partial(self._descend, train_actor=train_actor)
        weights = [*self.actor.parameters(), *self.critic.parameters()]
        name = "update" if train_actor else "critic's warm-up"
        if parallel.world_size() == 1:
            whole = GraphedStep(
                lambda batch: descend(backward(batch)), self.device, writes=weights, name=name
            )
            self.graphs.append(whole)
            return whole
        first = GraphedStep(backward, self.device, name=f"gradients of the {name}")
        second = GraphedStep(descend, self.device, writes=weights, name=name)
        self.graphs += [first, second]

        def step(batch: dict[str, Tensor]) -> dict[str, Tensor]:
            metrics = first(batch)["metrics"]
            parallel.all_reduce_gradients(weights)
            return second({"metrics": parallel.all_reduce_mean(metrics)})

        return step

    def run(self, data: Mapping[str, Tensor], train_actor: bool) -> dict[str, Tensor]:
        """All epochs; they stop after one whose KL exceeds `target_kl`.

        Args:
            data: rows of the whole rollout, of all processes: feature `[M, F]`, chain
                `[M, Kf + 1, L, A]`, log_prob `[M, Kf]`, advantage and returns `[M]`.
            train_actor: whether the actor learns, too.

        Returns:
            Means over the steps that were taken, on the device.
        """
        c, size = self.config, len(data["feature"])
        for state in (self.stopped, self.steps, self.totals):
            state.zero_()
        for _ in range(c.update_epochs):
            order = torch.randperm(size, generator=self.generator, device=self.device)
            rows = order.chunk(c.minibatches)
            self.kl.zero_()
            for index in rows:
                self._steps[train_actor](self._minibatch(data, index, train_actor))
            over = (self.kl / len(rows) > c.target_kl).float()
            torch.maximum(self.stopped, over, out=self.stopped)
            if not self.gated and self.stopped.item():
                break
        means = dict(zip(METRICS, (self.totals / self.steps).unbind(), strict=True))
        if not self._clones(train_actor):
            del means["bc_loss"]
        return means

    def _clones(self, train_actor: bool) -> bool:
        return train_actor and self.config.bc_coef > 0

    def _minibatch(
        self, data: Mapping[str, Tensor], index: Tensor, train_actor: bool
    ) -> dict[str, Tensor]:
        """This process's share of the rows `index`, and the noise of the cloning term."""
        mine = index[parallel.share(len(index), "the number of states in a minibatch")]
        batch = {name: column[mine] for name, column in data.items()}
        if parallel.world_size() > 1:
            batch["population"] = data["advantage"][index]
        if self._clones(train_actor):
            first = index[: self.config.bc_states]
            share = parallel.share(len(first), "finetune.bc_states")
            batch["bc_feature"] = data["feature"][first[share]]
            batch["bc_noise"] = self.base.policy.noise(len(first), self.generator)[:, share]
        return batch

    def _bc_loss(self, feature: Tensor, noise: Tensor) -> Tensor:
        """Negative log-likelihood of the frozen policy's own chains (section 5.7)."""
        kf = self.config.ft_denoising_steps
        chain = self.base.sample(feature, noise, ft_steps=kf, explore=True).chain
        return -chunk_log_prob(self.actor.chain_log_prob(feature, chain)).mean()

    def _backward(self, batch: dict[str, Tensor], train_actor: bool) -> dict[str, Tensor]:
        """Gradients of one minibatch, and its metrics in the order of `METRICS`."""
        c, feature = self.config, batch["feature"]
        with torch.set_grad_enabled(train_actor):
            new = chunk_log_prob(self.actor.chain_log_prob(feature, batch["chain"]))
        terms = ppo_loss(
            new,
            batch["log_prob"],
            batch["advantage"],
            self.discount,
            self.clip,
            population=batch.get("population"),
        )
        value_loss = 0.5 * (self.critic(feature) - batch["returns"]).square().mean()
        loss = terms.policy_loss + c.vf_coef * value_loss
        bc_loss = torch.zeros_like(loss)
        if self._clones(train_actor):
            bc_loss = self._bc_loss(batch["bc_feature"], batch["bc_noise"])
            loss = loss + c.bc_coef * bc_loss
        # Graphs share the gradients' memory, so there it must stay; elsewhere it is cheaper anew.
        for optimizer in (self.actor_optimizer, self.critic_optimizer):
            optimizer.zero_grad(set_to_none=not self.gated)
        loss.backward()
        scalars = (terms.policy_loss, value_loss, terms.approx_kl, terms.clip_fraction, bc_loss)
        return {"metrics": torch.stack([s.detach() for s in scalars])}

    def _descend(self, inputs: dict[str, Tensor], train_actor: bool) -> dict[str, Tensor]:
        """One step of the optimizers; the metrics are summed up on the device."""
        metrics = inputs["metrics"]
        if train_actor:
            self.actor_optimizer.step()
        self.critic_optimizer.step()
        self.kl += metrics[METRICS.index("approx_kl")]
        self.totals += metrics.masked_fill(self.stopped > 0, 0.0)
        self.steps += 1 - self.stopped
        return {}
