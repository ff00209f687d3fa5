"""A role whose service times are known, on a clock that only it moves, and the theory of it."""

import math

SERVICE = 0.01


class OneServer:
    """A role of one thread that serves calls in order, each in `service` seconds; nothing takes time but it."""

    def __init__(self, service=SERVICE, stall=None):
        """stall: (from, to) seconds in which nothing is served."""
        self.now, self._free, self._service, self._stall = 0.0, 0.0, service, stall
        self._answers, self._next = {}, 0
        self.most_in_flight = 0

    def clock(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds

    def send(self, kind):
        begin = max(self._free, self.now)
        if self._stall is not None and self._stall[0] <= begin < self._stall[1]:
            begin = self._stall[1]
        self._free = begin + self._service
        self._next += 1
        self._answers[self._next] = self._free
        self.most_in_flight = max(self.most_in_flight, len(self._answers))
        return self._next

    def collect(self, tokens, timeout_seconds):
        first = min(self._answers.values())
        self.now = max(self.now, min(first, self.now + timeout_seconds))
        done = [token for token in tokens if self._answers[token] <= self.now]
        for token in done:
            del self._answers[token]
        return done


def waiting_quantile(load, part):
    """Time in the system of an M/D/1 queue that a part of its calls does not exceed, in service times; Erlang 1909.

    P(waiting <= t) = (1 - load) * sum over k = 0..floor(t) of (load (k - t))^k / k! * exp(-load (k - t))
    """

    def not_longer(t):
        terms = ((load * (k - t)) ** k / math.factorial(k) * math.exp(-load * (k - t)) for k in range(math.floor(t) + 1))
        return (1 - load) * sum(terms)

    low, high = 0.0, 40.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if not_longer(middle) < part else (low, middle)
    return 1.0 + low
