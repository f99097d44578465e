"""Cases of the single steps `gru_cell` and `mish`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import diwa.ops

from .harness import Case
from .inputs import Size, compiled, generator
from .peers.chain import exp_mish


def gru_cell(size: Size, batch: int, compile_peers: bool) -> Case:
    """One cell step of the world model."""
    cell = torch.nn.GRUCell(size.hidden, size.deter).requires_grad_(False)
    x = torch.randn(batch, size.hidden, generator=generator(1))
    h = torch.randn(batch, size.deter, generator=generator(2)).tanh()
    weights = (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)

    def ours() -> torch.Tensor:
        return diwa.ops.gru_cell(x, h, *weights)

    def errors() -> tuple[float, float, float]:
        w64 = [w.double() for w in weights]
        exact = diwa.ops.reference.gru_cell(x.double(), h.double(), *w64)
        eager = (cell(x, h).double() - exact).abs().max().item()
        return (ours().double() - exact).abs().max().item(), eager, 2 * eager + 1e-6

    peers = {"original": lambda: cell(x, h)}
    if compile_peers:
        fast = compiled(cell)
        peers["compile"] = lambda: fast(x, h)
    flops = batch * 6.0 * size.deter * (size.hidden + size.deter)
    return Case("gru_cell", size.case(f"B={batch}"), "fp32", ours, peers, errors, flops)


def mish(size: Size, batch: int, compile_peers: bool) -> Case:
    """The activation of one hidden layer of the policy."""
    x = torch.randn(batch, size.width, generator=generator(1))

    def errors() -> tuple[float, float, float]:
        exact = diwa.ops.reference.mish(x.double())
        eager = (F.mish(x).double() - exact).abs().max().item()
        return (diwa.ops.mish(x).double() - exact).abs().max().item(), eager, 2 * eager + 1e-6

    peers = {"original": lambda: F.mish(x), "one exponential": lambda: exp_mish(x)}
    if compile_peers:
        fast = compiled(exp_mish)
        peers["compile one exponential"] = lambda: fast(x)
    name = size.case(f"B={batch}")
    return Case("mish", name, "fp32", lambda: diwa.ops.mish(x), peers, errors, 0.0)
