#!/usr/bin/env python3
"""Power cuts: what was answered is there when the power comes back, and nothing wrong has an object's name.

    .ci/powercut.py               # ext4, xfs and btrfs; restic_serve, rest-server and rclone
    .ci/powercut.py --mutants     # is it noticed when restic_serve leaves out one of its syncs?
    .ci/powercut.py --quick       # ext4 alone, fewer uploads, and the mutants there

How it works.  The server works on a file system on a loop device, and a FUSE program (mfusepy from PyPI)
serves the file behind that device: it keeps every write and every flush in order.  Clients on five
connections upload, some objects twice at once.  Of restic_serve there are two servers, one without
O_TMPFILE; they also delete with --keep-deleted, make repositories, and mend objects that were damaged on the
disk; users are added, what they have is rolled back, and what is kept is purged.  Each client notes, when it
has its answer, how far the record has come.

How it judges.  For each answer the disk is rebuilt as a cut at that instant may leave it: all that was
written before the last flush, and of what was written after it nothing, everything, or a random half.
That disk is mounted, its file system recovers, and every object is read.  Until the next request
about the same object is sent,
  - an upload, be it a mending one, is there with its SHA-256 and, if it mended, with the old one's time,
  - a deleted object lies among the deleted ones and nowhere else,
  - a new repository has its folders, and the mark from when on its past is known,
  - a user who was added is in the password file.
While a request is unanswered, its object is as before it, as after it or, when it is deleted, in both
places.  Never is a file that has an object's name anything but that object; that is "wrong".  A roll-back
is cut at many instants between its first and its last write: no object may have gone both from its place
and from the deleted ones, and the same roll-back, run again, brings about what it was to.  A purge is cut
likewise: what it has removed is not promised any more.
A cut disk that cannot be mounted has lost everything.  Counted are objects and repositories, each once
for what was asked about it, however many cuts show it.  The exit status is 1 if restic_serve loses anything
or has anything wrong, or if a mutant is not noticed.

It needs Linux, root who may mount, /dev/fuse, loop devices, mfusepy with libfuse, and mkfs of each file
system; where one of the first five is missing it says so and exits with status 0.  The other servers are
taken from the PATH.  All that it mounts is in a mount namespace of its own, where the system lets it have
one, and goes when it ends, however it ends.
"""
from __future__ import annotations

import argparse
import bisect
import collections
import contextlib
import ctypes
import hashlib
import http.client
import importlib
import mmap
import os
import random
import re
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import (ContextManager, Deque, Dict, Iterable, Iterator, List, NamedTuple, NoReturn, Optional,
                    Set, Tuple)
from unittest import mock

from common import MIB, MODULE, OURS, Failed, Served, end, free_port, server_words
import restic_serve as rs   # of which common knows the path

PEERS = ('rest-server', 'rclone')
CONNECTIONS = 5
SECONDS = 60                    # in which a program has to end, and a request to be answered
FLUSH_SECONDS = 0.005           # that a flush takes, as on a disk: what races with it has time to
KEEP_SECONDS = 1                # of a purge
TICK_SECONDS = 0.05             # longer than the steps in which the kernel's time of files goes on
SIZES = 600, 4096, 20_000, 70_000, 300_000      # bytes of objects
STOP_SIGNALS = signal.SIGINT, signal.SIGTERM
HEADER = struct.Struct('<qq')   # of a record: offset and length of what was written; its data follows
FLUSH = -1                      # as length: no data, all before it is on the disk
SERVE_DISK, SERVE_MUTANT = '--serve-disk', '--serve-mutant'    # what this program runs of itself
NAMESPACE, USERS = 'POWERCUT_NAMESPACE', 'users'
CLONE_NEWNS = 0x20000           # <sched.h>

# What is left out, and where restic_serve does it: the method that calls Folder.sync().
MUTANTS = {'file': 'an upload, before it has its name',
           'folder': 'its folder, when it has its name',
           'parent': 'the folder in which a folder was made',
           'deleted': 'both folders, when an object was deleted and is kept',
           'mark': 'the folder with the mark from when on deletes are kept',
           'users': 'the folder of the password file'}
CALLERS = {'folder': rs.Store.save, 'parent': rs.Folders._make_in, 'deleted': rs.Past.delete,
           'mark': rs.Past.begin, 'users': rs.write_durably}
WITHOUT_PAST = 'parent'         # tried without --keep-deleted: the mark of a new repository syncs for it


class FileSystem(NamedTuple):
    mkfs: Tuple[str, ...]
    size: int                   # bytes of the disk
    live: str                   # options of mount(8) while the server works; nothing is synced unasked
    cut: str                    # the same for a disk after a cut


FILE_SYSTEMS = {
    'ext4': FileSystem(('mkfs.ext4', '-q', '-F', '-b', '4096', '-I', '256', '-E',
                        'lazy_itable_init=0,lazy_journal_init=0,nodiscard'), 96 * MIB,
                       'noatime,nodiscard,commit=300', 'noatime'),
    'xfs': FileSystem(('mkfs.xfs', '-q', '-f', '-K'), 300 * MIB, 'noatime,nodiscard', 'noatime,nouuid'),
    'btrfs': FileSystem(('mkfs.btrfs', '-q', '-f', '-K'), 256 * MIB, 'noatime,nodiscard,commit=300',
                        'noatime'),
}


