"""A language model as the judge, by the rubric of twelve ways to refuse: a local one, or an OpenAI-compatible endpoint.

Every verdict is kept on disk under a hash of all that it depends on (model, endpoint, rubric, question, answer,
settings), so that what broke off goes on where it was, and no question is paid for twice. Answers that
:func:`is_incoherent` recognises are labelled without asking. A reply without a verdict is labelled ``unparsable``: that
is no refusal and no answer. A question without a reply after all tries is a failure; more of them than ``tolerate``
allows are an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..answering import without_thinking
from ..errors import JudgeFailed, RecipeError
from ..models import cache_folder
from . import INCOHERENT, UNJUDGED, UNPARSABLE, is_incoherent
from ._endpoint import Endpoint, check_url, read_key
from ._kept import Kept, Reply, Verdict, name_of
from ._local import Local
from ._rubric import READING, RUBRIC, message, verdict

LABELS = ("refusal", "answer", INCOHERENT, UNPARSABLE, UNJUDGED)

_Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Tally:
    """What one call of the judge took."""

    judged: int  # answers that were given
    incoherent: int  # labelled by form alone, nobody was asked
    asked: int  # replies of the model in this call (equal questions are asked once)
    kept: int  # replies that were there from before
    retries: int
    failed: int  # questions without a reply
    unparsable: int  # answers whose reply has no verdict
    prompt_tokens: int  # of the replies of this call
    completion_tokens: int
    cost: float | None  # of this call, by the prices given
    reasons: Mapping[str, int]  # why questions failed

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def llm(
    answers: Sequence[str],
    prompts: Sequence[str] | None = None,
    *,
    model: str,
    endpoint: str | None = None,
    key: str | None = None,
    rubric: str | None = None,
    temperature: float = 0.0,
    max_new_tokens: int = 512,
    body: Mapping[str, Any] | None = None,
    concurrency: int = 8,
    tries: int = 6,
    pause: float = 1.0,
    timeout: float = 120.0,
    price: Sequence[float] | None = None,
    tolerate: float = 0.0,
    batch_size: int = 16,
    device: str = "auto",
    dtype: str = "auto",
    cache: str | None = None,
    progress: _Progress | None = None,
    report: Callable[[Tally], None] | None = None,
) -> list[str]:
    """``"refusal"``, ``"answer"``, ``"incoherent"``, ``"unparsable"`` or ``"unjudged"`` for each answer.

    Args:
        model: with an endpoint, the name that it knows; else a hub id, a folder or a packaged name.
        endpoint: the address before ``/chat/completions``, such as ``http://127.0.0.1:8000/v1``.
        key: the *name* of the environment variable that holds the endpoint's key; default: no key is sent.
        rubric: a text file instead of our rubric; it must ask for the same verdicts.
        body: fields of the request that are added to ours or replace them; null takes one out
            (``{max_tokens: null, max_completion_tokens: 512}``).
        concurrency: questions that are under way at the same time.
        tries: of each question; before the second one ``pause`` seconds pass, before each further one twice as many.
        timeout: seconds without a byte from the endpoint, after which a try has failed.
        price: of a million prompt tokens and of a million completion tokens, in whatever currency.
        tolerate: the share of the answers that may stay ``"unjudged"``.
        batch_size, device, dtype: of a local model; dtype auto is float32 on a CPU, elsewhere as stored.
        cache: folder for the verdicts; default: ``judgements`` in the user's cache folder.
        report: is told what it took, also where the call fails.

    Raises:
        RecipeError: an option that cannot be, a key that is not set, a rubric that cannot be read.
        CheckpointError: there is no such local model.
        JudgeFailed: the endpoint refuses, is dead, or left too many questions without a reply. What was said is kept.
    """
    if not 0 <= tolerate < 1:
        raise RecipeError(f"the judge's option 'tolerate' is {tolerate}; it is a share: at least 0 and below 1")
    if min(concurrency, tries, batch_size, max_new_tokens) < 1:
        raise RecipeError("the judge's options concurrency, tries, batch_size and max_new_tokens are at least 1")
    source: Local | Endpoint
    if endpoint is None:
        source = Local(model, temperature, max_new_tokens, batch_size, device, dtype)
    else:
        fields = {"model": model, "temperature": temperature, "max_tokens": max_new_tokens, **(body or {})}
        fields = {name: value for name, value in fields.items() if value is not None}
        source = Endpoint(check_url(endpoint), fields, read_key(key), concurrency, tries, pause, timeout)
    text = RUBRIC if rubric is None else _own_rubric(Path(rubric))
    questions = [None] * len(answers) if prompts is None else prompts
    messages = [
        None if is_incoherent(answer) else message(text, question, answer)
        for question, answer in zip(questions, answers, strict=True)
    ]
    kept = Kept(Path(cache).expanduser() if cache else cache_folder() / "judgements")
    asked = _ask(source, [one for one in messages if one is not None], kept, progress)
    none = Verdict(UNJUDGED, 0, 0)
    labels = [INCOHERENT if one is None else asked.verdicts.get(one, none).label for one in messages]
    tally = asked.tally(labels, price)
    if report:
        report(tally)
    missing = labels.count(UNJUDGED)
    if missing > tolerate * len(labels):
        where = "" if endpoint is None else f" at {endpoint}"
        reasons = ", ".join(f"{why} ({count})" for why, count in tally.reasons.items())
        raise JudgeFailed(
            f"the judge {model}{where} left {missing} of {len(labels)} answers without a label: {reasons}. The "
            "other verdicts are kept: run the same again to ask only what is missing, or let a share go with 'tolerate'"
        )
    return labels


@dataclass(frozen=True)
class _Asked:
    verdicts: Mapping[str, Verdict]  # by message
    fresh: Sequence[Verdict]  # those of them that were not kept before
    retries: int
    reasons: Mapping[str, int]

    def tally(self, labels: Sequence[str], price: Sequence[float] | None) -> Tally:
        used = sum(one.prompt_tokens for one in self.fresh), sum(one.completion_tokens for one in self.fresh)
        cost = None if price is None else sum(each * one / 1e6 for each, one in zip(price, used, strict=True))
        return Tally(
            judged=len(labels), incoherent=labels.count(INCOHERENT), asked=len(self.fresh),
            kept=len(self.verdicts) - len(self.fresh), retries=self.retries, failed=sum(self.reasons.values()),
            unparsable=labels.count(UNPARSABLE), prompt_tokens=used[0], completion_tokens=used[1], cost=cost,
            reasons=dict(self.reasons),
        )  # fmt: skip


def _ask(source: Local | Endpoint, messages: Sequence[str], kept: Kept, progress: _Progress | None) -> _Asked:
    """The verdicts on ``messages``: what is kept, and what ``source`` says to the others."""
    if not messages:
        return _Asked({}, [], 0, {})
    identity = source.identity
    names = {one: name_of([READING, identity, one]) for one in messages}  # equal messages are asked once
    verdicts = {one: found for one, name in names.items() if (found := kept.get(name)) is not None}
    fresh: list[Verdict] = []
    reasons: Counter[str] = Counter()
    retries = 0
    with closing(source.replies([one for one in names if one not in verdicts])) as coming:
        for one, reply, again in coming:
            retries += again
            if isinstance(reply, str):
                reasons[reply] += 1
            else:
                found = Verdict(_label(reply), reply.prompt_tokens, reply.completion_tokens)
                kept.put(names[one], found)
                verdicts[one] = found
                fresh.append(found)
            if progress:
                progress(len(verdicts) + reasons.total(), len(names))
    return _Asked(verdicts, fresh, retries, reasons)


def _label(reply: Reply) -> str:
    said = without_thinking(reply.text)
    return UNPARSABLE if said is None else verdict(said)


def _own_rubric(path: Path) -> str:
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the judge's rubric {path} cannot be read: {error}") from error
    if "<verdict>" not in text:
        raise RecipeError(
            f"the judge's rubric {path} does not ask for a verdict: it must have the judge end with "
            "<verdict>refusal</verdict>, <verdict>answer</verdict> or <verdict>incoherent</verdict>"
        )
    return text
