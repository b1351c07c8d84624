"""The process of one tracker: reads metrics.jsonl while it grows, and hands its records over.

`python -m clm_dist.train.trackers.send NAME RUN LIMIT` goes on until its standard input is closed, by the driver or by
the driver's death, and then has LIMIT seconds. The file of records is the queue: a tracker that is slow gets the rest
later, and holds up nobody. What was sent is kept with the run's id in the run directory, so that the next start of the
run goes on where this one ended.
"""

import itertools
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import TypedDict, cast

from clm_dist.config.load import read_saved_job
from clm_dist.config.public import public_fields
from clm_dist.errors import first_line
from clm_dist.files.atomic import read_json, write_json
from clm_dist.files.records import RecordReader, read_records
from clm_dist.files.run_dir import RunDir
from clm_dist.signals import STOPS
from clm_dist.train.trackers.services import Tracker, load_tracker
from clm_dist.train.trackers.unsent import Queue

_INTERVAL_S = 1.0
_BATCH = 1000
"""Records after which it is kept that they were sent."""


class State(TypedDict):
    """What the run directory keeps of a tracker."""

    id: str
    """Of the tracker's run."""
    url: str | None
    sent: dict[str, int]
    """The records that the tracker has, see `Queue`."""


def send(name: str, tracker: Tracker, run: RunDir, ended: threading.Event) -> None:
    """Hand the run's records over until `ended` is set, and then what is left. Raises what the tracker raises."""
    file = run.tracker_state(name)
    state: State | None = cast(State, read_json(file)) if file.exists() else None
    job = read_saved_job(run.job)
    fields = {field: value for field, value, _ in public_fields(job)}
    run_id = tracker.start(job.name, fields, run.trackers, state["id"] if state else None)
    # What shows a run as it is, with nobody who remembers it, begins with all of its records, and goes back with it.
    live = getattr(tracker, "live", False)
    queue = Queue(state["sent"] if state and not live else {}, again=live)
    state = {"id": run_id, "url": tracker.url, "sent": queue.sent}
    write_json(file, state, private=True)
    reader = RecordReader(run.metrics)
    while True:
        # Read before the records are, so that none comes after the last look.
        is_last = ended.is_set()
        records, is_anew = reader.new()
        # Where workers started again, the reader begins with that.
        unsent = queue.unsent(read_records(run.metrics) if is_anew else records, is_anew=is_anew)
        while batch := list(itertools.islice(unsent, _BATCH)):
            tracker.add(batch)
            write_json(file, state, private=True)
        if is_last:
            break
        ended.wait(_INTERVAL_S)
    tracker.finish(read_json(run.result)["status"] if run.result.exists() else "failed")
    if live:
        # Its address ends with it.
        file.unlink()


def main() -> None:
    name, root, limit_s = sys.argv[1:]
    # The driver says when it ends. A library that it starts takes these over.
    for number in (*STOPS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    ended = threading.Event()

    def await_end() -> None:
        sys.stdin.buffer.read()
        # Ends the process, whatever it waits for by then.
        signal.setitimer(signal.ITIMER_REAL, float(limit_s))
        ended.set()

    threading.Thread(target=await_end, daemon=True).start()
    try:
        send(name, load_tracker(name)(), RunDir(Path(root)), ended)
    except BaseException as error:
        traceback.print_exc()
        print(f"{type(error).__name__}: {first_line(error)}", file=sys.stderr, flush=True)
        # Without what libraries do at an exit: it may wait for a server.
        os._exit(1)


if __name__ == "__main__":
    main()
