"""What the pages say: their code runs, their commands exist, their links lead somewhere, their features are tested."""

import ast
import doctest
import importlib
import inspect
import os
import re
import shlex
import socket
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from types import FunctionType

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.run import get_args_parser

import lightning_localsgd
from lightning_localsgd import Every, LocalSGDStrategy, Schedule
from lightning_localsgd._lightning.loops import Hooks
from lightning_localsgd.cli import _OWN, CLI
from lightning_localsgd.header import LEFT, _stopped
from tests.models import Regression, loader
from tests.shell import COMMAND, ROOT, ok, run
from tests.workers import WorkerError, run_workers

DOCS = ROOT / "docs"
START = DOCS / "start.md"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted(DOCS.glob("*.md"))]
LINKING = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md"]

# A reader's own files, where a page does not show one, and what the reader has imported by then.
THEIRS = {"your.yaml": ROOT / "configs" / "digits.yaml", "train.py": ROOT / "examples" / "digits.py"}
SMALL = {  # what a Trainer takes where a page does not say
    "PL_TRAINER_MAX_EPOCHS": "1",
    "PL_TRAINER_LIMIT_TRAIN_BATCHES": "4",
    "PL_TRAINER_ENABLE_PROGRESS_BAR": "False",
    "PL_TRAINER_ENABLE_MODEL_SUMMARY": "False",
    "PL_TRAINER_LOG_EVERY_N_STEPS": "1",
    "JSONARGPARSE_DEPRECATION_WARNINGS": "off",  # of what Lightning calls
}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the line of the page on which its code begins, and the code."""

    language: str
    line: int
    code: str

    @property
    def file(self) -> str | None:
        """The file that a first line such as `# train.py` says it is."""
        found = re.match(r"# ([\w.-]+\.(?:py|yaml))\n", self.code)
        return found[1] if found else None


def blocks(page: Path) -> list[Block]:
    found, open_, lines = [], None, []
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        if open_ is None and line.startswith("```"):
            open_, lines = (line.strip("`").strip(), number + 1), []
        elif open_ is not None and line == "```":
            found.append(Block(*open_, "".join(f"{each}\n" for each in lines)))
            open_ = None
        else:
            lines.append(line)
    assert open_ is None, f"{page}: the block of line {open_[1]} has no end"
    return found


def name(path: Path) -> str:
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def pages_with(*languages: str) -> list:
    return [pytest.param(page, id=name(page)) for page in PAGES if any(b.language in languages for b in blocks(page))]


# ---------------------------------------------------------------------------------------------------- Python and YAML


def run_page(page, folder):
    """Run a page's Python in one namespace, as a worker of two, and make what its YAML describes."""
    os.environ.update(SMALL)
    for advice in (".*tensorboardX.*", "The dirpath has changed"):  # Lightning's: a page need not choose a logger
        warnings.filterwarnings("ignore", advice)
    os.chdir(folder)
    sys.path[:0] = [str(folder), str(ROOT)]
    public = {name: getattr(lightning_localsgd, name) for name in dir(lightning_localsgd) if name[0].isupper()}
    classes = {"Trainer": Trainer, "Callback": Callback, "LightningModule": LightningModule, "dataclass": dataclass}
    theirs = {"torch": torch, "nn": torch.nn, "partial": partial, "model": Regression(), "data": loader([8, 8])}
    names = {"__name__": "__main__", **public, **classes, **theirs}
    for block in blocks(page):
        if block.language not in ("python", "yaml"):
            continue
        if block.file is not None:
            write(block.file, block.code)
        where = f"{name(page)}:{block.line}"
        try:
            if block.language == "python" and block.code.startswith(">>> "):
                examples(block, names, where)
            elif block.language == "python":
                exec(compile("\n" * (block.line - 1) + block.code, name(page), "exec"), names)
            else:
                make(block.code)
        except BaseException as error:
            raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error


def write(file, code):
    """Write a file that the other worker may write and read at the same time."""
    new = Path(f"{file}-of-{os.getpid()}")
    new.write_text(code)
    new.replace(file)


def examples(block, names, where):
    """Run a block of `>>>`, and see that it prints what the page says."""
    said = []
    test = doctest.DocTestParser().get_doctest(block.code, names, where, where, block.line)
    if doctest.DocTestRunner(verbose=False).run(test, out=said.append, clear_globs=False).failed:
        raise ValueError("".join(said))


def make(code):
    """Make all that a configuration describes, on top of one that trains where it has no model of its own."""
    own = f"block-{os.environ['LOCAL_RANK']}.yaml"
    write(own, code)
    sys.argv = ["lightning-localsgd"]
    base = [] if re.search(r"^model:", code, re.MULTILINE) else ["--config", str(ROOT / "configs" / "digits.yaml")]
    with redirect_stderr(StringIO()) as said:
        try:
            CLI(run=False, args=[*base, "--config", own], save_config_callback=None)
        except SystemExit as end:
            raise ValueError(said.getvalue()) from end


