"""Record what routers decide and force it in another run; force a balanced load for benchmarks.

Reinforcement learning needs the first: a rollout in one engine and the training on its tokens in another choose
different experts for a few tokens, which is enough to make their probabilities differ.

Everything hangs on hooks, which call one operator when a layer has routed. What the operator does is decided when it
runs, not when it is traced: compiled code records and replays without being compiled again at every call, it knows a
forward that activation checkpointing repeats, and when the context is over it does nothing.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from moe_npu.layers._routed_layers import (
    DID_NOT_RUN,
    RoutedLayer,
    RoutingVisitor,
    is_recomputation,
    routed_layers,
    visit_routing,
)
from moe_npu.layers.routers.base import Router, RouterOutput
from moe_npu.layers.routing_record import LayerRouting, RoutingRecord
from moe_npu.ops._library import register_op

_Pair = tuple[torch.Tensor, torch.Tensor]

_VISITORS: dict[int, RoutingVisitor] = {}
_numbers = itertools.count()


def _exchange(topk_ids: torch.Tensor, topk_weights: torch.Tensor, number: int) -> _Pair:
    visitor = _VISITORS.get(number)
    given = (topk_ids, topk_weights)
    taken = given if visitor is None else visitor(*given)
    # results of operators have memory of their own
    return (
        torch.empty_like(topk_ids, memory_format=torch.contiguous_format).copy_(taken[0]),
        torch.empty_like(topk_weights, memory_format=torch.contiguous_format).copy_(taken[1]),
    )


def _exchange_fake(topk_ids: torch.Tensor, topk_weights: torch.Tensor, number: int) -> _Pair:
    return (
        torch.empty_like(topk_ids, memory_format=torch.contiguous_format),
        torch.empty_like(topk_weights, memory_format=torch.contiguous_format),
    )


_exchange_op = register_op(
    "exchange_routing(Tensor topk_ids, Tensor topk_weights, int number) -> (Tensor, Tensor)",
    cpu=_exchange,
    npu=_exchange,
    fake=_exchange_fake,
    is_lowered=False,
)


class _Recorder:
    """Appends what a layer routed to its record."""

    def __init__(self, routing: LayerRouting, offload: bool) -> None:
        self._routing = routing
        self._offload = offload

    def __call__(self, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> _Pair:
        if not is_recomputation():
            device = "cpu" if self._offload else topk_ids.device
            self._routing.topk_ids.append(topk_ids.to(device, self._routing.ids_dtype, copy=True))
            self._routing.topk_weights.append(topk_weights.to(device, copy=True))
        return topk_ids, topk_weights


class _Player:
    """Gives one recorded call after the other, and the same one again where a forward is repeated in backward."""

    def __init__(self, name: str, routing: LayerRouting) -> None:
        self._name = name
        self._routing = routing
        self._natural: list[_Pair] = []  # what the router itself chose in each call
        self._pending: list[int] = []  # calls that no backward has repeated yet

    @property
    def num_calls(self) -> int:
        return len(self._natural)

    def __call__(self, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> _Pair:
        call = self._repeated_call(topk_ids, topk_weights) if is_recomputation() else self._next_call(topk_ids)
        if call == self.num_calls:
            self._natural.append((topk_ids.clone(), topk_weights.clone()))
            self._pending.append(call)
        return self._routing.topk_ids[call], self._routing.topk_weights[call]

    def _next_call(self, topk_ids: torch.Tensor) -> int:
        call, recorded = self.num_calls, len(self._routing.topk_ids)
        if call >= recorded:
            raise RuntimeError(f"layer {self._name!r} runs for call {call + 1}, but its record has {recorded} calls")
        shape = tuple(self._routing.topk_ids[call].shape)
        if shape != tuple(topk_ids.shape):
            raise ValueError(
                f"layer {self._name!r} routes [T, K] = {tuple(topk_ids.shape)} in call {call + 1}, but the record has "
                f"{shape} there; concatenate() joins the calls of a prefill and its decoding"
            )
        return call

    def _repeated_call(self, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> int:
        """The call that is repeated: the one that waits for backward, or of several the one that routed the same."""
        calls = self._pending
        if len(calls) != 1:
            # the only place where the host reads the device
            calls = [call for call in range(self.num_calls) if self._is_like(call, topk_ids, topk_weights)]
        if not calls:
            raise RuntimeError(
                f"layer {self._name!r} is repeated in backward, but routes unlike in any of its {self.num_calls} calls"
            )
        calls = [call for call in calls if call in self._pending] or calls
        call = calls[-1]
        if not all(self._is_recorded_alike(call, other) for other in calls[:-1]):
            raise RuntimeError(
                f"layer {self._name!r} is repeated in backward, and {len(calls)} calls route the same but are recorded "
                "differently: run backward after each forward"
            )
        if call in self._pending:
            self._pending.remove(call)
        return call

    def _is_recorded_alike(self, call: int, other: int) -> bool:
        routing = self._routing
        return torch.equal(routing.topk_ids[call], routing.topk_ids[other]) and torch.equal(
            routing.topk_weights[call], routing.topk_weights[other]
        )

    def _is_like(self, call: int, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> bool:
        ids, weights = self._natural[call]
        return torch.equal(ids, topk_ids) and torch.equal(weights, topk_weights)


class _Balancer:
    """Gives experts in turn."""

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts
        self.has_run = False

    def __call__(self, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> _Pair:
        self.has_run = True
        ids = torch.arange(topk_ids.numel(), device=topk_ids.device) % self._num_experts
        return ids.view(topk_ids.shape), torch.full_like(topk_weights, 1 / topk_ids.size(1))


@contextmanager
def record_routing(model: nn.Module, *, offload: bool = False) -> Iterator[RoutingRecord]:
    """Record the expert ids and weights of every MoE layer at every forward call.

    Works for native routers and for all experts of transformers, whatever their ``experts_implementation``, also under
    activation checkpointing, where a repeated forward is not recorded again, and under
    ``torch.compile(fullgraph=True)``, if it is compiled inside the context. The model computes what it always does.

    Args:
        model: any module with MoE layers.
        offload: keep the record on the CPU, which waits for the device at every call.

    Yields:
        The record, which fills while the model runs and stays valid after the context.

    Raises:
        ValueError: the model has no such layers, or experts of a transformers model that are spread over ranks, whose
            ids are not those of the whole model.
        RuntimeError: at the end, no layer has run, or all were compiled before.
    """
    layers = routed_layers(model)
    record = RoutingRecord({name: LayerRouting(layer.num_experts) for name, layer in layers.items()})
    recorders = {name: _Recorder(routing, offload) for name, routing in record.layers.items()}
    with _hooked(layers, recorders, _pass_through):
        yield record
    if not any(routing.topk_ids for routing in record.layers.values()):
        raise RuntimeError(f"nothing was recorded of {type(model).__name__}: {DID_NOT_RUN}")


@contextmanager
def replay_routing(
    model: nn.Module, record: RoutingRecord, *, weights: Literal["recorded", "router"]
) -> Iterator[None]:
    """Force recorded expert ids on every MoE layer, call by call.

    The context must still be open during backward where activation checkpointing repeats the forward. Repeated calls
    get the routing of the call that they repeat. If several forward calls wait for their backward, the repeated one is
    recognized by what the router would have chosen itself, which reads the device on the host.

    Args:
        model: any module with MoE layers, of the same names, numbers of experts and K as where it was recorded; its
            precision, implementation and wrappers may differ.
        record: one entry for each forward call of the model.
        weights: ``"recorded"``: the weights of the record, through which the router gets no gradient. ``"router"``: the
            weights that the router gives to the forced experts now, with their gradient. In transformers models that
            is the model's own code, in which the result of ``torch.topk`` is exchanged.

    Raises:
        ValueError: layers or numbers of experts that differ, an unknown ``weights``; at a call, another ``[T, K]``.
        RuntimeError: at a call, more calls than were recorded, or a transformers router that does not choose by one
            ``torch.topk`` over all experts with ``weights="router"`` (routers by token id, sparsemixer); at the end, no
            layer has run, or all were compiled before.
    """
    layers = routed_layers(model)
    if weights not in ("recorded", "router"):
        raise ValueError(f"weights must be 'recorded' or 'router', but is {weights!r}")
    if layers.keys() != record.layers.keys():
        raise ValueError(
            f"record must have the layers of the model, but only the model has {sorted(layers.keys() - record.layers)} "
            f"and only the record has {sorted(record.layers.keys() - layers)}"
        )
    for name, layer in layers.items():
        if layer.num_experts != record.layers[name].num_experts:
            raise ValueError(
                f"record must have the number of experts of the model, but layer {name!r} has {layer.num_experts} and "
                f"its record {record.layers[name].num_experts}"
            )
    players = {name: _Player(name, routing) for name, routing in record.layers.items()}
    top_ks = {name: routing.topk_ids[0].size(1) for name, routing in record.layers.items() if routing.topk_ids}
    with _hooked(layers, players, _give if weights == "recorded" else functools.partial(_force, top_ks)):
        yield
    if not any(player.num_calls for player in players.values()):
        raise RuntimeError(f"nothing was replayed in {type(model).__name__}: {DID_NOT_RUN}")


@contextmanager
def force_balanced(model: nn.Module, *, weights: Literal["uniform", "router"] = "uniform") -> Iterator[None]:
    """Give every expert the same number of tokens, for benchmarks: slot k of token t goes to expert (t K + k) mod E.

    The routers still run. Works where :func:`replay_routing` does.

    Args:
        model: any module with MoE layers.
        weights: ``"uniform"``: 1 / K each, without a gradient for the router. ``"router"``: those that the router gives
            to these experts.

    Raises:
        ValueError: the model has no such layers, or an unknown ``weights``.
        RuntimeError: at a call, as :func:`replay_routing`; at the end, no layer has run, or all were compiled before.
    """
    if weights not in ("uniform", "router"):
        raise ValueError(f"weights must be 'uniform' or 'router', but is {weights!r}")
    layers = routed_layers(model)
    balancers = {name: _Balancer(layer.num_experts) for name, layer in layers.items()}
    with _hooked(layers, balancers, _give if weights == "uniform" else functools.partial(_force, {})):
        yield
    if not any(balancer.has_run for balancer in balancers.values()):
        raise RuntimeError(f"nothing was balanced in {type(model).__name__}: {DID_NOT_RUN}")


# attaches the visitor of a number to a layer, and returns what takes it off again
_Attach = Callable[[RoutedLayer, int], Callable[[], None]]


@contextmanager
def _hooked(
    layers: Mapping[str, RoutedLayer], visitors: Mapping[str, RoutingVisitor], attach: _Attach
) -> Iterator[None]:
    """Attach a visitor to each layer while the context is open."""
    for name, layer in layers.items():
        if getattr(layer.module, "_is_expert_parallel", False):
            raise ValueError(
                f"layer {name!r} has its experts on several ranks, where ids are those of one rank; record and replay "
                "need a model without expert parallelism of transformers"
            )
    with ExitStack() as stack:
        for name, layer in layers.items():
            number = next(_numbers)
            _VISITORS[number] = visitors[name]
            stack.callback(_VISITORS.pop, number)
            stack.callback(attach(layer, number))
        yield


def _pass_through(layer: RoutedLayer, number: int) -> Callable[[], None]:
    """The visitor sees the routing; the ids come back through the operator, which could be left out otherwise."""

    def visitor(topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> _Pair:
        return _exchange_op(topk_ids, topk_weights.detach(), number)[0], topk_weights

    return visit_routing(layer, visitor).remove


def _give(layer: RoutedLayer, number: int) -> Callable[[], None]:
    """The visitor gives ids and weights."""

    def visitor(topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> _Pair:
        topk_ids, topk_weights = _exchange_op(topk_ids, topk_weights.detach(), number)
        return topk_ids, topk_weights

    return visit_routing(layer, visitor).remove


def _force(top_ks: Mapping[str, int], layer: RoutedLayer, number: int) -> Callable[[], None]:
    """The visitor gives the ids, the router the weights for these; ``top_ks`` are those K that are known."""
    if isinstance(layer.module, Router):
        return layer.module.register_forward_hook(_route_again(number), with_kwargs=True).remove
    mode = _ForcedTopK(layer, number, top_ks.get(layer.name))
    handle = visit_routing(layer, mode.at_experts)
    block: Any = layer.block
    forward, has_own = block.forward, "forward" in vars(block)

    # not a pair of hooks: a context manager also ends with an error
    @functools.wraps(forward)
    def forced(*args: Any, **kwargs: Any) -> Any:
        mode.forced.clear()
        with mode:
            return forward(*args, **kwargs)

    def remove() -> None:
        handle.remove()
        if has_own:
            block.forward = forward
        else:
            del block.forward

    block.forward = forced
    return remove


def _route_again(number: int) -> Callable[..., RouterOutput]:
    """A hook that runs a native router once more, with the forced ids."""

    def hook(module: Router, args: tuple[Any, ...], kwargs: dict[str, Any], output: RouterOutput) -> RouterOutput:
        topk_ids, _ = _exchange_op(output.topk_ids, output.topk_weights.detach(), number)
        return module.forward(*args, **{**kwargs, "topk_ids": topk_ids})

    return hook


class _ForcedTopK(TorchFunctionMode):
    """Exchanges the choice that a block of transformers makes by ``torch.topk`` over the scores of all experts.

    The values become the scores of the forced experts, with their gradient, and everything that the model makes of
    scores and ids afterwards runs as it is.
    """

    def __init__(self, layer: RoutedLayer, number: int, top_k: int | None) -> None:
        super().__init__()
        self._top_k = top_k
        self._name = layer.name
        self._num_experts = layer.num_experts
        self._number = number
        self.forced: dict[int, torch.Tensor] = {}  # by K: a group score can look like a choice with another K

    def at_experts(self, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> _Pair:
        """Check that the choice was made under this mode."""
        top_k = topk_ids.size(1)
        if self._top_k not in (None, top_k):
            raise ValueError(
                f"layer {self._name!r} routes to {top_k} experts per token, but the record has {self._top_k}"
            )
        forced = self.forced.get(top_k)
        if forced is None:
            raise RuntimeError(
                f"layer {self._name!r} does not choose by torch.topk over {self._num_experts} experts, so that its "
                "router cannot give weights to forced experts; force its weights too"
            )
        return forced.view(topk_ids.shape).to(topk_ids.dtype), topk_weights

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is not torch.topk and func is not torch.Tensor.topk:
            return result
        scores = args[0] if args else (kwargs or {})["input"]
        values, ids = result
        top_k = ids.size(-1)
        # one more in Zaya, whose tokens can choose to have no expert
        is_choice = scores.size(-1) in (self._num_experts, self._num_experts + 1)
        if not is_choice or self._top_k not in (None, top_k):
            return result
        if top_k not in self.forced:
            choice = _exchange_op(ids.reshape(-1, top_k), values.detach().reshape(-1, top_k), self._number)
            self.forced[top_k] = choice[0]
        ids = self.forced[top_k].view(ids.shape)
        return torch.return_types.topk((scores.gather(-1, ids), ids))
