"""Run the suite with the oldest and with the newest versions that we support: `make matrix`, or

    python tests/matrix.py [oldest | newest | lightning==2.5.3,torch==2.13.0 ...] [-- arguments of pytest]

*Oldest* is what `pyproject.toml` admits at the least, *newest* what the registry gives. Each has an environment of its
own in ~/.cache/lightning-localsgd, which takes 2 to 6 GB where torch is a CUDA build, and keeps its output beside it.
Prints a line for each, and fails if one of them does.
"""

import subprocess
import sys
import time
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
CACHE = Path.home() / ".cache" / "lightning-localsgd"
SHOWN = ("lightning", "torch", "torchmetrics", "jsonargparse")
VERSIONS = f"import importlib.metadata as m; print(*(f'{{n}} {{m.version(n)}}' for n in {SHOWN}), sep=', ')"


def supported() -> list[Requirement]:
    """Return what the package depends on, without its extras."""
    everything = [Requirement(line) for line in requires("lightning-localsgd") or []]
    return [requirement for requirement in everything if "extra" not in str(requirement.marker)]


def requirements(pair: str) -> list[str]:
    """Return what pip is asked for; `lightning` brings a `pytorch-lightning` of any version, but we test both."""
    if pair == "oldest":
        asked = [str(requirement).replace(">=", "==") for requirement in supported()]
    elif pair == "newest":
        asked = [str(requirement).partition(">=")[0] for requirement in supported()]
    else:
        asked = pair.split(",")
    return asked + [f"pytorch-{line}" for line in asked if line.startswith("lightning")]


def environment(pair: str) -> Path:
    """Make or bring up to date the environment of a pair; return its Python."""
    folder = CACHE / f"{sys.version_info.major}.{sys.version_info.minor}-{pair}"
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    install = [python, "-m", "pip", "install", "--quiet", "--upgrade", "--editable", f"{ROOT}[examples,dev]"]
    subprocess.run([*install, *requirements(pair)], check=True)
    return python


def run(pair: str, options: list[str]) -> bool:
    """Run the suite with a pair and print a line; return whether it has passed."""
    python = environment(pair)
    log = CACHE / f"{pair}.log"
    versions = subprocess.run([python, "-c", VERSIONS], check=True, capture_output=True, text=True).stdout.strip()
    start = time.monotonic()
    with log.open("w") as output:
        done = subprocess.run([python, "-m", "pytest", *options], cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    last = log.read_text().rstrip().rpartition("\n")[2].strip("= ")
    python_version = sys.version.split()[0]
    print(f"{pair}: Python {python_version}, {versions}: {last} ({time.monotonic() - start:.0f} s, {log})", flush=True)
    return done.returncode == 0


def main() -> None:
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    passed = [run(pair, words[cut + 1 :]) for pair in words[:cut] or ["oldest", "newest"]]
    sys.exit(not all(passed))


if __name__ == "__main__":
    main()
