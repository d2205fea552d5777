"""Does the certificate hold for exactly these bytes? Of two levels, *function* is what a publication needs.

*Function*: hooks on the base were compared with the reloaded folder, and the report lists the hashes of the files that
were loaded. *Bytes*: the folder is proven to be base plus plan; nobody has run it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..audit import audit
from ..checkpoint import Checkpoint
from ..checks import listed
from ..contents import is_loaded
from ..errors import PublishError
from ..manifest import Manifest
from .items import Item

FILE = "certificate.json"
LEVELS = ("function", "bytes")


def function(folder: Path, found: Manifest, report: Mapping[str, Any] | None, items: Mapping[str, Item]) -> None:
    """Refuse a folder whose report is not there, failed, or was made for other bytes.

    Raises:
        PublishError: which of these, and how to come by a certificate.
    """
    anew = f"make one with: steer-bake validate {folder} -o {folder.parent / 'report.json'}"
    if report is None:
        raise PublishError(
            f"{folder} has no certificate that it computes what the hooks compute; {anew} (or publish with "
            "--certificate bytes, which the card then says first)"
        )
    if report.get("plan_sha256") != found.content["plan_sha256"]:
        raise PublishError(f"the certificate of {folder} is for another plan than the folder holds; {anew}")
    if report.get("passed") is not True:
        failed = [str(one.get("name")) for one in report.get("checks", []) if not one.get("passed")]
        raise PublishError(f"{folder} did not pass its certificate ({listed(failed) or 'no check'}); bake it again")
    known = report.get("files")
    if not isinstance(known, dict) or not known:
        raise PublishError(f"the certificate of {folder} does not say which bytes it is for; {anew}")
    here = {path: item.sha256 for path, item in items.items() if is_loaded(path)}
    changed = sorted({*here, *known} - {path for path in here if known.get(path) == here[path]})
    if changed:
        raise PublishError(
            f"the certificate of {folder} is for other bytes: {listed(changed)} changed since, or came or went; {anew}"
        )


def bytes_only(folder: Path, base: Checkpoint, advance: Any) -> dict[str, Any]:
    """The audit of ``folder``; of one whose shards are on the hub, from headers and hub ids.

    Raises:
        PublishError: it is not base plus plan.
    """
    found = audit(folder, base, hash_files=True, progress=advance)
    failed = [f"{check.name}: {check.detail}" for check in found.checks if not check.passed]
    if failed:
        raise PublishError(f"{folder} is not its base plus the plan, and is not published. {listed(failed)}")
    return found.as_json()
