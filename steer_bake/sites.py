"""Sites of the residual stream, how they are written down, and the order in which a forward pass meets them.

``resid_post.14`` one site · ``resid_post.10-19`` a range · ``resid_post.3,7,10-12`` a list · ``resid_post`` every
layer · ``resid_post.-1`` the last layer · ``writers``, ``writes`` have no layer · ``mlp_in.14``, what the MLP reads
behind its norm, is read and never written.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .errors import RecipeError, did_you_mean

#: Points inside one decoder layer, in forward order.
LAYER_POINTS = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
#: Points that are no part of the stream: they are read, by gates for example, and nothing is done there.
READ_POINTS = ("mlp_in",)
_ORDER = ("resid_pre", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")
#: ``writers``: every attention and MLP write; ``writes``: those and the embedding (all writes of the base model).
GLOBAL_POINTS = ("writers", "writes")


@dataclass(frozen=True)
class Site:
    """A place in the residual stream; ``layer`` is None exactly for ``writers`` and ``writes``."""

    point: str
    layer: int | None = None

    def __str__(self) -> str:
        return self.point if self.layer is None else f"{self.point}.{self.layer}"

    @classmethod
    def named(cls, name: str) -> Site:
        """The site that ``str(site)`` gave ``name``; raises ValueError where no site is called so."""
        point, _, layer = name.partition(".")
        if point in GLOBAL_POINTS and not layer:
            return cls(point)
        if point in LAYER_POINTS + READ_POINTS and layer.isdecimal():
            return cls(point, int(layer))
        raise ValueError(f"no site is called {name!r}")

    @property
    def order(self) -> tuple[int, int]:
        """Sort key: forward order. ``writes`` and ``writers`` come first: they act on each base write as it happens."""
        if self.layer is None:
            return (-1, 0)
        return (self.layer, _ORDER.index(self.point))


def parse_site(text: str, layers: int) -> Site:
    """Exactly one site out of ``text`` (raises as :func:`parse_sites` does)."""
    found = parse_sites(text, layers)
    if len(found) != 1:
        raise RecipeError(f"{text!r} names {len(found)} sites where one is needed; write for example {str(found[0])!r}")
    return found[0]


def parse_sites(text: str | Sequence[str], layers: int) -> list[Site]:
    """The sites that ``text`` (or a list of texts) names in a model of ``layers`` decoder layers, in forward order.

    Raises:
        RecipeError: an unknown point, a layer that the model does not have, or a malformed range.
    """
    texts = [text] if isinstance(text, str) else list(text)
    found = [site for one in texts for site in _parse(str(one).strip(), layers)]
    if not found:
        raise RecipeError("no site is named; write for example 'resid_post.14' or 'writes'")
    return sorted(set(found), key=lambda site: site.order)


def _parse(text: str, layers: int) -> list[Site]:
    point, _, where = text.partition(".")
    known = LAYER_POINTS + READ_POINTS + GLOBAL_POINTS
    if point not in known:
        raise RecipeError(f"unknown site {text!r}: {did_you_mean(point, known)}")
    if point in GLOBAL_POINTS:
        if where:
            raise RecipeError(f"site {text!r}: {point!r} means every layer and takes no layer number")
        return [Site(point)]
    if not where:
        return [Site(point, layer) for layer in range(layers)]
    return [Site(point, layer) for part in where.split(",") for layer in _layers(part.strip(), text, layers)]


def _layers(part: str, text: str, layers: int) -> Iterable[int]:
    first, dash, last = part.partition("-") if not part.startswith("-") else (part, "", "")
    try:
        low = int(first)
        high = int(last) if dash else low
    except ValueError:
        raise RecipeError(f"site {text!r}: {part!r} is not a layer or a range; write 14, 10-19 or 3,7,10-12") from None
    low, high = (low + layers if low < 0 else low), (high + layers if high < 0 else high)
    if low > high:
        raise RecipeError(f"site {text!r}: the range {part!r} runs backwards")
    if low < 0 or high >= layers:
        raise RecipeError(f"site {text!r}: this model has layers 0 to {layers - 1}")
    return range(low, high + 1)
