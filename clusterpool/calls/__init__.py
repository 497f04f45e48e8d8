"""How a call of the standard library's kind (`map`, `imap`, `submit`) becomes tasks of a worker group."""
