"""Fails when an #include goes against the floors (see ARCHITECTURE.md), or a top-level folder is a new one."""

import pathlib
import re
import subprocess
import sys

ALLOWED = {
    "shm/base": {"shm/base"},
    "shm": {"shm"},
    "kernels": {"kernels", "shm/base"},
    "coproc": {"coproc", "shm", "kernels"},
    "client": {"client", "shm"},
    "python": {"python", "client", "shm"},
    "tools/kt_top": {"tools", "shm"},
    "tools": {"tools", "client", "shm"},
}
# Inside coproc/: a lower folder never includes a higher one.
COPROC_ORDER = ["machine", "model", "experts", "engine", "bench", "daemon"]
FOLDERS = {"coproc", "shm", "client", "kernels", "python", "tests", "tools"}
INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.M)


def floor_of(path: str) -> str | None:
    """The longest floor that holds `path` (relative to the root), or None: tests may include everything."""
    floors = [floor for floor in ALLOWED if path.startswith(floor + "/")]
    return max(floors, key=len, default=None)


def complaints_about(path: str, text: str) -> list[str]:
    floor = floor_of(path)
    bad = []
    for target in INCLUDE.findall(text):
        if "/" not in target:
            bad.append(f"{path}: write includes from the repository root: {target}")
        elif floor and not any(target.startswith(allowed + "/") for allowed in ALLOWED[floor]):
            bad.append(f"{path}: {floor}/ may not include {target}")
        if floor == "coproc" and target.startswith("coproc/"):
            mine, theirs = path.split("/")[1], target.split("/")[1]
            if COPROC_ORDER.index(theirs) > COPROC_ORDER.index(mine):
                bad.append(f"{path}: coproc/{mine} is below coproc/{theirs} and may not include {target}")
    return bad


def tracked_files(root: pathlib.Path) -> list[str]:
    listed = subprocess.run(
        ["git", "-C", str(root), "ls-files", "--cached", "--others", "--exclude-standard"],
        check=True,
        text=True,
        capture_output=True,
    )
    return [name for name in listed.stdout.splitlines() if (root / name).exists()]


def main(root: pathlib.Path) -> int:
    bad = []
    files = tracked_files(root)
    for name in files:
        if pathlib.Path(name).suffix in {".h", ".cpp", ".inl"}:
            bad += complaints_about(name, (root / name).read_text())
    for folder in sorted({name.split("/")[0] for name in files if "/" in name}):
        if folder not in FOLDERS and not folder.startswith("."):
            bad.append(f"{folder}/: not a top-level folder of this house ({', '.join(sorted(FOLDERS))})")
    print("\n".join(bad))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1])))
