"""The engine's thread: its queue, cancelling, time limits, failures and its end."""

import asyncio
import threading
import time

import pytest
from exported import small_lm
from test_batch import SAMPLED, alone, make

from keras_gemma2.serving.batch import Batch
from keras_gemma2.serving.engine import ClosedError, Ended, Engine, QueueFullError
from keras_gemma2.serving.jobs import Job
from keras_gemma2.serving.mailbox import Mailbox

once = pytest.mark.backend_free  # threads and queues; that a model runs in a thread, too, each backend shows in the first test
PATIENCE = 120  # seconds that a test waits for a thread at most


@pytest.fixture(scope="module")
def lm():
    return small_lm(max_sequence_length=256, sliding_window_size=100)


class Listener:
    """Keeps what it is told; `at` is called after so many tokens."""

    def __init__(self, count=0, at=None):
        self.events, self.ended, self._count, self._at = [], threading.Event(), count, at

    def __call__(self, event):
        self.events.append(event)
        if isinstance(event, Ended):
            self.ended.set()
        elif self._at is not None and len(self.events) == self._count:
            self._at()

    def end(self):
        assert self.ended.wait(PATIENCE)
        return self.events[-1]

    @property
    def token_ids(self):
        return [event.token_id for event in self.events[:-1]]


@pytest.fixture
def engine(lm):
    made = Engine(lambda: Batch(lm.backbone, 2, 256, kept=1), queue_size=3)
    made.start()
    yield made
    made.close(0)


