"""The life of a daemon: loading, serving, sessions, shutdown, sudden death."""

import json
import os
import re
import signal
import subprocess
import threading
import unittest

from harness import BINARY, WATCHDOG_SECONDS, DaemonTest, main, wait_until

STATUS_KEYS = {
    "schema",
    "version",
    "pid",
    "daemon_id",
    "state",
    "uptime_seconds",
    "load",
    "model",
    "kernels",
    "numa_nodes",
    "worker_threads",
    "memory_bytes",
    "jobs",
    "ranks",
    "rates",
    "totals",
}
MODEL_KEYS = {
    "path",
    "architecture",
    "fingerprint",
    "num_layers",
    "num_experts",
    "top_k",
    "hidden_size",
    "intermediate_size",
    "activation",
    "weight_format",
}


class Serving(DaemonTest):
    def test_status_shows_the_daemon_and_its_model(self):
        process = self.start("--threads", 1)
        status = self.status()
        self.assertEqual(STATUS_KEYS - status.keys(), set())
        self.assertEqual(status["model"].keys(), MODEL_KEYS)
        self.assertEqual((status["state"], status["pid"], status["worker_threads"]), ("serving", process.pid, 1))
        self.assertEqual(status["model"]["path"], str(self.model))
        self.assertRegex(status["daemon_id"], "^[0-9a-f]{32}$")
        self.assertGreater(status["memory_bytes"]["weights"], 0)
        self.assertEqual(status["load"]["bytes_done"], status["load"]["bytes_total"])
        table = self.coproc("status")
        self.assertEqual(table.returncode, 0)
        for word in ("serving", str(process.pid), "Qwen3MoeForCausalLM", "kernels"):
            self.assertIn(word, table.stdout)
        log = process.log.read_text()
        self.assertRegex(log, rf"serving {re.escape(str(self.model))} on unix:{self.socket_path} \(ready in [\d.]+ s\)")
        self.assertIn("compute workers: 1 of", log)

    def test_quantised_weights_are_the_same_model_in_less_memory(self):
        seen = []
        for weight_format, kernels in (("bf16", "auto"), ("fp8", "auto"), ("int8", "scalar"), ("int4", "auto")):
            process = self.start("--weight-format", weight_format, "--kernels", kernels)
            status = self.status()
            self.assertEqual(status["model"]["weight_format"], weight_format)
            self.assertEqual(status["load"]["bytes_done"], status["load"]["bytes_total"])
            self.assertEqual(self.connect().hello()["element_bytes"], 2)  # of what travels
            seen.append((status["memory_bytes"]["weights"], status["model"]["fingerprint"]))
            self.assertEqual(self.coproc("stop").returncode, 0)
            self.assertEqual(process.wait(WATCHDOG_SECONDS), 0)
        sizes, fingerprints = zip(*seen, strict=True)
        self.assertGreater(sizes[0], 1.5 * sizes[1])  # the pad of every panel counts in a model as small as this
        self.assertGreater(sizes[0], 1.5 * sizes[2])
        self.assertGreater(sizes[2], 1.3 * sizes[3])
        self.assertEqual(len(set(fingerprints)), 1)

    def test_a_second_daemon_is_refused_and_the_first_one_goes_on(self):
        process = self.start()
        self.assert_error(self.coproc("run", "--model", self.model), 75, f"process {process.pid}", self.socket_path)
        self.assertEqual(self.coproc("status").returncode, 0)
        self.attach()

    def test_a_session_gets_its_descriptors_and_is_counted(self):
        process = self.start()
        connection = self.connect()
        reply = connection.hello(name="my job")
        self.assertEqual(len(connection.descriptors), 3)
        self.assertEqual(reply["daemon_pid"], process.pid)
        self.assertEqual(reply["element_bytes"], 2)
        self.assertEqual(reply["model"]["fingerprint"], self.status()["model"]["fingerprint"])
        self.assertEqual(reply["model"]["moe_layers"], list(range(reply["model"]["num_layers"])))
        status = self.status()
        self.assertEqual(status["totals"]["sessions_attached"], 1)
        self.assertEqual([rank["pid"] for rank in status["ranks"]], [os.getpid()])
        self.assertEqual([job["name"] for job in status["jobs"]], ["my job"])
        self.assertGreater(status["memory_bytes"]["arenas"], 0)
        self.assertEqual(connection.call({"op": "bye"}), {"ok": True})
        self.assertTrue(connection.is_closed())
        wait_until(lambda: not self.status()["ranks"], "the session stays on the status page")
        log = process.log.read_text()
        self.assertIn(f"session 1 attached (pid {os.getpid()}, job 'my job'", log)
        self.assertIn("session 1 left", log)

    def test_a_session_ends_with_its_process_however_it_ends(self):
        process = self.start()
        self.attach().close()
        wait_until(lambda: "session 1 died" in process.log.read_text(), "a closed connection is not noticed")
        # A process that dies while a child of it still holds the connection: only the pidfd tells.
        script = (
            "import sys, os, time; sys.path.insert(0, sys.argv[1]); import harness\n"
            "c = harness.Control(sys.argv[2]); assert c.hello()['ok']\n"
            "if os.fork() == 0: time.sleep(60)\n"
            "os.kill(os.getpid(), 9)"
        )
        rank = subprocess.Popen(
            ["python3", "-B", "-c", script, os.path.dirname(__file__), self.socket_path], start_new_session=True
        )
        self.addCleanup(lambda: os.killpg(rank.pid, signal.SIGKILL))
        rank.wait(WATCHDOG_SECONDS)
        wait_until(lambda: "session 2 died" in process.log.read_text(), "the death of the process is not noticed")
        self.assertEqual(self.status()["ranks"], [])

    def test_adapters_and_joins_reach_the_engine(self):
        self.start()
        connection = self.attach()
        half = {"r": 4, "scaling": 2.0}
        create = {
            "op": "adapter_create",
            "adapter": 1,
            "layers": [0, 1],
            "gate_up": {**half, "shared_a": True},
            "down": half,
        }
        self.assertEqual(connection.call(create), {"ok": True})
        self.assertGreater(self.status()["memory_bytes"]["adapters"], 0)
        self.assertEqual(connection.call({**create, "adapter": 2}), {"ok": True})
        self.assertEqual(connection.call({"op": "adapter_delete", "adapter": 2}), {"ok": True})
        join = {"op": "join", "job_id": "j1", "name": "both", "world_size": 2, "members": [0, 1], "timeout_seconds": 50}
        other = self.attach()
        self.assertEqual(other.call({**create}), {"ok": True})
        connection.send({**join, "rank": 0})
        answer = {}
        thread = threading.Thread(target=lambda: answer.update(other.call({**join, "rank": 1})))
        thread.start()
        self.assertEqual(connection.receive(), {"ok": True, "step": 0})
        thread.join(WATCHDOG_SECONDS)
        self.assertEqual(answer, {"ok": True, "step": 0})
        self.assertEqual([job["members"] for job in self.status()["jobs"]], [[0, 1]])

    def test_a_session_for_another_model_or_protocol_is_refused(self):
        self.start()
        reply = self.connect().hello(fingerprint="0" * 64)
        self.assertEqual(reply["error"]["code"], 9)
        self.assertIn(str(self.model), reply["error"]["why"])
        self.assertEqual(self.connect().hello(protocol=2)["error"]["code"], 10)
        self.assertEqual(self.connect().hello(arena_bytes=1)["error"]["code"], 1)
        self.assertEqual(self.connect().hello(arena_bytes=1 << 60)["error"]["code"], 1)
        self.assertTrue(self.connect().hello(fingerprint=self.status()["model"]["fingerprint"])["ok"])
        self.assertEqual(self.status()["totals"]["sessions_rejected"], 4)

    @unittest.skipUnless(os.geteuid() == 0, "only root can be somebody else")
    def test_another_user_is_refused_and_counted(self):
        self.start()
        places = {self.directory: 0o755, self.runtime: 0o755, self.socket_path: 0o666}
        for place, mode in places.items():
            place.chmod(mode)
        script = (
            "import sys, os; sys.path.insert(0, sys.argv[1]); import harness\n"
            "os.setresuid(65534, 65534, 65534)\n"
            "print(harness.Control(sys.argv[2]).hello()['error']['code'])"
        )
        done = subprocess.run(
            ["python3", "-B", "-c", script, os.path.dirname(__file__), self.socket_path],
            text=True,
            capture_output=True,
            timeout=WATCHDOG_SECONDS,
            check=False,
        )
        for place, mode in reversed(places.items()):
            place.chmod(mode & 0o700)
        self.assertEqual(done.stdout, "17\n", done.stderr)
        self.assertEqual(self.status()["totals"]["sessions_rejected"], 1)


