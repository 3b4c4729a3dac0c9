"""How the findings of a check are shown, and the error they end in."""

from pathlib import Path

from voxdino.core.errors import DatasetError, SafetyError, VoxdinoError
from voxdino.preparation.check import CheckReport

_NAMED_FILES = 8  # of those a finding holds for; --json has all
_REFUSED_FOR_SAFETY = "A7"  # the catalogue's row of files that declare or unpack to more than they may


def print_findings(report: CheckReport) -> None:
    """One paragraph per finding on stdout, errors first; then how many there are of each kind."""
    for finding in report.findings:
        print(f"{finding.severity:<7} {finding.code:<4} {finding.where}: {finding.fact}")
        print(f"{'':<12} {finding.consequence} Fix: {finding.fix}")
        if finding.others:
            num_more = len(finding.others) - _NAMED_FILES
            more = f" and {num_more} more (all of them: --json)" if num_more > 0 else ""
            print(f"{'':<12} also: {', '.join(finding.others[:_NAMED_FILES])}{more}")
    kinds = [finding.severity for finding in report.findings]
    told = ", ".join(f"{kinds.count(kind)} {kind}s" for kind in ("error", "warning", "note") if kind in kinds)
    print(f"{report.dataset}: {report.num_cases} cases, {told or 'nothing to complain about'}")


def first_error(report: CheckReport, dataset: Path) -> VoxdinoError | None:
    """DatasetError, or SafetyError where one was refused for safety, with that error and the number of the others."""
    if not report.errors:
        return None
    unsafe = [finding for finding in report.errors if finding.code == _REFUSED_FOR_SAFETY]
    first, num_more = (unsafe or report.errors)[0], len(report.errors) - 1
    more = f" (and {num_more} more error{'s' if num_more > 1 else ''})" if num_more else ""
    fact = f"{first.fact.removesuffix('.')}{more}."
    kind = SafetyError if unsafe else DatasetError
    return kind(fact, where=dataset / first.where, fix=first.fix)
