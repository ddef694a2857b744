#!/usr/bin/env python3
"""Measures what a large directory costs: its count, pages, metrics, report, scrub and a long list.

    .ci/large.py [--objects 1000000] [--repositories 5000] [--dir DIR] [--python PYTHON]
    .ci/large.py --quick            # 20,000 objects of 200 repositories, under half a minute

Objects are small, and a quarter of them are in one repository.  Measured are seconds, the processor's
seconds, the peak memory of the largest process, and the memory that all of them share (PSS) afterwards; of
jobs the peak only.  A million objects take some 6 GiB and 2 million inodes of the disk in DIR, and all but
the making of them is measured with what the system has cached.

The exit status is 1 if an answer is wrong: if numbers of repositories, objects or bytes are not those that
were made, or if something is found damaged.  Needs Linux.
"""
from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

from common import LIST_V2, MODULE, Served, free_port, make_repository, of_process, store

PART_OF_FIRST = 4           # The first repository has 1/4 of the objects.
PER_FOLDER = 100            # Repositories of a top-level folder.
OBJECTS_AT_LEAST = 5        # Of a repository: config, a key, an index, a snapshot, data.
CONFIG = b'config'
PATIENCE = 1800             # Seconds for the first count.
Made = Tuple[int, int]      # Objects in data/, bytes of all objects.


def name_of(number: int) -> str:
    """The path of a repository."""
    return f'folder-{number // PER_FOLDER:02}/host-{number:04}'


