"""What a trace records, and the launch budget that the benchmark script prints."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from moe_npu import sim
from moe_npu.sim.trace import Region

BENCHMARK = Path(__file__).parents[2] / "examples" / "benchmarks" / "launches.py"

requires_device = [pytest.mark.npu, pytest.mark.usefixtures("npu")]


@pytest.mark.skipif(sim.is_active(), reason="there is a simulated device")
def test_without_a_device() -> None:
    with (
        pytest.raises(sim.SimulatorError, match="there is no simulated device in this process; use moe-npu sim"),
        sim.trace(),
    ):
        pass


class TestTrace:
    pytestmark = requires_device

    def test_kernels_of_torch_npu(self) -> None:
        x = torch.randn(4, 16, device="npu", dtype=torch.bfloat16)
        with sim.trace() as record:
            y = torch.ops.npu.npu_swiglu(x, -1)
        assert record.launches == [
            sim.Launch("aclnnSwiGlu", (Region(x.data_ptr(), 128),), (Region(y.data_ptr(), 64),)),
        ]
        assert (record.num_launches, record.bytes_read, record.bytes_written) == (1, 128, 64)
        assert (record.num_synchronizations, record.num_copies_to_host, record.num_copies_to_device) == (0, 0, 0)
        assert "aclnnSwiGlu" in str(record)

    def test_operators_of_torch(self) -> None:
        x, y = torch.ones(3, 4, device="npu"), torch.ones(4, device="npu")
        with sim.trace() as record:
            x.add_(y.expand(3, 4))  # the broadcast row is read once
            x.view(12).t()  # no launch
            torch._foreach_mul_([x, y], 2)
            torch.sum(x, 0, out=torch.empty(4, device="npu"))
        assert record.names == ["aten.add_.Tensor", "aten._foreach_mul_.Scalar", "aten.sum.IntList_out"]
        assert [launch.bytes_read for launch in record.launches] == [48 + 16, 48 + 16, 48 + 16]
        assert [launch.bytes_written for launch in record.launches] == [48, 48 + 16, 16]

    def test_copies(self) -> None:
        with sim.trace() as record:
            x = torch.ones(256).to("npu")
            y = torch.empty_like(x)
            y.copy_(x)
            y.cpu()
        assert (record.num_copies_to_device, record.bytes_to_device) == (1, 1024)
        assert (record.num_copies_to_host, record.bytes_to_host) == (1, 1024)
        (launch,) = record.launches
        assert launch.name == "aclnnInplaceCopy"
        assert (launch.reads, launch.writes) == ((Region(x.data_ptr(), 1024),), (Region(y.data_ptr(), 1024),))

    @pytest.mark.parametrize(
        "wait",
        [
            lambda x: x.sum().item(),
            lambda x: bool((x > 0).all()),
            lambda x: x.nonzero(),
            lambda x: x[x > 0],
            lambda x: x.equal(x),
            lambda x: torch.npu.synchronize(),
            lambda x: torch.unique(x),
        ],
        ids=["item", "bool", "nonzero", "mask", "equal", "synchronize", "unique"],
    )
    def test_the_host_waits(self, wait: Any) -> None:
        x = torch.ones(4, device="npu")
        with sim.trace() as record:
            wait(x)
        assert record.num_synchronizations > 0

    def test_nothing_is_recorded_outside(self) -> None:
        x = torch.ones(4, device="npu")
        with sim.trace() as outer:
            with sim.trace() as inner:
                x + 1
            x * 2
        x - 1
        assert inner.names == ["aten.add.Tensor"]
        assert outer.names == ["aten.add.Tensor", "aten.mul.Tensor"]

    def test_backward_runs_in_another_thread(self) -> None:
        x = torch.ones(4, device="npu", requires_grad=True)
        with sim.trace() as record:
            (x * 2).backward(torch.ones(4, device="npu"))
        assert "aten.mul.Tensor" in record.names[1:]


@pytest.fixture(scope="module")
def launches() -> ModuleType:
    spec = importlib.util.spec_from_file_location("launches", BENCHMARK)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows(launches: ModuleType) -> dict[str, Any]:
    sizes = launches.Sizes(num_experts=8, hidden_size=64, intermediate_size=32, top_k=2)
    return {row.name: row for row in launches.measure_all(sizes, num_tokens=16)}


class TestLaunchBudget:
    pytestmark = requires_device

    @pytest.mark.parametrize("name", ["moe_npu bf16", "moe_npu w8a8", "moe_npu w4a16"])
    def test_ours(self, rows: dict[str, Any], launches: ModuleType, name: str) -> None:
        forward = rows[name].forward
        assert forward.num_launches <= 7 + 1  # seven from the router's logits on
        assert (forward.num_synchronizations, launches.copied(forward, rows[name].weights)) == (0, 0)

    @pytest.mark.parametrize("name", ["moe_npu bf16", "hf moe_npu"])
    def test_ours_in_training(self, rows: dict[str, Any], launches: ModuleType, name: str) -> None:
        training = rows[name].training
        assert (training.num_synchronizations, launches.copied(training, rows[name].weights)) == (0, 0)

    @pytest.mark.parametrize("other", ["hf grouped_mm", "hf eager", "npu patch"])
    def test_others(self, rows: dict[str, Any], other: str) -> None:
        assert {"moe_npu bf16", "hf moe_npu"} <= rows.keys()
        for name in ("moe_npu bf16", "hf moe_npu"):
            for phase in ("forward", "training"):
                ours, theirs = getattr(rows[name], phase), getattr(rows[other], phase)
                assert ours.num_launches < theirs.num_launches
                assert ours.bytes_read + ours.bytes_written < theirs.bytes_read + theirs.bytes_written

    def test_copies_of_weights_are_seen(self, rows: dict[str, Any], launches: ModuleType) -> None:
        row = rows["npu patch"]
        assert launches.copied(row.forward, row.weights) == 3 * 8 * 64 * 32 * 2
