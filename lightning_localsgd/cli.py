"""FROM THE SHELL: Lightning's command line with our names known to it, and our own commands beside it."""

import os
import sys
from importlib import import_module
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningCLI

_OWN = {
    "env": "lightning_localsgd.environment",
    "plan": "lightning_localsgd.plan",
    "report": "lightning_localsgd.report",
}  # whose `main` takes the words that follow


class CLI(LightningCLI):
    """Lightning's command line, with our strategy unless another one is named."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            trainer_defaults={"strategy": {"class_path": "lightning_localsgd.LocalSGDStrategy"}},
            parser_kwargs={
                "prog": "lightning-localsgd",  # also for `python -m`, where it would be `__main__.py`
                "description": "Train by parallel restarted SGD: workers train alone for a round, then agree on one "
                "model. Beside these subcommands: "
                + ", ".join(f"`lightning-localsgd {name} --help`" for name in _OWN)
                + ".",
            },
            **options,
        )

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand] if self.subcommand else self.config
        if not isinstance(config.trainer, Namespace):  # to Lightning's own code
            self.parser.error(f"`trainer` must be a mapping of options, got {config.trainer!r}.")


def main() -> None:
    """Run ``fit``, ``validate``, ``test`` or ``predict`` with a model, data and trainer given by YAML or flags.

    Classes are named by import path, and are also looked for in the current directory; ours, as ``Every``, by their
    name alone. The strategy is :class:`~lightning_localsgd.LocalSGDStrategy` unless another one is named.

    Example:
        ``lightning-localsgd fit --config configs/digits.yaml --trainer.strategy.period 4``
    """
    if sys.argv[1:2] and sys.argv[1] in _OWN:
        import_module(_OWN[sys.argv[1]]).main(sys.argv[2:])
        return
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m lightning_localsgd` does
    # A turn of a requeued job finds the configuration that the turn before has saved: the same one. (What torchrun
    # counts differs between nodes, and who does not overwrite waits for the others.)
    CLI(save_config_kwargs={"overwrite": int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0})
