#!/usr/bin/env python3
"""Strangers against the server, and a user who works at the same time.

    .ci/siege.py [--seconds 120] [--python PYTHON]

Each attack runs for a while from addresses of its own, in processes of their own.  Printed are the
user's times (a GET of 4 KiB, and a first login at bcrypt's cost 12), and what the strangers got: the
server's memory above what it took when idle, and its processor's time.  The exit status is 1 if a bound
is not kept.

As root on Linux it runs in a network namespace that it makes, where each stranger has an address that is
not the loopback's; elsewhere addresses share nothing, and what bounds each is not tried.
"""
from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import http.client
import multiprocessing
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import common
from common import MODULE, free_port
import restic_serve as rs   # of which common knows the path

SERVER, USER, STRANGERS = '198.51.100.1', '198.51.100.2', '198.51.100.100'
HEADERS, SETTINGS, WINDOW_UPDATE, DATA = 1, 4, 8, 0
CONNECTIONS = 1024
REPOSITORIES = 10_000
MEMORY_MIB = 100             # that strangers may cost above an idle server
IP_BIND_ADDRESS_NO_PORT = 24 # <linux/in.h>; older Pythons have no name for it
LOGIN_TIMES = 3              # an undisturbed first login's time
CONTENT = os.urandom(4096)
NAME = hashlib.sha256(CONTENT).hexdigest()


def in_namespace() -> bool:
    """Whether this process runs in a network namespace of its own; enters one if it can."""
    if os.environ.get('SIEGE_NAMESPACE'):
        for address in (SERVER, USER, STRANGERS):
            subprocess.run(['ip', 'address', 'add', f'{address}/32', 'dev', 'lo'], check=True)
        subprocess.run(['ip', 'link', 'set', 'lo', 'up'], check=True)
        for name, value in (('ip_local_port_range', '1024 65535'), ('tcp_tw_reuse', '1')):
            with contextlib.suppress(OSError):
                Path('/proc/sys/net/ipv4', name).write_text(value)
        return True
    tools = shutil.which('unshare'), shutil.which('ip')
    if (os.name == 'posix' and os.geteuid() == 0 and all(tools)
            and subprocess.run(['unshare', '--net', 'true'], stderr=subprocess.DEVNULL).returncode == 0):
        os.environ['SIEGE_NAMESPACE'] = '1'
        os.execvp('unshare', ['unshare', '--net', sys.executable, *sys.argv])
    return False


def login(user: str, password: str) -> str:
    return 'Basic ' + base64.b64encode(f'{user}:{password}'.encode()).decode()


