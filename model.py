"""The network: two towers that map a image and a Chinese sentence to unit vectors in one space (paper, section 3 and figure 1).

    from model import CLIP, CONFIGS
    model = CLIP(CONFIGS["vit-b-16"])
    image_embed, text_embed, scale = model(pixels, ids)        # (B, D), (B, D), scalar: cosines are image_embed @ text_embed.T

    image (B, 3, R, R) -> ModifiedResNet or VisionTransformer -> image_embed (B, D)
    tokens  (B, L)       -> BertEncoder, token [CLS], projection -> text_embed  (B, D)

Letters of shapes, the same in every file (loss.py has its own for its matrices, and says so):

    B  images or captions in this process's batch        N  pairs in the global batch of all processes
    L  tokens of a caption                                  K  tokens (or patches) of the whole batch, packed one after the other
    P  patches of a image, or positions of a feature map  R  side of a image, in pixels
    C  channels (width)        H  heads                     D  width of the shared space
    I  images of a split     T  captions of a split

Sources: CLIP (Radford et al. 2021, arXiv 2103.00020), BERT (Devlin et al. 2018, arXiv 1810.04805), ViT (Dosovitskiy et al. 2020,
arXiv 2010.11929), ResNet-D and anti-aliasing (arXiv 1812.01187, 1904.11486), Chinese CLIP (arXiv 2211.01335).
"""
import math
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Config:
    """All sizes of one model. `vision_layers` is a ViT's depth, or a ResNet's blocks in its four groups: which of the two decides the
    tower."""

    embed_dim: int                              # D, width of the shared space
    image_size: int                             # R, pixels
    vision_layers: int | tuple[int, int, int, int]
    vision_width: int                           # C: ViT token width, or channels that the ResNet's stem gives
    vision_heads: int                           # ViT: heads per layer. ResNet: heads of the attention pool
    patch_size: int | None                      # ViT only
    text_layers: int
    text_width: int
    text_heads: int
    text_dropout: float = 0.1                   # BERT: on hidden states and on attention weights
    vocab_size: int = 21128                     # bert-base-chinese
    text_positions: int = 512                   # rows of BERT's position table; `context_length` of them are used
    context_length: int = 52                    # paper, table 2

    def __post_init__(self):
        """Files bring sizes, too: raise ValueError for what cannot be one."""
        for name, value in vars(self).items():
            numbers = value if name == "vision_layers" and isinstance(value, tuple) and len(value) == 4 else (value,)
            most = 1000 if name.endswith("layers") else 2**20
            if name == "text_dropout":
                valid = isinstance(value, (int, float)) and 0 <= value < 1
            else:
                valid = all(type(x) is int and 1 <= x <= most for x in numbers)
            if not valid and not (name == "patch_size" and value is None and isinstance(self.vision_layers, tuple)):
                raise ValueError(f"{name} cannot be {value!r}")


# One row per model. The released sizes are those of Chinese CLIP (arXiv 2211.01335, table 1): "RBT3" and "RoBERTa-wwm-ext" (base and
# large) are BERTs of 3 x 768, 12 x 768 and 24 x 1024. The paper's CE-CLIP rows are vit-b-16 and vit-l-14. `tiny` is ours: it trains in
# minutes on a laptop's CPU.
#                              D    R         vision: layers  width  heads  patch       text: layers  width  heads
CONFIGS = {
    "rn50":         Config(1024, 224, (3, 4, 6, 3),   64, 32, None,   3,  768, 12),
    "vit-b-32":     Config( 512, 224,           12,  768, 12,   32,  12,  768, 12),
    "vit-b-16":     Config( 512, 224,           12,  768, 12,   16,  12,  768, 12),
    "vit-l-14":     Config( 768, 224,           24, 1024, 16,   14,  12,  768, 12),
    "vit-l-14-336": Config( 768, 336,           24, 1024, 16,   14,  12,  768, 12),
    "vit-h-14":     Config(1024, 224,           32, 1280, 16,   14,  24, 1024, 16),
    "tiny":         Config( 128,  64, (2, 2, 2, 2),   16,  8, None,   2,  128,  2, text_dropout=0.0),
}


