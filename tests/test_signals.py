"""The board, by which ranks leave word between headers; what signals do is in tests/lab."""

import threading
from unittest import mock

from lightning_localsgd import signals
from tests.models import Constant, loader, trainer
from tests.workers import run_workers


def fit_three_times():
    in_main_thread, connect = [], signals.Board._connect

    def note(board):
        in_main_thread.append(threading.current_thread() is threading.main_thread())
        return connect(board)

    with mock.patch.object(signals.Board, "_connect", note):
        for _ in range(3):
            trainer(2).fit(Constant(), loader([4, 4]))
    return in_main_thread, [thread.name for thread in threading.enumerate() if "localsgd" in thread.name]


def test_connections_are_made_by_the_main_thread_and_no_thread_outlives_its_fit():
    for in_main_thread, left in run_workers(fit_three_times, 2):
        assert in_main_thread == [True] * 3  # torch 2.6 may end the process otherwise
        assert left == []
