"""PEP 517 backend: scikit-build-core, with torch required for the build only where the environment has none.

The extension must be built against the torch it will be loaded with. pip builds in an isolated environment that hides
the user's packages, so a plain build requirement on torch would download another one; CMakeLists.txt looks for the
torch of the interpreter's own site-packages instead.
"""

import importlib.util
import pathlib
import sysconfig

from scikit_build_core import build as _backend
from scikit_build_core.build import *  # noqa: F403  (the PEP 517 hooks)


def _environment_has_torch() -> bool:
    installed = [pathlib.Path(sysconfig.get_path(key)) / "torch" / "version.py" for key in ("purelib", "platlib")]
    return importlib.util.find_spec("torch") is not None or any(path.exists() for path in installed)


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    requires = list(_backend.get_requires_for_build_wheel(config_settings))
    return requires if _environment_has_torch() else [*requires, "torch>=2.5"]
