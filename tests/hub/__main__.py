"""``python -m tests.hub --root DIR [--port N]``: serve ``DIR/org/name/`` as repositories until stopped."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from . import LocalHub


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--port", type=int, default=0)
    given = parser.parse_args()
    with LocalHub(given.root, given.port) as hub:
        sys.stdout.write(f"HF_ENDPOINT={hub.url} HF_HUB_DISABLE_XET=1\n")
        sys.stdout.flush()
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
