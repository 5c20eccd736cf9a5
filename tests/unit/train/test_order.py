"""The order of training rows: every row once per epoch, wherever the run was cut and however many ranks went on."""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from urbanclip_ray.config import TrainConfig
from urbanclip_ray.train import order as order_module
from urbanclip_ray.train.order import EpochRows, Order
from urbanclip_ray.train.progress import Progress
from urbanclip_ray.train.shards import count_steps

FILES = st.lists(st.integers(1, 30), min_size=1, max_size=8)
SEEDS = st.integers(0, 1000)


def configure(seed=0, epochs=1, rows_per_step=2, window=8):
    return TrainConfig(
        seed=seed,
        epochs=epochs,
        micro_batch_size=rows_per_step,
        contrastive_batch_size=rows_per_step,
        global_batch_size=rows_per_step,
        shuffle_window_rows=window,
    )


def pairs(rows: EpochRows) -> list[tuple[int, int]]:
    return list(zip(rows.place.tolist(), rows.epoch.tolist(), strict=True))


def take(order: Order, num_ranks: int, until: int | None = None) -> list[list[list[tuple[int, int]]]]:
    """(place, epoch) of every rank's rows, step by step; ranks agree on the numbers and epochs of steps."""
    ranks = [[step for step in order.steps(rank) if until is None or step.step < until] for rank in range(num_ranks)]
    last = order.num_steps if until is None else until
    for steps in ranks:
        assert [step.step for step in steps] == list(range(order.first_step, last))
        assert [step.epoch for step in steps] == [step.epoch for step in ranks[0]]
    return [[pairs(step.rows) for step in steps] for steps in ranks]


def flat(ranks) -> list[tuple[int, int]]:
    return [pair for steps in ranks for step in steps for pair in step]


def restart(order: Order, step: int) -> Progress:
    """Through the JSON of a checkpoint."""
    return Progress.from_json(json.loads(json.dumps(order.progress_after(step).to_json())))


class PlainEpoch(NamedTuple):
    """An epoch as it is defined, one after another: the rows of its steps, the rows left over, and each rank's share."""

    rows: list[tuple[int, int]]
    carried: list[tuple[int, int]]
    ranks: list[list[tuple[int, int]]]


def plain_epoch(files, seed, epoch, carried, rows_per_step, num_ranks, window) -> PlainEpoch:
    starts = [sum(files[:number]) for number in range(len(files))]
    rows = list(carried)
    for file in np.random.default_rng([seed, epoch]).permutation(len(files)):
        rows += [(starts[file] + at, epoch) for at in range(files[file])]
    used = len(rows) // rows_per_step * rows_per_step
    span = used // num_ranks
    ranks = []
    for rank in range(num_ranks):
        random = np.random.default_rng([seed, epoch, rank])
        mine = []
        for first in range(0, span, window):
            here = rows[rank * span + first : rank * span + min(first + window, span)]
            mine += [here[at] for at in random.permutation(len(here))]
        ranks.append(mine)
    return PlainEpoch(rows[:used], rows[used:], ranks)


@settings(max_examples=60, deadline=None)
@given(FILES, SEEDS, st.integers(1, 4), st.integers(1, 3), st.integers(2, 9), st.integers(1, 40))
def test_every_row_comes_exactly_once_per_epoch_over_all_ranks(files, seed, epochs, num_ranks, rows_per_rank, window):
    rows_per_step = num_ranks * rows_per_rank
    order = Order(files, configure(seed, epochs, rows_per_step, window), num_ranks)
    seen = Counter(flat(take(order, num_ranks)))
    every = Counter({(place, epoch) for place in range(sum(files)) for epoch in range(epochs)})
    assert seen <= every
    assert (every - seen).total() < rows_per_step  # less than one step is left over
    assert order.num_steps == count_steps(sum(files), epochs, rows_per_step) == seen.total() // rows_per_step


@settings(max_examples=60, deadline=None)
@given(FILES, SEEDS, st.integers(1, 4), st.integers(1, 3), st.integers(2, 9), st.integers(1, 40))
def test_an_undisturbed_run_takes_the_epochs_one_after_another(files, seed, epochs, num_ranks, rows_per_rank, window):
    rows_per_step, carried = num_ranks * rows_per_rank, []
    expected: list[list[tuple[int, int]]] = [[] for _ in range(num_ranks)]
    for epoch in range(epochs):
        plain = plain_epoch(files, seed, epoch, carried, rows_per_step, num_ranks, window)
        carried = plain.carried
        for rank, rows in enumerate(plain.ranks):
            expected[rank] += rows
    found = take(Order(files, configure(seed, epochs, rows_per_step, window), num_ranks), num_ranks)
    assert [[pair for step in steps for pair in step] for steps in found] == expected


