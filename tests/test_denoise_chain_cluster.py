"""The chain on a thread-block cluster: its host-side model here, the kernel on a GPU."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diwa.ops import BackendError, PackedNetwork, denoise_chain, step_table
from diwa.ops import reference_chain as reference
from diwa.ops.denoise_chain_cluster import denoise_chain_cluster, pack, problem
from diwa.ops.reference_chain import ChainSteps, Network

ROOT = Path(__file__).resolve().parent.parent
POINTER = ctypes.c_void_p


class ModelNetwork(ctypes.Structure):
    _fields_ = [
        (name, POINTER)
        for name in (
            *("chunk_in", "hidden1", "hidden2", "out"),
            *("time", "bias1", "bias2", "out_bias", "cond"),
        )
    ]


class ModelArgs(ctypes.Structure):
    _fields_ = [
        ("net", ModelNetwork * 2),
        *((name, POINTER) for name in ("noise", "table", "chunk", "chain", "log_prob")),
        ("N", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("P", "K", "base_steps", "ft_steps")),
        ("clip_noise", ctypes.c_float),
        ("without", ctypes.c_int),
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("model") / "model.so"
    command = [compiler, "-std=c++17", "-O2", "-shared", "-fPIC", "-I", ROOT / "csrc/include"]
    subprocess.run([*command, ROOT / "tests/denoise_chain_model.cpp", "-o", library], check=True)
    function = ctypes.CDLL(str(library)).denoise_chain_model
    function.restype = ctypes.c_int64
    return function


def network(W, P, F_, K):
    return Network(
        chunk_in=torch.randn(W, P) * P**-0.5,
        cond_in=torch.randn(W, F_) * F_**-0.5,
        cond_bias=torch.randn(W) * 0.1,
        time=torch.randn(K, W) * 0.3,
        hidden=tuple((torch.randn(W, W) * W**-0.5, torch.randn(W) * 0.1) for _ in range(2)),
        out=torch.randn(P, W) * W**-0.5,
        out_bias=torch.randn(P) * 0.1,
        residual=True,
    )


def tables(K):
    t = torch.linspace(0.05, 0.95, K)
    p, q, std = (1 - t * 0.7).rsqrt(), (1 / (1 - t * 0.7) - 1).sqrt(), 0.1 + 0.2 * t
    return ChainSteps(p, q, 1 - t, t * 0.9, std, std + 0.05)


def problem_of(N, W, P=28, K=4, F_=24):
    nets = [network(W, P, F_, K) for _ in range(2)]
    return nets, torch.randn(N, F_), torch.randn(K + 1, N, P), tables(K)


def on_device(arguments, device):
    (base, tuned), feature, noise, steps = arguments

    def move(t):
        return t.to(device) if isinstance(t, torch.Tensor) else t

    nets = [
        Network(
            *(
                tuple((move(w), move(b)) for w, b in x) if isinstance(x, tuple) else move(x)
                for x in net
            )
        )
        for net in (base, tuned)
    ]
    return nets, move(feature), move(noise), ChainSteps(*(move(t) for t in steps))


def rounded(net, x, time, cond):
    """predict_noise with the kernel's roundings: operands of every product in bfloat16."""

    def linear(v, w, b=None):
        return F.linear(v.bfloat16().float(), w.bfloat16().float(), b)

    (w1, b1), (w2, b2) = net.hidden
    y = linear(x, net.chunk_in) + time + cond
    y = y + linear(F.mish(linear(F.mish(y), w1, b1)), w2, b2)
    return linear(y, net.out, net.out_bias)


def rounded_chain(nets, feature, noise, steps, ft_steps, clip):
    """reference.denoise_chain with `rounded` for the network."""
    original = reference.predict_noise
    reference.predict_noise = rounded
    try:
        return reference.denoise_chain(nets[1], nets[0], feature, noise, steps, ft_steps, clip)
    finally:
        reference.predict_noise = original


