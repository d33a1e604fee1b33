"""What users get wrong: every exit code of the command line, and where settings come from."""

import os
import pathlib
import re
import stat

from harness import DaemonTest, main


class Usage(DaemonTest):
    def test_verbs_that_do_not_exist_are_refused(self):
        self.assert_error(self.coproc("serve"), 2, "serve", "run, exec")
        self.assert_error(self.coproc(), 2)
        self.assert_error(self.coproc("plan", self.model), 2, "plan")

    def test_every_verb_explains_itself(self):
        for verb in ("run", "exec", "wait", "status", "env", "stop", "version"):
            done = self.coproc(verb, "--help")
            self.assertEqual((done.returncode, done.stderr), (0, ""), verb)
            self.assertIn(f"kt-coproc {verb}", done.stdout)
        self.assertIn("status", self.coproc("--help").stdout)

    def test_the_version_is_printed(self):
        done = self.coproc("version")
        self.assertEqual(done.returncode, 0)
        self.assertRegex(done.stdout, r"^kt-coproc \d+\.\d+\.\d+\n$")

    def test_the_version_is_that_of_pyproject(self):
        pyproject = (pathlib.Path(__file__).resolve().parents[3] / "pyproject.toml").read_text()
        version = re.search(r'^version = "(.+)"$', pyproject, re.M).group(1)
        self.assertEqual(self.coproc("version").stdout, f"kt-coproc {version}\n")

    def test_wrong_flags_are_refused(self):
        self.assert_error(self.coproc("run"), 2, "--model")
        self.assert_error(self.coproc("run", "--model", self.model, "--modell", "x"), 2, "--modell")
        self.assert_error(self.coproc("run", "--model"), 2)
        self.assert_error(self.coproc("status", "--jason"), 2, "--jason")
        self.assert_error(self.coproc("wait"), 2, "--ready")
        self.assert_error(self.coproc("wait", "--ready", "--timeout", "soon"), 2, "soon")
        self.assert_error(self.coproc("stop", "now"), 2, "now")
        self.assert_error(self.coproc("status", "--socket", ""), 2, "empty")
        self.assert_error(self.coproc("run", "--model", self.model, "--socket", ""), 2, "empty")

    def test_wrong_values_are_refused_and_named(self):
        run = lambda *flags: self.coproc("run", "--model", self.model, *flags)
        for threads in ("0", "-1", "two", "99999999999999999999", "1025", "1.5", ""):
            self.assert_error(run("--threads", threads), 2, "--threads")
        self.assert_error(run("--weight-format", "fp16"), 2, "fp16", "bf16, fp32, int8, int4, fp8")
        self.assert_error(run("--numa", "on"), 2, "auto, off")
        self.assert_error(run("--numa", "0;;1"), 2, "pool 1 has no CPU")
        self.assert_error(run("--numa", "0,0"), 2, "named twice")
        self.assert_error(run("--numa", "8191"), 2, "8191")
        self.assert_error(run("--numa", "0", "--threads", "1"), 2, "--threads")
        self.assert_error(run("--kernels", "neon"), 2, "neon")
        self.assert_error(run("--weight-format", "fp32", "--kernels", "avx512"), 2, "scalar")
        self.assertFalse(self.runtime.exists())

    def test_kernels_this_cpu_lacks_are_missing_resources(self):
        flags = pathlib.Path("/proc/cpuinfo").read_text()
        if "amx_bf16" in flags:
            self.skipTest("this CPU has them all")
        self.assert_error(self.coproc("run", "--model", self.model, "--kernels", "amx"), 69, "amx")
        if "avx512_bf16" not in flags:
            self.assert_error(self.coproc("run", "--model", self.model, "--kernels", "avx512"), 69, "lacks")
        self.assertFalse(self.runtime.exists())

    def test_a_socket_path_over_107_bytes_is_refused(self):
        path = "/tmp/" + 103 * "x"
        self.assert_error(self.coproc("run", "--model", self.model, "--socket", path), 2, "108 bytes", "107")
        self.assert_error(self.coproc("status", "--socket", path), 2, "107")

    def test_a_kt_coproc_that_is_no_address_is_quoted(self):
        self.assert_error(self.coproc("status", KT_COPROC="tcp:1"), 2, '"tcp:1"')


