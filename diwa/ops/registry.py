"""Which implementation of an operator runs.

Every operator declares its variants in order of preference. `"auto"` takes the first that fits the
device and dtype at hand and says once, in one line, when that is not the one preferred there. A
forced backend (the `backend=` argument, `use_backend`, or the environment variable DIWA_BACKEND)
that cannot run raises with the reason.
"""

import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .._native import LOAD_ERRORS

BACKENDS = ("auto", "reference", "cpu", "cuda", "triton")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_log = logging.getLogger("diwa")
_said: set[tuple[str, str, str]] = set()


class BackendError(RuntimeError):
    """A forced backend cannot run; the message says why."""


def _check_name(name: str, where: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{where}: unknown backend {name!r}; choose one of {', '.join(BACKENDS)}")
    return name


# Process-wide, and plain, so that torch.compile can trace and guard on it.
_forced = _check_name(os.environ.get("DIWA_BACKEND", "auto") or "auto", "DIWA_BACKEND")


@dataclass(frozen=True)
class Variant:
    """One implementation of an operator: where it runs and, if it is missing, why."""

    backend: str
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    missing: str = ""
    forced_devices: tuple[str, ...] = ()  # only when asked for by name

    def problem(self, device: str, dtype: torch.dtype, forced: bool) -> str:
        """Why this variant cannot take such a tensor; empty if it can."""
        if self.missing:
            return self.missing
        if device not in self.devices and not (forced and device in self.forced_devices):
            runs_on = " and ".join(self.devices or self.forced_devices)
            return f"runs on {runs_on} tensors, not {device}"
        if dtype not in self.dtypes:
            return f"takes {', '.join(_short(d) for d in self.dtypes)}, not {_short(dtype)}"
        return ""


_ops: dict[str, tuple[Variant, ...]] = {}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def reference() -> Variant:
    """Plain torch: every device, every floating dtype."""
    return Variant("reference", ("cpu", "cuda"), FLOATS)


def native(backend: str, op: str, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> Variant:
    """A C++ (`"cpu"`) or CUDA (`"cuda"`) implementation of the torch operator `diwa::<op>`."""
    library = f"libdiwa_{backend}.so"
    missing = LOAD_ERRORS.get(library, "")
    key = backend.upper()
    if not missing and not _has_kernel(op, key):
        missing = f"{library} has no {op}; build diwa again"
    return Variant(backend, (backend,), dtypes, f"{library}: {missing}" if missing else "")


def _has_kernel(op: str, key: str) -> bool:
    try:
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"diwa::{op}", key)
    except RuntimeError:  # a library of an earlier version does not know the operator
        return False


def triton(module: str, dtypes: tuple[torch.dtype, ...], automatic: bool = True) -> Variant:
    """A Triton implementation in `diwa.kernels.<module>`, imported at its first use.

    Under TRITON_INTERPRET=1 it also takes CPU tensors when it is forced. With `automatic=False` it
    only runs when it is forced.
    """
    missing = ""
    kernels = importlib.util.find_spec("diwa.kernels")
    if importlib.util.find_spec("triton") is None:
        missing = "triton is not installed; `pip install triton`"
    elif kernels is None:
        missing = "diwa.kernels is not there; install diwa instead of importing its source folder"
    elif not any(
        (Path(p) / f"{module}.py").exists() for p in kernels.submodule_search_locations or ()
    ):
        missing = f"diwa.kernels.{module} is not there"
    forced = ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)
    return Variant("triton", ("cuda",) if automatic else (), dtypes, missing, forced)


def declare(op: str, *variants: Variant) -> None:
    """Registers the variants of an operator, the preferred first and the reference last."""
    if variants[-1].backend != "reference":
        raise ValueError(f"{op}: the last variant must be the reference")
    _ops[op] = variants


def choose(op: str, like: Tensor, backend: str = "auto", unfit: Mapping[str, str] = {}) -> str:  # noqa: B006
    """The backend that runs `op` on tensors with the device and dtype of `like`.

    `unfit` names backends that cannot take this very call, with the reason (a size, say).

    Raises:
        ValueError: unknown backend name.
        BackendError: the backend was forced and cannot run.
    """
    wanted = _check_name(backend, op) if backend != "auto" else _forced
    device, dtype = like.device.type, like.dtype
    passed_over = ""
    for variant in _ops[op]:
        name = variant.backend
        problem = variant.problem(device, dtype, wanted == name) or unfit.get(name, "")
        if wanted == name:
            if problem:
                raise BackendError(f"{op}: backend {name!r} cannot run: {problem}")
            return name
        if wanted == "auto":
            if not problem:
                if passed_over and not torch.compiler.is_compiling():
                    _say_once(op, name, passed_over)
                return name
            if device in variant.devices:
                passed_over = passed_over or f"{name}: {problem}"
    if wanted != "auto":
        raise BackendError(f"{op}: there is no {wanted!r} backend for this operator")
    raise BackendError(f"{op}: no backend takes {_short(dtype)} tensors on {device}")


def _say_once(op: str, chosen: str, why: str) -> None:
    if (op, chosen, why) not in _said:
        _said.add((op, chosen, why))
        _log.warning("diwa: %s runs on the %s backend (%s)", op, chosen, why)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces a backend for every operator called inside (process-wide, not per thread).

    Args:
        name: one of `BACKENDS`; `"auto"` lifts a force set outside.
    Raises:
        ValueError: unknown name.
    """
    global _forced
    before, _forced = _forced, _check_name(name, "use_backend")
    try:
        yield
    finally:
        _forced = before


def support_table() -> list[dict[str, str | bool]]:
    """One row per operator and backend, as `diwa info` prints it.

    Keys: `op`; `backend`; `dtypes`; `available` (can it run on this machine?); `reason` (why not);
    `chosen` (the devices, of those here, whose float32 tensors it gets by itself; may be empty).
    """
    here = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    rows: list[dict[str, str | bool]] = []
    for op, variants in _ops.items():
        first = {
            d: next(v for v in variants if not v.problem(d, torch.float32, False)) for d in here
        }
        for v in variants:
            reason = v.missing
            if not reason and not set(v.devices + v.forced_devices) & set(here):
                reason = "no CUDA device"
            rows.append(
                {
                    "op": op,
                    "backend": v.backend,
                    "dtypes": ", ".join(_short(d) for d in v.dtypes),
                    "available": not reason,
                    "reason": reason,
                    "chosen": ", ".join(d for d in here if first[d] is v),
                }
            )
    return rows
