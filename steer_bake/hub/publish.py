"""The whole of a publication on one screen: the folder, its certificate, safety, the account, the licence, the card,
one commit, every checksum."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import RevisionNotFoundError

from .. import __version__, card, card_figures, manifest, safety
from ..baked import find_base
from ..checkpoint import RemoteFiles
from ..contents import check_others
from ..errors import PublishError, RecipeError, did_you_mean
from ..manifest import Manifest
from ..models import open_remote
from ..stages import Progress, silent
from . import account, certificate
from .items import CARD, Away, Item, Move, files_of, hashed, is_there, made, moves, tree
from .place import Place, find_place, origin
from .talk import ask, clean, without_bars
from .upload import Branch, Settled, cannot_copy, check_copies, fetched

#: On the card and in the commit: who made it.
TITLE = "Steered with steer-bake"


@dataclass(frozen=True)
class Pushed:
    """What was published, or, of a dry run, what would be."""

    repo: str
    url: str
    revision: str
    commit: str | None  # None where nothing is there yet
    pull_request: str | None
    private: bool
    created: bool  # the repository is new
    committed: bool  # False: everything was there before, or it was a dry run
    certificate: str
    files: tuple[Move, ...]
    notes: tuple[str, ...]

    @property
    def sent(self) -> int:
        """Bytes that went up, at most."""
        return sum(one.sent for one in self.files)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "bytes": self.sent}


def push(
    folder: str | Path,
    repo: str,
    *,
    report: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    certified: str = "function",
    acknowledged: str | None = None,
    licence: str | None = None,
    template: Path | None = None,
    from_base: bool = False,
    private: bool | None = None,
    revision: str = "main",
    create_pr: bool = False,
    dry_run: bool = False,
    progress: Progress = silent,
) -> Pushed:
    """Publish the baked ``folder`` as ``repo`` (``name`` or ``org/name``), in one commit, and check every file of it.

    A second push of the same folder makes no commit. The token is the one of the hub's own client.

    Args:
        report: what ``validate`` found, with the hashes of the files it is for.
        evaluation: what was measured of the behaviour; without harmful requests in it, ``acknowledged`` is needed.
        certified: ``"function"``, or ``"bytes"``: base plus plan, which nobody has run; the card says so first.
        acknowledged: why it is published although refusals fell or were not measured; it goes on the card.
        licence: of the base, where the hub does not say.
        template: of the card, instead of the packaged one.
        from_base: files that the base's repository has too are copied there, on the server.
        private: of a new repository; by default it is private where the base is gated.
        create_pr: open a pull request, or bring the open one up to date.

    Raises:
        PublishError: what is in the way, and what to do about it. Nothing is published by halves.
        CheckpointError: the folder is damaged, or its shards are on the hub and ``from_base`` is not set.
    """
    folder = Path(folder)
    if certified not in certificate.LEVELS:
        raise RecipeError(f"no certificate {certified!r}: {did_you_mean(certified, certificate.LEVELS)}")
    if create_pr and revision != "main":
        raise PublishError(f"a pull request is a branch of its own: leave out --create-pr, or --revision {revision}")
    found = manifest.read(folder, incomplete=from_base)
    if evaluation is not None:
        card.check_belongs(found, evaluation, f"evaluation of {folder}")
    refusals = safety.refusals(evaluation)
    safety.require(refusals, acknowledged)
    _check_kind(folder, found)
    items = _items(folder, found, progress)
    with without_bars():
        proof = _certificate(folder, found, report, items, certified, progress)
        place = find_place(found, repo, private, revision, create_pr=create_pr)
        terms = account.licence(place.base, origin(found), licence)
        published = card.Publication(place.repo, terms, acknowledged, proof, reduced=refusals.state == "fell")
        items = _with_card(folder, items, None if proof else report, evaluation, template, published)
        items |= _made_here(found, place.repo, proof or report)
        wanted, notes = [items[path] for path in sorted(items)], list[str]()
        if from_base:
            wanted, notes = _from_base(place.api, found, wanted)
        if dry_run:
            return _pushed(place, certified, _moves(place, wanted, notes), notes)
        return _publish(place, wanted, found, certified, notes, progress)


# --- what is published


def _check_kind(folder: Path, found: Manifest) -> None:
    """Refuse an adapter that would be of use on this machine only."""
    if found.target == "lora" and not found.base["hub_id"]:
        raise PublishError(
            f"{folder} is an adapter for {found.base['name']}, which is no model on the hub: nobody else can load it; "
            "bake it again for the hub id of its base"
        )


def _items(folder: Path, found: Manifest, progress: Progress) -> dict[str, Item]:
    """Everything in the folder, hashed, and what belongs to it and lies in the base's repository."""
    records = [one for one in found.files if one.how != "remote" or (folder / one.name).exists()]
    others = check_others(folder, records)
    if not others.passed:
        raise PublishError(f"{folder} is not published: {others.detail}; remove that, or bake again")
    with progress("hashing") as advance:
        items = hashed(folder, (name for name in files_of(folder) if name != CARD), advance)
    for one in found.files:
        if one.name in items and one.lfs_sha256 not in (None, items[one.name].sha256) and one.how != "written":
            raise PublishError(
                f"{folder / one.name} does not have the bytes that the hub has under that id: it was changed, or "
                "damaged on its way here; remove the base from the hub's cache and bake again"
            )
        if one.how == "remote" and one.name not in items:
            hub_id, commit = found.base["hub_id"], found.base["revision"]
            if not (hub_id and commit and one.source and one.lfs_sha256):
                raise PublishError(f"{one.name} is not in {folder}, and steering.json does not say where; bake again")
            items[one.name] = Item(one.name, one.size, one.lfs_sha256, Away(hub_id, commit, one.source))
    return items