class Places(DaemonTest):
    def test_a_directory_that_is_no_checkpoint_leaves_nothing_behind(self):
        self.assert_error(self.coproc("run", "--model", self.directory / "nowhere"), 66, "nowhere")
        self.assert_error(self.coproc("run", "--model", self.directory), 66, "config.json")
        (self.directory / "config.json").write_text("{")
        self.assert_error(self.coproc("run", "--model", self.directory), 66, "config.json")
        self.assertFalse(self.runtime.exists())

    def test_directories_that_others_can_use_are_unsafe(self):
        for mode in (0o777, 0o770, 0o750, 0o705):
            self.runtime.mkdir(exist_ok=True)
            self.runtime.chmod(mode)
            self.assert_error(self.coproc("run", "--model", self.model), 77, self.runtime, f"{mode:04o}", "chmod 700")
        self.assertEqual(list(self.runtime.iterdir()), [])
        self.runtime.chmod(0o1777)  # Like /tmp: to close that would be bad advice.
        done = self.coproc("run", "--model", self.model)
        self.assert_error(done, 77, "--socket")
        self.assertNotIn("chmod", done.stderr)

    def test_a_socket_that_others_can_write_is_not_used(self):
        self.start()
        os.chmod(self.socket_path, 0o666)
        self.assert_error(self.coproc("status"), 77, self.socket_path)

    def test_a_directory_that_cannot_be_made_is_an_os_error(self):
        self.assert_error(self.coproc("run", "--model", self.model, "--socket", "/proc/none/kt.sock"), 71, "/proc/none")

    def test_a_file_in_the_sockets_place_is_not_removed(self):
        self.runtime.mkdir(mode=0o700)
        self.socket_path.write_text("precious")
        self.assert_error(self.coproc("run", "--model", self.model), 77, self.socket_path)
        self.assertEqual(self.socket_path.read_text(), "precious")

    def test_the_socket_is_ours_alone(self):
        self.start()
        self.assertEqual(stat.S_IMODE(self.runtime.stat().st_mode), 0o700)
        self.assertEqual(stat.S_IMODE(self.socket_path.stat().st_mode), 0o600)
        self.assertEqual({path.name for path in self.runtime.iterdir()}, {"kt.sock", "kt.sock.lock"})

    def test_a_relative_socket_path_is_relative_to_here(self):
        self.start("--socket", "here/my.sock", ready=False)
        self.socket_path = self.directory / "here" / "my.sock"
        waited = self.coproc("wait", "--ready", "--timeout", 60, "--socket", "here/my.sock")
        self.assertEqual(waited.returncode, 0, waited.stderr)
        done = self.coproc("env", "--socket", "here/my.sock")
        self.assertEqual(done.stdout, f"export KT_COPROC=unix:{self.socket_path}\n")
        # KT_COPROC comes before the search, --socket before KT_COPROC.
        self.assertEqual(self.coproc("status", KT_COPROC=f"unix:{self.socket_path}").returncode, 0)
        self.assertEqual(self.coproc("status", KT_COPROC="off").returncode, 3)
        self.assertEqual(self.coproc("status", "--socket", "here/my.sock", KT_COPROC="off").returncode, 0)

    def test_without_a_daemon_the_verbs_say_so(self):
        for verb in ("status", "env", "stop"):
            self.assert_error(self.coproc(verb), 3, self.socket_path, "kt-coproc run --model")
        self.assert_error(self.coproc("wait", "--ready", "--timeout", "0.3"), 124, self.socket_path)


