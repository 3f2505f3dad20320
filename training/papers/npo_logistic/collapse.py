"""The rate of collapse (arXiv 2404.05868, theorem 2): gradient ascent diverges linearly, NPO logarithmically.

Logistic regression on n orthonormal rows X in R^p, gradient steps of size eta on the mean loss, margins
m_i = y_i x_i.theta, log p_i = log sigma(m_i), from margins drawn from N(0, 1). Far from there, where p is small,

    GA     dm/dt -> -eta/n                          ||X (theta_t - theta_0)|| -> (eta / sqrt(n)) t
    NPO    dm/dt -> -(2 eta/n) (p/p_ref)^beta       ||X (theta_t - theta_0)|| -> (sqrt(n) / beta) log t

Rows are orthonormal, so that the margins obey the same recursion as theta, in n instead of p dimensions:
m <- m - eta dL/dm. The larger beta is, the longer p stays away from 0 and the later the rate is reached, far beyond the
steps that can be taken one by one; so gradient flow takes over from them, which steps that small follow anyway.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.integrate import solve_ivp
from scipy.special import expit, log_expit

NUM_ROWS = 64
BETAS = (0.1, 1.0, 5.0)
ETA = 1.0
STEPS, UNTIL = 10_000, 1e12  # gradient steps, and the time at which gradient flow ends


@dataclass(frozen=True)
class Divergence:
    """How far one method has gone."""

    beta: float | None  # None: gradient ascent
    steps: np.ndarray  # (E,) t, equally spaced in log t
    distance: np.ndarray  # (E,) ||X (theta_t - theta_0)||

    @property
    def measured(self) -> float:
        """Of GA the exponent, d log distance / d log t; of NPO d distance / d log t; both over the last decade."""
        last = self.steps >= self.steps[-1] / 10
        y = np.log(self.distance) if self.beta is None else self.distance
        return float(np.polyfit(np.log(self.steps[last]), y[last], 1)[0])

    @property
    def theory(self) -> float:
        return 1.0 if self.beta is None else NUM_ROWS**0.5 / self.beta


def diverge(
    betas: tuple[float, ...] = BETAS, steps: int = STEPS, until: float = UNTIL, seed: int = 0
) -> list[Divergence]:
    """GA, then NPO for every beta, by `steps` gradient steps and gradient flow from there to time `until`."""
    start = np.random.default_rng(seed).normal(size=NUM_ROWS)
    found = []
    for beta in (0.0, *betas):  # NPO at beta = 0 is GA: its weight 2 sigma(beta log(p/p_ref)) is 1 there

        def rate(margin: np.ndarray, beta: float = beta) -> np.ndarray:
            weight = 2 * expit(beta * (log_expit(margin) - log_expit(start)))
            return -ETA / NUM_ROWS * weight * expit(-margin)

        at, margins = _steps(rate, start, steps)
        if until > steps:
            later = np.geomspace(steps, until, 200)
            flow = solve_ivp(
                lambda log_t, m, rate=rate: np.exp(log_t) * rate(m),  # in log t, as that is how NPO moves
                np.log(later[[0, -1]]),
                margins[-1],
                method="LSODA",
                t_eval=np.log(later),
                rtol=1e-8,
                atol=1e-8,
            )
            at, margins = np.append(at, later[1:]), np.vstack([margins, flow.y.T[1:]])
        found.append(Divergence(beta or None, at, np.linalg.norm(margins - start, axis=1)))
    return found


def _steps(rate: Callable[[np.ndarray], np.ndarray], start: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """(E,) step numbers, equally spaced in their logarithm, and (E, n) margins after them."""
    at = np.unique(np.geomspace(1, steps, 100).astype(int))
    margin, margins, wanted = start, [], set(at.tolist())
    for step in range(1, steps + 1):
        margin = margin + rate(margin)
        if step in wanted:
            margins.append(margin)
    return at.astype(float), np.stack(margins)
