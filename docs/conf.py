from lars_array import __version__

project = "lars-array"
author = "The lars-array authors"
copyright = author
release = __version__

extensions = ["myst_parser", "numpydoc", "sphinx.ext.autodoc", "sphinx.ext.mathjax"]
myst_enable_extensions = ["amsmath", "dollarmath"]
exclude_patterns = ["_build"]
html_theme = "furo"

# The docstrings hold the types; the annotations would only repeat them, with links to documentation that is not here.
autodoc_typehints = "none"
autodoc_default_options = {"members": True}
numpydoc_show_class_members = False

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
