"""Graph mode: torchair and npugraph_ex run the graphs that they capture operator by operator.

Both come with torch_npu and do everything up to the optimized FX graph as on the device: configuration, decompositions,
the split into forward and backward, fusion patterns. The last step is another one: instead of translating the graph for
CANN's graph engine, or capturing it on the device, its operators are launched one after the other. Hence nothing here
shows that the graph engine has a counterpart of an operator, or that a graph can be captured.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, NoReturn
from unittest import mock

from torch.utils._mode_utils import no_dispatch

_PACKAGE = "torch_npu.dynamo.torchair"
_COMPILERS = ("torchair.npu_fx_compiler", "npugraph_ex.npu_fx_compiler")
# bindings of CANN's graph engine: libraries that link against it, and its messages, which need protobuf
_ENGINE = (
    "torchair.core._torchair",
    "torchair.core._npu_graph_executor",
    "torchair.core._npu_utils",
    "torchair._ge_concrete_graph.ge_ir_pb2",
)


class _Absent:
    """A class, function or constant of CANN's graph engine: it can be named and derived from, but not called."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> _Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        part = _Absent(f"{self._name}.{name}")
        setattr(self, name, part)  # one object per name: the constants are keys of tables
        return part

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return ()

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse."""
        raise NotImplementedError(f"the simulated device has no graph engine: {self._name} is not implemented")


class _EngineLoader(Loader):
    def exec_module(self, module: ModuleType) -> None:
        engine = _Absent(module.__name__)
        members = {"__getattr__": engine.__getattr__, "FinalizeGraphEngine": lambda: None}  # called at exit
        module.__dict__.update(members)


class _PatchingLoader(Loader):
    """Runs the loader of a module, within a context."""

    def __init__(self, loader: Any, around: Callable[[ModuleType], contextlib.AbstractContextManager[None]]) -> None:
        self._loader = loader
        self._around = around

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        with self._around(module):
            self._loader.exec_module(module)


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name in _ENGINE:
            return ModuleSpec(name, _EngineLoader())
        around = _without_protobuf if name == _PACKAGE else _run_operators if name in _COMPILERS else None
        spec = None if around is None else PathFinder.find_spec(name, path, target)
        if spec is not None:
            assert around is not None
            spec.loader = _PatchingLoader(spec.loader, around)
        return spec


@contextlib.contextmanager
def _without_protobuf(_: ModuleType) -> Iterator[None]:
    """Answer torchair, which asks for the version of protobuf: nothing here needs it."""
    version = importlib.metadata.version

    def version_or_any(name: str) -> str:
        try:
            return version(name)
        except importlib.metadata.PackageNotFoundError:
            if name != "protobuf":
                raise
            return "4"

    with mock.patch.object(importlib.metadata, "version", version_or_any):
        yield


@contextlib.contextmanager
def _run_operators(module: Any) -> Iterator[None]:
    """Replace the last step of a compiler once its module has been loaded."""
    yield

    def optimized_graph(self: Any, graph: Any, example_inputs: list[Any], observer: Any) -> Any:
        export = getattr(self.config, "export", None)
        if export is not None and export.export_mode:
            raise NotImplementedError(
                "the simulated device has no graph engine: torchair.dynamo_export is not implemented"
            )
        with no_dispatch():
            graph = copy.deepcopy(graph)
        graph = module._optimize_fx(graph, self.config, observer)
        module._valid_graph(graph)
        graph.recompile()  # passes may have changed nodes only
        return graph

    module._NpuFxCompiler._gen_compiled_gm = optimized_graph


def install() -> None:
    """Make ``torchair`` and ``npugraph_ex`` work once they are imported, and the backends that they provide."""
    sys.meta_path.insert(0, _Finder())
