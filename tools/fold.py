"""
Fold a LangBridge with raw scores (normalize "none") into a two-layer MLP, for deployment.

    from tools.fold import fold
    mlp_connector = fold(vlm.connector)
"""
import torch

from model import MLPConnector


@torch.no_grad()
def fold(connector):
    """Return an MLPConnector that computes the same function as a LangBridge with raw scores.

    Nothing but the GELU is non-linear there, so its last three products are one:
    W' = E^T W W2 and b' = E^T (W b2 + b). The products are made in float64 and returned in the
    connector's dtype. The result belongs to this LLM and its words can no longer be read.
    ValueError for another normalisation.
    """
    if connector.normalize != "none":
        raise ValueError("only a connector with normalize=none folds: a softmax is not linear")
    first, _, second = connector.mlp
    E = connector.vocab_embeds.double()                             # (K, D)
    W = connector.to_scores.weight.double() / connector.temperature             # (K, H)
    b = connector.to_scores.bias.double() / connector.temperature               # (K,)
    EW = E.T @ W                                                    # (D, K) x (K, H) -> (D, H)
    folded = MLPConnector(first.in_features, E.shape[1], first.out_features).to(first.weight)
    folded.mlp[0].load_state_dict(first.state_dict())
    folded.mlp[2].weight.copy_(EW @ second.weight.double())         # (D, H) x (H, H) -> (D, H)
    folded.mlp[2].bias.copy_(EW @ second.bias.double() + b @ E)
    return folded
