#!/usr/bin/env python3
"""Random histories against what PROMISES.md says of uploads, lists and the past.

    .ci/model.py --seed 1 --seconds 120     # a seed repeats the choices, though not how processes meet
    .ci/model.py --mutants                  # is it noticed when restic_serve lacks one of its precautions?

How it works.  Two servers with two workers each, of which one or the other is killed now and then, sessions
of --stdio and sometimes a server without --keep-deleted work on one directory: uploads, also twice at once or
with the end held back, deletes, damage on the disk and its mending, and roll-backs, which are killed and run
again, or two at once.  --keep-deleted is some seconds, and each half second is a purge.  All pause at random
before they call the file system.  Clocks of servers are wrong, sometimes with that of the file system while
one purges, and some servers may not set times.  Two threads list the present and the past all the time.

How it judges, when a history is over.  Until an event began an object was as before, and after its answer it
is as the event left it; between, and within a tick of a clock, it may be either.  A list agrees with that and
with earlier lists of that moment, or it fails: where a delete was not kept, where the moment is older than
--keep-deleted or, with 500 or without an end, where something changed meanwhile.
"""
from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import http.client
import importlib
import itertools
import json
import math
import os
import py_compile
import random
import re
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Callable, Counter, DefaultDict, Dict, FrozenSet, Iterator, List, NamedTuple, Tuple

from common import LIST_V2, MODULE, Failed, Served, free_port, server_words

SERVE, SHIM = '--serve', 'MODEL_SHIM'   # what this program runs of itself, and how that differs
KEEP, MORE = 8, 2               # seconds of --keep-deleted, and by which some servers keep for longer,
HISTORY, PATIENCE = 20, 120     # of a history, and until an answer
TICK = 0.03         # seconds within which the kernel's clock for files is,
LATE = 1.0          # and one that a busy process compares with it
SLACK = 2.5         # by which a purge may be early: trusted time is in whole seconds
WEEKS = 11 * 7 * 86400
AHEAD = 0, 0, 0, -5, 3, WEEKS           # seconds by which a server's clock is wrong
NOBODY = 65534

MUTANTS = {     # what goes, and what stands there instead
    '1, what comes back during a list': ('if missed <= {name for name, *_ in found}:', 'if True:'),
    '1, what is purged during a list': ('self.folders(location)))\n        self._past.check_known(',
                                        'self.folders(location)))\n        (lambda *_, **__: 0)('),
    '2, one clock': ('(self._clock() + ahead + tick', '(self._clock() + tick'),
    '3, trusted time': ('trusted = min(now, expected + CATCH_UP * served)', 'trusted = now'),
    '4, the time of the end': ('    scratch.date()\n                sync', '    pass\n                sync'),
    '4, the time of the first': ('scratch.date((status.st_atime_ns, status.st_mtime_ns))', 'pass'),
    '5, no mend without its time': ("is_there(f'{location.repository}/{DELETED}'):\n                raise",
                                    "is_there('/none'):\n                raise"),
    '6, scratch files': ('elif not name and entry.name.startswith((', 'elif False and (('),
    '7, deletes of nothing': ('if self._store.size(location) is not None:\n                self._set',
                              'if True:\n                self._set'),
    '7, deletes that are not kept': ('(since < moment) == later', 'not later'),
    '9, two roll-backs': ('lock_file(self._deleted.fd) is False', 'False'),
    '9, owners of marks': ('        give_away(fd, owner_of(folder))\n', ''),
}


class Fault(Exception):
    """A promise that was not kept."""


