"""Builds the libraries that stand in for CANN: once per version of torch, torch_npu and these sources, into a cache."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from moe_npu.sim.installation import SimulatorError, compiler, require_platform, torch_npu_folder
from moe_npu.sim.kernels import KERNELS, Kernel
from moe_npu.sim.kernels.table import C_TYPES

_NATIVE = Path(__file__).with_name("native")
_RUNTIME = "libmoe_npu_sim.so"
_OBJECTS = ("runtime.o", "collectives.o", "operators.o")
# the names under which torch_npu asks for CANN; all of them lead to the runtime above
LIBRARIES = (
    "libascendcl.so",
    "libhccl.so",
    "libhcomm.so",
    "libacl_op_compiler.so",
    "libge_runner.so",
    "libgraph.so",
    "libacl_tdt_channel.so",
    "libatb.so",
    "libruntime.so",
    "libopapi.so",
    "libmspti.so",
)
# runtime functions that have nothing to do on a device that is always idle, computes in one way, fails at once and has
# no activities to report to a profiler; all others that the simulator does not define raise NotImplementedError
_IDLE = re.compile(
    r"acl(Init|Finalize|AppLog|SetCompileopt)$"
    r"|acl(rt|op|mdl|prof)?(Destroy|Finalize|FreePhysical|ReleaseMemAddress|UnmapMem)\w*$"
    r"|aclrtSet(CurrentContext|Op\w+Time[Oo]ut\w*|Stream(Attribute|FailureMode|OverflowSwitch)|SysParamOpt)$"
    r"|aclrt(Reset|Unuse|UnSubscribe)\w*$|aclrtDeviceEnablePeerAccess$"
    r"|aclrt(GetLastError|PeekAtLastError|CtxSetSysParamOpt|CmoAsync)$"
    r"|HcclSetConfig$|Msprof\w+$|aclop(CreateAttr|SetAttr\w+)$|aclSetTensor(DescName|PlaceMent)$"
    r"|mspti(ActivityEnable|ActivityDisable|ActivityFlushAll|ActivityRegisterCallbacks|Subscribe|Unsubscribe)$"
    r"|_Z\w*D[012]Ev$"
)


def cache_folder() -> Path:
    """Where built libraries are kept: ``$MOE_NPU_SIM_CACHE``, or ``moe_npu/sim`` of the user's cache folder."""
    folder = os.environ.get("MOE_NPU_SIM_CACHE")
    if folder:
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe_npu" / "sim"


def build() -> Path:
    """The folder of the libraries, built unless it is there already. Several processes may build at once.

    Raises:
        SimulatorError: torch_npu or a compiler is missing, the platform is not supported, or the compiler fails.
    """
    require_platform()
    npu, cxx = torch_npu_folder(), compiler()
    key = hashlib.sha256()  # the sources and the table stand for our version, and for changes between versions
    for part in (torch.__version__, importlib.metadata.version("torch_npu"), str(npu), *cxx, str(C_TYPES)):
        key.update(part.encode() + b"\0")
    for source in (Path(__file__), *sorted(_NATIVE.iterdir())):
        key.update(source.read_bytes())
    for kernel in KERNELS.values():
        key.update(f"{kernel.name} {kernel.signature}\n".encode())
    folder = cache_folder() / key.hexdigest()[:16]
    if folder.is_dir():
        _require_own(folder)
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise SimulatorError(f"cannot keep libraries in {folder.parent} ({error}); set MOE_NPU_SIM_CACHE") from None
    try:
        _build_into(scratch, npu, cxx)
        scratch.chmod(0o755)
        try:
            scratch.rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    _require_own(folder)
    return folder


def _require_own(folder: Path) -> None:
    """Load nothing that another user could have put there."""
    status = folder.stat()
    if status.st_uid not in (os.getuid(), 0) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise SimulatorError(f"{folder} belongs to another user, or others may write to it; set MOE_NPU_SIM_CACHE")


def _build_into(folder: Path, npu: Path, cxx: Sequence[str]) -> None:
    torch_folder = Path(torch.__file__).parent
    (folder / "operators.cpp").write_text(_operators_source(npu / "lib" / "libtorch_npu.so"))
    defined = _defined_names(folder, cxx, torch_folder)
    (folder / "stubs.cpp").write_text(_stubs_source(npu, torch_folder, defined))
    objects = (*_OBJECTS, "stubs.o")
    _run(*cxx, "-O1", "-fPIC", "-w", "-c", f"-I{_NATIVE}", "stubs.cpp", folder=folder)
    _run(
        *cxx, "-shared", "-o", _RUNTIME, f"-Wl,-soname,{_RUNTIME}", *objects,
        f"-L{torch_folder / 'lib'}", "-lc10", folder=folder,
    )  # fmt: skip
    (folder / "empty.cpp").write_text("")
    for library in LIBRARIES:
        _run(
            *cxx, "-shared", "-o", library, f"-Wl,-soname,{library}", "-Wl,--no-as-needed", "empty.cpp",
            "-L.", f"-l:{_RUNTIME}", "-Wl,-rpath,$ORIGIN", folder=folder,
        )  # fmt: skip


