"""Fails when tracked text holds what must not stay: notes to ourselves, or hosts and paths of one machine."""

import pathlib
import re
import sys

from check_layers import tracked_files

FORBIDDEN = {
    "a note to ourselves": re.compile(r"\b(" + "|".join(["TO" + "DO", "FIX" + "ME", "XX" + "X"]) + r")\b"),
    "a package registry's host": re.compile(r"pypi\.org|pythonhosted|deb\.debian|download\.pytorch", re.I),
    "a path of one machine": re.compile(r"(?<![\w.])/(root|work|home/\w+)/"),
}
SUFFIXES = {".h", ".cpp", ".inl", ".py", ".pyi", ".md", ".txt", ".cmake", ".toml", ".json", ".sh", ""}


def main(root: pathlib.Path) -> int:
    bad = []
    for name in tracked_files(root):
        if pathlib.Path(name).suffix not in SUFFIXES or name == "tests/arch/check_words.py":
            continue
        for number, line in enumerate((root / name).read_text(errors="replace").splitlines(), 1):
            bad += [f"{name}:{number}: {what}: {line.strip()}" for what, rule in FORBIDDEN.items() if rule.search(line)]
    print("\n".join(bad))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1])))
