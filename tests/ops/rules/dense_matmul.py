"""Rules of the quantized dense matmuls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.ops.rules.base import Rule

RULES: list[Rule] = []

LEGAL: list[Callable[[], Any]] = []
