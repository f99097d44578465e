"""What a user may do with any nn.Module works with every public one of diwa.nn."""

import copy
import os
import subprocess
import sys

import pytest
import torch
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import diwa.nn
from diwa.config import PolicyConfig

H, S, C, E, A, W, L, K = 24, 4, 5, 18, 3, 16, 2, 6
F = H + S * C


def _rssm_inputs():
    g = torch.Generator().manual_seed(0)
    shape, n = (3, 2), 2
    return (
        torch.randn(*shape, E, generator=g),
        torch.randn(*shape, A, generator=g),
        torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 1.0]]),
        diwa.nn.RSSMState(torch.zeros(n, H), torch.zeros(n, S * C)),
        torch.rand(*shape, S, generator=g),
    )


class Observe(torch.nn.Module):
    """An RSSM as part of a user's module; its inputs follow the parameters' dtype."""

    def __init__(self, rssm):
        super().__init__()
        self.rssm = rssm

    def forward(self, embed, action, reset, state, uniform):
        dtype = self.rssm.cell_z.weight.dtype
        embed, action, reset = (x.to(dtype) for x in (embed, action, reset))
        state = diwa.nn.RSSMState(*(x.to(dtype) for x in state))
        post = self.rssm.observe(embed, action, reset, state, uniform)
        return torch.cat([post.h, post.z, self.rssm.prior_logits(post.h).flatten(-2)], -1)


class LogProb(torch.nn.Module):
    """A DiffusionPolicy as part of a user's module."""

    def __init__(self, policy):
        super().__init__()
        self.policy = policy

    def forward(self, feature, chain):
        dtype = self.policy.net.out.weight.dtype
        return self.policy.chain_log_prob(feature.to(dtype), chain.to(dtype))


class Denoise(torch.nn.Module):
    """A DenoisingMLP as part of a user's module."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, step, feature):
        dtype = self.net.out.weight.dtype
        cond = self.net.cond_in(feature.to(dtype))
        return self.net(x.to(dtype), self.net.time_table()[step].to(dtype), cond)


class Classify(torch.nn.Module):
    """A RewardClassifier that takes its own dtype."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, feature):
        return self.head(feature.to(self.head.embed[0].weight.dtype))


class Cell(torch.nn.Module):
    """A GRUCell that takes its own dtype."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x, h):
        dtype = self.cell.weight_ih.dtype
        return self.cell(x.to(dtype), h.to(dtype))


def _policy():
    return diwa.nn.DiffusionPolicy(F, PolicyConfig(chunk=L, denoising_steps=K, width=W), A)


MODULES = {
    "GRUCell": (
        lambda: Cell(diwa.nn.GRUCell(E, H)),
        lambda: (torch.randn(5, E), torch.randn(5, H)),
    ),
    "RSSM": (lambda: Observe(diwa.nn.RSSM(A, E, H, S, C, W)), _rssm_inputs),
    "DiffusionPolicy": (
        lambda: LogProb(_policy()),
        lambda: (torch.randn(5, F), torch.randn(5, 4, L, A)),
    ),
    "DenoisingMLP": (
        lambda: Denoise(diwa.nn.DenoisingMLP(L * A, F, W, K)),
        lambda: (torch.randn(5, L * A), torch.tensor([0, 1, 2, 3, 5]), torch.randn(5, F)),
    ),
    "RewardClassifier": (
        lambda: Classify(diwa.nn.RewardClassifier(F, W, 8)),
        lambda: (torch.randn(5, F),),
    ),
}


@pytest.fixture(params=MODULES)
def made(request):
    make, inputs = MODULES[request.param]
    torch.manual_seed(0)
    return make, make(), inputs()


def _loss(module, inputs):
    out = module(*inputs).float()
    return (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum()


def _gradients(module):
    return [p.grad for p in module.parameters() if p.grad is not None]


def test_state_dict_round_trip(made, tmp_path):
    make, module, inputs = made
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    other = make()
    assert not torch.equal(other(*inputs), module(*inputs))
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    torch.testing.assert_close(other(*inputs), module(*inputs), rtol=0, atol=0)
    assert all(not name.startswith("_") for name in module.state_dict())


def test_deepcopy_is_independent(made):
    _, module, inputs = made
    before = module(*inputs).detach().clone()
    twin = copy.deepcopy(module)
    torch.testing.assert_close(twin(*inputs), before, rtol=0, atol=0)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1)
    torch.testing.assert_close(twin(*inputs), before, rtol=0, atol=0)
    assert not torch.equal(module(*inputs), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_to_another_dtype_and_back(made, dtype):
    _, module, inputs = made
    before = module(*inputs).detach().clone()
    moved = copy.deepcopy(module).to(dtype)
    out = moved(*inputs)
    assert out.isfinite().all()
    if dtype == torch.float64:
        torch.testing.assert_close(out.float(), before, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(moved.float()(*inputs), before, rtol=1e-5, atol=1e-5)


def test_autocast_bfloat16(made):
    _, module, inputs = made
    with torch.autocast("cpu", torch.bfloat16):
        loss = _loss(module, inputs)
    loss.backward()
    gradients = _gradients(module)
    assert gradients and all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients)


def test_compile(made):
    _, module, inputs = made
    _loss(module, inputs).backward()
    eager = [g.clone() for g in _gradients(module)]
    module.zero_grad()
    torch._dynamo.reset()
    fast = torch.compile(module, backend="aot_eager")
    torch.testing.assert_close(fast(*inputs), module(*inputs), rtol=1e-5, atol=1e-5)
    _loss(fast, inputs).backward()
    for a, b in zip(_gradients(module), eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def _train_in_parallel(rank, world, name, rendezvous, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world
    )
    make, inputs = MODULES[name]
    torch.manual_seed(0)
    module = make()
    torch.manual_seed(rank)
    parallel = DistributedDataParallel(module, find_unused_parameters=True)
    _loss(parallel, inputs()).backward()
    sums = torch.stack([g.double().sum() for g in _gradients(module)])
    torch.save(sums, f"{results}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", MODULES)
def test_distributed_data_parallel_with_gloo(name, tmp_path):
    """One process: wrapping changes nothing."""
    arguments = (1, name, str(tmp_path / "rendezvous"), str(tmp_path))
    _train_in_parallel(0, *arguments)
    make, inputs = MODULES[name]
    torch.manual_seed(0)
    module = make()
    torch.manual_seed(0)
    _loss(module, inputs()).backward()
    alone = torch.stack([g.double().sum() for g in _gradients(module)])
    torch.testing.assert_close(torch.load(tmp_path / "0.pt"), alone, rtol=1e-5, atol=1e-5)


def test_two_processes_share_their_gradients(tmp_path):
    arguments = (2, "GRUCell", str(tmp_path / "rendezvous"), str(tmp_path))
    mp.spawn(_train_in_parallel, arguments, nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    torch.testing.assert_close(first, second)


def test_public_names():
    assert set(diwa.nn.__all__) >= {
        "DenoisingMLP",
        "DiffusionPolicy",
        "GRUCell",
        "NoiseSchedule",
        "RSSM",
        "RSSMState",
        "RewardClassifier",
    }
    for name in diwa.nn.__all__:
        assert getattr(diwa.nn, name).__doc__


def test_import_of_diwa_stays_light():
    """Modules, suite and command line are loaded when they are asked for."""
    code = "import sys, diwa; print([m for m in sys.modules if m.startswith('diwa.')])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    ).stdout
    for name in ("diwa.nn", "diwa.bench", "diwa.benchmarks", "diwa.cli", "diwa.config"):
        assert f"'{name}'" not in out
