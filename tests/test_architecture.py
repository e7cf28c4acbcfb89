"""The rules of the package as code: what may import what, and what is public."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from pathlib import Path

import pytest

import moe_npu

ROOT = Path(moe_npu.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
LAYERING = {
    "ops": set(),
    "quant": {"ops"},
    "layers": {"ops", "quant"},
    "demo": {"ops", "quant", "layers"},
    "sim": {"ops"},
}
# transformers is imported by those who use it only
USES_TRANSFORMERS = ("layers/hf", "demo/")
# siblings that know nothing of each other, only of these
ISLANDS = {
    "quant/schemes": set(),
    "quant/formats": set(),
    "layers/families": {"moe_npu.layers.families.base"},
    "layers/routers": {"moe_npu.layers.routers.base"},
    "layers/dispatch": {"moe_npu.layers.dispatch.base"},
}


def imported(file: Path) -> set[str]:
    """Every module that a file imports, at its top or inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
class TestImports:
    def test_layers_import_downwards_only(self, file: Path) -> None:
        part = file.relative_to(ROOT).parts[0]
        if part not in LAYERING:
            return
        for name in imported(file):
            pieces = name.split(".")
            if pieces[0] == "moe_npu" and len(pieces) > 1 and pieces[1] in LAYERING:
                assert pieces[1] in LAYERING[part] | {part}, f"{part} must not import {name}"

    def test_torch_npu_is_imported_by_the_simulator_only(self, file: Path) -> None:
        if file.relative_to(ROOT).parts[0] != "sim":
            assert not any(name.split(".")[0] == "torch_npu" for name in imported(file))

    def test_transformers_is_imported_where_it_is_extended_only(self, file: Path) -> None:
        name = file.relative_to(ROOT).as_posix()
        if not name.startswith(USES_TRANSFORMERS):
            assert not any(module.split(".")[0] == "transformers" for module in imported(file))

    def test_siblings_do_not_know_each_other(self, file: Path) -> None:
        folder = file.parent.relative_to(ROOT).as_posix()
        if folder not in ISLANDS or file.name == "__init__.py":
            return
        own = "moe_npu." + folder.replace("/", ".")
        for name in imported(file):
            if name.startswith(own):
                assert any(name.startswith(base) for base in ISLANDS[folder]), f"{file.name} must not import {name}"

    def test_torch_library_is_used_in_one_place(self, file: Path) -> None:
        # the simulator does not define operators, it replaces the device's kernels of others
        if file.name != "_library.py" and file.relative_to(ROOT).as_posix() != "sim/aten.py":
            assert "torch.library" not in file.read_text()

    def test_files_are_short(self, file: Path) -> None:
        assert len(file.read_text().splitlines()) <= 600


@pytest.mark.parametrize(
    "module", ["moe_npu", *(f"moe_npu.{info.name}" for info in pkgutil.iter_modules([str(ROOT)]) if info.ispkg)]
)
def test_public_names_are_sorted_and_exist(module: str) -> None:
    package = importlib.import_module(module)
    assert sorted(package.__all__) == sorted(set(package.__all__))
    for name in package.__all__:
        assert getattr(package, name).__doc__, f"{module}.{name} has no docstring"


def test_every_file_says_what_it_is_for() -> None:
    for file in FILES:
        assert ast.get_docstring(ast.parse(file.read_text())), f"{file} has no docstring"