@settings(max_examples=60, deadline=None)
@given(FILES, SEEDS, st.sampled_from([1, 2, 4]), st.integers(1, 20))
def test_ranks_share_an_epoch_in_disjoint_contiguous_spans_shuffled_within_the_window(files, seed, num_ranks, window):
    rows = plain_epoch(files, seed, 0, [], 4, num_ranks, window).rows
    before = {pair: at for at, pair in enumerate(rows)}
    span = len(rows) // num_ranks
    for rank, steps in enumerate(take(Order(files, configure(seed, 1, 4, window), num_ranks), num_ranks)):
        came_from = np.array([before[pair] for step in steps for pair in step], dtype=int)
        assert sorted(came_from) == list(range(rank * span, (rank + 1) * span))
        assert (np.abs(came_from - rank * span - np.arange(span)) < window).all()


@settings(max_examples=40, deadline=None)
@given(FILES, SEEDS, st.integers(2, 12))
def test_files_are_read_whole_one_after_another_and_carried_rows_come_first(files, seed, rows_per_step):
    order = Order(files, configure(seed, 2, rows_per_step, window=1), 1)  # a window of one row: the order of the files
    (steps,) = take(order, 1)
    found = [pair for step in steps for pair in step]
    file_of = np.repeat(np.arange(len(files)), files)
    for epoch in range(2):
        changes = np.diff([file_of[place] for place, origin in found if origin == epoch])
        assert int((changes != 0).sum()) <= len(files) - 1
    assert [origin for _, origin in found] == sorted(origin for _, origin in found)


def test_the_order_follows_from_seed_and_epoch():
    def places(seed):
        (steps,) = take(Order([8] * 6, configure(seed, 2, 4, window=16), 1), 1)
        return [place for step in steps for place, _ in step]

    assert places(0) == places(0)
    assert places(0)[:48] != places(0)[48:]
    assert places(0) != places(1)


def test_a_data_set_smaller_than_a_step_fills_it_over_several_epochs():
    order = Order([2, 1], configure(epochs=5, rows_per_step=4), 2)
    seen = flat(take(order, 2))
    assert (order.num_steps, len(seen), len(set(seen))) == (3, 12, 12)
    assert count_steps(3, 5, 4) == 3


RUNS = st.integers(2, 24).flatmap(
    lambda rows_per_step: st.tuples(
        st.just(rows_per_step),
        st.lists(
            st.tuples(
                st.sampled_from([ranks for ranks in range(1, rows_per_step + 1) if rows_per_step % ranks == 0]),
                st.integers(0, 60),
            ),
            min_size=1,
            max_size=6,
        ),
    )
)


@settings(max_examples=150, deadline=None)
@given(FILES, SEEDS, st.integers(1, 5), st.integers(1, 40), RUNS)
def test_every_row_of_every_epoch_is_consumed_once_whatever_is_killed_when(files, seed, epochs, window, runs):
    """Each life of the run has some ranks and takes some steps (a life of none is killed before its first)."""
    rows_per_step, lives = runs
    config = configure(seed, epochs, rows_per_step, window)
    progress, step = None, 0
    consumed: list[tuple[int, int]] = []
    for number, (num_ranks, num_taken) in enumerate(lives):
        order = Order(files, config, num_ranks, progress)
        assert order.first_step == step
        is_last = number == len(lives) - 1
        until = order.num_steps if is_last else min(order.num_steps, step + num_taken)
        consumed += flat(take(order, num_ranks, until))
        step = until
        progress = restart(order, step)
        assert progress.step == step
    assert step == count_steps(sum(files), epochs, rows_per_step)
    every = Counter({(place, epoch) for place in range(sum(files)) for epoch in range(epochs)})
    seen = Counter(consumed)
    assert seen <= every, "a row came twice in an epoch"
    assert (every - seen).total() < rows_per_step, "rows were passed over"
    assert flat(take(Order(files, config, 1, progress), 1)) == []


