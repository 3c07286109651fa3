"""The write-intent bitmap on against off: 4 KiB random writes from a cold start, in which every region's bit must be set first, to the
steady state, in which all are set. Off is a hidden switch of `serve` that gives the data's safety away.

Two kinds of volume, on and off in turn:
- "sparse": 10 GiB on sparse files of a tmpfs, new for every sample (10 GiB twice would not fit most machines' memory). A first write to a
  block also costs the kernel a new page, on and off alike, which makes the bitmap's share look smaller.
- "written": as many regions as those 10 GiB have, but of 64 KiB, and written in full before: the bitmap's worst case. The bits
  are cleared between the samples: it waits until none is set.
"""

import os
import time

from . import fio
from .contenders import Mirror, Place
from .machine import memory_bytes
from .server import BenchError

JOB = "randwrite-4k-qd32"
SPARSE_BYTES = 10 << 30
REGION_BYTES, SMALL_REGION_BYTES = 1 << 20, 64 << 10
WRITTEN_BYTES = SPARSE_BYTES // REGION_BYTES * SMALL_REGION_BYTES
# Of memory and of the tmpfs, for the two replicas of a sparse volume.
MEMORY_SHARE = 0.6
MEMORY_BYTES_MIN = 2 << 30
CLEAN_S_MAX = 60
LOG_MS = 250
NAMES = {False: "bitmap on", True: "bitmap off"}


def room(folder):
    """Bytes that each of two sparse replicas may grow by."""
    free = os.statvfs(folder)
    return int(min(memory_bytes("MemAvailable"), free.f_bavail * free.f_frsize) * MEMORY_SHARE / 2)


def intervals(mirror):
    """Operations/s in each LOG_MS of the job that ran last."""
    lines = (mirror.folder / "log_iops.log").read_text().splitlines()
    return [int(line.split(",")[1]) for line in lines]


def measure_once(mirror, seconds, io_bytes):
    log = mirror.folder / "log"
    options = [f"--write_iops_log={log}", f"--log_avg_msec={LOG_MS}", "--per_job_logs=0"]
    if io_bytes:
        options += [f"--io_size={io_bytes}"]
    figures = run_cold(mirror, seconds, options, timed=not io_bytes)
    series = intervals(mirror)
    figures["cold_ops_per_s"] = series[0]
    steady = series[len(series) // 2:]
    figures["steady_ops_per_s"] = sum(steady) / len(steady)
    figures["series_ops_per_s"] = series
    return figures


def run_cold(mirror, seconds, options, timed):
    """As fio.run, but a run that is bounded in bytes is not `time_based`: that would begin anew."""
    if timed:
        return fio.run(mirror, JOB, seconds, options)
    before = mirror.server.cpu_us()
    process = fio.start(mirror, fio.job_text(JOB), f"--runtime={int(seconds * 1000)}ms", *options)
    return fio.sample(mirror, fio.finish(process, mirror, seconds + fio.SLACK_S), before)


def sparse_sample(folder, binary, off, seconds, io_bytes):
    mirror = Mirror("nbdmirror-bitmap-" + ("off" if off else "on"), Place(folder, SPARSE_BYTES, "unix", binary), without_bitmap=off)
    try:
        mirror.start()
        return measure_once(mirror, seconds, io_bytes)
    finally:
        mirror.remove()


def measure_sparse(cells, backing, folder, options, seconds, say):
    io_bytes = room(folder)
    if io_bytes < MEMORY_BYTES_MIN // 2:
        say(f"left out: bitmap, sparse: {io_bytes >> 20} MiB for each replica are too few")
        return
    say(f"{backing}, bitmap, sparse: volume of {SPARSE_BYTES >> 30} GiB; each sample ends after {seconds:.0f} s or {io_bytes / (1 << 30):.1f} GiB written")
    for number in range(options.rounds):
        for off in (False, True) if number % 2 == 0 else (True, False):
            cells.add(backing, "bitmap", NAMES[off], "sparse 10 GiB", sparse_sample(folder, options.binary, off, seconds, io_bytes))
        say(f"{backing}, bitmap, sparse: round {number + 1} of {options.rounds} done")


def wait_until_clean(mirror):
    deadline = time.monotonic() + CLEAN_S_MAX
    while mirror.status()["volume"]["dirty_bytes"] > 0:
        if time.monotonic() > deadline:
            raise BenchError(f"intent bits were not cleared within {CLEAN_S_MAX} s")
        time.sleep(0.1)


class SmallRegions(Mirror):
    def command(self):
        command = super().command()
        at = command.index("--create")
        return [*command[:at], "--region-size", str(SMALL_REGION_BYTES), *command[at:]]


def measure_written(cells, backing, folder, options, seconds, say):
    place = Place(folder, WRITTEN_BYTES, "unix", options.binary)
    mirrors = [SmallRegions("nbdmirror-written-on", place), SmallRegions("nbdmirror-written-off", place, without_bitmap=True)]
    try:
        for mirror in mirrors:
            mirror.start()
            fio.fill(mirror)
        for number in range(options.rounds):
            for mirror in mirrors if number % 2 == 0 else mirrors[::-1]:
                wait_until_clean(mirror)
                figures = measure_once(mirror, seconds, None)
                cells.add(backing, "bitmap", NAMES[mirror.without_bitmap], f"written, {WRITTEN_BYTES >> 20} MiB", figures)
            say(f"{backing}, bitmap, written: round {number + 1} of {options.rounds} done")
    finally:
        for mirror in mirrors:
            mirror.remove()


def measure(cells, backing, folder, options, say):
    # Long enough that the steady state is most of it.
    seconds = max(5.0, options.seconds * 3)
    if backing == "tmpfs":
        measure_sparse(cells, backing, folder, options, seconds, say)
    measure_written(cells, backing, folder, options, seconds, say)
