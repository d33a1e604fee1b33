"""Prints the directory of the torch to build against: the importable one, else the one of this interpreter's own
site-packages (which pip's isolated builds hide). Prints nothing when there is none."""

import importlib.util
import pathlib
import sysconfig

spec = importlib.util.find_spec("torch")
found = [pathlib.Path(spec.origin).parent] if spec and spec.origin else []
found += [pathlib.Path(sysconfig.get_path(key)) / "torch" for key in ("purelib", "platlib")]
print(next((str(path) for path in found if (path / "include").is_dir()), ""))
