"""The scripts of examples/ run as they stand there, at a reduced size, and their own figures are right."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(FOLDER.glob("*.py"))


@dataclass(frozen=True)
class Example:
    """Arguments that make a run short, files that it leaves, and what must be true of the text that it prints."""

    arguments: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    check: Callable[[str], None] = lambda text: None


def numbers(pattern: str, text: str) -> list[float]:
    """The groups of the one match of a pattern in the text."""
    matches = re.findall(pattern, text)
    assert len(matches) == 1, text
    groups = matches[0] if isinstance(matches[0], tuple) else (matches[0],)
    return [float(group) for group in groups]


def check_losses(text: str) -> None:
    assert numbers(r"largest difference of the losses over 8 steps: (\S+)", text)[0] < 1e-3
    first, last = (numbers(rf"(?m)^ +{step} +(\S+) +\S+$", text)[0] for step in (1, 8))
    assert last < first - 0.5


def check_answers(text: str) -> None:
    equal = re.findall(r"(\d+)/(\d+)$", text, re.MULTILINE)
    assert equal == [("5", "5")] * 3


def check_adapters(text: str) -> None:
    before = numbers(r"w4a16 +0 +\S+ MB +\S+ +(\S+)", text)[0]
    after = numbers(r"w4a16 \+ LoRA, on prose +[\d,]+ +\S+ MB +\S+ +(\S+)", text)[0]
    assert after < before - 0.05


def check_replay(text: str) -> None:
    without, replayed = numbers(r"(\S+) without replay, (\S+) with,", text)
    assert 0 < replayed < without / 1.5


def check_routers(text: str) -> None:
    entropy = {name: numbers(rf"(?m)^{name} +\S+ +\S+ +(\S+)", text)[0] for name in ("sigmoid", "sigmoid, bias update")}
    assert entropy["sigmoid, bias update"] > entropy["sigmoid"] + 0.1


EXAMPLES = {
    "decode_server": Example(
        ("--requests", "5", "--slots", "2", "--tokens", "8", "--prompt-length", "6", "--compile", "aot_eager"),
        check=check_answers,
    ),
    "finetune_trainer": Example(
        ("--steps", "8", "--batch-size", "4", "--sequence-length", "64", "--compare", "eager"),
        files=("loss.png",),
        check=check_losses,
    ),
    "layer_from_scratch": Example(),
    "lora_over_w4a16": Example(("--steps", "20", "--lora-steps", "30", "--batch-size", "4"), check=check_adapters),
    "quantize_checkpoint": Example(),
    "router_study": Example(("--steps", "40"), files=("routers.png",), check=check_routers),
    "routing_replay": Example(("--steps", "2", "--tokens", "12"), check=check_replay),
    "transformers_model": Example(),
}


def run(name: str, folder: Path, *options: str) -> None:
    """Run an example in an empty folder and check what it prints and leaves there."""
    example = EXAMPLES[name]
    result = subprocess.run(
        [sys.executable, FOLDER / f"{name}.py", *example.arguments, *options],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=300,
        env=os.environ | ({"OMP_NUM_THREADS": "1"} if "PYTEST_XDIST_WORKER" in os.environ else {}),
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout
    example.check(result.stdout)
    assert sorted(file.name for file in folder.iterdir()) == list(example.files)
    for file in example.files:
        assert (folder / file).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, tmp_path: Path) -> None:
    run(name, tmp_path)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_every_example_has_its_entry_and_its_help(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.stem in EXAMPLES
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"python examples/{script.name}" in text
    assert "--device" in text


def test_no_entry_is_without_its_example() -> None:
    assert {script.stem for script in SCRIPTS} == set(EXAMPLES)
