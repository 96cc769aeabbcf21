"""The peer: llama.cpp's server, which begins a request as another one ends.

The client stands outside the control group. It sends the longest answers first, and never more
than fit in the cache: the server fails all requests at once when a shared cache overflows.
"""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from contest import Attempt
from drawn_job import DrawnJob
from job_bench import JobBench
from llama_cpp import build_tool, version_of
from workload_run import Runs, say

from profiles.errors import RunError

SERVER = "llama-server"
# Sequences at once, and the part of the limit that the cache takes.
SETTINGS = ((16, 0.25), (32, 0.25), (32, 0.5), (64, 0.5), (8, 0.25))
# Sequences at once that each have a cache of their own, as long as the longest one.
APART = (8, 16, 32)
MOST_APART = 0.6
# Slots of the cache come in such numbers.
CHUNK = 256
START_S, POLL_S = 1800.0, 0.2
MOST_FAILURES = 20


@dataclass(slots=True, kw_only=True)
class LlamaServer:
    """The server; ``tool`` is built from the package's source where none is given."""

    runs: Runs
    job: DrawnJob
    tool: Path | None = None
    chosen: Mapping[str, Any] | None = None
    name: str = "llama.cpp-server"

    def why_not(self) -> str | None:
        """Say what llama.cpp itself refuses, before minutes of building."""
        return "llama.cpp has no OPT" if self.runs.bench.model.family == "opt" else None

    @property
    def model(self) -> Path:
        """The file that is run."""
        return self.runs.bench.checkpoint / "model-words.gguf"

    def prepare(self) -> None:
        """Build the server and write the model, unless they are there."""
        if find_spec("gguf") is None:
            raise RunError("the package gguf is missing; try: pip install '.[bench]'")
        if self.tool is None:
            self.tool = build_tool(self.runs.bench.folder, SERVER)
        if not self.model.exists():
            from gguf_file import write_gguf  # needs the package that was just asked for

            say("writing the model as GGUF")
            bench = self.runs.bench
            write_gguf(bench.checkpoint, bench.model, self.model, has_words=True)

    def settings(self) -> Sequence[Mapping[str, Any]]:
        """List what may be fastest within the limit."""
        if self.chosen is not None:
            return [self.chosen]
        bench, longest = self.runs.bench, self.job.longest_context
        assert isinstance(bench, JobBench)
        room = bench.limit_bytes // bench.token_bytes
        found = [
            {"parallel": n, "context": _rounded(max(longest, int(share * room))), "unified": True}
            for n, share in SETTINGS
        ]
        apart = [(n, n * _rounded(longest)) for n in APART]
        found += [
            {"parallel": n, "context": tokens, "unified": False}
            for n, tokens in apart
            if tokens <= MOST_APART * room
        ]
        return found

    def run(self, setting: Mapping[str, Any], timeout_s: float) -> Attempt:
        """Run the job, or as much of it as is done within ``timeout_s``."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        client = JobClient(
            job=self.job,
            port=port,
            parallel=setting["parallel"],
            room=setting["context"] if setting["unified"] else None,
            limit_s=timeout_s,
        )
        threads = str(self.runs.num_threads)
        ended = self.runs.limited(
            self.name,
            str(self.tool),
            *("-m", str(self.model), "--host", "127.0.0.1", "--port", str(port)),
            *("-c", str(setting["context"]), "-np", str(setting["parallel"])),
            "--kv-unified" if setting["unified"] else "--no-kv-unified",
            *("-b", "2048", "-ub", str(setting.get("ubatch", 512))),
            *("-t", threads, "-tb", threads, "--cache-ram", "0"),
            timeout_s=60.0,
            drive=client.drive,
        )
        if not client.num_tokens or client.failure is not None:
            say(f"  {client.failure or 'no token'}")
            return Attempt(ended=ended)
        figures = {
            "run_s": client.run_s,
            "tok_per_s": client.num_tokens / client.run_s,
            "tokens": client.num_tokens,
            "is_part": client.num_tokens < self.job.num_tokens,
            "failed_requests": client.num_failed,
            "process_s": ended.wall_s,
            "cgroup_peak_bytes": ended.peak_bytes,
        }
        return Attempt(ended=ended, figures=figures)

    def version(self) -> str:
        """Ask the server; it knows nothing of the package that its source came in."""
        return version_of(self.tool)


@dataclass(kw_only=True)
class JobClient:
    """Sends the requests of a job, and counts the tokens of the answers.

    Parameters
    ----------
    parallel
        Most requests at once.
    room
        Tokens of the cache that all requests at work share; ``None`` where each has its own.
    limit_s
        Seconds after which it stops.
    """

    job: DrawnJob
    port: int
    parallel: int
    room: int | None
    limit_s: float
    num_tokens: int = 0
    num_failed: int = 0
    run_s: float = 0.0
    failure: str | None = None
    _at_work: dict[int, int] = field(default_factory=dict)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _is_stopped: bool = False

    def drive(self, server: subprocess.Popen[bytes]) -> None:
        """Wait for the server, run the job, and return when it is done or the time is up."""
        if not self._wait_for(server):
            self.failure = "the server did not start"
            return
        start = time.perf_counter()
        answers = self.job.answers
        left = sorted(range(len(answers)), key=lambda i: -answers[i])
        with self._changed:
            while left or self._at_work:
                if time.perf_counter() - start > self.limit_s or server.poll() is not None:
                    break
                if self.num_failed > MOST_FAILURES:
                    self.failure = f"{self.num_failed} requests failed"
                    break
                number = next((i for i in left if self._has_room(i)), None)
                if number is None:
                    self._changed.wait(POLL_S)
                    continue
                left.remove(number)
                self._at_work[number] = self._need(number)
                threading.Thread(target=self._ask, args=(number, left), daemon=True).start()
            self._is_stopped = True
            self.run_s = time.perf_counter() - start
            if server.poll() is not None:
                self.failure = f"the server ended with status {server.returncode}"

    def _need(self, number: int) -> int:
        return len(self.job.prompts[number]) + self.job.answers[number]

    def _has_room(self, number: int) -> bool:
        if len(self._at_work) >= self.parallel:
            return False
        return self.room is None or sum(self._at_work.values()) + self._need(number) <= self.room

    def _wait_for(self, server: subprocess.Popen[bytes]) -> bool:
        start = time.perf_counter()
        while time.perf_counter() - start < START_S and server.poll() is None:
            with suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return True
            time.sleep(POLL_S)
        return False

    def _ask(self, number: int, left: list[int]) -> None:
        """Send one request, and read its answer token by token; a failed one is sent again."""
        done = 0
        try:
            for tokens in self._answer(number):
                with self._changed:
                    if self._is_stopped:
                        return
                    self.num_tokens += tokens
                done += tokens
        except (OSError, http.client.HTTPException, ValueError):
            pass
        with self._changed:
            if self._is_stopped:
                return
            if done != self.job.answers[number]:
                self.num_failed += 1
                self.num_tokens -= done
                left.append(number)
            del self._at_work[number]
            self._changed.notify()

    def _answer(self, number: int) -> Iterator[int]:
        """Yield how many tokens came, as they come."""
        asked = {
            "prompt": list(self.job.prompts[number]),
            "n_predict": self.job.answers[number],
            "ignore_eos": True,
            "temperature": 0,
            "samplers": ["top_k"],
            "top_k": 1,
            "return_tokens": True,
            "stream": True,
        }
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/completion", json.dumps(asked), headers)
        response = connection.getresponse()
        told = 0
        for line in response:
            if not line.startswith(b"data: "):
                continue
            event = json.loads(line[6:])
            if event.get("stop"):
                # Pieces of a character are held back, and this number has them.
                yield event["tokens_predicted"] - told
                return
            count = len(event.get("tokens", []))
            told += count
            yield count


def _rounded(tokens: int) -> int:
    return -(-tokens // CHUNK) * CHUNK