class Loading(DaemonTest):
    """With a checkpoint that takes a moment to load: zeros that are not on the disk."""

    def start_loading(self):
        model = self.sparse_checkpoint(self.directory / "large", experts=96, hidden=2048, intermediate=1024)
        process = self.start("--threads", 1, model=model, ready=False)
        wait_until(lambda: self.socket_path.exists() or process.poll() is not None, "no socket")
        return process

    def test_a_loading_daemon_answers_and_says_how_far_it_is(self):
        process = self.start_loading()
        done = self.coproc("status", "--json")
        self.assertEqual(done.returncode, 4, done.stderr + process.log.read_text())
        status = json.loads(done.stdout)
        self.assertEqual(STATUS_KEYS - status.keys(), set())
        self.assertEqual(status["state"], "loading")
        self.assertEqual(status["load"].keys(), {"bytes_done", "bytes_total", "seconds"})
        self.assertGreater(status["load"]["bytes_total"], status["load"]["bytes_done"])
        error = self.connect().hello()["error"]
        self.assertEqual(error["code"], 13)
        self.assertIn("%", error["why"])
        self.assertIn("wait --ready", error["fix"])
        self.assertEqual(self.coproc("env").returncode, 0)
        self.wait_ready(process)
        self.attach()
        self.assertEqual(self.status()["state"], "serving")

    def test_a_loading_daemon_stops_at_once(self):
        for by_signal in (True, False):
            process = self.start_loading()
            if by_signal:
                process.terminate()
            else:
                self.assertEqual(self.coproc("stop").returncode, 0)
            self.assertEqual(process.wait(WATCHDOG_SECONDS), 0, process.log.read_text())
            self.assertNotIn("serving", process.log.read_text())
            self.assertFalse(self.socket_path.exists())
            subprocess.run(["rm", "-r", self.directory / "large"], check=True)

    def test_a_load_error_ends_the_daemon_and_leaves_no_socket(self):
        process = self.start_loading()
        with open(self.directory / "large" / "model.safetensors", "r+b") as file:
            file.truncate(1 << 20)
        self.assertEqual(process.wait(WATCHDOG_SECONDS), 66, process.log.read_text())
        lines = process.log.read_text().splitlines()[-3:]
        self.assertTrue(lines[0].startswith("error: ") and "model.safetensors" in "".join(lines), lines)
        self.assertFalse(self.socket_path.exists())


