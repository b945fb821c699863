"""What a release needs: one version, a citation, and workflows and forms that are what they should be."""

import re
import subprocess

import pytest
import yaml

from lightning_localsgd import __version__
from tests.shell import ROOT

GITHUB = ROOT / ".github"


def read(path):
    return yaml.safe_load((ROOT / path).read_text())


def test_the_version_stands_in_one_place():
    (stated,) = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert stated == __version__
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:  # a source distribution, which is no clone
        pytest.skip("no git here")
    others = [
        path
        for path in tracked.stdout.split("\0")
        if path.endswith((".py", ".cff", ".toml", ".yml", ".md"))
        and path not in ("pyproject.toml", "CHANGELOG.md")
        and re.search(rf"""^_*version_*\s*[:=]\s*["']?{re.escape(stated)}""", (ROOT / path).read_text(), re.MULTILINE)
    ]
    assert others == []


def test_the_citation_names_the_paper_and_this():
    cited = read("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()  # what the format requires
    assert cited["type"] == "software"
    assert "version" not in cited
    paper = cited["preferred-citation"]
    assert [each["family-names"] for each in paper["authors"]] == ["Yu", "Yang", "Zhu"]
    assert "1807.06629" in paper["url"]


def steps(workflow):
    return [step for job in read(f".github/workflows/{workflow}")["jobs"].values() for step in job["steps"]]


def test_the_workflow_runs_what_a_developer_runs():
    assert "bash .ci/run" in [step.get("run") for step in steps("ci.yml")]


@pytest.mark.parametrize(("tag", "good"), [(f"v{__version__}", True), ("v9.9.9", False), (__version__, False)])
def test_a_tag_must_be_the_version(tag, good, tmp_path):
    (check,) = [step["run"] for step in steps("release.yml") if step.get("name") == "The tag is the version"]
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    (tmp_path / "CHANGELOG.md").write_text(f"## [{__version__}] - today\n")
    script = re.sub(r"\$\(python -c .*\)\n", f"{__version__}\n", check)  # Python 3.10 has no tomllib
    assert script != check
    ended = subprocess.run(
        ["bash", "-e", "-c", script], cwd=tmp_path, env={"GITHUB_REF_NAME": tag, "PATH": "/usr/bin:/bin"}
    )
    assert (ended.returncode == 0) == good


def test_only_what_publishes_may_ask_for_a_token():
    workflow = read(".github/workflows/release.yml")
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["jobs"]["publish"]["permissions"] == {"id-token": "write"}
    assert "permissions" not in workflow["jobs"]["build"]
    assert not any("secrets" in str(step) for step in steps("release.yml"))


@pytest.mark.parametrize(("form", "required"), [("bug.yml", True), ("feature.yml", False)])
def test_the_forms_ask_where_it_runs(form, required):
    fields = {field["id"]: field for field in read(f".github/ISSUE_TEMPLATE/{form}")["body"] if "id" in field}
    assert "lightning-localsgd env" in fields["environment"]["attributes"]["label"]
    assert fields["environment"].get("validations", {}).get("required", False) is required
    assert all(field["type"] in ("input", "textarea") for field in fields.values())
