"""How Sphinx makes these pages: `make docs`. Nothing here needs a network."""

from __future__ import annotations

import inspect
import re
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList
from rankpilot.common.quiet import silence_libraries
from sphinx.domains.python import PyObject
from sphinx.util.nodes import make_refnode

ROOT = Path(__file__).parents[1]
silence_libraries()

project = "rankpilot"
release = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
html_show_copyright = False

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
exclude_patterns = ["notebooks"]

# Quotes and dashes of commands stay what they are, and only what says that it is Python is coloured as Python.
smartquotes = False
highlight_language = "none"

html_theme = "furo"
html_title = f"rankpilot {release}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_js_files = ["copy.js"]
html_copy_source = False
html_show_sourcelink = False

# Docstrings are Google's kind, and have code in single backticks.
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
# Aliases keep their names in modules alone that do not evaluate annotations (`from __future__ import annotations`).
autodoc_type_aliases = {name: name for name in ("BoolArray", "Float32Array", "FloatArray", "IntArray")}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100

# Types in signatures lead nowhere where no page describes them: those of other packages, whose inventories would need a
# network, and small ones of our own.
nitpick_ignore_regex = [("py:(class|obj)", ".*"), ("py:exc", r"torch\..*")]


class Docstring(Directive):
    """A docstring that is written in Markdown, as part of a page: the name of a module, or module:name."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Parse it as the page is parsed; its headings become lines in bold."""
        module, _, name = self.arguments[0].partition(":")
        owner = import_module(module)
        text = inspect.cleandoc((getattr(owner, name) if name else owner).__doc__ or "")
        parent = nodes.Element()
        self.state.nested_parse(StringList(text.splitlines(), source=self.arguments[0]), 0, parent)
        return parent.children


def readable_signature(
    app: Any, kind: str, name: str, found: Any, options: Any, signature: str | None, result: str | None
) -> tuple[str | None, str | None]:
    """Nothing for what nobody calls, options of commands and protocols; names of types as they are in the code."""
    if name.startswith("rankpilot.cli.") or getattr(found, "_is_protocol", False):
        return "", None
    alias = re.compile(r"TypeAliasForwardRef\('(\w+)'\)")
    return signature and alias.sub(r"\1", signature), result and alias.sub(r"\1", result)


def found_by_last_part(app: Any, env: Any, node: Any, text: nodes.Node) -> nodes.Node | None:
    """Where a docstring names something of ours without its module, as in "Raises: BudgetError"."""
    if node.get("refdomain") != "py":
        return None
    domain, target = env.get_domain("py"), node["reftarget"]
    names = [name for name in domain.objects if name.startswith("rankpilot.") and name.endswith(f".{target}")]
    if len(names) != 1:
        return None
    entry = domain.objects[names[0]]
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, text, names[0])


def dashes(app: Any, page: nodes.document) -> None:
    """Between a parameter and what it means there is a dash, though quotes and dashes elsewhere stay as they are."""
    for text in [*page.findall(nodes.Text)]:
        if text == " -- ":
            text.parent.replace(text, nodes.Text(" \N{EN DASH} "))


def texts_outside(app: Any, name: str, source: list[str]) -> None:
    """Links to Markdown outside docs/, which is no page here, lead to the file."""
    source[0] = re.sub(r"\]\((\.\./[\w/.-]+\.md)(#[\w-]+)?\)", r"](path:\1)", source[0])


def memory_page(app: Any, error: Exception | None) -> None:
    """The page that tells what fits a card, beside the pages of a site."""
    if error is None and app.builder.format == "html":
        from tools.make_page import main

        main(["--output", str(Path(app.outdir) / "fits.html")])


def setup(app: Any) -> None:
    """What Sphinx calls with the application."""
    app.connect("build-finished", memory_page)
    app.connect("source-read", texts_outside)
    app.add_directive("docstring", Docstring)
    app.connect("autodoc-process-signature", readable_signature)
    app.connect("doctree-read", dashes)
    app.connect("missing-reference", found_by_last_part)
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"  # as the docstrings call them
