"""Fails when a module of python/kt_coproc imports one that is not on a lower floor, or a file has no floor here.

Every import counts: also inside functions and under TYPE_CHECKING. Modules of one floor do not import each other, so
there can be no circle.
"""

import ast
import pathlib
import sys

PACKAGE = pathlib.PurePath("python/kt_coproc")
# From the ground up.
FLOORS = [
    ["_native", "_build", "errors", "environment", "scopes", "wire", "expert_names", "gating"]
    + ["membership", "hooks.__init__"],
    ["fingerprint", "patching", "replay"],
    ["connection"],
    ["adapter"],
    ["placeholder", "job"],
    ["lora_linear", "experts", "step"],
    ["swap", "clipping", "optimizer_state"],
    ["same_model", "hooks.torch_checkpoint"],
    ["hooks.torch_optimizer", "hooks.torch_clipping", "hooks.torch_parallel", "hooks.transformers", "hooks.peft"]
    + ["hooks.accelerate"],
    ["_autoload"],
    ["api"],
    ["layer"],
    ["__init__"],
]
FLOOR_OF = {module: number for number, floor in enumerate(FLOORS) for module in floor}


def imported(module: str, text: str, known: set[str]) -> list[tuple[int, str]]:
    """Line and name of every module of the package that this one imports."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            folder = ["kt_coproc", *module.split(".")][: -node.level] if node.level else []
            base = ".".join([*folder, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "kt_coproc":
                found.append((node.lineno, module_of(name.removeprefix("kt_coproc").removeprefix("."), known)))
    return found


def module_of(name: str, known: set[str]) -> str:
    """The module that `name` is or is defined in."""
    while name and name not in known and f"{name}.__init__" not in known:
        name = name.rpartition(".")[0]
    return name if name in known else f"{name}.__init__".removeprefix(".")


def complaints(modules: dict[str, str]) -> list[str]:
    """modules: name -> text."""
    bad = []
    for module, text in sorted(modules.items()):
        if module not in FLOOR_OF:
            bad.append(f"{module}: has no floor in tests/arch/check_python_floors.py")
            continue
        for line, target in imported(module, text, set(FLOOR_OF) | set(modules)):
            if FLOOR_OF.get(target, -1) >= FLOOR_OF[module]:
                bad.append(
                    f"{module}:{line}: floor {FLOOR_OF[module]} may not import {target} of floor {FLOOR_OF[target]}"
                )
    return bad


def main(root: pathlib.Path) -> int:
    package = root / PACKAGE
    modules = {
        ".".join(path.relative_to(package).with_suffix("").parts): path.read_text()
        for path in sorted(package.rglob("*.py*"))
        if path.suffix in {".py", ".pyi"}
    }
    bad = complaints(modules)
    bad += [f"{module}: has a floor and no file" for module in FLOOR_OF.keys() - modules.keys() - {"_build"}]
    print("\n".join(bad))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1])))
