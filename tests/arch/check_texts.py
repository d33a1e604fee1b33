"""Fails when *.md names a file that does not exist, or any text a document that is not in the repository."""

import fnmatch
import pathlib
import re
import sys

from check_layers import tracked_files

FOREIGN_DOCUMENT = re.compile(r"\b(DESIGN|HOUSE|INTEGRATION|FACTS|MODELS|STYLE)(\.md)?( §|'s\b|\.md\b)")
SUFFIX = r"\.(?:h|cpp|inl|pyi?|md|txt|toml|json|cmake)"
# `adapter_step.h/.cpp`, `kernels/<isa>/table.cpp`, `cpu_features.*`: what Markdown quotes and looks like a file.
QUOTED = re.compile(rf"`([\w<>*./-]*[\w>]{SUFFIX}(?:/\.\w+)?|[\w/-]+\.\*)`")
# A path from the root, quoted or drawn.
FROM_ROOT = re.compile(rf"\b((?:coproc|shm|client|kernels|python|tests|tools)/[\w<>*./-]*\w{SUFFIX})\b")
LINK = re.compile(r"\]\(([^)#\s]+)\)")
# Written by the build or by users, never by us.
NOT_OURS = {"config.json", "adapter_config.json", "_build.py"}


def spellings(name: str) -> list[str]:
    """`a.h/.cpp` is two files; <isa> stands for any name."""
    first, _, second = name.partition("/.") if re.search(r"\.\w+/\.\w+$", name) else (name, "", "")
    names = [first] + ([first.rpartition(".")[0] + "." + second] if second else [])
    return [re.sub(r"<\w+>", "*", each) for each in names]


def exists(name: str, files: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(file, name) or fnmatch.fnmatchcase(file, "*/" + name) for file in files)


def missing_files(name: str, text: str, root: pathlib.Path, files: list[str]) -> list[str]:
    bad = []
    for number, line in enumerate(text.splitlines(), 1):
        for quoted in QUOTED.findall(line) + FROM_ROOT.findall(line):
            if quoted in NOT_OURS:
                continue
            bad += [f"{name}:{number}: no file {each}" for each in spellings(quoted) if not exists(each, files)]
        for target in LINK.findall(line):
            if "://" not in target and not (root / name).parent.joinpath(target).exists():
                bad.append(f"{name}:{number}: the link leads nowhere: {target}")
    return bad


def tests_off_the_map(root: pathlib.Path, files: list[str]) -> list[str]:
    """Tests that tests/README.md does not name."""
    tests = [file for file in files if re.match(r"tests/.*(_test\.cpp|/test_\w+\.py)$", file)]
    text = (root / "tests/README.md").read_text()
    return [
        f"{test}: tests/README.md does not say what it proves" for test in tests if test[len("tests/") :] not in text
    ]


def main(root: pathlib.Path) -> int:
    files = tracked_files(root)
    bad = tests_off_the_map(root, files)
    for name in files:
        if pathlib.Path(name).name == "check_texts.py":
            continue
        text = (root / name).read_text(errors="replace")
        for number, line in enumerate(text.splitlines(), 1):
            if FOREIGN_DOCUMENT.search(line):
                bad.append(f"{name}:{number}: names a document that is not in the repository: {line.strip()}")
        if name.endswith(".md"):
            bad += missing_files(name, text, root, files)
    print("\n".join(bad))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1])))
