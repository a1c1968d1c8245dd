"""The code with one tenant filter taken away: as source for the lint, and put into the running functions."""

import ast
import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

import registry

PACKAGE = Path(str(registry.__file__)).parent


@dataclass(frozen=True)
class Mutant:
    """One filter of one file: which it is, counted from the top, and where."""

    module: str
    index: int
    line: int
    text: str
    function: str

    def __str__(self) -> str:
        return f"{self.module}.{self.function}:{self.line} {self.text}"

    @property
    def tree(self) -> ast.Module:
        """The file without the filter."""
        tree = ast.parse((PACKAGE / f"{self.module}.py").read_text())
        unwanted = list(_filters(tree))[self.index]

        class Remover(ast.NodeTransformer):
            def visit_Compare(self, node: ast.Compare) -> ast.expr:
                self.generic_visit(node)
                return ast.copy_location(_true(), node) if node is unwanted else node

        mutated = ast.fix_missing_locations(Remover().visit(tree))
        assert isinstance(mutated, ast.Module)
        return mutated


def mutants() -> list[Mutant]:
    """One for every tenant filter in the registry's code."""
    found = []
    for path in sorted(PACKAGE.glob("*.py")):
        tree = ast.parse(path.read_text())
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        for index, node in enumerate(_filters(tree)):
            name = next(one.name for one in functions if one.lineno <= node.lineno <= (one.end_lineno or 0))
            found.append(Mutant(path.stem, index, node.lineno, ast.unparse(node), name))
    return found


@contextmanager
def alive(mutant: Mutant) -> Iterator[None]:
    """Run the mutated code in place of the real one, whoever has imported its functions."""
    module = importlib.import_module(f"registry.{mutant.module}")
    mutated = compile(mutant.tree, str(module.__file__), "exec")
    codes = {code.co_name: code for code in mutated.co_consts if isinstance(code, CodeType)}
    kept = [(function, function.__code__) for function in _functions(module) if function.__name__ in codes]
    try:
        for function, _ in kept:
            function.__code__ = codes[function.__name__]
        _forget(module)
        yield
    finally:
        for function, code in kept:
            function.__code__ = code
        _forget(module)


def _forget(module: ModuleType) -> None:
    """What its functions remember was made by the code before."""
    for one in vars(module).values():
        if hasattr(one, "cache_clear"):
            one.cache_clear()


def _true() -> ast.expr:
    """What stands where the filter stood: a condition that holds for every row."""
    return ast.parse("__import__('sqlalchemy').true()", mode="eval").body


def _functions(module: ModuleType) -> list[FunctionType]:
    plain = [inspect.unwrap(one) for one in vars(module).values() if callable(one)]
    return [one for one in plain if isinstance(one, FunctionType) and one.__module__ == module.__name__]


def _filters(tree: ast.Module) -> Iterator[ast.Compare]:
    """Every comparison of a tenant's column, in order."""
    for node in ast.walk(tree):
        match node:
            case ast.Compare(left=ast.Attribute(value=ast.Name(id=table), attr=column), ops=[ast.Eq()]):
                whose = ("id", "name") if table == "Tenant" else ("tenant_id",)
                if column in whose and not _joins(node):
                    yield node


def _joins(node: ast.Compare) -> bool:
    """Whether it compares two columns: that binds tables to each other and filters nothing."""
    right = node.comparators[0]
    return isinstance(right, ast.Attribute) and isinstance(right.value, ast.Name) and right.value.id[0].isupper()
