"""Every command that a text of the project tells people to run exists: its verb and its flags are in `--help`."""

import pathlib
import re
import subprocess

from harness import DaemonTest, main

ROOT = pathlib.Path(__file__).resolve().parents[3]
# In backticks, as an indented line of Markdown, or anywhere with a flag.
QUOTED = re.compile(
    r"`kt-coproc ([a-z][^`]*)`|^ {4}kt-coproc ([a-z].*)|kt-coproc ([a-z]+ --[a-z][^\"'#;)]*)", re.MULTILINE
)
# Where the words for kt-coproc end: another verb, a comment, the user's own command.
END = re.compile(r", |#| -- |\||\\n")


def quoted_commands():
    """(file, command without kt-coproc), tests' own sources left out."""
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files"], check=True, text=True, capture_output=True)
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if (name.startswith("tests/") and path.suffix != ".md") or not path.is_file():
            continue
        for groups in QUOTED.findall(path.read_text(errors="replace")):
            yield name, END.split("".join(groups))[0].strip()


class QuotedCommands(DaemonTest):
    def test_every_quoted_verb_and_flag_exists(self):
        helps = {}
        commands = list(quoted_commands())
        self.assertGreater(len(commands), 10, "the texts quote commands: the search is broken")
        for name, command in commands:
            verb = command.split()[0]
            if verb not in helps:
                helps[verb] = self.coproc(verb, "--help")
            with self.subTest(file=name, command=command):
                self.assertEqual(helps[verb].returncode, 0, f"kt-coproc has no verb {verb}")
                for flag in re.findall(r"--[a-z][a-z-]*", command):
                    if flag != "--help":
                        self.assertIn(flag, helps[verb].stdout)


if __name__ == "__main__":
    main()
