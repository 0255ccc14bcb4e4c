# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The audit of a release fails on a known vulnerability, and never calls a package safe that it could not look up."""

from audit import describe


SAFE = {"name": "numpy", "version": "2.4.6", "vulns": []}
UNKNOWN = {"name": "torch", "skip_reason": "Dependency not found on PyPI"}
FAULTY = {"name": "jinja2", "version": "3.1.2", "vulns": [{"id": "CVE-2024-56326", "fix_versions": ["3.1.5"]}]}


def test_a_known_vulnerability_fails_the_audit_and_names_the_version_that_mends_it():
    assert describe([SAFE, FAULTY], "pypi") == ("error: jinja2 3.1.2 has CVE-2024-56326, mended in 3.1.5", 1)


def test_packages_that_a_database_does_not_know_are_named():
    text, code = describe([SAFE, UNKNOWN], "osv")
    assert text == ("audit: none of 1 packages has a vulnerability that osv knows.\naudit: osv does not know torch.")
    assert code == 0


def test_an_audit_without_a_database_says_that_it_is_not_done():
    """pip-audit calls an environment safe when it could look up nothing in it."""
    for found in ([UNKNOWN], []):
        assert describe(found, "osv") == ("audit: not done. No database of vulnerabilities answers from here.", 0)