def serve() -> int:
    """Be restic_serve, on a host that is as SHIM says."""
    shim, now, utime, calls = json.loads(os.environ[SHIM]), time.time, os.utime, itertools.count(1)
    ahead, kill, chance = shim.get('ahead', 0), shim.get('kill', 0), random.Random()
    time.time = lambda: now() + ahead
    sys.path.insert(0, shim['folder'])
    module = importlib.import_module('restic_serve')
    module.__dict__.update(PURGE_SECONDS=0.5, CATCH_UP=0.02)

    def date(file: Any, *times: Any, **more: Any) -> None:
        if shim.get('no times') and more:
            raise PermissionError(1, 'not the owner')
        utime(file, *([(now() + ahead,) * 2] if shim.get('files') and not more else times), **more)

    def wrapped(call: Callable[..., Any], is_sync: bool) -> Callable[..., Any]:
        def paused(*words: Any, **more: Any) -> Any:
            # Below zero, it is a number of syncs of files, of which a job has only those of copies.
            is_counted = kill > 0 or is_sync and stat.S_ISREG(os.fstat(*words).st_mode)
            if is_counted and next(calls) == abs(kill):
                os.kill(os.getpid(), signal.SIGKILL)
            if chance.random() < shim.get('pause', 0.05):
                time.sleep(chance.random() * 0.03)
            return call(*words, **more)
        return paused

    for name in ('open', 'rename', 'scandir', 'stat', 'unlink', 'link', 'mkdir', 'fsync'):
        setattr(os, name, wrapped(getattr(os, name), name == 'fsync'))
    os.utime = date     # type: ignore[assignment]
    return int(module.main())


class Event(NamedTuple):
    """What has become of an object between two times, and by how much later it may be dated."""
    begin: float
    end: float
    is_there: bool
    late: float
    what: str


class Reading(NamedTuple):
    moment: float       # 0 is the present
    kind: str
    begin: float
    end: float
    status: int
    names: FrozenSet[str]
    said: bytes         # instead of a list


def text(moment: float) -> str:
    seconds, micros = divmod(int(moment * 1e6), 10 ** 6)
    return f'{time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))}.{micros:06}Z'


