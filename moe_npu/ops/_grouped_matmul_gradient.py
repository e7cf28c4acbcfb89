"""Gradients of `npu_grouped_matmul` with float weights, each a composition of our own differentiable operators.

    dx = dy @ weight.T,   dweight = x.T @ dy,   dbias = the sum of the rows of dy          for each group

(Spec: grouped matmul 4.) Every function takes contiguous gradients ``dy`` and returns those of x, weight and bias as
lists, None where not asked for; the one of bias is asked for by its dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_npu.ops._groups import COUNTS
from moe_npu.ops._numerics import is_transposed
from moe_npu.ops.grouped_mm import bias_gradient, grouped_mm, grouped_mm_gradients, grouped_mm_weight_grad

_Tensors = Sequence[torch.Tensor]
_Gradients = tuple[_Tensors | None, _Tensors | None, _Tensors | None]


def _times_transposed(dy: _Tensors, weight: _Tensors, counts: torch.Tensor | None) -> list[torch.Tensor]:
    """Each ``dy[i] @ weight[i].T``; with ``counts`` the rows of one dy in groups."""
    # a device wants all weights transposed or none: views with gaps among contiguous weights are copied
    transposed = [(tensor if is_transposed(tensor) else tensor.contiguous()).mT for tensor in weight]
    split_item, group_type = (0, -1) if counts is None else (3, 0)
    modes = (split_item, group_type, COUNTS, 0, None, None)
    return torch.ops.moe_npu.npu_grouped_matmul.default(list(dy), transposed, *[None] * 5, counts, None, *modes)


def k_split_gradients(
    x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor, dy: torch.Tensor, needs_dx: bool, needs_dweight: bool
) -> _Gradients:
    """Group type 2: ``y[g] = x[:, g] @ weight[g]``, the weight gradient of a `grouped_mm` whose rows are K here."""
    dx = [grouped_mm(weight, dy.mT, counts).t()] if needs_dx else None
    dweight = [grouped_mm(x.t().contiguous(), dy, counts)] if needs_dweight else None
    return dx, dweight, None


def row_gradients(
    x: torch.Tensor,
    weight: _Tensors,
    counts: torch.Tensor,
    dy: torch.Tensor,
    needs_dx: bool,
    needs_dweight: bool,
    bias_dtype: torch.dtype | None,
) -> _Gradients:
    """The rows of one x in groups, one result."""
    if weight[0].dim() == 3:
        gradients = grouped_mm_gradients(x, weight[0], counts, dy, needs_dx, needs_dweight, bias_dtype)
        dx, dweight, dbias = (None if gradient is None else [gradient] for gradient in gradients)
        return dx, dweight, dbias
    rows = weights = biases = None
    if needs_dx:
        rows = _times_transposed([dy], weight, counts)
    if needs_dweight:
        weights = grouped_mm_weight_grad(x, dy, counts).unbind()
    if bias_dtype is not None:
        biases = bias_gradient(dy, counts, bias_dtype).unbind()
    return rows, weights, biases


def pair_gradients(
    x: _Tensors,
    weight: _Tensors,
    dy: _Tensors,
    bounds: list[tuple[int, int]] | None,
    needs_dx: bool,
    needs_dweight: bool,
    bias_dtype: torch.dtype | None,
) -> _Gradients:
    """Each weight with an x of its own, or with the rows ``bounds`` of the one x; one result each or in all."""
    rows = x if bounds is None else [x[0][start:end] for start, end in bounds]
    if len(dy) < len(rows):
        dy = dy[0].split([tensor.size(0) for tensor in rows])
    dx: _Tensors | None = None
    if needs_dx:
        dx = _times_transposed(dy, weight, None)
        if bounds is not None:
            rest = x[0].new_zeros(x[0].size(0) - bounds[-1][1], x[0].size(1))
            dx = [torch.cat([*dx, rest])]
    pairs = [(a.reshape(-1, a.size(-1)), b.reshape(-1, b.size(-1))) for a, b in zip(rows, dy, strict=True)]
    dweight = dbias = None
    if needs_dweight:
        dweight = [
            grouped_mm_weight_grad(a, b, torch.full((1,), a.size(0), dtype=torch.int64, device=a.device)).squeeze(0)
            for a, b in pairs
        ]
    if bias_dtype is not None:
        sum_dtype = torch.promote_types(bias_dtype, torch.float32)
        dbias = [grad.sum(0, dtype=sum_dtype).to(bias_dtype) for _, grad in pairs]
    return dx, dweight, dbias
