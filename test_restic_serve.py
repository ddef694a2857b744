"""The promises of restic_serve, each a test.  Run them with `python3 -m unittest`.

They require nothing but Python.  Tests that drive another program are skipped where it is missing, or
fail there if RESTIC_SERVE_TEST_ALL=1.  RESTIC_SERVE_TEST_PEERS names a folder with further restic,
rclone and rest-server programs.  RESTIC_SERVE_TEST_LONG=1 adds the tests that take minutes.  What was
left out is said at the end.

First stand the tools: what a test may use, clients made of bytes, and programs to start.  Then come the
module's chapters in their order, each with the tests of its pure parts first; then restic itself, other
clients and proxies, faults that are made on purpose (disk, wire, malice, death), the order of the
chapters, and the README.
"""
from __future__ import annotations

import argparse
import atexit
import base64
import bisect
import collections
import contextlib
import copy
import dis
import errno
import faulthandler
import functools
import gc
import hashlib
import io
import itertools
import json
import logging
import math
import os
import pty
import py_compile
import random
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import types
import unittest
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

try:
    import ssl
except ImportError:     # this Python has none
    ssl = None

import restic_serve
from restic_serve import (
    Accounts, Api, Busy, Counters, Entry, HttpError, Limits, Location, Metrics, NotHere, OtherConfig, Page,
    PasswordFile, Peer, Policy, QuotaExceeded, Request, Server, Store, Usage, WrongContent, short_rights)

MODULE = restic_serve.__file__
README = Path(MODULE).with_name('README.md')
HIDDEN = README.with_name('.github')
V2 = 'application/vnd.x.restic.rest.v2'
LOCAL = restic_serve.parse_address('127.0.0.1:0')
LONG_TESTS = os.environ.get('RESTIC_SERVE_TEST_LONG') == '1'
PEERS = os.environ.get('RESTIC_SERVE_TEST_PEERS', '')
PATIENCE = 60  # seconds until something that should have happened counts as missing
TEST_SECONDS = 600 if LONG_TESTS else 120   # that a test may take
PYPY = sys.implementation.name == 'pypy'
# Of PyPy, where a test hides what its own modules need.
NO_WARNING = ('-W', 'ignore::RuntimeWarning:hashlib')
try:
    HAS_64_BIT_TIMES = bool(time.gmtime(1 << 33))
except OverflowError:   # of a 32-bit system
    HAS_64_BIT_TIMES = False
# Whether uploads have a name: where there is no O_TMPFILE, as in PyPy, all have.
NAMELESS = (True, False) if hasattr(os, 'O_TMPFILE') else (False,)


# ---- Tools -----------------------------------------------------------------------------------------

left_out = {'long': set(), 'missing': set()}     # tests and programs


def long(test):
    """A decorator for tests that take many seconds."""
    if not LONG_TESTS:
        left_out['long'].add(test.__qualname__.partition('.')[0].replace('Scenarios', 'Test'))
    return unittest.skipUnless(LONG_TESTS, 'RESTIC_SERVE_TEST_LONG is not set')(test)


def setUpModule():
    atexit.register(say_what_was_left_out)
    if hasattr(signal, 'setitimer'):
        patch = mock.patch.object(unittest.TestCase, 'run', run_with_limit)
        patch.start()
        unittest.addModuleCleanup(patch.stop)
    # A thread that a test has left behind may not keep this process from its end.
    unittest.addModuleCleanup(faulthandler.dump_traceback_later, 60, exit=True)


def run_with_limit(test, result=None, run=unittest.TestCase.run):
    """unittest.TestCase.run() of a test that fails, and shows where each thread is, when it takes too
    long, and every 10 seconds from then on, since what it cleans up may hang, too."""
    def fail(number, frame):
        raise AssertionError(f'{test.id()} took too long; its threads are shown above')

    signal.signal(signal.SIGALRM, fail)
    faulthandler.register(signal.SIGALRM, chain=True)   # shows the threads even if Python does not run
    signal.setitimer(signal.ITIMER_REAL, TEST_SECONDS, 10)
    try:
        return run(test, result)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.unregister(signal.SIGALRM)


def say_what_was_left_out():
    """What the tests that ran do not show, and how to run the rest."""
    if left_out['long']:
        print(f'Left out: tests that take minutes, of {", ".join(sorted(left_out["long"]))}. '
              'RESTIC_SERVE_TEST_LONG=1 runs them.', file=sys.stderr)
    if left_out['missing']:
        print(f'Left out: tests that require {", ".join(sorted(left_out["missing"]))}. Install them; '
              'RESTIC_SERVE_TEST_PEERS=FOLDER names a folder where to look, too.', file=sys.stderr)


@functools.lru_cache(maxsize=None)
def compiled():
    """The module for a process of its own, compiled: compiling it takes longer than most tests."""
    folder = tempfile.TemporaryDirectory(prefix='restic-serve-')
    atexit.register(folder.cleanup)
    return py_compile.compile(MODULE, f'{folder.name}/restic_serve.pyc', doraise=True)


def program(name, folder=''):
    """The path of a program; skips the test without it, or fails it where all must run."""
    path = shutil.which(name, path=folder or f'{os.environ.get("PATH", os.defpath)}:/usr/sbin')
    if not path:
        left_out['missing'].add(name)
        reason = f'{name} is not installed{f" in {folder}" if folder else ""}'
        if os.environ.get('RESTIC_SERVE_TEST_ALL') == '1':
            raise AssertionError(reason)
        raise unittest.SkipTest(reason)
    return path


def peer(name):
    """A program of the newer set, or the system's own."""
    return program(name, PEERS)


def free_port():
    """A port for a program that cannot choose one itself: none that the system gives to others meanwhile."""
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)
        with contextlib.suppress(OSError), socket.create_server(('127.0.0.1', port)):
            return port


def listens(address):
    """Whether a server answers at an address of TCP or a path; the path may be there before."""
    with socket.socket(socket.AF_INET if isinstance(address, tuple) else socket.AF_UNIX) as sock:
        return sock.connect_ex(address) == 0


def descriptors():
    """What this process's descriptors are of, where the system tells.  Those of other tests may end
    meanwhile: no more of them must be there afterwards."""
    found = set()
    for path in Path('/proc/self/fd').glob('*'):
        with contextlib.suppress(FileNotFoundError):
            found.add(os.readlink(path))
    return found


def named(content):
    """The name of an object."""
    return hashlib.sha256(content).hexdigest()


def path_of(store, location):
    """Where an object is stored."""
    return f'{store.root}{location.folder}/{location.file}'


def sha(password):
    """An entry that costs nothing to compare."""
    return '{SHA}' + base64.b64encode(hashlib.sha1(password.encode()).digest()).decode()


def credentials(user, password):
    """The value of a header with credentials."""
    return 'Basic ' + base64.b64encode(f'{user}:{password}'.encode()).decode()


def basic(user, password):
    """A header with credentials."""
    return f'Authorization: {credentials(user, password)}'


def select_readable(sock, seconds):
    import select
    return select.select([sock], [], [], seconds)[0]


def patch_for(test, target, **values):
    """Give attributes of a module or class other values until the test ends."""
    patch = mock.patch.multiple(target, **values)
    patch.start()
    test.addCleanup(patch.stop)


def first(act, target, name):
    """A patch of a function: before it, act(*args) is called, which may raise."""
    real = getattr(target, name)

    def call(*args, **more):
        act(*args)
        return real(*args, **more)

    return mock.patch.object(target, name, call)


def failing(when, target, name, error=errno.EIO):
    """A patch of a function: it fails where when(*args) is true."""
    def fail(*args):
        if when(*args):
            raise OSError(error, 'made by a test')

    return first(fail, target, name)


def is_folder(fd):
    return stat.S_ISDIR(os.fstat(fd).st_mode)


def raised(kind, function, *args):
    """The exception of a kind that a call raises."""
    try:
        function(*args)
    except kind as error:
        return error
    raise AssertionError(f'no {kind.__name__} was raised for {args}')


def with_distinct_shares(test):
    """Let no two addresses share a row of the counters by chance."""
    rows = collections.defaultdict(itertools.count().__next__)
    patch_for(test, restic_serve, create=True, hash=rows.__getitem__)


def counted_plainly(test):
    """Have quotas count an object's bytes and nothing else."""
    patch_for(test, restic_serve, BLOCK_BYTES=1, FOLDER_BYTES=0)


def scrub(store, age=0, bandwidth=None, report=lambda *fault: None, stream=None):
    """A scrub that was run."""
    job = restic_serve.Scrub(store, age, bandwidth, report, stream or io.StringIO())
    job.run()
    return job


def scrub_with_configs(store):
    """A scrub while each repository has a config, which tests that count bytes have not."""
    configs = [path.with_name('config') for path in Path(store.root).rglob('keys')]
    made = [path for path in configs if not path.exists()]
    for path in made:
        path.write_bytes(b'config')
    scrub(store)
    for path in made:
        path.unlink()


def metrics_of(usage, store):
    """The metrics of what a store holds."""
    return Metrics(usage.counters, restic_serve.Watch(store, usage, 3600))


def at_once(function, jobs):
    """What a function returns of each job, done in threads at the same time; raises what one raises."""
    jobs = list(jobs)
    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(function, jobs))


class Api(Api):
    """One with plain parts where a test brings none."""

    def __init__(self, store, policy, accounts=None, usage=None, metrics=None, events=None, baseurl='',
                 headers=(), allow_origin='', prometheus='', page=None, at=''):
        counters = metrics.counters if metrics else usage.counters if usage else Counters()
        accounts = accounts or Accounts()
        usage = usage or Usage(store, counters)
        metrics = metrics or metrics_of(usage, store)
        events = events or restic_serve.Events(restic_serve.Watch(store, usage, 0), counters)
        super().__init__(store, policy, accounts, baseurl, headers, allow_origin, usage, metrics, prometheus,
                         page, at, events, restic_serve.Admission(metrics, accounts))


def answer_of(api, method, target, body=b'', peer=None, **headers):
    """Status, headers and content of the answer to a request that came over no wire."""
    headers = {name.replace('_', '-'): value for name, value in headers.items()}
    body = Bytes(body) if isinstance(body, bytes) else body
    response = api.handle(Request(method, target, 'HTTP/1.1', headers, body, peer or Peer('test')))
    try:
        content = response.body
        if isinstance(content, restic_serve.FileSlice):
            content = content.read_all()
        return response.status, dict(response.headers), (
            content if isinstance(content, bytes) else b''.join(content))
    finally:
        restic_serve.close_quietly(response.body)


class Clock:
    """A clock that a test holds: it goes on when somebody sleeps."""

    def __init__(self, *today):
        hour, minute, weekday = today or (0, 0, 6)
        self.now = 1000.0
        self.day = time.struct_time((2026, 11, 22, hour, minute, 0, weekday, 0, 0))
        self._lock = threading.Lock()

    def bandwidth(self, text):
        return restic_serve.Bandwidth(restic_serve.parse_timetable(text), Counters(), lambda: self.now,
                                      today=lambda: self.day, sleep=self.sleep)

    def sleep(self, seconds):
        with self._lock:
            self.now += seconds


class Bytes:
    """Content of a request, in pieces of `step` bytes, which may end with an exception."""

    piece = 1 << 20

    def __init__(self, content, step=1 << 20, error=None, length=-1):
        self._file = io.BytesIO(content)
        self._step = step
        self._error = error
        self.length = len(content) if length == -1 else length

    def readinto(self, view):
        count = self._file.readinto(view[:self._step])
        if not count and self._error:
            raise self._error
        return count


class TestCase(unittest.TestCase):
    """A test with a folder of its own and an eye on the log."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix='restic-serve-')
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.root = self.folder / 'srv'
        self.log = []
        handler = logging.Handler()
        handler.addFilter(lambda record: record.name != restic_serve.access_log.name)
        handler.emit = lambda record: self.log.append(record.getMessage())
        restic_serve.log.addHandler(handler)
        restic_serve.log.propagate = False
        restic_serve.log.setLevel(logging.INFO)
        self.addCleanup(restic_serve.log.removeHandler, handler)
        patch_for(self, restic_serve, refusals=restic_serve.Refusals())
        before = set(threading.enumerate())
        self.addCleanup(self.wait_until, lambda: before >= set(threading.enumerate()), 'the end of threads')

    def make_store(self, **options):
        """The store of the directory, which is made if need be."""
        store = Store(str(self.root), **options)
        store.prepare()
        return store

    def make_repository(self, path=''):
        """A folder in the root that is taken for a repository; one may be there already."""
        (self.root / path.lstrip('/') / 'keys').mkdir(parents=True, exist_ok=True)

    def put_object(self, repository, kind, content, into=None):
        """Store an object in a repository, which is made if need be; its location."""
        self.make_repository(repository)
        location = Location(repository, kind, '' if kind == 'config' else named(content))
        (into or self.store).save(location, Bytes(content))
        return location

    def users(self, *names):
        """Accounts of users, each with the name for a password."""
        path = self.folder / 'htpasswd'
        path.write_text(''.join(f'{name}:{sha(name)}\n' for name in names))
        return Accounts(PasswordFile(str(path)))

    def counted(self, quotas=None, counters=None, **more):
        """The usage of the store, when it was counted."""
        usage = Usage(self.store, counters or Counters(), quotas=restic_serve.Quotas(quotas or {}), **more)
        self.addCleanup(usage.census.channel.close)
        usage.census.count()
        return usage

    def wait_until(self, condition, what):
        end = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > end:
                self.fail(f'waited in vain for: {what}')
            time.sleep(0.005)

    def files(self, folder=None):
        """All files below a folder, by their path in it."""
        folder = folder or self.root
        return sorted(str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file())

    def open_terminal(self):
        """Both ends of a terminal; the other one is to be closed by the test."""
        ours, theirs = pty.openpty()
        self.addCleanup(os.close, ours)
        return ours, theirs

    def launch(self, *words, **more):
        """A program that ends with the test."""
        process = subprocess.Popen(words, **{'stderr': subprocess.DEVNULL, **more})
        if process.stderr:
            self.addCleanup(process.stderr.close)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        return process

    def run_it(self, *words, text='', **environment):
        """Exit status, standard output and error of a run that ends by itself and may read a text."""
        done = subprocess.run([sys.executable, compiled(), *map(str, words)], capture_output=True,
                              text=True, timeout=PATIENCE, input=text,
                              env={**clean_environment(), **environment})
        return done.returncode, done.stdout, done.stderr

    def run_on_terminal(self, *words, **environment):
        """What a run that ends by itself shows on a terminal, at most a few KiB."""
        ours, theirs = self.open_terminal()
        subprocess.run([sys.executable, compiled(), *map(str, words)], stdin=subprocess.DEVNULL,
                       stdout=theirs, stderr=theirs, timeout=PATIENCE,
                       env={**clean_environment(), **environment})
        os.close(theirs)
        return os.read(ours, 10000).decode().replace('\r\n', '\n')

    def children(self, server):
        """The processes of its workers."""
        found = subprocess.run([program('ps'), '-o', 'pid=', '--ppid', str(server.process.pid)],
                               capture_output=True, text=True).stdout
        return [int(word) for word in found.split()]

    def run_server(self, *words, addr='127.0.0.1:0', **more):
        """A server in a process of its own."""
        server = Program('--addr', addr, *words, **more)
        self.addCleanup(server.__exit__)
        self.assertTrue(server.url, server.lines)
        return server

    def wait_for_line(self, server, pattern):
        self.wait_until(lambda: re.search(pattern, '\n'.join(server.lines)), pattern)

    def in_thread(self, target, *args):
        """A thread that has been started; it ends before the test does."""
        thread = threading.Thread(target=target, args=args)
        thread.start()
        self.addCleanup(thread.join, PATIENCE)
        return thread

    def serve(self, api, limits=None, addresses=(LOCAL,), max_connections=1024, per_address=None, **more):
        """A server in a thread of its own."""
        api.admission = restic_serve.Admission(api.metrics, api.accounts, max_connections, per_address)
        server = Server(api, limits or Limits(), list(addresses), **more)
        self.in_thread(server.serve)
        self.addCleanup(server.stop)
        return server

    def ask(self, *parts, port=None, **more):
        """The answer to a request on a connection of its own."""
        with Wire(port or self.port) as wire:
            return wire.ask(*parts, **more)

    def ask_unix(self, path, request=None):
        """The status of the answer over a unix socket."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(PATIENCE)
            sock.connect(str(path))
            sock.sendall(request or get('/config'))
            return int(sock.recv(65536).split()[1])


class ApiTestCase(TestCase):
    """A test of an Api without a wire."""

    def setUp(self):
        super().setUp()
        self.store = self.make_store()
        self.make_repository('host')
        self.api = Api(self.store, Policy())

    def ask(self, *args, **more):
        return answer_of(self.api, *args, **more)

    def status(self, *args, **more):
        return self.ask(*args, **more)[0]


# ---- Wires: clients made of bytes ------------------------------------------------------------------

class Wire:
    """A client's end of a connection, byte by byte."""

    def __init__(self, port):
        self.sock = socket.create_connection(('127.0.0.1', port), PATIENCE)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file = self.sock.makefile('rb')

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()
        self.sock.close()

    def send(self, *parts):
        for part in parts:
            self.sock.sendall(part if isinstance(part, bytes) else part.encode('latin-1'))

    def answer(self, head_only=False):
        """Status, headers and content of the next answer; None at the end of the connection."""
        line = self.file.readline()
        if not line:
            return None
        status = int(line.split()[1])
        headers = {}
        for line in iter(self.file.readline, b'\r\n'):
            name, _, value = line.decode('latin-1').partition(':')
            headers[name.lower()] = value.strip()
        if head_only or status == 100:
            return status, headers, b''
        if 'content-length' in headers:
            return status, headers, self.file.read(int(headers['content-length']))
        if headers.get('transfer-encoding') != 'chunked':
            return status, headers, self.file.read()
        content = b''
        while True:
            size = int(self.file.readline(), 16)
            content += self.file.read(size)
            if self.file.readline() != b'\r\n':
                raise AssertionError('a chunk without its end')
            if not size:
                return status, headers, content

    def ask(self, *parts, **more):
        self.send(*parts)
        return self.answer(**more)

    def ask_last(self, *parts):
        """The answer to a request after which the server is to end the connection."""
        answer = self.ask(*parts)
        if not self.is_closed():
            raise AssertionError(f'the connection goes on after {answer}')
        return answer

    def reset_at_end(self):
        """Have the end of the connection be a reset."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))

    def is_closed(self):
        """Whether the server ends the connection, and says nothing more."""
        try:
            return self.file.read() == b''
        except ConnectionResetError:
            return True


def post(path, content, *fields, length=None):
    """A request that uploads, as bytes."""
    head = [f'POST {path} HTTP/1.1', 'Host: x',
            f'Content-Length: {len(content) if length is None else length}', *fields]
    return '\r\n'.join(head).encode() + b'\r\n\r\n' + content


def get(path, *fields, method='GET'):
    return '\r\n'.join([f'{method} {path} HTTP/1.1', 'Host: x', *fields, '', '']).encode()


class Pieces:
    """A connection on which pieces of bytes arrive, and then the end of input."""

    expired, limits, clock = False, Limits(header_bytes=100), time.monotonic

    def __init__(self, *pieces):
        self.pieces = [piece for piece in pieces if piece]
        self.sent = b''

    def receive_into(self, view):
        piece = self.pieces.pop(0) if self.pieces else b''
        if len(piece) > len(view):
            self.pieces.insert(0, piece[len(view):])
        count = min(len(piece), len(view))
        view[:count] = piece[:count]
        return count

    def transmit(self, data, more=False):
        self.sent += data


class WireTestCase(TestCase):
    """A test against a server in a thread of its own."""

    limits = {}
    repositories = '', 'host'   # that are there from the start

    def setUp(self):
        super().setUp()
        patch_for(self, restic_serve, FIRST_SECONDS=PATIENCE)   # a short list is whole on a busy machine, too
        self.store = self.make_store()
        for path in self.repositories:
            self.make_repository(path)
        self.policy = Policy()
        self.server = self.serve(Api(self.store, self.policy), Limits(**self.limits))
        if self.limits:
            self.server.sweep_seconds = 0.05
        self.port = self.server.listeners[0].server_address[1]

    def connect(self):
        wire = Wire(self.port)
        self.addCleanup(wire.__exit__)
        return wire

    def put(self, content, kind='data', repository=''):
        """Store an object beneath the server, in a repository of that name; its path."""
        return f'{repository}/{kind}/{self.put_object(repository, kind, content).name}'

    def wait_for_one_connection(self):
        """Until a connection has come, and all have ended."""
        self.wait_until(lambda: self.server.served, 'a connection')
        self.wait_until(lambda: not self.server.served, 'its end')

    def begin_upload(self, content=b'0123456789', sent=b''):
        """A connection of which the server awaits the rest of an upload."""
        wire = self.connect()
        head = post(f'/data/{named(content)}', b'', 'Expect: 100-continue', length=len(content))
        self.assertEqual(wire.ask(head)[0], 100)
        wire.send(sent)
        return wire

    def ask_last(self, *parts):
        with Wire(self.port) as wire:
            return wire.ask_last(*parts)

    def wait_for_room(self, port):
        """Until one more connection is admitted."""
        self.wait_until(lambda: self.ask(get('/config'), port=port)[0] == 404, 'room')


(DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE,
 CONTINUATION) = range(10)
END_STREAM = ACK = 1
END_HEADERS, PADDED, PRIORITIZED = 4, 8, 32
frame = restic_serve.frame


def fields(method='GET', path='/', *more, **pseudo):
    """A request's header block, for a table of any size; `more` fields follow the pseudo-header
    fields."""
    block = {'method': method, 'scheme': 'http', 'path': path, 'authority': 'x', **pseudo}
    return restic_serve.encode_headers(
        [(f':{name}', value) for name, value in block.items() if value is not None] + list(more))[1:]


def headers(number, block=None, flags=END_HEADERS | END_STREAM):
    return frame(HEADERS, flags, number, fields() if block is None else block)


def settings(*pairs):
    return frame(SETTINGS, 0, 0, b''.join(struct.pack('>HI', *pair) for pair in pairs))


def word(value):
    return struct.pack('>I', value)


class Http2Wire(Wire):
    """A client's end of a connection of HTTP/2, frame by frame; content is counted, and granted
    again if `grants`."""

    def __init__(self, sock, preface=True, grants=True, initial=65535):
        self.sock, self.file = sock, sock.makefile('rb')
        self.decoder = restic_serve.HeaderDecoder()
        self.grants = grants
        self.settings = {}
        self.window = 65535     # content that may still be sent
        self.windows = collections.defaultdict(lambda: self.settings.get(4, 65535))     # and on each stream
        self.unread = []        # frames that came while content was sent
        if preface:
            self.send(restic_serve.PREFACE, settings((4, initial)))
            while self.next()[0] != SETTINGS or not self.settings:
                pass
            self.send(frame(SETTINGS, ACK, 0))

    def next(self):
        """Type, flags, stream and payload of the next frame; None at a clean end."""
        return self.unread.pop(0) if self.unread else self._read_frame()

    def _read_frame(self):
        head = self.file.read(9)
        if not head:
            return None
        length, flags, number = struct.unpack('>IBI', head)
        kind, payload = length & 255, self.file.read(length >> 8)
        if len(payload) != length >> 8:
            raise AssertionError('a frame is cut short')
        if kind == SETTINGS and not flags & ACK:
            self.settings = dict(struct.iter_unpack('>HI', payload))
        if kind == WINDOW_UPDATE and number:
            self.windows[number] += int.from_bytes(payload, 'big')
        elif kind == WINDOW_UPDATE:
            self.window += int.from_bytes(payload, 'big')
        if kind == DATA and payload and self.grants:
            self.send(frame(WINDOW_UPDATE, 0, 0, word(len(payload))))
            if not flags & END_STREAM:
                self.send(frame(WINDOW_UPDATE, 0, number, word(len(payload))))
        return kind, flags, number, payload

    def until(self, *kinds, number=None):
        """The next frame of one of these types, or None."""
        while True:
            got = self.next()
            if not got or (got[0] in kinds and number in (None, got[2])):
                return got

    def answer(self, number=1):
        """Status, headers and content of the answer on a stream, or the code of its RST_STREAM."""
        fields, content, ended = {}, b'', False
        while not ended:
            got = self.until(HEADERS, DATA, RST_STREAM, GOAWAY)
            if got is None or got[0] == GOAWAY:
                raise AssertionError(f'instead of an answer: {got}')
            kind, flags, where, payload = got
            if kind == HEADERS:
                decoded = dict(self.decoder.decode(payload, 1 << 20)[0])
            if where != number:
                continue
            ended = kind != RST_STREAM and flags & END_STREAM
            if kind == RST_STREAM:
                return int.from_bytes(payload, 'big')
            if kind == HEADERS:
                fields = decoded
                if fields[':status'] == '100':
                    return 100, fields, b''
            else:
                content += payload
        return int(fields[':status']), fields, content

    def ask(self, number, method='GET', path='/', *more):
        """The answer to a request without content."""
        self.send(headers(number, fields(method, path, *more)))
        return self.answer(number)

    def ping(self):
        """Wait until the server has read all that was sent."""
        self.send(frame(PING, 0, 0, bytes(8)))
        self.until(PING)

    def upload(self, number, path, content, *more, step=16384):
        """Send a whole upload, as the windows let it."""
        self.send(headers(number, fields('POST', path, *more), END_HEADERS))
        self.send_content(number, content, step=step)

    def send_content(self, number, content, last=True, step=16384):
        """Send content when the windows let it; the rest of it not if it has been answered."""
        for at in range(0, len(content), step):
            part = content[at:at + step]
            while len(part) > min(self.window, self.windows[number]):
                got = self._read_frame()
                if got is None:
                    raise AssertionError('the end of the connection')
                self.unread.append(got)
                if got[0] in (HEADERS, RST_STREAM) and got[2] == number:
                    return
            self.window -= len(part)
            self.windows[number] -= len(part)
            self.send(frame(DATA, END_STREAM if last and at + step >= len(content) else 0, number, part))

    def send(self, *parts):
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the answer is still read
            super().send(*parts)


def resident():
    """Bytes of this process that are in memory, 0 where nothing tells."""
    path = Path('/proc/self/statm')
    return int(path.read_text().split()[1]) * 4096 if path.exists() else 0


class Http2TestCase(WireTestCase):
    WIRES = ('HTTP/1.1', 'HTTP/2')

    class Pipes(restic_serve.PipeTransport):
        """A socket that stands for standard input and output."""

        def __init__(self, sock):
            super().__init__(sock.fileno(), os.dup(sock.fileno()))
            self.sock = sock

        def close(self):
            super().close()
            os.close(self._target)
            self.sock.close()

    def http2(self, server=None, **more):
        """A client of HTTP/2 that is closed when the test ends."""
        pipes, wire = self.piped(server or self.server, **more)
        self.addCleanup(self.wait_until, lambda: not any(
            connection._transport is pipes for connection in (server or self.server).served.copy()),
            'its end')
        self.addCleanup(wire.__exit__)
        return wire

    def exchange(self, wire, method, path, content=b'', *more):
        """Status and content of an answer on a connection of its own; a reset stream is its code."""
        if wire == 'HTTP/1.1':
            lines = map(': '.join, more)
            request = post(path, content, *lines) if method == 'POST' else get(path, *lines, method=method)
            answer = self.ask(request, head_only=method == 'HEAD')
        else:
            with self.http2() as client:
                if content:
                    client.upload(1, path, content, ('content-length', str(len(content))), *more)
                    answer = client.answer()
                else:
                    answer = client.ask(1, method, path, *more)
        return answer[::2] if isinstance(answer, tuple) else (answer, b'')

    def piped(self, server, **more):
        """The server's side of a connection by HTTP/2, and the client's."""
        ours, theirs = socket.socketpair()
        ours.settimeout(PATIENCE)
        pipes = self.Pipes(theirs)
        server.begin(pipes, Peer('127.0.0.1'))
        server.loop.wake()
        return pipes, Http2Wire(ours, **more)


class ListenerTestCase(WireTestCase):
    """A test with servers beside the one of each test."""

    def start(self, *addresses, **more):
        """Another server of the same directory, in a thread."""
        return self.serve(self.server.api, self.server.limits,
                          map(restic_serve.parse_address, addresses), **more)


def rendered(store, usage):
    """The page of all repositories, for an administrator."""
    return Page(restic_serve.Watch(store, usage, 3600)).render(restic_serve.Visit(
        '', '', '', '', lambda repository: 'write', [''], None, True, 'http://x', ''))


class WatchedTestCase(Http2TestCase):
    """A server whose page and metrics are looked at."""

    repositories = ()

    def setUp(self):
        super().setUp()
        counted_plainly(self)
        self.watch()

    def watch(self, policy=None, accounts=None, prometheus='login', max_bytes=0, per_user=0, wait=True,
              past=None, **more):
        """Another server, that shows what it knows."""
        counters = Counters()
        self.usage = Usage(self.store, counters, past=past,
                           quotas=restic_serve.Quotas({'/': max_bytes, '/%u': per_user}))
        self.metrics = metrics_of(self.usage, self.store)
        self.server = self.serve(Api(
            self.store, policy or self.policy, accounts, usage=self.usage, metrics=self.metrics,
            prometheus=prometheus, page=Page(restic_serve.Watch(self.store, self.usage, 3600)), **more))
        self.port = self.server.listeners[0].server_address[1]
        if prometheus and wait:
            self.usage.census.wait(PATIENCE)

    def fill(self, repository, *kinds, age=0):
        """Store objects beneath the server."""
        Store(str(self.root)).create_repository(repository)
        for kind in kinds:
            path = path_of(self.store, self.put_object(repository, kind, os.urandom(100)))
            os.utime(path, (time.time() - age, time.time() - age))

    def scrub(self):
        scrub_with_configs(self.store)

    def scrape(self, *fields):
        """The samples by their names with labels."""
        status, head, content = self.ask(get('/metrics', *fields))
        self.assertEqual(status, 200)
        self.assertEqual(head['content-type'], 'text/plain; version=0.0.4; charset=utf-8')
        return dict(line.rpartition(' ')[::2] for line in content.decode().splitlines()
                    if not line.startswith('#'))


def normalized(text):
    """The samples of rest-server's metrics, whatever the order of their labels."""
    return {(name, tuple(sorted(labels.split(',')))): float(value) for name, labels, value in re.findall(
        r'^(rest_server_blob_\w+)\{(.*)\} (\S+)$', text, re.MULTILINE)}


class Authority:
    """Certificates for tests, made by openssl."""

    def __init__(self, folder, *names):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.openssl = program('openssl')
        self.number = 0
        self.run('req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes',
                 '-days', '2', '-subj', '/CN=test authority',
                 '-addext', 'keyUsage=critical,keyCertSign,cRLSign', '-keyout', folder / 'ca.key', '-out',
                 folder / 'ca.pem')
        self.path = folder / 'ca.pem'
        for name in names:
            self.issue(name)

    def run(self, *words):
        return subprocess.run([self.openssl, *map(str, words)], check=True, capture_output=True,
                              text=True, cwd=self.folder, stdin=subprocess.DEVNULL).stdout

    def issue(self, name, subject='localhost'):
        """Write NAME.pem, NAME.key and, for clients, NAME.both; the serial number."""
        self.number += 1
        request, extensions = self.folder / f'{name}.csr', self.folder / 'extensions'
        extensions.write_text('subjectAltName=DNS:localhost,IP:127.0.0.1\n'
                              'subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n')
        key = self.folder / f'{name}.key.new'
        self.run('req', '-new', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes',
                 '-subj', f'/CN={subject}', '-keyout', key, '-out', request)
        cert = self.folder / f'{name}.pem.new'
        self.run('x509', '-req', '-in', request, '-CA', self.path, '-CAkey', self.folder / 'ca.key',
                 '-set_serial', self.number, '-days', '2', '-extfile', extensions, '-out', cert)
        (self.folder / f'{name}.both').write_text(cert.read_text() + key.read_text())
        key.replace(self.folder / f'{name}.key')
        cert.replace(self.folder / f'{name}.pem')
        return self.number

    def certificates(self, name='server', **more):
        """What a server makes of them."""
        files = (str(self.folder / f'{name}.{end}') for end in ('pem', 'key'))
        return restic_serve.Certificates(*files, **more)

    def words(self, name):
        return '--cert', self.folder / f'{name}.pem', '--key', self.folder / f'{name}.key'


# ---- Programs --------------------------------------------------------------------------------------

class Program:
    """The server as a process of its own.  `url` is what it says of itself; `change` is a statement that
    changes one of the module's constants."""

    def __init__(self, *words, wait=True, before=(), change='', **environment):
        self.lines = []
        changed = ['-c', f'import sys; sys.path.insert(0, {os.path.dirname(MODULE)!r}); '
                         f'import restic_serve; restic_serve.{change}; sys.exit(restic_serve.main())']
        self.process = subprocess.Popen(
            [*before, sys.executable, *(changed if change else [compiled()]), *map(str, words)],
            stderr=subprocess.PIPE, text=True,
            stdin=subprocess.DEVNULL, env={**clean_environment(), **environment})
        self.url = ''
        self._reader = None
        if wait:
            for line in self.process.stderr:
                self.lines.append(line.rstrip('\n'))
                match = re.search(r'restic -r rest:(\S+) init', line)
                if match:
                    # A host need not resolve the name in a certificate.
                    self.url = match[1].replace('//localhost:', '//127.0.0.1:')
                    break
            self._reader = threading.Thread(target=self._read)
            self._reader.start()

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line.rstrip('\n'))

    @property
    def port(self):
        return int(re.search(r':(\d+)', self.url)[1])

    def stop(self, number=signal.SIGTERM):
        """Its exit status after a signal."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self._reader:
            self._reader.join()
        self.process.stderr.close()


def clean_environment():
    return {name: value for name, value in os.environ.items() if not name.startswith('RESTIC_')}


class Stdio:
    """The server over pipes, or over one socket for both, as a process of its own."""

    def __init__(self, *words, socketed=False, program=(), **environment):
        ours, theirs = socket.socketpair() if socketed else (None, subprocess.PIPE)
        self.process = subprocess.Popen(
            [sys.executable, *(program or [compiled()]), '--stdio', *map(str, words)], stdin=theirs,
            stdout=theirs, stderr=subprocess.PIPE, env={**clean_environment(), **environment})
        self._socket = ours
        if socketed:
            theirs.close()
            ours.settimeout(PATIENCE)
        self.wire = Http2Wire(ours or self)

    def makefile(self, mode):
        return self.process.stdout

    def sendall(self, data):
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def close(self):
        if self._socket:
            self._socket.shutdown(socket.SHUT_WR)
        else:
            self.process.stdin.close()

    def finish(self, close=False):
        """Exit status, and what it has logged; `close` its input before."""
        if close:
            self.close()
        with self.process.stderr as log:
            text = log.read().decode()
        return self.process.wait(PATIENCE), text

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout, self.process.stderr, self._socket):
            if file:
                file.close()
        self.wire.file.close()


def hashing(in_python):
    """A context in which passwords are hashed in Python, or as this system can."""
    return (mock.patch.object(restic_serve, 'is_in_c', return_value=False) if in_python
            else contextlib.nullcontext())


def refusal(*args, **environment):
    """The line with which a command line is refused with status 2, empty if it is not."""
    with contextlib.redirect_stderr(io.StringIO()) as error:
        try:
            parser = restic_serve.Parser(environment)
            options = parser.parse(list(args))
            restic_serve.check_options(parser, options)
            restic_serve.find_directory(parser, options)
            return ''
        except SystemExit as end:
            line, newline, rest = error.getvalue().partition('\n')
            assert (end.code, newline, rest) == (2, '\n', ''), error.getvalue()
            return line


# ---- Units -----------------------------------------------------------------------------------------

class UnitsTest(unittest.TestCase):
    def test_durations_are_written_as_in_rclone(self):
        for text, seconds in (('1h0m0s', 3600), ('300ms', 0.3), ('2d', 172800), ('90', 90),
                              ('1.5s', 1.5), ('0', 0), ('1m30s', 90), ('1w', 604800)):
            self.assertAlmostEqual(restic_serve.parse_duration(text), seconds, msg=text)

    def test_addresses(self):
        for text, address in (
                ('1.2.3.4:8000', ('', '1.2.3.4', 8000, '')), (':8080', ('', '', 8080, '')),
                ('[::1]:8080', ('', '::1', 8080, '')), ('localhost:0', ('', 'localhost', 0, '')),
                ('http://:80', ('http', '', 80, '')), ('tls://[::]:443', ('tls', '::', 443, '')),
                ('unix:///run/socket', ('', '', 0, '/run/socket')),
                ('unix:/run/socket', ('', '', 0, '/run/socket')), ('/a b', ('', '', 0, '/a b'))):
            self.assertEqual(restic_serve.parse_address(text), address)

    def test_the_three_spellings_of_a_base_url_are_one(self):
        for text in ('backup', '/backup', 'backup/', '/backup/'):
            self.assertEqual(restic_serve.parse_baseurl(text), '/backup')
        self.assertEqual(restic_serve.parse_baseurl('/'), '')

    def test_quotas_are_bytes_unless_a_suffix_says_otherwise(self):
        for text, size in (('1000', 1000), ('0', 0), ('10M', 10 << 20), ('1.5G', 3 << 29), ('100B', 100)):
            self.assertEqual(restic_serve.parse_quota(text), size)

    def test_sizes_and_times_for_people(self):
        for size, text in ((0, '0 B'), (999, '999 B'), (1000, '1.0 KiB'), (1536, '1.5 KiB'),
                           (10 << 30, '10.0 GiB'), (1 << 62, '4096.0 PiB'), (-2048, '-2.0 KiB')):
            self.assertEqual(restic_serve.format_size(size), text)
        for seconds, text in ((0, '0 s'), (9.9, '9 s'), (60, '1 m'), (200, '3 m 20 s'), (7200, '2 h'),
                              (190000, '2 d 4 h')):
            self.assertEqual(restic_serve.format_duration(seconds), text)

    def test_a_count_has_its_noun_in_the_right_number(self):
        for count, noun, text in ((1, 'index', '1 index'), (2, 'index', '2 indexes'), (0, 'key', '0 keys'),
                                  (1234, 'repository', '1,234 repositories')):
            self.assertEqual(restic_serve.format_count(count, noun), text)

    def test_twice_the_text_of_a_client_is_at_most_two_and_a_half_times_the_work(self):
        def identify(name, accounts):
            return lambda text: identified(accounts, Peer('127.0.0.1'), **{name: text})

        def forwarded(name):
            return lambda text: list(restic_serve.forwarded_addresses({name: text}))

        def seconds(parse, text):
            begin = time.thread_time()      # other threads and processes do not count
            with contextlib.suppress(Exception):
                parse(text)
            return time.thread_time() - begin

        users = identify('authorization', Accounts(user='a', password='b'))
        for parse, patterns in (
                (restic_serve.parse_duration, '1 1s 1h0m \u0663'), (restic_serve.parse_past, '1 2026- 1d'),
                (lambda text: restic_serve.parse_range(f'bytes={text}', 5), '1 1- -'),
                (forwarded('forwarded'), 'for=" for=::1, ; "\\ ='), (forwarded('x-forwarded-for'), '::1, :'),
                (identify('x_user', Accounts(user_header='X-User')), 'a \xc3\xa9 e\xcc\x81 .'),
                (lambda text: users(credentials(text, text)), 'a e\u0301 \u0301\u0327'),
                (users, 'Basic YWE6 ='), (restic_serve.parse_path, '/a /%41 /.at/ /data/ /e\u0301 /%cc%81'),
                (lambda text: restic_serve.parse_head(f'GET {text} HTTP/1.1\r\nHost: x\r\n'), '/a http://'),
                (lambda text: restic_serve.parse_head(f'GET / HTTP/1.1\r\nHost: x\r\n{text}'),
                 'A:b\r\n A: \r\n'), (restic_serve.one_line, '\1 a'),
                (lambda text: restic_serve.body_length({'content-length': text}, 'HTTP/1.1'), '1'),
                (lambda text: restic_serve.HeaderDecoder().decode(text.encode('latin-1'), 1 << 30),
                 '\x82 @\1a\1b \x7f\xff \0\x81\xff')):
            for pattern, end in itertools.product(patterns.split(' '), ('', 'x')):
                for _ in range(9):      # a busy machine may need several
                    once, twice = (min(seconds(parse, pattern * count + end) for _ in range(3))
                                   for count in (10_000, 20_000))
                    if twice < max(2.5 * once, 0.01):
                        break
                else:
                    self.fail(f'{pattern}, {end}: {twice} after {once}')

    def test_an_error_names_the_value_and_what_would_be_right(self):
        for parse, texts in (
                (restic_serve.parse_duration, ('10x', '', '5s 3m')), (restic_serve.parse_count, ('0', '-1')),
                (restic_serve.parse_address, ('::1:80', 'host:99999', 'unix://relative', 'ftp://:80',
                                              '://:80', '/', 'tls:///socket', '8080')),
                (restic_serve.parse_header, ('no colon', 'A: b\r\nC: d', 'Content-Length: 3')),
                (restic_serve.parse_origin, ('example.org',)), (restic_serve.parse_bool, ('maybe',)),
                (restic_serve.parse_tls_version, ('ssl3',)), (restic_serve.parse_baseurl, ('/a//b', '?'))):
            for text in texts:
                said = str(raised(ValueError, parse, text))
                self.assertIn(repr(text.partition(':')[0] if 'Length' in text else text), said)
                self.assertNotIn('\n', said)


# ---- Messages --------------------------------------------------------------------------------------

class OneLineTest(TestCase):
    def test_what_is_said_is_one_line_that_reads_as_it_is_written(self):
        for text, said in (('plain', 'plain'), ('süß 漢字', 'süß 漢字'), ('a\nb', r'a\nb'),
                           ('\x1b[31m', r'\x1b[31m'),
                           ('\x85\x9b', r'\x85\x9b'), ('\u202egpj.exe', r'\u202egpj.exe'),
                           ('\u2028\u2029\u200f', r'\u2028\u2029\u200f'), ('\udc80', r'\udc80'), (17, '17')):
            self.assertEqual(restic_serve.one_line(text), said)

    def test_every_line_of_the_log_is(self):
        formatter = restic_serve.LogFormatter(True)
        record = logging.LogRecord('restic_serve', logging.INFO, '', 0, '%s %s',
                                   ('DELETE', '/a\u202e\x85\n\u2028'), None)
        self.assertEqual(formatter.format(record), r'<6>INFO: DELETE /a\u202e\x85\n\u2028')
        record = logging.LogRecord('restic_serve', logging.INFO, '', 0, 'x', (), None)
        try:
            raise ValueError('y')
        except ValueError:
            record.exc_info = sys.exc_info()
        self.assertGreater(formatter.format(record).count('\n'), 1)     # a traceback is not

    def test_a_log_file_is_for_its_owner_and_group(self):
        self.addCleanup(os.umask, os.umask(0o022))
        path = self.folder / 'log'
        handler = restic_serve.LogFile(str(path))
        handler.emit(logging.LogRecord('x', logging.INFO, '', 0, '\udc80ü', (), None))
        handler.close()
        self.assertEqual(stat.S_IMODE(path.stat().st_mode), 0o640)
        self.assertEqual(path.read_text(encoding='utf-8'), '\\udc80ü\n')


class RangeTest(unittest.TestCase):
    def test_one_byte_range_is_a_slice(self):
        for value, part in (('bytes=0-', (0, 10)), ('bytes=2-4', (2, 3)), ('bytes=9-9', (9, 1)),
                            ('bytes=5-99', (5, 5)), ('bytes=-3', (7, 3)), ('bytes=-99', (0, 10)),
                            ('BYTES=1-1', (1, 1))):
            self.assertEqual(restic_serve.parse_range(value, 10), part, value)

    def test_what_is_malformed_or_several_is_ignored(self):
        for value in ('bytes=', 'bytes=-', 'bytes=4-2', 'bytes=1-2,4-5', 'bytes=a-b', 'items=0-1',
                      'bytes = 0-1', 'bytes=0-1x', '', 'bytes=0x1-2', 'bytes=+1-2'):
            self.assertIsNone(restic_serve.parse_range(value, 10), value)

    def test_past_the_end_is_416_with_the_size(self):
        for value in ('bytes=10-', 'bytes=11-20', 'bytes=-0'):
            error = raised(HttpError, restic_serve.parse_range, value, 10)
            self.assertEqual((error.status, *error.headers), (416, ('Content-Range', 'bytes */10')))

    def test_of_nothing_there_are_no_parts(self):
        for value in ('bytes=0-', 'bytes=5-', 'bytes=-1'):
            self.assertIsNone(restic_serve.parse_range(value, 0))


class ForwardedTest(unittest.TestCase):
    def test_addresses_are_read_from_the_last_proxy_s_word_on(self):
        for value, expected in (
                ('1.2.3.4', ['1.2.3.4']), ('1.2.3.4, 5.6.7.8', ['5.6.7.8', '1.2.3.4']),
                ('1.2.3.4:99', ['1.2.3.4']), ('[2001:DB8::1]:99', ['2001:db8::1']),
                ('2001:db8::1', ['2001:db8::1']), ('::ffff:1.2.3.4', ['1.2.3.4']),
                ('1.2.3.4, rubbish, 5.6.7.8', ['5.6.7.8']),
                *((bad, []) for bad in ('1.2.3.4,', '', 'unknown', '1.2.3.400', '1.2.3.4 5.6.7.8'))):
            self.assertEqual(list(restic_serve.forwarded_addresses({'x-forwarded-for': value})), expected,
                             value)
        for value, expected in (
                ('for=1.2.3.4', ['1.2.3.4']), ('by=9.9.9.9; FOR="1.2.3.4:5";proto=http', ['1.2.3.4']),
                ('for=1.2.3.4, for="[2001:db8::1]:47011"', ['2001:db8::1', '1.2.3.4']),
                ('for=5.6.7.8;host="x;for=1.2.3.4"', ['5.6.7.8']),
                ('host="x, for=1.2.3.4";for=5.6.7.8', ['5.6.7.8']),
                *((bad, []) for bad in ('for=1.1.1.1;for=2.2.2.2', 'host="x\\", for=1.2.3.4', 'for=_hidden',
                                        'for=1.2.3.4, for=unknown', 'by=1.2.3.4', 'xfor=1.2.3.4'))):
            self.assertEqual(list(restic_serve.forwarded_addresses({'forwarded': value})), expected, value)

    def test_a_header_that_the_client_adds_changes_nothing(self):
        for other in ('for=6.6.6.6', 'nonsense', ''):
            headers = {'x-forwarded-for': '1.2.3.4', 'forwarded': other}
            self.assertEqual(list(restic_serve.forwarded_addresses(headers)), ['1.2.3.4'])

    def test_no_more_is_read_than_is_needed(self):
        found = restic_serve.forwarded_addresses({'x-forwarded-for': '::,' * 3000 + '1.2.3.4'})
        self.assertEqual(next(found), '1.2.3.4')
        self.assertEqual(len(list(found)), restic_serve.HOPS - 1)


class AccessLogTest(WireTestCase):
    def setUp(self):
        super().setUp()
        self.lines = []
        handler = logging.Handler()
        handler.emit = lambda record: self.lines.append(record.getMessage())
        restic_serve.access_log.addHandler(handler)
        restic_serve.access_log.setLevel(logging.INFO)
        self.addCleanup(restic_serve.access_log.setLevel, logging.NOTSET)
        self.addCleanup(restic_serve.access_log.removeHandler, handler)

    COMBINED = (r'127\.0\.0\.1 - - \[\d\d/[A-Z][a-z]{2}/\d{4}:\d\d:\d\d:\d\d [+-]\d{4}\] '
                r'"%s" %d %s "%s" "%s" \d+\.\d{3}$')

    def check(self, *parts):
        self.wait_until(lambda: self.lines, 'a line')
        request, *parts = parts
        request += r' HTTP/1\.1' * (request != '-')
        self.assertRegex(self.lines.pop(0), self.COMBINED % (request, *parts))

    def test_a_line_a_request_in_the_combined_log_format(self):
        path = self.put(b'content')
        large = self.put(bytes(1 << 20))
        for request, *parts in (
                (get(path, 'User-Agent: restic/0.19'), f'GET {path}', 200, '7', '-', 'restic/0.19'),
                (get('/config?a=b', 'Referer: http://x'), r'GET /config\?a=b', 404, r'\d+', 'http://x', '-'),
                (get(large), f'GET {large}', 200, str(1 << 20), '-', '-'),
                (get(large, method='HEAD'), f'HEAD {large}', 200, '-', '-', '-'),
                (get('/data/', 'Accept: ' + V2), 'GET /data/', 200, r'\d{3}', '-', '-')):
            self.ask(request, head_only=request.startswith(b'HEAD'))
            self.check(*parts)

    def test_no_client_can_forge_a_line(self):
        for request, *parts in (
                (get('/"x\\', 'User-Agent: a" \\\xe9'), r'GET /\\x22x\\x5c', 404, r'\d+', '-',
                 r'a\\x22 \\x5c\\xc3\\xa9'),
                (get('/' + 'x' * 999, 'User-Agent: ' + '\xe9' * 99), 'GET /x{196}...', 400, r'\d+', '-',
                 r'[\\xca39]{197}...'),
                (b'rubbish "\r\n\r\n', '-', 400, r'\d+', '-', '-'),
                (get('/config', 'Expect: wonders'), 'GET /config', 417, r'\d+', '-', '-')):
            self.ask(request)
            self.check(*parts)

    def test_an_upload_whose_client_goes_has_its_line(self):
        with Wire(self.port) as wire:
            wire.send(post('/config', b'1', length=10))
            self.wait_until(lambda: self.server.served, 'a connection')
            wire.reset_at_end()
        self.check('POST /config', 499, '-', '-', '-')


class RefusalsTest(TestCase):
    """What clients are refused is logged in full at first, then counted."""

    def test_a_kind_of_a_client_is_logged_in_full_at_first_and_once_a_minute(self):
        clock = mock.Mock(monotonic=mock.Mock(return_value=0))
        refusals = restic_serve.Refusals()

        def lines(count, client, user='', kind='no', seconds=0):
            """What is logged when a client has been refused so often, and so many seconds later."""
            self.log.clear()
            for _ in range(count):
                refusals.log(restic_serve.NOTICE, kind, Peer(client), user, '%s', client)
            clock.monotonic.return_value += seconds
            refusals.tell()
            return self.log

        with mock.patch.object(restic_serve, 'time', clock):
            self.assertEqual(lines(1000, 'x'), 5 * ['x'])
            self.assertEqual(lines(2, 'x', 'alice'), 2 * ['x'])
            self.assertEqual(lines(2, 'x', kind='other'), 2 * ['x'])
            self.assertEqual(lines(4, '2001:db8::1'), 4 * ['2001:db8::1'])
            self.assertEqual(lines(4, '2001:db8::2'), ['2001:db8::2'])      # of the same network
            self.assertEqual(lines(9, 'x', seconds=60), ['no: another 1007, from x (1004), 2001:db8::2 (3)'])
            self.assertEqual(lines(9, 'x'), ['x'])          # it has gone on
            self.assertEqual(lines(0, 'x', seconds=200), ['no: another 8, from x (8)'])
            self.assertEqual(lines(9, 'x', seconds=60)[:5], 5 * ['x'])
            clients = [str(number) for number in range(restic_serve.LIMITED_KEYS + 9)]
            self.assertLess(sum(len(lines(1, client)) for client in clients), restic_serve.LIMITED_KEYS)
            refusals.count('limit:', 'x')
            self.assertEqual(lines(0, 'x'), ['limit: 1, from x (1)'])   # at once, then once a minute
            refusals.count('limit:', 'x')
            self.assertEqual(lines(0, 'x'), [])
            self.assertIn('limit: 1, from x (1)', lines(0, 'x', seconds=60))

    def test_no_refusal_fills_the_log(self):
        long = 'x' * 240
        policy = Policy(restic_serve.Rights([restic_serve.Rule('alice', '/a', 'read', 0, 0)]))
        api = Api(self.make_store(), policy, self.users('alice'))
        login, api.store.objects = credentials('alice', 'alice'), mock.Mock(side_effect=OSError)
        for method, target, kind, headers in (
                ('GET', '/config', 'authentication failed', {'authorization': credentials(99 * '\xe9', 'b')}),
                ('GET', f'/{long}/config', 'access denied', {'authorization': login}),
                ('DELETE', f'/a/{long}/config', 'access denied', {'authorization': login}),
                ('POST', f'/a/data/{long}/?create=true', 'reserved name', {'authorization': login}),
                ('GET', f'/a/{long}/.at/1/keys/', 'earlier state', {'authorization': login}),
                ('GET', f'/a/{long}/keys/', 'errors', {'authorization': login}),
                ('POST', f'/a/locks/{"0" * 64}', 'access denied', {'authorization': login}),
                ('GET', '/config', 'blocked a request from a web page', {'origin': long})):
            self.log.clear()
            for _ in range(20):
                answer_of(api, method, target, bytes(5000), Peer('1.2.3.4'), **headers)
            self.assertEqual(len(self.log), 5, (target[:20], self.log))
            self.assertLess(max(map(len, self.log)), 500, self.log[0])
            restic_serve.refusals.tell(at_once=True)
            restic_serve.refusals.__init__()
            self.assertRegex(self.log[-1], f'^{kind}: another 15, from (alice at )?1.2.3.4 .15.$')


# ---- Files -----------------------------------------------------------------------------------------

class WatchedFilesTest(TestCase):
    """What users, rights and certificates have in common, with users."""

    def setUp(self):
        super().setUp()
        self.path = self.folder / 'htpasswd'
        self.write('alice')
        self.file = PasswordFile(str(self.path))
        self.clock = 0
        patch_for(self, restic_serve.time, monotonic=lambda: self.clock)

    def write(self, *names, end='\n'):
        self.path.write_text('\n'.join(f'{name}:{sha(name)}' for name in names) + end)

    def users_after(self, seconds, force=False):
        self.clock += seconds
        self.file.look(force)
        return list(self.file.entries)

    def test_a_file_counts_when_it_rests_and_a_new_one_and_with_sighup_at_once(self):
        self.assertEqual(self.users_after(1), ['alice'])
        self.write('bob')
        for seconds in (60, 0.9):       # since when it rests is not known before the first look
            self.assertEqual(self.users_after(seconds), ['alice'])
        self.write('bob', 'carol')      # it was half of a file
        for seconds, users in ((0.1, ['alice']), (0.9, ['alice']), (0.1, ['bob', 'carol'])):
            self.assertEqual(self.users_after(seconds), users)
        self.write('dora')
        self.users_after(0, force=True)
        self.assertEqual(self.users_after(0, force=True), ['dora'])     # whether or not it has changed
        other, self.path = self.path, self.folder / 'new'
        self.write('eve')
        self.path.rename(other)
        self.assertEqual(self.users_after(0), ['eve'])
        self.users_after(60)
        self.assertEqual(self.log, [f'read {count} from {other}' for count in (
            '2 users', '1 user', '1 user', '1 user')])

    def test_without_a_newline_at_its_end_it_counts_later_with_a_warning(self):
        self.write('alice', 'bob', end='')
        for seconds, users in ((0, 1), (1, 1), (3.9, 1), (0.1, 2), (60, 2)):
            self.assertEqual(len(self.users_after(seconds)), users)
        self.assertEqual(self.log[:-1], [f'{self.path}: no newline at the end; is the file complete?'])

    def test_while_a_file_is_no_good_the_last_content_stays_and_that_is_said_once(self):
        for make, fault in ((lambda: None, 'No such file'),
                            (lambda: os.mkfifo(self.path), 'not a regular file')):
            self.path.unlink()
            make()
            for _ in range(4):
                self.assertEqual(self.users_after(1), ['alice'])
            self.assertEqual(len(self.log), 1)
            self.assertRegex(self.log.pop(), f'keeping the previous users: .*{fault}')
            if not self.path.exists():
                self.write('alice')
        self.path.unlink()
        self.write('bob')
        self.users_after(1)     # it may have the inode of the one before
        self.assertEqual(self.users_after(1), ['bob'])

    def test_a_fault_that_is_gone_at_the_next_look_is_none(self):
        for force in (False, True):
            self.path.unlink()
            self.assertEqual(self.users_after(1, force), ['alice'])
            self.write('alice')
            self.assertEqual(self.users_after(1), ['alice'])
        self.assertEqual(self.log, 2 * [f'read 1 user from {self.path}'])


# ---- Store -----------------------------------------------------------------------------------------

class StoreTest(TestCase):
    def setUp(self):
        super().setUp()
        self.store = self.make_store()
        self.make_repository('host')

    def save(self, content, kind='data', repository='/host', **more):
        location = Location(repository, kind, '' if kind == 'config' else named(content))
        self.store.save(location, Bytes(content, **more))
        return location

    def path(self, location):
        return Path(path_of(self.store, location))

    def scratch(self, folder=''):
        """A scratch file for a folder below the root."""
        return restic_serve.Scratch(self.store, folder)

    def names(self, kind, sizes=True):
        return {name: size for names, lengths in self.store.objects(Location('/host', kind), sizes)
                for name, size in zip(names, lengths or [0] * len(names))}

    def test_a_repository_has_the_layout_of_restic(self):
        self.store.create_repository('/a/b/c')
        base = self.root / 'a' / 'b' / 'c'
        self.assertEqual(sorted(path.name for path in base.iterdir()), sorted(restic_serve.KINDS))
        self.assertEqual(list((base / 'data').iterdir()), [])   # those are made when they are needed
        self.assertEqual(self.store.create_repository('/a/b/c'), 0)
        self.save(b'content', repository='/a/b/c')
        self.assertEqual([path.name for path in (base / 'data').iterdir()], [named(b'content')[:2]])

    def test_what_is_saved_is_read_listed_and_deleted(self):
        for kind in restic_serve.KINDS:
            content = kind.encode() * 1000
            location = self.save(content, kind, step=77)
            with self.store.open(location) as stored:
                self.assertEqual(stored.read(1 << 20), content)
            self.assertEqual(self.names(kind), {named(content): len(content)})
            self.assertTrue(self.store.delete(location))
            self.assertFalse(self.store.delete(location))
            self.assertEqual(self.names(kind), {})

    def test_nothing_stays_of_content_that_is_cut_short(self):
        for self.store.nameless in NAMELESS:
            with self.assertRaises(restic_serve.Gone):
                self.save(b'x' * 1000, error=restic_serve.Gone('abort'), step=100)
            self.assertEqual(self.files(), [])

    def test_the_same_object_again_is_stored_once(self):
        location = self.save(b'x')
        before = self.path(location).stat().st_ino
        self.save(b'x')
        self.assertEqual(self.path(location).stat().st_ino, before)
        self.assertEqual(self.log, [f'created directory {self.root}'])

    def test_a_damaged_object_is_mended_by_a_verified_upload(self):
        for self.store.nameless in NAMELESS:
            location = self.save(b'content')
            self.path(location).write_bytes(b'cont')
            self.save(b'content')
            self.assertEqual(self.path(location).read_bytes(), b'content')
            self.assertIn('damaged', self.log[-1])
            self.assertEqual(len(self.files()), 1)

    def test_what_replaces_it_has_a_scratch_name_that_no_list_shows_and_a_start_finds(self):
        location, seen = self.save(b'content', 'keys'), []
        self.path(location).write_bytes(b'cont')

        def look(*args):
            seen.append(self.names('keys'))
            self.assertTrue(self.files(self.root / restic_serve.HIDDEN))

        with first(look, os, 'replace'):
            self.save(b'content', 'keys')
        self.assertEqual(seen[-1], {location.name: 4})
        self.assertEqual((self.path(location).read_bytes(), len(self.files())), (b'content', 1))

    def test_an_unreadable_object_counts_as_damaged(self):
        location = self.save(b'content')
        before = self.path(location).stat().st_ino
        with mock.patch.object(restic_serve, '_digest', side_effect=OSError(errno.EIO, 'I/O')):
            self.save(b'content')
        self.assertNotEqual(self.path(location).stat().st_ino, before)

    def test_a_damaged_object_is_not_replaced_by_other_content(self):
        location = self.save(b'content')
        self.path(location).write_bytes(b'cont')
        for verify in (True, False):
            self.store.verify = verify
            self.assertRaises(WrongContent, self.store.save, location, Bytes(b'other'))
            self.assertEqual(self.path(location).read_bytes(), b'cont')

    def test_an_object_deleted_while_it_is_compared_is_stored_again(self):
        location = self.save(b'content')
        with first(self.store.delete, self.store, 'open'):
            self.save(b'content')
        self.assertEqual(self.path(location).read_bytes(), b'content')

    def test_what_is_no_file_in_an_objects_place_is_an_error(self):
        content = b'content'
        folder = self.root / 'host' / 'keys'
        for make in (lambda path: path.mkdir(), os.mkfifo,
                     lambda path: path.symlink_to('/etc/passwd'), lambda path: path.symlink_to(path)):
            path = folder / named(content)
            make(path)
            self.assertRaises(OSError, self.save, content, 'keys')
            self.assertEqual(self.names('keys'), {})
            path.rmdir() if path.is_dir() else path.unlink()

    def test_a_list_that_cannot_be_read_is_an_error_and_never_empty(self):
        self.store.create_repository('/host')
        data = self.root / 'host' / 'data'
        for make in (lambda path: path.touch(), lambda path: path.symlink_to(path),
                     lambda path: path.symlink_to('missing')):
            for path, kind in ((data / 'ff', 'data'), (self.root / 'host' / 'keys', 'keys')):
                path.mkdir(exist_ok=True)
                path.rmdir()
                make(path)
                self.assertRaises(OSError, self.names, kind)
                path.unlink()
                path.mkdir()
        self.assertEqual(list(self.store.objects(Location('/host/keys-file', 'keys'), True)), [])

    def test_a_file_system_that_refuses_rights_leaves_nothing_behind(self):
        self.store.create_repository('/host')
        shared = self.make_store(shared=True)
        before = descriptors()
        for shared.nameless in NAMELESS:
            with mock.patch.object(os, 'fchmod', side_effect=OSError(errno.EIO, 'no')):
                self.assertRaises(OSError, shared.save, Location('/host', 'keys', named(b'x')), Bytes(b'x'))
        self.assertEqual(self.files(), [])
        self.assertLessEqual(descriptors(), before)

    def test_another_config_is_refused_and_the_same_is_not(self):
        self.save(b'one', 'config')
        self.save(b'one', 'config')
        self.assertRaises(OtherConfig, self.save, b'two', 'config')
        self.assertEqual((self.root / 'host' / 'config').read_bytes(), b'one')

    def test_without_verification_any_content_is_stored_but_not_over_another(self):
        self.store = self.make_store(verify=False)
        location = Location('/host', 'keys', '1' * 64)
        self.store.save(location, Bytes(b'anything'))
        self.assertEqual(self.path(location).read_bytes(), b'anything')
        self.assertRaises(WrongContent, self.store.save, location, Bytes(b'other'))

    def test_an_upload_is_synced_before_it_has_its_name_and_its_folder_after(self):
        self.store.create_repository('/host')
        self.store.folders.hidden().close()
        calls = []
        for self.store.nameless in NAMELESS:
            calls.clear()
            content = b'%d' % self.store.nameless
            (self.root / 'host' / 'data' / named(content)[:2]).mkdir()
            with first(lambda *args: calls.append('read'), Bytes, 'readinto'), \
                    first(lambda file: calls.append('date'), os, 'utime'), \
                    first(lambda fd: calls.append(('fsync', is_folder(fd))), os, 'fsync'), \
                    first(lambda source, name: calls.append(('link', os.path.basename(name))), os, 'link'):
                self.save(content)
            self.assertEqual(calls, ['read', 'read', 'date', ('fsync', False), ('link', named(content)),
                                     ('fsync', True)])
            with failing(bool, os, 'utime', errno.EPERM), mock.patch.object(os, 'ftruncate') as date:
                self.save(content)
            date.assert_called_once()

    def test_no_listing_shows_an_upload_under_way(self):
        seen = []

        class Looking(Bytes):
            def readinto(body, view):  # noqa: N805 - self is the test's
                seen.append((self.names('keys'), self.files(self.root / 'host')))
                return super().readinto(view)

        for self.store.nameless in NAMELESS:
            content = b'%d' % self.store.nameless
            self.store.save(Location('/host', 'keys', named(content)), Looking(content))
            self.store.delete(Location('/host', 'keys', named(content)))
        self.assertEqual(seen, [({}, [])] * 2 * len(NAMELESS))

    def test_a_scratch_file_lies_beside_its_object_where_that_is_another_file_system(self):
        self.store.nameless = False
        self.store.create_repository('/host')
        with mock.patch.object(restic_serve.Folder, 'identity', autospec=True,
                               side_effect=lambda folder: ('host' in folder.path, 1)), \
                self.scratch('/host/keys') as scratch:
            self.assertEqual(scratch.folder.path, str(self.root / 'host' / 'keys'))
            self.assertEqual(self.names('keys'), {})
            self.assertEqual(self.files(self.root / 'host'), [f'keys/{scratch.name}'])
        self.assertEqual(self.files(), [])

    def test_a_file_system_that_cannot_sync_folders(self):
        for number in (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTSUP, errno.EINVAL, errno.EIO):
            with failing(is_folder, os, 'fsync', number), \
                    self.assertRaises(OSError) if number == errno.EIO else contextlib.nullcontext():
                self.save(b'%d' % number)

    def test_a_file_system_without_permissions(self):
        store = Store(str(self.root), shared=True)
        with mock.patch.object(os, 'fchmod', side_effect=PermissionError(errno.EPERM, 'made by a test')):
            store.create_repository('/host')
            self.assertEqual(store.save(Location('/host', 'keys', named(b'x')), Bytes(b'x')).objects, 1)

    def test_folders_of_systems_are_no_repositories(self):
        names = ('.snapshots', '.zfs', '#snapshot', '@eaDir', '#recycle', 'lost+found', 'host/.snapshot',
                 'System Volume Information', '$RECYCLE.BIN', '@Recycle', '.Trash-1000', 'timeshift')
        for name in (*names, 'host', 'host/timeshift'):
            (self.root / name / 'copy/data').mkdir(parents=True)
        found = [walked.path for walked in self.store.walk(self.fail) if walked.is_repository]
        self.assertEqual(found, ['/host', '/host/copy', '/host/timeshift/copy'])
        for name in names:
            for path in (f'/{name}', f'/{name}/x'):
                self.assertRaises(restic_serve.ReservedName, restic_serve.check_repository, path, False)

    def test_a_bind_mount_that_no_link_crosses_is_crossed_by_a_copy(self):
        real = os.replace

        def fail_between_folders(source, target, **more):
            if (os.path.dirname(source), more['src_dir_fd']) != (os.path.dirname(target), more['dst_dir_fd']):
                raise OSError(errno.EXDEV, 'made by a test')
            real(source, target, **more)

        self.store.nameless = False
        with mock.patch.object(os, 'replace', fail_between_folders), \
                failing(lambda *args: True, os, 'link', errno.EXDEV):
            location = self.save(b'content')
            self.path(location).write_bytes(b'cont')
            self.save(b'content')
        self.assertEqual(self.path(location).read_bytes(), b'content')
        self.assertEqual(len(self.files()), 1)

    def test_a_file_system_without_o_tmpfile(self):
        if not hasattr(os, 'O_TMPFILE'):
            self.skipTest('this system has no O_TMPFILE')
        with failing(lambda path, flags, *mode: flags & os.O_TMPFILE == os.O_TMPFILE, os, 'open',
                     errno.EOPNOTSUPP):
            location = self.save(b'content')
        self.assertEqual(self.path(location).read_bytes(), b'content')
        self.assertEqual(len(self.files()), 1)

    def test_a_file_system_without_hard_links(self):
        self.store.nameless = False
        with mock.patch.object(os, 'link', side_effect=OSError(errno.EPERM, 'no links')):
            location = self.save(b'content')
            before = self.path(location).stat().st_ino
            self.save(b'content')
            self.assertEqual(self.path(location).stat().st_ino, before)
            self.save(b'one', 'config')
            self.assertRaises(OtherConfig, self.save, b'two', 'config')
            self.path(location).write_bytes(b'cont')
            self.save(b'content')
        self.assertEqual(self.path(location).read_bytes(), b'content')
        self.assertEqual(len(self.files()), 2)

    def test_where_nameless_files_cannot_be_linked_they_are_not_used(self):
        with mock.patch.object(os, 'link', side_effect=OSError(errno.ENOENT, 'no /proc')):
            store = self.make_store()
        self.assertFalse(store.nameless)

    def test_a_file_of_the_servers_own_is_on_the_disk_or_as_it_was_and_nothing_is_left(self):
        hidden = self.root / restic_serve.HIDDEN
        self.store.folders.write_hidden('state', 'old')
        for fails, content in ((lambda fd: not is_folder(fd), 'old'), (is_folder, 'new')):
            with failing(fails, os, 'fsync'):
                self.assertRaises(OSError, self.store.folders.write_hidden, 'state', 'new')
            self.assertEqual((self.files(hidden), (hidden / 'state').read_text()), (['state'], content))

    def leave(self, *names):
        """Have files in the hidden folder; its path."""
        hidden = self.root / restic_serve.HIDDEN
        hidden.mkdir(exist_ok=True)
        for name in names:
            (hidden / name).touch()
        return hidden

    def test_what_a_crash_left_behind_is_removed_and_no_upload_under_way(self):
        hidden = self.leave('upload-dead', 'state')
        self.store.nameless = False
        with self.scratch() as scratch:
            self.store.prepare()
            self.assertEqual(self.files(hidden), ['state', scratch.name])

    def test_an_upload_that_is_about_to_be_locked_is_no_left_over(self):
        self.store.nameless = False
        real, seen = restic_serve.lock_file, []

        def start_another(fd):
            with mock.patch.object(restic_serve, 'lock_file', real):
                self.make_store()
            seen.append(self.files(self.root / restic_serve.HIDDEN))

        with first(start_another, restic_serve, 'lock_file'):
            location = self.save(b'content')
        self.assertEqual(self.path(location).read_bytes(), b'content')
        self.assertEqual([len(names) for names in seen], [1])

    def test_what_a_crash_left_without_a_lock_is_removed_after_an_hour_of_the_disks_clock(self):
        hidden = self.root / restic_serve.HIDDEN
        hidden.mkdir(exist_ok=True)
        paths = [hidden / 'new-x', hidden / 'upload-x', self.root / f'{restic_serve.PROBE_PREFIX}0123']
        for path in paths:
            path.touch()
        for age, stay in ((3500, True), (3700, False)):
            with mock.patch.object(restic_serve, 'lock_file', lambda fd: None), \
                    mock.patch.object(Store, 'now', return_value=time.time() + age):
                self.store.prepare()
            self.assertEqual([path.exists() for path in paths], [stay] * 3)

    def test_what_cannot_be_removed_does_not_keep_the_server_from_starting(self):
        old = self.root / restic_serve.HIDDEN / 'upload-x'
        old.mkdir(parents=True)
        with mock.patch.object(Store, 'now', return_value=time.time() + 3700):
            self.store.prepare()
        self.assertIn('cannot remove temporary files', self.log[-1])
        with mock.patch.object(os, 'unlink', side_effect=FileNotFoundError):  # another server was first
            self.store.folders.remove_left_overs(self.store.now)

    def test_a_directory_that_cannot_be_written_is_refused(self):
        for self.store.nameless in NAMELESS:
            with failing(lambda *args: True, os, 'open', errno.EACCES):
                self.assertRaises(PermissionError, self.store.prepare)

    def test_what_was_looked_at_is_looked_at_again_after_a_second(self):
        remembered, looks = restic_serve.Remembered(), []
        with mock.patch.object(time, 'monotonic') as clock, \
                mock.patch.object(restic_serve, 'KNOWN_AT_MOST', 3):
            for clock.return_value, path in ((0.0, 'a'), (0.9, 'a'), (0.9, 'b'), (1.1, 'a'), (1.1, 'b'),
                                             (1.2, 'c'), (1.2, 'd'), (1.2, 'a')):
                self.assertIsNone(remembered.get(path, looks.append))
        self.assertEqual(looks, ['a', 'b', 'a', 'c', 'd', 'a'])

    def test_modes_are_private_or_for_the_group_whatever_the_umask(self):
        self.addCleanup(os.umask, os.umask(0))
        for shared, of_folder, of_file in ((False, 0o700, 0o600), (True, 0o770, 0o660)):
            shutil.rmtree(self.root / restic_serve.HIDDEN, ignore_errors=True)
            shutil.rmtree(self.root / 'host')
            self.store = self.make_store(shared=shared)
            for mask in (0o022, 0o077, 0o000):
                os.umask(mask)
                for self.store.nameless in NAMELESS:
                    self.store.create_repository('/host/%o' % mask)
                    self.save(b'%d' % self.store.nameless, repository='/host/%o' % mask)
                self.store.folders.write_hidden('state%o' % mask, '')
            for path in self.root.rglob('*'):
                mode = of_folder if path.is_dir() else of_file
                self.assertEqual(stat.S_IMODE(path.stat().st_mode), mode, path)

    def test_a_list_has_objects_only_each_in_its_place(self):
        self.save(b'x')
        data = self.root / 'host' / 'data'
        (data / 'ff').mkdir(exist_ok=True)
        (data / 'ff' / ('0' * 64)).touch()        # not where it would be looked for
        (data / 'ff' / 'f.tmp').touch()
        (data / ('f' * 64)).touch()
        (data / 'other').mkdir()
        self.assertEqual(self.names('data'), {named(b'x'): 1})
        self.assertEqual(self.names('data', sizes=False), {named(b'x'): 0})

    def test_a_list_is_complete_though_the_disk_is_unmounted_on_the_way(self):
        for number in range(20):
            self.save(b'%d' % number)
        wanted = set(self.names('data'))
        objects = self.store.objects(Location('/host', 'data'), True)
        names = set(next(objects)[0])
        (self.root / 'host').rename(self.folder / 'away')
        (self.root / 'host/data').mkdir(parents=True)       # the mount point
        for batch, _ in objects:
            names.update(batch)
        self.assertEqual(names, wanted)

    def test_a_link_or_fifo_is_no_object(self):
        self.store.create_repository('/host')
        keys = self.root / 'host' / 'keys'
        (self.folder / 'secret').write_text('secret')
        (keys / ('a' * 64)).symlink_to(self.folder / 'secret')
        os.mkfifo(keys / ('b' * 64))
        for letter in 'ab':
            with self.assertRaises(OSError):
                self.store.open(Location('/host', 'keys', letter * 64)).close()

    def test_no_descriptor_is_left_open(self):
        gc.collect()    # other stores, which hold their directories
        before = descriptors()
        self.test_nothing_stays_of_content_that_is_cut_short()
        self.test_a_damaged_object_is_mended_by_a_verified_upload()
        for test in (self.test_a_file_system_without_hard_links,
                     self.test_a_bind_mount_that_no_link_crosses_is_crossed_by_a_copy):
            shutil.rmtree(self.root / 'host')
            self.make_repository('host')
            test()
        self.assertLessEqual(descriptors(), before)


class FileSystemsTest(TestCase):
    """File systems that are not like most."""

    def test_an_upload_makes_no_repository(self):
        store = self.make_store()
        self.log.clear()
        (self.root / 'office').mkdir()
        for location in (Location('/host', 'data', named(b'x')), Location('/host', 'config'),
                         Location('/office', 'config'), Location('/office', 'keys', named(b'x')),
                         Location('', 'locks', named(b'x'))):
            with self.assertRaises(NotHere, msg=location):
                store.save(location, Bytes(b'x'))
        self.assertEqual([path.name for path in self.root.rglob('*') if path.name != '.restic_serve'],
                         ['office'])
        store.create_repository('/host')
        shutil.rmtree(self.root / 'host' / 'data')
        for location in (Location('/host', 'config'), Location('/host', 'data', named(b'x'))):
            self.assertEqual(store.save(location, Bytes(b'x')).objects, 1)

    def test_one_clock_dates_uploads_and_deletes_that_of_the_repositorys_file_system(self):
        store = self.make_store()

        def date(scratch, times=None):      # what is mounted at '/host...' has a clock of its own
            there = now if '/host' in scratch.target.path else now + 10 ** 12
            os.utime(scratch.fd, ns=times or (0, there // tick * tick))

        patch_for(self, restic_serve.ScratchFile, date=date)
        for tick, ahead in itertools.product((10 ** 7, 2 * 10 ** 9), (5, -5)):     # of the server's clock
            begin, places = 1_795_000_000 * 10 ** 9 + 7 * tick, []
            past, other = (restic_serve.Past(store, keep, lambda: now / 1e9 + ahead)  # noqa: B023
                           for keep in (1000, 0))
            store.create_repository(f'/host{tick}{ahead}')
            with mock.patch.object(Store, 'now', autospec=True, side_effect=Store.now) as measured, \
                    mock.patch.object(time, 'monotonic', return_value=0.0):
                for now in (begin + tick * 9 // 10, begin + tick):
                    places.append(Location(f'/host{tick}{ahead}', 'index', named(b'%d' % now)))
                    store.save(places[-1], Bytes(b'%d' % now))
                    past.begin(places[0].repository)
                past.delete(places[0])
            self.assertEqual(measured.call_count, 1)
            listed = [list(itertools.chain.from_iterable(
                names for names, _ in restic_serve.View(store, past, moment).objects(places[0], False)))
                for moment in range(begin // 1000, (begin + 10 * tick) // 1000, tick // 10_000)]
            self.assertTrue(all(listed))
            self.assertEqual([listed[0], listed[-1]], [[place.name] for place in places])
            past.view(places[0].repository, '0s')
            other.delete(places[1])     # without keeping it
            self.assertGreater(past.earliest(places[0].repository), now // 1000)

    def test_files_that_cannot_be_synced_are_said_at_the_start(self):
        for number in (errno.EINVAL, errno.ENOTTY, errno.ENOTSUP, errno.EIO):
            self.log.clear()
            with failing(lambda fd: not is_folder(fd), os, 'fsync', number):
                if number == errno.EIO:
                    self.assertRaises(OSError, self.make_store)
                    continue
                store = self.make_store()
                store.create_repository('/host')
                store.save(Location('/host', 'keys', named(b'x')), Bytes(b'x'))
            self.assertEqual(len([line for line in self.log if 'cannot sync files' in line]), 1)

    def test_nameless_files_that_go_when_they_are_closed_are_not_used(self):
        """As with the SMB file system of Linux."""
        link, close, names = os.link, os.close, {}

        def remember(source, name, **more):
            link(source, name, **more)
            if source.startswith('/proc/self/fd/'):
                names[int(source.rpartition('/')[2])] = os.fstat(more['src_dir_fd']).st_ino

        def close_and_remove(fd):
            inode = names.pop(fd, None)
            close(fd)
            for path in self.root.rglob('*') if inode else ():
                if path.exists() and path.stat().st_ino == inode:
                    path.unlink()

        with mock.patch.object(os, 'link', remember), mock.patch.object(os, 'close', close_and_remove):
            store = self.make_store()
            self.assertFalse(store.nameless)
            store.create_repository('/host')
            location = Location('/host', 'keys', named(b'x'))
            Path(path_of(store, location)).write_bytes(b'damaged')
            store.save(location, Bytes(b'x'))
        self.assertEqual(Path(path_of(store, location)).read_bytes(), b'x')
        self.assertEqual([name for name in self.files() if 'restic_serve' in name], [])

    def test_what_is_about_to_replace_an_old_object_is_not_open_and_no_left_over(self):
        store = self.make_store()
        store.create_repository('/host')
        location, renamed = Location('/host', 'keys', named(b'x')), []
        target, real = Path(path_of(store, location)), os.replace

        def rename(old, new, **more):
            if os.path.basename(new) == location.file:
                store.folders.remove_left_overs(store.now)
                inode = os.stat(old, dir_fd=more.get('src_dir_fd')).st_ino
                for fd in os.listdir('/proc/self/fd'):
                    with contextlib.suppress(OSError):
                        self.assertNotEqual(os.fstat(int(fd)).st_ino, inode)
                renamed.append(new)
            return real(old, new, **more)

        with mock.patch.object(os, 'replace', rename):
            for store.nameless in NAMELESS:
                target.write_bytes(b'damaged')
                os.utime(target, (1e9, 1e9))
                store.save(location, Bytes(b'x'))
                self.assertEqual((target.read_bytes(), target.stat().st_mtime), (b'x', 1e9))
            target.unlink()
            with mock.patch.object(os, 'link', side_effect=PermissionError(errno.EPERM, 'made by a test')):
                store.save(location, Bytes(b'x'))
        self.assertEqual(len(renamed), len(NAMELESS) + 1)
        self.assertEqual([name for name in self.files() if 'restic_serve' in name], [])

    def ignoring_case(self):
        """Patches what looks at names, as if the file system did not see their case."""
        look = restic_serve.Folder.stat

        def found(folder, name):
            for other in os.listdir(folder.path):
                if other.lower() == name.lower():
                    name = other
            return look(folder, name)
        return mock.patch.object(restic_serve.Folder, 'stat', found)

    def test_a_file_system_that_ignores_case_is_found_out(self):
        (self.root / 'Alice' / 'keys').mkdir(parents=True)
        for read_only in (False, True):
            self.assertFalse(self.make_store(read_only=read_only).ignores_case)
            store = Store(str(self.root), read_only=read_only)
            with self.ignoring_case():
                for store.nameless in NAMELESS:
                    store.prepare()
                    self.assertTrue(store.ignores_case)
            store.now()     # what has a name would need a folder for it
            self.assertIn('ignores case', self.log[-1])
        self.assertEqual(self.files(), [])

    def test_there_users_and_paths_are_compared_without_it(self):
        store = self.make_store()
        store.ignores_case = True
        api = Api(store, Policy(short_rights(private=True)), Accounts(user='Alice', password='a'))

        def ask(method, path):
            return answer_of(api, method, path, b'x', authorization=credentials('Alice', 'a'))[0]

        self.assertEqual(ask('POST', '/Alice/?create=true'), 200)
        self.assertEqual(ask('POST', f'/aLICE/data/{named(b"x")}'), 200)
        self.assertEqual(self.files(), [f'alice/data/{named(b"x")[:2]}/{named(b"x")}'])
        for path in ('/alice/DATA/', '/ALICE/Keys/x', '/.RESTIC_SERVE/x', '/alice/.AT/1d/', '/alice/CONFIG/',
                     '/alice/lock%C5%BF/'):
            self.assertEqual(ask('POST', f'{path}?create=true'), 404, path)
        (self.root / 'Bob' / 'keys').mkdir(parents=True)
        self.assertEqual([found.path for found in store.walk(self.fail) if found.is_repository],
                         ['/alice'] if not (self.root / 'bob').exists() else ['/alice', '/bob'])
        store.ignores_case = False
        self.assertEqual(ask('GET', '/alice/data/'), 403)

    def test_what_belongs_to_another_user_is_said_with_what_helps(self):
        if os.name != 'posix':
            self.skipTest('there are no owners')
        (self.root / 'host' / 'data').mkdir(parents=True)
        (self.root / 'host' / 'config').touch()
        denied = set()
        owner = restic_serve.user_name(os.geteuid())
        with mock.patch.object(os, 'access', lambda path, rights, **more: not any(
                path == str(self.root / name) and rights & bit for name, bit in denied)):
            for name, bit, path, writes in (
                    ('host', os.X_OK, '/host/config', False), ('host/config', os.R_OK, '/host/config', False),
                    ('host/data', os.W_OK, '/host/data/aa/x', True), ('', os.R_OK, '/x', False)):
                denied = {(name, bit)}
                self.assertTrue(restic_serve.explain_denial(str(self.root), path, writes).startswith(
                    f'{self.root / name} belongs to {owner}, and the server runs as {owner}: chown -R'))
            denied = set()
            self.assertEqual(restic_serve.explain_denial(str(self.root), '/host/config', True), '')
        store = self.make_store()
        self.log.clear()
        with mock.patch.object(Store, 'open', side_effect=PermissionError(errno.EACCES, 'denied')), \
                mock.patch.object(restic_serve, 'explain_denial', lambda *args: f'told {args}'):
            answer_of(Api(store, Policy()), 'GET', '/host/config')
        self.assertIn(f"told ('{self.root}', '/host/config', False)", self.log[0])


class ByDescriptorTest(StoreTest):
    """The store where others may change what a path leads to: all of StoreTest holds."""

    def make_store(self, **options):
        store = Store(str(self.root), **options)
        store.folders.find_trusted = lambda path: None
        store.prepare()
        return store

    def test_no_descriptor_is_left_open(self):
        self.store.size(Location('/host', 'keys', '0' * 64))    # which opens the root
        super().test_no_descriptor_is_left_open()


class PaceTest(unittest.TestCase):
    """When reading ahead begins and ends, on clocks that the test holds."""

    def measure(self, pace, wall, cpu, sleeps):
        """How many helpers a read is worth that took so many seconds."""
        with mock.patch.object(restic_serve, '_used', side_effect=[(0.0, 0.0, 0), (wall, cpu, sleeps)]):
            self.assertEqual(pace.measure(lambda: 'read'), 'read')
        return pace.helpers

    def test_the_more_is_waited_the_more_help_but_neither_for_work_nor_for_the_interpreter(self):
        for wall, cpu, sleeps, helpers in (
                (0.010, 0.009, 1, 3), (0.010, 0.004, 1, 4), (0.010, 0.002, 1, 7), (1.0, 0.01, 1, 8),
                (0.010, 0.010, 0, 0), (0.010, 0.0097, 1, 0),    # hardly a wait
                (0.010, 0.002, 0, 0),    # it did not sleep: others had the processor
                (0.010, 0.002, -3, 0),   # or it did, but more often
                (0.010, 0.011, 9, 0),    # another thread of this process worked meanwhile
                (0.0002, 0.0, 1, 0)):    # too short to be worth a thread
            self.assertEqual(self.measure(restic_serve.Pace(), wall, cpu, sleeps), helpers)

    def test_a_disk_that_was_slow_may_be_fast_again(self):
        pace, reads = restic_serve.Pace(), restic_serve.HELPED_READS
        for _ in range(2):
            self.assertEqual(self.measure(pace, 1.0, 0.1, 1), 8)
            with mock.patch.object(restic_serve, '_used', side_effect=AssertionError('measured')):
                self.assertEqual(pace.measure(lambda: 'read'), 'read')
            for left in range(reads - 1, -1, -1):
                pace.spend()
                self.assertEqual(pace.helpers > 0, left > 0)
        self.assertEqual(self.measure(pace, 0.01, 0.01, 0), 0)

    def test_what_fails_slowly_is_slow_too(self):
        pace = restic_serve.Pace()
        with mock.patch.object(restic_serve, '_used', side_effect=[(0.0, 0.0, 0), (1.0, 0.0, 1)]), \
                self.assertRaises(OSError):
            pace.measure(mock.Mock(side_effect=OSError(errno.EIO, 'made by a test')))
        self.assertEqual(pace.helpers, restic_serve.HELPERS)

    def test_the_systems_clocks_tell_sleep_from_work(self):
        try:
            import resource     # noqa: F401
        except ImportError:
            self.skipTest('this system does not tell how often a thread has slept')
        begin = restic_serve._used()
        for _ in range(20):
            time.sleep(0.001)
        slept = [now - before for now, before in zip(restic_serve._used(), begin)]
        self.assertGreaterEqual(slept[0], 0.019)
        self.assertGreaterEqual(slept[2], 1)


class SlowDiskTest(StoreTest):
    """The store on a disk that seems to be slow: all of StoreTest holds."""

    def setUp(self):
        super().setUp()
        ticks = itertools.count()
        self.slow = True

        def used():    # between two calls all is waiting, or all is work
            tick = next(ticks)
            return tick, tick * (not self.slow), tick

        self.helpers = restic_serve.Helpers(3)
        patch_for(self, restic_serve, _used=used, PIECE=2, helpers=self.helpers)
        self.addCleanup(self.wait_for_helpers)

    def wait_for_helpers(self):
        """They have done everything, and nothing of what they have read is left."""
        self.wait_until(lambda: len(self.helpers._free) == 3, 'the helpers to be free')
        self.assertEqual((self.helpers._idents, len(self.helpers._unused)),
                         (set(), restic_serve.UNUSED_AT_MOST))

    def fill(self, count=60):
        """Make objects of data and of keys; the folders of data."""
        for number in range(count):
            name = named(b'%d' % number)
            for folder in (f'data/{name[:2]}', 'keys'):
                path = self.root / 'host' / folder
                path.mkdir(parents=True, exist_ok=True)
                (path / name).write_text(str(number))
        return sorted((self.root / 'host/data').iterdir())

    def scans(self, before):
        """Call before(folder) before each scan of a folder."""
        return first(lambda folder, *fd: before(folder), restic_serve, '_scan')

    def failing_stat(self, name):
        """Nothing can be known of the file of this name."""
        return failing(lambda path: str(path).endswith(name), os, 'stat')

    def list(self, kind='data', sizes=True):
        return list(self.store.objects(Location('/host', kind), sizes))

    def plainly(self, *args):
        self.slow = False
        try:
            return self.list(*args)
        finally:
            self.slow = True

    def test_a_list_is_the_same_and_in_the_same_order(self):
        self.fill()
        for at_once in (1, 3, 1024):
            with mock.patch.object(restic_serve, 'LISTED_AT_ONCE', at_once):
                for args in itertools.product(('data', 'keys', 'locks'), (True, False)):
                    found = self.list(*args)
                    self.assertEqual(found, self.plainly(*args))
                    self.assertEqual(sum(len(names) for names, _ in found), 60 * (args[0] != 'locks'))

    def test_helpers_read_the_next_folders_meanwhile(self):
        folders, helped, by = self.fill(), threading.Event(), []

        def before(folder):
            if self.helpers.are_calling():
                helped.set()
            elif len(by) > 1:   # that of all data, and the first to be slow
                self.assertTrue(helped.wait(PATIENCE))
            by.append(folder)

        with self.scans(before):
            self.assertEqual(sum(len(names) for names, _ in self.list()), 60)
        self.assertTrue(helped.is_set())
        self.assertEqual(len(by), 1 + len(folders))

    def test_helpers_look_at_the_objects_of_one_folder_meanwhile(self):
        read, helped = [], threading.Event()

        def look(entries):
            if self.helpers.are_calling():
                helped.set()
            elif read:
                self.assertTrue(helped.wait(PATIENCE))
            read.append(len(entries))
            return [int(entry) for entry in entries]

        found = restic_serve.read_in_pieces(look, [str(number) for number in range(100)], restic_serve.Pace())
        self.assertEqual(found, list(range(100)))
        self.assertEqual(read, [2] * 50)

    def test_helpers_have_no_helpers(self):
        job = functools.partial(restic_serve.read_in_pieces, list, list(range(100)), restic_serve.Pace())
        future = self.helpers.submit(job)
        with mock.patch.object(self.helpers, 'submit', side_effect=AssertionError('another helper')):
            self.assertEqual(future.result(PATIENCE), list(range(100)))
        self.helpers.end(future)

    def test_a_fast_disk_needs_no_thread(self):
        self.fill()
        self.slow = False
        with mock.patch.object(self.helpers, 'submit', side_effect=AssertionError('a helper')):
            self.list('data')
            self.list('keys')

    def test_a_list_that_nobody_wants_any_more_leaves_nothing(self):
        self.fill()
        for kind in ('data', 'keys'):
            before = descriptors()
            for count in range(4):
                objects = self.store.objects(Location('/host', kind), True)
                list(itertools.islice(objects, count))
                objects.close()
                self.wait_for_helpers()
                self.assertLessEqual(descriptors(), before)

    def held_up(self):
        """20 sources that are read ahead, in which helpers are held up: an event when one is, one that lets
        them go on, and which sources were opened and closed."""
        reading, go_on, opened, closed = threading.Event(), threading.Event(), set(), set()

        def source(number):
            opened.add(number)
            try:
                if number > 1 and self.helpers.are_calling():
                    reading.set()
                    go_on.wait(PATIENCE)
                yield number
            finally:
                closed.add(number)

        items = restic_serve.read_ahead([source(number) for number in range(20)])
        return items, reading, go_on, opened, closed

    def test_who_leaves_a_list_waits_for_the_helpers_that_have_begun_to_read_it(self):
        items, reading, go_on, opened, closed = self.held_up()
        self.assertEqual([next(items), next(items)], [0, 1])
        self.assertTrue(reading.wait(PATIENCE))
        leaving = self.in_thread(items.close)
        self.assertLess(closed, opened)
        go_on.set()
        leaving.join(PATIENCE)
        self.assertFalse(leaving.is_alive())
        self.assertEqual(closed, opened)
        self.assertLess(len(opened), 20)

    def test_an_interruption_is_all_that_who_waits_hears_of(self):
        (items, _, go_on, opened, closed), real = self.held_up(), self.helpers.end

        def end(future):
            if not go_on.is_set():
                go_on.set()
                raise SystemExit(1)
            real(future)

        with mock.patch.object(self.helpers, 'end', end), self.assertRaises(SystemExit):
            list(items)
        self.assertEqual(closed, opened)
        self.assertIn(1, closed)

    def test_an_object_that_cannot_be_looked_at_is_said_and_the_rest_is_counted(self):
        self.fill()
        usage, bad = Usage(self.store, Counters()), restic_serve._HAS_DIR_FD
        last = list(os.scandir(self.root / 'host/keys'))[-1].name
        with self.failing_stat(last):
            for kind in ('data', 'keys') if bad else ():
                self.assertRaises(OSError, self.list, kind)
            usage.census.count()    # DirEntry.stat() would keep other threads from running meanwhile
        held = usage.holdings()['/host']
        self.assertEqual((held.objects['keys'], held.unreadable), (60 - bad, 2 * bad))
        if bad:
            self.assertIn(f"made by a test: '{self.root}/host/keys/{last}'", ' '.join(self.log))

    def test_what_cannot_be_read_is_said_in_its_place(self):
        folders = [path.name for path in os.scandir(self.fill()[0].parent)]     # in the list's order
        wanted = [names for names, _ in self.plainly()]
        before, found = descriptors(), []
        with failing(lambda folder, *fd: folder.endswith(folders[7]), restic_serve, '_scan'), \
                self.assertRaisesRegex(OSError, 'made by a test'):
            for names, _ in self.store.objects(Location('/host', 'data'), True):
                found.append(names)
        self.assertEqual(found, wanted[:7])
        self.wait_for_helpers()
        self.assertLessEqual(descriptors(), before)

    def test_what_is_deleted_meanwhile_is_left_out(self):
        folders = self.fill()
        gone = folders[9]

        def before(folder):
            if folder.endswith(f'/data/{folders[5].name}'):
                shutil.rmtree(gone, ignore_errors=True)

        lists = {sizes: {name for names, _ in self.plainly('data', sizes) for name in names}
                 for sizes in (True, False)}
        with self.scans(before):
            found = {name for names, _ in self.list() for name in names}
        self.assertEqual(found | {name for name in lists[True] if name.startswith(gone.name)}, lists[True])
        deleted = []

        def delete(path):
            if not deleted and len(str(path)) == 64:
                deleted.append(path)
                os.unlink(self.root / 'host/keys' / path)

        with first(delete, os, 'stat'):
            found = {name for names, _ in self.list('keys') for name in names}
        self.assertEqual(found | set(deleted), {named(b'%d' % number) for number in range(60)})
        self.assertEqual(len(found), 60 - len(deleted))

    def test_many_lists_share_a_few_helpers(self):
        self.fill()
        wanted, most = self.plainly(), []

        def before(folder):
            most.append(len(self.helpers._idents))

        with self.scans(before):
            self.assertEqual(at_once(self.list, ['data'] * 12), [wanted] * 12)
        self.assertLessEqual(max(most), 3)

    def test_lists_whose_clients_do_not_read_on_hold_up_no_other(self):
        self.fill()
        wanted = self.plainly()
        lists = [self.store.objects(Location('/host', 'data'), True) for _ in range(12)]
        begun = [[next(objects), next(objects)] for objects in lists]
        self.assertLess(len(self.helpers._unused), restic_serve.UNUSED_AT_MOST)
        self.assertEqual([some + list(objects) for some, objects in zip(begun, lists)], [wanted] * 12)

    def test_where_no_thread_can_be_started_or_no_helper_is_free_it_is_read_without(self):
        self.fill()
        wanted, go_on = self.plainly(), threading.Event()
        with mock.patch.object(threading.Thread, 'start', side_effect=RuntimeError('no thread')):
            self.assertEqual(self.list(), wanted)
        futures = [self.helpers.submit(functools.partial(go_on.wait, PATIENCE)) for _ in range(3)]
        self.assertIsNone(self.helpers.submit(list))
        try:
            self.assertEqual(self.list(), wanted)
        finally:
            go_on.set()
            for future in futures:
                self.helpers.end(future)

    def test_the_past_the_count_the_page_and_the_scrub_read_ahead_too(self):
        self.fill()
        restic_serve.Past(self.store, 1000).begin('/host')
        (self.root / 'host/config').write_text('x')
        (self.root / 'host/snapshots').mkdir()
        (self.root / 'host/snapshots' / named(b'snapshot')).write_bytes(b'snapshot')
        view = restic_serve.View(self.store, restic_serve.Past(self.store), int((time.time() + 3600) * 1e6))
        submit, results = self.helpers.submit, []
        for self.slow in (False, True):
            with mock.patch.object(self.helpers, 'submit', side_effect=submit) as asked:
                usage, seen = Usage(self.store, Counters()), []
                snapshots = restic_serve.Watch(self.store, usage, 0).snapshots
                jobs = [lambda: sorted(name for names, _ in view.objects(Location('/host', 'data'), True)
                                       for name in names),
                        usage.census.count, functools.partial(snapshots, '/host'),
                        restic_serve.Scrub(self.store, 0, None, self.fail, io.StringIO()).run]
                for job in jobs:
                    seen.append(job())
                    self.assertEqual(asked.called, self.slow)
                    asked.reset_mock()
            held = usage.holdings()['/host']
            usage.census.channel.close()
            results.append((seen, held.bytes, held.objects, held.days))
        self.assertEqual(results[0], results[1])
        self.assertEqual(results[0][2]['data'], 60)


@unittest.skipUnless(hasattr(os, 'geteuid') and os.geteuid() == 0, 'only root can serve what others own')
class FoldersOfOthersTest(TestCase):
    """Root serves a directory that a user owns, who exchanges folders for links."""

    OTHER = 12345

    def setUp(self):
        super().setUp()
        self.store = self.make_store()
        self.store.create_repository('/host')
        self.content = b'of the user'
        self.location = Location('/host', 'keys', named(self.content))
        self.store.save(self.location, Bytes(self.content))
        self.secret = self.folder / 'secret'
        (self.secret / 'keys').mkdir(parents=True)
        (self.secret / 'keys' / self.location.name).write_bytes(b'of root')
        (self.secret / 'upload-x').touch()
        for path in (self.root, *self.root.rglob('*')):
            os.chown(path, self.OTHER, self.OTHER)
        self.store.folders._ways = restic_serve.Remembered()

    def link(self, path, target, owner=OTHER):
        """What the user does, at any moment."""
        if path.is_symlink():
            path.unlink()
        elif path.exists():
            path.rename(path.with_name(f'{path.name}.before'))
        path.symlink_to(target)
        os.chown(path, owner, owner, follow_symlinks=False)

    def read(self, location):
        with self.store.open(location) as stored:
            return stored.read(100)

    def test_a_link_that_comes_within_the_second_leads_nowhere(self):
        for path, target in ((self.root / 'host', self.secret), (self.root / 'host' / 'keys',
                                                                self.secret / 'keys')):
            with self.subTest(path=path):
                self.assertEqual(self.read(self.location), self.content)
                self.link(path, target)
                for act in (lambda: self.read(self.location), lambda: self.store.delete(self.location),
                            lambda: self.store.save(Location('/host', 'keys', named(b'new')), Bytes(b'new')),
                            lambda: list(self.store.objects(Location('/host', 'keys'), True)),
                            lambda: self.store.create_repository('/host')):
                    self.assertRaises(PermissionError, act)
                self.assertEqual(self.files(self.secret), [f'keys/{self.location.name}', 'upload-x'])
                path.unlink()
                path.with_name(f'{path.name}.before').rename(path)

    def test_a_link_of_root_may_lead_anywhere_but_out_of_the_directory_above_a_repository(self):
        self.link(self.root / 'host' / 'keys', self.secret / 'keys', 0)
        self.assertEqual(self.read(self.location), b'of root')
        self.link(self.root / 'other', self.secret, 0)
        self.assertRaises(PermissionError, self.read, Location('/other', 'keys', self.location.name))
        self.link(self.root / 'alias', self.root / 'host', 0)
        self.assertEqual(self.read(Location('/alias', 'keys', self.location.name)), b'of root')

    def test_a_link_of_root_does_not_lead_by_way_of_the_users(self):
        between = self.folder / 'between'
        between.mkdir()
        self.link(self.root / 'host' / 'keys', between / 'keys', 0)
        self.link(between / 'keys', self.secret / 'keys')
        self.assertRaises(PermissionError, self.read, self.location)

    def test_what_is_counted_and_scrubbed_is_not_behind_a_link_of_the_users(self):
        self.link(self.root / 'host' / 'keys', self.secret / 'keys')
        (self.root / 'host' / 'config').symlink_to(self.secret / 'upload-x')
        held = self.counted().holdings()['/host']
        self.assertEqual((held.bytes, held.objects['keys'], held.objects['config']), (0, 0, 0))
        found = {}
        restic_serve.Scrub(self.store, 0, None, found.__setitem__, io.StringIO()).run()
        self.assertFalse([path for path in found if self.location.name in path])
        self.assertIn('symbolic link created by another user', str(found))

    def test_the_directory_itself_is_not_behind_a_link_of_the_users(self):
        above = self.folder / 'home'
        above.mkdir()
        os.chown(above, self.OTHER, self.OTHER)
        (above / 'backup').mkdir()
        store = Store(str(above / 'backup'))
        store.prepare()
        self.link(above / 'backup', self.secret)    # the one that was opened is served on
        store.create_repository('/x')
        self.assertTrue((above / 'backup.before' / 'x').is_dir())
        self.assertRaises(PermissionError, Store(str(above / 'backup')).prepare)
        self.assertEqual(self.files(self.secret), [f'keys/{self.location.name}', 'upload-x'])

    def test_a_link_of_root_by_way_of_the_users_is_no_path_of_ours(self):
        """Each step of a chain of links is looked at, not only where it ends."""
        between = self.folder / 'between'
        between.mkdir()
        self.link(between / 'l', self.secret)
        own = self.folder / 'own'
        (own / 'host').mkdir(parents=True)
        self.link(own / 'host' / 'keys', between / 'l' / 'keys', 0)
        store = Store(str(own))
        self.assertFalse(restic_serve.is_trusted(str(own / 'host' / 'keys')))
        self.assertRaises(PermissionError, store.open, Location('/host', 'keys', self.location.name))

    def test_folders_above_that_cannot_be_listed_are_passed(self):
        above = self.folder / 'above'
        (above / 'srv').mkdir(parents=True)
        os.chown(above / 'srv', 65534, 65534)
        above.chmod(0o711)
        self.folder.chmod(0o755)
        # What is imported when it is needed comes first: this Python may be for root alone.
        code = ('import fcntl, mmap, os, sys; sys.path.insert(0, sys.argv[1]); import restic_serve;'
                'os.setgid(65534); os.setuid(65534); store = restic_serve.Store(sys.argv[2]);'
                'store.prepare(); store.folders.hold_root()')
        done = subprocess.run([sys.executable, '-B', '-c', code, os.path.dirname(MODULE), above / 'srv'],
                              text=True, capture_output=True)
        self.assertEqual((done.returncode, done.stderr), (0, ''))

    def test_the_hidden_folder_is_never_a_link(self):
        for owner in (0, self.OTHER):
            self.link(self.root / restic_serve.HIDDEN, self.secret, owner)
            if not self.store.nameless:     # nothing can be uploaded
                with self.assertRaisesRegex(PermissionError, 'expected a directory, found a link or file'):
                    self.store.prepare()
                continue
            self.store.prepare()
            self.assertIn('expected a directory, found a link or file; remove it', self.log[-1])
            self.store.nameless = False
            with self.assertRaises(PermissionError):
                self.store.save(Location('/host', 'keys', named(b'x')), Bytes(b'x'))
            self.assertRaises(PermissionError, self.store.folders.write_hidden, 'scrub.json', 'x')
            self.store.nameless = True
        self.assertEqual(self.files(self.secret), [f'keys/{self.location.name}', 'upload-x'])

    def test_whose_a_path_is(self):
        base = self.folder / 'private'
        (base / 'a/b').mkdir(parents=True)

        def trusted(*names):
            return [restic_serve.is_trusted(str(base / name)) for name in names]

        self.assertEqual(trusted('a/b', 'a/missing/c'), [True, True])
        for mode in (0o770, 0o757):
            (base / 'a').chmod(mode)
            self.assertEqual(trusted('a/b', 'a'), [False, True])    # what is in it is theirs, not its place
        (base / 'a').chmod(0o1777)
        for owner in (0, self.OTHER, 0):
            os.chown(base / 'a/b', owner, -1)
            self.assertEqual(trusted('a/b'), [not owner])
        (base / 'a').chmod(0o755)
        for owner in (0, self.OTHER):
            self.link(base / 'link', base / 'a/b', owner)
            self.assertEqual(trusted('link'), [not owner])
        self.link(base / 'loop', base / 'loop', 0)
        self.assertEqual(trusted('loop/x'), [False])


# ---- Past ------------------------------------------------------------------------------------------

class MomentTest(unittest.TestCase):
    """Times as people write them, and as names have them."""

    NOW = 1_796_000_000.0

    def test_moments(self):
        at = int(restic_serve.time.mktime((2026, 11, 20, 12, 0, 0, 0, 0, -1)))
        for text, seconds in (
                ('2026-11-20T12:00:00Z', 1795176000), ('2026-11-20T12:00Z', 1795176000),
                ('2026-11-20Z', 1795132800), ('2026-11-20T12:00:00.25Z', 1795176000.25),
                ('2026-11-20T12:00:00', at), ('2026-11-20T12:00', at), ('2026-11-20', at - 12 * 3600),
                ('2026-11-20 12:00:00', at),
                ('2026-11-20T13:30:00.123456789+01:30', 1795176000.123456),
                ('2026-11-20T10:30:00-01:30', 1795176000), ('36h', self.NOW - 36 * 3600),
                ('2d', self.NOW - 2 * 86400), ('1d12h', self.NOW - 1.5 * 86400)):
            self.assertEqual(restic_serve.parse_past(text, self.NOW), int(seconds * 1e6), text)
        for text in ('', 'x', '10', '2026', '2026-13-01', '2026-11-20_12:00', '2026-11-20T25:00', '-2d',
                     '2026-11-20T12:00:00+0100', '2026-11-20T12Z', '٣d', '2026-11-20T12:00:60.5.5Z',
                     '9' * 7000, '9' * 40 + '.5', '2026-11-20T12:00:00.' + '9' * 40, 'ä' * 21):
            with self.assertRaisesRegex(ValueError, 'invalid time .{,60};', msg=text[:60]):
                restic_serve.parse_past(text, self.NOW)

    def test_names_sort_by_time_and_are_read_back(self):
        moments = [0, 1, 999_999, 10 ** 6, 1_795_176_000_123_456, 2_000_000_000_000_000]
        names = [restic_serve.format_moment(moment) for moment in moments]
        self.assertEqual(names, sorted(names))
        self.assertEqual(names[4], '20261120T120000.123456Z')
        self.assertEqual(list(map(restic_serve.read_moment, names)), moments)

    def test_names_of_what_was_deleted(self):
        name, time_of = 'a' * 64, '20261120T120000.123456Z'
        parse = restic_serve.parse_deleted_name
        self.assertEqual(parse(f'{name}.{time_of}'), (name, time_of, ''))
        self.assertEqual(parse(f'config.{time_of}-{time_of}'), ('config', time_of, time_of))
        for bad in (name, f'{name}.x', f'x.{time_of}', f'{name}.{time_of}-', f'{name}.{time_of}x', time_of):
            self.assertIsNone(parse(bad))


class PastTestCase(TestCase):
    """A store whose deleted objects are kept, on a clock that the test holds."""

    KEEP = 1000

    def setUp(self):
        super().setUp()
        self.now = 1_795_000_000.0
        patch_for(self, Store, now=lambda store, path='': self.now)
        patch_for(self, restic_serve, TICK_SECONDS=0, COARSE_SECONDS=0)
        self.store = self.make_store()
        self.past = self.make_past()
        for repository in ('', '/host'):
            self.store.create_repository(repository)
            self.past.begin(repository)

    def make_past(self, keep=KEEP):
        return restic_serve.Past(self.store, keep, lambda: self.now)

    def tick(self):
        """The time, which goes on."""
        self.now += 1
        return self.now - 1

    def upload(self, content, kind='data', repository='/host'):
        location = Location(repository, kind, '' if kind == 'config' else named(content))
        if self.store.save(location, Bytes(content)).objects:
            os.utime(path_of(self.store, location), (self.now, self.now))
        self.now += 1
        return location

    def delete(self, location, past=None):
        size = (past or self.past).delete(location)
        self.now += 1
        return size

    def purge(self, past=None):
        """Sizes of what is purged by a right clock."""
        return list((past or self.past).purge('/host', int(self.now * 1e6)))

    def view(self, moment, repository='/host'):
        """What a repository had: the names of each kind."""
        view = self.past.view(repository, restic_serve.moment_for_people(int(moment * 1e6)))
        found = {}
        for kind in restic_serve.KINDS:
            names = []
            for some, _ in view.objects(Location(repository, kind), True):
                names += some
            self.assertEqual(len(set(names)), len(names))
            if names:
                found[kind] = sorted(names)
            for name in names:
                with view.open(Location(repository, kind, name)) as content:
                    self.assertEqual(named(content.read_all()), name)
        with contextlib.suppress(FileNotFoundError), view.open(Location(repository, 'config')) as content:
            found['config'] = content.read_all()
        return found

    def roll_back(self, moment, repository='/host', **more):
        job = restic_serve.RollBack(self.store, self.past, repository, int(moment * 1e6))
        job.run(**more)
        self.now += 1
        return str(job)


class TrustedTimeTest(PastTestCase):
    """A wrong clock destroys nothing."""

    DAY = 86400

    def setUp(self):
        super().setUp()
        self.boot, self.up, self.ran = 'boot', 0, 0
        patch_for(self, restic_serve, _uptime=lambda: (self.boot, self.up, self.ran))
        self.go_on(0, 0, 'first')
        self.look()

    def go_on(self, seconds, clock=0, boot=''):
        """Let time pass, after which the clock is set anew, perhaps in a new process after a `boot`."""
        self.now, self.up, self.ran = self.now + seconds + clock, self.up + seconds, self.ran + seconds
        if boot:
            self.up, self.boot = self.up if boot == self.boot else 0, boot
            self.past = self.make_past()
            self.usage = Usage(self.store, Counters(), past=self.past)

    def look(self):
        """By how many days the trusted time is behind the clock."""
        self.log.clear()
        return (self.now - self.past.trusted_now() / 1e6) / self.DAY

    def test_it_goes_on_with_the_time_that_has_passed(self):
        self.go_on(30 * self.DAY, boot=self.boot)       # between two sessions of --stdio
        self.assertLess(self.look(), 0.001)
        self.go_on(0, 42 * self.DAY, 'off')
        self.assertAlmostEqual(self.look(), 42, 2)
        self.assertIn('the clock is 42 d ahead of the trusted time', self.log[0])
        hours = 0
        while self.look() > 0.001:
            self.go_on(3600)
            self.look()
            self.go_on(0, 0, ('another', 'boot')[hours % 2])
            hours += 1
        self.assertIn(hours, range(40, 49))

    @unittest.skipUnless(HAS_64_BIT_TIMES, 'this system has no times after 2038')
    def test_a_clock_that_is_wrong_for_some_seconds_destroys_nothing(self):
        self.delete(self.upload(b'pack'))
        for days, is_noted in itertools.product((77, 5110, -self.now / self.DAY, -30), (1, 0)):
            if not is_noted:        # before there was a trusted time
                (self.root / '.restic_serve/time').unlink()
            for seconds, clock, boot in ((0, days, 'wrong'), (5, 0, ''), (5, -days, 'right'), (60, 0, '')):
                self.go_on(seconds, clock * self.DAY, boot)
                self.usage.purge(math.inf)
            self.assertEqual(len(list(self.past.kept('/host'))), 1, days)
            self.assertEqual(self.look() > 0.001, days == -30, days)
        self.go_on(2 * self.DAY)
        self.usage.purge(math.inf)
        self.assertRegex(self.log[-1], r'^host: purged 1 object \(4 B\), deleted before 2026-11-\S+Z$')
        self.assertEqual(list(self.past.kept('/host')), [])

    @unittest.skipUnless(HAS_64_BIT_TIMES, 'this system has no times after 2038')
    def test_what_is_later_than_now_gets_the_time_of_now(self):
        self.go_on(0, 14 * 365 * self.DAY, 'wrong')
        self.store.create_repository('/new')
        self.usage.purge(math.inf)
        packs = [self.upload(b'%d' % number, repository='/new') for number in range(3)]
        moment = self.now
        for pack in packs:
            self.delete(pack)
        self.roll_back(moment, '/new')
        self.delete(packs[0])
        self.go_on(0, -14 * 365 * self.DAY, 'right')
        for pack in packs[1:]:
            os.utime(path_of(self.store, pack), (self.now - 100, self.now - 100))
        self.usage.purge(math.inf)
        self.assertIn('new: its past was to begin later than now (2040-', '\n'.join(self.log))
        self.assertEqual(self.past.earliest('/new'), int(self.now * 1e6))
        for is_corrected in (False, True):      # not by one reading of the clock
            self.usage.purge(math.inf)
            times = {max(name.deleted, name.returned)[:15] for *_, name in self.past.kept('/new')}
            self.assertEqual(times == {restic_serve.format_moment(int(self.now * 1e6))[:15]}, is_corrected)
            self.go_on(3600)
        self.assertIn('is later than now, and gets that time', self.log[-1])
        self.assertEqual(self.view(self.now - 5, '/new'), {'data': sorted(pack.name for pack in packs[1:])})


class PastTest(PastTestCase):
    """What was deleted stays for a while."""

    def test_what_is_deleted_is_moved_with_its_time_and_shown_no_more(self):
        for repository in ('/host', ''):
            for kind in ('data', 'index', 'keys', 'snapshots', 'config'):
                location = self.upload(kind.encode(), kind, repository)
                uploaded, deleted = self.now - 1, self.now
                self.assertEqual(self.delete(location), len(kind))
                self.assertIsNone(self.delete(location))
                name = f'{location.file}.{restic_serve.format_moment(int(deleted * 1e6))}'
                path = self.root / f'{repository[1:]}/.restic_serve/deleted/{kind}'.lstrip('/')
                path = path / (name[:2] if kind == 'data' else '') / name
                self.assertEqual((path.read_bytes(), path.stat().st_mtime), (kind.encode(), uploaded))
                if kind != 'config':
                    self.assertEqual(list(self.store.objects(Location(repository, kind), False)), [])
            self.assertEqual(list(self.store.walk(self.fail))[0].path, '')

    def test_a_past_is_whole_or_fails_whatever_comes_between_two_looks(self):
        acts = {
            'delete': lambda: self.past.delete(self.there[0]),
            'roll-back': lambda: self.roll_back(self.moment, self.there[0].repository),
            'purge': lambda: list(self.make_past(1e-9).purge(self.there[0].repository, int(self.now * 1e6))),
            'delete for ever': lambda: self.make_past(0).delete(self.there[1])}
        reads = {
            'list': lambda view: [name for some, _ in view.objects(
                Location(self.there[0].repository, 'index'), True) for name in some],
            'open': lambda view: [named(view.open(location).read_all()) for location in self.there]}
        number = itertools.count()
        patch_for(self, os, fsync=lambda fd: None)
        times = list(itertools.combinations(range(12 if LONG_TESTS else 7), 2))
        for pair, looks, read in itertools.product(itertools.permutations(acts, 2), times, reads):
            repository = f'/{next(number)}'
            self.store.create_repository(repository)
            self.past.begin(repository)
            self.there = [self.upload(b'%d' % each, 'index', repository) for each in range(3)]
            self.moment = self.now - 1
            view = self.past.view(repository, restic_serve.moment_for_people(int(self.moment * 1e6)))
            if pair[0] != 'delete':
                self.delete(self.there[2])
            with self.interrupted(dict(zip(looks, map(acts.get, pair)))):
                try:
                    names = reads[read](view)
                except restic_serve.NoHistory:
                    self.assertNotEqual(set(pair), {'delete', 'roll-back'})
                else:
                    self.assertEqual(sorted(names), sorted(each.name for each in self.there),
                                     (pair, looks, read))

    def interrupted(self, acts):
        """Have something done before some of the looks into folders, by their number."""
        looks, busy, patches = itertools.count(), [], contextlib.ExitStack()

        def look(real, *args, **more):
            if not busy:
                busy.append(True)
                acts.get(next(looks), lambda: None)()
                self.now += 1
                busy.clear()
            return real(*args, **more)

        for kind, name in ((restic_serve.Folders, 'open'), (restic_serve.Folder, 'stat')):
            patches.enter_context(mock.patch.object(kind, name, functools.partialmethod(
                functools.partial(look, getattr(kind, name)))))
        return patches

    def synced_by(self, call):
        """The folders below the root that a call has synced by its end."""
        synced, real = set(), restic_serve.Folder.sync

        def sync(folder):
            real(folder)
            synced.add(os.path.relpath(folder.path, self.root))

        with mock.patch.object(restic_serve.Folder, 'sync', sync):
            call()
        return synced

    def test_a_roll_back_syncs_its_marks_first_and_each_kind_before_the_next(self):
        for kind in ('index', 'snapshots'):
            self.upload(kind.encode(), kind)
        moment, steps = self.tick(), []
        for kind in ('snapshots', 'index'):
            self.delete(Location('/host', kind, named(kind.encode())))

        def note(owner, what, where):
            real = getattr(owner, what)

            def call(*args):
                steps.append((what, os.path.relpath(args[where].path, self.root / 'host')))
                return real(*args)
            return mock.patch.object(owner, what, call)

        with note(restic_serve.Past, 'mark', 1), note(restic_serve, 'move', 2), \
                note(restic_serve.Folder, 'sync', 0):
            self.roll_back(moment)
        self.assertEqual(steps, [step for kind in ('index', 'snapshots')
                                 for kept in (f'.restic_serve/deleted/{kind}',) for step in (
            ('mark', kept), ('sync', kept), ('move', kind), ('sync', kind), ('sync', kept))])

    def test_the_first_delete_begins_the_past(self):
        self.store.create_repository('/copied')
        pack, begun = self.upload(b'pack', repository='/copied'), self.now
        self.delete(pack)
        self.assertEqual(self.past.earliest('/copied'), int(begun * 1e6))

    def test_a_delete_that_another_has_just_done_is_on_the_disk_all_the_same(self):
        def folders(location):
            return {f'host/{place}data/{location.name[:2]}' for place in ('', '.restic_serve/deleted/')}

        location = self.upload(b'pack')
        for _ in range(2):
            self.assertLessEqual(folders(location), self.synced_by(lambda: self.past.delete(location)))
        # One that loses the race for the rename.
        other, real = self.upload(b'other'), restic_serve.move
        self.past.delete(self.upload(b'make the folder'))

        def move(*args):
            real(*args)
            raise FileNotFoundError

        with mock.patch.object(restic_serve, 'move', move):
            synced = self.synced_by(lambda: self.assertIsNone(self.past.delete(other)))
        self.assertLessEqual(folders(other), synced)

    def test_an_upload_that_another_has_just_stored_is_on_the_disk_all_the_same(self):
        location = self.upload(b'pack')
        for limits in ({}, {'/': 1 << 20}):
            usage = self.counted(limits, past=self.past)
            self.assertIn(f'host/data/{location.name[:2]}', self.synced_by(
                functools.partial(usage.save, location, Bytes(b'pack'))))

    def test_a_repository_that_another_has_just_made_is_on_the_disk_all_the_same(self):
        def create():
            self.store.create_repository('/new')
            self.past.begin('/new')

        for _ in range(2):
            self.assertEqual(self.synced_by(create),
                             {'.', 'new', 'new/.restic_serve', 'new/.restic_serve/deleted'})
        self.now += 100     # by now it is
        self.assertEqual(self.synced_by(lambda: self.past.begin('/new')), set())

    def test_a_folder_that_appears_between_two_looks_is_read(self):
        missing = [True]
        with failing(lambda *args: missing and missing.pop(), restic_serve.Folders, 'open', errno.ENOENT), \
                self.store.scan('/host') as (_, found):
            self.assertIn('data', [entry.name for entry in found])

    def test_locks_are_not_kept_nor_is_anything_without_the_option(self):
        lock, pack = self.upload(b'lock', 'locks'), self.upload(b'pack')
        self.delete(lock)
        self.delete(pack, self.make_past(0))
        self.assertEqual([path for path in self.files() if 'deleted' in path and 'since' not in path], [])

    def test_each_life_of_an_object_is_its_own_though_two_fall_into_one_tick(self):
        begin, pack = self.now, self.upload(b'pack')
        self.delete(pack)               # 1
        self.upload(b'pack')            # 2, but by the coarse clock of the files before it was deleted
        os.utime(path_of(self.store, pack), (begin + 0.5,) * 2)
        self.delete(pack)               # 3
        self.roll_back(begin)           # 4: the first file comes back,
        self.delete(pack)               # 5: goes,
        self.roll_back(begin + 2)       # 6: and the second comes back
        self.assertEqual([len(self.view(begin + after)) for after in range(8)], [1, 1, 1, 0, 1, 0, 1, 1])

    def test_a_mended_object_was_there_all_the_time(self):
        pack = self.upload(b'pack')
        Path(path_of(self.store, pack)).write_bytes(b'damaged')
        os.utime(path_of(self.store, pack), (self.now - 1, self.now - 1))
        self.now += 10
        synced = []
        with first(lambda fd: synced.append(os.fstat(fd).st_mtime), restic_serve, 'sync_file'):
            self.store.save(pack, Bytes(b'pack'))
        self.assertEqual(synced.count(self.now - 11), 2)    # what was there, and what replaces it
        self.assertEqual(self.view(self.now - 5), {'data': [pack.name]})

    def test_where_times_cannot_be_set_a_mend_fails_rather_than_lose_the_past(self):
        pack = self.upload(b'pack')
        path = Path(path_of(self.store, pack))
        for error in (PermissionError(errno.EPERM, 'made by a test'), None):    # None: it does nothing
            self.past.begin('/host')
            path.write_bytes(b'damaged')
            os.utime(path, (1, 1))
            with mock.patch.object(os, 'utime', side_effect=error):
                with self.assertRaisesRegex(OSError, 'cannot keep the time of a damaged object'):
                    self.store.save(pack, Bytes(b'pack'))
                self.assertEqual(path.read_bytes(), b'damaged')
                shutil.rmtree(self.root / 'host/.restic_serve')     # there is no past that it matters to
                self.store.save(pack, Bytes(b'pack'))
            self.assertEqual(path.read_bytes(), b'pack')

    def test_a_moment_that_cannot_be_known(self):
        self.now += 10 * self.KEEP
        self.past.view('/host', f'{self.KEEP - 1}s')
        with self.assertRaisesRegex(restic_serve.StorageError, 'no history before'):
            self.past.view('/host', f'{self.KEEP + 1}s')
        self.assertIsNone(self.delete(Location('/host', 'data', 'a' * 64)))
        self.assertEqual(self.past.earliest('/other'), int(self.now * 1e6))

    def test_a_server_without_the_option_ends_what_is_known(self):
        pack, other = self.upload(b'pack'), self.upload(b'other')
        self.now += 10
        self.delete(Location('/host', 'data', 'a' * 64), self.make_past(0))
        self.assertEqual(self.view(self.now - 5), {'data': sorted([pack.name, other.name])})
        self.delete(pack, self.make_past(0))
        self.assertEqual(self.past.earliest('/host'), int((self.now - 1) * 1e6))
        self.assertEqual(self.view(self.now), {'data': [other.name]})
        shutil.rmtree(self.root / 'host/.restic_serve')

        def delete(store, location, real=Store.delete):     # another server begins the past meanwhile
            self.past.begin('/host')
            self.now += 1
            return real(store, location)

        with mock.patch.object(Store, 'delete', delete):
            self.make_past(0).delete(other)
        self.assertEqual(self.past.earliest('/host'), int(self.now * 1e6))

    def test_it_is_purged_when_its_time_has_passed(self):
        moment = self.now
        for location in [self.upload(bytes([number])) for number in range(3)]:
            self.delete(location)
            self.now += 100
        self.now += self.KEEP - 250
        for keep in (2000 * 365 * 86400, 1e12):
            self.assertEqual(self.purge(self.make_past(keep)), [])
        self.assertEqual(self.purge(), [1])
        self.assertEqual(len(list(self.past.kept('/host'))), 2)
        self.assertEqual(self.make_past(math.inf).earliest('/host'), self.past.earliest('/host'))
        self.assertRaisesRegex(ValueError, 'no history before', self.roll_back, moment)

    def test_a_roll_back_brings_back_and_sets_aside(self):
        kept = {kind: self.upload(b'kept ' + kind.encode(), kind)
                for kind in ('data', 'index', 'keys', 'snapshots', 'config')}
        moment = self.tick()
        before = self.view(moment)
        for location in kept.values():
            self.delete(location)
        for kind in ('data', 'index', 'keys', 'snapshots', 'config'):
            self.upload(b'new ' + kind.encode(), kind)
        attacked = self.tick()
        after = self.view(attacked)
        text = ('1 snapshot, 1 index, 1 key, 1 config, 1 pack (9 B) restored, '
                '1 snapshot, 1 index, 1 key, 1 pack (8 B) set aside')
        self.assertEqual(self.roll_back(moment, dry=True), text)
        self.assertEqual(self.view(self.now), after)
        self.assertEqual(self.roll_back(moment), text)
        self.assertEqual(self.view(self.now), before)
        self.assertEqual((self.root / 'host/config').read_bytes(), b'kept config')
        self.assertEqual(self.view(attacked), after)
        self.assertEqual(self.roll_back(moment), 'nothing to do')
        self.roll_back(attacked)        # a roll-back can be rolled back
        self.assertEqual(self.view(self.now), after)
        self.assertEqual((self.root / 'host/config').read_bytes(), b'new config')

    def test_a_roll_back_excludes_another_and_says_what_is_lost(self):
        moment, packs = self.now + 2, [self.upload(b'%d' % number) for number in range(3)]
        self.now += 1
        for pack in packs[1:]:
            self.delete(pack)
        self.upload(b'config', 'config')
        lost = next(self.root.rglob(f'{packs[1].name}.*'))
        lost.unlink()
        for path in (lost, Path(path_of(self.store, packs[2]))):
            path.symlink_to('elsewhere')
        job, other = (restic_serve.RollBack(self.store, self.past, '/host', int(moment * 1e6))
                      for _ in range(2))
        patch_for(self, restic_serve.View, open=lambda view, location: io.BytesIO())
        with other, job:
            job.check(force=False)
            with self.assertRaisesRegex(ValueError, '^another roll-back of it is running; wait for its end$'):
                other.check(force=False)
            job.run()
            self.assertEqual(job.lost, [str(lost.relative_to(self.root / 'host'))])
        self.assertEqual(str(job), '1 pack (1 B) restored')
        self.assertEqual(Path(path_of(self.store, packs[2])).read_bytes(), b'2')

    @unittest.skipUnless(hasattr(os, 'geteuid') and os.geteuid() == 0, 'for root')
    def test_what_a_roll_back_by_root_creates_belongs_to_the_owner(self):
        pack, config = self.upload(b'pack'), self.upload(b'config', 'config')
        moment = self.tick()
        self.delete(pack)
        self.delete(config)
        self.upload(b'new', 'index')
        Path(path_of(self.store, pack)).parent.rmdir()
        Path(path_of(self.store, config)).write_bytes(b'other')
        for path in (self.root, *self.root.rglob('*')):
            os.chown(path, 1234, 1235)
        done = self.run_it('--roll-back', restic_serve.moment_for_people(int(moment * 1e6)),
                           self.root / 'host')
        self.assertEqual(done, (0, 'host: 1 config, 1 pack (4 B) restored, 1 index set aside\n', ''))
        for path in self.root.rglob('*'):
            self.assertEqual((path.stat().st_uid, path.stat().st_gid), (1234, 1235), path)

    def test_what_has_the_name_of_an_object_is_looked_at_before_it_is_left(self):
        """Where uploads are not verified an attacker may put anything under the name of a pack."""
        pack = self.upload(b'pack')
        moment = self.tick()
        self.delete(pack)
        Store(str(self.root), verify=False).save(pack, Bytes(b'garbage'))
        self.assertEqual(self.roll_back(moment), '1 pack (4 B) restored')
        self.assertEqual(Path(path_of(self.store, pack)).read_bytes(), b'pack')

    def test_what_comes_while_a_roll_back_goes_on_stays(self):
        patch_for(self, Store, now=lambda store, path='': self.now if path else self.now + 9999)
        moment = self.tick()
        self.upload(b'new')
        late = []

        def back_up(job):
            if not late:
                self.now += 10
                late.append(self.upload(b'of a backup'))

        with first(back_up, restic_serve.RollBack, 'check_locks'):
            self.assertEqual(self.roll_back(moment), '1 pack (3 B) set aside')
        self.assertEqual(self.view(self.now), {'data': [late[0].name]})
        self.upload(b'lock', 'locks')
        self.assertRaisesRegex(ValueError, 'the repository has been locked since', self.roll_back, moment)
        self.roll_back(moment, force=True)

    def test_a_name_of_others_is_no_mark(self):
        since = self.past.earliest('/host')
        self.now += 5
        (self.root / 'host/.restic_serve/deleted/since.sync-conflict').touch()
        self.past.begin('/host')
        self.assertEqual(self.past.earliest('/host'), since)

    def test_random_histories_against_a_model(self):
        for seed in range(60 if LONG_TESTS else 4):
            with self.subTest(seed=seed):
                shutil.rmtree(self.root / 'host')
                self.store.create_repository('/host')
                self.past.begin('/host')
                self.live(random.Random(seed))

    def live(self, chance):
        """Uploads, deletes, purges and roll-backs, and at each kept moment a look."""
        begin, model = self.now, {}     # of each object, when it was there: pairs of begin and end
        contents = [bytes([number]) * 3 for number in range(8)]

        def then(moment):
            names = sorted(name for name, spans in model.items()
                           if any(first <= moment < end for first, end in spans))
            return {'data': names} if names else {}

        for _ in range(60):
            action, content = chance.randrange(10), chance.choice(contents)
            spans = model.setdefault(named(content), [])
            is_there = bool(spans) and spans[-1][1] == math.inf
            if action < 4:
                if not is_there:
                    spans.append((self.now, math.inf))
                self.upload(content)
            elif action < 8:
                if is_there:
                    spans[-1] = (spans[-1][0], self.now)
                self.assertEqual(self.delete(Location('/host', 'data', named(content))),
                                 3 if is_there else None)
            elif action == 8:
                self.now += chance.choice((0, 0, 400))
                self.purge()
            else:
                moment = self.moment(chance, begin)
                wanted, present = then(moment).get('data', []), then(self.now).get('data', [])
                for name in set(wanted) - set(present):
                    model[name].append((self.now, math.inf))
                for name in set(present) - set(wanted):
                    model[name][-1] = (model[name][-1][0], self.now)
                self.roll_back(moment)
            for moment in (self.now, max(begin, self.now - 1),
                           *(self.moment(chance, begin) for _ in range(3))):
                self.assertEqual(self.view(moment), then(moment), (moment - begin))

    def moment(self, chance, begin):
        return max(begin, self.now - self.KEEP + 1, self.now - chance.randrange(60))

    def test_what_leads_to_another_file_system_is_copied(self):
        pack = self.upload(b'pack')
        uploaded = self.now - 1
        steps = []
        for name in ('rename', 'sync', 'unlink'):
            call = getattr(restic_serve.Folder, name)
            patch_for(self, restic_serve.Folder, **{name: lambda folder, *args, name=name, call=call: (
                steps.append((name, 'deleted' in folder.path)), call(folder, *args))})
        with failing(lambda source, target: source.endswith(pack.name), os, 'replace', errno.EXDEV):
            self.delete(pack)
        copied = steps.index(('unlink', False))
        self.assertEqual(steps[copied - 2:copied], [('rename', True), ('sync', True)])
        self.assertEqual(self.view(uploaded), {'data': [pack.name]})
        self.assertEqual(list(self.store.objects(Location('/host', 'data'), False)), [])

    def test_what_a_crash_left_of_a_copy_is_removed_by_the_purge_unless_it_is_being_written(self):
        self.delete(self.upload(b'pack'))
        folder = next((self.root / 'host/.restic_serve/deleted/data').iterdir())
        for name in ('upload-dead', 'upload-alive', 'new-young'):
            (folder / name).touch()
        with open(folder / 'upload-alive', 'rb') as alive:
            restic_serve.lock_file(alive.fileno())
            self.purge()
            self.assertEqual(sorted(name for name in self.files(folder) if '-' in name),
                             ['new-young', 'upload-alive'])


@unittest.skipUnless(hasattr(os, 'fork'), 'this system has no fork')
class PastDeathTest(PastTestCase):
    """A process that dies at any step of a delete, a purge or a roll-back."""

    CALLS = ('replace', 'unlink', 'mkdir', 'open', 'fsync', 'utime')

    def die_at_each_step(self, prepare, act, check):
        """Have a process do something, and die before one call after the other; what `prepare` returns is
        given to the others."""
        for step in range(0, 1000, 1 if LONG_TESTS else 4):
            shutil.rmtree(self.root / 'host')
            self.store.create_repository('/host')
            self.past.begin('/host')
            prepared = prepare()
            pid = os.fork()
            if not pid:
                try:
                    self.count_down(step)
                    act(prepared)
                finally:
                    os._exit(0)
            status = os.waitpid(pid, 0)[1]
            check(prepared)
            act(prepared)
            self.now += 1
            check(prepared, done=True)
            if not status:
                self.assertGreater(step, 3)
                return
        self.fail('it never ended')

    def count_down(self, step):
        left = iter(range(step))

        def count(*args):
            if next(left, None) is None:
                os._exit(9)

        for name in self.CALLS:
            first(count, os, name).start()

    def test_in_a_delete(self):
        def check(prepared, done=False):
            pack, moment = prepared
            self.assertEqual(self.view(moment), {'data': [pack.name]})
            if done:
                self.assertEqual(self.view(self.now), {})

        def prepare():
            return self.upload(b'pack'), self.tick()

        self.die_at_each_step(prepare, lambda prepared: self.past.delete(prepared[0]), check)

    def test_in_a_purge(self):
        def prepare():
            for number in range(3):
                self.delete(self.upload(bytes([number])))
            kept = self.upload(b'kept')
            self.now += self.KEEP
            other = self.upload(b'other')
            moment = self.tick()
            self.delete(other)
            return kept, other, moment

        def check(prepared, done=False):
            kept, other, moment = prepared
            self.assertEqual(self.view(self.now), {'data': [kept.name]})
            self.assertEqual(self.view(moment), {'data': sorted([kept.name, other.name])})
            if done:
                self.assertEqual(len(list(self.past.kept('/host'))), 1)

        self.die_at_each_step(prepare, lambda prepared: self.purge(), check)

    def test_in_a_roll_back(self):
        kinds = ('data', 'index', 'keys', 'snapshots', 'config')

        def prepare():
            old = [self.upload(b'old ' + kind.encode(), kind) for kind in kinds]
            moment = self.tick()
            before = self.view(moment)
            for location in old:
                self.delete(location)
            new = [self.upload(b'new ' + kind.encode(), kind) for kind in kinds]
            attacked = self.tick()
            return moment, before, attacked, self.view(attacked), old, new

        def check(prepared, done=False):
            moment, before, attacked, after, old, new = prepared
            self.assertEqual(self.view(moment), before)
            self.assertEqual(self.view(attacked), after)
            old, new = ([self.store.size(location) is not None for location in some] for some in (old, new))
            if old[3]:      # a snapshot comes after all that it refers to
                self.assertTrue(all(old))
            if new[3]:      # and goes before it
                self.assertTrue(all(new))
            self.assertTrue(old[4])     # there is a config at any time
            if done:
                self.assertEqual(self.view(self.now), before)

        self.die_at_each_step(prepare, lambda prepared: restic_serve.RollBack(
            self.store, self.past, '/host', int(prepared[0] * 1e6)).run(), check)


class PastApiTest(PastTestCase):
    """The past over the wire."""

    def setUp(self):
        super().setUp()
        self.usage = Usage(self.store, Counters(), past=self.past)
        self.api = Api(self.store, Policy(), usage=self.usage)

    def ask(self, method, path, body=b'', **headers):
        """Status and content of an answer."""
        return answer_of(self.api, method, path, body, **headers)[::2]

    def test_it_is_read_by_any_request_and_written_by_none(self):
        pack, lock = self.upload(b'0123456789'), self.upload(b'lock', 'locks')
        self.upload(b'config', 'config')
        moment = restic_serve.moment_for_people(int(self.tick() * 1e6))
        self.assertEqual(self.ask('DELETE', f'/host/data/{pack.name}')[0], 200)
        self.tick()
        at = f'/host/.at/{moment}'
        gone = f'/host/.at/{restic_serve.moment_for_people(int(self.now * 1e6))}'
        for path, expected in ((f'{at}/data/{pack.name}', (200, b'0123456789')),
                               (f'{gone}/data/{pack.name}', (404, b'not found\n')),
                               (f'/host/data/{pack.name}', (404, b'not found\n')),
                               (f'{at}/data/', (200, f'["{pack.name}"]'.encode())),
                               (f'{gone}/data/', (200, b'[]')), (f'{at}/config', (200, b'config')),
                               (f'{at}/locks/', (200, f'["{lock.name}"]'.encode())),
                               (f'{at.replace(":", "%3A")}/config', (200, b'config')),
                               (at, (404, b'not found\n')),
                               (f'/host/.at/{moment}/.at/1d/config', (404, b'not found\n')),
                               ('/host/.at/', (404, b'not found\n')), ('/host/.at', (404, b'not found\n'))):
            self.assertEqual(self.ask('GET', path), expected, path)
        self.assertEqual(self.ask('GET', f'{at}/data/{pack.name}', range='bytes=2-4'), (206, b'234'))
        sizes = self.ask('GET', f'{at}/data/', accept=V2)[1]
        self.assertEqual(json.loads(sizes), [{'name': pack.name, 'size': 10}])
        for method, path in (('POST', f'data/{named(b"x")}'), ('DELETE', f'data/{pack.name}'),
                             ('POST', 'config'), ('DELETE', 'config'), ('POST', '?create=true')):
            self.assertEqual(self.ask(method, f'{at}/{path}', b'x'),
                             (403, b'earlier states (.at) are read-only\n'), path)
        self.assertEqual(self.ask('POST', f'{at}/locks/{named(b"mine")}', b'mine')[0], 200)
        self.assertTrue((self.root / 'host/locks' / named(b'mine')).exists())
        self.assertEqual(self.ask('DELETE', f'{at}/locks/{named(b"mine")}')[0], 200)
        self.assertFalse((self.root / 'host/locks' / named(b'mine')).exists())

    def test_a_moment_that_cannot_be_known_is_said(self):
        for at, status, text in (('x', 400, "invalid time 'x'; use "), ('2037-01-01', 400, 'in the future'),
                                 ('1h', 410, 'no history before 2026-11-18T')):
            found = self.ask('GET', f'/host/.at/{at}/config')
            self.assertEqual(found[0], status)
            self.assertIn(text, found[1].decode())
            self.assertIn(text, self.log[-1])   # restic shows the status alone
        self.api = Api(self.store, Policy())
        status, content = self.ask('GET', '/host/.at/1h/config')
        self.assertEqual((status, b'--keep-deleted' in content), (404, True))

    def test_encoded_and_reserved_names(self):
        self.assertEqual(restic_serve.parse_path('/x%2541/.at/2d/config').repository, '/x%41')
        for name in ('.Restic_Serve', '.restic_serve', '.restic_serve.', '.AT', '.snapshots', '@eaDir',
                     'lost+found'):
            self.assertEqual(self.ask('POST', f'/host/{name}/?create=true')[0], 404, name)
        for name in ('DATA', 'Config', 'My Snapshots'):     # which are names like any other
            self.assertEqual(restic_serve.parse_path(f'/host/{name}/').repository, f'/host/{name}')

    def test_what_is_kept_counts_for_quotas_until_it_is_purged(self):
        counted_plainly(self)
        self.usage = Usage(self.store, Counters(), interval=0, quotas=restic_serve.Quotas({'/': 1000}),
                           past=self.past)
        self.api = Api(self.store, Policy(), usage=self.usage)
        self.usage.census.count()
        for number in range(3):
            content = bytes([number]) * 300
            self.assertEqual(self.ask('POST', f'/host/data/{named(content)}', content)[0], 200)
            os.utime(path_of(self.store, Location('/host', 'data', named(content))), (1, 1))
            self.assertEqual(self.ask('DELETE', f'/host/data/{named(content)}')[0], 200)
            self.now += 1
        self.assertEqual(self.ask('POST', f'/host/data/{named(b"x")}', b'x' * 300)[0], 507)
        self.assertRegex(self.log[-1], '900 B of that are deleted objects, the first of which expire on '
                                       '2026-11-18T')
        for _ in range(2):  # as it is counted, and counted anew
            held = self.usage.holdings(['/host'])['/host']
            self.assertEqual((held.bytes, held.kept, held.kept_bytes, held.deleted), (0, 3, 900, 3))
            self.assertEqual(self.usage.quota('')[0], 900)
            self.usage.census.count()
        with mock.patch.object(restic_serve, 'COUNT_PATIENCE', 0):
            self.assertIn('and 900 B deleted', rendered(self.store, self.usage))
        exposed = metrics_of(self.usage, self.store).exposition()
        self.assertIn('restic_serve_repository_deleted_kept_bytes{repo="host"} 900\n', exposed)
        self.assertIn('restic_serve_repository_deleted_last_day_objects{repo="host"} 3\n', exposed)
        self.now += 2 * self.KEEP
        patch_for(self, restic_serve.Past, trusted_now=lambda past: past.now(''))
        self.usage.purge(math.inf)
        self.assertEqual(self.usage.quota('')[0], 0)
        self.usage.census.count()
        self.assertEqual(self.usage.quota('')[0], 0)

    def test_a_terminal_shows_how_far_a_roll_back_is(self):
        self.upload(b'config', 'config')
        restic_serve.Past(self.store, 86400).begin('/host')
        self.assertRegex(self.run_on_terminal('--roll-back', '0s', self.root / 'host'),
                         r'(?s)^\rhost: nothing to d.*\x1b\[K.*\r\x1b\[Khost: nothing to do\n$')

    def test_a_scrub_reads_what_is_kept_and_tells_of_damage_once(self):
        locations = [self.upload(bytes([number])) for number in range(3)]
        for location in locations[:2]:
            self.delete(location)
        (self.root / 'host/config').write_bytes(b'config')
        found = {}

        def scrubbed(age=0):
            found.clear()
            job = scrub(self.store, age, None, found.__setitem__)
            return job.damaged, job.checked, restic_serve.last_scrubs(self.store)['/host'].damaged

        def kept(location):
            return next(path for path in self.root.rglob(f'{location.name}.*'))

        with mock.patch.object(Store, 'now', lambda store: time.time()):
            self.assertEqual((*scrubbed(), found), (0, 3, 0, {}))
            kept(locations[0]).write_bytes(b'damaged')
            # The repository itself is sound: what took the object's place may be there already.
            self.assertEqual((scrubbed(), list(found)), ((1, 3, 0), [str(kept(locations[0]))]))
            self.assertEqual((*scrubbed(), found), (0, 3, 0, {}))
            Path(path_of(self.store, locations[2])).write_bytes(b'damaged')
            self.assertEqual(scrubbed(), (1, 3, 1))
            self.delete(locations[2])       # as README's recipe does
            for age in (0, 3600, 3600, 0):
                self.assertEqual((scrubbed(age)[::2], found), ((0, 0), {}))
            kept(locations[1]).write_bytes(b'damaged')
            self.assertEqual([scrubbed()[0] for _ in range(2)], [1, 0])
            stray = kept(locations[0]).with_name('upload-dead')
            stray.touch()
            self.assertEqual((scrubbed()[0], list(found)), (0, [str(stray)]))


# ---- Counters --------------------------------------------------------------------------------------

class DirectoryTest(ApiTestCase):
    """A directory that goes away, and one that is read-only."""

    def setUp(self):
        super().setUp()
        self.paths = [('POST', f'/host/data/{named(b"x")}', b'x'), ('POST', '/host/?create=true', b''),
                      ('DELETE', f'/host/locks/{named(b"x")}', b'')]

    def test_where_the_disk_was_unmounted_nothing_is_stored_and_nothing_is_missing(self):
        reads = [('GET', '/host/config'), ('GET', '/host/data/'), ('HEAD', f'/host/data/{named(b"x")}')]
        self.assertEqual([self.status(*one) for one in self.paths], [200, 200, 200])
        self.root.rename(self.folder / 'disk')
        for make in (lambda: None, self.root.mkdir):    # no mount point, and an empty one
            make()
            self.assertEqual([self.status(*one) for one in (*self.paths, *reads)], [500] * 6)
        self.assertEqual(self.files(), [])
        self.root.rmdir()
        (self.folder / 'disk').rename(self.root)
        self.assertEqual([self.status(*one) for one in (*self.paths, *reads)], [200, 200, 200, 404, 200, 200])
        self.assertEqual(self.log, [
            f'created directory {self.root}', f'{self.root} is gone (disk unmounted?); all requests '
            'fail until it is back', f'{self.root} is back'])

    def test_what_is_known_of_a_quota_outlives_a_disk_that_was_away(self):
        usage = self.counted({'/': 1 << 20}, interval=0)
        usage.create(Location('/host'))
        usage.save(Location('/host', 'keys', named(b'x')), Bytes(b'x'))
        usage.census.count()
        held = usage.quota('')
        self.root.rename(self.folder / 'disk')
        self.root.mkdir()
        self.assertRaises(restic_serve.DirectoryGone, usage.census.count)
        self.assertEqual(usage.quota(''), held)
        self.assertEqual(usage.names(), ['/host'])

    def test_a_directory_may_be_read_only(self):
        self.status('POST', '/host/config', b'config')
        self.log.clear()
        self.store = Store(str(self.root))
        with mock.patch.object(restic_serve.Scratch, '__init__', side_effect=OSError(errno.EROFS, 'x')):
            self.store.prepare()
        self.assertEqual(self.log, [f'{self.root} is on a read-only file system; serving it read-only'])
        self.check_read_only()
        restic_serve.refusals.__init__()
        self.store = self.make_store(read_only=True)    # on purpose
        self.check_read_only()
        with self.assertRaisesRegex(OSError, 'is the disk mounted'):
            Store(str(self.root / 'missing'), read_only=True).prepare()

    def check_read_only(self):
        before = sorted(self.root.rglob('*'))
        self.api = Api(self.store, Policy())
        self.assertEqual([self.status(*one) for one in self.paths], [403, 403, 403])
        self.assertRegex(self.log[-1], '^(POST|DELETE) /host/.*--read-only.*--no-lock$')
        self.assertEqual(self.status('GET', '/host/config'), 200)
        self.store.nameless = False     # what has a name would need a folder for it
        self.store.now()
        self.assertEqual(sorted(self.root.rglob('*')), before)

    def test_a_monitor_hears_how_it_is(self):
        def health():
            self.store.directory._next_probe = -math.inf
            return answer_of(self.api, 'GET', '/health')[::2]

        self.api = Api(self.store, Policy(), Accounts(user='alice', password='p'))
        self.assertEqual(health(), (200, b'ok\n'))
        self.assertEqual(self.files(), [])
        failing = mock.patch.object(restic_serve.Scratch, '__init__', side_effect=OSError(errno.ENOSPC, 'x'))
        with failing as probe:
            self.assertEqual(health(), (503, b'the directory is not writable\n'))
            for _ in range(9):  # no stranger makes it write again and again
                self.assertEqual(self.status('GET', '/health'), 503)
            self.assertEqual(probe.call_count, 1)
            self.store.directory.read_only = True
            self.assertEqual(health(), (200, b'ok\n'))
        self.root.rename(self.folder / 'disk')
        self.assertEqual(health(), (503, b'the directory is gone\n'))
        request = Request('GET', '/health', 'HTTP/1.1', {}, Bytes(b''), Peer('test'))
        self.api.finish(request, self.api.handle(request).status, 0)
        self.assertTrue(request.is_probe)
        for level, logged in ((logging.INFO, 0), (logging.DEBUG, 1)):
            restic_serve.access_log.setLevel(level)
            self.addCleanup(restic_serve.access_log.setLevel, logging.NOTSET)
            with mock.patch.object(restic_serve.access_log, 'info') as info:
                self.api.finish(request, 503, 0)
            self.assertEqual(info.call_count, logged)

    def test_who_asks_while_another_looks_hears_the_last_answer(self):
        heard, directory = [], self.store.directory
        outcomes = iter((None, OSError(errno.ENOSPC, 'made by a test'), None))

        def probe():
            heard.append(directory.find_fault())
            error = next(outcomes)
            if error:
                raise error

        with mock.patch.object(directory, '_probe', probe):
            for _ in range(3):
                directory._next_probe = -math.inf
                heard.append(directory.find_fault())
        self.assertEqual(heard, ['', '', '', *['the directory is not writable'] * 2, ''])

    def test_a_directory_may_have_to_exist(self):
        self.assertRaises(OSError, Store(str(self.root / 'missing')).prepare, True)
        Store(str(self.root / 'missing')).prepare(False)


class CountersTest(TestCase):
    def in_another_process(self, work):
        pid = os.fork()
        if not pid:
            status = 1
            with contextlib.suppress(BaseException):
                work()
                status = 0
            os._exit(status)
        self.assertEqual(os.waitpid(pid, 0)[1], 0)

    @unittest.skipUnless(hasattr(os, 'fork'), 'this system has no fork')
    def test_what_processes_count_adds_up(self):
        counters = Counters(3)
        counters.add(('x', 'alice', 'a/b'), 1, 10)

        def work():
            for slot in (1, 2):
                counters.join(slot)
                counters.add(('x', 'alice', 'a/b'), 2, 20)
                counters.add(('x', '', 'ü\udc80'), slot)

        self.in_another_process(work)
        counters.add(('x', 'alice', 'a/b'), 1, 0)
        self.assertEqual(counters.total(('x', 'alice', 'a/b'), 2), [6, 50])
        self.assertEqual(counters.read(('x', '', 'ü\udc80')), [[1], [2]])
        self.assertEqual(counters.find('x'), {('x', 'alice', 'a/b'): [6, 50], ('x', '', 'ü\udc80'): [3]})
        self.assertEqual(counters.total(('other',), 2), [0, 0])

    @unittest.skipUnless(hasattr(os, 'fork'), 'this system has no fork')
    def test_who_takes_over_goes_on_but_has_no_connections(self):
        counters = Counters(2)

        def work():
            counters.join(1)
            counters.add(('connections',), 3)
            counters.add(('x', 'a'), 5)
            os.kill(os.getpid(), signal.SIGKILL)

        self.assertRaises(AssertionError, self.in_another_process, work)
        self.in_another_process(lambda: (counters.join(1), counters.add(('x', 'a'), 1)))
        self.assertEqual(counters.total(('connections',), 1), [0])
        self.assertEqual(counters.total(('x', 'a'), 1), [6])

    def test_20_000_repositories_below_one_folder_and_80_000_in_all_have_rows(self):
        counters = Counters()
        history = restic_serve._to_row(restic_serve._NO_HISTORY)
        # A 32-bit system has less address space for them.
        for number in range(80_000 if sys.maxsize > 1 << 32 else 18_000):
            path = f'/tenant{number % 4:03d}/host-{number:05d}'
            self.assertTrue(counters.put(('history', path), *history), number)
            self.assertTrue(counters.put(('held', path), *[0] * len(restic_serve.Held._fields)), number)

    def test_less_memory_will_do_where_the_system_promises_no_more(self):
        with failing(lambda length: length > 20 << 20, restic_serve, 'shared_memory', errno.ENOMEM):
            counters = Counters(2)
        counters.add(('x',), 1)
        counters.join(1)
        counters.add(('x',), 2)
        self.assertEqual(counters.total(('x',), 1), [3])
        # What no address can name is not to be had either, which main() says in a line.
        error = raised(OSError, Counters, 1 << 40)
        self.assertIn('for the counters of 1099511627776 processes', str(error))
        self.assertEqual(error.errno, errno.ENOMEM)

    def test_where_there_is_no_room_for_a_row_others_go_on(self):
        with mock.patch.multiple(restic_serve, SLOT_BYTES=4096, SPARE_BYTES=1024):
            counters = Counters(2)
            for number in range(200):
                counters.add(('x', f'{number:03d}'), 1)
                counters.add(('x', '000'), 1)
            self.assertFalse(counters.add(('x', '199'), 1))
            self.assertEqual(counters.total(('x', '199'), 2), [0, 0])
            counters.join(1)
            counters.put(('x', 'other'), 7)
        found = counters.find('x')
        self.assertEqual(found['x', '000'], [201])
        self.assertEqual(found['x', 'other'], [7])
        self.assertIn(sum(row == [1] for row in found.values()), range(50, 150))
        self.assertEqual(self.log, [
            'too many repositories to count each one; the rest is counted as "other"'])

    def test_a_top_level_folder_has_a_part_of_the_rows_and_the_rest_of_it_counts_as_other(self):
        with mock.patch.multiple(restic_serve, SLOT_BYTES=64 * 1024, SPARE_BYTES=8 * 1024):
            counters = Counters()
            for number in range(1000):
                counters.add(('held', f'/evil/{"x" * 200}{number}'), 1)
                counters.add(('blob', 'alice', f'/evil/{"x" * 200}{number}', 'data'), 1, 0)
            counters.join(0)    # who takes over has no more room
            self.assertFalse(counters.add(('held', f'/evil/{"y" * 200}'), 0))
            for number in range(40):
                self.assertTrue(counters.add(('held', f'/good{number}'), 5))
            self.assertTrue(counters.add(('scope', 'alice'), 1))
        held = counters.find('held')
        self.assertEqual(sum(row[0] for row in held.values()), 1200)
        self.assertGreater(held['held', 'other'][0], 900)
        self.assertEqual(counters.find('blob')['blob', '', 'other', 'data'][0]
                         + len(counters.find('blob')) - 1, 1000)


# ---- Bandwidth -------------------------------------------------------------------------------------

class BandwidthTest(unittest.TestCase):
    SENT, RECEIVED = restic_serve.Bandwidth.SENT, restic_serve.Bandwidth.RECEIVED

    def test_each_row_of_a_timetable_at_its_time(self):
        daily, weekly = '08:00,512k 19:00,10M;23:00,off', 'Mon-08:00,1M;friday-18:00,off Sun-20:30,2M:1M'
        for text, (hour, minute, weekday), sent, received in (
                ('10M', (12, 0, 3), 10 << 20, 10 << 20), ('10M:1M', (12, 0, 3), 10 << 20, 1 << 20),
                ('off', (12, 0, 3), 0, 0), ('0', (12, 0, 3), 0, 0), ('off:100B', (12, 0, 3), 0, 100),
                ('666', (12, 0, 3), 666 << 10, 666 << 10), ('1.5Mi', (0, 0, 0), 3 << 19, 3 << 19),
                (daily, (8, 0, 0), 512 << 10, 512 << 10), (daily, (18, 59, 4), 512 << 10, 512 << 10),
                (daily, (19, 0, 6), 10 << 20, 10 << 20), (daily, (23, 30, 6), 0, 0),
                (daily, (7, 59, 0), 0, 0), ('12:00,OFF Sat-13:00,Off', (12, 0, 3), 0, 0),
                (weekly, (8, 0, 0), 1 << 20, 1 << 20), (weekly, (17, 59, 4), 1 << 20, 1 << 20),
                (weekly, (18, 0, 4), 0, 0), (weekly, (20, 29, 6), 0, 0),
                (weekly, (20, 30, 6), 2 << 20, 1 << 20), (weekly, (7, 59, 0), 2 << 20, 1 << 20)):
            bandwidth = Clock(hour, minute, weekday).bandwidth(text)
            self.assertEqual((bandwidth.rate(self.SENT), bandwidth.rate(self.RECEIVED)), (sent, received),
                             (text, hour, minute, weekday))

    def test_what_is_no_bandwidth(self):
        for text in ('', 'x', '10X', '10M:', '1:2:3', '24:00,1M', '10:60,1M', '10:20,', 'Foo-10:20,1M',
                     'M-10:20,1M', '10M 20M', '10M;10:20,1M', '-1', '10:20,1M,2M'):
            self.assertIn('10M:1M, off', str(raised(ValueError, restic_serve.parse_timetable, text)))
        for parse in (restic_serve.parse_size, restic_serve.parse_quota):
            self.assertIn('is too large', str(raised(ValueError, parse, '9' * 400 + 'M')))

    def test_the_next_slot_comes_into_force_by_itself(self):
        clock = Clock(18, 59, 0)
        bandwidth = clock.bandwidth('08:00,1k 19:00,off')
        self.assertEqual(bandwidth.rate(self.SENT), 1024)
        clock.day = Clock(19, 0, 0).day
        clock.now += 1
        self.assertEqual(bandwidth.rate(self.SENT), 0)

    def test_the_rate_is_right_and_smooth_and_nobody_can_save_up(self):
        clock = Clock()
        bandwidth = clock.bandwidth('1M')
        clock.now += 3600
        begin, passed = clock.now, []
        for _ in range(500):
            count = bandwidth.step(self.SENT, 1 << 20)
            bandwidth.wait(self.SENT, count)
            passed.append((clock.now - begin, count))
        seconds, total = passed[-1][0], sum(count for _, count in passed)
        self.assertAlmostEqual(total / seconds / (1 << 20), 1, delta=0.05)
        for tenth in range(90):
            part = sum(count for moment, count in passed if tenth <= moment * 10 < tenth + 1)
            self.assertAlmostEqual(part / (1 << 20) * 10, 1, delta=0.25)

    def test_the_two_ways_do_not_share(self):
        clock = Clock()
        bandwidth = clock.bandwidth('1k:2k')
        for way in (self.SENT, self.RECEIVED) * 3:
            bandwidth.wait(way, 1024)
        self.assertAlmostEqual(clock.now, 1002)

    def test_a_limit_that_is_lifted_is_none(self):
        bandwidth = Clock().bandwidth('1k')
        self.assertTrue(bandwidth.toggle())
        self.assertEqual((bandwidth.step(self.SENT, 9999), bandwidth.rate(self.SENT)), (9999, 0))
        self.assertFalse(bandwidth.toggle())
        self.assertEqual((bandwidth.step(self.SENT, 9999), bandwidth.rate(self.SENT)), (512, 1024))


# ---- Scrub -----------------------------------------------------------------------------------------

class ScrubTest(TestCase):
    """Every object is read, and whatever is wrong is said."""

    def setUp(self):
        super().setUp()
        self.store = Store(str(self.root))
        self.root.mkdir()
        self.paths = {}
        for repository in ('', '/host', '/deep/below/x'):
            self.store.create_repository(repository)
            for kind in ('data', 'index', 'keys'):
                location = self.put_object(repository, kind, os.urandom(3000))
                self.paths[repository, kind] = Path(path_of(self.store, location))
            Path(f'{self.root}{repository}/config').write_bytes(b'x')

    def scrub(self, age=0, bandwidth=None, store=None):
        """What is reported, by path, how many objects were read, and how many are damaged."""
        found = {}
        job = scrub(store or self.store, age, bandwidth, found.__setitem__)
        verdicts = [reason.partition(':')[0].partition(',')[0] for reason in found.values()]
        self.assertEqual(job.damaged, verdicts.count('damaged'))
        self.assertEqual(job.unreadable, len([verdict for verdict in verdicts
                                              if verdict not in ('damaged', 'foreign', 'stray')]))
        found = {os.path.relpath(path, job._store.root): reason for path, reason in found.items()}
        return found, job.checked, job.damaged

    def relative(self, *key):
        return str(self.paths[key].relative_to(self.root))

    def test_root_follows_no_link_where_it_writes(self):
        target = self.folder / 'target'
        target.mkdir()
        shutil.rmtree(self.root / '.restic_serve', ignore_errors=True)
        (self.root / '.restic_serve').symlink_to(target)
        self.scrub()
        self.assertEqual(list(target.iterdir()), [])
        self.assertIn('cannot save scrub results', self.log[-1])

    @unittest.skipUnless(hasattr(os, 'geteuid') and os.geteuid() == 0, 'for root')
    def test_what_root_writes_is_given_to_the_owner_of_the_directory(self):
        os.chown(self.root, 1234, 1235)
        shutil.rmtree(self.root / restic_serve.HIDDEN, ignore_errors=True)
        store = Store(str(self.root), shared=True)
        scrub(store)
        for path, mode in (('.restic_serve', 0o770), ('.restic_serve/scrub.json', 0o660)):
            status = (self.root / path).stat()
            self.assertEqual((status.st_uid, status.st_gid), (1234, 1235))
            self.assertEqual(stat.S_IMODE(status.st_mode), mode)

    def test_the_last_result_of_each_repository_is_remembered(self):
        self.assertEqual(restic_serve.last_scrubs(self.store), {})
        os.truncate(self.paths['/host', 'keys'], 10)
        with mock.patch.object(time, 'time', return_value=time.time() + 60):
            now = int(time.time())
            self.scrub()
        self.assertEqual(restic_serve.last_scrubs(self.store), {
            '': (now, 3, 0, [], 0, []), '/deep/below/x': (now, 3, 0, [], 0, []),
            '/host': (now, 3, 1, [f'keys/{self.paths["/host", "keys"].name}'], 0, [])})

    def test_damage_of_every_kind_is_found(self):
        self.paths['', 'data'].write_bytes(b'other')
        os.truncate(self.paths['/host', 'keys'], 10)
        (self.root / 'deep/below/x/config').write_bytes(b'')
        broken = self.relative('/host', 'data')
        with failing(lambda path, *more: path == os.path.basename(broken), os, 'open'):
            found, checked, damaged = self.scrub()
        self.assertEqual((checked, damaged), (9, 4))
        self.assertTrue(found.pop(self.relative('/host', 'keys')).startswith('damaged: its SHA-256 is '))
        self.assertEqual(found, {
            'deep/below/x/config': 'damaged: empty', broken: 'damaged: made by a test',
            self.relative('', 'data'): f'damaged: its SHA-256 is {named(b"other")}'})

    def test_foreign_and_stray_files_are_no_damage(self):
        wrong = self.root / 'host/data/00' / ('ff' * 32)
        for path in (wrong, *map(self.root.joinpath, (
                'host/data/x', 'host/index/notes.txt', 'host/y', 'host/keys/folder/z',
                '.restic_serve/upload-old', '.restic_serve/upload-young',
                'host/data/00/.restic_serve-upload-old'))):
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b'x')
        (self.root / '.restic_serve/upload-folder').mkdir()
        (self.root / 'host/data/00/upload-link').symlink_to('nowhere')
        with open(self.root / '.restic_serve/upload-young', 'rb') as young:
            self.assertTrue(restic_serve.lock_file(young.fileno()))  # an upload under way
            found, _, damaged = self.scrub()
        self.assertEqual(damaged, 0)
        self.assertEqual({path: reason.partition(':')[0] for path, reason in found.items()}, {
            f'host/data/00/{wrong.name}': 'foreign', 'host/data/x': 'foreign',
            'host/index/notes.txt': 'foreign', 'host/y': 'foreign', 'host/keys/folder': 'foreign',
            '.restic_serve/upload-old': 'stray',
            'host/data/00/.restic_serve-upload-old': 'stray'})

    def test_what_cannot_be_read_is_said_and_the_rest_is_read(self):
        (self.root / 'lost+found').mkdir()
        self.scrub()
        hidden = ('/deep', '/lost+found', '/host/data', '/.restic_serve')
        with failing(lambda folder, *fd: folder.endswith(hidden), restic_serve, '_scan', errno.EACCES):
            found, checked, damaged = self.scrub()
            self.assertEqual(set(self.verdicts(self.store).values()), {'unreadable'})
        self.assertEqual((sorted(found), checked, damaged), (['.restic_serve', 'deep', 'host/data'], 5, 0))
        self.assertEqual(self.verdicts(self.store), {'': 'unreadable', '/host': 'unreadable',
                                                     '/deep/below/x': 'sound'})

    def verdicts(self, store):
        """The verdicts on its repositories."""
        usage = Usage(store, Counters())
        usage.census.count()
        watched = restic_serve.Watch(store, usage, math.inf).look(time.time())
        return {repository.name: repository.verdict for repository in watched}

    @staticmethod
    def exit_status(store):
        job = scrub(store)
        damaged = job.damaged + sum(result.damaged for result in job.results.values())
        return restic_serve.exit_status(store, job.results, damaged, job.unreadable)

    def test_what_nobody_could_look_at_is_not_sound_and_keeps_its_verdict(self):
        data, link = self.relative('/host', 'data'), lambda path: path.symlink_to(self.folder / 'gone')
        for number, (place, make, verdict, status) in enumerate((
                ('host/config', lambda path: None, 'damaged', 1), ('host/config', Path.mkdir, 'damaged', 1),
                (data, Path.mkdir, 'damaged', 1), (data, os.mkfifo, 'damaged', 1), (data, link, 'damaged', 1),
                ('host/index', link, 'unreadable', 3), ('host/data', Path.touch, 'unreadable', 3),
                (os.path.dirname(data), Path.touch, 'unreadable', 3), ('host/keys', Path.touch, 'damaged', 1),
                ('host', lambda path: (path / 'new/keys').mkdir(parents=True), None, 0),
                ('host', Path.mkdir, 'not a repository any more', 3))):
            store = Store(str(self.folder / str(number)))
            shutil.copytree(self.root, store.root)
            if place == 'host/keys':    # it is damaged, and then nobody can look
                os.truncate(next(Path(store.root, place).iterdir()), 10)
            scrub(store)
            path = Path(store.root, place)
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            make(path)
            self.scrub(store=store)
            self.assertEqual(self.exit_status(store), status, place)
            verdicts = self.verdicts(store)
            self.assertEqual((verdicts.get('/host'), verdicts['']), (verdict, 'sound'), place)
            shutil.rmtree(Path(store.root, 'host'))
            self.assertEqual(self.exit_status(store), 0, place)     # it is forgotten

    def test_a_scrub_that_is_ended_keeps_what_it_found_and_what_it_verified(self):
        for key in (('', 'keys'), ('/host', 'keys'), ('/host', 'data')):
            os.truncate(self.paths[key], 10)
        patch_for(self, Store, now=lambda *store: time.time())
        steps = iter('1234')    # all of the first repository, and one object of the next

        def end(*check):
            if not next(steps, ''):
                raise SystemExit

        with mock.patch.object(time, 'time', return_value=time.time() + 60), \
                mock.patch.object(restic_serve, 'CORES', [0]), first(end, restic_serve.Scrub, '_check'):
            self.assertRaises(SystemExit, scrub, self.store)
        self.assertEqual(self.verdicts(self.store), {'': 'damaged', '/deep/below/x': 'not checked',
                                                     '/host': 'not checked'})
        (self.root / 'host/locks').rmdir()
        (self.root / 'host/locks').touch()
        with mock.patch.object(time, 'time', return_value=time.time() + 120):
            self.assertEqual(self.scrub(age=3600)[1:], (6, 3))
            with first(end, restic_serve.Scrub, '_check'):
                self.assertRaises(SystemExit, scrub, self.store)
        self.assertEqual({(result.damaged, result.unreadable) for result in restic_serve.last_scrubs(
            self.store).values()}, {(0, 0), (1, 0), (2, 1)})

    def test_a_directory_that_goes_is_not_sound(self):
        self.store.find()

        def vanish(*folder):
            if not (self.folder / 'away').exists():
                self.root.rename(self.folder / 'away')
                self.root.mkdir()

        with first(vanish, restic_serve.Scrub, '_bytes_of'):
            self.assertRaises(restic_serve.DirectoryGone, scrub, self.store)
        self.assertEqual(list(self.root.iterdir()), [])

    def test_a_record_has_a_limit_of_size(self):
        self.scrub()
        self.assertEqual(*(part.keys() for part in restic_serve.read_scrubs(self.store)))
        for name in (restic_serve.SCRUB_FILE, restic_serve.EVENTS_FILE):
            (self.root / '.restic_serve' / name).touch()
            with mock.patch.object(restic_serve, 'RECORD_BYTES', -1):
                self.assertRaisesRegex(OSError, 'larger than ', self.store.folders.read_hidden, name)
        with mock.patch.object(restic_serve, 'RECORD_BYTES', 100):
            self.scrub()
        self.assertEqual([len(part) for part in restic_serve.read_scrubs(self.store)], [0, 3])

    def test_a_folder_of_objects_may_be_a_link_as_it_may_for_the_server(self):
        (self.root / 'host/data').rename(self.folder / 'elsewhere')
        (self.root / 'host/data').symlink_to(self.folder / 'elsewhere')
        self.assertEqual(self.scrub(), ({}, 9, 0))
        self.paths['/host', 'data'].write_bytes(b'damaged')
        self.assertEqual(list(self.scrub()[0]), [self.relative('/host', 'data')])

    def test_nobody_who_watches_is_no_damage(self):
        stream = io.StringIO()
        stream.write = mock.Mock(side_effect=BrokenPipeError)
        with mock.patch.object(restic_serve, 'PROGRESS_SECONDS', 0):
            self.assertEqual(restic_serve.Scrub(self.store, 0, None, self.fail, stream).run(), 0)

    def test_a_million_folders_are_no_million_jobs_and_a_bug_in_one_thread_ends_the_others(self):
        from concurrent.futures import ThreadPoolExecutor
        for number in range(256):
            (self.root / f'host/data/{number:02x}').mkdir(exist_ok=True)
        with mock.patch.object(ThreadPoolExecutor, 'submit', autospec=True,
                               side_effect=ThreadPoolExecutor.submit) as submit:
            self.assertEqual(self.scrub(), ({}, 9, 0))
        self.assertEqual(submit.call_count, len(restic_serve.CORES))
        with mock.patch.object(restic_serve, 'CORES', [0, 1]), mock.patch.object(
                restic_serve.Scrub, '_check_folder', side_effect=ZeroDivisionError) as check:
            self.assertRaises(ZeroDivisionError, self.scrub)
        self.assertLessEqual(check.call_count, 2)

    def test_a_deep_tree_is_no_repository_below_its_limit(self):
        path = self.root
        for _ in range(150):
            path /= 'x'
        path.mkdir(parents=True)
        self.assertEqual(self.scrub(), ({}, 9, 0))

    def test_uploads_of_other_programs_are_left_alone_for_an_hour(self):
        (self.root / 'host/data/00').mkdir(exist_ok=True)
        for name in [f'{"0" * 64}{suffix}' for suffix in ('-tmp-123', '.rest-server-temp456')]:
            (self.root / 'host/data/00' / name).touch()
        self.assertEqual(self.scrub()[0], {})
        with mock.patch.object(Store, 'now', lambda store: time.time() + 3601):
            self.assertEqual({reason.partition(':')[0] for reason in self.scrub()[0].values()}, {'stray'})

    def test_what_was_found_sound_is_remembered_on_the_way(self):
        saved = []
        with mock.patch.object(restic_serve, 'SAVE_SECONDS', 0), \
                mock.patch.object(restic_serve.Scrub, '_save', lambda job: saved.append(job.checked)):
            self.scrub()
        self.assertGreater(len(saved), 2)

    def test_what_was_sound_lately_is_skipped_but_for_what_is_new_or_was_damaged(self):
        patch_for(self, Store, now=lambda store: time.time())
        content, now = os.urandom(100), time.time()
        for seconds, age, read, damaged in (
                (0, 0, 9, 0), (60, 3600, 9, 0),     # they changed just then, by a coarse clock
                (120, 30, 9, 0), (180, 3600, 0, 0), (240, 0, 9, 1), (300, 3600, 1, 1), (360, 3600, 2, 1),
                (9000, 3600, 10, 1)):
            if seconds == 240:
                self.paths['/host', 'data'].write_bytes(b'bad')     # by the disk: no time says so
            if seconds == 360:
                self.store.save(Location('/host', 'index', named(content)), Bytes(content))
                os.utime(f'{self.root}/host/index/{named(content)}', (now + 350,) * 2)
            with mock.patch.object(time, 'time', return_value=now + seconds):
                self.assertEqual(self.scrub(age)[1:], (read, damaged), seconds)
        self.assertEqual(self.scrub(age=3600)[1:], (10, 1))     # the last time was later than now
        self.assertIn('checked later than now', ' '.join(self.log))

    def test_a_memory_that_is_no_json_is_forgotten_and_one_that_cannot_be_read_is_read_again(self):
        (self.root / '.restic_serve').mkdir(exist_ok=True)
        for text in ('', '[]', '{"folders": {"data/00": "x"}, "repositories": {}}', '{"folders": {}}',
                     '{"folders": {}, "repositories": {"/host": ["x"]}}', 'x', '\0', '[' * 100000,
                     '{"folders": {}, "repositories": {"": [Infinity, 1, 1e999]}}'):
            (self.root / '.restic_serve/scrub.json').write_text(text)
            self.assertEqual(restic_serve.last_scrubs(self.store), {})
            self.assertEqual(self.scrub(age=3600)[1:], (9, 0))
            with mock.patch('builtins.open', side_effect=PermissionError(errno.EACCES, 'x')):
                self.assertEqual(restic_serve.last_scrubs(self.store), {})
            self.assertEqual(len(restic_serve.last_scrubs(self.store)), 3)
            (self.root / '.restic_serve/scrub.json').unlink()

    def test_an_object_that_is_deleted_meanwhile_is_no_fault(self):
        with first(lambda job, folder, name, *more: folder.unlink(name), restic_serve.Scrub, '_check'):
            self.assertEqual(self.scrub(), ({}, 0, 0))

    def test_bandwidth_is_limited(self):
        clock = Clock()
        begin = clock.now
        self.scrub(bandwidth=clock.bandwidth('10k'))
        self.assertAlmostEqual((clock.now - begin) * 10 * 1024 / (9 * 3000), 1, delta=0.1)

    def test_the_command(self):
        run = functools.partial(self.run_it, '--scrub')
        status, output, error = run(self.root)
        self.assertEqual((status, output), (0, ''))
        self.assertRegex(error, r'^100% of 26\.4 KiB, [\d.]+ [KMG]?i?B/s, 0 s left, 9 objects read, '
                                r'0 damaged\n$')
        (self.folder / 'empty').mkdir()
        self.assertEqual(run('--quiet', self.folder / 'empty'), (
            1, '', f'restic_serve: no repository in {self.folder}/empty\n'))
        self.paths['', 'data'].write_bytes(b'other')
        self.assertEqual(run('--quiet', self.root), (1, f'{self.paths["", "data"]}: damaged: its SHA-256 is '
                                                     f'{named(b"other")}\n', ''))
        shutil.rmtree(self.root / 'data')
        shutil.rmtree(self.root / 'host/keys')
        (self.root / 'host/keys').touch()
        status, output, error = run(self.root)
        self.assertEqual((status, output), (3, f'{self.root}/host/keys: unreadable: Not a directory\n'))
        self.assertIn(', 0 damaged, 1 unreadable\n', error)
        status, output, error = run(self.folder / 'none')
        self.assertEqual((status, output, error.count('\n')), (1, '', 1), error)
        self.assertFalse((self.folder / 'none').exists())

    def test_a_bar_on_a_terminal(self):
        text = self.run_on_terminal('--scrub', self.root)
        self.assertIn(f'\r[{"#" * restic_serve.BAR_WIDTH}] 100% of ', text)

    def test_a_bar_fits_its_terminal_and_a_fault_takes_its_place(self):
        stream = io.StringIO()
        stream.isatty = lambda: True
        stream.fileno = lambda: 99
        self.paths['', 'data'].write_bytes(b'x')
        with mock.patch.object(restic_serve, 'BAR_SECONDS', 0), \
                mock.patch.object(os, 'get_terminal_size', return_value=os.terminal_size((40, 20))):
            restic_serve.Scrub(self.store, 0, None, lambda *fault: stream.write('FAULT'), stream).run()
        for bar in re.findall(r'\r([^\r\x1b]+)\x1b', stream.getvalue()):
            self.assertLess(len(bar), 40)
        self.assertRegex(stream.getvalue(), r'(^|\r\x1b\[K)FAULT')

    @unittest.skipUnless(hasattr(signal, 'SIGHUP'), 'this system has no SIGHUP')
    def test_a_scrub_that_is_hung_up_remembers_what_it_found(self):
        self.paths['', 'data'].write_bytes(b'x')
        job = subprocess.Popen([sys.executable, compiled(), '--scrub', '--bwlimit', '1k', str(self.root)],
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=clean_environment())
        with job, job.stdout:
            self.assertIn(b'damaged', job.stdout.readline())
            job.send_signal(signal.SIGHUP)
            self.assertEqual(job.wait(PATIENCE), 1)
        self.assertEqual(restic_serve.last_scrubs(self.store)[''].damaged, 1)

    def test_a_name_that_is_no_text_is_said_all_the_same(self):
        with open(os.fsencode(self.root) + b'/host/index/caf\xe9', 'wb'):
            pass
        status, output, _ = self.run_it('--scrub', self.root, PYTHONIOENCODING='utf-8')
        self.assertEqual(status, 0)
        self.assertIn(r'caf\udce9: foreign', output)


# ---- Usage -----------------------------------------------------------------------------------------

class UsageTest(TestCase):
    def setUp(self):
        super().setUp()
        counted_plainly(self)
        self.store = self.make_store()
        self.usage = self.make()

    def make(self, *args, **more):
        usage = Usage(self.store, Counters(), *args, **more)
        self.addCleanup(usage.census.channel.close)
        return usage

    def limit(self, size):
        """Give all repositories together a quota."""
        self.usage = self.counted({'/': size})
        return self.usage

    def save(self, size, repository='/host', kind='data', **more):
        content = os.urandom(size)
        location = Location(repository, kind, named(content))
        self.make_repository(repository)
        self.usage.save(location, Bytes(content, **more))
        return location

    def during_the_count(self, *actions):
        """Count; each time that a repository is about to be measured, the next action is taken."""
        left = list(actions)
        with first(lambda *args: left and left.pop(0)(), restic_serve.Census, '_measure'):
            self.usage.census.count()

    def test_what_is_made_again_where_a_deleted_repository_was_is_counted(self):
        self.limit(100_000)
        self.save(10, '/a')
        self.save(10, '/z')
        shutil.rmtree(self.root / 'a')
        self.usage.census.count()
        self.during_the_count(lambda: self.save(500, '/a'))     # the walk has passed it
        self.assertEqual((self.held('/a')[0], self.usage.quota('')[0]), (500, 510))

    def test_deletes_at_each_look_of_a_count_are_counted_once(self):
        saved = [self.save(100) for _ in range(6)]
        self.during_the_count(*[functools.partial(self.usage.delete, location) for location in saved[:3]])
        self.assertEqual(self.held(), (300, {'data': 3}))

    def test_a_process_that_died_between_two_counts_spoils_a_quota_until_the_next_census_only(self):
        self.limit(100_000)
        self.save(500)
        self.usage.counters.add(('scope', ''), -300, 0)
        self.usage.census.count()
        self.assertEqual(self.usage.quota('')[0], 500)

    def test_an_upload_of_unknown_length_is_refused_unread_where_the_quota_is_full(self):
        self.limit(500)
        self.save(500)
        patch_for(self, restic_serve, BLOCK_BYTES=4096)
        body = Bytes(b'more', length=None)
        with mock.patch.object(body, 'readinto', side_effect=AssertionError):
            self.assertRaises(QuotaExceeded, self.usage.save, Location('/host', 'keys', named(b'more')), body)

    def held(self, repository='/host'):
        found = self.usage.holdings()[repository]
        return found.bytes, {kind: number for kind, number in found.objects.items() if number}

    def test_a_count_finds_what_is_there(self):
        now = time.time()
        self.assertEqual(self.usage.holdings(), {})
        for kind, size, age in (('data', 100, 0), ('data', 200, 2), ('data', 400, 200), ('index', 10, 2),
                                ('snapshots', 3, 5), ('snapshots', 4, 2)):
            path = path_of(self.store, self.put_object('/a/b', kind, os.urandom(size)))
            os.utime(path, (now - 86400 * age, now - 86400 * age))
        self.put_object('', 'config', b'config')
        for path in ('a/b/data/x', 'a/b/index/notes', 'a/notes', f'.restic_serve/index/{named(b"")}'):
            (self.root / path).parent.mkdir(parents=True, exist_ok=True)
            (self.root / path).write_bytes(b'foreign')
        with mock.patch.object(time, 'time', return_value=now + 1):
            self.usage.census.count()
            found = self.usage.holdings()
            self.assertEqual(sorted(found), ['', '/a/b'])
            self.assertEqual(found[''][:3], (6, {**dict.fromkeys(restic_serve.KINDS, 0), 'config': 1}, 0))
            held = found['/a/b']
        self.assertEqual(held.bytes, 717)
        self.assertEqual(held.objects, {'data': 3, 'index': 1, 'keys': 0, 'locks': 0, 'snapshots': 2,
                                        'config': 0})
        self.assertEqual(held.last_snapshot, int(now - 2 * 86400))
        self.assertEqual((held.days[-1], held.days[-3], held.days[-6], sum(held.days)), (100, 214, 3, 317))
        self.assertEqual((held.snapshots[-3], held.snapshots[-6], sum(held.snapshots)), (1, 1, 2))
        with mock.patch.object(time, 'time', return_value=now + 4 * 86400):
            later = self.usage.holdings()['/a/b']
        self.assertEqual((later.days[-5], later.days[-7], later.bytes), (100, 214, 717))
        self.assertEqual(len(later.days), restic_serve.DAYS)

    def test_it_is_kept_current_by_what_passes_through(self):
        first = self.save(100)
        self.usage.census.count()
        self.assertEqual(self.held(), (100, {'data': 1}))
        self.save(50, kind='index')
        self.usage.save(first, Bytes(Path(path_of(self.store, first)).read_bytes()))  # once more
        self.assertEqual(self.held(), (150, {'data': 1, 'index': 1}))
        self.usage.delete(first)
        self.usage.delete(first)
        self.save(7, kind='snapshots')
        self.assertEqual(self.held(), (57, {'index': 1, 'snapshots': 1}))
        found = self.usage.holdings()['/host']
        self.assertAlmostEqual(found.last_snapshot, time.time(), delta=5)
        self.assertEqual((found.snapshots[-1], sum(found.snapshots)), (1, 1))
        self.save(30, '/new')
        self.assertEqual(self.held('/new'), (30, {'data': 1}))
        self.usage.census.count()
        self.assertEqual(self.held(), (57, {'index': 1, 'snapshots': 1}))
        self.assertEqual(self.held('/new'), (30, {'data': 1}))

    def test_what_other_programs_do_is_found_by_the_next_count(self):
        location = self.save(100)
        self.save(60, '/gone')
        self.usage.census.count()
        self.put_object('/host', 'keys', os.urandom(300))
        self.store.delete(location)
        shutil.rmtree(self.root / 'gone')
        self.assertEqual(self.held(), (100, {'data': 1}))
        self.usage.census.count()
        self.assertEqual(self.held(), (300, {'keys': 1}))
        self.assertEqual(list(self.usage.holdings()), ['/host'])
        metrics = metrics_of(self.usage, self.store)
        metrics.count_blob(Request('GET', '/', '', {}, None, Peer('x')), Location('/gone', 'data', 'x'),
                           Metrics.READ, 60)
        self.usage.census.count()
        self.assertEqual([line.partition('{')[0] for line in metrics.exposition().split('\n')
                          if 'repo="gone"' in line],     # as of rest-server, until the server ends
                         ['rest_server_blob_read_total', 'rest_server_blob_read_bytes_total'])
        self.save(60, '/gone')
        self.assertEqual(self.held('/gone'), (60, {'data': 1}))

    def count_while(self, *todo):
        """Count, and do something at each folder that is read."""
        todo = list(todo)

        def act(folder, prefix):
            time.sleep(0.02)  # so that what is saved here is younger than the count, by its ctime
            if todo:
                todo.pop(0)()

        with first(act, restic_serve, 'entries_and_statuses'):
            self.usage.census.count()
        self.assertEqual(todo, [])

    def test_what_comes_during_a_count_is_counted_once(self):
        kept = self.save(100)
        self.count_while(lambda: self.save(11, kind='keys'), lambda: self.save(12, kind='data'))
        self.assertEqual(self.held(), (123, {'data': 2, 'keys': 1}))
        self.usage.delete(kept)
        self.assertEqual(self.held(), (23, {'data': 1, 'keys': 1}))

    def test_what_goes_during_a_count_is_counted_no_more(self):
        self.save(100)
        for _ in range(2):
            for kind in ('data', 'snapshots'):  # the first folder and the last
                removed = self.save(70, kind=kind)
                self.count_while(lambda: None, lambda gone=removed: self.usage.delete(gone))
                self.assertEqual(self.held(), (100, {'data': 1}))

    def test_without_end_of_deletions_a_count_errs_on_the_safe_side(self):
        self.limit(1000)
        locations = [self.save(10, kind='locks') for _ in range(20)]
        with first(lambda *args: locations and self.usage.delete(locations.pop()),
                   restic_serve, 'entries_and_statuses'):
            self.usage.census.count()
        self.assertGreaterEqual(self.usage.quota('')[0], 10 * len(locations))
        self.assertLess(self.usage.quota('')[0], 200)

    def unreadable(self, *ends):
        """Folders whose paths end so cannot be listed."""
        return failing(lambda folder, *fd: folder.endswith(ends), restic_serve, '_scan', errno.EACCES)

    def test_what_cannot_be_read_is_said_and_the_rest_is_counted(self):
        self.save(100)
        self.save(20, kind='index')
        self.save(5, '/other')
        self.save(5, '/secret/x')
        self.save(50, '/third')
        with self.unreadable('/secret', '/other/data'), \
                failing(lambda folder, prefix: '/host/data/' in folder.path,
                        restic_serve, 'entries_and_statuses'), \
                failing(lambda store, location: location.repository == '/third', Store, 'size'):
            self.usage.census.count()
        self.assertEqual(self.held(), (20, {'index': 1}))
        self.assertEqual(self.held('/third'), (50, {'data': 1}))
        self.assertEqual(self.usage.holdings()['/third'].unreadable, 1)
        self.assertEqual(self.usage.holdings()['/host'].unreadable, 1)
        self.assertEqual(self.held('/other'), (0, {}))
        log = ' '.join(self.log)
        self.assertRegex(log, 'cannot read /secret, keeping its last known size: .*Errno 13')
        self.assertRegex(log, 'cannot determine the full size of /host: .*Errno 5')
        self.assertRegex(log, 'cannot determine the full size of /other: .*Errno 13')
        self.assertIn('cannot be read completely', rendered(self.store, self.usage))

    def test_what_cannot_be_read_any_more_stays_as_it_was(self):
        self.limit(10_000)
        for repository in ('/alice/x', '/bob'):
            self.save(100, repository)
        self.usage.census.count()
        with self.unreadable('/alice'):
            self.usage.census.count()
        found = self.usage.holdings().items()
        self.assertEqual({name: (held.bytes, held.unreadable) for name, held in found},
                         {'/alice/x': (100, 1), '/bob': (100, 0)})
        self.assertEqual(self.usage.quota('')[0], 200)
        shutil.rmtree(self.root / 'alice')
        self.usage.census.count()
        self.assertEqual(list(self.usage.holdings()), ['/bob'])

    def test_when_the_last_snapshot_is_forgotten_the_one_before_is_the_last(self):
        os.utime(path_of(self.store, self.save(10, kind='snapshots')), (1000, 1000))
        new = self.save(10, kind='snapshots')
        self.usage.census.count()
        self.assertGreater(self.usage.holdings()['/host'].last_snapshot, 1000)
        self.usage.delete(new)
        with mock.patch.object(time, 'time', return_value=time.time() + 2):
            self.usage.census.count()
        self.assertEqual(self.usage.holdings()['/host'].last_snapshot, 1000)

    def test_more_repositories_than_can_be_counted_one_by_one_still_fill_a_quota(self):
        self.usage = self.make(quotas=restic_serve.Quotas({'/': 10_000}))
        for number in range(20):
            self.put_object(f'/r{number}', 'keys', b'%100d' % number)
        with mock.patch.object(restic_serve, 'SPARE_BYTES', restic_serve.SLOT_BYTES - 20_000):
            self.usage.census.count()
        self.assertLess(len(self.usage.holdings()), 20)
        self.assertEqual(self.usage.quota('')[0], 2000)

    def test_what_was_removed_since_the_count_makes_no_day_negative(self):
        locations = [self.save(5000), self.save(3000)]
        self.usage.census.count()
        self.usage.delete(locations[0])
        self.save(10)
        held = self.usage.holdings()['/host']
        self.assertEqual((held.bytes, sum(held.days)), (3010, 3010))

    def test_deep_folders_and_the_root_of_the_file_system_are_no_fault(self):
        self.root.joinpath(*'x' * 100).mkdir(parents=True)
        self.usage.census.count()
        store = Store(os.sep)
        with mock.patch.object(restic_serve, '_scan', side_effect=lambda folder, fd: contextlib.
                               nullcontext(iter(()))) as scan:
            self.assertEqual([(found.path, found.is_repository) for found in store.walk(self.fail)],
                             [('', False)])
        self.assertEqual(scan.call_args[0][0], os.sep)

    def test_repositories_behind_links_that_lead_out_are_neither_served_nor_counted(self):
        outside = self.folder / 'outside'
        self.save(100, '/host/x')
        outside.mkdir()
        (self.root / 'alice').symlink_to(outside)
        (self.root / 'bob').symlink_to(self.root / 'host')
        for repository in ('/alice', '/alice/x'):
            with self.assertRaises(PermissionError):
                self.usage.save(Location(repository, 'keys', named(b'x')), Bytes(b'x'))
            self.assertRaises(PermissionError, self.store.create_repository, repository)
        self.assertEqual(list(outside.iterdir()), [])
        self.save(10, '/bob/x')
        self.usage.census.count()
        self.assertEqual(self.held('/host/x'), (110, {'data': 2}))

    def test_a_clock_that_is_wrong_hides_nothing(self):
        self.save(100)
        with mock.patch.object(time, 'time', return_value=time.time() - 86400):
            self.usage.census.count()
        self.assertEqual(self.held(), (100, {'data': 1}))
        self.save(50, kind='snapshots')
        for moment in (1 << 40, -1 << 33) if HAS_64_BIT_TIMES else (2 ** 31 - 1, -1 << 31):
            for path in self.files():
                if 'snapshots' in path:
                    os.utime(self.root / path, (moment, moment))
            self.usage.census.count()
            self.assertEqual(self.held(), (150, {'data': 1, 'snapshots': 1}))
            self.assertIn('150 B', rendered(self.store, self.usage))
        # The clock of a host without a battery is behind until the network sets it.
        with mock.patch.object(Store, 'now', return_value=time.time() - 86400):
            self.save(10_000, '/new')
            self.usage.census.count()
        self.assertEqual(self.held('/new'), (10_000, {'data': 1}))

    def test_what_has_changed_its_owner_during_a_count_is_counted(self):
        path = path_of(self.store, self.save(100, kind='keys'))
        os.utime(path, (1, 1))
        self.count_while(lambda: os.chmod(path, 0o640))
        self.assertEqual(self.held(), (100, {'keys': 1}))

    def test_it_is_counted_when_somebody_asks_and_the_last_count_is_old(self):
        counts = []
        with first(counts.append, restic_serve.Census, 'count'):
            self.usage.census.request()  # nobody listens
            self.serve(Api(self.store, Policy(), usage=self.usage))
            self.assertFalse(self.usage.census.wait(0))
            self.usage.census.request()
            self.assertTrue(self.usage.census.wait(PATIENCE))
            for _ in range(10):
                self.usage.census.request()
            self.assertTrue(self.usage.census.wait(0, fresh=True))          # within the interval
            self.usage.census._interval = 0
            threading.Timer(0.05, self.usage.census.request).start()    # while it is waited for
            self.assertTrue(self.usage.census.wait(PATIENCE, fresh=True))   # newer than it was asked for
        self.assertEqual(len(counts), 2)

    def test_a_full_quota_is_answered_before_the_content_is_read(self):
        for place, scope in (('/', ''), ('/%u', 'host')):
            with self.subTest(place):
                shutil.rmtree(self.root / 'host', ignore_errors=True)
                self.usage = self.counted({place: 1000})
                first = self.save(600)
                unread = Bytes(b'x' * 401)
                self.assertRaises(QuotaExceeded, self.usage.save, Location('/host', 'data', '0' * 64), unread)
                self.assertEqual(unread._file.tell(), 0)
                self.assertEqual(self.log[-1], 'quota exceeded: rejected an upload of 401 B to /host; used: '
                                 f'600 B of 1.0 KiB in /{scope}')
                self.assertEqual(self.usage.quota(scope), (600, 0, 1000))
                second = self.save(400)
                # one that is there already needs no room
                self.usage.save(second, Bytes(Path(path_of(self.store, second)).read_bytes()))
                self.assertRaises(QuotaExceeded, self.save, 1)
                self.usage.delete(first)
                self.save(600)
                if scope:
                    self.save(1000, '/other')
                    self.save(1000, '')

    def test_uploads_at_once_do_not_slip_past_a_quota_together(self):
        barrier = threading.Barrier(16)
        for least, more in ((4, {}), (0, {'length': None, 'step': 100})):
            shutil.rmtree(self.root / 'host', ignore_errors=True)
            self.limit(4300)

            def upload(size, more=more):
                barrier.wait(PATIENCE)
                try:
                    self.save(size, **more)
                except (QuotaExceeded, Busy) as error:
                    return type(error)
                return 200

            answers = at_once(upload, [1000] * 16)
            stored = answers.count(200)
            self.assertEqual(answers.count(QuotaExceeded) + (answers.count(Busy) if more else 0), 16 - stored)
            self.assertIn(stored, range(least, 5))
            self.assertEqual(self.usage.quota(''), (1000 * stored, 0, 4300))
            self.assertEqual(len(self.files(self.root / 'host')) if stored else 0, stored)

    def test_room_for_an_upload_that_failed_is_given_back(self):
        self.limit(1000)
        self.make_repository('host')
        with self.assertRaises(WrongContent):
            self.usage.save(Location('/host', 'data', '0' * 64), Bytes(b'x' * 900))
        self.assertRaises(restic_serve.Gone, self.save, 900, error=restic_serve.Gone('abort'))
        self.assertRaises(QuotaExceeded, self.save, 1001, length=None, step=300)
        self.save(1000, length=None, step=300)
        self.assertEqual(self.usage.quota(''), (1000, 0, 1000))

    def test_room_that_an_upload_under_way_holds_is_waited_for(self):
        self.limit(1000)
        go_on = threading.Event()

        class Slow(Bytes):
            def readinto(self, view):
                go_on.wait(PATIENCE)
                return super().readinto(view)

        def fail():
            with contextlib.suppress(WrongContent):
                self.usage.save(Location('/host', 'data', '0' * 64), Slow(b'x' * 900))

        self.make_repository('host')
        first = self.in_thread(fail)
        self.wait_until(lambda: self.usage.quota('')[1] == 900, 'the room')
        with mock.patch.object(restic_serve, 'ROOM_SECONDS', 0.05), self.assertRaises(Busy) as caught:
            self.save(200)
        self.assertEqual(caught.exception.retry_seconds, 10)
        self.assertRaises(QuotaExceeded, self.save, 1001)
        second = self.in_thread(self.save, 200)
        go_on.set()
        first.join()
        second.join()
        self.assertEqual(self.usage.quota(''), (200, 0, 1000))

    def test_what_is_removed_during_its_upload_is_to_be_sent_again(self):
        self.limit(1000)
        location = self.save(900)
        content = Path(path_of(self.store, location)).read_bytes()

        def remove():
            if self.usage.delete(location) is not None:
                self.save(900)

        class Removing(Bytes):
            def readinto(self, view):
                remove()
                return super().readinto(view)

        for expected in (Busy, QuotaExceeded):
            self.assertRaises(expected, self.usage.save, location, Removing(content))
            self.assertEqual(self.usage.quota(''), (900, 0, 1000))

    def use_blocks(self):
        """Have quotas count as they do."""
        patch_for(self, restic_serve, BLOCK_BYTES=4096, FOLDER_BYTES=4096)

    def test_small_objects_and_folders_fill_a_quota_as_they_fill_the_disk(self):
        self.use_blocks()
        self.limit(400 * 1024)
        self.usage.create(Location('/host'))
        self.assertEqual(self.usage.quota('')[0], 6 * 4096)     # itself, and five kinds
        saved = 0
        with self.assertRaises(QuotaExceeded):
            for _ in range(1000):
                self.save(4, kind='keys')
                saved += 1
        self.assertEqual(saved, 100 - 6)
        self.assertEqual(self.usage.quota(''), (400 * 1024, 0, 400 * 1024))
        self.usage.census.count()
        self.assertEqual(self.usage.quota('')[0], 400 * 1024)

    def test_repositories_that_are_made_fill_a_quota(self):
        self.use_blocks()
        self.limit(1 << 20)
        made = 0
        with self.assertRaises(QuotaExceeded):
            for number in range(1000):
                self.usage.create(Location(f'/a/b{number}'))
                made += 1
        self.assertEqual(made, (256 - 1) // 6)
        self.assertLessEqual(sum(path.is_dir() for path in self.root.rglob('*')), 256)
        before = self.usage.quota('')[0]
        self.usage.census.count()
        self.assertEqual(self.usage.quota('')[0], before)

    def test_what_was_counted_and_what_passed_through_agree(self):
        self.use_blocks()
        self.usage = self.make(quotas=restic_serve.Quotas({'/': 1 << 40, '/%u': 1 << 40}))
        for repository in ('', '/alice', '/alice/x/y', '/bob'):
            self.make_repository(repository)
        self.usage.census.count()
        random.seed(7)
        kept = []
        for number in range(120):
            repository = random.choice(('', '/alice', '/alice/x/y', '/bob'))
            if random.random() < 0.2:
                self.usage.create(Location(repository))
            elif kept and random.random() < 0.3:
                self.usage.delete(kept.pop(random.randrange(len(kept))))
            else:
                kept.append(self.save(random.choice((0, 1, 4095, 4096, 4097, 50_000)), repository,
                                      random.choice(restic_serve.KINDS)))
            if number % 40 == 39:
                before = [self.usage.quota(scope)[0] for scope in ('', 'alice', 'bob')]
                self.usage.census.count()
                self.assertEqual([self.usage.quota(scope)[0] for scope in ('', 'alice', 'bob')], before)

    def test_a_full_quota_lets_few_locks_in_all_repositories_in_and_they_make_no_folder(self):
        self.use_blocks()
        usage = self.limit(50_000)
        for name in 'ab':
            usage.create(Location(f'/{name}'))
        self.assertRaises(QuotaExceeded, usage.save, Location('/a', 'data', named(b'x')), Bytes(b'x'))
        locks = [(Location(f'/{"ab"[number % 2]}', 'locks', named(b'%d' % number)), b'%d' % number)
                 for number in range(11)]
        with mock.patch.object(restic_serve, 'LOCKS', 10):
            for location, content in locks[:10]:
                usage.save(location, Bytes(content))
            self.assertRaises(QuotaExceeded, usage.save, locks[10][0], Bytes(locks[10][1]))
            usage.delete(locks[0][0])
            usage.save(locks[10][0], Bytes(locks[10][1]))
            self.make_repository('c')
            self.assertRaises(QuotaExceeded, usage.save, Location('/c', 'locks', named(b'x')), Bytes(b'x'))
        self.assertFalse((self.root / 'c/locks').exists())

    def test_an_upload_of_what_is_there_takes_no_room_on_the_disk(self):
        usage = self.limit(1000)
        self.make_repository('host')
        content = os.urandom(1000)
        location = Location('/host', 'data', named(content))
        self.assertEqual(usage.save(location, Bytes(content)), (1, 1000))
        config = Location('/host', 'config')
        with mock.patch.object(restic_serve, 'Scratch', side_effect=AssertionError('a scratch file')):
            self.assertEqual(usage.save(location, Bytes(content)), (0, 0))
            self.assertRaises(WrongContent, usage.save, location, Bytes(bytes(1000)))
            with mock.patch.object(restic_serve, '_digest') as digest:  # none of another length is read
                self.assertRaises(QuotaExceeded, usage.save, location, Bytes(b'other'))
            digest.assert_not_called()
        usage.delete(location)
        usage.save(config, Bytes(b'one'))
        self.assertEqual(usage.save(config, Bytes(b'one')), (0, 0))
        self.assertRaises(OtherConfig, usage.save, config, Bytes(b'two'))

    def test_an_upload_reserves_room_for_all_of_its_content(self):
        self.use_blocks()
        usage = self.limit(100 * 4096)
        usage.create(Location('/host'))
        reserved = []

        class Looking(Bytes):
            def readinto(self, view):
                reserved.append(usage.quota('')[1])
                return super().readinto(view)

        content = os.urandom(50_000)
        usage.save(Location('/host', 'data', named(content)), Looking(content, step=10_000))
        self.assertEqual(set(reserved), {13 * 4096 + 4096})     # and the folder that it makes
        self.assertEqual(usage.quota('')[:2], ((6 + 14) * 4096, 0))

    def test_what_has_no_rows_of_its_own_is_counted_as_other_until_it_is_gone(self):
        with mock.patch.multiple(restic_serve, SLOT_BYTES=64 * 1024, SPARE_BYTES=8 * 1024):
            self.limit(1 << 20)
            for number in range(30):
                self.put_object(f'/evil/r{number}', 'keys', b'x')
            self.put_object('/good', 'keys', b'good')
            self.usage.census.count()
            found = self.usage.holdings()
            self.assertEqual(found['/good'].bytes, 4)
            self.assertGreater(found['other'].bytes, 10)
            self.assertEqual(sum(held.bytes for held in found.values()), 34)
            for number in range(100):
                self.put_object(f'/evil/s{number}', 'keys', b'y', self.usage)
            self.assertEqual(self.usage.quota('')[0], 134)
            self.usage.census.count()
            self.assertEqual(self.usage.quota('')[0], 134)
            self.assertEqual(sum(held.bytes for held in self.usage.holdings().values()), 134)
            shutil.rmtree(self.root / 'evil')
            for number in range(3):
                self.put_object(f'/new{number}', 'keys', b'new', Store(str(self.root)))
            self.usage.census.count()
            found = self.usage.holdings()
            self.assertEqual({name: held.bytes for name, held in found.items()},
                             {'/good': 4, '/new0': 3, '/new1': 3, '/new2': 3})

    def test_a_repository_that_is_gone_leaves_nothing_in_the_quotas(self):
        for delete in (False, True):
            with self.subTest(delete=delete):
                usage = self.usage = self.make(quotas=restic_serve.Quotas({'/': 4 << 20, '/%u': 4 << 20}))
                if delete:  # it was there before the start
                    location = self.put_object('/old', 'data', bytes(3 << 20))
                    usage.census.count()
                    usage.delete(location)
                else:
                    usage.census.count()
                    self.put_object('/old', 'data', bytes(3 << 20), usage)
                shutil.rmtree(self.root / 'old')
                for _ in range(3):
                    usage.census.count()
                    self.assertEqual([usage.quota(scope)[0] for scope in ('', 'old')], [0, 0])
                self.save(2 << 20, '/new')
                self.assertEqual(usage.quota('')[0], 2 << 20)
                shutil.rmtree(self.root / 'new')

    def test_what_comes_through_a_link_is_counted_once(self):
        usage = self.limit(1 << 30)
        self.save(100, '/real')
        (self.root / 'alias').symlink_to('real')
        for _ in range(3):
            self.save(100, '/alias')
            usage.census.count()
            self.assertEqual(usage.quota('')[0], sum(
                path.stat().st_size for path in (self.root / 'real').rglob('*') if path.is_file()))

    def test_a_full_quota_lets_a_damaged_object_be_mended_and_what_replaces_it_is_counted(self):
        self.limit(700)
        location = self.save(700)
        path = Path(path_of(self.store, location))
        content = path.read_bytes()
        path.write_bytes(content[:-1] + b'x')
        self.assertEqual(self.usage.save(location, Bytes(content)), (0, 0))
        self.assertEqual(path.read_bytes(), content)
        self.limit(1000)
        self.usage.delete(location)
        path.write_bytes(b'x')
        self.usage.census.count()
        self.assertEqual(self.usage.save(location, Bytes(content)), (0, 699))
        self.assertEqual(self.usage.quota(''), (700, 0, 1000))
        self.assertEqual(self.held(), (700, {'data': 1}))
        path.write_bytes(b'')
        self.usage.census.count()
        self.save(400)
        self.assertRaises(QuotaExceeded, self.usage.save, location, Bytes(content))

    def test_where_no_more_can_be_counted_a_quota_lets_nothing_in(self):
        with mock.patch.multiple(restic_serve, SLOT_BYTES=4096, SPARE_BYTES=2048, ROOM_SECONDS=0):
            self.usage = self.counted({'/': 1 << 30, '/%u': 1 << 20})
            stored = 0
            for number in range(100):
                with contextlib.suppress(Busy):
                    self.save(10, f'/user{number}/x')
                    stored += 1
            self.assertIn(stored, range(5, 95))
            self.assertLessEqual(self.usage.quota('')[0], 10 * stored)
            self.usage.census.count()
            metrics = metrics_of(self.usage, self.store)
            request = Request('GET', '/', '', {}, None, Peer('x'))
            metrics.count_blob(request, Location('/a', 'data', 'x'), Metrics.READ, 1)
            self.assertIn('0 requests', metrics.line())
            self.assertIn('restic_serve_connections', metrics.exposition())
            rendered(self.store, self.usage)

    def test_where_no_thread_is_to_be_had_the_server_goes_on(self):
        self.usage.census.channel.open()
        self.usage.census.request()
        with mock.patch.object(threading.Thread, 'start', side_effect=RuntimeError("can't start new thread")):
            self.usage.census.on_requested()
        self.assertRegex(self.log[-1], "cannot calculate sizes: can't start")
        self.usage.census.request()
        self.usage.census.on_requested()
        self.assertTrue(self.usage.census.wait(PATIENCE))

    def test_before_the_first_count_an_upload_is_put_off(self):
        self.usage = self.make(quotas=restic_serve.Quotas({'/': 1000}))
        with mock.patch.object(restic_serve, 'READY_SECONDS', 0.05), self.assertRaises(Busy) as caught:
            self.save(1)
        self.assertEqual(caught.exception.retry_seconds, 10)
        self.serve(Api(self.store, Policy(), usage=self.usage))
        self.save(1)


class QuotaTest(WatchedTestCase):
    """Quotas over the wires."""

    def test_an_upload_past_it_is_refused_before_its_content_is_sent(self):
        self.make_repository()
        self.watch(max_bytes=1000)
        self.assertEqual(self.ask_last(post('/config', b'', 'Expect: 100-continue', length=1001))[0], 507)
        second = self.http2()
        second.send(headers(1, fields('POST', '/config', ('content-length', '1001')), END_HEADERS))
        self.assertEqual(second.answer(1)[0], 507)
        content = b'x' * 1000
        self.assertEqual(self.ask(post(f'/data/{named(content)}', content))[0], 200)
        self.assertEqual(self.ask(post(f'/data/{named(content)}', content))[0], 200)
        self.assertEqual(self.ask(post('/config', b'x'))[0], 507)
        self.ask(get(f'/data/{named(content)}', method='DELETE'))
        self.assertEqual(self.ask(post('/config', b'x'))[0], 200)

    def test_who_may_delete_may_store_indexes_above_it_within_a_reserve(self):
        patch_for(self, restic_serve, RESERVE_BYTES=1000)
        self.make_repository()
        self.store.save(Location('', 'index', named(bytes(500))), Bytes(bytes(500)))
        self.watch(max_bytes=100)
        self.usage.census.wait(PATIENCE)

        def store(kind, size):
            content = os.urandom(size)
            return self.ask(post(f'/{kind}/{named(content)}', content))[0]

        self.assertEqual(store('data', 10), 507)
        self.assertEqual([store('index', 500) for _ in range(4)], [200, 200, 200, 507])
        for path in (self.root / 'index').iterdir():
            self.assertEqual(self.ask(get(f'/index/{path.name}', method='DELETE'))[0], 200)
        self.assertEqual([store('index', 500) for _ in range(3)], [200, 200, 507])
        self.policy.rights = short_rights(append_only=True)
        for path in (self.root / 'index').iterdir():
            path.unlink()
        self.assertEqual(store('index', 500), 507)

    def test_what_is_announced_and_comes_slowly_is_not_held(self):
        patch_for(self, restic_serve, ROOM_GRACE=0.1)
        self.make_repository()
        self.watch(max_bytes=1000)
        for size, status in ((500, 200), (501, 507)):
            content, other, slow = os.urandom(size), os.urandom(500), self.connect()
            slow.send(post(f'/keys/{named(content)}', content[:100], length=size))
            self.wait_until(lambda: self.usage.quota('')[1] == 100, 'the rest to be free')
            self.assertEqual(self.ask(post(f'/keys/{named(other)}', other))[0], 200)
            slow.send(content[100:])
            self.assertEqual(slow.answer()[0], status)
            for path in (self.root / 'keys').iterdir():
                self.ask(get(f'/keys/{path.name}', method='DELETE'))

    def test_what_is_announced_is_held_while_it_comes(self):
        self.watch(max_bytes=1 << 20)
        for received, seconds, held in ((0, 0.9, 1 << 20), (1 << 17, 2, 1 << 20), (1 << 17, 2.1, 1 << 17),
                                        (1 << 20, 99, 1 << 20)):
            body = Bytes(bytes(1 << 20))
            body.clock = iter((0, seconds)).__next__
            with restic_serve.Room(self.usage, '/x', 0, body) as room:
                room.take(1 << 20, 0)
                room.readinto(memoryview(bytearray(received)))
                room.yield_rest()
                self.assertEqual(self.usage.quota('').reserved, held)


# ---- Accounts --------------------------------------------------------------------------------------

def identified(accounts, peer, **headers):
    """The user of a request with headers, or the status of its refusal."""
    headers = {name.replace('_', '-'): value for name, value in headers.items()}
    try:
        return accounts.identify(Request('GET', '/', 'HTTP/1.1', headers, Bytes(b''), peer))
    except HttpError as error:
        return error.status


def hashed(password, text):
    """The entry of a password with the scheme, cost and salt of another."""
    return Entry(restic_serve.crypt(password, Entry(text)))


class PasswordSchemeTest(unittest.TestCase):
    """Public test vectors, and the C library's word, where there is one."""

    VECTORS = (
        (b'U*U', '$2a$05$CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW'),
        (b'U*U*U', '$2a$05$XXXXXXXXXXXXXXXXXXXXXOAcXxm9kjPGEMsLznoKqmqw7tc8WCx4a'),
        (b'', '$2a$04$zVHmKQtGGQob.b/Nc7l9NO8UlrYcW05FiuCj/SxsFO/ZtiN9.mNzy'),
        (b'\xff\xff\xa3', '$2y$05$/OK.fbVrR/bpIqNJ5ianF.CE5elHaaO4EbggVDjb8P19RukzXSM3e'),
        (b'0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789'
         b'chars after 72 are ignored',
         '$2a$05$abcdefghijklmnopqrstuu5s2v8.iXieOjg/.AySBTTZIIVFJeBui'),
        (b'5.rApO%5jA', '$2a$05$kVNDrnYKvbNr5AIcxNzeIuRcyIF5cZk6UrwHGxENbxP5dVv.WQM/G'),
        (b'Hello world!', '$5$saltstring$5B8vYYiY.CVt1RlTTf8KbXBH3hsxY/GNooZaBBGWEc5'),
        (b'Hello world!', '$6$saltstring$svn8UoSVapNtMuq1ukKS4tPQd8iKwSMHWjl/O817G3uBnIFNjnQJ'
                          'uesI68u4OTLiBFdcbYEdFCoEOfaS35inz1'),
        (b'myPassword', '$apr1$r31.....$HqJZimcKQFAMYayBlzkrA/'),
        (b'password', '{SHA}W6ph5Mm5Pz8GgiULbPgzG37mj9g='),
    )

    def test_the_vectors_in_python_and_as_this_system_can(self):
        for in_python in (True, False):
            seen = set()
            with hashing(in_python):
                for password, text in self.VECTORS:
                    entry = Entry(text)
                    self.assertTrue(restic_serve.verify(password, entry), entry)
                    if entry.scheme not in seen:
                        seen.add(entry.scheme)
                        # A NUL ends no password.
                        for other in (password + b'x', b'\0' + password, password + b'\0x'):
                            self.assertFalse(restic_serve.verify(other, entry), entry)

    def test_python_and_the_c_library_agree(self):
        for number in (0, 1, 15, 16, 17, 63, 64, 71, 72, 73, 130):
            password = bytes((7 * number + at) % 255 + 1 for at in range(number))
            for entry in map(Entry, ('$1$salt$' + 22 * '.', '$1$saltsalt$' + 22 * '.', '$5$s$' + 43 * '.',
                                     '$5$rounds=1234$sixteen.letters.$' + 43 * '.', '$6$salt$' + 86 * '.',
                                     '$2b$04$' + 22 * 'e' + 31 * '.')):
                if restic_serve.is_in_c(entry.scheme):
                    theirs = restic_serve.crypt_in_c(password, entry)
                    self.assertEqual(restic_serve.crypt(password, entry), theirs, (password, entry))

    def test_what_the_c_library_computes_is_never_left_to_python(self):
        with mock.patch.object(restic_serve, 'crypt', side_effect=AssertionError('in Python')):
            for entry in map(Entry, ('$1$salt$' + 22 * '.', '$5$s$' + 43 * '.', '$6$salt$' + 86 * '.',
                                     '$2a$04$' + 53 * '.', '$2y$04$' + 53 * '.')):
                if restic_serve.is_in_c(entry.scheme):
                    for password in (b'\0', b'x\0', 512 * b'x', 100_000 * b'x', b''):
                        self.assertFalse(restic_serve.verify(password, entry), (entry, password[:9]))

    def test_a_scheme_gets_as_much_of_a_password_as_it_looks_at(self):
        for in_python in (False, True):
            with hashing(in_python):
                password = bytes(range(1, 256))
                entry = hashed(password, '$2b$04$' + 53 * 'e')
                self.assertTrue(restic_serve.verify(password, entry))
                self.assertTrue(restic_serve.verify(password[:72] + 1000 * b'x', entry))
                self.assertFalse(restic_serve.verify(password[:71], entry))
                for text in ('$6$salt$' + 86 * '.', '$1$salt$' + 22 * '.'):
                    entry = hashed(password, text)
                    self.assertTrue(restic_serve.verify(password, entry))
                    self.assertFalse(restic_serve.verify(password + b'x', entry))

    def test_unknown_schemes_and_plain_text_are_nothing(self):
        for entry in ('secret', '', '$7$x', '$2x$05$' + 53 * '.', '$2b$03$' + 53 * '.', '{SHA}short',
                      '$6$salt$short', '{PLAIN}x', 'rl.3StKT.4T8M', '$2b$32$' + 53 * '.'):
            with self.assertRaises(ValueError, msg=entry):
                Entry(entry)

    def test_entries_of_apaches_htpasswd(self):
        htpasswd = program('htpasswd')
        for words in (['-B', '-C', '4'], ['-m'], ['-s'], ['-2'], ['-5']):
            for password in ('secret', 'sécrèt \U0001f511', 'x' * 72):
                done = subprocess.run([htpasswd, '-nb', *words, 'bob', password], check=True,
                                      capture_output=True, text=True)
                entry = Entry(done.stdout.strip().partition(':')[2])
                for in_python in (False, True):
                    with hashing(in_python):
                        self.assertTrue(restic_serve.verify(password.encode(), entry), entry)
                        self.assertFalse(restic_serve.verify(b'other', entry), entry)


class PasswordFileTest(TestCase):
    def setUp(self):
        super().setUp()
        self.path = self.folder / 'htpasswd'

    def write(self, text):
        self.path.write_bytes(text.encode() if isinstance(text, str) else text)

    def entries(self, text):
        self.write(text)
        return PasswordFile(str(self.path)).entries

    def accounts(self, *users, **more):
        """Accounts of users, each with the first letter of his name for a password."""
        self.write(''.join(f'{user}:{sha(user[0])}\n' for user in users))
        return Accounts(PasswordFile(str(self.path)), **more)

    def identify(self, accounts, user, password, peer=None):
        return identified(accounts, peer or Peer('1.2.3.4'), authorization=credentials(user, password))

    def test_comments_blank_lines_and_line_ends_of_windows(self):
        entries = {'a': sha('a'), 'k.b-d_f@x': sha('b')}
        for text in (f'# users\r\n\r\na:{sha("a")}\r\n  # x\nk.b-d_f@x:{sha("b")}:more',
                     f'\ufeffa: {sha("a")} \nk.b-d_f@x:\t{sha("b")}\n'):      # by editors and people
            self.assertEqual(self.entries(text), entries)
            self.assertEqual(self.log, [])

    def test_a_file_in_utf_16_is_refused(self):
        for encoding in ('utf-16-le', 'utf-16-be'):
            self.path.write_text(f'\ufeffalice:{sha("a")}\n', encoding=encoding)
            self.assertRaisesRegex(OSError, 'file is UTF-16; save it as UTF-8', PasswordFile, str(self.path))

    def test_what_is_ignored_is_said_with_its_line_and_never_its_hash(self):
        self.assertEqual(self.entries(
            b'alice:plain-text\n..:%b\na/b:%b\n\xff:%b\nm\xe2\x80\x8bller:%b\nno colon\n' % (
                (sha('a').encode(),) * 4)), {})
        self.assertEqual([re.search(r'line (\d)', line)[1] for line in self.log], list('123456'))
        self.assertIn('line 1 (alice): cut off, or an unknown or unsafe', self.log[0])
        self.assertNotIn('plain-text', ''.join(self.log))
        self.assertNotIn('{SHA}', ''.join(self.log))

    def test_a_verified_password_is_compared_once_however_its_header_is_written(self):
        accounts = self.accounts('alice', 'bob')
        with mock.patch.object(restic_serve, 'verify', wraps=restic_serve.verify) as verify:
            self.assertEqual(self.identify(accounts, 'bob', 'b'), 'bob')
            for spaces in range(1, 3000):
                header = credentials('alice', 'a').replace(' ', spaces * ' ')
                self.assertEqual(identified(accounts, Peer('x'), authorization=header), 'alice')
            self.assertEqual(self.identify(accounts, 'bob', 'b'), 'bob')
            self.assertEqual(verify.call_count, 2)
            for _ in range(3):
                self.assertEqual(self.identify(accounts, 'alice', 'wrong'), 401)
            self.assertEqual(verify.call_count, 5)
        self.assertEqual(sorted(accounts._verified), ['alice', 'bob'])

    def test_a_failure_costs_as_much_as_the_entry_that_takes_longest(self):
        by_scheme = collections.Counter()   # since nobody knows how the schemes' costs compare

        def verify(password, entry):
            by_scheme[entry.scheme] += entry.cost
            return False

        self.write(f'alice:{sha("a")}\nbob:$2b$12${53 * "."}\ncarol:$2b$07${53 * "x"}\ndave:$6$x${86 * "."}\n'
                   f'grace:$2y$08${53 * "."}\n'
                   f'erin:$6$rounds=500000$x${86 * "."}\nfrank:$5$x${43 * "."}')
        accounts = Accounts(PasswordFile(str(self.path)))
        with mock.patch.object(restic_serve, 'verify', verify):
            for user in ('nobody', 'alice', 'bob', 'carol', 'dave', 'erin', 'frank', 'grace'):
                by_scheme.clear()
                self.assertEqual(self.identify(accounts, user, 'x'), 401)
                self.assertEqual(by_scheme, {'': 1, '$2b$': 8000 << 12, '$2y$': 8000 << 8, '$6$': 500_000,
                                             '$5$': 5000}, user)

    def guess(self, accounts, number, user='bob', peer='1.2.3.4', answers=None):
        """Threads that try passwords at once; ended by the test's end."""
        def one(number):
            status = self.identify(accounts, user, f'guess {number}', Peer(peer))
            if answers is not None:
                answers.append(status)

        for at in range(number):
            self.in_thread(one, at)
        self.addCleanup(self.go_on.set)

    def held_verify(self):
        """verify() in which each guess waits; those that do, and what lets them go on."""
        self.go_on = go_on = threading.Event()
        running = []

        def verify(password, entry):
            if password.startswith(b'guess'):
                running.append(password)
                go_on.wait(PATIENCE)
                running.remove(password)
                return False
            return real(password, entry)

        real = restic_serve.verify
        patch_for(self, restic_serve, verify=verify)
        return running, go_on

    def test_one_password_is_compared_at_a_time_and_few_of_an_address_wait(self):
        accounts = self.accounts('alice', 'bob', 'carol')
        self.assertEqual(self.identify(accounts, 'alice', 'a'), 'alice')
        running, go_on = self.held_verify()
        answers = []
        self.guess(accounts, 50, peer='2001:db8::1', answers=answers)
        refused = 50 - 1 - restic_serve.WAITING_LOGINS
        self.wait_until(lambda: len(answers) == refused, 'the others to be refused')
        self.assertEqual((set(answers), len(running)), ({429}, 1))
        self.assertEqual(self.identify(accounts, 'bob', 'b', Peer('2001:db8::2')), 429)  # of the same /64
        self.assertEqual(self.identify(accounts, 'alice', 'a', Peer('2001:db8::1')), 'alice')
        others = [self.in_thread(self.identify, accounts, 'carol', 'c', Peer(peer))
                  for peer in ('5.6.7.8', '2001:db8:0:1::1')]
        queue = accounts._queue
        self.wait_until(lambda: len(queue._waiting) == 3, 'the others to wait')
        go_on.set()
        for thread in others:
            thread.join()
        self.assertEqual(self.identify(accounts, 'carol', 'c'), 'carol')
        self.wait_until(lambda: len(answers) == 50, 'the guesses')
        self.assertEqual(answers.count(401), 1 + restic_serve.WAITING_LOGINS)
        self.assertEqual((queue._busy, queue._waiting), (False, {}))

    def test_an_address_from_which_the_user_has_logged_in_goes_first(self):
        counters, order = Counters(2), []
        accounts = self.accounts('alice', 'bob', counters=counters)
        self.assertEqual(self.identify(accounts, 'alice', 'a', Peer('1.1.1.1')), 'alice')
        counters.join(1)    # another process
        self.write(f'alice:{sha("new")}\nbob:{sha("b")}\n')
        accounts.file.look(force=True)
        _, go_on = self.held_verify()
        patch_for(self, restic_serve, verify=lambda password, entry, verify=restic_serve.verify: (
            order.append(password) or verify(password, entry)))
        logins = [('alice', 'guess', f'2.2.2.{number}') for number in range(50)]
        threads = [self.in_thread(self.identify, accounts, user, password, Peer(address)) for
                   user, password, address in (*logins, ('bob', 'b', '1.1.1.1'), ('alice', 'new', '1.1.1.1'))]
        self.wait_until(lambda: sum(map(len, accounts._queue._waiting.values())) == 51, 'all to wait')
        go_on.set()
        for thread in threads:
            thread.join()
        self.assertEqual(order.index(b'new'), 1)    # after the one that had its turn
        self.assertGreater(order.index(b'b'), 1)

    def test_an_address_that_has_had_its_turn_goes_to_the_end(self):
        queue, order = restic_serve.FairQueue(), []
        go_on = threading.Event()

        def attempt(group):
            order.append(group)
            return go_on.wait(PATIENCE)

        threads = []
        for group in 'aaaabcb':
            threads.append(self.in_thread(queue.run, group, functools.partial(attempt, group)))
            self.wait_until(lambda: len(order) + sum(map(len, queue._waiting.values())) == len(threads),
                            'the thread to wait')
        go_on.set()
        for thread in threads:
            thread.join()
        self.assertEqual(''.join(order), 'abcabaa')

    def test_an_address_that_has_failed_rests_while_others_have_their_turns(self):
        queue, order, rested = restic_serve.FairQueue(), [], threading.Event()

        def take(group, succeeds=True):
            queue.run(group, lambda: order.append(group) or succeeds)

        clock = mock.Mock(sleep=lambda seconds: rested.wait(PATIENCE), monotonic=time.monotonic)
        with mock.patch.object(restic_serve, 'time', clock):
            guess = self.in_thread(take, 'a', False)
            self.wait_until(lambda: queue._resting == {'a'}, 'a pause')
            again = self.in_thread(take, 'a')
            self.wait_until(lambda: queue._waiting, 'the next thread')
            take('b')
            self.assertEqual(order, ['a', 'b'])
            rested.set()
            for thread in (guess, again):
                thread.join()
        self.assertEqual(order, ['a', 'b', 'a'])
        self.assertEqual((queue._busy, queue._resting, queue._waiting), (False, set(), {}))

    def test_a_removed_user_is_out_while_a_password_is_compared(self):
        accounts = self.accounts('alice', 'bob')
        self.assertEqual(self.identify(accounts, 'alice', 'a'), 'alice')
        running, go_on = self.held_verify()
        self.guess(accounts, 1)
        self.wait_until(lambda: running, 'a guess')
        self.write(f'bob:{sha("b")}\n')
        accounts.file.look(force=True)  # as SIGHUP does: it waits for nobody
        with mock.patch.object(restic_serve, 'WAITING_LOGINS', 0):
            self.assertEqual(self.identify(accounts, 'alice', 'a'), 429)
        self.write(f'alice:{sha("a")}\nbob:{sha("b")}\n')
        accounts.file.look(force=True)
        self.assertEqual(self.identify(accounts, 'alice', 'a'), 'alice')

    def test_what_one_process_has_verified_the_others_know(self):
        counters = Counters(3)
        counters.join(1)
        accounts = self.accounts('alice', counters=counters)
        self.assertEqual(self.identify(accounts, 'alice', 'a'), 'alice')
        counters.join(2)
        accounts._verified.clear()
        with mock.patch.object(restic_serve, 'verify', return_value=False):
            self.assertEqual(self.identify(accounts, 'alice', 'a'), 'alice')
            self.assertEqual(self.identify(accounts, 'alice', 'b'), 401)
            self.write(f'alice:{sha("other")}\n')
            accounts.file.look(force=True)
            self.assertEqual(self.identify(accounts, 'alice', 'a'), 401)

    def test_a_hash_that_python_takes_long_for_is_said_and_holds_up_nobody(self):
        slow = '$2b$20$' + 53 * '.'
        self.write(f'alice:{sha("a")}\nbob:{slow}\n')
        with hashing(True):
            accounts = Accounts(PasswordFile(str(self.path)))
            self.assertEqual(len(self.log), 1)
            self.assertRegex(self.log[0], r"line 2: .* bob's password, and Python takes \d+ s for each login")
            running, _ = self.held_verify()
            self.guess(accounts, 1)
            self.wait_until(lambda: running, 'a guess')
            self.assertEqual(self.identify(accounts, 'alice', 'a'), 'alice')

    def test_a_failure_is_a_line_that_nobody_can_forge(self):
        accounts = self.accounts('alice')
        self.assertEqual(self.identify(accounts, 'alice', 'x'), 401)
        self.assertEqual(self.log[-1], "authentication failed for 'alice' from 1.2.3.4")
        self.identify(accounts, "x' from 9.9.9.9\nü", 'x')
        self.assertEqual(self.log[-1], "authentication failed for "
                                       "'x\\u0027\\u0020from\\u00209.9.9.9\\u000a\\u00fc' from 1.2.3.4")

    def test_one_user_without_a_file(self):
        accounts = Accounts(user='alice', password='secret', salt='salt')
        self.assertEqual(self.identify(accounts, 'alice', 'secret'), 'alice')
        for user, password in (('alice', 'other'), ('bob', 'secret'), ('alice', ''), ('', '')):
            self.assertEqual(self.identify(accounts, user, password), 401)
        self.assertNotIn("'secret'", repr(vars(accounts)))

    def test_malformed_credentials_are_401_and_cost_nothing(self):
        accounts = self.accounts('alice', realm='here')
        with mock.patch.object(restic_serve, 'verify', side_effect=AssertionError('a hash')):
            for value in ('', 'Basic', 'Basic !', 'Basic YQ==', 'Bearer x', 'Basic //8=', 'Basic YTpi YTpi',
                          credentials('alice', '\0')):
                request = Request('GET', '/', 'HTTP/1.1', {'authorization': value}, Bytes(b''), Peer('x'))
                error = raised(HttpError, accounts.identify, request)
                self.assertEqual((error.status, error.headers),
                                 (401, [('WWW-Authenticate', 'Basic realm="here", charset="UTF-8"')]))

    def test_users_are_added_changed_and_removed_without_touching_other_lines(self):
        change = restic_serve.change_password_file
        path = str(self.path)
        self.assertFalse(change(path, 'alice', 'one'))
        self.assertEqual(stat.S_IMODE(self.path.stat().st_mode), 0o600)
        self.write(f'# comment\r\n\r\nalice:old\nbob:{sha("b")}')
        self.assertTrue(change(path, 'alice', 'new'))
        self.assertEqual(self.path.read_bytes(), f'# comment\r\n\r\nalice:new\nbob:{sha("b")}'.encode())
        self.assertFalse(change(path, 'carol', 'x'))
        self.assertEqual(self.path.read_bytes(),
                         f'# comment\r\n\r\nalice:new\nbob:{sha("b")}\ncarol:x\n'.encode())
        self.assertTrue(change(path, 'alice', ''))
        self.assertFalse(change(path, 'alice', ''))
        self.assertEqual(self.path.read_bytes(), f'# comment\r\n\r\nbob:{sha("b")}\ncarol:x\n'.encode())
        self.assertEqual(self.files(self.folder), ['htpasswd'])

    def test_a_change_keeps_owner_group_and_mode_and_goes_through_a_link(self):
        target = self.folder / 'target'
        target.write_text('alice:old\n')
        target.chmod(0o640)
        if os.geteuid() == 0:
            os.chown(target, 1234, 5678)
        before = target.stat()
        self.path.symlink_to('target')
        restic_serve.change_password_file(str(self.path), 'bob', 'new')
        self.assertTrue(self.path.is_symlink())
        self.assertEqual(target.read_text(), 'alice:old\nbob:new\n')
        after = target.stat()
        self.assertEqual((after.st_uid, after.st_gid, after.st_mode),
                         (before.st_uid, before.st_gid, before.st_mode))
        self.assertEqual(self.files(self.folder), ['htpasswd', 'target'])

    def test_a_file_that_is_a_mount_is_written_in_place_with_a_copy_beside_it_until_then(self):
        self.write('alice:old\nbob:old\n')
        path, inode, move = str(self.path), self.path.stat().st_ino, restic_serve.move

        def move_others(source, name, target, new_name, mode):
            if new_name == 'htpasswd':
                raise OSError(errno.EBUSY, 'busy')
            move(source, name, target, new_name, mode)

        patch_for(self, restic_serve, move=move_others)
        self.assertTrue(restic_serve.change_password_file(path, 'alice', ''))
        self.assertEqual((self.path.read_text(), self.path.stat().st_ino), ('bob:old\n', inode))
        self.assertEqual(self.files(self.folder), ['htpasswd'])
        with mock.patch.object(restic_serve, 'sync_file', side_effect=[1, 1, OSError]):
            self.assertRaises(OSError, restic_serve.change_password_file, path, 'carol', 'new')
        self.assertEqual((self.folder / 'htpasswd.copy').read_text(), 'bob:old\n')
        with self.assertRaisesRegex(OSError, 'htpasswd.copy: left by a change that was interrupted'):
            restic_serve.change_password_file(path, 'dora', 'new')

    def test_a_change_that_fails_leaves_the_file(self):
        self.write('alice:old\n')
        with mock.patch.object(os, 'replace', side_effect=OSError(errno.EIO, 'I/O')):
            self.assertRaises(OSError, restic_serve.change_password_file, str(self.path), 'alice', 'new')
        self.assertEqual(self.files(self.folder), ['htpasswd'])
        self.assertEqual(self.path.read_text(), 'alice:old\n')

    def test_new_entries_are_bcrypt_by_either_hand(self):
        for in_python in (False, True):
            with hashing(in_python):
                entry = restic_serve.new_entry(b'secret', 4)
                self.assertTrue(entry.startswith('$2y$04$'), entry)
                self.assertTrue(restic_serve.verify(b'secret', Entry(entry)))
                self.assertNotEqual(entry, restic_serve.new_entry(b'secret', 4))
        with hashing(True):
            self.assertTrue(restic_serve.new_entry(b'secret').startswith('$2y$05$'))
        if restic_serve.is_in_c('$2y$'):
            self.assertTrue(restic_serve.new_entry(b'secret').startswith('$2y$10$'))


class SourcesTest(TestCase):
    """Where users come from, other than passwords."""

    def test_certificates_and_unix_sockets_name_users(self):
        passwords = Accounts(user='bob', password='b')
        strict = Accounts(user='bob', password='b', socket_auth=True)
        unix, certified = Peer('unix', 'alice', unix=True), Peer('1.2.3.4', 'alice')
        for accounts, peer, headers, user in (
                (Accounts(), Peer('1.2.3.4'), {}, ''), (Accounts(), Peer('1.2.3.4', '../bob'), {}, ''),
                (Accounts(), certified, {}, 'alice'), (passwords, certified, {}, 401),
                (passwords, unix, {}, 'alice'), (Accounts(socket_auth=True), unix, {}, 'alice'),
                (strict, unix, {}, 401), (strict, unix, {'authorization': credentials('bob', 'b')}, 'bob')):
            self.assertEqual(identified(accounts, peer, **headers), user, (vars(accounts), peer, headers))

    def test_a_certificate_without_the_name_of_a_user_is_401(self):
        accounts = Accounts(certificates=True)
        for name, user in (('alice', 'alice'), ('', 401), ('../bob', 401), ('a b', 401)):
            peer = Peer('1.2.3.4', name)
            peer.certified = True
            self.assertEqual(identified(accounts, peer), user)
        self.assertEqual(identified(accounts, Peer('1.2.3.4')), '')  # by a listener without TLS

    def test_a_name_of_more_than_255_bytes_is_refused_before_it_is_normalized(self):
        long = 'a' + '\u0301\u0316' * 1500
        by_header = Accounts(user_header='x-user')
        with mock.patch('unicodedata.normalize', side_effect=AssertionError):
            self.assertEqual(identified(Accounts(user='bob', password='b'), Peer('1.2.3.4'),
                                        authorization=credentials(long, 'b')), 401)
            self.assertEqual(identified(by_header, Peer('127.0.0.1'),
                                        x_user=long.encode().decode('latin-1')), 401)
            self.assertEqual(identified(Accounts(certificates=True), Peer('1.2.3.4', long)), '')
        exact = 'é' * 127 + 'a'
        self.assertEqual(identified(by_header, Peer('127.0.0.1'), x_user=exact.encode().decode('latin-1')),
                         exact)

    def test_a_header_counts_only_from_a_proxy(self):
        accounts = Accounts(user_header='X-User')
        for peer in (Peer('127.0.0.1'), Peer('::1'), Peer('unix', 'www', unix=True)):
            self.assertEqual(identified(accounts, peer, x_user='alice'), 'alice')
            for names in ({}, {'x_user': ''}, {'x_user': '..'}, {'x_user': 'a, b'}):
                self.assertEqual(identified(accounts, peer, **names), 401)
        self.assertEqual(identified(accounts, Peer('10.1.2.3'), x_user='alice'), 403)
        accounts = Accounts(user_header='X-User', proxies=[restic_serve.parse_network('10.0.0.0/8')])
        self.assertEqual(identified(accounts, Peer('10.1.2.3'), x_user='alice'), 'alice')
        self.assertEqual(identified(accounts, Peer('11.1.2.3'), x_user='alice'), 403)

    def test_names_of_any_script_in_one_form(self):
        for name in ('m\u00fcller', 'mu\u0308ller'):
            self.assertEqual(restic_serve.parse_user(name), 'm\u00fcller')
            accounts = Accounts(user_header='X-User')
            header = name.encode().decode('latin-1')
            self.assertEqual(identified(accounts, Peer('127.0.0.1'), x_user=header), 'm\u00fcller')
            self.assertEqual(identified(Accounts(user='m\u00fcller', password='a'), Peer('1.2.3.4'),
                                        authorization=credentials(name, 'a')), 'm\u00fcller')
        for name in ('Ελένη', 'иван', '田中', 'देवी', 'ali.ö@x'):
            self.assertTrue(restic_serve.is_user(name), name)
        for name in ('mu\u0308ller', 'a\u200bb', 'a\u202eb', 'a b', 'a/ö', 'ö:b', '.', '\udcff', 'ö' * 128):
            self.assertFalse(restic_serve.is_user(name), name)
        self.assertEqual(identified(Accounts(user_header='X-User'), Peer('::1'), x_user='\xff'), 401)

    def client(self, proxies, peer, **headers):
        accounts = Accounts(proxies=[restic_serve.parse_network(proxy) for proxy in proxies])
        headers = {name.replace('_', '-'): value for name, value in headers.items()}
        request = Request('GET', '/', 'HTTP/1.1', headers, Bytes(b''), peer)
        accounts.find_client(request)
        return str(request.client)

    def test_a_trusted_proxy_says_who_the_client_is(self):
        proxies, proxy = ['10.0.0.0/8', '2001:db8::/32'], Peer('10.0.0.1')
        self.assertEqual(self.client(proxies, proxy, x_forwarded_for='6.6.6.6, 1.2.3.4'), '1.2.3.4')
        self.assertEqual(self.client(proxies, proxy, x_forwarded_for='1.2.3.4, 10.0.0.2'), '1.2.3.4')
        self.assertEqual(self.client(proxies, proxy, forwarded='for="[2001:db8::1]:5", for=10.1.1.1'),
                         '2001:db8::1')
        self.assertEqual(self.client(proxies, Peer('unix', unix=True), x_forwarded_for='1.2.3.4'), '1.2.3.4')
        for peer, header in ((proxy, ''), (proxy, 'rubbish'), (Peer('11.0.0.1'), '1.2.3.4'),
                             (Peer('127.0.0.1'), '1.2.3.4')):
            self.assertEqual(self.client(proxies, peer, x_forwarded_for=header), peer.name)
        self.assertEqual(self.client([], Peer('127.0.0.1'), x_forwarded_for='1.2.3.4'), '127.0.0.1')

    def test_combinations_that_make_no_sense_are_refused(self):
        for words in ('--htpasswd f --user a --pass p', '--private-repos', '--admin a', '--admin ../a',
                      '--user a --pass p --user-from-header X', '--trust-proxy x --user-from-header X',
                      '--realm a"b', '--bcrypt-cost 3', '--addr /s --addr :1 --private-repos',
                      '--add-user a/b --htpasswd f', '--user-from-header a=b', '--max-size x',
                      '--max-size -1', '--stats x'):
            self.assertNotEqual(refusal(*words.split(), 'dir'), '', words)
        for words in ('--addr /socket', '--htpasswd f', '--user-from-header X',
                      '--client-ca x --cert y --key z', '--htpasswd f --max-size-per-user 1G'):
            self.assertEqual(refusal('--private-repos', *words.split(), 'dir'), '')


class LoginTest(ListenerTestCase):
    """Users over real connections."""

    def test_what_lets_in_more_than_it_seems_is_said_at_the_start(self):
        path = str(self.folder / 'socket')
        password, header = ['--user', 'a', '--pass', 'b'], ['--user-from-header', 'X-User']
        sockets = 'no password is required on unix socket'
        programs = 'any program on this host can claim any user name with header X-User'
        for addresses, words, expected in (
                ([path], password, [sockets]), ([path], [*password, '--socket-auth'], []), ([path], [], []),
                (['127.0.0.1:0'], header, [programs]), ([path], header, []),
                (['127.0.0.1:0'], password, []), (['127.0.0.1:0'], [], []),
                ([':0'], [], ['no authentication: anyone']), ([':0'], password, []),
                # Certificates say nothing of who comes without TLS.
                (['http://:0'], ['--client-ca', 'x', '--cert', 'x', '--key', 'x'],
                 ['no authentication: anyone'])):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            server = self.start(*addresses)
            parser = restic_serve.Parser({})
            self.log.clear()
            restic_serve.announce(server, 'dir', parser.parse([*words, 'dir']))
            said = [line for line in self.log if not line.startswith(('serving', 'try: ', 'settings: '))]
            self.assertEqual(len(said), len(expected), (words, said))
            for line, text in zip(said, expected):
                self.assertIn(text, line)

    def test_a_password_over_http(self):
        self.server.api.accounts = Accounts(user='alice', password='secret', realm='here')
        wire = self.connect()
        status, headers, _ = wire.ask(get('/config'))
        self.assertEqual((status, headers['www-authenticate']), (401, 'Basic realm="here", charset="UTF-8"'))
        self.assertEqual(wire.ask(get('/config', basic('alice', 'wrong')))[0], 401)
        self.assertEqual(wire.ask(get('/config', basic('alice', 'secret')))[0], 404)
        self.assertEqual(wire.ask(get('/../config'))[0], 401)

    def test_no_content_is_asked_of_who_may_not_enter(self):
        self.server.api.accounts = Accounts(user='alice', password='secret')
        self.assertEqual(self.ask_last(post('/config', b'', 'Expect: 100-continue', length=9))[0], 401)

    def test_over_a_unix_socket_the_user_is_the_login_name(self):
        import pwd
        name = pwd.getpwuid(os.getuid()).pw_name
        self.policy.rights = short_rights(private=True)
        self.start(str(self.folder / 'socket'))
        create = f'POST /{name}/?create=true HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n'.encode()
        self.assertEqual(self.ask_unix(self.folder / 'socket', create), 200)
        self.assertEqual(self.ask_unix(self.folder / 'socket', get('/other/config')), 403)
        self.assertEqual(self.ask(get(f'/{name}/config'))[0], 403)  # over TCP nobody is anybody


# ---- Policy ----------------------------------------------------------------------------------------

class RightsTest(TestCase):
    """Every right: who may do what with which path."""

    NAME = hashlib.sha256(b'x').hexdigest()
    # The right that each request takes, and its status with that right.
    REQUESTS = (('GET', 'config', 'read', 200), ('HEAD', 'config', 'read', 200),
                ('GET', 'data/', 'read', 200), ('GET', f'data/{NAME}', 'read', 200),
                ('POST', '?create=true', 'append', 200), ('POST', f'data/{NAME}', 'append', 200),
                ('POST', 'config', 'append', 403), ('DELETE', f'locks/{NAME}', 'read', 200),
                ('DELETE', '', 'read', 501), ('DELETE', f'data/{NAME}', 'write', 200),
                ('DELETE', f'index/{NAME}', 'write', 200), ('DELETE', f'keys/{NAME}', 'write', 200),
                ('DELETE', f'snapshots/{NAME}', 'write', 200), ('DELETE', 'config', 'write', 200))

    def test_every_role_with_every_request_on_every_kind_of_path(self):
        store = self.make_store()
        rank = ('none', 'read', 'append', 'write').index
        for append_only, private, user in itertools.product(
                (False, True), (False, True), ('alice', 'admin', '')):
            api = Api(store, Policy(short_rights(append_only, private, ['admin'])),
                      Accounts(user=user or 'alice', password='p'))
            own = 'append' if append_only and user != 'admin' else 'write'
            other = 'none' if private and user != 'admin' else own
            for repository, right in ((f'/{user or "alice"}/laptop', own), ('/bob/laptop', other),
                                      ('', other), (f'/{user or "alice"}2', other)):
                for method, path, needed, status in self.REQUESTS:
                    self.prepare(store, repository)
                    headers = {'authorization': credentials(user, 'p')} if user else {}
                    got = answer_of(api, method, f'{repository}/{path}',
                                    b'x' if 'data/' in path else b'other', **headers)[0]
                    expected = 401 if not user else status if rank(right) >= rank(needed) else 403
                    self.assertEqual(got, expected, (append_only, private, user, repository, method, path))

    def prepare(self, store, repository):
        for kind, content in (('data', b'x'), ('locks', b'x'), ('config', b'config')):
            self.put_object(repository, kind, content, store)

    def expected(self, rules, user, path, kind, name, method):
        """Whether the rules allow a request, in words of their own: of those that fit the user and begin
        the path, the longest decides, then a user's own, then one that is written out."""
        fitting = [((len(where.replace('%u', user)), who == user, '%u' not in where), may)
                   for who, where, may in rules if who in (user, '*')
                   and f'{path}/'.startswith(where.replace('%u', user).rstrip('/') + '/')]
        may = max(fitting)[1] if fitting else 'none'
        if method in ('POST', 'DELETE') and kind not in ('locks', '') or method == 'POST' and kind != 'locks':
            return may == 'write' or (may == 'append' and method == 'POST')
        return may in ('read', 'append', 'write') or (
            may == 'view' and (kind != 'locks' or method in ('GET', 'HEAD')))

    def test_random_tables_users_and_paths_against_a_rule_of_ten_lines(self):
        chance, store = random.Random(18), self.make_store()
        users = ['alice', 'bob', 'alic', '']
        paths = ['', '/alice', '/alice/pc', '/alic', '/bob', '/team/bob/x', '/x y']
        wheres = ['/', '/alice', '/%u', '/alice/pc', '/bob', '/team', '/team/%u', '/x y', '/alice/pc/%u']
        for path in paths:
            self.prepare(store, path)
            restic_serve.Past(store, 86400).begin(path)
        for number in range(1000 if LONG_TESTS else 250):
            if number % 8 == 0:
                gc.collect()    # counters take address space, of which 32 bits have little
            rules = [(chance.choice([*users[:3], '*']), chance.choice(wheres),
                      chance.choice(restic_serve.RIGHTS)) for _ in range(chance.randrange(1, 8))]
            rules = [*{(who, where if who == '*' else where.replace('%u', who)): (who, where, may)
                       for who, where, may in rules}.values()]
            text = '\n'.join(f'{who} "{where}" {may}' for who, where, may in rules)
            api = Api(store, Policy(restic_serve.parse_rights(text)), Accounts(certificates=True),
                      usage=Usage(store, Counters(), past=restic_serve.Past(store, 86400)))
            for _ in range(40):
                user, path = chance.choice(users), chance.choice(paths)
                kind, name = chance.choice([('data', self.NAME), ('locks', self.NAME), ('config', ''),
                                            ('data', ''), ('', '')])
                method = chance.choice(['GET', 'HEAD', 'POST', 'DELETE'])
                at = chance.choice(['', '', '/.at/0s'])
                if kind == 'data' and not name and method not in ('GET', 'HEAD'):
                    continue
                end = {'config': 'config', '': '?create=true'}.get(kind, f'{kind}/{name}')
                peer = Peer('1.2.3.4', user)
                allowed = bool(user) and self.expected(rules, user, path, kind, name, method)
                status = 403
                if allowed and not (at and method in ('POST', 'DELETE') and kind != 'locks'):
                    status = {('GET', ''): 404, ('HEAD', ''): 404, ('DELETE', ''): 501}.get(
                        (method, kind), 200)
                got = answer_of(api, method, f'{path}{at}/{end}'.replace(' ', '%20'),
                                b'config' if kind == 'config' else b'x', peer)[0]
                self.assertEqual(got, status, (rules, user, method, path, at, end))
                if method == 'DELETE' and status == 200:
                    self.prepare(store, path)

    def test_a_line_with_a_fault_is_named_and_all_of_them_are(self):
        for line, fault in (
                ('alice /alice', 'expected WHO WHERE'),
                ('alice /alice append 1G x', 'expected WHO WHERE'), ('a/b / read', "invalid user name 'a/b'"),
                ('alice alice read', "'alice' must begin with a slash"),
                ('alice /%user read', "'/%user': %u (the user name) must"),
                ('alice /a%u read', "'/a%u': %u (the user name) must"),
                ('alice /data/x read', "'/data/x': reserved name: "),
                ('alice /../x read', "'/../x': path contains an invalid segment"),
                ('alice /1/2/3/4/5 read 1G', 'a path with a quota may have at most 4 segments'),
                ('alice / all', "invalid right 'all'; use none, metrics, view, read, append or write"),
                ('alice / read 5X', "'5X'"), ('alice "/x read', 'No closing quotation')):
            with self.assertRaises(ValueError) as caught:
                restic_serve.parse_rights(f'# who where may\n\n{line}\n* / none\n')
            self.assertTrue(str(caught.exception).startswith('line 3: '), line)
            self.assertIn(fault, str(caught.exception))
        with self.assertRaises(ValueError) as caught:
            restic_serve.parse_rights('a /x read 1G\na /x append\nb /x read 2G\nc / wrong')
        self.assertEqual(str(caught.exception).split('\n'), [
            'line 2: a already has a rule for /x, line 1', 'line 3: /x has a different quota in line 1',
            "line 4: invalid right 'wrong'; use none, metrics, view, read, append or write"])

    def test_a_file_is_read_again_and_a_bad_one_changes_nothing(self):
        path = self.folder / 'rights'
        path.write_text('alice /a read\n')
        policy = Policy(path=str(path))
        request = Request('POST', '/', 'HTTP/1.1', {}, Bytes(b''), Peer('1.2.3.4'))
        request.user = 'alice'
        for text, fault, said in (
                ('alice /a read\n', 'alice may not add to /a; only read access', ''),
                ('alice /a append 1G\n', '', f'read 1 rule from {path}'),
                ('alice /a appendix\n', '', f"keeping the previous rights: {path}, line 1: invalid right '"),
                ('', '', 'no rules; use '), ('bob / write', 'alice may not access /a', '')):
            path.write_text(text)
            for _ in range(2):
                policy.look(force=True)
            self.assertIn(said, self.log[-1])
            with self.assertRaisesRegex(HttpError, fault) if fault else contextlib.nullcontext():
                policy.check(request, Location('/a', 'data', self.NAME))

    def test_the_short_options_stand_for_a_table(self):
        for words, table in (
                ([], '*  /  write'), (['--append-only'], '*  /  append'),
                (['--append-only', '--htpasswd', 'f', '--private-repos', '--admin', 'root',
                  '--max-size-per-user', '20G'],
                 '*     /%u    append  20G\nroot  /      write\nroot  /root  write'),
                (['--prometheus'], '*        /  write\nmetrics  /  metrics')):
            self.assertEqual(self.show_rights(*words, '--show-rights'), f'{table}\n')
            self.assertEqual(restic_serve.parse_rights(table).quotas().limit('alice') >> 30,
                             20 if '20G' in table else 0)
        self.assertEqual(
            self.show_rights('--htpasswd', 'f', '--private-repos', '--append-only', '--max-size-per-user',
                             '20G', '--show-rights', 'alice'),
            'alice may read and add, but delete only locks, at and below /alice, within 20.0 GiB in /alice\n')
        self.assertEqual(refusal('--rights', 'f', '--append-only', 'dir'),
                         'restic_serve: --append-only cannot be combined with --rights; put this into f '
                         'instead: *  /  append')

    def show_rights(self, *words):
        parser = restic_serve.Parser({})
        with contextlib.redirect_stdout(io.StringIO()) as output:
            self.assertEqual(restic_serve.show_rights(parser.parse(words)), 0)
        return output.getvalue()

    def test_quotas_bound_places_whoever_stores_there_and_change_with_the_file(self):
        self.store = self.make_store()
        for path in ('alice/pc', 'bob/pc', 'free/x/y'):
            self.make_repository(path)
        usage = self.counted({'/alice': 50_000, '/%u': 40_000, '/team/x': 9000}, interval=0, may_change=True)
        self.assertEqual(usage.limited('/alice/pc'), ['alice'])
        self.assertEqual(usage.limited('/bob/pc'), ['bob'])
        self.assertEqual(usage.limited('/team/x/y'), ['team/x', 'team'])
        self.assertEqual(usage.scopes('/a/b/c/d/e'), ['a/b/c/d', 'a/b/c', 'a/b', 'a', ''])
        self.assertEqual([usage.limits.limit(scope) for scope in ('alice', 'bob', 'team', 'team/x', '')],
                         [50_000, 40_000, 40_000, 9000, 0])

        def save(path, size):
            return self.put_object(path, 'keys', os.urandom(size), usage)

        save('/alice/pc', 20_000)
        self.assertRaisesRegex(QuotaExceeded, '^quota of /bob exceeded$', save, '/bob/pc', 40_000)
        location = save('/free/x/y', 4000)
        held = {scope: usage.quota(scope)[0] for scope in ('alice', 'alice/pc', 'bob', 'free', 'free/x', '')}
        usage.census.count()    # what was counted and what passed through agree
        self.assertEqual({scope: usage.quota(scope)[0] for scope in held}, held)
        self.assertGreater(held['alice/pc'], 20_000)
        self.assertEqual(held[''], held['alice'] + held['bob'] + held['free'])
        usage.limits = restic_serve.Quotas({'/alice/pc': 30_000, '/free/x': 30_000})
        self.assertEqual(usage.limited('/alice/pc'), ['alice/pc'])
        self.assertRaises(QuotaExceeded, save, '/alice/pc', 8000)
        save('/free/x/y', 4000)
        usage.delete(location)
        self.assertEqual(usage.quota('free/x')[0], held['free/x'])
        usage.limits = restic_serve.Quotas({'/': 60_000})
        self.assertEqual(usage.quota(''), (held[''], 0, 60_000))

    def test_a_pattern_is_not_for_what_leads_to_a_written_place(self):
        rights = restic_serve.parse_rights('* /%u append 20G\nbob /shared/photos append\nalice /%u write 1G\n'
                                           '* /%u/pc append 10G\n* /lab/%u append 5G')
        whole = restic_serve.parse_rights('alice / write 50G')
        self.assertEqual([whole.quotas(limit).limit('') for limit in (0, 40, 1 << 50)],
                         [50 << 30, 40, 50 << 30])
        quotas = rights.quotas(100 << 30)
        self.assertEqual([quotas.limit(scope) >> 30 for scope in (
            'bob', 'shared', 'shared/photos', 'alice', 'bob/pc', 'lab/bob', 'lab/pc', '')],
            [20, 0, 0, 1, 10, 5, 5, 100])
        self.assertEqual(rights.words('bob', 100 << 30)[1],
                         'bob may read and add, but delete only locks, at and below /bob/pc, within 10.0 GiB '
                         'in /bob/pc, 20.0 GiB in /bob, 100.0 GiB in /')

    def test_no_row_is_made_for_a_place_that_does_not_exist(self):
        self.store = self.make_store()
        usage = self.counted({'/%u': 1 << 20})
        for number in range(5):
            self.assertRaises(NotHere, usage.save, Location(f'/no{number}', 'data', self.NAME), Bytes(b'x'))
        self.assertEqual(usage.counters.names('reserved'), set())

    def test_who_may_only_read_stores_nothing_but_locks(self):
        store = self.make_store()
        self.prepare(store, '/a')
        api = Api(store, Policy(restic_serve.parse_rights('* / read')), Accounts(certificates=True))

        def lock(content, **more):
            return answer_of(api, 'POST', f'/a/locks/{named(content)}', Bytes(content, **more),
                             Peer('1.2.3.4', 'eve'))[0]

        self.assertEqual(lock(b'a lock'), 200)
        self.assertEqual(lock(bytes(restic_serve.LOCK_BYTES + 1)), 403)
        self.assertEqual(lock(b'chunked', length=None), 411)
        with mock.patch.object(restic_serve, 'LOCKS', 2):
            self.assertEqual(lock(b'one too many'), 403)

    def test_who_may_only_add_adds_a_key_before_the_config_and_none_later(self):
        self.make_repository('a')
        api = Api(self.make_store(), Policy(short_rights(True)), Accounts(certificates=True))
        for content, status in ((b'key', 200), (b'', 200), (b'key', 200), (b'other', 403)):     # `` is config
            location = Location('/a', 'keys', named(content)) if content else Location('/a', 'config')
            got = answer_of(api, 'POST', str(location), content or b'x', Peer('1.2.3.4', 'eve'))[0]
            self.assertEqual(got, status)
        self.assertEqual(self.log[-1],
                         f"access denied: 'eve' from 1.2.3.4 may not add {location}; only append access to /")

    def test_what_is_under_way_ends_with_its_user_or_his_right_but_not_with_his_password(self):
        store, same = self.make_store(), f'alice:{sha("a")}'
        self.make_repository()
        stored = Location('', 'data', named(bytes(100_000)))
        store.save(stored, Bytes(bytes(100_000)))
        for case in ((f'alice:{sha("new")}', 'alice / append', 200, 200), ('', 'alice / append', 403, 403),
                     (same, 'alice / view', 403, 200), (same, '* / none', 403, 403)):
            self.change_under_way(store, stored, *case)

    def change_under_way(self, store, stored, entry, rule, upload, download):
        def write(entry, rule):
            (self.folder / 'users').write_text(f'{entry}\n')
            (self.folder / 'rights').write_text(f'{rule}\n')

        def ask(method, location, body=None):
            return api.handle(Request(method, str(location), 'HTTP/1.1', {
                'authorization': credentials('alice', 'a')}, body, Peer('x')))

        def change(view):
            write(entry, rule)
            for files in (api.accounts.file, api.policy):
                files.look(force=True)
            return content.readinto(view)

        write(f'alice:{sha("a")}', 'alice / append')
        api = Api(store, Policy(path=str(self.folder / 'rights')),
                  Accounts(PasswordFile(str(self.folder / 'users'))))
        content = io.BytesIO(f'{entry}{rule}'.encode())
        location = Location('', 'data', named(content.getvalue()))
        with ask('GET', stored).body as body:
            response = ask('POST', location, mock.Mock(piece=100, length=9, readinto=change))
            self.assertEqual((response.status, store.size(location) is None), (upload, upload == 403), rule)
            with self.assertRaises(HttpError) if download == 403 else contextlib.nullcontext():
                body.read(1000)

    def test_what_a_table_says_of_metrics(self):
        for text, user, whole, shown in (
                ('monitor / metrics', 'monitor', True, '/a /b other'),
                ('monitor / metrics\nmonitor /b none', 'monitor', True, '/a'),
                ('monitor / metrics\n* /b append', 'monitor', True, '/a /b other'),
                ('prune / write\nprune /b none', 'prune', True, '/a'), ('x /a metrics', 'x', False, '/a'),
                ('* / read', 'x', False, ''), ('* / none', '', False, ''), ('* / write', 'x', False, '')):
            policy = Policy(restic_serve.parse_rights(text, strangers=True))
            shows = policy.metrics_of(user)
            self.assertEqual(policy.sees_server(user), whole, text)
            self.assertEqual(' '.join(name for name in ('/a', '/b', 'other') if shows and shows(name)), shown,
                             text)


class RightsOnWiresTest(WatchedTestCase):
    """The same rights over both wires."""

    def test_each_right_with_each_request(self):
        self.server = self.serve(Api(self.store, self.policy, Accounts(user_header='X-User')))
        self.port = self.server.listeners[0].server_address[1]
        self.make_repository('a')
        path, other = f'/a/data/{named(b"x")}', f'/a/data/{named(b"y")}'
        lock = f'/a/locks/{named(b"x")}'
        requests = (('GET', path, b''), ('HEAD', path, b''), ('GET', '/a/data/', b''), ('POST', path, b'x'),
                    ('POST', lock, b'x'), ('DELETE', lock, b''), ('POST', '/a/?create=true', b''),
                    ('DELETE', other, b''))
        rights = {'none': [403] * 8, 'metrics': [403] * 8, 'view': [200] * 3 + [403] * 5,
                  'read': [200, 200, 200, 403, 200, 200, 403, 403], 'append': [200] * 7 + [403],
                  'write': [200] * 8}

        for (may, statuses), wire in itertools.product(rights.items(), self.WIRES):
            self.policy.rights = restic_serve.parse_rights(f'* /%u {may}')
            for name in (b'x', b'y'):
                self.store.save(Location('/a', 'data', named(name)), Bytes(name))
            got = [self.exchange(wire, *request, ('x-user', 'a'))[0] for request in requests]
            self.assertEqual(got, statuses, (may, wire))
            self.assertEqual(self.exchange(wire, 'GET', path, b'', ('x-user', 'b'))[0], 403)

    def test_page_and_metrics_show_what_the_user_may_see(self):
        self.watch(Policy(restic_serve.parse_rights(
            'monitor / metrics\nmonitor /secret none\nbob /bob metrics\nalice /alice append 1G\n'
            'root / write')),
                   Accounts(user_header='X-User'))
        self.usage.limits = restic_serve.Quotas({'/alice': 1 << 30})
        for repository in ('/alice', '/bob/x', '/secret'):
            self.put_object(repository, 'config', b'x', self.usage)
        self.usage.census.count()
        for user, repositories, whole in (
                ('root', {'alice', 'bob/x', 'secret'}, True), ('monitor', {'alice', 'bob/x'}, True),
                ('bob', {'bob/x'}, False)):
            status, _, text = self.ask(get('/metrics', f'X-User: {user}'))
            self.assertEqual(status, 200)
            self.assertEqual(set(re.findall(r'repository_bytes\{repo="(.*?)"', text.decode())), repositories)
            self.assertEqual('restic_serve_connections' in text.decode(), whole, user)
        self.assertEqual(self.ask(get('/metrics', 'X-User: alice'))[0], 403)
        for user, shown in (('alice', {'alice': 'append'}), ('bob', {'bob/x': 'metrics'}),
                            ('root', {}), ('eve', {})):
            status, _, text = self.ask(get('/', f'X-User: {user}', 'Accept: text/html'))
            rows = re.findall('class="name"><a [^>]*>(.*?)<.*?<td class="right more">(.*?)<', text.decode())
            self.assertEqual((status, dict(rows)), (200, shown), user)
            self.assertEqual('1.0 GiB' in text.decode(), user in ('alice', 'root'), user)
        self.assertEqual(self.ask(get('/secret/', 'X-User: bob', 'Accept: text/html'))[0], 403)


# ---- Metrics ---------------------------------------------------------------------------------------

class MetricsTest(WatchedTestCase):
    def work(self, port):
        """Requests that rest-server counts."""
        with Wire(port) as wire:
            self.assertEqual(wire.ask(post('/a/b/?create=true', b''))[0], 200)
            contents = {kind: kind.encode() * 100 for kind in restic_serve.KINDS}
            wire.ask(post('/a/b/config', b'config'))
            for kind, content in contents.items():
                path = f'/a/b/{kind}/{named(content)}'
                self.assertEqual(wire.ask(post(path, content))[0], 200)
                self.assertEqual(wire.ask(get(path))[0], 200)
                self.assertEqual(wire.ask(get(path, 'Range: bytes=1-10'))[0], 206)
                self.assertEqual(wire.ask(get(path, method='HEAD'), head_only=True)[0], 200)
                wire.ask(get(f'/a/b/{kind}/'))
                wire.ask(get(f'/a/b/{kind}/{"0" * 64}'))
            for kind in ('locks', 'data'):
                path = f'/a/b/{kind}/{named(contents[kind])}'
                self.assertEqual(wire.ask(get(path, method='DELETE'))[0], 200)
                wire.ask(get(path, method='DELETE'))
            wire.ask(get('/a/b/config'))

    def test_names_labels_and_numbers_are_those_of_rest_server(self):
        self.work(self.port)
        ours = normalized(self.ask(get('/metrics'))[2].decode())
        self.assertEqual(ours['rest_server_blob_read_bytes_total',
                              ('repo="a/b"', 'type="keys"', 'user=""')], 410)
        port = free_port()
        self.launch(peer('rest-server'), '--no-auth', '--prometheus', '--path', str(self.folder / 'theirs'),
                    '--listen', f'127.0.0.1:{port}', stdout=subprocess.DEVNULL)
        self.wait_until(lambda: listens(('127.0.0.1', port)), 'rest-server')
        self.work(port)
        self.assertEqual(ours, normalized(self.ask(get('/metrics'), port=port)[2].decode()))

    def test_prometheus_takes_them(self):
        self.work(self.port)
        self.fill('/we"ird\\ü', 'data', 'snapshots')
        self.watch(max_bytes=1 << 30, per_user=1 << 20)
        self.scrub()
        self.work(self.port)
        content = self.ask(get('/metrics'))[2]
        self.assertIn('repo="we\\"ird\\\\ü"', content.decode())
        done = subprocess.run([program('promtool'), 'check', 'metrics'], input=content,
                              capture_output=True, timeout=PATIENCE)
        self.assertEqual((done.returncode, done.stdout + done.stderr), (0, b''))

    def test_requests_are_counted_by_method_and_status_on_both_wires(self):
        self.ask(get('/config'))
        self.ask(b'BREW / HTTP/1.1\r\nHost: x\r\n\r\n')
        self.ask(b'rubbish / HTTP/1.1\r\n\r\n')
        self.assertEqual(self.http2().ask(1, 'GET', '/config')[0], 404)
        samples = {}

        def is_counted():
            samples.update(self.scrape())
            return (samples.get('restic_serve_requests_total{method="GET",status="404"}') == '2'
                    and samples['restic_serve_connections'] == '2')  # others may be about to end

        self.wait_until(is_counted, 'the second request, and its connection and ours alone')
        self.assertEqual(samples['restic_serve_requests_total{method="other",status="501"}'], '1')
        self.assertEqual(samples['restic_serve_requests_total{method="other",status="400"}'], '1')
        name = 'restic_serve_request_duration_seconds'
        self.assertEqual(samples[f'{name}_count{{method="other"}}'], '2')
        self.assertEqual(samples[f'{name}_bucket{{method="other",le="+Inf"}}'], '2')
        self.assertLess(float(samples[f'{name}_sum{{method="other"}}']), PATIENCE)
        bounds = [int(value) for key, value in samples.items() if f'{name}_bucket{{method="other"' in key]
        self.assertEqual(bounds, sorted(bounds))

    def test_repositories_their_scrubs_and_quotas(self):
        self.fill('/alice/x', 'data', 'data', 'snapshots', age=500)
        (self.root / 'alice/x/data/00').mkdir(exist_ok=True)
        (self.root / 'alice/x/data/00' / ('0' * 64)).write_bytes(b'damaged')
        self.fill('', 'keys')
        self.watch(max_bytes=10000, per_user=2000)
        self.metrics._watch.certificate_end = lambda: 7
        self.scrub()
        samples = self.scrape()
        for name in re.findall(r'restic_serve_\w+', (HIDDEN / 'prometheus-rules.yml').read_text()):
            self.assertIn(name, {sample.partition('{')[0] for sample in samples})
        begin = 'restic_serve_repository_'
        for name, value in (('bytes{repo="alice/x"}', '307'), ('objects{repo="alice/x",type="data"}', '3'),
                            ('objects{repo="",type="keys"}', '1'),
                            ('scrub_damaged_objects{repo="alice/x"}', '1'),
                            ('scrub_checked_objects{repo="alice/x"}', '4')):
            self.assertEqual(samples[begin + name], value)
        moment = int(samples[f'{begin}last_snapshot_timestamp_seconds{{repo="alice/x"}}'])
        self.assertAlmostEqual(moment, time.time() - 500, delta=60)
        self.assertNotIn(f'{begin}last_snapshot_timestamp_seconds{{repo=""}}', samples)
        self.assertAlmostEqual(float(samples[f'{begin}scrub_timestamp_seconds{{repo=""}}']), time.time(),
                               delta=60)
        self.assertEqual({key: value for key, value in samples.items() if 'quota' in key}, {
            'restic_serve_quota_used_bytes{folder=""}': '407',
            'restic_serve_quota_limit_bytes{folder=""}': '10000',
            'restic_serve_quota_used_bytes{folder="alice"}': '307',
            'restic_serve_quota_limit_bytes{folder="alice"}': '2000'})

    def test_a_scrape_does_not_wait_for_the_count(self):
        begun, go_on = threading.Event(), threading.Event()
        self.addCleanup(go_on.set)
        with mock.patch.object(restic_serve.Census, 'count',
                               lambda census: begun.set() or go_on.wait(PATIENCE)):
            self.watch(prometheus='open', wait=False)
            begin = time.monotonic()
            samples = self.scrape()
            self.assertLess(time.monotonic() - begin, PATIENCE / 3)
            self.assertNotIn('restic_serve_repository_bytes', ''.join(samples))
            self.assertTrue(begun.wait(PATIENCE))
            go_on.set()

    def test_who_may_see_them(self):
        accounts = self.users('root', 'metrics', 'alice')
        free, bound, private, admin, all_admin = (Policy(short_rights(**more, metrics=True)) for more in (
            {}, {'append_only': True}, {'private': True}, {'private': True, 'administrators': ['root']},
            {'administrators': ['root']}))
        for policy, prometheus, login, allowed in (
                (free, 'login', True, 'metrics'), (bound, 'login', True, 'metrics'),
                (private, 'login', True, 'metrics'), (admin, 'login', True, 'root metrics'),
                (all_admin, 'login', True, 'root metrics'), (admin, 'open', True, 'root metrics alice wrong'),
                (free, 'login', False, 'root metrics alice wrong'), (free, '', False, '')):
            self.watch(policy, accounts if login else None, prometheus)
            for user in ('root', 'metrics', 'alice', 'wrong'):
                status = self.ask(get('/metrics', basic(user, user)))[0]
                expected = (200 if user in allowed.split() else 404 if not prometheus
                            else 401 if user == 'wrong' else 403)
                self.assertEqual(status, expected, (policy.__dict__, prometheus, user))

    def test_the_disk_and_refused_logins(self):
        accounts = Accounts(user='metrics', password='m')
        self.watch(Policy(short_rights(metrics=True)), accounts)
        accounts._counters = self.metrics.counters
        for password in ('m', 'x', 'y'):
            self.ask(get('/config', basic('metrics', password)))
        samples = self.scrape(basic('metrics', 'm'))
        self.assertEqual(samples['restic_serve_refused_logins_total'], '2')
        self.assertEqual(samples['restic_serve_disk_bytes'], str(shutil.disk_usage(self.root).total))
        self.assertRegex(samples['restic_serve_disk_free_bytes'], r'^\d+$')

    def test_counting_begins_at_the_start(self):
        self.make_repository('host')
        self.watch()
        self.wait_until(lambda: self.usage.census.age() < math.inf, 'a census that nobody asked for')

    def test_they_lie_below_the_base_url(self):
        self.watch(baseurl='/backup')
        self.assertEqual(self.ask(get('/backup/metrics'))[0], 200)
        self.assertEqual(self.ask(get('/metrics'))[0], 404)

    def test_the_line_in_the_log(self):
        self.make_repository()
        self.assertFalse(self.metrics.has_news())
        content = b'x' * 5000
        path = f'/data/{named(content)}'
        self.ask(post(path, content))
        self.ask(get(path))
        self.ask(get('/config'))
        self.ask(get('/../config'))
        self.wait_until(lambda: ' 4 requests' in self.metrics.line(final=False), 'the four requests')
        line = (r'in \d+ s: sent 4\.9 KiB in 1 objects \([\d.]+ [KM]?i?B/s\), received 4\.9 KiB in 1 objects '
                r'\([\d.]+ [KM]?i?B/s\), 4 requests \([\d.]+/s\), 1 error; \d connections?')
        self.assertRegex(self.metrics.line(final=False), f'^{line}$')
        self.assertTrue(self.metrics.has_news())
        self.assertRegex(self.metrics.line(), f'^{line}$')
        self.assertFalse(self.metrics.has_news())
        self.assertIn('0 requests', self.metrics.line())

    def test_a_rate_is_that_of_the_time_in_which_something_was_done(self):
        self.metrics.begin_period()
        with mock.patch.object(time, 'monotonic', return_value=time.monotonic() + 3600):
            self.metrics.begin_period()
            self.assertIn('in 0 s: ', self.metrics.line())

    @long
    def test_a_real_prometheus_fires_and_resolves_the_rules_and_answers_the_dashboard(self):
        self.fill('/late', 'snapshots', age=3 * 86400)
        damaged, content = self.put(b'whole', repository='/nas'), b'whole'
        self.fill('/nas', *['snapshots'] * 3)
        Path(f'{self.root}{damaged.replace("/data/", "/data/" + named(content)[:2] + "/")}').write_bytes(b'x')
        self.scrub()
        self.watch(max_bytes=1 << 30, past=restic_serve.Past(self.store, 86400), prometheus='open')
        query = self.run_prometheus()

        def firing():
            return {(alert['alertname'], alert.get('repo')) for alert in query('ALERTS{alertstate="firing"}')}

        expected = {('BackupOverdue', 'late'), ('BackupDamaged', 'nas')}
        self.wait_until(lambda: firing() >= expected, 'the alerts')
        for part in (post(f'/late/snapshots/{named(b"new")}', b'new'), post(damaged, content), get(damaged),
                     get(f'/late/snapshots/{named(b"new")}'), get(
                         f'/nas/snapshots/{next((self.root / "nas" / "snapshots").iterdir()).name}',
                         method='DELETE')):
            self.assertEqual(self.ask(part)[0], 200)
        self.scrub()
        self.wait_until(lambda: not firing() & expected, 'their end')
        for panel in json.loads((README.parent / '.github' / 'grafana.json').read_text())['panels']:
            for target in panel['targets']:
                expression = target['expr'].replace('$job', 'restic_serve').replace('$__rate_interval', '30s')
                if 'limited' not in expression:
                    self.wait_until(lambda expression=expression: query(expression), expression)
                query(expression)

    def run_prometheus(self):
        """A Prometheus that scrapes the server and has the rules of the README, but fires at once; the labels
        of what it answers to a query."""
        rules = (HIDDEN / 'prometheus-rules.yml').read_text()
        (self.folder / 'rules.yml').write_text(re.sub(r'\n +for: \w+', '', rules))
        (self.folder / 'prometheus.yml').write_text(
            'global: {scrape_interval: 1s, evaluation_interval: 1s}\nrule_files: [rules.yml]\n'
            'scrape_configs:\n- job_name: restic_serve\n'
            f'  static_configs: [{{targets: ["127.0.0.1:{self.port}"]}}]\n')
        port = free_port()
        self.launch(program('prometheus'), f'--config.file={self.folder}/prometheus.yml',
                    f'--storage.tsdb.path={self.folder}/data', f'--web.listen-address=127.0.0.1:{port}')
        self.wait_until(lambda: listens(('127.0.0.1', port)), 'Prometheus')

        def query(expression):
            from urllib.parse import quote
            status, _, text = self.ask(get(f'/api/v1/query?query={quote(expression)}'), port=port)
            if status == 503:   # it is still starting
                return []
            answer = json.loads(text)
            self.assertEqual((status, answer['status']), (200, 'success'), answer)
            return [sample['metric'] for sample in answer['data']['result']]

        return query


# ---- Watch -----------------------------------------------------------------------------------------

class WatchTest(TestCase):
    """What is wrong with which repository, for the page and the report."""

    def setUp(self):
        super().setUp()
        self.store = self.make_store()
        self.now = time.time()
        for name in ('sound-2', 'sound-10', 'late', 'later', 'never', 'locked', 'damaged', 'full'):
            age = {'late': 49, 'later': 500}.get(name, 1) * 3600
            if name != 'never':
                self.put(name, 'snapshots', age)
            else:
                self.put(name, 'keys', age)
        for age in (60, 2 * 86400, 120):
            self.put('locked', 'locks', age)
        self.put('damaged', 'data', 60).write_bytes(b'damaged')
        scrub_with_configs(self.store)
        self.put('full', 'data', 60, 20_000)

    def put(self, repository, kind, age, size=100):
        path = Path(path_of(self.store, self.put_object(f'/{repository}', kind, os.urandom(size))))
        os.utime(path, (self.now - age,) * 2)
        return path

    def test_what_is_wrong_comes_first_and_longest(self):
        watched = restic_serve.Watch(self.store, self.counted({'/full': 40_000}), 48 * 3600).look(self.now)
        self.assertEqual([(repository.name, list(repository.troubles)) for repository in watched], [
            ('/damaged', ['damaged']), ('/never', ['overdue']), ('/later', ['overdue']),
            ('/late', ['overdue']), ('/locked', ['locked']), ('/full', ['nearly full']),
            ('/sound-2', []), ('/sound-10', [])])
        self.assertEqual(watched[4].text_of_troubles(), 'locked for 2 days')
        self.assertEqual(restic_serve.count_troubles(watched),
                         '1 damaged, 3 overdue, 1 locked, 1 nearly full')
        self.assertEqual(restic_serve.count_troubles([]), '')

    def test_a_lock_is_stale_after_half_an_hour_by_the_clock_of_the_disk(self):
        usage = Usage(self.store, Counters())
        for age, ahead, stale, now in ((1700, 0, 0, True), (1900, 0, 1, False), (60, 1800, 1, False)):
            shutil.rmtree(self.root / 'sound-2' / 'locks', ignore_errors=True)
            self.put('sound-2', 'locks', age)
            usage.census.count()
            with mock.patch.object(Store, 'now', return_value=self.now + ahead):
                watch = restic_serve.Watch(self.store, usage, math.inf)
                repository, = watch.look(self.now, ['/sound-2'], locks=False)
                exposed = metrics_of(usage, self.store).exposition()
                with contextlib.nullcontext() if stale else self.assertRaisesRegex(ValueError, 'locked'):
                    restic_serve.RollBack(self.store, usage.past, '/sound-2', 0).check_locks()
            self.assertEqual((repository.stale, 'locked' in repository.troubles,
                              'locked now' in repository.age_of_locks()), (stale, bool(stale), now))
            self.assertIn(f'stale_locks{{repo="sound-2"}} {stale}\n', exposed)

    def report(self, *words, folder=None, said=''):
        status, output, error = self.run_it('--report', *words, folder or self.root)
        self.assertRegex(error, rf'^{said}\Z')
        return status, output.splitlines()

    def test_the_report_says_it_on_a_terminal(self):
        status, lines = self.report()
        self.assertEqual((status, len(lines)), (1, 8))
        self.assertRegex(lines[0], r'^DAMAGED: damaged: last snapshot .+ ago, 1 snapshot, \d+ B, scrubbed '
                                   '.*, 1 damaged; next: .*restic -r rest:https://HOST/damaged/ repair index')
        self.assertRegex(lines[1], '^OVERDUE: never: no snapshot yet, 0 snapshots, 100 B, scrubbed .* ago, '
                                   '0 damaged; next: see on its client ')
        self.assertIn('3 locks, oldest 2 days, locked now, scrubbed', lines[4])
        lock = self.put('sound-2', 'locks', 7200, 12)
        self.assertIn(f"1 lock, oldest 2 hours, lock {lock.name[:8]} is not restic's: run restic unlock "
                      '--remove-all, ', [line for line in self.report('-q')[1] if 'sound-2' in line][0])
        lock.unlink()
        self.assertTrue(lines[-1].startswith('sound: sound-10: last snapshot '), lines[-1])
        status, lines = self.report('--log-format', 'json', '--stale-after', '30d', '--max-size', '1G')
        told = [json.loads(line) for line in lines]
        self.assertEqual({line['verdict'] for line in told}, {'damaged', 'sound'})
        self.assertEqual([(line['repository'], line['troubles']) for line in told][:3], [
            ('damaged', ['damaged']), ('never', ['overdue']), ('locked', ['locked'])])
        for name in ('damaged', 'never', 'locked'):
            shutil.rmtree(self.root / name)
        self.assertEqual(self.report('--stale-after', '30d')[0], 0)
        self.assertEqual(self.report('--stale-after', '30d', '-q'), (0, []))
        status, lines = self.report('-q')
        self.assertEqual((status, [line.split()[1] for line in lines]), (1, ['later:', 'late:']))

    def test_a_terminal_shows_columns_troubles_in_red_and_what_to_do(self):
        words = '--report', '--stale-after', '30d', self.root
        for text, red in ((self.run_on_terminal(*words, NO_COLOR='1'), 'DAMAGED'),
                          (self.run_on_terminal(*words, NO_COLOR=''), '\x1b[1;31mDAMAGED\x1b[0m')):
            self.assertTrue(text.startswith(f'{red}  damaged   last'), text)
            self.assertIn('\n    next: if no restic is at work there, run restic -r ', text)
            rows = re.findall(r'(?m)^\w.*', re.sub('\x1b.*?m', '', text))
            self.assertEqual((len(rows), len({row.index('scrubbed') for row in rows})), (8, 1), text)

    def test_what_cannot_be_read_is_not_sound_and_is_named(self):
        (self.root / 'sound-2' / 'index').write_text('')
        status, lines = self.report('-q', '--stale-after', '30d', said='.* full size of /sound-2: .*\n')
        self.assertEqual((status, [line[:19] for line in lines if 'sound' in line.split()[1]]),
                         (1, ['UNREADABLE: sound-2']))
        options = restic_serve.Parser({}).parse(['--report', '-q', str(self.root)])
        shutil.rmtree(self.root)
        real = self.make_store().walk
        for repository, status in ((None, 3), ('sound', 3), ('late', 1)):
            if repository:
                self.put(repository, 'snapshots', 60 if repository == 'sound' else 7200000)
                (self.root / 'sound' / 'index').write_text('')
            with mock.patch.object(Store, 'walk', lambda store, fail: [
                    *real(fail), *(fail('/secret', OSError(13, 'denied')) or ())]), mock.patch.object(
                        sys, 'stderr', io.StringIO()) as errors, contextlib.redirect_stdout(io.StringIO()):
                self.assertEqual(restic_serve.report(options, Store(str(self.root))), status)
            self.assertIn('restic_serve: cannot read secret\n', errors.getvalue())

    def test_of_nothing_there_is_no_report(self):
        for folder, said in ((self.folder / 'missing', f'{self.folder}/missing: directory does not exist'),
                             (self.folder / 'srv' / '.restic_serve', 'no repository in ')):
            self.assertEqual(self.report(folder=folder, said=f'.*{said}.*\n'), (1, []))


# ---- Events ----------------------------------------------------------------------------------------

class EventsTest(WatchedTestCase):
    """A command that is run when something happens; here it writes what it is told."""

    TELL = ('printf "%s|%s|%s|%s\\n" "$RESTIC_SERVE_EVENT" "$RESTIC_SERVE_REPOSITORY" "$RESTIC_SERVE_USER" '
            '"$RESTIC_SERVE_MESSAGE" >> ')

    def setUp(self):
        super().setUp()
        self.heard = self.folder / 'heard'
        half_full = mock.Mock(total=100 << 30, free=50 << 30)
        patch_for(self, shutil, disk_usage=lambda path: half_full)
        self.quotas = {}

    def events(self, command=None):
        """Events of a server that has counted what is stored."""
        self.counters = Counters()
        self.usage = self.counted(self.quotas, self.counters)
        events = restic_serve.Events(restic_serve.Watch(self.store, self.usage, 3600), self.counters,
                                     f'{self.TELL}{self.heard}' if command is None else command)
        self.addCleanup(events.stop, PATIENCE)
        return events

    def started(self, command=None):
        """Events of a server that runs their command."""
        events = self.events(command)
        events.start()
        return events

    def told(self):
        """What the command was told, but for the disk of the tests, which may be full."""
        lines = self.heard.read_text().splitlines() if self.heard.exists() else []
        lines = [line.partition('; next: ')[0] for line in lines]
        return [line for line in lines if 'full|||disk' not in line or '100.0 GiB' in line]

    def look(self, events=None):
        """What is told by a look at what is wrong."""
        before = len(self.told())
        (events or self.events())._look()
        return self.told()[before:]

    def served(self, command=None, **more):
        """Events of a server that is running."""
        events = self.events(command)
        self.server = self.serve(Api(self.store, self.policy, usage=self.usage, events=events, **more))
        self.port = self.server.listeners[0].server_address[1]
        return events

    def test_what_clients_do_is_told(self):
        self.policy = Policy(short_rights(append_only=True))
        self.fill('/laptop')
        self.served(accounts=self.users('alice'))
        alice, content = basic('alice', 'alice'), b'snapshot'
        path = f'/laptop/snapshots/{named(content)}'
        for _ in range(2):      # it comes once
            self.assertEqual(self.ask(post(path, content, alice))[0], 200)
        self.fill('/nas', 'data')
        absent, other = f'/nas/data/{named(b"absent")}', next((self.root / 'nas' / 'data').glob('*/*')).name
        for target in (path, absent, path, f'/nas/data/{other}', path):     # none for what is not there
            self.assertEqual(self.ask(get(target, alice, method='DELETE'))[0], 403)
        self.wait_until(lambda: len(self.told()) == 3, 'all events')
        self.assertEqual(sorted(self.told(), reverse=True), [
            f'snapshot|laptop|alice|laptop: snapshot {named(content)[:8]} received from alice', *[
                f"refused|{name}|alice|{name}: 'alice' from 127.0.0.1 tried to delete, but may only append"
                for name in ('nas', 'laptop')]])
        reported, now = restic_serve.ReportedEvents(self.store), time.time()
        self.assertFalse(reported.note('refused', '/laptop', now))
        self.assertTrue(reported.note('refused', '/laptop', now + 3601))
        self.assertEqual({key[1]: row[0] for key, row in self.counters.find('event').items() if row[0]},
                         {'snapshot': 1, 'refused': 2})

    def test_a_mass_delete_is_told_once_and_forged_snapshots_hide_none(self):
        bob, within = 'bob from 127.0.0.1', 'were deleted within a minute, by bob from 127.0.0.1 (4)'
        for age, forged, deletes, said in (
                (0, 0, 5, f'4 of 6 snapshots {within}; they are kept (--keep-deleted)'),
                (7200, 20, 5, f'4 of 6 snapshots {within}'), (7200, 0, 3, '')):
            with self.subTest(said), tempfile.TemporaryDirectory(dir=self.folder) as root:
                self.root = Path(root)
                self.store = self.make_store()
                self.fill('/laptop', *['snapshots'] * 6, age=age)
                paths = list((self.root / 'laptop' / 'snapshots').iterdir())
                events = self.served(accounts=self.users('bob'))
                self.usage.past.keeps = 'kept' in said
                self.fill('/laptop', *['snapshots'] * forged)
                for path in paths[:deletes]:
                    self.ask(get(f'/laptop/snapshots/{path.name}', basic('bob', 'bob'), method='DELETE'))
                told = [f'deleted|laptop|bob|laptop: {said}'] * bool(said)
                self.wait_until(lambda told=told: [
                    line for line in self.told() if 'overdue' not in line] == told, said)
                events.stop(PATIENCE)   # which logs at once what was deleted in the last minute
                self.assertIn(f'laptop: {deletes} snapshots deleted, by {bob} ({deletes})', self.log)
                self.heard.write_text('')

    def test_deletes_of_snapshots_are_a_line_a_minute(self):
        events = self.events('')
        with mock.patch.object(time, 'monotonic', lambda: clock):
            clock = 1000.0
            for repository in ('/a', '/a', '/b'):
                events.emit(restic_serve.FORGOTTEN, repository, '::1', '', [9, False])
                self.assertEqual(events.log_forgotten(), 60)
            clock += 60
            self.assertEqual(events.log_forgotten(), math.inf)
        self.assertEqual(self.log[-2:], ['a: 2 snapshots deleted, by ::1 (2)',
                                         'b: 1 snapshot deleted, by ::1 (1)'])

    def age(self, repository, hours):
        """Let the snapshots of a repository be so old."""
        for path in (self.root / repository / 'snapshots').iterdir():
            os.utime(path, (time.time() - hours * 3600,) * 2)

    def test_a_repository_is_overdue_once_and_back_once(self):
        self.fill('/late', 'snapshots', age=7200)
        self.fill('/never', 'keys')
        self.fill('/fresh', 'snapshots')
        events = self.events()
        self.assertEqual(self.look(events), ['overdue|never||never: overdue, no snapshot yet',
                                             'overdue|late||late: overdue, last snapshot 2 hours ago'])
        self.assertEqual(self.look(events), [])
        self.assertEqual(self.look(), [])       # another start
        old = self.events()                     # another server, which has counted before
        self.fill('/late', 'snapshots')
        self.assertEqual(self.look(), ['back|late||late: no longer overdue'])
        self.assertEqual([self.look(old), self.look(), self.look(old)], [[], [], []])
        self.age('late', 1.5)
        self.assertEqual(self.look(), [])       # that snapshot is older than the one that was seen
        (self.root / '.restic_serve/events.json').write_text('{"back": {"/late": 3e9}}')
        self.assertEqual(len(self.look()), 2)   # at a time that is yet to come
        self.fill('/late', 'snapshots', age=-3600)
        with mock.patch.object(time, 'time', return_value=time.time() + 9000):
            self.assertEqual([line.partition('|')[0] for line in self.look()], ['overdue', 'overdue'])
        shutil.rmtree(self.root / 'late')
        shutil.rmtree(self.root / 'never')
        self.assertEqual(self.look(), [])
        self.assertNotIn('late', (self.root / '.restic_serve' / 'events.json').read_text())

    def test_a_new_repository_is_not_overdue_at_once(self):
        self.fill('/new', 'keys')
        (self.root / 'new' / 'config').write_bytes(b'config')
        self.assertEqual(self.look(), [])
        os.utime(self.root / 'new' / 'config', (time.time() - 7200,) * 2)
        self.assertEqual(self.look(), ['overdue|new||new: overdue, no snapshot yet'])

    def test_a_repository_made_since_the_count_has_its_snapshot(self):
        events = self.events()
        self.fill('/new')
        self.put_object('/new', 'snapshots', b'snapshot', self.usage)
        self.assertEqual(self.look(events), [])
        self.assertGreater(self.usage.holdings()['/new'].last_snapshot, time.time() - 60)

    def test_damage_is_told_and_more_of_it(self):
        self.fill('/nas', 'data', 'data', 'snapshots')
        paths = list((self.root / 'nas' / 'data').glob('*/*'))
        whole = paths[0].read_bytes()
        paths[0].write_bytes(b'damaged')
        self.scrub()
        self.assertEqual(self.look(), [
            f'damaged|nas||nas: 1 object damaged: data/{paths[0].name[:2]}/{paths[0].name}'])
        self.assertIn('; next: copy the damaged files ', self.heard.read_text())
        self.scrub()
        self.assertEqual(self.look(), [])
        paths[1].write_bytes(b'damaged')
        self.scrub()
        self.assertEqual([line[:27] for line in self.look()], ['damaged|nas||nas: 2 objects'])
        paths[0].write_bytes(whole)
        self.scrub()
        self.assertEqual([line[:26] for line in self.look()], ['damaged|nas||nas: 1 object'])
        for path in paths:
            path.unlink()
        self.scrub()
        self.assertEqual(self.look(), [])
        self.fill('/nas', 'data')
        next((self.root / 'nas' / 'data').glob('*/*')).write_bytes(b'damaged')
        self.scrub()
        self.assertEqual(len(self.look()), 1)

    def test_what_nobody_can_look_at_is_told_once_and_the_next_time(self):
        self.fill('/nas', 'data', 'snapshots')
        self.scrub()
        (self.root / 'nas' / 'index').rmdir()
        for _ in range(2):
            (self.root / 'nas' / 'index').touch()
            self.assertEqual(self.look(), ['unreadable|nas||nas: cannot be read completely'])
            self.assertEqual(self.look(), [])
            (self.root / 'nas' / 'index').unlink()
            self.assertEqual(self.look(), [])
        (self.root / 'nas').rename(self.folder / 'away')
        (self.root / 'nas').mkdir()
        self.assertEqual(self.look(), ['unreadable|nas||nas: not a repository any more'])

    def test_full_quotas_and_disks_are_told(self):
        self.fill('/alice', 'snapshots', *['data'] * 20)
        self.quotas = {'/alice': 1 << 30}
        self.events()
        held = self.usage.quota('alice').held
        self.quotas = {'/alice': held * 100 // 95}
        sizes = ' of '.join(map(restic_serve.format_size, (held, held * 100 // 95)))
        self.assertEqual(self.look(), [f'full|alice||quota of /alice is 95 % used: {sizes}'])
        self.assertEqual(self.look(), [])
        self.quotas = {'/alice': held * 100 // 88}
        self.assertEqual(self.look(), [])
        self.assertIn('/alice', self.reported('full'))      # 88 % is too near to 90 %
        self.quotas = {'/alice': held * 2}
        with mock.patch.object(shutil, 'disk_usage', lambda path: mock.Mock(total=0, free=0)):
            self.assertEqual(self.look(), [])
        with mock.patch.object(shutil, 'disk_usage', lambda path: mock.Mock(total=100 << 30, free=5 << 30)):
            self.assertEqual(self.look(), ['full|||disk is 95 % used: 95.0 GiB of 100.0 GiB'])
        self.assertEqual(self.reported('full'), [''])

    def reported(self, kind):
        return list(json.loads((self.root / '.restic_serve' / 'events.json').read_text())[kind])

    def test_the_end_of_the_certificate_is_told_three_times(self):
        events, now = self.events(), time.time()
        events._watch.certificate_end = lambda: now + 22 * 86400
        for days, said in ((0, ''), (2, 'ends in 20 days'), (3, ''), (16, 'ends in 6 days'),
                           (23, 'has expired'), (24, '')):
            with mock.patch.object(time, 'time', return_value=now + days * 86400):
                self.assertEqual([line.partition(' certificate ')[2] for line in self.look(events)],
                                 [said] * bool(said))

    def test_a_directory_that_goes_is_told_and_its_return(self):
        self.fill('/laptop', 'snapshots')
        events = self.events()
        self.assertEqual(self.look(events), [])
        self.root.rename(self.folder / 'away')
        self.root.mkdir()
        self.assertEqual(self.look(events), [])
        self.assertEqual(self.look(events), [])
        self.root.rmdir()
        (self.folder / 'away').rename(self.root)
        self.look(events)
        events.start()
        self.wait_until(lambda: len(self.told()) == 2, 'both events')
        self.assertEqual(self.told(), [f'gone|||{self.root} is gone (disk unmounted?)',
                                       f'back|||{self.root} is back'])

    def test_no_name_is_a_command(self):
        wild = '$(touch x);`touch x`"\'|& touch x'
        self.fill(f'/{wild}', 'keys')
        self.assertEqual(self.look(), [f'overdue|{wild}||{wild}: overdue, no snapshot yet'])
        self.assertFalse(Path('x').exists())
        self.started().emit('snapshot', '/a', 'two\nlines')
        self.wait_until(lambda: self.told()[1:] == ['snapshot|a||two\\nlines'], 'one line')

    def test_refused_deletes_drown_nothing(self):
        self.fill('/laptop', 'snapshots')
        go_on = self.folder / 'go on'
        events = self.started(f'until [ -e "{go_on}" ]; do sleep 0.05; done; {self.TELL}{self.heard}')
        snapshot = next((self.root / 'laptop' / 'snapshots').iterdir()).name
        for name in (named(b'none'), snapshot, snapshot):
            events.on_refused_delete(Location('/laptop', 'snapshots', name), 'eve', 'eve', 'append')
        for number in range(1000):
            events.emit('snapshot', '/laptop', f'number {number}')
        events.emit('snapshot', '/nas', 'of another')
        events.emit('deleted', '/laptop', 'what matters')
        go_on.touch()
        self.wait_until(lambda: 'snapshot|nas||of another' in self.told(), 'that of another')
        self.assertIn('deleted|laptop||what matters', self.told())
        self.assertLess(len(self.told()), 7)
        self.assertGreater(sum('too many events' in line for line in self.log), 450)

    def test_a_message_that_was_cut_off_ends_nothing(self):
        events = self.served()
        for message in (b'["snapshot", "/a', b'7', b'[7]'):
            events.channel.send(message)
        events.emit('snapshot', '/a', 'x' * 70000)
        events.emit('snapshot', '/a', 'next')
        self.wait_until(lambda: self.told() == ['snapshot|a||next'], 'the next one')
        self.assertEqual(sum('an event was lost: ' in line for line in self.log), 4)

    def test_a_command_that_fails_is_a_line_in_the_log(self):
        for command, said in (('exit 0', 'ran the command for "what happened"'), (
                'echo first; echo no mail today >&2; exit 3',
                'command failed for "what happened": status 3: no mail today')):
            self.started(command).emit('snapshot', '/a', 'what happened')
            self.wait_until(lambda line=f'--on-event: {said}': line in self.log, said)

    def test_a_command_can_be_tried(self):
        for command, status, output in (
                (f'{self.TELL}{self.heard}', 0, '--on-event: status 0\n'),
                ('echo no mail; exit 3', 3, 'no mail\n--on-event: status 3: no mail\n'),
                ('kill -9 $$', 137, '--on-event: status 137\n')):
            self.assertEqual(self.run_it('--test-event', '--on-event', command, self.root),
                             (status, output, ''))
        self.assertEqual(self.told(), ['test|||a test of --on-event'])

    def test_a_command_that_hangs_or_writes_much_costs_neither_time_nor_room(self):
        def run(command, seconds=restic_serve.COMMAND_SECONDS):
            with mock.patch.multiple(restic_serve, COMMAND_SECONDS=seconds):
                return restic_serve.run_command(command, restic_serve.Event('x', None, '', '', None), '',
                                                threading.Event())[1]

        self.assertRegex(run('/nonexistent/program'), '^status 127: ')
        self.assertEqual(run('sleep 1000 & sleep 1000', 0.1), 'killed after 0.1 s')
        with mock.patch.object(tempfile, 'tempdir', '/nonexistent'):
            self.assertEqual(run('yes | head -c 30000000; echo last; exit 1'), 'status 1: last')
        self.assertLess(len(run('printf "%0200000d" 7; exit 1')), 300)
        begin = time.monotonic()
        self.assertEqual(run('sleep 1000 & exit 2'), 'status 2')
        self.assertEqual(run('exec >&- 2>&-; sleep 0.2; exit 3'), 'status 3')
        self.assertEqual(run('exit 0'), '')
        self.assertLess(time.monotonic() - begin, PATIENCE)

    def test_what_the_end_cuts_short_is_told_by_the_next_start(self):
        self.fill('/never', 'keys')
        started = self.folder / 'started'
        events = self.served(f'touch {started}; sleep 1000')
        self.wait_until(started.exists, 'the command')
        events.emit('snapshot', '/a', 'another')
        begin = time.monotonic()
        events.stop(0.1)
        self.assertLess(time.monotonic() - begin, PATIENCE)
        self.assertIn('--on-event: 1 event lost, the server is stopping', self.log)
        self.assertIn('killed, the server is stopping', self.log[-1])
        self.assertEqual(self.look(), ['overdue|never||never: overdue, no snapshot yet'])

    def test_it_knows_nothing_of_the_options_in_the_environment(self):
        with mock.patch.dict(os.environ, {'RESTIC_SERVE_PASS': 'secret', 'RESTIC_SERVE_TEST_X': '1'}):
            self.started(f'env > {self.heard}').emit('overdue', '', 'x', 'bob')
            self.wait_until(lambda: '--on-event: ran the command for "x"' in self.log, 'its end')
        self.assertNotIn('secret', self.heard.read_text())
        told = dict(line.partition('=')[::2] for line in self.told())
        self.assertEqual((told['RESTIC_SERVE_EVENT'], told['RESTIC_SERVE_REPOSITORY'],
                          told['RESTIC_SERVE_USER'], told['RESTIC_SERVE_DIRECTORY']),
                         ('overdue', '/', 'bob', str(self.root)))
        self.assertRegex(told['RESTIC_SERVE_TIME'], r'^\d{4}-\d\d-\d\dT[\d:]{8}[+-]\d\d:\d\d$')
        error = self.run_it('--report', self.root, RESTIC_SERVE_EVENT='overdue', RESTIC_SERVE_USER='bob')[2]
        self.assertEqual(error, f'restic_serve: no repository in {self.root}\n')

    def test_what_cannot_be_remembered_is_told_once_all_the_same(self):
        self.fill('/never', 'keys')
        (self.root / '.restic_serve').mkdir(exist_ok=True)
        path = self.root / '.restic_serve' / 'events.json'
        for text in ('[7', '[]', '{"overdue": 7}', '{"overdue": {"/never": NaN}}', '7' * 400, '[' * 100000,
                     '{"overdue": {"/never": "x"}}', '{"overdue": {"/never": ' + '7' * 400 + '}}'):
            path.write_text(text)
            self.assertEqual(len(self.look()), 1, text)
            self.assertIn('cannot read events.json', ' '.join(self.log))
            self.log.clear()
        path.unlink()
        events = self.events()
        with mock.patch.object(restic_serve.Folders, 'write_hidden', side_effect=OSError(30, 'read-only')):
            self.assertEqual([len(self.look(events)), self.look(events)], [1, []])
        self.assertFalse(path.exists())
        self.fill('/other', 'keys')     # the disk has room again: what was told meanwhile is saved, too
        self.usage.census.count()
        self.assertEqual(self.look(events), ['overdue|other||other: overdue, no snapshot yet'])
        self.assertEqual(set(json.loads(path.read_text())['overdue']), {'/never', '/other'})
        shutil.rmtree(self.root / 'other')
        path.write_text('{}')
        self.store.directory.read_only = True
        events = self.events()
        self.assertEqual([len(self.look(events)), self.look(events)], [1, []])
        self.assertEqual(path.read_text(), '{}')

    def test_all_workers_tell_once_and_so_does_the_next_start(self):
        self.make_repository('laptop')
        self.fill('/never', 'keys')
        words = ('--addr', '127.0.0.1:0', '--workers', '3', '--on-event', f'{self.TELL}{self.heard}',
                 self.root)
        with Program(*words) as server:
            for number in range(12):
                upload = post(f'/laptop/snapshots/{named(b"%d" % number)}', b'%d' % number)
                self.assertEqual(self.ask(upload, port=server.port)[0], 200)
            self.wait_until(lambda: len(self.told()) >= 13, 'all events')
            self.assertEqual(server.stop(), 0)
        self.assertEqual(sorted(line.partition('|')[0] for line in self.told()),
                         ['overdue'] + ['snapshot'] * 12)
        with Program(*words, '-vv') as server:
            self.wait_for_line(server, 'counted all')
            self.ask(post(f'/laptop/snapshots/{named(b"last")}', b'last'), port=server.port)
            self.wait_until(lambda: len(self.told()) >= 14, 'the last event')
            self.assertEqual(server.stop(), 0)
        self.assertEqual(len(self.told()), 14)

    def test_as_the_first_process_of_a_container_it_leaves_no_dead_ones(self):
        words = program('unshare'), '--user', '--map-root-user', '--pid', '--fork', '--kill-child'
        if subprocess.run([*words, 'true'], stderr=subprocess.DEVNULL).returncode:
            self.skipTest('no process may have a PID namespace')
        self.make_repository('laptop')
        server = self.run_server('--workers', '1', '--on-event', f'(sleep 0.1; echo >> {self.heard}) &',
                                 self.root, before=words)
        self.ask(post(f'/laptop/snapshots/{named(b"x")}', b'x'), port=server.port)
        self.wait_until(self.heard.exists, 'what the command has left running')
        states = program('ps'), '-o', 'stat=', '--ppid', str(self.children(server)[0])
        self.wait_until(lambda: re.fullmatch(r'S\S*\n', subprocess.run(
            states, capture_output=True, text=True).stdout), 'its worker alone')


# ---- Page ------------------------------------------------------------------------------------------

class PageTest(WatchedTestCase):
    HTML = 'Accept: text/html,application/xhtml+xml'

    def look(self, path='/', *fields):
        status, head, content = self.ask(get(path, self.HTML, *fields))
        self.assertEqual(status, 200)
        return head, content.decode()

    def names(self, *args):
        """The repositories on the page, in their order."""
        import html
        return [html.unescape(name) for name in
                re.findall(r'class="name"><a href="[^"]*">([^<]*)</a>', self.look(*args)[1])]

    def rows(self, *args):
        """The rows of the page by repository."""
        return dict(zip(self.names(*args), re.findall('<tr(?: class=late)?><th scope="row".*?</tr>',
                                                      self.look(*args)[1])))

    def test_what_it_shows(self):
        self.fill('/late', 'data', 'snapshots', age=2 * 86400 + 3700)
        self.fill('/fresh', 'data', 'snapshots', 'snapshots', 'locks', age=600)
        self.fill('/none', 'data')
        self.scrub()
        self.watch(max_bytes=1000, per_user=800)
        text = self.look()[1]
        self.assertEqual(self.names(), ['none', 'late', 'fresh'])
        rows = self.rows()
        self.assertIn('⚠ overdue for 2 days', rows['late'])
        self.assertIn('⚠ overdue: no snapshot yet', rows['none'])
        self.assertNotIn('overdue', rows['fresh'])
        for said in ('10 minutes ago', '<td class="n more">2</td><td class="n">400 B</td>',
                     '<td class="locks more">1<small>oldest 10 minutes', '<td class="scrub more">sound<',
                     'days with a snapshot: 1<', '<path class="area" d="M89 24L89 0.0V24z"/>',
                     '<small class=less>1 lock<'):
            self.assertIn(said, rows['fresh'])
        self.assertRegex(rows['fresh'], r'<time datetime="\d{4}-\d\d-\d\dT[\d:]{8}[+-]\d\d:\d\d">')
        for said in ('3 repositories, 700 B, <span class="bad">⚠ 2 overdue<', '700 B of 1.0 KiB',
                     f'<title>{socket.gethostname()}: 2 overdue<', '<span>/fresh/</span>'):
            self.assertIn(said, text)
        self.assertRegex(text, r'; \S+ \w+ of \S+ \w+ free<')

    def test_a_repository_has_a_page_of_its_own(self):
        self.fill('/laptop', 'data', 'snapshots', 'snapshots', 'locks', age=600)
        self.fill('/laptop', 'data', age=300)
        self.fill('/laptop/vm', 'snapshots')
        path = next((self.root / 'laptop' / 'data').glob('*/*'))
        path.write_bytes(b'damaged')
        self.scrub()
        self.watch(max_bytes=1000)
        self.assertEqual(self.names('/laptop/'), ['laptop/vm'])
        text = self.look('/laptop/')[1]
        name = re.search('data/../([0-9a-f]{64})', text)
        self.assertEqual(name and name[1], path.name)
        for said in ('<code>rest:http://x/laptop/</code>', '1 object damaged',
                     '<h1>laptop</h1>', '<dd>write</dd>', '<dt>Locks</dt><dd>1<small>since ', ' B of 1000 B',
                     '2 packs, 0 keys, 1 lock, 2 snapshots, 0 indexes', '<h2>Below laptop</h2>',
                     '<h2>Snapshots</h2>', ', run restic -r rest:http://x/laptop/ repair index, '):
            self.assertIn(said, text.replace('1.0 KiB', '1000 B'))
        snapshots = re.findall(r'<td>([0-9a-f]{8})</td><td class="n">([^<]*)<', text)
        self.assertEqual(sorted(name for name, _ in snapshots), sorted(
            path.name[:8] for path in (self.root / 'laptop' / 'snapshots').iterdir()))
        self.assertNotIn('Kept deleted objects', text)
        self.watch()
        with mock.patch.object(restic_serve, 'LOOK_AT_MOST', -1):
            self.assertIn('<td class="n">unknown<', self.look('/laptop/')[1])

    def test_what_came_with_each_snapshot(self):
        now = time.time()
        for kind, size, age in (('keys', 5, 9000), ('data', 100, 8000), ('snapshots', 10, 7000),
                                ('data', 200, 6000), ('index', 20, 5500), ('snapshots', 11, 5000),
                                ('data', 999, 100)):
            os.utime(path_of(self.store, self.put_object('/a', kind, os.urandom(size))), (now - age,) * 2)
        watch = restic_serve.Watch(self.store, self.usage, 3600)
        self.assertEqual([(round(now - snapshot.time), snapshot.added) for snapshot in watch.snapshots('/a')],
                         [(7000, 115), (5000, 231)])
        self.assertEqual(watch.snapshots('/none'), [])
        shutil.rmtree(self.root / 'a' / 'index')
        (self.root / 'a' / 'index').write_text('')      # it cannot be read
        self.assertEqual([snapshot.added for snapshot in watch.snapshots('/a')], [None, None])

    def test_what_was_deleted_is_kept_and_can_be_read(self):
        self.fill('/laptop', 'data', 'snapshots', 'snapshots')
        self.watch(past=restic_serve.Past(self.store, 86400))
        self.usage.purge(math.inf)
        snapshot = next((self.root / 'laptop' / 'snapshots').iterdir()).name
        self.assertIn('<dd>nothing<', self.look('/laptop/')[1])
        self.assertEqual(self.ask(get(f'/laptop/snapshots/{snapshot}', method='DELETE'))[0], 200)
        self.wait_until(lambda: '100 B in 1 object,' in self.look('/laptop/')[1], 'the count')
        self.assertRegex(self.look('/laptop/')[1], r'<code>rest:http://x/laptop/.at/'
                         r'\d{4}-\d\d-\d\dT[\d:]{8}Z/</code>')

    def test_the_address_is_the_one_that_the_browser_has_used(self):
        self.fill('/a b', 'snapshots')
        self.watch()
        for fields, address in (((), 'http://h:1'), (('X-Forwarded-Proto: https',), 'https://h:1'),
                                (('X-Forwarded-Proto: ftp',), 'http://h:1')):
            text = self.ask(f'GET /a%20b/ HTTP/1.1\r\nHost: h:1\r\n{self.HTML}\r\n'
                            f'{"".join(f"{field}{chr(13)}{chr(10)}" for field in fields)}\r\n'.encode())[2]
            self.assertIn(f'<code>rest:{address}/a%20b/</code>', text.decode())

    def test_hundreds_are_folded_and_may_be_sorted(self):
        for number in range(11):
            self.fill(f'/north/host-{number}', 'snapshots')
            self.fill(f'/south/host-{number}', 'snapshots', 'keys', age=50 * number)
        for name in ('/alone', '/lonely', '/north/late'):
            self.fill(name, 'snapshots', age=7200 * (name == '/north/late'))
        self.fill('/new')
        (self.root / 'new' / 'config').write_bytes(b'config')
        self.watch()
        text = self.look()[1]
        folded = re.findall('<details><summary><b>([^<]*)</b>', text)
        self.assertEqual(folded, ['north/', 'south/', '3 repositories'])
        self.assertEqual(text.count(', oldest last snapshot '), 3)
        self.assertNotIn(' days ago', text)     # of one that has none yet
        self.assertEqual(self.names()[:4], ['north/late', 'north/host-0', 'north/host-1', 'north/host-2'])
        self.assertEqual(len(self.names()), 26)
        self.assertEqual(self.names('/?sort=name')[:3], ['north/late', 'alone', 'lonely'])
        self.assertEqual(self.names('/?sort=age')[:4], ['north/late', 'new', 'south/host-10', 'south/host-9'])
        self.assertEqual(self.names('/?sort=size')[:3], ['north/late', 'south/host-0', 'south/host-1'])
        self.assertNotIn('<details', self.look('/?sort=size')[1])
        self.assertNotIn('<details', self.look('/north/')[1])
        self.assertEqual(self.names('/?q=LON'), ['alone', 'lonely'])
        self.assertEqual([path for path in ('/', '/north/', '/?q=x%22') if '<form' in self.look(path)[1]],
                         ['/', '/?q=x%22'])
        self.assertIn('No repository has “x&quot;” in its name', self.look('/?q=x%22')[1])

    def test_a_directory_that_is_gone_is_the_headline(self):
        self.fill('/laptop', 'snapshots')
        self.watch()
        self.assertEqual(self.names(), ['laptop'])
        self.root.rename(self.folder / 'away')
        self.server.api.store.directory._next_probe = 0
        patch_for(self, restic_serve.Watch, certificate_end=staticmethod(lambda: time.time() - 1))
        for path in ('/', '/laptop/'):
            text = self.look(path)[1]
            self.assertIn('⚠ the TLS certificate has expired', text)
            self.assertIn(f'<title>{socket.gethostname()}: the directory is gone</title>', text)
            self.assertIn('⚠ the directory is gone', text)
        (self.folder / 'away').rename(self.root)

    def test_the_disk_and_quotas_above_are_not_for_everybody(self):
        self.fill('/bob/pc', 'snapshots')
        self.watch(Policy(restic_serve.parse_rights('bob / write\njoe /bob/pc read\neve /bob metrics')),
                   self.users('bob', 'joe', 'eve'), per_user=100)
        pages = {user: self.look('/bob/pc/', basic(user, user))[1] for user in ('bob', 'joe', 'eve')}
        self.assertEqual(['nearly full' in pages[user] for user in ('bob', 'joe', 'eve')],
                         [True, False, True])
        self.assertEqual([' free' in self.look('/', basic(user, user))[1] for user in ('bob', 'joe')],
                         [True, False])
        snapshot = next((self.root / 'bob' / 'pc' / 'snapshots').iterdir()).name[:8]
        self.assertEqual([f'<td>{snapshot}</td>' in pages[user] for user in ('joe', 'eve')], [True, False])
        self.assertEqual(['<code>rest:' in pages[user] for user in ('joe', 'eve')], [True, False])
        self.assertIn('write: bob; read: joe; metrics: eve<', pages['bob'])

    def test_others_and_the_owner_are_among_the_rights(self):
        policy = Policy(restic_serve.parse_rights('* /pub write\nbob /pub read\n* /%u append'))
        self.assertEqual(policy.who_may('/pub/x', []), {'write': ['pub', 'anyone else'], 'read': ['bob']})
        self.assertEqual(policy.who_may('/alice/lap', []), {'append': ['alice']})

    def test_times_and_names_that_nobody_can_have_are_shown_all_the_same(self):
        self.fill('/late', 'snapshots', age=time.time() - (1 << 30))
        for name in (b'latin-\xe9', b'two\nlines'):
            (self.root / os.fsdecode(name) / 'keys').mkdir(parents=True)
            (self.root / os.fsdecode(name) / 'config').write_bytes(b'config')
        self.watch()
        text = self.look('/')[1]
        self.assertIn('<th scope="row" class="name">two\nlines', text)
        self.assertIn('<th scope="row" class="name">latin-\\udce9', text)
        with mock.patch.object(restic_serve, 'LATEST_TIME', 1 << 29):
            self.assertIn('1987-01-05', self.look('/late/')[1])

    def test_the_icon_needs_no_login(self):
        self.watch(accounts=self.users('root'))
        status, head, content = self.ask(get('/favicon.ico'))
        self.assertEqual((status, head['content-type'], content[:5]), (200, 'image/svg+xml', b'<svg '))

    def test_it_is_one_page_without_scripts_that_refers_to_nothing_and_may_do_nothing(self):
        self.fill('/<script>alert(1)</script>"\'', 'data', 'snapshots')
        self.watch()
        head, text = self.look()
        style = re.search('<style>(.*)</style>', text, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
        self.assertEqual(head['content-security-policy'], f"default-src 'none'; style-src 'sha256-{digest}'; "
                         "base-uri 'none'; form-action 'self'; frame-ancestors 'none'")
        self.assertEqual((head['x-content-type-options'], head['referrer-policy'], head['cache-control']),
                         ('nosniff', 'no-referrer', 'no-store'))
        self.assertEqual(head['content-type'], 'text/html; charset=utf-8')
        for path in ('/', '/%3Cscript%3Ealert(1)%3C/script%3E%22\'/'):
            self.assertNotRegex(self.look(path)[1], r'<script|<link|<img|<form|\bsrc=|\burl\(|@import|style=|'
                                r'\bon\w+=|(?<!rest:http)://|href="(?!/)|href="//')
        self.assertEqual(self.names(), ['<script>alert(1)</script>"\''])
        self.assertEqual(head['refresh'], '60')
        self.assertEqual(self.ask(get('/', self.HTML, method='HEAD'), head_only=True)[1]['content-length'],
                         str(len(self.ask(get('/', self.HTML))[2])))

    def test_it_is_for_browsers_alone(self):
        for fields in ((), ('Accept: */*',), (f'Accept: {V2}',)):
            self.assertEqual(self.ask(get('/', *fields))[0], 404)
        self.assertEqual(self.ask(get('/config', self.HTML))[0], 404)
        self.assertEqual(self.ask(get('/data/', self.HTML))[1]['content-type'],
                         'application/vnd.x.restic.rest.v1')
        self.server.api._page = None
        self.assertEqual(self.ask(get('/', self.HTML))[0], 404)

    def test_users_see_what_they_may_enter_with_their_quota_and_no_other_user(self):
        for name in ('/alice/x', '/alice/y', '/alices', '/bob', ''):
            self.fill(name, 'snapshots')
        self.watch(Policy(short_rights(private=True, administrators=['root'])),
                   self.users('root', 'alice', 'carol'), per_user=1000, max_bytes=5000)
        alice, root, carol = (basic(user, user) for user in ('alice', 'root', 'carol'))
        self.assertEqual(self.ask(get('/', self.HTML))[0], 401)
        self.assertEqual(self.names('/', alice), ['alice/x', 'alice/y'])
        for path, login, quota in (
                ('/', alice, '/alice/'), ('/alice/x/', alice, '/alice/'), ('/', carol, '/carol/')):
            self.assertIn(f'{quota}</span>', self.look(path, login)[1])
        self.assertIn('<dt>Rights</dt><dd>write: alice, root</dd>', self.look('/alice/x/', root)[1])
        self.assertNotIn('<dt>Rights', self.look('/alice/x/', alice)[1])
        self.assertNotRegex(self.look('/', alice)[1], '/bob|>All<')
        self.assertIn('>All<', self.look('/', root)[1])
        self.assertEqual(self.names('/alice/y', alice), [])
        self.assertIn('<h1>alice/y</h1>', self.look('/alice/y', alice)[1])
        self.assertEqual(self.ask(get('/bob/', self.HTML, alice))[0], 403)
        self.assertEqual(self.names('/', root), ['/', 'alice/x', 'alice/y', 'alices', 'bob'])
        self.assertEqual(self.names('/alice/', root), ['alice/x', 'alice/y'])
        self.assertEqual(self.names('/', carol), [])

    def test_a_count_that_is_old_is_waited_for_or_its_age_is_said(self):
        self.fill('/host', 'snapshots')
        self.watch()
        self.assertEqual(self.names(), ['host'])
        self.usage.census._interval = 0.001
        self.fill('/other', 'snapshots')
        self.assertEqual(self.names(), ['host', 'other'])
        with mock.patch.object(restic_serve.Census, 'count', lambda usage: None), \
                mock.patch.object(restic_serve, 'COUNT_PATIENCE', 0.01):
            self.assertRegex(self.look()[1], '; counted .+ ago')

    def test_before_the_first_count_it_looks_again(self):
        go_on = threading.Event()
        self.addCleanup(go_on.set)
        with mock.patch.object(restic_serve.Census, 'count', lambda usage: go_on.wait(PATIENCE)), \
                mock.patch.object(restic_serve, 'COUNT_PATIENCE', 0.05):
            self.watch(prometheus='')
            head, text = self.look()
            self.assertEqual(head['refresh'], '5')
            self.assertIn('Calculating sizes', text)
            go_on.set()

    def test_with_nothing_to_show(self):
        text = self.look()[1]
        self.assertIn('0 repositories', text)
        self.assertNotIn('<table', text)
        url = 'rest:http://x'
        self.assertEqual(re.findall('<pre><code>(.*)</code></pre>', text.replace('</pre>', '</pre>\n')), [
            f'restic -r {url}/laptop/ init', f'restic -r {url}/laptop/ backup ~'])
        self.assertIn(f'restic -r {url}/desk/ init', self.look('/desk/')[1])
        for right, said in (('read', 'cannot access any repository here'), ('append', 'No repositories yet')):
            self.watch(Policy(restic_serve.parse_rights(f'* / {right}', strangers=True)))
            self.assertIn(said, self.look()[1])

    @long
    def test_a_real_browser_takes_its_style(self):
        self.fill('/laptop', 'data', 'snapshots')
        picture = self.folder / 'page.png'
        done = subprocess.run(
            [program('chromium'), '--headless', '--no-sandbox', '--disable-gpu', '--enable-logging=stderr',
             f'--user-data-dir={self.folder}/chromium', f'--screenshot={picture}',
             f'http://127.0.0.1:{self.port}/'], capture_output=True, text=True, timeout=4 * PATIENCE)
        self.assertTrue(picture.stat().st_size, done.stderr)
        self.assertNotIn('Content Security Policy', done.stderr)


# ---- Api -------------------------------------------------------------------------------------------

class ApiTest(ApiTestCase):
    """The table of routes and answers, without a wire."""

    CONTENT = b'0123456789'
    NAME = hashlib.sha256(CONTENT).hexdigest()

    def test_a_repository_is_made_once_and_again(self):
        for path in ('/', '/host', '/host/', '/a/b/c/', '/with%20space/', '/%C3%BC/'):
            self.assertEqual(self.status('POST', f'{path}?create=true'), 200, path)
            self.assertEqual(self.status('POST', f'{path}?create=true'), 200, path)
        self.assertTrue((self.root / 'with space' / 'data').is_dir())
        self.assertTrue((self.root / 'ü' / 'keys').is_dir())

    def test_a_place_is_one_folder_however_its_accents_are_written(self):
        forms = {'caf\u00e9': '/caf%C3%A9/config', 'cafe\u0301': '/cafe%CC%81/config'}
        for there, made_by in itertools.product(('', *forms), forms.values()):
            if there:   # it was made by hand
                (self.root / there / 'keys').mkdir(parents=True)
            self.assertEqual(self.status('POST', made_by.replace('config', '?create=true')), 200)
            self.assertEqual(self.status('POST', made_by, b'config'), 200)
            for path in forms.values():
                self.assertEqual(self.status('GET', path), 200)
            (folder,) = self.root.glob('caf*')
            self.assertEqual(folder.name, there or 'caf\u00e9')
            shutil.rmtree(folder)
        for name in forms:
            (self.root / name / 'keys').mkdir(parents=True)
        self.assertEqual([self.status('POST', path, b'config') for path in forms.values()], [200, 403])
        self.assertIn('another folder has this name in Unicode form NFC', self.log[-1])
        usage = Usage(self.store, Counters(), quotas=restic_serve.Quotas({'/caf\u00e9': 1}))
        self.assertEqual([usage.limited(f'/{name}/x') for name in forms], 2 * [['caf\u00e9']])

    def test_other_requests_for_a_repository(self):
        for method, target, status in (
                ('POST', '/host/', 400), ('POST', '/host/?create=1', 400), ('DELETE', '/host/', 501),
                ('GET', '/host/', 404), ('GET', '/file-123', 404), ('PUT', '/host/', 405),
                ('BREW', '/host/', 501)):
            self.assertEqual(self.status(method, target), status, (method, target))

    def test_objects_of_every_kind(self):
        for kind in restic_serve.KINDS:
            path = f'/host/{kind}/{self.NAME}'
            for method, body, status in (
                    ('GET', b'', 404), ('HEAD', b'', 404), ('POST', self.CONTENT, 200), ('HEAD', b'', 200),
                    ('POST', self.CONTENT, 200), ('POST', b'other', 400), ('GET', b'', 200),
                    ('DELETE', b'', 200), ('DELETE', b'', 200), ('GET', b'', 404)):
                before = descriptors()
                got = self.ask(method, path, body)
                self.assertEqual(got[0], status, (kind, method))
                self.assertLessEqual(descriptors(), before)
                if (method, status) == ('GET', 200):
                    self.assertEqual(got[2], self.CONTENT)

    def test_config(self):
        for method, body, status in (
                ('GET', b'', 404), ('POST', b'one', 200), ('POST', b'one', 200), ('POST', b'two', 403),
                ('GET', b'one', 200), ('DELETE', b'', 200), ('DELETE', b'', 200), ('POST', b'', 400)):
            got = self.ask(method, '/host/config', body)
            self.assertEqual(got[0], status, (method, body))
            if (method, status) == ('GET', 200):
                self.assertEqual(got[2], body)

    def test_whatever_the_file_layer_refuses_has_a_status(self):
        self.assertEqual(set(restic_serve._STATUS_OF_ERROR), set(restic_serve.StorageError.__subclasses__()))
        with mock.patch.object(Store, 'open', side_effect=restic_serve.Busy('wait', 7)):
            status, headers, content = self.ask('GET', '/host/config')
        self.assertEqual((status, headers['Retry-After'], content), (503, '7', b'wait\n'))

    def test_a_list_that_cannot_be_read_is_no_404_which_restic_takes_for_an_empty_one(self):
        keys = self.root / 'host' / 'keys'
        for make, status in ((os.mkfifo, 403), (lambda path: path.symlink_to('missing'), 500)):
            keys.rmdir()
            make(keys)
            self.assertEqual(self.status('GET', '/host/keys/'), status)
            self.assertIn('GET /host/keys/', self.log[-1])
            keys.unlink()
            keys.mkdir()

    def test_caches_keep_only_what_never_changes(self):
        self.make_repository('host')
        for kind in ('config', f'data/{self.NAME}', f'locks/{self.NAME}'):
            self.ask('POST', f'/host/{kind}', self.CONTENT)
        for target, kept in (('/host/config', False), (f'/host/locks/{self.NAME}', False), ('/host/x', False),
                             ('/host/data/', False), (f'/host/data/{self.NAME}', True)):
            got = self.ask('GET', target)[1].get('Cache-Control')
            self.assertEqual(got, None if kept else 'no-store', target)
        self.assertEqual(self.status('OPTIONS', '*'), 200)  # what haproxy asks of itself
        self.assertEqual(self.status('OPTIONS', '/host/config'), 405)

    def test_deep_paths_and_long_names_are_refused(self):
        self.assertEqual(self.status('GET', f'/{"x" * 300}/config'), 400)
        self.assertEqual(self.status('POST', f'/{"x" * 300}/?create=true'), 400)
        self.assertEqual(self.status('POST', f'{"/a" * 64}/?create=true'), 200)
        self.assertEqual(self.status('POST', f'{"/a" * 65}/?create=true'), 400)
        self.assertEqual(self.status('GET', f'{"/a" * 2000}/config'), 400)

    def test_append_only_lets_a_damaged_object_be_mended(self):
        path = f'/host/data/{self.NAME}'
        self.ask('POST', path, self.CONTENT)
        file = self.root / 'host' / 'data' / self.NAME[:2] / self.NAME
        file.write_bytes(b'')
        self.api.policy.rights = short_rights(append_only=True)
        self.assertEqual(self.status('POST', path, self.CONTENT), 200)
        self.assertEqual(file.read_bytes(), self.CONTENT)

    def test_ranges(self):
        path = f'/host/data/{self.NAME}'
        self.ask('POST', path, self.CONTENT)
        for value, status, content, field in (
                ('bytes=0-', 206, b'0123456789', 'bytes 0-9/10'), ('bytes=2-4', 206, b'234', 'bytes 2-4/10'),
                ('bytes=0-9223372036854775807', 206, b'0123456789', 'bytes 0-9/10'),
                ('bytes=10-', 416, None, 'bytes */10'), ('nonsense', 200, self.CONTENT, None),
                ('bytes=9223372036854775807-', 416, None, 'bytes */10'),
                ('bytes=0-1,3-4', 200, self.CONTENT, None)):
            answer = self.ask('GET', path, range=value)
            self.assertEqual(answer[0], status, value)
            self.assertEqual(answer[1].get('Content-Range'), field)
            if content is not None:
                self.assertEqual(answer[2], content)
        # RFC 9110 13.1.5 and 14.2
        self.assertEqual(self.status('GET', path, range='bytes=1-2', if_range='"x"'), 200)
        self.assertEqual(self.status('HEAD', path, range='bytes=1-2'), 200)

    def test_lists(self):
        for kind in restic_serve.KINDS:
            target = f'/host/{kind}/'
            for accept, kind_of in ((V2, V2), ('', 'application/vnd.x.restic.rest.v1')):
                status, headers, content = self.ask('GET', target, accept=accept)
                self.assertEqual((status, json.loads(content)), (200, []))
                self.assertEqual(headers['Content-Type'], kind_of)
            self.ask('POST', target + self.NAME, self.CONTENT)
            self.assertEqual(json.loads(self.ask('GET', target, accept=V2)[2]),
                             [{'name': self.NAME, 'size': 10}])
            self.assertEqual(json.loads(self.ask('GET', target)[2]), [self.NAME])
            self.assertEqual(self.status('HEAD', target), 200)
            for method in ('POST', 'DELETE', 'PUT'):
                status, headers, _ = self.ask(method, target)
                self.assertEqual((status, headers['Allow']), (405, 'GET, HEAD'))

    def test_a_long_list_is_valid_json_however_it_is_cut(self):
        for count in (0, 1, 2, 169, 170, 171, 172, 341, 1000):
            names, sizes = [f'{number:064x}' for number in range(count)], list(range(count))
            batches = [([], []), *((names[at:at + 7], sizes[at:at + 7]) for at in range(0, count, 7))]
            text = b''.join(self.chunks(batches, True))
            self.assertEqual(json.loads(text), [{'name': n, 'size': s} for n, s in zip(names, sizes)])
            self.assertEqual(json.loads(b''.join(self.chunks(batches, False))), names)

    def chunks(self, batches, sizes):
        """What is sent of a list."""
        first, *chunks = restic_serve.json_list((batch for batch in batches), sizes)
        self.assertEqual(first, chunks[0])
        return chunks

    def test_a_list_is_read_as_it_is_sent(self):
        read = 0

        def objects():
            nonlocal read
            for number in range(100_000):
                read += 1
                yield [f'{number:064x}'], [1]

        with mock.patch.object(self.store, 'objects', lambda location, sizes: objects()):
            response = self.api.handle(Request('GET', '/data/', 'HTTP/1.1', {'accept': V2},
                                               Bytes(b''), Peer('test')))
            next(response.body)
        self.assertLess(read, 1000)

    def test_every_other_path_is_404(self):
        for path in ('/host/data', '/host/data/ab', f'/host/data/{self.NAME}/', '/host/config/',
                     f'/host/data/{self.NAME.upper()}', f'/host/data/{self.NAME}0', '/host/keys/x/',
                     f'/host/data/{self.NAME[:2]}/{self.NAME}', f'/host/other/{self.NAME}',
                     '/host/data/x/config', f'/{restic_serve.HIDDEN}/config', '/data/host/config',
                     f'/{restic_serve.HIDDEN}/deleted/data/', '/config/config'):
            for method in ('GET', 'HEAD'):
                self.assertEqual(self.status(method, path), 404, (method, path))

    def test_paths_that_are_none_never_reach_the_file_system(self):
        events = []
        listening = [True]

        def hook(event, args):
            if listening and event in ('open', 'os.scandir', 'os.mkdir', 'os.listdir', 'os.remove'):
                events.append((event, args[0]))

        sys.addaudithook(hook)
        try:
            for path in ('/.', '/..', '/../etc/config', '/a/../../config', '//', '/a//config',
                         '/a/./config', '/%2e%2e/config', '/a/%2E%2E/config', '/%2e/config',
                         '/a%00b/config', '/a%2fb/config', '/a%2F..%2Fb/config', '/a%0ab/config',
                         '/%ff/config', '/%c0%ae%c0%ae/config', '/%zz/config', '/%', '/%2/config',
                         '/a/..', '/data/..', f'/../data/{self.NAME}', '//config', f'//data/{self.NAME}',
                         'config', '*', '/a/../data/', f'/data/../data/{self.NAME}'):
                for method in ('GET', 'HEAD', 'POST', 'DELETE'):
                    self.assertEqual(self.status(method, path), 400, (method, path))
        finally:
            listening.clear()
        self.assertEqual(events, [])

    def test_backslash_and_colon_are_refused_on_windows_alone(self):
        self.assertEqual(self.status('GET', '/a%5Cb/config'), 404)
        pattern = '[\\x00-\\x1f\\x7f\\\\:]'
        for remembering in (restic_serve.parse_path, restic_serve.check_repository):
            remembering.cache_clear()
            self.addCleanup(remembering.cache_clear)
        with mock.patch.object(restic_serve, '_NO_FILE_NAME', re.compile(pattern)):
            self.assertEqual(self.status('GET', '/a%5Cb/config'), 400)
            self.assertEqual(self.status('GET', '/C:/config'), 400)

    def test_a_base_url_is_the_prefix_of_every_path(self):
        self.api.baseurl = '/backup'
        self.assertEqual(self.status('POST', '/backup/host/?create=true'), 200)
        self.assertEqual(self.status('POST', '/backup?create=true'), 200)
        self.assertEqual(self.status('GET', '/backup/host/data/'), 200)
        for path in ('/host/data/', '/backups/host/data/', '/'):
            self.assertEqual(self.status('GET', path), 404, path)
        self.assertEqual(self.status('GET', '/backup/../config'), 400)
        self.assertEqual(self.status('GET', '/../config'), 400)

    def test_scripts_of_a_web_origin_may_use_the_server(self):
        for origin, vary in (('https://example.org', 'Origin'), ('*', None)):
            self.api = Api(self.store, Policy(short_rights(True)), allow_origin=origin)
            for method, path, status in (('GET', '/config', 404), ('OPTIONS', '/config', 200),
                                         ('GET', '/../config', 400), ('OPTIONS', '/', 200)):
                answer = self.ask(method, path)
                self.assertEqual(answer[0], status)
                self.assertEqual(answer[1]['Access-Control-Allow-Origin'], origin)
                self.assertEqual(answer[1].get('Vary'), vary)
            headers = self.ask('OPTIONS', '/data/', origin=origin)[1]
            self.assertIn('DELETE', headers['Access-Control-Allow-Methods'])
            self.assertIn('Authorization', headers['Access-Control-Allow-Headers'])

    def test_lists_and_pages_of_a_user_are_made_one_at_a_time(self):
        def turns():
            return sum(turn.locked() for turn in self.api._turns)

        def objects(location, sizes):
            for _ in range(3):
                self.assertEqual(turns(), 1)
                yield ['x' * restic_serve.LIST_BYTES], [0]

        with mock.patch.object(self.store, 'objects', objects):
            response = self.api.handle(Request('GET', '/host/data/', 'HTTP/1.1', {}, Bytes(b''), Peer('x')))
            self.assertEqual([turns() for _ in response.body], [0] * 4)     # while a part is sent

    def test_a_repository_at_a_reserved_name_is_explained(self):
        for path in ('/data/', '/host/keys/', '/host/keys/x/', '/lost+found/', '/.restic_serve/x/'):
            self.log.clear()
            self.assertIn(self.ask('POST', f'{path}?create=true')[0], (404, 405))
            self.assertEqual(len(self.log), 1, self.log)
            self.assertIn(f'{path}: reserved name: a repository path cannot contain data', self.log[0])

    def test_of_the_past_of_the_past_there_is_none_however_often_it_is_asked_for(self):
        for count in (1, 2, 300):
            self.assertEqual(self.ask('GET', '/.at/1d' * count + '/config')[0], 404)

    def test_an_answer_that_is_not_sent_closes_its_list(self):
        closed = []

        def objects(location, sizes):
            try:
                for number in range(10):
                    yield [f'{number:064x}'], [1]
            finally:
                closed.append(location.kind)

        with mock.patch.object(restic_serve, 'FIRST_SECONDS', 0), \
                mock.patch.object(self.store, 'objects', objects):
            response = self.api.handle(Request('GET', '/data/', 'HTTP/1.1', {}, Bytes(b''), Peer('test')))
            kept = response.body
            restic_serve.close_quietly(response.body)
        self.assertEqual(closed, ['data'])
        self.assertEqual(list(kept)[1:], [])

    def test_what_there_is_of_a_list_is_sent_after_a_while(self):
        batches = [([named(b'x')], [1])] * 3
        with mock.patch.object(restic_serve, 'LIST_SECONDS', 0), \
                mock.patch.object(restic_serve, 'FIRST_SECONDS', 0):
            self.assertEqual(len(self.chunks(batches, True)), 4)
        for seconds, count in ((PATIENCE, 1), (0, 2)):
            with mock.patch.object(restic_serve, 'FIRST_SECONDS', seconds):
                self.assertEqual(len(self.chunks(batches, True)), count)

    def test_a_web_page_may_ask_nothing_unless_its_origin_is_allowed(self):
        self.make_repository()
        name = named(b'x')
        for allowed, origins in (
                ('', ('https://evil.example', 'null', 'http://localhost:8080', '')),
                ('https://example.org', ('https://evil.example', 'null', 'http://example.org'))):
            self.api = Api(self.store, Policy(), allow_origin=allowed)
            self.ask('POST', f'/locks/{name}', b'x')
            for origin in origins:
                for method, path, body in (
                        ('GET', '/config', b''), ('GET', '/', b''), ('HEAD', '/data/', b''),
                        ('POST', '/?create=true', b''), ('POST', f'/data/{name}', b'x'),
                        ('DELETE', f'/locks/{name}', b''), ('OPTIONS', '/config', b'')):
                    self.assertEqual(self.ask(method, path, body, origin=origin)[0], 403, (method, origin))
            self.assertEqual(self.files(), [f'locks/{name}'])
        self.assertEqual(self.ask('GET', f'/locks/{name}', origin='https://example.org')[0], 200)

    def test_headers_are_added_to_every_answer(self):
        self.api = Api(self.store, Policy(), headers=[('X-One', '1'), ('X-Two', '2')])
        for path in ('/config', '/data/', '/../x'):
            headers = self.ask('GET', path)[1]
            self.assertEqual((headers['X-One'], headers['X-Two']), ('1', '2'))
        self.assertNotIn('Access-Control-Allow-Origin', headers)

    def test_an_error_of_the_file_system_has_its_status(self):
        path = f'/host/data/{self.NAME}'
        self.ask('POST', '/host/?create=true')
        for number, status in ((errno.ENOSPC, 507), (errno.EDQUOT, 507), (errno.EROFS, 507),
                               (errno.EIO, 500), (errno.EACCES, 403), (errno.EMFILE, 503),
                               (errno.ENAMETOOLONG, 400)):
            with mock.patch.object(os, 'write', side_effect=OSError(number, 'made by a test')):
                answer = self.ask('POST', path, self.CONTENT)
            self.assertEqual(answer[0], status, errno.errorcode[number])
            self.assertEqual(answer[2].count(b'\n'), 1)
            if status != 400:
                self.assertIn('made by a test', self.log[-1])
        self.assertEqual(self.files(), [])

    def test_a_fault_of_the_program_is_answered_500_and_logged_in_one_line(self):
        with mock.patch.object(self.store, 'open', side_effect=ValueError('made by a test')):
            self.assertEqual(self.status('GET', '/config'), 500)
        self.assertEqual(self.log[-1], 'GET /config: ValueError: made by a test')


# ---- Transport -------------------------------------------------------------------------------------

@unittest.skipUnless(ssl, 'this Python has no ssl')
class RecordsTest(TestCase):
    """TLS between a socket and a client that is not there: its records are made in memory."""

    def setUp(self):
        super().setUp()
        ours, self.theirs = socket.socketpair()
        ours.settimeout(PATIENCE)
        self.addCleanup(ours.close)
        self.addCleanup(self.theirs.close)
        self.sock = ours
        self.tls = Authority(self.folder, 'server').certificates().wrap(restic_serve.SocketTransport(ours))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        self.to_us, self.from_us = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.client = context.wrap_bio(self.from_us, self.to_us)
        shaking = self.in_thread(self.tls.shake_hands)
        while True:
            with contextlib.suppress(ssl.SSLWantReadError):
                self.client.do_handshake()
                break
            self.theirs.sendall(self.to_us.read())
            self.from_us.write(self.theirs.recv(1 << 16))
        self.theirs.sendall(self.to_us.read())
        shaking.join(PATIENCE)

    def fill(self):
        """Have no room for what is sent to the client."""
        self.sock.settimeout(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                self.sock.send(bytes(1 << 16))
        self.sock.settimeout(None)

    def test_many_records_are_one_read_and_a_small_one_leaves_the_rest(self):
        for size, least in ((50_000, 40_000), (1000, 1)):
            content = os.urandom(40_000)
            self.client.write(content)
            self.theirs.sendall(self.to_us.read())
            received, view = b'', memoryview(bytearray(size))
            while len(received) < len(content):
                count = self.tls.recv_into(view)
                self.assertGreaterEqual(count, least)
                received += view[:count]
            self.assertEqual(received, content)

    def test_close_notify_that_comes_with_content_is_the_end(self):
        self.client.write(b'content')
        with contextlib.suppress(OSError):
            self.client.unwrap()
        self.theirs.sendall(self.to_us.read())
        view = memoryview(bytearray(50_000))
        self.assertEqual(self.tls.recv_into(view), 7)
        self.assertEqual(self.tls.recv_into(view), 0)
        self.assertEqual(self.tls.recv_into(view[:10]), 0)

    def test_a_client_that_never_takes_the_end_is_cut_off(self):
        self.fill()
        connection = restic_serve.Connection(self.tls, Peer('x'), Limits())
        lingering = threading.Thread(target=connection.linger, daemon=True)
        lingering.start()
        self.wait_until(lambda: connection.waits == connection.WRITING, 'it')
        connection.expire()
        lingering.join(PATIENCE)
        self.assertFalse(lingering.is_alive())


# ---- Connection ------------------------------------------------------------------------------------

class DeadlineTest(unittest.TestCase):
    """When time is over, by a clock of the test's own."""

    def setUp(self):
        self.now = 1000.0
        patch_for(self, restic_serve.time, monotonic=lambda: self.now)

    def connection(self, bandwidth=None, **limits):
        transport = mock.Mock()
        transport.recv_into.side_effect = len
        return restic_serve.Connection(transport, Peer('x'), Limits(**limits), bandwidth)

    def test_the_default_hour_grows_with_what_passes(self):
        for what, pass_bytes in ((1, lambda one, count: one.receive_into(bytes(count))),
                                 (2, lambda one, count: one.transmit(bytes(count)))):
            connection = self.connection()
            connection.wait_for(what)
            self.assertEqual(connection.deadline.time(), 1000 + 3600)
            pass_bytes(connection, 128 * 1024)
            self.assertEqual(connection.deadline.time(), 1000 + 3600 + 128)

    def test_a_time_that_was_set_is_total(self):
        connection = self.connection(read_seconds=20, write_seconds=0)
        connection.wait_for(connection.READING)
        connection.receive_into(bytes(128 * 1024))
        self.assertEqual(connection.deadline.time(), 1020)
        connection.wait_for(connection.WRITING)
        self.assertEqual(connection.deadline.time(), float('inf'))

    def test_what_the_bandwidth_holds_back_counts_for_nothing(self):
        def wait(direction, count):
            self.now += 50
            during.append(connection.deadline.time() - connection.clock())

        during = []
        bandwidth = mock.Mock(step=lambda direction, count: count, wait=wait)
        connection = self.connection(bandwidth, read_seconds=20, write_seconds=20, stall_seconds=5)
        for what, pass_bytes in ((connection.READING, lambda: connection.receive_into(bytes(1000))),
                                 (connection.WRITING, lambda: connection.transmit(bytes(1000)))):
            connection.wait_for(what)
            for _ in range(3):
                pass_bytes()
                self.now += 1
            self.assertEqual(connection.deadline.time() - connection.clock(), 17)
        self.assertEqual(during, [20, 19, 18] * 2)

    def test_an_upload_stalls_where_its_bytes_are_waited_for(self):
        connection = self.connection(stall_seconds=60)
        connection.wait_for(connection.READING)
        self.now += 100     # of the disk's
        self.assertEqual(connection.deadline.time(), 1000 + 3600)
        connection._transport.recv_into.side_effect = lambda view: deadlines.append(
            connection.deadline.time()) or len(view)
        deadlines = []
        connection.receive_into(bytes(10))
        self.assertEqual(deadlines, [1160])


class TimeLimitTest(WireTestCase):
    limits = {'header_seconds': 0.2, 'idle_seconds': 1, 'read_seconds': 0.4, 'write_seconds': 0.4}

    def test_the_time_for_an_answer_begins_with_the_end_of_the_head(self):
        self.server.limits.read_seconds = float('inf')
        ended = threading.Event()
        self.addCleanup(ended.set)

        def handle(request):
            ended.wait(PATIENCE)
            return restic_serve.Response(200, [])

        with mock.patch.object(self.server.api, 'handle', handle), Wire(self.port) as wire:
            wire.send(get('/config'))
            with contextlib.suppress(ConnectionError):
                self.assertIsNone(wire.answer())
            self.assertFalse(ended.is_set())
            ended.set()

    def test_a_slow_header_or_upload_is_408_and_leaves_nothing(self):
        for request in ('GET /config HTTP/1.1\r\nHost', post('/config', b'1', length=10)):
            self.assertEqual(self.ask_last(request)[0], 408)
        self.assertEqual(self.files(), [])

    def test_a_header_that_drips_is_408_all_the_same(self):
        wire = self.connect()
        begin = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - begin < PATIENCE:
                wire.send('GET /config HTTP/1.1\r\nHost: x\r\nX: ' if time.monotonic() - begin < 0.05
                          else 'x')
                if select_readable(wire.sock, 0.02):
                    break
        self.assertEqual(wire.answer()[0], 408)
        self.assertGreaterEqual(time.monotonic() - begin, 0.2)

    def test_an_idle_connection_is_closed_without_a_word(self):
        self.assertEqual(self.ask_last(get('/config'))[0], 404)

    def test_a_client_that_does_not_read_is_cut_off(self):
        path = self.put(bytes(64 << 20))
        wire = self.connect()
        wire.send(get(path))
        self.wait_for_one_connection()
        with self.assertRaises((AssertionError, ConnectionResetError)):
            self.assertEqual(len(wire.answer()[2]), 64 << 20)

    def test_a_list_for_http_1_0_that_is_cut_off_does_not_look_complete(self):
        def objects(location, sizes):
            for number in range(1_000_000):
                yield [f'{number:064x}'], [1]

        with mock.patch.object(self.store, 'objects', objects):
            wire = self.connect()
            wire.send('GET /data/ HTTP/1.0\r\n\r\n')
            self.wait_for_one_connection()
            self.assertRaises(ConnectionResetError, wire.answer)

    def test_no_thread_or_descriptor_is_left(self):
        def held():
            """Threads, and what descriptors are of: other tests' may end meanwhile."""
            return {*threading.enumerate(), *descriptors()}

        path = self.put(bytes(8 << 20))
        before = held()
        for request in (b'', b'GET /', post('/config', b'1', length=10), get(path), get('/data/')):
            with Wire(self.port) as wire:
                wire.send(request)
                self.wait_for_one_connection()
        self.wait_until(lambda: held() <= before, 'the end of threads and descriptors')


class BandwidthOfConnectionsTest(Http2TestCase):
    """Whatever passes is counted: both wires, both ways, small and large."""

    def setUp(self):
        super().setUp()
        self.content = os.urandom(300_000)
        self.path = self.put(self.content)
        self.clock = Clock()
        self.server.bandwidth = self.clock.bandwidth('100k:10k')

    def check(self, rate, transfer):
        begin = self.clock.now
        transfer()
        self.assertAlmostEqual((self.clock.now - begin) * rate * 1024 / len(self.content), 1, delta=0.1)

    def test_http_1(self):
        wire = self.connect()
        self.check(100, lambda: self.assertEqual(wire.ask(get(self.path))[2], self.content))
        self.check(10, lambda: self.assertEqual(wire.ask(post(self.path, self.content))[0], 200))
        with mock.patch.object(os, 'sendfile', side_effect=OSError(errno.EINVAL, 'no')):
            self.check(100, lambda: self.assertEqual(wire.ask(get(self.path))[2], self.content))
        begin = self.clock.now
        self.assertTrue(self.server.bandwidth.toggle())
        self.assertEqual(wire.ask(get(self.path))[2], self.content)
        self.assertEqual(self.clock.now, begin)

    def test_http_2(self):
        wire = self.http2()
        self.check(100, lambda: self.assertEqual(wire.ask(1, 'GET', self.path)[2], self.content))
        self.check(10, lambda: (wire.upload(3, self.path, self.content),
                                self.assertEqual(wire.answer(3)[0], 200)))


# ---- Http1 -----------------------------------------------------------------------------------------

class HeadTest(unittest.TestCase):
    """The parser of heads, from strings alone."""

    parse = staticmethod(restic_serve.parse_head)

    def test_a_head_in_its_parts(self):
        method, target, version, headers = self.parse(
            'GET /a?b HTTP/1.1\r\nHost: x:1\r\nX-One:1\r\nx-one: \t2 \t\r\nX-Empty:\r\n'
            'X-High: \xe9 :"\r\n')
        self.assertEqual((method, target, version), ('GET', '/a?b', 'HTTP/1.1'))
        self.assertEqual(headers, {'host': 'x:1', 'x-one': '1, 2', 'x-empty': '', 'x-high': '\xe9 :"'})

    def test_versions(self):
        self.assertEqual(self.parse('GET / HTTP/1.0\r\n')[2], 'HTTP/1.0')
        self.assertEqual(self.parse('GET / HTTP/1.2\r\nHost: x\r\n')[2], 'HTTP/1.1')
        for version in ('HTTP/2.0', 'HTTP/0.9', 'HTTP/2'):
            self.assertEqual(raised(HttpError, self.parse, f'GET / {version}\r\nHost: x\r\n').status, 505)

    def test_an_absolute_target_is_its_path(self):
        for target, path in (('http://x/a?b', '/a?b'), ('HTTPS://x:1/a', '/a'), ('http://x', '/'),
                             ('http://x?a', '/?a')):
            self.assertEqual(self.parse(f'GET {target} HTTP/1.1\r\nHost: x\r\n')[1], path)

    def test_what_is_refused_and_why(self):
        line, host = 'GET / HTTP/1.1\r\n', 'GET / HTTP/1.1\r\nHost: x\r\n'
        for reason, *heads in (
                ('request line', 'GET /\r\n', 'GET  / HTTP/1.1\r\nHost: x\r\n', ' GET / HTTP/1.1\r\n',
                 'GET / HTTP/1.1 \r\nHost: x\r\n', 'G\x00T / HTTP/1.1\r\nHost: x\r\n',
                 'GET /\xe9 HTTP/1.1\r\nHost: x\r\n', 'GET /#a HTTP/1.1\r\nHost: x\r\n'),
                ('folded', host + ' folded: 1\r\n', line + ' Host: x\r\n'),
                ('space before the colon', line + 'Host : x\r\n'),
                ('control character', host + 'A: \x01\r\n', host + 'A: b\rc\r\n', host + 'A: \x7f\r\n'),
                ('header line', host + ': b\r\n', host + 'A b: c\r\n', host + 'no colon\r\n'),
                ('Host', line, host + 'Host: x\r\n', line + 'Host: a b\r\n'),
                ('target', 'GET a HTTP/1.1\r\nHost: x\r\n', 'CONNECT x:80 HTTP/1.1\r\nHost: x\r\n')):
            for head in heads:
                error = raised(HttpError, self.parse, head)
                self.assertEqual((error.status, reason in str(error)), (400, True), (head, error))

    def test_the_length_of_a_body(self):
        length = restic_serve.body_length
        self.assertEqual(length({}, 'HTTP/1.1'), 0)
        self.assertEqual(length({'content-length': '5'}, 'HTTP/1.1'), 5)
        self.assertEqual(length({'content-length': '0'}, 'HTTP/1.0'), 0)
        self.assertIsNone(length({'transfer-encoding': 'Chunked'}, 'HTTP/1.1'))
        for bad in ('5, 6', '5, 5', '+5', '', '-1', '5_0', '9' * 30, '٣'):
            self.assertEqual(raised(HttpError, length, {'content-length': bad}, 'HTTP/1.1').status, 400, bad)
        for coding, version, status, more in (
                ('chunked', 'HTTP/1.1', 400, {'content-length': '5'}), ('chunked', 'HTTP/1.0', 400, {}),
                ('gzip', 'HTTP/1.1', 501, {}), ('gzip, chunked', 'HTTP/1.1', 501, {}),
                ('identity', 'HTTP/1.1', 501, {})):
            error = raised(HttpError, length, {'transfer-encoding': coding, **more}, version)
            self.assertEqual(error.status, status, coding)


class ContentTest(unittest.TestCase):
    """Reading of content, without a connection (RFC 9112 6 and 7)."""

    def read(self, length, *pieces, step=4):
        """All of a body that arrives in pieces, or the status of its error; and what follows it."""
        http1 = restic_serve.Http1(Pieces(*pieces), mock.Mock())
        http1.length, http1.left = length, restic_serve._UNKNOWN if length is None else length
        found, view = b'', memoryview(bytearray(step))
        try:
            for count in iter(lambda: http1.readinto(view), 0):
                found += bytes(view[:count])
        except HttpError as error:
            return error.status
        self.assertEqual(http1.left, 0)
        return found, http1._buffer

    def test_a_body_of_known_length(self):
        for pieces in ((b'0123456789rest',), (b'01', b'234567', b'89'), (b'0',) * 10):
            self.assertEqual(self.read(10, *pieces)[0], b''.join(pieces)[:10])
        self.assertEqual(self.read(10, b'012'), 400)

    def test_a_chunked_body(self):
        read = functools.partial(self.read, None)
        chunked = b'3\r\nabc\r\n0a;x=y\r\n0123456789\r\n0\r\nTrailer: x\r\n\r\n'
        self.assertEqual(read(chunked + b'GET /'), (b'abc0123456789', b'GET /'))
        self.assertEqual(read(*(chunked[at:at + 1] for at in range(len(chunked)))), (b'abc0123456789', b''))
        for bad in (b'x\r\n', b'-1\r\n', b'1 1\r\n', b'1 \r\na\r\n', b'1;\0\r\na\r\n', b'1\r\na', b'',
                    b'0\r\nbad trailer\r\n\r\n', b'1;' + b'a' * 9999 + b'\r\na\r\n0\r\n\r\n'):
            self.assertEqual(read(bad), 400, bad)
        self.assertEqual(read(b'0\r\n' + b'X: y\r\n' * 50), 431)


class Http1Test(WireTestCase):
    def test_pipelined_requests_are_answered_in_their_order(self):
        paths = [self.put(b'%d' % number) for number in range(20)]
        wire = self.connect()
        wire.send(b''.join(get(path) for path in paths))
        self.assertEqual([wire.answer()[2] for _ in paths], [b'%d' % n for n in range(20)])
        contents = [b'upload %d' % number for number in range(20)]
        wire.send(b''.join(post(f'/data/{named(content)}', content) for content in contents))
        self.assertEqual([wire.answer()[0] for _ in contents], [200] * 20)

    def test_a_request_may_come_byte_by_byte(self):
        content = b'0123456789'
        wire = self.connect()
        for byte in post(f'/data/{named(content)}', content):
            wire.send(bytes([byte]))
        self.assertEqual(wire.answer()[0], 200)

    def test_an_empty_line_before_a_request_is_skipped(self):
        self.assertEqual(self.ask(b'\r\n', get('/config'))[0], 404)
        self.assertEqual(self.ask(b'\r\n' * 5000, get('/config'))[0], 404)

    def test_http_1_0_closes_unless_asked_to_keep(self):
        path = self.put(b'content')
        wire = self.connect()
        status, headers, content = wire.ask(f'GET {path} HTTP/1.0\r\nConnection: keep-alive\r\n\r\n')
        self.assertEqual((status, headers['connection'], content), (200, 'keep-alive', b'content'))
        status, headers, content = wire.ask_last(f'GET {path} HTTP/1.0\r\n\r\n')
        self.assertEqual((status, headers['connection'], content), (200, 'close', b'content'))

    def test_a_list_for_http_1_0_ends_with_the_connection(self):
        path = self.put(b'content')
        wire = self.connect()
        for least, connection in ((1 << 20, 'keep-alive'), (1, 'close')):   # a short one has a length
            with mock.patch.object(restic_serve, 'LIST_BYTES', least):
                status, headers, content = wire.ask('GET /data/ HTTP/1.0\r\nConnection: keep-alive\r\n\r\n')
            self.assertEqual(headers['connection'], connection)
            self.assertNotIn('transfer-encoding', headers)
            self.assertEqual(json.loads(content), [path[-64:]])

    def test_the_client_may_ask_to_close(self):
        status, headers, _ = self.ask_last(get('/config', 'Connection: Close'))
        self.assertEqual((status, headers['connection']), (404, 'close'))

    def test_head_has_the_headers_of_get_and_no_content(self):
        small, large = self.put(b'content'), self.put(bytes(1 << 20))
        wire = self.connect()
        for path, length in ((small, '7'), (large, str(1 << 20))):
            status, headers, _ = wire.ask(get(path, method='HEAD'), head_only=True)
            self.assertEqual((status, headers['content-length']), (200, length))
        status, headers, _ = wire.ask(get('/data/', method='HEAD'), head_only=True)
        self.assertEqual((status, headers['transfer-encoding']), (200, 'chunked'))
        self.assertEqual(wire.ask(get(small))[2], b'content')

    def test_answers_have_a_date(self):
        date = self.ask(get('/config'))[1]['date']
        self.assertRegex(date, r'^(Mon|Tue|Wed|Thu|Fri|Sat|Sun), \d\d [A-Z][a-z]{2} \d{4} '
                               r'\d\d:\d\d:\d\d GMT$')

    def test_ranges_small_and_large(self):
        size = (17 << 20) + 1
        content = os.urandom(size)
        path = self.put(content)
        wire = self.connect()
        for first, last in ((0, 0), (5, 4100), (0, size - 1), (1000, 500_000), (500_000, 900_000),
                            (1, size - 1), ((2 << 20) + 7, size - 1)):
            status, headers, part = wire.ask(get(path, f'Range: bytes={first}-{last}'))
            self.assertEqual((status, part), (206, content[first:last + 1]))
            self.assertEqual(headers['content-range'], f'bytes {first}-{last}/{size}')
        self.assertEqual(wire.ask(get(path, f'Range: bytes={size}-'))[0], 416)
        self.assertEqual(wire.ask(get(path))[2], content)

    def test_chunked_uploads(self):
        content = os.urandom(300_000)
        path = f'/data/{named(content)}'
        for number, (step, extension, trailer) in enumerate((
                (1000, b'', b''), (100_000, b';a=b', b'X-Trailer: yes\r\n'),
                (65536, b' ; a="b"', b'A: 1\r\nB: 2\r\n'))):
            wire = self.connect()
            wire.send(f'POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n')
            for start in range(0, len(content), step):
                part = content[start:start + step]
                wire.send(b'%X%b\r\n%b\r\n' % (len(part), extension, part))
            self.assertEqual(wire.ask(b'0\r\n' + trailer + b'\r\n')[0], 200, number)
            self.assertEqual(wire.ask(get(path))[2], content)
            self.store.delete(Location('', 'data', named(content)))

    def test_a_long_header_is_431_and_the_longest_is_not(self):
        plain = get('/config', 'X: ')
        longest = get('/config', 'X: ' + 'x' * (4096 - len(plain)))
        self.assertEqual(len(longest), 4096)
        self.assertEqual(self.ask(longest)[0], 404)
        self.assertEqual(self.ask(get('/config', 'X: ' + 'x' * (4097 - len(plain))))[0], 431)
        self.assertEqual(self.ask(get('/' + 'x' * 100_000))[0], 431)

    def test_100_continue_comes_when_the_content_is_wanted(self):
        content = b'content'
        path = f'/data/{named(content)}'
        head, expect = post(path, b'', length=len(content)), b'Expect: 100-continue\r\n\r\n'
        wire = self.connect()
        wire.send(head[:-2] + expect)
        self.assertEqual(wire.answer()[0], 100)
        self.assertEqual(wire.ask(content)[0], 200)
        self.assertEqual(wire.ask(get(path))[2], content)

    def test_100_continue_is_not_said_to_what_is_refused(self):
        for head, status in ((post('/host/other/x/data/y', b'', 'Expect: 100-continue', length=5), 404),
                             (post('/../config', b'', 'Expect: 100-continue', length=5), 400),
                             (post('/data/', b'', 'Expect: 100-continue', length=5), 405),
                             (post('/config', b'', 'Expect: 200-maybe', length=5), 417)):
            self.assertEqual(self.ask_last(head)[0], status)

    def test_100_continue_is_not_said_when_content_has_come_or_to_http_1_0(self):
        content = b'content'
        path = f'/data/{named(content)}'
        self.assertEqual(self.ask(post(path, content, 'Expect: 100-continue'))[0], 200)
        request = post(path, content, 'Expect: 100-continue').replace(b'HTTP/1.1', b'HTTP/1.0')
        head, _, body = request.partition(b'\r\n\r\n')
        wire = self.connect()
        wire.send(head + b'\r\n\r\n')
        self.assertEqual(wire.ask(body)[0], 200)

    def test_a_refusal_reaches_a_client_that_is_still_sending(self):
        size = 8 << 20
        for path in ('/a/../config', '/host/nothing/x/data', '/data/'):
            status, headers, _ = self.ask_last(post(path, b'', length=size), *[bytes(1 << 16)] * (size >> 16))
            self.assertIn(status, (400, 404, 405))
            self.assertEqual(headers['connection'], 'close')

    def test_content_that_is_cut_short_is_400_if_it_can_be_said(self):
        for data in (post('/config', b'12345', length=10), b'GET /config HT',
                     b'POST /config HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n123'):
            wire = self.connect()
            wire.send(data)
            wire.sock.shutdown(socket.SHUT_WR)
            self.assertEqual(wire.answer()[0], 400)
        self.assertEqual(self.files(), [])

    def test_a_client_that_resets_leaves_nothing_but_a_debug_line(self):
        for data in (post('/config', b'12345', length=10), get(self.put(bytes(8 << 20))), b'GET'):
            wire = self.connect()
            wire.send(data)
            self.wait_until(lambda: self.server.served, 'a connection')
            wire.reset_at_end()
            wire.__exit__()
            self.wait_until(lambda: not self.server.served, 'its end')
        self.assertEqual(self.log, [f'created directory {self.root}'])
        self.assertEqual(len(self.files()), 1)

    def test_a_list_that_cannot_be_read_to_its_end_is_broken_off(self):
        def objects(location, sizes):
            for number in range(10_000):
                yield [f'{number:064x}'], [1]
            raise OSError(errno.EIO, 'made by a test')

        for request in (get('/data/'), b'GET /data/ HTTP/1.0\r\n\r\n'):
            with mock.patch.object(self.store, 'objects', objects):
                self.assertRaises(ConnectionResetError, self.ask, request)
                self.assertIn('made by a test', self.log[-1])

    def test_a_file_that_becomes_shorter_is_broken_off(self):
        content, wire = bytes(64 << 20), self.connect()
        wire.send(get(self.put(content)))
        wire.file.read(1)
        os.truncate(path_of(self.store, Location('', 'data', named(content))), 1 << 20)
        with self.assertRaises((ConnectionResetError, AssertionError)):
            self.assertEqual(len(wire.answer()[2]), 64 << 20)

    def test_http_2_is_505_and_told_to_whom_it_concerns(self):
        for _ in range(3):
            with Wire(self.port) as wire:
                wire.send(restic_serve.PREFACE, settings(), headers(1))
                status, answer, content = wire.answer()
                self.assertEqual((status, answer['connection']), (505, 'close'))
                self.assertEqual(content, b'HTTP/2 is spoken over --stdio only; use HTTP/1.1\n')
                wire.send(bytes(100_000))   # it may go on for a moment
                self.assertTrue(wire.is_closed())
        self.wait_until(lambda: sum('HTTP/2' in line for line in self.log) == 3, 'the lines')
        self.assertRegex(self.log[-1], '^127.0.0.1: HTTP/2 is spoken over --stdio only; use HTTP/1.1 .*h2')
        self.assertEqual(self.ask(get('/config', 'Connection: Upgrade, HTTP2-Settings', 'Upgrade: h2c',
                                      'HTTP2-Settings: AAMAAABkAAQAAP__'))[0], 404)


class LargeObjectTest(Http2TestCase):
    """Objects above 4 GiB, also where an address has 32 bits.  The file has a hole."""

    SIZE = (4 << 30) + 1000

    def setUp(self):
        super().setUp()
        counted_plainly(self)
        self.make_repository()
        self.path = self.put(b'begin')
        with open(path_of(self.store, Location('', 'data', named(b'begin'))), 'r+b') as file:
            file.truncate(self.SIZE)
            file.seek(-3, os.SEEK_END)
            file.write(b'end')

    def test_its_parts_are_sent(self):
        end = self.SIZE - 1
        for asked, span, content in (
                ('0-4', '0-4', b'begin'), ('-3', f'{end - 2}-{end}', b'end'),
                ('4294967296-', f'4294967296-{end}', bytes(997) + b'end'),
                ('4294967290-4294967300', '4294967290-4294967300', bytes(11))):
            for status, head, found in (
                    self.ask(get(self.path, f'Range: bytes={asked}')),
                    self.http2().ask(1, 'GET', self.path, ('range', f'bytes={asked}'))):
                self.assertEqual((status, head['content-range'], found),
                                 (206, f'bytes {span}/{self.SIZE}', content))

    def test_its_size_is_told_everywhere(self):
        status, head, _ = self.ask(get(self.path, method='HEAD'), head_only=True)
        self.assertEqual((status, head['content-length']), (200, str(self.SIZE)))
        sizes = json.loads(self.ask(get('/data/', f'Accept: {V2}'))[2])
        self.assertEqual([entry['size'] for entry in sizes], [self.SIZE])
        self.assertEqual([held.bytes for held in self.counted().holdings().values()], [self.SIZE])

    def test_the_whole_is_sent_with_its_length(self):
        with Wire(self.port) as wire:
            wire.send(get(self.path))
            for line in iter(wire.file.readline, b'\r\n'):
                if line.lower().startswith(b'content-length:'):
                    self.assertEqual(int(line.split()[1]), self.SIZE)
            self.assertEqual(wire.file.read(1 << 20), b'begin'.ljust(1 << 20, b'\0'))

    def test_one_may_be_uploaded(self):
        with Wire(self.port) as wire:
            self.assertEqual(wire.ask(post(f'/data/{"1" * 64}', b'', 'Expect: 100-continue',
                                           length=self.SIZE))[0], 100)
            wire.send(bytes(1 << 20))
        self.wait_until(lambda: not self.server.served, 'the end of the upload')
        self.assertEqual(len(self.files()), 1)


# ---- Hpack -----------------------------------------------------------------------------------------

class HpackTest(unittest.TestCase):
    """RFC 7541's own examples, its appendix C, and what must not be decoded."""

    WWW = [(':method', 'GET'), (':scheme', 'http'), (':path', '/'), (':authority', 'www.example.com')]
    REQUESTS = [WWW, [*WWW, ('cache-control', 'no-cache')],
                [(':method', 'GET'), (':scheme', 'https'), (':path', '/index.html'),
                 (':authority', 'www.example.com'), ('custom-key', 'custom-value')]]
    MOVED = [(':status', '302'), ('cache-control', 'private'), ('date', 'Mon, 21 Oct 2013 20:13:21 GMT'),
             ('location', 'https://www.example.com')]
    RESPONSES = [MOVED, [(':status', '307'), *MOVED[1:]],
                 [(':status', '200'), MOVED[1], ('date', 'Mon, 21 Oct 2013 20:13:22 GMT'), MOVED[3],
                  ('content-encoding', 'gzip'),
                  ('set-cookie', 'foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1')]]

    def decode(self, *blocks, limit=4096, decoder=None):
        decoder = decoder or restic_serve.HeaderDecoder()
        return [decoder.decode(bytes.fromhex(block) if isinstance(block, str) else block, limit)
                for block in blocks]

    def check(self, expected, *blocks):
        self.assertEqual(self.decode(*blocks), [(fields, True) for fields in expected])

    def test_lengths_are_integers_of_section_5_1(self):
        for length, encoded in ((0, '00'), (126, '7e'), (127, '7f00'), (255, '7f8001'), (1337, '7fba09')):
            self.assertEqual(restic_serve.encode_string('x' * length), bytes.fromhex(encoded) + b'x' * length)
            self.check([[('x', 'x' * length)]], restic_serve.encode_headers([('x', 'x' * length)]))

    def test_the_examples_of_appendix_c(self):
        for field, block in ((('custom-key', 'custom-header'),
                              '400a637573746f6d2d6b65790d637573746f6d2d686561646572'),
                             ((':path', '/sample/path'), '040c2f73616d706c652f70617468'),
                             (('password', 'secret'), '100870617373776f726406736563726574'),
                             ((':method', 'GET'), '82')):
            self.check([[field]], block)
        self.check(self.REQUESTS,   # C.4, as C.3, with Huffman coding
                   '828684418cf1e3c2e5f23a6ba0ab90f4ff', '828684be5886a8eb10649cbf',
                   '828785bf408825a849e95ba97d7f8925a849e95bb8e8b4bf')
        self.check(self.RESPONSES,  # C.6: the table is made as small as it is there, 3fe101, and evicts
                   '3fe101' '488264025885aec3771a4b6196d07abe941054d444a8200595040b8166e082a62d1bff6e919d29ad'
                   '171863c78f0b97c8e9ae82ae43d3', '4883640effc1c0bf',
                   '88c16196d07abe941054d444a8200595040b8166e084a62d1bffc05a839bd9ab77ad94e7821dd7f2e6c7b335'
                   'dfdfcd5b3960d5af27087f3672c1ab270fb5291f9587316065c003ed4ee5b1063d5007')

    def test_what_is_encoded_is_decoded(self):
        fields = [(':status', '206'), (':status', '507'), ('content-type', 'x' * 300), ('x-new', 'äö')]
        self.check([fields], restic_serve.encode_headers(fields))

    def test_a_block_says_that_it_needs_no_table(self):
        self.assertEqual(restic_serve.encode_headers([('a', 'b')]), b'\x20\0\1a\1b')

    def test_every_octet_has_its_huffman_code(self):
        octets = restic_serve._huffman_codes()
        self.assertEqual(len(octets), 256)
        for code, octet in octets.items():
            digits = code + '1' * (-len(code) % 8)
            self.assertEqual(restic_serve.decode_huffman(int(digits, 2).to_bytes(len(digits) // 8, 'big')),
                             bytes([octet]))

    def test_what_cannot_be_decoded(self):
        for block in ('80', 'c6', '7f0700', '40', '4001', '400161', '40016102', '83' '21', '3fe21f', 'ff',
                      '3fffffffffff0f', '7fffffffffffff01', '00857f', '4085f2b24a84ff',
                      '0085f2b24a84ff8449509fff', '0085f2b24a84ff83495090', '008184ff', '0001618480ffffff',
                      '0085f2b24a84ff874951fffffffa7f'):
            with self.assertRaises(restic_serve.HpackError, msg=block):
                self.decode(block)

    def test_an_emptied_table_has_no_entries_and_an_entry_that_is_too_large_empties_it(self):
        decoder = restic_serve.HeaderDecoder()
        self.decode('400161' '0162', 'be', '20' '3fe11f', decoder=decoder)
        self.assertRaises(restic_serve.HpackError, self.decode, 'be', decoder=decoder)
        self.decode('4001610162', b'\x40\x01b\x7f\xa1\x1f' + b'x' * 4128, decoder=decoder)
        self.assertRaises(restic_serve.HpackError, self.decode, 'be', decoder=decoder)

    def test_a_header_list_past_its_limit_is_decoded_without_being_kept(self):
        decoder = restic_serve.HeaderDecoder()
        bomb = b'\x40\x01a\x7f\xa1\x1e' + b'x' * 4000 + b'\xbe' * 10000
        (fields, whole), (more, _) = self.decode(bomb, 'be', limit=5000, decoder=decoder)
        self.assertEqual((len(fields), whole, len(more)), (1, False, 1))


# ---- Frames ----------------------------------------------------------------------------------------

TEST = frame(DATA, END_STREAM, 1, b'test')
POST = headers(1, fields('POST'), END_HEADERS)
OPEN = headers(1, flags=END_HEADERS)
CANCELLED = frame(RST_STREAM, 0, 1, word(8))
TOP = (1 << 31) - 1
LONG = ('x-long', 'x' * 3500)


class Http2FramesTest(Http2TestCase):
    """What RFC 9113 lets a client send, and what it does not: section by section."""

    def test_what_is_well_formed_is_answered(self):
        block = fields()
        for what, parts in {
                'HEADERS': [headers(1)], 'POST with DATA': [POST, TEST], 'HEAD': [headers(1, fields('HEAD'))],
                'several DATA': [POST, frame(DATA, 0, 1, b'test'), TEST],
                'padded DATA': [POST, frame(DATA, END_STREAM | PADDED, 1, b'\x05test' + bytes(5))],
                'DATA of padding alone': [POST, frame(DATA, END_STREAM | PADDED, 1, b'\x05' + bytes(5))],
                'the longest DATA': [POST, frame(DATA, END_STREAM, 1, bytes(65535))],
                'padded HEADERS': [headers(1, b'\x08' + block + bytes(8), 5 | PADDED)],
                'HEADERS with priority': [headers(1, word(0) + b'\xff' + block, 5 | PRIORITIZED)],
                'HEADERS with both': [headers(1, b'\x01' + word(3) + b'\xff' + block + b'\0',
                                              5 | PRIORITIZED | PADDED)],
                'PRIORITY before': [frame(PRIORITY, 0, 1, word(0) + b'\0'), headers(1)],
                'PRIORITY of a later one': [frame(PRIORITY, 0, 3, word(1) + b'\0'), headers(1)],
                'CONTINUATION': [headers(1, block[:5], 1), frame(CONTINUATION, 4, 1, block[5:])],
                'several': [headers(1, block[:5], 1), frame(CONTINUATION, 0, 1, block[5:9]),
                            frame(CONTINUATION, 4, 1, block[9:])],
                'an empty first fragment': [headers(1, b'', 1), frame(CONTINUATION, 4, 1, block)],
                'a long header': [headers(1, block, 1), frame(CONTINUATION, 0, 1, fields(
                    None, None, LONG, scheme=None, authority=None)), frame(CONTINUATION, 4, 1, b'\0\1a\1b')],
                'trailers': [POST, frame(DATA, 0, 1, b'test'), headers(1, restic_serve.encode_headers(
                    [('x-test', 'ok')]))],
                'an unknown setting': [settings((255, 1)), headers(1)],
                'a setting': [settings((2, 1), (3, 100), (5, 16384), (6, 100)), headers(1)],
                'an unknown type': [frame(0x16, 255, 0, bytes(8)), headers(1)],
                'a reserved bit': [frame(PING, 0x16, 1 << 31, bytes(8)), headers(1)],
                'an answer to a PING': [frame(PING, ACK, 0, bytes(8)), headers(1)],
                'GOAWAY of a new code': [frame(GOAWAY, 0, 0, word(0) + word(255)), headers(1)],
                'a reset of a new code': [headers(1), frame(RST_STREAM, 0, 1, word(255)), headers(3)],
                'te': [headers(1, fields('GET', '/', ('te', 'trailers')))],
                'host': [headers(1, fields('GET', '/', ('host', 'x'), authority=None))],
                **{f'a field as {literal}': [headers(1, block + bytes.fromhex(literal))] for literal in (
                    'ba', '7a849c48aca4', '4085f2b24a84ff849c48aca4', '0f2b06683273706563',
                    '0006782d7465737406683273706563', '1f2b849c48aca4', '1085f2b24a84ff849c48aca4')},
                'a table of another size': [headers(1, b'\x3f\x61\x3f\xe1\x1f' + block)],
                'a window for what is over': [headers(1), frame(WINDOW_UPDATE, 0, 1, word(1))]}.items():
            with self.subTest(what), self.http2() as wire:
                wire.send(*parts, frame(PING, 0, 0, b'question'))
                numbers = {3 if 'reset' in what else 1: False, None: False}
                while not all(numbers.values()):
                    got = wire.until(HEADERS, PING)
                    self.assertIsNotNone(got)
                    if got[0] == HEADERS:
                        numbers[got[2]] = True
                    elif got[1:] == (ACK, 0, b'question'):
                        numbers[None] = True

    def test_faults_of_the_connection_end_it(self):
        block = fields()
        protocol, flow, closed, size, compression = 1, 3, 5, 6, 9
        for what, (code, *parts) in {
                '3.4 SETTINGS first': (protocol, frame(PING, 0, 0, bytes(8))),
                '3.4 not their answer': (protocol, frame(SETTINGS, ACK, 0)),
                '4.2 DATA too long': (size, POST, frame(DATA, 1, 1, bytes((1 << 20) + 1))),
                '4.2 HEADERS too long': (size, headers(1, bytes(17575))),
                '4.3 half a field': (compression, headers(1, b'\x40')),
                '4.3 PRIORITY within': (protocol, headers(1, block, 0), frame(PRIORITY, 0, 1, bytes(5))),
                '4.3 HEADERS within': (protocol, headers(1, block, 0), headers(3)),
                '4.3 a new type within': (protocol, headers(1, block, 1), frame(0x16, 0, 0, bytes(8))),
                '5.1 DATA while idle': (protocol, TEST), '5.1 RST_STREAM while idle': (protocol, CANCELLED),
                '5.1 WINDOW_UPDATE while idle': (protocol, frame(WINDOW_UPDATE, 0, 1, word(100))),
                '5.1 CONTINUATION while idle': (protocol, frame(CONTINUATION, 4, 1, block)),
                '5.1 CONTINUATION after the end': (protocol, headers(1), frame(CONTINUATION, 4, 1, block)),
                '5.1 DATA after RST_STREAM': (closed, OPEN, CANCELLED, TEST),
                '5.1 HEADERS after RST_STREAM': (protocol, OPEN, CANCELLED, headers(1)),
                '5.1 CONTINUATION after RST_STREAM': (protocol, OPEN, CANCELLED,
                                                      frame(CONTINUATION, 4, 1, block)),
                '5.1.1 an even number': (protocol, headers(2)), '6.2 no stream': (protocol, headers(0)),
                '5.1.1 a lower number': (protocol, headers(5), headers(3)),
                '5.3.1 PRIORITY of itself': (protocol, frame(PRIORITY, 0, 1, word(1) + b'\0')),
                '5.3.1 HEADERS that depend on themselves': (
                    protocol, headers(1, word(1) + b'\0' + fields(), 5 | PRIORITIZED)),
                **{f'6 {kind} of a wrong stream': (protocol, frame(kind, 0, number, bytes(length)))
                   for kind, number, length in ((DATA, 0, 4), (PRIORITY, 0, 5), (RST_STREAM, 0, 4),
                                                (SETTINGS, 1, 6), (PING, 1, 8), (GOAWAY, 1, 8))},
                **{f'6 {kind} of {length} bytes': (size, frame(kind, 0, 0, bytes(length)))
                   for kind, length in ((SETTINGS, 3), (PING, 6), (GOAWAY, 4), (WINDOW_UPDATE, 3))},
                '6.1 padding too long': (protocol, POST, frame(DATA, 1 | PADDED, 1, b'\x06test')),
                '6.1 no padding': (size, POST, frame(DATA, 1 | PADDED, 1)),
                '6.2 padding too long': (protocol, headers(1, bytes([len(block) + 2]) + block, 5 | PADDED)),
                '6.2 no priority': (size, headers(1, b'1234', 5 | PRIORITIZED)),
                '6.3 PRIORITY of 4 bytes': (size, headers(1), frame(PRIORITY, 0, 1, bytes(4))),
                '6.4 RST_STREAM of 3 bytes': (size, headers(1), frame(RST_STREAM, 0, 1, bytes(3))),
                '6.5 an answer with content': (size, frame(SETTINGS, ACK, 0, b'\0')),
                **{f'6.5.2 {number}: {value}': (code, settings((number, value))) for number, value, code in (
                    (2, 2, protocol), (4, 1 << 31, flow), (5, 16383, protocol), (5, 1 << 24, protocol))},
                '6.6 PUSH_PROMISE': (protocol, frame(PUSH_PROMISE, 4, 1, word(3) + block)),
                '6.9 WINDOW_UPDATE of zero bytes': (protocol, frame(WINDOW_UPDATE, 0, 0, word(0))),
                '6.9.1 the window too large': (flow, *[frame(WINDOW_UPDATE, 0, 0, word(TOP))] * 2),
                '6.9.2 a window of a stream too large': (
                    flow, OPEN, frame(WINDOW_UPDATE, 0, 1, word(TOP - 65535)), settings((4, 65600))),
                '6.10 CONTINUATION of another': (protocol, headers(1, block, 1),
                                                 frame(CONTINUATION, 4, 3, block)),
                '6.10 of none': (protocol, headers(1, block, 1), frame(CONTINUATION, 4, 0, block)),
                '6.10 DATA within': (protocol, headers(1, block, 0), TEST),
                '6.10 once more': (protocol, headers(1, block, 1), frame(CONTINUATION, 4, 1, b'\x82'),
                                   frame(CONTINUATION, 4, 1, b'\x82')),
                'HPACK 6.3 a table too large': (compression, headers(1, b'\x3f\xe2\x1f' + block))}.items():
            with self.subTest(what):
                wire = self.http2(preface=not what.startswith('3.4'))
                with wire:
                    if what.startswith('3.4'):
                        wire.send(restic_serve.PREFACE)
                    wire.send(*parts)
                    got = wire.until(GOAWAY)
                    self.assertIsNotNone(got, 'no GOAWAY')
                    self.assertEqual(int.from_bytes(got[3][4:8], 'big'), code, got)
                    self.assertIsNone(wire.until(GOAWAY))

    def test_faults_of_a_stream_reset_it_alone(self):
        protocol, flow, closed = 1, 3, 5
        short = ('content-length', '1')
        for what, (code, *parts) in {
                '5.1 DATA after the end': (closed, settings((4, 0)), headers(1), TEST),
                '5.1 HEADERS after the end': (closed, settings((4, 0)), headers(1), headers(1)),
                '6.1 POST with DATA after the end': (closed, settings((4, 0)), headers(1, fields('POST')),
                                                     TEST),
                '6.9 WINDOW_UPDATE of zero bytes': (protocol, OPEN, frame(WINDOW_UPDATE, 0, 1, word(0))),
                '6.9.1 the window too large': (flow, OPEN, *[frame(WINDOW_UPDATE, 0, 1, word(TOP))] * 2),
                '8.1 trailers without the end': (
                    protocol, POST, frame(DATA, 0, 1, b'test'), headers(1, b'\0\x01x\x01y', END_HEADERS)),
                '8.1 trailers with a pseudo-header field': (
                    protocol, POST, frame(DATA, 0, 1, b'test'), headers(1, b'\x83')),
                '8.1 trailers with a bad value': (
                    protocol, POST + headers(1, restic_serve.encode_headers([('a', 'b\nc')]), 5)),
                '8.1 trailers with connection': (
                    protocol, POST + headers(1, restic_serve.encode_headers([('connection', 'close')]), 5)),
                '8.1 trailers with transfer-encoding': (
                    protocol, POST + headers(1, restic_serve.encode_headers([
                        ('transfer-encoding', 'chunked')]), 5)),
                '8.2.2 connection': (protocol, headers(1, fields('GET', '/', ('connection', 'keep-alive')))),
                '8.1.1 more than announced': (protocol, headers(1, fields('POST', '/', short), 4), TEST),
                '8.1.1 more, in two': (protocol, headers(1, fields('POST', '/', short), 4),
                                       frame(DATA, 0, 1, b'test'), frame(RST_STREAM, 0, 1, word(0))),
                '8.1.1 less than announced': (protocol, headers(1, fields('POST', '/', short), 4),
                                              frame(DATA, END_STREAM, 1)),
                '8.1.1 nothing': (protocol, headers(1, fields('POST', '/', short))),
                '8.3.1 no path': (protocol, headers(1, fields('GET', None)))}.items():
            with self.subTest(what), self.http2() as wire:
                wire.send(*parts)
                got = wire.until(RST_STREAM, GOAWAY)
                self.assertEqual((got[0], got[2], int.from_bytes(got[3], 'big')), (RST_STREAM, 1, code), got)
                wire.send(frame(SETTINGS, 0, 0, b'\0\x04' + word(100)), headers(3))
                self.assertEqual(wire.answer(3)[0], 404)

    def test_what_comes_after_a_complete_exchange(self):
        block, closed, protocol = fields(), 5, 1
        for what, (code, part) in {
                '5.1 DATA': (closed, TEST), '5.1 HEADERS': (protocol, headers(1)),
                '5.1 CONTINUATION': (protocol, frame(CONTINUATION, 4, 1, block)),
                '5.1 PRIORITY': (None, frame(PRIORITY, 0, 1, word(0) + b'\xff')),
                '5.1 RST_STREAM': (None, CANCELLED),
                '5.1 WINDOW_UPDATE': (None, frame(WINDOW_UPDATE, 0, 1, word(1)))}.items():
            with self.subTest(what), self.http2() as wire:
                self.assertEqual(wire.ask(1)[0], 404)
                wire.send(part, frame(PING, 0, 0, b'question'))
                got = wire.until(GOAWAY, RST_STREAM, PING)
                self.assertEqual(got[0], GOAWAY if code else PING)
                if code:
                    self.assertEqual(got[3][4:8], word(code))

    def test_content_goes_as_the_windows_allow(self):
        for initial, more, lengths in (
                ([(4, 100), (4, 1)], [], [1]), ([(4, 0)], [settings((4, 1))], [1]),
                ([(4, 3)], [settings((4, 2)), frame(WINDOW_UPDATE, 0, 1, word(2))], [3, 1])):
            with self.subTest(initial), self.http2(grants=False) as wire:
                wire.send(settings(*initial), headers(1))
                if len(lengths) > 1:
                    self.assertEqual(len(wire.until(DATA)[3]), lengths.pop(0))
                wire.send(*more)
                self.assertEqual(len(wire.until(DATA)[3]), lengths[0])

    def test_one_request_more_than_allowed_is_refused(self):
        wire = self.http2(initial=0)
        most = wire.settings[3]
        wire.send(*[headers(number) for number in range(1, 2 * most + 2, 2)])
        got = wire.until(RST_STREAM)
        self.assertEqual((got[2], got[3]), (2 * most + 1, word(7)))
        wire.send(settings((4, 100)))
        ended = set()
        while len(ended) < most:
            kind, flags, number, _ = wire.until(DATA)
            if flags & END_STREAM:
                ended.add(number)


# ---- Streams ---------------------------------------------------------------------------------------

class RequestOfTest(unittest.TestCase):
    """From fields to a request (RFC 9113 8.1.1, 8.2 and 8.3)."""

    GET = ((':method', 'GET'), (':scheme', 'http'), (':path', '/x'), (':authority', 'host'))

    def test_a_request(self):
        self.assertEqual(restic_serve.request_of([*self.GET, ('accept', 'a'), ('accept', 'b')]),
                         ('GET', '/x', {'accept': 'a, b', 'host': 'host'}))

    def test_malformed_ones(self):
        for at, field in enumerate(self.GET[:3]):
            self.refuse(*self.GET[:at], *self.GET[at + 1:])         # one is missing
            self.refuse(*self.GET, field)                           # or stands twice
        for fields_of in ((('accept', 'a'), (':method', 'GET')), ((':status', '200'),), (('Accept', 'a'),),
                          (('connection', 'close'),), (('transfer-encoding', 'chunked'),), (('te', 'gzip'),),
                          (('te', 'trailers, deflate'),), (('a b', 'c'),), (('a', 'b\r\n'),),
                          (('a', 'b\r\nc: d'),), (('a', ' b'),), (('content-length', 'x'),),
                          (('content-length', '-1'),), (('host', 'other'),), ((':test', 'ok'),),
                          (('x: y\r\ntransfer-encoding', 'chunked'),), (('a: b\r\nx', 'y'),)):
            self.refuse(*self.GET, *fields_of)
        for name, value in ((':path', ''), (':path', 'x'), (':path', '/a HTTP/1.1\r\nX: y'), (':path', '/#'),
                            (':method', 'G T'), (':scheme', ''), (':scheme', '1'), (':scheme', 'ht\ntp'),
                            (':authority', 'a b')):
            self.refuse(*((one, value if one == name else old) for one, old in self.GET))
        restic_serve.request_of([*self.GET, ('te', 'trailers'), ('host', 'host'), ('x', '')])

    def refuse(self, *fields_of):
        error = raised(restic_serve.StreamError, restic_serve.request_of, list(fields_of))
        self.assertEqual(error.code.name, 'PROTOCOL_ERROR')


# ---- Http2 -----------------------------------------------------------------------------------------

class Http2Test(Http2TestCase):
    """Requests and answers."""

    def test_the_first_objects_leave_before_others_are_read(self):
        for over_http_2 in (False, True):
            go_on, waited = threading.Event(), []

            def objects(location, sizes, go_on=go_on, waited=waited):
                for number in range(2000):
                    if number == 1:
                        waited.append(go_on.wait(PATIENCE))
                    yield [f'{number:064x}'], [1]

            with mock.patch.object(restic_serve, 'FIRST_SECONDS', 0), \
                    mock.patch.object(self.store, 'objects', objects):
                wire = self.http2() if over_http_2 else self.connect()
                if over_http_2:
                    wire.send(headers(1, fields('GET', '/data/')))
                    self.assertEqual(wire.until(DATA)[3][:3], b'["0')
                    go_on.set()
                    while not wire.until(DATA)[1] & END_STREAM:
                        pass
                else:
                    wire.send(get('/data/'))
                    self.assertTrue(wire.file.readline().startswith(b'HTTP/1.1 200'))
                    go_on.set()
                    self.assertIn(b'0\r\n', iter(wire.file.readline, b''))
            self.assertEqual(waited, [True])

    def test_all_that_goes_over_http_1(self):
        wire = self.http2()
        number = -1
        for size in (0, 10, 5000, 3 << 20):
            content = os.urandom(size)
            path = f'/data/{named(content)}'
            number += 2
            if size:
                wire.upload(number, path, content, ('content-length', str(size)), step=1 << 20)
            else:
                wire.send(headers(number, fields('POST', path)))
            self.assertEqual(wire.answer(number)[0], 200)
            number += 2
            status, answer, got = wire.ask(number, 'GET', path)
            self.assertEqual((status, got, answer['content-length']), (200, content, str(size)))
        status, answer, got = wire.ask(21, 'GET', path, ('range', 'bytes=5-99999'))
        self.assertEqual((status, got), (206, content[5:100000]))
        self.assertEqual(answer['content-range'], f'bytes 5-99999/{3 << 20}')
        self.assertRegex(answer['date'], r'^\w{3}, \d\d \w{3} \d{4} ')
        status, answer, got = wire.ask(23, 'HEAD', path)
        self.assertEqual((status, answer['content-length'], got), (200, str(3 << 20), b''))
        self.assertEqual(len(json.loads(wire.ask(25, 'GET', '/data/', ('accept', V2))[2])), 4)
        self.assertEqual(wire.ask(27, 'HEAD', '/data/')[::2], (200, b''))
        self.assertEqual(wire.ask(29, 'DELETE', path)[0], 200)
        self.assertEqual(wire.ask(31, 'GET', path)[0], 404)

    def test_the_window_is_open_until_content_has_ended(self):
        """nghttp2, and so Node, sends even an empty last frame only into an open window."""
        for size in (65535, restic_serve.READ_WINDOW, (10 << 20) + 1):
            content, wire = os.urandom(size), self.http2()
            wire.send(headers(1, fields('POST', f'/data/{named(content)}', ('content-length', str(size))), 4))
            wire.send_content(1, content, last=False)
            while wire.windows[1] <= 0:
                wire.next()
            wire.send(frame(DATA, END_STREAM, 1))
            self.assertEqual(wire.answer()[0], 200)

    def test_an_upload_without_length_or_with_padding_goes_on_past_its_window(self):
        for step, more, padding in ((100_000, [], b''),
                                    (1000, [('content-length', str(3 << 20))], bytes(255))):
            content = os.urandom(3 << 20)
            wire = self.http2()
            wire.send(headers(1, fields('POST', f'/data/{named(content)}', *more), 4))
            for at in range(0, len(content), step):
                part = content[at:at + step]
                part = bytes([len(padding)]) + part + padding if padding else part
                while min(wire.windows[1], wire.window) < len(part):
                    wire.next()
                wire.windows[1] -= len(part)
                wire.window -= len(part)
                wire.send(frame(DATA, (PADDED if padding else 0) | (at + step >= len(content)), 1, part))
            self.assertEqual(wire.answer()[0], 200)

    def test_64_stalled_requests_hold_up_nobody(self):
        content = os.urandom(4 << 20)
        path = self.put(content)
        descriptors = len(os.listdir('/proc/self/fd')) if os.path.isdir('/proc/self/fd') else None
        wire = self.http2(grants=False, initial=1000)
        for number in range(1, 128, 4):
            wire.send(headers(number, fields('GET', path)))
            upload = os.urandom(100_000)
            wire.send(headers(number + 2, fields('POST', f'/data/{named(upload)}'), 4))
            wire.send_content(number + 2, upload[:50_000], last=False)
        wire.ping()
        self.assertEqual(wire.ask(201, 'GET', '/none')[0], 404)
        wire.send_content(127, upload[50_000:])  # the last of the uploads goes on
        self.assertEqual(wire.answer(127)[0], 200)
        for number in range(1, 126, 2):
            wire.send(frame(RST_STREAM, 0, number, word(8)))
        if descriptors:
            self.wait_until(lambda: len(os.listdir('/proc/self/fd')) <= descriptors + 6, 'files to be closed')
        self.assertEqual(wire.ask(203, 'GET', path, ('range', 'bytes=0-99'))[2], content[:100])

    def test_many_requests_share_the_window_of_the_connection(self):
        contents = [os.urandom(300_000) for _ in range(20)]
        paths = [self.put(content) for content in contents]
        wire = self.http2()
        wire.send(*[headers(2 * number + 1, fields('GET', path)) for number, path in enumerate(paths)])
        got = dict.fromkeys(range(1, 40, 2), b'')
        left = set(got)
        while left:
            _, flags, number, payload = wire.until(DATA)
            got[number] += payload
            self.assertLessEqual(len(payload), 16384)
            if flags & END_STREAM:
                left.remove(number)
        self.assertEqual([got[2 * number + 1] for number in range(20)], contents)

    def test_an_upload_that_is_reset_leaves_nothing_and_is_logged(self):
        content = os.urandom(100_000)
        wire = self.http2()
        with self.assertLogs(restic_serve.access_log, logging.INFO) as logs:
            wire.send(headers(1, fields('POST', f'/data/{named(content)}'), 4),
                      frame(DATA, 0, 1, content[:50_000]), CANCELLED)
            self.wait_until(lambda: logs.output, 'its line')
        self.assertIn(f'"POST /data/{named(content)} HTTP/2.0" 499', logs.output[0])
        self.assertEqual(self.files(), [])

    def test_100_continue_comes_when_the_content_is_wanted(self):
        content = os.urandom(1000)
        wire = self.http2()
        expect = ('expect', '100-continue')
        wire.send(headers(1, fields('POST', f'/data/{named(content)}', expect), 4))
        self.assertEqual(wire.answer()[0], 100)
        wire.send(frame(DATA, 1, 1, content))
        self.assertEqual(wire.answer()[0], 200)
        wire.send(headers(3, fields('POST', '/nothing', expect), 4))
        self.assertEqual(wire.answer(3)[0], 400)
        wire.send(headers(5, fields('POST', '/nothing', ('expect', 'x')), 4))
        self.assertEqual(wire.answer(5)[0], 417)

    def test_content_that_nobody_wants_is_not_asked_for(self):
        wire = self.http2()
        wire.send(headers(1, fields('POST', '/nothing', ('content-length', '99999999')), 4))
        self.assertEqual(wire.answer()[0], 400)
        self.assertEqual(wire.until(RST_STREAM)[3], word(0))
        wire.send(frame(DATA, 0, 1, b'on its way'), headers(3))
        self.assertEqual(wire.answer(3)[0], 404)

    def test_an_answer_that_cannot_be_finished_is_reset(self):
        path = self.put(os.urandom(1 << 20))
        wire = self.http2(grants=False)
        wire.send(headers(1, fields('GET', path)))
        wire.until(DATA)
        os.truncate(f'{self.root}{path[:6]}{path[6:8]}/{path[6:]}', 1000)
        wire.send(frame(WINDOW_UPDATE, 0, 0, word(1 << 20)), frame(WINDOW_UPDATE, 0, 1, word(1 << 20)))
        self.assertEqual(wire.until(RST_STREAM)[3], word(2))
        self.assertEqual(wire.ask(3)[0], 404)
        self.assertTrue(any('response aborted' in line for line in self.log))

    def test_a_request_that_is_answered_makes_room_for_another_at_once(self):
        wire, go_on = self.http2(), threading.Event()
        self.addCleanup(go_on.set)
        finish = Api.finish

        def slowly(*words):
            finish(*words)
            go_on.wait(PATIENCE)

        with mock.patch.object(Api, 'finish', slowly):
            for number in range(1, 400, 2):
                wire.send(headers(number))
                if number < 2 * restic_serve.STREAMS + 1:
                    self.assertEqual(wire.answer(number)[0], 404)
            self.assertEqual(wire.answer(399)[0], 404)
            go_on.set()

    def test_headers_are_not_held_back_by_the_windows_of_content(self):
        path = self.put(bytes(1 << 20))
        wire = self.http2(grants=False)
        wire.send(*[headers(number, fields('GET', path)) for number in range(1, 41, 2)])
        self.assertEqual(len({wire.until(HEADERS)[2] for _ in range(20)}), 20)

    def test_a_fault_of_the_program_in_an_answer_resets_it(self):
        def faulty(*words):
            yield ['0' * 64] * 1000, [1] * 1000
            yield ['0' * 64] * 1000, [1] * 1000
            raise ValueError('made by a test')

        with mock.patch.object(self.store, 'objects', faulty):
            self.assertEqual(self.http2(initial=1 << 20).ask(1, 'GET', '/data/'), 2)  # INTERNAL_ERROR
        self.assertIn('made by a test', self.log[-1])

    def test_a_refusal_of_head_has_no_content(self):
        status, _, content = self.http2().ask(1, 'HEAD', '/', ('x', 'y' * 5000))
        self.assertEqual((status, content), (431, b''))

    def test_padding_opens_no_window_of_what_was_answered(self):
        wire = self.http2()
        wire.send(headers(1, fields('POST', '/../config'), 4))
        self.assertEqual(wire.answer()[0], 400)
        padded = bytes([255]) + bytes(1000) + bytes(255)
        wire.send(*[frame(DATA, PADDED, 1, padded)] * 600, frame(PING, 0, 0, bytes(8)))
        for kind, _, number, _ in iter(wire.next, None):
            self.assertNotEqual((kind, number), (WINDOW_UPDATE, 1))
            if kind == PING:
                break

    def test_as_long_a_header_as_is_allowed_may_come_in_one_frame(self):
        self.server = self.serve(Api(self.store, self.policy), Limits(header_bytes=65536))
        self.port = self.server.listeners[0].server_address[1]
        self.assertEqual(self.http2().ask(1, 'GET', '/', ('x', 'y' * 60000))[0], 404)


class Http2AbuseTest(Http2TestCase):
    def test_a_header_block_that_never_ends(self):
        wire = self.http2()
        wire.send(headers(1, b'', 1), frame(CONTINUATION, 0, 1, b'\0\x01a\x01b' * 2000) * 20)
        self.assertEqual(wire.until(GOAWAY)[3][4:8], word(11))

    def test_a_client_that_asks_and_does_not_read(self):
        wire, unsent = self.http2(grants=False), memoryview(frame(PING, 0, 0, bytes(8)) * 100_000)
        wire.sock.settimeout(1)     # of a server that takes no more
        with mock.patch.object(restic_serve, 'UNREAD_BYTES', 10_000):
            with contextlib.suppress(TimeoutError, socket.timeout):
                while unsent:
                    unsent = unsent[wire.sock.send(unsent):]
            wire.sock.settimeout(PATIENCE)
            self.assertEqual(wire.until(GOAWAY)[3][4:8], word(11))

    def hold(self):
        """Have no request answered, and no content read, before the test's end."""
        held = threading.Event()
        patch_for(self, Api, handle=lambda api, request: held.wait() and restic_serve.text_response(200, ''))
        self.addCleanup(held.set)

    def test_content_past_the_windows(self):
        wire = self.http2()
        self.hold()
        last = 2 * (restic_serve.CONNECTION_WINDOW // restic_serve.READ_WINDOW) + 1
        wire.send(*[headers(number, fields('POST'), 4) + frame(DATA, 0, number, bytes(1 << 20)) * 4
                    for number in range(1, last, 2)],
                  headers(last, fields('POST'), 4), frame(DATA, 0, last, b'x'))
        self.assertEqual(wire.until(GOAWAY)[3][4:8], word(3))

    def test_content_past_the_window_of_a_stream(self):
        wire = self.http2()
        self.hold()
        wire.send(headers(3, fields('POST', '/'), 4), frame(DATA, 0, 3, bytes(1 << 20)) * 4,
                  frame(DATA, 0, 3, b'x'))
        self.assertEqual(wire.until(RST_STREAM)[2:], (3, word(3)))

    def test_uploads_that_are_cancelled_take_nothing_with_them(self):
        wire = self.http2()
        for number in range(1, 400, 2):
            wire.send(headers(number, fields('POST', f'/data/{"0" * 64}'), 4),
                      frame(RST_STREAM, 0, number, word(8)))
        content = os.urandom(3 << 20)
        wire.upload(1001, f'/data/{named(content)}', content)
        self.assertEqual(wire.answer(1001)[0], 200)

    def test_header_bombs_are_431_and_cost_no_memory(self):
        wire = self.http2()
        wire.send(headers(1, fields() + b'\x40\x01a\x7f\xa1\x1e' + b'x' * 4000 + b'\xbe' * 10000))
        status, _, content = wire.answer()
        self.assertEqual((status, content), (431, b'header is longer than 4096 bytes\n'))
        for number, block, expected in ((3, b'\x82\x86\x84\xbe', 431), (5, fields(), 404)):
            wire.send(headers(number, block))  # the table is what the client thinks
            self.assertEqual(wire.answer(number)[0], expected)

    def test_what_is_ignored_after_a_reset_costs_the_windows_nothing(self):
        wire = self.http2()
        for number in range(1, 200, 2):
            wire.send(headers(number, fields('POST', '/', ('content-length', '1')), 4))
            while wire.window < 300_000:
                wire.next()
            wire.window -= 300_000
            wire.send(frame(DATA, 0, number, bytes(300_000)))
        self.assertEqual(wire.ask(201)[0], 404)

    def test_content_that_comes_after_its_answer_costs_the_windows_nothing(self):
        wire = self.http2(grants=False)
        content = frame(DATA, 1, 1, bytes(40_000))
        for number in range(1, 1001, 2):
            while wire.window < 40_000:
                wire.next()
            wire.window -= 40_000
            wire.send(headers(number, fields('POST', '/nothing', ('content-length', '40000')), 4),
                      frame(DATA, 1, number, bytes(40_000))[:-20_000])
            self.assertEqual(wire.answer(number)[0], 400)
            wire.send(content[-20_000:])
        wire.ping()
        whole = restic_serve.CONNECTION_WINDOW
        self.assertIn(wire.window, range(whole // 2, whole + 1))

    def test_a_reset_in_the_middle_of_a_frame_ends_nothing_else(self):
        with mock.patch.object(restic_serve, 'LINGER_SECONDS', 0.1):
            wire = self.http2(grants=False)
            content = frame(DATA, 1, 1, bytes(1000))
            wire.send(headers(1, fields('POST'), 4), content[:-5])
            self.assertEqual(wire.answer()[0], 400)
            self.assertEqual(wire.until(RST_STREAM)[3], word(0))
            wire.send(content[-5:], headers(3))
            self.assertEqual(wire.answer(3)[0], 404)

    def test_without_another_thread_a_request_is_refused_and_the_connection_goes_on(self):
        wire = self.http2(initial=0)
        with mock.patch.object(threading.Thread, 'start', side_effect=RuntimeError("can't start")):
            wire.send(headers(1), headers(3))   # one thread may be left of what the preface took
            self.assertEqual(wire.until(RST_STREAM)[3], word(7))
        wire.send(settings((4, 100)), headers(5))
        self.assertEqual(wire.answer(5)[0], 404)

    def test_a_reset_download_gives_the_window_back_once(self):
        path = self.put(os.urandom(1 << 20))
        wire = self.http2(grants=False)
        total = 0
        for number in range(1, 20, 2):
            wire.send(headers(number, fields('GET', path)))
            total += len(wire.until(DATA)[3])
            wire.send(frame(RST_STREAM, 0, number, word(8)), frame(PING, 0, 0, bytes(8)))
            while True:
                kind, _, _, payload = wire.until(DATA, PING)
                if kind == PING:
                    break
                total += len(payload)
            self.assertLessEqual(total, 65535)
            if total > 60_000:
                break
            wire.send(frame(WINDOW_UPDATE, 0, 0, word(1)))
            total -= 1


class Http2TimeLimitTest(Http2TestCase):
    limits = {'header_seconds': 0.3, 'idle_seconds': 0.3, 'read_seconds': 0.3, 'write_seconds': 0.3}

    def test_a_slow_upload_is_408(self):
        wire = self.http2()
        wire.send(headers(1, fields('POST', f'/data/{"0" * 64}'), 4), frame(DATA, 0, 1, b'x'))
        self.assertEqual(wire.answer()[0], 408)
        self.assertEqual(self.files(), [])

    def test_a_download_that_is_not_read_is_reset(self):
        path = self.put(os.urandom(1 << 20))
        wire = self.http2(grants=False)
        wire.send(headers(1, fields('GET', path)))
        self.assertEqual(wire.until(RST_STREAM)[3], word(8))
        wire.send(frame(WINDOW_UPDATE, 0, 0, word(1000)), headers(3))
        self.assertEqual(wire.answer(3)[0], 404)


class StallTest(Http2TestCase):
    """An upload or a download of which no byte moves ends, and is counted and told of."""

    limits = {'stall_seconds': 0.4}

    def setUp(self):
        super().setUp()
        self.server.sweep_seconds = 0.02
        self.metrics = self.server.api.metrics

    def limited(self):
        return {key[1]: row[0] for key, row in self.metrics.counters.find('limited').items()}

    def wait_for_end(self, limit):
        self.wait_until(lambda: self.limited() == {limit: 1}, limit)
        self.wait_until(lambda: any(line.startswith(f'{limit}: closed or rejected 1, from 127.0.0.1 (1)')
                                    for line in self.log), 'the log line')

    def test_a_download_that_is_not_read(self):
        path = self.put(bytes(64 << 20))
        wire = self.connect()
        wire.send(get(path))
        self.wait_for_end('stalled downloads')
        self.wait_until(lambda: not self.server.served, 'its end')
        with self.assertRaises((AssertionError, ConnectionResetError)):
            self.assertEqual(len(wire.answer()[2]), 64 << 20)

    def test_a_client_that_asks_on_and_on_and_reads_nothing(self):
        path = self.put(bytes(50_000))
        wire = self.connect()
        with contextlib.suppress(ConnectionError, BlockingIOError):
            wire.sock.setblocking(False)
            for _ in range(1000):
                wire.sock.send(get(path))
        self.wait_for_end('stalled downloads')

    def test_a_reader_who_stops_is_found_out_a_quarter_late_at_the_most(self):
        late, content = BlockingIOError(errno.EAGAIN, 'late'), restic_serve.FileSlice(-1, 0, 1000)
        for is_file in (False, True):
            send = mock.Mock(side_effect=[late] * 3 + [10] + [late] * 4)    # the kernel ends a call each time
            sock = mock.Mock(send=send, fileno=lambda: 1)
            transport = restic_serve.SocketTransport(sock, 60)
            with mock.patch.object(os, 'sendfile', send, create=True), self.assertRaises(BlockingIOError):
                while is_file:
                    transport.send_file(content, 100)
                transport.send(bytes(1000))
            self.assertEqual(send.call_count, 8)
            self.assertEqual(struct.unpack('@ll', sock.setsockopt.call_args[0][2])[0], 15)

    def test_a_download_over_tls(self):
        authority = Authority(self.folder, 'server')
        server = self.serve(self.server.api, self.server.limits, certificates=authority.certificates())
        path = self.put(bytes(64 << 20))
        context = ssl.create_default_context(cafile=str(authority.path))
        with socket.create_connection(server.listeners[0].server_address, PATIENCE) as sock, \
                context.wrap_socket(sock, server_hostname='localhost') as wire:
            wire.sendall(get(path))
            self.wait_for_end('stalled downloads')

    def test_an_upload_that_stops(self):
        path = f'/data/{"0" * 64}'
        for request in (post(path, b'x' * 100_000, length=1 << 20), f'POST {path} HTTP/1.1\r\nHost: x\r\n'
                        'Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n'):
            wire = self.connect()
            self.assertEqual(wire.ask(request)[0], 408)
            self.assertTrue(wire.is_closed())
            self.assertEqual(self.files(), [])
        self.wait_until(lambda: self.limited() == {'stalled uploads': 2}, 'both')

    def test_an_upload_over_http_2_that_stops(self):
        wire = self.http2()
        wire.send(headers(1, fields('POST', f'/data/{"0" * 64}'), 4), frame(DATA, 0, 1, b'x'))
        self.assertEqual(wire.answer()[0], 408)
        self.wait_for_end('stalled uploads')
        self.assertEqual(wire.ask(3)[0], 404)  # the connection goes on

    def test_a_download_over_http_2_without_a_window(self):
        path = self.put(os.urandom(1 << 20))
        wire = self.http2(grants=False, initial=0)
        wire.send(headers(1, fields('GET', path)))
        self.assertEqual(wire.until(RST_STREAM)[3], word(8))
        self.wait_for_end('stalled downloads')

    def test_who_goes_on_slowly_is_not_stalled(self):
        content, long = os.urandom(100), os.urandom(50_000)
        wire, other, third = self.connect(), self.http2(grants=False, initial=0), self.http2()
        self.server.limits.stall_seconds = 1
        download = self.put(os.urandom(20))
        wire.send(post(f'/data/{named(content)}', b'', length=len(content)))
        other.send(frame(WINDOW_UPDATE, 0, 0, word(TOP - 65535)), headers(1, fields('GET', download)))
        third.send(headers(1, fields('POST', f'/data/{named(long)}'), 4))
        data = frame(DATA, END_STREAM, 1, long)     # one long frame
        begin = time.monotonic()
        for at in range(10):
            wire.send(content[10 * at:][:10])
            other.send(frame(WINDOW_UPDATE, 0, 1, word(2)))
            third.send(data[5001 * at:][:5001])
            select_readable(wire.sock, 0.12)
        self.assertEqual((wire.answer()[0], third.answer()[0]), (200, 200))
        self.assertEqual(len(other.answer()[2]), 20)
        self.assertGreater(time.monotonic() - begin, 1)
        self.assertEqual(self.limited(), {})

    def test_who_is_between_two_requests_is_not_stalled(self):
        self.server.limits.stall_seconds = 0.05
        wire = self.connect()
        for _ in range(3):
            self.assertEqual(wire.ask(get('/config'))[0], 404)
            select_readable(wire.sock, 0.15)
        self.assertEqual(self.limited(), {})

    def test_short_answers_that_nobody_takes_are_reset(self):
        wire = self.http2(grants=False, initial=0)
        wire.send(*[headers(number) for number in range(1, 20, 2)])
        reset = {wire.until(RST_STREAM)[2] for _ in range(10)}
        self.assertEqual(reset, set(range(1, 20, 2)))
        wire.send(settings((4, 100)), headers(21))
        self.assertEqual(wire.answer(21)[0], 404)

    def test_connections_find_out_that_the_other_end_has_gone(self):
        self.connect()
        self.wait_until(lambda: self.server.served, 'a connection')
        sock = self.server.served.copy().pop()._transport._sock
        self.assertTrue(sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
        if hasattr(socket, 'TCP_KEEPIDLE'):
            for name, value in (('TCP_KEEPIDLE', 15), ('TCP_KEEPINTVL', 15), ('TCP_KEEPCNT', 9)):
                self.assertEqual(sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)), value)

    def test_what_comes_within_the_minute_is_told_when_it_is_over(self):
        with mock.patch.object(restic_serve, 'LIMITED_SECONDS', 0.3):
            for _ in range(2):
                self.metrics.count_limited('y', '10.0.0.1')
                self.server.loop.wake()
                self.wait_until(lambda: not restic_serve.refusals._counted, 'a line')
        self.assertEqual(len([line for line in self.log if line.startswith('y: closed or rejected 1,')]), 2)


# ---- Loop ------------------------------------------------------------------------------------------

class LoopTest(unittest.TestCase):
    """What the main thread waits for."""

    def setUp(self):
        self.loop = restic_serve.Loop()
        self.addCleanup(self.loop.close)

    def test_what_can_be_read_is_told_of_until_it_is_watched_no_more(self):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            heard, turns = [], iter((False, True))
            self.loop.watch(ours, lambda: heard.append(ours.recv(1)))
            theirs.send(b'ab')
            self.loop.run(lambda: heard == [b'a', b'b'])
            self.loop.unwatch(ours)
            self.loop.unwatch(ours)
            theirs.send(b'c')
            self.loop.wake()
            self.loop.run(lambda: next(turns))
            self.assertEqual(heard, [b'a', b'b'])

    def test_it_waits_for_the_first_timer_as_long_as_poll_can_and_for_ever_without_any(self):
        waits, expected = [], [None, 2.0, 0, 86400, None]
        self.loop._selector.close()
        self.loop._selector = mock.Mock(select=lambda wait: waits.append(wait) or [])
        for timers in ((math.inf,), (3.0, 2.0, math.inf), (-1.0, 5.0), (30 * 86400.0,), ()):
            self.loop.timers = [functools.partial(float, seconds) for seconds in timers]
            self.loop.run(functools.partial(lambda before: len(waits) > before, len(waits)))
        self.assertEqual(waits, expected)


# ---- Listeners -------------------------------------------------------------------------------------

class UnixSocketTest(ListenerTestCase):
    def setUp(self):
        super().setUp()
        self.path = self.folder / 'socket'

    def test_only_the_user_may_connect_and_the_group_if_the_umask_lets_it(self):
        self.addCleanup(os.umask, os.umask(0))
        for umask, shared, mode in ((0o022, False, 0o600), (0o077, False, 0o600), (0o007, False, 0o660),
                                    (0o002, False, 0o660), (0o077, True, 0o660)):
            os.umask(umask)
            restic_serve.listen(restic_serve.parse_address(str(self.path)), shared).close()
            self.assertEqual(os.umask(umask), umask)
            self.assertEqual(stat.S_IMODE(self.path.stat().st_mode), mode, oct(umask))
            self.path.unlink()

    def test_the_socket_of_a_dead_server_is_replaced(self):
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as sock:
            sock.bind(str(self.path))
        self.start(str(self.path))
        self.assertEqual(self.ask_unix(self.path), 404)

    def test_a_socket_that_is_answered_is_in_use(self):
        self.start(str(self.path))
        with self.assertRaisesRegex(OSError, f'--addr {self.path}: Address already in use'):
            self.start('127.0.0.1:0', str(self.path))
        self.assertEqual(self.ask_unix(self.path), 404)

    def test_what_is_no_socket_is_never_replaced(self):
        self.path.write_text('precious')
        self.assertRaisesRegex(OSError, 'already in use', self.start, str(self.path))
        self.assertEqual(self.path.read_text(), 'precious')

    def test_the_socket_is_removed_at_the_end_but_not_that_of_another_server(self):
        server = self.start(str(self.path))
        self.path.unlink()
        second = self.start(str(self.path))
        server.stop()
        self.wait_until(lambda: server.listeners[0].socket.fileno() < 0, 'the end of the first')
        self.assertEqual(self.ask_unix(self.path), 404)
        second.stop()
        self.wait_until(lambda: not self.path.exists(), 'the end of the socket')


@unittest.skipUnless(ssl, 'this Python has no ssl')
class TlsTest(ListenerTestCase):
    def setUp(self):
        super().setUp()
        self.authority = Authority(self.folder, 'server')

    def start_tls(self, **more):
        server = self.start('127.0.0.1:0', certificates=self.authority.certificates(**more))
        return server.listeners[0].server_address[1]

    def test_http_without_tls_is_told_what_is_spoken(self):
        port = self.start_tls()
        self.log.clear()
        for _ in range(3):
            status, _, content = self.ask(get('/config'), port=port)
            self.assertEqual((status, content), (400, b'this port speaks HTTPS\n'))
        self.wait_until(lambda: len(self.log) == 3, 'the lines')
        self.assertEqual(set(self.log), {'127.0.0.1: TLS: client speaks HTTP without TLS'})

    def test_a_handshake_that_fails_is_said_with_its_reason(self):
        port = self.start_tls(client_ca=str(self.authority.path))
        self.log.clear()
        with contextlib.suppress(OSError), self.connect_tls(port) as wire:
            wire.ask(get('/config'))
        self.wait_until(lambda: self.log, 'the line')
        self.assertIn('127.0.0.1: TLS: peer did not return a certificate', self.log[0])

    def connect_tls(self, port, client=None):
        context = ssl.create_default_context(cafile=str(self.authority.path))
        if client:
            context.load_cert_chain(str(self.folder / f'{client}.both'))
        wire = Wire(port)
        wire.file.close()
        wire.sock = context.wrap_socket(wire.sock, server_hostname='localhost')
        wire.file = wire.sock.makefile('rb')
        self.addCleanup(wire.__exit__)
        return wire

    def test_http_2_is_not_offered_and_is_505(self):
        port = self.start_tls()
        context = ssl.create_default_context(cafile=str(self.authority.path))
        for offered, selected in ((['h2', 'http/1.1'], 'http/1.1'), (['h2'], None)):
            context.set_alpn_protocols(offered)
            with Wire(port) as wire, context.wrap_socket(wire.sock, server_hostname='localhost') as sock:
                self.assertEqual(sock.selected_alpn_protocol(), selected)
                sock.sendall(restic_serve.PREFACE + settings())
                self.assertTrue(sock.recv(1000).startswith(b'HTTP/1.1 505 '))

    def serial(self, port):
        return int(self.connect_tls(port).sock.getpeercert()['serialNumber'], 16)

    def test_all_that_goes_over_http_goes_over_tls(self):
        wire = self.connect_tls(self.start_tls())
        for size in (0, 10, 5000, 3 << 20):
            content = os.urandom(size)
            path = f'/data/{named(content)}'
            self.assertEqual(wire.ask(post(path, content))[0], 200)
            self.assertEqual(wire.ask(get(path))[2], content)
        self.assertEqual(wire.ask(get(path, 'Range: bytes=5-9'))[2], content[5:10])
        self.assertEqual(len(json.loads(wire.ask(get('/data/'))[2])), 4)
        status, _, data = wire.ask('GET /data/ HTTP/1.0\r\n\r\n')
        self.assertEqual((status, len(json.loads(data))), (200, 4))
        self.assertTrue(wire.is_closed())

    def test_a_refusal_reaches_a_client_that_is_still_sending(self):
        wire = self.connect_tls(self.start_tls())
        wire.send(post('/data/', b'', length=4 << 20), bytes(4 << 20))
        self.assertEqual(wire.answer()[0], 405)

    def test_a_scheme_says_which_address_speaks_what(self):
        server = self.start('http://127.0.0.1:0', 'tls://127.0.0.1:0', '127.0.0.1:0',
                            str(self.folder / 'socket'), certificates=self.authority.certificates())
        ports = [listener.server_address[1] for listener in server.listeners[:3]]
        self.assertEqual(self.ask(get('/config'), port=ports[0])[0], 404)
        for port in ports[1:]:
            self.assertEqual(self.connect_tls(port).ask(get('/config'))[0], 404)
        self.assertEqual(self.ask_unix(self.folder / 'socket'), 404)

    def test_a_silent_client_keeps_nobody_waiting_and_is_dropped(self):
        self.server.limits.header_seconds = 0.3
        server = self.start('127.0.0.1:0', certificates=self.authority.certificates())
        port = server.listeners[0].server_address[1]
        silent = [Wire(port) for _ in range(20)]
        self.assertEqual(self.connect_tls(port).ask(get('/config'))[0], 404)
        for wire in silent:
            wire.file.read()  # an alert perhaps, and the end
            wire.__exit__()

    def test_clients_without_a_good_certificate_get_no_answer(self):
        port = self.start_tls(client_ca=str(self.authority.path))
        self.authority.issue('client', 'alice')
        self.assertEqual(self.connect_tls(port, 'client').ask(get('/config'))[0], 404)
        Authority(self.folder / 'other').issue('client', 'alice')
        (self.folder / 'other/client.both').rename(self.folder / 'bad.both')
        for client in (None, 'bad'):
            with self.assertRaises((ssl.SSLError, ConnectionError, TypeError)):
                self.connect_tls(port, client).ask(get('/config'))[0]

    def test_the_name_in_a_clients_certificate_is_its_user(self):
        self.policy.rights = short_rights(private=True)
        port = self.start_tls(client_ca=str(self.authority.path))
        self.store.create_repository('/alice')
        for subject, status in (('alice', 200), ('alice+UID=4711', 200),    # beside others in one set, too
                                ('bob/CN=alice', 403), ('alice+CN=bob', 403)):  # of several names none counts
            self.authority.issue('client', subject)
            wire = self.connect_tls(port, 'client')
            self.assertEqual([wire.ask(get(path))[0] for path in ('/alice/keys/', '/bob/keys/', '/keys/')],
                             [status, 403, 403], subject)

    def test_connections_end_when_their_authority_does(self):
        with mock.patch.object(restic_serve, 'LOOK_SECONDS', 0.01):
            server = self.start('127.0.0.1:0', certificates=self.authority.certificates(
                client_ca=str(self.authority.path)))
            server.sweep_seconds = 0.02
            port = server.listeners[0].server_address[1]
            self.authority.issue('client', 'alice')
            wire = self.connect_tls(port, 'client')
            self.assertEqual(wire.ask(get('/config'))[0], 404)
            self.authority.issue('server')      # a new certificate of ours changes nothing
            os.utime(self.authority.path)
            self.wait_until(lambda: 'loaded certificate' in ''.join(self.log), 'the server to read it')
            self.assertEqual(wire.ask(get('/config'))[0], 404)
            self.authority.path.write_text(Authority(self.folder / 'other').path.read_text())
            self.assertTrue(wire.is_closed())
            self.assertIn('the client CA has changed', self.log[-1])

    def test_a_renewed_certificate_is_used_for_the_next_connection(self):
        certificates = self.authority.certificates()
        port = self.start('127.0.0.1:0', certificates=certificates).listeners[0].server_address[1]

        def serial_after(looks):
            for _ in range(looks):
                certificates.look(force=True)
            return self.serial(port)

        before = self.connect_tls(port)
        self.assertEqual(self.serial(port), 1)
        self.authority.issue('server')
        self.assertEqual(serial_after(1), 2)
        self.assertEqual(before.ask(get('/config'))[0], 404)
        self.log.clear()
        (self.folder / 'server.pem').write_text('nonsense\n')
        self.assertEqual(serial_after(2), 2)
        self.assertIn('server.pem, keeping the previous one: --cert: no PEM certificate in ', self.log[0])
        self.authority.issue('server')
        self.assertEqual(serial_after(1), 3)

    def test_a_certificate_whose_key_comes_a_moment_later_is_no_error(self):
        certificates = self.authority.certificates()
        old_key = (self.folder / 'server.key').read_bytes()
        self.authority.issue('server')
        for key in (old_key, (self.folder / 'server.key').read_bytes()):
            (self.folder / 'server.key').write_bytes(key)
            certificates.look(force=True)
        self.assertEqual(self.log[1:], [f'loaded certificate {self.folder}/server.pem'])

    def s_client(self, port, *words):
        """What openssl says of a connection that it has made."""
        return subprocess.run(
            [self.authority.openssl, 's_client', '-connect', f'127.0.0.1:{port}', *words,
             '-CAfile', str(self.authority.path)], input='', capture_output=True, text=True)

    def test_versions(self):
        """The default is the library's policy; a version that is given is made to work."""
        versions = {'tls1.0': '-tls1', 'tls1.1': '-tls1_1', 'tls1.2': '-tls1_2', 'tls1.3': '-tls1_3'}
        for minimum in ('', *versions):
            port = self.start_tls(minimum=minimum)
            for version, word in versions.items():
                done = self.s_client(port, word, '-cipher', 'DEFAULT:@SECLEVEL=0')
                spoken = done.returncode == 0 and 'Cipher is (NONE)' not in done.stdout
                self.assertEqual(spoken, version >= (minimum or 'tls1.2'), (minimum, version, done.stdout))

    def test_the_client_chooses_among_the_ciphers(self):
        port = self.start_tls()
        for first, then in itertools.permutations(('TLS_AES_128_GCM_SHA256', 'TLS_AES_256_GCM_SHA384')):
            done = self.s_client(port, '-ciphersuites', f'{first}:{then}')
            # Before 3.10 there are weaker ones on the list, and the server chooses.
            self.assertIn(f'Cipher is {first if sys.version_info >= (3, 10) else "TLS_"}', done.stdout)

    def test_keys_change_while_requests_go_on(self):
        content = os.urandom(100_000)
        path = self.put(content)
        with subprocess.Popen(
                [self.authority.openssl, 's_client', '-connect', f'127.0.0.1:{self.start_tls()}', '-tls1_3',
                 '-CAfile', str(self.authority.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT) as client:
            for line in iter(client.stdout.readline, b''):
                if line.startswith((b'Verify return code', b'---')):
                    break
            for _ in range(3):  # RFC 8446 4.6.3: K asks for the server's new keys, too
                client.stdin.write(b'K\n')
                client.stdin.flush()
                for line in iter(client.stdout.readline, b''):
                    if line.startswith(b'KEYUPDATE'):
                        break
                client.stdin.write(get(path))
                client.stdin.flush()
                received = b''
                while not received.endswith(content):
                    part = os.read(client.stdout.fileno(), 65536)
                    self.assertTrue(part, received[:1000])
                    received += part
            client.stdin.close()

    def test_sighup_reads_certificates_users_and_rights_again(self):
        users, rights = self.folder / 'users', self.folder / 'rights'
        users.write_text(f'alice:{sha("a")}\n')
        rights.write_text('* / read\n')
        with Program('--addr', '127.0.0.1:0', *self.authority.words('server'), '--htpasswd', users,
                     '--rights', rights, self.root) as server:
            self.assertTrue(server.url.startswith('https://'))
            self.assertEqual(self.serial(server.port), 1)
            self.authority.issue('server')
            server.process.send_signal(signal.SIGHUP)
            # By each worker for itself.
            self.wait_until(lambda: self.serial(server.port) == 2, 'the new certificate')
            for line in ('loaded certificate', 'read 1 user', 'read 1 rule'):   # changed or not
                self.wait_for_line(server, line)


# ---- Server ----------------------------------------------------------------------------------------

class StatsLogTest(unittest.TestCase):
    """When a line about what was done may come."""

    def setUp(self):
        self.clock = Clock()
        self.metrics = mock.Mock(**{'has_news.return_value': False})
        self.stats = restic_serve.StatsLog(self.metrics, 60)

    def tick(self, active=False, after=0.0):
        self.clock.now += after
        with mock.patch.object(time, 'monotonic', lambda: self.clock.now):
            return self.stats.tick(active)

    def test_an_idle_server_sleeps_and_so_do_workers_whose_parent_logs(self):
        self.assertEqual(self.tick(), math.inf)
        self.stats = restic_serve.StatsLog(self.metrics, math.inf)
        self.assertEqual(self.tick(active=True), math.inf)

    def test_the_time_of_a_line_begins_with_what_is_done(self):
        self.assertEqual(self.tick(active=True, after=1000), 60)
        self.metrics.begin_period.assert_called_once()
        self.metrics.has_news.return_value = True
        self.assertEqual(self.tick(after=20), 40)
        self.metrics.line.assert_not_called()
        self.metrics.has_news.side_effect = [True, True, *4 * [False]]  # when the line is out, no more
        self.assertEqual(self.tick(after=40), math.inf)
        self.metrics.line.assert_called_once()
        self.assertEqual([self.tick(active=True, after=60) for _ in range(2)], [60, 60])
        self.metrics.line.assert_called_once()      # nothing was done


class SharesTest(WireTestCase):
    """One address has a part of the places, and no more."""

    def setUp(self):
        super().setUp()
        with_distinct_shares(self)

    def test_an_address_has_its_share_of_the_connections(self):
        server = self.serve(self.server.api, max_connections=100, per_address=3)
        self.port, admission = server.listeners[0].server_address[1], server.api.admission
        admission.exempt = lambda name: False
        wires = [self.connect() for _ in range(3)]
        for wire in wires:
            self.assertEqual(wire.ask(get('/config'))[0], 404)
        status, _, content = self.ask(get('/config'))
        self.assertEqual((status, content), (503, b'too many connections from your address\n'))
        self.assertEqual(admission.admit(Peer('10.0.0.1')).refusal, '')
        admission.exempt = lambda name: True
        self.assertEqual(self.ask(get('/config'))[0], 404)
        admission.exempt = lambda name: False
        wires[0].__exit__()
        self.wait_for_room(self.port)

    def admission(self, limit_each, counters=None, accounts=None, limit=100):
        metrics = Metrics(counters or Counters(), restic_serve.Watch(self.store, self.server.api.usage, 0))
        return restic_serve.Admission(metrics, accounts or Accounts(), limit, limit_each)

    def test_shares_hold_over_all_processes(self):
        counters, admissions = Counters(3), []
        for slot in (1, 2):
            of_process = copy.copy(counters)
            of_process.join(slot)
            admissions.append(self.admission(4, of_process))
        tickets = [admission.admit(Peer('2001:db8::1')) for admission in 2 * admissions]
        self.assertEqual([ticket.refusal for ticket in tickets], [''] * 4)
        self.assertTrue(admissions[1].admit(Peer('2001:db8::2')).refusal)   # of the same /64 network
        self.assertFalse(admissions[1].admit(Peer('2001:db8:1::1')).refusal)
        counters.clear(1)   # a worker has died, and with it its connections
        self.assertFalse(admissions[1].admit(Peer('2001:db8::2')).refusal)

    def test_those_that_are_turned_away_keep_no_places(self):
        with mock.patch.object(restic_serve, 'TURNED_AWAY', 2):
            admission = self.admission(2)
            got = [admission.admit(Peer('10.0.0.1')) for _ in range(10)]
            self.assertEqual([ticket and bool(ticket.refusal) for ticket in got],
                             [False, False, True, True] + [None] * 6)
            self.assertFalse(admission.admit(Peer('10.0.0.2')).refusal)
            for ticket in got[:4]:
                admission.leave(ticket)
            self.assertFalse(admission.admit(Peer('10.0.0.1')).refusal)

    def test_of_two_that_take_the_last_place_at_once_neither_keeps_it(self):
        counters = Counters()   # another process takes it at the same time
        admission = self.admission(1, counters, limit=1)
        admission.exempt = lambda name: not counters.add(restic_serve.CONNECTIONS, 1, 1)
        self.assertEqual(admission.admit(Peer('10.0.0.1')).refusal, 'too many connections')

    def test_the_share_is_a_quarter_but_enough_for_restic(self):
        for connections, share in ((1024, 256), (100, 25), (16, 8), (5, 5), (1, 1)):
            self.assertEqual(self.admission(None, limit=connections).limit_each, share)

    def test_who_is_not_bound(self):
        accounts = Accounts(user_header='X', proxies=[restic_serve.parse_network('10.0.0.0/8')])
        admission = self.admission(1, accounts=accounts)
        for peer, bound in ((Peer('127.0.0.1'), False), (Peer('::1'), False), (Peer('10.1.2.3'), False),
                            (Peer('unix', unix=True), False), (Peer('11.1.2.3'), True)):
            tickets = [admission.admit(peer) for _ in range(2)]
            self.assertEqual([bool(ticket.refusal) for ticket in tickets], [False, bound], peer.name)

    def test_networks_of_each_size_have_a_share(self):
        for networks, let_in in (('2001:db8:1:1{}::1', 4), ('2001:db8:1:{}00::1', 4), ('2001:db8:{}::1', 5)):
            admission = self.admission(4)
            tickets = [admission.admit(Peer(networks.format(number))) for number in range(5)]
            self.assertEqual([ticket.refusal for ticket in tickets].count(''), let_in, networks)

    def test_in_a_full_house_connections_give_way(self):
        # Letters are connections: the order in which they came, or in which their last answers ended.
        one, two = '10.0.0.1', '10.0.0.2'
        for user, peers, order in (
                # Of the largest share the oldest, until two are as large; networks of a home are one.
                ('u', [(one, {}, 'bcd'), (two, {}, 'a')], 'bcad'),
                ('u', [(two, {}, 'a'), ('2001:db8:0:1::1', {}, 'b'), ('2001:db8:0:2::1', {}, 'c')], 'bac'),
                ('u', [(two, {}, 'a'), ('127.0.0.1', {}, 'bc')], 'bac'),
                # Who has logged in goes when no stranger is left, the one that has been idle longest first.
                ('u', [(one, {'known': True}, 'abc'), (two, {}, 'd')], 'dabc'),
                # On a server without users idle time decides.
                ('', [(one, {}, 'ab'), (two, {'busy': True}, 'c')], 'ab'),
                # Nobody else does.
                ('u', [(one, {'busy': True}, 'ab'), ('unix', {'unix': True}, 'c'), ('10.9.0.1', {}, 'd'),
                       ('10.0.0.3', {'stays': True}, 'e')], ''),
                # A monitor does if its share is the largest of all.
                ('u', [(one, {'known': True}, 'ab'), (two, {'probes': True}, 'c')], 'ab'),
                ('u', [(one, {'known': True, 'busy': True}, 'a'), (two, {'probes': True}, 'bc')], 'bc')):
            accounts = Accounts(user=user, password=user, proxies=[restic_serve.parse_network('10.9.0.1')])
            admission, ended = self.admission(9, accounts=accounts, limit=9), []
            for address, state, letters in peers:
                for letter in letters:
                    peer = Peer(address, unix='unix' in state)
                    admission.admit(peer)
                    peer.begun = peer.since = ord(letter)
                    if user:
                        setattr(peer, 'begun' if 'known' in state else 'since', 0)
                    for name in {'known', 'busy', 'stays', 'probes'}.intersection(state):
                        setattr(peer, name, True)
                    peer.abort = functools.partial(ended.append, letter)
            while admission.make_room():
                pass
            self.assertEqual(''.join(ended), order, peers)


class ForwardedClientsTest(ListenerTestCase):
    """Clients behind a proxy that is trusted."""

    def setUp(self):
        super().setUp()
        with_distinct_shares(self)
        self.api = Api(self.store, Policy(), Accounts(
            user='alice', password='secret', proxies=[restic_serve.parse_network('127.0.0.1')]))

    def test_they_stand_in_the_logs(self):
        server = self.serve(self.api)
        with mock.patch.object(restic_serve.access_log, 'info') as info, \
                mock.patch.object(restic_serve.access_log, 'isEnabledFor', return_value=True), \
                Wire(server.listeners[0].server_address[1]) as wire:
            status = wire.ask(get('/config', 'X-Forwarded-For: 6.6.6.6, 1.2.3.4', basic('alice', 'no')))[0]
            self.assertEqual(status, 401)
            self.wait_until(lambda: info.called, 'a line in the access log')
        self.assertIn("authentication failed for 'alice' from 1.2.3.4", self.log)
        self.assertEqual(str(info.call_args[0][1]), '1.2.3.4')

    def test_each_has_a_share_of_its_own(self):
        self.port = self.serve(self.api, max_connections=100, per_address=2).listeners[0].server_address[1]
        login, wires = basic('alice', 'secret'), [self.connect() for _ in range(5)]
        for number, wire in enumerate(wires[:4]):
            content = os.urandom(1000)
            wire.send(post(f'/keys/{named(content)}', b'', login, 'Expect: 100-continue',
                           f'X-Forwarded-For: 1.2.3.{number // 2}', length=1000))
            self.assertEqual(wire.answer()[0], 100)
        ask = get('/keys/', login, 'X-Forwarded-For: 1.2.3.0')
        status, headers, body = wires[4].ask(ask)
        self.assertEqual((status, headers['retry-after'], body), (
            503, '10', b'too many requests from your address\n'))
        self.assertEqual(wires[4].ask(ask.replace(b'1.2.3.0', b'1.2.3.9'))[0], 200)
        wires[0].sock.shutdown(socket.SHUT_RDWR)
        self.wait_until(lambda: wires[4].ask(ask)[0] == 200, 'the end of an upload')
        for wire in wires:
            wire.__exit__()
        find = self.api.metrics.counters.find
        self.wait_until(lambda: not any(map(sum, find('addresses').values())), 'the end of all shares')


class ConnectionLimitTest(ListenerTestCase):
    def start(self, *addresses, **more):
        server = super().start('127.0.0.1:0', **more)
        self.port = server.listeners[0].server_address[1]
        return server

    def test_one_more_is_answered_503_and_closed(self):
        self.start(max_connections=3)
        wires = [self.begin_upload(b'x') for _ in range(3)]
        more = self.connect()
        status, headers, _ = more.ask(get('/config'))
        self.assertEqual((status, headers['connection']), (503, 'close'))
        self.assertTrue(more.is_closed())
        self.wait_until(lambda: self.log[-1] == 'too many connections: closed or rejected 1, from '
                        '127.0.0.1 (1)', 'the log line')
        self.assertEqual(wires[0].ask(b'x')[0], 200)
        self.wait_for_room(self.port)   # it gives way now
        self.assertTrue(wires[0].is_closed())

    def test_strangers_who_fill_the_house_keep_no_user_out(self):
        certificates = Authority(self.folder, 'server').certificates()
        for more, hello in (({}, b'G'), ({}, get('/health')), ({}, get('/config') * 3),
                            ({'certificates': certificates}, b'\x16\x03\x01')):
            self.server.api = Api(self.store, Policy(), Accounts(user='alice', password='secret'))
            self.start(max_connections=20, **more)
            for wire in [self.connect() for _ in range(30)]:
                with contextlib.suppress(ConnectionError):
                    wire.send(hello)
            row = 'limited', 'too many connections'
            self.wait_until(lambda row=row: self.server.api.metrics.counters.total(row, 1) == [10], 'room')
            if not more:
                user, ask = self.connect(), get('/config', basic('alice', 'secret'))
                self.assertEqual(user.ask(ask)[0], 404)
                for _ in range(30):     # he has logged in and stays
                    self.connect()
                self.assertEqual(user.ask(ask)[0], 404)

    def test_while_half_of_the_places_are_taken_a_stranger_does_not_stay(self):
        patch_for(self, restic_serve, STRANGER_SECONDS=0.1)
        self.server.api = Api(self.store, Policy(), Accounts(user='alice', password='secret'))
        server = self.start(max_connections=4)
        server.sweep_seconds = 0.02
        user, stranger = self.connect(), self.connect()
        self.assertEqual(user.ask(get('/config', basic('alice', 'secret')))[0], 404)
        with contextlib.suppress(AssertionError, ConnectionError):
            while True:
                stranger.ask(get('/health'))
        self.assertEqual(user.ask(get('/config', basic('alice', 'secret')))[0], 404)

    def test_a_flood_is_dropped(self):
        patch_for(self, restic_serve, TURNED_AWAY=2)
        server = self.start(max_connections=1)
        wires = [self.begin_upload(b'x')]
        wires += [self.connect() for _ in range(30)]
        for wire in wires[1:]:
            wire.is_closed()
        self.assertLessEqual(len(server.served), 3)
        self.assertEqual(wires[0].ask(b'x')[0], 200)
        for wire in wires:
            wire.__exit__()
        self.wait_until(lambda: not server.served, 'the end of all')

    def test_a_thread_that_does_not_start_is_no_connection(self):
        server = self.start()
        with mock.patch.object(threading.Thread, 'start', side_effect=RuntimeError('no thread')):
            self.assertTrue(self.connect().is_closed())
        self.wait_until(lambda: not server.served, 'its end')
        self.assertIn('no thread', self.log[-1])

    def test_slow_clients_do_not_slow_the_others(self):
        """A thousand that drip; the figure is a bound, far above what is usual."""
        # As main() does: with stacks of 8 MiB they fill the address space of a 32-bit system.
        self.addCleanup(threading.stack_size, threading.stack_size(restic_serve.STACK_BYTES))
        before = resident()
        self.server.limits.header_seconds = math.inf    # a busy machine needs a while for a thousand
        server = self.start(max_connections=1100)
        slow = [self.connect() for _ in range(1000)]
        for wire in slow:
            wire.send(b'G')
        self.wait_until(lambda: len(server.served) == 1000, 'a thousand')
        wire, times = self.connect(), []
        for number in range(200):
            slow[number].send(b'E')
            begin = time.perf_counter()
            self.assertEqual(wire.ask(get('/config'))[0], 404)
            times.append(time.perf_counter() - begin)
        self.assertLess(sorted(times)[len(times) // 4], 0.1)
        # Of the clients and the server.
        self.assertLess(resident() - before, (200 if PYPY else 100) << 20)


class ServerTest(WireTestCase):
    def test_a_disk_that_hangs_with_the_passwords_holds_up_nobody(self):
        hung, asked = threading.Event(), threading.Event()
        self.addCleanup(hung.set)
        self.server.looking.due, self.server.looking._act = 0, lambda: (asked.set(), hung.wait(PATIENCE))
        self.server.loop.wake()
        self.assertTrue(asked.wait(PATIENCE))
        self.assertEqual(self.ask(get('/config'))[0], 404)
        self.server.reload()
        self.assertIn('cannot reload: the disk of ', self.log[-1])
        hung.set()
        self.server.looking._thread.join(PATIENCE)

    def finish(self):
        """Tell the server to stop; an event that is set when it has."""
        done = threading.Event()
        close = self.server.loop.close
        self.server.loop.close = lambda: (close(), done.set())
        self.server.stop()
        return done

    def test_a_purge_that_a_disk_holds_up_is_the_only_one(self):
        held, begun = threading.Event(), []
        self.addCleanup(held.set)

        def purge(seconds):
            begun.append(seconds)
            held.wait(PATIENCE)

        with mock.patch.object(self.server.api.usage, 'purge', purge):
            for _ in range(3):
                self.server.purging.due = 0
                self.assertGreater(self.server.purging.tick(), 0)
            self.assertEqual(len(begun), 1)

    def test_a_stop_drops_idle_connections(self):
        fresh, used = self.connect(), self.connect()
        used.ask(get('/config'))
        self.wait_until(lambda: len(self.server.served) == 2, 'two connections')
        done = self.finish()
        self.assertTrue(fresh.is_closed() and used.is_closed())
        self.assertTrue(done.wait(PATIENCE))

    def test_a_stop_lets_a_running_request_finish(self):
        content = b'0123456789'
        wire = self.begin_upload(content, content[:5])
        done = self.finish()
        self.wait_until(lambda: all(c.stopping for c in self.server.served), 'the stop')
        self.assertFalse(listens(('127.0.0.1', self.port)))
        self.assertFalse(done.is_set())
        status, headers, _ = wire.ask(content[5:])
        self.assertEqual((status, headers['connection']), (200, 'close'))
        wire.__exit__()
        self.assertTrue(done.wait(PATIENCE))
        self.assertEqual(self.log, [f'created directory {self.root}'])

    def test_a_stop_does_not_wait_for_ever(self):
        wire = self.begin_upload()
        with mock.patch.object(restic_serve, 'STOP_SECONDS', 0.1):
            self.assertTrue(self.finish().wait(PATIENCE))
        self.assertTrue(wire.is_closed())
        self.assertIn('closed the connection of 127.0.0.1', self.log[-1])

    def test_a_stop_does_not_wait_for_what_was_answered_or_only_begun(self):
        answered, begun = self.connect(), self.connect()
        self.assertEqual(answered.ask(get('/config', 'Connection: close'))[0], 404)
        begun.send('GET /c')
        self.wait_until(lambda: len(self.server.served) == 2, 'two connections')
        self.assertTrue(self.finish().wait(PATIENCE))
        self.assertEqual(self.log, [f'created directory {self.root}'])

    def test_where_descriptors_are_used_up_the_server_goes_on_later(self):
        idle = self.connect()
        self.assertEqual(idle.ask(get('/config'))[0], 404)
        self.wait_until(lambda: not any(of.peer.busy for of in self.server.served.copy()), 'its rest')
        listener, answers = self.server.listeners[0], [OSError(errno.EMFILE, 'Too many open files')]
        full = mock.Mock(wraps=listener.socket, **{'accept.side_effect': answers + 2 * [mock.DEFAULT]})
        with mock.patch.object(listener, 'socket', full):
            self.assertEqual(self.ask(get('/config'))[0], 404)
        self.assertIn('cannot accept connections: [Errno 24] Too many open files', ' '.join(self.log))
        self.assertTrue(idle.is_closed())

    def test_there_are_as_many_places_as_open_files_allow(self):
        few = 'sh', '-c', 'ulimit -n 64; exec "$@"', 'sh'
        server = self.run_server('--workers', '2', self.root, before=few)
        said = [line for line in server.lines if 'open files' in line]
        self.assertRegex(' '.join(said), '64 open files allow 24 connections, not 1024 .* limit to 4352')
        self.port = server.port
        for _ in range(150):
            self.connect()
        for _ in range(20):     # while they come, nobody may be idle yet in one process
            self.wait_until(lambda: self.ask(get('/data/'))[0] == 200, 'a place')
        self.assertFalse([line for line in server.lines if 'ERROR' in line])

    def test_no_name_is_looked_up(self):
        with mock.patch.object(socket, 'getfqdn', side_effect=AssertionError), \
                mock.patch.object(socket, 'gethostbyaddr', side_effect=AssertionError):
            server = Server(self.server.api, self.server.limits, [LOCAL])
        server.stop()
        server.serve()

    def test_without_a_host_both_families_are_served(self):
        server = Server(self.server.api, Limits(), [restic_serve.parse_address(':0')])
        listener = server.listeners[0]
        for host in ('127.0.0.1', '::1')[:1 + (listener.address_family == socket.AF_INET6)]:
            socket.create_connection((host, listener.server_address[1]), PATIENCE).close()
            sock, peer = listener.get_request()
            sock.close()
            self.assertEqual(peer.name, host)
        self.assertEqual([*map(restic_serve.is_loopback, ('127.0.0.2', '0.0.0.0'))], [True, False])
        server.stop()
        server.serve()


class ServiceManagerTest(TestCase):
    """What systemd expects, from sockets and variables alone."""

    def setUp(self):
        super().setUp()
        self.heard = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.addCleanup(self.heard.close)
        self.heard.settimeout(PATIENCE)
        self.heard.bind(str(self.folder / 'notify'))

    def hear(self, start):
        """The next word that begins so."""
        while True:
            word = self.heard.recv(4096).decode()
            if word.startswith(start):
                return word

    def test_it_hears_of_start_reload_and_end(self):
        server = self.run_server(self.root, NOTIFY_SOCKET=str(self.folder / 'notify'))
        self.assertEqual(self.hear(''), 'READY=1')
        server.process.send_signal(signal.SIGHUP)
        self.assertRegex(self.hear('RELOADING'), r'^RELOADING=1\nMONOTONIC_USEC=\d+$')
        self.assertEqual(self.hear(''), 'READY=1')
        self.assertEqual(server.stop(), 0)
        self.assertEqual(self.hear(''), 'STOPPING=1')
        self.heard.setblocking(False)
        self.assertRaises(BlockingIOError, self.heard.recv, 1)

    def test_the_watchdog_is_fed_without_any_request(self):
        self.run_server(self.root, WATCHDOG_USEC='200000', NOTIFY_SOCKET=str(self.folder / 'notify'))
        begin = time.monotonic()
        for _ in range(5):
            self.hear('WATCHDOG=1')
        self.assertLess(time.monotonic() - begin, PATIENCE)

    def test_the_watchdog_hears_twice_in_its_time_and_that_of_another_process_nothing(self):
        variables = {'NOTIFY_SOCKET': str(self.folder / 'notify'), 'WATCHDOG_USEC': '3000000'}
        other = restic_serve.SystemdNotifier({**variables, 'WATCHDOG_PID': '1'})
        notifier, clock = restic_serve.SystemdNotifier(variables), Clock()
        with mock.patch.object(time, 'monotonic', lambda: clock.now):
            self.assertEqual(other.ping(), math.inf)
            for seconds, wait in ((0, 1.5), (1, 0.5), (0.5, 1.5)):
                clock.now += seconds
                self.assertEqual(notifier.ping(), wait)
        for _ in range(2):
            self.assertEqual(self.hear(''), 'WATCHDOG=1')
        self.heard.setblocking(False)
        self.assertRaises(BlockingIOError, self.heard.recv, 1)

    def test_variables_are_removed_after_use(self):
        environment = {'NOTIFY_SOCKET': '/x', 'WATCHDOG_USEC': '5', 'WATCHDOG_PID': str(os.getpid()),
                       'LISTEN_PID': '1', 'LISTEN_FDS': '3', 'LISTEN_FDNAMES': 'a:b'}
        restic_serve.SystemdNotifier(environment)
        self.assertEqual(restic_serve.inherited_sockets(environment), [])
        self.assertEqual(environment, {})

    def test_sockets_of_systemd_are_served_and_not_the_addresses(self):
        activate = program('systemd-socket-activate')
        unix = self.folder / 'socket'
        port = free_port()
        process = self.launch(
            activate, '-l', f'127.0.0.1:{port}', '-l', str(unix), '--fdname=web:local', sys.executable,
            MODULE, '--addr', '/nonexistent/socket', str(self.root), stderr=subprocess.PIPE, text=True,
            env=clean_environment())
        for line in process.stderr:
            if 'Listening on' in line and str(unix) in line:
                break
        self.assertEqual(self.ask(get('/config'), port=port)[0], 404)
        self.assertEqual(self.ask_unix(unix), 404)
        process.terminate()
        text = process.stderr.read()
        self.assertEqual(process.wait(PATIENCE), 0, text)
        self.assertIn('(socket web)', text)
        self.assertIn(f'http+unix://{unix}:/ (socket local)', text)

    def test_it_ends_when_it_has_been_idle_for_long_enough(self):
        activate = program('systemd-socket-activate')
        for workers in ('1', '2'):
            port = free_port()
            process = self.launch(
                activate, '-l', f'127.0.0.1:{port}', sys.executable, compiled(), '--workers', workers,
                '--exit-idle', '1s', '--keep-deleted', '1d', self.root, stderr=subprocess.PIPE, text=True,
                env=clean_environment())
            self.wait_until(lambda port=port: listens(('127.0.0.1', port)), 'the socket')
            with Wire(port) as wire:
                for _ in range(3):      # a connection that goes on is not idle
                    self.assertEqual(wire.ask(get('/config'))[0], 404)
                    time.sleep(0.5)
            with process:
                self.assertEqual(process.wait(PATIENCE), 0)
                self.assertIn('no connection for 1 s: ending', process.stderr.read())
        self.assertIn('--exit-idle: no socket', self.run_it('--exit-idle', '1s', self.root)[2])

    def test_a_socket_that_does_not_listen_is_refused_in_one_line(self):
        for count, source, fault in ((1, 'socket.socket()', 'descriptor 3: does not listen; use Accept=no'),
                                     (1, 'open("/dev/null")', 'descriptor 3: Socket operation on non-socket'),
                                     (99999999, '', 'descriptor 3: (Bad file|Socket operation)')):
            opened = f'kept = {source}; os.dup2(kept.fileno(), 3); os.set_inheritable(3, True)\n'
            code = ('import os, socket, sys\n' + opened * bool(source) +
                    f'os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="{count}")\n'
                    'os.execv(sys.executable, [sys.executable] + sys.argv[1:])\n')
            done = subprocess.run([sys.executable, '-c', code, MODULE, str(self.root)], text=True,
                                  capture_output=True, env=clean_environment(), timeout=PATIENCE)
            self.assertRegex(done.stderr, rf'LISTEN_FDS={count}: {fault}.*\n$')
        self.assertEqual(restic_serve.inherited_sockets({'LISTEN_PID': '1', 'LISTEN_FDS': '3'}), [])
        self.assertIn('LISTEN_FDS=3 is for process 1', self.log[-1])


# ---- Workers ---------------------------------------------------------------------------------------

@unittest.skipUnless(hasattr(os, 'fork'), 'this system has no fork')
class WorkersTest(TestCase):
    """Several processes that serve as one."""

    def serve(self, *words, workers=2, **more):
        server = self.run_server('--workers', workers, *words, self.root, **more)
        self.wait_until(lambda: len(self.children(server)) == workers, 'the workers')
        return server

    def connect(self, server):
        wire = Wire(server.port)
        self.addCleanup(wire.__exit__)
        return wire

    def connect_all(self, server, number=6):
        """Connections that are being served, by all workers."""
        wires = [self.connect(server) for _ in range(number)]
        for wire in wires:
            self.assertEqual(wire.ask(get('/config'))[0], 404)
        return wires

    def kill_all(self, server):
        """Kill the workers, and wait for others; their process ids."""
        killed = self.children(server)
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        self.wait_until(lambda: len(set(self.children(server)) - set(killed)) == len(killed), 'other workers')
        return killed

    def begin(self, wire, content):
        """Upload all but the last byte."""
        wire.send(post(f'/data/{named(content)}', content, 'Expect: 100-continue')[:-len(content)])
        self.assertEqual(wire.answer()[0], 100)
        wire.send(content[:-1])

    def requests(self, server):
        text = self.ask(get('/metrics'), port=server.port)[2].decode()
        return sum(int(number) for number in re.findall(
            r'^restic_serve_requests_total\{.*"404"\} (\d+)', text, re.MULTILINE))

    def test_they_interrupt_nobody_and_stay_what_the_administrator_chose(self):
        if not hasattr(os, 'SCHED_IDLE'):
            self.skipTest('this system, or PyPy, has one kind of scheduling')
        for before, policy in (((), os.SCHED_BATCH), ((program('chrt'), '--idle', '0'), os.SCHED_IDLE)):
            server = self.serve(before=before)
            self.assertEqual({os.sched_getscheduler(pid) for pid in self.children(server)}, {policy})

    def test_they_share_connections_and_count_together(self):
        server = self.serve('--prometheus', workers=3)
        self.connect_all(server, 12)
        self.wait_until(lambda: self.requests(server) == 12, 'twelve requests')
        if os.path.isdir('/proc/self/fd'):
            numbers = [len(os.listdir(f'/proc/{pid}/fd')) for pid in self.children(server)]
            # A busy machine may not let the one with the fewest come first each time.
            self.assertLess(max(numbers) - min(numbers), 12, numbers)
        self.assertEqual(server.stop(), 0)

    def test_one_that_dies_is_replaced_and_nothing_that_was_counted_is_lost(self):
        server = self.serve('--prometheus', '--max-connections', '6')
        self.connect_all(server, 6)
        killed = self.kill_all(server)
        # the dead ones' connections count no more, their requests do
        self.wait_until(lambda: self.requests(server) >= 6, 'the metrics')
        wires = self.connect_all(server, 5)  # one that has just ended may count still
        for pid in killed:
            self.wait_for_line(server, rf'ERROR: worker [12] \(process {pid}\) was killed by signal 9; '
                               'restarting it')
        pid = self.children(server)[0]
        os.kill(pid, signal.SIGKILL)
        self.wait_for_line(server, rf'{pid}\) was killed by signal 9; restarting it in 1 s')
        self.wait_for_line(server, r'NOTICE: worker 1 is now process \d+')
        for wire in wires:
            wire.__exit__()
        self.assertEqual(server.stop(), 0)

    def test_all_of_them_finish_what_they_are_doing_even_if_each_is_told_to_stop(self):
        self.make_repository()
        server = self.serve()
        contents = [os.urandom(5000) for _ in range(6)]
        wires = [self.connect(server) for _ in contents]
        for wire, content in zip(wires, contents):
            self.begin(wire, content)
        idle = self.connect_all(server, 2)
        for pid in [*self.children(server), server.process.pid]:  # as systemd does
            os.kill(pid, signal.SIGTERM)
        for wire in idle:
            self.assertTrue(wire.is_closed())
        for wire, content in zip(wires, contents):
            status, head, _ = wire.ask(content[-1:])
            self.assertEqual((status, head['connection']), (200, 'close'))
            wire.__exit__()
        self.assertEqual(server.stop(signal.SIGCONT), 0)
        self.assertEqual(len(self.files()), 6)
        self.assertNotIn('ERROR', ' '.join(server.lines))

    def test_what_its_starter_blocked_does_not_matter(self):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD, signal.SIGTERM])
        try:
            server = self.serve()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.kill_all(server)
        self.assertEqual(server.stop(), 0)

    def test_a_stop_at_the_first_moment_leaves_no_socket(self):
        for workers in ('1', '2'):
            path = self.folder / 'socket'
            with Program('--addr', path, '--workers', workers, self.root) as server:
                self.assertEqual(server.stop(), 0)
            self.assertFalse(path.exists())

    def test_where_no_process_can_be_started_the_others_go_on(self):
        workers = restic_serve.Workers(mock.Mock(), 2)
        with mock.patch.object(os, 'fork', side_effect=OSError(errno.EAGAIN, 'Too many')):
            for seconds in (0, 1):
                self.assertAlmostEqual(workers._start_or_kill(), seconds, delta=0.5)
        self.assertIn('cannot start a worker', self.log[-1])

    def test_one_that_is_told_to_stop_is_replaced_without_an_alarm(self):
        server = self.serve()
        os.kill(self.children(server)[0], signal.SIGTERM)
        self.wait_for_line(server, r'NOTICE: worker [12] is now process \d+')
        self.connect_all(server)
        self.assertEqual(server.stop(), 0)
        self.assertNotIn('ERROR', ' '.join(server.lines))

    def test_all_of_them_follow_the_rights_file_and_its_quotas(self):
        rights = self.folder / 'rights'
        rights.write_text('* / append\n')
        self.make_repository('a')
        server = self.serve('--rights', rights, change='LOOK_SECONDS = 0.1')
        contents = [os.urandom(3000) for _ in range(40)]

        def upload(content):
            return self.ask(post(f'/a/keys/{named(content)}', content), port=server.port)[0]

        self.assertEqual([upload(content) for content in contents[:10]], [200] * 10)
        used = 12 * 4096    # ten objects, and two folders
        rights.write_text(f'* / append\n* /a append {used + 5 * 4096}\n* /probe none\n')

        self.wait_until(lambda: all(self.ask(get('/probe/config'), port=server.port)[0] == 403
                                    for _ in range(30)), 'the new rights in all workers')
        statuses = []
        for content in contents[10:]:
            status = 503
            while status == 503:
                status = upload(content)
            statuses.append(status)
        self.assertEqual(statuses.count(200), 5)
        self.assertEqual(set(statuses), {200, 507})

    def test_a_new_worker_does_not_put_rights_and_users_of_the_start_in_force(self):
        rights, users = self.folder / 'rights', self.folder / 'users'
        rights.write_text('* / read\n')
        users.write_text(f'alice:{sha("a")}\n')
        self.make_repository('a')
        look_seconds = 0.1
        server = self.serve('--rights', rights, '--htpasswd', users, change=f'LOOK_SECONDS = {look_seconds}')

        def statuses():
            """Of alice and bob, by all workers."""
            answers = set()
            for _ in range(20):
                with self.connect(server) as wire:
                    answers.add(tuple(wire.ask(get('/a/config', basic(user, user[0])))[0]
                                      for user in ('alice', 'bob')))
            return answers

        self.assertEqual(statuses(), {(404, 401)})
        rights.write_text('* / none\n')
        users.write_text(f'bob:{sha("b")}\n')
        self.wait_until(lambda: statuses() == {(401, 403)}, 'the new rights and users')
        time.sleep(10 * look_seconds)   # nothing shows when the parent has read them
        rights.write_text('rubbish\n')
        users.unlink()
        for line in ('keeping the previous rights', 'keeping the previous users'):
            self.wait_for_line(server, line)
        self.kill_all(server)
        self.assertEqual(statuses(), {(401, 403)})

    def test_a_second_signal_ends_the_wait(self):
        self.make_repository()
        server = self.serve()
        for wire in [self.connect(server) for _ in range(4)]:
            self.begin(wire, os.urandom(5000))
        idle = self.connect_all(server, 1)
        server.process.send_signal(signal.SIGINT)
        self.assertTrue(idle[0].is_closed())
        begin = time.monotonic()
        self.assertEqual(server.stop(), 0)
        self.assertLess(time.monotonic() - begin, restic_serve.STOP_SECONDS)
        if True in NAMELESS:    # else they are left for the next start
            self.assertEqual(self.files(), [])

    def test_when_the_parent_is_killed_they_stop_and_another_server_can_begin(self):
        path = self.folder / 'socket'
        self.make_repository()
        server = self.serve('--addr', path)
        wire = self.connect(server)
        content = os.urandom(5000)
        self.begin(wire, content)
        children = self.children(server)
        server.process.kill()
        server.process.wait()
        self.assertEqual(wire.ask(content[-1:])[0], 200)  # what is under way is finished
        wire.__exit__()

        def is_gone(pid):
            try:    # it may be a zombie that nobody waits for
                return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] == 'Z'
            except FileNotFoundError:
                return True

        self.wait_until(lambda: all(map(is_gone, children)), 'the end of the workers')
        other = self.serve('--addr', f'127.0.0.1:{server.port}', '--addr', path)
        self.assertEqual(self.ask(get(f'/data/{named(content)}'), port=other.port)[0], 200)
        self.assertEqual(other.stop(), 0)
        self.assertFalse(path.exists())

    def test_sighup_reaches_all(self):
        log, moved = self.folder / 'log', self.folder / 'moved'
        with Program('-v', '--addr', self.folder / 'socket', '--workers', '2', '--log-file', log, self.root,
                     wait=False) as server:
            self.wait_until(lambda: listens(str(self.folder / 'socket')), 'the server')
            log.rename(moved)
            server.process.send_signal(signal.SIGHUP)

            def is_reopened():
                for _ in range(4):
                    self.ask_unix(self.folder / 'socket')
                sizes.append(moved.stat().st_size)
                return sizes[-10:] == sizes[-1:] * 10

            sizes = []
            self.wait_until(is_reopened, 'all to write to the new file')
            self.assertIn('GET /config', log.read_text())
            self.assertEqual(server.stop(), 0)

    def test_connections_are_limited_over_all_of_them(self):
        server = self.serve('--max-connections', '5')
        self.make_repository()
        wires = self.connect_all(server, 5)
        upload = post(f'/keys/{"0" * 64}', b'', 'Expect: 100-continue', length=1)
        self.assertEqual([wire.ask(upload)[0] for wire in wires], [100] * 5)
        for _ in range(3):
            self.assertEqual(self.ask(get('/config'), port=server.port)[0], 503)
        wires.pop().__exit__()
        self.wait_until(lambda: self.ask(get('/config'), port=server.port)[0] == 404, 'a place')

    def fork(self, counters, slot, job):
        """A process with a slot of the counters, whose exit status is what a job returns."""
        pid = os.fork()
        if not pid:
            counters.join(slot)
            os._exit(job())
        return pid

    def test_bandwidth_is_limited_over_all_of_them(self):
        counters = Counters(3)

        def wait(count):
            """The tenths of a second that many bytes take."""
            clock = Clock()
            bandwidth = restic_serve.Bandwidth([restic_serve.TimetableEntry(0, 1000, 100)], counters,
                                               lambda: clock.now, clock.sleep, lambda: clock.day)
            bandwidth.wait(bandwidth.SENT, count)
            return round(10 * (clock.now - 1000), 2)

        self.assertEqual(wait(500), 0)
        for slot, tenths in ((1, 5), (2, 8)):
            pid = self.fork(counters, slot, lambda: int(wait(300)))
            self.assertEqual(os.WEXITSTATUS(os.waitpid(pid, 0)[1]), tenths)
        self.assertEqual(wait(1), 11)

    def test_quotas_hold_over_all_of_them(self):
        counted_plainly(self)
        self.store, counters = self.make_store(), Counters(5)
        self.make_repository('host')
        usage = self.counted({'/': 50500}, counters)

        def store_all():
            stored = 0
            for content in (os.urandom(1000) for _ in range(40)):
                with contextlib.suppress(Busy, QuotaExceeded):
                    usage.save(Location('/host', 'data', named(content)), Bytes(content))
                    stored += 1
            return stored

        children = [self.fork(counters, slot, store_all) for slot in range(1, 5)]
        stored = sum(os.WEXITSTATUS(os.waitpid(pid, 0)[1]) for pid in children)
        self.assertEqual(stored, len(self.files(self.root / 'host')))
        self.assertIn(stored, range(40, 51))
        self.assertEqual(usage.quota(''), (1000 * stored, 0, 50500))


# ---- Options ---------------------------------------------------------------------------------------

class OptionTest(unittest.TestCase):
    """One description of an option, and what follows from it."""

    def test_several_values_in_a_variable_are_words_or_lines(self):
        parser = restic_serve.Parser({'RESTIC_SERVE_ADMIN': 'a b',
                                      'RESTIC_SERVE_RESPONSE_HEADER': 'A: b c\nD: e'})
        options = parser.parse(['dir'])
        self.assertEqual((options.admin, options.response_header), (['a', 'b'], [('A', 'b c'), ('D', 'e')]))

    def test_it_is_given_where_it_differs_from_its_default(self):
        options = restic_serve.Parser({'RESTIC_SERVE_QUIET': '1'}).parse(
            ['--stall-timeout', '60s', '--stats', '0', 'dir'])
        self.assertEqual(list(options.given), ['--quiet', '--stats'])

    def test_an_option_without_what_it_requires_is_refused(self):
        samples = {'--max-size-per-user': '1G', '--cert': 'f', '--key': 'f', '--client-ca': 'f',
                   '--min-tls-version': 'tls1.2', '--user': 'a', '--pass': 'p', '--add-user': 'a',
                   '--remove-user': 'a', '--prometheus-no-auth': 'true', '--dry-run': 'true',
                   '--force': 'true', '--scrub-age': '1d', '--test-event': 'true'}
        for option in restic_serve.OPTIONS:
            if option.requires:
                self.assertEqual(refusal(f'{option.name}={samples[option.name]}', 'dir'),
                                 f'restic_serve: {option.name} requires {option.requires}')

    def test_a_value_that_makes_no_sense_is_refused_by_name(self):
        self.assertEqual(restic_serve.Parser({}).parse(['--roll-back', '100y', 'dir']).roll_back, 0)
        for args, text in ((['--roll-back', 'yesterday', 'dir'], "--roll-back: invalid time 'yesterday'; "),
                           (['--roll-back', '2037-01-01', 'dir'], '--roll-back: 2037-01-01 is in the future'),
                           (['--stdio', 'dir/.at/x'], "dir/.at/x: invalid time 'x'; use"),
                           (['dir/.at/2d'], 'requires --stdio'),
                           (['--addr', 'tls://:1', 'dir'], '--addr: tls:// requires --cert and --key')):
            self.assertIn(text, refusal(*args))

class TlsOptionsTest(TestCase):
    def setUp(self):
        super().setUp()
        self.authority = Authority(self.folder, 'one')

    def test_what_is_wrong_with_a_file_is_said_of_its_option(self):
        self.authority.issue('two')
        files = {name: str(self.folder / name) for name in (
            'one.pem', 'one.key', 'two.key', 'ca.pem', 'locked.key', 'rubbish', 'missing')}
        self.authority.run('pkcs8', '-topk8', '-in', files['one.key'], '-out', files['locked.key'],
                           '-passout', 'pass:x')
        Path(files['rubbish']).write_text('rubbish\n')
        for cert, key, client_ca, said in (
                ('one.pem', 'locked.key', '', '--key: {locked.key} is encrypted'),
                ('one.pem', 'two.key', '', '--key: {two.key} does not match the certificate {one.pem}'),
                ('one.pem', 'missing', '', '--key: {missing}: No such file'),
                ('missing', 'one.key', '', '--cert: {missing}: No such file'),
                ('rubbish', 'one.key', '', '--cert: no PEM certificate in {rubbish}'),
                ('one.pem', 'rubbish', '', '--key: no PEM private key in {rubbish}'),
                ('one.pem', 'one.pem', '', '--key: no PEM private key in {one.pem}'),
                ('one.pem', 'one.key', 'rubbish', '--client-ca: no PEM certificate in {rubbish}'),
                ('one.pem', 'one.key', 'missing', '--client-ca: {missing}: No such file')):
            error = raised(OSError, restic_serve.Certificates, files[cert], files[key],
                           files.get(client_ca, ''))
            said = re.sub('{(.*?)}', lambda match: files[match[1]], said)
            self.assertTrue(str(error).startswith(said), error)

    def test_what_is_doubtful_about_a_certificate_is_said(self):
        cert, key = (str(self.folder / f'one.{end}') for end in ('pem', 'key'))
        certificates = self.authority.certificates('one')
        os.chmod(key, 0o640)
        self.assertEqual((certificates.warn(), self.log), ('localhost', []))
        os.chmod(key, 0o644)
        with mock.patch.object(time, 'time', return_value=time.time() + 3 * 86400):
            certificates.warn()
        self.assertEqual(self.log[0], f'--key: {key} is readable by all users of this host (chmod o-r)')
        self.assertTrue(self.log[1].startswith(f'--cert: {cert} expired on '))

    def test_the_end_of_a_certificate_is_known_to_report_and_metrics(self):
        end = restic_serve.certificate_end(self.folder / 'one.pem')
        self.assertAlmostEqual(end, time.time() + 2 * 86400, delta=60)
        self.make_repository('host')
        (self.root / 'host' / 'config').write_bytes(b'config')
        words = self.authority.words('one')
        status, _, error = self.run_it('--report', *words, self.root)
        self.assertEqual((status, error.partition(';')[0]),
                         (1, 'restic_serve: the TLS certificate ends in 47 hours'))
        options = restic_serve.Parser({}).parse([*map(str, words), '--addr', '127.0.0.1:0', 'dir'])
        server = restic_serve.make_server(options, self.make_store(), '')
        self.in_thread(server.serve)
        self.addCleanup(server.stop)
        self.assertIn(f'_certificate_end_timestamp_seconds {end}\n', server.api.metrics.exposition())
        for days in (9000, 400):    # its year has four digits, or two
            self.authority.run('req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-days', days,
                               '-subj', '/CN=x', '-keyout', 'key', '-out', 'pem')
            self.assertAlmostEqual(restic_serve.certificate_end(self.folder / 'pem'),
                                   time.time() + days * 86400, delta=60)
        (self.folder / 'pem').write_text('-----BEGIN CERTIFICATE-----\nrubbish\n')
        self.assertEqual(restic_serve.certificate_end(self.folder / 'pem'), math.inf)


class OtherServersTest(TestCase):
    """The command lines of people who come from rclone or rest-server."""

    def test_a_remote_of_rclone_is_no_directory(self):
        for name in ('b2:bucket', 'remote:', ':s3:bucket', 'my remote:x'.replace(' ', '-')):
            self.assertIn(f'{name!r} is an rclone remote', refusal(name))
        os.chdir(self.folder)
        self.addCleanup(os.chdir, Path(MODULE).parent)
        Path('really:meant').mkdir()
        for name in ('really:meant', './remote:x', '/srv/a:b', 'plain', ':local:/srv/backup'):
            self.assertEqual(refusal(name), '')
        parser = restic_serve.Parser({})
        self.assertEqual(restic_serve.find_directory(parser, parser.parse([':local:/srv/backup'])),
                         ('/srv/backup', ''))

    def test_an_unknown_option_is_answered_by_one_of_ours(self):
        for args, expected in (
                (['--listen', ':8000'], '--listen: unknown option; use --addr'),
                (['--tls-cert=x'], '--tls-cert: unknown option; use --cert'),
                (['--append-onyl'], '--append-onyl: unknown option; did you mean --append-only?'),
                (['--qqqqqqq'], '--qqqqqqq: unknown option')):
            self.assertEqual(refusal(*args, 'dir'), f'restic_serve: {expected}')

    def test_options_of_rclone_that_mean_nothing_here_are_ignored_and_logged(self):
        for args, said in (([], ''), (['-vP', '--transfers=4', '--use-mmap', '--tpslimit', '1'],
                                      '--progress --use-mmap --tpslimit --transfers')):
            status, _, error = self.run_it('serve', 'restic', *args, '--report', self.folder)
            self.assertEqual(status, 1)
            self.assertEqual([line.partition(' NOTICE: ')[2] for line in error.splitlines()[:-1]],
                             [f'ignored, has no effect on a local directory: {said}'] if said else [])
        self.assertEqual(restic_serve.Parser({}).parse(['--', '--transfers']).arguments, ['--transfers'])
        self.assertEqual(refusal('--stdio', '--b2-hard-delete', '--cache-objects', '--', 'dir'), '')
        for args in (['--cache-dir', '--append-only'], ['--transfers'], ['--log-file', '-P'],
                     ['--realm', '-P']):
            self.assertIn('expected one argument', refusal('dir', *args))

    def test_options_for_other_remotes_are_unknown(self):
        for args in (['--drive-use-trash'], ['--s3-chunk-size', '8M'], ['--rc-addr=:5572'], ['--include'],
                     ['--vfs-cache-mode', 'full'], ['--cache-object']):
            self.assertIn(f'restic_serve: {args[0].partition("=")[0]}: unknown option', refusal(*args, 'dir'))
        self.assertIn('--config: unknown option; there is no configuration file',
                      refusal('--config', '/etc/rclone.conf', 'dir'))

    def test_their_values_are_understood(self):
        for args, name, value in ((['--min-tls-version', '1.2'], 'min_tls_version', 'tls1.2'),
                                  (['--log-level', 'DEBUG'], 'log_level', 'DEBUG')):
            self.assertEqual(getattr(restic_serve.Parser({}).parse([*args, 'dir']), name), value)
        self.assertIn('use DEBUG, INFO, NOTICE or ERROR', refusal('--log-level', 'loud', 'dir'))

    def test_passwords_that_rest_server_would_ask_for_are_not_passed_over(self):
        self.root.mkdir()
        self.assertEqual(refusal(str(self.root)), '')
        passwords = self.root / '.htpasswd'
        passwords.write_text(f'alice:{sha("x")}\n')
        self.assertIn(f'add --htpasswd {passwords}, or --no-auth', refusal(str(self.root)))
        for args in (['--no-auth'], ['--htpasswd', str(passwords)], ['--scrub']):
            self.assertEqual(refusal(*args, str(self.root)), '')
        self.assertIn('--no-auth', refusal('--no-auth', '--htpasswd', 'f', str(self.root)))

    def test_their_variables_are_said_with_ours(self):
        parser = restic_serve.Parser({'RCLONE_ADDR': ':1', 'RCLONE_CONFIG': 'x', 'OPTIONS': '--private-repos',
                                      'DISABLE_AUTHENTICATION': '1', 'RESTIC_SERVE_ADR': 'x'})
        restic_serve.warn_of_options(parser, parser.parse(['dir']))
        self.assertEqual(self.log, [f'unknown environment variable {line}' for line in (
            'DISABLE_AUTHENTICATION; use RESTIC_SERVE_NO_AUTH=true', 'OPTIONS; use RESTIC_SERVE_… for each',
            'RCLONE_ADDR; use RESTIC_SERVE_ADDR', 'RESTIC_SERVE_ADR')])


# ---- Main ------------------------------------------------------------------------------------------

class CommandLineTest(TestCase):
    def parse(self, *words, **environment):
        return restic_serve.Parser(environment).parse(list(words))

    def test_it_says_where_it_serves_and_what_to_type(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            server = self.run_server(self.folder / number.name)
            self.assertRegex(server.lines[0], r'^\d{4}/\d\d/\d\d \d\d:\d\d:\d\d NOTICE: created directory')
            self.assertRegex(server.lines[1], f'serving {re.escape(str(self.folder))}/.* on {server.url}$')
            self.assertRegex(server.lines[2], f'restic -r rest:{server.url} init$')
            self.assertEqual(self.ask(get('/config'), port=server.port)[0], 404)
            self.assertEqual(server.stop(number), 0)
            self.assertFalse([line for line in server.lines if 'NOTICE' not in line])

    def test_a_job_never_comes_from_the_environment_and_what_is_no_option_is_said(self):
        names = [f'RESTIC_SERVE_{name}' for name in ('ADD_USER', 'REMOVE_USER', 'SCRUB', 'STDIO')]
        server = self.run_server('--addr', ':0', self.root, **dict.fromkeys(names, 'true'))
        self.wait_for_line(server, 'WARNING: no authentication')
        self.assertEqual([line.partition('WARNING: ')[2] for line in server.lines if 'unknown' in line],
                         [f'unknown environment variable {name}' for name in names])

    def test_a_bad_value_is_one_line_and_status_2(self):
        status, output, error = self.run_it('--addr', 'nonsense', 'x')
        self.assertEqual((status, output, error.count('\n')), (2, '', 1))
        for words, environment in (
                ([], {}), (['a', 'b'], {}), (['--append-only=maybe', 'x'], {}), (['serve', 'restic'], {}),
                (['--bwlimit', '10X', 'x'], {}), (['--addr'], {}), (['--append', 'x'], {}), (['help'], {}),
                (['x'], {'RESTIC_SERVE_ADDR': 'nonsense'}), (['x'], {'RESTIC_SERVE_APPEND_ONLY': 'maybe'}),
                (['--bogus', 'a\nb'], {}), (['--append-only', 'false', 'x'], {}), (['--', '-a', '-b'], {}),
                (['x'], {'RESTIC_SERVE_VERBOSE': 'a'}), (['x'], {'RESTIC_SERVE_APPEND_ONLY': ''})):
            line = refusal(*words, **environment)
            self.assertTrue(line.startswith('restic_serve: '), (words, line))
            for name in environment:
                self.assertIn(name, line)

    def test_a_directory_an_address_or_a_certificate_that_cannot_be_had_is_one_line_and_status_1(self):
        file = self.folder / 'file'
        file.touch()
        taken = socket.create_server(('127.0.0.1', 0))
        self.addCleanup(taken.close)
        for words in ([file], [file / 'below'], ['/proc/none'], ['--cert', file, '--key', file, self.root],
                      ['--addr', f'127.0.0.1:{taken.getsockname()[1]}', self.root],
                      ['--addr', '127.0.0.1:0', '--log-file', self.folder, self.root]):
            status, output, error = self.run_it(*words)
            lines = [line for line in error.splitlines() if 'NOTICE' not in line]
            self.assertEqual((status, output, len(lines)), (1, '', 1), (words, error))
            self.assertTrue(lines[0].startswith('restic_serve: '), error)
        self.assertFalse(self.root.exists())

    def test_what_would_be_right_is_said(self):
        for words, right in (
                (['--keep-deleted', '30'], 'use 30d'), (['--stale-after', '2'], 'use 2d'),
                (['--scrub', '--scrub-age', '7'], 'use 7d'), (['--baseurl', '..'], 'use /backup'),
                (['--baseurl', 'a/./b'], 'use /backup'), (['--append-only', 'true'], '--append-only=false'),
                (['a dir'], 'one DIR')):
            self.assertIn(right, refusal(*words, 'dir'), words)
        self.parse('--keep-deleted', '0', '--baseurl', 'a..b/.c', 'dir')
        self.assertIn('name a file', refusal('--stdio', '--log-file', '-', 'dir'))
        users = self.folder / 'users'
        self.root.mkdir()
        self.assertEqual(self.run_it('--htpasswd', users, self.root)[::2], (
            1, f'restic_serve: --htpasswd: {users} does not exist; --add-user NAME creates it\n'))
        users.write_text('alice\nbob:$2y$05$abc\n')
        restic_serve.PasswordFile(str(users))
        self.assertEqual([re.search(': (no colon|cut off)', line)[1] for line in self.log],
                         ['no colon', 'cut off'])
        self.assertEqual(self.run_it('--scrub', users)[::2], (1, f'restic_serve: {users}: not a directory\n'))

    def test_a_log_is_written_where_it_is_read(self):
        with self.launch(sys.executable, compiled(), '--addr', '127.0.0.1:0', '--log-file', '-', self.root,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
            self.assertIn('created directory', server.stdout.readline())
            server.send_signal(signal.SIGTERM)
            self.assertEqual(server.stderr.read(), '')
        os.mkfifo(self.folder / 'fifo')
        status, _, error = self.run_it('--log-file', self.folder / 'fifo', self.root)
        self.assertEqual((status, error.count('\n')), (1, 1))

    def test_options_that_are_true_or_false_do_not_swallow_the_directory(self):
        for words, value in ((['--append-only', 'dir'], True), (['--append-only=false', 'dir'], False),
                             (['dir', '--append-only'], True), (['--append-only=true', 'dir'], True),
                             (['dir'], False)):
            options = self.parse(*words)
            self.assertEqual((options.append_only, options.arguments), (value, ['dir']), words)

    def test_the_words_of_rclone_before_the_directory_mean_nothing(self):
        for words in (['serve', 'restic', '--append-only', 'dir'], ['serve', 'restic', 'dir'],
                      ['--addr', ':1', 'serve', 'restic', '-v', 'dir'], ['--', 'dir'],
                      ['-vq', 'serve', '--append-only', 'restic', 'dir']):
            parser = restic_serve.Parser({})
            self.assertEqual(restic_serve.find_directory(parser, parser.parse(words)), ('dir', ''))
        self.assertEqual(restic_serve.find_directory(parser, parser.parse(['--', '-dir'])), ('-dir', ''))

    def test_every_option_may_come_from_the_environment(self):
        options = self.parse('dir', RESTIC_SERVE_APPEND_ONLY='true', RESTIC_SERVE_VERBOSE='2',
                             RESTIC_SERVE_ADDR=':1 [::1]:2', RESTIC_SERVE_SERVER_READ_TIMEOUT='2m',
                             RESTIC_SERVE_LOG_FILE='/x', RESTIC_SERVE_QUIET='1')
        self.assertEqual((options.append_only, options.verbose, options.addr, options.log_file,
                          options.server_read_timeout, options.quiet),
                         (True, 2, list(map(restic_serve.parse_address, (':1', '[::1]:2'))), '/x', 120, True))
        options = self.parse('--append-only=false', '--addr', ':3', 'dir',
                             RESTIC_SERVE_APPEND_ONLY='true', RESTIC_SERVE_ADDR=':1')
        self.assertEqual((options.append_only, options.addr), (False, [restic_serve.parse_address(':3')]))
        options = self.parse('dir', RESTIC_SERVE_ADDR='', RESTIC_SERVE_VERBOSE='true')
        self.assertEqual((options.addr, options.verbose), ([restic_serve.parse_address('127.0.0.1:8080')], 1))

    def test_help_and_version(self):
        status, output, error = self.run_it('--help')
        self.assertEqual((status, error), (0, ''))
        options = set(re.findall(r'-{1,2}[a-z-]+', output))
        for option in restic_serve.OPTIONS:
            self.assertEqual(option.name in options, option.help != argparse.SUPPRESS, option.name)
        self.assertEqual(self.run_it('--version'), (0, f'restic_serve {restic_serve.__version__}\n', ''))

    def test_each_request_is_logged_and_what_was_done_when_something_was(self):
        def lines(level, requests=None):
            return [line for line in server.lines if f'{level}: in ' in line
                    and (requests is None or f' {requests} requests ' in line)]

        server = self.run_server('-v', '--stats', '100ms', self.root)
        for number in (1, 2):
            self.ask(get('/config'), port=server.port)
            self.wait_until(lambda number=number: len(lines('INFO', 1)) >= number, 'a line')
        self.assertEqual(len(lines('INFO')), 2)
        self.assertEqual(sum('"GET /config HTTP/1.1" 404' in line for line in server.lines), 2)
        if hasattr(signal, 'SIGUSR1'):
            server.process.send_signal(signal.SIGUSR1)
            self.wait_until(lambda: lines('NOTICE', 0), 'the line of SIGUSR1')
        self.assertEqual(server.stop(), 0)
        self.assertEqual(len(lines('INFO')), 2)  # none when nothing was done
        server = self.run_server('--stats', '10ms', self.root)
        self.ask(get('/config'), port=server.port)
        if hasattr(signal, 'SIGUSR1'):
            def asks():  # the answer is counted after it was sent
                server.process.send_signal(signal.SIGUSR1)
                return lines('NOTICE', 1)

            self.wait_until(asks, 'the line of SIGUSR1')
        self.assertEqual(server.stop(), 0)
        self.assertEqual(lines('INFO'), [])

    def test_quotas_metrics_and_the_page_are_as_the_options_say(self):
        content, page = b'x' * 401, get('/', 'Accept: text/html')
        self.make_repository()
        for words, answers in (
                (['--max-size', '8192', '--prometheus', '--stale-after', '1h'], (
                    (post('/config', b'x' * 8193), 507), (post('/config', b'x' * 600), 200),
                    (get('/metrics'), 200), (page, 200))), (['--max-size', '4096', '--status=false'], (
                    (post(f'/data/{named(content)}', content), 507), (get('/metrics'), 404), (page, 404)))):
            server = self.run_server(*words, self.root)
            for request, status in answers:
                answer = self.ask(request, port=server.port)
                self.assertEqual(answer[0], status, (words, request[:40]))
            self.assertEqual(b'8.0 KiB of 8.0 KiB' in answer[2], status == 200)
            server.stop()

    @unittest.skipUnless(hasattr(signal, 'SIGUSR2'), 'this system has no SIGUSR2')
    def test_sigusr2_lifts_the_limit_on_bandwidth_and_puts_it_in_force_again(self):
        server = self.run_server('--bwlimit', '10M', self.root)
        self.ask(get('/config'), port=server.port)
        for word in ('off', 'on again'):
            server.process.send_signal(signal.SIGUSR2)
            self.wait_for_line(server, f'--bwlimit is {word}')
        self.assertEqual(server.stop(), 0)
        with self.run_server(self.root) as server:
            server.process.send_signal(signal.SIGUSR2)
            self.assertEqual(server.stop(), 0)

    def test_the_log_goes_to_a_file(self):
        for words, text in (([], 'try: '), (['-q'], '')):
            log = self.folder / f'log{words}'
            with Program('--addr', '127.0.0.1:0', *words, '--log-file', log, self.root, wait=False) as server:
                self.wait_until(lambda log=log, text=text: log.exists() and text in log.read_text(), 'it')
                server.stop()
                self.assertEqual(server.process.stderr.read(), '')
        self.assertEqual(log.read_text(), '')

    @unittest.skipUnless(os.path.exists('/dev/full'), 'this system has no /dev/full')
    def test_a_full_disk_for_the_log_stops_nothing(self):
        socket_path = self.folder / 'socket'
        with Program('-v', '--addr', socket_path, '--log-file', '/dev/full', self.root, wait=False) as server:
            self.wait_until(lambda: listens(str(socket_path)), 'the server')
            for _ in range(3):
                self.assertEqual(self.ask_unix(socket_path), 404)
                server.process.send_signal(signal.SIGHUP)
            self.assertEqual(server.stop(), 0)
            self.assertEqual(server.process.stderr.read(), '')

    def test_what_is_in_force_is_said_in_a_line_and_what_is_doubtful_too(self):
        users = self.folder / 'users'
        users.write_text(f'alice:{sha("a")}\nbob:{sha("b")}\n')
        empty = self.folder / 'empty'
        empty.touch()
        for words, expected in (
                ([], 'deletes allowed; no authentication'),
                (['--htpasswd', users, '--append-only', '--admin', 'bob', '--max-size', '500G',
                  '--private-repos', '--max-size-per-user', '50G', '--keep-deleted', '30d'],
                 f'append-only except for bob; 2 users from {users}; private repositories; '
                 'quota 500.0 GiB; quota 50.0 GiB per user; deleted objects kept for 30 d'),
                (['--user', 'x', '--pass', 'y', '--append-only'], 'append-only; user: x'),
                (['--user-from-header', 'X-U', '--addr', self.folder / 'socket'],
                 'deletes allowed; users from header X-U')):
            server = self.run_server(*words, self.root)
            self.wait_for_line(server, 'settings: ')
            self.assertIn(f'NOTICE: settings: {expected}', ' '.join(server.lines))
            self.assertEqual(' init' in server.lines[-2], True)
            self.assertEqual('/alice/ init' in ' '.join(server.lines), '--private-repos' in words)
            self.assertEqual(server.stop(), 0)
        self.wait_for_line(self.run_server('--htpasswd', empty, self.root),
                           f'{empty} contains no users, so nobody can log in')
        self.wait_for_line(self.run_server('--htpasswd', users, '--admin', 'carol', self.root),
                           '--admin: unknown user carol')

    def run_code(self, code, *words):
        """Exit status and last line of a Python program that begins with `code` and then is the server."""
        done = subprocess.run(
            [sys.executable, *NO_WARNING, '-c',
             f'import sys\n{code}\nimport restic_serve; sys.exit(restic_serve.main())', *map(str, words)],
            cwd=Path(MODULE).parent, capture_output=True, text=True, timeout=PATIENCE, input='',
            env=clean_environment())
        return done.returncode, done.stderr.splitlines()

    def test_a_signal_at_the_start_ends_it_even_where_exceptions_are_lost(self):
        code = """
import os, restic_serve, signal
def lose(*more):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except SystemExit:
        pass
restic_serve.start_log = lose
"""
        self.assertEqual(self.run_code(code, '--addr', '127.0.0.1:0', self.root), (0, []))

    def test_what_this_python_lacks_is_said_in_a_line(self):
        self.make_repository()
        for name, *words in (['mmap'], ['json'], ['http.server'], ['hashlib'], ['selectors'],
                             ['mmap', '--stdio']):
            self.assertEqual(self.run_code(f'sys.modules[{name!r}] = None', *words, self.root),
                             (1, [f'restic_serve: this Python lacks {name}; install python3']))

    def test_an_older_python_stops_at_a_line_that_says_so(self):
        """Python 3.6 at the first of these lines, Python 2 at the second one, before anything else."""
        lines = Path(MODULE).read_text(encoding='utf-8').partition('\n"""\n')[2].splitlines()[:3]
        self.assertEqual(lines[0], 'from __future__ import annotations  # Python 3.8 or newer is required')
        self.assertRegex(lines[2], r"^__version__: str = '.*'  +# Python 3\.8 or newer is required: 2 and")
        before = Path(MODULE).read_text(encoding='utf-8').partition(lines[2])[0]
        self.assertTrue(before.isascii())

    def test_a_running_server_needs_no_module_that_an_upgrade_takes_away(self):
        code = """
import restic_serve
class Gone:
    def find_spec(self, name, path=None, target=None):
        sys.stderr.write(f'IMPORTED {name}\\n')
trim_memory = restic_serve.trim_memory
def trim_and_forget():
    trim_memory()
    sys.meta_path.insert(0, Gone())
    restic_serve.helpers.submit(int)    # as a slow disk has it
restic_serve.trim_memory = trim_and_forget
"""
        users = self.folder / 'users'
        users.write_text(f'alice:{sha("a")}\nm\u00fcller:$2y$05${"a" * 53}\n', encoding='utf-8')
        self.make_repository()
        process = self.launch(
            sys.executable, '-c', f'import sys\n{code}\nrestic_serve.main()', '--addr', '127.0.0.1:0',
            '--htpasswd', str(users), '--prometheus', '--admin', 'alice', '--keep-deleted', '1d',
            '--max-size', '1G', '--log-format', 'json', '-v', '--trust-proxy', '127.0.0.1', '--workers', '1',
            str(self.root), text=True, cwd=Path(MODULE).parent, stderr=subprocess.PIPE,
            env=clean_environment())
        port = int(next(filter(None, (re.search(r':(\d+)/ init', line) for line in process.stderr)))[1])
        me, path = basic('alice', 'a'), f'/keys/{named(b"x")}'
        for request in (post('/config', b'x', me), post(path, b'x', me), get(path, me),
                        get('/keys/', me, f'Accept: {V2}'), get('/', me, 'Accept: text/html'),
                        get('/metrics', me), get('/health'),
                        get(path, me, method='DELETE'), get('/.at/0s/keys/', me), get('/%C3%A9/keys/', me),
                        get('/config', basic('m\u00fcller', 'x'), 'X-Forwarded-For: 1.2.3.4'), get('/x'),
                        b'rubbish\r\n\r\n'):
            self.assertLess(self.ask(request, port=port)[0], 500)
        process.send_signal(signal.SIGTERM)
        self.assertEqual([line for line in process.stderr if 'IMPORTED' in line], [])

    def test_threads_have_small_stacks(self):
        server = self.run_server('--workers', '1', self.root)
        with Wire(server.port) as wire:
            wire.ask(get('/config'))
            maps = Path(f'/proc/{server.process.pid}/maps')
            if not maps.exists():
                self.skipTest('this system does not show the memory of a process')
            sizes = [int(end, 16) - int(begin, 16) for begin, end in re.findall(
                '^([0-9a-f]+)-([0-9a-f]+) rw-p 00000000 00:00 0 *$', maps.read_text(), re.M)]
        # From glibc 2.42 on the page that guards a stack is no mapping of its own.
        self.assertTrue({restic_serve.STACK_BYTES, restic_serve.STACK_BYTES + os.sysconf('SC_PAGE_SIZE')}
                        & set(sizes), sizes)
        self.assertNotIn(8 << 20, sizes)

    def test_the_log_as_json(self):
        with Program('-v', '--addr', '127.0.0.1:0', '--log-format=json', self.root) as server:
            self.ask(get('/config?a="b"', 'User-Agent: "x"', 'Referer: y'), port=server.port)
            self.assertEqual(server.stop(), 0)
        entries = [json.loads(line) for line in server.lines]
        self.assertRegex(entries[0]['time'], r'^20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d$')
        self.assertLess(entries[4]['seconds'], PATIENCE)
        self.assertEqual([entry['level'] for entry in entries], ['NOTICE'] * 4 + ['INFO'])
        self.assertIn(f'serving {self.root} on ', entries[1]['message'])
        request = {key: entries[4][key] for key in ('client', 'user', 'request', 'status', 'bytes', 'referer',
                                                    'agent')}
        self.assertEqual(request, {
            'client': '127.0.0.1', 'user': '-', 'request': 'GET /config?a=\\x22b\\x22 HTTP/1.1',
            'status': 404, 'bytes': 10, 'referer': 'y', 'agent': '\\x22x\\x22'})
        try:
            raise ValueError('made by a test')
        except ValueError:
            record = logging.LogRecord('x', logging.DEBUG, '', 0, 'where', (), sys.exc_info())
        entry = json.loads(restic_serve.JsonFormatter().format(record))
        self.assertIn('ValueError: made by a test', entry['exception'])

    def test_a_user_is_removed_however_his_accents_are_written(self):
        file = self.folder / 'htpasswd'
        file.write_text(f'andre\u0301:{sha("old")}\nbob:{sha("b")}\n', encoding='utf-8')
        restic_serve.change_password_file(str(file), 'andr\u00e9', sha('new'))
        self.assertEqual(PasswordFile(str(file)).entries, {'andr\u00e9': sha('new'), 'bob': sha('b')})
        file.write_text(f'andre\u0301:{sha("1")}\nandr\u00e9:{sha("2")}\n', encoding='utf-8')
        PasswordFile(str(file))
        self.assertIn('line 2: duplicate user andr\u00e9; the last entry is used', self.log[-1])
        self.assertTrue(restic_serve.change_password_file(str(file), 'andr\u00e9', ''))
        self.assertEqual(file.read_text(), '')

    def test_the_journal_gets_priorities_and_no_times(self):
        with tempfile.TemporaryFile() as journal:
            status = os.fstat(journal.fileno())
            for stream, journaled in ((f'{status.st_dev}:{status.st_ino}', True), ('8:15', False)):
                journal.seek(0)
                journal.truncate()
                process = self.launch(
                    sys.executable, compiled(), '-vv', '--addr', '127.0.0.1:0', str(self.root),
                    stderr=journal, env={**clean_environment(), 'JOURNAL_STREAM': stream})

                def lines():
                    journal.seek(0)
                    return journal.read().decode().splitlines()

                self.wait_until(lambda: any('settings: ' in line for line in lines()), 'the start')
                port = int(re.search(r'127\.0\.0\.1:(\d+)/', ' '.join(lines()))[1])
                self.ask(get('/config'), port=port)
                self.wait_until(lambda: any('GET /config' in line for line in lines()), 'a request')
                process.terminate()
                process.wait()
                found = [line for line in lines() if 'serving' in line or 'GET /config' in line]
                for line, pattern in zip(found, ('<5>NOTICE: serving', r'<6>127\.0\.0\.1 - - \[')):
                    self.assertEqual(bool(re.match(pattern, line)), journaled, line)

    def test_users_are_added_and_removed_from_the_command_line(self):
        file = self.folder / 'htpasswd'

        def change(*words, password='secret\n'):
            return self.run_it('--htpasswd', file, *words, text=password)

        self.assertEqual(change('--remove-user', 'alice')[0], 1)
        self.assertFalse(file.exists())
        at_once(lambda name: change('--add-user', name, '--bcrypt-cost', '4'), 'bcde')
        self.assertEqual(set(PasswordFile(str(file)).entries), set('bcde'))
        file.unlink()
        for password, done in (('secret\n', 'added'), ('ü', 'changed the password of')):
            self.assertEqual(change('--add-user', 'alice', '--bcrypt-cost', '4', password=password),
                             (0, f'{done} alice\n', ''))
            self.assertTrue(restic_serve.verify(password.strip().encode(),
                                                PasswordFile(str(file)).entries['alice']))
        self.assertEqual(change('--remove-user', 'alice'), (0, 'removed alice\n', ''))
        self.assertEqual(change('--remove-user', 'alice')[:2], (1, ''))
        for password in ('', 'x' * 73):
            status, _, error = change('--add-user', 'bob', password=password)
            self.assertEqual((status, error.count('\n')), (1, 1))
        self.assertEqual(PasswordFile(str(file)).entries, {})
        self.assertEqual(self.run_it('--add-user', 'alice')[0], 2)
        self.assertEqual(self.run_it('--add-user', 'alice', '--htpasswd', '/missing/file')[0], 1)
        self.assertEqual(self.run_it('--htpasswd', '/missing/file', self.root)[0], 1)

    def type_password(self, *answers):
        """Exit status of --add-user on a terminal, whose questions are answered, and what it said."""
        pid, fd = pty.fork()
        if not pid:
            words = '--add-user', 'alice', '--bcrypt-cost', '4', '--htpasswd', str(self.folder / 'htpasswd')
            os.execve(sys.executable, [sys.executable, compiled(), *words], clean_environment())
        said, left = b'', list(answers)
        with open(fd, 'r+b', buffering=0) as terminal, contextlib.suppress(OSError):
            while True:     # EIO at its end
                said += terminal.read(1000)
                if said.endswith(b': ') and left:
                    terminal.write(left.pop(0))
        return os.WEXITSTATUS(os.waitpid(pid, 0)[1]), said

    def test_a_password_is_asked_for_twice_on_a_terminal_and_without_it_nothing_is_changed(self):
        file = self.folder / 'htpasswd'
        for answers, status, text in (((b'\x04',), 1, b'nothing is changed'), ((b'\x03',), 130, b''),
                                      ((b'secret\n', b'other\n'), 1, b''), ((b'secret\n',) * 2, 0, b'added')):
            got, said = self.type_password(*answers)
            self.assertEqual((got, text in said, b'Traceback' in said), (status, True, False), said)
            self.assertEqual(file.exists(), not status)
        self.assertTrue(restic_serve.verify(b'secret', PasswordFile(str(file)).entries['alice']))

    def test_a_password_from_the_environment(self):
        server = self.run_server('--user', 'alice', self.root, RESTIC_SERVE_PASS='secret')
        for login, status in (((), 401), ([basic('alice', 'secret')], 404)):
            self.assertEqual(self.ask(get('/config', *login), port=server.port)[0], status)


class MinimalHostTest(TestCase):
    """What a minimal host may lack, each hidden in turn, and the ways to start a program."""

    MODULES = {'ssl': ('ssl', '_ssl'), 'crypt': ('crypt', '_crypt'),
               **{name: (name,) for name in ('ctypes', 'fcntl', 'pwd', 'resource')}}
    ATTRIBUTES = {**{name: (f'os.{name}',) for name in (
        'fchmod', 'fchown', 'fork', 'pread', 'readv', 'sendfile', 'writev', 'O_DIRECTORY', 'O_NOFOLLOW',
        'O_PATH', 'O_TMPFILE', 'SCHED_BATCH')},
        'affinity': ('os.sched_getaffinity', 'os.sched_setaffinity'),
        'AF_UNIX': ('_socket.AF_UNIX', '_socket.socketpair'), 'MSG_MORE': ('_socket.MSG_MORE',),
        'SO_PEERCRED': ('_socket.SO_PEERCRED',), 'poll': ('select.poll', 'select.epoll'),
        'masks of signals': ('_signal.pthread_sigmask',),
        'signals': ('_signal.SIGHUP', '_signal.SIGUSR1', '_signal.SIGUSR2')}

    def hiding(self, *names):
        """A program that is the server without some pieces of Python."""
        code = [f'import sys\nsys.path.insert(0, {os.path.dirname(compiled())!r})']
        for name in names:
            code += [f'sys.modules[{module!r}] = None' for module in self.MODULES.get(name, ())]
            for attribute in self.ATTRIBUTES.get(name, ()):
                module, _, word = attribute.partition('.')
                code.append(f'import {module}\nvars({module}).pop({word!r}, None)')
        code.append('sys.argv[0] = "restic_serve"\nimport restic_serve\nrestic_serve.run()')
        return [*NO_WARNING, '-c', '\n'.join(code)]

    def launch(self, python_words, *words, **more):
        return super().launch(sys.executable, *python_words, *words, stdin=subprocess.DEVNULL,
                              stderr=subprocess.PIPE, **{'env': clean_environment(), **more})

    def check_server(self, process):
        """Take a backup of a kind, read it, and stop the server, which must have said nothing of a fault."""
        said = b''
        while b'/ init' not in said:
            line = process.stderr.readline()
            self.assertTrue(line, said)
            said += line
        content = os.urandom(300_000)
        path = f'/host/data/{named(content)}'
        port = int(re.search(rb'127\.0\.0\.1:(\d+)/ init', said)[1])
        with Wire(port) as wire:
            for request, status in ((post('/host/?create=true', b''), 200), (post(path, content), 200),
                                    (get('/host/data/', f'Accept: {V2}'), 200), (get('/metrics'), 200),
                                    (get('/', 'Accept: text/html'), 200), (get('/host/config'), 404)):
                self.assertEqual(wire.ask(request)[0], status, request[:100])
            self.assertEqual(wire.ask(get(path))[2], content)
            self.assertEqual(wire.ask(get(path, 'Range: bytes=1000-1999'))[2], content[1000:2000])
        process.terminate()
        said += process.stderr.read()
        self.assertEqual(process.wait(PATIENCE), 0, said)
        self.assertNotRegex(said, b'Traceback|ERROR|WARNING|Warning:')
        return said

    def test_without_each_piece_a_backup_works(self):
        """At once without all of them, too."""
        pieces = [*self.MODULES, *self.ATTRIBUTES]
        cases = [*((name, [name]) for name in pieces), ('all', pieces)]
        for at in range(0, len(cases), 6):  # six start at once
            running = {}
            for name, hidden in cases[at:at + 6]:
                workers = [] if 'fork' in hidden else ['--workers', '2']
                running[name] = self.launch(
                    self.hiding(*hidden), '--addr', '127.0.0.1:0', '--prometheus', '--max-size', '1G',
                    '--keep-deleted', '1d', *workers, str(self.folder / name))
            for name, process in running.items():
                with self.subTest(without=name):
                    self.check_server(process)

    def test_over_pipes_too(self):
        self.root.mkdir()
        with contextlib.ExitStack() as stack:
            running = {
                name: stack.enter_context(Stdio(self.root, program=self.hiding(name)))
                for name in ('ctypes', 'fcntl', 'pwd', 'AF_UNIX', 'affinity', 'poll', 'readv', 'writev')}
            for name, server in running.items():
                with self.subTest(without=name):
                    self.assertEqual(server.wire.ask(1, 'GET', '/config')[0], 404)
                    self.assertEqual(server.finish(close=True), (0, ''))

    def test_what_cannot_work_without_a_piece_is_said_in_a_line(self):
        empty = self.folder / 'empty'
        empty.touch()
        self.root.mkdir()
        cases = {
            ('ssl', '--cert', str(empty), '--key', str(empty)): (
                1, '--cert: this Python has no TLS support: '),
            ('fork', '--workers', '2'): (2, '--workers: must be 1, because this system has no fork'),
            ('AF_UNIX', '--addr', str(self.folder / 'socket')): (
                1, 'unix sockets are not supported on this system')}
        running = {case: self.launch(self.hiding(case[0]), *case[1:], str(self.root)) for case in cases}
        for case, process in running.items():
            with self.subTest(case=case):
                said = process.stderr.read().decode()
                status, text = cases[case]
                self.assertIn(text, said)
                self.assertEqual((process.wait(PATIENCE), said.count('\n')), (status, 1), said)

    @unittest.skipUnless(sys.platform.startswith('linux'), 'elsewhere nobody is named')
    def test_who_comes_over_a_unix_socket_is_named_all_the_same(self):
        for name in ('SO_PEERCRED', 'pwd'):
            path = str(self.folder / name)
            process = self.launch(self.hiding(name), '--addr', path, '--private-repos', str(self.root))
            while b' init' not in process.stderr.readline():
                pass
            user = restic_serve.user_name(os.getuid()) if name != 'pwd' else str(os.getuid())
            self.assertEqual(self.ask_unix(path, get(f'/{user}/config')), 404)

    def test_it_starts_however_python_is_told_to(self):
        clean = clean_environment()
        bare = {name: clean[name] for name in ('SYSTEMROOT',) if name in clean}
        plain = {**bare, 'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}
        strange = os.fsencode(self.folder / 'with spaces')
        if sys.platform.startswith('linux'):
            strange += b' \xc3\xbc and \xff\xfe'     # of which the last two are no UTF-8
        running = {}
        for name, words, environment in (
                ('isolated', ['-I', '-S'], clean), ('optimized', ['-OO'], clean),
                ('strict', ['-W', 'error', '-bb', '-X', 'dev'], clean), ('no environment', [], bare),
                ('C', [], plain), ('UTF-8', [], {**clean, 'LC_ALL': 'C.UTF-8'})):
            running[name] = self.launch(
                [*words, MODULE], '--addr', '127.0.0.1:0', '--prometheus', '-v', '--workers', '1',
                strange + b' ' + name.encode(), env=environment, cwd=str(self.folder))
        for name, process in running.items():
            with self.subTest(name):
                self.check_server(process)
                self.assertTrue(os.listdir(strange + b' ' + name.encode()))


class StdioTest(TestCase):
    """HTTP/2 over standard input and output."""

    def setUp(self):
        super().setUp()
        self.make_repository()

    def test_only_a_new_repository_makes_a_directory(self):
        root = self.folder / 'mistyped'
        with Stdio(root) as server:
            for number, (method, target, status) in enumerate((
                    ('GET', '/config', 404), ('GET', '/snapshots/', 200),
                    ('HEAD', f'/data/{named(b"x")}', 404), ('DELETE', f'/locks/{named(b"x")}', 200))):
                self.assertEqual(server.wire.ask(2 * number + 1, method, target)[0], status)
            self.assertFalse(root.exists())
            self.assertEqual(server.wire.ask(21, 'POST', '/?create=true')[0], 200)
            self.assertEqual(server.wire.ask(23, 'GET', '/snapshots/')[0], 200)
        self.assertTrue((root / 'keys').is_dir())

    def test_a_time_without_history_is_said_once(self):
        status, output, error = self.run_it('--stdio', '--keep-deleted', '1d', self.root / '.at' / '2d',
                                            text='\n')
        self.assertEqual((status, output, error.count('\n')), (1, '', 1))
        self.assertIn('restic_serve: no history', error)

    def test_uploads_downloads_and_a_clean_end(self):
        for socketed in (False, True):
            content = os.urandom(5 << 20)
            path = f'/data/{named(content)}'
            with Stdio('-v', self.root, socketed=socketed, SSH_CONNECTION='10.1.2.3 5 10.1.2.4 22') as server:
                server.wire.upload(1, path, content, ('content-length', str(len(content))))
                self.assertEqual(server.wire.answer()[0], 200)
                self.assertEqual(server.wire.ask(3, 'GET', path)[2], content)
                server.wire.send(headers(5, fields('GET', '/data/')))
                server.wire.grants = False
                server.close()  # a request that is whole is answered
                self.assertEqual(server.wire.answer(5)[0], 200)
                end = time.monotonic()
                status, log = server.finish()
                self.assertLess(time.monotonic() - end, PATIENCE / 3)
                self.assertEqual(status, 0)
                self.assertRegex(log, r'10\.1\.2\.3 - - \[\d\d/')
                self.assertIn(f'"GET {path} HTTP/2.0" 200 {len(content)}', log)

    def test_append_only_holds_and_the_environment_has_no_say(self):
        """Whoever may set variables over ssh gains nothing by them."""
        victim = self.folder / 'config'
        victim.write_text('the config of a repository\n')
        content = b'content'
        with Stdio('--append-only', self.root, RESTIC_SERVE_ADD_USER='x', RESTIC_SERVE_HTPASSWD=str(victim),
                   RESTIC_SERVE_LOG_FILE=str(victim), RESTIC_SERVE_APPEND_ONLY='false',
                   RESTIC_SERVE_NO_VERIFY_UPLOAD='true', RESTIC_SERVE_VERBOSE='2',
                   RESTIC_SERVE_SCRUB='true', RESTIC_SERVE_NONSENSE='x') as server:
            server.wire.upload(1, f'/data/{named(b"other")}', content)
            self.assertEqual(server.wire.answer()[0], 400)
            server.wire.upload(3, f'/data/{named(content)}', content)
            self.assertEqual(server.wire.answer(3)[0], 200)
            for number, kind, expected in ((5, 'data', 403), (7, 'locks', 200)):
                self.assertEqual(server.wire.ask(number, 'DELETE', f'/{kind}/{named(content)}')[0], expected)
            status, log = server.finish(close=True)
        self.assertEqual((status, log.count('\n')), (0, 1), log)  # what append-only refused
        self.assertEqual(victim.read_text(), 'the config of a repository\n')

    def test_the_end_of_input_leaves_nothing_of_half_an_upload_and_waits_for_no_window(self):
        path = self.stored(os.urandom(5 << 20))
        with Stdio(self.root) as server:
            server.wire.grants = False
            server.wire.send(headers(1, fields('POST', f'/data/{"0" * 64}'), 4), frame(DATA, 0, 1, b'x'),
                             headers(3, fields('GET', path)))
            server.wire.until(DATA)
            self.assertEqual(server.finish(close=True), (0, ''))
        self.assertEqual(len(self.files()), 1)

    def test_a_signal_ends_it_when_requests_are_done(self):
        content = os.urandom(1000)
        with Stdio(self.root) as server:
            server.wire.send(headers(1, fields('POST', f'/data/{named(content)}'), 4),
                             frame(DATA, 0, 1, content[:500]))
            server.wire.ping()
            server.process.send_signal(signal.SIGTERM)
            self.assertEqual(server.wire.until(GOAWAY)[3], word(1) + word(0))
            # What has crossed GOAWAY is nobody's fault, and not answered.
            server.wire.send(headers(3, flags=4), frame(DATA, 1, 3, b'x'), frame(DATA, 1, 1, content[500:]))
            answered = [got[2] for got in iter(server.wire.next, None) if got[0] == HEADERS]
            self.assertEqual((answered, len(self.files())), ([1], 1))
            self.assertEqual(server.finish(), (0, ''))
        with Stdio(self.root) as server:
            server.process.send_signal(signal.SIGINT)
            self.assertEqual(server.wire.until(GOAWAY)[3], word(0) + word(0))
            self.assertEqual(server.finish(), (0, ''))

    def test_what_is_no_http_2_is_told_so(self):
        for data in (b'GET / HTTP/1.1\r\nHost: x\r\n\r\n', b'PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n'):
            done = subprocess.run([sys.executable, compiled(), '--stdio', str(self.root)], input=data,
                                  capture_output=True, env=clean_environment())
            self.assertEqual((done.returncode, done.stderr.count(b'\n')), (0, 1))
            self.assertTrue(done.stdout.endswith(b'missing HTTP/2 preface'))

    def stored(self, content):
        """The path of an object that is there."""
        return f'/data/{self.put_object("", "data", content, Store(str(self.root))).name}'

    def downloading(self, size, *words):
        """A server that sends an object of so many bytes, whatever the window."""
        path = self.stored(os.urandom(size))
        server = Stdio(*words, self.root)
        self.addCleanup(server.__exit__)
        server.wire.grants = False
        server.wire.send(settings((4, TOP)), frame(WINDOW_UPDATE, 0, 0, word(TOP - 65535)),
                         headers(1, fields('GET', path)))
        return server

    def test_a_client_that_stops_reading_ends_it(self):
        server = self.downloading(8 << 20, '--server-write-timeout', '300ms')
        self.assertEqual(server.process.wait(PATIENCE), 0)

    def test_a_client_that_reads_slowly_has_not_stopped(self):
        server = self.downloading(4 << 20, '--stall-timeout', '1s')
        for _ in range(12):
            server.process.stdout.read1(32 << 10)
            time.sleep(0.1)     # a slow client
        server.process.stdout.read(3 << 20)
        self.assertIsNone(server.process.poll())

    def test_pipes_that_are_full_both_ways_hold_up_nothing(self):
        """A client that sends an upload and PINGs, and reads when it has sent all of it."""
        content, wire = os.urandom(12 << 20), self.downloading(8 << 20).wire
        wire.send(headers(3, fields('POST', f'/data/{named(content)}'), 4))
        for at in range(0, 3 << 20, 1 << 14):
            wire.send(frame(DATA, 0, 3, content[at:at + (1 << 14)]), frame(PING, 0, 0, bytes(8)))
        self.assertEqual(len(wire.answer(1)[2]), 8 << 20)
        wire.window -= 3 << 20
        wire.windows[3] -= 3 << 20
        wire.send_content(3, content[3 << 20:])
        self.assertEqual(wire.answer(3)[0], 200)

    def test_a_client_that_closes_our_output_ends_it(self):
        with Stdio(self.root) as server:
            server.process.stdout.close()
            server.wire.sock = None
            with contextlib.suppress(BrokenPipeError):
                server.sendall(frame(PING, 0, 0, bytes(8)))
            self.assertEqual(server.process.wait(PATIENCE), 0)

    def test_an_error_ends_output_at_once(self):
        for socketed in (False, True):
            with Stdio(self.root, socketed=socketed) as server:
                server.wire.send(frame(PING, 0, 3, bytes(8)))
                self.assertEqual(server.wire.until(GOAWAY)[3][4:8], word(1))
                begin = time.monotonic()
                self.assertIsNone(server.wire.next())
                self.assertLess(time.monotonic() - begin, restic_serve.LINGER_SECONDS)

    @unittest.skipUnless(os.name == 'posix', 'needs a shell')
    def test_closed_descriptors_are_one_line_and_status_2(self):
        for closed in ('<&-', '>&-', '<&- >&-'):
            done = subprocess.run(['sh', '-c', f'exec "$@" {closed}', 'sh', sys.executable, compiled(),
                                   '--stdio', str(self.root)], stdin=subprocess.DEVNULL, text=True,
                                  capture_output=True, env=clean_environment(), timeout=PATIENCE)
            self.assertEqual((done.returncode, done.stderr.count('\n')), (2, 1), (closed, done.stderr))

    def test_a_terminal_is_refused_with_what_to_do(self):
        ours, theirs = self.open_terminal()
        for stdin, stdout in ((theirs, subprocess.PIPE), (subprocess.DEVNULL, theirs)):
            done = subprocess.run([sys.executable, compiled(), '--stdio', str(self.root)], stdin=stdin,
                                  stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=PATIENCE,
                                  env=clean_environment())
            self.assertEqual((done.returncode, done.stderr.count('\n')), (2, 1), done.stderr)
            self.assertIn("restic -o rclone.program='ssh HOST restic_serve.py' -r rclone:DIR", done.stderr)
        os.close(theirs)

    def test_options_that_would_be_void_are_refused(self):
        for words in ('--htpasswd x', '--user a --pass b', '--cert x --key y', '--client-ca x', '--admin a',
                      '--private-repos', '--min-tls-version tls1.2', '--user-from-header x', '--prometheus',
                      '--allow-origin *', '--max-size-per-user 1G'):
            self.assertIn(f'restic_serve: {words.split()[0]} cannot be combined with --stdio',
                          refusal('--stdio', *words.split(), 'dir'))
        self.assertIn('--scrub', refusal('--stdio', '--scrub', 'dir'))
        self.assertEqual(refusal('--stdio', '--addr', '127.0.0.1:1', 'dir'), '')    # is ignored

    @unittest.skipIf(PYPY, "PyPy's own modules load others")
    def test_it_loads_only_what_it_needs(self):
        code = (f'import sys; sys.path.insert(0, {str(Path(MODULE).parent)!r})\n'
                'sys.argv[0] = "restic_serve.py"; import restic_serve; restic_serve.main()\n'
                'print(*sys.modules, file=sys.stderr)')
        done = subprocess.run([sys.executable, '-I', '-S', '-c', code, '--stdio', str(self.root)],
                              stdin=subprocess.DEVNULL, capture_output=True, env=clean_environment())
        self.assertEqual(done.returncode, 0, done.stderr)
        loaded = set(done.stderr.decode().split())
        self.assertIn('restic_serve', loaded)
        for name in ('http', 'socketserver', 'ssl', 'email', 'ctypes', 'base64', 'hmac', 'typing', 'resource',
                     'ipaddress', 'urllib.parse', 'tempfile', 'json', 'random'):
            self.assertNotIn(name, loaded)


# ---- restic ----------------------------------------------------------------------------------------

class ResticTestCase(TestCase):
    """A test that drives restic against the server, in a process of its own."""

    find_restic = staticmethod(lambda: peer('restic'))

    def setUp(self):
        super().setUp()
        self.restic_program = self.find_restic()
        self.source = self.folder / 'source'
        for number in range(30):
            path = self.source / f'folder {number % 3}' / f'file {number}'
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(os.urandom(100 + number * 20_000))

    def serve(self, *words, root=None):
        return self.run_server('-v', *words, root or self.root)

    def environment(self, password='secret', **more):
        return {**clean_environment(), 'RESTIC_PASSWORD': password, 'HOME': str(self.folder),
                'RESTIC_CACHE_DIR': str(self.folder / 'cache'), **more}

    def restic(self, repository, *words, check=True, **environment):
        """Status and output of a restic command."""
        done = subprocess.run([self.restic_program, '-r', str(repository), *map(str, words)],
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              env=self.environment(**environment), timeout=PATIENCE * 4)
        if check:
            self.assertEqual(done.returncode, 0, (words, done.stdout))
        return done.returncode, done.stdout

    def address(self, server, path=''):
        """The repository at a path, as restic is told it."""
        return f'rest:{server.url}{path}'

    def snapshots(self, repository, **more):
        return json.loads(self.restic(repository, 'snapshots', '--json', **more)[1])

    def moment(self):
        """A time after all that has been done, and before what follows."""
        def text(seconds=0):
            return time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(time.time() + seconds))

        moment = text(1)
        self.wait_until(lambda: text() > moment, 'the next second')
        return moment

    def roll_back(self, moment, *words, root=None):
        """Roll back the repository `host`; what was said."""
        status, output, error = self.run_it('--roll-back', moment, *words, (root or self.root) / 'host')
        self.assertEqual((status, error), (0, ''), output)
        return output.strip()

    def check_restore(self, repository):
        """What is restored is what was backed up."""
        target = self.folder / 'restored'
        self.restic(repository, 'restore', 'latest', '--target', target)
        subprocess.run(['diff', '-r', self.source, f'{target}{self.source}'], check=True)
        shutil.rmtree(target)

    def assert_sound(self, repository):
        self.assertIn('no errors were found', self.restic(repository, 'check', '--read-data')[1])


class ResticScenarios:
    """What must work with every restic."""

    def test_a_repository_from_init_to_prune(self):
        server = self.serve()
        url = self.address(server, 'host/')
        self.restic(url, 'init')
        self.restic(url, 'backup', self.source)
        (self.source / 'new').write_bytes(os.urandom(500_000))
        (self.source / 'folder 1' / 'file 1').unlink()
        self.restic(url, 'backup', self.source)
        self.assertEqual(len(self.snapshots(url)), 2)
        self.assert_sound(url)
        self.check_restore(url)
        self.restic(url, 'forget', '--keep-last', '1', '--prune')
        self.assertEqual(len(self.snapshots(url)), 1)
        (self.folder / 'password').write_text('other')
        self.restic(url, 'key', 'add', '--new-password-file', self.folder / 'password')
        self.assertEqual(len(self.snapshots(url, password='other')), 1)
        self.restic(url, 'unlock')
        # the directory itself, while it is served
        self.assertEqual(len(self.snapshots(self.root / 'host')), 1)
        self.restic(self.root / 'host', 'backup', self.source)
        self.assertEqual(len(self.snapshots(url)), 2)
        self.assert_sound(url)
        self.check_restore(url)
        self.assertEqual(server.stop(), 0)
        self.assertFalse([line for line in server.lines if ' ERROR' in line or 'Traceback' in line])

    def test_copies_and_two_hosts_at_once(self):
        server = self.serve()
        one, two = self.address(server), self.address(server, 'deep/below/two/')
        self.restic(one, 'init')
        self.restic(two, 'init')

        def backup(job):
            repository, host = job
            self.restic(repository, 'backup', '--host', host, self.source,
                        RESTIC_CACHE_DIR=str(self.folder / host))   # each host has its own

        at_once(backup, ((one, 'a'), (one, 'b'), (two, 'c')))
        self.restic(two, 'copy', '--from-repo', one, RESTIC_FROM_PASSWORD='secret')
        self.assertEqual(len(self.snapshots(two)), 3)
        for repository in (one, two):
            self.assert_sound(repository)
            self.check_restore(repository)

    def test_append_only(self):
        server = self.serve('--append-only')
        url = self.address(server, 'host/')
        self.restic(url, 'init')
        for _ in range(2):
            self.restic(url, 'backup', self.source)
        status, output = self.restic(url, 'forget', '--keep-last', '1', '--prune', check=False)
        self.assertNotEqual(status, 0, output)
        self.assertIn('403', output)
        self.assertEqual(len(self.snapshots(url)), 2)
        self.restic(url, 'unlock')
        self.restic(url, 'backup', self.source)
        self.assert_sound(url)
        self.check_restore(url)
        refused = re.compile(
            r'access denied: (127\.0\.0\.1|stdio) may not delete (/host)?/snapshots/.*; only append access')
        self.assertTrue(any(refused.search(line) for line in server.lines), server.lines)

    @long
    def test_the_past_is_read_and_rolled_back_to(self):
        server = self.serve('--keep-deleted', '30d')
        url = self.address(server, 'host/')
        self.restic(url, 'init')
        sources = []
        for _ in range(3):
            (self.source / 'new').write_bytes(os.urandom(300_000))
            self.restic(url, 'backup', self.source)
            sources.append((self.source / 'new').read_bytes())
        wanted = self.snapshots(url)
        moment = self.moment()
        # An attacker, or a wrong command
        (self.folder / 'password').write_text('other')
        self.restic(url, 'key', 'add', '--new-password-file', self.folder / 'password')
        self.restic(url, 'backup', '--host', 'attacker', self.folder / 'password', password='other')
        key = json.loads(self.restic(url, 'key', 'list', '--json', password='other')[1])
        self.restic(url, 'key', 'remove', next(one['id'] for one in key if not one['current']),
                    password='other')
        self.restic(url, 'forget', '--prune', *(one['id'] for one in wanted), password='other')
        damage = self.damage(server)
        self.assertNotEqual(self.restic(url, 'snapshots', check=False)[0], 0)
        # What was is still there to read
        past = self.address(server, f'host/.at/{moment}/')
        self.assertEqual([one['id'] for one in self.snapshots(past)], [one['id'] for one in wanted])
        for one, content in zip(wanted, sources):
            target = self.folder / 'old'
            self.restic(past, 'restore', one['id'], '--target', target, '--include', self.source / 'new')
            self.assertEqual(Path(f'{target}{self.source}/new').read_bytes(), content)
            shutil.rmtree(target)
        status, output = self.restic(past, 'backup', self.source, check=False)
        self.assertNotEqual(status, 0)
        self.assertIn('403', output)
        # and to come back
        text = self.roll_back(moment, '--dry-run')
        self.assertRegex(text, r'^host: 3 snapshots, .*1 key, .*packs? \([^)]*\) restored, '
                               r'1 snapshot, .*set aside$')
        self.assertEqual(self.roll_back(moment, '--force'), text)
        self.assertEqual([one['id'] for one in self.snapshots(url)], [one['id'] for one in wanted])
        self.restic(url, 'unlock', '--remove-all')
        self.assert_sound(url)
        self.check_restore(url)
        self.assertNotEqual(self.restic(url, 'snapshots', check=False, password='other')[0], 0)
        for path in damage:
            self.assertFalse((self.root / 'host' / path).exists())

    def damage(self, server):
        """An index that was made up."""
        content = os.urandom(1000)
        path = self.root / 'host/index' / named(content)
        path.write_bytes(content)
        return [f'index/{path.name}']


class WaysInTest(ResticTestCase):
    """restic over TLS and unix sockets."""

    @long
    def test_a_laptop_that_sleeps_in_mid_backup_ends_it_well(self):
        (self.source / 'much').write_bytes(os.urandom(60 << 20))
        server = self.serve('--stall-timeout', '1s', '--bwlimit', '20M')
        repository = self.address(server, 'laptop/')
        self.restic(repository, 'init')
        with subprocess.Popen([self.restic_program, '-r', repository, 'backup', self.source], text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              env=self.environment()) as restic:
            try:
                self.wait_until(lambda: list(self.root.glob('laptop/data/*/*')), 'the first pack')
                restic.send_signal(signal.SIGSTOP)
                self.wait_for_line(server, 'stalled uploads')
            finally:
                restic.send_signal(signal.SIGCONT)
            output = restic.stdout.read()
        self.assertEqual(restic.returncode, 0, output)
        self.assertIn('saved', output)
        self.check_restore(repository)
        self.assert_sound(repository)

    @long
    def test_a_backup_over_tls_with_a_client_certificate_while_the_certificate_is_renewed(self):
        authority = Authority(self.folder, 'server')
        authority.issue('client', 'alice')
        server = self.serve(*authority.words('server'), '--client-ca', authority.path)
        url = f'rest:{server.url}host/'
        self.assertTrue(url.startswith('rest:https://'))
        flags = ('--cacert', authority.path, '--tls-client-cert', self.folder / 'client.both')
        self.restic(url, *flags, 'init')
        for number in range(30):
            (self.source / f'more {number}').write_bytes(os.urandom(1 << 20))
        backup = self.in_thread(self.restic, url, *flags, 'backup', self.source)
        serials = []
        while backup.is_alive():
            serials.append(authority.issue('server'))
            server.process.send_signal(signal.SIGHUP)
            backup.join(0.05)

        def serial():
            text = authority.run('s_client', '-connect', f'127.0.0.1:{server.port}', '-CAfile',
                                 authority.path, '-cert', self.folder / 'client.both', '-showcerts')
            (self.folder / 'shown.pem').write_text(text)
            return int(authority.run('x509', '-in', self.folder / 'shown.pem', '-noout',
                                     '-serial').split('=')[1], 16)

        self.wait_until(lambda: serial() == serials[-1], 'the last certificate')
        self.assertIn('1 snapshots', self.restic(url, *flags, 'snapshots')[1])
        self.assertIn('no errors', self.restic(url, *flags, 'check', '--read-data')[1])
        self.assertEqual(server.stop(), 0)
        statuses = {line.split('" ')[1][:3] for line in server.lines if 'HTTP/1.1" ' in line}
        self.assertLessEqual(statuses, {'200', '206', '404'})
        self.assertFalse([line for line in server.lines if ' ERROR' in line])

    @long
    def test_a_backup_over_a_unix_socket(self):
        version = subprocess.run([self.restic_program, 'version'], capture_output=True, text=True).stdout
        if tuple(map(int, re.search(r'(\d+)\.(\d+)', version).groups())) < (0, 17):
            self.skipTest(f'it speaks over no unix socket: {version}')
        path = self.folder / 'socket'
        server = self.run_server(self.root, addr=f'unix://{path}')
        self.assertEqual(server.url, f'http+unix://{path}:/')
        url = f'rest:{server.url}host/'
        self.restic(url, 'init')
        self.restic(url, 'backup', self.source)
        self.assert_sound(url)
        self.check_restore(url)


class RolesTest(ResticTestCase):
    """restic with each right, its users in a file of Apache's htpasswd."""

    @long
    def test_what_each_role_can_do(self):
        users, rights = self.folder / 'users', self.folder / 'rights'
        for number, user in enumerate(('alice', 'restore', 'prune', 'monitor', 'eve', 'see')):
            subprocess.run([program('htpasswd'), '-bB', *(['-c'] if not number else []), '-C', '5', users,
                            user, 'pw'], check=True, capture_output=True)
        rights.write_text('alice /alice append 50G\nrestore /alice read\nprune / write\nmonitor / metrics\n'
                          'see /alice view\n')
        url = self.address(self.serve('--htpasswd', users, '--rights', rights, '--prometheus'), 'alice/')

        def run(user, *words):
            login = {'RESTIC_REST_USERNAME': user, 'RESTIC_REST_PASSWORD': 'pw'}
            return self.restic(url, *words, check=False, **login)[0]

        self.assertEqual(run('alice', 'init'), 0)
        self.assertEqual(run('alice', 'backup', self.source), 0)
        self.assertEqual(run('alice', 'backup', self.source, '--force'), 0)
        for words in (['snapshots'], ['check', '--read-data'],
                      ['restore', 'latest', '--target', self.folder / 'restored']):
            self.assertEqual(run('restore', *words), 0, words)
            self.assertEqual(run('see', *words, '--no-lock'), 0, words)
        forget = ['forget', '--keep-last', '1', '--prune']
        for user, words in (('restore', ['backup', self.source]), ('restore', forget), ('alice', forget),
                            ('eve', ['snapshots']), ('monitor', ['snapshots']), ('see', ['snapshots']),
                            ('alice', ['key', 'add', '--new-password-file', rights])):
            self.assertNotEqual(run(user, *words), 0, (user, words))
        self.assertEqual(run('prune', *forget), 0)
        self.assertEqual(run('prune', 'check', '--read-data'), 0)

    @long
    def test_a_quota_lowered_to_half_lets_forget_and_prune_free_room(self):
        for keep in ('0', '1d'):
            root = self.folder / keep
            with self.serve(root=root) as server:
                url = self.address(server, 'host/')
                self.restic(url, 'init')
                for _ in range(3):
                    (self.source / 'changing').write_bytes(os.urandom(3_000_000))
                    self.restic(url, 'backup', self.source)
            held = sum(path.stat().st_size for path in root.rglob('*') if path.is_file())
            with self.serve('--max-size', f'{held // 2}B', '--keep-deleted', keep, root=root) as server:
                url = self.address(server, 'host/')
                self.restic(url, 'forget', '--keep-last', '1')
                self.restic(url, 'prune', '--max-repack-size', '0')
                self.restic(url, 'check', '--read-data')
                now = sum(path.stat().st_size for path in root.rglob('*') if path.is_file())
                self.assertEqual(now > held * 0.9, keep != '0')    # else it returns when that expires


@long
class OldResticTest(ResticScenarios, ResticTestCase):
    """The system's restic."""

    find_restic = staticmethod(lambda: program('restic'))


class NewResticTest(ResticScenarios, ResticTestCase):
    """The restic among the peers."""

    test_copies_and_two_hosts_at_once = long(ResticScenarios.test_copies_and_two_hosts_at_once)
    test_append_only = long(ResticScenarios.test_append_only)

    test_a_repository_from_init_to_prune = long(ResticScenarios.test_a_repository_from_init_to_prune)

    def test_a_first_backup(self):
        url = self.address(self.serve(), 'host/')
        self.restic(url, 'init')
        self.restic(url, 'backup', self.source)
        self.check_restore(url)

    def serve_peer(self, command):
        """The URL of another server's; `command` is made from an address."""
        port = free_port()
        self.launch(*command(f'127.0.0.1:{port}'), stdout=subprocess.DEVNULL)
        self.wait_until(lambda: listens(('127.0.0.1', port)), 'the other server')
        return f'rest:http://127.0.0.1:{port}/host/'

    def check_exchange(self, command):
        """A repository of either server opens in the other."""
        theirs, ours = self.serve_peer(command), f'rest:{self.serve().url}host/'
        for first, second in ((theirs, ours), (ours, theirs)):
            self.restic(first, 'init')
            self.restic(first, 'backup', self.source)
            self.assertEqual(len(self.snapshots(second)), 1)
            self.restic(second, 'backup', self.source)
            self.assert_sound(second)
            self.restic(second, 'forget', '--keep-last', '1', '--prune')
            self.assert_sound(first)
            self.check_restore(first)
            shutil.rmtree(self.root / 'host')

    @long
    def test_repositories_are_exchanged_with_rest_server(self):
        rest_server = peer('rest-server')
        self.check_exchange(lambda address: [rest_server, '--no-auth', '--listen', address, '--path',
                                             str(self.root)])

    @long
    def test_repositories_are_exchanged_with_rclone(self):
        rclone = peer('rclone')
        self.root.mkdir()  # rclone caches what it listed: a lock that is gone must be gone for it too
        self.check_exchange(lambda address: [rclone, 'serve', 'restic', '--cache-objects=false',
                                             '--addr', address, str(self.root)])


class NewResticTlsTest(ResticTestCase):
    """The past over TLS."""

    damage = ResticScenarios.damage
    test_the_past_is_read_and_rolled_back_to = ResticScenarios.test_the_past_is_read_and_rolled_back_to

    def serve(self, *words):
        self.authority = Authority(self.folder, 'server')
        return super().serve(*self.authority.words('server'), *words)

    def restic(self, repository, *words, **more):
        return super().restic(repository, '--cacert', self.authority.path, *words, **more)


class StdioScenarios(ResticScenarios):
    """The same without a port: restic starts the server."""

    def serve(self, *words):
        self.lines, self.words = [], ['-v', *words]
        return self

    def stop(self):
        return 0

    def address(self, server, path=''):
        return f'rclone:{self.root}/{path}'

    def restic(self, repository, *words, **more):
        status, output = super().restic(
            repository, '-o', f'rclone.program={sys.executable} {compiled()} {" ".join(self.words)}', *words,
            **more)
        self.lines += re.findall('^rclone: .*', output, re.MULTILINE)
        return status, re.sub('(?m)^rclone: .*\n?', '', output)


class NewResticStdioTest(StdioScenarios, ResticTestCase):
    test_a_repository_from_init_to_prune = long(ResticScenarios.test_a_repository_from_init_to_prune)
    test_copies_and_two_hosts_at_once = long(ResticScenarios.test_copies_and_two_hosts_at_once)
    test_append_only = long(ResticScenarios.test_append_only)

    @long
    def test_a_server_that_is_killed_is_told_and_leaves_a_sound_repository(self):
        self.serve()
        url = self.address(self)
        self.restic(url, 'init')
        for number in range(60):
            (self.source / f'more {number}').write_bytes(os.urandom(1 << 20))
        pids = self.folder / 'pids'
        script = self.folder / 'serve'
        script.write_text(f'#!/bin/sh\necho $$ >> {pids}\nexec {sys.executable} {compiled()} "$@"\n')
        script.chmod(0o755)
        result = []

        def backup():
            result.extend(ResticTestCase.restic(self, url, '-o', f'rclone.program={script}', 'backup',
                                                self.source, check=False))

        thread = self.in_thread(backup)
        self.wait_until(lambda: any('/data/' in f'/{name}' for name in self.files()), 'a pack')
        os.kill(int(pids.read_text().split()[-1]), signal.SIGKILL)
        thread.join()
        self.assertNotEqual(result[0], 0, result)
        self.restic(url, 'unlock', '--remove-all')
        self.restic(url, 'backup', self.source)
        self.assert_sound(url)
        self.check_restore(url)
        self.assertEqual([name for name in self.files() if 'upload-' in name], [])

    @long
    def test_a_key_of_ssh_that_may_only_append_and_one_that_may_prune(self):
        sshd = program('sshd')
        keygen, ssh = program('ssh-keygen'), program('ssh')
        if os.getuid() == 0:
            os.makedirs('/run/sshd', exist_ok=True)
        for name in ('host', 'host1', 'admin'):
            subprocess.run([keygen, '-q', '-t', 'ed25519', '-N', '', '-f', self.folder / name], check=True)
        serve = f'{sys.executable} {compiled()} --stdio'
        keys = self.folder / 'authorized_keys'
        keys.write_text(''.join(
            f'restrict,command="{serve} {words} {self.root}" {(self.folder / f"{name}.pub").read_text()}'
            for name, words in (('host1', '-v --append-only'), ('admin', '-v'))))
        port, config = free_port(), self.folder / 'sshd_config'
        config.write_text(f'ListenAddress 127.0.0.1:{port}\nHostKey {self.folder}/host\nPidFile none\n'
                          f'AuthorizedKeysFile {keys}\nStrictModes no\nPasswordAuthentication no\n')
        self.launch(sshd, '-D', '-e', '-f', config)
        self.wait_until(lambda: listens(('127.0.0.1', port)), 'sshd')

        def restic(key, *words, **more):
            command = (f'{ssh} -p {port} -i {self.folder}/{key} -o StrictHostKeyChecking=no -o '
                       f'UserKnownHostsFile=/dev/null -o LogLevel=ERROR -o BatchMode=yes 127.0.0.1')
            return ResticTestCase.restic(self, 'rclone:x', '-o', f'rclone.program={command}', *words, **more)

        restic('host1', 'init')
        restic('host1', 'backup', self.source)
        restic('host1', 'backup', self.source)
        status, output = restic('host1', 'forget', '--keep-last', '1', '--prune', check=False)
        self.assertNotEqual(status, 0)
        self.assertIn('access denied: 127.0.0.1 may not delete /snapshots/', output)
        restic('admin', 'forget', '--keep-last', '1', '--prune')
        self.assertIn('no errors were found', restic('host1', 'check', '--read-data')[1])


@long
class OldResticStdioTest(StdioScenarios, ResticTestCase):
    find_restic = staticmethod(lambda: program('restic'))


# ---- Other clients and proxies ---------------------------------------------------------------------

class Http2ClientsTest(TestCase):
    """Clients of HTTP/2 at a server that speaks HTTP/1.1 alone over the network."""

    def test_a_client_that_prefers_http_2_takes_http_1(self):
        authority = Authority(self.folder, 'server')
        with Program('--addr', '127.0.0.1:0', *authority.words('server'), self.root) as server:
            said = self.curl('--http2', '--cacert', authority.path, '-w', '%{http_version}',
                             f'{server.url}config')
        self.assertTrue(said.stdout.endswith('1.1'), said)

    def test_a_client_that_insists_hears_of_its_fault(self):
        with Program('--addr', '127.0.0.1:0', self.root) as server:
            for number in range(20):
                said = self.curl('--http2-prior-knowledge', '-T', MODULE, '-X', 'POST', f'{server.url}config')
                self.assertIn(said.returncode, (16, 52), said)   # HTTP/2 framing, or an empty answer
                self.assertNotIn('pipe', said.stderr, number)
            self.assertEqual(self.curl('--http2', f'{server.url}config').stdout, 'not found\n')  # h2c

    def curl(self, *words):
        return subprocess.run([program('curl'), '-sS', *map(str, words)], capture_output=True, text=True,
                              timeout=PATIENCE)


class HaproxyTest(TestCase):
    """Downloads through haproxy."""

    def test_downloads_are_whole(self):
        haproxy = program('haproxy')
        content = os.urandom(12 << 20)
        self.put_object('', 'data', content, self.make_store())
        port, server = free_port(), self.run_server(self.root)
        (self.folder / 'haproxy.cfg').write_text(
            'defaults\n mode http\n timeout connect 5s\n timeout client 60s\n timeout server 60s\n'
            f'frontend f\n bind 127.0.0.1:{port}\n default_backend b\n'
            f'backend b\n server s 127.0.0.1:{server.port}\n')
        self.launch(haproxy, '-f', self.folder / 'haproxy.cfg')
        self.wait_until(lambda: listens(('127.0.0.1', port)), 'haproxy')

        def download(_):
            return self.ask(get(f'/data/{named(content)}'), port=port)[2] == content

        for _ in range(6):
            self.assertEqual(at_once(download, range(4)), [True] * 4)


class CurlTest(TestCase):
    """What curl makes of the answers."""

    def curl(self, *words):
        """Exit status, and the status of the answer, whose content goes into the file `out`."""
        done = subprocess.run([program('curl'), '-s', '-w', '%{http_code}', '-o', self.folder / 'out',
                               *words], capture_output=True, text=True)
        return done.returncode, done.stdout[-3:]

    def test_curl_over_tls_and_unix_sockets(self):
        authority = Authority(self.folder, 'server')
        authority.issue('client', 'alice')
        unix = self.folder / 'socket'
        with Program('--addr', unix, '--addr', 'tls://127.0.0.1:0', *authority.words('server'),
                     '--client-ca', authority.path, '--allow-origin', 'https://example.org',
                     self.root) as server:
            self.wait_for_line(server, 'https')
            url = next(re.search(r'https:\S+/', line)[0] for line in server.lines if 'https' in line)

            client = ('--cacert', authority.path, '--cert', self.folder / 'client.both')
            self.assertEqual(self.curl('--unix-socket', unix, 'http://x/config'), (0, '404'))
            self.assertEqual(self.curl(*client, f'{url}config'), (0, '404'))
            self.assertEqual(self.curl(*client, '-X', 'OPTIONS', f'{url}config'), (0, '200'))
            for half in (client[:2], client[2:]):
                self.assertNotEqual(self.curl(*half, f'{url}config')[0], 0)

    def test_curl_uploads_and_downloads(self):
        content = os.urandom(3 << 20)
        file, out = self.folder / 'file', self.folder / 'out'
        file.write_bytes(content)
        with Program('--addr', '127.0.0.1:0', '--baseurl', 'backup', self.root) as server:
            url = f'{server.url}host/data/{named(content)}'

            upload = ('-X', 'POST', '-T', file)     # with Expect
            for words, status, received in (
                    (['-X', 'POST', f'{server.url}host/?create=true'], 200, None),
                    ([*upload, url], 200, None),
                    ([*upload, '-H', 'Transfer-Encoding: chunked', url], 200, None), ([url], 200, content),
                    (['-r', '1000-1999', url], 206, content[1000:2000]), (['-I', url], 200, None),
                    ([*upload, f'{server.url}host/data/{"0" * 64}'], 400, None),
                    ([*upload, f'{server.url}nothing'], 400, None), (['--http1.0', url], 200, content)):
                self.assertEqual(self.curl(*words), (0, str(status)), words)
                if received:
                    self.assertEqual(out.read_bytes(), received)


# ---- Faults ----------------------------------------------------------------------------------------

FUZZED = 20_000 if LONG_TESTS else 500  # mutants on each wire
CUTS = 30 if LONG_TESTS else 8          # of a transfer on each wire


class FaultsTestCase(Http2TestCase):
    """Faults are made, and what must hold in spite of them is looked at."""

    TEMPORARY = ('/proc/self/fd/', os.path.dirname(os.__file__))  # what a server may open beside DIR

    def setUp(self):
        super().setUp()
        patch_for(self, restic_serve, FULL_LINES=1000)

    def resources(self):
        """Threads and descriptors of this process."""
        folder = '/proc/self/fd'
        return threading.active_count(), len(os.listdir(folder)) if os.path.isdir(folder) else 0

    def assert_nothing_left(self, before):
        """What connections used is free again."""
        self.wait_until(lambda: not self.server.served, 'the end of all connections')
        self.wait_until(lambda: all(now <= then for now, then in zip(self.resources(), before)),
                        'the end of threads and descriptors')

    def faults(self):
        """What the log has beside the server's start."""
        return [line for line in self.log if not line.startswith('created directory')]


class DiskFaultsTest(FaultsTestCase):
    """The disk fails: the client hears what rest-api says, nothing is partial, the service goes on."""

    def mount(self, options):
        """Make the directory a small file system of its own."""
        if not hasattr(os, 'geteuid') or os.geteuid() != 0:
            self.skipTest('only root can mount a file system')
        done = subprocess.run([program('mount'), '-t', 'tmpfs', '-o', options, 'tmpfs', self.root],
                              capture_output=True, text=True)
        if done.returncode:
            self.skipTest(f'this machine mounts nothing: {done.stderr}')
        self.addCleanup(subprocess.run, ['umount', '-l', self.root], check=True)
        self.store.prepare()    # else it would be a directory that has gone
        self.make_repository()

    def check_refused(self, wire, content, reason, answer='disk full'):
        """An upload is answered 507, leaves nothing, and is one line in the log."""
        path, before = f'/data/{named(content)}', self.files()
        self.log.clear()
        self.assertEqual(self.exchange(wire, 'POST', path, content), (507, f'{answer}\n'.encode()))
        self.assertEqual(self.files(), before)
        self.assertEqual(len(self.faults()), 1, self.faults())
        self.assertIn(path, self.faults()[0])
        self.assertIn(reason, self.faults()[0])
        self.assertEqual(self.exchange(wire, 'GET', path)[0], 404)

    def test_a_disk_that_is_mounted_late_is_served(self):
        with mock.patch.object(self.store, 'prepare'):
            self.mount('size=1m')
        first, second = (post(f'/data/{named(content)}', content) for content in (b'first', b'second'))
        self.assertEqual(self.ask(first)[0], 200)
        self.assertIn('a disk was mounted at', ' '.join(self.log))
        self.assertTrue((self.root / 'data' / named(b'first')[:2]).is_dir())
        for command in (['umount', '-l', self.root], ['mount', '-t', 'tmpfs', 'tmpfs', self.root]):
            subprocess.run(command, check=True)     # another disk is not the one that it was
            self.assertEqual(self.ask(second)[0], 500)
            self.assertFalse((self.root / 'data').exists())

    @long
    def test_a_disk_that_is_unmounted_during_a_backup(self):
        """Nothing is stored elsewhere; when the disk is back, the backup goes on and ends well."""
        restic, disk = peer('restic'), self.folder / 'disk'
        disk.mkdir()
        self.root = disk
        self.mount('size=200m')
        mounted = self.folder / 'mounted'
        (disk / 'backup').mkdir()
        mounted.mkdir()

        def bind():
            subprocess.run(['mount', '--bind', disk / 'backup', mounted], check=True)

        bind()
        self.addCleanup(subprocess.run, ['umount', '-l', mounted], check=False)
        source = self.folder / 'source'
        source.write_bytes(os.urandom(40 << 20))
        server = self.run_server('--must-exist', mounted)
        environment = {**clean_environment(), 'RESTIC_PASSWORD': 'x',
                       'RESTIC_REPOSITORY': f'rest:{server.url}',
                       'RESTIC_CACHE_DIR': str(self.folder / 'cache')}

        def run(*words):
            return subprocess.run([restic, *words], env=environment, check=True, capture_output=True,
                                  text=True)

        run('init')
        backup = subprocess.Popen([restic, 'backup', '--limit-upload', '8192', str(source)], env=environment,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.addCleanup(backup.stdout.close)
        self.addCleanup(backup.kill)
        self.wait_until(lambda: list((mounted / 'data').glob('??/*')), 'the first pack')
        subprocess.run(['umount', '-l', mounted], check=True)
        self.wait_for_line(server, 'is gone')
        self.assertEqual(list(mounted.iterdir()), [])
        bind()
        output = backup.communicate(timeout=2 * PATIENCE)[0]
        self.assertEqual(backup.returncode, 0, output)
        self.assertIn('no errors were found', run('check', '--read-data').stdout)
        self.assertEqual(sum('is gone' in line for line in server.lines), 1)

    def test_a_full_disk_at_the_start_is_served(self):
        self.mount('size=256k')
        self.store.create_repository('')
        self.store.save(Location('', 'config'), Bytes(b'x'))
        with contextlib.suppress(OSError), open(self.root / 'keys' / 'fill', 'wb', buffering=0) as file:
            while True:
                file.write(bytes(4096))
        with Program('--addr', '127.0.0.1:0', self.root) as server:
            self.assertTrue(any('disk full' in line for line in server.lines), server.lines)
            self.assertEqual(self.ask(get('/config'), port=server.port)[0], 200)
            self.assertEqual(server.stop(), 0)
        self.assertEqual([name for name in self.files() if 'restic_serve' in name], [])

    def test_a_full_disk(self):
        self.mount('size=1m')
        for number, wire in enumerate(self.WIRES):
            small = b'small %d' % number
            self.check_refused(wire, os.urandom(2 << 20), 'No space left on device')
            path = f'/data/{named(small)}'
            self.assertEqual(self.exchange(wire, 'POST', path, small)[0], 200)
            self.assertEqual(self.exchange(wire, 'GET', path), (200, small))

    def test_a_disk_without_inodes(self):
        self.mount('nr_inodes=24')
        for wire in self.WIRES:
            stored = []
            while True:
                content = os.urandom(10)
                self.log.clear()
                status = self.exchange(wire, 'POST', f'/keys/{named(content)}', content)[0]
                if status != 200:
                    break
                stored.append(content)
            self.assertEqual(status, 507)
            self.assertIn('No space left on device', self.faults()[0])
            for content in stored:
                path = f'/keys/{named(content)}'
                self.assertEqual(self.exchange(wire, 'GET', path), (200, content))
                self.assertEqual(self.exchange(wire, 'DELETE', path)[0], 200)

    def test_a_disk_that_can_only_be_read(self):
        self.mount('size=1m')
        path = self.put(b'content')
        subprocess.run(['mount', '-o', 'remount,ro', self.root], check=True)
        for wire in self.WIRES:
            self.check_refused(wire, b'other', 'Read-only file system', restic_serve.READ_ONLY)
            self.assertEqual(self.exchange(wire, 'DELETE', path)[0], 507)
            self.assertEqual(self.exchange(wire, 'POST', '/new/?create=true')[0], 507)
            self.assertEqual(self.exchange(wire, 'GET', path), (200, b'content'))

    def test_an_upload_whose_file_fails_leaves_nothing(self):
        def is_of_the_disk(target, *words):
            return not isinstance(target, int) or not stat.S_ISSOCK(os.fstat(target).st_mode)

        for wire in self.WIRES:
            for name in ('write', 'fsync', 'link', 'mkdir'):
                content = os.urandom(100_000)
                path = f'/{wire[5]}{name}/data/{named(content)}'
                self.make_repository(f'{wire[5]}{name}')
                with self.subTest(name, wire=wire):
                    self.log.clear()
                    with failing(is_of_the_disk, os, name):
                        self.assertEqual(self.exchange(wire, 'POST', path, content)[0], 500)
                    self.assertEqual(self.files(), [])
                    self.assertEqual(len(self.faults()), 1, self.faults())
                    self.assertIn(path, self.faults()[0])
                    self.assertIn('made by a test', self.faults()[0])
                    self.assertEqual(self.exchange(wire, 'POST', path, content)[0], 200)
                    self.assertEqual(self.exchange(wire, 'DELETE', path)[0], 200)

    def test_what_cannot_be_read_is_never_taken_for_less(self):
        small, large = self.put(b'content'), self.put(bytes(1 << 20))
        real = os.scandir

        class Entries:
            """A directory that fails after its first entry."""

            def __init__(self, path):
                self.entries = real(path)

            def __enter__(self):
                return self

            def __exit__(self, *error):
                self.entries.close()

            def __iter__(self):
                yield next(self.entries)
                raise OSError(errno.EIO, 'made by a test')

        failing = {'side_effect': OSError(errno.EIO, 'made by a test')}
        for wire in self.WIRES:
            self.log.clear()
            with mock.patch.object(restic_serve, '_read_at', **failing):
                self.assertEqual(self.exchange(wire, 'GET', small)[0], 500)
            self.assertEqual(len(self.faults()), 1, self.faults())
            with mock.patch.object(os, 'scandir', Entries):
                self.assertEqual(self.exchange(wire, 'GET', '/data/')[0], 500)
            self.assertEqual(len(self.faults()), 2, self.faults())
            with mock.patch.object(os, 'sendfile', **failing), \
                    mock.patch.object(restic_serve, '_read_at', **failing), \
                    contextlib.suppress(ConnectionResetError, AssertionError):
                status, content = self.exchange(wire, 'GET', large)
                self.assertTrue(status == 2 or len(content) < 1 << 20, status)  # 2: INTERNAL_ERROR
            self.assertEqual(len(self.faults()), 3, self.faults())
            self.assertTrue(all('made by a test' in line for line in self.faults()), self.faults())
            self.assertEqual(self.exchange(wire, 'GET', small), (200, b'content'))
            self.assertEqual(len(self.exchange(wire, 'GET', large)[1]), 1 << 20)


class WireFaultsTest(FaultsTestCase):
    """The connection fails: nothing of half a request stays."""

    def cut(self, wire, data, reset):
        """Send bytes on a new connection and end it."""
        with Wire(self.port) if wire == 'HTTP/1.1' else self.http2(preface=False) as client:
            client.send(data)
            if reset and wire == 'HTTP/1.1':
                client.reset_at_end()

    def request(self, wire, path, content):
        """The bytes of an upload, from the first of the connection."""
        if wire == 'HTTP/1.1':
            return post(path, content)
        block = fields('POST', path, ('content-length', str(len(content))))
        parts = [content[at:at + 16384] for at in range(0, len(content), 16384)]
        return b''.join((restic_serve.PREFACE, settings(), headers(1, block, END_HEADERS), *(
            frame(DATA, END_STREAM if number == len(parts) - 1 else 0, 1, part)
            for number, part in enumerate(parts))))

    def test_a_connection_that_is_cut_at_any_byte_of_a_small_request(self):
        content = b'content'
        path, before = f'/data/{named(content)}', self.resources()
        for wire in self.WIRES:
            request = self.request(wire, path, content)
            for count in range(len(request)):
                self.cut(wire, request[:count], reset=count % 2)
            self.assert_nothing_left(before)
            self.assertEqual(self.files(), [])
            self.assertEqual(self.exchange(wire, 'GET', path)[0], 404)
        self.assertEqual(self.faults(), [])

    def test_a_connection_that_is_cut_anywhere_in_an_upload(self):
        content, chance = os.urandom(300_000), random.Random(1)
        path, before = f'/data/{named(content)}', self.resources()
        for wire in self.WIRES:
            request = self.request(wire, path, content)
            for number in range(CUTS):
                self.cut(wire, request[:chance.randrange(len(request))], reset=number % 2)
            self.assert_nothing_left(before)
            self.assertEqual(self.files(), [])
            self.assertEqual(self.exchange(wire, 'POST', path, content)[0], 200)
            self.assertEqual(self.exchange(wire, 'DELETE', path)[0], 200)

    def test_a_connection_that_is_cut_anywhere_in_a_download(self):
        content, chance = os.urandom(3 << 20), random.Random(2)
        path, before = self.put(content), self.resources()
        for wire in self.WIRES:
            for number in range(CUTS):
                client = Wire(self.port) if wire == 'HTTP/1.1' else self.http2()
                with client:
                    client.send(get(path) if wire == 'HTTP/1.1' else headers(1, fields('GET', path)))
                    client.file.read(chance.randrange(60_000))
                    if number % 2 and wire == 'HTTP/1.1':
                        client.reset_at_end()
            self.assert_nothing_left(before)
            self.assertEqual(self.exchange(wire, 'GET', path), (200, content))

    def test_a_bit_that_flips_on_the_way(self):
        content, chance = os.urandom(50_000), random.Random(3)
        path = f'/data/{named(content)}'
        for wire in self.WIRES:
            for _ in range(20):
                damaged = bytearray(content)
                damaged[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
                self.assertEqual(self.exchange(wire, 'POST', path, bytes(damaged))[0], 400)
            self.assertEqual(self.files(), [])

    def test_content_that_is_longer_than_announced(self):
        content = b'content'
        path = f'/data/{named(content)}'
        with Wire(self.port) as client:  # what is too much is a bad request of its own
            self.assertEqual(client.ask(post(path, content + b'\r\nx\r\n\r\n', length=len(content)))[0], 200)
            self.assertEqual(client.answer()[0], 400)
            self.assertTrue(client.is_closed())

    @long
    def test_5000_connections_that_are_opened_and_dropped(self):
        before, lasting = self.resources(), Wire(self.port)
        self.addCleanup(lasting.__exit__)
        for number in range(5000):
            with Wire(self.port) as wire:
                if number % 2:
                    wire.reset_at_end()
            if number % 500 == 0:
                self.assertEqual(lasting.ask(get('/config'))[0], 404)
        self.assertEqual(lasting.ask(get('/config'))[0], 404)
        lasting.__exit__()
        self.assert_nothing_left(before)
        self.assertEqual([line for line in self.faults() if 'turned' not in line], [])


class MaliceTest(FaultsTestCase):
    """No request, however it is formed, reaches a file outside the directory or stops the service."""

    SECRET = b'a file outside'
    # Request line and fields of the classic ways to have two readers see two requests, each with
    # content that would be a second one.
    SMUGGLED = {
        'CL.TE': 'Content-Length: 6\r\nTransfer-Encoding: chunked',
        'TE.CL': 'Transfer-Encoding: chunked\r\nContent-Length: 4', 'a second Host': 'Host: y',
        'TE.TE, a second coding': 'Transfer-Encoding: chunked\r\nTransfer-Encoding: x',
        **{f'TE.TE, {coding!r}': f'Transfer-Encoding: {coding}' for coding in (
            'chunked, identity', 'xchunked', '"chunked"', '\x0bchunked', 'chunked\0')},
        'TE.TE, a space before the colon': 'Transfer-Encoding : chunked',
        'TE.TE, folded': 'Transfer-Encoding:\r\n chunked',
        'TE.TE, folded in another field': 'X: y\r\n\tTransfer-Encoding: chunked',
        'TE.TE, a bare CR': 'X: y\rTransfer-Encoding: chunked',
        'TE.TE, a bare LF': 'X: y\nTransfer-Encoding: chunked',
        'CL.CL': 'Content-Length: 5\r\nContent-Length: 6',
        **{f'CL {value}': f'Content-Length: {value}'
           for value in ('5, 6', '+5', '-5', '0x5', '1 5', '1_5', '9' * 30)},
        'CL.0, a space before the colon': 'Content-Length : 5',
        'a line without a colon': 'Content-Length 5', 'a name with a space': 'Content Length: 5',
    }
    # Chunks that some read otherwise; after them would come a second request.
    CHUNKED = {
        'a size with a sign': b'+5\r\nhello\r\n0\r\n\r\n', 'a hexadecimal size': b'0x5\r\nhello\r\n0\r\n\r\n',
        'a size with a space': b' 5\r\nhello\r\n0\r\n\r\n', 'an underscore': b'1_0\r\nhello\r\n0\r\n\r\n',
        'an empty size': b'\r\nhello\r\n0\r\n\r\n',
        'a size past 64 bits': b'10000000000000005\r\nhello\r\n0\r\n\r\n',
        'TERM.EXT, an extension that ends in LF': b'5;\nhello\r\n0\r\n\r\n',
        'EXT.TERM, an extension with a CR': b'5;a\rb\r\nhello\r\n0\r\n\r\n',
        'TERM.SPILL, content that ends in LF': b'5\r\nhello\n0\r\n\r\n',
        'SPILL.TERM, content without its end': b'5\r\nhello0\r\n\r\n',
        'ONE.TWO, two characters in place of a line end': b'5\r\nhelloXX0\r\n\r\n',
        'a bare LF after the size': b'5\nhello\r\n0\r\n\r\n', 'one at the end': b'5\r\nhello\r\n0\r\n\n',
        'a trailer with a space before the colon': b'5\r\nhello\r\n0\r\nX : y\r\n\r\n',
        'a folded trailer': b'5\r\nhello\r\n0\r\nX: y\r\n z\r\n\r\n',
    }

    def setUp(self):
        super().setUp()
        self.outside = self.folder / 'outside'
        self.outside.mkdir()
        Store(str(self.outside)).create_repository('')
        (self.outside / 'config').write_bytes(self.SECRET)
        self.store.create_repository('/host')

    def corpus(self):
        """Paths of requests that mean harm."""
        name, steps = named(b'x'), ('..', '%2e%2e', '.%2e', '%2E.', '%252e%252e', '..%2f', '..%5c', '..\\',
                                    '%c0%ae%c0%ae', '%e0%80%ae%e0%80%ae', '%uff0e%uff0e', '..%00',
                                    '..;', '...', '. .', '%20..', '..%20', '..%0d', '.')
        for step in steps:
            for depth in (1, 3):
                for tail in ('config', 'etc/passwd', f'data/{name}', 'outside/config', 'data/', ''):
                    yield f'/{f"{step}/" * depth}{tail}'
                    yield f'/host/{f"{step}/" * depth}{tail}'
                    yield f'/host/data/{f"{step}/" * depth}{tail}'
        yield from (
            '/etc/passwd', '//etc/passwd', '/%2fetc%2fpasswd', '/host//config', '/host/config/',
            '/host/%00config', '/host/config%00', '/host/config%00.txt', '/host/data/%00',
            f'/host/data/{name}%00', '/%', '/%zz', f'/host/data/{name[:2]}/{name}',
            f'/host/data/{name.upper()}', f'/host/data/{name}/..', f'/host/data/{name}.',
            f'/host/data/{name} ', f'/host/data/{name}%20', '/host\\config', '/host%5cconfig', '/C:/config',
            '/host/config:stream', '/host/config::$DATA', '/CON/config', '/NUL', '/dev/null',
            '/proc/self/environ', '/proc/self/fd/0', '/host/.restic_serve/config', '/.restic_serve/config',
            '/.restic_serve/scrub.json', '/%2erestic_serve/keys/', f'/{"a" * 5000}/config',
            f'/{"a/" * 2000}config', f'/{"%61" * 300}/config', f'/{"a/" * 70}config', '/\u202e/config',
            '/\ufeff/config', '/%ed%a0%80/config', '/%f4%90%80%80/config', '/%ff%fe/config', '/host/data',
            '/host/data/..%c0%af', '/*', '*', 'config', '?', '/?../config', '/host/config?x=/../y',
            '/host/config#x', '/host/;/config', '/host/config;x', '/~root/config', '/$HOME/config',
            '/`id`/config', '/host/data/*', '/host/data/[0-9]', 'http://x/../config', 'http://x//config',
            'file:///etc/passwd', '/http://x/config', '/out/config', '/out/', f'/out/data/{name}',
            '/out/data/', '/out/keys/', '/deep/out/config', '/deep/out/new/config', '/out/new/?create=true',
            '/out?create=true', '/deep/out/x/y/z/?create=true', '/host/config', f'/host/keys/{name}',
            f'/host/data/{named(b"link")}')

    @long
    def test_no_path_leads_out_of_the_directory(self):
        (self.root / 'deep').mkdir()
        for link in (self.root / 'out', self.root / 'deep/out'):
            link.symlink_to(self.outside)
        for link in (self.root / 'host/config', self.root / f'host/keys/{named(b"x")}',
                     self.root / f'host/data/{named(b"link")[:2]}/{named(b"link")}'):
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(self.outside / 'config')
        for wire in self.WIRES:  # what is imported when it is needed
            self.exchange(wire, 'GET', '/%61/config')
        events, listening = [], [True]

        def hook(event, args):
            if listening and event in ('open', 'os.listdir', 'os.scandir', 'os.mkdir', 'os.remove',
                                       'os.rename', 'os.link', 'os.chmod', 'os.rmdir', 'os.truncate'):
                events.extend((event, os.fsdecode(path)) for path in args
                              if isinstance(path, (str, bytes)) and len(path) > 3)

        before, corpus = self.tree(self.outside), list(self.corpus())
        sys.addaudithook(hook)
        try:
            for wire in self.WIRES:
                for path in corpus:
                    for method in ('GET', 'HEAD', 'POST', 'DELETE', 'PUT', 'OPTIONS', 'BREW'):
                        with self.subTest(wire=wire, method=method, path=path):
                            self.check_path(wire, method, path)
        finally:
            listening.clear()
        root = os.path.realpath(self.root)
        out = {(event, path) for event, path in events
               if not path.startswith((*self.TEMPORARY, os.devnull)) and path.startswith('/')
               # a link in the last place is opened by nobody: the flags forbid it
               and not os.path.realpath(os.path.dirname(path)).startswith(root)
               and os.path.realpath(path) != root}
        self.assertEqual(out, set())
        self.assertTrue(any(path.startswith(str(self.root)) for _, path in events))
        self.assertEqual(self.tree(self.outside), before)
        self.assertEqual((self.outside / 'config').read_bytes(), self.SECRET)

    def tree(self, folder):
        return sorted(str(path) for path in folder.rglob('*'))

    def check_path(self, wire, method, path):
        # as a client would send it: nothing that ends the request line
        path = ''.join(character if ' ' < character < '\x7f' or wire == 'HTTP/2' and character == ' '
                       else ''.join(f'%{byte:02x}' for byte in character.encode()) for character in path)
        status, content = self.exchange(wire, method, path, b'x' if method == 'POST' else b'')
        self.assertTrue(status < 500 or status == 501, (status, content))
        self.assertNotIn(self.SECRET, content)
        self.assertNotIn(b'root:', content)

    def test_requests_cannot_be_smuggled(self):
        second = b'GET /host/keys/ HTTP/1.1\r\nHost: x\r\n\r\n'
        for name, lines in self.SMUGGLED.items():
            with self.subTest(name):
                head = f'POST /host/config HTTP/1.1\r\nHost: x\r\n{lines}\r\n\r\n'
                self.check_smuggled(head.encode('latin-1') + b'0\r\n\r\n' + second)
        for name, chunks in self.CHUNKED.items():
            with self.subTest(name):
                self.check_smuggled(b'POST /host/config HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked'
                                    b'\r\n\r\n' + chunks + second)
        for name, head in {
                'TE.CL in HTTP/1.0': b'POST /host/config HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n',
                'two request lines': b'GET / HTTP/1.1\r\nGET /host/keys/ HTTP/1.1\r\nHost: x\r\n\r\n',
                'a space in the target': b'GET /host/keys/ HTTP/1.1 HTTP/1.1\r\nHost: x\r\n\r\n',
                'a version of its own': b'GET / HTTP/1.1x\r\nHost: x\r\n\r\n',
                'bare LFs': b'GET / HTTP/1.1\nHost: x\n\n', 'a bare LF': b'GET / HTTP/1.1\r\nHost: x\n\r\n',
                'no Host': b'GET / HTTP/1.1\r\n\r\n', 'TLS': b'\x16\x03\x01\r\n\r\n'}.items():
            with self.subTest(name):
                self.check_smuggled(head + second)
        # CL.0 and 0.CL: content that nobody wants is read as content, and once
        for method in ('GET', 'DELETE', 'HEAD', 'OPTIONS', 'PUT'):
            with self.subTest('CL.0', method=method), Wire(self.port) as wire:
                wire.send(get('/host/keys/', f'Content-Length: {len(second)}', method=method), second,
                          get('/none/config'))
                self.assertIsNotNone(wire.answer(head_only=method == 'HEAD'))
                self.assertEqual(wire.answer()[0], 404)
        self.assertFalse((self.root / 'host/config').exists())

    def check_smuggled(self, data):
        """It is refused, and what follows is no request."""
        status, answer, _ = self.ask_last(data)
        self.assertIn((status, answer['connection']), [(status, 'close') for status in (400, 501, 505)])

    # ---- mutants ----

    def survive(self, attack):
        """Have a number of connections attacked by four threads; nothing stays of it."""
        with Wire(self.port) as wire, self.http2() as other:  # what is imported when it is needed
            wire.ask(get('/'))
            other.ask(1)
        chances = [random.Random(number) for number in range(4)]
        for chance in chances:
            attack(chance)
        self.assert_nothing_left((threading.active_count(), 1 << 20))
        before, memory = self.resources(), resident()

        def run(chance):
            for _ in range(FUZZED // len(chances)):
                attack(chance)

        at_once(run, chances)
        self.assert_nothing_left(before)
        self.assertLess(resident() - memory, 64 << 20)
        found = [line for line in self.faults() if re.search('Error|Exception|internal|failed', line)]
        self.assertEqual(found, [])
        self.assertEqual(self.exchange('HTTP/1.1', 'GET', '/none/config')[0], 404)
        self.assertEqual(self.exchange('HTTP/2', 'GET', '/none/config')[0], 404)

    def mutate(self, chance, data):
        """Bytes with a few faults."""
        data = bytearray(data)
        pieces = (b'\r\n', b'\n', b'\r', b'\0', b':', b' ', b'\t', b'\xff', b'%', b'%2e', b'/', b'0', b'-1',
                  b'Content-Length: 5\r\n', b'Transfer-Encoding: chunked\r\n', b'Expect: 100-continue\r\n',
                  b'Connection: close\r\n', b'Range: bytes=1-\r\n', b'HTTP/1.0', b'99999999999999999999')
        for _ in range(chance.randint(1, 4)):
            at, length = chance.randrange(len(data) + 1), chance.randint(0, 12)
            kind = chance.randrange(6)
            if kind == 0 and at < len(data):
                data[at] ^= 1 << chance.randrange(8)
            elif kind == 1:
                del data[at:at + length]
            elif kind == 2:
                data[at:at] = chance.choice(pieces)
            elif kind == 3:
                data[at:at] = data[at:at + length] * chance.randint(1, 9)
            elif kind == 4:
                data[at:at + length] = bytes(chance.randrange(256) for _ in range(length))
            elif chance.random() < 0.3:
                del data[at:]
        return bytes(data)

    def test_mutants_on_http_1(self):
        stored, name = self.put(b'content', 'data', '/host'), named(b'other')
        requests = [get(stored), get(stored, 'Range: bytes=2-4'), get(stored, method='HEAD'),
                    get('/host/data/'), get('/host/config'),
                    get('/host/data/', f'Accept: {V2}', 'Connection: close'),
                    post(f'/host/keys/{name}', b'other'), post('/host/config', b'config'),
                    get(f'/host/keys/{name}', method='DELETE'), get('/a%20b/config', method='DELETE'),
                    post(f'/host/keys/{name}', b'other', 'Expect: 100-continue'),
                    b'POST /host/locks/%b HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n'
                    b'3;x=y\r\noth\r\n2\r\ner\r\n0\r\nTrailer: x\r\n\r\n' % name.encode(),
                    b'GET http://x/host/config HTTP/1.1\r\nHost: x\r\n\r\n',
                    b'OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n',
                    b'GET /host/config HTTP/1.0\r\nConnection: keep-alive\r\n\r\n']

        def attack(chance):
            data = b''.join(self.mutate(chance, chance.choice(requests)) if chance.random() < 0.8
                            else chance.choice(requests) for _ in range(chance.randint(1, 3)))
            with Wire(self.port) as wire, contextlib.suppress(ConnectionError):
                wire.send(data)
                wire.sock.shutdown(socket.SHUT_WR)
                answers = wire.file.read()
                for status in re.findall(rb'^HTTP/1\.1 (\d+)', answers, re.MULTILINE):
                    self.assertTrue(status < b'500' or status in (b'501', b'505'), (data, answers))

        self.survive(attack)

    def test_mutants_on_http_2(self):
        stored, name = self.put(b'content', 'data', '/host'), named(b'other')
        blocks = [fields('GET', stored), fields('HEAD', stored), fields('GET', '/host/data/', ('accept', V2)),
                  fields('POST', f'/host/keys/{name}', ('content-length', '5')),
                  fields('DELETE', f'/host/keys/{name}'), fields('POST', '/host/config'),
                  fields('GET', stored, ('range', 'bytes=2-4')),
                  fields('POST', f'/host/locks/{name}', ('expect', '100-continue')), b'\x3f\xe1\x1f', b'\xbe']

        def one_frame(chance):
            kind, number = chance.randrange(11), chance.choice((0, 1, 1, 1, 3, 3, 5, 7, 2, 1 << 30))
            flags = chance.choice((0, END_STREAM, END_HEADERS, 5, 5, 5, PADDED, PRIORITIZED, 0xff))
            payload = (chance.choice(blocks) if kind in (HEADERS, CONTINUATION) else
                       chance.choice((b'other', b'oth', b'', b'\x02other\0\0')) if kind == DATA else
                       bytes(chance.randrange(256) for _ in range(chance.choice((0, 4, 4, 5, 6, 8, 12)))))
            if chance.random() < 0.3:
                kind, payload = HEADERS, chance.choice(blocks)
            if chance.random() < 0.3:
                payload = self.mutate(chance, payload)
            data = frame(kind, flags, number, payload)
            return self.mutate(chance, data) if chance.random() < 0.1 else data

        def attack(chance):
            data = restic_serve.PREFACE + settings((4, chance.choice((0, 3, 65535)))) + b''.join(
                one_frame(chance) for _ in range(chance.randint(1, 8)))
            with self.piped(self.server, preface=False)[1] as wire, contextlib.suppress(ConnectionError):
                wire.send(data)
                wire.sock.shutdown(socket.SHUT_WR)
                answers = wire.file.read()
                while len(answers) >= 9:
                    length, _, _ = struct.unpack('>IBI', answers[:9])
                    kind, payload = length & 255, answers[9:9 + (length >> 8)]
                    self.assertEqual(len(payload), length >> 8, (data, answers))
                    code = payload[-4:] if kind == RST_STREAM else payload[4:8] if kind == GOAWAY else b''
                    self.assertNotEqual(code, word(2), (data, answers))  # INTERNAL_ERROR
                    answers = answers[9 + (length >> 8):]

        self.survive(attack)


def running_max(pairs):
    """The firsts of pairs in their order, and with each the largest second so far."""
    ordered = sorted(pairs)
    return ([first for first, _ in ordered],
            list(itertools.accumulate((second for _, second in ordered), max)))


def latest(found, limit):
    """The largest second of the pairs whose first is below a limit, or 0."""
    place = bisect.bisect_left(found[0], limit)
    return found[1][place - 1] if place else 0


class AtOnceTest(TestCase):
    """Many clients, several servers: what each is told is true for all of them."""

    def serve(self, *words):
        return self.run_server(*words, self.root)

    def test_100_uploads_of_one_object_store_it_once_and_all_are_told_so(self):
        content = os.urandom(200_000)
        path, together = f'/host/data/{named(content)}', threading.Barrier(100)
        self.make_repository('host')
        servers = [self.serve(), self.serve()]

        def upload(port):
            with Wire(port) as wire:
                together.wait(PATIENCE)
                return wire.ask(post(path, content))[0]

        self.assertEqual(at_once(upload, [servers[number % 2].port for number in range(100)]), [200] * 100)
        self.assertEqual(self.files(), [f'host/data/{named(content)[:2]}/{named(content)}'])

    def test_uploads_lists_and_deletes_of_the_same_names_agree_with_a_model(self):
        seconds = 60 if LONG_TESTS else 2
        self.make_repository('host')
        servers = [self.serve(), self.serve()]
        contents = [os.urandom(200 + 3000 * number) for number in range(5)]
        end = time.monotonic() + seconds

        def client(number):
            chance, done = random.Random(number), []
            wires = [Wire(server.port) for server in servers]
            with wires[0], wires[1]:
                while time.monotonic() < end:
                    wire, content = chance.choice(wires), chance.choice(contents)
                    path, what = f'/host/keys/{named(content)}', chance.choice('PPDDGGL')
                    request = {'P': post(path, content), 'D': get(path, method='DELETE'), 'G': get(path),
                               'L': get('/host/keys/', f'Accept: {V2}')}[what]
                    begin = time.monotonic()
                    status, _, answer = wire.ask(request)
                    done.append((begin, time.monotonic(), what, content, status, answer))
            return done

        done = sum(at_once(client, range(16)), [])
        for content in contents:
            self.check_history(content, done)
        self.assertGreater(len(done), 5 * seconds)
        self.assertLessEqual(len(self.files()), len(contents))

    def check_history(self, content, done):
        """What reads and lists saw of an object is what some order of the writes would show."""
        uploads, deletes = [], []
        for begin, end, what, which, status, _ in done:
            if what in 'PD' and which == content:
                self.assertEqual(status, 200)
                (uploads if what == 'P' else deletes).append((begin, end))
        # Of both: ends in their order, with the latest begin so far; and the other way round.
        ended = [running_max((end, begin) for begin, end in changes) for changes in (deletes, uploads)]
        begun = [running_max(changes) for changes in (deletes, uploads)]
        for begin, end, what, which, status, answer in done:
            if what == 'G' and which == content:
                self.assertIn(status, (200, 404))
                seen = status == 200
                if seen:
                    self.assertEqual(answer, content)
            elif what == 'L':
                sizes = {entry['name']: entry['size'] for entry in json.loads(answer)}
                seen = named(content) in sizes
                if seen:
                    self.assertEqual(sizes[named(content)], len(content))
            else:
                continue
            # The last change the other way that was surely over must have been undone since.
            over = latest(ended[not seen], begin)
            undone = latest(begun[seen], end)
            if seen or over:
                self.assertGreater(undone, over, (what, begin, end))


@long
class DeathTest(ResticTestCase):
    """A server that dies at any moment has stopped reading with it that it had answered for."""

    def test_no_success_is_said_before_the_disk_has_it(self):
        strace, trace = program('strace'), self.folder / 'trace'
        server = Program('--addr', '127.0.0.1:0', '--workers', '1', self.root, before=[
            strace, '-f', '-y', '-o', trace, '-e', 'trace=fsync,linkat,sendto,sendmsg,rename,renameat'])
        self.addCleanup(server.__exit__)
        if not server.url:
            self.skipTest(f'nothing can be traced here: {server.lines}')
        contents = [os.urandom(size) for size in (1, 600, 70_000, 3 << 20)]
        with Wire(server.port) as wire:
            self.assertEqual(wire.ask(post('/?create=true', b''))[0], 200)
            for content in contents:
                self.assertEqual(wire.ask(post(f'/data/{named(content)}', content))[0], 200)
        child, = self.children(server)
        os.kill(child, signal.SIGTERM)
        server.process.wait(PATIENCE)
        events, begun = [], {}
        for line in trace.read_text(errors='replace').splitlines():
            pid, call = line.split(None, 1)
            if call.endswith('<unfinished ...>'):
                begun[pid] = call[:-len('<unfinished ...>')]
                continue
            resumed = re.match(r'<\.\.\. \w+ resumed>(.*)', call)
            call = begun.pop(pid, '') + resumed[1] if resumed else call
            if re.search(r'= \d+(<.*>)?$', call):
                events.append(call)
        answers = [number for number, call in enumerate(events) if '"HTTP/1.1 200' in call]
        self.assertEqual(len(answers), 1 + len(contents))
        for first, last, content in zip(answers, answers[1:], contents):
            steps = events[first + 1:last]
            folder = f'{self.root}/data/{named(content)[:2]}'
            self.assertRegex(steps.pop(0), rf'^fsync\(\d+<{self.root}/data>\)')     # where that was made
            self.assertEqual(len(steps), 3, steps)
            self.assertRegex(steps[0], rf'^fsync\(\d+<{re.escape(folder)}/#\d+.*deleted')
            self.assertRegex(steps[1], rf'^linkat\(.*{named(content)}"')
            self.assertRegex(steps[2], rf'^fsync\(\d+<{re.escape(folder)}>\)')

    def test_killed_at_any_moment_of_a_backup(self):
        def start(port=0):
            return self.run_server('--workers', '2', self.root, addr=f'127.0.0.1:{port}')

        chance, server = random.Random(4), start()
        url = self.address(server, 'host/')
        self.restic(url, 'init')
        self.source.joinpath('much').mkdir()
        for number in range(50):
            for part in range(4):
                (self.source / f'much/{part}').write_bytes(os.urandom(8 << 20))
            result = []
            backup = self.in_thread(lambda url=url, done=result: done.extend(
                self.restic(url, 'backup', self.source, check=False)))
            backup.join(chance.uniform(0, 1.2))
            whom = number % 3
            if whom == 0:       # a worker: another takes its place
                os.kill(chance.choice(self.children(server)), signal.SIGKILL)
            else:
                children = self.children(server) if whom == 1 else []   # all of them, or the parent alone
                for pid in [server.process.pid, *children]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                server.__exit__()
                server = start(server.port)
            backup.join()
            if result[0]:  # restic had not yet begun to try again, or a lock was lost
                self.restic(url, 'unlock', '--remove-all')
                self.restic(url, 'backup', self.source)
            if number % 10 == 9:
                self.restic(url, 'unlock', '--remove-all')
                self.assert_sound(url)
                self.restic(url, 'forget', '--keep-last', '2', '--prune')
        self.check_restore(url)
        self.assertFalse([name for name in self.files() if 'upload-' in name])

    def test_what_a_killed_upload_left_is_removed_at_the_next_start(self):
        hidden = self.root / restic_serve.HIDDEN
        self.make_repository()
        script = ('import sys, restic_serve\nsys.argv[0] = "restic_serve"\n'
                  'del restic_serve.os.O_TMPFILE\nrestic_serve.run()')
        for number in range(2):
            with self.launch(sys.executable, '-c', script, '--addr', '127.0.0.1:0', '--workers', '1',
                             str(self.root), cwd=Path(MODULE).parent, stderr=subprocess.PIPE, text=True,
                             env=clean_environment()) as process:
                words = (re.search(r'restic -r rest:http://127.0.0.1:(\d+)', line) for line in process.stderr)
                port = int(next(filter(None, words))[1])
                left = self.files(hidden)
                with Wire(port) as wire:
                    content = os.urandom(1000)
                    wire.send(post(f'/data/{named(content)}', content)[:-1])
                    # Until its lock is held a kill leaves it for an hour, under another name.
                    self.wait_until(lambda: any(name.startswith(restic_serve.SCRATCH_PREFIX)
                                                for name in self.files(hidden)), 'an upload under way')
                    process.send_signal((signal.SIGKILL, signal.SIGTERM)[number])
            self.assertEqual(left, [])
        self.assertEqual(self.files(), [])

    def test_two_servers_and_a_local_restic_on_one_directory(self):
        urls = [self.address(self.serve(), 'host/') for _ in range(2)]
        places = [*urls, self.root / 'host']
        self.restic(places[0], 'init')

        def backup(job):
            number, place = job
            self.restic(place, 'backup', '--host', f'host{number}', self.source,
                        RESTIC_CACHE_DIR=str(self.folder / f'cache{number}'))

        at_once(backup, enumerate(places))
        for place in places:
            self.assertEqual(len(self.snapshots(place)), 3)
            self.assert_sound(place)
        self.restic(places[1], 'forget', '--host', 'host0', '--keep-last', '1', '--group-by', '', '--prune')
        self.check_restore(places[0])


@long
class SharedFileSystemTest(ResticTestCase):
    """Two servers on two mounts of one replicated file system, behind a load balancer."""

    def gluster(self, *words):
        """What the command line of GlusterFS says; it must not fail."""
        done = self.run_gluster(*words)
        self.assertEqual(done.returncode, 0, (words, done.stdout))
        return done.stdout

    def run_gluster(self, *words):
        return subprocess.run([program('gluster'), '--mode=script', *words], stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True)

    def setUp(self):
        super().setUp()
        if os.geteuid() != 0 or not os.path.exists('/dev/fuse'):
            self.skipTest('this machine cannot mount FUSE, or we are not root')
        daemon = program('glusterd')
        if self.run_gluster('volume', 'list').returncode:
            for folder in ('/var/lib/glusterd', '/var/log/glusterfs', '/run/gluster'):
                os.makedirs(folder, exist_ok=True)
            process = subprocess.Popen([daemon, '-N'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            self.addCleanup(process.wait)
            self.addCleanup(process.terminate)
            self.wait_until(lambda: not self.run_gluster('volume', 'list').returncode, 'glusterd')
        self.volume = f'restic-serve-{os.getpid()}'
        self.bricks = [f'{socket.gethostname()}:{self.folder}/brick{number}' for number in range(3)]
        self.gluster('volume', 'create', self.volume, 'replica', '3', *self.bricks, 'force')
        self.addCleanup(self.gluster, 'volume', 'delete', self.volume)
        self.gluster('volume', 'set', self.volume, 'network.ping-timeout', '5')
        self.gluster('volume', 'start', self.volume)
        self.addCleanup(self.gluster, 'volume', 'stop', self.volume, 'force')
        self.mounts = [self.folder / f'mount{number}' for number in range(2)]
        for path in self.mounts:
            path.mkdir()
            words = ['mount', '-t', 'glusterfs', f'{socket.gethostname()}:/{self.volume}', path]
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode:
                self.skipTest(f'this machine cannot mount FUSE: {done.stderr}')
            self.addCleanup(subprocess.run, ['umount', '-l', path])

    def test_a_backup_goes_on_while_a_server_and_a_brick_die(self):
        servers = [self.serve('--keep-deleted', '30d', root=path) for path in self.mounts]
        text = (README.parent / '.github' / 'PROMISES.md').read_text(encoding='utf-8')
        configuration = re.search(r'```haproxy\n(.*?)```', text, re.DOTALL)[1]
        port = free_port()
        for here, there in (('bind :8443 ssl crt /etc/haproxy/restic.pem', f'bind 127.0.0.1:{port}'),
                            ('server one 10.0.0.1:8080', f'server one 127.0.0.1:{servers[0].port}'),
                            ('server two 10.0.0.2:8080', f'server two 127.0.0.1:{servers[1].port}')):
            self.assertIn(here, configuration)
            configuration = configuration.replace(here, there)
        (self.folder / 'haproxy.cfg').write_text(configuration)
        self.launch(program('haproxy'), '-f', self.folder / 'haproxy.cfg', stdout=subprocess.DEVNULL)
        self.wait_until(lambda: listens(('127.0.0.1', port)), 'haproxy')
        url = f'rest:http://127.0.0.1:{port}/host/'
        self.restic(url, 'init')
        for number in range(24):
            (self.source / f'more {number}').write_bytes(os.urandom(8 << 20))
        result = []
        backup = self.in_thread(lambda: result.extend(
            self.restic(url, 'backup', '--limit-upload', '40000', self.source, check=False)))
        packs = self.mounts[1] / 'host/data'
        self.wait_until(lambda: len(list(packs.glob('??/*'))) > 2, 'some packs')
        servers[0].stop(signal.SIGKILL)
        self.wait_until(lambda: len(list(packs.glob('??/*'))) > 5 or result, 'more packs')
        status = self.gluster('volume', 'status', self.volume)
        os.kill(int(re.search(r'^Brick .*brick1 .* (\d+) *$', status, re.MULTILINE)[1]), signal.SIGKILL)
        backup.join()
        self.assertEqual(result[0], 0, result)
        self.assert_sound(url)
        self.check_restore(url)
        snapshot, = self.snapshots(self.mounts[1] / 'host')
        moment = self.moment()
        self.restic(url, 'forget', '--prune', snapshot['id'])
        self.assertEqual(self.snapshots(url), [])
        self.assertEqual(len(self.snapshots(f'{url}.at/{moment}/')), 1)
        self.assertIn('1 snapshot', self.roll_back(moment, '--force', root=self.mounts[1]))
        self.assert_sound(url)
        self.check_restore(url)


# ---- Chapters --------------------------------------------------------------------------------------

class ChaptersTest(unittest.TestCase):
    """The map in the module's docstring is true."""

    @classmethod
    def setUpClass(cls):
        cls.source = Path(MODULE).read_text(encoding='utf-8')
        begins = [(match[1], number) for number, line in enumerate(cls.source.split('\n'), 1)
                  for match in [re.match('# ==== (.+?) =+$', line)] if match]
        cls.chapters, cls.begins = zip(*begins)

    def names(self, code, *operations):
        """Line and name of what code loads or stores beyond its own variables.  Annotations are text."""
        line = code.co_firstlineno
        for step in dis.get_instructions(code):
            line = getattr(step, 'line_number', step.starts_line) or line
            if step.opname in operations:
                yield line, step.argval
            if isinstance(step.argval, types.CodeType) and 'LOAD_GLOBAL' in operations:
                yield from self.names(step.argval, *operations)

    def chapter(self, line):
        """The number of the chapter in which a line stands; -1 before the first."""
        return bisect.bisect_right(self.begins, line) - 1

    def test_the_docstring_names_the_chapters_in_their_order(self):
        lines = restic_serve.__doc__.split('\n')
        named = [match[1] for line in lines for match in [re.match(r' +(\w+(?: \w+)*)  +\w', line)] if match]
        self.assertEqual(named, list(self.chapters))

    def test_none_uses_what_a_later_one_defines(self):
        code = compile(self.source, MODULE, 'exec')
        homes = {}
        for line, name in self.names(code, 'STORE_NAME'):
            self.assertEqual(homes.setdefault(name, self.chapter(line)), self.chapter(line), name)
        self.assertEqual([f'{line}: {self.chapters[self.chapter(line)]} uses {name} of '
                          f'{self.chapters[homes[name]]}, which comes later'
                          for line, name in self.names(code, 'LOAD_GLOBAL', 'LOAD_NAME')
                          if homes.get(name, -1) > self.chapter(line)], [])


# ---- README ----------------------------------------------------------------------------------------

class ReadmeTest(TestCase):
    def test_the_tests_say_at_their_end_what_they_left_out(self):
        def last_lines(**environment):
            done = subprocess.run(
                [sys.executable, '-m', 'unittest', 'test_restic_serve.OneLineTest'], text=True,
                cwd=Path(MODULE).parent, capture_output=True, env=dict(clean_environment(), **environment))
            self.assertEqual(done.returncode, 0, done.stderr)
            return done.stderr.partition('OK')[2].strip()

        self.assertRegex(last_lines(), r'^Left out: tests that take minutes, of .*\bOldResticTest\b.*\. '
                                       r'RESTIC_SERVE_TEST_LONG=1 runs them\.$')
        self.assertEqual(last_lines(RESTIC_SERVE_TEST_LONG='1'), '')

    # Options in examples that are of restic, curl, docker and others.
    OTHERS = frozenset((
        'cacert', 'copy-chunker-params', 'data-raw', 'failed', 'files-from', 'forget', 'from-repo',
        'home-dir', 'ignore-existing', 'keep-daily', 'keep-last', 'keep-within', 'listen',
        'max-repack-size', 'mutants', 'no-lock', 'now', 'path', 'proxy-auth-username', 'prune', 'python',
        'read-data', 'read-data-subset', 'remove-all', 'shell', 'strict', 'system', 'target', 'tls',
        'tls-cert', 'tls-client-cert', 'tls-key'))

    def documents(self):
        """README and what it links to, by name."""
        return {path.name: path.read_text(encoding='utf-8')
                for path in (README, *sorted(HIDDEN.glob('*.md')))}

    def test_the_readme_is_short(self):
        self.assertLessEqual(len(README.read_text(encoding='utf-8').splitlines()), 350)

    def test_every_option_that_is_named_exists(self):
        ours = {option.name[2:] for option in restic_serve.OPTIONS} | {'version', 'help'}
        for name, text in self.documents().items():
            named = set(re.findall(r'(?<![\w-])--([a-z][a-z0-9-]*[a-z0-9])', text))
            self.assertLessEqual(named - self.OTHERS, ours, name)

    def test_every_option_has_its_help_and_default(self):
        text = ' '.join(restic_serve.Parser({}).format_help().split()).replace('- ', '-')
        for option in restic_serve.OPTIONS:
            if option.help != argparse.SUPPRESS:
                self.assertIn(option.name, text)
                self.assertIn(' '.join(option.help.replace('%%', '%').split()).replace('- ', '-'), text)

    def test_every_test_that_is_named_exists(self):
        named = re.findall(r'`(\w+Test)(?:\.(test_\w+))?`', ' '.join(self.documents().values()))
        self.assertGreater(len(named), 40)
        for of, name in named:
            self.assertTrue(hasattr(globals()[of], name or 'setUp'), f'{of}.{name}')

    def test_every_link_leads_somewhere(self):
        def anchors(text):
            return {re.sub(r'[^\w -]', '', head.lower()).replace(' ', '-')
                    for head in re.findall('^#+ (.*)$', text, re.MULTILINE)}

        for name, text in self.documents().items():
            base = README.parent / ('' if name == 'README.md' else '.github')
            for link in re.findall(r'\]\(([^)]+)\)', text):
                path, _, anchor = link.partition('#')
                if '://' not in link and not link.startswith('../../'):     # on the repository's host
                    target = base / path if path else base / name
                    self.assertTrue(target.exists(), f'{name}: {link}')
                    if anchor:
                        self.assertIn(anchor, anchors(target.read_text('utf-8')), f'{name}: {link}')

    def blocks(self, kind):
        return re.findall(rf'```{kind}\n(.*?)```', ''.join(self.documents().values()), re.DOTALL)

    def test_fail2ban_takes_the_filter_and_the_jail(self):
        regex, client = program('fail2ban-regex'), program('fail2ban-client')
        found = {match[1]: block for block in self.blocks('ini')
                 for match in [re.match('# /etc/fail2ban/(.*)', block)] if match}
        self.assertEqual(sorted(found), ['filter.d/restic-serve.conf', 'jail.d/restic-serve.conf'])
        folder, log = self.folder / 'fail2ban', self.folder / 'log'
        shutil.copytree('/etc/fail2ban', folder)
        failed = '2026/11/22 18:45:12 NOTICE: authentication failed for'
        log.write_text(f"{failed} 'alice' from 1.2.3.4\n{failed} 'm\u00fcller' from 2001:db8::1\n"
                       f"{failed} 'a' from 9.9.9.9' from 1.2.3.4\n"    # whatever a name may hold
                       '2026/11/22 18:45:13 NOTICE: serving /srv/backup on http://127.0.0.1:8080/\n')
        for path, block in found.items():
            (folder / path).write_text(block.replace('/var/log/restic-serve/log', str(log)))
        self.assertIn('4 lines, 0 ignored, 2 matched, 2 missed',
                      self.check_output(regex, log, folder / 'filter.d/restic-serve.conf'))
        self.assertIn('restic-serve', self.check_output(client, '-c', folder, '-d'))

    def check_output(self, *words):
        """What a program says, which must not fail."""
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              cwd=self.folder, env=clean_environment())
        self.assertEqual(done.returncode, 0, done.stdout)
        return done.stdout

    def start_nginx(self, content):
        """The port of an nginx, in one process, whose server is configured so."""
        port = free_port()
        (self.folder / 'nginx.conf').write_text(
            f'daemon off;\nmaster_process off;\nuser root;\npid {self.folder}/pid;\n'
            f'error_log {self.folder}/error.log;\nevents {{}}\n'
            f'http {{\naccess_log off;\nclient_body_temp_path {self.folder}/body;\n'
            f'server {{\nlisten 127.0.0.1:{port};\n{content}}}\n}}\n')
        self.launch(program('nginx'), '-c', self.folder / 'nginx.conf', '-p', self.folder)
        self.wait_until(lambda: listens(('127.0.0.1', port)), 'nginx')
        return port

    def test_behind_nginx_fail2ban_finds_the_client_and_not_the_proxy(self):
        regex, folder = program('fail2ban-regex'), self.folder
        (folder / 'filter').write_text(next(block for block in self.blocks('ini') if 'filter.d' in block))
        (folder / 'users').write_text(f'alice:{sha("right")}\n')
        port = self.start_nginx(f'location / {{\nproxy_pass http://unix:{folder}/socket;\n'
                                'proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;\n}\n')
        with Program('-v', '--addr', folder / 'socket', '--htpasswd', folder / 'users', '--socket-auth',
                     '--trust-proxy', '127.0.0.1', '--log-file', folder / 'log', self.root,
                     wait=False) as server:
            self.wait_until(lambda: listens(str(folder / 'socket')), 'the server')
            with socket.create_connection(('127.0.0.1', port), PATIENCE, ('127.0.0.2', 0)) as client:
                client.sendall(get('/config', basic('alice', 'wrong'), 'X-Forwarded-For: 6.6.6.6'))
                self.assertIn(b' 401 ', client.recv(1000))
            self.assertEqual(server.stop(), 0)
        output = self.check_output(regex, '-v', folder / 'log', folder / 'filter')
        self.assertIn('1 matched', output)
        self.assertRegex(output, r'\n\| +127\.0\.0\.2 ')
        self.assertIn('127.0.0.2 - - [', (folder / 'log').read_text())

    def test_haproxy_takes_the_configuration(self):
        haproxy, path = program('haproxy'), self.folder / 'haproxy.cfg'
        Authority(self.folder, 'restic')
        path.write_text(self.blocks('haproxy')[0].replace('/etc/haproxy/restic.pem',
                                                          f'{self.folder}/restic.both'))
        self.check_output(haproxy, '-c', '-f', path)

    def test_no_example_lets_strangers_in(self):
        """An example that listens on more than this host has users, and TLS or a proxy before it; and none
        has a password in a URL that other users of the host can see."""
        units = [(HIDDEN / 'systemd' / 'restic-serve.service').read_text(),
                 (HIDDEN / 'compose.yaml').read_text().replace('\n      --', ' --')]
        self.assertEqual(re.findall(r'(?m)^(?!export ).*https?://[^/\s]*:[^/\s@]*@',
                                    ''.join(self.documents().values())), [])
        commands = [line for block in [*self.blocks('sh'), *self.blocks('ini'), *units]
                    for line in block.replace('\\\n', ' ').splitlines() if 'restic_serve.py' in line]
        self.assertGreater(len(commands), 10)
        for command in commands:
            if '--addr :' in command or 'ExecStart' in command:
                self.assertIn('--htpasswd', command)
                self.assertRegex(command, '--cert|--trust-proxy|-p 127.0.0.1:')

    def test_the_tables_of_rights_are_good(self):
        part = README.read_text(encoding='utf-8').partition('## Users and rights')[2].partition('\n## ')[0]
        first, family, fleet = (restic_serve.parse_rights(block) for kind, block in re.findall(
            r'^```(\w*)\n(.*?)^```$', part, re.DOTALL | re.MULTILINE) if not kind)
        self.assertEqual(len(first.rules), 6)
        for rights, user, path, may in (
                (first, 'alice', '/alice/pc', 'append'), (first, 'eve', '/eve', 'append'),
                (first, 'prune', '/bob', 'write'), (first, 'bob', '/alice', 'none'),
                (family, 'father', '/father', 'write'), (family, 'father', '/anna', 'write'),
                (family, 'anna', '/shared/photos', 'append'), (family, 'anna', '/father', 'none'),
                (fleet, 'prune', '/host1', 'write'), (fleet, 'host1', '/host1', 'append')):
            self.assertEqual(rights.find(user, path)[0], may, (user, path))

    # What promtool feeds to the rules, a value a minute, and which alerts fire after how many minutes.
    ALERTS = """
rule_files: [rules.yml]
evaluation_interval: 1m
tests:
- interval: 1m
  input_series:
  - {series: 'up{job="restic_serve"}', values: '1x5 0x30 1x30'}
  - {series: 'restic_serve_repository_last_snapshot_timestamp_seconds{repo="a"}', values: '-172800x60'}
  - {series: 'restic_serve_repository_last_snapshot_timestamp_seconds{repo="b"}', values: '0x60'}
  - {series: 'restic_serve_repository_scrub_damaged_objects{repo="a"}', values: '0x10 2x50'}
  - {series: 'restic_serve_disk_bytes', values: '1000x60'}
  - {series: 'restic_serve_disk_free_bytes', values: '500x10 50x50'}
  - {series: 'rest_server_blob_delete_total{repo="a",type="snapshots"}', values: '0x10 30x50'}
  - {series: 'restic_serve_refused_logins_total', values: '0+10x60'}
  - {series: 'restic_serve_certificate_end_timestamp_seconds', values: '1815000x60'}
  alert_rule_test:
"""

    def test_the_alert_rules_in_the_readme_are_good_and_fire(self):
        rules = (HIDDEN / 'prometheus-rules.yml').read_text()
        names = re.findall('alert: (.*)', rules)
        fires = {'BackupServerDown': (10, 20, 40), 'BackupOverdue': (10, 20, None),
                 'BackupDamaged': (5, 12, None), 'BackupDiskNearlyFull': (20, 30, None),
                 'SnapshotsDeleted': (5, 15, None), 'BackupLoginsRefused': (0, 15, None),
                 'BackupCertificateEnds': (5, 15, None)}
        labels = {'BackupServerDown': 'job: restic_serve', 'BackupDiskNearlyFull': '',
                  'BackupLoginsRefused': '', 'BackupCertificateEnds': ''}
        text = self.ALERTS
        for name, (before, after, over) in fires.items():
            for minute, firing in ((before, False), (after, True), (over, False)):
                if minute is not None:
                    more = ', exp_annotations: {summary: "a: last snapshot 2d 0h 20m 0s ago"}'
                    alert = (f'exp_labels: {{{labels.get(name, "repo: a")}}}'
                             f'{more if name == "BackupOverdue" else ""}')
                    said = f', exp_alerts: [{{{alert}}}]' if firing else ''
                    text += f'  - {{eval_time: {minute}m, alertname: {name}{said}}}\n'
        (self.folder / 'rules.yml').write_text(rules)
        (self.folder / 'tests.yml').write_text(text)
        for command in (['check', 'rules', 'rules.yml'], ['test', 'rules', 'tests.yml']):
            self.check_output(program('promtool'), *command)
        self.assertEqual(len(names), 13)

    def test_what_to_do_next_is_in_a_chapter(self):
        for step in restic_serve.NEXT_STEPS.values():
            self.assertRegex(README.read_text(), rf'(?m)^##+ {re.search("README, (.*)[)]$", step)[1]}$')

    def test_the_commands_for_events_in_the_readme_tell_what_has_happened(self):
        block = next(block for block in self.blocks('sh') if '--on-event' in block)
        commands = re.findall(r"^--on-event '(.*)'", block, re.MULTILINE)
        self.assertEqual(len(commands), 3)
        folder = self.folder
        for word in ('mail', 'curl'):
            (folder / word).write_text(f'#!/bin/sh\nprintf "%s\\n" {word} "$@" - >> {folder}/heard\n'
                                       f'cat >> {folder}/heard\n')
            (folder / word).chmod(0o755)
        for event, command in itertools.product(('snapshot', 'overdue'), commands):
            done = subprocess.run(['sh', '-c', command], stdin=subprocess.DEVNULL, capture_output=True, env={
                'PATH': f'{folder}:{os.environ["PATH"]}', 'RESTIC_SERVE_EVENT': event,
                'RESTIC_SERVE_MESSAGE': '@/etc/passwd: $(touch x)'})
            self.assertEqual((done.returncode, done.stdout, done.stderr), (0, b'', b''))
        heard = (folder / 'heard').read_text()
        self.assertEqual([heard.count(f'{word}\n') for word in ('mail', 'curl')], [1, 3])
        self.assertEqual(heard.count('@/etc/passwd: $(touch x)\n'), 3)
        self.assertEqual(heard.count('--data-raw\n@'), 2)

    def test_the_nginx_of_the_readme_lets_nobody_in_without_a_password(self):
        text, folder = self.documents()['PROXIES.md'], self.folder
        block = re.search(r'```nginx\n(.*?)```', text, re.DOTALL)[1]
        command = re.search(r'```sh\npython3 restic_serve\.py ([^`]*--user-from-header[^`]*)```', text)[1]
        (folder / 'users').write_text(f'alice:{sha("right")}\n')
        for old, new in (('/run/restic-serve/socket', f'{folder}/socket'),
                         ('/etc/nginx/restic-users', f'{folder}/users')):
            self.assertIn(old, block)
            block = block.replace(old, new)
            command = command.replace(old, new)
        port = self.start_nginx(block)
        with Program(*command.replace('\\\n', ' ').replace('/srv/backup', str(self.root)).split()) as server:
            self.assertEqual([line for line in server.lines if 'NOTICE' not in line], [])
            for user, status, *login in (
                    ('alice', 401), ('alice', 401, basic('alice', 'wrong')),
                    ('alice', 401, basic('nobody', '')), ('alice', 404, basic('alice', 'right')),
                    ('alice', 401, 'X-Forwarded-User: alice'),
                    # whoever is in cannot name another
                    ('bob', 403, basic('alice', 'right'), 'X-Forwarded-User: bob')):
                self.assertEqual(self.ask(get(f'/backup/{user}/config', *login), port=port)[0], status, login)

    def test_a_release_runs_and_is_the_same_each_time(self):
        folder = self.folder / 'release'
        self.check_output(sys.executable, README.parent / '.ci' / 'release', folder)
        self.assertEqual(sorted(os.listdir(folder)), ['SHA256SUMS', 'restic_serve.py', 'restic_serve.pyz'])
        self.assertEqual(self.check_output(folder / 'restic_serve.pyz', '--version'),
                         f'restic_serve {restic_serve.__version__}\n')

    def test_the_environment_file_has_every_option(self):
        text = (HIDDEN / 'restic-serve.env').read_text().splitlines()
        lines, title = text[:2], ''
        for entry in restic_serve.HELP:
            if isinstance(entry, str):
                title = entry
            elif entry.variable and entry.help != argparse.SUPPRESS:
                words = textwrap.wrap(entry.help.replace('%%', '%'), 106, break_on_hyphens=False)
                lines += [f'# ==== {title} ====', ''] * bool(title) + [f'# {line}' for line in words]
                lines += [f'#{entry.variable}={entry.metavar or "true"}', '']
                title = ''
        self.assertEqual(text, lines[:-1])

    def run_steps(self, steps, restic, changes):
        """What a script of the README says in the test's folder, with some words changed."""
        for old, new in {'/etc/restic-serve': self.folder, '/tmp/restored': self.folder / 'restored',
                         **changes}.items():
            steps = steps.replace(old, str(new))
        done = subprocess.run(
            [program('bash'), '-ec', steps], cwd=self.folder, stdin=subprocess.DEVNULL, timeout=PATIENCE * 4,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={
                **clean_environment(), 'PATH': f'{os.path.dirname(restic)}:{os.environ["PATH"]}',
                'HOME': str(self.folder), 'RESTIC_PASSWORD': 'a', 'RESTIC_FROM_PASSWORD': 'a'})
        self.assertEqual(done.returncode, 0, done.stdout)
        return done.stdout

    def block(self, word):
        """The script of the README that has a word in it."""
        return next(block for block in self.blocks('sh') if word in block)

    def test_a_first_backup_goes_as_the_readme_says_with_old_and_new_restic(self):
        old, new, _ = program('restic'), peer('restic'), program('openssl')
        (self.folder / 'documents').mkdir()
        (self.folder / 'documents' / 'letter').write_text('Dear reader')
        (self.folder / 'users').write_text(f'laptop:{sha("login-password")}\n')
        certificate = re.search(r'(?s)openssl req.*?server\.pem\n', self.block('openssl req'))[0]
        self.run_steps(certificate, '', {'192.168.1.5': '127.0.0.1'})
        server = self.run_server('--cert', self.folder / 'server.pem', '--key', self.folder / 'server.key',
                                 '--htpasswd', self.folder / 'users', '--private-repos', self.root)
        address = {'backup.example.org:8443': f'127.0.0.1:{server.port}'}
        if not re.match(r'restic 0\.1[0-5]\.', self.check_output(new, 'version')):
            self.run_steps(self.block('restic restore'), new, address)
            self.assertEqual(next(self.folder.glob('restored/**/letter')).read_text(), 'Dear reader')
        steps = self.block('@backup.example.org').replace('laptop/ ', 'laptop/old/ ')
        backup = steps.splitlines()[-1]
        steps = steps.replace(backup, '\n'.join(backup.replace('backup ~/documents', verb) for verb in (
            'init', 'backup ~/documents', 'snapshots')))
        self.assertIn('1 snapshots', self.run_steps(steps, old, address))

    def test_the_units_in_the_readme_are_good(self):
        analyze = program('systemd-analyze')
        units = [shutil.copy(path, self.folder) for path in (HIDDEN / 'systemd').iterdir()]
        self.assertEqual(len(units), 6)
        self.assertEqual(self.check_output(analyze, 'verify', *units), '')

    @long
    def test_second_copies_are_whole_while_backups_go_on(self):
        program('rsync')
        restic, server = peer('restic'), self.run_server('--keep-deleted', '1d', self.root)
        url, data = f'rest:{server.url}laptop/', self.folder / 'documents'
        data.mkdir()

        def run(words, repository=url):
            return self.run_steps(f'restic -q -r {repository} {words}', restic, {})

        def back_up(number):
            (data / str(number)).write_bytes(os.urandom(2_000_000))
            run(f'backup {data}')

        run('init')
        back_up(0)
        run(f'init --from-repo {url} --copy-chunker-params', self.folder / 'copied')
        changes = {'rest:https://backup.example.org:8443/laptop/': url, '2026-11-20T12:00:00Z': '0s',
                   '/srv/copy/laptop': self.folder / 'copied', '/srv/backup/laptop': self.root / 'laptop',
                   'backup@nas:': '', 'ssh backup@nas': ''}
        with ThreadPoolExecutor() as pool:
            going_on = pool.map(back_up, range(1, 6))
            self.run_steps(self.block('--from-repo'), restic, changes)
            changes['/srv/copy/laptop'] = self.folder / 'pulled'
            self.run_steps(self.block('rsync'), restic, changes)
            list(going_on)
        for copy_ in ('copied', 'pulled'):
            run('check --read-data', self.folder / copy_)
            self.assertGreater(len(json.loads(run('snapshots --json', self.folder / copy_))), 0)


if __name__ == '__main__':
    unittest.main()
