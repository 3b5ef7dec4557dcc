"""The network: two towers that map an image and a Chinese text to unit vectors in one space
(section 3 and figure 1 of the paper: Chen et al. 2025, doi 10.3233/ATDE250109).

    pixels (B, 3, R, R) -> VisionTransformer or ModifiedResNet      -> image_embed (B, D)
    ids (B, L)          -> BertEncoder, state of [CLS], projection  -> text_embed (B, D)

Letters of shapes (loss.py, data.py and evaluate.py list those they add or change):

    B  images or texts embedded together            N  pairs in the global batch of all processes
    L  tokens of a sequence, with padding           K  tokens of the B sequences, without padding
    P  patches of an image                          R  side of an image in pixels
    C  channels (width)     H  heads     d  C / H   D  width of the shared space
    I  images of a split                            T  texts of a split

Sources: CLIP (Radford et al. 2021, arXiv 2103.00020), BERT (Devlin et al. 2018, arXiv 1810.04805),
ViT (Dosovitskiy et al. 2020, arXiv 2010.11929), ResNet-D and anti-aliasing (arXiv 1812.01187,
1904.11486), Chinese CLIP (arXiv 2211.01335).
"""
import math
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Config:
    """All sizes of one model. ValueError for an impossible size (also from a file)."""

    embed_dim: int  # D
    image_size: int  # R
    vision_layers: int | tuple[int, int, int, int]  # of a ViT, or blocks in each group of a ResNet
    vision_width: int  # ViT: C. ResNet: channels after the stem
    vision_heads: int  # ViT: of each layer. ResNet: of the attention pool
    patch_size: int | None  # pixels; None for a ResNet
    text_layers: int
    text_width: int
    text_heads: int
    text_dropout: float = 0.1  # of hidden states and of attention weights
    vocab_size: int = 21128  # bert-base-chinese
    text_positions: int = 512  # rows of BERT's position table
    context_length: int = 52  # tokens of the longest text (paper, table 2)

    def __post_init__(self):
        resnet = isinstance(self.vision_layers, tuple)
        for name, value in vars(self).items():
            largest = 1000 if name.endswith("layers") else 2**20
            if name == "text_dropout":
                valid = isinstance(value, (int, float)) and 0 <= value < 1
            elif name == "vision_layers" and resnet:
                valid = len(value) == 4 and all(type(x) is int and 1 <= x <= largest for x in value)
            else:
                valid = type(value) is int and 1 <= value <= largest
            if not (valid or (name == "patch_size" and value is None and resnet)):
                raise ValueError(f"{name} cannot be {value!r}")


# The released sizes of Chinese CLIP (arXiv 2211.01335, table 1), whose text towers are BERTs: RBT3,
# RoBERTa-wwm-ext base, large. The paper's CE-CLIP: vit-b-16, vit-l-14. `tiny` is ours.
#                         D     R    vision: layers width heads patch   text: layers width heads
CONFIGS = {
    "rn50":         Config(1024, 224, (3, 4, 6, 3),   64, 32, None,        3,  768, 12),
    "vit-b-32":     Config( 512, 224,           12,  768, 12,   32,       12,  768, 12),
    "vit-b-16":     Config( 512, 224,           12,  768, 12,   16,       12,  768, 12),
    "vit-l-14":     Config( 768, 224,           24, 1024, 16,   14,       12,  768, 12),
    "vit-l-14-336": Config( 768, 336,           24, 1024, 16,   14,       12,  768, 12),
    "vit-h-14":     Config(1024, 224,           32, 1280, 16,   14,       24, 1024, 16),
    "tiny":         Config( 128,  64, (2, 2, 2, 2),   16,  8, None,        2,  128,  2, 0.0),
}


