"""Storage formats: how a device lays out a tensor's memory (spec: grouped matmul 2.7, 0.9).

Shape, strides and values as seen from Python are the same in every format. On CPU a cast is a copy that remembers the
number of the format, as the device does with the *storage*: views, ``detach()`` and ``nn.Parameter`` of the same memory
have it too; ``clone()``, ``copy.deepcopy`` and ``torch.save`` lose it, and everything without one is ND.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from moe_npu.ops._errors import reject, require
from moe_npu.ops._library import register_op
from moe_npu.ops._signature import typed

ND, FRACTAL_NZ = 2, 29
_FORMATS = {
    0: "NCHW",
    1: "NHWC",
    ND: "ND",
    3: "NC1HWC0",
    4: "FRACTAL_Z",
    12: "NC1HWC0_C04",
    16: "HWCN",
    27: "NDHWC",
    FRACTAL_NZ: "FRACTAL_NZ",
    30: "NCDHW",
    32: "NDC1HWC0",
    33: "FRACTAL_Z_3D",
    35: "NC",
    47: "NCL",
}
_TAG = "_moe_npu_format"


def format_of(tensor: torch.Tensor) -> int:
    """The number of the format that the memory of ``tensor`` has; ND where nothing is known, as while compiling."""
    if torch.compiler.is_compiling():
        return ND
    if tensor.device.type in ("cpu", "meta") or isinstance(tensor, FakeTensor):
        try:
            return int(getattr(tensor.untyped_storage(), _TAG, ND))
        except (NotImplementedError, RuntimeError):  # without memory of its own, as inside functorch
            return ND
    return int(torch.ops.npu.get_npu_format(tensor))


def _remember(tensor: torch.Tensor, acl_format: int) -> None:
    if torch.compiler.is_compiling() or not (tensor.device.type in ("cpu", "meta") or isinstance(tensor, FakeTensor)):
        return
    setattr(tensor.untyped_storage(), _TAG, int(acl_format))


def _check(op: str, input: torch.Tensor, targets: dict[str, int | torch.Tensor | None]) -> int:
    """The number of the format that one of ``targets`` asks for."""
    given = [target for target in targets.values() if target is not None]
    require(len(given) == 1, f"{op}: needs a format, by one of {' and '.join(targets)}")
    (target,) = given
    if isinstance(target, torch.Tensor):
        target = format_of(target)
    if target not in _FORMATS:
        known = ", ".join(f"{number} {name}" for number, name in _FORMATS.items())
        reject(f"{op}: acl_format must be one of {known}, but is {target}")
    if target == FRACTAL_NZ and input.dim() < 2:
        reject(f"{op}: format FRACTAL_NZ needs at least 2 dimensions, but input has shape {tuple(input.shape)}")
    return int(target)


def _cpu(input: torch.Tensor, acl_format: int, customize_dtype: int | None, input_dtype: int | None) -> torch.Tensor:
    if input.numel() == 0:
        return _fake(input, acl_format, customize_dtype, input_dtype)
    # the memory between the first and the last element, gaps included: the strides stay, overlapping ones too
    length = 1 + sum((size - 1) * stride for size, stride in zip(input.shape, input.stride(), strict=True))
    return input.as_strided((length,), (1,)).clone().as_strided(input.shape, input.stride())


def _npu(input: torch.Tensor, acl_format: int, customize_dtype: int | None, input_dtype: int | None) -> torch.Tensor:
    result = torch.ops.npu.npu_format_cast(input, acl_format, customize_dtype=customize_dtype, input_dtype=input_dtype)
    # a tensor that has the format comes back itself, and a result must not be an argument
    return result.clone() if result is input else result


def _fake(input: torch.Tensor, acl_format: int, customize_dtype: int | None, input_dtype: int | None) -> torch.Tensor:
    return input.new_empty_strided(input.shape, input.stride())


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    pass


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
    return grad, None, None, None


def _cpu_(input: torch.Tensor, acl_format: int, customize_dtype: int | None, input_dtype: int | None) -> None:
    return


def _npu_(input: torch.Tensor, acl_format: int, customize_dtype: int | None, input_dtype: int | None) -> None:
    torch.ops.npu.npu_format_cast_.acl_format(
        input, acl_format, customize_dtype=customize_dtype, input_dtype=input_dtype
    )


_op = register_op(
    "npu_format_cast(Tensor input, int acl_format, int? customize_dtype, int? input_dtype) -> Tensor",
    cpu=_cpu,
    npu=_npu,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    differentiable=("input",),
    is_lowered=False,
)
_op_ = register_op(
    "npu_format_cast_(Tensor(a!) input, int acl_format, int? customize_dtype, int? input_dtype) -> ()",
    cpu=_cpu_,
    npu=_npu_,
    fake=_cpu_,
    is_lowered=False,
)


@typed
def npu_format_cast(
    input: torch.Tensor,
    acl_format: int | torch.Tensor | None = None,
    dst: torch.Tensor | None = None,
    *,
    customize_dtype: torch.dtype | int | None = None,
    input_dtype: torch.dtype | int | None = None,
) -> torch.Tensor:
    """A copy of ``input`` in another storage format: the same shape, strides, dtype and values.

    Done once to weights that are loaded: matmuls read FRACTAL_NZ (29) faster, and give the same results.
    Differentiable.

    Args:
        input: any tensor; at least two dimensions for FRACTAL_NZ.
        acl_format: 0 NCHW, 1 NHWC, 2 ND, 3 NC1HWC0, 4 FRACTAL_Z, 27 NDHWC, 29 FRACTAL_NZ, 30 NCDHW and the rarer
            12, 16, 32, 33, 35 and 47; or a tensor that has the wanted format.
        dst: that tensor by its own name, instead of ``acl_format``.
        customize_dtype: for containers of narrower types; without effect on CPU.
        input_dtype: as ``customize_dtype``.

    Returns:
        A fresh tensor, on a device ``input`` itself if it has the format; :func:`get_npu_format` tells its format.

    Raises:
        OperatorError: no format, an unknown one, or FRACTAL_NZ for a vector.

    Example:
        >>> weight = npu_format_cast(torch.ones(2, 3), 29)
        >>> get_npu_format(weight), get_npu_format(torch.ones(2, 3))
        (29, 2)
    """
    target = _check("npu_format_cast", input, {"acl_format": acl_format, "dst": dst})
    if input.device.type not in ("cpu", "meta") and format_of(input) == target:
        return input  # as torch_npu does; a copy could lose the format
    result = _op(input, target, customize_dtype, input_dtype)
    _remember(result, target)
    return result


@typed
def npu_format_cast_(
    input: torch.Tensor,
    src: int | torch.Tensor | None = None,
    acl_format: int | None = None,
    *,
    customize_dtype: torch.dtype | int | None = None,
    input_dtype: torch.dtype | int | None = None,
) -> torch.Tensor:
    """Change the storage format of ``input`` in place; see :func:`npu_format_cast`.

    Args:
        input: any tensor; its values, shape and strides stay.
        src: a tensor that has the wanted format, or the number of the format.
        acl_format: the number of the format by its own name, instead of ``src``.
        customize_dtype: for containers of narrower types; without effect on CPU.
        input_dtype: as ``customize_dtype``.

    Returns:
        ``input``.

    Raises:
        OperatorError: as :func:`npu_format_cast`.

    Example:
        >>> weight = torch.ones(2, 3)
        >>> get_npu_format(npu_format_cast_(weight, 29)), get_npu_format(weight)
        (29, 29)
    """
    target = _check("npu_format_cast_", input, {"src": src, "acl_format": acl_format})
    # the values do not change, and neither does their gradient
    with torch.no_grad() if input.requires_grad else contextlib.nullcontext():
        _op_(input, target, customize_dtype, input_dtype)
    _remember(input, target)
    return input


@typed
def get_npu_format(input: torch.Tensor) -> int:
    """The number of the storage format of ``input``; 2 (ND) for a tensor on CPU that was never cast.

    Not tracked in compiled code, where it is 2.

    Args:
        input: any tensor.

    Returns:
        See ``acl_format`` of :func:`npu_format_cast`.

    Example:
        >>> get_npu_format(torch.ones(2))
        2
    """
    return format_of(input)
