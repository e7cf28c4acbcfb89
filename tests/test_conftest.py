"""The memory that the library allocates in tests is filled with values that give an unwritten element away."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from moe_npu import ops

ALLOCATIONS = {
    "empty": "torch.empty(4, 3, dtype=dtype)",
    "empty-like": "torch.empty_like(torch.zeros(4, 3), dtype=dtype)",
    "new-empty": "torch.zeros(2).new_empty(4, 3, dtype=dtype)",
}
over_allocations = pytest.mark.parametrize("expression", ALLOCATIONS.values(), ids=ALLOCATIONS.keys())


def _allocate(expression: str, module: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The value of ``expression`` as if it stood in ``module``."""
    return eval(expression, {"torch": torch, "__name__": module, "dtype": dtype})


@over_allocations
@pytest.mark.parametrize("module", ["moe_npu", "moe_npu.ops.grouped_mm"])
def test_the_library_gets_poisoned_memory(expression: str, module: str) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert _allocate(expression, module, dtype).isnan().all()
    for dtype in (torch.int8, torch.int32, torch.int64):
        assert (_allocate(expression, module, dtype) == torch.iinfo(dtype).min).all()
    assert (_allocate(expression, module, torch.uint8) == 0xA5).all()
    assert _allocate(expression, module, torch.bool).all()


@over_allocations
@pytest.mark.parametrize("module", ["torch.nn", "moe_npu_other", "tests.ops"])
def test_nobody_else_does(expression: str, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "fill_", lambda *_: pytest.fail("filled"))
    _allocate(expression, module)


def test_fake_and_meta_tensors_stay_as_they_are() -> None:
    with FakeTensorMode():
        assert isinstance(_allocate("torch.empty(3)", "moe_npu.ops"), FakeTensor)
        y = ops.grouped_mm(torch.zeros(3, 2), torch.zeros(1, 2, 4), torch.zeros(1, dtype=torch.int64))
    assert isinstance(y, FakeTensor)
    assert _allocate("torch.empty(3, device='meta')", "moe_npu.ops").is_meta


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_still_allocates(backend: str) -> None:
    namespace: dict[str, Any] = {"torch": torch, "__name__": "moe_npu.ops"}
    exec("def allocate(x):\n    return torch.empty(3), x.new_empty(3), torch.empty_like(x)", namespace)
    compiled = torch.compile(namespace["allocate"], backend=backend, fullgraph=True)
    assert [tensor.shape for tensor in compiled(torch.zeros(3))] == [(3,)] * 3


def test_a_kernel_that_forgets_rows_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, counts = torch.ones(4, 2), torch.ones(2, 2, 3), torch.tensor([2, 2])
    assert torch.equal(ops.grouped_mm(x, weight, counts), torch.full((4, 3), 2.0))
    module = importlib.import_module("moe_npu.ops.grouped_mm")  # the package's attribute is the function
    multiply = module.matmul_into

    def forget_last_row(out: torch.Tensor, x: torch.Tensor, *rest: Any) -> None:
        multiply(out[:-1], x[:-1], *rest)

    monkeypatch.setattr(module, "matmul_into", forget_last_row)
    assert ops.grouped_mm(x, weight, counts).isnan().any(1).tolist() == [False, True, False, True]
