"""Initial weights: one row per rule, each a draw of (fan_out, fan_in) numbers from a generator.

All are centred on zero and differ in their variance. The normals are plain normals, not truncated at two standard
deviations (Keras truncates), so that the variance is the one in the equation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Draw = Callable[[np.random.Generator, int, int], np.ndarray]


@dataclass(frozen=True)
class Initializer:
    """One rule: ``draw(generator, fan_out, fan_in)`` returns W, (fan_out, fan_in) float64; ``source``: where from."""

    name: str
    draw: Draw
    source: str


def _uniform(variance: Callable[[int, int], float]) -> Draw:
    def draw(generator: np.random.Generator, fan_out: int, fan_in: int) -> np.ndarray:
        bound = np.sqrt(3.0 * variance(fan_out, fan_in))  # U(-c, c) has variance c² / 3
        return generator.uniform(-bound, bound, (fan_out, fan_in))

    return draw


def _normal(variance: Callable[[int, int], float]) -> Draw:
    def draw(generator: np.random.Generator, fan_out: int, fan_in: int) -> np.ndarray:
        return np.sqrt(variance(fan_out, fan_in)) * generator.standard_normal((fan_out, fan_in))

    return draw


def _orthogonal(generator: np.random.Generator, fan_out: int, fan_in: int) -> np.ndarray:
    """Orthonormal rows (W Wᵀ = 1) where fan_out <= fan_in, else orthonormal columns (Wᵀ W = 1)."""
    tall = generator.standard_normal((max(fan_out, fan_in), min(fan_out, fan_in)))
    q, r = np.linalg.qr(tall)
    # QR leaves the signs to LAPACK; with a positive diagonal of r the factors are unique, and q is uniform (Haar).
    q *= np.where(np.diag(r) < 0, -1.0, 1.0)
    return np.ascontiguousarray(q if fan_out >= fan_in else q.T)


def _glorot(fan_out: int, fan_in: int) -> float:
    return 2.0 / (fan_in + fan_out)


def _he(fan_out: int, fan_in: int) -> float:
    return 2.0 / fan_in


def _lecun(fan_out: int, fan_in: int) -> float:
    return 1.0 / fan_in


_GLOROT = "Glorot & Bengio 2010, equations 12 and 16: variance 2 / (fan_in + fan_out)"
_HE = "He et al. 2015, equation 10: variance 2 / fan_in"
_LECUN = "LeCun et al. 1998 (Efficient BackProp), equation 16: variance 1 / fan_in"

INITIALIZERS: dict[str, Initializer] = {
    row.name: row
    for row in (
        Initializer("zeros", lambda generator, fan_out, fan_in: np.zeros((fan_out, fan_in)), "W = 0"),
        Initializer("normal", _normal(lambda fan_out, fan_in: 0.01**2), "small normal: σ = 0.01 for any fan"),
        Initializer("glorot_uniform", _uniform(_glorot), _GLOROT),
        Initializer("glorot_normal", _normal(_glorot), _GLOROT),
        Initializer("he_uniform", _uniform(_he), _HE),
        Initializer("he_normal", _normal(_he), _HE),
        Initializer("lecun_uniform", _uniform(_lecun), _LECUN),
        Initializer("lecun_normal", _normal(_lecun), _LECUN),
        Initializer("orthogonal", _orthogonal, "Saxe et al. 2014, section 3; sign fix: Mezzadri 2007, section 5"),
    )
}


def get_initializer(name: str) -> Initializer:
    """Returns the row of `INITIALIZERS` with this name.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in INITIALIZERS:
        raise ValueError(f"initializer={name!r} is unknown; use one of {', '.join(INITIALIZERS)}")
    return INITIALIZERS[name]