class Stopping(DaemonTest):
    def test_wait_sees_a_daemon_that_starts_later(self):
        waiter = subprocess.Popen(self.command("wait", "--ready"), env=self.environment, stderr=subprocess.PIPE)
        self.addCleanup(waiter.stderr.close)
        self.addCleanup(self.kill, waiter)
        self.start()
        self.assertEqual(waiter.wait(WATCHDOG_SECONDS), 0)

    def test_sigterm_ends_an_idle_session_and_the_daemon(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            process = self.start()
            connection = self.attach()
            process.send_signal(number)
            self.assertEqual(process.wait(WATCHDOG_SECONDS), 0, process.log.read_text())
            self.assertTrue(connection.is_closed())
            # The state word of the session's segment, which its watchdog looks at, says why.
            header = os.pread(connection.descriptors[0], 4096, 0)
            self.assertEqual(int.from_bytes(header[256:260], "little"), 1)
            self.assertEqual({path.name for path in self.runtime.iterdir()}, {"kt.sock.lock"})

    def test_stop_returns_when_the_process_has_gone(self):
        process = self.start()
        self.attach()
        done = self.coproc("stop")
        self.assertEqual((done.returncode, process.wait(WATCHDOG_SECONDS)), (0, 0), done.stderr)
        self.assert_error(self.coproc("stop"), 3)

    def test_a_waiting_join_is_told_about_the_shutdown(self):
        process = self.start()
        connection = self.attach()
        connection.send({"op": "join", "job_id": "j", "rank": 0, "world_size": 2, "members": [0, 1]})
        wait_until(lambda: self.status()["ranks"], "no session")
        process.terminate()
        error = connection.receive()["error"]
        self.assertEqual(error["code"], 5)
        self.assertIn(str(process.pid), error["what"] + error["why"])
        self.assertEqual(process.wait(WATCHDOG_SECONDS), 0)

    def test_drain_waits_for_the_sessions_to_leave(self):
        process = self.start()
        first, second = self.attach(), self.attach()
        stop = subprocess.Popen(self.command("stop", "--drain"), env=self.environment, stdout=subprocess.DEVNULL)
        self.addCleanup(self.kill, stop)
        wait_until(lambda: self.coproc("status").returncode == 5, "not draining")
        self.assertEqual(self.status()["state"], "draining")
        self.assertEqual(self.connect().hello()["error"]["code"], 5)
        first.call({"op": "bye"})
        self.assertEqual(self.coproc("status").returncode, 5)
        self.assertIsNone(process.poll())
        second.close()
        self.assertEqual((stop.wait(WATCHDOG_SECONDS), process.wait(WATCHDOG_SECONDS)), (0, 0))

    def test_a_draining_daemon_can_still_be_stopped(self):
        process = self.start()
        self.attach()
        self.assertTrue(self.connect().call({"op": "stop", "drain": True})["ok"])
        self.assertEqual(self.coproc("stop").returncode, 0)
        self.assertEqual(process.wait(WATCHDOG_SECONDS), 0)

    def test_a_killed_daemon_is_noticed_and_its_socket_is_replaced(self):
        process = self.start()
        connection = self.attach()
        waiter = self.connect()
        first_id = self.status()["daemon_id"]
        self.kill(process)
        self.assertTrue(connection.is_closed() and waiter.is_closed())
        self.assertTrue(self.socket_path.exists())
        self.assert_error(self.coproc("status"), 3, "killed")
        self.start()
        self.assertNotEqual(self.status()["daemon_id"], first_id)
        self.attach()

    def test_wait_tells_a_daemon_that_goes_away(self):
        model = self.sparse_checkpoint(self.directory / "large", experts=96, hidden=2048, intermediate=1024)
        process = self.start("--threads", 1, model=model, ready=False)
        wait_until(lambda: self.coproc("status").returncode != 3, "no daemon")
        waiter = subprocess.Popen(
            self.command("wait", "--ready"), env=self.environment, stderr=subprocess.PIPE, text=True
        )
        self.addCleanup(self.kill, waiter)
        self.addCleanup(waiter.stderr.close)
        wait_until(lambda: self.has_status_page(waiter), "wait does not connect")
        self.kill(process)
        self.assertEqual(waiter.wait(WATCHDOG_SECONDS), 3)
        self.assertIn("went away", waiter.stderr.read())

    @staticmethod
    def has_status_page(process):
        with open(f"/proc/{process.pid}/maps") as maps:
            return "kt-coproc-status" in maps.read() or process.poll() is not None


if __name__ == "__main__":
    assert BINARY
    main()
