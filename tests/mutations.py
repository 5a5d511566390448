"""Breaks the model on purpose, one line at a time, and checks that the tests notice: `python tests/mutations.py`.

Each mutation is applied to a copy of the package; the tests named with it must fail there. Kept as a list, so that a test
that stops noticing is noticed. About 10 s a mutation on the torch backend, 40 where a graph is exported.
"""

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Mutation:
    """What is broken, where, how, and which tests must fail (`-k` expression)."""

    what: str
    file: str
    old: str
    new: str
    tests: str = "test_parity.py"
    select: str = "test_logits_equal_transformers"
    backend: str = "torch"


ATTENTION, BLOCK, EMBEDDING = "layers/attention.py", "layers/decoder_block.py", "layers/embedding.py"
BLOCKED, DECODE, DECODING = "layers/blocked_attention.py", "generation/decode.py", "generation/decoding.py"
FROZEN, DISTILL = "backend/torch_frozen_loss.py", "training/distillation_terms.py"
LONG = ("test_long_prompts.py", "long_ragged")
PROGRAMS = ("test_export_programs.py", "test_tokens_and_logits")
GRAPH = ("test_export_graph.py", "padded_anywhere or pieces or scores", "tensorflow")
MUTATIONS = [
    Mutation("queries scaled by head_dim (27B)", ATTENTION, "self.query_pre_attn_scalar**-0.5", "self.head_dim**-0.5"),
    Mutation("attention cap dropped", ATTENTION, "soft_cap(self._scores(queries, keys), self.logit_soft_cap)", "self._scores(queries, keys)"),
    Mutation("final cap dropped", EMBEDDING, "return soft_cap(self.uncapped_logits(hidden), self.logit_soft_cap)", "return self.uncapped_logits(hidden)"),
    Mutation("caps swapped", "backbone.py", "config.final_logit_soft_cap, dtype", "config.attention_logit_soft_cap, dtype"),
    Mutation("window one longer", "layers/mask.py", "queries - keys < window", "queries - keys <= window"),
    Mutation("window one shorter", "layers/mask.py", "queries - keys < window", "queries - keys < window - 1"),
    Mutation("window dropped", "config.py", "return self.sliding_window_size if layer_type == LOCAL else None", "return None"),
    Mutation("local and global inverted", "config.py", "LAYER_TYPES = (LOCAL, GLOBAL)", "LAYER_TYPES = (GLOBAL, LOCAL)", "test_checkpoints.py", "transformers_4"),
    Mutation("not causal", "layers/mask.py", "keys <= queries)", "keys <= queries + 1)"),
    Mutation("grouped heads interleaved", ATTENTION, "(batch, steps, kv_heads, groups, self.head_dim))\n        keys", "(batch, steps, groups, kv_heads, self.head_dim)).swapaxes(2, 3)\n        keys"),
    Mutation("RoPE pairs neighbours", "layers/rotary.py", "first, second = ops.split(ops.cast(x, \"float32\"), 2, axis=-1)", "x32 = ops.cast(x, \"float32\")\n    first, second = x32[..., ::2], x32[..., 1::2]"),
    Mutation("RoPE turns the other way", "layers/rotary.py", "first * cos - second * sin, second * cos + first * sin", "first * cos + second * sin, second * cos - first * sin"),
    Mutation("RoPE base from a default", "backbone.py", "RotaryEmbedding(head_dim, rope_max_wavelength", "RotaryEmbedding(head_dim, 10000.0"),
    Mutation("epsilon from a default", BLOCK, "RMSNorm(self.config.layer_norm_epsilon", "RMSNorm(1e-6"),
    Mutation("norm without 1 +", "layers/rms_norm.py", "(1.0 + ops.cast(self.scale", "(ops.cast(self.scale"),
    Mutation("exact GELU", "layers/feed_forward.py", "approximate=True", "approximate=False"),
    Mutation("gate and up swapped", "layers/feed_forward.py", "gate, up = self.gate(inputs), self.up(inputs)", "up, gate = self.gate(inputs), self.up(inputs)"),
    Mutation("post-attention norm dropped", BLOCK, "self._drop(self.post_attention_norm(attended), training)", "self._drop(attended, training)"),
    Mutation("post-feed-forward norm dropped", BLOCK, "self.post_ffw_norm(self.feed_forward(self.pre_ffw_norm(x)))", "self.feed_forward(self.pre_ffw_norm(x))"),
    Mutation("embedding not scaled", EMBEDDING, "ops.cast(rows, dtype) * scale[..., None]", "ops.cast(rows, dtype) + 0 * scale[..., None]"),
    Mutation("embedding scale unrounded", EMBEDDING, "ops.cast(ops.cast(math.sqrt(self.hidden_dim), self.compute_dtype), dtype)", "ops.cast(math.sqrt(self.hidden_dim) + 0.5, dtype)", "test_layers.py", "embedding_scale"),
    Mutation("norm in bfloat16", "layers/rms_norm.py", "x = ops.cast(inputs, \"float32\")", "x = inputs", "test_layers.py", "bfloat16_computes_in_float32"),
    Mutation("RoPE in bfloat16", ATTENTION, "super().__init__(autocast=False, **kwargs)", "super().__init__(**kwargs)", "test_layers.py", "rotary_stays_float32"),
    Mutation("masked rows NaN", BLOCKED, "MASKED_SCORE = -1e30", "MASKED_SCORE = -float(\"inf\")", "test_layers.py", "every_key_masked"),
    Mutation("float16 products not saturated", "layers/numerics.py", "    return ops.clip(x, -FLOAT16_MAX, FLOAT16_MAX)\n", "    return x\n", "test_parity.py", "activations_overflow"),
    Mutation("float16 norms not saturated", "layers/numerics.py", "ops.clip(x, -FLOAT16_MAX, FLOAT16_MAX) if dtype == \"float16\" else x", "x", "test_layers.py", "rms_norm_output_dtype"),
    Mutation("positions count padding", "layers/mask.py", "return ops.cumsum(real, axis=-1)", "return ops.cumsum(ops.ones_like(real), axis=-1)", "test_backbone.py", "any_padding"),
    Mutation("padding visible", "layers/mask.py", "ops.logical_and(key_is_real[:, None, :], keys <= queries)", "keys <= queries", "test_backbone.py", "any_padding"),
    Mutation("a graph's ring one slot short", "export/graph.py", "ops.minimum(room, window)", "ops.minimum(room, window - 1)", *GRAPH),
    Mutation("a graph's piece not where it stands", "export/graph.py", "starts = tf.fill([batch], start)", "starts = tf.fill([batch], 0)", *GRAPH),
    Mutation("a graph's rows run on", "export/graph.py", "is_open & ~stopped &", "is_open &", *GRAPH),
    Mutation("a program's logits of another token", "export/steps.py", "ops.maximum(counts - 1, 0)", "ops.maximum(counts - 2, 0)", *PROGRAMS, "jax"),
    Mutation("two embeddings in a LiteRT file", "export/steps.py", "ops.maximum(hidden, ml_dtypes.finfo(backbone.compute_dtype).min)", "hidden", *PROGRAMS, "tensorflow"),
    Mutation("an idle adapter goes along", "export/programs.py", " and not set(adapters.settings) - {adapters.active}", "", "test_export_programs.py", "idle", "jax"),
    Mutation("paths in a program", "backend/jax_programs.py", 'jax.config.update(name, ".*")', "pass", *PROGRAMS, "jax"),
    Mutation("a graph scores the token itself", "export/graph.py", "rows.token_ids[:, 1:], [total]", "rows.token_ids[:, :-1], [total]", *GRAPH),
    Mutation("a graph reads markers of a message", "export/graph_text.py", "reading_proto(self._tokenizer, False)", "self._tokenizer.proto", "test_export_graph.py", "chat_answers", "tensorflow"),
    Mutation("idle adapters are exported", "export/graph.py", "if name != layer.active_adapter", "if False", "test_export_saved_model.py", "active_adapter", "tensorflow"),
    Mutation("local layers keep full caches", "cache.py", "length if window is None else min(window + slack, length)", "length", "test_generation.py", "keep_a_ring"),
    Mutation("ring one slot short", "cache.py", "min(window + slack, length)", "min(window - 1, length)", "test_generation.py", "cached_logits"),
    Mutation("ring keeps the prompt's beginning", "cache.py", "positions >= ends - self.slots", "positions < self.slots", "test_generation.py", "cached_logits"),
    Mutation("padding is cached", "cache.py", "ops.logical_and(positions < ends, ", "ops.logical_and(positions < ends + 9, ", "test_generation.py", "cached_logits"),
    Mutation("a moved block counts twice", "cache.py", "slots >= first, slots", "slots >= 0, slots", *LONG),
    Mutation("the slot that is never seen is", "cache.py", "slots < self.slots)", "slots <= self.slots)", "test_generation.py", "cached_logits"),
    Mutation("later chunks do not see earlier ones", "cache.py", "if not self.tokens.fresh:", "if False:", *LONG),
    Mutation("running sum not rescaled", BLOCKED, "total * shrink", "total", *LONG),
    Mutation("cap dropped over the cache", BLOCKED, "soft_cap(scores, self.cap)", "scores", "test_generation.py", "cached_logits"),
    Mutation("rows decode from the longest", DECODING, "np.array([len(row) for row in self.rows], \"int32\")  # of", "np.full(len(self.rows), max(map(len, self.rows)), \"int32\")  # of", "test_generation.py", "generate_equals"),
    Mutation("stop token ignored", DECODE, "ops.equal(chosen[:, None], choosing.stop_token_ids)", "ops.equal(chosen[:, None], -5)", "test_generation.py", "stop_tokens"),
    Mutation("draws do not depend on the position", DECODING, "return uniforms(self.seeds, positions)", "return uniforms(self.seeds, positions * 0)", "test_calls.py", "seed_gives"),
    Mutation("end of turn not a stop", "tokenizer.py", "own = (self.end_token_id, self.end_of_turn_token_id)", "own = (self.end_token_id,)", "test_causal_lm.py", "end_of_turn"),
    Mutation("duplicate head not compared", "checkpoints/hf.py", "        _check_tied_head(tensors, source.path)", "        pass", "test_checkpoints.py", "duplicate_head"),
    Mutation("tapes outlive the weights they read", "backend/torch_tapes.py", "if state != self._state:", "if False:", "test_tape.py", "changed_weights"),
    Mutation("tapes do not look again", "backend/torch_tape.py", " != {self._expression(operation.results)}: raise", " is None: raise", "test_tape.py", "asked_again"),
    Mutation("writes do not keep reads apart", "backend/torch_tape.py", "self.changed.update(", "set().update(", "test_tape.py", "writes"),
    Mutation("the loop does not end with its rows", DECODE, "ops.logical_and(i < steps, ops.any(variables[3]))", "i < steps", "test_tape.py", "loop_ends"),
    Mutation("one tensor in two arguments not told apart", "backend/torch_tapes.py", "return places if len(first) < len(places) else ()", "return ()", "test_tape.py", "one_tensor"),
    Mutation("what comes of weights is kept", "backend/torch_tape.py", "if id(tensor) not in self.weights:", "if True:", "test_tape.py", "changed_weights"),
    Mutation("recordings run under autocast", "backend/torch.py", "is_taped = tapes is not None and", "is_taped = True or", "test_tape.py", "autocast"),
    Mutation("padding stops beams", "generation/own_loop.py", "NOT_YET = -1", "NOT_YET = 0", "test_generation.py", "padding_does_not"),
    Mutation("beams keep the caller's sampler", "generation/own_loop.py", "sampler = type(sampler).from_config(sampler.get_config())", "pass", "test_generation.py", "sampler_that_changes"),
    Mutation("beams of NaN", "generation/own_loop.py", "    if broken.size:", "    if False:", "test_calls.py", "not_numbers"),
    Mutation("low digits dropped", "backend/torch_int8.py", "torch.add(low, high, alpha=_BASE)", "high.mul(_BASE)", "test_products.py", "variables_of_codes"),
    Mutation("the loss's cap is not differentiated", FROZEN, "share.mul_((capped / cap).square_().neg_().add_(1.0))", "pass", "test_loss.py", "frozen"),
    Mutation("frozen loss: the label in the wrong tile", FROZEN, "labels[inside] - tile.start", "labels[inside] * 0", "test_loss.py", "frozen"),
    Mutation("weights do not count in the gradient", FROZEN, "cap, table) * weight[:, None]", "cap, table)", "test_loss.py", "frozen"),
    Mutation("GELU's gradient without up", "backend/torch_gated.py", "gelu_backward(upstream[rows] * up[rows]", "gelu_backward(upstream[rows]", "test_layers.py", "gated"),
    Mutation("dropout drawn anew when computed again", "backend/torch_recompute.py", "seed.assign(state)", "pass", "test_recompute.py", "drawn_once"),
    Mutation("blocks not computed again", "backend/torch_recompute.py", "if torch.is_grad_enabled()", "if False", "test_recompute.py", "computed_again"),
    Mutation("temperature not squared", DISTILL, "loss = alpha * t**2 * kl", "loss = alpha * t * kl", "test_distillation.py", "loss_and_gradients"),
    Mutation("gradient of the distillation not scaled", DISTILL, "gradient = alpha * t * to_teacher", "gradient = alpha * to_teacher", "test_distillation.py", "loss_and_gradients"),
    Mutation("distillation's cap is not differentiated", DISTILL, "gradient = gradient * (1.0 - ops.square(capped / self.cap))", "pass", "test_distillation.py", "loss_and_gradients"),
    Mutation("what records leave out does not count", DISTILL, "kl = kl + ops.where(rest > 0", "kl = kl + 0 * ops.where(rest > 0", "test_distillation.py", "records"),
    Mutation("records of the row before", "training/teacher_records.py", "slices[\"ids\"][start:end]", "slices[\"ids\"][0 : end - start]", "test_distillation.py", "records"),
    Mutation("the teacher is trained", "training/distiller.py", "self.teacher.trainable = False", "pass", "test_distillation.py", "teacher_stays"),
    Mutation("a run's optimizer is not restored", "finetuning/state.py", "\"optimizer\": lm.optimizer.variables, ", "\"optimizer\": [], ", "test_finetune.py", "killed or qlora"),
    Mutation("each epoch in the same order", "finetuning/rows.py", "default_rng([seed, epoch])", "default_rng([seed, 0])", "test_finetune.py", "orders"),
    Mutation("a run does not seed its steps", "finetuning/run.py", "keras.utils.set_random_seed((self._settings.seed * 1_000_003 + step) % 2**32)", "pass", "test_finetune.py", "killed or qlora"),
    Mutation("rows that fill a batch count", "finetuning/rows.py", "weights[len(chosen) :] = 0", "pass", "test_finetune.py", "gives_the_loss"),
    Mutation("two runs in one folder", "staging.py", "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass", "test_finetune.py", "two_runs"),
    Mutation("packed samples see each other", "layers/mask.py", "ops.cumsum(sizes, axis=-1) - sizes", "0 * sizes", "test_packing.py", "rows_of_their_own"),
    Mutation("gradients are not counted", "training/memory.py", "gradients = sum(_size(*v) for v in trained.values())", "gradients = 0", "test_memory_report.py", "counted_exactly"),
    Mutation("checkpointing is not counted", "training/memory.py", "step.stream if gradient_checkpointing else block", "block", "test_memory_report.py", "what_follows or quarter"),
]


