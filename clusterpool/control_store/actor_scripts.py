"""The Lua scripts about actors: their names, their lives, their checkpoints and the calls since.

An actor has one life at a time, numbered from 0. Whoever ends a life (`END_LIFE`) counts it up in the same step, so
that of all who notice one death only one starts the next life, and what is left of the former one is refused: it can
neither say that it is alive nor log a call.
"""

from __future__ import annotations

from clusterpool.control_store.scripts import PUBLISH, Script

# Of an actor's history this much is kept: a crash loop must not fill the store.
HISTORY_BYTES_MAX = 4000
# Of a checkpoint, at least; a server that counted up to what somebody else wrote there might never end.
CHUNKS_MAX = 10_000

# Of every script below KEYS[3..9]: actor_names, actors, the actor, actor_keepers, its creation, its log,
# node_incarnations.
_ACTOR = (
    PUBLISH
    + f"""
local NAMES, ACTORS, ACTOR, KEEPERS, CREATION, LOG = KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[7], KEYS[8]
local INCARNATIONS = KEYS[9]

local function field(name) return redis.call('HGET', ACTOR, name) end
local function is_known() return redis.call('HLEN', ACTOR) > 0 end

-- Who starts the actor again: a node in one of its lives.
local function keep(actor_id, node_id)
  local incarnation = redis.call('HGET', INCARNATIONS, node_id)
  redis.call('HSET', KEEPERS, actor_id, node_id .. ':' .. (incarnation or '0'))
end

local function has_keeper(actor_id)
  local keeper = redis.call('HGET', KEEPERS, actor_id)
  if not keeper then return true end
  local node_id, incarnation = string.match(keeper, '^(.*):(%d+)$')
  if not node_id then return false end  -- written by somebody else
  return incarnation == '0' or redis.call('HGET', INCARNATIONS, node_id) == incarnation
end

local function drop_checkpoint()
  local calls, count = field('checkpoint_calls') or '', math.min(number_of(field('checkpoint_chunks')), {CHUNKS_MAX})
  for number = 0, count - 1 do redis.call('DEL', CREATION .. ':' .. calls .. ':' .. number) end
end

local function bury(actor_id, ttl_s)
  local name_field = field('name_field')
  if name_field and name_field ~= '' and redis.call('HGET', NAMES, name_field) == actor_id then
    redis.call('HDEL', NAMES, name_field)
  end
  drop_checkpoint()
  redis.call('SREM', ACTORS, actor_id)
  redis.call('HDEL', KEEPERS, actor_id)
  redis.call('DEL', CREATION, LOG)
  redis.call('EXPIRE', ACTOR, ttl_s)
end

local function remember(text)
  local history = (field('field:history') or '') .. text .. '\\n'
  redis.call('HSET', ACTOR, 'field:history', string.sub(history, -{HISTORY_BYTES_MAX}))
end
"""
)

# Of the two scripts that enter an actor, ARGV: actor_id, field of the name ('' for none), name, namespace, record,
# restarts allowed (-1: any number), 1 if it is detached, its creation.
_ENTER_ACTOR = (
    _ACTOR
    + """
local ACTOR_ID, NAME_FIELD, NAME, NAMESPACE = ARGV[1], ARGV[2], ARGV[3], ARGV[4]

local function enter(state, left, life)
  redis.call('SADD', ACTORS, ACTOR_ID)
  redis.call('HSET', ACTOR, 'state', state, 'record', ARGV[5], 'name', NAME, 'namespace', NAMESPACE,
             'name_field', NAME_FIELD, 'restarts', ARGV[6], 'restarts_left', left, 'is_detached', ARGV[7],
             'field:life', life)
  if ARGV[8] ~= '' then redis.call('SET', CREATION, ARGV[8]) end
end

local function tell(state)
  publish('actor_created', 'actor_id', ACTOR_ID, 'state', state, 'name', NAME, 'namespace', NAMESPACE)
end
"""
)

# ARGV: as above, state, node that keeps it ('': nobody). Returns '' or the id of the actor that holds the name.
CREATE_ACTOR = Script(
    _ENTER_ACTOR
    + """
if is_known() then return '' end
if NAME_FIELD ~= '' then
  local holder = redis.call('HGET', NAMES, NAME_FIELD)
  if holder and holder ~= ACTOR_ID then return holder end
  redis.call('HSET', NAMES, NAME_FIELD, ACTOR_ID)
end
enter(ARGV[9], ARGV[6], '0')
if ARGV[10] ~= '' then keep(ACTOR_ID, ARGV[10]) end
tell(ARGV[9])
return ''
"""
)

