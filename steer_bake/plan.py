"""The plan: what will change in the checkpoint, exactly. Computed from config.json and tensor headers alone.

``make_plan`` is the narrow waist: every target consumes its result, and it can be printed, compared and refused before
a weight is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from . import architectures, registry
from .affine import Affine, compose
from .architectures import SLOTS
from .checkpoint import Checkpoint, Edit
from .draft import Draft, merge
from .errors import CheckpointError, NotFoldable, RecipeError, did_you_mean
from .houses import Housed, hosts, housed
from .interventions import Intervention, in_forward_order
from .proof import prove
from .representations import Base, Constant, Gated, Holding, Piece
from .sites import Site

#: Matrix products are fastest where the number of neurons is a multiple of this.
PAD_TO = 64


@dataclass(frozen=True)
class Decision:
    """One piece of one write, and how it is held: a row of the printed plan."""

    write: str  # "embedding", "attention.3", "mlp.14"
    part: str  # "weight", "bias" or "embedding"
    representation: str
    interventions: tuple[str, ...]  # "add at resid_post.14"
    parameters: int = 0  # that it adds to the model
    layers: int = 0
    others: tuple[str, ...] = ()  # representations that would be exact as well
    approximate: bool = False
    note: str = ""


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything a target needs to know: the edits, the config changes, and why each is there."""

    model_type: str  # of the output
    interventions: tuple[Intervention, ...]  # in the order they act
    decisions: tuple[Decision, ...]
    edits: tuple[Edit, ...]  # one per tensor
    config_changes: Mapping[str, Any]
    prefer: str = "smallest"
    constants: tuple[Constant, ...] = ()  # the tensors whose rounding is a constant of the stream
    rename: Mapping[str, str] = field(default_factory=dict)  # tensors of the base that get a new number
    moved: tuple[tuple[int, int], ...] = ()  # where layers were inserted: the new numbers of an old layer's halves
    rehoused_from: str = ""  # the base's own model type, where the output is of another
    restated: tuple[str, ...] = ()  # tensors that the other class wants with other values
    dropped: tuple[str, ...] = ()  # tensors of the base of which the output has other parts instead
    target: str = "checkpoint"  # the file in targets/ that it is for
    pad_to: int = PAD_TO  # what the number of an MLP's neurons is made a multiple of, where gates add some

    @property
    def gates(self) -> tuple[Intervention, ...]:
        """The interventions that have a gate."""
        return tuple(one for one in self.interventions if one.gate is not None)

    @property
    def is_constant(self) -> bool:
        """True where no matrix of the base is edited: the file then holds the hooks' constants, rounded, only."""
        others = [edit for edit in self.edits if not edit.keeps_values or (edit.rows is None and edit.appended is None)]
        return not self.restated and all(edit.source is None or len(edit.shape) == 1 for edit in others)

    @property
    def is_approximate(self) -> bool:
        """True where some write is not changed as the hooks change it; only ever because it was asked for."""
        return any(decision.approximate for decision in self.decisions)

    def as_json(self) -> dict[str, Any]:
        """The plan as plain values, for ``plan.json`` and for comparing two plans."""
        return {
            "model_type": self.model_type,
            **({"rehoused_from": self.rehoused_from} if self.rehoused_from else {}),
            **({"target": self.target} if self.target != CHECKPOINT else {}),
            "interventions": [describe(one) for one in self.interventions],
            "decisions": [
                {
                    "write": d.write,
                    "part": d.part,
                    "representation": d.representation,
                    "for": list(d.interventions),
                    "parameters": d.parameters,
                    "layers": d.layers,
                    "others": list(d.others),
                    **({"approximate": True} if d.approximate else {}),
                    "note": d.note,
                }
                for d in self.decisions
            ],
            "prefer": self.prefer,
            **({"pad_to": self.pad_to} if self.gates else {}),
            "config_changes": dict(self.config_changes),
            **({"layers": [list(halves) for halves in self.moved]} if self.moved else {}),
            **({"renamed": len(self.rename)} if self.rename else {}),
            **({"dropped": len(self.dropped)} if self.dropped else {}),
            "edits": [
                {
                    "tensor": edit.tensor,
                    "shape": list(edit.shape),
                    "dtype": edit.dtype,
                    "from": edit.source,
                    "change": _change(edit),
                    "sha256": _hash(edit.affine),
                    **_content(edit),
                }
                for edit in self.edits
            ],
        }

    def layers_after(self, layers: int) -> int:
        """How many decoder layers the output has, of a base with ``layers``."""
        extra = sum(decision.layers for decision in self.decisions)
        return layers + extra

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
        **({} if intervention.gate is None else {"gate": intervention.gate.described()}),
    }


