"""Tests of ``agreements.py``: what rank 0 asks for is due after the same batch everywhere, once, in this run only."""

from __future__ import annotations

import warnings
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint, Timer

from lightning_ddg.comm.ranks import EmptyMailbox
from lightning_ddg.comm.replicas import Replicas
from lightning_ddg.core.execution import ACTIVATION, GRADIENT, Channel, Observers
from lightning_ddg.plugin.agreements import NOTICE, Agreements, Notice, TimedCheckpoints, time_on_rank_zero
from tests.networks import Classifier, loader, quiet_trainer


class Letters:
    """A mailbox that gives what the test has laid ready, and records what is sent."""

    def __init__(self) -> None:
        self.ready: dict[tuple[int, Channel], list[Any]] = {}
        self.sent: list[tuple[Any, Channel, Any]] = []

    def has(self, source: int, channel: Channel) -> bool:
        return bool(self.ready.get((source, channel)))

    def take(self, source: int, channel: Channel) -> Any:
        return self.ready[source, channel].pop(0)

    def send(self, to: Any, channel: Channel, value: Any, *, snapshot: bool = False) -> None:
        self.sent.append((to, channel, value))

    @property
    def announced(self) -> list[Any]:
        return [value for _, channel, value in self.sent if channel == NOTICE]


def agreements(num_stages: int = 3, rank: int = 0, **trainer: Any) -> tuple[Agreements, Any, Letters]:
    loop = SimpleNamespace(_skip_backward=False)
    given = {
        "should_stop": False,
        "checkpoint_callbacks": [],
        "fit_loop": loop,
        "callback_metrics": {},
        "sanity_checking": False,
        **trainer,
    }
    fake: Any = SimpleNamespace(**given)
    letters = Letters()
    others = [other for other in range(num_stages) if other != rank]
    ranks: Any = SimpleNamespace(
        rank=rank,
        size=num_stages,
        others=others,
        all_others=others,
        is_rank_zero=rank == 0,
        decides=rank == 0,
        mailbox=letters,
        world=letters,
        replicas=Replicas(EmptyMailbox(), [0], 0),
        observers=Observers(),
    )
    made = Agreements(fake, ranks, num_stages)
    made.begin()
    return made, fake, letters


def tell(made: Agreements, letters: Letters, source: int, notice: Notice) -> None:
    """A notice comes before a gradient."""
    letters.ready[source, NOTICE] = [notice]
    made._notices.after_take(source, GRADIENT)


def test_notices_travel_upstream_before_the_gradient_they_came_before() -> None:
    last, _, letters = agreements(rank=0)
    last._notices.announce(Notice(1, 7, ["stop"]))
    assert letters.sent == [(1, NOTICE, (1, 7, ["stop"]))]

    middle, _, letters = agreements(rank=1)
    letters.ready[0, NOTICE] = [Notice(1, 7, ["stop"])]
    middle._notices.after_take(2, ACTIVATION)
    assert letters.sent == []
    middle._notices.after_take(0, GRADIENT)
    assert middle._notices.known == [(1, 7, ["stop"])]
    assert letters.sent == [(2, NOTICE, (1, 7, ["stop"]))]

    first, _, letters = agreements(rank=2)
    tell(first, letters, 1, Notice(1, 7, ["stop"]))
    assert letters.sent == []


def test_other_ranks_ask_rank_zero() -> None:
    first, _, letters = agreements(rank=2)
    first._notices.ask(["terminate"])
    assert letters.sent == [(0, NOTICE, ["terminate"])]
    last, _, letters = agreements(rank=0)
    letters.ready[2, NOTICE] = [["terminate"]]
    last.due(3)
    last.end_batch(3)
    assert letters.announced == [(1, 6, ["terminate"])]


def test_a_stop_is_due_as_many_batches_later_as_there_are_stages() -> None:
    made, trainer, letters = agreements()
    seen = []
    for batch in range(10, 16):
        made.due(batch)
        if batch == 11:
            trainer.should_stop = True
        made.end_batch(batch)
        seen.append(trainer.should_stop)
    assert seen == [False, False, False, False, True, True]
    assert letters.announced == [(1, 14, ["stop"])], "asked for once"


def test_another_rank_stops_when_told_and_not_when_it_wants_to() -> None:
    made, trainer, letters = agreements(rank=2)
    trainer.should_stop = True
    made.due(0)
    made.end_batch(0)
    assert not trainer.should_stop
    tell(made, letters, 1, Notice(1, 2, ["stop"]))
    for batch in (1, 2):
        made.due(batch)
        made.end_batch(batch)
    assert trainer.should_stop
    assert letters.announced == []


