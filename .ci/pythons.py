#!/usr/bin/env python3
"""Other Pythons than those at hand: PyPy, the newest CPython of Debian (sid), and one of 32 bits (i386).

    pythons.py [pypy] [sid] [i386]      # default: all

Each runs the tests, without the programs that are missing there, and serves a backup of restic, which is
checked and restored.  The two of Debian live in a chroot that debootstrap makes, in namespaces of its own,
so that nothing stays mounted; that takes root.  What cannot be made here is skipped with a line.
"""
from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Dict, Iterator, List

from common import MODULE, Failed, Served, end, free_port, restic

SOURCE = MODULE.parent
BACKUP_BYTES = 40 << 20
WORKERS = 8     # each takes address space, of which 32 bits have little
TEST_SECONDS = 900
STOP_SECONDS = 60
ENVIRONMENT = {'PATH': '/usr/sbin:/usr/bin:/sbin:/bin', 'HOME': '/root', 'PYTHONDONTWRITEBYTECODE': '1'}
# Processes and mounts that end with the program: $1 is the chroot, the rest what runs in it.
NAMESPACES = ('unshare', '--mount', '--pid', '--fork', '--kill-child')
IN_CHROOT = ('mount -t proc proc "$1/proc" && mount --rbind /dev "$1/dev" && mount -t tmpfs tmpfs "$1/tmp" &&'
             ' root=$1 && shift && chroot "$root" "$@"; exit $?')   # the shell remains, as process 1


class Skipped(Exception):
    """This Python cannot be had here; why, in a line."""


class Python:
    """A Python: the words that run it, where the module lies as it sees it, its environment, and a folder
    for repositories as it sees it."""

    def __init__(self, words: List[str], module: str, environment: Dict[str, str], folder: str) -> None:
        self.words = words
        self.module = module
        self.environment = environment
        self.folder = folder

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Start a program in the folder of the module, in a group of its own."""
        return subprocess.Popen([*self.words, *words], text=True, stdin=subprocess.DEVNULL,
                                stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=self.environment,
                                cwd=SOURCE, start_new_session=True)

    def name(self) -> str:
        """Such as `CPython 3.14.0, 64 bits`."""
        code = ('import platform as p; print(p.python_implementation(), p.python_version() + ",",'
                'p.architecture()[0][:2], "bits")')
        return subprocess.run([*self.words, '-c', code], capture_output=True, text=True, check=True,
                              env=self.environment, cwd=SOURCE).stdout.strip()


def find_pypy(folder: Path) -> Python:
    """The system's PyPy.  Raises Skipped."""
    pypy = shutil.which('pypy3')
    if not pypy:
        raise Skipped('there is no pypy3')
    environment = {name: value for name, value in os.environ.items() if not name.startswith('RESTIC_')
                   or name == 'RESTIC_SERVE_TEST_PEERS'}
    return Python([pypy], str(SOURCE / 'restic_serve.py'), {**environment, 'PYTHONDONTWRITEBYTECODE': '1'},
                  str(folder / 'srv'))


def mirror() -> str:
    """The mirror of Debian that the system uses.  Raises Skipped."""
    sources = [Path('/etc/apt/sources.list'), *Path('/etc/apt/sources.list.d').glob('*')]
    text = '\n'.join(source.read_text() for source in sources if source.is_file())
    for url in re.findall(r'^(?:URIs:|deb(?:\s*\[.*?\])?)\s*(\S+/debian)/?(?:\s|$)', text, re.MULTILINE):
        return str(url)
    raise Skipped('no mirror of Debian is known here')


