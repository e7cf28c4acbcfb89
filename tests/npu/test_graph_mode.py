"""``torch.compile`` on the simulated device: the package's operators and layers, and torchair's graph mode."""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._pytree import tree_leaves, tree_map_only

import moe_npu
from moe_npu import ops, sim
from tests.npu.test_operators import is_on_device, to_npu
from tests.ops.samples import distribute
from tests.ops.samples.base import Sample
from tests.ops.test_battery import RESIZABLE, assert_same, float_results, over, ramps, traced, written

pytestmark = [
    pytest.mark.npu,
    pytest.mark.usefixtures("npu"),
    pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd:UserWarning"),  # torch about torchair
]
H, INTER, E, K = 16, 8, 4, 2


def torchair(mode: str = "max-autotune", *, config: Any = None, **options: Any) -> Any:
    import torchair as tng

    config = config or tng.CompilerConfig()
    config.mode = mode
    with warnings.catch_warnings(record=True):  # torchair's, and the filters that it sets for the whole process
        warnings.simplefilter("always")
        return tng.get_npu_backend(compiler_config=config, **options)


MODES = ["max-autotune", "reduce-overhead", "npugraph_ex"]
BACKENDS: dict[str, Callable[[], Any]] = {
    "eager": lambda: "eager",
    "aot_eager": lambda: "aot_eager",
    "npu": lambda: "npu",
    "npugraph_ex": lambda: "npugraph_ex",
    **{f"torchair-{mode}": lambda mode=mode: torchair(mode) for mode in MODES},
}
with_backends = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(scope="module", autouse=True)
def _import(npu: torch.device) -> None:
    with warnings.catch_warnings(record=True):  # torch deprecates what it uses itself
        warnings.simplefilter("always")
        for name in ("torchair", "npugraph_ex"):
            importlib.import_module(name)
        torch.compile(torch.relu, backend="npu")(rows())


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch._dynamo.reset()


# --- the package's operators and layers ------------------------------------------------------------------------------

# those of several devices are tested with their process groups
SAMPLES = [sample for sample in RESIZABLE if is_on_device(sample) and sample not in distribute.SAMPLES]


def on_device(sample: Sample, num_rows: int | None = None) -> tuple[nn.Module, dict[str, Any], list[Tensor]]:
    """As :func:`traced`, on the device."""
    inputs = sample.make() if num_rows is None else sample.with_rows(num_rows)  # type: ignore[misc]
    module, tensors, leaves = traced(sample, inputs)
    moved = {id(leaf): to_npu(leaf) for leaf in leaves}
    tensors = tree_map_only(Tensor, lambda t: moved[id(t)] if id(t) in moved else to_npu(t), tensors)
    return module, tensors, [moved[id(leaf)] for leaf in leaves]


def forward_and_backward(function: Callable[..., Any], tensors: dict[str, Any], leaves: list[Tensor]) -> list[Tensor]:
    results = tree_leaves(function(tensors))
    floats = float_results(results)
    if not floats:
        return results
    return [*results, *torch.autograd.grad(floats, leaves, [ramp.npu() for ramp in ramps(floats)])]


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "torchair-max-autotune"])
@over(SAMPLES)
def test_operators_compute_the_same_in_a_graph(sample: Sample, backend: str) -> None:
    module, *inputs = on_device(sample)
    _, *again = on_device(sample)
    compiled = torch.compile(module, fullgraph=True, backend=BACKENDS[backend]())
    with sim.trace() as in_graph:
        results = forward_and_backward(compiled, *inputs)
    with sim.trace() as eager:
        expected = forward_and_backward(module, *again)
    assert_same(results, expected)
    assert_same(written(sample, inputs[0]), written(sample, again[0]))
    # the operator is one node of the graph, which launches what it launches outside
    assert launched(in_graph) == launched(eager)


def launched(trace: sim.Trace) -> list[str]:
    """The device's own operators."""
    return [name for name in trace.names if name.startswith("aclnn") and name not in ("aclnnInplaceCopy", "aclnnCast")]


@over(SAMPLES)
def test_one_graph_for_all_row_counts(sample: Sample) -> None:
    counter = CompileCounterWithBackend(torchair())
    compiled = torch.compile(on_device(sample, 4)[0], fullgraph=True, backend=counter, dynamic=True)
    counts = []
    for num_rows in (4, 5, 7):
        module, *inputs = on_device(sample, num_rows)
        _, *again = on_device(sample, num_rows)
        assert_same(forward_and_backward(compiled, *inputs), forward_and_backward(module, *again))
        counts.append(counter.frame_count)
    # a float argument makes the backend start over once, within the first compilation
    assert len(set(counts)) == 1


def layer() -> nn.Module:
    torch.manual_seed(0)
    return moe_npu.MoE(
        moe_npu.SoftmaxTopKRouter(H, E, K, norm_topk_prob=True, dtype=torch.bfloat16),
        moe_npu.GroupedExperts(E, H, INTER, bias=True, dtype=torch.bfloat16),
        shared_expert=moe_npu.SharedExpert(H, INTER, has_output_gate=True, dtype=torch.bfloat16),
    ).npu()


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@with_backends
def test_a_whole_layer(backend: str, dynamic: bool) -> None:
    module = layer()

    def run(function: Callable[[Tensor], Tensor], num_tokens: int) -> list[Tensor]:
        x = torch.randn(num_tokens, H, generator=torch.Generator().manual_seed(num_tokens), dtype=torch.bfloat16)
        leaves = [x.npu().requires_grad_(), *module.parameters()]
        y = function(leaves[0])
        return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    compiled = torch.compile(module, backend=BACKENDS[backend](), dynamic=dynamic, fullgraph=True)
    for num_tokens in (5, 8):
        assert_same(run(compiled, num_tokens), run(module, num_tokens))