def settings(page: Path) -> list[tuple[str, str]]:
    """Return each setting in YAML that a page's tables have, with the argument that heads its table."""
    found, argument = [], None
    for line in page.read_text().splitlines():
        head = re.fullmatch(r"\| \| `(\w+):` \|", line)
        argument = head[1] if head else argument if line.startswith("|") else None
        if argument is not None and not head and not set(line) <= set("|-"):
            found += [(argument, value) for value in re.findall(r"`([^`]*)`", line.split(" | ", 1)[1])]
    return found


@pytest.fixture(scope="module")
def strategy_parser():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LocalSGDStrategy, "strategy")
    return parser


@pytest.mark.parametrize(("argument", "value"), settings(DOCS / "algorithms.md"))
def test_a_setting_in_a_table_is_right(strategy_parser, argument, value, monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # it has had several names for what it does
    given = {"class_path": "lightning_localsgd.LocalSGDStrategy", "init_args": yaml.safe_load(f"{argument}: {value}")}
    made = strategy_parser.instantiate_classes(strategy_parser.parse_object({"strategy": given}))
    assert isinstance(made.strategy, LocalSGDStrategy)


def test_each_schedule_has_its_yaml():
    arguments = {argument for argument, _ in settings(DOCS / "algorithms.md")}
    assert arguments == {"period", "outer", "optimizer_state", "mean", "pace", "replica"}
    heads = {row.partition("`")[2].partition("`")[0] for row in (DOCS / "algorithms.md").read_text().splitlines()}
    assert {name for name in dir(lightning_localsgd) if is_schedule(getattr(lightning_localsgd, name))} <= heads


def is_schedule(what):
    return isinstance(what, type) and issubclass(what, Schedule) and not inspect.isabstract(what)


@pytest.mark.parametrize("page", pages_with("python", "yaml"))
def test_the_code_of_a_page_runs(page, tmp_path):
    run_workers(run_page, 2, page, tmp_path)


@pytest.mark.parametrize(
    ("language", "code", "told"),
    [
        ("python", "x = 1\n\nassert x == 2", "page.md:9: AssertionError"),
        ("python", ">>> x = 1\n>>> x + 1\n3", "Expected:\n    3\nGot:\n    2"),
        ("yaml", "trainer:\n  strategy:\n    init_args:\n      period: 0", "`period` must be an int of at least 1"),
        ("yaml", "trainer:\n  strategy:\n    init_args:\n      perod: 3", "perod"),
    ],
)
def test_what_does_not_run_is_seen(tmp_path, language, code, told):
    (tmp_path / "page.md").write_text("\n" * 7 + f"```{language}\n{code}\n```\n")
    with pytest.raises(WorkerError, match=re.escape(told)):
        run_workers(run_page, 1, tmp_path / "page.md", tmp_path)


# ------------------------------------------------------------------------------------------------------ the first page


def test_a_newcomers_two_machines_train_and_are_reported_on(tmp_path, monkeypatch):
    for name, value in {**SMALL, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    for block in blocks(START):
        if block.file is not None:
            (tmp_path / block.file).write_text(block.code)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        here = f"127.0.0.1:{probe.getsockname()[1]}"
    (command,) = (command for _, command in commands(START) if command.startswith("torchrun"))
    first, *words = shlex.split(command.replace("n0:29500", here))
    assert here in words
    program = Path(sys.executable).with_name(first)
    with ThreadPoolExecutor() as machines:
        ended = [each.result() for each in [machines.submit(run, program, *words, cwd=tmp_path) for _ in range(2)]]
    said = ended[0].output + ended[1].output
    assert [each.code for each in ended] == [0, 0], said
    assert "Starting with 2 processes" in said
    assert "Rounds of local SGD" in said
    (log,) = tmp_path.glob("lightning_logs/version_*/metrics.csv")
    ok(COMMAND, "report", log.parent)


# ----------------------------------------------------------------------------------------------------------- commands


def commands(page: Path) -> list:
    """Return each command of a page's shell blocks, with its line; a line that ends in a backslash goes on."""
    found = []
    for block in blocks(page):
        if block.language == "bash":
            code = block.code.replace("\\\n", " ")
            for line in code.splitlines():
                found += [(block.line, part) for part in re.split(r"\s&&\s|\s\|\s", line) if part.strip()]
    return found


EACH_COMMAND = [
    pytest.param(page, command, id=f"{name(page)}:{line}: {command[:40]}")
    for page in PAGES
    for line, command in commands(page)
]


def script(word: str, shown: set[str]) -> Path | None:
    """Return the file that a command runs; None for one that the page itself shows."""
    if word in shown:
        return None
    path = THEIRS.get(word, ROOT / word)
    assert path.is_file(), f"there is no {word}"
    return path


def check_script(words, shown):
    path = script(words[0], shown)
    for word in words[1:]:
        if word.startswith("--") and path is not None:
            assert f'"{word.partition("=")[0]}"' in path.read_text(), f"{words[0]} knows no {word}"


def check_ours(words, shown):
    """Our own command: everything is parsed as it will be, and nothing is run."""
    if words[0] in _OWN:
        with redirect_stdout(StringIO()) as said, pytest.raises(SystemExit):
            importlib.import_module(_OWN[words[0]]).main(["--help"])
        for word in words[1:]:
            assert not word.startswith("--") or word.partition("=")[0] in said.getvalue(), word
        return
    subcommand, *rest = words
    assert subcommand in ("fit", "validate", "test", "predict", "--help", "--version"), subcommand
    if subcommand.startswith("--"):
        return
    rest = [str(THEIRS.get(word, word)) for word in rest if word != "--print_config"]
    for file in shown:
        rest = [str(ROOT / "configs" / "digits.yaml") if word == file else word for word in rest]
    said, wrong = StringIO(), StringIO()
    with redirect_stdout(said), redirect_stderr(wrong), pytest.raises(SystemExit) as end:
        CLI(args=[subcommand, *rest, "--print_config"])
    assert not end.value.code, wrong.getvalue()


def check_torchrun(words, shown):
    options = get_args_parser().parse_args(words)
    if options.no_python:  # a line for a shell, which fills in what torchrun has found
        _, inner = options.training_script_args
        first, *rest = shlex.split(re.sub(r"\$\w+", "2", inner).removeprefix("exec "))
        CHECKS[first](rest, shown)
    elif options.module:
        assert options.training_script == "lightning_localsgd"
        check_ours(options.training_script_args, shown)
    else:
        check_script([options.training_script, *options.training_script_args], shown)


def check_python(words, shown):
    if words[:2] == ["-m", "venv"]:
        return
    if words[0] == "-m":
        assert words[1] == "lightning_localsgd", words
        check_ours(words[2:], shown)
    else:
        check_script(words, shown)


def check_make(words, shown):
    targets = re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert [word for word in words if "=" not in word and word not in targets] == []


def check_sbatch(words, shown):
    path, *rest = (word for word in words if not re.match(r"--(nodes|ntasks-per-node|array)\b", word))
    assert (ROOT / path).is_file()
    check_ours(["fit", "--config", "your.yaml", *rest], shown)


def check_nothing(words, shown):
    pass


CHECKS = {
    "lightning-localsgd": check_ours, "python": check_python, "python3": check_python, "torchrun": check_torchrun,
    "make": check_make, "sbatch": check_sbatch, "pip": check_nothing, "pytest": check_nothing, "git": check_nothing,
    "pre-commit": check_nothing, "bash": check_script, ".": check_nothing, "cd": check_nothing,
}  # fmt: skip


@pytest.mark.parametrize(("page", "command"), EACH_COMMAND)
def test_a_command_of_a_page_is_one(page, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    monkeypatch.setattr(sys, "argv", ["lightning-localsgd"])
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of what Lightning calls
    words = shlex.split(command, comments=True)
    while words and (
        re.match(r"[A-Z_]+=", words[0]) or words[0] in ("sudo", "nice", "srun", "-n") or words[0][0] == "-"
    ):
        words.pop(0)  # how it is run
    if words:
        CHECKS[words[0]](words[1:], {block.file for block in blocks(page) if block.file})


@pytest.mark.parametrize(
    "command",
    [
        "lightning-localsgd fit --config configs/digits.yaml --trainer.strategy.perod 4",
        "lightning-localsgd report --no-such-option",
        "lightning-localsgd fits",
        "python benchmarks/none.py",
        "python examples/digits.py --perod 3",
        "torchrun --nnodes 2 none.py",
        "make nothing",
        "unknown",
    ],
)
def test_what_is_no_command_is_seen(command, monkeypatch):
    with pytest.raises((AssertionError, KeyError)):
        test_a_command_of_a_page_is_one(ROOT / "README.md", command, monkeypatch)


# -------------------------------------------------------------------------------------------------------------- links


def headings(page: Path) -> set[str]:
    """Return the anchors of a page, as GitHub and Sphinx name them."""
    text = page.read_text()
    included = re.search(r"^```{include} (\S+)", text, re.MULTILINE)
    if included:
        text += (page.parent / included[1]).read_text()
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}
    return slugs | set(re.findall(r"^\(([\w-]+)\)=$", text, re.MULTILINE))


def broken_links(page: Path) -> list[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", text)):
        if not re.match(r"(https?|mailto):", link):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            if not target.exists() or (anchor and anchor not in headings(target)):
                broken.append(link)
    return broken


@pytest.mark.parametrize("page", [pytest.param(page, id=name(page)) for page in LINKING])
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


def test_a_broken_link_is_seen(tmp_path):
    (tmp_path / "a.md").write_text("# One title\n\n[a](#one-title) [b](#two) [c](none.md) [d](a.md) [e](a.md#two)\n")
    assert broken_links(tmp_path / "a.md") == ["#two", "none.md", "a.md#two"]


def test_every_page_is_in_the_contents():
    entries = [
        line.strip()
        for block in blocks(DOCS / "index.md")
        if block.language.startswith("{toctree}")
        for line in block.code.splitlines()
        if line.strip() and not line.startswith(":")
    ]
    assert sorted(entries) == sorted(page.stem for page in DOCS.glob("*.md") if page.stem != "index")


@pytest.mark.parametrize(("page", "mark"), [("README.md", "  {} "), ("docs/contributing.md", "`{}`")])
def test_every_file_is_on_the_map(page, mark):
    text = (ROOT / page).read_text()
    files = [path.name for path in (ROOT / "lightning_localsgd").glob("*.py") if path.name != "__init__.py"]
    assert [file for file in files if mark.format(file) not in text] == []


# ----------------------------------------------------------------------------------------------------------- messages


def messages() -> list[str]:
    """Return every text in our code, with what is filled in left out."""
    found = []
    for path in (ROOT / "lightning_localsgd").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("\0".join(each.value for each in node.values if isinstance(each, ast.Constant)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def quoted(page: Path) -> list[tuple[int, str]]:
    """Return each message that a page quotes: a paragraph in a block `text`, where <...> stands for something."""
    return [
        (block.line, " ".join(paragraph.split()))
        for block in blocks(page)
        if block.language == "text"
        for paragraph in block.code.split("\n\n")
    ]


def test_messages_are_quoted_as_they_are():
    ours = messages()
    ours += [
        str(_stopped("Rank 0, which starts,", why)) for why in ours if why == LEFT or why.startswith("the others have")
    ]
    found = quoted(DOCS / "troubleshooting.md")
    assert len(found) > 10
    for line, message in found:
        for part in map(str.strip, re.split(r"<[^<>]*>", message)):
            # What stands alone beside something that is filled in says nothing.
            assert len(part) < 4 or any(part in text for text in ours), (line, part)


# ---------------------------------------------------------------------------------------------------------- reference


def public() -> dict[str, object]:
    """Return each name that is imported from the package."""
    mine = vars(lightning_localsgd).items()
    return {name: what for name, what in mine if name[0] != "_" and not inspect.ismodule(what) and is_ours(what)}


def is_ours(what: object) -> bool:
    return getattr(what, "__module__", "").startswith("lightning_localsgd")


def undocumented(what: type) -> list[str]:
    """Return each public method and property of a class that no base explains, and no other package has."""
    bases = [*what.__mro__, Hooks]  # which the strategy implements without a word
    ours = {name for of in bases if is_ours(of) for name in vars(of) if name[0] != "_"}
    theirs = {name for of in bases if not is_ours(of) for name in vars(of)}
    found = {name: [vars(of)[name] for of in bases if name in vars(of)] for name in sorted(ours - theirs)}
    spoken = (FunctionType, property, classmethod, staticmethod)
    return [
        name
        for name, those in found.items()
        # What a base has as a plain attribute, the base explains as a whole.
        if all(isinstance(each, spoken) for each in those) and not any(each.__doc__ for each in those)
    ]


def test_what_is_public_is_documented():
    reference = (DOCS / "api.md").read_text()
    assert len(public()) > 25
    for name, what in public().items():
        assert inspect.getdoc(what), name
        assert re.search(rf"^\.\. auto(class|function):: {name}$", reference, re.MULTILINE), name
        if inspect.isclass(what):
            assert undocumented(what) == [], name


def test_what_is_not_documented_is_seen():
    class Schedule(Every):
        def ends_round(self, progress):
            return True

        def spread(self):
            return 3

    Schedule.__module__ = "lightning_localsgd.mine"
    assert undocumented(Schedule) == ["spread"]


# ----------------------------------------------------------------------------------------------------------- features

_TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


def rows():
    for line in (DOCS / "what-works.md").read_text().splitlines():
        cells = [cell.strip() for cell in re.split(r" \|(?= )", line.strip("|"))]
        if line.startswith("|") and not set(line) <= set("|-") and cells[0] != "feature":
            yield cells


def defined(path):
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def test_every_row_of_the_table_is_a_test():
    for cells in rows():
        assert len(cells) == 4, cells
        assert cells[1] in ("supported", "refused", "supported, with a caveat", "warned about"), cells
        tests = _TEST.findall(cells[3])
        assert tests, cells
        for file, test in tests:
            assert test in defined(ROOT / file), (file, test)