#: What to prefer where several representations hold a shift exactly; each maps (parameters added, holding) to a rank.
PREFERENCES: dict[str, Callable[[int, Holding], tuple[int, ...]]] = {
    "smallest": lambda size, holding: (size,),
    "bit_exact": lambda size, holding: (not holding.bit_exact, size),
    "widest_loading": lambda size, holding: (holding.demands, size),
    "keep_class": lambda size, holding: (size,),
}
#: The preference for another model class: any, or the one named behind a colon.
REHOUSE = "rehouse"
#: The preference that accepts, where nothing is exact, what is only close.
APPROXIMATE = "approximate"
#: The target that most representations are for.
CHECKPOINT = "checkpoint"


def make_plan(
    base: Checkpoint,
    interventions: Iterable[Intervention],
    prefer: str = "smallest",
    target: str = CHECKPOINT,
    *,
    pad_to: int = PAD_TO,
) -> Plan:
    """Decide how ``interventions`` are held by ``base``.

    ``prefer``, where several representations are exact: ``"smallest"`` the fewest new parameters, ``"bit_exact"`` the
    hook's own rounding in the storage dtype, ``"widest_loading"`` what most runtimes implement, ``"keep_class"`` the
    smallest that keeps the declared model class. All of these stay within that class as long as it has room: another
    one is looked for where nothing else is exact (never under ``"keep_class"``), or where it is asked for, as
    ``"rehouse"`` or ``"rehouse:llama"``. It takes a second, for both classes are run and compared. ``"approximate"`` is
    ``"smallest"``, and where nothing is exact takes what is close to the intervention: the plan and the certificate say
    so, and how close it is. It reads the weights of the norms concerned.

    ``target`` is a file in targets/: an adapter or a control vector holds less than a checkpoint, and leaves the model
    itself as it is.

    Gates add neurons to every MLP; their number is made a multiple of ``pad_to``, which kernels like.

    Raises:
        NotFoldable: a site and operation without an exact home; the message says which would work.
        RecipeError: a vector's width or a layer that does not fit the model, no intervention at all, or no such target.
        UnknownArchitecture: no file in architectures/ claims the model type.
    """
    asked, _, host = prefer.partition(":")
    if asked != REHOUSE and prefer not in (*PREFERENCES, APPROXIMATE):
        known = (*PREFERENCES, REHOUSE, APPROXIMATE)
        raise RecipeError(f"unknown preference {prefer!r}: {did_you_mean(prefer, known)}")
    if pad_to < 1:
        raise RecipeError(f"the number of neurons cannot be a multiple of {pad_to}; give 1 or more")
    wanted = tuple(interventions)
    if target != CHECKPOINT:
        return _beside(base, wanted, prefer, registry.identifier(target))
    if asked == REHOUSE:
        return _rehoused(base, wanted, prefer, pad_to, host)
    try:
        return _planned(base, wanted, prefer, pad_to=pad_to)
    except NotFoldable as refusal:
        if prefer == "keep_class":
            raise
        try:
            return _rehoused(base, wanted, prefer, pad_to)
        except NotFoldable:
            if prefer == APPROXIMATE:
                return _planned(base, wanted, prefer, pad_to=pad_to, approximate=True)
            raise refusal from None


def _beside(base: Checkpoint, interventions: Sequence[Intervention], prefer: str, target: str) -> Plan:
    """The plan of a file that goes beside the model, which therefore stays of its class."""
    if prefer.partition(":")[0] == REHOUSE:
        raise RecipeError(f"target {target!r} leaves the model as it is: only a checkpoint can be of another class")
    gated = next((one for one in interventions if one.gate is not None), None)
    if gated is not None:
        raise NotFoldable(
            f"{gated.name} at {gated.site} has a gate, which is further neurons of the model itself: target {target!r} "
            "leaves that as it is. Bake a checkpoint (target checkpoint)"
        )
    rules = registry.module("targets", target)
    plan = _planned(base, interventions, prefer, target)
    if hasattr(rules, "check"):
        rules.check(plan, base)
    return plan


