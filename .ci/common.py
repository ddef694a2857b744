"""What several programs here do: start a server and look at its processes, fill a repository, run restic."""
from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Iterable, List, Mapping, Optional, Tuple, TypeVar, Union

MODULE = Path(__file__).resolve().parent.parent / 'restic_serve.py'
sys.path.insert(0, str(MODULE.parent))      # for those that import it
OURS = 'restic_serve'
MIB = 1 << 20
KINDS = ('data', 'index', 'keys', 'locks', 'snapshots')
LIST_V2 = 'application/vnd.x.restic.rest.v2'
START_SECONDS = STOP_SECONDS = 30
AnyPath = Union[str, 'os.PathLike[str]']
Self = TypeVar('Self', bound='Served')


class Failed(Exception):
    """A program failed; what it was, and what it said."""


def free_port(host: str = '127.0.0.1') -> int:
    with socket.socket() as sock:
        sock.bind((host, 0))
        return int(sock.getsockname()[1])


class Served:
    """A server in a process group of its own, which ends with the context."""

    def __init__(self, words: Iterable[object], port: int, host: str = '127.0.0.1', *,
                 log: AnyPath = os.devnull, tls: bool = False,
                 environment: Optional[Mapping[str, str]] = None) -> None:
        """Start it, and wait until it answers; `start_seconds` is how long that takes.  What it says is
        written to `log`.  Raises Failed."""
        self.host, self.port = host, port
        begin, alone = time.perf_counter(), {'PYTHONDONTWRITEBYTECODE': '1', 'RCLONE_CONFIG': os.devnull}
        with open(log, 'wb') as output:
            self.process = subprocess.Popen(
                [*map(str, words)], stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True, env=environment or {**os.environ, **alone})
        while not self._answers(tls):
            if self.process.poll() is not None or time.perf_counter() - begin > START_SECONDS:
                self.stop()
                raise Failed(f'{shlex.join(map(str, words))}: {Path(log).read_text(errors="replace")}')
            time.sleep(0.001)
        self.start_seconds = time.perf_counter() - begin

    def _answers(self, tls: bool) -> bool:
        with contextlib.suppress(OSError), socket.create_connection((self.host, self.port), 10) as sock:
            if tls:
                return True
            sock.sendall(b'GET /none/config HTTP/1.1\r\nHost: x\r\nConnection: close\r\n'
                         b'Content-Length: 0\r\n\r\n')
            return sock.recv(4096) != b''
        return False

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> int:
        """End it and what it has started; its exit status."""
        return end(self.process)

    def get(self, path: str, **headers: str) -> bytes:
        """The content of a good answer.  Raises Failed."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=600)
        with contextlib.closing(connection):
            connection.request('GET', path, headers=headers)
            answer = connection.getresponse()
            content = answer.read()
        if answer.status != 200:
            raise Failed(f'GET {path}: {answer.status} {content[:200]!r}')
        return content

    def page(self, path: str = '/') -> str:
        return self.get(path, Accept='text/html').decode()

    def wait_for_count(self, seconds: float) -> None:
        """Wait until its page shows what is stored.  Raises Failed."""
        end = time.monotonic() + seconds
        while 'Calculating sizes' in self.page():
            if time.monotonic() > end:
                raise Failed('the first count does not end')
            time.sleep(0.05)

    def list(self, repository: str, count: int) -> Tuple[float, float]:
        """Seconds until the first byte of a list of so many objects, and until the last.  Raises Failed."""
        begin, data = time.perf_counter(), b''
        with socket.create_connection((self.host, self.port)) as sock:
            sock.sendall(f'GET /{repository}/data/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n'
                         f'Accept: {LIST_V2}\r\n\r\n'.encode())
            while not data.partition(b'\r\n\r\n')[2]:
                some = sock.recv(65536)
                if not some:
                    raise Failed(f'no list: {data[:200]!r}')
                data += some
            first = time.perf_counter() - begin
            parts = [data, *iter(lambda: sock.recv(1 << 20), b'')]
        whole = time.perf_counter() - begin
        found = b''.join(parts).count(b'"size"')
        if found < count * 0.999:   # a chunk's border may cut a few
            raise Failed(f'{found} of {count} listed')
        return first, whole

    def children(self) -> List[int]:
        """Its workers' processes, in the order in which they began."""
        return children(self.process.pid)

    def processes(self) -> List[int]:
        return [self.process.pid, *self.children()]

    def memory(self) -> float:
        """MiB, of what several processes share the part of each (PSS)."""
        return sum(of_process(pid, 'Pss', 'smaps_rollup') for pid in self.processes())

    def processor(self) -> float:
        """Seconds of the processor that it has taken, and its children that have ended."""
        ticks = 0
        for pid in self.processes():
            fields = Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
            ticks += sum(map(int, fields[11:15] if pid == self.process.pid else fields[11:13]))
        return ticks / os.sysconf('SC_CLK_TCK')


