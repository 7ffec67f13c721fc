"""What the site is made of beyond the pages in this folder, for MkDocs (``hooks``) and mkdocstrings (``extensions``).

The README becomes the start page, whatever else the pages link to in the repository comes along, notebooks are shown as
pages, and the reference is made of what the package calls public.
"""

from __future__ import annotations

import argparse
import ast
import json
import os.path
import re
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from unime_st.cli.main import COMMANDS, parser

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
PACKAGES = ("", "losses", "samplers", "data", "training", "evaluation", "search", "serve", "modules")
"""Those that say in ``__all__`` what is public."""
MODULES = ("functional", "prompts", "checkpoints")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Have ``math`` blocks, which GitHub shows as formulas, made MathML."""
    fence = {"name": "math", "class": "math", "format": formula}
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [fence]}
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the start page, what pages link to outside of this folder, notebooks as pages, and the reference."""
    pages = {file.src_uri: Path(file.abs_src_path or "") for file in files.documentation_pages()}
    for notebook in sorted(DOCS.glob("notebooks/*.ipynb")):
        uri = notebook.relative_to(DOCS).with_suffix(".md").as_posix()
        files.append(File.generated(config, uri, content=notebook_page(notebook)))
    waiting = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *pages.values()]
    known = set(pages.values())
    while waiting:
        path = waiting.pop()
        if path not in known:
            known.add(path)
            if path.suffix == ".ipynb":
                continue  # it lies in this folder, so it is copied
            files.append(File.generated(config, uri_of(path), abs_src_path=str(path)))
        if path.suffix == ".md":
            waiting += [target for target in targets_of(path) if target.is_file() and target not in known]
    for uri, content in reference().items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turn links within the repository into links within the site; those to folders become their names."""
    if page.file.abs_src_path is None:  # made above
        return markdown
    folder, here = Path(page.file.abs_src_path).parent, Path(page.file.src_uri).parent

    def moved(found: re.Match[str]) -> str:
        mark, text, link, anchor = found.groups(default="")
        if "://" in link or link.startswith("mailto:"):
            return found.group()
        target = readme_of((folder / link).resolve())
        if target.is_dir():
            return text
        return f"{mark}[{text}]({os.path.relpath(uri_of(target), here)}{anchor})"

    return LINK.sub(moved, markdown)


def readme_of(path: Path) -> Path:
    """The page of a folder, if it has one."""
    return path / "README.md" if (path / "README.md").is_file() else path


def targets_of(page: Path) -> list[Path]:
    """What a page links to in the repository."""
    links = [found[3] for found in LINK.finditer(page.read_text(encoding="utf-8"))]
    found = [readme_of((page.parent / link).resolve()) for link in links if "://" not in link]
    return [path for path in found if path.is_relative_to(ROOT)]


def uri_of(path: Path) -> str:
    """Where a file of the repository is in the site: this folder is its root, all else keeps its path."""
    if path == ROOT / "README.md":
        return "index.md"
    return path.relative_to(DOCS if path.is_relative_to(DOCS) else ROOT).as_posix()


def notebook_page(path: Path) -> str:
    """The cells of a notebook as a page; outputs are not kept in the repository."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    return "\n\n".join([*parts, f"[The notebook]({path.name})"]) + "\n"


def reference() -> dict[str, str]:
    """The pages of the reference: one a public module, and one of the command."""
    made = {}
    for name in PACKAGES:
        module = f"unime_st.{name}".rstrip(".")
        tree = ast.parse((ROOT / "src" / "unime_st" / name / "__init__.py").read_text(encoding="utf-8"))
        listed = next(
            node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        )
        names = [own for own in ast.literal_eval(listed.value) if own != "__version__"]
        summary = (ast.get_docstring(tree) or "").split("\n\n")[0]
        made[f"api/{name or 'unime_st'}.md"] = "\n\n".join(
            [f"# {module}", summary, *(f"::: {module}.{own}" for own in names)]
        )
    for name in MODULES:
        options = (
            "    options:\n      show_root_heading: false\n      show_root_toc_entry: false\n      heading_level: 1"
        )
        made[f"api/{name}.md"] = f"# unime_st.{name}\n\n::: unime_st.{name}\n{options}\n"
    commands = next(action for action in parser()._actions if isinstance(action, argparse._SubParsersAction)).choices
    helps = [f"## unime {name}\n\n```text\n{commands[name].format_help()}```" for name in COMMANDS]
    made["api/command.md"] = "\n\n".join(["# The command", *helps])
    return made


def formula(source: str, *_: Any, **__: Any) -> str:
    """A ``math`` block as MathML, which browsers show without a script; one too wide for a phone scrolls in its box."""
    return f'<div style="overflow-x: auto">{convert(source, display="block")}</div>'


class Docstrings(griffe.Extension):
    """Docstrings as Markdown: roles become code; doctests and tables of characters keep their lines."""

    ROLE = re.compile(r":(?:py:)?(?:func|class|mod|meth|attr|data|exc):`~?([^`]+)`")
    BLOCK = re.compile(r"^( *)((?:>>>|\+-|===)[^\n]*(?:\n\1(?=\S)[^\n]*)*)", re.MULTILINE)

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring:
            text = self.ROLE.sub(lambda found: f"`{found[1]}`", obj.docstring.value)
            obj.docstring.value = self.BLOCK.sub(self._fenced, text)

    @staticmethod
    def _fenced(found: re.Match[str]) -> str:
        indent, block = found.groups()
        kind = "pycon" if block.startswith(">>>") else "text"
        return f"{indent}```{kind}\n{indent}{block}\n{indent}```"
