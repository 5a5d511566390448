"""The signatures of a SavedModel, over one copy of the weights and of the vocabulary."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from keras_gemma2.export import graph
from keras_gemma2.export.graph import Rows
from keras_gemma2.export.graph_cache import own
from keras_gemma2.export.graph_text import GraphText, checked
from keras_gemma2.generation.decode import NOT_A_NUMBER
from keras_gemma2.generation.drawing import most_likely
from keras_gemma2.generation.filters import IN_PROMPT
from keras_gemma2.generation.sampler import PlanKey, Sampler, choose, plan

TEXT_SIGNATURES = ("serving_default", "generate")
TOKEN_SIGNATURES = ("generate_tokens", "score", "logits", "prefill", "decode_step")
SIGNATURES = TEXT_SIGNATURES + TOKEN_SIGNATURES
_ANY = PlanKey(sampled=True, greedy=True, penalized=False, biased=False)
_TINY = float(np.finfo("float32").tiny)
_FILTERS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What an export fixes.

    Args:
        max_new_tokens: of `serving_default` and `generate_tokens`.
        sampler: of these two.
        chat: whether prompts are a user's messages.
        stop_token_ids: ids that end a row.
        signatures: names of those to write.
    """

    max_new_tokens: int
    sampler: Sampler
    chat: bool
    stop_token_ids: tuple[int, ...]
    signatures: tuple[str, ...]


