#!/usr/bin/env python3
"""Strangers against the server, and a user with few rights, while another user works.

    .ci/siege.py [--seconds 240] [--python PYTHON] [--only WORD] [--server rest-server]

Each attack runs for a while, with two workers and with four.  Printed are the times of the user who works (a
GET of 4 KiB, and a login at bcrypt's cost 10: the first one or, while many guess, one from an address that is
known), and what the others got: memory above an idle server's, processor's time, lines in the log a second.
The exit status is 1 if a bound is not kept three times in a row; bounds of time are longer where this machine
has other work, which shows in how late a sleep ends.

As root on Linux it runs in a network namespace that it makes, where strangers come from 200 addresses of IPv4
and from the networks of a /48 of IPv6; elsewhere what bounds each address is not tried.
"""
from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import http.client
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

from common import Served, free_port, make_repository, server_words, store
import restic_serve as rs   # of which common knows the path

SERVER, SERVER_6, USER = '198.51.100.1', '2001:db8::1', '198.51.100.2'
ONE = ['203.0.113.1']
MANY = [f'203.0.113.{number}' for number in range(2, 202)]
SITE = [f'2001:db8:1:{number:x}::1' for number in range(0, 65536, 97)]     # of a /48
CONNECTIONS, REPOSITORIES, OBJECTS = 1024, 10_000, 100_000
MEMORY_MIB, P99_MS, LOGIN_SECONDS, LINES = 100, 50, 1, 100     # bounds: with 2 workers, lines a second
IP_BIND_ADDRESS_NO_PORT = 24    # <linux/in.h>; older Pythons have no name for it
CONTENT = os.urandom(4096)
NAME = hashlib.sha256(CONTENT).hexdigest()


def in_namespace() -> bool:
    """Whether this process runs in a network namespace of its own; enters one if it can."""
    if os.environ.get('SIEGE_NAMESPACE'):
        for words in (['link', 'set', 'lo', 'up'], *(['address', 'add', f'{address}/32', 'dev', 'lo']
                                                     for address in (SERVER, USER, *ONE, *MANY)),
                      ['-6', 'address', 'add', f'{SERVER_6}/128', 'dev', 'lo'],
                      ['-6', 'route', 'add', 'local', '2001:db8:1::/48', 'dev', 'lo']):
            subprocess.run(['ip', *words], check=True)
        for name, value in (('ipv4/ip_local_port_range', '1024 65535'), ('ipv4/tcp_tw_reuse', '1'),
                            ('ipv6/ip_nonlocal_bind', '1')):
            with contextlib.suppress(OSError):
                Path('/proc/sys/net', name).write_text(value)
        return True
    tools = shutil.which('unshare'), shutil.which('ip')
    if (os.name == 'posix' and os.geteuid() == 0 and all(tools)
            and subprocess.run(['unshare', '--net', 'true'], stderr=subprocess.DEVNULL).returncode == 0):
        os.environ['SIEGE_NAMESPACE'] = '1'
        os.execvp('unshare', ['unshare', '--net', sys.executable, *sys.argv])
    return False


def login(user: str, password: str = 'right') -> str:
    return 'Basic ' + base64.b64encode(f'{user}:{password}'.encode()).decode()


