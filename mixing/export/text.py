"""Write a bundle of definitions as the text of one module: imports, then a section for each module of ours."""

import ast
import re
import sys
import textwrap

from .bundle import Bundle, Key, find_bound_names, find_global_names, find_qualified_names, list_names, resolve
from .modules import Module, read_module

RULE = "# " + "=" * 118


def write_body(bundle: Bundle, order: list[tuple[str, ...]], head: tuple[str, ...]) -> str:
    """Return the imports and all definitions. order: the modules, each after those that it needs.

    head: the module whose docstring stands at the head of the file, so that its section has a title only.
    """
    names = choose_names(bundle, order)
    imports, sections, known = {}, [], set()
    for parts in order:
        module = read_module(parts)
        statements = [one for one in dict.fromkeys(module.statements.values()) if is_needed(bundle, parts, one)]
        for statement in statements:
            for node in bundle.list_pieces(module, statement):
                used = {one.id for one in find_global_names(node)} & module.others.keys()
                imports |= {module.others[name]: None for name in used}
        if statements:
            sections.append((module, write_statements(bundle, module, statements, names)))
    for _, text in sections:
        known |= set(re.findall(r"\w+", text))
    texts = []
    for module, text in sections:
        gap = "\n\n\n" if re.match("(@|def|class)", text) else "\n\n"
        texts.append(write_title(module, known, short=module.parts == head) + gap + text)
    return write_imports(list(imports)) + "\n\n" + "\n\n\n".join(texts) + "\n"


def is_needed(bundle: Bundle, parts: tuple[str, ...], statement: ast.stmt) -> bool:
    return any((parts, name) in bundle.keys for name in list_names(statement))


def choose_names(bundle: Bundle, order: list[tuple[str, ...]]) -> dict[Key, str]:
    """Return the name of each definition in the file: its own, or with that of its module if another one has it."""
    names, taken = {}, set()
    captured = {key for parts in order for key in find_captured(bundle, read_module(parts))}
    for key in sorted(bundle.keys, key=lambda key: (-order.index(key[0]), key[1])):
        parts, name = key
        if name in taken or key in captured:
            prefix = parts[-1].upper() if name.isupper() else parts[-1]
            name = f"{prefix}_{name}"
        taken.add(name)
        names[key] = name
    return names


def find_captured(bundle: Bundle, module: Module) -> list[Key]:
    """Return what is read as `other.name` where a local variable `name` would hide it without the `other.`."""
    functions = [one for one in ast.walk(module.tree) if isinstance(one, ast.FunctionDef)]
    uses = [(used, find_bound_names(one)) for one in functions for used in find_qualified_names(one, module)]
    return [resolve(module.ours[used.value.id][0], used.attr) for used, bound in uses if used.attr in bound]


def write_imports(imports: list[tuple[str, str | None, str]]) -> str:
    """Return the import statements in the order of isort: the standard library, then torch."""
    blocks = []
    for is_standard in (True, False):
        group = [one for one in imports if (one[0].split(".")[0] in sys.stdlib_module_names) == is_standard]
        whole = sorted({(module, local) for module, name, local in group if name is None})
        lines = [f"import {module}" if module == local else f"import {module} as {local}" for module, local in whole]
        for module in sorted({module for module, name, _ in group if name}):
            pairs = [(name, local) for origin, name, local in group if origin == module and name]
            names = [name if name == local else f"{name} as {local}" for name, local in sorted(pairs, key=order_names)]
            lines.append(f"from {module} import {', '.join(names)}")
        blocks += ["\n".join(lines)] if lines else []
    return "\n\n".join(blocks)


def order_names(pair: tuple[str, str]) -> tuple[int, str]:
    """Sort constants first, then classes, then the rest."""
    name = pair[0]
    return 0 if name.isupper() else 1 if name[0].isupper() else 2, name


def write_title(module: Module, known: set[str], short: bool) -> str:
    """Return the docstring of a module as a comment, without paragraphs on functions that the file does not have."""
    title, *rest = module.list_paragraphs()
    rest = [] if short else [one for one in rest if set(re.findall(r"(\w+)\(\)", one)) <= known]
    lines = "\n\n".join([title.removesuffix("."), *map(wrap, "\n\n".join(rest).split("\n\n"))]).strip().splitlines()
    return "\n".join([RULE, *(f"# {line}".rstrip() for line in lines), RULE])


