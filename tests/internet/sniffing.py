"""Who talks with whom, seen on the interface of a host, and whether certain bytes pass in the clear.

Run as a program it is the sniffer: `python sniffing.py INTERFACE [NEEDLE in hex...]` prints a line when it listens, and at the end of
its input one JSON document. It needs the standard library only.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import select
import socket
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

_ETH_P_ALL = 3  # linux/if_ether.h
_SOL_PACKET = 263  # linux/socket.h; the rest is linux/if_packet.h
_PACKET_RX_RING, _PACKET_STATISTICS, _PACKET_VERSION = 5, 6, 10
_TPACKET_V3 = 2
_STATUS, _PACKETS, _FIRST = 8, 12, 16  # where a block has these, struct tpacket_hdr_v1 in tpacket_block_desc
_NEXT, _SNAPLEN, _DATA = 0, 12, 24  # where a packet has them, struct tpacket3_hdr
_BLOCK, _BLOCKS = 256 * 1024, 256  # bytes, and how many: 64 MiB may wait for a sniffer that gets no processor
_RETIRE_MS = 20  # after which the kernel hands over a block that is not full


@dataclass
class Sniffed:
    """What was seen, complete when the `with` block has ended."""

    packets: Counter[tuple[str, str]] = field(default_factory=Counter)  # by (source, destination)
    amounts: Counter[tuple[str, str]] = field(default_factory=Counter)  # bytes with headers
    found: set[bytes] = field(default_factory=set)  # needles that passed, in one packet or across two

    def addresses(self) -> set[str]:
        """All that sent or were sent anything."""
        return {address for pair in self.packets for address in pair}

    def between(self, one: str, other: str) -> int:
        """Packets in both directions."""
        return self.packets[one, other] + self.packets[other, one]

    def bytes_between(self, one: str, other: str) -> int:
        return self.amounts[one, other] + self.amounts[other, one]


@contextlib.contextmanager
def sniff(within: Sequence[str], interface: str, needles: Sequence[bytes] = ()) -> Iterator[Sniffed]:
    """Watch IPv4 on `interface` of the namespace that `within` enters. Fails when the kernel had to drop packets unseen."""
    seen = Sniffed()
    words = [*within, sys.executable, "-I", "-S", __file__, interface, *(needle.hex() for needle in needles)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "listening\n", "the sniffer did not start"
        try:
            yield seen
        finally:
            said, _ = child.communicate(timeout=20)
    document: dict[str, Any] = json.loads(said)
    assert document["dropped"] == 0, f"{document['dropped']} packets passed unseen"
    for source, destination, packets, amount in document["flows"]:
        seen.packets[source, destination] += packets
        seen.amounts[source, destination] += amount
    seen.found |= {bytes.fromhex(needle) for needle in document["found"]}


# --- the program


class _Watch:
    def __init__(self, needles: list[bytes]) -> None:
        self._needles = needles
        self._kept = max((len(needle) for needle in needles), default=1) - 1
        self._ends: dict[bytes, bytes] = {}  # by flow: the last bytes, for a needle that lies across two packets
        self.flows: dict[tuple[str, str], list[int]] = {}
        self.found: set[bytes] = set()

    def packet(self, packet: bytes) -> None:
        """One IPv4 packet (RFC 791) without the link's header."""
        if len(packet) < 20 or packet[0] >> 4 != 4:
            return
        source, destination = socket.inet_ntoa(packet[12:16]), socket.inet_ntoa(packet[16:20])
        flow = self.flows.setdefault((source, destination), [0, 0])
        flow[0] += 1
        flow[1] += len(packet)
        if self._needles:
            self._look(packet)

    def _look(self, packet: bytes) -> None:
        start = (packet[0] & 15) * 4
        name = packet[9:10] + packet[12:20] + packet[start : start + 4]  # protocol, addresses, ports
        if packet[9] == socket.IPPROTO_TCP and len(packet) >= start + 20:
            body = packet[start + (packet[start + 12] >> 4) * 4 :]
        else:
            body = packet[start + 8 :]
        if not body:
            return
        text = self._ends.get(name, b"") + body
        self.found |= {needle for needle in self._needles if needle in text}
        self._ends[name] = text[-self._kept :] if self._kept else b""


class _Ring:
    """A buffer shared with the kernel (packet_mmap in its documentation). A socket's own is too small without root."""

    def __init__(self, tap: socket.socket) -> None:
        tap.setsockopt(_SOL_PACKET, _PACKET_VERSION, _TPACKET_V3)
        request = struct.pack("7I", _BLOCK, _BLOCKS, _BLOCK, _BLOCKS, _RETIRE_MS, 0, 0)
        tap.setsockopt(_SOL_PACKET, _PACKET_RX_RING, request)
        self._memory = mmap.mmap(tap.fileno(), _BLOCK * _BLOCKS)
        self._at = 0  # block that is filled next

    def packets(self) -> Iterator[bytes]:
        """What has come, from blocks that the kernel is done with."""
        while self._number(block := self._at * _BLOCK, _STATUS):
            packet = block + self._number(block, _FIRST)
            for _ in range(self._number(block, _PACKETS)):
                (offset,) = struct.unpack_from("=H", self._memory, packet + _DATA)
                start = packet + offset
                yield self._memory[start : start + self._number(packet, _SNAPLEN)]
                packet += self._number(packet, _NEXT)
            struct.pack_into("=I", self._memory, block + _STATUS, 0)
            self._at = (self._at + 1) % _BLOCKS

    def _number(self, base: int, offset: int) -> int:
        return int(struct.unpack_from("=I", self._memory, base + offset)[0])


def _main(interface: str, needles: list[bytes]) -> None:
    watch = _Watch(needles)
    with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0) as tap:
        ring = _Ring(tap)
        tap.bind((interface, _ETH_P_ALL))
        print("listening", flush=True)
        ended = False
        while True:
            ready, _, _ = select.select([tap] if ended else [tap, 0], [], [], 5 * _RETIRE_MS / 1000)
            for packet in ring.packets():
                watch.packet(packet)
            if ended and not ready:
                break
            ended = ended or (0 in ready and not os.read(0, 4096))
        _, dropped, _ = struct.unpack("3I", tap.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 12))
    flows = [[*pair, *amounts] for pair, amounts in watch.flows.items()]
    found = [needle.hex() for needle in watch.found]
    print(json.dumps({"flows": flows, "found": found, "dropped": dropped}), flush=True)


if __name__ == "__main__":
    _main(sys.argv[1], [bytes.fromhex(word) for word in sys.argv[2:]])
