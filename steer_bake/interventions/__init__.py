"""What can be done to the stream at a site: each file is one pure function from a unit direction to an ``Affine``.

``add(direction, amount)``, ``ablate(direction, amount)``, ``clamp(direction, amount)``: ``direction`` is a unit vector
``[d]`` float32 and ``amount`` a number, already in stream units (for ``ablate`` it is lambda).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from .. import registry
from ..affine import Affine
from ..direction import Direction
from ..errors import RecipeError, did_you_mean
from ..gate import Gate
from ..sites import READ_POINTS, Site


@dataclass(frozen=True, eq=False)
class Intervention:
    """An affine map at a site: the object that both the hook and the bake apply."""

    site: Site
    affine: Affine
    name: str = "affine"  # the file in interventions/ it came from, for messages and reports
    amount: float | None = None  # what that function was given
    stream_norm: float | None = None  # mean |h| at the site where known, so that the dose |shift| / |h| can be told
    direction: Direction | None = None  # where the vector came from, for manifests and cards
    gate: Gate | None = None  # where the shift is open; None: everywhere

    def __post_init__(self) -> None:
        if self.site.point in READ_POINTS:
            raise RecipeError(
                f"{self.site} is read by gates and written by nobody; to act on what the MLP writes name "
                f"'mlp_out.{self.site.layer}'"
            )
        if self.gate is not None:
            _check_gated(self, self.gate)
        parts = (self.affine.left, self.affine.right, self.affine.shift)
        if not all(bool(part.isfinite().all()) for part in parts):
            raise RecipeError(f"{self.name} at {self.site} holds NaN or infinity; use a smaller coefficient")
        if self.site.point == "writers" and self.affine.has_shift:
            raise RecipeError(
                f"{self.name} at 'writers' would add its shift once per write; use a site with a layer, or 'writes' "
                "for clamp (its shift is added once, at the embedding)"
            )
        if self.site.point == "writes" and self.affine.has_shift and not self.affine.is_linear:
            raise RecipeError(f"{self.name} has no meaning at 'writes'; to add a vector name one site: 'resid_post.14'")

    @property
    def dose(self) -> float | None:
        """``|shift| / |h|``: how large the added vector is against the stream it joins; None where |h| is unknown."""
        if not self.stream_norm or not self.affine.has_shift:
            return None
        return float(self.affine.shift.norm()) / self.stream_norm


def _check_gated(intervention: Intervention, gate: Gate) -> None:
    site, name = intervention.site, intervention.name
    if intervention.affine.is_linear:
        raise RecipeError(f"{name} at {site} projects the stream, and a gate is for adding a vector: use 'add'")
    if site.point not in ("mlp_out", "resid_post") or site.layer != gate.layer:
        raise RecipeError(
            f"the gate at {gate.site} opens what the same MLP writes, at 'mlp_out.{gate.layer}' or "
            f"'resid_post.{gate.layer}', and not at {str(site)!r}"
        )
    if len(gate.probe) != intervention.affine.width:
        raise RecipeError(
            f"the probe of the gate at {gate.site} has {len(gate.probe)} components and the vector at {site} "
            f"{intervention.affine.width}; both belong to the stream. Was one computed on another model?"
        )


UNITS = ("scale", "unit", "dose")


def intervene(
    name: str, direction: Direction, site: Site, coefficient: float = 1.0, units: str = "scale"
) -> Intervention:
    """The intervention ``name`` (a file of this folder) with ``direction`` at ``site``.

    The amount is ``coefficient`` times ``direction.scale`` (units ``scale``; of a direction with two, the one for the
    coefficient's sign), 1 (``unit``) or the mean stream norm where the direction was read (``dose``). For ``ablate``
    the coefficient is lambda itself; a clamp counts from ``direction.neutral`` where that is known (the reposition of
    Refusal Steering, arXiv 2512.16602: ``h - <h - o, v> v + alpha s v``).

    Raises:
        RecipeError: an unknown name or unit, a coefficient that is no finite number, or ``dose`` without a known norm.
    """
    function = registry.load("interventions", name)
    if units not in UNITS:
        raise RecipeError(f"unknown units {units!r}: {did_you_mean(units, UNITS)}")
    if not math.isfinite(coefficient):
        raise RecipeError(f"the coefficient of {name} at {site} is {coefficient}; give a finite number")
    if units == "dose" and direction.stream_norm is None:
        raise RecipeError(
            "units 'dose' needs the mean stream norm, which this direction does not carry; use a direction that "
            "steer-bake extracted, or units 'unit' or 'scale'"
        )
    scale = direction.scale_negative if coefficient < 0 and direction.scale_negative is not None else direction.scale
    factors = {"scale": scale, "unit": 1.0, "dose": direction.stream_norm or 0.0}
    amount = coefficient if name == "ablate" else coefficient * factors[units]
    if name == "clamp" and direction.neutral is not None:
        amount += direction.neutral
    norm = direction.stream_norm if direction.site == site else None
    return Intervention(site, function(direction.vector, amount), name, amount, norm, direction)


def in_forward_order(interventions: Iterable[Intervention]) -> list[Intervention]:
    """The order that hook and bake both follow: forward order of sites, then the order given (a stable sort)."""
    return sorted(interventions, key=lambda intervention: intervention.site.order)
