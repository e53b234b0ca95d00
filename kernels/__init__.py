"""Kernels of the scoring and training path, one folder each, with an XLA reference; they import jax alone.

Hugging Face has a library of the same name. transformers recognizes it by its installed distribution and then
imports from whatever `kernels` comes first on the path, which is this package. So what is not found here is passed
on to that library, if it is installed: its folder joins the search path behind ours, its names are read from it.
"""

import importlib.metadata
import importlib.util
import sys
from types import ModuleType

try:
    _NAMESAKE = importlib.metadata.distribution(__name__).locate_file(__name__)
    __path__.append(str(_NAMESAKE))
except importlib.metadata.PackageNotFoundError:
    _NAMESAKE = None


def _namesake() -> ModuleType:
    """The other library's top-level module, run once, when first needed."""
    module_name = f"{__name__}._namesake"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, _NAMESAKE / "__init__.py")
        sys.modules[module_name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[module_name])
        except BaseException:
            del sys.modules[module_name]
            raise
    return sys.modules[module_name]


def __getattr__(name: str) -> object:
    # One of our folders is looked up here too before it is imported; that must not run the other library.
    if _NAMESAKE and not importlib.util.find_spec(f"{__name__}.{name}") and hasattr(_namesake(), name):
        return getattr(_namesake(), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