class Served(common.Served):
    """The server that strangers attack."""

    def __init__(self, python: str, folder: Path, host: str) -> None:
        self.root, self.log = folder / 'srv', folder / 'log'
        users, port = folder / 'users', free_port(host)
        slow = rs.new_entry(b'right', 12)
        cheap = '{SHA}' + base64.b64encode(hashlib.sha1(b'right').digest()).decode()
        lines = [f'{name}:{cheap}' for name in ('alice', 'evil')]
        users.write_text('\n'.join([*lines, *(f'slow{number}:{slow}' for number in range(200))]) + '\n')
        super().__init__(
            [python, MODULE, '--addr', f'{host}:{port}', '--htpasswd', users, '--private-repos',
             '--workers', '2', '--max-size-per-user', '20M', '--stall-timeout', '5s', '--prometheus',
             self.root], port, host, log=self.log)

    def connect(self, source: str = '') -> socket.socket:
        sock = socket.socket()
        sock.settimeout(60)
        if source:
            # Else bind() looks for a port that nobody has: a core, once thousands are in TIME_WAIT.
            sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            sock.bind((source, 0))
        sock.connect((self.host, self.port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def ask(self, source: str, method: str, path: str, authorization: str, body: bytes = b'',
            **headers: str) -> Tuple[int, float]:
        """Status, and seconds, of a request on a connection of its own."""
        begin = time.perf_counter()
        connection = http.client.HTTPConnection(self.host, self.port)
        connection.sock = self.connect(source)
        try:
            connection.request(method, path, body or None, {'Authorization': authorization, **headers})
            answer = connection.getresponse()
            answer.read()
            return answer.status, time.perf_counter() - begin
        finally:
            connection.close()


Attack = Callable[[Served, str, Any, Any], None]


def worker(attack: Attack, served: Served, source: str, stop: Any, count: Any) -> None:
    """A process of strangers; it counts answers."""
    while not stop.is_set():
        try:
            attack(served, source, stop, count)
        except (OSError, http.client.HTTPException):
            time.sleep(0.01)


def repeated(number: int, attack: Attack) -> Attack:
    """The same from so many threads."""
    def run(served: Served, source: str, stop: Any, count: Any) -> None:
        threads = [threading.Thread(target=worker, args=(attack, served, source, stop, count), daemon=True)
                   for _ in range(number)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return run


def odd_passwords(served: Served, source: str, stop: Any, count: Any) -> None:
    for password in ('\0', 'x\0y', 'x' * 512, 'x' * 2000):
        served.ask(source, 'GET', '/x/config', login('x', password))
        count.value += 1


def guess(served: Served, source: str, stop: Any, count: Any) -> None:
    served.ask(source, 'GET', '/slow1/config', login('slow1', os.urandom(6).hex()))
    count.value += 1


def hold(served: Served, source: str, stop: Any, number: int, hello: bytes) -> None:
    """Connections that begin with some bytes and then say nothing; those that end are made anew."""
    socks: List[socket.socket] = []
    try:
        while not stop.is_set():
            for sock in list(socks):
                try:
                    if not sock.recv(65536):
                        raise ConnectionResetError
                except BlockingIOError:
                    pass
                except OSError:
                    socks.remove(sock)
                    sock.close()
            for _ in range(min(50, number - len(socks))):
                sock = served.connect(source)
                sock.setblocking(False)
                socks.append(sock)
                with contextlib.suppress(OSError):
                    sock.send(hello)
            time.sleep(0.05)
    finally:
        for sock in socks:
            sock.close()


def request_block(method: str, path: str, authorization: str) -> bytes:
    return rs.encode_headers([(':method', method), (':scheme', 'http'), (':path', path), (':authority', 'x'),
                              ('authorization', authorization)])[1:]


def uploads_over_http_1(served: Served, source: str, stop: Any, count: Any) -> None:
    head = (f'POST /evil/data/{NAME} HTTP/1.1\r\nHost: x\r\nAuthorization: {login("evil", "wrong")}\r\n'
            'Content-Length: 16000000\r\n\r\n').encode()
    hold(served, source, stop, CONNECTIONS // 2, head + bytes(60_000))


def uploads_over_http_2(served: Served, source: str, stop: Any, count: Any) -> None:
    block = request_block('POST', f'/evil/data/{NAME}', login('evil', 'wrong'))
    hold(served, source, stop, CONNECTIONS // 2, rs.PREFACE + rs.frame(SETTINGS, 0, 0) + rs.frame(
        HEADERS, 4, 1, block) + b''.join(rs.frame(DATA, 0, 1, bytes(16_000)) for _ in range(4)))


def silence(served: Served, source: str, stop: Any, count: Any) -> None:
    hold(served, source, stop, CONNECTIONS, b'G')


def shut_windows(served: Served, source: str, stop: Any, count: Any) -> None:
    block = request_block('GET', f'/evil/data/{NAME}', login('evil', 'right'))
    hold(served, source, stop, 40, rs.PREFACE + rs.frame(SETTINGS, 0, 0, b'\0\4\0\0\0\0') + b''.join(
        rs.frame(HEADERS, 5, number, block) for number in range(1, 200, 2)))


def unread_answers(served: Served, source: str, stop: Any, count: Any) -> None:
    request = (f'GET /evil/data/{NAME} HTTP/1.1\r\nHost: x\r\n'
               f'Authorization: {login("evil", "right")}\r\n\r\n')
    hold(served, source, stop, 100, request.encode() * 500)


def small_updates(served: Served, source: str, stop: Any, count: Any) -> None:
    block = request_block('GET', f'/evil/data/{NAME}', login('evil', 'right'))
    with served.connect(source) as sock:
        sock.sendall(rs.PREFACE + rs.frame(SETTINGS, 0, 0, b'\0\4\0\0\0\0') + b''.join(
            rs.frame(HEADERS, 5, number, block) for number in range(1, 200, 2)))
        update = rs.frame(WINDOW_UPDATE, 0, 0, b'\0\0\0\1') * 100
        while not stop.is_set():
            sock.sendall(update)
            count.value += 100


def pages(served: Served, source: str, stop: Any, count: Any) -> None:
    status, _ = served.ask(source, 'GET', '/', login('evil', 'right'), Accept='text/html')
    count.value += status == 200


def long_names(served: Served, source: str, stop: Any, count: Any) -> None:
    name = os.urandom(120).hex()
    served.ask(source, 'POST', f'/evil/{name}/?create=true', login('evil', 'right'))
    served.ask(source, 'POST', f'/evil/{name}/locks/{NAME}', login('evil', 'right'), CONTENT)
    count.value += 1


def new_repositories(served: Served, source: str, stop: Any, count: Any) -> None:
    status, _ = served.ask(source, 'POST', f'/evil/{os.urandom(8).hex()}/?create=true',
                           login('evil', 'right'))
    count.value += status == 200


# A name, how many processes of it, the attack, and the MiB that it may cost.
ATTACKS: Tuple[Tuple[str, int, Attack, float], ...] = (
    ('nobody', 0, silence, MEMORY_MIB),
    ('passwords with NUL, and long ones', 1, repeated(4, odd_passwords), MEMORY_MIB),
    ('50 who guess at cost 12', 1, repeated(50, guess), MEMORY_MIB),
    (f'{CONNECTIONS} connections that say nothing', 1, silence, MEMORY_MIB),
    (f'{CONNECTIONS // 2} uploads, wrong password, HTTP/1.1', 1, uploads_over_http_1, MEMORY_MIB),
    (f'{CONNECTIONS // 2} uploads, wrong password, HTTP/2', 1, uploads_over_http_2, MEMORY_MIB),
    ('4,000 downloads with shut windows', 1, shut_windows, MEMORY_MIB),
    ('100 that ask and never read', 1, unread_answers, MEMORY_MIB),
    ('updates of windows by one byte', 1, small_updates, MEMORY_MIB),
    (f'the page, with {REPOSITORIES:,} of others', 1, repeated(8, pages), MEMORY_MIB),
    ('uploads to names of 240 bytes', 1, repeated(4, long_names), MEMORY_MIB),
    ('repositories without end', 1, repeated(4, new_repositories), MEMORY_MIB))


def strangers_process(attack: Attack, served: Served, source: str, stop: Any, count: Any) -> None:
    if hasattr(os, 'nice'):
        os.nice(10)     # on a machine of their own they would take nothing of the server's processor
    worker(attack, served, source, stop, count)


def besiege(served: Served, name: str, number: int, attack: Attack, seconds: float, first: int,
            spread: bool) -> Dict[str, float]:
    """One attack, and the user's times meanwhile."""
    stop, count = multiprocessing.Event(), multiprocessing.Value('q', 0)
    strangers = [multiprocessing.Process(target=strangers_process, args=(
        attack, served, STRANGERS if spread else '', stop, count), daemon=True) for _ in range(number)]
    user = USER if spread else ''
    for process in strangers:
        process.start()
    begin, processor, memory = time.monotonic(), served.processor(), 0.0
    time.sleep(seconds / 5)
    times, logins, failed = [], [], 0   # type: List[float], List[float], int
    while time.monotonic() - begin < seconds:
        try:
            status, took = served.ask(user, 'GET', f'/alice/data/{NAME}', login('alice', 'right'))
            times.append(took)
            failed += status != 200
            if len(times) % 50 == 1 and first + len(logins) < 200:
                status, took = served.ask(user, 'GET', f'/slow{first + len(logins)}/config',
                                          login(f'slow{first + len(logins)}', 'right'))
                logins.append(took)
                failed += status != 404
        except (OSError, http.client.HTTPException):
            failed += 1
        memory = max(memory, served.memory())
        time.sleep(0.02)
    taken = served.processor() - processor
    stop.set()
    for process in strangers:
        process.join(10)
        process.kill()
    return {'p50': statistics.median(times) * 1e3 if times else float('nan'),
            'p99': sorted(times)[int(len(times) * 0.99)] * 1e3 if times else float('nan'),
            'login': statistics.median(logins) if logins else float('nan'), 'logins': len(logins),
            'failed': failed, 'memory': memory, 'processor': taken / (time.monotonic() - begin),
            'answers': count.value}


def main(words: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0] if __doc__ else '')
    parser.add_argument('--seconds', type=float, default=120, help='in all (default 120)')
    parser.add_argument('--python', default=sys.executable, help="the server's Python")
    options = parser.parse_args(words)
    spread = in_namespace()
    print('in a network namespace, strangers and user have addresses of their own' if spread else
          'without a network namespace: what bounds each address is not tried')
    with tempfile.TemporaryDirectory(dir='/dev/shm' if os.path.isdir('/dev/shm') else None) as name, \
            Served(options.python, Path(name), SERVER if spread else '127.0.0.1') as served:
        return judge(served, options.seconds, spread)


def judge(served: Served, seconds: float, spread: bool) -> int:
    user = USER if spread else ''
    for name in ('alice', 'evil'):
        served.ask(user, 'POST', f'/{name}/?create=true', login(name, 'right'))
        served.ask(user, 'POST', f'/{name}/data/{NAME}', login(name, 'right'), CONTENT)
    for number in range(REPOSITORIES):
        (served.root / 'others' / f'r{number}' / 'keys').mkdir(parents=True)
        (served.root / 'others' / f'r{number}' / 'keys' / NAME).write_bytes(b'')
    served.ask(user, 'GET', '/', login('alice', 'right'), Accept='text/html')  # it is counted
    time.sleep(2)
    idle, bad, quiet, first = served.memory(), [], {}, 0     # type: float, List[str], Dict[str, float], int
    print(f'{"strangers":44}{"p50 ms":>8}{"p99 ms":>8}{"login s":>9}{"failed":>8}{"MiB":>7}{"cores":>7}'
          f'{"answers":>9}')
    for name, number, attack, most in ATTACKS:
        for attempt in ('', ', once more'):
            got = besiege(served, name, number, attack, seconds / len(ATTACKS), first, spread)
            first += int(got['logins'])
            memory = got['memory'] - idle
            print(f'{name + attempt:44}{got["p50"]:8.1f}{got["p99"]:8.1f}{got["login"]:9.2f}'
                  f'{got["failed"]:8.0f}{memory:7.0f}{got["processor"]:7.2f}{got["answers"]:9.0f}',
                  flush=True)
            quiet = quiet or got
            if got['failed']:
                bad.append(f'{name}: {got["failed"]:.0f} requests of the user failed')
            if memory > most:
                bad.append(f'{name}: {memory:.0f} MiB, not {most:.0f}')
            in_time = got['login'] <= LOGIN_TIMES * quiet['login'] or not spread
            if in_time:
                break       # else it may be this machine, which has other work: a fault stays
        if not in_time:
            bad.append(f'{name}: a login took {got["login"]:.2f} s, not {LOGIN_TIMES} x {quiet["login"]:.2f}')
    if served.process.poll() is not None:
        bad.append('the server has ended')
    status, took = served.ask(user, 'GET', '/metrics', login('alice', 'right'))
    if status != 403:
        bad.append(f'/metrics is answered {status}')
    for line in served.log.read_text().splitlines():
        if ' WARNING: ' in line or ' ERROR: ' in line:
            print(line)
    for line in bad:
        print(f'NOT KEPT: {line}')
    return int(bool(bad))


if __name__ == '__main__':
    sys.exit(main())
