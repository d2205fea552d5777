"""SafeSteer (Ghosh et al. 2025, arXiv 2506.04250): from unsafe to safe, with the uninformative prompts left out.

``omega = mean_safe - mean_unsafe`` of token-mean activations (read position ``mean``), and as refinement: of the
differences ``d_j`` only those longer than their median are averaged. Paired data have ``d_j = safe_j - unsafe_j``.
For unpaired safe data, which may be of any other topic, ``d_j = mean_safe - unsafe_j`` is built: that reading comes
from a replication and is not confirmed by the authors; without pruning both are the difference of the means.

The paper's text takes the output of the attention; its replication finds that almost inert, and the output of
the block (``resid_post``) working. The vector is not normalised there: its length is the scale here.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..errors import RecipeError
from . import Statistics

NEEDS_ROWS = True


@dataclass(frozen=True)
class Options:
    prune: bool = True  # keep the longer half of the differences
    paired: bool = False  # the n-th safe and the n-th unsafe prompt belong together


def safesteer(positive: Statistics, negative: Statistics, options: Options | None = None) -> tuple[Tensor, float]:
    """``positive`` is the safe side: the mean difference [d] of those kept; the scale is its norm.

    Raises:
        RecipeError: paired, and there are not as many of each.
    """
    chosen = options or Options()
    if positive.rows is None or negative.rows is None:
        raise ValueError("safesteer needs the rows of both sides")
    safe, unsafe = positive.rows.double(), negative.rows.double()
    if chosen.paired and len(safe) != len(unsafe):
        raise RecipeError(
            f"safesteer with 'paired' has {len(safe)} safe and {len(unsafe)} unsafe prompts; give as many of each, "
            "or leave 'paired' out"
        )
    differences = (safe if chosen.paired else safe.mean(0)) - unsafe  # [n, d]
    if chosen.prune and len(differences) > 1:
        lengths = differences.norm(dim=1)
        differences = differences[lengths > lengths.quantile(0.5)] if lengths.min() < lengths.max() else differences
    vector = differences.mean(0)
    return vector.float(), float(vector.norm())
