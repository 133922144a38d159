"""
LangBridge: a connector that writes every image patch as a combination of an LLM's own words.
(Interpreting Image as a Combination of Language Embeddings, ICCV 2025, arXiv 2503.19404)

    z = MLP(vision_tower(image))             (N, P, H)
    s = z @ W.T + b                          (N, P, K)   one score for each of K shared words
    w = softmax(s)  or  w = s                (N, P, K)   the paper's text, or its released code
    image_embeds = w @ E                     (N, P, D)   E: the LLM's own embeddings of the words

The connector trains its MLP, W and b. None of them has a dimension of the LLM. E comes from the
LLM and is never trained. Therefore the connector moves to another LLM when E is replaced. A "word"
is a token that the tokenizers of several LLMs share, such as " dog" or "ing".

Letters that the whole project uses:
    B samples in a batch    P patches of an image    H connector width    Dv vision width
    N images in a batch     K shared words           D LLM width          V LLM vocabulary
    T tokens                S side of an image in pixels

This file holds the model alone. checkpoint.py builds, loads and saves it, train.py trains it, and
generate.py writes answers with it.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import fused
from conversation import IGNORE, IMAGE_ID, eos_ids
from vocab import word_ids
from support.tiles import check_tiles, join_tiles, num_tokens
from support.tower import pooled_side, tower_hidden

# Logits are made for this many tokens at a time. 2048 x 151,936 float32 are 1.2 GB.
LOSS_ROWS = 2048


# --------------------------------------------------------------------------------------------------
# the method

class LangBridge(nn.Module):
    """The connector of the paper: Linear, GELU, Linear, a score for each word, a sum of embeddings.

    The weights are word_weights(scores / temperature, normalize). With a temperature below 1, fewer
    words share a patch. plain_bytes: if all scores take more bytes than this, fused.py computes the
    softmax in blocks; 0 means 1/32 of the device's memory.
    At the paper's sizes, with Dv = 1024, the connector has 129,790,720 parameters.
    """

    def __init__(self, Dv, H=5120, K=19200, normalize="softmax", temperature=1.0, plain_bytes=0):
        super().__init__()
        word_weights(torch.zeros(K), normalize)         # ValueError for a name without a formula
        self.normalize = normalize
        self.temperature = temperature
        self.mlp = nn.Sequential(nn.Linear(Dv, H), nn.GELU(), nn.Linear(H, H))
        self.to_scores = nn.Linear(H, K)                            # W [K, H] and b [K]
        # E [K, D] belongs to the LLM. A non-persistent buffer is in no state dict, so E is not
        # saved with the connector, and no tensor of connector.safetensors has the dimension D.
        self.register_buffer("vocab_embeds", None, persistent=False)
        self.plain_bytes = plain_bytes

    def forward(self, patches):
        """Return the image embeds: patches float[N, P, Dv] -> float[N, P, D]."""
        z = self.mlp(patches) / self.temperature                    # (N, P, Dv) -> (N, P, H)
        W, b, E = self.to_scores.weight, self.to_scores.bias / self.temperature, self.vocab_embeds
        # `combine` below, or its version in fused.py, which needs less memory.
        best_combine = fused.choose(combine, z, len(W), self.normalize, self.plain_bytes)
        return best_combine(z, W, b, E, self.normalize)             # (N, P, H) -> (N, P, D)

    def scores(self, patches):
        """Return each word's score in each patch: float[N, P, Dv] -> float32[N, P, K]."""
        return self.to_scores(self.mlp(patches)).float()            # (N, P, K)

    def weights(self, patches):
        """Return each word's weight in each patch: float[N, P, Dv] -> float32[N, P, K]."""
        return word_weights(self.scores(patches) / self.temperature, self.normalize)


def word_weights(scores, normalize):
    """Return the weights of the words: scores float[..., K] -> float[..., K].

    To try another normalisation, add its name and formula here. Do not edit these two formulas:
    fused.py has a second copy of them. A new formula has none, so all its scores stay in memory.
    """
    if normalize == "softmax":
        return scores.softmax(dim=-1)       # the paper's text
    if normalize == "none":
        return scores                       # the released code: scores of any sign
    raise ValueError(f"normalize is {normalize!r}, and model.word_weights has no such formula")


