"""What every operator passes, from its entries in the table of samples alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from moe_npu import ops
from moe_npu.ops import _numerics
from moe_npu.ops._library import REGISTRATIONS
from tests.helpers.assertions import assert_bits_equal, assert_close, assert_codes_equal
from tests.helpers.reference import matmul, permute
from tests.helpers.reference.common import Codes, Float
from tests.ops.samples import REFERENCES, SAMPLES
from tests.ops.samples.base import F64, Inputs, Sample, contiguous, relayout, sliced, transposed

DTYPE_NUMBERS = {1: torch.int8, 3: torch.int32, 5: torch.float16, 6: torch.float32, 15: torch.bfloat16}


def over(samples: list[Sample]) -> Any:
    return pytest.mark.parametrize("sample", samples, ids=lambda sample: sample.name)


def call(sample: Sample, inputs: Inputs) -> list[Tensor]:
    args, kwargs = inputs
    return tree_leaves(getattr(ops, sample.op_name)(*args, **kwargs))


def test_the_table_covers_every_operator() -> None:
    operators = {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name)) and name in REGISTRATIONS}
    assert {sample.op_name for sample in SAMPLES} == operators == set(REFERENCES)
    assert len({sample.name for sample in SAMPLES}) == len(SAMPLES)
    assert {sample.op_name for sample in SAMPLES if sample.with_rows} == operators


def test_the_samples_cover_every_gradient() -> None:
    for name in REFERENCES:
        differentiated = {
            argument for sample in SAMPLES if sample.op_name == name for argument in sample.differentiable
        }
        assert differentiated == set(REGISTRATIONS[name].differentiable), name


# --- values ----------------------------------------------------------------------------------------------------------


def assert_equals_reference(sample: Sample) -> None:
    args, kwargs = sample.make()
    # a reference sees the arguments before an operator that works in place
    reference_args, reference_kwargs = sample.make()
    results = call(sample, (args, kwargs))
    # arguments without an effect are left out
    known = inspect.signature(REFERENCES[sample.op_name]).parameters
    reference_kwargs = {name: value for name, value in reference_kwargs.items() if name in known}
    if isinstance(reference_kwargs.get("output_dtype"), int):
        reference_kwargs["output_dtype"] = DTYPE_NUMBERS[reference_kwargs["output_dtype"]]
    expected = tree_leaves(REFERENCES[sample.op_name](*reference_args, **reference_kwargs))
    assert len(results) == len(expected)
    float_dtype = reference_kwargs.get("output_dtype") or tree_leaves(args)[0].dtype
    for result, wanted in zip(results, expected, strict=True):
        if wanted is None:
            assert result is None
            continue
        if isinstance(wanted, Codes):
            assert result.dtype == wanted.dtype
            assert_codes_equal(result, wanted.values, low=wanted.low, high=wanted.high, slack=wanted.slack)
        elif isinstance(wanted, Float) or wanted.dtype == F64:
            wanted = wanted if isinstance(wanted, Float) else Float(wanted, float_dtype)
            assert result.dtype == wanted.dtype
            assert_close(result, wanted.values, reduction=sample.reduction)
        else:
            assert_bits_equal(result, wanted)
        assert result.is_contiguous()


@over(SAMPLES)
def test_equals_reference(sample: Sample) -> None:
    assert_equals_reference(sample)


@over([sample for sample in SAMPLES if "grouped" in sample.op_name])
def test_equals_reference_on_a_cpu_with_half_precision_instructions(
    sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_numerics, "_has_int8_dot_product", lambda: True)
    monkeypatch.setattr(_numerics, "_native_half_rows", lambda: 64)
    assert_equals_reference(sample)


@over(SAMPLES)
def test_leaves_its_inputs_alone(sample: Sample) -> None:
    used, _ = bind(sample, sample.make())
    signature = inspect.signature(getattr(ops, sample.op_name))
    bound = signature.bind(**used)
    getattr(ops, sample.op_name)(*bound.args, **bound.kwargs)
    fresh, _ = bind(sample, sample.make())
    for name in used.keys() - set(sample.mutates):
        for after, before in zip(tree_leaves(used[name]), tree_leaves(fresh[name]), strict=True):
            if isinstance(after, Tensor):
                assert_bits_equal(after, before)


# --- gradients -------------------------------------------------------------------------------------------------------


def bind(sample: Sample, inputs: Inputs, dtype: torch.dtype | None = None) -> tuple[dict[str, Any], list[Tensor]]:
    """Arguments by name, and the differentiable tensors among them: leaves of `dtype`, or else of their own dtype."""
    args, kwargs = inputs
    named = dict(inspect.signature(getattr(ops, sample.op_name)).bind(*args, **kwargs).arguments)
    leaves: list[Tensor] = []

    def make_leaf(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        leaves.append(relayout(tensor, dtype or tensor.dtype).requires_grad_())
        return leaves[-1]

    for name in sample.differentiable:
        if named.get(name) is not None:
            named[name] = tree_map_only(Tensor, make_leaf, named[name])
    return named, leaves


def with_gradients(
    sample: Sample, dtype: torch.dtype | None = None, operator: Callable[..., Any] | None = None
) -> tuple[Callable[..., list[Tensor]], list[Tensor]]:
    """The call as a function of its differentiable tensors, and these tensors."""
    operator = operator or getattr(ops, sample.op_name)
    named, leaves = bind(sample, sample.make(), dtype)
    bound = inspect.signature(getattr(ops, sample.op_name)).bind(**named)

    def function(*tensors: Tensor) -> list[Tensor]:
        given = {id(leaf): tensor for leaf, tensor in zip(leaves, tensors, strict=True)}
        args, kwargs = tree_map_only(Tensor, lambda tensor: given.get(id(tensor), tensor), (bound.args, bound.kwargs))
        return tree_leaves(operator(*args, **kwargs))

    return function, leaves


def float_results(results: list[Tensor]) -> list[Tensor]:
    return [result for result in results if result is not None and result.requires_grad]


def ramps(results: list[Tensor]) -> list[Tensor]:
    """Incoming gradients."""
    return [torch.linspace(-1, 1, result.numel()).view(result.shape).to(result.dtype) for result in results]


DIFFERENTIABLE = [sample for sample in SAMPLES if sample.differentiable]
# the half-precision samples say nothing new in float64; finite differences need memory of their own per element
FLOAT32 = [sample for sample in DIFFERENTIABLE if tree_leaves(sample.make())[0].dtype == torch.float32]
SMOOTH = [
    sample
    for sample in FLOAT32
    if all(torch._debug_has_internal_overlap(leaf) != 1 for leaf in with_gradients(sample)[1])
]


@over(SMOOTH)
def test_first_and_second_derivatives(sample: Sample) -> None:
    function, leaves = with_gradients(sample, dtype=F64)

    def floats(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(float_results(function(*tensors)))

    assert torch.autograd.gradcheck(floats, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(floats, leaves, fast_mode=True, gen_non_contig_grad_outputs=True)


def _gradients(sample: Sample, layout: Callable[[Tensor], Tensor], chosen: slice = slice(None)) -> list[Tensor]:
    function, leaves = with_gradients(sample)
    results = float_results(function(*leaves))[chosen]
    grads = [layout(grad) for grad in ramps(results)]
    return list(torch.autograd.grad(results, leaves, grads, allow_unused=True, materialize_grads=True))


def _first_element(grad: Tensor) -> Tensor:
    return grad[(slice(0, 1),) * grad.dim()].expand(grad.shape)


@over(DIFFERENTIABLE)
def test_gradients_do_not_depend_on_the_layout_of_the_incoming_one(sample: Sample) -> None:
    def assert_same(layout: Callable[[Tensor], Tensor], expected: list[Tensor]) -> None:
        for gradient, wanted in zip(_gradients(sample, layout), expected, strict=True):
            assert_bits_equal(gradient, wanted)

    expected = _gradients(sample, contiguous)
    assert_same(sliced, expected)
    assert_same(lambda grad: transposed(grad) if grad.dim() > 1 else sliced(grad), expected)
    assert_same(_first_element, _gradients(sample, lambda grad: _first_element(grad).contiguous()))


@over([sample for sample in DIFFERENTIABLE if sample.id.startswith(("mmm", "ints-smm"))])
def test_gradients_of_one_result_of_several(sample: Sample) -> None:
    everything = _gradients(sample, contiguous)
    parts = [
        _gradients(sample, contiguous, slice(index, index + 1)) for index in range(len(call(sample, sample.make())))
    ]
    for whole, *terms in zip(everything, *parts, strict=True):
        torch.testing.assert_close(sum(terms), whole)


# --- half-precision gradients against float64 ------------------------------------------------------------------------

HALVES = [sample for sample in DIFFERENTIABLE if tree_leaves(sample.make())[0].dtype in (torch.float16, torch.bfloat16)]


def _expected_gradients(
    sample: Sample, leaves: list[Tensor], grads: list[Tensor], has_gradient: list[bool]
) -> list[Tensor]:
    if sample.op_name == "npu_moe_token_unpermute":  # its reference skips pairs by their values
        (_, sorted_indices, _), _ = sample.make()
        dpermuted, dprobs = permute.moe_token_unpermute_grad(leaves[0], *grads, sorted_indices, *leaves[1:])
        return [dpermuted] if dprobs is None else [dpermuted, dprobs]
    function, _ = with_gradients(sample, operator=REFERENCES[sample.op_name])
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    results = [result for result, chosen in zip(function(*wide), has_gradient, strict=True) if chosen]
    results = [result.values if isinstance(result, Float) else result for result in results]
    # a group without rows leaves no trace in the loops of the reference
    total = sum((result * grad.double()).sum() for result, grad in zip(results, grads, strict=True))
    return list(torch.autograd.grad(total, wide, allow_unused=True, materialize_grads=True))


@over(HALVES)
def test_half_precision_gradients(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    function, leaves = with_gradients(sample)
    outputs = function(*leaves)
    results = float_results(outputs)
    gradients = torch.autograd.grad(results, leaves, ramps(results))
    # the weight that is multiplied has been rounded to the dtype of x; from there on everything is exact
    dequantize, dtype = matmul.dequantize_weight, leaves[0].dtype
    monkeypatch.setattr(matmul, "dequantize_weight", lambda *args: dequantize(*args[:3], dtype))
    has_gradient = [any(output is result for result in results) for output in outputs]
    expected = _expected_gradients(sample, [leaf.detach() for leaf in leaves], ramps(results), has_gradient)
    for leaf, gradient, wanted in zip(leaves, gradients, expected, strict=True):
        assert gradient.dtype == leaf.dtype
        assert_close(gradient, wanted, reduction=sample.reduction)


# --- registration and tracing ----------------------------------------------------------------------------------------


class _OperatorCalls(TorchDispatchMode):
    """Records the calls of the registered operators that a public function and its backward make."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "moe_npu":
            copies = tree_map_only(Tensor, lambda t: relayout(t, t.dtype).requires_grad_(t.requires_grad), args)
            self.calls.append((func, copies))
        return func(*args, **kwargs or {})


