"""What is measured: servers over files of their own, and files alone.

What must hold: each has its own files in its own folder, is started over one transport at a time, can be stopped and started again on the
same files, and does direct I/O wherever it can and the backing takes it. What differs by nature (nbdkit's file plugin
goes through the page cache) is said in `note`.
"""

import json
import os
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

from .server import BenchError, Server, free_port

# A replica is a volume with its bitmap pages and superblocks behind it; see docs/on-disk-format.md.
METADATA_BYTES = 2 << 20
CONTROL_S_MAX = 20


@dataclass
class Place:
    """Where contenders stand: a folder on the backing, how large volumes are, whether O_DIRECT works there."""

    folder: Path
    size: int
    transport: str  # "unix" or "tcp"
    binary: str

    def __post_init__(self):
        self.direct = takes_direct_io(self.folder)


def takes_direct_io(folder):
    path = folder / "direct-io-probe"
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600))
        return True
    except OSError:
        return False
    finally:
        path.unlink(missing_ok=True)


def make_file(path, size):
    """A file of `size` bytes, its space reserved."""
    if not path.exists():
        with open(path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    return path


class Contender:
    """Something that fio can be pointed at. `name` says which, `copies` how many copies of each block it writes."""

    copies = 1
    note = ""
    program = None
    export = ""

    def __init__(self, name, place):
        self.name, self.place, self.server = name, place, None
        self.folder = place.folder / name
        self.folder.mkdir(exist_ok=True)

    @property
    def address(self):
        return self._port if self.place.transport == "tcp" else self.folder / "s"

    def start(self):
        self._port = free_port()
        (self.folder / "s").unlink(missing_ok=True)
        command = self.command()
        self.server = Server(command, self.address, self.folder / "log", self.environment())

    def command(self):
        raise NotImplementedError

    def environment(self):
        return {}

    def fio_options(self):
        if self.place.transport == "tcp":
            uri = f"nbd://127.0.0.1:{self.address}/{self.export}"
        else:
            uri = f"nbd+unix:///{self.export}?socket={self.address}"
        return ["--ioengine=nbd", f"--uri={uri}", "--thread", f"--size={self.place.size}"]

    def job_text(self, text):
        """The job as it is to be run on this one."""
        return text

    def operations(self, _is_write, count):
        """Operations on the volume, of `count` that fio did."""
        return count

    def settle(self):
        """Writes back what stands in the page cache, so that it is not somebody else's time."""
        for path in self.folder.glob("*.img"):
            with open(path, "rb+") as file:
                os.fsync(file.fileno())

    def stop(self):
        if self.server is not None:
            self.server.stop()
            self.server = None

    def remove(self):
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)


class Mirror(Contender):
    """nbdmirror."""

    def __init__(self, name, place, replicas=2, degraded=False, without_bitmap=False):
        super().__init__(name, place)
        self.copies = 1 if degraded else replicas
        self.replicas = [self.folder / f"{letter}.img" for letter in "abcdefgh"[:replicas]]
        self.degraded, self.without_bitmap = degraded, without_bitmap
        self.control = self.folder / "control"

    def command(self):
        where = f"127.0.0.1:{self.address}" if self.place.transport == "tcp" else f"unix:{self.address}"
        command = [self.place.binary, "serve", "--listen", where, "--control", self.control]
        if not all(path.exists() for path in self.replicas):
            command += ["--create", str(self.place.size)]
        elif self.degraded:
            command += ["--degraded"]
        if self.without_bitmap:
            command += ["--bench-no-intent"]
        return command + self.replicas

    def environment(self):
        folder = {"NBDMIRROR_RUNTIME_DIR": str(self.folder / "run")}
        return {**folder, "NBDMIRROR_BENCH_UNSAFE": "yes"} if self.without_bitmap else folder

    def start(self):
        super().start()
        if self.degraded and self.status()["volume"]["health"] == "healthy":
            self.tell(command="fail", replica="1")

    def tell(self, **request):
        """One request on the admin socket, and its answer."""
        with socket.socket(socket.AF_UNIX) as one:
            one.settimeout(CONTROL_S_MAX)
            one.connect(str(self.control))
            one.sendall(json.dumps(request).encode() + b"\n")
            answer = json.loads(one.makefile().readline())
        if not answer.get("ok"):
            raise BenchError(f"{self.name}: {request['command']}: {answer.get('error')}")
        return answer

    def status(self):
        return self.tell(command="status")["status"]


