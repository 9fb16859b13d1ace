"""What is published: metadata for ComfyUI's registry, its archive, the wheel, and the files around them."""

import copy
import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
import tomllib
import torch
import yaml
from comfyui_softrepa.softrepa import __version__, token_files
from comfyui_softrepa.softrepa.tokens import SoftTokens
from PIL import Image
from softrepa_tests.conftest import ROOT
from softrepa_tests.repository import files, shipped

from tools.metadata import PICTURES, missing

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT, COMFY = PYPROJECT["project"], PYPROJECT["tool"]["comfy"]
WITHOUT_COMFYUI = {name: value for name, value in os.environ.items() if name != "COMFYUI_PATH"}
RAW = "https://raw.githubusercontent.com"
WAITING = ((("project", "urls"), "Repository"), (("tool", "comfy"), "Icon"), (("tool", "comfy"), "Banner"))
"""What is known once the repository is public."""
NOT_INSTALLED = ("numpy", "PIL", "tqdm", "comfy", "folder_paths")


def read_yaml(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


class TestMetadata:
    def test_one_version_everywhere(self):
        changelog = re.search(r"^## \[(\d[^]]*)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
        found = {PROJECT["version"], changelog[1], read_yaml("CITATION.cff")["version"]}
        assert found == {__version__}
        assert re.fullmatch(r"\d+\.\d+\.\d+", __version__), "the registry takes three numbers only"

    def test_registry(self):
        assert re.fullmatch(r"[a-z]+([-_.]?[a-z0-9]+)*", PROJECT["name"])
        assert len(PROJECT["name"]) < 100
        assert PROJECT["license"] == "Apache-2.0"
        assert PROJECT["description"]
        assert "Operating System :: OS Independent" in PROJECT["classifiers"]
        assert COMFY["PublisherId"]
        assert COMFY["DisplayName"]
        assert re.fullmatch(r">=\d+\.\d+\.\d+", COMFY["requires-comfyui"])

    @pytest.mark.parametrize(("name", "size"), [("icon.png", (400, 400)), ("banner.png", (1260, 540))])
    def test_pictures_fit_the_registry(self, name, size):
        with Image.open(ROOT / name) as picture:
            assert picture.size == size
            assert picture.format == "PNG"

    def test_addresses_are_all_there_or_all_wait_for_publication(self):
        said = missing(PYPROJECT)
        assert len(said) in (0, len(WAITING)), "\n".join(said)

    def test_what_is_missing_is_said(self):
        filled = {
            "project": {"urls": {"Repository": "https://github.com/someone/comfyui-softrepa"}},
            "tool": {"comfy": {field: f"{RAW}/someone/comfyui-softrepa/main/{PICTURES[field]}" for field in PICTURES}},
        }
        assert missing(filled) == []
        for section, field in WAITING:
            broken = copy.deepcopy(filled)
            broken[section[0]][section[1]][field] = "https://example.com"
            assert f'{".".join((*section, field))} is "https://example.com", expected' in "\n".join(missing(broken))
            del broken[section[0]][section[1]][field]
            assert f'{".".join((*section, field))} is ""' in "\n".join(missing(broken))

    def test_citation(self):
        citation = read_yaml("CITATION.cff")
        assert {"cff-version", "message", "title", "authors"} <= citation.keys()
        assert citation["license"] == PROJECT["license"]
        papers = {reference["url"].rpartition("/")[2]: reference for reference in citation["references"]}
        assert set(papers) == {"2503.08250", "2412.08629", "2605.30038"}
        names = [author["family-names"] for author in papers["2503.08250"]["authors"]]
        assert names == ["Lee", "Cha", "Kim", "Ye"]

    @pytest.mark.parametrize("name", ["tests", "publish"])
    def test_workflow(self, name):
        workflow = read_yaml(f".github/workflows/{name}.yml")
        triggers = workflow[True]  # YAML reads the key `on` as true
        assert "push" in triggers
        for job in workflow["jobs"].values():
            assert job["runs-on"]
            for step in job["steps"]:
                assert ("uses" in step) != ("run" in step)

    def test_workflows_do_what_they_are_for(self):
        jobs = read_yaml(".github/workflows/tests.yml")["jobs"]
        assert ".ci/run" in [step.get("run") for step in jobs["all"]["steps"]]
        assert jobs["pure"]["strategy"]["matrix"]["os"] == ["windows-latest", "macos-latest"]
        publish = read_yaml(".github/workflows/publish.yml")
        assert publish[True]["push"] == {"tags": ["v*"]}
        used = [step.get("uses", "") for step in publish["jobs"]["publish"]["steps"]]
        assert used[-1].startswith("Comfy-Org/publish-node-action@")
        assert "python3 -m tools.metadata" in [step.get("run") for step in publish["jobs"]["publish"]["steps"]]

    def test_a_commit_passes_what_ci_asks_first(self):
        """The same tests, by the same command as CONTRIBUTING.md has for those without pre-commit."""
        (hook,) = read_yaml(".pre-commit-config.yaml")["repos"][0]["hooks"]
        assert hook["always_run"] and not hook["pass_filenames"]
        gates = [word for word in hook["entry"].split() if word.startswith("tests/")]
        assert {"tests/pure/test_quality.py", "tests/pure/test_layers.py", "tests/pure/test_docs.py"} <= set(gates)
        assert set(gates) <= set(map(str, files("tests")))
        assert f"python3 -m tests.run {' '.join(gates)}" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


class TestArchive:
    def test_holds_the_pack_and_nothing_else(self):
        found = shipped()
        assert {path.parts[0] for path in found} == {
            "ARCHITECTURE.md",
            "CHANGELOG.md",
            "CONTRIBUTING.md",
            "LICENSE",
            "README.md",
            "__init__.py",
            "docs",
            "locales",
            "nodes",
            "pyproject.toml",
            "requirements.txt",
            "softrepa",
            "subgraphs",
            "workflows",
        }
        whole = {"docs", "locales", "nodes", "softrepa", "subgraphs", "workflows"}
        assert [path for path in found if path.parts[0] in whole] == files(*whole)

    def test_is_small(self):
        assert sum((ROOT / path).stat().st_size for path in shipped()) < 10_000_000


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built without network and outside the checkout, and the folder it is unpacked in."""
    source, built, installed = (tmp_path_factory.mktemp(name) for name in ("source", "built", "installed"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "softrepa", source / "softrepa", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    run = subprocess.run([*pip, "--wheel-dir", built, source], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    (path,) = built.iterdir()
    with zipfile.ZipFile(path) as archive:
        archive.extractall(installed)
    return path, installed


class TestWheel:
    def test_holds_softrepa_alone(self, wheel):
        path, installed = wheel
        assert path.name == f"comfyui_softrepa-{__version__}-py3-none-any.whl"
        packages = {entry.name for entry in installed.iterdir()}
        assert packages == {"softrepa", f"comfyui_softrepa-{__version__}.dist-info"}
        held = {file.relative_to(installed) for file in installed.glob("softrepa/**/*.*")}
        assert held == set(files("softrepa"))

    def run(self, installed, code, *arguments):
        """Runs in a Python where ComfyUI, Pillow and the like are not installed, from another folder."""
        missing = f"import sys; sys.modules.update(dict.fromkeys({NOT_INSTALLED}))\n"
        environment = WITHOUT_COMFYUI | {"PYTHONPATH": str(installed), "PYTHONIOENCODING": "utf-8"}
        command = [sys.executable, "-P", "-c", missing + code, *map(str, arguments)]
        return subprocess.run(
            command, cwd=installed.parent, env=environment, capture_output=True, text=True, check=False
        )

    def command_line(self, installed, *arguments):
        code = "import runpy; runpy.run_module('softrepa', run_name='__main__', alter_sys=True)"
        return self.run(installed, code, *arguments)

    def test_imports_with_torch_and_safetensors_alone(self, wheel):
        code = "import softrepa.tokens, softrepa.token_files; print(softrepa.__file__, softrepa.__version__)"
        run = self.run(wheel[1], code)
        assert run.returncode == 0, run.stderr
        assert run.stdout.split() == [str(wheel[1] / "softrepa" / "__init__.py"), __version__]

    def test_inspect(self, wheel, tmp_path):
        path = tmp_path / "tokens.safetensors"
        token_files.save(SoftTokens.of(torch.ones(4, 768), "sd15", ("down",)), path)
        run = self.command_line(wheel[1], "inspect", path)
        assert run.returncode == 0, run.stderr
        assert "sd15" in run.stdout

    def test_training_says_what_it_needs(self, wheel, tmp_path):
        (tmp_path / "config.json").write_text("{}", encoding="utf-8")
        run = self.command_line(wheel[1], "train", tmp_path / "config.json")
        assert run.returncode == 1
        expected = 'error: comfyui is "not given", expected the folder of a ComfyUI installation.'
        assert run.stderr.splitlines()[-1] == expected
        assert "Traceback" not in run.stderr