def operator_calls(sample: Sample, with_grad: bool) -> list[tuple[Any, tuple[Any, ...]]]:
    """The calls with plain inputs, or those of forward and backward with inputs that require gradients."""
    with _OperatorCalls() as recorder:
        if not with_grad:
            call(sample, sample.make())
        else:
            function, leaves = with_gradients(sample)
            results = float_results(function(*leaves))
            grads = [torch.ones_like(result, requires_grad=True) for result in results]
            torch.autograd.grad(results, leaves, grads, create_graph=True)
    return recorder.calls


# tracing with dynamic shapes takes a hundred times longer than these
QUICK_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


@over(SAMPLES)
def test_registration(sample: Sample) -> None:
    calls = operator_calls(sample, with_grad=False)
    assert calls
    for operator, args in calls:
        torch.library.opcheck(operator, args, test_utils=QUICK_CHECKS)


@over(DIFFERENTIABLE)
def test_registration_with_gradients(sample: Sample) -> None:
    for operator, args in operator_calls(sample, with_grad=True):
        torch.library.opcheck(operator, args, test_utils=QUICK_CHECKS)


# another float dtype changes nothing for a tracer
TRACED = [
    sample
    for sample in SAMPLES
    if sample.is_traced and (sample.with_rows or sample in FLOAT32 or not sample.differentiable)
]


