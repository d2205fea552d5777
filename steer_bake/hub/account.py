"""Who is asking, what they may do with a repository, and what the base's licence says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from ..errors import PublishError
from .talk import LOG_IN, ask, status_of

#: Of the base's card: what its licence wants passed on, and what stays true of a steered model.
INHERITED = ("license", "license_name", "license_link", "language")


@dataclass(frozen=True)
class Account:
    """Whom the token belongs to."""

    name: str
    orgs: tuple[str, ...]
    role: str  # "write", "read" or "fineGrained"


@dataclass(frozen=True)
class There:
    """A repository that exists already."""

    commit: str
    private: bool
    files: frozenset[str]


@dataclass(frozen=True)
class Base:
    """What the hub says of the base."""

    known: bool  # False: the hub has no such model, or the base is a folder
    gated: bool = False
    card: Mapping[str, Any] = field(default_factory=dict)  # the fields of ``INHERITED``


def who(api: HfApi) -> Account:
    """Whom the token belongs to.

    Raises:
        PublishError: there is none, or the hub does not know it.
    """
    found = ask("asking the hub who you are", api.whoami)
    token = (found.get("auth") or {}).get("accessToken") or {}
    orgs = tuple(str(one["name"]) for one in found.get("orgs") or [])
    return Account(str(found["name"]), orgs, str(token.get("role") or ""))


def full_name(repo: str, account: Account) -> str:
    """``repo`` with its namespace.

    Raises:
        PublishError: it is no name of a repository.
    """
    name = repo if "/" in repo else f"{account.name}/{repo}"
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name, re.ASCII) or name.endswith(".git"):
        raise PublishError(f"{repo!r:.120} is no name of a repository: give 'name' or 'org/name'")
    return name


def look(api: HfApi, repo: str) -> There | None:
    """The repository as it is; None where there is none that this account can see."""

    def info() -> There | None:
        try:
            found = api.model_info(repo)
        except RepositoryNotFoundError:
            return None
        return There(
            str(found.sha), bool(found.private), frozenset(one.rfilename for one in found.siblings or ())
        )  # fmt: skip

    return ask(f"looking for {repo}", info)


def check_may_write(api: HfApi, repo: str, account: Account, there: There | None, *, create_pr: bool) -> None:
    """Refuse, before any byte moves, what the hub would refuse after all of them.

    Raises:
        PublishError: the token cannot write, or not there, or a pull request wants a repository that is not there.
    """
    if account.role == "read":
        raise PublishError(f"{account.name}'s token can only read; {LOG_IN}")
    if create_pr:
        if there is None:
            raise PublishError(f"there is no {repo} to open a pull request for; leave out --create-pr to create it")
        return
    if there is not None:
        ask(f"writing to {repo}", lambda: api.auth_check(repo, write=True))
        return
    namespace = repo.split("/")[0]
    if namespace not in (account.name, *account.orgs):
        mine = ", ".join((account.name, *account.orgs))
        raise PublishError(f"{account.name} cannot create {repo}: choose a name under one of {mine}")


def base_on_hub(api: HfApi, hub_id: str | None) -> Base:
    """What the hub says of the base's licence and of its gate."""
    if hub_id is None:
        return Base(False)

    def info() -> Base:
        try:
            found = api.model_info(hub_id)
        except (RepositoryNotFoundError, HfHubHTTPError) as error:
            if isinstance(error, RepositoryNotFoundError) or status_of(error) in (401, 403, 404):
                return Base(False)
            raise
        card = found.card_data.to_dict() if found.card_data else {}
        return Base(True, bool(found.gated), {key: card[key] for key in INHERITED if card.get(key)})

    return ask(f"looking for the base {hub_id}", info)


def licence(base: Base, hub_id: str | None, given: str | None) -> dict[str, Any]:
    """The licence fields of the card: the base's own, or what was given where it has none.

    Raises:
        PublishError: there is neither, or they contradict each other.
    """
    own = dict(base.card)
    if given is None:
        if "license" in own:
            return own
        what = f"the base {hub_id}" if hub_id else "the base, which is not on the hub,"
        raise PublishError(f"the licence of {what} is not known here; say it with --license (apache-2.0, mit, ...)")
    if own.get("license", given) != given:
        raise PublishError(f"the base {hub_id} is under {own['license']}, which a copy inherits; leave out --license")
    return {**own, "license": given}
