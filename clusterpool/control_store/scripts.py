"""The Lua scripts that change the control store where two writers could race.

Each publishes its change to the event stream itself, so that a reader of the stream never learns of a
change that was not made, nor misses one that was. Event ids are our own numbers (1-0, 2-0, ...) and not the
server's time, so that a reader sees a gap where the stream was trimmed. Every script may be run twice with
the same arguments: the client sends it again when the connection broke before the answer came.
"""

from __future__ import annotations

import hashlib
import os

from clusterpool.control_store.foreign_keys import DROP_FOREIGN as DROP_FOREIGN_SOURCE
from clusterpool.control_store.foreign_keys import guarded

# Entries that the stream keeps, about: a reader that was away longer reads the snapshot instead. 10,000
# events are some megabytes, and hours of an ordinary cluster's life.
EVENTS_MAX = 10_000


class Script:
    """Lua source and the name under which a server caches it."""

    def __init__(self, source: str) -> None:
        self.source = guarded(source)
        self.sha1 = hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest()


def new_request() -> str:
    """A name for one change, which it keeps when it is sent again."""
    return os.urandom(8).hex()


# Of every script KEYS[1] and KEYS[2] are the stream and its counter.
PUBLISH = f"""
-- 0 for whatever somebody else has written in the place of a number. (More than that Lua cannot count.)
local NUMBER_MAX = 9e15
local function number_of(text)
  local number = tonumber(text)
  if number and number > -NUMBER_MAX and number < NUMBER_MAX then return number end
  return 0
end

local function add_event(number, ...)
  return redis.pcall('XADD', KEYS[1], 'MAXLEN', '~', {EVENTS_MAX}, string.format('%.0f-0', number), 'kind', ...)
end

local function publish(...)
  local number = redis.pcall('INCR', KEYS[2])
  local added = type(number) == 'number' and number > 0 and number < NUMBER_MAX and add_event(number, ...)
  if not added or (type(added) == 'table' and added.err) then
    -- Somebody else has written to the stream or its counter. Both begin anew, above all numbers that readers know:
    -- they find a gap, and read the snapshots.
    local time = redis.call('TIME')
    number = time[1] * 1000000 + time[2]
    redis.call('DEL', KEYS[1])
    redis.call('SET', KEYS[2], string.format('%.0f', number))
    add_event(number, ...)
  end
  return number
end
"""

# Seconds and microseconds are joined as text: a Lua number printed by default has 14 digits, two too few.
_NODES = """
local GENERATION, COUNTER, RECORDS, INCARNATIONS = KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local HEARTBEATS, LOADS, REGISTRATIONS = KEYS[7], KEYS[8], KEYS[9]

local function now_us()
  local time = redis.call('TIME')
  return time[1] .. string.format('%06d', time[2])
end

-- Did the store lose what it held since the caller registered? Incarnations are counted up for the whole
-- cluster, so a counter below the caller's own comes from a copy older than its registration.
local function has_forgotten(incarnation, generation)
  local current = redis.call('GET', GENERATION)
  if not current or (generation ~= '' and current ~= generation) then return true end
  return number_of(redis.call('GET', COUNTER)) < tonumber(incarnation)
end

-- A life that came before the caller's stands there: the store holds an older state than it once did.
local function is_older(current, incarnation)
  return current and number_of(current) < tonumber(incarnation)
end

-- The name of this history of the store; `fresh` if it has none.
local function generation(fresh)
  local current = redis.call('GET', GENERATION)
  if not current then redis.call('SET', GENERATION, fresh) end
  return current or fresh
end

local function next_incarnation(above)
  local incarnation = redis.pcall('INCR', COUNTER)
  if type(incarnation) ~= 'number' or incarnation <= 0 or incarnation >= NUMBER_MAX then
    -- Somebody else has written to it: it goes on above those of the living.
    incarnation = 0
    for _, known in ipairs(redis.call('HVALS', INCARNATIONS)) do
      incarnation = math.max(incarnation, number_of(known))
    end
    incarnation = incarnation + 1
    redis.call('SET', COUNTER, string.format('%.0f', incarnation))
  end
  if incarnation <= above then
    incarnation = above + 1
    redis.call('SET', COUNTER, string.format('%.0f', incarnation))
  end
  return string.format('%.0f', incarnation)
end

local function enlist(node_id, record, incarnation)
  redis.call('HSET', RECORDS, node_id, record)
  redis.call('HSET', INCARNATIONS, node_id, incarnation)
  redis.call('ZADD', HEARTBEATS, now_us(), node_id)
  redis.call('HDEL', LOADS, node_id)
  publish('node_joined', 'node_id', node_id, 'incarnation', incarnation, 'record', record)
end
"""

