"""
LangBridge: a vision-language connector that writes every image patch as a combination of an LLM's own word embeddings.
(Interpreting Image as a Combination of Language Embeddings, ICCV 2025, arXiv 2503.19404)

    z = MLP(vision_tower(image))             (B, P, H)
    s = z @ W.T + b                          (B, P, K)   one score for each word of a shared vocabulary
    w = softmax(s)  or  w = s                (B, P, K)   "softmax": the paper's text; "none": its released code
    image_embeds = w @ E                     (B, P, D)   E: the LLM's own input embeddings of those K words

The default here is a third way, "unit": w = softmax(s), image_embeds = w / |w| @ (E - mean of E). See `combine`. The
MLP, W and b are trained and know nothing of the LLM; E is the LLM's and is never trained. Another LLM means another E.

Letters used on_all_ranks in this project:
    B samples in a batch     P patches of an image    H connector width      Dv vision width   T tokens
    N images in a batch      K shared words           D LLM width            V LLM vocabulary  S image side in pixels
"""
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from data import IGNORE, IMAGE_ID
from fused import combine

NORMALIZE = ("unit", "softmax", "none")
LOSS_ROWS = 2048       # trained tokens whose logits exist at one time: 2048 x 151,936 in float32 is 1.2 GB


class LangBridge(nn.Module):
    """Linear, GELU, Linear, then one score for each word, and the words' embeddings added up by these scores.

    normalize "softmax": a probability distribution, as the paper says; "none": raw scores of any sign, as its code does;
    "unit": a distribution whose result is as long as a word (see `combine`). gain: spread of W at the start, in units of
    torch's default. At the paper's sizes 129,790,720 parameters, none with a dimension of the LLM.
    """

    def __init__(self, Dv, H=5120, K=19200, normalize="unit", gain=1.0):
        super().__init__()
        if normalize not in NORMALIZE:
            raise ValueError(f"normalize is one of {', '.join(NORMALIZE)}, not {normalize!r}")
        self.normalize = normalize
        self.mlp = nn.Sequential(nn.Linear(Dv, H), nn.GELU(), nn.Linear(H, H))
        self.to_scores = nn.Linear(H, K)                                # W [K, H] and b [K]
        with torch.no_grad():
            self.to_scores.weight.mul_(gain)
        # What belongs to the LLM is a buffer that no state dict holds: it is what a transfer replaces.
        self.register_buffer("vocab_embeds", None, persistent=False)  # E float[K, D]

    def forward(self, patches):
        """patches float[N, P, Dv] -> image embeds float[N, P, D]"""
        return combine(self.mlp(patches), self.to_scores.weight, self.to_scores.bias, self.vocab_embeds, self.normalize)

    def weights(self, patches):
        """patches float[N, P, Dv] -> float32[N, P, K], what each word contributes to each patch"""
        return word_weights(self.mlp(patches), self.to_scores.weight, self.to_scores.bias, self.normalize)

    @torch.no_grad()
    def fold(self):
        """The same function as a two-layer MLP, for deployment: -> MLPConnector with W' = E^T W W2, b' = E^T (W b2 + b)

        Only for normalize "none", where nothing but the GELU is not linear, else ValueError. One-way: the result
        belongs to this LLM and its words can no longer be told. Made in float64, returned in the connector's dtype.
        """
        if self.normalize != "none":
            raise ValueError("only a connector with normalize=none folds into an MLP: a softmax is not linear")
        first, _, second = self.mlp
        E, W = self.vocab_embeds.double(), self.to_scores.weight.double()   # (K, D), (K, H)
        EW = E.T @ W                                                    # (D, K) x (K, H) -> (D, H)
        folded = MLPConnector(first.in_features, E.shape[1], first.out_features).to(first.weight)
        folded.mlp[0].load_state_dict(first.state_dict())
        folded.mlp[2].weight.copy_(EW @ second.weight.double())         # (D, H) x (H, H) -> (D, H)
        folded.mlp[2].bias.copy_(EW @ second.bias.double() + self.to_scores.bias.double() @ E)
        return folded


class MLPConnector(nn.Module):
    """LLaVA-1.5's mlp2x_gelu, the baseline. H defaults to D; the fair match of raw LangBridge is H = its width.
    (haotian-liu/LLaVA, multimodal_projector)"""

    def __init__(self, Dv, D, H=None):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(Dv, H or D), nn.GELU(), nn.Linear(H or D, D))

    def forward(self, patches):
        """patches float[N, P, Dv] -> image embeds float[N, P, D]"""
        return self.mlp(patches)


def word_weights(z, W, b, normalize):
    """The share of each word in each patch, z [..., H] -> float32 [..., K]: p, of "unit", too, or the raw scores of
    "none". For looking at, not for training."""
    scores = F.linear(z, W, b).float()                              # (..., H) x (H, K) -> (..., K)
    return scores if normalize == "none" else scores.softmax(-1)


@dataclass
class Config:
    """What a VLM is made of; the first part of a checkpoint's config.json."""
    vision_tower: str                   # hub name or folder
    llm: str                            # hub name or folder
    connector: str = "langbridge"       # or "mlp"
    hidden: int = 5120                  # H; for "mlp" 0 means D, as in LLaVA-1.5
    num_words: int = 19200              # K
    normalize: str = "unit"             # or "softmax", "none"
    vision_layer: int = -2              # which hidden state of the tower; the CLS token is never used
    image_size: int = 0                 # S in pixels; 0 means the tower's own


