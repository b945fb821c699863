"""The benchmarks that need no particular machine: they run, and find what the documentation says."""

import sys

from tests.shell import ROOT, ok


def test_the_theory_holds():
    printed = ok(sys.executable, "-W", "error", ROOT / "benchmarks" / "theory.py", "--quick")  # exits with 1 if not
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith(("| a ", "| b ", "| c ", "| d "))]
    assert len(rows) == 9
    assert all(row[-1] == "yes |" for row in rows), printed
