"""The documentation's table of features: every row names tests, and they exist."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
_TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


def rows():
    for line in (ROOT / "docs" / "what-works.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("|") and not set(line) <= set("|-") and cells[0] != "feature":
            yield cells


def defined(path):
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def test_every_row_of_the_table_is_a_test():
    for cells in rows():
        assert len(cells) == 4, cells
        assert cells[1] in ("supported", "refused", "supported, with a caveat", "warned about"), cells
        tests = _TEST.findall(cells[3])
        assert tests, cells
        for file, name in tests:
            assert name in defined(ROOT / file), (file, name)
