#!/usr/bin/env python3
"""A day's work for one server, in half an hour, and what it leaves behind:

    .ci/day.py [--minutes 30] [--python PYTHON]
    .ci/day.py --quick              # the same in about a minute

restic and curl work over HTTP and TLS, back up, prune, read the past, give wrong passwords and
break off, while workers are killed, certificates and users renewed and the log is rotated.  After the first
minute and at the end the load rests, and the idle server's memory, descriptors and threads are compared.

The exit status is 1 if memory has grown by more than 20 % and 8 MiB, or descriptors or threads by more than
a few; if a restic command failed, also by a killed worker, since restic tries again; if an answer was not
the expected one, or a request failed while no worker was killed; if a new certificate or user was not in
force in time; if a repository is not sound at the end (check --read-data); or if the log has an error.

Needs Linux, restic 0.16, curl and openssl.
"""
from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Callable, Counter, Dict, List, Optional, Set, Tuple

from common import MODULE, Served, free_port, of_process
import restic_serve as rs   # of which common knows the path

WORKERS = 4
GROWTH, GROWTH_MIB = 1.2, 8.0       # what memory may be at the end, of that after the first minute
MORE_DESCRIPTORS, MORE_THREADS = 4, 4
QUOTA, BEYOND_QUOTA = '8G', 9 << 30
IDLE_SECONDS = 7                    # in which the server's threads have ended
IN_FORCE_SECONDS = 15               # until new certificates and users are in force
SETTLE_SECONDS = 2                  # around a killed worker, in which requests may fail
OBJECT_BYTES = 64 << 10
TOLD_FAULTS = 100                   # the others are counted
ADMIN = 'admin'
# Who uses restic, and over which wire.
CLIENTS = (('anna', 'tls'), ('bert', 'tls'), ('cleo', 'plain'))
# Who uses curl, over which wire, with which options, and the version of HTTP that it must be.
Wire = Tuple[str, str, Tuple[str, ...], str]
WIRES: Tuple[Wire, ...] = (
    ('wire1', 'plain', ('--http2',), '1.1'),    # it asks for h2c
    ('wire2', 'tls', ('--http2',), '1.1'),
    ('wire3', 'tls', ('--http1.1',), '1.1'))
GUESTS = tuple(f'guest{number}' for number in range(6))     # users who come and go
PASSWORD = 'right'


def entry(user: str, password: str) -> str:
    """A line of the password file with a cheap hash."""
    return f'{user}:{{SHA}}' + base64.b64encode(hashlib.sha1(password.encode()).digest()).decode()


def replace(path: Path, content: bytes) -> None:
    """Write a file as careful programs do, by renaming a new one."""
    new = path.with_suffix('.new')
    new.write_bytes(content)
    new.replace(path)


class Authority:
    """Issues certificates for this host."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.certificate = folder / 'ca.pem'
        (folder / 'san').write_text('subjectAltName=DNS:localhost,IP:127.0.0.1\n')
        self._openssl('req', '-x509', *self._new_key('ca.key'), '-subj', '/CN=authority', '-days', '2',
                      '-out', 'ca.pem')

    def _openssl(self, *words: str) -> None:
        subprocess.run(['openssl', *words], cwd=self.folder, check=True, stdin=subprocess.DEVNULL,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    @staticmethod
    def _new_key(name: str) -> List[str]:
        return ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes', '-keyout', name]

    def issue(self) -> bytes:
        """Replace the server's certificate and key; the certificate."""
        self._openssl('req', '-new', *self._new_key('next.key'), '-subj', '/CN=localhost', '-out', 'csr')
        self._openssl('x509', '-req', '-in', 'csr', '-CA', 'ca.pem', '-CAkey', 'ca.key', '-CAcreateserial',
                      '-days', '2', '-extfile', 'san', '-out', 'next.pem')
        issued = (self.folder / 'next.pem').read_text()
        replace(self.folder / 'cert.pem', issued.encode())
        replace(self.folder / 'key.pem', (self.folder / 'next.key').read_bytes())
        return ssl.PEM_cert_to_DER_cert(issued)

    def trust(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.certificate))


