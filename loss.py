"""What is minimised: the symmetric contrastive loss over the global batch (paper, section 3.1; CLIP, arXiv 2103.00020, figure 3).

    N pairs over all processes; row i holds image i and caption i.

    symbol   variable       shape     meaning
    I, T     image, text    (N, D)    embeddings, unit vectors
    s        scale          ()        exp(logit_scale), the inverse temperature
    S        S              (N, N)    the logits, s I Tᵀ
    Y        truth          (N, N)    1 where caption j describes image i, else 0. Kept as the rows (E,) and the columns (E,) of its E
                                      ones; without repeats in the batch: the diagonal. (The same relation is `positives` in data.py,
                                      by captions of a split, and `correct` in evaluate.py.) A image's own caption is always there.
    Yr, Yc   Yr, Yc         (N, N)    Y with its rows, or its columns, divided by their sums; kept as the values (E,) at those places
    r, c     r, c           (N,)      r_i = log Σ_j exp S_ij,  c_j = log Σ_i exp S_ij

    loss = 1/2N Σ_i ( r_i - Σ_j Yr_ij S_ij )          image -> its captions: cross-entropy of row i with Yr_i
         + 1/2N Σ_j ( c_j - Σ_i Yc_ij S_ij )          caption -> its images: cross-entropy of column j with Yc_j

    G = dloss/dS = 1/2N ( exp(S - r) + exp(S - c) - Yr - Yc )            (r subtracted from each row, c from each column)
    dI = s G T      dT = s Gᵀ I      ds = Σ_ij G_ij S_ij / s = Σ_i I_i·dI_i / s

On W processes each owns B = N/W pairs: their rows of S, and their columns. `contrastive_loss` is the loss as one would write it, for
autograd: it holds whole matrices (at the paper's N = 12,800 each has 0.66 GB, and autograd keeps several), and its backward pass sends
gradients between processes. `tiled_loss` computes the same loss and, by the formulas for G, dI, dT and ds, its gradient: S and G exist a
few rows at a time, and processes exchange nothing but the embeddings, and then r and c. A test compares the two to 1e-12.

Each returns its process's share of the loss: the shares add up to the loss, and so do the gradients that processes get for the shared
weights and for s. Parameter gradients are therefore SUMMED over processes, not averaged.
"""
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F


