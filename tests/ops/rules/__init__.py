"""Calls that break one rule each, and the words of the error; per family also calls that are legal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.ops.rules import (
    dense_matmul,
    distribute,
    fused_matmul,
    gating,
    gating_top_k,
    grouped_matmul,
    grouped_mm,
    permute,
    quantize,
    routing,
    routing_map,
    swiglu,
    swiglu_quant,
)
from tests.ops.rules.base import Rule

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
    routing,
    permute,
    routing_map,
    distribute,
)

RULES: list[Rule] = [rule for family in FAMILIES for rule in family.RULES]
LEGAL: list[Callable[[], Any]] = [call for family in FAMILIES for call in family.LEGAL]