class Besieged(Served):
    """The server that is attacked, with repositories and lists of others."""

    def __init__(self, options: argparse.Namespace, folder: Path, spread: bool, workers: int) -> None:
        self.root, self.log, self.users = folder / 'srv', folder / 'log', folder / 'users'
        self.spread, self.first = spread, itertools.count()     # users who have not logged in yet
        rights, host = folder / 'rights', SERVER if spread else '127.0.0.1'
        port = free_port(host)
        self.write_users()
        rights.write_text('* /%u write 20M\nevil /lists read\n* / none\n')
        more = ['--addr', f'[{SERVER_6}]:{port}'] * spread + ['--rights', str(rights), '--workers',
                str(workers), '--keep-deleted', '30d', '--stall-timeout', '5s']
        words = server_words(options.server, f'{host}:{port}', self.root, options.python, options=more,
                             htpasswd=self.users)
        for name in ('alice', 'evil'):
            make_repository(self.root / name)
            store(self.root / name, 'data', CONTENT)
        super().__init__(words, port, host, log=self.log)

    def write_users(self) -> None:
        """Passwords with new hashes."""
        slow = rs.new_entry(b'right', 10)
        cheap = '{SHA}' + base64.b64encode(hashlib.sha1(b'right').digest()).decode()
        names = [f'{kind}{number}' for kind in ('first', 'known') for number in range(300)]
        new = self.users.with_suffix('.new')
        new.write_text(f'alice:{cheap}\nevil:{cheap}\n' + ''.join(f'{name}:{slow}\n' for name in names))
        new.replace(self.users)

    def renew(self) -> None:
        """Have users whose addresses are known and whose passwords are not."""
        for number in range(20):
            self.ask(USER, 'GET', '/', login(f'known{number}'))
        self.write_users()
        self.process.send_signal(signal.SIGHUP)
        self.known = itertools.count()
        time.sleep(1)

    def connect(self, source: str = '') -> socket.socket:
        sock = socket.socket(socket.AF_INET6 if ':' in source else socket.AF_INET)
        sock.settimeout(30)
        if source and self.spread:
            # Else bind() looks for a port that nobody has: a core, once thousands are in TIME_WAIT.
            sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            sock.bind((source, 0))
        sock.connect((SERVER_6 if ':' in source else self.host, self.port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def ask(self, source: str, method: str, path: str, authorization: str, body: bytes = b'',
            **headers: str) -> Tuple[int, float]:
        """Status, and seconds, of a request on a connection of its own."""
        begin = time.perf_counter()
        connection = http.client.HTTPConnection(self.host, self.port)
        connection.sock = self.connect(source)
        with contextlib.closing(connection):
            connection.request(method, path, body or None, {'Authorization': authorization, **headers})
            answer = connection.getresponse()
            answer.read()
            return answer.status, time.perf_counter() - begin


# What an attacker does again and again: to a server, from an address, and an event that ends it.
Attack = Callable[[Besieged, str, Any], None]


def ask(method: str, path: str, user: str = 'evil', password: str = 'right', body: bytes = b'',
        **headers: str) -> Attack:
    """Requests; `*` in path, user and password stands for anything."""
    def attack(served: Besieged, source: str, stop: Any) -> None:
        words = [word.replace('*', os.urandom(8).hex()) for word in (path, user, password)]
        served.ask(source, method, words[0], login(*words[1:]), body, **headers)
    return attack


def hold(number: int, hello: bytes, again: bytes = b'') -> Attack:
    """Connections that begin with some bytes, and then say and read nothing, or the same every second;
    those that end are made anew."""
    def attack(served: Besieged, source: str, stop: Any) -> None:
        with contextlib.ExitStack() as stack:
            socks: List[socket.socket] = []
            last = time.monotonic()
            while not stop.is_set():
                is_due = again and time.monotonic() - last > 1
                for sock in socks.copy():
                    try:
                        if is_due:
                            sock.send(again)
                        if (again or not hello) and not sock.recv(65536):
                            raise ConnectionResetError
                    except BlockingIOError:
                        pass
                    except OSError:
                        socks.remove(sock)
                        sock.close()
                last = time.monotonic() if is_due else last
                for _ in range(min(50, number - len(socks))):
                    socks.append(stack.enter_context(served.connect(source)))
                    socks[-1].setblocking(False)
                    with contextlib.suppress(OSError):
                        socks[-1].send(hello)
                time.sleep(0.05)
    return attack


def head(method: str, path: str, *fields: str) -> bytes:
    return '\r\n'.join([f'{method} {path} HTTP/1.1', 'Host: x', *fields, '', '']).encode()


EVIL, WRONG = (f'Authorization: {login("evil", word)}' for word in ('right', 'wrong'))
UPLOAD = head('POST', f'/evil/data/{NAME}', WRONG, 'Content-Length: 9999999')
LIST, GUESS = head('GET', '/lists/data/', EVIL), ask('GET', '/first1/config', 'first1', '*')
# A name, the addresses of the attackers, how many of them at a time, and what each of these does.
ATTACKS: Tuple[Tuple[str, List[str], int, Attack], ...] = (
    ('nobody', ONE, 0, hold(0, b'')),
    ('passwords with NUL, and long ones', ONE, 4, ask('GET', '/x/config', 'x', f'\0{"x" * 2000}')),
    ('50 who guess', ONE, 50, GUESS),
    ('200 addresses that guess', MANY, 200, GUESS),
    ('a /48 that guesses', SITE, 200, GUESS),
    (f'{CONNECTIONS} connections that say nothing', ONE, 1, hold(CONNECTIONS, b'')),
    ('200 addresses that say nothing', MANY, 200, hold(8, b'G')),
    ('a /48 that asks for /health', SITE, 200, hold(8, *2 * [head('GET', '/health')])),
    (f'{CONNECTIONS // 2} uploads, wrong password', ONE, 1,
     hold(CONNECTIONS // 2, UPLOAD + bytes(60_000))),
    ('web pages of any origin', MANY, 16, ask('GET', '/alice/config', Origin='x' * 2000)),
    ('user: asks and never reads', ONE, 1, hold(100, 500 * head('GET', f'/evil/data/{NAME}', EVIL))),
    (f'user: the page, with {REPOSITORIES:,} of others', ONE, 16, ask('GET', '/', Accept='text/html')),
    (f'user: lists of {OBJECTS:,}', ONE, 16, ask('GET', '/lists/data/')),
    (f'user: lists of {OBJECTS:,} that were deleted', ONE, 16, ask('GET', '/lists/.at/1h/data/')),
    ('user: four lists that nobody reads', ONE, 1, hold(4, LIST)),
    ('user: uploads that are wrong', ONE, 16, ask('POST', f'/evil/data/{"0" * 64}', body=bytes(1 << 20))),
    ('user: denied', ONE, 16, ask('DELETE', f'/lists/data/{NAME}')),
    ('user: names of 240 bytes', ONE, 4, ask('POST', f'/evil/{"x" * 200}*/?create=true')),
    ('user: repositories without end', ONE, 4, ask('POST', '/evil/*/?create=true')))


def attacker(attack: Attack, served: Besieged, sources: List[str], number: int, stop: Any) -> None:
    """A process of attackers, in threads."""
    os.nice(10)     # on a machine of their own they would take nothing of the server's processor
    threading.stack_size(256 * 1024)

    def run(part: List[str]) -> None:
        while not stop.is_set():
            try:
                attack(served, random.choice(part), stop)
            except (OSError, http.client.HTTPException):
                time.sleep(0.01)

    for first in range(number):
        part = sources[first % len(sources)::number]
        threading.Thread(target=run, args=[part], daemon=True).start()
    stop.wait()


def besiege(served: Besieged, sources: List[str], number: int, attack: Attack, seconds: float
            ) -> Dict[str, float]:
    """One attack, and the times of a user meanwhile."""
    def p99(numbers: List[float]) -> float:
        return sorted(numbers or [99])[int(len(numbers) * 0.99)]

    stop, written = multiprocessing.Event(), served.log.read_bytes().count(b'\n')
    process = multiprocessing.Process(target=attacker, args=(attack, served, sources, number, stop))
    processor, memory, begin = served.processor(), 0.0, time.monotonic()
    process.start()
    time.sleep(seconds / 5)
    times, logins, late, failed = [], [], [], 0     # type: List[float], List[float], List[float], int
    while time.monotonic() - begin < seconds:
        try:
            status, took = served.ask(USER, 'GET', f'/alice/data/{NAME}', login('alice'))
            times.append(took)
            failed += status != 200
            if len(times) % 50 == 1:
                user = f'first{next(served.first)}' if sources is ONE else f'known{next(served.known)}'
                status, took = served.ask(USER, 'GET', f'/{user}/config', login(user))
                logins.append(took)
                failed += status != 404
        except (OSError, http.client.HTTPException):
            failed += 1
        memory, asleep = max(memory, served.memory()), time.perf_counter()
        time.sleep(0.02)
        late.append(time.perf_counter() - asleep - 0.02)
    passed = time.monotonic() - begin
    # Once a minute a line for each address, in each process, is promised to programs that ban addresses.
    lines = served.log.read_bytes().count(b'\n') - written - 4 * len(sources)
    taken = served.processor() - processor
    stop.set()
    process.join(10)
    process.kill()
    return {'p50': statistics.median(times or [99]) * 1e3, 'p99': p99(times) * 1e3,
            'login': statistics.median(logins or [99]), 'failed': failed, 'memory': memory,
            'processor': taken / passed, 'lines': max(lines, 0) / passed, 'late': p99(late)}


def main(words: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0] if __doc__ else '')
    parser.add_argument('--seconds', type=float, default=240, help='in all (default 240)')
    parser.add_argument('--python', default=sys.executable, help="the server's Python")
    parser.add_argument('--only', default='', help='attacks with this in their names')
    parser.add_argument('--server', default='', help='rest-server, to compare; its bounds are not judged')
    options = parser.parse_args(words)
    spread = in_namespace()
    if not spread:
        print('without a network namespace: what bounds each address is not tried')
    with tempfile.TemporaryDirectory(dir='/dev/shm' if os.path.isdir('/dev/shm') else None) as name:
        fill(Path(name, 'srv'))
        bad: List[str] = []
        for workers in (2,) if options.server else (2, 4):
            with Besieged(options, Path(name), spread, workers) as served:
                bad += [f'{workers} workers: {line}' for line in judge(served, options, workers)]
    for line in bad:
        print(f'NOT KEPT: {line}')
    return int(bool(bad and not options.server))


def fill(root: Path) -> None:
    """Repositories of others, and one with many objects and as many that were deleted."""
    for number in range(REPOSITORIES):
        (root / 'others' / f'r{number}' / 'keys').mkdir(parents=True)
        (root / 'others' / f'r{number}' / 'keys' / NAME).touch()
    deleted, now = root / 'lists' / rs.DELETED, time.time()
    make_repository(root / 'lists')
    for folder in (root / 'lists' / 'data', deleted / 'data'):
        for byte in range(256):
            (folder / f'{byte:02x}').mkdir(parents=True)
    (deleted / f'since.{rs.format_moment(int((now - 9e3) * 1e6))}').touch()
    for number in range(OBJECTS):
        name = hashlib.sha256(b'%d' % number).hexdigest()
        (root / 'lists' / 'data' / name[:2] / name).touch()
        file = deleted / 'data' / name[:2] / f'{name}.{rs.format_moment(int(now * 1e6))}'
        file.touch()
        os.utime(file, (now - 7200, now - 7200))


def judge(served: Besieged, options: argparse.Namespace, workers: int) -> Iterator[str]:
    """The bounds that a server with so many workers does not keep."""
    while not options.server and b'Calculating' in served.get(
            '/', Accept='text/html', Authorization=login('alice')):
        time.sleep(0.1)
    time.sleep(2)
    attacks = [attack for attack in ATTACKS
               if options.only in attack[0] and (served.spread or attack[1] is ONE)]
    idle = served.memory()
    columns = {'p50': 1, 'p99': 1, 'login': 2, 'failed': 0, 'memory': 0, 'processor': 2, 'lines': 0}
    print(f'{f"{workers} workers":50}' + ''.join(f'{name:>10}' for name in columns))
    for name, sources, number, attack in attacks:
        for attempt in ('', ' (again)', ' (and again)'):
            if sources is not ONE:
                served.renew()
            got = besiege(served, sources, number, attack, options.seconds / len(ATTACKS) / 2)
            got['memory'] -= idle
            print(f'{name + attempt:50}' + ''.join(
                f'{got[column]:10.{digits}f}' for column, digits in columns.items()), flush=True)
            slack = 1 + got['late'] / 0.005
            bounds = {'failed': 0, 'memory': MEMORY_MIB * workers / 2, 'lines': LINES, 'p99': P99_MS * slack,
                      'login': LOGIN_SECONDS * slack * (1 + (number == 200))}
            over = [f'{name}: {what} {got[what]:.1f}, not {bound:.1f}' for what, bound in bounds.items()
                    if got[what] > bound]
            if not over:
                break
        yield from over
        for _ in range(30):     # it may have passwords to hash of those who have gone
            begun = served.processor()
            time.sleep(0.5)
            if served.processor() - begun < 0.05:
                break
    if served.process.poll() is not None:
        yield 'the server has ended'


if __name__ == '__main__':
    sys.exit(main())