def run_model(model, arguments, M, ft_steps, clip=3.0, without=0):
    nets, feature, noise, steps = arguments
    (K, N, P), W = (noise.shape[0] - 1, *noise.shape[1:]), len(nets[0].cond_bias)
    keep, args = [], ModelArgs()

    def pointer(t, dtype=torch.float32):
        t = t.to(dtype).contiguous()
        keep.append(t)
        return t.data_ptr()

    for i, net in enumerate(nets):
        chunk_in, time, w1, b1, w2, b2, out, out_bias = pack(net)
        keep += [chunk_in, time, w1, b1, w2, b2, out, out_bias]
        cond = F.linear(feature, net.cond_in, net.cond_bias)
        args.net[i] = ModelNetwork(
            *(t.data_ptr() for t in (chunk_in, w1, w2, out, time, b1, b2, out_bias)),
            pointer(cond),
        )
    results = [np.full((N, n, P), np.nan, np.float32) for n in (1, ft_steps + 1, ft_steps)]
    args.noise, args.table = pointer(noise), pointer(step_table(steps))
    args.chunk, args.chain, args.log_prob = (r.ctypes.data for r in results)
    args.N, args.P, args.K, args.ft_steps, args.base_steps = N, P, K, ft_steps, K - ft_steps
    args.clip_noise, args.without = clip, without
    races = model(ctypes.byref(args), W, M)
    chunk, chain, log_prob = (torch.from_numpy(r) for r in results)
    return (chunk[:, 0], chain, log_prob), races


def check_against_rounded(actual, right, steps):
    """Equal but for the order of sums. A sum that lands on the other side of a rounding of an
    activation moves it by 2^-8 of itself, and its effect on x by that times one weight (1/W of the
    sum's size) and the q of the step; a handful of such flips meet in one number."""
    for name, a, r in zip(("chunk", "chain", "log_prob"), actual, right, strict=True):
        assert a.shape == r.shape, name
        if not r.numel():
            continue
        assert not a.isnan().any(), name
        error = (a - r).abs()
        assert error.max() < 3e-3, f"{name}: {error.max():.1e}"
        assert error.square().mean().sqrt() < 3e-4, name


@pytest.mark.parametrize(
    "N, W, M, P, ft_steps",
    [
        (16, 256, 16, 28, 2),
        (5, 256, 16, 4, 4),
        (37, 256, 32, 32, 1),
        (19, 256, 16, 12, 0),
        (16, 512, 16, 28, 2),
        (7, 512, 32, 28, 1),
    ],
)
def test_host_model_of_the_tiling(model, N, W, M, P, ft_steps):
    arguments = problem_of(N, W, P, K=4 if W == 256 else 2)
    actual, races = run_model(model, arguments, M, ft_steps)
    assert races == 0
    if not ft_steps:
        actual = (actual[0], actual[1][:, :0], actual[2])
    right = rounded_chain(*arguments, ft_steps, 3.0)
    check_against_rounded(actual, right, arguments[3])


def test_host_model_has_the_bfloat16_error_of_the_chain(model):
    arguments = problem_of(16, 256)
    (chunk, _, _), _ = run_model(model, arguments, 16, 2)
    wide = on_device(arguments, "cpu")
    exact = reference.denoise_chain(wide[0][1], wide[0][0], *wide[1:], 2, 3.0).chunk
    error = (chunk - exact).abs().max()
    assert 1e-5 < error < 2e-2  # bfloat16, but the same chain


@pytest.mark.parametrize("without", [1, 2, 3, 4, 5])
def test_host_model_misses_a_barrier_that_is_left_out(model, without):
    """The check of the barriers can fail: each of the five is needed."""
    _, races = run_model(model, problem_of(16, 256, K=3), 16, 1, without=without)
    assert races > 0


def test_host_model_keeps_nan_in_its_row(model):
    arguments = problem_of(16, 256)
    arguments[2][1, 3, 5] = float("nan")
    arguments[1][7, 0] = float("nan")
    (chunk, _, _), _ = run_model(model, arguments, 16, 2)
    bad = chunk.isnan().any(1)
    assert bad.nonzero().flatten().tolist() == [3, 7]
    right = reference.denoise_chain(*arguments[0][::-1], *arguments[1:], 2, 3.0).chunk
    assert torch.equal(right.isnan().any(1), bad)


def test_what_the_kernel_cannot_run_is_said():
    cpu = torch.device("cpu")
    assert "width" in problem(network(128, 28, 8, 2), cpu)
    assert "L * A" in problem(network(256, 30, 8, 2), cpu)
    assert "residual" in problem(network(256, 28, 8, 2)._replace(residual=False), cpu)
    assert not problem(network(512, 28, 8, 2), cpu)
    nets, *rest = problem_of(3, 256)
    with pytest.raises(TypeError, match="float32 or bfloat16"):
        denoise_chain_cluster(nets[1], nets[0], *rest, ft_dtype=torch.float16)
    with pytest.raises(BackendError):
        denoise_chain_cluster(nets[1], nets[0], *rest, backend="cuda")


