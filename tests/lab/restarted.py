"""What torchrun starts, and starts again: ``python -m tests.lab.restarted FOLDER PERIOD``."""

import os
import sys
from pathlib import Path

from lightning_localsgd.cli import main
from tests.lab.preemption import words
from tests.shell import ROOT


def newest(folder: Path) -> list[str]:
    """Return the option that names the newest checkpoint, if there is one."""
    found = sorted(folder.glob("saves/*.ckpt"), key=os.path.getmtime)
    return [f"--ckpt_path={found[-1]}"] if found else []


if __name__ == "__main__":
    folder, period = Path(sys.argv[1]), sys.argv[2]
    saving = [
        "--trainer.callbacks+=ModelCheckpoint",
        f"--trainer.callbacks.dirpath={folder}/saves",
        "--trainer.callbacks.every_n_train_steps=5",
        "--trainer.callbacks.save_top_k=-1",
    ]
    given = words(period, (0.03, 0.03), 0, folder)
    saving.append("--trainer.strategy.timeout=0:00:30")
    of_job = [f"--trainer.num_nodes={os.environ['GROUP_WORLD_SIZE']}", "--trainer.devices=1"]
    sys.argv = ["lightning-localsgd", "fit", "--config", str(ROOT / "configs" / "slurm.yaml")]
    sys.argv += [*given, *saving, *of_job, *newest(folder)]
    main()
