"""How the pages become a site: `make docs`."""

project = "hf_maskformer"
copyright = "the authors of hf_maskformer"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = project

myst_heading_anchors = 3

# In docstrings a word between single backticks is code.
default_role = "literal"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
# The fields of outputs and configurations stand in their docstrings.
autodoc_default_options = {"undoc-members": False, "exclude-members": "model_type, config_class"}
napoleon_custom_sections = [("Shapes", "params_style")]
napoleon_use_rtype = False
