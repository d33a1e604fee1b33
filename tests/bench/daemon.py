"""A real kt-coproc on a checkpoint."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import machine


class Daemon:
    """Runs until stop()."""

    def __init__(self, model: Path, *options: str) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="kt-"))  # Short and 0700: it holds a socket.
        self._socket = self._directory / "kt.sock"
        self.address = f"unix:{self._socket}"
        self._log = self._directory / "log"
        with open(self._log, "wb") as log:
            command = [machine.coproc_binary(), "run", "--model", str(model), "--socket", str(self._socket), *options]
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            self._verb("wait", "--ready", "--timeout", "300")
            self.status = json.loads(self._verb("status", "--json"))
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def num_workers(self) -> int:
        return int(self.status["worker_threads"])

    def _verb(self, *arguments: str) -> str:
        command = [machine.coproc_binary(), *arguments, "--socket", str(self._socket)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=machine.TIMEOUT)
        if result.returncode != 0:
            said = (result.stderr + self._log.read_text()).strip()
            raise machine.BenchError("kt-coproc did not come up", said[-2000:], "run `kt-coproc run` by itself")
        return result.stdout

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(machine.TIMEOUT)
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()
