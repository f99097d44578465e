"""Cases of the world model: imagined steps and the posterior scan."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diwa.nn.rssm import RSSM, RSSMState
from diwa.ops import balanced_kl

from .chain import NO_BF16, largest, relative
from .harness import Case, GateError, Skip, native_bf16
from .inputs import Size, compiled, fwd_bwd, generator, latents, rssm
from .peers import libraries
from .peers.rssm import Gathered, Lean, Original, inverse_cdf

# Bfloat16 rounds every activation to 2^-8 of itself; h is a mean of values in (-1, 1).
BOUND = {"fp32": 1e-5, "bf16": 3e-2}
DIFFERENT_CLASSES = {"fp32": 0.01, "bf16": 0.05}
"""Largest share of sampled classes that may differ from float64 for the same uniforms."""


def rssm_imagine(size: Size, batch: int, dtype: str, compile_peers: bool) -> Case:
    """One chunk (L prior steps) of N dreams in one call.

    diwa and the peers that take uniforms get the same; `original` draws its own, as it would.
    """
    s = _steps(size, batch, compile_peers)
    frozen = s.model.freeze(torch.float32 if dtype == "fp32" else torch.bfloat16)
    h, z, index, actions, uniforms = s.inputs
    original, lean, gathered = s.forms

    def ours() -> Any:
        return frozen.imagine(h, index, actions, uniforms)

    @torch.no_grad()
    def errors() -> tuple[float, float, float]:
        exact = copy.deepcopy(lean).double()(
            h.double(), z.double(), actions.double(), uniforms.double()
        )
        wanted = exact[0], exact[1].unflatten(-1, (size.groups, -1)).argmax(-1)
        got = ours()
        error, different = latent_error(got[0], got[1], *wanted)
        if different > DIFFERENT_CLASSES[dtype]:
            raise GateError(f"rssm_imagine: {100 * different:.1f} % of the classes differ")
        forced = original(h, z, actions, uniforms)
        eager, _ = latent_error(
            forced[0], forced[1].unflatten(-1, (size.groups, -1)).argmax(-1), *wanted
        )
        peer, _ = latent_error(*gathered(h, index, actions, uniforms), *wanted)
        if max(eager, peer) > 1e-3:
            raise GateError(f"rssm_imagine: a peer is wrong by {max(eager, peer):.1e}")
        return error, eager, max(2 * eager, BOUND[dtype])

    flops = batch * size.chunk * size.step_flops()
    name = size.case(f"B={batch}")
    note = f"one call of {size.chunk} steps"
    calls, skipped = dict(s.calls), dict(s.skipped)
    return Case("rssm_imagine", name, dtype, ours, calls, errors, flops, note, skipped)


class _Steps(NamedTuple):
    model: RSSM
    inputs: tuple[Tensor, ...]
    forms: tuple[Original, Lean, Gathered]
    calls: dict[str, Callable[[], Any]]
    skipped: dict[str, str]


@functools.lru_cache(maxsize=1)
def _steps(size: Size, batch: int, compile_peers: bool) -> _Steps:
    """Inputs and peers of a case, made once: its items differ in diwa's dtype only."""
    model = rssm(size).requires_grad_(False)
    if not hasattr(model, "freeze"):
        raise Skip("diwa.nn.RSSM.freeze is not there")
    h, index, feature = latents(size, batch)
    z = feature[:, size.deter :]
    g = generator(4)
    actions = torch.randn(size.chunk, batch, size.actions, generator=g).clamp(-1, 1)
    uniforms = torch.rand(size.chunk, batch, size.groups, generator=g)
    original, lean, gathered = Original(model), Lean(model), Gathered(model)
    calls: dict[str, Callable[[], Any]] = {
        "original": lambda: original(h, z, actions, None),
        "lean": lambda: lean(h, z, actions, uniforms),
        "gathered": lambda: gathered(h, index, actions, uniforms),
    }
    skipped = libraries.add_imagination(calls, size, h, z, actions)
    inputs = (h, z, index, actions, uniforms)
    _add_fast(calls, skipped, (lean, gathered), inputs, compile_peers)
    return _Steps(model, inputs, (original, lean, gathered), calls, skipped)


def _add_fast(
    calls: dict[str, Callable[[], Any]],
    skipped: dict[str, str],
    models: tuple[Lean, Gathered],
    inputs: tuple[Tensor, ...],
    compile_peers: bool,
) -> None:
    """Compiled and bfloat16 forms of the steps."""
    (lean, gathered), (h, z, index, actions, uniforms) = models, inputs
    arguments = {"lean": (lean, h, z, actions), "gathered": (gathered, h, index, actions)}
    if native_bf16():
        half, many = h.bfloat16(), actions.bfloat16()
        arguments["lean bf16"] = (copy.deepcopy(lean).bfloat16(), half, z.bfloat16(), many)
        arguments["gathered bf16"] = (copy.deepcopy(gathered).bfloat16(), half, index, many)
        for name in ("lean bf16", "gathered bf16"):
            calls[name] = _bind(*arguments[name], uniforms)
    else:
        skipped["bf16 peers"] = NO_BF16
    if not compile_peers:
        skipped["compile"] = "not in a quick run"
        return
    for name, call in arguments.items():
        calls[f"compile {name}"] = compiled(_bind(*call, uniforms))


def _bind(model: torch.nn.Module, *arguments: Tensor) -> Callable[[], Any]:
    return lambda: model(*arguments)


