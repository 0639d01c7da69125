"""Bugs that could have been written, as changes of the source; each is found by some seed (``test_planted.py``)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One bug. ``original`` stands exactly once in the module; ``breaks`` says what it does to whom."""

    name: str
    module: str
    original: str
    replaced: str
    breaks: str


MUTATIONS = (
    # --- L1: who holds what
    Mutation(
        "expired reservation frees at once",
        "lmcache.cache.claims",
        "        if writer == NO_WRITER:\n            self.discard(claim)",
        "        if True:\n            self.discard(claim)",
        "a stopped worker goes on writing to extents that are somebody else's by now",
    ),
    Mutation(
        "leases outlive their owner",
        "lmcache.cache.store",
        "        for lease in list(self._leases.of_owner.get(owner, ())):\n            self._leases.end(lease)\n",
        "",
        "the leases of a killed engine stay until their time is over",
    ),
    Mutation(
        "aside is never looked at again",
        "lmcache.cache.store",
        "        if self._claims.aside and now >= self._poll_at:",
        "        if False:",
        "extents of a stopped worker that was killed are lost for good",
    ),
    Mutation(
        "partial admission leaks",
        "lmcache.cache.granting",
        "                self._claims.discard(grant.claim)\n",
        "",
        "when not all ranks of a chunk from a tier fit, the extents of those that did are lost",
    ),
    Mutation(
        "pieces with leased chunks are emptied",
        "lmcache.cache.room",
        "            if entry in self.leased:\n                met_leased.append(entry)\n                continue\n"
        "            pieces",
        "            pieces",
        "a chunk is evicted while an engine reads it",
    ),
    Mutation(
        "tenant goes over by one chunk",
        "lmcache.cache.quotas",
        "self._used.get(tenant, 0) + num_bytes > limit",
        "self._used.get(tenant, 0) >= max(limit, 1)",
        "a tenant takes more than its limit",
    ),
    Mutation(
        "promotion ignores the limit",
        "lmcache.cache.room",
        "        if not self._fits_limit(origin[:TENANT_BYTES], sum(sizes)):\n            return False\n",
        "",
        "what comes from a tier takes a tenant beyond its limit",
    ),
    Mutation(
        "leased share is not kept",
        "lmcache.cache.leases",
        "            if leased_bytes > limit_bytes:\n",
        "            if self.bytes > limit_bytes:\n",
        "leases pin more than half of L1",
    ),
    Mutation(
        "written means unwritten",
        "lmcache.cache.store",
        "        if kept:\n            held.writes = False",
        "        if not kept:\n            held.writes = False",
        "what the tiers have is written again for ever, what they failed to take is forgotten",
    ),
    # --- the core
    Mutation(
        "promoting keeps the lease",
        "lmcache.server.dispatch",
        "                if found.lease:\n                    self._cache.release(instance.id, found.lease)\n",
        "",
        "a lease that nobody was told of stays until its time is over",
    ),
    Mutation(
        "dead process keeps its promotions",
        "lmcache.server.tiering",
        "        self.promotions.drop_owner(instance.id)\n",
        "",
        "promotions of killed engines go on",
    ),
    Mutation(
        "question of a dead cascade is answered",
        "lmcache.server.tiering",
        "            self.cascade = self._enlisted = self._parked = None\n            self.promotions.end_all()\n",
        "            self.cascade = None\n            self.promotions.end_all()\n",
        "chunks are leased to nobody, for writes that nobody makes",
    ),
    Mutation(
        "buried process keeps everything",
        "lmcache.server.core",
        "        self._cache.drop_owner(instance.id)\n        self._tiering.drop_owner(instance)\n",
        "        self._tiering.drop_owner(instance)\n",
        "leases and reservations of a killed process stay",
    ),
    Mutation(
        "cascade's death goes unnoticed",
        "lmcache.server.core",
        "        self._tiering.drop_owner(instance)\n        self._sessions.drop(instance)",
        "        self._sessions.drop(instance)",
        "after the service process was killed prompts wait for promotions that nobody makes",
    ),
    Mutation(
        "visitor stays",
        "lmcache.server.sessions",
        "        self.show_out(visitor)\n        self._last_id += 1",
        "        self._last_id += 1",
        "an attached process is taken for a visitor, and its attachment ended after two seconds",
    ),
    # --- conversations by path
    Mutation(
        "rest of a frame is dropped",
        "lmcache.wire.stream",
        "            self._unsent += memoryview(data)[num_sent:]\n",
        "            pass\n",
        "what a full socket does not take is lost, and the other end reads the next frame as its rest",
    ),
    Mutation(
        "flush forgets",
        "lmcache.wire.stream",
        "            del self._unsent[:num_sent]\n",
        "            self._unsent.clear()\n",
        "what a full socket does not take the second time is lost",
    ),
    Mutation(
        "who never waits never flushes",
        "lmcache.wire.stream",
        "        if self._unsent:\n            self.flush()  # also for who never waits\n",
        "",
        "a scheduler's look-up that its socket does not take at once never arrives (so it was until the simulation "
        "found it)",
    ),
    Mutation(
        "frame overtakes",
        "lmcache.wire.stream",
        "        if self._unsent:\n            if len(self._unsent) + len(data) > UNSENT_BYTES_MAX:",
        "        if False:\n            if len(self._unsent) + len(data) > UNSENT_BYTES_MAX:",
        "a message overtakes the rest of the one before it, and is taken for it",
    ),
    Mutation(
        "never turned back",
        "lmcache.wire.local",
        "            self._poller.turn_to(peer.fd, writable=False)\n",
        "",
        "a connection whose answers waited once is watched for room to write for ever: the core spins",
    ),
    Mutation(
        "turned back by the flush of a send only",
        "lmcache.wire.local",
        "        if stream.has_unsent != had_unsent:\n",
        "        if stream.has_unsent and not had_unsent:\n",
        "the same where another answer takes what waited along (so it was until the simulation found it)",
    ),
    Mutation(
        "answers that wait are forgotten",
        "lmcache.wire.local",
        "            self._poller.turn_to(peer.fd, writable=stream.has_unsent)\n",
        "            pass\n",
        "the rest of an answer that a full socket did not take is never sent",
    ),
    Mutation(
        "many words, one turn",
        "lmcache.wire.local",
        "                if stream.frames or stream.is_at_end:\n                    self._queue(peer)\n",
        "",
        "of two messages that arrive together the second waits for a third",
    ),
    Mutation(
        "last words are not heard",
        "lmcache.server.core",
        "                for received in self._ends.local.last_words(instance.peer):\n"
        "                    self._answer(received)\n",
        "",
        "the last chunks that a process stored are thrown away with it",
    ),
    # --- the engine's side
    Mutation(
        "no deadline",
        "lmcache.connectors.session",
        "and self._now() >= question.deadline",
        "and self._now() >= question.deadline + 60",
        "a stopped server holds the requests of an engine for a minute",
    ),
    Mutation(
        "endless patience",
        "lmcache.connectors.session",
        "            if now >= question.patience_ends:",
        "            if now >= question.patience_ends + 2:",
        "a slow tier holds requests beyond their budget",
    ),
    Mutation(
        "questions survive their line",
        "lmcache.connectors.session",
        "                for question in (*self._asked.values(), *self._promoting):\n"
        "                    question.over = True\n",
        "",
        "a request waits for the answer of a dead server",
    ),
    Mutation(
        "abandoned lease is kept",
        "lmcache.connectors.session",
        "            self._say(question.line, Release(0, question=question.request_id))\n",
        "",
        "the lease of a request that was cancelled stays",
    ),
    Mutation(
        "preempted store is published",
        "lmcache.connectors.copier",
        "                marked = job.id in self._shared.marked",
        "                marked = False",
        "bytes of another request are stored under a chunk's key, with a right checksum",
    ),
    Mutation(
        "granted chunks, first blocks",
        "lmcache.connectors.copier",
        "[block for i in chosen for block in blocks[i * per_chunk : (i + 1) * per_chunk]]",
        "[block for i in range(len(chosen)) for block in blocks[i * per_chunk : (i + 1) * per_chunk]]",
        "when a prefix is held already, the rest is stored from the wrong blocks, with right checksums",
    ),
    Mutation(
        "preempted store keeps its extents",
        "lmcache.connectors.copier",
        "            if ticket and self._link.line is line:",
        "            if False:",
        "a reservation of a preempted store stays until its time is over",
    ),
    Mutation(
        "load from any server",
        "lmcache.connectors.copier",
        "        failed = self._engine.retrieve(line.pool, plan, job.checksums, LOAD_THREADS)\n",
        "        failed = self._engine.retrieve(line.pool, plan, job.checksums, LOAD_THREADS) and []\n",
        "an engine goes on with bytes whose check failed",
    ),
    # --- the cascade and its tiers
    Mutation(
        "slow open is tried again",
        "lmcache.cascade.guard",
        "by ourselves.\n                    self._is_opened = True",
        "by ourselves.\n                    pass",
        "a tier that was slow to open finds itself in use for ever (so it was until the simulation found it)",
    ),
    Mutation(
        "late read frees its extents",
        "lmcache.cascade.promoting",
        "            await asyncio.wait([late.call])\n            await self._abort(line, ticket)",
        "            await self._abort(line, ticket)",
        "a tier that hangs writes into extents that are granted anew",
    ),
    Mutation(
        "read is not verified",
        "lmcache.cascade.promoting",
        "        if _native.checksum(extent[: header.extent_bytes], checksum_seed(key, rank)) != expected:",
        "        if False:",
        "damaged objects become visible in L1",
    ),
    Mutation(
        "failed read keeps its budget",
        "lmcache.cascade.promoting",
        "        finally:\n            await self._budget.give(place.size)\n        return False",
        "        else:\n            await self._budget.give(place.size)\n        return False",
        "after some failures nothing is read from the tiers any more",
    ),
    Mutation(
        "failed write counts for ever",
        "lmcache.cascade.writing",
        "        finally:\n            self.used_bytes -= ranks * extent_bytes\n            self._changed()",
        "        else:\n            self.used_bytes -= ranks * extent_bytes\n            self._changed()",
        "after some failures nothing is written to the tiers any more",
    ),
    Mutation(
        "failed put is catalogued",
        "lmcache.tiers.file",
        "            self._catalog.settle(key, stored)\n",
        "            self._catalog.settle(key, True)\n",
        "a tier says that it has what it failed to write",
    ),
    # --- what people are told
    Mutation(
        "cleared counts as evicted",
        "lmcache.cache.store",
        "        self._room.num_evicted = num_evicted\n",
        "",
        "a clear shows as a burst of evictions",
    ),
    Mutation(
        "quarantine is counted by lease",
        "lmcache.cache.leases",
        "            self._quarantine.note(key",
        "            if len(keys) == 1:\n                self._quarantine.note(key",
        "of several spoiled chunks of one prompt one is counted",
    ),
    Mutation(
        "detaches are not counted",
        "lmcache.server.core",
        "        self._counters.detaches += 1\n",
        "",
        "processes that ended count as attached",
    ),
    Mutation(
        "dropped lease counts as expired",
        "lmcache.cache.store",
        "        for lease in list(self._leases.of_owner.get(owner, ())):\n            self._leases.end(lease)\n",
        "        for lease in list(self._leases.of_owner.get(owner, ())):\n            self._leases.end(lease)\n"
        '            self._counts["leases"] += 1\n',
        "engines that are killed show as leases that were too short",
    ),
)

BY_NAME = {mutation.name: mutation for mutation in MUTATIONS}
