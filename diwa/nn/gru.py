"""GRUCell: torch.nn.GRUCell on the `gru_cell` operator."""

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import gru_cell


class GRUCell(nn.GRUCell):
    """A torch.nn.GRUCell whose gates run in one fused pass, forward and backward.

    Same parameters, initialisation and state_dict as torch.nn.GRUCell, which it subclasses, so
    checkpoints go both ways. Differentiable once; `backend="reference"` allows double backward.

    Equivalent to:

    >>> import torch, diwa.nn
    >>> fused, plain = diwa.nn.GRUCell(8, 16), torch.nn.GRUCell(8, 16)
    >>> fused.load_state_dict(plain.state_dict())
    <All keys matched successfully>
    >>> x, h = torch.randn(4, 8), torch.randn(4, 16)
    >>> torch.allclose(fused(x, h), plain(x, h), atol=1e-6)
    True

    Args:
        input_size: features `I` of the input.
        hidden_size: state size `H`.
        bias: with `bias_ih` and `bias_hh`.
        device, dtype: of the parameters.
        backend: `"auto"`, or one that every call of this module is to use.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device=device, dtype=dtype)
        self.backend = backend

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """The state after one step.

        Args:
            input: `[B, I]` or `[I]`.
            hx: `[B, H]` or `[H]` state before; zeros if None.
        Returns:
            `[B, H]` or `[H]`, in the dtype of the state.
        Raises:
            ValueError, TypeError: wrong shape, device or dtype.
        """
        if input.dim() not in (1, 2):
            raise ValueError(f"GRUCell: input must be [B, I] or [I], got {list(input.shape)}")
        if hx is None:
            hx = input.new_zeros(*input.shape[:-1], self.hidden_size)
        if hx.dim() != input.dim():
            raise ValueError(f"GRUCell: input is {input.dim()}-D but hx is {hx.dim()}-D")
        x, h = (input, hx) if input.dim() == 2 else (input.unsqueeze(0), hx.unsqueeze(0))
        out = gru_cell(
            x, h, self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh, backend=self.backend
        )
        return out if input.dim() == 2 else out.squeeze(0)