class Signatures:
    """Functions to be traced by TensorFlow, one a signature, named as they are.

    Args:
        lm: a `Gemma2CausalLM`, with TensorFlow as Keras's backend.
        settings: what the export fixes.
    """

    def __init__(self, lm: Any, settings: Settings) -> None:
        self.graph, self.settings = graph.Graph(lm.backbone), settings
        self.config = lm.backbone.config
        has_text = any(name in TEXT_SIGNATURES for name in settings.signatures)
        self.text = GraphText(lm.preprocessor, settings.chat, self.config.max_sequence_length) if has_text else None
        self.pad_token_id = 0 if lm.preprocessor is None else lm.preprocessor.tokenizer.pad_token_id
        self._shared: dict[Any, Any] = {}

    def endpoints(self) -> dict[str, tuple[Callable, list[Any]]]:
        """For each signature its function and the specs of its arguments."""
        import tensorflow as tf

        spec, any_row, ids = tf.TensorSpec, [None], [None, None]
        texts, rows = [spec(any_row, tf.string)], [spec(ids, tf.int32), spec(ids, tf.int32)]
        numbers = [spec([], kind) for kind in (tf.int32, tf.float32, tf.int32, tf.float32, tf.int32)]
        config, dtype = self.config, self._cache_dtype()
        shape = [None, config.num_key_value_heads, None, config.head_dim]
        caches = [spec(shape, dtype, name=name) for name in self._cache_names()]
        every = {
            "serving_default": (self.serving_default, texts),
            "generate": (self.generate, texts + numbers),
            "generate_tokens": (self.generate_tokens, rows),
            "score": (self.score, rows),
            "logits": (self.logits, rows),
            "prefill": (self.prefill, [*rows, spec([], tf.int32)]),
            "decode_step": (self.decode_step, [spec(any_row, tf.int32), spec(any_row, tf.int32), *caches]),
        }
        return {name: every[name] for name in SIGNATURES if name in self.settings.signatures}

    # Text -----------------------------------------------------------------------------------------------------------------

    def serving_default(self, prompts: Any) -> dict[str, Any]:
        new = self._new_as_fixed(self.text.rows(prompts))
        return {"completions": self._texts(new)}

    def generate(self, prompts: Any, max_new_tokens: Any, temperature: Any, top_k: Any, top_p: Any, seed: Any) -> dict[str, Any]:
        import tensorflow as tf

        rows = self.text.rows(prompts)
        for condition, message in (
            (max_new_tokens >= 1, "`max_new_tokens` must be at least 1."),
            (temperature >= 0, "`temperature` must be at least 0 (0 is greedy)."),
            (top_k >= 0, "`top_k` must be at least 0 (0 is off)."),
            ((top_p > 0) & (top_p <= 1), "`top_p` must be over 0 and at most 1 (1 is off)."),
        ):
            max_new_tokens = checked(condition[None], message, max_new_tokens)
        greedy, off, k = temperature == 0, np.float32(np.inf), tf.cast(top_k, tf.float32)
        arrays = {
            "greedy": greedy,
            "temperature": tf.where(greedy, 1.0, tf.maximum(temperature, _TINY)),
            "top_k": tf.where(greedy | (top_k == 0) | (top_k >= self.config.vocabulary_size), off, k),
            "top_p": tf.where(greedy | (top_p >= 1), off, tf.maximum(top_p, _TINY)),
            "min_p": tf.constant(0.0),
            "repetition_penalty": tf.constant(1.0),
            "presence_penalty": tf.constant(0.0),
        }
        new = self._new(_ANY, rows, max_new_tokens, arrays, seed)
        return {"completions": self._texts(new), "num_tokens": tf.reduce_sum(tf.cast(new >= 0, tf.int32), axis=1)}

    def _texts(self, new: Any) -> Any:
        import tensorflow as tf

        return self.text.texts(tf.maximum(new, 0), new >= 0, self.settings.stop_token_ids)

    # Tokens ---------------------------------------------------------------------------------------------------------------

    def generate_tokens(self, token_ids: Any, padding_mask: Any) -> dict[str, Any]:
        import tensorflow as tf

        rows = self._rows(token_ids, padding_mask)
        new = self._new_as_fixed(rows)
        counts = rows.counts + tf.reduce_sum(tf.cast(new >= 0, tf.int32), axis=1)
        length = tf.shape(new)[1] + tf.reduce_max(tf.concat([rows.counts, [0]], axis=0))
        columns = tf.range(length)[None, :]
        joined = tf.concat([rows.token_ids, new], axis=1)
        # A row's new tokens follow its own, and not the longest row's.
        source = tf.where(columns < rows.counts[:, None], columns, columns - rows.counts[:, None] + tf.shape(rows.token_ids)[1])
        source = tf.minimum(source, tf.maximum(tf.shape(joined)[1] - 1, 0))
        known = columns < counts[:, None]
        found = tf.gather(joined, source, batch_dims=1)
        return {"token_ids": tf.where(known, found, self.pad_token_id), "padding_mask": tf.cast(known, tf.int32)}

    def score(self, token_ids: Any, padding_mask: Any) -> dict[str, Any]:
        import tensorflow as tf

        rows = self._rows(token_ids, padding_mask)
        return {"log_probabilities": tf.gather(graph.scored(self.graph, rows), rows.places, batch_dims=1)}

    def logits(self, token_ids: Any, padding_mask: Any) -> dict[str, Any]:
        import tensorflow as tf

        rows = self._rows(token_ids, padding_mask)
        _, hidden = self.graph.run(rows, tf.maximum(tf.shape(token_ids)[1], 1))
        return {"logits": self.graph.logits(tf.gather(hidden, rows.places, batch_dims=1))}

    # A server's own loop --------------------------------------------------------------------------------------------------

    def prefill(self, token_ids: Any, padding_mask: Any, cache_length: Any) -> dict[str, Any]:
        import tensorflow as tf

        rows = self._rows(token_ids, padding_mask)
        longest, context = tf.reduce_max(tf.concat([rows.counts, [1]], axis=0)), self.config.max_sequence_length
        cache_length = checked(
            ((cache_length >= longest) & (cache_length <= context))[None],
            f"`cache_length` must have room for the longest row, and at most for the context, {context} tokens.",
            cache_length,
        )
        caches, hidden = self.graph.run(rows, cache_length)
        last = tf.gather(hidden, tf.maximum(rows.counts - 1, 0), batch_dims=1)
        return {"logits": self.graph.logits(last), "positions": rows.counts, **self._named(caches)}

    def decode_step(self, token_ids: Any, positions: Any, *caches: Any) -> dict[str, Any]:
        token_ids, positions = self._known(token_ids), self._with_room(positions, caches)
        caches, logits = self.graph.step(own(list(zip(caches[::2], caches[1::2]))), token_ids, positions)
        return {"logits": logits, "positions": positions + 1, **self._named(caches)}

    def _with_room(self, positions: Any, caches: Sequence[Any]) -> Any:
        """`positions`, all of which the caches have room for; a ring of the whole window has for any."""
        import tensorflow as tf

        context = self.config.max_sequence_length
        message = f"`positions` must be from 0 to {context - 1}, the context's last. They are not at index"
        positions = checked((positions >= 0) & (positions < context), message, positions)
        first = {self.config.window(kind): 2 * layer for layer, kind in enumerate(self.config.layer_types)}
        for window, place in first.items():
            room = tf.shape(caches[place])[2] - 1
            fits = positions < room if window is None else (positions < room) | (room >= window)
            message = "The caches have no room for `positions`: give `prefill` a larger `cache_length`. They end before index"
            positions = checked(fits, message, positions)
        return positions

    def _cache_names(self) -> list[str]:
        return [f"{kind}_{layer}" for layer in range(self.config.num_layers) for kind in ("keys", "values")]

    def _named(self, caches: list[Any]) -> dict[str, Any]:
        return dict(zip(self._cache_names(), [array for pair in caches for array in pair]))

    def _cache_dtype(self) -> str:
        from keras_gemma2 import backend

        return backend.cache_dtype(self.graph.backbone.compute_dtype)

    # What they share ------------------------------------------------------------------------------------------------------

    def _rows(self, token_ids: Any, padding_mask: Any) -> Rows:
        import tensorflow as tf

        context = self.config.max_sequence_length
        same = tf.reduce_all(tf.shape(token_ids) == tf.shape(padding_mask))
        padding_mask = checked(same[None], "`token_ids` and `padding_mask` must have the same shape.", padding_mask)
        rows = graph.aligned(self._known(tf.where(padding_mask != 0, token_ids, 0)), padding_mask)
        counts = checked(rows.counts > 0, "Every row must have a token (`<bos>` at least). All is padding at index", rows.counts)
        message = f"Rows must have at most {context} tokens, the model's context. Shorten those at index"
        return rows._replace(counts=checked(counts <= context, message, counts))

    def _known(self, token_ids: Any) -> Any:
        import tensorflow as tf

        size = self.config.vocabulary_size
        flat = tf.reshape((token_ids >= 0) & (token_ids < size), [-1])
        return checked(flat, f"`token_ids` must be from 0 to {size - 1}, the vocabulary. It is not at (flattened) index", token_ids)

    def _new_as_fixed(self, rows: Rows) -> Any:
        """New tokens with the sampler and the length that the export fixed."""
        import tensorflow as tf

        sampler = self.settings.sampler
        fixed = plan([sampler], self.config.vocabulary_size)
        plain = not (fixed.key.penalized or fixed.key.biased)
        arrays = {name: tf.constant(fixed.arrays[name][0]) for name in ("greedy", *_FILTERS)}
        # Its own seeds, which `tf.random.set_seed` at export would fix.
        seed = tf.raw_ops.RandomUniformInt(shape=[1], minval=0, maxval=2**31 - 1, seed=0, seed2=0)[0]
        return self._new(_ANY if plain else fixed.key, rows, tf.constant(self.settings.max_new_tokens), arrays, seed)

    def _new(self, key: PlanKey, rows: Rows, max_new_tokens: Any, arrays: dict[str, Any], seed: Any) -> Any:
        """int32 `[B, n]`: new tokens, and a negative number after a row's last. One traced function a `key`."""
        import tensorflow as tf

        if key not in self._shared:
            self._shared[key] = tf.function(lambda *arguments: self._generated(key, *arguments), autograph=False)
        new = self._shared[key](rows.token_ids, rows.counts, max_new_tokens, arrays, seed)
        message = "The model's logits are not numbers (NaN or infinite): its weights or activations are. Row"
        return checked(tf.reduce_all(new != NOT_A_NUMBER, axis=1), message, new)

    def _generated(self, key: PlanKey, token_ids: Any, counts: Any, max_new_tokens: Any, arrays: dict[str, Any], seed: Any) -> Any:
        import tensorflow as tf

        batch, size = tf.shape(token_ids)[0], self.config.vocabulary_size
        arrays = {name: tf.fill([batch], value) for name, value in arrays.items()}
        if key.biased:
            bias = self.settings.sampler.logit_bias
            row = tf.scatter_nd([[i] for i in bias], tf.constant(list(bias.values()), tf.float32), [size])
            arrays["bias"] = tf.tile(row[None], [batch, 1])

        @tf.function(autograph=False)  # traced once, wherever it is used
        def chosen(marks: Any, logits: Any, step: Any) -> tuple[Any, Any]:
            def drawn() -> Any:
                uniforms = tf.random.stateless_uniform([batch], tf.stack([seed, step]))
                return choose(key, arrays, marks, logits, uniforms)

            if key == _ANY:  # a greedy batch pays for no filters
                return tf.cond(tf.reduce_all(arrays["greedy"]), lambda: (most_likely(logits), tf.identity(marks)), drawn)
            return drawn()

        rows = Rows(token_ids, counts, token_ids)
        # Not `counts + max_new_tokens`, which may be more than an int32.
        limits = counts + tf.minimum(max_new_tokens, self.config.max_sequence_length - counts)
        return graph.generated(self.graph, rows, limits, self.settings.stop_token_ids, chosen, self._marks(key, rows))

    def _marks(self, key: PlanKey, rows: Rows) -> Any:
        """Which tokens the prompts hold: int8 `[B, V]`, or `[B, 1]` where none is penalized."""
        import tensorflow as tf

        batch, length = tf.shape(rows.token_ids)[0], tf.shape(rows.token_ids)[1]
        if not key.penalized:
            return tf.zeros([batch, 1], tf.int8)
        size = self.config.vocabulary_size
        real = tf.range(length)[None, :] < rows.counts[:, None]
        places = tf.where(real, rows.token_ids, size)  # padding marks a column more
        index = tf.stack([tf.broadcast_to(tf.range(batch)[:, None], tf.shape(places)), places], axis=-1)
        ones = tf.fill(tf.shape(places), tf.constant(IN_PROMPT, tf.int32))
        marks = tf.tensor_scatter_nd_max(tf.zeros([batch, size + 1], tf.int32), index, ones)
        return tf.cast(marks[:, :size], tf.int8)
