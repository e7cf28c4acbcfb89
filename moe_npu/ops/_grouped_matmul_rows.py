"""The dtypes that `npu_grouped_matmul` multiplies, one row per legal combination (spec: grouped matmul 1.7).

The table drives the checks and is what `python -m moe_npu.ops` prints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from moe_npu.ops._errors import dtype_name, reject, require
from moe_npu.ops._groups import COUNTS, CUMSUM, PAIRS

OP = "npu_grouped_matmul"

_F16, _BF16, _F32, _F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
_I8, _I32, _I64 = torch.int8, torch.int32, torch.int64

Tensors = Sequence[torch.Tensor]
Parameters = dict[str, list[torch.Tensor] | None]
# dtypes that an argument may have; None where it may, or must, be left out
Allowed = tuple[torch.dtype | None, ...]

# x, weight and result, each one tensor (s) or a list (m); k-split is group_type 2, smm takes host integers only
K_SPLIT = "k-split"
_ROWS_AND_PAIRS = ("sss", "sms", "mms", "mmm", "smm")
_NONE: Allowed = (None,)
_EITHER_LIST = (CUMSUM, COUNTS)
_ANY_LIST = (CUMSUM, COUNTS, PAIRS)

# argument of the operator -> column of the table
PARAMETERS = {
    "bias": "bias",
    "scale": "scale",
    "offset": "offset",
    "antiquant_scale": "antiquant",
    "antiquant_offset": "antiquant",
    "per_token_scale": "per_token_scale",
}


class Row(NamedTuple):
    """One legal combination; int32 x and weight are words of eight int4 values."""

    family: str
    x: torch.dtype
    weight: torch.dtype
    output_dtype: Allowed
    bias: Allowed = _NONE
    scale: Allowed = _NONE
    offset: Allowed = _NONE
    antiquant: Allowed = _NONE  # antiquant_scale and antiquant_offset
    per_token_scale: Allowed = _NONE
    scenarios: tuple[str, ...] = _ROWS_AND_PAIRS
    group_list_types: tuple[int, ...] = _EITHER_LIST
    takes_activation: bool = False
    takes_tiles: bool = False  # weight in the format FRACTAL_NZ

    @property
    def is_int4_product(self) -> bool:
        """Whether int4 weights meet integers: products of int4 digits, with scale words."""
        return self.weight == _I32 and not self.x.is_floating_point

    def takes(self, name: str, options: Allowed) -> bool:
        """Whether argument ``name`` may have one of the dtypes ``options``."""
        return any(option in getattr(self, PARAMETERS[name]) for option in options)

    def cells(self) -> tuple[str, ...]:
        """The row in words, one for each name in :data:`HEADER`."""
        results = tuple(dtype for dtype in self.output_dtype if dtype is not None)
        return (
            self.family,
            _operand_name(self.x),
            _operand_name(self.weight),
            *(_names(getattr(self, column)) for column in _COLUMNS),
            _names(results),
            ", ".join(self.scenarios),
            ", ".join(("cumsum", "counts", "pairs")[kind] for kind in self.group_list_types),
            "0, 1, 2, 4, 5" if self.takes_activation else "0",
            "ND, NZ" if self.takes_tiles else "ND",
        )


_COLUMNS = ("bias", "scale", "offset", "antiquant", "per_token_scale", "output_dtype")
HEADER = ("family", "x", "weight", *_COLUMNS, "y", "scenarios", "group_list", "act_type", "format")

_FLOAT = (*_ROWS_AND_PAIRS, K_SPLIT)
_ONE_X_AND_Y = ("sss", "sms")

ROWS = (
    Row("float", _F16, _F16, (None, _F16), (None, _F16), scenarios=_FLOAT, takes_tiles=True),
    Row("float", _BF16, _BF16, (None, _BF16), (None, _F32), scenarios=_FLOAT, takes_tiles=True),
    Row("float", _F32, _F32, (None, _F32), (None, _F32), scenarios=_FLOAT),
    Row("float, CPU only", _F64, _F64, (None, _F64), (None, _F64), scenarios=_FLOAT),
    Row("int8 result", _I8, _I8, (None, _I8), (None, _I32), (_I64,), group_list_types=_ANY_LIST),
    Row(
        *("static", _I8, _I8, (_BF16,), (None, _I32), (_BF16,)),
        group_list_types=_ANY_LIST,
        takes_activation=True,
        takes_tiles=True,
    ),
    Row(
        *("static", _I8, _I8, (_F16,), (None, _I32), (_F32,)),
        group_list_types=_ANY_LIST,
        takes_activation=True,
        takes_tiles=True,
    ),
    Row(
        *("per token", _I8, _I8, (_BF16,), (None, _I32, _BF16), (_BF16,)),
        per_token_scale=(_F32,),
        scenarios=_ONE_X_AND_Y,
        group_list_types=_ANY_LIST,
        takes_activation=True,
        takes_tiles=True,
    ),
    Row(
        *("per token", _I8, _I8, (_F16,), (None, _I32), (_F32,)),
        per_token_scale=(_F32,),
        scenarios=_ONE_X_AND_Y,
        group_list_types=_ANY_LIST,
        takes_activation=True,
        takes_tiles=True,
    ),
    Row("accumulators", _I8, _I8, (_I32,), (None, _I32), group_list_types=_ANY_LIST, takes_tiles=True),
    Row("A16W8", _F16, _I8, (None, _F16), (None, _F16), antiquant=(_F16,)),
    Row("A16W8", _BF16, _I8, (None, _BF16), (None, _F32), antiquant=(_BF16,)),
    Row("A16W4", _F16, _I32, (None, _F16), (None, _F16), antiquant=(_F16,)),
    Row("A16W4", _BF16, _I32, (None, _BF16), (None, _F32), antiquant=(_BF16,)),
    Row(
        *("A4W4", _I32, _I32, (_F16, _BF16), _NONE, (_I64,)),
        per_token_scale=(None, _F32),
        scenarios=("sss",),
        takes_tiles=True,
    ),
    Row(
        *("A8W4", _I8, _I32, (_F16, _BF16), (_F32,), (_I64,)),
        per_token_scale=(_F32,),
        scenarios=("sss",),
        group_list_types=(COUNTS,),
        takes_tiles=True,
    ),
    Row(
        *("A8W4 asymmetric", _I8, _I32, (_F16,), (_F32,), (_I64,)),
        offset=(_F32,),
        per_token_scale=(_F32,),
        scenarios=("sss",),
        group_list_types=(COUNTS,),
        takes_tiles=True,
    ),
)


def _operand_name(dtype: torch.dtype) -> str:
    return "int4" if dtype == _I32 else dtype_name(dtype)


def _names(dtypes: Allowed) -> str:
    return ", ".join("-" if dtype is None else dtype_name(dtype) for dtype in dtypes)


def first_dtype(tensors: Tensors | None) -> torch.dtype | None:
    """The dtype of a list of tensors, None where there is none."""
    return None if tensors is None else tensors[0].dtype


def check_dtypes(
    x: Tensors,
    weight: Tensors,
    parameters: Parameters,
    blank: torch.dtype | None,
    output_dtype: torch.dtype | None,
    act_type: int,
) -> Row:
    """The legal combination that the arguments are.

    Args:
        x: as the operator.
        weight: as the operator.
        parameters: the optional lists by name.
        blank: dtype of a per_token_scale without entries where there are no rows, which may count as given or not.
        output_dtype: as the operator.
        act_type: as the operator.

    Raises:
        OperatorError: they are none; the message lists those with the same x and weight.
    """
    named: Mapping[str, Tensors | None] = {"x": x, "weight": weight, **parameters}
    for name, tensors in named.items():
        for index, tensor in enumerate(tensors or ()):
            assert tensors is not None
            require(
                tensor.dtype == tensors[0].dtype,
                f"{OP}: all tensors of {name} must have one dtype, but {name}[{index}] is {dtype_name(tensor.dtype)} "
                f"and {name}[0] is {dtype_name(tensors[0].dtype)}",
            )
            require(
                tensor.device == x[0].device,
                f"{OP}: {name}[{index}] is on {tensor.device} but x[0] is on {x[0].device}",
            )
    candidates = [row for row in ROWS if (row.x, row.weight) == (x[0].dtype, weight[0].dtype)]
    if x[0].dtype == _F64 and x[0].device.type not in ("cpu", "meta"):
        candidates = []
    if not candidates:
        pairs = sorted({f"{dtype_name(row.x)} x {dtype_name(row.weight)}" for row in ROWS})
        reject(
            f"{OP}: x of {dtype_name(x[0].dtype)} with weight of {dtype_name(weight[0].dtype)} is not supported on "
            f"{x[0].device.type}; supported are {', '.join(pairs)} (int32 holds eight int4 each)"
        )
    given: dict[str, Allowed] = {name: (first_dtype(tensors),) for name, tensors in parameters.items()}
    if blank is not None:
        given["per_token_scale"] = (None, blank)
    if weight[0].dtype == _I8 and output_dtype == _I32:
        given["scale"] = (None,)  # ignored by the device; callers dequantize later
    bias = given.pop("bias")
    matching = [
        row
        for row in candidates
        if output_dtype in row.output_dtype and all(row.takes(name, options) for name, options in given.items())
    ]
    product = f"x {_operand_name(x[0].dtype)}, weight {_operand_name(weight[0].dtype)}"
    if not matching:
        words = ", ".join(f"{name} {_names(options)}" for name, options in given.items())
        legal = "; ".join(
            ", ".join(f"{name} {_names(getattr(row, column))}" for name, column in PARAMETERS.items() if name in given)
            + f", output_dtype {_names(row.output_dtype)}"
            for row in candidates
        )
        reject(
            f"{OP}: no kernel for {product}, {words}, output_dtype {_names((output_dtype,))}. "
            f"Legal with this x and weight (- is None): {legal}"
        )
    chosen = next((row for row in matching if row.takes("bias", bias)), None)
    if chosen is None:
        names = " or ".join(_names((dtype,)) for row in matching for dtype in row.bias)
        reject(
            f"{OP}: bias must have dtype {names} for {product} and result {_names(matching[0].output_dtype)}, "
            f"but has {_names(bias)} (- is None)"
        )
    if act_type != 0 and not chosen.takes_activation:
        reject(
            f"{OP}: act_type must be 0 for {product} and result {_names(chosen.output_dtype)}, but is {act_type}; "
            f"only int8 products with a float result are activated"
        )
    return chosen
