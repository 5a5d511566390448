"""What gives data batch by batch: datasets, generators, PyDatasets, DataLoaders. Each batch is read where it is asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras.src.trainers.data_adapters import data_adapter_utils
from keras.src.trainers.data_adapters.data_adapter import DataAdapter

from keras_gemma2.backend import tf_pipeline
from keras_gemma2.training.data import FORMS, Reader, Report, check_something_is_learned, is_in_memory, say, unpacked
from keras_gemma2.training.shares import check_rows_divide

_NO_BATCHES = "The data must have at least one batch. Received a {} without."


class DataOfCall:
    """The data of one call of `fit`, `evaluate` or `predict`: reads it, and tells what happened to it.

    Args:
        reader: of the model.
        name: what errors call the data.
    """

    def __init__(self, reader: Reader, name: str = "x") -> None:
        self._reader, self._name = reader, name
        self._reports: dict[int, Report] = {}  # of the batches of a stream, by number: a second pass says nothing new
        self._error: Exception | None = None
        self._is_said = False

    def read(self, x: Any, y: Any = None, sample_weight: Any = None, batch_size: int | None = None) -> tuple[Any, Any, Any]:
        """What Keras is to be given for `(x, y, sample_weight)`: arrays, or something that gives batches of them.

        Raises:
            TypeError, ValueError: as `Reader.arrays`; for what cannot be read at all; for arguments that do not go with a stream.
        """
        if is_in_memory(x):
            arrays, report = self._reader.arrays(x, y, sample_weight)
            check_something_is_learned(report)
            say(report, self._reader.truncation)
            return arrays
        _check_stream(self._name, x, y, sample_weight, batch_size, self._reader.packs)
        return self._stream(x), None, None

    def read_batch(self, x: Any, y: Any = None, sample_weight: Any = None) -> tuple[Any, Any, Any]:
        """As `read`, for one batch that is in memory."""
        if not is_in_memory(x):
            raise ValueError(f"`{self._name}` must be one batch, in memory. Received: {x!r}. Pass what gives batches to `fit`.")
        arrays = self.read(x, y, sample_weight)
        check_rows_divide(len(arrays[1]), f"`{self._name}` of {len(arrays[1])} rows")
        return arrays

    def read_validation(self, validation_data: Any) -> Any:
        """`validation_data` in the forms of x, or as a tuple `(x, y[, sample_weight])`, for Keras."""
        return keras.utils.pack_x_y_sample_weight(*self.read(*unpacked(validation_data)))

    def batch(self, batch: Any, number: int) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
        """One batch of a stream as arrays, weights included.

        Raises:
            TypeError, ValueError: as `Reader.arrays`, with the number of the batch.
        """
        try:
            (x, y, weights), report = self._reader.arrays(*unpacked(batch))
            check_rows_divide(len(y), f"{len(y)} rows")
        except (TypeError, ValueError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            self._error = kind(f"Batch {number} of `{self._name}`: {error}")
            raise self._error from error
        self._reports[number] = report.named(f"batch {number}")
        return x, y, np.ones(y.shape, "float32") if weights is None else weights

    def say(self) -> None:
        """Warns, once, of what happened to the batches so far."""
        if self._reports and not self._is_said:
            self._is_said = True
            say(sum(self._reports.values(), Report()), self._reader.truncation)

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """A context for Keras's call: an error of reading comes out as it was raised, whatever threads it went through."""
        try:
            yield
        except Exception as error:
            if self._error is not None and error is not self._error:
                raise self._error from error
            raise
        self.say()

    def _stream(self, x: Any) -> Any:
        if isinstance(x, keras.utils.PyDataset):
            if x.num_batches == 0:
                raise ValueError(_NO_BATCHES.format(type(x).__name__))
            return ReadPyDataset(x, self)
        if type(x).__module__.startswith("tensorflow.python.distribute"):
            return x  # what a strategy of TensorFlow has distributed: it holds the values of several replicas
        if isinstance(x, Iterator):
            return (self.batch(batch, number) for number, batch in enumerate(x))
        return ReadBatches(x, self.batch)


