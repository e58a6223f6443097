"""--where: the rows of a table for which an expression in its columns holds.

    where = Where("event == 'purchase' and price > 0")
    where.columns                      # {"event": "text", "price": "number"}
    table.filter(where.holds(table))   # where a value is missing, it does not hold

The grammar is a part of Python's: names of columns, numbers, text in quotation marks, True, False;
``== != < <= > >=``, ``in (...)``, ``not in (...)``, ``is None``, ``is not None``; and, or, not.
A name that is no Python name is written in backticks: `event type`. Nothing is executed.
"""

import ast
import operator
import re
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import UserError
from pipeline.tables.times import read_dates

_COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
}
_HELP = "write it like \"event == 'purchase' and price > 0\": see docs/data.md"
_KINDS = {bool: "truth", int: "number", float: "number", str: "text"}


class Where:
    """A checked expression.

    ``columns`` holds the columns that it names, each with the kind of values that it is compared
    with: "number", "text", "truth" or "" (any).

    Raises:
        UserError: it is no expression of the grammar.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.columns: dict[str, str] = {}
        self._quoted: dict[str, str] = {}
        try:
            self._tree = ast.parse(re.sub("`([^`]+)`", self._plain, text).strip(), mode="eval").body
            self._check(self._tree)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            if isinstance(error, UserError):
                raise
            raise self._wrong("cannot be read") from error

    def holds(self, table: pa.Table) -> pa.ChunkedArray:
        """bool [rows]: whether the expression holds; null where a value that it needs is missing.

        Raises:
            ValueError: a value of a column cannot be compared.
        """
        found = self._value(self._tree, table)
        return found if isinstance(found, pa.ChunkedArray) else pa.chunked_array([found])

    def missing(self, names: list[str]) -> list[str]:
        return [name for name in self.columns if name not in names]

    def _plain(self, quoted: re.Match) -> str:
        name = f"quoted_{len(self._quoted)}_"
        self._quoted[name] = quoted[1]
        return name

    def _wrong(self, reason: str) -> UserError:
        return UserError(f"--where {self.text!r} {reason}; {_HELP}")

    def _check(self, node: ast.expr) -> None:
        if isinstance(node, ast.BoolOp):
            for value in node.values:
                self._check(value)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            self._check(node.operand)
        elif isinstance(node, ast.Name):
            self._note(node, "truth")
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            for left, how, right in zip(sides, node.ops, sides[1:], strict=False):
                self._check_pair(left, how, right)
        else:
            raise self._wrong(f"holds {ast.unparse(node)!r}, which is no condition")

    def _check_pair(self, left: ast.expr, how: ast.cmpop, right: ast.expr) -> None:
        if isinstance(how, (ast.In, ast.NotIn)):
            members = right.elts if isinstance(right, (ast.Tuple, ast.List, ast.Set)) else []
            kinds = {_KINDS.get(type(_constant(each)), "") for each in members}
            if not isinstance(left, ast.Name) or len(kinds) != 1 or not all(kinds):
                raise self._wrong("has an 'in' that is not: column in (values of one kind)")
            self._note(left, kinds.pop())
        elif isinstance(how, (ast.Is, ast.IsNot)):
            is_none = isinstance(right, ast.Constant) and right.value is None
            if not isinstance(left, ast.Name) or not is_none:
                raise self._wrong("has an 'is' that is not: column is None")
            self._note(left, "")
        else:
            columns = [side for side in (left, right) if isinstance(side, ast.Name)]
            values = [_constant(side) for side in (left, right) if not isinstance(side, ast.Name)]
            if not columns or any(type(value) not in _KINDS for value in values):
                raise self._wrong("compares something that is neither a column nor a value")
            for column in columns:
                self._note(column, _KINDS[type(values[0])] if values else "number")

    def _note(self, node: ast.Name, kind: str) -> None:
        name = self._name(node)
        before = self.columns.get(name, "")
        if before and kind and before != kind:
            raise self._wrong(f"compares {name} with a {before} and with a {kind}")
        self.columns[name] = before or kind

    def _name(self, node: ast.Name) -> str:
        return self._quoted.get(node.id, node.id)

    def _value(self, node: ast.expr, table: pa.Table) -> Any:
        if isinstance(node, ast.BoolOp):
            join = pc.and_kleene if isinstance(node.op, ast.And) else pc.or_kleene
            found = self._value(node.values[0], table)
            for each in node.values[1:]:
                found = join(found, self._value(each, table))
            return found
        if isinstance(node, ast.UnaryOp):
            return pc.invert(self._value(node.operand, table))
        if isinstance(node, ast.Name):
            return self._column(node, table)
        assert isinstance(node, ast.Compare)
        sides, found = [node.left, *node.comparators], None
        for left, how, right in zip(sides, node.ops, sides[1:], strict=False):
            pair = self._pair(left, how, right, table)
            found = pair if found is None else pc.and_kleene(found, pair)
        return found

    def _pair(self, left: ast.expr, how: ast.cmpop, right: ast.expr, table: pa.Table) -> Any:
        if isinstance(how, (ast.In, ast.NotIn)):
            assert isinstance(right, (ast.Tuple, ast.List, ast.Set))
            column, values = self._column(left, table), [_constant(each) for each in right.elts]
            some = [pc.equal(column, self._literal(value, column)) for value in values]
            found = some[0]
            for each in some[1:]:
                found = pc.or_kleene(found, each)
            return found if isinstance(how, ast.In) else pc.invert(found)
        if isinstance(how, (ast.Is, ast.IsNot)):
            column = self._column(left, table)
            return column.is_null() if isinstance(how, ast.Is) else column.is_valid()
        columns = [
            self._column(side, table) if isinstance(side, ast.Name) else None
            for side in (left, right)
        ]
        other = columns[0] if columns[0] is not None else columns[1]
        operands = [
            self._literal(_constant(side), other) if column is None else column
            for side, column in zip((left, right), columns, strict=True)
        ]
        return _COMPARE[type(how)](*operands)

    def _column(self, node: Any, table: pa.Table) -> pa.ChunkedArray:
        """A column as values of the kind that it is compared with."""
        name = self._name(node)
        column, kind = table[name], self.columns[name]
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if pa.types.is_binary(column.type) or pa.types.is_string_view(column.type):
            column = column.cast(pa.string())
        is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
        if is_text and kind != "text":
            trimmed = pc.utf8_trim_whitespace(column)
            column = pc.if_else(pc.equal(trimmed, ""), pa.scalar(None, column.type), trimmed)
        if kind == "number" and not (pa.types.is_integer(column.type)):
            return self._cast(name, column, pa.float64(), "a number")
        if kind == "truth":
            return self._cast(name, column, pa.bool_(), "true or false")
        if kind == "text" and not is_text and not pa.types.is_temporal(column.type):
            return self._cast(name, column, pa.string(), "text")
        return column

    def _cast(
        self, name: str, column: pa.ChunkedArray, kind: pa.DataType, what: str
    ) -> pa.ChunkedArray:
        if pa.types.is_temporal(column.type):
            raise self._wrong(f"compares {name} with {what}, but it holds dates")
        try:
            return column.cast(kind)
        except pa.ArrowInvalid as error:
            raise ValueError(f"--where: the {name} is not {what}") from error
        except pa.ArrowNotImplementedError as error:
            raise self._wrong(f"compares {name} with {what}, but it is {column.type}") from error

    def _literal(self, value: Any, column: pa.ChunkedArray) -> pa.Scalar:
        if not pa.types.is_temporal(column.type):
            is_whole = pa.types.is_integer(column.type) and isinstance(value, int)
            return (
                pa.scalar(value) if is_whole or not _is_number(value) else pa.scalar(float(value))
            )
        try:
            date = read_dates(pa.chunked_array([[value]]))
            if date.type.tz is not None and column.type.tz is None:  # Arrow compares none with UTC
                date = date.cast(pa.timestamp("ns"))
            return date.cast(pa.timestamp("ns", column.type.tz))[0]
        except ValueError as error:
            raise self._wrong(f"holds {value!r}, which is no date") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _constant(node: ast.expr) -> Any:
    """The value of a literal, None if the node is none."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        value = _constant(node.operand)
        sign = operator.neg if isinstance(node.op, ast.USub) else operator.pos
        return sign(value) if _is_number(value) else None
    return node.value if isinstance(node, ast.Constant) else None
