"""The towers: their sizes; packing, checkpointing, freezing and several processes change no number.
(Against the published implementations: test_parity.py)"""
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import on_processes

from loss import contrastive_loss
from model import Attention, AttentionPool, CLIP, CONFIGS, Config, Layout, MLP

VIT = Config(embed_dim=32, image_size=32, vision_layers=2, vision_width=48, vision_heads=4, patch_size=8, text_layers=2, text_width=48, text_heads=4, vocab_size=200)
RESNET = dataclasses.replace(VIT, image_size=64, vision_layers=(2, 1, 1, 1), vision_width=8, vision_heads=4, patch_size=None)
BOTH = pytest.mark.parametrize("cfg", [VIT, RESNET], ids=["vit", "resnet"])
GENTLE = dict(text_dropout=0.0)


def batch(cfg, n=6, seed=0, length=9):
    g = torch.Generator().manual_seed(seed)
    pixels = torch.randn(n, 3, cfg.image_size, cfg.image_size, generator=g)
    ids = torch.randint(1, cfg.vocab_size, (n, length), generator=g)
    for row, keep in enumerate(torch.randint(3, length + 1, (n,), generator=g)):
        ids[row, keep:] = 0
    return pixels, ids


def build(cfg, seed=0):
    torch.manual_seed(seed)
    model = CLIP(cfg)
    for name, p in model.named_parameters():                                    # residual branches start at gain 0 and biases at 0: wake all of them up
        if p.ndim == 1 and p.numel() > 1:
            p.data += 0.1 * torch.randn_like(p)
    return model


# Chinese-CLIP's parameter counts without BERT's pooler.
@pytest.mark.parametrize("name, parameters", [("rn50", 76_989_537), ("vit-b-32", 189_919_489), ("vit-b-16", 188_262_913), ("vit-l-14", 406_233_089),
                                              ("vit-l-14-336", 406_560_769), ("vit-h-14", 957_598_209)])
def test_released_sizes(name, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in CLIP(CONFIGS[name]).parameters()) == parameters


def test_tiny_is_tiny():
    assert 2e6 < sum(p.numel() for p in CLIP(CONFIGS["tiny"]).parameters()) < 5e6


@BOTH
def test_embeddings_are_unit_vectors_and_padding_changes_nothing(cfg):
    model, (pixels, ids) = build(cfg).eval(), batch(cfg)
    image_embed, text_embed, scale = model(pixels, ids)
    assert image_embed.shape == text_embed.shape == (6, cfg.embed_dim)
    torch.testing.assert_close(image_embed.norm(dim=1), torch.ones(6))
    torch.testing.assert_close(scale.item(), 1 / 0.07)
    torch.testing.assert_close(model.encode_text(F.pad(ids, (0, 7))), text_embed, rtol=1e-5, atol=1e-6)


def written_out(attention, x, lengths):
    """Attention as the paper writes it, one sequence after the other: x (K, C) -> (K, C)."""
    C, H, rows = x.shape[1], attention.heads, []
    for part in x.split(lengths):
        q, k, v = (t.unflatten(1, (H, -1)).transpose(0, 1) for t in attention.qkv(part).split(C, dim=1))  # (H, l, d)
        y = (q @ k.transpose(1, 2) / math.sqrt(C / H)).softmax(dim=-1) @ v
        rows.append(y.transpose(0, 1).flatten(1))
    return attention.out(torch.cat(rows))


@pytest.mark.parametrize("lengths", [[7, 7, 7], [3, 9, 1, 4, 9]], ids=["images", "texts"])
def test_attention_equals_the_written_out_softmax(lengths):
    """Also its gradients, without padding and with it."""
    torch.manual_seed(0)
    layout = Layout(len(lengths), max(lengths))
    if min(lengths) < max(lengths):
        real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        layout = Layout(*real.shape, real, real.flatten().nonzero()[:, 0])
    attention, x = Attention(48, 4), torch.randn(sum(lengths), 48, requires_grad=True)
    results = []
    for y in (attention(x, layout), written_out(attention, x, lengths)):
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *attention.parameters()])])
    for ours, plain in zip(*results):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    firsts = [sum(lengths[:b]) for b in range(len(lengths))]
    torch.testing.assert_close(attention(x, layout, cls_only=True), results[1][0][firsts], rtol=1e-5, atol=1e-5)


