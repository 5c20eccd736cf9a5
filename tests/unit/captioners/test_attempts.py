"""A captioner above the store: what is described is committed, and every failure costs what it must and no more."""

from __future__ import annotations

import pyarrow as pa
import pytest

from urbanclip_ray.captioners import attempts
from urbanclip_ray.captioners.attempts import LoadedCaptioner, ProcessDeathError, StoredCaptioner
from urbanclip_ray.captioners.base import DeadEngineError, Origin, Tile, TransientError, UnusableCaptionerError
from urbanclip_ray.captioners.store import CaptionStore
from urbanclip_ray.config import PixelsConfig

ORIGIN = Origin("model", "1", "prompt", {"max_new_tokens": 8})
NAMES = tuple("abcdefgh")


class Death(BaseException):
    """The end of a process, as far as a test in one process can have it: nothing after it is executed."""


class Counting:
    """A captioner that says what it sees and remembers whom it was asked about."""

    def __init__(self, num_samples: int = 1) -> None:
        self.num_samples = num_samples
        self.asked: list[str] = []
        self.loads = 0
        self.said: list[str] = []

    def load(self) -> Counting:
        self.loads += 1
        return self

    def describe(self, tiles):
        self.asked.append("".join(tile.tile_id for tile in tiles))
        outcomes = [self.outcome(tile) for tile in tiles]
        self.said += [tile.tile_id for tile, outcome in zip(tiles, outcomes, strict=True) if isinstance(outcome, list)]
        return outcomes

    def outcome(self, tile):
        return [f"{tile.image!r} {n}" for n in range(self.num_samples)]


def tiles(*names: str) -> list[Tile]:
    return [Tile(name, name.rstrip("'").encode(), PixelsConfig()) for name in names]  # a and a' have the same bytes


def stored(uri, captioner: Counting, job: str = "j") -> StoredCaptioner:
    store = CaptionStore(str(uri), ORIGIN)
    return StoredCaptioner(store, captioner.num_samples, LoadedCaptioner(captioner.load, store, job), job)


def live_on(uri, captioner: Counting, names=NAMES, job: str = "j") -> tuple[list, int]:
    """Describe one batch as Ray does: after each death a new process gets the same batch. Outcomes and the deaths."""
    for deaths in range(50):
        try:
            return stored(uri, captioner, job).describe(tiles(*names)), deaths
        except Death:
            continue  # the next process
    raise AssertionError("it dies for ever")


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(attempts, "FIRST_WAIT_S", 0.0)


def test_a_batch_is_described_at_once_and_committed_in_one_file(tmp_path):
    captioner = Counting()
    assert stored(tmp_path, captioner).describe(tiles("a", "b")) == [["b'a' 0"], ["b'b' 0"]]
    assert (captioner.asked, captioner.loads) == (["ab"], 1)
    assert len(list(tmp_path.rglob("*.parquet"))) == 1


def test_tiles_of_the_same_bytes_are_described_once(tmp_path):
    captioner = Counting()
    first, second, other = stored(tmp_path, captioner).describe(tiles("a", "a'", "b"))
    assert first == second != other
    assert len(captioner.said) == 2


def test_a_batch_that_comes_again_is_found_and_the_captioner_is_not_even_loaded(tmp_path):
    first = stored(tmp_path, Counting(2)).describe(tiles("a", "b"))
    again = Counting(2)
    assert stored(tmp_path, again).describe(tiles("a", "b")) == first
    assert again.loads == 0


def test_an_error_of_one_tile_is_recorded_with_its_reason_and_tried_again_by_the_next_job(tmp_path):
    class Broken(Counting):
        def outcome(self, tile):
            return ValueError("too long") if tile.tile_id == "b" else super().outcome(tile)

    good, bad = stored(tmp_path, Broken()).describe(tiles("a", "b"))
    assert (good, str(bad)) == (["b'a' 0"], "too long")
    store = CaptionStore(str(tmp_path), ORIGIN)
    (row,) = store.read_failed().to_pylist()
    assert (row["tile_id"], row["reason"], row["num_attempts"]) == ("b", "too long", 1)
    assert stored(tmp_path, Counting(), job="k").describe(tiles("b")) == [["b'b' 0"]]


def test_a_tile_that_ends_the_process_stands_alone_in_the_end_and_all_others_are_described_once(tmp_path):
    class Deadly(Counting):
        def describe(self, tiles):
            if any(tile.tile_id == "f" for tile in tiles):
                self.asked.append("".join(tile.tile_id for tile in tiles))
                raise Death
            return super().describe(tiles)

    captioner = Deadly()
    outcomes, deaths = live_on(tmp_path, captioner)
    assert captioner.asked == ["abcdefgh", "abcd", "efgh", "ef", "e", "f", "f", "f", "gh"]
    assert deaths == 6  # in groups of 8, 4 and 2, and three times alone
    bad = outcomes.pop(5)
    assert isinstance(bad, ProcessDeathError)
    assert str(bad) == "the captioner's process died on it 3 times"
    assert outcomes == [[f"b'{name}' 0"] for name in "abcdegh"]
    assert sorted(captioner.said) == list("abcdegh")
    (row,) = CaptionStore(str(tmp_path), ORIGIN).read_failed().to_pylist()
    assert (row["tile_id"], row["num_attempts"]) == ("f", 3)


def test_a_process_that_dies_for_reasons_of_its_own_costs_one_more_try(tmp_path):
    class Unlucky(Counting):
        def describe(self, tiles):
            if not self.asked:
                self.asked.append("".join(tile.tile_id for tile in tiles))
                raise Death
            return super().describe(tiles)

    captioner = Unlucky()
    outcomes, deaths = live_on(tmp_path, captioner)
    assert (deaths, captioner.asked) == (1, ["abcdefgh", "abcd", "efgh"])
    assert all(isinstance(outcome, list) for outcome in outcomes)


