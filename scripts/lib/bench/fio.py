"""One run of one job of benches/fio, and its figures.

fio is called as docs/performance.md shows it: target, time and size as options, and the job file as it is shipped.
"""

import json
import subprocess
import time

from .server import ROOT, BenchError, clients_at

JOBS_FOLDER = ROOT / "benches" / "fio"
SLACK_S = 120
PERCENTILES = {"p50_us": "50.000000", "p99_us": "99.000000", "p999_us": "99.900000"}
FILL = "[fill]\nrw=write\nbs=1M\niodepth=4\nend_fsync=1\n"


def job_names():
    return sorted(path.stem for path in JOBS_FOLDER.glob("*.fio"))


def job_text(job):
    return (JOBS_FOLDER / f"{job}.fio").read_text()


def connections_of(text):
    return next((int(line.split("=")[1]) for line in text.splitlines() if line.startswith("numjobs=")), 1)


def start(contender, text, *options):
    job = contender.folder / "job.fio"
    job.write_text(contender.job_text(text))
    # Latency is from the submission to the end: an engine that sends within its submission has no advantage.
    command = ["fio", "--output-format=json", "--eta=never", "--disk_util=0", "--lat_percentiles=1", "--clat_percentiles=0",
               "--percentile_list=50:99:99.9", f"--aux-path={contender.folder}", *contender.fio_options(), *options, str(job)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process, contender, timeout_s):
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except BaseException:
        process.kill()
        process.wait()
        raise
    if process.returncode != 0 or "{" not in stdout:
        raise BenchError(f"fio on {contender.name}: {stdout[-500:]}{stderr[-500:]}")
    # fio may print notes before its JSON.
    jobs = json.loads(stdout[stdout.index("{"):])["jobs"]
    if len(jobs) != 1 or jobs[0]["error"]:
        raise BenchError(f"fio on {contender.name}: {len(jobs)} groups, error {jobs[0]['error']}")
    return jobs[0]


def fill(contender):
    """Writes the whole volume, with data that is not zero."""
    finish(start(contender, FILL), contender, 3600)


def check_connections(contender, wanted, until):
    """Sees that `wanted` connections stand at the same time, before the time `until`."""
    seen = 0
    while seen < wanted and time.monotonic() < until:
        seen = max(seen, clients_at(contender.address))
        time.sleep(0.02)
    if seen != wanted:
        raise BenchError(f"{contender.name}: {seen} connections instead of {wanted}")


def run(contender, job, seconds, extra=()):
    """One cell: operations/s, bytes/s, latencies in us, the server's CPU in us for each operation (None without a server)."""
    text = job_text(job)
    connections = connections_of(text)
    before = contender.server.cpu_us() if contender.server else None
    process = start(contender, text, "--time_based", f"--runtime={int(seconds * 1000)}ms", *extra)
    try:
        if contender.server and connections > 1:
            check_connections(contender, connections, time.monotonic() + seconds + SLACK_S / 2)
    except BaseException:
        process.kill()
        process.communicate()
        raise
    result = finish(process, contender, seconds + SLACK_S)
    return sample(contender, result, before)


def sample(contender, result, before):
    sides = [(is_write, result["write" if is_write else "read"]) for is_write in (False, True)]
    operations = sum(contender.operations(is_write, side["total_ios"]) for is_write, side in sides)
    if operations == 0:
        raise BenchError(f"fio on {contender.name} did nothing")
    is_write, main = max(sides, key=lambda pair: pair[1]["total_ios"])
    figures = {
        "ops_per_s": sum(contender.operations(is_write, side["iops"]) for is_write, side in sides),
        "mb_per_s": sum(contender.operations(is_write, side["bw_bytes"]) for is_write, side in sides) / 1e6,
        "cpu_us_per_op": None,
    }
    for name, percentile in PERCENTILES.items():
        figures[name] = main["lat_ns"]["percentile"][percentile] / 1000
    if before is not None:
        contender.server.check()
        figures["cpu_us_per_op"] = (contender.server.cpu_us() - before) / operations
    return figures
