"""What modules import, read from their source."""

import ast
import sys


def list_names(node):
    """Return the dotted names that one statement imports, with the names taken from modules."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        base = "." * node.level + (node.module or "")
        return {f"{base}.{alias.name}" for alias in node.names}
    return set()


def find_imports(source):
    """Return the dotted names a module imports anywhere."""
    return set().union(*map(list_names, ast.walk(ast.parse(source))))


def find_first_imports(source):
    """Return the dotted names that are imported when the module is."""
    return set().union(*map(list_names, ast.parse(source).body))


def find_needs(module, sources):
    """Return the outside packages that importing a module of `sources` brings in."""
    needs, seen, open_modules = set(), set(), [module]
    while open_modules:
        current = open_modules.pop()
        if current in seen:
            continue
        seen.add(current)
        # Importing a.b.c runs a and a.b first.
        open_modules += [parent for parent in [current.rpartition(".")[0]] if parent in sources]
        for name in find_first_imports(sources[current]):
            candidates = [name, name.rpartition(".")[0]]
            inner = [candidate for candidate in candidates if candidate in sources][:1]
            open_modules += inner
            if not inner and name.split(".")[0] not in sys.stdlib_module_names:
                needs.add(name.split(".")[0])
    return needs