def test_captions_of_a_batch_do_not_see_each_other():
    model, (_, ids) = build(VIT).eval(), batch(VIT, n=11)
    one_by_one = torch.cat([model.encode_text(row[None, : (row != 0).sum()]) for row in ids])
    torch.testing.assert_close(model.encode_text(ids), one_by_one, rtol=1e-5, atol=1e-6)


def test_a_text_without_tokens_disturbs_no_other():
    model, (_, ids) = build(VIT).eval(), batch(VIT)
    expected = model.encode_text(ids)
    ids = torch.cat([ids[:3], torch.zeros_like(ids[:1]), ids[3:]])
    embed = model.encode_text(ids)
    assert embed.isfinite().all()
    torch.testing.assert_close(embed[[0, 1, 2, 4, 5, 6]], expected, rtol=1e-5, atol=1e-6)
    assert model.encode_text(torch.zeros(2, 9, dtype=torch.long)).isfinite().all()


@pytest.mark.parametrize("tower, tokens", [("vision", 6 * 17), ("text", 33)])
def test_the_last_layer_computes_the_class_token_alone_and_none_computes_padding(tower, tokens):
    model, (pixels, ids) = build(VIT), batch(VIT)
    seen = []
    for block in getattr(model, tower).blocks:
        block.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    model(pixels, ids)
    assert seen == [tokens, 6] and (tower == "vision" or tokens == (ids != 0).sum())


@pytest.mark.parametrize("quick", [True, False])
def test_the_wide_layer_of_an_mlp_is_kept_once(quick):
    """The backward pass keeps the wide layer before its activation (written plainly, after it too). Output and gradients are equal."""
    torch.manual_seed(0)
    mlp, x = MLP(16, quick), torch.randn(5, 16, requires_grad=True)
    activation = (lambda h: h * torch.sigmoid(1.702 * h)) if quick else F.gelu
    kept, results = [], []
    for forward in (mlp, lambda x: mlp[2](activation(mlp[0](x)))):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
            y = forward(x)
        count = kept.count((5, 64))
        kept.clear()
        results.append((count, y, *torch.autograd.grad(y.square().sum(), [x, *mlp.parameters()])))
    assert results[0][0] <= 1 < results[1][0]
    for ours, plain in zip(results[0][1:], results[1][1:]):
        torch.testing.assert_close(ours, plain)


def test_attention_pool_equals_the_written_out_softmax():
    torch.manual_seed(0)
    pool, x = AttentionPool(16, RESNET), torch.randn(3, 16, 2, 2)
    torch.nn.init.normal_(pool.position_embed)
    tokens = x.flatten(2).transpose(1, 2)
    tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1) + pool.position_embed
    q, k, v = (m(t).reshape(3, -1, 4, 4).transpose(1, 2) for m, t in ((pool.query, tokens[:, :1]), (pool.key, tokens), (pool.value, tokens)))
    y = ((q @ k.transpose(2, 3) / 2).softmax(-1) @ v).transpose(1, 2).reshape(3, 16)
    torch.testing.assert_close(pool(x), pool.out(y), rtol=1e-5, atol=1e-6)


@BOTH
def test_checkpointed_gradients_and_statistics_equal_plain_ones(cfg):
    results = []
    for checkpointed in (False, True):
        model, (pixels, ids) = build(cfg).train(), batch(cfg)
        model.set_grad_checkpointing(checkpointed)
        torch.manual_seed(1)                                                    # dropout stays on: the second run of a block must draw the same
        contrastive_loss(*model(pixels, ids)).backward()
        results.append({n: p.grad for n, p in model.named_parameters()} | dict(model.named_buffers()))
    for name, plain in results[0].items():
        if plain is not None:
            torch.testing.assert_close(results[1][name], plain, rtol=1e-5, atol=1e-7, msg=name)


@BOTH
def test_checkpointing_runs_blocks_again(cfg):
    model, (pixels, ids) = build(cfg).train(), batch(cfg)
    calls, counts = [], []
    for block in [*model.vision.blocks, *model.text.blocks]:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    for checkpointed in (False, True):
        calls.clear()
        model.set_grad_checkpointing(checkpointed)
        contrastive_loss(*model(pixels, ids)).backward()
        counts.append(len(calls))
    assert counts[1] == 2 * counts[0]