# --- what torchair and npugraph_ex offer -----------------------------------------------------------------------------


def swiglu(x: Tensor) -> Tensor:
    return ops.npu_swiglu(x * 2 + 1).view(-1).sin()


def rows() -> Tensor:
    return torch.randn(4, 8).npu()


@pytest.mark.parametrize("mode", MODES)
def test_a_backend_may_write_to_its_inputs(mode: str) -> None:
    def increment(x: Tensor) -> Tensor:
        x.add_(1)
        return x * 2

    x = torch.zeros(4, device="npu")
    y = torch.compile(increment, backend=torchair(mode), fullgraph=True)(x)
    assert (x.tolist(), y.tolist()) == ([1.0] * 4, [2.0] * 4)


@pytest.mark.parametrize("mode", MODES)
def test_passes_over_the_graph_run(mode: str) -> None:
    import torchair as tng

    seen = []

    def subtract_instead(graph: torch.fx.GraphModule, example_inputs: Any, config: Any) -> None:
        for node in graph.graph.nodes:
            seen.append(str(node.target))
            if node.target == torch.ops.aten.add.Tensor:
                node.target = torch.ops.aten.sub.Tensor

    config = tng.CompilerConfig()
    config.post_grad_custom_post_pass = subtract_instead
    x = rows()
    y = torch.compile(swiglu, backend=torchair(mode, config=config), fullgraph=True)(x)
    assert_same([y], [ops.npu_swiglu(x * 2 - 1).view(-1).sin()])
    assert "moe_npu.npu_swiglu.default" in seen
    assert "aten.reshape.default" in seen  # torchair's own pass over views


def test_decompositions_apply() -> None:
    def cosine(x: Tensor) -> Tensor:
        return torch.cos(x)

    backend = torchair(custom_decompositions={torch.ops.aten.sin.default: cosine})
    x = rows()
    assert_same([torch.compile(torch.sin, backend=backend)(x)], [x.cos()])


def test_options_are_checked() -> None:
    from torchair.configs.compiler_config import CompilerConfig

    config = CompilerConfig()
    config.experimental_config.frozen_parameter = True
    config.experimental_config.keep_inference_input_mutations = False
    config.debug.run_eagerly = True
    with pytest.raises(ValueError, match="fastest"):
        config.mode = "fastest"


def test_compiler_alone() -> None:
    import torchair as tng

    def negate_instead(copy: torch.fx.GraphModule, *_: Any) -> None:
        for node in copy.graph.nodes:
            if node.target == "relu":
                node.target = "neg"

    config = tng.CompilerConfig()
    config.post_grad_custom_post_pass = negate_instead
    graph = torch.fx.symbolic_trace(lambda x: torch.ops.aten.view.default(x.relu(), [-1]))
    nodes, x = str(graph.graph), rows()
    assert_same([tng.get_compiler(config)(graph, [x])(x)], [x.neg().view(-1)])
    assert str(graph.graph) == nodes


def test_cached_compilation_computes_and_keeps_nothing(tmp_path: Path) -> None:
    import torchair as tng

    class Model(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 8)
            self.cached = tng.inference.cache_compile(self.decode, cache_dir=str(tmp_path / "cache"))

        def decode(self, x: Tensor) -> Tensor:
            return swiglu(torch.relu(super().forward(x)))

    model, x = Model().npu(), rows()
    with torch.no_grad():
        assert_same([model.cached(x)], [model.decode(x)])
    assert not (tmp_path / "cache").exists()


def test_the_graph_engine_is_refused(tmp_path: Path) -> None:
    import torchair as tng
    from torchair.core import _backend

    with pytest.raises(NotImplementedError, match=r"no graph engine: torchair\.core\._torchair\.Initialize"):
        _backend.initialize_graph_engine()
    with pytest.raises(NotImplementedError, match=r"no graph engine: torchair\.core\._npu_utils\.NpuFormat"):
        tng.npu_format_cast_via_cpu(rows(), 29)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"torchair\.dynamo_export is not implemented"):
        tng.dynamo_export(rows(), model=nn.Linear(8, 8).npu(), export_path=str(tmp_path / "exported"))


def test_importing_torchair_makes_no_other_library_find_protobuf() -> None:
    program = """
import importlib.metadata
from moe_npu import sim

def version():
    try:
        return importlib.metadata.version("protobuf")
    except importlib.metadata.PackageNotFoundError:
        return None

before = version()
sim.activate()
import torchair
torchair.CompilerConfig()
assert version() == before
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)
    assert importlib.metadata.version.__module__ == "importlib.metadata"


def test_results_of_a_graph_are_tensors_of_the_device() -> None:
    compiled = torch.compile(swiglu, backend="npu", fullgraph=True)
    assert all(leaf.device.type == "npu" for leaf in tree_leaves(compiled(rows())))