# ---------------------------------------------------------------------------------------- attention, shared by ViT and BERT


class Packing(NamedTuple):
    """How the B sequences of a batch stand one after the other in a (K, C) tensor, without padding."""

    runs: tuple[tuple[int, int], ...]           # ((n, l), …): first n sequences of l tokens each, then …
    offsets: torch.Tensor                       # (B + 1,) int64: sequence b has rows offsets[b] to offsets[b + 1] - 1

    @property
    def firsts(self):
        """(B,): the row of each sequence's first token."""
        return self.offsets[:-1]


def attend(q, k, v, packing, dropout):
    """softmax(q kᵀ / sqrt(d)) v for each sequence and head. k, v (K, H, d); q the same, or (B, H, d) when only first tokens ask -> the shape
    of q.

    Each run, sequences of one length, is a call of the kernel, without a mask. On a GPU several runs are one call: a nested tensor takes
    torch to its kernels for sequences of any lengths.
    """
    first_only = len(q) != len(k)
    if q.is_cuda and len(packing.runs) > 1:
        return attend_at_once(q, k, v, packing, dropout)
    y, q_row, k_row = [], 0, 0
    for n, l in packing.runs:
        asking = n if first_only else n * l                                     # queries of this run
        heads = lambda t: t.unflatten(0, (n, -1)).transpose(1, 2)               # (n l, H, d) -> (n, H, l, d)
        answers, values = k[k_row : k_row + n * l], v[k_row : k_row + n * l]
        out = F.scaled_dot_product_attention(heads(q[q_row : q_row + asking]), heads(answers), heads(values), dropout_p=dropout)
        y.append(out.transpose(1, 2).flatten(0, 1))                             # (n, H, l or 1, d) -> (asking, H, d)
        q_row, k_row = q_row + asking, k_row + n * l
    return torch.cat(y) if len(y) > 1 else y[0]


def attend_at_once(q, k, v, packing, dropout):
    """The same by one kernel, on nested tensors (B, H, *, d)."""
    lengths = [l for _, l in packing.runs]

    def nested(x, offsets, shortest, longest):
        x = torch.nested.nested_tensor_from_jagged(x.contiguous(), offsets, min_seqlen=shortest, max_seqlen=longest)
        return x.transpose(1, 2)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                                         # that nested tensors are a prototype
        if len(q) == len(k):
            q = nested(q, packing.offsets, min(lengths), max(lengths))
        else:                                                                   # one query a sequence
            q = nested(q, torch.arange(len(q) + 1, device=q.device), 1, 1)
        k, v = (nested(x, packing.offsets, min(lengths), max(lengths)) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout).transpose(1, 2).values()


