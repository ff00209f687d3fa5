"""The import rules of docs/design.md, by reading the sources and by importing in a fresh interpreter."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("actors", "common", "deploy", "learner", "replay_server")
OURS = {
    "common": {"common"},
    "actors": {"actors", "common"},
    "replay_server": {"replay_server", "common"},
    "learner": {"learner", "common"},
    "deploy": set(PACKAGES),
}
OTHERS = {
    "common": {"numpy", "msgpack", "lz4", "xxhash", "torch"},
    "actors": {"numpy", "torch", "gymnasium", "ale_py"},
    "replay_server": {"numpy", "lz4", "msgpack", "xxhash"},
    "learner": {"numpy", "torch", "safetensors", "msgpack", "lz4", "numba", "llvmlite"},
    "deploy": {
        "numpy",
        "torch",
        "gymnasium",
        "ale_py",
        "ray",
        "tyro",
        "rich",
        "tensorboard",
        "matplotlib",
        "psutil",
        "av",
        "jinja2",
        "msgpack",
    },
}
TORCH_IN_COMMON = {"layers.py", "networks.py", "params.py", "value_rescaling.py"}


def imported_roots(path):
    """Every top-level module that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_the_design_allows(package):
    for path in sorted((ROOT / package).rglob("*.py")):
        for root in imported_roots(path):
            if root in PACKAGES:
                assert root in OURS[package], f"{path} imports {root}"
            elif root not in sys.stdlib_module_names:
                assert root in OTHERS[package], f"{path} imports {root}"
            if root == "torch" and package == "common":
                assert path.name in TORCH_IN_COMMON, f"{path} imports torch"


def test_init_files_are_empty_and_no_module_shadows_the_standard_library():
    for package in PACKAGES:
        assert (ROOT / package / "__init__.py").read_text() == ""
        names = {path.stem for path in (ROOT / package).rglob("*.py")} - {"__init__"}
        assert not names & set(sys.stdlib_module_names)
        assert not names & {"utils", "helpers", "misc"}


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("replay_server.shard", ("torch", "ray", "gymnasium", "ale_py", "numba")),
        ("deploy.supervisor", ("torch",)),  # The driver stays light.
        ("deploy.roles", ("torch", "gymnasium")),
        ("common.wire", ("torch", "ray")),
        ("learner.learner", ("ray", "gymnasium")),
        ("actors.actor", ("ray",)),
    ],
)
def test_importing_a_light_module_brings_in_nothing_heavy(module, forbidden):
    code = f"import sys, {module}; print(*[m for m in {forbidden!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == []


def test_no_class_carries_a_ray_decorator():
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            assert "@ray.remote" not in path.read_text(), path


def test_nothing_unpickles_and_nothing_kills_by_name():
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            roots = set(imported_roots(path))
            assert not roots & {"pickle", "cloudpickle", "dill", "shelve", "marshal"}, path
            assert "torch.load(" not in path.read_text(), path
