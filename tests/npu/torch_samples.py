"""Computes the samples of torch's own database of operators on the device and on CPU; prints what differs as JSON.

A program of its own: importing torch's tests changes settings of the process.
"""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from moe_npu import sim

SAMPLES_PER_OPERATOR = 4


def to_npu(value: Any) -> Any:
    """The same arguments on the device, with the same strides."""

    def move(leaf: Any) -> Any:
        if leaf == "cpu" if isinstance(leaf, str) else isinstance(leaf, torch.device):
            return torch.device("npu")
        if not isinstance(leaf, Tensor):
            return leaf
        memory = torch.empty(0, dtype=leaf.dtype).set_(leaf.detach().untyped_storage()).to("npu")
        moved = memory.as_strided(leaf.size(), leaf.stride(), leaf.storage_offset())
        moved = moved.conj() if leaf.is_conj() else moved
        return (moved._neg_view() if leaf.is_neg() else moved).requires_grad_(leaf.requires_grad)

    return tree_map(move, value)


def compare(results: Any, expected: Any) -> None:
    for result, wanted in zip(tree_leaves(results), tree_leaves(expected), strict=True):
        if not isinstance(wanted, Tensor):
            assert result == wanted or result != result, f"{result} instead of {wanted}"
            continue
        assert result.device.type == "npu", f"the result is on {result.device}"
        torch.testing.assert_close(result.detach().cpu(), wanted.detach(), equal_nan=True)


def gradients(op: Any, process: Callable[[Any], Any] | None, call: Any) -> list[Tensor | None]:
    leaves = [leaf for leaf in tree_leaves(call) if isinstance(leaf, Tensor) and leaf.requires_grad]
    results = op(call[0], *call[1], **call[2])
    results = tree_leaves(process(results) if process else results)
    results = [result for result in results if isinstance(result, Tensor) and result.requires_grad]
    if not results or not leaves:
        return []
    grads = [torch.arange(r.numel()).mul(0.1).sin().view(r.shape).to(r.dtype).to(r.device) for r in results]
    return list(torch.autograd.grad(results, leaves, grads, allow_unused=True))


def check(op: Any) -> tuple[int, str | None]:
    """How many samples agree, and the first complaint."""
    dtypes = op.supported_dtypes("cpu")
    if not dtypes:
        return 0, None
    dtype = torch.float32 if torch.float32 in dtypes else min(dtypes, key=str)
    differentiable = op.supports_autograd and dtype.is_floating_point
    samples = list(itertools.islice(op.sample_inputs("cpu", dtype, requires_grad=differentiable), 100))
    count = 0
    for sample in samples[:: max(1, len(samples) // SAMPLES_PER_OPERATOR)]:
        call = (sample.input, sample.args, sample.kwargs)
        try:
            expected = op(call[0], *call[1], **call[2])
            expected_gradients = gradients(op, sample.output_process_fn_grad, call) if differentiable else []
        except Exception:
            continue  # of samples for other devices
        try:
            on_device = to_npu(call)
            results = op(on_device[0], *on_device[1], **on_device[2])
            if not any(isinstance(leaf, Tensor | torch.device) for leaf in tree_leaves(on_device)):
                continue  # made on CPU because no argument asks for the device
            compare(results, expected)
            compare(
                gradients(op, sample.output_process_fn_grad, on_device) if differentiable else [], expected_gradients
            )
            count += 1
        except Exception as error:
            return count, f"{type(error).__name__}: {error}".partition("\n")[0]
    return count, None


def main() -> None:
    warnings.simplefilter("ignore")
    sim.activate()
    from torch.testing._internal.common_methods_invocations import op_db

    torch.set_num_threads(1)
    complaints, agreeing, silent = {}, 0, []
    for op in op_db:
        torch.manual_seed(0)
        name = f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name
        count, complaint = check(op)
        agreeing += count
        if complaint is not None:
            complaints[name] = complaint
        elif count == 0:
            silent.append(name)
    print(json.dumps({"complaints": complaints, "agreeing": agreeing, "silent": silent}))


if __name__ == "__main__":
    main()
