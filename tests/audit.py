# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Ask pip-audit for known vulnerabilities of the packages in an environment. `make release-check` runs it.

    python tests/audit.py .venv/release/env

It exits with 1 if a package has a known vulnerability. Without a reachable database it says so, and exits with 0.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


DATABASES = ("pypi", "osv")
OWN = "videollm-mod"  # its own wheel is in no database


def ask(packages: Path, database: str) -> list[dict[str, Any]]:
    """Return what pip-audit says of each package in a folder, or an empty list if the database does not answer."""
    options = ["--format", "json", "--progress-spinner", "off", "--vulnerability-service", database]
    command = [sys.executable, "-m", "pip_audit", "--path", str(packages), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        return [found for found in json.loads(done.stdout)["dependencies"] if found["name"] != OWN]
    except ValueError:  # it printed no JSON, because it could not connect
        return []


def describe(found: list[dict[str, Any]], database: str) -> tuple[str, int]:
    """Return lines that tell what an audit found, and the exit code."""
    known = [package for package in found if "vulns" in package]
    if not known:
        return "audit: not done. No database of vulnerabilities answers from here.", 0
    faults = [
        f"error: {package['name']} {package['version']} has {fault['id']}, "
        + (f"mended in {', '.join(fault['fix_versions'])}" if fault["fix_versions"] else "not mended yet")
        for package in known
        for fault in package["vulns"]
    ]
    lines = faults or [f"audit: none of {len(known)} packages has a vulnerability that {database} knows."]
    if left := [package["name"] for package in found if "vulns" not in package]:
        lines.append(f"audit: {database} does not know {', '.join(left)}.")
    return "\n".join(lines), int(bool(faults))


def main() -> int:
    """Audit the environment that the command line names, and print what was found."""
    [packages] = Path(sys.argv[1]).glob("lib/python3*/site-packages")
    for database in DATABASES:
        found = ask(packages, database)
        if any("vulns" in package for package in found):
            break
    text, code = describe(found, database)
    print(text)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
