"""feed: the batches of a dataset with the rows of their keys, as Keras takes them."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from typing import Any

import keras
import numpy as np
from keras.src.trainers.data_adapters.data_adapter import DataAdapter

from psclient.choices import Wire
from psclient.errors import InvalidArgument
from psclient.keras.features import Features, Split, require_gradients
from psclient.padding import Room
from psclient.pipeline import Pipeline
from psclient.ticket import Ticket

NUMBERS = 4096  # batches have the numbers 1..4095, again and again
NO_CALLBACK = "nothing pushes the gradients: pass callbacks=[psclient.keras.Push(model)] to fit"

_feeds: weakref.WeakKeyDictionary[Any, Feed] = weakref.WeakKeyDictionary()  # the newest by model


def feed(
    dataset: Iterable[Any],
    model: keras.Model,
    *,
    training: bool = True,
    staleness: int = 0,
    lookahead: int | None = None,
    step: int = 0,
    wire: Wire | None = None,
) -> Feed | Lookup:
    """Return the argument x of ``fit``, ``evaluate`` or ``predict`` for a model with Embeddings.

    dataset    batches: a dict {input: array}, or a tuple that begins with it, such as (inputs,
               targets). Inputs that are features of the model's Embedding layers are integer keys.
               A list, PyDataset, tf.data.Dataset, DataLoader, or any other iterable. An iterator
               can be read once only, so it does for one epoch
    model      the model, built or not
    training   True: for ``fit``. False: for ``evaluate``, ``predict`` and ``validation_data``; keys
               without a row then get the table's serving_default
    staleness  the rows of a batch may lack the pushes of so many batches just before it. 0: exact
    lookahead  number of batches whose rows are pulled while a batch is computed; None: as many as
               ``staleness``, but at least 1
    step       training step of the first batch; each batch adds 1
    wire       dtype of rows and gradients on the wire; None: the client's

    ``fit`` also needs the callback ``Push(model)``.
    """
    features = Features(model)
    if not training:
        return Lookup(dataset, features, wire)
    if model.compiled:
        require_gradients(model)
    made = Feed(dataset, model, features, staleness, lookahead, step, wire)
    _feeds[model] = made
    return made


def feed_of(model: keras.Model) -> Feed:
    """Return the newest training feed of a model. Raises InvalidArgument if there is none."""
    found = _feeds.get(model)
    if found is None:
        raise InvalidArgument(
            "the model has no feed: pass psclient.keras.feed(dataset, model) to fit as x"
        )
    return found


class _Adapter(DataAdapter):
    """What Keras asks of a feed: iterators of batches, and how many there are."""

    def __init__(self, dataset: Iterable[Any]) -> None:
        self._dataset = dataset

    def _batches(self) -> Iterator[Any]:
        """Yield the batches of one epoch."""
        raise NotImplementedError

    def get_numpy_iterator(self) -> Iterator[Any]:
        return self._batches()

    def get_jax_iterator(self) -> Iterator[Any]:
        return self._batches()

    def get_torch_dataloader(self) -> Iterator[Any]:
        return self._batches()

    def get_tf_dataset(self) -> Iterable[Any]:
        """Return an iterable, not a tf.data.Dataset: that would read batches ahead of training."""
        return _Once(self)

    @property
    def num_batches(self) -> int | None:
        try:
            return len(self._dataset)  # type: ignore[arg-type]
        except TypeError:
            return None

    @property
    def batch_size(self) -> int | None:
        return None

    @property
    def has_partial_batch(self) -> bool | None:
        return None

    @property
    def partial_batch_size(self) -> int | None:
        return None

    def on_epoch_begin(self) -> None:
        self._hook("on_epoch_begin")

    def on_epoch_end(self) -> None:
        self._hook("on_epoch_end")

    def _hook(self, name: str) -> None:
        """Call a method of the dataset, if it is a PyDataset."""
        if isinstance(self._dataset, keras.utils.PyDataset):
            getattr(self._dataset, name)()


class _Once:
    """Iterable whose iterators are new epochs of an adapter."""

    def __init__(self, adapter: _Adapter) -> None:
        self._adapter = adapter

    def __iter__(self) -> Iterator[Any]:
        batches = self._adapter._batches()
        if keras.backend.backend() == "tensorflow":
            return _ends_as_tensorflow_expects(batches)
        return batches


def _ends_as_tensorflow_expects(batches: Iterator[Any]) -> Iterator[Any]:
    """Yield batches; raise OutOfRangeError at their end, which Keras expects of an iterator."""
    import tensorflow as tf

    yield from batches
    raise tf.errors.OutOfRangeError(None, None, "end of the dataset")


class Feed(_Adapter):
    """Batches for ``fit``, from a Pipeline that pulls rows ahead. Made by ``feed``.

    features  those of the model
    pipe      the Pipeline; ``pipe.stats`` counts its batches, pushes, ...
    """

    def __init__(
        self,
        dataset: Iterable[Any],
        model: keras.Model,
        features: Features,
        staleness: int,
        lookahead: int | None,
        step: int,
        wire: Wire | None,
    ) -> None:
        first = next(iter(dataset), None)
        if first is None:
            raise InvalidArgument("the dataset has no batch")
        one_pass = isinstance(dataset, Iterator)
        super().__init__(chain([first], dataset) if one_pass else dataset)
        self.features = features
        self._split = features.split(first)
        features.make_room(self._split, model)
        self._new = partial(
            Pipeline,
            features.client,
            features.tables,
            staleness=staleness,
            lookahead=lookahead,
            wire=wire,
            unpushed=_batches_at_hand(staleness),
        )
        self.pipe = self._new(step=step)
        self._started = False
        self._epochs = 0  # begun since the last ``fit`` with the callback ended
        self._open: deque[tuple[int, Ticket]] = deque()  # (number, ticket), not pushed
        self._number = 0  # of the newest batch
        self._loop: Any = None  # the newest generator of the pipeline

    def start(self) -> None:
        """Let the following iterators train. Called when ``fit`` has built the model."""
        if self._started:  # an earlier fit ended by an error
            self.pipe.close()
            self.pipe = self._new(step=self._open[0][1].step if self._open else self.pipe.step)
        self._started, self._epochs = True, 0
        self._open.clear()

    def stop(self) -> None:
        """Wait for all pushes, and drop rows pulled ahead. Raises the first error of a push."""
        self._started, self._epochs = False, 0
        if self._loop is not None:
            self._loop.close()  # after an early stop, Keras may still hold its iterator
        while self._open:  # taken by Keras, and not trained
            self.pipe.skip(self._open.popleft()[1])
        self.pipe.flush()

    def flush(self) -> None:
        """Wait for all pushes. Raises the error of the first that failed."""
        self.pipe.flush()

    def oldest(self) -> tuple[int, Ticket]:
        """Return (number, ticket) of the batch that Keras has just trained."""
        if not self._open:
            raise InvalidArgument(
                "fit trained a batch that is not of the feed: pass"
                " psclient.keras.feed(dataset, model) to fit as x"
            )
        return self._open[0]

    def push(self, gradients: Mapping[str, Any] | None, lr: float | None) -> None:
        """Push the gradients of the oldest batch. None: do not push it."""
        _, ticket = self._open.popleft()
        if gradients is None:
            self.pipe.skip(ticket)
        else:
            self.pipe.push(ticket, gradients, lr=lr)

    def on_epoch_begin(self) -> None:
        """Raise InvalidArgument if ``fit`` trains without the callback.

        Keras begins an epoch to build the model, and then the first that trains. The error in the
        first step would come too late on JAX, where Keras then loses the weights of the model.
        """
        self._epochs += 1
        if self._epochs > 1 and not self._started:
            raise InvalidArgument(NO_CALLBACK)
        super().on_epoch_begin()

    def _batches(self) -> Iterator[Any]:
        at_hand = _batches_at_hand(self.pipe.staleness)
        if not self._started:  # Keras builds the model from the shapes of a batch
            yield self._example()
            if at_hand > 1:  # Keras asks for a second batch before it uses the first
                return
            raise InvalidArgument(NO_CALLBACK)
        splits = (self.features.split(batch) for batch in self._dataset)
        self._loop = self.pipe.over(lambda split: split.keys, splits)
        for ticket in self._loop:
            for table, batch in ticket.keys.items():
                self.features.require_room(table, len(batch.keys), ticket.step)
            self._number = self._number % (NUMBERS - 1) + 1
            self._open.append((self._number, ticket))
            yield self.features.batch(ticket.batch, ticket.rows, ticket.places, self._number)
            if len(self._open) >= at_hand:
                step = self._open[0][1].step
                raise InvalidArgument(f"the gradients of step {step} are lost: {NO_CALLBACK}")

    def _example(self) -> Any:
        """Return the first batch with shapes in place of arrays."""
        split, features = self._split, self.features
        rows = {name: np.zeros((1, each.dim), np.float32) for name, each in _by_name(features)}
        places = {name: np.zeros(each.shape, np.int32) for name, each in split.keys.items()}
        batch = features.batch(split, rows, places, 1)
        return keras.tree.map_structure(lambda each: None if each is None else _Shape(each), batch)


def _batches_at_hand(staleness: int) -> int:
    """Return how many batches Keras takes before it has trained the first of them.

    Raises InvalidArgument if the staleness does not allow that.
    """
    if keras.backend.backend() != "jax":
        return 1
    import jax

    if jax.default_backend() == "cpu":
        return 1
    if staleness < 1:
        raise InvalidArgument(
            f"staleness must be at least 1 on JAX with a {jax.default_backend()}, got {staleness}:"
            " Keras copies each batch to the device while it trains the batch before"
        )
    return 2


class _Shape:
    """Shape and dtype of an array. To use it as an array is an error: it is not there."""

    def __init__(self, array: Any) -> None:
        self.shape, self.dtype = array.shape, array.dtype

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise InvalidArgument(NO_CALLBACK)


if keras.backend.backend() == "jax":  # let it pass through jax.device_put and jax.jit
    import jax

    jax.tree_util.register_pytree_node(_Shape, lambda shape: ((), shape), lambda shape, _: shape)


class Lookup(_Adapter):
    """Batches for ``evaluate`` and ``predict``, with rows as they are when they are read."""

    def __init__(self, dataset: Iterable[Any], features: Features, wire: Wire | None) -> None:
        super().__init__(dataset)
        self._features = features
        self._wire: Wire | None = wire
        self._rooms = {name: Room() for name, _ in _by_name(features)}

    def _batches(self) -> Iterator[Any]:
        for batch in self._dataset:
            yield self._look_up(self._features.split(batch))

    def _look_up(self, split: Split) -> Any:
        """Pull the rows of one batch; return the batch for Keras."""
        client = self._features.client
        flat: dict[str, list[Any]] = {}
        for feature, table in self._features.tables.items():
            flat.setdefault(table.name, []).append(split.keys[feature].reshape(-1))
        batches = {name: client.batch(np.concatenate(keys)) for name, keys in flat.items()}
        rows = client.pull_distinct(batches, mode="serve", wire=self._wire)
        places, taken = {}, dict.fromkeys(flat, 0)
        for feature, table in self._features.tables.items():
            keys, begin = split.keys[feature], taken[table.name]
            taken[table.name] = begin + keys.size
            index = batches[table.name].split.inverse[begin : begin + keys.size]
            places[feature] = index.reshape(keys.shape)
        return self._features.batch(split, rows, places, 1, self._rooms)


def _by_name(features: Features) -> list[tuple[str, Any]]:
    """Return (name, table) of each table."""
    return list({table.name: table for table in features.tables.values()}.items())