def combine(z, W, b, E, normalize):
    """Return the vocabulary combination: every row of z becomes a weighted sum of the rows of E.

    z float[..., H], W float[K, H], b float[K], E float[K, D] -> float[..., D]
    """
    scores = z @ W.T + b                                            # (..., H) x (H, K) -> (..., K)
    w = word_weights(scores, normalize)                             # (..., K)
    return w @ E.to(z.dtype)                                        # (..., K) x (K, D) -> (..., D)


def words_loss(scores, targets, frequencies, background=0.0, patch_weight=0.0):
    """Return the words loss of one sample, summed over the words of its answer: float32 scalar.

    scores float[N, P, K]: the patches of one sample's N images. targets int64[n]: the words of the
    answer. frequencies float[K]: how often each word is in all answers, sum 1. This loss is this
    project's own and needs no LLM. With p(word | patch), the softmax at temperature 1, it is

        sum over targets of  -log((1 - background) * mean over patches of p(word | patch)
                                  + background * frequency)
        + n * patch_weight * mean over patches of
                             -log(sum over targets of p(word | patch) / frequency)

    The first part is small if each word of the answer has a high probability in some patch. It
    takes the mean over patches, so different patches can name different words. A frequent word such
    as "a" is already likely by its frequency, so no patch has to name it. The second
    part rewards a patch for naming any word of the answer, and more for a rare one (a frequency
    counts as at least 1e-6). Without the second part, a patch that names none of the words gets
    almost no gradient. The first part is a sum of n terms, so the second is multiplied by n.
    """
    # Logarithms, because a probability that underflows to 0 would make the loss infinite.
    log_p = scores.float().log_softmax(dim=-1).flatten(0, 1)        # (N, P, K) -> (N * P, K)
    log_mean = log_p.logsumexp(dim=0) - math.log(len(log_p))        # (K,), of the mean
    log_chance = (background * frequencies).log()                   # (K,)
    log_p_image = torch.logaddexp(log_mean + math.log(1 - background), log_chance)
    loss = -log_p_image[targets].sum()
    if patch_weight:
        log_lift = log_p[:, targets] - frequencies[targets].clamp(min=1e-6).log()   # (N * P, n)
        loss = loss - patch_weight * len(targets) * log_lift.logsumexp(dim=1).mean()
    return loss


@torch.no_grad()
def initial_W(E, H):
    """Return a W in which words of like meaning have like rows: float[K, D] -> float32[K, H].

    The embeddings are centred and projected to H random directions. Each row gets the length of a
    row of torch's default initialisation. This is a start only, and W has no dimension D, so the
    connector can still move.
    """
    directions = nn.init.orthogonal_(torch.empty(E.shape[1], H))    # (D, H)
    W = (E.float().cpu() - E.float().cpu().mean(dim=0)) @ directions
    return F.normalize(W, dim=1) / 3 ** 0.5                         # default rows have this length


@torch.no_grad()
def embed_words(llm, tokenizer, words, sum_pieces=True):
    """Return E, the LLM's own input embedding of each word: float32[K, D].

    A word that is not one token of this tokenizer gets the sum of the embeddings of its pieces; if
    sum_pieces is False, their mean, as in old checkpoints. ValueError if a number is not finite.
    """
    pieces = word_ids(words, tokenizer)                             # K lists of ids
    embed = llm.get_input_embeddings()
    device = embed.weight.device
    ids = torch.tensor([i for word in pieces for i in word], device=device)
    # Call the module, do not index its weight: Gemma's embedding multiplies by sqrt(D).
    rows = embed(ids).float().cpu()                                 # (number of pieces, D)
    parts = rows.split([len(word) for word in pieces])              # K tensors
    E = torch.stack([part.sum(0) if sum_pieces else part.mean(0) for part in parts])    # (K, D)
    not_finite = (~E.isfinite()).any(dim=1).nonzero()
    if len(not_finite):
        raise ValueError(f"the embedding of {words[int(not_finite[0])]!r} is not finite")
    return E.to(device)


# --------------------------------------------------------------------------------------------------
# the baseline

