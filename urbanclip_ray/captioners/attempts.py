"""From a batch of tiles to committed texts, whatever fails on the way: a tile, the model, or the process itself.

An error is handled where it is raised. A process that dies can handle nothing, so before a group of tiles is described a note
is left in the store, and the same batch, tried again by the process after it, finds the note but no texts: the group is
halved until the culprit stands alone, and that tile is given up after `max_attempts` deaths. Notes are of one job: the next
job tries everything anew.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from urbanclip_ray import metrics
from urbanclip_ray.captioners.base import Captioner, DeadEngineError, Tile, TransientError, UnusableCaptionerError
from urbanclip_ray.captioners.store import CaptionStore, FailedTile, StoredCaption
from urbanclip_ray.errors import one_line
from urbanclip_ray.storage import digest

FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 30.0  # between two attempts

Outcome = list[str] | Exception


class ProcessDeathError(RuntimeError):
    """A tile whose description ends the process, by a crash or for want of memory."""


class LoadedCaptioner:
    """A captioner that is loaded at first need, once for all that is asked of it.

    Deaths while it is loaded are noted in `notes`, the same store for all processes of a job. `worker` is a name that the
    process after a dead one has, too.
    """

    def __init__(
        self,
        load: Callable[[], Captioner],
        notes: CaptionStore,
        job: str = "none",
        worker: str = "driver",
        max_attempts: int = 3,
    ) -> None:
        self._load = load
        self._notes = notes
        self._job = job
        self._note = f"loading-{worker}"
        self._max_attempts = max_attempts
        self._captioner: Captioner | UnusableCaptionerError | None = None

    def get(self) -> Captioner | UnusableCaptionerError:
        if self._captioner is None:
            num_deaths = self._notes.count_attempts(self._job, self._note)
            try:
                if num_deaths >= self._max_attempts:
                    raise UnusableCaptionerError(
                        f"the captioner's process died {num_deaths} times while it loaded the model: if memory ran out, choose "
                        "a smaller model, a smaller caption.dtype or fewer caption.num_actors"
                    )
                self._notes.note_attempt(self._job, self._note, num_deaths + 1)
                self._captioner = self._load()
                self._notes.note_attempt(self._job, self._note, 0)
            except UnusableCaptionerError as error:
                self._captioner = error
        return self._captioner

    def drop(self, for_good: UnusableCaptionerError | None = None) -> None:
        """Load it anew at the next need, or never again."""
        self._captioner = for_good


class StoredCaptioner:
    """Commits what a captioner says to one prompt, a file for each group of tiles, and what it could not say.

    `tiles` that are described already are not left out: it is given what is missing.
    """

    def __init__(
        self,
        store: CaptionStore,
        num_samples: int,
        captioner: LoadedCaptioner,
        job: str = "none",
        max_attempts: int = 3,
        run: str = "",
    ) -> None:
        self.origin = store.origin
        self._store = store
        self._num_samples = num_samples
        self._captioner = captioner
        self._job = job
        self._max_attempts = max_attempts
        self._run = run  # its name in the metrics

    def describe(self, tiles: Sequence[Tile]) -> list[Outcome]:
        by_hash = {tile.sha256: tile for tile in tiles}  # equal tiles are described once
        outcomes = self._describe_group(by_hash)
        return [outcomes[tile.sha256] for tile in tiles]

    def _describe_group(self, tiles: dict[str, Tile]) -> dict[str, Outcome]:
        """Outcomes by sha256. Texts that a process committed before it died are found again."""
        if not tiles:
            return {}
        name = f"{self._job}-{digest(list(tiles))[:24]}"
        outcomes: dict[str, Outcome] = dict(self._store.read_group(name).items())
        if outcomes:
            return outcomes | self._describe_group({key: tile for key, tile in tiles.items() if key not in outcomes})
        num_deaths = self._store.count_attempts(self._job, name)
        if num_deaths and len(tiles) > 1:
            return self._describe_halves(tiles, self._describe_group)
        if num_deaths >= self._max_attempts:
            error = ProcessDeathError(f"the captioner's process died on it {num_deaths} times")
            self._commit(name, tiles, dict.fromkeys(tiles, error), num_deaths)
            return dict.fromkeys(tiles, error)
        captioner = self._captioner.get()  # before the note: a model that ends its process is no tile's fault
        if isinstance(captioner, UnusableCaptionerError):
            return dict.fromkeys(tiles, captioner)
        self._store.note_attempt(self._job, name, num_deaths + 1)
        outcomes, num_attempts = self._try_often(tiles)
        self._commit(name, tiles, outcomes, num_attempts)
        return outcomes

    def _try_often(self, tiles: dict[str, Tile]) -> tuple[dict[str, Outcome], int]:
        """Outcomes, and the number of attempts at those whose failure was transient."""
        outcomes: dict[str, Outcome] = {}
        left, wait_s = tiles, FIRST_WAIT_S
        for number in range(1, self._max_attempts + 1):
            outcomes |= self._try_once(left)
            left = {key: tile for key, tile in left.items() if isinstance(outcomes[key], TransientError)}
            if not left or number == self._max_attempts:
                break
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)
        return outcomes, number

    def _try_once(self, tiles: dict[str, Tile]) -> dict[str, Outcome]:
        captioner = self._captioner.get()
        if isinstance(captioner, UnusableCaptionerError):
            return dict.fromkeys(tiles, captioner)
        metrics.CAPTION_ATTEMPTS.add(len(tiles), run=self._run)
        start = time.monotonic()
        try:
            described = captioner.describe(list(tiles.values()))
        except DeadEngineError as error:
            self._captioner.drop()
            return dict.fromkeys(tiles, error)
        except TransientError as error:
            return dict.fromkeys(tiles, error)
        except UnusableCaptionerError as error:
            self._captioner.drop(for_good=error)
            return dict.fromkeys(tiles, error)
        except Exception as error:  # whatever a back end stumbles over: one tile's error must not be its batch's
            if len(tiles) == 1:
                return dict.fromkeys(tiles, RuntimeError(f"the captioner failed: {one_line(error)}"))
            return self._describe_halves(tiles, self._try_once)
        metrics.CAPTION_SECONDS.add(time.monotonic() - start, run=self._run)
        return dict(zip(tiles, described, strict=True))

    def _describe_halves(
        self, tiles: dict[str, Tile], describe: Callable[[dict[str, Tile]], dict[str, Outcome]]
    ) -> dict[str, Outcome]:
        items, half = list(tiles.items()), len(tiles) // 2
        return describe(dict(items[:half])) | describe(dict(items[half:]))

    def _commit(self, name: str, tiles: dict[str, Tile], outcomes: dict[str, Outcome], num_attempts: int) -> None:
        failed = []
        captions = []
        for key, outcome in outcomes.items():
            if isinstance(outcome, UnusableCaptionerError):
                continue
            if isinstance(outcome, Exception):
                is_tried_often = isinstance(outcome, TransientError | ProcessDeathError)
                attempts = num_attempts if is_tried_often else 1
                failed.append(FailedTile(key, tiles[key].tile_id, str(outcome), attempts))
                metrics.CAPTION_FAILURES.add(1, run=self._run, reason=type(outcome).__name__)
            elif len(outcome) != self._num_samples:
                raise AssertionError(f"the captioner gave {len(outcome)} texts for a tile instead of {self._num_samples}")
            else:
                captions += [StoredCaption(key, sample, text) for sample, text in enumerate(outcome)]
        self._store.add_failed(name, failed)
        self._store.add(name, captions)
        metrics.CAPTIONS.add(len(captions), run=self._run)
