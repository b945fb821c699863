"""Write down every hook that Lightning calls, and at which step."""

import functools

from lightning.pytorch import Callback
from lightning.pytorch.core.hooks import CheckpointHooks, DataHooks, ModelHooks

from tests.lightning_suite.compare import loader
from tests.models import Regression


def _names(*owners):
    return [name for owner in owners for name in vars(owner) if not name.startswith("_") and name != "state_key"]


def _recorded(base, names):
    """Return a subclass of `base` whose methods of these names note their calls in `self.calls`."""

    def recorded(name):
        original = getattr(base, name)

        @functools.wraps(original)
        def hook(self, *args, **options):
            trainer = next((arg for arg in args if hasattr(arg, "fit_loop")), getattr(self, "_trainer", None))
            self.calls.append((base.__name__, name, trainer.global_step if trainer else None))
            return original(self, *args, **options)

        return hook

    return type(f"Recorded{base.__name__}", (base,), {name: recorded(name) for name in names})


class WithData(Regression):
    """The regression with all its steps and loaders."""

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])

    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return loader(3)

    def test_dataloader(self):
        return loader(2)

    def predict_dataloader(self):
        return loader(2)


_STEPS = [
    *("configure_optimizers", "configure_callbacks", "lr_scheduler_step", "optimizer_step", "optimizer_zero_grad"),
    *("backward", "configure_gradient_clipping"),
    *("training_step", "validation_step", "test_step", "predict_step"),
]
RecordedModule = _recorded(WithData, _names(ModelHooks, DataHooks, CheckpointHooks) + _STEPS)
RecordedCallback = _recorded(Callback, _names(Callback))


def recorded(**options):
    """Return a module and a callback that note every call in one list, and that list."""
    module, callback = RecordedModule(**options), RecordedCallback()
    module.calls = callback.calls = []
    return module, callback, module.calls