def _rehoused(
    base: Checkpoint, interventions: Iterable[Intervention], prefer: str, pad_to: int, host: str = ""
) -> Plan:
    """The plan in the first other class that has room and is proven to be the same function.

    Raises:
        NotFoldable: there is none; the message has the reason of each.
    """
    reasons = []
    ranked = prefer if prefer in PREFERENCES else "smallest"
    for rule in hosts(base, host):
        try:
            claim = housed(base, rule)
            plan = _planned(claim.base, interventions, ranked, pad_to=pad_to)
            prove(claim)
        except NotFoldable as reason:
            reasons.append(str(reason))
            continue
        return _of_source(plan, claim, prefer)
    raise NotFoldable("; ".join(reasons))


def _of_source(plan: Plan, claim: Housed, prefer: str) -> Plan:
    """A plan for the base in its new house, as a plan for the base."""
    bits = "to the bit in bfloat16 too" if claim.house.same_bits else "but for rounding"
    note = f"{claim.source.model_type} -> {plan.model_type}, proven to be the same function, {bits}"
    because = tuple(dict.fromkeys(one for decision in plan.decisions for one in decision.interventions))
    rehousing = Decision("model", "class", "rehousing", because, claim.added, note=note)
    changes = dict(claim.config_changes)
    merge(changes, plan.config_changes)
    return replace(
        plan,
        decisions=(rehousing, *plan.decisions),
        edits=claim.edits(plan.edits, plan.rename),
        config_changes=changes,
        prefer=prefer,
        rename=claim.rename(plan.rename),
        rehoused_from=claim.source.model_type,
        restated=tuple(plan.rename.get(name, name) for name in claim.restated),
        dropped=claim.dropped,
    )


