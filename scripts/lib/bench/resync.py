"""Clients during a resync, and the resync during clients, each against idle.

Each round, on one nbdmirror: the whole volume is resynced with no client; then, for each job, the clients alone, and the clients
while a whole resync runs. To begin one, a replica is failed, removed, made unknown (its superblocks zeroed) and added: everything is
copied onto space that is allocated already. Both figures of "during" are of the time in which clients and resync both ran.

Samples: "idle" has `rate` of the resync alone; each job has clients' figures alone and during, and the resync's `mb_per_s` meanwhile.
"""

import time

from . import fio
from .contenders import METADATA_BYTES, Mirror, Place
from .server import BenchError

JOBS = ["randread-4k-qd32", "randwrite-4k-qd32", "read-1m-qd8", "write-1m-qd8"]
RESYNC_S_MAX = 600
POLL_S = 0.02
# Clients run for this long before the resync begins.
LEAD_S = 0.2
WINDOW_S_MIN = 0.3


def forget(path):
    """Makes a replica blank but allocated: without superblocks it is no replica, with data that is not zero it is no hole."""
    with open(path, "rb+") as file:
        file.seek(-METADATA_BYTES, 2)
        file.write(bytes(METADATA_BYTES))


def begin(mirror):
    path = mirror.replicas[1]
    replicas = mirror.status()["volume"]["replicas"]
    slot = next(str(replica["slot"]) for replica in replicas if replica["path"] == str(path))
    mirror.tell(command="fail", replica=slot)
    mirror.tell(command="remove", replica=slot)
    forget(path)
    mirror.tell(command="add", path=str(path), force=True)


def done_bytes(mirror):
    """Bytes copied so far; None when the resync is over."""
    volume = mirror.status()["volume"]
    if volume["resync"] is None:
        if volume["health"] != "healthy":
            raise BenchError(f"the resync did not end well: the volume is {volume['health']}")
        return None
    return volume["resync"]["done_bytes"]


def wait(mirror):
    """Waits for the end of the resync; the time at which it was seen."""
    deadline = time.monotonic() + RESYNC_S_MAX
    while done_bytes(mirror) is not None:
        if time.monotonic() > deadline:
            raise BenchError(f"the resync did not end within {RESYNC_S_MAX} s")
        time.sleep(POLL_S)
    return time.monotonic()


def alone(mirror):
    """The resync's speed with no client, MB/s."""
    cpu, began = mirror.server.cpu_us(), time.monotonic()
    begin(mirror)
    took = wait(mirror) - began
    return {"mb_per_s": mirror.place.size / took / 1e6, "cpu_us_per_mib": (mirror.server.cpu_us() - cpu) / (mirror.place.size >> 20)}


def reads_and_writes(mirror):
    clients = mirror.status()["volume"]["clients"]
    return clients["reads"] + clients["writes"]


def wait_for_clients(mirror, process):
    """Until fio, which takes its time to start, has requests answered."""
    before, deadline = reads_and_writes(mirror), time.monotonic() + fio.SLACK_S
    while reads_and_writes(mirror) - before < 100:
        if process.poll() is not None or time.monotonic() > deadline:
            raise BenchError("fio did not start")
        time.sleep(POLL_S)


def watch(mirror, process, seconds):
    """Operations answered, bytes copied and the seconds that it took, while clients and resync both run."""
    wait_for_clients(mirror, process)
    begin(mirror)
    began = last = time.monotonic()
    operations_0 = operations = reads_and_writes(mirror)
    copied_0 = copied = done_bytes(mirror)
    while copied_0 is not None and process.poll() is None and time.monotonic() - began < seconds:
        time.sleep(POLL_S)
        now, now_copied, now_operations = time.monotonic(), done_bytes(mirror), reads_and_writes(mirror)
        if now_copied is None or process.poll() is not None:
            break
        copied, operations, last = now_copied, now_operations, now
    if copied_0 is None or last - began < WINDOW_S_MIN:
        raise BenchError("the resync ended too soon: give a larger --resync-size")
    return operations - operations_0, copied - copied_0, last - began


def during(mirror, job, seconds):
    """Clients' operations/s and the resync's MB/s while both run, by the daemon's own counters."""
    process = fio.start(mirror, fio.job_text(job), "--time_based", f"--runtime={int((seconds + LEAD_S) * 1000)}ms")
    try:
        operations, copied, window = watch(mirror, process, seconds)
        figures = fio.finish(process, mirror, seconds + fio.SLACK_S)
    except BaseException:
        process.kill()
        process.wait()
        raise
    wait(mirror)
    side = figures["write" if figures["write"]["total_ios"] else "read"]
    return {
        "ops_per_s": operations / window, "resync_mb_per_s": copied / window / 1e6,
        "p99_us": side["lat_ns"]["percentile"]["99.000000"] / 1000, "window_s": window,
    }


def measure(cells, backing, folder, options, say):
    place = Place(folder, options.resync_size, "unix", options.binary)
    mirror = Mirror("nbdmirror-resync", place)
    jobs = [job for job in JOBS if job in options.jobs]
    if options.quick or not options.full:
        jobs = jobs[:2]
    try:
        mirror.start()
        wait(mirror)
        fio.fill(mirror)
        for number in range(options.rounds):
            idle = alone(mirror)
            cells.add(backing, "resync", mirror.name, "no clients", idle)
            # A resync beside clients is no faster than one alone: it lasts at least that long.
            lasts = place.size / 1e6 / idle["mb_per_s"]
            seconds = max(0.5, min(options.seconds, lasts))
            for job in jobs:
                figures = {f"alone_{key}": value for key, value in fio.run(mirror, job, seconds).items()}
                figures |= during(mirror, job, seconds)
                figures["resync_alone_mb_per_s"] = idle["mb_per_s"]
                cells.add(backing, "resync", mirror.name, job, figures)
            say(f"{backing}, resync: round {number + 1} of {options.rounds} done")
    finally:
        mirror.remove()
