"""Read our own modules as text, without what a single file leaves out.

Two things are left out of every module:

* The choice of another solver, and that of another label rule: the parameters `solver` and `kernels`, and each
  statement that reads them or the attributes `label_rule` and `move_maps`. A method therefore chooses its solver in an
  `if` of its own that returns early, before the torch solver.
* What is only true in this repository: each paragraph of a docstring that names one of our files or modules, or an
  option of the command line. Such a name therefore stands in a paragraph of its own.
"""

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]  # the folder of mixing/ and saliency/, in the repository and where pip installs them
CHOICES = {"solver", "kernels", "label_rule", "move_maps"}
OURS = re.compile(r"\b(mixing|saliency|engine|models)[./]\w|\w\.py\b|(?<![\w-])--[a-z]")
BLOCKS = ("body", "orelse", "finalbody")


class Module:
    """A module of ours. parts: its path, such as ("mixing", "solvers", "sage_offsets").

    statements: top-level name -> the statement that defines it. ours: local name -> (parts, name) of what it imports
    from us, where the name is None for a module. others: local name -> the import of it, as (module, name, local name).
    removed: numbers of the lines that are left out; they count from 1.
    """

    def __init__(self, parts: tuple[str, ...]):
        text = find_file(parts).read_text(encoding="utf-8")
        self.parts, self.lines, self.tree = parts, text.splitlines(), ast.parse(text)
        self.statements: dict[str, ast.stmt] = {}
        self.ours: dict[str, tuple[tuple[str, ...], str | None]] = {}
        self.others: dict[str, tuple[str, str | None, str]] = {}
        self.removed: set[int] = set()
        self.leave_out_choices()
        self.leave_out_paragraphs()
        for statement in self.tree.body:
            if isinstance(statement, (ast.Import, ast.ImportFrom)):
                self.read_import(statement)
            else:
                self.statements |= dict.fromkeys(list_names(statement), statement)

    def read_import(self, statement: ast.Import | ast.ImportFrom) -> None:
        for alias in statement.names:
            local = alias.asname or alias.name
            if isinstance(statement, ast.Import):
                self.others[local] = alias.name, None, local
            elif not statement.level:
                self.others[local] = statement.module, alias.name, local
            else:
                package = self.parts if is_package(self.parts) else self.parts[:-1]
                package = package[: len(package) - statement.level + 1]
                module = (*package, *(statement.module.split(".") if statement.module else ()))
                is_module = find_file((*module, alias.name)).is_file()
                self.ours[local] = ((*module, alias.name), None) if is_module else (module, alias.name)

    def leave_out_choices(self) -> None:
        for node in list(ast.walk(self.tree)):
            for block in (getattr(node, field) for field in BLOCKS if isinstance(getattr(node, field, None), list)):
                for statement in [one for one in block if reads_choice(one)]:
                    block.remove(statement)
                    self.remove(statement)
            if isinstance(node, ast.arguments):
                self.leave_out_parameters(node)

    def leave_out_parameters(self, arguments: ast.arguments) -> None:
        required = len(arguments.args) - len(arguments.defaults)
        for parameters, defaults, start in (
            (arguments.args, arguments.defaults, required),
            (arguments.kwonlyargs, arguments.kw_defaults, 0),
        ):
            for index in reversed([n for n, one in enumerate(parameters) if one.arg in CHOICES]):
                self.remove(parameters.pop(index))
                del defaults[index - start]

    def leave_out_paragraphs(self) -> None:
        for node in ast.walk(self.tree):
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or ast.get_docstring(node) is None:
                continue
            first, last = node.body[0].lineno, node.body[0].end_lineno
            start = first
            for number in range(first, last + 1):
                if number == last or not self.lines[number].strip():  # the line after `number` is empty
                    end = number - (number == last and self.lines[number - 1].strip() == '"""')
                    if OURS.search("\n".join(self.lines[start - 1 : end])):
                        self.removed.update(range(start, end + 1))
                    start = number + 1

    def remove(self, node: ast.AST) -> None:
        self.removed.update(range(self.find_start(node), node.end_lineno + 1))

    def find_start(self, node: ast.AST) -> int:
        """Return the first line of a statement, including its decorators and the comments directly above it."""
        start = min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", ()))])
        while start > 1 and self.lines[start - 2].lstrip().startswith("#"):
            start -= 1
        return start

    def list_paragraphs(self) -> list[str]:
        """Return the paragraphs of the module's docstring without those that are only true in this repository.

        Indented lines, such as a formula, belong to the paragraph before them.
        """
        paragraphs = re.split(r"\n\n(?! )", ast.get_docstring(self.tree) or "")
        return [text for text in paragraphs if not OURS.search(text)]


def is_package(parts: tuple[str, ...]) -> bool:
    return ROOT.joinpath(*parts).is_dir()


def find_file(parts: tuple[str, ...]) -> Path:
    path = ROOT.joinpath(*parts)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def read_module(parts: tuple[str, ...]) -> Module:
    return Module(parts)


def list_names(statement: ast.stmt) -> list[str]:
    """Return the names that a top-level or class-level statement defines."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return [statement.name]
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    return [node.id for target in targets if target for node in ast.walk(target) if isinstance(node, ast.Name)]


def reads_choice(statement: ast.stmt) -> bool:
    """Return whether a statement chooses a solver: a simple one that reads a choice, or an `if` whose test does."""
    if isinstance(statement, ast.If):
        return reads_choice(ast.Expr(statement.test))
    if hasattr(statement, "body"):
        return False
    names = {getattr(node, "id", None) or getattr(node, "attr", None) for node in ast.walk(statement)}
    return bool(names & CHOICES)