# ARGV: as above, its keeper as a node and its incarnation, its life, the address where it lives ('': it is being made).
# Returns 1 if the actor was not known; of one that is, the lists on which it stands may have been lost. A name that is
# another's by now stays the other's.
RESTORE_ACTOR = Script(
    _ENTER_ACTOR
    + """
if is_known() then
  if field('state') ~= 'dead' then
    redis.call('SADD', ACTORS, ACTOR_ID)
    redis.call('HSETNX', KEEPERS, ACTOR_ID, ARGV[9])
    if NAME_FIELD ~= '' then redis.call('HSETNX', NAMES, NAME_FIELD, ACTOR_ID) end
  end
  return 0
end
if NAME_FIELD ~= '' and redis.call('HSETNX', NAMES, NAME_FIELD, ACTOR_ID) == 0
   and redis.call('HGET', NAMES, NAME_FIELD) ~= ACTOR_ID then NAME, NAME_FIELD = '', '' end
local life, left = tonumber(ARGV[10]), tonumber(ARGV[6])
local state = ARGV[11] ~= '' and 'alive' or life > 0 and 'restarting' or 'pending'
if left > 0 then left = math.max(0, left - life) end
enter(state, left, ARGV[10])
redis.call('HSET', ACTOR, 'field:address', ARGV[11])
-- What it had logged is lost, until it takes a checkpoint: it is told so when it logs more (see APPEND_CALLS).
if state ~= 'pending' then redis.call('HSET', ACTOR, 'calls', '-1') end
redis.call('HSET', KEEPERS, ACTOR_ID, ARGV[9])
tell(state)
return 1
"""
)

# ARGV: actor_id, request, new state, time to live of the dead in s, number of expected states, these states, then
# field and value by turns. Returns 1 if the actor was in one of these states. `request` names this call, so that the
# same call sent twice succeeds twice.
UPDATE_ACTOR = Script(
    _ACTOR
    + """
local state = field('state')
if not state then return 0 end
if field('request') == ARGV[2] then return 1 end
if state == 'dead' and ARGV[3] ~= 'dead' then return 0 end
local expected_count = tonumber(ARGV[5])
local is_expected = expected_count == 0
for index = 6, 5 + expected_count do
  if ARGV[index] == state then is_expected = true end
end
if not is_expected then return 0 end
redis.call('HSET', ACTOR, 'state', ARGV[3], 'request', ARGV[2])
local event = {}
for index = 6 + expected_count, #ARGV, 2 do
  redis.call('HSET', ACTOR, 'field:' .. ARGV[index], ARGV[index + 1])
  event[#event + 1] = ARGV[index]
  event[#event + 1] = ARGV[index + 1]
end
if ARGV[3] == 'dead' then bury(ARGV[1], ARGV[4]) end
publish('actor_changed', 'actor_id', ARGV[1], 'state', ARGV[3], 'previous_state', state, unpack(event))
return 1
"""
)

# ARGV: actor_id, life, address, node that keeps it from now on ('': as before). Returns 1 if this life is the actor's,
# and it now lives there.
START_LIFE = Script(
    _ACTOR
    + """
local state = field('state')
if not state or state == 'dead' or field('field:life') ~= ARGV[2] then return 0 end
if state == 'alive' then return field('field:address') == ARGV[3] and 1 or 0 end
redis.call('HSET', ACTOR, 'state', 'alive', 'field:address', ARGV[3])
if ARGV[4] ~= '' then keep(ARGV[1], ARGV[4]) end
publish('actor_changed', 'actor_id', ARGV[1], 'state', 'alive', 'previous_state', state, 'address', ARGV[3],
        'life', ARGV[2])
return 1
"""
)