# ---- the disk that keeps a record ----

class RecordedDisk:
    """A file system for FUSE with one file, `disk`, whose content is that of the file `image`; each write
    and flush is appended to the file `record` before it is answered."""

    use_ns = True

    def __init__(self, image: str, record: str) -> None:
        self._image = os.open(image, os.O_RDWR)
        self._record = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def init(self, path: str) -> None:
        """It is mounted: go into a mount namespace of our own.  Who leaves that of the others last unmounts
        what is on this disk and, killed, would wait for itself."""
        if os.environ.get(NAMESPACE) and ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS):
            raise OSError(ctypes.get_errno(), 'unshare(2)')

    def getattr(self, path: str, handle: Optional[int] = None) -> Dict[str, int]:
        if path == '/':
            return {'st_mode': stat.S_IFDIR | 0o700, 'st_nlink': 2}
        if path != '/disk':
            raise FileNotFoundError(2, 'no such file')
        return {'st_mode': stat.S_IFREG | 0o600, 'st_nlink': 1, 'st_size': os.fstat(self._image).st_size}

    def readdir(self, path: str, handle: int) -> List[str]:
        return ['.', '..', 'disk']

    def open(self, path: str, flags: int) -> int:
        return 0

    def read(self, path: str, size: int, offset: int, handle: int) -> bytes:
        return os.pread(self._image, size, offset)

    def write(self, path: str, data: bytes, offset: int, handle: int) -> int:
        os.pwrite(self._image, data, offset)
        os.writev(self._record, (HEADER.pack(offset, len(data)), data))
        return len(data)

    def fsync(self, path: str, data_only: int, handle: int) -> int:
        time.sleep(FLUSH_SECONDS)
        os.write(self._record, HEADER.pack(0, FLUSH))
        return 0


def serve_disk(image: str, record: str, where: str) -> int:
    """Be the FUSE program, until it is unmounted.  One thread: what it does is in one order."""
    fuse = importlib.import_module('mfusepy')
    options = {'big_writes': True} if fuse.fuse_version_major == 2 else {}  # else 4 KiB at a time
    with contextlib.suppress(RuntimeError):     # libfuse 3 does not like to be ended by a signal
        fuse.FUSE(RecordedDisk(image, record), where, foreground=True, nothreads=True, **options)
    return 0


class Record:
    """What the disk has kept.  An instant is the length of the record's file then: what was not whole in it
    by then had not been written."""

    def __init__(self, path: Path) -> None:
        self.writes: List[Tuple[int, int, int]] = []    # offset on the disk, place in the record, length
        self._ends: List[int] = []                      # of each, flushes too, in the record
        self._flushed = [0]                             # by number of records: those before the last flush
        with path.open('rb') as file:
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        place = 0
        while place + HEADER.size <= len(self.data):
            offset, length = HEADER.unpack_from(self.data, place)
            place += HEADER.size
            self.writes.append((offset, place, max(length, 0)))
            place += max(length, 0)
            self._ends.append(place)
            self._flushed.append(len(self._ends) if length == FLUSH else self._flushed[-1])

    def close(self) -> None:
        self.data.close()

    def ends(self, begin: int, end: int) -> List[int]:
        """The instants between two at which a write or a flush had just been done."""
        return [place for place in self._ends if begin < place <= end]

    def end(self) -> int:
        return len(self.data)

    def at(self, instant: int) -> Tuple[int, List[int]]:
        """How many records a cut at an instant certainly leaves, and which it may leave."""
        count = bisect.bisect_right(self._ends, instant)
        sure = self._flushed[count]
        return sure, [number for number in range(sure, count) if self.writes[number][2]]

    def replay(self, fd: int, numbers: Iterable[int]) -> None:
        """Write some of the records into a file."""
        with memoryview(self.data) as data:
            for number in numbers:
                offset, place, length = self.writes[number]
                with data[place:place + length] as part:
                    os.pwrite(fd, part, offset)


# ---- devices and mounts ----

def run(*words: object, text: str = '') -> str:
    """Run a program, which reads a text; what it prints.  Raises CalledProcessError."""
    return subprocess.run([*map(str, words)], check=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          timeout=SECONDS, input=text, encoding='utf-8', errors='replace').stdout.strip()


