"""Mutated configurations: an error that names the problem, or what the file says; never a hang or code execution.

Not tested, as it is meant so: `class_path` names what is imported and called. A configuration is a program.
"""

import contextlib
import copy
import io
import random
import re
import signal
import sys
import warnings
from pathlib import Path

import pytest
import yaml

from lightning_localsgd.cli import CLI
from tests.shell import ROOT
from tests.workers import run_workers

CONFIG = """\
seed_everything: false
model:
  class_path: examples.digits.Digits
  init_args:
    width: 16
    lr: 0.01
data:
  class_path: examples.digits.DigitsData
  init_args:
    batch_size: 32
trainer:
  accelerator: cpu
  devices: 2
  max_epochs: 20
  gradient_clip_val: 1.0
  enable_checkpointing: false
  logger: false
  strategy:
    class_path: lightning_localsgd.LocalSGDStrategy
    init_args:
      period:
        class_path: Stages
        init_args:
          periods: {0: 4, 48: 16}
          unit: step
      mean:
        bucket_mb: 25.0
        nonfinite: exclude
      outer:
        class_path: SlowMo
        init_args:
          beta: 0.4
      optimizer_state:
        every: 3
      pace:
        speeds: [1.0, 0.5]
        average: steps
      checkpoint: exact
"""
CREATED = "created-by-yaml"
NAMED = {
    "line ", "Key must be a string, got: ", "Unexpected config: ",  # where the place, the key, the whole is shown
    "argument of type 'int' is not iterable",  # what old versions of jsonargparse say of a key that is a number
}  # fmt: skip
VALUES = [
    None, True, False, -1, 0, 1, 7, 1.5, -0.0, 1e308, 10**30, float("nan"), float("inf"), "", "x", "1e3", "08", "null",
    "0x10", "é", "a\nb", "- a", "{", "${oc.env:HOME}", "../x", "a b", [], [1], [None], {}, {"a": 1}, {1: 2},
    [[1, 2], 3],
]  # fmt: skip
TAGS = [
    f"!!python/object/apply:os.mkdir [{CREATED}]",
    f"!!python/object/new:os.mkdir [{CREATED}]",
    "!!python/name:os.system",
    "!!python/module:os",
    "!!binary aGVsbG8=",
    "!!set {a, b}",
    "2020-01-01",
    "&a [*a]",
    "*none",
    "1:30",
    "0o17",
    "1_000",
]


def leaves(tree, path=()):
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*path, key))
        yield (*path, key)


def words(*values):
    return {word for value in values for word in re.findall(r"[\w.]{3,}", str(value))}


def mutated(seed):
    """Return the name of a mutation, the text, and words one of which an error must have."""
    rng = random.Random(seed)
    kind = ["value", "tag", "key", "drop", "character", "line", "cut", "indent"][seed % 8]
    tree, lines = yaml.safe_load(CONFIG), CONFIG.splitlines(keepends=True)
    *path, key = rng.choice(list(leaves(tree)))
    where = tree
    for step in path:
        where = where[step]
    near = " ".join(map(str, [*path[-1:], key]))
    if kind == "value":
        where[key] = copy.deepcopy(rng.choice(VALUES))
        return kind, yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), words(near, where[key])
    if kind == "tag":
        tag, where[key] = rng.choice(TAGS), "HERE"
        return kind, yaml.safe_dump(tree, sort_keys=False).replace("HERE", tag), words(near, tag)
    if kind == "key":
        new = rng.choice([f"{key}s", str(key)[1:] or "x", str(key).upper(), 5, f"{key}.x", f"--{key}"])
        where[new] = where.pop(key)
        return kind, yaml.safe_dump(tree, sort_keys=False), words(near, new)
    if kind == "drop":
        gone = where.pop(key)
        return kind, yaml.safe_dump(tree, sort_keys=False), words(near, gone)
    place = rng.randrange(len(lines))
    old = lines[place]
    if kind == "character":
        column = rng.randrange(len(old))
        new = rng.choice(["", chr(rng.randrange(32, 127)), "\t", "\x07", "é", old[column] * 2])
        lines[place] = old[:column] + new + old[column + 1 :]
    elif kind == "line":
        other = rng.randrange(len(lines))
        lines[place], lines[other] = lines[other], lines[place]
        old += lines[place]
    elif kind == "cut":
        lines[place:] = [old[: rng.randrange(len(old))]]
        old = "".join(lines[max(0, place - 2) : place]) + old
    else:
        lines[place] = rng.choice([" " + old, "  " + old, old[1:], old[2:]])
    near = "".join(lines[max(0, place - 1) : place + 2])
    return kind, "".join(lines), words(old, near, "position")


