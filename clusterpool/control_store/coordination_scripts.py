"""The Lua scripts of semaphores, channels and cells.

Of every script KEYS[1] is the hash in which the answer to the node's last operation is kept, ARGV[1] the prefix of the
cluster's keys, ARGV[2] the operation's number (counted by the node), ARGV[3] mostly the carrier's name. All keys of a
cluster share a slot (see keys.py), so that a script may find other keys by itself.

Invariant: who waits for a carrier waits for good reason: while its list of waiters has an entry, its value is 0.
"""

from __future__ import annotations

from clusterpool.control_store.scripts import Script

# How long a job that ended is remembered, so that a late worker of it cannot leave something behind.
ENDED_JOB_TTL_S = 3600
# A lost answer is asked for again within seconds; what a node leaves behind must go at last.
LAST_OPERATION_TTL_S = 86400

_LIBRARY = """
local PREFIX, NAME = ARGV[1], ARGV[3]

-- The client sends an operation again when the connection broke before the answer: then the answer is repeated.
local saved = redis.call('HMGET', KEYS[1], 'number', 'answer')
if saved[1] == ARGV[2] then return cmsgpack.unpack(saved[2]) end
local function done(...)
  local answer = {...}
  redis.call('HSET', KEYS[1], 'number', ARGV[2], 'answer', cmsgpack.pack(answer))
  redis.call('EXPIRE', KEYS[1], LAST_OPERATION_TTL_S)
  return answer
end

local function carrier(name) return PREFIX .. 'carrier:' .. name end
local function waiters(name) return PREFIX .. 'waiters:' .. name end
local function items(name) return PREFIX .. 'items:' .. name end
-- A waiter is '<life>/<process>/<request>', a life '<node>@<incarnation>' (without the number where a node is alone).
local function life_of(waiter) return string.match(waiter, '^[^/]+') end
local function node_of(waiter) return string.match(waiter, '^[^/@]+') end
-- Of one life: what each wait of its processes has, 'w:<name>' while it waits, 'h<token>:<name>' while it holds that.
local function waits(waiter) return PREFIX .. 'waits:' .. life_of(waiter) end
-- 'w' or 'h', the token and the name; nothing if it has nothing.
local function state_of(waiter)
  return string.match(redis.call('HGET', waits(waiter), waiter) or '', '^([wh])(%d*):(.*)$')
end
local function grants(node_id) return PREFIX .. 'grants:' .. node_id end
-- The incarnation under which a node is registered, or false.
local function registered(node_id) return redis.call('HGET', PREFIX .. 'node_incarnations', node_id) end
-- Whoever asks has been declared dead: it would lose at once what it got.
local function is_over(waiter)
  local incarnation = string.match(life_of(waiter), '@(.+)$')
  return incarnation and registered(node_of(waiter)) ~= incarnation
end
-- It is not when one of its keys is another's.
local function is_there(name)
  redis.call('LLEN', waiters(name))
  redis.call('LLEN', items(name))
  return redis.call('HLEN', carrier(name)) > 0
end

-- Give a token to a waiter, who holds it from then on; but those of kind 'semaphore' are signals, which nobody holds.
local function grant(name, waiter)
  local token = redis.call('HINCRBY', carrier(name), 'token', 1)
  local base = tonumber(redis.call('GET', PREFIX .. 'token_base')) or 0
  if token <= base then
    token = base + 1
    redis.call('HSET', carrier(name), 'token', string.format('%.0f', token))
  end
  local kind = redis.call('HGET', carrier(name), 'kind')
  if kind == 'semaphore' then
    redis.call('HDEL', waits(waiter), waiter)
  else
    redis.call('HSET', waits(waiter), waiter, string.format('h%.0f:%s', token, name))
    if kind == 'lock' then redis.call('HSET', carrier(name), 'holder', waiter) end
  end
  return token
end

-- There is one token more: for the first who waits, or for whoever comes.
local function free(name)
  if not is_there(name) then return end
  local waiter = redis.call('LPOP', waiters(name))
  if not waiter then
    redis.call('HINCRBY', carrier(name), 'value', 1)
    return
  end
  local token = grant(name, waiter)
  redis.call('XADD', grants(node_of(waiter)), '*', 'waiter', waiter, 'name', name, 'token', token)
end

-- Tokens that processes of the home had when the carrier moved are held by '<home>/thin/<name>#1' and so on.
local function forget_thin(name, holder)
  if string.find(holder, '/thin/', 1, true) then redis.call('HINCRBY', carrier(name), 'thin', -1) end
end

-- The holder of a lock, whoever it was, holds it no more.
local function clear_holder(name)
  local holder = redis.call('HGET', carrier(name), 'holder')
  if holder then
    redis.call('HDEL', carrier(name), 'holder')
    redis.call('HDEL', waits(holder), holder)
    forget_thin(name, holder)
  end
end

-- '<home>/thin' stands for the last of those; who holds nothing any more, since it was taken for dead, gets false.
local function holder_of(name, holder)
  if string.match(holder, '^[^/]+/thin$') then
    holder = holder .. '/' .. name .. '#' .. (redis.call('HGET', carrier(name), 'thin') or 0)
  end
  local state, _, held = state_of(holder)
  return state == 'h' and held == name and holder
end

-- A wait is over without success: it waits, and holds, no more.
local function undo(waiter)
  local state, _, name = state_of(waiter)
  if not state then return 0 end
  redis.call('HDEL', waits(waiter), waiter)
  if state == 'w' then
    redis.call('LREM', waiters(name), 1, waiter)
  elseif is_there(name) and redis.call('HGET', carrier(name), 'kind') ~= 'semaphore' then
    redis.call('HDEL', carrier(name), 'holder')
    forget_thin(name, waiter)
    free(name)
  end
  return 1
end

-- Take a token for `waiter`, or have it wait: the token, 0 (there is none), or -1 (it waits).
local function take(waiter, is_patient)
  if tonumber(redis.call('HGET', carrier(NAME), 'value')) > 0 then
    redis.call('HINCRBY', carrier(NAME), 'value', -1)
    return grant(NAME, waiter)
  end
  if not is_patient then return 0 end
  redis.call('RPUSH', waiters(NAME), waiter)
  redis.call('HSET', waits(waiter), waiter, 'w:' .. NAME)
  return -1
end
""".replace("LAST_OPERATION_TTL_S", str(LAST_OPERATION_TTL_S))

