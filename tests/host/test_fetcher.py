"""The fetcher process against blobs over HTTP that behave well and badly, and its client."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ramet import sockets
from ramet.errors import AbsentError, LayerError, RametError
from ramet.paths import StoreDir
from ramet.store import remote, tracing
from ramet.store.fetching import Fetcher, Notice, fetch_now
from ramet.store.layer import Layer
from ramet.store.remote import Want
from ramet.store.store import Store
from ramet.store.wanting import frame

from .fakeblobs import DEADLINE, FakeBlobs, Fetching, fetching, frames, layer, lend, same, serving, store


@dataclass
class Bed:
    """Two hosts: one that has a layer of 100 chunks and gives it away, and one that has only its tables."""

    there: StoreDir
    here: StoreDir
    record: Layer
    server: FakeBlobs
    stack: ExitStack

    @property
    def digest(self) -> str:
        return self.record.blobs[0]

    def frames(self) -> list[Want]:
        return frames(self.here, self.record)

    def run(self, **environment: str) -> Fetching:
        """Start the fetcher."""
        return self.stack.enter_context(fetching(self.here, **{"RAMET_FETCH_RATE": "0", **environment}))

    def have(self, wants: list[Want], **more: Any) -> None:
        fetch_now(self.here, self.record.id, wants, **{"deadline": DEADLINE, **more})


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[Bed]:
    with ExitStack() as stack:
        one, other = store(tmp_path / "there"), store(tmp_path / "here")
        record = layer(one, 100)
        server = stack.enter_context(serving(one.files))
        lend(one.files, other.files, [record], server.source())
        yield Bed(one.files, other.files, record, server, stack)


@contextmanager
def beside(work: Callable[[], None]) -> Iterator[list[BaseException | None]]:
    """Do something in a thread that has ended when the body has; what it raised."""
    found: list[BaseException | None] = []

    def run() -> None:
        try:
            work()
            found.append(None)
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield found
    finally:
        thread.join(DEADLINE)
        assert not thread.is_alive()


def until(what: Callable[[], Any]) -> None:
    end = time.monotonic() + DEADLINE
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_only_what_is_wanted_is_fetched_and_neighbours_together(bed: Bed) -> None:
    bed.run()
    wants = bed.frames()
    chosen = [wants[3], wants[4], wants[5], wants[60]]
    bed.have(chosen)
    assert same(bed.there, bed.here, chosen)
    assert len(bed.server.asked) == 2
    assert bed.server.sent == sum(want.length for want in chosen)
    assert not same(bed.there, bed.here, [wants[7]])


def test_what_is_here_is_not_fetched(bed: Bed) -> None:
    bed.run()
    wants = bed.frames()
    bed.have(wants[:5])
    sent = bed.server.sent
    bed.have(wants[:5])
    bed.have(wants[2:6])
    assert bed.server.sent == sent + wants[5].length


def test_ten_who_want_the_same_are_served_by_one_request(bed: Bed) -> None:
    bed.run()
    wants = bed.frames()[:10]
    bed.server.held.add(bed.digest)
    with ExitStack() as stack:
        done = [stack.enter_context(beside(lambda: bed.have(wants))) for _ in range(10)]
        until(lambda: bed.server.asked)
        bed.server.open.set()
    assert done == [[None]] * 10
    assert bed.server.sent == sum(want.length for want in wants)
    assert same(bed.there, bed.here, wants)


def test_damage_in_the_file_is_healed(bed: Bed) -> None:
    bed.run()
    wants = bed.frames()[:4]
    bed.have(wants)
    with open(bed.here.blob(bed.digest), "r+b") as file:
        file.seek(wants[2].offset + 100)
        file.write(b"\0" * 10)
    bed.have(wants)
    assert same(bed.there, bed.here, wants)
    assert bed.server.asked[-1][1:] == (wants[2].offset, wants[2].offset + wants[2].length)


async def test_a_whole_blob_is_brought_verified_and_known_to_be_whole(bed: Bed) -> None:
    running = bed.run()
    told: list[tuple[int, int]] = []
    async with Fetcher.connect(bed.here, running.start) as line:
        await line.bring([bed.record.id], lambda done, total: told.append((done, total)))
        assert bed.here.blob(bed.digest).read_bytes() == bed.there.blob(bed.digest).read_bytes()
        found = remote.load(bed.here, bed.digest)
        assert found
        assert found.whole
        sent = bed.server.sent
        await line.bring([bed.record.id])
        assert bed.server.sent == sent == found.size
        status = await line.status()
    assert (status.fetched, status.foreground, status.waiting) == (sent, 0, ())
    assert told == sorted(told)
    assert told[0][1] == found.size


async def test_killed_in_the_middle_it_fetches_only_the_rest(bed: Bed) -> None:
    running = bed.run()
    wants = bed.frames()
    size = bed.there.blob(bed.digest).stat().st_size
    edges = size - sum(want.length for want in wants) + 4096
    bed.have(wants[:70])
    before = bed.server.sent
    bed.server.held.add(bed.digest)
    async with Fetcher.connect(bed.here, running.start) as line:
        bringing = asyncio.ensure_future(line.bring([bed.record.id]))
        await asyncio.to_thread(until, lambda: len(bed.server.asked) > 1)
        running.kill()
        bed.server.open.set()
        running.start()  # as the keeper does
        await asyncio.wait_for(bringing, DEADLINE)
    assert bed.here.blob(bed.digest).read_bytes() == bed.there.blob(bed.digest).read_bytes()
    # what was cut off is asked for twice, of what was here nothing is
    assert bed.server.sent - before <= 2 * (sum(want.length for want in wants[70:]) + edges)


def test_wrong_bytes_are_never_kept_and_named(bed: Bed) -> None:
    bed.run(RAMET_FETCH_DEADLINE="1")
    wants = bed.frames()[:3]
    bed.server.wrong.add((bed.digest, wants[1].offset + 7))
    with pytest.raises(AbsentError) as failed:
        bed.have(wants)
    assert bed.digest in failed.value.message
    assert bed.server.address in failed.value.message
    assert failed.value.details == {"blob": bed.digest, "offset": wants[1].offset}
    assert same(bed.there, bed.here, [wants[0], wants[2]])
    assert not same(bed.there, bed.here, [wants[1]])
    bed.server.wrong.clear()
    bed.have(wants)
    assert same(bed.there, bed.here, wants)


@pytest.mark.parametrize(("status", "said"), [(404, "not there"), (401, "refuses access"), (503, "503")])
def test_a_disk_is_told_why_after_its_deadline(bed: Bed, status: int, said: str) -> None:
    bed.run(RAMET_FETCH_DEADLINE="4")
    bed.server.status = status
    begun = time.monotonic()
    with pytest.raises(AbsentError, match=said):
        bed.have(bed.frames()[:1])
    assert time.monotonic() - begun >= 4
    assert bed.server.tries > 1


def test_a_registry_that_is_down_for_a_moment_is_not_noticed(bed: Bed) -> None:
    bed.run()
    bed.server.cut = 1000
    with beside(lambda: bed.have(bed.frames()[:3])) as done:
        until(lambda: len(bed.server.asked) > 2)
        bed.server.cut = -1
    assert done == [None]
    assert same(bed.there, bed.here, bed.frames()[:3])


def test_retry_after_is_honoured_until_somebody_says_retry(bed: Bed) -> None:
    running = bed.run()
    bed.server.status, bed.server.headers = 429, {"Retry-After": "50"}

    async def retry() -> None:
        async with Fetcher.connect(bed.here, running.start) as line:
            async with aclosing(line.watch()) as notices:
                await anext(notices)
            found = await line.status()
            assert "too many requests" in found.waiting[0].reason
            tries = bed.server.tries
            bed.server.status = 200
            await asyncio.sleep(1.5)  # the back-off of others would be over
            assert bed.server.tries == tries
            await line.retry()

    with beside(lambda: bed.have(bed.frames()[:1])) as done:
        asyncio.run(retry())
    assert done == [None]


async def test_a_memory_waits_for_ever_and_who_watches_hears_of_it(bed: Bed) -> None:
    running = bed.run(RAMET_FETCH_DEADLINE="0.2")
    wants = bed.frames()[:2]
    bed.server.status = 503
    with sockets.address(bed.here.fetch) as short:
        answers, guest = await asyncio.open_unix_connection(short)
    question = {"id": 7, "op": "want", "head": bed.record.id, "memory": True, "frames": [frame(each) for each in wants]}
    guest.write(json.dumps(question).encode() + b"\n")
    heard: asyncio.Queue[Notice] = asyncio.Queue()

    async def watch() -> None:
        async with Fetcher.connect(bed.here, running.start) as line:
            async for each in line.watch():
                heard.put_nowait(each)

    watching = asyncio.ensure_future(watch())
    try:
        first = await asyncio.wait_for(heard.get(), DEADLINE)
        assert (first.event, first.head, first.memory, first.blob) == ("waiting", bed.record.id, True, bed.digest)
        assert first.offset == wants[0].offset
        assert "503" in first.reason
        assert bed.server.address in first.reason
        bed.server.status = 200
        answer = json.loads(await asyncio.wait_for(answers.readline(), DEADLINE))
        assert answer == {"id": 7, "ok": True}
        while (last := await asyncio.wait_for(heard.get(), DEADLINE)).event == "waiting":
            pass
        assert (last.event, last.head) == ("served", bed.record.id)
    finally:
        watching.cancel()
        guest.close()
    assert same(bed.there, bed.here, wants)


async def test_who_leaves_is_not_fetched_for(bed: Bed) -> None:
    running = bed.run()
    wants = bed.frames()
    bed.server.status = 503
    with sockets.address(bed.here.fetch) as short:
        _, guest = await asyncio.open_unix_connection(short)
    question = {"id": 1, "op": "want", "head": bed.record.id, "memory": False, "frames": [frame(each) for each in wants[:3]]}
    guest.write(json.dumps(question).encode() + b"\n")
    await asyncio.to_thread(until, lambda: bed.server.tries)
    async with Fetcher.connect(bed.here, running.start) as line:
        assert (await line.status()).foreground == 1
        guest.transport.abort()
        async with asyncio.timeout(DEADLINE):
            while (await line.status()).foreground:
                pass
        for _ in range(100):  # a request that was on its way is refused as well, if it was sent at all
            if (await line.status()).requests == bed.server.tries:
                break
            await asyncio.sleep(0.01)
    bed.server.status = 200
    await asyncio.to_thread(bed.have, wants[50:51])
    assert [begin for _, begin, _ in bed.server.asked] == [wants[50].offset]


def test_a_guest_that_waits_when_the_fetcher_is_killed_gets_its_chunk(bed: Bed) -> None:
    running = bed.run()
    bed.server.held.add(bed.digest)
    wants = bed.frames()[:3]
    with beside(lambda: bed.have(wants)) as done:
        until(lambda: bed.server.asked)
        running.kill()
        bed.server.open.set()
        running.start()  # as the keeper does
    assert done == [None]
    assert same(bed.there, bed.here, wants)


def test_hundreds_who_want_this_and_that_are_all_served(bed: Bed) -> None:
    bed.run()
    wants = bed.frames()

    def have(seed: int) -> None:
        for each in random.Random(seed).sample(wants, 30):
            bed.have([each])

    with ExitStack() as stack:
        done = [stack.enter_context(beside(lambda seed=seed: have(seed))) for seed in range(12)]  # type: ignore[misc]
    assert done == [[None]] * 12
    asked = sorted((begin, end) for _, begin, end in bed.server.asked)
    wanted = sum(want.length for want in wants)
    # What many want comes once: 360 frames were wanted of so many. Small gaps are read over, also where they came before.
    assert bed.server.sent <= 1.5 * wanted
    assert len(asked) < 100


def test_a_guest_does_not_wait_for_a_download(bed: Bed) -> None:
    running = bed.run()
    other = layer(Store(bed.there), 20, seed=1)
    lend(bed.there, bed.here, [other], bed.server.source())
    bed.server.held.add(bed.digest)

    async def bring() -> None:
        async with Fetcher.connect(bed.here, running.start) as line:
            await line.bring([bed.record.id])

    with beside(lambda: asyncio.run(bring())) as done:
        until(lambda: bed.server.asked)
        bed.have(frames(bed.here, other)[:3])
        assert not done
        bed.server.open.set()
    assert done == [None]


async def test_what_starts_touched_is_fetched_first_and_together(bed: Bed) -> None:
    running = bed.run()
    tracing.save(bed.here, bed.record.id, [80, 81, 10, 82, 90, 200])  # 200 is zero
    wants = bed.frames()
    named = [wants[number] for number in (80, 81, 82, 90, 10)]
    async with Fetcher.connect(bed.here, running.start) as line:
        await line.trace([bed.record.id])
    await asyncio.to_thread(until, lambda: same(bed.there, bed.here, named))
    # In one request; which of several that are sent at the same time arrives first is the line's to say.
    assert (wants[80].offset, wants[83].offset) in [each[1:] for each in bed.server.asked]
    assert bed.server.sent == sum(want.length for want in named)


async def test_what_was_given_up_for_its_space_is_left_to_guests(bed: Bed) -> None:
    found = remote.load(bed.here, bed.digest)
    assert found
    remote.save(bed.here, dataclasses.replace(found, evicted=True))
    other = layer(Store(bed.there), 5, seed=1)
    lend(bed.there, bed.here, [other], bed.server.source())
    bed.run(RAMET_FETCH_RATE="")
    whole = other.blobs[0]
    await asyncio.to_thread(until, lambda: (each := remote.load(bed.here, whole)) and each.whole)
    assert {digest for digest, _, _ in bed.server.asked} == {whole}


async def test_a_bring_fails_at_once_where_trying_again_does_not_help(bed: Bed) -> None:
    running = bed.run()
    bed.server.status = 404
    async with Fetcher.connect(bed.here, running.start) as line:
        with pytest.raises(AbsentError, match="not there"):
            await asyncio.wait_for(line.bring([bed.record.id]), DEADLINE)
        with pytest.raises(LayerError):
            await line.bring(["00000000000000aa"])


async def test_a_seek_table_that_is_wrong_is_found_though_no_frame_is(bed: Bed) -> None:
    running = bed.run()
    size = bed.there.blob(bed.digest).stat().st_size
    bed.server.wrong.add((bed.digest, size - 1))
    async with Fetcher.connect(bed.here, running.start) as line:
        with pytest.raises(LayerError, match="does not match its digest") as failed:
            await line.bring([bed.record.id])
        assert bed.server.address in failed.value.message
        sent = bed.server.sent
        bed.server.wrong.clear()
        await line.bring([bed.record.id])
    assert bed.server.sent - sent < 8192
    assert bed.here.blob(bed.digest).read_bytes() == bed.there.blob(bed.digest).read_bytes()


def test_peers_come_first_and_the_registry_when_they_fail(bed: Bed) -> None:
    peer = bed.stack.enter_context(serving(bed.there))
    peer.token = "secret"
    bed.run(RAMET_PEERS=f"http://127.0.0.1:1, {peer.url}/", RAMET_PEER_TOKEN="secret")
    wants = bed.frames()
    bed.have(wants[:5])
    assert (peer.sent, bed.server.sent) == (sum(want.length for want in wants[:5]), 0)
    peer.wrong.add((bed.digest, wants[10].offset))
    bed.have(wants[10:11])
    assert bed.server.sent == wants[10].length
    assert same(bed.there, bed.here, [*wants[:5], wants[10]])
    tries = peer.tries
    bed.have(wants[20:21])
    assert peer.tries == tries  # one that lies is left out for a while


def test_a_peer_that_has_it_not_is_no_failure(bed: Bed) -> None:
    peer = bed.stack.enter_context(serving(bed.here))
    peer.status = 404
    bed.run(RAMET_PEERS=peer.url)
    bed.have(bed.frames()[:2])
    assert peer.tries == 1
    assert same(bed.there, bed.here, bed.frames()[:2])


def test_who_reads_on_and_on_finds_it_here(bed: Bed) -> None:
    bed.run()
    wants = bed.frames()
    for at in range(0, 64, 4):
        bed.have(wants[at : at + 4])
    assert len(bed.server.asked) < 30
    until(lambda: same(bed.there, bed.here, wants[64:68]))


def test_a_full_disk_is_named_and_gone_on_when_there_is_space(bed: Bed) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1536k", "tmpfs", bed.here.blobs], check=True)
    try:
        ballast = bed.here.blobs / "ballast"
        size = bed.there.blob(bed.digest).stat().st_size
        found = remote.load(bed.here, bed.digest)
        assert found
        remote.expect(bed.here, bed.digest, size, found.sources[0])
        ballast.write_bytes(bytes(1 << 20))
        bed.run(RAMET_FETCH_DEADLINE="1")
        wants = bed.frames()[:30]
        with pytest.raises(AbsentError, match="no space left on the disk of the cache"):
            bed.have(wants)
        ballast.unlink()
        bed.have(wants)
        assert same(bed.there, bed.here, wants)
    finally:
        bed.stack.close()
        subprocess.run(["umount", bed.here.blobs], check=True)


async def test_the_background_fetches_all_and_lets_guests_go_first(bed: Bed) -> None:
    running = bed.run(RAMET_FETCH_RATE="")
    async with Fetcher.connect(bed.here, running.start) as line:
        await line.background()

        def whole() -> bool:
            found = remote.load(bed.here, bed.digest)
            return bool(found and found.whole)

        await asyncio.to_thread(until, whole)
    assert bed.here.blob(bed.digest).read_bytes() == bed.there.blob(bed.digest).read_bytes()
    assert bed.server.sent == bed.there.blob(bed.digest).stat().st_size


def test_questions_that_make_no_sense_are_answered(bed: Bed) -> None:
    bed.run()
    want = bed.frames()[0]
    wrong = [
        Want(blob="sha256:../../etc/passwd", offset=0, length=10, mark=want.mark),
        Want(blob=want.blob, offset=-5, length=10, mark=want.mark),
        Want(blob=want.blob, offset=0, length=1 << 31, mark=want.mark),
        Want(blob=want.blob, offset=0, length=10, mark=b""),
    ]
    for each in wrong:
        with pytest.raises(RametError):
            bed.have([each])
    bed.have([want])
    assert len(bed.server.asked) == 1