class Busy(Served):
    """The server, with workers."""

    def __init__(self, python: str, folder: Path) -> None:
        self.log, self.htpasswd = folder / 'log', folder / 'users'
        self.authority = Authority(folder)
        self.authority.issue()
        self.slow = [f'{name}:{rs.new_entry(PASSWORD.encode(), 5)}'
                     for name in (ADMIN, *(one[0] for one in (*CLIENTS, *WIRES)))]
        self.write_users({})
        self.hosts = {wire: f'127.0.0.1:{free_port()}' for wire in ('tls', 'plain')}
        super().__init__(
            [python, MODULE, '--workers', WORKERS, '--addr', f'tls://{self.hosts["tls"]}',
             '--addr', f'http://{self.hosts["plain"]}', '--cert', folder / 'cert.pem',
             '--key', folder / 'key.pem', '--htpasswd', self.htpasswd, '--private-repos',
             '--admin', ADMIN, '--max-size-per-user', QUOTA, '--keep-deleted', '1h',
             '--usage-interval', '15s', '--prometheus', '--on-event', 'true',
             '-vv', '--log-file', self.log, folder / 'srv'],
            int(self.hosts['plain'].rpartition(':')[2]), log=folder / 'said')
        self.wait_for_workers()
        self.oldest = self.children()[1]    # a worker that lives to the end

    def wait_for_workers(self) -> None:
        end = time.monotonic() + 60
        while len(self.children()) < WORKERS and time.monotonic() < end:
            time.sleep(0.1)

    def write_users(self, guests: Dict[str, str]) -> None:
        lines = [*self.slow, *(entry(*guest) for guest in guests.items())]
        replace(self.htpasswd, ('\n'.join(lines) + '\n').encode())

    def url(self, wire: str) -> str:
        return f'{"https" if wire == "tls" else "http"}://{self.hosts[wire]}'

    def certificate(self) -> bytes:
        """The certificate that it shows to a new connection."""
        host, port = self.hosts['tls'].split(':')
        with socket.create_connection((host, int(port)), 10) as sock, \
                self.authority.trust().wrap_socket(sock, server_hostname=host) as secured:
            return secured.getpeercert(True) or b''

    def figures(self) -> Dict[str, float]:
        """What its processes take: MiB that belong to them (PSS), descriptors, threads."""
        found = dict.fromkeys(('memory, MiB', 'of the oldest worker, MiB', 'descriptors', 'threads'), 0.0)
        for pid in self.processes():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):    # one that was killed
                memory = of_process(pid, 'Pss', 'smaps_rollup')
                found['memory, MiB'] += memory
                found['of the oldest worker, MiB'] += memory * (pid == self.oldest)
                found['descriptors'] += len(os.listdir(f'/proc/{pid}/fd'))
                found['threads'] += len(os.listdir(f'/proc/{pid}/task'))
        return found

    def idle_figures(self) -> Dict[str, float]:
        """The same, when all workers are there and have nothing to do."""
        self.wait_for_workers()
        time.sleep(IDLE_SECONDS)
        return self.figures()


