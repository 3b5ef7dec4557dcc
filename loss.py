"""The symmetric contrastive loss over the global batch (paper, section 3.1; CLIP, arXiv 2103.00020,
figure 3).

    N pairs over all processes; row i holds image i and text i.

    symbol   variable       shape     meaning
    I, T     image, text    (N, D)    embeddings, unit vectors
    s        scale          ()        exp(logit_scale), the inverse temperature
    S        S              (N, N)    logits, s I Tᵀ
    Y        Y              (N, N)    1 where text j describes image i (E times), else 0
    Yr, Yc   Yr, Yc         (N, N)    Y with its rows, or its columns, divided by their sums
    r, c     r, c           (N,)      r_i = log Σ_j exp S_ij,  c_j = log Σ_i exp S_ij

    loss = 1/2N Σ_i ( r_i - Σ_j Yr_ij S_ij )          image -> text: cross-entropy with Yr
         + 1/2N Σ_j ( c_j - Σ_i Yc_ij S_ij )          text -> image: with Yc, by columns

    G = dloss/dS = 1/2N ( exp(S - r) + exp(S - c) - Yr - Yc )    (r by rows, c by columns)
    dI = s G T      dT = s Gᵀ I      ds = Σ_ij G_ij S_ij / s = Σ_i I_i·dI_i / s

Each of W processes has B = N/W pairs: their rows and their columns of S. `contrastive_loss` is the
loss in the plain way, for autograd. It holds whole matrices (0.66 GB each at the paper's
N = 12,800). `tiled_loss` computes the same loss and its gradient by the formulas above, with a few
rows of S and G at a time. A test compares them in float64, to 1e-12.

Both return the share of one process: the shares of the loss add up to the loss, and those of
parameter gradients to the gradient. So parameter gradients are SUMMED over processes.
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F


def matches(image_keys, text_keys):
    """Which texts of the batch describe which images -> rows (E,), columns (E,) of the ones of Y.

    text_keys: (N,) int64, a number >= 0 that equal sentences share. image_keys: (N, M) int64, those
    of all sentences that describe an image, also outside the batch, filled up with -1. Equal to

        (image_keys[:, :, None] == text_keys).any(dim=1).nonzero(as_tuple=True)

    without the (N, M, N) array. All tensors are on the CPU; sorted by row, then by column.
    """
    N, M = image_keys.shape
    keys, order = text_keys.sort()
    wanted = image_keys.flatten()  # (N M,)
    first = torch.searchsorted(keys, wanted)  # where each wanted key begins in `keys`
    count = torch.searchsorted(keys, wanted, right=True) - first  # how often it is there
    k = torch.arange(N * M).repeat_interleave(count)  # a wanted key, once for each of its texts
    nth = torch.arange(len(k)) - (count.cumsum(0) - count)[k]  # which of its texts, from 0
    cells = torch.unique(k // M * N + order[first[k] + nth])  # i N + j, each once, sorted
    return cells // N, cells % N


def contrastive_loss(image_embed, text_embed, scale, truth=None):
    """This process's share of the loss, differentiable.

    image_embed, text_embed: (B, D) unit vectors, the same B on every process, in rank
    order. scale: (), exp(logit_scale). truth: what `matches` returns for the global batch; None if
    each image's own text is its only match.
    """
    image, text = gather(image_embed), gather(text_embed)  # (N, D)
    N, own = len(image), own_rows(image_embed)
    Y = image.new_zeros(N, N)
    Y[_diagonal(N) if truth is None else truth] = 1
    Yr, Yc = Y / Y.sum(1, keepdim=True), Y / Y.sum(0, keepdim=True)
    to_text = F.cross_entropy(scale * image_embed @ text.T, Yr[own], reduction="sum")
    to_image = F.cross_entropy(scale * text_embed @ image.T, Yc.T[own], reduction="sum")
    return (to_text + to_image) / (2 * N)


@torch.no_grad()
def tiled_loss(image_embed, text_embed, scale, truth=None, tile=2**21):
    """The same loss with its gradient -> loss (), d_image (B, D), d_text (B, D), d_scale ().

    The arguments are those of contrastive_loss. d_image and d_text are the gradient of the global
    loss at this process's pairs; loss and d_scale are its shares. Memory: two
    stripes of S, of about `tile` numbers each.
    """
    image, text = gather(image_embed), gather(text_embed)  # (N, D)
    rows, columns = _diagonal(len(image)) if truth is None else truth  # (E,) each
    order = columns.argsort(stable=True)  # sorts the ones by column: Yᵀ by row
    by_image = _Direction(image_embed, text, scale, rows, columns, tile)
    by_text = _Direction(text_embed, image, scale, columns[order], rows[order], tile)

    r, to_text = by_image.log_sums()
    c, to_image = by_text.log_sums()
    all_r, all_c = gather(torch.stack([r, c], dim=1)).unbind(1)  # (N,) each
    d_image = by_image.gradient(r, all_c)
    d_text = by_text.gradient(c, all_r)
    # Σ_i I_i·dI_i / s, without a (B, D) product in memory
    d_scale = torch.bmm(image_embed[:, None], d_image[:, :, None]).sum() / scale
    return (to_text + to_image) / (2 * len(image)), d_image, d_text, d_scale


def _diagonal(N):  # rows and columns of the ones of Y without `truth`
    return torch.arange(N), torch.arange(N)


class _Direction:
    """The term image -> text of the loss. In the other, I and T, r and c, Yr and Yc change places,
    and S, Y, G are transposed.

    own: (B, D), this process's I. other: (N, D), all T. rows, columns: (E,), the ones of Y, on the
    CPU, sorted by row."""

    def __init__(self, own, other, scale, rows, columns, tile):
        self.own, self.other, self.scale = own, other, scale
        height, first = max(1, tile // len(other)), own_rows(own).start  # first: own row 0
        edges = [*range(0, len(own), height), len(own)]  # between stripes, in rows, …
        ones = torch.searchsorted(rows, torch.tensor(edges) + first).tolist()  # … in ones of Y
        self.stripes = []  # (slice of own rows of S, slice of the ones of Y that lie in them)
        for start, stop, one, end in zip(edges, edges[1:], ones, ones[1:]):
            self.stripes.append((slice(start, stop), slice(one, end)))
        Yr = 1 / torch.bincount(rows)[rows].to(own.dtype)  # (E,), 1 / Σ_j Y_ij at the ones
        Yc = 1 / torch.bincount(columns)[columns].to(own.dtype)
        ready = []
        for x in (rows - first, columns, Yr, Yr + Yc):
            x = x.pin_memory() if own.is_cuda else x  # so that the CPU does not wait for the copy
            ready.append(x.to(own.device, non_blocking=True))
        self.rows, self.columns, self.Yr, self.Yr_and_Yc = ready

    def log_sums(self):
        """-> r (B,), and 2N times the term, Σ_i (r_i - Σ_j Yr_ij S_ij), ()."""
        r, loss = self.own.new_empty(len(self.own)), self.own.new_zeros(())
        for part, ones in self.stripes:
            S = (self.scale * self.own[part]) @ self.other.T  # (height, N)
            r[part] = S.logsumexp(dim=1)
            at_ones = S[self.rows[ones] - part.start, self.columns[ones]]
            loss += r[part].sum() - (self.Yr[ones] * at_ones).sum()
            del S  # before the next stripe is made
        return r, loss

    def gradient(self, r, c):
        """r: (B,), c: (N,) -> dI = s G T, (B, D)."""
        gradient = torch.empty_like(self.own)
        for part, ones in self.stripes:
            S = (self.scale * self.own[part]) @ self.other.T  # (height, N)
            G = (S - r[part, None]).exp_()  # 2N G
            G += S.sub_(c).exp_()
            G[self.rows[ones] - part.start, self.columns[ones]] -= self.Yr_and_Yc[ones]
            torch.mm(G, self.other, out=gradient[part])
            del S, G
        return gradient.mul_(self.scale / (2 * len(self.other)))


# ---- between processes


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def own_rows(x):
    """x: (B, ...) -> the slice of the global batch of this process; rank 0 has the first B."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return slice(rank * len(x), (rank + 1) * len(x))


class _Gather(torch.autograd.Function):
    """(B, ...) -> (N, ...). All processes use each row, so its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(world_size())[dist.get_rank()]


def gather(x):
    """(B, ...) of each process -> (N, ...), rank 0 first, differentiable. One process: x itself."""
    return _Gather.apply(x) if world_size() > 1 else x
