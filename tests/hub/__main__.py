"""``python -m tests.hub --root DIR [--port N]``: serve ``DIR/org/name/`` as repositories until stopped.

The first line says how to talk to it: ``HF_ENDPOINT=... HF_TOKEN=...``; that token may write to ``--namespace``.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from . import LocalHub, User
from .client import TOKEN


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--namespace", default="local", help="the user that the printed token belongs to")
    parser.add_argument("--xet", action="store_true", help="take Xet uploads (needs hf_xet)")
    given = parser.parse_args()
    given.root.mkdir(parents=True, exist_ok=True)
    orgs = tuple(path.name for path in given.root.iterdir() if path.is_dir() and not path.name.startswith("."))
    with LocalHub(given.root.resolve(), given.port, xet=given.xet) as hub:
        hub.users[TOKEN] = User(given.namespace, orgs=orgs)
        leg = "" if given.xet else " HF_HUB_DISABLE_XET=1"
        sys.stdout.write(f"HF_ENDPOINT={hub.url} HF_TOKEN={TOKEN} HF_HUB_DISABLE_TELEMETRY=1{leg}\n")
        sys.stdout.flush()
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