def to_device(x, device):
    """A tensor of the CPU -> device, without waiting for what the device is doing."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


class Attention(nn.Module):
    """Multi-head self-attention, softmax(Q Kᵀ / sqrt(C / H)) V per head (Vaswani et al. 2017, eq. 1), with one matrix for Q, K and V."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0, first_only: bool = False):
        super().__init__()
        if width % heads:
            raise ValueError(f"a width of {width} does not divide into {heads} heads")
        self.heads, self.dropout, self.first_only = heads, dropout, first_only
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x, packing):
        """x (K, C), B sequences -> (K, C); with first_only for the first token of each, which is all that is read in the end: (B, C)."""
        C, W, b = x.shape[1], self.qkv.weight, self.qkv.bias
        split = lambda t: t.unflatten(1, (-1, self.heads, C // self.heads)).unbind(1)               # (K, n C) -> n times (K, H, C/H)
        if self.first_only:
            q, k, v = *split(F.linear(x[packing.firsts], W[:C], b[:C])), *split(F.linear(x, W[C:], b[C:]))
        else:
            q, k, v = split(self.qkv(x))
        return self.out(attend(q, k, v, packing, self.dropout if self.training else 0.0).flatten(1))


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x): CLIP's approximation of GELU. The released weights were trained with it, so it must stay. (MLP, which it is made
    for, computes it in another way.)"""

    FACTOR = 1.702

    def forward(self, x):
        return x * torch.sigmoid(self.FACTOR * x)


class MLP(nn.Sequential):
    """C -> 4 C, activation (GELU or QuickGELU), 4 C -> C."""

    def __init__(self, width: int, activation: nn.Module):
        super().__init__(nn.Linear(width, 4 * width), activation, nn.Linear(4 * width, width))

    def forward(self, x):                       # (K, C) -> (K, C)
        widen, activation, narrow = self        # as nn.Sequential would run them; but faster:
        # With a = 1.702, QuickGELU(h) = h sigmoid(a h) = silu(a h) / a: one kernel; the matrix products beside it bring the factors for nothing.
        a, function = (QuickGELU.FACTOR, F.silu) if isinstance(activation, QuickGELU) else (1.0, F.gelu)
        x = torch.addmm(a * widen.bias, x, widen.weight.T, alpha=a)             # a h: (K, 4 C)
        activate_and_narrow = lambda x: torch.addmm(narrow.bias, function(x), narrow.weight.T, alpha=1 / a)
        if not torch.is_grad_enabled():
            return activate_and_narrow(x)
        # Only a h is kept, not the activation's value. The backward pass computes that again, which is cheap, and no more: checkpoint stops
        # when it has what the gradient needs. (preserve_rng_state: nothing here is random.)
        return checkpoint(activate_and_narrow, x, use_reentrant=False, preserve_rng_state=False)


def run_blocks(blocks, x, *args, checkpointed: bool):
    """x through a list of blocks, one after the other. With `checkpointed` only the blocks' inputs are kept, and each block is run again
    during the backward pass.

    The second run must not touch BatchNorm's running statistics again, or they would count every batch twice.
    """
    for block in blocks:
        if checkpointed and torch.is_grad_enabled():
            contexts = lambda block=block: (nullcontext(), statistics_kept(block))              # of the first run, of the second
            x = checkpoint(block, x, *args, use_reentrant=False, context_fn=contexts)
        else:
            x = block(x, *args)
    return x


@contextmanager
def statistics_kept(module):
    """BatchNorm's running statistics stay as they are, while its layers still normalise by the batch: for a second forward pass over the
    same images."""
    norms = [(m, m.momentum, m.num_batches_tracked.clone()) for m in module.modules() if isinstance(m, BatchNorm2d)]
    for m, _, _ in norms:
        # New statistics = 1 x the old ones + 0 x this batch's. So the graph stays the same, as checkpointing needs.
        m.momentum = 0.0
    try:
        yield
    finally:
        for m, momentum, batches in norms:
            m.momentum = momentum
            m.num_batches_tracked.copy_(batches)


def at_least_float32(x):
    """bfloat16 and float16 -> float32; float32 and float64 stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---------------------------------------------------------------------------------------- vision tower 1: VisionTransformer


