"""Keys that somebody else has written in another type than ours (a string in the place of a hash).

Every operation on such a key would fail for ever. So it is dropped as soon as one fails on it, and what it held counts
as lost, in a way that those who are concerned find out:

- of nodes, jobs and actors: the nodes are forgotten, restore themselves within a heartbeat, and write again what they
  know, as they do when the store has lost all;
- of a carrier: all of it goes, and whoever waits for it asks again, and is told that it is lost;
- a counter goes on above all that it can have given.

A script finds out in the middle of its work, and goes on in the same step: `guarded` puts that around its source, and
around its answer the keys that were dropped. Other commands run `DROP_FOREIGN` when they have failed, and try again.
"""

from __future__ import annotations

from typing import Any

# The first word of an answer that has dropped keys in it.
DROPPED = b"dropped keys"

_TYPES = {
    "events": "stream", "nodes": "hash", "node_incarnations": "hash", "node_heartbeats": "zset",
    "node_registrations": "hash", "node_loads": "hash", "jobs": "hash", "actors": "set", "actor_names": "hash",
    "actor": "hash", "actor_keepers": "hash", "actor_log": "list", "carrier": "hash", "waiters": "list",
    "items": "list", "carriers": "set", "waits": "hash", "grants": "stream", "last_operation": "hash",
}  # fmt: skip


def kind_of(key: str) -> str:
    """What a key is about, as in docs/key-schema.md."""
    return key.rpartition("}:")[2].partition(":")[0]


def type_of(key: str) -> str:
    """Of what type we make it."""
    return _TYPES.get(kind_of(key), "string")


def guarded(source: str) -> str:
    """The script, such that a key of another type is in its eyes not there."""
    return f"{_GUARD}local function body()\n{source}\nend\n{_TELL}"


def split_answer(answer: Any) -> tuple[Any, list[tuple[str, str]]]:
    """What the script has answered, and which keys it has dropped, each with the type that it had."""
    if type(answer) is list and answer and answer[0] == DROPPED:
        return answer[2], [(key.decode(errors="backslashreplace"), found.decode()) for key, found in answer[1]]
    return answer, []


_GUARD = """
local server = redis
local dropped = {}
-- Whoever is restored to these is restored to all.
local FORGOTTEN = {'nodes', 'node_incarnations', 'node_heartbeats', 'node_loads', 'node_registrations', 'generation'}
local TOLD_AGAIN = {nodes = 1, node_incarnations = 1, node_heartbeats = 1, node_registrations = 1, jobs = 1,
                    actors = 1, actor_names = 1, actor_keepers = 1, actor = 1}

local function list(command, ...)
  local answer = server.pcall(command, ...)
  return type(answer) == 'table' and not answer.err and answer or {}
end

-- The lives of nodes that may have waits.
local function lives(prefix)
  local found, incarnations = {}, list('HGETALL', prefix .. 'node_incarnations')
  for index = 1, #incarnations, 2 do
    found[#found + 1] = incarnations[index]  -- of one that is alone
    found[#found + 1] = incarnations[index] .. '@' .. incarnations[index + 1]
  end
  return found
end

-- A grant of nothing: ask again. Without a waiter: all who wait.
local function have_ask_again(key, waiter, name)
  server.pcall('XADD', key, '*', 'waiter', waiter, 'name', name, 'token', '0')
end

local function tell_waiter(prefix, waiter, name)
  local node = string.match(waiter, '^[^/@]+')
  if node then have_ask_again(prefix .. 'grants:' .. node, waiter, name) end
end

local function drop_carrier(prefix, name)
  for _, waiter in ipairs(list('LRANGE', prefix .. 'waiters:' .. name, 0, -1)) do tell_waiter(prefix, waiter, name) end
  for _, life in ipairs(lives(prefix)) do
    local waits = list('HGETALL', prefix .. 'waits:' .. life)
    for index = 1, #waits, 2 do
      if string.match(waits[index + 1], '^[wh]%d*:(.*)$') == name then
        server.call('HDEL', prefix .. 'waits:' .. life, waits[index])
        tell_waiter(prefix, waits[index], name)
      end
    end
  end
  for _, kind in ipairs({'carrier:', 'waiters:', 'items:'}) do server.call('DEL', prefix .. kind .. name) end
end

-- Nobody knows any more what the processes of this life hold: a lock or guard that may be among it goes.
local function drop_carriers_of(prefix, life)
  for _, job in ipairs(list('HKEYS', prefix .. 'jobs')) do
    for _, name in ipairs(list('SMEMBERS', prefix .. 'carriers:' .. job)) do
      local fields = list('HMGET', prefix .. 'carrier:' .. name, 'kind', 'holder')
      local is_held = fields[2] and string.sub(fields[2], 1, #life + 1) == life .. '/'
      if fields[1] == 'guard' or is_held then drop_carrier(prefix, name) end
    end
  end
  have_ask_again(prefix .. 'grants:' .. string.match(life, '^[^@]*'), '', '')
end

local function drop(key)
  dropped[#dropped + 1] = {key, server.call('TYPE', key).ok}
  server.call('DEL', key)
  local prefix, rest = string.match(key, '^(clusterpool:%b{}:)(.*)$')
  if not prefix then return end
  local kind, name = string.match(rest, '^([^:]*):?(.*)$')
  if TOLD_AGAIN[kind] then
    for _, each in ipairs(FORGOTTEN) do server.call('DEL', prefix .. each) end
  elseif kind == 'incarnation' then
    local highest = 0
    for _, known in ipairs(list('HVALS', prefix .. 'node_incarnations')) do
      highest = math.max(highest, math.min(tonumber(known) or 0, 9e15))
    end
    server.call('SET', key, string.format('%.0f', highest))
  elseif kind == 'token_base' or kind == 'coordination_run' then
    server.call('SET', prefix .. 'token_base', string.format('%.0f', tonumber(server.call('TIME')[1]) * 1048576))
  elseif kind == 'carrier' or kind == 'waiters' or kind == 'items' then
    drop_carrier(prefix, name)
  elseif kind == 'waits' then
    drop_carriers_of(prefix, name)
  elseif kind == 'grants' then  -- those that were in it had been handed out: all who wait ask again
    have_ask_again(key, '', '')
  end
end

-- In the place of the server's own: nothing that a script has done before is undone by an error.
local redis = {pcall = server.pcall, sha1hex = server.sha1hex}
function redis.call(...)
  local answer = server.pcall(...)
  if type(answer) ~= 'table' or not answer.err then return answer end
  if string.find(answer.err, 'WRONGTYPE', 1, true) then drop((select(2, ...))) end
  return server.call(...)  -- other errors come again, in the server's own words
end
"""

_TELL = """
local answer = body()
if #dropped > 0 then return {'dropped keys', dropped, answer} end
return answer
"""

# KEYS: any; ARGV: the type of each.
DROP_FOREIGN = """
for index, key in ipairs(KEYS) do
  local found = server.call('TYPE', key).ok
  if found ~= 'none' and found ~= ARGV[index] then drop(key) end
end
return 1
"""