@over(TRACED)
def test_tracing_with_dynamic_shapes(sample: Sample) -> None:
    forward, *backward = operator_calls(sample, with_grad=bool(sample.differentiable))
    # forward and backward of the resizable samples are compiled below, but not the derivatives of the backward
    for operator, args in backward if sample.with_rows else [forward]:
        torch.library.opcheck(operator, args, test_utils="test_aot_dispatch_dynamic")


# --- compilation and export ------------------------------------------------------------------------------------------

RESIZABLE = [sample for sample in SAMPLES if sample.with_rows]


class Traced(torch.nn.Module):
    """The operator as a function of its tensors alone: modes and dtypes are constants, as in code that uses it."""

    def __init__(self, sample: Sample, named: dict[str, Any]) -> None:
        super().__init__()
        self.operator = getattr(ops, sample.op_name)
        self.constants = {name: value for name, value in named.items() if not self.is_traced(value)}

    @staticmethod
    def is_traced(value: Any) -> bool:
        return isinstance(value, Tensor) or (isinstance(value, list) and bool(value) and isinstance(value[0], Tensor))

    def forward(self, tensors: dict[str, Any]) -> Any:
        return self.operator(**tensors, **self.constants)


def traced(sample: Sample, inputs: Inputs) -> tuple[Traced, dict[str, Any], list[Tensor]]:
    """The module, its argument, and the tensors in it that require a gradient."""
    named, leaves = bind(sample, inputs)
    return Traced(sample, named), {name: value for name, value in named.items() if Traced.is_traced(value)}, leaves