@BOTH
def test_frozen_vision_tower_has_no_graph_and_stays_in_evaluation_mode(cfg):
    model, (pixels, ids) = build(cfg).freeze_vision().train(), batch(cfg)
    assert not model.encode_image(pixels).requires_grad and model.encode_text(ids).requires_grad
    assert not any(m.training for m in model.vision.modules()) and model.text.training


def test_compiled_blocks_compute_the_same_in_few_compilations():
    """Two shapes, with a graph and without: a few compilations serve three blocks (traced; the compiler itself is torch's)."""
    cfg, compiled = dataclasses.replace(VIT, vision_layers=4), []
    plain, model = build(cfg), build(cfg)
    model.compile_vision(lambda graph, _: compiled.append(1) or graph.forward)
    for n in (6, 4):
        pixels = batch(cfg, n=n)[0]
        with torch.no_grad():
            torch.testing.assert_close(model.encode_image(pixels), plain.encode_image(pixels), rtol=1e-5, atol=1e-6)
        for m in (plain, model):
            for p in m.parameters():
                p.grad = torch.zeros_like(p)                                    # as in training
            m.encode_image(pixels).square()[:, 0].sum().backward()
        for a, b in zip(model.vision.parameters(), plain.vision.parameters()):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
    assert 0 < len(compiled) <= 8                                               # torch gives up after eight


def test_logit_scale_is_clamped_to_one_and_a_hundred():
    model = build(VIT)
    for value, clamped in ((9.0, math.log(100)), (-3.0, 0.0), (2.0, 2.0)):
        model.logit_scale.data.fill_(value)
        model.clamp_logit_scale()
        assert model.logit_scale.item() == pytest.approx(clamped)


def test_initial_deviations_are_those_of_clip_and_bert():
    torch.manual_seed(0)
    vit = CLIP(dataclasses.replace(VIT, vision_width=256, text_width=256))
    block = vit.vision.blocks[0]
    for tensor, std in ((vit.vision.position_embed, 256**-0.5), (block.attention.qkv.weight, 256**-0.5), (block.attention.out.weight, 256**-0.5 * 4**-0.5),
                        (block.mlp[0].weight, 512**-0.5), (block.mlp[2].weight, 256**-0.5 * 4**-0.5), (vit.text.blocks[0].mlp[0].weight, 0.02),
                        (vit.text.word_embed.weight, 0.02), (vit.text_projection, 256**-0.5)):
        assert tensor.std().item() == pytest.approx(std, rel=0.1)
    assert all((b.bn3.weight == 0).all() for b in CLIP(RESNET).vision.blocks)


# ---------------------------------------------------------------------------------------------------------------- several processes


def _gradients(rank, world, cfg, dtype):
    model = build(dataclasses.replace(cfg, **GENTLE)).to(dtype).train()
    pixels, ids = (x.chunk(world)[rank] for x in batch(cfg))
    loss = contrastive_loss(*model(pixels.to(dtype), ids))
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, dict(model.named_buffers())


CASES = [(VIT, torch.float32, 1e-6), (RESNET, torch.float64, 1e-13)]  # in fp32 one ResNet alone is 7e-6 away from the truth


def _all_gradients(rank, world):
    return [_gradients(rank, world, cfg, dtype) for cfg, dtype, _ in CASES]


def test_gradients_of_two_processes_sum_to_those_of_one(tmp_path):
    """Magnitude included, relative to each tower's gradient; loss and BatchNorm statistics too."""
    results = zip(CASES, _all_gradients(0, 1), *on_processes(_all_gradients, 2, tmp_path))
    for (_, _, tolerance), (whole, statistics), *halves in results:
        for part in ("vision.", "text.", "text_projection", "logit_scale", "loss"):
            names = [n for n in whole if n.startswith(part)]
            joined = torch.cat([whole[n].flatten() for n in names])
            summed = torch.cat([(halves[0][0][n] + halves[1][0][n]).flatten() for n in names])
            difference = ((summed - joined).norm() / joined.norm()).item()
            assert difference <= tolerance, (part, difference)
        for name, value in statistics.items():
            for _, other in halves:
                torch.testing.assert_close(other[name], value, rtol=1e-6, atol=1e-9)
