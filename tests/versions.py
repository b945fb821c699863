"""What the installed Lightning can do; a test of what it cannot is skipped, with the version that brought it."""

import inspect

import pytest
from lightning.pytorch import Trainer, __version__
from packaging.version import Version

# Before 2.6 `fit` does not take it, and torch's own default holds.
WEIGHTS_ONLY = {"weights_only": True} if "weights_only" in inspect.signature(Trainer.fit).parameters else {}


def has(version: str) -> bool:
    return Version(__version__) >= Version(version)


def since(version: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not has(version), reason=f"new in Lightning {version}")
