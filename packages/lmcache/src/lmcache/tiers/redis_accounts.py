"""What tenants with a limit hold in a Redis store: one sorted set a tenant, in the store itself, so that all servers
that share the store count together.

Members are ``KEY:BYTES`` with a running number as their score; ``total`` and ``next`` have negative scores (minus the
bytes of all members, minus the next number). One set, because Redis may evict it: then all of it goes, never half.

How exact it is. The bytes are counted before the object is written, and anew when it is (another server may have made
it a victim before it was there); they are given back after it was removed. Each is one atomic script: a server that
dies between leaves bytes counted that are not there, never the other way round. So do
objects that Redis itself evicts, or that somebody deletes by hand: they count until their turn comes as the tenant's
oldest. What was put without a limit is not counted, and an account that Redis evicts starts again from nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from lmcache.errors import TierError
from lmcache.tiers.redis_link import Link, Refusal, Reply

VICTIMS_MAX = 256  # looked at in one script, which holds up the whole server
ROUNDS_MAX = 8

_DROP = b"""
local account = KEYS[1]
local function drop(member)
  if redis.call('ZREM', account, member) == 1 then
    redis.call('ZINCRBY', account, string.match(member, ':(%d+)$'), 'total')
  end
end
"""
# victims that were removed since are dropped if nobody put them again in between, which their number shows
_RESERVE = (
    _DROP
    + b"""
local member, bytes, limit, most = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
for i = 5, #ARGV, 2 do
  if redis.call('ZSCORE', account, ARGV[i]) == ARGV[i + 1] then drop(ARGV[i]) end
end
local after = bytes - tonumber(redis.call('ZSCORE', account, 'total') or '0')
if redis.call('ZSCORE', account, member) then after = after - bytes end
if after > limit then
  local over, victims = after - limit, {}
  local oldest = redis.call('ZRANGEBYSCORE', account, 1, '+inf', 'WITHSCORES', 'LIMIT', 0, most)
  for i = 1, #oldest, 2 do
    if over <= 0 then break end
    if oldest[i] ~= member then
      victims[#victims + 1] = oldest[i]
      victims[#victims + 1] = oldest[i + 1]
      over = over - tonumber(string.match(oldest[i], ':(%d+)$'))
    end
  end
  return victims
end
drop(member)
local number = -tonumber(redis.call('ZINCRBY', account, -1, 'next'))
redis.call('ZADD', account, number, member)
redis.call('ZINCRBY', account, -bytes, 'total')
return after
"""
)
_FORGET = _DROP + b"drop(ARGV[1]) return -tonumber(redis.call('ZSCORE', account, 'total') or '0')"


@dataclass(frozen=True, slots=True)
class Victim:
    """A tenant's object that must go before another fits."""

    member: bytes
    number: bytes

    @property
    def key(self) -> bytes:
        """Its key, in hex."""
        return self.member.partition(b":")[0]


def reserving(
    account: bytes, key: bytes, num_bytes: int, limit_bytes: int, removed: Sequence[Victim]
) -> Callable[[Link], Awaitable[int | list[Victim] | Refusal]]:
    """Count an object that is about to be written: the tenant's bytes with it, or who must be removed first.

    Args:
        account: name of the tenant's set.
        key: the object's, in hex.
        removed: victims of the answer before, whose objects are gone by now.
    """
    gone = [word for victim in removed for word in (victim.member, victim.number)]
    limits = [b"%d" % number for number in (num_bytes, limit_bytes, VICTIMS_MAX)]

    async def work(link: Link) -> int | list[Victim] | Refusal:
        reply = await link.ask(b"EVAL", _RESERVE, b"1", account, _member(key, num_bytes), *limits, *gone)
        if isinstance(reply, (int, Refusal)):
            return reply
        words = [word for word in reply if isinstance(word, bytes)] if isinstance(reply, list) else []
        if not words or len(words) % 2:
            raise TierError("a tenant's account in the store is not one of ours")
        return [Victim(words[index], words[index + 1]) for index in range(0, len(words), 2)]

    return work


def forgetting(account: bytes, key: bytes, num_bytes: int) -> Callable[[Link], Awaitable[Reply]]:
    """Count an object no more: the tenant's bytes without it."""
    return lambda link: link.ask(b"EVAL", _FORGET, b"1", account, _member(key, num_bytes))


def _member(key: bytes, num_bytes: int) -> bytes:
    return b"%b:%d" % (key, num_bytes)