def _defined_names(folder: Path, cxx: Sequence[str], torch_folder: Path) -> set[str]:
    """Compile everything but the stubs; returns what that defines."""
    flags = ("-O1", "-fPIC", "-c", f"-I{_NATIVE}")
    abi = int(torch.compiled_with_cxx11_abi())
    _run(
        *cxx, *flags, "-std=c++20", f"-D_GLIBCXX_USE_CXX11_ABI={abi}", f"-isystem{torch_folder / 'include'}",
        str(_NATIVE / "runtime.cpp"), folder=folder,
    )  # fmt: skip
    _run(*cxx, *flags, "-std=c++20", str(_NATIVE / "collectives.cpp"), folder=folder)
    _run(*cxx, *flags, "-std=c++20", "operators.cpp", folder=folder)
    return set().union(*(_symbols("--defined-only", folder / name) for name in _OBJECTS))


def _operators_source(library: Path) -> str:
    """Entry points of every operator that torch_npu may look up; those without a kernel raise."""
    names = {
        name.decode()
        for name in re.findall(rb"\x00(aclnn[A-Z]\w+)(?=\x00)", library.read_bytes())
        if not name.endswith(b"GetWorkspaceSize")
    } - set(re.findall(r"\b(aclnn\w+)\(", (_NATIVE / "runtime.cpp").read_text()))
    lines = ["#include <cstring>", "#include <initializer_list>", '#include "operators.h"', 'extern "C" {']
    for index, kernel in enumerate(KERNELS.values()):
        lines.append(f'static const Operator op{index} = {{{index}, "{kernel.name}", "{kernel.signature}"}};')
        if kernel.name.startswith("aclnn"):  # the others are graph operators, which are asked for by name
            lines.append(_kernel_source(index, kernel))
    lines.append("const Operator* moe_npu_sim_find(const char* name) {")
    lines.append(f"  for (auto* op : {{{', '.join(f'&op{index}' for index in range(len(KERNELS)))}}})")
    lines.append("    if (std::strcmp(op->name, name) == 0) return op;")
    lines.append("  return nullptr;\n}")
    for name in sorted(names - set(KERNELS)):
        lines.append(f'int {name}GetWorkspaceSize() {{ moe_npu_sim_unimplemented("{name}"); return 0; }}')
        lines.append(f'int {name}() {{ moe_npu_sim_unimplemented("{name}"); return 0; }}')
    return "\n".join([*lines, "}", ""])


def _kernel_source(index: int, kernel: Kernel) -> str:
    fields = {"int64_t": "integer", "int32_t": "integer", "bool": "integer", "double": "real", "float": "real"}
    parameters, slots = "", []
    for number, letter in enumerate(kernel.signature):
        c_type = C_TYPES[letter]
        parameters += f"{c_type} a{number}, "
        field = fields.get(c_type, "pointer")
        slots.append(f"{{.{field} = {'(void*)' if field == 'pointer' else ''}a{number}}}")
    return f"""int {kernel.name}GetWorkspaceSize({parameters}uint64_t* size, void** executor) {{
  const Slot slots[] = {{{", ".join(slots)}}};
  return moe_npu_sim_prepare(&op{index}, slots, size, executor);
}}
int {kernel.name}(void*, uint64_t, void* executor, void*) {{ return moe_npu_sim_launch(executor); }}"""


def _stubs_source(npu: Path, torch_folder: Path, defined: set[str]) -> str:
    """Every other symbol that torch_npu's libraries link against or look up."""
    libraries = [*npu.glob("lib/*.so"), *npu.glob("_C*.so")]
    needed: set[str] = set()
    for library in libraries:
        needed |= _symbols("--undefined-only", library)
    available = set(defined)
    for library in [*libraries, *torch_folder.glob("lib/*.so*"), *_system_libraries(libraries[0])]:
        available |= _symbols("--defined-only", library)
    looked_up = re.findall(
        rb"\x00(acl(?:rt|op|mdl|prof|tdt|sys|Get|Set|Create|Destroy|Init|Fin|App|GenC)\w*"
        rb"|Hccl[A-Z]\w*|rt[A-Z]\w*|mspti[A-Z]\w*)(?=\x00)",
        (npu / "lib" / "libtorch_npu.so").read_bytes(),
    )
    names = (needed | {name.decode() for name in looked_up}) - available
    lines = ['#include "operators.h"']
    for index, name in enumerate(sorted(names)):
        # _ZTH: initialisers of thread-local variables, weak; the loader does without them
        if name.startswith(("Py", "_Py", "_ZTH", "_ITM", "__")):
            continue
        if name.startswith("_ZT"):
            lines.append(f'extern "C" void* data{index}[64] __asm__("{name}"); void* data{index}[64] = {{}};')
            continue
        body = "" if _IDLE.match(name) else f'moe_npu_sim_unimplemented("{name}"); '
        lines.append(f'extern "C" long stub{index}() __asm__("{name}"); long stub{index}() {{ {body}return 0; }}')
    return "\n".join([*lines, ""])


def _system_libraries(library: Path) -> list[Path]:
    output = _run("ldd", str(library), folder=library.parent)
    return [Path(path) for path in re.findall(r"(?:=> |^\s*)(/\S+) \(", output, re.M)]


def _symbols(which: str, library: Path) -> set[str]:
    dynamic = ["-D"] if ".so" in library.name else []
    output = _run("nm", *dynamic, which, str(library), folder=library.parent)
    return {line.split()[-1].partition("@")[0] for line in output.splitlines() if line.strip()}


def _run(*command: str, folder: Path) -> str:
    """What a program prints."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SimulatorError(f"{' '.join(command)} failed:\n{done.stderr.strip()}")
    return done.stdout
