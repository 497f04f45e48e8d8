"""The control store: what must survive any one process, in a real Redis or Valkey server.

`server` starts a server, `store` speaks to one, `port` says what it can do, `keys` and `scripts` say how it
is laid out (docs/key-schema.md tells it at length). Nothing is imported here, because `import redis` is
slow and only the node and the command line need it.
"""
