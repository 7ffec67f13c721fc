"""The structure of a checkout in numbers, so that before and after a refactoring can be compared.

    python benchmarks/structure.py                                # lines, sizes and import circles of this checkout
    python benchmarks/structure.py --tree OTHER --walks --json benchmarks/results/structure/COMMIT.json

`--walks` also follows three calls on a tiny random model through the package: which files and functions they enter, how
deep the package's stack is before a model of transformers first runs, and how often contents are hashed for each
distinct input. Percentiles are those of the nearest rank. A function runs from its `def` to its last line.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import math
import subprocess
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGE = "src/unime_st"
SCRIPTS = ("examples", "benchmarks")
LONG = 40
"""Lines of a function, without its docstring, beyond which it is listed."""
_LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
_Function = ast.FunctionDef | ast.AsyncFunctionDef


def measured(tree: Path, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Everything but the walks, without what lies below some folders."""
    paths = [path for root in (PACKAGE, *SCRIPTS, "tests") for path in sorted((tree / root).rglob("*.py"))]
    paths = [path for path in paths if not any(path.is_relative_to(tree / folder) for folder in without)]
    texts = {path.relative_to(tree).as_posix(): path.read_text("utf-8") for path in paths}
    parsed = {name: ast.parse(text) for name, text in texts.items()}
    lines: dict[str, Counter[str]] = {}
    for name, text in texts.items():
        for folder in (_folder(name), "all"):
            lines.setdefault(folder, Counter()).update(line_kinds(text, parsed[name]))
    own = {name: text for name, text in texts.items() if not name.startswith("tests/")}
    functions = [(f"{name}:{found}", *sizes) for name in own for found, *sizes in _functions(parsed[name])]
    long = [{"name": name, "lines": size, "with_docstring": whole} for name, size, whole in functions if size > LONG]
    imports = {}
    for root in (PACKAGE, *SCRIPTS):
        graph = _graph({name: module for name, module in parsed.items() if name.startswith(f"{root}/")}, root)
        imports[root] = {"modules": len(graph), "imports": sum(map(len, graph.values())), "circles": circles(graph)}
    return {
        "lines": {folder: dict(counts) for folder, counts in lines.items()},
        "files": _spread([(text.count("\n"), name) for name, text in own.items()]),
        "functions": {
            **_spread([(size, name) for name, size, _ in functions]),
            "long": sorted(long, key=lambda entry: (-entry["lines"], entry["name"])),
        },
        "imports": imports,
    }


def _folder(name: str) -> str:
    """`src/unime_st/SUB` of what is in the package, else the first folder."""
    parts = name.split("/")
    return "/".join(parts[:-1][:3]) if parts[0] == "src" else parts[0]


def line_kinds(text: str, module: ast.Module) -> dict[str, int]:
    """Lines by kind; a string that stands alone is a docstring, a comment counts where it has the line for itself."""
    docstrings = {line for node in ast.walk(module) if _is_text(node) for line in _lines(node)}
    code, comments = set(), set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _LAYOUT:
            found = comments if token.type == tokenize.COMMENT else code
            found.update(range(token.start[0], token.end[0] + 1))
    counts = {"docstring": len(docstrings), "comment": len(comments - code), "code": len(code - docstrings)}
    return {"lines": text.count("\n"), **counts}


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _lines(node: Any) -> range:
    return range(node.lineno, node.end_lineno + 1)


def _functions(node: ast.AST, within: str = "") -> Iterator[tuple[str, int, int]]:
    """Name, lines without the docstring, and with it, of each function; one within another counts in both."""
    for child in ast.iter_child_nodes(node):
        name = f"{within}{child.name}" if isinstance(child, _Function | ast.ClassDef) else within
        if isinstance(child, _Function):
            docstring = len(_lines(child.body[0])) if _is_text(child.body[0]) else 0
            yield name, len(_lines(child)) - docstring, len(_lines(child))
        yield from _functions(child, within if name == within else f"{name}.")


def _spread(sizes: list[tuple[int, str]]) -> dict[str, Any]:
    ranked = sorted(sizes)
    at = {f"p{p}": ranked[math.ceil(p / 100 * len(ranked)) - 1][0] for p in (50, 90)} if ranked else {}
    most, largest = ranked[-1] if ranked else (0, "")
    return {"number": len(ranked), **at, "max": most, "largest": largest}


