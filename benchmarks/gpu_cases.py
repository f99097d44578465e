"""Cases of the GPU suite: operators, their published form, and eager torch of their algebra."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diwa import ops
from diwa.nn.rssm import RSSM, RSSMState
from diwa.ops import reference_chain, reference_gpu, reference_rssm
from diwa.ops.denoise_chain_cluster import denoise_chain_cluster, problem

from .chain import largest
from .harness import Case
from .inputs import PAPER, TINY, Size, policies
from .peers.chain import Original as OriginalChain
from .peers.rssm import Original as OriginalRSSM

TRIED = replace(TINY, width=256, steps=4, ft_steps=2)
"""Of the tests: the smallest that the chain kernel takes."""


@dataclass
class GraphCase(Case):
    """A case some of whose calls can be captured: `graph` names them, "diwa" or a peer."""

    flops: float = 0.0
    graph: tuple[str, ...] = ()


def chains(size: Size, batches: tuple[int, ...], device: torch.device) -> Iterator[GraphCase]:
    """The denoising chain with its log-probabilities."""
    base, tuned = (p.requires_grad_(False).to(device) for p in policies(size))
    published = OriginalChain(base, tuned, size.ft_steps).to(device).requires_grad_(False)
    nets = [p.network() for p in (base, tuned)]
    exact = [copy.deepcopy(p).double() for p in (base, tuned)]
    table = tuned.schedule.tables(tuned.config, explore=True)
    kf, clip = size.ft_steps, tuned.config.clip_noise
    why = problem(nets[0], device) if device.type == "cuda" else "no CUDA device"
    backend = "reference" if why else "cuda"
    per_row = size.policy_flops(size.steps)
    for n in batches:
        feature = torch.randn(n, base.cond_dim, device=device)
        noise = torch.randn(size.steps + 1, n, tuned.chunk_dim, device=device)
        args = (nets[1], nets[0], feature, noise, table)

        def hoisted(args: Any = args) -> Any:
            return reference_chain.denoise_chain(*args, kf, clip)

        def original(feature: Tensor = feature, noise: Tensor = noise) -> Any:
            with torch.no_grad():
                return published.rollout(feature, noise)

        def half(args: Any = args) -> Any:
            with torch.autocast(device.type, torch.bfloat16):
                return reference_chain.denoise_chain(*args, kf, clip)

        def right(feature: Tensor = feature, noise: Tensor = noise) -> Tensor:
            shape = (*noise.shape[:2], tuned.config.chunk, tuned.action_dim)
            how = {"base": exact[0], "ft_steps": kf, "explore": True, "backend": "reference"}
            chain = exact[1].sample(feature.double(), noise.double().view(shape), **how)
            return chain.chunk.flatten(1)

        peers = {"original": original, "hoisted": hoisted, "hoisted bf16": half}
        for dtype in (torch.bfloat16, torch.float32):
            name = "bf16" if dtype == torch.bfloat16 else "mixed"

            def ours(args: Any = args, dtype: torch.dtype = dtype) -> Any:
                how = {"ft_steps": kf, "clip_noise": clip, "ft_dtype": dtype}
                return denoise_chain_cluster(*args, **how, backend=backend)

            def errors(
                ours: Any = ours, half: Any = half, right: Any = right
            ) -> tuple[float, float, float]:
                exact, eager = right(), largest(half().chunk, right())
                return largest(ours().chunk, exact), eager, 2 * eager + 1e-3

            yield GraphCase(
                *("denoise_chain", f"B={n}", name, ours, peers, errors, n * per_row),
                graph=("diwa", "hoisted", "hoisted bf16"),
                skipped={"cluster kernel": why} if why else {},
            )
    n = 1
    feature = torch.randn(n, base.cond_dim, device=device)
    noise = torch.randn(size.steps + 1, n, tuned.chunk_dim, device=device)
    args = (nets[1], nets[0], feature, noise, table)

    def act() -> Any:
        return reference_chain.denoise_chain(*args, kf, clip)

    def bounds() -> tuple[float, float, float]:
        shape = (*noise.shape[:2], tuned.config.chunk, tuned.action_dim)
        how = {"base": exact[0], "ft_steps": kf, "explore": True, "backend": "reference"}
        chain = exact[1].sample(feature.double(), noise.double().view(shape), **how)
        wrong = largest(act().chunk, chain.chunk.flatten(1))
        return wrong, wrong, 1e-2  # TF32 may be on

    @torch.no_grad()
    def one() -> Any:
        return published.rollout(feature, noise)

    peers = {"original": one}
    tail = GraphCase(
        "policy_inference", "B=1", "fp32", act, peers, bounds, tail=True, graph=("diwa",)
    )
    yield tail


def imagination(size: Size, batches: tuple[int, ...], device: torch.device) -> Iterator[GraphCase]:
    """Four prior steps."""
    torch.manual_seed(0)
    rssm = RSSM(7, size.embed, size.deter, size.groups, size.classes, size.hidden)
    rssm = rssm.requires_grad_(False).to(device)
    exact = copy.deepcopy(rssm).double()
    published = OriginalRSSM(rssm).requires_grad_(False)
    for n in batches:
        h = torch.randn(n, size.deter, device=device).tanh()
        z_idx = torch.randint(size.classes, (n, size.groups), device=device)
        z = F.one_hot(z_idx, size.classes).flatten(1).float()
        actions = torch.randn(4, n, 7, device=device)
        uniforms = torch.rand(4, n, size.groups, device=device)
        args = (h, z_idx, actions, uniforms)

        def eager(args: Any = args) -> Any:
            return reference_rssm.rssm_imagine(rssm.prior_weights(), *args)

        def original(h: Tensor = h, z: Tensor = z, actions: Tensor = actions) -> Any:
            return published(h, z, actions, None)

        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            frozen = rssm.freeze(dtype)

            def ours(frozen: Any = frozen, args: Any = args) -> Any:
                return frozen.imagine(*args)

            def errors(
                ours: Any = ours, eager: Any = eager, args: Any = args, name: str = name
            ) -> tuple[float, float, float]:
                first = [t[:1] if i > 1 else t for i, t in enumerate(args)]
                wide = [t.double() if t.is_floating_point() else t for t in first]
                right = reference_rssm.rssm_imagine(exact.prior_weights(), *wide)[0]
                wrong, plain = (largest(f()[0][:1], right) for f in (ours, eager))
                return wrong, plain, 2 * plain + (1e-5 if name == "fp32" else 2e-2)

            yield GraphCase(
                *("rssm_imagine", f"B={n},L=4", name, ours),
                {"original": original, "eager": eager},
                errors,
                graph=("diwa", "eager"),
            )


def observation(size: Size, frames: int, n: int, device: torch.device) -> Iterator[GraphCase]:
    """The posterior scan, forward and backward."""
    torch.manual_seed(0)
    rssm = RSSM(7, size.embed, size.deter, size.groups, size.classes, size.hidden).to(device)
    embed, action = (torch.randn(frames, n, k, device=device) for k in (size.embed, 7))
    reset, uniform = (
        torch.zeros(frames, n, device=device),
        torch.rand(frames, n, size.groups, device=device),
    )

    def run(backend: str) -> Callable[[], Any]:
        def call() -> list[Tensor]:
            with ops.use_backend(backend):
                state = RSSMState(*(torch.zeros_like(t) for t in rssm.initial(n, device)))
                post = rssm.observe(embed, action, reset, state, uniform)
                loss = post.h.square().mean() + post.logits.square().mean()
                return list(torch.autograd.grad(loss, [rssm.gru.weight_hh, rssm.post_e.weight]))

        return call

    def errors() -> tuple[float, float, float]:
        ours, eager = run("auto")()[0], run("reference")()[0]
        scale = eager.abs().max().item()
        return largest(ours, eager) / scale, 0.0, 1e-2

    yield GraphCase(
        *("rssm_observe", f"T={frames},B={n}", "fp32", run("auto")),
        {"original": run("reference")},
        errors,
        graph=("diwa", "original"),
    )


def pointwise(size: Size, n: int, device: torch.device) -> Iterator[GraphCase]:
    """The kernels between GEMMs, one by one, and GAE."""
    cells = (n, size.groups, size.classes)
    logits, uniform = torch.randn(cells, device=device), torch.rand(cells[:2], device=device)
    u, z = size.hidden, size.groups * size.classes
    idx = torch.randint(size.classes, cells[:2], device=device)
    rows = {
        "idx": idx,
        "table": torch.randn(z, u, device=device) * size.groups**-0.5,
        "action": torch.randn(n, 7, device=device),
        "w_a": torch.randn(7, u, device=device),
    }
    vectors = [torch.randn(u, device=device) for _ in range(3)]
    flags = (torch.rand(36, 50, device=device) < 0.05).float()
    steps = [torch.randn(36, 50, device=device) for _ in range(3)]
    prior = torch.randn(cells, device=device)
    calls: dict[str, tuple[str, Callable[[str], Any], Callable[[torch.dtype], Any]]] = {
        "onehot_ln_elu": (
            f"B={n}",
            lambda b: ops.onehot_ln_elu(*vectors, **rows, backend=b),
            lambda d: reference_gpu.onehot_ln_elu(
                None,
                idx,
                rows["table"].to(d),
                rows["action"].to(d),
                rows["w_a"].to(d),
                *(v.to(d) for v in vectors),
                1e-3,
            ),
        ),
        "sample_categorical": (
            f"B={n}",
            lambda b: ops.sample_categorical(logits, uniform, backend=b),
            lambda d: reference_gpu.sample_categorical(logits, uniform)[0],
        ),
        "balanced_kl": (
            f"B={n}",
            lambda b: ops.balanced_kl(logits, prior, 0.8, backend=b)[0],
            lambda d: reference_rssm.balanced_kl(logits.to(d), prior.to(d), 0.8)[0],
        ),
        "gae": (
            "T=36,N=50",
            lambda b: ops.gae(*steps, flags, flags, 0.999, 0.95, backend=b)[0],
            lambda d: reference_rssm.gae(
                *(s.to(d) for s in steps), flags.to(d), flags.to(d), 0.999, 0.95
            )[0],
        ),
    }
    for name, (case, call, plain) in calls.items():

        def errors(call: Any = call, plain: Any = plain) -> tuple[float, float, float]:
            right = plain(torch.float64)
            eager = largest(plain(torch.float32), right)
            floor = 1e-5 * right.double().abs().max().item()
            return largest(call("auto"), right), eager, 2 * eager + floor

        yield GraphCase(
            *(name, case, "fp32", lambda call=call: call("auto")),
            {"original": lambda call=call: call("reference")},
            errors,
            graph=("diwa", "original"),
        )


def groups(device: torch.device, tiny: bool) -> dict[str, Callable[[], Iterator[GraphCase]]]:
    """The suite, by group."""
    size = TRIED if tiny else PAPER
    batches = (3,) if tiny else (50, 64, 256, 1024)
    frames, rows = (3, 2) if tiny else (50, 50)
    return {
        "chain": lambda: chains(size, batches, device),
        "imagine": lambda: imagination(size, batches, device),
        "pointwise": lambda: pointwise(size, batches[-1], device),
        "observe": lambda: observation(size, frames, rows, device),
    }
