"""The shapes of the reference video diffusion transformer, the published ones by name."""

from __future__ import annotations

from dataclasses import dataclass, replace

from stattn.grid import Triple, check_positive, check_triple
from stattn.ops import _validate
from stattn.rope import check_split


@dataclass(frozen=True)
class DiTConfig:
    """The shape of a DiT.

    kind: "cross" or "joint". in_channels: channels of the noisy video x. masked_input: the model also reads a known
    video and its mask, [x | known | mask], 2 * in_channels + 1 channels. text_dim: width of the text features, 0 for a
    model without text. text_len: text tokens of a caption. vocab: when positive, text comes as token ids below it, and
    the model embeds the ids and their positions, up to text_len. qk_norm: "across_heads", "per_head" or None.
    rope_split: features of a head rotated by t, h and w; by default h and w take 2 * (head_dim // 6) each and t the
    rest, as Wan. Raises TypeError or ValueError naming the field that does not fit.
    """

    kind: str
    layers: int
    heads: int
    head_dim: int
    ffn_dim: int
    in_channels: int
    out_channels: int
    patch: Triple
    text_dim: int = 0
    text_len: int = 0
    vocab: int = 0
    masked_input: bool = False
    freq_dim: int = 256
    qk_norm: str | None = "across_heads"
    rope_split: Triple | None = None
    rope_theta: float = 1e4
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.kind not in ("cross", "joint"):
            raise ValueError(f"kind={self.kind!r} must be 'cross' or 'joint'")
        for name in ("layers", "heads", "head_dim", "ffn_dim", "in_channels", "out_channels", "freq_dim"):
            check_positive(name, getattr(self, name))
        for name in ("text_dim", "text_len", "vocab"):
            check_positive(name, getattr(self, name), least=0)
        if self.kind == "cross" and not self.text_dim:
            raise ValueError("text_dim=0 leaves a model of kind 'cross' nothing to attend across to; use kind='joint'")
        for name in ("freq_dim", "head_dim"):
            if getattr(self, name) % 2:
                raise ValueError(f"{name}={getattr(self, name)} must be even")
        if self.qk_norm not in ("across_heads", "per_head", None):
            raise ValueError(f"qk_norm={self.qk_norm!r} must be 'across_heads', 'per_head' or None")
        _validate.flag("masked_input", self.masked_input)
        _validate.epsilon(self.eps)
        if _validate.number("rope_theta", self.rope_theta) <= 0:
            raise ValueError(f"rope_theta={self.rope_theta!r} must be positive")
        if self.vocab and not (self.text_dim and self.text_len):
            raise ValueError(
                f"vocab={self.vocab} needs text_dim={self.text_dim} and text_len={self.text_len} to be positive"
            )
        # Lists come from JSON; tuples keep a frozen config hashable.
        object.__setattr__(self, "patch", check_triple("patch", self.patch))
        if self.rope_split is not None:
            object.__setattr__(self, "rope_split", check_split("rope_split", self.rope_split, self.head_dim))

    @property
    def dim(self) -> int:
        """The width of the residual stream."""
        return self.heads * self.head_dim

    @property
    def model_channels(self) -> int:
        """The channels that the patch embedding reads."""
        return 2 * self.in_channels + 1 if self.masked_input else self.in_channels


WAN_14B = DiTConfig(
    kind="cross",
    layers=40,
    heads=40,
    head_dim=128,
    ffn_dim=13824,
    in_channels=16,
    out_channels=16,
    patch=(1, 2, 2),
    text_dim=4096,
    text_len=512,
)

# Widths, depths, heads, patches and rotary splits as published. The two published joint models have blocks of their
# own; here they keep the token counts and the work per video token, with `blocks.JointBlock`: text and video share
# weights in all layers.
CONFIGS: dict[str, DiTConfig] = {
    "tiny": DiTConfig(
        kind="joint",
        layers=6,
        heads=4,
        head_dim=64,
        ffn_dim=1024,
        in_channels=3,
        out_channels=3,
        patch=(2, 8, 8),
        text_dim=256,
        text_len=16,
        vocab=64,
        masked_input=True,
        qk_norm="per_head",
    ),
    "wan2.1-1.3b": replace(WAN_14B, layers=30, heads=12, ffn_dim=8960),
    "wan2.1-14b": WAN_14B,
    "hunyuanvideo": DiTConfig(
        kind="joint",
        layers=60,  # 20 with two streams and 40 with one, as published
        heads=24,
        head_dim=128,
        ffn_dim=12288,
        in_channels=16,
        out_channels=16,
        patch=(1, 2, 2),
        text_dim=4096,
        text_len=256,
        qk_norm="per_head",
        rope_split=(16, 56, 56),
        rope_theta=256.0,
    ),
    "cogvideox-5b": DiTConfig(
        kind="joint",
        layers=42,
        heads=48,
        head_dim=64,
        ffn_dim=12288,
        in_channels=16,
        out_channels=16,
        patch=(1, 2, 2),
        text_dim=4096,
        text_len=226,
        qk_norm="per_head",
        rope_split=(16, 24, 24),
    ),
}


def resolve(config: DiTConfig | str, layers: int | None) -> DiTConfig:
    """Look a config up by its name, and give it another number of layers. Raises ValueError or TypeError."""
    if isinstance(config, str):
        if config not in CONFIGS:
            raise ValueError(f"config={config!r} must be one of {', '.join(CONFIGS)}")
        config = CONFIGS[config]
    if not isinstance(config, DiTConfig):
        raise TypeError(f"config={config!r} must be a DiTConfig or the name of one")
    return config if layers is None else replace(config, layers=layers)
