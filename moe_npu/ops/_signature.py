"""Types of arguments: the annotations of a public function, enforced.

torch's own operators get this from their schema. Ours are Python functions, and a list where a tensor belongs would
otherwise surface as an ``AttributeError`` from the middle of a check.
"""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from moe_npu.ops._errors import reject

_Function = TypeVar("_Function", bound=Callable[..., Any])

_SCALARS: dict[Any, tuple[tuple[type, ...], str]] = {
    torch.Tensor: ((torch.Tensor,), "a tensor"),
    torch.dtype: ((torch.dtype,), "a dtype"),
    bool: ((bool,), "a bool"),
    int: ((int, torch.SymInt, np.integer), "an int"),
    float: ((float, int, torch.SymFloat, torch.SymInt, np.floating, np.integer), "a number"),
    str: ((str,), "a string"),
    type(None): ((type(None),), "None"),
}


class _Accepted(NamedTuple):
    types: tuple[type, ...]
    items: tuple[type, ...]  # of the elements, where a list is accepted
    words: str
    item_words: str


def _accepted(annotation: Any) -> _Accepted:
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    accepted: tuple[type, ...] = ()
    items: tuple[type, ...] = ()
    words, item_words = [], ""
    for part in typing.get_args(annotation) if is_union else (annotation,):
        if typing.get_origin(part) in (Sequence, list):
            items, item_words = _SCALARS[typing.get_args(part)[0]]
            accepted += (list, tuple)
            words.append(f"a list of {item_words.split()[-1]}s")
        else:
            accepted += _SCALARS[part][0]
            words.append(_SCALARS[part][1])
    return _Accepted(accepted, items, " or ".join(words), item_words)


def typed(function: _Function) -> _Function:
    """Make a public operator refuse, in words, arguments of a type that its annotations do not name.

    Raises:
        OperatorError: at the call, naming argument, expected and given type. Missing and unknown arguments stay
            Python's ``TypeError``.
    """
    hints = typing.get_type_hints(function)
    op = function.__name__
    positional = [(name, _accepted(hints[name])) for name in inspect.signature(function).parameters]
    by_name = dict(positional)

    def check(name: str, accepted: _Accepted, value: Any) -> None:
        if not isinstance(value, accepted.types):
            reject(f"{op}: {name} must be {accepted.words}, but is {type(value).__name__}")
        if accepted.items and isinstance(value, (list, tuple)):
            for index, item in enumerate(value):
                if not isinstance(item, accepted.items):
                    reject(f"{op}: {name}[{index}] must be {accepted.item_words}, but is {type(item).__name__}")

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        # strict would turn too many arguments into a ValueError of zip
        for (name, accepted), value in zip(positional, args, strict=False):
            check(name, accepted, value)
        for name, value in kwargs.items():
            if name in by_name:
                check(name, by_name[name], value)
        return function(*args, **kwargs)

    return typing.cast(_Function, checked)