# KEYS[1]: which run of a server was used last. ARGV: the key of the token base, this run. A server that was restarted,
# or has taken over, may hold an older state than the one from which tokens were granted. They are never granted twice
# all the same: from now on they are above any that time can have brought (2^20 a second are more than a server can).
ENTER_RUN = Script(
    """
local last = redis.call('GET', KEYS[1])
if last == ARGV[2] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
if not last then return 0 end
redis.call('SET', ARGV[1], string.format('%.0f', tonumber(redis.call('TIME')[1]) * 1048576))
return 1
"""
)

_KNOWN = "if not is_there(NAME) then return {-2} end\n"

# ARGV: ..., name, kind, maximum, count, content, life of its home ('': nobody's), then the items. Returns 1, 0 when its
# job has ended, or 3: that life is over. Of a lock or guard, the content is '<home> <how many tokens processes there
# hold>'.
CREATE = Script(
    _LIBRARY
    + """
if ARGV[8] ~= '' and is_over(ARGV[8]) then return done(3) end
local job = string.match(NAME, '^[^-]+')
local lost_home = redis.call('GET', PREFIX .. 'ended_job:' .. job)
if lost_home and not registered(lost_home) then return done(0) end
if is_there(NAME) then return done(1) end
redis.call('SADD', PREFIX .. 'carriers:' .. job, NAME)
redis.call('HSET', carrier(NAME), 'kind', ARGV[4], 'maximum', ARGV[5], 'value', ARGV[6], 'token', 0)
if ARGV[4] == 'cell' then redis.call('HSET', carrier(NAME), 'version', 1, 'content', ARGV[7]) end
if ARGV[4] == 'lock' or ARGV[4] == 'guard' then
  local home, count = string.match(ARGV[7], '^(%S+) (%d+)$')
  for index = 1, tonumber(count or 0) do
    local holder = home .. '/thin/' .. NAME .. '#' .. index
    redis.call('HSET', waits(holder), holder, 'h0:' .. NAME)
    redis.call('HSET', carrier(NAME), 'thin', index, 'home', home)
    if ARGV[4] == 'lock' then redis.call('HSET', carrier(NAME), 'holder', holder) end
  end
end
for index = 9, #ARGV do redis.call('RPUSH', items(NAME), ARGV[index]) end
return done(1)
"""
)

