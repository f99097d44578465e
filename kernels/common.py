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


@triton.jit
def elu(x):
    """ELU; e^x - 1 = 2 t / (1 - t) with t = tanh(x / 2) keeps the digits of a small x."""
    t = tanh(0.5 * x)
    return tl.where(x > 0, x, 2.0 * t / (1.0 - t))


@triton.jit
def clamp(x, low, high):
    """x within [low, high]; NaN stays NaN, which tl.clamp does not promise."""
    x = tl.where(x > high, high, x)
    return tl.where(x < low, low, x)


@triton.jit
def softmax(x, mask):
    """Softmax over axis 1 of `[R, C]`; columns outside `mask` get 0."""
    x = tl.where(mask, x, float("-inf"))
    e = tl.exp(x - tl.max(x, 1)[:, None])
    e = tl.where(mask, e, 0.0)
    return e / tl.sum(e, 1)[:, None]


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def short_name(dtype: object) -> str:
    """`torch.float32` -> `float32`."""
    return str(dtype).removeprefix("torch.")
