"""Select the definitions that a class needs from our modules: constants, functions, classes and their members."""

import ast
from collections.abc import Iterator
from functools import cache

from .modules import Module, list_names, read_module

CONTRACTS = {"mixer": "Mixer", "source": "Source"}  # name of a variable -> the base class of what it holds
Key = tuple[tuple[str, ...], str]  # parts of a module, and a name in it


class Bundle:
    """All that some classes need.

    roots: these classes. usage: code that uses them, through the variables `mixer` and `source`; it says which members
    of their base classes are needed. A class that nothing is derived from has all its methods. A base class has those
    that something calls and that are not overridden; attributes of both are there if something reads them. Classes with
    another base than these are there as a whole.
    """

    def __init__(self, roots: list[Key], usage: str):
        self.keys: set[Key] = set(roots)
        self.read: set[tuple[str | None, str]] = set()  # (base class, attribute); None: of another object
        always = "mixer.weight, mixer.partner, source.points"  # for users; as_source() knows a source by its points()
        self.note_attributes(ast.parse(f"{usage}\n{always}"), None)
        size = None
        while size != (size := (len(self.keys), len(self.read))):
            for parts, name in list(self.keys):
                self.follow(read_module(parts), read_module(parts).statements[name])

    def follow(self, module: Module, statement: ast.stmt) -> None:
        """Add what a statement needs, to the keys and the attributes read."""
        is_class = isinstance(statement, ast.ClassDef)
        family = self.find_family(module, statement) if is_class else None
        for node in self.list_pieces(module, statement):
            self.note_attributes(node, family)
            for used in find_global_names(node):
                if used.id in module.statements:
                    self.keys.add((module.parts, used.id))
                elif used.id in module.ours and module.ours[used.id][1]:
                    self.keys.add(resolve(*module.ours[used.id]))
            for used in find_qualified_names(node, module):
                self.keys.add(resolve(module.ours[used.value.id][0], used.attr))

    def list_pieces(self, module: Module, statement: ast.stmt) -> list[ast.AST]:
        """Return the parts of a statement that are needed: all of it, or the head and some members of a class."""
        if not isinstance(statement, ast.ClassDef):
            return [statement]
        members = [one for one in statement.body if self.needs_member(module, statement, one)]
        return [*statement.bases, *statement.decorator_list, *members]

    def note_attributes(self, tree: ast.AST, family: str | None) -> None:
        """Add the attributes that are read in a tree. family: base class of `self` there."""
        for node in walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                text = ast.unparse(node.value)
                self.read.add((family if text in ("self", "super()") else CONTRACTS.get(text), node.attr))

    def needs_member(self, module: Module, owner: ast.ClassDef, member: ast.stmt) -> bool:
        """Return whether a class keeps a member, by the rules of the class Bundle."""
        family, names = self.find_family(module, owner), list_names(member)
        if not names or family not in CONTRACTS.values():
            return True
        derived = [one for one in self.list_classes() if owner in self.list_bases(one)]
        is_method = isinstance(member, ast.FunctionDef)
        is_read = any((family, name) in self.read for name in names)
        if not (is_read or is_method and (not derived or names[0].startswith("__"))):
            return False
        leaves = [one for one in derived if not any(one in self.list_bases(other) for other in derived)]
        return not derived or any(self.is_visible(leaf, owner, names[0]) for leaf in leaves)

    def is_visible(self, leaf: ast.ClassDef, owner: ast.ClassDef, name: str) -> bool:
        """Return whether an object of class `leaf` reaches the member `name` of its base class `owner`."""
        order = [leaf, *self.list_bases(leaf)]
        for one in order[: order.index(owner)]:
            members = [member for member in one.body if name in list_names(member)]
            if members and f"super().{name}" not in ast.unparse(members[0]):
                return False
        return True

    def list_classes(self) -> Iterator[ast.ClassDef]:
        statements = (read_module(parts).statements[name] for parts, name in self.keys)
        return (one for one in statements if isinstance(one, ast.ClassDef))

    def list_bases(self, owner: ast.ClassDef) -> list[ast.ClassDef]:
        """Return the base classes of ours, the nearest first."""
        module = next(read_module(parts) for parts, name in self.keys if read_module(parts).statements[name] is owner)
        return [statement for _, statement in walk_bases(module, owner)][1:]

    def find_family(self, module: Module, owner: ast.ClassDef) -> str:
        """Return the name of the last base class of ours."""
        return list(walk_bases(module, owner))[-1][1].name


def walk_bases(module: Module, owner: ast.ClassDef) -> Iterator[tuple[Module, ast.ClassDef]]:
    """Yield a class and its base classes of ours, with their modules. Each class has one such base at most."""
    yield module, owner
    for base in owner.bases:
        name = getattr(base, "id", None)
        if name in module.statements:
            yield from walk_bases(module, module.statements[name])
        elif name in module.ours:
            parts, name = resolve(*module.ours[name])
            yield from walk_bases(read_module(parts), read_module(parts).statements[name])


def resolve(parts: tuple[str, ...], name: str) -> Key:
    """Return the module that defines what `parts` defines or imports under a name, and its name there."""
    module = read_module(parts)
    return (parts, name) if name in module.statements else resolve(*module.ours[name])


@cache
def walk(node: ast.AST) -> list[ast.AST]:
    return list(ast.walk(node))


@cache
def find_global_names(node: ast.AST) -> list[ast.Name]:
    """Return the names in a statement that are read and not bound in it. Annotations in quotes count."""
    quoted = [one.annotation for one in walk(node) if getattr(one, "annotation", None)]
    quoted += [one.returns for one in walk(node) if getattr(one, "returns", None)]
    quoted = [ast.parse(one.value) for one in quoted if isinstance(getattr(one, "value", None), str)]
    bound = find_bound_names(node)
    names = [one for tree in (node, *quoted) for one in walk(tree) if isinstance(one, ast.Name)]
    return [one for one in names if isinstance(one.ctx, ast.Load) and one.id not in bound]


@cache
def find_bound_names(node: ast.AST) -> set[str]:
    """Return the names that a function binds: parameters and variables. Other statements bind none of their own."""
    if not isinstance(node, ast.FunctionDef):
        return set()
    bound = {one.arg for one in walk(node) if isinstance(one, ast.arg)}
    return bound | {one.id for one in walk(node) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)}


@cache
def find_qualified_names(node: ast.AST, module: Module) -> list[ast.Attribute]:
    """Return what a statement reads as `module.name` from a module of ours."""
    modules = {name for name, (_, inner) in module.ours.items() if inner is None} - find_bound_names(node)
    attributes = [one for one in walk(node) if isinstance(one, ast.Attribute) and isinstance(one.value, ast.Name)]
    return [one for one in attributes if one.value.id in modules]
