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

from moe_npu.ops._errors import OperatorTypeError

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
_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)


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


def _holds_ints(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in _INTEGERS


def _converted(op: str, name: str, accepted: _Accepted, value: Any) -> Any:
    """``value``, or what torch's own operators make of it: numbers of numpy, arrays of ints, tensors of one int."""
    if int in accepted.items:
        is_list = _holds_ints(value) and value.dim() == 1 and torch.Tensor not in accepted.types
        if is_list or isinstance(value, np.ndarray):
            value = value.tolist()
        elif isinstance(value, (list, tuple)) and any(isinstance(item, torch.Tensor) for item in value):
            value = [int(item) if _holds_ints(item) and item.numel() == 1 else item for item in value]
    if isinstance(value, bool) and bool not in accepted.types:
        raise OperatorTypeError(f"{op}: {name} must be {accepted.words}, but is bool")
    if isinstance(value, accepted.types):
        if not accepted.items or not isinstance(value, (list, tuple)):
            return value
        for index, item in enumerate(value):
            if not isinstance(item, accepted.items):
                raise OperatorTypeError(
                    f"{op}: {name}[{index}] must be {accepted.item_words}, but is {type(item).__name__}"
                )
        return value
    if isinstance(value, np.bool_) and bool in accepted.types:
        return bool(value)
    if int in accepted.types and _holds_ints(value) and value.numel() == 1:
        return int(value)
    raise OperatorTypeError(f"{op}: {name} must be {accepted.words}, but is {type(value).__name__}")


def typed(function: _Function) -> _Function:
    """Make a public operator refuse, in words, arguments of a type that its annotations do not name.

    Raises:
        OperatorTypeError: at the call, naming argument, expected and given type. Missing and unknown arguments stay
            Python's ``TypeError``.
    """
    hints = typing.get_type_hints(function)
    op = function.__name__
    positional = [(name, _accepted(hints[name])) for name in inspect.signature(function).parameters]
    by_name = dict(positional)

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        # not strict: too many arguments are Python's to refuse
        given = [
            _converted(op, name, accepted, value) for (name, accepted), value in zip(positional, args, strict=False)
        ]
        named = {
            name: _converted(op, name, by_name[name], value) if name in by_name else value
            for name, value in kwargs.items()
        }
        return function(*given, *args[len(given) :], **named)

    return typing.cast(_Function, checked)
