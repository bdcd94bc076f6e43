"""Both towers of an open_clip model, frozen as encoders, or with gradient for fine-tuning.

Encoders compute only what reaches the embedding: no padding after the end-of-text token, shared beginnings of captions
once (`prefixes`), and of an image tower's last block the class token alone. The embeddings are the same.

Shapes: B = images or captions of a batch; L = text positions; P = patches; D = dimensions.
"""

from __future__ import annotations

import json
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import VisionTransformer
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.serialization import config as loading

from nc_audit.encoders.blocks import attended_by, feed, is_plain
from nc_audit.encoders.open_clip_specs import HUB_CONFIG, HUB_NAMES, hub_home, parse
from nc_audit.encoders.prefixes import PrefixTree, last_hidden, prefix_trees
from nc_audit.encoders.weights import (
    autocast,
    digest_ahead,
    digest_of_encoder,
    hub_file,
    lowered_,
    normalised,
    pixel_steps,
    read_weights,
)
from nc_audit.errors import EncoderError

if TYPE_CHECKING:
    from nc_audit.encoders import EncoderPlan

TOKENS_AT_ONCE = {"cpu": 2_048, "cuda": 32_768}  # per batch of captions, what they share counted once


@contextmanager
def _undrawn() -> Iterator[None]:
    """No weight is drawn at random meanwhile, which would take a second; a file has to hold all of them."""
    names = ("normal_", "uniform_", "kaiming_uniform_", "xavier_uniform_", "trunc_normal_")
    before = {name: getattr(nn.init, name) for name in names}
    for name in names:
        setattr(nn.init, name, lambda tensor, *_, **__: tensor)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(nn.init, name, function)


