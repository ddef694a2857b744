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
import contextlib
import errno
import hashlib
import importlib
import os
import shutil
import signal
import stat
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Tuple

from common import (
    KINDS, MODULE, OURS, START_SECONDS, AnyPath, Served, free_port, make_repository, server_words, store)

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


# ---- a slow file system ----

class SlowFiles:
    """A file system for FUSE with a repository named `r`, each of whose answers takes `delay` seconds."""

    use_ns = True

    def __init__(self, count: int, delay: float) -> None:
        self._delay = delay
        self._below: Dict[str, List[str]] = {f'/r/{kind}': [] for kind in KINDS}
        self._below.update({'/': ['r'], '/r': [*KINDS]})
        self._sizes: Dict[str, int] = {}
        for number in range(256):
            self._below['/r/data'].append(f'{number:02x}')
            self._below[f'/r/data/{number:02x}'] = []
        for size, name in enumerate(object_names(count)):
            self._below[f'/r/data/{name[:2]}'].append(name)
            self._sizes[f'/r/data/{name[:2]}/{name}'] = size

    def getattr(self, path: str, handle: Optional[int] = None) -> Dict[str, int]:
        time.sleep(self._delay)
        if path in self._below:
            return {'st_mode': stat.S_IFDIR | 0o755, 'st_nlink': 2}
        if path in self._sizes:
            return {'st_mode': stat.S_IFREG | 0o644, 'st_nlink': 1, 'st_size': self._sizes[path]}
        raise FileNotFoundError(errno.ENOENT, 'no such file')

    def readdir(self, path: str, handle: int) -> List[str]:
        time.sleep(self._delay)
        return ['.', '..', *self._below[path]]


@contextlib.contextmanager
def mounted(count: int, delay: float) -> Iterator[str]:
    """The path where such a file system is mounted.  Raises OSError and ImportError where it cannot be."""
    fuse = importlib.import_module('mfusepy')
    os.close(os.open('/dev/fuse', os.O_RDWR))
    with tempfile.TemporaryDirectory(prefix='colddisk-') as path:
        server = os.fork()
        if not server:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            with contextlib.suppress(BaseException):
                fuse.FUSE(SlowFiles(count, delay), path, foreground=True, allow_other=True, attr_timeout=0,
                          entry_timeout=0, negative_timeout=0, max_threads=100)
            os._exit(0)
        try:
            until = time.monotonic() + START_SECONDS
            while not os.path.ismount(path):
                if time.monotonic() > until:
                    raise OSError(errno.EIO, 'the FUSE program does not start')
                time.sleep(0.01)
            yield path
        finally:
            subprocess.run(['umount', '--lazy', path])
            os.kill(server, signal.SIGTERM)
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
        except (ImportError, OSError) as error:
            print(f'skipped: FUSE cannot be mounted (pip install mfusepy, and libfuse): {error}')
            return 0
        print_table(measure(servers, options.python, root, count, rounds, 'FUSE', False))
    return 0


if __name__ == '__main__':
    sys.exit(main())