def matches(image_keys, text_keys):
    """Which captions of the batch describe which images -> truth: rows (E,) and columns (E,) of the ones of Y, sorted by row.

    text_keys (N,) int64, at least 0: the sentence of each caption. image_keys (N, M) int64: all the sentences that describe each image,
    filled up with -1, those that are not in the batch among them. Y_ij = 1 where text_keys[j] is in image_keys[i]: so a caption is right
    for every image that it describes, whichever it stands beside. No (N, N) array is made: memory of the order of E + NM numbers.

    image_keys [[7, 8], [9, -1], [7, 8]], text_keys [7, 9, 8] -> rows [0, 0, 1, 2, 2], columns [0, 2, 1, 0, 2]
    """
    N, M = image_keys.shape
    keys, order = text_keys.sort()
    wanted = image_keys.flatten()                                               # (NM,): each may be found several times among the keys
    first, end = torch.searchsorted(keys, wanted), torch.searchsorted(keys, wanted, right=True)
    count = end - first
    found = torch.arange(N * M).repeat_interleave(count)                        # (E',): which of `wanted`
    nth = torch.arange(len(found)) - (count.cumsum(0) - count)[found]           # (E',): 0 for its first occurrence, 1 for its second, …
    cells = torch.unique(found // M * N + order[first[found] + nth])            # i N + j, each once, sorted
    return cells // N, cells % N


def contrastive_loss(image_embed, text_embed, scale, truth=None):
    """The loss as the reader knows it, differentiable; -> this process's share.

    image_embed, text_embed (B, D) unit vectors, the same B on every process; scale a scalar tensor, exp(logit_scale); truth as `matches`
    gives it, of the whole batch in rank order, or None: every pair is its own only match.
    """
    image, text = gather(image_embed), gather(text_embed)                       # (N, D)
    N, own = len(image), own_rows(image_embed)
    Y = image.new_zeros(N, N)
    Y[_ones(truth, N)] = 1
    to_captions = F.cross_entropy(scale * image_embed @ text.T, (Y / Y.sum(1, keepdim=True))[own], reduction="sum")
    to_images = F.cross_entropy(scale * text_embed @ image.T, (Y / Y.sum(0, keepdim=True)).T[own], reduction="sum")
    return (to_captions + to_images) / (2 * N)


@torch.no_grad()
def tiled_loss(image_embed, text_embed, scale, truth=None, tile=2**21):
    """The same share of the loss, and the gradient of the whole loss; takes the same arguments
    -> loss (), d_image (B, D), d_text (B, D), d_scale ().

    d_image and d_text are those of this process's pairs; d_scale is its share. S exists in stripes of about `tile` numbers, of which two
    are held at a time.
    """
    image, text = gather(image_embed), gather(text_embed)                       # (N, D)
    N = len(image)
    rows, columns = _ones(truth, N)                                             # (E,) each, on the CPU, sorted by row
    by_column = columns.argsort(stable=True)                                    # the same ones, sorted by column
    Yr = 1 / torch.bincount(rows)[rows].to(image.dtype)                         # (E,): 1 / Σ_j Y_ij at the ones of Y
    Yc = 1 / torch.bincount(columns)[columns].to(image.dtype)                   # (E,): 1 / Σ_i Y_ij
    images = _direction(image_embed, text, scale, rows, columns, tile)        # own rows of S: images look at captions
    captions = _direction(text_embed, image, scale, columns[by_column], rows[by_column], tile)      # own columns of S, as the rows of Sᵀ

    r, to_captions = _log_sums(images, _to_device(Yr, image.device))
    c, to_images = _log_sums(captions, _to_device(Yc[by_column], image.device))
    all_r, all_c = gather(torch.stack([r, c], dim=1)).unbind(1)                 # (N,) each
    d_image = _gradient(images, _to_device(Yr + Yc, image.device), r, all_c)                      # s G T
    d_text = _gradient(captions, _to_device((Yr + Yc)[by_column], image.device), c, all_r)          # s Gᵀ I
    # Σ_i I_i·dI_i / s, without a (B, D) product in memory
    d_scale = torch.bmm(image_embed[:, None], d_image[:, :, None]).sum() / scale
    return (to_captions + to_images) / (2 * N), d_image, d_text, d_scale


def _ones(truth, N):
    """-> rows (E,), columns (E,) of the ones of Y."""
    return truth if truth is not None else (torch.arange(N), torch.arange(N))


class _Direction(NamedTuple):
    """One direction of the loss: own rows of S = s own otherᵀ, and where the ones of Y lie in them. For captions that look at images this
    S is Sᵀ, and G is Gᵀ."""

    own: torch.Tensor                           # (B, D): these look …
    other: torch.Tensor                         # (N, D): … at those
    scale: torch.Tensor                         # s
    rows: torch.Tensor                          # (E,) of each one of Y, counted from the first own row, on the device
    columns: torch.Tensor                       # (E,)
    stripes: list                               # [(first row, end, a, b), …]: rows of S to hold at a time; ones a to b - 1 of Y lie there


def _direction(own, other, scale, rows, columns, tile):
    """rows and columns (E,): the ones of Y, sorted by row, on the CPU, where they are cut into the stripes."""
    height, first = max(1, tile // len(other)), own_rows(own).start
    starts = list(range(0, len(own), height)) + [len(own)]
    bounds = torch.searchsorted(rows, torch.tensor(starts) + first).tolist()
    stripes = list(zip(starts, starts[1:], bounds, bounds[1:]))
    return _Direction(own, other, scale, _to_device(rows - first, own.device), _to_device(columns, own.device), stripes)


def _log_sums(direction, weights):
    """-> log Σ exp of each own row of S (B,), and Σ (log-sum - Σ Y S) over them: the cross-entropies. weights (E,): Yr (or Yc)."""
    own, other, scale, rows, columns, stripes = direction
    log_sums, loss = own.new_empty(len(own)), own.new_zeros(())
    for start, stop, a, b in stripes:
        S = (scale * own[start:stop]) @ other.T                                 # (height, N)
        log_sums[start:stop] = S.logsumexp(dim=1)                               # r (or c)
        loss += log_sums[start:stop].sum() - (weights[a:b] * S[rows[a:b] - start, columns[a:b]]).sum()
        del S                                                                   # before the next stripe is made
    return log_sums, loss


def _gradient(direction, weights, own_log_sums, other_log_sums):
    """-> s G @ other (B, D): own rows of G, as many as a stripe holds at a time, times the other embeddings. weights (E,): Yr + Yc."""
    own, other, scale, rows, columns, stripes = direction
    gradient = torch.empty_like(own)
    for start, stop, a, b in stripes:
        S = (scale * own[start:stop]) @ other.T                                 # (height, N)
        G = (S - own_log_sums[start:stop, None]).exp_()                         # exp(S - r)
        G += S.sub_(other_log_sums).exp_()                                      # exp(S - c), in the place of S
        G[rows[a:b] - start, columns[a:b]] -= weights[a:b]                      # Yr + Yc
        torch.mm(G, other, out=gradient[start:stop])
        del S, G
    return gradient.mul_(scale / (2 * len(other)))


def _to_device(x, device):
    """A tensor of the CPU -> device, without waiting for what the device is doing."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


# ---------------------------------------------------------------------------------------- between processes


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def own_rows(x):
    """Which rows of the global batch this process's are: those of rank 0 come first."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return slice(rank * len(x), (rank + 1) * len(x))


class _Gather(torch.autograd.Function):
    """(B, …) on each process -> (N, …) on all. Every process uses every row, so a row's gradient is the sum over processes of what each
    sends back."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)                                               # sum over processes
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x):
    """Rows of all processes, in rank order, differentiable: (B, …) -> (N, …). Without torch.distributed, x itself."""
    return _Gather.apply(x) if world_size() > 1 else x
