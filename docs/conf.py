from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

from lars_array import __version__

project = "lars-array"
author = "The lars-array authors"
copyright = author
release = __version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",
    "sphinx_copybutton",
]
myst_enable_extensions = ["amsmath", "dollarmath"]
exclude_patterns = ["_build"]
html_theme = "furo"
pygments_style = "default"  # in the light; furo's own has no colours for what a diff adds
html_static_path = ["_static"]
html_css_files = ["narrow.css"]

# What is copied can be run: prompts and output are left out.
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

autodoc_default_options = {"members": True}
autodoc_preserve_defaults = True  # `REQUIRED` and functions by name
maximum_signature_line_length = 88
numpydoc_show_class_members = False

# Names in single backticks are links, see `leave_arguments_alone`.
default_role = "py:obj"

# The few names of other projects that are linked here are in `inventories`, so that the build needs no network. Their
# first format is plain text, and the anchor of a name is the name.
_SITES = {
    "jax": "https://docs.jax.dev/en/latest/",
    "numpy": "https://numpy.org/doc/stable/",
    "optax": "https://optax.readthedocs.io/en/latest/",
    "python": "https://docs.python.org/3/",
    "torch": "https://docs.pytorch.org/docs/stable/",
}
intersphinx_mapping = {name: (url, f"inventories/{name}.txt") for name, url in _SITES.items()}

# Names that an annotation has and no documentation: one is ours, one is matplotlib's, one is private to optax.
nitpick_ignore = [
    ("py:class", "RuleFunction"),
    ("py:class", "Figure"),
    ("py:class", "optax._src.base.GradientTransformationExtraArgs"),
]

# Every docstring shown here is checked as it is read.
numpydoc_validation_checks = {
    "all",
    "GL01",  # The summary stands on the first line.
    "ES01",  # A one-line summary may say everything.
    "EX01",  # Not everything needs an example,
    "SA01",  # a neighbour to name,
    "YD01",  # or, for a generator, a name for what it yields.
    "PR06",  # An "integer array" is not an "int array".
    "PR08",  # A description may begin with a symbol.
}
# All rules have the one signature that `Rule` describes, the fields of `Hyper` are the arguments of `LARS`, and the
# adapters describe the arguments that they do not share with it.
numpydoc_validation_exclude = {r"\.rules\.", r"\.Hyper$", r"^lars_torch\.LARS$", r"^lars_jax\.(LARS|lars)$"}


def leave_arguments_alone(app: Sphinx, env: Any, node: nodes.Element, text: nodes.Element) -> nodes.Element | None:
    """Show a name without a dot that is documented nowhere as it is: it is an argument. Others must be found."""
    is_argument = node.get("reftype") == "obj" and node["reftarget"].isidentifier()
    return text if is_argument else None


def setup(app: Sphinx) -> None:
    # After intersphinx, which has 500.
    app.connect("missing-reference", leave_arguments_alone, priority=900)
