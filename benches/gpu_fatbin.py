"""The device code of a shared object for one GPU alone: what it cannot load is taken out of the fat binaries, the rest stays.

Section .nv_fatbin of an ELF file is a row of containers, one for each translation unit: a header (uint32 magic, uint16 version,
uint16 bytes of this header, uint64 bytes of what follows) and entries, each a header (uint16 kind, 1 PTX or 2 machine code;
uint16 version; uint32 bytes of this header; uint64 bytes of the payload; ...; at byte 28 uint32 architecture) and its payload.
NVIDIA documents none of it: this is what nvcc 13.0 writes and cuobjdump reads.

The containers stay well-formed and where they are: fewer entries, as if compiled for fewer GPUs, and zeros behind them, which
compress to nothing. Standard library only.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

SECTION = b".nv_fatbin"
MAGIC = 0xBA55ED50
PTX, CUBIN = 1, 2

CONTAINER = struct.Struct("<IHHQ")
ENTRY = struct.Struct("<HHIQ")
ARCHITECTURE = struct.Struct("<I")
ARCHITECTURE_AT = 28


class Entry(NamedTuple):
    kind: int
    architecture: int  # 90 of sm_90 and of sm_90a
    content: bytes  # header and payload


class Container(NamedTuple):
    """One translation unit's; `start` and `end` of its entries in the file."""

    at: int
    start: int
    end: int
    entries: list[Entry]


def keep_only(content: bytes, architecture: int) -> bytes:
    """The shared object, as long as it was, with the device code that a GPU of `architecture` loads.

    That is the machine code of its own generation and, where a container has none, the newest PTX that can be compiled for it.
    A container of nothing but other GPUs' code gets the file's smallest entry that this GPU skips as well, for nvcc writes none
    that is empty. sm_90a counts as sm_90: right for Hopper, which has no other. ValueError where the section is not laid out as
    said above.
    """
    containers = [container for container in read(content) if container.entries]
    skipped = [entry.content for container in containers for entry in container.entries if not _loads(entry, architecture)]
    out = bytearray(content)
    for container in containers:
        body = b"".join(_loaded(container.entries, architecture)) or min(skipped, key=len)
        size = container.end - container.start
        CONTAINER.pack_into(out, container.at, *CONTAINER.unpack_from(content, container.at)[:3], len(body))
        out[container.start : container.end] = body.ljust(size, b"\0")
    return bytes(out)


def read(content: bytes) -> Iterator[Container]:
    """The containers of a shared object in their order; none where it has no device code."""
    at, stop = _section(content)
    while at < stop:
        if content[at : at + 8] == bytes(8):
            at += 8  # what is between two of them is zeros
            continue
        if stop - at < CONTAINER.size or CONTAINER.unpack_from(content, at)[0] != MAGIC:
            raise ValueError(f"no fat binary at byte {at} of section {SECTION.decode()}")
        _, _, header, size = CONTAINER.unpack_from(content, at)
        start, end = at + header, at + header + size
        if end > stop:
            raise ValueError(f"the fat binary at byte {at} ends {end - stop} bytes behind its section")
        yield Container(at, start, end, list(_entries(content, start, end)))
        at = end


def _entries(content: bytes, at: int, end: int) -> Iterator[Entry]:
    while at < end:
        kind, _, header, payload = ENTRY.unpack_from(content, at)
        if kind not in (PTX, CUBIN) or header < ARCHITECTURE_AT + 4 or at + header + payload > end:
            raise ValueError(f"no entry of a fat binary at byte {at}: kind {kind}, {header} + {payload} bytes")
        (architecture,) = ARCHITECTURE.unpack_from(content, at + ARCHITECTURE_AT)
        yield Entry(kind, architecture, content[at : at + header + payload])
        at += header + payload


def _loads(entry: Entry, architecture: int) -> bool:
    """Machine code runs on GPUs of its major number, from its minor number on; PTX is compiled for any that is not older."""
    return entry.architecture <= architecture and (entry.kind == PTX or entry.architecture // 10 == architecture // 10)


def _loaded(entries: list[Entry], architecture: int) -> list[bytes]:
    found = [entry for entry in entries if _loads(entry, architecture)]
    if cubins := [entry.content for entry in found if entry.kind == CUBIN]:
        return cubins
    return [max(found, key=lambda entry: entry.architecture).content] if found else []


def _section(content: bytes) -> tuple[int, int]:
    """Begin and end of SECTION in a 64-bit little-endian ELF file; (0, 0) where it has none."""
    if content[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit little-endian ELF file")
    (table,) = struct.unpack_from("<Q", content, 0x28)
    row, count, names = struct.unpack_from("<HHH", content, 0x3A)
    rows = [struct.unpack_from("<IIQQQQ", content, table + i * row) for i in range(count)]
    for name, _, _, _, offset, size in rows:
        start = rows[names][4] + name
        if content[start : content.index(b"\0", start)] == SECTION:
            return offset, offset + size
    return 0, 0
