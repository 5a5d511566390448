"""Prefill and decoding lower for accelerators that are not at hand, from the CPU.

JAX only (see conftest.py): the exporter is JAX's.
"""

import functools
import warnings

import keras
import numpy as np
import pytest
from oracle import hugging_face_folder

from keras_gemma2 import Gemma2CausalLM, Sampler, backend
from keras_gemma2.cache import Tokens
from keras_gemma2.generation.decode import STEPS, Choosing, decode_loop, extend_prompts
from keras_gemma2.generation.sampler import initial_marks, plan


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("dtype, quantize", [("float32", None), ("bfloat16", None), ("bfloat16", "int8"), ("bfloat16", "int4")])
def test_prefill_and_decoding_lower(platform, dtype, quantize, monkeypatch):
    import jax

    folder, _ = hugging_face_folder(max_position_embeddings=2048, sliding_window=700, num_hidden_layers=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lm = Gemma2CausalLM.from_preset(folder, dtype=dtype, quantize=quantize)
    # What is lowered is the program that runs there: the package asks JAX where it is for its dtypes and products.
    monkeypatch.setattr(jax, "default_backend", lambda: {"cuda": "gpu"}.get(platform, platform))
    backbone, variables = lm.backbone, lm.backbone.variables
    batch = 2
    caches = lm.make_generate_function().new_caches(batch, 1500)  # more than a block, so that its loop is lowered too
    chosen = plan([Sampler(temperature=0.7, top_k=5, top_p=0.9, min_p=0.1)] * batch, 97)

    def lower(function, *arguments):
        def pure(values, *arguments):
            with keras.StatelessScope(state_mapping=list(zip(variables, values))):
                return function(*arguments)

        values = [variable.value for variable in variables]
        return jax.export.export(jax.jit(pure), platforms=[platform])(values, *arguments)

    ids = np.zeros((batch, 512), "int32")
    rows, starts, counts = np.arange(batch, dtype="int32"), np.full(batch, 512, "int32"), np.full(batch, 512, "int32")
    hidden = np.zeros((batch, backbone.config.hidden_dim), backbone.compute_dtype)

    def prefill(fresh, caches, hidden, ids, rows, starts, counts):
        return extend_prompts(backbone, caches, hidden, ids, Tokens(rows, starts, counts, 512, fresh), rows)

    for fresh in (True, False):
        exported = lower(functools.partial(prefill, fresh), caches, hidden, ids, rows, starts, counts)
        assert exported.platforms == (platform,) and exported.out_avals[-1].shape == (batch, backbone.config.hidden_dim)
        kept = {str(aval.dtype) for aval in exported.out_avals[:-1]}
        assert kept == {dtype}, "caches are the CPU's"

    def loop(state, arrays, ids, positions, uniforms, steps):
        stops, limits = np.full((batch, 8), -1, "int32"), np.full(batch, 1500, "int32")
        open_rows = keras.ops.ones((batch,), "bool")
        choosing = Choosing(chosen.key, arrays, keras.ops.array(stops), keras.ops.array(limits))
        return decode_loop(backbone, choosing, state, ids, positions, open_rows, uniforms, steps)

    marks = initial_marks(chosen, [[1], [2]], 97)
    exported = lower(
        loop, (caches, marks), chosen.arrays, np.ones(batch, "int32"), starts, np.zeros((STEPS, batch), "float32"), np.int32(3)
    )
    assert exported.platforms == (platform,) and len(exported.mlir_module_serialized) > 1000


def test_a_step_gives_its_caches_up():
    """Donated buffers are reused for the caches that come back, so that none is in memory twice."""
    folder, _ = hugging_face_folder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runner = Gemma2CausalLM.from_preset(folder).make_generate_function()
    caches, _ = runner.prefill(runner.new_caches(1, 64), [[2, 5, 7]])
    before = [array for pair in caches for array in pair]
    runner.step(caches, np.array([9], "int32"), np.array([3], "int32"))
    assert all(array.is_deleted() for array in before)


def test_the_products_of_a_step_have_the_keys_on_the_left():
    """In what XLA's CPU compiler makes of them: the other way round, with few queries a row, takes it twice as long."""
    import jax

    random = np.random.default_rng(0)
    queries, keys = (random.normal(size=size).astype("float32") for size in ((5, 3, 2, 1, 4), (5, 3, 7, 4)))
    compiled = jax.jit(backend.attention_scores).lower(queries, keys).compile()
    assert "f32[5,3,7,2]" in compiled.as_text() and " f32[5,3,2,7]{3,2,1,0} dot(" not in compiled.as_text()
    # float32 sums of four products, in another order
    np.testing.assert_allclose(compiled(queries, keys), np.einsum("bkgth,bksh->bkgts", queries, keys), rtol=1e-5, atol=1e-6)
