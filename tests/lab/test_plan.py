"""What `plan` predicts, beside real runs on a link of 100 Mbit/s: within a factor of 2 where other jobs may run."""

import re
import sys

from tests.shell import ROOT, ok


def test_predictions_come_near_what_real_runs_reach(lab):
    printed = ok(sys.executable, ROOT / "benchmarks" / "plan.py", "--quick")  # exits with 1 if they do not
    rows = re.findall(r"^\| 100 \| (.+?) \| ([\d.]+) \| ([\d.]+) \|", printed, re.MULTILINE)
    names = [name for name, _, _ in rows]
    assert names[0].startswith("DDP"), printed
    assert sum("recommended" in name for name in names) == 1, printed
    measured = {name: float(speed) for name, _, speed in rows}
    # At this speed an average takes many steps: the predictions must say so, too.
    assert max(measured.values()) > 3 * measured[names[0]], printed
