"""Continuous batching: each job's tokens are those of `generate` by itself, whatever comes and goes beside it."""

import keras
import numpy as np
import pytest
from exported import small_lm

from keras_gemma2 import Sampler
from keras_gemma2.serving import batch as batch_module
from keras_gemma2.serving.batch import PIECE, Batch
from keras_gemma2.serving.jobs import Job
from keras_gemma2.serving.rows import Rows

SAMPLED = Sampler(temperature=1.5, top_k=50, top_p=0.95)


@pytest.fixture(scope="module")
def lm():
    """A local and a global layer: each of its many shapes is compiled."""
    return small_lm(num_layers=2, max_sequence_length=1400, sliding_window_size=100)


def prompt(length, seed=0):
    return [2, *np.random.default_rng(seed).integers(200, 4096, length - 1).tolist()]


def alone(lm, job, new):
    """What `generate` makes of a job's prompt."""
    inputs = {"token_ids": np.array([job.prompt]), "padding_mask": np.ones((1, len(job.prompt)), "int32")}
    stops = sorted(job.stop_token_ids) or None
    found = lm.generate(inputs, max_new_tokens=new, sampler=job.sampler, seed=job.seed, stop_token_ids=stops)
    ids, mask = (keras.ops.convert_to_numpy(found[key]) for key in ("token_ids", "padding_mask"))
    return ids[0][mask[0].astype(bool)].tolist()


def make(length, new, seed=0, **options):
    ids = prompt(length, seed)
    return Job(ids, length + new, seed=seed, **options)


def run(batch, arrivals):
    """Steps until all jobs have ended; `arrivals` are `(step, job)`, added as soon as there is room."""
    chosen, step = [], 0
    while arrivals or batch.jobs:
        while arrivals and arrivals[0][0] <= step and len(batch.jobs) < batch.size:
            batch.add(arrivals.pop(0)[1])
        chosen += batch.step()
        step += 1
    return chosen


SMALL_PIECES = {"PIECE": 64, "SHORT_PROMPT": 32}  # a warm-up compiles every size there is


@pytest.fixture(scope="module")
def warmed_up(lm):
    """A batch of four rows and one kept, in small pieces."""
    batch = Batch(lm.backbone, 4, 1400, kept=1)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL_PIECES.items():
            patch.setattr(batch_module, name, value)
        batch.warm_up()
    return batch


@pytest.fixture
def warm(warmed_up, monkeypatch):
    """The same as if nothing had run."""
    for name, value in SMALL_PIECES.items():
        monkeypatch.setattr(batch_module, name, value)
    warmed_up.rows.forget()
    warmed_up.prefilled = warmed_up.reused = 0
    return warmed_up


def compilations():
    """A list to which every compilation from now on is added; on JAX, which says so. Others are known by their sizes only."""
    found = []
    if keras.backend.backend() == "jax":
        import jax

        def listen(event, seconds, **of):
            if event == "/jax/core/compile/backend_compile_duration":
                found.append(of)

        jax.monitoring.register_event_duration_secs_listener(listen)
    return found


@pytest.mark.backend_free
def test_first_pieces_are_little_longer_than_their_prompts(lm):
    batch = Batch(lm.backbone, 1, 300)
    sizes = list(batch._piece_sizes(True))
    assert sizes == [16, 32, 48, 64, 96, 128, 192, PIECE] and list(batch._piece_sizes(False)) == [16, 32, 64, 128, PIECE]
    for length, size in ((16, 16), (33, 48), (48, 48), (49, 64), (180, 192), (193, PIECE)):
        batch.shapes.clear()
        job = make(length, 1)
        run(batch, [(0, job)])
        assert [sizes[0] for name, _, _, sizes in batch.shapes if name == "first piece"] == [(1, size)], length
        assert job.token_ids == alone(lm, job, 1)
        batch.rows.forget()


