"""Starts a function in several processes that find each other as under `torchrun`, on the CPU."""

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp


def _entry(
    rank: int, world: int, port: int, function: Callable[..., Any], arguments: tuple
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    torch.set_num_threads(1)
    function(*arguments)


def run_ranks(function: Callable[..., Any], *arguments: Any, world: int = 2) -> None:
    """Call `function(*arguments)`, of a test module, in `world` processes; raises if one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_entry, (world, port, function, arguments), nprocs=world)