@contextlib.contextmanager
def unbroken() -> Iterator[None]:
    """Signals wait, so that what is mounted is known to be."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def mounted(disk: Path, kind: str, options: str, where: Path) -> Iterator[None]:
    """A file system on a loop device, which goes when it is unmounted.  The device writes through the page
    cache, which FUSE writes through in turn, so that the order is that of the file system; its flush is
    fsync(2).  Raises Unmountable."""
    try:
        with unbroken():
            try:
                run('mount', '-t', kind, '-o', f'loop,{options}', disk, where)
            except subprocess.CalledProcessError as error:
                raise Unmountable(error.stderr.strip()) from None
        yield
    finally:
        unmount(where)


def unmount(where: Path) -> None:
    """Unmount; lazily where somebody still has a file open."""
    with unbroken():
        for _ in range(50):
            if not os.path.ismount(where):
                return
            with contextlib.suppress(subprocess.CalledProcessError):
                run('umount', where)
                return
            time.sleep(0.02)
        run('umount', '--lazy', where)


@contextlib.contextmanager
def recorded_disk(folder: Path) -> Iterator[Path]:
    """The file behind the device, which serve_disk() serves from `live` into `record`."""
    where = folder / 'fuse'
    where.mkdir()
    process = subprocess.Popen([sys.executable, __file__, SERVE_DISK, str(folder / 'live'),
                                str(folder / 'record'), str(where)], start_new_session=True)
    try:
        until = time.monotonic() + SECONDS
        while not os.path.ismount(where):
            if process.poll() is not None or time.monotonic() > until:
                raise Failed('the FUSE program does not start')
            time.sleep(0.01)
        yield where / 'disk'
    finally:
        unmount(where)
        with unbroken():
            end(process)


class Unmountable(Failed):
    """What mount(8) says."""


# ---- what was asked for, and when ----

class Event:
    """A request about the object or repository `path`; `time` is what its file's time (nanoseconds) has to
    be afterwards, if not 0.  It had not begun at the instant `begin`, and was answered at `end`."""

    __slots__ = ('kind', 'path', 'time', 'begin', 'end')

    def __init__(self, kind: str, path: str, time: int, begin: int) -> None:
        self.kind = kind
        self.path = path
        self.time = time
        self.begin = begin
        self.end = -1

    def is_answered(self, instant: int) -> bool:
        return 0 <= self.end <= instant


UPLOAD, MEND, DELETE, MAKE, DAMAGE, ROLL_BACK = 'upload', 'mend', 'delete', 'make', 'damage', 'roll-back'
ADD = 'add-user'    # whose path begins with `@`
REQUESTS = UPLOAD, MEND, DELETE, MAKE, ADD
PURGE = 'purge'
MARK = 'mark'       # in a new repository's folder of deleted objects: since when its past is known
# Of an object: whether it is '', 'good' or 'bad' in its place, and how often among the deleted ones.
State = Tuple[str, int]


def outcome(kind: str, state: State) -> State:
    present, kept = state
    if kind == DELETE:
        return '', kept + bool(present)
    return 'bad' if kind == DAMAGE else 'good', kept


def allowed(events: Iterable[Event], instant: int) -> Set[State]:
    """How an object may be after a cut at an instant; `events` are those about it, in their order."""
    states = {('', 0)}
    for event in events:
        then = {outcome(event.kind, state) for state in states}
        if event.is_answered(instant):
            states = then
        elif event.begin < instant:
            states |= then
            if event.kind == DELETE:    # its new name may be on the disk before its old one is not
                states |= {(present, kept + 1) for present, kept in states if present}
    return states


class History:
    """All requests, in the order in which they began, and the digest of each object."""

    def __init__(self, record: Path) -> None:
        self._record = record
        self._lock = threading.Lock()
        self.events: List[Event] = []
        self.digests: Dict[str, str] = {}

    def instant(self) -> int:
        return self._record.stat().st_size

    def begin(self, kind: str, path: str, time: int = 0) -> Event:
        with self._lock:
            event = Event(kind, path, time, self.instant())
            self.events.append(event)
            return event

    def by_path(self) -> Dict[str, List[Event]]:
        found: Dict[str, List[Event]] = {}
        for event in self.events:
            found.setdefault(event.path, []).append(event)
        return found


# ---- servers, and what they are asked ----

def serve_mutant(name: str, has_nameless: str, words: List[str]) -> int:
    """Be restic_serve, but for one sync, and perhaps without O_TMPFILE."""
    sync, caller = rs.Folder.sync, CALLERS.get(name)
    if not has_nameless and hasattr(os, 'O_TMPFILE'):
        del os.O_TMPFILE

    def sync_unless_called_there(folder: rs.Folder) -> None:
        if caller is None or sys._getframe(1).f_code is not caller.__code__:
            sync(folder)

    with mock.patch.object(rs.Folder, 'sync', sync_unless_called_there), \
            mock.patch.object(rs, 'sync_file', (lambda fd: True) if name == 'file' else rs.sync_file), \
            mock.patch.object(sys, 'argv', [str(MODULE), *words]):
        return rs.main()


def serve(name: str, root: Path, python: str, mutant: str, has_nameless: str, log: Path) -> Served:
    port, keep = free_port(), [] if mutant == WITHOUT_PAST else ['--keep-deleted', '1d']
    # With a quota an object that is there is compared and not stored, which is another way to its answer.
    words = server_words(name, f'127.0.0.1:{port}', root, python, program=__file__,
                         options=[SERVE_MUTANT, mutant, has_nameless, *keep, '--max-size', '100G'])
    return Served(words, port, log=log)


class Task(NamedTuple):
    kind: str
    path: str
    content: bytes = b''
    time: int = 0


class Work:
    """What clients ask of a server in `root`.  The first `count` uploads are the same for each server."""

    def __init__(self, history: History, root: Path, ports: List[int], seed: int, count: int, ours: bool
                 ) -> None:
        self.history = history
        self._root = root
        self._ports = ports
        self._random = random.Random(seed)
        self._count = count
        self._ours = ours
        self._contents: Dict[str, bytes] = {}
        self._failures: List[str] = []
        self.moment = ''        # to which is rolled back
        self.moment_instant = 0

    # ---- requests ----

    def together(self, tasks: Iterable[Task], connections: int = CONNECTIONS) -> None:
        """Ask over some connections at once, in this order."""
        queue = collections.deque(tasks)
        threads = [threading.Thread(target=self._work, args=(queue, self._ports[number % len(self._ports)]))
                   for number in range(connections)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._failures:
            raise Failed(self._failures[0])

    def _work(self, queue: Deque[Task], port: int) -> None:
        connection = http.client.HTTPConnection('127.0.0.1', port, timeout=SECONDS)
        try:
            while True:
                try:
                    task = queue.popleft()
                except IndexError:
                    return
                status = self._ask(connection, task)
                if status != 200 and self._ours:
                    self._failures.append(f'{task.kind} {task.path} is answered {status}')
        except (OSError, http.client.HTTPException) as error:
            self._failures.append(f'{type(error).__name__}: {error}')
        finally:
            connection.close()

    def _ask(self, connection: http.client.HTTPConnection, task: Task) -> int:
        method = 'DELETE' if task.kind == DELETE else 'POST'
        query = '?create=true' if task.kind == MAKE else ''
        event = self.history.begin(task.kind, task.path, task.time)
        connection.request(method, f'/{task.path}{query}', task.content)
        answer = connection.getresponse()
        instant = self.history.instant()
        answer.read()
        if answer.status == 200:
            event.end = instant
        return answer.status

    # ---- what is asked ----

    def upload(self, kind: str, beside: str = '') -> Task:
        """Of a new object; its name begins as that of the object `beside`, so that they share a folder."""
        size, begin = self._random.choice(SIZES), beside.rpartition('/')[2][:2]
        rest = self._random.getrandbits(8 * size).to_bytes(size, 'little')
        for number in range(100_000):
            content = b'%d' % number + rest if begin else rest
            name = hashlib.sha256(content).hexdigest()
            if name.startswith(begin):
                break
        path = 'r/config' if kind == 'config' else f'r/{kind}/{name}'
        self._contents[path], self.history.digests[path] = content, name
        return Task(UPLOAD, path, content)

    def uploads(self, count: int) -> List[Task]:
        kinds = ('data', 'data', 'data', 'data', 'data', 'index', 'snapshots', 'locks')
        tasks: List[Task] = []
        for number in range(count):
            beside = tasks[-1].path if number % len(kinds) in (1, 4) else ''
            tasks.append(self.upload(kinds[number % len(kinds)], beside))
        return tasks

    def begin(self) -> None:
        """What every server is asked: a repository, and uploads, every tenth of them twice at once."""
        self.together([Task(MAKE, 'r/')], 1)
        tasks = [self.upload('config'), self.upload('keys'), *self.uploads(self._count - 2)]
        self.together([task for number, task in enumerate(tasks) for _ in range(1 + (number % 10 == 5))])

    def go_on(self) -> None:
        """What only restic_serve is asked."""
        time.sleep(TICK_SECONDS)
        seconds, nanoseconds = divmod(time.time_ns(), 10 ** 9)
        self.moment = (time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))
                       + f'.{nanoseconds // 1000:06}Z')
        self.moment_instant = self.history.instant()
        time.sleep(TICK_SECONDS)
        there = [path for path in self._contents if '/locks/' not in path]
        self._random.shuffle(there)
        some = max(self._count // 5, 4)
        deleted, damaged = there[:some], [path for path in there[some:2 * some] if path != 'r/config']
        self.together(Task(MAKE, f'made{number // 4}/') for number in range(some // 4 * 4))
        deletes = [Task(DELETE, path) for number, path in enumerate(deleted)
                   for _ in range(1 + (number % 3 == 0))]
        self.together(mixed(deletes, self.uploads(some // 2)))
        again = [Task(UPLOAD, path, self._contents[path]) for path in deleted[::3]]
        mends = [Task(MEND, path, self._contents[path], self.damage(path)) for path in damaged]
        self.together(mixed(again, [task for task in mends for _ in range(2)], self.uploads(some // 2)))
        for number in range(some // 2):
            self.together([Task(MAKE, f'single{number}/'), self.upload('data'),
                           Task(DELETE, damaged[number % len(damaged)])], 1)
        self.damage(deleted[1])

    def add_users(self, python: str, mutant: str) -> None:
        for name in ('anna', 'bert'):
            event = self.history.begin(ADD, f'@{name}')
            run(python, __file__, SERVE_MUTANT, mutant, '1', '--add-user', name, '--bcrypt-cost', 4,
                '--htpasswd', self._root.parent / USERS, text='secret\n')
            event.end = self.history.instant()

    def damage(self, path: str) -> int:
        """Damage an object, or put garbage where it was; the time that its file keeps."""
        repository, _, rest = path.partition('/')
        location = rs.Location(f'/{repository}', *rest.split('/'))
        file = Path(f'{self._root}{location.folder}', location.file)
        event = self.history.begin(DAMAGE, path)
        was = file.stat().st_mtime_ns if file.exists() else time.time_ns()
        with file.open('wb') as damaged:
            damaged.write(self._contents[path][:self._random.randrange(500)] + b'damaged')
            damaged.flush()
            os.utime(damaged.fileno(), ns=(was, was))
            os.fsync(damaged.fileno())
        rs.Folder(str(file.parent)).sync()
        event.end = self.history.instant()
        return was


def mixed(*lists: List[Task]) -> List[Task]:
    """Tasks of several lists in turn."""
    longest = max(map(len, lists))
    return [tasks[number] for number in range(longest) for tasks in lists if number < len(tasks)]


# ---- what is there after a cut ----

class Found:
    """What lies in a server's directory; of an object its digest (empty if it cannot be read) and time."""

    def __init__(self, root: Path) -> None:
        self.present: Dict[str, Tuple[str, int]] = {}
        self.kept: Dict[str, List[str]] = {}    # digests of those that are among the deleted ones
        self.missing: Dict[str, Set[str]] = {}  # by repository, of what a new one has
        self.deleted: Dict[str, List[str]] = {}     # when those that are kept were
        self.since: Dict[str, str] = {}         # by repository, when its past begins
        for file in files(root.parent / USERS):
            for line in file.read_text().splitlines():
                match = re.fullmatch(r'(\w+):\$2[aby]\$04\$.{53}', line)
                self.present[f'@{match[1]}' if match else f'@{line}'] = '', 0
        for repository in root.iterdir():
            if repository.name not in (rs.HIDDEN, 'lost+found') and repository.is_dir():
                self._read(repository, f'{repository.name}/')

    def _read(self, repository: Path, name: str) -> None:
        self.missing[name] = {kind for kind in rs.KINDS if not (repository / kind).is_dir()}
        for kind in (*rs.KINDS, 'config'):
            for file in files(repository / kind):
                if re.fullmatch('[0-9a-f]{64}', file.name):
                    self.present[f'{name}{kind}/{file.name}'] = read(file)
                elif kind == 'config':
                    self.present[f'{name}{kind}'] = read(file)
            for file in files(repository / rs.DELETED / kind):
                deleted = rs.parse_deleted_name(file.name)
                if deleted and not deleted.returned:
                    path = f'{name}{kind}' + (f'/{deleted.file}' if kind != 'config' else '')
                    self.kept.setdefault(path, []).append(read(file)[0])
                    self.deleted.setdefault(path, []).append(deleted.deleted)
        self.since[name] = max((file.name[6:] for file in files(repository / rs.DELETED)
                                if file.name.startswith('since.')), default='')
        if not self.since[name]:
            self.missing[name].add(MARK)