class Day:
    """The load, what was done, and what was not as it should be."""

    def __init__(self, served: Busy, folder: Path, least_age: float) -> None:
        self.served, self.folder = served, folder
        self.least_age = least_age          # of a worker that is killed
        self.resting = threading.Event()
        self.done: Counter[str] = collections.Counter()
        self.faults: List[str] = []
        self.kills: List[float] = []        # when
        self.may_kill = True
        self._lock = threading.Lock()
        self._running: Set[subprocess.Popen[bytes]] = set()
        self._over = False

    def count(self, what: str) -> None:
        with self._lock:
            self.done[what] += 1

    def fault(self, text: str) -> None:
        with self._lock:
            if self._over:
                return
            self.faults.append(f'{time.strftime("%H:%M:%S")} {text}')
            if len(self.faults) <= TOLD_FAULTS:
                print(f'FAULT: {self.faults[-1]}', flush=True)

    def work(self, task: Callable[[], None]) -> None:
        """Do something again and again; for a thread."""
        while not self.resting.is_set():
            try:
                task()
            except Exception as error:      # the others go on, and it is told at the end
                self.fault(f'{type(error).__name__}: {error}')
                time.sleep(1)

    def in_time(self, what: str, test: Callable[[], bool]) -> None:
        """Wait until something is in force."""
        end = time.monotonic() + IN_FORCE_SECONDS
        while not test():
            if time.monotonic() > end:
                self.fault(f'{what} is not in force after {IN_FORCE_SECONDS} s')
                return
            time.sleep(0.2)

    def run(self, words: List[str], **environment: str) -> Tuple[int, bytes, bytes]:
        """Run a client; its status, output and errors."""
        with self._lock:
            if self._over:
                raise RuntimeError('it is over')
            client = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                      stderr=subprocess.PIPE, env={**os.environ, **environment})
            self._running.add(client)
        output, errors = client.communicate()
        with self._lock:
            self._running.remove(client)
        return client.returncode, output, errors

    def break_off(self) -> None:
        """End all clients; there are none any more if all went well."""
        with self._lock:
            self._over = True
            for client in self._running:
                client.kill()
        self.resting.set()

    # ---- restic ----

    def restic(self, user: str, login: str, wire: str, *words: str) -> None:
        """Run a command in a user's repository."""
        status, output, errors = self.run(
            ['restic', '-r', f'rest:{self.served.url(wire)}/{user}/', '--quiet', '--retry-lock', '10m',
             '--cacert', str(self.served.authority.certificate), *words],
            RESTIC_PASSWORD='secret', RESTIC_REST_USERNAME=login, RESTIC_REST_PASSWORD=PASSWORD,
            RESTIC_CACHE_DIR=str(self.folder / f'cache-{login}'))
        self.count(f'restic {words[0]}')
        if status:
            near = ' near a killed worker' if self.was_killed(time.monotonic() - 60) else ''
            self.fault(f'restic {" ".join(words)} of {user}, status {status}{near}: '
                       f'{(output + errors).decode(errors="replace").strip()[-2000:]}')

    def restic_user(self, user: str, wire: str) -> Callable[[], None]:
        """What a user does again and again: change files, back up, restore, check."""
        source, target, times = self.folder / user, self.folder / f'{user}-restored', [0]
        source.mkdir()

        def task() -> None:
            for number in range(6) if not times[0] else (times[0] % 6, (times[0] + 1) % 6):
                (source / str(number)).write_bytes(os.urandom(random.randrange(1, 200_000)))
            self.restic(user, user, wire, 'backup', str(source))
            if times[0] % 3 == 1:
                self.restic(user, user, wire, 'restore', 'latest', '--target', str(target))
                self.compare(source, target)
            if times[0] % 3 == 2:
                self.restic(user, user, wire, 'check')
            times[0] += 1
        return task

    def compare(self, source: Path, target: Path) -> None:
        """Compare what was restored, and remove it."""
        for path in source.iterdir():
            restored = target / str(path)[1:]
            if not restored.is_file() or restored.read_bytes() != path.read_bytes():
                self.fault(f'{path} is not restored as it was')
        shutil.rmtree(target, ignore_errors=True)

    def administrator(self) -> None:
        """Prune the repositories of all, in turn."""
        user, wire = CLIENTS[self.done['restic forget'] % len(CLIENTS)]
        self.restic(user, ADMIN, wire, 'forget', '--keep-last', '3', '--prune')
        time.sleep(1)

    # ---- curl ----

    def was_killed(self, since: float) -> bool:
        return any(since - SETTLE_SECONDS <= when for when in list(self.kills))

    def curl(self, user: str, password: str, wire: Wire, path: str,
             *words: str, expect: Tuple[int, ...] = (200,), cut: bool = False) -> Optional[bytes]:
        """Make a request; the content if the answer is the expected one."""
        begin = time.monotonic()
        ended, content, errors = self.run(
            ['curl', '-sS', '-m', '60', '--cacert', str(self.served.authority.certificate), *wire[2],
             '-u', f'{user}:{password}', '-w', '%{stderr} %{http_code} %{http_version}', *words,
             self.served.url(wire[1]) + path])
        *said, status, version = errors.decode(errors='replace').split() or ['', '']
        if cut and ended == 28:   # the time is over
            return None
        if 507 in expect and ended == 92:
            # Some versions of curl lose an answer that comes with the reset of an unfinished upload.
            return None
        if not ended and int(status) in expect and version == wire[3]:
            return content
        if self.was_killed(begin) and ended:
            self.count('curl, broken off by a killed worker')
        else:
            self.fault(f'curl {" ".join((*wire[2], *words))} {path}: status {status} over HTTP/{version}, '
                       f'not {expect}; {" ".join(said)} {content[:200]!r}')
        return None

    def curl_user(self, wire: Wire) -> Callable[[], None]:
        """What a client without restic does: upload, list, read pieces, delete, and read the past."""
        user, file = wire[0], self.folder / f'{wire[0]}.object'
        kept: Dict[str, Tuple[float, bytes]] = {}       # what it has stored: when it was there, content

        def task() -> None:
            content = os.urandom(OBJECT_BYTES)
            name = hashlib.sha256(content).hexdigest()
            file.write_bytes(content)
            arguments = f'/{user}/data/{name}', '--data-binary', f'@{file}'
            if all(self.curl(user, PASSWORD, wire, *arguments) is None for _ in range(2)):
                return      # the first answer may be lost, by a killed worker
            self.count('curl upload')
            kept[name] = time.time() + 1, content
            found = self.curl(user, PASSWORD, wire, f'/{user}/data/')
            if found is not None and set(json.loads(found)) != set(kept):
                self.fault(f'the list of {user} has {len(json.loads(found))} names, not {len(kept)}')
            self.count('curl list')
            one = random.choice(list(kept))
            begin = random.randrange(OBJECT_BYTES)
            piece = self.curl(user, PASSWORD, wire, f'/{user}/data/{one}', '-r', f'{begin}-', expect=(206,))
            if piece is not None and piece != kept[one][1][begin:]:
                self.fault(f'a piece of {one} is not as it was')
            self.count('curl download of a piece')
            oldest = next(iter(kept))
            if kept[oldest][0] + 1 < time.time():
                self.forget_and_read(user, wire, oldest, *kept.pop(oldest))
        return task

    def forget_and_read(self, user: str, wire: Wire, name: str,
                        when: float, content: bytes) -> None:
        """Delete an object, and read it as it was before."""
        if self.curl(user, PASSWORD, wire, f'/{user}/data/{name}', '-X', 'DELETE') is None:
            self.curl(user, PASSWORD, wire, f'/{user}/data/{name}', '-X', 'DELETE', expect=(200, 404))
        moment = time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(when))
        found = self.curl(user, PASSWORD, wire, f'/{user}/.at/{moment}/data/{name}')
        if found is not None and found != content:
            self.fault(f'{name} is not as it was at {moment}')
        self.count('curl delete, and read from the past')

    def stranger(self) -> None:
        """Wrong passwords, uploads beyond the quota, and connections that are cut."""
        wire = random.choice(WIRES)
        user, large, path = wire[0], self.folder / 'large', f'/{wire[0]}/data/{os.urandom(32).hex()}'
        what = random.randrange(4)
        if what == 0:
            self.curl(user, 'wrong', wire, path, expect=(401, 429))
            self.count('wrong password')
        elif what == 1:
            self.curl(user, PASSWORD, wire, path, '-X', 'POST', '-T', str(large), expect=(507,))
            self.count('upload beyond the quota')
        elif what == 2:
            self.curl(user, PASSWORD, wire, path, '-m', '0.4', '--limit-rate', '100k', '--data-binary',
                      f'@{self.folder / "middle"}', cut=True)
            self.count('upload that is cut')
        else:
            self.curl(user, PASSWORD, wire, '/shared/', cut=True, expect=(403,))
            self.curl(ADMIN, PASSWORD, wire, f'/shared/data/{self.shared()}', '-m', '0.4', '--limit-rate',
                      '100k', cut=True)
            self.count('download that is cut')
        time.sleep(0.1)

    def shared(self) -> str:
        """The name of an object of some MiB."""
        return hashlib.sha256((self.folder / 'middle').read_bytes()).hexdigest()

    def visitor(self) -> None:
        """Look at pages and metrics."""
        wire = random.choice(WIRES)
        for user, path, word in ((ADMIN, '/', 'anna'), ('anna', '/anna/', 'Last snapshot'),
                                 (wire[0], '/', wire[0])):
            page = self.curl(user, PASSWORD, wire, path, '-H', 'Accept: text/html')
            if page is not None and word.encode() not in page:
                self.fault(f'the page of {user} does not say {word}')
            self.count('page')
        metrics = self.curl(ADMIN, PASSWORD, wire, '/metrics')
        if metrics is not None and b'restic_serve_requests_total' not in metrics:
            self.fault('the metrics are not whole')
        self.count('metrics')
        time.sleep(1)

    # ---- what an administrator of the host does ----

    def kill_worker(self) -> None:
        """Kill a worker that has lived long enough to be replaced at once, but one never."""
        victims = [pid for pid in self.served.children() if pid != self.served.oldest
                   and os.stat(f'/proc/{pid}').st_ctime < time.time() - self.least_age]
        if self.may_kill and victims:
            self.kills.append(time.monotonic())
            os.kill(victims[0], signal.SIGKILL)
            self.kills.append(time.monotonic())
            self.count('worker killed')

    def renew_certificate(self) -> None:
        issued = self.served.authority.issue()
        self.count('certificate renewed')

        def is_shown() -> bool:
            with contextlib.suppress(OSError):      # a worker that was killed
                return self.served.certificate() == issued
            return False
        self.in_time('the new certificate', is_shown)

    def renew_users(self) -> None:
        """Some guests have new passwords, and the others are gone."""
        guests = {name: os.urandom(4).hex() for name in GUESTS if random.random() < 0.5}
        self.served.write_users(guests)
        self.count('users renewed')
        for name in GUESTS:
            password, want = guests.get(name, 'gone'), b'404' if name in guests else b'401'

            def is_so(name: str = name, password: str = password, want: bytes = want) -> bool:
                found = self.curl(name, password, WIRES[2], f'/{name}/config', '-o', '/dev/null', '-w',
                                  '%{stdout}%{http_code}%{stderr} %{http_code} %{http_version}',
                                  expect=(401, 404, 429))
                return found == want
            self.in_time(f'{name}, who {"has a new password" if name in guests else "is gone"},', is_so)

    def rotate_log(self) -> None:
        """What the log has so far is looked at when it is certain that nobody writes to it any more."""
        old = self.folder / 'log.old'
        self.look_at_log(old)
        self.served.log.replace(old)
        self.served.process.send_signal(signal.SIGHUP)
        self.count('log rotated, by SIGHUP')
        self.in_time('the new log', self.served.log.exists)

    def look_at_log(self, path: Path) -> None:
        """Find the faults in a log, and remove it."""
        if not path.exists():
            return
        trace: List[str] = []       # lines of a traceback, which have no date and no address
        with open(path, errors='replace') as file:
            for line in (*file, ''):
                dated = re.match(r'\d+/\d+/\d+ \S+ ([A-Z]+): ', line)
                if trace and (dated or re.match(r'(\S+ ){3}\[', line) or not line):
                    self.fault(f'the log says: {"".join(trace)}')
                    trace = []
                if trace or line.startswith('Traceback'):
                    trace.append(line)
                elif 'internal error' in line or dated and dated[1] == 'ERROR' and not re.search(
                        r'was killed by signal 9; restarting it', line):
                    self.fault(f'the log says: {line.rstrip()}')
        path.unlink()

    def host(self, pause: float) -> Callable[[], None]:
        """Something of the above, every few seconds."""
        jobs = [self.renew_users, self.kill_worker, self.renew_certificate, self.kill_worker, self.rotate_log]

        def task() -> None:
            jobs.append(jobs.pop(0))
            jobs[-1]()
            time.sleep(pause)
        return task