def forward_and_backward(function: Callable[..., Any], tensors: dict[str, Any], leaves: list[Tensor]) -> list[Tensor]:
    results = tree_leaves(function(tensors))
    floats = float_results(results)
    if not floats:
        return results
    return [*results, *torch.autograd.grad(floats, leaves, ramps(floats))]


def written(sample: Sample, tensors: dict[str, Any]) -> list[Tensor]:
    """The arguments that the operator wrote to."""
    return tree_leaves([tensors[name] for name in sample.mutates])


def assert_same(compiled: list[Tensor], eager: list[Tensor]) -> None:
    for actual, expected in zip(compiled, eager, strict=True):
        if expected is None:
            assert actual is None
        else:
            torch.testing.assert_close(actual, expected, check_stride=True)


@over(RESIZABLE)
def test_compiles_without_graph_breaks(sample: Sample) -> None:
    torch._dynamo.reset()
    module, *inputs = traced(sample, sample.make())
    _, *again = traced(sample, sample.make())
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_same(forward_and_backward(compiled, *inputs), forward_and_backward(module, *again))
    assert_same(written(sample, inputs[0]), written(sample, again[0]))


@over(RESIZABLE)
def test_one_graph_for_all_row_counts(sample: Sample) -> None:
    assert sample.with_rows is not None
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    module, *_ = traced(sample, sample.with_rows(4))
    compiled = torch.compile(module, fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for num_rows in (4, 5, 7):
        _, *inputs = traced(sample, sample.with_rows(num_rows))
        _, *again = traced(sample, sample.with_rows(num_rows))
        assert_same(forward_and_backward(compiled, *inputs), forward_and_backward(module, *again))
        assert_same(written(sample, inputs[0]), written(sample, again[0]))
        counts.append(counter.frame_count)
    # a float argument makes the backend start over once, within the first compilation
    assert len(set(counts)) == 1


def _dynamic_dims(small: Any, large: Any) -> Any:
    """For `torch.export`: the dims that change with the number of rows."""
    if isinstance(small, dict):
        return {name: _dynamic_dims(value, large[name]) for name, value in small.items()}
    if isinstance(small, list):
        return [_dynamic_dims(a, b) for a, b in zip(small, large, strict=True)]
    return {dim: Dim.AUTO for dim, (a, b) in enumerate(zip(small.shape, large.shape, strict=True)) if a != b}


@over(RESIZABLE)
def test_exports_with_dynamic_rows(sample: Sample) -> None:
    assert sample.with_rows is not None
    module, small, _ = traced(sample, sample.with_rows(4))
    _, large, _ = traced(sample, sample.with_rows(7))
    _, again, _ = traced(sample, sample.with_rows(7))
    program = torch.export.export(module, (small,), dynamic_shapes=(_dynamic_dims(small, large),))
    assert any(str(node.target).startswith("moe_npu.") for node in program.graph.nodes)
    assert_same(tree_leaves(program.module()(large)), tree_leaves(module(again)))
    assert_same(written(sample, large), written(sample, again))


@pytest.mark.slow
# torch's own, when it imports Inductor
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_inductor_compiles_a_whole_layer() -> None:
    def layer(tokens: Tensor, router: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        weights, ids, _ = ops.npu_moe_gating_top_k_softmax(tokens @ router, k=2)
        rows, sorted_indices = ops.npu_moe_token_permute(tokens, ids)
        counts = torch.nn.functional.one_hot(ids.flatten().long(), router.size(1)).sum(0)
        hidden = ops.npu_swiglu(ops.grouped_mm(rows, gate_up, counts))
        (y,) = ops.npu_grouped_matmul(
            [hidden], [down], group_list=counts, group_list_type=1, group_type=0, split_item=2
        )
        return ops.npu_moe_token_unpermute(y, sorted_indices, weights)

    def run(function: Callable[..., Tensor], num_tokens: int) -> list[Tensor]:
        torch.manual_seed(0)
        shapes = ((num_tokens, 8), (8, 4), (4, 8, 12), (4, 6, 8))
        leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
        y = function(*leaves)
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for num_tokens in (5, 9):
        for actual, expected in zip(run(compiled, num_tokens), run(layer, num_tokens), strict=True):
            torch.testing.assert_close(actual, expected)
