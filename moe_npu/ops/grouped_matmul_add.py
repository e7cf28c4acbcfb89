"""`npu_grouped_matmul_add`: weight gradients of all experts, added to where they are accumulated.

    input[g] += x[rows of g].T @ weight[rows of g]

in float32 throughout, in place. Spec: grouped matmul 3.8.
"""

from __future__ import annotations

import torch

from moe_npu.ops._errors import reject, require, require_dim, require_no_gradient
from moe_npu.ops._fused_matmul import check_group_list, require_tensor
from moe_npu.ops._groups import CUMSUM, row_groups
from moe_npu.ops._library import register_op
from moe_npu.ops._numerics import dense
from moe_npu.ops._signature import typed

_HALVES = (torch.float16, torch.bfloat16)


def _check(
    op: str,
    input: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    group_list: torch.Tensor,
    transpose_x: bool,
    transpose_weight: bool,
    group_type: int,
    group_list_type: int | None,
) -> None:
    if group_type != 2:
        reject(f"{op}: group_type only supports 2, but got {group_type}")
    require(transpose_x, f"{op}: transpose_x must be True: x is [T, M] and is transposed by the operator")
    require(not transpose_weight, f"{op}: transpose_weight must be False")
    if group_list_type not in (None, CUMSUM):
        reject(f"{op}: group_list_type must be 0, group_list holds cumulative sums, but is {group_list_type}")
    require_tensor(op, "x", x, _HALVES, ("T", "M"), x)
    require_tensor(op, "weight", weight, (x.dtype,), (x.size(0), "N"), x)
    require_dim(op, "group_list", group_list, (1,))
    groups, m, n = group_list.size(0), x.size(1), weight.size(1)
    check_group_list(op, group_list, groups, x)
    require_dim(op, "input", input, (2, 3))
    if input.dim() == 2:
        require_tensor(op, "input", input, (torch.float32,), (groups * m, n), x)
    else:
        require_tensor(op, "input", input, (torch.float32,), (groups, m, n), x)
    # The operator exists to accumulate gradients inside a backward pass, where autograd does not record. A recorded
    # accumulation would tie the accumulator to the graphs of all steps, which is never wanted: refused, not supported.
    for name, tensor in (("input", input), ("x", x), ("weight", weight)):
        require_no_gradient(op, name, tensor)


def _accumulate(op: str, input: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, group_list: torch.Tensor) -> None:
    groups = row_groups(op, group_list, CUMSUM, x.size(0))  # all are checked before any is written
    target = input.unflatten(0, (group_list.size(0), x.size(1))) if input.dim() == 2 else input
    for group, start, end in groups:
        target[group].add_(torch.mm(x[start:end].t().float(), weight[start:end].float()))


def _accumulate_cpu(input: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, group_list: torch.Tensor) -> None:
    _accumulate("npu_grouped_matmul_add_", input, x, weight, group_list)


def _accumulate_npu(input: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, group_list: torch.Tensor) -> None:
    if x.numel() == 0 or weight.numel() == 0:
        return
    target = dense(input)  # the kernel writes to contiguous memory
    torch.ops.npu.npu_grouped_matmul_add_(target, dense(x), dense(weight), group_list)
    if not input.is_contiguous():
        input.copy_(target)


def _accumulate_fake(input: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, group_list: torch.Tensor) -> None:
    pass


def _add_cpu(input: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, group_list: torch.Tensor) -> torch.Tensor:
    _accumulate("npu_grouped_matmul_add", input, x, weight, group_list)
    return input.clone(memory_format=torch.contiguous_format)


def _add_npu(input: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, group_list: torch.Tensor) -> torch.Tensor:
    # what torch_npu's own out-of-place form does; its schema hides that input changes, which a graph must see
    _accumulate_npu(input, x, weight, group_list)
    return input.clone(memory_format=torch.contiguous_format)


def _add_fake(input: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, group_list: torch.Tensor) -> torch.Tensor:
    return input.new_empty(input.shape)


