"""Small errors for ``mutate.py``: where one can be planted in a file of Python, and a sample spread over the code.

An operator is a function of a syntax node that yields ``(start, end, text)``: the bytes to replace and what to put there.  Docstrings, messages, types
and functions that make texts are never touched.
"""

from __future__ import annotations

import ast
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import CodeType, FunctionType, ModuleType
from typing import Any


@dataclass(frozen=True)
class Mutant:
    """One error: the bytes ``start`` to ``end`` of ``file`` become ``text``."""

    file: str
    function: str
    line: int
    operator: str
    start: int
    end: int
    text: str

    def apply(self, source: bytes) -> bytes:
        return source[: self.start] + self.text.encode() + source[self.end :]

    def diff(self, source: bytes) -> tuple[str, str]:
        """The changed lines before and after, each as one stripped line."""
        first = source.rfind(b"\n", 0, self.start) + 1
        last = (source + b"\n").find(b"\n", self.end)
        before = source[first:last].decode()
        after = (source[first : self.start] + self.text.encode() + source[self.end : last]).decode()
        return " ".join(before.split()), " ".join(after.split())


def _both_ways(pairs: str) -> dict[str, str]:
    return {a: b for pair in pairs.split(",") for x, y in [pair.split()] for a, b in ((x, y), (y, x))}


