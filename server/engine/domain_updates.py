"""Domains at run time: decoders and n-gram memories loaded, replaced and unloaded while requests run.

The front end reads and checks a package in a thread, with a deadline, as thoroughly as at start-up. The workers then load the same bytes (their
SHA-256 is compared) in pieces between steps. When every worker of every replica has them, the front end publishes the new domains in one step
of the event loop. A request gets its slot when it enters the engine and keeps it, so a slot is emptied when its last request is done.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Coroutine, Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TypeVar

from memdec.decoders.reading.errors import DecoderError
from memdec.decoders.reading.files import is_utf8, sendable
from memdec.decoders.reading.names import DOMAIN, DOMAIN_RULE
from memdec.decoders.reading.ngram_record import NAME as NGRAMS
from memdec.decoders.reading.package import Package
from memdec.decoders.reading.tokenizer import load_tokenizer
from memdec.decoders.reading.weights import fingerprint_model
from memdec.server.checked_models import Models, domain_of, open_decoder, open_ngrams, require_one_shape
from memdec.server.engine.in_thread import in_thread
from memdec.server.engine.protocols import Engine
from memdec.server.engine.settings import UpdateOptions
from memdec.server.errors import BadPackage, DomainStays, NoSlot, OutsideRoots, RequestError, ShuttingDown, StartupError
from memdec.server.routing.domains import DECODER, MEMORIES, NGRAM, NONE, Domain

PIECE = 16 << 20  # bytes of weights loaded between two engine steps
POLL = 0.05  # seconds between two looks at whether a slot is free
CLEARING = 5.0  # seconds that the engine gets to discard a failed load
LARGER = 8  # largest decoder, in times the first one's bytes: float64 instead of bfloat16 (4), an untied head (2)
T = TypeVar("T")


@dataclass(frozen=True)
class CheckedMemory:
    """A decoder or an n-gram memory that has passed all checks."""

    mode: str
    """`decoder` or `ngram`."""
    domain: Domain
    """The domain, if it had this memory and no other."""
    staging: str
    """The worker's method that begins to load it, with slot, path and what its bytes must be."""
    expected: object
    """What its bytes must be: hashes, or a revision."""

    def joined(self, before: Domain | None) -> Domain:
        """The domain with this memory and the others that it had before."""
        if before is None:
            return self.domain
        if self.mode == DECODER:
            return replace(self.domain, datastore=before.datastore, ngrams=before.ngrams)
        return replace(before, ngrams=self.domain.ngrams) if before.decoder else self.domain

    def is_in(self, domain: Domain | None) -> bool:
        """Whether a domain has this very revision."""
        if domain is None or (self.mode == DECODER and not domain.decoder):
            return False
        if self.mode == DECODER:
            return domain.revision == self.domain.revision
        return domain.ngrams is not None and domain.ngrams.revision == self.domain.revision