class OpenClipModel:
    """A loaded model, from which the two encoders are taken, and whose towers can be trained.

    The encoders share the model's weights. Take them once those are final: their digests are those of the moment.
    """

    def __init__(self, spec: str, file: Path | None, plan: EncoderPlan) -> None:
        self.spec = spec
        self.device = plan.device
        self.precision = plan.precision
        self.image_options = plan.image_options
        kind, name, file = parse(spec, file)
        if kind == "hub":
            config = hub_file(name, (HUB_CONFIG,), spec)
            path = file or hub_file(name, HUB_NAMES, spec)
            model_name, pretrained, preprocess, quick_gelu = f"local-dir:{config.parent}", None, {}, False
        elif kind == "tag":
            model_name, _, tag = name.partition("/")
            path = file or hub_file(*hub_home(model_name, tag), spec)
            pretrained = str(path)
            trained = open_clip.get_pretrained_cfg(model_name, tag)
            preprocess = {
                key: trained[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in trained
            }
            quick_gelu = bool(trained.get("quick_gelu", False))
        else:
            assert file is not None
            model_name, path, pretrained, preprocess, quick_gelu = name, file, str(file), {}, False
        if path.suffix not in (".safetensors", ".npz"):
            read_weights(path)  # refuses what is unsafe or no weights file, with a clear error
        options = plan.image_options
        preprocess |= {key: value for key in ("mean", "std") if (value := getattr(options, key)) is not None}
        try:
            is_whole = (
                pretrained is not None and path.suffix != ".npz"
            )  # open_clip then insists on every weight
            # A mapped file is read once, into the model, and not into memory first.
            is_mapped = zipfile.is_zipfile(path)
            with (
                warnings.catch_warnings(),
                _undrawn() if is_whole else nullcontext(),
                loading.patch("load.mmap", is_mapped),  # type: ignore[attr-defined]
            ):
                warnings.simplefilter("ignore")  # open_clip's own, about defaults that are chosen here
                self.model = open_clip.create_model(
                    model_name,
                    pretrained,
                    force_quick_gelu=quick_gelu,
                    force_image_size=options.size,
                    force_preprocess_cfg=preprocess,
                    pretrained_text=False,
                    **options.options,
                )
                if kind == "hub" and file is not None:
                    open_clip.load_checkpoint(self.model, str(file))
                self.tokenizer = open_clip.get_tokenizer(model_name)
        except Exception as problem:
            first = (str(problem).splitlines() or [type(problem).__name__])[0]
            raise EncoderError(
                f"{path.name} does not make {spec}: {first}", "check model name and weights"
            ) from problem
        self.model.eval().requires_grad_(False)
        self.model.to(self.device)
        self.preprocess_config = dict(self.model.visual.preprocess_cfg)
        self.text_tower = getattr(self.model, "text", self.model)
        self.can_cut = _is_causal(self.model, self.text_tower)
        self.has_patches = _has_patches(self.model)
        self.needs_class_token_only = _needs_class_token_only(self.model.visual)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The weights by name, as they stand."""
        return self.model.state_dict()

    @property
    def logit_scale(self) -> float | None:
        """Factor of the cosine, as it stands; None where the model has none."""
        scale = getattr(self.model, "logit_scale", None)
        return float(scale.detach().exp().mean()) if scale is not None else None

    def digest(self) -> str:
        """Digest of the whole model and its weights, as they stand."""
        facts = {"model": _shape_of(self.model), "preprocess": self.preprocess_config}
        return digest_of_encoder(facts | {"precision": self.precision}, self.tensors)

    def image_encoder(self) -> OpenClipImages:
        """The image tower."""
        return OpenClipImages(self)

    def text_encoder(self) -> OpenClipCaptions:
        """The text tower."""
        return OpenClipCaptions(self)

    def settle(self) -> None:
        """Training is over: lay weights out as encoding is quickest. Take the encoders before it."""
        lowered_(self.model, self.precision)
        if self.can_cut and is_plain(self.text_tower.transformer):
            # Masked attention takes its input with the position first, and would copy it batch by batch.
            self.text_tower.transformer.batch_first = False
            for block in self.text_tower.transformer.resblocks:
                block.attn.batch_first = False

    def tokenise(self, captions: Sequence[str]) -> Tensor:
        """Token numbers of captions, shape [B, L], on the CPU; L is the longest of them where that is enough."""
        tokens_BL = self.tokenizer(list(captions))
        return tokens_BL[:, : int(tokens_BL.argmax(1).max()) + 1] if self.can_cut else tokens_BL

    def image_outputs(self, batch: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the image tower makes of a batch, with gradient.

        Args:
            batch: bytes, shape [B, 3, H, W].

        Returns:
            Unit vectors [B, D], and what each patch adds to the space of embeddings: after the final norm, times the
            projection, shape [B, P, D], of any length; None where the tower has no patches. Both float32, on the
            model's device.
        """
        config, visual = self.preprocess_config, self.model.visual
        pixels = normalised(batch, tuple(config["mean"]), tuple(config["std"]), self.device)
        with autocast(self.device, self.precision):
            if not self.has_patches:
                return functional.normalize(self.model.encode_image(pixels).float(), dim=1), None
            visual.output_tokens = True
            try:
                pooled_BD, tokens = visual(pixels)
            finally:
                visual.output_tokens = False
            if visual.final_ln_after_pool:
                tokens = visual.ln_post(tokens)
            tokens_BPD = _projected(tokens, visual.proj)
        return functional.normalize(pooled_BD.float(), dim=1), tokens_BPD.float()

    def caption_outputs(self, tokens_BL: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What the text tower makes of a batch, with gradient.

        Args:
            tokens_BL: token numbers, shape [B, L], from `tokenise`.

        Returns:
            Unit vectors [B, D]; each position after the final norm, times the projection, shape [B, L, D], of any
            length; and which positions are words, bool [B, L]: neither padding nor the start nor the end of the text
            (the end alone, in a caption without a word). The latter two are None where the tower is not CLIP's own.
        """
        tokens_BL = tokens_BL.to(self.device)
        with autocast(self.device, self.precision):
            if not self.can_cut:
                return functional.normalize(self.model.encode_text(tokens_BL).float(), dim=1), None, None
            tower, end_B = self.text_tower, tokens_BL.argmax(1)
            hidden = tower.ln_final(_hidden(tower, tokens_BL))
            outputs_BLD = _projected(hidden, tower.text_projection).float()
        at_L = torch.arange(tokens_BL.shape[1], device=self.device)
        is_word_BL = at_L < end_B[:, None]
        is_word_BL &= tokens_BL != getattr(self.tokenizer, "sot_token_id", -1)
        is_word_BL |= ~is_word_BL.any(1, keepdim=True) & (at_L == end_B[:, None])
        own_BD = outputs_BLD[torch.arange(len(end_B), device=self.device), end_B]
        return functional.normalize(own_BD, dim=1), outputs_BLD, is_word_BL


class OpenClipImages:
    """Images to unit vectors; where the tower has patches, `tokens` gives them."""

    def __init__(self, owner: OpenClipModel) -> None:
        self.owner, self.spec = owner, owner.spec
        self.device, self.precision = owner.device, owner.precision
        self.model = owner.model
        config = owner.preprocess_config
        size = config["size"]
        self.input_size: tuple[int, int] = (
            (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        )
        self.mean, self.std = tuple(config["mean"]), tuple(config["std"])
        self.preprocess_pixels = pixel_steps(image_transform_v2(PreprocessCfg(**config), is_train=False))
        facts = {
            "side": "image",
            "precision": self.precision,
            "preprocess": config,
            "model": _shape_of(self.model),
        }
        facts["options"] = owner.image_options.options
        visual = {name: tensor for name, tensor in owner.tensors.items() if name.startswith("visual.")}
        self._digest = digest_ahead(facts, visual)
        self._vectors = (
            partial(_of_class_token, self.model.visual)
            if owner.needs_class_token_only
            else self.model.encode_image
        )
        self.dim = self.encode(torch.zeros(1, 3, *self.input_size, dtype=torch.uint8)).shape[1]
        if owner.has_patches:
            self.tokens = self._tokens

    @property
    def digest(self) -> str:
        """Of the tower, its weights as they stood when it was taken, and its preprocessing."""
        return self._digest.result()

    def preprocess(self, image: Image.Image) -> Tensor:
        """One RGB image as bytes [3, H, W]."""
        return self.preprocess_pixels(image)

    @torch.inference_mode()
    def encode(self, batch: Tensor) -> Tensor:
        """Bytes [B, 3, H, W] to unit vectors [B, D], float32, on the CPU."""
        with autocast(self.device, self.precision):
            vectors = self._vectors(normalised(batch, self.mean, self.std, self.device))
        return functional.normalize(vectors.float(), dim=1).cpu()

    @torch.inference_mode()
    def _tokens(self, batch: Tensor) -> Tensor:
        """Patches of bytes [B, 3, H, W] in the space of the embeddings, [B, P, D], float32, on the CPU."""
        _, tokens_BPD = self.owner.image_outputs(batch)
        assert tokens_BPD is not None
        return tokens_BPD.cpu()


class OpenClipCaptions:
    """Captions to unit vectors; where the tower is CLIP's own, `tokens` gives their words."""

    def __init__(self, owner: OpenClipModel) -> None:
        self.owner, self.spec = owner, owner.spec
        self.device, self.precision = owner.device, owner.precision
        self.model, self.tokenizer = owner.model, owner.tokenizer
        self.tower = owner.text_tower
        self.has_tree = owner.can_cut and is_plain(self.tower.transformer)
        self.at_once = TOKENS_AT_ONCE[self.device]
        self.context = int(getattr(self.tokenizer, "context_length", None) or self.model.context_length)
        facts = {
            "side": "text",
            "precision": self.precision,
            "context": self.context,
            "model": _shape_of(self.model),
        }
        text = {name: tensor for name, tensor in owner.tensors.items() if not name.startswith("visual.")}
        self._digest = digest_ahead(facts, text)
        self.dim = self.encode(["a"]).shape[1]
        if owner.can_cut:
            self.tokens = self._tokens

    @property
    def digest(self) -> str:
        """Of the tower, its weights as they stood when it was taken, and its context."""
        return self._digest.result()

    @torch.inference_mode()
    def encode(self, captions: Sequence[str]) -> Tensor:
        """Captions to unit vectors [N, D], float32, on the CPU."""
        if not captions:
            return torch.zeros(0, self.dim)
        tokens = self.tokenizer(list(captions))
        if not self.has_tree:
            return torch.cat(
                [
                    self._unit(self.model.encode_text, part.to(self.device))
                    for part in tokens.split(self.at_once // tokens.shape[1] or 1)
                ]
            )
        lengths = tokens.argmax(1) + 1  # the end-of-text token has the highest number
        trees = list(prefix_trees(tokens, lengths, self.at_once))
        in_order = torch.cat([self._unit(self._of_tree, tree.to(self.device)) for tree in trees])
        vectors = torch.empty_like(in_order)
        vectors[torch.cat([tree.rows for tree in trees])] = in_order
        return vectors

    def _unit(self, embed: Callable[[Any], Tensor], part: Any) -> Tensor:
        with autocast(self.device, self.precision):
            vectors = embed(part)
        return functional.normalize(vectors.float(), dim=1).cpu()

    def _of_tree(self, tree: PrefixTree) -> Tensor:
        return _projected(self.tower.ln_final(last_hidden(self.tower, tree)), self.tower.text_projection)

    @torch.inference_mode()
    def _tokens(self, captions: Sequence[str]) -> Tensor:
        """Words of captions in the space of the embeddings, [N, L, D], zero where there is none, on the CPU."""
        _, tokens_BLD, is_word_BL = self.owner.caption_outputs(self.owner.tokenise(captions))
        assert tokens_BLD is not None
        assert is_word_BL is not None
        return (tokens_BLD * is_word_BL[:, :, None]).cpu()

    def truncated(self, captions: Sequence[str]) -> list[bool]:
        """For each caption, whether it has more tokens than the model's context."""
        if isinstance(self.tokenizer, open_clip.SimpleTokenizer):
            room = self.context - 2  # beside the tokens that begin and end a text
            return [
                not _fits(caption, room) and len(self.tokenizer.encode(caption)) > room
                for caption in captions
            ]
        inner = getattr(self.tokenizer, "tokenizer", None)
        if inner is None:
            return [False] * len(captions)
        return [len(tokens) > self.context for tokens in inner(list(captions), truncation=False)["input_ids"]]


def _fits(caption: str, num_tokens: int) -> bool:
    """Whether a caption makes no more tokens than that, as can be told by its length.

    Each token is of a byte at least that is no space. Cleaning may lengthen what is not ASCII, and what stands for
    something else in HTML.
    """
    return len(caption) - caption.count(" ") <= num_tokens and caption.isascii() and "&" not in caption


def _hidden(tower: Any, tokens_BL: Tensor) -> Tensor:
    """What the text tower's blocks make of token sequences as long as its context or shorter."""
    dtype, length = tower.transformer.get_cast_dtype(), tokens_BL.shape[1]
    hidden = tower.token_embedding(tokens_BL).to(dtype) + tower.positional_embedding[:length].to(dtype)
    return tower.transformer(hidden, attn_mask=tower.attn_mask[:length, :length])


def _of_class_token(visual: Any, pixels: Tensor) -> Tensor:
    """The image tower's embedding, of which the last block works out the class token alone, [B, D]."""
    hidden = visual._embeds(pixels)
    *blocks, last = visual.transformer.resblocks
    for block in blocks:
        hidden = block(hidden)
    normed = last.ln_1(hidden)
    seen = attended_by(last.attn, normed[:, 0], normed, lambda of_tokens: of_tokens)
    return _projected(visual.ln_post(feed(last, hidden[:, 0], seen)), visual.proj)


def _projected(hidden: Tensor, projection: Any) -> Tensor:
    if projection is None:
        return hidden
    return projection(hidden) if isinstance(projection, torch.nn.Module) else hidden @ projection


def _has_patches(model: Any) -> bool:
    """Whether the image tower is CLIP's own ViT, whose patches pass the same norm and projection as its embedding."""
    visual = model.visual
    return (
        type(model) in (open_clip.CLIP, open_clip.CustomTextCLIP)
        and isinstance(visual, VisionTransformer)
        and visual.attn_pool is None
        and visual.pool_type in ("tok", "avg")
        and not visual.output_tokens
    )


def _needs_class_token_only(visual: Any) -> bool:
    """Whether nothing but the class token of the image tower's last block reaches the embedding."""
    return (
        type(visual) is VisionTransformer
        and visual.attn_pool is None
        and visual.pool_type == "tok"
        and not visual.output_tokens
        and visual.transformer.batch_first
        and hasattr(visual, "_embeds")
        and is_plain(visual.transformer)
    )


def _is_causal(model: Any, tower: Any) -> bool:
    """Whether the text tower is CLIP's own: causal, pooled at the end-of-text token, nothing appended or masked."""
    pool = getattr(model, "text_pool_type", None) if tower is model else getattr(tower, "pool_type", None)
    return (
        type(model) in (open_clip.CLIP, open_clip.CustomTextCLIP)
        and pool == "argmax"
        and getattr(tower, "attn_mask", None) is not None
        and getattr(tower, "cls_emb", None) is None
        and not getattr(tower, "use_pad_mask", False)
        and not getattr(tower, "output_tokens", False)
    )


def _shape_of(model: Any) -> str:
    """The modules of a model as text: what the weights alone do not say (activations, heads)."""
    return json.dumps(str(model))
