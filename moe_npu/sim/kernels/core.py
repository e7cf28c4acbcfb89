"""What torch_npu itself launches: copies, casts, losses, attention; all other aten operators are in sim/aten.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_npu.sim.kernels.table import kernel

_NONE, _MEAN = 0, 1  # of a reduction; 2 is the sum


# ---- losses, indices -------------------------------------------------------------------------------------------------


def _mean(grad: Tensor, of: Tensor, reduction: int) -> Tensor:
    return grad / of.numel() if reduction == _MEAN else grad


def _l1_loss_backward(grad: Tensor, x: Tensor, target: Tensor, reduction: int) -> Tensor:
    difference = x - target
    return difference.sgn() * _mean(grad, difference, reduction)


def _bce_with_logits_backward(
    grad: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, pos_weight: Tensor | None, reduction: int
) -> Tensor:
    if pos_weight is None:
        result = (x.sigmoid() - target) * grad
    else:
        positive = pos_weight * target
        result = ((positive + 1 - target) * x.sigmoid() - positive) * grad
    return _mean(result if weight is None else result * weight, target, reduction)


def _kl_div_backward(grad: Tensor, x: Tensor, target: Tensor, reduction: int, log_target: bool) -> Tensor:
    mass = target.exp() if log_target else target.clamp(min=0)
    return _mean(-mass * grad, x, reduction).expand(x.shape)


def _kl_div_target_backward(grad: Tensor, x: Tensor, target: Tensor, reduction: int, log_target: bool) -> Tensor:
    if log_target:
        result = grad * (target + 1 - x) * target.exp()
    else:
        result = torch.where(target > 0, grad * (target.log() + 1 - x), 0)
    return _mean(result, target, reduction)


def _repeat_interleave_backward(grad: Tensor, repeats: Tensor, dim: int) -> Tensor:
    rows = torch.arange(repeats.numel()).repeat_interleave(repeats)
    shape = list(grad.shape)
    shape[dim] = repeats.numel()
    return grad.new_zeros(shape).index_add_(dim, rows, grad)


def _one_hot(x: Tensor, depth: int, on: Tensor, off: Tensor, axis: int) -> Tensor:
    if axis != -1:
        raise NotImplementedError(f"one_hot with axis {axis}")
    return torch.where(x.unsqueeze(-1) == torch.arange(depth), on, off)


kernel("aclnnInplaceCopy", ">>destination:T source:T", lambda destination, source: (
    source.to(destination.dtype).expand(destination.shape)
))  # fmt: skip
kernel("aclnnCast", "self:T _dtype:e >>out:T", lambda self, out: self.to(out.dtype))
kernel("aclnnComplex", "real:T imag:T >out:T", torch.complex)
kernel("aclnnMatmul", "input:T other:T >out:T _cube_math_type:e", torch.matmul)
kernel("aclnnMm", "input:T mat2:T >out:T _cube_math_type:e", torch.mm)
kernel("aclnnBatchMatMul", "input:T mat2:T >out:T _cube_math_type:e", torch.bmm)
kernel("aclnnOneHot", "x:T depth:i on:T off:T axis:i >out:T", _one_hot)
kernel("aclnnLinalgVectorNorm", "x:T ord:S dim:A keepdim:b _dtype:e >out:T", lambda x, ord, dim, keepdim: (
    torch.linalg.vector_norm(x, ord, dim or None, keepdim)
))  # fmt: skip
kernel("aclnnL1LossBackward", "grad:T x:T target:T reduction:i >out:T", _l1_loss_backward)
kernel(
    "aclnnBinaryCrossEntropyWithLogitsBackward",
    "grad:T x:T target:T weight:T pos_weight:T reduction:i >out:T",
    _bce_with_logits_backward,
)
kernel("aclnnKlDivBackward", "grad:T x:T target:T reduction:i log_target:b >out:T", _kl_div_backward)
kernel("aclnnKlDivTargetBackward", "grad:T x:T target:T reduction:i log_target:b >out:T", _kl_div_target_backward)
kernel("aclnnRepeatInterleaveGrad", "grad:T repeats:T dim:i >out:T", _repeat_interleave_backward)


# ---- attention -------------------------------------------------------------------------------------------------------

# where a layout holds batch, heads, sequence and lanes; H is heads and lanes together
_LAYOUTS = {"BNSD": (0, 1, 2, 3), "BSND": (0, 2, 1, 3), "BSH": (0, 2, 1, 3), "SBH": (1, 2, 0, 3)}
_MASKS = {0: "as given", 1: "as given, all of it", 2: "causal from the upper left", 3: "causal to the lower right"}


def _heads(x: Tensor, layout: str, num_heads: int) -> Tensor:
    """``[B, N, S, D]`` in float32."""
    if layout not in _LAYOUTS:
        raise NotImplementedError(f"attention with input_layout {layout}")
    if layout[-1] == "H":
        x = x.unflatten(-1, (num_heads, -1))
    return x.permute(_LAYOUTS[layout]).float()


def _from_heads(x: Tensor, layout: str, like: Tensor) -> Tensor:
    inverse = sorted(range(4), key=_LAYOUTS[layout].__getitem__)
    return x.permute(inverse).reshape(like.shape).to(like.dtype)


def _scores(
    query: Tensor, key: Tensor, pse: Tensor | None, mask: Tensor | None, scale: float, sparse_mode: int, window: Any
) -> Tensor:
    """What the softmax is taken of, ``[B, N, S, T]``: minus infinity where the mask hides a key."""
    scores = query @ key.mT
    scores = (scores if pse is None else scores + pse.float()) * scale
    if sparse_mode not in _MASKS:
        raise NotImplementedError(f"attention with sparse_mode {sparse_mode}")
    if mask is None and sparse_mode != 0:
        raise ValueError(f"attention with sparse_mode {sparse_mode} needs atten_mask")
    if mask is None:
        return scores
    num_queries, num_keys = scores.shape[-2:]
    hidden = mask.bool()
    if sparse_mode >= 2:  # the mask is a triangle of a fixed size
        first_hidden = 1 + (num_keys - num_queries if sparse_mode == 3 else 0)
        hidden = torch.ones(num_queries, num_keys, dtype=torch.bool).triu(first_hidden)
    elif sparse_mode == 0:
        before, after = window
        distance = torch.arange(num_keys) - torch.arange(num_queries)[:, None]
        hidden = hidden | (distance > after) | (distance < -before)
    return scores.masked_fill(hidden, float("-inf"))


def _refuse_dropout(padding_mask: Tensor | None, keep_prob: float) -> None:
    if keep_prob < 1:
        raise NotImplementedError(f"attention with dropout (keep_prob {keep_prob})")
    if padding_mask is not None:
        raise NotImplementedError("attention with padding_mask")


def _attention(
    q: Tensor, k: Tensor, v: Tensor, pse: Tensor | None, padding_mask: Tensor | None,
    mask: Tensor | None, scale: float, keep_prob: float, before: int, after: int, num_heads: int, layout: str,
    sparse_mode: int,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """``softmax(scale * (q @ k.T + pse)) @ v``, with the maximum and the sum of each row of the softmax."""
    _refuse_dropout(padding_mask, keep_prob)
    query, key, value = _operands(q, k, v, layout, num_heads)
    scores = _scores(query, key, pse, mask, scale, sparse_mode, (before, after))
    maximum = scores.amax(-1, keepdim=True)
    weights = (scores - maximum).exp().nan_to_num(0)  # NaN: every key is hidden
    total = weights.sum(-1, keepdim=True)
    result = (weights / total).nan_to_num(0) @ value
    rows = (*maximum.shape[:3], 8)
    return (
        maximum.expand(rows),
        total.expand(rows),
        None,
        _from_heads(result, layout, _result_like(q, v, layout, num_heads)),
    )


def _result_like(q: Tensor, v: Tensor, layout: str, num_heads: int) -> Tensor:
    """A tensor of the shape and dtype of the result: the query's, with the lanes of the value."""
    if layout[-1] == "H":
        return q  # one number of lanes
    return q.new_empty(*q.shape[:-1], v.shape[-1])


