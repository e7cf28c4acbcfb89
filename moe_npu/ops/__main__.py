"""``python -m moe_npu.ops``: what each operator can do, from the tables that register and check them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moe_npu import ops
from moe_npu.ops._grouped_matmul_rows import HEADER, ROWS
from moe_npu.ops._library import REGISTRATIONS


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [tuple(header), *(tuple(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def operators() -> str:
    """One line per public operator."""
    rows = []
    for name, registration in REGISTRATIONS.items():
        if name not in ops.__all__:
            continue
        gradient = ", ".join(
            f"{argument} (CPU)" if argument in registration.cpu_gradient else argument
            for argument in registration.differentiable
        )
        tracing = "fullgraph, export, npu graph" if registration.is_lowered else "fullgraph, export"
        rows.append((name, "exact", "kernel", tracing, gradient or "-"))
    rows.sort(key=lambda row: row[0].lstrip("_"))
    return _table(("operator", "CPU", "NPU", "compile", "gradient"), rows)


def grouped_matmul_rows() -> str:
    """One line per combination of dtypes that `npu_grouped_matmul` takes."""
    return _table(HEADER, [row.cells() for row in ROWS])


if __name__ == "__main__":
    print(operators())
    print(
        "\nnpu_grouped_matmul takes (-: left out; scenarios: x, weight, result, each one tensor (s) or a list (m)):\n"
    )
    print(grouped_matmul_rows())
