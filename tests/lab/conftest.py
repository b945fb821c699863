"""The cluster that the lab's tests share; where there can be none they say why, and in CI they fail."""

import os
from pathlib import Path

import pytest

from tests.lab.cluster import cluster, missing

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.lab)


@pytest.fixture(scope="session")
def lab():
    if why := missing():
        if os.environ.get("CI"):
            pytest.fail(f"in CI nothing of the lab may be skipped, but {why}")
        pytest.skip(why)
    with cluster(12) as made:  # the first two are SLURM's, the others in pairs
        yield made