# ARGV: ..., name, waiter, 1 if it waits. Returns {1, token}, {0}, {2} (it waits), {3} (its life is over), or {-2}: no
# such carrier.
ACQUIRE = Script(
    _LIBRARY
    + _KNOWN
    + """
local waiter = ARGV[4]
if is_over(waiter) then return done(3) end
local state, held = state_of(waiter)
if state == 'w' then return done(2) end
if state then return done(1, tonumber(held)) end
local token = take(waiter, ARGV[5] == '1')
if token > 0 then return done(1, token) end
return done(token == 0 and 0 or 2)
"""
)

# ARGV: ..., name, waiter, 1 if it waits. Returns {1, item}, {0}, {2}, {3} or {-2}, as above.
GET = Script(
    _LIBRARY
    + _KNOWN
    + """
local waiter = ARGV[4]
if is_over(waiter) then return done(3) end
local state = state_of(waiter)
if state == 'w' then return done(2) end
if not state then
  local token = take(waiter, ARGV[5] == '1')
  if token <= 0 then return done(token == 0 and 0 or 2) end
end
redis.call('HDEL', waits(waiter), waiter)
return done(1, redis.call('LPOP', items(NAME)))
"""
)

# ARGV: ..., name, waiter. Returns {1, item}: the one that was reserved for it; {0} when none is; {-2}.
POP = Script(
    _LIBRARY
    + _KNOWN
    + """
-- It may wait again, since what was reserved for it was given back.
if state_of(ARGV[4]) ~= 'h' then return done(0) end
redis.call('HDEL', waits(ARGV[4]), ARGV[4])
return done(1, redis.call('LPOP', items(NAME)))
"""
)

# ARGV: ..., name, waiter. Returns {1} if it waited; then it never gets anything.
CANCEL = Script(
    _LIBRARY
    + """
if state_of(ARGV[4]) ~= 'w' then return done(0) end
return done(undo(ARGV[4]))
"""
)

# ARGV: ..., name, waiter, token (0: whichever it has): what was granted to it did not reach it. Returns {1}, or {0}: it
# has that no more. Of signals the store does not know who has which.
GIVE_BACK = Script(
    _LIBRARY
    + """
if redis.call('HGET', carrier(NAME), 'kind') == 'semaphore' then
  free(NAME)
  return done(1)
end
local _, token = state_of(ARGV[4])
if ARGV[5] ~= '0' and ARGV[5] ~= token then return done(0) end
return done(undo(ARGV[4]))
"""
)

# ARGV: ..., name, maximum, who holds it ('' for a process that holds nothing: a lock may be released by any). Returns
# {1}, {0} when there were that many, {-2}, or {-3}: it held a token, which has been taken from it.
RELEASE = Script(
    _LIBRARY
    + _KNOWN
    + """
local kind = redis.call('HGET', carrier(NAME), 'kind')
if kind ~= 'semaphore' and ARGV[5] ~= '' then
  local holder = holder_of(NAME, ARGV[5])
  if not holder then return done(-3) end
  return done(undo(holder))
end
if tonumber(redis.call('HGET', carrier(NAME), 'value')) >= tonumber(ARGV[4]) then return done(0) end
if kind == 'lock' then clear_holder(NAME) else redis.call('HSET', carrier(NAME), 'kind', 'semaphore') end
free(NAME)
return done(1)
"""
)

