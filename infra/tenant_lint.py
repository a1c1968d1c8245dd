"""Tenant first: every statement on rows that belong to tenants begins with the filter on the tenant.

`python infra/tenant_lint.py` reads the code (no database, no import of it) and exits with 1 for each statement that

- selects, updates or deletes such rows without `Table.tenant_id == ...` as the first condition of its `where`,
  unless it stands in a `with across(...)` block, or in a function named below;
- fetches such a row by its key alone (`session.get`), or is raw SQL outside migrations.

The database holds tenants apart as well (row-level security); the lint sees the slip before it gets there.
"""

import ast
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
CHECKED = ("registry", "flows")
STATEMENTS = {"select", "update", "delete"}
FETCHES = {"get", "get_one"}
# Half-made statements, and those that only run inside somebody else's `with across(...)`: with what filters them.
ELSEWHERE = {
    ("registry/jobs.py", "_claimed"): "called in the block of `claim`, by the ids it has just taken",
    ("registry/line.py", "apart_from_others"): "called in the block of `claim`, by the jobs it has just locked",
    ("registry/line.py", "behind"): "a condition on jobs that a statement has filtered",
    ("registry/line.py", "line"): "called in the blocks of `claim`",
    ("registry/schedules.py", "_with_owner"): "its callers filter, or are in a block",
}
RAW = {
    "registry/schema.py": "locks and grants",
    "registry/session.py": "pragmas and settings of connections",
    "registry/tenancy.py": "asks which role this is",
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def owned_tables() -> set[str]:
    """The classes of the models that say whose rows they hold, and the tenants themselves."""
    files = sorted((ROOT / "registry" / "models").glob("*.py"))
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    classes = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    return {"Tenant"} | {one.name for one in classes if "tenant_id" in _annotated(one)}


def complaints(path: str, code: str, owned: set[str]) -> list[str]:
    """What is wrong in one file, by line."""
    return sorted(_File(path, ast.parse(code), owned).complaints())


class _File:
    """One parsed file, and what is known in it by name."""

    def __init__(self, path: str, tree: ast.Module, owned: set[str]) -> None:
        self.path, self.tree, self.owned = path, tree, owned
        self.functions = {node.name: node for node in ast.walk(tree) if isinstance(node, Function)}

    def complaints(self) -> Iterator[str]:
        """One line for each slip."""
        for function in self.functions.values():
            if (self.path, function.name) in ELSEWHERE:
                continue
            inside = {id(node) for block in _blocks(function) for node in ast.walk(block)}
            for call in _calls(function):
                what = self._slip(function, call)
                if what and id(call) not in inside:
                    yield f"{self.path}:{call.lineno} {function.name}: {what}"

    def _slip(self, function: Function, call: ast.Call) -> str | None:
        """What is wrong with a call, were it outside a block."""
        if isinstance(call.func, ast.Name) and self._begins(call.func.id) and self._owned(function, call):
            first = self._first_condition(function, call)
            return None if first and self._is_tenant(function, first) else "no tenant first in its where"
        if isinstance(call.func, ast.Attribute) and call.func.attr in FETCHES and self._owned(function, call):
            return "fetches a row by its key alone; select it by tenant and key"
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        raw = name in ("text", "exec_driver_sql") and self.path not in RAW and self.path.startswith("registry")
        return "raw SQL, which this lint cannot read" if raw else None

    def _begins(self, name: str) -> bool:
        return name in STATEMENTS or (self.path, name) in ELSEWHERE

    def _owned(self, function: Function, call: ast.Call) -> bool:
        """Whether a call names rows of tenants, by class or by an alias of one, or stands for such a statement."""
        if isinstance(call.func, ast.Name) and (self.path, call.func.id) in ELSEWHERE:
            return True
        names = {name for argument in call.args for name in _names(argument)}
        for starred in [argument for argument in call.args if isinstance(argument, ast.Starred)]:
            names |= {
                name for tuple_ in _names(starred) if (value := self._meant(function, tuple_)) for name in _names(value)
            }
        return bool(names & self.owned) or any(self._aliases(function, name) for name in names)

    def _aliases(self, function: Function, name: str) -> bool:
        """Whether a name stands for such rows: an alias of a class, or the one that a helper chooses."""
        value = _assigned(function, name)
        for node in ast.walk(value) if value else ():
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                helper = self.functions.get(node.func.id)
                returned = _returned(helper) if helper else []
                if node.func.id == "aliased" or any(_names(one) & self.owned for one in returned):
                    return True
        return False

    def _meant(self, function: Function, name: str) -> ast.expr | None:
        """What a name stands for, in the function or else in the file."""
        return _assigned(function, name) or _assigned(self.tree, name)

    def _first_condition(self, function: Function, call: ast.Call) -> ast.expr | None:
        """The first argument of the first `where` on the chain that begins with this call."""
        parents = {id(child): node for node in ast.walk(function) for child in ast.iter_child_nodes(node)}
        node: ast.AST = call
        while isinstance(link := parents.get(id(node)), ast.Attribute):
            node = parents[id(link)]
            if link.attr == "where" and isinstance(node, ast.Call) and node.args:
                return node.args[0]
        kept = parents.get(id(node))
        if isinstance(kept, ast.Assign) and isinstance(kept.targets[0], ast.Name):
            return _filtered_later(function, kept.targets[0].id)
        return None

    def _is_tenant(self, function: Function, condition: ast.expr) -> bool:
        """Whether a condition compares a tenant, itself or as the first of what a name or a helper stands for."""
        match condition:
            case ast.Starred(value=value):
                return self._is_tenant(function, value)
            case ast.Tuple(elts=[first, *_]):
                return self._is_tenant(function, first)
            case ast.IfExp(body=body):
                return self._is_tenant(function, body)
            case ast.Name(id=name):
                meant = _assigned(function, name)
                return meant is not None and self._is_tenant(function, meant)
            case ast.Call(func=ast.Name(id=name)) if name in self.functions:
                helper = self.functions[name]
                given = _returned(helper)
                return bool(given) and all(self._is_tenant(helper, one) for one in given)
            case ast.Compare(left=ast.Attribute(value=ast.Name(id=table), attr=column), ops=[ast.Eq()]):
                whose = ("id", "name") if table == "Tenant" else ("tenant_id",)
                return column in whose and (table in self.owned or self._aliases(function, table))
        return False


def _annotated(one: ast.ClassDef) -> set[str]:
    return {
        node.target.id for node in one.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def _calls(function: Function) -> Iterator[ast.Call]:
    return (node for node in ast.walk(function) if isinstance(node, ast.Call))


def _blocks(function: Function) -> Iterator[ast.With]:
    """The `with across(...)` blocks of a function."""
    for node in ast.walk(function):
        if isinstance(node, ast.With) and any(
            isinstance(item.context_expr, ast.Call) and getattr(item.context_expr.func, "id", "") == "across"
            for item in node.items
        ):
            yield node


def _names(node: ast.AST) -> set[str]:
    return {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}


def _returned(function: Function) -> list[ast.expr]:
    return [node.value for node in ast.walk(function) if isinstance(node, ast.Return) and node.value]


def _assigned(place: Function | ast.Module, name: str) -> ast.expr | None:
    """What a function, or a file, gives a name, the first time."""
    for node in ast.walk(place) if isinstance(place, Function) else place.body:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if name in {part.id for part in ast.walk(target) if isinstance(part, ast.Name)}:
                    return node.value
    return None


def _filtered_later(function: Function, name: str) -> ast.expr | None:
    """The first condition of the first `name.where(...)`, for a statement that was kept under a name."""
    for call in _calls(function):
        match call:
            case ast.Call(func=ast.Attribute(value=ast.Name(id=found), attr="where"), args=[first, *_]) if (
                found == name
            ):
                return first
    return None


def main(arguments: Sequence[str] = ()) -> int:
    """Check the code, say what is wrong, and give the exit code."""
    owned = owned_tables()
    paths = [path for folder in CHECKED for path in sorted((ROOT / folder).rglob("*.py"))]
    found = [
        line
        for path in paths
        if "migrations" not in path.parts
        for line in complaints(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"), owned)
    ]
    sys.stdout.writelines(f"{line}\n" for line in found)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
