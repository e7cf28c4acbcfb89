"""Everything in ``aten::``: one kernel for all operators, which computes on the device's memory with the CPU's.

torch_npu registers over a thousand ``aten`` operators for the device. All but those that allocate, view or copy are
replaced here. The operators of ``npu::`` stay with torch_npu.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from moe_npu.sim import distributed, tiles, trace
from moe_npu.sim.descriptors import memory

_SIGNED_64_BITS = 1 << 63
_CPU = torch.device("cpu")
_NO_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
# allocation, storage and copies: torch_npu's own kernels work on the simulated device
_NATIVE = frozenset(
    {
        *("empty.memory_format", "empty_strided", "empty_like", "new_empty_strided", "_unsafe_view"),
        *("copy_", "_copy_from", "_copy_from_and_resize", "_to_copy", "clone", "contiguous", "_reshape_alias_copy"),
        *("resize_", "resize_as_", "_resize_output_", "set_", "set_.source_Storage", "set_.source_Tensor"),
        *("set_.source_Storage_storage_offset", "_local_scalar_dense", "record_stream", "_pin_memory", "is_pinned"),
        *("_has_same_storage_numel", "is_set_to", "storage_offset"),
    }
)
# operators that take indices, lengths or a value on the host too
_TAKES_HOST_TENSORS = frozenset(
    {
        *("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put", "fill_"),
        *("_ctc_loss", "_ctc_loss_backward", "_pack_padded_sequence", "_pack_padded_sequence_backward"),
    }
)
_library: torch.library.Library | None = None


def host_view(tensor: Tensor) -> Tensor:
    """A tensor of the device as a CPU tensor on the same memory, which it keeps alive."""
    storage = tensor.untyped_storage()
    elements = memory(storage.data_ptr(), storage.nbytes(), tensor.dtype, owner=storage)
    view = elements.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset())
    if tensor.is_conj():
        torch._C._set_conj(view, True)
    if tensor.is_neg():
        torch._C._set_neg(view, True)
    return view


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of a CPU tensor in memory of the device, written without a copy of the runtime.

    Raises:
        NotImplementedError: the tensor is sparse or quantized.
    """
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise NotImplementedError(
            f"tensors of {tensor.layout if not tensor.is_quantized else tensor.dtype} are not implemented on the "
            "simulated device"
        )
    strides = tensor.stride()
    if 0 in strides:
        tensor = tensor.contiguous()  # elements that share memory cannot be written
        strides = tensor.stride()
    result = torch.empty_strided(tensor.size(), strides, dtype=tensor.dtype, device=device)
    host_view(result).copy_(tensor)
    return result


def install() -> None:
    """Replace the device's kernels of ``aten``."""
    global _library
    library = torch.library.Library("aten", "IMPL")
    for registration in torch._C._dispatch_get_registrations_for_dispatch_key("PrivateUse1"):
        namespace, _, name = registration.partition("::")
        if namespace != "aten" or name in _NATIVE:
            continue
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
        if operator is None:
            continue  # of another namespace
        if torch.Tag.inplace_view in operator.tags or any(
            result.alias_info is not None and not result.alias_info.is_write for result in operator._schema.returns
        ):
            continue  # a view
        compute = _WITHOUT_CPU_KERNEL.get(name, operator)
        if compute is operator and not any(
            torch._C._dispatch_has_kernel_for_dispatch_key(registration, key) for key in _CPU_KEYS
        ):
            continue  # torch_npu's own kernel launches a device operator, which raises unless it is implemented
        library.impl(name, _on_cpu(operator, compute), "PrivateUse1", allow_override=True)
    _library = library