class SaysWhatWasCut(keras.callbacks.Callback):
    """Warns at the end of the first epoch of what reading has cut; `async_safe` keeps Keras from waiting for each step."""

    async_safe = True

    def __init__(self, *data: DataOfCall) -> None:
        super().__init__()
        self._data = data

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        for data in self._data:
            data.say()


def with_callbacks(callbacks: Any, *more: keras.callbacks.Callback | None) -> Any:
    """The callbacks that `fit` was given, and more; in front, as a loss that is no number should stop what is saved after it."""
    more = [callback for callback in more if callback is not None]
    if isinstance(callbacks, keras.callbacks.CallbackList):
        for callback in more:
            callback.set_model(callbacks.model)
            callbacks.append(callback)
        return callbacks
    return [*more, *keras.tree.flatten(callbacks or [])]


class ReadPyDataset(keras.utils.PyDataset):
    """A PyDataset with its batches read."""

    def __init__(self, dataset: keras.utils.PyDataset, data: DataOfCall) -> None:
        workers = ("workers", "use_multiprocessing", "max_queue_size")
        super().__init__(**{name: getattr(dataset, name) for name in workers})
        self._dataset, self._data = dataset, data
        self.on_epoch_begin, self.on_epoch_end = dataset.on_epoch_begin, dataset.on_epoch_end

    def __getitem__(self, index: int) -> Any:
        batch = self._data.batch(self._dataset[index], index)
        if self.use_multiprocessing:  # this is a process of its own, which nobody asks again
            self._data.say()
        return batch

    @property
    def num_batches(self) -> int | None:
        return self._dataset.num_batches


class ReadBatches(DataAdapter):
    """What can be iterated over again and again (a tf.data.Dataset, a DataLoader), with its batches read.

    Args:
        batches: the iterable.
        read: a function of a batch and its number.
    """

    def __init__(self, batches: Any, read: Callable[[Any, int], Any]) -> None:
        distribution = keras.distribution.distribution()
        if distribution is not None and hasattr(batches, "element_spec"):
            batches = distribution.distribute_dataset(batches)  # a share for each process, as Keras does
        self._batches, self._read = batches, read

    def __iter__(self) -> Iterator[Any]:
        number = -1
        for number, batch in enumerate(self._batches):
            yield self._read(batch, number)
        if number < 0:
            raise ValueError(_NO_BATCHES.format(type(self._batches).__name__))

    def get_numpy_iterator(self) -> Iterator[Any]:
        return iter(self)

    get_jax_iterator = get_numpy_iterator

    def get_tf_dataset(self) -> Any:
        return tf_pipeline.dataset_of_arrays(lambda: iter(self))

    def get_torch_dataloader(self) -> Any:
        return data_adapter_utils.get_torch_dataloader(self)

    @property
    def num_batches(self) -> int | None:
        count = getattr(self._batches, "cardinality", None)
        count = int(count()) if callable(count) else _length(self._batches)
        return count if count is not None and 0 <= count < 2**62 else None

    @property
    def batch_size(self) -> None:
        return None

    @property
    def has_partial_batch(self) -> None:
        return None

    @property
    def partial_batch_size(self) -> None:
        return None


def _length(batches: Any) -> int | None:
    """How many batches there are; None where that is not known, which `len` says with a TypeError."""
    try:
        return len(batches)
    except TypeError:
        return None


def _check_stream(name: str, x: Any, y: Any, sample_weight: Any, batch_size: int | None, packs: bool) -> None:
    if not isinstance(x, keras.utils.PyDataset) and not hasattr(x, "__iter__"):
        raise ValueError(f"`{name}` must be {FORMS}. Received: {x!r}, of type {type(x).__name__}.")
    given = {"y": y, "sample_weight": sample_weight, "batch_size": batch_size, "pack": packs or None}
    given = [key for key, value in given.items() if value is not None]
    if given:
        raise ValueError(
            f"`{given[0]}` does not go with a {type(x).__name__}, whose batches are taken as they come. Put labels and weights "
            "into its batches, `(x, y, sample_weight)`, and set the batch size, or pack samples, where it is made."
        )
