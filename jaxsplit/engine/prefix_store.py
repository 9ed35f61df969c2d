"""Prefixes that the devices forget, in the host's memory and on disk.

**Memory.** A page is copied there when the devices forget it, so that memory and devices hold
different pages. It is restored when a prompt begins with it. Any full page is worth its transfer:
an 8B's has 256 tokens in 32 MiB, less than a millisecond over PCIe 5.0, and an H200 takes seven to
compute it.

**Disk.** A prefix is written when a second request begins with it: most never see one, and disks
wear out. At the end all prefixes are written, most recently used first. Threads write and read; a
request whose prefix is on disk waits for it while others go on.
"""

import concurrent.futures
import dataclasses
import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxsplit.cache.disk import PrefixDirectory, used_at
from jaxsplit.cache.host import HostCache, HostCopy, Kept, Lookup, page_key
from jaxsplit.cache.prefixes import Begun, PrefixCache
from jaxsplit.engine.engine import Engine
from jaxsplit.engine.identity import prefix_root
from jaxsplit.engine.workers import start_worker
from jaxsplit.errors import JaxsplitError

_LOG = logging.getLogger(__name__)

_THREADS = 4
"""That read, and as many that write: one verifies about 2 GB/s."""

_UNWRITTEN_BYTES = 2**29
"""In memory on their way to the disk, at most; prefixes without room are saved another time."""

_MOST_LOADING = 4
"""Requests whose prefixes may be in memory on their way from the disk."""

_LOADING_BYTES = 2**32
"""Of each of them, at most: a longer prefix is restored in part."""


@dataclasses.dataclass(eq=False)
class Loading:
    """Pages and states that are read from disk.

    Attributes:
      parts: what is read, by key and whether it is a state.
    """

    parts: Mapping[tuple[bytes, bool], "concurrent.futures.Future[HostCopy]"]

    @property
    def done(self) -> bool:
        """Whether there is nothing to wait for."""
        return all(part.done() for part in self.parts.values())

    def kept(self) -> dict[bytes, Kept]:
        """What has been read, without files that were damaged or gone."""
        found: dict[bytes, Kept] = {}
        for (key, state), part in self.parts.items():
            if part.exception() is None:
                one = Kept(state=part.result()) if state else Kept(page=part.result())
                found[key] = one.joined(found.get(key))
        return found


@dataclasses.dataclass(frozen=True)
class _ReplicaKeeper:
    """The store as the `Keeper` of a data replica's pages."""

    store: "PrefixStore"
    replica: int

    def root(self, model: Hashable) -> bytes:
        return self.store.root(model)

    def keep(self, key: bytes, page: int | None, state: int | None) -> None:
        self.store.keep(self.replica, key, page, state)


