"""Which names the pickles of another process may use: classes and functions of other libraries, values of Python's own.

A pickle names what is called to put it together. All that is known to turn a message into a command is in Python's
standard library, so that of it only what makes values is admitted. What other libraries and the user's project define
may be in a batch, and is admitted: this keeps out what is thrown at an open port, not who knows the project's code.
"""

from __future__ import annotations

import pickle
import sys
from types import ModuleType, NoneType
from typing import Any

# Modules of the standard library that have nothing but values.
_MODULES = {"array", "collections", "datetime", "decimal", "fractions", "ipaddress", "pathlib", "uuid", "zoneinfo"}
_BUILTINS = {
    *("Ellipsis", "NotImplemented", "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int"),
    *("list", "object", "range", "set", "slice", "str", "tuple", "type"),
}
_NAMES = {
    ("_codecs", "encode"),
    ("_io", "BytesIO"),
    ("_io", "StringIO"),
    ("copyreg", "__newobj__"),
    ("copyreg", "__newobj_ex__"),
    ("copyreg", "_reconstructor"),
    ("re", "_compile"),
    ("types", "SimpleNamespace"),
    *(("builtins", name) for name in _BUILTINS),
}


class AdmittedUnpickler(pickle.Unpickler):
    """Reads what another process has pickled.

    Raises:
        pickle.UnpicklingError: If it names what is not admitted; nothing of it has been called then.
    """

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        if not is_admitted(found, module, name):
            raise pickle.UnpicklingError(
                f"it names {module}.{name}, which is not taken from another process. If it belongs into a batch, let"
                " the batch hold what it is made from, or an object of a class of your own."
            )
        return found


def is_admitted(found: Any, module: str, name: str) -> bool:
    """Return whether what a pickle has found under a name, in a module, may be used.

    What counts is where it was defined: ``torch.os.system`` is not torch's, nor is ``torch.sys.modules.update``.
    """
    owner = getattr(found, "__self__", None)
    if isinstance(found, ModuleType) or not isinstance(owner, NoneType | ModuleType | type):
        return False
    # An object that is nobody's but its module's, such as `torch.float32`, is where its class is.
    defined = getattr(found if callable(found) else type(found), "__module__", None) or module
    top = defined.partition(".")[0]
    if top not in sys.stdlib_module_names:
        return True
    if isinstance(found, type) and issubclass(found, BaseException):
        return True
    return top in _MODULES or (defined, getattr(found, "__name__", name)) in _NAMES
