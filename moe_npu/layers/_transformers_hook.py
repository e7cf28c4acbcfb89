"""Register with transformers when it is imported, and never import it for those who do not use it.

Our integration modules add themselves to registries that live in modules of transformers. Where such a module is
loaded already, ours is imported at once; otherwise the finder below waits on ``sys.meta_path``, lets the regular import
run, and imports ours right after it.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

_OLDEST = "5.0"
_FOLLOWERS = {
    "transformers.integrations.moe": "moe_npu.layers.hf",
    "transformers.integrations.finegrained_fp8": "moe_npu.layers.hf_fp8",
    "transformers.modeling_utils": "moe_npu.layers.hf_legacy",
    "transformers.quantizers.auto": "moe_npu.layers.hf_quantizer",
}


def _import_follower(follower: str) -> None:
    """Import our module; where this transformers is too old for it, warn and leave transformers as it is."""
    try:
        importlib.import_module(follower)
    except ImportError as error:
        version = getattr(sys.modules["transformers"], "__version__", "of unknown version")
        message = (
            f"experts_implementation='moe_npu' is not available: it needs transformers>={_OLDEST}, but transformers "
            f"{version} is installed ({error}); moe_npu.ops and moe_npu.layers work without"
        )
        warnings.warn(message, RuntimeWarning, stacklevel=2)


class _FollowingLoader(Loader):
    """The regular loader of a module, which imports a follower once the module has run."""

    def __init__(self, loader: Loader, follower: str) -> None:
        self._loader = loader
        self._follower = follower

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader  # inspect and pickle see the regular one
        self._loader.exec_module(module)
        _import_follower(self._follower)


class _FollowingFinder(MetaPathFinder):
    """Finds the modules of ``_FOLLOWERS`` as usual and gives them a :class:`_FollowingLoader`, once each."""

    def __init__(self) -> None:
        self._waiting = dict(_FOLLOWERS)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        follower = self._waiting.pop(fullname, None)  # popped first: the look-up below comes here again
        if follower is None:
            return None
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _FollowingLoader(spec.loader, follower)
        return spec


def register_with_transformers() -> None:
    """Import our integration modules after those of transformers that they extend, now or when they are loaded."""
    sys.meta_path.insert(0, _FollowingFinder())
    for module, follower in _FOLLOWERS.items():
        if module in sys.modules:
            _import_follower(follower)