class Layout:
    """Where the real tokens of B sequences are. Linear layers see only these K tokens, (K, C);
    attention sees every sequence padded to L tokens, (B, L, C). Images have no padding: K = B L."""

    def __init__(self, B, L, real=None, rows=None):
        """real: (B, L) bool, False at padding. rows: (K,), where real.flatten() is True."""
        self.shape, self.rows = (B, L), rows
        self.mask = None if real is None else real[:, None, None]  # (B, 1, 1, L) keys to attend to

    def pad(self, x):  # (K, C) -> (B, L, C), zeros where there is padding
        B, L = self.shape
        if self.rows is not None:
            x = x.new_zeros(B * L, x.shape[1]).index_copy(0, self.rows, x)
        return x.view(B, L, -1)

    def unpad(self, x):  # (B, L, C) -> (K, C)
        x = x.flatten(0, 1)
        return x if self.rows is None else x.index_select(0, self.rows)


class Attention(nn.Module):
    """Multi-head self-attention, softmax(Q Kᵀ / sqrt(d)) V (Vaswani et al. 2017, equation 1)."""

    def __init__(self, width, heads, dropout=0.0):
        super().__init__()
        if width % heads:
            raise ValueError(f"a width of {width} does not divide into {heads} heads")
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x, layout, cls_only=False):  # (K, C) -> (K, C); cls_only: (B, C)
        qkv = layout.pad(self.qkv(x)).unflatten(2, (3, self.heads, -1))  # (B, L, 3, H, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, L, d) each
        q = q[:, :, :1] if cls_only else q  # one query: the first token
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=layout.mask, dropout_p=dropout)
        y = y.transpose(1, 2).flatten(2)  # (B, L or 1, C)
        return self.out(y[:, 0] if cls_only else layout.unpad(y))


class MLP(nn.Sequential):
    """C -> 4 C -> C. BERT has the exact GELU; CLIP's ViTs have QuickGELU, x sigmoid(a x) with
    a = 1.702. It is silu(a x) / a: the first layer is multiplied by a, narrow.weight divided."""

    def __init__(self, width, quick):
        activation = nn.SiLU() if quick else nn.GELU()
        super().__init__(nn.Linear(width, 4 * width), activation, nn.Linear(4 * width, width))
        self.a = 1.702 if quick else None

    def forward(self, x):  # (K, C) -> (K, C)
        (widen, activation, narrow), a = self, self.a
        hidden = F.linear(x, a * widen.weight, a * widen.bias) if a else widen(x)  # (K, 4 C)

        def rest(hidden):
            weight = narrow.weight / a if a else narrow.weight
            return F.linear(activation(hidden), weight, narrow.bias)

        # For the backward pass keep `hidden` alone, and compute the activation again.
        return checkpoint(rest, hidden, use_reentrant=False, preserve_rng_state=False)


def run_block(block, *args, checkpointed):
    """block(*args). checkpointed: keep only args, and run the block again in the backward pass."""
    if not (checkpointed and torch.is_grad_enabled()):
        return block(*args)
    contexts = lambda: (nullcontext(), statistics_kept(block))  # around the first run, the second
    return checkpoint(block, *args, use_reentrant=False, context_fn=contexts)


@contextmanager
def statistics_kept(module):
    """Inside it, BatchNorm's running statistics do not change: no image counts twice."""
    norms = [m for m in module.modules() if isinstance(m, BatchNorm2d)]
    before = [(m.momentum, m.num_batches_tracked) for m in norms]
    for m in norms:  # new statistics = 1 x old + 0 x batch, by the same graph
        m.momentum, m.num_batches_tracked = 0.0, m.num_batches_tracked.clone()
    try:
        yield
    finally:
        for m, state in zip(norms, before):
            m.momentum, m.num_batches_tracked = state


def at_least_float32(x):  # bfloat16 and float16 -> float32; float32 and float64 stay
    return x.to(torch.promote_types(x.dtype, torch.float32))


def to_device(x, device):
    """A tensor -> device. From CPU to GPU through pinned memory: the CPU does not wait."""
    if x.device.type == "cpu" and device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


