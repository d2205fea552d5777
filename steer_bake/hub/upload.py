"""One commit that makes a repository what it should be: uploads, copies on the server, deletions; then every checksum.

What the hub has already is not sent. After a failure the hub is asked what it has before anything is tried again, so
that a commit whose answer was lost is found and not made twice.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import FileDuplicationError, HfHubHTTPError

from ..checkpoint import remote
from ..errors import PublishError
from .items import Advance, Away, Item, Move, Tree, check_arrived, hashed, is_there, moves, tree
from .talk import ask, refusal, status_of

#: A commit has happened since the one that was named as its parent.
STALE = 412
#: Bytes of files that are handed to the client together: it tells of no progress until all of them have arrived.
TOGETHER = 1 << 30


@dataclass(frozen=True)
class Settled:
    """The state that was reached."""

    commit: str
    committed: bool  # False: everything was there before
    moves: tuple[Move, ...]


@dataclass
class Branch:
    """One branch of a repository, and what this push has uploaded to it so far."""

    api: HfApi
    repo: str
    revision: str
    advance: Advance = lambda _done, _total: None  # bytes of new files

    def __post_init__(self) -> None:
        self._additions: dict[str, CommitOperationAdd] = {}

    def state(self) -> tuple[str, Tree]:
        """The commit at the head, and what is in it."""
        doing = f"reading {self.repo} at {self.revision}"
        head = str(ask(doing, lambda: self.api.model_info(self.repo, revision=self.revision)).sha)
        return head, ask(doing, lambda: tree(self.api, self.repo, head))

    def settle(self, items: Sequence[Item], message: str) -> Settled:
        """Make the branch hold ``items``, with one commit or, where it does already, with none.

        Raises:
            PublishError: the hub refuses, goes on failing, or somebody else changed the same files in between.
        """
        head, before = self.state()
        planned = todo = moves(items, before)
        for pause in (*remote.PAUSES, None):
            if all(move.how == "keep" for move in todo):
                return Settled(head, todo is not planned, tuple(planned))
            try:
                head = self._commit(items, todo, message, head)
            except PublishError:
                raise
            except Exception as error:  # the hub client raises a dozen unrelated types
                wait = 0.0 if status_of(error) == STALE else pause and remote.pause_after(error, pause)
                if wait is None or cannot_copy(error):
                    raise refusal(f"committing to {self.repo}", error) from error
                time.sleep(wait)
                head, now = self.state()
                _check_ours(self.repo, head, before, now, todo, items)
                todo = moves(items, now)
                continue
            check_arrived(self.repo, items, self.state()[1])
            return Settled(head, True, tuple(planned))
        raise PublishError(f"{self.repo} changes faster than it can be committed to; push with --create-pr instead")

    def _commit(self, items: Sequence[Item], todo: Iterable[Move], message: str, parent: str) -> str:
        how = {move.path: move.how for move in todo}
        copies = [
            CommitOperationCopy(item.source.path, item.path, item.source.revision, item.source.repo, "model")
            for item in items
            if how[item.path] == "copy" and isinstance(item.source, Away)
        ]
        deletions = [CommitOperationDelete(path, is_folder=False) for path, one in how.items() if one == "delete"]
        additions = [self._addition(item) for item in items if how[item.path] == "upload"]
        self._upload(additions)
        done = self.api.create_commit(
            self.repo,
            [*additions, *copies, *deletions],
            commit_message=message,
            revision=self.revision,
            parent_commit=parent,
        )
        return str(done.oid)

    def _addition(self, item: Item) -> CommitOperationAdd:
        if item.path not in self._additions:
            assert not isinstance(item.source, Away)
            made = CommitOperationAdd(item.path, item.source)
            made.upload_info.sha256 = bytes.fromhex(item.sha256)  # it was read once already
            self._additions[item.path] = made
        return self._additions[item.path]

    def _upload(self, additions: Sequence[CommitOperationAdd]) -> None:
        """Large files first; the client tries every request of theirs again by itself.

        Raises:
            PublishError: it has given up.
        """
        total, done = sum(one.upload_info.size for one in additions), 0
        self.advance(0, total)
        for some in _together(additions):
            try:
                self.api.preupload_lfs_files(self.repo, some, revision=self.revision, free_memory=False)
            except Exception as error:  # as above
                raise refusal(f"uploading to {self.repo}", error) from error
            done += sum(one.upload_info.size for one in some)
            self.advance(done, total)


def _together(additions: Sequence[CommitOperationAdd]) -> Iterator[list[CommitOperationAdd]]:
    """``additions`` in their order, in groups of ``TOGETHER`` bytes or of one file."""
    group: list[CommitOperationAdd] = []
    for one in additions:
        if group and sum(other.upload_info.size for other in (*group, one)) > TOGETHER:
            yield group
            group = []
        group.append(one)
    if group:
        yield group


def _check_ours(repo: str, head: str, before: Tree, now: Tree, todo: Iterable[Move], items: Sequence[Item]) -> None:
    """Refuse to write over what somebody else has just committed."""
    wanted = {item.path: item for item in items}
    for move in todo:
        old, new = before.get(move.path), now.get(move.path)
        changed = (old and old.blob_id, old and old.lfs) != (new and new.blob_id, new and new.lfs)
        item = wanted.get(move.path)
        if changed and not (new is None if item is None else is_there(item, now)):
            raise PublishError(
                f"{repo} has a new commit ({head[:12]}) that changes {move.path}, made while this push was on its way; "
                "look at it, and push again to replace it"
            )


# --- files of the base


def check_copies(api: HfApi, items: Sequence[Item]) -> str:
    """Why the hub cannot copy one of ``items`` from where it lies; empty where it can, as far as it says before."""
    away = [item.source for item in items if isinstance(item.source, Away)]
    for repo, revision in sorted({(one.repo, one.revision) for one in away}):
        paths = [one.path for one in away if (one.repo, one.revision) == (repo, revision)]
        found = ask(f"looking for files of {repo}", lambda: api.get_paths_info(repo, paths, revision=revision))  # noqa: B023
        known = {row.path: getattr(row, "xet_hash", None) for row in found}
        for path in paths:
            if path not in known:
                return f"{path} of {repo} is not there at {revision[:12]}"
            if not known[path]:
                return f"{path} of {repo} is not kept in a way that the hub copies"
    return ""


def cannot_copy(error: BaseException | None) -> bool:
    """Whether a commit failed because the server does not copy."""
    while error is not None:
        if isinstance(error, FileDuplicationError):
            return True
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (400, 403, 404, 409, 422):
            return "/lfs-files/duplicate" in str(error.response.url)
        error = error.__cause__
    return False


def fetched(items: Sequence[Item]) -> list[Item]:
    """The same items, with those that lie in another repository downloaded into the hub's cache.

    Raises:
        PublishError: one cannot be fetched, or arrives with other bytes.
    """
    found = []
    for item in items:
        if isinstance(item.source, Away):
            away = item.source
            path = Path(
                ask(
                    f"fetching {away.path} of {away.repo}",
                    lambda: hf_hub_download(away.repo, away.path, revision=away.revision),  # noqa: B023
                )
            )
            real = path.resolve()
            if hashed(real.parent, [real.name], lambda _done, _total: None)[real.name].sha256 != item.sha256:
                path.unlink()
                real.unlink(missing_ok=True)
                raise PublishError(
                    f"{away.path} of {away.repo} arrived with other bytes than the hub has (another sha256); it was "
                    "removed here, run the same command again"
                )
            item = replace(item, source=real)
        found.append(item)
    return found
