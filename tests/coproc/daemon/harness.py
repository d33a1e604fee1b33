"""Real kt-coproc processes for tests: a tiny checkpoint, daemons, raw control connections.

The binaries come from the environment: KT_COPROC_BINARY and KT_MAKE_CHECKPOINT, set by CMakeLists.txt.
"""

import array
import contextlib
import json
import math
import os
import pathlib
import signal
import socket
import struct
import subprocess
import tempfile
import time
import unittest

BINARY = os.environ["KT_COPROC_BINARY"]
MAKE_CHECKPOINT = os.environ["KT_MAKE_CHECKPOINT"]
WATCHDOG_SECONDS = 60  # A process that takes longer hangs: no test needs a fraction of it.
ARENA_BYTES = 1 << 20


def wait_until(condition, what):
    """Returns the first true value of `condition()`; fails when the watchdog's time has passed."""
    deadline = time.monotonic() + WATCHDOG_SECONDS
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"hangs: {what}")
        time.sleep(0.01)


class Control:
    """A raw control connection: any bytes can be sent."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.connect(str(path))  # Before the timeout, which would make a full backlog an error.
        self.socket.settimeout(WATCHDOG_SECONDS)
        self.descriptors = []

    def send(self, packet, descriptors=()):
        data = packet if isinstance(packet, bytes) else json.dumps(packet).encode()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        self.socket.sendmsg([data], rights)

    def receive(self):
        """The next packet as an object; None when the daemon has closed the connection."""
        try:
            data, ancillary, _, _ = self.socket.recvmsg(4096, socket.CMSG_SPACE(64))
        except ConnectionResetError:
            return None
        for _, _, rights in ancillary:
            self.descriptors.extend(array.array("i", rights))
        return json.loads(data) if data else None

    def call(self, packet):
        self.send(packet)
        return self.receive()

    def hello(self, **changes):
        return self.call({"op": "hello", "protocol": 1, "pid": os.getpid(), "arena_bytes": ARENA_BYTES, **changes})

    def is_closed(self):
        return self.receive() is None

    def close(self):
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors = []
        self.socket.close()


class DaemonTest(unittest.TestCase):
    """Every test has a directory of its own, an environment without our variables, and leaves no process."""

    maxDiff = None

    @classmethod
    def setUpClass(cls):
        cls.class_directory = tempfile.TemporaryDirectory(prefix="kt-")
        cls.model = pathlib.Path(cls.class_directory.name) / "model"
        subprocess.run([MAKE_CHECKPOINT, cls.model], check=True, timeout=WATCHDOG_SECONDS)

    @classmethod
    def tearDownClass(cls):
        cls.class_directory.cleanup()

    def setUp(self):
        directory = tempfile.TemporaryDirectory(prefix="kt-")
        self.addCleanup(directory.cleanup)
        self.directory = pathlib.Path(directory.name)
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("KT_COPROC")}
        self.environment["XDG_RUNTIME_DIR"] = str(self.directory)
        self.environment["XDG_CACHE_HOME"] = str(self.directory / "caches")
        self.runtime = self.directory / "kt-coproc"
        self.socket_path = self.runtime / "kt.sock"

    @staticmethod
    def sparse_checkpoint(directory, experts, hidden, intermediate):
        """A checkpoint of one layer whose weights are all zero: it takes no space on disk, whatever its size."""
        directory.mkdir()
        (directory / "config.json").write_text(
            json.dumps(
                {
                    "architectures": ["Qwen3MoeForCausalLM"],
                    "model_type": "qwen3_moe",
                    "num_hidden_layers": 1,
                    "num_experts": experts,
                    "num_experts_per_tok": 1,
                    "hidden_size": hidden,
                    "moe_intermediate_size": intermediate,
                    "hidden_act": "silu",
                }
            )
        )
        gate_up, down = [experts, 2 * intermediate, hidden], [experts, hidden, intermediate]
        middle, end = 2 * math.prod(gate_up), 2 * (math.prod(gate_up) + math.prod(down))
        header = json.dumps(
            {
                "model.layers.0.mlp.experts.gate_up_proj": {
                    "dtype": "BF16",
                    "shape": gate_up,
                    "data_offsets": [0, middle],
                },
                "model.layers.0.mlp.experts.down_proj": {"dtype": "BF16", "shape": down, "data_offsets": [middle, end]},
            }
        ).encode()
        with open(directory / "model.safetensors", "wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + end)
        return directory

    def command(self, *arguments):
        return [BINARY, *map(str, arguments)]

    def coproc(self, *arguments, **variables):
        """Runs kt-coproc to its end."""
        return subprocess.run(
            self.command(*arguments),
            env={**self.environment, **variables},
            text=True,
            capture_output=True,
            timeout=WATCHDOG_SECONDS,
            cwd=self.directory,
            check=False,
        )

    def start(self, *flags, model=None, ready=True, **variables):
        """Starts a daemon. Its log is `process.log`, a file."""
        log = self.directory / f"daemon-{time.monotonic_ns()}.log"
        with open(log, "wb") as stream:
            process = subprocess.Popen(
                self.command("run", "--model", model or self.model, *flags),
                cwd=self.directory,
                env={**self.environment, **variables},
                stdin=subprocess.DEVNULL,
                stderr=stream,
            )
        process.log = log
        self.addCleanup(self.kill, process)
        if ready:
            self.wait_ready(process)
        return process

    def wait_ready(self, process, *flags):
        waited = self.coproc("wait", "--ready", "--timeout", WATCHDOG_SECONDS, *flags)
        self.assertEqual(waited.returncode, 0, waited.stderr + process.log.read_text())

    @staticmethod
    def kill(process):
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        process.wait(WATCHDOG_SECONDS)

    def connect(self, path=None):
        connection = Control(path or self.socket_path)
        self.addCleanup(connection.close)
        return connection

    def attach(self, **changes):
        connection = self.connect()
        reply = connection.hello(**changes)
        self.assertTrue(reply and reply.get("ok"), reply)
        return connection

    def status(self):
        return json.loads(self.coproc("status", "--json").stdout)

    def assert_error(self, done, code, *parts):
        """The exit code, and standard error ends with exactly the three lines, holding `parts`."""
        self.assertEqual(done.returncode, code, done.stderr)
        lines = done.stderr.splitlines()[-3:]
        self.assertEqual(len(lines), 3, done.stderr)
        for line, start in zip(lines, ("error: ", "  why: ", "  fix: ")):
            self.assertTrue(line.startswith(start) and len(line) > len(start), done.stderr)
        self.assertEqual(sum(line.startswith("error: ") for line in done.stderr.splitlines()), 1, done.stderr)
        for part in parts:
            self.assertIn(str(part), "\n".join(lines))


def main():
    unittest.main(verbosity=2)
