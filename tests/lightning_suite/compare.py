"""Run a case on two workers with `DDPStrategy` and with ours, and hold what it saw equal.

A case is a test function with the decorator `same_as_ddp`. It is called in each worker, once for each strategy, with a
`Setting` that makes its trainers, and returns what it has seen: dictionaries, lists, numbers, names, tensors.
"""

import functools
import inspect
import pickle
import tempfile
from importlib import import_module
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, TensorDataset

from lightning_localsgd import LocalSGDStrategy
from tests import models
from tests.workers import run_workers

PERIODS = (1, 2)


class Setting:
    """Where a case runs.

    Args:
        period: of our strategy, or None for `DDPStrategy`.
        path: a directory of this strategy, common to both workers.
    """

    def __init__(self, period, path):
        self.period, self.path = period, Path(path)

    def trainer(self, unused_parameters=False, **options):
        """Return a quiet trainer for two workers, with two epochs if nothing else is asked for."""
        if self.period is None:
            strategy = DDPStrategy(find_unused_parameters=unused_parameters)
        else:
            strategy = LocalSGDStrategy(period=self.period)
        options = {"max_epochs": 2, "use_distributed_sampler": True, "default_root_dir": self.path} | options
        if "max_steps" in options or "max_time" in options:
            options["max_epochs"] = -1
        return models.trainer(2, strategy, **options)


def loader(batches=4, size=2, **options):
    """Return a loader that gives `batches` batches to each of two workers, by Lightning's distributed sampler."""
    return DataLoader(
        TensorDataset(*models.batch(worker=7, index=0, size=2 * batches * size)), batch_size=size, **options
    )


def catch(function, *args, **options):
    """Call `function` and return what it raised, as its type and message."""
    with pytest.raises(Exception) as error:  # noqa: PT011 - which one it is, is what is compared
        function(*args, **options)
    return error.type.__name__, str(error.value)


def same_as_ddp(case):
    """Turn a case into a test for each period.

    What a case returns is compared for each worker: all of it at period 1, down to the last bit of each float; at
    period 2, where the workers' models differ between averages, all but the values of floats and tensors. Tensors under
    the key "model" must be equal on both workers.
    """

    def test(period, **arguments):
        seen = _see_all(case.__module__, case.__name__, pickle.dumps(arguments))
        for ours, ddps in zip(seen[period], seen[None], strict=True):
            assert _outline(ours, values=period == 1) == _outline(ddps, values=period == 1)
        if isinstance(seen[period][0], dict) and "model" in seen[period][0]:
            first, second = (_outline(worker["model"], values=True) for worker in seen[period])
            assert first == second

    functools.update_wrapper(test, case)
    first = inspect.Parameter("period", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    test.__signature__ = inspect.Signature([first, *list(inspect.signature(case).parameters.values())[1:]])
    return pytest.mark.parametrize("period", PERIODS)(test)


@functools.cache
def _see_all(module, name, arguments):
    """Return what the workers saw, in order of rank, for each period and for None, which is DDP."""
    with tempfile.TemporaryDirectory() as path:
        workers = run_workers(_see, 2, path, module, name, pickle.loads(arguments), timeout=60)
    return {period: [worker[period] for worker in workers] for period in (None, *PERIODS)}


def _see(path, module, name, arguments):
    case = inspect.unwrap(getattr(import_module(module), name))
    seen = {}
    for period in (None, *PERIODS):
        torch.manual_seed(0)
        seen[period] = case(Setting(period, f"{path}/{period}"), **arguments)
    return pickle.loads(pickle.dumps(seen))  # tensors by value: a later fit must not change what was seen


def _outline(seen, values):
    if isinstance(seen, dict):
        return {key: _outline(value, values) for key, value in seen.items()}
    if isinstance(seen, list | tuple):
        return [_outline(value, values) for value in seen]
    if isinstance(seen, torch.Tensor):
        return str(seen.dtype), tuple(seen.shape), seen.tolist() if values else None
    if isinstance(seen, float) and not values:
        return "a float"
    return seen
