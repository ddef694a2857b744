#!/usr/bin/env python3
"""restic over a long line: restic_serve beside rest-server and rclone, over HTTP, TLS and --stdio.

    .ci/lines.py [--rounds 3] [--wire tls]  # with the restic and the other servers of the PATH
    .ci/lines.py --quick            # one round with little data, to see that it runs

The line is a relay, a process of its own between restic and the server: 50 ms of round trip, and 400
Mbit/s each way, which all connections share.  It opens a connection as late as a line would.  What comes
faster than that waits in a queue of another 25 ms, and then in the sender's own buffers; TCP's slow start,
its windows and losses are not imitated.  At first the relay is measured itself.

In each round the servers do the same work, each command one after the other, in another order each time:
every command of restic that a user waits for, with an empty cache at first, on copies of one repository,
so that keys cost the same and files are cut the same.  Only `init` makes a new one, and restic tries for
half a second how much work its key may be: a busy machine makes that time a matter of luck.

Printed are medians of seconds, for restic_serve also as a multiple of the better peer's; what is above 1.05
is marked.  Beside it stands the same of each server's quickest round, which others on the machine disturb
less, and the spread: the largest difference between two rounds of one server, as a part of its median.  The
exit status is 1 if a command fails, if the relay is not the line that it should be, or if both ratios of a
command are above 1.25; with --quick, where all wires are measured at once, only if a command fails.
Needs restic, openssl for TLS, and rest-server or rclone to compare with.
"""
from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import functools
import os
import random
import select
import shlex
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Callable, Deque, Dict, Generator, Iterator, List, Tuple, cast

from common import MIB, OURS, Failed, Served, free_port, make_certificate, pack, restic, server_words