class MLPConnector(nn.Module):
    """LLaVA-1.5's connector, mlp2x_gelu. It knows the width of its LLM and cannot move.

    H: width of the hidden layer, D by default. Source: haotian-liu/LLaVA, multimodal_projector.
    """

    def __init__(self, Dv, D, H=None):
        super().__init__()
        H = H or D
        self.mlp = nn.Sequential(nn.Linear(Dv, H), nn.GELU(), nn.Linear(H, D))

    def forward(self, patches):
        """Return the image embeds: patches float[N, P, Dv] -> float[N, P, D]."""
        return self.mlp(patches)


# --------------------------------------------------------------------------------------------------
# vision tower + connector + LLM

@dataclass
class Config:
    """What a VLM is made of. A checkpoint's config.json holds it, beside other entries."""
    vision_tower: str                   # hub name or folder
    llm: str                            # hub name or folder
    connector: str = "langbridge"       # or "mlp"
    hidden: int = 5120                  # H; 0 means D for "mlp", as in LLaVA-1.5
    num_words: int = 19200              # K
    normalize: str = "softmax"          # see word_weights
    temperature: float = 1.0            # of the words' weights; 1 in the paper
    vision_layer: int = -2              # the hidden state of the tower that the connector reads
    image_size: int = 0                 # S in pixels; 0 means the tower's own size
    pool: int = 1                       # the mean of pool x pool patches becomes one patch
    tiles: tuple = ()                   # grids of tiles, ((width, height), ...) in pixels; (): none


def make_connector(config, Dv, D):
    """Return a new connector of the kind that `config` names. ValueError for an unknown kind."""
    if config.connector == "langbridge":
        return LangBridge(Dv, config.hidden, config.num_words, config.normalize, config.temperature)
    if config.connector == "mlp":
        return MLPConnector(Dv, D, config.hidden)
    raise ValueError(f'connector is "langbridge" or "mlp", not {config.connector!r}')


