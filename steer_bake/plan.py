"""The plan: what will change in the checkpoint, exactly. Computed from config.json and tensor headers alone.

``make_plan`` is the narrow waist: every target consumes its result, and it can be printed, compared and refused before
a weight is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from . import architectures, registry
from .affine import Affine, compose
from .architectures import Write
from .checkpoint import Checkpoint, Edit
from .errors import NotFoldable, RecipeError
from .interventions import Intervention, in_forward_order
from .representations import Base, Holding, Piece


@dataclass(frozen=True)
class Decision:
    """One piece of one write, and how it is held: a row of the printed plan."""

    write: str  # "embedding", "attention.3", "mlp.14"
    part: str  # "weight", "bias" or "embedding"
    representation: str
    interventions: tuple[str, ...]  # "add at resid_post.14"


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything a target needs to know: the edits, the config changes, and why each is there."""

    model_type: str
    interventions: tuple[Intervention, ...]  # in the order they act
    decisions: tuple[Decision, ...]
    edits: tuple[Edit, ...]  # one per tensor
    config_changes: Mapping[str, Any]

    @property
    def is_constant(self) -> bool:
        """True where only biases are written: the file then holds the hooks' constants, rounded, and nothing else."""
        return all(len(edit.shape) == 1 for edit in self.edits)

    def as_json(self) -> dict[str, Any]:
        """The plan as plain values, for ``plan.json`` and for comparing two plans."""
        return {
            "model_type": self.model_type,
            "interventions": [describe(one) for one in self.interventions],
            "decisions": [
                {"write": d.write, "part": d.part, "representation": d.representation, "for": list(d.interventions)}
                for d in self.decisions
            ],
            "config_changes": dict(self.config_changes),
            "edits": [
                {
                    "tensor": edit.tensor,
                    "shape": list(edit.shape),
                    "dtype": edit.dtype,
                    "from": edit.source,
                    "change": _change(edit),
                    "sha256": _hash(edit.affine),
                }
                for edit in self.edits
            ],
        }

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(self.as_json(), sort_keys=True).encode()).hexdigest()


def describe(intervention: Intervention) -> dict[str, Any]:
    """An intervention as plain values, its vector by hash."""
    return {
        "name": intervention.name,
        "site": str(intervention.site),
        "amount": intervention.amount,
        "stream_norm": intervention.stream_norm,
        "dose": intervention.dose,
        "direction": None if intervention.direction is None else intervention.direction.provenance(),
        "sha256": _hash(intervention.affine),
    }


def make_plan(base: Checkpoint, interventions: Iterable[Intervention]) -> Plan:
    """Decide how ``interventions`` are held by ``base``.

    Raises:
        NotFoldable: a site and operation without an exact home; the message says which would work.
        RecipeError: a vector's width or a layer that does not fit the model, or no intervention at all.
        UnknownArchitecture: no file in architectures/ claims the model type.
    """
    architecture = architectures.for_config(base.config)
    view = Base(base, architecture)
    ordered = in_forward_order(interventions)
    if not ordered:
        raise RecipeError("there is no intervention to bake")

    reaching: dict[tuple[str, int | None], list[tuple[Intervention, Affine]]] = {}
    for intervention in ordered:
        _check_fits(intervention, view)
        for write, layer, affine in _placed(intervention, view.layers):
            if not affine.is_identity:
                reaching.setdefault((write, layer), []).append((intervention, affine))

    edits: dict[str, Edit] = {}
    config_changes: dict[str, Any] = {}
    decisions = []
    for (write, layer), found in reaching.items():
        because = tuple(f"{one.name} at {one.site}" for one, _ in found)
        for piece in _pieces(getattr(architecture, write), layer, [affine for _, affine in found], view):
            name, holding = _held(piece, view)
            decisions.append(Decision(write if layer is None else f"{write}.{layer}", piece.part, name, because))
            config_changes.update(holding.config_changes)
            for edit in holding.edits:
                if edit.tensor not in edits or not _is_zeros(edit):
                    edits[edit.tensor] = edit
    return Plan(str(base.config["model_type"]), tuple(ordered), tuple(decisions), tuple(edits.values()), config_changes)


