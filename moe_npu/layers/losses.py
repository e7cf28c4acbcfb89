"""Losses that keep the load of experts even, the router z-loss, and the bias update that needs no loss.

Plain functions that return a scalar, none of which is added to anything by itself. The arithmetic is float32 whatever
the dtype of the logits, and nothing is read on the host.

With ``n`` tokens, ``c_i`` of whose pairs went to expert i, and ``P_i`` the mean probability of expert i:

    load_balancing_loss          E * sum_i c_i / (K n) * P_i           1 if all is even (Switch Transformer, eq. 4)
    pooled_load_balancing_loss   E * sum_i c_i / n * P_i               K; n, c and P over all layers together
    sequence_balance_loss        mean over sequences of the first, with scores divided by their sum (DeepSeek-V3)
    router_z_loss                mean over tokens of logsumexp(logits)^2                        (ST-MoE, eq. 5)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from moe_npu.layers.routers.base import sqrt_softplus
from moe_npu.layers.stats import count_expert_tokens

ScoreFunction = Callable[[torch.Tensor], torch.Tensor]

_SCORE_FUNCTIONS: dict[str, ScoreFunction] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrt_softplus": sqrt_softplus,
}


def router_probabilities(router_logits: torch.Tensor, score_function: str | ScoreFunction) -> torch.Tensor:
    """Scores of all experts, divided by their sum for each token, float32 (float64 for float64).

    Args:
        router_logits: ``[T, E]``.
        score_function: ``"softmax"``, ``"sigmoid"``, ``"sqrt_softplus"``, or a function of the float32 logits that
            returns scores that are not negative.

    Raises:
        ValueError: wrong rank, or there is no score function of that name.
    """
    if router_logits.dim() != 2:
        raise ValueError(f"router_logits must have shape [T, E], but has shape {tuple(router_logits.shape)}")
    if not callable(score_function):
        if score_function not in _SCORE_FUNCTIONS:
            names = ", ".join(sorted(_SCORE_FUNCTIONS))
            raise ValueError(f"there is no score_function {score_function!r}; choose one of {names}, or a function")
        score_function = _SCORE_FUNCTIONS[score_function]
    scores = score_function(router_logits.to(torch.promote_types(router_logits.dtype, torch.float32)))  # [T, E]
    if score_function is _SCORE_FUNCTIONS["softmax"]:
        return scores
    return scores / scores.sum(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)


def load_balancing_loss(
    router_logits: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    score_function: str | ScoreFunction = "softmax",
    mask: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """The load-balancing loss of one layer, 1 if all is even and E if all tokens go to one expert alone.

    ``E * sum_i f_i P_i`` with ``f_i`` the share of expert i in all (token, slot) pairs, which has no gradient, and
    ``P_i`` the mean of its probability over the tokens (Fedus et al., Switch Transformer, eq. 4 to 6, for any K). Take
    the mean over the layers of a model. transformers' loss is :func:`pooled_load_balancing_loss`.

    With ``group`` it is the loss of the global batch (Qiu et al., "Demons in the Detail"): both ``f_i`` and ``P_i`` are
    those of the tokens of all ranks, so that experts may specialise within a rank's batch. The value is the same on all
    ranks, and each rank has *group size* times the gradient that its own tokens have: the mean over ranks, as data
    parallelism takes it, is the gradient of the global loss, however many tokens each rank has. One all-reduce of
    2E + 1 numbers in forward and none in backward.

    Args:
        router_logits: ``[T, E]``, of any float dtype.
        topk_ids: ``[T, K]`` integers; ids outside ``[0, E)`` count as tokens of no expert.
        score_function: see :func:`router_probabilities`; ``lambda p: p`` takes probabilities.
        mask: bool or 0 and 1, T elements of any shape: false for padding, which counts nowhere.
        group: ranks that share a batch; all must call this. None: this rank's tokens alone.

    Returns:
        A scalar, float32 (float64 for float64). 0 without tokens.

    Raises:
        ValueError: shapes that do not fit, or an unknown score function.

    Example:
        >>> logits = torch.zeros(4, 2)
        >>> load_balancing_loss(logits, torch.tensor([[0], [1], [0], [1]]))
        tensor(1.)
    """
    loss = pooled_load_balancing_loss(
        [router_logits], [topk_ids], score_function=score_function, mask=mask, group=group
    )
    return loss / topk_ids.size(1)


def pooled_load_balancing_loss(
    router_logits: Sequence[torch.Tensor],
    topk_ids: Sequence[torch.Tensor],
    *,
    score_function: str | ScoreFunction = "softmax",
    mask: torch.Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """The load-balancing loss of all layers together, as ``load_balancing_loss_func`` of transformers computes it.

    It differs from the mean of :func:`load_balancing_loss` over the layers in two ways. The tokens of all layers are
    put together before the two averages are multiplied: an expert that is idle in one layer makes up for one of the
    same number that is overloaded in another. And the K slots of a token are added, not averaged: it is K if all is
    even. For one layer it is K times :func:`load_balancing_loss`.

    Args:
        router_logits: for each layer ``[T, E]``, of any float dtype.
        topk_ids: for each layer ``[T, K]`` integers.
        score_function: see :func:`router_probabilities`.
        mask: of the tokens, for every layer the same: see :func:`load_balancing_loss`.
        group: see :func:`load_balancing_loss`.

    Returns:
        A scalar, float32 (float64 for float64). 0 without tokens.

    Raises:
        ValueError: no layers, layers of different sizes, or as :func:`load_balancing_loss`.
    """
    if len(router_logits) == 0 or len(router_logits) != len(topk_ids):
        raise ValueError(
            "router_logits and topk_ids must have one entry for each layer, at least one, but have "
            f"{len(router_logits)} and {len(topk_ids)}"
        )
    num_experts = router_logits[0].size(-1)
    parts = []
    for logits, ids in zip(router_logits, topk_ids, strict=True):
        if logits.size(-1) != num_experts:
            raise ValueError(
                f"router_logits of all layers must have {num_experts} experts, but one has {logits.size(-1)}"
            )
        _check_sizes(logits, ids, mask)
        probabilities = router_probabilities(_without_padding(logits, mask), score_function)  # [T, E]
        is_token = _token_mask(mask, probabilities)  # [T, 1]
        parts.append(
            torch.cat(
                [
                    (probabilities * is_token).sum(0),
                    count_expert_tokens(ids, num_experts, mask=mask).to(probabilities.dtype),
                    is_token.sum(0),
                ]
            )
        )
    sums = torch.stack(parts).sum(0)  # [2E + 1]
    if group is not None:
        sums = _sum_over_ranks(sums, group)
    probability, count, num_tokens = sums.split([num_experts, num_experts, 1])
    return num_experts * (probability * count).sum() / num_tokens.squeeze(0).clamp_min(1).square()


def sequence_balance_loss(
    router_logits: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    num_sequences: int,
    sequence_ids: torch.Tensor | None = None,
    score_function: str | ScoreFunction = "sigmoid",
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The complementary sequence-wise loss of DeepSeek-V3 (eq. 17 to 20), without its factor alpha.

    For each sequence of n tokens ``sum_i f_i P_i``, with ``f_i = E / (K n) * c_i`` and ``P_i`` the mean over its tokens
    of the scores divided by their sum; and the mean of that over the sequences. 1 if all is even. The paper counts in
    ``c_i`` the experts of the K highest scores; here they are those that were chosen, which a correction bias or a
    limit of groups can make others.

    Args:
        router_logits: ``[T, E]``, of any float dtype.
        topk_ids: ``[T, K]`` integers.
        num_sequences: number of sequences.
        sequence_ids: ``[T]`` integers in ``[0, num_sequences)``, the sequence of each token, for packed sequences.
            None: all have the same length T / num_sequences, one after the other.
        score_function: see :func:`router_probabilities`.
        mask: see :func:`load_balancing_loss`. A sequence without tokens does not count in the mean.

    Returns:
        A scalar, float32 (float64 for float64). 0 without tokens.

    Raises:
        ValueError: shapes that do not fit, tokens that ``num_sequences`` does not divide, or an unknown score function.
    """
    _check_sizes(router_logits, topk_ids, mask)
    num_tokens, num_experts = router_logits.shape
    if num_sequences < 1:
        raise ValueError(f"num_sequences must be positive, but is {num_sequences}")
    if sequence_ids is None:
        if num_tokens % num_sequences != 0:
            raise ValueError(
                f"num_sequences = {num_sequences} must divide the {num_tokens} tokens of router_logits, or "
                f"sequence_ids must be given"
            )
        length = num_tokens // num_sequences
        sequence_ids = torch.arange(num_sequences, device=router_logits.device).repeat_interleave(
            length, output_size=num_tokens
        )
    elif sequence_ids.numel() != num_tokens:
        raise ValueError(
            f"sequence_ids must have one element for each of the {num_tokens} tokens of router_logits, but has "
            f"{sequence_ids.numel()}"
        )
    probabilities = router_probabilities(_without_padding(router_logits, mask), score_function)  # [T, E]
    is_token = _token_mask(mask, probabilities)  # [T, 1]
    sequence = sequence_ids.reshape(-1, 1).long()  # [T, 1]
    is_expert = (topk_ids >= 0) & (topk_ids < num_experts)
    cell = sequence * num_experts + topk_ids.clamp(0, num_experts - 1)  # [T, K]
    count = probabilities.new_zeros(num_sequences * num_experts).scatter_add(
        0, cell.reshape(-1), (is_expert * is_token).reshape(-1)
    )
    # a matmul: additions to rows that repeat have no fixed order on a device
    is_of_sequence = (sequence == torch.arange(num_sequences, device=sequence.device)).to(is_token.dtype) * is_token
    probability = is_of_sequence.T @ probabilities  # [num_sequences, E]
    num_real = is_of_sequence.sum(0)  # [num_sequences]
    products = (count.view(num_sequences, num_experts) * probability).sum(1)
    losses = num_experts / topk_ids.size(1) * products / num_real.clamp_min(1).square()  # [num_sequences]
    return losses.sum() / (num_real > 0).sum().clamp_min(1)


