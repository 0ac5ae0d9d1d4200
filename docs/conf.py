"""Configuration of the documentation site."""

import acprop_core

project = "acprop-core"
author = "The acprop-core developers"
copyright = "2026, the acprop-core developers"
release = version = acprop_core.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "numpydoc", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "acprop-core"
exclude_patterns = ["_build", "benchmarks", "examples"]
nitpicky = False
numpydoc_show_class_members = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"
