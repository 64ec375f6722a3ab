"""`make audit`: every pinned dependency against the known vulnerabilities.

pip-audit, in a virtual environment of its own, asks PyPI about each line of constraints.txt. It takes a package of
which its service knows nothing for a sound one, so that a mirror without vulnerabilities would pass: that is a failure
here. Exit codes: 0 none is vulnerable, 1 some are, 2 they could not be audited.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"


def report(output: str) -> tuple[int, list[str]]:
    """Exit code and lines to show, of pip-audit's JSON; empty output is that of a service that does not answer."""
    try:
        found = json.loads(output)["dependencies"]
    except (ValueError, KeyError, TypeError):
        found = []
    unknown = sorted(one["name"] for one in found if "skip_reason" in one)
    vulnerable = [one for one in found if one.get("vulns")]
    if not found or len(unknown) == len(found):
        return 2, ["audit: the vulnerability service cannot be reached from here; run `make audit` where PyPI answers"]
    lines = []
    for one in vulnerable:
        for fault in one["vulns"]:
            fixed = ", ".join(fault.get("fix_versions") or []) or "no version yet"
            lines.append(f"{one['name']} {one['version']}: {fault['id']}, fixed in {fixed}")
    if unknown:
        lines.append(f"audit: {len(unknown)} of {len(found)} are unknown to the service: {', '.join(unknown)}")
    lines.append(f"audit: {len(vulnerable)} of {len(found) - len(unknown)} packages are vulnerable")
    return (1 if vulnerable else 2 if unknown else 0), lines


def main() -> None:
    """Run pip-audit, whose path is the argument, and exit with what it found."""
    command = [sys.argv[1], "--no-deps", "--disable-pip", "--progress-spinner", "off", "-f", "json"]
    done = subprocess.run([*command, "-r", str(CONSTRAINTS)], capture_output=True, text=True, check=False)
    code, lines = report(done.stdout)
    sys.stdout.write("\n".join(lines) + "\n")
    raise SystemExit(code)


if __name__ == "__main__":
    main()