class VisionBlock(nn.Module):
    """Pre-norm transformer layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, quick=True)

    def forward(self, x, layout, cls_only=False):  # (K, C) -> (K, C); cls_only: (B, C)
        y = self.attention(self.norm1(x), layout, cls_only)
        x = (layout.pad(x)[:, 0] if cls_only else x) + y
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """ViT as in CLIP: LayerNorm before the layers, too. The last has one query, the class token."""

    def __init__(self, cfg):
        super().__init__()
        C, H, P = cfg.vision_width, cfg.vision_heads, (cfg.image_size // cfg.patch_size) ** 2
        self.grad_checkpointing = False
        self.patch_dropout = 0.0  # share of patches that training leaves out (arXiv 2212.00794)
        self.patch_embed = nn.Conv2d(3, C, cfg.patch_size, stride=cfg.patch_size, bias=False)
        self.class_token = nn.Parameter(torch.empty(C))
        self.position_embed = nn.Parameter(torch.empty(1 + P, C))
        self.norm_pre = nn.LayerNorm(C)
        self.blocks = nn.ModuleList(VisionBlock(C, H) for _ in range(cfg.vision_layers))
        self.norm_post = nn.LayerNorm(C)
        self.projection = nn.Parameter(torch.empty(C, cfg.embed_dim))
        # As in openai/CLIP, the layers as in its text tower. std_out: of what is added to x
        std_in, std_out = C**-0.5, C**-0.5 * (2 * cfg.vision_layers) ** -0.5
        for p in (self.class_token, self.position_embed, self.projection):
            nn.init.normal_(p, std=std_in)
        for block in self.blocks:
            qkv, out, (widen, _, narrow) = block.attention.qkv, block.attention.out, block.mlp
            stds = {qkv: std_in, widen: (2 * C) ** -0.5, out: std_out, narrow: std_out}
            for linear, std in stds.items():
                nn.init.normal_(linear.weight, std=std)
                nn.init.zeros_(linear.bias)

    def forward(self, pixels):  # (B, 3, R, R), normalized -> (B, D), not yet of unit length
        x = self.patch_embed(pixels).flatten(2).transpose(1, 2)  # (B, P, C)
        x = torch.cat([self.class_token.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        x = x + self.position_embed  # (B, 1 + P, C)
        B, L, C = x.shape
        if self.training and self.patch_dropout:
            L = 1 + max(1, round((L - 1) * (1 - self.patch_dropout)))
            order = torch.rand(B, x.shape[1] - 1, device=x.device).argsort(dim=1)  # (B, P)
            kept = 1 + order[:, : L - 1, None].expand(-1, -1, C)  # row 0 is the class token
            x = torch.cat([x[:, :1], x.gather(1, kept)], dim=1)
        layout = Layout(B, L)
        x = layout.unpad(self.norm_pre(x))  # (K, C)
        for block in self.blocks:
            last = block is self.blocks[-1]
            x = run_block(block, x, layout, last, checkpointed=self.grad_checkpointing)
        return self.norm_post(x) @ self.projection  # of x (B, C)


class _Sum(torch.autograd.Function):
    """The sum over all processes. Each one's loss depends on it: its gradient is summed, too."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    backward = forward


class BatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over the images of all processes. torch's SyncBatchNorm needs a GPU."""

    def forward(self, x):  # (B, C, h, w) -> (B, C, h, w)
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        world, dtype, x = dist.get_world_size(), x.dtype, at_least_float32(x)
        mean = _Sum.apply(x.mean(dim=(0, 2, 3))) / world  # (C,)
        centred = x - mean[:, None, None]
        var = _Sum.apply(centred.square().mean(dim=(0, 2, 3))) / world
        n = world * x.numel() // x.shape[1]  # values of a channel
        self.running_mean.lerp_(mean.detach(), self.momentum)
        self.running_var.lerp_(var.detach() * n / (n - 1), self.momentum)
        self.num_batches_tracked += 1
        gain = (var + self.eps).rsqrt() * self.weight
        return (centred * gain[:, None, None] + self.bias[:, None, None]).to(dtype)


