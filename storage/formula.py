"""Formulas: small functions of numbers, written once in Python for the CPU and for a GPU.

Numba compiles a formula into the loops that call it. ``to_cuda`` translates its source to CUDA C.
Both compute the same bits, because both round after every operation, to the type of its operands.

A formula consists of assignments to names, ``while`` loops and one ``return`` at the end. It may
use + - * / & << >>, comparisons, conditional expressions, other formulas, and np.sqrt, np.floor,
np.float32, np.float64, np.int64 and np.uint32. There is no exp, log or pow, whose last bits differ
between machines; ``power``, ``powers`` and ``raised`` take their place. A name keeps the type of
its first value:

    Single   a float32 number
    float    a float64 number; so is a number that is written in the formula
    Count    an unsigned 32-bit number; has only & >> and comparisons
    Whole    a signed 64-bit number; has no division
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

import numpy as np

from storage.kernels import inline

Single = Any  # a float32 number
Count = Any  # an unsigned 32-bit number
Whole = Any  # a signed 64-bit number
formula = inline  # decorator of formulas

FLOATS = ("float", "double")
# Numba computes + - * << of Counts in 64 bits, and / of integers in float64; C does neither.
_OF_INTEGERS = {
    "unsigned": (ast.BitAnd, ast.RShift),
    "long long": (ast.Add, ast.Sub, ast.Mult, ast.BitAnd, ast.LShift, ast.RShift),
}
_OF_FLOATS = (ast.Add, ast.Sub, ast.Mult, ast.Div)
_OPERATORS: dict[type[ast.AST], str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.BitAnd: "&",
    ast.LShift: "<<",
    ast.RShift: ">>",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Eq: "==",
    ast.NotEq: "!=",
}
# annotation: C type
_PARAMETERS = {"Single": "float", "float": "double", "Count": "unsigned", "Whole": "long long"}
_CASTS = {"float32": "float", "float64": "double", "int64": "long long", "uint32": "unsigned"}
# formulas that CUDA has already: (type of the result, name)
_BUILT_IN = {
    "bits_of": ("long long", "__double_as_longlong"),
    "number_of": ("double", "__longlong_as_double"),
}


@formula
def bits_of(number: float) -> Any:
    """Return the bits of a float64 number, as an int64."""
    return np.float64(number).view(np.int64)


@formula
def number_of(bits: Whole) -> Any:
    """Return the float64 number that has these bits."""
    return np.int64(bits).view(np.float64)


@formula
def power(base: float, count: Single) -> Any:
    """Return base to the power of a whole number >= 0, by multiplications alone."""
    left = np.uint32(count)
    result = 1.0
    while left != np.uint32(0):
        result = result * base if (left & np.uint32(1)) != np.uint32(0) else result
        base = base * base
        left = left >> np.uint32(1)
    return result


@formula
def powers(base: float, other: float, count: Single) -> Any:
    """Return (base, other), each to the power of a whole number >= 0, by multiplications alone."""
    left = np.uint32(count)
    first = 1.0
    second = 1.0
    while left != np.uint32(0):
        odd = (left & np.uint32(1)) != np.uint32(0)
        first = first * base if odd else first
        second = second * other if odd else second
        base = base * base
        other = other * other
        left = left >> np.uint32(1)
    return first, second


@formula
def raised(n: Single, p: Single) -> Any:
    """Return n^p for finite n >= 0 and p in 0..1, rounded to float32.

    n is m 2^k with m from sqrt(1/2) to sqrt(2). The logarithm of m and the power of 2 are sums of
    their series, with errors below 1e-13.
    """
    bits = bits_of(np.float64(n))
    k = (bits - np.int64(0x3FE6A09E667F3BCD)) >> np.int64(52)
    m = number_of(bits - (k << np.int64(52)))
    s = (m - 1.0) / (m + 1.0)
    q = s * s
    series = q * (1.0 / 13.0 + q * (1.0 / 15.0 + q * (1.0 / 17.0)))
    series = q * (1.0 / 7.0 + q * (1.0 / 9.0 + q * (1.0 / 11.0 + series)))
    series = 1.0 + q * (1.0 / 3.0 + q * (1.0 / 5.0 + series))
    y = np.float64(p) * (np.float64(k) + 2.8853900817779268 * (s * series))  # 2 / ln 2
    whole = np.floor(y + 0.5)
    z = (y - whole) * 0.6931471805599453  # ln 2
    more = 1.0 + z * (1.0 / 9.0) * (1.0 + z * 0.1 * (1.0 + z * (1.0 / 11.0)))
    more = 1.0 + z * (1.0 / 6.0) * (1.0 + z * (1.0 / 7.0) * (1.0 + z * 0.125 * more))
    more = 1.0 + z * (1.0 / 3.0) * (1.0 + z * 0.25 * (1.0 + z * 0.2 * more))
    more = 1.0 + z * (1.0 + z * 0.5 * more)
    result = np.float32(more * number_of((np.int64(whole) + np.int64(1023)) << np.int64(52)))
    return result if n > np.float32(0.0) else n if p > np.float32(0.0) else np.float32(1.0)


class CannotTranslate(Exception):
    """A formula contains something that has no translation to CUDA C."""

    def __init__(self, function: str, line: int, what: str) -> None:
        super().__init__(f"formula {function!r}, line {line}: cannot translate {what}")


def c_name(formula: Any) -> str:
    """Return the name of a formula in CUDA C: that of the function, without underscores ahead."""
    name: str = formula.py_func.__name__
    return name.lstrip("_")


def c_parameters(function: Any, skip: int = 0) -> list[tuple[str, str]]:
    """Return (C type, name) of the parameters of a compiled function, except the first ``skip``."""
    parameters = list(inspect.signature(function.py_func).parameters.values())[skip:]
    return [(_PARAMETERS[each.annotation], each.name) for each in parameters]


def with_callees(formula: Any) -> Iterator[Any]:
    """Yield the formulas that a formula calls, directly or not, and last the formula itself."""
    for node in ast.walk(_parsed(formula)):
        match node:
            case ast.Call(func=ast.Name(id=name)) if name not in _BUILT_IN:
                callee = formula.py_func.__globals__.get(name)
                if hasattr(callee, "py_func"):  # else its translation will be refused
                    yield from with_callees(callee)
    yield formula


def result_types(formula: Any) -> list[str]:
    """Return the C types of the numbers that a formula returns."""
    return _Translator(formula).results


def to_cuda(formula: Any) -> str:
    """Return a formula as a device function in CUDA C.

    A formula that returns a tuple becomes a function that returns nothing: its results are
    written to references, which are parameters after its own. It reads all of its parameters before
    it writes the first result, so that a variable may be both.
    """
    return _Translator(formula).text


def _parsed(formula: Any) -> ast.FunctionDef:
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(formula.py_func))).body
    assert isinstance(tree, ast.FunctionDef)
    return tree


class _Translator:
    """The translation of one formula.

    text     a device function in CUDA C
    results  C types of the numbers that the formula returns
    """

    def __init__(self, formula: Any) -> None:
        self._formula, self._tree = formula, _parsed(formula)
        parameters = c_parameters(formula)
        self._types = {name: kind for kind, name in parameters}
        self.results: list[str] = []
        self._returned: list[str] = []
        body = self._block(self._tree.body)
        given = [f"{kind} {name}" for kind, name in parameters]
        if len(self.results) == 1:
            kind, body = self.results[0], [*body, f"return {self._returned[0]};"]
        else:
            kind = "void"
            values = list(zip(self.results, self._returned, strict=True))
            given += [f"{of}& result{k}" for k, (of, _) in enumerate(values)]
            body += [f"const {of} value{k} = {value};" for k, (of, value) in enumerate(values)]
            body += [f"result{k} = value{k};" for k in range(len(values))]
        inside = textwrap.indent("\n".join(body), "    ")
        head = f"__device__ inline {kind} {c_name(formula)}({', '.join(given)})"
        self.text = f"{head} {{\n{inside}\n}}\n"

    def _block(self, statements: list[ast.stmt]) -> list[str]:
        """Return the lines of some statements in C."""
        lines: list[str] = []
        for each in statements:
            if isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant):
                continue  # the docstring
            if isinstance(each, ast.Assign):
                lines.append(self._assign(each))
            elif isinstance(each, ast.While):
                condition, _ = self._value(each.test)
                inner = textwrap.indent("\n".join(self._block(each.body)), "    ")
                lines += [f"while ({condition}) {{", inner, "}"]
            elif isinstance(each, ast.Return) and each is self._tree.body[-1]:
                assert each.value is not None
                several = isinstance(each.value, ast.Tuple)
                for value in each.value.elts if several else [each.value]:  # type: ignore[attr-defined]
                    text, kind = self._value(value)
                    self._returned.append(text)
                    self.results.append(kind)
            else:
                raise self._refusal(each)
        return lines

    def _assign(self, statement: ast.Assign) -> str:
        (target,) = statement.targets
        if not isinstance(target, ast.Name):
            raise self._refusal(target)
        text, kind = self._value(statement.value)
        if target.id not in self._types:
            self._types[target.id] = kind
            return f"{kind} {target.id} = {text};"
        if self._types[target.id] != kind:
            raise self._refusal(target, f"a {kind} for {target.id!r} of another type")
        return f"{target.id} = {text};"

    def _value(self, node: ast.AST) -> tuple[str, str]:
        """Return (an expression in C, its type)."""
        match node:
            case ast.Name(id=name):
                if name not in self._types:
                    raise self._refusal(node, f"{name!r}, which is no parameter or variable")
                return name, self._types[name]
            case ast.Constant(value=float()):
                return repr(node.value), "double"
            case ast.UnaryOp(op=ast.USub()):
                text, kind = self._value(node.operand)
                if kind == "unsigned":
                    raise self._refusal(node, "a negative Count")
                return f"(-{text})", kind
            case ast.BinOp():
                return self._binary(node)
            case ast.Compare(ops=[operator], comparators=[right]) if type(operator) in _OPERATORS:
                (left, kind), (text, other) = self._value(node.left), self._value(right)
                self._same(node, kind, other, "a comparison")
                return f"({left} {_OPERATORS[type(operator)]} {text})", "bool"
            case ast.IfExp():
                test, _ = self._value(node.test)
                (yes, kind), (no, other) = self._value(node.body), self._value(node.orelse)
                if kind != other:
                    raise self._refusal(node, f"a choice between {kind} and {other}")
                return f"({test} ? {yes} : {no})", kind
            case ast.Call():
                return self._call(node)
        raise self._refusal(node)

    def _binary(self, node: ast.BinOp) -> tuple[str, str]:
        (left, kind), (right, other) = self._value(node.left), self._value(node.right)
        self._same(node, kind, other, "an operation")
        if not isinstance(node.op, _OF_FLOATS if kind in FLOATS else _OF_INTEGERS.get(kind, ())):
            raise self._refusal(node, f"{type(node.op).__name__} of {kind}")
        kind = "double" if "double" in (kind, other) else kind
        return f"({left} {_OPERATORS[type(node.op)]} {right})", kind

    def _same(self, node: ast.AST, kind: str, other: str, what: str) -> None:
        """Refuse numbers of two types, except a float32 and a float64 number."""
        if kind != other and not (kind in FLOATS and other in FLOATS):
            raise self._refusal(node, f"{what} of {kind} and {other}")

    def _call(self, node: ast.Call) -> tuple[str, str]:
        if isinstance(node.func, ast.Attribute):
            return self._numpy(node, node.func.attr)
        assert isinstance(node.func, ast.Name)
        callee = self._formula.py_func.__globals__.get(node.func.id)
        if not hasattr(callee, "py_func"):
            raise self._refusal(node, f"{node.func.id!r}, which is no formula")
        wanted = [kind for kind, _ in c_parameters(callee)]
        values = [self._value(each) for each in node.args]
        if [kind for _, kind in values] != wanted:
            raise self._refusal(node, f"arguments of other types than {wanted}")
        if node.func.id in _BUILT_IN:
            kind, name = _BUILT_IN[node.func.id]
        else:
            (kind,), name = result_types(callee), c_name(callee)
        return f"{name}({', '.join(text for text, _ in values)})", kind

    def _numpy(self, node: ast.Call, function: str) -> tuple[str, str]:
        """Return the translation of a call of numpy's ``function``."""
        (argument,) = node.args
        if function in _CASTS and isinstance(argument, ast.Constant):
            return f"(({_CASTS[function]}){argument.value!r})", _CASTS[function]
        text, kind = self._value(argument)
        if function in _CASTS:
            return f"(({_CASTS[function]}){text})", _CASTS[function]
        if function in ("sqrt", "floor") and kind in FLOATS:
            return f"{function}{'f' if kind == 'float' else ''}({text})", kind
        raise self._refusal(node, f"np.{function}")

    def _refusal(self, node: ast.AST, what: str = "") -> CannotTranslate:
        line = getattr(node, "lineno", 0)
        return CannotTranslate(c_name(self._formula), line, what or type(node).__name__)