@settings(max_examples=60, deadline=None)
@given(FILES, SEEDS, st.integers(1, 4), st.integers(1, 40), st.sampled_from([1, 2, 3, 6]), st.lists(st.integers(0, 40)))
def test_the_same_number_of_ranks_goes_on_in_the_very_same_order(files, seed, epochs, window, num_ranks, kills):
    config = configure(seed, epochs, 6, window)
    whole = take(Order(files, config, num_ranks), num_ranks)
    progress = None
    for step in sorted(kills):
        order = Order(files, config, num_ranks, progress)
        progress = restart(order, min(step, order.num_steps))
        found = take(Order(files, config, num_ranks, progress), num_ranks)
        assert found == [steps[progress.step :] for steps in whole]


def test_other_ranks_go_on_in_their_own_order_and_repeat_it_too_until_the_epoch_ends():
    files, config = [7] * 9, configure(3, 3, 12, window=10)
    progress = restart(Order(files, config, 4), 2)
    changed = Order(files, config, 2, progress)
    whole = take(changed, 2)
    again = Order(files, config, 2, restart(changed, 4))
    assert take(again, 2) == [steps[2:] for steps in whole]
    undisturbed = take(Order(files, config, 2), 2)
    assert whole != [steps[2:] for steps in undisturbed]
    num_first = 63 // 12  # steps of the first epoch, which alone was disturbed
    assert [steps[num_first - 2 :] for steps in whole] == [steps[num_first:] for steps in undisturbed]


def test_what_is_left_is_cut_in_the_order_of_the_files_into_spans_shuffled_within_the_window():
    files, window, rows_per_step = [10] * 12, 9, 12
    config = configure(5, 1, rows_per_step, window)
    before = Order(files, config, 4)
    consumed = set(flat(take(before, 4, until=4)))
    rows = plain_epoch(files, 5, 0, [], rows_per_step, 1, window).rows
    left = [pair for pair in rows if pair not in consumed]
    spans = np.arange(len(left)).reshape(3, -1)
    for span, steps in zip(spans, take(Order(files, config, 3, restart(before, 4)), 3), strict=True):
        came_from = np.array([left.index(pair) for step in steps for pair in step])
        assert sorted(came_from) == span.tolist()
        assert came_from.tolist() != span.tolist()
        # also in the epoch as a whole: files between which nothing is left do not draw far rows together
        in_epoch = np.array([rows.index(pair) for step in steps for pair in step])
        assert (np.abs(in_epoch - np.sort(in_epoch)) < window).all()


def test_a_million_rows_are_planned_once_an_epoch_and_in_no_time(monkeypatch):
    config = configure(0, 2, 256, window=8192)
    planned = []
    real = order_module.shuffle_windows
    monkeypatch.setattr(order_module, "shuffle_windows", lambda *given: planned.append(given[2]) or real(*given))
    start = time.process_time()
    order = Order([1000] * 1000, config, 4)
    num_rows = sum(len(step.rows.place) for step in order.steps(1))
    assert num_rows == order.num_steps * 64 == 7812 * 64
    assert planned == [[0, epoch, rank, 0] for epoch in range(2) for rank in range(4)]
    assert Order([1000] * 1000, config, 8, restart(order, 7000)).first_step == 7000
    assert time.process_time() - start < 5  # about 0.5 s; a plan per step would take minutes


def test_a_progress_is_small():
    order = Order([1000] * 1000, configure(0, 1, 256, window=8192), 4)
    assert len(json.dumps(order.progress_after(0).to_json())) < 2_000
    assert len(json.dumps(order.progress_after(2000).to_json())) < 20_000


def test_progress_is_known_of_steps_from_the_plan_on_and_of_no_other():
    order = Order([10] * 4, configure(0, 1, 4), 2)
    resumed = Order([10] * 4, configure(0, 1, 4), 1, restart(order, 5))
    assert resumed.progress_after(7).step == 7
    for step in (4, 11):
        with pytest.raises(ValueError, match=f"step {step} is none of this run's: 5 to 10"):
            resumed.progress_after(step)


def test_ranks_that_cannot_share_a_step_are_refused_with_the_fix():
    with pytest.raises(ValueError, match=r"resources\.num_workers"):
        Order([10], configure(0, 1, 4), 3)
