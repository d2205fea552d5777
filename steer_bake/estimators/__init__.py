"""How a direction is computed from activations: each file is one function of the statistics of two prompt sets.

``<name>(positive: Statistics, negative: Statistics) -> (vector [d], scale)``: ``vector`` points from negative to
positive and need not be normalised; ``scale`` is its natural length in stream units. What else a module may define:

``Options``         a frozen dataclass with defaults; the function then takes ``options``
``USES_NEUTRAL``    True: the function also takes ``neutral``, the statistics of prompts that are neither, or None
``NEEDS_ROWS``      True: every vector is needed and not only the moments
``PAIRED``          True: the n-th positive and the n-th negative prompt belong together
``NEEDS_COVARIANCE``  the sides, ``"positive"`` or ``"negative"``, whose covariance is needed
``USES_SCORES``     True: the moments are weighted by how clearly each prompt is what its label says
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from .. import registry
from ..errors import RecipeError, did_you_mean

#: Values of the options that a recipe may give.
Option = bool | int | float | str


@dataclass(frozen=True, eq=False)
class Statistics:
    """What was measured at one site over the prompts of one label, in float32 or wider."""

    count: int
    mean: Tensor  # [d]
    norm: float  # mean of |h| over the prompts
    rows: Tensor | None = None  # [count, d] in prompt order, only where an estimator needs them
    weights: Tensor | None = None  # [count] float64, not negative: beside rows, where the prompts have weights
    weighted_mean: Tensor | None = None  # [d] float64, sum w h / sum w; None where it is the mean
    covariance: Tensor | None = None  # [d, d] float64, weighted, divided by sum w; only where asked for

    @property
    def centre(self) -> Tensor:
        """The weighted mean [d] in float64."""
        return self.mean.double() if self.weighted_mean is None else self.weighted_mean


def estimate(
    name: str,
    positive: Statistics,
    negative: Statistics,
    neutral: Statistics | None = None,
    options: Mapping[str, Option] | None = None,
) -> tuple[Tensor, float]:
    """(vector [d], scale) of the estimator ``name``, whatever it takes.

    Raises:
        RecipeError: no such estimator or option, or statistics that give no direction.
    """
    module: Any = registry.module("estimators", name)
    function, given = registry.load("estimators", name), dict(options or {})
    extra: dict[str, Any] = {"neutral": neutral} if getattr(module, "USES_NEUTRAL", False) else {}
    if hasattr(module, "Options"):
        extra["options"] = _options(name, module.Options, given)
    elif given:
        raise RecipeError(f"the estimator {name} has no options, and {', '.join(given)} was given; leave it out")
    vector, scale = function(positive, negative, **extra)
    return vector, float(scale)


def check_options(name: str, options: Mapping[str, Option]) -> None:
    """Raise RecipeError where the estimator ``name`` has no such option, or none of that kind."""
    module: Any = registry.module("estimators", name)
    if hasattr(module, "Options"):
        _options(name, module.Options, options)
    elif options:
        raise RecipeError(f"the estimator {name} has no options, and {', '.join(options)} was given; leave it out")


def _options(name: str, kind: type[Any], given: Mapping[str, Option]) -> Any:
    known = {field.name: field.default for field in fields(kind)}
    for key, value in given.items():
        if key not in known:
            raise RecipeError(f"the estimator {name} has no option {key!r}: {did_you_mean(key, known)}")
        default = known[key]
        number = isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool)
        if not number and type(value) is not type(default):
            raise RecipeError(
                f"option {key!r} of the estimator {name} is {value!r}; give a {type(default).__name__} like {default!r}"
            )
    return kind(**given)