def set_up(day: Day) -> None:
    """Make the repositories, and whatever else is there from the beginning to the end."""
    for user, wire in CLIENTS:
        day.restic(user, user, wire, 'init')
    for one in WIRES:
        day.curl(one[0], PASSWORD, one, f'/{one[0]}/?create=true', '-X', 'POST')
    (day.folder / 'middle').write_bytes(os.urandom(4 << 20))
    with open(day.folder / 'large', 'wb') as file:
        file.truncate(BEYOND_QUOTA)
    day.curl(ADMIN, PASSWORD, WIRES[0], '/shared/?create=true', '-X', 'POST')
    day.curl(ADMIN, PASSWORD, WIRES[0], f'/shared/data/{day.shared()}', '--data-binary',
             f'@{day.folder / "middle"}')


def load(day: Day, first: float, rest: float, pause: float) -> List[Dict[str, float]]:
    """Work for so many seconds before the first measurement, and after it; both measurements."""
    tasks = [*(day.restic_user(*client) for client in CLIENTS), day.administrator,
             *(day.curl_user(wire) for wire in WIRES), day.stranger, day.visitor, day.host(pause)]
    found: List[Dict[str, float]] = []
    for seconds in (first, rest):
        day.resting.clear()
        threads = [threading.Thread(target=day.work, args=(task,), daemon=True) for task in tasks]
        for thread in threads:
            thread.start()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            # A worker that has just begun has less than others: none is killed before it is measured.
            day.may_kill = time.monotonic() < end - min(seconds / 2, 30)
            time.sleep(min(60, max(end - time.monotonic(), 0), max(seconds / 4, 1)))
            print(f'{time.strftime("%H:%M:%S")} at work: ' + ', '.join(
                f'{name} {value:.0f}' for name, value in day.served.figures().items()), flush=True)
        day.resting.set()
        for thread in threads:
            thread.join()
        found.append(day.served.idle_figures())
    return found


