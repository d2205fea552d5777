"""Activations at any sites of the residual stream, read in one pass and summed up as they come.

What makes it fast: prompts that begin with the same tokens (chat template, system prompt) share one pass over them,
batches hold prompts of about one length, and each forward stops once the last site asked for has been read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from .architectures import Layout, submodule
from .errors import ExtractionError, RecipeError
from .estimators import Statistics
from .prompts import Encoded
from .sites import READ_POINTS, Site

# Padded tokens in one forward. A processor is fastest where a batch's activations stay in its caches.
_TOKENS_ON_CPU = 512
_TOKENS_ELSEWHERE = 8192
# A group of prompts gets a prefix of its own where that saves more than this many tokens: the price of another forward.
_WORTH_A_FORWARD = 64
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
    tokens_per_batch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[Site, dict[str, Statistics]]:
    """What the stream holds at ``sites``, at the read position of every prompt, summed up per label.

    The result does not depend on batch size, order or shared prefixes (up to the rounding of the model's own dtype).
    Memory does not grow with the number of prompts unless ``rows`` asks for every vector.

    Args:
        model: a transformers causal language model, in any dtype, on any device; left as it was.
        encoded: the prompts (``prompts.encode``); ``labels`` has the label of each.
        rows: keep every vector, ``[count, d]`` float32 per label in the order of ``encoded``.
        tokens_per_batch: at most so many tokens, padding included, in one forward (but always at least one prompt);
            by default what suits the device.
        progress: called with (prompts done, prompts in all) after every batch.

    Raises:
        RecipeError: no prompts, or a site that is not one place (``writes``).
        ExtractionError: NaN or infinity at a site; the message names the site and the prompt.
    """
    if len(encoded) != len(labels):
        raise ValueError(f"{len(encoded)} prompts have {len(labels)} labels")
    if not encoded:
        raise RecipeError("there are no prompts to read activations from; give at least one")
    if tokens_per_batch is None:
        tokens_per_batch = _TOKENS_ON_CPU if model.device.type == "cpu" else _TOKENS_ELSEWHERE
    sums = _Sums(labels, rows)
    done = 0
    with _evaluating(model), _Reader(model, layout, sites) as reader, torch.inference_mode():
        for group in _groups(encoded) if _can_share(model) else [_Group(0, tuple(range(len(encoded))))]:
            prefix = _Prefix.run(reader, [encoded[index] for index in group.members], group.length)
            for batch in _batches(encoded, group, tokens_per_batch):
                sums.add(batch, _read(reader, [encoded[index] for index in batch], prefix))
                done += len(batch)
                if progress is not None:
                    progress(done, len(encoded))
    return sums.statistics()


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

    Memory grows with the number of tokens. For the rest as :func:`collect`.
    """
    if not encoded:
        raise RecipeError("there are no prompts to read activations from; give at least one")
    if tokens_per_batch is None:
        tokens_per_batch = _TOKENS_ON_CPU if model.device.type == "cpu" else _TOKENS_ELSEWHERE
    ends = list(accumulate(one.stop - one.start for one in encoded))
    found: dict[Site, Tensor] = {}
    done = 0
    with _evaluating(model), _Reader(model, layout, sites) as reader, torch.inference_mode():
        for batch in _batches(encoded, _Group(0, tuple(range(len(encoded)))), tokens_per_batch):
            members = [encoded[index] for index in batch]
            longest = max(len(one.ids) for one in members)
            ids = [one.ids + (0,) * (longest - len(one.ids)) for one in members]
            places = [(row, place) for row, one in enumerate(members) for place in range(one.start, one.stop)]
            rows, spans = [row for row, _ in places], [(place, place + 1) for _, place in places]
            reads = reader.forward(ids, None, lambda hidden, r=rows, s=spans: _summed(hidden, r, s))  # type: ignore[misc]
            _check(reads, [members[row] for row in rows])
            target = torch.cat([torch.arange(ends[index] - _length(encoded[index]), ends[index]) for index in batch])
            for site, read in reads.items():
                if site not in found:
                    found[site] = torch.empty(ends[-1], read.vectors.shape[1])
                found[site][target] = read.vectors.cpu()
            done += len(batch)
            if progress is not None:
                progress(done, len(encoded))
    return found


def _length(one: Encoded) -> int:
    return one.stop - one.start


# --- which prompts go together


@dataclass(frozen=True)
class _Group:
    """Prompts (by index) whose first ``length`` tokens are the same and are computed once."""

    length: int
    members: tuple[int, ...]


def _can_share(model: Any) -> bool:
    """Whether what a token leaves for later tokens is a key and a value per layer, and no recurrent state."""
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"])
    return not getattr(model, "_is_stateful", False) and kinds <= {"full_attention", "sliding_attention"}


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

    def __init__(self, model: Any, layout: Layout, sites: Sequence[Site]):
        self._model = model
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
            tokens = torch.tensor(ids, device=self._model.device)
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
    """Per site and label: the sum of the vectors and of their norms, in float64 where the device has it."""

    def __init__(self, labels: Sequence[str], rows: bool):
        self._labels = sorted(set(labels))
        self._of = [self._labels.index(label) for label in labels]
        self._counts = [self._of.count(number) for number in range(len(self._labels))]
        self._vectors: dict[Site, Tensor] = {}  # [labels, d]
        self._norms: dict[Site, Tensor] = {}  # [labels]
        self._rows: dict[Site, Tensor] | None = {} if rows else None  # [prompts, d] float32

    def add(self, batch: Sequence[int], reads: Mapping[Site, _Read]) -> None:
        """Add what the prompts ``batch`` (indices) gave."""
        for site, read in reads.items():
            wide = read.vectors.dtype if read.vectors.device.type == "mps" else torch.float64
            if site not in self._vectors:
                self._vectors[site] = read.vectors.new_zeros(len(self._labels), read.vectors.shape[1], dtype=wide)
                self._norms[site] = read.norms.new_zeros(len(self._labels), dtype=wide)
            of = torch.tensor([self._of[index] for index in batch], device=read.norms.device)
            self._vectors[site].index_add_(0, of, read.vectors.to(wide))
            self._norms[site].index_add_(0, of, read.norms.to(wide))
            if self._rows is not None:
                if site not in self._rows:
                    self._rows[site] = torch.empty(len(self._of), read.vectors.shape[1])
                self._rows[site][list(batch)] = read.vectors.cpu()

    def statistics(self) -> dict[Site, dict[str, Statistics]]:
        sites = sorted(self._vectors, key=lambda site: site.order)
        return {site: {label: self._one(site, n) for n, label in enumerate(self._labels)} for site in sites}

    def _one(self, site: Site, number: int) -> Statistics:
        count = self._counts[number]
        rows = None
        if self._rows is not None:
            rows = self._rows[site][[index for index, of in enumerate(self._of) if of == number]]
        mean = (self._vectors[site][number] / count).float().cpu()
        return Statistics(count, mean, float(self._norms[site][number]) / count, rows)