def test_jobs_of_several_threads(lm):
    """Twelve jobs at once for two rows: each gets its own tokens in order, and one end."""
    engine = Engine(lambda: Batch(lm.backbone, 2, 256), queue_size=12)
    jobs, listeners = [make(5 + 3 * i, 10, seed=i, sampler=SAMPLED) for i in range(12)], [Listener() for _ in range(12)]
    threads = [threading.Thread(target=engine.submit, args=pair) for pair in zip(jobs, listeners)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert engine.waiting == 12 and not engine.is_ready
    engine.start()
    for job, listener in zip(jobs, listeners):
        assert listener.end() == Ended(job, "length")
        assert [*job.prompt, *listener.token_ids] == alone(lm, job, 10)
    assert engine.is_ready and engine.waiting == engine.running == 0
    assert engine.close()


@once
def test_the_queue_has_an_end(lm):
    engine = Engine(lambda: Batch(lm.backbone, 1, 256), queue_size=2)
    jobs = [make(5, 5) for _ in range(3)]
    for job in jobs[:2]:
        engine.submit(job, Listener())
    with pytest.raises(QueueFullError, match="2 jobs wait already"):
        engine.submit(jobs[2], Listener())
    engine.cancel(jobs[0])  # what is cancelled makes room at once, although it leaves with the next step
    assert engine.waiting == 1
    engine.submit(jobs[2], Listener())
    assert engine.waiting == 2
    with pytest.raises(ValueError, match="up to 256"):
        engine.submit(Job([2], 300), Listener())
    with pytest.raises(ValueError, match="`queue_size` must be an integer of at least 1. Received: 0"):
        Engine(lambda: None, queue_size=0)
    assert engine.close()  # it was never started


@once
def test_cancelled_within_two_steps(lm, engine):
    """From a listener, as of a client that goes away; one that waits is never run; others go on."""
    long = make(5, 200)
    listener, waiting, other = Listener(10, lambda: engine.cancel(long)), Listener(), Listener()
    engine.submit(long, listener)
    second, third = make(9, 240), make(7, 20)
    engine.submit(second, other)
    engine.submit(third, waiting)
    assert listener.end() == Ended(long, "cancelled")
    assert 10 <= len(listener.token_ids) <= 12
    assert waiting.end().reason == "length"
    engine.cancel(second)
    assert other.end().reason == "cancelled"
    assert waiting.token_ids == alone(lm, third, 20)[7:]
    engine.cancel(long)  # it has ended
    free = Listener()
    engine.submit(make(5, 3), free)
    assert free.end().reason == "length"


@once
def test_time_limits(lm):
    """Of a job that runs and of one that waits, by a clock of the test's own."""
    now = [0.0]
    engine = Engine(lambda: Batch(lm.backbone, 1, 256), clock=lambda: now[0])
    runs, waits, after = Listener(5, lambda: now.__setitem__(0, 10.0)), Listener(), Listener()
    engine.submit(make(5, 200), runs, time_limit=5)
    engine.submit(make(5, 200), waits, time_limit=9)
    engine.submit(make(5, 4), after, time_limit=11)
    engine.start()
    assert runs.end().reason == "timeout" and len(runs.token_ids) in (5, 6)  # one more was on its way where there are 6
    assert waits.end().reason == "timeout" and waits.token_ids == []
    assert after.end().reason == "length"
    engine.close()


@once
def test_a_step_that_fails(lm, engine, monkeypatch):
    """What ran ends with an error; what comes after runs in a new batch."""
    first, second = Listener(), Listener()
    engine.submit(make(5, 3), first)
    assert first.end().reason == "length"
    old, prompts = engine.batch, sum(engine.prompt_tokens)

    def fail():
        raise MemoryError("out of memory, says the test")

    monkeypatch.setattr(old, "begin", fail)
    engine.submit(make(5, 3), second)
    end = second.end()
    assert end.reason == "error" and end.message == "MemoryError: out of memory, says the test"
    job, third = make(6, 8, seed=2), Listener()
    engine.submit(job, third)
    assert third.end().reason == "length" and third.token_ids == alone(lm, job, 8)[6:]
    assert engine.batch is not old and sum(engine.prompt_tokens) >= prompts + 6  # the failed batch's are not forgotten


@once
def test_no_other_batch(lm):
    """All are told, those that wait too, and the engine ends."""
    made = []

    def make_batch():
        if made:
            raise MemoryError("no room for caches")
        made.append(Batch(lm.backbone, 1, 256))
        made[0].begin = lambda: 1 / 0
        return made[0]

    engine, runs, waits = Engine(make_batch), Listener(), Listener()
    engine.submit(make(5, 3), runs)
    engine.submit(make(5, 3), waits)
    engine.start()
    assert runs.end().message == "ZeroDivisionError: division by zero"
    assert waits.end().message == "MemoryError: no room for caches" and engine.has_failed
    with pytest.raises(ClosedError):
        engine.submit(make(5, 5), Listener())


@once
def test_a_listener_that_fails(engine):
    """Its job is cancelled; the engine goes on."""
    seen, other = [], Listener()

    def fail(event):
        seen.append(event)
        raise OSError("the client has gone")

    engine.submit(make(5, 200), fail)
    engine.submit(make(5, 5), other)
    assert other.end().reason == "length"
    started = time.monotonic()
    while engine.running and time.monotonic() < started + PATIENCE:
        time.sleep(0.01)
    assert seen[-1].reason == "cancelled" and len(seen) < 5 and engine.is_ready


@once
def test_closing(lm):
    """What runs comes to its end; what waits is cancelled; new ones are refused."""
    engine = Engine(lambda: Batch(lm.backbone, 1, 256))
    closing = []

    def close():
        closing.append(threading.Thread(target=lambda: closing.append(engine.close())))
        closing[0].start()

    runs, waits = Listener(3, close), Listener()
    engine.submit(make(5, 60), runs)
    engine.submit(make(5, 60), waits)
    engine.start()
    assert runs.end().reason == "length" and waits.end().reason == "cancelled"
    closing[0].join(PATIENCE)
    assert closing[1] is True and not engine.is_ready
    with pytest.raises(ClosedError):
        engine.submit(make(5, 5), Listener())


@once
def test_closing_lets_whole_groups_end(lm):
    """Of jobs that belong together, those that wait run, too, where one ran; those of another group do not."""
    engine, closing = Engine(lambda: Batch(lm.backbone, 1, 256)), []

    def close():
        closing.append(threading.Thread(target=engine.close))
        closing[0].start()

    runs, waits, other = Listener(3, close), Listener(), Listener()
    for listener, group in ((runs, "a"), (waits, "a"), (other, "b")):
        engine.submit(make(5, 60), listener, group=group)
    engine.start()
    assert [each.end().reason for each in (runs, waits, other)] == ["length", "length", "cancelled"]
    closing[0].join(PATIENCE)
    assert not closing[0].is_alive()


@once
def test_nobody_waits_for_another_batch(lm):
    """While it is made, which may take long, jobs can be submitted and cancelled, and those that failed know of it."""
    made, seen, runs, waits = [], [], Listener(), Listener()

    def make_batch():
        if made:
            outside = threading.Thread(target=lambda: (engine.submit(job, waits), seen.append(engine.waiting)))
            outside.start()
            outside.join(PATIENCE)
            seen.append(runs.ended.is_set())
        made.append(Batch(lm.backbone, 1, 256))
        return made[-1]

    engine, job = Engine(make_batch), make(5, 3)
    made[0].begin = lambda: 1 / 0
    engine.submit(make(5, 3), runs)
    engine.start()
    assert waits.end().reason == "length" and seen == [1, True] and not engine.has_failed
    engine.close()


@once
def test_closing_in_a_hurry(lm):
    engine, started = Engine(lambda: Batch(lm.backbone, 1, 256)), threading.Event()
    runs = Listener(3, started.set)
    engine.submit(make(5, 240), runs)
    engine.start()
    assert started.wait(PATIENCE)
    assert engine.close(time_limit=0) is False
    assert runs.end().reason == "cancelled"


@once
def test_a_mailbox():
    """What threads post comes to each queue in their order, and a loop that has ended is left alone."""
    count, kept = 500, []

    async def received():
        mailbox, queues = Mailbox.of(asyncio.get_running_loop()), [asyncio.Queue() for _ in range(3)]
        kept.append(mailbox)
        assert Mailbox.of(asyncio.get_running_loop()) is mailbox
        threads = [threading.Thread(target=lambda q=queue: [mailbox.post(q, i) for i in range(count)]) for queue in queues]
        for thread in threads:
            thread.start()
        found = [[await asyncio.wait_for(queue.get(), 60) for _ in range(count)] for queue in queues]
        for thread in threads:
            thread.join()
        return found

    assert asyncio.run(received()) == [list(range(count))] * 3
    kept[0].post(asyncio.Queue(), "too late")