class DomainUpdates:
    """Loads, replaces and unloads the memories of a running server, and publishes the new domains in `engine.loaded`."""

    def __init__(self, engine: Engine, models: Models, options: UpdateOptions) -> None:
        self.engine, self.options = engine, options
        self.tokenizer = load_tokenizer(models.base)
        self.base, self.base_revision = models.base, fingerprint_model(models.base)
        first = next((d for d in models.domains if d.decoder), None)
        self.reference = (first.name, Package.read(Path(first.path))) if first is not None else None
        self.token_hash = models.domains.all[0].tokenizer
        self.first_ngram = models.spec.first_ngram
        self.draining: dict[int, Domain] = {}
        """Slot -> the former domain of its memory: takes no new requests, but has unfinished ones."""
        self.lock = asyncio.Lock()
        self.tasks: set[asyncio.Task[object]] = set()

    async def load(self, name: str, path: str) -> tuple[Domain, bool]:
        """Load a package as a new domain (True), or into one (False), where it replaces a memory of its kind. Raises RequestError; then all is as it was."""
        if not DOMAIN.fullmatch(name):
            raise RequestError(f"The name {name[:80]!r} must be {DOMAIN_RULE}.", "name")
        # Done even if the client leaves: half a change is none.
        return await asyncio.shield(self._keep(self._load(name, path)))

    async def unload(self, name: str) -> None:
        """Take no more requests for a domain, and empty its slots when the last one is done. Raises RequestError."""
        async with self.lock:
            self._require_running()
            current = self.engine.loaded.current
            domain = current.domains.find(name)
            if domain.datastore is not None:
                raise DomainStays(f"The domain {name!r} has a datastore, which can't be unloaded. Start the server without it instead.")
            self.engine.loaded.publish(current.without(name))
            for mode in (DECODER, NGRAM):
                self._drain(current.slot_of(mode, name), domain, mode)

    def slots_json(self) -> dict[str, object]:
        """Decoders' slots in total and free, and the revisions of any memory that still answer their last requests."""
        leaving = [{"name": d.name, "revision": d.revision} for d in self.draining.values()]
        return {"total": self.options.slots, "free": len(list(self._free())), "draining": leaving}

    def _keep(self, work: Coroutine[object, object, T]) -> asyncio.Task[T]:
        """Start a task and keep a reference to it: the event loop holds only a weak one."""
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def _load(self, name: str, path: str) -> tuple[Domain, bool]:
        async with self.lock:
            self._require_running()
            deadline = time.monotonic() + self.options.seconds
            memory = await self._in_time(in_thread(self._checked, name, path), deadline)
            current = self.engine.loaded.current
            before, old = current.domains.get(name), current.slot_of(memory.mode, name)
            domain = memory.joined(before)
            if memory.is_in(before):
                self.engine.loaded.publish(current.having_memory(memory.mode, domain, old))
                return domain, False
            slot = self._slot_for(name, memory.mode)
            await self._fill(slot, memory, deadline)
            try:
                self.engine.output_processor.timings.know([(mode, name) for mode in domain.modes if mode in (*MEMORIES, NONE)])
                self.engine.loaded.publish(current.having_memory(memory.mode, domain, slot))
            except BaseException:
                await self._clear(slot)
                raise
            if before is not None:
                self._drain(old, before, memory.mode)
            return domain, before is None

    def _require_running(self) -> None:
        """Raise ShuttingDown while the server drains."""
        if self.engine.draining:
            raise ShuttingDown("The server is shutting down; its domains don't change any more.")

    async def _in_time(self, work: Awaitable[T], deadline: float) -> T:
        """Await `work` until the deadline; a thread that takes longer is abandoned. Raises BadPackage after the deadline, ShuttingDown while the server drains."""
        task = asyncio.ensure_future(work)
        try:
            while True:
                self._require_running()
                if time.monotonic() > deadline:
                    raise BadPackage(f"The package was not loaded within {self.options.seconds:g} s (--domain-load-timeout).")
                if (await asyncio.wait({task}, timeout=POLL))[0]:
                    return task.result()
        finally:
            task.cancel()

    def _checked(self, name: str, path: str) -> CheckedMemory:
        """A package, checked as at start-up. Raises OutsideRoots and BadPackage."""
        folder = self._confined(path)
        try:
            return self._ngrams(name, folder) if (folder / NGRAMS).is_file() else self._decoder(name, folder)
        except (StartupError, DecoderError) as error:
            raise BadPackage(f"{sendable(str(error))}.") from None

    def _decoder(self, name: str, folder: Path) -> CheckedMemory:
        """Raises StartupError or DecoderError."""
        if self.reference is None:
            raise BadPackage(
                f"No {NGRAMS} in it: this server has no decoder, whose shape others would share, and takes n-gram memories alone."
            )
        most = LARGER * self.reference[1].size + (64 << 20)
        package = open_decoder(name, folder, self.base, lambda: self.base_revision, self.tokenizer, self.options.roots, most)
        require_one_shape([self.reference, (name, package)])
        return CheckedMemory(DECODER, domain_of(name, package, self.token_hash), "stage_decoder", package.weights.digests)

    def _ngrams(self, name: str, folder: Path) -> CheckedMemory:
        """Raises DecoderError."""
        ngrams = open_ngrams(folder, lambda: self.base_revision, self.token_hash)
        return CheckedMemory(NGRAM, Domain.of_ngrams(name, ngrams, self.token_hash), "stage_ngrams", ngrams.revision)

    def _confined(self, path: str) -> Path:
        """The package's folder, symbolic links resolved. Raises OutsideRoots if it, or a file in it, lies outside the roots."""
        refusal = OutsideRoots(f"The path {path[:200]!r} is no folder within those that --domain-root names.")
        if not is_utf8(path):
            raise refusal
        try:
            tried = [(root / path).resolve() for root in self.options.roots]  # an absolute path takes the root's place
            inside = [p for p in tried if any(p.is_relative_to(root) for root in self.options.roots)]
            folder = next((p for p in inside if p.is_dir()), None)
            if folder is None:
                raise refusal
            if all(any(f.resolve().is_relative_to(root) for root in self.options.roots) for f in folder.rglob("*")):
                return folder
        except (OSError, RuntimeError, ValueError):  # too long, no permission, a loop of links, no text
            raise refusal from None
        raise OutsideRoots(f"A file in {path[:200]!r} is a link to outside of the folders that --domain-root names.")

    def _free(self) -> Iterator[int]:
        taken = {*self.engine.loaded.current.slots.values(), *self.draining}
        return (slot for slot in range(1, self.options.slots + 1) if slot not in taken)

    def _slot_for(self, name: str, mode: str) -> int:
        """The lowest free slot for a memory of this kind. Raises NoSlot, which lists what is loaded."""
        current = self.engine.loaded.current
        if mode == NGRAM:
            taken = {*current.ngram_slots.values(), *self.draining}
            return next(slot for slot in count(self.first_ngram) if slot not in taken)
        slot = next(self._free(), None)
        if slot is not None:
            return slot
        domains = current.domains
        loaded = [f"{d.name} ({d.revision})" for d in domains if d.decoder]
        leaving = [f"{d.name} ({d.revision}, until its last request is done)" for d in self.draining.values() if d.decoder]
        why = "A new revision needs a free slot until the old one's last request is done. " if name in domains.names else ""
        raise NoSlot(
            f"All {self.options.slots} slots for decoders are taken: {', '.join(loaded + leaving)}. {why}"
            "DELETE a domain first, or start the server with a larger --max-decoders."
        )

    async def _fill(self, slot: int, memory: CheckedMemory, deadline: float) -> None:
        """Load a memory into a slot on all workers, each of which reads the bytes that were checked. Raises BadPackage; then no worker has it."""
        try:
            await self._in_time(self._everywhere(memory.staging, slot, memory.domain.path, memory.expected), deadline)
            while not all(answers := await self._in_time(self._everywhere("load_staged", PIECE), deadline)):
                if None in answers:  # a worker waits for the disk
                    await asyncio.sleep(POLL)
            await self._in_time(self._everywhere("install_staged"), deadline)
        except BaseException:
            await self._clear(slot)
            raise

    async def _clear(self, slot: int) -> None:
        """After a failure: discard the staged memory and empty the slot on all workers. An engine that drains or doesn't answer is not waited for."""
        if not self.engine.draining and not self.engine.errored:
            for method, args in (("discard_staged", ()), ("free_slot", (slot,))):
                with contextlib.suppress(Exception):
                    await asyncio.wait_for(self.engine.everywhere(method, *args), CLEARING)

    async def _everywhere(self, method: str, *args: object) -> list[object]:
        """Every worker's answer. Raises BadPackage if one is a string: a worker's error message."""
        answers = [answer for ranks in await self.engine.everywhere(method, *args) for answer in ranks]
        if failure := next((a for a in answers if isinstance(a, str)), None):
            raise BadPackage(f"The package can't be loaded: {sendable(failure)}.")
        return answers

    def _drain(self, slot: int, domain: Domain, mode: str) -> None:
        """Empty a slot when the requests of its former domain are done; slot 0: there was no such memory."""
        if slot:
            alone = (
                Domain.of_ngrams(domain.name, domain.ngrams, domain.tokenizer) if mode == NGRAM and domain.ngrams is not None else domain
            )
            self.draining[slot] = alone
            self._keep(self._empty(slot))

    async def _empty(self, slot: int) -> None:
        """Unload a slot's memory when its last request is done."""
        while self.engine.uses(slot) or not all(await self._everywhere("free_slot", slot)):  # noqa: ASYNC110
            await asyncio.sleep(POLL)
        del self.draining[slot]
