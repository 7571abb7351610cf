"""Do patients with a higher predicted risk die earlier? Harrell's and Uno's concordance index.

A pair (i, j) is comparable if i has an event and j is known to live longer: T_i < T_j, or T_i = T_j and j is censored
(censoring at a time means alive at that time). Two events at the same time are not comparable. A comparable pair is
concordant if risk_i > risk_j, discordant if risk_i < risk_j, and counts half if the risks are equal:

    C = sum over pairs of w_i (1[risk_i > risk_j] + 1/2 1[risk_i = risk_j]) / sum over pairs of w_i

Harrell (1982): w = 1. Its value depends on how patients were censored. Uno (2011): w_i = 1 / G(T_i)^2 and only events
before tau, with G the Kaplan-Meier estimate of the chance to be uncensored past a time (of events and censorings at
one time, events come first); that takes the dependence away.

Without a comparable pair both are NaN.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Concordance:
    """Counts of comparable pairs, and the index.

    Attributes:
        value: the index in [0, 1]; .5 is chance.
        concordant, discordant, tied_risk: comparable pairs of each kind.
        tied_time: comparable pairs that share one time (an event and a censoring).
    """

    value: float
    concordant: int
    discordant: int
    tied_risk: int
    tied_time: int


def concordance_index(time: np.ndarray, event: np.ndarray, risk: np.ndarray) -> Concordance:
    """Harrell's concordance index.

    Args:
        time: [n] until the event or the censoring.
        event: [n] True if the event was seen.
        risk: [n] predicted; larger means earlier. Give the negative of a predicted survival time.
    """
    return _concordance(*_checked(time, event, risk), np.ones(len(time)))


def concordance_index_uno(
    time: np.ndarray,
    event: np.ndarray,
    risk: np.ndarray,
    *,
    tau: float | None = None,
    censoring: tuple[np.ndarray, np.ndarray] | None = None,
) -> float:
    """Uno's concordance index (inverse probability of censoring weighting).

    Args:
        time, event, risk: as for `concordance_index`.
        tau: only events before this time count; None: all of them. Choose one that G(tau) is clearly above 0 for.
        censoring: (time, event) of the patients that G is estimated from, as a rule the training set; None: these ones.

    Raises:
        ValueError: an event lies where by the estimate all are censored, so that its weight would be infinite.
    """
    time, event, risk = _checked(time, event, risk)
    counts = event & (time < (np.inf if tau is None else tau))
    uncensored = _uncensored(*(censoring or (time, event)), at=time[counts])
    if (uncensored <= 0).any():
        raise ValueError("an event lies where all others are censored already; choose a smaller tau")
    weights = np.zeros(len(time))
    weights[counts] = uncensored**-2
    return _concordance(time, event, risk, weights).value


def _checked(time: np.ndarray, event: np.ndarray, risk: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    time, risk, event = np.asarray(time, np.float64), np.asarray(risk, np.float64), np.asarray(event, bool)
    if not (time.shape == event.shape == risk.shape and time.ndim == 1):
        raise ValueError(f"time {time.shape}, event {event.shape} and risk {risk.shape} must be lists of one length")
    if not (np.isfinite(time).all() and np.isfinite(risk).all()):
        raise ValueError("times and risks must be finite")
    return time, event, risk


def _concordance(time: np.ndarray, event: np.ndarray, risk: np.ndarray, weights: np.ndarray) -> Concordance:
    counts, sums, tied_time = np.zeros(3, np.int64), np.zeros(3), 0
    for i in np.flatnonzero(event):  # one row of pairs at a time: n numbers in memory, not n^2
        same = (time == time[i]) & ~event
        other = risk[(time > time[i]) | same]
        row = np.array([np.sum(other < risk[i]), np.sum(other > risk[i]), np.sum(other == risk[i])])
        counts, sums, tied_time = counts + row, sums + weights[i] * row, tied_time + int(same.sum())
    value = float((sums[0] + sums[2] / 2) / sums.sum()) if sums.sum() > 0 else np.nan
    concordant, discordant, tied_risk = (int(n) for n in counts)
    return Concordance(value, concordant, discordant, tied_risk, tied_time)


def _uncensored(time: np.ndarray, event: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Kaplan-Meier estimate of the chance to be uncensored past each of the times `at` [m]."""
    time, event = np.asarray(time, np.float64), np.asarray(event, bool)
    moments = np.unique(time)
    censored, ended = (np.array([np.sum((time == t) & chosen) for t in moments]) for chosen in (~event, event))
    at_risk = np.array([np.sum(time >= t) for t in moments]) - ended
    steps = np.where(at_risk > 0, 1 - censored / np.maximum(at_risk, 1), 1)
    survival = np.r_[1.0, np.cumprod(steps)]
    return survival[np.searchsorted(moments, at, "right")]
