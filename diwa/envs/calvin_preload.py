"""For the fork server: imports CALVIN's simulator, so that its children need not, one by one."""

import contextlib

from diwa.envs.calvin import import_calvin
from diwa.errors import SimulatorError

with contextlib.suppress(SimulatorError):  # the child that makes a simulator explains it
    import_calvin()
