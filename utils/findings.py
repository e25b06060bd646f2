"""What a look at the machine found: one line each, with a status and a remedy."""

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["ok", "warning", "problem"]

SCHEMA = 1  # of the JSON file


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    section, name: what was looked at; text: what was found; remedy: what to do, empty where all is well; values: the
    figures behind the text, with their unit in the name.
    """

    section: str
    name: str
    status: Status
    text: str
    remedy: str = ""
    values: dict[str, Any] = field(default_factory=dict)


def table(findings: Sequence[Finding]) -> Iterator[str]:
    """One aligned line per finding."""
    widths = [
        max((len(getattr(finding, column)) for finding in findings), default=0)
        for column in ("status", "section", "name")
    ]
    for finding in findings:
        cells = finding.status, finding.section, finding.name
        head = "  ".join(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True))
        yield f"{head}  {finding.text}" + (f"; {finding.remedy}" if finding.remedy else "")


def count(findings: Sequence[Finding], status: Status) -> int:
    """How many findings have this status."""
    return sum(finding.status == status for finding in findings)


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """The object that a JSON file holds: `schema`, `problems`, `warnings`, `findings`."""
    return {
        "schema": SCHEMA,
        "problems": count(findings, "problem"),
        "warnings": count(findings, "warning"),
        "findings": [asdict(finding) for finding in findings],
    }
