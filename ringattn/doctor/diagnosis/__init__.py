"""Diagnosis of a cluster: a pure function from what is known of it to the problems and their remedies."""

from __future__ import annotations

from . import speed_checks, start_checks, version_checks
from .examination import Examination, Finding

CHECKS = (*start_checks.CHECKS, *version_checks.CHECKS, *speed_checks.CHECKS)


def diagnose(exam: Examination) -> list[Finding]:
    """Find all problems of a cluster, fatal ones first."""
    found = [finding for check in CHECKS for finding in check(exam)]
    return sorted(found, key=lambda finding: not finding.fatal)
