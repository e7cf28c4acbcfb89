"""The command line as a user meets it: help, tables, and errors in one sentence with exit code 2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.quant.test_convert import qwen


def moe_npu(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moe_npu.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=180,
        cwd=cwd,
        env={**os.environ, "COLUMNS": "120"},
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "model"
    qwen().to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_help_lists_the_commands() -> None:
    result = moe_npu("--help")
    assert result.returncode == 0
    for command in ("demo", "quantize", "inspect"):
        assert command in result.stdout


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("demo", ["--steps", "--out", "--seed", "--device", "Python standard library"]),
        ("quantize", ["SRC", "DST", "--scheme", "w4a16", "w8a8", "--group-size", "from_pretrained"]),
        ("inspect", ["SRC", "experts"]),
    ],
)
def test_help_of_a_command_says_what_it_takes(command: str, words: list[str]) -> None:
    result = moe_npu(command, "--help")
    assert result.returncode == 0
    for word in words:
        assert word in " ".join(result.stdout.split())


def test_quantize_then_inspect(source: Path, tmp_path: Path) -> None:
    result = moe_npu("quantize", source, tmp_path / "w4a16", "--scheme", "w4a16", "--group-size", 32)
    assert result.returncode == 0, result.stderr
    assert "24 tensors quantized, 21 copied" in result.stdout
    assert "SNR" in result.stdout
    result = moe_npu("inspect", tmp_path / "w4a16")
    assert result.returncode == 0, result.stderr
    assert "quantized by moe_npu to w4a16, group_size 32" in result.stdout
    assert "model.layers.*.mlp.experts.*.down_proj.weight_scale" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["quantize", "nowhere", "dst", "--scheme", "w8a8"], "nowhere is not a folder", id="no-source"),
        pytest.param(["quantize", "{source}", "{source}", "--scheme", "w8a8"], "exists already", id="destination"),
        pytest.param(["quantize", "{source}", "dst", "--scheme", "w3"], "w3", id="scheme"),
        pytest.param(["quantize", "{source}", "dst"], "--scheme", id="scheme-missing"),
        pytest.param(
            ["quantize", "{source}", "dst", "--scheme", "w8a8", "--group-size", "64"], "group_size", id="option"
        ),
        pytest.param(["inspect", "nowhere"], "nowhere is not a folder", id="inspect"),
        pytest.param(["demo", "--out", "{source}"], "is not the folder of a demo run", id="demo-out"),
        pytest.param(["demo", "--out", "x", "--device", "warp"], "warp", id="demo-device"),
        pytest.param(["demo", "--steps", "0"], "--steps", id="demo-steps"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(
    source: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = moe_npu(*[argument.format(source=source) for argument in arguments], cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())
