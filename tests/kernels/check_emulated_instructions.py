"""Fails when a table's object holds an EVEX, opmask or AMX instruction that the emulator does not know.

The kernel suite runs on small shapes and need not reach every instruction; this looks at all of them. objdump's lengths
are compared with the emulator's, instruction by instruction.
"""

import re
import subprocess
import sys

LINE = re.compile(r"^\s*[0-9a-f]+:\t((?:[0-9a-f]{2} )+)\s*\t?(\S*)(.*)$")
AMX = re.compile(r"tile|ldtilecfg|sttilecfg|tdp")


def main(decoder: str, kind: str, objects: list[str]) -> int:
    listed = []
    for path in objects:
        command = ["objdump", "-d", "--insn-width=16", path]
        for line in subprocess.run(command, check=True, text=True, capture_output=True).stdout.splitlines():
            match = LINE.match(line)
            # EVEX; or VEX with a mnemonic that begins with k: only opmask instructions do; or one of tiles.
            if match and (match[1].startswith("62 ") or match[2].startswith("k") or AMX.match(match[2])):
                listed.append((match[1].split(), match[2] + match[3]))
    num_amx = sum(1 for _, name in listed if AMX.match(name))
    if len(listed) < 100 or (num_amx > 0) != (kind == "amx"):
        print(f"{len(listed)} instructions found, {num_amx} of them of AMX: is this the {kind} table?")
        return 1
    text = "".join(" ".join(code) + "\n" for code, _ in listed)
    lengths = subprocess.run([decoder], input=text, check=True, text=True, capture_output=True).stdout.split()
    bad = [
        f"{' '.join(code)}: {name}: {'unknown' if length == '0' else f'decoded as {length} bytes'}"
        for (code, name), length in zip(listed, lengths, strict=True)
        if int(length) != len(code)
    ]
    print("\n".join(bad) if bad else f"all {len(listed)} instructions are known, {num_amx} of them of AMX")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
