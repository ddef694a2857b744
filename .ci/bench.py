#!/usr/bin/env python3
"""Measure restic_serve, rest-server and rclone in turn, on the same work, in one run.

    .ci/bench.py                      # everything, on /dev/shm and on disk: about ten minutes
    .ci/bench.py --quick --only get   # a first impression

Figures are medians over the rounds; in each round every server does the same work, one after the
other.  What counts is the ratio of two figures of one run.  Needs h2load (nghttp2-client) for GETs.
"""
from __future__ import annotations

import argparse
import contextlib
import hashlib
import multiprocessing
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Optional, Tuple

HERE = Path(__file__).resolve().parent
MIB = 1 << 20
PACK_BYTES = 16 * MIB
PACKS = 8
LISTED = 50_000
OURS = 'restic_serve'
Figures = Dict[str, float]


def commands(root: str, port: int, python: str) -> Dict[str, List[str]]:
    """The command that serves `root` on `port`, for each server there is."""
    address = f'127.0.0.1:{port}'
    found = {
        OURS: [python, str(HERE.parent / 'restic_serve.py'), '--addr', address, root],
        'rest-server': ['rest-server', '--no-auth', '--listen', address, '--path', root],
        'rclone': ['rclone', 'serve', 'restic', '--addr', address, root],
    }
    return {name: words for name, words in found.items() if shutil.which(words[0])}


# ---- servers ----

def tree(pid: int) -> List[int]:
    """A process and all below it."""
    found = [pid]
    for task in Path(f'/proc/{pid}/task').iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended
            for child in (task / 'children').read_text().split():
                found += tree(int(child))
    return found


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and its children, those that have ended included."""
    ticks = 0
    for one in tree(pid):
        fields = Path(f'/proc/{one}/stat').read_text().rpartition(')')[2].split()
        ticks += sum(map(int, fields[11:15] if one == pid else fields[11:13]))
    return ticks / os.sysconf('SC_CLK_TCK')


def pss_mib(pid: int) -> float:
    """Memory of a process and its children, shared pages divided among those that share them."""
    kib = 0
    for one in tree(pid):
        match = re.search(r'^Pss: +(\d+) kB', Path(f'/proc/{one}/smaps_rollup').read_text(), re.M)
        kib += int(match[1]) if match else 0
    return kib / 1024


class Served:
    """A running server, on a port of its own; `start_seconds` until its first answer."""

    def __init__(self, name: str, root: str, python: str) -> None:
        with socket.socket() as sock:
            sock.bind(('127.0.0.1', 0))
            self.port = sock.getsockname()[1]
        self.name = name
        words = commands(root, self.port, python)[name]
        begin = time.perf_counter()
        self.process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while True:
            with contextlib.suppress(OSError), Client(self.port) as client:
                client.request('GET', '/none/config')
                break
            if self.process.poll() is not None or time.perf_counter() - begin > 20:
                sys.exit(f'{name} does not answer: {words}')
        self.start_seconds = time.perf_counter() - begin

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)

    def cpu(self) -> float:
        return cpu_seconds(self.process.pid)

    def pss(self) -> float:
        return pss_mib(self.process.pid)


# ---- clients ----

class Client:
    """One connection that costs the machine as little as it can."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(('127.0.0.1', port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.sock.close()

    def request(self, method: str, path: str, body: bytes = b'', accept: str = '') -> int:
        """The status of an answer without a body that matters."""
        head = (f'{method} {path} HTTP/1.1\r\nHost: x\r\nAccept: {accept or "*/*"}\r\n'
                f'Content-Length: {len(body)}\r\n\r\n').encode()
        if len(body) < 4096:
            self.sock.sendall(head + body)
        else:
            self.sock.sendall(head)
            self.sock.sendall(body)
        return int(self.sock.recv(65536).split(b' ', 2)[1])


def h2load(port: int, connections: int, paths: List[str], *words: str) -> Tuple[float, int]:
    """Requests a second and their number; an answer that is no success ends the benchmark."""
    with tempfile.NamedTemporaryFile('w') as uris:
        uris.write(''.join(f'http://127.0.0.1:{port}{path}\n' for path in paths))
        uris.flush()
        command = ['h2load', '--h1', '-t1', f'-c{connections}', '-i', uris.name, *words]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rate = re.search(r', ([\d.]+) req/s', text)
    status = re.search(r'status codes: (\d+) 2xx, (\d+) 3xx, (\d+) 4xx, (\d+) 5xx', text)
    if not rate or not status or any(map(int, status.groups()[1:])):
        sys.exit(f'h2load: {text}')
    return float(rate[1]), int(status[1])


