#!/usr/bin/env python3
"""Measure restic_serve, rest-server, rclone and nginx in turn, on the same work, in one run.

    .ci/bench.py                      # everything, on /dev/shm and on disk: about half an hour
    .ci/bench.py --quick --only get   # a first impression

Figures are medians over the rounds; in each round every server does the same work, one after the
other.  What counts is the ratio of two figures of one run; at the end stands which of the goals
they meet.  Needs wrk and h2load (nghttp2-client) for GETs, openssl and htpasswd for TLS and passwords,
and restic in the PATH.  The rows about pieces and restic's own commands are what users feel; those that
read one piece of eight packs stay for comparison.
"""
from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import multiprocessing
import os
import random
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Tuple

from common import (
    MIB, MODULE, OURS, Served, free_port, make_certificate, make_repository, pack, restic,
    server_words, store)

PACK_BYTES = 16 * MIB
PACKS = 8
MANY_PACKS = 2000                           # whose pieces are read in no order, as restic does
SMALL_PACK_BYTES = MIB // 2
PIECE_BYTES = 500, 64 * 1024                # of a pack that are read at a time
FILES = 2000                                # small ones of the repository on which restic works
BEFORE = 'before'                           # another restic_serve.py, given by --before
PEERS = ('rest-server', 'rclone')
BOUND = 'nginx'                             # serves files, and nothing more
CIPHER = 'TLS_AES_128_GCM_SHA256'           # what a program in Go asks for first, restic among them
PASSWORD = 'Authorization: Basic ' + base64.b64encode(b'user:secret').decode()
PACKED = 'packed'                           # restic_serve, compiled beforehand as the README has it
Figures = Dict[str, float]
Table = Dict[str, Dict[str, List[float]]]   # by figure and server, one value a round
# Figure, the servers of which the best counts, whether more or less is better, and the factor.
GOALS: List[Tuple[str, Tuple[str, ...], str, float]] = [
    ('4 KiB GET/s, 1 conn.', PEERS[:1], '>=', 1.0), ('4 KiB GET/s, 5 conn.', PEERS[:1], '>=', 2.0),
    ('4 KiB GET/s, 64 conn.', PEERS[:1], '>=', 2.0), ('4 KiB GET/s, 64 conn.', (BOUND,), '>=', 0.75),
    ('CPU µs a GET, 1 conn.', PEERS[:1], '<=', 0.55), ('CPU µs a GET, 5 conn.', PEERS[:1], '<=', 0.55),
    ('CPU µs a GET, 64 conn.', PEERS[:1], '<=', 0.55),
    ('16 MiB down GiB/s', PEERS, '>=', 1.1), ('CPU s/GiB down', PEERS, '<=', 0.6),
    ('16 MiB up GiB/s', PEERS[:1], '>=', 1.25), ('CPU s/GiB up', PEERS[:1], '<=', 0.7),
    ('CPU s/GiB up', PEERS[1:], '<=', 1.1), ('600 B uploads/s', PEERS[:1], '>=', 1.0),
    ('list, whole ms', PEERS[:1], '<=', 0.7), ('TLS: 16 MiB down GiB/s', PEERS[:1], '>=', 1.0),
    ('TLS: 4 KiB GET/s, 5 conn.', PEERS[:1], '>=', 1.2),
]
# Figure of our own, and what it may be at the most.
BOUNDS = [('start to first answer, ms more than Python', 55), ('--stdio, start, ms more than Python', 40),
          ('packed: start to first answer, ms more than Python', 55),
          ('packed: --stdio, start, ms more than Python', 40),
          ('list, first byte ms', 20), ('memory growth of a list, MiB', 8), ('memory idle, MiB (PSS)', 25),
          ('memory after, MiB (PSS)', 40)]