def router_z_loss(router_logits: torch.Tensor, *, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The mean over tokens of the squared logarithm of the sum of exponentials (Zoph et al., ST-MoE, eq. 5).

    It keeps the logits of a router small, where their rounding errors are.

    Args:
        router_logits: ``[T, E]``, of any float dtype.
        mask: see :func:`load_balancing_loss`.

    Returns:
        A scalar, float32 (float64 for float64). 0 without tokens.

    Raises:
        ValueError: wrong rank, or a mask of another number of tokens.

    Example:
        >>> router_z_loss(torch.zeros(3, 4))  # log(4)^2
        tensor(1.9218)
    """
    if router_logits.dim() != 2:
        raise ValueError(f"router_logits must have shape [T, E], but has shape {tuple(router_logits.shape)}")
    _check_mask(router_logits, mask)
    logits = _without_padding(router_logits, mask).to(torch.promote_types(router_logits.dtype, torch.float32))
    is_token = _token_mask(mask, logits).squeeze(1)  # [T]
    return (logits.logsumexp(-1).square() * is_token).sum() / is_token.sum().clamp_min(1)


@torch.no_grad()
def update_correction_bias(
    biases: torch.Tensor | Sequence[torch.Tensor],
    loads: torch.Tensor | Sequence[torch.Tensor],
    *,
    rate: float,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Balance the load without a loss: ``bias_i += rate * sign(mean load - load_i)``, in place.

    Experts that got more than the average become less likely to be chosen by ``rate``, the others more (Wang et al.,
    "Auxiliary-Loss-Free Load Balancing"; DeepSeek-V3, section 2.1.2). Call it once per optimizer step with the counts
    since the last call, then reset these: ``load.reset()`` of :class:`moe_npu.layers.stats.ExpertLoad`. The sign is
    computed from integers, hence exact.

    Args:
        biases: for each layer the ``e_score_correction_bias [E]`` of its router, float32 or float64.
        loads: for each layer the pairs that each expert got, integers ``[E]``, on the device of its bias.
        rate: step, 0.001 in DeepSeek-V3.
        group: ranks whose loads are added, all of which must call this: one all-reduce for all layers. The biases stay
            the same on all ranks.

    Raises:
        ValueError: shapes or numbers of layers that do not fit, loads that are not integers, or a bias in half
            precision, in which a step of ``rate`` would be lost.

    Example:
        >>> bias = torch.zeros(3)
        >>> update_correction_bias(bias, torch.tensor([4, 1, 1]), rate=0.001)
        >>> bias
        tensor([-0.0010,  0.0010,  0.0010])
    """
    biases = [biases] if isinstance(biases, torch.Tensor) else list(biases)
    loads = [loads] if isinstance(loads, torch.Tensor) else list(loads)
    if len(biases) != len(loads) or not biases:
        raise ValueError(
            "biases and loads must have one entry for each layer, at least one, but have "
            f"{len(biases)} and {len(loads)}"
        )
    for layer, (bias, load) in enumerate(zip(biases, loads, strict=True)):
        if bias.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"biases[{layer}] must be float32 or float64, but is {bias.dtype}; keep it in float32")
        if load.is_floating_point() or load.is_complex():
            raise ValueError(f"loads[{layer}] must be counts of an integer dtype, but is {load.dtype}")
        if bias.dim() != 1 or bias.shape != load.shape:
            raise ValueError(
                f"biases[{layer}] and loads[{layer}] must both have shape [E], but have {tuple(bias.shape)} and "
                f"{tuple(load.shape)}"
            )
    if group is not None:
        together = torch.cat([load.long() for load in loads])
        dist.all_reduce(together, group=group)
        loads = list(together.split([load.numel() for load in loads]))
    for bias, load in zip(biases, loads, strict=True):
        load = load.long()
        bias.add_((load.sum() - load.numel() * load).sign(), alpha=rate)


