"""Router gating by groups of experts, with a bias that only selects (DeepSeek).

    s = softmax(x), sigmoid(x) or sqrt(log(1 + exp(x)))                       norm_type 0, 1, 2
    ids = top_k(s + bias), only from the k_group groups with the best score, or tid2eid[input_ids]
    w = s[ids];  w = w / (sum of w + eps) for norm_type 1 and 2, and for 0 if renorm;  y = w * routed_scaling_factor

The score of a group is the maximum of s + bias in it, or the sum of the two largest. All arithmetic is float32 (float64
for float64) with one rounding to the dtype of x at the end; top_k is a stable descending sort, so that ties go to the
lower group and the lower expert. Spec: routing 1.3.
"""

from __future__ import annotations

from typing import Any

import torch

from moe_npu.ops._errors import dtype_name, reject, require, require_device, require_dim, require_dtype
from moe_npu.ops._library import register_op
from moe_npu.ops._signature import typed
from moe_npu.ops._top_k import stable_top_k
from moe_npu.ops.gating_top_k_backward import SIGMOID, SOFTMAX, check_choices, check_range, gradient, is_normalized

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_INTS = (torch.int32, torch.int64)
_MAX_SUM = 0  # group_select_mode 1 is the sum of the two largest
_MAX_EXPERTS = 2048
_MAX_HASHED = 64
_Gated = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _check(
    x: torch.Tensor,
    k: int,
    bias: torch.Tensor | None,
    input_ids: torch.Tensor | None,
    tid2eid: torch.Tensor | None,
    k_group: int,
    group_count: int,
    group_select_mode: int,
    renorm: int,
    norm_type: int,
) -> None:
    op = "npu_moe_gating_top_k"
    for name, tensor in (("bias", bias), ("input_ids", input_ids), ("tid2eid", tid2eid)):
        require_device(op, name, tensor, x)
    require_dim(op, "x", x, (2,))
    require_dtype(op, "x", x, _FLOATS)
    num_experts = x.size(1)
    if num_experts > _MAX_EXPERTS:
        reject(f"{op}: x must have at most {_MAX_EXPERTS} experts, but has {num_experts}")
    if bias is not None:
        # float64 exists for gradcheck, which leaves the bias as it is
        if bias.dtype != x.dtype and (x.dtype, bias.dtype) != (torch.float64, torch.float32):
            reject(f"{op}: bias must have the dtype of x, {dtype_name(x.dtype)}, but has {dtype_name(bias.dtype)}")
        require_dim(op, "bias", bias, (1,))
        if bias.size(0) != num_experts:
            reject(f"{op}: bias must have one element for each of {num_experts} experts, but has {bias.size(0)}")
    check_choices(op, renorm, norm_type)
    if group_select_mode not in (0, 1):
        reject(f"{op}: group_select_mode must be 0 or 1, but is {group_select_mode}")
    if group_count < 1 or num_experts % group_count != 0:
        reject(f"{op}: group_count must divide the number of experts {num_experts}, but is {group_count}")
    if not 1 <= k_group <= group_count:
        reject(f"{op}: k_group must be between 1 and group_count {group_count}, but is {k_group}")
    group_size = num_experts // group_count
    if group_size <= group_select_mode:
        reject(
            f"{op}: a group must have at least {group_select_mode + 1} experts with group_select_mode "
            f"{group_select_mode}, but has {group_size}"
        )
    if group_count * ((group_size + 31) // 32 * 32) > _MAX_EXPERTS:
        reject(
            f"{op}: the groups, each padded to a multiple of 32, must have at most {_MAX_EXPERTS} experts, "
            f"but there are {group_count} groups of {group_size}"
        )
    if not 1 <= k <= group_size * k_group:
        reject(
            f"{op}: k must be between 1 and the {group_size * k_group} experts of {k_group} groups of {group_size}, "
            f"but is {k}"
        )
    _check_hash(op, x, k, input_ids, tid2eid, k_group, group_count)


def _check_hash(
    op: str,
    x: torch.Tensor,
    k: int,
    input_ids: torch.Tensor | None,
    tid2eid: torch.Tensor | None,
    k_group: int,
    group_count: int,
) -> None:
    if input_ids is None or tid2eid is None:
        require(input_ids is None and tid2eid is None, f"{op}: input_ids and tid2eid must be given together")
        return
    require_dim(op, "input_ids", input_ids, (1,))
    require_dtype(op, "input_ids", input_ids, _INTS)
    require_dim(op, "tid2eid", tid2eid, (2,))
    require_dtype(op, "tid2eid", tid2eid, _INTS)
    if input_ids.size(0) != x.size(0):
        reject(f"{op}: input_ids must have one key for each of {x.size(0)} rows, but has {input_ids.size(0)}")
    if tid2eid.size(1) != k:
        reject(f"{op}: tid2eid must have k = {k} columns, but has {tid2eid.size(1)}")
    if k > _MAX_HASHED:
        reject(f"{op}: k must be at most {_MAX_HASHED} with tid2eid, but is {k}")
    if k_group != group_count and group_count != x.size(1):
        reject(f"{op}: tid2eid excludes groups, but k_group is {k_group} of {group_count}")


def _scores(x: torch.Tensor, norm_type: int) -> torch.Tensor:
    """What ranks and weights the experts, without bias; with finite derivatives everywhere."""
    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    if norm_type == SOFTMAX:
        return torch.softmax(x, -1, dtype=compute_dtype)
    x = x.to(compute_dtype)
    if norm_type == SIGMOID:
        return torch.sigmoid(x)
    softplus = torch.logaddexp(x, x.new_zeros(()))
    # the root has no derivative where the exponential underflows
    vanished = softplus == 0
    return softplus.masked_fill(vanished, 1).sqrt().masked_fill(vanished, 0)


def _drop_groups(scores: torch.Tensor, k_group: int, group_count: int, group_select_mode: int) -> torch.Tensor:
    """-inf for the experts of all but the k_group best groups."""
    grouped = scores.view(scores.size(0), group_count, scores.size(1) // group_count)
    group_scores = grouped.topk(1 if group_select_mode == _MAX_SUM else 2, dim=-1).values.sum(-1)
    dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, stable_top_k(group_scores, k_group)[1], False)
    return grouped.masked_fill(dropped.unsqueeze(-1), -torch.inf).view(scores.shape)


def _hashed(input_ids: torch.Tensor, tid2eid: torch.Tensor, num_experts: int) -> torch.Tensor:
    op = "npu_moe_gating_top_k"
    check_range(op, "input_ids", input_ids, tid2eid.size(0))
    expert_idx = tid2eid.index_select(0, input_ids)
    check_range(op, "tid2eid", expert_idx, num_experts)
    return expert_idx.long()


def _cpu(
    x: torch.Tensor,
    k: int,
    bias: torch.Tensor | None,
    input_ids: torch.Tensor | None,
    tid2eid: torch.Tensor | None,
    k_group: int,
    group_count: int,
    group_select_mode: int,
    renorm: int,
    norm_type: int,
    out_flag: bool,
    routed_scaling_factor: float,
    eps: float,
) -> _Gated:
    scores = _scores(x, norm_type).contiguous()
    if input_ids is not None and tid2eid is not None:
        expert_idx = _hashed(input_ids, tid2eid, x.size(1))
    else:
        biased = scores if bias is None else scores + bias.to(scores.dtype)
        if k_group < group_count:
            biased = _drop_groups(biased, k_group, group_count, group_select_mode)
        expert_idx = stable_top_k(biased, k)[1]
    weights = scores.gather(1, expert_idx)
    if is_normalized(norm_type, renorm):
        weights = weights / (weights.sum(1, keepdim=True) + eps)
    y = (weights * routed_scaling_factor).to(x.dtype)
    norm_out = scores if out_flag else torch.zeros_like(scores)
    return y, expert_idx.to(torch.int32, memory_format=torch.contiguous_format), norm_out


def _npu(
    x: torch.Tensor,
    k: int,
    bias: torch.Tensor | None,
    input_ids: torch.Tensor | None,
    tid2eid: torch.Tensor | None,
    k_group: int,
    group_count: int,
    group_select_mode: int,
    renorm: int,
    norm_type: int,
    out_flag: bool,
    routed_scaling_factor: float,
    eps: float,
) -> _Gated:
    if x.size(0) == 0:
        return _fake(x, k)
    return torch.ops.npu.npu_moe_gating_top_k(
        x,
        k,
        bias=bias,
        input_ids=input_ids,
        tid2eid=tid2eid,
        k_group=k_group,
        group_count=group_count,
        group_select_mode=group_select_mode,
        renorm=renorm if norm_type == SOFTMAX else 0,  # without effect elsewhere, and older kernels refuse 1
        norm_type=norm_type,
        out_flag=out_flag,
        routed_scaling_factor=routed_scaling_factor,
        eps=eps,
    )


def _fake(x: torch.Tensor, k: int, *_: Any) -> _Gated:
    shape = (x.size(0), k)
    norm_out = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int32), norm_out


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: _Gated) -> None:
    ctx.renorm, ctx.norm_type, _, ctx.routed_scaling_factor, ctx.eps = inputs[8:]
    # not norm_out: without out_flag it is unwritten memory on device, and torch_npu's own gradient is silently garbage
    ctx.save_for_backward(inputs[0], output[1])
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)  # zeros for results without a gradient would be launches on a device


