"""The scripts of examples/ with ``--device npu`` on the simulated device."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.test_examples import EXAMPLES, run

pytestmark = [pytest.mark.npu, pytest.mark.usefixtures("npu")]


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, tmp_path: Path) -> None:
    run(name, tmp_path, "--device", "npu")
