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
python_maximum_signature_line_length = 40  # one option a line, so that a phone breaks none
highlight_options = {"python": {"stripnl": True}}  # an excerpt up to a mark ends in empty lines
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


# 1e-8, ZeRO-1, 1,000 x 1,000, 8 + 8/D and the quartiles of a ratio
_WHOLE = re.compile(r"\d[\d.]*e-\d+|ZeRO-\d|[\d,]+ x [\d,]+M?|\d+ \+ \d+/D|\([\d.]+, [\d.]+\)")
_LONG = 28  # letters of code, of which a phone has 44 in a line


def _nobr(*children: nodes.Node) -> nodes.inline:
    return nodes.inline("", "", *children, classes=["nobr"])


def _keep_together(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Mark what a line must not break, which browsers do after a hyphen and on both sides of a formula."""
    for code in doctree.findall(nodes.literal):
        if all(len(word) <= _LONG for word in code.astext().split()):
            code["classes"].append("nobr-words")
    for math in list(doctree.findall(nodes.math)):
        parent, i = math.parent, math.parent.index(math)
        around: list[nodes.Node] = [math]
        for j, ends in ((i + 1, r"(\S{1,3})(?!\S)(.*)"), (i - 1, r"(.*(?<!\S))(\S{1,2})")):
            beside = parent[j] if 0 <= j < len(parent) else None
            if isinstance(beside, nodes.Text) and (found := re.fullmatch(ends, beside, flags=re.DOTALL)):
                near, rest = found.groups() if j > i else found.groups()[::-1]
                around = [*around, nodes.Text(near)] if j > i else [nodes.Text(near), *around]
                parent[j] = nodes.Text(rest)
        if len(around) > 1:
            parent[parent.index(math)] = _nobr(*around)
    for text in list(doctree.findall(nodes.Text)):
        parent = text.parent
        if isinstance(parent, (nodes.literal, nodes.FixedTextElement, nodes.math, nodes.raw)):
            continue
        parts: list[nodes.Node] = []
        end = 0
        for match in _WHOLE.finditer(text):
            parts += [nodes.Text(text[end : match.start()]), _nobr(nodes.Text(match[0]))]
            end = match.end()
        if parts:
            parent.replace(text, [*parts, nodes.Text(text[end:])])


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