def _certificate(
    folder: Path,
    found: Manifest,
    report: Mapping[str, Any] | None,
    items: Mapping[str, Item],
    certified: str,
    progress: Progress,
) -> dict[str, Any] | None:
    away = next((path for path, item in items.items() if isinstance(item.source, Away)), None)
    if certified == "function":
        if away:
            raise PublishError(
                f"{away} is only on the hub, so that nobody can have run {folder}: publish it with --certificate "
                "bytes, which the card says first; validate and push again when you have downloaded the result"
            )
        certificate.function(folder, found, report, items)
        return None
    if away:
        base = open_remote(f"{found.base['hub_id']}@{found.base['revision']}")[1]
    else:
        base = find_base(found, None, progress=progress)
    with progress("auditing") as advance:
        return certificate.bytes_only(folder, base, advance)


def _with_card(
    folder: Path,
    items: Mapping[str, Item],
    report: Mapping[str, Any] | None,
    evaluation: Mapping[str, Any] | None,
    template: Path | None,
    published: card.Publication,
) -> dict[str, Item]:
    """``items`` and the card for the hub: made anew with its figures, unless the one in the folder was written or
    changed by a person."""
    path, found = folder / CARD, dict(items)
    own = path.read_text(encoding="utf-8") if path.is_file() else None
    if own is None or card.is_sealed(own) or template is not None:
        text, figures = card.drawn(folder, report, evaluation, template, published)
        for drawn_before in card_figures.ours(folder):
            found.pop(drawn_before, None)
        found |= {name: made(name, data) for name, data in figures.items()}
    else:
        text = own
    if problem := card.problem(text, published):
        raise PublishError(f"the card {path if text == own else template or 'template'} {problem}")
    ask("having the card checked", lambda: _validate(text))
    return found | {CARD: made(CARD, text.encode())}


def _validate(text: str) -> None:
    """Let the hub look at a card before anything is sent."""
    try:
        ModelCard(text).validate()
    except ValueError as error:
        try:
            said = "; ".join(str(one["message"]) for one in json.loads(str(error))["errors"])
        except (ValueError, LookupError, TypeError):
            said = str(error)
        raise PublishError(f"the hub does not take this card: {clean(said)}; put its metadata right") from error


def _made_here(found: Manifest, repo: str, proof: Mapping[str, Any] | None) -> dict[str, Item]:
    """Files that are other ones on the hub: without names of folders on this machine."""
    base = dict(found.base)
    items = {}
    if base["folder"]:
        content = {**found.content, "base": {**base, "folder": None, "name": Path(base["name"]).name}}
        text = json.dumps(content, indent=2) + "\n"
        items[manifest.JSON_FILE] = made(manifest.JSON_FILE, text.encode())
    told = {**(proof or {}), "folder": repo, "base": origin(found) or Path(base["name"]).name}
    return items | {certificate.FILE: made(certificate.FILE, (json.dumps(told, indent=2) + "\n").encode())}


# --- where it goes


def _tree_if_any(api: HfApi, repo: str, revision: str) -> Any:
    def look() -> Any:
        try:
            return tree(api, repo, revision)
        except RevisionNotFoundError:
            return tree(api, repo, "main")

    return ask(f"reading {repo}", look)


