"""Every example that a reader meets runs: README blocks, docstrings, and the pages of docs/."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
import sys
from pathlib import Path

import pytest
import torch
import typer

import moe_npu
from moe_npu import cli, ops, sim
from tests.quant.test_convert import qwen

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
README = BLOCK.findall((ROOT / "README.md").read_text())
PYTHON = [text for language, text in README if language == "python"]
SHELL = [text for language, text in README if language == "bash"]
COMMANDS = typer.main.get_command(cli.app).commands
MODULES = [info.name for info in pkgutil.walk_packages(moe_npu.__path__, "moe_npu.") if info.name != "moe_npu.cli"]


@pytest.mark.parametrize("module", MODULES)
def test_doctests(module: str) -> None:
    torch.manual_seed(0)
    result = doctest.testmod(importlib.import_module(module), extraglobs={"torch": torch})
    assert result.failed == 0


def test_there_are_doctests() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = [test for module in MODULES for test in finder.find(importlib.import_module(module)) if test.examples]
    assert len(found) > 15


def test_readme_has_only_blocks_that_are_tested() -> None:
    assert {language for language, _ in README} == {"python", "bash"}
    assert PYTHON
    assert SHELL


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_block_of_readme(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(PYTHON[number], f"README.md block {number}", "exec"), {"__name__": "readme"})


PAGES = sorted((ROOT / "docs").rglob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_blocks_of_a_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page.stem == "simulated_npu" and not sim.is_active():
        pytest.skip("needs the simulated device, hence torch_npu: pip install --no-deps torch-npu==2.13.0")
    monkeypatch.chdir(tmp_path)
    blocks = BLOCK.findall(page.read_text())
    assert {language for language, _ in blocks} <= {"python", "text", "bash"}
    namespace = {"__name__": "page"}  # one, as a reader goes from top to bottom
    for number, (language, text) in enumerate(blocks):
        if language == "python":
            exec(compile(text, f"{page.name} block {number}", "exec"), namespace)


def test_every_operator_has_its_place_in_the_pages() -> None:
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "operators").glob("*.md"))
    for name in ops.__all__:
        if inspect.isfunction(getattr(ops, name)) and name not in ("npu_lowerings", "register_kernel"):
            assert re.search(rf"`{name}[`(]", pages), f"{name} is in no page of docs/operators"


def test_links_between_pages_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_shell_blocks_of_readme_name_commands_and_extras_that_exist() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    for line in "".join(SHELL).splitlines():
        for extras in re.findall(r"\[([\w,]+)\]", line):
            for extra in extras.split(","):
                assert re.search(rf"^{extra} = \[", pyproject, re.MULTILINE), f"no extra {extra}"
        for command in re.findall(r"moe-npu (\w+)", line):
            assert command in COMMANDS, f"no command {command}"
            options = {option for parameter in COMMANDS[command].params for option in parameter.opts}
            assert options.issuperset(re.findall(r"(--[\w-]+)", line.split("moe-npu", 1)[1]))


def test_the_commands_of_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """inspect and quantize as they stand there, on a small checkpoint at the path that they name."""
    monkeypatch.chdir(tmp_path)
    qwen().to(torch.bfloat16).save_pretrained("path/to/Qwen3-30B-A3B")
    lines = [line for line in "".join(SHELL).splitlines() if re.match(r"moe-npu (inspect|quantize)", line)]
    assert len(lines) == 2
    for line in lines:
        monkeypatch.setattr(sys, "argv", line.split())
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code
    assert Path("path/to/Qwen3-30B-A3B-w8a8/model.safetensors").is_file()


def test_quick_start_is_two_lines() -> None:
    assert len(SHELL[0].strip().splitlines()) == 2
