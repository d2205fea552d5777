"""One line of a report: something that was checked, what was found, and whether that is as it must be."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .errors import ValidationFailed


@dataclass(frozen=True)
class Check:
    """One line of a certificate or of an audit."""

    name: str
    passed: bool
    value: float | None  # what was measured, where it is one number
    limit: float | None
    detail: str

    @classmethod
    def of(cls, name: str, problems: Iterable[str], good: str) -> Check:
        """Passed where there are no ``problems``; the detail then is ``good``, else the first few of them."""
        return cls(name, not (found := list(problems)), None, None, listed(found) or good)


def listed(problems: list[str], most: int = 4) -> str:
    """The first ``most`` of ``problems``, and how many there are beside them."""
    more = f" (and {len(problems) - most} more)" if len(problems) > most else ""
    return "; ".join(problems[:most]) + more


def require(folder: str, checks: Iterable[Check]) -> None:
    """Raise ValidationFailed naming every check that failed."""
    failed = [f"{check.name}: {check.detail}" for check in checks if not check.passed]
    if failed:
        raise ValidationFailed(f"{folder} is not its base plus the plan. " + "; ".join(failed))