def test_reference_on_the_cpu():
    nets, *rest = problem_of(3, 256)
    right = reference.denoise_chain(nets[1], nets[0], *rest, 2, 3.0)
    for a, r in zip(denoise_chain_cluster(nets[1], nets[0], *rest, ft_steps=2), right, strict=True):
        assert torch.equal(a, r)


gpu = pytest.mark.gpu


@gpu
def test_smallest_kernel():
    """For compute-sanitizer: one tile, two steps, both networks."""
    nets, *rest = on_device(problem_of(2, 256, K=2), "cuda")
    how = {"ft_steps": 1, "ft_dtype": torch.bfloat16, "backend": "cuda"}
    actual = denoise_chain_cluster(nets[1], nets[0], *rest, **how)
    check_against_rounded(actual, rounded_chain(nets, *rest, 1, 3.0), rest[2])


@gpu
@pytest.mark.parametrize("N", [1, 16, 50, 64, 300, 1024])
@pytest.mark.parametrize("W", [256, 512])
@pytest.mark.parametrize("ft_steps", [0, 3, 8])
def test_kernel(N, W, ft_steps):
    nets, *rest = on_device(problem_of(N, W, K=8), "cuda")
    how = {"ft_steps": ft_steps, "ft_dtype": torch.bfloat16, "backend": "cuda"}
    actual = denoise_chain_cluster(nets[1], nets[0], *rest, **how)
    check_against_rounded(actual, rounded_chain(nets, *rest, ft_steps, 3.0), rest[2])


@gpu
def test_kernel_gives_the_same_bits_again():
    nets, *rest = on_device(problem_of(100, 512, K=5), "cuda")
    how = {"ft_steps": 2, "ft_dtype": torch.bfloat16, "backend": "cuda"}
    once, again = (denoise_chain_cluster(nets[1], nets[0], *rest, **how) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@gpu
def test_float32_steps_after_the_kernel():
    """The log-probabilities are those of the float32 network at the chain that was sampled."""
    nets, *rest = on_device(problem_of(64, 512, K=6), "cuda")
    chain = denoise_chain_cluster(nets[1], nets[0], *rest, ft_steps=3, backend="cuda")
    step = torch.arange(2, -1, -1, device="cuda")
    again = reference.chain_log_prob(
        nets[1], rest[0], chain.chain[:, :-1], chain.chain[:, 1:], step, rest[2]
    )
    steps = rest[2].std / rest[2].log_prob_std
    assert (again - chain.log_prob).abs().max() < 1e-3 * steps.max()  # float32 GEMMs, TF32 off


@gpu
def test_a_base_frozen_as_bfloat16_runs_on_the_kernel():
    nets, *rest = on_device(problem_of(50, 512), "cuda")
    base = PackedNetwork(nets[0], torch.bfloat16)
    feature, noise, steps = rest
    how = {"feature": feature, "base": base, "ft_steps": 2}
    public = denoise_chain(PackedNetwork(nets[1]), noise, steps, **how)
    right = denoise_chain_cluster(nets[1], nets[0], *rest, ft_steps=2, backend="cuda")
    assert all(torch.equal(a, b) for a, b in zip(public, right, strict=True))
    with pytest.raises(BackendError, match="freeze the base"):
        denoise_chain(nets[1], noise, steps, feature=feature, backend="cuda")


@gpu
def test_kernel_in_a_cuda_graph():
    nets, *rest = on_device(problem_of(50, 512), "cuda")
    how = {"ft_steps": 2, "ft_dtype": torch.bfloat16, "backend": "cuda"}
    right = denoise_chain_cluster(nets[1], nets[0], *rest, **how)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = denoise_chain_cluster(nets[1], nets[0], *rest, **how)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(out, right, strict=True))


@gpu
def test_bad_tensors_are_refused_by_the_operator():
    nets, feature, noise, steps = on_device(problem_of(4, 256), "cuda")
    packed = pack(nets[0])
    cond = F.linear(feature, nets[0].cond_in, nets[0].cond_bias)
    call = torch.ops.diwa.denoise_chain_cluster.default
    args = [noise, cond, cond, packed, packed, step_table(steps), 2, 2, 3.0]
    call(*args)
    for which, bad, message in (
        (0, noise[:, :, :3], "L \\* A must be"),
        (1, cond[:2], "cond must be contiguous, of"),
        (3, packed[:-1], "8 tensors"),
        (5, steps.p, "steps must be"),
        (6, 9, "base_steps must lie"),
        (2, cond.cpu(), "must be on the device"),
    ):
        spoiled = [*args]
        spoiled[which] = bad
        with pytest.raises(RuntimeError, match=message):
            call(*spoiled)