# ARGV: actor_id, request (the same when asked again), life, text, who says so (`creator`; `host`: the node it ran on,
# or that made it; `orphan`: anybody, its keeper's node being gone), node that shall keep it, time to live of the dead
# in s, the address where it ended ('': it had none yet). Returns the outcome: `restart` the caller shall start the next
# life, `dead`, or `none`: nothing changed.
END_LIFE = Script(
    _ACTOR
    + """
local state = field('state')
if not state then return 'none' end
local life = number_of(field('field:life'))
if field('request') == ARGV[2] and (state == 'dead' or (state == 'restarting' and life == tonumber(ARGV[3]) + 1)) then
  return field('outcome')
end
if state == 'dead' or life ~= tonumber(ARGV[3]) then return 'none' end
local is_detached = field('is_detached') == '1'
local address = field('field:address') or ''
-- Of a detached actor whose start in this life was lost with the server's last second nobody else would tell the end.
if ARGV[8] ~= '' and address ~= ARGV[8] and not (is_detached and address == '') then return 'none' end
local left = number_of(field('restarts_left'))
if ARGV[5] == 'host' and not is_detached and field('restarts') ~= '0' then return 'none' end
if ARGV[5] == 'orphan' then
  if has_keeper(ARGV[1]) then return 'none' end
  if not is_detached then left = 0 end
end
if is_detached and not redis.call('HGET', INCARNATIONS, ARGV[6]) then return 'none' end
local outcome = left == 0 and 'dead' or 'restart'
redis.call('HSET', ACTOR, 'request', ARGV[2], 'outcome', outcome, 'field:address', '')
if outcome == 'dead' then
  local text = ARGV[4]
  local history = field('field:history')
  if history then text = text .. '; it had been started again after: ' .. string.sub(history, 1, -2) end
  redis.call('HSET', ACTOR, 'state', 'dead', 'field:text', text)
  bury(ARGV[1], ARGV[7])
else
  remember(ARGV[4])
  if left > 0 then redis.call('HSET', ACTOR, 'restarts_left', left - 1) end
  redis.call('HSET', ACTOR, 'state', 'restarting', 'field:text', ARGV[4],
             'field:life', string.format('%.0f', tonumber(ARGV[3]) + 1))
  if ARGV[6] ~= '' then keep(ARGV[1], ARGV[6]) end
end
publish('actor_changed', 'actor_id', ARGV[1], 'state', field('state'), 'previous_state', state,
        'life', field('field:life'))
return outcome
"""
)

# Of the two scripts that only the actor's own life may run, ARGV[1]: that life. They return `ok`, `fenced` (another
# life is the actor's), `gone` (it is dead), `gap` (something before is missing).
_OF_LIFE = (
    _ACTOR
    + """
local state = field('state')
if not state or state == 'dead' then return 'gone' end
if field('field:life') ~= ARGV[1] then return 'fenced' end
"""
)

# ARGV: life, number of the first call, calls. A gap, too, is when calls that had been logged are there no more.
APPEND_CALLS = Script(
    _OF_LIFE
    + """
local calls, first = number_of(field('calls')), tonumber(ARGV[2])
if first > calls + 1 or redis.call('LLEN', LOG) ~= calls - number_of(field('checkpoint_calls')) then return 'gap' end
for index = 3, #ARGV do
  if first + index - 3 == calls + 1 then
    redis.call('RPUSH', LOG, ARGV[index])
    calls = calls + 1
  end
end
redis.call('HSET', ACTOR, 'calls', string.format('%.0f', calls))
return 'ok'
"""
)

# ARGV: life, number of the last call that the checkpoint covers, number of its chunks, which are written already.
STORE_CHECKPOINT = Script(
    _OF_LIFE
    + """
local covered, count = tonumber(ARGV[2]), tonumber(ARGV[3])
local before = number_of(field('checkpoint_calls'))
if count > 0 and field('checkpoint_calls') == ARGV[2] then return 'ok' end
for number = 0, count - 1 do
  if redis.call('PERSIST', CREATION .. ':' .. ARGV[2] .. ':' .. number) == 0 then return 'gap' end
end
drop_checkpoint()
if number_of(field('calls')) <= covered then
  redis.call('HSET', ACTOR, 'calls', ARGV[2])
  redis.call('DEL', LOG)
else
  redis.call('LTRIM', LOG, covered - before, -1)
end
redis.call('HSET', ACTOR, 'checkpoint_calls', ARGV[2], 'checkpoint_chunks', ARGV[3])
return 'ok'
"""
)
