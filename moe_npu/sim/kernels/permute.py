"""Permutation of tokens by expert ids or by a routing map, the way back, and the gradients."""

from __future__ import annotations

from torch import Tensor

from moe_npu import ops
from moe_npu.sim.kernels.table import kernel


def _permute(tokens: Tensor, indices: Tensor, num_out_tokens: int, padded_mode: bool) -> tuple[Tensor, Tensor]:
    permuted, sorted_indices = ops.npu_moe_token_permute(tokens, indices, num_out_tokens, padded_mode)
    # 0 is no rows here, and all of them for the operator
    return permuted[:num_out_tokens], sorted_indices


def _permute_grad(
    grad_permuted_tokens: Tensor, sorted_indices: Tensor, num_topk: int, padded_mode: bool, grad_tokens: Tensor
) -> Tensor:
    return ops.npu_moe_token_permute_grad_v2(
        grad_permuted_tokens, sorted_indices, grad_tokens.size(0), grad_tokens.dtype, num_topk, padded_mode
    )


def _unpermute_grad(
    permuted_tokens: Tensor | None,
    grad_unpermuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None,
    padded_mode: bool,
    restore_shape: list[int],
    grad_permuted_tokens: Tensor,
) -> tuple[Tensor, Tensor | None]:
    return ops.npu_moe_token_unpermute_grad_v2(
        grad_unpermuted_tokens,
        sorted_indices,
        grad_permuted_tokens.size(0),
        grad_permuted_tokens.dtype,
        probs,
        padded_mode,
        restore_shape,
        permuted_tokens,
    )


kernel(
    "aclnnMoeTokenPermute",
    "tokens:T indices:T num_out_tokens:i padded_mode:b >permuted_tokens:T >sorted_indices:T",
    _permute,
)
kernel(
    "aclnnMoeTokenPermuteGrad",
    "grad_permuted_tokens:T sorted_indices:T num_topk:i padded_mode:b >>grad_tokens:T",
    _permute_grad,
)
kernel(
    "aclnnMoeTokenUnpermute",
    "permuted_tokens:T sorted_indices:T probs:T padded_mode:b restore_shape:A >out:T",
    ops.npu_moe_token_unpermute,
)
kernel(
    "aclnnMoeTokenUnpermuteGrad",
    "permuted_tokens:T grad_unpermuted_tokens:T sorted_indices:T probs:T padded_mode:b restore_shape:A "
    ">>grad_permuted_tokens:T >grad_probs:T",
    _unpermute_grad,
)
kernel(
    "aclnnMoeTokenPermuteWithRoutingMap",
    "tokens:T routing_map:T probs:T num_out_tokens:i drop_and_pad:b "
    ">permuted_tokens:T >permuted_probs:T >sorted_indices:T",
    ops.npu_moe_token_permute_with_routing_map,
)
kernel(
    "aclnnMoeTokenPermuteWithRoutingMapGrad",
    "permuted_token_out_grad:T probs_grad:T sorted_indices:T routing_map:T experts_num:i tokens_num:i drop_and_pad:b "
    ">tokens_grad:T >probs_grad_out:T",
    ops.npu_moe_token_permute_with_routing_map_grad,
)
kernel(
    "aclnnMoeTokenUnpermuteWithRoutingMap",
    "permuted_tokens:T sorted_indices:T routing_map:T probs:T drop_and_pad:b restore_shape:A "
    ">unpermuted_tokens:T >out_index:T >permuted_token_id:T >permute_probs:T",
    ops._npu_moe_token_unpermute_with_routing_map,
)
kernel(
    "aclnnMoeTokenUnpermuteWithRoutingMapGrad",
    "unpermuted_tokens_grad:T out_index:T permuted_token_id:T routing_map:T permuted_tokens:T probs:T drop_and_pad:b "
    "restore_shape:A >permuted_tokens_grad:T >probs_grad:T",
    ops.npu_moe_token_unpermute_with_routing_map_grad,
)