def files(path: Path) -> Iterator[Path]:
    """The files at and below a path."""
    if path.is_file():
        yield path
    for folder, _, names in os.walk(path):
        yield from (Path(folder, name) for name in names)


def read(file: Path) -> Tuple[str, int]:
    """Digest and time of a file."""
    with contextlib.suppress(OSError):
        return hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns
    return '', 0


class RollBack(NamedTuple):
    moment: str
    begin: int              # instants
    end: int
    wanted: Set[str]        # objects that were there at the moment


class Judge:
    """Compares what is found after cuts with what was answered."""

    def __init__(self, history: History, has_past: bool) -> None:
        self._digests = history.digests
        self._by_path = history.by_path()
        self._has_past = has_past
        self._damaged = {event.path for event in history.events if event.kind == DAMAGE}
        self.roll_back: Optional[RollBack] = None
        self.cuts = 0
        self.lost: Dict[Tuple[str, str], str] = {}  # by object and what was asked for last: the first cut
        self.wrong: Dict[str, str] = {}             # by object

    def faults(self) -> List[str]:
        return [*self.lost.values(), *self.wrong.values()]

    def state(self, found: Found, path: str) -> State:
        if path.endswith('/'):
            missing = found.missing.get(path, {MARK, *rs.KINDS}) - (set() if self._has_past else {MARK})
            return '' if missing else 'good', 0
        kept = len(found.kept.get(path, ()))
        if path not in found.present:
            return '', kept
        return 'good' if found.present[path][0] == self._digests.get(path, '') else 'bad', kept

    def check(self, found: Found, instant: int, cut: str) -> None:
        """After a cut at an instant."""
        self.cuts += 1
        for path, events in self._by_path.items():
            state, may = self.state(found, path), allowed(events, instant)
            last = max((event for event in events if event.is_answered(instant)),
                       key=lambda event: event.end, default=None)
            if state[0] == 'bad' and not any(present == 'bad' for present, _ in may):
                self.wrong.setdefault(path, f'{path} is wrong {cut}')
            if last and state not in may:
                without = ', '.join(sorted(found.missing.get(path, {'folder'})))
                self.lost.setdefault((path, last.kind), (
                    f'{last.kind} {path}: no {without} {cut}' if path.endswith('/') else
                    f'{last.kind} {path}: {state} but not {" or ".join(map(str, sorted(may)))} {cut}'))
            elif last and last.time and may == {state} and found.present[path][1] != last.time:
                self.lost.setdefault((path, last.kind), f'{last.kind} {path}: it has another time {cut}')
        self._check_others(found, cut)

    def _check_others(self, found: Found, cut: str) -> None:
        """What nobody asked for, and what is kept."""
        for path, (digest, _) in found.present.items():
            if path not in self._by_path:
                self.wrong.setdefault(path, f'{path} is there, with {digest}, {cut}')
        for path, digests in found.kept.items():
            if path not in self._damaged and set(digests) != {self._digests.get(path)}:
                self.wrong.setdefault(path, f'{path} is wrong among the deleted ones {cut}')

    def check_rolled_back(self, found: Found, job: RollBack, cut: str, ended: bool) -> None:
        """After a cut in a roll-back or, if it has `ended`, after it."""
        for path, events in self._by_path.items():
            if path.endswith('/') or path[0] == '@':
                continue
            (was,) = allowed(events, job.begin)
            state, digest = self.state(found, path), self._digests[path]
            if state[0] == 'bad' and (was[0] != 'bad' or ended):
                self.wrong.setdefault(path, f'{path} is wrong {cut}')
            if was != ('', 0) and state[0] != 'good' and digest not in found.kept.get(path, ()):
                self.lost.setdefault((path, ROLL_BACK), f'roll-back: {path} is nowhere {cut}')
            elif ended and '/locks/' not in path and (state[0] == 'good') != (path in job.wanted):
                self.lost.setdefault((path, ROLL_BACK), f'roll-back: {path} is {state[0] or "missing"} {cut}')
        self._check_others(found, cut)

    def check_purged(self, found: Found, before: Found, cut: str) -> None:
        """After a cut in a purge, `before` which there was something else."""
        self.cuts += 1
        for path, times in before.deleted.items():
            for deleted in {*times}.difference(found.deleted.get(path, ())):
                if deleted >= found.since.get(f'{path.partition("/")[0]}/', ''):
                    self.lost.setdefault((path, PURGE), f'purge: {path} is not kept, but promised {cut}')
        for path in before.present:
            if path not in found.present:
                self.lost.setdefault((path, PURGE), f'purge: {path} is missing {cut}')

    def lose_all(self, instant: int, why: str) -> None:
        self.cuts += 1
        for path, events in self._by_path.items():
            for event in events:
                if event.is_answered(instant) and event.kind != DAMAGE:
                    self.lost.setdefault((path, event.kind), why)


