"""Fails when a file or a function is too long to hold one idea: 600 lines a file, 70 a function, 120 columns a line."""

import ast
import pathlib
import re
import sys

from check_layers import tracked_files

FILE_LINES = 600
FUNCTION_LINES = 70
LINE_COLUMNS = 120
CXX = {".h", ".cpp", ".inl"}
# Google style: a function outside a class starts at column 0 and its closing brace stands there too.
NOT_A_FUNCTION = re.compile(r"^(namespace|struct|class|union|enum|extern|#|//|\}|typedef|using)\b|^[#/}]")


def cxx_functions(lines: list[str]) -> list[tuple[int, int]]:
    """(first line, number of lines) of each function body that starts at column 0."""
    found, start = [], None
    for number, line in enumerate(lines, 1):
        opens = line[:1].strip() != "" and line.rstrip().endswith("{") and not NOT_A_FUNCTION.match(line)
        if start is None and opens and "(" in "".join(lines[max(0, number - 6) : number]):
            start = number
        elif start is not None and line.startswith("}"):
            found.append((start, number - start + 1))
            start = None
    return found


def python_functions(text: str) -> list[tuple[int, int]]:
    return [
        (node.lineno, (node.end_lineno or node.lineno) - node.lineno + 1)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def main(root: pathlib.Path) -> int:
    bad = []
    for name in tracked_files(root):
        suffix = pathlib.Path(name).suffix
        if suffix not in CXX | {".py", ".pyi"}:
            continue
        text = (root / name).read_text()
        lines = text.splitlines()
        if len(lines) > FILE_LINES:
            bad.append(f"{name}: {len(lines)} lines, the limit is {FILE_LINES}")
        for number, line in enumerate(lines, 1):
            if len(line) > LINE_COLUMNS:
                bad.append(f"{name}:{number}: {len(line)} columns, the limit is {LINE_COLUMNS}")
        functions = cxx_functions(lines) if suffix in CXX else python_functions(text)
        for start, length in functions:
            if length > FUNCTION_LINES:
                bad.append(f"{name}:{start}: a function of {length} lines, the limit is {FUNCTION_LINES}")
    print("\n".join(bad))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1])))