def _num_key_heads(k: Tensor, layout: str, query: Tensor) -> int:
    return k.shape[-1] // query.shape[-1] if layout[-1] == "H" else k.shape[_LAYOUTS[layout][1]]


def _operands(q: Tensor, k: Tensor, v: Tensor, layout: str, num_heads: int) -> list[Tensor]:
    """Query, key and value as ``[B, N, S, D]``; shared heads of key and value, repeated."""
    query = _heads(q, layout, num_heads)
    key_heads = _num_key_heads(k, layout, query)
    key, value = _heads(k, layout, key_heads), _heads(v, layout, key_heads)
    group = query.shape[1] // key.shape[1]
    return [query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)]


def _attention_backward(
    q: Tensor, k: Tensor, v: Tensor, dy: Tensor, pse: Tensor | None, padding_mask: Tensor | None, mask: Tensor | None,
    softmax_max: Tensor, softmax_sum: Tensor, attention: Tensor, scale: float, keep_prob: float, before: int,
    after: int, num_heads: int, layout: str, sparse_mode: int,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    _refuse_dropout(padding_mask, keep_prob)
    query, key, value = _operands(q, k, v, layout, num_heads)
    grad, result = _heads(dy, layout, num_heads), _heads(attention, layout, num_heads)
    scores = _scores(query, key, pse, mask, scale, sparse_mode, (before, after))
    weights = ((scores - softmax_max[..., :1]).exp() / softmax_sum[..., :1]).nan_to_num(0)
    grad_value = weights.mT @ grad
    grad_scores = weights * (grad @ value.mT - (grad * result).sum(-1, keepdim=True)) * scale
    grad_query, grad_key = grad_scores @ key, grad_scores.mT @ query
    shared = (_num_key_heads(k, layout, query), -1)
    return (
        _from_heads(grad_query, layout, q),
        _from_heads(grad_key.unflatten(1, shared).sum(2), layout, k),
        _from_heads(grad_value.unflatten(1, shared).sum(2), layout, v),
        None if pse is None else grad_scores.sum_to_size(pse.shape).to(pse.dtype),
    )


_ATTENTION = "keep_prob:d before:i after:i num_heads:i layout:s _inner_precise:i sparse_mode:i"
kernel(
    "aclnnFlashAttentionScore",
    f"q:T k:T v:T pse:T _drop_mask:T padding_mask:T mask:T _prefix:A scale:d {_ATTENTION} "
    ">softmax_max:T >softmax_sum:T >softmax_out:T >out:T",
    _attention,
)
kernel(
    "aclnnFlashAttentionScoreGrad",
    "q:T k:T v:T dy:T pse:T _drop_mask:T padding_mask:T mask:T softmax_max:T softmax_sum:T _softmax_in:T "
    f"attention:T _prefix:A scale:d {_ATTENTION} >dq:T >dk:T >dv:T >dpse:T",
    _attention_backward,
)
