"""Read a pickle as data: no class is looked up, nothing is called, so no code of the file can run.

A class or function that the pickle names becomes a Name. A call of it, or an object of it, becomes
an Object with its arguments and attributes. Used for the file .metadata of PyTorch's distributed
checkpoints, which is a pickle.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from psclient.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class Name:
    """A class or function that a pickle names."""

    module: str
    name: str


@dataclass(slots=True, eq=False)
class Object:
    """An object in a pickle: the class or function that would make it, and its contents."""

    of: Any
    arguments: Any = ()
    attributes: dict[str, Any] = field(default_factory=dict)
    items: dict[Any, Any] = field(default_factory=dict)  # of a subclass of dict
    state: Any = None  # what the object would be restored from, as it is in the pickle

    def __getitem__(self, name: str) -> Any:
        """Return the attribute ``name``. Raises KeyError if it is missing."""
        return self.attributes[name]


_MARK = object()
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple, "EMPTY_SET": set,
    "MARK": lambda: _MARK,
}  # fmt: skip
_LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
    "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip
_IGNORED = {"PROTO", "FRAME"}


def read(data: bytes, label: str) -> Any:
    """Return the object in a pickle. Classes and calls become Names and Objects.

    label  name of the file, for errors

    Raises InvalidArgument if the pickle is malformed, or uses an operation that is not supported.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for operation, value, _ in pickletools.genops(data):
            name, argument = operation.name, cast(Any, value)
            if name in _LITERALS:
                stack.append(argument)
            elif name in _CONSTANTS:
                stack.append(_CONSTANTS[name]())
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name in ("BINPUT", "LONG_BINPUT"):
                memo[int(argument)] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[int(argument)])
            elif name == "STOP":
                return stack.pop()
            elif name in _OPERATIONS:
                _OPERATIONS[name](stack, argument)
            elif name not in _IGNORED:
                raise InvalidArgument(
                    f"{label}: the pickle has the operation {name}: not supported"
                )
    except InvalidArgument:
        raise
    except Exception as error:  # a malformed pickle may fail in many ways
        raise InvalidArgument(f"{label}: cannot be read as a pickle: {error!r}") from error
    raise InvalidArgument(f"{label}: cannot be read as a pickle: it does not end")


def _marked(stack: list[Any]) -> list[Any]:
    """Pop everything after the last mark, and the mark; return what was after it."""
    at = len(stack) - 1
    while stack[at] is not _MARK:
        at -= 1
    found = stack[at + 1 :]
    del stack[at:]
    return found


def _tuple(size: int) -> Callable[[list[Any], Any], None]:
    """Return the operation that replaces the last ``size`` values by a tuple of them."""

    def run(stack: list[Any], _: Any) -> None:
        values = tuple(stack[-size:])
        del stack[-size:]
        stack.append(values)

    return run


def _global(stack: list[Any], argument: Any) -> None:
    """Push a Name whose module and name are in one text, with a blank between them."""
    module, name = str(argument).split(" ", 1)
    stack.append(Name(module, name))


def _stack_global(stack: list[Any], _: Any) -> None:
    """Replace the last two values, a module and a name, by a Name."""
    name, module = stack.pop(), stack.pop()
    stack.append(Name(str(module), str(name)))


def _object(stack: list[Any], _: Any) -> None:
    """Replace a class or function and its arguments by an Object."""
    arguments, of = stack.pop(), stack.pop()
    stack.append(Object(of, arguments))


def _build(stack: list[Any], _: Any) -> None:
    """Set the attributes of an Object: a dict, or a tuple of dicts and None."""
    state = stack.pop()
    stack[-1].state = state
    for each in state if isinstance(state, tuple) else (state,):
        if isinstance(each, dict):
            stack[-1].attributes.update(each)


def _set(stack: list[Any], pairs: list[Any]) -> None:
    """Put alternating keys and values into the dict, or the Object, on the stack."""
    into = stack[-1].items if isinstance(stack[-1], Object) else stack[-1]
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        into[key] = value


def _set_item(stack: list[Any], _: Any) -> None:
    """Put one key and its value into the dict on the stack."""
    value, key = stack.pop(), stack.pop()
    _set(stack, [key, value])


def _append(stack: list[Any], _: Any) -> None:
    """Append a value to the list on the stack."""
    value = stack.pop()
    stack[-1].append(value)


def _appends(stack: list[Any], _: Any) -> None:
    """Append all values after the last mark to the list on the stack."""
    values = _marked(stack)
    stack[-1].extend(values)


_OPERATIONS: dict[str, Callable[[list[Any], Any], None]] = {
    "TUPLE": lambda stack, _: stack.append(tuple(_marked(stack))),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _object,
    "NEWOBJ": _object,
    "BUILD": _build,
    "SETITEM": _set_item,
    "SETITEMS": lambda stack, _: _set(stack, _marked(stack)),
    "APPEND": _append,
    "APPENDS": _appends,
}