class Bottleneck(nn.Module):
    """Three convolutions and a shortcut. Average pools halve the map: strides would alias."""

    def __init__(self, channels_in, channels, stride):
        super().__init__()
        channels_out = 4 * channels
        self.conv1 = nn.Conv2d(channels_in, channels, 1, bias=False)
        self.bn1 = BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = BatchNorm2d(channels)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(channels, channels_out, 1, bias=False)
        self.bn3 = BatchNorm2d(channels_out)
        nn.init.zeros_(self.bn3.weight)  # as in CLIP: at first only the shortcut
        self.shortcut = nn.Identity()
        if stride > 1 or channels_in != channels_out:
            conv = nn.Conv2d(channels_in, channels_out, 1, bias=False)
            self.shortcut = nn.Sequential(self.pool, conv, BatchNorm2d(channels_out))

    def forward(self, x):  # (B, C, h, w) -> (B, C', h / stride, w / stride)
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.pool(F.relu(self.bn2(self.conv2(y))))
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


class AttentionPool(nn.Module):
    """One query, the mean of a feature map; keys: the mean and all places (CLIP, section 2.4)."""

    def __init__(self, width, cfg):
        super().__init__()
        self.heads, places = cfg.vision_heads, (cfg.image_size // 32) ** 2
        self.position_embed = nn.Parameter(torch.empty(1 + places, width))
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, cfg.embed_dim)
        for p in self.parameters():
            if p.ndim == 2:  # all but biases, as in CLIP
                nn.init.normal_(p, std=width**-0.5)

    def forward(self, x):  # (B, C, h, w) -> (B, D)
        x = x.flatten(2).transpose(1, 2)  # (B, h w, C)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.position_embed.to(x.dtype)
        q, k, v = self.query(x[:, :1]), self.key(x), self.value(x)
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v)  # (B, H, 1, d)
        return self.out(y.flatten(1))


class ModifiedResNet(nn.Module):
    """CLIP's ResNet: a stem of three convolutions, and an attention pool at the end."""

    def __init__(self, cfg):
        super().__init__()
        width, half = cfg.vision_width, cfg.vision_width // 2
        self.grad_checkpointing = False
        self.stem = nn.Sequential()
        for channels_in, channels, stride in ((3, half, 2), (half, half, 1), (half, width, 1)):
            conv = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
            self.stem.append(nn.Sequential(conv, BatchNorm2d(channels), nn.ReLU()))
        self.stem.append(nn.AvgPool2d(2))
        self.blocks, channels_in = nn.ModuleList(), width
        for group, count in enumerate(cfg.vision_layers):
            for i in range(count):
                stride = 2 if group > 0 and i == 0 else 1
                self.blocks.append(Bottleneck(channels_in, width * 2**group, stride))
                channels_in = 4 * width * 2**group
        self.attention_pool = AttentionPool(channels_in, cfg)

    def forward(self, pixels):  # (B, 3, R, R), normalized -> (B, D), not yet of unit length
        x = pixels.contiguous(memory_format=torch.channels_last)  # for faster convolutions
        for block in [self.stem, *self.blocks]:
            x = run_block(block, x, checkpointed=self.grad_checkpointing)
        return self.attention_pool(x)  # of x (B, 32 C, R / 32, R / 32)


class BertBlock(nn.Module):
    """Post-norm transformer layer: norm(x + attention(x)), then norm(x + mlp(x))."""

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.attention = Attention(width, heads, dropout)
        self.norm1 = nn.LayerNorm(width, eps=1e-12)
        self.mlp = MLP(width, quick=False)
        self.norm2 = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, layout, cls_only=False):  # (K, C) -> (K, C); cls_only: (B, C)
        y = self.dropout(self.attention(x, layout, cls_only))
        x = self.norm1((layout.pad(x)[:, 0] if cls_only else x) + y)
        return self.norm2(x + self.dropout(self.mlp(x)))


