"""Cases of the policy: sampling chains, old log-probabilities, the PPO update, inference."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diwa.nn.diffusion import Chain, DiffusionPolicy

from .harness import Case, GateError, Skip, native_bf16
from .inputs import Size, chain_noise, compiled, fwd_bwd, latents, policies
from .peers.chain import ConcatNet, Hoisted, Needed, Original, discount_loop

# Float32: diwa's promise. Bfloat16 rounds every activation to 2^-8 of itself, and the noisiest
# steps multiply the network's error by q, up to 40, before the clamp to [-1, 1].
BOUND = {"fp32": 1e-5, "mixed": 0.1, "bf16": 0.1}
NO_BF16 = "torch has no native bfloat16 products on this processor"


def freeze(policy: DiffusionPolicy, dtype: str) -> Any:
    """The packed form of a policy.

    Raises:
        Skip: this version of diwa has none.
    """
    if not hasattr(policy, "freeze"):
        raise Skip("diwa.nn.DiffusionPolicy.freeze is not there")
    return policy.freeze(torch.float32 if dtype == "fp32" else torch.bfloat16)


def frozen_pair(base: DiffusionPolicy, tuned: DiffusionPolicy, dtype: str) -> tuple[Any, Any]:
    """Packed (base, tuned); `mixed`: base in bfloat16, tuned in float32."""
    return freeze(base, dtype), freeze(tuned, "fp32" if dtype == "mixed" else dtype)


class _Peers:
    """The peers of one pair of policies, and what a chain of theirs is compared with."""

    def __init__(self, size: Size, batch: int, explore: bool, ft_steps: int) -> None:
        self.base, self.tuned = policies(size)
        self.size, self.ft, self.explore = size, ft_steps, explore
        self.h, self.index, self.feature = latents(size, batch)
        self.noise = chain_noise(size, batch)
        self.flat = self.noise.flatten(2)
        arguments = (self.base, self.tuned, ft_steps, explore)
        self.original, self.needed = Original(*arguments), Needed(*arguments)
        self.hoisted, self.fast = Hoisted(*arguments), Hoisted(*arguments, fast=True)
        self.bf16 = Hoisted(*arguments, fast=True).bf16()
        self.made: dict[tuple, tuple[dict, dict]] = {}

    @torch.no_grad()
    def exact(self) -> Chain:
        """The chain in float64."""
        base, tuned = (copy.deepcopy(p).double() for p in (self.base, self.tuned))
        return tuned.sample(
            self.feature.double(),
            self.noise.double(),
            base=base,
            ft_steps=self.ft,
            explore=self.explore,
        )

    def calls(
        self, method: str, compile_peers: bool, every: bool
    ) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
        """Peers by name and the reasons of those left out; `every` compiles all forms.

        Made once: the items of one case differ in diwa's dtype only.
        """
        key = (method, compile_peers, every)
        if key not in self.made:
            self.made[key] = self._make(*key)
        calls, skipped = self.made[key]
        return dict(calls), dict(skipped)

    def _make(self, method: str, compile_peers: bool, every: bool) -> tuple[dict, dict]:
        forms = {"original": self.original, "needed only": self.needed, "hoisted": self.hoisted}
        calls = {name: self._call(form, method) for name, form in forms.items()}
        skipped = {}
        if native_bf16():
            calls["hoisted bf16"] = self._call(self.bf16, method)
        else:
            skipped["bf16 peers"] = NO_BF16
        if not compile_peers:
            skipped["compile"] = "not in a quick run"
            return calls, skipped
        to_compile = {"compile hoisted one exponential": self.fast}
        if every:
            to_compile |= {"compile needed only": self.needed, "compile hoisted": self.hoisted}
        if native_bf16():
            to_compile["compile hoisted bf16 one exponential"] = self.bf16
        for name, form in to_compile.items():
            calls[name] = compiled(self._call(form, method))
        return calls, skipped

    def _call(self, form: torch.nn.Module, method: str) -> Callable[[], Any]:
        function = form if method == "forward" else getattr(form, method)
        return lambda: function(self.feature, self.flat)


@functools.lru_cache(maxsize=1)
def _peers(size: Size, batch: int, explore: bool) -> _Peers:
    return _Peers(size, batch, explore, size.ft_steps)


def _sampling(
    op: str, method: str, size: Size, batch: int, dtype: str, compile_peers: bool, **options: bool
) -> Case:
    """A case that samples chains and, with method "rollout", also wants the log-probabilities."""
    explore = options.get("explore", True)
    p = _peers(size, batch, explore)
    base, tuned = frozen_pair(p.base, p.tuned, dtype)

    def ours() -> Chain:
        return tuned.sample(
            (p.h, p.index), p.noise, base=base, ft_steps=size.ft_steps, explore=explore
        )

    @torch.no_grad()
    def errors() -> tuple[float, float, float]:
        exact = p.exact()
        wanted = [exact.chain.flatten(2)] + [exact.log_prob.flatten(2)] * (method == "rollout")
        result = ours()
        got = [result.chain.flatten(2)] + [result.log_prob.flatten(2)] * (method == "rollout")
        forms = (p.original, p.needed, p.hoisted, p.fast)
        peers = [largest(getattr(f, method)(p.feature, p.flat)[1:], wanted) for f in forms]
        if max(peers) > 1e-3:
            raise GateError(f"{op}: a peer's chain is wrong by {max(peers):.1e}")
        return largest(got, wanted), peers[0], max(2 * peers[0], BOUND[dtype])

    every = options.get("every", False)
    calls, skipped = p.calls(method, compile_peers, every)
    flops = batch * (size.policy_flops(size.steps) + 2 * size.cond_flops())
    case = Case(op, size.case(f"B={batch}"), dtype, ours, calls, errors, flops, skipped=skipped)
    case.tail = options.get("tail", False)
    return case


def largest(got: Any, wanted: Any) -> float:
    """Largest absolute difference over pairs of tensors; NaN counts as infinite."""
    worst = 0.0
    for a, b in zip(got, wanted, strict=True):
        error = (a.double() - b.double()).abs().max().item()
        worst = max(worst, float("inf") if error != error else error)
    return worst


def denoise_chain(size: Size, batch: int, dtype: str, compile_peers: bool) -> Case:
    """Sample a chain with exploration; every form is compiled at the paper's B = 64."""
    every = size.name == "paper" and batch == 64
    return _sampling("denoise_chain", "forward", size, batch, dtype, compile_peers, every=every)


