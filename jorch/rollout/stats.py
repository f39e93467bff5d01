"""What a sampler did: counted by lanes, by requests, in whatever thread."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class SamplerStats:
    """Work so far. `busy_s` counts the time in which at least one wave was under way."""

    busy_s: float = 0.0
    sampled_tokens: int = 0
    waves: int = 0
    _running: int = 0
    _since: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def wave(self) -> Iterator[None]:
        with self._lock:
            self._since = self._since if self._running else time.perf_counter()
            self._running += 1
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1
                self.busy_s += 0.0 if self._running else time.perf_counter() - self._since

    def count(self, num_tokens: int) -> None:
        with self._lock:
            self.sampled_tokens += num_tokens
            self.waves += 1
