"""Which part of the pack may import what, at any depth of its code."""

import ast
from pathlib import Path

import pytest
from softrepa_tests.conftest import ROOT
from softrepa_tests.repository import files

COMFYUI = {
    "alembic_db",
    "api_server",
    "app",
    "comfy",
    "comfy_aimdo",
    "comfy_api",
    "comfy_api_nodes",
    "comfy_config",
    "comfy_execution",
    "comfy_extras",
    "comfy_kitchen",
    "comfyui_version",
    "execution",
    "folder_paths",
    "latent_preview",
    "main",
    "middleware",
    "node_helpers",
    "nodes",
    "protocol",
    "server",
    "utils",
}
"""Its top-level modules, and its own packages on the package index."""

FOR_COMFYUI = ("softrepa/comfy", "nodes")
STARTS_COMFYUI = Path("softrepa/comfy/startup.py")
"""Makes ComfyUI importable for the command line: its folder is only known when a command runs."""
COMMAND_LINE = Path("softrepa/__main__.py")
"""Stands above the method and ComfyUI's side, as the nodes do."""

NEVER = {
    "aiohttp": "network",
    "ftplib": "network",
    "http": "network",
    "httpx": "network",
    "huggingface_hub": "network",
    "requests": "network",
    "socket": "network",
    "urllib": "network",
    "urllib3": "network",
    "websocket": "network",
    "websockets": "network",
    "dill": "runs code of the files it reads",
    "joblib": "runs code of the files it reads",
    "marshal": "runs code of the files it reads",
    "pickle": "runs code of the files it reads",
    "shelve": "runs code of the files it reads",
    "matplotlib": "not in every ComfyUI",
    "pandas": "not in every ComfyUI",
    "torchaudio": "slow to import, broken in some installations",
    "torchvision": "slow to import, broken in some installations",
    "benchmarks": "not shipped",
    "tools": "not shipped",
    "tests": "not shipped",
    "softrepa_tests": "not shipped",
    "softrepa": "the pack's folder has any name: relative imports only",
    "comfyui_softrepa": "the pack's folder has any name: relative imports only",
}
DYNAMIC = {"__import__", "import_module", "exec", "eval"}
READS_WHOLE = {"read_bytes", "read_text", "safe_open", "load_file"}
JUDGES_WEIGHTS = Path("softrepa/evaluation/weights.py")
"""Reads gigabytes that the user names, with torch's reader that runs no code."""
READERS = {Path("softrepa/files.py"), Path("softrepa/smallworld/checkpoint.py"), JUDGES_WEIGHTS}
"""Who reads files as a whole: the function that bounds them, what reads a file of the pack itself, and the judges'."""
OPTIONAL_PACKAGES = Path("softrepa/training/optimizers.py")
"""Imports the optimizers that may be installed by the name that its table gives."""

SHIPPED = [path for path in files("*.py") if path.parts[0] in ("softrepa", "nodes", "__init__.py")]


def tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), str(path))


def foreign_imports(path: Path) -> set[str]:
    """Top-level names of the absolute imports, those inside functions too."""
    return foreign_imports_of(tree(path))


def foreign_imports_of(code: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(code):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.partition(".")[0])
    return found


def own_imports(path: Path) -> set[Path]:
    """Files and folders of the repository that the relative imports name."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            found |= {folder / alias.name for alias in node.names} | {folder}
    return found


def called(path: Path) -> set[str]:
    functions = [node.func for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    return {
        function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "") for function in functions
    }


def is_inside(path: Path, *folders: str) -> bool:
    return any(path.is_relative_to(folder) for folder in folders)


def test_the_lists_are_of_this_pack():
    assert {path.parts[0] for path in SHIPPED} == {"softrepa", "nodes", "__init__.py"}
    assert {COMMAND_LINE, STARTS_COMFYUI} <= set(SHIPPED)


@pytest.mark.parametrize("path", SHIPPED, ids=str)
def test_imports(path):
    found = foreign_imports(path)
    assert {name: NEVER[name] for name in found & NEVER.keys()} == {}
    if not is_inside(path, *FOR_COMFYUI):
        assert found & COMFYUI == set(), "only softrepa/comfy and nodes talk to ComfyUI"


@pytest.mark.parametrize("path", SHIPPED, ids=str)
def test_comfyui_is_imported_at_the_top(path):
    inside = [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef)]
    found = {name for function in inside for name in foreign_imports_of(function)} & COMFYUI
    assert bool(found) == (path == STARTS_COMFYUI)


@pytest.mark.parametrize("path", SHIPPED, ids=str)
def test_no_import_is_hidden(path):
    """Nothing runs text as code, or imports what no reader of its imports sees."""
    allowed = {"import_module"} if path == OPTIONAL_PACKAGES else set()
    assert called(path) & DYNAMIC <= allowed


@pytest.mark.parametrize("path", SHIPPED, ids=str)
def test_files_are_read_within_bounds(path):
    """By `softrepa.files`; torch's own reader makes whatever sizes a file asks for."""
    found = set() if path in READERS else called(path) & READS_WHOLE
    assert found == set()
    if path != JUDGES_WEIGHTS:
        assert "torch.load(" not in (ROOT / path).read_text(encoding="utf-8")


def test_weights_of_judges_are_read_without_running_code():
    calls = [node for node in ast.walk(tree(JUDGES_WEIGHTS)) if isinstance(node, ast.Call)]
    loads = [node for node in calls if getattr(node.func, "attr", "") == "load"]
    assert loads
    for node in loads:
        assert {"weights_only": True}.items() <= {
            one.arg: getattr(one.value, "value", None) for one in node.keywords
        }.items()


def test_the_method_knows_neither_nodes_nor_comfyui():
    """Data flows one way: nodes -> softrepa/comfy -> softrepa."""
    for path in SHIPPED:
        if is_inside(path, "softrepa"):
            assert not [one for one in own_imports(path) if is_inside(one, "nodes")], path
        if is_inside(path, "softrepa") and not is_inside(path, "softrepa/comfy") and path != COMMAND_LINE:
            assert not [one for one in own_imports(path) if is_inside(one, "softrepa/comfy")], path


def benchmark_imports(path: Path) -> set[Path]:
    """Files of benchmarks/ that a file of it imports."""
    named = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "benchmarks":
            module = Path(*node.module.split("."))
            named |= {module, *(module / alias.name for alias in node.names)}
    return {one.with_suffix(".py") for one in named}


def test_no_benchmark_imports_one_that_imports_it():
    paths = files("benchmarks/*.py", "benchmarks/smallworld/*.py")
    imports = {path: benchmark_imports(path) & set(paths) for path in paths}
    reached = {path: set(found) for path, found in imports.items()}
    for _ in paths:
        for found in reached.values():
            found |= {further for one in found for further in imports[one]}
    assert [str(path) for path, found in reached.items() if path in found] == []
