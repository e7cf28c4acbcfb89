"""The table of device kernels: for each ``aclnn`` operator its arguments and the function that computes it on CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

# letter of an argument -> its type in C; capitals are descriptors
C_TYPES = {
    "T": "void*",  # tensor
    "L": "void*",  # list of tensors
    "A": "void*",  # int64 array
    "F": "void*",  # float array
    "B": "void*",  # bool array
    "S": "void*",  # scalar
    "Z": "void*",  # list of scalars
    "i": "int64_t",
    "e": "int32_t",  # int, enumeration or dtype number
    "b": "bool",
    "d": "double",
    "f": "float",
    "s": "const char*",
}


class Argument(NamedTuple):
    """One argument of an operator, as its adapter in torch_npu passes it."""

    name: str
    type: str  # a letter of C_TYPES
    is_output: bool
    is_changed: bool  # written in place
    is_passed: bool  # to the function that computes


class Kernel(NamedTuple):
    """A device operator, computed on CPU."""

    name: str
    arguments: tuple[Argument, ...]
    compute: Callable[..., Any]

    @property
    def signature(self) -> str:
        """The letters of all arguments."""
        return "".join(argument.type for argument in self.arguments)


KERNELS: dict[str, Kernel] = {}


def kernel(name: str, arguments: str, compute: Callable[..., Any]) -> None:
    """Add an operator to the table.

    Args:
        name: e.g. ``aclnnSwiGlu``.
        arguments: ``name:letter`` of each argument in the order of the adapter's call, separated by spaces; ``>``
            before the name is an output, ``>>`` one that ``compute`` gets too, for its dtype or shape, ``=`` an input
            that is changed in place. Example: ``"x:T dim:i >y:T"``.
        compute: gets every argument that is not an output by its name; a name that starts with an underscore is left
            out. Returns what the outputs shall hold, one value or a tuple in the order of the outputs; ``None`` for an
            output that it leaves as it is. It writes the arguments that are changed in place itself.

    Raises:
        ValueError: a second definition, or letters that do not exist.
    """
    if name in KERNELS:
        raise ValueError(f"{name} is defined twice")
    parsed = []
    for word in arguments.split():
        argument, _, letter = word.partition(":")
        if letter not in C_TYPES:
            raise ValueError(f"{name}: {word!r} has no letter of {', '.join(C_TYPES)}")
        plain = argument.lstrip(">=")
        is_output = argument[0] == ">"
        is_passed = plain[0] != "_" and (not is_output or argument.startswith(">>"))
        parsed.append(Argument(plain, letter, is_output, argument[0] == "=", is_passed))
    KERNELS[name] = Kernel(name, tuple(parsed), compute)
