"""The rules of `npu_moe_init_routing_v2`, partly shared by `npu_moe_init_routing_quant` (spec: routing 2.2, 2.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_npu.ops._errors import as_dtype, reject, require, require_device, require_dtype
from moe_npu.ops._groups import COUNTS

NO_QUANT, STATIC, DYNAMIC = -1, 0, 1

_V2 = "npu_moe_init_routing_v2"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_QUANT_MODES = (-1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 16, 17, 14, 15)
_MAX_EXPERTS = 10240
_INT4 = 285  # torch_npu's number for a dtype that PyTorch does not have


def resolve_range(expert_num: int, active_expert_range: Sequence[int]) -> tuple[int, int, int]:
    """Number of experts, first and end of the active ones.

    A missing ``expert_num`` is the end of the range, the lowest number that fits; torch_npu has no default for it.
    """
    if len(active_expert_range) not in (0, 2):
        reject(
            f"{_V2}: active_expert_range is None or invalid. must be int[2] or empty, "
            f"but is {list(active_expert_range)}"
        )
    if not active_expert_range:
        require(expert_num != -1, f"{_V2}: expert_num or active_expert_range must be given, but both are missing")
        start, end = 0, int(expert_num)
    else:
        start, end = (int(bound) for bound in active_expert_range)
    if end <= start:
        reject(f"{_V2}: active_expert_range is invalid. must be increasing, but is {[start, end]}")
    if start < 0 or end > _MAX_EXPERTS:
        reject(f"{_V2}: active_expert_range must be within [0, {_MAX_EXPERTS}], but is {[start, end]}")
    experts = end if expert_num == -1 else int(expert_num)
    if end > experts:
        reject(f"{_V2}: active_expert_range must not end past expert_num {experts}, but is {[start, end]}")
    return experts, start, end


def check_v2(
    x: torch.Tensor,
    expert_idx: torch.Tensor,
    scale: torch.Tensor | None,
    offset: torch.Tensor | None,
    *,
    expert_capacity: int,
    expert_num: int,
    drop_pad_mode: int,
    expert_tokens_num_type: int,
    expert_tokens_num_flag: bool,
    quant_mode: int,
    active_expert_range: tuple[int, int],
    row_idx_type: int,
    x_dtype: torch.dtype | int | None,
) -> None:
    """Every rule of the second generation but those of the range itself."""
    check_tensors(_V2, x, expert_idx, (*_FLOATS, torch.int8))
    if drop_pad_mode not in (0, 1):
        reject(f"{_V2}: drop_pad_mode is None or invalid. must be in [0, 1], but is {drop_pad_mode}")
    if expert_tokens_num_type not in (0, 1, 2):
        reject(
            f"{_V2}: expert_tokens_num_type is None or invalid. must be in [0, 1, 2], but is {expert_tokens_num_type}"
        )
    if row_idx_type not in (0, 1):
        reject(f"{_V2}: row_idx_type is None or invalid. must be in [0, 1], but is {row_idx_type}")
    _check_quant_mode(x, quant_mode, x_dtype)
    start, end = active_expert_range
    check_scale(_V2, x, scale, offset, quant_mode, end - start)
    if drop_pad_mode == 1:
        check_capacity(_V2, expert_capacity, x.size(0))
        require(
            (start, end) == (0, expert_num), f"{_V2}: active_expert_range must be [0, expert_num] with drop_pad_mode 1"
        )
        require(row_idx_type == 0, f"{_V2}: row_idx_type must be 0 with drop_pad_mode 1")
        require(
            not expert_tokens_num_flag or expert_tokens_num_type == COUNTS,
            f"{_V2}: expert_tokens_num_type must be 1 with drop_pad_mode 1",
        )


def _check_quant_mode(x: torch.Tensor, quant_mode: int, x_dtype: torch.dtype | int | None) -> None:
    if quant_mode not in _QUANT_MODES:
        reject(f"{_V2}: quant_mode is None or invalid. must be in {list(_QUANT_MODES)}, but is {quant_mode}")
    require(
        not (quant_mode == DYNAMIC and x_dtype == _INT4),
        f"{_V2}: INT4 dynamic quantization uses quant_mode=13. quant_mode=1 only supports INT8 dynamic quantization",
    )
    if quant_mode not in (NO_QUANT, STATIC, DYNAMIC):
        reject(f"{_V2}: quant_mode {quant_mode} exists on devices of generation 950 only; supported are -1, 0 and 1")
    if x_dtype is not None and as_dtype(_V2, "x_dtype", x_dtype) != x.dtype:
        reject(f"{_V2}: x_dtype must be None or the number of the dtype of x, but is {x_dtype}")


def check_tensors(op: str, x: torch.Tensor, expert_idx: torch.Tensor, dtypes: Sequence[torch.dtype] = _FLOATS) -> None:
    """The rules of ``x [N, H]`` and ``expert_idx [N, K]``."""
    require_device(op, "expert_idx", expert_idx, x)
    if x.dim() != 2:
        reject(f"{op}: the x shape support only 2d, but is {tuple(x.shape)}")
    require_dtype(op, "x", x, dtypes)
    if expert_idx.dim() != 2:
        reject(f"{op}: the expert_idx shape support only 2d, but is {tuple(expert_idx.shape)}")
    require_dtype(op, "expert_idx", expert_idx, (torch.int32,))
    if x.size(0) != expert_idx.size(0):
        reject(
            f"{op}: the first dim of expert_idx and x should be the same, "
            f"but they are {expert_idx.size(0)} and {x.size(0)}"
        )


def check_scale(
    op: str,
    x: torch.Tensor,
    scale: torch.Tensor | None,
    offset: torch.Tensor | None,
    quant_mode: int,
    num_experts: int,
) -> None:
    """The rules of ``scale`` and ``offset`` for ``num_experts`` active experts."""
    require_device(op, "scale", scale, x)
    require_device(op, "offset", offset, x)
    if quant_mode != NO_QUANT and x.dtype == torch.int8:
        reject(f"{op}: x must not be int8 with quant_mode {quant_mode}, it is quantized already")
    if x.size(0) == 0:
        return  # nothing is read then, and callers pass scales of any shape
    if scale is not None:
        require_dtype(op, "scale", scale, (torch.float32,))
    if quant_mode == STATIC:
        if scale is None or offset is None:
            reject(f"{op}: scale and offset must be given with quant_mode 0")
        require_dtype(op, "offset", offset, (torch.float32,))
        for name, tensor in (("scale", scale), ("offset", offset)):
            if tensor.shape != (1,):
                reject(f"{op}: the shape of {name} should be 1 with quant_mode 0, but is {tuple(tensor.shape)}")
        return
    if offset is not None:
        reject(f"{op}: offset must be None with quant_mode {quant_mode}")
    if scale is None:
        return
    if quant_mode == NO_QUANT:
        if scale.shape != (x.size(0),):
            reject(
                f"{op}: the scale shape support only 1D in no quant mode, one value for each of {x.size(0)} rows, "
                f"but is {tuple(scale.shape)}"
            )
    elif not (scale.dim() == 2 and scale.size(0) in (num_experts, 1) and scale.size(1) == x.size(1)):
        reject(
            f"{op}: the scale shape support only 2D in dynamic quant mode, {(num_experts, x.size(1))} or "
            f"{(1, x.size(1))}, but is {tuple(scale.shape)}"
        )


def check_capacity(op: str, expert_capacity: int, num_tokens: int) -> None:
    """The rule of ``expert_capacity`` in drop/pad mode; without tokens there is nothing to compare it with."""
    if expert_capacity <= 0 or (expert_capacity > num_tokens and num_tokens != 0):
        reject(
            f"{op}: expert_capacity must be between 1 and the number of rows {num_tokens} with drop_pad_mode 1, "
            f"but is {expert_capacity}"
        )
