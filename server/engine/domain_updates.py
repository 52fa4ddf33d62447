"""Domains at run time: decoders loaded, replaced and unloaded while requests run.

A decoder is read and checked here, in a thread, as thoroughly as at start-up; the workers then build its tower and fill it between steps, a piece at a
time. Only when every worker of every replica has it do names, aliases, salts and metrics change, in one step of the event loop. A
request is given its slot when it enters the engine and keeps it, so a slot is emptied when the last request that has it is done.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from memdec.decoders.errors import DecoderError
from memdec.decoders.names import DOMAIN, DOMAIN_RULE
from memdec.decoders.package import Package
from memdec.decoders.tokenizer import load_tokenizer
from memdec.decoders.weights import fingerprint_model
from memdec.server import metrics
from memdec.server.checked_models import Models, domain_of, open_decoder, require_one_shape
from memdec.server.engine.settings import UpdateOptions
from memdec.server.errors import BadPackage, DomainStays, NoSlot, OutsideRoots, RequestError, ShuttingDown, StartupError
from memdec.server.routing.domains import DECODER, NONE, Domain, Domains

PIECE = 16 << 20  # bytes of weights that are worked on between two steps
POLL = 0.05  # seconds between two looks at whether a slot is free


class DomainUpdates:
    """What a server's domains are, and how they change."""

    publish: Callable[[Domains], None]
    """Set by the app: tells its routes what there is now."""

    def __init__(self, engine: Any, models: Models, options: UpdateOptions) -> None:
        self.engine, self.domains, self.options = engine, models.domains, options
        self.tokenizer = load_tokenizer(models.base)
        self.base_revision = fingerprint_model(models.base)
        first = models.domains.all[0]
        self.reference = (first.name, Package.read(Path(first.path)))
        self.token_hash = first.tokenizer
        self.draining: dict[int, Domain] = {}
        """Slots whose decoder takes no new requests, but still has some."""
        self.lock = asyncio.Lock()
        self.tasks: set[asyncio.Task[None]] = set()

    async def load(self, name: str, path: str) -> tuple[Domain, bool]:
        """Load a decoder as a new domain (True) or as the next revision of one (False). Raises RequestError; then all is as it was."""
        if not DOMAIN.fullmatch(name):
            raise RequestError(f"The name {name[:80]!r} must be {DOMAIN_RULE}.", "name")
        # Done even if the client leaves: half a change is none.
        return await asyncio.shield(self._keep(self._load(name, path)))

    async def unload(self, name: str) -> None:
        """Take no more requests for a domain, and empty its slot when the last one is done. Raises RequestError."""
        async with self.lock:
            domain = self.domains.find(name)
            if domain.datastore is not None:
                raise DomainStays(f"The domain {name!r} has a datastore, which can't be unloaded. Start the server without it instead.")
            slot = self.engine.slots.pop(name)
            del self.engine.revisions[name]
            metrics.DOMAIN.remove(name, domain.revision)
            self._publish(self.domains.without(name))
            self._drain(slot, domain)

    def slots_json(self) -> dict[str, Any]:
        """How many decoders there may be, how many more there could be now, and which still answer their last requests."""
        leaving = [{"name": d.name, "revision": d.revision} for d in self.draining.values()]
        return {"total": self.options.slots, "free": len(list(self._free())), "draining": leaving}

    def _keep(self, work: Any) -> Any:
        """A task for a coroutine; the event loop alone would let it be collected."""
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def _load(self, name: str, path: str) -> tuple[Domain, bool]:
        async with self.lock:
            if self.engine.draining:
                raise ShuttingDown("The server is shutting down; its domains don't change any more.")
            found = await asyncio.to_thread(self._checked, name, path)
            before = self.domains.get(name)
            domain = replace(found, datastore=before.datastore if before is not None else None)
            if before is None or before.revision != domain.revision:
                slot = self._slot_for(name)
                await self._fill(slot, domain)
                if before is not None:
                    self._drain(self.engine.slots[name], before)
                    metrics.DOMAIN.remove(name, before.revision)
                self.engine.slots[name], self.engine.revisions[name] = slot, domain.revision
                self.engine.output_processor.timings.know([(mode, name) for mode in (DECODER, NONE)])
                metrics.DOMAIN.labels(name, domain.revision).set(1)
            self._publish(self.domains.having(domain))
            return domain, before is None

    def _checked(self, name: str, path: str) -> Domain:
        """A decoder, checked as at start-up. Raises OutsideRoots and BadPackage."""
        folder = self._confined(path)
        try:
            package = open_decoder(name, folder, lambda: self.base_revision, self.tokenizer, self.options.roots)
            require_one_shape([self.reference, (name, package)])
        except (StartupError, DecoderError) as error:
            raise BadPackage(f"{error}.") from None
        return domain_of(name, package, self.token_hash)

    def _confined(self, path: str) -> Path:
        """The folder that is meant, symbolic links resolved. Raises OutsideRoots if it, or a file in it, lies outside the roots."""
        refusal = OutsideRoots(f"The path {path[:200]!r} is no folder within those that --domain-root names.")
        try:
            tried = [(root / path).resolve() for root in self.options.roots]  # an absolute path takes the root's place
            inside = [p for p in tried if any(p.is_relative_to(root) for root in self.options.roots)]
            folder = next((p for p in inside if p.is_dir()), None)
            if folder is None:
                raise refusal
            if all(any(f.resolve().is_relative_to(root) for root in self.options.roots) for f in folder.iterdir()):
                return folder
        except (OSError, RuntimeError, ValueError):  # too long, no permission, a loop of links, no text
            raise refusal from None
        raise OutsideRoots(f"A file in {path[:200]!r} is a link to outside of the folders that --domain-root names.")

    def _free(self) -> Iterator[int]:
        taken = {*self.engine.slots.values(), *self.draining}
        return (slot for slot in range(1, self.options.slots + 1) if slot not in taken)

    def _slot_for(self, name: str) -> int:
        """The lowest free slot. Raises NoSlot, which lists what is loaded."""
        slot = next(self._free(), None)
        if slot is not None:
            return slot
        loaded = [f"{d.name} ({d.revision})" for d in self.domains]
        leaving = [f"{d.name} ({d.revision}, until its last request is done)" for d in self.draining.values()]
        why = "A new revision needs a free slot until the old one's last request is done. " if name in self.domains.names else ""
        raise NoSlot(
            f"All {self.options.slots} slots for decoders are taken: {', '.join(loaded + leaving)}. {why}"
            "DELETE a domain first, or start the server with a larger --max-decoders."
        )

    async def _fill(self, slot: int, domain: Domain) -> None:
        """Load a decoder into a slot on all workers. Raises BadPackage; then no worker has it."""
        try:
            await self._everywhere("stage_decoder", slot, domain.path)
            while not all(await self._everywhere("load_staged", PIECE)):
                pass  # the engine takes its steps in between
            if await asyncio.to_thread(fingerprint_model, Path(domain.path)) != domain.revision:
                raise BadPackage(
                    f"The files of {domain.name!r} changed while they were read. Write them elsewhere, then rename the folder."
                )
            await self._everywhere("install_staged")
        except BaseException:
            with contextlib.suppress(Exception):  # of an engine that died, say
                await self.engine.everywhere("discard_staged")
                await self.engine.everywhere("free_slot", slot)
            raise

    async def _everywhere(self, method: str, *args: Any) -> list[Any]:
        """Every worker's answer. Raises BadPackage if one is a text, which says what went wrong there."""
        answers = [answer for ranks in await self.engine.everywhere(method, *args) for answer in ranks]
        if told := next((a for a in answers if isinstance(a, str)), None):
            raise BadPackage(f"The decoder can't be loaded: {told[:300]}.")
        return answers

    def _publish(self, domains: Domains) -> None:
        self.domains = domains
        self.publish(domains)

    def _drain(self, slot: int, domain: Domain) -> None:
        self.draining[slot] = domain
        self._keep(self._empty(slot))

    async def _empty(self, slot: int) -> None:
        """Unload a slot's decoder when its last request is done."""
        while self.engine.uses(slot) or not all(await self._everywhere("free_slot", slot)):  # noqa: ASYNC110
            await asyncio.sleep(POLL)
        del self.draining[slot]
