"""How much faster speculation is: Leviathan et al. 2022, sections 3.1 and 3.3.

    E[tokens per pass]  =  (1 − α^(γ+1)) / (1 − α)                    equation 1
    speed-up            =  E / (γ c + 1)                              theorem 3.8

The 1 is a pass of the target over γ + 1 tokens. The paper takes it to cost as much as
one over a single token, as it does where reading the weights takes all the time. Where
it does not, `wide` says how much more it costs.

    α  probability that a drafted token stays
    γ  drafted tokens per pass
    c  time of a draft's pass over a target's pass

Simplified: α is the same at each place, and independent of what came before.
"""

from __future__ import annotations


def expected_tokens(alpha: float, gamma: int) -> float:
    """Tokens per pass of the target: those that stay, and one more.

    Raises:
        ValueError: α is no probability, or γ is negative.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} must lie between 0 and 1")
    if gamma < 0:
        raise ValueError(f"gamma={gamma} must be 0 or more")
    return sum(alpha**i for i in range(gamma + 1))  # also for α = 1


def speedup(alpha: float, gamma: int, c: float, wide: float = 1.0) -> float:
    """Tokens per second, over those of plain decoding.

    Args:
        wide: time of a pass over γ + 1 tokens, in passes over one.
    Raises:
        ValueError: as `expected_tokens`; a time that is negative, or no time at all.
    """
    if c < 0:
        raise ValueError(f"c={c} must be 0 or more")
    if wide <= 0:
        raise ValueError(f"wide={wide} must be above 0")
    return expected_tokens(alpha, gamma) / (gamma * c + wide)


def best_gamma(alpha: float, c: float, most: int = 32) -> int:
    """The γ of the greatest speed-up, 0 where speculation does not pay."""
    return max(range(most + 1), key=lambda gamma: speedup(alpha, gamma, c))