# ARGV: node_id, record, a fresh generation, the number of the registration (0: none), a number that the incarnation
# must exceed. Returns {incarnation, generation}.
REGISTER_NODE = Script(
    PUBLISH
    + _NODES
    + """
local current = redis.call('HGET', INCARNATIONS, ARGV[1])
if current and ARGV[4] ~= '0' then
  -- Sent again because the answer was lost: a second incarnation would fence the node that has the first.
  local registration = number_of(redis.call('HGET', REGISTRATIONS, ARGV[1]))
  if tonumber(ARGV[4]) <= registration then return {current, generation(ARGV[3])} end
end
redis.call('HSET', REGISTRATIONS, ARGV[1], ARGV[4])
local incarnation = next_incarnation(tonumber(ARGV[5]))
enlist(ARGV[1], ARGV[2], incarnation)
return {incarnation, generation(ARGV[3])}
"""
)

# ARGV: node_id, record, a fresh generation, incarnation, the generation it registered in. Returns {0 | 1,
# generation}.
RESTORE_NODE = Script(
    PUBLISH
    + _NODES
    + """
local current = redis.call('HGET', INCARNATIONS, ARGV[1])
if current ~= ARGV[4] then
  if not is_older(current, ARGV[4]) and (current or not has_forgotten(ARGV[4], ARGV[5])) then return {0, ''} end
  if number_of(redis.call('GET', COUNTER)) < tonumber(ARGV[4]) then
    redis.call('SET', COUNTER, ARGV[4])
  end
  enlist(ARGV[1], ARGV[2], ARGV[4])
end
return {1, generation(ARGV[3])}
"""
)

# ARGV: node_id, incarnation, load, the generation it registered in. Returns 1 accepted, 0 fenced, 2
# forgotten.
HEARTBEAT = Script(
    PUBLISH
    + _NODES
    + """
local current = redis.call('HGET', INCARNATIONS, ARGV[1])
if current == ARGV[2] then
  redis.call('ZADD', HEARTBEATS, now_us(), ARGV[1])
  redis.call('HSET', LOADS, ARGV[1], ARGV[3])
  return 1
end
if is_older(current, ARGV[2]) or (not current and has_forgotten(ARGV[2], ARGV[4])) then return 2 end
return 0
"""
)

# ARGV: microseconds. Returns {now, how many nodes, highest incarnation, node_id, incarnation, heartbeat, node_id, ...}
# of the nodes that have been silent for longer.
SILENT_NODES = Script(
    PUBLISH
    + _NODES
    + """
local now = now_us()
local before = string.format('(%.0f', tonumber(now) - tonumber(ARGV[1]))
local answer = {now, redis.call('ZCARD', HEARTBEATS), redis.call('GET', COUNTER) or '0'}
local silent = redis.call('ZRANGEBYSCORE', HEARTBEATS, '-inf', before, 'WITHSCORES')
for i = 1, #silent, 2 do
  answer[#answer + 1] = silent[i]
  answer[#answer + 1] = redis.call('HGET', INCARNATIONS, silent[i])
  answer[#answer + 1] = silent[i + 1]
end
return answer
"""
)

# ARGV: node_id, incarnation, kind of the event, reason. Returns 1 if this call ended that incarnation.
END_NODE = Script(
    PUBLISH
    + _NODES
    + """
if redis.call('HGET', INCARNATIONS, ARGV[1]) ~= ARGV[2] then return 0 end
redis.call('HDEL', RECORDS, ARGV[1])
redis.call('HDEL', INCARNATIONS, ARGV[1])
redis.call('ZREM', HEARTBEATS, ARGV[1])
redis.call('HDEL', LOADS, ARGV[1])
redis.call('HDEL', REGISTRATIONS, ARGV[1])
publish(ARGV[3], 'node_id', ARGV[1], 'incarnation', ARGV[2], 'reason', ARGV[4])
return 1
"""
)

# KEYS[1]: a stream. ARGV: the id of an entry that is none of ours. An empty stream goes as a whole: it would remember
# that id, and take none below it.
DROP_ENTRY = Script(
    """
redis.call('XDEL', KEYS[1], ARGV[1])
if redis.call('XLEN', KEYS[1]) == 0 then redis.call('DEL', KEYS[1]) end
return 1
"""
)

DROP_FOREIGN = Script(DROP_FOREIGN_SOURCE)

# KEYS[3]: jobs. ARGV: job_id, record.
REGISTER_JOB = Script(
    PUBLISH
    + """
if redis.call('HSET', KEYS[3], ARGV[1], ARGV[2]) == 1 then publish('job_started', 'job_id', ARGV[1]) end
return 1
"""
)

# KEYS[3]: jobs. ARGV: job_id, reason. Returns 1 if the job was running.
FINISH_JOB = Script(
    PUBLISH
    + """
if redis.call('HDEL', KEYS[3], ARGV[1]) == 0 then return 0 end
publish('job_finished', 'job_id', ARGV[1], 'reason', ARGV[2])
return 1
"""
)

# ARGV: kind, then field and value by turns. Returns the event's number.
PUBLISH_EVENT = Script(PUBLISH + "return publish(unpack(ARGV))\n")