class VLM(nn.Module):
    """A vision tower, a connector and an LLM. checkpoint.py makes one with `build` or `load`.

    words: the K shared words as strings, None for an MLP.
    image_settings: {"size": S, "mean": 3 floats, "std": 3 floats} of the pictures that it takes.
    fingerprint: {"llm": hashes, "vision_tower": hashes}, see support/fingerprint.py.
    own_parts: which of "llm" and "vision_tower" the checkpoint holds itself.
    sum_pieces: see embed_words.
    """

    def __init__(self, config, vision_tower, connector, llm, tokenizer, words, image_settings,
                 fingerprint=None, own_parts=(), sum_pieces=True):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.words = words
        self.image_settings = image_settings
        self.fingerprint = fingerprint or {}
        self.own_parts = set(own_parts)
        self.sum_pieces = sum_pieces
        self.vision_tower = vision_tower
        self.connector = connector
        self.llm = llm
        self.sharded = False                # support/sharding.py cuts the LLM into pieces
        self.num_patches = pooled_side(vision_tower.config, image_settings["size"],
                                       config.pool) ** 2
        check_tiles(config.tiles, image_settings["size"])
        # A learned embedding ends each row of tiles. Its dimension is D. Therefore the embedding
        # belongs to the LLM and does not move with the connector.
        self.image_newline = None
        if config.tiles:
            D = llm.get_input_embeddings().embedding_dim
            device = next(connector.parameters()).device
            self.image_newline = nn.Parameter((torch.randn(D) / D ** 0.5).to(device))       # (D,)
        self.eos_ids = eos_ids(llm, tokenizer)
        # The mask comes from lengths, so any id can pad. These ids are no part of a printed text.
        self.pad_id = tokenizer.pad_token_id
        if self.pad_id is None:
            self.pad_id = min(self.eos_ids, default=0)
        # The cap on Gemma-2's logits. support/pretrained.py refuses LLMs with other changes.
        self.softcap = getattr(llm.config, "final_logit_softcapping", None)
        self.max_positions = getattr(llm.config, "max_position_embeddings", None)

    def patch_features(self, pixel_values):
        """Return the tower's patches: float32[N, 3, S, S] -> float[N, P, Dv].

        They are the hidden state `vision_layer` without CLS and register tokens. To keep the CLS
        token of CLIP, add one to num_patches above (with pool 1 and without tiles).
        Patches that were computed before, float[N, P, Dv], come back as they are.
        """
        if pixel_values.dim() == 3:
            return pixel_values.to(self.vision_tower.device)
        trains = any(p.requires_grad for p in self.vision_tower.parameters())
        # A frozen tower computes in its own dtype, without autocast.
        device = pixel_values.device.type
        autocast = torch.autocast(device, enabled=trains and torch.is_autocast_enabled(device))
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains), autocast:
            hidden = tower_hidden(self.vision_tower, pixel_values)[self.config.vision_layer]
        pool = self.config.pool
        hidden = hidden[:, -self.num_patches * pool ** 2:]          # CLS and registers come first
        if pool == 1:
            return hidden
        side = int(self.num_patches ** 0.5)
        cells = hidden.unflatten(1, (side, pool, side, pool))      # (N, side, pool, side, pool, Dv)
        return cells.mean(dim=(2, 4)).flatten(1, 2)                 # (N, P, Dv)

    def encode(self, pixel_values):
        """Return the image embeds: pixels or patches, see patch_features, -> float[N, P, D]."""
        patches = self.patch_features(pixel_values)                 # (N, P, Dv)
        dtype = next(self.connector.parameters()).dtype
        return self.connector(patches.to(dtype))                    # (N, P, Dv) -> (N, P, D)

    def check_positions(self, T):
        """Raise ValueError if a sample of T tokens has more tokens than the LLM has positions."""
        if self.max_positions and T > self.max_positions:
            raise ValueError(f"{T} tokens are more than the {self.max_positions} positions of "
                             f"{self.config.llm}")

    def num_tokens(self, picture_size=None):
        """Return how many image embeds an image has; with tiles this depends on its size."""
        return num_tokens(picture_size, self.num_patches, self.config.tiles,
                          self.image_settings["size"])

    def arrange_images(self, image_embeds, picture_sizes):
        """Return what the LLM sees of each image: float[squares, P, D] -> list of float[P_i, D].

        picture_sizes: the (width, height) of each image in pixels. Without them, and without tiles,
        each image is one square. If you change P_i, change num_tokens of support/tiles.py, too.
        """
        if not (picture_sizes and self.config.tiles):
            return list(image_embeds)
        return join_tiles(image_embeds, picture_sizes, self.config.tiles,
                          self.image_settings["size"], self.image_newline.to(image_embeds.dtype))

    def splice(self, input_ids, pixel_values, image_index=None, picture_sizes=None):
        """Return text embeddings, with image embeds where IMAGE_ID stands: float[B, T, D].

        input_ids int64[B, T]; pixel_values float32[N, 3, S, S] or None; picture_sizes: see
        `arrange_images`. Images fill the positions in reading order, row by row. image_index: the
        number of the image at each place, default 0, 1, 2, ... A number may come again.
        Keep the ids on the CPU: a search in a tensor of the GPU makes the CPU wait.
        ValueError if the number of image positions is not that of the image embeds.
        """
        device = self.llm.device
        is_image = input_ids == IMAGE_ID                            # (B, T)
        embed = self.llm.get_input_embeddings()
        text_ids = input_ids.masked_fill(is_image, 0).to(device, non_blocking=True)
        embeds = embed(text_ids)                                    # (B, T) -> (B, T, D)
        if pixel_values is None or len(pixel_values) == 0:
            if is_image.any():
                raise ValueError("the ids have image positions, and there is no image")
            if self.sharded:
                # FSDP gathers pieces in the backward pass, so all ranks need the same graph. A rank
                # without images adds a blank image times 0.
                side = self.image_settings["size"]
                blank = self.encode(torch.zeros(1, 3, side, side, device=embeds.device))
                embeds = embeds + 0 * blank.sum().to(embeds.dtype)
            return embeds
        images = self.arrange_images(self.encode(pixel_values), picture_sizes)
        if image_index is not None:
            images = [images[i] for i in image_index]
        image_embeds = torch.cat(images).to(embeds.dtype)           # (image positions, D)
        positions = is_image.flatten().nonzero()[:, 0]              # in B * T
        if len(positions) != len(image_embeds):
            raise ValueError(f"{len(positions)} image positions for {len(image_embeds)} image "
                             f"embeds of {len(images)} images")
        positions = positions.to(device, non_blocking=True)
        flat = embeds.flatten(0, 1)                                 # (B, T, D) -> (B * T, D)
        return flat.index_copy(0, positions, image_embeds).view_as(embeds)

    def forward(self, batch):
        """Return the summed cross-entropy of the trained tokens (float32) and their number (int).

        batch: as data.collate makes it. The caller divides, because only the caller knows the
        number of trained tokens in the whole global batch. `sum_words_loss` is another loss.
        Ids, labels and masks stay on the CPU, see `splice`.
        """
        self.check_positions(int(batch["position_ids"].max()) + 1)
        embeds = self.splice(batch["input_ids"], batch["pixel_values"],
                             picture_sizes=batch.get("picture_sizes"))  # (B, T, D)
        # Attention is causal, so padding on the right needs no mask, and attention without a mask
        # is faster. Images that are hidden (data.without_images) do need the mask.
        mask = batch["attention_mask"]                              # (B, T)
        is_right_padded = (mask.diff(dim=1) <= 0).all()
        mask = None if is_right_padded else mask.to(embeds.device)
        output = self.llm.get_decoder()(
            inputs_embeds=embeds, attention_mask=mask,
            position_ids=batch["position_ids"].to(embeds.device, non_blocking=True),
            use_cache=False)
        hidden = output.last_hidden_state.flatten(0, 1)             # (B, T, D) -> (B * T, D)
        targets = batch["labels"].roll(-1, dims=1)                  # position t predicts token t+1
        targets[:, -1] = IGNORE                                     # (B, T)
        # Logits of all positions would be the largest tensor of the run.
        trained = (targets != IGNORE).flatten().nonzero()[:, 0]     # in B * T
        targets = targets.flatten()[trained].to(hidden.device, non_blocking=True)
        hidden = hidden.index_select(0, trained.to(hidden.device, non_blocking=True))
        return self.token_loss(hidden, targets), len(trained)

    def sum_words_loss(self, batch, frequencies, background, patch_weight):
        """Return the words loss summed over the words of all answers, and their number (int).

        batch: as for forward. Its "word_index" int64[B, T] holds for each trained token which
        shared word it is, or -1. Samples without an image or without a word are skipped.
        frequencies, background, patch_weight: see words_loss.
        """
        if not len(batch["pixel_values"]):
            return torch.zeros((), device=frequencies.device), 0
        patches = self.patch_features(batch["pixel_values"])        # (N, P, Dv)
        dtype = next(self.connector.parameters()).dtype
        scores = self.connector.scores(patches.to(dtype))           # (N, P, K)
        counts = (batch["input_ids"] == IMAGE_ID).sum(dim=1) // self.num_tokens()
        loss, number = scores.sum() * 0, 0
        for row, image_scores in zip(batch["word_index"], scores.split(counts.tolist())):
            targets = row[row >= 0].to(scores.device, non_blocking=True)
            if len(image_scores) and len(targets):
                loss = loss + words_loss(image_scores, targets, frequencies, background,
                                         patch_weight)
                number += len(targets)
        return loss, number

    def logits(self, hidden):
        """Return the logits of hidden states: float[n, D] -> float32[n, V]."""
        logits = self.llm.get_output_embeddings()(hidden).float()   # (n, D) x (D, V) -> (n, V)
        if self.softcap:                                            # Gemma-2
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def token_loss(self, hidden, targets):
        """Return the cross-entropy summed over tokens: float[n, D], int64[n] -> float32 scalar."""
        def chunk_loss(hidden, targets):
            return F.cross_entropy(self.logits(hidden), targets, reduction="sum")

        if len(targets) <= LOSS_ROWS:
            return chunk_loss(hidden, targets)
        # The backward pass makes the logits of a chunk again, so that none have to be kept.
        chunks = zip(hidden.split(LOSS_ROWS), targets.split(LOSS_ROWS))
        return sum(checkpoint(chunk_loss, h, t, use_reentrant=False) for h, t in chunks)