def _check_sizes(router_logits: torch.Tensor, topk_ids: torch.Tensor, mask: torch.Tensor | None) -> None:
    if router_logits.dim() != 2 or topk_ids.dim() != 2 or router_logits.size(0) != topk_ids.size(0):
        raise ValueError(
            "router_logits and topk_ids must have shapes [T, E] and [T, K] with the same number of tokens T, but have "
            f"{tuple(router_logits.shape)} and {tuple(topk_ids.shape)}"
        )
    if topk_ids.size(1) == 0:
        raise ValueError("topk_ids must have at least one expert per token, but has shape [T, 0]")
    _check_mask(router_logits, mask)


def _check_mask(router_logits: torch.Tensor, mask: torch.Tensor | None) -> None:
    if mask is not None and mask.numel() != router_logits.size(0):
        raise ValueError(
            f"mask must have one element for each of the {router_logits.size(0)} tokens of router_logits, but has "
            f"{mask.numel()}"
        )


def _without_padding(router_logits: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The logits, 0 where there is padding: NaN or inf there would survive a product with 0."""
    return router_logits if mask is None else router_logits.masked_fill(~mask.reshape(-1, 1).bool(), 0)


def _token_mask(mask: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """``[T, 1]``: 1 for tokens and 0 for padding, in the dtype of ``like [T, ...]``."""
    if mask is None:
        return like.new_ones(like.size(0), 1)
    return mask.reshape(-1, 1).bool().to(like.dtype)


def _sum_over_ranks(sums: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sums of all ranks, with *group size* times the gradient of this rank's: what an all-reduce would give it."""
    total = sums.detach().clone()
    dist.all_reduce(total, group=group)
    return total + dist.get_world_size(group) * (sums - sums.detach())
