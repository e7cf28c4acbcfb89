"""Balancing losses against loops written from the papers' formulas, and against transformers'."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func as mixtral_loss
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func as qwen3_loss

from moe_npu.layers.losses import (
    load_balancing_loss,
    pooled_load_balancing_loss,
    router_z_loss,
    sequence_balance_loss,
    update_correction_bias,
)

T, E, K = 24, 6, 2
SCORES: dict[str, Callable[[float], float]] = {
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "sqrt_softplus": lambda x: math.sqrt(math.log1p(math.exp(x))),
    "softmax": math.exp,
}


def inputs(num_tokens: int = T, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    logits = torch.randn(num_tokens, E, dtype=torch.float64).mul(2).to(dtype)
    # not the best ones: losses must use the experts that were chosen, whatever chose them
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(num_tokens)])
    return logits, ids


def published(logits: Tensor, ids: Tensor, is_token: list[bool], score: str) -> Tensor:
    """``E * sum_i f_i P_i`` token by token; a tensor, for its gradient."""
    experts, top_k = logits.size(1), ids.size(1)
    fractions, means, count = [0.0] * experts, [logits.new_zeros(()) for _ in range(experts)], sum(is_token)
    functions = {"softmax": torch.exp, "sigmoid": torch.sigmoid, "sqrt_softplus": lambda x: F.softplus(x).sqrt()}
    for row, chosen, counts in zip(logits, ids.tolist(), is_token, strict=True):
        if not counts:
            continue
        scores = functions[score](row)
        for expert in chosen:
            if 0 <= expert < experts:
                fractions[expert] += 1 / (top_k * count)
        for expert in range(experts):
            means[expert] = means[expert] + scores[expert] / scores.sum() / count
    return experts * sum(f * p for f, p in zip(fractions, means, strict=True))


MASKS = {"no-mask": None, "mask": torch.arange(T) % 3 != 1}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("score", SCORES)
class TestLoadBalancingLoss:
    def test_value_and_gradient_are_those_of_the_formula(self, score: str, mask: Tensor | None) -> None:
        logits, ids = inputs()
        logits.requires_grad_()
        is_token = [True] * T if mask is None else mask.tolist()
        actual = load_balancing_loss(logits, ids.int(), score_function=score, mask=mask)
        expected = published(logits, ids, is_token, score)
        torch.testing.assert_close(actual, expected)
        for a, b in zip(*(torch.autograd.grad(loss, logits) for loss in (actual, expected)), strict=True):
            torch.testing.assert_close(a, b)

    def test_padding_has_no_effect_and_no_gradient(self, score: str, mask: Tensor | None) -> None:
        mask = MASKS["mask"]
        logits, ids = inputs()
        loss = load_balancing_loss(logits.requires_grad_(), ids, score_function=score, mask=mask)
        (grad,) = torch.autograd.grad(loss, logits)
        assert torch.equal(grad[~mask], torch.zeros_like(grad[~mask]))
        assert grad[mask].abs().min() > 0
        torch.testing.assert_close(loss, load_balancing_loss(logits[mask], ids[mask], score_function=score))

    def test_half_precision_is_computed_in_float32(self, score: str, mask: Tensor | None) -> None:
        logits, ids = inputs(dtype=torch.bfloat16)
        loss = load_balancing_loss(logits, ids, score_function=score, mask=mask)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, load_balancing_loss(logits.float(), ids, score_function=score, mask=mask))


def test_bounds_of_the_loss() -> None:
    even = torch.arange(12).view(6, 2) % 4
    torch.testing.assert_close(load_balancing_loss(torch.zeros(6, 4), even), torch.tensor(1.0))
    one = torch.zeros(6, 1, dtype=torch.int64)
    logits = torch.tensor([100.0, 0, 0, 0]).expand(6, 4)
    torch.testing.assert_close(load_balancing_loss(logits, one), torch.tensor(4.0))
    assert load_balancing_loss(torch.zeros(0, 4), torch.zeros(0, 2, dtype=torch.int32)) == 0
    assert load_balancing_loss(torch.zeros(3, 4), one[:3], mask=torch.zeros(3)) == 0


def test_ids_of_no_expert_are_not_counted() -> None:
    logits, ids = inputs()
    ids[3, 0], ids[5, 1] = E, -1
    torch.testing.assert_close(load_balancing_loss(logits, ids), published(logits, ids, [True] * T, "softmax"))


@pytest.mark.parametrize("reference", [mixtral_loss, qwen3_loss], ids=["mixtral", "qwen3"])
@pytest.mark.parametrize("has_mask", [False, True], ids=["no-mask", "mask"])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_pooled_loss_is_that_of_transformers(num_layers: int, has_mask: bool, reference: Callable[..., Tensor]) -> None:
    logits = tuple(torch.randn(T, E, requires_grad=True) for _ in range(num_layers))
    ids = [layer.softmax(-1).topk(K, -1).indices for layer in logits]
    mask = (torch.arange(T) % 4 != 0).long().view(2, -1) if has_mask else None
    actual = pooled_load_balancing_loss(logits, ids, mask=mask)
    expected = reference(logits, E, K, mask)
    torch.testing.assert_close(actual, expected)
    for a, b in zip(*(torch.autograd.grad(loss, logits) for loss in (actual, expected)), strict=True):
        torch.testing.assert_close(a, b)
    if num_layers == 1:
        torch.testing.assert_close(actual, K * load_balancing_loss(logits[0], ids[0], mask=mask))


def test_pooled_loss_lets_layers_make_up_for_each_other() -> None:
    """The difference that the documentation names."""
    logits = [torch.tensor([[9.0, -9.0]] * 4), torch.tensor([[-9.0, 9.0]] * 4)]
    ids = [torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1, dtype=torch.int64)]
    torch.testing.assert_close(pooled_load_balancing_loss(logits, ids), torch.tensor(1.0))
    each = [load_balancing_loss(a, b) for a, b in zip(logits, ids, strict=True)]
    torch.testing.assert_close(torch.stack(each), torch.tensor([2.0, 2.0]))


class TestSequenceBalanceLoss:
    @pytest.mark.parametrize("score", SCORES)
    def test_is_the_mean_over_sequences_of_the_formula(self, score: str) -> None:
        logits, ids = inputs()
        mask = torch.ones(3, 8, dtype=torch.bool)
        mask[1, 5:] = False
        logits.requires_grad_()
        actual = sequence_balance_loss(logits, ids, num_sequences=3, score_function=score, mask=mask)
        pieces = zip(logits.split(8), ids.split(8), mask.tolist(), strict=True)
        expected = torch.stack([published(*piece, score) for piece in pieces]).mean()
        torch.testing.assert_close(actual, expected)
        for a, b in zip(*(torch.autograd.grad(loss, logits) for loss in (actual, expected)), strict=True):
            torch.testing.assert_close(a, b)

    def test_packed_sequences(self) -> None:
        logits, ids = inputs()
        lengths = [3, 13, 8]
        sequences = torch.arange(3).repeat_interleave(torch.tensor(lengths))
        shuffled = torch.randperm(T)
        actual = sequence_balance_loss(
            logits[shuffled], ids[shuffled], num_sequences=3, sequence_ids=sequences[shuffled]
        )
        pieces = zip(logits.split(lengths), ids.split(lengths), strict=True)
        expected = torch.stack([published(a, b, [True] * len(a), "sigmoid") for a, b in pieces]).mean()
        torch.testing.assert_close(actual, expected)

    def test_a_sequence_of_padding_does_not_count(self) -> None:
        logits, ids = inputs()
        mask = torch.arange(T) < 16
        actual = sequence_balance_loss(logits, ids, num_sequences=3, mask=mask)
        torch.testing.assert_close(actual, sequence_balance_loss(logits[:16], ids[:16], num_sequences=2))
        assert sequence_balance_loss(logits, ids, num_sequences=3, mask=torch.zeros(T)) == 0

    def test_uneven_sequences_cost_where_the_batch_is_even(self) -> None:
        ids = torch.tensor([[0], [0], [1], [1]])
        logits = torch.where(ids == torch.arange(2), 30.0, -30.0)
        torch.testing.assert_close(load_balancing_loss(logits, ids), torch.tensor(1.0))
        torch.testing.assert_close(sequence_balance_loss(logits, ids, num_sequences=2), torch.tensor(2.0))


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_z_loss_is_that_of_the_formula(dtype: torch.dtype, mask: Tensor | None) -> None:
    logits, _ = inputs(dtype=dtype)
    squares = [
        math.log(sum(math.exp(x) for x in row)) ** 2
        for row, counts in zip(logits.tolist(), [True] * T if mask is None else mask.tolist(), strict=True)
        if counts
    ]
    actual = router_z_loss(logits, mask=mask)
    expected = torch.tensor(sum(squares) / len(squares), dtype=torch.promote_types(dtype, torch.float32))
    torch.testing.assert_close(actual, expected)


def test_z_loss_of_large_logits_and_of_none() -> None:
    assert router_z_loss(torch.full((2, 4), 1000.0)).isfinite()
    assert router_z_loss(torch.zeros(0, 4)) == 0
    logits = torch.randn(5, E, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(router_z_loss, logits)


class TestUpdateCorrectionBias:
    def test_moves_by_the_rate_towards_an_even_load(self) -> None:
        biases = [torch.tensor([0.5, 0.0, -0.5, 0.25]), torch.zeros(2)]
        loads = [torch.tensor([9, 3, 0, 4]), torch.tensor([7, 7], dtype=torch.int32)]  # means 4 and 7
        update_correction_bias(biases, loads, rate=0.125)
        assert biases[0].tolist() == [0.375, 0.125, -0.375, 0.25]
        assert biases[1].tolist() == [0, 0]

    def test_the_sign_is_exact_where_float32_is_not(self) -> None:
        bias = torch.zeros(2)
        update_correction_bias(bias, torch.tensor([2**30 + 1, 2**30]), rate=1)
        assert bias.tolist() == [-1, 1]

    def test_a_biased_router_becomes_balanced(self) -> None:
        scores = torch.rand(512, E) + torch.linspace(0, 1, E)
        bias = torch.zeros(E)

        def load() -> Tensor:
            return torch.bincount((scores + bias).topk(K, -1).indices.flatten(), minlength=E)

        assert load().max() > 2 * 512 * K / E
        for _ in range(300):
            update_correction_bias(bias, load(), rate=0.01)
        assert load().max() < 1.1 * 512 * K / E

    def test_parameters_get_no_gradient(self) -> None:
        bias = torch.zeros(2, requires_grad=True)
        update_correction_bias(bias, torch.tensor([1, 3]), rate=1.0)
        assert bias.tolist() == [1, -1]
        assert bias.is_leaf


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "batch": load_balancing_loss,
    "pooled": lambda logits, ids: pooled_load_balancing_loss([logits, logits * 2], [ids, ids]),
    "sequence": lambda logits, ids: sequence_balance_loss(logits, ids, num_sequences=4),
    "z": lambda logits, ids: router_z_loss(logits),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_compiles_to_one_graph(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for num_tokens in (8, 12):
        logits, ids = inputs(num_tokens, torch.float32)
        logits.requires_grad_()
        actual, expected = compiled(logits, ids), loss(logits, ids)
        torch.testing.assert_close(actual, expected)
        for a, b in zip(*(torch.autograd.grad(value, logits) for value in (actual, expected)), strict=True):
            torch.testing.assert_close(a, b)
    assert loss(logits.to("meta"), ids.to("meta")).shape == ()


def test_a_score_that_underflows_has_a_gradient() -> None:
    logits = torch.tensor([[-200.0, 1.0, 2.0]], requires_grad=True)
    load_balancing_loss(logits, torch.tensor([[1]]), score_function="sqrt_softplus").backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


ERRORS = [
    (lambda: load_balancing_loss(torch.zeros(3), torch.zeros(3, 1, dtype=torch.int64)), r"router_logits and topk_ids"),
    (lambda: load_balancing_loss(torch.zeros(3, 4), torch.zeros(2, 1, dtype=torch.int64)), r"\(3, 4\) and \(2, 1\)"),
    (
        lambda: load_balancing_loss(torch.zeros(3, 4), torch.zeros(3, 1, dtype=torch.int64), mask=torch.ones(4)),
        "mask must have one element for each of the 3 tokens of router_logits, but has 4",
    ),
    (
        lambda: load_balancing_loss(torch.zeros(3, 4), torch.zeros(3, 1, dtype=torch.int64), score_function="relu"),
        "there is no score_function 'relu'; choose one of sigmoid, softmax, sqrt_softplus",
    ),
    (lambda: pooled_load_balancing_loss([], []), "at least one, but have 0 and 0"),
    (
        lambda: pooled_load_balancing_loss([torch.zeros(1, 2), torch.zeros(1, 3)], [torch.zeros(1, 1).long()] * 2),
        "router_logits of all layers must have 2 experts, but one has 3",
    ),
    (
        lambda: sequence_balance_loss(torch.zeros(3, 4), torch.zeros(3, 1).long(), num_sequences=2),
        "num_sequences = 2 must divide the 3 tokens",
    ),
    (lambda: sequence_balance_loss(torch.zeros(3, 4), torch.zeros(3, 1).long(), num_sequences=0), "but is 0"),
    (
        lambda: sequence_balance_loss(
            torch.zeros(3, 4), torch.zeros(3, 1).long(), num_sequences=2, sequence_ids=torch.zeros(2).long()
        ),
        "sequence_ids must have one element for each of the 3 tokens",
    ),
    (lambda: router_z_loss(torch.zeros(3)), r"router_logits must have shape \[T, E\]"),
    (lambda: router_z_loss(torch.zeros(3, 2), mask=torch.ones(2)), "mask must have one element for each of the 3"),
    (lambda: update_correction_bias([], [], rate=1), "at least one, but have 0 and 0"),
    (lambda: update_correction_bias(torch.zeros(2).bfloat16(), torch.zeros(2).long(), rate=1), "keep it in float32"),
    (lambda: update_correction_bias(torch.zeros(2), torch.zeros(2), rate=1), r"loads\[0\] must be counts"),
    (lambda: update_correction_bias(torch.zeros(2), torch.zeros(3).long(), rate=1), r"\(2,\) and \(3,\)"),
]


@pytest.mark.parametrize(("call", "message"), ERRORS)
def test_errors(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("padding", [math.nan, math.inf, -math.inf])
def test_padding_may_hold_anything(padding: float) -> None:
    logits = torch.randn(6, 4)
    ids, mask = torch.randint(4, (6, 2)), torch.tensor([1, 1, 0, 1, 1, 0])
    polluted = logits.masked_fill(mask.view(-1, 1) == 0, padding).requires_grad_()
    for loss in (
        lambda x: load_balancing_loss(x, ids, mask=mask),
        lambda x: sequence_balance_loss(x, ids, num_sequences=2, mask=mask),
        lambda x: router_z_loss(x, mask=mask),
    ):
        value = loss(polluted)
        torch.testing.assert_close(value, loss(logits))
        (grad,) = torch.autograd.grad(value, polluted)
        assert grad.isfinite().all()
        assert not grad[mask == 0].any()
