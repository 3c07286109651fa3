#!/usr/bin/env python3
"""A seeded load on a mounted filesystem that knows every byte, name and attribute that must be there.

    filesystem_load.py run FOLDER --seed N --until FILE --manifest FILE [--threads 3] [...]
    filesystem_load.py check FOLDER --manifest FILE

`run` works until FILE exists, then compares everything with its model, syncs, and writes down what must be there;
`check` compares that with FOLDER again, after a remount. Content is worked on as fsx does (write, direct, synchronous and
mapped write, truncate, punch, zero, collapse, insert, read back), the tree as fsstress does (create, mkdir, rename, link,
symlink, unlink, rmdir, extended attributes).

What must hold: each thread has a folder of its own and draws from a generator of its own, so the seed decides what each
one does (not when). Any error of the filesystem fails the run: the volume below promised not to show any. The model is
changed only after the filesystem has answered.

A new operation is a method of `Load` and its line in `WEIGHTS`.
"""

import argparse
import ctypes
import errno
import hashlib
import json
import mmap
import os
import random
import sys
import threading
import time
import traceback

BLOCK_BYTES = 4096
FILE_BYTES_MAX = 384 << 10
FILES_MAX = 30
FOLDERS_MAX = 8
# Between a thread's operations: the load is to be always there, not to take the machine.
PAUSE_S = 0.005
FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_COLLAPSE, FALLOC_ZERO, FALLOC_INSERT = 1, 2, 8, 16, 32

WEIGHTS = {
    "write": 24, "read": 24, "truncate": 4, "direct": 6, "synchronous": 4, "mapped": 5,
    "punch": 3, "zero": 3, "collapse": 2, "insert": 2, "fsync": 4, "reopen": 3, "drop_cache": 2,
    "create": 5, "mkdir": 2, "rename": 4, "rename_folder": 1, "link": 2, "symlink": 2, "unlink": 3, "rmdir": 1,
    "set_attribute": 3, "remove_attribute": 1, "list": 2, "reread": 1, "drop_all_caches": 0.2,
}

libc = ctypes.CDLL(None, use_errno=True)


class Wrong(Exception):
    """The filesystem does not hold what was put there."""


class File:
    """A regular file, under one or more names."""

    def __init__(self):
        self.content = bytearray()
        self.attributes = {}


def fallocate(fd, mode, at, length):
    """False where this filesystem cannot do it."""
    if libc.fallocate(fd, mode, ctypes.c_long(at), ctypes.c_long(length)) == 0:
        return True
    number = ctypes.get_errno()
    if number == errno.EOPNOTSUPP:
        return False
    raise OSError(number, os.strerror(number), "fallocate mode %d" % mode)


def compare(name, at, found, wanted):
    if found == wanted:
        return
    if len(found) != len(wanted):
        raise Wrong("%s: %d bytes at %d, should be %d" % (name, len(found), at, len(wanted)))
    first = next(i for i in range(len(wanted)) if found[i] != wanted[i])
    count = sum(a != b for a, b in zip(found, wanted))
    raise Wrong("%s: %d bytes differ from byte %d on: %s, should be %s"
                % (name, count, at + first, found[first:first + 16].hex(), wanted[first:first + 16].hex()))


