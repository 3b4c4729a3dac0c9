"""What the check of a data set says: findings with file, fact, consequence and fix."""

from collections.abc import Iterable
from typing import Literal

from voxdino.core.records import Record

Severity = Literal["error", "warning", "note"]

_SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
_MANY = 10  # findings of one kind above which they are told as one


class Finding(Record):
    """One thing that the check found.

    severity: "error": the case cannot be used · "warning": it can, but look · "note": what we did.
    code:     row of the catalogue of faults (A28: shapes differ ...); the reference lists them.
    where:    file (relative to the data set) or case.
    others:   further files of which the same holds (not listed for notes); `where` and `fact` are those of the first.
    """

    severity: Severity
    code: str
    where: str
    fact: str
    consequence: str
    fix: str
    others: tuple[str, ...] = ()


class CheckReport(Record):
    """The findings of one data set, errors first."""

    dataset: str
    num_cases: int
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == "error")

    @property
    def bad_cases(self) -> int:
        """How many files or cases have an error."""
        return len({name for error in self.errors for name in (error.where, *error.others)})


def gather_findings(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Sort by severity, then in the order found; more than ten of one kind become one that names all the files."""
    kinds: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        told_as = finding.fact if finding.severity == "note" else finding.consequence
        kinds.setdefault((finding.severity, finding.code, told_as), []).append(finding)
    told: list[Finding] = []
    for same in kinds.values():
        if len(same) > _MANY:
            places = dict.fromkeys(finding.where for finding in same)
            others = () if same[0].severity == "note" else tuple(places)[1:]
            fact = f"{same[0].fact} ({len(same)} alike)"
            told.append(same[0].model_copy(update={"fact": fact, "others": others}))
        else:
            told.extend(same)
    return tuple(sorted(told, key=lambda finding: _SEVERITIES.index(finding.severity)))
