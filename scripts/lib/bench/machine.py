"""What the figures were taken on, and how quiet it was."""

import os
import shutil
import subprocess
import time
from pathlib import Path

from .server import ROOT

# Of all CPU time, in the moments before and after the run when nothing of it is under way.
NOISE_MAX = 0.05
WATCH_S = 1.5


def first_line(*command):
    if shutil.which(str(command[0])) is None:
        return "not installed"
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT)
    return (done.stdout or done.stderr).strip().split("\n")[0]


def cpu_model():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return os.uname().machine


def memory_bytes(which="MemTotal"):
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{which}:"))


def commit():
    try:
        short = first_line("git", "rev-parse", "--short", "HEAD")
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True).stdout
        return short + (" with changes" if changed.strip() else "")
    except OSError:
        return "unknown"


def filesystem(folder):
    kind = first_line("stat", "-f", "-c", "%T", str(folder))
    return {"ext2/ext3": "ext4"}.get(kind, kind)


def _cpu_times():
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return sum(fields) - fields[3] - fields[4], sum(fields), fields[7]


def busy(watch_s):
    """Share of all CPU time that others use now, and share that the hypervisor takes (0 to 1)."""
    busy_0, all_0, stolen_0 = _cpu_times()
    time.sleep(watch_s)
    busy_1, all_1, stolen_1 = _cpu_times()
    total = max(all_1 - all_0, 1)
    return (busy_1 - busy_0) / total, (stolen_1 - stolen_0) / total


class Watch:
    """Load and noise at the start and at the end."""

    def __init__(self, watch_s):
        self.watch_s, self.moments = watch_s, []
        self.look()

    def look(self):
        share, stolen = busy(self.watch_s)
        self.moments.append({"load_average": os.getloadavg(), "busy_share": share, "stolen_share": stolen})

    def noisy(self):
        return any(max(moment["busy_share"], moment["stolen_share"]) > NOISE_MAX for moment in self.moments)

    def lines(self):
        words = [
            f"load average {moment['load_average'][0]:.2f} (1 min) {moment['load_average'][1]:.2f} (5 min), others use "
            f"{moment['busy_share']:.0%} of the CPU, stolen {moment['stolen_share']:.0%}" for moment in self.moments
        ]
        lines = [("noise at the start", words[0]), ("noise at the end", words[-1] if len(words) > 1 else "not looked at")]
        if self.noisy():
            lines.append(("**NOT QUIET**", "others used this machine: throughput and latency are understated; take the ratios with care"))
        return lines


def header(binary, names):
    """(what, value) rows about machine and versions; `names` are the contenders wanted."""
    uname = os.uname()
    versions = {"nbdmirror": (binary, "--version"), "qemu-quorum": ("qemu-storage-daemon", "--version"),
                "nbdkit": ("nbdkit", "--version"), "qemu-nbd": ("qemu-nbd", "--version")}
    rows = [
        ("date", time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())),
        ("machine", f"{cpu_model()}, {len(os.sched_getaffinity(0))} cores, {memory_bytes() / (1 << 30):.0f} GiB"),
        ("kernel", f"{uname.sysname} {uname.release} {uname.machine}"),
        ("commit", commit()),
    ]
    rows += [(name, first_line(*command)) for name, command in versions.items() if name in names]
    return [*rows, ("fio", first_line("fio", "--version")), ("libnbd", first_line("nbdinfo", "--version"))]
