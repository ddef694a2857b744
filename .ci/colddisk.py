#!/usr/bin/env python3
"""Measure lists of disks that are cold or slow: restic_serve, another restic_serve.py, and rest-server.

    .ci/colddisk.py --before restic_serve.py.old     # some minutes; as root
    .ci/colddisk.py --quick                          # less than a minute

Each server lists the same repository over HTTP, in turn: first from a cold disk, the system's caches
dropped, then from the warm one; and from a file system (FUSE) that needs a millisecond for each
answer, as many at once as it is asked for, and remembers nothing.  Figures are medians over the rounds.
Says what it skips where it cannot be done: without root, FUSE, or rest-server.
"""
from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import hashlib
import os
import select
import shutil
import signal
import stat
import statistics
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import Deque, Dict, Iterator, List, Optional, Tuple

from common import KINDS, MODULE, OURS, AnyPath, Served, free_port, make_repository, server_words, store

PEER = 'rest-server'
DROP_CACHES = '/proc/sys/vm/drop_caches'
SETTLE_SECONDS = 0.5            # from the first answer until all workers have started
WARM_LISTS = 5                  # of which the fastest counts
# What a list is to take, as a part of rest-server's time.
GOALS = {'disk, cold': 0.7, 'FUSE': 0.25}


def object_names(count: int) -> List[str]:
    return [hashlib.sha256(b'%d' % number).hexdigest() for number in range(count)]


def fill(root: str, count: int) -> None:
    """A repository of objects that take no blocks, made in no order, as restic does."""
    make_repository(root)
    for size, name in enumerate(object_names(count)):
        os.truncate(store(root, 'data', b'', name), size)
    os.sync()


# ---- a slow file system: a tree in memory, served through /dev/fuse (see linux/fuse.h) ----

class SlowFiles:
    """A repository named `r` in memory, each of whose answers comes `delay` seconds after the question."""

    LOOKUP, FORGET, GETATTR, STATFS, INIT, OPENDIR, READDIR, RELEASEDIR = 1, 2, 3, 17, 26, 27, 28, 29
    INTERRUPT, BATCH_FORGET = 36, 42
    PARALLEL_LOOKUPS = 1 << 18              # FUSE_PARALLEL_DIROPS: several at once in one folder
    HEADER = struct.Struct('<IIQQIIII')     # length, kind, number, inode, and others

    def __init__(self, count: int, delay: float) -> None:
        self._delay = delay
        self._below: Dict[int, Dict[bytes, int]] = {1: {}}  # by inode of a folder: inodes by name
        self._sizes: Dict[int, int] = {}
        repository = self._add(1, 'r', {})
        folders = {kind: self._add(repository, kind, {}) for kind in KINDS}
        data = {f'{number:02x}': self._add(folders['data'], f'{number:02x}', {}) for number in range(256)}
        for size, name in enumerate(object_names(count)):
            self._sizes[self._add(data[name[:2]], name)] = size
        self._listed = {inode: self._entries(inode) for inode in self._below}

    def _add(self, folder: int, name: str, below: Optional[Dict[bytes, int]] = None) -> int:
        inode = len(self._below) + len(self._sizes) + 1
        self._below[folder][name.encode()] = inode
        if below is not None:
            self._below[inode] = below
        return inode

    def _entries(self, folder: int) -> List[bytes]:
        """The directory entries of a folder, each with the offset of the next."""
        return [struct.pack('<QQII', inode, offset, len(name), 4 if inode in self._below else 8)
                + name + bytes(-len(name) % 8)
                for offset, (name, inode) in enumerate(self._below[folder].items(), 1)]

    def _attributes(self, inode: int) -> bytes:
        mode = stat.S_IFDIR | 0o755 if inode in self._below else stat.S_IFREG | 0o644
        return struct.pack('<QQQQQQIIIIIIIIII', inode, self._sizes.get(inode, 0), 0, 1, 1, 1, 0, 0, 0,
                           mode, 1, 0, 0, 0, 4096, 0)

    def _answer(self, kind: int, inode: int, content: bytes) -> Tuple[int, bytes]:
        """An error number, negative, or 0 and what is answered."""
        if kind == self.INIT:
            return 0, struct.pack('<IIIIHHIIHHI28x', 7, 31, 65536, self.PARALLEL_LOOKUPS, 64, 64, 65536, 1,
                                  0, 0, 0)
        if kind == self.LOOKUP:
            found = self._below[inode].get(content.rstrip(b'\0'))
            if found is None:
                return -2, b''
            return 0, struct.pack('<QQQQII', found, 0, 0, 0, 0, 0) + self._attributes(found)
        if kind == self.GETATTR:
            return 0, struct.pack('<QII', 0, 0, 0) + self._attributes(inode)
        if kind == self.STATFS:
            return 0, struct.pack('<QQQQQIIII24x', 1 << 30, 1 << 29, 1 << 29, 1 << 20, 1 << 19, 4096, 255,
                                  4096, 0)
        if kind == self.OPENDIR:
            return 0, struct.pack('<QII', 0, 0, 0)
        if kind == self.READDIR:
            offset, length = struct.unpack_from('<8xQI', content)
            found_entries = b''
            for entry in self._listed[inode][offset:]:
                if len(found_entries) + len(entry) > length:
                    break
                found_entries += entry
            return 0, found_entries
        return (0, b'') if kind == self.RELEASEDIR else (-38, b'')

    def serve(self, fd: int) -> None:
        """Answer until the file system is unmounted."""
        due: Deque[Tuple[float, bytes]] = collections.deque()
        while True:
            now = time.perf_counter()
            while due and due[0][0] <= now:
                with contextlib.suppress(FileNotFoundError):    # who asked has gone
                    os.write(fd, due[0][1])
                due.popleft()
            wait = max(due[0][0] - time.perf_counter(), 0) if due else None
            if not select.select([fd], [], [], wait)[0]:
                continue
            try:
                request = os.read(fd, 1 << 17)
            except OSError:     # ENODEV: unmounted
                return
            _, kind, number, inode, *_ = self.HEADER.unpack_from(request)
            if kind in (self.FORGET, self.BATCH_FORGET, self.INTERRUPT):
                continue
            error, content = self._answer(kind, inode, request[self.HEADER.size:])
            due.append((time.perf_counter() + self._delay * (kind != self.INIT),
                        struct.pack('<IiQ', 16 + len(content), error, number) + content))


