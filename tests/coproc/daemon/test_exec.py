"""kt-coproc exec: a daemon for one command, gone without a trace afterwards."""

import contextlib
import os
import pathlib
import signal
import subprocess

from harness import BINARY, WATCHDOG_SECONDS, DaemonTest, main, wait_until


class Exec(DaemonTest):
    def tearDown(self):
        left = [path for path in self.directory.iterdir() if path.name.startswith("kt-coproc-")]
        self.assertEqual(left, [])

    def exec(self, *command, **variables):
        return self.coproc("exec", "--model", self.model, "--threads", 1, "--", *command, **variables)

    def start_exec(self, *command):
        process = subprocess.Popen(
            self.command("exec", "--model", self.model, "--", *command),
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        self.addCleanup(process.stdout.close)
        self.addCleanup(self.kill_group, process)
        return process

    def test_the_command_runs_with_a_ready_daemon(self):
        done = self.exec("sh", "-c", f"echo $KT_COPROC; {BINARY} status --json", KT_COPROC_SOCKET="/not/this")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertRegex(done.stdout, rf"^unix:{self.directory}/kt-coproc-\w{{6}}/kt.sock\n")
        self.assertIn('"state": "serving"', done.stdout)

    def test_its_status_is_the_commands(self):
        for status in (0, 7, 255):
            self.assertEqual(self.exec("sh", "-c", f"exit {status}").returncode, status)
        self.assertEqual(self.exec("sh", "-c", "kill -TERM $$").returncode, 128 + signal.SIGTERM)
        self.assertEqual(self.exec("sh", "-c", "kill -KILL $$").returncode, 128 + signal.SIGKILL)

    def test_a_command_that_cannot_run_is_127_or_126(self):
        self.assert_error(self.exec("no-such-command-here"), 127, "no-such-command-here")
        self.assert_error(self.exec(self.model / "config.json"), 126, "config.json")

    def test_its_own_mistakes_are_usage_errors(self):
        self.assert_error(self.coproc("exec", "--model", self.model), 2, "--")
        self.assert_error(self.coproc("exec", "--model", self.model, "--"), 2, "--")
        self.assert_error(self.coproc("exec", "--", "true"), 2, "--model")
        self.assert_error(self.coproc("exec", "--model", self.model, "--socket", "x", "--", "true"), 2, "--socket")
        self.assert_error(self.coproc("exec", "--model", self.model, "--threads", "0", "--", "true"), 2, "--threads")

    def test_a_daemon_that_does_not_start_gives_its_code_and_error(self):
        self.assert_error(self.coproc("exec", "--model", self.directory, "--", "true"), 66, "config.json")
        done = self.coproc("exec", "--model", self.model, "--", "true", KT_COPROC_KERNELS="amx")
        if "amx_bf16" not in pathlib.Path("/proc/cpuinfo").read_text():
            self.assert_error(done, 69, "amx")

    def test_signals_reach_the_command(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            process = self.start_exec("sh", "-c", "trap 'exit 9' TERM INT; echo up; while :; do sleep 0.1; done")
            self.assertEqual(process.stdout.readline(), "up\n")
            process.send_signal(number)
            self.assertEqual(process.wait(WATCHDOG_SECONDS), 9)

    def test_a_signal_while_the_daemon_loads_ends_both(self):
        model = self.sparse_checkpoint(self.directory / "large", experts=96, hidden=2048, intermediate=1024)
        process = subprocess.Popen(
            self.command("exec", "--model", model, "--threads", 1, "--", "true"),
            env=self.environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.addCleanup(process.stderr.close)
        self.addCleanup(self.kill, process)
        while "compute workers" not in process.stderr.readline():
            pass
        process.terminate()
        self.assertEqual(process.wait(WATCHDOG_SECONDS), 128 + signal.SIGTERM, process.stderr.read())

    def test_the_daemon_ends_when_exec_is_killed(self):
        process = self.start_exec("sh", "-c", f"{BINARY} status --json; sleep 60")
        pid = next(int(line.split(":")[1].strip(" ,\n")) for line in process.stdout if '"pid"' in line)
        process.kill()
        wait_until(lambda: not os.path.exists(f"/proc/{pid}") or self.is_zombie(pid), "the daemon stays")
        subprocess.run(["sh", "-c", f"rm -rf {self.directory}/kt-coproc-*"], check=True)

    @staticmethod
    def kill_group(process):
        """exec, and the command it may have left behind. The daemon, in a group of its own, ends with exec."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(WATCHDOG_SECONDS)

    @staticmethod
    def is_zombie(pid):
        try:
            return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
        except FileNotFoundError:
            return True


if __name__ == "__main__":
    main()