def end(process: subprocess.Popen[Any]) -> int:
    """End a process and the others of its group; its exit status."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        return process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.wait()


def server_words(server: str, address: str, root: AnyPath, python: str = sys.executable, *,
                 program: AnyPath = MODULE, options: Iterable[str] = (), tls: AnyPath = '',
                 htpasswd: AnyPath = '') -> List[str]:
    """How a server is told to serve a directory; `program` and `options` are ours, `tls` is a folder with
    cert.pem and key.pem."""
    if server == 'rest-server':
        words = [server, '--listen', address, '--path', str(root)]
        words += ['--tls', '--tls-cert', f'{tls}/cert.pem', '--tls-key', f'{tls}/key.pem'] if tls else []
        return [*words, *(['--htpasswd-file', str(htpasswd)] if htpasswd else ['--no-auth'])]
    words = [server, 'serve', 'restic'] if server == 'rclone' else [python, str(program), *options]
    words += ['--addr', address]
    words += ['--cert', f'{tls}/cert.pem', '--key', f'{tls}/key.pem'] if tls else []
    return [*words, *(['--htpasswd', str(htpasswd)] if htpasswd else []), str(root)]


def children(pid: int) -> List[int]:
    """The processes that a process has started, and those that they have started."""
    found: List[int] = []
    for task in Path(f'/proc/{pid}/task').iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):    # a thread that has ended
            for child in (task / 'children').read_text().split():
                found += [int(child), *children(int(child))]
    return found


def of_process(pid: int, name: str, file: str = 'status') -> float:
    """A figure of a file in /proc/PID, in MiB; 0 where it is not told."""
    match = re.search(rf'^{name}:\s+(\d+) kB', Path(f'/proc/{pid}/{file}').read_text(), re.MULTILINE)
    return int(match[1]) / 1024 if match else 0.0


# ---- repositories ----

def make_repository(path: AnyPath, config: bytes = b'config') -> None:
    """The folders and the config of a repository."""
    for kind in KINDS:
        os.makedirs(f'{path}/{kind}', exist_ok=True)
    Path(path, 'config').write_bytes(config)


def store(path: AnyPath, kind: str, content: bytes, name: str = '', age: float = 0.0) -> Path:
    """Write an object of a repository, so many seconds old; its path."""
    name = name or hashlib.sha256(content).hexdigest()
    folder = f'{path}/data/{name[:2]}' if kind == 'data' else f'{path}/{kind}'
    file = Path(f'{folder}/{name}')
    try:
        file.write_bytes(content)
    except FileNotFoundError:
        os.makedirs(folder)
        file.write_bytes(content)
    if age:
        os.utime(file, (time.time() - age,) * 2)
    return file


def restic(repository: str, command: Iterable[str], cache: AnyPath, options: Iterable[str] = ()) -> float:
    """Seconds of a command of restic.  Raises Failed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith('RESTIC_')}
    environment.update(RESTIC_PASSWORD='x', RESTIC_CACHE_DIR=str(cache))
    words = ['restic', *options, '-r', repository, *command]
    begin = time.perf_counter()
    done = subprocess.run(words, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=600)
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise Failed(f'{shlex.join(words)}: exit status {done.returncode}\n'
                     f'{done.stdout.decode(errors="replace")}')
    return seconds


# ---- what servers are given ----

def make_certificate(folder: Path) -> None:
    """A key and a certificate of this host, key.pem and cert.pem."""
    subprocess.run(['openssl', 'req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1',
                    '-nodes', '-subj', '/CN=localhost', '-addext', 'subjectAltName=IP:127.0.0.1',
                    '-days', '2', '-keyout', folder / 'key.pem', '-out', folder / 'cert.pem'],
                   check=True, capture_output=True)


def pack(folder: Path, python: str) -> None:
    """Pack the server as the README has it, compiled beforehand: restic_serve.pyz."""
    (folder / 'packed').mkdir()
    shutil.copy(MODULE, folder / 'packed')
    for words in (['compileall', '-q', '-b', 'packed'],
                  ['zipapp', 'packed', '-m', 'restic_serve:run', '-o', 'restic_serve.pyz']):
        subprocess.run([python, '-m', *words], cwd=folder, check=True)
