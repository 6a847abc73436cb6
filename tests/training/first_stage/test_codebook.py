import torch

import triptych as tp
from triptych.evaluation.reconstruction import perplexity
from triptych.training.configs.first_stage import CodebookConfig
from triptych.training.first_stage.codebook import Codebook


def vq(entries=6):
    torch.manual_seed(0)
    return tp.create(
        "vq-f4",
        base_channels=8,
        norm_groups=4,
        channel_multipliers=(1,),
        latent_channels=3,
        codebook_size=entries,
    )


def test_the_moving_average_of_the_codebook_is_its_closed_form():
    """e_k after n steps = sum of decayed sums of latents over the sum of decayed counts (Appendix A.1)."""
    net, d = vq(), 0.8
    book = Codebook(net, CodebookConfig(update="ema", decay=d, revive_below=0.0))
    entries, counts = net.codebook.weight.detach().clone().double(), torch.ones(6).double()
    sums = entries.clone()
    for step in range(5):
        z = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(step))
        book.loss(net, z, train=True)
        flat = z.movedim(1, -1).reshape(-1, 3).double()
        nearest = ((flat[:, None] - entries) ** 2).sum(-1).argmin(1)
        for k in range(6):
            counts[k] = d * counts[k] + (1 - d) * (nearest == k).sum()
            sums[k] = d * sums[k] + (1 - d) * flat[nearest == k].sum(0)
        smooth = (counts + 1e-5) / (counts.sum() + 6e-5) * counts.sum()
        entries = sums / smooth[:, None]
        torch.testing.assert_close(net.codebook.weight.double(), entries, atol=1e-5, rtol=1e-5)
    assert not net.codebook.weight.requires_grad


def test_the_loss_pulls_entries_to_latents_and_latents_to_entries():
    net = vq()
    book = Codebook(net, CodebookConfig(commitment=0.25, revive_below=0.0))
    z = torch.randn(2, 3, 4, 4, requires_grad=True)
    out, loss, logs = book.loss(net, z, train=True)
    entries = net.quantize(z)[0].detach()
    torch.testing.assert_close(out, entries)
    torch.testing.assert_close(loss, 1.25 * (z - entries).square().mean())
    loss.backward(retain_graph=True)
    torch.testing.assert_close(z.grad, 0.25 * 2 * (z - entries).detach() / z.numel())
    torch.testing.assert_close(
        net.codebook.weight.grad.sum(0), (2 * (entries - z) / z.numel()).sum((0, 2, 3)).detach()
    )
    z.grad = None
    out.sum().backward()
    torch.testing.assert_close(z.grad, torch.ones_like(z))  # straight through
    assert 0 < logs["codes_used"] <= 1


def test_unused_entries_are_reset_to_latents():
    net = vq()
    with torch.no_grad():
        net.codebook.weight[3:] = 100.0
    book = Codebook(net, CodebookConfig(decay=0.5, revive_below=0.1))
    z = torch.randn(2, 3, 4, 4)
    for _ in range(4):
        assert book.loss(net, z, train=True)[2]["codes_revived"] in (0.0, 0.5)
    flat = z.movedim(1, -1).reshape(-1, 3)
    for entry in net.codebook.weight[3:]:
        assert (flat == entry).all(1).any()
    book = Codebook(net, CodebookConfig(revive_below=0.0, decay=0.0))
    with torch.no_grad():
        net.codebook.weight[3:] = 100.0
    book.loss(net, z, train=True)
    assert (net.codebook.weight[3:] == 100).all()


def test_perplexity_is_the_number_of_entries_used_evenly():
    torch.testing.assert_close(perplexity(torch.tensor([4.0, 4.0, 4.0, 0.0])), torch.tensor(3.0))
    torch.testing.assert_close(perplexity(torch.tensor([9.0, 0.0])), torch.tensor(1.0))


def test_nan_latents_do_not_change_the_codebook():
    """The step is skipped, and training continues with finite entries."""
    for method in ("ema", "gradient"):
        net = vq()
        book = Codebook(net, CodebookConfig(update=method, revive_below=0.9, decay=0.5))
        z = torch.randn(2, 3, 4, 4)
        z[0, :, 0, 0] = float("nan")
        z[1, 0, 1, 1] = float("inf")
        _, loss, _ = book.loss(net, z, train=True)
        assert not loss.isfinite()
        for tensor in (net.codebook.weight, book.sums, book.counts):
            assert tensor.isfinite().all()