class History:
    """A directory, its servers, and all that is asked of them."""

    def __init__(self, module: Path, top: Path, seed: str, counts: Counter[str]) -> None:
        self.chance, self.module, self.top, self.counts = random.Random(seed), module, top, counts
        self.root, self.begin = top / 'srv', 0.0
        self.contents: Dict[str, bytes] = {}
        for number in range(2000):
            content = b'%d %s ' % (number, seed.encode()) * (1 + number % 2 * 5000)
            digest = hashlib.sha256(content).hexdigest()
            if len(self.contents) < 14 and digest < '05':   # in few folders
                self.contents[f'{"data" if len(self.contents) % 4 else "snapshots"}/{digest}'] = content
        _, self.held_back, *self.names = self.contents
        self.rotting = self.names[:4]
        self.events: DefaultDict[str, List[Event]] = collections.defaultdict(list)
        self.readings: List[Reading] = []
        self.moments: List[float] = []
        self.ends: List[Tuple[float, float]] = []       # when the history may have ended
        self.servers: List[Served] = []
        self.faults: List[str] = []
        self.stopping, self.lock = threading.Event(), threading.Lock()

    # ---- servers and requests ----

    def environment(self, **shim: object) -> Dict[str, str]:
        return {**os.environ, SHIM: json.dumps({'folder': str(self.module), **shim})}

    def server(self, keep: int = KEEP, **shim: object) -> Served:
        port, options = free_port(), [SERVE, '--no-auth', '--workers', '2', '--keep-deleted', f'{keep}s']
        words = server_words('', f'127.0.0.1:{port}', self.root, program=__file__, options=options)
        return Served(words, port, log=self.top / f'{port}.log', environment=self.environment(**shim))

    def ask(self, server: Served, method: str, path: str, content: Any = b'') -> Tuple[int, bytes]:
        """Status and content of an answer, 0 if there is none."""
        connection = http.client.HTTPConnection('127.0.0.1', server.port, timeout=PATIENCE)
        with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
            connection.request(method, f'/r/{path}', content, {'Accept': LIST_V2})
            answer = connection.getresponse()
            try:
                return answer.status, answer.read()
            except http.client.IncompleteRead:
                return 500, b''
        return 0, b''

    def change_by_stdio(self, name: str, is_there: bool) -> None:
        tests, begin = importlib.import_module('test_restic_serve'), time.time()
        with tests.Stdio('--keep-deleted', f'{KEEP}s', self.root, program=[__file__, SERVE],
                         **self.environment(ahead=self.chance.choice(AHEAD))) as session:
            if is_there:
                session.wire.upload(1, f'/r/{name}', self.contents[name])
            answer = session.wire.answer(1) if is_there else session.wire.ask(1, 'DELETE', f'/r/{name}')
            self.note(name, begin, answer[0], is_there, 'by --stdio')
            if answer[0] != 200 or session.finish(close=True)[0]:
                raise Fault(f'{name} by --stdio: {answer}')

    def read(self, moment: float, kind: str) -> Reading:
        begin, path = time.time(), f'.at/{text(moment)}/{kind}/' if moment else f'{kind}/'
        status, content = self.ask(self.chance.choice(self.servers), 'GET', path)
        with contextlib.suppress(ValueError):
            entries = json.loads(content) if status == 200 else []
            reading = Reading(moment, kind, begin, time.time(), status,
                              frozenset(f'{kind}/{entry["name"]}' for entry in entries), content[:200])
            if status:      # else the server was killed
                self.readings.append(reading)
            return reading
        raise Fault(f'{path} is {content[:100]!r}')

    def present(self) -> FrozenSet[str]:
        """All objects, by lists that have not failed."""
        readings, until = [self.read(0, kind) for kind in ('data', 'snapshots')], time.monotonic() + PATIENCE
        while {reading.status for reading in readings} != {200} and time.monotonic() < until:
            readings = [self.read(0, reading.kind) for reading in readings]
        return readings[0].names | readings[1].names

    def change(self, name: str, is_there: bool, *servers: Served, kill: bool = False,
               may: Tuple[int, ...] = (200,)) -> int:
        """Upload or delete by some servers at once, of which the first is killed; the largest status."""
        words = ('POST', name, self.contents[name]) if is_there else ('DELETE', name)
        begin, statuses = time.time(), []
        threads = [threading.Thread(target=lambda server: statuses.append(self.ask(server, *words)[0]),
                                    args=[server]) for server in servers]
        for thread in threads:
            thread.start()
        if kill:
            threads[0].join(self.chance.uniform(0, 0.1))
            number, killed = self.servers.index(servers[0]), servers[0].process
            os.killpg(killed.pid, signal.SIGKILL)
            killed.wait()
            self.servers[number] = self.server(KEEP + number * MORE, ahead=self.chance.choice(AHEAD))
            self.counts['kills'] += 1
        for thread in threads:
            thread.join()
        self.note(name, begin, min(statuses), is_there, f'{words[0]} {statuses}')
        if {*statuses} - {0, *may}:
            raise Fault(f'{words[0]} {name}: {statuses}')
        return max(statuses)

    def note(self, name: str, begin: float, status: int, is_there: bool, what: str) -> None:
        """An event; what was not answered has happened or not, as the present shows."""
        self.counts['operations'] += 1
        late = 0 if is_there else LATE
        if status == 200:
            self.events[name].append(Event(begin, time.time(), is_there, late, what))
        elif not status:
            self.events[name].append(Event(begin, math.inf, is_there, late, what))
            self.events[name].append(Event(begin, time.time(), name in self.present(), LATE, 'seen'))

    # ---- what is done ----

    def look(self, chance: random.Random) -> None:
        end, begin = time.time() - TICK, max(self.begin, time.time() - KEEP - MORE)
        self.moments.append(begin + (end - begin) * chance.random() ** 2)   # more often what is soon purged
        self.read(chance.choice([0, *self.moments[-9:]]), chance.choice(['data', 'snapshots']))

    def hold_back(self, chance: random.Random) -> None:
        """Hold back the end of an upload of one object, which is deleted then."""
        ended: List[float] = []

        def content() -> Iterator[bytes]:
            yield self.contents[self.held_back]
            self.stopping.wait(chance.uniform(0, 2))
            self.lock.acquire()
            ended.append(time.time())

        status = self.ask(chance.choice(self.servers), 'POST', self.held_back, content())[0]
        if ended:
            try:
                self.note(self.held_back, ended[0], status, True, 'POST, held back')
                self.change(self.held_back, False, self.servers[0])
            finally:
                self.lock.release()

    def damage(self, name: str) -> None:
        """Damage an object on the disk, if it is there, which keeps its time."""
        file = self.root / 'r' / re.sub('data/(..)', r'data/\1/\1', name)
        with contextlib.suppress(FileNotFoundError), file.open('r+b', buffering=0) as opened:
            times = os.fstat(opened.fileno())
            opened.write(b'damaged')
            os.utime(opened.fileno(), ns=(times.st_atime_ns, times.st_mtime_ns))
            self.counts['faults'] += 1

    def mend(self, name: str) -> None:
        """Mend a damaged object, also where times of files cannot be set."""
        self.damage(name)
        if self.chance.random() < 0.3:
            with self.server(**{'no times': True}) as server:
                self.change(name, True, server, may=(200, 403, 500))
        else:
            self.change(name, True, self.chance.choice(self.servers))
            if self.ask(self.servers[0], 'GET', name)[1] != self.contents[name]:
                raise Fault(f'{name} was mended, but is damaged')

    def unkept(self, name: str) -> None:
        """Deletes by a server without --keep-deleted, mostly of what is not there."""
        with self.server(0) as server:
            for missing in {*self.names} - self.present():
                self.change(missing, False, server)
            if self.chance.random() < 0.3:
                self.ends.append((time.time(), math.inf))
                self.change(name, False, server)
                self.ends[-1] = self.ends[-1][0], time.time()

    def be_wrong(self) -> None:
        """Purge while all clocks are wrong."""
        self.counts['faults'] += 1
        with self.server(ahead=WEEKS, files=True):
            time.sleep(1.2)

    def roll_back(self) -> None:
        since = max([self.begin, *(end + LATE for _, end in self.ends)])
        moment = self.chance.uniform(max(since, time.time() - KEEP), time.time() - 2 * LATE)
        wanted = [self.read(moment, kind) for kind in ('data', 'snapshots') if moment > since]
        if [reading.status for reading in wanted] != [200, 200]:
            return
        if self.chance.random() < 0.5:  # there is more to bring back
            for name in [*self.rotting, *self.chance.sample(self.names[4:], 4)]:
                self.change(name, False, self.servers[0])
                if name in self.rotting:
                    self.change(name, True, self.servers[0])
                    self.damage(name)
        with self.lock:
            names, begin = wanted[0].names | wanted[1].names, time.time()
            for name in self.contents:
                self.events[name].append(Event(begin, math.inf, name in names, LATE, f'to {text(moment)}'))
            while self.chance.random() < 0.4:
                self.run_jobs(moment, self.chance.choice((self.chance.randrange(40, 400),
                                                          -self.chance.randrange(1, 4))))
            most = sum(self.ask(self.servers[0], 'GET', name)[1] != self.contents[name] for name in names)
            if self.run_jobs(moment, 0, 0) > most:
                raise Fault(f'two roll-backs to {moment} have restored the same')
            is_done, present = self.run_jobs(moment, 0) >= 0, self.present()
            for name in self.contents:
                self.events[name].append(Event(begin, time.time(), name in present, LATE, 'rolled back'))
            if is_done and present != names:
                raise Fault(f'after a roll-back to {moment} are there {sorted(present - names)}, '
                            f'and missing {sorted(names - present)}')

    def run_jobs(self, moment: float, *kills: int) -> int:
        """Roll back by several jobs at once, killed or not; how much was restored, -1 if no job has ended."""
        words = [sys.executable, __file__, SERVE, '--force', '--roll-back', text(moment), f'{self.root}/r']
        jobs = [subprocess.Popen(words, env=self.environment(kill=kill), stdout=subprocess.PIPE,
                                 stderr=subprocess.STDOUT, universal_newlines=True) for kill in kills]
        said = [job.communicate()[0] for job in jobs]
        self.counts['roll-backs'] += len(jobs)
        for job, line in zip(jobs, said):
            self.counts['kills'] += job.returncode < 0
            if job.returncode > 0 and not re.search('another roll-back|no history', line):
                raise Fault(f'a roll-back to {moment} ends with {job.returncode}: {line}')
        restored = re.findall(r'(\d+) (?:pack|snapshot)', ''.join(re.findall('.*restored', ''.join(said))))
        return sum(map(int, restored)) if any(job.returncode == 0 for job in jobs) else -1

    def step(self) -> None:
        chance, name = self.chance, self.chance.choice(self.names)
        is_there, action, server = chance.random() < 0.55, chance.randrange(60), chance.choice(self.servers)
        if action < 45:
            self.change(name, is_there, *[[server], [server], [server], self.servers][action % 4])
        elif action < 47:
            self.change_by_stdio(name, is_there)
        elif action < 50:
            self.change(name, is_there, server, kill=True)
        elif action < 53:
            self.mend(chance.choice(self.rotting))
        elif action < 58:
            self.roll_back()
        else:
            self.be_wrong() if action == 58 else self.unkept(name)

    def run(self, seconds: float) -> None:
        """Raises Fault."""
        self.root.mkdir()
        threads: List[threading.Thread] = []
        try:
            self.servers = [self.server(), self.server(KEEP + MORE)]
            for path in ('?create=true', 'config'):
                self.ask(self.servers[0], 'POST', path, b'config')
            time.sleep(LATE)    # until its history has begun
            self.begin = time.time()
            time.sleep(TICK)
            for task in (self.look, self.look, self.hold_back):
                chance = random.Random(self.chance.random())
                threads.append(threading.Thread(target=self.repeat, args=[task, chance]))
                threads[-1].start()
            until = time.monotonic() + seconds
            while time.monotonic() < until and not self.faults:
                self.step()
        finally:
            self.stopping.set()
            for thread in threads:
                thread.join()
            for server in self.servers:
                server.stop()
        self.judge()
        if self.faults:
            raise Fault(self.faults[0])
        self.look_at_disk()

    def repeat(self, task: Callable[[random.Random], None], chance: random.Random) -> None:
        try:
            while not self.stopping.is_set():
                task(chance)
        except Exception as error:
            self.faults.append(f'{type(error).__name__}: {error}')

    # ---- what is right ----

    def judge(self) -> None:
        """Compare all lists with the events.  Raises Fault."""
        earlier: Dict[Tuple[float, str], bool] = {}     # moments and objects of which all is known
        for reading in self.readings:
            moment, is_past = reading.moment, bool(reading.moment)
            begin, end = (moment - TICK, moment + TICK) if is_past else (reading.begin, reading.end)
            if reading.status != 200:
                is_over = is_past and (moment < reading.end - KEEP + SLACK or any(
                    begin < over + LATE and since < reading.end for since, over in self.ends))
                if not is_over and not (reading.status >= 500 and any(
                        event.begin < reading.end and event.end > reading.begin
                        for events in self.events.values() for event in events)):
                    raise Fault(f'{reading.kind} at {moment}, {reading.end - moment} s later: '
                                f'{reading.status} {reading.said!r}')
                continue
            for name in self.contents:
                if not name.startswith(reading.kind):
                    continue
                may, is_there, is_known = {False}, name in reading.names, is_past
                for event in self.events[name]:
                    if event.end + event.late * is_past < begin:
                        may = {event.is_there}
                    elif event.begin < end:
                        may.add(event.is_there)
                        is_known = is_known and event.end + event.late < reading.begin
                if is_known:
                    may &= {earlier.setdefault((moment, name), is_there)}
                if is_there not in may:
                    raise Fault(self.tell(reading, name, is_there))

    def tell(self, reading: Reading, name: str, is_there: bool) -> str:
        events = ''.join(f'\n  {event.begin - self.begin:.3f} to {event.end - self.begin:.3f}: {event.what}, '
                         f'then {event.is_there}' for event in self.events[name])
        at = f'{reading.moment - self.begin:.3f}' if reading.moment else 'present'
        return (f'{name}, at {at} by a list from {reading.begin - self.begin:.3f} to '
                f'{reading.end - self.begin:.3f}, is {"" if is_there else "not "}there; that does not follow '
                f'from these events or earlier lists, in seconds since {text(self.begin)}:{events}')

    def look_at_disk(self) -> None:
        """After a start and a purge nothing is left half-written; a job of root leaves nothing of his."""
        until = time.monotonic() + PATIENCE
        with self.server(pause=0) as server:
            self.servers = [server]
            for name in sorted(self.present() - {*self.rotting}):
                if self.ask(server, 'GET', name)[1] != self.contents[name]:
                    raise Fault(f'{name} has another content')
            while [*self.root.rglob('upload-*')]:
                if time.monotonic() > until:
                    raise Fault(f'left for ever: {[*map(str, self.root.rglob("upload-*"))]}')
                time.sleep(0.1)
        if os.geteuid() == 0:
            for path in [self.root, *self.root.rglob('*')]:
                os.chown(path, NOBODY, NOBODY)
            self.run_jobs(time.time() - 3, 0)
            for path in self.root.rglob('*'):
                if path.stat().st_uid != NOBODY:
                    raise Fault(f"after root's roll-back {path} belongs to root")
        for log in self.top.glob('*.log'):
            self.counts['purges'] += len(re.findall(': purged ', log.read_text()))


