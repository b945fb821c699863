"""FROM THE SHELL: Lightning's command line with our names known to it."""

import os
import sys

from lightning.pytorch.cli import LightningCLI


def main() -> None:
    """Run ``fit``, ``validate``, ``test`` or ``predict`` with a model, data and trainer given by YAML or flags.

    Classes are named by import path, and are also looked for in the current directory.

    Example:
        ``lightning-localsgd fit --config configs/digits.yaml``
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m lightning_localsgd` does
    LightningCLI()
