"""What is minimised: the symmetric contrastive loss over the global batch (paper, section 3.1; CLIP, arXiv 2103.00020, figure 3).

    N pairs over all processes; row i holds picture i and caption i.

    symbol   variable       shape     meaning
    I, T     image_embed    (N, D)    unit vectors
    s        scale          ()        exp(logit_scale), the inverse temperature
    S        logits         (N, N)    s I Tᵀ
    Y        truth          (N, N)    1 where pairs i and j have the same picture or the same caption, else 0; without repeats in the batch, the identity.
                                      (A caption that describes picture i but stands beside another of its pictures in the batch counts as 0.)

    loss = 1/2N Σ_i  -Σ_j Yr_ij log softmax_j(S_ij)   picture -> caption, Yr = rows of Y divided by their sums
         + 1/2N Σ_j  -Σ_i Yc_ij log softmax_i(S_ij)   caption -> picture, Yc = columns of Y divided by their sums

On W processes each computes the rows and columns of its own B = N/W pairs against all N, so the processes' shares add up to the loss. Differentiating the sum
of shares gives the gradient of the one big loss, for the towers and for the temperature: parameter gradients are therefore SUMMED over processes, not averaged.
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F


class _Gather(torch.autograd.Function):
    """(B, D) on each process -> (N, D) on all. Every process uses every row, so a row's gradient is the sum over processes of what each sends back."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)                                               # sum over processes
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather(x):
    """Rows of all processes, in rank order, differentiable: (B, ...) -> (N, ...). Without torch.distributed, x itself."""
    return _Gather.apply(x) if dist.is_initialized() and dist.get_world_size() > 1 else x


def contrastive_loss(image_embed, text_embed, scale, image_ids=None, text_ids=None):
    """This process's share of the loss above; the shares of all processes sum to it.

    image_embed, text_embed (B, D) float32 unit vectors, the same B on every process; scale a scalar tensor, exp(logit_scale).
    image_ids, text_ids (B,) int64, both or neither: pairs that share a picture or a caption are positives of each other. Without them every pair is its own only match.
    """
    B = len(image_embed)
    all_image, all_text = gather(image_embed), gather(text_embed)               # (N, D)
    N = len(all_image)
    logits_image = scale * image_embed @ all_text.T                             # (B, N): rows of S
    logits_text = scale * text_embed @ all_image.T                              # (B, N): columns of S
    own = torch.arange(B, device=image_embed.device) + (dist.get_rank() * B if N > B else 0)
    same = own[:, None] == torch.arange(N, device=image_embed.device)           # (B, N): Y's own rows; Y is symmetric, so they serve as its own columns too
    if image_ids is not None:
        same = same | (image_ids[:, None] == gather(image_ids)) | (text_ids[:, None] == gather(text_ids))
    truth = same.to(logits_image.dtype)
    truth = truth / truth.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits_image, truth, reduction="sum") + F.cross_entropy(logits_text, truth, reduction="sum")) / (2 * N)
