"""Whether a device can be used: said before any work is done, with the reason and the way out."""

from __future__ import annotations

import torch

from .errors import DeviceError

_HELP = "add `--device cpu`, or see GPU in the README"


def check_device(name: str) -> None:
    """Refuse a device that this machine, its driver or this torch cannot compute on.

    Args:
        name: `cpu`, `cuda` or `cuda:1`.

    Raises:
        DeviceError: unknown name, no GPU, a driver that is too old, no GPU of that number, or one
            of an architecture that this torch has no kernels for.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"there is no device '{name}'; choose cpu, cuda or cuda:NUMBER") from None
    if device.type == "cpu":
        return
    if device.type != "cuda":
        raise DeviceError(f"diwa does not compute on '{name}'; choose cpu, cuda or cuda:NUMBER")
    if not torch.cuda.is_available():
        raise DeviceError(f"no CUDA device is to be had here ({_no_cuda()}); {_HELP}")
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        raise DeviceError(f"there is no {name} here, the last of {count} is cuda:{count - 1}")
    capability, known = torch.cuda.get_device_capability(device), torch.cuda.get_arch_list()
    if known and not any(_runs(arch, capability) for arch in known):
        raise DeviceError(
            f"{name} ({torch.cuda.get_device_name(device)}) has compute capability "
            f"{capability[0]}.{capability[1]}, for which torch {torch.__version__} has no kernels "
            f"(it has {', '.join(known)}); install a torch that has them, or add `--device cpu`"
        )


def _no_cuda() -> str:
    """Why there is no CUDA device: torch, driver or hardware."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # such as: the NVIDIA driver is too old
        return str(error).strip().partition("\n")[0].rstrip(".")
    return "no GPU is visible, see CUDA_VISIBLE_DEVICES"


def _runs(arch: str, capability: tuple[int, int]) -> bool:
    """Whether kernels for `arch`, such as sm_90a or compute_80, run on a device.

    Machine code runs on its own major version from its minor version on; the intermediate code of
    a compute_ entry on everything newer. A letter ties code to one architecture or family.
    """
    kind, _, number = arch.partition("_")
    tied, digits = number[-1:].isalpha(), number.rstrip("af")
    major, minor = int(digits[:-1]), int(digits[-1])
    if kind == "compute" and not tied:
        return (major, minor) <= capability
    return major == capability[0] and minor <= capability[1]
