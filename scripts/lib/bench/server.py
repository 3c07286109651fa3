"""Programs that serve: started, waited for, ended by their own id. And what they cost.

What must hold: a server never outlives the script (the kernel kills it when the script dies), and an interrupt from the terminal
reaches the script alone, which then ends its servers in order.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
START_S_MAX = 30
STOP_S_MAX = 20
TICK_US = 1_000_000 / os.sysconf("SC_CLK_TCK")
# A process's CPU clock by its id: see clock_getcpuclockid(3), which Python does not have.
CPUCLOCK_SCHED = 2
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None, use_errno=True)


class BenchError(Exception):
    """What keeps a figure from being taken, in words for people."""


def cpu_us(pid):
    """User and system time so far of the process `pid`, in microseconds: all its threads, io-wq workers among them, also those that ended.

    That is utime + stime of /proc/PID/stat, which the kernel counts in ns and shows there in ticks of 10 ms; its CPU clock shows it in ns.
    """
    try:
        return time.clock_gettime_ns((~pid << 3) | CPUCLOCK_SCHED) / 1000
    except OSError:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) * TICK_US


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def connects(address):
    """Whether somebody listens at `address`: the path of a Unix socket, or a port of loopback."""
    is_port = isinstance(address, int)
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET if is_port else socket.AF_UNIX) as one:
        one.settimeout(1)
        one.connect(("127.0.0.1", address) if is_port else str(address))
        return True
    return False


def clients_at(address):
    """How many connections stand to a server at `address`."""
    if isinstance(address, int):
        wanted = f"0100007F:{address:04X}"
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return sum(1 for row in rows if row[1] == wanted and row[3] == "01")
    rows = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    # State 03: connected. The accepted end carries the path, the client's has none.
    return sum(1 for row in rows if row[-1] == str(address) and row[5] == "03")


def _before_exec():
    os.setsid()
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


class Server:
    """A running program that listens at `address`."""

    def __init__(self, command, address, log, environment=None):
        self.log = Path(log)
        with open(self.log, "wb") as sink:
            self.process = subprocess.Popen(
                [str(word) for word in command], stdin=subprocess.DEVNULL, stdout=sink, stderr=sink,
                preexec_fn=_before_exec, env={**os.environ, **(environment or {})})
        try:
            self._wait(address)
        except BaseException:
            self.stop()
            raise

    def _wait(self, address):
        deadline = time.monotonic() + START_S_MAX
        while not connects(address):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"does not serve: {self.log.read_text(errors='replace').strip()[-500:]}")
            time.sleep(0.01)

    @property
    def pid(self):
        return self.process.pid

    def cpu_us(self):
        return cpu_us(self.pid)

    def check(self):
        if self.process.poll() is not None:
            raise BenchError(f"ended by itself: {self.log.read_text(errors='replace').strip()[-500:]}")

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_S_MAX)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()


def target_directory():
    metadata = subprocess.run(
        ["cargo", "metadata", "--no-deps", "--format-version", "1"], cwd=ROOT, check=True, capture_output=True)
    return Path(json.loads(metadata.stdout)["target_directory"])


def release_binary():
    """Builds nbdmirror for release: its path."""
    subprocess.run(["cargo", "build", "--release", "--quiet", "--bin", "nbdmirror"], cwd=ROOT, check=True)
    return str(target_directory() / "release" / "nbdmirror")