def _planned(
    base: Checkpoint,
    interventions: Iterable[Intervention],
    prefer: str,
    target: str = CHECKPOINT,
    *,
    pad_to: int = PAD_TO,
    approximate: bool = False,
) -> Plan:
    view = Base(base, architectures.layout(base.config), approximate)
    ordered = in_forward_order(interventions)
    draft, decisions = choose(offers(view, ordered, target, pad_to), view, prefer)
    draft.complete()
    edits, config_changes, constants, rename, moved = draft.numbered()
    return Plan(
        str(base.config["model_type"]), tuple(ordered), tuple(decisions), edits, config_changes, prefer, constants,
        rename, moved, target=target, pad_to=pad_to,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Offer:
    """One piece of one write that must change, and every representation that would hold it exactly."""

    write: str  # "embedding", "attention.3", "mlp.14"
    because: tuple[str, ...]  # "add at resid_post.14"
    piece: Piece
    options: Mapping[str, Holding]
    refused: Mapping[str, str]  # why other representations that are for such pieces do not hold it


def offers(base: Base, ordered: Iterable[Intervention], target: str = CHECKPOINT, pad_to: int = PAD_TO) -> list[Offer]:
    """All pieces that ``ordered`` interventions ask for, with what holds each (raises as :func:`make_plan` does).

    Gates come first: the biases that they bring along cost a constant nothing more.
    """
    reaching: dict[_Where, list[tuple[Intervention, Affine]]] = {}
    ordered = list(ordered)
    if not ordered:
        raise RecipeError("there is no intervention to bake")
    for intervention in ordered:
        _check_fits(intervention, base)
        for where, affine in _placed(intervention, base):
            if not affine.is_identity:
                reaching.setdefault(where, []).append((intervention, affine))
    gated = _gated(ordered, base, pad_to)
    gates = [Offer(_span(gated), _because(gated), gated, *_tried(gated, base, target))] if gated else []
    return gates + [
        Offer(str(where), tuple(f"{one.name} at {one.site}" for one, _ in found), piece, *tried)
        for where, found in reaching.items()
        for piece in _pieces(where, compose((affine for _, affine in found), base.layout.width), base)
        for tried in [_tried(piece, base, target)]
    ]


def choose(found: Iterable[Offer], base: Base, prefer: str, only: str = "") -> tuple[Draft, list[Decision]]:
    """The representation of every offer, the first in the order of ``prefer``, or ``only`` wherever it is offered.

    The answer is what they amount to (neither completed nor numbered), and the decisions.
    """
    draft, decisions = Draft(base), []
    for offer in found:
        sizes = {name: draft.size(holding) for name, holding in offer.options.items()}
        rank = PREFERENCES.get(prefer, PREFERENCES["smallest"])
        ranks = {name: rank(sizes[name], holding) for name, holding in offer.options.items()}
        name = only if only in offer.options else min(ranks, key=ranks.__getitem__)
        others = tuple(one for one in offer.options if one != name)
        holding = offer.options[name]
        layers = int(holding.extra is not None)
        part = offer.piece.part
        decisions.append(
            Decision(
                offer.write, part, name, offer.because, sizes[name], layers, others, holding.approximate, holding.note
            )
        )
        draft.add(holding)
    return draft, decisions


def _gated(ordered: Iterable[Intervention], base: Base, pad_to: int) -> Piece | None:
    """All gates of ``ordered``, each with what it adds where it is open; None where there are none.

    What a later projection of the same write takes away is not added in the first place.
    """
    found: list[Gated] = []
    wheres: list[_Where] = []
    for one in ordered:
        if one.gate is None:
            for place, affine in _placed(one, base) if one.affine.is_linear and one.site.layer is not None else []:
                found = [
                    replace(gated, shift=affine.without_shift()(gated.shift)) if where == place else gated
                    for where, gated in zip(wheres, found, strict=True)
                ]
            continue
        if not base.writers("mlp", one.gate.layer):
            raise NotFoldable(f"{one.gate.site}: layer {one.gate.layer} of this model has no mlp write to be gated")
        shift = one.affine.shift if one.gate.otherwise is None else one.affine.shift - one.gate.otherwise
        found.append(Gated(one.gate, shift, f"{one.name} at {one.site}"))
        wheres.append(_Where("mlp", one.gate.layer))
    identity = Affine.identity(base.layout.width)
    return Piece("gates", identity, ("mlp",), gates=tuple(found), pad_to=pad_to) if found else None


def _span(piece: Piece) -> str:
    return ", ".join(dict.fromkeys(f"mlp.{one.gate.layer}" for one in piece.gates))


def _because(piece: Piece) -> tuple[str, ...]:
    return tuple(dict.fromkeys(one.intervention for one in piece.gates))


@dataclass(frozen=True)
class _Where:
    """A write of the base model: a slot of a layer, or the embedding."""

    slot: str = "embedding"
    layer: int | None = None

    def __str__(self) -> str:
        return self.slot if self.layer is None else f"{self.slot}.{self.layer}"

    def site(self, parallel: bool) -> Site:
        """Where in the stream a shift of this write arrives."""
        if self.layer is None:
            return Site("resid_pre", 0)
        return Site("resid_mid" if self.slot == "attention" and not parallel else "resid_post", self.layer)


def _check_fits(intervention: Intervention, base: Base) -> None:
    width, layer = base.layout.width, intervention.site.layer
    if intervention.affine.width != width:
        raise RecipeError(
            f"the vector of {intervention.name} at {intervention.site} has {intervention.affine.width} components; "
            f"this model's stream has {width}. Was it computed on another model?"
        )
    if layer is not None and not 0 <= layer < base.layers:
        raise RecipeError(f"site {intervention.site}: this model has layers 0 to {base.layers - 1}")


def _placed(intervention: Intervention, base: Base) -> list[tuple[_Where, Affine]]:
    """Which writes an intervention reaches."""
    site, affine = intervention.site, intervention.affine
    if intervention.gate is not None:  # what is added where it is closed is added everywhere
        closed = torch.zeros(base.layout.width) if intervention.gate.otherwise is None else intervention.gate.otherwise
        affine = replace(affine, shift=closed)
    if site.layer is None:
        linear = affine.without_shift()
        everywhere = [(where, linear) for layer in range(base.layers) for where in _writes(layer, base)]
        return [(_Where(), affine), *everywhere] if site.point == "writes" else everywhere
    if site.point in ("attn_out", "mlp_out"):
        slot = "attention" if site.point == "attn_out" else "mlp"
        if not base.writers(slot, site.layer):
            raise NotFoldable(f"{site}: layer {site.layer} of this model has no {slot} write")
        return [(_Where(slot, site.layer), affine)]
    if site.point == "resid_pre" and site.layer == 0:
        return [(_Where(), affine)]
    if affine.is_linear:
        raise NotFoldable(
            f"{intervention.name} at {site}: a projection of the stream in the middle of the model is no edit of any "
            "one writer. Sites that work: 'writes' (the stream itself, from the embedding on), 'writers', "
            f"'attn_out.{site.layer}', 'mlp_out.{site.layer}', 'resid_pre.0'"
        )
    if site.point == "resid_mid":
        if base.layout.parallel or len(_writes(site.layer, base)) < 2:
            raise NotFoldable(
                f"{site}: a layer of this model has no middle, for nothing is read between its writes; "
                f"'resid_post.{site.layer}' works"
            )
        return [(_Where("attention", site.layer), affine)]
    layer = site.layer if site.point == "resid_post" else site.layer - 1
    return [(_writes(layer, base)[-1], affine)]


def _writes(layer: int, base: Base) -> list[_Where]:
    found = [_Where(slot, layer) for slot in SLOTS if base.writers(slot, layer)]
    if not found:
        raise CheckpointError(
            f"layer {layer} of the checkpoint has no tensor that architectures/ says a {base.layout.model_type} layer "
            "writes to the stream with; is it complete?"
        )
    return found


def _pieces(where: _Where, affine: Affine, base: Base) -> list[Piece]:
    site = where.site(base.layout.parallel)
    if where.layer is None:
        return [Piece("embedding", affine, site=site)]
    pieces = []
    if affine.is_linear:
        for writer in base.writers(where.slot, where.layer):
            pieces.append(Piece("weight", affine, (where.slot,), where.layer, writer))
            if writer.bias is not None:
                pieces.append(Piece("bias", affine, (where.slot,), where.layer, writer))
    if affine.has_shift:
        others = [slot for slot in SLOTS if slot != where.slot] if base.layout.parallel else []
        pieces.append(Piece("shift", affine.without_linear(), (where.slot, *others), where.layer, site=site))
    return pieces


def _representations(target: str) -> dict[str, Callable[[Piece, Base], Holding | None]]:
    return {
        name: representation
        for name, representation in registry.load_all("representations").items()
        if target in getattr(registry.module("representations", name), "TARGETS", (CHECKPOINT,))
    }


def _tried(piece: Piece, base: Base, target: str) -> tuple[dict[str, Holding], dict[str, str]]:
    """Every representation that holds ``piece`` exactly, by name, and why the others do not.

    Raises:
        NotFoldable: none does; the message has the reason of each.
    """
    reasons, found = {}, {}
    for name, representation in _representations(target).items():
        try:
            holding = representation(piece, base)
        except NotFoldable as reason:
            reasons[name] = str(reason)
            continue
        if holding is not None:
            found[name] = holding
    if not found:
        shift = piece.part == "shift" and target == CHECKPOINT
        works = "; ablation at 'writes' or 'writers' works, and so does 'resid_pre.0'" if shift else ""
        why = "; ".join(reasons.values()) or f"no representation holds the {piece.part} at {piece.site}"
        raise NotFoldable(why + works)
    return found, reasons


def _change(edit: Edit) -> str:
    if edit.source is None:
        return f"new, |shift| {float(edit.affine.shift.norm()):.4g}" if edit.affine.has_shift else "new, zeros"
    parts = [] if edit.scale == 1 else [f"times {edit.scale:.4g}"]
    parts += [f"linear part of rank {edit.affine.left.shape[1]}"] if edit.affine.is_linear else []
    parts += [f"|shift| {float(edit.affine.shift.norm()):.4g}"] if edit.affine.has_shift else []
    if edit.appended is not None:
        parts.append(f"{edit.appended.values.shape[edit.appended.axis]} neurons appended")
    return " + ".join(parts) or f"{'copy' if edit.rows is None else 'rows'} of {edit.source}"


def _content(edit: Edit) -> dict[str, Any]:
    """What else an edit says of the tensor's content, where it does."""
    found: dict[str, Any] = {}
    if edit.only is not None:
        found["only"] = list(edit.only)
    if edit.diagonals:
        found["diagonals"] = [asdict(one) for one in edit.diagonals]
    if edit.rows is not None:
        found["rows"] = [edit.rows.start, edit.rows.stop]
        if not edit.rows.is_run:
            found["order"] = hashlib.sha256(json.dumps(edit.rows.order).encode()).hexdigest()
    if edit.scale != 1:
        found["scale"] = edit.scale
    if edit.appended is not None:
        values = edit.appended.values.contiguous().float().numpy().tobytes()
        found["appended"] = {"axis": edit.appended.axis, "sha256": hashlib.sha256(values).hexdigest()}
    return found


def _hash(affine: Affine) -> str:
    digest = hashlib.sha256()
    for part in (affine.left, affine.right, affine.shift):
        digest.update(part.contiguous().numpy().tobytes())
    return digest.hexdigest()
