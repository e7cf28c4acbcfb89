"""What every router is and returns, and the sequence of computations that most of them share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from moe_npu import ops

ScoreFunction = Literal["softmax", "sigmoid", "sqrt_softplus"]

_NORM_TYPES = {"softmax": 0, "sigmoid": 1, "sqrt_softplus": 2}  # as the operator numbers them
_GROUP_MODES = {"max": 0, "top2_sum": 1}
_MAX_EXPERTS = 2048  # of the operator, which pads groups to a multiple of 32
_PADDED = 32


class RouterOutput(NamedTuple):
    """The decision of a router for T tokens.

    Attributes:
        router_logits: ``[T, E]``, before scoring; what load-balancing losses take.
        topk_weights: ``[T, K]``, the weight of each chosen expert.
        topk_ids: ``[T, K]`` int32, the chosen experts, best first, the lower one where two are equal.
    """

    router_logits: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor


class Router(nn.Module, ABC):
    """Chooses ``top_k`` of ``num_experts`` experts for each token.

    Attributes:
        scales_input: whether the weights scale what enters the experts, instead of what leaves them.
    """

    scales_input: ClassVar[bool] = False

    def __init__(self, num_experts: int, top_k: int) -> None:
        super().__init__()
        if not isinstance(top_k, int) or not isinstance(num_experts, int) or not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k must be a whole number from 1 to num_experts = {num_experts!r}, but is {top_k!r}")
        self.num_experts = num_experts
        self.top_k = top_k

    @abstractmethod
    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        topk_ids: torch.Tensor | None = None,
        token_ids: torch.Tensor | None = None,
    ) -> RouterOutput:
        """Route tokens.

        Args:
            hidden_states: ``[T, H]``.
            topk_ids: ``[T, K]``, int32 or int64: the experts that are used instead of the best ones. They get the
                weights that the router gives to them, with their gradient.
            token_ids: ``[T]``, int32 or int64: what the tokens are; for routers that look at it.
        """


class LinearRouter(Router):
    """Logits by a linear map, scores, a choice by scores, and weights from the scores that were chosen.

    ::

        logits  = softcap((x @ weight.T + bias) * logit_scale)
        scores  = softmax(logits), sigmoid(logits) or sqrt(softplus(logits))
        ids     = top_k(scores + e_score_correction_bias), among the experts of the best groups
        weights = scores[ids];  weights / (sum + norm_eps) if norm_topk_prob;  * routed_scaling_factor

    The subclasses say which scores. Ties are decided for the lower expert, also where ``torch.topk`` would not.

    Args:
        hidden_size: H.
        num_experts: E.
        top_k: K.
        norm_topk_prob: divide the K weights of a token by their sum.
        norm_eps: added to that sum.
        norm_min: lower bound of that sum.
        routed_scaling_factor: factor of the weights, last.
        bias: whether the linear map has a bias.
        has_correction_bias: whether there is a buffer ``e_score_correction_bias`` ``[E]``, float32, that is added to
            what experts are chosen by and leaves the weights alone.
        logit_scale: factor of the logits.
        logit_softcap: bound c of the logits, which become ``c * tanh(logits / c)``, in the dtype of the scores.
        logits_dtype: what the linear map is computed in; the dtype of its weight by default. Under autocast that of
            autocast, as for every linear layer.
        scores_dtype: what scores, choice and weights are computed in, or the dtype of the logits if that has more
            bits. None: the dtype of the logits, also where this is half precision.
        weights_dtype: dtype of the result. None: the dtype of the logits. ``"input"``: that of ``hidden_states``.
        num_groups: number of groups of consecutive experts.
        topk_groups: number of groups that experts are chosen from.
        group_score: a group is as good as its best expert (``"max"``) or as the sum of its two best
            (``"top2_sum"``).
        group_fill: what takes the place of the scores in the other groups. With 0 in place of -inf, experts there are
            better than those with a negative score.
        selects_by: experts are chosen by their scores, or by their logits, to which the correction bias is added then.
        follows_autocast: False: the linear map ignores autocast.
        device: device of parameters and buffers.
        dtype: dtype of the parameters.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    score_function: ScoreFunction

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        norm_topk_prob: bool,
        norm_eps: float = 0.0,
        norm_min: float | None = None,
        routed_scaling_factor: float = 1.0,
        bias: bool = False,
        has_correction_bias: bool = False,
        logit_scale: float = 1.0,
        logit_softcap: float | None = None,
        logits_dtype: torch.dtype | None = None,
        scores_dtype: torch.dtype | None = torch.float32,
        weights_dtype: torch.dtype | Literal["input"] | None = None,
        num_groups: int = 1,
        topk_groups: int = 1,
        group_score: Literal["max", "top2_sum"] = "max",
        group_fill: float = -math.inf,
        selects_by: Literal["scores", "logits"] = "scores",
        follows_autocast: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_experts, top_k)
        _check_groups(num_experts, top_k, num_groups, topk_groups, group_score)
        if selects_by not in ("scores", "logits"):
            raise ValueError(f"selects_by must be 'scores' or 'logits', but is {selects_by!r}")
        if logit_softcap is not None and logit_softcap <= 0:
            raise ValueError(f"logit_softcap must be positive, or None for no bound, but is {logit_softcap}")
        self.hidden_size = hidden_size
        self.norm_topk_prob = norm_topk_prob
        self.norm_eps = norm_eps
        self.norm_min = norm_min
        self.routed_scaling_factor = routed_scaling_factor
        self.logit_scale = logit_scale
        self.logit_softcap = logit_softcap
        self.logits_dtype = logits_dtype
        self.scores_dtype = scores_dtype
        self.weights_dtype = weights_dtype
        self.num_groups = num_groups
        self.topk_groups = topk_groups
        self.group_score = group_score
        self.group_fill = group_fill
        self.selects_by = selects_by
        self.follows_autocast = follows_autocast
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype)) if bias else None
        correction_bias = torch.empty(num_experts, device=device, dtype=torch.float32) if has_correction_bias else None
        self.register_buffer("e_score_correction_bias", correction_bias)
        self.e_score_correction_bias: torch.Tensor | None
        LinearRouter.reset_parameters(self)

    def reset_parameters(self) -> None:
        """Fill weight and bias as ``nn.Linear`` does, and the correction bias with zeros."""
        bound = 1 / math.sqrt(self.hidden_size)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        if self.e_score_correction_bias is not None:
            nn.init.zeros_(self.e_score_correction_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        topk_ids: torch.Tensor | None = None,
        token_ids: torch.Tensor | None = None,
    ) -> RouterOutput:
        """Route tokens ``[T, H]``; :class:`Router` has the arguments.

        Raises:
            ValueError: ``hidden_states`` or ``topk_ids`` has the wrong shape.
            TypeError: ``topk_ids`` is not int32 or int64.
        """
        self._check_tokens(hidden_states, topk_ids)
        router_logits = self._logits(hidden_states)  # [T, E]
        if topk_ids is None:
            topk_weights, topk_ids = self._route(router_logits, token_ids)  # [T, K]
        else:
            topk_weights = self._weigh_forced(router_logits, topk_ids.long())  # [T, K]
        return RouterOutput(
            router_logits, topk_weights.to(self._result_dtype(hidden_states, router_logits)), _int32(topk_ids)
        )

    # ---------------------------------------------------------------- the steps

    def _logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dtype = self.weight.dtype if self.logits_dtype is None else self.logits_dtype
        with nullcontext() if self.follows_autocast else _no_autocast(hidden_states.device.type):
            logits = F.linear(
                self._prepare(hidden_states).to(dtype),
                self.weight.to(dtype),
                None if self.bias is None else self.bias.to(dtype),
            )  # [T, E]
        if self.logit_scale != 1:
            logits = logits * self.logit_scale
        if self.logit_softcap is not None:
            logits = torch.tanh(self._as_scores(logits) / self.logit_softcap) * self.logit_softcap
        return logits

    def _prepare(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What the linear map is applied to."""
        return hidden_states

    def _route(self, logits: torch.Tensor, token_ids: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and ids ``[T, K]`` of the best experts."""
        if self._is_plain_softmax(logits):
            return self._gate_softmax(logits)
        if self._is_one_operator(logits):
            return self._gate(logits)
        scores = self._score(logits)  # [T, E]
        topk_ids = self._choose(logits, scores)  # [T, K]
        return self._weigh(scores, topk_ids), topk_ids

    def _weigh_forced(self, logits: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        """Weights of given experts, equal to those of :meth:`_route` if it chooses the same."""
        if self.norm_topk_prob and self._is_plain_softmax(logits):
            return self._scale(torch.softmax(self._as_scores(logits.gather(1, topk_ids)), -1))
        return self._weigh(self._score(logits), topk_ids)

    def _score(self, logits: torch.Tensor) -> torch.Tensor:
        """Scores of all experts ``[T, E]``, in the dtype of scores."""
        logits = self._as_scores(logits)
        if self.score_function == "softmax":
            return torch.softmax(logits, -1)
        if self.score_function == "sigmoid":
            return torch.sigmoid(logits)
        return sqrt_softplus(logits)

    def _choose(self, logits: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Ids of the best experts ``[T, K]``, int64."""
        ranking = (self._as_scores(logits) if self.selects_by == "logits" else scores).detach()  # [T, E]
        if self.e_score_correction_bias is not None:
            ranking = ranking + self.e_score_correction_bias
        if self.topk_groups < self.num_groups:
            grouped = ranking.unflatten(1, (self.num_groups, -1))  # [T, groups, E / groups]
            best_of_group = grouped.amax(-1) if self.group_score == "max" else grouped.topk(2).values.sum(-1)
            dropped = torch.ones_like(best_of_group, dtype=torch.bool)
            dropped = dropped.scatter(1, _best(best_of_group, self.topk_groups), False)
            ranking = grouped.masked_fill(dropped.unsqueeze(-1), self.group_fill).flatten(1)
        return _best(ranking, self.top_k)

    def _weigh(self, scores: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        """Weights of the experts ``topk_ids``."""
        return self._normalize(scores.gather(1, topk_ids))

    def _normalize(self, chosen: torch.Tensor) -> torch.Tensor:
        if self.norm_topk_prob:
            total = chosen.sum(-1, keepdim=True)
            if self.norm_min is not None:
                total = total.clamp(min=self.norm_min)
            chosen = chosen / (total + self.norm_eps if self.norm_eps else total)
        return self._scale(chosen)

    def _scale(self, weights: torch.Tensor) -> torch.Tensor:
        return weights if self.routed_scaling_factor == 1 else weights * self.routed_scaling_factor

    # ---------------------------------------------------------------- the steps after the logits as one operator

    def _is_plain_softmax(self, logits: torch.Tensor) -> bool:
        """Whether :meth:`_gate_softmax` computes the same."""
        return (
            self.score_function == "softmax"
            and self._computes_in_float32(logits)
            and self.selects_by == "scores"
            and self.e_score_correction_bias is None
            and self.topk_groups == self.num_groups
            and not (self.norm_topk_prob and (self.norm_eps or self.norm_min is not None))
        )

    def _gate_softmax(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.weights_dtype is not None or self.routed_scaling_factor != 1:
            logits = self._as_scores(logits)  # the operator rounds to the dtype of its input
        # the softmax of the k best logits is that of all logits, its k best values divided by their sum
        weights, topk_ids, _ = ops.npu_moe_gating_top_k_softmax_v2(
            logits, k=self.top_k, renorm=int(self.norm_topk_prob)
        )  # [T, K]
        return self._scale(weights), topk_ids

    def _is_one_operator(self, logits: torch.Tensor) -> bool:
        """Whether :meth:`_gate` computes the same, to the bit but for the order of additions."""
        group_size = -(-self.num_experts // self.num_groups // _PADDED) * _PADDED
        dropped_never_chosen = self.group_fill == -math.inf or (
            self.score_function == "softmax" and self.e_score_correction_bias is None and self.group_fill == 0
        )
        # the operator always normalizes what is not a softmax; a softmax is normalized here, as not every kernel can
        is_normalized_alike = self.score_function == "softmax" or (self.norm_topk_prob and self.norm_min is None)
        return (
            self._computes_in_float32(logits)
            and self.selects_by == "scores"
            and is_normalized_alike
            and (self.topk_groups == self.num_groups or dropped_never_chosen)
            and self.num_experts <= _MAX_EXPERTS
            and self.num_groups * group_size <= _MAX_EXPERTS
        )

    def _gate(
        self, logits: torch.Tensor, token_ids: torch.Tensor | None = None, tid2eid: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self._as_scores(logits)
        is_softmax = self.score_function == "softmax"
        bias = self.e_score_correction_bias
        weights, topk_ids, _ = ops.npu_moe_gating_top_k(
            logits,
            self.top_k,
            bias=None if bias is None else bias.to(logits.dtype),
            input_ids=token_ids,
            tid2eid=tid2eid,
            k_group=self.topk_groups,
            group_count=self.num_groups,
            group_select_mode=_GROUP_MODES[self.group_score],
            norm_type=_NORM_TYPES[self.score_function],
            routed_scaling_factor=1.0 if is_softmax else self.routed_scaling_factor,
            eps=self.norm_eps,
        )
        return self._normalize(weights) if is_softmax else weights, topk_ids

    # ---------------------------------------------------------------- dtypes and checks

    def _computes_in_float32(self, logits: torch.Tensor) -> bool:
        return self._score_dtype(logits) in (torch.float32, torch.float64)

    def _score_dtype(self, logits: torch.Tensor) -> torch.dtype:
        return logits.dtype if self.scores_dtype is None else torch.promote_types(logits.dtype, self.scores_dtype)

    def _as_scores(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.to(self._score_dtype(logits))

    def _result_dtype(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> torch.dtype:
        if self.weights_dtype == "input":
            return hidden_states.dtype
        return logits.dtype if self.weights_dtype is None else self.weights_dtype

    def _check_tokens(self, hidden_states: torch.Tensor, topk_ids: torch.Tensor | None) -> None:
        if hidden_states.dim() != 2 or hidden_states.size(1) != self.hidden_size:
            raise ValueError(
                f"hidden_states must be [tokens, hidden_size = {self.hidden_size}], but is {list(hidden_states.shape)}"
            )
        if topk_ids is None:
            return
        check_integers("topk_ids", topk_ids)
        if topk_ids.shape != (hidden_states.size(0), self.top_k):
            raise ValueError(
                f"topk_ids must be [tokens = {hidden_states.size(0)}, top_k = {self.top_k}], "
                f"but is {list(topk_ids.shape)}"
            )

    def extra_repr(self) -> str:
        """The sizes, and what is not the default."""
        parts = [f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, top_k={self.top_k}"]
        parts.append(f"norm_topk_prob={self.norm_topk_prob}")
        if self.num_groups > 1:
            parts.append(
                f"num_groups={self.num_groups}, topk_groups={self.topk_groups}, group_score={self.group_score!r}"
            )
        if self.routed_scaling_factor != 1:
            parts.append(f"routed_scaling_factor={self.routed_scaling_factor}")
        if self.bias is not None:
            parts.append("bias=True")
        if self.e_score_correction_bias is not None:
            parts.append("has_correction_bias=True")
        if self.selects_by != "scores":
            parts.append(f"selects_by={self.selects_by!r}")
        if self.logit_scale != 1:
            parts.append(f"logit_scale={self.logit_scale}")
        if self.logit_softcap is not None:
            parts.append(f"logit_softcap={self.logit_softcap}")
        return ", ".join(parts)


def sqrt_softplus(logits: torch.Tensor) -> torch.Tensor:
    """The square root of the softplus, elementwise; its gradient is 0 where the value is."""
    softplus = torch.logaddexp(logits, logits.new_zeros(()))
    # the root has no derivative where the exponential underflows
    vanished = softplus == 0
    return softplus.masked_fill(vanished, 1).sqrt().masked_fill(vanished, 0)


def check_score_function(score_function: str) -> None:
    """Refuse names that are none of :data:`ScoreFunction`."""
    if score_function not in _NORM_TYPES:
        raise ValueError(f"score_function must be 'softmax', 'sigmoid' or 'sqrt_softplus', but is {score_function!r}")


def check_integers(name: str, ids: torch.Tensor) -> None:
    """Raise unless ``ids`` is int32 or int64."""
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, but is {str(ids.dtype).removeprefix('torch.')}")


def _check_groups(num_experts: int, top_k: int, num_groups: int, topk_groups: int, group_score: str) -> None:
    if group_score not in _GROUP_MODES:
        raise ValueError(f"group_score must be 'max' or 'top2_sum', but is {group_score!r}")
    if num_groups < 1 or num_experts % num_groups != 0:
        raise ValueError(f"num_groups must divide num_experts = {num_experts}, but is {num_groups}")
    if not 1 <= topk_groups <= num_groups:
        raise ValueError(f"topk_groups must be between 1 and num_groups = {num_groups}, but is {topk_groups}")
    group_size = num_experts // num_groups
    if group_score == "top2_sum" and num_groups > 1 and group_size < 2:
        raise ValueError(
            f"group_score 'top2_sum' needs groups of at least 2 experts, but num_groups = {num_groups} has 1"
        )
    if top_k > topk_groups * group_size:
        raise ValueError(
            f"top_k must be at most the {topk_groups * group_size} experts of topk_groups = {topk_groups} groups of "
            f"{group_size}, but is {top_k}"
        )


def _best(values: torch.Tensor, k: int) -> torch.Tensor:
    """Indices of the k largest values of each row, in order, the lower one first where two are equal; int64."""
    # torch.topk leaves open which of two equal values it takes; this operator sorts stably, in one launch
    return ops.npu_moe_gating_top_k_softmax_v2(values, k=k, renorm=1)[1].long()


def _int32(ids: torch.Tensor) -> torch.Tensor:
    return ids.to(torch.int32)


def _no_autocast(device_type: str) -> AbstractContextManager[object]:
    if not torch.amp.is_autocast_available(device_type):  # as on meta, where entering it would raise
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
