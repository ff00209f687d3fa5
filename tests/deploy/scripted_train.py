"""Stands in for `qfleet train` where tests of `qfleet scale` need its rows and not its learning: rows of metrics at given rates, a tenth of
a second of the run in two milliseconds of the test's, until SIGINT.

    python scripted_train.py SCRIPT.json train RECIPE --run-dir D ...

SCRIPT.json: env_steps_per_second by number of actors, and what else `main` reads of it. Every call adds a line to SCRIPT.json.calls.
"""

import json
import signal
import sys
import time
from pathlib import Path

PERIOD, PACE = 0.1, 0.002
FILLING, LEARNING = 10, 20  # Rows until the learner begins, and until all actors act.


def main(script_path, words):
    script = json.loads(Path(script_path).read_text())
    flags = {word: words[i + 1] for i, word in enumerate(words[:-1]) if word.startswith("--")}
    run_dir, actors = Path(flags["--run-dir"]), int(flags["--actors.num-actors"])
    with Path(f"{script_path}.calls").open("a") as calls:
        calls.write(json.dumps(words) + "\n")
    says = script.get("faults", {}).get(str(actors), {})
    if "refuses" in says:
        print(f"qfleet: {says['refuses']}", file=sys.stderr)
        sys.exit(2)
    asked = []
    signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    (run_dir / "replay").mkdir(parents=True)
    (run_dir / "replay" / "large").write_text("segments")
    rate = script["env_steps_per_second"][str(actors)]
    seconds = steps = updates = 0.0
    with (run_dir / "metrics.jsonl").open("a") as file:
        for number in range(1_000_000):
            if asked and not says.get("deaf"):
                print("the summary is written")
                print(f"qfleet: {says['ends']}" if "ends" in says else "see the summary")
                sys.exit(says.get("status", 130))
            if number >= says.get("silent_at", 1_000_000):
                time.sleep(0.01)
                continue
            if number == says.get("dies_at"):
                print("qfleet: the disk is full", file=sys.stderr)
                sys.exit(1)
            # Ten times as fast while the replay is filled, twice as fast until all actors act, and in the warm-up of a second.
            is_warm = number > LEARNING + 1.0 / PERIOD
            pace = 10 if number <= FILLING else 2 if not is_warm else 1
            seconds += PERIOD
            steps += rate * pace * PERIOD
            updates += rate / 4 * pace * PERIOD if number > FILLING else 0
            alive = says.get("alive", actors) if number > LEARNING else actors - 1
            row = {
                "time_seconds": seconds,
                "env_steps": steps,
                "updates": updates if number != says.get("restarts_at") else 0,
                "samples": 64 * updates,
                "actor/num_alive": alive,
                "learner/busy_fraction": 0.25 if is_warm else 0.9,
                "shard/busy_fraction": script.get("shard_busy", {}).get(str(actors), 0.1),
                "shard/busy_fraction_max": script.get("shard_busy", {}).get(str(actors), 0.1),
            }
            file.write(json.dumps(row) + "\n")
            file.flush()
            time.sleep(says.get("pace", PACE))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
