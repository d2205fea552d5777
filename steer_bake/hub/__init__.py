"""Publishing on the hub: a baked folder becomes a repository, checked before, during and after.

    push(folder, "org/name")

The parts, lowest first:

    talk          every call, again where that helps; failures as one sentence
    items         the files that make up a repository, and what of them the hub has already
    certificate   does the certificate hold for exactly these bytes
    account       who is asking, what they may do, what the base's licence says
    place         where it goes, and what stands in the way
    upload        one commit: uploads, copies on the server, deletions; then every checksum
    publish       the whole of it on one screen
"""

from __future__ import annotations

from .items import Move
from .publish import Pushed, push

__all__ = ["Move", "Pushed", "push"]