class Quorum(Contender):
    """qemu-storage-daemon with the quorum driver over two files."""

    copies, program, export = 2, "qemu-storage-daemon", "mirror"

    def command(self):
        command = [self.program]
        for name in ("a", "b"):
            disk = make_file(self.folder / f"{name}.img", self.place.size)
            file = {"driver": "file", "filename": str(disk), "aio": "io_uring", "cache": {"direct": self.place.direct}}
            command += ["--blockdev", json.dumps({"driver": "raw", "node-name": name, "file": file})]
        quorum = {"driver": "quorum", "node-name": "mirror", "vote-threshold": 1, "read-pattern": "fifo", "children": ["a", "b"]}
        if self.place.transport == "tcp":
            listen = f"addr.type=inet,addr.host=127.0.0.1,addr.port={self.address},max-connections=16"
        else:
            listen = f"addr.type=unix,addr.path={self.address},max-connections=16"
        # The NBD server stands before its export: options are carried out in order.
        return command + ["--blockdev", json.dumps(quorum), "--nbd-server", listen,
                          "--export", "nbd,id=export,node-name=mirror,name=mirror,writable=on"]


class Nbdkit(Contender):
    """nbdkit's file plugin."""

    program, note = "nbdkit", "page cache"

    def command(self):
        disk = make_file(self.folder / "a.img", self.place.size)
        tcp = self.place.transport == "tcp"
        where = ["-i", "127.0.0.1", "-p", str(self.address)] if tcp else ["-U", self.address]
        return [self.program, "-f", *where, "file", disk]


class QemuNbd(Contender):
    """qemu-nbd over one raw file."""

    program = "qemu-nbd"

    def command(self):
        disk = make_file(self.folder / "a.img", self.place.size)
        tcp = self.place.transport == "tcp"
        where = ["-b", "127.0.0.1", "-p", str(self.address)] if tcp else ["-k", self.address]
        cache = "none" if self.place.direct else "writeback"
        return [self.program, "-t", "-e", "16", "-f", "raw", "--aio=io_uring", f"--cache={cache}", *where, disk]


class Straight(Contender):
    """fio on the files themselves, without a server: what the backing can do."""

    note = "no NBD"

    def __init__(self, name, place, files=1):
        super().__init__(name, place)
        self.copies = files

    def start(self):
        self.files = [make_file(self.folder / f"{letter}.img", self.place.size) for letter in "ab"[:self.copies]]

    def fio_options(self):
        options = ["--ioengine=io_uring", "--thread", f"--direct={int(self.place.direct)}",
                   f"--filename={':'.join(map(str, self.files))}", f"--filesize={self.place.size}",
                   f"--size={self.place.size * self.copies}"]
        return options + (["--file_service_type=roundrobin"] if self.copies > 1 else [])

    def job_text(self, text):
        """Both copies of a write are in flight together, so the depth is twice the job's. Of reads each needs one."""
        if self.copies == 1 or "rw=read" in text or "rw=randread" in text:
            return text
        depth = next(int(line.split("=")[1]) for line in text.splitlines() if line.startswith("iodepth="))
        return f"{text}\niodepth={depth * self.copies}\n"

    def operations(self, is_write, count):
        return count / self.copies if is_write else count


# In the order of the tables: name, what it is, how it is made.
KNOWN = {
    "nbdmirror": ("nbdmirror, two replicas", lambda place: Mirror("nbdmirror", place)),
    "nbdmirror-degraded": ("nbdmirror, two replicas of which one failed", lambda place: Mirror("nbdmirror-degraded", place, degraded=True)),
    "nbdmirror-3": ("nbdmirror, three replicas", lambda place: Mirror("nbdmirror-3", place, replicas=3)),
    "nbdmirror-1": ("nbdmirror, one replica", lambda place: Mirror("nbdmirror-1", place, replicas=1)),
    "qemu-quorum": ("qemu-storage-daemon quorum, two copies", lambda place: Quorum("qemu-quorum", place)),
    "nbdkit": ("nbdkit file, ONE copy, page cache", lambda place: Nbdkit("nbdkit", place)),
    "qemu-nbd": ("qemu-nbd, ONE copy", lambda place: QemuNbd("qemu-nbd", place)),
    "fio-one": ("fio straight on one file (the limit, no NBD)", lambda place: Straight("fio-one", place)),
    "fio-both": ("fio straight on both files (writes both itself)", lambda place: Straight("fio-both", place, files=2)),
}
PROGRAMS = {"qemu-quorum": Quorum.program, "nbdkit": Nbdkit.program, "qemu-nbd": QemuNbd.program}


def start_all(names, place, say):
    """Starts every one of `names` that is installed; says which are left out and why. nbdmirror must start."""
    started = []
    try:
        for name in names:
            program = PROGRAMS.get(name)
            if program and shutil.which(program) is None:
                say(f"left out: {name} ({program} is not installed)")
                continue
            contender = KNOWN[name][1](place)
            try:
                contender.start()
                started.append(contender)
            except (BenchError, OSError) as error:
                contender.remove()
                if name == "nbdmirror":
                    raise
                say(f"left out: {name}: {error}")
    except BaseException:
        for contender in started:
            contender.stop()
        raise
    return started
