"""Fails when a file of kernels/ cannot be read alone: each .inl includes what it uses, so that editors understand it.

Compiles every .inl by itself, with the flags of the instruction set that its folder is called after.
"""

import pathlib
import subprocess
import sys

FLAGS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mfma"],
}
FLAGS["amx"] = FLAGS["avx512"]


def main(root: pathlib.Path, compiler: str) -> int:
    bad = []
    for path in sorted(root.glob("kernels/**/*.inl")):
        name = path.relative_to(root)
        command = [compiler, "-std=c++20", "-w", "-fsyntax-only", f"-I{root}", *FLAGS.get(path.parent.name, [])]
        done = subprocess.run(
            [*command, "-x", "c++", "-"], input=f'#include "{name}"\n', text=True, capture_output=True, check=False
        )
        if done.returncode != 0:
            bad.append(f"{name}: cannot be compiled alone:\n{done.stderr}")
    print("\n".join(bad))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(pathlib.Path(sys.argv[1]), sys.argv[2]))