# not lowered: in a functional graph, a call that writes to its input hides from tables of decompositions
_accumulate_op = register_op(
    "npu_grouped_matmul_add_(Tensor(a!) input, Tensor x, Tensor weight, Tensor group_list) -> ()",
    cpu=_accumulate_cpu,
    npu=_accumulate_npu,
    fake=_accumulate_fake,
    is_lowered=False,
)
_add_op = register_op(
    "npu_grouped_matmul_add(Tensor(a!) input, Tensor x, Tensor weight, Tensor group_list) -> Tensor",
    cpu=_add_cpu,
    npu=_add_npu,
    fake=_add_fake,
    is_lowered=False,
)


@typed
def npu_grouped_matmul_add_(
    input: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    group_list: torch.Tensor,
    *,
    transpose_x: bool = True,
    transpose_weight: bool = False,
    group_type: int = 2,
    group_list_type: int | None = 0,
) -> torch.Tensor:
    """Add ``x.T @ weight`` over the rows of each group to that group's slice of ``input``, in place.

    With x the input of the experts and ``weight`` the gradient of their result this accumulates the gradients of the
    experts' weights. Call it without autograd, as in a backward pass: no argument may require a gradient.

    Args:
        input: ``[G, M, N]`` or ``[G * M, N]`` float32; changed.
        x: ``[T, M]``, float16 or bfloat16, the rows of group 0 first.
        weight: ``[T, N]``, dtype of x.
        group_list: ``[G]`` int64, cumulative row counts. A group without rows leaves its slice as it is, and rows
            beyond the last entry do not count.
        transpose_x: must be True: x is not transposed yet.
        transpose_weight: must be False.
        group_type: must be 2.
        group_list_type: must be 0.

    Returns:
        ``input``.

    Raises:
        OperatorError: shapes, dtypes, devices or modes as above do not hold, or an argument requires a gradient; on
            CPU also negative or decreasing cumulative sums, or more rows than there are. ``input`` is unchanged then.

    Example:
        >>> accumulated = torch.zeros(2, 1, 2)
        >>> x = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.bfloat16)
        >>> dy = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]], dtype=torch.bfloat16)
        >>> npu_grouped_matmul_add_(accumulated, x, dy, torch.tensor([1, 3])).flatten()
        tensor([1., 0., 2., 5.])
    """
    _check(
        "npu_grouped_matmul_add_",
        input,
        x,
        weight,
        group_list,
        transpose_x,
        transpose_weight,
        group_type,
        group_list_type,
    )
    _accumulate_op(input, x, weight, group_list)
    return input


@typed
def npu_grouped_matmul_add(
    input: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    group_list: torch.Tensor,
    *,
    transpose_x: bool = True,
    transpose_weight: bool = False,
    group_type: int = 2,
    group_list_type: int | None = 0,
) -> torch.Tensor:
    """:func:`npu_grouped_matmul_add_` and a copy of the result: ``input`` itself changes too, as in torch_npu.

    Args:
        input: ``[G, M, N]`` or ``[G * M, N]`` float32; changed.
        x: ``[T, M]``, float16 or bfloat16, the rows of group 0 first.
        weight: ``[T, N]``, dtype of x.
        group_list: ``[G]`` int64, cumulative row counts.
        transpose_x: must be True.
        transpose_weight: must be False.
        group_type: must be 2.
        group_list_type: must be 0.

    Returns:
        A contiguous copy of ``input`` as it is afterwards.

    Raises:
        OperatorError: as :func:`npu_grouped_matmul_add_`.

    Example:
        >>> ones = torch.ones(2, 1, dtype=torch.bfloat16)
        >>> accumulated = torch.ones(1, 1, 1)
        >>> npu_grouped_matmul_add(accumulated, ones, ones, torch.tensor([2])), accumulated
        (tensor([[[3.]]]), tensor([[[3.]]]))
    """
    _check(
        "npu_grouped_matmul_add",
        input,
        x,
        weight,
        group_list,
        transpose_x,
        transpose_weight,
        group_type,
        group_list_type,
    )
    return _add_op(input, x, weight, group_list)