def test_texts_committed_before_the_process_could_say_so_are_not_generated_again(tmp_path, monkeypatch):
    captioner = Counting()
    commit = StoredCaptioner._commit

    def commit_and_die(self, *arguments):
        commit(self, *arguments)
        if len(captioner.asked) == 1:
            raise Death

    monkeypatch.setattr(StoredCaptioner, "_commit", commit_and_die)
    outcomes, deaths = live_on(tmp_path, captioner)
    assert (deaths, captioner.asked) == (1, ["abcdefgh"])
    assert all(isinstance(outcome, list) for outcome in outcomes)


def test_deaths_of_one_job_are_none_of_the_next(tmp_path):
    class Deadly(Counting):
        def describe(self, tiles):
            raise Death

    with pytest.raises(Death):
        stored(tmp_path, Deadly()).describe(tiles(*NAMES))
    captioner = Counting()
    stored(tmp_path, captioner, job="k").describe(tiles(*NAMES))
    assert captioner.asked == ["abcdefgh"]


def test_a_model_that_ends_the_process_while_it_is_loaded_is_unusable_and_no_tile_is_blamed(tmp_path):
    class Heavy(Counting):
        def load(self):
            self.loads += 1
            raise Death

    captioner = Heavy()
    outcomes, deaths = live_on(tmp_path, captioner)
    assert (deaths, captioner.loads) == (3, 3)
    assert all(isinstance(outcome, UnusableCaptionerError) for outcome in outcomes)
    assert "died 3 times while it loaded the model" in str(outcomes[0])
    assert CaptionStore(str(tmp_path), ORIGIN).read_failed().num_rows == 0


def test_what_may_pass_is_tried_again_and_only_the_tiles_that_it_kept_back(tmp_path):
    class Flaky(Counting):
        def outcome(self, tile):
            tries = sum(tile.tile_id in asked for asked in self.asked)
            if tile.tile_id == "b" and tries < 3:
                return TransientError("busy")
            return TransientError("never") if tile.tile_id == "c" else super().outcome(tile)

    captioner = Flaky()
    outcomes = stored(tmp_path, captioner).describe(tiles("a", "b", "c"))
    assert captioner.asked == ["abc", "bc", "bc"]
    assert (outcomes[1], str(outcomes[2])) == (["b'b' 0"], "never")
    (row,) = CaptionStore(str(tmp_path), ORIGIN).read_failed().to_pylist()
    assert (row["tile_id"], row["num_attempts"]) == ("c", 3)


def test_a_dead_engine_is_loaded_anew(tmp_path):
    class Mortal(Counting):
        def describe(self, tiles):
            if self.loads == 1:
                raise DeadEngineError("the engine is gone")
            return super().describe(tiles)

    captioner = Mortal()
    assert stored(tmp_path, captioner).describe(tiles("a", "b")) == [["b'a' 0"], ["b'b' 0"]]
    assert captioner.loads == 2


def test_an_exception_that_is_raised_is_narrowed_down_to_its_tile(tmp_path):
    class Raising(Counting):
        def describe(self, tiles):
            if any(tile.tile_id == "c" for tile in tiles):
                raise IndexError("out of range")
            return super().describe(tiles)

    captioner = Raising()
    outcomes = stored(tmp_path, captioner).describe(tiles(*NAMES))
    assert str(outcomes[2]) == "the captioner failed: IndexError out of range"
    assert [isinstance(outcome, list) for outcome in outcomes].count(True) == 7
    assert captioner.said == [name for name in NAMES if name != "c"]


def test_a_captioner_that_cannot_be_loaded_is_tried_once_and_says_so_for_every_tile(tmp_path):
    class Absent(Counting):
        def load(self):
            self.loads += 1
            raise UnusableCaptionerError("caption.model=x cannot be loaded")

    absent = Absent()
    captioner = stored(tmp_path, absent)
    for error in [*captioner.describe(tiles("a", "b")), *captioner.describe(tiles("c"))]:
        assert isinstance(error, UnusableCaptionerError)
    assert absent.loads == 1
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_captioner_that_two_prompts_share_is_loaded_once_and_its_texts_are_kept_by_prompt(tmp_path):
    captioner = Counting()
    first, second = (CaptionStore(str(tmp_path), ORIGIN._replace(prompt=prompt)) for prompt in ("roads?", "trees?"))
    shared = LoadedCaptioner(captioner.load, first, "j")
    for store in (first, second):
        assert StoredCaptioner(store, 1, shared, "j").describe(tiles("a")) == [["b'a' 0"]]
    assert (captioner.loads, captioner.asked) == (1, ["a", "a"])
    assert [len(store.folder.parts()) for store in (first, second)] == [1, 1]


def test_too_few_texts_are_a_mistake_of_the_captioner_s_code(tmp_path):
    store = CaptionStore(str(tmp_path), ORIGIN)
    captioner = StoredCaptioner(store, 2, LoadedCaptioner(Counting(1).load, store))
    with pytest.raises(AssertionError, match="gave 1 texts for a tile instead of 2"):
        captioner.describe(tiles("a"))


def test_more_samples_keep_the_ones_there_are(tmp_path):
    class Otherwise(Counting):
        def outcome(self, tile):
            return [f"other {n}" for n in range(self.num_samples)]

    stored(tmp_path, Counting()).describe(tiles("a"))
    stored(tmp_path, Otherwise(3), job="k").describe(tiles("a"))
    texts = CaptionStore(str(tmp_path), ORIGIN).texts_of(pa.array([tiles("a")[0].sha256]), 3)
    assert texts.to_pylist() == ["b'a' 0", "other 1", "other 2"]