def commands(root: str, port: int, python: str, mode: str = '') -> Dict[str, List[str]]:
    """The command that serves `root` on `port`, for each server there is; `mode` is `tls`,
    `bcrypt` or neither, and takes its files from the folder `.bench` in `root`."""
    address, files = f'127.0.0.1:{port}', f'{root}/.bench'
    ours = {OURS: str(MODULE), BEFORE: os.environ.get('BENCH_BEFORE', ''),
            PACKED: '' if mode else f'{files}/restic_serve.pyz'}
    found = {name: server_words(name, address, root, python, program=ours.get(name, ''),
                                tls=files if mode == 'tls' else '',
                                htpasswd=f'{files}/htpasswd' if mode == 'bcrypt' else '')
             for name in (OURS, BEFORE, *PEERS, PACKED) if ours.get(name, name)}
    if not mode:
        found[BOUND] = ['nginx', '-p', files, '-c', f'{files}/{port}.conf']
    return {name: words for name, words in found.items() if shutil.which(words[0])}


def nginx_configuration(root: str, port: int) -> str:
    """nginx as it serves files fastest, with the paths of the REST protocol."""
    return f'''
worker_processes 2; daemon off; error_log /dev/null; pid {root}/.bench/{port}.pid;
events {{ worker_connections 1024; }}
http {{ access_log off; sendfile on; tcp_nopush on; keepalive_requests 100000000;
  client_body_temp_path {root}/.bench;
  server {{ listen 127.0.0.1:{port};
    location ~ ^(/[a-z]+/data)/(..)(.+)$ {{ alias {root}$1/$2/$2$3; }}
  }}
}}
'''


# ---- servers ----

class Compared(Served):
    """One of the servers."""

    def __init__(self, name: str, root: str, python: str, mode: str = '') -> None:
        self.name, port = name, free_port()
        self.scheme = 'https' if mode == 'tls' else 'http'
        if name == BOUND:
            Path(root, '.bench', f'{port}.conf').write_text(nginx_configuration(root, port))
        super().__init__(commands(root, port, python, mode)[name], port, tls=mode == 'tls')


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


def h2load(server: Compared, connections: int, paths: List[str], *words: str) -> Tuple[float, int]:
    """Requests a second and their number; an answer that is no success ends the benchmark."""
    with tempfile.NamedTemporaryFile('w') as uris:
        uris.write(''.join(f'{server.scheme}://127.0.0.1:{server.port}{path}\n' for path in paths))
        uris.flush()
        command = ['h2load', '--h1', '-t1', f'-c{connections}', f'--tls13-ciphers={CIPHER}',
                   '-i', uris.name, *words]
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


def upload(server: Compared, root: str, connections: int, each: int, size: int) -> Figures:
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
    before, begin = server.processor(), time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    seconds, cpu = time.perf_counter() - begin, server.processor() - before
    if any(worker.exitcode for worker in workers):
        sys.exit(f'{server.name}: an upload failed')
    count = connections * each
    gib = count * size / 1024 ** 3
    return {'rate': count / seconds, 'gib/s': gib / seconds, 'cpu/gib': cpu / gib,
            'cpu/1000': cpu / count * 1000}


# ---- works: each gives figures by name ----

Work = Callable[[Compared, str, bool], Figures]


def pack_paths(root: str) -> List[str]:
    return [f'/packs/data/{path.name}'
            for path in sorted(Path(root, 'packs', 'data').glob('??/*'))]


def get_pieces(server: Compared, root: str, quick: bool, connections: int,
               *words: str) -> Tuple[float, float]:
    """GETs of 4 KiB a second, and processor µs for each."""
    before = server.processor()
    rate, count = h2load(server, connections, pack_paths(root), '-D', '1' if quick else '3',
                         '-H', 'Range: bytes=1048576-1052671', *words)
    return rate, (server.processor() - before) / count * 1e6


def work_get(server: Compared, root: str, quick: bool) -> Figures:
    figures = {}
    for connections in (1, 5, 64):
        rate, cpu = get_pieces(server, root, quick, connections)
        figures[f'4 KiB GET/s, {connections} conn.'] = rate
        figures[f'CPU µs a GET, {connections} conn.'] = cpu
    return figures


WRK = '''
local paths = {}
local threads = 0
function setup(thread) threads = threads + 1; thread:set("id", threads) end
function init(args)
  for line in io.lines(args[1]) do paths[#paths + 1] = line end
  math.randomseed(id)
end
function request()
  local length = math.random(%d, %d)
  local first = math.random(0, %d - length)
  return wrk.format("GET", paths[math.random(#paths)],
                    {["Range"] = "bytes=" .. first .. "-" .. (first + length - 1)})
end
function done(summary, latency, requests)
  local errors = summary.errors
  print("DONE", summary.requests, summary.duration,
        errors.connect + errors.read + errors.write + errors.status + errors.timeout)
end
'''


