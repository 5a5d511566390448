"""`Distiller`: a student learns a teacher's distribution over next tokens."""

from __future__ import annotations

import os
from typing import Any

import keras
from keras import ops

from keras_gemma2 import backend
from keras_gemma2.inputs import TOKEN_KEYS
from keras_gemma2.layers.numerics import soft_cap
from keras_gemma2.training.adapters import renew_optimizer
from keras_gemma2.training.cross_entropy import rows_a_chunk
from keras_gemma2.training.data import Reader
from keras_gemma2.training.data_streams import DataOfCall
from keras_gemma2.training.distillation_terms import SUMS, DistillationTerms
from keras_gemma2.training.fitting import FitsText
from keras_gemma2.training.recording import check_temperature
from keras_gemma2.training.run_checkpoints import state_tree
from keras_gemma2.training.steps import TrainsInChunks
from keras_gemma2.training.teacher_records import IDS, PROBABILITIES, TeacherRecords, batches_in
from keras_gemma2.training.token_metrics import DistillationMetrics


@keras.saving.register_keras_serializable(package="keras_gemma2")
class Distiller(FitsText, TrainsInChunks, keras.Model):
    """Trains a student on a teacher's distribution over next tokens, as Gemma 2's 2B and 9B were (arXiv 2408.00118, section 3.2).

    The loss of a token is `alpha * t^2 * KL(teacher || student) + (1 - alpha) * cross-entropy`, at the temperature t; its gradient
    with alpha 1 and t 1 is that of the cross-entropy to the teacher's distribution. Logits of either model are made for a chunk of
    tokens at a time, never `[B, T, V]`. The teacher is frozen, may have any dtype or be quantized, and runs without dropout; the
    student may have adapters, which alone are trained then.

    The metrics are the student's: "sparse_categorical_accuracy", "perplexity", and "kl", the divergence in nats.

    Args:
        student: a `Gemma2CausalLM`.
        teacher: another, of the same vocabulary, which is frozen; or the folder that `record_teacher` wrote (or its
            `TeacherRecords`): then `fit` needs no data, and no teacher in memory.
        temperature: t.
        alpha: the teacher's share of the loss, 0 to 1.

    Raises:
        TypeError, ValueError: for models of other kinds or vocabularies, a teacher that is the student, or numbers outside their
            range.
        CheckpointError: for records that cannot be read.

    Example:
        >>> distiller = keras_gemma2.Distiller(student, teacher)
        >>> distiller.compile(optimizer=keras.optimizers.AdamW(1e-4))
        >>> distiller.fit(texts, batch_size=8)
        >>> distiller.student.save_to_preset("./student")
    """

    def __init__(self, student: Any, teacher: Any, temperature: float = 1.0, alpha: float = 1.0, **kwargs: Any) -> None:
        check_temperature(temperature)
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
            raise ValueError(f"`alpha` must be a number from 0 to 1, the teacher's share of the loss. Received: {alpha!r}.")
        _check_model("student", student)
        records = TeacherRecords(teacher) if isinstance(teacher, (str, os.PathLike)) else teacher
        is_recorded = isinstance(records, TeacherRecords)
        if not is_recorded:
            _check_model("teacher", teacher)
            _check_pair(student, teacher)
        else:
            _check_records(records, student, temperature)
        super().__init__(**kwargs)
        self.student, self.temperature, self.alpha = student, float(temperature), float(alpha)
        self.teacher = None if is_recorded else teacher
        self.records = records if is_recorded else None
        if self.teacher is not None:
            self.teacher.trainable = False
        self._compiled_for: Any = None
        self.built = True

    @property
    def backbone(self) -> Any:
        """The student's."""
        return self.student.backbone

    @property
    def preprocessor(self) -> Any:
        """The student's."""
        return self.student.preprocessor

    def compile(self, optimizer: Any = "auto", **kwargs: Any) -> None:
        """Configures training.

        Args:
            optimizer: "auto" (Adam at 2e-5, as `Gemma2CausalLM.compile`), or what `keras.Model.compile` takes.
            **kwargs: `run_eagerly`, `jit_compile`, `steps_per_execution`, `auto_scale_loss`, as `keras.Model.compile`.

        Raises:
            ValueError: for a loss or metrics: a distiller has its own.
        """
        for name in ("loss", "metrics", "weighted_metrics", "loss_weights"):
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"`{name}` does not go with a Distiller, which has its own: see `temperature` and `alpha`.")
        optimizer = keras.optimizers.Adam(2e-5) if isinstance(optimizer, str) and optimizer == "auto" else optimizer
        keras.Model.compile(self, optimizer=optimizer, **kwargs)
        self._is_chunked, self._token_metrics = True, DistillationMetrics()

    def get_state_tree(self, value_format: str = "backend_tensor") -> dict[str, Any]:
        """As `keras.Model.get_state_tree`, without the teacher, which training does not change."""
        return state_tree(self, value_format)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """The student's float32 logits `[B, T, V]`; within a training or evaluation step the sums of its loss."""
        sums = self._sums_of_step(inputs, bool(training))
        if sums is not None:
            return sums
        return self.student({key: inputs[key] for key in TOKEN_KEYS}, training=training)

    def fit(self, x: Any = None, y: Any = None, batch_size: int | None = None, sample_weight: Any = None, **kwargs: Any) -> Any:
        """Trains the student; as `Gemma2CausalLM.fit`.

        Args:
            x: as there; of a distiller on records None, or other records (or their folder).
            y, batch_size, sample_weight, **kwargs: as there. `validation_data` can be records or their folder, too.
        """
        x, batch_size = self._recorded(x, batch_size, bool(kwargs.get("shuffle", True)))
        if self.records is not None and kwargs.get("validation_data") is not None:
            kwargs["validation_data"], _ = self._recorded(
                kwargs["validation_data"], kwargs.pop("validation_batch_size", None), False
            )
        return super().fit(x, y, batch_size, sample_weight, **kwargs)

    def evaluate(
        self, x: Any = None, y: Any = None, batch_size: int | None = None, sample_weight: Any = None, **kwargs: Any
    ) -> Any:
        """Loss and metrics; inputs as `fit` takes them."""
        if not kwargs.get("_use_cached_eval_dataset"):
            x, batch_size = self._recorded(x, batch_size, False)
        return super().evaluate(x, y, batch_size, sample_weight, **kwargs)

    def make_train_function(self, force: bool = False) -> Any:
        """As `keras.Model`'s; compiles anew, with a fresh optimizer, where what is trained of the student has changed."""
        blocks = tuple(block.recomputes for block in self.backbone.transformer_layers)
        state = blocks, self.student._adapters.state, tuple(id(variable) for variable in self.trainable_variables)
        if state != self._compiled_for:
            self._compiled_for = state
            self.train_function = self.test_function = self.predict_function = None
            backend.track_variables(self.student)  # of its own: the teacher's variables can have the same paths
            backend.track_variables(self)
            renew_optimizer(self)
        return super().make_train_function(force)

    def get_config(self) -> dict[str, Any]:
        """What `.keras` files keep: both models, or the student and the folder of the records."""
        teacher = self.records.folder if self.teacher is None else _serialized(self.teacher)
        return {
            "name": self.name,
            "student": _serialized(self.student),
            "teacher": teacher,
            "temperature": self.temperature,
            "alpha": self.alpha,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Distiller:
        """A distiller of a config."""
        models = {name: value for name, value in config.items() if isinstance(value, dict)}
        models = {name: keras.saving.deserialize_keras_object(value, custom_objects) for name, value in models.items()}
        return cls(**{**config, **models})

    def get_compile_config(self) -> dict[str, Any] | None:
        """What `.keras` files keep of `compile`."""
        config = keras.Model.get_compile_config(self)
        names = ("optimizer", "run_eagerly", "jit_compile", "steps_per_execution", "auto_scale_loss")
        return config and {name: config[name] for name in names if name in config}

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles a loaded model as the saved one was, and gives the optimizer its variables to be filled."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    def build_from_config(self, config: dict[str, Any]) -> None:
        """Nothing: both models are built."""

    def _token_sums(self, inputs: Any, labels: Any, weights: Any, training: bool) -> dict[str, Any]:
        tokens = {key: inputs[key] for key in TOKEN_KEYS}
        embedding, targets, variables, of_teacher = self.backbone.token_embedding, [labels], [], None
        if self.teacher is None:
            targets += [inputs[IDS], inputs[PROBABILITIES]]
        else:
            with backend.no_gradients():
                targets.append(ops.stop_gradient(self.teacher.backbone(tokens, training=False)))
            variables, of_teacher = self.teacher.backbone.token_embedding.variables, self._teachers_log_probs
        hidden = self.backbone(tokens, training=training)
        terms = DistillationTerms(embedding.logit_soft_cap, self.temperature, self.alpha, of_teacher)
        targets = [ops.cast(ops.reshape(labels, (-1,)), "int32"), *[ops.reshape(t, (-1, t.shape[-1])) for t in targets[1:]]]
        weights = ops.cast(ops.reshape(weights, (-1,)), "float32")
        sums = backend.sums_in_chunks(
            embedding.uncapped_logits,
            terms,
            len(SUMS),
            [*embedding.variables, *variables],
            ops.reshape(hidden, (-1, hidden.shape[-1])),
            tuple(targets),
            weights,
            rows_a_chunk(embedding.vocabulary_size),
            training,
        )
        return {**dict(zip(SUMS, sums, strict=True)), "weight": ops.sum(weights)}

    def _teachers_log_probs(self, hidden: Any) -> Any:
        embedding = self.teacher.backbone.token_embedding
        logits = soft_cap(embedding.uncapped_logits(hidden), embedding.logit_soft_cap)
        return ops.log_softmax(logits / self.temperature, axis=-1)

    def _recorded(self, x: Any, batch_size: int | None, shuffle: bool) -> tuple[Any, int | None]:
        """Batches of records for a distiller on records, and no batch size; else both as they are."""
        if self.records is None:
            return x, batch_size
        batches = batches_in(self.records if x is None else x, batch_size, shuffle)
        if batches is x:
            raise ValueError(
                "This Distiller has a teacher's records in place of the teacher, who says nothing of other data. Call without `x`, "
                "give the folder of other records, or judge the student alone: `distiller.student.evaluate(x)`."
            )
        return batches, None

    def _data(self, pack: bool = False, name: str = "x") -> DataOfCall:
        return DataOfCall(_RecordReader(self.preprocessor, self.backbone.config.vocabulary_size, pack), name)


class _RecordReader(Reader):
    """Keeps what records say of the teacher beside the tokens."""

    def _tokens(self, x: Any, y: Any, sample_weight: Any) -> Any:
        (tokens, y, sample_weight), report = super()._tokens(x, y, sample_weight)
        return ({**tokens, **{key: x[key] for key in (IDS, PROBABILITIES) if key in x}}, y, sample_weight), report


def _serialized(lm: Any) -> dict[str, Any]:
    """A model's config without what it was compiled with, whose optimizer a loaded model would hold for nothing."""
    config = keras.saving.serialize_keras_object(lm)
    return {name: value for name, value in config.items() if name != "compile_config"}


def _check_model(name: str, model: Any) -> None:
    from keras_gemma2.causal_lm import Gemma2CausalLM  # which trains, and so imports this layer

    if not isinstance(model, Gemma2CausalLM):
        more = ", or the folder that `record_teacher` wrote" if name == "teacher" else ""
        raise TypeError(f"`{name}` must be a Gemma2CausalLM{more}. Received: {model!r}, of type {type(model).__name__}.")


def _check_pair(student: Any, teacher: Any) -> None:
    if teacher is student or teacher.backbone is student.backbone:
        raise ValueError("`teacher` must be another model than `student`: it is frozen. Load the model a second time.")
    _check_vocabulary(student, teacher.backbone.config.vocabulary_size, "teacher")
    protos = [getattr(getattr(lm.preprocessor, "tokenizer", None), "proto", None) for lm in (student, teacher)]
    if None not in protos and protos[0] != protos[1]:
        raise ValueError(
            "`teacher` and `student` must share a vocabulary: their tokenizers have as many pieces, but not the same. Distill from "
            "a teacher with the student's tokenizer."
        )


def _check_records(records: TeacherRecords, student: Any, temperature: float) -> None:
    _check_vocabulary(student, records.vocabulary_size, "teacher's records")
    if records.temperature != temperature:
        raise ValueError(
            f"`temperature` must be that of the records in {records.folder}, {records.temperature}. Received: {temperature}. Other "
            "temperatures need a recording of their own."
        )
    context = student.backbone.config.max_sequence_length
    if records.length > context:
        raise ValueError(
            f"The records in {records.folder} have rows of {records.length} tokens; the student takes {context} at most."
        )


def _check_vocabulary(student: Any, size: int, of: str) -> None:
    own = student.backbone.config.vocabulary_size
    if own != size:
        raise ValueError(
            f"The {of} and the student must have one vocabulary. Received: {size} pieces of the {of}, {own} of the student. "
            "Distill from a teacher with the student's tokenizer."
        )
