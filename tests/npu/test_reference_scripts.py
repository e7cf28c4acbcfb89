"""Scripts as other projects publish them run unchanged: the examples of the reference page of npu_grouped_matmul.

That page describes a release in which ``group_type`` was -1 by default; torch_npu 2.13 requires it.
"""

from __future__ import annotations

import runpy
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from moe_npu import sim
from moe_npu.sim import compat, launcher
from tests.helpers.assertions import assert_close

pytestmark = [pytest.mark.npu, pytest.mark.usefixtures("npu")]
SCRIPTS = Path(__file__).with_name("scripts")
EXAMPLES = ["grouped_matmul_single_operator.py", "grouped_matmul_graph_mode.py"]
WARNING = "without group_type"


@pytest.fixture
def _compat(monkeypatch: pytest.MonkeyPatch, npu: torch.device) -> Iterator[None]:
    import torch_npu

    monkeypatch.setattr(compat, "_warned", False)
    original = torch_npu.npu_grouped_matmul
    compat.install()
    yield
    torch_npu.npu_grouped_matmul = original


def assert_products(y: list[Tensor], x: list[Tensor], weight: list[Tensor], bias: list[Tensor] | None = None) -> None:
    assert len(y) == len(x) == len(weight)
    for i, (left, right) in enumerate(zip(x, weight, strict=True)):
        expected = left.cpu().double() @ right.cpu().double()
        if bias is not None:
            expected += bias[i].cpu().double()
        assert y[i].dtype == torch.float16
        assert_close(y[i].cpu(), expected, reduction=left.size(1))


@pytest.mark.usefixtures("_compat")
def test_single_operator_mode() -> None:
    with pytest.warns(UserWarning, match=WARNING) as said, sim.trace() as trace:
        values = runpy.run_path(str(SCRIPTS / EXAMPLES[0]), run_name="__main__")
    assert len(said) == 1
    assert said[0].filename.endswith(EXAMPLES[0])
    assert trace.names.count("aclnnGroupedMatmulV5") == 1  # through torch_npu's own adapter
    assert_products(values["npu_out"], values["x"], values["weight"], values["bias"])


@pytest.mark.usefixtures("_compat")
def test_graph_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates what it uses itself
        import torchair  # noqa: F401

    calls: list[tuple[Any, Any]] = []
    torch_compile = torch.compile

    def recording_compile(model: Any, **options: Any) -> Any:
        compiled = torch_compile(model, **options)

        def call(*inputs: Any) -> Any:
            calls.append((inputs, compiled(*inputs)))
            return calls[-1][1]

        return call

    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", recording_compile)
    with pytest.warns(UserWarning, match=WARNING) as said, sim.trace() as trace:
        runpy.run_path(str(SCRIPTS / EXAMPLES[1]), run_name="__main__")
    assert len(said) == 1
    assert trace.names.count("aclnnGroupedMatmulV5") == 1
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    (((x, weight), y),) = calls
    assert_products(y, x, weight)


@pytest.mark.parametrize("compatible", [False, True], ids=["as-is", "compat"])
@pytest.mark.parametrize("script", EXAMPLES)
def test_on_the_command_line(script: str, compatible: bool) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / script)],
        env=launcher.environment(compat=compatible),
        capture_output=True,
        text=True,
        check=False,
    )
    if compatible:
        assert done.returncode == 0, done.stderr
        assert done.stderr.count(WARNING) == 1
    else:
        assert done.returncode == 1
        wanted = "Requires manual passing group_type" if script == EXAMPLES[0] else "group_type only supports -1, 0"
        assert wanted in done.stderr
        assert WARNING not in done.stderr
    assert not done.stdout


@pytest.mark.usefixtures("_compat")
class TestGroupType:
    """When the default of earlier releases applies."""

    @staticmethod
    def inputs() -> tuple[list[Tensor], list[Tensor]]:
        return [torch.randn(4, 8).half().npu()], [torch.randn(8, 16).half().npu()]

    def test_warns_once(self) -> None:
        import torch_npu

        with pytest.warns(UserWarning, match=WARNING):
            torch_npu.npu_grouped_matmul(*self.inputs())
        torch_npu.npu_grouped_matmul(*self.inputs())  # a second warning would be an error

    @pytest.mark.parametrize("group_list", [{}, {"group_list": None}], ids=["omitted", "none"])
    def test_omitted_means_minus_one(self, group_list: dict[str, Any]) -> None:
        import torch_npu

        x, weight = self.inputs()
        with pytest.warns(UserWarning, match=WARNING):
            y = torch_npu.npu_grouped_matmul(x, weight, **group_list)
        assert_products(y, x, weight)

    def test_given_is_left_alone(self) -> None:
        import torch_npu

        x, weight = self.inputs()
        assert_products(torch_npu.npu_grouped_matmul(x, weight, group_type=-1), x, weight)
        with pytest.raises(RuntimeError, match="Requires manual passing group_type"):
            torch_npu.npu_grouped_matmul(x, weight, group_type=None)
        with pytest.raises(RuntimeError, match=r"must be -1, 0 or 2, but now is \[1\]"):
            torch_npu.npu_grouped_matmul(x, weight, group_type=1)

    def test_a_list_of_lengths_needs_none(self) -> None:
        import torch_npu

        x, weight = self.inputs()
        (y,) = torch_npu.npu_grouped_matmul(x, weight, group_list=[4], split_item=3)
        assert_products([y], x, weight)

    def test_overloads_and_dispatcher_are_those_of_torch_npu(self) -> None:
        import torch_npu

        operator = torch.ops.npu.npu_grouped_matmul
        assert torch_npu.npu_grouped_matmul.default is operator.default
        assert torch_npu.npu_grouped_matmul.List is operator.List
        with pytest.raises(RuntimeError, match="Requires manual passing group_type"):
            operator(*self.inputs())


def test_without_it_the_error_is_that_of_torch_npu() -> None:
    import torch_npu

    assert torch_npu.npu_grouped_matmul is torch.ops.npu.npu_grouped_matmul
    with pytest.raises(RuntimeError, match="Requires manual passing group_type"):
        torch_npu.npu_grouped_matmul(*TestGroupType.inputs())


@pytest.mark.parametrize(("value", "is_requested"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_the_variable(value: str | None, is_requested: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(compat.VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(compat.VARIABLE, value)
    assert compat.is_requested() == is_requested
