"""What comes before all tests: the choice between Lightning's packages is made in ``tests/__init__.py``."""

import tests  # noqa: F401