class PrefixStore:
    """Prefixes of an engine on the host, in a single process. Runs on the engine's thread.

    Args:
      engine: the engine.
      model: hash of the model.
      adapters: hash of each adapter.
      ram: bytes of memory for prefixes: most for those that are kept, an eighth for those on
        their way.
      directory: where they are kept on disk; None: they are not.

    Raises:
      JaxsplitError: there is not as much memory.

    Attributes:
      restored, loaded: tokens that came back from memory and from disk.
    """

    def __init__(
        self,
        engine: Engine,
        model: bytes,
        *,
        adapters: Sequence[bytes] = (),
        ram: int = 0,
        directory: PrefixDirectory | None = None,
    ):
        self._engine, self._model, self._adapters = engine, model, adapters
        self._ram, self._directory = HostCache(ram - ram // 8), directory
        self._loading: weakref.WeakSet[Loading] = weakref.WeakSet()
        self._failed = False
        self.restored = self.loaded = 0
        if directory is not None:
            self._readers = concurrent.futures.ThreadPoolExecutor(_THREADS, "jaxsplit-prefixes")
            self._writers = _Writers(min(ram // 8 or _UNWRITTEN_BYTES, _UNWRITTEN_BYTES))
        self._reserve(ram)
        self._compile()

    def _reserve(self, nbytes: int) -> None:
        """Has the allocator pin memory now: while tokens are generated, it would delay them."""
        device = self._engine.partition.stages[0].device_mesh.devices.flat[0]
        if device.platform == "cpu" or not nbytes:
            return
        pinned = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
        try:
            jax.block_until_ready(jax.device_put(np.empty(nbytes, np.uint8), pinned))
        except jax.errors.JaxRuntimeError as error:
            raise JaxsplitError(
                f"cache_ram={nbytes >> 20} MiB of memory cannot be pinned: give less, or set "
                "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB, by default 64, to more"
            ) from error

    def _compile(self) -> None:
        """Compiles what copies, so that no request waits for it."""
        for kind, host in (("page", self._engine.host_pages), ("state", self._engine.host_states)):
            if host.shapes:
                copy = self._engine.save(0, **{kind: 0})
                self._engine.restore(0, copy, **{kind: 0})

    def of(self, replica: int) -> _ReplicaKeeper:
        """The keeper of a data replica."""
        return _ReplicaKeeper(self, replica)

    def root(self, model: Hashable) -> bytes:
        """The hash from which keys of a request's pages begin, given its `lora_scales`."""
        scales = self._engine.lora_scales if model is None else model
        assert isinstance(scales, tuple)
        return prefix_root(self._model, self._adapters, scales)

    @property
    def ram_bytes(self) -> int:
        """Bytes in memory."""
        return self._ram.nbytes

    @property
    def disk_bytes(self) -> int:
        """Bytes on disk, of all models in the directory, as far as is known."""
        return 0 if self._directory is None else self._directory.nbytes

    def clear(self) -> None:
        """Forgets what is in memory: after a failure of the devices, it may not have arrived."""
        self._ram.clear()
        for host in (self._engine.host_pages, self._engine.host_states):
            host.clear()

    # From the devices to the host

    def keep(self, replica: int, key: bytes, page: int | None, state: int | None) -> None:
        """As of `Keeper`."""
        if not self._ram.capacity:
            return
        known = self._ram.get(key) or Kept()
        missing = {
            kind: index
            for kind, index, have in (("page", page, known.page), ("state", state, known.state))
            if index is not None and have is None and self._bytes_of(kind) <= self._ram.capacity
        }
        copies = {kind: self._copied(replica, kind, index) for kind, index in missing.items()}
        if known != Kept() or any(copies.values()):
            self._ram.put(key, Kept(**copies).joined(known))

    def _bytes_of(self, kind: str) -> int:
        return getattr(self._engine, f"host_{kind}s").nbytes

    def _copied(self, replica: int, kind: str, index: int) -> HostCopy | None:
        """A copy that is being made; None: there is no memory for it, which is logged once."""
        try:
            return self._engine.save(replica, **{kind: index})
        except jax.errors.JaxRuntimeError as error:
            if not self._failed:
                _LOG.warning("a prefix cannot be copied to the host: %s", error)
            self._failed = True
            return None

    # From the host to the devices

    def lookup(self, loading: Loading | None) -> Lookup:
        """What the host has, and what has been read for a request."""
        kept = {} if loading is None else loading.kept()

        def of(key: bytes) -> Kept | None:
            found = self._ram.get(key)
            return kept.get(key) if found is None else found.joined(kept.get(key))

        return of

    def restore(self, replica: int, begun: Begun, loading: Loading | None) -> None:
        """Writes what a new sequence has on the host to its pages and its state."""
        for copy, page in begun.restored:
            self._engine.restore(replica, copy, page=page)
        if begun.state is not None:
            self._engine.restore(replica, begun.state, state=begun.allocation.state)
        from_disk = {id(one.page) for one in (loading.kept() if loading else {}).values()}
        read = sum(id(copy) in from_disk for copy, _ in begun.restored)
        self.loaded += read * self._engine.size.page
        self.restored += (len(begun.restored) - read) * self._engine.size.page

    # Disk

    def load(
        self, tokens: Sequence[int], model: Hashable, caches: Sequence[PrefixCache]
    ) -> Loading | None:
        """Begins to read what a prompt begins with and neither devices nor memory have; None: there
        is no such thing."""
        directory, size = self._directory, self._engine.size.page
        if directory is None:
            return None
        if directory.outdated:
            self._writers.add(directory.trim)
        on_devices = max(cache.full_pages(tokens, model) for cache in caches)
        most = max(1, _LOADING_BYTES // max(1, self._bytes_of("page")))
        key, pages, found = self.root(model), [], None
        best = max(cache.match(tokens, model) for cache in caches)
        for i in range((len(tokens) - 1) // size):
            key = page_key(key, tokens[i * size : (i + 1) * size])
            kept = self._ram.get(key) or Kept()
            if i >= on_devices and kept.page is None:
                if key not in directory or len(pages) == most:
                    break
                pages.append(key)
            known = not self._engine.stateful or kept.state is not None
            if (i + 1) * size > best and (known or directory.has_state(key)):
                found = len(pages), None if known else key
        if found is None or found == (0, None):
            return None
        count, state = found
        wanted = [(key, False) for key in pages[:count]]
        wanted += [] if state is None else [(state, True)]
        try:
            loading = Loading({one: self._readers.submit(self._read, *one) for one in wanted})
        except RuntimeError:  # the interpreter ends
            return None
        self._loading.add(loading)
        return loading

    @property
    def is_busy(self) -> bool:
        """Whether as many requests as may be have prefixes on their way from the disk."""
        return len(self._loading) >= _MOST_LOADING

    def _read(self, key: bytes, state: bool) -> HostCopy:
        assert self._directory is not None
        host = self._engine.host_states if state else self._engine.host_pages
        return host.copy_of(self._directory.read(key, host.shapes, state=state))

    def use(self, replica: int, cache: PrefixCache, begun: Begun) -> None:
        """Notes that a prefix was used again, and saves it."""
        chain = begun.allocation.nodes
        if not chain:
            return
        keys = [cache.key(node) for node in chain]
        self._ram.use(keys)
        if self._directory is not None:
            self._writers.add(lambda: self._directory and self._directory.use(keys))
            self._save(replica, cache, chain, time.time())

    def _save(
        self,
        replica: int,
        cache: PrefixCache,
        chain: Sequence[Any],
        used: float,
        *,
        wait: bool = False,
    ) -> int:
        """Saves what the directory does not have of a prefix, in the background.

        Args:
          chain: its nodes.
          used: when it was used last.
          wait: until there is room for what is on its way; else it may be left for another time.

        Returns:
          bytes that are written.
        """
        directory, saved = self._directory, 0
        assert directory is not None
        host = [self._ram.get(cache.key(node)) or Kept() for node in chain]
        size = self._engine.size.page
        ends = [
            i + 1
            for i, (node, kept) in enumerate(zip(chain, host, strict=True))
            if size in node.states or kept.state is not None
        ]
        # Pages after the last state are of no use.
        count = max(ends, default=0) if self._engine.stateful else len(chain)
        parts = [
            (depth, "page", node.page, kept.page)
            for depth, (node, kept) in enumerate(zip(chain[:count], host, strict=False))
            if cache.key(node) not in directory
        ]
        parts += [
            (end - 1, "state", chain[end - 1].states.get(size), host[end - 1].state)
            for end in ends
            if not directory.has_state(cache.key(chain[end - 1]))
        ]
        for depth, kind, index, known in parts:
            key, at = cache.key(chain[depth]), used_at(used, depth)
            if (key, kind) in self._writers:
                continue
            if not self._writers.has_room(self._bytes_of(kind), wait=wait):
                break
            copy = self._copied(replica, kind, index) if known is None else known
            if copy is None:
                break
            self._write(key, kind, copy, at)
            saved += copy.nbytes
        return saved

    def _write(self, key: bytes, kind: str, copy: HostCopy, used: float) -> None:
        directory, host = self._directory, getattr(self._engine, f"host_{kind}s")
        assert directory is not None

        def task() -> None:
            directory.write(key, host.whole(copy), state=kind == "state", used=used)

        self._writers.add(task, (key, kind), copy.nbytes)

    def close(self, caches: Sequence[PrefixCache]) -> None:
        """Saves the prefixes of devices and memory, most recently used first, as many as the
        directory may hold. Waits until they are written."""
        directory = self._directory
        if directory is None:
            return
        now, saved, rank = time.time(), 0, 0
        if not self._engine.lost:
            for replica, cache in enumerate(caches):
                for chain in cache.chains():
                    if saved < directory.capacity:
                        at, rank = now - rank * 1e-3, rank + 1
                        saved += self._save(replica, cache, chain, at, wait=True)
        for key, kept in self._ram.items():
            for kind, copy in (("page", kept.page), ("state", kept.state)):
                known = directory.has_state(key) if kind == "state" else key in directory
                if copy is None or known or saved >= directory.capacity:
                    continue
                self._writers.has_room(copy.nbytes, wait=True)
                self._write(key, kind, copy, now - rank * 1e-3)
                saved, rank = saved + copy.nbytes, rank + 1
        self._writers.wait()
        directory.trim()


class _Writers:
    """Threads that run tasks.

    Args:
      most: bytes that tasks may hold.
    """

    def __init__(self, most: int):
        self._most, self._held = most, 0
        self._tasks: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._names: set[Hashable] = set()
        self._changed = threading.Condition()
        self._count = 0
        for i in range(_THREADS):
            name = f"jaxsplit-writer-{i}"
            start_worker(name, _run, self._tasks, tasks=self._tasks, owner=self)

    def __contains__(self, name: Hashable) -> bool:
        """Whether a task of this name waits or runs."""
        return name in self._names

    def has_room(self, nbytes: int, *, wait: bool) -> bool:
        """Whether there is room for this many bytes; with `wait`, once there is."""
        with self._changed:
            if wait:
                self._changed.wait_for(lambda: not self._held or self._held + nbytes <= self._most)
            return not self._held or self._held + nbytes <= self._most

    def add(self, task: Callable[[], object], name: Hashable = None, nbytes: int = 0) -> None:
        """Runs a task that holds some bytes."""
        with self._changed:
            self._held, self._count = self._held + nbytes, self._count + 1
            if name is not None:
                self._names.add(name)

        def run() -> None:
            try:
                task()
            except Exception as error:  # of a copy that did not arrive, say
                _LOG.warning("a prefix cannot be saved: %s", error)
            finally:
                with self._changed:
                    self._held, self._count = self._held - nbytes, self._count - 1
                    self._names.discard(name)
                    self._changed.notify_all()

        self._tasks.put(run)

    def wait(self) -> None:
        """Waits until all tasks have been run."""
        with self._changed:
            self._changed.wait_for(lambda: not self._count)


def _run(tasks: "queue.SimpleQueue[Callable[[], object] | None]") -> None:
    while (task := tasks.get()) is not None:
        task()
        del task
    tasks.put(None)  # for the other threads