def send_all(port: int, repository: str, bodies: List[bytes], names: List[str]) -> None:
    with Client(port) as client:
        for body, name in zip(bodies, names):
            status = client.request('POST', f'{repository}/data/{name}', body)
            if status != 200:
                sys.exit(f'upload answered {status}')


def warm(root: str, size: int) -> None:
    """Have free memory that was touched lately.  A virtual machine gives free pages back to its
    host; whoever touches them first would pay three times the cost of an upload for them."""
    path = Path(root, 'warm')
    with path.open('wb') as file:
        for _ in range(0, size, MIB):
            file.write(bytes(MIB))
    path.unlink()


def upload(server: Served, root: str, connections: int, each: int, size: int) -> Figures:
    """Upload `each` new objects of `size` bytes over each connection."""
    base = os.urandom(size)
    jobs = []
    for _ in range(connections):
        bodies = [os.urandom(32) + base[32:] for _ in range(each)]
        names = [hashlib.sha256(body).hexdigest() for body in bodies]
        jobs.append((server.port, '/packs', bodies, names))
    context = multiprocessing.get_context('fork')
    workers = [context.Process(target=send_all, args=job) for job in jobs]
    warm(root, connections * each * size * 5 // 4)
    before, begin = server.cpu(), time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    seconds, cpu = time.perf_counter() - begin, server.cpu() - before
    if any(worker.exitcode for worker in workers):
        sys.exit(f'{server.name}: an upload failed')
    count = connections * each
    gib = count * size / 1024 ** 3
    return {'rate': count / seconds, 'gib/s': gib / seconds, 'cpu/gib': cpu / gib,
            'cpu/1000': cpu / count * 1000}


# ---- works: each gives figures by name ----

Work = Callable[[Served, str, bool], Figures]


def pack_paths(root: str) -> List[str]:
    return [f'/packs/data/{path.name}'
            for path in sorted(Path(root, 'packs', 'data').glob('??/*'))]


def work_get(server: Served, root: str, quick: bool) -> Figures:
    figures = {}
    for connections in (1, 5, 64):
        before = server.cpu()
        rate, count = h2load(server.port, connections, pack_paths(root), '-D',
                             '1' if quick else '3', '-H', 'Range: bytes=1048576-1052671')
        figures[f'4 KiB GET/s, {connections} conn.'] = rate
        figures[f'CPU µs a GET, {connections} conn.'] = (server.cpu() - before) / count * 1e6
    return figures


def work_down(server: Served, root: str, quick: bool) -> Figures:
    before = server.cpu()
    rate, count = h2load(server.port, 4, pack_paths(root), '-n', '64' if quick else '256')
    gib = count * PACK_BYTES / 1024 ** 3
    return {'16 MiB down GiB/s': rate * PACK_BYTES / 1024 ** 3,
            'CPU s/GiB down': (server.cpu() - before) / gib}


def work_up(server: Served, root: str, quick: bool) -> Figures:
    done = upload(server, root, 4, 4 if quick else 12, PACK_BYTES)
    return {'16 MiB up GiB/s': done['gib/s'], 'CPU s/GiB up': done['cpu/gib']}


def work_small(server: Served, root: str, quick: bool) -> Figures:
    done = upload(server, root, 4, 100 if quick else 500, 600)
    return {'600 B uploads/s': done['rate'], 'CPU ms an upload': done['cpu/1000']}


def work_list(server: Served, root: str, quick: bool) -> Figures:
    memory = server.pss()
    begin = time.perf_counter()
    with Client(server.port) as client:
        client.sock.sendall(b'GET /many/data/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n'
                            b'Accept: application/vnd.x.restic.rest.v2\r\n\r\n')
        data = [client.sock.recv(65536)]
        first = time.perf_counter() - begin
        while data[-1]:
            data.append(client.sock.recv(1 << 20))
    whole = time.perf_counter() - begin
    found = b''.join(data).count(b'"name"')
    if found < LISTED * 0.999:  # a chunk's border may cut a few
        sys.exit(f'{server.name} lists {found} of {LISTED}')
    return {f'list of {LISTED:,}, first byte ms': first * 1000,
            f'list of {LISTED:,}, whole ms': whole * 1000,
            'memory growth of a list, MiB': server.pss() - memory}


WORKS: Dict[str, Work] = {'get': work_get, 'down': work_down, 'up': work_up, 'small': work_small,
                          'list': work_list}


# ---- the run ----

@contextlib.contextmanager
def prepared(parent: str) -> Iterator[str]:
    """A directory with a repository of packs, and one of many names."""
    with tempfile.TemporaryDirectory(dir=parent, prefix='bench-') as root:
        for kind in ('data', 'index', 'keys', 'locks', 'snapshots'):
            Path(root, 'packs', kind).mkdir(parents=True)
        for number in range(256):
            Path(root, 'packs', 'data', f'{number:02x}').mkdir()
            Path(root, 'many', 'data', f'{number:02x}').mkdir(parents=True)
        for _ in range(PACKS):
            body = os.urandom(PACK_BYTES)
            name = hashlib.sha256(body).hexdigest()
            Path(root, 'packs', 'data', name[:2], name).write_bytes(body)
        for number in range(LISTED):
            name = hashlib.sha256(str(number).encode()).hexdigest()
            Path(root, 'many', 'data', name[:2], name).touch()
        yield root


def clean(root: str, keep: List[str]) -> None:
    """Remove what was uploaded."""
    for path in Path(root, 'packs', 'data').glob('??/*'):
        if path.name not in keep:
            path.unlink()


def measure(parent: str, names: List[str], works: List[str], rounds: int, quick: bool,
            python: str) -> Dict[str, Dict[str, List[float]]]:
    """All figures: by name of the figure, then by server, one value a round."""
    table: Dict[str, Dict[str, List[float]]] = {}
    with prepared(parent) as root:
        packs = [path.name for path in Path(root, 'packs', 'data').glob('??/*')]
        for _ in range(rounds):
            for name in names:
                with Served(name, root, python) as server:
                    figures = {'start to first answer, ms': server.start_seconds * 1000,
                               'memory idle, MiB (PSS)': server.pss()}
                    for work in works:
                        figures.update(WORKS[work](server, root, quick))
                        clean(root, packs)
                    figures['memory after, MiB (PSS)'] = server.pss()
                for figure, value in figures.items():
                    table.setdefault(figure, {}).setdefault(name, []).append(value)
    return table


def print_table(parent: str, table: Dict[str, Dict[str, List[float]]], names: List[str]) -> None:
    """Medians, and ours as a multiple of each peer's."""
    peers = [name for name in names if name != OURS]
    heads = names + [f'÷ {peer}' for peer in peers]
    print(f'\n| {parent} | ' + ' | '.join(heads) + ' |')
    print('|---' * (len(heads) + 1) + '|')
    for figure, values in table.items():
        middle = {name: statistics.median(values[name]) for name in names}
        cells = [f'{middle[name]:,.3g}' if middle[name] < 1000 else f'{middle[name]:,.0f}'
                 for name in names]
        for peer in peers:
            ratio: Optional[float] = middle[OURS] / middle[peer] if middle[peer] else None
            cells.append('–' if ratio is None else f'{ratio:.2f}')
        print(f'| {figure} | ' + ' | '.join(cells) + ' |')
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--quick', action='store_true', help='less work, one round')
    parser.add_argument('--only', action='append', choices=list(WORKS))
    parser.add_argument('--dir', action='append', help='where to work (/dev/shm and /var/tmp)')
    parser.add_argument('--peers', metavar='DIR', help='where restic, rclone and rest-server are')
    parser.add_argument('--python', default=sys.executable, help='the Python that serves')
    options = parser.parse_args()
    if options.peers:
        os.environ['PATH'] = f'{options.peers}:{os.environ["PATH"]}'
    names = list(commands('', 0, options.python))
    for words in (['rest-server', '--version'], ['rclone', 'version'], [options.python, '-V']):
        if shutil.which(words[0]):
            print(subprocess.run(words, capture_output=True, text=True).stdout.splitlines()[0])
    for parent in options.dir or ['/dev/shm', '/var/tmp']:
        table = measure(parent, names, options.only or list(WORKS),
                        1 if options.quick else options.rounds, options.quick, options.python)
        print_table(parent, table, names)


if __name__ == '__main__':
    main()
