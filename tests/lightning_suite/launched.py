"""A user's script: fits with one strategy after the other, started in the way that the command line names."""

import json
import sys
import warnings
from pathlib import Path

from lightning.pytorch.strategies import DDPStrategy

from lightning_localsgd import LocalSGDStrategy
from tests.lightning_suite.compare import loader
from tests.lightning_suite.recorder import WithData
from tests.models import rank, trainer


class Told(WithData):
    """Writes down, in each process, what it knows at the end."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def on_train_end(self):
        fit = self.trainer
        seen = [rank(), fit.world_size, fit.global_step, sorted(fit.callback_metrics), fit.is_global_zero]
        Path(f"{self.path}-{rank()}.json").write_text(json.dumps(seen))


def main(how, directory, *periods):
    warnings.filterwarnings("ignore")
    method = "popen" if how == "torchrun" else how
    for period in map(json.loads, periods):
        strategy = DDPStrategy(start_method=method)
        if period is not None:
            strategy = LocalSGDStrategy(period=period, start_method=method)
        model = Told(f"{directory}/{period}")
        fit = trainer(2, strategy, max_epochs=1, use_distributed_sampler=True)
        fit.fit(model, loader(), loader(1))
        if fit.is_global_zero:
            weights = [value.tolist() for value in model.state_dict().values()]
            metrics = {name: value.item() for name, value in fit.callback_metrics.items()}
            Path(f"{directory}/{period}-main.json").write_text(json.dumps([str(fit.state), weights, metrics]))


if __name__ == "__main__":
    main(*sys.argv[1:])