Found = Iterator[tuple[int, int, str]]
TEXT = (ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom)
ARITHMETIC = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.Pow: ("**", "*"),
    ast.FloorDiv: ("//", "*"),
}
BITS = {ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&")}
BOUNDARY = {ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">")}
REVERSED = {
    ast.Lt: ("<", ">"),
    ast.LtE: ("<=", ">="),
    ast.Gt: (">", "<"),
    ast.GtE: (">=", "<="),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
}
OPPOSITE = {ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"), ast.In: ("in", "not in"), ast.NotIn: ("not in", "in")}
RENAMED = _both_ways(
    "min max,minimum maximum,amin amax,any all,exp expm1,log log1p,floor ceil,sum mean,seq_sum seq_mean,zeros_like ones_like,sigmoid logsigmoid,argmax argmin"
)
REMOVED = {"abs", "detach", "clamp", "sqrt", "exp", "expm1", "log", "sign", "logsigmoid", "sorted"}
SWAPPED = {"log_ratio": (0, 1), "where": (1, 2), "clamp": (0, 1)}
SIBLINGS = _both_ways(
    "low high,min max,pos neg,good bad,to over,num den,begin until,start end,groups pairs,tokens sequences,on member,chosen rejected,peak valley,"
    "warmup decay,group pair,reward advantage,tau_pos tau_neg"
)
WORDS = {
    "batch": "group",
    "group": "sequence",
    "sequence": "token",
    "base": "old",
    "old": "base",
    "teacher": "base",
    "amax": "amin",
    "amin": "amax",
}


@dataclass(frozen=True)
class Source:
    """A file as bytes, with the places of its syntax."""

    data: bytes

    def start(self, node: Any) -> int:
        return _line_starts(self.data)[node.lineno - 1] + node.col_offset

    def end(self, node: Any) -> int:
        return _line_starts(self.data)[node.end_lineno - 1] + node.end_col_offset

    def text(self, node: ast.AST) -> str:
        return self.data[self.start(node) : self.end(node)].decode()

    def between(self, left: ast.AST, right: ast.AST, old: str, new: str) -> Found:
        a, b = self.end(left), self.start(right)
        gap = self.data[a:b].decode()
        if old in gap:
            yield a, b, gap.replace(old, new, 1)

    def instead(self, node: ast.AST, text: str) -> Found:
        yield self.start(node), self.end(node), text


@cache
def _line_starts(data: bytes) -> list[int]:
    return [0, *(i + 1 for i, c in enumerate(data) if c == 10)]


def arithmetic(node: ast.AST, src: Source) -> Found:
    textual = (ast.Set, ast.List, ast.Tuple, ast.JoinedStr, ast.ListComp)
    if isinstance(node, ast.BinOp) and type(node.op) in {**ARITHMETIC, **BITS}:
        if not any(isinstance(x, textual) or isinstance(getattr(x, "value", None), str) for x in (node.left, node.right)):
            yield from src.between(node.left, node.right, *{**ARITHMETIC, **BITS}[type(node.op)])
    elif isinstance(node, ast.AugAssign) and type(node.op) in ARITHMETIC and not isinstance(node.value, textual):
        old, new = ARITHMETIC[type(node.op)]
        yield from src.between(node.target, node.value, f"{old}=", f"{new}=")


def comparison(table: dict) -> Callable[[ast.AST, Source], Found]:
    def operator(node: ast.AST, src: Source) -> Found:
        if isinstance(node, ast.Compare):
            for left, op, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
                if type(op) in table:
                    yield from src.between(left, right, *table[type(op)])

    return operator


def boolean(node: ast.AST, src: Source) -> Found:
    if isinstance(node, ast.BoolOp):
        for left, right in zip(node.values, node.values[1:], strict=False):
            yield from src.between(left, right, *(("and", "or") if isinstance(node.op, ast.And) else ("or", "and")))


def constant(node: ast.AST, src: Source) -> Found:
    if isinstance(node, ast.Constant):
        value = node.value
        if isinstance(value, bool):
            yield from src.instead(node, str(not value))
        elif isinstance(value, int):
            yield from src.instead(node, str(value + 1))
            if value > 0:
                yield from src.instead(node, str(value - 1))
        elif isinstance(value, float):
            yield from src.instead(node, repr(2 * value if value else 1.0))
        elif isinstance(value, str) and value in WORDS:
            yield from src.instead(node, f'"{WORDS[value]}"')


def negation(node: ast.AST, src: Source) -> Found:
    if isinstance(node, ast.UnaryOp):
        yield from src.instead(
            node, src.text(node.operand) if isinstance(node.operand, (ast.Name, ast.Attribute, ast.Call)) else f"({src.text(node.operand)})"
        )


def _name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else call.func.id if isinstance(call.func, ast.Name) else ""


def renamed(node: ast.AST, src: Source) -> Found:
    if isinstance(node, ast.Call) and (name := _name(node)) in RENAMED and not (isinstance(node.func, ast.Name) and name in ("sum",)):
        end = src.end(node.func)
        yield end - len(name), end, RENAMED[name]
    if isinstance(node, ast.keyword) and node.arg in ("min", "max"):
        yield src.start(node), src.start(node) + 3, RENAMED[node.arg]


def removed(node: ast.AST, src: Source) -> Found:
    if isinstance(node, ast.Call) and _name(node) in REMOVED:
        if isinstance(node.func, ast.Attribute) and src.text(node.func.value) not in ("torch", "math"):
            yield from src.instead(node, src.text(node.func.value))
        elif node.args:
            yield from src.instead(node, f"({src.text(node.args[0])})")


def swapped(node: ast.AST, src: Source) -> Found:
    if isinstance(node, ast.Call) and _name(node) in SWAPPED:
        i, j = SWAPPED[_name(node)]
        if len(node.args) > j:
            a, b = node.args[i], node.args[j]
            yield src.start(a), src.end(b), src.text(b) + src.data[src.end(a) : src.start(b)].decode() + src.text(a)


def sibling(node: ast.AST, src: Source) -> Found:
    if isinstance(node, ast.Attribute) and node.attr in SIBLINGS:
        end = src.end(node)
        if src.data[end : end + 1] != b"(":
            yield end - len(node.attr), end, SIBLINGS[node.attr]


def condition(node: ast.AST, src: Source) -> Found:
    """A check that is gone, or a condition turned round."""
    if isinstance(node, ast.If) and len(node.body) == 1 and isinstance(node.body[0], ast.Raise):
        yield from src.instead(node.test, "False")
    elif isinstance(node, (ast.If, ast.IfExp)) and not isinstance(node.test, ast.Compare):
        yield from src.instead(node.test, f"not ({src.text(node.test)})")
    elif isinstance(node, ast.comprehension):
        for test in node.ifs:
            yield from src.instead(test, "True")


def forgotten(node: ast.AST, src: Source) -> Found:
    """A statement that is left out: an update of a variable, or a call for its effect."""
    again = (
        isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and any(isinstance(n, ast.Name) and n.id == node.targets[0].id for n in ast.walk(node.value))
    )
    effect = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    if isinstance(node, ast.AugAssign) or again or effect:
        yield from src.instead(node, "pass")


def _code(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below one, without what is text or raises an error."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, TEXT):
            yield child
            yield from _code(child)


TYPES = ("Literal", "Callable", "Mapping", "Sequence", "dict", "tuple", "list")
PLUMBING = ("view", "batch", "step", "progress", "name", "metrics")


def neighbour(function: ast.AST, src: Source) -> Found:
    """A variable in the place of another: what is returned, and names that are assigned together."""
    if not isinstance(function, ast.FunctionDef):
        return
    names = [a.arg for a in function.args.args if a.arg != "self"]
    stores: list[tuple[int, str]] = []
    together: dict[str, str] = {}
    for node in _code(function):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                ids = [n.id for n in ast.walk(target) if isinstance(n, ast.Name)]
                stores += [(node.lineno, i) for i in ids]
                together.update((a, b) for a, b in zip(ids, ids[1:] + ids[:1], strict=True) if a != b and b not in PLUMBING)
    for node in _code(function):
        if isinstance(node, ast.Return) and node.value is not None and not isinstance(node.value, (ast.Constant, *TEXT)):
            used = {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)}
            known = [i for i in names + [i for line, i in sorted(stores) if line < node.lineno] if src.text(node.value) != i]
            likely = [i for i in known if isinstance(node.value, ast.Name) or (i in used and i not in PLUMBING)]
            if likely:
                yield from src.instead(node.value, likely[-1])
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in together and node.id not in PLUMBING:
            yield from src.instead(node, together[node.id])


OPERATORS: dict[str, Callable[[ast.AST, Source], Found]] = {
    "arithmetic": arithmetic,
    "boundary": comparison(BOUNDARY),
    "comparison": comparison({**REVERSED, **OPPOSITE}),
    "and/or": boolean,
    "constant": constant,
    "negation dropped": negation,
    "function": renamed,
    "call removed": removed,
    "arguments swapped": swapped,
    "attribute": sibling,
    "condition": condition,
    "statement removed": forgotten,
    "variable": neighbour,
}


def default(node: ast.AnnAssign | ast.arg, value: ast.expr, src: Source) -> Found:
    """Another default: the next of its literal values, or another number."""
    known = (
        [n.value for n in ast.walk(node.annotation) if isinstance(n, ast.Constant) and isinstance(n.value, str)] if node.annotation else []
    )
    if isinstance(value, ast.Constant) and value.value in known and len(known) > 1:
        yield from src.instead(value, f'"{known[(known.index(value.value) + 1) % len(known)]}"')
    else:
        yield from constant(value, src)


def candidates(file: str, data: bytes) -> list[Mutant]:
    """Every error that may be planted in a file, in order."""
    src, out, fields = Source(data), list[Mutant](), set[str]()

    def add(operator: str, scope: str, line: int, found: Found) -> None:
        out.extend(Mutant(file, scope, line, operator, *where) for where in found)

    def textual(node: ast.FunctionDef) -> bool:
        """``formula``, and functions that make a text; a property may return a word that others act on."""
        return node.name in ("formula", "__repr__") or (
            not node.decorator_list and node.returns is not None and src.text(node.returns) == "str"
        )

    def walk(node: ast.AST, scope: str) -> None:
        if isinstance(node, TEXT):
            return
        if isinstance(node, ast.FunctionDef):
            if textual(node):
                return
            scope = f"{scope}.{node.name}" if scope else node.name
            arguments = [*node.args.posonlyargs, *node.args.args]
            pairs = [*zip(arguments[len(arguments) - len(node.args.defaults) :], node.args.defaults, strict=True)]
            pairs += [(a, d) for a, d in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True) if d]
            for argument, value in pairs:
                add("default", scope, value.lineno, default(argument, value, src))
            add("variable", scope, node.lineno, neighbour(node, src))
            for child in node.body:
                walk(child, scope)
            return
        if isinstance(node, ast.ClassDef):
            nonlocal fields
            fields = {n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
            for child in node.body:
                walk(child, f"{scope}.{node.name}" if scope else node.name)
            return
        if isinstance(node, ast.AnnAssign):
            if isinstance(node.value, ast.Tuple) and not scope:
                return
            if node.value is not None:
                add("default", scope or "<module>", node.lineno, default(node, node.value, src))
                if not isinstance(node.value, ast.Constant):
                    walk(node.value, scope)
            return
        if isinstance(node, ast.Call) and _name(node) == "cast":
            node.args[:1] = []
        if isinstance(node, ast.Attribute) and src.text(node.value) == "self" and SIBLINGS.get(node.attr) not in fields:
            return  # nothing of that name
        if isinstance(node, ast.Subscript) and src.text(node.value) in TYPES:
            return
        if isinstance(node, ast.Assign) and not scope and isinstance(node.value, (ast.BinOp, ast.Tuple)):
            return  # a name for a type, a list of words
        for name, operator in OPERATORS.items():
            if operator is not neighbour:
                add(name, scope or "<module>", getattr(node, "lineno", 0), operator(node, src))
        for child in ast.iter_child_nodes(node):
            walk(child, scope)

    walk(ast.parse(data), "")
    lines = {m: data.count(b"\n", 0, m.start) + 1 for m in out}
    out = [replace(m, line=lines[m]) for m in out]
    return sorted(set(out), key=lambda m: (m.start, m.end, m.operator, m.text))


def changes(mutant: Mutant, source: bytes) -> bool:
    """Whether an error is Python, and other Python than before."""
    try:
        return ast.dump(ast.parse(mutant.apply(source))) != _dumped(source)
    except SyntaxError:
        return False


def draw(
    found: Sequence[Mutant], number: int, seed: int, sources: Mapping[str, bytes], declared: Callable[[Mutant], bool] = lambda m: False
) -> tuple[list[Mutant], list[Mutant]]:
    """A sample spread evenly over the code, and what was drawn before but is declared equivalent.

    The errors in order are cut into ``number`` equal pieces; of each an operator is drawn, then one of its places.
    """
    chosen, equivalent = [], []
    for i in range(number):
        piece: dict[str, list[Mutant]] = defaultdict(list)
        for m in found[i * len(found) // number : (i + 1) * len(found) // number]:
            piece[m.operator].append(m)
        rng = random.Random(f"{seed}/{i}")
        while piece:
            operator = rng.choice(sorted(piece))
            m = piece[operator].pop(rng.randrange(len(piece[operator])))
            if not piece[operator]:
                del piece[operator]
            if declared(m):
                equivalent.append(m)
            elif changes(m, sources[m.file]):
                chosen.append(m)
                break
    return chosen, equivalent


class _Probes(ast.NodeTransformer):
    """Before every statement of a function a call ``seen((file, line))``."""

    def __init__(self, file: str, seen: str) -> None:
        self.file, self.seen, self.inside = file, seen, False

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        was, self.inside = self.inside, True
        self.generic_visit(node)
        self.inside = was
        return node

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        for name in ("body", "orelse", "finalbody"):
            body = getattr(node, name, None)
            if self.inside and isinstance(body, list):
                setattr(node, name, [x for i, statement in enumerate(body) for x in self._with_probe(statement, i)])
        return node

    def _with_probe(self, statement: ast.stmt, i: int) -> list[ast.stmt]:
        docstring = i == 0 and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        probe = ast.parse(f"{self.seen}(({self.file!r}, {statement.lineno}))").body[0]
        return [statement] if docstring else [probe, statement]


def with_probes(file: str, source: bytes, seen: str) -> bytes:
    """The same code, which calls the built-in function ``seen`` with its file and line before every statement in a function."""
    return ast.unparse(ast.fix_missing_locations(_Probes(file, seen).visit(ast.parse(source)))).encode()


@cache
def _parsed(source: bytes) -> ast.Module:
    return ast.parse(source)


@cache
def _dumped(source: bytes) -> str:
    return ast.dump(_parsed(source))


def statement_line(mutant: Mutant, source: bytes) -> int:
    """Where the innermost statement begins that holds an error."""
    return max(
        (n.lineno for n in ast.walk(_parsed(source)) if isinstance(n, ast.stmt) and n.lineno <= mutant.line <= (n.end_lineno or 0)),
        default=mutant.line,
    )


def scope_of(mutant: Mutant, source: bytes) -> range:
    """The lines of the outermost class or function that holds an error."""
    for node in _parsed(source).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.lineno <= mutant.line <= (node.end_lineno or 0):
            return range(node.lineno, (node.end_lineno or 0) + 1)
    return range(mutant.line, mutant.line + 1)


def _function(mutant: Mutant, source: bytes) -> list[str] | None:
    """The names that lead to the outermost function whose body holds an error: of classes, then its own."""
    body, path, place = _parsed(source).body, list[str](), Source(source)
    while True:
        for node in body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and place.start(node.body[0]) <= mutant.start < place.end(node):
                path.append(node.name)
                break
        else:
            return None
        if isinstance(node, ast.FunctionDef):
            return path
        body = node.body


def _plain(found: Any) -> FunctionType | None:
    """The function under a property, a class method, a cache and the like."""
    while found is not None and not isinstance(found, FunctionType):
        found = next((getattr(found, n) for n in ("fget", "func", "__func__", "__wrapped__") if getattr(found, n, None) is not None), None)
    while (inner := getattr(found, "__wrapped__", None)) is not None:
        found = inner
    return found


def transplant(mutant: Mutant, source: bytes, module: ModuleType) -> bool:
    """Give a function of an imported module the code with the error.  False where that cannot be done: the error is in no function's body."""
    path = _function(mutant, source)
    if path is None:
        return False
    found: Any = module
    for name in path:
        found = vars(found).get(name)
        if found is None:
            return False
    function = _plain(found)
    code = compile(mutant.apply(source), str(module.__file__), "exec")
    for name in path:
        code = next((c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == name), None)  # type: ignore[assignment]
        if code is None:
            return False
    if function is None or function.__code__.co_name != path[-1] or function.__code__.co_freevars != code.co_freevars:
        return False
    function.__code__ = code
    return True
