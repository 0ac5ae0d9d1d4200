"""Configuration of the documentation site."""

import re

import math_core
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

import acprop_core

project = "acprop-core"
author = "The acprop-core developers"
copyright = "2026, the acprop-core developers"
release = version = acprop_core.__version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = [
    "_build",
    "benchmarks",
    "examples",
    "figures",
]  # included by pages, but not pages
nitpicky = True

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
smartquotes = False  # they would turn the quotes of "current", too
numpydoc_show_class_members = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"
# longer signatures have one option a line, which fits a phone
python_maximum_signature_line_length = 40
# an excerpt up to a mark ends in empty lines
highlight_options = {"python": {"stripnl": True}}
copybutton_exclude = ".linenos, .gp, .go"

html_theme = "furo"
html_title = "acprop-core"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_logo = "_static/logo.svg"
html_favicon = "_static/favicon.svg"
html_math_renderer = "mathml"
html_theme_options = {
    "light_css_variables": {
        "color-brand-primary": "#a63d00",
        "color-brand-content": "#a63d00",
        "scroll-shadow": "rgb(128 128 128 / 45%)",
        "picture-filter": "none",
    },
    "dark_css_variables": {
        "color-brand-primary": "#ff9d5c",
        "color-brand-content": "#ff9d5c",
        "scroll-shadow": "rgb(128 128 128 / 20%)",
        "picture-filter": "brightness(0.88)",
    },
}
pygments_style = "default"  # comments and numbers have a contrast of 4.5 or more
pygments_dark_style = "monokai"

_tex = math_core.LatexToMathML()


def _mathml(
    translator: HTML5Translator,
    node: nodes.math | nodes.math_block,
    displaystyle: bool,
) -> None:
    """Write a formula as MathML, which needs neither a script nor a network."""
    tex = node.astext()
    if displaystyle and "\\\\" in tex and "\\begin" not in tex:
        # as in the renderers of Sphinx
        tex = rf"\begin{{aligned}}{tex}\end{{aligned}}"
    try:
        mathml = _tex.convert_with_local_state(tex, displaystyle=displaystyle)
    except math_core.LatexError:
        logging.getLogger(__name__).warning(
            "no formula to math_core: %s", tex, location=node
        )
        mathml = ""
    translator.body.append(
        f'<div class="math">{mathml}</div>\n' if displaystyle else mathml
    )
    raise nodes.SkipNode


# What a line must not break, though browsers do: after a hyphen, and on both sides
# of a formula. These are 1e-8, ZeRO-1, 1 x 16M, 7B on 64, 8 + 8/D, quartiles.
_WHOLE = re.compile(
    r"(\d[\d.]*e-\d+|ZeRO-\d|[\d,]+ x [\d,]+M?|\d+B on [\d,]+|\d+ \+ \d+/D"
    r"|\([\d.]+, [\d.]+\))"
)
_BEFORE = re.compile(r"(.*(?<!\S))(\S{1,2})", re.DOTALL)  # a bracket before it
_AFTER = re.compile(r"(\S{1,3})(?!\S)(.*)", re.DOTALL)  # a comma after it
_LONG = 28  # letters of code, of which a phone has 44 in a line


def _nobr(*children: nodes.Node) -> nodes.inline:
    return nodes.inline("", "", *children, classes=["nobr"])


def _join(math: nodes.math) -> None:
    """Join a formula and what touches it."""
    parent, whole = math.parent, [math]
    i = parent.index(math)
    before, after = parent[:i], parent[i + 1 :]
    text = before[-1] if before else None
    if isinstance(text, nodes.Text) and (found := _BEFORE.fullmatch(text)):
        before[-1] = nodes.Text(found[1])
        whole.insert(0, nodes.Text(found[2]))
    text = after[0] if after else None
    if isinstance(text, nodes.Text) and (found := _AFTER.fullmatch(text)):
        after[0] = nodes.Text(found[2])
        whole.append(nodes.Text(found[1]))
    if len(whole) > 1:
        parent[:] = [*before, _nobr(*whole), *after]


def _keep_together(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Mark what a line must not break."""
    for code in doctree.findall(nodes.literal):
        if all(len(word) <= _LONG for word in code.astext().split()):
            code["classes"].append("nobr-words")
    for math in list(doctree.findall(nodes.math)):
        _join(math)
    code = (nodes.literal, nodes.math, nodes.raw, nodes.FixedTextElement)
    for text in list(doctree.findall(nodes.Text)):
        if not isinstance(text.parent, code) and _WHOLE.search(text):
            parts = [nodes.Text(part) for part in _WHOLE.split(text)]
            parts[1::2] = map(_nobr, parts[1::2])
            text.parent.replace(text, parts)


def setup(app: Sphinx) -> None:
    """Register the renderer of formulas, and what keeps together."""
    app.connect("doctree-resolved", _keep_together)
    app.add_html_math_renderer(
        "mathml",
        (
            lambda translator, node: _mathml(translator, node, displaystyle=False),
            None,
        ),
        (
            lambda translator, node: _mathml(translator, node, displaystyle=True),
            None,
        ),
    )