class Settings(DaemonTest):
    def run_with_file(self, text, *flags, **variables):
        path = self.directory / "kt.toml"
        path.write_text(text)
        return self.coproc("run", "--config", path, *flags, **variables)

    def test_mistakes_in_the_file_are_named_with_line_and_column(self):
        path = self.directory / "kt.toml"
        self.assert_error(self.run_with_file('model = "x"\n  thread = 4\n'), 2, f"{path}:2:3", "'thread'", "threads")
        self.assert_error(self.run_with_file('threads = "4"\n'), 2, f"{path}:1:11", "a string", "a whole number")
        self.assert_error(self.run_with_file("model = 1\n"), 2, f"{path}:1:9", "in quotes")
        self.assert_error(self.run_with_file("deterministic = 1\n"), 2, f"{path}:1:17", "true or false")
        self.assert_error(self.run_with_file("threads = \n"), 2, f"{path}:1:", "not TOML")
        self.assert_error(self.run_with_file("[server]\nthreads = 1\n"), 2, f"{path}:1:2", "'server'")
        self.assert_error(self.run_with_file('config = "x"\n'), 2, f"{path}:1:1", "'config'")
        self.assert_error(self.run_with_file("weight-format = 'bf16'\nweight_format = 'bf16'\n"), 2, "twice")
        # A value out of range is found later, and still says where it stands.
        self.assert_error(self.run_with_file(f"model = '{self.model}'\nthreads = 0\n"), 2, f"{path}:2:11")
        self.assert_error(self.coproc("run", "--config", "none.toml"), 2, "none.toml")
        self.assert_error(self.coproc("run", "--config", self.directory), 2, self.directory)

    def test_flags_come_before_the_environment_and_that_before_the_file(self):
        path = self.directory / "kt.toml"
        path.write_text(f"model = '{self.model}'\nweight_format = 'fp32'\nthreads = 1\n")
        bad = {"KT_COPROC_WEIGHT_FORMAT": "environment"}
        self.assert_error(self.coproc("run", "--config", path, **bad), 2, "KT_COPROC_WEIGHT_FORMAT")
        self.assert_error(self.coproc("run", "--config", path, "--weight-format", "flag", **bad), 2, "--weight-format")
        # The file's thread and the environment's weight format; the flag wins over both for kernels.
        self.start("--config", path, "--kernels", "scalar", KT_COPROC_WEIGHT_FORMAT="bf16", KT_COPROC_KERNELS="neon")
        status = self.status()
        self.assertEqual(status["worker_threads"], 1)
        self.assertEqual(status["model"]["weight_format"], "bf16")
        self.assertEqual(status["kernels"], "scalar")

    def test_everything_may_come_from_the_environment(self):
        socket_path = self.directory / "other" / "kt.sock"
        self.start(
            KT_COPROC_SOCKET=str(socket_path),
            KT_COPROC_DETERMINISTIC="1",
            KT_COPROC_WEIGHT_FORMAT="fp32",
            KT_COPROC_THREADS="",
            KT_COPROC_ACTIVATION_BYTES_MAX="1000000",
            ready=False,
        )
        waited = self.coproc("wait", "--ready", "--timeout", 60, "--socket", socket_path)
        self.assertEqual(waited.returncode, 0, waited.stderr)
        reply = self.connect(socket_path).hello()
        self.assertEqual((reply["deterministic"], reply["element_bytes"]), (True, 4))
        self.assertEqual(reply["limits"]["activation_bytes_max"], 1000000)
        self.assertEqual(reply["model"]["weight_format"], "fp32")
        self.assertFalse(self.runtime.exists())

    def test_too_many_threads_are_warned_about(self):
        process = self.start("--threads", os.cpu_count() + 2)
        self.assertIn("will wait for each other", process.log.read_text())
        self.assertIn(f"compute workers: {os.cpu_count() + 2} of", process.log.read_text())

    def test_more_memory_than_there_is_is_refused_before_anything_starts(self):
        model = self.sparse_checkpoint(self.directory / "huge", experts=2048, hidden=16384, intermediate=16384)
        done = self.coproc("run", "--model", model)
        self.assert_error(done, 69, "memory", "GB")
        self.assertFalse(self.runtime.exists())


if __name__ == "__main__":
    main()
