"""diwa: fine-tune robot diffusion policies by reinforcement learning inside a learned world model.

Letters, the same in every file:

| letter | meaning |
|---|---|
| `B`  | batch |
| `T`  | time |
| `N`  | parallel dreams (imagined environments) |
| `H`  | deterministic state size (1024) |
| `S`, `C` | stochastic groups, classes per group (32, 32) |
| `Z`  | `S*C`, stochastic state size |
| `F`  | `H+Z`, feature size (2048) |
| `E`  | embedding size |
| `O`  | observation size |
| `A`  | action dimension (7) |
| `L`  | action-chunk length (4) |
| `K`  | denoising steps (20) |
| `Kf` | fine-tuned denoising steps (10) |
| `M`  | PPO minibatch |

Importing diwa never fails for want of a compiled library, a GPU or Triton, and never compiles
anything: what could not be loaded is in `diwa.LOAD_ERRORS` and the plain torch implementation runs.
"""

import importlib
from types import ModuleType

from ._native import LOAD_ERRORS
from .ops.registry import support_table, use_backend

__version__ = "0.1.0"
__all__ = ["LOAD_ERRORS", "__version__", "support_table", "use_backend"]

# Loaded on first use, so that `import diwa` stays light.
_SUBMODULES = {"nn", "envs", "data", "rl", "phases", "config", "run", "report"}


def __getattr__(name: str) -> ModuleType:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module 'diwa' has no attribute {name!r}")