def test_without_gradients_to_carry_notices_a_stop_waits_for_the_end_of_the_epoch() -> None:
    """As in stochastic weight averaging's last epoch."""
    made, trainer, letters = agreements(fit_loop=SimpleNamespace(_skip_backward=True))
    trainer.should_stop = True
    made.due(0)
    made.end_batch(0)
    assert letters.announced == made._notices.known == []
    assert made._wanted == {"stop"}


def test_a_notice_of_an_earlier_run_is_void() -> None:
    made, trainer, letters = agreements(rank=2)
    made.begin()
    tell(made, letters, 1, Notice(1, 5, ["stop"]))
    made.due(5)
    made.end_batch(5)
    assert not trainer.should_stop
    assert made._notices.known == []


@pytest.mark.parametrize("asked", [True, False])
def test_where_the_ranks_meet_a_stop_is_due_at_once(asked: bool) -> None:
    made, trainer, _ = agreements()
    trainer.should_stop = asked
    made.due(0)
    made.end_batch(0)
    assert (made._wanted == {"stop"}) == asked
    assert not trainer.should_stop
    made.follow(meet=True)
    assert trainer.should_stop == asked
    made.due(1)
    made.end_batch(1)
    assert trainer.should_stop == asked


def test_a_timed_checkpoint_saves_when_it_is_due_and_at_no_other_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    monkeypatch.setattr(ModelCheckpoint, "on_train_batch_end", lambda self, batch: saved.append(batch))
    checkpoint = ModelCheckpoint(train_time_interval=timedelta(seconds=0))
    other = ModelCheckpoint(every_n_train_steps=1)
    made, _, letters = agreements(
        2, checkpoint_callbacks=[other, checkpoint], callbacks=[], _signal_connector=SimpleNamespace()
    )
    undo = made.install()
    checkpoint._last_time_checked = 0.0
    for batch in range(5):
        made.due(batch)
        checkpoint.on_train_batch_end(batch)  # type: ignore[call-arg, arg-type]
        made.end_batch(batch)
    assert saved == [2, 4]
    assert [notice[1:] for notice in letters.announced] == [(2, ["save 1"]), (4, ["save 1"]), (6, ["save 1"])]
    undo()
    checkpoint.on_train_batch_end(9)  # type: ignore[call-arg, arg-type]
    assert saved == [2, 4, 9]


def test_timed_checkpoints_know_when_their_interval_has_passed(tmp_path: Any) -> None:
    """They take their own clock's word where no word is given, and save when allowed to."""
    timed = ModelCheckpoint(tmp_path, "timed-{step}", train_time_interval=timedelta(0), save_top_k=-1)
    untimed = ModelCheckpoint(tmp_path, "untimed", every_n_train_steps=100)
    trainer = quiet_trainer(devices=1, max_epochs=1, callbacks=[timed, untimed], enable_checkpointing=True)
    checkpoints = TimedCheckpoints(trainer)
    undo = checkpoints.install()
    assert checkpoints.elapsed() == [], "training has not begun"
    allowed = {2: ["save 0"], 4: ["save 0"]}

    class Allows(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            assert checkpoints.elapsed() == ["save 0"]
            assert not checkpoints.allow(allowed.get(batch_idx, ["stop"])), "it monitors nothing"

    trainer.callbacks.insert(0, Allows())  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(Classifier(), loader("mlp"))
    assert sorted(path.name for path in tmp_path.glob("timed*")) == ["timed-step=3.ckpt", "timed-step=5.ckpt"]
    undo()
    assert "on_train_batch_end" not in vars(timed)


@pytest.mark.parametrize("is_rank_zero", [True, False])
def test_a_timer_does_not_ask_other_ranks(is_rank_zero: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    timer = Timer(timedelta(hours=1))
    trainer = quiet_trainer(devices=1, callbacks=[timer])
    undo = time_on_rank_zero(trainer, is_rank_zero)
    monkeypatch.setattr(trainer.strategy, "broadcast", lambda *args: pytest.fail("it asked"))
    timer.on_train_batch_end(trainer)
    assert not trainer.should_stop
    monkeypatch.setattr(timer, "time_elapsed", lambda *args: 3600.0)
    timer.on_train_batch_end(trainer)
    assert trainer.should_stop == is_rank_zero
    undo()
    monkeypatch.setattr(trainer.strategy, "broadcast", lambda value: value)
    trainer.should_stop = False
    timer.on_train_batch_end(trainer)
    assert trainer.should_stop
