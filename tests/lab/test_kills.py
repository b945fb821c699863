"""Workers that are killed under torchrun are started anew, and the runs end as if nobody had been killed."""

import pytest

from tests.lab.kills import kill


@pytest.mark.parametrize("seed", range(3))
def test_a_run_in_which_a_worker_is_killed_ends_the_same(lab, seed, tmp_path):
    kill(lab, seed, tmp_path, first=2 * seed)