class VisionBlock(nn.Module):
    """Pre-norm transformer layer: x + attention(norm(x)), then x + mlp(norm(x)). With first_only for the first token of each sequence."""

    def __init__(self, width: int, heads: int, first_only: bool = False):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, first_only=first_only)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, QuickGELU())

    def forward(self, x, packing):              # (K, C) -> (K, C), or (B, C)
        y = self.attention(self.norm1(x), packing)
        x = (x[packing.firsts] if self.attention.first_only else x) + y
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """ViT as in CLIP: patches by one strided convolution, a class token, a LayerNorm before the first layer. The class token's last state
    is the feature, so the last layer computes that alone."""

    def __init__(self, cfg: Config):
        super().__init__()
        width, patches = cfg.vision_width, (cfg.image_size // cfg.patch_size) ** 2
        self.grad_checkpointing = False
        self.patch_dropout = 0.0                # share of patches that training leaves out, drawn for each image (FLIP, arXiv 2212.00794)
        self.patch_embed = nn.Conv2d(3, width, cfg.patch_size, stride=cfg.patch_size, bias=False)
        self.class_token = nn.Parameter(torch.empty(width))
        self.position_embed = nn.Parameter(torch.empty(1 + patches, width))
        self.norm_pre = nn.LayerNorm(width)
        last = cfg.vision_layers - 1
        self.blocks = nn.ModuleList(VisionBlock(width, cfg.vision_heads, first_only=i == last) for i in range(cfg.vision_layers))
        self.norm_post = nn.LayerNorm(width)
        self.projection = nn.Parameter(torch.empty(width, cfg.embed_dim))
        self.init_weights()

    def forward(self, pixels):
        """pixels (B, 3, R, R), normalised -> (B, D), not yet of unit length."""
        x = self.patch_embed(pixels).flatten(2).transpose(1, 2)                                     # (B, P, C)
        x = torch.cat([self.class_token.to(x.dtype).expand(len(x), 1, -1), x], dim=1)               # (B, 1+P, C)
        x = x + self.position_embed
        if self.training and self.patch_dropout:
            drawn = torch.rand(x.shape[0], x.shape[1] - 1, device=x.device).argsort(dim=1)          # (B, P): the patches in random order
            kept = drawn[:, : self.patches_kept(), None] + 1                    # (B, P', 1): row 0 of x is the class token
            x = torch.cat([x[:, :1], x.gather(1, kept.expand(-1, -1, x.shape[2]))], dim=1)          # (B, 1+P', C)
        B, L, _ = x.shape
        packing = Packing(((B, L),), torch.arange(0, B * L + 1, L, device=x.device))                # B sequences of the same length
        x = self.norm_pre(x).flatten(0, 1)                                                          # (B L, C)
        x = run_blocks(self.blocks, x, packing, checkpointed=self.grad_checkpointing)               # (B, C)
        return self.norm_post(x) @ self.projection                                                  # (B, D)

    def patches_kept(self):
        """How many patches of a image training looks at, with patch_dropout."""
        return max(1, round((len(self.position_embed) - 1) * (1 - self.patch_dropout)))

    def init_weights(self):
        """The scheme of CLIP's transformer (openai/CLIP, model.py, initialize_parameters): deviations C^-1/2 into attention, (2C)^-1/2 into
        the MLP, and C^-1/2 (2 x layers)^-1/2 where a branch rejoins the residual stream."""
        width, layers = self.position_embed.shape[1], len(self.blocks)
        for p in (self.class_token, self.position_embed, self.projection):
            nn.init.normal_(p, std=width**-0.5)
        for block in self.blocks:
            nn.init.normal_(block.attention.qkv.weight, std=width**-0.5)
            nn.init.normal_(block.mlp[0].weight, std=(2 * width) ** -0.5)
            for rejoining in (block.attention.out, block.mlp[2]):
                nn.init.normal_(rejoining.weight, std=width**-0.5 * (2 * layers) ** -0.5)
            for linear in (block.attention.qkv, block.attention.out, block.mlp[0], block.mlp[2]):
                nn.init.zeros_(linear.bias)


# ---------------------------------------------------------------------------------------- vision tower 2: ModifiedResNet


class _Sum(torch.autograd.Function):
    """The sum over all processes, which every process uses: so the gradient, too, is the sum of theirs."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


class BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over the global batch: the statistics are those of all processes' images, so their number does not change the model.

    mean = Σ x / n, var = Σ (x - mean)² / n, over n values of a channel; y = (x - mean) / sqrt(var + eps) x gain + bias. The running
    variance takes var n / (n - 1), as torch's own does.
    """

    def forward(self, x):                       # (B, C, h, w) -> (B, C, h, w)
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        world, dtype, x = dist.get_world_size(), x.dtype, at_least_float32(x)
        mean = _Sum.apply(x.mean(dim=(0, 2, 3))) / world                                            # (C,)
        centred = x - mean[:, None, None]
        var = _Sum.apply(centred.square().mean(dim=(0, 2, 3))) / world
        n = world * x.numel() // x.shape[1]                                                         # values per channel
        self.running_mean.lerp_(mean.detach(), self.momentum)
        self.running_var.lerp_(var.detach() * n / (n - 1), self.momentum)
        self.num_batches_tracked += 1
        y = centred * ((var + self.eps).rsqrt() * self.weight)[:, None, None] + self.bias[:, None, None]
        return y.to(dtype)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions beside a shortcut. All convolutions have stride 1: an average pool shrinks the map, which keeps fine
    patterns from aliasing."""

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        channels_out = 4 * channels
        self.conv1 = nn.Conv2d(channels_in, channels, 1, bias=False)
        self.bn1 = BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = BatchNorm2d(channels)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(channels, channels_out, 1, bias=False)
        self.bn3 = BatchNorm2d(channels_out)
        self.shortcut = nn.Identity()
        if stride > 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.AvgPool2d(stride) if stride > 1 else nn.Identity(),
                nn.Conv2d(channels_in, channels_out, 1, bias=False),
                BatchNorm2d(channels_out),
            )

    def forward(self, x):                       # (B, C, h, w) -> (B, C', h/stride, w/stride)
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.pool(F.relu(self.bn2(self.conv2(y))))
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


class AttentionPool(nn.Module):
    """Pools a feature map by attention: the mean position asks, all positions (the mean among them) answer (CLIP, section 2.4)."""

    def __init__(self, side: int, width: int, heads: int, embed_dim: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"a width of {width} does not divide into {heads} heads")
        self.heads = heads
        self.position_embed = nn.Parameter(torch.empty(1 + side * side, width))
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, embed_dim)

    def forward(self, x):                       # (B, C, h, w) -> (B, D)
        x = x.flatten(2).transpose(1, 2)                                                            # (B, P, C)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.position_embed.to(x.dtype)    # (B, 1+P, C)
        split = lambda t: t.unflatten(2, (self.heads, -1)).transpose(1, 2)                          # (B, ?, C) -> (B, H, ?, C/H)
        y = F.scaled_dot_product_attention(split(self.query(x[:, :1])), split(self.key(x)), split(self.value(x)))  # (B, H, 1, C/H)
        return self.out(y.transpose(1, 2).flatten(1))                                               # (B, D)


class ModifiedResNet(nn.Module):
    """CLIP's ResNet: a stem of three convolutions, average pools in the place of strides, attention pooling at the end."""

    def __init__(self, cfg: Config):
        super().__init__()
        width = cfg.vision_width
        self.grad_checkpointing = False
        conv = lambda c_in, c_out, stride=1: nn.Sequential(
            nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False), BatchNorm2d(c_out), nn.ReLU())
        half = width // 2
        self.stem = nn.Sequential(conv(3, half, stride=2), conv(half, half), conv(half, width), nn.AvgPool2d(2))
        blocks, channels_in = [], width
        for group, depth in enumerate(cfg.vision_layers):
            for i in range(depth):
                stride = 2 if group > 0 and i == 0 else 1
                blocks.append(Bottleneck(channels_in, width * 2**group, stride))
                channels_in = 4 * width * 2**group
        self.blocks = nn.ModuleList(blocks)
        self.attention_pool = AttentionPool(cfg.image_size // 32, channels_in, cfg.vision_heads, cfg.embed_dim)
        self.init_weights()

    def forward(self, pixels):
        """pixels (B, 3, R, R), normalised -> (B, D), not yet of unit length."""
        x = pixels.contiguous(memory_format=torch.channels_last)                # the layout in which convolutions are fast
        x = run_blocks([self.stem, *self.blocks], x, checkpointed=self.grad_checkpointing)     # (B, 32 C, R/32, R/32)
        return self.attention_pool(x)

    def init_weights(self):
        """CLIP's scheme: the attention pool by C^-1/2; each block starts as its shortcut (gain 0 in its last BatchNorm)."""
        pool = self.attention_pool
        std = pool.position_embed.shape[1] ** -0.5
        for p in (pool.position_embed, pool.query.weight, pool.key.weight, pool.value.weight, pool.out.weight):
            nn.init.normal_(p, std=std)
        for block in self.blocks:
            nn.init.zeros_(block.bn3.weight)


# ---------------------------------------------------------------------------------------- text tower: BERT


class BertBlock(nn.Module):
    """Post-norm transformer layer: norm(x + attention(x)), then norm(x + mlp(x)); the exact (erf) GELU. With first_only for the first token
    of each sequence."""

    def __init__(self, width: int, heads: int, dropout: float, first_only: bool = False):
        super().__init__()
        self.attention = Attention(width, heads, dropout, first_only)
        self.norm1 = nn.LayerNorm(width, eps=1e-12)
        self.mlp = MLP(width, nn.GELU())
        self.norm2 = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, packing):              # (K, C) -> (K, C), or (B, C)
        y = self.dropout(self.attention(x, packing))
        x = self.norm1((x[packing.firsts] if self.attention.first_only else x) + y)
        return self.norm2(x + self.dropout(self.mlp(x)))