def rollout_logprob(size: Size, batch: int, dtype: str, compile_peers: bool) -> Case:
    """Sample a chain and know its log-probabilities, as PPO needs them."""
    return _sampling("rollout_logprob", "rollout", size, batch, dtype, compile_peers)


def policy_inference(size: Size, batch: int, dtype: str, compile_peers: bool) -> Case:
    """One evaluated action chunk for one robot."""
    options = {"explore": False, "tail": True}
    return _sampling("policy_inference", "forward", size, batch, dtype, compile_peers, **options)


def chain_log_prob(size: Size, batch: int, form: str, compile_peers: bool) -> Case:
    """Log-probabilities of B states x Kf steps, forward and backward to the parameters.

    `grouped`: all steps of a state together. `shuffled`: pairs (state, step) in random order.
    """
    p = _Peers(size, batch, True, size.ft_steps)
    chain = p.exact().chain.float()
    flat, kf = chain.flatten(2), size.ft_steps
    order = torch.randperm(batch * kf, generator=torch.Generator().manual_seed(3))
    state, position = order // kf, order % kf
    t = kf - 1 - position
    pairs = (p.feature[state], flat[state, position], flat[state, position + 1], t)

    def peer(model: Original | Hoisted) -> Callable[[], list[Tensor]]:
        weights = [w for n, w in model.named_parameters() if not n.startswith("base")]
        return fwd_bwd(weights, lambda: _loss(model))

    def _loss(model: Original | Hoisted) -> Tensor:
        if form == "grouped":
            return model.log_prob(p.feature, flat).mean()
        log_prob = model.pair_log_prob(*pairs)
        if type(model) is Original:
            return (log_prob.mean(-1) * discount_loop(position, kf, 1.0)).mean()
        return log_prob.mean()

    def ours_loss() -> Tensor:
        if form == "grouped":
            return p.tuned.chain_log_prob(p.feature, chain).mean()
        return shuffled_log_prob(p.tuned, pairs, size).mean()

    ours = fwd_bwd(list(p.tuned.parameters()), ours_loss)

    def errors() -> tuple[float, float, float]:
        model = copy.deepcopy(p.tuned).double()
        model.chain_log_prob(p.feature.double(), chain.double()).mean().backward()
        exact = gradients(model.net)
        ours()
        error, peer_errors = relative(gradients(p.tuned.net), exact), []
        for model in (p.original, p.needed, p.hoisted):
            peer(model)()
            peer_errors.append(relative(gradients(model.tuned), exact))
        if max(peer_errors) > 1e-4:
            raise GateError(f"chain_log_prob: a peer's gradients are wrong by {max(peer_errors)}")
        return error, peer_errors[0], max(2 * peer_errors[0], 1e-5)

    calls = {"original": peer(p.original), "needed only": peer(p.needed)}
    calls["hoisted"] = peer(p.hoisted)
    skipped = {} if compile_peers else {"compile": "not in a quick run"}
    if compile_peers:
        fast = compiled(lambda: _loss(p.fast))
        calls["compile hoisted one exponential"] = fwd_bwd(list(p.fast.tuned.parameters()), fast)
    hidden = 3 * size.policy_flops(1) - 2.0 * size.numbers * size.width
    per_state = 2 * 2.0 * size.feature * size.width
    flops = batch * kf * hidden + batch * per_state * (1 if form == "grouped" else kf)
    name = size.case(f"{form},B={batch}")
    case = Case("chain_log_prob", name, "fp32", ours, calls, errors, flops, skipped=skipped)
    case.grad = True
    return case


def shuffled_log_prob(policy: DiffusionPolicy, pairs: tuple[Tensor, ...], size: Size) -> Tensor:
    """Log-probabilities of (feature, x, next x, step) pairs by diwa's operator.

    Raises:
        Skip: this version of diwa has none.
    """
    if not hasattr(policy, "transition_log_prob"):
        raise Skip("diwa.nn.DiffusionPolicy.transition_log_prob is not there")
    cond, x, after, t = pairs
    shape = (len(x), 1, size.chunk, size.actions)
    return policy.transition_log_prob(cond, x.view(shape), after.view(shape), t[:, None])


def gradients(net: torch.nn.Module) -> list[Tensor]:
    """Weight gradients that every form of the network has, in one order."""
    parts = [getattr(net, name).weight.grad for name in ("hidden1", "hidden2", "out")]
    if isinstance(net, ConcatNet):
        first, chunk = net.first.weight.grad, net.out.out_features
        return [*parts, first[:, :chunk], first[:, chunk + net.time[-1].out_features :]]
    return [*parts, net.chunk_in.weight.grad, net.cond_in.weight.grad]


def relative(got: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest error over tensors, each relative to its largest entry."""
    pairs = zip(got, wanted, strict=True)
    return max(largest([a], [b]) / b.abs().max().item() for a, b in pairs)
