"""Public operators have the names, argument order and defaults of torch_npu 2.13.0; its schemas stand beside this."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_npu import ops

SCHEMAS: dict[str, list[torch.FunctionSchema]] = {}
for line in Path(__file__).with_name("torch_npu_schemas.txt").read_text().splitlines():
    schema = torch._C.parse_schema(line)
    SCHEMAS.setdefault(schema.name, []).append(schema)

# ours alone: the differentiable core, and the product that torch_npu hides behind a list
OURS = {"grouped_mm", "grouped_mm_weight_grad"}
# earlier releases had a default here, and code written for them runs
PERMISSIVE = {
    ("npu_grouped_matmul", "group_type"): -1,
    # two overloads: a format by its number, or the tensor that has it
    ("npu_format_cast", "acl_format"): None,
    ("npu_format_cast", "dst"): None,
    ("npu_format_cast_", "src"): None,
    ("npu_format_cast_", "acl_format"): None,
}
OPERATORS = [name for name in ops.__all__ if name.startswith(("npu_", "_npu_", "get_npu"))]
# what is not an operator
HELPERS = {"npu_lowerings"}


def parameters(schema: torch.FunctionSchema) -> dict[str, tuple[bool, Any]]:
    """Whether each argument is keyword-only, and its default."""
    return {
        argument.name: (
            argument.kwarg_only,
            argument.default_value if argument.has_default_value() else inspect.Parameter.empty,
        )
        for argument in schema.arguments
    }


@pytest.mark.parametrize("name", [name for name in OPERATORS if name not in HELPERS])
def test_signature(name: str) -> None:
    ours = {
        parameter.name: (parameter.kind is inspect.Parameter.KEYWORD_ONLY, parameter.default)
        for parameter in inspect.signature(getattr(ops, name)).parameters.values()
    }
    overloads = [parameters(schema) for schema in SCHEMAS[name]]
    theirs = {argument: rule for overload in reversed(overloads) for argument, rule in overload.items()}
    for (operator, argument), default in PERMISSIVE.items():
        if operator == name:
            theirs[argument] = (theirs[argument][0], default)
    if len(overloads) == 1:
        assert list(ours) == list(theirs)
    # an empty list is the default of a list that is cut to nothing; Python's is a tuple
    as_given = {argument: (only, () if default == [] else default) for argument, (only, default) in theirs.items()}
    assert ours == as_given


def test_nothing_of_torch_npu_is_missing() -> None:
    assert sorted(set(SCHEMAS) - set(OPERATORS)) == []
