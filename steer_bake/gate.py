"""Gates: a shift that is added only where a linear probe of what the MLP reads fires.

``h -> h + g(x) shift``. The probe's logit ``p.x`` runs through a ramp that is 0 below its threshold, 1 above and half
open at it: ``s = (p.x - threshold) / width + 1/2``, and with two neurons of the MLP's own activation function ``act``

    g(x) = [act(k s) - act(k (s - 1))] / k

A ReLU makes an exact clip. SiLU and GELU make a smooth ramp that overshoots on either side by the depth of the
activation's dip over ``k`` (SiLU 0.28 / k, GELU 0.17 / k). The hook runs the very neurons that a bake appends.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers.activations import ACT2FN

from .errors import NotFoldable, RecipeError
from .sites import Site

#: Significant bits of bfloat16, the coarsest dtype that a gate is stored in.
_BITS = 8


#: Activation functions, by their names in transformers, that are 0 far below zero and have ``act(t) - act(-t) = t``,
#: so that the ramp is half open at its threshold. (Of squares, such as ``relu2``, rounding would leave no ramp.)
RAMPS = (
    "relu", "silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_python", "gelu_pytorch_tanh", "quick_gelu"
)  # fmt: skip
NEURONS = 2  # of a gate


def check_activation(activation: str) -> None:
    """Raise NotFoldable where neurons with this activation function make no ramp."""
    if activation not in RAMPS:
        named = repr(activation) if activation else "of which the config has no name"
        raise NotFoldable(f"no gate is known for an MLP with the activation {named}; known: {', '.join(sorted(RAMPS))}")


@dataclass(frozen=True, eq=False)
class Gate:
    """Where a shift is open: a probe of ``mlp_in.L`` with its ramp.

    Raises:
        RecipeError: a number or the site makes no gate; the message says which.
    """

    site: Site  # mlp_in.L: the stream behind the norm of the MLP that the shift is written with
    probe: Tensor  # [d] float32: p
    threshold: float  # logit at which the gate is half open
    width: float = 2.0  # logits from closed to open
    sharpness: float = 8.0  # k, a power of two, so that dividing by it rounds nothing
    otherwise: Tensor | None = None  # [d] float32: what is added where the gate is closed; None: nothing
    name: str = ""  # what it fires on, for reports
    stored: str = ""  # the dtype, "bfloat16" for example, whose rounding its neurons have; empty: none

    def __post_init__(self) -> None:
        object.__setattr__(self, "probe", self.probe.float())
        if self.otherwise is not None:
            object.__setattr__(self, "otherwise", self.otherwise.float())
        if self.site.point != "mlp_in" or self.site.layer is None:
            raise RecipeError(f"a gate reads what the MLP reads, 'mlp_in.14' for example, and not {str(self.site)!r}")
        vectors = [self.probe] if self.otherwise is None else [self.probe, self.otherwise]
        if any(one.ndim != 1 or len(one) != len(self.probe) or not bool(one.isfinite().all()) for one in vectors):
            raise RecipeError(f"the vectors of the gate at {self.site} are not finite vectors of one length")
        if not bool(self.probe.any()):
            raise RecipeError(f"the probe of the gate at {self.site} is zero: it would never change its mind")
        if not math.isfinite(self.threshold) or not 0 < self.width < math.inf:
            raise RecipeError(
                f"the gate at {self.site} has threshold {self.threshold} and width {self.width}; give a finite number "
                "of logits, the width above zero"
            )
        if self.sharpness < 1 or math.frexp(self.sharpness)[0] != 0.5:
            raise RecipeError(f"the gate at {self.site} has sharpness {self.sharpness}; give a power of two, such as 8")
        if self._step > self.sharpness / 2:
            raise RecipeError(
                f"the threshold {self.threshold:.4g} of the gate at {self.site} is too far from zero for a ramp of "
                f"{self.width:.4g} logits: bfloat16 could not tell its ends apart. Make the ramp wider"
            )

    @property
    def layer(self) -> int:
        assert self.site.layer is not None
        return self.site.layer

    @property
    def _step(self) -> float:
        """What the neurons' biases are multiples of, so that bfloat16 holds them as they are."""
        first = self.sharpness * (0.5 - self.threshold / self.width)
        largest = max(abs(first), abs(first - self.sharpness))
        return float(2.0 ** (math.floor(math.log2(largest)) + 1 - _BITS))

    @property
    def _first(self) -> float:
        wanted = self.sharpness * (0.5 - self.threshold / self.width)
        return round(wanted / self._step) * self._step

    @property
    def held_threshold(self) -> float:
        """The threshold that is held: the given one, to the eight bits of bfloat16."""
        return self.width * (0.5 - self._first / self.sharpness)

    def neurons(self, shift: Tensor, activation: str) -> Neurons:
        """The neurons whose sum is ``g(x) shift``, ``shift`` [d] in the units of the MLP's output.

        Raises:
            NotFoldable: no ramp is known for the activation function.
        """
        check_activation(activation)
        rows = (self.sharpness / self.width * self.probe).expand(NEURONS, -1)
        biases = torch.tensor([self._first, self._first - self.sharpness])
        column = shift.float()[:, None] / self.sharpness
        made = Neurons(rows.contiguous(), biases, torch.cat([column, -column], dim=1), activation)
        return made.rounded(getattr(torch, self.stored)) if self.stored else made

    def opening(self, x: Tensor, activation: str) -> Tensor:
        """``g(x)`` [...] of what the MLP reads, ``x`` [..., d], in float32."""
        return self.neurons(torch.ones(1), activation)(x.float())[..., 0]

    def described(self) -> dict[str, object]:
        """As plain values, the vectors by hash."""
        return {
            "site": str(self.site),
            "name": self.name,
            "threshold": self.threshold,
            "held_threshold": self.held_threshold,
            "width": self.width,
            "sharpness": self.sharpness,
            "probe_sha256": _hash(self.probe),
            "otherwise_sha256": None if self.otherwise is None else _hash(self.otherwise),
        }


@dataclass(frozen=True, eq=False)
class Neurons:
    """Neurons of an MLP that has no other gate than its activation: ``columns act(rows x + biases)``."""

    rows: Tensor  # [n, d]
    biases: Tensor  # [n]
    columns: Tensor  # [d, n]
    activation: str

    def rounded(self, dtype: torch.dtype) -> Neurons:
        """As they are stored in ``dtype``, in float32."""
        rows, biases, columns = (part.to(dtype).float() for part in (self.rows, self.biases, self.columns))
        return Neurons(rows, biases, columns, self.activation)

    def __call__(self, x: Tensor) -> Tensor:
        """What they add, [..., d], for what the MLP reads, ``x`` [..., d]; in the dtype of ``x``, as the MLP would."""
        rows, biases, columns = (part.to(x) for part in (self.rows, self.biases, self.columns))
        return functional.linear(ACT2FN[self.activation](functional.linear(x, rows, biases)), columns)


def _hash(vector: Tensor) -> str:
    return hashlib.sha256(vector.contiguous().numpy().tobytes()).hexdigest()