def work_pieces(server: Compared, root: str, quick: bool) -> Figures:
    """Pieces of many packs, each client in an order of its own."""
    figures = {}
    script, paths = Path(root, '.bench', 'pieces.lua'), Path(root, '.bench', 'pieces')
    script.write_text(WRK % (*PIECE_BYTES, SMALL_PACK_BYTES))
    paths.write_text(''.join(f'/pieces/data/{path.name}\n'
                             for path in Path(root, 'pieces', 'data').glob('??/*')))
    for connections in (1, 5, 64):
        before = server.processor()
        words = ['wrk', f'-t{min(connections, 5)}', f'-c{connections}', '-d', '2' if quick else '5', '-s',
                 str(script), f'http://127.0.0.1:{server.port}', '--', str(paths)]
        text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        done = re.search(r'^DONE\s+(\d+)\s+(\d+)\s+(\d+)', text, re.M)
        if not done or int(done[3]):
            sys.exit(f'wrk: {server.name}: {text}')
        figures[f'pieces/s, {connections} conn.'] = int(done[1]) / int(done[2]) * 1e6
        figures[f'CPU µs a piece, {connections} conn.'] = (server.processor() - before) / int(done[1]) * 1e6
    return figures


def work_restic(server: Compared, root: str, quick: bool) -> Figures:
    """What restic's commands take in all, and the server of the processor meanwhile."""
    figures = {}
    repository = Path(root, f'of-{server.name}')
    shutil.copytree(Path(root, '.bench', 'repository'), repository)
    for name, words in (('restore', ['restore', 'latest', '--target', f'{root}/.bench/restored']),
                        ('check --read-data', ['check', '--read-data']),
                        ('dump', ['dump', '--no-cache', 'latest', f'{root}/.bench/source/small']),
                        ('prune', ['forget', '--keep-last', '10', '--prune', '--max-unused', '0'])):
        before = server.processor()
        address = f'rest:http://127.0.0.1:{server.port}/{repository.name}/'
        figures[f'restic {name}, s'] = restic(address, words, f'{root}/.bench/cache', ['-q'])
        figures[f'restic {name}, CPU s'] = server.processor() - before
        shutil.rmtree(f'{root}/.bench/restored', ignore_errors=True)
    shutil.rmtree(repository)
    return figures


