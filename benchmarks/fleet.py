"""What a large fleet asks of the supervisor and of the params store, on this machine alone.

    python benchmarks/fleet.py supervisor [--actors 300] [--seconds 60] [--report-seconds 1] [--json F]
    python benchmarks/fleet.py params [--pullers 512] [--params 1700000] [--seconds 60] [--json F]

supervisor: a whole run with so many actors, each a Ray process of its own that the supervisor starts, hears and ends as any other, but
which plays nothing; learner, shard, store and evaluator are real and idle. It prints what the driver takes of a core once all are
there. `--report-seconds` has actors report so often, in place of what the supervisor chooses for such a fleet. An actor takes
about 45 MB: 300 of them 14 GB.

params: so many readers, over eight processes, that look once a second each, as actors do, while a new version is published every
second. It prints what the store's process takes of a core, how old a version is when a reader has it, how many of the published
versions readers skip, and what the object store holds.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deploy import ray_environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("supervisor", "params"))
    parser.add_argument("--actors", type=int, default=300)
    parser.add_argument("--report-seconds", type=float)
    parser.add_argument("--pullers", type=int, default=512)
    parser.add_argument("--params", type=int, default=1_700_000)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    ray_environment.prepare()
    from benchmarks import fleet_measures  # It imports Ray.

    if arguments.what == "supervisor":
        found = fleet_measures.measure_supervisor(arguments.actors, arguments.seconds, arguments.report_seconds)
    else:
        found = fleet_measures.measure_params(arguments.pullers, arguments.params, arguments.seconds)
    print(json.dumps(found, indent=2))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
