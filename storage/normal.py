"""Invert the CDF of the normal distribution, with the same bits on every machine.

Uses no libm, which differs between machines: only + - * / and sqrt in float64, which round exactly.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from storage.kernels import inline, jit

SQRT_HALF = math.sqrt(0.5)
LN_2 = math.log(2.0)
MIDDLE = 0.425  # where AS 241 switches from one rational function to the next


@jit
def ln(x: Any) -> Any:
    """Return ln x for x > 0 to about 2e-16, without libm, which differs between machines.

    ln x = e ln 2 + 2 artanh s with x = m 2^e, sqrt(1/2) <= m < sqrt(2), s = (m - 1) / (m + 1).
    """
    m, e = math.frexp(x)
    if m < SQRT_HALF:
        m *= 2.0
        e -= 1
    s = (m - 1.0) / (m + 1.0)
    t = s * s
    series = 0.0
    for k in range(21, 0, -2):  # t < 0.0295, so the first term left out is below 1e-18
        series = series * t + 1.0 / k
    return e * LN_2 + 2.0 * s * series


@inline
def normal_middle(q: Any) -> Any:
    """Return the inverse of the normal CDF at 1/2 + q for abs(q) <= 0.425; relative error 1e-16.

    Algorithm AS 241, PPND16: Wichura, "The percentage points of the normal distribution", Applied
    Statistics 37 (1988); a rational function of q here, and of sqrt(-ln p) in ``normal_tail``.
    """
    r = 0.180625 - q * q
    top = 2.5090809287301226727e3
    top = top * r + 3.3430575583588128105e4
    top = top * r + 6.7265770927008700853e4
    top = top * r + 4.5921953931549871457e4
    top = top * r + 1.3731693765509461125e4
    top = top * r + 1.9715909503065514427e3
    top = top * r + 1.3314166789178437745e2
    top = top * r + 3.3871328727963666080e0
    low = 5.2264952788528545610e3
    low = low * r + 2.8729085735721942674e4
    low = low * r + 3.9307895800092710610e4
    low = low * r + 2.1213794301586595867e4
    low = low * r + 5.3941960214247511077e3
    low = low * r + 6.8718700749205790830e2
    low = low * r + 4.2313330701600911252e1
    return q * top / (low * r + 1.0)


@jit
def normal_tail(p: Any) -> Any:
    """Return the inverse of the normal CDF at p for 0 < p < 0.075; see ``normal_middle``."""
    r = np.sqrt(-ln(p))
    if r <= 5.0:
        r -= 1.6
        top = 7.74545014278341407640e-4
        top = top * r + 2.27238449892691845833e-2
        top = top * r + 2.41780725177450611770e-1
        top = top * r + 1.27045825245236838258e0
        top = top * r + 3.64784832476320460504e0
        top = top * r + 5.76949722146069140550e0
        top = top * r + 4.63033784615654529590e0
        top = top * r + 1.42343711074968357734e0
        low = 1.05075007164441684324e-9
        low = low * r + 5.47593808499534494600e-4
        low = low * r + 1.51986665636164571966e-2
        low = low * r + 1.48103976427480074590e-1
        low = low * r + 6.89767334985100004550e-1
        low = low * r + 1.67638483018380384940e0
        low = low * r + 2.05319162663775882187e0
    else:
        r -= 5.0
        top = 2.01033439929228813265e-7
        top = top * r + 2.71155556874348757815e-5
        top = top * r + 1.24266094738807843860e-3
        top = top * r + 2.65321895265761230930e-2
        top = top * r + 2.96560571828504891230e-1
        top = top * r + 1.78482653991729133580e0
        top = top * r + 5.46378491116411436990e0
        top = top * r + 6.65790464350110377720e0
        low = 2.04426310338993978564e-15
        low = low * r + 1.42151175831644588870e-7
        low = low * r + 1.84631831751005468180e-5
        low = low * r + 7.86869131145613259100e-4
        low = low * r + 1.48753612908506148525e-2
        low = low * r + 1.36929880922735805310e-1
        low = low * r + 5.99832206555887937690e-1
    return -top / (low * r + 1.0)
