"""Sample inputs: one named entry per operator and scenario. `test_battery.py` runs everything it has over this table.

Inputs are small and the same at every call. Weights of experts without rows and rows that no group covers are NaN
where a sample says so, since neither may reach a result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from tests.ops.samples import (
    dense_matmul,
    distribute,
    fused_matmul,
    gating,
    gating_top_k,
    grouped_matmul,
    grouped_mm,
    init_routing,
    permute,
    quantize,
    routing,
    routing_map,
    swiglu,
    swiglu_quant,
)
from tests.ops.samples.base import Inputs, Sample

FAMILIES = (
    grouped_mm,
    grouped_matmul,
    fused_matmul,
    quantize,
    dense_matmul,
    swiglu,
    swiglu_quant,
    gating,
    gating_top_k,
    init_routing,
    routing,
    permute,
    routing_map,
    distribute,
)

SAMPLES: list[Sample] = [sample for family in FAMILIES for sample in family.SAMPLES]
REFERENCES: dict[str, Callable[..., Any]] = {
    name: function for family in FAMILIES for name, function in family.REFERENCES.items()
}
# random legal calls, for property tests
DRAWS: dict[str, Callable[[st.DrawFn], Inputs]] = {
    name: function for family in FAMILIES for name, function in family.DRAWS.items()
}
