"""Real workers, real sockets, real network namespaces: what the relay loops promise, and no mock."""
