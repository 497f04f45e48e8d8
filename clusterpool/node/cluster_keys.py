"""The CURVE keys of a cluster: made once by `clusterpool up`, held by every node, by nobody else."""

from __future__ import annotations

import json
from pathlib import Path

from clusterpool.errors import AuthenticationFailed


class ClusterKeys:
    """The key pairs of one cluster: all nodes share them, and nobody else has them."""

    def __init__(self, server: tuple[bytes, bytes], client: tuple[bytes, bytes]) -> None:
        self.server_public, self.server_secret = server
        self.client_public, self.client_secret = client

    @classmethod
    def generate(cls) -> ClusterKeys:
        """New keys."""
        import zmq  # 40 ms, which reading keys does not need

        return cls(zmq.curve_keypair(), zmq.curve_keypair())

    def to_json(self) -> str:
        """The text of a keys file (mode 0600)."""
        pairs = {
            "server": [self.server_public.decode(), self.server_secret.decode()],
            "client": [self.client_public.decode(), self.client_secret.decode()],
        }
        return json.dumps(pairs)

    @classmethod
    def read(cls, path: str | Path) -> ClusterKeys:
        """Raises: AuthenticationFailed when the file is missing or no keys file."""
        try:
            return cls.from_json(Path(path).read_text())
        except (OSError, ValueError) as exc:
            raise AuthenticationFailed(
                f"the cluster's keys could not be read from {path}: {exc}; copy the file that `clusterpool up` made"
            ) from exc

    @classmethod
    def from_json(cls, text: str) -> ClusterKeys:
        """Raises: ValueError for a text that `to_json` did not make."""
        try:
            pairs = json.loads(text)
            (server_public, server_secret), (client_public, client_secret) = pairs["server"], pairs["client"]
            keys = [key.encode("ascii") for key in (server_public, server_secret, client_public, client_secret)]
        except (KeyError, TypeError, AttributeError, ValueError) as exc:
            raise ValueError(f"it holds no two pairs of keys ({type(exc).__name__})") from exc
        if any(len(key) != _KEY_BYTES for key in keys):
            raise ValueError(f"a key has {_KEY_BYTES} characters")
        return cls((keys[0], keys[1]), (keys[2], keys[3]))


_KEY_BYTES = 40  # of Z85 text
