"""The Gemma 2 decoder: token ids to hidden states."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import keras
import keras_hub
from keras import ops

from keras_gemma2.adapter_set import AdapterSet
from keras_gemma2.adapters import DEFAULT, HasAdapters
from keras_gemma2.config import Gemma2Config
from keras_gemma2.distribution import Gemma2LayoutMap, layout_map, settle_current
from keras_gemma2.from_preset import FromPreset
from keras_gemma2.inputs import check_keywords, check_token_inputs
from keras_gemma2.layers import (
    DecoderBlock,
    RMSNorm,
    RotaryEmbedding,
    TiedEmbedding,
    TokenPositions,
    VisibleKeys,
)
from keras_gemma2.layers.linear import Linear
from keras_gemma2.layers.low_rank import merges_on_save
from keras_gemma2.layers.quantization import MatrixLayer, QuantizableContainer, check_policy, float_policy
from keras_gemma2.lora import KERAS_HUB_TARGETS, LoraSettings


@keras.saving.register_keras_serializable(package="keras_gemma2")
class Gemma2Backbone(HasAdapters, QuantizableContainer, FromPreset, keras_hub.models.Backbone):
    """The Gemma 2 transformer without its output projection.

    A functional Keras model from `{"token_ids": int [B, T], "padding_mask": bool or int [B, T]}` to the hidden states
    after the final norm, `[B, T, D]` in the compute dtype. Padding may stand anywhere: the hidden states at the real
    tokens are those of the row without padding. Several samples may be packed in a row: the padding mask then holds their numbers,
    upward from 1 (`[1, 1, 1, 2, 2, 0]`), and the hidden states of each are those of the sample by itself.

    Source: Gemma 2 technical report (arXiv 2408.00118).

    Args:
        vocabulary_size: rows of the tied embedding (V).
        num_layers: decoder blocks.
        num_query_heads: query heads a layer (N), a multiple of `num_key_value_heads`.
        num_key_value_heads: key and value heads a layer (K).
        hidden_dim: width of the residual stream (D).
        intermediate_dim: width of one feed-forward gate (F); keras-hub's argument of this name is twice this.
        head_dim: width of one head (H), even.
        query_pre_attn_scalar: queries are multiplied by this to the power -0.5; None means `head_dim`. 144 for 27B.
        sliding_window_size: keys a query of a local layer sees, with its own.
        layer_types: "local" or "global" for each layer; None means local, global, local, ...
        attention_logit_soft_cap: cap on attention scores; None switches it off.
        final_logit_soft_cap: cap on the logits of `token_embedding(hidden, reverse=True)`; None switches it off.
        layer_norm_epsilon: RMSNorm's epsilon.
        rope_max_wavelength: base of the rotary frequencies.
        max_sequence_length: longest context the model is meant for, in tokens.
        dropout: rate on the embedding and on each branch, in training.
        dtype: dtype or policy of weights and computation, e.g. "bfloat16", "mixed_bfloat16"; "int8_from_bfloat16" or
            "int4_from_bfloat16" keeps all matrices in 8 or 4 bits from the start (see `quantize`).

    Raises:
        ValueError: for an argument that makes no model, and on calls with token ids outside the vocabulary or shapes
            that do not match.

    Example:
        >>> backbone = Gemma2Backbone(256, 2, 4, 2, 48, 96, 16)
        >>> backbone({"token_ids": [[2, 5, 7]], "padding_mask": [[1, 1, 1]]}).shape
        (1, 3, 48)
    """

    def __init__(
        self,
        vocabulary_size: int,
        num_layers: int,
        num_query_heads: int,
        num_key_value_heads: int,
        hidden_dim: int,
        intermediate_dim: int,
        head_dim: int,
        query_pre_attn_scalar: float | None = None,
        sliding_window_size: int = 4096,
        layer_types: list[str] | None = None,
        attention_logit_soft_cap: float | None = 50.0,
        final_logit_soft_cap: float | None = 30.0,
        layer_norm_epsilon: float = 1e-6,
        rope_max_wavelength: float = 10000.0,
        max_sequence_length: int = 8192,
        dropout: float = 0.0,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        check_keywords("Gemma2Backbone", kwargs, Gemma2Config.field_names())
        config = Gemma2Config(
            vocabulary_size,
            num_layers,
            num_query_heads,
            num_key_value_heads,
            hidden_dim,
            intermediate_dim,
            head_dim,
            query_pre_attn_scalar,
            sliding_window_size,
            layer_types,
            attention_logit_soft_cap,
            final_logit_soft_cap,
            layer_norm_epsilon,
            rope_max_wavelength,
            max_sequence_length,
            dropout,
        )
        check_policy(dtype)
        _warn_about_float16(dtype)
        settle_current(config, keras.dtype_policies.get(dtype).quantization_mode)
        self.config = config
        self.token_embedding = TiedEmbedding(
            vocabulary_size, hidden_dim, config.final_logit_soft_cap, dtype=dtype, name="token_embedding"
        )
        floats = float_policy(dtype)  # of what has no matrix
        self.rotary_embedding = RotaryEmbedding(head_dim, rope_max_wavelength, dtype=floats, name="rotary_embedding")
        self.token_positions = TokenPositions(dtype=floats, name="token_positions")
        self.visible_keys = {
            kind: VisibleKeys(config.window(kind), dtype=floats, name=f"{kind}_visible_keys")
            for kind in sorted(set(config.layer_types))
        }
        self.embedding_dropout = (
            keras.layers.Dropout(dropout, dtype=self.token_embedding.stream_dtype, name="embedding_dropout") if dropout else None
        )
        self.transformer_layers = [DecoderBlock(config, dtype=dtype, name=f"decoder_block_{i}") for i in range(config.num_layers)]
        self.layer_norm = RMSNorm(layer_norm_epsilon, dtype=floats, name="final_norm")

        inputs = {
            "token_ids": keras.Input((None,), dtype="int32", name="token_ids"),
            "padding_mask": keras.Input((None,), dtype="int32", name="padding_mask"),
        }
        # Keras's mark of a layer that `quantize` has nothing left to do for; it asks before it takes a quantized policy.
        self._is_quantized = keras.dtype_policies.get(dtype).quantization_mode is not None
        super().__init__(inputs=inputs, outputs=self._forward(inputs), dtype=dtype, **kwargs)
        self.adapter_set = AdapterSet(self)

    def _forward(self, inputs: dict[str, Any]) -> Any:
        positions = self.token_positions(inputs["padding_mask"])
        masks = {kind: keys(inputs["padding_mask"]) for kind, keys in self.visible_keys.items()}
        real = ops.cast(inputs["padding_mask"], "bool")
        token_ids = ops.where(real, inputs["token_ids"], 0)  # whatever stands in the padding is not looked at
        return self.layer_norm(self.run_blocks(token_ids, positions, masks))

    def run_blocks(self, token_ids: Any, positions: Any, masks: dict[str, Any] | None, caches: list[Any] | None = None) -> Any:
        """Embedding and decoder blocks, up to the final norm.

        Args:
            token_ids: int `[B, T]`.
            positions: int `[B, T]`.
            masks: for each layer type what attention takes as its `mask`; None with caches, which know.
            caches: None, or for each layer what attention takes as its `cache` (see `cache.py`).

        Returns:
            The residual stream `[B, T, D]`.
        """
        cos, sin = self.rotary_embedding(positions)
        x = self.token_embedding(token_ids)
        if self.embedding_dropout is not None:
            x = self.embedding_dropout(x)
        for i, (block, kind) in enumerate(zip(self.transformer_layers, self.config.layer_types)):
            x = block(x, cos, sin, masks[kind]) if caches is None else block(x, cos, sin, None, cache=caches[i])
        return x

    def named_weights(self, merged: bool = False) -> dict[str, Any]:
        """Every weight by its path in `Gemma2Config.weight_shapes`, which the checkpoint tables are written in.

        Each is its `keras.Variable`; a quantized matrix is a `layers.quantization.QuantizedMatrix`, which reads and assigns
        floats, so that codes are never taken for weights.

        Args:
            merged: whether matrices with an active adapter come as a `layers.low_rank.MergedMatrix`, to be read: as they are with
                the adapter added.
        """
        named = {
            "token_embedding/embeddings": self.token_embedding.matrix,
            "final_norm/scale": self.layer_norm.scale,
        }
        for i, block in enumerate(self.transformer_layers):
            for path in self.config.block_weight_shapes():
                *layers, variable = path.split("/")
                layer = functools.reduce(getattr, layers, block)
                weight = layer.matrix if isinstance(layer, MatrixLayer) else getattr(layer, variable)
                if merged and isinstance(layer, Linear) and layer.active_adapter is not None:
                    weight = layer.merged(layer.active_adapter)
                named[f"decoder_block_{i}/{path}"] = weight
        return named

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        check_token_inputs(inputs, self.config.vocabulary_size)  # before Keras's own checks, which cannot name the mend
        return super().__call__(inputs, *args, **kwargs)

    def enable_lora(self, rank: int, target_layer_names: Sequence[str] | None = None) -> None:
        """As keras-hub's backbones have it: adds low-rank factors, and freezes every other weight.

        The scale is 1; the adapter's name is "default". `Gemma2CausalLM.enable_lora` has more to set.

        Args:
            rank: of the factors.
            target_layer_names: names of layers, ours ("query") or those of keras-hub's Gemma ("query_dense"); None for queries and
                values.

        Raises:
            ValueError: for a rank outside its range, or a name that no projection has; nothing is changed then.
            TypeError: for a rank that is no integer.

        Example:
            >>> backbone.enable_lora(4)
            >>> len(backbone.trainable_variables)  # of 26 layers: two factors for queries, two for values
            104
        """
        if isinstance(target_layer_names, str):
            raise TypeError(f"`target_layer_names` must be a list of names. Received: {target_layer_names!r}.")
        targets = list(KERAS_HUB_TARGETS if target_layer_names is None else target_layer_names)
        self._add_adapter(DEFAULT, LoraSettings.of(self.config, rank, rank, targets))

    def default_lora_layer_names(self) -> list[str]:
        """The targets of `enable_lora` where it is given none."""
        return list(KERAS_HUB_TARGETS)

    def save_lora_weights(self, filepath: Any) -> None:
        """Refused: keras-hub's files know layers by their number alone. `save_adapter` writes PEFT's format.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("Adapters are written by `save_adapter(folder)`, in PEFT's format, and read by `load_adapter`.")

    def load_lora_weights(self, filepath: Any) -> None:
        """Refused, as `save_lora_weights` is.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("Adapters are read by `load_adapter(folder)`, in PEFT's format, and written by `save_adapter`.")

    @staticmethod
    def get_layout_map(
        mesh: keras.distribution.DeviceMesh,
        model_parallel_dim_name: str = "model",
        data_parallel_dim_name: str = "batch",
        fully_sharded: bool = False,
    ) -> Gemma2LayoutMap:
        """Along which axes of a mesh each weight is split, for `keras.distribution.ModelParallel` on JAX.

        Query heads, the feed-forward and the vocabulary are split along the model's axis; so are key and value heads where they
        divide, and where they do not they are whole on each device. Norms are whole. A model that is built settles the map for its
        sizes.

        Args:
            mesh: with both axes, such as `keras_gemma2.distribution.make_mesh` makes.
            model_parallel_dim_name: the axis that heads are split along.
            data_parallel_dim_name: the axis that rows of data are split along.
            fully_sharded: whether weights are split along that one, too, as ZeRO's third stage has it.

        Raises:
            ValueError: for axes that the mesh has not; by models that are built, if they do not divide, naming the sizes that do.
            TypeError: if `mesh` is no `DeviceMesh`.

        Example:
            >>> mesh = keras_gemma2.distribution.make_mesh(batch=2, model=4)
            >>> layouts = Gemma2Backbone.get_layout_map(mesh)
            >>> keras.distribution.set_distribution(keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch"))
        """
        return layout_map(mesh, model_parallel_dim_name, data_parallel_dim_name, fully_sharded)

    def _adapters_changed(self) -> None:
        self.train_function = self.test_function = self.predict_function = None

    def quantize(self, mode: str | None = None, config: Any = None) -> None:
        """Keeps all matrices in 8 or 4 bits from now on, in place; norms stay as they are.

        Weights alone are quantized, not activations: symmetric codes with a scale a row ("int8"), or a group of up to 64
        columns ("int4"); `keras_gemma2/quantization.py` has the formats. The embedding, which is the output projection too, is
        among them. One matrix is converted at a time, so that peak memory is the float model's and one quantized matrix. The
        dtype policy becomes e.g. "int8_from_bfloat16"; files and presets keep codes and scales. Quantized weights are not
        trainable.

        Args:
            mode: "int8" or "int4".
            config: not for use; Keras passes its default for the mode.

        Raises:
            ValueError: for another mode, quantizers of one's own, a model that is quantized already, "int8" where the compute dtype
                is float16, or a width that "int4" cannot halve; nothing is changed then.

        Example:
            >>> backbone = Gemma2Backbone(256, 2, 4, 2, 48, 96, 16)
            >>> backbone.quantize("int8")
            >>> backbone.dtype_policy.name
            'int8_from_float32'
        """
        settle_current(self.config, mode)
        super().quantize(mode, config=config)
        self.train_function = self.test_function = self.predict_function = None  # compiled with the variables there were
        self._post_quantize(mode)

    def get_config(self) -> dict[str, Any]:
        # keras-hub's own would write a map of the quantized layers' policies, and takes their names from them on the way.
        dtype = keras.dtype_policies.serialize(self.dtype_policy)
        adapters = {} if merges_on_save() else self.adapter_set.to_config()
        extra = {"adapters": adapters} if adapters else {}
        return {"name": self.name, "trainable": self.trainable, "dtype": dtype, **self.config.to_dict(), **extra}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Gemma2Backbone:
        """Makes a backbone of what `get_config` gives, its adapters included."""
        arguments = {name: value for name, value in config.items() if name != "adapters"}
        backbone = super().from_config(arguments)
        if config.get("adapters"):
            backbone.adapter_set.from_config(config["adapters"])
        return backbone


def _config_property(name: str) -> property:
    return property(lambda backbone: getattr(backbone.config, name), doc=f"`{name}` of the model's `Gemma2Config`.")


for _name in Gemma2Config.field_names():  # keras-hub's backbones show their arguments as attributes
    setattr(Gemma2Backbone, _name, _config_property(_name))


def _warn_about_float16(dtype: Any) -> None:
    policy = keras.dtype_policies.get(dtype) if dtype is not None else keras.config.dtype_policy()
    if policy.compute_dtype == "float16":
        warnings.warn(
            "Gemma 2's activations pass float16's largest number (65504) in its larger sizes. This model keeps its sums in "
            "float32 and clips what overflows, so it stays finite, but outputs can differ from the float32 model's. "
            "Use dtype='bfloat16' (or 'mixed_bfloat16') instead.",
            stacklevel=3,
        )
