"""Hostile and clumsy control connections beside a healthy session, which must notice nothing."""

import os
import time

from harness import ARENA_BYTES, Control, DaemonTest, main, wait_until

HELLO = {"op": "hello", "protocol": 1, "pid": 1, "arena_bytes": ARENA_BYTES}
HALF = {"r": 4, "scaling": 1.0}
CREATE = {"op": "adapter_create", "adapter": 1, "layers": [0], "gate_up": {**HALF, "shared_a": False}, "down": HALF}
JOIN = {"op": "join", "job_id": "j", "name": "n", "rank": 0, "world_size": 1, "members": [0]}


def without(packet, key):
    return {k: v for k, v in packet.items() if k != key}


MALFORMED = [
    b"garbage",
    b"\xff\x00\xfe",
    b"{",
    b"[]",
    b"5",
    b"null",
    b'"op"',
    b"{}",
    b'{"op":5}',
    b'{"op":""}',
    b'{"op":"root"}',
    b"[" * 4096,
    b'{"op":"hello"' + b" " * 5000,
    b'{"op":"status","x":"' + b"a" * 4096 + b'"}',
    b'{"ok":true}',
    b'{"op":"status"}{"op":"status"}',
]
MALFORMED_HELLOS = [
    {"op": "hello"},
    without(HELLO, "protocol"),
    without(HELLO, "arena_bytes"),
    {**HELLO, "arena_bytes": "1"},
    {**HELLO, "arena_bytes": -1},
    {**HELLO, "arena_bytes": 1.5e6},
    {**HELLO, "protocol": None},
    {**HELLO, "fingerprint": 5},
    {**HELLO, "name": ["x"]},
    {**HELLO, "protocol": 10**30},
]
MALFORMED_IN_A_SESSION = [
    HELLO,
    {"op": "adapter_create"},
    {**CREATE, "adapter": -1},
    {**CREATE, "adapter": 2**32},
    {**CREATE, "layers": 0},
    {**CREATE, "layers": [0, "1"]},
    {**CREATE, "gate_up": 4},
    {**CREATE, "gate_up": {"r": 4}},
    {**CREATE, "gate_up": {**HALF, "r": 1.5}},
    {**CREATE, "down": {**HALF, "scaling": "1"}},
    {**CREATE, "down": {**HALF, "scaling": 1e300}},
    {**CREATE, "gate_up": {**HALF, "shared_a": 1}},
    {"op": "adapter_delete"},
    {"op": "adapter_delete", "adapter": "1"},
    {"op": "join"},
    {**JOIN, "rank": -1},
    {**JOIN, "members": None},
    {**JOIN, "members": [0.5]},
    {**JOIN, "job_id": 1},
    {**JOIN, "timeout_seconds": -1},
    {**JOIN, "timeout_seconds": "1"},
    {"op": "stop", "drain": 1},
]
REFUSED_IN_A_SESSION = [
    {**CREATE, "adapter": 0},
    {**CREATE, "layers": []},
    {**CREATE, "layers": [0, 0]},
    {**CREATE, "layers": [99]},
    {**CREATE, "layers": [2**32 - 1]},
    {**CREATE, "gate_up": {**HALF, "r": 100000}},
    {"op": "adapter_delete", "adapter": 5},
    {**JOIN, "job_id": ""},
    {**JOIN, "job_id": "x" * 64},
    {**JOIN, "members": []},
    {**JOIN, "members": [1]},
    {**JOIN, "members": [0, 0]},
    {**JOIN, "members": [0, 1]},
    {**JOIN, "world_size": 0},
]


