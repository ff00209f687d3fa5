"""The command line with a bottleneck in it: `faulty_run.py KIND train RECIPE ...`. What is defined here, Ray pickles by value."""

import sys
import time

from deploy import ray_environment

SHARD_SECONDS = 0.05
NETWORK_SECONDS = 0.15


def make_slow_shard(*arguments):
    """A shard whose every draw takes long."""
    from deploy.roles import make_shard

    shard = make_shard(*arguments)
    draw = shard._sample

    def slow(num_items):
        time.sleep(SHARD_SECONDS)
        return draw(num_items)

    shard._sample = slow
    return shard


def main():
    kind, *words = sys.argv[1:]
    ray_environment.prepare()
    from deploy import ray_handles, roles, supervisor

    class FarReader(ray_handles.RayReplayReader):
        """A shard at the end of a slow network: an answer arrives late, and the shard is idle meanwhile."""

        def request(self, num_items):
            self.__dict__.setdefault("sent", []).append(time.monotonic())
            super().request(num_items)

        def collect(self, timeout_seconds):
            rest = self.sent[0] + NETWORK_SECONDS - time.monotonic()
            if rest > timeout_seconds:
                time.sleep(timeout_seconds)
                return None
            time.sleep(max(rest, 0.0))
            reply = super().collect(timeout_seconds)
            if reply is not None:
                self.sent.pop(0)
            return reply

    if kind == "shard":
        roles.make_shard = make_slow_shard
    elif kind == "network":
        supervisor.RayReplayReader = FarReader
    else:
        assert kind == "none", kind
    from deploy.cli import main as command_line

    return command_line(words)


if __name__ == "__main__":
    sys.exit(main())