def _on_cpu(operator: torch._ops.OpOverload, compute: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel of one operator."""
    schema = operator._schema
    is_random = torch.Tag.nondeterministic_seeded in operator.tags
    takes_host_tensors = schema.name.removeprefix("aten::") in _TAKES_HOST_TENSORS
    written = {
        alias: (index, a.name)
        for index, a in enumerate(schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write
        for alias in a.alias_info.before_set
    }
    lists = [  # changed, and not returned
        (index, a.name)
        for index, a in enumerate(schema.arguments)
        if a.alias_info is not None and a.alias_info.is_write and not a.alias_info.before_set
    ]
    outputs = {a.name for a in schema.arguments if a.kwarg_only and a.alias_info is not None and a.alias_info.is_write}
    # which argument a result is
    returned = [
        written[next(iter(result.alias_info.before_set))] if result.alias_info is not None else None
        for result in schema.returns
    ]
    get_format = torch.ops.npu.get_npu_format.default._op

    def kernel(*args: Any, **kwargs: Any) -> Any:
        device: torch.device | None = None  # of the tensors
        target: torch.device | None = None  # an argument
        has_host_tensor = False
        tiled: list[Tensor] = []
        distributed.wait_for_current_stream()

        def to_host(value: Any) -> Any:
            nonlocal device, target, has_host_tensor
            if isinstance(value, Tensor):
                if value.is_cpu:
                    has_host_tensor = has_host_tensor or value.dim() > 0
                    return value
                if device is None:
                    device = value.device
                elif device != value.device:
                    raise _on_two_devices(operator, device, value.device)
                if get_format(value) in tiles.FORMATS:
                    tiled.append(tiles.host_copy(value))
                    return tiled[-1]
                return host_view(value)
            kind = type(value)
            if kind is list or kind is tuple:
                return [to_host(part) for part in value]
            if kind is torch.device:
                target = value
                return _CPU
            return value

        # no mode of the caller may reach the calls below, which are the device's
        with torch._C.DisableTorchFunction(), torch._C._ExcludeDispatchKeyGuard(_NO_AUTOCAST):
            host_args: Sequence[Any] = [to_host(value) for value in args]
            host_kwargs = {name: to_host(value) for name, value in kwargs.items()}
            if has_host_tensor and device is not None and not takes_host_tensors:
                raise _on_two_devices(operator, device, _CPU)
            for name in outputs & kwargs.keys():
                if isinstance(kwargs[name], Tensor):
                    host_kwargs[name] = _like(kwargs[name])
            if is_random:
                with _random_numbers(schema, host_args, host_kwargs, device or target) as (host_args, host_kwargs):
                    results = _compute(compute, host_args, host_kwargs)
            else:
                results = _compute(compute, host_args, host_kwargs)
            if tiled and written:  # before outputs are stored: there may be old copies of them among these
                for copy in tiled:
                    tiles.encode(copy)
            for name in outputs & kwargs.keys():
                if isinstance(kwargs[name], Tensor):
                    _store(kwargs[name], host_kwargs[name])
            if len(returned) == 1:
                results = (results,)
            final = [
                _results_to_device(result, device or target)
                if source is None
                else (args[source[0]] if source[0] < len(args) else kwargs[source[1]])
                for source, result in zip(returned, results or (), strict=True)
            ]
        if trace.is_recording():
            changed = [args[index] if index < len(args) else kwargs.get(name) for index, name in lists]
            trace.record_aten(operator, (args, kwargs), [*final, *changed])
        return tuple(final) if len(final) > 1 else final[0] if final else None

    return kernel


def _on_two_devices(operator: torch._ops.OpOverload, one: torch.device, other: torch.device) -> RuntimeError:
    return RuntimeError(
        f"{operator}: Expected all tensors to be on the same device, but found at least two devices, {one} and {other}!"
    )


def _results_to_device(result: Any, device: torch.device | None) -> Any:
    if isinstance(result, Tensor):
        return to_device(result, _device(device))
    if isinstance(result, (list, tuple)):
        return [_results_to_device(part, device) for part in result]
    return result


def _like(output: Tensor) -> Tensor:
    """Memory for an output: the operator may resize it, which a view of the device's memory cannot follow."""
    return torch.empty_strided(output.size(), output.stride(), dtype=output.dtype, device=_CPU)


def _device(device: torch.device | None) -> torch.device:
    if device is None or device.index is None:
        return torch.device("npu", torch.npu.current_device())  # type: ignore[attr-defined]
    return device


def _store(target: Tensor, result: Tensor) -> None:
    if target.shape != result.shape:
        target.resize_(result.shape).as_strided_(result.size(), result.stride())  # which the operator chose
    if torch.ops.npu.get_npu_format.default(target) in tiles.FORMATS:
        tiled = tiles.host_copy(target)
        tiled.copy_(result)
        tiles.encode(tiled)
    else:
        host_view(target).copy_(result)


def _compute(operator: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    try:
        return operator(*args, **kwargs)
    except RuntimeError as error:
        message = str(error)
        half = torch.float16 if "'Half'" in message else torch.bfloat16 if "'BFloat16'" in message else None
        if half is None or "not implemented for" not in message:
            raise
    # the CPU has no kernel of this precision: compute in float32 and round, as the device does
    wide: list[tuple[Tensor, Tensor]] = []

    def widen(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != half:
            return torch.float32 if value is half else value
        wide.append((value, value.float()))
        return wide[-1][1]

    results = operator(*tree_map(widen, args), **tree_map(widen, kwargs))
    for narrow, result in wide:
        if result._version == 0:
            continue  # only read
        if narrow.shape != result.shape:
            narrow.resize_(result.shape)
        narrow.copy_(result)
    return tree_map(
        lambda leaf: leaf.to(half) if isinstance(leaf, Tensor) and leaf.dtype == torch.float32 else leaf, results
    )


@contextlib.contextmanager
def _random_numbers(
    schema: Any, args: Sequence[Any], kwargs: dict[str, Any], device: torch.device | None
) -> Iterator[tuple[Sequence[Any], dict[str, Any]]]:
    """Draw from the device's generator: its seed and offset decide, and the offset moves on, as on the device.

    Yields the arguments with a generator of the CPU; an operator that takes none draws from the CPU's default one,
    whose state is restored.
    """
    names = [a.name for a in schema.arguments]
    position = names.index("generator") if "generator" in names else -1
    is_positional = 0 <= position < len(args)
    generator = args[position] if is_positional else kwargs.get("generator")
    if generator is None:
        generator = torch.npu.default_generators[_device(device).index]  # type: ignore[attr-defined]
    elif generator.device.type == "cpu":
        raise RuntimeError(f"{schema.name}: Expected a 'npu' device type for generator but found 'cpu'")
    state = generator.get_state()
    words = state.view(torch.int64)
    seed, offset = words.tolist()[:2]
    seed = (seed + offset * 0x9E3779B97F4A7C15) % _SIGNED_64_BITS
    words[1] += 4
    generator.set_state(state)
    if position < 0:
        cpu_state = torch.get_rng_state()
        torch.default_generator.manual_seed(seed)
        try:
            yield args, kwargs
        finally:
            torch.set_rng_state(cpu_state)
        return
    own = torch.Generator().manual_seed(seed)
    if is_positional:
        yield [*args[:position], own, *args[position + 1 :]], kwargs
    else:
        yield args, {**kwargs, "generator": own}


# ---- operators that torch implements on other devices only -----------------------------------------------------------


def _matmul_backward(grad: Tensor, self: Tensor, other: Tensor, mask: list[bool]) -> tuple[Tensor | None, ...]:
    if other.dim() == 2 and self.dim() >= 2:  # one matmul of all rows, as torch.matmul and its gradient on CPU
        left, grad = self.flatten(0, -2), grad.flatten(0, -2)
        is_transposed = other.stride(0) == 1 and other.stride(1) == other.size(0)
        return (
            (grad @ other.mH).view_as(self) if mask[0] else None,
            ((grad.mT @ left.conj()).mT if is_transposed else left.mH @ grad) if mask[1] else None,
        )
    left = self.unsqueeze(0) if self.dim() == 1 else self
    right = other.unsqueeze(1) if other.dim() == 1 else other
    if self.dim() == 1:
        grad = grad.unsqueeze(-1 if other.dim() == 1 else -2)
    if other.dim() == 1:
        grad = grad.unsqueeze(-1)
    return (
        torch.matmul(grad, right.mH).sum_to_size(left.shape).view_as(self) if mask[0] else None,
        torch.matmul(left.mH, grad).sum_to_size(right.shape).view_as(other) if mask[1] else None,
    )


def _wide(operator: Callable[..., Tensor], num_tensors: int) -> Callable[..., Tensor]:
    """A matmul with a result of another dtype than its operands, which is also the dtype of the sums."""

    def compute(*args: Any, out: Tensor | None = None, **kwargs: Any) -> Tensor:
        operands, dtype, rest = args[:num_tensors], args[num_tensors], args[num_tensors + 1 :]
        result = operator(*(operand.to(dtype) for operand in operands), *rest, **kwargs)
        return result if out is None else out.resize_(result.shape).copy_(result)

    return compute


def _histc(self: Tensor, *args: Any, out: Tensor | None = None, **kwargs: Any) -> Tensor:
    result = torch.histc(self if self.is_floating_point() else self.double(), *args, **kwargs).to(self.dtype)
    return result if out is None else out.resize_(result.shape).copy_(result)


_WITHOUT_CPU_KERNEL: dict[str, Callable[..., Any]] = {
    "matmul_backward": _matmul_backward,
    "histc": _histc,  # of integers
    "histc.out": _histc,
}
for _name, _operator, _num_tensors in (
    ("mm", torch.mm, 2),
    ("bmm", torch.bmm, 2),
    ("addmm", torch.addmm, 3),
    ("baddbmm", torch.baddbmm, 3),
):
    for _overload in ("dtype", "dtype_out"):
        _WITHOUT_CPU_KERNEL[f"{_name}.{_overload}"] = _wide(_operator, _num_tensors)
_CPU_KEYS = ("CPU", "CompositeExplicitAutograd", "CompositeImplicitAutograd", "CompositeExplicitAutogradNonFunctional")
