"""Runs a SavedModel in a process of its own: `python served.py FOLDER text|tokens`; requests on stdin, answers on stdout, pickled.

A request is a list of `(signature, {name: numpy array})`, an answer for each of them a dict of arrays or an error's text. The
signature "loop of N" chooses N tokens greedily, by `prefill` and `decode_step`.
"""

import pickle
import sys


def main():
    folder, kind = sys.argv[1:]
    import tensorflow as tf

    if kind == "text":
        import tensorflow_text  # noqa: F401 - registers its operations

    served = tf.saved_model.load(folder)
    answers = []
    for name, arrays in pickle.load(sys.stdin.buffer):
        try:
            tensors = {key: tf.constant(value) for key, value in arrays.items()}
            output = loop(tf, served, name, tensors) if name.startswith("loop") else served.signatures[name](**tensors)
            answers.append({key: value.numpy() for key, value in output.items()})
        except tf.errors.InvalidArgumentError as error:
            answers.append(str(error))
    unwanted = {"keras_gemma2", "keras_hub", "tensorflow_text"}  # TensorFlow imports Keras by itself
    pickle.dump((answers, unwanted & {name.partition(".")[0] for name in sys.modules}), sys.stdout.buffer)


def loop(tf, served, name, tensors):
    state, chosen = served.signatures["prefill"](**tensors), []
    for _ in range(int(name.removeprefix("loop of "))):
        chosen.append(tf.argmax(state.pop("logits"), axis=-1, output_type=tf.int32))
        state = served.signatures["decode_step"](token_ids=chosen[-1], **state)
    return {"token_ids": tf.stack(chosen, axis=1)}


if __name__ == "__main__":
    main()