# ARGV: ..., name, item, 'R' for the channel's end or 'L' for its front. Returns {1} or {-2}.
PUT = Script(
    _LIBRARY
    + _KNOWN
    + """
redis.call(ARGV[5] .. 'PUSH', items(NAME), ARGV[4])
free(NAME)
return done(1)
"""
)

# ARGV: ..., name, content, the lock that guards it or '', who holds that or ''. Returns {version}, {-2}, or {-3}: the
# lock has been taken from the writer.
WRITE_CELL = Script(
    _LIBRARY
    + _KNOWN
    + """
if ARGV[5] ~= '' and ARGV[6] ~= '' and redis.call('HGET', carrier(ARGV[5]), 'kind') ~= 'semaphore' then
  if not holder_of(ARGV[5], ARGV[6]) then return done(-3) end
end
redis.call('HSET', carrier(NAME), 'content', ARGV[4])
return done(redis.call('HINCRBY', carrier(NAME), 'version', 1))
"""
)

# ARGV: ..., the beginning of the process's waiters, 'life/process/'. Returns how many it had.
END_PROCESS = Script(
    _LIBRARY
    + """
local count = 0
for _, waiter in ipairs(redis.call('HKEYS', waits(NAME))) do
  if string.sub(waiter, 1, #NAME) == NAME then count = count + undo(waiter) end
end
return done(count)
"""
)

# ARGV: ..., life, 1 to do it though the life goes on. Returns how many waits it had. What the node has in another life,
# or is granted in it, stays.
END_NODE_LIFE = Script(
    _LIBRARY
    + """
local node, incarnation = node_of(NAME), string.match(NAME, '@(.+)$')
local current = registered(node)
if ARGV[4] ~= '1' and current and (not incarnation or current == incarnation) then return done(0) end
local count = 0
for _, waiter in ipairs(redis.call('HKEYS', waits(NAME))) do count = count + undo(waiter) end
redis.call('DEL', waits(NAME))
-- Tokens that the node has not read any more: those of plain semaphores nobody else would give back.
for _, entry in ipairs(redis.call('XRANGE', grants(node), '-', '+')) do
  local waiter, name = entry[2][2], entry[2][4]
  if life_of(waiter) == NAME then
    redis.call('XDEL', grants(node), entry[1])
    if redis.call('HGET', carrier(name), 'kind') == 'semaphore' then free(name) end
  end
end
if not current then
  if redis.call('XLEN', grants(node)) == 0 then redis.call('DEL', grants(node)) end
  if ARGV[4] ~= '1' then redis.call('DEL', PREFIX .. 'last_operation:' .. node) end
end
return done(count)
"""
)

# ARGV: ..., job_id, how long to remember its end, in s, its driver's node if only the loss of that is known, or ''.
# Returns how many carriers it had. A node that was taken for dead comes back with its drivers, and their jobs go on: it
# ends them itself.
DELETE_JOB = Script(
    _LIBRARY
    + """
if ARGV[5] ~= '' and registered(ARGV[5]) then return done(0) end
redis.call('SET', PREFIX .. 'ended_job:' .. NAME, ARGV[5], 'EX', ARGV[4])
local names = redis.call('SMEMBERS', PREFIX .. 'carriers:' .. NAME)
for _, name in ipairs(names) do
  for _, waiter in ipairs(redis.call('LRANGE', waiters(name), 0, -1)) do redis.call('HDEL', waits(waiter), waiter) end
  clear_holder(name)
  local thin = redis.call('HMGET', carrier(name), 'thin', 'home')
  for index = 1, tonumber(thin[1] or 0) do
    local holder = thin[2] .. '/thin/' .. name .. '#' .. index
    redis.call('HDEL', waits(holder), holder)
  end
  redis.call('UNLINK', carrier(name), waiters(name), items(name))
end
redis.call('DEL', PREFIX .. 'carriers:' .. NAME)
return done(#names)
"""
)