@contextlib.contextmanager
def mounted(count: int, delay: float) -> Iterator[str]:
    """The path where such a file system is mounted.  Raises OSError where it cannot be."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open('/dev/fuse', os.O_RDWR)
    with tempfile.TemporaryDirectory(prefix='colddisk-') as path:
        options = f'fd={fd},rootmode=40000,user_id=0,group_id=0,allow_other'
        if libc.mount(b'colddisk', path.encode(), b'fuse.colddisk', 0, options.encode()):
            os.close(fd)
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
        server = os.fork()
        if not server:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            with contextlib.suppress(BaseException):
                SlowFiles(count, delay).serve(fd)
            os._exit(0)
        os.close(fd)
        try:
            yield path
        finally:
            libc.umount2(path.encode(), 2)      # MNT_DETACH
            os.waitpid(server, 0)


# ---- servers and their lists ----

class Listed(Served):
    """A server of a directory for reading."""

    def __init__(self, name: str, program: AnyPath, root: str, python: str) -> None:
        port = free_port()
        super().__init__(server_words(name, f'127.0.0.1:{port}', root, python, program=program,
                                      options=['--read-only']), port)
        time.sleep(SETTLE_SECONDS)


Rows = Dict[str, Dict[str, List[Tuple[float, float]]]]     # by figure and server, one value a round


def measure(servers: Dict[str, AnyPath], python: str, root: str, count: int, rounds: int, what: str,
            warm: bool) -> Rows:
    """First byte and whole of lists, each from caches that were dropped and, if `warm`, from full ones."""
    rows: Rows = {}
    for turn in range(rounds):
        for name in sorted(servers, reverse=bool(turn % 2)):
            with Listed(name, servers[name], root, python) as server:
                os.sync()
                Path(DROP_CACHES).write_text('3')
                rows.setdefault(what, {}).setdefault(name, []).append(server.list('r', count))
                if warm:
                    lists = [server.list('r', count) for _ in range(WARM_LISTS)]
                    rows.setdefault('disk, warm', {}).setdefault(name, []).append(
                        (min(first for first, _ in lists), min(whole for _, whole in lists)))
    return rows


def print_table(rows: Rows) -> None:
    print(f'{"":12} {"":12} {"first byte ms":>14} {"whole ms":>10} {"× rest-server":>14}  goal')
    for what, figures in rows.items():
        medians = {name: [statistics.median(each) * 1000 for each in zip(*lists)]
                   for name, lists in figures.items()}
        for name, (first, whole) in medians.items():
            ratio, goal = whole / medians[PEER][1], GOALS.get(what)
            verdict = (f'<= {goal}: {"met" if ratio <= goal else "missed"}'
                       if goal and name == OURS else '')
            print(f'{what:12} {name:12} {first:14.1f} {whole:10.0f} {ratio:14.2f}  {verdict}')


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0] if __doc__ else '')
    parser.add_argument('--quick', action='store_true', help='fewer objects and one round')
    parser.add_argument('--before', metavar='FILE', help='another restic_serve.py, to compare with')
    parser.add_argument('--dir', default='/var/tmp', help='where the cold disk is (default /var/tmp)')
    parser.add_argument('--objects', type=int, help='on the disk (default 200000)')
    parser.add_argument('--slow-objects', type=int, help='on the slow file system (default 5000)')
    parser.add_argument('--rounds', type=int, help='default 5')
    parser.add_argument('--delay', type=float, default=0.001, help='seconds of an answer (default 0.001)')
    parser.add_argument('--python', default=sys.executable, help="the servers' Python")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))   # unmounted and removed even then
    rounds = options.rounds or (1 if options.quick else 5)
    if os.name != 'posix' or os.geteuid() or not os.access(DROP_CACHES, os.W_OK):
        print('skipped: only root on Linux can drop caches')
        return 0
    if not shutil.which(PEER):
        print('skipped: no rest-server to compare with')
        return 0
    servers: Dict[str, AnyPath] = {OURS: MODULE, PEER: ''}    # ours with their programs
    if options.before:
        servers['before'] = options.before
    with tempfile.TemporaryDirectory(dir=options.dir, prefix='colddisk-') as root:
        count = options.objects or (40_000 if options.quick else 200_000)
        fill(f'{root}/r', count)
        print_table(measure(servers, options.python, root, count, rounds, 'disk, cold', True))
    count = options.slow_objects or (1000 if options.quick else 5000)
    with contextlib.ExitStack() as stack:
        try:
            root = stack.enter_context(mounted(count, options.delay))
        except OSError as error:
            print(f'skipped: FUSE cannot be mounted: {error.strerror}')
            return 0
        print_table(measure(servers, options.python, root, count, rounds, 'FUSE', False))
    return 0


if __name__ == '__main__':
    sys.exit(main())