def _check_fits(intervention: Intervention, base: Base) -> None:
    width = architectures.width(base.architecture, base.config)
    layer = intervention.site.layer
    if intervention.affine.width != width:
        raise RecipeError(
            f"the vector of {intervention.name} at {intervention.site} has {intervention.affine.width} components; "
            f"this model's stream has {width}. Was it computed on another model?"
        )
    if layer is not None and not 0 <= layer < base.layers:
        raise RecipeError(f"site {intervention.site}: this model has layers 0 to {base.layers - 1}")


def _placed(intervention: Intervention, layers: int) -> list[tuple[str, int | None, Affine]]:
    """Which writes an intervention reaches, as (field of Architecture, layer, affine)."""
    site, affine = intervention.site, intervention.affine
    if site.layer is None:
        everywhere: list[tuple[str, int | None, Affine]] = [
            (write, layer, affine.without_shift()) for layer in range(layers) for write in ("attention", "mlp")
        ]
        return [("embedding", None, affine), *everywhere] if site.point == "writes" else everywhere
    if site.point == "attn_out":
        return [("attention", site.layer, affine)]
    if site.point == "mlp_out":
        return [("mlp", site.layer, affine)]
    if site.point == "resid_pre" and site.layer == 0:
        return [("embedding", None, affine)]
    if affine.is_linear:
        raise NotFoldable(
            f"{intervention.name} at {site}: a projection of the stream in the middle of the model is no edit of any "
            "one writer. Sites that work: 'writes' (the stream itself, from the embedding on), 'writers', "
            f"'attn_out.{site.layer}', 'mlp_out.{site.layer}', 'resid_pre.0'"
        )
    if site.point == "resid_mid":
        return [("attention", site.layer, affine)]
    return [("mlp", site.layer if site.point == "resid_post" else site.layer - 1, affine)]


def _pieces(write: Write, layer: int | None, affines: list[Affine], base: Base) -> list[Piece]:
    affine = compose(affines, affines[0].width).divided_by(write.scale(base.config))
    if layer is None:
        return [Piece("embedding", write, None, affine)]
    pieces = []
    if affine.is_linear:
        pieces.append(Piece("weight", write, layer, affine))
    if affine.has_shift or (write.bias and base.has(write.bias.format(layer=layer))):
        pieces.append(Piece("bias", write, layer, affine))
    return pieces


def _held(piece: Piece, base: Base) -> tuple[str, Holding]:
    reasons = []
    for name, representation in registry.load_all("representations").items():
        try:
            holding = representation(piece, base)
        except NotFoldable as reason:
            reasons.append(str(reason))
            continue
        if holding is not None:
            return name, holding
    raise NotFoldable("; ".join(reasons) or f"no representation holds the {piece.part} of {piece.write.tensor}")


def _is_zeros(edit: Edit) -> bool:
    return edit.source is None and not edit.affine.has_shift


def _change(edit: Edit) -> str:
    if edit.source is None:
        return f"new, |shift| {float(edit.affine.shift.norm()):.4g}" if edit.affine.has_shift else "new, zeros"
    parts = [f"linear part of rank {edit.affine.left.shape[1]}"] if edit.affine.is_linear else []
    parts += [f"|shift| {float(edit.affine.shift.norm()):.4g}"] if edit.affine.has_shift else []
    return " + ".join(parts) or f"copy of {edit.source}"


def _hash(affine: Affine) -> str:
    digest = hashlib.sha256()
    for part in (affine.left, affine.right, affine.shift):
        digest.update(part.contiguous().numpy().tobytes())
    return digest.hexdigest()
