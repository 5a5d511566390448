"""What an adapter is made of, and which projections its targets name. LoRA: arXiv 2106.09685; rsLoRA: arXiv 2312.03732."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from keras_gemma2.config import Gemma2Config

GROUPS = {"attention": ("query", "key", "value", "output_projection")}
# Projections by the name of their layer: PEFT's (Hugging Face's) names, then those of keras-hub's Gemma.
FOREIGN_NAMES = {
    "query": ("q_proj", "query_dense"),
    "key": ("k_proj", "key_dense"),
    "value": ("v_proj", "value_dense"),
    "output_projection": ("o_proj", "output_dense", "output"),
    "gate": ("gate_proj", "gating_ffw"),
    "up": ("up_proj", "gating_ffw_2"),
    "down": ("down_proj", "ffw_linear"),
}
_NAMES = {name: own for own, names in FOREIGN_NAMES.items() for name in (own, *names)}
KERAS_HUB_TARGETS = ("query", "value")
_NAME = re.compile("[A-Za-z0-9_-]+")


def projection_shapes(config: Gemma2Config) -> dict[str, tuple[int, int]]:
    """The shape `[out, in]` of every projection, by the path of its layer.

    Example:
        >>> projection_shapes(NAMED_SIZES["gemma2_2b"])["decoder_block_0/attention/query"]
        (2048, 2304)
    """
    shapes = config.weight_shapes()
    return {path.removesuffix("/kernel"): shape for path, shape in shapes.items() if path.endswith("/kernel")}


def select_targets(paths: Sequence[str], targets: str | Sequence[str]) -> list[str]:
    """The paths that targets name, in the model's order.

    Args:
        paths: of all projections.
        targets: "attention" (query, key, value and output projections), "all", a layer's name ("query", or PEFT's "q_proj", or
            keras-hub's "query_dense"), a whole path, a regular expression that whole paths match, or a list of names and paths.

    Raises:
        ValueError: for a target that names no projection; the message lists those there are.
        TypeError: if `targets` is neither a string nor a list of strings.

    Example:
        >>> select_targets(list(projection_shapes(config)), ["query", "decoder_block_1/feed_forward/up"])
        ['decoder_block_0/attention/query', 'decoder_block_1/attention/query', 'decoder_block_1/feed_forward/up']
    """
    if isinstance(targets, str):
        chosen = _of_string(paths, targets)
    elif isinstance(targets, (list, tuple, set, frozenset)) and all(isinstance(target, str) for target in targets):
        wanted = [(target, _named(paths, target)) for target in targets]
        unknown = [target for target, found in wanted if not found]
        if unknown or not wanted:
            raise _unknown_targets(paths, unknown or targets)
        chosen = {path for _, found in wanted for path in found}
    else:
        raise TypeError(f"`targets` must be a string or a list of strings. Received: {targets!r}.")
    return [path for path in paths if path in chosen]


def _of_string(paths: Sequence[str], targets: str) -> set[str]:
    if targets == "all":
        return set(paths)
    if targets in GROUPS:
        return {path for path in paths if path.rpartition("/")[2] in GROUPS[targets]}
    found = _named(paths, targets)
    if not found:
        try:
            found = {path for path in paths if re.fullmatch(targets, path)}
        except re.error as error:
            raise ValueError(f"`targets` is no regular expression ({error}). Received: {targets!r}.") from error
    if not found:
        raise _unknown_targets(paths, targets)
    return found


def _named(paths: Sequence[str], target: str) -> set[str]:
    own = _NAMES.get(target)
    return {path for path in paths if path == target or (own is not None and path.rpartition("/")[2] == own)}


def _unknown_targets(paths: Sequence[str], received: Any) -> ValueError:
    known = [*GROUPS, "all", *FOREIGN_NAMES, *(names[0] for names in FOREIGN_NAMES.values())]
    texts = [received] if isinstance(received, str) else list(received)
    near = [name for text in texts for name in difflib.get_close_matches(text, [*_NAMES, *GROUPS, "all"], n=1)]
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return ValueError(
        f"`targets` names no projection of this model. Received: {received!r}.{hint} There are the names {known}, and the paths "
        f"{paths[0]!r} ... {paths[-1]!r}, which a regular expression may match as a whole."
    )


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """An adapter but for its values.

    Args:
        ranks: of each adapted projection, by the path of its layer.
        alphas: of the same projections.
        dropout: rate on the factors' input, in training.
        use_rslora: whether the product is scaled by `alpha / sqrt(rank)` instead of `alpha / rank`.

    Raises:
        ValueError: for a number outside its range, naming it.
        TypeError: for a rank that is no integer, or the like.

    Example:
        >>> LoraSettings.of(config, rank=8, alpha=16, targets="attention")
    """

    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    dropout: float = 0.0
    use_rslora: bool = False

    def __post_init__(self) -> None:
        for rank in set(self.ranks.values()):
            check_rank(rank)
        for alpha in set(self.alphas.values()):
            if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
                raise ValueError(f"`alpha` must be a positive number. Received: {alpha!r}.")
        rate = self.dropout
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
            raise ValueError(f"`dropout` must be a rate in [0, 1). Received: {rate!r}.")
        if not isinstance(self.use_rslora, bool):
            raise TypeError(f"`use_rslora` must be True or False. Received: {self.use_rslora!r}.")

    @classmethod
    def of(
        cls, config: Gemma2Config, rank: int, alpha: float, targets: Any, dropout: float = 0.0, use_rslora: bool = False
    ) -> LoraSettings:
        """Settings with one rank and alpha for all targets, as `select_targets` takes them.

        Raises:
            ValueError: also for a rank larger than a matrix.
        """
        check_rank(rank)
        shapes = projection_shapes(config)
        paths = select_targets(list(shapes), targets)
        for path in paths:
            if rank > min(shapes[path]):
                raise ValueError(
                    f"`rank` must be at most the smaller side of each matrix. Received: rank={rank} for {path!r} of shape "
                    f"{shapes[path]}."
                )
        return cls(dict.fromkeys(paths, rank), dict.fromkeys(paths, alpha), dropout, use_rslora)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"ranks": dict(self.ranks), "alphas": dict(self.alphas), "dropout": self.dropout, "use_rslora": self.use_rslora}


def check_rank(rank: Any) -> None:
    """Refuses what is no rank."""
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"`rank` must be an integer. Received: {rank!r}.")
    if rank < 1:
        raise ValueError(f"`rank` must be at least 1. Received: {rank}.")


def check_adapter_name(name: Any) -> None:
    """Refuses what layers and files cannot be named by."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"`name` of an adapter must consist of letters, digits, '_' and '-'. Received: {name!r}.")