class BertEncoder(nn.Module):
    """BERT without pooler and heads; returns the last state of [CLS] (paper, section 3.1)."""

    def __init__(self, cfg):
        super().__init__()
        C, H, dropout, n = cfg.text_width, cfg.text_heads, cfg.text_dropout, cfg.context_length
        if not 2 < n <= cfg.text_positions:
            raise ValueError(f"a context length of {n} does not fit {cfg.text_positions} positions")
        self.grad_checkpointing = False
        self.word_embed = nn.Embedding(cfg.vocab_size, C)
        self.position_embed = nn.Embedding(cfg.text_positions, C)
        self.type_embed = nn.Embedding(2, C)  # BERT's sentences A and B; a text is A, row 0
        self.norm = nn.LayerNorm(C, eps=1e-12)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(BertBlock(C, H, dropout) for _ in range(cfg.text_layers))
        for name, p in self.named_parameters():  # as in google-research/bert
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, ids):
        """ids: (B, L) int64, 0 = [PAD] at the end, best on the CPU -> states of [CLS], (B, C)."""
        real = ids != 0
        real[:, 0] = True  # also of a text without tokens
        L = int(real.sum(dim=1).max())  # of the longest text; waits if ids are on a GPU
        rows = real[:, :L].flatten().nonzero()[:, 0]  # (K,)
        device = self.word_embed.weight.device
        ids, real, rows = (to_device(x, device) for x in (ids[:, :L], real[:, :L], rows))
        x = self.word_embed(ids.flatten()[rows]) + self.position_embed(rows % L)  # (K, C)
        x = self.dropout(self.norm(x + self.type_embed.weight[0]))
        layout = Layout(len(ids), L, real, rows)
        for block in self.blocks:
            last = block is self.blocks[-1]
            x = run_block(block, x, layout, last, checkpointed=self.grad_checkpointing)
        return x


class CLIP(nn.Module):
    """Both towers, the projection of text, and logit_scale, the log of the inverse temperature."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.vision_frozen = False
        vit = isinstance(cfg.vision_layers, int)
        self.vision = VisionTransformer(cfg) if vit else ModifiedResNet(cfg)
        self.text = BertEncoder(cfg)
        self.text_projection = nn.Parameter(torch.empty(cfg.text_width, cfg.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.text_projection, std=cfg.text_width**-0.5)

    def encode_image(self, pixels):
        """pixels: (B, 3, R, R) float, normalized -> unit vectors (B, D), float32 or float64."""
        parts = [pixels]
        if pixels.device.type == "cpu" and not (self.vision.training or torch.is_grad_enabled()):
            parts = pixels.split(16)  # faster: their activations stay in the caches of a CPU
        x = torch.cat([self.vision(part) for part in parts])
        return F.normalize(at_least_float32(x), dim=-1)

    def encode_text(self, ids):
        """ids: (B, L) int64, 0 = [PAD] at the end -> unit vectors (B, D), float32 or float64."""
        return F.normalize(at_least_float32(self.text(ids) @ self.text_projection), dim=-1)

    def forward(self, pixels, ids):  # -> (B, D), (B, D), ()
        return self.encode_image(pixels), self.encode_text(ids), self.logit_scale.exp()

    def freeze_vision(self):
        """Stage 1 (paper, section 3.2): the vision tower stays as it is, in evaluation mode."""
        self.vision_frozen = True
        self.vision.requires_grad_(False)
        return self.train(self.training)

    def train(self, mode=True):
        super().train(mode)
        if self.vision_frozen:
            self.vision.eval()
        return self

    def set_grad_checkpointing(self, on=True):  # less memory, more computation: see run_block
        self.vision.grad_checkpointing = self.text.grad_checkpointing = on

    def compile_vision(self, backend="inductor"):
        """torch.compile all blocks of a ViT but the last (cls_only). ValueError for a ResNet."""
        if isinstance(self.cfg.vision_layers, tuple):
            raise ValueError("it is for ViTs; the blocks of a ResNet all differ")
        for block in self.vision.blocks[:-1]:
            block.compile(backend=backend)

    @torch.no_grad()
    def clamp_logit_scale(self):
        """1 <= exp(logit_scale) <= 100; above 100 training is unstable (CLIP, section 2.5)."""
        self.logit_scale.clamp_(0, math.log(100))
