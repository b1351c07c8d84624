"""Which records of a run a tracker has not received.

metrics.jsonl is written anew when workers start again: the records of steps that are trained again are cut, and come
once more. A resume is exact, so the figures of these steps and evaluations are those that the tracker has. A checkpoint
that is saved again is another one, and so is all else that happens again.
"""

from collections import Counter
from collections.abc import Iterable, Iterator

from clm_dist.files.record_types import Record

_LEFT_OUT = ("phase", "damaged")
"""A phase is for the display; after a damaged checkpoint the start says from which step the run goes on."""
_NEVER_CUT = ("start", "failure")
_FIGURES = ("step", "eval")


class Queue:
    """The records that are still to be sent.

    Args:
        sent: what was sent before: of starts and failures their number, of other kinds the last step. It changes with
            each record that is taken, so it may be kept with the records that a tracker has received.
        again: steps and evaluations that are made again are taken too.
    """

    def __init__(self, sent: dict[str, int], *, again: bool = False) -> None:
        self.sent = sent
        self._lasting = {*_NEVER_CUT, *(() if again else _FIGURES)}
        self._passed: Counter[str] = Counter()

    def unsent(self, records: Iterable[Record], *, is_anew: bool) -> Iterator[Record]:
        """Those of the next records that were not sent.

        Args:
            is_anew: they begin with the first of the file.
        """
        if is_anew:
            self._passed.clear()
        return filter(self._take, records)

    def _take(self, record: Record) -> bool:
        """Whether a record is new, which it is not any more then."""
        kind, step = record["kind"], record["step"]
        if kind in _LEFT_OUT:
            return False
        if kind in _NEVER_CUT:
            self._passed[kind] += 1
            place, last = self._passed[kind], self.sent.get(kind, 0)
        else:
            place, last = step, self.sent.get(kind, -1)
        if place <= last:
            return False
        self.sent[kind] = place
        if kind == "start":
            # What comes of later steps from here on has not been there yet; a start from step 0 keeps nothing.
            for other in self.sent.keys() - self._lasting:
                self.sent[other] = min(self.sent[other], step or -1)
        return True
