"""Imports in the package run only downward."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

import gpt

ROOT = Path(gpt.__file__).parent
FLOORS = [
    "config", "files", "device", "speed", "cpp_library", "kernels", "training_kernels",
    "triton_kernels", "model", "data", "tensors",
    "migrations", "checkpoint", "generation", "interop", "evaluation", "training", "console",
    "terminal", "server", "commands", "cli", "__main__",
]  # fmt: skip


def floor_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


@functools.cache
def imports_of(path: Path) -> frozenset[str]:
    """The modules of the package that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "gpt":
            if node.module == "gpt":
                names.update(f"gpt.{alias.name}" for alias in node.names)
            else:
                names.add(node.module)
        elif isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names if alias.name.startswith("gpt."))
    return frozenset(names)


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_only_from_its_own_floor_and_those_below(path):
    home = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if home == "__init__":
        return  # gpt/__init__.py names the public interface, and imports it at first use
    allowed = FLOORS[: FLOORS.index(home) + 1]
    used = {floor_of(name) for name in imports_of(path)}
    assert used <= set(allowed), f"{home} must not import {sorted(used - set(allowed))}"


@functools.cache
def reached_from(module: str) -> frozenset[str]:
    """The modules that importing ``module`` imports, transitively."""
    reached, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        path = ROOT.parent / Path(*name.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if name not in reached and path.exists():
            reached.add(name)
            waiting += imports_of(path) if name != "gpt" else []
    return frozenset(reached)


@pytest.mark.parametrize("floor", ["generation", "interop", "evaluation", "terminal", "cli"])
def test_training_does_not_reach_what_the_loop_is_given(floor):
    for path in (ROOT / "training").glob("*.py"):
        reached = reached_from(f"gpt.training.{path.stem}")
        assert floor not in {floor_of(name) for name in reached}, path.name


def test_the_model_needs_torch_alone():
    for path in (ROOT / "model").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                top = name.split(".")[0]
                assert top in {"torch", "gpt"} or top in sys.stdlib_module_names


@pytest.mark.parametrize("module", ["gpt", "gpt.config", "gpt.cli"])
def test_configuration_and_command_line_do_not_load_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_is_importable():
    assert all(getattr(gpt, name) is not None for name in gpt.__all__)
    assert set(gpt.__all__) <= set(dir(gpt))
