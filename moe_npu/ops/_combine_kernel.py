"""The rules, the CPU kernel and the gradients of all combine operators (spec: routing 5.4, 5.5).

    out[t] = sum over j of term(t, j)  +  rows of shared experts  +  shared_expert_x[t]

    MoE expert        term = expert_scales[t, j] * row returned for the pair
    copy expert       term = expert_scales[t, j] * ori_x[t]
    constant expert   term = expert_scales[t, j] * (alpha_1 * ori_x[t] + alpha_2 * v)
    zero expert       term = 0

in float32, j ascending, rounded once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from moe_npu.ops._errors import (
    dtype_name,
    reject,
    require,
    require_device,
    require_dim,
    require_dtype,
    require_no_gradient,
)
from moe_npu.ops._expert_exchange import (
    Exchange,
    Topology,
    active_pairs,
    active_tokens,
    check_performance_info,
    check_topology,
    dtype_fact,
    open_exchange,
)
from moe_npu.ops._library import register_op

_GRAD = "npu_moe_distribute_combine_grad"
NUM_TENSORS = 14


class Call(NamedTuple):
    """The arguments of one call, checked, tensors first; the order is that of the v2 operator's schema."""

    expand_x: torch.Tensor
    expert_ids: torch.Tensor
    handle: torch.Tensor  # expand_idx or assist_info_for_combine
    ep_send_counts: torch.Tensor
    expert_scales: torch.Tensor
    tp_send_counts: torch.Tensor | None
    x_active_mask: torch.Tensor | None
    expand_scales: torch.Tensor | None
    shared_expert_x: torch.Tensor | None
    performance_info: torch.Tensor | None
    ori_x: torch.Tensor | None
    const_expert_alpha_1: torch.Tensor | None
    const_expert_alpha_2: torch.Tensor | None
    const_expert_v: torch.Tensor | None
    group_ep: str
    ep_world_size: int
    ep_rank_id: int
    moe_expert_num: int
    group_tp: str
    tp_world_size: int
    tp_rank_id: int
    shared_expert_num: int
    shared_expert_rank_num: int
    global_bs: int
    comm_quant_mode: int
    comm_alg: str = ""
    zero_expert_num: int = 0
    copy_expert_num: int = 0
    const_expert_num: int = 0

    @property
    def num_special(self) -> int:
        """Experts that live nowhere."""
        return self.zero_expert_num + self.copy_expert_num + self.const_expert_num

    @property
    def topology(self) -> Topology:
        """What dispatch and combine have in common."""
        return Topology(**{name: getattr(self, name) for name in Topology._fields})

    @property
    def constants(self) -> tuple[torch.Tensor, ...]:
        """alpha_1, alpha_2 and v of constant experts."""
        tensors = (self.const_expert_alpha_1, self.const_expert_alpha_2, self.const_expert_v)
        return tuple(tensor for tensor in tensors if tensor is not None)

    @property
    def out_dtype(self) -> torch.dtype:
        """Integer rows become bfloat16."""
        return self.expand_x.dtype if self.expand_x.is_floating_point() else torch.bfloat16

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of the sum."""
        return torch.promote_types(self.expand_x.dtype, torch.float32)


# ---------------------------------------------------------------- rules


def check_reserved(
    op: str,
    activation_scale: torch.Tensor | None = None,
    weight_scale: torch.Tensor | None = None,
    group_list: torch.Tensor | None = None,
    out_dtype: int = 0,
    group_list_type: int = 0,
    *,
    elastic_info: torch.Tensor | None = None,
    expert_shard_type: int,
) -> None:
    """Arguments that no device has a use for."""
    for name, tensor in (
        ("activation_scale", activation_scale),
        ("weight_scale", weight_scale),
        ("group_list", group_list),
        ("elastic_info", elastic_info),
    ):
        require(tensor is None, f"{op}: {name} must be None, it is reserved")
    for name, value in (
        ("out_dtype", out_dtype),
        ("group_list_type", group_list_type),
        ("expert_shard_type", expert_shard_type),
    ):
        if value != 0:
            reject(f"{op}: {name} must be 0, other values are reserved, but is {value}")


def check(op: str, call: Call) -> None:
    """Every rule of combine."""
    expand_x, expert_ids = call.expand_x, call.expert_ids
    require_dim(op, "expand_x", expand_x, (2,))
    floats = (torch.float16, torch.bfloat16) + ((torch.float32,) if expand_x.device.type in ("cpu", "meta") else ())
    require_dtype(op, "expand_x", expand_x, (*floats, torch.int32))
    for name, value in zip(Call._fields[7:14], call[7:14], strict=True):
        require_device(op, name, value, expand_x)
    check_performance_info(op, call.performance_info, call.ep_world_size)
    check_topology(op, expand_x, expert_ids, call.x_active_mask, call.topology)
    for name, handle in (
        ("expand_idx or assist_info_for_combine", call.handle),
        ("ep_send_counts", call.ep_send_counts),
    ):
        require_device(op, name, handle, expand_x)
        require_dtype(op, name, handle, (torch.int32,))
    require_dim(op, "ep_send_counts", call.ep_send_counts, (1,))
    num_counts = call.ep_world_size * call.topology.num_local(call.ep_rank_id)
    if call.ep_send_counts.size(0) < num_counts:
        reject(f"{op}: ep_send_counts must have {num_counts} entries, but has {call.ep_send_counts.size(0)}")
    require_device(op, "expert_scales", call.expert_scales, expand_x)
    require_dtype(op, "expert_scales", call.expert_scales, (torch.float32,))
    if call.expert_scales.shape != expert_ids.shape:
        reject(
            f"{op}: expert_scales must have the shape of expert_ids {tuple(expert_ids.shape)}, "
            f"but has {tuple(call.expert_scales.shape)}"
        )
    if call.tp_world_size == 2:
        _check_lanes(op, call.tp_send_counts, expand_x)
    if call.comm_quant_mode not in (0, 2):
        reject(f"{op}: comm_quant_mode must be 0 (none) or 2 (int8 on the way back), but is {call.comm_quant_mode}")
    require_no_gradient(op, "expand_scales", call.expand_scales)
    if call.shared_expert_x is not None:
        _check_shared(op, call, call.shared_expert_x)
    _check_special(op, call)


def _check_lanes(op: str, tp_send_counts: torch.Tensor | None, expand_x: torch.Tensor) -> None:
    if tp_send_counts is None:
        reject(f"{op}: tp_send_counts must be given with tp_world_size 2, but is None")
    require_device(op, "tp_send_counts", tp_send_counts, expand_x)
    require_dtype(op, "tp_send_counts", tp_send_counts, (torch.int32,))
    if tp_send_counts.dim() != 1 or tp_send_counts.size(0) < 2:
        reject(f"{op}: tp_send_counts must have one entry per lane, but has shape {tuple(tp_send_counts.shape)}")


def _check_shared(op: str, call: Call, shared_expert_x: torch.Tensor) -> None:
    require(
        call.shared_expert_rank_num == 0,
        f"{op}: shared_expert_x must be None where ranks host shared experts, whose rows arrive anyway",
    )
    require_dim(op, "shared_expert_x", shared_expert_x, (2, 3))
    require_dtype(op, "shared_expert_x", shared_expert_x, (call.out_dtype,))
    tokens, columns = call.expert_ids.size(0), call.expand_x.size(1)
    if shared_expert_x.size(-1) != columns or shared_expert_x.numel() != tokens * columns:
        reject(
            f"{op}: shared_expert_x must have one row of {columns} columns for each of {tokens} tokens, "
            f"but has shape {tuple(shared_expert_x.shape)}"
        )


def _check_special(op: str, call: Call) -> None:
    for name, count in zip(Call._fields[-3:], call[-3:], strict=True):
        if count < 0:
            reject(f"{op}: {name} must not be negative, but is {count}")
    tokens, columns, constants = call.expert_ids.size(0), call.expand_x.size(1), call.const_expert_num
    needed = {"ori_x": ((tokens, columns), call.copy_expert_num + constants)}
    for name in ("const_expert_alpha_1", "const_expert_alpha_2", "const_expert_v"):
        needed[name] = ((constants, columns), constants)
    for name, (shape, is_needed) in needed.items():
        tensor = getattr(call, name)
        if not is_needed:
            continue
        if tensor is None:
            kinds = "copy and constant" if name == "ori_x" else "constant"
            reject(f"{op}: {name} must be given for {kinds} experts, but is None")
        if tensor.dtype != call.out_dtype:
            reject(f"{op}: {name} must have dtype {dtype_name(call.out_dtype)}, but has {dtype_name(tensor.dtype)}")
        if tensor.shape != shape:
            reject(f"{op}: {name} must have shape {tuple(shape)}, but has {tuple(tensor.shape)}")


# ---------------------------------------------------------------- CPU


def _returned(op: str, call: Call) -> tuple[Exchange, torch.Tensor]:
    """The rows of the experts back at their tokens, in the order of the outgoing pairs."""
    lane_rows = None
    if call.tp_world_size == 2 and call.tp_send_counts is not None:
        lane_rows = call.tp_send_counts[:2].tolist()
    exchange = open_exchange(
        op,
        call.topology,
        call.expert_ids,
        call.x_active_mask,
        {"columns of expand_x": call.expand_x.size(1), **dtype_fact(call.expand_x)},
        received=call.ep_send_counts,
        lane_rows=lane_rows,
        num_rows=call.expand_x.size(0),
    )
    return exchange, exchange.to_tokens(exchange.add_lanes(call.expand_x))


def combine_cpu(op: str, call: Call) -> torch.Tensor:
    """The definition."""
    exchange, rows = _returned(op, call)
    rows = rows.to(call.compute_dtype)
    num_tokens, top_k = call.expert_ids.shape
    positions = exchange.pairs.positions(num_tokens, top_k + call.topology.num_shared)
    out = torch.zeros(num_tokens, rows.size(1), dtype=call.compute_dtype)
    for slot in range(positions.size(1)):
        tokens = (positions[:, slot] >= 0).nonzero().squeeze(1)
        terms = rows.index_select(0, positions[tokens, slot])
        if slot < top_k:
            terms *= call.expert_scales[tokens, slot, None].to(call.compute_dtype)
            _add_special(out, call, slot)
        out.index_add_(0, tokens, terms)
    if call.shared_expert_x is not None:
        out += active_tokens(call.shared_expert_x.reshape(out.shape).to(call.compute_dtype), call.x_active_mask)
    return out.to(call.out_dtype)


def _add_special(out: torch.Tensor, call: Call, slot: int) -> None:
    """Add the terms of copy and constant experts in one slot."""
    if call.ori_x is None or call.num_special == call.zero_expert_num:
        return
    first_copy = call.moe_expert_num + call.zero_expert_num
    experts = call.expert_ids[:, slot].long() - first_copy
    chosen = (active_pairs(call.expert_ids, call.x_active_mask)[:, slot] & (experts >= 0)).nonzero().squeeze(1)
    values = call.ori_x.index_select(0, chosen).to(out.dtype)
    constants = experts[chosen] - call.copy_expert_num
    for expert in range(call.const_expert_num):
        alpha_1, alpha_2, v = (tensor[expert].to(out.dtype) for tensor in call.constants)
        which = (constants == expert).nonzero().squeeze(1)
        values[which] = alpha_1 * values[which] + alpha_2 * v
    out.index_add_(0, chosen, values * call.expert_scales[chosen, slot, None].to(out.dtype))


def combine_fake(call: Call) -> torch.Tensor:
    """An uninitialized result."""
    return call.expand_x.new_empty(call.expert_ids.size(0), call.expand_x.size(1), dtype=call.out_dtype)


# ---------------------------------------------------------------- gradient of the rows and their weights


def _grad_call(args: tuple[Any, ...]) -> Call:
    _, expand_x, expert_ids, ep_send_counts, expert_scales, tp_send_counts, mask, *topology, num_special, _ = args
    tensors = (expand_x, expert_ids, ep_send_counts, ep_send_counts, expert_scales, tp_send_counts, mask, *[None] * 7)
    return Call(*(*tensors, *topology, 0, "", num_special))


def _grad_cpu(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    call, dout, with_shared = _grad_call(args), args[0], args[-1]
    exchange, rows = _returned(_GRAD, call)
    tokens, slots, _ = exchange.pairs
    num_tokens, top_k = call.expert_ids.shape
    drows = dout.to(call.compute_dtype).index_select(0, tokens)
    weighted = slots < top_k
    dexpert_scales = torch.zeros(num_tokens, top_k, dtype=call.expert_scales.dtype)
    products = (drows * rows.to(call.compute_dtype)).sum(1).to(dexpert_scales.dtype)
    dexpert_scales[tokens[weighted], slots[weighted]] = products[weighted]
    shared = call.expert_scales.new_full((num_tokens, call.topology.num_shared), float(with_shared))
    weights = torch.cat([call.expert_scales, shared], 1)[tokens, slots]
    drows *= weights.unsqueeze(1).to(call.compute_dtype)
    arrived = exchange.join_lanes(exchange.to_experts(drows.to(call.expand_x.dtype)))
    dexpand_x = torch.zeros_like(call.expand_x, memory_format=torch.contiguous_format)
    dexpand_x[: arrived.size(0)] = arrived
    return dexpand_x, dexpert_scales


def _grad_npu(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    # a kernel would have to send the weights along with the rows, which only the hierarchical algorithm does
    reject("npu_moe_distribute_combine: expand_x and expert_scales have a gradient on CPU only; detach them")


def _grad_fake(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    call = _grad_call(args)
    return call.expand_x.new_empty(call.expand_x.shape), call.expert_scales.new_empty(call.expert_scales.shape)


def _grad_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.attributes = inputs[7:]


def _grad_backward(ctx: Any, ddexpand_x: torch.Tensor, ddexpert_scales: torch.Tensor) -> tuple[Any, ...]:
    # with D for the way to the experts and R for the way back, the operator is dexpand_x = D(expert_scales * dout) and
    # dexpert_scales = dout . R(expand_x): what follows is the derivative of ddexpand_x . D(...) + ddexpert_scales * ...
    dout, expand_x, expert_ids, ep_send_counts, expert_scales, tp_send_counts, mask = ctx.saved_tensors
    *topology, num_special, with_shared = ctx.attributes
    handles = (expert_ids, ep_send_counts, ep_send_counts)

    def weighted(rows: torch.Tensor, weights: torch.Tensor, has_shared: bool) -> torch.Tensor:
        def combined(weights: torch.Tensor) -> torch.Tensor:
            tensors = (rows.contiguous(), *handles, weights.contiguous(), tp_send_counts, mask, *[None] * 7)
            return torch.ops.moe_npu.npu_moe_distribute_combine_v2.default(
                *tensors, *topology, 0, "", num_special, 0, 0
            )

        total = combined(weights)
        has_rows = topology[8] > 0  # ranks with shared experts, whose rows the operator always adds
        return total - combined(torch.zeros_like(weights)) if has_rows and not has_shared else total

    def grad(rows: torch.Tensor, weights: torch.Tensor, has_shared: bool) -> tuple[torch.Tensor, torch.Tensor]:
        tensors = (rows.contiguous(), expert_ids, ep_send_counts, weights.contiguous(), tp_send_counts, mask)
        return grad_op(dout, *tensors, *topology, num_special, has_shared)

    ddout = weighted(ddexpand_x, expert_scales, with_shared) + weighted(expand_x, ddexpert_scales, False)
    _, dexpert_scales = grad(ddexpand_x, expert_scales, with_shared)
    dexpand_x, _ = grad(expand_x, ddexpert_scales, False)
    return ddout, dexpand_x, None, None, dexpert_scales, *[None] * 14


grad_op = register_op(
    "npu_moe_distribute_combine_grad(Tensor dout, Tensor expand_x, Tensor expert_ids, Tensor ep_send_counts,"
    " Tensor expert_scales, Tensor? tp_send_counts, Tensor? x_active_mask, str group_ep, int ep_world_size,"
    " int ep_rank_id, int moe_expert_num, str group_tp, int tp_world_size, int tp_rank_id, int shared_expert_num,"
    " int shared_expert_rank_num, SymInt global_bs, int num_special, bool with_shared) -> (Tensor, Tensor)",
    cpu=_grad_cpu,
    npu=_grad_npu,
    fake=_grad_fake,
    setup_context=_grad_setup_context,
    backward=_grad_backward,
    is_lowered=False,
)


# ---------------------------------------------------------------- gradients of combine


def save(ctx: Any, call: Call, *others: torch.Tensor) -> None:
    """Keep for :func:`gradients` what it needs, and after it ``others``."""
    unused = dict.fromkeys(("handle", "expand_scales", "shared_expert_x", "performance_info"))
    tensors = {**call._asdict(), **unused}
    ctx.save_for_backward(*list(tensors.values())[:NUM_TENSORS], *others)
    ctx.attributes = call[NUM_TENSORS:]
    ctx.shared_shape = None if call.shared_expert_x is None else call.shared_expert_x.shape


def gradients(ctx: Any, call: Call, dout: torch.Tensor, needs: dict[str, bool]) -> dict[str, torch.Tensor]:
    """The gradients of the arguments in ``needs``, by name; ``call`` is what :func:`save` kept."""
    grads: dict[str, torch.Tensor] = {}
    dout = dout.contiguous()
    if needs.get("expand_x") or needs.get("expert_scales"):
        tensors = (call.expand_x, call.expert_ids, call.ep_send_counts, call.expert_scales)
        grads["expand_x"], grads["expert_scales"] = grad_op(
            dout, *tensors, call.tp_send_counts, call.x_active_mask, *call.topology, True
        )
    if needs.get("shared_expert_x"):
        grads["shared_expert_x"] = active_tokens(dout.to(call.out_dtype), call.x_active_mask).reshape(ctx.shared_shape)
    if call.ori_x is not None and call.num_special > call.zero_expert_num:
        for name, gradient in _special_gradients(call, dout, call.ori_x).items():
            grads[name] = grads[name] + gradient if name in grads else gradient
    elif needs.get("ori_x") and call.ori_x is not None:
        grads["ori_x"] = torch.zeros_like(call.ori_x)
    return {name: gradient for name, gradient in grads.items() if needs.get(name)}


def _special_gradients(call: Call, dout: torch.Tensor, ori_x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of copy and constant experts, whose terms are sums over (token, constant expert) of products."""
    dtype = call.compute_dtype
    dout, tokens = dout.to(dtype), ori_x.to(dtype)
    experts = call.expert_ids.long() - (call.moe_expert_num + call.zero_expert_num)
    experts = torch.where(active_pairs(call.expert_ids, call.x_active_mask), experts, -1)
    weights = call.expert_scales.to(dtype)
    copies = ((experts >= 0) & (experts < call.copy_expert_num)).to(dtype)  # [T, K]
    dtokens = dout * (weights * copies).sum(1, keepdim=True)
    dweights = copies * (dout * tokens).sum(1, keepdim=True)
    grads = {}
    if call.const_expert_num:
        constants = torch.arange(call.const_expert_num, device=dout.device) + call.copy_expert_num
        chosen = (experts.unsqueeze(2) == constants).to(dtype)  # [T, K, C]
        per_expert = (weights.unsqueeze(2) * chosen).sum(1)  # [T, C]
        alpha_1, alpha_2, v = (tensor.to(dtype) for tensor in call.constants)
        dtokens = dtokens + dout * (per_expert @ alpha_1)
        products = (dout * tokens) @ alpha_1.t() + dout @ (alpha_2 * v).t()  # [T, C]
        dweights = dweights + (chosen * products.unsqueeze(1)).sum(2)
        dscaled = per_expert.t() @ dout  # gradient of alpha_2 * v
        grads = {
            "const_expert_alpha_1": (per_expert.t() @ (dout * tokens)).to(call.out_dtype),
            "const_expert_alpha_2": (dscaled * v).to(call.out_dtype),
            "const_expert_v": (dscaled * alpha_2).to(call.out_dtype),
        }
    return {
        "ori_x": dtokens.to(ori_x.dtype),
        "expert_scales": dweights.to(call.expert_scales.dtype),
        **grads,
    }
