#!/usr/bin/env python3
"""Writes superblock.bin, superblock-unsealed.bin and page.bin from the byte map in docs/on-disk-format.md, without the Rust code.

The golden-bytes test compares what the program writes with these files. Run it from its own folder, and only when the
format's version changes. (The seals came within version 1: no reader looks at them.)
"""
import struct
import uuid
import zlib


def patterned(seed):
    return bytes((seed + n) % 256 for n in range(16))


VOLUME = patterned(0x10)


def superblock(sealed):
    b = bytearray(4096)
    b[0:8] = b"NBDMIRR\0"
    struct.pack_into("<II", b, 8, 1, 2304)
    struct.pack_into("<I", b, 20, 1)  # clean
    struct.pack_into("<QQQ", b, 24, 0, 0, 0)
    b[48:64] = VOLUME
    struct.pack_into("<QQQQQQ", b, 64, 10 << 30, 1 << 20, 1700000000, (10 << 30) + (1 << 20), 0x1234567,
                     1772323199123456789)
    b[112:128] = patterned(0x40)
    name = "g\u00f6lden".encode()
    struct.pack_into("<BBB", b, 128, 2, 2, len(name))
    b[136:136 + len(name)] = name
    b[256:272] = patterned(0x50)
    b[272:288] = patterned(0x60)
    members = {0: (0x70, 0x1234567, 1, "/dev/disk/by-id/first"), 2: (0x80, 0x1234567, 2, "second.img"),
               3: (0x90, 77, 3, "x" * 160), 7: (0xA0, 1, 4, "")}
    for slot, (seed, event_count, state, path) in members.items():
        at = 768 + slot * 192
        b[at:at + 16] = patterned(seed)
        struct.pack_into("<QBB", b, at + 16, event_count, state, len(path))
        b[at + 32:at + 32 + len(path)] = path.encode()
    if sealed:
        seal = zlib.crc32(bytes(b))
        for slot in range(8):
            struct.pack_into("<I", b, 768 + slot * 192 + 26, seal)
    struct.pack_into("<I", b, 16, zlib.crc32(bytes(b)))
    return bytes(b)


def page(index, regions, intent, stale):
    """`intent`: set of regions; `stale`: slot -> set of regions."""
    out = b""
    for sector in range(index * 8, index * 8 + 8):
        b = bytearray(512)
        struct.pack_into("<HBB", b, 0, 0x6D62, 1, 0)
        for n, bits in [(0, intent)] + [(1 + slot, bits) for slot, bits in stale.items()]:
            for region in bits:
                if region < regions and region // 448 == sector:
                    bit = region % 448
                    b[8 + n * 56 + bit // 8] |= 1 << bit % 8
        seed = VOLUME + struct.pack("<Q", sector) + bytes(b[0:4])
        struct.pack_into("<I", b, 4, zlib.crc32(bytes(b[8:]), zlib.crc32(seed)))
        out += bytes(b)
    return out


assert uuid.UUID(bytes=VOLUME).bytes == VOLUME
with open("superblock.bin", "wb") as f:
    f.write(superblock(sealed=True))
with open("superblock-unsealed.bin", "wb") as f:
    # As the first programs wrote it.
    f.write(superblock(sealed=False))
with open("page.bin", "wb") as f:
    # The second page of a volume of 5000 regions: regions 3584 to 4999, so four sectors, the last one not full.
    f.write(page(1, 5000, {3584, 3591, 3592, 4031, 4032, 4999}, {0: set(range(3600, 3700)), 7: {4998, 4999, 3583}}))
