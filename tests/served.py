"""Runs SavedModels in a process of its own: `python served.py text|tokens`; requests on stdin, answers on stdout, pickled.

A request is a folder and a list of `(signature, {name: numpy array})`; an answer has for each of them a dict of arrays or an
error's text, and which packages were imported that should not be. The signature "loop of N" chooses N tokens greedily, by
`prefill` and `decode_step`.
"""

import contextlib
import pickle
import sys


def main():
    import tensorflow as tf  # which imports Keras by itself

    unwanted = {"keras_gemma2", "keras_hub"}
    if sys.argv[1] == "text":
        import tensorflow_text  # noqa: F401 - registers its operations
    else:
        unwanted.add("tensorflow_text")
    for folder, requests in each_of(sys.stdin.buffer):
        answers = answered(tf, tf.saved_model.load(folder), requests)
        pickle.dump((answers, unwanted & {name.partition(".")[0] for name in sys.modules}), sys.stdout.buffer)
        sys.stdout.buffer.flush()


def each_of(file):
    """What was pickled into a file, one after the other, until its end."""
    with contextlib.suppress(EOFError):
        while True:
            yield pickle.load(file)


def answered(tf, served, requests):
    answers = []
    for name, arrays in requests:
        try:
            tensors = {key: tf.constant(value) for key, value in arrays.items()}
            output = loop(tf, served, name, tensors) if name.startswith("loop") else served.signatures[name](**tensors)
            answers.append({key: value.numpy() for key, value in output.items()})
        except tf.errors.InvalidArgumentError as error:
            answers.append(str(error))
    return answers


def loop(tf, served, name, tensors):
    state, chosen = served.signatures["prefill"](**tensors), []
    for _ in range(int(name.removeprefix("loop of "))):
        chosen.append(tf.argmax(state.pop("logits"), axis=-1, output_type=tf.int32))
        state = served.signatures["decode_step"](token_ids=chosen[-1], **state)
    return {"token_ids": tf.stack(chosen, axis=1)}


if __name__ == "__main__":
    main()