def judge(day: Day, after_first: Dict[str, float], at_end: Dict[str, float]) -> None:
    """Compare the measurements, and print them."""
    print(f'\n| idle | after the first minute | at the end | at most |\n{"|---" * 4}|')
    for name, before in after_first.items():
        most = before + {'descriptors': MORE_DESCRIPTORS, 'threads': MORE_THREADS}.get(
            name, before * (GROWTH - 1) + GROWTH_MIB)
        print(f'| {name} | {before:.1f} | {at_end[name]:.1f} | {most:.1f} |')
        if at_end[name] > most:
            day.fault(f'{name}: {at_end[name]:.1f}, not {most:.1f}')
    print()


def end(day: Day) -> None:
    """Check the repositories, stop the server, and read the rest of its log."""
    if day.served.process.poll() is not None:
        day.fault('the server has ended')
        return
    for user, wire in CLIENTS:
        day.restic(user, user, wire, 'check', '--read-data')
    status = day.served.stop()
    if status:
        day.fault(f'the server ends with status {status}')
    for path in (day.folder / 'log.old', day.served.log):
        day.look_at_log(path)


def main(words: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
    parser.add_argument('--minutes', type=float, default=30, help='in all (default 30)')
    parser.add_argument('--quick', action='store_true', help='about a minute, measured first after 20 s')
    parser.add_argument('--python', default=sys.executable, help="the server's Python")
    options = parser.parse_args(words)
    missing = [name for name in ('restic', 'curl', 'openssl') if not shutil.which(name)]
    if not missing and '--retry-lock' not in subprocess.run(
            ['restic', 'help', 'backup'], stdout=subprocess.PIPE, text=True).stdout:
        missing = ['a restic that knows --retry-lock (0.16)']
    if missing or not sys.platform.startswith('linux'):
        print(f'skipped: needs Linux and {" and ".join(missing)}')
        return 0
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(1))    # and clean up
    first, rest, pause, least_age = (12.0, 14.0, 1.0, 5.0) if options.quick else (
        60.0, max(options.minutes * 60 - 90, 30), 5.0, rs.STEADY_SECONDS + 5.0)
    with tempfile.TemporaryDirectory(prefix='day-') as name, Busy(options.python, Path(name)) as served:
        day = Day(served, Path(name), least_age)
        try:
            set_up(day)
            if not day.faults:
                judge(day, *load(day, first, rest, pause))
                end(day)
        finally:
            day.break_off()
    for what, count in sorted(day.done.items()):
        print(f'{count:7,}  {what}')
    print(f'{len(day.faults)} faults')
    return int(bool(day.faults))


if __name__ == '__main__':
    sys.exit(main())