class VLM(nn.Module):
    """A vision tower, a connector and an LLM. Build one with `build`, read one with `load`."""

    def __init__(self, config, vision_tower, connector, llm, tokenizer, words, image):
        super().__init__()
        self.config, self.tokenizer, self.words, self.image_settings = config, tokenizer, words, image
        self.vision_tower, self.connector, self.llm = vision_tower, connector, llm
        self.sharded = False                                        # see shard_vlm
        self.num_patches = (image["size"] // vision_tower.config.patch_size) ** 2
        if not self.num_patches:
            raise ValueError(f"image_size {image['size']} is less than a patch, {vision_tower.config.patch_size} pixels")
        eos = llm.generation_config.eos_token_id if llm.generation_config else None
        eos = eos if isinstance(eos, list) else [eos]
        self.eos_ids = {i for i in [*eos, tokenizer.eos_token_id] if i is not None}
        # Masks come from lengths, so any id will do to pad with. Not 0: that is a "!" in many LLMs, and puzzles a reader.
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(self.eos_ids, default=0)
        text = llm.config.get_text_config()
        if getattr(text, "logit_scale", None) or getattr(text, "logits_scaling", None):
            raise ValueError(f"{config.llm} scales its logits in a way that the loss here does not know")
        self.softcap = getattr(text, "final_logit_softcapping", None)

    def patch_features(self, pixel_values):
        """float32[N, 3, S, S] -> float[N, P, Dv], the tower's hidden state `vision_layer` without CLS and registers"""
        tower = self.vision_tower
        kwargs = {}
        if self.image_settings["size"] != tower.config.image_size and tower.config.model_type != "dinov2":
            kwargs["interpolate_pos_encoding"] = True               # DINOv2 always does
        with torch.set_grad_enabled(torch.is_grad_enabled() and next(tower.parameters()).requires_grad):
            # The one place where pictures move to the device: whoever calls need not know where the tower is.
            out = tower(pixel_values.to(tower.device, tower.dtype), output_hidden_states=True, **kwargs)
        return out.hidden_states[self.config.vision_layer][:, -self.num_patches:]   # CLS and registers come first

    def encode(self, pixel_values):
        """float32[N, 3, S, S] -> image embeds float[N, P, D]"""
        patches = self.patch_features(pixel_values)                 # (N, P, Dv)
        return self.connector(patches.to(next(self.connector.parameters()).dtype))

    def splice(self, input_ids, pixel_values, image_index=None):
        """Text embeddings with the images in their places: int64[B, T], float32[N, 3, S, S] or None -> float[B, T, D]

        Images fill the runs of IMAGE_ID in reading order: row after row, left to right. image_index: the number of the image
        for each run, where they are not 0, 1, 2, ...: an image that comes twice is encoded once.
        """
        input_ids = input_ids.to(self.llm.device)
        is_image = input_ids == IMAGE_ID                            # (B, T)
        # The module, not its weight: Gemma's multiplies by sqrt(D).
        embeds = self.llm.get_input_embeddings()(input_ids.masked_fill(is_image, 0))   # (B, T, D)
        if pixel_values is None or len(pixel_values) == 0:
            if self.sharded:
                # Another rank may have images, and waits for this one's pieces: look at nothing, times 0.
                S = self.image_settings["size"]
                embeds = embeds + 0 * self.encode(torch.zeros(1, 3, S, S, device=embeds.device)).sum().to(embeds.dtype)
            return embeds
        image_embeds = self.encode(pixel_values)                    # (N, P, D)
        if image_index is not None:
            image_embeds = image_embeds[image_index]                      # (runs, P, D)
        if is_image.sum() != image_embeds.shape[0] * image_embeds.shape[1]:
            raise ValueError(f"{is_image.sum()} image positions for {tuple(image_embeds.shape[:2])} images x patches")
        return embeds.masked_scatter(is_image[..., None], image_embeds.to(embeds.dtype))

    def forward(self, batch):
        """Summed cross-entropy over the trained tokens and their number.

        batch: as data.collate makes it. -> (float32 scalar, int). Dividing is left to the caller, who knows the number
        of trained tokens in the whole global batch (pytorch/torchtitan does the same).
        """
        embeds = self.splice(batch["input_ids"], batch["pixel_values"])              # (B, T, D)
        # What follows a row's last token is seen by none of its tokens, so padding on the right needs no mask, and without
        # one attention does half the work. Images that are hidden (data.without_images) do need it.
        mask = batch["attention_mask"]
        mask = None if (mask.diff(dim=1) <= 0).all() else mask
        hidden = self.llm.get_decoder()(inputs_embeds=embeds, attention_mask=mask, position_ids=batch["position_ids"],
                                        use_cache=False).last_hidden_state
        targets = batch["labels"][:, 1:]                            # position t predicts token t + 1
        trained = targets != IGNORE                                 # (B, T-1)
        # Logits only where a token is trained: over all positions they would be the largest tensor of the run.
        return self.token_loss(hidden[:, :-1][trained], targets[trained]), int(trained.sum())

    def logits(self, hidden):
        """float[n, D] -> float32[n, V]"""
        logits = self.llm.get_output_embeddings()(hidden).float()   # (n, D) x (D, V) -> (n, V)
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits

    def token_loss(self, hidden, targets):
        """hidden float[n, D], targets int64[n] -> float32 scalar, summed over n"""
        def rows_loss(hidden, targets):
            return F.cross_entropy(self.logits(hidden), targets, reduction="sum")
        if len(targets) <= LOSS_ROWS:
            return rows_loss(hidden, targets)
        return sum(checkpoint(rows_loss, h, t, use_reentrant=False)
                   for h, t in zip(hidden.split(LOSS_ROWS), targets.split(LOSS_ROWS)))
