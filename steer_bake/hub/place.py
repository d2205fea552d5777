"""Where a publication goes: the account, the repository as it is, the base on the hub; and what stands in the way."""

from __future__ import annotations

from dataclasses import dataclass

from huggingface_hub import HfApi

from .. import __version__, manifest
from ..contents import is_loaded
from ..errors import PublishError
from ..manifest import Manifest
from . import account
from .account import Account, Base, There


@dataclass(frozen=True)
class Place:
    """Where it goes, and who brings it there."""

    api: HfApi
    me: Account
    repo: str
    there: There | None
    base: Base
    private: bool
    revision: str
    create_pr: bool

    @property
    def url(self) -> str:
        return f"{self.api.endpoint}/{self.repo}"


def find_place(found: Manifest, repo: str, private: bool | None, revision: str, *, create_pr: bool) -> Place:
    """Everything that the hub is asked before anything is sent.

    Raises:
        PublishError: the account, the repository or the base stands in the way.
    """
    api = HfApi(library_name="steer-bake", library_version=__version__)
    me = account.who(api)
    repo = account.full_name(repo, me)
    there = account.look(api, repo)
    account.check_may_write(api, repo, me, there, create_pr=create_pr)
    _check_target(repo, found, there, create_pr=create_pr)
    base = account.base_on_hub(api, origin(found))
    # A pull request is as private as what it is proposed to.
    hidden = there.private if there and create_pr else _private(repo, there, private, gated=base.gated)
    return Place(api, me, repo, there, base, hidden, revision, create_pr)


def origin(found: Manifest) -> str | None:
    """The base's name on the hub."""
    name = found.base["hub_id"] or found.base["original"]
    return str(name) if name else None


def _check_target(repo: str, found: Manifest, there: There | None, *, create_pr: bool) -> None:
    """Refuse to write over another model, and over the base above all."""
    if there is None or create_pr:
        return
    other = sorted(path for path in there.files if is_loaded(path) and not path.startswith("."))
    if repo == found.base["hub_id"] or (other and manifest.JSON_FILE not in there.files):
        what = "the base itself" if repo == found.base["hub_id"] else f"another model ({other[0]}), not one of ours"
        raise PublishError(f"{repo} is {what}: choose another name, or propose the change with --create-pr")


def _private(repo: str, there: There | None, wanted: bool | None, *, gated: bool) -> bool:
    """Whether the repository is private; refuses to make a private wish public."""
    if there is None:
        return gated if wanted is None else wanted
    if there.private or wanted is False or not (gated or wanted):
        return there.private
    why = "--private was asked for" if wanted else "the base is gated, so that its copies are private by default"
    raise PublishError(f"{repo} is there and public, and {why}: make it private in its settings, or push with --public")
