"""Activations at any sites of the residual stream, read in one pass and summed up as they come.

What makes it fast: prompts that begin with the same tokens (chat template, system prompt) share one pass over them,
batches hold prompts of about one length, and each forward stops once the last site asked for has been read. Under
``torchrun`` every process reads its share of the prompts and the sums are added up.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from . import distributed
from .architectures import Layout, submodule
from .errors import ExtractionError, RecipeError
from .estimators import Statistics
from .prompts import Encoded
from .refusal import keeps_keys_and_values
from .sites import READ_POINTS, Site

# Padded tokens in one forward. A processor is fastest where a batch's activations stay in its caches.
_TOKENS_ON_CPU = 512
_TOKENS_ELSEWHERE = 8192
# A group of prompts gets a prefix of its own where that saves more than this many tokens: the price of another forward.
_WORTH_A_FORWARD = 64
_NOTHING = "there are no prompts to read activations from; give at least one"
# Beginnings nested deeper than this in one another are not looked for.
_DEEPEST = 32


def collect(
    model: Any,
    layout: Layout,
    encoded: Sequence[Encoded],
    labels: Sequence[str],
    sites: Sequence[Site],
    *,
    rows: bool = False,
    covariance: Collection[str] = (),
    weights: Sequence[float] | None = None,
    tokens_per_batch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[Site, dict[str, Statistics]]:
    """What the stream holds at ``sites``, at the read position of every prompt, summed up per label.

    The result does not depend on batch size, order, shared prefixes or the number of processes (up to the rounding of
    the model's own dtype). Memory does not grow with the number of prompts unless ``rows`` asks for every vector.

    Args:
        model: a transformers causal language model, in any dtype, on any device; left as it was.
        encoded: the prompts (``prompts.encode``); ``labels`` has the label of each.
        rows: keep every vector, ``[count, d]`` float32 per label in the order of ``encoded``.
        covariance: the labels whose covariance is needed; of a label with fewer than ``d`` prompts its rows are kept
            instead, which are smaller and as good.
        weights: of every prompt, not negative, for ``weighted_mean`` and ``covariance``; by default all are 1.
        tokens_per_batch: at most so many tokens, padding included, in one forward (but always at least one prompt);
            by default what suits the device.
        progress: called with (prompts done, prompts in all) after every batch; under torchrun of this process's share.

    Raises:
        RecipeError: no prompts, a site that is not one place (``writes``), or a label whose weights are all 0.
        ExtractionError: NaN or infinity at a site; the message names the site and the prompt.
    """
    if len(encoded) != len(labels) or (weights is not None and len(weights) != len(encoded)):
        raise ValueError(f"{len(encoded)} prompts have {len(labels)} labels and {len(weights or encoded)} weights")
    if not encoded:
        raise RecipeError(_NOTHING)
    sums = _Sums(labels, sites, layout.width, rows, covariance, weights)
    _walk(model, layout, encoded, sites, sums.add, tokens_per_batch, progress)
    return sums.statistics()


def project(
    model: Any,
    layout: Layout,
    encoded: Sequence[Encoded],
    vectors: Mapping[Site, Tensor],
    *,
    tokens_per_batch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[Site, Tensor]:
    """``p(x) = <h(x), v>`` [prompts] float64 at every site, ``vectors`` having ``v`` [d] of each; no vector is kept.

    Raises:
        RecipeError, ExtractionError: as :func:`collect`.
    """
    found = {site: torch.zeros(len(encoded), dtype=torch.float64) for site in vectors}

    def take(batch: Sequence[int], reads: Mapping[Site, _Read]) -> None:
        for site, read in reads.items():
            found[site][list(batch)] = read.vectors.cpu().double() @ vectors[site].double()

    _walk(model, layout, encoded, list(vectors), take, tokens_per_batch, progress)
    distributed.add_up(list(found.values()))
    return found


def _walk(
    model: Any,
    layout: Layout,
    encoded: Sequence[Encoded],
    sites: Sequence[Site],
    take: Callable[[Sequence[int], Mapping[Site, _Read]], None],
    tokens_per_batch: int | None,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Call ``take`` with (prompts by index, what they gave) for this process's share of the prompts."""
    if not encoded:
        raise RecipeError(_NOTHING)
    device, offloaded = _where(model)
    tokens_per_batch = tokens_per_batch or _batch_size(device, offloaded)
    own = distributed.share(len(encoded))
    mine = [encoded[index] for index in own]
    done = 0
    with _evaluating(model), _Reader(model, layout, sites, device) as reader, torch.inference_mode():
        sharing = keeps_keys_and_values(model) and not offloaded
        for group in _groups(mine) if sharing and mine else [_Group(0, tuple(range(len(mine))))]:
            prefix = _Prefix.run(reader, [mine[index] for index in group.members], group.length)
            for batch in _batches(mine, group, tokens_per_batch):
                take([own[index] for index in batch], _read(reader, [mine[index] for index in batch], prefix))
                done += len(batch)
                if progress is not None:
                    progress(done, len(mine))


def _where(model: Any) -> tuple[torch.device, bool]:
    """The device that tokens go to, and whether accelerate keeps some of the weights elsewhere until they are used."""
    spread = getattr(model, "hf_device_map", None)
    if spread is None:
        return model.device, False
    places = set(spread.values())
    first = next((place for place in spread.values() if place != "disk"), "cpu")
    return torch.device(first), "disk" in places or ("cpu" in places and len(places) > 1)


def _batch_size(device: torch.device, offloaded: bool) -> int:
    # Every forward of a model that lies on disk reads it from there.
    return _TOKENS_ON_CPU if device.type == "cpu" and not offloaded else _TOKENS_ELSEWHERE


def tokens(
    model: Any,
    layout: Layout,
    encoded: Sequence[Encoded],
    sites: Sequence[Site],
    *,
    tokens_per_batch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[Site, Tensor]:
    """What is at ``sites`` at every token of each prompt's read span: [tokens, d] float32, the prompts in their order.

    Memory grows with the number of tokens, in every process under torchrun. For the rest as :func:`collect`.
    """
    if not encoded:
        raise RecipeError(_NOTHING)
    device, offloaded = _where(model)
    own = distributed.share(len(encoded))
    mine = [encoded[index] for index in own]
    ends = list(accumulate(map(_length, encoded)))
    found = {site: torch.zeros(ends[-1], layout.width) for site in sites}
    done = 0
    with _evaluating(model), _Reader(model, layout, sites, device) as reader, torch.inference_mode():
        everyone = _Group(0, tuple(range(len(mine))))
        for batch in _batches(mine, everyone, tokens_per_batch or _batch_size(device, offloaded)):
            members = [mine[index] for index in batch]
            longest = max(len(one.ids) for one in members)
            ids = [one.ids + (0,) * (longest - len(one.ids)) for one in members]
            places = [(row, place) for row, one in enumerate(members) for place in range(one.start, one.stop)]
            rows, spans = [row for row, _ in places], [(place, place + 1) for _, place in places]
            reads = reader.forward(ids, None, lambda hidden, r=rows, s=spans: _summed(hidden, r, s))  # type: ignore[misc]
            _check(reads, [members[row] for row in rows])
            last = [ends[own[index]] for index in batch]
            target = torch.cat([torch.arange(end - _length(one), end) for end, one in zip(last, members, strict=True)])
            for site, read in reads.items():
                found[site][target] = read.vectors.cpu()
            done += len(batch)
            if progress is not None:
                progress(done, len(mine))
    distributed.add_up(list(found.values()))
    return found


def _length(one: Encoded) -> int:
    return one.stop - one.start


# --- which prompts go together


@dataclass(frozen=True)
class _Group:
    """Prompts (by index) whose first ``length`` tokens are the same and are computed once."""

    length: int
    members: tuple[int, ...]


def _groups(encoded: Sequence[Encoded]) -> list[_Group]:
    """A partition of the prompts by shared beginnings, with fewer tokens to compute than without.

    Every prompt keeps a token of its own, so that each has a forward in which it is read.
    """
    found: list[_Group] = []
    rest = _split(encoded, sorted(range(len(encoded)), key=lambda index: encoded[index].ids), 0, found)
    return found + ([_Group(0, tuple(rest))] if rest else [])


def _split(encoded: Sequence[Encoded], order: list[int], known: int, found: list[_Group], depth: int = 0) -> list[int]:
    """Put the groups that pay into ``found``; the answer is who is left, to be computed after ``known`` shared tokens.

    ``order`` is sorted by tokens, so that what its first and last prompt share is shared by all.
    """
    first, last = encoded[order[0]].ids, encoded[order[-1]].ids
    most = min(len(encoded[index].ids) for index in order) - 1
    length = next((place for place in range(most) if first[place] != last[place]), most)
    branches = [list(branch) for _, branch in groupby(order, key=lambda index: encoded[index].ids[length])]
    rest: list[int] = []
    for branch in branches:
        deeper = 1 < len(branch) < len(order) and depth < _DEEPEST
        rest += _split(encoded, branch, length, found, depth + 1) if deeper else branch
    if len(rest) * (length - known) - length <= _WORTH_A_FORWARD:
        return rest
    found.append(_Group(length, tuple(rest)))
    return []


def _batches(encoded: Sequence[Encoded], group: _Group, tokens_per_batch: int) -> Iterator[list[int]]:
    """The group's prompts, longest first: a batch too large for the memory fails at once and not at the end."""
    batch: list[int] = []
    for index in sorted(group.members, key=lambda index: -len(encoded[index].ids)):
        longest = len(encoded[(batch or [index])[0]].ids)
        width = max(longest - group.length, longest // 4)  # attention still sees the shared tokens, once per prompt
        if batch and (len(batch) + 1) * width > tokens_per_batch:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


# --- one forward


class _Stop(Exception):
    """Ends a forward once every site has been read."""


class _Reader:
    """Hooks at the sites, and a forward that runs no further than the last of them."""

    def __init__(self, model: Any, layout: Layout, sites: Sequence[Site], device: torch.device):
        self._model, self._device = model, device
        self._layout = layout
        self._sites = list(dict.fromkeys(sites))
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._seen: dict[Site, _Read] = {}
        self._keep: Callable[[Tensor], _Read]
        self._shape = torch.Size()

    def __enter__(self) -> _Reader:
        try:
            for site in self._sites:
                self._handles.append(self._hook(site))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def forward(
        self, ids: Sequence[Sequence[int]], cache: DynamicCache | None, keep: Callable[[Tensor], _Read]
    ) -> dict[Site, _Read]:
        """``keep`` of the stream [batch, seq, d] at every site, for the tokens ``ids`` [batch, seq] after ``cache``.

        Padding is on the right, where no token that counts can see it: a causal model needs no mask for that.
        """
        self._seen, self._keep = {}, keep
        try:
            tokens = torch.tensor(ids, device=self._device)
            self._shape = tokens.shape
            self._model(input_ids=tokens, past_key_values=cache, use_cache=cache is not None)
        except _Stop:
            return self._seen
        missing = ", ".join(str(site) for site in self._sites if site not in self._seen)
        raise ExtractionError(
            f"the model's forward never reached {missing}; its layout is not what architectures/ says"
        )

    def _hook(self, site: Site) -> torch.utils.hooks.RemovableHandle:
        if site.layer is None:
            raise RecipeError(
                f"activations are read at one place, and {str(site)!r} is many; name layers, like resid_post.14"
            )
        module, scale = self._place(site, site.layer)
        if site.point in ("resid_pre", "resid_mid", *READ_POINTS):

            def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                self._see(site, args[0] if args else kwargs["hidden_states"], scale)

            return module.register_forward_pre_hook(before, with_kwargs=True)

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._see(site, output[0] if isinstance(output, (tuple, list)) else output, scale)

        return module.register_forward_hook(after)

    def _place(self, site: Site, layer: int) -> tuple[nn.Module, float]:
        """The module to hook, and what its output is multiplied by on the way to the stream."""
        layout, whole = self._layout, submodule(self._model, self._layout.layer(layer))
        if site.point in ("resid_pre", "resid_post"):
            return whole, 1.0
        if site.point == "resid_mid":
            if not layout.architecture.middle:
                raise RecipeError(f"{site} cannot be read in a {layout.model_type} model: no module takes it as input")
            return whole.get_submodule(layout.architecture.middle), 1.0
        if site.point in READ_POINTS:
            return layout.reader(self._model, layer), 1.0
        blocks = layout.modules(self._model, "attention" if site.point == "attn_out" else "mlp", layer)
        if len(blocks) != 1:
            raise RecipeError(f"{site} cannot be read: layer {layer} has {len(blocks)} blocks that write there")
        block, module = blocks[0]
        return module, block.scale(layout.text)

    def _see(self, site: Site, hidden: Tensor, scale: float) -> None:
        hidden = hidden.reshape(*self._shape, -1)  # some layers flatten batch and sequence
        self._seen[site] = self._keep(hidden if scale == 1.0 else hidden * scale)
        if len(self._seen) == len(self._sites):
            raise _Stop


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout inside, and in the old mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Shared(DynamicCache):
    """Keys and values of a prefix, computed for one prompt and lent to any number of them: nothing is added to it."""

    def __init__(self, computed: DynamicCache):
        super().__init__()
        self.layers = computed.layers

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The prefix followed by ``key_states`` and ``value_states`` [batch, heads, seq, head width]."""
        batch = key_states.shape[0]
        layer: Any = self.layers[layer_idx]
        keys, values = layer.keys.expand(batch, -1, -1, -1), layer.values.expand(batch, -1, -1, -1)
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


@dataclass(frozen=True, eq=False)
class _Read:
    """At one site: per prompt (or per span) the stream and its length, summed over the tokens that are read."""

    vectors: Tensor  # [n, d] float32
    norms: Tensor  # [n] float32


@dataclass(frozen=True, eq=False)
class _Prefix:
    """The shared first tokens, computed once: what later tokens attend to, and what is read inside of them."""

    length: int
    cache: DynamicCache | None
    spans: tuple[tuple[int, int], ...]  # the spans [start, stop) that some prompt reads there
    reads: Mapping[Site, _Read]  # n is the span

    @classmethod
    def run(cls, reader: _Reader, members: Sequence[Encoded], length: int) -> _Prefix:
        """Compute the first ``length`` tokens of ``members``; nothing to do where that is 0."""
        if not length:
            return cls(0, None, (), {})
        spans = tuple(sorted({(one.start, min(one.stop, length)) for one in members if one.start < length}))
        cache = DynamicCache()
        reads = reader.forward(
            [members[0].ids[:length]], cache, lambda hidden: _summed(hidden, [0] * len(spans), spans)
        )
        return cls(length, _Shared(cache), spans, reads)


def _summed(hidden: Tensor, rows: Sequence[int], spans: Sequence[tuple[int, int]]) -> _Read:
    """For each n, ``hidden`` [batch, seq, d] summed over tokens ``spans[n]`` of row ``rows[n]``."""
    numbers = [(n, row, place) for n, (row, span) in enumerate(zip(rows, spans, strict=True)) for place in range(*span)]
    n, row, place = torch.tensor(numbers, device=hidden.device, dtype=torch.long).reshape(-1, 3).unbind(1)
    read = hidden[row, place].float()  # [tokens read, d]
    out = _Read(read.new_zeros(len(spans), read.shape[-1]), read.new_zeros(len(spans)))
    out.vectors.index_add_(0, n, read)
    out.norms.index_add_(0, n, read.norm(dim=-1))
    return out


def _read(reader: _Reader, members: Sequence[Encoded], prefix: _Prefix) -> dict[Site, _Read]:
    """One forward over the prompts' own tokens: the mean over the read span at every site, n being the prompt."""
    skip, longest = prefix.length, max(len(one.ids) for one in members)
    ids = [one.ids[skip:] + (0,) * (longest - len(one.ids)) for one in members]
    spans = [(max(one.start - skip, 0), max(one.stop - skip, 0)) for one in members]
    reads = reader.forward(ids, prefix.cache, lambda hidden: _summed(hidden, range(len(members)), spans))
    for number, (start, stop) in enumerate(prefix.spans):
        inside = [row for row, one in enumerate(members) if one.start == start and min(one.stop, skip) == stop]
        for site, read in reads.items():
            read.vectors[inside] += prefix.reads[site].vectors[number]
            read.norms[inside] += prefix.reads[site].norms[number]
    for site, read in reads.items():
        counts = read.norms.new_tensor([one.stop - one.start for one in members])
        reads[site] = _Read(read.vectors / counts[:, None], read.norms / counts)
    _check(reads, members)
    return reads


def _check(reads: Mapping[Site, _Read], members: Sequence[Encoded]) -> None:
    if bool(torch.stack([read.norms.isfinite().all().cpu() for read in reads.values()]).all()):
        return
    for site in sorted(reads, key=lambda site: site.order):
        for one, fine in zip(members, reads[site].norms.isfinite().tolist(), strict=True):
            if not fine:
                raise ExtractionError(
                    f"NaN or infinity at {site} for the prompt {one.beginning!r}; "
                    "load the model in float32 or bfloat16, or look for a damaged weight before that site"
                )


# --- sums


class _Sums:
    """Per site and label: the sums of the vectors and of their norms, in float64 where the device has it."""

    def __init__(
        self,
        labels: Sequence[str],
        sites: Sequence[Site],
        width: int,
        rows: bool,
        covariance: Collection[str],
        weights: Sequence[float] | None,
    ):
        self._labels = sorted(set(labels))
        self._of = torch.tensor([self._labels.index(label) for label in labels])
        self._counts = self._of.bincount(minlength=len(self._labels)).tolist()
        self._is_weighted = weights is not None
        self._weights = torch.ones(len(labels), dtype=torch.float64)
        if weights is not None:
            self._weights = torch.tensor(list(weights), dtype=torch.float64)
        self._totals = torch.zeros(len(self._labels), dtype=torch.float64).index_add_(0, self._of, self._weights)
        for label, total in zip(self._labels, self._totals.tolist(), strict=True):
            if not total > 0:
                raise RecipeError(f"all prompts labelled {label!r} have weight 0; their scores say nothing about them")
        wanted = [n for n, label in enumerate(self._labels) if label in covariance]
        few = {n for n in wanted if self._counts[n] < width}
        self._kept = set(range(len(self._labels))) if rows else few
        self._squared = [n for n in wanted if n not in self._kept]
        self._place = torch.zeros(len(labels), dtype=torch.long)  # of a prompt among the rows of its label
        for n in range(len(self._labels)):
            self._place[self._of == n] = torch.arange(self._counts[n])
        self._sites = sorted(set(sites), key=lambda site: site.order)
        count = len(self._labels)
        self._sums: dict[Site, _Sum] = {
            site: _Sum(
                torch.zeros(count, width, dtype=torch.float64),
                torch.zeros(count, width, dtype=torch.float64) if self._is_weighted else None,
                torch.zeros(count, dtype=torch.float64),
                {n: torch.zeros(self._counts[n], width) for n in sorted(self._kept)},
                {n: torch.zeros(width, width, dtype=torch.float64) for n in self._squared},
            )
            for site in self._sites
        }

    def add(self, batch: Sequence[int], reads: Mapping[Site, _Read]) -> None:
        """Add what the prompts ``batch`` (indices) gave."""
        chosen = torch.tensor(list(batch))
        of, weights = self._of[chosen], self._weights[chosen]
        for site, read in reads.items():
            into, vectors = self._sums[site], read.vectors.cpu()
            wide = vectors.double()
            into.vectors.index_add_(0, of, wide)
            into.norms.index_add_(0, of, read.norms.cpu().double())
            if into.weighted is not None:
                into.weighted.index_add_(0, of, weights[:, None] * wide)
            for n, rows in into.rows.items():
                rows[self._place[chosen[of == n]]] = vectors[of == n]
            for n, square in into.squares.items():
                inside = of == n
                square.addmm_(wide[inside].T, weights[inside, None] * wide[inside])

    def statistics(self) -> dict[Site, dict[str, Statistics]]:
        for site in self._sites:
            distributed.add_up(self._sums[site].tensors())
        return {site: {label: self._one(site, n) for n, label in enumerate(self._labels)} for site in self._sites}

    def _one(self, site: Site, number: int) -> Statistics:
        found, count, total = self._sums[site], self._counts[number], self._totals[number]
        mean = found.vectors[number] / count
        centre = mean if found.weighted is None else found.weighted[number] / total
        covariance = None
        if number in found.squares:
            covariance = found.squares[number] / total - torch.outer(centre, centre)
        return Statistics(
            count, mean.float(), float(found.norms[number]) / count,
            rows=found.rows.get(number),
            weights=self._weights[self._of == number] if self._is_weighted and number in found.rows else None,
            weighted_mean=centre,
            covariance=covariance,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Sum:
    """At one site, in float64 on the CPU; the first axis is the label."""

    vectors: Tensor  # [labels, d]
    weighted: Tensor | None  # [labels, d] with each vector times its weight; None where all weights are 1
    norms: Tensor  # [labels]
    rows: Mapping[int, Tensor]  # label to [count, d] float32
    squares: Mapping[int, Tensor]  # label to [d, d], sum w h h^T

    def tensors(self) -> list[Tensor]:
        weighted = [] if self.weighted is None else [self.weighted]
        return [self.vectors, *weighted, self.norms, *self.rows.values(), *self.squares.values()]
