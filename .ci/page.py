#!/usr/bin/env python3
"""Looks at the status page in a real Chromium, and has axe-core judge it:

    .ci/page.py [--pictures DIR]

For directories of 0, 1, 13 and 300 repositories, and for the page of one repository, wide and narrow, light
and dark.  axe-core and puppeteer-core come from npm, into a temporary directory.  The exit status is 1 if
axe-core finds anything, if a page refers to anything else or is wider than its window, or if the page of 300
repositories is taller on a phone than ten of its screens.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Dict, Iterator, List

from common import MODULE, Served, free_port, make_repository, store

DAY = 86400
WIDE, NARROW = (1280, 900), (390, 844)
TALLEST = 10 * NARROW[1]        # Pixels of a page on a phone.
SCRIPT = """
const puppeteer = require('puppeteer-core'), fs = require('fs');
const axe = fs.readFileSync(require.resolve('axe-core/axe.min.js'), 'utf8');
(async () => {
  const browser = await puppeteer.launch({executablePath: process.argv[2],
    args: ['--no-sandbox', '--disable-gpu'], headless: true});
  for (const job of JSON.parse(fs.readFileSync(0, 'utf8'))) {
    const page = await browser.newPage(), said = [];
    page.on('console', message => said.push(message.text()));
    page.on('request', request => { if (request.url() != job.url) said.push('asks for ' + request.url()); });
    await page.emulateMediaFeatures([{name: 'prefers-color-scheme', value: job.scheme}]);
    await page.setViewport({width: job.width, height: job.height});
    await page.setBypassCSP(false);
    await page.goto(job.url);
    const size = await page.evaluate(() => [document.documentElement.scrollWidth,
                                            document.documentElement.scrollHeight]);
    if (job.picture) await page.screenshot({path: job.picture, fullPage: job.whole});
    await page.evaluate(() => document.querySelectorAll('details').forEach(one => { one.open = true; }));
    await page.evaluate(axe);
    const found = await page.evaluate(() => axe.run());
    console.log(JSON.stringify({name: job.name, size, said, violations: found.violations.map(
      one => one.id + ': ' + one.nodes.map(node => node.html.slice(0, 120)).slice(0, 3).join(' '))}));
    await page.close();
  }
  await browser.close();
})().catch(error => { console.error(error); process.exit(2); });
"""


def fill(path: Path, source: random.Random, age: float, snapshots: int = 20) -> None:
    """A repository whose last snapshot is `age` seconds old."""
    make_repository(path)
    store(path, 'keys', b'key' + os.urandom(20), age=age + 90 * DAY)
    for number in range(snapshots):
        at = age + number * DAY * source.choice((1, 1, 1, 2, 3))
        store(path, 'data', source.getrandbits(64).to_bytes(8, 'big') * source.randrange(10, 20_000),
              age=at + 60)
        store(path, 'snapshots', os.urandom(200), age=at)


def make_directory(root: Path, count: int) -> None:
    """A directory of `count` repositories; of 13 and more some have troubles."""
    root.mkdir()
    source = random.Random(count)
    for number in range(count):
        folder = '' if count < 100 else ('north/', 'south/', 'west/')[number % 3]
        name = f'{folder}host-{number + 1}'
        fill(root / name, source, source.randrange(600, 40 * 3600))
    if count >= 13:
        base = root if count < 100 else root / 'north'
        fill(base / 'laptop', source, 5 * DAY)
        fill(base / 'nas', source, 7200)
        damaged = next(next((base / 'nas' / 'data').iterdir()).iterdir())
        damaged.write_bytes(b'damaged')
        fill(base / 'desk', source, 3600)
        store(base / 'desk', 'locks', b'lock', age=2 * DAY)
    subprocess.run([sys.executable, MODULE, '--scrub', '-q', root], stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL, check=False)


def serve(root: Path) -> Served:
    """A server of a directory that has counted what is there."""
    port = free_port()
    server = Served([sys.executable, MODULE, '--addr', f'127.0.0.1:{port}', '--keep-deleted', '30d',
                     '--max-size', '1G', root], port)
    server.wait_for_count(30)
    return server


def jobs_of(count: int, url: str, pictures: str) -> Iterator[Dict[str, object]]:
    """What is looked at of the page of `count` repositories."""
    paths = [('', url)]
    if count == 13:
        paths += [('-nas', f'{url}nas/'), ('-sorted', f'{url}?sort=size'), ('-none', f'{url}nothing/')]
    if count == 300:
        paths += [('-search', f'{url}?q=host-1')]
    for kind, where in paths:
        for width, height in (WIDE, NARROW):
            for scheme in ('light', 'dark'):
                name = f'{count}{kind}-{width}-{scheme}'
                yield {'name': name, 'url': where, 'width': width, 'height': height, 'scheme': scheme,
                       'picture': f'{pictures}/{name}.png' if pictures else '', 'whole': True}


def judge(found: Dict[str, List[str]], width: int) -> List[str]:
    """What is wrong with a page."""
    faults = found['violations'] + found['said']
    if int(found['size'][0]) > width:
        faults.append(f'it is {found["size"][0]} pixels wide')
    if width == NARROW[0] and int(found['size'][1]) > TALLEST:
        faults.append(f'it is {found["size"][1]} pixels tall')
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
    parser.add_argument('--pictures', metavar='DIR', default='', help='write pictures of all pages there')
    options = parser.parse_args()
    browser = shutil.which('chromium') or shutil.which('google-chrome')
    if not browser or not shutil.which('npm'):
        print('skipped: the page needs chromium and npm')
        return 0
    if options.pictures:
        os.makedirs(options.pictures, exist_ok=True)
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if subprocess.run(['npm', 'install', '--silent', '--no-audit', '--no-fund', '--prefix', folder,
                           'axe-core', 'puppeteer-core'], check=False, stdin=subprocess.DEVNULL).returncode:
            print('skipped: axe-core and puppeteer-core cannot be had from npm')
            return 0
        (folder / 'look.js').write_text(SCRIPT)
        jobs, pictures = [], options.pictures and os.path.abspath(options.pictures)
        with contextlib.ExitStack() as stack:
            for count in (0, 1, 13, 300):
                root = folder / f'of-{count}'
                make_directory(root, count)
                server = stack.enter_context(serve(root))
                jobs += list(jobs_of(count, f'http://127.0.0.1:{server.port}/', pictures))
            done = subprocess.run(['node', folder / 'look.js', browser], input=json.dumps(jobs), text=True,
                                  stdout=subprocess.PIPE, timeout=600, check=True)
        for job, line in zip(jobs, done.stdout.splitlines()):
            found = json.loads(line)
            faults = judge(found, int(str(job['width'])))
            failed += bool(faults)
            width, height = found['size']
            print(f'{found["name"]:22} {width:4} x {height:5}  {"; ".join(faults) or "sound"}')
    print(f'{len(jobs)} pages, {failed} with faults')
    return int(failed > 0 or len(jobs) != len(done.stdout.splitlines()))


if __name__ == '__main__':
    sys.exit(main())
