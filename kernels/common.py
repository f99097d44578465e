"""Device functions shared by the kernels; they also run under Triton's interpreter."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """tanh without libdevice: an odd polynomial (Cephes tanhf) near zero, where the other form
    would cancel."""
    q = x * x
    p = -5.70498872745e-3
    p = p * q + 2.06390887954e-2
    p = p * q - 5.37397155531e-2
    p = p * q + 1.33314422036e-1
    p = p * q - 3.33332819422e-1
    return tl.where(q < 0.390625, p * q * x + x, 2.0 * tl.sigmoid(2.0 * x) - 1.0)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()
