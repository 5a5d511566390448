"""Generation as a TensorFlow graph of dynamic sizes: any batch, any length up to the context, nothing on the host.

The blocks, caches and samplers are those of `generation/`; here are the loops around them that a graph needs. It is traced with
TensorFlow as Keras's backend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_gemma2 import backend
from keras_gemma2.cache import Cache, LayerCache, Tokens
from keras_gemma2.export.graph_cache import Places, StepCache, places
from keras_gemma2.generation.decode import CLOSED, NOT_A_NUMBER
from keras_gemma2.generation.drawing import log_probability
from keras_gemma2.layers.linear import Linear

PIECE, SHORTEST_PIECE, TOKENS_A_PIECE = 512, 32, 8192  # tokens of a row that run at a time, and of all rows
SCORED = 128  # tokens whose logits are in memory at once when texts are scored
LARGEST_CAP = 40.0  # of logits, with which `exp(-2 cap)` is a float32 of full precision
# (marks, logits [B, V], step) -> (int32 tokens [B], -1 where the logits are no numbers, and the marks).
Choose = Callable[[Any, Any, Any], tuple[Any, Any]]


class Rows(NamedTuple):
    """Padded rows with their tokens moved to the left.

    Args:
        token_ids: int32 `[B, T]`; after a row's tokens stands padding.
        counts: int32 `[B]`, how many are real.
        places: int32 `[B, T]`, where each of the columns that were given is now.
    """

    token_ids: Any
    counts: Any
    places: Any


def aligned(token_ids: Any, padding_mask: Any) -> Rows:
    """Rows padded anywhere, with their tokens moved to the left."""
    import tensorflow as tf

    real = tf.cast(padding_mask != 0, tf.int32)
    counts = tf.reduce_sum(real, axis=1)
    padding = 1 - real
    places = tf.where(real > 0, tf.cumsum(real, axis=1) - 1, counts[:, None] + tf.cumsum(padding, axis=1) - 1)
    order = tf.argsort(places, axis=1)
    return Rows(tf.gather(token_ids * real, order, batch_dims=1), counts, places)


class Graph:
    """A model's forward passes over caches, each traced once, whatever uses it.

    A decoder block is a function of its weights, which all blocks of a kind share: a graph of 26 layers is then hardly larger than
    one of two, and as soon written and loaded.

    Args:
        backbone: a `Gemma2Backbone`.
    """

    def __init__(self, backbone: Any) -> None:
        import tensorflow as tf

        self.backbone = backbone
        self._blocks: dict[Any, Any] = {}
        self._run = tf.function(self._run_rows, autograph=False)
        self._steps = {rows: tf.function(self._decode_step, autograph=False) for rows in ("few", "plain")}

    def logits(self, hidden: Any) -> Any:
        """Float32 logits `[..., V]` of hidden states after the final norm."""
        return self.backbone.token_embedding(hidden, reverse=True)

    def run(self, rows: Rows, room: Any) -> tuple[list[Cache], Any]:
        """Runs rows, a piece at a time.

        Args:
            rows: what to run.
            room: int32 scalar, tokens that the caches have room for.

        Returns:
            Caches, and the hidden states `[B, T, D]` after the final norm.
        """
        return self._run(rows.token_ids, rows.counts, room)

    def step(self, caches: list[Cache], token_ids: Any, positions: Any) -> tuple[list[Cache], Any]:
        """Runs one token a row; gives the caches, which it overwrites, and the float32 logits `[B, V]` of the next."""
        from keras_gemma2.backend.tensorflow_graph import by_rows, known_rows

        return by_rows(ops.shape(token_ids)[0], lambda: self._steps[known_rows()](caches, token_ids, positions))

    def _run_rows(self, token_ids: Any, counts: Any, room: Any) -> tuple[list[Cache], Any]:
        import tensorflow as tf

        batch, length = tf.shape(token_ids)[0], tf.shape(token_ids)[1]
        together = tf.clip_by_value(TOKENS_A_PIECE // tf.maximum(batch, 1), SHORTEST_PIECE, PIECE)
        size = tf.clip_by_value(length, 1, together)
        pieces = tf.maximum(-(-length // size), 1)
        token_ids = tf.pad(token_ids, [[0, 0], [0, pieces * size - length]])

        def run(i: Any, found: Any, caches: list[Cache]) -> tuple:
            start = i * size
            starts = tf.fill([batch], start)
            piece = dict.fromkeys(self.backbone.config.layer_types, (starts, tf.clip_by_value(counts - start, 0, size), size))
            positions = starts[:, None] + tf.range(size)[None]
            x, caches = self._extend(_piece_cache, caches, tf.slice(token_ids, [0, start], [batch, size]), positions, piece)
            return i + 1, found.write(i, self.backbone.layer_norm(x)), caches

        width = self.backbone.config.hidden_dim
        found = tf.TensorArray(self.backbone.compute_dtype, pieces, element_shape=[None, None, width])
        start = (tf.constant(0), found, self._empty_caches(batch, room))
        _, found, caches = tf.while_loop(lambda i, *_: i < pieces, run, start, parallel_iterations=1)
        joined = tf.transpose(found.stack(), [1, 0, 2, 3])
        return caches, tf.reshape(joined, [batch, pieces * size, width])[:, :length]

    def _decode_step(self, caches: list[Cache], token_ids: Any, positions: Any) -> tuple[list[Cache], Any]:
        config = self.backbone.config
        first = {kind: caches[config.layer_types.index(kind)][0] for kind in set(config.layer_types)}
        shared = {kind: tuple(places(cache, positions, config.window(kind))) for kind, cache in first.items()}
        x, caches = self._extend(_step_cache, caches, token_ids[:, None], positions[:, None], shared)
        return caches, self.logits(self.backbone.layer_norm(x)[:, 0])

    def _empty_caches(self, batch: Any, room: Any) -> list[Cache]:
        config = self.backbone.config
        dtype = backend.cache_dtype(self.backbone.compute_dtype)

        def empty(kind: str) -> Any:
            window = config.window(kind)
            slots = room if window is None else ops.minimum(room, window)
            return ops.zeros((batch, config.num_key_value_heads, slots + 1, config.head_dim), dtype)

        return [(empty(kind), empty(kind)) for kind in config.layer_types]

    def _extend(self, view: Callable, caches: list[Cache], token_ids: Any, positions: Any, shared: dict[str, tuple]) -> tuple:
        """`generation.decode.extend`, by blocks that are shared.

        Args:
            view: makes, of a layer's cache, its window, and what `shared` has for its kind, what attention takes.
            caches: one a layer.
            token_ids, positions: int32 `[B, T]`.
            shared: tensors, for each kind of layer.

        Returns:
            The hidden states `[B, T, D]`, and the caches.
        """
        backbone, stored = self.backbone, []
        cos, sin = backbone.rotary_embedding(positions)
        x = backbone.token_embedding(token_ids)
        for block, kind, cache in zip(backbone.transformer_layers, backbone.config.layer_types, caches):
            weights = used_weights(block)
            values = [weight.value for weight in weights]
            x, keys, new_values = self._shared_block(block, kind, weights, view)(values, x, cos, sin, list(cache), shared[kind])
            stored.append((keys, new_values))
        return x, stored

    def _shared_block(self, block: Any, kind: str, weights: list[Any], view: Callable) -> Any:
        """The function of all blocks with such weights; it is traced from the first of them."""
        import tensorflow as tf

        from keras_gemma2.backend.tensorflow_graph import known_rows

        shapes = tuple((str(weight.value.dtype), tuple(weight.shape)) for weight in weights)
        window = None if view is _step_cache else self.backbone.config.window(kind)  # a step's window is in its masks
        key = (view, known_rows(), window, shapes, adapter_scales(block))
        if key not in self._blocks:

            def run(values: Any, x: Any, cos: Any, sin: Any, cache: Any, shared: Any) -> tuple:
                layer = view(tuple(cache), window, *shared)
                with keras.StatelessScope(state_mapping=list(zip(weights, values))):
                    found = block(x, cos, sin, None, cache=layer)
                return found, *layer.stored

            self._blocks[key] = tf.function(run, autograph=False, reduce_retracing=True)
        return self._blocks[key]


def _piece_cache(cache: Cache, window: int | None, starts: Any, counts: Any, steps: Any) -> LayerCache:
    return LayerCache(cache, Tokens(None, starts, counts, steps), window)


def _step_cache(cache: Cache, window: int | None, *shared: Any) -> StepCache:
    return StepCache(cache, Places(*shared))


def adapter_scales(block: Any) -> tuple:
    """The layers of a decoder block that the active adapter changes, and its scale in each, which is a number of the graph."""
    layers = [layer for layer in block._flatten_layers() if isinstance(layer, Linear) and layer.active_adapter is not None]
    return tuple((layer.name, layer.adapters[layer.active_adapter].scale) for layer in layers)


def used_weights(block: Any) -> list[Any]:
    """The weights of a decoder block, without those of adapters that are not active."""
    idle = set()
    for layer in block._flatten_layers():
        if isinstance(layer, Linear):
            others = [factors for name, factors in layer.adapters.items() if name != layer.active_adapter]
            idle |= {id(weight) for factors in others for weight in factors.weights}
    return [weight for weight in block.weights if id(weight) not in idle]


def generated(graph: Graph, rows: Rows, limits: Any, stop_token_ids: tuple[int, ...], choose: Choose, marks: Any) -> Any:
    """Continues rows until a stop token or their limit.

    Args:
        graph: of the model.
        rows: the prompts.
        limits: int32 `[B]`, tokens that each row may have, prompt included.
        stop_token_ids: ids that end a row.
        choose: chooses the tokens.
        marks: what `choose` keeps from token to token.

    Returns:
        int32 `[B, n]`: each row's new tokens, a stop token included, and `CLOSED` after them. n is the most that a row may have.
        `NOT_A_NUMBER` where the logits were none.
    """
    import tensorflow as tf

    from keras_gemma2.backend.tensorflow_graph import by_rows

    steps = tf.maximum(tf.reduce_max(limits - rows.counts), 0)
    caches, hidden = graph.run(rows, tf.maximum(tf.reduce_max(limits), 1))
    hidden = tf.gather(hidden, tf.maximum(rows.counts - 1, 0), batch_dims=1)
    stops, columns = tf.constant(list(stop_token_ids) or [CLOSED], tf.int32), tf.range(steps)[None, :]

    def take(i: Any, logits: Any, positions: Any, is_open: Any, marks: Any, found: Any) -> tuple:
        chosen, marks = choose(marks, logits, i)
        tokens = tf.where(is_open, tf.where(chosen >= 0, chosen, NOT_A_NUMBER), CLOSED)
        stopped = tf.reduce_any(chosen[:, None] == stops, axis=1)
        still = is_open & ~stopped & (positions + 1 < limits) & (chosen >= 0)
        return tokens, still, marks, tf.where(columns == i, tokens[:, None], found)

    def step(i: Any, tokens: Any, positions: Any, is_open: Any, marks: Any, found: Any, caches: list[Cache]) -> tuple:
        caches, logits = graph.step(caches, tokens, positions)
        positions = tf.where(is_open, positions + 1, positions)
        chosen, is_open, marks, found = take(i, logits, positions, is_open, marks, found)
        # Rows that have ended run along in place, on their last token: what they compute is not read.
        return i + 1, tf.where(chosen >= 0, chosen, tokens), positions, is_open, marks, found, caches

    found = tf.fill([tf.shape(limits)[0], steps], CLOSED)
    first = take(tf.constant(0), graph.logits(hidden), rows.counts, rows.counts < limits, marks, found)
    tokens, is_open, marks, found = first
    state = (tf.constant(1), tf.maximum(tokens, 0), rows.counts, is_open, marks, found, caches)

    def goes_on(i: Any, tokens: Any, positions: Any, is_open: Any, *_: Any) -> Any:
        return tf.reduce_any(is_open)

    def loop() -> Any:
        return tf.while_loop(goes_on, step, state, parallel_iterations=1)[5]

    return by_rows(tf.shape(limits)[0], loop)


def scored(graph: Graph, rows: Rows) -> Any:
    """Float32 `[B, T]`: the log-probability of each token given those before it; 0 for the first and for padding."""
    import tensorflow as tf

    batch, length = tf.shape(rows.token_ids)[0], tf.shape(rows.token_ids)[1]
    before = tf.maximum(length - 1, 0)  # nothing follows the last
    _, hidden = graph.run(Rows(rows.token_ids[:, :before], tf.minimum(rows.counts, before), rows.places), tf.maximum(before, 1))
    width, total = graph.backbone.config.hidden_dim, batch * before
    blocks = -(-total // SCORED)
    fill = [[0, blocks * SCORED - total]]
    hidden = tf.pad(tf.reshape(hidden, [total, width]), [*fill, [0, 0]])
    targets = tf.pad(tf.reshape(rows.token_ids[:, 1:], [total]), fill)

    def score(i: Any, found: Any) -> tuple[Any, Any]:
        some = tf.slice(hidden, [i * SCORED, 0], [SCORED, width])
        return i + 1, found.write(i, _log_probability(graph, some, tf.slice(targets, [i * SCORED], [SCORED])))

    found = tf.TensorArray(tf.float32, blocks, element_shape=[SCORED])
    _, found = tf.while_loop(lambda i, _: i < blocks, score, (tf.constant(0), found), parallel_iterations=1)
    scores = tf.reshape(tf.reshape(found.stack(), [-1])[:total], [batch, before])
    scores = tf.pad(scores, [[0, 0], [1, 0]])[:, :length]
    known = tf.range(length)[None, :] < rows.counts[:, None]
    return tf.where(known, scores, 0.0)


def _log_probability(graph: Graph, hidden: Any, tokens: Any) -> Any:
    """Float32 `[n]`: the log-probability of `tokens [n]` after `hidden [n, D]`.

    A capped logit is `c tanh(z / c) = c - 2 c sigmoid(-2 z / c)`: of logits so written the largest that there can be is known, so
    that they are looked at once, and sigmoids take TensorFlow less time than tanh. And where the table is several variables, logits
    are taken from one after the other, and not put together.
    """
    import tensorflow as tf

    from keras_gemma2.backend.tensorflow_graph import parts_of, transposed_product

    embedding = graph.backbone.token_embedding
    cap = embedding.logit_soft_cap
    if embedding.quantization_mode is not None or cap is None or cap > LARGEST_CAP:
        return log_probability(graph.logits(hidden), tokens)
    is_float32 = embedding.compute_dtype == embedding.variable_dtype == "float32"
    count = tf.range(tf.shape(tokens)[0])
    total, chosen, first = tf.zeros_like(tokens, tf.float32), tf.zeros_like(tokens, tf.float32), 0
    for part in parts_of(embedding.embeddings):
        if is_float32:
            doubled = transposed_product(hidden * (-2.0 / cap), part)
        else:
            doubled = tf.transpose(backend.linear(hidden, part, embedding.compute_dtype, float32_output=True)) * (-2.0 / cap)
        below = tf.sigmoid(doubled) * (2.0 * cap)  # [V, n]: how far under the cap
        total += tf.reduce_sum(tf.exp(-below), axis=0)
        index = tokens - first
        here = tf.logical_and(index >= 0, index < part.shape[0])
        chosen = tf.where(here, tf.gather_nd(below, tf.stack([tf.where(here, index, 0), count], axis=1)), chosen)
        first += part.shape[0]
    return -chosen - tf.math.log(total)