class Load:
    """One thread's folder, its model and what may be done to it."""

    def __init__(self, folder, seed, owns_machine):
        self.folder = folder
        self.owns_machine = owns_machine
        self.random = random.Random(seed)
        self.files, self.links, self.folders = {}, {}, {""}
        self.names = 0
        self.counts = dict.fromkeys(WEIGHTS, 0)
        self.operations = 0
        os.mkdir(folder)

    def path(self, name):
        return os.path.join(self.folder, name)

    def step(self):
        operation = self.random.choices(list(WEIGHTS), WEIGHTS.values())[0]
        if getattr(self, operation)() is not False:
            self.counts[operation] += 1
        self.operations += 1

    # What is drawn.

    def a_file(self):
        if not self.files:
            self.create()
        return self.random.choice(list(self.files))

    def a_new_name(self):
        self.names += 1
        parent = self.random.choice(sorted(self.folders))
        return os.path.join(parent, "n%d" % self.names)

    def a_range(self, length_max=0):
        """Somewhere in the largest file: mostly short, sometimes long."""
        length = self.random.randint(1, length_max or self.random.choice([600, 9000, 9000, 130000]))
        return self.random.randrange(FILE_BYTES_MAX - length), length

    def blocks_within(self, size):
        """Whole blocks of a file of `size` bytes that leave something after them; None where it is too short."""
        blocks = size // BLOCK_BYTES
        if blocks < 3:
            return None
        count = self.random.randint(1, min(8, blocks - 2))
        return self.random.randrange(blocks - count) * BLOCK_BYTES, count * BLOCK_BYTES

    # Content, as fsx does.

    def put(self, content, at, data):
        if len(content) < at:
            content.extend(bytes(at - len(content)))
        content[at:at + len(data)] = data

    def write(self, flags=0):
        name = self.a_file()
        at, length = self.a_range()
        data = self.random.randbytes(length)
        fd = os.open(self.path(name), os.O_WRONLY | flags)
        try:
            if os.pwrite(fd, data, at) != length:
                raise Wrong("%s: short write at %d" % (name, at))
        finally:
            os.close(fd)
        self.put(self.files[name].content, at, data)

    def synchronous(self):
        self.write(os.O_SYNC)

    def direct(self):
        name = self.a_file()
        blocks = self.random.randint(1, 16)
        at = self.random.randrange(FILE_BYTES_MAX // BLOCK_BYTES - blocks) * BLOCK_BYTES
        data = self.random.randbytes(blocks * BLOCK_BYTES)
        fd = os.open(self.path(name), os.O_RDWR | os.O_DIRECT)
        try:
            with mmap.mmap(-1, len(data)) as aligned:
                aligned[:] = data
                if os.pwritev(fd, [aligned], at) != len(data):
                    raise Wrong("%s: short direct write at %d" % (name, at))
                self.put(self.files[name].content, at, data)
                aligned[:] = bytes(len(data))
                if os.preadv(fd, [aligned], at) != len(data):
                    raise Wrong("%s: short direct read at %d" % (name, at))
                compare(name + " (direct)", at, aligned[:], data)
        finally:
            os.close(fd)

    def mapped(self):
        name = self.a_file()
        content = self.files[name].content
        if not content:
            return False
        at = self.random.randrange(len(content))
        data = self.random.randbytes(min(self.random.randint(1, 20000), len(content) - at))
        with open(self.path(name), "r+b") as file, mmap.mmap(file.fileno(), len(content)) as mapped:
            mapped[at:at + len(data)] = data
            content[at:at + len(data)] = data
            if self.random.random() < 0.5:
                mapped.flush()
        return True

    def read(self):
        name = self.a_file()
        at, length = self.a_range()
        with open(self.path(name), "rb", buffering=0) as file:
            found = os.pread(file.fileno(), length, at)
        compare(name, at, found, self.files[name].content[at:at + length])

    def reread(self):
        name = self.a_file()
        self.fsync(name)
        self.drop_cache(name)
        self.verify_file(name)

    def truncate(self):
        name = self.a_file()
        size = self.random.randrange(FILE_BYTES_MAX)
        os.truncate(self.path(name), size)
        content = self.files[name].content
        if size > len(content):
            content.extend(bytes(size - len(content)))
        del content[size:]

    def change_space(self, name, mode, at, length):
        with open(self.path(name), "r+b", buffering=0) as file:
            return fallocate(file.fileno(), mode, at, length)

    def punch(self, mode=FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE):
        name = self.a_file()
        at, length = self.a_range()
        if not self.change_space(name, mode, at, length):
            return False
        content = self.files[name].content
        if mode & FALLOC_KEEP_SIZE:
            length = max(0, min(length, len(content) - at))
        if length:
            self.put(content, at, bytes(length))
        return True

    def zero(self):
        return self.punch(FALLOC_ZERO | self.random.choice([0, FALLOC_KEEP_SIZE]))

    def collapse(self):
        name = self.a_file()
        content = self.files[name].content
        blocks = self.blocks_within(len(content))
        if not blocks or not self.change_space(name, FALLOC_COLLAPSE, *blocks):
            return False
        del content[blocks[0]:sum(blocks)]
        return True

    def insert(self):
        name = self.a_file()
        content = self.files[name].content
        blocks = self.blocks_within(len(content))
        if not blocks or len(content) + blocks[1] > FILE_BYTES_MAX:
            return False
        if not self.change_space(name, FALLOC_INSERT, *blocks):
            return False
        content[blocks[0]:blocks[0]] = bytes(blocks[1])
        return True

    def fsync(self, name=None):
        fd = os.open(self.path(name or self.a_file()), os.O_RDWR)
        try:
            self.random.choice([os.fsync, os.fdatasync])(fd)
        finally:
            os.close(fd)

    def reopen(self):
        """Several writes through one descriptor, read back through another."""
        name = self.a_file()
        content = self.files[name].content
        with open(self.path(name), "r+b", buffering=0) as file:
            for _ in range(3):
                at, length = self.a_range(5000)
                data = self.random.randbytes(length)
                os.pwrite(file.fileno(), data, at)
                self.put(content, at, data)
            os.fdatasync(file.fileno())
        self.verify_file(name)

    def drop_cache(self, name=None):
        with open(self.path(name or self.a_file()), "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def drop_all_caches(self):
        if not self.owns_machine:
            return False
        with open("/proc/sys/vm/drop_caches", "w") as file:
            file.write("3")
        return True

    # The tree, as fsstress does.

    def create(self):
        if len(self.files) >= FILES_MAX:
            return self.unlink()
        name = self.a_new_name()
        os.close(os.open(self.path(name), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        self.files[name] = File()
        return True

    def mkdir(self):
        if len(self.folders) >= FOLDERS_MAX:
            return False
        name = self.a_new_name()
        os.mkdir(self.path(name))
        self.folders.add(name)
        return True

    def rename(self):
        """To a new name, or over another file."""
        old = self.a_file()
        new = self.a_file() if self.random.random() < 0.4 else self.a_new_name()
        os.rename(self.path(old), self.path(new))
        # Two names of one file: POSIX says that nothing happens.
        if self.files.get(new) is not self.files[old]:
            self.files[new] = self.files.pop(old)

    def rename_folder(self):
        old = self.random.choice(sorted(self.folders))
        new = self.a_new_name()
        if old == "" or new.startswith(old + "/"):
            return False
        os.rename(self.path(old), self.path(new))

        def moved(name):
            return new + name[len(old):] if name == old or name.startswith(old + "/") else name

        self.folders = {moved(name) for name in self.folders}
        self.files = {moved(name): file for name, file in self.files.items()}
        self.links = {moved(name): target for name, target in self.links.items()}
        return True

    def link(self):
        if len(self.files) >= FILES_MAX:
            return False
        old, new = self.a_file(), self.a_new_name()
        os.link(self.path(old), self.path(new))
        self.files[new] = self.files[old]
        return True

    def symlink(self):
        if len(self.links) >= FILES_MAX:
            gone = self.random.choice(list(self.links))
            os.unlink(self.path(gone))
            del self.links[gone]
        name = self.a_new_name()
        # Short ones stand in the inode, long ones in a block.
        target = "x" * self.random.choice([5, 50, 300, 1000])
        os.symlink(target, self.path(name))
        self.links[name] = target

    def unlink(self):
        name = self.a_file()
        os.unlink(self.path(name))
        del self.files[name]

    def rmdir(self):
        taken = {os.path.dirname(name) for name in [*self.files, *self.links, *self.folders]}
        empty = sorted(self.folders - taken - {""})
        if not empty:
            return False
        name = self.random.choice(empty)
        os.rmdir(self.path(name))
        self.folders.remove(name)
        return True

    def set_attribute(self):
        name = self.a_file()
        # All of a file's fit into one block of ext4, which may be 1 KiB.
        key = "user.k%d" % self.random.randrange(4)
        value = self.random.randbytes(self.random.choice([4, 40, 150]))
        os.setxattr(self.path(name), key, value)
        self.files[name].attributes[key] = value

    def remove_attribute(self):
        name = self.a_file()
        attributes = self.files[name].attributes
        if not attributes:
            return False
        key = self.random.choice(sorted(attributes))
        os.removexattr(self.path(name), key)
        del attributes[key]
        return True

    def list(self):
        folder = self.random.choice(sorted(self.folders))
        names = [name for name in [*self.files, *self.links, *self.folders - {""}] if os.path.dirname(name) == folder]
        found, wanted = sorted(os.listdir(self.path(folder))), sorted(map(os.path.basename, names))
        if found != wanted:
            raise Wrong("folder %r: %s, should be %s" % (folder, found, wanted))

    # What must be there.

    def verify_file(self, name):
        with open(self.path(name), "rb") as file:
            compare(name, 0, file.read(), self.files[name].content)

    def expected(self):
        """Name to what must stand there, in the words of `found_in`."""
        names = {}
        for name, file in self.files.items():
            names.setdefault(id(file), []).append(name)
        there = {name: ["folder"] for name in self.folders - {""}}
        there.update((name, ["symlink", target]) for name, target in self.links.items())
        for name, file in self.files.items():
            attributes = {key: value.hex() for key, value in sorted(file.attributes.items())}
            digest = hashlib.sha256(file.content).hexdigest()
            there[name] = ["file", len(file.content), digest, len(names[id(file)]), attributes]
        return there


def found_in(top):
    """Everything below `top`, as `Load.expected` says it."""
    there = {}
    for folder, folders, files in os.walk(top):
        for name in folders + files:
            path = os.path.join(folder, name)
            if os.path.islink(path):
                what = ["symlink", os.readlink(path)]
            elif os.path.isdir(path):
                what = ["folder"]
            else:
                with open(path, "rb") as file:
                    content = file.read()
                attributes = {key: os.getxattr(path, key).hex() for key in sorted(os.listxattr(path))
                              if key.startswith("user.")}
                digest = hashlib.sha256(content).hexdigest()
                what = ["file", len(content), digest, os.stat(path).st_nlink, attributes]
            there[os.path.relpath(path, top)] = what
    return there


def differences(found, wanted):
    names = sorted(found.keys() | wanted.keys())
    return ["%s: %s, should be %s" % (name, found.get(name), wanted.get(name))
            for name in names if found.get(name) != wanted.get(name)]


def check(top, manifest):
    """Exit status: 0 where the tree below each thread's folder is what the manifest says."""
    with open(manifest) as file:
        wanted = json.load(file)
    wrong = [line for folder in wanted
             for line in differences(found_in(os.path.join(top, folder)), wanted[folder])]
    for line in wrong[:10]:
        print("WRONG: " + line[:400])
    print("%d entries checked, %d wrong" % (sum(map(len, wanted.values())), len(wrong)))
    return 1 if wrong else 0


def work(load, done, failures):
    try:
        while not done.wait(PAUSE_S):
            load.step()
        for name in list(load.files):
            load.fsync(name)
            load.verify_file(name)
    except Exception:
        failures.append("%s, operation %d: %s" % (load.folder, load.operations, traceback.format_exc()))
        done.set()


def run(args):
    loads = [Load(os.path.join(args.folder, "t%d" % number), args.seed * 1000 + number, args.owns_machine)
             for number in range(args.threads)]
    done, failures = threading.Event(), []
    threads = [threading.Thread(target=work, args=(load, done, failures)) for load in loads]
    begin = time.monotonic()
    for thread in threads:
        thread.start()
    while not done.wait(0.1):
        if os.path.exists(args.until):
            done.set()
        if args.progress:
            with open(args.progress + ".new", "w") as file:
                print(sum(load.operations for load in loads), file=file)
            os.rename(args.progress + ".new", args.progress)
    for thread in threads:
        thread.join()
    for failure in failures:
        print("WRONG: seed %d: %s" % (args.seed, failure))
    if failures:
        return 1
    with open(args.manifest, "w") as file:
        json.dump({os.path.basename(load.folder): load.expected() for load in loads}, file)
    os.sync()
    counts = {name: sum(load.counts[name] for load in loads) for name in WEIGHTS}
    print("seed %d: %d operations in %.1f s: %s" % (args.seed, sum(load.operations for load in loads),
          time.monotonic() - begin, ", ".join("%s %d" % item for item in counts.items())))
    never = [name for name, count in counts.items() if count == 0]
    if never:
        print("never: " + ", ".join(never))
    return check(args.folder, args.manifest)


def main():
    parser = argparse.ArgumentParser(description="A seeded load on a mounted filesystem, verified")
    parser.add_argument("verb", choices=["run", "check"])
    parser.add_argument("folder")
    parser.add_argument("--manifest", required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--until")
    parser.add_argument("--threads", type=int, default=3)
    parser.add_argument("--progress", help="where to write the number of operations, ten times a second")
    parser.add_argument("--owns-machine", action="store_true", help="drops all caches of the machine now and then")
    args = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)
    return run(args) if args.verb == "run" else check(args.folder, args.manifest)


if __name__ == "__main__":
    sys.exit(main())