def pack(ids):
    """Captions differ much in length, and [PAD] would cost as much as a word. So their tokens are put one after the other, without it.

    ids (B, L) on the CPU, 0 = [PAD] at the end -> of all K tokens, the shortest caption's first: words (K,), each one's position in its
    caption (K,), the Packing; and places (B,): where each caption stands.

    [[5, 6, 7], [8, 0, 0], [9, 3, 1]] -> words 8 | 5 6 7 | 9 3 1; positions 0 | 0 1 2 | 0 1 2; runs (1, 1), (2, 3); offsets 0 1 4 7;
    places 1 0 2
    """
    lengths = (ids != 0).sum(dim=1).clamp(min=1)                                # (B,)
    order = lengths.argsort(stable=True)
    sorted_lengths = lengths[order]
    rows, positions = (torch.arange(ids.shape[1]) < sorted_lengths[:, None]).nonzero(as_tuple=True)         # (K,) each
    values, counts = sorted_lengths.unique_consecutive(return_counts=True)
    packing = Packing(tuple(zip(counts.tolist(), values.tolist())), F.pad(sorted_lengths.cumsum(0), (1, 0)))
    return ids[order[rows], positions], positions, packing, order.argsort()


class BertEncoder(nn.Module):
    """BERT without its pooler and heads. The sentence is the last state of its first token, [CLS] (paper, section 3.1, step 1), so the last
    layer computes that alone."""

    def __init__(self, cfg: Config):
        super().__init__()
        if not 2 < cfg.context_length <= cfg.text_positions:
            raise ValueError(f"a context length of {cfg.context_length} does not fit {cfg.text_positions} positions")
        self.grad_checkpointing = False
        self.word_embed = nn.Embedding(cfg.vocab_size, cfg.text_width)
        self.position_embed = nn.Embedding(cfg.text_positions, cfg.text_width)
        self.type_embed = nn.Embedding(2, cfg.text_width)                       # of BERT's sentences A and B; a caption is A, row 0
        self.norm = nn.LayerNorm(cfg.text_width, eps=1e-12)
        self.dropout = nn.Dropout(cfg.text_dropout)
        sizes, last = (cfg.text_width, cfg.text_heads, cfg.text_dropout), cfg.text_layers - 1
        self.blocks = nn.ModuleList(BertBlock(*sizes, first_only=i == last) for i in range(cfg.text_layers))
        self.init_weights()

    def forward(self, ids):
        """ids (B, L) int64, 0 = [PAD] at the end -> last states of [CLS] (B, C). Best on the CPU: their lengths are looked at, and for ids on
        a GPU that means to wait for it."""
        words, positions, (runs, offsets), places = pack(ids.cpu())
        device = self.word_embed.weight.device
        words, positions, offsets, places = (to_device(x, device) for x in (words, positions, offsets, places))
        x = self.word_embed(words) + self.position_embed(positions) + self.type_embed.weight[0]                 # (K, C)
        x = self.dropout(self.norm(x))
        x = run_blocks(self.blocks, x, Packing(runs, offsets), checkpointed=self.grad_checkpointing)            # (B, C)
        return x[places]                        # from the order of `pack`, the shortest caption first, to that of ids

    def init_weights(self):
        """BERT's scheme: every matrix and table normal with deviation 0.02, biases 0 (google-research/bert, initializer_range)."""
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Embedding)):
                nn.init.normal_(m.weight, std=0.02)
            if isinstance(m, nn.Linear):
                nn.init.zeros_(m.bias)