def wrap(paragraph: str) -> str:
    """Break the lines of a paragraph or list so that a comment of them is at most as long as a line of code."""
    if paragraph.startswith(" "):  # a formula
        return paragraph
    items = [" ".join(item.split()) for item in re.split(r"\n(?=\* )", paragraph)]
    indents = ["  " if item.startswith("* ") else "" for item in items]
    wrapper = textwrap.TextWrapper(118, break_long_words=False, break_on_hyphens=False)
    lines = []
    for item, wrapper.subsequent_indent in zip(items, indents, strict=True):
        lines += wrapper.wrap(item)
    return "\n".join(lines)


def write_statements(bundle: Bundle, module: Module, statements: list[ast.stmt], names: dict[Key, str]) -> str:
    lines = rename(module, names)
    removed = set(module.removed)
    for owner in (one for one in statements if isinstance(one, ast.ClassDef)):
        for member in owner.body:
            if not bundle.needs_member(module, owner, member):
                removed.update(range(module.find_start(member), member.end_lineno + 1))
    text, before = "", None
    for statement in statements:
        if before:
            are_close = module.find_start(statement) == before.end_lineno + 1
            text += "\n" if are_close else "\n\n\n"
        numbers = range(module.find_start(statement), statement.end_lineno + 1)
        text += tidy("\n".join(lines[number - 1] for number in numbers if number not in removed))
        before = statement
    return text


def rename(module: Module, names: dict[Key, str]) -> list[str]:
    """Return the lines of a module with the names that all definitions have in the file, also in its comments."""
    edits = [(node, names.get(key)) for node, key in find_uses(module)]
    lines = list(module.lines)
    for node, name in sorted(edits, key=lambda edit: -edit[0].col_offset):
        line = lines[node.lineno - 1]
        if name and isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            lines[node.lineno - 1] = re.sub(rf"\b{node.name}\b", name, line, count=1)
        elif name:
            lines[node.lineno - 1] = line[: node.col_offset] + name + line[node.end_col_offset :]
    for local, (parts, inner) in module.ours.items():
        for name in read_module(parts).statements if inner is None else ():
            new = names.get((parts, name), name)
            lines = [re.sub(rf"\b{local}\.{name}\b", new, line) for line in lines]
    return lines


def find_uses(module: Module) -> list[tuple[ast.AST, Key]]:
    """Return the nodes that name a definition, with the definition: their own, of the same or of another module."""
    uses = []
    for statement in dict.fromkeys(module.statements.values()):
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            uses.append((statement, (module.parts, statement.name)))
        else:
            nodes = [one for one in ast.walk(statement) if isinstance(one, ast.Name)]
            uses += [(one, (module.parts, one.id)) for one in nodes if isinstance(one.ctx, ast.Store)]
        is_class = isinstance(statement, ast.ClassDef)
        for part in [*statement.bases, *statement.body] if is_class else [statement]:
            for one in find_qualified_names(part, module):
                uses.append((one, resolve(module.ours[one.value.id][0], one.attr)))
            for one in find_global_names(part):
                if one.id in module.statements or module.ours.get(one.id, (None, None))[1]:
                    uses.append((one, resolve(module.parts, one.id)))
    return uses


def order_modules(parts: tuple[str, ...], done: list[tuple[str, ...]]) -> None:
    """Append a module to `done`, after all modules of ours that it imports."""
    for other, name in read_module(parts).ours.values():
        other = other if name is None else resolve(other, name)[0]
        if other not in done:
            order_modules(other, done)
    if parts not in done:
        done.append(parts)


def tidy(text: str) -> str:
    """Leave no two empty lines in a row, none at the end of a docstring, and close a docstring of one line there."""
    text = re.sub(r"\n\n\n+", "\n\n", text.rstrip())
    text = re.sub(r'\n\n+( *""")\n', r"\n\1\n", text)
    return re.sub(r'("""[^\n"]+)\n +"""\n', r'\1"""\n', text)