def says(parsed, given):
    """Whether the parsed configuration is what the file says."""
    if isinstance(given, dict) and isinstance(parsed, dict) and "class_path" in given and "class_path" not in parsed:
        given = given.get("init_args") or {}  # of a dataclass, the only one that can stand here
    if isinstance(given, dict) and isinstance(parsed, dict):
        found = {str(key): value for key, value in parsed.items()}
        return all(str(key) in found and says(found[str(key)], value) for key, value in given.items())
    if isinstance(given, str) and isinstance(parsed, dict) and "class_path" in parsed:
        return parsed["class_path"].rpartition(".")[2] == given.rpartition(".")[2]
    if isinstance(given, list | tuple) and isinstance(parsed, list | tuple):
        return len(given) == len(parsed) and all(map(says, parsed, given))
    if parsed == given or str(parsed) == str(given):
        return True
    if isinstance(given, str) and isinstance(parsed, str):
        return parsed.rpartition(".")[2] == given.rpartition(".")[2]
    try:
        return float(parsed) == float(given) and not isinstance(given, bool)
    except (TypeError, ValueError, OverflowError):
        return False


def read(text):
    """Return what is in a configuration, by the parser in C if there is one, as jsonargparse does; it is laxer."""
    return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {}


class TooLong(BaseException):
    pass


def parse(path):
    """Return the configuration that LightningCLI makes its objects of, and the strategy; or what it says."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            cli = CLI(args=["--config", str(path)], run=False)
    except SystemExit:
        return None, said.getvalue().partition("error: ")[2]  # after a page of usage
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"
    return cli, ""


def parse_mutations(folder, seeds):
    def stop(*_):
        raise TooLong

    signal.signal(signal.SIGALRM, stop)
    sys.path.insert(0, str(ROOT))
    warnings.simplefilter("ignore")  # Lightning calls what jsonargparse deprecates, and says what a setting is good for
    sys.argv = ["lightning-localsgd"]  # else LightningCLI warns of those of pytest
    path, wrong, outcomes = Path(folder) / "mutated.yaml", [], {"refused": 0, "right": 0}
    with contextlib.chdir(folder) if hasattr(contextlib, "chdir") else contextlib.nullcontext():
        for seed in seeds:
            kind, text, near = mutated(seed)
            path.write_text(text)
            signal.alarm(30)
            cli, said = parse(path)
            signal.alarm(0)
            if cli is None:
                outcomes["refused"] += 1
                if not any(word in said for word in near | NAMED):
                    wrong.append((seed, kind, said))
            else:
                outcomes["right"] += 1
                parsed = yaml.safe_load(cli.parser.dump(cli.config, skip_none=False))
                given = read(text)
                if not says(parsed, given):
                    wrong.append((seed, kind, given, parsed))
    return wrong, outcomes, [one.name for one in Path(folder).iterdir()]


def check(folder, seeds):
    ((wrong, outcomes, files),) = run_workers(parse_mutations, 1, str(folder), seeds, timeout=60 + 2 * len(seeds))
    assert files == ["mutated.yaml"]
    assert wrong == []
    assert min(outcomes.values()) > len(seeds) / 10


def test_mutated_configurations_are_refused_by_name_or_say_what_they_say(tmp_path):
    check(tmp_path, range(40))


@pytest.mark.soak
def test_many_mutated_configurations(tmp_path):
    check(tmp_path, range(1000, 1500))
