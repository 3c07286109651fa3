"""What is wanted of nbdmirror, as ratios to others in the same run; and whether it is so.

Each target is a ratio of two cells' figures, taken within each round; the verdict is about the median. "Not in every round" is said where the spread
is on both sides of what is wanted.
"""

import os
from dataclasses import dataclass

from .bitmap import NAMES as BITMAP
from .figures import number, of, ratio

MIRROR, KIT, QUORUM = "nbdmirror", "nbdkit", "qemu-quorum"
CORES_FOR_MORE = 4


@dataclass
class Target:
    """`job` on `contender` against `other_job` on `other`: `metric` is at least (or at most) `wanted` times the other's."""

    what: str
    metric: str
    job: str
    other: str
    wanted: float
    at_most: bool = False
    backing: str = "tmpfs"
    section: str = "unix"
    contender: str = MIRROR
    other_job: str = ""
    other_metric: str = ""

    def measured(self, cells):
        mine = cells.get(self.backing, self.section, self.contender, self.job)
        other = cells.get(self.backing, self.section, self.other, self.other_job or self.job)
        return ratio(mine, other, self.metric, self.other_metric or None)

    def met(self, value):
        return value <= self.wanted if self.at_most else value >= self.wanted


def of_throughput():
    rows = [
        ("4 KiB random read, depth 32", "randread-4k-qd32", [(QUORUM, 3.0), (KIT, 1.3)]),
        ("4 KiB random write, depth 32", "randwrite-4k-qd32", [(QUORUM, 3.0), (KIT, 0.9)]),
        ("4 KiB random read, depth 1", "randread-4k-qd1", [(KIT, 1.0)]),
        ("4 KiB random write, depth 1", "randwrite-4k-qd1", [(KIT, 0.9)]),
        ("1 MiB sequential read, depth 8", "read-1m-qd8", [(KIT, 1.1), (QUORUM, 2.0)]),
        ("1 MiB sequential write, depth 8", "write-1m-qd8", [(KIT, 0.9), (QUORUM, 2.0)]),
    ]
    return [Target(what, "ops_per_s", job, other, wanted) for what, job, peers in rows for other, wanted in peers]


def of_cost_and_latency():
    cpu, slowest = "cpu_us_per_op", "p999_us"
    return [
        Target("server CPU per 4 KiB read, depth 32", cpu, "randread-4k-qd32", KIT, 0.6, at_most=True),
        Target("server CPU per mirrored 4 KiB write, depth 32", cpu, "randwrite-4k-qd32", KIT, 1.2, at_most=True),
        Target("p99.9 of 4 KiB reads at depth 1", slowest, "randread-4k-qd1", KIT, 1.0, at_most=True),
        Target("p99.9 of 4 KiB writes at depth 1", slowest, "randwrite-4k-qd1", KIT, 1.0, at_most=True),
    ]


def of_disk():
    rate = "ops_per_s"
    return [
        Target("4 KiB random read on a disk, depth 32", rate, "randread-4k-qd32", "fio-one", 0.9, backing="disk"),
        Target("4 KiB random write on a disk, depth 32", rate, "randwrite-4k-qd32", "fio-both", 0.9, backing="disk"),
    ]


def of_connections():
    # fio takes a core for each connection it drives: with fewer there is nothing to be won.
    wanted = 1.5 if len(os.sched_getaffinity(0)) >= CORES_FOR_MORE else 1.0
    return [
        Target(f"four connections against one, {what}", "ops_per_s", f"{job}-x4", MIRROR, wanted, other_job=job)
        for what, job in (("4 KiB random read", "randread-4k-qd32"), ("4 KiB random write", "randwrite-4k-qd32"))
    ]


def of_bitmap(cells):
    return [
        Target(f"bitmap on against off, {job}, cold start to steady", "ops_per_s", job, BITMAP[True], 0.97, backing=backing,
               section="bitmap", contender=BITMAP[False])
        for backing, section in cells.parts() if section == "bitmap" for job in cells.jobs(backing, section)
    ]


def of_resync(cells):
    targets = []
    for backing, section in cells.parts():
        if section != "resync":
            continue
        for job in cells.jobs(backing, section):
            if job == "no clients":
                continue
            same = {"job": job, "other": "nbdmirror-resync", "contender": "nbdmirror-resync", "backing": backing, "section": "resync"}
            targets.append(Target(f"clients during a resync, {job}", "ops_per_s", wanted=0.6, other_metric="alone_ops_per_s", **same))
            targets.append(Target(f"the resync during {job}", "resync_mb_per_s", wanted=0.5, other_metric="resync_alone_mb_per_s", **same))
    return targets


def all_targets(cells):
    return of_throughput() + of_cost_and_latency() + of_disk() + of_connections() + of_bitmap(cells) + of_resync(cells)


def against(target):
    if target.section in ("resync", "bitmap"):
        return {"resync": "idle", "bitmap": "off"}[target.section]
    return "one connection" if target.other == MIRROR else target.other


def verdicts(cells):
    """A dict for each target; `verdict` is "met", "missed" or "not measured"."""
    rows = []
    for target in all_targets(cells):
        measured = target.measured(cells)
        row = {"what": target.what, "backing": target.backing, "against": against(target), "wanted": target.wanted,
               "at_most": target.at_most, "measured": measured, "verdict": "not measured", "steady": True}
        if measured:
            row["verdict"] = "met" if target.met(measured[0]) else "missed"
            row["steady"] = target.met(measured[1]) == target.met(measured[2])
        rows.append(row)
    return rows


def table(cells):
    lines = ["| work | backing | against | wanted | measured (rounds) | |", "|---|---|---|---|---|---|"]
    for row in verdicts(cells):
        limit = ("at most " if row["at_most"] else "at least ") + f"{row['wanted']:g} x"
        measured, verdict = "-", row["verdict"]
        if row["measured"]:
            median, least, greatest = row["measured"]
            measured = f"{median:.2f} x ({least:.2f}-{greatest:.2f})"
            verdict = ("met" if verdict == "met" else "**missed**") + ("" if row["steady"] else ", not in every round")
        lines.append(f"| {row['what']} | {row['backing']} | {row['against']} | {limit} | {measured} | {verdict} |")
    return lines


def resync_lines(cells, backing):
    """The table of the section "resync"."""
    name = "nbdmirror-resync"
    alone = of(cells.get(backing, "resync", name, "no clients"), "mb_per_s")
    lines = [f"The resync alone: {number(alone[0])} MB/s ({number(alone[1])}-{number(alone[2])})." if alone else "", "",
             "| clients' job | operations/s alone | during a resync | of idle | p99 us alone | during | resync MB/s meanwhile | of idle |",
             "|---|---|---|---|---|---|---|---|"]
    for job in cells.jobs(backing, "resync"):
        cell = cells.get(backing, "resync", name, job)
        if job == "no clients":
            continue
        row = [of(cell, "alone_ops_per_s"), of(cell, "ops_per_s"), ratio(cell, cell, "ops_per_s", "alone_ops_per_s"), of(cell, "alone_p99_us"),
               of(cell, "p99_us"), of(cell, "resync_mb_per_s"), ratio(cell, cell, "resync_mb_per_s", "resync_alone_mb_per_s")]
        lines.append(f"| {job} | " + " | ".join(f"{number(one[0])} ({number(one[1])}-{number(one[2])})" if one else "-" for one in row) + " |")
    return lines
