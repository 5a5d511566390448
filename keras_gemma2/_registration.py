"""Imports every class that Keras must know by name, so that `.keras` files and presets load."""

import keras_gemma2.layers
from keras_gemma2.backbone import Gemma2Backbone
from keras_gemma2.causal_lm import Gemma2CausalLM
from keras_gemma2.generation.sampler import Sampler
from keras_gemma2.preprocessor import Gemma2CausalLMPreprocessor
from keras_gemma2.tokenizer import Gemma2Tokenizer
from keras_gemma2.training.distiller import Distiller

# keras-hub finds the classes that belong together by the backbone's class.
Gemma2Tokenizer.backbone_cls = Gemma2Backbone
Gemma2CausalLMPreprocessor.backbone_cls = Gemma2Backbone

__all__ = [
    "Distiller",
    "Gemma2Backbone",
    "Gemma2CausalLM",
    "Gemma2CausalLMPreprocessor",
    "Gemma2Tokenizer",
    "Sampler",
    "keras_gemma2",
]