def make_chroot(folder: Path, suite: str, *options: str) -> Python:
    """A minimal Debian with Python and the module.  Raises Skipped."""
    if os.geteuid() != 0:
        raise Skipped('only root can make a chroot')
    if not shutil.which('debootstrap') or not shutil.which('unshare'):
        raise Skipped('there is no debootstrap')
    if subprocess.run([*NAMESPACES, 'true'], capture_output=True).returncode:
        raise Skipped('there are no namespaces to be had')
    root = folder / 'root'
    done = subprocess.run(
        [*NAMESPACES, 'debootstrap', '--variant=minbase', '--include=python3', *options, suite, str(root),
         mirror()], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise Skipped(f'debootstrap failed: {"; ".join(done.stdout.splitlines()[-2:])}')
    shutil.copytree(SOURCE, root / 'app', ignore=shutil.ignore_patterns('.git', '__pycache__'))
    code = 'import os, sys; os.chdir("/app"); os.execvp("python3", ["python3", *sys.argv[1:]])'
    return Python([*NAMESPACES, 'sh', '-c', IN_CHROOT, 'sh', str(root), 'python3', '-c', code],
                  '/app/restic_serve.py', ENVIRONMENT, '/srv/backup')


def make(kind: str, folder: Path) -> Python:
    """The Python of a kind.  Raises Skipped."""
    if kind == 'pypy':
        return find_pypy(folder)
    if kind == 'sid':
        return make_chroot(folder, 'sid')
    release = re.search(r'^VERSION_CODENAME=(\w+)', Path('/etc/os-release').read_text(), re.MULTILINE)
    if not release:
        raise Skipped('this is no release of Debian')
    return make_chroot(folder, release[1], '--arch=i386')


def test(python: Python) -> str:
    """The last lines of the tests, `OK` among them; RuntimeError with all lines if some fail."""
    process = python.start('-W', 'error::ResourceWarning', '-m', 'unittest')
    try:
        said = process.communicate(timeout=TEST_SECONDS)[1]
    except subprocess.TimeoutExpired:
        end(process)
        raise RuntimeError(f'the tests took more than {TEST_SECONDS} s') from None
    found = re.search(r'^Ran \d+ tests? in .*\n\n(OK.*)$', said, re.MULTILINE)
    if process.returncode or not found:
        raise RuntimeError(said[-20_000:])
    return ' '.join(found[0].split())


@contextlib.contextmanager
def serving(python: Python, log: Path) -> Iterator[str]:
    """The URL of a server; RuntimeError unless it ends well."""
    port = free_port()
    with Served([*python.words, python.module, '--addr', f'127.0.0.1:{port}', '--workers', WORKERS,
                 '--prometheus', '--max-size', '100G', '--keep-deleted', '1d', python.folder], port, log=log,
                environment=python.environment) as server:
        yield f'rest:http://127.0.0.1:{port}/'
        status = server.stop()
    said = log.read_text()
    if status or re.search('Traceback|ERROR|WARNING', said):
        raise RuntimeError(f'the server ended with {status}: {said}')


def back_up(python: Python, folder: Path) -> str:
    """Back up, check, forget and restore with restic; RuntimeError if anything fails."""
    if not shutil.which('restic'):
        return 'no restic'
    source, target = folder / 'source', folder / 'target'
    source.mkdir()
    for number in range(4):
        (source / f'file {number}').write_bytes(os.urandom(BACKUP_BYTES // 4))
    with serving(python, folder / 'log') as url:
        for words in (['init'], ['backup', str(source)], ['backup', '--force', str(source)],
                      ['forget', '--keep-last', '1', '--prune'], ['check', '--read-data'],
                      ['restore', 'latest', '--target', str(target)]):
            restic(f'{url}host', words, folder / 'cache')
    for path in source.iterdir():
        if (target / path.relative_to('/')).read_bytes() != path.read_bytes():
            raise RuntimeError(f'{path.name} was not restored')
    return 'restic OK'


def check(kind: str) -> bool:
    """Say in a line how one Python fares; whether nothing failed."""
    with tempfile.TemporaryDirectory(prefix=f'restic-serve-{kind}-') as name:
        folder = Path(name)
        try:
            python = make(kind, folder)
            called = f'{kind}: {python.name()}'
        except Skipped as why:
            print(f'skipped: {kind}: {why}', flush=True)
            return True
        try:
            print(f'== {called}: {back_up(python, folder)}; {test(python)}', flush=True)
        except (Failed, RuntimeError) as error:
            print(f'== {called}: FAILED\n{error}', flush=True)
            return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
    parser.add_argument('kinds', nargs='*', metavar='pypy|sid|i386')
    kinds = parser.parse_args().kinds or ['sid', 'i386', 'pypy']
    if not {*kinds} <= {'pypy', 'sid', 'i386'}:
        parser.error('there are pypy, sid and i386')
    with ThreadPoolExecutor(2) as pool:     # much of it is waiting
        return 0 if all(list(pool.map(check, kinds))) else 1


if __name__ == '__main__':
    sys.exit(main())