def _graph(parsed: dict[str, ast.Module], root: str) -> dict[str, set[str]]:
    """Modules below a folder that each imports; scripts import those beside them, a package's by their full names.

    The packages above an imported module, which Python runs as well, and names given to `import_module` do not count.
    """
    above = len(root.split("/")) - (root == PACKAGE)
    places = {name: tuple(name.removesuffix(".py").removesuffix("/__init__").split("/")[above:]) for name in parsed}
    known = set(places.values())
    graph: dict[str, set[str]] = {}
    for name, own in places.items():
        inside = own if name.endswith("/__init__.py") else own[:-1]
        beside = () if root == PACKAGE else inside
        wanted = [(*start, *parts) for parts in _imports(parsed[name], inside) for start in {beside, ()}]
        found = {parts if parts in known else parts[:-1] for parts in wanted} & known - {own}
        graph[".".join(own)] = {".".join(parts) for parts in found}
    return graph


def _imports(module: ast.Module, inside: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """All that a module imports anywhere, what only type checkers read left out."""
    nodes: list[ast.AST] = [module]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = inside[: len(inside) - node.level + 1] if node.level else ()
            base = (*start, *(node.module.split(".") if node.module else ()))
            yield from ((*base, alias.name) for alias in node.names)
        checked = isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        nodes += node.orelse if checked else ast.iter_child_nodes(node)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Sets of modules each of which comes to import all others of its set."""
    reach: dict[str, set[str]] = {}
    for name, imported in graph.items():
        reach[name], ahead = set(), list(imported)
        while ahead:
            if (other := ahead.pop()) not in reach[name]:
                reach[name].add(other)
                ahead += graph[other]
    return sorted(map(list, {tuple(sorted(o for o in reach[n] if n in reach[o])) for n in graph if n in reach[n]}))


def tables(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    kinds = ("lines", "docstring", "comment", "code")
    lines = [_table(("lines of Python", *kinds), [(k, *map(v.get, kinds)) for k, v in sorted(found["lines"].items())])]
    columns = ("number", "p50", "p90", "max", "largest")
    sizes = [(name, *map(found[name].get, columns)) for name in ("files", "functions")]
    lines.append(_table(("lines of each (docstrings of functions left out)", *columns), sizes))
    long = [(entry["name"], entry["lines"], entry["with_docstring"]) for entry in found["functions"]["long"]]
    lines.append(_table((f"{len(long)} functions of more than {LONG} lines", "lines", "with docstring"), long))
    imports = [(root, v["modules"], v["imports"], len(v["circles"])) for root, v in found["imports"].items()]
    lines.append(_table(("imports", "modules", "imports", "circles"), imports))
    lines += [f"- circle: {', '.join(circle)}\n" for v in found["imports"].values() for circle in v["circles"]]
    for name, walk in found.get("walks", {}).items():
        rows = [(key, value) for key, value in walk.items() if not isinstance(value, list | dict)]
        rows += [(f"{key} calls for each distinct input", value) for key, value in walk["hashes"].items()]
        lines.append(_table((f"walk: {name}", ""), rows))
        lines.append("\n".join(f"{number}. {file}" for number, file in enumerate(walk["order"], 1)) + "\n")
    return "\n".join(lines)


def _table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    cells = [header, ("---",) * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in cells)


def commit(tree: Path) -> str:
    """The short name of the checkout's commit, with a + if tracked files were changed since."""
    git = ("git", "-C", str(tree))
    name = subprocess.run([*git, "rev-parse", "--short=7", "HEAD"], check=True, capture_output=True, text=True).stdout
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], check=True, capture_output=True).stdout
    return name.strip() + "+" * bool(changed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=Path(__file__).parents[1], help="another checkout")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--without", nargs="*", default=[], metavar="FOLDER", help="folders that are left out")
    parser.add_argument("--walks", action="store_true", help="follow three calls through the package too")
    options = parser.parse_args()
    tree = options.tree.resolve()
    found = {"commit": commit(tree), "without": options.without, **measured(tree, tuple(options.without))}
    if options.walks:
        from structure_walks import walks

        found["walks"] = walks(tree / PACKAGE, tree / "tests")
    print(tables(found))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