def back_up(files: Path, quick: bool) -> None:
    """Make a repository in which the blobs of many small files lie in many packs, more than a server would
    keep open or remember, in no order."""
    restic(f'{files}/repository', ['init'], files / 'cache')
    (files / 'source' / 'small').mkdir(parents=True)
    (files / 'source' / 'large').mkdir()
    order, turns = list(range(FILES // (10 if quick else 1))), 20 if quick else 100
    random.Random(7).shuffle(order)
    for turn in range(turns):
        for number in order[turn::turns]:
            (files / 'source' / 'small' / f'{number:04d}').write_bytes(os.urandom(500 + number * 17 % 60_000))
        if turn % (turns // 20) == 0:
            (files / 'source' / 'large' / str(turn)).write_bytes(os.urandom((2 if quick else 20) * MIB))
        restic(f'{files}/repository', ['backup', f'{files}/source'], files / 'cache', ['-q'])


def work_down(server: Compared, root: str, quick: bool) -> Figures:
    before = server.processor()
    rate, count = h2load(server, 4, pack_paths(root), '-n', '64' if quick else '256')
    gib = count * PACK_BYTES / 1024 ** 3
    return {'16 MiB down GiB/s': rate * PACK_BYTES / 1024 ** 3,
            'CPU s/GiB down': (server.processor() - before) / gib}


def work_tls(server: Compared, root: str, quick: bool) -> Figures:
    figures = work_down(server, root, quick)
    figures['4 KiB GET/s, 5 conn.'], figures['CPU µs a GET, 5 conn.'] = get_pieces(server, root, quick, 5)
    return {f'TLS: {name}': value for name, value in figures.items()}


def work_bcrypt(server: Compared, root: str, quick: bool) -> Figures:
    rate, _ = get_pieces(server, root, quick, 5, '-H', PASSWORD)
    return {'with a bcrypt password: 4 KiB GET/s, 5 conn.': rate}


def work_up(server: Compared, root: str, quick: bool) -> Figures:
    done = upload(server, root, 4, 4 if quick else 12, PACK_BYTES)
    return {'16 MiB up GiB/s': done['gib/s'], 'CPU s/GiB up': done['cpu/gib']}


def work_small(server: Compared, root: str, quick: bool) -> Figures:
    done = upload(server, root, 4, 100 if quick else 2000, 600)
    return {'600 B uploads/s': done['rate'], 'CPU ms an upload': done['cpu/1000']}


def work_list(server: Compared, root: str, quick: bool) -> Figures:
    memory = server.memory()
    first, whole = server.list('many', int(Path(root, '.bench', 'listed').read_text()))
    return {'list, first byte ms': first * 1000, 'list, whole ms': whole * 1000,
            'memory growth of a list, MiB': server.memory() - memory}


WORKS: Dict[str, Work] = {'pieces': work_pieces, 'restic': work_restic, 'get': work_get, 'down': work_down,
                          'up': work_up, 'small': work_small, 'list': work_list, 'tls': work_tls,
                          'bcrypt': work_bcrypt}
NEEDS = {'pieces': 'wrk', 'restic': 'restic', 'get': 'h2load', 'down': 'h2load'}
MODES = ('tls', 'bcrypt')           # works that need a server of their own
OF_SOME = {BOUND: ('get', 'down'), PACKED: ()}   # works that these can do


# ---- the run ----

@contextlib.contextmanager
def prepared(parent: str, works: List[str], listed: int, python: str, quick: bool) -> Iterator[str]:
    """A directory with a repository of packs, one of many names, and what the modes need."""
    with tempfile.TemporaryDirectory(dir=parent, prefix='bench-') as root:
        files = Path(root, '.bench')
        files.mkdir()
        files.joinpath('listed').write_text(str(listed))
        pack(files, python)
        for name in ('packs', 'pieces', 'many'):
            make_repository(f'{root}/{name}')
        for _ in range(PACKS):
            store(f'{root}/packs', 'data', os.urandom(PACK_BYTES))
        many = (MANY_PACKS // 20 if quick else MANY_PACKS) if 'pieces' in works else 0
        for _ in range(many):
            store(f'{root}/pieces', 'data', os.urandom(SMALL_PACK_BYTES))
        if 'restic' in works:
            back_up(files, quick)
        for number in range(listed if 'list' in works else 0):
            store(f'{root}/many', 'data', b'', hashlib.sha256(str(number).encode()).hexdigest())
        if 'tls' in works:
            make_certificate(files)
        if 'bcrypt' in works:
            subprocess.run(['htpasswd', '-bcBC', '10', files / 'htpasswd', 'user', 'secret'], check=True,
                           capture_output=True)
        for path in [Path(root), *Path(root).rglob('*')] if BOUND in commands('', 0, python) else []:
            if path.is_dir() or path.parent.parent.name == 'data':  # nginx has a user of its own
                path.chmod(0o755)
        yield root


def clean(root: str, keep: List[str]) -> None:
    """Remove what was uploaded."""
    for path in Path(root, 'packs', 'data').glob('??/*'):
        if path.name not in keep:
            path.unlink()


def measure(parent: str, works: List[str], rounds: int, quick: bool, listed: int, python: str) -> Table:
    """All figures."""
    table: Table = {}

    def note(name: str, figures: Figures) -> None:
        for figure, value in figures.items():
            table.setdefault(figure, {}).setdefault(name, []).append(value)

    with prepared(parent, works, listed, python, quick) as root:
        packs = [path.name for path in Path(root, 'packs', 'data').glob('??/*')]
        for _ in range(rounds):
            bare = start_python(python)
            for mode in ('', *(mode for mode in MODES if mode in works)):
                for name in commands('', 0, python, mode):
                    todo = [mode] if mode else [work for work in works if work not in MODES
                                                and work in OF_SOME.get(name, WORKS)]
                    if not todo:
                        continue
                    with Compared(name, root, python, mode) as server:
                        if not mode and name not in OF_SOME:
                            note(name, {'memory idle, MiB (PSS)': server.memory(),
                                        'start to first answer, ms': server.start_seconds * 1000})
                        for work in todo:
                            note(name, WORKS[work](server, root, quick))
                            clean(root, packs)
                        if not mode and name not in OF_SOME:
                            note(name, {'memory after, MiB (PSS)': server.memory()})
                        started = server.start_seconds
                    if not mode and name == OURS:
                        with Compared(PACKED, root, python) as server:
                            starts = {'': started, 'packed: ': server.start_seconds}
                        for form, script in (('', OURS), ('packed: ', PACKED)):
                            words = commands(root, 0, python)[script][:2]
                            note(name, {f'{form}start to first answer, ms more than Python':
                                        (starts[form] - bare) * 1000,
                                        f'{form}--stdio, start, ms more than Python':
                                        (start_stdio(words, root) - bare) * 1000})
    return table


def start_python(python: str) -> float:
    """Seconds that the interpreter takes to do nothing."""
    begin = time.perf_counter()
    subprocess.run([python, '-I', '-c', 'pass'], check=True)
    return time.perf_counter() - begin


def start_stdio(words: List[str], root: str) -> float:
    """Seconds until --stdio says something."""
    begin = time.perf_counter()
    theirs, ours = socket.socketpair()
    with ours, theirs, subprocess.Popen([*words, '--stdio', root], stdin=theirs.fileno(),
                                        stdout=theirs.fileno(), stderr=subprocess.DEVNULL):
        theirs.close()
        ours.recv(1)
        seconds = time.perf_counter() - begin
        ours.close()
    return seconds


def restic_over_stdio(words: List[str], parent: str, size: int) -> Figures:
    """restic's time, and the server's on the processor, for `size` bytes without a port."""
    figures: Figures = {}
    with tempfile.TemporaryDirectory(dir=parent, prefix='bench-') as root:
        folder = Path(root, 'source')
        folder.mkdir()
        for number in range(4):
            with Path(folder, str(number)).open('wb') as file:
                for _ in range(size // MIB // 4):
                    file.write(os.urandom(MIB))
        times, serve = Path(root, 'times'), Path(root, 'serve')
        serve.write_text(f'#!/bin/sh\n{" ".join(words)} "$@"\ntimes > {times}.new\nmv {times}.new {times}\n')
        serve.chmod(0o755)
        options = ['-q', '-o', f'rclone.program={serve}']
        for name, command in (('', ['init']), ('backup', ['backup', str(folder)]),
                              ('check', ['check', '--read-data']),
                              ('restore', ['restore', 'latest', '--target', f'{root}/restored'])):
            seconds = restic(f'rclone:{root}/srv', command, f'{root}/cache', options)
            while not times.exists():  # restic does not wait for the last of it
                time.sleep(0.01)
            minutes = re.findall(r'(\d+)m([\d.]+)s', times.read_text().splitlines()[1])
            times.unlink()
            if name:
                figures[f'--stdio: {name}, s'] = seconds
                figures[f'--stdio: {name}, CPU s'] = sum(60 * int(m) + float(s) for m, s in minutes)
    for unit in ('s', 'CPU s'):
        figures[f'--stdio: all three, {unit}'] = sum(
            figures[f'--stdio: {name}, {unit}'] for name in ('backup', 'check', 'restore'))
    return figures


def measure_stdio(parent: str, rounds: int, quick: bool, python: str) -> None:
    """restic with ours and with rclone, in turn."""
    table: Table = {}
    commands = {OURS: [python, str(MODULE)], 'rclone': ['rclone']}
    for _ in range(rounds):
        for name, words in commands.items():
            done = restic_over_stdio(words, parent, 64 * MIB if quick else 1024 * MIB)
            for figure, value in done.items():
                table.setdefault(figure, {}).setdefault(name, []).append(value)
    print_table(parent, table)


def print_table(parent: str, table: Table) -> None:
    """Medians, and ours as a multiple of each other's."""
    names = [name for name in (OURS, BEFORE, *PEERS, BOUND)
             if any(name in values for values in table.values())]
    peers = names[1:]
    heads = names + [f'÷ {peer}' for peer in peers]
    print(f'\n| {parent} | ' + ' | '.join(heads) + ' |')
    print('|---' * (len(heads) + 1) + '|')
    for figure, values in table.items():
        middle = medians(values)
        cells = ['–' if name not in middle else f'{middle[name]:,.3g}' if middle[name] < 1000
                 else f'{middle[name]:,.0f}' for name in names]
        for peer in peers:
            cells.append(f'{middle[OURS] / middle[peer]:.2f}' if middle.get(peer) else '–')
        print(f'| {figure} | ' + ' | '.join(cells) + ' |')
    sys.stdout.flush()


def medians(values: Dict[str, List[float]]) -> Dict[str, float]:
    return {name: statistics.median(rounds) for name, rounds in values.items()}


def print_goals(table: Table, on_disk: bool) -> None:
    """Which goals are met, of those that were measured."""
    print('\n| goal | is | wanted | |\n|---|---|---|---|')
    goals = [goal for goal in GOALS if goal[0] in table]
    if on_disk:  # where the disk says how fast a small upload can be
        goals = [goal for goal in goals if goal[0].startswith('600 B')]
    for figure, names, sign, factor in goals:
        middle = medians(table[figure])
        others = [middle[name] for name in names if name in middle]
        if others:
            if figure.startswith('600 B') and not on_disk:
                factor = 1.5
            ratio = middle[OURS] / (max(others) if sign == '>=' else min(others))
            met = ratio >= factor if sign == '>=' else ratio <= factor
            print(f'| {figure} ÷ {" or ".join(names)} | {ratio:.2f} | {sign} {factor} | {_met(met)} |')
    password, plain = 'with a bcrypt password: 4 KiB GET/s, 5 conn.', '4 KiB GET/s, 5 conn.'
    if password in table and plain in table and not on_disk:
        ratio = medians(table[password])[OURS] / medians(table[plain])[OURS]
        print(f'| {password} ÷ without | {ratio:.2f} | >= 0.9 | {_met(ratio >= 0.9)} |')
    few, many = 'CPU µs a GET, 5 conn.', 'CPU µs a GET, 64 conn.'
    if few in table and many in table and not on_disk:
        ratio = medians(table[many])[OURS] / medians(table[few])[OURS]
        print(f'| {many} ÷ 5 conn. | {ratio:.2f} | <= 1.3 | {_met(ratio <= 1.3)} |')
    for figure, most in [] if on_disk else BOUNDS:
        if figure in table:
            value = medians(table[figure])[OURS]
            print(f'| {figure} | {value:.3g} | <= {most} | {_met(value <= most)} |')
    sys.stdout.flush()


def _met(met: bool) -> str:
    return 'met' if met else '**missed**'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--quick', action='store_true', help='less work, one round')
    parser.add_argument('--only', action='append', choices=[*WORKS, 'stdio'])
    parser.add_argument('--dir', action='append', help='where to work (/dev/shm and /var/tmp)')
    parser.add_argument('--listed', type=int, default=1_000_000, help='names in the list')
    parser.add_argument('--python', default=sys.executable, help='the Python that serves')
    parser.add_argument('--before', metavar='FILE', help='another restic_serve.py, to measure beside this')
    options = parser.parse_args()
    if options.before:
        os.environ['BENCH_BEFORE'] = options.before
    for words in (['rest-server', '--version'], ['rclone', 'version'], [options.python, '-V']):
        if shutil.which(words[0]):
            print(subprocess.run(words, capture_output=True, text=True).stdout.splitlines()[0])
    rounds = 1 if options.quick else options.rounds
    works = [work for work in options.only or WORKS
             if work != 'stdio' and (options.only or shutil.which(NEEDS.get(work, 'sh')))]
    for parent in options.dir or ['/dev/shm', '/var/tmp']:
        if works:
            table = measure(parent, works, rounds, options.quick,
                            min(options.listed, 50_000) if options.quick else options.listed, options.python)
            print_table(parent, table)
            print_goals(table, on_disk='shm' not in parent)
        stdio = not options.only or 'stdio' in options.only
        if stdio and shutil.which('rclone') and shutil.which('restic'):
            measure_stdio(parent, rounds, options.quick, options.python)


if __name__ == '__main__':
    main()
