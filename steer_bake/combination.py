"""One vector learned in the span of several category directions (From Refusal Tokens to Refusal Control, arXiv
2603.13359, equations 8 to 11 and algorithm 2).

The directions, whitened by the covariance of benign activations and orthonormalised, give a basis ``Q`` [d, k]; then
``s = U (V^T z)`` is learned, ``U`` and ``V`` beginning as ``Q``, so that the frozen model refuses harmful prompts and
keeps its next-token distribution on benign ones. ``z`` is a parameter and not an activation: ``s`` is one constant
vector, an ordinary shift, and every representation of a shift holds it. With ``form="linear"`` the same factors act on
the stream instead, ``h + U (V^T h)``: a linear map at a site, which only sites that one tensor writes can hold
(``mlp_out``, ``attn_out``); at ``resid_post`` the planner refuses it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from .affine import Affine
from .errors import RecipeError
from .interventions import Intervention
from .prompts import Encoded
from .refusal import Event, next_token_logits
from .sites import Site
from .steering import steer


def whitened(directions: Tensor, benign: Tensor, ridge: float = 1e-4, relative: bool = False) -> Tensor:
    """``W H`` [d, k] with ``W = (Sigma + lambda I)^(-1/2)``, the ZCA whitening of the ``benign`` rows [n, d].

    ``directions`` is ``H`` [d, k]. With fewer rows than dimensions and a small lambda, ``W`` is in effect a projection
    onto what benign activations never do; ``relative`` takes lambda as a multiple of ``trace(Sigma) / d``.
    """
    rows = benign.double()
    _, sizes, axes = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)  # axes [r, d]
    variances = sizes.square() / len(rows)
    amount = ridge * float(variances.sum()) / rows.shape[1] if relative else ridge
    if not amount > 0:
        raise RecipeError(
            f"the ridge of the benign covariance is {amount:g}; give a positive one, and prompts that differ"
        )
    gains = (variances + amount).rsqrt() - 1 / math.sqrt(amount)
    wide = directions.double()
    found: Tensor = wide / math.sqrt(amount) + axes.T @ (gains[:, None] * (axes @ wide))
    return found


def basis(directions: Tensor, benign: Tensor, ridge: float = 1e-4, relative: bool = False) -> Tensor:
    """``Q`` [d, k] orthonormal, from the QR decomposition of the whitened ``directions`` [d, k].

    Raises:
        RecipeError: the directions are linearly dependent.
    """
    columns: Tensor
    columns, upper = torch.linalg.qr(whitened(directions, benign, ridge, relative))
    sizes = upper.diagonal().abs()
    if float(sizes.min()) < 1e-9 * float(sizes.max()):
        raise RecipeError("the category directions are linearly dependent; leave one of the categories out")
    return columns


@dataclass(frozen=True)
class Learning:
    """How the combination is trained. The paper: rate 1e-5, batches of 1, ``length`` 1."""

    epochs: int = 5
    rate: float = 0.02  # of AdamW
    batch: int = 8  # prompts of each side
    kl_weight: float = 1.0
    clip: float = 1.0  # of the gradient's norm
    start: float = 0.01  # deviation of z at the beginning: the authors' code; their paper says 1
    length: float = 1.0  # what s is multiplied by: the mean stream norm makes rates alike in every model
    seed: int = 0
    form: Literal["constant", "linear"] = "constant"


@dataclass(frozen=True)
class Step:
    """One step of the training: the mean losses of its batch."""

    refusal: float  # -log p(refusal) on harmful prompts
    kl: float  # KL(base || steered) on benign prompts, next token


@dataclass(frozen=True, eq=False)
class Combination:
    """What was learned at ``site``, and how the training went."""

    site: Site
    affine: Affine
    curve: tuple[Step, ...]

    @property
    def vector(self) -> Tensor:
        """``s`` [d] float32; its length is what coefficient 1 adds."""
        return self.affine.shift

    def intervention(self, strength: float = 1.0) -> Intervention:
        """The combination as something to steer with, and, as far as the site allows, to bake."""
        scaled = replace(self.affine, left=strength * self.affine.left, shift=strength * self.affine.shift)
        return Intervention(self.site, scaled, "combination", strength)


def learn(
    model: Any,
    site: Site,
    start: Tensor,
    harmful: Sequence[Encoded],
    benign: Sequence[Encoded],
    event: Event,
    learning: Learning | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Combination:
    """Minimise ``-mean log p(event | harmful) + kl_weight mean KL(p_base || p_steered | benign)`` over U, V and z.

    The model is frozen; gradients pass through the same hook that is the reference of every bake. It acts at every
    token position, as a baked file does (the paper's acts at the last one).

    Args:
        start: ``Q`` [d, k], where U and V begin (:func:`basis`).
        harmful, benign: prompts; each epoch goes once through the longer list, the other is repeated.

    Raises:
        RecipeError: a side has no prompt, or the loss is no number any more.
    """
    wanted = learning or Learning()
    if not harmful or not benign:
        raise RecipeError("the combination needs harmful and benign prompts to learn from")
    generator = torch.Generator().manual_seed(wanted.seed)
    device = model.device
    left, right = (start.float().to(device).clone().requires_grad_() for _ in range(2))
    middle = (wanted.start * torch.randn(start.shape[0], generator=generator)).to(device).requires_grad_()
    parameters = [left, right, middle] if wanted.form == "constant" else [left, right]
    with _frozen(model):
        with torch.no_grad():
            reference = [next_token_logits(model, [one])[0].log_softmax(-1).cpu() for one in benign]
        optimiser = torch.optim.AdamW(parameters, lr=wanted.rate, weight_decay=0.0)
        curve: list[Step] = []
        batches = list(_batches(len(harmful), len(benign), wanted, generator))
        for number, (asked, kept) in enumerate(batches, 1):
            optimiser.zero_grad()
            if not bool(_affine(left, right, middle, wanted).shift.isfinite().all()):
                raise RecipeError(f"training the combination diverged before step {number}; use a smaller rate")
            with steer(model, [Intervention(site, _affine(left, right, middle, wanted), "combination")]):
                refused = -event.log_probability(model, [harmful[index] for index in asked]).mean()
                refused.backward()  # type: ignore[no-untyped-call]
            with steer(model, [Intervention(site, _affine(left, right, middle, wanted), "combination")]):
                steered = next_token_logits(model, [benign[index] for index in kept]).log_softmax(-1)
                before = torch.stack([reference[index] for index in kept]).to(steered)
                moved = (before.exp() * (before - steered)).sum(-1).mean()
                (wanted.kl_weight * moved).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, wanted.clip)
            optimiser.step()
            curve.append(Step(refused.item(), moved.item()))
            if not math.isfinite(curve[-1].refusal + curve[-1].kl):
                raise RecipeError(f"training the combination diverged at step {number}; use a smaller rate")
            if progress is not None:
                progress(number, len(batches))
        affine = _affine(left.detach().cpu(), right.detach().cpu(), middle.detach().cpu(), wanted)
    return Combination(site, affine, tuple(curve))


def _affine(left: Tensor, right: Tensor, middle: Tensor, wanted: Learning) -> Affine:
    width = left.shape[0]
    if wanted.form == "linear":
        return Affine(wanted.start * left, right, left.new_zeros(width))
    return Affine(left.new_zeros(width, 0), left.new_zeros(width, 0), wanted.length * (left @ (right.T @ middle)))


def _batches(
    harmful: int, benign: int, wanted: Learning, generator: torch.Generator
) -> Iterator[tuple[list[int], list[int]]]:
    for _ in range(wanted.epochs):
        orders = [torch.randperm(count, generator=generator).tolist() for count in (harmful, benign)]
        for at in range(0, max(harmful, benign), wanted.batch):
            places = range(at, min(at + wanted.batch, max(harmful, benign)))
            yield tuple([order[place % len(order)] for place in places] for order in orders)  # type: ignore[misc]


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """Without gradients of its own and without dropout; as it was afterwards."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = [module for module in model.modules() if module.training]
    for parameter in trained:
        parameter.requires_grad_(False)
    model.eval()
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True
