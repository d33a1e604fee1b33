"""Real daemons and their cache of quantised weights: where it is, when it is used, and what may go wrong with it."""

import os
import pathlib
import random
import re
import resource
import signal
import subprocess
import tempfile
import time

from harness import MAKE_CHECKPOINT, WATCHDOG_SECONDS, DaemonTest, main, wait_until

# 6 chunks of 16 MiB in int8: long enough to be killed in the middle of.
SIZES = ("layers=2", "experts=24", "hidden=1024", "intermediate=640", "shards=2")


class WeightCache(DaemonTest):
    @classmethod
    def setUpClass(cls):
        cls.class_directory = tempfile.TemporaryDirectory(prefix="kt-")
        cls.model = pathlib.Path(cls.class_directory.name) / "model"
        subprocess.run([MAKE_CHECKPOINT, cls.model, *SIZES], check=True, timeout=WATCHDOG_SECONDS)

    def setUp(self):
        super().setUp()
        self.cache = self.directory / "cache"

    def stop(self, process):
        self.assertEqual(self.coproc("stop").returncode, 0)
        self.assertEqual(process.wait(WATCHDOG_SECONDS), 0)

    def run_once(self, *flags, until, **variables):
        """Starts a daemon, waits for a line of its log that matches, stops it. The lines of the cache."""
        process = self.start("--weight-format", "int8", *flags, **variables)
        status = self.status()
        self.assertEqual(status["state"], "serving")
        self.assertEqual(status["load"]["bytes_done"], status["load"]["bytes_total"])
        wait_until(lambda: re.search(until, process.log.read_text()), f"no {until!r} in {process.log.read_text()}")
        self.stop(process)
        lines = [line for line in process.log.read_text().splitlines() if "weight cache" in line]
        return status["load"]["bytes_total"], lines

    def files(self):
        return sorted(path.name for path in self.cache.iterdir()) if self.cache.exists() else []

    def test_the_second_start_reads_what_the_first_one_wrote(self):
        checkpoint_bytes, lines = self.run_once("--weight-cache", self.cache, until="weight cache: wrote")
        self.assertEqual(len(lines), 2, lines)
        self.assertRegex(lines[0], rf"miss: no {self.cache}/int8-[0-9a-f]{{64}}\.weights$")
        (name,) = self.files()
        self.assertRegex(lines[1], rf"wrote [\d.]+ MB in [\d.]+ s \([\d.]+ GB/s\) to {self.cache}/{name}$")
        cache_bytes, lines = self.run_once("--weight-cache", self.cache, until="serving")
        self.assertEqual(len(lines), 1, lines)
        self.assertRegex(lines[0], rf"hit: [\d.]+ MB in [\d.]+ s \([\d.]+ GB/s\) from {self.cache}/{name}$")
        self.assertLess(cache_bytes, 0.6 * checkpoint_bytes)
        self.assertAlmostEqual(cache_bytes, (self.cache / name).stat().st_size, delta=8192)

    def test_its_place_comes_from_flag_environment_and_file_and_has_a_default(self):
        (self.directory / "kt.toml").write_text(f'weight-cache = "{self.cache}"\n')
        self.run_once("--config", "kt.toml", until="weight cache: wrote")
        self.run_once(until="weight cache: hit", KT_COPROC_WEIGHT_CACHE=str(self.cache))
        _, lines = self.run_once("--weight-cache", "off", until="serving", KT_COPROC_WEIGHT_CACHE=str(self.cache))
        self.assertEqual(lines, [])
        xdg, home = self.directory / "xdg", self.directory / "home"
        home.mkdir()
        self.run_once(until="weight cache: wrote", XDG_CACHE_HOME=str(xdg))
        self.assertEqual(len(list((xdg / "kt-coproc").iterdir())), 1)
        self.run_once(until="weight cache: wrote", XDG_CACHE_HOME="", HOME=str(home))
        self.assertEqual(len(list((home / ".cache" / "kt-coproc").iterdir())), 1)
        self.assert_error(self.coproc("run", "--model", self.model, "--weight-cache", ""), 2, "weight-cache")
        self.assertIn("--weight-cache DIR|off", self.coproc("run", "--help").stdout)

    def test_a_damaged_file_costs_one_warning_and_is_replaced(self):
        self.run_once("--weight-cache", self.cache, until="weight cache: wrote")
        (name,) = self.files()
        path = self.cache / name
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[len(whole) // 2] ^= 1
        for content, why in ((damaged, "do not have their checksum"), (whole[:-1], f"not {len(whole)}")):
            path.write_bytes(content)
            _, lines = self.run_once("--weight-cache", self.cache, until="weight cache: wrote")
            self.assertEqual(len(lines), 2, lines)
            self.assertIn("[warning]", lines[0])
            self.assertIn(why, lines[0])
            self.assertEqual(path.read_bytes(), whole)

    def test_a_place_that_is_not_safe_or_not_there_costs_one_warning(self):
        self.cache.mkdir()
        self.cache.chmod(0o777)
        _, lines = self.run_once("--weight-cache", self.cache, until="serving")
        self.assertEqual(len(lines), 1, lines)
        self.assertRegex(lines[0], r"\[warning\].*its mode is 0777: others can write it")
        self.assertEqual(self.files(), [])
        _, lines = self.run_once("--weight-cache", self.model / "config.json" / "x", until="serving")
        self.assertEqual(len(lines), 1, lines)
        self.assertRegex(lines[0], r"\[warning\].*Not a directory")

    def test_a_disk_that_refuses_bytes_costs_one_warning(self):
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, limit[1]))  # Daemons inherit it.
        try:
            _, lines = self.run_once("--weight-cache", self.cache, until=r"\[warning\]")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        self.assertEqual(len(lines), 2, lines)
        self.assertRegex(lines[1], r"\[warning\].*File too large")
        self.assertEqual(self.files(), [])

    def test_two_daemons_at_once_leave_one_whole_file(self):
        others = [
            self.start("--weight-format", "int8", "--weight-cache", self.cache, "--socket", self.runtime / name)
            if name == "kt.sock"
            else self.start("--weight-format", "int8", "--weight-cache", self.cache, ready=False, XDG_RUNTIME_DIR=name)
            for name in (self.other_runtime(), "kt.sock")
        ]
        for process in others:
            wait_until(
                lambda log=process.log: re.search("weight cache: (wrote|not written|hit)", log.read_text()),
                "one of two daemons neither writes nor reads the cache",
            )
        wait_until(lambda: any("weight cache: wrote" in p.log.read_text() for p in others), "nobody wrote the cache")
        self.assertEqual([p.poll() for p in others], [None, None])
        for process in others:
            process.terminate()
            self.assertEqual(process.wait(WATCHDOG_SECONDS), 0)
        (name,) = self.files()
        self.assertTrue(name.endswith(".weights"))
        self.run_once("--weight-cache", self.cache, until="weight cache: hit")

    def other_runtime(self):
        directory = tempfile.TemporaryDirectory(prefix="kt-")
        self.addCleanup(directory.cleanup)
        return directory.name

    def test_a_daemon_killed_or_stopped_in_mid_write_leaves_no_half_file_in_use(self):
        seed = random.randrange(1 << 30)
        print(f"seed {seed}")
        delays = random.Random(seed)
        for end in (signal.SIGKILL, signal.SIGTERM) * 4:
            process = self.start("--weight-format", "int8", "--weight-cache", self.cache, ready=False)
            wait_until(self.files, "the cache is not begun")
            time.sleep(delays.uniform(0, 0.05))
            process.send_signal(end)
            process.wait(WATCHDOG_SECONDS)
            left = self.files()
            if end == signal.SIGTERM:
                self.assertEqual([name for name in left if name.endswith(".kt-tmp")], [])
            done = [name for name in left if name.endswith(".weights")]
            until = "weight cache: hit" if done else "weight cache: wrote"
            self.run_once("--weight-cache", self.cache, until=until)
            (name,) = self.files()
            os.unlink(self.cache / name)


if __name__ == "__main__":
    main()
