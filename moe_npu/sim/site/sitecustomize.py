"""Runs when a Python process starts under ``moe-npu sim``: ``import torch_npu`` shall find the simulated device.

This folder is first on ``PYTHONPATH`` there, so that child processes have the device, too. Nothing is imported before
torch_npu is.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType


class _DeviceLoader(Loader):
    """The regular loader of torch_npu, between loading the device and connecting it."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        from moe_npu.sim import device

        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        device.load()
        with device.quiet_import():
            self._loader.exec_module(module)
        device.connect()


class _DeviceFinder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torch_npu":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _DeviceLoader(spec.loader)
        return spec


def _run_next_sitecustomize() -> None:
    """Run the one that this file hides."""
    here = Path(__file__).parent
    for folder in sys.path:
        if folder and Path(folder).resolve() != here.resolve() and (Path(folder) / "sitecustomize.py").is_file():
            spec = importlib.util.spec_from_file_location("sitecustomize", Path(folder) / "sitecustomize.py")
            assert spec is not None and spec.loader is not None
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
            return


sys.meta_path.insert(0, _DeviceFinder())
_run_next_sitecustomize()