def survives(mutation: Mutation, folder: Path) -> bool:
    """Whether the tests still pass with the mutation applied."""
    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(ROOT / "keras_gemma2", copy / "keras_gemma2")
    shutil.copytree(ROOT / "tests", copy / "tests")
    path = copy / "keras_gemma2" / mutation.file
    source = path.read_text(encoding="utf-8")
    if mutation.old not in source:
        raise SystemExit(f"{mutation.what}: {mutation.file} no longer has {mutation.old!r}; bring the list up to date.")
    path.write_text(source.replace(mutation.old, mutation.new), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-x", mutation.tests, "-k", mutation.select]
    environment = {"KERAS_BACKEND": mutation.backend, **os.environ, "PYTHONPATH": str(copy)}
    result = subprocess.run(command, cwd=copy / "tests", env=environment, capture_output=True, text=True)
    if result.returncode not in (0, 1):  # 1: tests failed, which is what is wanted; anything else did not test at all
        raise SystemExit(f"{mutation.what}: pytest ended with {result.returncode}\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
    return result.returncode == 0


def main() -> int:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    chosen = [mutation for mutation in MUTATIONS if wanted in mutation.what]
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        for mutation in chosen:
            lives = survives(mutation, Path(folder))
            print(f"{'SURVIVES' if lives else 'killed  '}  {mutation.what}", flush=True)
            survivors += [mutation.what] if lives else []
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutations killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
