"""Balancing losses, bias updates and reports over ranks equal those of one process that has all tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_npu.layers.losses import load_balancing_loss, pooled_load_balancing_loss, update_correction_bias
from moe_npu.layers.stats import load_report
from tests.distributed import balance_jobs as jobs
from tests.helpers.gloo import Pool

pytestmark = pytest.mark.distributed

E, K = 5, 2
GROUPS = {2: "pair", 4: "all"}


def tokens(sizes: list[int], num_layers: int) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """For each rank and layer, logits and ids."""
    logits = [[torch.randn(size, E, dtype=torch.float64) for _ in range(num_layers)] for size in sizes]
    ids = [[torch.stack([torch.randperm(E)[:K] for _ in layer]) for layer in rank] for rank in logits]
    return logits, ids


@pytest.mark.parametrize("compiles", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("sizes", "num_layers"), [([6, 6], 1), ([3, 9], 2), ([4, 1, 7, 5], 1)])
def test_mean_over_ranks_is_the_gradient_of_the_global_loss(
    pool: Pool, sizes: list[int], num_layers: int, compiles: bool
) -> None:
    logits, ids = tokens(sizes, num_layers)
    masks = [torch.arange(size) % 3 != 2 for size in sizes]
    world = len(sizes)
    options: list[dict[str, Any]] = [{"mask": mask, "score_function": "sigmoid"} for mask in masks]
    results = pool.run(
        jobs.loss_and_gradient,
        [(GROUPS[world], *call, compiles) for call in zip(logits, ids, options, strict=True)],
    )

    leaves = [[layer.clone().requires_grad_() for layer in rank] for rank in logits]
    joined = [torch.cat([rank[layer] for rank in leaves]) for layer in range(num_layers)]
    joined_ids = [torch.cat([rank[layer] for rank in ids]) for layer in range(num_layers)]
    together = {"mask": torch.cat(masks), "score_function": "sigmoid"}
    if num_layers == 1:
        expected = load_balancing_loss(joined[0], joined_ids[0], **together)
    else:
        expected = pooled_load_balancing_loss(joined, joined_ids, **together)
    grads = torch.autograd.grad(expected, [layer for rank in leaves for layer in rank])
    for rank, (value, *actual) in enumerate(results):
        torch.testing.assert_close(value, expected.detach())
        for a, b in zip(actual, grads[rank * num_layers : (rank + 1) * num_layers], strict=True):
            torch.testing.assert_close(a / world, b)  # data parallelism divides by the number of ranks
    # and it is not the mean of the losses of the ranks
    alone = [
        load_balancing_loss(rank[0], chosen[0], mask=mask, score_function="sigmoid")
        for rank, chosen, mask in zip(logits, ids, masks, strict=True)
    ]
    assert num_layers > 1 or (torch.stack(alone).mean() - expected).abs() > 1e-4


def test_biases_move_by_the_load_of_all_ranks(pool: Pool) -> None:
    loads = [[torch.tensor([5, 0, 1]), torch.tensor([1, 1])], [torch.tensor([0, 6, 0]), torch.tensor([4, 0])]]
    start = [torch.tensor([0.25, 0.0, 0.0]), torch.zeros(2)]
    results = pool.run(jobs.update_bias, [("pair", [bias.clone() for bias in start], own) for own in loads])
    expected = [bias.clone() for bias in start]
    update_correction_bias(expected, [a + b for a, b in zip(*loads, strict=True)], rate=0.5)
    assert [bias.tolist() for bias in expected] == [[-0.25, -0.5, 0.5], [-0.5, 0.5]]
    for biases in results:
        assert all(map(torch.equal, biases, expected))


def test_report_of_all_ranks(pool: Pool) -> None:
    loads = [
        {"a": torch.tensor([3, 0]), "b": torch.tensor([1, 1, 0])},
        {"a": torch.tensor([0, 1]), "b": torch.zeros(3).long()},
    ]
    both = load_report({name: loads[0][name] + loads[1][name] for name in ("a", "b")})
    assert pool.run(jobs.report, [("pair", own) for own in loads]) == [both, both]