# ---------------------------------------------------------------------------------------- the two towers together


class CLIP(nn.Module):
    """Both towers, the text projection, and the learned temperature (as the logarithm of its inverse, `logit_scale`)."""

    MAX_LOGIT_SCALE = math.log(100.0)           # CLIP, section 2.5: above a scale of 100 training becomes unstable

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.vision_frozen = False
        self.vision = VisionTransformer(cfg) if isinstance(cfg.vision_layers, int) else ModifiedResNet(cfg)
        self.text = BertEncoder(cfg)
        self.text_projection = nn.Parameter(torch.empty(cfg.text_width, cfg.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.text_projection, std=cfg.text_width**-0.5)

    def encode_image(self, pixels):
        """pixels (B, 3, R, R) float, normalised -> unit vectors (B, D), at least float32 whatever the towers' precision."""
        with torch.no_grad() if self.vision_frozen else nullcontext():
            # In evaluation a CPU is fastest with a few images at a time, at most 2^18 pixels, whose activations stay in its caches.
            # (In training BatchNorm must see the whole batch.)
            parts = [pixels]
            if pixels.device.type == "cpu" and not torch.is_grad_enabled() and not self.vision.training:
                parts = pixels.chunk(math.ceil(len(pixels) * self.cfg.image_size**2 / 2**18) or 1)
            return F.normalize(at_least_float32(torch.cat([self.vision(part) for part in parts])), dim=-1)

    def encode_text(self, ids):
        """ids (B, L) int64, 0 = [PAD] at the end, best on the CPU -> unit vectors (B, D), at least float32."""
        return F.normalize(at_least_float32(self.text(ids) @ self.text_projection), dim=-1)

    def forward(self, pixels, ids):
        """-> image_embed (B, D), text_embed (B, D), scale = exp(logit_scale)."""
        return self.encode_image(pixels), self.encode_text(ids), self.logit_scale.exp()

    def freeze_vision(self):
        """Stage 1 (paper, section 3.2): the vision tower gets no gradients, and stays in evaluation mode, so that BatchNorm keeps its
        statistics."""
        self.vision_frozen = True
        self.vision.requires_grad_(False)
        return self.train(self.training)

    def train(self, mode: bool = True):
        super().train(mode)
        if self.vision_frozen:
            self.vision.eval()
        return self

    def set_grad_checkpointing(self, on: bool = True):
        """Trade computation for memory in both towers: keep each block's input alone and run the block again in the backward pass."""
        self.vision.grad_checkpointing = self.text.grad_checkpointing = on

    def compile_vision(self, backend="inductor"):
        """torch.compile for a ViT, block by block: all but the last are alike, so one compilation serves them, and images come in
        few shapes (a micro-batch, the last one, those of validation). Captions come in as many as there are sums of lengths, so the
        text tower stays as it is; and so does a ResNet, whose blocks all differ: ValueError.
        """
        if isinstance(self.cfg.vision_layers, tuple):
            raise ValueError("it is for ViTs; the blocks of a ResNet all differ, and each would be compiled by itself")
        for block in self.vision.blocks[:-1]:
            block.compile(backend=backend)

    @torch.no_grad()
    def clamp_logit_scale(self):
        """After every optimizer step: exp(logit_scale) stays between 1 and 100. Below 1 the softmax would be flat, above 100 training becomes
        unstable; the released models were trained with both bounds."""
        self.logit_scale.clamp_(0, self.MAX_LOGIT_SCALE)
