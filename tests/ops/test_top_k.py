"""The stable top-k of the CPU kernels against a stable sort."""

from __future__ import annotations

import pytest
import torch

from moe_npu.ops._top_k import stable_top_k


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1, 2, 8, 65])
def test_equals_a_stable_sort(size: int, dtype: torch.dtype) -> None:
    values = torch.randn(3, 40, size).to(dtype)
    values[1] = values[1].round()
    values[2, :, ::3] = -0.0
    values[2, :, 1::3] = 0.0
    for row, special in enumerate((torch.nan, -torch.nan, torch.inf, -torch.inf)):
        values[0, row, ::2] = special
    ordered, order = torch.sort(values, dim=-1, descending=True, stable=True)
    for k in {0, 1, size // 2, size}:
        best, index = stable_top_k(values, k)
        assert torch.equal(index, order[..., :k])
        assert torch.equal(best.nan_to_num(nan=7.0), ordered[..., :k].nan_to_num(nan=7.0))


def test_no_rows() -> None:
    assert [tuple(tensor.shape) for tensor in stable_top_k(torch.randn(0, 5), 2)] == [(0, 2), (0, 2)]
