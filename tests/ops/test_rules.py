"""Every rule of the operators has a call that breaks it, and says so in words."""

from __future__ import annotations

import ast
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_npu import ops
from tests.ops.rules import LEGAL, RULES


@pytest.mark.parametrize(("call", "message"), [pytest.param(call, text, id=id) for id, call, text in RULES])
def test_a_broken_rule_is_refused_in_words(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ops.OperatorError, match=re.escape(message)) as caught:
        call()
    assert isinstance(caught.value, RuntimeError)
    assert isinstance(caught.value, ValueError)


def test_the_calls_are_legal_without_the_change() -> None:
    for call in LEGAL:
        call()


# --- every rule is broken above --------------------------------------------------------------------------------------

CHECKS = {"require", "reject", "require_dtype", "require_dim", "require_device", "require_no_gradient"}
FOLDER = Path(ops.__file__).parent


def _rule_sites() -> dict[tuple[str, int], int]:
    """File and first line of each call of a check, with its last line."""
    sites = {}
    for path in sorted(FOLDER.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CHECKS:
                assert node.end_lineno is not None
                sites[path.name, node.lineno] = node.end_lineno
    return sites


def test_every_rule_is_broken_by_some_call() -> None:
    sites = _rule_sites()
    assert len(sites) > 100
    broken = set()
    for _, call, _ in RULES:
        with pytest.raises(ops.OperatorError) as caught:
            call()
        for frame in traceback.extract_tb(caught.value.__traceback__):
            path = Path(frame.filename)
            if path.parent == FOLDER and frame.lineno is not None:
                broken |= {
                    (name, first)
                    for (name, first), last in sites.items()
                    if name == path.name and first <= frame.lineno <= last
                }
    assert sorted(sites.keys() - broken) == []
