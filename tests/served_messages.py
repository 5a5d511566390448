"""A SavedModel asked in the messages of TensorFlow Serving's gRPC: `python served_messages.py FOLDER`, requests as served.py's.

Client and server see each other's bytes alone; no network is between them.
"""

import pickle
import sys

import tensorflow as tf
import tensorflow_text  # noqa: F401 - registers its operations
from tensorflow_serving.apis.predict_pb2 import PredictRequest, PredictResponse


def main():
    served = tf.saved_model.load(sys.argv[1])
    answers = [read(serve(served, written(*request))) for request in pickle.load(sys.stdin.buffer)]
    pickle.dump(answers, sys.stdout.buffer)


def written(signature, arrays):
    """A client's request."""
    request = PredictRequest()
    request.model_spec.name = "gemma2"
    request.model_spec.signature_name = signature
    for name, value in arrays.items():
        request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
    return request.SerializeToString()


def serve(served, message):
    request = PredictRequest.FromString(message)
    inputs = {name: tf.constant(tf.make_ndarray(proto)) for name, proto in request.inputs.items()}
    response = PredictResponse(model_spec=request.model_spec)
    for name, output in served.signatures[request.model_spec.signature_name](**inputs).items():
        response.outputs[name].CopyFrom(tf.make_tensor_proto(output))
    return response.SerializeToString()


def read(message):
    """A client's answer, with the signature that it came from."""
    response = PredictResponse.FromString(message)
    return response.model_spec.signature_name, {name: tf.make_ndarray(proto) for name, proto in response.outputs.items()}


if __name__ == "__main__":
    main()
