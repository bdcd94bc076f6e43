"""Image features learnt from the dataset's own images, without captions and without anything fetched.

Three kinds of local descriptor are taken at several scales: orientation histograms of gradients (texture and
shape), small patches with contrast removed (detail), and small patches of opponent colours (what things are made
of). For each, a mixture of normals is fitted to descriptors from a sample of the images, and an image becomes the
mean gradient of the mixture's log-likelihood over its descriptors: a Fisher vector. Each descriptor is counted in
its eight rotations and mirror images, so that a scene seen from above is the same scene from every side; a coarse
grid beside them keeps what is up and down. Principal components of everything, learnt on the sample, are the output.

Shapes: B = images; P = descriptors of an image; F = numbers in a descriptor; D = its whitened components; K = mixture
components; G = rotations and mirror images.

Source:
    Fisher vectors: Perronnin, Sanchez, Mensink (ECCV 2010), from the paper; the choice of blocks is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from nc_audit.encoders.weights import digest_of_encoder

SIZE = 128
DIMS = 512
NUM_SAMPLED = 3000  # images that the components are learnt from
NUM_DESCRIPTORS = 60_000  # per block, that the mixture is learnt from
NUM_ORIENTATIONS = 8
KMEANS_ROUNDS = 8
EM_ROUNDS = 12
LEAST_NATS = 45.0  # below the likeliest component's, that another's log-likelihood counts as, at most
MIN_VARIANCE = 0.05  # of whitened components, in units of their own
SPARE_DIMS = 64
POWER_ROUNDS = 4
MIN_SHARE = 1e-5  # of the largest variance: below are no components
BATCH = 32
VERSION = 1


@dataclass(frozen=True)
class Block:
    """One kind of local descriptor at one scale.

    Attributes:
        kind: `gradient`, `detail` or `colour`.
        size: side of the image, px, at this scale.
        cell: side of the cells that are averaged, px.
        cells: side of a descriptor, cells.
        stride: step between descriptors, cells; the grid must end at the far border, so that it survives mirroring.
        dims: D.
        components: K.
    """

    kind: str
    size: int
    cell: int
    cells: int
    stride: int
    dims: int
    components: int

    @property
    def name(self) -> str:
        """What the block's tensors are called."""
        return f"{self.kind}{self.size}"


BLOCKS = (
    Block("gradient", 128, 4, 4, 2, 64, 64),
    Block("gradient", 64, 4, 4, 1, 64, 64),
    Block("detail", 66, 1, 6, 3, 48, 64),
    Block("colour", 128, 4, 4, 2, 40, 64),
    Block("colour", 64, 4, 4, 1, 32, 64),
)
LAYOUT_CELLS = 4
LAYOUT_SHARE = 0.25  # of the variance that a block has


