"""The command line as a user meets it: help, tables, and errors in one sentence with exit code 2."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from moe_npu import cli
from tests.quant.test_convert import qwen


class Result(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def moe_npu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """The command in this process, as a shell would see it."""
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments: object, cwd: Path | None = None) -> Result:
        monkeypatch.setattr(sys, "argv", ["moe-npu", *map(str, arguments)])
        if cwd is not None:
            monkeypatch.chdir(cwd)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return Result(int(stop.value.code or 0), captured.out, captured.err)

    return run


def test_installed_command() -> None:
    result = subprocess.run([Path(sys.executable).with_name("moe-npu"), "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    assert "quantize" in result.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "model"
    qwen().to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_help_lists_the_commands(moe_npu: Callable[..., Result]) -> None:
    result = moe_npu("--help")
    assert result.returncode == 0
    for command in ("demo", "quantize", "inspect", "report"):
        assert command in result.stdout


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("demo", ["--steps", "--out", "--seed", "--device", "Python standard library"]),
        ("quantize", ["SRC", "DST", "--scheme", "w4a16", "w8a8", "--group-size", "from_pretrained"]),
        ("inspect", ["SRC", "experts"]),
        ("report", ["CONFIG", "--implementation", "--accelerate", "no weights are needed"]),
    ],
)
def test_help_of_a_command_says_what_it_takes(moe_npu: Callable[..., Result], command: str, words: list[str]) -> None:
    result = moe_npu(command, "--help")
    assert result.returncode == 0
    for word in words:
        assert word in " ".join(result.stdout.split())


def test_quantize_then_inspect(moe_npu: Callable[..., Result], source: Path, tmp_path: Path) -> None:
    result = moe_npu("quantize", source, tmp_path / "w4a16", "--scheme", "w4a16", "--group-size", 32)
    assert result.returncode == 0, result.stderr
    assert "24 tensors quantized, 21 copied" in result.stdout
    assert "SNR" in result.stdout
    result = moe_npu("inspect", tmp_path / "w4a16")
    assert result.returncode == 0, result.stderr
    assert "quantized by moe_npu to w4a16, group_size 32" in result.stdout
    assert "model.layers.*.mlp.experts.*.down_proj.weight_scale" in result.stdout


class TestReport:
    def test_of_a_folder_without_weights(self, moe_npu: Callable[..., Result], source: Path, tmp_path: Path) -> None:
        shutil.copy(source / "config.json", tmp_path)
        result = moe_npu("report", tmp_path)
        assert result.returncode == 0, result.stderr
        assert "Qwen3MoeForCausalLM: moe_npu computes 2 of 2 MoE layers" in result.stdout
        assert "model.layers.{0,1}.mlp.experts" in result.stdout
        result = moe_npu("report", tmp_path / "config.json", "--implementation", "eager")
        assert "computes 0 of 2" in result.stdout and "experts_implementation is 'eager'" in result.stdout

    def test_of_a_quantized_checkpoint(self, moe_npu: Callable[..., Result], source: Path, tmp_path: Path) -> None:
        moe_npu("quantize", source, tmp_path / "w8a8", "--scheme", "w8a8")
        result = moe_npu("report", tmp_path / "w8a8")
        assert result.returncode == 0, result.stderr
        assert "computes 2 of 2" in result.stdout
        assert result.stdout.splitlines()[3].split()[-1] == "w8a8"

    def test_accelerate_shows_adapters(self, moe_npu: Callable[..., Result], tmp_path: Path) -> None:
        config = {"model_type": "jetmoe", "num_hidden_layers": 2, "architectures": ["JetMoeForCausalLM"]}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert "moe_npu.accelerate(model) puts an adapter" in moe_npu("report", tmp_path).stdout
        assert "GroupedJetMoeMoA" in moe_npu("report", tmp_path, "--accelerate").stdout

    def test_code_of_a_checkpoint_is_not_run(self, moe_npu: Callable[..., Result], tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "new", "auto_map": {"AutoConfig": "evil.C"}}))
        (tmp_path / "evil.py").write_text("raise SystemExit('executed')")
        result = moe_npu("report", tmp_path)
        assert result.returncode == 2
        assert "no model_type 'new', and code that comes with a checkpoint is not run" in result.stderr

    @pytest.mark.parametrize(
        ("entries", "message"),
        [
            ({"num_experts": "x"}, "transformers cannot build this: StrictDataclass"),
            (
                {"hidden_size": -4},
                "transformers cannot build this: RuntimeError: Trying to create tensor with negative",
            ),
            ({"hidden_act": "warp"}, "transformers cannot build this: KeyError: 'warp'"),
            ({"num_attention_heads": 0}, "transformers cannot build this: ZeroDivisionError"),
            ({"dtype": "warp"}, "transformers cannot build this: AttributeError"),
            ({"architectures": ["BertModel"]}, "transformers cannot build this: AttributeError"),
            ({"quantization_config": 3}, "quantization_config must be an object, but is 3"),
            ({"quantization_config": {"quant_method": "warp"}}, "transformers cannot build this: ValueError: Unknown"),
            ({"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 1000 for a report, but is 1e+09"),
            ({"text_config": {"n_layer": 1001}}, "n_layer must be at most 1000 for a report, but is 1001"),
            ({"depths": [2, 10**9]}, "depths must be at most 1000 for a report, but is 1e+09"),
            ({"num_labels": 10**9}, "num_labels must be at most 1000000 for a report, but is 1e+09"),
        ],
        ids=str,
    )
    def test_hostile_configs(
        self, moe_npu: Callable[..., Result], source: Path, tmp_path: Path, entries: dict[str, object], message: str
    ) -> None:
        config = json.loads((source / "config.json").read_text()) | entries
        (tmp_path / "config.json").write_text(json.dumps(config))
        result = moe_npu("report", tmp_path)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith(f"moe-npu: {tmp_path}: {message}")
        assert result.stderr.count("\n") == 1

    def test_models_of_too_many_modules(
        self, moe_npu: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("moe_npu.layers.hf_config._MAX_MODULES", 1000)
        config = {"model_type": "switch_transformers", "num_layers": 2, "num_sparse_encoder_layers": 2}
        (tmp_path / "config.json").write_text(json.dumps(config | {"num_experts": 10_000}))
        result = moe_npu("report", tmp_path)
        assert result.returncode == 2
        assert "it has more than 1000 modules, the limit of a report" in result.stderr
        torch.nn.Sequential(*(torch.nn.Identity() for _ in range(1001)))  # others are not limited


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
        pytest.param(["report", "nowhere"], "nowhere is neither a folder with config.json", id="report"),
        pytest.param(["report", "{source}/model.safetensors"], "is not valid JSON", id="report-weights"),
        pytest.param(["report", "{source}", "--implementation", "warp"], "warp", id="report-implementation"),
        pytest.param(["demo", "--out", "{source}"], "is not the folder of a demo run", id="demo-out"),
        pytest.param(["demo", "--out", "x", "--device", "warp"], "warp", id="demo-device"),
        pytest.param(["demo", "--steps", "0"], "--steps", id="demo-steps"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(
    moe_npu: Callable[..., Result], source: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = moe_npu(*[argument.format(source=source) for argument in arguments], cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())
