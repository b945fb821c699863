"""Sphinx settings: Markdown pages, and the reference from the docstrings. Build with ``make docs``."""

from importlib import metadata

project = "lightning-localsgd"
author = "The lightning-localsgd founders"
release = metadata.version("lightning-localsgd")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"{project} {release}"

myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]  # as GitHub writes formulas
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True

# Every name in the reference leads somewhere, but for those of others, and for classes that only say what ours have in
# common.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(collections|datetime|os|torch|lightning|lightning_fabric|pytorch_lightning)\..*"),
    (r"py:class", r"lightning_localsgd\.(outer\.OuterStep|strategy\.LocalSGD)"),
]
