"""The one place where the package's version lives; change it here for a release, and nowhere else.

The build reads the string without importing the package (``[tool.setuptools.dynamic]`` in ``pyproject.toml``), so it
must stay a plain literal.
"""

__version__ = "0.1.0"
