"""A text that many calls begin with, run once."""

from __future__ import annotations

import dataclasses
from typing import Any

from keras_gemma2.cache import Cache
from keras_gemma2.generation.runner import Runner


@dataclasses.dataclass(frozen=True)
class CachedPrefix:
    """Keys and values of a prefix; from `Gemma2CausalLM.prefill`, for the `prefix` of its other calls.

    Args:
        token_ids: of the prefix, its start token included.
        caches: of one row, which hold them.
        backbone: the model that made them.
        adapter: the state of its adapters then.
    """

    token_ids: tuple[int, ...]
    caches: list[Cache] = dataclasses.field(repr=False)
    backbone: Any = dataclasses.field(repr=False)
    adapter: Any = dataclasses.field(repr=False)

    def __len__(self) -> int:
        return len(self.token_ids)

    def check(self, backbone: Any) -> int:
        """The number of tokens, or a ValueError if another model made it, or this one with another adapter."""
        if backbone is not self.backbone:
            raise ValueError("`prefix` was made by another model. Make it with this one's `prefill`.")
        if backbone.adapter_set.state != self.adapter:
            raise ValueError("`prefix` was made with another adapter, or none. Make it anew with `prefill`.")
        return len(self.token_ids)


def make_prefix(runner: Runner, token_ids: list[int]) -> CachedPrefix:
    """Runs a prefix of at least one token."""
    caches, _ = runner.prefill(runner.new_caches(1, len(token_ids)), [token_ids])
    return CachedPrefix(tuple(token_ids), caches, runner.backbone, runner.backbone.adapter_set.state)