class Connections(DaemonTest):
    """One daemon for all: what one test does to it, the next one must not notice."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.shared = cls("healthy")
        cls.shared.setUp()
        cls.process = cls.shared.start()
        cls.session = cls.shared.attach(name="healthy")

    @classmethod
    def tearDownClass(cls):
        cls.shared.doCleanups()
        super().tearDownClass()

    def healthy(self):
        """The healthy session still gets answers, and is the only one."""
        self.assertIsNone(self.process.poll(), self.process.log.read_text())
        self.assertEqual(self.session.call({"op": "status"})["ok"], True)
        self.assertEqual([rank["pid"] for rank in self.shared.status()["ranks"]], [os.getpid()])

    def setUp(self):
        super().setUp()
        self.socket_path = self.shared.socket_path
        self.addCleanup(self.settle)

    def settle(self):
        wait_until(lambda: len(self.shared.status()["ranks"]) == 1, "sessions stay")
        self.healthy()

    def assert_ends(self, connection, packet):
        """The packet is answered with kInvalidArgument, if at all, and the connection ends."""
        reply = connection.call(packet)
        if reply is not None:
            self.assertEqual((reply["ok"], reply["error"]["code"]), (False, 1), packet)
            self.assertTrue(connection.is_closed(), packet)

    def test_malformed_packets_end_their_connection_only(self):
        for packet in MALFORMED + MALFORMED_HELLOS:
            with self.subTest(packet=packet):
                self.assert_ends(self.connect(), packet)
        self.assertIn("malformed control packet", self.process.log.read_text())

    def test_malformed_packets_end_their_session(self):
        for packet in MALFORMED_IN_A_SESSION + MALFORMED[:3]:
            with self.subTest(packet=packet):
                self.assert_ends(self.attach(), packet)

    def test_requests_that_make_no_sense_are_refused_and_the_session_goes_on(self):
        session = self.attach()
        for packet in REFUSED_IN_A_SESSION:
            with self.subTest(packet=packet):
                reply = session.call(packet)
                self.assertEqual(reply["ok"], False, packet)
                self.assertTrue(all(reply["error"][field] for field in ("what", "why", "fix")))
        self.assertEqual(session.call(CREATE), {"ok": True})

    def test_what_needs_a_session_is_refused_without_one(self):
        for packet in (CREATE, JOIN, {"op": "adapter_delete", "adapter": 1}):
            self.assert_ends(self.connect(), packet)
        connection = self.connect()
        self.assertEqual(connection.call({"op": "bye"}), {"ok": True})
        self.assertTrue(connection.is_closed())

    def test_descriptors_that_nobody_asked_for_end_the_connection(self):
        before = len(os.listdir(f"/proc/{self.process.pid}/fd"))
        with open("/dev/null", "rb") as null:
            for count in (1, 4, 5, 200):
                connection = self.connect()
                connection.send({"op": "status"}, [null.fileno()] * count)
                reply = connection.receive()
                self.assertTrue(reply is None or reply["error"]["code"] == 1)
        wait_until(lambda: len(os.listdir(f"/proc/{self.process.pid}/fd")) <= before, "descriptors leak")

    def test_names_are_made_fit_for_logs_and_monitors(self):
        name = "a\nb\x1b[2J" + "ü" * 200
        session = self.attach(name=name)
        jobs = [job for job in self.shared.status()["jobs"] if job["name"].startswith("a ")]
        self.assertLess(len(jobs[0]["name"].encode()), 64)
        self.assertNotIn("\x1b", jobs[0]["name"] + self.process.log.read_text())
        session.close()

    def test_silent_connections_do_not_keep_others_waiting(self):
        silent = [self.connect() for _ in range(60)]
        self.attach().close()
        self.healthy()
        for connection in silent[:30]:
            connection.close()
        self.attach().close()

    def test_the_number_of_connections_is_limited(self):
        connections = []
        for _ in range(600):
            try:
                connections.append(Control(self.socket_path))
            except OSError:
                break
        self.assertEqual(self.session.call({"op": "status"})["ok"], True)
        for connection in connections:
            connection.close()
        self.assertIn("512 are open", self.process.log.read_text())

    def test_a_peer_that_never_reads_is_dropped(self):
        connection = self.connect()
        connection.socket.setblocking(False)
        sent = 0
        deadline = time.monotonic() + 30
        try:
            while time.monotonic() < deadline:
                try:
                    connection.send({"op": "status"})
                    sent += 1
                except BlockingIOError:
                    time.sleep(0.01)
        except (BrokenPipeError, ConnectionResetError):
            pass
        self.assertGreater(sent, 10)
        self.assertLess(time.monotonic(), deadline, "it may send for ever")

    def test_a_flood_of_packets_is_answered_in_order_and_others_get_their_turn(self):
        flood = self.connect()
        for _ in range(5):
            for _ in range(50):
                self.assertTrue(flood.call({"op": "status"})["ok"])
            self.healthy()
        self.assertTrue(self.attach().call({"op": "bye"})["ok"])

    def test_packets_sent_before_the_answer_wait_for_their_turn(self):
        connection = self.connect()
        for packet in (HELLO, CREATE, {"op": "status"}, {"op": "bye"}):
            connection.send(packet)
        replies = [connection.receive() for _ in range(4)]
        self.assertTrue(all(reply and reply["ok"] for reply in replies), replies)
        self.assertIn("session_id", replies[0])
        self.assertTrue(connection.is_closed())

    def test_a_bye_right_before_the_end_counts(self):
        before = self.process.log.read_text().count(" left (")
        session = self.attach()
        session.send({"op": "bye"})
        session.close()
        wait_until(lambda: self.process.log.read_text().count(" left (") == before + 1, "it counts as a death")

    def test_a_connection_that_goes_away_while_it_is_served_is_cleaned_up(self):
        for _ in range(20):
            connection = self.connect()
            connection.send({**HELLO, "arena_bytes": 64 << 20})
            connection.close()
        session = self.attach()
        session.send({**JOIN, "members": [0, 1], "world_size": 2})
        session.close()


if __name__ == "__main__":
    main()