def fill(work: Tuple[str, int, int]) -> Made:
    """Make a repository of so many objects, its config included."""
    path, number, count = work
    counts = {'keys': 1, 'index': 1 + count // 100, 'snapshots': 1 + count // 50}
    counts['data'] = count - 1 - sum(counts.values())
    size = len(CONFIG)
    make_repository(path, CONFIG)
    for kind, objects in counts.items():
        for at in range(objects):
            content = b'%s %d of %d' % (kind.encode(), at, number)
            size += len(content)
            store(path, kind, content)
    return counts['data'], size


def plan(root: Path, objects: int, repositories: int) -> List[Tuple[str, int, int]]:
    """What fill() is to make."""
    first = objects // PART_OF_FIRST
    each, more = divmod(objects - first, repositories - 1)
    counts = [first, *(each + (number <= more) for number in range(1, repositories))]
    return [(str(root / name_of(number)), number, count) for number, count in enumerate(counts)]


def ends_by_signals() -> None:
    """In a process of the pool: it is for the first process to clean up."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def remove(path: str) -> None:
    shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def directory(parent: Optional[str], objects: int, repositories: int) -> Iterator[Tuple[Path, List[Made]]]:
    """Make the directory, with a process for each core, and remove it at the end."""
    with tempfile.TemporaryDirectory(prefix='large-', dir=parent) as name:
        root, begin = Path(name) / 'srv', time.monotonic()
        work = plan(root, objects, repositories)
        with multiprocessing.Pool(initializer=ends_by_signals) as pool:
            try:
                made = pool.map(fill, work, 1 + repositories // 100)
                print(f'made {objects:,} objects of {repositories:,} repositories in '
                      f'{time.monotonic() - begin:.0f} s', flush=True)
                yield root, made
            finally:
                pool.map(remove, [path for path, _, _ in work], 1 + repositories // 100)


class Large(Served):
    """A server of the large directory, with its workers."""

    def __init__(self, python: str, root: Path) -> None:
        port, self.log = free_port(), root.parent / 'log'
        super().__init__([python, MODULE, '--addr', f'127.0.0.1:{port}', '--prometheus', root], port,
                         log=self.log)

    def peak(self) -> float:
        """MiB that the largest of its processes has taken since begin()."""
        return max(of_process(pid, 'VmHWM') for pid in self.processes())

    def begin(self) -> None:
        """Begin a new peak."""
        for pid in self.processes():
            Path(f'/proc/{pid}/clear_refs').write_text('5')


class Table:
    """Prints a line for each measurement, and remembers what was wrong."""

    def __init__(self) -> None:
        self.faults: List[str] = []
        print(f'\n| | seconds | processor s | peak MiB | PSS MiB |\n|{"---|" * 5}', flush=True)

    def line(self, what: str, seconds: float, processor: float, peak: float, shared: Optional[float]) -> None:
        memory = '' if shared is None else f'{shared:.0f}'
        print(f'| {what} | {seconds:.2f} | {processor:.2f} | {peak:.0f} | {memory} |', flush=True)

    def served(self, served: Large, what: str, ask: Callable[[], Any], begun: float = 0.0) -> Any:
        """Measure something that the server does; its answer.  It may have `begun` before."""
        served.begin()
        processor, begin = served.processor() if not begun else 0.0, begun or time.monotonic()
        answer = ask()
        self.line(what, time.monotonic() - begin, served.processor() - processor,
                  served.peak(), served.memory())
        return answer

    def job(self, what: str, words: List[str]) -> Tuple[str, str]:
        """Measure a process of its own; its output and its errors."""
        begin = time.monotonic()
        with tempfile.TemporaryFile('w+') as out, tempfile.TemporaryFile('w+') as errors:
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=errors,
                                       env={**os.environ, 'PYTHONDONTWRITEBYTECODE': '1'})
            _, status, taken = os.wait4(process.pid, 0)
            process.returncode = status
            self.line(what, time.monotonic() - begin, taken.ru_utime + taken.ru_stime, taken.ru_maxrss / 1024,
                      None)
            self.same(f'status of {what}', status, 0)
            for file in (out, errors):
                file.seek(0)
            return out.read(), errors.read()

    def same(self, what: str, is_so: object, wanted: object) -> None:
        if is_so != wanted:
            self.faults.append(f'{what}: {is_so}, not {wanted}')


def check_metrics(table: Table, text: str, objects: int, made: List[Made]) -> None:
    sums: Dict[str, int] = collections.Counter()
    for name, value in re.findall(r'^restic_serve_repository_(bytes|objects)\{.*\} (\d+)$', text,
                                  re.MULTILINE):
        sums[name] += int(value)
    table.same('objects in the metrics', sums['objects'], objects)
    table.same('bytes in the metrics', sums['bytes'], sum(size for _, size in made))


def check_report(table: Table, text: str, objects: int, made: List[Made]) -> None:
    found = [json.loads(line) for line in text.splitlines()]
    table.same('repositories in the report', len(found), len(made))
    table.same('objects in the report', sum(sum(one['objects'].values()) for one in found), objects)
    table.same('bytes in the report', sum(one['bytes'] for one in found), sum(size for _, size in made))


def measure(python: str, root: Path, objects: int, made: List[Made]) -> List[str]:
    """Measure everything; what was wrong."""
    table, begin = Table(), time.monotonic()
    with Large(python, root) as served:
        table.served(served, 'from the start to the first count', lambda: served.wait_for_count(PATIENCE),
                     begin)
        time.sleep(1.1)     # else it uses what it has just computed
        for what in ('the page', 'the page again'):
            page = table.served(served, what, served.page)
        table.same('repositories in the page', re.findall(r'<p>([\d,]+) repositories', page),
                   [f'{len(made):,}'])
        for number in (0, 1):
            page = table.served(served, f'the page of a repository of {made[number][0]:,} packs',
                                functools.partial(served.page, f'/{name_of(number)}/'))
            table.same('packs in its page', re.findall(r'([\d,]+) packs', page), [f'{made[number][0]:,}'])
        time.sleep(1.1)
        metrics = table.served(served, 'the metrics', lambda: served.get('/metrics'))
        check_metrics(table, metrics.decode(), objects, made)
        found = json.loads(table.served(served, f'a list of {made[0][0]:,} names and sizes',
                                        lambda: served.get(f'/{name_of(0)}/data/', Accept=LIST_V2)))
        table.same('names in the list', len({one['name'] for one in found}), made[0][0])
        text, _ = table.job('--report', [python, str(MODULE), '--report', '--log-format', 'json', str(root)])
        check_report(table, text, objects, made)
        _, text = table.job('--scrub', [python, str(MODULE), '--scrub', str(root)])
        table.same('what the scrub says', re.findall(r'(\d+) objects read, (\d+) damaged', text)[-1:],
                   [(str(objects - len(made)), '0')])     # a config is not named by its content
        table.served(served, 'the page after the scrub', served.page)
        table.served(served, 'idle', lambda: time.sleep(3))
        for line in served.log.read_text().splitlines():
            if ' ERROR: ' in line or ' WARNING: ' in line:
                table.faults.append(line)
    return table.faults


def main(words: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
    parser.add_argument('--objects', type=int, default=1_000_000, help='in all (default 1000000)')
    parser.add_argument('--repositories', type=int, default=5000, help='how many (default 5000)')
    parser.add_argument('--dir', help='where to make the directory (default: the one for temporary files)')
    parser.add_argument('--quick', action='store_true', help='20,000 objects of 200 repositories')
    parser.add_argument('--python', default=sys.executable, help="the server's Python")
    options = parser.parse_args(words)
    if options.quick:
        options.objects, options.repositories = 20_000, 200
    if options.repositories < 2 or options.objects < 2 * OBJECTS_AT_LEAST * options.repositories:
        parser.error(f'each repository needs {2 * OBJECTS_AT_LEAST} objects, and there must be two')
    if not sys.platform.startswith('linux'):
        print('skipped: needs Linux')
        return 0
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(1))    # and clean up
    with directory(options.dir, options.objects, options.repositories) as (root, made):
        faults = measure(options.python, root, options.objects, made)
    for fault in faults:
        print(f'WRONG: {fault}')
    return int(bool(faults))


if __name__ == '__main__':
    sys.exit(main())
