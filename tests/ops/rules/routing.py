"""Rules of routing on one device: init, re-routing, finalize."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.ops.rules.base import Rule

RULES: list[Rule] = []

LEGAL: list[Callable[[], Any]] = []
