#!/usr/bin/env python3
"""A server for restic backups in one file, made of the Python standard library alone.

    restic_serve.py /srv/backup
    restic -r rest:http://127.0.0.1:8080/ init

The chapters stand in the order in which each builds on those above it, on six floors:

  Ground, which knows nothing of restic:
    Units         text from the command line to a value
    Messages      Request, Response and what else passes between a wire and the Api
    Tuning        cores, scheduling, memory and open files of this process
    Files         opening, listing and writing files safely; what the file layer raises
    Read ahead    reading folders of a slow disk several at a time
    Counters      statistics in memory that all processes of the server share
    Bandwidth     the limit on bytes a second

  Storage, which knows nothing of HTTP:
    Store         repositories and objects as files; an object is whole or absent
    Past          what was deleted, and repositories as they were
    Scrub         verifying every object against its name, without a password
    Usage         how much each repository holds, and quotas

  Rules:
    Accounts      authentication: passwords, certificates, proxies
    Policy        authorization: who may do what, where

  Watching:
    Metrics       statistics for Prometheus and for the log
    Watch         what is wrong with repositories
    Events        runs a command when something happens
    Page          the status page for browsers

  Wires, from a request to its answer:
    Admission     places for connections, and the share of each client
    Api           routes and answers
    Transport     bytes over a socket, TLS, or standard input and output
    Connection    one client: its deadline, its share of the bandwidth
    Http1         requests and answers on one connection of HTTP/1.1
    Hpack         the header compression of HTTP/2
    Http2         requests and answers over standard input and output

  Process:
    Loop          the event loop of each process: descriptors, signals, timers
    Listeners     TCP, unix sockets, inherited sockets, TLS certificates
    Server        connections, their threads and deadlines, start and stop
    Workers       several processes that share the listeners
    Logs          log formats and files
    Options       the command line and the environment
    Main          serving, and the other jobs; main()

A request is read by a wire (Http1 or Http2), answered by the Api with the help of the Store, and sent
by the wire; Accounts and Policy stand at the Api's door.  The Api knows no socket and the wire no
directory.  The directory is the only state: any number of servers, and restic itself, may work on
it at the same time.
"""
from __future__ import annotations  # Python 3.8 or newer is required

__version__: str = '1.1.0'          # Python 3.8 or newer is required: 2 and 3.6 stop at one of these lines

try:
    import argparse
    import bisect
    import collections
    import contextlib
    import enum
    import errno
    import functools
    import hashlib
    import itertools
    import logging
    import math
    import operator
    import os
    import re
    import select
    import selectors
    import signal
    import socket
    import stat
    import struct
    import sys
    import threading
    import time
    from concurrent.futures import Future
except ImportError as error:    # such as Debian's python3-minimal
    raise SystemExit(f'restic_serve: this Python lacks {error.name}; install python3') from None

if __name__ == '__main__':
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the program until main() handles it

TYPE_CHECKING = False  # known to type checkers; importing `typing` would cost each start 5 ms
if TYPE_CHECKING:
    import ssl
    from typing import (
        Any, Callable, Deque, Dict, Generator, Iterable, Iterator, List, Mapping, MutableMapping, NoReturn,
        Optional, Protocol, Set, Sized, Tuple, TypeVar, Union)

    S = TypeVar('S')
    T = TypeVar('T')
    Headers = List[Tuple[str, str]]
    Sample = Tuple[Any, ...]                # of a metric: perhaps a suffix of its name, labels, value
    Family = Tuple[str, str, Iterable[Sample]]      # a metric's name, help text and samples
    Key = Tuple[str, ...]                   # of a row of Counters
    Transport = Union['SocketTransport', 'TlsTransport', 'PipeTransport']
    EntryStatus = Tuple[os.DirEntry[str], os.stat_result]     # of a folder, and what stat(2) says of it

    class Body(Protocol):
        """The content of a request, read as it arrives; a buffer of `piece` bytes suits it."""

        piece: int

        @property
        def length(self) -> Optional[int]:
            """Bytes announced, None if the request does not say."""

        def readinto(self, view: memoryview) -> int:
            """Fill `view` from its start; return the bytes read, 0 at the end.  Raises HttpError if the
            content is cut short or malformed, Gone if the client is."""

NOTICE = 25  # rclone's level between INFO and WARNING: shown unless --quiet
log = logging.getLogger('restic_serve')
access_log = logging.getLogger('restic_serve.access')
reload_log = logging.getLogger('restic_serve.reload')  # enabled in one process of several


# ==== Units ======================================================================================
# Parsing and formatting values.  A ValueError is one line: which value, and what would be right.

_SECONDS = {'ns': 1e-9, 'us': 1e-6, 'µs': 1e-6, 'ms': 1e-3, 's': 1.0, 'm': 60.0, 'h': 3600.0,
            'd': 86400.0, 'w': 7 * 86400.0, 'M': 30 * 86400.0, 'y': 365 * 86400.0}
_DURATION_LETTERS = 40          # in a duration: to find none in more takes the square of their number
_DURATION_PART = re.compile(r'(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|[smhdwMy])')
LATEST_TIME = 253402300799 - 86400     # The last day of the year 9999 but one, for any zone.
_UNITS = {'days': 86400, 'hours': 3600, 'minutes': 60, 'seconds': 1}
_SIZE = re.compile(r'(\d+(?:\.\d*)?|\.\d+)(?:(B?)|([KMGTPE])i?B?)', re.IGNORECASE)
_DAYS = ('monday', 'tuesday', 'wednesday', 'thursday', 'friday', 'saturday', 'sunday')
_ENTRY = re.compile(r'(?:([A-Za-z]+)-)?([01]?[0-9]|2[0-3]):([0-5][0-9]),(.+)')
_WEEK = 7 * 24 * 60  # minutes
# Limits from `minute` of the week on, in bytes a second sent and received; 0 is no limit.
TimetableEntry = collections.namedtuple('TimetableEntry', ['minute', 'sent', 'received'])
# Where to listen: TCP `port` of `host` (empty: every address), or a unix socket at `path`.  `scheme` is
# `http`, `tls` or empty, which means TLS if there is a certificate.
Address = collections.namedtuple('Address', ['scheme', 'host', 'port', 'path'])
USER_BYTES = 255             # Longest user name.
_USER = re.compile(rf'(?!\.+$)[A-Za-z0-9@._-]{{1,{USER_BYTES}}}')
# Letters and marks that nobody sees: fillers, joiners, and variation selectors.
_INVISIBLE = re.compile('[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0]')


def parse_duration(text: str) -> float:
    """Seconds of a duration in rclone's syntax: `1h0m0s`, `300ms`, `2d`, or bare seconds."""
    if re.fullmatch(r'\d+(?:\.\d*)?', text):
        return float(text)
    parts = _DURATION_PART.findall(text[:_DURATION_LETTERS])
    if not parts or ''.join(count + unit for count, unit in parts) != text:
        raise ValueError(f'invalid duration {text!r}; use 300ms, 10s, 1h0m0s or 2d')
    return sum(float(count) * _SECONDS[unit] for count, unit in parts)


def parse_period(text: str) -> float:
    """Seconds of a duration that has a unit, since it protects or destroys: 30 may be meant in days."""
    seconds = parse_duration(text)
    if seconds and text[-1].isdecimal():
        raise ValueError(f'{text!r} has no unit; use {text}d for days, {text}s for seconds')
    return seconds


def parse_size(text: str) -> int:
    """Bytes of a size in rclone's syntax: `512k`, `10M`, `1.5G`, `100B`; without a suffix KiB."""
    match = _SIZE.fullmatch(text)
    if not match:
        raise ValueError(f'invalid size {text!r}; use 500G, 1.5M, 512k or bytes')
    size = float(match[1]) * 1024 ** 'BKMGTPE'.index((match[2] or match[3] or 'K').upper())
    if size >= 2 ** 63:
        raise ValueError(f'size {text!r} is too large')
    return int(size)


def parse_quota(text: str) -> int:
    """Bytes of a size as parse_size() has it, except that a bare number means bytes, as in rest-server."""
    return int(text) if re.fullmatch('[0-9]{1,18}', text) else parse_size(text)


def parse_timetable(text: str) -> List[TimetableEntry]:
    """Bandwidths in rclone's syntax: `10M`, `10M:1M` (sent:received), `off`, or a timetable such as
    `08:00,512k 23:00,off` or `Mon-00:00,512k;Sat-10:00,off`; an entry without a day is for all of them."""
    entries = []
    words = re.split('[ ;]+', text.strip(' ;'))
    for word in words:
        match = _ENTRY.fullmatch(word)
        day, hour, minute, pair = match.groups() if match else (None, '0', '0', word)
        days = [day_index for day_index, name in enumerate(_DAYS)
                if not day or day.lower() in (name, name[:3])]
        try:
            rates = [0 if rate.lower() == 'off' else parse_size(rate) for rate in pair.split(':')]
        except ValueError:
            rates = []
        is_time = not match and re.fullmatch('[0-2][0-9]:[0-5][0-9]', word)
        if not days or not 1 <= len(rates) <= 2 or (not match and len(words) > 1) or is_time:
            raise ValueError(f'invalid bandwidth {word!r}; use 10M, 512k, 10M:1M, off or a timetable '
                             'such as "08:00,512k Sat-10:00,off"')
        entries += [TimetableEntry((day_index * 24 + int(hour)) * 60 + int(minute), rates[0], rates[-1])
                  for day_index in days]
    return entries


def format_size(size: float) -> str:
    """Bytes for people: `0 B`, `999 B`, `1.5 KiB`, `12.0 GiB`."""
    units = ['B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB']
    while abs(size) >= 1000 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f'{size:.0f} B' if units[0] == 'B' else f'{size:.1f} {units[0]}'


def format_exact(count: int) -> str:
    """Bytes as parse_quota() reads them: `50G`, or a bare number."""
    for unit, size in (('T', 1 << 40), ('G', 1 << 30), ('M', 1 << 20), ('k', 1 << 10)):
        if count and not count % size:
            return f'{count // size}{unit}'
    return str(count)


def format_duration(seconds: float) -> str:
    """A time for people, in its two largest units: `9 s`, `3 m 20 s`, `2 d 5 h`."""
    parts, left = [], int(seconds)
    for unit, size in _UNITS.items():
        count, left = divmod(left, size)
        parts += [f'{count} {unit[0]}'] if count else []
    return ' '.join(parts[:2]) or '0 s'


def format_age(seconds: float) -> str:
    """A rounded age, such as `3 days`."""
    return next((f'{seconds // size:.0f} {unit}' for unit, size in _UNITS.items() if seconds >= 2 * size),
                'a moment')


def plural(count: int, noun: str) -> str:
    """A noun as it stands behind a count."""
    return noun if count == 1 else {'index': 'indexes', 'repository': 'repositories'}.get(noun, f'{noun}s')


def format_count(count: int, noun: str) -> str:
    """A count with its noun, such as `2 indexes`."""
    return f'{count:,} {plural(count, noun)}'


def local_time(seconds: float) -> time.struct_time:
    """A time in this host's zone; one that no calendar has is the nearest that has."""
    return time.localtime(min(max(seconds, 0), LATEST_TIME))


def format_time(seconds: float, digits: int = 0) -> str:
    """A time in this host's zone (RFC 3339 5.6), with `digits` of the second's fraction."""
    local = local_time(seconds)
    zone = time.strftime('%z', local)
    fraction = f'{seconds % 1:.9f}'[1:2 + digits] if digits else ''
    return f'{time.strftime("%Y-%m-%dT%H:%M:%S", local)}{fraction}{zone[:3]}:{zone[3:]}'


def parse_address(text: str) -> Address:
    """`[::1]:8080`, `localhost:0`, `:8080`, also after `http://` or `tls://`; `unix:///path` or `/path`."""
    scheme, mark, rest = text.rpartition('://')
    if not mark and rest.startswith('unix:/'):  # as rest-server and others write it
        scheme, rest = 'unix', rest[len('unix:'):]
    if scheme in ('', 'unix') and rest.startswith('/') and rest.strip('/'):
        return Address('', '', 0, rest)
    match = re.fullmatch(r'(?:\[([0-9A-Fa-f:.]+(?:%\w+)?)\]|([^\[\]:/\s]*)):([0-9]{1,5})', rest)
    if not match or int(match[3]) > 65535 or (scheme if mark else 'http') not in ('http', 'tls'):
        raise ValueError(f'invalid address {text!r}; use 127.0.0.1:8080, [::1]:8080, :8080, '
                         'tls://:8443 or unix:///path/to/socket')
    return Address(scheme, match[1] or match[2] or '', int(match[3]), '')


def is_loopback(host: str) -> bool:
    """Whether an IP address can be reached from this host only."""
    return host.startswith('127.') or host == '::1'


def parser_of(pattern: str, fault: str, right: str, value: Callable[[str], T]) -> Callable[[str], T]:
    """A parser of text to its `value`; what does not match a pattern is a `fault`, and `right` helps."""
    def parse(text: str) -> T:
        if not re.fullmatch(pattern, text):
            raise ValueError(f'{fault} {text!r}; use {right}')
        return value(text)

    return parse


_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"     # RFC 9110 5.6.2
parse_bool = parser_of('(?ai)(true|1|yes|on|t|y|false|0|no|off|f|n)?', 'invalid value', 'true or false',
                       lambda text: text.lower() in ('true', '1', 'yes', 'on', 't', 'y'))
parse_count = parser_of('0*[1-9][0-9]{0,17}', 'invalid number', 'a whole number of at least 1', int)
parse_cost = parser_of('0?[4-9]|[12][0-9]|3[01]', 'invalid bcrypt cost', '4 to 31', int)
# RFC 6454 7
parse_origin = parser_of(r'\*|[a-z][a-z0-9+.-]*://[A-Za-z0-9._~:\[\]-]+', 'invalid origin',
                         'https://example.org', str)
# Without characters that need quoting (RFC 7617 2)
parse_realm = parser_of(r'[ !#-\[\]-~]*', 'invalid realm', 'ASCII without quotes and backslashes', str)
parse_header_name = parser_of(_TOKEN, 'invalid header name', 'X-Forwarded-User', str)
parse_log_level = parser_of('DEBUG|INFO|NOTICE|ERROR', 'invalid log level', 'DEBUG, INFO, NOTICE or ERROR',
                            str)
parse_log_format = parser_of('text|json', 'invalid log format', 'text or json', str)
# As in rclone, or without `tls` as in rest-server
parse_tls_version = parser_of(r'(tls)?1\.[0-3]', 'invalid TLS version', 'tls1.0, tls1.1, tls1.2 or tls1.3',
                              lambda text: f'tls{text[-3:]}')
_SEGMENT = r"[-A-Za-z0-9._~!$&'()*+,;=:@]+"     # RFC 3986 3.3, without percent-encoding
# The prefix of every path, without a slash at its end: `x`, `/x` and `/x/` are `/x`.
parse_baseurl = parser_of(rf'(?!(.*/)?\.\.?(/|$))/*({_SEGMENT}(/{_SEGMENT})*)?/*', 'invalid URL path',
                          '/backup', lambda text: f'/{text.strip("/")}'.rstrip('/'))


def parse_header(text: str) -> Tuple[str, str]:
    """Name and value of a response header, `Name: value`."""
    match = re.fullmatch(rf'({_TOKEN}):[ \t]*([!-~](?:[ -~]*[!-~])?)', text)
    if not match:
        raise ValueError(f'invalid header {text!r}; use "Name: value"')
    if match[1].lower() in ('connection', 'content-length', 'date', 'transfer-encoding'):
        raise ValueError(f'header {match[1]!r} is set by the server and cannot be added')
    return match[1], match[2]


def parse_user(text: str) -> str:
    """A user's name, in Unicode's form NFC."""
    name = normalize_user(text)
    if not is_user(name):
        raise ValueError(f'invalid user name {text!r}; only letters, digits and @ . _ - are allowed')
    return name


def normalize_user(name: str) -> str:
    """A name in Unicode's form NFC, so that letters with accents are the same from every keyboard.  One that
    is too long for a user's stays as it is: the time this takes grows with the square of its length."""
    if name.isascii() or len(name.encode('utf-8', 'replace')) > USER_BYTES:
        return name
    import unicodedata
    return unicodedata.normalize('NFC', name)


def is_user(name: str) -> bool:
    """Whether a user name is valid, also for a folder: letters and digits (in the form NFC), @ . _ - only."""
    if name.isascii():
        return bool(_USER.fullmatch(name))
    import unicodedata
    return (len(name.encode('utf-8', 'replace')) <= USER_BYTES and normalize_user(name) == name
            and all(letter in '@._-' or unicodedata.category(letter)[0] in 'LMN' for letter in name)
            and not _INVISIBLE.search(name))


def parse_who(text: str) -> str:
    """A user, or `*` for all."""
    return '*' if text == '*' else parse_user(text)


def parse_network(text: str) -> Any:
    """An IP address or network."""
    import ipaddress
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        raise ValueError(f'invalid network {text!r}; use 10.0.0.1 or 10.0.0.0/8') from None


# ==== Messages ===================================================================================
# What passes between the Api and both wires, as RFC 9110 has it, and between the server's processes.

class Gone(Exception):
    """The client has disconnected or timed out; no answer can reach it."""


class HandshakeFailed(Gone):
    """Client and server do not agree on TLS or on certificates, or on HTTP/1.1."""


class HttpError(Exception):
    """An answer other than success: its status, one line for the client, further headers."""

    def __init__(self, status: int, reason: str, headers: Iterable[Tuple[str, str]] = ()) -> None:
        super().__init__(reason)
        self.status, self.headers = status, headers


class Peer:
    """The other end of a connection: its `name` in logs (an IP address, or `unix`), and the `user` that
    its socket or its certificate names, empty if neither does.  Peers of one `group` count as one
    client in limits: an IPv4 address or the /64 network of an IPv6 address, since one host may take any
    address in it (RFC 6177 2); `groups` are that and the /56 and /48 networks that one home or site may have.
    One whose connection is `secure` uses TLS, one that is `certified` has presented a certificate.

    For Admission: it has logged in (`known`), its request is being answered (`busy`), it asks for /health
    alone (`probes`, None at first), it keeps its place (`stays`); when it came, and its last answer ended."""

    __slots__ = ('name', 'user', 'unix', 'group', 'groups', 'certified', 'secure',
                 'known', 'busy', 'probes', 'stays', 'begun', 'since', 'abort')

    def __init__(self, name: str, user: str = '', unix: bool = False) -> None:
        self.name, self.user, self.unix = name, user, unix
        self.groups: Tuple[str, ...] = (name,)
        if ':' in name:
            with contextlib.suppress(OSError):
                bits = socket.inet_pton(socket.AF_INET6, name.partition('%')[0])
                self.groups = bits[:8].hex(), bits[:7].hex(), bits[:6].hex()
        self.group = self.groups[0]
        self.certified = self.secure = self.known = self.busy = self.stays = False
        self.probes: Optional[bool] = None
        self.begun = self.since = time.monotonic()
        self.abort: Callable[[], object] = int      # does nothing

    def is_stranger(self) -> bool:
        """Whether it has not logged in, and may have to go."""
        return not (self.known or self.busy or self.stays)

    def __str__(self) -> str:
        return self.name


class Request:
    """One request of either wire.  `path` is as sent, without query; `headers` have lower-case names, and
    repeated ones are joined (RFC 9110 5.3).  `client` is the `peer`, or for whom that, a proxy, forwards."""

    __slots__ = ('method', 'path', 'query', 'version', 'headers', 'body', 'peer', 'client', 'user', 'begun',
                 'location', 'is_probe')

    def __init__(self, method: str, target: str, version: str, headers: Dict[str, str],
                 body: Body, peer: Peer) -> None:
        self.method, self.version, self.headers, self.body = method, version, headers, body
        self.path, _, self.query = target.partition('?')
        self.peer = self.client = peer
        self.user = ''
        self.begun = time.monotonic()
        self.location: Optional[Location] = None    # of the object that is being sent
        self.is_probe = False           # of a monitor, every few seconds

    @property
    def url(self) -> str:
        """The server's address as the client knows it, perhaps by way of a proxy."""
        scheme = self.headers.get('x-forwarded-proto', '')
        if scheme not in ('http', 'https'):
            scheme = 'https' if self.peer.secure else 'http'
        return f'{scheme}://{self.headers.get("host") or socket.gethostname()}'


HOPS = 20    # Most proxies that are followed back to a client.
_HOP = re.compile(r'\[([0-9A-Fa-f:.]+)\](?::[0-9]+)?|([0-9.]+)(?::[0-9]+)?|([0-9A-Fa-f:.]+)')


def forwarded_addresses(headers: Dict[str, str]) -> Iterator[str]:
    """For whom proxies say that they forward, the last proxy's word first, up to the first that is no IP
    address: by X-Forwarded-For or, without that, by Forwarded (RFC 7239 4 and 6)."""
    import ipaddress
    if 'x-forwarded-for' in headers:
        hops = headers['x-forwarded-for'].rsplit(',', HOPS)[-HOPS:]
    else:
        hops = list(map(_forwarded_for, _split_unquoted(headers.get('forwarded', ''), ',')[-HOPS:]))
    for text in reversed(hops):
        hop = _HOP.fullmatch(text.strip(' \t'))
        try:
            address = ipaddress.ip_address(hop[hop.lastindex or 0] if hop else '')
        except ValueError:
            return
        yield str(getattr(address, 'ipv4_mapped', None) or address)


def _forwarded_for(element: str) -> str:
    """The node that an element of Forwarded names by `for`, empty if there is not exactly one."""
    pairs = [pair.strip(' \t').partition('=') for pair in _split_unquoted(element, ';')]
    nodes = [value for name, _, value in pairs if name.lower() == 'for']
    return nodes[0].strip('"') if len(nodes) == 1 else ''


def _split_unquoted(text: str, separator: str) -> List[str]:
    """The parts of a text between separators that do not stand in quotes (RFC 9110 5.6.4)."""
    part = rf'{separator}((?:[^"{separator}]|"(?:[^"\\]|\\.?)*"?)*)'
    return re.findall(part, separator + text)


def _seek_and_read(fd: int, length: int, offset: int) -> bytes:
    """pread(2) for systems without it; only one thread may use `fd`."""
    os.lseek(fd, offset, os.SEEK_SET)
    return os.read(fd, length)


_read_at = getattr(os, 'pread', _seek_and_read)


class Closing:
    __slots__ = ()

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Release what is open; a second time does nothing."""


class WatchedBody:
    """A request's content, of which some bytes are `received`; each piece, and the end, call `on_read`."""

    def __init__(self, body: Body, on_read: Callable[[], object]) -> None:
        self.piece, self.length, self._body, self._after_read = body.piece, body.length, body, on_read
        self.clock: Callable[[], float] = getattr(body, 'clock', time.monotonic)
        self.received = 0

    def readinto(self, view: memoryview) -> int:
        count = self._body.readinto(view)
        self.received += count      # first: Room.yield_rest() may run at any moment
        self._after_read()
        return count


class FileSlice(Closing):
    """`length` bytes from `offset` on of the file `fd`, which it owns; `check` may raise HttpError."""

    __slots__ = ('fd', 'offset', 'length', 'check')

    def __init__(self, fd: int, offset: int, length: int) -> None:
        self.fd, self.offset, self.length = fd, offset, length
        self.check: Optional[Callable[[], object]] = None

    def read(self, limit: int) -> bytes:
        """The next bytes, `limit` at the most; OSError if the file ends before the slice does."""
        data = _read_at(self.fd, min(limit, self.length), self.offset)
        self.advance(len(data))
        return data

    def read_all(self) -> bytes:
        """The rest of the slice, after which it is closed.  Raises OSError as read() does."""
        try:
            data = _read_at(self.fd, self.length, self.offset)
            if len(data) < self.length:  # a signal, or a network file system
                self.advance(len(data))
                while self.length:
                    data += self.read(self.length)
            return data
        finally:
            os.close(self.fd)
            self.fd = -1

    def advance(self, count: int) -> None:
        """Skip the `count` bytes that were read or sent; OSError where the file has ended."""
        if not count and self.length:
            raise OSError(errno.EIO, 'the file became shorter while it was being sent')
        self.offset += count
        self.length -= count
        if self.check and self.length:
            self.check()

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Channel:
    """Messages from threads, and processes forked once it is open, to the process that watches `receiver`. A
    `kind` of SOCK_STREAM joins them, SOCK_DGRAM holds few: who sends waits for `seconds` at the most."""

    receiver: Optional[socket.socket] = None    # can be read when a message has come
    sender: Optional[socket.socket] = None

    def __init__(self, kind: int, seconds: float = 0) -> None:
        self._kind, self._seconds = kind, seconds

    def open(self) -> None:
        """Make the pair of sockets.  Raises OSError."""
        if not self.receiver:
            self.receiver, self.sender = socket.socketpair(type=self._kind)
            self.receiver.setblocking(False)
            self.sender.settimeout(self._seconds)

    def send(self, message: bytes) -> None:
        """Send a message, unless the channel is closed.  Raises OSError where there is no room for it."""
        if self.sender:
            self.sender.send(message)

    def receive(self) -> Iterator[bytes]:
        with contextlib.suppress(OSError):      # there are no more
            while self.receiver:
                yield self.receiver.recv(65536)

    def close(self) -> None:
        if self.receiver and self.sender:
            self.receiver.close()
            self.sender.close()
            self.receiver = self.sender = None


class Response:
    """An answer.  Its body is bytes, a FileSlice, or an iterator of chunks whose length is not known.  An
    iterator may raise OSError or StorageError; what has been sent by then must not look complete."""

    __slots__ = ('status', 'headers', 'body')

    def __init__(self, status: int, headers: Headers,
                 body: bytes | FileSlice | Iterator[bytes] = b'') -> None:
        self.status, self.headers, self.body = status, headers, body


def close_quietly(source: object) -> None:
    """Close a source of bytes or items, if it has anything to close."""
    if close := getattr(source, 'close', None):
        close()


_BYTE_RANGE = re.compile(r'bytes=(?:([0-9]{1,99})-([0-9]{1,99})?|-([0-9]{1,99}))', re.IGNORECASE)
NO_STORE = 'Cache-Control', 'no-store'  # RFC 9111 5.2.2.5: a cache between may not answer for the server


def text_response(status: int, line: str, headers: Iterable[Tuple[str, str]] = ()) -> Response:
    return Response(status, [*headers, ('Content-Type', 'text/plain; charset=utf-8'), NO_STORE],
                    f'{line}\n'.encode())


def parse_range(value: str, size: int) -> Optional[Tuple[int, int]]:
    """Offset and length in bytes of the part of `size` bytes that a Range header selects; None where it is to
    be ignored, as RFC 9110 14.2 allows: malformed, another unit, several ranges, or no bytes at all.  Raises
    HttpError 416 for a range past the end (14.1.2, 15.5.17)."""
    match = _BYTE_RANGE.fullmatch(value)
    if not match or not size:   # restic asks for all of an empty object so, and would fail on 416
        return None
    first, last, suffix = match.groups()
    if suffix:
        offset, end = max(size - int(suffix), 0), size
    else:
        offset, end = int(first), int(last) + 1 if last else size
        if last and end <= offset:
            return None
    length = min(end, size) - offset
    if length <= 0:
        raise HttpError(416, 'range past the end', [('Content-Range', f'bytes */{size}')])
    return offset, length


@functools.lru_cache(maxsize=16)
def http_date(seconds: int) -> str:
    """A time since the epoch as an IMF-fixdate (RFC 9110 5.6.7)."""
    return time.strftime('%a, %d %b %Y %H:%M:%S GMT', time.gmtime(seconds))


LIMITED_SECONDS = 60         # Time between two lines about the same limit or refusal.
LISTED = 10                  # Clients in such a line.
LIMITED_KEYS = 4096          # Kinds of refusal, users and addresses with lines of their own in a minute.
FULL_LINES = 5               # Lines in full at first: as many as a program needs to ban an address,
FULL_CLIENTS = 16            # while few are refused.
VALUE_BYTES = 200            # Most bytes of a client's value in a line.


def log_access(request: Request, status: int, sent: int) -> None:
    """A line in Apache's Combined Log Format (https://httpd.apache.org/docs/2.4/logs.html#combined), and the
    seconds that the request took; `sent` counts the body's bytes."""
    if not access_log.isEnabledFor(logging.DEBUG if request.is_probe else logging.INFO):
        return
    target = f'{request.path}?{request.query}' if request.query else request.path
    access_log.info(
        '%s - %s [%s] "%s" %d %s "%s" "%s" %.3f', request.client, request.user or '-',
        time.strftime('%d/%b/%Y:%H:%M:%S %z'),
        f'{_for_log(request.method)} {_for_log(target)} {request.version}'.rstrip(), status, sent or '-',
        _for_log(request.headers.get('referer', '-')),
        _for_log(request.headers.get('user-agent', '-')), time.monotonic() - request.begun)


def _for_log(text: str) -> str:
    """What a client sent, escaped so that it ends neither its quotes nor its line, and cut."""
    return cut(re.sub(r'[^ !#-\[\]-~]', lambda match: f'\\x{ord(match[0]):02x}', text))


def cut(value: object) -> str:
    """A client's value for the log: VALUE_BYTES of it at the most."""
    text = str(value)
    data = text.encode('utf-8', 'backslashreplace')
    return text if len(data) <= VALUE_BYTES else data[:VALUE_BYTES - 3].decode('utf-8', 'ignore') + '...'


def one_line(text: object) -> str:
    """A message as one line: what cannot be printed, or changes the direction of writing, is escaped."""
    return ''.join(letter if letter.isprintable() else letter.encode('unicode_escape').decode()
                   for letter in str(text))


def show_line(stream: Any, text: str, end: str = '') -> None:
    """Replace the line of a terminal, if the stream is one whose reader is there; the text is cut to fit."""
    if not stream.isatty():
        return
    with contextlib.suppress(OSError):
        text = text[:os.get_terminal_size(stream.fileno()).columns - 1]
    with contextlib.suppress(OSError):
        print(f'\r{text}\033[K', end=end, file=stream, flush=True)


def count_name(counter: collections.Counter[str], name: str) -> None:
    """Count a client, unless it is one of too many to name."""
    counter[name if len(counter) < 1024 or name in counter else 'others'] += 1


def listed(counter: collections.Counter[str]) -> str:
    """What was counted of whom, such as `alice (3), bob (1) and 2 more`."""
    more = len(counter) - LISTED
    return ', '.join(f'{name} ({count})' for name, count in counter.most_common(LISTED)) + (
        f' and {more} more' if more > 0 else '')


class Refusals:
    """What clients are refused, in the log: each kind of a user at an address some times in full, then once a
    minute, so that a program that bans addresses sees all of them; the others are counted."""

    def __init__(self) -> None:
        self._lock = threading.Lock()   # of what follows
        self._lines: Dict[Key, List[float]] = {}    # the end of a minute, and lines that it has left
        self._counted: Dict[str, collections.Counter[str]] = {}     # not told of yet, by text and client
        self._due: Dict[str, float] = {}    # when a text may be logged again

    def log(self, level: int, kind: str, client: Peer, user: str, text: str, *values: object) -> None:
        key, now = (kind, client.group, user), time.monotonic()
        with self._lock:
            end, left = self._lines.get(key, (-math.inf, FULL_LINES))
            if now >= end:
                is_quiet = now >= end + LIMITED_SECONDS and len(self._lines) < FULL_CLIENTS
                end, left = now + LIMITED_SECONDS, FULL_LINES if is_quiet else 1
            if left and (key in self._lines or len(self._lines) < LIMITED_KEYS):
                self._lines[key] = [end, left - 1]
            else:
                left, text = 0, f'{kind}: another'
                self._due.setdefault(text, now + LIMITED_SECONDS)
        if left:
            log.log(level, text, *map(cut, values))
        else:
            self.count(text, f'{user} at {client}' if user else str(client))

    def count(self, text: str, client: str) -> None:
        """Count what tell() logs as a text, how often, and of which clients."""
        with self._lock:
            count_name(self._counted.setdefault(text, collections.Counter()), cut(client) or 'unix')

    def tell(self, at_once: bool = False) -> float:
        """Log what was counted, each text once a minute; seconds until there is more to log."""
        now = time.monotonic()
        with self._lock:
            for key in [key for key, (end, _) in self._lines.items() if now >= end + LIMITED_SECONDS]:
                del self._lines[key]
            told = [(text, self._counted.pop(text)) for text in list(self._counted)
                    if at_once or now >= self._due.get(text, now)]
            self._due.update((text, now + LIMITED_SECONDS) for text, _ in told)
            wait = min((self._due[text] - now for text in self._counted), default=math.inf)
        for text, clients in told:
            log.warning('%s %d, from %s', text, sum(clients.values()), listed(clients))
        return wait


refusals = Refusals()       # of this process


# ==== Tuning =====================================================================================
# How the operating system treats this process: its cores, its turns, its memory, its open files.

STACK_BYTES = 512 * 1024        # Stack of a thread: a thousand connections fit into a 32-bit process.
_M_ARENA_MAX = -8               # glibc's <malloc.h>
try:
    CORES = sorted(os.sched_getaffinity(0))     # that this process may use
except (AttributeError, OSError):
    CORES = list(range(os.cpu_count() or 1))
# Without an interpreter lock, or where that is not known, pinning does not help.
_MAY_PIN = (hasattr(os, 'sched_setaffinity') and len(CORES) > 1
            and getattr(sys, '_is_gil_enabled', lambda: True)())
_core = None     # type: Optional[int]  # of pin_process(); PyPy forbids another annotation of a global


def unpin(unpinned: bool) -> None:
    """Let this thread run on any core, or only on that of this process (see pin_process()).  Threads that
    share the interpreter lock wake each other many times in a small request: nearly free on one core, half
    the requests a second across cores.  Transfers and hashing work for long without the lock: unpinned."""
    if _core is not None:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, CORES if unpinned else [_core])


def pin_process(slot: int) -> None:
    """Give this process's threads a core to share; each worker takes another.  A single process is not
    pinned: a busy program on its core would cost it two thirds of its requests."""
    global _core
    if _MAY_PIN:
        _core = CORES[slot % len(CORES)]


def trim_memory() -> None:
    """Return the memory that compiling the program has taken, which the C library would keep, and exempt the
    rest from garbage collection, so that forked processes go on sharing it.  Have threads share two arenas:
    the C library would make 8 for each core, and keep up to a MiB in each."""
    import gc
    gc.collect()
    if hasattr(gc, 'freeze'):   # PyPy has none
        gc.freeze()
    with contextlib.suppress(ImportError, OSError, AttributeError, TypeError):  # not every C library can
        import ctypes
        library = ctypes.CDLL(None)
        library.malloc_trim(0)
        library.mallopt(_M_ARENA_MAX, 2)


def run_in_batches() -> None:
    """Have threads that are woken wait for their turn rather than interrupt the running one: the client on
    this host, or a thread before them, which has mostly more for them by then (SCHED_BATCH in sched(7)).
    Worth 1.04, 1.14 and 1.27 times the pieces a second at 1, 5 and 64 connections.  Another policy stays."""
    if hasattr(os, 'SCHED_BATCH'):
        with contextlib.suppress(OSError):
            if os.sched_getscheduler(0) == os.SCHED_OTHER:
                os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def allow_descriptors(count: int) -> int:
    """Raise the process's limit on open files to `count`, if the system lets it; as many as it may have."""
    try:
        import resource
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard != resource.RLIM_INFINITY:
            count = min(count, hard)
        if soft != resource.RLIM_INFINITY and soft < count:
            resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
    except (ImportError, OSError, ValueError) as error:
        log.debug('cannot raise the limit on open files: %s', error)
    return count


# ==== Files ======================================================================================
# Opening folders so that no other user can redirect us, scanning folders of objects, and syncing.  Errors are
# OSErrors, and StorageErrors for what is refused; the Api has the tables that turn them into answers.

COPY_BYTES = 512 * 1024           # Buffer for content.
LISTED_AT_ONCE = 1024             # Names read from a directory at a time.
LOOK_SECONDS = 1.0                # Time between two checks of what may change outside the server.
SETTLED_SECONDS = 1.0             # A file that did not change for so long is not being written,
UNENDED_SECONDS = 5.0             # or for so long, if it does not end with a newline.
KNOWN_AT_MOST = 4096              # Checks of the last second that are remembered.
LINKS_AT_MOST = 40                # Symbolic links followed on the way to a folder, as in Linux.
COARSE_SECONDS = 2                # Resolution of the times of files on FAT; elsewhere a part of a second,
TICK_SECONDS = 0.01               # in which the kernel's clock for them goes on in steps.
SCRATCH_PREFIX = 'upload-'        # Name of a scratch file that its writer has locked,
FRESH_PREFIX = 'new-'             # and of one that nobody has locked.
SCRATCH_SECONDS = 3600            # Age at which a scratch file without a lock is abandoned.
_renaming = threading.Lock()      # excludes other threads of this process
_NAME = re.compile('[0-9a-f]{64}')
_BINARY = getattr(os, 'O_BINARY', 0) | getattr(os, 'O_CLOEXEC', 0)
# An object is a plain file: what a link leads to is none, and no FIFO may hold up its reader.
_READ_FLAGS = os.O_RDONLY | _BINARY | getattr(os, 'O_NOFOLLOW', 0) | getattr(os, 'O_NONBLOCK', 0)
_FOLDER_FLAGS = os.O_RDONLY | _BINARY | getattr(os, 'O_DIRECTORY', 0)
# O_PATH of Linux, whose name PyPy does not know: a folder may be passed that cannot be listed (open(2)).
_STEP_FLAGS = (getattr(os, 'O_PATH', 0o10000000 if sys.platform.startswith(('linux', 'android'))
                       else os.O_RDONLY) | _BINARY | getattr(os, 'O_DIRECTORY', 0))
_HAS_DIR_FD = ({os.open, os.link, os.mkdir, os.stat, os.unlink} <= os.supports_dir_fd
               and os.scandir in os.supports_fd and hasattr(os, 'O_NOFOLLOW'))
# Answers of file systems that cannot sync a file, or a directory (FUSE, SMB and others); EIO is none of them.
_UNSYNCED_FILES = (errno.EINVAL, errno.ENOTTY, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.ENOSYS)
_UNSYNCED_FOLDERS = (*_UNSYNCED_FILES, errno.ENOENT, errno.EACCES, errno.EBADF)
_LINK_ERRORS = (errno.ELOOP, errno.ENOTDIR, errno.EMLINK)   # of O_NOFOLLOW at a link


# What the file layer refuses; the text is one line that says why.
class StorageError(Exception): ...
class InvalidPath(StorageError): ...        # a path, or a moment in it, that must not reach the file system
class ReservedName(StorageError): ...       # a path that no repository can have
class NotHere(StorageError): ...            # a repository, or deleted objects, that a request needs
class WrongContent(StorageError): ...       # content is not what its name says
class OtherConfig(StorageError): ...        # a repository has one config, which is not replaced
class NoHistory(StorageError, ValueError): ...  # a moment before all that is kept
class DirectoryGone(StorageError): ...      # the served directory is not there, or another is in its place
class ReadOnly(StorageError): ...           # nothing may be changed
class QuotaExceeded(StorageError): ...      # a quota leaves no room


class Busy(StorageError):
    """What may succeed when it is tried again, after `retry_seconds`."""

    def __init__(self, reason: str, retry_seconds: int) -> None:
        super().__init__(reason)
        self.retry_seconds = retry_seconds


class Remembered:
    """Answers to a question about paths, each of which holds for some seconds."""

    def __init__(self, seconds: float = LOOK_SECONDS) -> None:
        self._seconds = seconds
        self._answers: Dict[str, Tuple[float, Any]] = {}    # until when an answer holds, and the answer

    def get(self, path: str, find: Callable[[str], T]) -> T:
        """What find(path) says now, or said in the last seconds."""
        now = time.monotonic()
        until, answer = self._answers.get(path, (0.0, None))
        if now >= until:
            answer = find(path)
            if len(self._answers) >= KNOWN_AT_MOST:
                self._answers.clear()
            self._answers[path] = now + self._seconds, answer
        known: T = answer
        return known


class Folder(Closing):
    """A directory, reached through `fd`, or through `path` where that is trusted or there is no openat(2)."""

    __slots__ = ('path', 'fd')

    def __init__(self, path: str, fd: Optional[int] = None) -> None:
        self.path, self.fd = path, fd

    def close(self) -> None:
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    def at(self, name: str) -> str:
        """The path of an entry, for calls with this folder's `fd` as their dir_fd."""
        return f'{self.path}/{name}' if self.fd is None else name

    def open(self, name: str, flags: int, mode: int = 0o600) -> int:
        return os.open(f'{self.path}/{name}' if self.fd is None else name, flags, mode, dir_fd=self.fd)

    def stat(self, name: str) -> os.stat_result:
        return os.stat(self.at(name), dir_fd=self.fd, follow_symlinks=False)

    def unlink(self, name: str) -> None:
        os.unlink(self.at(name), dir_fd=self.fd)

    def rename(self, name: str, target: Folder, new_name: str) -> None:
        """Move an entry to another folder, or to another name, replacing what has that."""
        os.replace(self.at(name), target.at(new_name), src_dir_fd=self.fd, dst_dir_fd=target.fd)

    def identity(self) -> Tuple[int, int]:
        """The number of the file system, and that of the folder in it."""
        status = os.stat(self.path if self.fd is None else self.fd)
        return status.st_dev, status.st_ino

    def sync(self) -> None:
        """Flush the entries to the disk, where the system can."""
        if os.name == 'nt':
            return
        try:
            fd = os.open(self.path, os.O_RDONLY) if self.fd is None else self.fd
            try:
                os.fsync(fd)
            finally:
                if self.fd is None:
                    os.close(fd)
        except OSError as error:
            if error.errno not in _UNSYNCED_FOLDERS:
                raise


def is_trusted(path: str, links: int = LINKS_AT_MOST) -> bool:
    """Whether only root and this process's user own, and may change, each step of an absolute path."""
    parent, name = os.path.split(path.rstrip(os.sep))
    return not name or bool(links) and is_trusted(parent, links) and is_trusted_entry(parent, name, links)[0]


def is_trusted_entry(parent: str, name: str, links: int = LINKS_AT_MOST) -> Tuple[bool, bool]:
    """Whether an entry of a trusted folder is trusted, too; and whether it is a link."""
    path, others_write = os.path.join(parent, name), False
    if not _HAS_DIR_FD:
        return True, os.path.islink(path)
    ours = (0, os.geteuid())
    try:
        folder = os.stat(parent)
        others_write = bool(folder.st_mode & (stat.S_IWGRP | stat.S_IWOTH))
        if folder.st_uid not in ours or (others_write and not folder.st_mode & stat.S_ISVTX):
            return False, False
        status = os.lstat(path)
    except FileNotFoundError:
        return not others_write, False  # only we can create it
    except OSError:  # not searchable: it will be opened step by step, or not at all
        return False, False
    is_link = stat.S_ISLNK(status.st_mode)
    if status.st_uid not in ours:
        return not (others_write or is_link), is_link
    # Every step of a link's target counts.
    return not is_link or is_trusted(os.path.join(parent, os.readlink(path)), links - 1), is_link


def descend(top: int, path: str, links: int = LINKS_AT_MOST) -> int:
    """A descriptor of the folder at a path below the folder `top`, opened step by step, so that others
    cannot redirect it by exchanging a folder for a link.  Links that root or this process's user own
    are followed wherever they lead.  Raises OSError."""
    names = [name for name in path.split('/') if name]
    fd = os.dup(top)
    try:
        for depth, name in enumerate(names, 1):
            flags = _FOLDER_FLAGS if depth == len(names) else _STEP_FLAGS
            try:
                below = os.open(name, flags | os.O_NOFOLLOW, dir_fd=fd)
            except OSError as error:
                if error.errno not in _LINK_ERRORS or not links:
                    raise
                below = _follow(fd, name, links)
            os.close(fd)
            fd = below
    except BaseException:
        os.close(fd)
        raise
    return fd


def _follow(fd: int, name: str, links: int) -> int:
    """A descriptor of the folder that a link in the folder `fd` leads to.  Raises OSError."""
    before = os.stat(name, dir_fd=fd, follow_symlinks=False)
    if not stat.S_ISLNK(before.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), name)
    if before.st_uid not in (0, os.geteuid()):
        raise PermissionError(errno.EACCES, 'symbolic link created by another user', name)
    target = os.readlink(name, dir_fd=fd)
    after = os.stat(name, dir_fd=fd, follow_symlinks=False)
    if (after.st_ino, after.st_ctime_ns) != (before.st_ino, before.st_ctime_ns):
        raise PermissionError(errno.EACCES, 'symbolic link that keeps changing', name)
    return descend_from_root(target, links - 1) if target.startswith('/') else descend(fd, target, links - 1)


def descend_from_root(path: str, links: int = LINKS_AT_MOST) -> int:
    """A descriptor of the folder at an absolute path, as descend() gives it."""
    top = os.open(os.sep, _FOLDER_FLAGS)
    try:
        return descend(top, path, links)
    finally:
        os.close(top)


def open_plain(folder: Folder, name: str) -> Tuple[int, os.stat_result]:
    """A descriptor for reading a regular file, and its status.  Raises OSError, also for anything else."""
    fd = folder.open(name, _READ_FLAGS)
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise IsADirectoryError(errno.EISDIR, 'not a regular file', folder.at(name))
    return fd, status


def explain_denial(root: str, path: str, writes: bool) -> str:
    """Whose file or folder between `root` and a `path` below it denies access, and what helps, if any."""
    if os.name != 'posix':
        return ''
    steps = [*itertools.accumulate(path.split('/')[1:], os.path.join, initial=root or os.sep)]
    folders = [step for step in steps if os.path.isdir(step)] or steps[:1]
    wanted = [*((folder, os.R_OK | os.X_OK) for folder in folders), (steps[-1], os.R_OK)]
    if writes:
        wanted.append((folders[-1], os.W_OK))
    for step, rights in wanted:
        with contextlib.suppress(OSError):  # it is missing, or behind one that is denied
            owner, server = user_name(os.stat(step).st_uid), user_name(os.geteuid())
            if not os.access(step, rights, effective_ids=os.access in os.supports_effective_ids):
                return (f'{step} belongs to {owner}, and the server runs as {server}: '
                        f'chown -R {server} {root}, and run restic there as that user')
    return ''


def user_name(uid: int) -> str:
    """The login name of a user, or the number where it has none."""
    try:
        import pwd
        return pwd.getpwuid(uid).pw_name
    except (ImportError, KeyError):
        return str(uid)


def stamp(path: str) -> Tuple[int, ...]:
    """A fingerprint that changes when a file does; empty if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return ()
    return status.st_mtime_ns, status.st_size, status.st_ino


class BeingWritten(Exception): ...      # a file may not be complete yet


class WatchedFiles:
    """Files that are read again when one of them changes; a base class of what they hold.  One that changes
    in place is perhaps not complete before it rests; another in its place (mv) counts at once.  While they
    are no good, what was read last stays in force.  Files that belong together are replaced one after the
    other: a failure is tried once more, at the next look, before it is logged.  For one thread at a time."""

    kept = ''       # What stays in force after a failure, for the log.

    def __init__(self, *paths: str) -> None:
        self._paths = paths
        self._stamps = [stamp(path) for path in paths]
        self._changed = 0.0         # when they were last seen to change
        self._due = math.inf        # when that counts
        self._may_wait = self._failed = False   # at the last look, for the first time
        self.load()

    def load(self) -> str:
        """Put the files in force; what was read, for the log.  Raises BeingWritten, OSError, ValueError."""
        raise NotImplementedError

    def read(self, path: str) -> bytes:
        """The content of one of the files.  Raises BeingWritten and OSError."""
        fd = os.open(path, os.O_RDONLY | _BINARY | getattr(os, 'O_NONBLOCK', 0))
        with open(fd, 'rb') as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):      # a FIFO would hold up its reader
                raise OSError(errno.EINVAL, 'not a regular file', path)
            content = file.read()
        if not content.endswith(b'\n'):
            if self._may_wait:
                raise BeingWritten
            if content and self._due < math.inf:    # neither the start nor SIGHUP
                reload_log.warning('%s: no newline at the end; is the file complete?', path)
        return content

    def look(self, force: bool = False) -> None:
        """Read the files again if one of them has changed, or in any case with `force`."""
        now, stamps = time.monotonic(), [stamp(path) for path in self._paths]
        if stamps != self._stamps:
            is_new = any(new[2:] != old[2:] for new, old in zip(stamps, self._stamps))      # their inodes
            self._stamps, self._changed, self._failed = stamps, now, False
            self._due = now if is_new else now + SETTLED_SECONDS
        if force or now >= self._due:
            self._may_wait = not force and now < self._changed + UNENDED_SECONDS
            try:
                reload_log.log(NOTICE, '%s', self.load())
                self._due, self._failed = math.inf, False
            except BeingWritten:
                pass
            except (OSError, ValueError) as error:
                for fault in str(error).splitlines() if self._failed else ():
                    reload_log.error('%s: %s', self.kept, fault)
                self._due, self._failed = math.inf if self._failed else now, not self._failed


@contextlib.contextmanager
def _scan(folder: str, fd: Optional[int] = None) -> Iterator[Iterator[os.DirEntry[str]]]:
    """The entries of a directory, none if it is missing.  Raises OSError if it cannot be read."""
    try:
        entries = os.scandir(folder if fd is None else fd)
    except (FileNotFoundError, NotADirectoryError):
        if os.path.lexists(folder):
            raise
        yield iter(())
        return
    with entries:
        yield entries


def object_batches(entries: Iterator[os.DirEntry[str]], prefix: str) -> Iterator[List[os.DirEntry[str]]]:
    """The objects among the entries of a folder whose names begin with `prefix`, up to LISTED_AT_ONCE at a
    time.  Lists of a million objects come from here: work per entry counts."""
    is_name = re.compile(f'{prefix}[0-9a-f]{{{64 - len(prefix)}}}').fullmatch
    for batch in iter(lambda: list(itertools.islice(entries, LISTED_AT_ONCE)), []):
        yield [entry for entry in batch if is_name(entry.name) and entry.is_file(follow_symlinks=False)]


def _digest(fd: int) -> str:
    """SHA-256 in hexadecimal of a file, from its beginning."""
    digest = hashlib.sha256()
    os.lseek(fd, 0, os.SEEK_SET)
    for part in iter(functools.partial(os.read, fd, COPY_BYTES), b''):
        digest.update(part)
    return digest.hexdigest()


def sync_file(fd: int) -> bool:
    """Flush a file's content and length to the disk; False if this file system cannot."""
    calls = [os.fsync]
    if sys.platform == 'darwin':    # where it leaves the data in the drive's cache
        import fcntl
        calls.insert(0, lambda fd: fcntl.fcntl(fd, fcntl.F_FULLFSYNC))  # which exFAT and SMB do not know
    for call in calls:
        try:
            call(fd)
            return True
        except OSError as error:
            if error.errno not in _UNSYNCED_FILES:
                raise
    return False


def set_mode(fd: int, mode: int) -> None:
    """Give a file its permissions despite the umask, where the system has some."""
    if hasattr(os, 'fchmod'):
        with contextlib.suppress(PermissionError):  # FAT, and mounts with an owner for all
            os.fchmod(fd, mode)


def lock_file(fd: int, wait: bool = False) -> Optional[bool]:
    """Lock a file while it is open: False if another process has locked it, None if there are no locks."""
    try:
        import fcntl
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


class ScratchFile(Closing):
    """A new file in `folder` under a scratch `name`, which begins with a `prefix`, until it is given its own;
    close() removes it before.  It is locked meanwhile: what a crash leaves can be told by its free lock."""

    opened: Tuple[Folder, ...] = ()     # folders that are closed with it

    def __init__(self, folder: Folder, mode: int, prefix: str = '') -> None:
        self.folder, self.mode = folder, mode
        name = f'{prefix}{FRESH_PREFIX}{os.urandom(8).hex()}'
        self.fd = folder.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | _BINARY, mode)
        self.name = name
        try:    # locked first, since a server that starts takes `upload-` without a lock for abandoned
            if lock_file(self.fd) is not None:
                self._change_prefix(FRESH_PREFIX, SCRATCH_PREFIX)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        if self.name:
            try:
                self.folder.unlink(self.name)
            except OSError as error:
                log.error('cannot remove temporary file %s/%s: %s', self.folder.path, self.name, error)
            self.name = ''
        for folder in self.opened:
            folder.close()

    def rename(self, folder: Folder, name: str) -> None:
        """Give the file its name, replacing what has it.  It is closed for FAT and SMB, and so not locked."""
        self._change_prefix(SCRATCH_PREFIX, FRESH_PREFIX)
        fd, self.fd = self.fd, -1
        os.close(fd)
        move(self.folder, self.name, folder, name, self.mode)      # a bind mount: it is another file system
        self.name = ''

    def date(self, times: Optional[Tuple[int, int]] = None) -> None:
        """Set the times, in nanoseconds, or to now.  Raises OSError, also where they do not stay."""
        file = self.folder.at(self.name) if self.name and self.folder.fd is None else self.fd
        if times:
            os.utime(file, ns=times)
            if abs(os.fstat(self.fd).st_mtime_ns - times[1]) > COARSE_SECONDS * 1e9:
                raise PermissionError(errno.EPERM, 'the file system does not keep times', self.folder.path)
            return
        try:
            os.utime(file)
        except OSError:     # of another owner; this dates it, too, and only has to write
            os.ftruncate(self.fd, os.fstat(self.fd).st_size)

    def _change_prefix(self, old: str, new: str) -> None:
        name = self.name.replace(old, new)
        if name != self.name:
            self.folder.rename(self.name, self.folder, name)
            self.name = name


def owner_of(folder: Folder) -> Optional[Tuple[int, int]]:
    """User and group of a folder, to whom what root creates in it is to belong; None unless we are root."""
    if not hasattr(os, 'geteuid') or os.geteuid():
        return None
    status = os.stat(folder.path if folder.fd is None else folder.fd)
    return status.st_uid, status.st_gid


def give_away(fd: int, owner: Optional[Tuple[int, int]]) -> None:
    """Let a file or folder belong to a user and a group, if they are given, and the system can."""
    if owner and hasattr(os, 'fchown'):
        with contextlib.suppress(PermissionError):  # only root gives a file away
            os.fchown(fd, *owner)


def write_durably(folder: Folder, name: str, parts: Iterable[bytes], mode: int, *, prefix: str = '',
                  owner: Optional[Tuple[int, int]] = None, times: Optional[Tuple[int, int]] = None) -> None:
    """Write a file of some `parts` in a folder, replacing what has its name.  It is whole or absent at every
    instant, and on the disk when this returns.  `owner` is a user and a group, `times` are nanoseconds of
    access and modification; the scratch file's name has the `prefix`.  Raises OSError."""
    with ScratchFile(folder, 0o600 if owner else mode, prefix) as scratch:     # until it has its owner
        for part in parts:
            while part:
                part = part[os.write(scratch.fd, part):]
        give_away(scratch.fd, owner)
        set_mode(scratch.fd, mode)
        scratch.date(times)
        sync_file(scratch.fd)
        scratch.rename(folder, name)
    folder.sync()


def copy_durably(source: Folder, name: str, target: Folder, new_name: str, mode: int) -> None:
    """Copy a file, with its times, as write_durably() writes it.  Raises OSError."""
    fd, status = open_plain(source, name)
    with open(fd, 'rb', buffering=0) as file:
        write_durably(target, new_name, iter(functools.partial(file.read, COPY_BYTES), b''), mode,
                      owner=owner_of(target), times=(status.st_atime_ns, status.st_mtime_ns))


def move(source: Folder, name: str, target: Folder, new_name: str, mode: int) -> None:
    """Rename a file; between file systems it is copied, with its time, and removed.  Raises OSError."""
    try:
        source.rename(name, target, new_name)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        copy_durably(source, name, target, new_name, mode)
        source.unlink(name)


def is_left_over(folder: Folder, name: str, now: float) -> bool:
    """Whether a scratch file was abandoned; `now` is the file system's.  Raises FileNotFoundError."""
    free = None
    if SCRATCH_PREFIX in name:
        with contextlib.suppress(OSError):
            fd = folder.open(name, os.O_RDWR | _READ_FLAGS)
            try:
                free = lock_file(fd)
            finally:
                os.close(fd)
    # By ctime, since an upload that replaces an object has the object's mtime.
    return folder.stat(name).st_ctime < now - SCRATCH_SECONDS if free is None else free


def remove_left_overs(folder: Folder, names: List[str], now: Callable[[], float]) -> None:
    """Remove scratch files if they were abandoned; `now` is the file system's clock.  Raises OSError."""
    moment = now() if names else 0.0
    for name in names:
        with contextlib.suppress(FileNotFoundError):  # another server removes them, too
            if is_left_over(folder, name, moment):
                folder.unlink(name)
                log.info('removed %s/%s, left by an interrupted upload', folder.path, name)


@contextlib.contextmanager
def exclusive(folder: Folder, *files: str) -> Iterator[None]:
    """Excludes other threads, and other processes where a folder and files in it can be locked."""
    with _renaming, contextlib.ExitStack() as stack:
        for name in ('.', *files):
            with contextlib.suppress(OSError):
                fd = folder.open(name, os.O_RDONLY)
                stack.callback(os.close, fd)
                lock_file(fd, wait=True)
        yield


def disk_space(path: str) -> Any:
    """The bytes of a file system, `total` and `free`; None where they are not known."""
    import shutil
    try:
        return shutil.disk_usage(path or os.sep)
    except OSError:
        return None


# ==== Read ahead =================================================================================
# On a network file system or a spinning disk each inode costs a round trip, and a thread that asks for them
# in turn waits most of the time.  Where that is so (Pace), a few helper threads read meanwhile: the next
# folders for read_ahead(), the next objects of a large folder for read_in_pieces().  If no helper is free,
# the caller reads by itself: it never waits for a helper that is busy elsewhere.

HELPERS = 8                       # Threads of a process that read ahead.
HELPERS_AT_LEAST = 3              # For one slow list: reading an inode also takes processor time.
UNUSED_AT_MOST = 32               # Folders and pieces that have been read ahead and not been used.
PIECE = 16                        # Objects of a large folder that a helper reads at a time.
FAST_PIECE = 256                  # The same without helpers; and the least for pieces in a folder of many.
WAIT_SECONDS = 0.0003             # Shorter waits are not worth a thread.
PACE_SECONDS = 0.005              # Time between two measurements of the pace.
HELPED_READS = 512                # Reads by helpers after which the pace is measured again.
# A folder of objects: its kind, how their names begin, and open(): the Folder (empty if missing), or OSError.
ObjectFolder = collections.namedtuple('ObjectFolder', ['kind', 'prefix', 'open'])


class Pace:
    """Decides how many `helpers` reading is worth, 0 if it does not wait for the disk.  Since they also wait
    for each other, they are granted for HELPED_READS, and then the pace is measured again without them."""

    def __init__(self) -> None:
        self.helpers, self._left, self._due = 0, 0, 0.0

    def spend(self) -> None:
        self._left -= 1
        if self._left <= 0:
            self.helpers = 0

    def measure(self, read: Callable[[], T]) -> T:
        """Call read(), and find out how long it waits for the disk, not for processor or interpreter."""
        if self.helpers or time.perf_counter() < self._due:
            return read()
        begin, cpu_begin, sleeps_begin = _used()
        try:
            return read()
        finally:
            now, cpu, sleeps = _used()
            wall, cpu = now - begin, cpu - cpu_begin
            self._due = now + PACE_SECONDS
            if sleeps > sleeps_begin and wall - cpu > max(WAIT_SECONDS, wall / 16):
                self.helpers = min(HELPERS, HELPERS_AT_LEAST + int((wall - cpu) / max(cpu, 1e-6)))
                self._left = HELPED_READS


def _used() -> Tuple[float, float, int]:
    """Now, processor seconds of this process, and how much more often this thread has slept than lost the
    processor to others (getrusage(2)); where threads are not counted, as in macOS, the process."""
    try:
        import resource
    except ImportError:     # Windows, where a folder's entries come with all that is asked of them
        return time.perf_counter(), time.process_time(), 0
    usage = resource.getrusage(getattr(resource, 'RUSAGE_THREAD', resource.RUSAGE_SELF))
    return time.perf_counter(), time.process_time(), usage.ru_nvcsw - usage.ru_nivcsw


class Helpers:
    """Up to `limit` threads that read ahead for any caller, one for each job.  They are daemons, unlike
    ThreadPoolExecutor's: a disk that does not answer cannot hold up the end of the process."""

    def __init__(self, limit: int) -> None:
        # Each place is an item of a deque: a garbage collector may take and return some at any moment.
        self._free = collections.deque(range(limit))
        # What was read and is not used yet takes memory and descriptors.
        self._unused = collections.deque(range(UNUSED_AT_MOST))
        self._idents: Set[int] = set()

    def submit(self, job: Callable[[], T]) -> Optional[Future[T]]:
        """Have a helper do something, if one is free.  The future is to be given to end()."""
        # IndexError: no place is left; RuntimeError: no thread can be started.
        with contextlib.suppress(IndexError, RuntimeError), contextlib.ExitStack() as stack:
            for places in (self._free, self._unused):
                stack.callback(places.append, places.pop())
            future: Future[T] = Future()
            threading.Thread(target=self._do, args=(future, job), daemon=True).start()
            stack.pop_all()
            return future
        return None

    def end(self, future: Future[Any]) -> None:
        """Wait until a job is done; but not in a helper, where a garbage collector may end what was left."""
        if not self.are_calling():
            future.exception()
        self._unused.append(0)

    def are_calling(self) -> bool:
        return threading.get_ident() in self._idents

    def _do(self, future: Future[Any], job: Callable[[], Any]) -> None:
        unpin(True)
        self._idents.add(threading.get_ident())
        try:
            future.set_result(job())
        except BaseException as error:
            future.set_exception(error)
        finally:
            self._idents.discard(threading.get_ident())
            self._free.append(0)


helpers = Helpers(HELPERS)     # of this process


def read_ahead(sources: Iterable[Iterator[T]], pace: Optional[Pace] = None) -> Generator[T, None, None]:
    """The items of all iterators, one after the other.  Where reading waits for the disk, the first items
    of the next iterators are read meanwhile, until this generator is closed."""
    def first_of(source: Iterator[T]) -> Callable[[], List[T]]:
        return functools.partial(list, itertools.islice(source, 1))     # or nothing

    waiting, pace = iter(sources), pace or Pace()
    ahead: Deque[Tuple[Iterator[T], Optional[Future[List[T]]]]] = collections.deque()
    try:
        while True:
            for source in itertools.islice(waiting, max(pace.helpers + 1 - len(ahead), 0)):
                ahead.append((source, helpers.submit(first_of(source)) if pace.helpers else None))
            if not ahead:
                return
            source, future = ahead[0]
            if future:
                helpers.end(future)
                ahead[0] = source, None
                pace.spend()
                yield from future.result()
            else:
                yield from pace.measure(first_of(source))
            yield from source
            ahead.popleft()
    finally:
        for source, future in ahead:
            if future:
                helpers.end(future)     # before what it reads is closed
            if not future or future.done():
                close_quietly(source)


def read_in_pieces(read: Callable[[List[S]], List[T]], entries: List[S], pace: Pace, least: int = PIECE
                   ) -> List[T]:
    """read(entries); more than `least` of them, where it waits for the disk, by helpers a piece each."""
    if len(entries) <= least or helpers.are_calling():
        return read(entries)

    def pieces() -> Iterator[Iterator[List[T]]]:
        begin = 0
        while begin < len(entries):
            end = begin + (PIECE if pace.helpers or not begin else FAST_PIECE)
            yield map(read, [entries[begin:end]])
            begin = end

    return list(itertools.chain.from_iterable(read_ahead(pieces(), pace)))


def names_and_sizes(source: ObjectFolder, sizes: bool, pace: Pace) -> Iterator[Tuple[List[str], List[int]]]:
    """Names and, with `sizes`, bytes of the objects in a folder, in batches.  Raises OSError."""
    with source.open() as folder, _scan(folder.path, folder.fd) as scanned:
        for entries in object_batches(scanned, source.prefix):
            if sizes:
                statuses = _statuses(folder, entries, source.prefix, pace)
                yield [entry.name for entry, _ in statuses], [status.st_size for _, status in statuses]
            else:
                yield [entry.name for entry in entries], []


def entries_and_statuses(folder: Folder, prefix: str = '') -> Iterator[EntryStatus]:
    """The objects in a folder and what stat(2) says of them."""
    pace = Pace()
    with _scan(folder.path, folder.fd) as scanned:
        for entries in object_batches(scanned, prefix):
            try:
                yield from _statuses(folder, entries, prefix, pace)
            except OSError:     # give all before the entry that cannot be read
                for entry in entries:
                    yield from _statuses(folder, [entry], prefix, pace)


def _statuses(folder: Folder, entries: List[os.DirEntry[str]], prefix: str, pace: Pace) -> List[EntryStatus]:
    """The entries that have not been deleted since the directory was read, and what stat(2) says of them.
    DirEntry.stat() would hold the interpreter's lock, and with it all requests, while the disk seeks."""
    fd = folder.fd

    def read(entries: List[os.DirEntry[str]]) -> List[EntryStatus]:
        statuses = []
        for entry in entries:
            try:
                statuses.append((entry, os.stat(entry.name, dir_fd=fd, follow_symlinks=False)
                                 if fd is not None else entry.stat(follow_symlinks=False)))
            except FileNotFoundError:
                pass
            except OSError as error:
                error.filename = f'{folder.path}/{entry.name}'
                raise
        return statuses

    # More at a time in data/, which has 256 folders that are read at once.
    return read_in_pieces(read, entries, pace, FAST_PIECE if prefix else PIECE)


# ==== Counters ===================================================================================
# Statistics in memory that all processes of the server share.
#
# Theory of operation.  Each process writes to a slot of its own and reads all slots, so that no process
# waits for another; within a process, `lock` guards them.  A slot is the number of its words in use and
# rows; a row is its width, the length of its key in bytes, its numbers and its key.  Rows are only
# appended, and stay as long as the server runs, also those of a repository that was deleted.
#
# The repositories of a top-level folder may use a part of a slot; what has no room is counted as OTHER.

# Address space for a slot; rows take memory: 80,000 repositories, 20,000 where addresses have 32 bits.
SLOT_BYTES = (144 if sys.maxsize > 1 << 32 else 32) << 20
SPARE_BYTES = 2 << 20       # Part of a slot for rows that do not belong to a repository.
FOLDER_PART = 4             # The repositories of a top-level folder may use 1/4 of the rest.
OTHER = 'other'             # Key instead of a repository's path, which begins with a slash.
CONNECTIONS = ('connections',)  # Row: connections admitted, connections served.
REFUSED_LOGINS = ('refused',)   # Row: logins with a wrong user or password.
# Gauges: zeroed when their process dies.
_GAUGES = ('connections', 'addresses', 'reserved')
# Position of the repository in the keys of rows that belong to one.
_OF_REPOSITORIES = {'held': 1, 'history': 1, 'snapshot': 1, 'blob': 2}
_OF_SCOPES = ('scope', 'rowless', 'reserved')   # Rows of a quota's scope, the second word.


def shared_memory(length: int) -> memoryview:
    """Words of memory, zero at first, that forked processes share: `length` bytes and a page.  Pages that
    nobody touches take none.  Raises OSError."""
    import mmap
    length += mmap.PAGESIZE
    if length > sys.maxsize:    # mmap() raises OverflowError
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    more = {}
    if sys.platform.startswith('linux'):    # mmap(2)
        more['flags'] = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | getattr(mmap, 'MAP_NORESERVE', 0x4000)
    return memoryview(mmap.mmap(-1, length, **more)).cast('q')


class Counters:
    """Rows of integers by key, a tuple of strings, in memory that forked processes share; a reader may see
    one half updated.  `rows` are this process's, changed with `lock`; join() replaces them after a fork."""

    def __init__(self, slots: int = 1) -> None:
        size, self.slots = SLOT_BYTES, slots
        while True:
            try:
                words = shared_memory(slots * size)
                break
            except OSError as error:    # a system that promises no more than it has (vm.overcommit_memory)
                if size <= 4 << 20:
                    raise OSError(error.errno, f'{error.strerror} for the counters of {slots} processes'
                                  ) from None
                size //= 2
        size //= 8
        self._slots = [words[slot * size:(slot + 1) * size] for slot in range(slots)]
        self.join(0)

    def join(self, slot: int) -> None:
        """Write to `slot` from now on, and continue with the rows that are there."""
        self._own = slot
        self.lock = threading.Lock()
        self.rows: Dict[Key, memoryview] = {}
        self._taken: collections.Counter[str] = collections.Counter()   # words in use, by top-level folder
        self._looked = [1] * len(self._slots)   # how far each slot was read
        self._by_kind: Dict[str, Dict[Key, List[memoryview]]] = {}     # what was read
        self._is_full = False
        self.clear(slot)
        self._find('')

    def clear(self, slot: int) -> None:
        """Zero the gauges in the slot of a process that has died."""
        for key, row, _ in _rows_of(self._slots[slot]):
            if key[0] in _GAUGES:
                row[:] = memoryview(bytes(row.nbytes)).cast('q')

    def add(self, key: Key, *amounts: int) -> bool:
        """Add to the numbers of this process's row; False if they were counted elsewhere for lack of room."""
        with self.lock:
            row = self.row(key, len(amounts))
            for position, amount in enumerate(amounts):
                row[position] += amount
            return key in self.rows

    def put(self, key: Key, *values: int) -> bool:
        """Set the numbers of this process's row; False if there is no room for one."""
        with self.lock:
            row = self.row(key, len(values))
            if key in self.rows:
                row[:] = memoryview(struct.pack(f'{len(values)}q', *values)).cast('q')
            return key in self.rows

    def row(self, key: Key, width: int) -> memoryview:
        """This process's row, added if need be; without room that of OTHER, or a dummy.  With `lock`."""
        return self.rows.get(key) or self._new_row(key, width)

    def _new_row(self, key: Key, width: int) -> memoryview:
        slot, folder = self._slots[self._own], _folder_of(key)
        text = '\0'.join(key).encode('utf-8', 'surrogateescape')
        words = memoryview(struct.pack('2q', width, len(text)) + bytes(8 * width)
                           + text + bytes(-len(text) % 8)).cast('q')
        end, limit = 1 + slot[0] + len(words), len(slot) - (SPARE_BYTES // 8 if folder else 0)
        if end <= limit and (not folder or self._taken[folder] + len(words) <= limit // FOLDER_PART):
            slot[1 + slot[0]:end] = words
            slot[0] += len(words)   # from now on, other processes see it
            self._find('')
            return self.rows[key]
        if not self._is_full:
            self._is_full = True
            log.warning('too many repositories to count each one; the rest is counted as "%s"', OTHER)
        position = _OF_REPOSITORIES.get(key[0], 0)
        if position and key[position] != OTHER:
            return self.row((key[0], *[''] * (position - 1), OTHER, *key[position + 1:]), width)
        return memoryview(bytearray(8 * width)).cast('q')

    def read(self, key: Key) -> List[List[int]]:
        """The rows under a key, one for each process that has one."""
        with self.lock:
            return [row.tolist() for row in self._find(key[0]).get(key, ())]

    def read_word(self, key: Key, position: int) -> List[int]:
        """A number of each of these rows."""
        with self.lock:
            return [row[position] for row in self._find(key[0]).get(key, ())]

    def total(self, key: Key, width: int) -> List[int]:
        """The `width` numbers under a key, summed over all processes."""
        return [sum(numbers) for numbers in zip(*self.read(key))] or [0] * width

    def names(self, kind: str) -> Set[str]:
        """The second words of the keys that begin with `kind`."""
        with self.lock:
            return {key[1] for key in self._find(kind)}

    def find(self, kind: str) -> Dict[Key, List[int]]:
        """All rows whose keys begin with `kind`, summed over all processes."""
        with self.lock:
            return {key: [sum(numbers) for numbers in zip(*rows)] for key, rows in self._find(kind).items()}

    def _find(self, kind: str) -> Dict[Key, List[memoryview]]:
        """The rows whose keys begin with `kind`, with those that were added since the last look."""
        for slot, words in enumerate(self._slots):
            if self._looked[slot] > words[0]:
                continue
            for key, row, size in _rows_of(words, self._looked[slot]):
                self._by_kind.setdefault(key[0], {}).setdefault(key, []).append(row)
                self._looked[slot] += size
                if slot == self._own:
                    self.rows[key] = row
                    self._taken[_folder_of(key)] += size
        return self._by_kind.get(kind, {})


def _rows_of(slot: memoryview, at: int = 1) -> Iterator[Tuple[Key, memoryview, int]]:
    """The rows of a slot from a word on: the key, the numbers, and the words that they take."""
    end = 1 + slot[0]
    while at < end:
        width, length = slot[at:at + 2].tolist()
        words = 2 + width + -(-length // 8)
        text = slot[at + 2 + width:at + words].tobytes()[:length].decode('utf-8', 'surrogateescape')
        yield tuple(text.split('\0')), slot[at + 2:at + 2 + width], words
        at += words


def _folder_of(key: Key) -> str:
    """The top-level folder of a row's repository or scope; empty for rows without one."""
    position = _OF_REPOSITORIES.get(key[0], int(key[0] in _OF_SCOPES))
    return key[position].lstrip('/').partition('/')[0] if position and key[position] != OTHER else ''


# ==== Bandwidth ==================================================================================
# The limit on the bytes a second that all connections together may send and receive.

class Bandwidth:
    """The limit that a timetable sets, until toggle() lifts it.  First come, first served; time that was not
    used is lost.  Processes that share `counters` share it.  `clock` is monotonic, `today` the local time."""

    SENT, RECEIVED = 1, 2  # the fields of a TimetableEntry

    def __init__(self, timetable: List[TimetableEntry], counters: Counters,
                 clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep,
                 today: Callable[[], time.struct_time] = time.localtime) -> None:
        self._timetable, self._counters = timetable, counters
        self._clock, self._today, self._sleep = clock, today, sleep
        self._entry, self._next_look = timetable[0], -math.inf
        self._lock = threading.Lock()

    def toggle(self) -> bool:
        """Lift the limit, or put it in force again; whether it is lifted now."""
        self._counters.add(('bandwidth', 'toggled'), 1)
        return self._is_lifted()

    def _is_lifted(self) -> bool:
        return bool(self._counters.total(('bandwidth', 'toggled'), 1)[0] & 1)

    def rate(self, direction: int) -> int:
        """The limit in force, in bytes a second; 0 is none."""
        if self._clock() >= self._next_look:
            self._next_look, today = self._clock() + 1, self._today()
            now = (today.tm_wday * 24 + today.tm_hour) * 60 + today.tm_min
            # The entry that began last; before the first of the week it is the last of the week before.
            self._entry = min(self._timetable, key=lambda entry: (now - entry.minute) % _WEEK)
        return 0 if self._is_lifted() else int(self._entry[direction])

    def step(self, direction: int, count: int) -> int:
        """How many of `count` bytes may pass at a time: those of 20 ms, to be smooth and fair."""
        rate = self.rate(direction)
        return min(count, max(rate // 50, 512)) if rate else count

    def wait(self, direction: int, count: int) -> None:
        """Wait until `count` bytes may pass."""
        rate = self.rate(direction)
        if not rate:
            return
        key = ('bandwidth', str(direction))     # when the next bytes may pass, in nanoseconds
        with self._lock:
            now = self._clock()
            begin = max(now, *(row[0] / 1e9 for row in self._counters.read(key)), 0)
            self._counters.put(key, int((begin + count / rate) * 1e9))
        if begin > now:
            self._sleep(begin - now)


# ==== Store ======================================================================================
# Repositories and objects as files in restic's own local layout.  An object is whole or absent: it is
# written where no list shows it, verified, synced to the disk, and then linked to its name, and the
# folder is synced.
#
# A folder is opened by its path where only root and the server's user can change what the path leads
# to, which is checked once a second.  Elsewhere, such as where root serves a directory that a user owns,
# each folder on the way is opened through the descriptor of its parent.

KINDS = ('data', 'index', 'keys', 'locks', 'snapshots')
DEEPEST = 64                      # Most segments of a repository's path.
LONGEST = 255                     # Most bytes of a repository's path.
HIDDEN = '.restic_serve'          # Folder in DIR for the server's own files.
DELETED = f'{HIDDEN}/deleted'     # Folder of a repository for what was deleted from it.
AT = '.at'                        # Segment of a path before the moment at which a repository is read.
PROBE_PREFIX = '.restic_serve-probe-'   # File in DIR with which the file system is tried.
SMALL_BYTES = 64 * 1024           # Largest content that is read and sent in one go.
READ_ONLY = 'the server is read-only'
_NOT_ITS_NAME = 'SHA-256 of the content is {}, not the name'
_SUBDIRECTORY = re.compile('[0-9a-f]{2}')
_NO_HARD_LINKS = (errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK,
                  errno.EINVAL, errno.EXDEV)     # EACCES on Android
# Paths at or below folders of file systems, NAS and desktops for snapshots and waste; Timeshift's is on top.
_OF_SYSTEMS = re.compile(
    r'(?is)(?:.*/(?:\.snapshots?|\.zfs|[#@](?:snapshot|recycle|recently-snapshot|eadir|tmp|sharebin)|\.recycle|'
    r'lost\+found|found\.[0-9]{3}|\$recycle\.bin|system volume information|\.trash(?:es|-[^/]*)?|'
    r'\.(?:spotlight-v100|fseventsd|documentrevisions-v100|temporaryitems|@__thumb))|/timeshift(?:-btrfs)?)'
    r'(?:/|\Z)')
LOCK_SECONDS = 1800               # Age at which restic takes a lock for stale; its own it renews every 300.
# Result of an upload: new objects (0 or 1), bytes of the object before and after, folders created.
Saved = collections.namedtuple('Saved', ['objects', 'before', 'after', 'folders'])


class Location:
    """What a request's path names: a repository (its kind is empty), a list (its name is empty) or an
    object; `config` is an object without a name.  `repository` is `` or `/host1/...`; `folder` is the path
    below DIR of the folder that holds the object or is listed, `file` the object's name in it; `at` is the
    moment in the past that the path names, if any.  Immutable: requests share it."""

    __slots__ = ('repository', 'kind', 'name', 'at', 'is_object', 'folder', 'file')

    def __init__(self, repository: str, kind: str = '', name: str = '', at: str = '') -> None:
        self.repository, self.kind, self.name, self.at = repository, kind, name, at
        self.is_object = bool(name) or kind == 'config'
        self.file = name
        self.folder = f'{repository}/{kind}/{name[:2]}' if name and kind == 'data' else f'{repository}/{kind}'
        if kind in ('', 'config'):
            self.folder, self.file = repository, kind

    def __str__(self) -> str:
        return '/'.join([self.repository, *filter(None, (self.kind, self.name))]) or '/'


# Characters that no segment may contain: control characters, and what is special on Windows.
_NO_FILE_NAME = re.compile(r'[\x00-\x1f\x7f\\:]' if os.name == 'nt' else r'[\x00-\x1f\x7f]')
RESERVED = ('reserved name: a repository path cannot contain data, index, keys, locks, snapshots, config, '
            ".at, .restic_serve or names of a file system's own folders")
# No segment of a repository's path; nor are the server's own names, in any spelling.
_RESERVED = frozenset((*KINDS, 'config'))


@functools.lru_cache(maxsize=1024)
def check_repository(path: str, ignore_case: bool) -> str:
    """A repository's path, if it is valid.  Raises InvalidPath and ReservedName."""
    if not path:
        return path
    if ignore_case:
        path = path.lower()
    segments = path.split('/')
    if segments.pop(0):
        raise InvalidPath('path must begin with a slash')
    for segment in segments:
        if segment in ('', '.', '..') or _NO_FILE_NAME.search(segment):
            raise InvalidPath('path contains an invalid segment')
    if len(segments) > DEEPEST:
        raise InvalidPath(f'path has more than {DEEPEST} segments')
    if len(path.encode('utf-8', 'surrogateescape')) > LONGEST:
        raise InvalidPath(f'path is longer than {LONGEST} bytes')
    if _OF_SYSTEMS.match(path) or any((segment.casefold() if ignore_case else segment) in _RESERVED
                                      for segment in segments):
        raise ReservedName('not found')
    if ignore_case and any(segment.casefold() != segment or segment.rstrip('. ') != segment
                           for segment in segments):    # which may be another's name here
        raise InvalidPath('path contains a name that the file system cannot store')
    if any(segment.rstrip('. ').casefold() in (HIDDEN, AT) for segment in segments):
        raise ReservedName('not found')
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        raise InvalidPath('path contains a character that is not allowed in file names') from None
    return path


# A folder that is, or may hold, a repository: its path below DIR, the folder and its entries, which stay
# open until the next one, and whether it is a repository.
WalkedFolder = collections.namedtuple('WalkedFolder', ['path', 'folder', 'entries', 'is_repository'])


def _shows_repository(entry: os.DirEntry[str]) -> bool:
    """Whether a folder with this entry is taken for a repository, be it a damaged one."""
    return entry.name == 'config' or entry.name in KINDS


def _repository_of(path: str) -> str:
    """The part of a path below DIR that comes before the folders in a repository."""
    return '/'.join(itertools.takewhile(lambda name: name not in KINDS, path.split('/')))


class Folders:
    """The folders below the directory `root`.  Trusted ones are opened by path, others step by step; see
    the chapter's opening.  With `shared` new ones are accessible to the group: 0770 instead of 0700."""

    def __init__(self, root: str, shared: bool) -> None:
        self.root, self._shared = root, shared
        self._mode, self.file_mode = (0o770, 0o660) if shared else (0o700, 0o600)
        self.for_owners = False     # new folders belong to the owner of the folder that they are in
        self._root_fd: Optional[int] = None
        self._ways = Remembered()
        self._has_proc = os.path.isdir('/proc/self/fd')     # shows the path of a descriptor
        self.nothing = Folder(f'{os.devnull}/missing')      # stands for a folder that is missing

    def open(self, path: str, *, by_descriptor: bool = False) -> Folder:
        """A folder below the root, or the root itself.  Without `by_descriptor` it may turn out to be missing
        only when it is used.  Raises OSError, and as find_trusted() does."""
        folder = self.find_trusted(path)
        if not folder:
            return Folder(self.root + path, self._descend(path))
        if by_descriptor and not _HAS_DIR_FD:
            os.stat(folder.path)    # for what open(2) would say
        elif by_descriptor:
            return Folder(folder.path, os.open(folder.path, _FOLDER_FLAGS))
        return folder

    def open_to_scan(self, path: str) -> Folder:
        """A folder below the root, opened for scanning; a missing one has no entries.  Raises OSError."""
        try:
            return self.open(path, by_descriptor=True)
        except (FileNotFoundError, NotADirectoryError):
            if not os.path.lexists(self.root + path):
                return self.nothing
        return self.open(path, by_descriptor=True)  # it was made between the two looks

    def open_part(self, data: Folder, path: str, name: str) -> Folder:
        """A folder in `data`, which is open and has this path below the root, as open_to_scan() gives it;
        also where the disk has just been unmounted, so that it does not look empty."""
        if data.fd is not None:
            try:
                return Folder(f'{data.path}/{name}', data.open(name, _FOLDER_FLAGS | os.O_NOFOLLOW))
            except OSError as error:    # a link, or it has gone
                if error.errno not in (errno.ENOENT, *_LINK_ERRORS):
                    raise
        return self.open_to_scan(f'{path}/{name}')

    def hidden(self, make: bool = True) -> Folder:
        """The folder for the server's own files, created if it is missing; never one behind a link."""
        path = f'{self.root}/{HIDDEN}'
        with self.open('') as top:
            if not _HAS_DIR_FD:
                self.make(f'/{HIDDEN}')
                return Folder(path)
            try:
                return Folder(path, top.open(HIDDEN, _FOLDER_FLAGS | os.O_NOFOLLOW))
            except FileNotFoundError:
                if not make:
                    raise
            except OSError as error:
                if error.errno not in _LINK_ERRORS:
                    raise
                raise PermissionError(errno.EACCES, 'expected a directory, found a link or file; remove it',
                                      path) from None
        self.make(f'/{HIDDEN}')
        return self.hidden(make=False)

    def missing(self, path: str) -> int:
        """How many folders make() would create for a path."""
        return 1 + self.missing(path.rpartition('/')[0]) if path and not self.is_there(path) else 0

    def find_trusted(self, path: str) -> Optional[Folder]:
        """A folder, perhaps missing, if it can be opened by its path, else None.  Raises PermissionError for
        a repository behind a link that leads out of the directory."""
        return self._ways.get(path, self._look)[0]

    def _look(self, path: str) -> Tuple[Optional[Folder], bool]:
        """Check a folder, after its parent: the folder if it is trusted, and whether the way has a link."""
        if not path:
            return Folder(self.root or os.sep) if is_trusted(self.root or os.sep) else None, False
        above, _, name = path.rpartition('/')
        folder, has_link = self._ways.get(above, self._look)
        if folder:
            trusted, is_link = is_trusted_entry(folder.path, name)
            folder, has_link = Folder(self.root + path) if trusted else None, has_link or is_link
        if folder and has_link:
            repository = _repository_of(path)
            self._check_inside(os.path.realpath(self.root or os.sep),
                               os.path.realpath(self.root + repository), repository)
        return folder, has_link

    def _check_inside(self, top: str, folder: str, repository: str) -> None:
        """Raises PermissionError for a repository that is really elsewhere; folders in it may be."""
        if not os.path.join(folder, '').startswith(os.path.join(top, '')):
            raise PermissionError(errno.EACCES, 'symbolic link leads out of the served directory',
                                  self.root + repository)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        if self._root_fd is not None:
            close(self._root_fd)

    def hold_root(self, anew: bool = False) -> int:
        """A descriptor of the directory itself.  Raises OSError, also for a link of another user's."""
        if anew or self._root_fd is None:
            self._root_fd = descend_from_root(self.root)
        return self._root_fd


    def _descend(self, path: str) -> int:
        """A descriptor of a folder whose path is not trusted."""
        root_fd = self.hold_root()
        try:
            return descend(root_fd, path, links=0)
        except OSError as error:
            if error.errno not in _LINK_ERRORS:
                raise
        repository = _repository_of(path)
        fd = descend(root_fd, repository, LINKS_AT_MOST if self._has_proc else 0)
        try:
            if self._has_proc:
                self._check_inside(os.readlink(f'/proc/self/fd/{root_fd}'),
                                   os.readlink(f'/proc/self/fd/{fd}'), repository)
            return descend(fd, path[len(repository):])
        finally:
            os.close(fd)

    def is_there(self, path: str) -> bool:
        folder = self.find_trusted(path)
        if folder:
            return os.path.isdir(folder.path)
        try:
            os.close(self._descend(path))
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def spell(self, path: str) -> str:
        """A path in the Unicode form in which it is on the disk, NFC where it is not, so that a place is one
        folder.  Raises PermissionError for another form of a folder than NFC where both are there."""
        import unicodedata
        spelled = ''
        for name in path.split('/')[1:]:
            nfc, there = unicodedata.normalize('NFC', name), {}     # type: str, Dict[str, Tuple[int, int]]
            for form in () if name.isascii() else (nfc, name, unicodedata.normalize('NFD', name)):
                with contextlib.suppress(FileNotFoundError, NotADirectoryError), \
                        self.open(f'{spelled}/{form}', by_descriptor=True) as folder:
                    there[form] = folder.identity()
            if name in there and there.get(nfc, there[name]) != there[name]:
                raise PermissionError(errno.EACCES, 'another folder has this name in Unicode form NFC; move '
                                      'what is in this one', f'{self.root}{spelled}/{name}')
            spelled += f'/{next(iter(there), nfc)}'
        return spelled

    def make(self, path: str, certain: bool = False) -> int:
        """Create a folder below the root and its parents, where they are missing; how many were.  Each is
        synced into its parent; with `certain` also those that another request may have made just now."""
        if not path or (not certain and self.is_there(path)):
            return 0
        above, _, name = path.rpartition('/')
        made = self.make(above, certain)
        with self.open(above) as parent:
            if self._make_in(parent, name):
                return made + 1
        if not self.is_there(path):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), self.root + path)
        return made

    def make_root(self, path: str) -> None:
        parent, name = os.path.split(path)
        if not os.path.isdir(parent):
            self.make_root(parent)
        if not self._make_in(Folder(parent), name):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)

    def _make_in(self, parent: Folder, name: str) -> bool:
        """Create a folder in another, and sync it; False if there is one, or a file."""
        made = False
        with contextlib.suppress(FileExistsError):
            os.mkdir(parent.at(name), self._mode, dir_fd=parent.fd)
            made = True
        if made and (self._shared or self.for_owners) and _HAS_DIR_FD:
            fd = parent.open(name, _FOLDER_FLAGS | os.O_NOFOLLOW)
            try:    # an inherited set-group-ID bit stays
                give_away(fd, owner_of(parent) if self.for_owners else None)
                set_mode(fd, stat.S_IMODE(os.fstat(fd).st_mode) | self._mode)
            finally:
                os.close(fd)
        parent.sync()
        return made

    def write_hidden(self, name: str, text: str) -> None:
        """Replace a file in the hidden folder; it is on the disk when this returns.  Where root runs the
        server, the file belongs to the owner of the directory.  Raises OSError."""
        with self.hidden() as folder:
            owner = owner_of(Folder(self.root or os.sep))
            if folder.fd is not None:
                give_away(folder.fd, owner)
            write_durably(folder, name, [text.encode()], self.file_mode, owner=owner)

    def read_hidden(self, name: str) -> str:
        """The text of a file in the hidden folder.  Raises OSError, also if it has more than RECORD_BYTES."""
        with self.hidden(make=False) as folder:
            fd, status = open_plain(folder, name)
            with open(fd, encoding='utf-8') as file:
                if status.st_size > RECORD_BYTES:
                    raise OSError(errno.EFBIG, f'larger than {format_size(RECORD_BYTES)}; remove it',
                                  f'{folder.path}/{name}')
                return file.read()

    def remove_left_overs(self, now: Callable[[], float]) -> None:
        """Remove scratch files that no process has locked; `now` is the file system's clock."""
        try:
            with self.open('', by_descriptor=True) as top:
                remove_left_overs(top, _names(top, PROBE_PREFIX), now)
            with contextlib.suppress(FileNotFoundError), self.hidden(make=False) as folder:
                remove_left_overs(folder, _names(folder, SCRATCH_PREFIX, FRESH_PREFIX), now)
        except OSError as error:
            log.error('cannot remove temporary files of interrupted uploads: %s', error)


class Scratch(ScratchFile):
    """The content of an upload before it is published under its name in the folder `target`, which has this
    path below the root of a store.  Where the system has O_TMPFILE it has no name, so that not even a crash
    leaves it behind; elsewhere one in the hidden folder, or in `target` if that is another file system."""

    def __init__(self, store: Store, path: str) -> None:
        self._store = store
        self.target = self.folder = store.folders.open(path)
        self.mode, self.name, self.fd = store.file_mode, '', -1
        self.opened = (self.target,) if self.target.fd is not None else ()
        try:
            if store.nameless:
                try:
                    self.fd = self.target.open('.', os.O_TMPFILE | os.O_RDWR | _BINARY, store.file_mode)
                except OSError as error:
                    # open(2): EISDIR and ENOENT are the answers of kernels that ignore the flag
                    if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                        raise
            if self.fd < 0:
                hidden = store.folders.hidden()
                self.opened += (hidden,)
                if hidden.identity()[0] == self.target.identity()[0]:
                    super().__init__(hidden, store.file_mode)
                else:
                    super().__init__(self.target, store.file_mode, f'{HIDDEN}-')
            if store.shared:
                set_mode(self.fd, store.file_mode)
        except BaseException:
            self.close()
            raise

    def publish(self, name: str, folder: Optional[Folder] = None) -> None:
        """Link the content to its name, perhaps in another folder.  Raises FileExistsError if it is taken."""
        target = folder or self.target
        new_name = f'{target.path}/{name}' if target.fd is None else name
        # A nameless file is linked with AT_SYMLINK_FOLLOW, which needs a src_dir_fd (before 3.14, os.link
        # calls plain link(2) without one); the path is absolute, so which descriptor it is means nothing.
        source, source_fd = ((self.folder.at(self.name), self.folder.fd) if self.name else
                             (f'/proc/self/fd/{self.fd}', self.fd))
        try:
            os.link(source, new_name, src_dir_fd=source_fd, dst_dir_fd=target.fd)
        except OSError as error:
            if not self.name or error.errno not in _NO_HARD_LINKS:
                raise
            with exclusive(target):
                try:
                    target.stat(name)
                except FileNotFoundError:
                    self.rename(target, name)
                else:
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new_name) from None

    def replace(self, name: str) -> None:
        """Give the content its name, replacing what is there."""
        if not self.name:
            hidden, scratch = self._store.folders.hidden(), f'{FRESH_PREFIX}{os.urandom(8).hex()}'
            self.opened += (hidden,)
            try:    # where a start finds what a crash leaves
                self.publish(scratch, hidden)
                self.folder = hidden
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                scratch = f'{HIDDEN}-{scratch}'
                self.publish(scratch)
            self.name = scratch
        self.rename(self.target, name)


# The server's own files there: the results of --scrub, the events that were told to --on-event, trusted time.
SCRUB_FILE, EVENTS_FILE, TIME_FILE = 'scrub.json', 'events.json', 'time'
RECORD_BYTES = 8 << 20            # Largest of these files that is read: parsing takes many times the memory.


def _names(folder: Folder, *prefixes: str) -> List[str]:
    with _scan(folder.path, folder.fd) as entries:
        return [entry.name for entry in entries if entry.name.startswith(prefixes)]


class Directory:
    """The directory of a store, which may go away while the server runs; `probe` tries to write in it."""

    def __init__(self, root: str, read_only: bool, probe: Callable[[], None]) -> None:
        self.read_only, self._root, self._probe = read_only, root, probe
        self._identity: Optional[Tuple[int, int]] = None    # device and inode
        self._is_mount, self._covering = True, threading.Lock()
        self.on_cover: Callable[[], object] = lambda: None      # called when a disk is mounted over it
        import mmap
        self._was_gone = mmap.mmap(-1, 1)   # for all processes, so that one of them says so
        self.on_change: Callable[[bool], object] = lambda is_gone: None     # called in that one
        self._fault = ''
        self._next_probe = -math.inf

    def identify(self) -> None:
        """Remember which directory it is.  Raises OSError."""
        status = os.stat(self._root or os.sep)
        self._identity, self._is_mount = (status.st_dev, status.st_ino), os.path.ismount(self._root or os.sep)

    def is_missing(self) -> bool:
        """Whether there is no directory yet: over --stdio only a new repository makes one."""
        return self._identity is None and not os.path.isdir(self._root or os.sep)

    def is_gone(self) -> bool:
        """Whether the directory is not the one that was there at the start: its disk was unmounted, and what
        is missing is not missing, and what is stored would be lost.  One process logs a change."""
        try:
            status = os.stat(self._root or os.sep)
            gone = self._identity not in (None, (status.st_dev, status.st_ino))
        except OSError:
            gone = self._identity is not None
        if gone and not self._is_mount and os.path.ismount(self._root):     # before, its disk was not mounted
            with self._covering:
                if not self._is_mount:
                    reload_log.log(NOTICE, 'a disk was mounted at %s; it is served from now on', self._root)
                    self.on_cover()
            gone = False
        if gone != self._was_gone[0]:
            self._was_gone[0] = gone
            if gone:
                log.error('%s is gone (disk unmounted?); all requests fail until it is back', self._root)
            else:
                log.log(NOTICE, '%s is back', self._root)
            self.on_change(gone)
        return gone

    def check_present(self) -> None:
        if self.is_gone():
            raise DirectoryGone("the server's directory is gone")

    def check_writable(self) -> None:
        """Raises DirectoryGone and, where it is read-only, ReadOnly."""
        self.check_present()
        if self.read_only:
            raise ReadOnly(f'{READ_ONLY} (--read-only, or its file system); use restic --no-lock')

    def find_fault(self) -> str:
        """Why the directory cannot be served, empty if it can; looked at once in LOOK_SECONDS."""
        now = time.monotonic()
        if now >= self._next_probe:
            self._next_probe = now + LOOK_SECONDS
            fault = 'the directory is gone' if self.is_gone() else ''
            try:
                if not (fault or self.read_only):
                    self._probe()
            except OSError:
                fault = 'the directory is not writable'
            self._fault = fault     # at once, since other threads answer with it
        return self._fault


class Store:
    """The directory `root`.  With `verify` an upload's SHA-256 must be its name; with `shared` the group may
    access new folders and files: 0770 and 0660 instead of 0700 and 0600; `read_only` refuses every change."""

    def __init__(self, root: str, *, verify: bool = True, shared: bool = False, read_only: bool = False
                 ) -> None:
        self.root = os.path.abspath(root).rstrip(os.sep)
        self.verify = verify
        self.directory = Directory(self.root, read_only, self._probe)
        self.directory.on_cover = self.prepare
        self.shared, self.folders = shared, Folders(self.root, shared)
        self.file_mode = self.folders.file_mode
        self.ignores_case = False   # whether the file system does
        # A nameless file gets its name through /proc; open(2) shows how under O_TMPFILE.
        self.nameless = hasattr(os, 'O_TMPFILE') and os.path.isdir('/proc/self/fd')

    def prepare(self, must_exist: bool = False) -> bool:
        """Create the directory if it is missing, unless it `must_exist`, test whether it can be written,
        and remove what a crash left behind.  Whether it was missing.  Raises OSError."""
        is_new = not os.path.isdir(self.root or os.sep)
        if is_new:
            if must_exist or self.directory.read_only:
                raise FileNotFoundError(errno.ENOENT, 'directory does not exist; is the disk mounted?',
                                        self.root)
            self.folders.make_root(self.root)
            log.log(NOTICE, 'created directory %s', self.root)
        if not self.folders.find_trusted(''):
            self.folders.hold_root(anew=True)
        self.directory.identify()
        where = self.root or os.sep
        if not self.directory.read_only:
            try:
                try_file_system(self)
            except OSError as error:
                if error.errno != errno.EROFS:
                    raise
                self.directory.read_only = True
                log.warning('%s is on a read-only file system; serving it read-only', where)
        if self.directory.read_only:
            self._detect_case()
        else:
            self.folders.remove_left_overs(self.now)
        if self.ignores_case:
            log.log(NOTICE, 'the file system of %s ignores case, so user names and paths are '
                    'case-insensitive', where)
        return is_new

    def remove_empty(self) -> None:
        """Remove the directory that prepare() has made, unless something is in it."""
        for path in (f'{self.root}/{HIDDEN}', self.root):
            with contextlib.suppress(OSError):
                os.rmdir(path)

    def find(self) -> None:
        """Find the directory for a job, and whether its file system ignores case.  What the job creates for
        root belongs to the owner of the directory.  Raises OSError."""
        self.folders.for_owners = True
        if not os.path.isdir(self.root or os.sep):
            fault = 'not a directory' if os.path.lexists(self.root) else 'directory does not exist'
            raise FileNotFoundError(errno.ENOENT, fault, self.root)
        self.directory.identify()
        self._detect_case()

    def _detect_case(self) -> None:
        """See by what is in the directory whether its file system ignores case.  Raises OSError."""
        with self.scan('') as (top, entries):
            self.ignores_case = any(is_there_in_other_case(top, entry.name) for entry in entries
                                    if entry.name != entry.name.swapcase())

    def _probe(self) -> None:
        with Scratch(self, '') as scratch:
            os.write(scratch.fd, b'ok')

    def open(self, location: Location) -> FileSlice:
        """The whole content of an object.  Raises OSError."""
        folder = self.folders.find_trusted(location.folder)
        if folder:
            fd, status = open_plain(folder, location.file)
        else:
            with self.folders.open(location.folder) as folder:
                fd, status = open_plain(folder, location.file)
        return FileSlice(fd, 0, status.st_size)

    def create_repository(self, repository: str) -> int:
        """Create the folders of a repository that are missing; how many there were.  All are on the disk
        when this returns, also those that another request has made just now."""
        return sum(self.folders.make(f'{repository}/{kind}', certain=True) for kind in KINDS)

    def has_repository(self, repository: str) -> bool:
        """Whether there is a repository, be it one without a config.  Raises OSError."""
        with self.scan(repository) as (_, entries):
            return any(map(_shows_repository, entries))

    def objects(self, location: Location, sizes: bool) -> Generator[Tuple[List[str], List[int]], None, None]:
        """Names and, with `sizes`, sizes in bytes of the objects of one kind, in batches and in the order
        of the directory, which is read on the way: OSError may be raised at any time."""
        pace = Pace()
        with self.object_folders(location.repository, location.kind) as folders:
            yield from read_ahead((names_and_sizes(folder, sizes, pace) for folder in folders), pace)

    @contextlib.contextmanager
    def object_folders(self, repository: str, *kinds: str) -> Iterator[Iterator[ObjectFolder]]:
        """The folders of a repository's objects of some kinds or all, to be opened within this context."""
        with contextlib.ExitStack() as stack:
            yield itertools.chain.from_iterable(self._folders_of(f'{repository}/{kind}', kind, stack)
                                                for kind in kinds or KINDS)

    def _folders_of(self, path: str, kind: str, stack: contextlib.ExitStack) -> Iterator[ObjectFolder]:
        if kind != 'data':
            yield ObjectFolder(kind, '', functools.partial(self.folders.open_to_scan, path))
            return
        try:
            data, entries = stack.enter_context(self.scan(path))
            for entry in entries:
                if _SUBDIRECTORY.fullmatch(entry.name):
                    yield ObjectFolder(kind, entry.name, functools.partial(
                        self.folders.open_part, data, path, entry.name))
        except OSError as error:    # raised where the folder is read
            yield ObjectFolder(kind, '', functools.partial(_raise, error))

    @contextlib.contextmanager
    def scan(self, path: str) -> Iterator[Tuple[Folder, Iterator[os.DirEntry[str]]]]:
        """A folder and its entries, none if it is missing.  Raises OSError."""
        with self.folders.open_to_scan(path) as folder, _scan(folder.path or os.sep, folder.fd) as entries:
            yield folder, entries

    def object_entries(self, path: str, prefix: str = '') -> Iterator[EntryStatus]:
        """The objects in a folder below the root whose names begin with `prefix`, as read() gives them."""
        return self.read(ObjectFolder('', prefix, functools.partial(self.folders.open_to_scan, path)))

    @staticmethod
    def read(source: ObjectFolder) -> Iterator[EntryStatus]:
        """The objects in a folder, and what stat(2) says of them.  Raises OSError."""
        with source.open() as folder:
            yield from entries_and_statuses(folder, source.prefix)

    def size(self, location: Location) -> Optional[int]:
        """Bytes of an object, None if it is missing."""
        try:
            with self.folders.open(location.folder) as folder:
                status = folder.stat(location.file)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def walk(self, on_error: Callable[[str, OSError], None]) -> Iterator[WalkedFolder]:
        """All folders that are, or may hold, repositories, in the order of their names.  `on_error` is called
        for those that cannot be read, perhaps after they were yielded.  It descends into no links."""
        fold: Callable[[str], str] = str.lower if self.ignores_case else str
        paths = ['']
        while paths:
            path = paths.pop()
            try:
                with self.scan(path) as (folder, scanned):
                    entries = sorted(scanned, key=operator.attrgetter('name'))
                    yield WalkedFolder(path, folder, entries, any(map(_shows_repository, entries)))
                    below = [fold(entry.name) for entry in entries if entry.is_dir(follow_symlinks=False)
                             and fold(entry.name) not in (*_RESERVED, HIDDEN)
                             and not _OF_SYSTEMS.match(f'{path}/{entry.name}')]
            except OSError as error:
                on_error(path, error)
                continue
            if path.count('/') < DEEPEST:
                paths += [f'{path}/{name}' for name in reversed(below)]

    def now(self, path: str = '') -> float:
        """Seconds since the epoch by the clock of a folder's file system; ours if no file can be created."""
        with contextlib.suppress(OSError):
            if not self.directory.read_only:
                with Scratch(self, path) as scratch:
                    scratch.date()
                    return os.fstat(scratch.fd).st_mtime
        return time.time()

    def delete(self, location: Location) -> Optional[int]:
        """Remove an object; its size in bytes, None if there was none."""
        try:
            with self.folders.open(location.folder) as folder:
                size = folder.stat(location.file).st_size
                folder.unlink(location.file)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return size

    def save(self, location: Location, body: Body) -> Saved:
        """Store an object; it is on the disk when this returns.  One that exists is compared with the body,
        and replaced if it is damaged.  Raises WrongContent, OtherConfig, NotHere and OSError."""
        made = 0
        if location.kind == 'config':
            self.require_repository(location)
        try:
            scratch = Scratch(self, location.folder)
        except FileNotFoundError:
            self.require_repository(location)
            made = self.folders.make(location.folder)
            scratch = Scratch(self, location.folder)
        try:
            digest = receive(body, location.name, scratch.fd, self.verify)
            saved = Saved(1, 0, os.fstat(scratch.fd).st_size, made)
            if not location.name and not saved.after:
                raise WrongContent('config is empty')
            while True:
                # Not before all has come: an appender who holds its end back inserts nothing into the past.
                scratch.date()
                sync_file(scratch.fd)
                try:
                    scratch.publish(location.file)
                    break
                except FileExistsError:
                    digest = digest or _digest(scratch.fd)
                    if location.name and digest != location.name:
                        raise WrongContent(_NOT_ITS_NAME.format(digest)) from None
                    before = self.size(location) or 0
                    if self._accept_existing(location, digest, scratch):
                        saved = Saved(0, before, self.size(location) or 0, made)
                        break
            scratch.target.sync()
        finally:
            scratch.close()
        return saved

    def require_repository(self, location: Location) -> None:
        """Raises NotHere where there is none, since no upload makes one: its disk may be away."""
        if not self.has_repository(location.repository):
            raise NotHere('no repository here; create one with restic init')

    def confirm(self, location: Location, body: Body) -> bool:
        """Compare an upload with the object that exists, instead of storing it again; False, without
        reading the upload, if that is damaged or missing.  Raises as save() does, and Busy."""
        try:
            stored = self._stored_digest(location)
        except (FileNotFoundError, NotADirectoryError):
            return False
        if location.name and stored != location.name:
            return False
        if receive(body, location.name) != stored:
            raise OtherConfig('a different config already exists')
        if self.size(location) is None:
            raise Busy('object was deleted during the upload', 1)
        with self.folders.open(location.folder) as folder:
            folder.sync()   # another upload may have stored it just now
        return True

    def _accept_existing(self, location: Location, digest: str, scratch: Scratch) -> bool:
        """Compare the object that exists with the upload in `scratch`, which replaces it if it is damaged;
        False if it has vanished.  Raises OtherConfig."""
        try:
            stored, status = self._stored_digest(location), scratch.target.stat(location.file)
        except FileNotFoundError:
            return False
        if stored == digest:
            return True
        if location.kind == 'config':
            raise OtherConfig('a different config already exists')
        path = f'{scratch.target.path}/{location.file}'
        try:    # it was uploaded then, for the past
            scratch.date((status.st_atime_ns, status.st_mtime_ns))
        except OSError as error:
            if self.folders.is_there(f'{location.repository}/{DELETED}'):
                raise OSError(error.errno, 'cannot keep the time of a damaged object when replacing it; '
                              'remove it and upload it again', path) from None
        sync_file(scratch.fd)
        scratch.replace(location.file)
        log.log(NOTICE, '%s was damaged (SHA-256 %s); replaced it with a verified upload', path, stored)
        return True

    def _stored_digest(self, location: Location) -> str:
        """Sync an object; its SHA-256 in hexadecimal, or `unreadable` where the disk fails."""
        try:
            with self.open(location) as stored:
                digest = _digest(stored.fd)
                sync_file(stored.fd)  # another upload may have stored it just now
                return digest
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return 'unreadable'


def receive(body: Body, name: str, fd: int = -1, verify: bool = True) -> str:
    """Read an upload to its end, and write it to a file, if there is one; its SHA-256 in hexadecimal, empty
    unless it is to be verified.  Raises WrongContent where that is not the object's `name`, if it has one."""
    digest = hashlib.sha256()
    length = body.piece if body.length is None else min(body.length, body.piece)
    buffer = memoryview(bytearray(max(length, 1)))
    for count in iter(functools.partial(body.readinto, buffer), 0):
        part = buffer[:count]
        if verify:
            digest.update(part)
        while part and fd >= 0:
            part = part[os.write(fd, part):]
    result = digest.hexdigest() if verify else ''
    if name and result not in ('', name):
        raise WrongContent(_NOT_ITS_NAME.format(result))
    return result


def _raise(error: OSError) -> NoReturn:
    raise error


def try_file_system(store: Store) -> None:
    """Find out what the file system of a store can do, with files of our own; where it is full, what needs
    none of them.  Raises OSError if none can be created."""
    name, full = f'{PROBE_PREFIX}{os.urandom(8).hex()}', (errno.ENOSPC, errno.EDQUOT)
    with store.folders.open('') as top:
        try:
            if store.nameless:
                try:
                    with Scratch(store, '') as scratch:
                        scratch.publish(name)
                    top.stat(name)  # over SMB it is gone with its descriptor
                except OSError as error:
                    if error.errno in (errno.EROFS, *full):
                        raise
                    log.debug('no nameless files in %s: %s', store.root or os.sep, error)
                    store.nameless = False
            with Scratch(store, '') as scratch:
                if is_there_in_other_case(scratch.folder, scratch.name or name):
                    store.ignores_case = True
                os.write(scratch.fd, b'ok')
                if not sync_file(scratch.fd):
                    log.warning('the file system of %s cannot sync files: recent uploads may be lost '
                                'in a power failure', store.root or os.sep)
        except OSError as error:
            if error.errno not in full:
                raise
            log.warning('%s: disk full: %s', store.root or os.sep, error.strerror)
        finally:
            with contextlib.suppress(OSError):
                top.unlink(name)


def is_there_in_other_case(folder: Folder, name: str) -> bool:
    """Whether a file with letters in its name is found by the same letters in the other case."""
    try:
        return folder.stat(name.swapcase()).st_ino == folder.stat(name).st_ino
    except OSError:
        return False


# ==== Past =======================================================================================
# What was deleted is kept for a time (--keep-deleted), so that a repository can be read, or rolled back
# to, as it was at any moment of that time.
#
# Theory of operation.  An object never changes: it exists from its upload, which is the time of its file
# (mtime), to its deletion; the clock of the repository's file system dates both.  So a repository at a
# moment is what had been uploaded and not deleted by then.  To delete is to rename, within the repository:
#
#     data/4f/4f53...   to   .restic_serve/deleted/data/4f/4f53....20261120T120000.123456Z
#
# The name has the time of deletion (UTC, to the microsecond) and the file keeps its time, so that a copy
# of the directory has the same past.  No request can name `.restic_serve`.  A roll-back renames the file
# back and leaves an empty mark, `4f53....<deletion>-<return>`: between the two the object did not exist.
# `.restic_serve/deleted/since.<time>` says from when on all deletions of the repository were kept; a
# server without --keep-deleted that deletes an object moves it on.
#
# Two servers may delete and purge in the same directory: every step is one rename(2) or unlink(2), and
# the second to try has nothing to do.  A list reads the deleted objects before and after the present ones,
# and again if a roll-back came between; what ends the past moves `since` on first, which a list reads last.
# A clock may be wrong: a time later than now counts as now, and a purge, which cannot be undone, is by the
# trusted time, which is kept in the hidden folder of DIR.  That goes on with the time that has passed since
# it was noted, as the uptime of the system shows or, where that was started anew, the time that this process
# has run.  If the clock is ahead, it catches up by a day for each hour that a process runs: a host that was
# off for six weeks purges within two days, one whose clock is wrong for an hour a day too early.

PURGE_SECONDS = 3600              # Time between two purges.
CATCH_UP = 24                     # Seconds that trusted time catches up with the clock in each of service.
AGREE_SECONDS = 60                # Largest difference of times that agree.
CLOCK_BEGIN = 1_767_225_600       # 2026: a clock that is earlier has not been set.
JUST_NOW_SECONDS = 60             # Time after which a mark that another request made is on the disk.
STDIO_PURGE_SECONDS = 2           # Longest purge at the end of a session of --stdio.
MOMENT_LETTERS = 40               # Longest text of a moment.
LOOKS_AT_MOST = 100               # Attempts to read a folder of the past while it changes.
_SINCE = 'since.'
_MONTH_TO_SECOND = '(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])T(?:[01][0-9]|2[0-3])[0-5][0-9][0-5][0-9]'
_TIME_OF_NAME = rf'[0-9]{{4}}{_MONTH_TO_SECOND}\.[0-9]{{6}}Z'
_SINCE_NAME = re.compile(rf'since\.{_TIME_OF_NAME}')
_DELETED_NAME = re.compile(rf'([0-9a-f]{{64}}|config)\.({_TIME_OF_NAME})(?:-({_TIME_OF_NAME}))?')
_MOMENT = re.compile(r'([0-9]{4}-[0-9]{2}-[0-9]{2})'
                     r'(?:[T ]([0-9]{2}:[0-9]{2})(?:(:[0-9]{2})(?:\.([0-9]{1,9}))?)?)?'
                     r'(Z|[+-][0-9]{2}:[0-9]{2}|)')

# A name in a folder of deleted objects: the object's file name, when it was deleted and, for a mark, when
# it came back (else empty), as text, which sorts by time.
DeletedName = collections.namedtuple('DeletedName', ['file', 'deleted', 'returned'])


def format_moment(moment: int) -> str:
    """A time in microseconds since the epoch as names have it, such as `20261120T120000.123456Z`."""
    seconds, microseconds = divmod(max(moment, 0), 10 ** 6)
    return f'{time.strftime("%Y%m%dT%H%M%S", time.gmtime(seconds))}.{microseconds:06}Z'


def read_moment(text: str) -> int:
    """The inverse of format_moment()."""
    import calendar
    month_to_second = [int(text[at:at + 2]) for at in (4, 6, 9, 11, 13)]
    return calendar.timegm((int(text[:4]), *month_to_second, 0, 0, 0)) * 10 ** 6 + int(text[16:22])


def parse_deleted_name(name: str) -> Optional[DeletedName]:
    """What a name in a folder of deleted objects says, None if it is not the server's."""
    match = _DELETED_NAME.fullmatch(name)
    return DeletedName(match[1], match[2], match[3] or '') if match else None


def parse_past(text: str, now: Optional[float] = None) -> int:
    """Microseconds since the epoch of a moment that has passed `now` (default: by our clock):
    `2026-11-20T12:00:00Z`, without Z in the local time zone, without seconds, a date alone, or a duration
    before `now` such as `36h`.  Raises ValueError."""
    import calendar
    now = time.time() if now is None else now
    # The length comes before anything that takes longer for more.
    is_short = len(text) <= MOMENT_LETTERS and text.isascii() and not text.isdecimal()
    match = _MOMENT.fullmatch(text) if is_short else None
    try:
        if match:
            date, clock, seconds, fraction, zone = match.groups()
            parsed = time.strptime(f'{date}T{clock or "00:00"}{seconds or ":00"}', '%Y-%m-%dT%H:%M:%S')
            whole = calendar.timegm(parsed) if zone else int(time.mktime(parsed))
            if len(zone) > 1:     # RFC 3339 4.2
                whole -= int(f'{zone[0]}1') * (int(zone[1:3]) * 60 + int(zone[4:])) * 60
            moment = whole * 10 ** 6 + int((fraction or '').ljust(6, '0')[:6])
        else:
            moment = int(max(now - parse_duration(text if is_short else ''), 0) * 1e6)
    except (ValueError, OverflowError):
        raise ValueError(f'invalid time {text[:MOMENT_LETTERS]!r}; use 2026-11-20T12:00:00Z, '
                         '2026-11-20T12:00, 2026-11-20, 36h or 2d') from None
    if moment > now * 1e6:
        raise ValueError(f'{text} is in the future')
    return moment


def moment_for_people(moment: int) -> str:
    """A time as parse_past() reads it, rounded up to seconds."""
    return time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(-(-moment // 10 ** 6)))


def _uptime() -> Tuple[str, float, float]:
    """What names this run of the system, and the seconds since it began, asleep too, and of this process."""
    try:
        with open('/proc/sys/kernel/random/boot_id', encoding='ascii') as file:
            return file.read().strip(), time.clock_gettime(time.CLOCK_BOOTTIME), time.monotonic()
    except (OSError, AttributeError):
        return f'unknown-{time.time_ns()}', 0, time.monotonic()


class Past:
    """What was deleted from the repositories of a `store`; it is kept for `keep_seconds`, or nothing is if
    that is 0.  Moments are microseconds since the epoch by `clock`."""

    def __init__(self, store: Store, keep_seconds: float = 0, clock: Callable[[], float] = time.time) -> None:
        self.keeps = keep_seconds > 0
        self._store, self._keep, self._clock = store, keep_seconds * 1e6, clock
        self._begun, self._ahead = Remembered(), Remembered()
        self._looked = _uptime()[2]     # when trusted_now() was called last
        self._is_steady = False         # the clock has gone as time has passed, for a while

    def now(self, repository: str, after: bool = False) -> int:
        """The time by the clock of a repository's file system, which dates uploads; with `after` not before
        any that has ended, and a tick of that clock too late at the most."""
        ahead, tick = self._ahead.get(repository, self._measure)
        return int((self._clock() + ahead + tick * after) * 1e6)

    def _measure(self, repository: str) -> Tuple[float, float]:
        """By how many seconds the clock of a repository's file system is ahead of ours, and its tick."""
        ours, there = self._clock(), self._store.now(repository)
        return there - ours, TICK_SECONDS if there % 1 else COARSE_SECONDS

    def delete(self, location: Location) -> Optional[int]:
        """Delete an object, which is kept unless it is a lock; its size in bytes, None if there was none.
        The folders are on the disk when this returns.  Raises OSError."""
        if location.kind == 'locks':
            return self._store.delete(location)
        if not self.keeps:
            if self._store.size(location) is not None:
                self._set_since(location.repository, self.now(location.repository))
            size = self._store.delete(location)
            if size is not None:
                self._set_since(location.repository, self.now(location.repository, after=True))
            return size
        path, size = deleted_folder(location), None
        try:
            source = self._store.folders.open(location.folder)
        except (FileNotFoundError, NotADirectoryError):
            return None
        status: Optional[os.stat_result] = None
        with source:
            with contextlib.suppress(FileNotFoundError):    # another request was faster
                status = source.stat(location.file)
            if status:
                if not stat.S_ISREG(status.st_mode):
                    raise IsADirectoryError(errno.EISDIR, 'not a regular file', source.at(location.file))
                self._begun.get(location.repository, self.begin)
                moment = self.now(location.repository, after=True)
                self._store.folders.make(path)
                with self._store.folders.open(path, by_descriptor=True) as target, \
                        contextlib.suppress(FileNotFoundError):     # likewise
                    move(source, location.file, target, f'{location.file}.{format_moment(moment)}',
                         self._store.file_mode)
                    size = status.st_size
            # Also what the other may not have synced yet.
            with contextlib.suppress(FileNotFoundError), self._store.folders.open(
                    path, by_descriptor=True) as target:
                target.sync()
            source.sync()
        return size

    def begin(self, repository: str) -> None:
        """Note that all deletions of a repository are kept from now on, unless that is so already.  The
        note is on the disk when this returns, also where another request has made it just now."""
        if not self.keeps:
            return
        path, since, now = f'{repository}/{DELETED}', self._since(repository), self.now(repository)
        if since is None or since > now - JUST_NOW_SECONDS * 1e6:
            self._store.folders.make(path, certain=True)
            with self._store.folders.open(path, by_descriptor=True) as folder:
                if since is None:
                    self.mark(folder, _SINCE + format_moment(now))
                folder.sync()
            if since and since > now + AGREE_SECONDS * 1e6 and now > CLOCK_BEGIN * 1e6:
                log.warning('%s: its past was to begin later than now (%s), and begins now',
                            repository[1:] or '/', moment_for_people(since))
                self._set_since(repository, now, later=False)

    def mark(self, folder: Folder, name: str) -> None:
        """Create an empty file, if it is missing."""
        fd = folder.open(name, os.O_WRONLY | os.O_CREAT | _BINARY, self._store.file_mode)
        give_away(fd, owner_of(folder))
        os.close(fd)

    def _set_since(self, repository: str, moment: int, later: bool = True) -> None:
        """Nothing before a moment is known any more, if it is `later` than that from which all is."""
        since = self._since(repository)
        if since is not None and (since < moment) == later:
            with self._store.folders.open(f'{repository}/{DELETED}', by_descriptor=True) as folder:
                with contextlib.suppress(FileNotFoundError):    # another server moves it, too
                    folder.rename(_SINCE + format_moment(since), folder, _SINCE + format_moment(moment))
                folder.sync()

    def _since(self, repository: str) -> Optional[int]:
        """From when on all deletions of a repository were kept; None if that is not known."""
        with self._store.scan(f'{repository}/{DELETED}') as (_, entries):
            marks = [entry.name[len(_SINCE):] for entry in entries if _SINCE_NAME.fullmatch(entry.name)]
        return read_moment(max(marks)) if marks else None

    def until(self, deleted: str) -> str:
        """When an object that was deleted at a time, as names have it, is purged."""
        return moment_for_people(int(read_moment(deleted) + self._keep))

    def earliest(self, repository: str, keep: Optional[float] = None) -> int:
        """The earliest moment at which a repository can be read: all that was deleted since is kept."""
        since, now = self._since(repository), self.now(repository)
        if since is None or since > now + AGREE_SECONDS * 1e6:      # a clock was wrong
            return now
        return int(max(since, now - (keep or self._keep)))

    def check_known(self, repository: str, moment: int, is_read: bool = False) -> None:
        """Raises NoHistory if a repository cannot be read at a moment or, once it `is_read`, was purged."""
        earliest = self.earliest(repository, math.inf if is_read else None)
        if moment < earliest:
            raise NoHistory(f'no history before {moment_for_people(earliest)}')

    def view(self, repository: str, at: str) -> View:
        """A repository as it was at a moment, in words.  Raises InvalidPath, NotHere and NoHistory."""
        if not self.keeps:
            raise NotHere('this server does not keep deleted objects (--keep-deleted)')
        try:
            moment = parse_past(at, self.now(repository, after=True) / 1e6)
        except ValueError as error:
            raise InvalidPath(str(error)) from None
        self.check_known(repository, moment)
        return View(self._store, self, moment)

    def kept(self, repository: str) -> Iterator[Tuple[Folder, os.DirEntry[str], DeletedName]]:
        """The deleted objects of a repository, and the marks of those that came back.  Raises OSError."""
        for folder, entry in self.entries(repository):
            if name := parse_deleted_name(entry.name):
                yield folder, entry, name

    def entries(self, repository: str) -> Iterator[Tuple[Folder, os.DirEntry[str]]]:
        """All that is in the folders of deleted objects.  Raises OSError."""
        with self._store.object_folders(f'{repository}/{DELETED}', *KINDS, 'config') as sources:
            for source in sources:
                with source.open() as folder, _scan(folder.path, folder.fd) as entries:
                    for entry in entries:
                        yield folder, entry

    def trusted_now(self) -> int:
        """The trusted time, which is noted.  Raises OSError and StorageError."""
        self._store.directory.check_writable()
        now, looked, (boot, uptime, self._looked) = self.now('') / 1e6, self._looked, _uptime()
        served = self._looked - looked
        try:
            noted, uptime_then, boot_then = self._store.folders.read_hidden(TIME_FILE).split()
            passed = uptime - int(uptime_then) if boot == boot_then else served
            expected = int(noted) + passed
            ahead = now - expected
            self._is_steady = abs(ahead) < AGREE_SECONDS and passed > PURGE_SECONDS / 2
            if not -AGREE_SECONDS < ahead < CATCH_UP * 3600:
                log.warning('the clock is %s %s the trusted time; purging by the earlier of the two',
                            format_duration(abs(ahead)), 'ahead of' if ahead > 0 else 'behind')
        except (OSError, ValueError):   # nothing was noted: it is not much later than the last deletion
            names = (name.deleted for folder in self._store.walk(lambda path, error: None)
                     if folder.is_repository for *_, name in self.kept(folder.path))
            last = max(names, default='')
            expected, self._is_steady = read_moment(last) / 1e6 if last else now, False
        trusted = min(now, expected + CATCH_UP * served)
        try:
            if now >= CLOCK_BEGIN:
                self._store.folders.write_hidden(TIME_FILE, f'{int(trusted)} {int(uptime)} {boot}\n')
        except OSError as error:    # a full disk needs a purge
            log.error('cannot note the time: %s', error)
        return int(trusted * 1e6)

    def purge(self, repository: str, trusted: int) -> Iterator[int]:
        """Remove what has been kept long enough, also by the `trusted` time, and what a crash has left
        half-written; yields the size of each object.  What is later than now, since a clock was wrong, gets
        the time of now.  Raises OSError."""
        now, count, size, where = self.now(repository), 0, 0, repository[1:] or '/'
        limit = int(max(min(now, trusted) - self._keep, 0))
        end, late = format_moment(limit), format_moment(now + AGREE_SECONDS * 10 ** 6)
        moments = map(format_moment, itertools.count(now))      # each once, for names that are not taken
        try:
            for folder, entry in self.entries(repository):
                name = parse_deleted_name(entry.name)
                if name and max(name.deleted, name.returned) > late:
                    if self._is_steady:
                        moment = next(moments)
                        log.warning('%s: %s is later than now, and gets that time', where, entry.name)
                        back = name.returned and f'-{min(name.returned, moment)}'
                        folder.rename(entry.name, folder, f'{name.file}.{min(name.deleted, moment)}{back}')
                elif not name and entry.name.startswith((SCRATCH_PREFIX, FRESH_PREFIX)):
                    remove_left_overs(folder, [entry.name], self._store.now)
                elif name and (name.returned or name.deleted) < end:
                    self._set_since(repository, limit)  # other servers may keep for another time
                    with contextlib.suppress(FileNotFoundError):  # another server is purging, too
                        length = entry.stat(follow_symlinks=False).st_size
                        folder.unlink(entry.name)
                        if not name.returned:
                            count, size = count + 1, size + length
                            yield length
        finally:
            if count:
                log.log(NOTICE, '%s: purged %s (%s), deleted before %s', where, format_count(count, 'object'),
                        format_size(size), moment_for_people(limit))


def deleted_folder(location: Location) -> str:
    """The path below DIR of the folder for an object that was deleted."""
    part = f'/{location.name[:2]}' if location.kind == 'data' and location.name else ''
    return f'{location.repository}/{DELETED}/{location.kind}{part}'


class View:
    """A store's repositories as they were at a `moment`, to read.  Raises NoHistory after a purge, too."""

    def __init__(self, store: Store, past: Past, moment: int) -> None:
        self._store, self._past, self._moment, self._text = store, past, moment, format_moment(moment)

    def open(self, location: Location) -> FileSlice:
        """The whole content of an object, as Store.open() gives it."""
        deleted, before = deleted_folder(location), None
        while True:
            names = self._history(deleted, location.file).get(location.file, set())
            for path, file in ((location.folder, location.file),
                               *((deleted, file) for file in self._files(names))):
                with contextlib.suppress(FileNotFoundError, NotADirectoryError), \
                        self._store.folders.open(path) as folder:
                    fd, status = open_plain(folder, file)
                    if self._existed(status, names, file):
                        return FileSlice(fd, 0, status.st_size)
                    os.close(fd)
            if names == before:     # else it was perhaps deleted, or came back, between two looks
                break
            before = names
        self._past.check_known(location.repository, self._moment, is_read=True)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), location.file)

    def objects(self, location: Location, sizes: bool) -> Generator[Tuple[List[str], List[int]], None, None]:
        """Names and sizes of the objects of one kind, as Store.objects() gives them."""
        def read(folders: Tuple[str, str, str]) -> Iterator[Tuple[List[str], List[int]]]:
            sizes = {name: status.st_size for name, _, status in self.find(*folders)
                     if stat.S_ISREG(status.st_mode)}
            yield list(sizes), list(sizes.values())

        yield from read_ahead(map(read, self.folders(location)))
        self._past.check_known(location.repository, self._moment, is_read=True)

    def folders(self, location: Location) -> Iterator[Tuple[str, str, str]]:
        """The folders of a kind's objects, the folders for their deleted objects, and how names begin."""
        present, deleted = location.folder, deleted_folder(location)
        if location.kind != 'data':
            yield present, deleted, ''
            return
        parts: Set[str] = set()
        for path in (present, deleted):
            with self._store.scan(path) as (_, entries):
                parts.update(entry.name for entry in entries if _SUBDIRECTORY.fullmatch(entry.name))
        for part in sorted(parts):
            yield f'{present}/{part}', f'{deleted}/{part}', part

    def find(self, present: str, deleted: str, prefix: str) -> List[Tuple[str, str, os.stat_result]]:
        """The objects in a folder, and in the folder for what was deleted from it: name, name of the file
        if it was deleted since, else empty, and status.  What took the place of such a file is among them."""
        for _ in range(LOOKS_AT_MOST):
            # What is deleted while we look is among the deleted objects afterwards.
            before = self._history(deleted)
            there = {entry.name: status for entry, status in self._store.object_entries(present, prefix)}
            history = {name: names.union(before.get(name, ())) for name, names in
                       {**before, **self._history(deleted)}.items()}
            found = [(name, '', status) for name, status in there.items()
                     if self._existed(status, history.get(name, ()), '')]
            # What may have come back after we looked for it there: it has a new mark, or its file has gone.
            missed = {name for name, names in history.items()
                      if any(new.returned for new in names.difference(before.get(name, ())))}
            with self._store.scan(deleted) as (folder, _):
                for file in (file for names in history.values() for file in self._files(names)):
                    name = file.partition('.')[0]
                    try:
                        status = folder.stat(file)
                        if not stat.S_ISREG(status.st_mode) or self._existed(status, history[name], file):
                            found.append((name, file, status))
                    except FileNotFoundError:
                        missed.add(name)
            if missed <= {name for name, *_ in found}:
                return found
        raise OSError(errno.EBUSY, 'the past changes while it is read', deleted)

    def _history(self, path: str, file: str = '') -> Dict[str, Set[DeletedName]]:
        """By object, perhaps of `file` alone, the names of deleted objects that matter at this moment."""
        history: Dict[str, Set[DeletedName]] = {}
        with self._store.scan(path) as (_, entries):
            for entry in entries:
                if not entry.name.startswith(file):
                    continue
                name = parse_deleted_name(entry.name)
                if name and max(name.deleted, name.returned) > self._text:
                    history.setdefault(name.file, set()).add(name)
        return history

    def _existed(self, status: os.stat_result, names: Iterable[DeletedName], file: str) -> bool:
        """Whether a `file` that was not deleted before this moment was there: uploaded, and not away."""
        if status.st_mtime_ns > self._moment * 1000:
            return False
        # An object may have several files.  This one came back at the last return before its end, having been
        # deleted before that, and so on; the files' own times are too coarse to tell.
        end = file.partition('.')[2] or '~'
        for mark in sorted((name for name in names if name.deleted < name.returned),
                           key=operator.attrgetter('returned'), reverse=True):
            if mark.returned < end:
                if mark.deleted <= self._text:
                    return False
                end = mark.deleted
        return True

    def _files(self, names: Iterable[DeletedName]) -> List[str]:
        """The files of an object that were deleted after this moment."""
        return [f'{name.file}.{name.deleted}' for name in names
                if not name.returned and name.deleted > self._text]


class RollBack(Closing):
    """Sets a repository back to what it was at a `moment`: what was deleted since comes back, and what was
    uploaded since is deleted, and so kept.  Killed at any instant it leaves a sound repository, and can
    be run again.  Until it is closed it excludes others of the repository."""

    # A snapshot refers to indexes, and these to packs: it comes back after them, and goes before them.
    BACK = ('data', 'index', 'keys', 'config', 'snapshots')
    ASIDE = ('snapshots', 'index', 'data', 'keys')

    def __init__(self, store: Store, past: Past, repository: str, moment: int) -> None:
        self._store, self._past, self._repository, self._moment = store, past, repository, moment
        self._view = View(store, past, moment)
        self._deleted: Optional[Folder] = None      # locked
        self.lost: List[str] = []   # paths below the repository of what is not a file any more
        self.show: Callable[[], object] = lambda: None      # called often while it runs
        # By kind: the sizes of objects in bytes.
        self.back: Dict[str, List[int]] = collections.defaultdict(list)
        self.aside: Dict[str, List[int]] = collections.defaultdict(list)

    def check(self, force: bool) -> None:
        """Raises NoHistory where not all that was deleted since is there; ValueError where there was none,
        its files have lost their times, another roll-back runs or, without `force`, it is locked."""
        self._past.check_known(self._repository, self._moment)
        self._deleted = self._store.folders.open(f'{self._repository}/{DELETED}', by_descriptor=True)
        if self._deleted.fd is not None and lock_file(self._deleted.fd) is False:
            raise ValueError('another roll-back of it is running; wait for its end')
        try:
            self._view.open(Location(self._repository, 'config')).close()
        except FileNotFoundError:
            raise ValueError('the repository did not exist at that time') from None
        if not force:
            self.check_locks()

    def close(self) -> None:
        close_quietly(self._deleted)

    def check_locks(self) -> None:
        """Raises ValueError where somebody holds a lock that restic would heed."""
        times = [status.st_mtime for _, status in self._store.object_entries(f'{self._repository}/locks')]
        now, youngest = self._store.now(self._repository), max(times, default=-math.inf)
        if youngest > now - LOCK_SECONDS:
            since = time.strftime('%H:%M:%S', time.localtime(youngest))
            raise ValueError(f'the repository has been locked since {since} '
                             f'({format_duration(max(now - youngest, 0))}); wait for it, or use --force')

    def run(self, dry: bool = False, force: bool = False) -> None:
        """Do it, or with `dry` count only.  Raises OSError, and ValueError if it has become impossible."""
        begun = self._store.now(self._repository)
        for kind in self.BACK:
            for present, deleted, prefix in self._view.folders(Location(self._repository, kind)):
                self.show()
                files: Dict[str, str] = {}      # of deleted objects, by what they were
                for name, file, status in self._view.find(present, deleted, prefix):
                    if not stat.S_ISREG(status.st_mode):
                        self.lost.append(f'{deleted[len(self._repository) + 1:]}/{file}')
                        continue
                    if name in files and not dry:   # of two, the one that is sound
                        self._bring_back(present, deleted, files)
                        files = {}
                    if file and name not in files and self._is_missing(kind, name):
                        files[name] = file
                        self.back[kind].append(status.st_size)
                if files and not dry:
                    self._bring_back(present, deleted, files)
            # Was something purged meanwhile?
            self._past.check_known(self._repository, self._moment, is_read=True)
        for kind in self.ASIDE:
            for present, deleted, prefix in self._view.folders(Location(self._repository, kind)):
                self.show()
                if not (dry or force):
                    self.check_locks()  # a backup may have begun meanwhile
                wanted = {name for name, _, _ in self._view.find(present, deleted, prefix)}
                for entry, status in list(self._store.object_entries(present, prefix)):
                    if entry.name not in wanted and status.st_mtime <= begun:
                        self.aside[kind].append(status.st_size)
                        if not dry:
                            self._past.delete(Location(self._repository, kind, entry.name))

    def _is_missing(self, kind: str, name: str) -> bool:
        """Whether an object is to come back: it is not there, or what has its name is something else, such
        as another config, a damaged object or, where uploads are not verified, anything."""
        with contextlib.suppress(OSError), self._store.open(
                Location(self._repository, kind, name)) as content:
            return kind == 'config' or _digest(content.fd) != name
        return True

    def _bring_back(self, present: str, deleted: str, files: Dict[str, str]) -> None:
        """Rename deleted objects of a folder to what they were, after marks of when they were away."""
        self._store.folders.make(present)
        with self._store.folders.open(deleted, by_descriptor=True) as source, \
                self._store.folders.open(present, by_descriptor=True) as target:
            now, mode = format_moment(self._past.now(self._repository)), self._store.file_mode
            for name, file in files.items():
                # An object that is replaced is copied: its name is there at every instant.
                try:
                    copy_durably(target, name, source, f'{name}.{now}', mode)
                except OSError as error:    # there is none, or what has its name is a link
                    if error.errno not in (errno.ENOENT, *_LINK_ERRORS):
                        raise
                self._past.mark(source, f'{file}-{now}')
            source.sync()
            for name, file in files.items():
                with contextlib.suppress(FileNotFoundError):    # a server has purged it
                    move(source, file, target, name, mode)
            target.sync()
            source.sync()

    def __str__(self) -> str:
        """Such as `3 snapshots, 41 packs (612.0 MiB) restored, 1 snapshot set aside`."""
        nouns = {'snapshots': 'snapshot', 'index': 'index', 'keys': 'key', 'config': 'config', 'data': 'pack'}
        parts = []
        for sizes, what in ((self.back, 'restored'), (self.aside, 'set aside')):
            counts = [format_count(len(sizes[kind]), noun) for kind, noun in nouns.items() if kind in sizes]
            if 'data' in sizes:
                counts[-1] += f' ({format_size(sum(sizes["data"]))})'
            if counts:
                parts.append(f'{", ".join(counts)} {what}')
        return ', '.join(parts) or 'nothing to do'


# ==== Scrub ======================================================================================
# Reads every object of every repository and compares its SHA-256 with its name.  It may run beside a
# server: what is written or deleted meanwhile is not reported.  SCRUB_FILE has the records of it: when each
# folder, or all of a repository, was last found sound, and the last result of each repository.  What a pass
# did not look at, since it cannot be read or the pass was ended before, keeps the record that it had.

SAVE_SECONDS = 300           # Time between two writes of them.
# Names of the temporary files of restic, of rest-server, and of this server.
_SCRATCH = re.compile(rf'[0-9a-f]{{64}}(-tmp-|\.rest-server-temp).*|.*({SCRATCH_PREFIX}|{FRESH_PREFIX}).*')
PROGRESS_SECONDS = 60        # Time between two lines of progress without a terminal.
BAR_SECONDS = 0.2            # Time between two updates of the bar on a terminal.
BAR_WIDTH = 30               # Characters.
DAMAGED_NAMES = 10_000       # Damaged objects in all repositories whose names are remembered.
# Errors with which a disk says that what it had is lost.  After any other, nobody has looked.
_DISK_FAILS = (errno.EIO, getattr(errno, 'EBADMSG', errno.EIO), getattr(errno, 'EUCLEAN', errno.EIO))
# The verdicts on a repository.
SOUND, DAMAGED, UNREADABLE, LOST, NOT_CHECKED = (
    'sound', 'damaged', 'unreadable', 'not a repository any more', 'not checked')

# Result for a repository: when all of it was last looked at (0: never) or damage was found, the objects read
# then, objects damaged, the paths of some of these below the repository, how many paths could not be read,
# and the names of damaged objects among those that were deleted and are kept.
ScrubResult = collections.namedtuple('ScrubResult', [
    'time', 'checked', 'damaged', 'names', 'unreadable', 'kept'])
_NEVER = ScrubResult(0, 0, 0, [], 0, [])


def _finite(value: Any) -> float:
    """A number from JSON, in which Python allows NaN and infinity.  Raises ValueError for these."""
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f'{value} is not a number')
    return number


def read_scrubs(store: Store) -> Tuple[Dict[str, float], Dict[str, ScrubResult]]:
    """When each folder and repository was last found sound, unless that is later than now, and the last
    result of each repository; nothing if the file is malformed.  Raises OSError."""
    import json
    try:
        content, latest = json.loads(store.folders.read_hidden(SCRUB_FILE)), time.time() + AGREE_SECONDS
        folders = content['folders']
        sound = {folder: at for folder, at in zip(folders, map(_finite, folders.values())) if at <= latest}
        if len(sound) < len(folders):
            log.warning('%s: %s checked later than now, and are not known to be sound', SCRUB_FILE,
                        format_count(len(folders) - len(sound), 'folder'))
        return (sound,
                {repository: ScrubResult(_finite(checked_at), int(checked), max(int(damaged), 0),
                                         [*map(str, names)], int(unreadable), [*map(str, kept)])
                 for repository, result in content['repositories'].items()      # 1.0.0 has four numbers
                 for checked_at, checked, damaged, names, unreadable, kept in [
                     [*result, *_NEVER[len(result):]]]})
    except FileNotFoundError:
        pass
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
        log.warning('%s is invalid, all is taken for not checked: %s', SCRUB_FILE, error)
    return {}, {}


@functools.lru_cache(maxsize=1)
def _results(store: Store, stamp: Tuple[int, ...]) -> Dict[str, ScrubResult]:
    return read_scrubs(store)[1]


def last_scrubs(store: Store) -> Dict[str, ScrubResult]:
    """The last result of each repository, as far as it is known."""
    try:
        return _results(store, stamp(f'{store.root}/{HIDDEN}/{SCRUB_FILE}'))
    except OSError as error:
        log.debug('cannot read scrub results: %s', error)
        return {}


def missing_repositories(store: Store, scrubbed: Iterable[str], names: Set[str]) -> Dict[str, str]:
    """Verdicts on repositories that were `scrubbed` and are not among the `names` of those that there are:
    LOST where the folder is there, with none below it, as when its disk is not mounted; UNREADABLE where
    nobody can look; NOT_CHECKED where there is one.  What was deleted, folder and all, is left out."""
    verdicts = {}
    for path in set(scrubbed) - names:
        try:
            if store.has_repository(path):
                verdicts[path] = NOT_CHECKED
            elif store.folders.is_there(path) and not any(name.startswith(f'{path}/') for name in names):
                verdicts[path] = LOST
        except OSError:
            verdicts[path] = UNREADABLE
    return verdicts


class ScrubTally:
    """What a pass finds in a repository: objects `checked` and `damaged`, `names` of some of these, as paths
    below it; how many paths are `unreadable`, and the names of damaged objects that are `kept`.  Of its
    `folders` of objects, `left` are not looked at: paths below it ('' is all); the result before holds."""

    def __init__(self, repository: str, before: ScrubResult) -> None:
        self.repository, self._before = repository, before
        self.checked = self.damaged = self.unreadable = 0
        self.names: List[str] = []
        self.kept: Set[str] = set()
        self.folders: List[ScrubFolder] = []
        self.left: Set[str] = set()
        self.told = {*before.kept, *(name.rpartition('/')[2] for name in before.names)}

    def result(self, now: float) -> ScrubResult:
        """The result, should the pass end now."""
        before, left, names = self._before, tuple(self.left), set(self.names)
        still = [name for name in before.names if name.startswith(left) and name not in names]
        damaged = self.damaged + (before.damaged if left and still == before.names else len(still))
        checked_at, checked = (int(now), self.checked) if self.damaged or not left else before[:2]
        unreadable = before.unreadable if left and not self.unreadable else self.unreadable
        return ScrubResult(checked_at, checked, damaged, self.names + still, unreadable, sorted(self.kept))


# A folder of objects: its path below DIR, by which the records know it, and below its repository, how the
# names of its objects begin, and the tally of its repository; DELETED, for all deleted objects, has folders.
ScrubFolder = collections.namedtuple('ScrubFolder', ['path', 'name', 'prefix', 'tally'])


class Scrub:
    """One pass over a directory.  What was found sound less than `age` seconds ago is skipped;
    faults go to `report`, a path and a reason, and progress to `stream`."""

    def __init__(self, store: Store, age: float, bandwidth: Optional[Bandwidth],
                 report: Callable[[str, str], None], stream: Any) -> None:
        self.damaged = self.checked = 0     # objects; those that were read
        self.unreadable = 0                 # paths at which nobody could look
        self._tallies: List[ScrubTally] = []
        self._store, self._bandwidth, self._report, self._stream = store, bandwidth, report, stream
        self._after = time.time() - age if age else math.inf
        self._stopped = False
        self._lock = threading.Lock()
        self._sound: Dict[str, float] = {}
        self.results: Dict[str, ScrubResult] = {}   # of repositories, also where nobody can look
        try:
            self._sound, self.results = read_scrubs(store)
        except OSError as error:
            log.warning('cannot read earlier scrub results: %s', error)
        self._bytes = self._total = 0
        self._begin = self._shown = self._saved = time.monotonic()
        self._ahead = store.now() - time.time()     # of the file system's clock

    def run(self) -> int:
        """Check all, on all cores; the number of damaged objects.  Raises OSError, and DirectoryGone."""
        from concurrent.futures import ThreadPoolExecutor
        folders = list(self._find())
        self._sound = {folder.path: max(self._sound[key] for key in keys) for folder in folders for keys in [
            self._sound.keys() & {folder.path, folder.tally.repository}] if keys}
        there = {tally.repository for tally in self._tallies}
        missing = missing_repositories(self._store, self.results, there)
        for path, verdict in missing.items():
            if verdict == LOST:     # others are behind what was reported already
                self._fault(None, self._store.root + path, LOST)
        self.results = {path: self.results[path] for path in missing}
        work = iter(folders)
        try:
            self._total = sum(read_ahead(map(self._bytes_of, folders)))
            with ThreadPoolExecutor(len(CORES)) as pool:
                try:
                    list(pool.map(self._check_folders, [work] * len(CORES)))
                finally:
                    self._stopped = True
        finally:
            self._save()
        self._store.directory.check_present()
        self._show(last=True)
        return self.damaged

    def _find(self) -> Iterator[ScrubFolder]:
        """The folders of objects; reports foreign and stray files.  Raises OSError if DIR cannot be read."""
        own_names = (SCRUB_FILE, EVENTS_FILE, TIME_FILE, os.path.basename(DELETED))
        for path, folder, entries, is_repository in self._store.walk(self._on_error):
            tally, names = ScrubTally(path, self.results.get(path, _NEVER)), [DELETED]
            for entry in entries:
                if is_repository and entry.name == 'data':
                    with self._reading(tally, 'data'):
                        names += [f'data/{part.name}' for part in self._known(
                            f'{path}/data', lambda part: _SUBDIRECTORY.fullmatch(part.name))]
                elif is_repository and entry.name in KINDS:
                    names.append(entry.name)
                elif entry.is_dir(follow_symlinks=False):
                    if entry.name == HIDDEN and (is_repository or not path):
                        with self._reading(tally, HIDDEN):
                            self._known(f'{path}/{HIDDEN}', lambda file: file.name in own_names)
                elif (is_repository and entry.name != 'config') or entry.name.startswith(HIDDEN):
                    self._report_foreign(folder, entry)
            if is_repository:
                config = Location(path, 'config')
                with self._reading(tally, 'config'):
                    size = self._store.size(config)
                    if size:
                        with self._store.open(config) as content:
                            _digest(content.fd)
                    elif size == 0 or any(list(self._store.object_entries(f'{path}/{kind}'))
                                          for kind in ('index', 'snapshots')):   # else it is still to come
                        self._fault(tally, f'{folder.path}/config', DAMAGED,
                                    'missing' if size is None else 'empty')
                tally.left.update(names)
                tally.folders = [
                    ScrubFolder(f'{path}/{name}'[1:], name, name[5:] if name[:5] == 'data/' else '', tally)
                    for name in names]
                self._tallies.append(tally)
                yield from tally.folders

    def _on_error(self, path: str, error: OSError, tally: Optional[ScrubTally] = None) -> None:
        """Report what cannot be read at a path below DIR; it is lost if the disk says so of an object."""
        if not path:
            raise error
        verdict = DAMAGED if tally and error.errno in _DISK_FAILS else UNREADABLE
        self._fault(tally, self._store.root + path, verdict, str(error.strerror))

    @contextlib.contextmanager
    def _reading(self, tally: ScrubTally, name: str) -> Iterator[None]:
        """Report what cannot be read of a repository meanwhile."""
        try:
            yield
        except OSError as error:
            self._on_error(f'{tally.repository}/{name}', error, tally)

    def _known(self, path: str, is_known: Callable[[os.DirEntry[str]], object]) -> List[os.DirEntry[str]]:
        """The entries of a folder that belong there; reports the others.  Raises OSError."""
        known = []
        with self._store.scan(path) as (folder, entries):
            for entry in entries:
                if is_known(entry):
                    known.append(entry)
                else:
                    self._report_foreign(folder, entry)
        return sorted(known, key=operator.attrgetter('name'))

    def _report_foreign(self, folder: Folder, entry: os.DirEntry[str]) -> None:
        """Report a file that is not an object, unless it may belong to an upload under way."""
        path = f'{folder.path}/{entry.name}'
        with contextlib.suppress(FileNotFoundError):
            if not _SCRATCH.fullmatch(entry.name):
                self.report(path, 'foreign: not part of a restic repository')
            elif is_left_over(folder, entry.name, time.time() + self._ahead):
                self.report(path, 'stray: left by an interrupted upload')

    def _changed(self, folder: ScrubFolder) -> Iterator[Tuple[Folder, str, str, int]]:
        """A folder's objects changed since it was sound: folder, file, SHA-256, bytes.  Raises OSError."""
        since = self._sound.get(folder.path, -math.inf)
        for opened, name, digest, status in self._objects(folder):
            if since <= self._after or max(status.st_mtime, status.st_ctime) >= since:
                yield opened, name, digest, status.st_size

    def _objects(self, folder: ScrubFolder) -> Iterator[Tuple[Folder, str, str, os.stat_result]]:
        tally = folder.tally
        if folder.name != DELETED:
            with self._store.folders.open(f'/{folder.path}', by_descriptor=True) as opened:
                for entry, status in entries_and_statuses(opened, folder.prefix):
                    yield opened, entry.name, entry.name, status
            return
        for opened, entry, name in Past(self._store).kept(tally.repository):
            if not name.returned and name.file != 'config':
                if name.file in tally.told:
                    tally.kept.add(name.file)
                with contextlib.suppress(FileNotFoundError):    # it was purged meanwhile
                    yield opened, entry.name, name.file, entry.stat(follow_symlinks=False)

    def _bytes_of(self, folder: ScrubFolder) -> Iterator[int]:
        with contextlib.suppress(OSError):  # it will be reported when it is read
            yield sum(size for *_, size in self._changed(folder))

    def _check_folders(self, folders: Iterator[ScrubFolder]) -> None:
        """Check what other threads leave; for a thread.  A job for each folder would take much memory."""
        try:
            for folder in itertools.takewhile(lambda folder: not self._stopped, folders):
                self._check_folder(folder)
        except BaseException:
            self._stopped = True    # the other threads, too
            raise

    def _check_folder(self, folder: ScrubFolder) -> None:
        """Check the objects of a folder, and report other files; if sound, it was so when this began."""
        checked_at, tally, faults = time.time() + self._ahead - COARSE_SECONDS, folder.tally, None
        is_object = re.compile(f'{folder.prefix}[0-9a-f]{{{64 - len(folder.prefix)}}}').fullmatch
        with self._reading(tally, folder.name):
            known = [] if folder.name == DELETED else self._known(
                f'/{folder.path}', lambda entry: is_object(entry.name))
            for where, entry in Past(self._store).entries(tally.repository) if folder.name == DELETED else ():
                if not parse_deleted_name(entry.name):
                    self._report_foreign(where, entry)
            irregular = [entry.name for entry in known if not entry.is_file(follow_symlinks=False)]
            for name in irregular:
                self._fault(tally, f'{self._store.root}/{folder.path}/{name}', DAMAGED, 'not a regular file')
            faults = len(irregular) + sum(self._check(opened, name, digest, folder)
                                          for opened, name, digest, _ in self._changed(folder))
        with self._lock:
            if self._stopped:
                return
            if faults is not None:      # it was read
                tally.left.discard(folder.name)
            if faults != 0:
                self._sound.pop(folder.path, None)
            elif self._sound.get(folder.path, -math.inf) <= self._after:
                self._sound[folder.path] = checked_at

    def _check(self, folder: Folder, name: str, digest: str, source: ScrubFolder) -> bool:
        """Whether an object of a folder is not sound: its SHA-256 is not this `digest`, or not known."""
        path, tally, fault = f'{folder.path}/{name}', source.tally, ''
        try:
            actual = self._digest(folder, name)
            fault = '' if actual == digest else f'its SHA-256 is {actual}'
        except FileNotFoundError:  # deleted meanwhile
            return False
        except OSError as error:
            fault = str(error.strerror)
            if error.errno not in _DISK_FAILS:
                self._fault(tally, path, UNREADABLE, fault)
                return True
        with self._lock:
            if self._stopped:
                return False
            self.checked += 1
            tally.checked += 1
        if fault and source.name != DELETED:
            self._fault(tally, path, DAMAGED, fault)
        elif fault and digest not in tally.told:    # the repository may be sound without it: told of once
            tally.kept.add(digest)
            self._fault(None, path, DAMAGED, f'it was deleted and is kept; {fault}')
        return bool(fault) and source.name != DELETED

    def _digest(self, folder: Folder, name: str) -> str:
        digest, buffer, count, size = hashlib.sha256(), memoryview(bytearray(COPY_BYTES)), 1, COPY_BYTES
        with open(folder.open(name, _READ_FLAGS), 'rb', buffering=0) as file:
            while count and not self._stopped:
                if self._bandwidth:
                    size = self._bandwidth.step(Bandwidth.SENT, COPY_BYTES)
                count = file.readinto(buffer[:size]) or 0    # None from an empty FIFO
                if self._bandwidth:
                    self._bandwidth.wait(Bandwidth.SENT, count)
                digest.update(buffer[:count])
                self._advance(count)
        return digest.hexdigest()

    def _fault(self, tally: Optional[ScrubTally], path: str, verdict: str, why: str = '') -> None:
        """Count what is DAMAGED or what nobody could look at, and report it.  Raises DirectoryGone."""
        self._store.directory.check_present()
        with self._lock:
            for counts in (self, tally) if tally else (self,):
                counts.damaged += verdict == DAMAGED
                counts.unreadable += verdict != DAMAGED
            if tally:
                name = path[len(self._store.root + tally.repository) + 1:]
                name = one_line(name.encode('utf-8', 'backslashreplace').decode())
                if verdict != DAMAGED:
                    tally.left.add(name)
                elif self.damaged <= DAMAGED_NAMES:
                    tally.names.append(name)
        self.report(path, f'{verdict}: {why}' if why else verdict)

    def report(self, path: str, reason: str) -> None:
        with self._lock:
            show_line(self._stream, '')
            self._report(path, reason)

    def _advance(self, count: int) -> None:
        with self._lock:
            self._bytes += count
            now = time.monotonic()
            if now - self._shown >= (BAR_SECONDS if self._stream.isatty() else PROGRESS_SECONDS):
                self._shown = now
                self._show()
            if now - self._saved >= SAVE_SECONDS:
                self._saved = now
                self._save()

    def _show(self, last: bool = False) -> None:
        seconds = max(time.monotonic() - self._begin, 0.001)
        part = min(self._bytes / self._total, 1.0) if self._total and not last else 1.0
        left = seconds / part - seconds if part else 0.0
        text = (f'{part:4.0%} of {format_size(self._total)}, '
                f'{format_size(self._bytes / seconds)}/s, {format_duration(left)} left, '
                f'{self.checked} objects read, {self.damaged} damaged'
                + (f', {self.unreadable} unreadable' if self.unreadable else ''))
        bar = '#' * int(part * BAR_WIDTH)
        show_line(self._stream, f'[{bar:.<{BAR_WIDTH}}] {text}', '\n' if last else '')
        if not self._stream.isatty():
            with contextlib.suppress(OSError):
                print(text, file=self._stream, flush=True)

    def _save(self) -> None:
        import json
        sound: Dict[str, int] = {}      # seconds, rounded down; of what is sound as a whole the earliest
        for tally in self._tallies:
            self.results[tally.repository] = tally.result(time.time())
            of_folders = {folder.path: int(self._sound[folder.path]) for folder in tally.folders
                          if folder.path in self._sound}
            is_whole = len(of_folders) == len(tally.folders) and not tally.left
            sound.update({tally.repository: min(of_folders.values())} if is_whole else of_folders)
        text = json.dumps({'folders': sound, 'repositories': self.results})
        if len(text) > RECORD_BYTES:
            text = json.dumps({'folders': {}, 'repositories': self.results})    # then all is read again
        try:
            if not self._store.directory.is_gone():
                self._store.folders.write_hidden(SCRUB_FILE, text)
        except OSError as error:
            log.error('cannot save scrub results: %s', error)


# ==== Usage ======================================================================================
# How much each repository holds, and quotas.
#
# Theory of operation.  A census counts what is on the disk, in the background, when the last one is old
# and somebody wants to know; what passes through this server keeps the sums current.  Rows of Counters:
#
#     held       what a repository holds
#     history    what only a census knows of a repository
#     scope      what a quota's scope holds: repositories, and the folders on the way to them
#     rowless    the part of a scope that has no rows of its own: these folders, and repositories that are
#                counted as OTHER, since there was no room for a history
#     reserved   what uploads under way will add to a scope
#
# Each process adds what it does, and a census by how much that differs from what it finds.  It looks at
# objects that were stored before it began to count their repository; what stores later ones adds them.
# The rows of a deleted repository add up to 0.  What is rowless is found anew each time.  Where limits may
# change (--rights), all places of up to QUOTA_DEPTH names have rows: a new limit is in force at once.
#
# A quota charges what the disk has to give: objects rounded up to whole blocks, and a block for each
# folder.  An upload reserves its charge before it is read (Room), which then moves to `scope`.  One that
# comes slowly keeps what has arrived, and reserves the rest in steps, as one of unknown length does.
# Processes check quotas without a common lock: each adds its reservation first and then looks at the sum,
# so that two that take the last bytes at once both step back.

DAYS = 90                    # Days of history: how much was stored on each.
RESERVE_BYTES = 64 << 20     # above quotas, for indexes that a prune writes before it deletes
ROOM_SECONDS = 3             # Longest wait of an upload for bytes that others have reserved.
ROOM_RATE = 64 * 1024        # Bytes a second that an upload has to bring to keep what it has reserved,
ROOM_GRACE = 1               # after so many seconds.
READY_SECONDS = 20           # Longest wait of an upload for the first census.
RETRY_SECONDS = 10           # After which a client may try again what had to wait for too long.
BLOCK_BYTES = 4096           # Unit of charge for an object.
FOLDER_BYTES = 4096          # Charge for a folder.
LOCK_BYTES = 4096            # Largest lock that needs no room: reading and making room require one.
LOCKS = 1024                 # Locks in a quota's scope that need no room.
QUOTA_DEPTH = 4              # Most names in the path of a place with a quota.
_DAY_SECONDS = 86400
# The row `held` of a repository: bytes, bytes charged, bytes charged for what was deleted since the last
# count, deleted objects that are kept, their bytes, those deleted in the last day, and objects of each kind.
Held = collections.namedtuple('Held', [
    'bytes', 'charged', 'freed', 'kept', 'kept_bytes', 'deleted',
    'data', 'index', 'keys', 'locks', 'snapshots', 'config'])
_COLUMNS = {name: column for column, name in enumerate(Held._fields)}
# The row `history` of a repository, from its last count: the times of the last snapshot and of the count, the
# folders that could not be read, and bytes and snapshots by day, older ones first.
History = collections.namedtuple('History', ['last_snapshot', 'time', 'unreadable', 'days', 'snapshots'])
_NO_HISTORY = History(0, 0, 0, [0] * (DAYS + 1), [0] * (DAYS + 1))
# Bytes that a quota's scope holds, bytes reserved by uploads under way, and its limit, 0 if it has none.
Quota = collections.namedtuple('Quota', ['held', 'reserved', 'limit'])
# What a repository holds: bytes, objects of each kind (and of `config`), the time of the last snapshot
# (0 if there is none), and for each of the last DAYS days, today being the last, the bytes stored on it
# that are still there, and the snapshots; how many of its folders could not be read; deleted objects that
# are kept, their bytes, and how many of them were deleted in the last day.
Holdings = collections.namedtuple('Holdings', [
    'bytes', 'objects', 'last_snapshot', 'days', 'snapshots', 'unreadable', 'kept', 'kept_bytes',
    'deleted'])


def charge_of(size: int) -> int:
    """Bytes that a quota is charged for an object."""
    return max(-(-size // BLOCK_BYTES), 1) * BLOCK_BYTES


def _to_row(history: History) -> List[int]:
    return [*history[:3], *history.days, *history.snapshots]


def _from_row(row: List[int]) -> History:
    return History._make([*row[:3], row[3:-DAYS - 1], row[-DAYS - 1:]])


class Quotas:
    """Limits in bytes of what lies at and below places, such as `/alice` and `/%u`, in which %u stands for
    any name but those that lead to `written` places.  A scope is a place without its first slash."""

    def __init__(self, limits: Mapping[str, int], written: Iterable[str] = ()) -> None:
        self.by_place = {place.strip('/'): limit for place, limit in limits.items() if limit}
        self._patterns = [(place.split('/'), size) for place, size in self.by_place.items() if '%u' in place]
        self._written = {scope for place in written     # the scopes of these places and those above them
                         for scope in itertools.accumulate(place.strip('/').split('/'), '{}/{}'.format)}
        self.limit = functools.lru_cache(maxsize=4096)(self._limit)

    def _limit(self, scope: str) -> int:
        """The bytes that a scope may hold, 0 where it has no limit."""
        if '%u' not in scope and scope in self.by_place:
            return self.by_place[scope]
        names = scope.split('/')
        if not scope or scope in self._written:
            return 0
        return min((limit for pattern, limit in self._patterns if len(pattern) == len(names) and all(
            part in ('%u', name) for part, name in zip(pattern, names))), default=0)


class Census:
    """Counts what the repositories of a store hold, in the background, when somebody requests it and the last
    census is `interval` seconds old, and corrects `usage`.  Any process requests one, one makes it."""

    def __init__(self, store: Store, usage: Usage, interval: float) -> None:
        self._store, self._usage, self._counters, self._interval = store, usage, usage.counters, interval
        self.channel = Channel(socket.SOCK_STREAM)      # to the process that makes it
        self.counting = threading.Lock()
        self.unreadable: List[str] = []     # folders that the last census could not read

    def wait(self, seconds: float, fresh: bool = False) -> bool:
        """Wait for the first census, or one not older than the interval by now (`fresh`); whether it came."""
        begin = time.monotonic()
        while time.monotonic() - self.age() <= (begin - self._interval if fresh else -math.inf):
            if time.monotonic() >= begin + seconds:
                return False
            time.sleep(0.02)
        return True

    def age(self) -> float:
        """Seconds since the last census, infinite before the first."""
        counted = self._counters.read(('counted',))
        return time.monotonic() - counted[0][0] / 1e9 if counted else math.inf

    def request(self) -> None:
        """Request a census if the last one is old; does not wait for it."""
        if self.age() >= self._interval:
            with contextlib.suppress(OSError):  # one was requested
                self.channel.send(b'.')

    def on_requested(self) -> None:
        """Make a census in a thread of its own if the last one is old.  For one process only."""
        if any(self.channel.receive()) and self.age() >= self._interval and self.counting.acquire(False):
            try:
                threading.Thread(target=self._count_all, daemon=True).start()
            except RuntimeError as error:
                self.counting.release()
                log.error('cannot calculate sizes: %s', error)

    def _count_all(self) -> None:
        try:
            self.count()
        except DirectoryGone as error:  # that was logged when it went
            log.debug('sizes not calculated: %s', error)
        except Exception as error:  # a bug must not end all further counting
            log.error('cannot calculate sizes: %s: %s', type(error).__name__, error)
            log.debug('traceback:', exc_info=True)
        finally:
            self.counting.release()

    def count(self) -> None:
        """Make a census.  What cannot be read is logged and keeps what was known of it.  Raises DirectoryGone
        if the directory has gone: then nothing is deleted, it is missing."""
        self._store.directory.check_present()
        begin, counters, self.unreadable = time.monotonic(), self._counters, []
        drift = self._drift()
        # What is found without rows of its own replaces what that was.
        self._other = [-number for number in counters.total(('held', OTHER), len(_COLUMNS))]
        self._rowless = {scope: tuple(-number for number in counters.total(('rowless', scope), 2))
                         for scope in counters.names('rowless')}
        self._history_of_other = _NO_HISTORY
        # One that was deleted earlier may be created again behind our back.
        known = {name for name in counters.names('held') - {OTHER} if any(self._usage.held(name))}
        for folder in self._store.walk(self._on_error):
            known.discard(folder.path)
            if folder.is_repository:
                self._count(folder.path)
            elif folder.path:
                self._usage.add_to_scopes(folder.path, FOLDER_BYTES, 0)
        self._store.directory.check_present()
        for repository in known:
            history = self._usage.history(repository)._replace(unreadable=1)
            if not any(f'{repository}/'.startswith(f'{path}/') for path in self.unreadable):
                # It was deleted.
                held, history = self._usage.held(repository), _NO_HISTORY
                self._usage.change(repository, **{name: -number for name, number in held._asdict().items()})
            counters.put(('history', repository), *_to_row(history))
        if any(self._other):
            counters.add(('held', OTHER), *self._other)
        for scope, change in self._rowless.items():
            counters.add(('scope', scope), *change)
            counters.add(('rowless', scope), *change)
        if self._history_of_other.time or counters.read(('history', OTHER)):
            counters.put(('history', OTHER), *_to_row(self._history_of_other))
        for scope, missing in self._drift().items():
            if missing == drift.get(scope):     # not of a request under way
                counters.add(('scope', scope), *missing)
        counters.put(('counted',), int(time.monotonic() * 1e9))
        log.debug('counted all repositories in %.1f s', time.monotonic() - begin)

    def _drift(self) -> Dict[str, Tuple[int, int]]:
        """What scopes lack, charged bytes and locks, where a process was killed between counting both."""
        sums = {scope: self._counters.total(('rowless', scope), 2) for scope in self._counters.names('scope')}
        for repository in self._counters.names('held') - {OTHER}:
            held = self._usage.held(repository)
            for scope in self._usage.scopes(repository):
                charged, locks = sums.get(scope, (0, 0))
                sums[scope] = [charged + held.charged, locks + held.locks]
        return {scope: (charged - now[0], locks - now[1]) for scope, (charged, locks) in sums.items()
                for now in [self._counters.total(('scope', scope), 2)] if [charged, locks] != now}

    def _on_error(self, path: str, error: OSError) -> None:
        log.warning('cannot read %s, keeping its last known size: %s', path or '/', error)
        self.unreadable.append(path)

    def _count(self, repository: str) -> None:
        """Count a repository.  If objects are removed meanwhile, it is counted again, a few times; the last
        count is taken not to include them, so that the quota errs on the high side."""
        for _ in range(3):
            before = self._usage.held(repository)
            found, history = self._measure(repository)
            after = self._usage.held(repository)
            if after.freed == before.freed:
                break
        else:
            found['charged'] += after.freed - before.freed
            for name in ('bytes', *KINDS):
                found[name] += max(getattr(before, name) - getattr(after, name), 0)
        change = {name: found[name] - number for name, number in before._asdict().items()}
        if self._counters.put(('history', repository), *_to_row(history)):
            self._usage.change(repository, **change)
            return
        for scope in self._usage.scopes(repository):
            charged, locks = self._rowless.get(scope, (0, 0))
            self._rowless[scope] = charged + change['charged'], locks + change['locks']
        self._other = list(map(operator.add, self._other, change.values()))
        row = map(operator.add, _to_row(self._history_of_other), _to_row(history))
        self._history_of_other = _from_row(list(row))._replace(
            time=history.time, last_snapshot=max(self._history_of_other.last_snapshot, history.last_snapshot))

    def _measure(self, repository: str) -> Tuple[Dict[str, int], History]:
        """What a repository holds that was stored before now by the file system's clock.  Objects of a time
        to come are older: the clock was set back, or is not right yet, as on a host without a battery."""
        now, begin, before = int(time.time()), time.monotonic(), self._store.now(repository)
        held, faults = dict.fromkeys(_COLUMNS, 0), []   # type: Dict[str, int], List[OSError]
        try:
            self._measure_rest(repository, before, held)
        except OSError as error:
            faults.append(error)
        days, snapshots, last = [held['bytes'], *[0] * DAYS], [0] * (DAYS + 1), 0
        today, paused = int(before) // _DAY_SECONDS, begin
        pause = bool(self._counters.read(('counted',)))     # nobody waits for the first census
        with self._store.object_folders(repository) as folders, contextlib.closing(
                read_ahead(map(self._read, folders))) as items:
            for kind, item in items:
                elapsed = time.monotonic() - begin
                if pause and begin + elapsed - paused > 0.001:      # leave half of the time to requests
                    time.sleep(begin + elapsed - paused)
                    paused = time.monotonic()
                if isinstance(item, OSError):
                    faults.append(item)
                elif item is None:
                    held['charged'] += FOLDER_BYTES
                # Not what was copied or has changed its owner: link(2) follows the last write soon.
                elif not (before < item.st_ctime < before + elapsed + 1 and item.st_mtime > before - 60):
                    stored_at = min(max(int(item.st_mtime), 0), int(before))
                    day = max(DAYS - today + stored_at // _DAY_SECONDS, 0)
                    held['bytes'] += item.st_size
                    held['charged'] += charge_of(item.st_size)
                    held[kind] += 1
                    days[day] += item.st_size
                    if kind == 'snapshots':
                        snapshots[day] += 1
                        last = max(last, stored_at)
        for fault in faults:
            log.error('cannot determine the full size of %s: %s', repository or '/', fault)
        return held, History(last, now, len(faults), days, snapshots)

    def _read(self, objects: ObjectFolder) -> Iterator[Tuple[str, Optional[os.stat_result | OSError]]]:
        """The kind of a folder of objects: with None for it if it is there, with what stat(2) says of
        each object, and with the error that ended it."""
        try:
            with objects.open() as folder:
                if folder is not self._store.folders.nothing:
                    yield objects.kind, None
                for _, status in entries_and_statuses(folder, objects.prefix):
                    yield objects.kind, status
        except OSError as error:
            yield objects.kind, error

    def _measure_rest(self, repository: str, before: float, held: Dict[str, int]) -> None:
        """Add kept deleted objects, the config, and the folders but those of objects.  Raises OSError."""
        yesterday, limit = (format_moment(int(when * 1e6)) for when in (before - _DAY_SECONDS, before))
        for _, entry, name in self._usage.past.kept(repository):
            if not name.returned and name.deleted <= limit:
                with contextlib.suppress(FileNotFoundError):
                    size = entry.stat(follow_symlinks=False).st_size
                    held['kept'] += 1
                    held['kept_bytes'] += size
                    held['deleted'] += name.deleted > yesterday
                    held['charged'] += charge_of(size)
        held['charged'] += FOLDER_BYTES if repository else 0
        config = self._store.size(Location(repository, 'config'))
        if config is not None:
            held['bytes'], held['config'] = config, 1
            held['charged'] += charge_of(config)
        held['charged'] += FOLDER_BYTES * self._store.folders.is_there(f'{repository}/data')


class Usage:
    """What the repositories of a store hold, and whether that is within `limits`, which may be replaced if
    they `may_change`: then all places are counted, whether or not they have a limit.  A `census` is made
    when the last one is `interval` seconds old and somebody asks.  See the chapter's opening for the rows
    of Counters; the row `snapshot` of a repository is the time of the last one that was uploaded."""

    def __init__(self, store: Store, counters: Counters, interval: float = 3600,
                 quotas: Optional[Quotas] = None, past: Optional[Past] = None, may_change: bool = False
                 ) -> None:
        self._store, self.counters, self._may_change = store, counters, may_change
        self.limits, self.past = quotas or Quotas({}), past or Past(store)
        self.census = Census(store, self, interval)
        self._next_warning = 0.0
        self.reserving = threading.Lock()   # one upload at a time
        self.rooms: Set[Room] = set()       # of uploads under way

    def save(self, location: Location, body: Body, may_reserve: bool = False) -> Tuple[int, int]:
        """Store an object as Store.save() does; the objects and bytes added.  One that `may_reserve` may use
        what take_reserve() gives.  Raises Busy, and QuotaExceeded: unread if its length is known."""
        scopes = self.limited(location.repository) if self.limits.by_place else []
        if not scopes:
            return self._save(location, body)
        self._store.require_repository(location)      # before the place takes a row of the counters
        present, length = self._store.size(location), body.length
        # The length is compared first: announcing another one must not cost the hash of all that is there.
        is_same = length is not None and length == present
        if is_same and self._store.confirm(location, body):
            return 0, 0     # a retried upload needs no room
        folders = self._store.folders.missing(location.folder)
        if location.kind == 'locks' and not folders and length is not None and length <= LOCK_BYTES and all(
                self.counters.total(('scope', scope), 2)[1] < LOCKS for scope in scopes):
            return self._save(location, body)   # restic needs a lock to read and to delete
        # What replaces a damaged object of the same length is charged nothing.
        fixed = folders * FOLDER_BYTES - (charge_of(length or 0) if is_same else 0)
        with Room(self, location.repository, fixed, body, may_reserve and length is not None) as room:
            room.take(length or 0, 0 if length is None else ROOM_SECONDS)
            return self._save(location, room)

    def _save(self, location: Location, body: Body) -> Tuple[int, int]:
        saved = self._store.save(location, body)
        size = saved.after - saved.before
        charged = charge_of(saved.after) + saved.folders * FOLDER_BYTES
        if not saved.objects:   # it has replaced a damaged one
            charged -= charge_of(saved.before)
        self.change(location.repository, bytes=size, charged=charged, **{location.kind: saved.objects})
        if location.kind == 'snapshots' and saved.objects:
            self.counters.put(('snapshot', location.repository), int(time.time()))
        return saved.objects, size

    def create(self, location: Location) -> None:
        """Create a repository as Store.create_repository() does.  Raises as save() does."""
        repository, folders = location.repository, self._store.folders
        if self._store.directory.is_missing():
            self._store.prepare()
        missing = folders.missing(repository) + sum(
            not folders.is_there(f'{repository}/{kind}') for kind in KINDS)
        with Room(self, repository, missing * FOLDER_BYTES) as room:
            room.take(None, ROOM_SECONDS)
            made = self._store.create_repository(repository)
            self.past.begin(repository)
            self.change(repository, charged=made * FOLDER_BYTES)

    def delete(self, location: Location) -> Optional[int]:
        size = self.past.delete(location)
        if size is not None:
            charge, kept = charge_of(size), {'kept': 1, 'kept_bytes': size, 'deleted': 1}
            if not self.past.keeps or location.kind == 'locks':
                kept = {'charged': -charge}
            self.change(location.repository, bytes=-size, freed=charge, **{location.kind: -1}, **kept)
        return size

    def purge(self, seconds: float) -> None:
        """Remove what was kept long enough from the past of all repositories, and begin that of new ones;
        for `seconds` at the most, and gently.  For the one process that makes the censuses."""
        begun = time.monotonic()
        end = begun + seconds
        try:
            trusted = self.past.trusted_now()
        except (OSError, StorageError) as error:
            log.error('cannot purge deleted objects: %s', error)
            return
        for folder in self._store.walk(lambda path, error: log.debug('cannot purge %s: %s', path, error)):
            if time.monotonic() >= end:
                return
            if not folder.is_repository:
                continue
            try:
                self.past.begin(folder.path)
                for size in self.past.purge(folder.path, trusted):
                    self.change(folder.path, charged=-charge_of(size), freed=charge_of(size), kept=-1,
                                kept_bytes=-size)
                    if time.monotonic() >= end:
                        return
                    time.sleep(min(time.monotonic() - begun, 1))    # leave half of the time to requests
                    begun = time.monotonic()
            except OSError as error:
                log.error('cannot purge deleted objects of %s: %s', folder.path or '/', error)

    def change(self, repository: str, **amounts: int) -> None:
        """Add to what a repository holds, and to its quota scopes."""
        counters, key = self.counters, ('held', repository)
        with counters.lock:
            row = counters.rows.get(key) or counters.row(key, len(_COLUMNS))
            for name, amount in amounts.items():
                row[_COLUMNS[name]] += amount
        if self.limits.by_place or self._may_change:
            self.add_to_scopes(repository, amounts.get('charged', 0), amounts.get('locks', 0),
                               key not in counters.rows)

    def add_to_scopes(self, path: str, charged: int, locks: int, is_rowless: bool = True) -> None:
        """Add to the quota scopes of a repository, or of a folder on the way to one."""
        kinds = ('scope', 'rowless') if is_rowless else ('scope',)
        for kind, scope in itertools.product(kinds, self.scopes(path)):
            self.counters.add((kind, scope), charged, locks)

    def scopes(self, repository: str) -> List[str]:
        """The quota scopes of a repository that are counted: its path and those above it, as far as they
        have a limit or may be given one; `` is all that is stored."""
        names = normalize_user(repository).split('/')[1:QUOTA_DEPTH + 1]
        scopes = ['/'.join(names[:depth]) for depth in range(len(names), -1, -1)]
        return scopes if self._may_change else list(filter(self.limits.limit, scopes))

    def limited(self, repository: str) -> List[str]:
        """The scopes of a repository that have a limit now."""
        return list(filter(self.limits.limit, self.scopes(repository)))

    def quota(self, scope: str) -> Quota:
        # An upload that ends moves from reserved to scope; reading in this order never misses it.
        reserved, held = (self.counters.total((kind, scope), 1)[0] for kind in ('reserved', 'scope'))
        return Quota(held, reserved, self.limits.limit(scope))

    def quotas(self, repositories: Iterable[str]) -> Dict[str, Quota]:
        scopes = {scope for repository in ('', *repositories) for scope in self.limited(repository)}
        return {scope: self.quota(scope) for scope in sorted(scopes)}

    def take_reserve(self, repository: str, charge: int) -> bool:
        """Whether there is room above the quotas for an index, without which a prune could free none: as many
        bytes as the older indexes have, and RESERVE_BYTES."""
        sizes = (sizes for _, sizes in self._store.objects(Location(repository, 'index'), True))
        there = sum(itertools.chain.from_iterable(sizes))
        row = 'reserve', repository
        taken = self.counters.total(row, 1)[0]
        now = min(taken, there) + charge
        return now <= there - min(taken, there) + RESERVE_BYTES and self.counters.add(row, now - taken)

    def refuse(self, repository: str, charge: int, quotas: Dict[str, Quota]) -> NoReturn:
        """Raises QuotaExceeded for an upload that is charged so much; logged once in ten seconds."""
        if time.monotonic() >= self._next_warning:
            self._next_warning = time.monotonic() + 10
            held = ', '.join(f'{format_size(quota.held)} of {format_size(quota.limit)} in /{scope}'
                             for scope, quota in quotas.items())
            log.warning('quota exceeded: rejected an upload of %s to %s; used: %s%s', format_size(charge),
                        cut(repository or '/'), held, self._text_of_kept(next(filter(None, quotas), '')))
        full = next((f' of /{scope}' for scope, quota in quotas.items()
                     if scope and quota.held + charge > quota.limit), '')
        raise QuotaExceeded(f'quota{full} exceeded')

    def _text_of_kept(self, scope: str) -> str:
        """How much of what a scope holds was deleted, and when the first of it goes."""
        kept = {name: holdings.kept_bytes for name, holdings in self.holdings(
            self.names(f'/{scope}' if scope else '')).items() if holdings.kept}
        with contextlib.suppress(OSError):
            oldest = min((name.deleted for repository in kept for _, _, name in self.past.kept(repository)
                          if not name.returned), default='')
            if oldest:
                return (f'; {format_size(sum(kept.values()))} of that are deleted objects, the first of '
                        f'which expire on {self.past.until(oldest)}')
        return ''

    def names(self, below: str = '') -> List[str]:
        """The repositories at and below a path, in order, and OTHER; none before the first census."""
        if not self.census.wait(0):
            return []
        names = self.counters.names('history')
        if OTHER not in names:  # else it has those without a history
            names |= self.counters.names('held')
        return sorted(name for name in names if not below or f'{name}/'.startswith(f'{below}/'))

    def holdings(self, names: Optional[Iterable[str]] = None) -> Dict[str, Holdings]:
        """What repositories, by default all, hold now; empty ones are left out."""
        return {name: holdings for name in (self.names() if names is None else names)
                for holdings in [self._holdings(name)] if holdings}

    def held(self, repository: str) -> Held:
        return Held(*self.counters.total(('held', repository), len(_COLUMNS)))

    def history(self, repository: str) -> History:
        """What the last census found of a repository besides."""
        rows = self.counters.read(('history', repository))
        return _from_row(rows[0]) if rows else _NO_HISTORY

    def _holdings(self, name: str) -> Optional[Holdings]:
        base, names = self.history(name), {name}
        if name == OTHER and base is not _NO_HISTORY:
            names |= self.counters.names('held') - self.counters.names('history')
        held = Held(*(max(sum(numbers), 0) for numbers in zip(*map(self.held, names))))
        objects = {kind: getattr(held, kind) for kind in (*KINDS, 'config')}
        if not any(objects.values()) and not base.unreadable and not held.kept:
            return None
        last = max((row[0] for row in self.counters.read(('snapshot', name))), default=0)
        if not base.time <= last < time.time() + AGREE_SECONDS:     # perhaps the clock was wrong
            last = base.last_snapshot
        passed = min(max(int(time.time()) // _DAY_SECONDS - base.time // _DAY_SECONDS, 0), DAYS)
        days, snapshots = ([*part, *[0] * passed][-DAYS:] for part in (base.days, base.snapshots))
        days[-1] += max(held.bytes - sum(base.days), 0)     # since the count, so today
        snapshots[-1] += max(held.snapshots - sum(base.snapshots), 0)
        # What was removed since the count is assumed to be the latest.
        totals = [0, *(min(total, held.bytes) for total in itertools.accumulate(days))]
        days = list(map(operator.sub, totals[1:], totals))
        return Holdings(held.bytes, objects, last if held.snapshots else 0, days, snapshots, base.unreadable,
                        held.kept, held.kept_bytes, held.deleted)


class Room(WatchedBody, Closing):
    """Room in the quotas of a repository for an upload of `body` and `fixed` bytes besides, until it is
    closed.  It is the Body of the upload.  Raises Busy before the first census."""

    def __init__(self, usage: Usage, repository: str, fixed: int, body: Optional[Body] = None,
                 may_reserve: bool = False) -> None:
        self._usage, self._repository, self._fixed, self._may_reserve = usage, repository, fixed, may_reserve
        self._scopes, self._taken = usage.limited(repository), 0
        if self._scopes:
            usage.census.request()
            if not usage.census.wait(READY_SECONDS):
                raise Busy('still calculating sizes', RETRY_SECONDS)
        if body:
            super().__init__(body, self._on_read)
            self._begun = self.clock()
            self._in_steps = body.length is None
            usage.rooms.add(self)

    def _on_read(self) -> None:
        if self._in_steps:
            self.take(self.received, 0)

    def take(self, size: Optional[int], seconds: float) -> None:
        """Raise the room to that for an object.  That waits for some seconds while other uploads have
        reserved what is left, since they may fail or yield it, or another process has tried at the same
        time.  Raises QuotaExceeded if there is no room, and Busy if there may be soon."""
        usage, end = self._usage, time.monotonic() + seconds
        charge = self._fixed + (0 if size is None else charge_of(size))
        while charge > self._taken:
            with usage.reserving:
                before = self._taken
                fits = self._set(charge)
                quotas = {scope: usage.quota(scope) for scope in usage.limited(self._repository)}
                if fits and all(quota.held + quota.reserved <= quota.limit for quota in quotas.values()):
                    return
                self._set(before)
            if any(quota.held + charge > quota.limit for quota in quotas.values()):
                if self._may_reserve and usage.take_reserve(self._repository, charge):
                    return
                usage.refuse(self._repository, charge, quotas)
            if time.monotonic() >= end:
                raise Busy('other uploads have reserved the remaining quota', RETRY_SECONDS)
            time.sleep(0.01 + os.urandom(1)[0] / 10000)     # not in step with another process

    def yield_rest(self) -> None:
        """Go on in steps if the upload comes too slowly."""
        seconds = self.clock() - self._begun
        if not self._in_steps and seconds > ROOM_GRACE and self.received < ROOM_RATE * seconds:
            with self._usage.reserving:
                self._in_steps = True
                self._set(min(self._taken, max(self._fixed + charge_of(self.received), 0)))

    def close(self) -> None:
        with self._usage.reserving:
            self._usage.rooms.discard(self)
            self._set(0)

    def _set(self, count: int) -> bool:
        """Change what is reserved; False if Counters has no room to count it."""
        change, self._taken = count - self._taken, count
        fits = [self._usage.counters.add(('reserved', scope), change) for scope in self._scopes]
        return all(fits)


# ==== Accounts ===================================================================================
# Authentication: password schemes, the htpasswd file, verified passwords that are remembered, and users
# named by certificates, proxies and unix sockets.

SLOW_COST = 5               # Cost of new bcrypt entries where Python computes bcrypt.
BCRYPT_BYTES = 72           # Bytes of a password that bcrypt uses; the rest is ignored.
PASSWORD_BYTES = 255        # Longest password of the other schemes.
WAITING_LOGINS = 8          # Requests of one address that may wait for their password to be hashed.
KNOWN_ADDRESSES = 4096       # Addresses that are remembered because a user has logged in from them.
_ITOA64 = './0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz'
_BCRYPT64 = './ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789'
# bcrypt, SHA-crypt, MD5-crypt (the original and Apache's) and SHA-1: scheme, cost and salt.
_ENTRIES = [re.compile(pattern) for pattern in (
    r'(\$2[aby]\$)(0[4-9]|[12][0-9]|3[01])\$([./A-Za-z0-9]{22})[./A-Za-z0-9]{31}',
    r'(\$[56]\$)(?:rounds=([0-9]{1,9})\$)?([^$:]{0,16})\$(?:[./0-9A-Za-z]{43}|[./0-9A-Za-z]{86})',
    r'(\$(?:apr1|1)\$)()([^$:]{0,8})\$[./0-9A-Za-z]{22}', r'()()()\{SHA\}[A-Za-z0-9+/]{27}=')]


class Entry(str):
    """A password's hash in an htpasswd file.  `scheme` is how it begins, such as `$6$`, empty for SHA-1;
    `rounds` is the binary logarithm of their number for bcrypt; `cost` is that of verifying a password in
    Python, roughly in rounds of MD5.  Raises ValueError for an unknown scheme."""

    def __init__(self, text: str) -> None:
        match = next(filter(None, (entry.fullmatch(text) for entry in _ENTRIES)), None)
        if not match:
            raise ValueError('unknown password scheme')
        self.scheme, rounds, self.salt = match.groups()
        self.is_bcrypt = self.scheme.startswith('$2')
        self.rounds = int(rounds or {'$5$': 5000, '$6$': 5000, '': 1}.get(self.scheme, 1000))
        self.cost = 8000 << self.rounds if self.is_bcrypt else self.rounds

    def rest_of_cost(self, slowest: Entry) -> List[Entry]:
        """Dummies that take as long to verify as `slowest`, of the same scheme, less what this one takes."""
        if self.is_bcrypt:      # 2 ** n is 2 ** m + 2 ** m + 2 ** (m + 1) + ... + 2 ** (n - 1)
            return [Entry(f'{slowest[:4]}{rounds:02d}{slowest[6:]}')
                    for rounds in range(self.rounds, slowest.rounds)]
        rounds = slowest.rounds - self.rounds
        if rounds < 1000:   # the fewest that there are
            return []
        return [Entry(re.sub(r'^(\$.\$)(rounds=\d+\$)?', rf'\g<1>rounds={rounds}$', slowest))]

    def seconds(self) -> float:
        """Estimated seconds to verify it; 0 where the C library does."""
        return 0 if not self.scheme or is_in_c(self.scheme) else self.cost * _seconds_of_round()

    def is_slow(self) -> bool:
        """Whether verifying it takes so long that others must not wait for it: it has a queue of its own."""
        return self.seconds() > 2


@functools.lru_cache(maxsize=None)
def _seconds_of_round() -> float:
    """Measured seconds of a round of MD5 in Python."""
    begin = time.perf_counter()
    crypt(b'x', Entry(f'$1$x${22 * "."}'))
    return (time.perf_counter() - begin) / 1000


def verify(password: bytes, entry: Entry) -> bool:
    """Whether a password matches an entry.  One with a NUL, or too long except for bcrypt, never does."""
    import hmac
    return (b'\0' not in password and hmac.compare_digest(compute(password, entry).encode(), entry.encode())
            and (entry.is_bcrypt or len(password) <= PASSWORD_BYTES))


def compute(password: bytes, entry: Entry) -> str:
    """An entry for a password with the scheme, cost and salt of another, in C if it can; not thread-safe."""
    used = password[:BCRYPT_BYTES if entry.is_bcrypt else PASSWORD_BYTES]
    return crypt_in_c(used, entry) if is_in_c(entry.scheme) else crypt(used, entry)


def crypt_in_c(password: bytes, entry: str) -> str:
    """crypt(3) of the C library, empty or something else for a scheme that it does not support."""
    return (_c_crypt()(password, entry.encode()) or b'').decode('latin-1')


@functools.lru_cache(maxsize=16)
def is_in_c(scheme: str) -> bool:
    """Whether the C library supports a scheme, by its cheapest hash; Python takes a hundred times as long."""
    if scheme in ('', '$apr1$') or not _c_crypt():
        return False
    setting = {'$1$': '$1$x', '$5$': '$5$rounds=1000$x', '$6$': '$6$rounds=1000$x'}.get(
        scheme, f'{scheme}04${22 * "."}')
    return crypt_in_c(b'x', setting).startswith(setting)


@functools.lru_cache(maxsize=None)
def _c_crypt() -> Any:
    """The function crypt(3), or None.  It returns a static buffer."""
    try:
        import ctypes
    except ImportError:
        return None
    for name in ('libcrypt.so.1', 'libcrypt.so.2', 'libcrypt.so', None):
        with contextlib.suppress(OSError, AttributeError, TypeError):   # Windows has no library None
            function = ctypes.CDLL(name).crypt
            function.argtypes = (ctypes.c_char_p, ctypes.c_char_p)
            function.restype = ctypes.c_char_p
            return function
    return None


def crypt(password: bytes, entry: Entry) -> str:
    """What compute() does, in Python."""
    if not entry.scheme:
        import base64
        return '{SHA}' + base64.b64encode(hashlib.sha1(password).digest()).decode()
    return _bcrypt(password, entry) if entry.is_bcrypt else _unix_crypt(password, entry)


def _unix_crypt(password: bytes, entry: Entry) -> str:
    """MD5-crypt of FreeBSD and SHA-crypt (https://www.akkadia.org/drepper/SHA-crypt.txt)."""
    algorithm = {'$5$': hashlib.sha256, '$6$': hashlib.sha512}.get(entry.scheme, hashlib.md5)
    is_sha = algorithm is not hashlib.md5
    salt, size = entry.salt.encode(), len(password)
    inner = algorithm(password + salt + password).digest()
    first = password + (b'' if is_sha else entry.scheme.encode()) + salt + _repeated(inner, size)
    odd, even = (inner, password) if is_sha else (b'\0', password[:1])
    for bit in reversed(f'{size:b}'):
        first += odd if bit == '1' else even
    digest = algorithm(first).digest()
    rounds = entry.rounds
    if is_sha:
        rounds = min(max(rounds, 1000), 999999999)
        salt = algorithm(salt * (16 + digest[0])).digest()[:len(salt)]
        password = _repeated(algorithm(password * size).digest(), size)
    for i in range(rounds):
        data = password if i & 1 else digest
        if i % 3:
            data += salt
        if i % 7:
            data += password
        digest = algorithm(data + (digest if i & 1 else password)).digest()
    if is_sha:  # Bytes from three thirds of the digest, the thirds rotated from one group to the next.
        third, turn, last = (10, 2, (31, 30)) if entry.scheme == '$5$' else (21, 1, (63,))
        order = [((k, k + third, k + 2 * third) * 2)[k * turn % 3:][:3] for k in range(third)] + [last]
    else:
        order = [(0, 6, 12), (1, 7, 13), (2, 8, 14), (3, 9, 15), (4, 10, 5), (11,)]
    text = entry[:entry.rindex('$') + 1]
    for group in order:     # in base 64, the lowest digit first
        value = int.from_bytes(bytes(digest[index] for index in group), 'big')
        text += ''.join(_ITOA64[value >> 6 * digit & 63] for digit in range(len(group) + 1))
    return text


def _repeated(data: bytes, size: int) -> bytes:
    return (data * (size // len(data) + 1))[:size]


def _bcrypt(password: bytes, entry: Entry) -> str:
    """Provos and Mazieres, "A Future-Adaptable Password Scheme", USENIX 1999."""
    bits = 0
    for letter in entry.salt:
        bits = bits << 6 | _BCRYPT64.index(letter)
    salt = [bits >> shift & 0xffffffff for shift in (100, 68, 36, 4)]
    key, nothing = list(struct.unpack('>18I', _repeated(password + b'\0', 72))), [0, 0, 0, 0]
    words = list(_digits_of_pi())
    _expand_key(words, key, salt)
    # The rounds alternate between the password and the salt as keys, both without salt.
    for _ in range(1 << entry.rounds):
        _expand_key(words, key, nothing)
        _expand_key(words, (salt * 5)[:18], nothing)
    output = b''
    for block in (b'OrpheanB', b'eholderS', b'cryDoubt'):
        left, right = struct.unpack('>2I', block)
        for _ in range(64):
            left, right = _encipher(words, left, right)
        output += struct.pack('>2I', left, right)
    bits = int.from_bytes(output[:23], 'big') << 2
    return entry[:29] + ''.join(_BCRYPT64[bits >> shift & 63] for shift in range(180, -1, -6))


def _expand_key(words: List[int], key: List[int], salt: List[int]) -> None:
    """Blowfish's key schedule with salt; `words` are its 18 subkeys and its four S-boxes."""
    for i in range(18):
        words[i] ^= key[i]
    left = right = 0
    for i in range(0, 1042, 2):
        turn = i & 2
        left, right = _encipher(words, left ^ salt[turn], right ^ salt[turn + 1])
        words[i], words[i + 1] = left, right


def _encipher(words: List[int], left: int, right: int) -> Tuple[int, int]:
    """Blowfish encryption of one block; two rounds in each turn of the loop."""
    for i in range(0, 16, 2):
        left ^= words[i]
        right ^= words[i + 1] ^ (
            (words[18 + (left >> 24)] + words[274 + (left >> 16 & 255)]
             ^ words[530 + (left >> 8 & 255)]) + words[786 + (left & 255)] & 0xffffffff)
        left ^= ((words[18 + (right >> 24)] + words[274 + (right >> 16 & 255)]
                  ^ words[530 + (right >> 8 & 255)]) + words[786 + (right & 255)] & 0xffffffff)
    return right ^ words[17], left ^ words[16]


@functools.lru_cache(maxsize=None)
def _digits_of_pi() -> Tuple[int, ...]:
    """Blowfish's subkeys and S-boxes: 1042 words of 32 bits of pi's fraction, which is 6 arcsin(1/2)."""
    bits, k = 1042 * 32, 0
    pi = term = 3 << bits + 64
    while term:
        k += 2
        term = term * (k - 1) ** 2 // (4 * k * (k + 1))
        pi += term
    return tuple(pi >> bits + 64 - 32 * i & 0xffffffff for i in range(1, 1043))


class PasswordFile(WatchedFiles):
    """The users of an htpasswd file and their entries.  Raises OSError if it cannot be read."""

    kept = 'keeping the previous users'

    def __init__(self, path: str) -> None:
        self._path = path
        self.entries: Dict[str, Entry] = {}
        self.slowest: Dict[str, Entry] = {}     # by scheme
        super().__init__(path)

    def load(self) -> str:
        content = self.read(self._path)
        if content.startswith((b'\xff\xfe', b'\xfe\xff')):
            raise OSError(errno.EINVAL, 'file is UTF-16; save it as UTF-8', self._path)
        entries: Dict[str, Entry] = {}
        for number, line in enumerate(content.split(b'\n'), 1):
            text = line.decode('utf-8-sig', 'replace').strip()
            if not text or text.startswith('#'):
                continue
            user, _, rest = text.partition(':')
            user, where = normalize_user(user), f'{self._path}, line {number}'
            if not is_user(user):
                reload_log.error('%s (%s): user names may contain only letters, digits and @ . _ -', where,
                                 user[:64])
                continue
            try:
                entry = Entry(rest.partition(':')[0].strip())
            except ValueError:
                reload_log.error('%s (%s): %s; set the password anew (--add-user)', where, user,
                                 'cut off, or an unknown or unsafe password scheme' if rest else
                                 'no colon and password after the name')
                continue
            if user in entries:
                reload_log.warning('%s: duplicate user %s; the last entry is used', where, user)
            if entry.is_slow():
                reload_log.warning(
                    "%s: the C library of this system does not support the scheme of %s's password, and "
                    'Python takes %.0f s for each login; use a lower cost (htpasswd -B -C %d)', where, user,
                    entry.seconds(), SLOW_COST)
            entries[user] = entry
        self.entries = entries
        self.slowest = {entry.scheme: entry for entry in sorted(
            entries.values(), key=lambda entry: entry.cost)}
        return f'read {format_count(len(entries), "user")} from {self._path}'


class FairQueue:
    """Lets one thread at a time do something slow.  Groups of addresses take turns, those first from which
    the user has logged in before, and at most WAITING_LOGINS threads of a group may wait.  After a failed
    turn the group pauses for as long as the turn took, so that guessing leaves half of the time to others."""

    def __init__(self) -> None:
        self._lock = threading.Lock()   # of what follows
        self._busy = False
        self._resting: Set[str] = set()
        # By whether it is first and group, in the order of their turns: locks on which threads wait.
        self._waiting: Dict[Tuple[bool, str], collections.deque[threading.Lock]] = {}

    def run(self, group: str, attempt: Callable[[], bool], is_first: bool = False) -> bool:
        """Wait for a turn and make an attempt; whether it has succeeded.  Raises HttpError 429."""
        gate, key = threading.Lock(), (is_first, group)
        gate.acquire()
        with self._lock:
            if (self._busy or group in self._resting) and len(self._waiting.get(key, ())) >= WAITING_LOGINS:
                raise HttpError(429, 'too many logins from your address', [('Retry-After', '2')])
            self._waiting.setdefault(key, collections.deque()).append(gate)
            self._give_turn()
        gate.acquire()      # released by _give_turn()
        succeeded, begin = True, time.monotonic()
        try:
            succeeded = attempt()
        finally:
            with self._lock:
                if not succeeded:
                    self._resting.add(group)
                if key in self._waiting:    # move it to the end
                    self._waiting[key] = self._waiting.pop(key)
                self._busy = False
                self._give_turn()
        if not succeeded:
            time.sleep(time.monotonic() - begin)
            with self._lock:
                self._resting.discard(group)
                self._give_turn()
        return succeeded

    def _give_turn(self) -> None:
        """Wake the first thread of the next group that is not pausing, unless somebody has the turn."""
        key = max((key for key in self._waiting if key[1] not in self._resting),
                  key=operator.itemgetter(0), default=None)     # the first of those that are equal
        if key is None or self._busy:
            return
        self._busy = True
        waiting = self._waiting[key]
        waiting.popleft().release()
        if not waiting:
            del self._waiting[key]


class Accounts:
    """Authenticates requests.  Users come from one of: an htpasswd file; a single `user` with `password`
    (kept as a hash with `salt`); the header `user_header` of a proxy that is in `proxies` or on this host.
    Without these, `certificates` may name them.  Over a unix socket the user is the login name of the
    client's process, unless `socket_auth` requires a password.  `demanded` is whether TCP requires a login.

    A verified password is remembered as a keyed digest of the user, the password and the entry that it
    matched.  It holds as long as the file has that entry, so nothing has to be invalidated, and a remembered
    login never waits for one that is being verified.  Processes share the digests through `counters`."""

    def __init__(self, file: Optional[PasswordFile] = None, user: str = '', password: str = '',
                 salt: str = '', realm: str = '', user_header: str = '', proxies: Iterable[Any] = (),
                 certificates: bool = False, socket_auth: bool = False,
                 counters: Optional[Counters] = None) -> None:
        self.file, self._user = file, user
        self._salt = f'salt {salt}'     # in the place of the single user's entry
        self._challenge = f'Basic realm="{realm}", charset="UTF-8"'
        self._user_header = user_header.lower()
        self.proxies = list(proxies)    # networks of proxies that may name clients
        self._certificates = certificates and not (file or user or user_header)
        self._socket_auth = socket_auth and bool(file or user)
        self.demanded = bool(file or user or user_header or certificates)
        self._secret = os.urandom(32)
        self._verified: Dict[str, bytes] = {}   # the last digest of each user
        if user:    # whose password is remembered from the start
            self._verified[user] = self._digest(user, password.encode(), self._salt)
        self._counters = counters or Counters()
        self._queue, self._slow_queue = FairQueue(), FairQueue()

    def identify(self, request: Request) -> str:
        """The user of a request, empty if nothing names one.  Raises HttpError 401, 403 and 429."""
        peer = request.peer
        if self._user_header and (peer.unix or self.is_proxy(peer.name)):
            user = request.headers.get(self._user_header, '')[:USER_BYTES + 1]     # one more is too long
            if not user.isascii():
                user = normalize_user(user.encode('latin-1').decode('utf-8', 'replace'))
            if is_user(user):
                return user
            refusals.log(NOTICE, 'no valid user name', peer, '',
                         'request from %s without a valid user name in header %s', peer, self._user_header)
            raise self._unauthorized('the proxy sent no valid user name')
        if peer.unix and not self._socket_auth:
            return peer.user
        if self.file or self._user:
            return self._check_basic(request)
        if self._user_header:
            raise HttpError(403, 'requests must come through the proxy')
        if peer.user and is_user(peer.user):
            return peer.user
        if self._certificates and peer.certified:
            raise self._unauthorized('the client certificate needs one common name that is a valid user name')
        return ''

    def users(self) -> Optional[List[str]]:
        """The names of all users, None where another program knows them."""
        if self.file:
            return list(self.file.entries)
        return [self._user] if self._user else None

    def _check_basic(self, request: Request) -> str:
        """The user of the Authorization header (RFC 7617)."""
        header = request.headers.get('authorization', '')
        if not header:
            raise self._unauthorized('authentication required')
        user, password = self._parse_basic(header)
        if not (self._is_remembered(user, password) or self._verify(user, password, request.client.group)):
            self._counters.add(REFUSED_LOGINS, 1)
            shown = user if is_user(user) else re.sub(
                r'[^A-Za-z0-9@._-]', lambda match: f'\\u{ord(match[0]):04x}', user[:32])
            refusals.log(NOTICE, 'authentication failed', request.client, '',
                         "authentication failed for '%s' from %s", shown, request.client)
            raise self._unauthorized('wrong user or password')
        if not (request.peer.known and request.peer is request.client):
            self._know_address(user, request.client.group)
        return user

    def _parse_basic(self, header: str) -> Tuple[str, bytes]:
        """User and password of the header's value.  Raises HttpError 401."""
        import base64
        scheme, _, encoded = header.partition(' ')
        with contextlib.suppress(ValueError):   # neither base64 nor UTF-8
            name, colon, password = base64.b64decode(encoded.strip(), validate=True).partition(b':')
            # crypt(3) would end at a NUL.
            if scheme.lower() == 'basic' and colon and b'\0' not in password and len(name) <= USER_BYTES:
                return normalize_user(name.decode()), password
        raise self._unauthorized('malformed credentials')

    def _is_remembered(self, user: str, password: bytes) -> bool:
        """Whether a password has been verified, by this process or another."""
        digest = self._digest(user, password, self.file.entries.get(user, '') if self.file else self._salt)
        if self._verified.get(user) != digest:  # How long this takes says nothing without the digest's key.
            if list(struct.unpack('4q', digest)) not in self._counters.read(('login', user)):
                return False
            self._verified[user] = digest
        return True

    def _know_address(self, user: str, group: str, learn: bool = True) -> bool:
        """Whether a user has logged in from an address before, as far as that is remembered.  If not,
        remember it from now on, perhaps in the place of another one, if there is something to `learn`."""
        digest = hashlib.blake2b(f'{user}\0{group}'.encode(), key=self._secret, digest_size=8).digest()
        value, = struct.unpack('q', digest)
        if value in self._counters.read_word(('seen',), value % KNOWN_ADDRESSES):
            return True
        if learn:
            with self._counters.lock:
                self._counters.row(('seen',), KNOWN_ADDRESSES)[value % KNOWN_ADDRESSES] = value
        return False

    def _verify(self, user: str, password: bytes, group: str) -> bool:
        """Whether a password is the user's, by its hash.  Every failure takes the same time, that of the
        slowest entry of each scheme in the file, so that it does not show which users exist."""
        if not self.file:
            return False
        entry, slowest = self.file.entries.get(user), dict(self.file.slowest)
        entries: List[Entry] = []
        if entry is not None:
            entries = [entry, *entry.rest_of_cost(slowest.pop(entry.scheme, entry))]
        entries += sorted(slowest.values(), key=Entry.is_slow)

        def matches(candidates: List[Entry]) -> bool:
            for candidate in candidates:
                if candidate is entry and self._is_remembered(user, password):
                    return True     # another request has verified it meanwhile
                if verify(password, candidate) and candidate is entry:
                    digest = self._digest(user, password, entry)
                    self._verified[user] = digest
                    self._counters.put(('login', user), *struct.unpack('4q', digest))
                    return True
            return False

        is_known = self._know_address(user, group, learn=False)
        for is_slow, candidates in itertools.groupby(entries, Entry.is_slow):
            queue = self._slow_queue if is_slow else self._queue
            if queue.run(group, functools.partial(matches, list(candidates)), is_known):
                return True
        return False

    def _digest(self, user: str, password: bytes, entry: str) -> bytes:
        if entry.startswith('$2'):
            password = password[:BCRYPT_BYTES]
        return hashlib.blake2b(f'{user}\0{entry}\0'.encode() + password, key=self._secret,
                               digest_size=32).digest()

    def is_proxy(self, name: str) -> bool:
        """Whether an address belongs to a proxy, which may name users."""
        return is_loopback(name) or self.is_trusted(name)

    def is_trusted(self, name: str) -> bool:
        """Whether an address belongs to a proxy of --trust-proxy."""
        if not self.proxies:
            return False
        import ipaddress
        address = ipaddress.ip_address(name.partition('%')[0])
        return any(address in network for network in self.proxies)

    def find_client(self, request: Request) -> None:
        """Set a request's client: the last address it is forwarded for that is no trusted proxy's."""
        if request.peer.unix or self.is_trusted(request.peer.name):
            for address in forwarded_addresses(request.headers):
                request.client = Peer(address)
                if not self.is_trusted(address):
                    break

    def _unauthorized(self, reason: str) -> HttpError:
        return HttpError(401, reason, [('WWW-Authenticate', self._challenge)])


def change_password_file(path: str, user: str, entry: str) -> bool:
    """Set a user's entry in an htpasswd file, or remove it if `entry` is empty; whether the user existed.
    Other lines, owner, group and mode stay.  The file, or the target of a link, is replaced atomically, or
    written in place where it is a mount of its own (Docker).  Raises OSError."""
    path, mode, owner = os.path.realpath(path), 0o600, None
    folder, name = Folder(os.path.dirname(path)), os.path.basename(path)
    lines: List[bytes] = []
    with exclusive(folder, name):       # the file, too, since a container has another folder around it
        with contextlib.suppress(FileNotFoundError), open(path, 'rb') as file:
            lines = file.read().splitlines(keepends=True)
            status = os.fstat(file.fileno())
            mode, owner = stat.S_IMODE(status.st_mode), (status.st_uid, status.st_gid)
        users = [normalize_user(line.decode('utf-8-sig', 'replace').partition(':')[0].strip())
                 for line in lines]
        at = users.index(user) if user in users else len(lines)
        new = [line for line, of in zip(lines, users) if of != user]
        if entry:   # the first line of the user is replaced, others go
            if at and not new[at - 1].endswith(b'\n'):
                new[at - 1] += b'\n'
            new.insert(at, f'{user}:{entry}\n'.encode())
        if new != lines:
            try:
                write_durably(folder, name, new, mode, prefix='.htpasswd-', owner=owner)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                _overwrite(folder, name, lines, new)
    return user in users


def _overwrite(folder: Folder, name: str, lines: List[bytes], new: List[bytes]) -> None:
    """Write a file in place; a copy of its `lines` lies beside it until that is done.  Raises OSError."""
    copy = f'{name}.copy'
    if os.path.lexists(f'{folder.path}/{copy}'):
        raise OSError(f'{folder.path}/{copy}: left by a change that was interrupted; restore or remove it')
    write_durably(folder, copy, lines, 0o600)
    with open(f'{folder.path}/{name}', 'r+b') as file:
        file.writelines(new)
        file.truncate()
        sync_file(file.fileno())
    folder.unlink(copy)


def new_entry(password: bytes, cost: Optional[int] = None) -> str:
    """A bcrypt entry for a password; the default cost depends on what computes bcrypt here."""
    salt = ''.join(_BCRYPT64[byte & 63] for byte in os.urandom(21)) + '.'   # the last one has but 2 bits
    cost = cost or (10 if is_in_c('$2y$') else SLOW_COST)
    return compute(password, Entry(f'$2y${cost:02d}${salt}{31 * "."}'))


# ==== Policy =====================================================================================
# Authorization: who may do what, where, and how much.  One table of rules answers that for every route and
# both wires: that of --rights, or one for which --append-only and the like stand (short_rights()).
#
# Of the rules for a user, or for `*`, the one with the longest place at or above the repository decides; of
# rules for one place a user's own goes before `*`, and a written name before %u.  Without one: refused.

METRICS_USER = 'metrics'     # May see the metrics with --prometheus, besides administrators.
NONE, METRICS, VIEW, READ, APPEND, WRITE = RIGHTS = (       # each has more
    'none', 'metrics', 'view', 'read', 'append', 'write')
_WORDS_OF_RIGHTS = {
    NONE: 'may do nothing', METRICS: 'may see the status page and metrics, but no repositories,',
    VIEW: 'may read, but not lock (restic --no-lock),', READ: 'may read and lock, which can stop backups,',
    APPEND: 'may read and add, but delete only locks,', WRITE: 'may read, add and delete'}

# `who` is a user or `*`; `where` a place such as `` (everything), `/alice` or `/%u`; `may` one of RIGHTS;
# `quota` bytes, 0 for no limit; `line` its number in the file.
Rule = collections.namedtuple('Rule', ['who', 'where', 'may', 'quota', 'line'])


class Rights:
    """A table of rules.  With `strangers` the rules of `*` are for clients without a name, too."""

    def __init__(self, rules: Iterable[Rule], strangers: bool = True) -> None:
        self.rules = list(rules)
        self._strangers = strangers
        # The last one of a place decides: a user's own, and a written name.
        self._ordered = sorted(self.rules, key=lambda rule: (rule.who != '*', '%u' not in rule.where))
        self.find = functools.lru_cache(maxsize=4096)(self._find)
        self.of_user = functools.lru_cache(maxsize=1024)(self._of_user)

    def quotas(self, limit: int = 0) -> Quotas:
        """The quotas of the table, with a `limit` for everything."""
        limits = {rule.where or '/': rule.quota for rule in self.rules if rule.quota}
        limits['/'] = min(filter(None, (limit, limits.get('/'))), default=0)
        return Quotas(limits, [rule.where for rule in self.rules if rule.where and '%u' not in rule.where])

    def _of_user(self, user: str) -> Dict[str, Rule]:
        """The rules of a user, empty for a client without a name, by place."""
        return {rule.where.replace('%u', user): rule for rule in self._ordered
                if rule.who == user or (rule.who == '*' and (user or (
                    self._strangers and '%u' not in rule.where)))}

    def _find(self, user: str, repository: str) -> Tuple[str, str]:
        """What a user may do in a repository, and the place whose rule says so."""
        rules, place = self.of_user(user), normalize_user(repository)
        while place and place not in rules:
            place = place.rpartition('/')[0]
        return (rules[place].may if place in rules else NONE), place

    def text(self) -> str:
        """The table as a file would have it."""
        import shlex
        rows = [(who, where if re.fullmatch(r'[^\s"\'\\#]+', where) else shlex.quote(where or '/'), may,
                 format_exact(quota) if quota else '') for who, where, may, quota, _ in self.rules]
        widths = [max(map(len, column)) for column in zip(*rows)]
        return '\n'.join('  '.join(map(str.ljust, row, widths)).rstrip() for row in rows)

    def words(self, user: str, limit: int = 0) -> List[str]:
        """What a user may do where, in sentences; everything together may hold `limit` bytes."""
        sentences, quotas = [], self.quotas(limit)
        for place, rule in sorted(self.of_user(user).items()):
            names = place.split('/')
            scopes = ['/'.join(names[1:depth]) for depth in range(len(names), 0, -1)]
            sizes = ', '.join(f'{format_size(quotas.limit(scope))} in /{scope}'
                              for scope in filter(quotas.limit, scopes))
            sentences.append(f'{user} {_WORDS_OF_RIGHTS[rule.may]} at and below {place or "/"}'
                             + (f', within {sizes}' if sizes else ''))
        return sentences or [f'{user} may do nothing']


def short_rights(append_only: bool = False, private: bool = False, administrators: Iterable[str] = (),
                 metrics: bool = False, quota: int = 0) -> Rights:
    """The table of --append-only, --private-repos, --admin, --prometheus' user and --max-size-per-user."""
    rules = [Rule('*', '/%u' if private else '', APPEND if append_only else WRITE, quota, 0)]
    for name in sorted({*administrators, *([METRICS_USER] if metrics else ())}):
        may = WRITE if name in administrators else METRICS
        rules += [Rule(name, place, may, 0, 0) for place in (['', f'/{name}'] if private else [''])]
    return Rights(rules)


class RightsFault(ValueError):
    """What is wrong with a rights file, one fault a line."""


def parse_rights(text: str, strangers: bool = False, ignore_case: bool = False, source: str = '') -> Rights:
    """The table in the text of a rights file.  Raises RightsFault with all faults, each after `source`."""
    import shlex
    rules: Dict[Tuple[str, str], Rule] = {}     # by who and where
    quotas: Dict[str, Rule] = {}                # by where
    faults: List[str] = []
    for number, line in enumerate(text.split('\n'), 1):
        try:
            words = shlex.split(line.lower() if ignore_case else line, comments=True)
            if not words:
                continue
            rule = _parse_rule(number, words)
            place, same = rule.where or '/', rules.setdefault((rule.who, rule.where), rule)
            limited = quotas.setdefault(place, rule) if rule.quota else rule
            if same is not rule:
                raise ValueError(f'{rule.who} already has a rule for {place}, line {same.line}')
            if limited.quota != rule.quota:
                raise ValueError(f'{place} has a different quota in line {limited.line}')
        except ValueError as error:
            faults.append(f'{source}line {number}: {error}')
    if not rules and not faults:    # perhaps half of a file that is being written
        faults.append(f'{source}no rules; use "* / none" to deny all access')
    if faults:
        raise RightsFault('\n'.join(faults))
    return Rights(rules.values(), strangers)


def _parse_rule(number: int, words: List[str]) -> Rule:
    """The rule of a line.  Raises ValueError."""
    if not 3 <= len(words) <= 4:
        raise ValueError('expected WHO WHERE MAY [QUOTA], such as alice /alice append 50G (# starts '
                         'a comment; quote paths with # or spaces)')
    who, where, may, *size = words
    who = parse_who(who)
    if not where.startswith('/'):
        raise ValueError(f'path {where!r} must begin with a slash')
    where = normalize_user(where.rstrip('/'))
    if who != '*':
        where = re.sub('/%u(?=/|$)', f'/{who}', where)
    if '%' in re.sub('/%u(?=/|$)', '', where):
        raise ValueError(f'{where!r}: %u (the user name) must be a whole path segment')
    try:
        check_repository(where, False)
    except (InvalidPath, ReservedName) as error:
        raise ValueError(f'{where!r}: {RESERVED if isinstance(error, ReservedName) else error}') from None
    if size and where.count('/') > QUOTA_DEPTH:
        raise ValueError(f'{where!r}: a path with a quota may have at most {QUOTA_DEPTH} segments')
    if may not in RIGHTS:
        raise ValueError(f'invalid right {may!r}; use none, metrics, view, read, append or write')
    return Rule(who, where, may, parse_quota(size[0]) if size else 0, number)


class Policy(WatchedFiles):
    """Says who may do what, by a table of rights, or by the one in the file at `path`, which is read as
    parse_rights() has it.  `on_change` is called with new rights, `on_refused_delete` with the location, the
    user, who that is, and the right he has; `is_late_key` says whether a key is new where there is a config.
    Raises OSError if the file cannot be read, and RightsFault if it is no good."""

    kept = 'keeping the previous rights'

    def __init__(self, rights: Optional[Rights] = None, path: str = '', strangers: bool = False,
                 ignore_case: bool = False) -> None:
        self.rights = rights or short_rights()
        self.path = path
        self._options = strangers, ignore_case, f'{path}, '
        self.on_change: Callable[[Rights], object] = lambda rights: None
        self.on_refused_delete: Callable[[Location, str, object, str], object] = lambda *what: None
        self.is_late_key: Callable[[Location], bool] = lambda location: False
        if path:
            super().__init__(path)

    def load(self) -> str:
        try:
            text = self.read(self.path).decode('utf-8-sig')
        except UnicodeDecodeError:
            raise RightsFault(f'{self.path}: file is not UTF-8') from None
        self.rights = parse_rights(text, *self._options)
        self.on_change(self.rights)
        return f'read {format_count(len(self.rights.rules), "rule")} from {self.path}'

    def right(self, user: str, repository: str) -> str:
        return self.rights.find(user, repository)[0]

    @property
    def is_for_all(self) -> bool:
        """Whether the options give everybody the same rights everywhere, but for the user of --prometheus."""
        return not self.path and all(
            rule.where == '' and (rule.who == '*' or (rule.who == METRICS_USER and rule.may == METRICS))
            for rule in self.rights.rules)

    def places(self, user: str) -> List[str]:
        """Where a user may do anything; there may be rules below that say otherwise."""
        places = [place for place, rule in self.rights.of_user(user).items() if rule.may != NONE]
        return [''] if '' in places else places

    def who_may(self, repository: str, users: Iterable[str]) -> Dict[str, List[str]]:
        """Who of `users` and of the names in the rules has which right in a repository, the highest first."""
        names = {*users, *(rule.who for rule in self.rights.rules if rule.who != '*')}
        owner = repository.split('/', 2)[1] if repository else ''
        if is_user(owner) and any('%u' in rule.where for rule in self.rights.rules):
            names.add(owner)
        holders: Dict[str, List[str]] = {right: [] for right in reversed(RIGHTS)}
        for name in [*sorted(names), '*']:
            holders[self.right(name, repository)].append('anyone else' if name == '*' else name)
        return {right: names for right, names in holders.items() if names and right != NONE}

    def metrics_of(self, user: str) -> Optional[Callable[[str], bool]]:
        """Which repositories' metrics a user may see; None if there are none.  They belong to the right
        `metrics`, and to `write` for everything in a rule of the user's own."""
        granted = {rule.may for rule in self.rights.of_user(user).values()}
        sees_all = self.sees_server(user)
        if not sees_all and METRICS not in granted:
            return None

        def shows(repository: str) -> bool:
            if repository == OTHER:     # of any place
                return sees_all and NONE not in granted
            right = self.right(user, repository)
            return right == METRICS or (sees_all and right != NONE)

        return shows

    def sees_server(self, user: str) -> bool:
        """Whether a user may see the metrics of the server itself."""
        rule = self.rights.of_user(user).get('')
        return rule is not None and (rule.may == METRICS or (rule.may == WRITE and rule.who == user))

    def check(self, request: Request, location: Location) -> None:
        """Raises HttpError 403 if the request's user may not do that.  Locks come and go with the right to
        read, so that restic can hold one.  init adds a key before the config: later ones need `write`, since
        restic reads them all to find its own, and stops at one of junk."""
        may, place = self.rights.find(request.user, location.repository)
        needed, verb = VIEW, 'access'
        if location.kind == 'locks' and location.is_object and request.method in ('POST', 'DELETE'):
            needed, verb = READ, 'lock'
        elif request.method == 'POST':
            needed, verb = APPEND, 'add to'
            if location.kind == 'keys' and may == APPEND and self.is_late_key(location):
                needed, verb = WRITE, 'add keys to'
        elif request.method == 'DELETE' and location.is_object:
            needed, verb = WRITE, 'delete in'
        if RIGHTS.index(may) >= RIGHTS.index(needed):
            return
        who = f"'{request.user}' from {request.client}" if request.user else request.client
        where, only = place or '/', f'; only {may} access'
        if may in (NONE, METRICS):  # the same whether or not there is such a repository
            verb, where, only = 'access', location.repository or '/', ''
        refusals.log(NOTICE, 'access denied', request.client, request.user,
                     'access denied: %s may not %s %s%s', who, verb.partition(' ')[0], location,
                     only and f'{only} to {where}')
        if verb == 'delete in':
            self.on_refused_delete(location, request.user, who, may)
        raise HttpError(403, f'{request.user or "you"} may not {verb} {where}{only}')


def access_check(policy: Policy, file: Optional[PasswordFile], fold: Callable[[str], str], request: Request,
                 location: Location) -> Callable[[], None]:
    """What raises HttpError 403 once the user of a request under way, or his right, is gone."""
    rights = policy.rights
    entries = file.entries if file else {}

    def check() -> None:
        nonlocal rights, entries
        if file and file.entries is not entries:
            before, entries = set(map(fold, entries)), file.entries
            if request.user in before.difference(map(fold, entries)):
                raise HttpError(403, f'{request.user} has been removed')
        if policy.rights is not rights:
            rights = policy.rights
            policy.check(request, location)

    return check


# ==== Metrics ====================================================================================
# Statistics for Prometheus and for the log.
# https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format

# Limits that end or refuse something, as they are called in metrics and log.
STALLED_UPLOAD = 'stalled uploads'
STALLED_DOWNLOAD = 'stalled downloads'
CONNECTIONS_IN_ALL = 'too many connections'
CONNECTIONS_PER_ADDRESS = 'too many connections from your address'
REQUESTS_PER_ADDRESS = 'too many requests from your address'
LOGINS = 'too many logins from your address'

METHODS = ('GET', 'HEAD', 'POST', 'DELETE', 'PUT', 'PATCH', 'OPTIONS', 'TRACE')
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """Counts requests, and reports what was counted.

    Rows of Counters: `request`, by method and status: microseconds in all, and a histogram with the bounds
    SECONDS; `blob`, by user, repository and type: blobs and bytes written, read and deleted."""

    WRITTEN, READ, DELETED = 0, 2, 4   # positions in a row `blob`

    def __init__(self, counters: Counters, watch: Watch) -> None:
        self.counters, self._watch, self._usage = counters, watch, watch.usage
        self._begin = time.time()
        self._reported = self._activity()   # as of the last line
        self._reported_at = time.monotonic()
        self._exposing = threading.Lock()

    def count(self, request: Request, status: int, sent: int) -> None:
        """Count a request that was answered with `sent` bytes of content."""
        method = request.method if request.method in METHODS else 'other'
        seconds, location = time.monotonic() - request.begun, request.location
        with self.counters.lock:
            row = self.counters.row(('request', method, str(status)), 2 + len(SECONDS))
            row[0] += int(seconds * 1e6)
            row[1 + bisect.bisect_left(SECONDS, seconds)] += 1
        if location and method == 'GET' and status in (200, 206):
            self.count_blob(request, location, self.READ, sent)

    def count_blob(self, request: Request, location: Location, what: int, size: int) -> None:
        """Count a blob that was WRITTEN, READ or DELETED; a config is none."""
        if location.name:
            with self.counters.lock:
                row = self.counters.row(('blob', request.user, location.repository, location.kind), 6)
                row[what] += 1
                row[what + 1] += size

    def count_limited(self, limit: str, address: str) -> None:
        self.counters.add(('limited', limit), 1)
        refusals.count(f'{limit}: closed or rejected', address)

    def has_news(self) -> bool:
        return self._activity() != self._reported

    def begin_period(self) -> None:
        self._reported_at = time.monotonic()

    def line(self, final: bool = True) -> str:
        """A summary since the last line.  Without `final` the next line includes it again."""
        activity, now = self._activity(), time.monotonic()
        seconds = max(now - self._reported_at, 0.001)
        requests, errors, received, received_bytes, sent, sent_bytes = map(
            operator.sub, activity, self._reported)
        if final:
            self._reported, self._reported_at = activity, now
        connections = self.counters.total(CONNECTIONS, 2)[1]
        return (f'in {format_duration(seconds)}: sent {format_size(sent_bytes)} in {sent} objects '
                f'({format_size(sent_bytes / seconds)}/s), received {format_size(received_bytes)} in '
                f'{received} objects ({format_size(received_bytes / seconds)}/s), {requests} '
                f'requests ({requests / seconds:.1f}/s), {errors} {plural(errors, "error")}; '
                f'{connections} {plural(connections, "connection")}')

    def _activity(self) -> Tuple[int, ...]:
        """Requests since the start, errors among them, objects and bytes received, objects and bytes sent."""
        requests = errors = 0
        for (_, _, status), (_, *histogram) in self.counters.find('request').items():
            requests += sum(histogram)
            # restic looks for objects that need not exist.
            errors += sum(histogram) if int(status) >= 400 and status != '404' else 0
        blobs = [sum(numbers) for numbers in zip(*self.counters.find('blob').values())] or [0] * 6
        return (requests, errors, *blobs[self.WRITTEN:self.DELETED])

    def exposition(self, shows: Optional[Callable[[str], bool]] = None, of_server: bool = True) -> str:
        """The metrics in the text format: of the repositories and quotas that it `shows` (default: all), and
        perhaps of the server.  One thread at a time computes them."""
        self._usage.census.request()
        with self._exposing:
            families = itertools.chain(self._of_server() if of_server else (),
                                       self._of_repositories(shows or (lambda path: True)))
            return ''.join(line for family in families for line in _lines(*family))

    def _of_server(self) -> Iterator[Family]:
        requests, disk = self.counters.find('request'), disk_space(self._watch.store.root)
        yield 'restic_serve_requests_total', 'Requests answered.', (
            ({'method': method, 'status': status}, sum(row[1:]))
            for (_, method, status), row in requests.items())
        yield ('restic_serve_request_duration_seconds',
               "Time from the end of a request's header to the end of its answer.", _durations(requests))
        yield 'restic_serve_limited_total', 'Requests and connections closed or rejected by a limit.', (
            ({'limit': limit}, row[0]) for (_, limit), row in self.counters.find('limited').items())
        yield 'restic_serve_events_total', 'Events, as passed to --on-event.', (
            ({'event': kind}, row[0]) for (_, kind), row in self.counters.find('event').items())
        yield 'restic_serve_build_info', 'The version of the server.', [
            ({'version': __version__, 'python': sys.version.partition(' ')[0]}, 1)]
        for name, text, value in (
                ('connections', 'Connections that are open.', self.counters.total(CONNECTIONS, 2)[1]),
                ('refused_logins_total', 'Logins with a wrong user or password.',
                 self.counters.total(REFUSED_LOGINS, 1)[0]),
                ('disk_bytes', 'Size of the file system that holds DIR.', disk and disk.total),
                ('disk_free_bytes', 'Free space on the file system that holds DIR.', disk and disk.free),
                ('certificate_end_timestamp_seconds', "End of the server's certificate.",
                 self._watch.certificate_end()),
                ('start_time_seconds', 'Start time of the server.', int(self._begin))):
            yield f'restic_serve_{name}', text, [] if value in (None, math.inf) else [({}, value)]

    def _of_repositories(self, shows: Callable[[str], bool]) -> Iterator[Family]:
        blobs = {key: row for key, row in self.counters.find('blob').items() if shows(key[2])}
        for position, (name, text) in enumerate((   # as rest-server has them
                ('write_total', 'blobs written'), ('write_bytes_total', 'bytes of blobs written'),
                ('read_total', 'blobs read'), ('read_bytes_total', 'bytes of blobs read'),
                ('delete_total', 'blobs deleted'), ('delete_bytes_total', 'bytes of blobs deleted'))):
            yield f'rest_server_blob_{name}', f'Total number of {text}', (
                ({'user': user, 'repo': repository_label(repository), 'type': kind}, row[position])
                for (_, user, repository, kind), row in blobs.items() if row[position - position % 2])
        watched = {repository.name: repository
                   for repository in self._watch.look(time.time(), shows=shows, locks=False)}
        yield 'restic_serve_repository_verdict', 'What is known of the objects.', (
            ({'repo': repository_label(name), 'verdict': repository.verdict}, 1)
            for name, repository in watched.items())
        holdings = {name: repository.holdings for name, repository in watched.items()}
        with_snapshots = {name: held for name, held in holdings.items() if held.last_snapshot}
        scrubs = {name: repository.scrub for name, repository in watched.items() if repository.scrub.time}
        yield 'restic_serve_repository_objects', 'Objects of each type.', (
            ({'repo': repository_label(name), 'type': kind}, count)
            for name, held in holdings.items() for kind, count in held.objects.items())
        for name, text, facts, field in (
                ('bytes', 'Bytes of all objects.', holdings, 'bytes'),
                ('last_snapshot_timestamp_seconds', 'Time of the last snapshot.', with_snapshots,
                 'last_snapshot'),
                ('deleted_kept_bytes', 'Bytes of deleted objects that are kept.', holdings, 'kept_bytes'),
                ('deleted_kept_objects', 'Deleted objects that are kept.', holdings, 'kept'),
                ('deleted_last_day_objects', 'Objects deleted in the last day that are kept.', holdings,
                 'deleted'),
                ('stale_locks', 'Locks that nobody has renewed for 30 minutes.', watched, 'stale'),
                ('scrub_timestamp_seconds', 'Time of the last scrub.', scrubs, 'time'),
                ('scrub_checked_objects', 'Objects that the last --scrub read.', scrubs, 'checked'),
                ('scrub_damaged_objects', 'Objects that the last --scrub found damaged.', scrubs, 'damaged')):
            yield f'restic_serve_repository_{name}', text, (
                ({'repo': repository_label(path)}, getattr(fact, field)) for path, fact in facts.items())
        quotas = {scope: quota for scope, quota in self._usage.quotas(watched).items()
                  if shows(f'/{scope}' if scope else '')}
        yield 'restic_serve_quota_used_bytes', 'Bytes stored under the quota.', (
            ({'folder': scope}, quota.held) for scope, quota in quotas.items())
        yield 'restic_serve_quota_limit_bytes', 'Limit of the quota.', (
            ({'folder': scope}, quota.limit) for scope, quota in quotas.items())


def _lines(name: str, text: str, samples: Iterable[Sample]) -> Iterator[str]:
    """A metric in the text format; none if it has no samples."""
    kind = ('counter' if name.endswith('_total') else
            'histogram' if name.endswith('_duration_seconds') else 'gauge')
    head = f'# HELP {name} {text}\n# TYPE {name} {kind}\n'
    for *suffix, labels, value in samples:
        inner = ','.join(f'{label}="{_label(word)}"' for label, word in labels.items())
        yield f'{head}{"".join([name, *suffix])}{f"{{{inner}}}" if inner else ""} {value}\n'
        head = ''


def _durations(requests: Dict[Key, List[int]]) -> Iterator[Sample]:
    """A histogram for each method."""
    methods: Dict[str, List[int]] = {}
    for (_, method, _), row in requests.items():
        methods[method] = list(map(operator.add, methods.get(method, [0] * len(row)), row))
    for method, (microseconds, *counts) in methods.items():
        for total, bound in zip(itertools.accumulate(counts), (*map(str, SECONDS), '+Inf')):
            yield '_bucket', {'method': method, 'le': bound}, total
        yield '_sum', {'method': method}, microseconds / 1e6
        yield '_count', {'method': method}, sum(counts)


def repository_label(name: str) -> str:
    """A repository's path as in rest-server's labels, without its first slash; OTHER has one."""
    return f'/{name}' if name == OTHER else name[1:]


def _label(text: str) -> str:
    """The value of a label, with backslash, quote and line feed escaped."""
    text = text.encode('utf-8', 'backslashreplace').decode()
    return text.replace('\\', r'\\').replace('"', r'\"').replace('\n', r'\n')


# ==== Watch ======================================================================================
# What is wrong with the repositories, and how it is said: decided here, for pages, report and events.

LOOK_AT_MOST = 3             # Seconds to look at the objects of a repository.
NEARLY_FULL = 0.9            # Part of a quota from which it is nearly full.
OF_A_LOCK = range(100, 1025)  # Bytes of restic's locks: times, names of a user and a host, 32 of encryption.
CERTIFICATE_DAYS = 21, 7, 0  # before the end of a certificate: when it is told, and from when it is shown.
_VALIDITY = re.compile(rb'0[\x1e-\x22](?:\x17\r\d{12}|\x18\x0f\d{14})Z(?:\x17\r(\d{12})|\x18\x0f(\d{14}))Z')
OVERDUE, LOCKED, FULL = 'overdue', 'locked', 'nearly full'
TROUBLES = (DAMAGED, UNREADABLE, LOST, OVERDUE, LOCKED, FULL)    # the worst first
_NO_HOLDINGS = Holdings(0, dict.fromkeys((*KINDS, 'config'), 0), 0, [0] * DAYS, [0] * DAYS, 0, 0, 0, 0)
# What to do about a trouble, or an event, with the README's chapter.
NEXT_STEPS = {
    DAMAGED: 'copy the damaged files from a second copy; without one, run {restic} repair index, the first '
             'of four steps (README, Scrub)',
    UNREADABLE: "let the server's user read what its log names (README, Troubleshooting)",
    LOST: 'mount its disk, or remove the folder where it was (README, Troubleshooting)',
    OVERDUE: 'see on its client why the backup did not run or failed, and run it (README, Troubleshooting)',
    LOCKED: 'if no restic is at work there, run {restic} unlock on its client (README, Troubleshooting)',
    FULL: 'make room with restic forget and restic prune, or raise the quota (README, Quotas)',
    'full': 'make room with restic forget and restic prune, or enlarge it (README, Quotas)',
    'deleted': 'if it was an attack, change the password and roll back (README, When something was deleted)',
    'gone': 'mount its disk; the server goes on by itself (README, Troubleshooting)',
    'certificate': 'renew it and replace the files of --cert and --key, which are then read (README, TLS and '
                   'proxies)'}
# A snapshot of a repository: when it came, its name, and the bytes that came since the one before and are
# still there, None where they are not known.
Snapshot = collections.namedtuple('Snapshot', ['time', 'name', 'added'])


def next_step(trouble: str, name: Optional[str] = '', address: str = '') -> str:
    """What to do about a trouble, perhaps of a repository; empty if that is plain."""
    address = address or f'rest:https://HOST{quoted_path(name or "")}/'
    return NEXT_STEPS.get(trouble, '').format(restic=f'restic -r {address}')


def quoted_path(path: str) -> str:
    """A repository's path in a URL (RFC 3986 2.1)."""
    from urllib.parse import quote
    return quote(os.fsencode(path))


class Watched(collections.namedtuple('Watched', [
        'name', 'holdings', 'scrub', 'locks', 'odd_lock', 'stale', 'now', 'troubles'])):
    """A repository as it is `now`: its path, what it holds, the result of its last scrub, the times of its
    locks in order (None: they cannot be read), the name of one that cannot be restic's, which it stops at,
    how many are `stale`, and its `troubles`, each since a time."""

    __slots__ = ()

    @property
    def verdict(self) -> str:
        return next((verdict for verdict in (DAMAGED, UNREADABLE, LOST) if verdict in self.troubles),
                    SOUND if self.scrub.time else NOT_CHECKED)

    @property
    def title(self) -> str:
        return str(self.name[1:] or '/')

    def ago(self, moment: float) -> str:
        return f'{format_age(self.now - moment)} ago'

    def last_snapshot(self) -> str:
        last = self.holdings.last_snapshot
        return f'last snapshot {self.ago(last)}' if last else 'no snapshot yet'

    def text_of(self, trouble: str) -> str:
        age = format_age(self.now - self.troubles[trouble])
        if trouble == DAMAGED:
            return f'{format_count(self.scrub.damaged, "object")} damaged'
        if trouble == OVERDUE:
            return f'overdue for {age}' if self.holdings.last_snapshot else 'overdue: no snapshot yet'
        if trouble == LOCKED and self.odd_lock:
            return f"lock {self.odd_lock[:8]} is not restic's: run restic unlock --remove-all"
        return {LOCKED: f'locked for {age}', UNREADABLE: 'cannot be read completely'}.get(trouble, trouble)

    def text_of_troubles(self) -> str:
        return ', '.join(self.text_of(trouble) for trouble in TROUBLES if trouble in self.troubles)

    def age_of_locks(self) -> str:
        """How old the oldest of its locks is, and whether somebody holds one now."""
        return f'oldest {format_age(self.now - self.locks[0])}' + (
            '' if self.stale == len(self.locks) else ', locked now')


def certificate_end(path: str) -> float:
    """When the first certificate of a PEM file ends, infinite where that cannot be read.  Its two times stand
    side by side in DER, with years of two digits before 2050 (RFC 5280 4.1.2.5).  Raises OSError."""
    import base64
    import calendar
    with open(path, 'rb') as file:
        encoded = file.read().partition(b'CERTIFICATE-----')[2].partition(b'-')[0]
    with contextlib.suppress(ValueError):
        validity = _VALIDITY.search(base64.b64decode(encoded))
        if validity:
            text = validity[2] or (b'20' if validity[1] < b'5' else b'19') + validity[1]
            return calendar.timegm(time.strptime(text.decode(), '%Y%m%d%H%M%S'))
    return math.inf


class Watch:
    """Looks at the repositories of a store.  One without a snapshot for `stale_after` seconds is overdue.
    `certificate_end` tells when the server's certificate ends."""

    certificate_end: Callable[[], float] = staticmethod(lambda: math.inf)

    def __init__(self, store: Store, usage: Usage, stale_after: float) -> None:
        self.store, self.usage, self._stale_after = store, usage, stale_after

    def look(self, now: float, places: Iterable[str] = ('',),
             shows: Callable[[str], bool] = lambda name: True, locks: bool = True) -> List[Watched]:
        """The repositories at and below some places that it `shows`, as quotas: those with the worst trouble
        first, of these the longest.  Without `locks` they are read only where some were counted."""
        holdings = self.usage.holdings(
            name for place in places for name in self.usage.names(place) if shows(name))
        scrubs = last_scrubs(self.store) if self.usage.census.wait(0) else {}
        missing = {} if OTHER in holdings else missing_repositories(self.store, (
            name for name in scrubs if shows(name) and any(
                f'{name}/'.startswith(f'{place}/') for place in places)), set(holdings))
        full = {scope for scope, quota in self.usage.quotas((*holdings, *missing)).items()
                if quota.held >= NEARLY_FULL * quota.limit and shows(f'/{scope}' if scope else '')}
        repositories = []
        for name, held in (*holdings.items(), *((name, _NO_HOLDINGS) for name, verdict in missing.items()
                                                if verdict != NOT_CHECKED)):    # not counted yet
            scrub, verdict = scrubs.get(name, _NEVER), missing.get(name)
            times, odd_lock = self._locks(name) if locks or held.objects['locks'] else ([], '')
            limit = self.store.now(name) - LOCK_SECONDS if times else 0.0
            stale = sum(written <= limit for written in times or ())
            begin = held.last_snapshot or next(iter(stamp(f'{self.store.root}{name}/config')), 0) / 1e9
            late = begin + self._stale_after < now and not verdict
            since = {
                DAMAGED: min(scrub.time, now) if scrub.damaged else None,
                UNREADABLE: now if verdict == UNREADABLE or scrub.unreadable or held.unreadable else None,
                LOST: now if verdict == LOST else None,
                OVERDUE: begin and begin + self._stale_after if late else None,
                LOCKED: times[0] if times and (odd_lock or stale) else None,
                FULL: now if full.intersection(self.usage.limited(name)) else None}
            repositories.append(Watched(name, held, scrub, times, odd_lock, stale, now, {
                trouble: begun for trouble, begun in since.items() if begun is not None}))
        return sorted(repositories, key=lambda repository: (
            *min(((TROUBLES.index(trouble), begun) for trouble, begun in repository.troubles.items()),
                 default=(len(TROUBLES), 0)), natural_order(repository.name)))

    def certificate(self, now: float) -> str:
        """What is wrong with the server's certificate; empty if it lasts."""
        left = self.certificate_end() - now
        if left >= CERTIFICATE_DAYS[0] * 86400:
            return ''
        return f'the TLS certificate {f"ends in {format_age(left)}" if left > 0 else "has expired"}'

    def _locks(self, name: str) -> Tuple[Optional[List[float]], str]:
        try:
            locks = [(status.st_mtime, status.st_size, entry.name)
                     for entry, status in self.store.object_entries(f'{name}/locks')]
        except OSError:
            return None, ''
        return (sorted(moment for moment, _, _ in locks),
                next((lock for _, size, lock in locks if size not in OF_A_LOCK), ''))

    def snapshots(self, name: str) -> List[Snapshot]:
        """The snapshots of a repository by time.  What came with each, since the one before, is not known
        where that takes longer than LOOK_AT_MOST, or not all can be read."""
        snapshots: List[Tuple[float, str]] = []
        added: Iterable[Optional[int]] = itertools.repeat(None)
        with contextlib.suppress(OSError):
            snapshots = sorted((status.st_mtime, entry.name)
                               for entry, status in self.store.object_entries(f'{name}/snapshots'))
            moments, end = [moment for moment, _ in snapshots], time.monotonic() + LOOK_AT_MOST
            sizes = [0] * (len(moments) + 1)    # the last is of what came after all
            with self.store.object_folders(name) as folders, contextlib.closing(
                    read_ahead(map(self.store.read, folders if snapshots else ()))) as objects:
                for _, status in objects:
                    sizes[bisect.bisect_left(moments, status.st_mtime)] += status.st_size
                    if time.monotonic() >= end:
                        break
                else:
                    added = sizes
        return [Snapshot(*snapshot, came) for snapshot, came in zip(snapshots, added)]


def natural_order(name: str) -> List[Tuple[int, str]]:
    """A key by which `host-2` comes before `host-10`."""
    return [(int(part), '') if part.isdecimal() else (0, part) for part in re.split('([0-9]+)', name)]


def count_troubles(repositories: Iterable[Watched]) -> str:
    """How many repositories have which trouble, such as `2 damaged, 1 overdue`; empty if none has any."""
    numbers = collections.Counter(trouble for repository in repositories for trouble in repository.troubles)
    return ', '.join(f'{numbers[trouble]} {trouble}' for trouble in TROUBLES if numbers[trouble])


# ==== Events =====================================================================================
# Runs a command of the administrator's when something happens (--on-event).
#
# Theory of operation.  Any process may find that something has happened; it sends that over a channel to the
# process that makes the censuses.  There a thread runs the command, for one event at a time, and looks for
# problems every WATCH_SECONDS.  Which were reported is kept in EVENTS_FILE, which is changed under a lock:
# other servers of the directory, and the next start, do not report them again.  An event is noted there
# first, and taken out if the server stops before its command has run.
#
# Servers may count at different times, so one may see an older last snapshot than another.  That a
# repository is overdue is reported once for each last snapshot, and never for an older one than anybody has
# seen; `back` is reported for a newer one only.  Deletes of snapshots are sent there, too, and counted for a
# minute; not of fresh ones, since who may delete may also add many to hide behind.

WATCH_SECONDS = 60           # Time between two looks for problems.
COMMAND_SECONDS = 60         # Longest run of the command.
EVENTS = ('snapshot', 'overdue', 'back', 'damaged', 'unreadable', 'full', 'deleted', 'refused', 'gone',
          'certificate')
_BY_CLIENTS = ('snapshot', 'refused')       # as often as they like
FORGOTTEN = 'forgotten'     # No event yet: a snapshot was deleted.
QUEUED_AT_MOST = 500         # Events that wait for the command.
FRESH_SECONDS = 3600         # Age up to which a snapshot may be one that hides a mass delete.
# `repository` is a path, None for what is about none.  What several servers find, and refused deletes, have a
# `value`, by which ReportedEvents knows them; a deleted snapshot has what count_snapshots() said.
Event = collections.namedtuple('Event', ['kind', 'repository', 'user', 'message', 'value'])
# Deleted snapshots in the minute since `begun`: those there that count, those deleted, and by whom any were.
Forgotten = collections.namedtuple('Forgotten', ['begun', 'there', 'deleted', 'by'])


class Events:
    """What happens to repositories, whose problems `watch` finds; a shell `command`, if any, is run then."""

    def __init__(self, watch: Watch, counters: Counters, command: str = '') -> None:
        self.command, self._counters = command, counters
        self._watch, self._store, self._usage = watch, watch.store, watch.usage
        self.channel = Channel(socket.SOCK_DGRAM, 1)    # to the process that runs the command
        self._reported = ReportedEvents(watch.store)
        self._refused, self._there, self._warned = Remembered(60), Remembered(60), Remembered(3600)
        self._changed = threading.Condition()       # of the next four
        self._stopped = False               # nothing is begun any more
        self._queue: List[Event] = []
        self._turns: Dict[str, float] = {}      # when each repository has had its last one
        self._forgotten: Dict[str, Forgotten] = {}      # by repository
        self._cut = threading.Event()       # what is running is killed
        self._running: Optional[Event] = None
        self._thread: Optional[threading.Thread] = None
        self._store.directory.on_change = self.on_directory_change
        for kind in EVENTS:     # so that the metrics show all
            counters.add(('event', kind), 0)

    # ---- in any process ----

    def emit(self, kind: str, repository: Optional[str], message: str, user: str = '', value: Any = None
             ) -> None:
        """Something has happened; waits no longer than the channel does."""
        event = Event(kind, repository, user, message, value)
        if not self.channel.receiver or not (self.command or kind == FORGOTTEN):
            self._take(event)
            return
        import json
        try:
            self.channel.send(json.dumps(event).encode())
        except OSError as error:
            log.error('--on-event: %s of %s is lost: %s', kind, repository, error)

    def on_refused_delete(self, location: Location, user: str, who: object, may: str) -> None:
        """A delete was refused, since `who` has only another right.  One in a minute and repository is told
        of, and none of what is not there: restic cleans up after uploads that have failed."""
        with contextlib.suppress(OSError):
            if self._store.size(location) is not None:
                self._refused.get(location.repository, lambda repository: self.emit(
                    'refused', repository, f'{repository[1:] or "/"}: {who} tried to delete, but may only '
                    f'{may}', user, time.time()))

    def count_snapshots(self, location: Location) -> Tuple[int, bool]:
        """The snapshots of a repository, not more than a minute ago, that were not fresh or, where these are
        fewer than two, all of them; and whether the one that is about to be deleted is among these."""
        def count(repository: str) -> Tuple[int, float]:
            limit, times = time.time() - FRESH_SECONDS, [status.st_mtime for _, status in (
                self._store.object_entries(f'{repository}/snapshots'))]
            old = sum(moment < limit for moment in times)
            return (old, limit) if old > 1 else (len(times), math.inf)

        with contextlib.suppress(OSError), self._store.open(location) as content:
            there, limit = self._there.get(location.repository, count)
            return there, os.fstat(content.fd).st_mtime < limit
        return 0, True

    def on_snapshot(self, request: Request, location: Location) -> None:
        self.emit('snapshot', location.repository, f'{location.repository[1:] or "/"}: snapshot '
                  f'{location.name[:8]} received from {request.user or request.client}', request.user)

    def on_directory_change(self, is_gone: bool) -> None:
        kind, what = ('gone', 'gone (disk unmounted?)') if is_gone else ('back', 'back')
        self.emit(kind, None, f'{self._store.root} is {what}')

    # ---- in the process that runs the command ----

    def start(self) -> None:
        if self.command:
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()

    def is_at_work(self) -> bool:
        """Whether the command runs, or is to run, for an event."""
        return bool(self._queue or self._running)

    def on_sent(self) -> None:
        for message in self.channel.receive():
            import json
            try:
                self._take(Event(*json.loads(message)))
            except (TypeError, ValueError) as error:    # one that was cut off
                log.error('--on-event: an event was lost: %s', error)

    def stop(self, seconds: float) -> None:
        """Begin nothing any more; a command that is running is killed after some seconds."""
        self.on_sent()
        self.log_forgotten(at_once=True)
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._queue:
            log.error('--on-event: %s lost, the server is stopping', format_count(len(self._queue), 'event'))
        if self._thread:
            self._thread.join(seconds)
            self._cut.set()
            self._thread.join(1)

    def _take(self, event: Event) -> None:
        """Let an event wait for the command; where too many do, the last of those that are most gives way."""
        if event.kind == FORGOTTEN:
            self._note_forgotten(event)
        elif not self.command:
            self._counters.add(('event', event.kind), 1)
        else:
            with self._changed:
                self._queue.append(event)
                self._changed.notify()
                if len(self._queue) > QUEUED_AT_MOST:
                    groups = [(waiting.kind in _BY_CLIENTS, waiting.repository) for waiting in self._queue]
                    most, = collections.Counter(groups).most_common(1)
                    lost = self._queue.pop(max(at for at, group in enumerate(groups) if group == most[0]))
                    log.error('--on-event: command not run for "%s": too many events are queued',
                              lost.message)

    def _next(self) -> Event:
        """The next event: repositories take turns; what clients cause as often as they like comes last."""
        event = min(self._queue, key=lambda waiting: (
            waiting.kind in _BY_CLIENTS, self._turns.get(waiting.repository, 0)))
        self._queue.remove(event)
        self._turns[event.repository] = time.monotonic()
        return event

    def _note_forgotten(self, event: Event) -> None:
        """A snapshot was deleted: warn once an hour when more than half of them were, within a minute."""
        there, counts = event.value
        with self._changed:
            minute = self._forgotten.get(event.repository) or Forgotten(
                time.monotonic(), there, 0, collections.Counter())
            minute = minute._replace(deleted=minute.deleted + counts)
            self._forgotten[event.repository] = minute
            count_name(minute.by, f'{event.user} from {event.message}' if event.user else event.message)
            number = max(minute.there, minute.deleted)
            kept = '; they are kept (--keep-deleted)' if self._usage.past.keeps else ''
            message = (f'{event.repository[1:] or "/"}: {minute.deleted} of {number} snapshots were deleted '
                       f'within a minute, by {listed(minute.by)}{kept}')

        def warn(repository: str) -> None:
            log.warning('%s', message)
            self._take(Event('deleted', repository, event.user, message, None))

        if 1 < minute.deleted > minute.there / 2:
            self._warned.get(event.repository, warn)

    def log_forgotten(self, at_once: bool = False) -> float:
        """A timer: log deleted snapshots, a line a minute and repository; seconds until the next one."""
        now = time.monotonic()
        with self._changed:
            for repository, minute in list(self._forgotten.items()):
                if now >= minute.begun + 60 or at_once:
                    del self._forgotten[repository]
                    log.log(NOTICE, '%s: %s deleted, by %s', repository[1:] or '/', format_count(
                        sum(minute.by.values()), 'snapshot'), listed(minute.by))
            return min((minute.begun + 60 - now for minute in self._forgotten.values()), default=math.inf)

    def _work(self) -> None:
        unpin(True)
        next_look = 0.0
        while True:
            with self._changed:
                is_queued = self._changed.wait_for(lambda: self._stopped or self._queue,
                                                   max(next_look - time.monotonic(), 0))
                if self._stopped:
                    return
                now = time.monotonic()
                event = self._running = self._next() if is_queued and now < next_look else None
            try:
                if event:
                    self._run(event)
                    continue
                is_counted = self._usage.census.wait(0)
                next_look = now + (WATCH_SECONDS if is_counted else 1)
                if is_counted:
                    self._look()
            except Exception as error:  # a bug must not end all further events
                log.error('--on-event: %s: %s', type(error).__name__, error)
                log.debug('traceback:', exc_info=True)

    def _run(self, event: Event) -> None:
        """Run the command for an event, unless the server is stopping, or the event has been reported."""
        name, is_shared = event.repository or '', event.value is not None
        if self._stopped or (is_shared and (
                self._store.directory.is_gone()     # there is nothing to note it in
                or not self._reported.note(event.kind, name, event.value))):
            return
        self._counters.add(('event', event.kind), 1)
        _, failure = run_command(self.command, event, self._store.root, self._cut)
        if not failure:
            log.info('--on-event: ran the command for "%s"', event.message)
            return
        log.error('--on-event: command failed for "%s": %s', event.message, failure)
        if is_shared and self._cut.is_set():
            self._reported.note(event.kind, name, None)

    def _look(self) -> None:
        if self._store.directory.is_gone():
            return
        self._usage.census.request()
        self._reported.refresh()
        known = self._reported.known
        repositories = {repository.name: repository for repository in self._watch.look(
            time.time(), locks=False)}
        for name, repository in repositories.items():
            title, last = repository.title, repository.holdings.last_snapshot
            if DAMAGED in repository.troubles:
                import zlib
                damaged, names = repository.scrub.damaged, repository.scrub.names
                self._run(Event('damaged', name, '', f'{title}: {repository.text_of(DAMAGED)}: '
                                + ', '.join(names[:3]), zlib.crc32(repr((damaged, sorted(names))).encode())))
            else:
                self._reported.note('damaged', name, None)
            unread = [repository.text_of(trouble) for trouble in repository.troubles
                      if trouble in (UNREADABLE, LOST)]
            if unread:
                self._run(Event('unreadable', name, '', f'{title}: {unread[0]}', 1))
            else:
                self._reported.note('unreadable', name, None)
            if OVERDUE not in repository.troubles:
                if last > known['overdue'].get(name, math.inf):
                    self._run(Event('back', name, '', f'{title}: no longer overdue', last))
            elif last >= known['back'].get(name, 0):
                self._run(Event('overdue', name, '', f'{title}: overdue, {repository.last_snapshot()}', last))
        for kind in ('damaged', 'unreadable', 'overdue', 'back', 'refused'):
            for name in list(known[kind]):
                with contextlib.suppress(OSError):
                    if name not in repositories and not self._store.has_repository(name):
                        self._reported.note(kind, name, None)
        self._look_at_room(repositories)
        end, now = self._watch.certificate_end(), time.time()
        due = [end - days * 86400 for days in CERTIFICATE_DAYS if end - days * 86400 <= now]
        if due:
            self._run(Event('certificate', None, '', self._watch.certificate(now), due[-1]))

    def _look_at_room(self, repositories: Iterable[str]) -> None:
        rooms = {f'/{scope}': (quota.held, quota.limit)
                 for scope, quota in self._usage.quotas(repositories).items()}
        disk = disk_space(self._store.root)
        if disk and disk.total:     # a network file system may not know
            rooms[''] = disk.total - disk.free, disk.total
        for place in (*rooms, *self._reported.known['full']):
            used, size = rooms.get(place, (0, 1))
            if used >= NEARLY_FULL * size:
                self._run(Event('full', place or None, '', (f'quota of {place}' if place else 'disk') + (
                    f' is {100 * used // size} % used: {format_size(used)} of {format_size(size)}'), 1))
            elif used < 0.85 * size:    # not one that hovers about NEARLY_FULL
                self._reported.note('full', place, None)


def run_command(command: str, event: Event, root: str, cut: threading.Event,
                show: Callable[[bytes], object] = lambda output: None) -> Tuple[int, str]:
    """Run a shell command for an event in the directory `root`; its status, and why it failed, empty if it
    did not.  It is killed after COMMAND_SECONDS, or when `cut` is set."""
    import subprocess
    environment = {name: value for name, value in os.environ.items() if not name.startswith('RESTIC_SERVE_')}
    environment.update(
        RESTIC_SERVE_EVENT=event.kind, RESTIC_SERVE_USER=event.user,
        RESTIC_SERVE_REPOSITORY='' if event.repository is None else event.repository[1:] or '/',
        RESTIC_SERVE_MESSAGE=one_line('; next: '.join(filter(None, (
            event.message, next_step(event.kind, event.repository))))), RESTIC_SERVE_DIRECTORY=root,
        RESTIC_SERVE_TIME=format_time(time.time()))
    try:
        process: Any = subprocess.Popen(    # noqa: S602 - the administrator's own command
            command, shell=True, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True, close_fds=True, bufsize=0)
    except OSError as error:
        return 127, str(error)
    tail, killed, end = b'', '', time.monotonic() + COMMAND_SECONDS
    with process:
        os.set_blocking(process.stdout.fileno(), False)
        while not killed:
            has_ended, output = process.poll() is not None, process.stdout.read(65536)
            if has_ended and not output:
                break       # something that it has started may go on
            tail = (tail + (output or b''))[-4096:]
            show(output or b'')
            if cut.wait(0 if output else 0.01):
                killed = 'killed, the server is stopping'
            elif time.monotonic() >= end:
                killed = f'killed after {COMMAND_SECONDS} s'
        if killed:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
    last = tail.decode('utf-8', 'replace').rstrip().rpartition('\n')[2][-200:]
    status = process.returncode if process.returncode >= 0 else 128 - process.returncode
    failure = killed or (f'status {status}' if status else '')
    return status, f'{failure}: {last}' if failure and last else failure


class ReportedEvents:
    """Which events were reported, in a file that all servers of a directory share; in memory while it
    cannot be written, such as on a full disk.  By kind and name they have a value."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.known: Dict[str, Dict[str, float]] = collections.defaultdict(dict)
        self._is_unsaved = False        # `known` has more than the file

    def refresh(self) -> None:
        """Read the file again, unless more is known."""
        if self._is_unsaved or self._store.directory.read_only:
            return
        import json
        self.known.clear()
        try:
            for kind, names in json.loads(self._store.folders.read_hidden(EVENTS_FILE)).items():
                # What was reported of snapshots later than now, since a clock was wrong, is reported again.
                latest = time.time() + AGREE_SECONDS if kind in ('overdue', 'back') else math.inf
                self.known[kind] = {name: value for name, value in zip(names, map(_finite, names.values()))
                                    if value <= latest}
        except FileNotFoundError:
            pass
        except (OSError, AttributeError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
            log.error('cannot read %s, some events may be reported again: %s', EVENTS_FILE, error)

    def note(self, kind: str, name: str, value: Optional[float]) -> bool:
        """Note an event as reported, or not, without a value; False if it was so, perhaps by another."""
        if not self._update(kind, name, value):
            return False
        if self._store.directory.read_only:
            return True
        try:
            with self._store.folders.hidden() as folder, exclusive(folder):
                self.refresh()
                if not (self._is_unsaved or self._update(kind, name, value)):
                    return False
                import json
                self._store.folders.write_hidden(EVENTS_FILE, json.dumps(self.known))
            self._is_unsaved = False
        except OSError as error:
            if not self._is_unsaved:
                log.error('cannot save which events were reported, some may be reported again: %s', error)
            self._is_unsaved = True
        return True

    def _update(self, kind: str, name: str, value: Optional[float]) -> bool:
        """Change what is known; whether that is new."""
        values, known = self.known[kind], self.known[kind].get(name)
        if known is None or value is None:
            is_new = known is not value
        elif kind == 'refused':     # a time: once an hour
            is_new = not 0 <= value - known < 3600
        else:
            is_new = value > known if kind in ('overdue', 'back', 'certificate') else value != known
        if value is None:
            values.pop(name, None)
        elif is_new:
            values[name] = value
        return is_new


# ==== Page =======================================================================================
# The status page for browsers: HTML without scripts and without anything from elsewhere.  A repository has
# a page of its own at its path; any other path shows the repositories below it.

COUNT_PATIENCE = 2           # Seconds that a page waits for a census.
SNAPSHOTS_SHOWN = 200
UNFOLDED = 20                # Repositories that need neither be folded nor searched.
NAMES_SHOWN = 20             # Users, locks and damaged objects that are named.
SORTS: Dict[str, Callable[[Watched], float]] = {     # the same are sorted by name
    'name': lambda repository: 0,
    'age': lambda repository: repository.holdings.last_snapshot,
    'size': lambda repository: -repository.holdings.bytes,
}
_PLOT_HEIGHT = 24            # Height of a plot that is DAYS wide, without the ticks below it.
_KINDS = {'data': 'pack', 'keys': 'key', 'locks': 'lock', 'snapshots': 'snapshot', 'index': 'index'}
_NONE = '<span class="dim">none</span>'
_STYLE = """
:root{color-scheme:light dark;--back:#fff;--text:#1c2024;--dim:#5a5f67;--line:#d9dce1;
--fill:#cfe3f8;--mark:#1a66b8;--bad:#a8221b;--bad-back:#fdeceb}
@media(prefers-color-scheme:dark){:root{--back:#15181c;--text:#e8eaed;--dim:#a6acb4;--line:#33383f;
--fill:#1e3a57;--mark:#7db8f0;--bad:#ff9d94;--bad-back:#3b1f1d}}
body{margin:0 auto;padding:1.5rem;max-width:76rem;background:var(--back);color:var(--text);
font:15px/1.45 system-ui,sans-serif;font-variant-numeric:tabular-nums}
*{box-sizing:border-box}a{color:inherit;text-decoration-color:var(--mark);text-underline-offset:.15em}
h1{font-size:1.4rem;margin:0}h2{font-size:1.05rem;margin:1.6rem 0 .4rem}p{margin:.3rem 0 1.2rem}
pre{margin:.4rem 0;white-space:pre-wrap}code{user-select:all}h1,code,dd,.name{overflow-wrap:anywhere}
small,footer,thead th,.scale,.days{font-size:.8rem;color:var(--dim)}.dim,dt{color:var(--dim)}
small{display:block;font-weight:400}.bad{color:var(--bad);font-weight:600}
table,dl,figure,form,.quotas{margin:0 0 1.2rem}table{border-collapse:collapse;width:100%}
caption{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
th,td{padding:.4rem .9rem .4rem 0;border-bottom:1px solid var(--line);text-align:left}
th{font-weight:600}td,thead th,.plain{white-space:nowrap}.plain{font-weight:400}.n{text-align:right}
tr.late>th{box-shadow:-.6rem 0 var(--bad-back),inset .2rem 0 var(--bad);padding-left:.6rem}
tr.late>*{background:var(--bad-back)}svg{display:block}.plot{width:9rem;height:2.2rem}.area{fill:var(--fill)}
.curve,.tick{fill:none;stroke:var(--mark);stroke-width:1.5;vector-effect:non-scaling-stroke}
.quota{display:grid;grid-template-columns:minmax(6rem,auto) 1fr auto;gap:.8rem;align-items:center;
max-width:40rem;margin:.4rem 0}
.quota svg{width:100%;height:.7rem}.room{fill:var(--line)}.used{fill:var(--mark)}.over{fill:var(--bad)}
details{border-bottom:1px solid var(--line);padding:.4rem 0}summary{cursor:pointer}
dl,figure{display:grid;grid-template-columns:max-content 1fr;gap:.35rem 1.2rem}
dd{margin:0;min-width:0}figure{gap:0 .6rem;max-width:48rem}
figure .plot{width:100%;height:9rem;border-left:1px solid var(--line)}
.scale,.days{display:flex;justify-content:space-between}.days{grid-column:2}
.scale{flex-direction:column;text-align:right;height:7.2rem}footer{margin-top:1.2rem}
input,button{font:inherit;color:inherit;background:none;padding:.2rem .5rem;border:1px solid var(--line)}
@media(min-width:62.01rem){.less{display:none}}
@media(max-width:62rem){body{padding:1rem}.more{display:none}th,td{padding:.25rem .6rem .25rem 0}}
@media(max-width:30rem){dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:.5rem}}
"""
# The icon of a browser's tab.
ICON = ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><rect width="16" height="16" rx="3" '
         'fill="#1a66b8"/><path d="M4 4h8v2.4H4zM4 7h8v2.4H4zM4 10h8v2.4H4z" fill="#fff"/></svg>\n')


class Visit(collections.namedtuple('Visit', [
        'top', 'sort', 'search', 'user', 'right', 'places', 'users', 'sees_disk', 'url', 'base'])):
    """A request for a page: the path, the order and a part of names, the user and what the user may see.
    `right` gives the right in a repository, which is not NONE only at and below `places`; `users` gives the
    users of a repository by right (None: the user may not know them), `sees_disk` whether the disk is shown.
    `url` is the server's address for restic, `base` the path in it."""

    __slots__ = ()

    def sees(self, scope: str) -> bool:
        """Whether the user may see a quota's scope."""
        return bool(self.right(f'/{scope}' if scope else '') != NONE)

    def address(self, path: str) -> str:
        return _text(f'rest:{self.url}{quoted_path(path)}/')

    def link(self, path: str, text: str, query: str = '') -> str:
        """A link to the page at a path; the text alone where no request can have that path."""
        try:
            path.encode()
            check_repository(path, False)
        except (UnicodeEncodeError, StorageError):
            return text
        return f'<a href="{_text(f"{self.base}{quoted_path(path)}/")}{query}">{text}</a>'

    def sorted_by(self, sort: str, text: str = '') -> str:
        """A link to the same repositories in another order, if there is one."""
        return self.link(self.top, text or sort, f'?sort={sort}') if sort else text


def visit_of(request: Request, top: str, policy: Policy, accounts: Accounts, base: str) -> Visit:
    from urllib.parse import parse_qsl
    user, query = request.user, dict(parse_qsl(request.query, errors='replace'))
    # Others are named to who sees the whole server, and to all where nobody has a name.
    names, is_open = accounts.users() or (), not accounts.demanded and policy.is_for_all
    sees_server = policy.sees_server(user)
    return Visit(
        top, query.get('sort', ''), query.get('q', '')[:100].lower(), user,
        functools.partial(policy.right, user), policy.places(user),
        functools.partial(policy.who_may, users=names) if sees_server and not is_open else None,
        is_open or sees_server, request.url + base, base)


class Page:
    """Renders the pages of the repositories that `watch` looks at."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._rendering = threading.Lock()
        # Of the last repositories; the same while nothing is added or deleted, which `state` would show.
        self._snapshots = functools.lru_cache(maxsize=16)(lambda name, *state: watch.snapshots(name))

    def headers(self) -> Headers:
        """Headers that let a page show itself and nothing else (CSP Level 3)."""
        import base64
        style = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
        return [('Content-Type', 'text/html; charset=utf-8'), NO_STORE,
                ('Refresh', '60' if self._watch.usage.census.age() < math.inf else '5'),      # seconds
                ('Content-Security-Policy', f"default-src 'none'; style-src 'sha256-{style}'; "
                 "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"),
                ('Referrer-Policy', 'no-referrer'), ('X-Content-Type-Options', 'nosniff'),
                ('Vary', 'Accept')]

    def render(self, visit: Visit) -> str:
        """The page at a path.  One thread at a time renders one."""
        census = self._watch.usage.census
        census.request()
        fresh = census.wait(COUNT_PATIENCE, fresh=True)
        with self._rendering:
            return ''.join(self._parts(visit, fresh))

    def _parts(self, visit: Visit, fresh: bool) -> Iterator[str]:
        now, top = time.time(), visit.top
        below = {place if f'{place}/'.startswith(f'{top}/') else top for place in visit.places
                 if f'{place}/'.startswith(f'{top}/') or f'{top}/'.startswith(f'{place}/')}
        shown = self._watch.look(now, below, lambda name: visit.right(name) != NONE)
        itself = next((repository for repository in shown if top and repository.name == top), None)
        others = [repository for repository in shown if repository is not itself]
        host, fault = _text(socket.gethostname()), self._watch.store.directory.find_fault()
        certificate = self._watch.certificate(now)
        yield ('<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
               f'<title>{host}: {fault or certificate or count_troubles(shown) or "backups"}</title>'
               '<meta name="viewport" content="width=device-width">'
               f'<style>{_STYLE}</style></head><body><main>')
        if top:
            yield f'<p>{visit.link("", "All repositories")}</p>'
        yield f'<h1>{_text(top[1:]) if top else f"Backups on {host}"}</h1>'
        for text, trouble in ((fault, fault[-4:]), (certificate, 'certificate')):
            if text:
                yield f'<p>{_bad(text)}{_small(next_step(trouble))}</p>'
        if itself:
            yield from self._repository(itself, visit)
            if others:
                yield f'<h2>Below {_text(top[1:])}</h2>'
        if others or not itself:
            disk = disk_space(self._watch.store.root) if visit.sees_disk and not fault else None
            yield from self._overview(others, visit, disk, fresh)
        yield f'</main><footer>restic_serve {__version__}, {_moment(now, "%Y-%m-%d %H:%M:%S %Z")}. '
        if shown:
            yield 'Plots show what is stored by the day of its upload; ticks mark days with a snapshot.'
        yield '</footer></body></html>\n'

    def _overview(self, shown: List[Watched], visit: Visit, disk: Any, fresh: bool) -> Iterator[str]:
        """Several repositories: what there is, in a line, their quotas, and tables of them."""
        age = self._watch.usage.census.age()
        if age == math.inf:
            yield '<p>Calculating sizes …</p>'
            return
        yield f'<p>{format_count(len(shown), "repository")}'
        if shown:
            yield f', {_size(shown)}, {_bad(count_troubles(shown)) or "all is well"}'
        if disk:
            free = f'{format_size(disk.free)} of {format_size(disk.total)} free'
            yield f'; {_bad(free) if disk.free < (1 - NEARLY_FULL) * disk.total else free}'
        yield '</p>' if fresh else f'; counted {format_age(age)} ago</p>'
        yield self._quotas([*(repository.name for repository in shown), *visit.places], visit)
        if len(shown) > UNFOLDED or visit.search:
            yield ('<form role="search"><input type="search" name="q" aria-label="Part of a name" '
                   f'value="{_text(visit.search)}"> <button>Search</button></form>')
            shown = [repository for repository in shown if visit.search in repository.title.lower()]
        if not shown and visit.search:
            yield f'<p>No repository has “{_text(visit.search)}” in its name.</p>'
        elif not shown:
            places = [visit.top] if visit.top else ['/laptop', *(
                [f'/{visit.user}', f'/{visit.user}/laptop'] if visit.user else [])]
            place = next((place for place in places if visit.right(place) in (APPEND, WRITE)), None)
            if place is None:
                yield '<p>You cannot access any repository here.</p>'
                return
            restic = f'restic -r {visit.address(place)}'
            yield ('<p>No repositories yet. To create one and back up to it:</p>'
                   f'<pre><code>{restic} init</code></pre><pre><code>{restic} backup ~</code></pre>')
        key = SORTS.get(visit.sort)
        if key:
            shown = sorted(shown, key=lambda repository: (
                not repository.troubles, key(repository), natural_order(repository.name)))
        limited = any(visit.right(repository.name) != WRITE for repository in shown)    # else none is told
        table = functools.partial(_table, visit, visit.right if limited else lambda name: '')
        if key or len(shown) <= UNFOLDED or visit.search:
            yield table('Repositories', shown)
            return
        yield (f'<p>Show all by {visit.sorted_by("name")}, {visit.sorted_by("age", "last snapshot")} or '
               f'{visit.sorted_by("size")}</p>')
        yield table('Repositories', [repository for repository in shown if repository.troubles])
        yield from _folded([repository for repository in shown if not repository.troubles], visit, table)

    def _quotas(self, repositories: Iterable[str], visit: Visit) -> str:
        """Bars that show how much is used of the quotas that the visitor may know of."""
        bars = []
        for scope, quota in self._watch.usage.quotas(repositories).items():
            if visit.sees(scope):
                part = min(quota.held / quota.limit, 1.0)
                text = f'{format_size(quota.held)} of {format_size(quota.limit)}'
                kind, text = ('used', text) if part < NEARLY_FULL else ('over', _bad(text))
                bars.append(f'<div class="quota"><span>{_text(f"/{scope}/" if scope else "All")}</span>'
                            '<svg viewBox="0 0 100 1" preserveAspectRatio="none" aria-hidden="true">'
                            '<rect class="room" width="100" height="1"/><rect class="'
                            f'{kind}" width="{100 * part:.1f}" height="1"/></svg><span>{text}</span></div>\n')
        why = _small('Quotas count each small object and folder as 4 KiB, and deleted objects if kept.')
        return f'<div class="quotas">{"".join(bars)}{why}</div>' if bars else ''

    def _repository(self, repository: Watched, visit: Visit) -> Iterator[str]:
        """One repository: what is to be known of it, its quotas, plot and snapshots."""
        name, holdings, right = repository.name, repository.holdings, visit.right(repository.name)
        reads, scrub = right != METRICS, repository.scrub
        kinds = ', '.join(format_count(holdings.objects[kind], noun) for kind, noun in _KINDS.items())
        facts = {
            'Address': reads and f'<code>{visit.address(name)}</code>',
            'Last snapshot': _last_snapshot(repository),
            'Size': f'{format_size(holdings.bytes)}: {kinds}',
            'Growth': f'{format_size(sum(holdings.days[-30:]))} in 30 days',
            'Kept deleted objects': self._kept(repository, visit),
            'Locks': _locks(repository, ', '.join(
                f'since {_moment(moment)}' for moment in (repository.locks or [])[:NAMES_SHOWN])),
            'Last scrub': _scrub(repository, scrub.names if reads else []),
            'You may': right,
            'Rights': visit.users and '; '.join(
                f'{may}: {_text(", ".join(users[:NAMES_SHOWN]))}'
                + (f' and {len(users) - NAMES_SHOWN} more' if len(users) > NAMES_SHOWN else '')
                for may, users in visit.users(name).items()),
        }
        yield f'<p>{_bad(repository.text_of_troubles()) or "All is well."}'
        yield from (_small(next_step(trouble, '', visit.address(name))) for trouble in repository.troubles)
        yield '</p><dl>'
        yield from (f'<dt>{term}</dt><dd>{text}</dd>' for term, text in facts.items() if text)
        yield f'</dl>{self._quotas([name], visit)}<h2>Size, {DAYS} days</h2><figure><div class="scale">'
        yield from (f'<span>{format_size(holdings.bytes * part / 2)}</span>' for part in (2, 1, 0))
        yield f'</div>{_plot(holdings)}<div class="days">'
        yield from (f'<span>{time.strftime("%Y-%m-%d", time.localtime(repository.now - ago * 86400))}</span>'
                    for ago in (DAYS - 1, DAYS // 2, 0))
        yield '</div></figure>\n<h2>Snapshots</h2>'
        snapshots = self._snapshots(name, holdings.bytes, holdings.last_snapshot, *holdings.objects.values())
        if not snapshots:
            yield '<p>No snapshots yet.</p>'
            return
        yield ('<table><caption>Snapshots</caption><thead><tr><th scope="col">Time</th>'
               '<th scope="col">ID</th><th scope="col" class="n">Added</th></tr></thead>\n<tbody>')
        for snapshot in snapshots[:-SNAPSHOTS_SHOWN - 1:-1]:
            added = 'unknown' if snapshot.added is None else f'+{format_size(snapshot.added)}'
            yield (f'<tr><th scope="row" class="plain">{_moment(snapshot.time)}'
                   f'{_small(repository.ago(snapshot.time))}</th>'
                   f'<td>{_text(snapshot.name[:8]) if reads else ""}</td><td class="n">{added}</td></tr>\n')
        yield '</tbody></table>'
        if len(snapshots) > SNAPSHOTS_SHOWN:
            yield f'<p>Not shown: {format_count(len(snapshots) - SNAPSHOTS_SHOWN, "older snapshot")}.</p>'
        yield '<p class="dim">Added: data that arrived since the previous snapshot and is still stored.</p>'

    def _kept(self, repository: Watched, visit: Visit) -> str:
        """What was deleted from a repository and is kept, and from when on it can be read."""
        holdings, past = repository.holdings, self._watch.usage.past
        text = 'nothing' if past.keeps else ''
        if holdings.kept:
            text = (f'{format_size(holdings.kept_bytes)} in {format_count(holdings.kept, "object")}, '
                    f'{holdings.deleted:,} of them deleted in the last day')
        if past.keeps and visit.right(repository.name) != METRICS:
            with contextlib.suppress(OSError):
                moment = time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(
                    past.earliest(repository.name) // 1_000_000 + 1))
                text += _small(f'Earlier states, since {moment}: '
                               f'<code>{visit.address(repository.name)}{AT}/{moment}/</code>')
        return text


def _folded(sound: List[Watched], visit: Visit, table: Callable[[str, List[Watched]], str]) -> Iterator[str]:
    """Sound repositories, each folder as a line that unfolds; those that are alone in theirs come last."""
    folders: Dict[str, List[Watched]] = {}
    for repository in sound:
        name = repository.name[len(visit.top):].partition('/')[2].partition('/')[0]
        folders.setdefault(f'{visit.top}/{name}' if name else '', []).append(repository)
    alone = [inside.pop() for inside in folders.values() if len(inside) == 1]
    for folder, inside in filter(operator.itemgetter(1), [*folders.items(), ('', alone)]):
        number, only = format_count(len(inside), 'repository'), ''
        head, caption = f'<b>{number}</b>', 'Other repositories'
        if folder:
            name = _text(f'{folder[1:]}/')
            head, caption = f'<b>{name}</b>: {number}', f'Repositories in {name}'
            link = visit.link(folder, f'Only {name}')
            only = f'<p>{link}</p>' if link.startswith('<a') else ''
        last = list(filter(None, (repository.holdings.last_snapshot for repository in inside)))
        oldest = f', oldest last snapshot {inside[0].ago(min(last))}' if last else ''
        yield (f'<details><summary>{head}, all is well; {_size(inside)}{oldest}</summary>{only}'
               f'{table(caption, inside)}</details>\n')


def _table(visit: Visit, right: Callable[[str], str], caption: str, shown: List[Watched]) -> str:
    """A table of repositories, perhaps with the visitor's `right` in each."""
    if not shown:
        return ''
    heads = ''.join(f'<th scope="col" class="{kind}">{visit.sorted_by(sort, head)}</th>'
                    for kind, head, sort, _ in _cells(shown[0], right))
    rows = []
    for repository in shown:
        name, late = visit.link(repository.name, _text(repository.title)), ''
        if repository.troubles:
            name, late = name + _small(f'⚠ {repository.text_of_troubles()}', 'bad'), ' class=late'
        if repository.locks:    # which have a column where there is room
            name += _small(format_count(len(repository.locks), 'lock'), 'less')
        cells = ''.join(f'<td class="{kind}">{text}</td>' for kind, _, _, text in _cells(repository, right))
        rows.append(f'<tr{late}><th scope="row" class="name">{name}</th>{cells}</tr>\n')
    return (f'<table><caption>{caption}</caption><thead><tr>'
            f'<th scope="col">{visit.sorted_by("name", "Repository")}</th>{heads}</tr></thead>\n'
            f'<tbody>{"".join(rows)}</tbody></table>')


def _cells(repository: Watched, right: Callable[[str], str]) -> List[Tuple[str, str, str, str]]:
    """A repository's row: class and heading of each column, the order to which that leads, and content."""
    holdings, may = repository.holdings, right(repository.name)
    size = format_size(holdings.bytes)
    kept = _small(f'and {format_size(holdings.kept_bytes)} deleted') if holdings.kept else ''
    return [
        *([('right more', 'You may', '', may)] if may else []),
        ('age', 'Last snapshot', 'age', _last_snapshot(repository)),
        ('n more', 'Snapshots', '', f'{holdings.objects["snapshots"]:,}'),
        ('n', 'Size', 'size', f'{size}{kept}'),
        ('n more', 'Growth, 30 days', '', f'+{format_size(sum(holdings.days[-30:]))}'),
        ('graph more', f'Size, {DAYS} days', '', _plot(holdings) + _small(f'0 to {size}')),
        ('locks more', 'Locks', '', _locks(repository)),
        ('scrub more', 'Last scrub', '', _scrub(repository)),
    ]


def _size(repositories: List[Watched]) -> str:
    return format_size(sum(repository.holdings.bytes for repository in repositories))


def _last_snapshot(repository: Watched) -> str:
    last = repository.holdings.last_snapshot
    return f'{repository.ago(last)}{_small(_moment(last))}' if last else _NONE


def _locks(repository: Watched, ages: str = '') -> str:
    """How many locks a repository has, and since when: the oldest, or as `ages` has it."""
    if not repository.locks:
        return 'unknown' if repository.locks is None else _NONE
    ages = ages or repository.age_of_locks()
    return f'{len(repository.locks)}{_small(ages, "bad" if LOCKED in repository.troubles else "")}'


def _scrub(repository: Watched, names: Iterable[str] = ()) -> str:
    """The verdict on a repository, with `names` of damaged objects."""
    verdict, scrub = repository.verdict, repository.scrub
    result = verdict if verdict in (SOUND, NOT_CHECKED) else _bad(repository.text_of(verdict))
    checked = _small(repository.ago(scrub.time)) if scrub.time else ''
    return result + checked + ''.join(_small(_text(name)) for name in itertools.islice(names, NAMES_SHOWN))


def _moment(seconds: float, pattern: str = '%Y-%m-%d %H:%M %Z') -> str:
    """A time in the server's zone, as HTML has it."""
    shown = time.strftime(pattern, local_time(seconds))
    return f'<time datetime="{format_time(seconds)}">{_text(shown)}</time>'


def _small(text: str, kind: str = '') -> str:
    return f'<small{f" class={kind}" if kind else ""}>{text}</small>'


def _bad(text: str) -> str:
    """Text that needs attention, marked by more than its colour; none if it is empty."""
    return f'<span class="bad">⚠ {text}</span>' if text else ''


def _text(text: str) -> str:
    import html
    return html.escape(text.encode('utf-8', 'backslashreplace').decode())


def _plot(holdings: Holdings) -> str:
    """A curve of the bytes stored, from the first day that shows on, with ticks for days with a snapshot."""
    begin = holdings.bytes - sum(holdings.days)
    sizes = list(itertools.accumulate(holdings.days[1:], initial=begin + holdings.days[0]))
    first = next((day for day, size in enumerate(sizes) if size >= BLOCK_BYTES), 0)     # not a config alone
    curve = f'M{first} {_PLOT_HEIGHT}' + ''.join(
        f'L{day} {_PLOT_HEIGHT * (1 - size / max(holdings.bytes, 1)):.1f}'
        for day, size in enumerate(sizes) if day >= first)
    days = [day for day, count in enumerate(holdings.snapshots) if count]
    ticks = ''.join(f'M{day} {_PLOT_HEIGHT + 2}v3' for day in days)
    return (f'<svg class="plot" viewBox="-1 -1 {DAYS + 1} {_PLOT_HEIGHT + 7}" preserveAspectRatio="none" '
            f'role="img"><title>{DAYS} days: from {format_size(begin)} to '
            f'{format_size(holdings.bytes)}, days with a snapshot: {len(days)}</title>'
            f'<path class="area" d="{curve}V{_PLOT_HEIGHT}z"/><path class="curve" d="{curve}"/>'
            f'<path class="tick" d="{ticks}"/></svg>')


# ==== Admission ==================================================================================
# Who has how much of the server: places for connections, and the share of each client.
#
# Theory of operation.  What is taken is counted in Counters, so that a limit holds over all processes, and
# what a process has taken is free when it dies.  Counted are
#
#     places      of connections, `limit` at the most.  Those beyond get a ticket, too, which says why they
#                 are turned away; if there are too many of these, they are closed without a word.
#     shares      of each client, `limit_each` at the most: its connections or, where a proxy forwards them,
#                 its requests.  A client is a group of addresses (Peer.groups); of IPv6 a network of each
#                 size has a share.  Proxies, this host and unix sockets may exceed theirs: they are `exempt`.
#
#     Listener    ──▶ admit(peer) ──▶ Ticket ──▶ the connection's thread ──▶ leave(ticket)
#     Api.handle() ──▶ begin_request(client)      Api.finish() ──▶ end_request(client)
#
# Nobody waits for a place.  When all are taken, a connection of this process gives way to the newcomer;
# other processes have about as many, see Server._accept().  First go strangers, who have not logged in: of
# the share with most of them the oldest.  Without any, and on a server without users, it is the connection
# that has been idle longest of the share with most.  A request that is being answered, be it that its
# password is verified, a client with a certificate and a trusted proxy stay; a monitor in a small share, too.

TURNED_AWAY = 64            # Connections beyond the limit that may be answered 503, or end, at a time.
ORDER_SECONDS = 0.1         # How long the order in which connections give way is remembered.
STRANGER_SECONDS = 10       # Longest life of a connection without login while half of the places are taken.

# A connection's place: its client, the rows that count the client's shares, none if it is turned away, and
# the reason for that, empty if it is served.
Ticket = collections.namedtuple('Ticket', ['peer', 'shares', 'refusal'])


class Admission:
    """Places for `limit` connections at a time, and `limit_each` connections or forwarded requests for each
    client, by default a quarter, but 8 at least, as restic uses 5.  `accounts` know logins and proxies."""

    def __init__(self, metrics: Metrics, accounts: Accounts, limit: int = 1024,
                 limit_each: Optional[int] = None) -> None:
        self._accounts, self._metrics, self._counters = accounts, metrics, metrics.counters
        self.limit, self._each, self.exempt = limit, limit_each, accounts.is_proxy
        self._places: Set[Ticket] = set()       # of this process; copy() it before a walk
        self._choosing = threading.Lock()       # of what follows
        self._order: List[Ticket] = []          # of those that give way, the next one last, for a moment
        self._order_until = 0.0

    @property
    def limit_each(self) -> int:
        return self._each or max(self.limit // 4, min(8, self.limit))

    def fit_descriptors(self) -> None:
        """Have fewer places where the limit on open files is low, and log that.  A list needs four."""
        wanted = 4 * self.limit + 256
        allowed, processes = allow_descriptors(wanted), max(self._counters.slots - 1, 1)
        limit = max(processes * (allowed - min(256, allowed // 4)) // 4, 1)
        if limit < self.limit:
            log.warning('%d open files allow %d connections, not %d (--max-connections); raise their limit '
                        'to %d (LimitNOFILE= in a unit, ulimit -Hn)', allowed, limit, self.limit, wanted)
            self.limit = limit

    def admit(self, peer: Peer) -> Optional[Ticket]:
        """A place for a connection, if only to turn it away; None if there is none.  leave() follows."""
        peer.stays = peer.unix or self._accounts.is_trusted(peer.name)
        shares, is_bound = self._shares(peer), not (peer.unix or self.exempt(peer.name))
        if is_bound and self._taken(shares) >= self.limit_each:
            refusal = CONNECTIONS_PER_ADDRESS
        else:
            ticket = self._enter(Ticket(peer, shares, ''))
            # Of two processes that take the last place at once neither keeps it.
            beyond = self._counters.total(CONNECTIONS, 2)[1] - self.limit
            if beyond <= 0 or (beyond <= TURNED_AWAY and self.make_room(ticket)):
                return ticket
            self.leave(ticket)
            refusal = CONNECTIONS_IN_ALL
        connected, served = self._counters.total(CONNECTIONS, 2)
        has_room = connected - served < TURNED_AWAY
        self._metrics.count_limited(refusal if has_room else CONNECTIONS_IN_ALL, peer.name)
        return self._enter(Ticket(peer, (), refusal)) if has_room else None

    def leave(self, ticket: Ticket) -> None:
        self._enter(ticket, -1)

    def make_room(self, newcomer: Optional[Ticket] = None) -> bool:
        """End a connection of this process so that another may come; whether there is one that may end."""
        for is_new in (time.monotonic() > self._order_until, True):
            with self._choosing:
                if is_new:
                    self._order, self._order_until = self._find_order(), time.monotonic() + ORDER_SECONDS
                while self._order:
                    ticket = self._order.pop()
                    peer = ticket.peer
                    if ticket in self._places and ticket is not newcomer and not (peer.busy or peer.stays):
                        peer.busy = True    # it goes once
                        self._metrics.count_limited(CONNECTIONS_IN_ALL, peer.name)
                        peer.abort()
                        return True
        return False

    def _find_order(self) -> List[Ticket]:
        """The connections that may give way, the next one last."""
        places = self._places.copy()
        idle = [place for place in places if not (place.peer.busy or place.peer.stays)]
        choice = [place for place in idle if not place.peer.known]
        if any(place.peer.probes for place in choice):
            sizes = collections.Counter(share for place in places for share in place.shares)
            largest = max(sizes.values())
            choice = [place for place in choice
                      if not place.peer.probes or max(map(sizes.__getitem__, place.shares)) == largest]
        age = operator.attrgetter('peer.begun' if choice and self._accounts.demanded else 'peer.since')
        choice = choice or [place for place in idle if place.peer.known]
        sizes = collections.Counter(share for place in choice for share in place.shares)
        # The oldest of a share of 3 goes before the second of another share of 3, and before any of 2.
        ranks, counts = [], collections.Counter()   # type: List[Any], collections.Counter[Key]
        for place in sorted(choice, key=age, reverse=True):
            share = max(place.shares, key=sizes.__getitem__)
            counts[share] += 1
            ranks.append((counts[share], -age(place), place))
        return [place for _, _, place in sorted(ranks, key=operator.itemgetter(0, 1))]

    def longest_stay(self) -> float:
        """Seconds that a stranger may stay; any, while half of the places are free or nobody logs in."""
        is_crowded = 2 * self._counters.total(CONNECTIONS, 2)[1] >= self.limit
        return STRANGER_SECONDS if is_crowded and self._accounts.demanded else math.inf

    def begin_request(self, client: Peer) -> None:
        """Count a request that a proxy forwards against the share of its client; end_request() follows in
        any case.  Raises HttpError 503 where the share is used up."""
        shares = self._shares(client)
        self._take(shares, 1)
        if self._taken(shares) > self.limit_each and not self.exempt(client.name):
            self._metrics.count_limited(REQUESTS_PER_ADDRESS, client.name)
            raise HttpError(503, REQUESTS_PER_ADDRESS, [('Retry-After', '10')])

    def end_request(self, client: Peer) -> None:
        self._take(self._shares(client), -1)

    def _enter(self, ticket: Ticket, change: int = 1) -> Ticket:
        self._counters.add(CONNECTIONS, change, 0 if ticket.refusal else change)
        self._take(ticket.shares, change)
        if ticket.shares:
            (self._places.add if change > 0 else self._places.discard)(ticket)
        return ticket

    @staticmethod
    def _shares(peer: Peer) -> Tuple[Key, ...]:
        """The rows that count a client: by hashes, alike in all processes, that strangers do not know."""
        return tuple(('addresses', str(hash(group) % 4096)) for group in peer.groups)

    def _take(self, shares: Tuple[Key, ...], change: int) -> None:
        for share in shares:
            self._counters.add(share, change)

    def _taken(self, shares: Tuple[Key, ...]) -> int:
        """What a client has of the share that is used most, in all processes."""
        return max(self._counters.total(share, 1)[0] for share in shares)


# ==== Api ========================================================================================
# Routes and answers of restic's REST protocol: a Request in, a Response out.
# https://restic.readthedocs.io/en/stable/100_references.html#rest-backend

LIST_BYTES = 32 * 1024  # of a list that are sent at a time
LIST_SECONDS = 2.5      # after which less is sent,
LONGEST_URL_PATH = 4096     # of a request, percent-encoded
FIRST_SECONDS = 0.01    # and for the first time: faults that are found before still have a status
_VERSION_2 = 'application/vnd.x.restic.rest.v2'
_VERSION_1 = 'application/vnd.x.restic.rest.v1'
# Answer to a browser's preflight request (the Fetch standard, CORS protocol).
_PREFLIGHT = (('Access-Control-Allow-Methods', 'GET, HEAD, POST, DELETE'),
              ('Access-Control-Allow-Headers', 'Authorization, Content-Type, Range'),
              ('Access-Control-Max-Age', '86400'))
# restic does not retry 401, 403, 404, 416 and 507, takes a list's 404 for an empty list, and retries 500 for
# 15 minutes.  So: final statuses where waiting does not help, and 404 only for a missing object.
_STATUS_OF_ERRNO = {
    errno.ENAMETOOLONG: 400, errno.EINVAL: 400,     # such as a colon on exFAT
    errno.EACCES: 403, errno.EPERM: 403, errno.ENOTDIR: 403,
    errno.EISDIR: 403, errno.ELOOP: 403, errno.ENXIO: 403,  # not a regular file
    errno.ENOSPC: 507, errno.EDQUOT: 507, errno.EFBIG: 507, errno.EROFS: 507,
    errno.EMFILE: 503, errno.ENFILE: 503,
}
_REASON_OF_STATUS = {400: 'the file system cannot store this name',
                     403: 'the server has no permission to access the file',
                     500: 'the server could not access the file', 503: 'too many open files',
                     507: 'disk full'}
_STATUS_OF_ERROR = {
    InvalidPath: 400, WrongContent: 400, OtherConfig: 403, ReservedName: 404, NotHere: 404,
    NoHistory: 410, DirectoryGone: 500, Busy: 503, ReadOnly: 403, QuotaExceeded: 507,
}
_NO_OBJECT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO)


class Api:
    """restic's REST protocol over a store.  `baseurl` is the prefix of every path, `headers` are added to
    every answer; scripts of the web origin `allow_origin` may use the server.  `prometheus` is empty, `login`
    or `open`; browsers see the `page`.  With `at` all repositories are those of that moment."""

    def __init__(self, store: Store, policy: Policy, accounts: Accounts, baseurl: str,
                 headers: Iterable[Tuple[str, str]], allow_origin: str, usage: Usage, metrics: Metrics,
                 prometheus: str, page: Optional[Page], at: str, events: Events, admission: Admission
                 ) -> None:
        self.store, self.policy, self.accounts, self.usage = store, policy, accounts, usage
        self.metrics, self.events, self.admission, self._page = metrics, events, admission, page
        self.baseurl, self._at, self.prometheus = baseurl, at, prometheus
        self._may_end = bool(policy.path or accounts.file)      # the right to what is under way
        self._fold: Callable[[str], str] = str.lower if store.ignores_case else str
        policy.on_refused_delete = events.on_refused_delete
        policy.is_late_key = self._is_late_key
        self._turns = [threading.Lock() for _ in range(256)]
        self.is_open = not accounts.demanded
        # They hide repositories of that name.
        self._own_paths = {f'{baseurl}/health': self._get_health, '/favicon.ico': self._get_icon}
        if prometheus:
            self._own_paths[f'{baseurl}/metrics'] = self._get_metrics
        self._allow_origin = allow_origin
        self._headers = [*headers, *([('Access-Control-Allow-Origin', allow_origin)] if allow_origin else ()),
                         *([('Vary', 'Origin')] if allow_origin not in ('', '*') else ())]

    def handle(self, request: Request) -> Response:
        """The answer to a request, also where it fails.  Raises only Gone."""
        try:
            if self.accounts.proxies:
                self.accounts.find_client(request)
                if request.client is not request.peer:
                    self.admission.begin_request(request.client)
            if 'origin' in request.headers:
                self._check_origin(request)
            if request.method == 'OPTIONS' and (self._allow_origin or request.path == '*'):
                # RFC 9110 9.3.7: * asks about the server; haproxy's plain check does.
                response = Response(200, list(_PREFLIGHT) if self._allow_origin else [])
            else:
                response = self._route(request)
        except Gone:
            raise
        except HttpError as error:
            if error.status == 429:
                self.metrics.count_limited(LOGINS, request.client.name)
            response = text_response(error.status, str(error), error.headers)
        except StorageError as error:
            if isinstance(error, ReadOnly):     # restic shows the status alone
                self._log(request, 'read-only', '%s %s: %s', request.method, request.path, error)
            wait = [('Retry-After', str(error.retry_seconds))] if isinstance(error, Busy) else ()
            response = text_response(_STATUS_OF_ERROR[type(error)], str(error), wait)
        except OSError as error:
            response = self._fail(request, error)
        except Exception as error:  # a bug must not end the connection
            self._log(request, 'errors', '%s %s: %s: %s', request.method, request.path, type(error).__name__,
                      error, level=logging.ERROR)
            log.debug('traceback:', exc_info=True)
            response = text_response(500, 'internal error')
        response.headers.extend(self._headers)
        return response

    def finish(self, request: Request, status: int, sent: int) -> None:
        """Count and log a request that was answered with `sent` bytes of content."""
        if request.client is not request.peer:
            self.admission.end_request(request.client)
        self.metrics.count(request, status, sent)
        log_access(request, status, sent)

    def refuse(self, error: HttpError) -> Response:
        """The answer to what a wire refuses."""
        return text_response(error.status, str(error), [*error.headers, *self._headers])

    @staticmethod
    def _log(request: Request, kind: str, text: str, *values: object, level: int = NOTICE) -> None:
        refusals.log(level, kind, request.client, request.user, text, *values)

    def _fail(self, request: Request, error: OSError) -> Response:
        status, denial = _STATUS_OF_ERRNO.get(error.errno or 0, 500), ''
        if error.errno == errno.EMFILE:
            self.admission.make_room()
        if error.errno in (errno.EACCES, errno.EPERM):
            with contextlib.suppress(StorageError, OSError):
                location = parse_path(request.path[len(self.baseurl):], self.store.ignores_case)
                path = f'{location.folder}/{location.file}' if location.is_object else location.folder
                denial = explain_denial(self.store.root, path, request.method in ('POST', 'DELETE'))
        if status != 400:
            self._log(request, 'errors', '%s %s: %s%s', request.method, request.path, error.strerror or error,
                      denial and f'; {denial}', level=logging.ERROR)
        return text_response(status, READ_ONLY if error.errno == errno.EROFS else _REASON_OF_STATUS[status])

    def _check_origin(self, request: Request) -> None:
        """Raises HttpError 403 for requests of web pages that may not use the server.  Browsers send Origin
        with every upload and delete, and with every request to another site (the Fetch standard, 3.2).
        A Host that is ours proves nothing: names can be rebound."""
        origin = request.headers['origin']
        if not origin or self._allow_origin not in ('*', origin):
            self._log(request, 'blocked a request from a web page',
                      'blocked a request from a web page of %s in the browser at %s', origin, request.client)
            raise HttpError(403, 'requests from web pages are not allowed (--allow-origin)')

    def _route(self, request: Request) -> Response:
        method, path = request.method, request.path
        reads = method in ('GET', 'HEAD')
        if reads and path in self._own_paths:
            return self._own_paths[path](request)
        request.user = self._identify(request)
        if self.baseurl:
            if path != self.baseurl and not path.startswith(self.baseurl + '/'):
                parse_path(path)
                raise HttpError(404, 'not found')
            path = path[len(self.baseurl):] or '/'
        creates = method == 'POST' and 'create=true' in request.query.split('&')
        try:
            location = parse_path(path, self.store.ignores_case)
        except ReservedName:
            if creates:
                self._log(request, 'reserved name', f'%s: {RESERVED}', path)
            raise
        if creates and location.kind:
            self._log(request, 'reserved name', f'%s: {RESERVED}', path)
        at = location.at or self._at
        if (self._page and reads and not location.kind and not at
                and 'text/html' in request.headers.get('accept', '')):
            return self._get_page(self._page, request, location)
        self.policy.check(request, location)
        if not location.repository.isascii():
            location = self._spell(location)
        source = self._find_view(request, location, at) if at else self.store
        if location.is_object:
            allowed = 'GET, HEAD, POST, DELETE'
            if reads:
                return self._get_object(request, location, source)
            if method == 'POST':
                return self._save(request, location)
            if method == 'DELETE':
                return self._delete(request, location)
        elif location.kind:
            allowed = 'GET, HEAD'
            if reads:
                return self._get_list(request, location, source)
        else:
            allowed = 'POST, GET, HEAD, DELETE'
            if method == 'POST':
                if not creates:
                    raise HttpError(400, 'to create a repository, use POST with ?create=true')
                self.store.directory.check_writable()
                self.usage.create(location)
                return Response(200, [])
            if reads:
                raise HttpError(404, 'not found')
            if method == 'DELETE':
                raise HttpError(501, 'repositories cannot be deleted over the network')
        # RFC 9110 9.1: 501 for a method that is unknown, 405 for one that others have.
        if method in METHODS:
            raise HttpError(405, f'allowed methods are {allowed}', [('Allow', allowed)])
        raise HttpError(501, f'allowed methods are {allowed}')

    def _spell(self, location: Location) -> Location:
        """A location with its repository as Folders.spell() has it."""
        repository = self.store.folders.spell(location.repository)
        return Location(repository, location.kind, location.name, location.at)

    def _is_late_key(self, key: Location) -> bool:
        key, size = self._spell(key), self.store.size
        return size(key) is None and size(Location(key.repository, 'config')) is not None

    def _identify(self, request: Request) -> str:
        """The user, in lower case where the file system ignores case.  Raises as Accounts.identify() does."""
        user = self.accounts.identify(request)
        request.peer.known |= bool(user)
        return user.lower() if self.store.ignores_case else user

    def _find_view(self, request: Request, location: Location, at: str) -> View | Store:
        """The repository of a location as it was.  It can be read, but its locks are those of the present, so
        that restic can hold one and a prune waits."""
        self.store.directory.check_present()
        try:
            view = self.usage.past.view(location.repository, at)
        except StorageError as error:  # restic shows the status alone
            self._log(request, 'earlier state', '%s/%s/%s: %s', location.repository, AT, at, error)
            raise
        if location.kind == 'locks':
            return self.store
        if request.method not in ('GET', 'HEAD'):
            raise HttpError(403, 'earlier states (.at) are read-only')
        return view

    def _save(self, request: Request, location: Location) -> Response:
        self.store.directory.check_writable()
        right, body = self.policy.right, request.body
        if location.kind == 'locks' and right(request.user, location.repository) == READ:
            self._check_lock(request, location)
        if self._may_end:
            body = WatchedBody(body, access_check(
                self.policy, self.accounts.file, self._fold, request, location))
        objects, size = self.usage.save(
            location, body, location.kind == 'index' and right(request.user, location.repository) == WRITE)
        if objects:
            self.metrics.count_blob(request, location, Metrics.WRITTEN, size)
            if location.kind == 'snapshots':
                self.events.on_snapshot(request, location)
        return Response(200, [])

    def _check_lock(self, request: Request, location: Location) -> None:
        """Raises HttpError 403 for what is no lock but a way to store things, by a user who may only read."""
        length, locks = request.body.length, Location(location.repository, 'locks')
        if length is None:
            raise HttpError(411, 'Content-Length is required for locks')
        if length > LOCK_BYTES or sum(len(names) for names, _ in self.store.objects(locks, False)) >= LOCKS:
            self._log(request, 'access denied',
                      'access denied: %s from %s may not add %s: too large for a lock, or too many locks',
                      request.user or 'a client', request.client, location)
            raise HttpError(403, 'read access only: too large for a lock, or too many locks')

    def _delete(self, request: Request, location: Location) -> Response:
        self.store.directory.check_writable()
        snapshots = self.events.count_snapshots(location) if location.kind == 'snapshots' else ()
        size = self.usage.delete(location)
        if size is not None:
            self.metrics.count_blob(request, location, Metrics.DELETED, size)
            if snapshots:
                self.events.emit(FORGOTTEN, location.repository, request.client.name, request.user, snapshots)
        return Response(200, [])

    def _get_object(self, request: Request, location: Location, source: View | Store) -> Response:
        try:
            content = source.open(location)
        except OSError as error:
            if error.errno in _NO_OBJECT:
                self.store.directory.check_present()
                raise HttpError(404, 'not found') from None
            raise
        request.location = location     # it is counted as read when it was sent
        response = object_response(request, content)
        if source is not self.store or location.kind in ('config', 'locks'):
            response.headers.append(NO_STORE)   # all else is what its name says
        if self._may_end and response.body is content:
            content.check = access_check(self.policy, self.accounts.file, self._fold, request, location)
        return response

    def turn(self, client: str) -> threading.Lock:
        """What lists and pages of a client take one at a time: many would keep the interpreter."""
        return self._turns[hash(client) % len(self._turns)]

    def _get_list(self, request: Request, location: Location, source: View | Store) -> Response:
        sizes = request.headers.get('accept') == _VERSION_2
        headers = [('Content-Type', _VERSION_2 if sizes else _VERSION_1), NO_STORE]
        if request.method == 'HEAD':
            return Response(200, headers, iter(()))
        self.store.directory.check_present()
        turn = self.turn(request.user or request.client.group)
        chunks = in_turn(json_list(source.objects(location, sizes), sizes), turn)
        first = next(chunks)
        return Response(200, headers, first if first.endswith(b']') else chunks)

    def _get_metrics(self, request: Request) -> Response:
        shows, of_server = None, True   # type: Optional[Callable[[str], bool]], bool
        if self.prometheus != 'open':
            request.user = user = self._identify(request)
            if self.accounts.demanded or not self.policy.is_for_all or (user and not request.peer.unix):
                shows, of_server = self.policy.metrics_of(user), self.policy.sees_server(user)
                if not shows:
                    raise HttpError(403, 'no access to metrics')
        return Response(200, [('Content-Type', 'text/plain; version=0.0.4; charset=utf-8'), NO_STORE],
                        self.metrics.exposition(shows, of_server).encode())

    def _get_health(self, request: Request) -> Response:
        """For load balancers and monitors, without a login."""
        request.is_probe = True
        fault = self.store.directory.find_fault()
        return text_response(503 if fault else 200, fault or 'ok')

    def _get_page(self, page: Page, request: Request, location: Location) -> Response:
        policy, top = self.policy, location.repository
        if top and policy.right(request.user, top) == NONE:
            policy.check(request, location)
        visit = visit_of(request, self._spell(location).repository, policy, self.accounts, self.baseurl)
        with self.turn(request.user or request.client.group):
            text = page.render(visit)
        return Response(200, page.headers(), text.encode('utf-8', 'replace'))

    def _get_icon(self, request: Request) -> Response:
        """Browsers ask for it by themselves, without a login."""
        request.is_probe = True
        return Response(200, [('Content-Type', 'image/svg+xml'), ('Cache-Control', 'max-age=604800')],
                        ICON.encode())


def object_response(request: Request, content: FileSlice) -> Response:
    """The answer with the part of an object that a request selects.  Raises HttpError and OSError."""
    headers = [('Content-Type', 'application/octet-stream'), ('Accept-Ranges', 'bytes')]
    # RFC 9110 14.2: only GET has ranges.  13.1.5: without validators If-Range cannot match: no range.
    status, size, part = 200, content.length, None
    if request.method == 'GET' and 'if-range' not in request.headers:
        try:
            part = parse_range(request.headers.get('range', ''), size)
        except HttpError:
            content.close()
            raise
    if part:
        content.offset, content.length = offset, length = part
        headers.append(('Content-Range', f'bytes {offset}-{offset + length - 1}/{size}'))
        status = 206
    is_small = content.length <= SMALL_BYTES and request.method == 'GET'
    # Those are read before the status is sent, so that an error has its own.
    return Response(status, headers, content.read_all() if is_small else content)


def in_turn(items: Generator[T, None, None], turn: threading.Lock) -> Generator[T, None, None]:
    """Items, each of which is made while nobody else has the turn."""
    with contextlib.closing(items):
        while True:
            with turn:
                item = next(items, None)
            if item is None:
                return
            yield item


def json_list(objects: Generator[Tuple[List[str], List[int]], None, None], sizes: bool
              ) -> Generator[bytes, None, None]:
    """The JSON array of a list, in chunks: `[{"name":…,"size":…}]` with `sizes`, else `["…"]`.  The first
    comes twice: before the status is sent, so that an error has its own, and then to be sent."""
    before, times = '[', 2      # what stands before the next names; how often the next chunk comes
    parts, length, due = [], 0, time.monotonic() + FIRST_SECONDS    # type: List[str], int, float
    with contextlib.closing(objects):
        for names, lengths in objects:
            if not names:
                continue
            parts += (before, ','.join([f'{{"name":"{name}","size":{size}}}'
                                        for name, size in zip(names, lengths)])
                      if sizes else '"{}"'.format('","'.join(names)))
            before = ','
            length += len(parts[-1])
            if length >= LIST_BYTES or time.monotonic() >= due:
                yield from [''.join(parts).encode()] * times
                parts, length, due, times = [], 0, time.monotonic() + LIST_SECONDS, 1
    yield from [''.join((*parts, '[]' if before == '[' else ']')).encode()] * times


@functools.lru_cache(maxsize=256)
def parse_path(path: str, ignore_case: bool = False) -> Location:
    """The Location of a request's path, without the base URL; with `ignore_case` the repository's path is in
    lower case.  Raises InvalidPath, and ReservedName for a path that cannot name a repository, a list or an
    object.  No segment of a repository's path is a kind or `config`: none lies in another's objects."""
    if len(path) > LONGEST_URL_PATH:
        raise InvalidPath(f'path is longer than {LONGEST_URL_PATH} bytes')
    if '%' in path:
        path = _decode_path(path)
    at = ''
    before, mark, after = path.partition(f'/{AT}/')
    if mark:
        at, _, rest = after.partition('/')
        path = f'{before}/{rest}'
        if not at or f'/{AT}/' in path:
            raise ReservedName('not found')
    parent, _, name = path.rpartition('/')
    repository, slash, kind = parent.rpartition('/')
    if not (slash and kind in KINDS and (not name or _NAME.fullmatch(name))):
        kind = name = ''
        repository = path[:-1] if path.endswith('/') else path
        if path.endswith('/config'):
            repository, kind = path[:-len('/config')], 'config'
    return Location(check_repository(repository, ignore_case), kind, name, at)


def _decode_path(path: str) -> str:
    """Decode percent-encoding (RFC 3986 2.1), but no slash, which no name may have.  Raises InvalidPath."""
    from urllib.parse import unquote_to_bytes
    if re.search(r'%(?![0-9A-Fa-f]{2})|%2[fF]', path):
        raise InvalidPath('invalid percent-encoding in the path')
    try:
        return unquote_to_bytes(path).decode()
    except UnicodeDecodeError:
        raise InvalidPath('the path is not UTF-8') from None


# ==== Transport ==================================================================================
# Bytes over a socket, over TLS on a socket, and over pipes, with the same methods.  recv_into() receives
# none at the end of input, which end_input() makes the receiving thread see; skip_input() receives below TLS.
# send() sends all, perhaps with the next call if there is `more`; end_output() tells the client that this was
# all.  reset_at_close() makes close() reset the connection, so that an answer does not look complete, and
# abort() does so at once.
#
# Theory of operation.  Sockets block, and one thread receives and sends; over pipes each has a thread.
# end_input() and abort() are called by other threads, and never wait.  A transport raises OSError for what
# the network does: BlockingIOError where the client accepts no byte for too long, which the kernel notices
# (SO_SNDTIMEO in socket(7)) without a timer or a poll(2) for each call.

PIPE_BYTES = 1 << 20         # Size requested for a pipe; Linux allows it to everybody.
PIPE_LINGER = 0.1            # Seconds without input after which none is expected.
_F_SETPIPE_SZ = 1031         # fcntl(2); in the module fcntl from Python 3.10 on.
STALL_PARTS = 4              # Timeouts of the kernel that make a stall.
FILE_BYTES = 1 << 20         # Sent by one sendfile(2), after which progress is noted.
RECORDS_BYTES = 64 * 1024    # TLS records in memory at a time; each connection keeps this much.
RECORD_OVERHEAD = 512        # Bytes that records add to small content.
_MORE = getattr(socket, 'MSG_MORE', 0)
_CONNECTION_ERRORS = (errno.EAGAIN, errno.EPIPE, errno.ECONNRESET, errno.ECONNABORTED,
                      errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN)
_NO_SENDFILE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)    # not with this file system or socket
_ANSWER_TO_PLAIN_HTTP = (
    b'HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nContent-Length: 23\r\nConnection: close\r\n\r\n'
    b'this port speaks HTTPS\n')


class SocketTransport:
    """A blocking socket.  Sending fails with BlockingIOError when the client has accepted no byte for
    `stall_seconds`, or up to a quarter longer: the kernel's timer also ends a call that has sent some."""

    def __init__(self, sock: socket.socket, stall_seconds: float = math.inf) -> None:
        self._sock, self._closing = sock, threading.Lock()
        self.recv, self.recv_into, self.skip_input = sock.recv, sock.recv_into, sock.recv_into
        stall_seconds /= STALL_PARTS
        if stall_seconds < math.inf and os.name == 'posix':
            for form in ('@ll', '@qq'):  # the second for 32-bit systems with 64-bit times
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack(
                        form, int(stall_seconds), int(stall_seconds % 1 * 1e6)))
                    break

    def send(self, data: bytes | memoryview, more: bool = False) -> None:
        flags = _MORE if more else 0
        waits = STALL_PARTS
        while True:
            try:
                count = self._sock.send(data, flags)
            except BlockingIOError:
                waits -= 1
                if not waits:
                    raise
                continue
            if count == len(data):
                return
            data, waits = memoryview(data)[count:], STALL_PARTS

    def send_file(self, content: FileSlice, limit: int) -> bool:
        """Send at most `limit` bytes of a slice; False without sendfile(2).  Raises OSError, which is one of
        the file unless it is in _CONNECTION_ERRORS."""
        if not hasattr(os, 'sendfile'):
            return False
        for left in reversed(range(STALL_PARTS)):
            try:
                content.advance(os.sendfile(self._sock.fileno(), content.fd, content.offset,
                                            min(content.length, limit, FILE_BYTES)))
                break
            except OSError as error:
                if error.errno in _NO_SENDFILE:
                    return False
                if not left or not isinstance(error, BlockingIOError):
                    raise
        return True

    def end_input(self) -> None:
        self._shutdown(socket.SHUT_RD)

    def end_output(self) -> None:
        self._sock.shutdown(socket.SHUT_WR)

    def reset_at_close(self) -> None:
        with contextlib.suppress(OSError):  # unix sockets have no reset; there the end is missing
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))

    def abort(self) -> None:
        self.reset_at_close()
        self._shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with self._closing:
            self._sock.close()

    def _shutdown(self, how: int) -> None:
        # With the lock: after close() the descriptor may belong to another connection.
        with self._closing, contextlib.suppress(OSError):
            self._sock.shutdown(how)


class TlsTransport:
    """The server's side of TLS, through memory BIOs: one system call moves many records, where OpenSSL takes
    one or two for each.  `authority` is the content of the CA file by which clients are checked."""

    def __init__(self, below: SocketTransport, context: ssl.SSLContext, authority: bytes = b'') -> None:
        import ssl
        self.below, self.authority = below, authority
        self._received, self._unsent = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._received, self._unsent, server_side=True)
        self._wants_input = ssl.SSLWantReadError
        self._ended = False                 # close_notify was received
        self.end_input, self.skip_input, self.abort = below.end_input, below.recv_into, below.abort
        self.reset_at_close, self.close = below.reset_at_close, below.close

    def shake_hands(self) -> Tuple[bool, str]:
        """Do the handshake; whether there is a certificate, and its only name.  Raises HandshakeFailed."""
        import ssl
        try:
            done = self._call(SMALL_BYTES, self._tls.do_handshake)
        except ssl.SSLError as error:
            reason = (error.reason or str(error)).replace('_', ' ').lower()
            if error.reason == 'HTTP_REQUEST':
                reason = 'client speaks HTTP without TLS'
                self.below.send(_ANSWER_TO_PLAIN_HTTP)
            raise HandshakeFailed(f'TLS: {reason}') from None
        if done == 0:
            raise ConnectionAbortedError(errno.ECONNABORTED, 'client disconnected during the handshake')
        certificate: Any = self._tls.getpeercert() or {}
        # RFC 5280 4.1.2.4: a name is a list of sets of attributes.
        names = [value for name, value in itertools.chain.from_iterable(certificate.get('subject', ()))
                 if name == 'commonName']
        return bool(certificate), names[0] if len(names) == 1 else ''

    def recv_into(self, view: memoryview) -> int:
        """Receive at least one record, and as many more as have arrived."""
        total: int = self._call(len(view), self._tls.read, len(view), view)
        with contextlib.suppress(self._wants_input):
            while total < len(view) and self._received.pending and not self._ended:
                total += self._read(self._tls.read, len(view) - total, view[total:])
        return total

    def send(self, data: bytes | memoryview, more: bool = False) -> None:
        view = memoryview(data)
        while view:
            self._tls.write(view[:RECORDS_BYTES])
            if not more:
                self.below.send(self._unsent.read())
            view = view[RECORDS_BYTES:]

    def end_output(self) -> None:
        """Send close_notify (RFC 8446 6.1), and end the connection below."""
        with contextlib.suppress(OSError):  # the client's has not arrived
            self._tls.unwrap()
        self.below.send(self._unsent.read())
        self.below.end_output()

    def _call(self, limit: int, function: Callable[..., Any], *args: Any) -> Any:
        """Call OpenSSL, and give it input as long as it wants more; 0 at the end of input."""
        while not self._ended:
            if self._received.pending or self._tls.pending():
                with contextlib.suppress(self._wants_input):
                    return self._read(function, *args)
            data = self.below.recv(min(limit + RECORD_OVERHEAD, RECORDS_BYTES))
            if not data:
                break
            self._received.write(data)
        return 0

    def _read(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call OpenSSL once, and send what it wants sent."""
        try:
            result = function(*args)
            # A read returns b'' or 0 after close_notify; a handshake returns None.
            self._ended = not result and result is not None
            return result
        finally:
            if self._unsent.pending:
                self.below.send(self._unsent.read())


class PipeTransport:
    """Standard input and output, to a client that speaks HTTP/2.  Pipes have neither timeouts nor resets."""

    def __init__(self, source: int = 0, target: int = 1) -> None:
        self._source, self._target = source, target
        self._alarm, self._bell = socket.socketpair()   # readable after end_input()
        self._awaited: List[Any] = [source, self._alarm]
        self._timeout: Optional[float] = None
        for fd in (source, target):
            os.set_blocking(fd, True)
            with contextlib.suppress(ImportError, OSError):
                import fcntl
                fcntl.fcntl(fd, _F_SETPIPE_SZ, PIPE_BYTES)

    def recv_into(self, view: memoryview) -> int:
        readable = select.select(self._awaited, [], [], self._timeout)[0]
        data = os.read(self._source, len(view)) if readable == [self._source] else b''
        view[:len(data)] = data
        return len(data)

    skip_input = recv_into

    def send(self, data: bytes | memoryview, more: bool = False) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._target, view):]

    def end_input(self) -> None:
        with contextlib.suppress(OSError):
            self._bell.shutdown(socket.SHUT_WR)

    def end_output(self) -> None:
        # Some clients end our input only after the process has ended.
        self._awaited, self._timeout = [self._source], PIPE_LINGER
        if stat.S_ISSOCK(os.fstat(self._target).st_mode):
            with socket.socket(fileno=os.dup(self._target)) as both:
                both.shutdown(socket.SHUT_WR)
        with open(os.devnull, 'wb') as nothing:
            os.dup2(nothing.fileno(), self._target)

    def reset_at_close(self) -> None:
        """Not possible; the client sees how the process ends."""

    def abort(self) -> None:
        """End the process: a thread that writes to a pipe cannot be woken."""
        os.kill(os.getpid(), signal.SIGTERM)

    def close(self) -> None:
        self._alarm.close()     # the rest is left to the end of the process
        self._bell.close()


# ==== Connection =================================================================================
# One client: its bytes, its deadline, its share of the bandwidth.
#
# Theory of operation.  A connection's thread waits in the kernel without a timer; whatever happens to the
# client is raised as Gone, so that an OSError from here is one of a file.  The main thread looks at each
# deadline twice a second, and calls expire() when it has passed.  A transfer has three limits: its whole time
# (--server-read-timeout, --server-write-timeout), the time without a byte (--stall-timeout) and --bwlimit,
# whose delays count for neither: the connection's clock() stands still meanwhile.
#
# A connection ends so that the last answer reaches a client that is still sending.  The thread is told by the
# client's end of input, by a request or an answer that says close, or by expire() or stop(), which end the
# input.  It answers what it can: 408 if time was over while it received.  linger() ends the output, then
# discards input until the client ends it, too; else the kernel would send a reset, which destroys the answer
# on its way.  close() follows.  abort() skips all of that: for a thread stuck in sending, and when the grace
# period of the server's stop is over.  abort_answer() resets after an answer that cannot be completed.

LINGER_BYTES = 64 << 20      # Most unwanted input that is discarded.
LINGER_SECONDS = 5           # Longest time for that.
LINGER_MOST_SECONDS = 60     # Longest time for the end of the output.
_UNWANTED = memoryview(bytearray(64 * 1024))    # shared buffer for input that is discarded
HEADER_SLACK = 4096          # Bytes that a header section may exceed --max-header-bytes, as in Go's servers.
TRANSFER_SECONDS = 3600      # Default limit for a whole upload or download.
SLOWEST_RATE = 1024          # Bytes that extend it by a second.


class Limits:
    """Limits of a client: bytes of a header section, and seconds for that, between two requests, for
    receiving and for sending a whole body (0 is no limit, None TRANSFER_SECONDS, extended by `extension` for
    each byte that passes), and without any progress (a stall)."""

    def __init__(self, header_bytes: int = 4096, header_seconds: float = 10,
                 idle_seconds: float = 60, read_seconds: Optional[float] = None,
                 write_seconds: Optional[float] = None, stall_seconds: float = 60) -> None:
        def transfer(seconds: Optional[float]) -> Tuple[float, float]:
            # 0 is no limit, as in rclone
            return (TRANSFER_SECONDS, 1 / SLOWEST_RATE) if seconds is None else (seconds or math.inf, 0.0)

        self.header_bytes, self.header_seconds = header_bytes, header_seconds
        self.idle_seconds, self.stall_seconds = idle_seconds, stall_seconds or math.inf
        self.read_seconds, self.read_extension = transfer(read_seconds)
        self.write_seconds, self.write_extension = transfer(write_seconds)


class Deadline:
    """When a client takes too long: at `end`, put off by `extension` seconds for each byte that has `passed`;
    or after `stall` seconds without a byte, where one has been waited for `since` a time."""

    __slots__ = ('end', 'extension', 'stall', 'passed', 'since')

    def __init__(self, end: float = math.inf) -> None:
        self.begin(end)

    def begin(self, end: float, extension: float = 0.0, stall: float = math.inf) -> None:
        """Have another deadline; no byte has passed."""
        self.end, self.extension, self.stall = end, extension, stall
        self.passed, self.since = 0, math.inf

    def time(self) -> float:
        return min(self.end + self.passed * self.extension, self.since + self.stall)

    def is_stalled(self, now: float) -> bool:
        """Whether it is the lack of any byte that takes too long."""
        return self.since + self.stall <= now


class Connection:
    """A client behind a `transport`: what its thread waits for, and until when.  `on_limit` is called with a
    limit that ended something; `on_stop`, if there is one, when the server stops."""

    IDLE, READING, WRITING = range(3)

    def __init__(self, transport: Transport, peer: Peer, limits: Limits,
                 bandwidth: Optional[Bandwidth] = None,
                 on_limit: Callable[[str, Peer], None] = lambda limit, peer: None) -> None:
        self.peer, self.limits, self.on_limit = peer, limits, on_limit
        self.on_stop: Optional[Callable[[], None]] = None
        self.waits = self.IDLE
        self.expired = self.stopping = False
        self.unpinned = False               # the thread runs on any core; it began as the main thread is
        self.end_input = transport.end_input    # make the receiving thread see the end of input
        self.abort = peer.abort = transport.abort   # end it at once, whatever its thread waits for
        self.close = transport.close
        self.authority: Optional[bytes] = getattr(transport, 'authority', None)     # None without TLS
        self._transport, self._bandwidth = transport, bandwidth
        self._throttled_seconds = 0.0       # spent waiting for the bandwidth
        self._throttled_since = 0.0         # start of the wait that is going on, or 0
        self.deadline = Deadline(self.clock() + limits.header_seconds)  # when to expire(), by clock()

    def clock(self) -> float:
        """A monotonic clock in seconds that stands still while the connection waits for the bandwidth.  Where
        two threads wait at once, over pipes, it goes slow, which only delays deadlines."""
        return (self._throttled_since or time.monotonic()) - self._throttled_seconds

    def wait_for(self, what: int, seconds: Optional[float] = None) -> None:
        """Set what the thread waits for, and the deadline: without `seconds` it is that of a whole body."""
        limits, deadline, extension, stall = self.limits, self.deadline, 0.0, math.inf
        if seconds is None and what == self.READING:
            seconds, extension, stall = limits.read_seconds, limits.read_extension, limits.stall_seconds
        elif seconds is None:
            seconds, extension = limits.write_seconds, limits.write_extension
        # The end first: the main thread may look at any moment.  No calls: this is done for each request.
        deadline.end = (self._throttled_since or time.monotonic()) - self._throttled_seconds + seconds
        deadline.extension, deadline.stall, deadline.passed = extension, stall, 0
        self.waits = what

    def wait_no_longer(self, seconds: float) -> None:
        """Move the deadline to `seconds` from now, unless it is earlier."""
        self.deadline.end = min(self.deadline.end, self.clock() + seconds)

    def expire(self) -> None:
        """The deadline has passed: end the input of a thread that receives and can still answer; or abort."""
        if self.expired or self.waits == self.WRITING:
            self.abort()
            return
        self.expired = True
        if self.deadline.is_stalled(self.clock()):
            self.on_limit(STALLED_UPLOAD, self.peer)
        self.deadline.begin(self.clock() + 1)   # for the thread to wake, on a busy machine, too
        self.end_input()

    def shake_hands(self) -> None:
        """Do the handshake of TLS, if it is spoken.  Raises Gone."""
        if isinstance(self._transport, TlsTransport):
            try:
                self.peer.certified, self.peer.user = self._transport.shake_hands()
                self.peer.secure, self.peer.stays = True, self.peer.stays or self.peer.certified
            except OSError as error:
                raise Gone(f'TLS: {error}') from None

    def unpin(self, unpinned: bool) -> None:
        """unpin() the connection's thread, or not."""
        self.unpinned = unpinned
        unpin(unpinned)

    def receive_into(self, view: memoryview) -> int:
        """Receive into the start of `view`; the number of bytes, 0 at the end of input.  Raises Gone."""
        if self._bandwidth:
            view = view[:self._bandwidth.step(Bandwidth.RECEIVED, len(view))]
        if self.waits == self.READING:
            self.deadline.since = self.clock()
        try:
            count = self._transport.recv_into(view)
        except OSError as error:
            raise Gone(f'receiving: {error}') from None
        self.deadline.since = math.inf
        self.deadline.passed += count
        if self._bandwidth:
            self._throttle(self._bandwidth, Bandwidth.RECEIVED, count)
        return count

    def transmit(self, data: bytes | memoryview, more: bool = False) -> None:
        """Send all of `data`; with `more` it may wait for the next call.  Raises Gone."""
        try:
            while data:
                part = data[:self._turn(len(data))] if self._bandwidth else data
                self._transport.send(part, more)
                self.deadline.passed += len(part)
                data = memoryview(data)[len(part):]
        except OSError as error:
            self._give_up(error)

    def transmit_file(self, content: FileSlice) -> None:
        """Send a slice, by sendfile(2) where the transport can.  Raises Gone, and OSError of the file."""
        if not self.unpinned:
            self.unpin(True)
        transport, direct = self._transport, True
        while content.length:
            if not direct or not isinstance(transport, SocketTransport):
                self.transmit(content.read(RECORDS_BYTES))
                continue
            before = content.length
            try:
                direct = transport.send_file(content, self._turn(before))
            except OSError as error:
                if error.errno not in _CONNECTION_ERRORS:
                    raise
                self._give_up(error)
            self.deadline.passed += before - content.length

    def _give_up(self, error: OSError) -> NoReturn:
        """Raise an error of sending as Gone."""
        if isinstance(error, BlockingIOError):
            self.on_limit(STALLED_DOWNLOAD, self.peer)
            self._transport.reset_at_close()
            raise Gone('sending: the client has stopped reading') from None
        raise Gone(f'sending: {error}') from None

    def _turn(self, count: int) -> int:
        """Wait for the bandwidth; how many of `count` bytes may be sent now."""
        if self._bandwidth:
            count = self._bandwidth.step(Bandwidth.SENT, count)
            self._throttle(self._bandwidth, Bandwidth.SENT, count)
        return count

    def _throttle(self, bandwidth: Bandwidth, direction: int, count: int) -> None:
        """Wait until the bandwidth lets `count` bytes pass."""
        begin = self._throttled_since = time.monotonic()
        bandwidth.wait(direction, count)
        self._throttled_seconds += time.monotonic() - begin
        self._throttled_since = 0.0

    def linger(self) -> None:
        """End the output and discard input until the client ends it (RFC 9112 9.6)."""
        try:
            self.wait_for(self.WRITING, min(LINGER_MOST_SECONDS, self.limits.write_seconds))  # close_notify
            self._transport.end_output()
            self.wait_for(self.IDLE, LINGER_SECONDS)
            count, left = 1, LINGER_BYTES
            while count and left > 0:
                count = self._transport.skip_input(_UNWANTED)
                left -= count
        except OSError as error:
            log.debug('%s: closing: %s', self.peer, error)

    def abort_answer(self, error: Exception) -> NoReturn:
        """Reset the connection, so that the answer does not look complete.  Raises Gone."""
        refusals.log(logging.ERROR, 'response aborted', self.peer, '', '%s: response aborted: %s', self.peer,
                     error)
        self._transport.reset_at_close()
        raise Gone('response aborted')

    def stop(self) -> None:
        """End the connection after the request that is being served."""
        self.stopping = True
        if self.on_stop:
            self.on_stop()
        elif self.waits == self.IDLE:
            self.end_input()


# ==== Http1 ======================================================================================
# One HTTP/1.1 connection (RFC 9112).  A message that two parsers could read differently is refused.

RECEIVE_BYTES = 992          # Bytes received at a time for a header section; malloc() has such blocks ready.
CLIENT_GONE = 499            # Status in the access log for a client that is gone, as in nginx.
SKIP_BYTES = 64 * 1024       # Longest unwanted body that is read so that the connection can be kept.
_pipeliners = [threading.Lock() for _ in range(64)]     # a client's pipelined requests take turns

_FIELD_LINES = re.compile(rf'(?:{_TOKEN}:[\t -~\x80-\xff]*\r\n)*')
_REQUEST_LINE = re.compile(rf'({_TOKEN}) ([!-"$-~]+) HTTP/1\.([0-9])\r\n')
_BARE_LF = re.compile(rb'(?<!\r)\n')
_FRAMING = frozenset(('content-length', 'transfer-encoding', 'expect', 'connection'))
_FIELD = re.compile(r'([^:]+):[ \t]*([^\r]*)\r\n')
_HOST = re.compile(r"[A-Za-z0-9._~%!$&'()*+,;=:\[\]-]*")
_ABSOLUTE = re.compile(r'https?://[^/?]+(.*)', re.IGNORECASE)
_LENGTH = re.compile('[0-9]{1,18}')
_CHUNK_LINE = re.compile(rb'([0-9A-Fa-f]{1,15})(?:[\t ]*;[\t -~\x80-\xff]*)?')
_UNKNOWN = 1 << 63          # Bytes that are left of content that ends somehow else.
_PREFACE_HEAD = 'PRI * HTTP/2.0\r\n'  # RFC 9113 3.4: how HTTP/2 begins with prior knowledge
_NO_HTTP2 = 'HTTP/2 is spoken over --stdio only; use HTTP/1.1'
_IN_PROXIES = (' (in a proxy: haproxy without "proto h2", Caddy with http:// instead of h2c://, nginx with '
               'proxy_http_version 1.1)')
# The fault of a head that does not match: the first pattern that does.
_FAULTS = (
    (re.compile(rf'{_TOKEN} [!-~]+ HTTP/(?!1\.)[0-9](\.[0-9])?\r\n'), 505, 'not HTTP/1.1'),
    (re.compile(rf'(?!{_TOKEN} [!-"$-~]+ HTTP/1\.[0-9]\r\n)'), 400, 'malformed request line'),
    # RFC 9112 5.2 and 5.1, RFC 9110 5.5
    (re.compile(r'.*\n[ \t]', re.DOTALL), 400, 'folded header line'),
    (re.compile(rf'.*\n{_TOKEN}[ \t]+:', re.DOTALL), 400, 'space before the colon'),
    (re.compile(r'.*([^\t\r\n -~\x80-\xff]|\r(?!\n))', re.DOTALL), 400, 'control character'),
    (re.compile(''), 400, 'malformed header line'))


def parse_head(text: str) -> Tuple[str, str, str, Dict[str, str]]:
    """Method, target, version, headers of a head without its end (RFC 9112 3, 5).  Raises HttpError."""
    line = _REQUEST_LINE.match(text)
    if not line or not _FIELD_LINES.fullmatch(text, line.end()):
        raise next(HttpError(status, reason) for fault, status, reason in _FAULTS if fault.match(text))
    method, target, minor = line.groups()
    headers: Dict[str, str] = {}
    repeated: Dict[str, List[str]] = {}
    for name, value in _FIELD.findall(text, line.end()):
        name, value = name.lower(), value.rstrip(' \t')
        if name in headers:
            repeated.setdefault(name, [headers[name]]).append(value)
        headers[name] = value
    headers.update((name, ', '.join(values)) for name, values in repeated.items())
    # RFC 9112 3.2: 400 for a request of HTTP/1.1 without Host, with two, or with a bad one.
    host = headers.get('host')
    if (host is None and minor != '0') or not _HOST.fullmatch(host or ''):
        raise HttpError(400, 'missing or invalid Host header')
    if target[0] != '/' and target != '*':
        absolute = _ABSOLUTE.fullmatch(target)  # RFC 9112 3.2.2
        if not absolute:
            raise HttpError(400, 'malformed request target')
        target = absolute[1] if absolute[1].startswith('/') else f'/{absolute[1]}'
    return method, target, 'HTTP/1.0' if minor == '0' else 'HTTP/1.1', headers


def body_length(headers: Dict[str, str], version: str) -> Optional[int]:
    """Bytes of a message's content, None if it is chunked (RFC 9112 6.1 to 6.3).  Raises HttpError."""
    coding = headers.get('transfer-encoding')
    announced = headers.get('content-length')
    if coding is not None:
        # RFC 9112 6.1: both together are an attempt at smuggling; in HTTP/1.0 the framing is faulty.
        if announced is not None or version == 'HTTP/1.0':
            raise HttpError(400, 'Transfer-Encoding not allowed with Content-Length or HTTP/1.0')
        if coding.lower() != 'chunked':
            raise HttpError(501, 'only chunked transfer coding is supported')
        return None
    if announced is None:
        return 0
    if not _LENGTH.fullmatch(announced):    # a list of the same numbers too, which RFC 9110 8.6 leaves to us
        raise HttpError(400, 'invalid Content-Length')
    return int(announced)


def expects_continue(headers: Dict[str, str]) -> bool:
    """Whether a client waits for 100 (Continue) before content (RFC 9110 10.1.1).  Raises HttpError."""
    expectation = headers.get('expect')
    if expectation and expectation.lower() != '100-continue':
        raise HttpError(417, 'only the expectation 100-continue is supported')
    return bool(expectation)


class Http1:
    """One connection: reads requests, whose Body it is, has `api` answer them, and sends the responses."""

    piece = COPY_BYTES

    def __init__(self, connection: Connection, api: Api) -> None:
        self._connection, self._limits, self._api = connection, connection.limits, api
        self.clock = connection.clock
        self._buffer = b''          # received, not yet parsed
        self.length: Optional[int] = 0  # bytes of content, None if it is chunked
        self.left = 0               # bytes of content that were not read, or _UNKNOWN
        self._chunk = 0             # bytes left of the current chunk
        self._expects_continue = False  # the client waits for 100 (Continue) before it sends content

    def run(self) -> None:
        """Serve the connection to its end.  Raises Gone."""
        connection, peer = self._connection, self._connection.peer
        while self._exchange():
            connection.wait_for(connection.IDLE, self._limits.idle_seconds)
            peer.busy, peer.since = False, time.monotonic()
            if connection.stopping:
                break

    def _exchange(self) -> bool:
        """Serve one request; whether another may follow."""
        request, connection, peer = None, self._connection, self._connection.peer
        is_pipelined = len(self._buffer) > 0
        try:
            text = self._read_head()
            if not text:
                return False
            if text == _PREFACE_HEAD:
                self.refuse(HttpError(505, _NO_HTTP2))
                raise HandshakeFailed(f'{_NO_HTTP2}{_IN_PROXIES}')
            method, target, version, headers = parse_head(text)
            request = Request(method, target, version, headers, self, peer)
            self.length = self.left = 0
            # No header of a plain request concerns the framing or the connection.
            plain = version != 'HTTP/1.0' and _FRAMING.isdisjoint(headers)
            connection.wait_for(connection.WRITING if plain else connection.READING)
            if not plain:
                self.length = body_length(headers, version)
                self.left, self._chunk = _UNKNOWN if self.length is None else self.length, 0
                # RFC 9110 10.1.1: no 100 to HTTP/1.0, and none to a request without content.
                self._expects_continue = (version != 'HTTP/1.0' and expects_continue(headers)
                                          and self.left > 0)
            if connection.unpinned != (self.left > SMALL_BYTES):
                connection.unpin(not connection.unpinned)
        except HttpError as error:
            self.refuse(error, request)
            return False
        try:
            peer.busy = True
            if is_pipelined and plain:    # restic does not; many would take the interpreter from others
                with _pipeliners[hash(peer.group) % len(_pipeliners)]:
                    response = self._api.handle(request)
            else:
                response = self._api.handle(request)
        except Gone:
            self._api.finish(request, CLIENT_GONE, 0)
            raise
        peer.busy = peer.known or self._api.is_open     # a stranger who does not read may have to go
        peer.probes = request.is_probe and peer.probes is not False
        try:
            keep = self._send(request, response, not (connection.stopping or connection.expired)
                              and (plain or self._may_keep(request)))
        finally:
            close_quietly(response.body)
        if not keep:
            connection.linger()
        return keep and (not self.left or self._skip_body())

    def refuse(self, error: HttpError, request: Optional[Request] = None) -> None:
        """Answer a malformed or incomplete request, or a client beyond a limit, and end the connection."""
        log.debug('%s: %s', self._connection.peer, error)
        request = request or Request('-', '', '', {}, self, self._connection.peer)
        self._send(request, self._api.refuse(error), keep=False)
        self._connection.linger()

    def _read_head(self) -> str:
        """The next head up to its empty line; empty if the client has disconnected between two requests.
        Empty lines before it are skipped (RFC 9112 2.2).  Raises HttpError 400, 408 and 431."""
        limit, connection, begun = self._limits.header_bytes, self._connection, False
        buffer, self._buffer = self._buffer, b''
        while True:
            if not buffer or begun:
                data = bytearray(RECEIVE_BYTES)
                count = connection.receive_into(memoryview(data))
                if not count and not buffer:
                    return ''
                if not count:
                    self._raise_cut_short('header')
                buffer += data[:count]
            while buffer.startswith(b'\r\n'):
                buffer = buffer[2:]
            end = buffer.find(b'\r\n\r\n')
            if end >= 0 and end + 4 <= limit:
                self._buffer = buffer[end + 4:]
                return buffer[:end + 2].decode('latin-1')
            if end >= 0 or len(buffer) >= limit:
                raise HttpError(431, f'header is longer than {limit} bytes')
            if _BARE_LF.search(buffer):
                raise HttpError(400, 'line ends without CR')
            if buffer and not begun:
                begun = True
                connection.wait_no_longer(self._limits.header_seconds)

    def readinto(self, view: memoryview) -> int:
        """Content of the request, as Body has it."""
        if not self.left:
            return 0
        if self._expects_continue:
            self._expects_continue = False
            if not self._buffer:    # RFC 9110 10.1.1
                self._connection.transmit(b'HTTP/1.1 100 Continue\r\n\r\n')
        if self.length is None:
            return self._read_chunk(view)
        count = self._read_content(view[:min(len(view), self.left)])
        self.left -= count
        return count

    def _read_chunk(self, view: memoryview) -> int:
        """Content of a chunk (RFC 9112 7.1).  Chunk extensions and trailers are ignored."""
        left = self._limits.header_bytes
        if not self._chunk:
            match = _CHUNK_LINE.fullmatch(self._read_line(left))
            if not match:
                raise HttpError(400, 'invalid chunk size')
            self._chunk = int(match[1], 16)
        if not self._chunk:
            while line := self._read_line(left):
                left -= len(line) + 2
                if left < 0:
                    raise HttpError(431, 'trailers are too long')
                if not _FIELD_LINES.fullmatch(line.decode('latin-1') + '\r\n'):
                    raise HttpError(400, 'malformed trailer')
            self.left = 0
            return 0
        count = self._read_content(view[:min(len(view), self._chunk)])
        self._chunk -= count
        if not self._chunk and self._read_line(0):
            raise HttpError(400, 'chunk is longer than its size')
        return count

    def _read_content(self, view: memoryview) -> int:
        """Read content into the start of `view`; at least one byte."""
        if self._buffer:
            count = min(len(view), len(self._buffer))
            view[:count] = self._buffer[:count]
            self._buffer = self._buffer[count:]
            return count
        count = self._connection.receive_into(view)
        if not count:
            self._raise_cut_short('content')
        return count

    def _read_line(self, limit: int) -> bytes:
        """The next line of a chunked body, up to `limit` bytes, without its CRLF."""
        while True:
            end = self._buffer.find(b'\n', 0, limit + 2)
            if end > 0 and self._buffer[end - 1] == 13:
                line, self._buffer = self._buffer[:end - 1], self._buffer[end + 1:]
                return line
            if end >= 0 or len(self._buffer) >= limit + 2:
                raise HttpError(400, 'malformed line in a chunked body')
            data = bytearray(RECEIVE_BYTES)
            count = self._connection.receive_into(memoryview(data))
            if not count:
                self._raise_cut_short('content')
            self._buffer += data[:count]

    def _raise_cut_short(self, what: str) -> NoReturn:
        self.left = _UNKNOWN
        if self._connection.expired:
            raise HttpError(408, f'the {what} took too long')
        raise HttpError(400, f'the {what} was cut short')

    def _may_keep(self, request: Request) -> bool:
        """Whether the connection persists after a request that is not plain (RFC 9112 9.3)."""
        # A rest of the content is skipped if it is short and the client is sending it.
        if self.left and (self.left > SKIP_BYTES or self._expects_continue):
            return False
        options = request.headers.get('connection')
        if options is None:
            return request.version == 'HTTP/1.1'
        tokens = [token.strip(' \t').lower() for token in options.split(',')]
        return 'close' not in tokens and (request.version == 'HTTP/1.1' or 'keep-alive' in tokens)

    def _skip_body(self) -> bool:
        """Discard the rest of a short body; whether it was complete."""
        self._connection.wait_for(Connection.READING)
        self._connection.wait_no_longer(LINGER_SECONDS)
        try:
            while self.readinto(_UNWANTED):
                pass
        except HttpError:
            return False
        return True

    def _send(self, request: Request, response: Response, keep: bool) -> bool:
        """Send an answer (RFC 9112 4 and 6); whether the connection persists."""
        body, connection, sent, chunked = response.body, self._connection, 0, False
        fields = ''.join(map('%s: %s\r\n'.__mod__, response.headers))
        if isinstance(body, (bytes, FileSlice)):
            fields += f'Content-Length: {len(body) if isinstance(body, bytes) else body.length}\r\n'
        elif request.version == 'HTTP/1.0':
            keep = False        # RFC 9112 6.3: the content ends with the connection
        else:
            fields, chunked = f'{fields}Transfer-Encoding: chunked\r\n', True
        if not keep:
            fields += 'Connection: close\r\n'
        elif request.version == 'HTTP/1.0':
            fields += 'Connection: keep-alive\r\n'
        head = f'{_status_and_date(response.status, int(time.time()))}{fields}\r\n'.encode('latin-1')
        if connection.waits != connection.WRITING:
            connection.wait_for(connection.WRITING)
        try:
            if request.method == 'HEAD':
                connection.transmit(head)
            elif isinstance(body, bytes):
                connection.transmit(head + body)
                sent = len(body)
            elif isinstance(body, FileSlice):
                length = body.length
                connection.transmit(head, more=True)
                try:
                    connection.transmit_file(body)
                finally:
                    sent = length - body.length
            else:
                for chunk in body:
                    framed = b'%x\r\n%b\r\n' % (len(chunk), chunk) if chunked else chunk
                    connection.transmit(head + framed)
                    head, sent = b'', sent + len(chunk)
                connection.transmit(head + b'0\r\n\r\n' if chunked else head)
        except (OSError, StorageError, HttpError) as error:     # the content cannot be read, or no more
            connection.abort_answer(error)
        finally:
            self._api.finish(request, response.status, sent)
        return keep


@functools.lru_cache(maxsize=16)
def _status_and_date(status: int, now: int) -> str:
    from http import HTTPStatus
    return f'HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nDate: {http_date(now)}\r\n'


# ==== Hpack ======================================================================================
# Header compression for HTTP/2 (RFC 7541): from bytes to fields and back, without frames and streams.

TABLE_BYTES = 4096           # Size of the dynamic table, the protocol's default (RFC 9113 6.5.2).
# Appendix A: name and value; the first has the index 1.
_STATIC_NAMES = (
    ':authority|:method GET|:method POST|:path /|:path /index.html|:scheme http|:scheme https|:status 200|'
    ':status 204|:status 206|:status 304|:status 400|:status 404|:status 500|accept-charset|'
    'accept-encoding gzip, deflate|accept-language|accept-ranges|accept|access-control-allow-origin|age|'
    'allow|authorization|cache-control|content-disposition|content-encoding|content-language|content-length|'
    'content-location|content-range|content-type|cookie|date|etag|expect|expires|from|host|if-match|'
    'if-modified-since|if-none-match|if-range|if-unmodified-since|last-modified|link|location|max-forwards|'
    'proxy-authenticate|proxy-authorization|range|referer|refresh|retry-after|server|set-cookie|'
    'strict-transport-security|transfer-encoding|user-agent|vary|via|www-authenticate')
_STATIC_TABLE = [(name, value) for name, _, value in (
    field.partition(' ') for field in _STATIC_NAMES.split('|'))]
# Appendix B: the lengths of the codes of 256 octets, a letter each, A for 5 bits.  The code is canonical:
# shorter codes come first, and among equals the lower octet.
_CODE_LENGTHS = (
    'ISXXXXXXXTZXXZXXXXXXXXZXXXXXXXXXBFFHIBDGFFDGDBBBAAABBBBBBBCDKBHFIBCCCCCCCCCCCCCCCCCCCC'
    'CCDCDIOIJBKABABABBBACCBBBABCBAABCCCCCKGJIXPRPPRRRSRSSSSSTSTTRSTSSSSQRSRSSTRQPRRSSQSRRT'
    'QRSSQQRQSRSSPRRRSRRSVVPORSRUVVVWWVTUOQVWWVWTQQVVXWWWPTPQRQQSRRUUTTVSVWVVWWWWWXWWWWWV')


class HpackError(Exception): ...    # a malformed header block, which ends the connection (RFC 9113 4.3)


@functools.lru_cache(maxsize=None)
def _huffman_codes() -> Dict[str, int]:
    """The octet of each code, whose bits are digits."""
    octets, code, length = {}, 0, 0
    for bits, octet in sorted((ord(letter) - 60, octet) for octet, letter in enumerate(_CODE_LENGTHS)):
        code <<= bits - length
        octets[f'{code:0{bits}b}'] = octet
        code, length = code + 1, bits
    return octets


def decode_huffman(data: bytes) -> bytes:
    """Decode a Huffman-coded string (RFC 7541 5.2).  Raises HpackError."""
    octets, decoded, begin = _huffman_codes(), bytearray(), 0
    bits = ''.join([f'{octet:08b}' for octet in data])
    for end in range(5, len(bits) + 1):
        octet = octets.get(bits[begin:end])
        if octet is not None:
            decoded.append(octet)
            begin = end
        elif end - begin > 30:      # as many as the longest code has
            break
    # Padding is the beginning of EOS, which is all ones, and shorter than an octet.
    if len(bits) - begin > 7 or '0' in bits[begin:]:
        raise HpackError('malformed Huffman code')
    return bytes(decoded)


class HeaderDecoder:
    """The decoder of a connection, with its dynamic table."""

    def __init__(self) -> None:
        self._entries: collections.deque[Tuple[str, str]] = collections.deque()
        self._bytes = 0                 # size of the entries (RFC 7541 4.1)
        self._limit = TABLE_BYTES       # chosen by the encoder
        self._block, self._at = b'', 0  # a block, and the position in it

    def decode(self, block: bytes, limit: int) -> Tuple[List[Tuple[str, str]], bool]:
        """The fields of a header block up to `limit` bytes (RFC 9113 10.5.1), and whether these are all."""
        self._block, self._at = block, 0
        fields: List[Tuple[str, str]] = []
        begun = False
        while self._at < len(block):
            first = block[self._at]
            if first & 0xe0 == 0x20:
                self._limit = self._integer(5)
                if begun or self._limit > TABLE_BYTES:  # RFC 7541 4.2 and 6.3
                    raise HpackError('a size of the table that is not allowed')
                self._evict()
                continue
            begun = True
            if first & 0x80:
                field = self._field(self._integer(7))
            else:
                index = self._integer(6 if first & 0x40 else 4)
                name = self._field(index)[0] if index else self._string()
                field = name, self._string()
                if first & 0x40:
                    self._entries.appendleft(field)
                    self._bytes += _field_bytes(field)
                    self._evict()
            limit -= _field_bytes(field)
            if limit >= 0:
                fields.append(field)
        return fields, limit >= 0

    def _evict(self) -> None:
        """Drop the oldest entries until the others fit (RFC 7541 4.3 and 4.4)."""
        while self._bytes > self._limit:
            self._bytes -= _field_bytes(self._entries.pop())

    def _field(self, index: int) -> Tuple[str, str]:
        """The field at an index of both tables (RFC 7541 2.3.3)."""
        if 0 < index <= len(_STATIC_TABLE):
            return _STATIC_TABLE[index - 1]
        if not 0 < index - len(_STATIC_TABLE) <= len(self._entries):
            raise HpackError(f'no field has the index {index}')
        return self._entries[index - len(_STATIC_TABLE) - 1]

    def _take(self, count: int) -> bytes:
        data = self._block[self._at:self._at + count]
        if len(data) < count:
            raise HpackError('a header block is cut short')
        self._at += count
        return data

    def _integer(self, prefix: int) -> int:
        """An integer (RFC 7541 5.1), whose first octet has `prefix` bits of it."""
        mask = (1 << prefix) - 1
        value = self._take(1)[0] & mask
        if value < mask:
            return value
        for shift in range(0, 28, 7):
            octet = self._take(1)[0]
            value += (octet & 0x7f) << shift
            if not octet & 0x80:
                return value
        raise HpackError('an integer is too large')

    def _string(self) -> str:
        """A string literal (RFC 7541 5.2)."""
        coded = self._block[self._at:self._at + 1] >= b'\x80'
        data = self._take(self._integer(7))
        return (decode_huffman(data) if coded else data).decode('latin-1')


def _field_bytes(field: Tuple[str, str]) -> int:
    return len(field[0]) + len(field[1]) + 32


def encode_headers(fields: Iterable[Tuple[str, str]]) -> bytes:
    """A header block without a table, which threads would share (RFC 7541 6.2.2); 4.2 asks for its size 0."""
    return b'\x20' + b''.join([b'\0' + encode_string(name) + encode_string(value) for name, value in fields])


def encode_string(text: str) -> bytes:
    """A string literal, without Huffman coding (RFC 7541 5.1 and 5.2)."""
    data = text.encode('latin-1')
    if len(data) < 0x7f:
        return bytes([len(data)]) + data
    head, rest = [0x7f], len(data) - 0x7f
    while rest >= 0x80:
        head.append(rest & 0x7f | 0x80)
        rest >>= 7
    return bytes([*head, rest]) + data


# ==== Http2 ======================================================================================
# HTTP/2 (RFC 9113) over standard input and output, for one client that begins with its preface.
#
# Theory of operation.  The connection's thread reads frames and acts on them.  Each request has a thread,
# which runs the Api, takes the content from its Stream, and queues the answer.  One more thread writes what
# is queued.  One lock, that of Http2.changed, guards all state; no thread holds it while reading or writing.
#
# Pipes can be full in both directions, so the reading thread never waits for the client to read.  If the
# writing thread is stuck in write(2), which cannot be woken, the connection's deadline ends the process.  A
# request's thread waits for content and for the client's windows until its stream's deadline.  Content is
# kept in memory until it takes it.  A window opens again when half of it was taken, so that it is above zero
# once all was: nghttp2 waits for that before an empty last frame, too.
#
# A connection ends by EOFError, Gone, or an error that is sent with GOAWAY; after stop() input ends with the
# last stream.  Whole requests are then answered, unless there was an error; linger() and close() follow.

STREAMS = 100                # at a time; RFC 9113 6.5.2 advises no fewer
FRAME_BYTES = 1 << 20        # the longest payload of DATA
CONTROL_BYTES = 16 * 1024    # and of the other types, if no longer header is allowed
READ_WINDOW = 4 << 20        # bytes of a request's content that may arrive ahead of its reader
CONNECTION_WINDOW = 32 << 20  # bytes that may arrive ahead of all readers: restic sends five at once
SEND_BYTES = 128 * 1024      # of content that are queued at a time, and before others wait
WRITE_BYTES = 32 * 1024      # that are written at a time, each in --server-write-timeout
UNREAD_BYTES = 512 * 1024    # of answers, ACKs and the like that a client may leave unread
LARGEST_WINDOW = (1 << 31) - 1  # RFC 9113 6.9.1
PREFACE = b'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n'

# RFC 9113 6, 7 and 6.5.2.
FrameType = enum.IntEnum('FrameType', 'DATA HEADERS PRIORITY RST_STREAM SETTINGS PUSH_PROMISE PING GOAWAY '
                         'WINDOW_UPDATE CONTINUATION', start=0)
ErrorCode = enum.IntEnum('ErrorCode', 'NO_ERROR PROTOCOL_ERROR INTERNAL_ERROR FLOW_CONTROL_ERROR '
                         'SETTINGS_TIMEOUT STREAM_CLOSED FRAME_SIZE_ERROR REFUSED_STREAM CANCEL '
                         'COMPRESSION_ERROR CONNECT_ERROR ENHANCE_YOUR_CALM', start=0)
Setting = enum.IntEnum('Setting', 'ENABLE_PUSH MAX_CONCURRENT_STREAMS INITIAL_WINDOW_SIZE MAX_FRAME_SIZE '
                       'MAX_HEADER_LIST_SIZE', start=2)
_END_STREAM = _ACK = 0x1
_END_HEADERS, _PADDED, _PRIORITIZED = 0x4, 0x8, 0x20
# For each type whether its frames are a stream's (None: either), and the size of their payload (None: any).
_FRAME_TYPES = [(True, None), (True, None), (True, 5), (True, 4), (False, None), (True, None), (False, 8),
                (False, None), (None, 4), (True, None)]
_DEFAULT_WINDOW, _DEFAULT_FRAME_BYTES = (1 << 16) - 1, 1 << 14
_FRAME_HEAD = struct.Struct('>IBI')  # the first byte of the four is the payload length's
_SETTING = struct.Struct('>HI')
_LOWER_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9a-z-]+")
_VALUE = re.compile('(?:[!-~\x80-\xff](?:[\t -~\x80-\xff]*[!-~\x80-\xff])?)?')
_SCHEME = re.compile('[A-Za-z][A-Za-z0-9+.-]*')     # RFC 3986 3.1
_OF_CONNECTION = ('connection', 'keep-alive', 'proxy-connection', 'transfer-encoding', 'upgrade')


class Http2Error(Exception):
    """An error of the connection (RFC 9113 5.4.1): `code` goes out with GOAWAY."""

    def __init__(self, code: ErrorCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class StreamError(Http2Error):
    """An error of one stream (RFC 9113 5.4.2): `code` goes out with RST_STREAM."""


def require(condition: object, reason: str, code: ErrorCode = ErrorCode.PROTOCOL_ERROR,
            error: type[Http2Error] = Http2Error) -> None:
    """Raises an error unless what the protocol asks of a client is so."""
    if not condition:
        raise error(code, reason)


require_of_stream = functools.partial(require, error=StreamError)


def frame(kind: int, flags: int, stream_id: int, payload: bytes | memoryview = b'') -> bytes:
    """A frame of the stream `stream_id` (RFC 9113 4.1)."""
    return b''.join((_FRAME_HEAD.pack(len(payload) << 8 | kind, flags, stream_id), payload))


def without_padding(flags: int, payload: bytes) -> bytes:
    """The payload of DATA or HEADERS, without padding (RFC 9113 6.1 and 6.2).  Raises Http2Error."""
    if not flags & _PADDED:
        return payload
    require(payload, 'no length of the padding', ErrorCode.FRAME_SIZE_ERROR)
    require(payload[0] < len(payload), 'more padding than payload')
    return payload[1:len(payload) - payload[0]]


def check_priority(stream_id: int, priority: bytes) -> None:
    """Raises Http2Error if a stream depends on itself (RFC 7540 5.3.1; RFC 9113 5.3 ignores the rest)."""
    require(len(priority) == 5, 'a priority of a wrong size', ErrorCode.FRAME_SIZE_ERROR)
    require(int.from_bytes(priority[:4], 'big') & LARGEST_WINDOW != stream_id, 'a stream depends on itself')


def check_field(name: str, value: str) -> None:
    """Raises StreamError for a field that makes a message malformed (RFC 9113 8.2)."""
    require_of_stream(name not in _OF_CONNECTION and _LOWER_TOKEN.fullmatch(name) and _VALUE.fullmatch(value)
                      and (name != 'te' or value == 'trailers'), 'bad header field')


def request_of(fields: List[Tuple[str, str]]) -> Tuple[str, str, Dict[str, str]]:
    """Method, target and headers of a request (RFC 9113 8.1.1, 8.2, 8.3).  Raises StreamError."""
    pseudo: Dict[str, str] = {}
    headers: Dict[str, str] = {}
    for name, value in fields:
        if name.startswith(':'):
            require_of_stream(name in (':method', ':scheme', ':path', ':authority') and name not in pseudo
                              and not headers, 'bad pseudo-header field')
            pseudo[name] = value
        else:
            check_field(name, value)
            headers[name] = f'{headers[name]}, {value}' if name in headers else value
    method, target = pseudo.get(':method', ''), pseudo.get(':path', '')
    host = pseudo.get(':authority', headers.get('host', ''))
    require_of_stream(re.fullmatch(_TOKEN, method) and re.fullmatch(r'/[!-"$-~]*|\*', target)
                      and _SCHEME.fullmatch(pseudo.get(':scheme', '')), 'bad method, path or scheme')
    require_of_stream(_HOST.fullmatch(host) and headers.get('host', host) == host, 'bad authority')
    require_of_stream(_LENGTH.fullmatch(headers.get('content-length', '0')), 'bad content-length')
    if host:
        headers['host'] = host      # RFC 9113 8.3.1
    return method, target, headers


class Flow:
    """Flow control of the stream `id`, or of the connection as the stream 0 (RFC 9113 5.2)."""

    def __init__(self, stream_id: int, window: int, size: int) -> None:
        self.id = stream_id
        self.error = StreamError if stream_id else Http2Error
        self.window = window            # bytes that may be sent; may be negative (RFC 9113 6.9.2)
        self.allowed = self._size = size    # bytes of content that the client may send
        self._taken = 0                 # bytes that it is still to be told of

    def receive(self, count: int) -> None:
        """Content has arrived.  Raises Http2Error if it was not allowed."""
        self.allowed -= count
        require(self.allowed >= 0, 'more content than the window', ErrorCode.FLOW_CONTROL_ERROR, self.error)

    def release(self, count: int) -> bytes:
        """Content was taken; the WINDOW_UPDATE that lets the client send as much again, or nothing yet."""
        self._taken += count
        if self._taken < self._size // 2:
            return b''
        increment, self._taken = self._taken, 0
        self.allowed += increment
        return frame(FrameType.WINDOW_UPDATE, 0, self.id, struct.pack('>I', increment))


class Stream(Flow):
    """One request, which has a thread, and its content as a Body; `length` is what is announced, None if it
    is not.  It is `receiving` until END_STREAM has arrived, and `sending` until that was sent; then it is
    closed (RFC 9113 5.1), and `aborted` says why, if it was reset or has ended with the connection.  The lock
    of `http` guards all of it: methods up to _send_content() are called without that, the others with it."""

    piece = 256 * 1024              # COPY_BYTES for each of many would be too much memory

    def __init__(self, http: Http2, stream_id: int, length: Optional[int], receiving: bool) -> None:
        super().__init__(stream_id, http.initial_window, READ_WINDOW)
        self.receiving, self.sending, self.aborted = receiving, True, ''
        self.length = self.remaining = length   # `remaining` has not arrived
        self.content = bytearray()      # that has arrived and was not read
        self.wanted = True              # more of it is to be read
        self.deadline = Deadline()
        self._expects_continue = False  # the client waits for 100 (Continue)
        self._http = http

    def serve(self, request: Request, complete: bool) -> None:
        """Answer the request, whose header is `complete`, or was too long."""
        http, code = self._http, ErrorCode.CANCEL
        try:
            try:
                if not complete:        # RFC 9113 10.5.1
                    raise HttpError(431, f'header is longer than {http.header_bytes} bytes')
                self._expects_continue = expects_continue(request.headers) and self.length != 0
                response = http.api.handle(request)
            except HttpError as error:
                response = http.api.refuse(error)
            except Gone:
                http.api.finish(request, CLIENT_GONE, 0)
                raise
            self._answer(request, response)
            code = ErrorCode.NO_ERROR   # RFC 9113 8.1: the rest of the content is not wanted
            with http.changed:
                # What is little, or is on its way already, ends by itself.
                if self.remaining is None or self.remaining <= SKIP_BYTES:
                    http.changed.wait_for(lambda: not self.receiving or http.ended, LINGER_SECONDS)
        except Gone as gone:
            log.debug('%s: %s', request.peer, gone)
        except Exception as error:      # a file that cannot be read; or a fault of ours
            code = ErrorCode.INTERNAL_ERROR
            log.error('%s: response aborted: %s', request.peer, error)
            log.debug('traceback:', exc_info=True)
        finally:
            with http.changed:
                if self.id in http.streams:
                    http.reset(self.id, code)
                http.running -= 1
                http.changed.notify_all()

    def readinto(self, view: memoryview) -> int:
        """Content of the request, as Body has it."""
        if self._expects_continue:
            self._expects_continue = False  # RFC 9110 15.2.1
            self._send_headers([(':status', '100')])
        with self._http.changed:
            if not self._wait(lambda: self.content or not self.receiving, STALLED_UPLOAD):
                raise HttpError(408, 'the content took too long')
            if self.aborted:
                raise Gone(self.aborted)
            count = min(len(view), len(self.content))
            view[:count] = self.content[:count]
            del self.content[:count]
            self._http.release(count, self)
        return count

    def _answer(self, request: Request, response: Response) -> None:
        """Send the answer to a request.  Raises Gone, and OSError if the content cannot be read."""
        http, limits = self._http, self._http.connection.limits
        with http.changed:
            self._discard()
            self.deadline.begin(http.connection.clock() + limits.write_seconds, limits.write_extension,
                                limits.stall_seconds)
        body, sent, length = response.body, 0, None     # type: Any, int, Optional[int]
        headers = [(':status', str(response.status)), ('date', http_date(int(time.time()))),
                   *((name.lower(), value) for name, value in response.headers)]
        if isinstance(body, bytes):
            length, body = len(body), [body]
        elif isinstance(body, FileSlice):
            length, body = body.length, iter(functools.partial(body.read, SEND_BYTES), b'')
        if length is not None:
            headers.append(('content-length', str(length)))
        is_empty = request.method == 'HEAD' or length == 0
        try:
            self._send_headers(headers, last=is_empty)
            for piece in () if is_empty else body:
                content = memoryview(piece)
                while content:
                    count = self._send_content(content, last=sent + len(content) == length)
                    content, sent = content[count:], sent + count
            if length is None and not is_empty:
                self._send_content(b'', last=True)
        finally:
            close_quietly(response.body)
            http.api.finish(request, response.status, sent)

    def _send_headers(self, headers: Headers, last: bool = False) -> None:
        """Queue HEADERS, which may be the `last` of their stream.  Raises Gone."""
        with self._http.changed:
            if self.aborted:
                raise Gone(self.aborted)
            self._queue(FrameType.HEADERS, _END_HEADERS, encode_headers(headers), last)

    def _send_content(self, content: bytes | memoryview, last: bool) -> int:
        """Queue what the windows allow, a byte or more; how much.  All may be the `last`.  Raises Gone."""
        http = self._http

        def is_open() -> bool:
            return not (content and self.sending) or http.ended or min(self.window, http.flow.window) > 0

        def has_room() -> bool:
            return not self.sending or len(http.unsent) < SEND_BYTES

        with http.changed:
            while not (is_open() and has_room()):
                if not (self._wait(is_open, STALLED_DOWNLOAD) and self._wait(has_room)):
                    http.reset(self.id, ErrorCode.CANCEL)
            count = max(min(len(content), SEND_BYTES, self.window, http.flow.window), 0)
            if self.aborted or (content and not count):
                raise Gone(self.aborted or 'client disconnected')
            self.window -= count
            http.flow.window -= count
            self.deadline.passed += count
            last = last and count == len(content)
            for at in range(0, count or 1, http.frame_bytes):
                end = min(at + http.frame_bytes, count)
                self._queue(FrameType.DATA, 0, content[at:end], last and end == count)
        return count

    def _wait(self, is_ready: Callable[[], object], limit: str = '') -> bool:
        """Wait until something is ready, for the client if `limit` names it; False if time is over before."""
        connection, deadline = self._http.connection, self.deadline
        deadline.since = connection.clock() if limit else math.inf
        while not is_ready():
            left = deadline.time() - connection.clock()
            if left <= 0:
                if deadline.is_stalled(connection.clock()):
                    connection.on_limit(limit, connection.peer)
                return False
            self._http.changed.wait(min(left, threading.TIMEOUT_MAX))
        deadline.since = math.inf
        return True

    def _queue(self, kind: FrameType, flags: int, payload: bytes | memoryview, last: bool) -> None:
        self._http.queue(frame(kind, flags | (_END_STREAM if last else 0), self.id, payload))
        if last:
            self.end(sending=False)

    def end(self, sending: bool = True, receiving: bool = True) -> None:
        """END_STREAM was sent, or has arrived; without either direction a stream is closed."""
        self.sending, self.receiving = self.sending and sending, self.receiving and receiving
        if not (self.sending or self.receiving):
            http = self._http
            http.streams.pop(self.id, None)
            if http.last_served is not None and not http.streams:
                http.connection.end_input()

    def end_content(self) -> None:
        """END_STREAM has arrived.  Raises StreamError."""
        require_of_stream(not self.remaining, 'less content than announced')
        self.end(receiving=False)

    def abort(self, reason: str) -> None:
        """The stream was reset, or ends with the connection."""
        self.aborted = reason
        self._discard()
        self.end(sending=False, receiving=False)

    def _discard(self) -> None:
        """No more of the content is wanted."""
        self._http.release(len(self.content))
        self.content.clear()
        self.wanted = False


class Http2:
    """One connection: reads its frames, and writes what is queued.  `changed` has the lock, and is notified
    of each change that a thread may wait for.  Methods from queue() on are called with the lock."""

    def __init__(self, connection: Connection, api: Api) -> None:
        self.api, self.connection = api, connection
        self.header_bytes = connection.limits.header_bytes
        self.changed = threading.Condition()
        self.streams: Dict[int, Stream] = {}        # that are not closed
        self.resets: Deque[int] = collections.deque(maxlen=4 * STREAMS)    # the last streams that we reset
        self.flow = Flow(0, _DEFAULT_WINDOW, CONNECTION_WINDOW)
        self.initial_window = _DEFAULT_WINDOW       # bytes that may be sent on a new stream
        self.frame_bytes = _DEFAULT_FRAME_BYTES     # the client's MAX_FRAME_SIZE
        self.unsent = b''               # frames that are queued
        self.ended = False              # no more frames will be read
        self.running = 0                # requests that have a thread
        self.last_served: Optional[int] = None      # the last stream that is, once GOAWAY was sent
        self._decoder = HeaderDecoder()
        self._has_settings = False      # the client's have arrived
        self._last = 0                  # the highest stream that the client has opened

    def run(self) -> None:
        """Serve the connection to its end; requests that are whole by then are answered.  Raises Gone."""
        settings = ((Setting.MAX_CONCURRENT_STREAMS, STREAMS), (Setting.INITIAL_WINDOW_SIZE, READ_WINDOW),
                    (Setting.MAX_FRAME_SIZE, FRAME_BYTES), (Setting.MAX_HEADER_LIST_SIZE, self.header_bytes))
        more = struct.pack('>I', CONNECTION_WINDOW - _DEFAULT_WINDOW)
        self.unsent = (frame(FrameType.SETTINGS, 0, 0, b''.join(itertools.starmap(_SETTING.pack, settings)))
                       + frame(FrameType.WINDOW_UPDATE, 0, 0, more))
        self.connection.wait_for(Connection.IDLE, math.inf)
        self.connection.on_stop = self._go_away
        writer = threading.Thread(target=self._write, daemon=True)
        writer.start()
        failed = True
        try:
            require(self._read(len(PREFACE)) == PREFACE, 'missing HTTP/2 preface')  # RFC 9113 3.4
            while True:
                self._handle_frame()
        except EOFError:
            failed = False
        except (HpackError, Http2Error) as error:
            code = error.code if isinstance(error, Http2Error) else ErrorCode.COMPRESSION_ERROR
            log.log(logging.DEBUG if self._has_settings else NOTICE, '%s: %s (HTTP/2 error %d)',
                    self.connection.peer, error, code)
            self._go_away(code, str(error))
        finally:
            with self.changed:
                self.ended = True
                for stream in [*self.streams.values()]:
                    if failed or stream.receiving:
                        stream.abort('client disconnected')
                self.changed.notify_all()
            if self.connection.waits == Connection.WRITING:    # it may be stuck
                self.connection.wait_no_longer(LINGER_MOST_SECONDS)
            writer.join()
        self.connection.linger()

    def _go_away(self, code: ErrorCode = ErrorCode.NO_ERROR, reason: str = '') -> None:
        """Send GOAWAY (RFC 9113 6.8), and take no more requests; without any, end the input."""
        with self.changed:
            if self.last_served is None:    # which never rises
                self.last_served = self._last
            last = struct.pack('>II', self.last_served, code)
            self.queue(frame(FrameType.GOAWAY, 0, 0, last + reason.encode()))
            if not self.streams:
                self.connection.end_input()

    def _write(self) -> None:
        """What the writing thread does: send what is queued, until no more can be."""
        connection, limits = self.connection, self.connection.limits
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.unsent or (self.ended and not self.running))
                frames, self.unsent = self.unsent, b''
                self.changed.notify_all()
            if not frames:
                return
            try:
                for at in range(0, len(frames), WRITE_BYTES):
                    connection.wait_for(Connection.WRITING, min(
                        LINGER_MOST_SECONDS if self.ended else math.inf, limits.write_seconds))
                    connection.transmit(frames[at:at + WRITE_BYTES])
            except Gone as gone:        # no request can be answered any more
                with self.changed:
                    for stream in [*self.streams.values()]:
                        stream.abort(str(gone))
                connection.end_input()
            connection.wait_for(Connection.IDLE, math.inf)

    def _read(self, count: int, deadline: Optional[Deadline] = None) -> bytes:
        """The next bytes; each piece of them puts off a deadline.  Raises EOFError, Gone."""
        data, at = memoryview(bytearray(count)), 0
        while at < count:
            received = self.connection.receive_into(data[at:])
            if not received:
                raise EOFError
            at += received
            if deadline and deadline.since < math.inf:
                deadline.since = self.connection.clock()
        return bytes(data)

    def _read_frame(self) -> Tuple[int, int, int, bytes]:
        """Type, flags, stream and payload of the next frame.  Raises Http2Error if it is too long."""
        length, flags, stream_id = _FRAME_HEAD.unpack(self._read(_FRAME_HEAD.size))
        kind, length, stream_id = length & 0xff, length >> 8, stream_id & LARGEST_WINDOW
        is_control = FrameType.DATA < kind <= FrameType.CONTINUATION
        require(length <= (max(CONTROL_BYTES, self.header_bytes) if is_control else FRAME_BYTES),
                f'frame of type {kind} with {length} bytes', ErrorCode.FRAME_SIZE_ERROR)
        stream = self.streams.get(stream_id) if kind == FrameType.DATA else None
        return kind, flags, stream_id, self._read(length, stream.deadline if stream else None)

    def _read_block(self, flags: int, stream_id: int, payload: bytes) -> bytes:
        """The header block that begins with HEADERS (RFC 9113 4.3, 6.2 and 6.10)."""
        block = without_padding(flags, payload)
        if flags & _PRIORITIZED:
            check_priority(stream_id, block[:5])
            block = block[5:]
        while not flags & _END_HEADERS:
            kind, flags, continued, payload = self._read_frame()
            require(kind == FrameType.CONTINUATION and continued == stream_id,
                    'header block interrupted by another frame')
            block += payload
            require(len(block) <= self.header_bytes + 4 * CONTROL_BYTES, 'header block never ends',
                    ErrorCode.ENHANCE_YOUR_CALM)
        return block

    def _handle_frame(self) -> None:
        kind, flags, stream_id, payload = self._read_frame()
        require(self._has_settings or (kind == FrameType.SETTINGS and not flags & _ACK),
                'no SETTINGS after the preface')
        if kind > FrameType.CONTINUATION:   # RFC 9113 5.5: unknown types are ignored
            return
        of_stream, size = _FRAME_TYPES[kind]
        require(of_stream in (None, stream_id > 0), f'frame of type {kind} for stream {stream_id}')
        require(size in (None, len(payload)), f'frame of type {kind} with {len(payload)} bytes',
                ErrorCode.FRAME_SIZE_ERROR)
        if kind == FrameType.HEADERS:
            payload = self._read_block(flags, stream_id, payload)
        with self.changed:
            try:
                self._act(kind, flags, stream_id, payload)
            except StreamError as error:
                log.debug('%s: stream %d: %s', self.connection.peer, stream_id, error)
                self.reset(stream_id, error.code)
            self.changed.notify_all()
            require(len(self.unsent) <= UNREAD_BYTES, 'too many unread responses',
                    ErrorCode.ENHANCE_YOUR_CALM)

    def queue(self, frames: bytes) -> None:
        """Have frames written."""
        self.unsent += frames
        self.changed.notify_all()

    def release(self, count: int, stream: Optional[Stream] = None) -> None:
        """Content has left the memory: let the client send as much again."""
        more = stream.release(count) if stream and stream.receiving else b''
        self.queue(self.flow.release(count) + more)

    def reset(self, stream_id: int, code: ErrorCode) -> None:
        """Send RST_STREAM.  What still arrives for the stream is no fault of the client's (RFC 9113 5.1)."""
        self.queue(frame(FrameType.RST_STREAM, 0, stream_id, struct.pack('>I', code)))
        self.resets.append(stream_id)
        if stream_id in self.streams:
            self.streams[stream_id].abort('the stream was reset')

    def _act(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        """Do what a frame asks for, whose size is right.  Raises Http2Error."""
        if kind == FrameType.DATA:
            self._on_data(flags, stream_id, payload)
        elif kind == FrameType.HEADERS:
            self._on_headers(flags, stream_id, payload)
        elif kind == FrameType.PRIORITY:
            check_priority(stream_id, payload)
        elif kind == FrameType.RST_STREAM:
            if stream := self._find(stream_id):
                stream.abort('the client has cancelled the request')
        elif kind == FrameType.SETTINGS:
            self._on_settings(flags, payload)
        elif kind == FrameType.PING:
            if not flags & _ACK:
                self.queue(frame(FrameType.PING, _ACK, 0, payload))
        elif kind == FrameType.GOAWAY:      # it will open no more streams, and says so by its silence
            require(len(payload) >= 8, 'GOAWAY of a wrong size', ErrorCode.FRAME_SIZE_ERROR)
        elif kind == FrameType.WINDOW_UPDATE:
            if flow := self._find(stream_id) if stream_id else self.flow:
                increment = int.from_bytes(payload, 'big') & LARGEST_WINDOW
                require(increment, 'WINDOW_UPDATE of zero bytes', error=flow.error)
                flow.window += increment
                require(flow.window <= LARGEST_WINDOW, 'the window is too large',
                        ErrorCode.FLOW_CONTROL_ERROR, flow.error)
        else:   # PUSH_PROMISE from a client (RFC 9113 8.4), or CONTINUATION without HEADERS (6.10)
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, 'a frame that is not expected')

    def _find(self, stream_id: int) -> Optional[Stream]:
        """The stream of a frame, None if it is closed (RFC 9113 5.1).  Raises Http2Error."""
        require(stream_id & 1 and stream_id <= self._last, 'frame for a stream that was never opened')
        return self.streams.get(stream_id)

    def _on_data(self, flags: int, stream_id: int, payload: bytes) -> None:
        """RFC 9113 6.1."""
        content, stream = without_padding(flags, payload), self._find(stream_id)
        self.flow.receive(len(payload))
        if stream and stream.receiving and stream.wanted:
            stream.content += content
            self.release(len(payload) - len(content), stream)
        else:
            self.release(len(payload))
        if not stream:                  # or it has crossed our RST_STREAM
            require(stream_id in self.resets, 'content for a closed stream', ErrorCode.STREAM_CLOSED)
            return
        require_of_stream(stream.receiving, 'content after its end', ErrorCode.STREAM_CLOSED)
        stream.receive(len(payload))
        stream.deadline.passed += len(content)
        if stream.remaining is not None:
            stream.remaining -= len(content)
            require_of_stream(stream.remaining >= 0, 'more content than announced')
        if flags & _END_STREAM:
            stream.end_content()

    def _on_headers(self, flags: int, stream_id: int, block: bytes) -> None:
        """A header block is complete (RFC 9113 6.2): a request's, or the trailers after its content."""
        require(stream_id & 1, 'HEADERS on a stream that clients may not open')
        fields, complete = self._decoder.decode(block, self.header_bytes)
        if stream := self.streams.get(stream_id):
            require_of_stream(stream.receiving, 'HEADERS after the end', ErrorCode.STREAM_CLOSED)
            require_of_stream(flags & _END_STREAM, 'trailers that are not the end')
            for name, value in fields:  # RFC 9113 8.1
                check_field(name, value)
            stream.end_content()
        elif stream_id > self._last:
            self._last = stream_id
            self._open(stream_id, fields, complete, bool(flags & _END_STREAM))
        else:                           # RFC 9113 5.1.1; or it has crossed our RST_STREAM
            require(stream_id in self.resets, 'HEADERS on a closed stream')

    def _open(self, stream_id: int, fields: List[Tuple[str, str]], complete: bool, whole: bool) -> None:
        """Have a thread answer a request whose header is `complete`; without content it is `whole`."""
        method, target, headers = (request_of(fields) if complete else
                                   (dict(fields).get(':method', '-'), '', {}))
        length = int(headers['content-length']) if 'content-length' in headers else None
        require_of_stream(not (whole and length), 'less content than announced')
        if self.last_served is not None:    # RFC 9113 6.8: it has crossed our GOAWAY
            self.resets.append(stream_id)
            return
        require_of_stream(len(self.streams) < STREAMS and self.running < 2 * STREAMS,   # RFC 9113 5.1.2
                          'too many requests at once', ErrorCode.REFUSED_STREAM)
        stream = Stream(self, stream_id, 0 if whole else length, not whole)
        stream.deadline.begin(self.connection.clock() + self.connection.limits.read_seconds,
                              self.connection.limits.read_extension, self.connection.limits.stall_seconds)
        request = Request(method, target, 'HTTP/2.0', headers, stream, self.connection.peer)
        try:
            threading.Thread(target=stream.serve, args=(request, complete), daemon=True).start()
        except RuntimeError as error:
            raise StreamError(ErrorCode.REFUSED_STREAM, str(error)) from None
        self.streams[stream_id] = stream
        self.running += 1

    def _on_settings(self, flags: int, payload: bytes) -> None:
        """RFC 9113 6.5; settings that are not looked at bind a sender of what is never sent here."""
        self._has_settings = True
        require(not (len(payload) % _SETTING.size or (flags & _ACK and payload)), 'SETTINGS of a wrong size',
                ErrorCode.FRAME_SIZE_ERROR)
        if flags & _ACK:
            return
        settings = dict(_SETTING.iter_unpack(payload))
        require(settings.get(Setting.ENABLE_PUSH, 0) <= 1, 'ENABLE_PUSH is neither 0 nor 1')
        self.frame_bytes = settings.get(Setting.MAX_FRAME_SIZE, self.frame_bytes)
        require(_DEFAULT_FRAME_BYTES <= self.frame_bytes < 1 << 24, 'MAX_FRAME_SIZE out of bounds')
        window = settings.get(Setting.INITIAL_WINDOW_SIZE, self.initial_window)
        for stream in self.streams.values():    # RFC 9113 6.9.2
            stream.window += window - self.initial_window
        self.initial_window = window
        require(max([window, *(stream.window for stream in self.streams.values())]) <= LARGEST_WINDOW,
                'the window of a stream is too large', ErrorCode.FLOW_CONTROL_ERROR)
        self.queue(frame(FrameType.SETTINGS, _ACK, 0))


# ==== Loop =======================================================================================
# The event loop of a process's main thread: descriptors, signals and timers.
#
# Theory of operation.  A signal is written as its number to a pair of sockets (signal.set_wakeup_fd), so that
# its handler runs between two waits and never in the midst of anything; other threads wake the loop the same
# way.  Before each wait every timer is called, does what is due, and returns the seconds until its next call.

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_NO_SIGNAL = -1             # where the system has no such signal
_RELOAD_SIGNAL, _STATS_SIGNAL, _TOGGLE_SIGNAL = (   # the last as in rclone
    int(getattr(signal, name, _NO_SIGNAL)) for name in ('SIGHUP', 'SIGUSR1', 'SIGUSR2'))
_SIGNALS = tuple(signum for signum in (*_STOP_SIGNALS, _RELOAD_SIGNAL, _STATS_SIGNAL, _TOGGLE_SIGNAL)
                 if signum != _NO_SIGNAL)


class Loop:
    """Calls handlers of signals, timers, and callbacks of descriptors, in one thread; any may wake() it."""

    def __init__(self) -> None:
        self.handlers: Dict[int, Callable[[], None]] = {}
        self.timers: List[Callable[[], float]] = []
        # Not epoll(7), whose descriptor a forked process would share; few descriptors are watched.
        self._selector = getattr(selectors, 'PollSelector', selectors.SelectSelector)()
        self._catches = False
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_writer.setblocking(False)    # where it is full, the loop wakes anyway
        self.watch(self._wake_reader, self._handle_signals)

    def catch(self) -> None:
        """Catch signals from now on, also those that were blocked.  For the main thread only."""
        self._catches, signums = True, {*_SIGNALS, *self.handlers} - {_NO_SIGNAL}
        signal.set_wakeup_fd(self._wake_writer.fileno(), warn_on_full_buffer=False)
        for signum in signums:  # their numbers are written to the pair of sockets
            signal.signal(signum, lambda signum, frame: None)
        block_signals(signums, blocked=False)

    def watch(self, source: Any, on_readable: Callable[[], None]) -> None:
        """Call a function whenever `source`, a descriptor or an object with one, is readable."""
        self._selector.register(source, selectors.EVENT_READ, on_readable)

    def unwatch(self, source: Any) -> None:
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(source)

    def run(self, until: Callable[[], bool]) -> None:
        """Wait and call timers, handlers and callbacks until a condition holds."""
        while not until():
            wait = max(min([timer() for timer in self.timers], default=math.inf), 0)
            # poll(2) waits for 24 days at the most.
            for key, _ in self._selector.select(min(wait, 86400) if wait < math.inf else None):
                key.data()

    def wake(self, signum: int = 0) -> None:
        """End the wait that is going on; with a signal's number, act as if that had arrived."""
        with contextlib.suppress(OSError):  # the loop is closed, or has much to read already
            self._wake_writer.send(bytes([signum]))

    def close(self) -> None:
        """Catch no more signals, and close the pair of sockets."""
        if self._catches:
            signal.set_wakeup_fd(-1)
        self._selector.close()
        self._wake_reader.close()
        self._wake_writer.close()

    def _handle_signals(self) -> None:
        for signum in self._wake_reader.recv(4096):
            if signum in self.handlers:
                self.handlers[signum]()


def block_signals(signums: Iterable[int], blocked: bool = True) -> None:
    """Hold signals back until Loop.catch(), or let them through again, where the system can."""
    if hasattr(signal, 'pthread_sigmask'):
        signal.pthread_sigmask(signal.SIG_BLOCK if blocked else signal.SIG_UNBLOCK, signums)


class SystemdNotifier:
    """Notifies the service manager, if there is one (sd_notify(3)); ping() is the timer of its watchdog."""

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        path = environment.pop('NOTIFY_SOCKET', '')
        self._path = '\0' + path[1:] if path.startswith('@') else path
        microseconds = environment.pop('WATCHDOG_USEC', '')
        pid = environment.pop('WATCHDOG_PID', '') or str(os.getpid())
        is_watched = self._path and microseconds.isdecimal() and pid == str(os.getpid())
        self._ping_seconds, self._next_ping = ((int(microseconds) / 2e6, 0.0) if is_watched else
                                               (math.inf, math.inf))

    def notify(self, *lines: str) -> None:
        """Send `VARIABLE=value` lines."""
        if self._path:
            try:
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                    sock.sendto('\n'.join(lines).encode(), self._path)
            except OSError as error:
                log.debug('cannot notify the service manager: %s', error)

    def ping(self) -> float:
        """Send the watchdog's keep-alive if it is due, twice in its interval; seconds until the next one."""
        now = time.monotonic()
        if now >= self._next_ping:
            self._next_ping = now + self._ping_seconds
            self.notify('WATCHDOG=1')
        return self._next_ping - now


# ==== Listeners ==================================================================================
# TCP, unix sockets, sockets that the service manager hands over, and TLS certificates.

_AF_UNIX = getattr(socket, 'AF_UNIX', None)


class Certificates(WatchedFiles):
    """TLS from PEM files: wrap() makes a TlsTransport.  `client_ca` is the CA that signs the clients'
    certificates, `authority` that file's content.  `minimum` is the lowest version, `tls1.0` to `tls1.3`;
    without one the TLS library decides.  Raises OSError, and ImportError where Python has no TLS."""

    def __init__(self, cert: str, key: str, client_ca: str = '', minimum: str = '') -> None:
        self._cert, self._key, self._client_ca, self._minimum = cert, key, client_ca, minimum
        self.kept = f'invalid certificate {cert}, keeping the previous one'
        super().__init__(cert, key, client_ca)

    def load(self) -> str:
        import ssl
        import warnings
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        if self._minimum:
            names = {'tls1.0': 'TLSv1', 'tls1.1': 'TLSv1_1', 'tls1.2': 'TLSv1_2', 'tls1.3': 'TLSv1_3'}
            with warnings.catch_warnings():
                warnings.simplefilter('ignore', DeprecationWarning)  # of versions below 1.2
                context.minimum_version = ssl.TLSVersion[names[self._minimum]]
        if self._minimum in ('tls1.0', 'tls1.1'):
            # These versions sign with SHA-1, which OpenSSL's security level 1 forbids.
            context.set_ciphers('DEFAULT:@SECLEVEL=0')
        elif sys.version_info >= (3, 10):
            # All ciphers are secure; the client knows which one its processor accelerates.
            context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
        context.set_alpn_protocols(['http/1.1'])
        context.options |= getattr(ssl, 'OP_NO_RENEGOTIATION', 0)  # costs the server more than the client
        cert, key = self._read_option('--cert', self._cert), self._read_option('--key', self._key)
        try:
            context.load_cert_chain(self._cert, self._key, password='')  # no prompt for an encrypted key
        except ssl.SSLError as error:
            fault = f'--cert: {self._cert} with {self._key}: {error}'
            if b'-----BEGIN CERTIFICATE-----' not in cert:
                fault = f'--cert: no PEM certificate in {self._cert}'
            elif b'PRIVATE KEY-----' not in key:
                fault = f'--key: no PEM private key in {self._key}'
            elif b'ENCRYPTED' in key:
                fault = f'--key: {self._key} is encrypted; remove its passphrase (openssl pkey)'
            elif error.reason in ('KEY_VALUES_MISMATCH', 'NO_CERTIFICATE_ASSIGNED', 'KEY_TYPE_MISMATCH'):
                fault = f'--key: {self._key} does not match the certificate {self._cert}'
            raise OSError(fault) from None
        authority = b''
        if self._client_ca:
            authority = self._read_option('--client-ca', self._client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
            try:
                context.load_verify_locations(self._client_ca)
            except ssl.SSLError:
                raise OSError(f'--client-ca: no PEM certificate in {self._client_ca}') from None
        self.authority, self.end = authority, certificate_end(self._cert)
        self.wrap = functools.partial(TlsTransport, context=context, authority=authority)
        return f'loaded certificate {self._cert}'

    def _read_option(self, option: str, path: str) -> bytes:
        try:
            return self.read(path)
        except OSError as error:
            raise OSError(f'{option}: {path}: {error.strerror}') from None

    def warn(self) -> str:
        """Log what is doubtful about the files; the first name of the certificate, which may be empty."""
        import ssl
        if os.name == 'posix' and os.stat(self._key).st_mode & stat.S_IROTH:
            log.warning('--key: %s is readable by all users of this host (chmod o-r)', self._key)
        try:  # the library's own reader, which has no public name
            certificate: Dict[str, Any] = vars(ssl)['_ssl']._test_decode_cert(self._cert)
            if ssl.cert_time_to_seconds(certificate['notAfter']) < time.time():
                log.warning('--cert: %s expired on %s', self._cert, certificate['notAfter'])
            if ssl.cert_time_to_seconds(certificate['notBefore']) > time.time():
                log.warning('--cert: %s is not valid before %s', self._cert, certificate['notBefore'])
        except (AttributeError, KeyError, ValueError, ssl.SSLError):
            return ''
        names = [name for kind, name in certificate.get('subjectAltName', ()) if kind == 'DNS']
        return str(names[0]) if names and '*' not in names[0] else ''


def listen(address: Address, shared: bool) -> socket.socket:
    """A listening socket: without a host at every address of IPv6 and IPv4, for a name at that of IPv4 if it
    has one; at a path for the user, and for the group if `shared` or by the umask.  Raises OSError."""
    family: int = socket.AF_INET
    where: Any = '0.0.0.0', address.port
    if address.path:
        if _AF_UNIX is None:
            raise OSError(errno.EAFNOSUPPORT, 'unix sockets are not supported on this system')
        family = _AF_UNIX
    elif address.host:
        family, _, _, _, where = min(
            socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE),
            key=lambda info: info[0] != socket.AF_INET)
    elif socket.has_dualstack_ipv6():
        family, where = socket.AF_INET6, ('::', address.port)
    sock = socket.socket(family)
    try:
        if address.path:
            _bind_unix(sock, address.path, shared)
        else:
            if os.name == 'posix':  # elsewhere it would allow two servers on a port
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:   # `:8080` accepts IPv4, too; an IPv6 address does not
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, where[0] != '::')
            sock.bind(where)
        sock.listen(1024)   # connections that the kernel may queue
    except OSError:
        sock.close()
        raise
    return sock


def _bind_unix(sock: socket.socket, path: str, shared: bool) -> None:
    """Bind to a path; a socket left behind there by a dead server is replaced."""
    with contextlib.suppress(FileNotFoundError), socket.socket(socket.AF_UNIX) as probe:
        if stat.S_ISSOCK(os.lstat(path).st_mode) and probe.connect_ex(path) == errno.ECONNREFUSED:
            os.unlink(path)
    umask = os.umask(0o177)
    try:
        sock.bind(path)
    finally:
        os.umask(umask)
    if shared or not umask & 0o060:
        os.chmod(path, 0o660)


def inherited_sockets(environment: MutableMapping[str, str]) -> List[Tuple[socket.socket, str]]:
    """Sockets of the service manager, and their names (sd_listen_fds(3)), whose variables are removed."""
    pid, count, names = (environment.pop(name, '') for name in ('LISTEN_PID', 'LISTEN_FDS', 'LISTEN_FDNAMES'))
    if pid != str(os.getpid()) or not count.isdecimal():
        if pid:
            log.warning('LISTEN_FDS=%s is for process %s, not for this one; ignored', count, pid)
        return []
    inherited = []
    for fd, name in zip(range(3, 3 + int(count)), itertools.chain(names.split(':'), itertools.repeat(''))):
        try:
            sock = socket.socket(fileno=fd)
            sock.set_inheritable(False)
            if sock.type != socket.SOCK_STREAM or not sock.getsockopt(
                    socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                raise OSError(errno.EINVAL, 'does not listen; use Accept=no and ListenStream= in the unit')
        except OSError as error:
            raise OSError(f'LISTEN_FDS={count}: descriptor {fd}: {error.strerror}') from None
        inherited.append((sock, name))
    return inherited


@functools.lru_cache(maxsize=None)
def listener_class() -> Any:
    """The class Listener, made when it is needed: importing http.server takes half of the time of a start."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Listener(ThreadingHTTPServer):
        """A listening socket whose connections are served, with TLS if `tls`.  `name` is what the service
        manager calls it; a unix socket that we have bound is removed from its `path` at the end."""

        def __init__(self, server: Server, sock: socket.socket, tls: bool, name: str = '',
                     path: str = '') -> None:
            self.address_family = sock.family
            super().__init__(sock.getsockname(), BaseHTTPRequestHandler, bind_and_activate=False)
            self.socket.close()
            self.socket = sock
            sock.setblocking(False)     # the client may disconnect before accept()
            if sock.family != _AF_UNIX:
                # Inherited by connections: a dead client is noticed in 150 s, as in Go's servers (tcp(7)).
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for option, value in (('TCP_KEEPIDLE', 15), ('TCP_KEEPINTVL', 15), ('TCP_KEEPCNT', 9)):
                    with contextlib.suppress(AttributeError, OSError):  # not every system has them
                        sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
            self.tls = tls and sock.family != _AF_UNIX
            self.name, self.path = name, path
            self._inode = os.stat(path).st_ino if path else 0
            self._server = server

        def server_close(self) -> None:
            super().server_close()
            with contextlib.suppress(OSError):
                if self.path and os.stat(self.path).st_ino == self._inode:
                    os.unlink(self.path)

        def get_request(self) -> Tuple[socket.socket, Peer]:
            try:
                sock, address = self.socket.accept()
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    refusals.log(logging.ERROR, 'cannot accept connections', Peer('any client'), '',
                                 'cannot accept connections: %s', error)
                    # An idle connection gives way, which takes its thread a moment.
                    time.sleep(0.01 if self._server.api.admission.make_room() else 0.1)
                raise
            sock.setblocking(True)
            if sock.family == _AF_UNIX:
                return sock, Peer('unix', unix=True)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # An address of IPv6 may contain one of IPv4 (RFC 4291 2.5.5.2).
            return sock, Peer(re.sub(r'^::ffff:(?=.*\.)', '', address[0]))

        def process_request(self, request: Any, client_address: Any) -> None:
            if not self._server.begin(request, client_address, self.tls):
                self.shutdown_request(request)

    return Listener


def login_name(sock: socket.socket) -> str:
    """The name of the user whose process has connected to a unix socket, empty if it is not known."""
    if not sys.platform.startswith(('linux', 'android')):   # elsewhere the option has another layout
        return ''
    option = getattr(socket, 'SO_PEERCRED', 17)     # PyPy does not know its name
    credentials = sock.getsockopt(socket.SOL_SOCKET, option, struct.calcsize('iII'))
    return user_name(struct.unpack('iII', credentials)[1])  # unix(7), struct ucred


# ==== Server =====================================================================================
# The connections of a process, their threads and deadlines; start, reload and stop of the server.  The main
# thread accepts connections in its Loop; each connection has a thread.

EXPIRED_AT_ONCE = 32        # Connections that are woken at a time because their deadline has passed.
STOP_SECONDS = 10           # Grace period for requests under way when the server stops.
HANG_SECONDS = 0.1          # Time that a disk has to answer before it is left to itself.


class Periodic:
    """Calls a function every some `seconds` (infinite: never), in a thread, since its disk may hang."""

    def __init__(self, act: Callable[..., object], seconds: float) -> None:
        self._act, self._seconds, self._thread = act, seconds, threading.Thread()
        self.due = 0 if seconds < math.inf else math.inf

    def tick(self) -> float:
        """Call the function if it is due; seconds until it will be."""
        now = time.monotonic()
        if now >= self.due:
            self.due = now + self._seconds
            self.start()
        return self.due - now

    def is_running(self) -> bool:
        return self._thread.is_alive()

    def start(self, *args: Any) -> bool:
        """Call the function now; False if the last call has not returned."""
        if self.is_running():
            return False
        self._thread = threading.Thread(target=self._act, args=args, daemon=True)
        with contextlib.suppress(RuntimeError):     # there are too many threads: the next time
            self._thread.start()
            self._thread.join(HANG_SECONDS)
        return True


class IdleExit:
    """Ends the server when none of its processes has been at work for some `seconds`."""

    def __init__(self, counters: Counters, seconds: float) -> None:
        self._counters, self._seconds, self._begun = counters, seconds, 0.0

    def note(self, at_work: bool) -> float:
        """A timer of each process that serves: note that it is at work; seconds until the next time."""
        if at_work and self._seconds < math.inf:
            self._counters.put(('at work',), int(time.monotonic() * 1000))
            return 0.5
        return math.inf

    def tick(self, on_idle: Callable[[], None]) -> float:
        """A timer of the first process."""
        self._begun = self._begun or time.monotonic()
        last = max([self._begun, *(moment / 1000 for moment in self._counters.read_word(('at work',), 0))])
        left = last + self._seconds - time.monotonic()
        if left <= 0:
            log.log(NOTICE, 'no connection for %s: ending (--exit-idle)', format_duration(self._seconds))
            self._seconds = math.inf
            on_idle()
        return left


class StatsLog:
    """Logs a summary every `seconds` (infinite: never), if anything has happened."""

    def __init__(self, metrics: Metrics, seconds: float) -> None:
        self._metrics, self._seconds = metrics, seconds
        self._next = math.inf       # time of the next line, infinite while idle

    def tick(self, active: bool) -> float:
        """Log a line if it is due; seconds until the next one, infinite if nothing happens or is `active`."""
        if self._seconds == math.inf or not (active or self._metrics.has_news()):
            self._next = math.inf
            return math.inf
        now = time.monotonic()
        if self._next == math.inf or now >= self._next:
            if now >= self._next and self._metrics.has_news():
                log.info('%s', self._metrics.line())
            self._metrics.begin_period()
            self._next = now + self._seconds if active or self._metrics.has_news() else math.inf
        return self._next - now


class Server:
    """Serves an Api on `addresses`, or on `inherited` sockets alone if there are any, a thread for each
    connection; all share `bandwidth`.  What was done is logged every `stats_seconds`.  Raises OSError."""

    def __init__(self, api: Api, limits: Limits, addresses: List[Address],
                 certificates: Optional[Certificates] = None,
                 inherited: Iterable[Tuple[socket.socket, str]] = (), bandwidth: Optional[Bandwidth] = None,
                 notifier: Optional[SystemdNotifier] = None, stats_seconds: float = math.inf) -> None:
        self.api, self.limits, self.bandwidth = api, limits, bandwidth
        self.notifier = notifier or SystemdNotifier({})
        self.stats = StatsLog(api.metrics, stats_seconds)
        self.idle_exit = IdleExit(api.metrics.counters, math.inf)
        self.listeners: List[Any] = []
        self.served: Set[Connection] = set()    # those that have begun; copy() it before a walk
        self.stops = 0                  # stop signals seen; the second skips the grace period
        self.certificates = certificates
        self.sweep_seconds = 0.5        # between two checks of the deadlines
        self._next_sweep = 0.0
        watched = [*filter(None, (certificates, api.accounts.file, api.policy if api.policy.path else None))]

        def look(force: bool = False) -> None:
            for files in watched:
                files.look(force)

        self.looking = Periodic(look, LOOK_SECONDS if watched else math.inf)
        purges = api.usage.past.keeps and not api.store.directory.read_only
        self.purging = Periodic(lambda: api.usage.purge(PURGE_SECONDS), PURGE_SECONDS if purges else math.inf)
        self.is_first = True            # of the processes: makes censuses, purges, runs events
        self.is_parent = True           # of workers, or alone
        self._listen(addresses, inherited)
        if self.listeners:
            api.admission.fit_descriptors()
        api.usage.census.channel.open()
        if hasattr(os, 'fork') and hasattr(socket, 'AF_UNIX'):  # else one process does without
            api.events.channel.open()
        if api.usage.limits.by_place or api.prometheus or api.events.command:   # which no scrape is to miss
            api.usage.census.request()
        self.loop = Loop()
        self.loop.handlers = {**dict.fromkeys(_STOP_SIGNALS, self.on_stop), _RELOAD_SIGNAL: self.reload,
                              _STATS_SIGNAL: lambda: log.log(NOTICE, '%s', api.metrics.line(final=False)),
                              _TOGGLE_SIGNAL: self.toggle_bandwidth}

    def _listen(self, addresses: List[Address], inherited: Iterable[Tuple[socket.socket, str]]) -> None:
        """Open the listeners.  Raises OSError, which says which of them failed."""
        tls, where = self.certificates is not None, 'socket from systemd'
        try:
            for sock, name in inherited:
                self.listeners.append(listener_class()(self, sock, tls, name))
            for address in () if self.listeners else addresses:
                where = f'--addr {address.path or f"{address.host}:{address.port}"}'
                sock = listen(address, self.api.store.shared)
                self.listeners.append(listener_class()(
                    self, sock, tls and address.scheme != 'http', path=address.path))
        except OSError as error:
            self.close_listeners()
            raise OSError(f'{where}: {error.strerror or error}') from None

    def close_listeners(self) -> None:
        for listener in self.listeners:
            listener.server_close()

    def run(self) -> None:
        """serve(), with signals.  For the main thread only."""
        self.loop.catch()
        self.serve()

    def serve(self) -> None:
        """Serve until a signal or, without listeners, the last connection's end; let requests finish."""
        loop, census, events = self.loop, self.api.usage.census, self.api.events
        for listener in self.listeners:
            loop.watch(listener, functools.partial(self._accept, listener))
        if self.is_first:
            for channel, take in ((census.channel, census.on_requested), (events.channel, events.on_sent)):
                if channel.receiver:
                    loop.watch(channel.receiver, take)
            loop.timers += [self.purging.tick, events.log_forgotten]
            events.start()
        loop.timers += [self.looking.tick, self.sweep, self.notifier.ping, refusals.tell,
                        lambda: self.stats.tick(bool(self.served)),
                        lambda: self.idle_exit.note(self._is_at_work())]
        if self.is_parent:
            loop.timers.append(lambda: self.idle_exit.tick(self.on_stop))
        unpin(False)
        self.notifier.notify('READY=1')
        loop.run(lambda: self.stops > 0 or not (self.listeners or self.served))
        self.notifier.notify('STOPPING=1')
        # Accept no more, drop idle connections, wait for the others; a second signal ends the wait.
        for source in (*self.listeners, census.channel.receiver, events.channel.receiver):
            loop.unwatch(source)
        self.close_listeners()
        for connection in self.served.copy():
            connection.stop()
        end = time.monotonic() + STOP_SECONDS
        loop.timers = [self.sweep, lambda: end - time.monotonic()]
        loop.run(lambda: self.stops > 1 or not self.served or time.monotonic() >= end)
        for connection in self.served.copy():
            log.warning('closed the connection of %s: request not finished in time', connection.peer)
            connection.abort()
        events.stop(max(end - time.monotonic(), 0))
        refusals.tell(at_once=True)
        if self.is_first and self.purging.due < math.inf:
            self.api.usage.purge(0 if self.listeners else STDIO_PURGE_SECONDS)      # notes the time
        census.channel.close()
        events.channel.close()
        loop.close()

    def _is_at_work(self) -> bool:
        return bool(self.served or self.purging.is_running() or self.api.usage.census.counting.locked()
                    or self.api.events.is_at_work())

    def _accept(self, listener: Any) -> None:
        """Accept a connection, unless another process that has fewer is about to."""
        of_each = [row[0] for row in self.api.metrics.counters.read(CONNECTIONS)]
        if len(self.served) > min(of_each, default=0):
            time.sleep(0.001)
        listener.handle_request()

    def begin(self, source: socket.socket | PipeTransport, peer: Peer, tls: bool = False) -> bool:
        """Serve a connection, or standard input and output, in a thread; False if there is no place."""
        ticket = self.api.admission.admit(peer)
        if not ticket:
            return False
        connection: Optional[Connection] = None
        try:
            transport: Any = source
            if isinstance(source, socket.socket):
                transport = SocketTransport(source, self.limits.stall_seconds)
                if tls and self.certificates:
                    transport = self.certificates.wrap(transport)
            connection = Connection(transport, peer, self.limits, self.bandwidth,
                                    lambda limit, peer: self.api.metrics.count_limited(limit, peer.name))
            self.served.add(connection)
            threading.Thread(target=self._serve, args=(connection, source, ticket), daemon=True).start()
        except Exception as error:      # no memory, or no thread
            refusals.log(logging.ERROR, 'errors', peer, '', 'a connection from %s failed: %s', peer, error)
            self.api.admission.leave(ticket)
            self.served.discard(connection)
            return False
        return True

    def _serve(self, connection: Connection, source: socket.socket | PipeTransport, ticket: Ticket) -> None:
        """Serve a connection to its end."""
        peer = connection.peer
        try:
            if isinstance(source, PipeTransport):
                Http2(connection, self.api).run()
                return
            if peer.unix:
                peer.user = login_name(source)
            connection.shake_hands()
            http = Http1(connection, self.api)
            if ticket.refusal:
                http.refuse(HttpError(503, ticket.refusal, [('Retry-After', '10')]))
            else:
                http.run()
        except Gone as gone:
            if isinstance(gone, HandshakeFailed):
                refusals.log(NOTICE, 'no connection', peer, '', '%s: %s', peer, gone)
            else:
                log.debug('%s: %s', peer, gone)
        except Exception as error:
            refusals.log(logging.ERROR, 'errors', peer, '', 'a connection from %s failed: %s', peer, error)
            log.debug('traceback:', exc_info=True)
        finally:
            connection.close()
            self.api.admission.leave(ticket)
            self.served.discard(connection)
            if not self.served:     # for which the loop may be waiting
                self.loop.wake()

    def sweep(self) -> float:
        """A timer: expire connections whose deadline has passed, but few at a time, since a thousand threads
        that wake at once would block all others; seconds until the next check."""
        if not self.served:
            return math.inf
        now = time.monotonic()
        if now >= self._next_sweep:
            connections = self.served.copy()
            authority = self.certificates.authority if self.certificates else b''
            for connection in connections:
                if not connection.stopping and connection.authority not in (None, authority):
                    log.log(NOTICE, 'closed the connection of %s: the client CA has changed', connection.peer)
                    connection.stop()
            for room in self.api.usage.rooms.copy():
                room.yield_rest()
            longest_stay = self.api.admission.longest_stay()
            overdue = [connection for connection in connections
                       if connection.deadline.time() < connection.clock()
                       or (now > connection.peer.begun + longest_stay and connection.peer.is_stranger())]
            for connection in overdue[:EXPIRED_AT_ONCE]:
                connection.expire()
            self._next_sweep = now + (0.05 if len(overdue) > EXPIRED_AT_ONCE else self.sweep_seconds)
        return self._next_sweep - now

    def stop(self) -> None:
        """Do what SIGTERM does; any thread may."""
        self.loop.wake(signal.SIGTERM)

    def on_stop(self) -> None:
        """SIGTERM or SIGINT has come."""
        self.stops += 1

    def reload(self) -> None:
        """SIGHUP: read again what may have changed."""
        self.notifier.notify('RELOADING=1', f'MONOTONIC_USEC={time.monotonic_ns() // 1000}')
        if not self.looking.start(True):
            log.error('cannot reload: the disk of the certificate, passwords or rights does not answer')
        for handler in log.handlers:
            handler.close()  # LogFile's
        self.notifier.notify('READY=1')

    def toggle_bandwidth(self) -> None:
        """SIGUSR2: lift the limit of --bwlimit, or put it in force again."""
        if self.bandwidth:
            log.log(NOTICE, '--bwlimit is %s', 'off' if self.bandwidth.toggle() else 'on again')


def import_modules() -> None:
    """Import what requests may need, before an upgrade of Python takes it away.  Raises ImportError."""
    from importlib import import_module
    for name in ('base64', 'calendar', 'hmac', 'html', 'http.server', 'ipaddress', 'json', 'mmap', 'queue',
                 'shutil', 'unicodedata', 'urllib.parse'):
        import_module(name)
    for name in ('ctypes', 'fcntl', 'pwd', 'resource'):     # which some systems lack
        with contextlib.suppress(ImportError):
            import_module(name)
    for encoding in ('ascii', 'idna', 'latin-1', 'unicode_escape', 'utf-8', 'utf-8-sig'):
        ''.encode(encoding)


# ==== Workers ====================================================================================
# Several processes that serve the same listeners, since Python runs one thread at a time in each.
#
# Theory of operation.  The parent opens the listeners, forks the workers and serves nothing itself; it has no
# threads, so that it can fork at any time.  Workers share the listening sockets and the Counters:
#
#     service manager, administrator ──signals──▶ parent ──SIGTERM, SIGHUP──▶ each worker
#                                                    ◀──SIGCHLD when a worker has died──
#     parent ──lifeline, a pair of sockets: a byte for each──▶ workers stop without delay
#                                           its end, when the parent has died──▶ workers stop
#     any worker ──Census.request()──▶ the first worker, which makes the census
#
# SIGTERM and SIGINT stop: the first one lets requests under way finish, the second one does not.  Workers
# ignore SIGINT, SIGUSR1 and SIGUSR2, and take any number of SIGTERM for one: a terminal signals all
# processes, and the service manager may.  A worker that dies is replaced, and its gauges are zeroed.

LONGEST_DELAY = 30          # Seconds before a dead worker is replaced: 0, 1, 2, 4 to this.
ORDERLY_SECONDS = 0.5       # Additional delay if it has ended with status 0.
STEADY_SECONDS = 60         # Running time after which the delays begin anew.
KILL_SECONDS = STOP_SECONDS + 5     # Time for a worker to stop before it is killed.


class Worker:
    """A worker process, as its parent sees it, and its successors in the same `slot` of the Counters."""

    def __init__(self, slot: int) -> None:
        self.slot = slot
        self.pid = 0                # 0 while there is none
        self.begun = 0.0
        self.due = 0.0              # when it is to be started or, while it runs, killed; infinite for never
        self.delay = 0.0            # seconds before the next start that has a failure before it

    def back_off(self) -> float:
        """Plan the next start; seconds until then, which grow the more often it fails."""
        delay, self.delay = self.delay, min(max(2 * self.delay, 1), LONGEST_DELAY)
        self.due = time.monotonic() + delay
        return delay


class Workers:
    """The parent of `count` worker processes that serve the listeners of `server`."""

    def __init__(self, server: Server, count: int) -> None:
        self._server = server
        self._workers = [Worker(slot) for slot in range(1, count + 1)]

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT; running requests may finish, until a second one."""
        server, loop = self._server, self._server.loop
        reload_log.disabled = True      # the first worker logs it
        self._lifeline, self._workers_end = socket.socketpair()
        loop.handlers.update({signal.SIGTERM: self._stop, signal.SIGINT: self._stop,
                              _RELOAD_SIGNAL: self._reload, signal.SIGCHLD: self._reap})
        loop.catch()
        self._start_or_kill()
        server.notifier.notify('READY=1')
        loop.timers = [server.looking.tick, server.notifier.ping, lambda: server.stats.tick(True),
                       self._start_or_kill, lambda: server.idle_exit.tick(self._stop)]
        loop.run(lambda: server.stops > 0 and not any(worker.pid for worker in self._workers))

    def _start_or_kill(self) -> float:
        """A timer: start the workers that are due, kill those that do not stop; seconds until the next is."""
        now = time.monotonic()
        for worker in self._workers:
            if now >= worker.due and worker.pid:
                worker.due = math.inf
                log.warning('worker %d (process %d) does not stop; killing it', worker.slot, worker.pid)
                os.kill(worker.pid, signal.SIGKILL)
            elif now >= worker.due:
                self._start(worker)
        return min(worker.due for worker in self._workers) - now

    def _signal_all(self, signum: int) -> None:
        for worker in self._workers:
            if worker.pid:
                os.kill(worker.pid, signum)

    def _reload(self) -> None:
        self._server.reload()
        self._signal_all(_RELOAD_SIGNAL)

    def _stop(self) -> None:
        """Accept no more, and stop the workers; the second time end their grace period."""
        self._server.on_stop()
        if self._server.stops > 1:
            self._lifeline.send(bytes(len(self._workers)))
            return
        self._signal_all(signal.SIGTERM)
        for worker in self._workers:
            worker.due = time.monotonic() + KILL_SECONDS if worker.pid else math.inf
        self._server.notifier.notify('STOPPING=1')
        self._server.close_listeners()

    def _reap(self) -> None:
        """Collect processes that have ended, and plan the successors of workers."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    return
                for worker in self._workers:
                    if worker.pid == pid:
                        self._on_end(worker, status)

    def _on_end(self, worker: Worker, status: int) -> None:
        pid, worker.pid, worker.due = worker.pid, 0, math.inf
        self._server.api.metrics.counters.clear(worker.slot)    # its connections have ended
        if self._server.stops:
            return
        if time.monotonic() - worker.begun > STEADY_SECONDS:
            worker.delay = 0
        delay = worker.back_off()
        if status:
            how = (f'was killed by signal {os.WTERMSIG(status)}' if os.WIFSIGNALED(status)
                   else f'failed with status {os.WEXITSTATUS(status)}')
            log.error('worker %d (process %d) %s; restarting it%s', worker.slot, pid, how,
                      f' in {delay:.0f} s' if delay else '')
        else:  # somebody has stopped it, and may be about to stop us
            worker.due += ORDERLY_SECONDS

    def _start(self, worker: Worker) -> None:
        # Until the new process has its own handlers, signals would be written to our wake-up pair.
        block_signals(_SIGNALS)
        try:
            worker.pid = os.fork()
            if not worker.pid:
                self._be_worker(worker.slot)
            if worker.due:  # not the first start
                log.log(NOTICE, 'worker %d is now process %d', worker.slot, worker.pid)
            worker.begun, worker.due = time.monotonic(), math.inf
        except OSError as error:
            log.error('cannot start a worker: %s', error)
            worker.back_off()
        block_signals(_SIGNALS, blocked=False)

    def _be_worker(self, slot: int) -> NoReturn:
        """Serve in the new process, to its end."""
        server, status = self._server, 1

        def on_stop() -> None:
            server.stops = max(server.stops, 1)

        def on_lifeline() -> None:
            server.stops = max(server.stops, 2 if self._workers_end.recv(1) else 1)
            server.loop.unwatch(self._workers_end)

        try:
            self._lifeline.close()
            server.loop.close()     # the parent's
            server.loop = Loop()
            server.loop.handlers = {signal.SIGTERM: on_stop, _RELOAD_SIGNAL: server.reload}
            server.loop.watch(self._workers_end, on_lifeline)
            server.notifier, server.stats = SystemdNotifier({}), StatsLog(server.api.metrics, math.inf)
            for listener in server.listeners:
                listener.path = ''  # the parent removes it
            counters = server.api.metrics.counters
            counters.join(slot)
            counters.add(CONNECTIONS, 0, 0)     # for the others, who look for the process with the fewest
            server.is_first, server.is_parent = slot == 1, False
            reload_log.disabled = not server.is_first
            pin_process(slot)
            server.run()
            status = 0
        except BaseException as error:
            log.error('%s: %s', type(error).__name__, error)
            log.debug('traceback:', exc_info=True)
        finally:
            logging.shutdown()
            os._exit(status)  # skip the parent's clean-up


# ==== Logs =======================================================================================
# Log formats and log files.

class LogFormatter(logging.Formatter):
    """rclone's log lines; those of the access log have no prefix, for programs that read them.  A message is
    always one line.  For the `journal` a line begins with its priority (sd-daemon(3)), not a time."""

    PRIORITIES = {logging.ERROR: 3, logging.WARNING: 4, NOTICE: 5, logging.INFO: 6, logging.DEBUG: 7}

    def __init__(self, journal: bool) -> None:
        super().__init__(datefmt='%Y/%m/%d %H:%M:%S')
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.name != access_log.name:
            text = f'{record.levelname}: {one_line(text)}'
            if not self._journal:
                text = f'{self.formatTime(record, self.datefmt)} {text}'
            if record.exc_info:
                text += f'\n{self.formatException(record.exc_info)}'
        priority = f'<{self.PRIORITIES[record.levelno]}>' if self._journal else ''
        return priority + text.replace('\n', f'\n{priority}')


class JsonFormatter(logging.Formatter):
    """A JSON object for each line; those of the access log have their fields as members, too."""

    def format(self, record: logging.LogRecord) -> str:
        import json
        entry: Dict[str, Any] = {'time': format_time(record.created, 3), 'level': record.levelname,
                                 'message': record.getMessage()}
        if record.name == access_log.name and isinstance(record.args, tuple):
            client, user, _, request, status, sent, referer, agent, seconds = record.args
            entry.update(client=str(client), user=user, request=request, status=status,
                         bytes=0 if sent == '-' else sent, referer=referer, agent=agent,
                         seconds=round(float(str(seconds)), 6))
        if record.exc_info:
            entry['exception'] = self.formatException(record.exc_info)
        return json.dumps(entry)


class LogFile(logging.FileHandler):
    """Appends to a file, which is created unreadable for others.  After close(), which SIGHUP causes for
    logrotate, the next line opens it again; if that fails, or the disk is full, lines are lost."""

    def _open(self) -> Any:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | _BINARY | getattr(os, 'O_NONBLOCK', 0)    # of a FIFO
        return open(os.open(self.baseFilename, flags, 0o640),
                    'a', encoding='utf-8', errors='backslashreplace')

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            super().emit(record)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


def start_log(level: str, path: str, as_json: bool = False) -> None:
    """Log to the end of the file `path`, to standard output if that is `-`, or to stderr, which may lead to
    systemd's journal: JOURNAL_STREAM names its device and inode (systemd.exec(5)).  Raises OSError."""
    logging.addLevelName(NOTICE, 'NOTICE')
    logging.raiseExceptions = False  # a full disk for the log must not stop the service
    handler: logging.Handler = (logging.StreamHandler(sys.stdout) if path == '-' else
                                LogFile(path) if path else logging.StreamHandler())
    journal = False
    with contextlib.suppress(OSError):  # stderr may be closed
        status = os.fstat(2)
        journal = not path and os.environ.get('JOURNAL_STREAM') == f'{status.st_dev}:{status.st_ino}'
    handler.setFormatter(JsonFormatter() if as_json else LogFormatter(journal))
    log.addHandler(handler)
    log.setLevel(level)
    log.propagate = False


# ==== Options ====================================================================================
# The command line and the environment.  Each option is described once, in HELP.

class Option:
    """An option in the `words` of --help, `--name VALUE`; without VALUE it is a bool, whose name alone means
    true.  Another one whose name stands alone is `const`, if that is given.  `parse` makes a value of text
    and raises ValueError.  `default` is text, too; where it is empty a bool is false, and anything else empty
    or None.  `shown` is the default in --help, if the text is not to stand there.  `requires` is an option
    without which it makes no sense.  Over `stdio` it may be refused, from the `environment` not be read.
    `repeated` makes a list of the values, and of the words in the environment's variable, or of its lines
    where a value may have spaces."""

    def __init__(self, words: str, text: str = argparse.SUPPRESS, parse: Callable[[str], Any] = str, *,
                 default: str = '', const: Optional[str] = None, shown: Optional[str] = None,
                 requires: str = '', repeated: bool = False, stdio: bool = True, environment: bool = True
                 ) -> None:
        self.name, _, self.metavar = words.partition(' ')
        self.dest = self.name[2:].replace('-', '_')
        self.variable = f'RESTIC_SERVE_{self.dest.upper()}' if environment else ''
        self.const, self.requires, self.repeated, self.stdio = const, requires, repeated, stdio
        self._parse = parse if self.metavar else parse_bool
        suffix = (f' (default: {shown})' if shown else
                  f' (default {default})' if default and shown is None else '')
        self.help = text + suffix if suffix else text   # argparse wants its very SUPPRESS
        self.default: Any = (self.read(self.split(default)) if default else [] if repeated else
                             False if not self.metavar else '' if parse is str else None)

    def split(self, text: str) -> List[str]:
        if not self.repeated:
            return [text]
        return text.splitlines() if self._parse is parse_header else text.split()

    def read(self, words: List[str]) -> Any:
        """The value of words, of which the last one counts unless it is `repeated`.  Raises ValueError."""
        values = [self._parse(word) for word in words]
        return values if self.repeated else values[-1]


Job = functools.partial(Option, environment=False)
Net = functools.partial(Option, stdio=False)
# Default of --workers: more than four gain little, and each takes memory.
_WORKERS = min(len(CORES), 4) if hasattr(os, 'fork') else 1
# Options in scripts for rclone that mean nothing to a local directory; they are ignored and logged.
_IGNORED = [Option(words, environment=False) for words in (
    '--fast-list', '--progress', '--stats-one-line', '--use-mmap', '--buffer-size SIZE', '--cache-dir DIR',
    '--checkers N', '--contimeout TIME', '--low-level-retries N', '--retries N', '--timeout TIME',
    '--tpslimit N', '--tpslimit-burst N', '--transfers N', '--user-agent NAME')]
# The options in the order of --help, each group after its title.
HELP: Tuple[Union[str, Option], ...] = (
    'serving',
    Option('--addr ADDRESS', 'address to listen on: 1.2.3.4:8000, [::1]:8080, localhost:0 (a free port), '
           ':8080 (all addresses), unix:///path/to/socket or /path/to/socket; a leading http:// or tls:// '
           'selects the protocol for that address; repeatable', parse_address, default='127.0.0.1:8080',
           repeated=True),
    Option('--stdio', 'speak HTTP/2 over standard input and output, for restic -o rclone.program="ssh HOST '
           'restic_serve.py" -r rclone:DIR; ignores --addr', environment=False),
    Option('--b2-hard-delete'),     # restic passes it to rclone
    Option('--baseurl PATH', 'prefix for all URLs, for use behind a proxy', parse_baseurl, default='/',
           shown=''),
    Option('--cache-objects', 'ignored; accepted for compatibility with rclone'),
    Net('--allow-origin ORIGIN', 'web origin whose scripts may use the server (CORS), or * for any',
        parse_origin),
    Option("--response-header 'NAME: VALUE'", 'header to add to all responses; repeatable', parse_header,
           repeated=True),
    Net('--exit-idle DURATION', 'with socket activation, end after this time without a connection and '
        'without own work; the next one starts it again', parse_duration, default='0', shown='0, never'),
    Option('--workers NUMBER', 'number of worker processes', parse_count, default=str(_WORKERS),
           shown='one per available core, at most 4; 1 on systems without fork'),
    'TLS',
    Net('--cert FILE', 'TLS certificate with its chain (PEM); all TCP addresses then use TLS, except those '
        'written with http://', requires='--key'),
    Net('--key FILE', 'private key of the certificate (PEM)', requires='--cert'),
    Net('--client-ca FILE', 'require client certificates signed by this CA (PEM)', requires='--cert'),
    Net('--min-tls-version VERSION', 'minimum version: tls1.0, tls1.1, tls1.2 or tls1.3', parse_tls_version,
        shown='minimum of the TLS library', requires='--cert'),
    'authentication',
    Net('--no-auth', 'allow access without authentication and do not warn about it'),
    Net('--htpasswd FILE', 'file of users and passwords, as written by htpasswd; reloaded when it changes'),
    Net('--user NAME', 'a single user, instead of a file', parse_user, requires='--pass'),
    Net('--pass PASSWORD', 'password of that user; set RESTIC_SERVE_PASS instead to keep it out of the '
        'process list', requires='--user'),
    Option('--salt TEXT', 'salt of the hash kept in memory for that password', default='dlPL2MqE'),
    Option('--realm TEXT', 'realm that clients show when asking for a password', parse_realm,
           default='restic_serve'),
    Net('--user-from-header NAME', 'header in which a proxy (on this host, or listed in --trust-proxy) '
        'passes the user name', parse_header_name),
    Net('--trust-proxy ADDRESS[/BITS]', 'address or network of a proxy whose user name (--user-from-header) '
        'and client address (X-Forwarded-For, Forwarded) are believed, also over unix sockets; limits per '
        'address do not apply to it; repeatable', parse_network, repeated=True),
    Net('--socket-auth', 'require a password on unix sockets too'),
    'access control',
    Option('--append-only', 'disallow deleting or changing anything except locks'),
    Net('--private-repos', 'restrict users to repositories below /<user>/'),
    Net('--admin NAME', 'user exempt from --append-only and --private-repos; repeatable', parse_user,
        repeated=True),
    Net('--rights FILE', 'file of access rules, one per line, such as "alice /alice append 50G"; replaces '
        'the three options above and --max-size-per-user'),
    'storage',
    Option('--group-accessible', 'give the group access to new directories and files (0770 and 0660 instead '
           'of 0700 and 0600)'),
    Option('--must-exist', 'fail if DIR does not exist, for example because its disk is not mounted, instead '
           'of creating it'),
    Option('--read-only', 'refuse all changes, even locks (use restic --no-lock)'),
    Option('--keep-deleted DURATION', 'keep deleted objects for this time, such as 30d, so that repositories '
           'can be read as they were (rest:http://HOST/PATH/.at/2d/) and rolled back (--roll-back)',
           parse_period, default='0', shown='0, keep nothing'),
    Option('--no-verify-upload', 'do not verify the SHA-256 of uploads; only for very weak machines'),
    'limits',
    Option('--bwlimit BANDWIDTH', 'bandwidth limit for all connections together, such as 10M, 10M:1M '
           '(sent:received) or a timetable "08:00,512k Sat-10:00,off"; SIGUSR2 toggles it', parse_timetable,
           default='off'),
    Option('--max-size SIZE', 'quota for all repositories together, such as 500G; uploads beyond it fail '
           'with 507', parse_quota, default='0', shown='0, no limit'),
    Net('--max-size-per-user SIZE', 'quota for all repositories below each /<user>/; requires '
        '--private-repos', parse_quota, default='0', shown='0, no limit', requires='--private-repos'),
    Option('--max-connections NUMBER', 'maximum number of simultaneous connections; beyond it those without '
           'login give way, then idle ones; without any 503 is answered', parse_count, default='1024'),
    Option('--max-connections-per-address NUMBER', 'maximum per IPv4 address or IPv6 network (/64, /56, '
           '/48), of connections and of requests behind a proxy; more are rejected with 503; does not apply '
           'to this host, unix sockets and --trust-proxy', parse_count,
           shown='a quarter of --max-connections, at least 8'),
    Option('--max-header-bytes BYTES', 'maximum size of a request header; as in rclone, 4096 bytes more are '
           'allowed', parse_count, default='4096'),
    Option('--server-read-timeout DURATION', 'maximum time for an upload, not counting delays by --bwlimit; '
           '0 for no limit', parse_duration, shown='1h0m0s, plus a second for each KiB transferred'),
    Option('--server-write-timeout DURATION', 'maximum time for a download, likewise', parse_duration),
    Option('--stall-timeout DURATION', 'abort uploads and downloads that make no progress for this time; 0 '
           'for no limit', parse_duration, default='1m0s'),
    'logging',
    Option('--quiet', 'log errors only; also -q'),
    Option('--log-level LEVEL', 'DEBUG (as -vv), INFO (as -v), NOTICE or ERROR (as -q)', parse_log_level),
    Option('--log-file FILE', 'append the log to FILE, or write it to standard output (-), instead of '
           'standard error; reopened on SIGHUP'),
    Option('--log-format FORMAT', 'text, or json for one JSON object per line', parse_log_format,
           default='text'),
    'monitoring',
    Option('--status', 'serve a status page to browsers; --status=false disables it', default='true'),
    Option('--stale-after DURATION', 'age of the last snapshot after which a repository is overdue',
           parse_period, default='48h'),
    Net('--prometheus', 'serve metrics at /metrics; if there are users, only to administrators and the user '
        '"metrics"'),
    Net('--prometheus-no-auth', 'serve metrics without authentication', requires='--prometheus'),
    Net('--on-event COMMAND', 'shell command to run when a snapshot arrives (snapshot); when a repository is '
        'overdue, no longer overdue, damaged, or cannot be read (overdue, back, damaged, unreadable); when a '
        'quota or the disk is 90%% full (full); when most snapshots are deleted (deleted) or a delete is '
        'refused (refused); when DIR disappears (gone); when the certificate ends, and 21 and 7 days before '
        '(certificate). RESTIC_SERVE_EVENT, _REPOSITORY, _USER, _MESSAGE, _DIRECTORY and _TIME describe the '
        'event'),
    Option('--usage-interval DURATION', 'maximum age of the sizes used by the page, metrics and quotas; '
           'uploads and deletions update it immediately', parse_duration, default='1h'),
    Option('--stats DURATION', 'with -v, log a summary at this interval; SIGUSR1 logs one at once; 0 to '
           'disable', parse_duration, default='1m'),
    'jobs',
    Job('--report', 'print the state of each repository in DIR, problems first (with -q only problems; with '
        '--log-format json as JSON); exit status 1 if there are any, 3 if all of them are that something '
        'cannot be read. Can run beside a server and needs no password', stdio=False),
    Job('--scrub', 'verify the SHA-256 of all objects in DIR and list damaged and foreign files; exit status '
        '1 if anything is damaged, else 3 if something cannot be read. Can run beside a server and needs no '
        'password'),
    Job('--scrub-age DURATION', 'skip objects verified within this time, such as 30d', parse_period,
        default='0', shown='0, skip nothing', requires='--scrub'),
    Job('--roll-back TIME', 'reset the repository at DIR, or all repositories below it, to TIME: restore '
        'what was deleted since and set aside what was added (see --keep-deleted for TIME). Can run beside a '
        'server and needs no password', parse_past, stdio=False),
    Job('--dry-run', 'with --roll-back, only print what would be done', requires='--roll-back'),
    Job('--force', 'with --roll-back, ignore locks younger than 30 minutes, and skip repositories that '
        'cannot be rolled back', requires='--roll-back'),
    Job('--test-event', 'run the command of --on-event once, with the event "test"; show its output and exit '
        'with its status', requires='--on-event', stdio=False),
    Job('--add-user NAME', 'add a user to the --htpasswd file or change the password, which is prompted for '
        'or read from standard input', parse_user, requires='--htpasswd'),
    Job('--remove-user NAME', 'remove a user from the --htpasswd file', parse_user, requires='--htpasswd'),
    Job('--show-rights USER', 'print the access rules in effect, or describe the rights of USER',
        lambda text: parse_who('*' if '/' in text else text), const='*', stdio=False),     # before DIR
    Option('--bcrypt-cost NUMBER', 'cost of new bcrypt passwords, 4 to 31', parse_cost,
           shown='10, or 5 where bcrypt runs in Python'),
    *_IGNORED)
OPTIONS = [entry for entry in HELP if isinstance(entry, Option)]
# What to use instead of options of rest-server and rclone, and of variables of rest-server's container.
_HINTS = {
    '--config': 'there is no configuration file, and only local directories are served',
    '--listen': 'use --addr', '--path': 'use DIR as the last word', '--tls': 'use --cert and --key',
    '--tls-cert': 'use --cert', '--tls-key': 'use --key', '--tls-min-ver': 'use --min-tls-version',
    '--htpasswd-file': 'use --htpasswd', '--group-accessible-repos': 'use --group-accessible',
    '--log': 'use --log-file and -v', '--debug': 'use -vv', '--proxy-auth-username': 'use --user-from-header',
    'DISABLE_AUTHENTICATION': 'use RESTIC_SERVE_NO_AUTH=true', 'PASSWORD_FILE': 'use RESTIC_SERVE_HTPASSWD',
    'OPTIONS': 'use RESTIC_SERVE_… for each'}
# Pairs that cannot be combined, and why if that is not plain.
_CONFLICTS = (
    ('--report', '--scrub', ''), ('--report', '--roll-back', ''), ('--scrub', '--roll-back', ''),
    *((job, '--test-event', '') for job in ('--report', '--scrub', '--roll-back')),
    ('--roll-back', '--read-only', ''), ('--stdio', '--scrub', ''),
    ('--socket-auth', '--user-from-header', ': over a unix socket, the proxy names the user'))
_SOURCES = ('--htpasswd', '--user', '--user-from-header')       # of users


class Parser(argparse.ArgumentParser):
    """The command line, in the groups of --help; what it leaves out may come from the `environment`."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        super().__init__(
            prog='restic_serve', usage='restic_serve.py [options] DIR', allow_abbrev=False,
            add_help=False, argument_default=argparse.SUPPRESS,
            formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=30, width=100),
            description='Serve the directory DIR as a storage backend for restic, over HTTP, HTTPS, a unix '
                        'socket or ssh.',
            epilog='All options except --stdio and jobs can also be set in the environment: --append-only as '
                   'RESTIC_SERVE_APPEND_ONLY=true, --addr as RESTIC_SERVE_ADDR with spaces between '
                   'addresses. With --stdio the environment is ignored. Sizes are written as 100B, 512k, '
                   '10M or 1.5G, durations as 300ms, 10s, 1h0m0s or 2d.')
        self.environment = environment
        self.add_argument('arguments', nargs='*', default=None, help=argparse.SUPPRESS)
        for letter, name in (('-q', 'quiet'), ('-P', 'progress')):
            self.add_argument(letter, dest=name, action='append_const', const='true', help=argparse.SUPPRESS)
        group: Any = self
        for entry in HELP:
            if isinstance(entry, Option):
                group.add_argument(entry.name, action='append', nargs='?' if entry.const else None,
                                   const=entry.const, metavar=entry.metavar, help=entry.help)
                continue
            group = self.add_argument_group(entry)
            if entry == 'logging':
                group.add_argument('-v', '--verbose', action='count', default=0, help='log each request, in '
                                   'the Combined Log Format; -vv also logs debugging information')
        group.add_argument('--version', '-V', action='version', version=f'restic_serve {__version__}')
        group.add_argument('-h', '--help', action='help', help='show this help and exit')

    def parse(self, args: List[str]) -> argparse.Namespace:
        """The options that `args` and the environment set; those of OPTIONS that differ from their defaults
        are `given`, too, by name.  Exits after an error, --help and --version."""
        flags = {option.name for option in OPTIONS if not option.metavar}
        end = args.index('--') if '--' in args else len(args)
        # A bool takes a value only after '=', or it would swallow DIR.
        options = self.parse_intermixed_args([f'{word}=true' if word in flags else word
                                              for word in args[:end]])
        options.arguments += args[end + 1:]
        if 'stdio' in options:
            # ssh clients may set variables (sshd_config(5)), and a forced command must mean what it says.
            self.environment = {}
        level = self.environment.get('RESTIC_SERVE_VERBOSE') or '0'
        if not re.fullmatch('[0-9]|true|false', level):
            self.error(f'RESTIC_SERVE_VERBOSE: invalid level {level!r}; use 1 for -v, 2 for -vv')
        options.verbose += int({'true': '1', 'false': '0'}.get(level, level))
        options.given = {}
        for option in OPTIONS:
            name, words = option.name, getattr(options, option.dest, [])
            text = self.environment.get(option.variable)
            if text == '' and not option.metavar:
                self.error(f'{option.variable}: is empty; use true or false')
            if text and not words:
                name, words = option.variable, option.split(text)
            try:
                value = option.read(words) if words else option.default
            except ValueError as error:
                self.error(f'{name}: {error}')
            setattr(options, option.dest, value)
            if value != option.default:
                options.given[option.name] = option
        return options

    def error(self, message: str) -> NoReturn:
        """One line on stderr, and exit status 2; what may be meant by an unknown option."""
        if unknown := re.match('unrecognized arguments: (--?[a-z][a-z0-9-]*)', message):
            import difflib
            close = difflib.get_close_matches(unknown[1], [option.name for option in OPTIONS], 1)
            hint = _HINTS.get(unknown[1]) or (f'did you mean {close[0]}?' if close else '')
            message = f'{unknown[1]}: unknown option{hint and "; "}{hint}'
        self.exit(2, f"restic_serve: {one_line(re.sub('^argument ', '', message))}\n")


def find_directory(parser: Parser, options: argparse.Namespace) -> Tuple[str, str]:
    """DIR among the positional arguments, perhaps after rclone's `serve restic`; and TIME of DIR/.at/TIME,
    with which --stdio serves repositories as they were.  Refuses a DIR that is meant for other programs."""
    words = options.arguments[2 if options.arguments[:2] == ['serve', 'restic'] else 0:]
    if not words or not words[0]:
        parser.error('DIR is missing; use restic_serve.py /srv/backup')
    if len(words) > 1:
        parser.error(f'unexpected argument {words[1]!r}; ' + (
            'boolean options are written --append-only=false' if words[0].lower() in ('true', 'false') else
            'one DIR is served; quote a name with spaces'))
    directory, at = re.sub('^:local:(?=.)', '', words[0]), ''   # as rclone has it
    past = re.fullmatch(rf'(?s)(?:(.*)/)?{re.escape(AT)}/(.+?)/*', directory)
    if past:
        if not options.stdio:
            parser.error(f'{directory}: DIR/{AT}/TIME requires --stdio; over HTTP, put TIME in the URL: '
                         f'rest:http://HOST/PATH/{AT}/TIME/')
        try:  # once for the whole session
            seconds, fraction = divmod(parse_past(past[2]), 10 ** 6)
            at = f'{moment_for_people(seconds * 10 ** 6)[:-1]}.{fraction:06}Z'
        except ValueError as error:
            parser.error(f'{directory}: {error}')
        directory = past[1] or ('/' if directory.startswith('/') else '.')
    if re.match(r'([\w.+@-]{2,} *|):', directory) and not os.path.isdir(directory):
        parser.error(f'DIR: {directory!r} is an rclone remote; only local directories can be served. Use '
                     f'./{directory} for a directory of that name')
    if directory in ('help', 'version') and not os.path.isdir(directory):
        parser.error(f'DIR: use --{directory}, or ./{directory} for a directory of that name')
    passwords = os.path.join(directory, '.htpasswd')
    settled = (*_SOURCES, '--client-ca', '--no-auth', '--stdio', '--scrub', '--report', '--roll-back',
               '--test-event')
    if os.path.exists(passwords) and not set(settled).intersection(options.given):
        parser.error(f'{passwords} exists (used by rest-server); add --htpasswd {passwords}, or '
                     '--no-auth to allow access without a password')
    return directory, at


def rights_of(options: argparse.Namespace, ignore_case: bool = False) -> Rights:
    """The table for which --append-only and the like stand."""
    return short_rights(options.append_only, options.private_repos,
                        [user.lower() if ignore_case else user for user in options.admin],
                        bool(options.prometheus), options.max_size_per_user)


def check_options(parser: Parser, options: argparse.Namespace) -> None:
    """Refuse combinations that make no sense, with one line and exit status 2."""
    given = options.given
    for first, second, reason in _CONFLICTS:
        if first in given and second in given:
            parser.error(f'{first} cannot be combined with {second}{reason}')
    for name, option in given.items():
        if options.stdio and not option.stdio:
            parser.error(f'{name} cannot be combined with --stdio, which has no users, certificates, status '
                         'page or metrics')
        if option.requires and option.requires not in given and not options.stdio:
            parser.error(f'{name} requires {option.requires}')
    if options.stdio:
        if os.name == 'nt':
            parser.error('--stdio is not supported on this system; use --addr')
        if sys.stdin is None or sys.stdout is None:
            parser.error('--stdio: standard input or output is closed')
        if options.log_file == '-':
            parser.error('--log-file: standard output belongs to --stdio; name a file')
        if os.isatty(0) or os.isatty(1):
            parser.error("--stdio: must be started by restic; use restic -o "
                         "rclone.program='ssh HOST restic_serve.py' -r rclone:DIR snapshots")
        return
    sources = [name for name in _SOURCES if name in given]
    if len(sources) > 1:
        parser.error(f'{" and ".join(sources)} cannot be combined: use one source of users')
    if options.no_auth and (sources or options.client_ca):
        parser.error('--no-auth cannot be combined with options that define users')
    if options.socket_auth and not sources:
        parser.error('--socket-auth requires --htpasswd or --user')
    for name in ('--append-only', '--private-repos', '--admin', '--max-size-per-user'):
        if name in given and options.rights:
            table = rights_of(options).text().replace('\n', '; ')
            parser.error(f'{name} cannot be combined with --rights; put this into {options.rights} instead: '
                         f'{table}')
    # Over a unix socket the user is the login name, and inherited sockets may be unix.
    have_names = (sources or options.client_ca or os.environ.get('LISTEN_FDS')
                  or all(address.path for address in options.addr))
    for name in ('--private-repos', '--admin'):
        if name in given and not have_names:
            parser.error(f'{name}: no users are defined; add --htpasswd, --user, --client-ca or '
                         '--user-from-header')
    if options.workers > 1 and not hasattr(os, 'fork'):
        parser.error('--workers: must be 1, because this system has no fork')
    if options.on_event and os.name == 'nt':    # whose shell takes variables for commands
        parser.error('--on-event is not supported on Windows')
    if not options.cert and any(address.scheme == 'tls' for address in options.addr):
        parser.error('--addr: tls:// requires --cert and --key')


# ==== Main =======================================================================================
# Serving, and the other jobs.

JOB_UNREADABLE = 3           # Exit status of a job that could not look at everything, and found no fault.


def announce(server: Server, root: str, options: argparse.Namespace) -> None:
    """Log the addresses of the server and what is in force, and warn of what may not be meant."""
    users = server.api.accounts.users()
    has_password = options.htpasswd or options.user
    folder = f'{users[0] if users else "USER"}/' if options.private_repos else ''
    certified = server.certificates.warn() if server.certificates else ''
    for listener in server.listeners:
        where = listener.server_address
        if isinstance(where, tuple):
            host, port = where[:2]
            is_open = not (has_password or options.user_from_header or (options.client_ca and listener.tls))
            if is_open and not is_loopback(host) and not options.no_auth:
                log.warning('no authentication: anyone who can connect to port %d can read, add and '
                            'delete the backups in %s', port, root)
            if options.user_from_header and is_loopback(host):
                log.warning('any program on this host can claim any user name with header %s at %s; let '
                            'the proxy connect to a unix socket (--addr unix:///PATH)',
                            options.user_from_header, host)
            name = socket.gethostname() if host in ('::', '0.0.0.0') else host
            name = f'[{name.replace("%", "%25")}]' if ':' in name else name    # RFC 6874 2
            url = f'{"https" if listener.tls else "http"}://{name}:{port}{options.baseurl}/'
        else:
            url = f'http+unix://{where}:{options.baseurl}/'
            if has_password and not options.socket_auth:
                log.warning('no password is required on unix socket %s: anyone who may connect to it is '
                            'let in, and a proxy lets in all its clients; use --socket-auth to require one',
                            where)
        log.log(NOTICE, 'serving %s on %s%s', root, url,
                f' (socket {listener.name})' if listener.name else '')
        if certified and listener.tls:
            url = f'https://{certified}:{port}{options.baseurl}/'
        log.log(NOTICE, 'try: restic -r rest:%s init', url + folder)
    log.log(NOTICE, 'settings: %s', in_force(server.api, options))
    if users == []:
        log.warning('%s contains no users, so nobody can log in (--add-user)', options.htpasswd)
    fold: Callable[[str], str] = str.lower if server.api.store.ignores_case else str
    for name in options.admin:
        if users and fold(name) not in map(fold, users):
            log.warning('--admin: unknown user %s', name)


def in_force(api: Api, options: argparse.Namespace) -> str:
    """What clients may do and how much, in a line."""
    rules, users = len(api.policy.rights.rules), len(api.accounts.users() or ())
    administrators = f' except for {", ".join(options.admin)}' if options.admin else ''
    access = ('read-only' if api.store.directory.read_only
              else f'{format_count(rules, "rule")} from {options.rights}' if options.rights
              else f'append-only{administrators}' if options.append_only else 'deletes allowed')
    login = (f'{format_count(users, "user")} from {options.htpasswd}' if options.htpasswd
             else f'user: {options.user}' if options.user
             else f'users from header {options.user_from_header}' if options.user_from_header
             else 'users from client certificates' if options.client_ca else 'no authentication')
    more = ((options.private_repos, 'private repositories'),
            (options.max_size, f'quota {format_size(options.max_size)}'),
            (options.max_size_per_user, f'quota {format_size(options.max_size_per_user)} per user'),
            (options.keep_deleted, f'deleted objects kept for {format_duration(options.keep_deleted)}'))
    return '; '.join([access, login, *(text for is_set, text in more if is_set)])


def make_policy(options: argparse.Namespace, ignore_case: bool = False, login: bool = True) -> Policy:
    """The policy that the options describe; with a `login` clients without a name have no rights by a file.
    Raises OSError and RightsFault with a message for the user."""
    rights = None if options.rights else rights_of(options, ignore_case)
    return Policy(rights, options.rights or '', not login, ignore_case)


def make_bandwidth(options: argparse.Namespace, counters: Counters) -> Optional[Bandwidth]:
    """The limit of --bwlimit, None if there is none at any time."""
    limited = any(slot.sent or slot.received for slot in options.bwlimit)
    return Bandwidth(options.bwlimit, counters) if limited else None


def make_server(options: argparse.Namespace, store: Store, at: str) -> Server:
    """The server that the options describe; with `at` for repositories as they were then.  One of --stdio has
    no listeners and ignores the environment.  Raises OSError and RightsFault with a message for the user."""
    environment: MutableMapping[str, str] = {} if options.stdio else os.environ
    certificates = None
    if options.cert:
        try:
            certificates = Certificates(options.cert, options.key, options.client_ca,
                                        options.min_tls_version or '')
        except ImportError as error:
            raise OSError(f'--cert: this Python has no TLS support: {error}') from None
    counters = Counters(1 if options.stdio else options.workers + 1)
    if options.htpasswd and not os.path.lexists(options.htpasswd):
        raise OSError(f'--htpasswd: {options.htpasswd} does not exist; --add-user NAME creates it')
    accounts = Accounts(
        PasswordFile(options.htpasswd) if options.htpasswd else None, options.user or '',
        getattr(options, 'pass'), options.salt, options.realm, options.user_from_header or '',
        options.trust_proxy, bool(options.client_ca), options.socket_auth, counters)
    policy = make_policy(options, store.ignores_case, accounts.demanded)
    usage = Usage(store, counters, options.usage_interval, policy.rights.quotas(options.max_size),
                  Past(store, options.keep_deleted), may_change=bool(options.rights))

    def on_change(rights: Rights) -> None:
        usage.limits = rights.quotas(options.max_size)

    policy.on_change = on_change
    watch = Watch(store, usage, options.stale_after)
    metrics = Metrics(counters, watch)
    if certificates:
        watch.certificate_end = functools.partial(getattr, certificates, 'end')
    api = Api(store, policy, accounts, options.baseurl, options.response_header, options.allow_origin or '',
              usage, metrics,
              'open' if options.prometheus_no_auth else 'login' if options.prometheus else '',
              Page(watch) if options.status else None, at, Events(watch, counters, options.on_event),
              Admission(metrics, accounts, options.max_connections,
                        options.max_connections_per_address))
    limits = Limits(options.max_header_bytes + HEADER_SLACK, read_seconds=options.server_read_timeout,
                    write_seconds=options.server_write_timeout, stall_seconds=options.stall_timeout)
    if options.stdio:   # restic ends the connection when it wants
        limits.header_seconds = limits.idle_seconds = math.inf
    inherited = inherited_sockets(environment)
    if options.exit_idle and not inherited:
        raise OSError('--exit-idle: no socket came from the service manager; use a socket unit')
    server = Server(
        api, limits, [] if options.stdio else options.addr, certificates, inherited,
        make_bandwidth(options, counters), SystemdNotifier(environment),
        options.stats if options.stats and log.isEnabledFor(logging.INFO) else math.inf)
    server.idle_exit = IdleExit(counters, options.exit_idle or math.inf)
    return server


def serve_stdio(server: Server) -> None:
    """Serve standard input and output until they end."""
    # sshd says where the client is (ssh(1), ENVIRONMENT).
    server.begin(PipeTransport(), Peer(os.environ.get('SSH_CONNECTION', '').partition(' ')[0] or 'stdio'))
    server.run()


def complain(text: object) -> None:
    print(f'restic_serve: {one_line(text)}', file=sys.stderr)


def scrub(options: argparse.Namespace, store: Store) -> int:
    """Do --scrub; the exit status.  Raises OSError and DirectoryGone."""
    bandwidth = make_bandwidth(options, Counters())
    if _TOGGLE_SIGNAL != _NO_SIGNAL and bandwidth:
        signal.signal(_TOGGLE_SIGNAL, lambda signum, frame: bandwidth.toggle() and None)
    with open(os.devnull, 'w') as nothing:
        job = Scrub(store, options.scrub_age, bandwidth,
                    lambda path, reason: print(f'{one_line(path)}: {reason}', flush=True),
                    nothing if options.quiet else sys.stderr)
        for stop in {*_STOP_SIGNALS, _RELOAD_SIGNAL}.intersection(_SIGNALS):
            signal.signal(stop, lambda signum, frame: sys.exit(1 if job.damaged else JOB_UNREADABLE))
        job.run()
    damaged = job.damaged + sum(result.damaged for result in job.results.values())
    return exit_status(store, job.results, damaged, job.unreadable)


def exit_status(store: Store, repositories: Sized, faults: object, unreadable: object) -> int:
    """The exit status of a job that has looked at some repositories."""
    if not (repositories or unreadable):
        complain(f'no repository in {store.root}')
        return 1
    return 1 if faults else JOB_UNREADABLE if unreadable else 0


def report(options: argparse.Namespace, store: Store) -> int:
    """Do --report, troubles first; the exit status.  Raises OSError, DirectoryGone and RightsFault."""
    quotas = make_policy(options, store.ignores_case, login=False).rights.quotas(options.max_size)
    usage = Usage(store, Counters(), quotas=quotas, past=Past(store, options.keep_deleted))
    usage.census.count()
    watch = Watch(store, usage, options.stale_after)
    if options.cert:
        watch.certificate_end = functools.partial(certificate_end, options.cert)
    repositories, certificate = watch.look(time.time()), watch.certificate(time.time())
    if certificate:
        complain(f'{certificate}; next: {next_step("certificate")}')
    for path in usage.census.unreadable:
        complain(f'cannot read {path[1:] or "/"}')
    troubled = [repository for repository in repositories if repository.troubles]
    shown = troubled if options.quiet else repositories     # so that cron has nothing to mail
    for line in map(_report_as_json, shown) if options.log_format == 'json' else _report_lines(shown):
        print(line)
    troubles = {trouble for repository in troubled for trouble in repository.troubles}
    return exit_status(store, repositories, troubles - {UNREADABLE, LOST} or certificate,
                       troubled or usage.census.unreadable)


def _report_row(repository: Watched) -> List[str]:
    """What the report says of a repository: its verdict, its name, and facts, which may be empty."""
    holdings, locks, scrub = repository.holdings, repository.locks, repository.scrub
    return list(map(one_line, [
        ', '.join(repository.troubles).upper() or repository.verdict, repository.title,
        repository.last_snapshot(),
        format_count(holdings.objects['snapshots'], 'snapshot'), format_size(holdings.bytes),
        ', '.join([format_count(len(locks), 'lock'), repository.age_of_locks(),
                   *([repository.text_of(LOCKED)] if repository.odd_lock else [])]) if locks else '',
        f'scrubbed {repository.ago(scrub.time)}, {scrub.damaged} damaged' if scrub.time
        else 'never scrubbed']))


def _report_lines(repositories: List[Watched]) -> Iterator[str]:
    """A line for each repository; on a terminal columns, red troubles (https://no-color.org), and steps."""
    rows = list(map(_report_row, repositories))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for repository, (verdict, title, *facts) in zip(repositories, rows):
        steps = [f'next: {next_step(trouble, repository.name)}' for trouble in repository.troubles]
        if sys.stdout.isatty():
            cells = list(map(str.ljust, (verdict, title, *facts), widths))
            if steps and not os.environ.get('NO_COLOR'):
                cells[0] = f'\033[1;31m{cells[0]}\033[0m'
            yield '\n    '.join(['  '.join(cells).rstrip(), *steps])
        else:
            yield '; '.join([f'{verdict}: {title}: {", ".join(filter(None, facts))}', *steps])


def _report_as_json(repository: Watched) -> str:
    import json
    holdings, locks, scrub = repository.holdings, repository.locks, repository.scrub
    return json.dumps({
        'repository': repository.title, 'verdict': repository.verdict, 'troubles': list(repository.troubles),
        'bytes': holdings.bytes, 'objects': holdings.objects, 'last_snapshot': holdings.last_snapshot or None,
        'locks': len(locks or ()), 'oldest_lock': int(locks[0]) if locks else None,
        'odd_lock': repository.odd_lock or None,
        'scrub': {'time': int(scrub.time), 'damaged': scrub.damaged, 'names': scrub.names}
                 if scrub.time else None})


def test_event(options: argparse.Namespace, store: Store) -> int:
    """Do --test-event: run the command of --on-event, and show what it says; its exit status."""
    status, failure = run_command(options.on_event, Event('test', None, '', 'a test of --on-event', None),
                                  store.root, threading.Event(), functools.partial(os.write, 1))
    print(f'--on-event: {failure or "status 0"}')
    return status


def roll_back(options: argparse.Namespace, store: Store) -> int:
    """Do --roll-back, of all or, where one cannot be, of none; the exit status.  Raises OSError."""
    past = Past(store, math.inf)
    jobs: Dict[str, RollBack] = {}      # by path
    refused: List[str] = []             # paths
    top = os.path.basename(store.root)

    def refuse(path: str, reason: object) -> None:
        refused.append(path)
        complain(f'{path[1:] or top}: {reason}')

    for folder in store.walk(refuse):
        if folder.is_repository:
            job = RollBack(store, past, folder.path, options.roll_back)
            try:
                job.check(options.force)
                jobs[folder.path] = job
            except ValueError as error:
                refuse(folder.path, error)

    def state() -> str:
        return one_line(f'{path[1:] or top}: {job}')

    for path, job in jobs.items() if options.force or not refused else ():
        try:
            job.show = lambda: show_line(sys.stderr, state())
            with job:
                job.run(options.dry_run, options.force)
            show_line(sys.stderr, '')
            print(state(), flush=True)
        except ValueError as error:
            refuse(path, f'{job}, then stopped: {error}')
        for name in job.lost:
            refuse(path, f'cannot be restored, not a regular file: {name}')
    return exit_status(store, jobs or refused, refused, 0)


def change_users(parser: Parser, options: argparse.Namespace) -> int:
    """Do --add-user or --remove-user; the exit status.  Raises OSError with a message for the user."""
    if options.arguments:
        parser.error(f'{options.arguments[0]!r}: --add-user and --remove-user take --htpasswd FILE and no '
                     'DIR')
    user = options.add_user or options.remove_user
    entry = new_entry(read_password(user), options.bcrypt_cost) if options.add_user else ''
    known = change_password_file(options.htpasswd, user, entry)
    if not known and not entry:
        raise OSError(f'{options.htpasswd} has no user {user!r}')
    print('removed' if not entry else 'changed the password of' if known else 'added', user)
    return 0


def read_password(user: str) -> bytes:
    """A new password, asked for twice on a terminal, or a line of standard input.  Raises OSError."""
    if sys.stdin.isatty():
        import getpass
        try:
            text = getpass.getpass(f'New password for {user}: ')
            if text != getpass.getpass('Repeat password: '):
                raise OSError('the passwords do not match')
        except EOFError:
            raise OSError('no password was typed; nothing is changed') from None
    else:
        text = sys.stdin.readline().rstrip('\r\n')
    password = text.encode('utf-8', 'surrogateescape')
    if not password or b'\0' in password or len(password) > 72:
        raise OSError('passwords must be 1 to 72 bytes without NUL (bcrypt limit)')
    return password


def show_rights(options: argparse.Namespace) -> int:
    """Do --show-rights; the exit status.  Raises OSError and RightsFault."""
    rights, user = make_policy(options).rights, options.show_rights
    print(rights.text() if user == '*' else '\n'.join(rights.words(user, options.max_size)))
    return 0


def warn_of_options(parser: Parser, options: argparse.Namespace) -> None:
    """Log what is ignored, and what may not be meant."""
    if ignored := [option.name for option in _IGNORED if option.name in options.given]:
        log.log(NOTICE, 'ignored, has no effect on a local directory: %s', ' '.join(ignored))
    known = {'RESTIC_SERVE_VERBOSE', *(option.variable for option in OPTIONS)}
    hints = {**_HINTS, **{name.replace('RESTIC_SERVE_', 'RCLONE_'): f'use {name}' for name in known}}
    for name in sorted(parser.environment):
        if name in hints or (name not in known and re.match('RESTIC_SERVE_(?!TEST_)', name)):
            hint = hints.get(name, '')
            log.warning('unknown environment variable %s%s', name, hint and f'; {hint}')
    if options.allow_origin == '*':
        log.warning('--allow-origin: * lets scripts of any web site use the server')


def exit_at_signals() -> List[int]:
    """Exit at a signal to stop; the statuses, since SystemExit is lost in weakref callbacks (imports)."""
    statuses: List[int] = []

    def stop(signum: int, frame: object) -> None:
        statuses.append(130 if signum == signal.SIGINT else 0)
        sys.exit(statuses[0])

    for signum in _STOP_SIGNALS:
        signal.signal(signum, stop)
    return statuses


def main() -> int:
    """Run the program's command line; the exit status."""
    stopped = exit_at_signals()
    args = sys.argv[1:]
    if sys.implementation.name == 'pypy':   # takes them for UTF-8, even where it takes file names for ASCII
        args = [os.fsdecode(word.encode('utf-8', 'surrogateescape')) for word in args]
    # A command of --on-event inherits variables that are not meant for it.
    parser = Parser({} if 'RESTIC_SERVE_EVENT' in os.environ else os.environ)
    options = parser.parse(args)
    check_options(parser, options)
    try:
        if options.add_user or options.remove_user:
            return change_users(parser, options)
        if options.show_rights:
            return show_rights(options)
        directory, at = find_directory(parser, options)
        level = 'ERROR' if options.quiet else ('NOTICE', 'INFO', 'DEBUG')[min(options.verbose, 2)]
        start_log(options.log_level or level, options.log_file, options.log_format == 'json')
        warn_of_options(parser, options)
        store = Store(directory, verify=not options.no_verify_upload,
                      shared=options.group_accessible, read_only=options.read_only)
        job = (scrub if options.scrub else report if options.report else test_event if options.test_event
               else roll_back if options.roll_back is not None else None)
        if job:
            store.find()
            return job(options, store)
        block_signals(_SIGNALS)  # until the loop catches them
        if stopped:
            return stopped[0]
        run_in_batches()
        if not options.stdio:
            import_modules()
        with contextlib.suppress(ValueError, RuntimeError):     # where stacks have a size of their own
            threading.stack_size(STACK_BYTES)
        must_exist = options.must_exist or bool(at)
        is_late = options.stdio and not must_exist and store.directory.is_missing()     # init makes it
        is_new = not is_late and store.prepare(must_exist)
        try:
            server = make_server(options, store, at)
        except (OSError, RightsFault):
            if is_new:
                store.remove_empty()
            raise
        if at:
            server.api.usage.past.view('', at)
        if options.stdio:
            serve_stdio(server)
            return 0
    except (ImportError, OSError, RightsFault, StorageError) as error:
        reason = (f'this Python lacks {error.name}; install python3' if isinstance(error, ImportError)
                  else f'{error.filename}: {error.strerror}' if isinstance(error, OSError) and error.filename
                  else str(error))
        for line in reason.split('\n'):
            complain(line)
        return 1
    announce(server, store.root, options)
    trim_memory()
    # The first process of a container inherits orphans, which the parent of workers collects.
    (Workers(server, options.workers) if options.workers > 1 or os.getpid() == 1 else server).run()
    return 0


def run() -> NoReturn:
    """Entry point, also for zipapp, which ignores the result of main()."""
    sys.exit(main())


if __name__ == '__main__':
    if sys.implementation.name != 'cpython':
        run()
    # A running script's syntax tree stays in memory, 16 MiB.  An exception ends that; its hook goes on.
    sys.excepthook = lambda *error: run()
    raise RuntimeError
