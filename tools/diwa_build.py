"""PEP 517 backend: setuptools, plus torch as a build requirement only where there is none.

pip hides the target environment from `sys.path` during an isolated build but keeps `sys.prefix`.
The torch found there is used for its headers and `libtorch_cpu.so`; it is never imported. The
libraries use only torch's stable ABI, so the torch built against need not be the one run with.
"""

import importlib.util
import os
import sysconfig

from setuptools import build_meta as _setuptools
from setuptools.build_meta import *  # noqa: F403

FALLBACK_TORCH = "torch==2.13.0"
_STABLE_HEADER = os.path.join("include", "torch", "csrc", "stable", "library.h")


def find_torch():
    """Folder of the torch to build against, or None. `DIWA_TORCH_DIR` overrides the search."""
    if os.environ.get("DIWA_TORCH_DIR"):
        return os.environ["DIWA_TORCH_DIR"]
    spec = importlib.util.find_spec("torch")
    if spec and spec.submodule_search_locations:
        return list(spec.submodule_search_locations)[0]
    for key in ("platlib", "purelib"):
        folder = os.path.join(sysconfig.get_paths()[key], "torch")
        if os.path.exists(os.path.join(folder, _STABLE_HEADER)):
            return folder
    return None


def _with_torch(requirements):
    return list(requirements) + ([] if find_torch() else [FALLBACK_TORCH])


def get_requires_for_build_wheel(config_settings=None):
    return _with_torch(_setuptools.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings=None):
    return _with_torch(_setuptools.get_requires_for_build_editable(config_settings))
