"""Programs under `moe-npu sim`: what they see, what is refused, and how the libraries are built."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_npu.sim import SimulatorError, build, installation, launcher

HAS_TORCH_NPU = importlib.util.find_spec("torch_npu") is not None
on_device = [pytest.mark.npu, pytest.mark.usefixtures("npu")]


def plain_environment() -> dict[str, str]:
    """The environment of somebody who does not know of the simulator."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("MOE_NPU_SIM", "TORCH_"))}
    folders = [f for f in os.environ.get("PYTHONPATH", "").split(os.pathsep) if f and not f.endswith("sim/site")]
    return {**variables, "PYTHONPATH": os.pathsep.join(folders)}


def sim(*arguments: str, folder: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moe_npu.sim", *arguments],
        cwd=folder,
        env={**plain_environment(), **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def script(folder: Path, text: str) -> str:
    path = folder / "program.py"
    path.write_text(text)
    return str(path)


class TestRefusals:
    def test_a_program_is_needed(self) -> None:
        done = sim()
        assert done.returncode == 2
        assert "name a program to run, e.g. moe-npu sim script.py" in done.stderr

    def test_cann_is_not_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "libascendcl.so").touch()
        done = sim("-c", "print(1)", LD_LIBRARY_PATH=str(tmp_path))
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"moe-npu: CANN is installed here ({tmp_path}/libascendcl.so)")
        assert "--force" in done.stderr

    @pytest.mark.skipif(HAS_TORCH_NPU, reason="torch_npu is installed")
    def test_torch_npu_is_needed(self) -> None:
        done = sim("-c", "print(1)")
        assert (done.returncode, done.stdout) == (2, "")
        assert "torch_npu is not installed; pip install --no-deps torch-npu==2.13.0" in done.stderr
        done = sim("--check")
        assert done.returncode == 1
        assert "NO  torch_npu" in done.stdout
        assert "not run" in done.stdout

    def test_a_compiler_is_needed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CXX", "no-such-compiler")
        with pytest.raises(SimulatorError, match="no-such-compiler is not installed; apt-get install g"):
            installation.compiler()

    def test_other_platforms(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(installation.platform, "system", lambda: "Darwin")
        with pytest.raises(SimulatorError, match="needs Linux on x86-64 or aarch64, not Darwin"):
            installation.require_platform()

    def test_a_compiler_that_fails_leaves_no_library(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        if not HAS_TORCH_NPU:
            pytest.skip("torch_npu is not installed")
        compiler = tmp_path / "c++"
        compiler.write_text("#!/bin/sh\necho 'out of registers' >&2; exit 1\n")
        compiler.chmod(0o755)
        monkeypatch.setenv("CXX", str(compiler))
        monkeypatch.setenv("MOE_NPU_SIM_CACHE", str(tmp_path / "cache"))
        with pytest.raises(SimulatorError, match="out of registers"):
            build.build()
        assert list((tmp_path / "cache").iterdir()) == []

    def test_a_cache_that_cannot_be_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        if not HAS_TORCH_NPU:
            pytest.skip("torch_npu is not installed")
        (tmp_path / "file").touch()
        monkeypatch.setenv("MOE_NPU_SIM_CACHE", str(tmp_path / "file"))
        with pytest.raises(SimulatorError, match=r"cannot keep libraries in .*; set MOE_NPU_SIM_CACHE"):
            build.build()

    def test_libraries_that_others_could_have_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        if not HAS_TORCH_NPU:
            pytest.skip("torch_npu is not installed")
        folder = build.build()
        monkeypatch.setenv("MOE_NPU_SIM_CACHE", str(tmp_path))
        (tmp_path / folder.name).mkdir()
        (tmp_path / folder.name).chmod(0o777)
        with pytest.raises(SimulatorError, match="others may write to it"):
            build.build()


class TestPrograms:
    pytestmark = on_device

    def test_a_script_with_arguments(self, tmp_path: Path) -> None:
        program = script(
            tmp_path,
            "import sys, torch, torch_npu\n"
            "x = torch.arange(6., device='npu')\n"
            "print(sys.argv[1:], __name__, x.sum().item(), torch.npu.get_device_name(), torch.npu.device_count())\n"
            "sys.exit(3)\n",
        )
        done = sim("--devices", "2", program, "--check", "-x", "a b")
        assert done.stdout == "['--check', '-x', 'a b'] __main__ 15.0 Ascend910B1 2\n"
        assert done.returncode == 3

    @pytest.mark.parametrize("first", ["torch", "torch_npu", "moe_npu", "transformers"])
    def test_whatever_is_imported_first(self, first: str) -> None:
        done = sim("-c", f"import {first}, torch; print(torch.ones(2, device='npu').sum().item())")
        assert done.stdout == "2.0\n", done.stderr

    def test_modules_and_child_processes(self, tmp_path: Path) -> None:
        script(
            tmp_path,
            "import subprocess, sys\n"
            "code = 'import torch; print(torch.ones(3, device=\"npu\").sum().item())'\n"
            "print(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout)\n",
        )
        assert sim("-m", "program", folder=tmp_path).stdout == "3.0\n\n"

    def test_torch_npu_without_the_simulator_says_what_is_missing(self) -> None:
        code = "import moe_npu, torch; print(torch.ones(2).sum().item()); import torch_npu"
        done = subprocess.run(
            [sys.executable, "-c", code], env=plain_environment(), capture_output=True, text=True, check=False
        )
        assert done.stdout == "2.0\n"
        assert "ImportError: libhccl.so" in done.stderr

    @pytest.mark.parametrize("how", ["option", "variable"])
    def test_cann_is_replaced_by_force(self, how: str, tmp_path: Path) -> None:
        (tmp_path / "libascendcl.so").touch()
        options, variables = (["--force"], {}) if how == "option" else ([], {"MOE_NPU_SIM_FORCE": "1"})
        variables["LD_LIBRARY_PATH"] = str(tmp_path)
        done = sim(*options, "-c", "import torch; print(torch.ones(1, device='npu').item())", **variables)
        assert done.stdout == "1.0\n", done.stderr
        assert sim(*options, "--check", **variables).returncode == 0

    def test_check(self) -> None:
        done = sim("--check")
        assert done.returncode == 0, done.stdout
        assert "smoke test" in done.stdout
        assert "passed on Ascend910B1" in done.stdout

    def test_two_processes_build_at_once(self, tmp_path: Path) -> None:
        command = [sys.executable, "-m", "moe_npu.sim", "-c", "import torch; print(torch.ones(1, device='npu').item())"]
        # and the sources give no warnings
        variables = {
            **plain_environment(),
            "MOE_NPU_SIM_CACHE": str(tmp_path),
            "CXX": f"{os.environ.get('CXX', 'g++')} -Wall -Wextra -Werror",
        }
        running = [subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        assert [process.communicate(timeout=300)[0] for process in running] == ["1.0\n", "1.0\n"]
        assert len(list(tmp_path.iterdir())) == 1  # one version, no scratch folder

    def test_the_environment_of_child_processes(self) -> None:
        variables = launcher.environment(devices=4, compat=True)
        assert variables["PYTHONPATH"].split(os.pathsep)[0].endswith("site")
        assert (variables["MOE_NPU_SIM_DEVICES"], variables["MOE_NPU_SIM_COMPAT"]) == ("4", "1")
        assert "TORCH_DEVICE_BACKEND_AUTOLOAD" not in variables