class Patches:
    """Learns a `PatchEncoder` from the distinct images."""

    spec = "patches"
    input_size = (SIZE, SIZE)

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def sample(self, num_images: int) -> list[int]:
        """Positions of at most 3,000 images, evenly spread over the canonical order."""
        count = min(num_images, NUM_SAMPLED)
        return [i * num_images // count for i in range(count)]

    def digest_for(self, fitted_on: str) -> str:
        """Digest of the encoder fitted on the images whose set has the digest `fitted_on`."""
        settings = {"blocks": BLOCKS, "size": SIZE, "dims": DIMS, "sampled": NUM_SAMPLED, "version": VERSION}
        return digest_of_encoder({"spec": self.spec, **settings, "seed": self.seed, "on": fitted_on}, {})

    def preprocess(self, image: Image.Image) -> Tensor:
        """One RGB image, the whole of it, as bytes [3, 128, 128]."""
        return _pixels(image)

    @torch.inference_mode()
    def learn(
        self, images: Tensor, progress: Callable[[int, int], None] | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """What the encoder will consist of, learnt from bytes [N, 3, 128, 128], any N from 1; their vectors [N, D].

        The vectors are those that the encoder makes of the same images, but for rounding. `progress` is called with
        images learnt from and N.
        """
        if progress:
            progress(0, len(images))
        generator = torch.Generator().manual_seed(self.seed)
        learnt: dict[str, Tensor] = {}
        for block in BLOCKS:
            learnt |= _fit_block(block, images, generator)
        parts: list[list[Tensor]] = []
        for part in images.split(BATCH):
            parts.append(_all_blocks(part, learnt))
            if progress:
                progress(min(BATCH * len(parts), len(images)), len(images))
        means, columns, scales = [], [], []
        products = torch.zeros(len(images), len(images), dtype=torch.float64)
        for position, of_batches in enumerate(zip(*parts, strict=True)):
            vectors = torch.cat(of_batches)
            means.append(vectors.mean(0))
            vectors -= means[-1]
            spread = vectors.square().sum(1).mean().sqrt().clamp_min(1e-6).item()
            scales.append(math.sqrt(LAYOUT_SHARE if position == len(BLOCKS) else 1.0) / spread)
            columns.append(vectors.mul_(scales[-1]))
            products += (vectors @ vectors.T).double()
        variance, leading = _leading(products, generator)
        back = (leading / variance.sqrt()).float()
        axes = [vectors.T @ back for vectors in columns]
        along = torch.stack([vectors @ ours for vectors, ours in zip(columns, axes, strict=True)]).sum(0)
        learnt["mean"] = torch.cat(means)
        learnt["axes"] = torch.cat([scale * ours for scale, ours in zip(scales, axes, strict=True)])
        return learnt, functional.normalize(along, dim=1)

    def encoder(self, learnt: dict[str, Tensor], fitted_on: str) -> PatchEncoder:
        """The encoder that consists of what was learnt."""
        return PatchEncoder(self.digest_for(fitted_on), learnt)


class PatchEncoder:
    """Images to unit vectors of at most 512 dimensions, the most varying first."""

    spec = "patches"
    input_size = (SIZE, SIZE)

    def __init__(self, digest: str, learnt: dict[str, Tensor]) -> None:
        self.digest = digest
        self.learnt = learnt
        self.dim = learnt["axes"].shape[1]

    def preprocess(self, image: Image.Image) -> Tensor:
        """One RGB image, the whole of it, as bytes [3, 128, 128]."""
        return _pixels(image)

    @torch.inference_mode()
    def encode(self, batch: Tensor) -> Tensor:
        """Bytes [B, 3, 128, 128] to unit vectors [B, D], float32."""
        mean, axes = self.learnt["mean"], self.learnt["axes"]
        rows = [(torch.cat(_all_blocks(part, self.learnt), 1) - mean) @ axes for part in batch.split(BATCH)]
        return functional.normalize(torch.cat(rows), dim=1)


def _all_blocks(batch: Tensor, learnt: dict[str, Tensor]) -> list[Tensor]:
    """Fisher vectors of every block, then the layout: a list of [B, ...], each row of unit norm."""
    pixels = batch.float() / 255
    parts = []
    for block in BLOCKS:
        mixture = [
            learnt[f"{block.name}.{part}"] for part in ("project", "offset", "mean", "variance", "prior")
        ]
        parts.append(_fisher(_descriptors(block, pixels), *mixture))
    return [*parts, _layout(pixels)]


def _pixels(image: Image.Image) -> Tensor:
    from torchvision.transforms.functional import pil_to_tensor

    return pil_to_tensor(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, reducing_gap=3.0))


def _resized(pixels: Tensor, size: int) -> Tensor:
    if pixels.shape[-1] == size:
        return pixels
    return functional.interpolate(
        pixels, size=(size, size), mode="bilinear", antialias=True, align_corners=False
    )


def _opponent(pixels: Tensor) -> Tensor:
    red, green, blue = pixels.unbind(1)
    return torch.stack([(red + green + blue) / 3, (red - green) / 2, (red + green) / 4 - blue / 2], 1)


def _orientations(pixels: Tensor) -> Tensor:
    """Gradient energy in eight directions, shape [B, 8, H, W]."""
    grey = pixels.mean(1, keepdim=True)
    padded = functional.pad(grey, (1, 1, 1, 1), mode="replicate")
    dx = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    dy = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    length = (dx.square() + dy.square() + 1e-12).sqrt()
    angles = torch.arange(NUM_ORIENTATIONS) * (2 * math.pi / NUM_ORIENTATIONS)
    towards = dx / length * angles.cos().view(1, -1, 1, 1) + dy / length * angles.sin().view(1, -1, 1, 1)
    towards.clamp_min_(0)
    eighth = towards.square().square_().square_()
    return eighth.mul_(towards).mul_(length)


def _descriptors(block: Block, pixels: Tensor) -> Tensor:
    """Descriptors on a grid, shape [B, P, F]."""
    scaled = _resized(pixels, block.size)
    if block.kind == "gradient":
        cells = functional.avg_pool2d(_orientations(scaled), block.cell)
    elif block.kind == "colour":
        cells = functional.avg_pool2d(_opponent(scaled), block.cell)
    else:
        cells = scaled
    found = functional.unfold(cells, block.cells, stride=block.stride).transpose(1, 2)
    if block.kind == "gradient":
        found = (found / (found.sum(2, keepdim=True) + 1e-3)).sqrt()
    elif block.kind == "detail":
        found = found - found.mean(2, keepdim=True)
        found = found / (found.square().mean(2, keepdim=True) + 5e-4).sqrt()
    return found


def _turned(block: Block) -> Tensor:
    """For each rotation and mirror image of a descriptor, which of its numbers stands where, shape [G, F]."""
    channels = NUM_ORIENTATIONS if block.kind == "gradient" else 3
    places = torch.arange(channels * block.cells**2).reshape(channels, block.cells, block.cells)
    turned = []
    for mirrored in (False, True):
        for quarter in range(4):
            order = torch.arange(channels)
            if block.kind == "gradient":
                order = (order + quarter * NUM_ORIENTATIONS // 4) % NUM_ORIENTATIONS
                order = (NUM_ORIENTATIONS // 2 - order) % NUM_ORIENTATIONS if mirrored else order
            one = places[order]
            one = one.flip(2) if mirrored else one
            turned.append(one.rot90(quarter, (1, 2)).reshape(-1))
    return torch.stack(turned)


def _fit_block(block: Block, images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Whitening and mixture of one block, learnt from descriptors drawn from all images."""
    wanted = max(8, math.ceil(NUM_DESCRIPTORS / len(images)))
    drawn = []
    for part in images.split(BATCH):
        found = _descriptors(block, part.float() / 255)
        at = torch.randint(found.shape[1], (len(found), min(wanted, found.shape[1])), generator=generator)
        drawn.append(found.gather(1, at[:, :, None].expand(-1, -1, found.shape[2])).flatten(0, 1))
    found = torch.cat(drawn)
    turned = _turned(block)
    found = found.gather(1, turned[torch.randint(len(turned), (len(found),), generator=generator)])
    centre = found.mean(0)
    centred = (found - centre).double()
    variance, axes = torch.linalg.eigh(centred.T @ centred / len(found))
    variance, axes = variance.flip(0)[: block.dims], axes.flip(1)[:, : block.dims]
    axes = axes * _signs(axes)
    whitening = (axes / (variance.clamp_min(0) + 1e-3 * variance[0] + 1e-9).sqrt()).float()
    mean, variance_KD, prior = _mixture((found - centre) @ whitening, block.components, generator)
    rotated = [whitening[one.argsort()] for one in turned]
    return {
        f"{block.name}.project": torch.cat(rotated, 1),
        f"{block.name}.offset": -(centre @ whitening),
        f"{block.name}.mean": mean,
        f"{block.name}.variance": variance_KD,
        f"{block.name}.prior": prior,
    }


def _leading(products_NN: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Leading eigenvalues [R], falling, and eigenvectors [N, R] of a positive matrix, R at most 512 and at least 1.

    By subspace iteration: the last few are rough, which does not matter for axes to project on, and it takes a
    twentieth of the time of a full decomposition.
    """
    count = len(products_NN)
    width = min(count, DIMS + SPARE_DIMS)
    basis = torch.randn(count, width, generator=generator, dtype=products_NN.dtype)
    for _ in range(POWER_ROUNDS):
        basis = torch.linalg.qr(products_NN @ basis).Q
    variance, small = torch.linalg.eigh(basis.T @ products_NN @ basis)
    variance, vectors = variance.flip(0)[:DIMS], basis @ small.flip(1)[:, :DIMS]
    kept = max(1, int((variance > MIN_SHARE * variance[0]).sum()))
    vectors = vectors[:, :kept]
    return variance[:kept].clamp_min(1e-12), vectors * _signs(vectors)


def _signs(axes: Tensor) -> Tensor:
    """Signs that make the largest entry of each column positive: an eigenvector's own sign is arbitrary."""
    return axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()


def _mixture(found: Tensor, components: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Means [K, D], variances [K, D] and priors [K] of a diagonal mixture of normals: k-means, then EM."""
    count = len(found)
    mean = found[torch.randint(count, (components,), generator=generator)].clone()
    for _ in range(KMEANS_ROUNDS):
        nearest = (found @ mean.T - mean.square().sum(1) / 2).argmax(1)
        member = functional.one_hot(nearest, components).float()
        sizes = member.sum(0)
        mean = member.T @ found / sizes.clamp_min(1)[:, None]
        empty = (sizes == 0).nonzero().squeeze(1)
        mean[empty] = found[torch.randint(count, (len(empty),), generator=generator)]
    variance = torch.ones_like(mean)
    prior = torch.full((components,), 1 / components)
    for _ in range(EM_ROUNDS):
        share = _responsibilities(found, mean, variance, prior)
        sizes = share.sum(0) + 1e-6
        mean = share.T @ found / sizes[:, None]
        variance = (share.T @ found.square() / sizes[:, None] - mean.square()).clamp_min(MIN_VARIANCE)
        prior = sizes / sizes.sum()
    return mean, variance, prior


def _responsibilities(found: Tensor, mean: Tensor, variance: Tensor, prior: Tensor) -> Tensor:
    """Posterior of each component for descriptors [..., D], shape [..., K]; e^-45 of the largest at least.

    Of smaller ones many would be denormal numbers, with which products take ten times as long.
    """
    constant = prior.log() - ((mean.square() / variance).sum(1) + variance.log().sum(1)) / 2
    flat = found.flatten(0, -2)
    logits = torch.addmm(constant, flat.square(), (-0.5 / variance).T).addmm_(flat, (mean / variance).T)
    least = logits.amax(1, keepdim=True) - LEAST_NATS
    return torch.maximum(logits, least, out=logits).softmax(1).view(*found.shape[:-1], -1)


def _fisher(
    found: Tensor, project: Tensor, offset: Tensor, mean: Tensor, variance: Tensor, prior: Tensor
) -> Tensor:
    """Fisher vectors of descriptors [B, P, F], in all rotations and mirror images; shape [B, K (1 + 2 D)]."""
    dims = len(offset)
    white = (found @ project).reshape(len(found), -1, dims) + offset
    share = _responsibilities(white, mean, variance, prior)
    number = white.shape[1]
    zeroth = share.sum(1) / number
    first = share.transpose(1, 2) @ white / number
    second = share.transpose(1, 2) @ white.square() / number
    by_mean = (first - zeroth[:, :, None] * mean) / variance.sqrt() / prior.sqrt()[:, None]
    by_variance = second - 2 * mean * first + (mean.square() - variance) * zeroth[:, :, None]
    by_variance = by_variance / variance / (2 * prior).sqrt()[:, None]
    by_prior = (zeroth - prior) / prior.sqrt()
    gradient = torch.cat([by_prior, by_mean.flatten(1), by_variance.flatten(1)], 1)
    return functional.normalize(gradient.sign() * gradient.abs().sqrt(), dim=1)


def _layout(pixels: Tensor) -> Tensor:
    """Colour and gradient directions on a 4 x 4 grid, shape [B, 176], unit norm."""
    side = SIZE // 2 // LAYOUT_CELLS
    half = _resized(pixels, SIZE // 2)
    colour = functional.avg_pool2d(_opponent(half), side).flatten(1)
    edges = functional.avg_pool2d(_orientations(half), side).flatten(1).sqrt()
    return torch.cat(
        [functional.normalize(colour, dim=1), functional.normalize(edges, dim=1)], 1
    ) / math.sqrt(2)
