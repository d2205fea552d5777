"""``python -m steer_bake``: the same as ``steer-bake``."""

from __future__ import annotations

from .cli import main

main(prog_name="steer-bake")
