"""FrozenRSSM: the packed form of an RSSM, for imagination without gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diwa.nn.frozen import Source
from diwa.ops.rssm_imagine import PackedRSSM, pack_rssm, rssm_imagine

if TYPE_CHECKING:
    from diwa.nn.rssm import RSSM


class FrozenRSSM:
    """Prior steps of an RSSM on weights packed once; made by `RSSM.freeze`.

    It follows its model: a parameter that was replaced, moved or written in place (an optimizer
    step, `load_state_dict`) is noticed before the next use by its storage and version counter, and
    all weights are packed again. Writes through `parameter.data` leave the version counter as it
    is; call `refresh` after those.

    Args:
        rssm: the model, not copied.
        dtype: float32 or bfloat16, of the packed weights and what they multiply.
    Raises:
        TypeError: another dtype.
    """

    def __init__(self, rssm: RSSM, dtype: torch.dtype = torch.float32) -> None:
        self.rssm, self.dtype = rssm, dtype
        self.refresh()

    def refresh(self) -> None:
        """Packs the model's weights again."""
        self._source = Source(self.rssm)
        self._packed = pack_rssm(self.rssm.prior_weights(), self.dtype)

    def stale(self) -> bool:
        """Whether a parameter has, or may have, changed since the weights were packed."""
        return self._source.changed()

    def packed(self) -> PackedRSSM:
        """The packed weights, up to date."""
        if self.stale():
            self.refresh()
        return self._packed

    def imagine(
        self,
        h: Tensor,
        z_idx: Tensor,
        actions: Tensor,
        uniforms: Tensor,
        *,
        temperature: float = 1.0,
        return_features: bool = False,
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """L prior steps of N dreams, without gradient (`diwa.ops.rssm_imagine`).

        Args:
            h: `[N, H]` state before.
            z_idx: `[N, S]` its classes in [0, C), int64 or int32.
            actions: `[L, N, A]`.
            uniforms: `[L, N, S]` in [0, 1), the randomness of the samples.
            temperature: positive; logits are divided by it.
            return_features: also return `[h, onehot(z)]`.
            backend: `"auto"`, `"reference"` or `"cpu"`.
        Returns:
            h `[L, N, H]`, z_idx `[L, N, S]` (int64) and features `[L, N, F]` or None.
        Raises:
            ValueError, TypeError: an argument has the wrong shape, device, dtype or range.
            BackendError: the backend was forced and cannot run.
        """
        return rssm_imagine(
            self.packed(),
            h,
            z_idx,
            actions,
            uniforms,
            temperature=temperature,
            unimix=self.rssm.unimix,
            eps=self.rssm.cell_norm.eps,
            return_features=return_features,
            backend=backend,
        )