def _moves(place: Place, items: list[Item], notes: list[str]) -> tuple[Move, ...]:
    """What a dry run shows; with ``notes``, nothing is copied."""
    there = {} if place.there is None else _tree_if_any(place.api, place.repo, place.revision)
    found = moves(items, there)
    return tuple(replace(one, how="upload") if one.how == "copy" and notes else one for one in found)


def _from_base(api: HfApi, found: Manifest, items: list[Item]) -> tuple[list[Item], list[str]]:
    """The same items, those that the base's repository has too lying there; and why not, where it cannot copy."""
    hub_id, commit = found.base["hub_id"], found.base["revision"]
    if not hub_id or not commit:
        raise PublishError("the base of this folder is not on the hub: nothing is copied there; leave out --from-base")
    known = ask(f"looking for {hub_id}", lambda: RemoteFiles.find(hub_id, commit)).lfs_sha256
    places = {sha256: path for path, sha256 in known.items()}
    copied = [
        Item(one.path, one.size, one.sha256, Away(hub_id, commit, places[one.sha256]))
        if one.sha256 in places and not isinstance(one.source, Away)
        else one
        for one in items
    ]
    why = check_copies(api, copied)
    return (items, [f"{why}: it goes through this machine instead"]) if why else (copied, [])


# --- publishing


def _publish(
    place: Place, items: list[Item], found: Manifest, certified: str, notes: list[str], progress: Progress
) -> Pushed:
    api, repo, revision = place.api, place.repo, place.revision
    title, pull = f"{TITLE} ({found.content['plan_sha256'][:12]})", None
    if place.there is None:
        ask(f"creating {repo}", lambda: api.create_repo(repo, private=place.private, exist_ok=True))
    if revision != "main" and not revision.startswith("refs/"):
        ask(f"making the branch {revision}", lambda: api.create_branch(repo, branch=revision, exist_ok=True))
    if place.create_pr:
        now = ask(f"reading {repo}", lambda: tree(api, repo, "main"))
        pull = None if all(is_there(one, now) for one in items) else _pull_request(place, title)
        revision = f"refs/pr/{pull}" if pull else revision
    with progress("publishing") as advance:
        if notes:
            items = fetched(items)
        settled = _settled(Branch(api, repo, revision, advance), items, title, notes)
    if any(isinstance(one.source, Away) for one in items):
        _check_headers(repo, settled.commit, found)
    done = _pushed(place, certified, settled.moves, notes)
    request = f"{place.url}/discussions/{pull}" if pull else None
    return replace(
        done, revision=revision, commit=settled.commit, committed=settled.committed, pull_request=request
    )  # fmt: skip


def _pushed(place: Place, certified: str, moved: tuple[Move, ...], notes: list[str]) -> Pushed:
    """The account of a publication that has not taken place yet."""
    head = None if place.there is None else place.there.commit
    return Pushed(
        place.repo, place.url, place.revision, head, None, place.private, place.there is None, False, certified, moved,
        tuple(notes),
    )  # fmt: skip


def _settled(branch: Branch, items: list[Item], title: str, notes: list[str]) -> Settled:
    try:
        return branch.settle(items, title)
    except PublishError as error:
        if not cannot_copy(error.__cause__):
            raise
        notes.append(f"the hub does not copy here ({error}): files of the base went through this machine instead")
        return branch.settle(fetched(items), title)


def _pull_request(place: Place, title: str) -> int:
    """The number of this plan's pull request: the open one, or a new one."""
    api, repo = place.api, place.repo

    def open_or_new() -> int:
        for one in api.get_repo_discussions(repo, author=place.me.name, discussion_type="pull_request"):
            if one.title == title and one.status in ("draft", "open"):
                return int(one.num)
        return int(api.create_pull_request(repo, title=title, description=f"{TITLE} {__version__}").num)

    return ask(f"opening a pull request for {repo}", open_or_new)


def _check_headers(repo: str, commit: str, found: Manifest) -> None:
    """Read back the headers of what was published without ever having been here."""
    published = ask(f"reading {repo}", lambda: RemoteFiles.find(repo, commit))
    for one in found.files:
        if one.header_hash is None:
            continue
        if published.header(one.name).sha256 != one.header_hash:
            raise PublishError(f"{one.name} of {repo} has another header than it should; do not use {commit}")