def _backward(ctx: Any, dy: torch.Tensor | None, *_: torch.Tensor) -> tuple[Any, ...]:
    if dy is None:
        return (None,) * 13
    x, expert_idx = ctx.saved_tensors
    scores = _scores(x, ctx.norm_type)
    dx = gradient(scores, dy, expert_idx, ctx.renorm, ctx.norm_type, ctx.routed_scaling_factor, ctx.eps)
    return dx.to(x.dtype), *(None,) * 12


_op = register_op(
    "npu_moe_gating_top_k(Tensor x, int k, Tensor? bias, Tensor? input_ids, Tensor? tid2eid, int k_group, "
    "int group_count, int group_select_mode, int renorm, int norm_type, bool out_flag, float routed_scaling_factor, "
    "float eps) -> (Tensor, Tensor, Tensor)",
    cpu=_cpu,
    npu=_npu,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    differentiable=("x",),
)


@typed
def npu_moe_gating_top_k(
    x: torch.Tensor,
    k: int,
    *,
    bias: torch.Tensor | None = None,
    input_ids: torch.Tensor | None = None,
    tid2eid: torch.Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> _Gated:
    """The k best experts of each row, chosen by biased scores within the best groups, and their unbiased weights.

    Args:
        x: router logits ``[T, E]``, float16, bfloat16 or float32 (on CPU also float64), at most 2048 experts.
        k: experts per row, at most those of ``k_group`` groups.
        bias: ``[E]``, dtype of x; added to the scores for the choice of groups and experts, not for the weights.
        input_ids: ``[T]``, int32 or int64: rows of ``tid2eid``, which name the experts instead of the scores. Together
            with ``tid2eid``, without groups, k at most 64.
        tid2eid: ``[num_keys, k]``, int32 or int64: the experts of each key.
        k_group: groups that experts are chosen from.
        group_count: number of groups of consecutive experts, a divisor of E.
        group_select_mode: 0: a group is as good as its best expert. 1: as the sum of its two best.
        renorm: 1: divide softmax weights by their sum. Sigmoid and softplus weights always are.
        norm_type: scores are 0: softmax, 1: sigmoid, 2: square root of softplus.
        out_flag: whether to return the scores.
        routed_scaling_factor: factor of the weights, last.
        eps: added to the sum that weights are divided by.

    Returns:
        ``(y, expert_idx, norm_out)``: the weights ``[T, k]``, dtype of x, in the order of the *biased* scores; the
        experts ``[T, k]``, int32, ties to the lower one; the scores ``[T, E]``, float32 and without bias, or zeros
        (on NPU undefined) if ``out_flag`` is False. ``y`` has a gradient with respect to x, whatever ``out_flag`` is;
        ``norm_out`` has none.

    Raises:
        OperatorError: wrong rank, dtype or size, an option out of range, or one of the hash tensors without the other;
            on CPU also a key or an expert out of range.

    Example:
        >>> x = torch.tensor([[2.0, 0.0, -1.0, 1.0]])
        >>> y, expert_idx, _ = npu_moe_gating_top_k(x, 2, bias=torch.tensor([0.0, 1.0, 0.0, 0.0]), norm_type=1)
        >>> y, expert_idx
        (tensor([[0.3621, 0.6379]]), tensor([[1, 0]], dtype=torch.int32))
    """
    _check(x, k, bias, input_ids, tid2eid, k_group, group_count, group_select_mode, renorm, norm_type)
    return _op(
        x,
        k,
        bias,
        input_ids,
        tid2eid,
        k_group,
        group_count,
        group_select_mode,
        renorm,
        norm_type,
        out_flag,
        routed_scaling_factor,
        eps,
    )