def test_jobs_come_and_go(lm, warm):
    """Greedy and drawn, short and of several pieces, four at a time of nine; nothing is compiled after the warm-up."""
    batch = warm
    known, compiled = set(batch.shapes), compilations()
    lengths = [(5, 20), (30, 15), (1, 12), (17, 2), (154, 7), (2 * 64, 5), (3, 9), (65, 3), (40, 4)]
    jobs = [make(n, new, seed=i, sampler=SAMPLED if i % 2 else Sampler(temperature=0)) for i, (n, new) in enumerate(lengths)]
    chosen = run(batch, [(2 * (i // 4), job) for i, job in enumerate(jobs)])
    assert batch.shapes == known and not compiled
    for job, (length, new) in zip(jobs, lengths):
        assert job.token_ids == alone(lm, job, new), length
        assert [one.token_id for one in chosen if one.job is job] == job.token_ids[length:]
        assert job.finish_reason == "length" and job.row is None
    assert batch.prefilled == sum(length for length, _ in lengths) and batch.reused == 0


def test_short_prompts_run_together(lm):
    """Three or four with one adapter in a call; a long one by itself, and what waits behind it; all get their own tokens."""
    batch = Batch(lm.backbone, 6, 256)

    def together(*lengths, adapters=()):
        jobs = [make(n, 3, seed=i) for i, n in enumerate(lengths)]
        for job, adapter in zip(jobs, adapters):
            job.adapter = adapter
        return [[len(job.prompt) for job in jobs] for jobs in batch._next_prompts(jobs)]

    assert together() == [] and together(7) == [[7]] and together(7, 8) == [[7], [8]] and together(7, 8, 9) == [[7, 8, 9]]
    assert together(7, 8, 65, 9, 64, 10) == [[7, 8, 9, 64]]
    assert together(65, 7, 8, 9) == [[65], [7]] and together(200, 7, 8, 9) == [[200]]
    assert together(7, 8, 9, 10, adapters=(None, "other")) == [[7, 9, 10]]
    assert Batch(lm.backbone, 3, 256)._next_prompts([make(n, 3) for n in (7, 8, 9)])[1:] != []
    jobs = [make(n, 6, seed=n, sampler=SAMPLED if n % 2 else Sampler(temperature=0)) for n in (30, 7, 41, 12, 9, 2)]
    run(batch, [(0, job) for job in jobs])
    assert ((4, 48), (4,)) in [sizes for name, _, _, sizes in batch.shapes if name == "first piece"]
    for job in jobs:
        assert job.token_ids == alone(lm, job, 6)


@pytest.mark.backend_free
def test_streams_flow_between_the_pieces_of_a_long_prompt(lm):
    """Every step that runs a piece gives those that answer a token each."""
    batch, answering, long = Batch(lm.backbone, 3, 1400), [make(5, 20), make(40, 20, seed=1)], make(4 * PIECE + 9, 3, seed=2)
    for job in answering:
        batch.add(job)
    while any(len(job.token_ids) == len(job.prompt) for job in answering):
        batch.step()
    batch.add(long)
    steps = 0
    while len(long.token_ids) == len(long.prompt):
        assert {one.job for one in batch.step()} >= set(answering)
        steps += 1
    assert steps == 5
    run(batch, [])
    for job, new in ((long, 3), *((job, 20) for job in answering)):
        assert job.token_ids == alone(lm, job, new)


@pytest.mark.backend_free
def test_stops_and_removals(lm):
    """A stop token ends a job and is given; one that is removed makes room at once, and leaves the others alone."""
    first = make(9, 30)
    stop = alone(lm, first, 30)[20]
    batch = Batch(lm.backbone, 2, 256)
    stopped, gone, last = make(9, 30, stop_token_ids=frozenset({stop})), make(30, 100, seed=1), make(12, 10, seed=2)
    batch.add(stopped)
    batch.add(gone)
    with pytest.raises(ValueError, match="has 2 jobs already, its `size`"):
        batch.add(last)
    for _ in range(4):
        batch.step()
    batch.remove(gone)
    batch.remove(gone)
    kept = len(gone.token_ids)
    run(batch, [(0, last)])
    assert stopped.finish_reason == "stop" and stopped.token_ids == alone(lm, stopped, 30) and stopped.token_ids[-1] == stop
    assert last.token_ids == alone(lm, last, 10)
    assert gone.finish_reason is None and len(gone.token_ids) == kept == 34


def test_what_rows_hold_is_reused(lm, warm):
    """A conversation goes on in its row; a beginning that two share is copied, also from a job that still runs."""
    batch = warm
    known = set(batch.shapes)
    first = make(40, 10)
    run(batch, [(0, first)])
    turn = Job(first.token_ids + prompt(20, 5)[1:], 90)
    run(batch, [(0, turn)])
    assert turn.reused == 49 and turn.token_ids == alone(lm, turn, 90 - len(turn.prompt))
    shared = prompt(60, 7)
    jobs = [Job(shared + prompt(8, seed)[1:], 90, SAMPLED, seed) for seed in range(3)]
    run(batch, [(2 * i, job) for i, job in enumerate(jobs)])
    assert [job.reused for job in jobs] == [0, 60, 60]
    for job in jobs:
        assert job.token_ids == alone(lm, job, 90 - len(job.prompt))
    assert batch.shapes == known and batch.reused == 49 + 60 + 60
    again = Job(jobs[0].prompt, 90, SAMPLED, 0)
    run(batch, [(0, again)])
    assert again.reused == len(again.prompt) - 1 and again.token_ids == jobs[0].token_ids


@pytest.mark.backend_free
def test_rows_that_keep_what_ended():
    """Jobs run in the first rows; what these held goes to the ones behind, the oldest of which are given up."""
    rows = Rows(2, 2, ring=1000)

    def ended(seed, length=30):
        job = Job(prompt(length, seed), length + 1)
        place = rows.take(job)
        job.cached = length
        rows.give_back(job)
        return place

    assert ended(1) == (0, 0, 0, None) and ended(2) == (1, 1, 0, None)
    assert ended(3) == (0, 0, 0, 2) and ended(4) == (1, 1, 0, 3)  # 1 and 2 are kept
    assert ended(5) == (0, 0, 0, 2)  # 3 is kept in the place of 1
    first = Job([*prompt(30, 3), 300], 40)
    assert rows.take(first) == (1, 2, 30, 3)  # 3 comes back, 4 is kept in the place of 2, and 2's row is empty
    assert rows.take(Job(prompt(30, 2), 40)) == (0, 0, 0, 2)  # 2 is gone; 5 is kept
    rows.give_back(first)
    assert rows.take(Job([*prompt(20, 5), 300], 40)) == (1, 2, 20, 3)  # not into 2, which is to be copied; 4 is gone
    rows = Rows(1, 0, ring=1000)
    assert [ended(seed)[3] for seed in (1, 2, 3)] == [None] * 3


@pytest.mark.backend_free
def test_rings_that_have_turned_are_not_reused(lm):
    """A window of 100: of 150 tokens, the first 60 are gone; all 150 can be gone on from."""
    batch = Batch(lm.backbone, 1, 512)
    first = make(140, 10)
    run(batch, [(0, first)])
    branch = Job([*first.token_ids[:60], 300], 70)
    longer = Job([*first.token_ids, 300], 160)
    run(batch, [(0, longer)])
    assert longer.reused == 149 and longer.token_ids == alone(lm, longer, 160 - 151)
    run(batch, [(0, branch)])
    assert branch.reused == 0 and branch.token_ids == alone(lm, branch, 70 - 61)


def test_adapters_share_the_rows():
    """Jobs with two adapters and with none, at once; what one has run is not reused with another."""
    lm, draw = small_lm(num_layers=2, max_sequence_length=256, sliding_window_size=100), np.random.default_rng(1)
    for name in ("first", "second"):
        lm.enable_lora(rank=4, targets=["query", "down"], name=name)
        for variable in lm.trainable_variables:
            variable.assign(draw.normal(0, 0.5, variable.shape))
    batch = Batch(lm.backbone, 4, 256, kept=2, adapters=["first", "second"])
    jobs = [make(30, 12, adapter=adapter) for adapter in (None, "first", "second", "first")]
    run(batch, [(i, job) for i, job in enumerate(jobs)])
    outputs = []
    for job in jobs:
        with lm.backbone.adapter_set.only(job.adapter):
            assert job.token_ids == alone(lm, job, 12)
        outputs.append(tuple(job.token_ids))
    assert len(set(outputs)) == 3 and [job.reused for job in jobs] == [0, 0, 0, 29]


def test_log_probabilities(lm):
    """Of the tokens chosen and of the likeliest, against float64 numpy on the logits of the forward pass."""
    batch = Batch(lm.backbone, 2, 256)
    jobs = [make(9, 6, top=3), make(20, 5, seed=1, sampler=SAMPLED)]
    chosen = run(batch, [(0, job) for job in jobs])
    for job in jobs:
        ids = np.array([job.token_ids])
        logits = lm({"token_ids": keras.ops.convert_to_tensor(ids), "padding_mask": keras.ops.ones(ids.shape, "int32")})
        logits = keras.ops.convert_to_numpy(logits)[0].astype("float64")
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for place, one in enumerate([one for one in chosen if one.job is job], len(job.prompt)):
            # float32 logits of up to 3 whose sums run in another order, as in test_parity.
            assert abs(one.logprob - logprobs[place - 1, one.token_id]) < 1.2e-4
            assert len(one.top) == job.top
            for (token_id, logprob), expected in zip(one.top, np.sort(logprobs[place - 1])[::-1]):
                assert abs(logprob - expected) < 1.2e-4 and abs(logprobs[place - 1, token_id] - logprob) < 1.2e-4


def test_logits_that_are_no_numbers():
    """The job ends with no token; the batch goes on."""
    lm = small_lm()
    batch, job = Batch(lm.backbone, 1, 64), make(5, 5)
    batch.add(job)
    scale = lm.backbone.layer_norm.scale
    before = keras.ops.convert_to_numpy(scale)
    scale.assign(np.full_like(before, np.nan))
    (one,) = batch.step()
    assert one.job is job and one.token_id is None and not batch.jobs
    scale.assign(before)
    after = make(5, 5, seed=3)
    run(batch, [(0, after)])
    assert after.token_ids == alone(lm, after, 5)


@pytest.mark.backend_free
@pytest.mark.parametrize(
    "job, message",
    [
        (Job([], 5), "`prompt` must have at least one token.*Received: 0 tokens"),
        (Job([2, 3], 2), "`limit` more than it, up to 128"),
        (Job([2], 129), "up to 128. Received: 1 tokens, limit=129"),
        (Job([2, 4096], 5), "Received the id 4096"),
        (Job([2], 5, Sampler(presence_penalty=1)), "without penalties"),
        (Job([2], 5, Sampler(logit_bias={3: 1.0})), "without penalties"),
        (Job([2], 5, adapter="none"), "`adapter` must be one of .None.. Received: 'none'"),
        (Job([2], 5, top=21), "`top` must be from 0 to 20"),
    ],
)
def test_jobs_are_checked(job, message):
    batch = Batch(small_lm(num_layers=1).backbone, 1, 128)
    with pytest.raises(ValueError, match=message):
        batch.add(job)
    assert not batch.jobs
