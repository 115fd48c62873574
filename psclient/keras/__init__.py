"""Keras 3 models, on torch, JAX or TensorFlow, whose rows are stored on the servers.

    user = Embedding(users, combiner="mean")     # a layer for the input "user"
    inputs = {"user": user.input((20,)), "age": keras.Input((1,), name="age")}
    model = keras.Model(inputs, head([user(inputs["user"]), inputs["age"]]))
    model.compile("adam", "binary_crossentropy")
    model.fit(feed(dataset, model, staleness=1), callbacks=[Push(model)])
    model.evaluate(feed(test, model, training=False))

A compiled step cannot call the servers. So ``feed`` pulls rows before the step, and gives them to
the model as inputs; the layer keeps their gradients in a weight; and ``Push`` reads this weight
after the step, and pushes the gradients. docs/trainers.md explains more.

clients.py   tables of layers in saved models
layer.py     Embedding
features.py  the features of a model, and the inputs made of them
feed.py      feed: batches with rows, for fit, evaluate and predict
push.py      Push: the callback of fit
saving.py    load_model, export
"""

from psclient.keras.feed import feed
from psclient.keras.layer import COMBINERS, Embedding
from psclient.keras.push import Push
from psclient.keras.saving import export, load_model

__all__ = ["COMBINERS", "Embedding", "Push", "export", "feed", "load_model"]
