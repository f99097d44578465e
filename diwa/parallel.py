"""Several processes that train one model, as `torchrun` starts them; nothing in a single process.

`torchrun --nproc-per-node 2 -m diwa world-model ...` starts the same command twice. `session` joins
the processes; inside it every function here works on the group that they form. Outside, and in an
ordinary process, they describe or do what one process needs: rank 0 of 1, no communication. So code
calls them without asking.

    with parallel.session("cuda") as device:         # "cuda:1" in the second process
        parallel.broadcast_module(model)             # all start from rank 0's weights
        share = parallel.share(batch_size)           # rows of the global batch of this process
        loss(batch[share]).backward()                # a mean over equal shares
        parallel.all_reduce_gradients(model.parameters())
        optimizer.step()                             # so the weights stay equal everywhere

Collectives must be called by all processes in the same order. CPU tensors travel by gloo, CUDA
tensors by NCCL.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import RunError

TIMEOUT = timedelta(hours=2)
"""How long the others wait for what rank 0 does alone, such as writing a checkpoint."""


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def launched() -> bool:
    """Whether `torchrun` started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if _joined() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if _joined() else 1


def is_main() -> bool:
    """Whether this process writes files and shows progress: rank 0."""
    return rank() == 0


@contextmanager
def session(device: str = "cpu") -> Iterator[str]:
    """Join the processes that `torchrun` started, for the `with` block.

    Args:
        device: `cpu` or `cuda`, the same in all processes.

    Yields:
        The device of this process: `cuda` becomes the GPU with the number `LOCAL_RANK`.

    Raises:
        RunError: fewer GPUs than processes on this machine, or a `device` with a number.
    """
    if not launched() or _joined():
        yield device
        return
    backend, mine = "gloo", device
    if torch.device(device).type == "cuda":
        backend, mine = "cpu:gloo,cuda:nccl", _own_gpu(device)
        torch.cuda.set_device(mine)
    dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        barrier()
        yield mine
    finally:
        dist.destroy_process_group()


def _own_gpu(device: str) -> str:
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if device != "cuda":
        raise RunError(f"--device {device}: several processes take `--device cuda`, one GPU each")
    if local >= count:
        raise RunError(
            f"process {local} of this machine has no GPU of its own, there are {count}; "
            f"start at most that many (`torchrun --nproc-per-node`) or use --device cpu"
        )
    return f"cuda:{local}"


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.all_reduce(torch.zeros(1))  # on the CPU, also where the models are on GPUs


def on_main(function: Callable[[], object]) -> None:
    """Call `function` in rank 0 while the others wait, for what must be done once.

    Raises:
        RunError: in the others, when it failed in rank 0, which has its own error.
    """
    if world_size() == 1:
        function()
        return
    failed = torch.zeros(1)
    try:
        if is_main():
            function()
    except BaseException:
        failed.fill_(1.0)
        raise
    finally:
        dist.broadcast(failed, src=0)
    if failed.item():
        raise RunError("stopped, because process 0 has: its own message says why")


def share(size: int, name: str = "the number of rows") -> slice:
    """The part of `size` rows that belongs to this process: equal, consecutive parts in rank order.

    Args:
        size: rows of all processes together.
        name: what an error calls `size`, such as the setting that it comes from.

    Raises:
        RunError: the number of processes does not divide `size`.
    """
    count = world_size()
    if size % count:
        raise RunError(
            f"{name} is {size}, which {count} processes cannot divide equally; "
            f"choose a multiple of {count}, or another number of processes"
        )
    part = size // count
    return slice(rank() * part, (rank() + 1) * part)


def broadcast_module(module: nn.Module) -> None:
    """Give parameters and buffers of `module` rank 0's values, in place."""
    if world_size() > 1:
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor, src=0)


def all_reduce_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients over the processes, in place, in one message.

    Parameters without a gradient are left out; they must be the same ones in all processes, as they
    are where all run the same code. Gradients are of one dtype and device.
    """
    if world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return
    bucket = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(bucket)
    bucket /= world_size()
    parts = bucket.split([g.numel() for g in gradients])
    shaped = [part.view_as(g) for part, g in zip(parts, gradients, strict=True)]
    torch._foreach_copy_(gradients, shaped)


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """Mean of a floating-point `tensor` over the processes, as a new tensor without gradient."""
    mean = tensor.detach().clone()
    if world_size() > 1:
        dist.all_reduce(mean)
        mean /= world_size()
    return mean


def gather(tensor: Tensor, dim: int = 0) -> Tensor:
    """The processes' tensors of equal shapes laid side by side along `dim`, in rank order, in all
    processes; undoes `share`."""
    if world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts, dim)
