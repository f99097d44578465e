"""FrozenPolicy: a diffusion policy packed for sampling, which notices when its weights change."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn as nn
from torch import Tensor

from diwa._native import cpu_isa
from diwa.config import PolicyConfig
from diwa.ops import PackedNetwork, denoise_chain, step_table
from diwa.ops.reference_chain import Chain, ChainSteps

if TYPE_CHECKING:
    from diwa.nn.diffusion import DiffusionPolicy


class Source:
    """The tensors of a module that something was packed from, to be asked whether they changed.

    Every in-place change through torch counts a tensor's version up, as an optimiser's and that of
    `load_state_dict` do. Writing through `.data` or numpy does not. The tensors are held, so that
    no other one gets their addresses. Asking costs a few dictionary look-ups: walking a module's
    parameters takes longer than a small policy's first layers.

    Args:
        module: the module now, with all its submodules.
    """

    def __init__(self, module: nn.Module) -> None:
        registers = [
            register
            for part in module.modules()
            for register in (part._modules, part._parameters, part._buffers)
        ]
        self._entries = [(r, key, value) for r in registers for key, value in r.items()]
        tensors = [value for _, _, value in self._entries if isinstance(value, Tensor)]
        self._fixed = not any(t.is_inference() for t in tensors)
        self._seen = [(t, t.data_ptr(), t._version) for t in tensors] if self._fixed else []

    def changed(self) -> bool:
        """Whether a tensor or submodule is, or may be, another (inference tensors keep no
        version)."""
        if not self._fixed:
            return True
        for register, key, value in self._entries:
            if register.get(key) is not value:
                return True
        return any(t._version != v or t.data_ptr() != p for t, p, v in self._seen)


def frozen_dtype(setting: str, device: torch.device | str) -> torch.dtype:
    """The dtype of packed frozen weights; `auto`: bfloat16 where it is multiplied natively (a GPU,
    AVX512_BF16), float32 elsewhere.

    Args:
        setting: `auto`, `float32` or `bfloat16`.
        device: where the policy is sampled.
    """
    if setting == "auto":
        native = torch.device(device).type == "cuda" or cpu_isa() == "avx512_bf16"
        return torch.bfloat16 if native else torch.float32
    return torch.bfloat16 if setting == "bfloat16" else torch.float32


class FrozenPolicy:
    """Samples a `DiffusionPolicy` with weights packed once; see `DiffusionPolicy.freeze`.

    The policy may go on training: its parameters are looked at in every call (storage and version),
    and packed again when one has changed. A change made through `.data` or numpy is invisible to
    torch's version counters and must be followed by `refresh()`.

    Args:
        policy: the policy.
        dtype: float32 or bfloat16, of the packed weights in the last Kf steps.
        frozen_dtype: the same for the first K - Kf steps; `dtype` if None.

    Raises:
        TypeError: another dtype.
    """

    def __init__(
        self,
        policy: DiffusionPolicy,
        dtype: torch.dtype = torch.float32,
        frozen_dtype: torch.dtype | None = None,
    ) -> None:
        self.policy, self.dtype = policy, dtype
        self.frozen_dtype = dtype if frozen_dtype is None else frozen_dtype
        for given in (self.dtype, self.frozen_dtype):
            if given not in (torch.float32, torch.bfloat16):
                raise TypeError(f"freeze: float32 or bfloat16, got {given}")
        self.refresh()

    def refresh(self) -> None:
        """Forget everything packed."""
        self._source: Source | None = None
        self._packed: dict[torch.dtype, PackedNetwork] = {}
        self._tables: dict[tuple[PolicyConfig, bool], tuple[ChainSteps, Tensor]] = {}

    def packed(self, dtype: torch.dtype) -> PackedNetwork:
        """The network packed as `dtype`, up to date."""
        if self._source is None or self._source.changed():
            self.refresh()
            self._source = Source(self.policy)
        if dtype not in self._packed:
            with torch.no_grad():
                self._packed[dtype] = PackedNetwork(self.policy.network(), dtype)
        return self._packed[dtype]

    def tables(self, explore: bool) -> tuple[ChainSteps, Tensor]:
        """Tables of a sampling mode, also in the native operator's form."""
        key = (self.policy.config, explore)
        if key not in self._tables:
            steps = self.policy.schedule.tables(*key)
            self._tables[key] = steps, step_table(steps)
        return self._tables[key]

    def sample(
        self,
        feature: Tensor | tuple[Tensor, Tensor],
        noise: Tensor,
        *,
        base: FrozenPolicy | None = None,
        ft_steps: int = 0,
        explore: bool = False,
        backend: str = "auto",
    ) -> Chain:
        """As `DiffusionPolicy.sample`, without gradient.

        Args:
            feature: `[N, F]`, or `(h, z_idx)`: `[N, H]` and int64 class indices `[N, S]`.
            noise: `[K + 1, N, L, A]`.
            base: frozen policy of the first K - Kf steps; None uses this policy throughout.
            ft_steps: Kf, transitions to return in the chain.
            explore: exploratory deviations instead of the evaluation's.
            backend: of `diwa.ops.denoise_chain`.
        """
        config = self.policy.config
        tuned = self.packed(self.dtype)
        before = (base or self).packed((base or self).frozen_dtype)
        steps, table = self.tables(explore)
        dense, z_idx = feature if isinstance(feature, tuple) else (feature, None)
        chain = denoise_chain(
            tuned,
            noise.flatten(2),
            steps,
            feature=dense if z_idx is None else None,
            h=None if z_idx is None else dense,
            z_idx=z_idx,
            base=before,
            ft_steps=ft_steps,
            clip_noise=config.clip_noise,
            table=table,
            backend=backend,
        )
        shape = (config.chunk, self.policy.action_dim)
        return Chain(*(part.unflatten(-1, shape) for part in chain))