# ---- cuts ----

class CutDisk:
    """The disk as cuts leave it, in the file `image`.  Instants are asked for in their order."""

    def __init__(self, folder: Path, record: Record, seed: int) -> None:
        self._copy = 'cp', '--sparse=always', folder / 'base', folder / 'image'
        self._record = record
        self._random = random.Random(seed)
        self._replayed = 0
        self._sure = os.open(folder / 'base', os.O_RDWR)    # all until the last flush
        self._image = os.open(folder / 'image', os.O_RDWR | os.O_CREAT, 0o600)

    def close(self) -> None:
        os.close(self._sure)
        os.close(self._image)

    def leave(self, instant: int) -> Iterator[str]:
        """Rebuild what a cut at an instant may leave, one after the other; yields how it was cut."""
        sure, unsure = self._record.at(instant)
        self._record.replay(self._sure, range(self._replayed, sure))
        self._replayed = sure
        left = [('none', unsure[:0])]
        if unsure:
            left.append(('all', unsure))
        if len(unsure) > 1:
            left.append(('half', sorted(self._random.sample(unsure, len(unsure) // 2))))
        for name, numbers in left:
            run(*self._copy)
            self._record.replay(self._image, numbers)
            yield f'(cut at {instant}, {name} of {len(unsure)} unflushed writes done)'


class Trial:
    """A server at work on a file system, and the cuts; `until_fault` ends them with the first that shows
    one."""

    def __init__(self, options: argparse.Namespace, kind: str, name: str, mutant: str = '') -> None:
        self._options = options
        self._kind = kind
        self._name = name
        self._mutant = mutant
        self._has_past = name == OURS and mutant != WITHOUT_PAST
        self._folder = Path()
        self.history = History(Path())
        self.judge = Judge(self.history, False)
        self.purge = 0, Found(Path())       # before it: the instant, and what was there

    def run(self) -> None:
        """Raises Failed and OSError."""
        with tempfile.TemporaryDirectory(prefix='powercut-') as name:
            self._folder = Path(name)
            system = FILE_SYSTEMS[self._kind]
            for place in ('mnt', 'cut'):
                (self._folder / place).mkdir()
            (self._folder / 'base').write_bytes(b'')
            os.truncate(self._folder / 'base', system.size)
            run(*system.mkfs, self._folder / 'base')
            run('cp', '--sparse=always', self._folder / 'base', self._folder / 'live')
            (self._folder / 'record').write_bytes(b'')
            self.history = History(self._folder / 'record')
            roll_back = self._work()
            self.judge = Judge(self.history, self._has_past)
            self.judge.roll_back = roll_back
            self._cut()

    def _work(self) -> Optional[RollBack]:
        """Let the server work; the roll-back, if there was one."""
        where, options = self._folder / 'mnt', self._options
        root = where / 'srv'
        with recorded_disk(self._folder) as disk, \
                mounted(disk, self._kind, FILE_SYSTEMS[self._kind].live, where):
            root.mkdir()
            rs.Folder(str(root)).sync()
            rs.Folder(str(where)).sync()
            with contextlib.ExitStack() as stack:
                servers = [stack.enter_context(serve(self._name, root, options.python, self._mutant, nameless,
                                                     self._folder / f'log{nameless}'))
                           for nameless in ('1', '') if nameless or self._name == OURS]
                work = Work(self.history, root, [server.port for server in servers], options.seed,
                            options.uploads, self._name == OURS)
                try:
                    work.begin()
                    if not self._has_past:
                        return None
                    work.go_on()
                    work.add_users(options.python, self._mutant)
                except Failed as fault:
                    logs = ''.join(log.read_text()[-2000:] for log in self._folder.glob('log*'))
                    raise Failed(f'{fault}; the logs: {logs}') from None
                begin = self.history.instant()
                roll_back(options.python, work.moment, root)
                wanted = {path for path, events in self.history.by_path().items()
                          if allowed(events, work.moment_instant) == {('good', 0)}}
                job = RollBack(work.moment, begin, self.history.instant(), wanted)
            if not self._mutant:
                time.sleep(KEEP_SECONDS + 1)
                self.purge = self.history.instant(), Found(root)
                run(options.python, MODULE, '--stdio', '--keep-deleted', f'{KEEP_SECONDS}s', root)
                if len(Found(root).kept) == len(self.purge[1].kept):
                    raise Failed('nothing was purged')
            return job

    def _cut(self) -> None:
        record = Record(self._folder / 'record')
        disk = CutDisk(self._folder, record, self._options.seed)
        with contextlib.closing(record), contextlib.closing(disk):
            for instant in sorted({event.end for event in self.history.events if event.end >= 0
                                   and event.kind in REQUESTS}):
                for how in disk.leave(instant):
                    self._look(instant, how)
                    if self._mutant and self.judge.faults():
                        return
            job = self.judge.roll_back
            if not job or self._mutant:
                return
            instants = record.ends(job.begin, job.end)
            step = max(len(instants) // self._options.roll_back_cuts, 1)
            for instant in [*instants[:-1:step], job.end]:
                for how in disk.leave(instant):
                    self._look_in_roll_back(job, instant, how)
            instants = record.ends(self.purge[0], record.end())
            for instant in instants[::max(len(instants) // self._options.roll_back_cuts, 1)]:
                for how in disk.leave(instant):
                    with self._mounted():
                        self.judge.check_purged(Found(self._folder / 'cut' / 'srv'), self.purge[1], how)

    def _mounted(self) -> ContextManager[None]:
        return mounted(self._folder / 'image', self._kind, FILE_SYSTEMS[self._kind].cut, self._folder / 'cut')

    def _look(self, instant: int, how: str) -> None:
        try:
            with self._mounted():
                self.judge.check(Found(self._folder / 'cut' / 'srv'), instant, how)
        except Unmountable as error:
            self.judge.lose_all(instant, f'{error} {how}')

    def _look_in_roll_back(self, job: RollBack, instant: int, how: str) -> None:
        root = self._folder / 'cut' / 'srv'
        try:
            with self._mounted():
                self.judge.cuts += 1
                self.judge.check_rolled_back(Found(root), job, how, instant == job.end)
                try:
                    roll_back(self._options.python, job.moment, root)
                except Failed as fault:
                    self.judge.lost.setdefault(('', ROLL_BACK), f'{fault} {how}')
                self.judge.check_rolled_back(Found(root), job, f'after the second run {how}', True)
        except Unmountable as error:
            self.judge.lose_all(instant, f'{error} {how}')


def roll_back(python: str, moment: str, root: Path) -> None:
    """Raises Failed."""
    try:
        run(python, MODULE, '--roll-back', moment, '--force', root / 'r')
    except subprocess.CalledProcessError as error:
        raise Failed(f'the roll-back fails: {error.stderr.strip()}') from None


# ---- the whole ----

COLUMNS = ('uploads', 'mends', 'deletes', 'made', 'users', 'cuts', 'lost', 'wrong')


def show(kind: str, name: str, trial: Trial) -> None:
    """A line of the table, and what was lost or wrong."""
    answered = collections.Counter(
        kind for kind, _ in {(event.kind, event.path) for event in trial.history.events if event.end >= 0})
    cells = [*(answered[request] for request in REQUESTS), trial.judge.cuts, len(trial.judge.lost),
             len(trial.judge.wrong)]
    print(f'{name:14}{kind:8}' + ''.join(f'{cell:9,}' for cell in cells), flush=True)
    if name == OURS:
        for line in trial.judge.faults()[:20]:
            print(f'  NOT KEPT: {line}')
        return
    for what, paths in (('lost', [path for path, _ in trial.judge.lost]), ('wrong', [*trial.judge.wrong])):
        kinds = collections.Counter('repository' if path.endswith('/') else path.split('/')[1]
                                    for path in paths)
        if kinds:
            print(f'  {what}: ' + ', '.join(f'{count} {thing}' for thing, count in sorted(kinds.items())))


def compare(options: argparse.Namespace, kinds: List[str]) -> bool:
    """All servers on all file systems; whether restic_serve has kept everything."""
    kept = True
    print(f'{"server":14}{"on":8}' + ''.join(f'{name:>9}' for name in COLUMNS))
    for kind in kinds:
        for name in options.server or (OURS, *(peer for peer in PEERS if shutil.which(peer))):
            trial = Trial(options, kind, name)
            trial.run()
            show(kind, name, trial)
            kept = kept and not (name == OURS and trial.judge.faults())
    return kept


def try_mutants(options: argparse.Namespace, kinds: List[str]) -> bool:
    """Whether each mutant is noticed on one of the file systems."""
    noticed = True
    for mutant, unsynced in MUTANTS.items():
        for kind in kinds:
            trial = Trial(options, kind, OURS, mutant)
            trial.run()
            if trial.judge.faults():
                print(f'noticed: not synced is {unsynced}: on {kind}, {trial.judge.faults()[0]}', flush=True)
                break
        else:
            noticed = False
            print(f'NOT NOTICED: not synced is {unsynced}', flush=True)
    return noticed


def obstacle() -> str:
    """Why power cuts cannot be tried here; empty if they can."""
    if not sys.platform.startswith('linux') or os.geteuid():
        return 'only root on Linux can'
    try:
        os.close(os.open('/dev/fuse', os.O_RDWR))
    except OSError as error:
        return f'/dev/fuse: {error.strerror}'
    for tool in ('mount', 'umount'):
        if not shutil.which(tool):
            return f'there is no {tool}(8)'
    try:
        importlib.import_module('mfusepy')
    except Exception as error:  # without libfuse it is an OSError, on an old Python a TypeError
        return f'mfusepy (pip install mfusepy, and libfuse) cannot be imported: {error}'
    with tempfile.TemporaryDirectory() as name, tempfile.NamedTemporaryFile() as file:
        os.truncate(file.fileno(), FILE_SYSTEMS['ext4'].size)
        try:
            run(*FILE_SYSTEMS['ext4'].mkfs, file.name)
            with mounted(Path(file.name), 'ext4', 'noatime', Path(name)):
                return ''
        except (Unmountable, OSError, subprocess.CalledProcessError) as error:
            return f'an ext4 cannot be made and mounted: {error}'


def usable(kinds: Iterable[str]) -> List[str]:
    """Those file systems that can be made and mounted here."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        run('modprobe', '--all', *kinds)
    known = Path('/proc/filesystems').read_text().split()
    found = [kind for kind in kinds if kind in known and shutil.which(FILE_SYSTEMS[kind].mkfs[0])]
    missing = [kind for kind in kinds if kind not in found]
    if missing:
        print(f'not tried, since it cannot be made or mounted here: {", ".join(missing)}')
    return found


def enter_namespace() -> None:
    """Go on in namespaces of mounts and processes, where the system lets us: what is mounted there goes
    with the last process, and these with the first."""
    words = ['unshare', '--mount', '--pid', '--fork', '--kill-child', '--mount-proc']
    if not os.environ.get(NAMESPACE) and shutil.which('unshare') and not subprocess.run(
            [*words, 'true'], stderr=subprocess.DEVNULL).returncode:
        os.environ[NAMESPACE] = '1'
        os.execvp('unshare', [*words, sys.executable, __file__, *sys.argv[1:]])


def stop(signum: int, frame: object) -> NoReturn:
    """Clean up, and do not mind being told again."""
    for each in STOP_SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    sys.exit(128 + signum)


def main() -> int:
    if sys.argv[1:2] == [SERVE_DISK]:
        return serve_disk(*sys.argv[2:])
    if sys.argv[1:2] == [SERVE_MUTANT]:
        return serve_mutant(sys.argv[2], sys.argv[3], sys.argv[4:])
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0] if __doc__ else '')
    parser.add_argument('--quick', action='store_true', help='ext4 alone, fewer uploads, and the mutants')
    parser.add_argument('--mutants', action='store_true', help='restic_serve without one of its syncs, alone')
    parser.add_argument('--on', action='append', choices=[*FILE_SYSTEMS], help='a file system (default: all)')
    parser.add_argument('--server', action='append', choices=(OURS, *PEERS), help='(default: all)')
    parser.add_argument('--uploads', type=int, help='to every server (default 60)')
    parser.add_argument('--seed', type=int, default=1, help='of contents, order and what a cut leaves')
    parser.add_argument('--python', default=sys.executable, help="the server's Python")
    options = parser.parse_args()
    reason = obstacle()
    if reason:
        print(f'power cuts are NOT tried: {reason}')
        return 0
    enter_namespace()
    for signum in STOP_SIGNALS:
        signal.signal(signum, stop)
    options.uploads = options.uploads or (20 if options.quick or options.mutants else 60)
    options.roll_back_cuts = 5 if options.quick else 16
    kinds = usable(options.on or (['ext4'] if options.quick else FILE_SYSTEMS))
    kept = True
    try:
        if not options.mutants:
            kept = compare(options, kinds)
        if options.mutants or options.quick:
            kept = try_mutants(options, kinds) and kept
    except (Failed, OSError, subprocess.SubprocessError) as fault:
        print(f'NOT TRIED TO THE END: {fault}')
        return 1
    return int(not kept)


if __name__ == '__main__':
    sys.exit(main())
