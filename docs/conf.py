"""Configuration of the documentation site."""

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
numpydoc_show_class_members = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"
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
    },
    "dark_css_variables": {
        "color-brand-primary": "#ff9d5c",
        "color-brand-content": "#ff9d5c",
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


def setup(app: Sphinx) -> None:
    """Register the renderer of formulas."""
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