RATE = 400e6 / 8                # bytes a second, each way
DELAY = 0.025                   # seconds, each way
QUEUE = 0.025                   # seconds that may wait for their turn, each way
HELD_BYTES = int(2 * RATE * 2 * DELAY)  # of a flow whose receiver does not take them
PIECE_BYTES = 64 * 1024
BUFFER_BYTES = 256 * 1024       # of the relay's sockets, so that they are no second queue
MARKED, FAILED = 1.05, 1.25     # times the better peer's time
PEERS = 'rest-server', 'rclone'
WIRES = {'http': (OURS, *PEERS), 'tls': (OURS, *PEERS), 'stdio': (OURS, 'rclone')}
# Files, their mean size, and those that change before the second backup.
WORK, LITTLE_WORK = (300, MIB // 2, 45), (24, MIB // 4, 4)
STOPPED = threading.Event()     # another wire has failed, or the user has had enough
Times = Dict[Tuple[str, str, str], List[float]]     # by wire, command and server, one for each round
Steps = Generator[Tuple[str, float], None, None]     # a command and its seconds, when it has run


class Direction:
    """One way of the line, for all connections."""

    def __init__(self) -> None:
        self.free_at = 0.0          # when all that was admitted has left

    def wait(self, now: float) -> float:
        """Seconds until more is admitted, or less than none."""
        return self.free_at - now - QUEUE

    def admit(self, count: int, now: float) -> float:
        """When so many bytes arrive at the other end."""
        self.free_at = max(self.free_at, now) + count / RATE
        return self.free_at + DELAY


class Flow:
    """What is read from one descriptor and written to another, from the moment `begin` on.  `end` passes
    on the end, `fail` follows an error."""

    def __init__(self, direction: Direction, source: int, sink: int, end: Callable[[], None],
                 fail: Callable[[], None], begin: float = 0.0) -> None:
        self.direction, self.source, self.sink = direction, source, sink
        self.end, self.fail, self.begin = end, fail, begin
        self.pieces: Deque[Tuple[float, memoryview]] = collections.deque()  # with the time when each is due
        self.held = 0               # bytes of them
        self.ended = self.blocked = self.done = False
        os.set_blocking(source, False)
        os.set_blocking(sink, False)

    def wants(self, now: float) -> bool:
        """Whether to read."""
        return not self.ended and self.held < HELD_BYTES and self._wait(now) <= 0

    def wait(self, now: float) -> float:
        """Seconds until there is something to do, unless a descriptor becomes ready before."""
        waits = [60.0]
        if self.pieces and not self.blocked:
            waits.append(self.pieces[0][0] - now)
        if not self.ended and self.held < HELD_BYTES and self._wait(now) > 0:
            waits.append(self._wait(now))
        return max(0.0, min(waits))

    def read(self, now: float) -> None:
        """Read once.  Raises OSError."""
        with contextlib.suppress(BlockingIOError):
            data = os.read(self.source, PIECE_BYTES)
            self.pieces.append((self.direction.admit(len(data), now), memoryview(data)))
            self.held += len(data)
            self.ended = not data

    def write(self, now: float) -> None:
        """Write what is due.  Raises OSError."""
        self.blocked = False
        while self.pieces and self.pieces[0][0] <= now and not self.blocked:
            due, data = self.pieces.popleft()
            if not data:
                self.done = True
                self.end()
                return
            count = 0
            with contextlib.suppress(BlockingIOError):
                count = os.write(self.sink, data)
            self.held -= count
            if count < len(data):
                self.pieces.appendleft((due, data[count:]))
                self.blocked = True

    def stop(self) -> None:
        """Give up."""
        self.pieces.clear()
        self.ended = self.done = True
        self.blocked = False

    def _wait(self, now: float) -> float:
        return max(self.begin - now, self.direction.wait(now))


def turn(flows: List[Flow], others: List[int]) -> List[int]:
    """Wait, and do what there is to do then; those of the `others` that are readable."""
    now = time.monotonic()
    sources = [flow.source for flow in flows if flow.wants(now)]
    sinks = [flow.sink for flow in flows if flow.blocked]
    wait = min((flow.wait(now) for flow in flows), default=60.0)
    readable, writable, _ = select.select(sources + others, sinks, [], wait)
    now = time.monotonic()
    for flow in flows:
        try:
            if not flow.ended and flow.source in readable:
                flow.read(now)
            if not flow.done and (not flow.blocked or flow.sink in writable):
                flow.write(now)
        except OSError:
            flow.fail()
    return [fd for fd in others if fd in readable]


class Connection:
    """One TCP connection through the line."""

    def __init__(self, client: socket.socket, port: int, there: Direction, back: Direction) -> None:
        self.client, self.server = client, socket.socket()
        self.server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        self.server.connect(('127.0.0.1', port))
        for sock in (self.client, self.server):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # The client has sent nothing before it is told that the connection is open.
        begin = time.monotonic() + 2 * DELAY
        self.flows = [self._flow(there, self.client, self.server, begin),
                      self._flow(back, self.server, self.client, begin)]

    def _flow(self, direction: Direction, source: socket.socket, sink: socket.socket, begin: float) -> Flow:
        end = functools.partial(sink.shutdown, socket.SHUT_WR)
        return Flow(direction, source.fileno(), sink.fileno(), end, self.reset, begin)

    def reset(self) -> None:
        """Tell both sides that the other has given up."""
        for sock in (self.client, self.server):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        for flow in self.flows:
            flow.stop()

    def close_if_done(self) -> bool:
        if not all(flow.done for flow in self.flows):
            return False
        self.client.close()
        self.server.close()
        return True


def relay_tcp(port: int) -> None:
    """Be a line to a port, until the end of standard input; prints its own port."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
    listener.bind(('127.0.0.1', 0))
    listener.listen(64)
    print(listener.getsockname()[1], flush=True)
    there, back = Direction(), Direction()
    connections: List[Connection] = []
    while True:
        ready = turn([flow for one in connections for flow in one.flows], [0, listener.fileno()])
        if 0 in ready:
            return
        if listener.fileno() in ready:
            client = listener.accept()[0]
            try:
                connections.append(Connection(client, port, there, back))
            except OSError:         # the server has ended
                client.close()
        connections = [one for one in connections if not one.close_if_done()]


def relay_pipes(command: List[str]) -> int:
    """Run a command at the far end of a line; its exit status."""
    (far_input, to_command), (from_command, far_output) = os.pipe(), os.pipe()
    process = subprocess.Popen(command, stdin=far_input, stdout=far_output)
    os.close(far_input)
    os.close(far_output)
    flows: List[Flow] = []

    def end(number: int) -> None:
        """Close what a flow connects: the end to one side, a broken pipe to the other."""
        flows[number].stop()
        os.close(flows[number].source)
        os.close(flows[number].sink)

    for number, (source, sink) in enumerate(((0, to_command), (from_command, 1))):
        ending = functools.partial(end, number)
        flows.append(Flow(Direction(), source, sink, ending, ending))
    while not flows[1].done:
        turn([flow for flow in flows if not flow.done], [])
    if not flows[0].done:
        end(0)
    status = process.wait()
    return status if status >= 0 else 128 - status


# ---- the line itself, measured ----

@contextlib.contextmanager
def line_to(port: int) -> Iterator[int]:
    """A line to a port; the port of its near end.  It ends with its standard input, which is closed here."""
    with subprocess.Popen([sys.executable, __file__, '--tcp', str(port)], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as relay:
        yield int(cast(IO[bytes], relay.stdout).readline())


def echo(listener: socket.socket) -> None:
    """Send back what comes over one connection."""
    with listener.accept()[0] as sock:
        for data in iter(lambda: sock.recv(PIECE_BYTES), b''):
            sock.sendall(data)


def measure_line(read: Callable[[int], bytes], write: Callable[[memoryview], int], end: Callable[[], None],
                 count: int) -> Tuple[float, float]:
    """Seconds of a round trip, and bytes a second there and back at once, to an echo at the far end."""
    trips = []
    for _ in range(6):
        begin = time.perf_counter()
        write(memoryview(b'.'))
        read(1)
        trips.append(time.perf_counter() - begin)

    def send() -> None:
        view = memoryview(bytes(count))
        while view:
            view = view[write(view):]
        end()

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    read(PIECE_BYTES)
    begin = time.perf_counter()
    received = sum(map(len, iter(lambda: read(PIECE_BYTES), b'')))
    rate = received / (time.perf_counter() - begin)
    thread.join()
    return statistics.median(trips[1:]), rate


def test_tcp(count: int) -> Tuple[float, float]:
    with socket.create_server(('127.0.0.1', 0)) as listener:
        threading.Thread(target=echo, args=(listener,), daemon=True).start()
        with line_to(listener.getsockname()[1]) as near, \
                socket.create_connection(('127.0.0.1', near)) as sock:
            return measure_line(sock.recv, sock.send, lambda: sock.shutdown(socket.SHUT_WR), count)


def test_pipes(count: int) -> Tuple[float, float]:
    with subprocess.Popen([sys.executable, __file__, '--pipes', 'cat'], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, bufsize=0) as process:
        to, back = cast(IO[bytes], process.stdin), cast(IO[bytes], process.stdout)
        return measure_line(back.read, to.write, to.close, count)


def test_line(count: int) -> bool:
    """Measure and print what the line is; whether it is what it should be, at the third attempt at the
    latest."""
    good = True
    for name, test in (('TCP', test_tcp), ('pipes', test_pipes)):
        for _ in range(3):
            trip, rate = test(count)
            fits = 2 * DELAY <= trip <= 2.4 * DELAY and 0.9 < rate / RATE < 1.05
            if fits:
                break
        print(f'the line over {name}: {trip * 1000:.1f} ms of round trip, '
              f'{rate * 8 / 1e6:.0f} Mbit/s each way', flush=True)
        good &= fits
    return good


# ---- the work ----

class Bench:
    """One wire, and what all servers have in common: the files to back up, and a repository without
    snapshots."""

    def __init__(self, folder: Path, wire: str, python: str, work: Tuple[int, int, int]) -> None:
        self.folder, self.wire, self.python = folder, wire, python
        self.source, self.prepared = folder / 'source', folder / 'prepared'
        self.before, self.after = folder / 'before', folder / 'after'
        count, self.size, changing = work
        self.random = random.Random(1)
        names = [f'{number % 10}/{number}' for number in range(count)]
        for where in (self.source, self.before, self.after):
            for name in names[:None if where == self.source else changing]:
                self.write(where / name)
        if wire == 'tls':
            make_certificate(folder)
        pack(folder, python)
        restic(str(self.prepared), ['init'], folder / 'cache')

    def write(self, path: Path) -> None:
        """Write a file that no other is like."""
        path.parent.mkdir(parents=True, exist_ok=True)
        size = self.random.randrange(self.size // 2, self.size * 3 // 2)
        path.write_bytes(self.random.getrandbits(8 * size).to_bytes(size, 'big'))

    def work(self, url: Callable[[str], str], where: Path, options: List[str]) -> Steps:
        """What a user does, and the seconds that it takes."""
        restored = where / 'restored'
        shutil.copytree(self.prepared, where / 'root/prepared')
        copy_over(self.before, self.source)
        for name, command in (('init', ['init']), ('backup', ['backup', str(self.source)]),
                              ('backup of changes', ['backup', str(self.source)]), ('check', ['check']),
                              ('check --read-data', ['check', '--read-data']),
                              ('restore', ['restore', 'latest', '--target', str(restored)]),
                              ('forget --prune', ['forget', '--keep-last', '1', '--prune'])):
            if STOPPED.is_set():
                raise Failed('stopped')
            if name == 'backup of changes':
                copy_over(self.after, self.source)
            address = url('new' if name == 'init' else 'prepared')
            seconds = restic(address, command, where / 'cache', options)
            if name == 'restore':
                if subprocess.run(['diff', '-r', self.source, f'{restored}{self.source}']).returncode:
                    raise Failed(f'{address}: what was restored differs')
                shutil.rmtree(restored)
            yield name, seconds

    def measure(self, server: str) -> Steps:
        """The same with a server."""
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            where, root = Path(name), Path(name, 'root')
            root.mkdir()
            if self.wire == 'stdio':
                words = [sys.executable, __file__, '--pipes', *self.program(server)]
                yield from self.work(lambda one: f'rclone:{root / one}', where,
                                     ['-o', f'rclone.program={shlex.join(words)}'])
                return
            tls = self.wire == 'tls'
            options, scheme = (['--cacert', f'{self.folder}/cert.pem'], 'https') if tls else ([], 'http')
            port = free_port()
            with Served(self.command(server, f'127.0.0.1:{port}', root), port, log=where / 'log', tls=tls), \
                    line_to(port) as near:
                address = f'rest:{scheme}://127.0.0.1:{near}'
                yield from self.work(lambda one: f'{address}/{one}/', where, options)

    def program(self, server: str) -> List[str]:
        return [self.python, f'{self.folder}/restic_serve.pyz'] if server == OURS else [server]

    def command(self, server: str, address: str, root: Path) -> List[str]:
        """What serves a directory over TCP."""
        return server_words(server, address, root, self.python, program=self.folder / 'restic_serve.pyz',
                            tls=self.folder if self.wire == 'tls' else '')


def copy_over(source: Path, target: Path) -> None:
    """Copy files over others, as if they were written now."""
    for path in source.rglob('*'):
        if path.is_file():
            shutil.copyfile(path, target / path.relative_to(source))


def measure_wire(parent: Path, wire: str, options: argparse.Namespace) -> Times:
    """All rounds over one wire."""
    times: Times = {}
    servers = [server for server in WIRES[wire] if server == OURS or shutil.which(server)]
    folder = parent / wire
    folder.mkdir()
    bench = Bench(folder, wire, options.python, LITTLE_WORK if options.quick else WORK)
    for number in range(1 if options.quick else options.rounds):
        turned = number % len(servers)
        order = servers[turned:] + servers[:turned]
        with contextlib.ExitStack() as stack:
            runs = [stack.enter_context(contextlib.closing(bench.measure(server))) for server in order]
            for steps in zip(*runs):
                for server, (command, seconds) in zip(order, steps):
                    times.setdefault((wire, command, server), []).append(seconds)
    shutil.rmtree(folder)
    return times


def print_table(times: Times) -> bool:
    """Print medians and ratios; whether all ratios are bearable."""
    good = True
    print(f'\n| seconds | {" | ".join((OURS, *PEERS))} | ÷ better peer | of the quickest | spread |\n'
          f'{"|---" * 7}|')
    for wire, command in dict.fromkeys((wire, command) for wire, command, _ in times):
        rounds = {server: times[wire, command, server] for server in (OURS, *PEERS)
                  if (wire, command, server) in times}
        middle = {server: statistics.median(some) for server, some in rounds.items()}
        spread = max((max(some) - min(some)) / middle[server] for server, some in rounds.items())
        cells = [f'{middle[server]:.2f}' if server in middle else '–' for server in (OURS, *PEERS)]
        peers = [server for server in PEERS if server in middle]
        ratios = [middle[OURS] / min(middle[server] for server in peers),
                  min(rounds[OURS]) / min(min(rounds[server]) for server in peers)] if peers else []
        good &= not ratios or min(ratios) <= FAILED
        for ratio in ratios:
            cells.append(f'{"**" * (ratio > MARKED)}{ratio:.2f}{"**" * (ratio > MARKED)}')
        print(f'| {wire}: {command} | {" | ".join(cells)} | {"" if peers else "– | – | "}{spread:.0%} |')
    return good


def work_in(folder: Path, options: argparse.Namespace) -> int:
    """Measure everything in a folder; the exit status."""
    begin = time.monotonic()
    good = test_line(4 * MIB if options.quick else 48 * MIB)
    for server in PEERS:
        if not shutil.which(server):
            print(f'left out: {server} is not here')
    wires = list(options.wire or WIRES)
    if 'tls' in wires and not shutil.which('openssl'):
        print('left out: TLS needs openssl')
        wires.remove('tls')
    if options.quick:   # all at once: most of each is waiting, and nothing is compared
        with concurrent.futures.ThreadPoolExecutor(len(wires)) as pool:
            try:
                found = list(pool.map(lambda wire: measure_wire(folder, wire, options), wires))
            except BaseException:
                STOPPED.set()
                raise
    else:
        found = [measure_wire(folder, wire, options) for wire in wires]
    good &= print_table({key: some for times in found for key, some in times.items()})
    print(f'\n{time.monotonic() - begin:.0f} s')
    return int(not good and not options.quick)


def main() -> int:
    if sys.argv[1:2] in (['--pipes'], ['--tcp']):   # be the line; restic appends words of its own
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if sys.argv[1] == '--pipes':
            return relay_pipes(sys.argv[2:])
        relay_tcp(int(sys.argv[2]))
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--quick', action='store_true', help='one round with little data')
    parser.add_argument('--wire', action='append', choices=list(WIRES), help='(all)')
    parser.add_argument('--python', default=sys.executable, help='the Python that serves')
    options = parser.parse_args()
    if not shutil.which('restic'):
        print('skipped: long lines need restic')
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))   # so that all that was started ends
    parent = '/dev/shm' if os.access('/dev/shm', os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix='lines-', dir=parent) as name:
        try:
            return work_in(Path(name), options)
        except (Failed, subprocess.SubprocessError) as error:
            print(error)
            return 1
        except KeyboardInterrupt:
            return 130


if __name__ == '__main__':
    sys.exit(main())
