"""Samples of the distributed operators in a world of one rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from tests.ops.samples.base import Inputs, Sample

DRAWS: dict[str, Callable[[st.DrawFn], Inputs]] = {}

SAMPLES: list[Sample] = []

REFERENCES: dict[str, Callable[..., Any]] = {}