def latent_error(h: Tensor, index: Tensor, exact_h: Tensor, exact: Tensor) -> tuple[float, float]:
    """Largest error of h over dreams whose classes have been the exact ones so far, and the share
    of classes that differ in such dreams; `[L, N, H]`, `[L, N, S]` twice."""
    same, worst, different, seen = torch.ones(h.shape[1], dtype=torch.bool), 0.0, 0, 0
    for step in range(len(h)):
        worst = max(worst, largest([h[step][same]], [exact_h[step][same]]) if same.any() else 0.0)
        wrong = index[step] != exact[step]
        different, seen = different + int(wrong[same].sum()), seen + int(wrong[same].numel())
        same &= ~wrong.any(-1)
    return worst, different / max(seen, 1)


def rssm_observe(size: Size, frames: int, batch: int, dtype: str, compile_peers: bool) -> Case:
    """Posterior scan over T frames with balanced KL, forward and backward to all parameters."""
    model = rssm(size)
    g = generator(5)
    embed = torch.randn(frames, batch, size.embed, generator=g).requires_grad_(True)
    action = torch.randn(frames, batch, size.actions, generator=g).clamp(-1, 1)
    reset = (torch.rand(frames, batch, generator=g) < 0.02).float()
    reset[0] = 1.0
    uniform = torch.rand(frames, batch, size.groups, generator=g)
    probe = torch.randn(frames, batch, size.feature, generator=g) / size.feature
    h0, z0 = torch.zeros(batch, size.deter), torch.zeros(batch, size.stoch)
    original, lean = Original(model), Lean(model)
    uniform = middle_of_class(lean, embed, action, reset, h0, z0, uniform)

    def ours_loss() -> Tensor:
        post = observe(model, dtype, embed, action, reset, RSSMState(h0, z0), uniform)
        prior = model.prior_logits(post.h)
        kl, _ = balanced_kl(post.logits, prior, 0.8)
        return 0.3 * kl.mean() + (torch.cat([post.h, post.z], -1) * probe).sum()

    def peer_loss(peer: Lean, u: Tensor | None, double: bool = False) -> Tensor:
        inputs = (embed, action, reset, h0, z0, u)
        inputs = tuple(x.double() if double and x is not None else x for x in inputs)
        h, z, post, prior = peer.observe(*inputs)
        kl = peer.kl(post, prior, 0.8).mean()
        return 0.3 * kl + (torch.cat([h, z], -1) * probe).sum()

    def peer(one: Lean, u: Tensor | None) -> Callable[[], Any]:
        return fwd_bwd([*one.parameters(), embed], lambda: peer_loss(one, u))

    ours = fwd_bwd([*model.parameters(), embed], ours_loss)

    def errors() -> tuple[float, float, float]:
        exact = copy.deepcopy(lean).double()
        fwd_bwd([*exact.parameters(), embed], lambda: peer_loss(exact, uniform, True))()
        wanted = _gradients(exact)
        peer(original, uniform)()
        eager = relative(_gradients(original), wanted)
        ours()
        error = relative(_gradients(model), wanted)
        if eager > 0.05:
            raise GateError(f"rssm_observe: the original's gradients are wrong by {eager:.1e}")
        # Bfloat16 gradients: 3-5e-2 for the worst weight, as long as all sample the same classes.
        return error, eager, max(2 * eager, 1e-4 if dtype == "fp32" else 0.05)

    calls = {"original": peer(original, None), "lean": peer(lean, uniform)}
    skipped = {}
    if compile_peers:
        fast = Lean(model)
        fast.posterior_step = compiled(fast.posterior_step)
        calls["compile lean step"] = peer(fast, uniform)
    else:
        skipped["compile"] = "not in a quick run"
    flops = frames * batch * size.observe_flops()
    name = size.case(f"T={frames},B={batch}")
    case = Case("rssm_observe", name, dtype, ours, calls, errors, flops, skipped=skipped)
    case.grad = True
    return case


@torch.no_grad()
def middle_of_class(lean: Lean, *inputs: Tensor) -> Tensor:
    """Uniforms `[T, B, S]` that choose the same classes as the last of `inputs`, from the middle of
    each class's share of [0, 1): rounding to bfloat16 then changes no class, after which nothing
    would be comparable."""
    uniform = inputs[-1]
    index, probs = inverse_cdf(lean.observe(*inputs)[2], uniform)
    index = index[..., None]
    middle = probs.cumsum(-1).gather(-1, index) - 0.5 * probs.gather(-1, index)
    return middle.squeeze(-1).clamp(min=0.0)


def observe(model: RSSM, dtype: str, *arguments: Any) -> Any:
    """diwa's scan in float32, or with bfloat16 products.

    Raises:
        Skip: this version of diwa has no such option.
    """
    if dtype == "fp32":
        return model.observe(*arguments)
    if "dtype" not in inspect.signature(model.observe).parameters:
        raise Skip("diwa.nn.RSSM.observe takes no dtype")
    return model.observe(*arguments, dtype=torch.bfloat16)


def _gradients(model: Any) -> list[Tensor]:
    """Of the weights that both forms have, in one order."""
    names = ("cell_z", "cell_a", "post_h", "post_e", "post_out")
    own = [getattr(model, name).weight.grad for name in names]
    return [*own, model.gru.weight_ih.grad, model.gru.weight_hh.grad]
