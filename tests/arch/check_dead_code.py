"""Fails for code that nobody uses: a function or type that only its own declaration and definition name, a source that
no CMakeLists.txt compiles, a header that nobody includes. Uses by tests count, so this finds leftovers, not test-only
code. Enumerators are not looked at: an enum lists what exists elsewhere."""

import ast
import collections
import pathlib
import re
import sys

from check_layers import tracked_files

CXX = {".h", ".cpp", ".inl"}
# Called by name from outside the project, or meant for nobody to call.
KNOWN = {
    "get_mapping_handle": "Boost.Interprocess asks mapped objects for it",
    "main": "the linker's",
    "forward": "torch's",
    "backward": "torch's",
}
DECLARATION = re.compile(
    r"^[ \t]*(?!return\b|else\b|throw\b|requires\b)(?:[\w:<>,&*\[\] ]+[ &*>])(?!requires\b)([a-z]\w+)\(", re.MULTILINE
)
TYPE = re.compile(r"^\s*(?:struct|class|enum class)\s+(?:alignas\(\w+\)\s*)?([A-Z]\w+)", re.MULTILINE)


def without_comments(text: str) -> str:
    return re.sub(r'"(?:\\.|[^"\\\n])*"', '""', re.sub(r"//[^\n]*", "", text))


def dead_cxx(root: pathlib.Path, files: list[pathlib.Path]) -> list[str]:
    texts = {path: without_comments((root / path).read_text()) for path in files}
    uses = collections.Counter(word for text in texts.values() for word in re.findall(r"[A-Za-z_]\w+", text))
    bad = []
    for path, text in texts.items():
        if path.suffix != ".h" or path.parts[0] == "tests":
            continue
        beside = texts.get(path.with_suffix(".cpp"), "")
        for name in sorted({*DECLARATION.findall(text), *TYPE.findall(text)} - KNOWN.keys()):
            own = len(re.findall(rf"\b{name}\b", text))
            defined = len(re.findall(rf"^\S.*\b{name}\(", beside, re.MULTILINE))
            if own == 1 and uses[name] <= own + min(defined, 1):
                bad.append(f"{path}: nobody uses {name}")
    return bad


def dead_files(root: pathlib.Path, files: list[pathlib.Path], cmake: list[pathlib.Path]) -> list[str]:
    compiled = " ".join((root / path).read_text() for path in cmake)
    included = {
        name for path in files for name in re.findall(r'#(?:include|define \w+) "([^"]+)"', (root / path).read_text())
    }
    bad = []
    for path in files:
        if path.suffix == ".cpp" and not re.search(rf"\b{re.escape(path.name)}", compiled):
            bad.append(f"{path}: no CMakeLists.txt compiles it")
        if path.suffix != ".cpp" and str(path) not in included:
            bad.append(f"{path}: nobody includes it")
    return bad


def dead_python(root: pathlib.Path, files: list[pathlib.Path]) -> list[str]:
    texts = {path: (root / path).read_text() for path in files}
    uses = collections.Counter(word for text in texts.values() for word in re.findall(r"[A-Za-z_]\w+", text))
    bad = []
    for path, text in texts.items():
        if path.parts[0] != "python" or path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name in KNOWN:
                continue
            special = node.name.startswith("__") or getattr(node, "decorator_list", [])
            if not special and uses[node.name] == 1:
                bad.append(f"{path}:{node.lineno}: nobody uses {node.name}")
    return bad


def main(root: pathlib.Path) -> int:
    tracked = [pathlib.Path(name) for name in tracked_files(root)]
    cxx = [path for path in tracked if path.suffix in CXX]
    cmake = [path for path in tracked if path.name == "CMakeLists.txt"]
    python = [path for path in tracked if path.suffix in {".py", ".pyi", ".toml", ".txt"} or path.suffix == ""]
    bad = dead_cxx(root, cxx) + dead_files(root, cxx, cmake) + dead_python(root, python)
    print("\n".join(bad) or f"{len(cxx)} C++ and {len(python)} other files: nothing is unused")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1]).resolve()))