def histories(module: Path, seed: int, seconds: float, counts: Counter[str]) -> str:
    """What was found wrong in so many seconds; empty if nothing was."""
    until, number, memory = time.monotonic() + seconds, 0, '/dev/shm' if os.path.isdir('/dev/shm') else None
    while time.monotonic() < until:
        number += 1
        with tempfile.TemporaryDirectory(prefix='model-', dir=memory) as name:
            try:
                History(module, Path(name), f'{seed}.{number}', counts).run(
                    min(HISTORY, max(until - time.monotonic(), 1)))
            except (Fault, Failed) as fault:
                return f'seed {seed}, history {number}: {fault}'
    return ''


def main() -> int:
    if sys.argv[1:2] == [SERVE]:
        del sys.argv[1]
        return serve()
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0] if __doc__ else '')
    parser.add_argument('--seed', type=int, default=1)
    parser.add_argument('--seconds', type=float, default=120)
    parser.add_argument('--mutants', action='store_true', help='each for --seconds at most')
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))   # and clean up
    is_kept, source = True, MODULE.read_text()
    for what, (old, new) in MUTANTS.items() if options.mutants else [('', ('', ''))]:
        counts: Counter[str] = collections.Counter()
        with tempfile.TemporaryDirectory() as name:
            Path(name, 'restic_serve.py').write_text(source.replace(old, new) if old else source)
            py_compile.compile(f'{name}/restic_serve.py')
            fault = histories(Path(name), options.seed, options.seconds, counts) if old in source else ''
        is_kept = is_kept and bool(fault) == bool(what)
        if what:
            print(f'{"noticed" if fault else "NOT NOTICED"}: without {what}: {fault}', flush=True)
        else:
            print(fault or 'sound: ' + ', '.join(f'{count} {what}' for what, count in counts.items()))
    return int(not is_kept)


if __name__ == '__main__':
    sys.exit(main())
