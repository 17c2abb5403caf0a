"""LR sensitivity: how much of the loss depends on having met the right learning rate (Wortsman et al. 2023).

Small-scale proxies for large-scale Transformer training instabilities, arXiv:2309.14322, section 2.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def lr_sensitivity(losses: Sequence[float], start: float) -> float:
    """E_eta[min(l(A(eta)), l_0) - l*], in the unit of the losses; 0 where every learning rate is as good.

    l(A(eta)): the final validation loss of training with learning rate eta, one of `losses`; E_eta: their plain mean,
    so they are to be of learning rates evenly spaced in the logarithm; l_0: `start`, the loss at initialization;
    l* = min over eta of min(l(A(eta)), l_0). A loss that is no number, of a run that diverged, counts as l_0, as do
    all above it. What learns at no learning rate at all gets 0, too, so the number is to be read beside l*.
    """
    if not losses:
        raise ValueError("lr_sensitivity is of at least one loss")
    bounded = [bound(loss, start) for loss in losses]
    return math.fsum(bounded) / len(bounded) - min(bounded)


def bound(loss: float, start: float) -> float:
    """min(l, l_0), with l_0 for a loss that is no number."""
    return start if math.isnan(loss) else min(loss, start)
