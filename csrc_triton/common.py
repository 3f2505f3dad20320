"""Device functions that several kernels share. Portable Triton: no libdevice, so that the interpreter runs them."""

import triton
import triton.language as tl


@triton.jit
def log1p(s):
    """log(1 + s) for s >= 0 with full relative precision near 0, where the hardware logarithm has none.

    For s <= 1/2 the series of 2 atanh(t), t = s / (2 + s) <= 1/5, truncated below 1e-9 relative.
    """
    t = s / (2.0 + s)
    u = t * t
    series = 2.0 * t * (1.0 + u * (1.0 / 3 + u * (1.0 / 5 + u * (1.0 / 7 + u * (1.0 / 9 + u * (1.0 / 11))))))
    return tl.where(s <= 0.5, series, tl.log(1.0 + s))


@triton.jit
def softplus(a):
    """log(1 + exp(a)), for any a."""
    return tl.maximum(a, 0.0) + log1p(tl.exp(-tl.abs(a)))


@triton.jit
def sigmoid(a):
    """1 / (1 + exp(-a)), relative precision kept for a -> -inf."""
    e = tl.exp(-tl.abs(a))
    return tl.where(a >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def tanh(x):
    """tanh with relative precision near 0: its series there, exponentials elsewhere."""
    u = x * x
    series = x * (1.0 + u * (-1.0 / 3 + u * (2.0 / 15 + u * (-17.0 / 315 + u * (62.0 / 2835)))))
    e = tl.exp(-2.0 * tl.abs(x))
    outer = (1.0 - e) / (1.0 + e)
    return tl.where(u < 0.0625, series, tl.where(x < 0, -outer, outer))
