#!/usr/bin/env python3
"""A seeded load on a block device (or a file) that knows every byte that must be there.

    block_load.py DEVICE --seed N --bytes N --until FILE --progress FILE [--threads 4]

Reads, writes, synchronous writes (FUA) and flushes past the page cache until FILE exists; then reads everything once more
and prints the SHA-256 of what the first N bytes must be. The number of operations so far stands in the progress file.

What must hold: the range is all zeroes at the start; each thread has a part of it of its own and a generator of its own;
each block of 4 KiB carries its number, the seed and a version that grows with each write, so a wrong block says what it
is: an old version, another block, or neither. Any error of the device fails the run.
"""

import argparse
import fcntl
import hashlib
import mmap
import os
import random
import struct
import sys
import threading
import time
import traceback

BLOCK_BYTES = 4096
BLOCKS_MAX = 24
# Between a thread's operations: the load is to be always there, not to take the machine.
PAUSE_S = 0.03
STAMP = struct.Struct("<QQQQ")


class Wrong(Exception):
    """The device does not hold what was written."""


def content(seed, block, version):
    """What stands in a block; zeroes where it was never written."""
    if version == 0:
        return bytes(BLOCK_BYTES)
    stamp = STAMP.pack(seed, block, version, (block * 0x9E3779B97F4A7C15 ^ version) & (1 << 64) - 1)
    return stamp * (BLOCK_BYTES // STAMP.size)


class Part:
    """One thread's blocks."""

    def __init__(self, fd, seed, number, blocks):
        self.fd, self.seed, self.first, self.count = fd, seed, number * blocks, blocks
        self.versions = [0] * blocks
        self.random = random.Random(seed * 1000 + number)
        self.buffer = mmap.mmap(-1, BLOCKS_MAX * BLOCK_BYTES)
        self.counts = {"read": 0, "write": 0, "synchronous": 0, "flush": 0}

    def expected(self, at, count):
        return b"".join(content(self.seed, self.first + block, self.versions[block]) for block in range(at, at + count))

    def read(self, at, count):
        length = count * BLOCK_BYTES
        view = memoryview(self.buffer)[:length]
        got = os.preadv(self.fd, [view], (self.first + at) * BLOCK_BYTES)
        if got != length:
            raise Wrong("block %d: %d bytes of %d" % (self.first + at, got, length))
        if view == self.expected(at, count):
            return
        for index in range(count):
            found = bytes(view[index * BLOCK_BYTES:][:BLOCK_BYTES])
            if found != self.expected(at + index, 1):
                raise Wrong("block %d: begins with (seed, block, version) %s, should be version %d"
                            % (self.first + at + index, STAMP.unpack_from(found)[:3], self.versions[at + index]))

    def write(self, at, count, flags=0):
        length = count * BLOCK_BYTES
        self.versions[at:at + count] = [version + 1 for version in self.versions[at:at + count]]
        self.buffer[:length] = self.expected(at, count)
        view = memoryview(self.buffer)[:length]
        if os.pwritev(self.fd, [view], (self.first + at) * BLOCK_BYTES, flags) != length:
            raise Wrong("block %d: short write" % (self.first + at))

    def step(self):
        count = self.random.choice([1, 1, 1, 2, 8, BLOCKS_MAX])
        at = self.random.randrange(self.count - count + 1)
        kind = self.random.choices(list(self.counts), [50, 40, 6, 4])[0]
        if kind == "read":
            self.read(at, count)
        elif kind == "flush":
            os.fsync(self.fd)
        else:
            self.write(at, count, os.RWF_DSYNC if kind == "synchronous" else 0)
        self.counts[kind] += 1

    def work(self, done, failures):
        try:
            while not done.wait(PAUSE_S):
                self.step()
            os.fsync(self.fd)
            for at in range(0, self.count, BLOCKS_MAX):
                self.read(at, min(BLOCKS_MAX, self.count - at))
        except Exception:
            failures.append(traceback.format_exc())
            done.set()


def main():
    parser = argparse.ArgumentParser(description="A seeded load on a block device, verified")
    parser.add_argument("device")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--bytes", type=int, required=True)
    parser.add_argument("--until", required=True)
    parser.add_argument("--progress", required=True)
    parser.add_argument("--threads", type=int, default=4)
    args = parser.parse_args()
    fd = os.open(args.device, os.O_RDWR | os.O_DIRECT)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    blocks = args.bytes // BLOCK_BYTES // args.threads
    assert blocks >= BLOCKS_MAX and blocks * BLOCK_BYTES * args.threads == args.bytes
    parts = [Part(fd, args.seed, number, blocks) for number in range(args.threads)]
    done, failures = threading.Event(), []
    threads = [threading.Thread(target=part.work, args=(done, failures)) for part in parts]
    begin = time.monotonic()
    for thread in threads:
        thread.start()
    while not done.wait(0.05):
        if os.path.exists(args.until):
            done.set()
        with open(args.progress + ".new", "w") as file:
            print(sum(sum(part.counts.values()) for part in parts), file=file)
        os.rename(args.progress + ".new", args.progress)
    for thread in threads:
        thread.join()
    for failure in failures:
        print("WRONG: seed %d: %s" % (args.seed, failure))
    if failures:
        return 1
    counts = {kind: sum(part.counts[kind] for part in parts) for kind in parts[0].counts}
    print("seed %d, %.1f s: %s" % (args.seed, time.monotonic() - begin, ", ".join("%s %d" % pair for pair in counts.items())))
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.expected(0, part.count))
    print("sha256 " + digest.hexdigest())
    return 0


if __name__ == "__main__":
    sys.exit(main())
